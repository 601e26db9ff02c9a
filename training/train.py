"""Trains a Leviathan, on the next state of flow fields or the next token of text; or an operator on the same fields.

    accelerate launch -m training.train --config training/configs/turbulence_tiny_cpu.yaml [--training.max_steps 100]
    accelerate launch -m training.train --config training/configs/text_tiny_cpu.yaml
    accelerate launch -m training.train --config training/configs/operators_cpu.yaml --model.architecture unet

A config has four sections: `data`, `tokenizer` and `model`, whose keys are those of the task that `data.kind` names
(`fields`: training/field_task.py, `text`: training/text_task.py, `operators`: training/operator_task.py), and
`training` (transformers.TrainingArguments and what training.trainer.TrainingSettings adds). The loop, mixed precision,
accumulation and trackers are transformers' Trainer's.

With `--training.resume_from_checkpoint true` a command may be given again and again, until the run is done: it begins,
goes on from the newest checkpoint that is whole (training/checkpoints.py), or says that it is trained already. On CPUs
in float32 a run that was killed, at any moment, and went on equals one that was not, to the bit. SIGTERM ends it after
the step, with a checkpoint, and exit code 143 = 128 + 15, which is that of a process ended by this signal: zero would
tell a scheduler that the run is done. Send it to the training process or to all of its group: `accelerate launch` does
not pass it on.
"""

import dataclasses
import difflib
import json
import signal
import sys
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel, set_seed

from training.checkpoints import PARTIAL, clear_partial, differences, list_checkpoints, newest_whole, step_of
from training.field_task import FieldTask
from training.launching import launcher
from training.operator_task import OperatorTask
from training.provenance import provenance, write_json
from training.settings import Settings, parse_arguments
from training.text_task import TextTask
from training.trainer import JsonLog, LeviathanTrainer, TrainingSettings, build_arguments, ending_on_termination

Task = FieldTask | OperatorTask | TextTask
TASKS: dict[str, type[Task]] = {"fields": FieldTask, "text": TextTask, "operators": OperatorTask}


def allowed_keys() -> dict[str, list[str]]:
    """The keys of each section of a config, of all tasks."""
    keys: dict[str, set[str]] = {"data": set(), "tokenizer": set(), "model": set()}
    for task in TASKS.values():
        for section, names in task.allowed_keys().items():
            keys[section] |= set(names)
    training = [f.name for f in dataclasses.fields(TrainingSettings) if f.init]
    return {section: sorted(names) for section, names in keys.items()} | {"training": training}


def build_task(settings: Settings, args: TrainingSettings) -> Task:
    """The task that the settings name, without a look at its data.

    Raises:
        ValueError: On an unknown task, or a key that belongs to another.
    """
    kind = settings["data"].get("kind", "fields")
    if kind not in TASKS:
        raise ValueError(f"data.kind = {kind!r}; expected one of {', '.join(TASKS)}.")
    for section, names in TASKS[kind].allowed_keys().items():
        for name in settings[section].keys() - names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(names))}."
            raise ValueError(f"{section}.{name} is no setting of a run on {kind} (data.kind); {hint}")
    return TASKS[kind](settings, args)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    args: TrainingSettings
    task: Task
    model: PreTrainedModel


def build_model(settings: Settings, task: Task, seed: int) -> PreTrainedModel:
    """The model of the settings for the task's data, with initial values from the seed.

    Raises:
        ValueError: On settings of the model that are out of range or do not fit each other.
    """
    set_seed(seed)
    try:
        return task.build_model(settings["model"])
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error


def build(settings: Settings) -> Parts:
    """Everything that the settings describe.

    Raises:
        ValueError: On settings that do not fit each other or the data, or several GPUs in one process.
    """
    args = build_arguments(settings)
    if args.n_gpu > 1:  # transformers would multiply the batch, and split it by torch's DataParallel
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs; launch one process a GPU: accelerate launch --multi_gpu -m "
            "training.train ..., or show it a single one with CUDA_VISIBLE_DEVICES."
        )
    task = build_task(settings, args)
    task.open()
    model = build_model(settings, task, args.seed)
    task.prepare(model)
    return Parts(args, task, model)


def record_of(settings: Settings, parts: Parts) -> dict[str, Any]:
    """What must not change between the parts of one run: settings, processes, launcher, and data behind the path."""
    processes = {"num_processes": parts.args.world_size, "launcher": launcher()}
    return {"settings": settings, "data": parts.task.record()} | processes


def check_resume(output: Path, record: dict[str, Any], resume: bool) -> Path | None:
    """The newest whole checkpoint to go on from, if any; see `training.checkpoints.newest_whole`.

    Raises:
        ValueError: If the folder holds something that must not be overwritten, a run with another record, or
            checkpoints of which none can be used.
    """
    written = output / "run.json"
    if not written.exists():
        for found in (output / "config.json", output / PARTIAL, *list_checkpoints(output)):
            if found.exists():
                raise ValueError(f"{found} is none of ours to overwrite or delete; choose another folder.")
        return None
    if not resume:
        raise ValueError(
            f"{output} holds a run already; go on with --training.resume_from_checkpoint true, or choose another "
            "--training.output_dir."
        )
    try:
        before = json.loads(written.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{written} is damaged ({error}); write it anew from `run` in a checkpoint's manifest.json, or delete the "
            "folder."
        ) from error
    if differ := differences(before, record):
        raise ValueError(
            f"{output} was trained with other settings or data ({', '.join(differ)}); restore them, delete the "
            "folder or choose another --training.output_dir."
        )
    if (output / "training.json").exists():  # it is done
        return None
    return newest_whole(output, record)


