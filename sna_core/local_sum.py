r"""Sums of B-splines that touch only the functions that are not zero: :math:`\sum_b \alpha_{ibw} B_b^{(n)}(x_i)`.

Evaluation reads degree + 1 rows of the factors :math:`\alpha` a point. It is linear in them, and its adjoint

.. math::
    (x, g) \mapsto \Big(\sum_p B_b^{(n)}(x_{ip})\, g_{ipw}\Big)_{ibw}

adds to as many. The derivative of either in x is the same map with order n + 1, so that these two, each of which is the
other's gradient, differentiate any number of times without a graph through the search for the cell. On a GPU
evaluation is the kernel of :mod:`sna_core.local_sum_triton`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, reduce
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sna_core.bspline import UniformBSpline, check_inside, local_bspline


class Interval(Protocol):
    """What has two ends, as a basis of one input."""

    @property
    def low(self) -> float:
        """The left one."""

    @property
    def high(self) -> float:
        """The right one."""


def local_sum(
    x: Tensor, factors: Tensor, splines: Sequence[UniformBSpline], derivative: int = 0, *, check: bool = True
) -> Tensor:
    r"""Evaluates :math:`\sum_b \alpha_{ibw} B_b^{(n)}(x_i)` for each input i.

    Differentiable any number of times, in x and in the factors, in reverse and in forward mode and under
    ``torch.func`` transforms.

    Args:
        x: Points (..., num_inputs).
        factors: :math:`\alpha`, (num_inputs, num_basis, ...): the coefficients along each input, for any number of
            functions w.
        splines: One for each input, with the same ``num_cells`` and ``degree``.
        derivative: Order n, at least 0; above the degree the sum is zero.
        check: Whether to look for points outside their interval. ``False`` leaves out the look at every value, for
            which a compiled graph breaks and a GPU waits; the caller then vouches that x lies in the intervals.

    Returns:
        (num_inputs, ..., functions), with the dimensions of x before the last and those of the factors after the
        second.

    Raises:
        ValueError: If a point is NaN or outside its interval, x has another width or dtype than the factors, the order
            is negative, the splines differ or the factors are not theirs.
    """
    num_inputs, spline = len(splines), splines[0]
    if any((s.num_cells, s.degree) != (spline.num_cells, spline.degree) for s in splines):
        raise ValueError("the splines differ in num_cells or degree; evaluate the inputs of one kind at a time.")
    if factors.shape[:2] != (num_inputs, spline.num_basis):
        raise ValueError(
            f"factors have shape {tuple(factors.shape)}; expected ({num_inputs}, {spline.num_basis}, ...), the "
            "coefficients of each input's spline."
        )
    if not isinstance(derivative, int) or derivative < 0:
        raise ValueError(f"derivative = {derivative!r}; expected an integer of at least 0.")
    x = check_points(x, splines, factors.dtype, inside=check)
    low = x.new_tensor([s.low for s in splines])
    width = x.new_tensor([s.high - s.low for s in splines])
    columns = x.reshape(-1, num_inputs).mT.contiguous()  # (num_inputs, points)
    sums = _evaluate(
        columns,
        factors.reshape(*factors.shape[:2], -1),
        low.unsqueeze(-1),
        width.unsqueeze(-1),
        spline.num_cells,
        spline.degree,
        derivative,
    )
    return sums.view(num_inputs, *x.shape[:-1], *factors.shape[2:])


def check_points(x: Tensor, splines: Sequence[Interval], dtype: torch.dtype, *, inside: bool = True) -> Tensor:
    """Returns x (..., num_inputs); raises a ``ValueError`` unless it has a column of ``dtype`` for each spline, in its
    interval. In an exported graph, points outside are NaN (:func:`~sna_core.bspline.check_inside`).
    """
    num_inputs = len(splines)
    if x.shape[-1:] != (num_inputs,):
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., {num_inputs}), a column for each input.")
    if x.dtype != dtype:
        raise ValueError(f"x is {x.dtype} and the factors are {dtype}; convert with x.to({dtype}).")
    if inside:
        low, high = (x.new_tensor([getattr(s, end) for s in splines]) for end in ("low", "high"))
        return check_inside(x, low, high, num_inputs)
    return x


def local_sum_reference(
    x: Tensor, factors: Tensor, splines: Sequence[UniformBSpline], derivative: int = 0, *, check: bool = True
) -> Tensor:
    """The sum over the whole basis: the oracle of :func:`local_sum`."""
    bases = [spline.dense(x[..., i], derivative, check=check) for i, spline in enumerate(splines)]
    sums = [torch.tensordot(basis, of_input, 1) for basis, of_input in zip(bases, factors, strict=True)]
    return torch.stack(sums)


# Shapes from here on: x (inputs, points), factors (inputs, num_basis, functions), low and width (inputs, 1), gradient
# (inputs, points, functions).


def _evaluate(
    x: Tensor, factors: Tensor, low: Tensor, width: Tensor, num_cells: int, degree: int, derivative: int
) -> Tensor:
    """The sums (inputs, points, functions)."""
    function = _Evaluate if torch.compiler.is_compiling() else _EvaluateWithTangents
    return function.apply(x, factors, low, width, num_cells, degree, derivative)


def _accumulate(
    x: Tensor, gradient: Tensor, low: Tensor, width: Tensor, num_cells: int, degree: int, derivative: int
) -> Tensor:
    """The adjoint in the factors: (inputs, num_basis, functions)."""
    function = _Accumulate if torch.compiler.is_compiling() else _AccumulateWithTangents
    return function.apply(x, gradient, low, width, num_cells, degree, derivative)


@cache
def _kernels() -> ModuleType | None:
    """The kernel's module, imported once it is needed; None where there is no Triton."""
    try:
        from sna_core import local_sum_triton
    except ImportError:
        return None
    return local_sum_triton


