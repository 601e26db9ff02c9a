r"""The equations f(x) = target in a box, and damped Newton steps on them from many points at once.

With r = (target - f(x)) / scale and J the Jacobian of f / scale, in coordinates in which the box has width one, the
step is the shortest that solves the linearised equations,

.. math::
    s = J^T (J J^T + \mu I)^{-1} r

(Levenberg-Marquardt; Nocedal and Wright, Numerical Optimization, 2nd ed., section 10.3), square and overdetermined
systems included. Where the residual does not fall :math:`\mu` grows, which shortens the step. Inputs on a face of the
box that would step out of it are held for that step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

Function = Callable[[Tensor], tuple[Tensor, Tensor]]

SCALE_POINTS = 64  # points of the box whose values tell an output's range
ROUNDING = 1e-12  # a difference that is smaller than this beside the numbers is none
ROUND = 6  # steps in which a start has to halve its residual
SMALLEST_DAMPING = 1e-12  # for systems whose equations depend on one another
LONGEST_STEP = 0.5  # of a system of equations, in box widths
TINY = torch.finfo(torch.float64).tiny


class Batch(NamedTuple):
    """Points, and what the function is there."""

    x: Tensor  # (points, num_inputs)
    values: Tensor  # (points, num_outputs)
    residual: Tensor  # (points, targets), in units of the scale
    jacobian: Tensor  # (points, targets, num_inputs), in units of the scale per box width
    norm: Tensor  # (points,), the largest residual

    def select(self, index: Tensor) -> Batch:
        """The points of these indices."""
        return Batch(*(t[index] for t in self))

    def replace_at(self, index: Tensor, other: Batch) -> Batch:
        """These points with the other's in their places ``index``."""
        if len(other.x) == len(self.x):
            return other
        return Batch(*(t.index_copy(0, index, o) for t, o in zip(self, other, strict=True)))

    def where(self, mask: Tensor, other: Batch) -> Batch:
        """The other's points where the mask says so, else these."""
        if mask.all():
            return other
        return Batch(*(torch.where(mask.view(-1, *[1] * (t.ndim - 1)), o, t) for t, o in zip(self, other, strict=True)))


