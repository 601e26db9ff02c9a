r"""Refinement of candidates by the physics that checks them, monotone in the checked error.

First in the latent space: what the head is asked for is shifted by the observed error of the checked cell, as in a
secant method, so that the head's own errors drop out. Where voxels are too coarse or the decoder too stiff for that,
surface voxels are exchanged, solid for void, at the same volume: they are chosen by the derivatives of the checked
properties with respect to the phase, a level set method of topology optimisation (M. Y. Wang, X. Wang and D. Guo,
Comput. Methods Appl. Mech. Eng. 192, 2003) that ends at the target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leviathan.janus.candidates import Candidates, Goal, cut, predicted, realise, shared_boundary, standardise
from leviathan.janus.cells import FREE, bicontinuous, symmetrise, threshold
from leviathan.janus.latent_search import residuals, search
from leviathan.janus.physics import properties

if TYPE_CHECKING:
    from leviathan.janus.modeling import SnaJanusModel

GOOD = 2e-3  # relative error at which a candidate is left alone
CELLS_AT_ONCE = 64  # whose fields are kept for the derivatives
NUM_LENGTHS, LENGTH_RATIO = 28, 0.7  # of the steps along the derivatives, of which the best by linear estimate is tried
LONGEST = 1.0  # step, in standard deviations of the scores of the solid's surface
# A voxel of void seen as solid to first order counts too much, one of solid too little: strains change with it.
ADDED, REMOVED = 0.4, 1.3
RIDGE, TINY = 1e-9, 1e-300  # of the Gram matrix of the derivatives
CALIBRATION = 4.0  # largest correction of these by one observation


def steer(
    model: SnaJanusModel, goal: Goal, found: Candidates, prior_weight: float, num_steps: int, num_rounds: int
) -> Candidates:
    """Searches again for what the head predicts plus the checked error, and keeps what has a smaller error.

    The shift of a row is halved where it did not help.
    """
    share = torch.ones_like(found.error).unsqueeze(-1)
    for _ in range(num_rounds):
        rows = ((found.error > GOOD) & found.valid).nonzero()[:, 0]
        if not len(rows):
            break
        here, now = goal.rows(rows), found.rows(rows)
        wanted, seen = (standardise(model.config, goal.columns, values) for values in (here.values, now.values))
        targets = standardise(model.config, goal.columns, predicted(model, here, now.latents))
        targets = targets + share[rows] * (wanted - seen).nan_to_num(0.0)
        z = search(model, residuals(model, here, targets), now.latents, prior_weight, num_steps)
        trial = realise(model, here, z, check=True)
        better = _is_better(trial, now)
        share[rows[~better]] /= 2
        found = found.with_rows(rows, better, trial)
    return found


def exchange(model: SnaJanusModel, goal: Goal, found: Candidates, num_rounds: int) -> tuple[Candidates, Tensor]:
    """Exchanges surface voxels at the same volume, and keeps what has a smaller error.

    Returns the candidates, and how many voxels of each array have become solid, as many as have become void: (rows,).
    """
    rows = ((found.error > GOOD) & found.valid).nonzero()[:, 0]
    before = found.cells
    for part in rows.split(CELLS_AT_ONCE) if len(rows) else ():
        after = _exchange(model, goal.rows(part), found.rows(part), num_rounds)
        found = found.with_rows(part, torch.ones_like(part, dtype=torch.bool), after)
    return found, (found.cells & ~before).flatten(1).sum(-1)


def _is_better(trial: Candidates, now: Candidates) -> Tensor:
    """Whether it is of the same rank but for its error, and that is less: so no design's best one gets worse."""
    return trial.valid & (trial.exact == now.exact) & (trial.error < now.error)


def _exchange(model: SnaJanusModel, goal: Goal, found: Candidates, num_rounds: int) -> Candidates:
    physics = model.config.physics
    _, slopes, _ = _differentiate(model, goal, found.cells)
    calibration = torch.ones_like(found.values)
    longest = torch.full_like(found.error, LONGEST)
    going = torch.ones_like(found.valid)
    for _ in range(num_rounds):
        rows = (going & (found.error > GOOD)).nonzero()[:, 0]
        if not len(rows):
            break
        here, now = goal.rows(rows), found.rows(rows)
        proposal = _propose(model, here, now, slopes[rows], calibration[rows], longest[rows])
        scores, cells, expected, length = proposal
        going[rows] = expected.isfinite().all(-1)
        values, new_slopes, converged = _differentiate(model, here, cells)
        connected = bicontinuous(cells, physics.symmetry)
        error = here.errors(values).amax(-1)
        trial = Candidates(now.latents, scores, cells, connected, here.is_exact(cells), values, converged, error)
        better = _is_better(trial, now) & going[rows]
        ratio = ((values - now.values) / expected).nan_to_num(1.0).clamp(1 / CALIBRATION, CALIBRATION)
        calibration[rows] = torch.where(trial.valid.unsqueeze(-1), calibration[rows] * ratio, calibration[rows])
        longest[rows] = torch.where(trial.valid, longest[rows], length / 2)
        found = found.with_rows(rows, better, trial)
        slopes[rows[better]] = new_slopes[better]
    return found


