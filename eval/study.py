"""Compares trainings that differ in one setting, each tuned with the same budget and trained with the same seeds.

    python -m eval.study --config training/configs/turbulence_tiny_cpu.yaml --compare model.output_head=dense,digits \
        --tune training.learning_rate=1e-3,2e-3,4e-3 --seeds 0 1 2 --out runs/head [--section.key value ...]

Every arm (a value of --compare) is trained with every value of --tune and the first seed; the value with the least
validation loss then gets the other seeds. Writes study.json and prints a table. Interrupted, it goes on where it
stopped.
"""

import argparse
import statistics
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

import yaml

from training.provenance import provenance, relative, write_json
from training.settings import Settings, read_settings
from training.train import allowed_keys, run

REPORTED = ("loss", "nrmse")


def parse_values(text: str) -> tuple[str, list[str]]:
    """Takes ``section.key=a,b,c`` apart.

    Raises:
        argparse.ArgumentTypeError: If it is something else.
    """
    name, equals, values = text.partition("=")
    if not (equals and values and name.count(".") == 1):
        raise argparse.ArgumentTypeError(f"{text!r}; expected section.key=value,value")
    return name, values.split(",")


def train_one(config: Path, flags: Sequence[str], folder: Path, seed: int) -> dict[str, Any]:
    """One training, or what it left; its last validation, seconds and sizes."""
    own = ["--training.seed", str(seed), "--training.output_dir", str(folder)]
    settings: Settings = read_settings(config, [*flags, *own], allowed_keys())
    settings["training"]["resume_from_checkpoint"] = True
    report = run(settings)
    last = report["validation"][-1]
    return {
        "seed": seed,
        **{name: last[name] for name in REPORTED},
        "validation": [{name: row[name] for name in ("step", *REPORTED)} for row in report["validation"]],
        # Of the whole training, also if the last part alone was timed.
        "seconds": report["seconds"] * report["steps"] / max(1, report["steps"] - report["resumed_from_step"]),
        "steps": report["steps"],
        "num_parameters": report["num_parameters"],
        "references": {name: report[name] for name in ("marginal_entropy", "persistence_nrmse")},
    }


def study(
    config: Path,
    compare: tuple[str, list[str]],
    tune: tuple[str, list[str]],
    seeds: Sequence[int],
    out: Path,
    flags: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains all arms; a dict of `arms`, each with `tuning`, `best`, `runs` and the mean and spread over seeds."""
    arms = {}
    for arm in compare[1]:

        def trained(value: str, seed: int, arm: str = arm) -> dict[str, Any]:
            chosen = [*flags, f"--{compare[0]}", arm, f"--{tune[0]}", value]
            return train_one(config, chosen, out / f"{arm}-{value}-{seed}", seed)

        tuning = {value: trained(value, seeds[0]) for value in tune[1]}
        best = min(tuning, key=lambda value: (isnan(tuning[value]["loss"]), tuning[value]["loss"]))
        runs = [tuning[best], *(trained(best, seed) for seed in seeds[1:])]
        arms[arm] = {
            "tuning": {value: each["loss"] for value, each in tuning.items()},
            "best": best,
            "runs": runs,
            "num_parameters": runs[0]["num_parameters"],
            **{name: _summed_up([each[name] for each in runs]) for name in (*REPORTED, "seconds")},
        }
    first = arms[compare[1][0]]
    for arm in arms.values():
        arm["loss_ratio"] = arm["loss"]["mean"] / first["loss"]["mean"]
    return {
        "config": relative(config),
        "flags": [relative(flag) for flag in flags],
        "compare": compare[0],
        "tune": tune[0],
        "references": first["runs"][0]["references"],
        "arms": arms,
        "provenance": provenance(list(seeds)),
    }


def _summed_up(values: list[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "standard_deviation": spread}


def table(found: dict[str, Any]) -> str:
    """The arms as lines of text: means and standard deviations over the seeds."""
    names = found["compare"], found["tune"].rpartition(".")[2]
    lines = [f"{names[0]:>20} {names[1]:>14} {'parameters':>12} {'loss':>18} {'nrmse':>18} {'seconds':>9}  loss ratio"]
    for arm, each in found["arms"].items():
        loss, nrmse = (f"{each[n]['mean']:.4f} ± {each[n]['standard_deviation']:.4f}" for n in REPORTED)
        lines.append(
            f"{arm:>20} {each['best']:>14} {each['num_parameters']:>12,} {loss:>18} {nrmse:>18} "
            f"{each['seconds']['mean']:>9.0f}  {each['loss_ratio']:.4f}"
        )
    references = ", ".join(f"{name} {value:.4f}" for name, value in found["references"].items())
    return "\n".join([*lines, references])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--compare", type=parse_values, required=True, help="section.key=value,value: the arms")
    parser.add_argument("--tune", type=parse_values, required=True, help="section.key=value,value: the same for each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="folder of the trainings and study.json")
    known, flags = parser.parse_known_args(arguments)
    try:
        found = study(known.config, known.compare, known.tune, known.seeds, known.out, flags)
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise SystemExit(f"error: {error}") from error
    write_json(known.out / "study.json", found)
    print(table(found))
    return found


if __name__ == "__main__":
    main()
