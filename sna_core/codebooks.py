"""Codebooks of digits: their sum, and the least-squares fit of it to factors of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sum_codebooks(codebooks: Tensor, digits: Tensor) -> Tensor:
    r"""The sum :math:`\sum_q C_q[d_q]` of the rows that digits choose: (k, base, d), (..., k) -> (..., d)."""
    num_digits, base = codebooks.shape[:2]
    rows = digits + base * torch.arange(num_digits, device=digits.device)
    return F.embedding(rows, codebooks.flatten(0, 1)).sum(-2)


@torch.no_grad()
def fit_codebooks(
    digits: Tensor, factors: Tensor, base: int, weights: Tensor | None = None, num_iterations: int = 100
) -> Tensor:
    r"""Codebooks whose sum is nearest to the tokens' factors: (V, k), (V, d), (V,) -> (k, base, d).

    Minimises

    .. math::
        \sum_v w_v \Big\| F_v - \sum_q C_q[d_q(v)] \Big\|^2

    by backfitting: in turn, every row of a codebook takes over the mean residual of the tokens with its digit. At the
    least value those means vanish; the iteration ends once they do to within rounding. With one digit, or with tokens
    that fill the grid of two or more digits evenly, it is there after one round.

    Additive models are told apart only up to constants moved from one codebook to another: all means are in the first.
    Digits that no token (of positive weight) has are zero.

    Source: backfitting is Buja, Hastie and Tibshirani 1989.

    Args:
        digits: Integers in [0, base), (V, k).
        factors: Floating-point factors of the tokens, (V, d).
        base: Base of the digits.
        weights: Weights of the tokens, at least zero, (V,). None is one for each.
        num_iterations: Most rounds over the codebooks.

    Returns:
        Codebooks in the factors' dtype, (k, base, d).

    Raises:
        ValueError: If shapes do not match, a digit lies outside the base, factors or weights are not finite, or weights
            are negative or all zero.
    """
    _check_digits(digits, base)
    check_factors(factors, len(digits), weights)
    num_digits, dim = digits.shape[1], factors.shape[1]
    weights = factors.new_ones(len(factors)) if weights is None else weights.to(factors)
    columns = digits.long().unbind(-1)
    totals = [factors.new_zeros(base).index_add_(0, column, weights) for column in columns]
    codebooks, residual = factors.new_zeros(num_digits, base, dim), factors.clone()
    least = 100 * torch.finfo(factors.dtype).eps * factors.abs().max()
    for _ in range(num_iterations):
        largest = factors.new_zeros(())
        for codebook, column, total in zip(codebooks, columns, totals, strict=True):
            sums = torch.zeros_like(codebook).index_add_(0, column, residual * weights.unsqueeze(-1))
            means = sums / total.where(total > 0, 1).unsqueeze(-1)  # where there is no weight, the sum is zero
            codebook += means
            residual -= means[column]
            largest = torch.maximum(largest, means.abs().max())
        if largest <= least:
            break
    return codebooks


def check_factors(factors: Tensor, num_tokens: int, weights: Tensor | None = None) -> None:
    """Raises a ValueError unless factors are finite numbers (num_tokens, d) and weights such of at least zero."""
    if factors.dim() != 2 or not factors.is_floating_point() or len(factors) != num_tokens or factors.numel() == 0:
        raise ValueError(
            f"factors have shape {tuple(factors.shape)} and dtype {factors.dtype}; expected floating-point numbers of "
            f"shape (tokens = {num_tokens}, at least 1)."
        )
    if (wrong := ~factors.isfinite().all(-1)).any():
        token = int(wrong.nonzero()[0])
        raise ValueError(f"the factors of token {token} are not finite; replace them, or give the token zeros.")
    if weights is None:
        return
    if weights.shape != (num_tokens,):
        raise ValueError(f"weights have shape {tuple(weights.shape)}; expected one for each of {num_tokens} tokens.")
    if (wrong := ~(weights.isfinite() & (weights >= 0))).any():
        token = int(wrong.nonzero()[0])
        raise ValueError(f"the weight of token {token} is {float(weights[token])}; expected a number of at least 0.")
    if not weights.any():
        raise ValueError("all weights are zero; at least one token must count.")


def _check_digits(digits: Tensor, base: int) -> None:
    if digits.dim() != 2 or digits.is_floating_point() or digits.is_complex() or digits.dtype == torch.bool:
        raise ValueError(
            f"digits have shape {tuple(digits.shape)} and dtype {digits.dtype}; expected integers (tokens, num_digits)."
        )
    if digits.numel() == 0:
        raise ValueError(f"digits have shape {tuple(digits.shape)}; expected at least one token and one digit.")
    if (outside := (digits < 0) | (digits >= base)).any():
        raise ValueError(f"digit {int(digits[outside][0])} lies outside [0, base = {base}).")


__all__ = ["check_factors", "fit_codebooks", "sum_codebooks"]
