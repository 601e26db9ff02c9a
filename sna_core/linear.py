"""Solves a discretised linear problem in a tensor train: the order of axes, the ranks and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from sna_core.assembly import Residual
from sna_core.forms import Components, QuadraticForm
from sna_core.network import products_of_others
from sna_core.ordering import best_order
from sna_core.tensor_train import Train, TrainSolver

CUTS = [10.0**-n for n in range(2, 13)]  # of the train, as fractions of its norm, one after the other
SWEEPS_PER_CUT = 2
SETTLED = 1e-3  # relative fall of the residual from one cut to the next, below which more rank does not help:
# squared errors add up, so that the solution is then within a twentieth of the residual of the best in these spaces
SURE_FROM = 1e-3  # cuts that are coarser tell nothing about that
SCOUT = ((3e-2, 16), (1e-2, 24), (3e-3, 40))  # cuts and ranks of the rough solution that the order is chosen from
MAX_SCOUT_NUMEL = 2**18  # of that solution in its frames
MAX_ORDERED_AXES = 10
SINGULAR = 1e-6  # smallest quotient of the form, as a fraction of the parts that cancel in it, that is not zero
NOTHING = 1e-24  # of the largest part: what is itself no more than rounding, in squares

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
    form: QuadraticForm[Components],
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
    solver = TrainSolver(form.permuted(order), train, generator)
    history: list[float] = []
    ranks: list[int] = []
    before = inf
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
        settled = told and before < inf and before - history[-1] <= SETTLED * before
        before, ranks = history[-1], solver.train.ranks
        if settled and cut <= SURE_FROM:
            return LinearSolution(solver.train, order, cut, history, "rank" if full else "stagnation")
        if len(history) >= max_sweeps:
            return LinearSolution(solver.train, order, cut, history, "max_sweeps")
    return LinearSolution(solver.train, order, cut, history, "stagnation")


def _start(
    form: QuadraticForm[Components], residual: Residual, generator: torch.Generator, on_step: Observer
) -> tuple[list[int], Train]:
    """The best order of axes, and a rough solution in it."""
    order = list(range(len(form.sizes)))
    factors = [torch.randn(size, 2, generator=generator, dtype=torch.float64) for size in form.sizes]
    train = Train.of_components([factor / factor.norm(dim=0) for factor in factors])
    if not 3 <= len(order) <= MAX_ORDERED_AXES:
        return order, train
    solver = TrainSolver(form, train, generator)
    for cut, rank in SCOUT:
        solver.sweep(cut, rank)
        on_step("order of axes", residual.of_train(solver.cores, order))
    while True:
        frames, small = solver.train.frames(cut)
        if math.prod(core.shape[1] for core in small.cores) <= MAX_SCOUT_NUMEL:
            break
        cut *= 2
    values = small.tensor()
    order = best_order(values, form.sizes, cut)
    return order, Train.of_tensor(values.permute(order), cut).mapped([frames[i] for i in order])


def check_determined(form: QuadraticForm, names: Sequence[str]) -> None:
    r"""Looks for a product w with :math:`\langle w, A w \rangle` next to zero, by alternation over its factors.

    Zero is judged beside the parts that cancel in it: of functions on fine cells the form is large, of smooth ones it
    may rightly be many orders smaller.

    Raises:
        ValueError: If there is one: the equations and their data then leave the solution undetermined.
    """
    factors = [torch.zeros(size, 1, dtype=torch.float64) for size in form.sizes]
    for factor in factors:
        factor[0] = 1.0  # the smoothest function
    smallest = torch.tensor(inf)
    for _ in range(3):
        for i in range(len(factors)):
            along = torch.stack(
                [
                    (f.mT @ m @ f).flatten()[form.index[:, j]]
                    for j, (m, f) in enumerate(zip(form.matrices, factors, strict=True))
                ]
            )
            others = products_of_others(along)[i]
            matrix = torch.einsum("u,uab->ab", form.by_matrix(i, others), form.matrices[i])
            diagonals = form.matrices[i].diagonal(dim1=1, dim2=2).abs()
            size = form.by_matrix(i, others.abs()) @ diagonals
            scale = size.clamp(min=NOTHING * size.amax()).rsqrt()
            values, vectors = torch.linalg.eigh(scale.unsqueeze(-1) * (matrix + matrix.mT) / 2 * scale)
            vector = scale.unsqueeze(-1) * vectors[:, :1]
            factors[i], smallest = vector / vector.norm(), values[0]
    if not smallest > SINGULAR:
        raise ValueError(
            f"the equations are singular or indefinite: a function of {list(names)} other than zero satisfies them "
            "without source and data. Give an axis a 'dirichlet' end or initial data, lower the number of functions, "
            "or use method='least_squares'."
        )
