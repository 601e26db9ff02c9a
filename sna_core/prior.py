r"""Normal priors, and the points of a solution set where their density is highest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from sna_core.newton import ROUNDING, SMALLEST_DAMPING, TINY, Batch, Equations, newton

SHORTEST_STEP = 1e-6  # in box widths: there the search along the solution set ends
DIFFERENCE = 1e-6  # in box widths, between derivatives
CHANGES_PER_INPUT = 3  # of the active set
LARGE = 1e6  # beside the entries of a Hessian
RETURN_STEPS = 12  # Newton steps from the tangent plane back to the set


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    r"""Normal distribution of the inputs, :math:`p(x) \propto \exp(-\tfrac12 (x - m)^T P (x - m))`.

    Args:
        mean: m, (num_inputs,).
        precision: P, (num_inputs, num_inputs), symmetric and positive definite: the inverse of the covariance.

    Raises:
        ValueError: If a value is not finite, the shapes do not fit or the precision is not positive definite.
    """

    mean: Tensor
    precision: Tensor

    def __post_init__(self) -> None:
        mean, precision = (torch.as_tensor(v, dtype=torch.float64) for v in (self.mean, self.precision))
        if mean.ndim != 1 or precision.shape != (len(mean), len(mean)):
            raise ValueError(
                f"mean has shape {tuple(mean.shape)} and precision {tuple(precision.shape)}; expected (d,) and (d, d)."
            )
        if not (mean.isfinite().all() and precision.isfinite().all()):
            raise ValueError("mean or precision is not finite; expected finite numbers.")
        if not torch.allclose(precision, precision.mT) or torch.linalg.cholesky_ex(precision).info.item():
            raise ValueError("precision is not symmetric positive definite; give the inverse of a covariance matrix.")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "precision", precision)

    @classmethod
    def independent(cls, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> GaussianPrior:
        """Independent inputs with these means and standard deviations (num_inputs,), all above 0."""
        std = torch.as_tensor(std, dtype=torch.float64)
        if not (std > 0).all():
            raise ValueError(f"std = {std.tolist()}; expected numbers above 0.")
        return cls(torch.as_tensor(mean, dtype=torch.float64), std.square().reciprocal().diag())

    def distance(self, x: Tensor) -> Tensor:
        """Mahalanobis distance from the mean: (..., num_inputs) -> (...)."""
        offset = x - self.mean
        return ((offset @ self.precision) * offset).sum(-1).sqrt()


def approach(
    equations: Equations, prior: GaussianPrior, batch: Batch, max_iterations: int
) -> tuple[Batch, Tensor, int]:
    """Takes every solution along the solution set to where the prior's density is largest, at least nearby.

    A step in the tangent plane, back to the set by Newton's method, and a shorter step where that did not pay: a point
    has arrived where no step does. Returns the points, whether they have arrived, and the number of evaluations.
    """
    on_set = batch.norm <= equations.tolerance
    fraction = torch.ones_like(batch.norm)
    num_evaluations = 0
    for _ in range(max_iterations):
        step = _tangent_step(equations, prior, batch)
        active = on_set & (fraction * step.abs().amax(-1) > SHORTEST_STEP)
        if not active.any():
            break
        moved = equations.move(batch.x, step * (fraction * active).unsqueeze(-1))
        trial, num_steps = newton(equations, equations.evaluate(moved), RETURN_STEPS)
        num_evaluations += 2 + num_steps
        better = active & (trial.norm <= equations.tolerance) & (prior.distance(trial.x) < prior.distance(batch.x))
        batch = batch.where(better, trial)
        fraction = torch.where(better, (fraction * 2).clamp(max=1.0), fraction / 4)
    return batch, on_set & ~active, num_evaluations


def _tangent_step(equations: Equations, prior: GaussianPrior, batch: Batch) -> Tensor:
    """The step of sequential quadratic programming, in box widths: (points, num_inputs).

    With the Hessian of the Lagrangian where that is convex on the tangent plane (Nocedal and Wright, Numerical
    Optimization, 2nd ed., section 18.1), else with the prior's alone: Newton's step would go to a saddle.
    """
    width = equations.width
    pull = ((prior.mean - batch.x) @ prior.precision) * width
    precision = (width.unsqueeze(-1) * prior.precision * width).expand(len(pull), -1, -1)
    plain, multipliers, _ = _quadratic_programme(equations, batch, precision, pull)
    hessian = precision + _curvature(equations, batch, multipliers)
    newton_step, _, held = _quadratic_programme(equations, batch, hessian, pull)
    uphill = (pull * newton_step).sum(-1) > 0
    chosen = uphill & _is_convex(hessian, batch.jacobian, held)
    return torch.where(chosen.unsqueeze(-1), newton_step, plain)


def _is_convex(hessian: Tensor, jacobian: Tensor, held: Tensor) -> Tensor:
    """Whether s . hessian s > 0 for all s != 0 with J s = 0 and without the held inputs: (points,).

    It is if and only if the Hessian plus a large multiple of J^T J is positive definite (Debreu 1952).
    """
    rows = jacobian.masked_fill(held.unsqueeze(1), 0.0)
    rows = rows / (rows.norm(dim=-1, keepdim=True) + TINY)
    either = held.unsqueeze(-1) | held.unsqueeze(-2)
    bent = hessian.masked_fill(either, 0.0) + torch.diag_embed(held.to(hessian.dtype))
    large = LARGE * bent.abs().amax((-1, -2), keepdim=True)
    return torch.linalg.cholesky_ex(bent + large * (rows.mT @ rows)).info == 0


def _curvature(equations: Equations, batch: Batch, multipliers: Tensor) -> Tensor:
    """Hessian of multipliers . f, by differences of the Jacobian: (points, num_inputs, num_inputs)."""
    num_points, num_inputs = batch.x.shape
    forward = torch.where(batch.x > (equations.low + equations.high) / 2, -DIFFERENCE, DIFFERENCE)  # into the box
    moved = equations.move(batch.x.unsqueeze(1), torch.diag_embed(forward)).flatten(0, 1)
    jacobians = equations.evaluate(moved).jacobian.unflatten(0, (num_points, num_inputs))
    change = (jacobians - batch.jacobian.unsqueeze(1)) / forward.view(num_points, num_inputs, 1, 1)
    hessian = torch.einsum("pioj,po->pij", change, multipliers)
    return (hessian + hessian.mT) / 2


def _quadratic_programme(
    equations: Equations, batch: Batch, hessian: Tensor, pull: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The step s that maximises pull . s - s . hessian s / 2 where J s = 0 and x + s is in the box.

    Active sets from s = 0 on, one input in or out at a time (Nocedal and Wright, algorithm 16.3): wherever it ends, s
    is in the box and, with a convex Hessian, uphill. Returns s, the multipliers of J s = 0 and the held inputs.
    """
    x, jacobian, movable = batch.x, batch.jacobian, equations.width > 0
    unit = hessian.abs().amax((-1, -2), keepdim=True) + TINY  # so that what is small beside 1 is small beside it
    hessian, pull = hessian / unit, pull / unit.squeeze(-1)
    width = torch.where(movable, equations.width, 1.0)
    lowest, highest = (equations.low - x) / width, (equations.high - x) / width
    num_inputs, num_targets = x.shape[-1], jacobian.shape[1]
    identity = torch.eye(num_inputs, num_inputs + num_targets, dtype=x.dtype)
    # Beside the multipliers a little, against outputs that depend on one another.
    corner = -(SMALLEST_DAMPING * jacobian.square().sum(-1) + TINY).diag_embed()
    free_rows, last_rows = torch.cat([hessian, jacobian.mT], -1), torch.cat([jacobian, corner], -1)
    nothing = torch.zeros_like(batch.residual)
    rounding = ROUNDING * pull.abs().amax(-1, keepdim=True)
    step, slope, held = torch.zeros_like(x), pull, (~movable).expand_as(x)
    for _ in range(CHANGES_PER_INPUT * num_inputs):
        system = torch.cat([torch.where(held.unsqueeze(-1), identity, free_rows), last_rows], -2)
        right = torch.cat([slope.masked_fill(held, 0.0), nothing], -1)
        solution = torch.linalg.solve_ex(system, right.unsqueeze(-1)).result.squeeze(-1).nan_to_num(0.0, 0.0, 0.0)
        change, multipliers = solution.split([num_inputs, num_targets], -1)
        wall = torch.where(change > 0, highest, lowest)
        share = ((wall - step) / change).masked_fill(held | (change == 0), inf)
        smallest = share.amin(-1, keepdim=True)
        hit = (share == smallest) & (smallest < 1)
        step = torch.where(hit, wall, step + change * smallest.clamp(max=1.0)).clamp(lowest, highest)
        slope = pull - (hessian @ step.unsqueeze(-1)).squeeze(-1)
        # A held input may go where the slope along the solution set leads back into the box.
        inward = slope - (jacobian.mT @ multipliers.unsqueeze(-1)).squeeze(-1)
        inward = torch.where(step == lowest, inward, -inward).masked_fill(~(held & movable) | (smallest < 1), 0.0)
        freed = (inward > rounding) & (inward == inward.amax(-1, keepdim=True))
        if not (hit | freed).any():
            break
        held = (held | hit) & ~freed
    return step, multipliers * unit.squeeze(-1), held
