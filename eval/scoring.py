"""Scores predictions of fields, rows of a table, beside the truth: every metric, step, flow and seed.

A row is a name and a function that rolls initial states out; `evaluate` scores rows and sums them up for JSON.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import leviathan
from eval import metrics

SUMMARY_STEPS = (1, 5, 10, 20)
# Statistics, for which one true flow against another is a floor; errors point by point have none.
FLOOR_METRICS = (
    "enstrophy_error",
    "energy_error",
    "slope_error",
    "jensen_shannon",
    "mean_log_ratio",
    "weighted_log_ratio",
    "patch_log_ratio",
    "variance_error",
)

# name: (label with unit, best value)
METRICS = {
    "enstrophy_error": ("enstrophy error |ln Zₚ/Zₜ|", 0),
    "energy_error": ("spectral energy error |ln Eₚ/Eₜ|", 0),
    "slope_error": ("spectral slope error |sₚ − sₜ|", 0),
    "jensen_shannon": ("divergence of P(ω) [bit]", 0),
    "mean_log_ratio": ("mean over k of |log₁₀ E(k) ratio| [decades]", 0),
    "weighted_log_ratio": ("energy-weighted |log₁₀ E(k) ratio| [decades]", 0),
    "patch_log_ratio": ("as above, windowed patches [decades]", 0),
    "mean_error": ("error of the mean / rms", 0),
    "variance_error": ("variance error |ln Vₚ/Vₜ|", 0),
    "nrmse": ("nRMSE", 0),
    "correlation": ("correlation", 1),
    "border_jump": ("jump across patch borders / inside", 1),
    "crps": ("CRPS [1/time]", 0),
}


@dataclass(frozen=True)
class MetricSettings:
    """What the metrics need beside the fields.

    Attributes:
        low: Lower end of the histogram's range, the quantiser's, in 1 / time.
        high: Upper end.
        patch_size: Side of a patch in pixels.
        length: Side of the periodic square.
        band: Wavenumbers of the slope, both included, in waves per side (of a patch, where spectra are windowed).
        num_bins: Bins of the histogram; no more than there are levels, between which a quantised field has nothing.
        windowed: Spectra are means over Hann-windowed patches, as patches that were rolled out in isolation need them:
            the field that they are laid out in is not periodic.
    """

    low: float
    high: float
    patch_size: int
    length: float
    band: tuple[int, int]
    num_bins: int = 256
    windowed: bool = False

    def spectrum(self, field: np.ndarray) -> np.ndarray:
        """Energy spectrum of fields: (..., N, N) -> (..., K)."""
        if self.windowed:
            return metrics.patch_spectrum(field, self.patch_size, self.length)
        return metrics.energy_spectrum(field, self.length)

    def shares(self, field: np.ndarray) -> np.ndarray:
        """Histogram of fields: (..., N, N) -> (..., num_bins), sum 1."""
        return metrics.histogram(field, self.low, self.high, self.num_bins)

    def score(self, predicted: np.ndarray, true: np.ndarray) -> dict[str, np.ndarray]:
        """All metrics but CRPS of two fields (T, X, Y): a dict of (T,)."""
        fields = (predicted, true)
        spectra, shares = [self.spectrum(field) for field in fields], [self.shares(field) for field in fields]
        patches = (
            spectra if self.windowed else [metrics.patch_spectrum(f, self.patch_size, self.length) for f in fields]
        )
        return {
            "enstrophy_error": metrics.enstrophy_error(predicted, true),
            "energy_error": metrics.energy_error(*spectra),
            "slope_error": metrics.slope_error(*spectra, self.band),
            "jensen_shannon": metrics.jensen_shannon(*shares),
            "mean_log_ratio": metrics.mean_log_ratio(*spectra),
            "weighted_log_ratio": metrics.weighted_log_ratio(*spectra),
            "patch_log_ratio": metrics.mean_log_ratio(*patches),
            "mean_error": metrics.mean_error(predicted, true),
            "variance_error": metrics.variance_error(predicted, true),
            "nrmse": metrics.nrmse(predicted, true),
            "correlation": metrics.correlation(predicted, true),
            "border_jump": metrics.border_jump(predicted, self.patch_size),
        }


@dataclass(frozen=True)
class Row:
    """A prediction with a name.

    Attributes:
        name: Of the row.
        predict: Function of initial states (B, N, N) and a seed that returns next states (B, T, N, N).
        seeds: Runs, of which one is enough where nothing is random; they are members of one ensemble for CRPS.
        kind: "model" or "reference".
    """

    name: str
    predict: Callable[[np.ndarray, int], np.ndarray | torch.Tensor]
    seeds: Sequence[int] = (0,)
    kind: str = "model"


@dataclass(frozen=True)
class RowScores:
    """What a row was found to be.

    Attributes:
        about: Its kind, and of a model seeds, seconds and speed.
        scores: All metrics at every step, (seeds, B, T) each; CRPS (1, B, T).
        spectra: Mean energy spectra at the steps shown, (steps, K).
        shares: Mean histograms at the steps shown, (steps, bins).
        example: The states of the first seed and trajectory, (T, N, N).
    """

    about: dict[str, Any]
    scores: dict[str, np.ndarray]
    spectra: np.ndarray
    shares: np.ndarray
    example: np.ndarray

    def distances(self, name: str, best: float) -> np.ndarray:
        """Distance from a metric's best value, a mean over seeds: (B, T)."""
        return np.abs(self.scores[name] - best).mean(0)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: `results` for JSON, and of each row the first trajectory's states (T, X, Y)."""

    results: dict[str, Any]
    examples: dict[str, np.ndarray]


