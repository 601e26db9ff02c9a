"""Plans training past one device: what the published sizes of Leviathan take on 1 to 512 H200, by strategy.

    python -m eval.scaling --out model_cards/scaling --card model_cards/scaling.md

Parameters and FLOPs are counted on the models themselves and held against closed formulas; memory and time follow from
counts, data sheets and assumptions, which the record names. The same formulas are checked on this machine's CPU. Writes
scaling.json, a picture and the card.
"""

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import training
from eval.scaling_card import scaling_card
from eval.scaling_checks import memory_points, this_cpu, time_points
from eval.scaling_cluster import (
    BEST,
    H200,
    SHARDINGS,
    USABLE,
    WORST,
    Device,
    Memory,
    Strategy,
    Work,
    check_split,
    memory,
    step_seconds,
)
from eval.scaling_counts import (
    Backbone,
    Count,
    Pass,
    count_backbone,
    count_generator,
    count_head,
    count_parameters,
    fit_backbone,
)
from eval.scaling_figures import draw_all
from eval.scaling_model import Batch, Precision, check_covered, flops, parameters
from leviathan import LeviathanConfig
from training.provenance import provenance, write_json, write_text
from training.settings import read_settings
from training.sizes import model_options
from training.train import allowed_keys

CONFIGS = Path(training.__file__).parent / "configs"
SIZES = {"60M": "pile_60m", "109M": "pile_109m", "420M": "pile_420m", "1B": "pile_1b", "turbulence": "turbulence_64"}
DEVICES = tuple(2**power for power in range(10))
TENSOR_PARALLEL = (2, 4, 8)
GENERATED_IDS = 4  # of which the generator's work is counted: it is proportional to them
DIGITS = 6  # of floating-point numbers in the record
RECORD = "scaling.json"


@dataclass(frozen=True)
class Run:
    """What a training config says of a run.

    Attributes:
        config: The model.
        tokens, prefix: Of a sequence.
        rows: Sequences of a micro-batch on a device, at most.
        sequences: Of a step, of all devices.
        steps: Of the run.
    """

    config: LeviathanConfig
    tokens: int
    prefix: int
    rows: int
    sequences: int
    steps: int

    @property
    def tokens_of_step(self) -> int:
        """Tokens of all devices."""
        return self.sequences * self.tokens

    def batch(self, rows: int) -> Batch:
        """A micro-batch in which no id comes twice while there are others: the most that a generator may have to do."""
        return Batch(rows, self.tokens, min(rows * self.tokens, self.config.vocab_size), self.prefix)


def read_run(path: Path) -> Run:
    """The run of a training config.

    Raises:
        ValueError: If the formulas do not cover its model.
    """
    settings = read_settings(path, [], allowed_keys())
    config = LeviathanConfig(**model_options(path, []))
    check_covered(config)
    options, patch = settings["training"], settings["tokenizer"].get("patch_size")
    rows = options["per_device_train_batch_size"]
    # A patch's next state behind the one before; a text's context.
    tokens, prefix = (2 * patch**2, patch**2) if patch else (settings["data"]["context_length"], 0)
    sequences = options.get("sequences_per_step") or rows * options.get("gradient_accumulation_steps", 1)
    return Run(config, tokens, prefix, rows, sequences, options["max_steps"])


def counted(run: Run, work: "Counted") -> dict[str, Any]:
    """Parameters and FLOPs of a micro-batch, counted and by the formulas, and what the generator's count rests on."""
    config, batch = run.config, run.batch(run.rows)
    backbone, head = count_backbone(config, batch, "autocast"), count_head(config, batch.num_labels, "autocast")
    generator = count_generator(config, GENERATED_IDS) * (batch.distinct_ids / GENERATED_IDS)
    found, formula = (backbone + head + generator).total.flops, flops(config, batch, fused=True)
    # What plans are made from: the same work, from models of one and two layers.
    fitted = work.work(batch, Strategy("ddp"))
    counts, expected = count_parameters(config), parameters(config)
    return {
        "parameters": dataclasses.asdict(counts) | {"total": counts.total},
        "parameters_formula": expected.total,
        "flops": dataclasses.asdict(formula) | {"total": formula.total},
        "flops_counted": round(found),
        "flops_per_token": formula.total / batch.num_tokens,
        "is_equal": counts == expected and round(found) == round(formula.total),
        "extrapolation_is_equal": fitted.layers + fitted.ends == backbone,
        "traffic_bytes": round((backbone + head).total.bytes),
        "launches": round((backbone + head).total.launches),
    }


class Counted:
    """Work of a run's micro-batches of any size, from few counts."""

    def __init__(self, run: Run):
        self.run = run
        self._backbone = lru_cache(None)(self._fit)
        self._head = lru_cache(None)(self._count_head)
        self._generator = count_generator(run.config, GENERATED_IDS)

    def _fit(self, precision: Precision) -> Backbone:
        return fit_backbone(self.run.config, self.run.tokens, precision, self.run.prefix)

    def _count_head(self, num_labels: int, precision: Precision, fused: bool) -> Pass:
        return count_head(self.run.config, num_labels, precision, fused=fused)

    def work(self, batch: Batch, strategy: Strategy) -> Work:
        """Of a micro-batch."""
        backbone, layers = self._backbone(strategy.precision), self.run.config.num_hidden_layers
        ids = batch.distinct_ids / GENERATED_IDS
        return Work(
            layers=backbone.layers(layers, batch.rows),
            ends=backbone.fixed + batch.rows * backbone.row,
            head=self._head(batch.num_labels, strategy.precision, strategy.is_fused),
            # A GPU's few kernels, whose intermediate numbers stay in registers.
            generator=Pass(
                *(Count(flops=each.flops * ids) for each in (self._generator.forward, self._generator.backward))
            ),
        )