def _uses_kernels(x: Tensor) -> bool:
    """Whether Triton evaluates: not in a compiled graph, which fuses PyTorch's own operations."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return False
    kernels = _kernels()
    return kernels is not None and kernels.is_available(x)


class _Linear(torch.autograd.Function):
    """What the two maps share: their first two arguments are tensors to differentiate, linear in the second."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.num_cells, ctx.degree, ctx.derivative = inputs
        ctx.save_for_backward(*tensors)


class _Evaluate(_Linear):
    """:func:`_evaluate` for ``torch.compile``, which takes no function with tangents."""

    @staticmethod
    def forward(
        x: Tensor, factors: Tensor, low: Tensor, width: Tensor, num_cells: int, degree: int, derivative: int
    ) -> Tensor:
        kernels = _kernels() if _uses_kernels(x) else None
        if kernels is not None:
            return kernels.local_sum_triton(x, factors, low, width, num_cells, degree, derivative)
        num_inputs, num_basis, num_functions = factors.shape
        cell, values = local_bspline(x, low, width, num_cells, degree, derivative)
        first = cell + num_basis * torch.arange(num_inputs, device=x.device).unsqueeze(-1)
        rows = first.unsqueeze(-1) + torch.arange(degree + 1, device=x.device)  # (inputs, points, degree + 1)
        # One kernel that reads the rows and stores none.
        sums = F.embedding_bag(
            rows.flatten(0, 1), factors.flatten(0, 1), per_sample_weights=values.flatten(0, 1), mode="sum"
        )
        return sums.view(*x.shape, num_functions)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, factors, low, width = ctx.saved_tensors
        to_x = to_factors = None
        if ctx.needs_input_grad[0]:
            slopes = _evaluate(x, factors, low, width, ctx.num_cells, ctx.degree, ctx.derivative + 1)
            to_x = (gradient * slopes).sum(-1)
        if ctx.needs_input_grad[1]:
            to_factors = _accumulate(x, gradient, low, width, ctx.num_cells, ctx.degree, ctx.derivative)
        return to_x, to_factors, None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, factors: Tensor, low: Tensor, width: Tensor, *orders: int
    ) -> tuple[Tensor, int]:
        x_dim, factors_dim = in_dims[:2]
        if factors_dim is None:  # more points
            x = x.movedim(x_dim, 1)
            sums = _evaluate(x.flatten(1), factors, low, width, *orders)
            return sums.view(*x.shape, sums.shape[-1]), 1
        if x_dim is None:  # more functions
            factors = factors.movedim(factors_dim, 2)
            sums = _evaluate(x, factors.flatten(2), low, width, *orders)
            return sums.view(*x.shape, *factors.shape[2:]), 2
        x, factors = x.movedim(x_dim, 0), factors.movedim(factors_dim, 0)  # more inputs
        ends = (low.repeat(info.batch_size, 1), width.repeat(info.batch_size, 1))
        sums = _evaluate(x.flatten(0, 1), factors.flatten(0, 1), *ends, *orders)
        return sums.view(*x.shape, sums.shape[-1]), 0


