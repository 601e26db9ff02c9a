"""How much faster alternating least squares fit a KHRONOS than gradients train it, to the same error."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from leviathan.khronos import KhronosConfig, KhronosModel
from training.khronos import train

SHARES_OF_LIMIT = (1 / 16, 1 / 4, 1)  # lengths of the cosine: one that is too long reaches an error late
LIMIT = 25  # times the time of least squares: what a longest trial gets


@dataclass(frozen=True)
class GradientTrial:
    """One training by gradient.

    Attributes:
        batch_size: Points of a step.
        learning_rate: Its peak.
        num_epochs: Passes over the points that the learning rate's schedule was made for.
        seconds: Time of the epochs, up to where the error was reached or to the end.
        error: Root mean squared error at the end of them over the standard deviation of y.
        reached: Whether it came down to that of alternating least squares.
        time_limit: Seconds that the schedule was made for.
    """

    batch_size: int
    learning_rate: float
    num_epochs: int
    seconds: float
    error: float
    reached: bool
    time_limit: float


@dataclass(frozen=True)
class AlsAgainstGradient:
    """Both on the same points and the same number of threads.

    Attributes:
        num_points: Number of points.
        num_inputs: Number of inputs.
        target_rank: Of the function to learn, a sum of products without noise.
        rank: Of the model.
        num_parameters: Of the model.
        als_seconds: Time of a fit.
        als_error: Its root mean squared error on these points over the standard deviation of y.
        als_converged: Whether it says so.
        trials: Of gradient training, as tried.
        time_limit: Seconds that the schedules of the longest of them were made for.
    """

    num_points: int
    num_inputs: int
    target_rank: int
    rank: int
    num_parameters: int
    als_seconds: float
    als_error: float
    als_converged: bool
    trials: tuple[GradientTrial, ...]
    time_limit: float

    @property
    def best(self) -> GradientTrial | None:
        """The fastest that reached the error; None if none did."""
        return min((trial for trial in self.trials if trial.reached), key=lambda trial: trial.seconds, default=None)

    @property
    def ratio(self) -> float:
        """How many times faster least squares were; if no trial reached their error, they were at least so many.

        The least is then found from the seconds that the longest trials ran, the shortest of these.
        """
        longest = [trial.seconds for trial in self.trials if trial.time_limit == self.time_limit]
        return (self.best.seconds if self.best else min(longest)) / self.als_seconds


def separable_waves(
    num_points: int, num_inputs: int, rank: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    r"""Random points x of the unit cube (num_points, num_inputs) and smooth values (num_points,) of CP rank ``rank``.

    .. math::
        y = \sum_{j=1}^{r} \prod_{i=1}^{d} \cos(a_{ij} x_i + b_{ij})

    with a uniform in [0, :math:`\pi`], up to half a wave along an input, and b in [0, :math:`2 \pi`].
    """
    x = torch.rand(num_points, num_inputs, generator=generator)
    frequency, phase = torch.rand(2, num_inputs, rank, generator=generator)
    waves = (torch.pi * (frequency * x.unsqueeze(-1) + 2 * phase)).cos()
    return x, waves.prod(1).sum(-1)


def als_against_gradient(
    *,
    num_points: int = 10_000,
    num_inputs: int = 6,
    target_rank: int = 4,
    rank: int = 8,
    num_cells: int = 16,
    degree: int = 3,
    batch_sizes: Sequence[int] = (128, 512),
    learning_rates: Sequence[float] = (0.03, 0.1, 0.3),
    time_limit: float | None = None,
    seed: int = 0,
) -> AlsAgainstGradient:
    """Fits :func:`separable_waves` by alternating least squares, then trains to the same error by gradient.

    Every batch size is tried with every learning rate, at first with short schedules. While none has reached the error,
    the better third of them is tried with longer ones. The error on all points is looked at after each epoch, in time
    that does not count.

    Args:
        num_points: Number of points.
        num_inputs: Number of inputs.
        target_rank: Of the function to learn.
        rank: Of the model.
        num_cells: Of the model.
        degree: Of the model.
        batch_sizes: To try.
        learning_rates: To try.
        time_limit: Seconds of a longest trial; None gives it ``LIMIT`` times what least squares took.
        seed: Of the points, the function and all starts.
    """
    x, y = separable_waves(num_points, num_inputs, target_rank, torch.Generator().manual_seed(seed))
    config = KhronosConfig(
        input_low=[0.0] * num_inputs, input_high=[1.0] * num_inputs, rank=rank, num_cells=num_cells, degree=degree
    )

    def new_model() -> KhronosModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return KhronosModel(config)

    def squared_error(model: KhronosModel) -> float:
        return (model.predict(x) - y).square().mean().item() / y.var(correction=0).item()

    new_model().fit(x, y, max_sweeps=1, num_restarts=1)  # the first call of anything is slow
    model = new_model()
    started = time.perf_counter()
    fit = model.fit(x, y, seed=seed)
    als_seconds, target = time.perf_counter() - started, squared_error(model)

    time_limit = LIMIT * als_seconds if time_limit is None else time_limit
    trials: list[GradientTrial] = []
    pairs = [(size, rate) for size in batch_sizes for rate in learning_rates]
    bar = tqdm(desc="gradient training", unit=" trials", disable=None)
    for share in SHARES_OF_LIMIT:
        errors = []
        for batch_size, rate in pairs:
            options = {"batch_size": batch_size, "learning_rate": rate, "seed": seed, "progress": False}
            of_an_epoch = train(new_model(), x, y, num_epochs=2, **options).seconds / 2
            length = share * time_limit
            num_epochs = max(1, round(length / of_an_epoch))
            model = new_model()
            result = train(model, x, y, num_epochs=num_epochs, target_loss=target, **options)
            error = squared_error(model) ** 0.5
            errors.append(error)
            trials.append(GradientTrial(batch_size, rate, num_epochs, result.seconds, error, result.converged, length))
            bar.update()
        if any(trial.reached for trial in trials):
            break
        pairs = [pair for _, pair in sorted(zip(errors, pairs, strict=True))[: max(1, len(pairs) // 3)]]
    bar.close()
    return AlsAgainstGradient(
        num_points=num_points,
        num_inputs=num_inputs,
        target_rank=target_rank,
        rank=rank,
        num_parameters=model.num_fitted,
        als_seconds=als_seconds,
        als_error=target**0.5,
        als_converged=fit.converged,
        trials=tuple(trials),
        time_limit=time_limit,
    )