@dataclass(frozen=True, eq=False)
class Equations:
    """f = target in a box. A fixed input is an interval of width zero: derivatives in it, per width, vanish."""

    function: Function
    low: Tensor
    high: Tensor
    size: Tensor  # of the whole box, fixed inputs included
    num_outputs: int
    outputs: Tensor | slice  # the targeted ones
    target: Tensor  # (targets,)
    scale: Tensor  # (targets,)
    tolerance: float

    @cached_property
    def width(self) -> Tensor:
        """Of what is left of the box: zero for fixed inputs."""
        return self.high - self.low

    @cached_property
    def jacobian_unit(self) -> Tensor:
        """What turns a derivative into one in units of the scale per box width."""
        return self.width / self.scale.unsqueeze(-1)  # (targets, num_inputs)

    def call(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The function at x; a ``ValueError`` where the shapes of what it gives do not fit the targets."""
        values, jacobian = self.function(x)
        expected = (len(x), self.num_outputs)
        if values.shape != expected or jacobian.shape != (*expected, x.shape[-1]):
            raise ValueError(
                f"for {self.num_outputs} targets and {len(x)} points the function gave values of shape "
                f"{tuple(values.shape)} and derivatives of shape {tuple(jacobian.shape)}; expected {expected} and "
                f"{(*expected, x.shape[-1])}: give one target for each output, NaN for those left free."
            )
        return values, jacobian

    def evaluate(self, x: Tensor) -> Batch:
        """The batch of the points x; where the function is not a number the residual is infinite."""
        values, jacobian = self.call(x)
        residual = (self.target - values[:, self.outputs]) / self.scale
        norm = residual.abs().amax(-1).nan_to_num(nan=inf)
        jacobian = jacobian[:, self.outputs] * self.jacobian_unit
        return Batch(x, values, residual, jacobian, norm)

    def move(self, x: Tensor, step: Tensor) -> Tensor:
        """Where a step in box widths leads from x, brought back to the nearest point of the box."""
        return torch.addcmul(x, step, self.width).clamp(self.low, self.high)

    def spread(self, num_points: int, generator: torch.Generator | None) -> Tensor:
        """Points of a scrambled Sobol sequence in the box."""
        seed = 0 if generator is None else int(torch.randint(2**31, (), generator=generator))
        return self.move(self.low, _sobol(len(self.low), num_points, seed))

    def check_starts(self, starts: Tensor) -> Tensor:
        """The starts in float64, with the fixed inputs put in."""
        starts = torch.as_tensor(starts, dtype=torch.float64)
        num_inputs = len(self.low)
        if starts.ndim != 2 or starts.shape[-1] != num_inputs or not len(starts):
            raise ValueError(
                f"starts have shape {tuple(starts.shape)}; expected (num_starts, {num_inputs}), not empty."
            )
        free = self.width > 0
        outside = ~((starts >= self.low) & (starts <= self.high)) & free  # NaN is outside
        if outside.any():
            n, i = outside.nonzero()[0].tolist()
            raise ValueError(
                f"starts[{n}, {i}] = {starts[n, i]:g} lies outside input {i}'s interval "
                f"[{self.low[i]:g}, {self.high[i]:g}]; give starts in the box."
            )
        return torch.where(free, starts, self.low)


def pose(
    function: Function,
    low: Tensor | Sequence[float],
    high: Tensor | Sequence[float],
    target: float | Sequence[float] | Tensor,
    scale: float | Sequence[float] | Tensor | None,
    fixed: Mapping[int, float] | None,
    tolerance: float,
    max_iterations: int,
) -> Equations:
    """Checks what both public functions take."""
    low, high, target = (torch.as_tensor(v, dtype=torch.float64) for v in (low, high, target))
    if low.ndim != 1 or low.shape != high.shape or not len(low):
        raise ValueError(
            f"low and high have shapes {tuple(low.shape)} and {tuple(high.shape)}; expected (num_inputs,)."
        )
    size = high - low
    if not (size.isfinite() & (size > 0)).all():
        raise ValueError(f"low = {low.tolist()} and high = {high.tolist()}; expected finite ends with low < high.")
    if not isinstance(max_iterations, int) or max_iterations < 1:
        raise ValueError(f"max_iterations = {max_iterations!r}; expected an integer of at least 1.")
    if not 0 < tolerance < inf:
        raise ValueError(f"tolerance = {tolerance}; expected a number above 0.")
    target = target.reshape(-1)
    targeted = ~target.isnan()
    if target.isinf().any() or not targeted.any():
        raise ValueError(f"target = {target.tolist()}; expected numbers, at least one, and NaN for outputs left free.")

    low, high = low.clone(), high.clone()
    for i, value in (fixed or {}).items():
        if not isinstance(i, int) or not 0 <= i < len(low):
            raise ValueError(f"fixed names input {i!r}; expected an integer from 0 to {len(low) - 1}.")
        if not low[i] <= value <= high[i]:
            raise ValueError(
                f"fixed input {i} = {value} lies outside its interval [{low[i]:g}, {high[i]:g}]; fix it inside."
            )
        low[i] = high[i] = value

    outputs = slice(None) if targeted.all() else targeted.nonzero()[:, 0]
    equations = Equations(function, low, high, size, len(target), outputs, target[outputs], size.new_ones(1), tolerance)
    if scale is None:
        values, _ = equations.call(equations.spread(SCALE_POINTS, None))
        scale = _range(values)
    scale = torch.as_tensor(scale, dtype=torch.float64).reshape(-1)
    if len(scale) not in (1, len(target)) or not (scale.isfinite() & (scale > 0)).all():
        raise ValueError(
            f"scale = {scale.tolist()}; expected finite numbers above 0, one or one for each of {len(target)} outputs."
        )
    return replace(equations, scale=scale.expand(len(target))[outputs])


def _range(values: Tensor) -> Tensor:
    """What each output varies by over its finite values, 1 where that is nothing: any unit serves a constant."""
    missing = ~values.isfinite()
    lowest, highest = values.masked_fill(missing, inf).amin(0), values.masked_fill(missing, -inf).amax(0)
    varies = highest - lowest > ROUNDING * torch.maximum(highest, -lowest)
    return torch.where(varies, highest - lowest, 1.0)


def newton(equations: Equations, batch: Batch, max_iterations: int) -> tuple[Batch, int]:
    """Takes every point to f = target as far as it goes; returns the points and the number of evaluations.

    Works in rounds of a few steps. The next round goes on with those that are not there yet but came nearer by half:
    near a local minimum of the residual a start would crawl on to no end.
    """
    going = (batch.norm > equations.tolerance).nonzero()[:, 0]
    num_iterations = 0
    while len(going) and num_iterations < max_iterations:
        before = batch.select(going)
        after, num_steps = _round(equations, before, min(ROUND, max_iterations - num_iterations))
        num_iterations += num_steps
        batch = batch.replace_at(going, after)
        going = going[(after.norm > equations.tolerance) & (_square(after.residual) < _square(before.residual) / 4)]
    return batch, num_iterations


def _round(equations: Equations, batch: Batch, max_iterations: int) -> tuple[Batch, int]:
    """At most so many damped steps, fewer where all points get there."""
    damping = torch.zeros_like(batch.norm)
    for iteration in range(max_iterations):
        trial = equations.evaluate(_move(equations, batch, damping))
        better = _square(trial.residual) < _square(batch.residual)
        batch = batch.where(better, trial)
        if (batch.norm <= equations.tolerance).all():
            return batch, iteration + 1
        damping = torch.where(better, damping / 16, (damping * 4).clamp(min=1.0))
    return batch, max_iterations


def _move(equations: Equations, batch: Batch, damping: Tensor) -> Tensor:
    """Where the damped Newton step leads in the box.

    Inputs that the step would only push through a face are held, and the others take over.
    """
    x, residual, jacobian = batch.x, batch.residual, batch.jacobian
    held = None
    while True:
        trace = jacobian.square().sum((1, 2))
        if residual.shape[1] == 1:
            step = jacobian.squeeze(1) * (residual / (trace * (1 + damping) + TINY).unsqueeze(-1))
        else:
            system = jacobian @ jacobian.mT
            system.diagonal(dim1=1, dim2=2).add_(((damping + SMALLEST_DAMPING) * trace + TINY).unsqueeze(-1))
            step = (jacobian.mT @ torch.linalg.solve_ex(system, residual.unsqueeze(-1)).result).squeeze(-1)
            # Near a singular system the step has no bound, and the box would bend it.
            step = step * (LONGEST_STEP / (step.abs().amax(-1, keepdim=True) + TINY)).clamp(max=1.0)
        moved = equations.move(x, step.nan_to_num(0.0))  # a start where f is not finite stays there
        stays = moved == x
        if not (stays if held is None else stays & ~held).any():
            return moved
        held = stays
        jacobian = jacobian.masked_fill(held.unsqueeze(1), 0.0)


def _square(residual: Tensor) -> Tensor:
    return residual.square().sum(-1)


@lru_cache(maxsize=16)
def _sobol(num_inputs: int, num_points: int, seed: int) -> Tensor:
    return torch.quasirandom.SobolEngine(num_inputs, scramble=True, seed=seed).draw(num_points, dtype=torch.float64)