class _Accumulate(_Linear):
    """:func:`_accumulate` for ``torch.compile``."""

    @staticmethod
    def forward(
        x: Tensor, gradient: Tensor, low: Tensor, width: Tensor, num_cells: int, degree: int, derivative: int
    ) -> Tensor:
        # Adding to single rows is slower than a matrix product for up to a hundred rows or so.
        cell, values = local_bspline(x, low, width, num_cells, degree, derivative)
        index = cell.unsqueeze(-1) + torch.arange(degree + 1, device=x.device)
        basis = values.new_zeros(*x.shape, num_cells + degree).scatter_(-1, index, values)
        return basis.mT @ gradient

    @staticmethod
    def backward(ctx: Any, to_sums: Tensor) -> tuple[Tensor | None, ...]:
        x, gradient, low, width = ctx.saved_tensors
        to_x = to_gradient = None
        if ctx.needs_input_grad[0]:
            slopes = _evaluate(x, to_sums, low, width, ctx.num_cells, ctx.degree, ctx.derivative + 1)
            to_x = (gradient * slopes).sum(-1)
        if ctx.needs_input_grad[1]:
            to_gradient = _evaluate(x, to_sums, low, width, ctx.num_cells, ctx.degree, ctx.derivative)
        return to_x, to_gradient, None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, gradient: Tensor, low: Tensor, width: Tensor, *orders: int
    ) -> tuple[Tensor, int]:
        x_dim, gradient_dim = in_dims[:2]
        if x_dim is None:  # more functions
            gradient = gradient.movedim(gradient_dim, 2)
            sums = _accumulate(x, gradient.flatten(2), low, width, *orders)
            return sums.view(*sums.shape[:2], *gradient.shape[2:]), 2
        batch = info.batch_size
        x = x.movedim(x_dim, 0)  # more inputs
        gradient = (
            gradient.expand(batch, *gradient.shape) if gradient_dim is None else gradient.movedim(gradient_dim, 0)
        )
        ends = (low.repeat(batch, 1), width.repeat(batch, 1))
        sums = _accumulate(x.flatten(0, 1), gradient.flatten(0, 1), *ends, *orders)
        return sums.view(batch, -1, *sums.shape[1:]), 0


class _WithTangents(_Linear):
    """What forward mode asks for beside ``jvp``, and ``torch.compile`` does not take."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Linear.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4])


class _EvaluateWithTangents(_WithTangents, _Evaluate):
    """:func:`_evaluate` with forward-mode derivatives."""

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor | None, of_factors: Tensor | None, *_: None) -> Tensor:
        x, factors, low, width = ctx.saved_tensors
        tangents = []
        if of_x is not None:
            slopes = _evaluate(x, factors, low, width, ctx.num_cells, ctx.degree, ctx.derivative + 1)
            tangents.append(of_x.unsqueeze(-1) * slopes)
        if of_factors is not None:
            tangents.append(_evaluate(x, of_factors, low, width, ctx.num_cells, ctx.degree, ctx.derivative))
        return reduce(torch.add, tangents)


class _AccumulateWithTangents(_WithTangents, _Accumulate):
    """:func:`_accumulate` with forward-mode derivatives."""

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor | None, of_gradient: Tensor | None, *_: None) -> Tensor:
        x, gradient, low, width = ctx.saved_tensors
        tangents = []
        if of_x is not None:
            weighted = of_x.unsqueeze(-1) * gradient
            tangents.append(_accumulate(x, weighted, low, width, ctx.num_cells, ctx.degree, ctx.derivative + 1))
        if of_gradient is not None:
            tangents.append(_accumulate(x, of_gradient, low, width, ctx.num_cells, ctx.degree, ctx.derivative))
        return reduce(torch.add, tangents)