def reference_rows(
    truth: np.ndarray, climatology: np.ndarray, tokenizer: "leviathan.FieldTokenizer | None"
) -> list[Row]:
    """Rows that cost nothing: `persistence`, `climatology` and, with a tokenizer, `quantise_only`.

    Args:
        truth: True states (B, T + 1, N, N) in 1 / time, the initial ones first.
        climatology: States (B, T, N, N) of flows that have nothing to do with the true ones, at the same times.
        tokenizer: A fitted FieldTokenizer.

    Raises:
        ValueError: On shapes that do not fit each other.
    """
    if truth.ndim != 4 or truth.shape[1] < 2 or climatology.shape != truth[:, 1:].shape:
        raise ValueError(
            f"truth has shape {truth.shape} and climatology {climatology.shape}; expected (B, T + 1, N, N) and "
            "(B, T, N, N)."
        )
    future = truth[:, 1:]
    grid = future.shape[-2:]

    def quantised(initial: np.ndarray, seed: int) -> np.ndarray:
        ids = tokenizer(future.reshape(-1, *grid))["input_ids"]
        return np.asarray(tokenizer.decode(ids, field_shape=grid), np.float32).reshape(future.shape)

    rows = [
        Row("persistence", lambda initial, seed: np.broadcast_to(initial[:, None], future.shape), kind="reference"),
        Row("climatology", lambda initial, seed: climatology, kind="reference"),
    ]
    return rows if tokenizer is None else [*rows, Row("quantise_only", quantised, kind="reference")]


def shown_steps(num_steps: int) -> list[int]:
    """The steps of which tables, spectra and histograms are made."""
    return sorted({step for step in SUMMARY_STEPS if step <= num_steps} | {num_steps})


def score_row(row: Row, truth: np.ndarray, setting: MetricSettings) -> RowScores:
    """Rolls a row out from the first states of `truth` (B, T + 1, N, N) and scores it against the others.

    Raises:
        ValueError: On states that are not finite or of another shape.
    """
    future = truth[:, 1:]
    start = time.perf_counter()
    states = np.stack([np.asarray(row.predict(truth[:, 0], seed), np.float32) for seed in row.seeds])
    seconds = time.perf_counter() - start
    if states.shape[1:] != future.shape:
        raise ValueError(f"{row.name} has shape {states.shape}; expected (seeds, {', '.join(map(str, future.shape))}).")
    about: dict[str, Any] = {"kind": row.kind}
    if row.kind == "model":  # a token is a pixel
        about |= {"seeds": list(row.seeds), "seconds": seconds, "tokens_per_second": states.size / seconds}
    spectra, shares = statistics(states, setting)
    # Not a view of the example, which would keep the whole row.
    return RowScores(about, _scores(states, future, setting), spectra, shares, states[0, 0].copy())


def statistics(states: np.ndarray, setting: MetricSettings) -> tuple[np.ndarray, np.ndarray]:
    """Mean spectra (steps, K) and histograms (steps, bins) of states (seeds, B, T, N, N) at the steps shown."""
    at_shown = [step - 1 for step in shown_steps(states.shape[2])]
    flows = [field[at_shown] for run in states for field in run]
    return tuple(np.mean([of(flow) for flow in flows], axis=0) for of in (setting.spectrum, setting.shares))


def evaluate(
    truth: np.ndarray,
    rows: Sequence[Row],
    setting: MetricSettings,
    *,
    progress: bool = True,
) -> Evaluation:
    """Scores rows against the truth, at every step, with bootstrap intervals over trajectories.

    Rows of models are compared with `persistence` and `climatology`, which must be among the rows.

    Args:
        truth: True states (B, T + 1, N, N) in 1 / time, the initial ones first.
        rows: What is scored, `reference_rows` among it.
        setting: What the metrics need.
        progress: Show a progress bar.

    Raises:
        ValueError: On states that are not finite or whose shapes do not fit each other.
    """
    scored = {}
    for row in tqdm(rows, desc="evaluate", unit="row", disable=not progress):
        scored[row.name] = score_row(row, truth, setting)
    against = {row.name: ("persistence", "climatology") for row in rows if row.kind == "model"}
    examples = {"truth": truth[0, 1:]} | {name: each.example for name, each in scored.items()}
    results = summed_up(truth, scored, setting, against)
    shown = results["spectra"]["steps"]
    results["summary"] = {
        row: {name: {str(step): each["mean"][step - 1] for step in shown} for name, each in about["metrics"].items()}
        for row, about in results["rows"].items()
    }
    return Evaluation(results, examples)


