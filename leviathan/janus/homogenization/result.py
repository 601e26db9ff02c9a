"""What homogenisations take and return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leviathan.janus.cells import check_symmetry, symmetrise

ROUNDING = 1e-3  # largest change of a cubic phase under permutations of the axes that may be left


@dataclass(frozen=True, eq=False)
class Homogenized:
    """The effective property of each cell.

    Attributes:
        tensor: (cells, d, d); stiffness in Voigt's notation, (cells, 6, 6), in 2-D (cells, 3, 3). Differentiable in the
            phase. Entries whose loads were left out are NaN.
        converged: Whether ``residual`` is within the tolerance, (cells,).
        residual: Relative equilibrium residual, the largest of the loads, (cells,).
        num_iterations: Of the slowest system.
        discretisation: Its name: values of different ones differ at the same resolution.
    """

    tensor: Tensor
    converged: Tensor
    residual: Tensor
    num_iterations: int
    discretisation: str


def check_phase(phase: Tensor, symmetry: str, dims: tuple[int, ...] = (2, 3)) -> Tensor:
    """The phase as floating-point numbers; a ``ValueError`` unless these are cells as :class:`Homogenized` needs them.

    Args:
        phase: Share of solid in each voxel, from 0 to 1, (cells, n, ...): whole cells, or orthants of such as mirror
            planes continue.
        symmetry: ``"none"``, ``"mirror"`` or ``"cubic"``.
        dims: Axes of space that are allowed.
    """
    check_symmetry(symmetry)
    shape = tuple(phase.shape)
    if len(shape) - 1 not in dims or len(set(shape[1:])) != 1 or shape[-1] < 2 or not shape[0]:
        expected = " or ".join("(cells" + ", n" * d + ")" for d in dims)
        raise ValueError(f"phase has shape {shape}; expected {expected}, all edges of n >= 2 voxels.")
    phase = phase if phase.is_floating_point() else phase.float()
    low, high = (float(end) for end in phase.detach().aminmax())
    if not 0 <= low <= high <= 1:  # also NaN
        raise ValueError(f"phase runs from {low:g} to {high:g}; expected shares of solid from 0 to 1.")
    if phase.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"phase is {phase.dtype}; expected float32 or float64.")
    if ((phase.detach() - symmetrise(phase.detach(), symmetry)).abs() > ROUNDING).any():
        raise ValueError("phase changes under permutations of the axes; expected symmetry = 'mirror', or cubic cells.")
    return phase
