r"""The components of CP networks on latent coordinates, many networks at one time.

.. math::
    g_j(x) = \prod_{i=1}^{d} \psi_{ij}(z_i), \qquad z_i = \sigma(h_i), \quad h = W x + v, \qquad
    \psi_{ij}(z) = \sum_b \alpha_{ibj} B_b\big(\tfrac12 + s_i (z - \tfrac12)\big)

with the logistic function :math:`\sigma`, B-splines on uniform cells of [0, 1] and knot scales :math:`s_i`, one unless
given. Where :math:`s_i > 1` the polynomials of the outermost cells go on outside of the knots.

A policy is trained in many small steps, and the time of one is the number of its operations. So this is one node of the
graph with its gradient by hand: the degree + 1 functions that are not zero are written into a matrix with a column for
each sample, one batched product sums them for all axes and networks, and another gives the gradient of each factor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from sna_core.bspline import CELL_POLYNOMIALS, UniformBSpline


def squashed_product(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factors: Tensor,
    num_networks: int,
    num_cells: int,
    scale: Tensor | None = None,
    *,
    fused: bool = True,
) -> Tensor:
    r"""Evaluates :math:`g_j` for several networks, samples and components.

    The gradient of a factor is the product divided by it. A factor that is zero would lose its own, so each is moved by
    the root of the smallest number of its type, or less: nothing beside rounding, and enough to divide by.

    Args:
        x: Inputs of a dense layer, the same for all networks (inputs, samples) or of each (networks, inputs, samples).
        weight: W, (networks * latents, inputs). None takes x for the coordinates h, (networks * latents, samples).
        bias: v, (networks * latents, 1); None goes with None.
        factors: :math:`\alpha`, (networks * latents, num_cells + degree, rank); the degree is one of 0 to 5.
        num_networks: How many networks.
        num_cells: Cells of [0, 1].
        scale: s, (networks * latents, 1), or None for ones.
        fused: One node of the graph, to be differentiated once. Otherwise, and in a compiled graph, the same in
            PyTorch's own operations, any number of times.

    Returns:
        (networks, rank, samples), in the dtype of the factors, also under autocast. NaN where a coordinate of that
        sample and network is.
    """
    if torch.is_autocast_enabled(x.device.type):  # products of many factors want the precision of the factors
        with torch.autocast(x.device.type, enabled=False):
            return squashed_product(
                x.to(factors.dtype), weight, bias, factors, num_networks, num_cells, scale, fused=fused
            )
    arguments = (x, weight, bias, factors, scale, num_networks, num_cells)
    if fused and torch.is_grad_enabled() and not is_traced():
        return _SquashedProduct.apply(*arguments)
    return _evaluate(*arguments)[0]


def is_traced() -> bool:
    """Whether operations are being recorded, to be compiled or exported, and others must not take their place."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def squashed_product_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factors: Tensor,
    num_networks: int,
    num_cells: int,
    scale: Tensor | None = None,
) -> Tensor:
    """The formula as written, an axis at a time over the whole basis: the oracle of :func:`squashed_product`."""
    spline = UniformBSpline(num_cells, factors.shape[1] - num_cells)
    latents = len(factors) // num_networks
    products = []
    for network in range(num_networks):
        functions = []
        for axis in range(network * latents, (network + 1) * latents):
            inputs = x if x.ndim == 2 else x[network]
            h = x[axis] if weight is None or bias is None else weight[axis] @ inputs + bias[axis]
            z = torch.sigmoid(h)
            if scale is not None:
                z = 0.5 + scale[axis] * (z - 0.5)
            functions.append(spline.dense(z, check=False) @ factors[axis])  # (samples, rank)
        products.append(reduce(torch.mul, functions).mT)
    return torch.stack(products)


# Shapes from here on: rows are networks * latents; z (rows, samples), u (rows, 1, samples), index and values (rows,
# degree + 1, samples), basis (rows, num_basis, samples), psi (rows, rank, samples).