def strategies() -> list[Strategy]:
    """All, with and without checkpointing."""
    kinds = [Strategy(sharding) for sharding in SHARDINGS]
    kinds += [Strategy("ddp", split) for split in TENSOR_PARALLEL]
    return [dataclasses.replace(each, checkpointing=again) for each in kinds for again in (False, True)]


def plan(run: Run, work: Counted, strategy: Strategy, device: Device, counts: Sequence[int] = DEVICES) -> dict:
    """Memory and time of a strategy by the number of devices, in columns; what cannot be is left out, and said why."""
    columns: dict[str, list] = {name: [] for name in ("devices", "rows", "accumulation", "fits", "host_bytes")}
    columns |= {field.name: [] for field in dataclasses.fields(Memory) if field.name != "host"} | {"bytes": []}
    columns |= {f"{name}_{end}": [] for name in ("compute", "communication", "seconds") for end in ("best", "worst")}
    left_out: dict[str, list[int]] = {}
    for count in counts:
        copies = count // strategy.tensor_parallel
        why = check_split(run.config, strategy, count, device)
        if why is None and copies > run.sequences:
            why = f"{copies} copies are more than the {run.sequences} sequences of a step"
        if why is not None:
            left_out.setdefault(why, []).append(count)
            continue
        rows = min(run.rows, run.sequences // copies)
        batch, accumulation = run.batch(rows), math.ceil(run.sequences / (rows * copies))
        held = memory(run.config, batch, strategy, count, accumulation)
        steps = {
            end: step_seconds(
                run.config, batch, work.work(batch, strategy), strategy, count, accumulation, device, assumption
            )
            for end, assumption in (("best", BEST), ("worst", WORST))
        }
        row = {name: getattr(held, name) for name in columns if hasattr(held, name)}
        row |= {"devices": count, "rows": rows, "accumulation": accumulation, "bytes": held.total}
        row |= {"host_bytes": held.host, "fits": held.total <= USABLE * device.memory_bytes}
        for end, step in steps.items():
            row |= {f"compute_{end}": step.forward + step.backward + step.optimizer, f"seconds_{end}": step.total}
            row[f"communication_{end}"] = step.communication
        for name, column in columns.items():
            column.append(row[name])
    about = {"strategy": strategy.name, "checkpointing": strategy.checkpointing, "precision": strategy.precision}
    return about | columns | {"left_out": left_out}


def largest_rows(run: Run, strategy: Strategy, num_devices: int, device: Device) -> int:
    """The largest power of two of sequences at one time that fits a device; 0 if one does not."""
    rows = 0
    for power in range(20):
        held = memory(run.config, run.batch(2**power), strategy, num_devices, 1)
        if held.total > USABLE * device.memory_bytes:
            break
        rows = 2**power
    return rows


def study(names: Mapping[str, str] = SIZES, counts: Sequence[int] = DEVICES) -> dict[str, Any]:
    """The record, without its provenance: counts, plans, and the checks on this CPU by one thread."""
    torch.set_num_threads(1)
    cpu, launch_seconds = this_cpu()
    saved, peaks = memory_points()
    times = time_points(cpu, launch_seconds)
    sizes, node = {}, H200.devices_per_node
    for name, config in names.items():
        run = read_run(CONFIGS / f"{config}.yaml")
        work = Counted(run)
        found = counted(run, work)
        largest = {
            f"{strategy.name}{' checkpointing' * strategy.checkpointing}": largest_rows(run, strategy, node, H200)
            for strategy in strategies()
            if check_split(run.config, strategy, node, H200) is None
        }
        sizes[name] = {
            "config": config,
            "run": {key: value for key, value in vars(run).items() if key != "config"},
            "tokens_of_step": run.tokens_of_step,
            "tokens_of_run": run.tokens_of_step * run.steps,
            "counted": found,
            "largest_rows": largest,
            "plans": [plan(run, work, strategy, H200, counts) for strategy in strategies()],
        }
    described = dataclasses.asdict(cpu) | {"launch_seconds": launch_seconds}
    return {
        "devices": list(counts),
        "device": dataclasses.asdict(H200),
        "assumptions": {"best": vars(BEST), "worst": vars(WORST), "usable": USABLE},
        "cpu": {key: value for key, value in described.items() if value != math.inf},
        "checks": {
            "saved": [vars(point) for point in saved],
            "peak": [vars(point) for point in peaks],
            "time": [vars(point) for point in times],
        },
        "sizes": sizes,
    }


def rounded(entry: Any) -> Any:
    """A record with ``DIGITS`` digits of each floating-point number."""
    if isinstance(entry, Mapping):
        return {str(key): rounded(value) for key, value in entry.items()}
    if isinstance(entry, list | tuple):
        return [rounded(value) for value in entry]
    if isinstance(entry, float):
        return int(entry) if entry.is_integer() else float(f"{entry:.{DIGITS}g}")
    return entry


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the record and the picture")
    parser.add_argument("--card", type=Path, help="Markdown file to write; none without it")
    parser.add_argument("--words-only", action="store_true", help="write card and picture from the record in --out")
    args = parser.parse_args(arguments)
    try:
        if args.words_only:
            record = json.loads((args.out / RECORD).read_text(encoding="utf-8"))
        else:
            record = rounded(study()) | {"provenance": provenance()}
            write_json(args.out / RECORD, record)
        draw_all(args.out, record)
        if args.card:
            write_text(args.card, scaling_card(record, Path(os.path.relpath(args.out, args.card.parent)).as_posix()))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {args.card or args.out}")


if __name__ == "__main__":
    main()
