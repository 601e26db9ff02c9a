"""Generates periodic two-phase cells for Janus, and the command that writes a set of them with labels.

`cells`: bicontinuous octants with cubic symmetry. A field on the octant [0, 1]³ (0 is the cell's boundary, 1 its
mid-plane) is a sum of products of cosines cos(π k x), which makes the cell mirror-symmetric, and is averaged over the
permutations of the axes. Near the faces it fades into one field that all cells share,

    f = w f_shared + (1 − w) (f_random − c),    w → 1 on the boundary,

so that all cells agree in every voxel with an index 0, and any two fit. The cut c gives the volume fraction; f > 0 is
the same as f_random + w / (1 − w) f_shared > c, so that one volume-preserving threshold of these scores finds it.
Triply periodic minimal surfaces in their nodal approximation: von Schnering and Nesper, Z. Phys. B 83, 1991.

`conductivity`: whole periodic cells in 2-D without symmetry: thresholded Fourier fields, inclusions and stripes.

    python -m training.microstructures --out runs/janus/cells --num-cells 6000 --resolution 16 --seed 0 --processes 2
"""

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from leviathan.janus.cells import FREE, boundary_mask, threshold
from leviathan.janus.physics import Physics, canonical
from training.microstructure_data import Cells, label, load_set, read_set_file, totals, write_set

Modes = Mapping[tuple[int, int, int], float]
"""Wavenumbers (k1, k2, k3), in ascending or any order, to coefficients; permutations share one."""

SURFACES: dict[str, Modes] = {
    "schwarz_p": {(1, 0, 0): 3.0},
    "i_wp": {(1, 1, 0): 6.0, (2, 0, 0): -3.0},
    "neovius": {(1, 0, 0): 9.0, (1, 1, 1): 4.0},
    "f_rd": {(1, 1, 1): 4.0, (2, 2, 0): -3.0},
    "octo": {(1, 1, 0): 1.8, (1, 0, 0): -1.2},
}
"""Coefficients of the symmetrised modes: of (1, 0, 0), for instance, the mean of the three cosines."""

SHARED_SOLID = 0.48  # of a face of the cell, about
VOLUME_FRACTIONS = (0.18, 0.75)
ROOM = 0.09  # share of a cell that its volume fraction leaves at least for either phase off the boundary
PLANE_VOLUME_FRACTIONS = (0.1, 0.9)
MAX_ATTEMPTS = 200
FAMILIES = {"fourier": 0.25, "surface": 0.15, "sheet": 0.1, "walls": 0.3, "mixture": 0.2}


@dataclass(frozen=True)
class Cell:
    """A cell of the random stream (seed, index).

    Attributes:
        phase: bool, (m, ...), True where solid: an octant, or a whole cell in 2-D.
        family: What kind of field it was cut from.
        rejected: Why earlier draws of this stream were rejected, and how many.
    """

    phase: np.ndarray
    family: str
    rejected: Counter


def cosine_field(modes: Modes, resolution: int) -> np.ndarray:
    """Sum of coefficient times the mean of cos(π k1 x) cos(π k2 y) cos(π k3 z) over permutations of the wavenumbers.

    Returns values at the centres of the voxels, (resolution,) * 3, which no permutation of the axes changes but for
    rounding.
    """
    top = max(max(mode) for mode in modes)
    coefficients = np.zeros((top + 1,) * 3)
    for mode, value in modes.items():
        for order in permutations(mode):
            coefficients[order] += value / 6
    waves = np.cos(np.pi * np.outer(np.arange(top + 1), centres(resolution)))
    return np.einsum("abc,ax,by,cz->xyz", coefficients, waves, waves, waves, optimize=True)


def centres(resolution: int) -> np.ndarray:
    """Coordinates of the voxels' centres from the cell's boundary, 0, to its mid-plane, 1."""
    return (np.arange(resolution) + 0.5) / resolution


