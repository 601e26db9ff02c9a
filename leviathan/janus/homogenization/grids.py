"""Nodes of periodic cells and of their orthants between mirror planes, and the solver's preconditioner on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import pi

import torch
from torch import Tensor

from leviathan.janus.homogenization.elements import Element
from leviathan.janus.homogenization.mirror import along_axes, transform

NULL = 1e-10  # eigenvalues of the homogeneous operator below this share of the element's largest entry are zero


class PeriodicGrid:
    """Nodes of whole periodic cells of n voxels along each edge: as many as voxels.

    Args:
        element: The voxel.
        n: Voxels along an edge.
        dtype: Of the fields.
        device: Of the fields.
    """

    def __init__(self, element: Element, n: int, dtype: torch.dtype, device: torch.device):
        self.dims = element.dims
        self.shape = (n,) * self.dims
        angles = [2 * pi * torch.fft.fftfreq(n, dtype=torch.float64)] * (self.dims - 1)
        angles.append(2 * pi * torch.fft.rfftfreq(n, dtype=torch.float64))
        self.inverse = _inverse(_symbol(element, angles)).to(device, dtype)

    def gather(self, nodes: Tensor) -> Tensor:
        """Values at the corners of each voxel: (..., components, nodes) -> (..., components, 2^d, voxels)."""
        for axis in range(-self.dims, 0):
            nodes = torch.cat([nodes, nodes.narrow(axis, 0, 1)], axis)
        return _corners(nodes, self.dims)

    def scatter(self, corners: Tensor) -> Tensor:
        """The transpose of :meth:`gather`: forces at nodes from those at corners."""
        nodes = _sum_corners(corners, self.dims)
        for axis in range(-self.dims, 0):
            size = nodes.shape[axis] - 1
            nodes.narrow(axis, 0, 1).add_(nodes.narrow(axis, size, 1))
            nodes = nodes.narrow(axis, 0, size)
        return nodes

    def groups(self, loads: Sequence[int]) -> list[list[int]]:
        """Loads that are solved for together."""
        return [list(loads)]

    def precondition(self, forces: Tensor, load: int) -> Tensor:
        """Fields in equilibrium with these forces in the homogeneous cell: (systems, components, nodes)."""
        axes = tuple(range(-self.dims, 0))
        modes = torch.fft.rfftn(forces, dim=axes)
        modes = torch.view_as_complex(
            torch.einsum("ij...,bj...c->bi...c", self.inverse, torch.view_as_real(modes)).contiguous()
        )
        return torch.fft.irfftn(modes, s=self.shape, dim=axes)


class MirrorGrid:
    """Nodes of the first orthant of cells with mirror planes: one more than its m voxels along each edge.

    Displacements across a mirror plane that is not to open, and the like, are zero there: the transforms see to it.
    Arguments as of :class:`PeriodicGrid`.
    """

    def __init__(self, element: Element, m: int, dtype: torch.dtype, device: torch.device):
        self.dims = element.dims
        self.shape = (m + 1,) * self.dims
        angles = [pi / m * torch.arange(m + 1, dtype=torch.float64)] * self.dims
        symbol, odd = _symbol(element, angles), element.odd
        self.inverse, self.transforms = [], []
        for components in odd:  # of one load
            # - d/dx_i d/dx_j turns cosines into -sines, sines into cosines, along both axes.
            turns = torch.where(components, 1.0, -1.0).double()
            signs = torch.ones(len(components), len(components), dtype=torch.float64)
            for i, j in product(range(len(components)), repeat=2):
                if i != j:
                    signs[i, j] = -turns[j, i] * turns[j, j]
            exists = torch.ones(len(components), *self.shape, dtype=torch.float64)
            for component, axis in product(range(len(components)), range(self.dims)):
                if components[component, axis]:
                    exists[component].movedim(axis, 0)[[0, -1]] = 0
            block = symbol * signs.view(*signs.shape, *(1,) * self.dims) * exists * exists[:, None]
            self.inverse.append(_inverse(block).to(device, dtype))
            self.transforms.append(
                [
                    torch.stack([_nodal(bool(o), m) for o in components[:, axis]]).to(device, dtype)
                    for axis in range(self.dims)
                ]
            )

    def gather(self, nodes: Tensor) -> Tensor:
        """As :meth:`PeriodicGrid.gather`."""
        return _corners(nodes, self.dims)

    def scatter(self, corners: Tensor) -> Tensor:
        """As :meth:`PeriodicGrid.scatter`."""
        return _sum_corners(corners, self.dims)

    def groups(self, loads: Sequence[int]) -> list[list[int]]:
        """Each load has its own parities."""
        return [[load] for load in loads]

    def precondition(self, forces: Tensor, load: int) -> Tensor:
        """As :meth:`PeriodicGrid.precondition`, of one load."""
        transforms = self.transforms[load]
        modes = along_axes(forces, transforms)
        modes = (self.inverse[load] * modes[:, None]).sum(2)
        return along_axes(modes, [matrix.mT for matrix in transforms])


@lru_cache(maxsize=8)
def grid(
    element: Element, size: int, mirror: bool, dtype: torch.dtype, device: torch.device
) -> PeriodicGrid | MirrorGrid:
    """The grid of these voxels, made once."""
    return (MirrorGrid if mirror else PeriodicGrid)(element, size, dtype, device)


def _corners(nodes: Tensor, dims: int) -> Tensor:
    views = [nodes]
    for axis in range(-dims, 0):
        size = nodes.shape[axis] - 1
        views = [view.narrow(axis, start, size) for view in views for start in (0, 1)]
    return torch.stack(views, dim=-dims - 1)


def _sum_corners(corners: Tensor, dims: int) -> Tensor:
    for axis in range(-dims, 0):  # the axis of corners counts in binary, its first bit along the first axis
        first, second = corners.unflatten(-dims - 1, (2, -1)).unbind(-dims - 2)
        shape = list(first.shape)
        shape[axis] += 1
        corners = first.new_empty(shape)
        size = shape[axis] - 1
        corners.narrow(axis, size, 1).zero_()
        corners.narrow(axis, 0, size).copy_(first)
        corners.narrow(axis, 1, size).add_(second)
    return corners.squeeze(-dims - 1)


def _symbol(element: Element, angles: Sequence[Tensor]) -> Tensor:
    """The homogeneous operator on plane waves of these angles from node to node: (components, components, modes)."""
    corners = torch.tensor(list(product((0.0, 1.0), repeat=element.dims)), dtype=torch.float64)
    grids = torch.stack(torch.meshgrid(*angles, indexing="ij"))
    waves = torch.exp(1j * torch.einsum("ca,a...->c...", corners, grids))
    size = len(corners)
    blocks = element.matrix.view(element.num_components, size, element.num_components, size).to(waves.dtype)
    return torch.einsum("c...,icjd,d...->ij...", waves.conj(), blocks, waves).real


def _inverse(symbol: Tensor) -> Tensor:
    """The pseudo-inverse of the block of each mode, (components, components, modes)."""
    blocks = symbol.movedim((0, 1), (-2, -1))
    return (
        torch.linalg.pinv(blocks, atol=NULL * float(symbol.abs().max()), hermitian=True)
        .movedim((-2, -1), (0, 1))
        .contiguous()
    )


def _nodal(odd: bool, m: int) -> Tensor:
    """Modes of an even or odd field from forces at nodes, which carry each node's weight already: (m + 1, m + 1)."""
    if not odd:
        matrix = transform("cos_nodes", m).clone()
        matrix[:, [0, -1]] *= 2**0.5  # Q / sqrt(w)
        return matrix
    matrix = torch.zeros(m + 1, m + 1, dtype=torch.float64)
    matrix[1:-1, 1:-1] = transform("sin_nodes", m)
    return matrix
