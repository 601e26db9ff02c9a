"""The part of Janus's study on inversion: cells of asked-for stiffness and volume fraction, checked by homogenisation.

Targets are properties of held-out cells. All models get the same ones, and the same settings whatever their head.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from eval.janus_models import add_arrays, folder_of, load_model
from eval.span_statistics import CONFIDENCE, bootstrap, ratio
from leviathan.janus import SnaJanusModel
from leviathan.janus.inversion import Design, invert
from training.microstructure_data import MicrostructureSet, load_set
from training.provenance import write_json

STIFFNESS, VOLUME = "C1111", "volume_fraction"
REFERENCE, OTHER = "separable", "mlp"  # heads, of which the errors of the other are divided by those of the first
INVERSIONS = "inversions"  # folder of what was found for each model
NUM_GALLERY = 8  # cells that are kept to be drawn
STATISTICS_SEED = 0
Targets = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class InversionRow:
    """What one model found for one target. Errors are of C1111, as fractions of the target.

    Attributes:
        head: Of the model.
        seed: Likewise.
        index: Of the target.
        predicted_error: Of the best candidate, as the model predicts it.
        checked_error: The same by homogenisation; None if no candidate is sound: connected, with a converged check.
        mean_checked_error: Mean over the sound candidates, likewise.
        gap: Of the best candidate, the difference of prediction and homogenisation as a fraction of the latter;
            likewise.
        mean_gap: Mean over the sound candidates, which no check has picked; likewise.
        num_rejected: Candidates that are not connected, or whose check did not converge.
        reachable: Whether a candidate is within the tolerance of all targets.
        distance: Of the best candidate's latent from those of training cells (Mahalanobis).
    """

    head: str
    seed: int
    index: int
    predicted_error: float | None
    checked_error: float | None
    mean_checked_error: float | None
    gap: float | None
    mean_gap: float | None
    num_rejected: int
    reachable: bool
    distance: float


@dataclass(frozen=True)
class Ratio:
    """How much larger the errors with one head are than with the other.

    Attributes:
        statistic: What is divided by what.
        value: Of all pairs; None if the reference makes no error, or there are none.
        low: End of the interval; None with a single seed or target.
        high: Likewise; also None where it is infinite.
        level: Of confidence.
        num_resamples: Of the bootstrap.
        num_wins: Pairs of one seed and one target in which the reference has the smaller error.
        num_pairs: Of one seed and one target, those with an error of both.
        of: ``"best"`` candidates, or the ``"mean of candidates"``.
    """

    statistic: str
    value: float | None
    low: float | None
    high: float | None
    level: float
    num_resamples: int
    num_wins: int
    num_pairs: int
    of: str


def inversion_part(
    out: Path,
    data: Path,
    models: Path,
    *,
    heads: Sequence[str],
    seeds: Sequence[int],
    num_targets: int,
    num_candidates: int,
    prior_factors: Sequence[float],
    num_resamples: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Inverts the same targets with every model, compares the heads, and tries other priors and refinement.

    Args:
        out: Folder of the record: arrays of some cells, and what was found for each model, which is kept.
        data: A labelled set; targets are of its test split.
        models: Folder of the runs of ``models_part``.
        heads: To compare.
        seeds: Of the models.
        num_targets: At most, as there are test cells.
        num_candidates: For each target.
        prior_factors: Of the ablation: the weights of the prior, in multiples of the default.
        num_resamples: Of the bootstrap.
        options: More of ``SnaJanusModel.invert``, for all.
    """
    targets = held_out_targets(load_set(data).split("test"), num_targets)
    options = {"num_candidates": num_candidates, **options}
    first = load_model(folder_of(models, heads[0], seeds[0]))
    start = time.perf_counter()
    first.invert(targets, **options, seed=seeds[0], check=False)
    search = time.perf_counter() - start
    start = time.perf_counter()
    designs = first.invert(targets, **options, seed=seeds[0])
    seconds = {"search": search, "check": max(0.0, time.perf_counter() - start - search)}
    add_arrays(out, gallery(designs))
    rows, uncorrected = [], []
    for head, seed in tqdm([(head, seed) for seed in seeds for head in heads], desc="inversion", disable=None):
        path = out / INVERSIONS / f"{head}-{seed}.json"
        if (head, seed) == (heads[0], seeds[0]):
            rows += [asdict(row) for row in rows_of(designs, head, seed)]
        else:
            rows += _kept_rows(path, models, targets, head, seed, options)
        # A plain search for the maximum a posteriori: nothing corrects the head's errors.
        plain = path.with_stem(path.stem + "-uncorrected")
        uncorrected += _kept_rows(plain, models, targets, head, seed, {**options, "num_cycles": 0})
    return {
        "num_candidates": num_candidates,
        "targets": [dict(zip(targets, values, strict=True)) for values in zip(*targets.values(), strict=True)],
        "rows": rows,
        "num_failed": {
            head: sum(row["checked_error"] is None for row in rows if row["head"] == head) for head in heads
        },
        "seconds": {**seconds, "threads": torch.get_num_threads(), "num_cells": len(designs) * num_candidates},
        "ablation": ablation(out, models, targets, heads[0], seeds[0], options, prior_factors, rows),
        **compared(rows, num_resamples),
        "uncorrected": {"rows": uncorrected, **compared(uncorrected, num_resamples)},
    }


