"""Properties of cells by name, as homogenisation finds them."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from leviathan.janus.cells import Symmetry
from leviathan.janus.homogenization import Homogenized, Isotropic, conductivity, elastic_stiffness, permeability
from leviathan.janus.homogenization.elements import Scheme, voigt_pairs

CELLS_AT_ONCE = 64  # without derivatives
VOIGT = tuple((a + 1, b + 1) for a, b in voigt_pairs(3))


def _tensor_name(first: tuple[int, int], second: tuple[int, int]) -> str:
    return "C" + "".join(map(str, first + second))


ELASTIC = {_tensor_name(a, b): (a, b) for a, b in combinations_with_replacement(VOIGT, 2)}
THERMAL = {f"K{a}{b}": (a, b) for a, b in combinations_with_replacement((1, 2, 3), 2)}
SCALARS = ("volume_fraction", "permeability", "conductivity")
NAMES = (*ELASTIC, *SCALARS, *THERMAL)
ALIASES = {
    spelling: name
    for name, (a, b) in ELASTIC.items()
    for first, second in ((a, b), (b, a))
    for spelling in (
        f"C{VOIGT.index(first) + 1}{VOIGT.index(second) + 1}",
        *(_tensor_name(c, d) for c in (first, first[::-1]) for d in (second, second[::-1])),
    )
} | {f"K{b}{a}": name for name, (a, b) in THERMAL.items()}


@dataclass(frozen=True)
class Physics:
    """The materials of a cell, its symmetry, and how its properties are computed.

    Attributes:
        youngs_modulus: Of the solid, in the unit of stiffnesses, GPa. The default's C1111 is 841 GPa.
        poissons_ratio: Of the solid, and of the void.
        contrast: Stiffness of the solid over that of the void.
        solid_conductivity: In the unit of conductivities.
        void_conductivity: Likewise.
        scheme: Discretisation of stiffness and conductivity; values of different schemes differ.
        tolerance: Relative residual of equilibrium at which a solve has converged.
        symmetry: What the arrays of cells are, see :mod:`leviathan.janus.cells`.
    """

    youngs_modulus: float = 625.0
    poissons_ratio: float = 0.3
    contrast: float = 1000.0
    solid_conductivity: float = 1.0
    void_conductivity: float = 1e-3
    scheme: Scheme = "rotated"
    tolerance: float = 1e-4
    symmetry: Symmetry = "cubic"


@dataclass(frozen=True, eq=False)
class Checked:
    """Properties of cells.

    Attributes:
        values: By the names that were asked for, (cells,) each.
        converged: Whether every solve that they took has converged, (cells,).
        residual: The largest relative residual of these, (cells,); 0 where there was none.
    """

    values: dict[str, Tensor]
    converged: Tensor
    residual: Tensor


def canonical(name: str) -> str:
    """The spelling of a property's name that :data:`NAMES` has: "C11", "C44" and "C2211" are C1111, C2323 and C1122.

    Raises:
        ValueError: If there is no such property.
    """
    found = ALIASES.get(name, name)
    if found not in NAMES:
        raise ValueError(f"there is no property {name!r}; {nearest_name(name, NAMES)}")
    return found


def nearest_name(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: what may have been meant, or what there is."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}."


def properties(phase: Tensor, names: Sequence[str], physics: Physics, differentiable: bool = False) -> Checked:
    """Computes the named properties of each cell; only the homogenisations and loads that these need are run.

    Names are the 21 stiffnesses by tensor indices (``"C1111"``, ``"C1122"``, ``"C2323"``; Voigt's ``"C11"``, ``"C12"``,
    ``"C44"`` mean the same) in the unit of ``youngs_modulus``, ``"volume_fraction"`` (mean of the phase),
    ``"permeability"`` (mean of the diagonal, in squared edges of the whole cell), ``"conductivity"`` (mean of the
    diagonal) and its entries ``"K11"``, ``"K12"``, ...

    Args:
        phase: Share of solid in each voxel, (cells, m, ...), with the symmetry of ``physics``.
        names: Of the properties.
        physics: Materials and method.
        differentiable: Whether derivatives with respect to the phase can be taken; they need the fields of all cells at
            one time.

    Raises:
        ValueError: If a name is unknown or needs a third axis that the cells lack, or phase is no batch of cells.
    """
    if not phase.is_floating_point():
        phase = phase.float()
    if differentiable:
        return _properties(phase, names, physics)
    with torch.no_grad():
        parts = [_properties(part, names, physics) for part in phase.split(CELLS_AT_ONCE)]
    return Checked(
        values={name: torch.cat([part.values[name] for part in parts]) for name in names},
        converged=torch.cat([part.converged for part in parts]),
        residual=torch.cat([part.residual for part in parts]),
    )


def _properties(phase: Tensor, names: Sequence[str], physics: Physics) -> Checked:
    entries = {name: _entry(name, phase.ndim - 1) for name in names}
    loads = {kind: sorted({row for k, rows in entries.values() if k == kind for row in rows}) for kind in SOLVERS}
    found = {kind: SOLVERS[kind](phase, physics, rows) for kind, rows in loads.items() if rows}
    values = {}
    for name, (kind, rows) in entries.items():
        if kind not in found:
            values[name] = phase.flatten(1).mean(-1)
        elif canonical(name) in SCALARS:
            values[name] = found[kind].tensor.diagonal(dim1=-2, dim2=-1).mean(-1)
        else:
            values[name] = found[kind].tensor[:, rows[0], rows[-1]]
    residuals = [result.residual for result in found.values()]
    converged = [result.converged for result in found.values()]
    return Checked(
        values=values,
        converged=torch.stack(converged).all(0) if found else torch.ones_like(phase.flatten(1)[:, 0], dtype=torch.bool),
        residual=torch.stack(residuals).amax(0) if found else phase.new_zeros(len(phase)),
    )


def _entry(name: str, dims: int) -> tuple[str, tuple[int, ...]]:
    """Which tensor a property is of, and its row and column there; all of the diagonal's for a mean."""
    known = canonical(name)
    if known in SCALARS:
        return known, () if known == "volume_fraction" else tuple(range(dims))
    kind, indices = ("stiffness", ELASTIC[known]) if known in ELASTIC else ("conductivity", THERMAL[known])
    rows: Sequence[Any] = [pair for pair in VOIGT if max(pair) <= dims] if kind == "stiffness" else range(1, dims + 1)
    if not set(indices) <= set(rows):
        raise ValueError(f"property {name!r} has an axis 3, and the cells are {dims}-D; name one without.")
    return kind, tuple(rows.index(index) for index in indices)