def shared_boundary(resolution: int) -> Tensor:
    """What all cells have in common, uint8 (resolution,) * 3: 0 void, 1 solid, 2 free; free is all without an index 0.

    Raises:
        ValueError: If the resolution is below 4, at which a face cannot hold both phases.
    """
    if resolution < 4:
        raise ValueError(f"resolution = {resolution}; expected at least 4 voxels along an edge of the octant.")
    boundary = torch.full((resolution,) * 3, FREE, dtype=torch.uint8)
    edge = boundary_mask(resolution, 3, "cubic")
    boundary[edge] = torch.from_numpy(shared_field(resolution) > 0)[edge].byte()
    return boundary


def volume_fractions(boundary: Tensor) -> tuple[float, float]:
    """Range to draw from: VOLUME_FRACTIONS, less where a coarse boundary leaves no room for both phases."""
    low, high = VOLUME_FRACTIONS
    solid, void = ((boundary == phase).double().mean().item() for phase in (1, 0))
    return max(low, solid + ROOM), min(high, 1 - void - ROOM)


def shared_field(resolution: int) -> np.ndarray:
    """The field that all cells fade into, (resolution,) * 3: positive on SHARED_SOLID of a face of the cell.

    Schwarz P: on each face a diamond of solid about the centre crosses to the neighbour, and the void around it runs
    along the cell's edges. Plates on the mid-planes, the stiffest of cells, end in the diamond's corners.
    """
    values = -cosine_field(SURFACES["schwarz_p"], resolution).round(9)  # equal values are equal, and not cut apart
    return (values - np.quantile(values[0], 1 - SHARED_SOLID, method="lower")) / values.std()


def octant(seed: int, index: int, resolution: int) -> Cell:
    """The cell of an index; it depends on the seed, the index and the resolution alone.

    The volume fraction is drawn first and kept, so that rejections do not bend its distribution; the field is drawn
    anew until solid and void percolate along all axes and no solid floats, see :func:`defect`.

    Raises:
        ValueError: If no field of MAX_ATTEMPTS does.
    """
    boundary, shared = shared_boundary(resolution), shared_field(resolution)
    rng = np.random.default_rng([seed, index])
    volume_fraction = rng.uniform(*volume_fractions(boundary))
    rejected = Counter()
    for _ in range(MAX_ATTEMPTS):
        family = str(rng.choice(list(FAMILIES), p=list(FAMILIES.values())))
        scores = _standard(_field(family, rng, resolution)) + _fade(rng, resolution) * shared
        scores = torch.from_numpy(scores).unsqueeze(0)
        phase = threshold(scores, volume_fraction, "cubic", boundary).squeeze(0).numpy()
        reason = defect(phase)
        if reason is None:
            return Cell(phase, family, rejected)
        rejected[reason] += 1
    raise ValueError(
        f"seed {seed}, index {index}: {MAX_ATTEMPTS} fields of {resolution} voxels and volume fraction "
        f"{volume_fraction:.3f} were rejected ({dict(rejected)}); use a higher resolution."
    )


def defect(phase: np.ndarray) -> str | None:
    """What keeps an octant (m, m, m) with cubic symmetry from being bicontinuous, or None; neighbours share a face.

    A path in the mirrored, periodic cell folds to one in the octant, and an octant's path from face to face unfolds:
    its components and their reach say all about the cell. The void along the cell's edges, which the shared boundary
    gives to all, is not enough of a path.
    """
    labels, count = ndimage.label(phase)
    if not _reaches(labels):
        return "the solid does not percolate"
    if not _reaches(ndimage.label(~phase[:, 1:, 1:])[0]):
        return "the void does not percolate but along the cell's edges"
    return None if count == 1 else "solid floats"


def _reaches(labels: np.ndarray) -> bool:
    """Whether a component links the first and the last slice along the first axis."""
    return bool(np.intersect1d(labels[0][labels[0] > 0], labels[-1]).size)


def _standard(field: np.ndarray) -> np.ndarray:
    return (field - field.mean()) / (field.std() + 1e-12)


