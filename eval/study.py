"""Compares trainings that differ in some settings, each tuned with the same budget and trained with the same seeds.

    python -m eval.study --config training/configs/turbulence_tiny_cpu.yaml --compare model.output_head=dense,digits \
        --tune training.learning_rate=1e-3,2e-3,4e-3 --seeds 0 1 2 --out runs/head [--section.key value ...]
    python -m eval.study --config training/configs/text_tiny_cpu.yaml --arms training/configs/text_arms.yaml ...

Every arm (a value of --compare, or an entry of the file --arms) is trained with every value of --tune and the first
seed; the value with the least validation loss then gets the other seeds. Writes study.json and prints a table.
Interrupted, it goes on where it stopped; with --only, several processes train an arm or two each; with --finished it
sums up what is there.

In the file of arms each has a name and its settings (`model.embedding_type: lookup`); with `same_parameters_as: ARM`
one size of its model, `vary` or the first of them that will do (see training.sizes), is chosen so that it has as many
parameters as that arm. A training that diverged has no loss and is worse than any other.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

from training.provenance import provenance, relative, write_json
from training.settings import Settings, load_yaml, read_settings
from training.sizes import VARY, count_parameters, flags_of, match_parameters, model_options
from training.train import allowed_keys, run

NO_METRICS = {"step", "epoch", "runtime", "samples_per_second", "steps_per_second"}  # in an entry of validation
Arms = dict[str, list[str]]


def parse_values(text: str) -> tuple[str, list[str]]:
    """Takes ``section.key=a,b,c`` apart.

    Raises:
        argparse.ArgumentTypeError: If it is something else.
    """
    name, equals, values = text.partition("=")
    if not (equals and values and name.count(".") == 1):
        raise argparse.ArgumentTypeError(f"{text!r}; expected section.key=value,value")
    return name, values.split(",")


def settings_flags(settings: Mapping[str, Any]) -> list[str]:
    """The flags of a mapping of settings: ``{"section.key": value}`` is ``["--section.key", value]``."""
    return [word for key, value in settings.items() for word in (f"--{key}", json.dumps(value))]


def seconds_of(report: Mapping[str, Any]) -> float | None:
    """The time of a whole training by what `training.json` holds, also if the last part of it alone was timed.

    None if that part had no steps: the run was only finished by it.
    """
    timed = report["steps"] - report["resumed_from_step"]
    return report["seconds"] * report["steps"] / timed if timed > 0 else None


def best_of(losses: Mapping[str, float | None]) -> str:
    """The value with the least loss; None, of a training that diverged, is the worst."""
    return min(losses, key=lambda value: inf if losses[value] is None else losses[value])


def read_arms(path: Path, config: Path, flags: Sequence[str]) -> Arms:
    """The flags of every arm of a file.

    Raises:
        ValueError: If an entry is no mapping of settings, or is to match an arm that is not there.
    """
    content = load_yaml(path)
    if not isinstance(content, dict) or not all(isinstance(arm, dict | None) for arm in content.values()):
        raise ValueError(f"{path}: expected a name for each arm and below it settings, `section.key: value`.")
    content = {name: dict(arm or {}) for name, arm in content.items()}
    matched = {name: (arm.pop("same_parameters_as", None), arm.pop("vary", None)) for name, arm in content.items()}
    arms: Arms = {str(name): settings_flags(arm) for name, arm in content.items()}
    for name, (other, vary) in matched.items():
        if other is None:
            continue
        if other not in arms:
            raise ValueError(f"{path}: {name} is to match {other!r}, which is none of {', '.join(arms)}.")
        target = count_parameters(model_options(config, [*flags, *arms[other]]))
        options = model_options(config, [*flags, *arms[name]])
        sizes = [vary] if isinstance(vary, str) else vary or VARY
        arms[name] += flags_of(match_parameters(target, options, sizes), options)
    return arms


def train_one(config: Path, flags: Sequence[str], folder: Path, seed: int) -> dict[str, Any]:
    """One training, or what it left; its last validation, seconds and sizes."""
    own = ["--training.seed", str(seed), "--training.output_dir", str(folder)]
    settings: Settings = read_settings(config, [*flags, *own], allowed_keys())
    settings["training"]["resume_from_checkpoint"] = True
    report = run(settings)
    curve = [{name: row[name] for name in row if name not in NO_METRICS - {"step"}} for row in report["validation"]]
    return {
        "seed": seed,
        **{name: value for name, value in curve[-1].items() if name != "step"},
        "validation": curve,
        "seconds": seconds_of(report),
        "steps": report["steps"],
        "tokens_per_step": report["tokens_per_step"],
        "num_parameters": report["num_parameters"],
        "embedding_parameters": report["embedding_parameters"],
        "references": {name: report[name] for name in ("marginal_entropy", "persistence_nrmse") if name in report},
    }


def is_trained(out: Path, arm: str, values: Sequence[str], seeds: Sequence[int]) -> bool:
    """Whether an arm's runs are there: that of every value with the first seed, and those of one with all seeds."""

    def done(value: str, seed: int) -> bool:
        return (out / f"{arm}-{value}-{seed}" / "training.json").is_file()

    return all(done(v, seeds[0]) for v in values) and any(all(done(v, seed) for seed in seeds) for v in values)


