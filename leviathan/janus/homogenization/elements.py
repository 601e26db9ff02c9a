r"""Voxels as finite elements: multilinear displacements or temperatures between the corners of each voxel.

All voxels share one element matrix :math:`K_0`, times a scale of each: the phases differ by a factor. ``"rotated"``
integrates it at the voxel's centre alone, which is the rotated staggered grid of FFT methods (F. Willot, C. R.
Mecanique 343, 2015); ``"hexahedral"`` at the 2^d Gauss points, exactly, so that the effective stiffness bounds the true
one of the voxels from above (as in R. Leute et al., J. Comput. Phys. 453, 2022). With one point two or more wave
numbers at the Nyquist frequency have no strain; nothing drives them, and they stay zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal, get_args

import torch
from torch import Tensor

Scheme = Literal["rotated", "hexahedral"]
SCHEMES: tuple[str, ...] = get_args(Scheme)
GAUSS = 0.5 / 3**0.5  # of two points, from the middle of a voxel of edge 1


@dataclass(frozen=True, eq=False)
class Element:
    r"""The matrix of one voxel of edge 1, and its loads.

    A degree of freedom is a component at a corner, numbered component * 2^d + corner; corners count in binary, the last
    axis first.

    Attributes:
        matrix: :math:`K_0`, (components * 2^d, same).
        loads: Values at the corners under each uniform strain or gradient, (loads, components * 2^d).
        flips: Whether a reflection along an axis turns a load's sign, (loads, d).
        vector: Whether the unknown is a vector, whose component along the axis a reflection turns too.
    """

    matrix: Tensor
    loads: Tensor
    flips: Tensor
    vector: bool

    @property
    def dims(self) -> int:
        """Axes d of space."""
        return self.flips.shape[-1]

    @property
    def num_components(self) -> int:
        """Components of the unknown field."""
        return self.dims if self.vector else 1

    @property
    def odd(self) -> Tensor:
        """Whether a component under a load is odd about mirror planes across an axis, (loads, components, d)."""
        if not self.vector:
            return self.flips[:, None]
        return self.flips[:, None] ^ torch.eye(self.dims, dtype=torch.bool)


@lru_cache
def thermal_element(dims: int, scheme: Scheme) -> Element:
    """Temperatures, for a conductivity of 1; a load is a unit gradient along one axis."""
    corners = _corners(dims)
    gradients, weight = _gradients(dims, scheme)
    matrix = weight * torch.einsum("gac,gad->cd", gradients, gradients)
    return Element(matrix, corners.mT.contiguous(), torch.eye(dims, dtype=torch.bool), vector=False)


@lru_cache
def elastic_element(dims: int, scheme: Scheme, lame: tuple[float, float]) -> Element:
    """Displacements; a load is one unit strain of Voigt's notation, shears last (23, 13, 12) and in engineering strain.

    In 2-D it is plane strain.
    """
    first, second = lame
    corners, eye = _corners(dims), torch.eye(dims, dtype=torch.float64)
    gradients, weight = _gradients(dims, scheme)
    # Strain of each degree of freedom: (points, axes, axes, components, corners).
    strain = torch.einsum("gac,ib->gabic", gradients, eye)
    strain = (strain + strain.transpose(1, 2)) / 2
    trace = torch.einsum("gaaic->gic", strain)
    matrix = second * 2 * torch.einsum("gabic,gabjd->icjd", strain, strain)
    matrix = weight * (matrix + first * torch.einsum("gic,gjd->icjd", trace, trace))
    size = dims * len(corners)
    pairs = voigt_pairs(dims)
    strains = torch.stack([(torch.outer(eye[a], eye[b]) + torch.outer(eye[b], eye[a])) / 2 for a, b in pairs])
    loads = torch.einsum("lab,cb->lac", strains, corners).reshape(len(pairs), size)
    flips = torch.tensor([[a != b and axis in (a, b) for axis in range(dims)] for a, b in pairs])
    return Element(matrix.reshape(size, size), loads, flips, vector=True)


def voigt_pairs(dims: int) -> list[tuple[int, int]]:
    """Axes of each of Voigt's components: 11, 22, 33, 23, 13, 12, in 2-D 11, 22, 12."""
    return [(a, a) for a in range(dims)] + ([(1, 2), (0, 2), (0, 1)] if dims == 3 else [(0, 1)])


def _corners(dims: int) -> Tensor:
    return torch.tensor(list(product((0.0, 1.0), repeat=dims)), dtype=torch.float64)


def _gradients(dims: int, scheme: Scheme) -> tuple[Tensor, float]:
    """Gradients of the corners' shape functions at the points of the rule, (points, axes, corners); their weight."""
    ends = (0.5,) if scheme == "rotated" else (0.5 - GAUSS, 0.5 + GAUSS)
    points = torch.tensor(list(product(ends, repeat=dims)), dtype=torch.float64)
    corners = _corners(dims)
    shapes = torch.where(corners == 1, points[:, None], 1 - points[:, None])  # (points, corners, axes)
    rows = []
    for axis in range(dims):
        others = shapes[..., [a for a in range(dims) if a != axis]].prod(-1)
        rows.append(others * (2 * corners[:, axis] - 1))
    return torch.stack(rows, dim=1), 1.0 / len(points)
