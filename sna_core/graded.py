r"""B-splines on cells of unequal width, behind the interface of :class:`~sna_core.bspline.UniformBSpline`.

For functions that change fast in one place: cells are narrow there and wide elsewhere. Each cell has its own degree + 1
polynomials. They are tabulated once, by the recurrence of de Boor, and evaluated by Horner's scheme.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import asinh, isfinite, perm, sinh

import torch
from torch import Tensor

from sna_core.bspline import MAX_DEGREE, UniformBSpline, check_inside, gauss_legendre


@dataclass(frozen=True)
class GradedBSpline:
    r"""B-splines :math:`B_0, \dots, B_{n-1}` of one degree on given cells; n = ``num_basis`` = num_cells + degree.

    On cell i the functions that are not zero are :math:`B_i, \dots, B_{i + degree}`. They sum to one on [low, high],
    both ends included. The knots go on beyond the ends with the width of the end's cell, so that cells of one width
    give :class:`~sna_core.bspline.UniformBSpline`.

    Derivatives are exact, of any order; above ``degree`` they are zero. Where one jumps at a knot it is the limit from
    the right, at ``high`` the limit from the left.

    Args:
        breakpoints: The cells' edges (num_cells + 1), ascending; :func:`graded_breakpoints` makes smooth ones.
        degree: 0 (piecewise constant) to 5.

    Raises:
        ValueError: If there is no cell, the edges are not finite or do not ascend, or the degree is not one of 0 to 5.

    Source: C. de Boor, A Practical Guide to Splines (2001), chapter IX.
    """

    breakpoints: tuple[float, ...]
    degree: int

    def __post_init__(self) -> None:
        edges = tuple(float(edge) for edge in self.breakpoints)
        object.__setattr__(self, "breakpoints", edges)
        if len(edges) < 2:
            raise ValueError(f"breakpoints = {edges}; expected at least two, the edges of one cell.")
        for i, (left, right) in enumerate(pairwise(edges)):
            if not (isfinite(left) and isfinite(right) and left < right):
                raise ValueError(
                    f"breakpoints[{i}] = {left} and breakpoints[{i + 1}] = {right}; expected finite edges that ascend."
                )
        if not isinstance(self.degree, int) or not 0 <= self.degree <= MAX_DEGREE:
            raise ValueError(f"degree = {self.degree!r}; expected an integer from 0 to {MAX_DEGREE}.")

    @property
    def num_cells(self) -> int:
        """Number of cells."""
        return len(self.breakpoints) - 1

    @property
    def num_basis(self) -> int:
        """Number of basis functions that are not zero on the interval."""
        return self.num_cells + self.degree

    @property
    def low(self) -> float:
        """Left end of the interval."""
        return self.breakpoints[0]

    @property
    def high(self) -> float:
        """Right end of the interval."""
        return self.breakpoints[-1]

    @cached_property
    def cell_polynomials(self) -> Tensor:
        """Entry [i, k, m] is the coefficient of u^k in the function of index i + m on cell i, in float64.

        u goes from 0 to 1 over the cell. (num_cells, degree + 1, degree + 1).
        """
        knots, width = self.knots(), torch.tensor(self.breakpoints, dtype=torch.float64).diff()
        first = self.degree + torch.arange(self.num_cells)  # the knot where each cell begins
        table = knots.new_ones(self.num_cells, 1, 1)
        for degree in range(1, self.degree + 1):
            raised = knots.new_zeros(self.num_cells, degree + 1, degree + 1)
            for m in range(degree):  # the function of degree - 1 that begins at `start` is part of two of degree
                start, end = knots[first + m + 1 - degree], knots[first + m + 1]
                span = (end - start).unsqueeze(-1)
                rise, fall = (knots[first] - start).unsqueeze(-1) / span, (end - knots[first]).unsqueeze(-1) / span
                slope = width.unsqueeze(-1) / span
                raised[:, :-1, m + 1] += rise * table[..., m]
                raised[:, 1:, m + 1] += slope * table[..., m]
                raised[:, :-1, m] += fall * table[..., m]
                raised[:, 1:, m] -= slope * table[..., m]
            table = raised
        return table

    def local(self, x: Tensor, derivative: int = 0, *, check: bool = True) -> tuple[Tensor, Tensor]:
        """The functions that are not zero at x: ``values[..., m]`` belongs to the function of index ``cell + m``.

        Differentiable in x any number of times. ``check=False`` leaves out the look at every value of x; points outside
        then get the polynomial of the nearest cell.

        Args:
            x: Points (...), floating-point.
            derivative: Order, at least 0; its values have the units of x to the power -derivative.
            check: Whether to look for points outside the interval.

        Returns:
            cell (...), int64, from 0 to num_cells - 1, and values (..., degree + 1).

        Raises:
            ValueError: If a point is NaN or outside the interval, x is not floating-point or the order is negative.
        """
        if not isinstance(derivative, int) or derivative < 0:
            raise ValueError(f"derivative = {derivative!r}; expected an integer of at least 0.")
        if not x.is_floating_point():
            raise ValueError(f"x has dtype {x.dtype}; expected floating-point values, e.g. x.to(torch.float64).")
        if check:
            x = check_inside(x, self.low, self.high)
        edges = x.new_tensor(self.breakpoints)
        cell = torch.bucketize(x.detach().contiguous(), edges[1:-1], right=True)
        width = edges.diff()[cell]
        u = ((x - edges[cell]) / width).unsqueeze(-1)  # (..., 1)

        values = (0 * u).expand(*x.shape, self.degree + 1)  # the gradient in x is zero, not missing
        rows = self.cell_polynomials.to(x)[cell].unbind(-2)  # each (..., degree + 1)
        for k in range(self.degree, derivative - 1, -1):
            values = torch.addcmul(perm(k, derivative) * rows[k], values, u)
        if derivative:
            values = values / width.unsqueeze(-1) ** derivative
        return cell, values

    # The same on any cells.
    dense, gram = UniformBSpline.dense, UniformBSpline.gram

    def knots(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Tensor:
        """All knots, ghost knots included: (num_cells + 2 degree + 1,)."""
        edges = torch.tensor(self.breakpoints, dtype=dtype, device=device)
        k = torch.arange(1, self.degree + 1, dtype=dtype, device=device)
        before = edges[0] - (edges[1] - edges[0]) * k.flip(0)
        return torch.cat([before, edges, edges[-1] + (edges[-1] - edges[-2]) * k])

    def quadrature(
        self, num_points: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gauss-Legendre points and weights, each (num_cells * num_points,), cell after cell in ascending order.

        ``(weights * f(points)).sum()`` is the integral over [low, high], exact where f is on every cell a polynomial of
        degree at most 2 num_points - 1.

        Raises:
            ValueError: If ``num_points``, the number in each cell, is below 1.
        """
        if not isinstance(num_points, int) or num_points < 1:
            raise ValueError(f"num_points = {num_points!r}; expected an integer of at least 1.")
        nodes, weights = gauss_legendre(num_points)
        edges = torch.tensor(self.breakpoints, dtype=torch.float64).unsqueeze(-1)
        width = edges.diff(dim=0)
        points, weights = edges[:-1] + width * ((nodes + 1) / 2), width * (weights / 2)
        return points.flatten().to(device, dtype), weights.flatten().to(device, dtype)