def _fade(rng: np.random.Generator, resolution: int) -> np.ndarray:
    """The ratio w / (1 − w), which falls with the distance from the nearest face."""
    nearness = (centres(resolution) / rng.uniform(0.03, 0.15)) ** -2.0
    return _largest(*np.ix_(*[nearness] * 3))


def _field(family: str, rng: np.random.Generator, resolution: int) -> np.ndarray:
    if family == "fourier":
        return _fourier(rng, resolution)
    if family == "surface":
        return _surface(rng, resolution)
    if family == "sheet":
        return _sheet(_fourier(rng, resolution) if rng.random() < 0.3 else _surface(rng, resolution), rng)
    if family == "walls":
        return _walls(rng, resolution)
    parts = [_standard(draw(rng, resolution)) for draw in (_fourier, _surface, _walls)]
    return np.tensordot(rng.dirichlet(np.ones(len(parts))), parts, 1)


def _fourier(rng: np.random.Generator, resolution: int) -> np.ndarray:
    top, decay = rng.integers(2, 5), rng.uniform(1.0, 3.0)
    modes = {
        (a, b, c): rng.standard_normal() * (1 + a * a + b * b + c * c) ** (-decay / 2)
        for a in range(top + 1)
        for b in range(a + 1)
        for c in range(b + 1)
        if a
    }
    return cosine_field(modes, resolution)


def _surface(rng: np.random.Generator, resolution: int) -> np.ndarray:
    """A blend of one to three surfaces, each as it is or shifted by half a period along all axes, of either sign."""
    names = rng.choice(list(SURFACES), size=rng.integers(1, 4), replace=False)
    fields = []
    for name in names:
        turn = -1 if rng.random() < 0.5 else 1
        modes = {mode: value * turn ** sum(mode) for mode, value in SURFACES[name].items()}
        fields.append(_standard(cosine_field(modes, resolution)))
    weights = rng.dirichlet(np.ones(len(names))) * np.where(rng.random(len(names)) < 0.5, 1, -1)
    return np.tensordot(weights, fields, 1)


