r"""Alternating least squares: fits a CP network of splines to data, the factors of one input at a time.

Minimised for each output is

.. math::
    \frac{1}{W} \sum_p w_p \big(y_p - f(x_p)\big)^2 + \lambda \|f\|_H^2, \qquad
    H = \bigotimes_i H_i, \quad \|\psi\|_{H_i}^2 = \int_0^1 \psi^2 + \theta\, ((\psi')^2 + (\psi'')^2) \, du

with u the input scaled to [0, 1], :math:`W = \sum_p w_p`, the ridge :math:`\lambda` and the smoothness
:math:`\theta`. The norm is that of f, not of its factors: it does not depend on how a component's size is shared among
its inputs; a constant along an input costs least, an interaction of several inputs more than the effect of one. A small
share of the norms of the components themselves comes on top, so that none grow large to cancel each other.

With all factors but those of one input held, f is linear in these, and their normal equations are solved exactly: the
objective does not rise. Alternation is slow along valleys in which all factors change at once; small networks end with
damped Gauss-Newton steps in all of them. Everything starts with few cells, and goes on with all from what these found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import inf

import torch
from torch import Tensor

from sna_core.banded import factorise, solve_banded
from sna_core.bspline import UniformBSpline
from sna_core.local_sum import local_sum
from sna_core.network import CPNetwork
from sna_core.normal_equations import (
    Points,
    block_equations,
    block_penalty,
    flat,
    inner_products,
    size_directions,
    smoothness_matrix,
    tangent_equations,
    tangent_penalty,
    unflat,
)

RIDGES = torch.logspace(-13, 1, 57, dtype=torch.float64)  # what generalised cross-validation chooses from
FIRST_RIDGE = 1e-6
LEAP = 100  # at most by so much the ridge falls at once: a little at a time, Newton's steps stay few
LOOSE = 0.1  # the tolerance while the ridge still moves, or cells are still few
FLOOR = 1e-11  # of the mean square of y: what falls by less in a step has settled
COARSE_CELLS = 4  # to start with, where there are more than twice as many: fewer factors, and better conditioned
CHECKPOINTS = (3, 6, 10, 15)  # sweeps after which the ridge is chosen anew and the worse half of the restarts ends
NUM_ROUNDS = 12  # at most, of steps to convergence and a new choice of the ridge
INFLATION = 1.4  # of degrees of freedom in cross-validation: Kim and Gu, J. R. Statist. Soc. B 66 (2004)
MIN_ROOM = 0.1  # share of the points that are left beyond those degrees of freedom
NEWTON_UP_TO = 1200  # coefficients of an output; beyond, Gauss-Newton costs more than it saves
BAND_PAYS_FROM = 8  # blocks of the band; fewer are solved whole
MAX_MEMORY = 2**28  # bytes


@dataclass(frozen=True)
class FitResult:
    r"""What :func:`fit` found.

    Attributes:
        converged: Whether the objective has stopped falling, or the validation error, where there is one.
        num_sweeps: Sweeps over all inputs.
        objective: After each sweep (num_sweeps,), the mean over outputs of the best restart's. It may jump where the
            ridge or the number of cells changes.
        train_rmse: Root mean squared error of each output (num_outputs,), in the units of y.
        validation_rmse: The same on the validation data, if there were any.
        ridge: :math:`\lambda` of each output.
        degrees_of_freedom: Effective number of parameters of each output.
        noise: Standard deviation of what is left, :math:`\sqrt{RSS / (W - df)}`, of each output.
    """

    converged: bool
    num_sweeps: int
    objective: Tensor
    train_rmse: Tensor
    validation_rmse: Tensor | None
    ridge: Tensor
    degrees_of_freedom: Tensor
    noise: Tensor


@torch.no_grad()
def fit(
    network: CPNetwork,
    x: Tensor,
    y: Tensor,
    *,
    ridge: float | None = None,
    smoothness: float = 0.1,
    num_restarts: int = 8,
    max_sweeps: int = 100,
    tolerance: float = 1e-4,
    validation: tuple[Tensor, Tensor] | None = None,
    patience: int = 10,
    sample_weight: Tensor | None = None,
    max_memory: int = MAX_MEMORY,
    generator: torch.Generator | None = None,
    on_sweep: Callable[[int, float], None] | None = None,
) -> FitResult:
    r"""Fits ``network.factors`` in float64, whatever their dtype, and puts the best of all restarts in their place.

    All restarts and outputs are solved side by side. Work is O(points num_inputs rank^2 (degree + 1)^2) a sweep.

    Args:
        network: With unit weights and no activation.
        x: Points (points, num_inputs) in the box.
        y: Values (points, num_outputs) of about unit variance and mean zero, which the ridges are meant for.
        ridge: :math:`\lambda`; None chooses one for each output by generalised cross-validation (Golub, Heath and
            Wahba, Technometrics 21 (1979)), in which the degrees of freedom are those of all inputs' factors.
        smoothness: :math:`\theta`.
        num_restarts: Random starts, of which the worse half ends at each of the sweeps in ``CHECKPOINTS``.
        max_sweeps: At most so many.
        tolerance: Stops once the objective falls by less than this fraction in a sweep.
        validation: x and y of points whose error, where it is least, chooses the factors that are kept.
        patience: With validation: sweeps without a new least error after which to stop.
        sample_weight: (points,), not negative: a weight of two is the same as the point twice. Cross-validation takes
            their sum for the number of points, so that weights which mean something else should average one.
        max_memory: Bytes to work in, beside x, y and the matrices of the factors, whose size does not depend on the
            number of points. Where they do not hold the sub-atoms of all points, these are computed anew for the
            factors of each input.
        generator: Of the starts.
        on_sweep: Called after each sweep with its number and the objective.

    Raises:
        ValueError: If the network has weights or an activation, shapes do not fit, a point is outside the box, y or a
            weight is not finite, or an option is out of its range.
    """
    if network.weights is not None or network.activation is not None:
        raise ValueError("alternating least squares needs unit weights and no activation; train this by gradient.")
    for name, value, least in (
        ("num_restarts", num_restarts, 1),
        ("max_sweeps", max_sweeps, 1),
        ("patience", patience, 1),
        ("max_memory", max_memory, 1),
        ("smoothness", smoothness, 0),
        ("tolerance", tolerance, 0),
    ):
        if not least <= value < inf:
            raise ValueError(f"{name} = {value!r}; expected a number of at least {least}.")
    if ridge is not None and not 0 < ridge < inf:
        raise ValueError(f"ridge = {ridge!r}; expected a positive number, or None to choose one.")
    for name, values in (("y", y), ("y of the validation data", y if validation is None else validation[1])):
        if values.shape[1:] != (network.num_outputs,):
            raise ValueError(f"{name} has shape {tuple(values.shape)}; expected (points, {network.num_outputs}).")
    points = Points(network.splines, x, y, sample_weight, max_memory)
    held_out = None if validation is None else Points(network.splines, *validation, None, max_memory)
    watch = _Watch(held_out, on_sweep)
    coarse = points.on(_coarse(network.splines))
    starts = _smooth_starts(coarse.splines, num_restarts, network.num_outputs, network.rank, generator)
    state = _Alternation(coarse, smoothness, starts, FIRST_RIDGE if ridge is None else ridge)
    finer = coarse.splines != points.splines

    num_trials = min(CHECKPOINTS[-1], max_sweeps)
    for sweep in range(1, num_trials + 1):
        state.sweep()
        if sweep in CHECKPOINTS or sweep == num_trials:
            if ridge is None and sweep < max_sweeps:  # a ridge is that of the fit
                state.choose_ridges()
            state.keep(watch.errors(state), share=0.5 if sweep < num_trials else 0.0)
        watch.note(state)
    if not finer:
        converged = _follow(state, watch, ridge is None, max_sweeps, tolerance, patience)
    else:
        _follow(state, watch, ridge is None, max_sweeps // 2, LOOSE, patience)
        if watch.best is not None:
            state = _Alternation(coarse, smoothness, watch.best, watch.ridges)
        state = state.refined(points)
        watch.forget()
        watch.see(state)
        state.sweep()
        watch.note(state)
        converged = _follow(state, watch, ridge is None, max_sweeps, tolerance, patience)
    if watch.best is not None:
        state = _Alternation(points, smoothness, watch.best, watch.ridges)
    freedom = state.degrees_of_freedom()
    squares = points.squares(state.factors)
    network.factors.copy_(state.factors)
    return FitResult(
        converged=converged,
        num_sweeps=len(watch.history),
        objective=torch.tensor(watch.history, dtype=torch.float64),
        train_rmse=(squares / points.weight_sum).sqrt(),
        validation_rmse=None if held_out is None else (held_out.squares(state.factors) / held_out.weight_sum).sqrt(),
        ridge=state.ridges,
        degrees_of_freedom=freedom,
        noise=(squares / (points.weight_sum - freedom).clamp(min=1.0)).sqrt(),
    )


def _follow(
    state: _Alternation, watch: _Watch, chooses: bool, max_sweeps: int, tolerance: float, patience: int
) -> bool:
    """Steps until nothing falls any more, and a new ridge, in turn until that stays; whether it came to an end."""
    moving = chooses
    for _ in range(NUM_ROUNDS):
        settled = False
        while not settled:
            if watch.num_since_best >= patience:
                return True
            if len(watch.history) >= max_sweeps:
                return False
            before = state.objective
            settled = state.newton_step() if state.is_small else state.sweep()
            fallen = before - state.objective
            enough = ((LOOSE if moving else tolerance) * before).clamp(
                min=FLOOR * state.power / state.points.weight_sum
            )
            settled = settled and bool((fallen <= enough).all())
            watch.note(state)
            watch.see(state)
        if not moving or len(watch.history) >= max_sweeps:
            return not moving
        before = state.ridges
        state.choose_ridges()
        moving = bool(((state.ridges / before).log10().abs() > 0.3).any())
    return False


def _coarse(splines: tuple[UniformBSpline, ...]) -> tuple[UniformBSpline, ...]:
    """The same intervals with few cells, where ``splines`` have many."""
    many = splines[0].num_cells > 2 * COARSE_CELLS
    return tuple(replace(spline, num_cells=COARSE_CELLS) for spline in splines) if many else splines


def _smooth_starts(
    splines: Sequence[UniformBSpline],
    num_restarts: int,
    num_outputs: int,
    rank: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Factors of random half waves of low frequency: rough ones would multiply to noise."""
    position = torch.linspace(0, 1, splines[0].num_basis, dtype=torch.float64).unsqueeze(-1)
    amplitudes = torch.tensor([1.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    waves = (torch.pi * position * torch.arange(len(amplitudes))).cos() * amplitudes
    shape = (len(splines), len(amplitudes), num_restarts * num_outputs * rank)
    draws = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (waves @ draws).view(len(splines), -1, num_restarts * num_outputs, rank)


class _Watch:
    """The objective after each sweep, and the factors of the least error on the validation data."""

    def __init__(self, held_out: Points | None, on_sweep: Callable[[int, float], None] | None):
        self.held_out, self.on_sweep = held_out, on_sweep
        self.history: list[float] = []
        self.best: Tensor | None = None
        self.ridges: Tensor  # these two once there is a best
        self.error: Tensor
        self.num_since_best = 0

    def errors(self, state: _Alternation) -> Tensor:
        """By which restarts are compared: (problems,)."""
        return state.score if self.held_out is None else self.held_out.on(state.points.splines).squares(state.factors)

    def forget(self) -> None:
        """Of factors that are about to be refined."""
        self.best, self.num_since_best = None, 0

    def note(self, state: _Alternation) -> None:
        """Keeps the objective and tells the caller."""
        self.history.append(state.objective.view(-1, state.num_outputs).amin(0).mean().item())
        if self.on_sweep is not None:
            self.on_sweep(len(self.history), self.history[-1])

    def see(self, state: _Alternation) -> None:
        """Keeps what is best of each output."""
        if self.held_out is None:
            return
        error = self.errors(state)
        if self.best is None:
            self.best, self.ridges, self.error = state.factors.clone(), state.ridges, error
            return
        better = error < self.error
        self.num_since_best = 0 if better.any() else self.num_since_best + 1
        self.error = torch.where(better, error, self.error)
        self.ridges = torch.where(better, state.ridges, self.ridges)
        self.best = torch.where(better[:, None], state.factors, self.best)


class _Alternation:
    """The factors of all problems, and the steps that lower their objectives.

    Problems are restarts of all outputs, restart by restart. ``ridges``, ``objective`` and ``score`` are (problems,).
    """

    def __init__(self, points: Points, smoothness: float, factors: Tensor, ridges: float | Tensor):
        self.points, self.smoothness, self.num_outputs = points, smoothness, points.y.shape[1]
        self.norm = smoothness_matrix(points.splines[0], smoothness)
        self.rank, size = factors.shape[3], factors[:, :, 0].numel()
        self.is_small = size <= NEWTON_UP_TO
        self._start(factors, ridges if isinstance(ridges, Tensor) else torch.full_like(factors[0, 0, :, 0], ridges))

    def _start(self, factors: Tensor, ridges: Tensor) -> None:
        self.factors, self.ridges = factors, ridges
        self.power = self.points.power.repeat(len(ridges) // self.num_outputs)
        self.objective = self.score = torch.full_like(ridges, torch.inf)
        self.damping = torch.full_like(ridges, 1e-3)
        self.system: tuple[Tensor, Tensor, Tensor] | None = None
        # A point takes its sub-atoms, their products, sorted and not, and its rows of the design, three times over.
        width = self.points.splines[0].degree + 1
        self.chunks = self.points.chunks(
            len(ridges) * self.rank * (2 * len(factors) + 3 * width + 4) + 8 * len(factors) * width
        )
        if len(self.chunks) == 1:
            self.chunks[0].kept = self.chunks[0].subatoms(factors)

    def refined(self, points: Points) -> _Alternation:
        """The nearest splines of other cells: the same functions, where the present cells are made up of those."""
        coarse, fine = self.points.splines[0], points.splines[0]
        x, _ = fine.quadrature(fine.degree + 1)
        refine = torch.linalg.lstsq(fine.dense(x), coarse.dense(x), driver="gelsd").solution
        factors = (refine @ self.factors.flatten(2)).unflatten(2, self.factors.shape[2:])
        return _Alternation(points, self.smoothness, factors, self.ridges)

    def sweep(self) -> bool:
        """Solves for the factors of each input in turn, and balances those of each component. Never refused: True."""
        for i in range(len(self.factors)):
            gram, right = block_equations(self.chunks, self.factors, i)
            penalty = block_penalty(self.factors, self.norm, i)
            w = self._solve(gram, penalty, right)
            squares = self.power + (w * (gram @ w - 2 * right)).sum((1, 2))
            norms = (w * (penalty @ w)).sum((1, 2))
            self.objective = squares.clamp(min=0) / self.points.weight_sum + self.ridges * norms
            self.factors[i] = w.view(len(w), -1, self.rank).movedim(0, 1)
            if (kept := self.chunks[0].kept) is not None:
                column, one = self.chunks[0].x[:, i : i + 1].double(), slice(i, i + 1)
                kept[i] = local_sum(column, self.factors[one], self.points.splines[one], check=False)[0]
        self._balance()
        self.score = self.objective
        return True

    def newton_step(self) -> bool:
        """A damped Gauss-Newton step in all factors; whether it was taken for every problem.

        Of v, the factors of the linear model J v of f whose value at the present is w / d.
        """
        if self.system is None:
            self.system = self._tangent_system()
        gram, right, penalty = self.system
        present = flat(self.factors) / len(self.factors)
        matrix = gram + self.points.weight_sum * self.ridges[:, None, None] * penalty
        extra = _lift(matrix, self.damping[:, None])  # also along sizes passed on between factors, where it is zero
        v = torch.cholesky_solve(right + extra.unsqueeze(-1) * present, factorise(matrix))
        factors = self.factors + unflat(v - present, self.factors)
        objective = self._objective_of(factors)
        taken = objective < self.objective
        self.damping = torch.where(taken, self.damping / 5, self.damping * 8).clamp(1e-13, 1e6)
        if taken.any():
            self.factors = torch.where(taken[:, None], factors, self.factors)
            self.objective = torch.where(taken, objective, self.objective)
            self._balance()
            self.system = None
        return bool((taken | (self.damping > 1e3)).all())

    def _objective_of(self, factors: Tensor) -> Tensor:
        penalty, w = block_penalty(factors, self.norm, 0), factors[0].movedim(1, 0).flatten(1).unsqueeze(-1)
        norms = (w * (penalty @ w)).sum((1, 2))
        return self.points.squares(factors) / self.points.weight_sum + self.ridges * norms

    def _balance(self) -> None:
        """Gives the factors of a component equal norms, which leaves f as it is."""
        sizes = inner_products(self.factors, self.norm).diagonal(dim1=-2, dim2=-1).clamp(min=1e-300).sqrt()
        scale = (sizes.log().mean(0) - sizes.log()).exp().unsqueeze(1)  # (num_inputs, 1, problems, rank)
        self.factors = self.factors * scale
        if (kept := self.chunks[0].kept) is not None:
            kept *= scale

    def _solve(self, gram: Tensor, penalty: Tensor, right: Tensor) -> Tensor:
        matrix = gram + self.points.weight_sum * self.ridges[:, None, None] * penalty
        _lift(matrix, 1e-14)
        block_size = (self.points.splines[0].degree + 1) * self.rank
        if matrix.shape[-1] >= BAND_PAYS_FROM * block_size:
            try:
                return solve_banded(matrix, right, block_size)
            except torch.linalg.LinAlgError:
                pass  # a lift of the whole is less than one of a block
        return torch.cholesky_solve(right, factorise(matrix))

    def _tangent_system(self) -> tuple[Tensor, Tensor, Tensor]:
        penalty, sizes = tangent_penalty(self.factors, self.norm), size_directions(self.factors)
        # Along the sizes all is zero: with a penalty there, they are no degrees of freedom.
        penalty += penalty.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * (sizes @ sizes.mT)
        return *tangent_equations(self.points, self.factors), penalty

    def _systems(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Matrix, right-hand side and penalty of f made linear in all factors, or in each input's if these are many.

        So they are as well while there are restarts to choose from.
        """
        if self.is_small and len(self.ridges) == self.num_outputs:
            yield self._tangent_system()
        else:
            for i in range(len(self.factors)):
                yield *block_equations(self.chunks, self.factors, i), block_penalty(self.factors, self.norm, i)

    def choose_ridges(self) -> None:
        r"""Takes the least :math:`W \, RSS / (W - df)^2` of ``RIDGES``, at most a ``LEAP`` below the present ridge.

        RSS is the systems' mean, df their sum.
        """
        scales = self.points.weight_sum * RIDGES[:, None, None]  # (ridges, 1, 1)
        spectra = list(map(_spectrum, self._systems()))
        freedom = reduce(torch.add, [(values / (values + scales)).sum(-1) for values, _ in spectra])
        fitted = [(along * (values + 2 * scales) / (values + scales).square()).sum(-1) for values, along in spectra]
        squares = self.power - reduce(torch.add, fitted) / len(spectra)
        freedom = self._without_sizes(freedom, len(spectra))
        room = self.points.weight_sum - INFLATION * freedom
        scores = squares.clamp(min=0) * self.points.weight_sum / room.square()
        # Where nothing is left to judge by, the less free is the better.
        scores = torch.where(room < MIN_ROOM * self.points.weight_sum, 1e100 * (1 + freedom), scores)
        self.score, best = scores.min(0)
        self.ridges = torch.maximum(RIDGES[best], self.ridges / LEAP)
        self.objective = self._objective_of(self.factors)

    def degrees_of_freedom(self) -> Tensor:
        """The effective number of parameters at the present ridges: (problems,)."""
        scales = self.points.weight_sum * self.ridges[:, None]
        parts = [(values / (values + scales)).sum(-1) for values, _ in map(_spectrum, self._systems())]
        return self._without_sizes(torch.stack(parts).sum(0), len(parts))

    def _without_sizes(self, freedom: Tensor, num_blocks: int) -> Tensor:
        """Sizes that a component's factors pass on to each other are counted once."""
        return (freedom - (num_blocks - 1) * self.rank).clamp(0, len(self.points.x))

    def keep(self, errors: Tensor, share: float) -> None:
        """Goes on with a share of the restarts of each output, those of the least errors, and at least one."""
        by_restart = errors.view(-1, self.num_outputs)
        count = max(1, int(len(by_restart) * share))
        if count < len(by_restart):
            restarts = by_restart.argsort(dim=0, stable=True)[:count]
            chosen = (restarts * self.num_outputs + torch.arange(self.num_outputs)).flatten()
            objective, score = self.objective[chosen], self.score[chosen]
            self._start(self.factors[:, :, chosen], self.ridges[chosen])
            self.objective, self.score = objective, score


def _spectrum(system: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the normal equations in the penalty's norm, and squares of the right-hand side along them."""
    gram, right, penalty = system
    _lift(penalty, 1e-10)
    factor = factorise(penalty)
    half = torch.linalg.solve_triangular(factor, gram, upper=False)
    values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
    along = vectors.mT @ torch.linalg.solve_triangular(factor, right, upper=False)
    return values.clamp(min=0), along.squeeze(-1).square()


def _lift(matrices: Tensor, share: float | Tensor) -> Tensor:
    """Adds a share of its mean to each diagonal, in place, and more than nothing; returns what was added."""
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    added = share * diagonal.mean(-1, keepdim=True) + 1e-200
    diagonal += added
    return added
