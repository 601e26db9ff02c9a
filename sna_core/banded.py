"""Cholesky factorisations: of block tridiagonal systems, and of such as rounding leaves not quite positive."""

from __future__ import annotations

import torch
from torch import Tensor


def solve_banded(matrix: Tensor, right: Tensor, block_size: int) -> Tensor:
    r"""Solves A X = B by a Cholesky factorisation in blocks, where A is block tridiagonal.

    :math:`L_k L_k^T = A_{kk} - C_k C_k^T`, :math:`C_k = A_{k,k-1} L_{k-1}^{-T}`; then two substitutions. Costs
    O(n block_size^2) instead of O(n^3), by n / block_size steps one after the other.

    Args:
        matrix: A, (..., n, n), symmetric; blocks beyond those beside the diagonal are not read.
        right: B, (..., n, columns).
        block_size: Rows of a block, at least 1; the last may have fewer.

    Returns:
        X, (..., n, columns).

    Raises:
        torch.linalg.LinAlgError: If A is not positive definite.
    """
    starts = range(0, matrix.shape[-1], block_size)
    blocks = [slice(start, start + block_size) for start in starts]
    diagonal: list[Tensor] = []
    below: list[Tensor] = []
    solved: list[Tensor] = []
    for k, block in enumerate(blocks):
        here, rhs = matrix[..., block, block], right[..., block, :]
        if k:
            before = blocks[k - 1]
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


def factorise(matrices: Tensor) -> Tensor:
    """Lower Cholesky factors of (..., n, n); where rounding left a matrix not positive, of one with a lifted diagonal.

    Raises:
        ValueError: If a matrix is not positive definite by more than rounding.
    """
    factors, failed = torch.linalg.cholesky_ex(matrices)
    share, mean = 1e-15, matrices.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    while failed.any():
        share *= 10
        if share > 1e-4:
            raise ValueError(
                "the normal equations are too ill-conditioned to solve; lower smoothness or num_cells, or raise ridge."
            )
        lift = torch.where(failed.unsqueeze(-1) > 0, share * mean, 0.0).expand(matrices.shape[:-1])
        factors, failed = torch.linalg.cholesky_ex(matrices + lift.diag_embed())
    return factors
