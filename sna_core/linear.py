"""Solves a discretised linear problem in a tensor train: the order of axes, the ranks and when to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from sna_core.assembly import Residual
from sna_core.components import grow
from sna_core.forms import QuadraticForm, distance_to
from sna_core.network import products_of_others
from sna_core.ordering import best_order
from sna_core.tensor_train import Train, TrainSolver

CUTS = [10.0**-n for n in range(2, 13)]  # of the train, as fractions of its norm, one after the other
SWEEPS_PER_CUT = 2
SETTLED = 1e-3  # relative fall of the residual from one cut to the next, below which more rank does not help:
# squared errors add up, so that the solution is then within a twentieth of the residual of the best in these spaces
SURE_FROM = 1e-3  # cuts that are coarser tell nothing about that
SCOUT_CUT, SCOUT_RANK, SCOUT_STEPS = 3e-2, 16, 5  # the rough solution that the order of axes is chosen from
MAX_ORDERED_AXES = 10
SINGULAR = 1e-13  # smallest quotient of the form, as a fraction of its largest, that is more than rounding

Observer = Callable[[str, float], None]


@dataclass(frozen=True)
class LinearSolution:
    """A train in the trial bases.

    Attributes:
        train: Its cores.
        order: The axis of each core.
        cut: Fraction of the norm that was cut off last.
        residual: Relative, after each sweep.
        stopped_by: ``"tolerance"``, ``"stagnation"``, ``"rank"`` or ``"max_sweeps"``.
    """

    train: Train
    order: list[int]
    cut: float
    residual: list[float]
    stopped_by: str

    def in_problem_order(self, by_core: Sequence[Tensor]) -> list[Tensor]:
        """What belongs to each core, in the order of the problem's axes."""
        return [by_core[self.order.index(axis)] for axis in range(len(self.order))]


def solve_linear(
    form: QuadraticForm,
    residual: Residual,
    start: LinearSolution | None = None,
    *,
    tolerance: float,
    max_rank: int,
    max_sweeps: int,
    generator: torch.Generator,
    on_step: Observer,
) -> LinearSolution:
    """Tightens the cut of the ranks until the residual meets the tolerance, or no longer falls.

    Args:
        form: What is minimised.
        residual: What is reported.
        start: A solution of a similar problem.
        tolerance: Relative residual at which to stop.
        max_rank: Of the train.
        max_sweeps: At most so many.
        generator: Of the random start.
        on_step: Called after each sweep.
    """
    order, train = (start.order, start.train) if start else _start(form, residual, generator, on_step)
    solver = TrainSolver(form.permuted(order), train)
    history, before, ranks = [], inf, []
    for cut in CUTS if start is None else [cut for cut in CUTS if cut < SURE_FROM]:
        for _ in range(SWEEPS_PER_CUT):
            change = solver.sweep(cut, max_rank)
            history.append(residual.of_train(solver.cores, order))
            on_step(f"train of rank {solver.train.max_rank}", history[-1])
            if change <= cut:
                break
        if history[-1] <= tolerance:
            return LinearSolution(solver.train, order, cut, history, "tolerance")
        # A finer cut that leaves the ranks as they are tells nothing, unless they may not grow.
        full = solver.train.max_rank >= max_rank
        told = full or cut == CUTS[-1] or solver.train.ranks != ranks
        settled = told and before - history[-1] <= SETTLED * before
        before, ranks = history[-1], solver.train.ranks
        if settled and cut <= SURE_FROM:
            return LinearSolution(solver.train, order, cut, history, "rank" if full else "stagnation")
        if len(history) >= max_sweeps:
            break
    return LinearSolution(solver.train, order, cut, history, "max_sweeps")


def _start(
    form: QuadraticForm, residual: Residual, generator: torch.Generator, on_step: Observer
) -> tuple[list[int], Train]:
    """The best order of axes, and a rough solution in it."""
    order = list(range(len(form.sizes)))
    factors = [torch.randn(size, 2, generator=generator, dtype=torch.float64) for size in form.sizes]
    train = Train.of_components([factor / factor.norm(dim=0) for factor in factors])
    if not 3 <= len(order) <= MAX_ORDERED_AXES:
        return order, train
    solver = TrainSolver(form, train)
    for _ in range(2):
        solver.sweep(SCOUT_CUT, SCOUT_RANK)
    on_step("order of axes", residual.of_train(solver.cores, order))
    rough = distance_to(solver.train, form.sizes, solver.train.norm() ** 2)
    factors = grow(rough, SCOUT_RANK, num_newton_steps=SCOUT_STEPS, tolerance=SCOUT_CUT, generator=generator)
    order = best_order(factors)
    return order, Train.of_components([factors[i] for i in order]).rounded(SCOUT_CUT)


def check_determined(form: QuadraticForm, names: Sequence[str]) -> None:
    r"""Looks for a product w with :math:`\langle w, A w \rangle` next to zero, by alternation over its factors.

    Raises:
        ValueError: If there is one: the equations and their data then leave the solution undetermined.
    """
    factors = [torch.zeros(size, 1, dtype=torch.float64) for size in form.sizes]
    for factor in factors:
        factor[0] = 1.0  # the smoothest function
    largest = sum(
        c.abs() * torch.stack([m[s].norm() for m, s in zip(form.matrices, term, strict=True)]).prod()
        for c, term in zip(form.coefficients, form.index, strict=True)
    )
    smallest = torch.tensor(inf)
    for _ in range(3):
        for i in range(len(factors)):
            along = torch.stack(
                [
                    (f.mT @ m @ f).flatten()[form.index[:, j]]
                    for j, (m, f) in enumerate(zip(form.matrices, factors, strict=True))
                ]
            )
            weight = form.by_matrix(i, products_of_others(along)[i])
            matrix = torch.einsum("u,uab->ab", weight, form.matrices[i])
            values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
            factors[i], smallest = vectors[:, :1], values[0]
    if not smallest > SINGULAR * largest:
        raise ValueError(
            f"the equations are singular: on axes {list(names)} there is a function other than zero that satisfies them "
            "without source and data. Give an axis a 'dirichlet' end or initial data, or lower the number of functions."
        )
