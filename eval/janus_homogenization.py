"""The part of Janus's study on homogenisation: what a check takes, and how far its resolution moves the answer."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from leviathan.janus.cells import threshold, whole_cell
from leviathan.janus.homogenization import Homogenized, Isotropic, conductivity, elastic_stiffness
from leviathan.janus.homogenization.elements import SCHEMES
from leviathan.janus.homogenization.permeability import permeability
from training.microstructures import SURFACES, cosine_field

SOLID = Isotropic(1.0, 0.3)
CONTRAST = 1000.0  # of stiffness, and of conductivity
TOLERANCE = 1e-4
VOLUME_FRACTION = 0.4  # of the cells; a cell of few voxels has the nearest that its symmetry allows
NUM_LOADS = {"stiffness": 6, "permeability": 3, "conductivity": 3}
CUBIC_LOADS = {"stiffness": 2, "permeability": 1, "conductivity": 1}  # that say all of a cell with cubic symmetry


@dataclass(frozen=True)
class TimeRow:
    """What one call takes.

    Attributes:
        cell: ``"schwarz_p"`` or ``"gyroid"``.
        what: ``"whole"`` periodic cells, or ``"orthants"`` of cells with cubic symmetry.
        property: ``"stiffness"``, ``"permeability"`` or ``"conductivity"``: the whole tensor.
        edge: Voxels along an edge of the whole cell, also of orthants.
        contrast: Solid over void; None for the permeability.
        num_loads: Solved for each cell.
        num_cells: In the call.
        tolerance: Asked for.
        threads: Of torch.
        seconds: Median of the calls, after one that is not counted.
        num_iterations: Of the slowest load.
        residual: The largest.
        scheme: Discretisation.
    """

    cell: str
    what: str
    property: str
    edge: int
    contrast: float | None
    num_loads: int
    num_cells: int
    tolerance: float
    threads: int
    seconds: float
    num_iterations: int
    residual: float
    scheme: str


@dataclass(frozen=True)
class DriftRow:
    """Properties of a cell on one grid.

    Attributes:
        cell: ``"schwarz_p"``, by its orthant, or ``"gyroid"``, whole.
        volume_fraction: That the cell was cut at.
        scheme: Of the stiffness.
        edge: Voxels along an edge of the whole cell.
        C1111: Over that of the solid.
        C2323: Likewise.
        permeability: In squared edges; its discretisation is the same beside all schemes.
    """

    cell: str
    volume_fraction: float
    scheme: str
    edge: int
    C1111: float
    C2323: float
    permeability: float


def homogenization_part(
    *,
    timed: Sequence[tuple[str, str, int, int]],
    num_repeats: int,
    drift_edges: Sequence[int],
    gyroid_edges: Sequence[int],
) -> dict[str, Any]:
    """Seconds of homogenisations with as many threads as torch has, and the drift of properties with the resolution.

    Args:
        timed: Cell, what, voxels along the whole cell's edge, and cells at once, as of :class:`TimeRow`.
        num_repeats: Calls of which the median is taken.
        drift_edges: Of Schwarz P.
        gyroid_edges: Of the gyroid, which has no mirror planes.
    """
    jobs = [(*each, name) for each in timed for name in NUM_LOADS]
    seconds = [timing(*job, num_repeats=num_repeats) for job in tqdm(jobs, desc="times", unit="row", disable=None)]
    grids = [("schwarz_p", edge) for edge in drift_edges] + [("gyroid", edge) for edge in gyroid_edges]
    drift = [row for grid in tqdm(grids, desc="drift", unit="grid", disable=None) for row in drift_rows(*grid)]
    return {
        "num_repeats": num_repeats,
        "seconds": [asdict(row) for row in seconds],
        "drift": [asdict(row) for row in drift],
    }


def timing(cell: str, what: str, edge: int, num_cells: int, name: str, *, num_repeats: int) -> TimeRow:
    """A row of :func:`homogenization_part`."""
    phase, symmetry = _phase(cell, what, edge)
    phase = phase.expand(num_cells, *phase.shape[1:]).contiguous()
    solve = _solver(name, phase, symmetry)
    result, taken = solve(), []
    for _ in range(num_repeats):
        start = time.perf_counter()
        result = solve()
        taken.append(time.perf_counter() - start)
    return TimeRow(
        cell=cell,
        what=what,
        property=name,
        edge=edge,
        contrast=None if name == "permeability" else CONTRAST,
        num_loads=(NUM_LOADS if what == "whole" else CUBIC_LOADS)[name],
        num_cells=num_cells,
        tolerance=TOLERANCE,
        threads=torch.get_num_threads(),
        seconds=median(taken),
        num_iterations=result.num_iterations,
        residual=result.residual.max().item(),
        scheme=result.discretisation,
    )


def drift_rows(cell: str, edge: int) -> list[DriftRow]:
    """A row of :func:`homogenization_part` for each scheme."""
    phase, symmetry = _phase(cell, "orthants" if cell == "schwarz_p" else "whole", edge)
    seeping = permeability(phase, symmetry=symmetry, tolerance=TOLERANCE)
    mean = seeping.tensor[0].diagonal().mean().item()
    rows = []
    lame, shear = SOLID.lame
    for scheme in SCHEMES:
        stiff = elastic_stiffness(
            phase, solid=SOLID, contrast=CONTRAST, symmetry=symmetry, scheme=scheme, tolerance=TOLERANCE, loads=[0, 3]
        )
        axial, sheared = stiff.tensor[0, 0, 0].item(), stiff.tensor[0, 3, 3].item()
        share = (axial / (lame + 2 * shear), sheared / shear)
        rows.append(DriftRow(cell, VOLUME_FRACTION, scheme, edge, *share, mean))
    return rows


def schwarz_p(edge: int) -> Tensor:
    """The orthant, bool (1, edge / 2, ...), of the cell whose solid is about its middle, where the cosines' sum is low.

    Raises:
        ValueError: If the edge is odd.
    """
    if edge % 2:
        raise ValueError(f"edge = {edge}; expected an even number of voxels, half of which make an orthant.")
    scores = -torch.from_numpy(cosine_field(SURFACES["schwarz_p"], edge // 2))
    return threshold(scores.unsqueeze(0), VOLUME_FRACTION, "cubic")


def gyroid(edge: int) -> Tensor:
    """The whole cell, bool (1, edge, ...), of solid where sin x cos y + sin y cos z + sin z cos x is high."""
    angles = 2 * math.pi * (np.arange(edge) + 0.5) / edge
    x, y, z = np.meshgrid(angles, angles, angles, indexing="ij")
    scores = np.sin(x) * np.cos(y) + np.sin(y) * np.cos(z) + np.sin(z) * np.cos(x)
    return threshold(torch.from_numpy(scores).unsqueeze(0), VOLUME_FRACTION)


def _phase(cell: str, what: str, edge: int) -> tuple[Tensor, str]:
    """A cell in single precision, and the symmetry of the array."""
    if cell == "gyroid":
        return gyroid(edge).float(), "none"
    phase = schwarz_p(edge).float()
    return (phase, "cubic") if what == "orthants" else (whole_cell(phase, "cubic"), "none")


def _solver(name: str, phase: Tensor, symmetry: str) -> Callable[[], Homogenized]:
    options = {"symmetry": symmetry, "tolerance": TOLERANCE}
    if name == "stiffness":
        return lambda: elastic_stiffness(phase, solid=SOLID, contrast=CONTRAST, **options)
    if name == "conductivity":
        return lambda: conductivity(phase, void=1 / CONTRAST, **options)
    return lambda: permeability(phase, **options)