def study(
    config: Path,
    arms: Arms,
    tune: tuple[str, list[str]],
    seeds: Sequence[int],
    out: Path,
    flags: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains all arms; a dict of `arms`, each with `tuning`, `best`, `runs` and the mean and spread over seeds."""
    found = {}
    for arm, own in arms.items():

        def trained(value: str, seed: int, arm: str = arm, own: Sequence[str] = own) -> dict[str, Any]:
            return train_one(config, [*flags, *own, f"--{tune[0]}", value], out / f"{arm}-{value}-{seed}", seed)

        tuning = {value: trained(value, seeds[0]) for value in tune[1]}
        losses = {value: each["loss"] for value, each in tuning.items()}
        best = best_of(losses)
        runs = [tuning[best], *(trained(best, seed) for seed in seeds[1:])]
        names = [name for name, value in runs[0].items() if isinstance(value, float | None)]
        found[arm] = {
            "settings": [relative(word) for word in own],
            "tuning": losses,
            "best": best,
            "runs": runs,
            "num_parameters": runs[0]["num_parameters"],
            **{name: summed_up([each[name] for each in runs]) for name in names},
        }
    first = next(iter(found.values()))
    for arm in found.values():
        own, theirs = arm["loss"], first["loss"]
        arm["loss_ratio"] = None if None in (own, theirs) else own["mean"] / theirs["mean"]
    return {
        "config": relative(config),
        "flags": [relative(flag) for flag in flags],
        "tune": tune[0],
        "references": first["runs"][0]["references"],
        "arms": found,
        "provenance": provenance(list(seeds)),
    }


def summed_up(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean and standard deviation, the latter 0 for a single value; None if a value is None, or there is none."""
    if not values or None in values:
        return None
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "standard_deviation": spread}


def table(found: dict[str, Any]) -> str:
    """The arms as lines of text: means and standard deviations over the seeds."""
    arms = found["arms"].values()
    summed = (name for arm in arms for name, value in arm.items() if isinstance(value, dict) and "mean" in value)
    names = [name for name in dict.fromkeys(summed) if name != "seconds"]
    head = "".join(f"{name:>18}" for name in names)
    lines = [f"{'arm':>24} {found['tune'].rpartition('.')[2]:>14} {'parameters':>12}{head} {'seconds':>9}  loss ratio"]
    for arm, each in found["arms"].items():
        scores = [
            "-" if each[n] is None else f"{each[n]['mean']:.4f} ± {each[n]['standard_deviation']:.4f}" for n in names
        ]
        ratio, seconds = each["loss_ratio"], each["seconds"]
        lines.append(
            f"{arm:>24} {each['best']:>14} {each['num_parameters']:>12,}"
            f"{''.join(f'{score:>18}' for score in scores)} "
            f"{'-' if seconds is None else format(seconds['mean'], '.0f'):>9}  "
            f"{'-' if ratio is None else format(ratio, '.4f')}"
        )
    references = ", ".join(f"{name} {value:.4f}" for name, value in found["references"].items())
    return "\n".join([*lines, references])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--compare", type=parse_values, help="section.key=value,value: the arms")
    which.add_argument("--arms", type=Path, help="YAML file of arms")
    parser.add_argument("--only", nargs="+", help="train these arms, and leave the rest and study.json to another call")
    parser.add_argument("--finished", action="store_true", help="train nothing; sum up the arms that are trained")
    parser.add_argument("--tune", type=parse_values, required=True, help="section.key=value,value: the same for each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="folder of the trainings and study.json")
    known, flags = parser.parse_known_args(arguments)
    try:
        if known.compare:
            name, values = known.compare
            arms = {value: [f"--{name}", value] for value in values}
        else:
            arms = read_arms(known.arms, known.config, flags)
        if unknown := set(known.only or ()) - arms.keys():
            raise ValueError(f"--only {' '.join(sorted(unknown))}: the arms are {', '.join(arms)}.")
        chosen = {name: own for name, own in arms.items() if known.only is None or name in known.only}
        if known.finished:
            chosen = {n: own for n, own in chosen.items() if is_trained(known.out, n, known.tune[1], known.seeds)}
            if not chosen:
                raise ValueError(f"--finished: no arm in {known.out} is trained with all values and seeds yet.")
        found = study(known.config, chosen, known.tune, known.seeds, known.out, flags)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(table(found))
    if known.only is not None:
        return None
    write_json(known.out / "study.json", found)
    return found


if __name__ == "__main__":
    main()
