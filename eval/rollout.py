"""Rolls a trained Leviathan out over held-out flows, and measures it beside what costs nothing.

    python -m eval.rollout --model runs/demo/model --data runs/demo/turbulence.hdf5 --out runs/demo/results

Beside the model, by the same metrics: `persistence` (nothing moves), `climatology` (a training flow at the same time),
`quantise_only` (the truth through the tokenizer and back) and the noise floor (one true flow against another). Writes
results.json and pictures.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoFeatureExtractor, AutoModelForCausalLM

import leviathan
from eval import figures, metrics
from eval.card import summary_text
from leviathan.decoding_leviathan import DETERMINISTIC, RANDOM
from training.fields import FieldFile, data_record, split_trajectories
from training.provenance import provenance, relative, write_json

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
        band: Wavenumbers of the slope, both included, in waves per side.
        num_bins: Bins of the histogram; no more than there are levels, between which a quantised field has nothing.
    """

    low: float
    high: float
    patch_size: int
    length: float
    band: tuple[int, int]
    num_bins: int = 256

    def score(self, predicted: np.ndarray, true: np.ndarray) -> dict[str, np.ndarray]:
        """All metrics but CRPS of two fields (T, X, Y): a dict of (T,)."""
        spectra = [metrics.energy_spectrum(field, self.length) for field in (predicted, true)]
        patches = [metrics.patch_spectrum(field, self.patch_size, self.length) for field in (predicted, true)]
        shares = [metrics.histogram(field, self.low, self.high, self.num_bins) for field in (predicted, true)]
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
class Evaluation:
    """What `evaluate` found: `results` for JSON, and of each row the first trajectory's states (T, X, Y)."""

    results: dict[str, Any]
    examples: dict[str, np.ndarray]