def _differentiate(model: SnaJanusModel, goal: Goal, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Properties (rows, targets), their derivatives in the phase (rows, targets, m, ...), whether they converged."""
    physics = model.config.physics
    with torch.enable_grad():
        phase = cells.to(model.latent_mean.dtype).requires_grad_()
        checked = properties(phase, goal.names, physics, differentiable=True)
        values = [checked.values[name] for name in goal.names]
        slopes = [torch.autograd.grad(value.sum(), phase, retain_graph=True)[0] for value in values]
    slopes = torch.stack([symmetrise(slope, physics.symmetry) for slope in slopes], 1)
    return torch.stack(values, -1).detach().double(), slopes.double(), checked.converged


def _propose(
    model: SnaJanusModel, goal: Goal, now: Candidates, slopes: Tensor, calibration: Tensor, longest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, cells, changes of the targets that are expected (rows, targets) and length of the step to try next.

    The direction is the combination of the derivatives on the surface that takes all targets home in the linear
    estimate, at constant volume; along it the length is the one of the least expected error. The changes are NaN where
    none is expected to help.
    """
    symmetry, shape = model.config.symmetry, now.cells.shape[1:]
    surface = _surface(now.cells, symmetry).flatten(1).unsqueeze(1)
    if (boundary := shared_boundary(model)) is not None:
        surface = surface & (boundary == FREE).flatten()
    count = surface.sum(-1, keepdim=True).clamp(min=1)
    slopes = slopes.flatten(2)
    relative = slopes / goal.units.unsqueeze(-1) * surface
    relative = (relative - relative.sum(-1, keepdim=True) / count) * surface
    gram = relative @ relative.mT
    gram = gram + RIDGE * gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=TINY).view(-1, 1, 1) * torch.eye(
        gram.shape[-1], dtype=gram.dtype, device=gram.device
    )
    wanted = ((goal.values - now.values) / goal.units).unsqueeze(-1)
    direction = (relative * torch.linalg.solve(gram, wanted)).sum(1)
    direction = direction / direction.abs().amax(-1, keepdim=True).clamp(min=TINY)

    scores = now.scores.double().flatten(1)
    near = surface[:, 0] & now.cells.flatten(1)
    number = near.sum(-1, keepdim=True).clamp(min=1)
    mean = scores.where(near, 0.0).sum(-1, keepdim=True) / number
    spread = ((scores - mean).where(near, 0.0).square().sum(-1, keepdim=True) / number).sqrt()
    lengths = longest.unsqueeze(-1) * LENGTH_RATIO ** torch.arange(NUM_LENGTHS).to(scores)
    trials = scores.unsqueeze(1) + (lengths * spread).unsqueeze(-1) * direction.unsqueeze(1)
    fractions = now.cells.flatten(1).double().mean(-1).repeat_interleave(NUM_LENGTHS)
    cells = threshold(trials.reshape(-1, *shape), fractions, symmetry, boundary).view_as(trials)

    old = now.cells.flatten(1).unsqueeze(1)
    weight = ADDED * (cells & ~old).double() - REMOVED * (old & ~cells).double()
    changes = weight @ slopes.mT * calibration.unsqueeze(1)
    errors = ((now.values.unsqueeze(1) + changes - goal.values.unsqueeze(1)).abs() / goal.units.unsqueeze(1)).amax(-1)
    errors = errors.masked_fill((cells == old).all(-1), torch.inf)
    least, best = errors.min(-1)
    each = torch.arange(len(best), device=best.device)
    expected = changes[each, best].masked_fill((least >= now.error).unsqueeze(-1), torch.nan)
    scores, cells = cut(model, trials[each, best].view(-1, *shape), fractions[::NUM_LENGTHS])
    return scores, cells, expected, lengths[each, best]


def _surface(cells: Tensor, symmetry: str) -> Tensor:
    """Voxels with a neighbour of the other phase, (rows, m, ...)."""
    surface = torch.zeros_like(cells)
    for axis in range(1, cells.ndim):
        size = cells.shape[axis]
        differs = cells.narrow(axis, 1, size - 1) != cells.narrow(axis, 0, size - 1)
        surface.narrow(axis, 0, size - 1).logical_or_(differs)
        surface.narrow(axis, 1, size - 1).logical_or_(differs)
        if symmetry == "none":
            differs = cells.narrow(axis, 0, 1) != cells.narrow(axis, size - 1, 1)
            surface.narrow(axis, 0, 1).logical_or_(differs)
            surface.narrow(axis, size - 1, 1).logical_or_(differs)
    return surface
