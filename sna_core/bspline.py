r"""Uniform B-splines on an interval: values, derivatives, quadrature and one-dimensional Gram matrices.

The interval [low, high] is cut into ``num_cells`` equal cells. The knots go on uniformly outside it, so that ``degree``
basis functions reach in from ghost cells and the basis sums to one on the whole closed interval (arXiv 2603.12244,
eq. 2). Every cell sees the same ``degree + 1`` polynomials, which makes evaluation one Horner scheme.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb, factorial, isfinite, perm
from typing import Protocol

import torch
from torch import Tensor

MAX_DEGREE = 5


def _cell_polynomials(degree: int, derivative: int) -> list[list[float]]:
    """Coefficients [k][m] of u^k in the given derivative of the m-th function on a cell of width one, u in [0, 1].

    K. Qin, General matrix representations for B-splines, The Visual Computer 16 (2000), eq. 15; integers until the last
    division.
    """

    def coefficient(k: int, m: int) -> int:
        terms = ((-1) ** (s - m) * comb(degree + 1, s - m) * (degree - s) ** (degree - k) for s in range(m, degree + 1))
        return comb(degree, k) * sum(terms)

    return [
        [perm(k, derivative) * coefficient(k, m) / factorial(degree) for m in range(degree + 1)]
        for k in range(derivative, degree + 1)
    ]


CELL_POLYNOMIALS = {(p, n): _cell_polynomials(p, n) for p in range(MAX_DEGREE + 1) for n in range(p + 1)}


def local_bspline(
    x: Tensor, low: float | Tensor, width: float | Tensor, num_cells: int, degree: int, derivative: int = 0
) -> tuple[Tensor, Tensor]:
    """The kernel of :meth:`UniformBSpline.local` on [low, low + width], without checks.

    ``low`` and ``width`` may be tensors that broadcast with ``x``, one interval for each input. Points outside get the
    polynomial of the nearest cell.
    """
    position = (x - low) * num_cells / width
    cell = position.detach().floor()
    if derivative == degree:  # piecewise constant: at a knot rounding must not choose the cell
        below, above = (low + width * ((cell + step) / num_cells) for step in (0, 1))
        cell = cell - (x < below).to(x.dtype) + (x >= above).to(x.dtype)
    cell = cell.clamp(0, num_cells - 1)
    if torch.compiler.is_exporting():  # points outside are NaN then, which lies in no cell
        cell = cell.nan_to_num(0.0)
    u = (position - cell).unsqueeze(-1)  # (..., 1)

    if derivative > degree:
        return cell.long(), (0 * u).expand(*x.shape, degree + 1)
    rows = torch.tensor(CELL_POLYNOMIALS[degree, derivative], dtype=x.dtype, device=x.device)
    if derivative == degree:
        values = rows[0] + 0 * u  # the gradient in x is zero, not missing
    else:
        *lower, last_but_one, last = rows.unbind()
        values = torch.addcmul(last_but_one, last, u)
        for row in reversed(lower):
            values = torch.addcmul(row, values, u)
    if derivative:
        scale = torch.as_tensor((num_cells / width) ** derivative, dtype=x.dtype, device=x.device)
        values = values * scale.unsqueeze(-1)
    return cell.long(), values


def check_inside(x: Tensor, low: float | Tensor, high: float | Tensor, num_inputs: int | None = None) -> Tensor:
    """Returns x; raises a ``ValueError`` for the first element that is NaN or outside [low, high].

    An exported graph cannot raise: there elements outside become NaN, and so does whatever is computed from them.

    With ``num_inputs`` the last dimension of ``x`` counts inputs, and ``low`` and ``high`` are (num_inputs,).
    """
    inside = (x >= low) & (x <= high)  # False for NaN
    if torch.compiler.is_exporting():
        return torch.where(inside, x, torch.nan)
    if inside.all():
        return x
    index = (~inside).nonzero()[0].tolist()
    value = x[tuple(index)]
    name = f"x{index}" if index else "x"
    if value.isnan():
        raise ValueError(f"{name} = nan is not a number; drop the sample or fill in the value.")
    # As few digits as give the value back: 1.0000001 must not read as 1.
    text = next(t for n in range(6, 18) if value.new_tensor(float(t := f"{value.item():.{n}g}")) == value)
    if num_inputs is None:
        owner, remedy = "the interval", "rescale x"
    else:
        owner, remedy = f"input {index[-1]}'s interval", "rescale the column"
        low, high = (torch.as_tensor(end)[index[-1]].item() for end in (low, high))
    bound = "lower `low`" if value < low else "widen `high`"
    raise ValueError(f"{name} = {text} lies outside {owner} [{low:g}, {high:g}]; {remedy} or {bound}.")


def gauss_legendre(num_points: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights (num_points,) on [-1, 1] in float64, exact for polynomials of degree 2 num_points - 1.

    Eigenvalues and first components of eigenvectors of the Jacobi matrix: Golub and Welsch, Math. Comp. 23 (1969).
    """
    k = torch.arange(1, num_points, dtype=torch.float64)
    beside = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return nodes, 2 * vectors[0] ** 2


