"""Solves a problem over all of its axes at once, and keeps the solution as a sum of products or a tensor train.

The discrete equations are solved in a tensor train, whose ranks follow a tolerance (:mod:`sna_core.tensor_train`). The
sum of products of a given rank that is nearest in L2 is then fitted to it (:mod:`sna_core.components`). Boundary and
initial data stay exact: they are the lift, which is no part of the fit. Nonlinear problems are solved by Newton's
method, each step a linear problem (:mod:`sna_core.nonlinear`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from sna_core.assembly import Residual, galerkin, least_squares
from sna_core.components import ComponentSolver, grow
from sna_core.discretisation import Discretisation, Space
from sna_core.field import DECOMPOSITIONS
from sna_core.forms import Components, QuadraticForm, distance_to
from sna_core.linear import SETTLED, LinearSolution, Observer, check_determined, solve_linear
from sna_core.nonlinear import linearised
from sna_core.operators import Problem
from sna_core.tensor_train import Train

METHODS = ("auto", "least_squares", "galerkin", "components")
DEFAULT_RANK = 16
MAX_TRAIN_RANK = 120
ROUGH = 0.1  # the residual of a differential equation beyond which its solution is none
SHORT = 1.1  # a sum of products whose residual is so many times the train's has too few components
ROUNDING = 3e-8  # relative distances below it are lost in the squares that they are computed from
NUM_POLISH = 20  # Gauss-Newton steps after frames are cut
DIRECT_UP_TO = 400  # parts of a residual whose norm is computed without squares
LIFT_CUT = 1e-13  # relative: what ranks are cut to when the lift is added
REASONS = {
    "tolerance": "tolerance met",
    "stagnation": "limit of these axes reached (more cells lower it)",
    "rank": "too few components for what these axes allow (raise the rank)",
    "max_sweeps": "sweeps used up before the end",
    "newton": "Newton's steps did not settle (add cells or viscosity)",
}
ROUGH_RANK, ROUGH_CUT = 6, 3e-2  # of the function in Newton's derivative
ABOUT_RANK, ABOUT_CUT = 24, 1e-4  # of the function that products are linearised about
MAX_NEWTON_STEPS, STAYS, DIVERGED = 30, 1e-5, 1e3  # relative changes of the solution in Newton's steps


@dataclass(frozen=True)
class SolveReport:
    """How a solution was found and how good it is.

    Attributes:
        converged: Whether the tolerance is met, or the axes' own limit, and the differential equation holds to a tenth.
        stopped_by: ``"tolerance"``; ``"stagnation"``, where the residual is what these axes cannot lower: add cells;
            ``"rank"``, where components are too few for what the axes allow: raise the rank; ``"max_sweeps"``; or
            ``"newton"``, where the steps of a nonlinear problem did not settle.
        residual: Of the equations that are solved, as a fraction of their largest part: of least squares the norm over
            the box of what is left of the differential equation, of Galerkin's method that of the discrete equations.
        equation_residual: The first of these in any case; None where the degrees do not carry it.
        residual_history: After each sweep of the train (num_sweeps,).
        truncation: Distance in L2 between what is kept and the train that was solved, as a fraction of the norm.
        rank: Components that are kept, or the train's largest rank.
        num_parameters: Coefficients that are kept.
        num_sweeps: Of the train.
        num_newton_steps: Of a nonlinear problem's outer loop; 1 for a linear one.
        incompatibility: Largest disagreement of boundary and initial data, as a fraction of their size.
        seconds: From the problem to the solution.
        message: The same in a sentence.
    """

    converged: bool
    stopped_by: str
    residual: float
    equation_residual: float | None
    residual_history: Tensor
    truncation: float
    rank: int
    num_parameters: int
    num_sweeps: int
    num_newton_steps: int
    incompatibility: float
    seconds: float
    message: str


@dataclass(frozen=True)
class Solution:
    """Coefficients in the axes' own bases, in float64.

    Attributes:
        decomposition: One of :data:`sna_core.field.DECOMPOSITIONS`.
        axis_order: The axis of each core of a train; otherwise all axes as they come.
        factors: (size, rank) for each axis; none for a train.
        frames: (num_basis, size) for each axis, of a Tucker-compressed sum of products.
        cores: (rank, num_basis, next rank) for each axis of a train.
        report: How it was found.
    """

    decomposition: str
    axis_order: tuple[int, ...]
    factors: tuple[Tensor, ...]
    frames: tuple[Tensor, ...]
    cores: tuple[Tensor, ...]
    report: SolveReport


def solve(
    problem: Problem,
    *,
    decomposition: str = "cp",
    rank: int | None = None,
    tolerance: float = 1e-6,
    method: str = "auto",
    max_sweeps: int = 60,
    generator: torch.Generator | None = None,
    on_step: Observer | None = None,
) -> Solution:
    """Solves a problem for all of its axes at once.

    Args:
        problem: What to solve.
        decomposition: ``"cp"``, a sum of products; ``"tucker"``, one in reduced bases; or ``"tensor_train"``.
        rank: Components to keep, or largest rank of a train, those of the lift included; None for 16 beside the lift,
            or as large a train as the tolerance asks for.
        tolerance: Relative residual at which to stop.
        method: ``"galerkin"``, for symmetric coercive problems; ``"least_squares"`` of the residual, for any;
            ``"auto"``, the first where it applies and else the second; or ``"components"``, least squares without a
            train, in which components grow on the residual itself.
        max_sweeps: Of the train, at most, in each of Newton's steps.
        generator: Of random starts.
        on_step: Called after each step with what it was, and the relative residual or distance to the train.

    Raises:
        ValueError: If an option is unknown or out of its range, the rank is too small for the lift, the equations do
            not determine the solution, or the problem does not fit the method.
    """
    for name, value, known in (("decomposition", decomposition, DECOMPOSITIONS), ("method", method, METHODS)):
        if value not in known:
            raise ValueError(f"{name} = {value!r}; expected one of {known}.")
    for name, value, least in (("tolerance", tolerance, 0), ("max_sweeps", max_sweeps, 1), ("rank", rank or 1, 1)):
        if not least <= value < inf:
            raise ValueError(f"{name} = {value!r}; expected a number of at least {least}.")
    if problem.nonlinear and method in ("galerkin", "components"):
        raise ValueError(f"method = {method!r} takes linear problems; solve this one by method='least_squares'.")
    if method == "components" and decomposition == "tensor_train":
        raise ValueError("method = 'components' makes no tensor train; take decomposition='cp', or another method.")
    begun = time.perf_counter()
    discretisation = Discretisation(problem)
    lift, is_train = discretisation.lift, decomposition == "tensor_train"
    if rank is not None and rank <= lift.rank:
        raise ValueError(
            f"rank = {rank}, of which boundary and initial data take {lift.rank}; give at least {lift.rank + 1}."
        )
    own_rank = rank - lift.rank if rank is not None else MAX_TRAIN_RANK if is_train else DEFAULT_RANK
    run = _Run(
        method,
        tolerance,
        own_rank if is_train else MAX_TRAIN_RANK,
        max_sweeps,
        generator or torch.Generator().manual_seed(0),
        on_step or (lambda stage, value: None),
    )
    if method == "components":
        kept = run.grown(discretisation, own_rank)
    else:
        solved = run.newton(discretisation) if problem.nonlinear else run.linear(discretisation)
        kept = run.trained(solved) if is_train else run.fitted(solved, own_rank, decomposition == "tucker")
    return kept.solution(decomposition, discretisation, time.perf_counter() - begun)


@dataclass
class _Solved:
    """A linear problem in its bases, and its solution."""

    form: QuadraticForm
    residual: Residual
    equation: Residual | None
    found: LinearSolution
    num_newton_steps: int = 1


@dataclass
class _Kept:
    """What is kept of a solution, in the trial bases; of a train its cores, else factors and the frames they are in."""

    residual: float
    equation_residual: float | None
    stopped_by: str
    history: list[float]
    train: Train | None = None
    order: Sequence[int] = ()
    frames: Sequence[Tensor] | None = None
    factors: Sequence[Tensor] = ()
    truncation: float = 0.0
    num_newton_steps: int = 1

    def solution(self, decomposition: str, discretisation: Discretisation, seconds: float) -> Solution:
        """In the axes' own bases and with the lift."""
        spaces, lift = discretisation.spaces, discretisation.lift
        order, factors, frames, cores = tuple(range(len(spaces))), (), (), ()
        if self.train is not None:
            order = tuple(self.order)
            train = self.train.mapped([spaces[i].trial for i in order])
            train = train + Train.of_components([lift.factors[i] for i in order]) if lift.rank else train
            roots = [torch.linalg.cholesky(spaces[i].gram(0)).mT for i in order]
            train = train.mapped(roots).rounded(LIFT_CUT).mapped([torch.linalg.inv(root) for root in roots])
            cores, rank = train.cores, train.max_rank
        else:
            frames = self.frames or [torch.eye(space.dimension, dtype=torch.float64) for space in spaces]
            own = [space.trial @ frame for space, frame in zip(spaces, frames, strict=True)]
            if decomposition == "tucker":
                factors, frames = zip(*map(_joined_frames, own, self.factors, lift.factors), strict=True)
            else:
                summed = Components(tuple(o @ f for o, f in zip(own, self.factors, strict=True))) + lift
                factors, frames = summed.factors, ()
            rank = factors[0].shape[1]
        differs = self.equation_residual is not None and self.equation_residual != self.residual
        equation = f", of the differential equation {self.equation_residual:.2g}" if differs else ""
        report = SolveReport(
            converged=self.stopped_by in ("tolerance", "stagnation") and (self.equation_residual or 0.0) <= ROUGH,
            stopped_by=self.stopped_by,
            residual=self.residual,
            equation_residual=self.equation_residual,
            residual_history=torch.tensor(self.history, dtype=torch.float64),
            truncation=self.truncation,
            rank=rank,
            num_parameters=sum(t.numel() for t in (*factors, *frames, *cores)),
            num_sweeps=len(self.history),
            num_newton_steps=self.num_newton_steps,
            incompatibility=discretisation.incompatibility,
            seconds=seconds,
            message=f"{REASONS[self.stopped_by]}; relative residual {self.residual:.2g}{equation}, rank {rank}.",
        )
        return Solution(decomposition, order, factors, frames, cores, report)


