r"""Geometry of voxel cells: symmetry, volume-preserving threshold, connectivity.

A cell is a periodic cube (or square) of n voxels along each edge, of which 1 is solid and 0 void. If it is symmetric
about its mid-planes, its orthant ``cell[:m, :m, :m]``, m = n/2, says all: the octant in 3-D, the quadrant in 2-D. Faces
of the orthant with index 0 lie on the boundary of the cell, those with index m - 1 at its mid-planes. Arrays have a
leading dimension of cells.
"""

from functools import reduce
from itertools import permutations
from typing import Literal, get_args

import torch
from torch import Tensor

Symmetry = Literal["none", "mirror", "cubic"]
SYMMETRIES: tuple[str, ...] = get_args(Symmetry)
VOID, SOLID, FREE = 0, 1, 2  # what a shared boundary says about a voxel
NEAREST = 4  # orbits of each size on either side of the cut that may make a count exact


def whole_cell(phase: Tensor, symmetry: str) -> Tensor:
    """Mirrors orthants (cells, m, ...) to whole cells (cells, 2 m, ...); whole cells ("none") stay as they are."""
    check_symmetry(symmetry)
    if symmetry != "none":
        for axis in range(1, phase.ndim):
            phase = torch.cat([phase, phase.flip(axis)], axis)
    return phase


