"""Inversion: all x in a box where a function of many inputs takes given values, and level sets.

The functions come with their Jacobian; :mod:`sna_core.newton` says how each start gets to a solution and
:mod:`sna_core.prior` how a prior picks among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from sna_core.newton import Function, newton, pose
from sna_core.prior import GaussianPrior, approach

DISTINCT = 1e-3  # points that are closer than this in every input, in box widths, are one
STARTS_PER_POINT = 8  # of a level set


@dataclass(frozen=True, eq=False)
class InversionResult:
    """What :func:`invert` found: the converged points first, then those where a start ended without a solution.

    Attributes:
        x: Distinct points in the box, (points, num_inputs).
        prediction: The function there, free outputs included, (points, num_outputs).
        residual: Largest deviation of a targeted output as a fraction of its scale, (points,).
        converged: Whether ``residual`` is within the tolerance, and with a prior whether its density is stationary on
            the solution set, (points,).
        distance: With a prior the Mahalanobis distance of x from its mean, (points,), else None.
        num_iterations: Evaluations of the batch after the first.
        num_starts: Number of starts.
    """

    x: Tensor
    prediction: Tensor
    residual: Tensor
    converged: Tensor
    distance: Tensor | None
    num_iterations: int
    num_starts: int

    @property
    def solutions(self) -> Tensor:
        """The converged points, (solutions, num_inputs); none where the target is out of reach."""
        return self.x[self.converged]


@dataclass(frozen=True, eq=False)
class LevelSet:
    """Points that :func:`level_set` found.

    Attributes:
        x: Points of the set, (points, num_inputs): fewer than asked for, or none, where no more were found.
        residual: Deviation of the function from the target as a fraction of its scale, (points,).
        num_iterations: Evaluations of the batch after the first.
    """

    x: Tensor
    residual: Tensor
    num_iterations: int


@torch.no_grad()
def invert(
    function: Function,
    low: Tensor | Sequence[float],
    high: Tensor | Sequence[float],
    target: float | Sequence[float] | Tensor,
    *,
    num_starts: int = 64,
    tolerance: float = 1e-8,
    max_iterations: int = 50,
    scale: float | Sequence[float] | Tensor | None = None,
    fixed: Mapping[int, float] | None = None,
    prior: GaussianPrior | None = None,
    starts: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> InversionResult:
    r"""Finds x with :math:`f_o(x) = target_o` for every targeted output o, :math:`low \le x \le high`.

    Where there are more inputs than targets the solutions are a continuum, and each start goes to one near it. A prior
    picks from it the points of locally highest density, :math:`\min (x - m)^T P (x - m)` subject to f(x) = target: the
    MAP estimate for outputs without noise. The nearest to the mean comes first.

    A start ends without a solution where its residual has a local minimum, at the latest where a few steps do not halve
    it. If no start finds one, the target is probably out of reach; ``residual[0]`` then tells by how much.

    Args:
        function: f in float64: x (points, num_inputs) to values (points, num_outputs) and their Jacobian (points,
            num_outputs, num_inputs).
        low: Lower ends of the box, (num_inputs,).
        high: Upper ends, likewise.
        target: One number for each output, in its units; NaN leaves the output free.
        num_starts: Starts, from a scrambled Sobol sequence in the box. Not used where ``starts`` are given.
        tolerance: Largest residual of a solution, as a fraction of ``scale``.
        max_iterations: At most so many Newton steps, and with a prior as many steps along the solution set.
        scale: Unit of the residuals, one for each output or for all; None takes the range of each output over a few
            points of the box where it is finite, or 1 for a constant one.
        fixed: Inputs to hold, as {index: value}.
        prior: Density to maximise over the solutions.
        starts: Points of the box to start from, (starts, num_inputs), in place of the Sobol sequence.
        generator: Draws the scrambling of the sequence, which is otherwise always the same.

    Raises:
        ValueError: If the box is empty, a target is infinite or all are NaN, there is not one target for each output, a
            fixed value or a start lies outside of the box, a number is out of its range, or the function's values have
            other shapes.
    """
    if not isinstance(num_starts, int) or num_starts < 1:
        raise ValueError(f"num_starts = {num_starts!r}; expected an integer of at least 1.")
    equations = pose(function, low, high, target, scale, fixed, tolerance, max_iterations)
    starts = equations.spread(num_starts, generator) if starts is None else equations.check_starts(starts)
    if prior is not None and len(prior.mean) != starts.shape[-1]:
        raise ValueError(
            f"the prior has {len(prior.mean)} inputs and the box {starts.shape[-1]}; give a mean for each."
        )

    batch, num_iterations = newton(equations, equations.evaluate(starts), max_iterations)
    converged, distance = batch.norm <= tolerance, None
    if prior is not None:
        batch, converged, num_steps = approach(equations, prior, batch, max_iterations)
        num_iterations, distance = num_iterations + num_steps, prior.distance(batch.x)
    # Solutions in the order of the starts or of the prior, then the rest, the smallest residual first.
    key = batch.norm.masked_fill(converged, 0.0) if distance is None else torch.where(converged, distance, batch.norm)
    order = key.argsort(stable=True)
    order = order[(~converged)[order].byte().argsort(stable=True)]
    order = order[_is_new(batch.x[order] / equations.size)]
    return InversionResult(
        x=batch.x[order],
        prediction=batch.values[order],
        residual=batch.norm[order],
        converged=converged[order],
        distance=None if distance is None else distance[order],
        num_iterations=num_iterations,
        num_starts=len(starts),
    )


@torch.no_grad()
def level_set(
    function: Function,
    low: Tensor | Sequence[float],
    high: Tensor | Sequence[float],
    target: float | Sequence[float] | Tensor,
    num_points: int,
    *,
    tolerance: float = 1e-8,
    max_iterations: int = 50,
    scale: float | Sequence[float] | Tensor | None = None,
    fixed: Mapping[int, float] | None = None,
    generator: torch.Generator | None = None,
) -> LevelSet:
    """Well-spread points of the set of all x in the box with f(x) = target.

    Several times as many starts as points go to the set by the steps of :func:`invert`. Of these, each next point is
    the farthest from those taken before, in box widths (T. F. Gonzalez, Theoretical Computer Science 38, 1985).

    Args:
        function: As for :func:`invert`, like the arguments after it.
        low: Lower ends of the box, (num_inputs,).
        high: Upper ends, likewise.
        target: One number for each output; NaN leaves the output free. The set is a curve or more where there are more
            inputs to move than targets.
        num_points: Points to return, at most.
        tolerance: Largest residual of a point, as a fraction of ``scale``.
        max_iterations: Newton steps, at most.
        scale: Unit of the residuals.
        fixed: Inputs to hold.
        generator: Draws the scrambling of the starts.

    Raises:
        ValueError: As :func:`invert`, and if ``num_points`` is below 1.
    """
    if not isinstance(num_points, int) or num_points < 1:
        raise ValueError(f"num_points = {num_points!r}; expected an integer of at least 1.")
    equations = pose(function, low, high, target, scale, fixed, tolerance, max_iterations)
    starts = equations.spread(STARTS_PER_POINT * num_points, generator)
    batch, num_iterations = newton(equations, equations.evaluate(starts), max_iterations)
    on_set = (batch.norm <= tolerance).nonzero()[:, 0]
    taken = on_set[_farthest_points(batch.x[on_set] / equations.size, num_points)]
    return LevelSet(x=batch.x[taken], residual=batch.norm[taken], num_iterations=num_iterations)


def _is_new(x: Tensor) -> Tensor:
    """Whether no point before it that is new itself lies near: (points, inputs) in box widths -> (points,)."""
    near = (torch.cdist(x, x, p=inf) < DISTINCT).tril(-1)
    new = torch.ones(len(x), dtype=torch.bool)
    while True:  # the first n are right after n rounds, nearly always all after two
        before, new = new, ~(near & new).any(-1)
        if torch.equal(before, new):
            return new


def _farthest_points(x: Tensor, num_points: int) -> Tensor:
    """Indices of at most ``num_points`` distinct points of x (points, inputs), each the farthest from the others."""
    if not len(x):
        return torch.zeros(0, dtype=torch.long)
    taken = [0]
    squares = (x - x[0]).square().sum(-1)
    smallest = x.shape[-1] * DISTINCT**2  # from here on points differ by DISTINCT in at least one input
    while len(taken) < num_points and squares.max() >= smallest:
        taken.append(int(squares.argmax()))
        squares = torch.minimum(squares, (x - x[taken[-1]]).square().sum(-1))
    return torch.tensor(taken)
