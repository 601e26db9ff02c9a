"""The order of axes in which a function's tensor train is smallest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import combinations

import torch
from torch import Tensor

SIGNIFICANT = 1e-3  # singular values above this fraction of the largest count for a rank


def best_order(factors: Sequence[Tensor]) -> list[int]:
    r"""Axes in the order of the least :math:`\sum_k r_{k-1} n_k r_k`, for a sum of products in orthonormal bases.

    A train's rank between two axes is that of the function as a matrix whose rows are all axes before. It depends on
    which axes these are, not on their order, so that shortest paths over all sets of axes find the best of all orders
    (M. Held and R. M. Karp, J. SIAM 10 (1962)).

    Args:
        factors: (n_i, rank) for each axis.

    Returns:
        The axes, the first of a train first.
    """
    num_axes = len(factors)
    grams = [factor.mT @ factor for factor in factors]
    everything = frozenset(range(num_axes))
    rank = {frozenset(): 1, everything: 1}
    best: dict[frozenset[int], tuple[float, list[int]]] = {frozenset(): (0.0, [])}
    for size in range(1, num_axes + 1):
        for chosen in map(frozenset, combinations(range(num_axes), size)):
            if chosen not in rank:
                rank[chosen] = rank[everything - chosen] = _rank(grams, chosen, everything - chosen)
            best[chosen] = min(
                (cost + rank[before] * len(factors[last]) * rank[chosen], [*order, last])
                for last in sorted(chosen)
                for before in [chosen - {last}]
                for cost, order in [best[before]]
            )
    return best[everything][1]


def _rank(grams: Sequence[Tensor], rows: frozenset[int], columns: frozenset[int]) -> int:
    """Of the matrix whose rows are some of the axes, from the products of the components' factors."""
    of_rows, of_columns = (reduce(torch.mul, (grams[i] for i in axes)) for axes in (rows, columns))
    values, vectors = torch.linalg.eigh(of_rows)
    root = vectors * values.clamp(min=0).sqrt()
    squares = torch.linalg.eigvalsh(root.mT @ of_columns @ root)
    return max(1, int((squares > SIGNIFICANT**2 * squares[-1]).sum()))
