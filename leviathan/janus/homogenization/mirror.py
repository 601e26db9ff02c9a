r"""Cosine and sine transforms of fields that mirror planes continue, as orthonormal matrices along one axis.

Half a period has m voxels and so m centres and m + 1 nodes, of which the first and the last lie on mirror planes. A
field that is even about them is a sum of :math:`\cos(\pi k x / m)`, an odd one of :math:`\sin(\pi k x / m)`. Nodes on
mirror planes belong to two halves: fields on nodes are multiplied by :math:`\sqrt{w}`, w = 1/2 there and 1 elsewhere,
so that plain dot products are those of half a period. (The types I and II of the discrete cosine and sine transforms,
Rao & Yip 1990.) For the m of voxel cells a product with a dense matrix is quicker than a fast transform.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import pi
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["cos_nodes", "sin_nodes", "cos_centres", "sin_centres"]


def modes(kind: Kind, m: int) -> range:
    """The k of each row of :func:`transform`: the mode has the angle pi k / m from one voxel to the next."""
    return {
        "cos_nodes": range(m + 1),
        "sin_nodes": range(1, m),
        "cos_centres": range(m),
        "sin_centres": range(1, m + 1),
    }[kind]


@lru_cache(maxsize=64)
def transform(kind: Kind, m: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    r"""The orthonormal matrix Q, rows the modes and columns the points; its transpose is its inverse.

    Args:
        kind: Function and points: ``"cos_nodes"`` has shape (m + 1, m + 1), ``"sin_nodes"`` (m - 1, m - 1) without the
            mirror planes, where the field is zero, ``"cos_centres"`` and ``"sin_centres"`` (m, m).
        m: Voxels of half a period.
        dtype: Of the matrix; it is computed in float64.
        device: Of the matrix.
    """
    k = torch.tensor([*modes(kind, m)], dtype=torch.float64)
    if kind.endswith("centres"):
        points = torch.arange(m, dtype=torch.float64) + 0.5
    else:
        points = torch.tensor([*modes(kind, m)], dtype=torch.float64)
    angles = pi / m * k[:, None] * points
    matrix = (2 / m) ** 0.5 * (angles.cos() if kind.startswith("cos") else angles.sin())
    matrix[(k == 0) | (k == m)] /= 2**0.5
    if kind == "cos_nodes":
        matrix[:, [0, -1]] /= 2**0.5  # sqrt(w)
    return matrix.to(device, dtype)


def along_axes(fields: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiplies each axis of fields (systems, components, ...) by the matrix of its component.

    Args:
        fields: As many points along each axis.
        matrices: Of each axis, (components, points, points): rows the modes.
    """
    shape = fields.shape
    for matrix in reversed(matrices):  # the last axis comes to the front, so that as many products restore the order
        fields = (matrix @ fields.flatten(2, -2).mT).view(shape)
    return fields
