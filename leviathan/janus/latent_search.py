r"""Search in the latent space: where to start, and the steps from there.

With the residuals :math:`r(z)` of a candidate, the code :math:`z_0` it starts from, and the precision P of the codes of
training cells, a candidate is the minimiser near :math:`z_0` of

.. math::
    \lVert r(z) \rVert^2 + \frac{\lambda}{d} (z - z_0)^T P (z - z_0).

The Gaussian prior stands at the start of each candidate, not at the mean of all codes, where all candidates would end
up alike and few cells are. Randomize-then-optimize (J. M. Bardsley et al., SIAM J. Sci. Comput. 36, 2014) moves the
prior's mean likewise; as starts are chosen for their properties here and targets not perturbed, candidates are not
draws from a posterior.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from leviathan.janus.candidates import Goal, binarise, decode, encode, standardise

if TYPE_CHECKING:
    from leviathan.janus.modeling import SnaJanusModel

POOL = 4  # times as many codes as candidates, of which those far apart from each other are taken
JITTER = 0.1  # of the starts, in standard deviations of the codes
FIRST_DAMPING, LEAST_DAMPING, MOST_DAMPING = 1e-2, 1e-8, 1e8
DAMPING_FACTOR = 4.0
ROUNDING = 1e-12  # keeps the root of a cross-entropy differentiable

Residuals = Callable[[Tensor], Tensor]


def residuals(model: SnaJanusModel, goal: Goal, targets: Tensor | None = None) -> Residuals:
    """Residuals r of codes (rows, d), whose squares sum up to the objective of each row.

    Weighted errors of standardised properties against ``targets`` (rows, targets), by default those of the goal; of a
    classification the root of twice the cross-entropy.
    """
    if not goal.columns:
        classes = goal.values[:, 0].long()

        def of_classes(z: Tensor) -> Tensor:
            entropy = F.cross_entropy(model.predict(z, scaled=True), classes, reduction="none")
            return (2 * entropy + ROUNDING).sqrt().unsqueeze(-1)

        return of_classes
    targets = standardise(model.config, goal.columns, goal.values) if targets is None else targets
    targets, roots = targets.to(model.latent_mean), goal.weights.to(model.latent_mean).sqrt()
    return lambda z: (model.predict(z, scaled=True)[:, goal.columns] - targets) * roots


@torch.no_grad()
def starts(model: SnaJanusModel, goal: Goal, count: int, generator: torch.Generator) -> Tensor:
    """Codes to start from, (rows, count, d): of training cells whose predicted properties are near the targets.

    Of the nearest, more than are needed, the very nearest comes first and each next one is the farthest from those
    before (T. F. Gonzalez, Theoretical Computer Science 38, 1985), in the metric of the codes' precision. A model that
    remembers no codes starts from draws of its normal distribution.
    """
    d, mean = len(model.latent_mean), model.latent_mean
    factor = torch.linalg.cholesky(model.latent_precision.double())  # P = L L^T
    noise = torch.randn(POOL * count, d, generator=generator, dtype=torch.float64).to(mean.device)
    draws = torch.linalg.solve_triangular(factor.mT, noise.mT, upper=True).mT.to(mean)
    codes = model.codes[: int(model.code_count)] if model.code_count else mean + draws
    prediction = model.predict(codes, scaled=True)
    if goal.columns:
        offsets = prediction[:, goal.columns] - standardise(model.config, goal.columns, goal.values).to(mean).unsqueeze(
            1
        )
        misfit = (offsets.square() * goal.weights.to(mean)).sum(-1)
    else:
        misfit = -prediction.log_softmax(-1).mT[goal.values[:, 0].long()]
    pool = misfit.argsort(dim=-1, stable=True)[:, : POOL * count]
    white = (codes.double() @ factor)[pool]
    taken = torch.zeros(len(pool), 1, dtype=torch.long, device=pool.device)
    squares = torch.full(pool.shape, torch.inf, dtype=torch.float64, device=pool.device)
    while taken.shape[1] < min(count, pool.shape[1]):
        last = white.gather(1, taken[:, -1:, None].expand(-1, -1, d))
        squares = torch.minimum(squares, (white - last).square().sum(-1))
        taken = torch.cat([taken, squares.argmax(-1, keepdim=True)], 1)
    chosen = codes[pool.gather(1, taken)]
    return chosen[:, torch.arange(count) % chosen.shape[1]] + JITTER * draws[:count]


def search(model: SnaJanusModel, residuals: Residuals, z: Tensor, prior_weight: float, num_steps: int) -> Tensor:
    r"""Levenberg-Marquardt steps from the codes z (rows, d), each row by itself.

    With :math:`\delta = z - z_0`, covariance :math:`S = P^{-1}`, damping :math:`\mu` in the metric of P,
    :math:`c = (\lambda + \mu) / d` and :math:`\rho = \lambda / (\lambda + \mu)` the step is

    .. math::
        - \rho \delta - S J^T (J S J^T + c)^{-1} (r - \rho J \delta),

    whose matrix is as small as the number of residuals.
    """
    start, d = z, z.shape[-1]
    precision = model.latent_precision.double()
    covariance = torch.linalg.inv(precision).to(z)
    precision = precision.to(z)

    def objective(r: Tensor, z: Tensor) -> Tensor:
        offset = z - start
        return r.square().sum(-1) + prior_weight / d * ((offset @ precision) * offset).sum(-1)

    damping = torch.full((len(z), 1), FIRST_DAMPING, dtype=z.dtype, device=z.device)
    r, jacobian = _with_jacobian(residuals, z)
    value = objective(r, z)
    for _ in range(num_steps):
        gathered = jacobian @ covariance  # J S, as S is symmetric
        share = prior_weight / (prior_weight + damping)
        pull = share * (z - start)
        gram = gathered @ jacobian.mT + ((prior_weight + damping) / d).unsqueeze(-1) * torch.eye(r.shape[-1]).to(z)
        rest = r - (jacobian @ pull.unsqueeze(-1)).squeeze(-1)
        step = -pull - (gathered.mT @ torch.linalg.solve(gram, rest.unsqueeze(-1))).squeeze(-1)
        trial = z + step
        new_r, new_jacobian = _with_jacobian(residuals, trial)
        new_value = objective(new_r, trial)
        better = (new_value < value).unsqueeze(-1)  # not where it is NaN
        z, r, jacobian = (
            torch.where(better, trial, z),
            torch.where(better, new_r, r),
            torch.where(better.unsqueeze(-1), new_jacobian, jacobian),
        )
        value = torch.where(better[:, 0], new_value, value)
        factor = torch.where(better, 1 / DAMPING_FACTOR, DAMPING_FACTOR)
        damping = (damping * factor).clamp(LEAST_DAMPING, MOST_DAMPING)
    return z


@torch.enable_grad()
def _with_jacobian(residuals: Residuals, z: Tensor) -> tuple[Tensor, Tensor]:
    """The residuals (rows, residuals) and their Jacobian (rows, residuals, d)."""
    z = z.detach().requires_grad_()
    r = residuals(z)
    rows = [torch.autograd.grad(column.sum(), z, retain_graph=True)[0] for column in r.unbind(-1)]
    return r.detach(), torch.stack(rows, 1)


@torch.no_grad()
def correct(
    model: SnaJanusModel, goal: Goal, z: Tensor, prior_weight: float, num_steps: int, num_cycles: int
) -> Tensor:
    """Shifts the target of each row by the error that the head predicts for the row's own cell.

    What the head says of z need not be what it says of the code of the cell that z decodes to, and only that is one of
    a real cell. With standardised targets y the next search is for prediction(z) + y - prediction(code of the cell); a
    row moves only if the error of the latter falls.
    """
    wanted = standardise(model.config, goal.columns, goal.values).to(z)
    weights = goal.weights.to(z)

    def rest(z: Tensor) -> Tensor:
        _, cells = binarise(model, goal, z, decode(model, z))
        return wanted - model.predict(encode(model, cells), scaled=True)[:, goal.columns]

    error, share = rest(z), torch.ones_like(z[:, :1])
    for _ in range(num_cycles):
        targets = model.predict(z, scaled=True)[:, goal.columns] + share * error
        trial = search(model, residuals(model, goal, targets), z, prior_weight, num_steps)
        trial_error = rest(trial)
        better = ((trial_error.square() - error.square()) * weights).sum(-1, keepdim=True) < 0
        z, error = torch.where(better, trial, z), torch.where(better, trial_error, error)
        share = torch.where(better, share, share / 2)
    return z
