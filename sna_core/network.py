"""The CP class of separable networks: a sum of products of learnable functions of one input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sna_core.bspline import UniformBSpline
from sna_core.local_sum import check_points, local_sum

BLOCK_NUMEL = 2**20  # values of functions of one input at one time on a CPU, which its cache holds
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "gelu": F.gelu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}


class CPNetwork(nn.Module):
    r"""Canonical polyadic network with B-spline sub-atoms.

    .. math::
        f_o(x) = \rho\Big(\sum_{j=1}^{r} c_{oj} \prod_{i=1}^{d} \psi_i^{(oj)}(x_i)\Big), \qquad
        \psi_i^{(oj)}(x_i) = \sum_b \alpha_{iboj} B_b(x_i)

    (arXiv 2603.12244, eq. 1, 2 and 7). With unit weights and no activation this is KHRONOS.

    Parameters (in tensorly's words):
        ``factors`` :math:`\alpha`, (num_inputs, num_basis, num_outputs, rank): ``factors[i]`` holds the B-spline
        coefficients along input i. With shared components its third dimension is 1.
        ``weights`` c, (num_outputs, rank), or None for unit weights.

    At the start :math:`\alpha \sim N(1, 1/d)` and :math:`c \sim N(0, 1/r)`; with unit weights the draw of c multiplies
    the first input's factors. Before the activation f then has mean 0 and a variance from 1 to e, for any d and r.

    Args:
        num_inputs: d.
        num_outputs: Number of functions f_o.
        rank: Number r of components of each output, or of all together where they are shared.
        num_cells: Cells of each input's interval.
        degree: Degree of the B-splines, 0 to 5.
        low: Left end of the inputs' intervals, one for all or one for each.
        high: Right end, likewise.
        shared_components: Whether all outputs weight the same components.
        unit_weights: Whether c is fixed to one.
        activation: :math:`\rho`: None for the identity, a name in ``ACTIVATIONS``, or a callable.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: If a count is below 1, an interval is empty, the activation is unknown, or unit weights would make
            all outputs equal.
    """

    weights: nn.Parameter | None

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int = 1,
        *,
        rank: int,
        num_cells: int,
        degree: int = 3,
        low: float | Sequence[float] = 0.0,
        high: float | Sequence[float] = 1.0,
        shared_components: bool = False,
        unit_weights: bool = False,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_counts(num_inputs=num_inputs, num_outputs=num_outputs, rank=rank)
        if shared_components and unit_weights and num_outputs > 1:
            raise ValueError(
                f"shared components with unit weights make all {num_outputs} outputs equal; set one of them to False."
            )
        self.num_inputs, self.num_outputs, self.rank = num_inputs, num_outputs, rank
        self.low, self.high = one_each("low", low, num_inputs), one_each("high", high, num_inputs)
        self.splines = tuple(UniformBSpline(num_cells, degree, *ends) for ends in zip(self.low, self.high, strict=True))
        self.activation = activation_function(activation)

        num_basis, num_functions = self.splines[0].num_basis, 1 if shared_components else num_outputs
        self.factors = nn.Parameter(torch.empty(num_inputs, num_basis, num_functions, rank, device=device, dtype=dtype))
        self.register_parameter(
            "weights",
            None if unit_weights else nn.Parameter(torch.empty(num_outputs, rank, device=device, dtype=dtype)),
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the parameters anew, as the class says."""
        self.factors.normal_(1.0, self.num_inputs**-0.5)
        if self.weights is None:
            self.factors[0] *= torch.empty_like(self.factors[0, 0]).normal_(0.0, self.rank**-0.5)
        else:
            self.weights.normal_(0.0, self.rank**-0.5)

    def forward(self, x: Tensor, *, check: bool = True) -> Tensor:
        """Evaluates f at the points x: (..., num_inputs) -> (..., num_outputs), for a single output (..., 1).

        Differentiable any number of times, in x and in the parameters. ``check=False`` leaves out the look at every
        value of x, for which a compiled graph breaks and a GPU waits; the caller then vouches that x lies in the
        intervals.

        Raises:
            ValueError: If a point is NaN or outside its interval, or x has another width or dtype than the network.
        """
        x = check_points(x, self.splines, self.factors.dtype, inside=check)
        return by_blocks(self._evaluate, x, self._num_subatoms)

    @property
    def _num_subatoms(self) -> int:
        return self.factors.numel() // self.factors.shape[1]

    def _evaluate(self, x: Tensor) -> Tensor:
        """Values at points (points, num_inputs) that are known to lie inside: (points, num_outputs)."""
        total = self._sum(pairwise_product(self.subatoms(x, check=False)))
        return total if self.activation is None else self.activation(total)

    def _sum(self, components: Tensor) -> Tensor:
        """The weighted sum of components (..., num_outputs or 1, rank): (..., num_outputs)."""
        if self.weights is None:
            return components.sum(-1)
        if self.factors.shape[2] == 1:
            return F.linear(components.squeeze(-2), self.weights)
        return (components * self.weights).sum(-1)

    def value_and_gradient(self, x: Tensor, *, check: bool = True) -> tuple[Tensor, Tensor]:
        r"""The function and its gradient in closed form: (..., num_outputs) and (..., num_outputs, num_inputs).

        .. math::
            \frac{\partial f_o}{\partial x_i}
                = \sum_j c_{oj}\, \psi_i^{(oj)\prime}(x_i) \prod_{k \ne i} \psi_k^{(oj)}(x_k)

        The gradient has the units of f over those of x. At a knot where a derivative jumps it is the limit from the
        right. Raises as :meth:`forward`, and a ``ValueError`` where there is an activation.
        """
        self.check_derivable()
        x = check_points(x, self.splines, self.factors.dtype, inside=check)
        both = by_blocks(self._value_and_gradient, x, 4 * self._num_subatoms)
        return both[..., 0], both[..., 1:]

    def gradient(self, x: Tensor, *, check: bool = True) -> Tensor:
        """The second of :meth:`value_and_gradient`: (..., num_inputs) -> (..., num_outputs, num_inputs)."""
        return self.value_and_gradient(x, check=check)[1]

    def hessian(self, x: Tensor, *, check: bool = True) -> Tensor:
        r"""All :math:`\partial^2 f_o / \partial x_i \partial x_k` in closed form.

        (..., num_inputs) -> (..., num_outputs, num_inputs, num_inputs), symmetric in the last two.

        Raises as :meth:`value_and_gradient`.
        """
        self.check_derivable()
        x = check_points(x, self.splines, self.factors.dtype, inside=check)
        return by_blocks(self._hessian, x, 4 * self.num_inputs * self._num_subatoms)

    def check_derivable(self) -> None:
        """Raises a ``ValueError`` where an activation leaves no derivatives in closed form."""
        if self.activation is not None:
            raise ValueError("derivatives in closed form need activation=None; differentiate this network by autograd.")

    def _value_and_gradient(self, x: Tensor) -> Tensor:
        psi, slope = (self.subatoms(x, order, check=False) for order in (0, 1))
        others = products_of_others(psi)
        terms = torch.cat([psi[:1] * others[:1], slope * others])  # (1 + num_inputs, points, num_outputs or 1, rank)
        return self._sum(terms).movedim(0, -1)

    def _hessian(self, x: Tensor) -> Tensor:
        psi, slope, bend = (self.subatoms(x, order, check=False) for order in (0, 1, 2))
        same = torch.eye(self.num_inputs, dtype=torch.bool, device=x.device)[(..., *(None,) * (psi.ndim - 1))]
        # Row i: the sub-atoms of the derivative in x_i, to be differentiated in x_k.
        first, second = torch.where(same, slope, psi), torch.where(same, bend, slope)
        return self._sum(second * products_of_others(first, dim=1)).movedim((0, 1), (-2, -1))

    def subatoms(self, x: Tensor, derivative: int = 0, *, check: bool = True) -> Tensor:
        r"""The functions of one input, :math:`\psi_i^{(oj)}(x_i)`, or their derivatives of one order in x_i.

        (..., num_inputs) -> (num_inputs, ..., num_outputs, rank); the third from last is 1 for shared components. With
        :math:`\psi` and :math:`\psi'`, the gradient of f needs no autograd. Raises as :meth:`forward`.
        """
        return local_sum(x, self.factors, self.splines, derivative, check=check)

    def reference_forward(self, x: Tensor) -> Tensor:
        """The formula as written, with the whole basis of each input: the oracle of :meth:`forward`."""
        bases = [spline.dense(x[..., i]) for i, spline in enumerate(self.splines)]
        pairs = zip(bases, self.factors, strict=True)
        product = reduce(torch.mul, [torch.einsum("...b,bor->...or", *pair) for pair in pairs])
        total = (product if self.weights is None else product * self.weights).sum(-1)
        return total if self.activation is None else self.activation(total)

    def extra_repr(self) -> str:
        """The settings that the parameters' shapes do not tell."""
        spline, activation = self.splines[0], getattr(self.activation, "__name__", self.activation)
        return (
            f"num_inputs={self.num_inputs}, num_outputs={self.num_outputs}, rank={self.rank}, "
            f"num_cells={spline.num_cells}, degree={spline.degree}, "
            f"shared_components={self.factors.shape[2] < self.num_outputs}, unit_weights={self.weights is None}, "
            f"activation={activation}"
        )


def pairwise_product(factors: Tensor) -> Tensor:
    """Product over the first dimension as a tree of pairwise products: (n, ...) -> (...).

    Each gradient is the product of the other factors, so it is exact where factors are zero or negative, and rounding
    grows with the depth log2(n).
    """
    left_over: list[Tensor] = []
    while (n := factors.shape[0]) > 1:
        left, right, odd = factors.split([n // 2, n // 2, n % 2])  # slices would each fill a gradient with zeros
        left_over += odd.unbind() if n % 2 else ()  # a graph is not exported with an operation of no output
        factors = left * right
    return reduce(torch.mul, left_over, factors.squeeze(0))


def products_of_others(factors: Tensor, dim: int = 0) -> Tensor:
    """For each entry along ``dim`` the product of all others, exact where some are zero: the shape of ``factors``."""
    one = torch.ones_like(factors.narrow(dim, 0, 1))
    n = factors.shape[dim] - 1
    before = torch.cat([one, _cumprod(factors.narrow(dim, 0, n), dim)], dim)
    behind = torch.cat([one, _cumprod(factors.narrow(dim, 1, n).flip(dim), dim)], dim).flip(dim)
    return before * behind


def _cumprod(factors: Tensor, dim: int) -> Tensor:
    if torch.compiler.is_exporting() and factors.shape[dim]:  # ONNX has no such operation
        return torch.stack(list(accumulate(factors.unbind(dim), torch.mul)), dim)
    return factors.cumprod(dim)


def by_blocks(function: Callable[[Tensor], Tensor], x: Tensor, numel: int) -> Tensor:
    """A function of points (points, num_inputs) for x (..., num_inputs), on a CPU in parts that stay in its cache.

    ``numel`` counts the values that the function holds at one time for each point.
    """
    points = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        values = function(points)
    else:
        parts = [function(part) for part in points.split(max(1, BLOCK_NUMEL // numel))]
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
    return values.view(*x.shape[:-1], *values.shape[1:])


def activation_function(activation: str | Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor] | None:
    """The function of this name; a ``ValueError`` where ``ACTIVATIONS`` has none."""
    if not isinstance(activation, str):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}; expected None, a callable or one of {sorted(ACTIVATIONS)}.")
    return ACTIVATIONS[activation]


def check_counts(**counts: object) -> None:
    """Raises a ``ValueError`` for the first that is no integer of at least 1."""
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} = {count!r}; expected an integer of at least 1.")


def one_each(name: str, value: float | Sequence[float], num_inputs: int) -> tuple[float, ...]:
    """The value of each input; a ``ValueError`` unless it is one number or one for each."""
    values = (float(value),) * num_inputs if isinstance(value, int | float) else tuple(float(v) for v in value)
    if len(values) != num_inputs:
        raise ValueError(
            f"{name} has {len(values)} values for {num_inputs} inputs; give one number or one for each input."
        )
    return values