def held_out_targets(held_out: MicrostructureSet, num_targets: int) -> dict[str, list[float]]:
    """C1111 and volume fraction of cells that lie evenly among all of them in the order of C1111.

    Raises:
        ValueError: If the set has no such labels, or no cells.
    """
    names = held_out.property_names
    if missing := [name for name in (STIFFNESS, VOLUME) if name not in names]:
        raise ValueError(f"the set is labelled with {', '.join(names)}; the targets need {', '.join(missing)}.")
    if not len(held_out):
        raise ValueError("the set has no test cells to take targets of; make a larger one.")
    labels = held_out.labels[:, [names.index(STIFFNESS), names.index(VOLUME)]].double()
    count = min(num_targets, len(labels))
    middles = (np.arange(count) + 0.5) / count * len(labels)  # of as many groups of equal size
    chosen = labels[labels[:, 0].argsort(stable=True)][middles.astype(int)]
    return {STIFFNESS: chosen[:, 0].tolist(), VOLUME: chosen[:, 1].tolist()}


def rows_of(designs: Sequence[Design], head: str, seed: int) -> list[InversionRow]:
    """A row for each design of one model; the best candidate of each comes first in it."""
    rows = []
    for index, design in enumerate(designs):
        target = design.target[STIFFNESS]
        predicted, checked = (
            (values[STIFFNESS].double() - target).abs() / target for values in (design.predicted, design.checked)
        )
        sound = design.connected & design.converged & checked.isfinite()
        rows.append(
            InversionRow(
                head=head,
                seed=seed,
                index=index,
                predicted_error=_finite(predicted[0]),
                checked_error=_finite(checked[0]) if sound[0] else None,
                mean_checked_error=_finite(checked[sound].mean()),
                gap=_finite(design.gap[STIFFNESS][0]) if sound[0] else None,
                mean_gap=_finite(design.gap[STIFFNESS][sound].mean()),
                num_rejected=design.num_rejected,
                reachable=design.reachable,
                distance=design.distance[0].item(),
            )
        )
    return rows


def _finite(value: ArrayLike | torch.Tensor | None) -> float | None:
    """As JSON has it."""
    return None if value is None or not math.isfinite(value) else float(value)


def gallery(designs: Sequence[Design]) -> dict[str, torch.Tensor]:
    """The best cells of some targets, evenly among all: for pictures."""
    chosen = np.linspace(0, len(designs) - 1, min(NUM_GALLERY, len(designs))).round().astype(int)
    some = [designs[index] for index in chosen]
    return {
        "gallery.cells": torch.stack([design.best.to(torch.uint8) for design in some]),
        "gallery.targets": torch.tensor([[design.target[name] for name in (STIFFNESS, VOLUME)] for design in some]),
        "gallery.checked": torch.stack([design.checked[STIFFNESS][0] for design in some]),
    }


