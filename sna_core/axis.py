"""One direction of a problem's box: its interval, the functions along it and what holds at its ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sna_core.field import FieldBasis
from sna_core.graded import GradedBSpline
from sna_core.spectral import make_basis

BOUNDARIES = ("free", "dirichlet", "neumann", "periodic")
KINDS = ("bspline", "chebyshev", "legendre", "fourier")


@dataclass(frozen=True)
class Axis:
    """A space, time or parameter axis.

    Args:
        name: As the terms of a problem call it.
        low: Left end of the interval, in the axis's units.
        high: Right end.
        num_cells: Number of equal cells of B-splines; 8 unless ``breakpoints`` or another ``kind`` are given.
        degree: Of the B-splines, 0 to 5; 3 unless another ``kind`` is given.
        boundary: ``"free"``, ``"dirichlet"`` (a value is given, zero unless the problem has data), ``"neumann"`` (the
            derivative along the axis, imposed exactly), ``"periodic"``, or a pair, for the low and the high end, of the
            first three. Of kind ``"fourier"`` it is ``"periodic"``.
        breakpoints: Edges of graded cells, from low to high.
        kind: ``"bspline"``, or ``"chebyshev"``, ``"legendre"`` or ``"fourier"``, which take ``num_basis``.
        num_basis: Number of functions.

    Raises:
        ValueError: If the name is no name, a size is missing or belongs to another kind, the boundary is unknown or
            the interval empty.
    """

    name: str
    low: float
    high: float
    num_cells: int | None = None
    degree: int | None = None
    boundary: str | tuple[str, str] = "free"
    breakpoints: Sequence[float] | None = None
    kind: str = "bspline"
    num_basis: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier() or self.name in ("self", "coefficient"):
            raise ValueError(f"name = {self.name!r}; expected a word that can name an argument of a Term.")
        if self.kind not in KINDS:
            raise ValueError(f"axis {self.name!r} has kind = {self.kind!r}; expected one of {KINDS}.")
        if self.kind == "bspline":
            object.__setattr__(self, "degree", 3 if self.degree is None else self.degree)
            if self.breakpoints is not None:
                edges = tuple(float(edge) for edge in self.breakpoints)
                object.__setattr__(self, "breakpoints", edges)
                if len(edges) < 2 or (edges[0], edges[-1]) != (self.low, self.high):
                    raise ValueError(
                        f"the breakpoints of axis {self.name!r} go from {edges[0]} to {edges[-1]}; expected "
                        f"{self.low} to {self.high}."
                    )
                if self.num_cells not in (None, len(edges) - 1):
                    raise ValueError(f"axis {self.name!r} has {len(edges) - 1} cells and num_cells = {self.num_cells}.")
                object.__setattr__(self, "num_cells", len(edges) - 1)
            object.__setattr__(self, "num_cells", 8 if self.num_cells is None else self.num_cells)
        elif self.breakpoints is not None:
            raise ValueError(f"axis {self.name!r} of kind {self.kind!r} has no cells, and takes no breakpoints.")
        if self.kind == "bspline" and self.num_basis is not None:
            raise ValueError(
                f"axis {self.name!r} has num_cells, which give the number of functions; leave num_basis out."
            )
        if self.kind == "fourier" and self.boundary == "free":
            object.__setattr__(self, "boundary", "periodic")
        pair = isinstance(self.boundary, Sequence) and not isinstance(self.boundary, str)
        kinds = tuple(self.boundary) if pair else (self.boundary, self.boundary)
        if len(kinds) != 2 or any(kind not in BOUNDARIES or (pair and kind == "periodic") for kind in kinds):
            raise ValueError(
                f"axis {self.name!r} has boundary = {self.boundary!r}; expected one of {BOUNDARIES}, or a pair of the "
                "first three."
            )
        object.__setattr__(self, "boundary", kinds if pair else self.boundary)
        if self.kind == "fourier" and self.boundary != "periodic":
            raise ValueError(
                f"axis {self.name!r} of kind 'fourier' is periodic, and has no ends for {self.boundary!r}."
            )
        _ = self.basis  # which checks the sizes

    @property
    def basis(self) -> FieldBasis:
        """Its functions."""
        if self.breakpoints is not None and self.degree is not None:  # of splines alone
            return GradedBSpline(tuple(self.breakpoints), self.degree)
        sizes = {"num_cells": self.num_cells, "degree": self.degree, "num_basis": self.num_basis}
        basis = make_basis(self.kind, float(self.low), float(self.high), **sizes)
        assert isinstance(basis, FieldBasis), "KINDS has no other"
        return basis

    def coarsened(self) -> Axis:
        """The same with half the cells, or three quarters of the functions of a basis without cells."""
        if self.num_basis is not None:  # of no splines
            num_basis = -(-3 * self.num_basis // 4)
            return replace(self, num_basis=num_basis + (self.kind == "fourier" and num_basis % 2 == 0))
        if self.breakpoints is not None:
            edges = self.breakpoints
            return replace(self, breakpoints=(*edges[:-1:2], edges[-1]), num_cells=None)
        assert self.num_cells is not None, "splines have cells"
        return replace(self, num_cells=-(-self.num_cells // 2))

    @property
    def ends(self) -> tuple[str, str]:
        """What holds at the low and the high end."""
        return (self.boundary, self.boundary) if isinstance(self.boundary, str) else self.boundary
