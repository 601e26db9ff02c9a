r"""A tensor train as a sum of separable terms: rounded, written out, and for three axes and more fitted by fewer terms.

.. math::
    \sum_{a_1 \dots a_{d-1}} W_1[1, n_1, a_1]\, W_2[a_1, n_2, a_2] \cdots W_d[a_{d-1}, n_d, 1]
    \approx \sum_{r=1}^{R} \prod_{i=1}^{d} w_i[n_i, r]

Written out, R is the product of the inner ranks. Fewer terms minimise the Frobenius norm of the difference by damped
Gauss-Newton steps in all factors at once, which pass the valleys in which alternation crawls (Sorber, Van Barel and De
Lathauwer, SIAM J. Optim. 23 (2013)). New terms start from alternating least squares on what the others leave. All this
is done in orthonormal frames of the functions along each axis; the full tensor is never formed.

Shapes here: cores (r, n, r') with r = 1 for the first and r' = 1 for the last; factors (n, terms) for each axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations_with_replacement
from math import prod

import torch
from torch import Tensor

from sna_core.network import pairwise_product, products_of_others

ROUNDED = 0.4  # of the tolerance: the error of a train to which terms are fitted
NUM_CUTS = 16  # that a train is rounded at, each ``NEXT_CUT`` of the one before
NEXT_CUT = 0.6
MAX_COEFFICIENTS = 2000  # of a fit
MAX_STEPS = 200  # of a fit
MAX_WORK = 60 * 10**9  # steps times the cube of the coefficients, which is what a step costs
CLOSE = 10  # the number of terms is found to one part in so many
SLOW = 0.01  # a fit whose residual falls by less in each of ``PATIENCE`` steps is given up
PATIENCE = 10
FIRST_DAMPING, LEAST_DAMPING = 1e-2, 1e-13
NUM_ALTERNATIONS = 10  # of a new term
BLOCK = 512  # points that a train is evaluated at together
TINY = torch.finfo(torch.float64).tiny


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

    def train_errors(self, cores: Sequence[Tensor]) -> Tensor:
        """Errors of a train (points,)."""
        parts = zip(*(table.split(BLOCK) for table in self.tables), strict=True)
        found = [
            chain([torch.einsum("anb,pn->apb", *pair) for pair in zip(cores, tables, strict=True)]) for tables in parts
        ]
        return (self.values - torch.cat(found)).abs()

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
    cores: Sequence[Tensor],
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
        cores: The train.
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
    d = len(cores)
    train_goal = goal if d < 3 else ROUNDED * goal
    for k in range(NUM_CUTS):
        cut = tolerance * NEXT_CUT**k
        train = rounded(cores, cut)
        if samples.train_errors(train).max() <= train_goal:
            break
    num_terms = prod(core.shape[-1] for core in train)
    if d > 2 and num_terms > 1:
        frames, small = _in_frames(train, cut)
        tables = [table @ frame for table, frame in zip(samples.tables, frames, strict=True)]
        if start is not None:
            start = [frame.mT @ factor for frame, factor in zip(frames, start, strict=True)]
        small_samples, most = Samples(tables, samples.values), min(max_rank, num_terms - 1)
        factors = _fewer_terms(small, small_samples, goal, most, start, generator)
        error = small_samples.error(factors)
        if error <= goal:
            return balanced([frame @ factor for frame, factor in zip(frames, factors, strict=True)])
        fitted = f", and {factors[0].shape[1]} fitted ones are off by {error:.1e} where {goal:.1e} is asked for"
    else:
        fitted = ""
    if num_terms > max_rank:
        ranks = [core.shape[-1] for core in train[:-1]]
        raise ValueError(
            f"max_rank = {max_rank} terms are too few: the tensor train of ranks {ranks} has {num_terms}{fitted}; "
            "raise max_rank or tolerance, or make the box smaller."
        )
    return balanced(_written_out(train))


def rounded(cores: Sequence[Tensor], cut: float) -> list[Tensor]:
    """A train of least ranks within ``cut`` in the Frobenius norm, whose cores but the last have orthonormal columns.

    Oseledets, SIAM J. Sci. Comput. 33 (2011), algorithm 2.
    """
    cores, d = list(cores), len(cores)
    for k in range(d - 1, 0, -1):
        _move_left(cores, k)
    for k in range(d - 1):
        left, sizes, right = torch.linalg.svd(cores[k].flatten(0, 1), full_matrices=False)
        rank = _num_kept(sizes, cut / (d - 1) ** 0.5)
        cores[k] = left[:, :rank].reshape(*cores[k].shape[:2], rank)
        cores[k + 1] = torch.einsum("ab,bnc->anc", sizes[:rank, None] * right[:rank], cores[k + 1])
    return cores


def _move_left(cores: list[Tensor], k: int) -> None:
    """Gives core k orthonormal rows, and what that takes to core k - 1."""
    q, r = torch.linalg.qr(cores[k].flatten(1).mT)
    cores[k] = q.mT.reshape(-1, *cores[k].shape[1:])
    cores[k - 1] = cores[k - 1] @ r.mT


def _num_kept(sizes: Tensor, cut: float) -> int:
    """How many singular values to keep, at least one, so that the norm of the others is at most ``cut``."""
    left_out = sizes.square().flip(0).cumsum(0).sqrt()
    return max(1, int((left_out > cut).sum()))


def _in_frames(cores: Sequence[Tensor], cut: float) -> tuple[list[Tensor], list[Tensor]]:
    """Orthonormal frames (n, m) of the functions along each axis, and the train (r, m, r') in them.

    For a train that :func:`rounded` made: from the last axis to the first, so that each core in turn has all of the
    norm.
    """
    cores, frames, d = list(cores), [], len(cores)
    for k in range(d - 1, -1, -1):
        frame, sizes, _ = torch.linalg.svd(cores[k].movedim(1, 0).flatten(1), full_matrices=False)
        frames.append(frame[:, : _num_kept(sizes, cut / d**0.5)])
        cores[k] = torch.einsum("anb,nm->amb", cores[k], frames[-1])
        if k:
            _move_left(cores, k)
    return frames[::-1], cores


def _written_out(cores: Sequence[Tensor]) -> list[Tensor]:
    """A term for each combination of the inner indices."""
    ranks = [torch.arange(core.shape[-1]) for core in cores]
    after = torch.cartesian_prod(*ranks).view(-1, len(cores))  # (terms, d)
    before = after.roll(1, 1)  # the last index is 0, as is the one before the first
    return [core[before[:, k], :, after[:, k]].mT for k, core in enumerate(cores)]


def balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same terms in the order of their size, each with factors of equal norms."""
    norms = torch.stack([factor.norm(dim=0) for factor in factors]).clamp_min(TINY)
    size = norms.log().mean(0).exp()
    order = size.argsort(descending=True)
    return [(factor * (size / norm))[:, order] for factor, norm in zip(factors, norms, strict=True)]


def _fewer_terms(
    cores: Sequence[Tensor],
    samples: Samples,
    goal: float,
    max_rank: int,
    start: Sequence[Tensor] | None,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """The fewest terms that a fit brings within the goal, or where none does the most that were fitted.

    Their number grows by halves, then is bisected. Each fit adds new terms to the largest that did not suffice.
    """
    sizes = [core.shape[1] for core in cores]
    limit = min(max_rank, MAX_COEFFICIENTS // sum(sizes))
    nothing = [torch.zeros(n, 0, dtype=torch.float64) for n in sizes]
    independent = max(sizes)  # terms of a sum whose functions are independent along some axis: these can be unique
    if start is None:
        fitted, too_few, rank = nothing, 0, min((independent + 1) // 2, limit)
    else:
        fitted, too_few, rank = start, start[0].shape[1] - 1, start[0].shape[1]
    found, enough = None, limit + 1
    while too_few < rank < enough and enough - too_few > enough // CLOSE:
        fits = []
        for first in [fitted, nothing] if rank == independent else [fitted]:
            factors = _fit(cores, _grown(cores, first, rank - first[0].shape[1], generator), samples, goal)
            fits.append((samples.error(factors), factors))
            if fits[-1][0] <= goal:
                break
        error, factors = min(fits, key=lambda fit: fit[0])
        if error <= goal:
            found, enough = factors, rank
        else:
            fitted, too_few = factors, rank
        if found is not None:
            rank = (too_few + enough) // 2
        else:
            rank = min(independent if rank < independent else rank + (rank + 1) // 2, limit)
    return fitted if found is None else found


def _contractions(cores: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """For each axis inner products (m, terms) of the train with the terms, that axis's factors left out."""
    one = factors[0].new_ones(1, factors[0].shape[1])
    before, behind, found = [one], one, []
    for core, factor in zip(cores[:-1], factors[:-1], strict=True):
        before.append((core.movedim(0, -1) @ before[-1] * factor.unsqueeze(1)).sum(0))  # (r', terms)
    for core, factor, left in zip(cores[::-1], factors[::-1], before[::-1], strict=True):
        right = core @ behind  # (r, m, terms)
        found.append((right * left.unsqueeze(1)).sum(0))
        behind = (right * factor).sum(1)
    return found[::-1]


def _grown(
    cores: Sequence[Tensor], factors: Sequence[Tensor], number: int, generator: torch.Generator | None
) -> list[Tensor]:
    """Adds terms one after the other, each fitted by alternating least squares to what those before it leave."""
    factors = list(factors)
    for _ in range(number):
        term = [torch.randn(core.shape[1], 1, dtype=torch.float64, generator=generator) for core in cores]
        term = [factor / factor.norm() for factor in term]
        for _ in range(NUM_ALTERNATIONS):
            for i in range(len(cores)):
                overlaps = torch.stack([factor.mT @ new for factor, new in zip(factors, term, strict=True)])
                right = _contractions(cores, term)[i] - factors[i] @ products_of_others(overlaps)[i]
                size = right.norm().clamp_min(TINY)
                term[i] = right / size
        term[-1] = term[-1] * size
        factors = [torch.cat([factor, new], 1) for factor, new in zip(factors, term, strict=True)]
    return factors


def _fit(cores: Sequence[Tensor], factors: Sequence[Tensor], samples: Samples, goal: float) -> list[Tensor]:
    """Gauss-Newton steps from these factors, until the error is within the goal or falls slowly.

    Levenberg-Marquardt (Nocedal and Wright, Numerical Optimization, 2nd ed., section 10.3), with a damping in
    proportion to each term's own size, so that none has to be scaled.
    """
    factors = balanced(factors)
    distance, damping, num_slow = _distance(cores, factors), FIRST_DAMPING, 0
    num_coefficients = sum(factor.numel() for factor in factors)
    for _ in range(min(MAX_STEPS, MAX_WORK // num_coefficients**3)):
        if num_slow == PATIENCE or samples.error(factors) <= goal:
            break
        matrix, right = _gauss_newton(cores, factors)
        scale = matrix.diagonal().clamp_min(TINY)
        while damping < 1e6:
            lower, failed = torch.linalg.cholesky_ex(matrix + (damping * scale).diag())
            if not failed:
                step = torch.cholesky_solve(right, lower).split([factor.numel() for factor in factors])
                steps = (part.view_as(factor) for part, factor in zip(step, factors, strict=True))
                moved = balanced([factor + part for factor, part in zip(factors, steps, strict=True)])
                if (closer := _distance(cores, moved)) < distance:
                    break
            damping *= 4
        else:
            break
        num_slow = num_slow + 1 if closer > (1 - SLOW) * distance else 0
        factors, distance, damping = moved, closer, max(damping / 6, LEAST_DAMPING)
    return factors


def _gauss_newton(cores: Sequence[Tensor], factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """J^T J up to its diagonal, and J^T (train - terms), for J the derivative of the terms in all factors.

    Coefficients are in the order (axis, m, term).
    """
    grams = torch.stack([factor.mT @ factor for factor in factors])  # (d, terms, terms)
    others = products_of_others(grams)
    parts = zip(_contractions(cores, factors), factors, others, strict=True)
    right = torch.cat([(inner - factor @ other).flatten() for inner, factor, other in parts]).unsqueeze(-1)
    matrix = right.new_zeros(len(right), len(right))
    starts = [0, *accumulate(factor.numel() for factor in factors)]
    for i, k in combinations_with_replacement(range(len(factors)), 2):
        if i == k:  # row (m, r), column (n, s): the tangents of term r along axis k and of term s along axis i
            block = torch.eye(len(factors[i]), dtype=torch.float64)[:, None, :, None] * others[i].unsqueeze(1)
        else:
            rest = pairwise_product(torch.stack([g for j, g in enumerate(grams) if j not in (i, k)]))
            block = factors[k][:, None, None] * (factors[i].mT.unsqueeze(-1) * rest.unsqueeze(1))
        matrix[starts[k] : starts[k + 1], starts[i] : starts[i + 1]] = block.flatten(2).flatten(0, 1)
    return matrix, right


def _distance(cores: Sequence[Tensor], factors: Sequence[Tensor]) -> float:
    """Frobenius norm of the train less the terms, as one train and by orthogonal factors: what is small stays exact."""
    carry = torch.ones(1, 1, dtype=torch.float64)
    last, rank = len(cores) - 1, factors[0].shape[1]
    for k, (core, factor) in enumerate(zip(cores, factors, strict=True)):
        r, m, s = core.shape
        both = core.new_zeros(r + rank, m, s + rank)
        both[:r, :, :s] = core
        both[r:, :, s:] = factor.mT.unsqueeze(-1) * torch.eye(rank).unsqueeze(1)
        if k == 0:
            both = torch.cat([both[:r, :, :s], -both[r:, :, s:].sum(0, keepdim=True)], -1)
        if k == last:
            both = torch.cat([both[:r, :, :s], both[r:, :, s:].sum(-1, keepdim=True)])
        carry = torch.linalg.qr(torch.einsum("ab,bmc->amc", carry, both).flatten(0, 1), mode="r").R
    return carry.norm().item()