def _evaluate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factors: Tensor,
    scale: Tensor | None,
    num_networks: int,
    num_cells: int,
) -> tuple[Tensor, ...]:
    """The product, and what its gradient needs."""
    z = torch.sigmoid(x if weight is None or bias is None else _dense(x, weight, bias))
    position = z * num_cells if scale is None else (z - 0.5) * (num_cells * scale) + 0.5 * num_cells
    position = position.unsqueeze(1)
    cell = position.long().clamp_(0, num_cells - 1)  # also of NaN
    u = position - cell
    degree = int(factors.shape[1]) - num_cells  # sizes are tensors where torch.jit traces
    index = cell + _steps(degree, cell.device)
    basis = u.new_zeros(len(z), factors.shape[1], z.shape[1])
    basis = basis.scatter_(1, index, _cell_values(u, degree, 0))
    psi = torch.bmm(factors.mT, basis)
    limits = torch.finfo(psi.dtype)
    psi.add_(min(limits.tiny**0.5, limits.eps / 4))  # float16: its tiny is not
    return psi.view(num_networks, len(psi) // num_networks, *psi.shape[1:]).prod(1), z, u, index, basis, psi


class _SquashedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        factors: Tensor,
        scale: Tensor | None,
        num_networks: int,
        num_cells: int,
    ) -> Tensor:
        results = _evaluate(x, weight, bias, factors, scale, num_networks, num_cells)
        ctx.save_for_backward(*results, x, weight, factors, scale)
        ctx.num_cells = num_cells
        return results[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: a second derivative would miss these operations
            raise RuntimeError("squashed_product(fused=True) is differentiated once; give fused=False.")
        product, z, u, index, basis, psi, x, weight, factors, scale = ctx.saved_tensors
        for_x, for_weight, for_bias, for_factors, for_scale, *_ = ctx.needs_input_grad
        of_x = of_weight = of_bias = of_factors = of_scale = None
        of_product = (gradient * product).contiguous()  # in the layout of psi
        of_psi = (of_product.unsqueeze(1) / psi.view(len(product), len(psi) // len(product), *psi.shape[1:])).view_as(
            psi
        )
        if for_factors:
            of_factors = torch.bmm(basis, of_psi.mT)
        if for_x or for_weight or for_bias or for_scale:
            of_values = torch.bmm(factors, of_psi).gather(1, index)
            of_position = of_values.mul_(_cell_values(u, index.shape[1] - 1, 1)).sum(1)
            if for_scale:
                of_scale = (of_position * (z - 0.5)).sum(-1, keepdim=True) * ctx.num_cells
            of_position *= ctx.num_cells if scale is None else ctx.num_cells * scale
            of_h = torch.ops.aten.sigmoid_backward(of_position, z)
            if weight is None:
                of_x = of_h
            else:
                of_bias = of_h.sum(-1, keepdim=True) if for_bias else None
                of_x, of_weight = _of_dense(of_h, x, weight, for_x, for_weight)
        return of_x, of_weight, of_bias, of_factors, of_scale, None, None


def _dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A dense layer for all networks, (rows, samples): one product where they share x."""
    if x.ndim == 2:
        return torch.addmm(bias, weight, x)
    return torch.baddbmm(bias.view(len(x), -1, 1), weight.view(len(x), -1, weight.shape[1]), x).flatten(0, 1)


def _of_dense(
    of_h: Tensor, x: Tensor, weight: Tensor, for_x: bool, for_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a dense layer's inputs and weight."""
    shape = weight.shape
    if x.ndim == 3:
        of_h, weight = of_h.unflatten(0, (len(x), -1)), weight.view(len(x), -1, shape[1])
    return (weight.mT @ of_h if for_x else None), ((of_h @ x.mT).view(shape) if for_weight else None)


def _cell_values(u: Tensor, degree: int, derivative: int) -> Tensor:
    """The functions of one cell, or their derivatives in the position."""
    if derivative > degree:
        return torch.zeros_like(u)
    *lower, last = _rows(degree, derivative, u.dtype, u.device)
    if not lower:
        return last + 0 * u
    values = torch.addcmul(lower[-1], last, u)
    for row in reversed(lower[:-1]):
        values = torch.addcmul(row, values, u)
    return values


def _rows(degree: int, derivative: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Coefficients of 1, u, u^2 ... of a cell's functions, each (degree + 1, 1)."""

    def make() -> tuple[Tensor, ...]:
        table = CELL_POLYNOMIALS[degree, derivative]
        return torch.tensor(table, dtype=dtype, device=device).unsqueeze(-1).unbind()

    return _kept((degree, derivative, dtype, device), make)


def _steps(degree: int, device: torch.device) -> Tensor:
    """(degree + 1, 1)."""
    return _kept((degree, device), lambda: (torch.arange(degree + 1, device=device).unsqueeze(-1),))[0]


_constants: dict[tuple, tuple[Tensor, ...]] = {}


def _kept(key: tuple, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Constants, made once since making them takes time; those of a graph that is traced hold no numbers to keep."""
    if is_traced():
        return make()
    if key in _constants:
        return _constants[key]
    with torch.inference_mode(False):
        constants = make()
    if type(constants[0]) is Tensor:
        _constants[key] = constants
    return constants
