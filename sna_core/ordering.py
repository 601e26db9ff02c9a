"""The order of axes in which a function's tensor train is smallest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import prod

import torch
from torch import Tensor


def best_order(values: Tensor, sizes: Sequence[int], tolerance: float) -> list[int]:
    r"""Axes in the order of the least :math:`\sum_k r_{k-1} n_k r_k`.

    A train's rank between two axes is that of the function as a matrix whose rows are all axes before. It depends on
    which axes these are, not on their order, so that shortest paths over all sets of axes find the best of all orders
    (M. Held and R. M. Karp, J. SIAM 10 (1962)).

    Args:
        values: The function in few orthonormal functions of each axis, a dimension for each.
        sizes: n, the number of functions of each axis that a core of the train will have.
        tolerance: Of the train, as a fraction of the norm.

    Returns:
        The axes, the first of a train first.
    """
    num_axes = values.ndim
    share = tolerance / max(1, num_axes - 1) ** 0.5
    everything = frozenset(range(num_axes))
    rank = {frozenset(): 1, everything: 1}
    best: dict[frozenset[int], tuple[float, list[int]]] = {frozenset(): (0.0, [])}
    for size in range(1, num_axes + 1):
        for chosen in map(frozenset, combinations(range(num_axes), size)):
            if chosen not in rank:
                rank[chosen] = rank[everything - chosen] = _rank(values, chosen, share)
            best[chosen] = min(
                (cost + rank[before] * sizes[last] * rank[chosen], [*order, last])
                for last in sorted(chosen)
                for before in [chosen - {last}]
                for cost, order in [best[before]]
            )
    return best[everything][1]


def _rank(values: Tensor, rows: frozenset[int], tolerance: float) -> int:
    """Of the matrix whose rows are some of the axes."""
    columns = [i for i in range(values.ndim) if i not in rows]
    matrix = values.permute(*sorted(rows), *columns).reshape(prod(values.shape[i] for i in rows), -1)
    tail = torch.linalg.svdvals(matrix).square().flip(0).cumsum(0)  # the smallest first
    return max(1, int((tail > tolerance**2 * tail[-1]).sum()))
