"""Statistics of a few runs on a few tasks: robust means, stratified bootstraps, and what a success costs.

Runs of a network are a sequence of arrays, one a task, with the runs (seeds) of that task along the first axis. Tasks
may have differing numbers of runs. Source: R. Agarwal et al., Deep reinforcement learning at the edge of the
statistical precipice, 2021.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from arch.bootstrap import IndependentSamplesBootstrap
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import trapezoid

Runs = Sequence[ArrayLike]

CONFIDENCE = 0.95
LAST_SHARE, LEAST_LAST = 0.1, 2  # evaluations at the end that count as the final ones
TRIMMED = 0.25  # at either end, by the interquartile mean


@dataclass(frozen=True)
class Estimate:
    """A statistic and its interval, numbers or arrays of one shape.

    Attributes:
        value: That of the runs themselves; not a number where it is not defined.
        low: Lower end of the interval; None where a task has a single run, of which no bootstrap can tell.
        high: Upper end, likewise.
    """

    value: NDArray[np.float64]
    low: NDArray[np.float64] | None
    high: NDArray[np.float64] | None


def normalised(returns: ArrayLike, low: float, high: float) -> NDArray[np.float64]:
    """(R - low) / (high - low): 0 for the return `low`, 1 for `high`, not clipped; (...) -> (...).

    Raises:
        ValueError: If high is not above low.
    """
    if not high > low:
        raise ValueError(f"low = {low} and high = {high}; expected high above low.")
    return (np.asarray(returns, dtype=np.float64) - low) / (high - low)


def learning_area(steps: ArrayLike, scores: ArrayLike) -> float:
    """Mean of a learning curve from its first to its last evaluation, by the trapezoidal rule: (T,), (T,) -> scalar.

    Raises:
        ValueError: If steps do not rise, or differ from the scores in number.
    """
    steps, scores = _curve(steps, scores)
    if len(steps) == 1:
        return float(scores[0])
    return float(trapezoid(scores, steps) / (steps[-1] - steps[0]))


def final_score(returns: ArrayLike) -> float:
    """Mean of the last tenth of the evaluations, rounded up, and of at least two if there are two: (T,) -> scalar.

    Raises:
        ValueError: If there are none.
    """
    returns = np.asarray(returns, dtype=np.float64)
    if returns.ndim != 1 or not len(returns):
        raise ValueError(f"returns have shape {returns.shape}; expected one return for each evaluation.")
    return float(returns[-max(LEAST_LAST, int(np.ceil(LAST_SHARE * len(returns)))) :].mean())


def succeeded(returns: ArrayLike, threshold: float) -> bool:
    """Whether a run ends at or above the threshold, by `final_score`. One lucky evaluation does not suffice."""
    return final_score(returns) >= threshold


def steps_to_threshold(steps: ArrayLike, returns: ArrayLike, threshold: float) -> float | None:
    """Steps after which the return first is at the threshold, linear between evaluations: (T,), (T,) -> scalar.

    At the first evaluation there is nothing to interpolate from: its step is taken. A run that falls back later keeps
    its first step; whether it stays is told by `succeeded`.

    Returns:
        None for a run that never gets there (censored at its budget).

    Raises:
        ValueError: If steps do not rise, or differ from the returns in number.
    """
    steps, returns = _curve(steps, returns)
    reached = np.flatnonzero(returns >= threshold)
    if not len(reached):
        return None
    after = reached[0]
    if after == 0:
        return float(steps[0])
    share = (threshold - returns[after - 1]) / (returns[after] - returns[after - 1])
    return float(steps[after - 1] + share * (steps[after] - steps[after - 1]))


def restricted(steps: Sequence[float | None], budget: float) -> NDArray[np.float64]:
    """Steps to the threshold with those of censored runs counted at the budget, a lower bound: (N,) -> (N,)."""
    return np.array([budget if step is None else min(step, budget) for step in steps], dtype=np.float64)


def expected_cost(spent: ArrayLike, successes: ArrayLike) -> float | None:
    """Cost until one success when failed runs are followed by others: sum of all that was spent over the successes.

    By Wald's identity: with a success in a share p of the runs, 1 / p runs are needed on average.

    Args:
        spent: Cost of each run, up to its success or its end, in any unit (N,).
        successes: Whether each succeeded (N,).

    Returns:
        None, for infinity, without a success.

    Raises:
        ValueError: If the two differ in shape or are empty.
    """
    spent, successes = np.asarray(spent, dtype=np.float64), np.asarray(successes, dtype=bool)
    if spent.shape != successes.shape or not spent.size:
        raise ValueError(f"spent has shape {spent.shape} and successes {successes.shape}; expected one of each a run.")
    return float(spent.sum() / successes.sum()) if successes.any() else None


def interquartile_mean(runs: Runs) -> NDArray[np.float64]:
    """Mean of the middle half of all runs of all tasks together, column by column: arrays (N_t, ...) -> (...).

    A quarter of N runs, rounded down, is left out at either end: of three runs or fewer it is the mean.
    """
    # scipy.stats.trim_mean is the same, but its checks take ten times as long, and a bootstrap calls it 10^5 times.
    pooled = np.sort(np.concatenate([np.asarray(task, dtype=np.float64) for task in runs]), axis=0)
    left_out = int(TRIMMED * len(pooled))
    return np.asarray(pooled[left_out : len(pooled) - left_out].mean(0))


def mean_over_tasks(runs: Runs) -> NDArray[np.float64]:
    """Mean over tasks of the mean over runs, each task weighing the same: arrays (N_t, ...) -> (...)."""
    return np.mean([np.mean(task, axis=0) for task in runs], axis=0)


def improvement_probability(ours: Runs, others: Runs) -> NDArray[np.float64]:
    """P(X > Y) + P(X = Y) / 2 for runs X of ours and Y of the others, a mean over tasks: in [0, 1].

    Within a task it is Mann-Whitney's U over the number of pairs.

    Raises:
        ValueError: If the two have differing numbers of tasks.
    """
    if len(ours) != len(others) or not len(ours):
        raise ValueError(f"{len(ours)} and {len(others)} tasks; expected the same tasks for both, at least one.")
    chances = []
    for x, y in zip(ours, others, strict=True):
        difference = np.subtract.outer(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64))
        chances.append((np.sign(difference).mean() + 1) / 2)
    return np.asarray(np.mean(chances))


def efficiency_gain(ours: Runs, others: Runs) -> NDArray[np.float64]:
    """By how much more steps the others need: IQM of their shares of the budget over that of ours, minus 1.

    Args:
        ours: Restricted steps to the threshold over the budget, one array a task.
        others: Likewise.
    """
    return ratio(interquartile_mean(others), interquartile_mean(ours)) - 1


def ratio(above: ArrayLike, below: ArrayLike) -> NDArray[np.float64]:
    """One over the other: infinite over 0, and no number for 0 / 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(above, below, dtype=np.float64)