def _sheet(field: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Solid near a level of a field rather than above it."""
    return -((_standard(field) - rng.normal(0.0, 0.5)) ** 2)


def _walls(rng: np.random.Generator, resolution: int) -> np.ndarray:
    """Plates along the mid-planes, or the boundary, with holes about the edges of the cell."""
    x = centres(resolution)
    place = 1.0 if rng.random() < 0.85 else 0.0
    wall = np.exp(-(((x - place) / rng.uniform(0.1, 0.6)) ** 2))
    hole = np.exp(-((x / rng.uniform(0.15, 0.5)) ** 2))
    a, b, c = np.ix_(hole, hole, hole)
    return _largest(*np.ix_(wall, wall, wall)) - rng.uniform(0.0, 0.7) * _largest(a * b, b * c, c * a)


def _largest(*fields: np.ndarray) -> np.ndarray:
    return reduce(np.maximum, fields)


def plane_cell(seed: int, index: int, resolution: int) -> Cell:
    """The whole periodic 2-D cell of an index; it depends on the seed, the index and the resolution alone."""
    rng = np.random.default_rng([seed, index])
    volume_fraction = rng.uniform(*PLANE_VOLUME_FRACTIONS)
    family = str(rng.choice(list(PLANE_FAMILIES)))
    scores = torch.from_numpy(PLANE_FAMILIES[family](rng, resolution)).unsqueeze(0)
    return Cell(threshold(scores, volume_fraction).squeeze(0).numpy(), family, Counter())


def _rough(rng: np.random.Generator, resolution: int) -> np.ndarray:
    """White noise smoothed by a Gaussian with two length scales, along axes that are turned."""
    angle, lengths = rng.uniform(0, np.pi), np.exp(rng.uniform(np.log(0.03), np.log(0.2), 2))
    k = np.fft.fftfreq(resolution, 1 / resolution)
    along = [np.cos(angle) * k[:, None] + np.sin(angle) * k, np.cos(angle) * k - np.sin(angle) * k[:, None]]
    damping = np.exp(-2 * np.pi**2 * sum((length * each) ** 2 for length, each in zip(lengths, along, strict=True)))
    return np.fft.ifft2(np.fft.fft2(rng.standard_normal((resolution, resolution))) * damping).real


def _inclusions(rng: np.random.Generator, resolution: int) -> np.ndarray:
    """Discs and ellipses, as large as the volume fraction makes them, of either phase."""
    x = (np.arange(resolution) + 0.5) / resolution
    distances = []
    for _ in range(rng.integers(1, 7)):
        u, v = np.ix_(*(((x - centre + 0.5) % 1) - 0.5 for centre in rng.random(2)))
        angle, aspect = rng.uniform(0, np.pi), rng.choice([1.0, rng.uniform(1, 4)])
        along, across = np.cos(angle) * u + np.sin(angle) * v, np.cos(angle) * v - np.sin(angle) * u
        distances.append(np.hypot(along / aspect, across) / rng.uniform(0.5, 1.0))
    return rng.choice([-1, 1]) * reduce(np.minimum, distances)


def _stripes(rng: np.random.Generator, resolution: int) -> np.ndarray:
    """Waves along a direction of the lattice, more or less straight."""
    x = (np.arange(resolution) + 0.5) / resolution
    k1, k2 = rng.choice([(a, b) for a in range(4) for b in range(-3, 4) if a or b > 0])
    bend = rng.uniform(0, 0.5) * _standard(_rough(rng, resolution))
    return np.cos(2 * np.pi * (k1 * x[:, None] + k2 * x + rng.random()) + bend)


PLANE_FAMILIES = {"fourier": _rough, "inclusions": _inclusions, "stripes": _stripes}


@dataclass(frozen=True)
class Kind:
    """A kind of set: how its cells are drawn, and what the command takes if nothing else is given."""

    draw: Callable[[int, int, int], Cell]
    dims: int
    resolution: int
    symmetry: str
    property_names: tuple[str, ...]


KINDS = {
    "cells": Kind(octant, 3, 16, "cubic", ("C1111", "C1122", "C2323", "volume_fraction", "permeability")),
    "conductivity": Kind(plane_cell, 2, 32, "none", ("K11", "K22", "K12", "volume_fraction")),
}


def draw_cells(
    indices: Sequence[int],
    *,
    kind: str,
    seed: int,
    resolution: int,
    names: Sequence[str],
    physics: Physics,
    device: str,
) -> Cells:
    """Draws and labels cells; what their solver does not converge for is missing, and counted."""
    drawn = [KINDS[kind].draw(seed, index, resolution) for index in indices]
    phase = np.stack([cell.phase for cell in drawn]).astype(np.uint8)
    counts = sum((cell.rejected for cell in drawn), Counter())
    cells = Cells(phase, [cell.family for cell in drawn], list(indices), np.empty((len(drawn), 0), np.float32), counts)
    return label(cells, names, physics, device)


def make_set(
    path: str | Path,
    *,
    kind: str = "cells",
    num_cells: int,
    resolution: int | None = None,
    seed: int = 0,
    property_names: Sequence[str] | None = None,
    physics: Physics | None = None,
    device: str = "cpu",
    **options: int | bool,
) -> None:
    """Writes a set of cells, or goes on with one that was interrupted.

    Args:
        path: The folder.
        kind: "cells" or "conductivity".
        num_cells: Cells to draw.
        resolution: Voxels along an edge of the octant, or of the 2-D cell.
        seed: Of the random streams.
        property_names: Labels, none for a set without; the kind's own if None.
        physics: Materials and method of the labels; its symmetry is the kind's.
        device: Where to compute labels.
        options: Of :func:`training.microstructure_data.write_set`: shard_size, batch_size, processes, progress.

    Raises:
        ValueError: If an option is out of range or unknown, or the folder holds a set of other settings.
    """
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r}; expected one of {', '.join(KINDS)}.")
    if seed < 0:
        raise ValueError(f"seed = {seed}; expected a number that is not negative.")
    found = KINDS[kind]
    resolution = found.resolution if resolution is None else resolution
    names = found.property_names if property_names is None else tuple(map(canonical, property_names))
    physics = dataclasses.replace(physics or Physics(), symmetry=found.symmetry)
    if found.dims == 3:
        boundary = shared_boundary(resolution)
    elif resolution >= 4:
        boundary = torch.full((resolution,) * found.dims, FREE, dtype=torch.uint8)
    else:
        raise ValueError(f"resolution = {resolution}; expected at least 4 voxels along an edge of the cell.")
    write_set(
        path,
        partial(draw_cells, kind=kind, seed=seed, resolution=resolution, names=names, physics=physics, device=device),
        num_cells,
        settings={"kind": kind, "resolution": resolution, "physics": dataclasses.asdict(physics)},
        property_names=names,
        symmetry=found.symmetry,
        boundary=boundary,
        seed=seed,
        **options,
    )


def summary(path: str | Path) -> str:
    """What a set holds, and what was rejected on the way to it."""
    counts, data = totals(read_set_file(path)), load_set(path)
    kept = counts.pop("cells", 0)
    copies = kept - len(data.cells.flatten(1).unique(dim=0))
    families = ", ".join(f"{name} {count}" for name, count in sorted(Counter(data.families).items()))
    lines = [f"{kept} cells of {tuple(data.cells.shape[1:])} voxels ({families}); {copies} copies of another"]
    lines += [f"  {count} rejected: {reason}" for reason, count in sorted(counts.items())]
    for name, values in zip(data.property_names, data.labels.T, strict=True):
        low, middle, high = values.quantile(torch.tensor([0.0, 0.5, 1.0])).tolist()
        lines.append(f"  {name}: {low:.4g} to {high:.4g}, median {middle:.4g}")
    return "\n".join(lines)


def add_physics(parser: argparse.ArgumentParser) -> None:
    """Flags for the fields of `Physics` but the symmetry, which the cells have."""
    for each in dataclasses.fields(Physics):
        if each.name != "symmetry":
            flag = "--" + each.name.replace("_", "-")
            parser.add_argument(flag, type=type(each.default), default=each.default, help="of the labels' physics")


def take_physics(given: dict[str, object], symmetry: str) -> Physics:
    """Takes what :func:`add_physics` added out of parsed flags."""
    names = [each.name for each in dataclasses.fields(Physics) if each.name in given]
    return Physics(**{name: given.pop(name) for name in names}, symmetry=symmetry)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: writes the set, then prints what it holds."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    parser.add_argument("--out", type=Path, required=True, help="folder of the set")
    parser.add_argument("--kind", choices=tuple(KINDS), default="cells", help="octants in 3-D, or 2-D cells")
    parser.add_argument("--num-cells", type=int, default=6000, help="cells to draw")
    parser.add_argument("--resolution", type=int, help="voxels along an edge; 16 in 3-D and 32 in 2-D if not given")
    parser.add_argument("--seed", type=int, default=0, help="cell i depends on the seed and i alone")
    parser.add_argument("--property-names", nargs="*", help="labels; the kind's own if not given, none if empty")
    parser.add_argument("--processes", type=int, default=1, help="processes, with one thread each if several")
    parser.add_argument("--batch-size", type=int, default=32, help="cells labelled at once")
    parser.add_argument("--shard-size", type=int, default=256, help="cells of a file")
    parser.add_argument("--device", default="cpu", help="of the labels: cpu, cuda, cuda:1, ...")
    add_physics(parser)
    given = vars(parser.parse_args(arguments))
    out, kind = given.pop("out"), given.pop("kind")
    try:
        make_set(out, kind=kind, physics=take_physics(given, KINDS[kind].symmetry), **given)
        print(summary(out))
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