@dataclass
class _Run:
    """The steps of :func:`solve`, with its options."""

    method: str
    tolerance: float
    max_rank: int
    max_sweeps: int
    generator: torch.Generator
    on_step: Observer

    def linear(self, discretisation: Discretisation, start: LinearSolution | None = None) -> _Solved:
        """Assembles and solves a linear problem in a train."""
        form, residual, equation = _assembled(discretisation, self.method)
        check_determined(form, discretisation.problem.names)
        found = solve_linear(
            form,
            residual,
            start,
            tolerance=self.tolerance,
            max_rank=self.max_rank,
            max_sweeps=self.max_sweeps,
            generator=self.generator,
            on_step=self.on_step,
        )
        return _Solved(form, residual, equation, found)

    def newton(self, discretisation: Discretisation) -> _Solved:
        """Solves linear problems about the last solution until it stays."""
        problem, spaces, lift = discretisation.problem, discretisation.spaces, discretisation.lift
        rough = about = lift
        before, history, change = None, [], 1.0
        for step in range(1, MAX_NEWTON_STEPS + 1):
            terms, source = linearised(problem, spaces, rough, about)
            solved = self.linear(Discretisation(problem, terms, source), before)
            train = solved.found.train
            history += solved.found.residual
            solved.found, solved.num_newton_steps = replace(solved.found, residual=list(history)), step
            if before is not None:
                change = (train + -before.train).norm() / max(train.norm(), 1e-300)
                self.on_step("Newton's step", change)
                if change <= max(STAYS, solved.found.cut):
                    return solved
                if not change < DIVERGED:
                    break
            before = solved.found
            rough, about = (
                self._own(spaces, before, rank, cut) + lift
                for rank, cut in ((ROUGH_RANK, ROUGH_CUT), (ABOUT_RANK, max(ABOUT_CUT, ROUGH_CUT * change)))
            )
        solved.found = replace(solved.found, stopped_by="newton")
        return solved

    def _own(self, spaces: Sequence[Space], found: LinearSolution, rank: int, tolerance: float) -> Components:
        """A train as a sum of few products in the axes' own bases."""
        frames, factors, _ = self._components(found, rank, tolerance)
        return Components(tuple(s.trial @ frame @ f for s, frame, f in zip(spaces, frames, factors, strict=True)))

    def trained(self, solved: _Solved) -> _Kept:
        """The train itself."""
        found, equation = solved.found, solved.equation
        return _Kept(
            residual=found.residual[-1],
            equation_residual=None if equation is None else equation.of_train(found.train.cores, found.order),
            stopped_by=found.stopped_by,
            history=found.residual,
            train=found.train,
            order=found.order,
            num_newton_steps=solved.num_newton_steps,
        )

    def fitted(self, solved: _Solved, rank: int, compress: bool) -> _Kept:
        """The sum of products nearest to the train, whose frames are cut to its accuracy if they are to be kept."""
        found, equation = solved.found, solved.equation
        frames, factors, distance = self._components(found, rank, found.cut)
        if compress:
            frames, factors, distance = self._compressed(found, frames, factors, distance)
        whole = [frame @ factor for frame, factor in zip(frames, factors, strict=True)]
        residual = self._residual_of(solved.residual, solved, whole)
        limit = max(self.tolerance, SHORT * found.residual[-1])
        return _Kept(
            residual=residual,
            equation_residual=None if equation is None else self._residual_of(equation, solved, whole),
            stopped_by=found.stopped_by if residual <= limit else "rank",
            history=found.residual,
            frames=frames,
            factors=factors,
            truncation=distance,
            num_newton_steps=solved.num_newton_steps,
        )

    def grown(self, discretisation: Discretisation, rank: int) -> _Kept:
        """Components that grow on the residual itself."""
        form, residual = least_squares(discretisation)
        check_determined(form, discretisation.problem.names)
        history, by_rank = [], {0: inf}

        def note(rank: int, value: float) -> None:
            history.append(value * form.constant**0.5 / residual.scale)
            by_rank[rank] = history[-1]
            self.on_step(f"components, rank {rank}", history[-1])

        goal = self.tolerance * residual.scale / max(form.constant, 1e-300) ** 0.5
        factors = grow(form, rank, tolerance=goal, generator=self.generator, on_step=note)
        *_, before, last = [0.0, *by_rank.values()]
        settled = before - last <= SETTLED * before < inf
        reason = "tolerance" if last <= self.tolerance else "stagnation" if settled else "rank"
        return _Kept(last, last, reason, history, factors=factors)

    def _components(
        self, found: LinearSolution, rank: int, tolerance: float
    ) -> tuple[list[Tensor], list[Tensor], float]:
        """Frames and factors of at most ``rank`` components, axis by axis of the problem, and their distance."""
        frames, small = found.train.frames(tolerance / 10)
        factors, distance = small.expanded(rank), 0.0
        if factors is None:
            form = _distance(small, found.train.norm())
            factors = grow(
                form,
                rank,
                tolerance=max(tolerance, ROUNDING),
                generator=self.generator,
                on_step=lambda rank, value: self.on_step(f"fit of rank {rank}", value),
            )
            distance = _relative(form, factors)
        return found.in_problem_order(frames), found.in_problem_order(factors), distance

    def _compressed(
        self, found: LinearSolution, frames: list[Tensor], factors: list[Tensor], distance: float
    ) -> tuple[list[Tensor], list[Tensor], float]:
        """Frames no finer than the fit, and the factors improved in these."""
        coarse, small = found.train.frames(max(distance / 3, found.cut / 10))
        coarse = found.in_problem_order(coarse)
        factors = [c.mT @ frame @ f for c, frame, f in zip(coarse, frames, factors, strict=True)]
        form = _distance(small, found.train.norm())
        solver = ComponentSolver(form, [factors[axis] for axis in found.order])
        for _ in range(NUM_POLISH if distance else 0):
            solver.newton_step()
        return coarse, found.in_problem_order(solver.factors), _relative(form, solver.factors)

    def _residual_of(self, residual: Residual, solved: _Solved, factors: list[Tensor]) -> float:
        """Without squares, where the parts are few enough for it; only the form of least squares is one of squares."""
        order, rank = solved.found.order, factors[0].shape[1]
        if rank * len(residual.index) <= DIRECT_UP_TO or solved.residual is not solved.equation:
            return residual.of_train(Train.of_components([factors[i] for i in order]).cores, order)
        return max(0.0, ComponentSolver(solved.form, factors).value()) ** 0.5 / residual.scale