def graded_breakpoints(low: float, high: float, num_cells: int, center: float, finest: float) -> tuple[float, ...]:
    r"""Edges of cells that are ``finest`` wide at ``center`` and grow smoothly away from it.

    .. math::
        x(s) = center + \frac{n\, finest}{\beta} \sinh(\beta (s - s_0)), \qquad s = 0, 1/n, \dots, 1

    The strength :math:`\beta` and :math:`s_0` follow from x(0) = low and x(1) = high. The map's slope at ``center`` is
    n times ``finest``; the cell there is as wide up to a part of :math:`(\beta / n)^2 / 6`. No edge need lie at
    ``center``.

    Args:
        low: Left end of the interval.
        high: Right end.
        num_cells: Number n of cells.
        center: Where the cells are finest, in [low, high].
        finest: Their width there, in the units of x; at most that of n equal cells, which it then gives.

    Returns:
        The edges (num_cells + 1), ``low`` and ``high`` included.

    Raises:
        ValueError: If the interval is empty or not finite, there is no cell, ``center`` lies outside, or ``finest`` is
            not positive or is wider than equal cells.
    """
    UniformBSpline(num_cells, 0, low, high)  # checks them
    if not low <= center <= high:
        raise ValueError(f"center = {center}; expected a point of [{low}, {high}].")
    equal = (high - low) / num_cells
    if not 0 < finest <= equal * (1 + 1e-12):
        raise ValueError(
            f"finest = {finest}; expected a width above 0 and at most that of {num_cells} equal cells, {equal:g}; "
            "lower `finest` or num_cells."
        )
    left, right = (center - low) / (num_cells * finest), (high - center) / (num_cells * finest)
    if left + right <= 1 + 1e-9:  # equal cells: the strength is zero up to rounding
        return (*(low + (high - low) * (i / num_cells) for i in range(num_cells)), float(high))

    def excess(strength: float) -> float:
        return asinh(strength * left) + asinh(strength * right) - strength

    above = 1.0  # concave, zero at zero and positive behind: one root
    while excess(above) > 0:
        above *= 2
    below = 0.0
    for _ in range(200):
        strength = (below + above) / 2
        if not below < strength < above:
            break
        below, above = (strength, above) if excess(strength) > 0 else (below, strength)
    start = asinh(above * left)
    inner = (center + num_cells * finest / above * sinh(above * i / num_cells - start) for i in range(1, num_cells))
    return (float(low), *inner, float(high))
