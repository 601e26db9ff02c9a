"""Solves a ready problem over all of its axes at once, and measures the solution against a reference.

    python -m training.vsna --config training/configs/vsna_heat.yaml --out runs/vsna/heat [--section.key value ...]

Writes the model and `record.json`: the equation, the axes, how it was solved, the error, and whether targets are met.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from leviathan.vsna import VsnaConfig, VsnaModel
from sna_core.solve import SolveReport
from training.provenance import provenance, write_json
from training.settings import Settings, read_settings
from training.vsna_errors import FieldError, random_points
from training.vsna_problems import OPTIONS, build

SOLVER = ("decomposition", "rank", "tolerance", "method", "max_sweeps", "seed")
SIZES = ("decomposition", "rank", "train_ranks", "frame_sizes", "axis_order")
TARGETS = ("relative_l2", "largest_of_peak", "num_parameters", "seconds")
NUM_QUERIES, NUM_REPEATS = 200_000, 3  # of the timed evaluation


def allowed_keys() -> dict[str, Sequence[str]]:
    """The keys of each section of a config."""
    return {
        "problem": ("name", *sorted({option for taken in OPTIONS.values() for option in taken})),
        "solver": SOLVER,
        "error": ("num_points",),
        "target": TARGETS,
    }


def run(settings: Settings, out: str | Path) -> dict[str, Any]:
    """Solves, measures and saves; returns what `record.json` holds.

    Args:
        settings: Sections as of :func:`allowed_keys`.
        out: Folder for the model and the record.

    Raises:
        ValueError: On settings that do not fit each other, or a folder that holds a model already.
    """
    out = Path(out)
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a model already; choose another --out.")
    for key, limit in settings["target"].items():
        if not isinstance(limit, int | float) or not limit > 0:
            raise ValueError(f"target.{key} = {limit!r}; expected a number above 0.")
    problem, solver = dict(settings["problem"]), dict(settings["solver"])
    name, seed = problem.pop("name", None), solver.pop("seed", 0)
    ready = build(name, **problem)
    sizes = {key: solver.pop(key) for key in ("rank", "decomposition") if key in solver}
    try:
        model = VsnaModel(VsnaConfig.for_problem(ready.problem, **sizes))
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error
    report = model.solve(ready.problem, seed=seed, **solver)
    error = ready.measure(model, seed=seed, **settings["error"])
    config = model.config
    record = {
        "problem": name,
        "settings": settings,
        "equation": config.equation,
        "axes": [
            {**options, "num_basis": axis.basis.num_basis}
            for options, axis in zip(config.axes, config.problem_axes, strict=True)
        ],
        "field": {key: getattr(config, key) for key in SIZES} | {"num_parameters": model.num_parameters()},
        "solve": {key: each.tolist() if isinstance(each, Tensor) else each for key, each in vars(report).items()},
        "reference": ready.origin,
        "error": asdict(error),
        "query": {"seconds": seconds_per_query(model, seed), "num_points": NUM_QUERIES, "dtype": "float32"},
        "targets": compared(settings["target"], report, error),
        "provenance": provenance(seed),
    }
    model.save_pretrained(out)
    write_json(out / "record.json", record)
    return record


def compared(limits: Mapping[str, float], report: SolveReport, error: FieldError) -> dict[str, dict[str, Any]]:
    """Of each target its limit, the value that was found, and whether it was reached."""
    found = {
        "relative_l2": error.relative_l2,
        "largest_of_peak": error.largest_of_peak,
        "num_parameters": report.num_parameters,
        "seconds": report.seconds,
    }
    return {
        name: {"limit": limit, "value": found[name], "reached": found[name] <= limit} for name, limit in limits.items()
    }


def seconds_per_query(model: VsnaModel, seed: int = 0) -> float:
    """Time of one value of the field among many random points, by :meth:`VsnaModel.table`: the median of some runs."""
    points = random_points(model, NUM_QUERIES, seed).float()
    table, times = model.table(), []
    for _ in range(NUM_REPEATS):
        start = time.perf_counter()
        table(points)
        times.append(time.perf_counter() - start)
    return statistics.median(times) / NUM_QUERIES


def summary(record: Mapping[str, Any]) -> str:
    """A record as lines of text."""
    error, field = record["error"], record["field"]
    lines = [
        record["equation"],
        record["solve"]["message"],
        f"{field['decomposition']}, {field['num_parameters']:,} parameters, {record['solve']['seconds']:.1f} s; "
        f"{record['query']['seconds'] * 1e6:.2f} us for each query",
        f"relative L2 error {error['relative_l2']:.2e}, largest {error['largest']:.2e}, "
        f"{error['largest_of_peak']:.2e} of the peak ({error['rule']})",
    ]
    for name, target in record["targets"].items():
        met = "reached" if target["reached"] else "not reached"
        lines.append(f"target {name} <= {target['limit']:g}: {target['value']:g}, {met}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    allowed = allowed_keys()
    keys = "\n".join(f"  --{section}.{{{','.join(sorted(names))}}}" for section, names in allowed.items())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="settings, over those of the file:\n" + keys,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, type=Path, help="YAML file of settings")
    parser.add_argument(
        "--out", type=Path, help="folder of model and record; runs/vsna and the config's name if left out"
    )
    known, flags = parser.parse_known_args(arguments)
    out = known.out or Path("runs/vsna", known.config.stem.removeprefix("vsna_"))
    try:
        record = run(read_settings(known.config, flags, allowed), out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(summary(record))
    return record


if __name__ == "__main__":
    main()
