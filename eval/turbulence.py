"""The study of turbulence: arms of one size, tuned and trained with one budget, rolled out over the same flows.

    python -m eval.turbulence --study training/configs/turbulence_arms_cpu.yaml --out runs/turbulence \
        [--settings patches halo] [--only ARM ...] [--train-only] [--finished]

Settings: `patches` (each in isolation, as in the paper), `whole` (periodic fields) and `halo` (patches that see a
margin around them, stitched after every step). Trainings and scored rows are kept below --out: interrupted, the study
goes on where it stopped, and several processes with --only do an arm or two each. Without --only or --train-only it
ends with turbulence.json and pictures, of which eval.turbulence_card makes the model card.
"""

import argparse
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval import metrics, turbulence_figures
from eval.scoring import METRICS, MetricSettings, RowScores, reference_rows, score_row, summed_up
from eval.turbulence_arms import SETTINGS, Study, check_trained, read_study, train_arm, trained
from eval.turbulence_rows import Flows, find_row, metric_settings, read_flows, row_samplings, score_arm
from leviathan import FieldTokenizer
from training.provenance import provenance, relative, write_json

CORRELATED = 0.8
# The jump across borders lies off 1 in the truth too, where borders happen to cut through vortices.
STUDY_METRICS = METRICS | {"border_ratio": ("jump across borders / inside, over the truth's", 1)}


def decorrelation(correlation: np.ndarray, threshold: float = CORRELATED) -> tuple[np.ndarray, np.ndarray]:
    """The first time at which a correlation falls below a threshold, in steps, linear between them; 1 at time 0.

    Shapes: (..., T) -> times (...), and whether it fell at all (...). Where it did not, the time is T.
    """
    correlation = np.concatenate([np.ones_like(correlation[..., :1]), correlation], axis=-1)
    below = correlation < threshold
    fell, after = below.any(-1), below.argmax(-1)[..., None]
    high, low = (np.take_along_axis(correlation, index, -1)[..., 0] for index in (np.maximum(after - 1, 0), after))
    times = after[..., 0] - 1 + (high - threshold) / np.where(fell, high - low, 1)
    return np.where(fell, times, correlation.shape[-1] - 1), fell