def summed_up(
    truth: np.ndarray,
    scored: Mapping[str, RowScores],
    setting: MetricSettings,
    against: Mapping[str, Sequence[str]],
    described: Mapping[str, tuple[str, float]] = METRICS,
) -> dict[str, Any]:
    """Rows as results for JSON: means, intervals, spectra and histograms, noise floor, paired comparisons.

    Args:
        truth: True states (B, T + 1, N, N) in 1 / time, the initial ones first.
        scored: The rows.
        setting: That of the scores.
        against: For a row, those that it is compared with.
        described: The metrics of the rows, each with label and best value.
    """
    future = truth[:, 1:]
    shown = shown_steps(future.shape[1])
    outside = (truth < setting.low) | (truth > setting.high)
    spectra, shares = statistics(future[None], setting)
    floor = metrics.noise_floor(setting.score, future) if len(future) > 1 else None
    return {
        "metrics": {name: {"label": label, "best": best} for name, (label, best) in described.items()},
        "slope_band": list(setting.band),
        "clipped": {"count": int(outside.sum()), "fraction": float(outside.mean())},
        "truth": _truth_statistics(future, setting),
        "noise_floor": floor and {name: numbers(floor[name]) for name in FLOOR_METRICS},
        "rows": {
            name: row.about | {"metrics": {key: _over_flows(row.scores[key]) for key in described}}
            for name, row in scored.items()
        },
        "spectra": {
            "steps": shown,
            "rows": {"truth": _lines(spectra)} | {name: _lines(row.spectra) for name, row in scored.items()},
        },
        "pdf": {
            "low": setting.low,
            "high": setting.high,
            "steps": shown,
            "rows": {"truth": _lines(shares)} | {name: _lines(row.shares) for name, row in scored.items()},
        },
        "comparisons": {  # below 0: nearer to the best value than the reference is, flow by flow
            row: {
                other: {
                    name: _compared(scored[row].distances(name, best) - scored[other].distances(name, best))
                    for name, (_, best) in described.items()
                }
                for other in others
            }
            for row, others in against.items()
        },
    }


def _scores(states: np.ndarray, future: np.ndarray, setting: MetricSettings) -> dict[str, np.ndarray]:
    """All metrics of a row, (seeds, B, T) each; seeds are the members of one ensemble for CRPS, (1, B, T)."""
    runs = [[setting.score(run[b], true) for b, true in enumerate(future)] for run in states]
    scores = {name: np.array([[each[name] for each in run] for run in runs]) for name in runs[0][0]}
    crps = [metrics.crps(states[:, b].swapaxes(0, 1), true) for b, true in enumerate(future)]
    return scores | {"crps": np.array(crps)[None]}


def _over_flows(scores: np.ndarray) -> dict[str, list[float] | None]:
    """Mean, interval over trajectories and spread between seeds, lists over steps, of scores (seeds, B, T)."""
    interval = metrics.bootstrap(scores.mean(0)) if scores.shape[1] > 1 else None
    return {
        "mean": numbers(scores.mean((0, 1))),
        "low": interval and numbers(interval.low),
        "high": interval and numbers(interval.high),
        "seed_spread": numbers(scores.mean(1).std(0, ddof=1)) if len(scores) > 1 else None,
    }


def _compared(differences: np.ndarray) -> dict[str, list[float] | None]:
    """Mean and Student's interval over trajectories of paired differences (B, T), lists over steps."""
    interval = metrics.student_interval(differences) if len(differences) > 1 else None
    return {
        "mean": numbers(differences.mean(0)),
        "low": interval and numbers(interval.low),
        "high": interval and numbers(interval.high),
    }


def _truth_statistics(future: np.ndarray, setting: MetricSettings) -> dict[str, list[float]]:
    spectra = [setting.spectrum(field) for field in future]
    each = {
        "enstrophy": [metrics.enstrophy(field) for field in future],
        "energy": [spectrum.sum(-1) for spectrum in spectra],
        "slope": [metrics.spectral_slope(spectrum, setting.band).slope for spectrum in spectra],
        "border_jump": [metrics.border_jump(field, setting.patch_size) for field in future],
    }
    return {name: numbers(np.mean(values, axis=0)) for name, values in each.items()}


def _lines(values: np.ndarray) -> list[list[float]]:
    return [numbers(line) for line in values]


def numbers(values: np.ndarray) -> list[float]:
    """Six digits of each, for JSON."""
    return [float(f"{value:.6g}") for value in values]