def evaluate(
    truth: np.ndarray,
    climatology: np.ndarray,
    rollout: Callable[[np.ndarray, str, int], np.ndarray | torch.Tensor],
    tokenizer: "leviathan.FieldTokenizer",
    samplings: Sequence[str],
    seeds: Sequence[int],
    *,
    length: float = 1.0,
    band: tuple[int, int] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Scores rollouts and references against the truth, at every step, with bootstrap intervals over trajectories.

    Args:
        truth: True states (B, T + 1, N, N) in 1 / time, the initial ones first.
        climatology: States (B, T, N, N) of flows that have nothing to do with the true ones, at the same times.
        rollout: Function of initial states (B, N, N), a sampling and a seed that returns next states (B, T, N, N).
        tokenizer: A fitted FieldTokenizer, for `quantise_only`, the histogram's range and the patches.
        samplings: Names of samplings, each a row; deterministic ones run once, the others for each seed.
        seeds: Seeds of the random samplings.
        length: Side of the periodic square.
        band: Wavenumbers of the slope; `metrics.slope_band` of the grid by default.
        progress: Show a progress bar.

    Raises:
        ValueError: On states that are not finite or whose shapes do not fit each other.
    """
    truth, climatology = np.asarray(truth, np.float32), np.asarray(climatology, np.float32)
    if truth.ndim != 4 or truth.shape[1] < 2 or climatology.shape != truth[:, 1:].shape:
        raise ValueError(
            f"truth has shape {truth.shape} and climatology {climatology.shape}; expected (B, T + 1, N, N) and "
            "(B, T, N, N)."
        )
    band = band or metrics.slope_band(truth.shape[-1])
    setting = MetricSettings(
        tokenizer.low, tokenizer.high, tokenizer.patch_size, length, band, min(256, tokenizer.vocab_size)
    )
    future = truth[:, 1:]
    num_steps = future.shape[1]
    shown = sorted({step for step in SUMMARY_STEPS if step <= num_steps} | {num_steps})
    at_shown = [step - 1 for step in shown]
    outside = (truth < tokenizer.low) | (truth > tokenizer.high)
    results: dict[str, Any] = {
        "metrics": {name: {"label": label, "best": best} for name, (label, best) in METRICS.items()},
        "slope_band": list(band),
        "clipped": {"count": int(outside.sum()), "fraction": float(outside.mean())},
        "truth": _truth_statistics(future, setting),
        "noise_floor": None,
        "rows": {},
        "spectra": {"steps": shown, "rows": {"truth": _mean_spectra(future[None], at_shown, length)}},
        "pdf": {
            "low": tokenizer.low,
            "high": tokenizer.high,
            "steps": shown,
            "rows": {"truth": _mean_shares(future[None], at_shown, setting)},
        },
    }
    examples, distances = {"truth": future[0]}, {}
    with tqdm(total=len(samplings) + 4, desc="evaluate", unit="row", disable=not progress) as bar:
        if len(future) > 1:
            floor = metrics.noise_floor(setting.score, future)
            results["noise_floor"] = {name: _numbers(floor[name]) for name in FLOOR_METRICS}
        bar.update()
        for name, states, about in _predictions(truth, climatology, rollout, tokenizer, samplings, seeds):
            if states.shape[1:] != future.shape:
                raise ValueError(
                    f"{name} has shape {states.shape}; expected (seeds, {', '.join(map(str, future.shape))})."
                )
            scores = _scores(states, future, setting)
            results["rows"][name] = about | {"metrics": {key: _summed_up(each) for key, each in scores.items()}}
            distances[name] = {key: np.abs(each - METRICS[key][1]).mean(0) for key, each in scores.items()}  # (B, T)
            results["spectra"]["rows"][name] = _mean_spectra(states, at_shown, length)
            results["pdf"]["rows"][name] = _mean_shares(states, at_shown, setting)
            examples[name] = states[0, 0].copy()  # not a view, which would keep the whole row
            bar.update()
    results["summary"] = {
        row: {name: {str(step): each["mean"][step - 1] for step in shown} for name, each in about["metrics"].items()}
        for row, about in results["rows"].items()
    }
    results["comparisons"] = {  # below 0: nearer to the best value than the reference is, flow by flow
        row: {
            other: {name: _compared(distances[row][name] - distances[other][name]) for name in METRICS}
            for other in ("persistence", "climatology")
        }
        for row in samplings
    }
    return Evaluation(results, examples)


def _predictions(
    truth: np.ndarray,
    climatology: np.ndarray,
    rollout: Callable[[np.ndarray, str, int], np.ndarray | torch.Tensor],
    tokenizer: "leviathan.FieldTokenizer",
    samplings: Sequence[str],
    seeds: Sequence[int],
) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
    """Yields each row's name, states (seeds, B, T, N, N) and how they were made, one row in memory at a time."""
    initial, future = truth[:, 0], truth[:, 1:]
    for sampling in samplings:
        runs = list(seeds) if sampling in RANDOM else list(seeds[:1])
        start = time.perf_counter()
        states = np.stack([np.asarray(rollout(initial, sampling, seed), np.float32) for seed in runs])
        seconds = time.perf_counter() - start
        speed = states.size / seconds  # a token is a pixel
        yield sampling, states, {"kind": "model", "seeds": runs, "seconds": seconds, "tokens_per_second": speed}
    yield "persistence", np.broadcast_to(initial[:, None], future.shape)[None], {"kind": "reference"}
    yield "climatology", climatology[None], {"kind": "reference"}
    grid = future.shape[-2:]
    ids = tokenizer(future.reshape(-1, *grid))["input_ids"]
    states = np.asarray(tokenizer.decode(ids, field_shape=grid), np.float32).reshape(future.shape)
    yield "quantise_only", states[None], {"kind": "reference"}


def _scores(states: np.ndarray, future: np.ndarray, setting: MetricSettings) -> dict[str, np.ndarray]:
    """All metrics of a row, (seeds, B, T) each; seeds are the members of one ensemble for CRPS, (1, B, T)."""
    runs = [[setting.score(run[b], true) for b, true in enumerate(future)] for run in states]
    scores = {name: np.array([[each[name] for each in run] for run in runs]) for name in runs[0][0]}
    crps = [metrics.crps(states[:, b].swapaxes(0, 1), true) for b, true in enumerate(future)]
    return scores | {"crps": np.array(crps)[None]}


def _summed_up(scores: np.ndarray) -> dict[str, list[float] | None]:
    """Mean, interval over trajectories and spread between seeds, lists over steps, of scores (seeds, B, T)."""
    interval = metrics.bootstrap(scores.mean(0)) if scores.shape[1] > 1 else None
    return {
        "mean": _numbers(scores.mean((0, 1))),
        "low": interval and _numbers(interval.low),
        "high": interval and _numbers(interval.high),
        "seed_spread": _numbers(scores.mean(1).std(0, ddof=1)) if len(scores) > 1 else None,
    }


def _compared(differences: np.ndarray) -> dict[str, list[float] | None]:
    """Mean and Student's interval over trajectories of paired differences (B, T), lists over steps."""
    interval = metrics.student_interval(differences) if len(differences) > 1 else None
    return {
        "mean": _numbers(differences.mean(0)),
        "low": interval and _numbers(interval.low),
        "high": interval and _numbers(interval.high),
    }


def _truth_statistics(future: np.ndarray, setting: MetricSettings) -> dict[str, list[float]]:
    spectra = [metrics.energy_spectrum(field, setting.length) for field in future]
    each = {
        "enstrophy": [metrics.enstrophy(field) for field in future],
        "energy": [spectrum.sum(-1) for spectrum in spectra],
        "slope": [metrics.spectral_slope(spectrum, setting.band).slope for spectrum in spectra],
        "border_jump": [metrics.border_jump(field, setting.patch_size) for field in future],
    }
    return {name: _numbers(np.mean(values, axis=0)) for name, values in each.items()}


def _mean_spectra(states: np.ndarray, steps: list[int], length: float) -> list[list[float]]:
    runs = [metrics.energy_spectrum(field[steps], length) for run in states for field in run]
    return [_numbers(spectrum) for spectrum in np.mean(runs, axis=0)]


def _mean_shares(states: np.ndarray, steps: list[int], setting: MetricSettings) -> list[list[float]]:
    runs = [
        metrics.histogram(field[steps], setting.low, setting.high, setting.num_bins) for run in states for field in run
    ]
    return [_numbers(shares) for shares in np.mean(runs, axis=0)]


def _numbers(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def load(args: argparse.Namespace) -> dict[str, Any]:
    """Model, tokenizer, file, training record and trajectories of the command, checked against each other.

    Raises:
        FileNotFoundError: If the model's folder or the data is missing.
        ValueError: If model, tokenizer, data and options do not fit each other.
    """
    if not (args.model / "config.json").is_file():
        raise FileNotFoundError(
            f"{args.model} holds no model (no config.json); train one with `python -m training.train`."
        )
    record = args.model / "training.json"
    training = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    fields = FieldFile(args.data)
    tokenizer = AutoFeatureExtractor.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device).eval()
    _check_data(args, fields, training)
    stride, size = training.get("stride", 1), tokenizer.patch_size
    available = (fields.num_snapshots - 1) // stride
    split = split_trajectories(fields.num_trajectories, **_split_options(training))
    trajectories = getattr(split, args.split)
    grid, ids = fields.grid, (model.config.vocab_size, tokenizer.vocab_size)
    refused = {
        f"the model has {ids[0]} ids and its tokenizer {ids[1]}; take both from one run": ids[0] != ids[1],
        f"{args.data} has fields of {grid[0]} x {grid[1]}; expected a square, a multiple of the patch's {size}": (
            grid[0] != grid[1] or grid[0] % size
        ),
        f"--num-steps {args.num_steps}: {args.data} has {available} states after the first, {stride} snapshots apart": (
            not 1 <= args.num_steps <= available
        ),
        f"--num-trajectories {args.num_trajectories}: the {args.split} split has {len(trajectories)}": (
            args.num_trajectories is not None and not 1 <= args.num_trajectories <= len(trajectories)
        ),
        f"--seeds {args.seeds}: give different ones": len(set(args.seeds)) < len(args.seeds),
    }
    for reason, applies in refused.items():
        if applies:
            raise ValueError(f"{reason}.")
    return {
        "model": model,
        "tokenizer": tokenizer,
        "fields": fields,
        "training": training,
        "snapshots": range(0, stride * args.num_steps + 1, stride),
        "trajectories": trajectories[: args.num_trajectories],
        "strangers": np.random.default_rng(0).permutation(split.train),
    }


def _pixels_per_step(fields: FieldFile, parts: dict[str, Any]) -> float:
    """Mean distance that the flow moves from a state to the next, in pixels."""
    speeds = [np.hypot(*fields.velocity(int(i), t)).mean() for i in parts["trajectories"] for t in parts["snapshots"]]
    return float(np.mean(speeds) * fields.dt_save * parts["snapshots"].step / fields.spacing[0])


def _check_data(args: argparse.Namespace, fields: FieldFile, training: dict[str, Any]) -> None:
    """Refuses a file whose split would not be the training's: its test flows may have been trained on."""
    seen = training.get("data_record")
    if args.other_data or seen is None:
        return
    now = data_record(fields)
    if differ := [f"{key} {now[key]}, not {seen.get(key)}" for key in now if now[key] != seen.get(key)]:
        raise ValueError(
            f"{args.data} is not the file of the training ({'; '.join(differ)}), so its {args.split} split may hold "
            "flows that were trained on; give that file, or --other-data if it holds none of them."
        )


def _split_options(training: dict[str, Any]) -> dict[str, Any]:
    split = training.get("split", {})
    return {key: tuple(value) if key == "fractions" else value for key, value in split.items()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Does what the command says; returns what results.json holds."""
    parts = load(args)
    model, tokenizer, fields, training = (parts[key] for key in ("model", "tokenizer", "fields", "training"))
    with fields:
        truth = np.stack([fields.vorticity(int(i), parts["snapshots"]) for i in parts["trajectories"]])
        strangers = np.resize(parts["strangers"], len(truth))  # repeated if there are too few
        climatology = np.stack([fields.vorticity(int(i), parts["snapshots"][1:]) for i in strangers])
    options = {key: getattr(args, key) for key in ("temperature", "top_k", "top_p", "batch_size", "block_size")}

    def rollout(initial: np.ndarray, sampling: str, seed: int) -> torch.Tensor:
        return leviathan.rollout(
            model, tokenizer, initial, num_steps=args.num_steps, sampling=sampling, seed=seed, **options
        )

    length = fields.spacing[0] * fields.grid[0]
    evaluation = evaluate(
        truth, climatology, rollout, tokenizer, args.samplings, args.seeds, length=length, band=args.band
    )
    components = figures.principal_components(model.get_input_embeddings().weight)
    results = {
        "config": options
        | {key: getattr(args, key) for key in ("split", "num_steps", "samplings", "seeds", "device", "dtype")}
        | {"model": relative(args.model), "data": relative(args.data), "trajectories": parts["trajectories"].tolist()},
        "data": {
            "grid": list(fields.grid),
            "length": length,
            "dt": fields.dt_save * parts["snapshots"].step,
            "synthetic": fields.synthetic,
            "num_trajectories": fields.num_trajectories,
            "attributes": data_record(fields)["attributes"],
            "pixels_per_step": _pixels_per_step(fields, parts),
        },
        "model": {
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "vocab_size": tokenizer.vocab_size,
            "patch_size": tokenizer.patch_size,
            "embedding_type": getattr(model.config, "embedding_type", None),
            "embedding_explained": _numbers(components.explained),
        },
    }
    results |= evaluation.results | {"provenance": provenance(args.seeds)}
    args.out.mkdir(parents=True, exist_ok=True)
    figures.draw_all(args.out, results, evaluation.examples, components, training)
    write_json(args.out / "results.json", results)
    print(summary_text(results, training))
    print(f"Numbers are in {args.out / 'results.json'}, pictures beside it; the overview is contact_sheet.png.")
    return results


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a trained model with its tokenizer")
    add("--data", type=Path, required=True, help="HDF5 file of trajectories in PDEBench's layout")
    add("--out", type=Path, required=True, help="folder for results.json and pictures")
    add("--split", choices=("train", "validation", "test"), default="test", help="which trajectories; default: test")
    add("--other-data", action="store_true", help="the data is another file than the training's, with other flows")
    add("--num-steps", type=int, default=20, help="states to generate; default: %(default)s")
    add("--num-trajectories", type=int, help="only the first so many of the split")
    add("--samplings", nargs="+", default=["expectation", "greedy", "sample"], help="the first is the headline")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the random samplings; default: 0 1 2")
    add("--temperature", type=float, default=1.0)
    add("--top-k", type=int, default=50)
    add("--top-p", type=float, default=0.9)
    add("--band", nargs=2, type=int, metavar=("LOW", "HIGH"), help="wavenumbers of the spectral slope")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the weights; default: as saved")
    add("--batch-size", type=int, default=256, help="patches in one forward pass")
    add("--block-size", type=int, default=1, help="tokens decoded at one time; see leviathan.rollout")
    args = parser.parse_args(arguments)
    args.samplings = [name for group in args.samplings for name in group.split(",")]
    unknown = [name for name in args.samplings if name not in DETERMINISTIC + RANDOM]
    if unknown or len(set(args.samplings)) < len(args.samplings):
        parser.error(f"--samplings {args.samplings}: expected different ones of {', '.join(DETERMINISTIC + RANDOM)}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    try:
        run(parse(arguments))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