def told_by_main(function: Callable[[], Any]) -> Any:
    """What ``function`` returns on the main process, on all processes; or its ValueError."""
    told: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            told = [function()]
        except ValueError as error:
            told = [error]
    (result,) = broadcast_object_list(told)
    if isinstance(result, ValueError):
        raise result
    return result


def finish(
    trainer: LeviathanTrainer, parts: Parts, report: dict[str, Any], seconds: float, first: int
) -> dict[str, Any]:
    """Saves model, tokenizer and `training.json`; returns what the latter holds.

    In its `validation`, what is not finite is None: JSON knows no NaN, and a run that diverged has a record too.
    """
    args, task, steps = parts.args, parts.task, trainer.state.global_step
    parts.model.config.use_cache = True  # the Trainer turned it off
    trainer.save_model(args.output_dir)
    trainer.rotate_checkpoints()  # the process that wrote the last one may have been killed before it did
    validation = [
        {"step": row["step"]}
        | {k.removeprefix("eval_"): v if isfinite(v) else None for k, v in row.items() if k.startswith("eval_")}
        for row in trainer.state.log_history
        if "eval_loss" in row
    ]
    # Of this part of the run, if it was resumed; without evaluation.
    seconds -= sum(row["runtime"] for row in validation if row["step"] > first)
    report |= task.report() | trainer.report()
    report |= {
        "steps": steps,
        "resumed_from_step": first,
        "seconds": seconds,
        f"{task.unit}_per_second": (
            (steps - first) * report[f"{task.unit}_per_step"] / seconds if steps > first else None
        ),
        "validation": validation,
        "seed": args.seed,
        "provenance": provenance(args.seed),
    }
    if trainer.is_world_process_zero():
        write_json(Path(args.output_dir) / "training.json", report)
    return report


def run(settings: Settings, dry_run: bool = False) -> dict[str, Any]:
    """Trains as the settings say, saves model, tokenizer and `training.json`, and returns what the latter holds.

    Raises:
        ValueError: On settings that do not fit each other or the data, or a folder that must not be overwritten.
        OSError: If the data cannot be read, or a checkpoint cannot be written.
        SystemExit: If SIGTERM ended the run after a step.
    """
    if dry_run:
        return plan(settings)
    settings = settings | {"training": dict(settings["training"])}
    # YAML gives a truth value where TrainingArguments expects a path.
    resume = settings["training"].pop("resume_from_checkpoint", False)
    if str(resume).lower() not in ("true", "false"):
        raise ValueError(f"resume_from_checkpoint = {resume!r}; expected true (the newest of output_dir) or false.")
    parts = build(settings)
    args, task, output = parts.args, parts.task, Path(parts.args.output_dir)
    record = record_of(settings, parts)
    checkpoint = told_by_main(lambda: check_resume(output, record, str(resume).lower() == "true"))
    if (output / "training.json").exists():
        print(f"{output}: trained already; delete the folder to train again")
        return json.loads((output / "training.json").read_text())
    trainer = task.trainer_class(
        model=parts.model,
        args=args,
        train_dataset=task.train,
        eval_dataset=task.validation,
        processing_class=task.tokenizer,
        callbacks=[JsonLog(output / "log.jsonl")],
        **task.trainer_options(),
    )
    report = task.describe(parts.model) | task.references()
    trainer.accelerator.wait_for_everyone()  # all have looked at the folder before one writes to it
    if trainer.is_world_process_zero():
        clear_partial(output)
        write_json(output / "run.json", record)
    trainer.accelerator.wait_for_everyone()
    trainer.record = record
    first = step_of(checkpoint) if checkpoint else 0
    if checkpoint:
        trainer.resume_data(checkpoint)
    with ending_on_termination(trainer):
        trained = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.ended:
        if trainer.is_world_process_zero():
            print(
                f"SIGTERM: ended after step {trainer.state.global_step} of {args.max_steps}, with a checkpoint; go on "
                "with --training.resume_from_checkpoint true",
                file=sys.stderr,
            )
        raise SystemExit(128 + signal.SIGTERM)
    seconds = trained.metrics["train_runtime"]
    return finish(trainer, parts, report, seconds, first)


def plan(settings: Settings) -> dict[str, Any]:
    """Prints what would be trained, without a look at the data or memory for the model, and returns it."""
    settings = settings | {"training": {k: v for k, v in settings["training"].items() if k != "resume_from_checkpoint"}}
    args = build_arguments(settings)
    task = build_task(settings, args)
    with torch.device("meta"):
        model = build_model(settings, task, args.seed)
    report = task.describe(model)
    for name, value in report.items():
        shown = value if isinstance(value, str) else f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
        print(f"{name:>24} {shown}")
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    known, settings = parse_arguments(__doc__.splitlines()[0], allowed_keys(), arguments)
    try:
        run(settings, dry_run=known.dry_run)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
