"""Symmetric positive definite systems that couple a basis function with its next few alone: block by block."""

from __future__ import annotations

import torch
from torch import Tensor


def solve_banded(matrix: Tensor, right: Tensor, half_width: int) -> Tensor:
    r"""Solves A X = B by a block Cholesky factorisation that touches the band alone.

    Rows are grouped into blocks of ``half_width``, so that A is block tridiagonal:
    :math:`L_k L_k^T = A_{kk} - C_k C_k^T`, :math:`C_k = A_{k,k-1} L_{k-1}^{-T}`; then two substitutions. Costs
    O(n half_width^2) instead of O(n^3), by n / half_width steps one after the other.

    Args:
        matrix: A, (..., n, n), symmetric; only the band \|row - column\| <= ``half_width`` is read.
        right: B, (..., n, columns).
        half_width: At least 1.

    Returns:
        X, (..., n, columns).

    Raises:
        torch.linalg.LinAlgError: If A is not positive definite.
    """
    starts = range(0, matrix.shape[-1], half_width)
    blocks = [slice(start, start + half_width) for start in starts]
    diagonal, below, solved = [], [], []
    for k, block in enumerate(blocks):
        here, rhs = matrix[..., block, block], right[..., block, :]
        if k:
            before = blocks[k - 1]
            # A_{k,k-1} is upper triangular up to its own band; what lies outside of the band is zero.
            coupling = torch.linalg.solve_triangular(diagonal[-1], matrix[..., before, block], upper=False).mT
            here = here - coupling @ coupling.mT
            rhs = rhs - coupling @ solved[-1]
            below.append(coupling)
        factor = torch.linalg.cholesky(here)
        diagonal.append(factor)
        solved.append(torch.linalg.solve_triangular(factor, rhs, upper=False))
    parts = [torch.linalg.solve_triangular(diagonal[-1].mT, solved[-1], upper=True)]
    for factor, coupling, rhs in zip(diagonal[-2::-1], below[::-1], solved[-2::-1], strict=True):
        parts.append(torch.linalg.solve_triangular(factor.mT, rhs - coupling.mT @ parts[-1], upper=True))
    return torch.cat(parts[::-1], -2)