def _joined_frames(frame: Tensor, factor: Tensor, lift: Tensor) -> tuple[Tensor, Tensor]:
    """Components in a frame, and others beside them, in one frame of independent functions: factors and frame."""
    both = torch.cat([frame, lift / lift.norm(dim=0).clamp(min=1e-300)], 1)
    u, sizes, _ = torch.linalg.svd(both, full_matrices=False)
    u = u[:, sizes > LIFT_CUT * sizes[0]]
    return torch.cat([u.mT @ frame @ factor, u.mT @ lift], 1), u


def _assembled(discretisation: Discretisation, method: str) -> tuple[QuadraticForm, Residual, Residual | None]:
    """The form, what its solution leaves of the equations that are solved, and of the differential equation."""
    axes, problem = discretisation.problem.axes, discretisation.problem
    carried = all(axis.degree is None or problem.order(axis) <= axis.degree for axis in axes)
    if method in ("auto", "galerkin"):
        try:
            form = galerkin(discretisation)
        except ValueError:
            if method == "galerkin":
                raise
        else:
            return form, Residual.of_equations(form), least_squares(discretisation)[1] if carried else None
    form, residual = least_squares(discretisation)
    return form, residual, residual


def _distance(train: Train, norm: float) -> QuadraticForm:
    return distance_to(train, [core.shape[1] for core in train.cores], norm**2)


def _relative(form: QuadraticForm, factors: Sequence[Tensor]) -> float:
    """The distance as a fraction of the norm."""
    return (max(0.0, ComponentSolver(form, factors).value()) / (form.constant or 1.0)) ** 0.5