def orthant(cell: Tensor) -> Tensor:
    """The origin's orthant of whole cells: (cells, n, ...) -> (cells, n / 2, ...).

    Raises:
        ValueError: If an edge has an odd number of voxels.
    """
    if any(n % 2 for n in cell.shape[1:]):
        raise ValueError(f"the cells are {tuple(cell.shape[1:])} voxels; expected an even number along every edge.")
    return cell[(slice(None), *(slice(n // 2) for n in cell.shape[1:]))]


def symmetrise(values: Tensor, symmetry: str) -> Tensor:
    """Mean of (cells, m, ...) over the permutations of the axes for "cubic"; else the values as they are."""
    check_symmetry(symmetry)
    if symmetry != "cubic":
        return values
    orders = list(permutations(range(1, values.ndim)))
    return reduce(torch.add, [values.permute(0, *order) for order in orders]) / len(orders)


def boundary_mask(resolution: int, dims: int, symmetry: str) -> Tensor:
    """Voxels (resolution, ...) on the boundary of the cell: index 0 of any axis, and the last one of a whole cell."""
    check_symmetry(symmetry)
    edge = torch.zeros(resolution, dtype=torch.bool)
    edge[0] = True
    if symmetry == "none":
        edge[-1] = True
    mask = torch.zeros((resolution,) * dims, dtype=torch.bool)
    for axis in range(dims):
        mask |= edge.view([-1 if i == axis else 1 for i in range(dims)])
    return mask


def voxel_orbits(resolution: int, dims: int, symmetry: str) -> tuple[Tensor, Tensor]:
    """Voxels that the permutations of the axes take to one another, if the symmetry is "cubic"; else each by itself.

    Returns the orbit of each voxel, (resolution^dims,) in C order, and the size of each orbit: 1, 3 or 6 in 3-D and 1
    or 2 in 2-D.
    """
    check_symmetry(symmetry)
    if symmetry != "cubic":
        voxels = torch.arange(resolution**dims)
        return voxels, torch.ones_like(voxels)
    indices = torch.cartesian_prod(*[torch.arange(resolution)] * dims).view(-1, dims)
    powers = resolution ** torch.arange(dims)
    _, orbit, size = (indices.sort(-1).values * powers).sum(-1).unique(return_inverse=True, return_counts=True)
    return orbit, size


def threshold(
    scores: Tensor, volume_fraction: float | Tensor, symmetry: str = "none", boundary: Tensor | None = None
) -> Tensor:
    """Makes the voxels with the highest scores solid, so many that the volume fraction is as asked.

    The number of solid voxels is ``round(volume_fraction * voxels)``. With "cubic" the voxels of an orbit (see
    :func:`voxel_orbits`) are solid or void together, by their mean score: orbits become solid in descending order until
    the next one is too large; then the exchange of a few orbits near the cut that costs least in score makes the count
    exact. Where no exchange can, the count is the nearest that can be had, within half of an orbit. Of equal scores the
    first voxels in C order become solid.

    Args:
        scores: (cells, m, ...), not NaN. What has minus infinity comes last, and is not exchanged for exactness while
            something else is left.
        volume_fraction: Between 0 and 1, one for all or (cells,).
        symmetry: Of the scores.
        boundary: (m, ...), 0 for voxels that are void whatever their score, 1 for solid ones and 2 for free ones, which
            make up for the others.

    Returns:
        Solid voxels, bool, of the shape of ``scores``.

    Raises:
        ValueError: If a fraction is not between 0 and 1 or the boundary alone is too much or too little for it, a score
            is NaN, or shapes do not fit.
    """
    dims = scores.ndim - 1
    if dims < 1 or len(set(scores.shape[1:])) != 1:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; expected (cells, m, ...) with equal edges.")
    if scores.isnan().any():
        raise ValueError("a score is NaN; expected numbers.")
    device, num_cells = scores.device, len(scores)
    fractions = torch.as_tensor(volume_fraction, dtype=torch.float64, device=device)
    if fractions.shape not in ((), (num_cells,)) or not ((fractions > 0) & (fractions < 1)).all():
        raise ValueError(
            f"volume_fraction = {fractions.tolist()}; expected numbers between 0 and 1, one or as many as {num_cells}."
        )
    orbit, size = (part.to(device) for part in voxel_orbits(scores.shape[1], dims, symmetry))
    fixed, is_free = _orbit_boundary(boundary, scores.shape[1:], orbit, size)
    wanted = (fractions * len(orbit)).round().long().expand(num_cells)
    least, most = int((fixed * size).sum()), int(((fixed | is_free) * size).sum())
    beyond = (wanted < least) | (wanted > most)
    if beyond.any():
        raise ValueError(
            f"volume_fraction = {fractions.expand(num_cells)[beyond][0]:.4g} cannot be had: the boundary fixes so many "
            f"voxels that only {least} to {most} of {len(orbit)} can be solid; ask for a fraction from "
            f"{least / len(orbit):.4g} to {most / len(orbit):.4g}."
        )
    flat = scores.reshape(num_cells, -1)
    flat = flat if flat.is_floating_point() else flat.float()
    if symmetry == "cubic":
        sums = torch.zeros(num_cells, len(size), dtype=torch.float64, device=device)
        flat = sums.index_add_(1, orbit, flat.double()) / size
    chosen = fixed.expand(num_cells, -1).clone()
    chosen[:, is_free] = _fill(flat[:, is_free], size[is_free], wanted - least)
    return chosen[:, orbit].view(scores.shape)


def _orbit_boundary(boundary: Tensor | None, shape: torch.Size, orbit: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Which orbits are fixed as solid, and which are free: (orbits,) each."""
    if boundary is None:
        free = torch.ones_like(size, dtype=torch.bool)
        return ~free, free
    if boundary.shape != shape:
        raise ValueError(f"the boundary has shape {tuple(boundary.shape)}; expected that of a cell, {tuple(shape)}.")
    kind = boundary.to(orbit.device).reshape(-1).long()
    if ((kind < VOID) | (kind > FREE)).any():
        raise ValueError(f"the boundary has values {kind.unique().tolist()}; expected 0 (void), 1 (solid), 2 (free).")
    of_orbit = torch.empty_like(size).scatter_(0, orbit, kind)
    if not torch.equal(of_orbit[orbit], kind):
        raise ValueError("the boundary is not invariant under permutations of the axes, as cubic symmetry demands.")
    return of_orbit == SOLID, of_orbit == FREE


def _fill(scores: Tensor, size: Tensor, wanted: Tensor) -> Tensor:
    """Orbits (cells, orbits) of these sizes (orbits,) with the highest scores that hold ``wanted`` (cells,) voxels."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranked = size[order]
    filled = ranked.cumsum(-1) <= wanted.unsqueeze(-1)
    missing = wanted - (ranked * filled).sum(-1)
    if missing.any():
        filled = _exchange(scores.gather(-1, order).double(), ranked, filled, missing)
    return torch.zeros_like(filled).scatter_(-1, order, filled)


def _exchange(scores: Tensor, size: Tensor, filled: Tensor, missing: Tensor) -> Tensor:
    """Changes a few of the ranked orbits (cells, orbits) so that ``missing`` (cells,) more voxels are filled.

    A knapsack by dynamic programming: states are the voxels gained so far, items the orbits of each size that are
    nearest to the cut, and the cost of an item the distance of its score from the cut's, weighted by its size.
    """
    items = _near_cut(size, filled)
    exists = items >= 0
    items = items.clamp(min=0)
    was_filled, gain = filled.gather(-1, items), size.gather(-1, items)
    cut = scores.gather(-1, filled.sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1))
    # A cut at minus infinity, behind all that is finite, is as far from it as from any other score: NaN.
    distance = torch.where(scores.gather(-1, items) == cut, 0.0, (scores.gather(-1, items) - cut).abs())
    cost = distance * gain + 1e-12  # of equal costs the fewest exchanges
    gain = torch.where(was_filled, -gain, gain)
    limit = 2 * int(size.max())
    states = torch.arange(-limit, limit + 1, device=size.device)
    best = torch.full((len(size), len(states)), torch.inf, dtype=torch.float64, device=size.device)
    best[:, limit] = 0.0
    taken = []
    for k in range(items.shape[-1]):
        before = torch.arange(len(states), device=size.device) - gain[:, k : k + 1]
        inside = (before >= 0) & (before < len(states)) & exists[:, k : k + 1]
        through = best.gather(-1, before.clamp(0, len(states) - 1)) + cost[:, k : k + 1]
        through = through.masked_fill(~inside, torch.inf)
        taken.append(through < best)
        best = torch.minimum(best, through)
    # The nearest count first, then the least cost.
    off = (states - missing.unsqueeze(-1)).abs().masked_fill(best.isinf(), 4 * limit)
    state = best.masked_fill(off != off.amin(-1, keepdim=True), torch.inf).argmin(-1, keepdim=True)
    filled = filled.clone()
    for k in reversed(range(items.shape[-1])):
        use = taken[k].gather(-1, state)
        here = items[:, k : k + 1]
        filled.scatter_(-1, here, filled.gather(-1, here) ^ use)
        state = state - use * gain[:, k : k + 1]
    return filled


def _near_cut(size: Tensor, filled: Tensor) -> Tensor:
    """Ranks of the NEAREST orbits of each size on each side of the cut: (cells, items), -1 where there is none."""
    ranks = torch.arange(size.shape[-1], device=size.device).expand_as(size)
    count = min(NEAREST, size.shape[-1])
    items = []
    for kind in size.unique().tolist():
        inside = ranks.masked_fill(~(filled & (size == kind)), -1)
        outside = ranks.masked_fill(filled | (size != kind), size.shape[-1])
        items.append(inside.topk(count, -1).values)
        nearest = outside.topk(count, -1, largest=False).values
        items.append(nearest.masked_fill(nearest == size.shape[-1], -1))
    return torch.cat(items, -1)


def is_connected(cells: Tensor) -> Tensor:
    """Whether the True voxels of each whole periodic cell (cells, n, ...) are one component that percolates: (cells,).

    Neighbours share a face, and the last voxel along an axis is the first one's neighbour.
    """
    return _is_one_component(cells.bool(), periodic=True) & percolates(cells)


def percolates(cells: Tensor) -> Tensor:
    """Whether a path of True voxels within each cell (cells, n, ...) links opposite faces along every axis: (cells,).

    Of cells that are mirror-symmetric the orthants have the same answer.
    """
    cells = cells.bool()
    result = torch.ones(len(cells), dtype=torch.bool, device=cells.device)
    for axis in range(1, cells.ndim):
        start = torch.zeros_like(cells)
        start.select(axis, 0).copy_(cells.select(axis, 0))
        reached = _flood(start, cells, periodic=False)
        result &= reached.select(axis, -1).flatten(1).any(-1)
    return result


def bicontinuous(phase: Tensor, symmetry: str) -> Tensor:
    """Whether solid and void percolate along all axes and the solid is one periodic component: (cells,).

    In 2-D only the solid is looked at: two phases of a plane cannot both percolate along both axes.

    A path in a mirror-symmetric cell folds to one in its orthant and back, so that the orthant is enough; with cubic
    symmetry one axis stands for all.
    """
    check_symmetry(symmetry)
    solid = phase > 0.5 if phase.is_floating_point() else phase.bool()
    result = _is_one_component(solid, periodic=symmetry == "none") & percolates(solid)
    return result & percolates(~solid) if phase.ndim == 4 else result


def islands(cells: Tensor, symmetry: str) -> Tensor:
    """Solid that floats: True voxels that no path joins to where the solid links all faces, (cells, m, ...).

    None in cells where it links no faces. With arguments as of :func:`bicontinuous`, but bool.
    """
    check_symmetry(symmetry)
    linked = cells
    for axis in range(1, cells.ndim):
        for face in (0, -1):
            start = torch.zeros_like(cells)
            start.select(axis, face).copy_(linked.select(axis, face))
            linked = _flood(start, linked, periodic=False)
    linked = _flood(linked, cells, periodic=symmetry == "none")
    return cells & ~linked & linked.flatten(1).any(-1).view(-1, *(1,) * (cells.ndim - 1))


def check_symmetry(symmetry: str) -> None:
    """Raises a ``ValueError`` for a symmetry that is none of SYMMETRIES."""
    if symmetry not in SYMMETRIES:
        raise ValueError(f"symmetry = {symmetry!r}; expected one of {', '.join(SYMMETRIES)}.")


def _is_one_component(cells: Tensor, periodic: bool) -> Tensor:
    flat = cells.flatten(1)
    start = torch.zeros_like(flat).scatter_(1, flat.byte().argmax(1, keepdim=True), 1) & flat
    reached = _flood(start.view_as(cells), cells, periodic)
    return (reached == cells).flatten(1).all(-1) & flat.any(-1)


def _flood(start: Tensor, cells: Tensor, periodic: bool) -> Tensor:
    """Voxels of the cells that a path of neighbours joins to the start: (cells, n, ...) bool.

    Each round sweeps every axis forwards and backwards, so that only the turns of a path take rounds.
    """
    # Cells come last: a slice across any axis is then contiguous in them.
    inside = cells.movedim(0, -1).contiguous()
    reached = start.movedim(0, -1).contiguous() & inside
    count = -1
    while count < (count := int(reached.sum())):
        for axis in range(inside.ndim - 1):
            layers, walls = reached.unbind(axis), inside.unbind(axis)
            last = len(layers) - 1
            for i in range(0 if periodic else 1, last + 1):
                layers[i].logical_or_(layers[i - 1] & walls[i])
            for i in range(last if periodic else last - 1, -1, -1):
                layers[i].logical_or_(layers[i - last] & walls[i])
    return reached.movedim(-1, 0)


__all__ = ["SYMMETRIES", "Symmetry", "bicontinuous", "boundary_mask", "check_symmetry", "is_connected", "islands"]
__all__ += ["orthant", "percolates", "symmetrise", "threshold", "voxel_orbits", "whole_cell"]