def bootstrap(
    statistic: Callable[..., ArrayLike], *groups: Runs, num_resamples: int, seed: int, confidence: float = CONFIDENCE
) -> Estimate:
    """A statistic of one or more networks' runs and its stratified percentile bootstrap interval.

    The runs of each task and each network are drawn anew on their own, with replacement. Ends are values that were
    drawn, not interpolated, so that a ratio may be infinite; draws in which it is no number are left out.

    Args:
        statistic: Takes as many sequences of arrays as there are groups; returns a number or an array (K,).
        groups: Runs of a network each.
        num_resamples: Draws.
        seed: Of the draws.
        confidence: That the interval is to have.

    Raises:
        ValueError: If a task has no runs, there are no tasks or draws, or confidence is not in (0, 1).
    """
    sizes = [len(group) for group in groups]
    arrays = [np.asarray(task, dtype=np.float64) for group in groups for task in group]
    if not arrays or not all(sizes) or not all(array.ndim and len(array) for array in arrays):
        shapes = [array.shape for array in arrays]
        raise ValueError(f"runs have the shapes {shapes} in {sizes} tasks; expected at least one run in each of them.")
    if num_resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"num_resamples = {num_resamples}, confidence = {confidence}; expected at least 1, and a number in (0, 1)."
        )
    ends = np.cumsum(sizes)

    def of(*tasks: NDArray) -> NDArray[np.float64]:
        parts = [tasks[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        return np.asarray(statistic(*parts), dtype=np.float64)

    value = of(*arrays)
    if min(map(len, arrays)) < 2:
        return Estimate(value, None, None)
    sampler = IndependentSamplesBootstrap(*arrays, seed=np.random.default_rng(seed))
    draws = sampler.apply(lambda *tasks: np.atleast_1d(of(*tasks)), num_resamples)
    tail = (1 - confidence) / 2
    low, high = (np.array([_quantile(column, level) for column in draws.T]) for level in (tail, 1 - tail))
    return Estimate(value, low.reshape(value.shape), high.reshape(value.shape))


def _quantile(draws: NDArray[np.float64], level: float) -> float:
    known = draws[~np.isnan(draws)]
    return float(np.quantile(known, level, method="inverted_cdf")) if len(known) else float("nan")


def _curve(steps: ArrayLike, values: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    steps, values = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    fits = steps.ndim == 1 and steps.shape == values.shape and len(steps) and np.isfinite(values).all()
    if not fits or (np.diff(steps) <= 0).any():
        raise ValueError(
            f"a learning curve has steps of shape {steps.shape} and values of shape {values.shape}; expected as many "
            "finite values as steps, at least one, and rising steps."
        )
    return steps, values