class CellBasis(Protocol):
    """B-splines on some cells, as :class:`UniformBSpline` has them: what ``dense`` and ``gram`` are made of."""

    @property
    def degree(self) -> int:
        """Of the polynomials."""

    @property
    def num_basis(self) -> int:
        """Number of functions."""

    def local(self, x: Tensor, derivative: int = 0, *, check: bool = True) -> tuple[Tensor, Tensor]:
        """The functions that are not zero at x."""

    def dense(self, x: Tensor, derivative: int = 0, *, check: bool = True) -> Tensor:
        """All functions."""

    def quadrature(
        self, num_points: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Points and weights."""


@dataclass(frozen=True)
class UniformBSpline:
    r"""B-splines :math:`B_0, \dots, B_{n-1}` of one degree on uniform knots; n = ``num_basis`` = num_cells + degree.

    :math:`B_j` lives on the degree + 1 cells from knot :math:`low + (j - degree) h` on, h = ``spacing``; on cell i the
    non-zero functions are :math:`B_i, \dots, B_{i + degree}`. They sum to one on [low, high], both ends included.

    Derivatives are exact, of any order; above ``degree`` they are zero. Where one jumps at a knot it is the limit from
    the right, at ``high`` the limit from the left.

    Args:
        num_cells: Number of equal cells.
        degree: 0 (piecewise constant) to 5.
        low: Left end of the interval.
        high: Right end.

    Raises:
        ValueError: If there is no cell, the degree is not one of 0 to 5, or the interval is empty or not finite.
    """

    num_cells: int
    degree: int
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.num_cells, int) or self.num_cells < 1:
            raise ValueError(f"num_cells = {self.num_cells!r}; expected an integer of at least 1.")
        if not isinstance(self.degree, int) or not 0 <= self.degree <= MAX_DEGREE:
            raise ValueError(f"degree = {self.degree!r}; expected an integer from 0 to {MAX_DEGREE}.")
        if not (isfinite(self.low) and isfinite(self.high) and self.low < self.high):
            raise ValueError(f"[low, high] = [{self.low}, {self.high}]; expected finite ends with low < high.")

    @property
    def num_basis(self) -> int:
        """Number of basis functions that are not zero on the interval."""
        return self.num_cells + self.degree

    @property
    def spacing(self) -> float:
        """Width h of a cell, in the units of x."""
        return (self.high - self.low) / self.num_cells

    def local(self, x: Tensor, derivative: int = 0, *, check: bool = True) -> tuple[Tensor, Tensor]:
        """The functions that are not zero at x: ``values[..., m]`` belongs to the function of index ``cell + m``.

        Differentiable in x any number of times. ``check=False`` leaves out the look at every value of x, for which a
        compiled graph breaks and a GPU waits; the caller then vouches that x lies in the interval.

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
        return local_bspline(x, self.low, self.high - self.low, self.num_cells, self.degree, derivative)

    def dense(self: CellBasis, x: Tensor, derivative: int = 0, *, check: bool = True) -> Tensor:
        """All basis functions: (...) -> (..., num_basis). Arguments and errors as in :meth:`local`."""
        cell, values = self.local(x, derivative, check=check)
        index = cell.unsqueeze(-1) + torch.arange(self.degree + 1, device=x.device)
        return values.new_zeros(*x.shape, self.num_basis).scatter_(-1, index, values)

    def knots(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Tensor:
        """All knots, ghost knots included: (num_cells + 2 degree + 1,)."""
        k = torch.arange(-self.degree, self.num_cells + self.degree + 1, dtype=dtype, device=device)
        return self.low + (self.high - self.low) * (k / self.num_cells)

    def greville(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Tensor:
        """Greville points (num_basis,), the centres of the basis functions: their coefficients make the function x.

        Beyond degree 1 the outermost ones lie outside the interval. For degree 0 they are the midpoints of the cells.
        """
        j = torch.arange(self.num_basis, dtype=dtype, device=device)
        return self.low + (self.high - self.low) * ((j - (self.degree - 1) / 2) / self.num_cells)

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
        cell = torch.arange(self.num_cells, dtype=torch.float64).unsqueeze(-1)
        points = self.low + (self.high - self.low) * ((cell + (nodes + 1) / 2) / self.num_cells)
        weights = (weights * self.spacing / 2).expand(self.num_cells, -1)
        return points.flatten().to(device, dtype), weights.flatten().to(device, dtype)

    def gram(
        self: CellBasis,
        derivative_left: int = 0,
        derivative_right: int = 0,
        weight: Callable[[Tensor], Tensor] | None = None,
        *,
        num_points: int | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> Tensor:
        r"""Gram matrix :math:`G_{ab} = \int w(x)\, B_a^{(l)}(x)\, B_b^{(r)}(x)\, dx` over the interval.

        (0, 0) is the mass matrix, (1, 1) the stiffness matrix. Banded: zero where \|a - b\| > degree.

        Args:
            derivative_left: Order l of the row's function.
            derivative_right: Order r of the column's function.
            weight: w, a function of points (n,) to values (n,); None means one.
            num_points: Quadrature points in each cell. None takes as many as are exact without a weight, and with one
                four more, exact where it is a polynomial of degree at most 9 on every cell.
            dtype: Of the result.
            device: Of the result.

        Returns:
            (num_basis, num_basis).

        Raises:
            ValueError: If the weight does not give one finite value for each point.
        """
        num_points = num_points or self.degree + (1 if weight is None else 5)
        points, weights = self.quadrature(num_points, dtype=dtype, device=device)
        if weight is not None:
            values = weight(points)
            if values.shape != points.shape:
                raise ValueError(
                    f"weight(x) has shape {tuple(values.shape)}; expected that of x, {tuple(points.shape)}."
                )
            if not (finite := values.isfinite()).all():
                raise ValueError(
                    f"weight({points[~finite][0]:g}) is not finite; expected finite values on the interval."
                )
            weights = weights * values
        left, right = (self.dense(points, order) for order in (derivative_left, derivative_right))
        return left.mT @ (weights.unsqueeze(-1) * right)
