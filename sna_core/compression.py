r"""A tensor train as a sum of separable terms: rounded, written out, and for three axes and more fitted by fewer terms.

.. math::
    \sum_{a_1 \dots a_{d-1}} W_1[1, n_1, a_1]\, W_2[a_1, n_2, a_2] \cdots W_d[a_{d-1}, n_d, 1]
    \approx \sum_{r=1}^{R} \prod_{i=1}^{d} w_i[n_i, r]

Written out, R is the product of the inner ranks. Fewer terms are fitted in orthonormal frames of the functions along
each axis (:mod:`sna_core.components`), more and more of them until the largest error at samples is small enough.

Shapes here: factors (n, terms) for each axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from sna_core.components import ComponentSolver, balanced, extended
from sna_core.forms import QuadraticForm, distance_to
from sna_core.network import pairwise_product
from sna_core.tensor_train import Train

ROUNDED = 0.4  # of the tolerance: the error of a train to which terms are fitted
NUM_CUTS = 16  # that a train is rounded at, each ``NEXT_CUT`` of the one before
NEXT_CUT = 0.6
PATIENCE = 10  # steps in which the distance has to fall to ``FALL`` of itself, or more terms are added
FALL = 0.8
GROWTH = 10  # terms are added one to so many
NUM_SWEEPS = 10  # of a new term
BLOCK = 512  # points that a train is evaluated at together


@dataclass(frozen=True)
class Samples:
    """Values that an approximation should have at points of the box.

    Attributes:
        tables: For each axis (points, n): what maps the entries along it to values at the points.
        values: (points,).
    """

    tables: Sequence[Tensor]
    values: Tensor

    def joined(self, other: Samples) -> Samples:
        """These and the others."""
        tables = [torch.cat(pair) for pair in zip(self.tables, other.tables, strict=True)]
        return Samples(tables, torch.cat([self.values, other.values]))

    def train_errors(self, train: Train) -> Tensor:
        """Errors of a train (points,)."""
        parts = zip(*(table.split(BLOCK) for table in self.tables), strict=True)
        return (self.values - torch.cat([chain(train.mapped(tables).cores) for tables in parts])).abs()

    def error(self, factors: Sequence[Tensor]) -> float:
        """Largest error of a sum of terms."""
        functions = torch.stack([table @ factor for table, factor in zip(self.tables, factors, strict=True)])
        return (self.values - pairwise_product(functions).sum(-1)).abs().max().item()


def chain(matrices: Sequence[Tensor]) -> Tensor:
    """The products of matrices (r, points, r'), the first with r = 1 and the last with r' = 1: (points,)."""
    row = matrices[0].new_ones(matrices[0].shape[1], 1)
    for matrix in matrices:
        row = torch.einsum("na,anb->nb", row, matrix)
    return row.squeeze(-1)


def terms_of_train(
    train: Train,
    samples: Samples,
    *,
    tolerance: float,
    goal: float,
    max_rank: int,
    start: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """The fewest terms found whose error at the samples is at most ``goal``.

    Args:
        train: The train.
        samples: What tells the error.
        tolerance: In the root of the sum of squares of the train's entries: the coarsest that is tried.
        goal: Of the error; the least that the train itself allows, where that is not below it.
        max_rank: At most so many terms.
        start: Factors of terms to improve first, where terms are fitted; fewer are not tried.
        generator: Of the first guesses of new terms.

    Returns:
        Factors (n, terms), of equal norms in each term, in the order of the terms' size.

    Raises:
        ValueError: If more terms than ``max_rank`` are needed; the message has the ranks, and the error of the fits.
    """
    several = len(train.cores) > 2
    norm, whole = train.norm(), train
    for k in range(NUM_CUTS):
        cut = tolerance * NEXT_CUT**k / norm
        train = whole.rounded(cut)
        if samples.train_errors(train).max() <= (ROUNDED if several else 1) * goal:
            break
    num_terms, fitted = prod(train.ranks), ""
    if several and num_terms > 1:
        frames, small = train.frames(cut)
        reduced = Samples([t @ frame for t, frame in zip(samples.tables, frames, strict=True)], samples.values)
        first = None if start is None else [f.mT @ factor for f, factor in zip(frames, start, strict=True)]
        factors = _fewer_terms(small, reduced, goal, min(max_rank, num_terms - 1), first, generator)
        error = reduced.error(factors)
        if error <= goal:
            return _ordered([frame @ factor for frame, factor in zip(frames, factors, strict=True)])
        fitted = f", and {factors[0].shape[1]} fitted ones are off by {error:.1e} where {goal:.1e} is asked for"
    factors = train.expanded(max_rank)
    if factors is None:
        raise ValueError(
            f"max_rank = {max_rank} terms are too few: the tensor train of ranks {train.ranks} has {num_terms}{fitted};"
            " raise max_rank or tolerance, or make the box smaller."
        )
    return _ordered(factors)


def _ordered(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same terms in the order of their size, each with factors of equal norms."""
    factors = balanced(factors)
    order = factors[0].norm(dim=0).argsort(descending=True)
    return [factor[:, order] for factor in factors]


class _Fit(ComponentSolver):
    """Of a train, with a distance that is exact however small it is."""

    form: QuadraticForm[Train]

    def value_of(self, factors: Sequence[Tensor]) -> float:
        """The squared distance."""
        return (self.form.right + -Train.of_components(factors)).norm() ** 2


def _fewer_terms(
    train: Train,
    samples: Samples,
    goal: float,
    max_rank: int,
    factors: Sequence[Tensor] | None,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """Fits more and more terms until they are within the goal or there are ``max_rank`` of them."""
    form = distance_to(train, [core.shape[1] for core in train.cores], train.norm() ** 2)
    if factors is None:
        # No fewer have functions that are independent along all axes.
        factors = [torch.zeros(size, 0, dtype=torch.float64) for size in form.sizes]
        for _ in range(min(max(form.sizes), max_rank)):
            factors = extended(form, factors, 1, generator, num_sweeps=NUM_SWEEPS)
    solver = _Fit(form, factors)
    while True:
        values = [solver.value()]
        while len(values) <= PATIENCE or values[-1] < FALL**2 * values[-1 - PATIENCE]:
            if samples.error(solver.factors) <= goal:
                return solver.factors
            solver.newton_step()
            values.append(solver.value())
        rank = solver.rank
        if rank == max_rank:
            return solver.factors
        for _ in range(min(max(1, rank // GROWTH), max_rank - rank)):
            solver.factors = extended(form, solver.factors, 1, generator, num_sweeps=NUM_SWEEPS)