def stiffness(phase: Tensor, physics: Physics, loads: Sequence[int] | None = None) -> Homogenized:
    """All of the stiffness, with arguments as of :func:`properties`; ``loads`` as of :func:`elastic_stiffness`."""
    return elastic_stiffness(
        phase,
        solid=Isotropic(physics.youngs_modulus, physics.poissons_ratio),
        contrast=physics.contrast,
        symmetry=physics.symmetry,
        scheme=physics.scheme,
        tolerance=physics.tolerance,
        loads=loads,
    )


def _solve_conductivity(phase: Tensor, physics: Physics, loads: list[int]) -> Homogenized:
    return conductivity(
        phase,
        solid=physics.solid_conductivity,
        void=physics.void_conductivity,
        symmetry=physics.symmetry,
        scheme=physics.scheme,
        tolerance=physics.tolerance,
        loads=loads,
    )


def _solve_permeability(phase: Tensor, physics: Physics, loads: list[int]) -> Homogenized:
    return permeability(phase, symmetry=physics.symmetry, tolerance=physics.tolerance)


SOLVERS = {"stiffness": stiffness, "conductivity": _solve_conductivity, "permeability": _solve_permeability}

__all__ = ["NAMES", "Checked", "Physics", "canonical", "nearest_name", "properties", "stiffness"]