def sum_up(
    flows: Flows, scored: Mapping[str, RowScores], tokenizer: FieldTokenizer | None, setting: MetricSettings
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The results of a setting for JSON and pictures, and an example of each row.

    Args:
        flows: Those of the test.
        scored: The arms' rows; the first is compared with all others, those of references among them.
        tokenizer: Of `quantise_only`; None leaves that out.
        setting: What the metrics need.
    """
    references = reference_rows(flows.truth, flows.climatology, tokenizer)
    scored = {**scored, **{row.name: score_row(row, flows.truth, setting) for row in references}}
    jump = np.stack([metrics.border_jump(flow, setting.patch_size) for flow in flows.truth[:, 1:]])
    for row in scored.values():
        row.scores["border_ratio"] = row.scores["border_jump"] / np.maximum(jump, np.finfo(np.float64).tiny)
    headline, *others = scored
    results = summed_up(flows.truth, scored, setting, {headline: others}, STUDY_METRICS)
    for name, row in scored.items():
        results["rows"][name]["decorrelation"] = _decorrelation(row, flows.about["dt"])
    for other, compared in results["comparisons"][headline].items():
        for metric, difference in compared.items():
            mean = results["rows"][headline]["metrics"][metric]["mean"]
            interval = results["rows"][other]["metrics"][metric]
            difference["outside"] = interval["low"] and [
                not low <= value <= high
                for value, low, high in zip(mean, interval["low"], interval["high"], strict=True)
            ]
    about = {"data": flows.about, "patch_size": setting.patch_size, "windowed": setting.windowed, "headline": headline}
    return about | results, {"truth": flows.truth[0, 1:]} | {name: row.example for name, row in scored.items()}


def _decorrelation(row: RowScores, dt: float) -> dict[str, Any]:
    times, fell = decorrelation(row.scores["correlation"])  # (seeds, B)
    interval = metrics.bootstrap(times.mean(0)) if times.shape[1] > 1 else None
    return {
        "steps": float(f"{times.mean():.6g}"),
        "low": interval and float(f"{interval.low:.6g}"),
        "high": interval and float(f"{interval.high:.6g}"),
        "time": float(f"{times.mean() * dt:.6g}"),
        "share_fallen": float(fell.mean()),
    }


def run_setting(
    study: Study, name: str, args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Trains, rolls out and sums up a setting as the command says; None where it is not to sum up, or finds nothing."""
    arms, chosen = study.settings[name], study.evaluation
    first = next(iter(arms.values()))
    folders = {arm: args.out / name / arm for arm in arms}
    for arm in [] if args.finished else arms if args.only is None else args.only:
        if arm in arms:
            train_arm(study, arms[arm], folders[arm])
    ready = [arm for arm in arms if trained(folders[arm])]
    if args.train_only or not ready:
        return None
    for arm in ready:
        if args.only is None or arm in args.only:
            check_trained(study, arms[arm], folders[arm])
    flows = read_flows(first, chosen, chosen.crop if name == "patches" else None)
    models = {arm: folders[arm] / "model" for arm in ready}
    setting = metric_settings(flows, first, models, chosen.patch_size, windowed=name == "patches")
    for arm in [] if args.finished else ready:
        if args.only is None or arm in args.only:
            score_arm(arms[arm], folders[arm], flows, setting, chosen, args.device)
    if args.only is not None:
        return None
    rows = [(folders[arm], row) for arm in ready for row in row_samplings(arms[arm], chosen)]
    found = {row: find_row(folder, row, flows, setting, chosen) for folder, row in rows}
    found = {row: scores for row, scores in found.items() if scores is not None}
    if not found:
        return None
    fitted = {"low": setting.low, "high": setting.high}
    tokenizer = None if first.is_operator else FieldTokenizer(**first.tokenizer() | fitted)
    results, examples = sum_up(flows, found, tokenizer, setting)
    results["arms"] = {arm: trained(folders[arm]) for arm in ready}
    return results, examples


def _missing(arms: Iterable[str], results: Mapping[str, Any] | None) -> list[str]:
    """Those of a setting's arms that no row is of."""
    there = {about.get("arm") for about in results["rows"].values()} if results else ()
    return [arm for arm in arms if arm not in there]


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Does what the command says; returns what turbulence.json holds, None where none is written.

    Raises:
        ValueError: On a study that cannot be done as its file says, or names that are not in it.
        OSError: If a file cannot be read.
    """
    study = read_study(args.study)
    names = {arm for setting in study.settings.values() for arm in setting}
    for flag, given, known in (("settings", args.settings, study.settings.keys()), ("only", args.only, names)):
        if unknown := [each for each in given or () if each not in known]:
            raise ValueError(f"--{flag} {' '.join(unknown)}: {args.study} has {', '.join(sorted(known))}.")
    found = {}
    for name in args.settings or study.settings:
        if (outcome := run_setting(study, name, args)) is not None:
            results, examples = outcome
            turbulence_figures.draw_all(args.out, name, results, examples)
            found[name] = {key: value for key, value in results.items() if key not in ("spectra", "pdf")}
    if args.train_only or args.only is not None:
        return None
    if not found:
        raise ValueError(f"--finished: no arm in {args.out} is trained and rolled out yet.")
    record = {
        "study": relative(args.study),
        "steps": study.steps,
        "tune_steps": study.tune_steps,
        "training_seed": study.training_seed,
        "evaluation": dataclasses.asdict(study.evaluation),
        "missing": {name: _missing(arms, found.get(name)) for name, arms in study.settings.items()},
        "settings": found,
        "provenance": provenance(list(study.evaluation.seeds)),
    }
    write_json(args.out / "turbulence.json", record)
    print(f"Numbers are in {args.out / 'turbulence.json'}, pictures beside it.")
    return record


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--study", type=Path, required=True, help="YAML file of the study")
    add("--out", type=Path, required=True, help="folder of trainings, rows, turbulence.json and pictures")
    add("--settings", nargs="+", choices=SETTINGS, help="of the study's settings these alone")
    add("--only", nargs="+", metavar="ARM", help="train and roll out these arms, and sum nothing up")
    add("--train-only", action="store_true", help="roll nothing out")
    add("--finished", action="store_true", help="train and roll out nothing; sum up the rows that are there")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the rollouts")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    try:
        run(parse(arguments))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