def ablation(
    out: Path,
    models: Path,
    targets: Targets,
    head: str,
    seed: int,
    options: Mapping[str, Any],
    prior_factors: Sequence[float],
    known: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Means over the targets with other weights of the prior, and with refinement at the default.

    What the options are by themselves is in the ``known`` rows.
    """
    default = options.get("prior_weight", signature(invert).parameters["prior_weight"].default)
    trials = [(factor * default, None) for factor in prior_factors] + [(default, "physics")]
    found = []
    for weight, refine in tqdm(trials, desc="ablation", unit="trial", disable=None):
        if (weight, refine) == (default, None):
            rows = [row for row in known if (row["head"], row["seed"]) == (head, seed)]
        else:
            path = out / INVERSIONS / f"{head}-{seed}-{weight:g}-{refine or 'unrefined'}.json"
            trial = {**options, "prior_weight": weight, "refine": refine}
            rows = _kept_rows(path, models, targets, head, seed, trial)
        means = {name: _finite(_mean([row[name] for row in rows])) for name in ("checked_error", "gap", "num_rejected")}
        found.append(
            {
                "prior_weight": weight,
                "refine": refine,
                "seed": seed,
                "head": head,
                "checked_error": means["checked_error"],
                "gap": means["gap"],
                "rejected": means["num_rejected"],
                "num_failed": _num_failed(rows),
            }
        )
    return found


def _num_failed(rows: Iterable[Mapping[str, Any]]) -> int:
    """Inversions without a sound candidate."""
    return sum(row["checked_error"] is None for row in rows)


def _mean(values: ArrayLike) -> float:
    """Of those that are numbers; NaN without any."""
    values = np.asarray(values, dtype=np.float64)
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def compared(rows: Sequence[Mapping[str, Any]], num_resamples: int) -> dict[str, Any]:
    """The errors with the one head over those with the other, of best candidates and of all; None without both."""
    return {
        name: asdict(head_ratio(*grids, num_resamples, of)) if grids is not None else None
        for name, error, of in (
            ("ratio", "checked_error", "best"),
            ("ratio_candidates", "mean_checked_error", "mean of candidates"),
        )
        for grids in [error_grids(rows, error)]
    }


def error_grids(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[NDArray, NDArray] | None:
    """Errors (seeds, targets) with the reference head and with the other, NaN where there is none; None without both.

    Raises:
        ValueError: If the two do not have the same seeds and targets.
    """
    found = {}
    for row in rows:
        value = math.nan if row[name] is None else row[name]
        found.setdefault(row["head"], {}).setdefault(row["seed"], {})[row["index"]] = value
    if not {REFERENCE, OTHER} <= set(found):
        return None
    places = [{seed: sorted(each) for seed, each in found[head].items()} for head in (REFERENCE, OTHER)]
    if places[0] != places[1]:
        raise ValueError(f"the heads {REFERENCE} and {OTHER} have other seeds or targets; invert the same with both.")
    ours, others = (
        np.array([[found[head][seed][index] for index in indices] for seed, indices in places[0].items()])
        for head in (REFERENCE, OTHER)
    )
    return ours, others


def head_ratio(ours: NDArray, others: NDArray, num_resamples: int, of: str) -> Ratio:
    """The mean of the other head's errors over that of ours, both (seeds, targets), with its bootstrap interval.

    The seeds of each head, whose models are other ones, and the targets, which all have in common, are drawn anew with
    replacement: the pigeonhole bootstrap, A. B. Owen, Annals of Applied Statistics 1, 2007. A pair of one seed and one
    target in which an error is NaN is left out for both heads: one that fails on hard targets gains nothing by it.
    """
    num_seeds, num_targets = ours.shape
    known = np.isfinite(ours) & np.isfinite(others)
    ours, others = np.where(known, ours, np.nan), np.where(known, others, np.nan)

    def statistic(our_seeds: Sequence[NDArray], other_seeds: Sequence[NDArray], targets: Sequence[NDArray]) -> NDArray:
        places = (group[0].astype(int) for group in (our_seeds, other_seeds, targets))
        first, second, columns = places
        return ratio(_mean(others[np.ix_(second, columns)]), _mean(ours[np.ix_(first, columns)]))

    numbers = [np.arange(num_seeds)], [np.arange(num_seeds)], [np.arange(num_targets)]
    found = bootstrap(statistic, *numbers, num_resamples=num_resamples, seed=STATISTICS_SEED)
    return Ratio(
        statistic=f"mean error of {OTHER} over that of {REFERENCE}",
        value=_finite(found.value),
        low=_finite(found.low),
        high=_finite(found.high),
        level=CONFIDENCE,
        num_resamples=num_resamples,
        num_wins=int((ours < others)[known].sum()),
        num_pairs=int(known.sum()),
        of=of,
    )


def _kept_rows(
    path: Path, models: Path, targets: Targets, head: str, seed: int, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows of one model, which are kept as long as weights, targets and options are the same."""
    folder = folder_of(models, head, seed)

    def make() -> list[dict[str, Any]]:
        model: SnaJanusModel = load_model(folder)
        return [asdict(row) for row in rows_of(model.invert(targets, **options, seed=seed), head, seed)]

    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    key = {"weights": weights, "targets": dict(targets), "options": dict(options), "seed": seed}
    return kept(path, key, make)


def kept(path: Path, key: Mapping[str, Any], make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What was made for the same key before, or now."""
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] == json.loads(json.dumps(key)):
            return content["rows"]
    rows = make()
    write_json(path, {"key": key, "rows": rows})
    return rows
