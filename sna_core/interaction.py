r"""The interaction object: which inputs of a separable network act together, and how strongly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import isfinite

import torch
from torch import Tensor

Subset = tuple[int, ...]
MAX_NUMEL = 2**27  # entries of a dense embedding: one GiB in float64


@dataclass(frozen=True, init=False)
class InteractionObject:
    r"""Coefficients :math:`c_S` of subsets S of the inputs (arXiv 2603.12244, "Foundational constituents").

    A separable network is :math:`\rho(\sum_S c_S \phi_S(x_S))` over the subsets named here. Their largest size is the
    interaction order k.

    The canonical embedding puts :math:`c_S` of :math:`S = \{s_1 < \dots < s_m\}` at the entry
    :math:`(s_1, \dots, s_m, s_m, \dots, s_m)` of a tensor whose sides are d: the sorted inputs, the last one repeated.
    The subset is the set of an entry's indices, so that the embedding is one-to-one, and the tensor is k-sparse: no
    entry with more than k distinct indices is non-zero. The paper's tensor has order d; any order from k on will do,
    and for k = 2 the order 2 gives the matrix of pairs.

    Args:
        num_inputs: d; inputs count from 0.
        coefficients: :math:`c_S`, not zero, of each subset: a mapping, or pairs. They are kept sorted by size, then by
            inputs.

    Raises:
        ValueError: If no subset is given, a subset is empty, not sorted, given twice or names an input that is not
            there, or a coefficient is zero or not finite.

    ```python
    >>> from sna_core.interaction import InteractionObject

    >>> InteractionObject(3, {(0,): 1.0, (1, 2): -2.0}).interaction_order
    2
    ```
    """

    num_inputs: int
    coefficients: tuple[tuple[Subset, float], ...]

    def __init__(self, num_inputs: int, coefficients: Mapping[Subset, float] | Iterable[tuple[Subset, float]]):
        if not isinstance(num_inputs, int) or num_inputs < 1:
            raise ValueError(f"num_inputs = {num_inputs!r}; expected an integer of at least 1.")
        object.__setattr__(self, "num_inputs", num_inputs)
        given = coefficients.items() if isinstance(coefficients, Mapping) else coefficients
        terms = sorted(((tuple(subset), c) for subset, c in given), key=lambda term: (len(term[0]), term[0]))
        if not terms:
            raise ValueError("the interaction object has no subset; give at least one, e.g. {(0,): 1.0}.")
        for subset, c in terms:
            self._check(subset, c)
        for (subset, _), (other, _) in pairwise(terms):
            if subset == other:
                raise ValueError(f"subset {subset} is given twice; add up its coefficients.")
        object.__setattr__(self, "coefficients", tuple((subset, float(c)) for subset, c in terms))

    def _check(self, subset: Subset, c: float) -> None:
        if not subset:
            raise ValueError("a subset is empty; every basis of one input contains the constants, so leave it out.")
        for i in subset:
            if not isinstance(i, int) or not 0 <= i < self.num_inputs:
                raise ValueError(
                    f"subset {subset} names input {i!r}; expected integers from 0 to {self.num_inputs - 1}, the inputs."
                )
        if list(subset) != sorted(set(subset)):
            raise ValueError(
                f"subset {subset} is not sorted or repeats an input; expected {tuple(sorted(set(subset)))}."
            )
        if not isfinite(c) or c == 0:
            raise ValueError(f"subset {subset} has the coefficient {c}; expected a finite number that is not zero.")

    @property
    def subsets(self) -> tuple[Subset, ...]:
        """The subsets, by size, then by inputs."""
        return tuple(subset for subset, _ in self.coefficients)

    @property
    def interaction_order(self) -> int:
        """k, the size of the largest subset."""
        return len(self.coefficients[-1][0])

    def tensor(self, order: int | None = None, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """The canonical embedding, a tensor of ``order`` sides d; None is the paper's order d.

        Raises:
            ValueError: If the order is below the interaction order, or the tensor would be too large to be written out.
        """
        indices = self._indices(order)
        order = len(indices[0])
        if self.num_inputs**order > MAX_NUMEL:
            raise ValueError(
                f"the tensor has {self.num_inputs}^{order} entries; ask for a lower order, down to order = "
                f"{self.interaction_order}."
            )
        tensor = torch.zeros((self.num_inputs,) * order, dtype=dtype)
        for index, (_, c) in zip(indices, self.coefficients, strict=True):
            tensor[index] = c
        return tensor

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> InteractionObject:
        """The inverse of :meth:`tensor`.

        Raises:
            ValueError: If the sides differ, or an entry that is not zero is at no subset's place.
        """
        if tensor.ndim < 1 or len(set(tensor.shape)) > 1:
            raise ValueError(f"the tensor has shape {tuple(tensor.shape)}; expected equal sides, one for each input.")
        coefficients = {}
        for index in map(tuple, tensor.nonzero().tolist()):
            subset = tuple(sorted(set(index)))
            if index != _padded(subset, tensor.ndim):
                raise ValueError(
                    f"entry {index} is not zero; inputs {subset} have their coefficient at "
                    f"{_padded(subset, tensor.ndim)}, and every other entry of theirs is zero."
                )
            coefficients[subset] = tensor[index].item()
        return cls(tensor.shape[0], coefficients)

    def rank_bound(self, order: int | None = None) -> int:
        """An upper bound on the canonical rank of :meth:`tensor`, without writing it out.

        A tensor is the sum of its fibres along one direction, each of which has rank one. The bound is the smallest
        number of non-zero fibres over all directions, which never exceeds the number of subsets; for matrices it is the
        number of non-zero rows or columns.

        Raises:
            ValueError: If the order is below the interaction order.
        """
        indices = self._indices(order)
        return min(len({index[:a] + index[a + 1 :] for index in indices}) for a in range(len(indices[0])))

    def check_rank(self, rank: int, order: int | None = None) -> None:
        """Raises a ``ValueError`` unless :meth:`rank_bound` shows the tensor to have at most this rank."""
        bound = self.rank_bound(order)
        if bound > rank:
            raise ValueError(
                f"the interaction tensor's rank is bounded by {bound}, above rank = {rank}; raise the rank or leave "
                "out subsets."
            )

    def _indices(self, order: int | None) -> list[Subset]:
        order = self.num_inputs if order is None else order
        if not isinstance(order, int) or order < self.interaction_order:
            raise ValueError(f"order = {order!r}; expected at least {self.interaction_order}, the interaction order.")
        return [_padded(subset, order) for subset, _ in self.coefficients]

    @classmethod
    def up_to(cls, num_inputs: int, interaction_order: int) -> InteractionObject:
        """Every subset of 1 to ``interaction_order`` inputs, with the coefficient one.

        Raises:
            ValueError: If the order is not from 1 to ``num_inputs``.
        """
        if not isinstance(interaction_order, int) or not 1 <= interaction_order <= num_inputs:
            raise ValueError(
                f"interaction_order = {interaction_order!r}; expected an integer from 1 to num_inputs = {num_inputs}."
            )
        sizes = range(1, interaction_order + 1)
        return cls(num_inputs, {subset: 1.0 for m in sizes for subset in combinations(range(num_inputs), m)})

    @classmethod
    def additive(cls, num_inputs: int) -> InteractionObject:
        """Every input by itself (k = 1): generalised additive models."""
        return cls.up_to(num_inputs, 1)

    @classmethod
    def pairwise(cls, num_inputs: int) -> InteractionObject:
        """Every input and every pair (k = 2): generalised quadratic models. A single input has no pair."""
        return cls.up_to(num_inputs, min(2, num_inputs))

    @classmethod
    def full(cls, num_inputs: int) -> InteractionObject:
        """All inputs together, S = [d] alone (k = d): the tensorised classes."""
        return cls(num_inputs, {tuple(range(num_inputs)): 1.0})


def _padded(subset: Subset, order: int) -> Subset:
    return subset + subset[-1:] * (order - len(subset))
