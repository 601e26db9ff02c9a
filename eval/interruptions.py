"""Kills a training run again and again, at random moments, and sees whether it ends as one that nothing happened to.

    python -m eval.interruptions --out runs/interruptions --kills 50 [--data fields]

A tiny run is trained once unbroken. Then the same run is started, killed (SIGKILL), started again and so on until it is
done; and that until so many kills have happened. Some come at a random time, others are aimed: into the start, into the
writing of a checkpoint or its rename, into the end. Every run that got done is compared with the unbroken one: model,
log and record; weights, optimizer, schedule, random numbers, place in the data and log of the checkpoints. What must
agree agrees to the bit; what tells of time is not compared (`UNCOMPARED`).

Each start is a fork of one process that has imported everything: imports take longer than the run. It writes
`interruptions.json` and fails if anything differs.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import load
from transformers.trainer_pt_utils import safe_globals

from training import train
from training.checkpoints import MANIFEST, PARTIAL, PREFIX, list_checkpoints, step_of
from training.provenance import provenance, write_json
from training.settings import Settings
from training.tokenizer import train_bpe
from training.turbulence import FlowSettings, write_fields

STEPS, SAVE_STEPS, VOCABULARY = 12, 4, 300
UNCOMPARED = {"provenance", "resumed_from_step", "seconds", "seconds_waited_for_data", "train_loss"}  # of one part
UNCOMPARED_ENDINGS = ("runtime", "_per_second")
AIMS = {"any": 4, "start": 1, "save": 3, "rename": 2, "finish": 2}  # how often, relative to each other
POLL_SECONDS = 2e-4
Aim = Literal["any", "start", "save", "rename", "finish"]


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        run: Number of the run, from 0.
        aim: What it was aimed at.
        moment: What it hit: `"start"` (before the first step), `"step"`, `"save"` (of a checkpoint) or `"finish"`
            (after the last checkpoint).
        after_seconds: Since the process was forked.
        step_reached: The last step that the log tells of.
        resumed_from: The step of the checkpoint that this process went on from; 0 is none.
    """

    run: int
    aim: Aim
    moment: Literal["start", "step", "save", "finish"]
    after_seconds: float
    step_reached: int
    resumed_from: int


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds of the unbroken run: to its first step, in all, of a checkpoint's writing, after the last checkpoint."""

    start: float
    total: float
    save: float
    finish: float


def write_data(folder: Path, kind: Literal["text", "fields"]) -> None:
    """Writes what a tiny run learns from: sentences in which a word tells the next, or a decaying flow."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "fields":
        flow = FlowSettings(num_trajectories=4, num_grid=16, viscosity=2e-3, dt_save=0.02, num_snapshots=6)
        write_fields(folder / "flow.hdf5", flow, progress=False)
        return
    words = "the flow turns and falls apart into eddies of every size while energy".split()  # noqa: SIM905
    generator = np.random.default_rng(0)
    texts = []
    for _ in range(360):
        at, length = generator.integers(len(words)), generator.integers(3, 40)
        texts.append(" ".join(words[(at + 5 * step) % len(words)] for step in range(length)))
    for split, part in {"train": texts[:300], "validation": texts[300:]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    train_bpe(texts, VOCABULARY).save_pretrained(folder / "tokenizer")


def tiny_settings(data: Path, kind: Literal["text", "fields"], output: Path, seed: int) -> Settings:
    """The settings of a run of `STEPS` steps that may be started again and again."""
    sections: dict[str, Settings] = {
        "text": {
            "data": {
                "kind": "text",
                "train": str(data / "train.jsonl"),
                "validation": str(data / "validation.jsonl"),
                "context_length": 16,
                "shuffle_buffer": 20,
                "num_validation_sequences": 16,
            },
            "tokenizer": {"path": str(data / "tokenizer")},
        },
        "fields": {
            "data": {
                "path": str(data / "flow.hdf5"),
                "fractions": [0.5, 0.25, 0.25],
                "num_validation_items": 16,
            },
            "tokenizer": {"patch_size": 4, "num_bits": 5, "base": 6},
        },
    }
    # 160 pairs of patches on a grid: with 20 in a step a checkpoint falls on the end of the first epoch.
    batch = {"text": (4, 2), "fields": (10, 2)}[kind]
    model = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "attention_dropout": 0.1,  # draws random numbers
        "embedding_seed_dim": 8,
        "embedding_num_heads": 2,
        "embedding_rank": 4,
    }
    training = {
        "output_dir": str(output),
        "resume_from_checkpoint": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": batch[0],
        "gradient_accumulation_steps": batch[1],
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "logging_steps": 3,  # some checkpoints fall between two entries of the log
        "eval_strategy": "steps",
        "eval_steps": 6,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": seed,
    }
    return sections[kind] | {"model": model, "training": training}


def start(function: Callable[[], Any], log: Path) -> int:
    """Forks a process that calls ``function``, with what it prints appended to ``log``; its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        function()
        code = 0
    except BaseException:  # nothing may get out of here into what the parent goes on to do
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(process: int) -> int | None:
    """The exit code of a process, negative for a signal; None while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wait(process: int, log: Path) -> None:
    """Waits for the end of a process.

    Raises:
        RuntimeError: If it failed.
    """
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code:
        raise RuntimeError(f"a process ended with {code}; {log} says why")


def train_unbroken(settings: Settings, log: Path) -> Pace:
    """Trains from the beginning to the end, and takes the time.

    Raises:
        RuntimeError: If it failed.
    """
    output = Path(settings["training"]["output_dir"])
    begin = time.perf_counter()
    modules = output.with_name("modules.json")

    def run() -> None:
        train.run(settings)
        write_json(modules, sorted(sys.modules))

    process = start(run, log)
    first = saving = last = None
    save = 0.0
    while (code := ended(process)) is None:
        now = time.perf_counter() - begin
        if first is None and step_reached(output):
            first = now
        if (output / PARTIAL).exists():
            saving = saving or now
        elif saving is not None:
            save, saving = max(save, now - saving), None
        if last is None and (output / f"checkpoint-{STEPS}").exists():
            last = now
        time.sleep(POLL_SECONDS)
    if code:
        raise RuntimeError(f"the unbroken run ended with {code}; {log} says why")
    total = time.perf_counter() - begin
    for name in json.loads(modules.read_text()):  # what is imported late: from here on it is there
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    return Pace(first or total, total, save, total - (last or total))


def step_reached(output: Path) -> int:
    """The last step that the log of a run tells of."""
    log = output / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def newest_step(output: Path) -> int:
    """The step of the newest checkpoint; 0 is none."""
    return next(map(step_of, list_checkpoints(output)), 0)


def run_and_kill(
    settings: Settings, aim: Aim, passed_over: int, pace: Pace, generator: random.Random, log: Path
) -> Kill | None:
    """Starts or goes on with a run, and kills it; None if it was done before.

    If it aims at checkpoints, so many are ``passed_over``, if another follows.

    Raises:
        RuntimeError: If it failed by itself.
    """
    output = Path(settings["training"]["output_dir"])
    resumed_from, left = newest_step(output), (_identity(output / PARTIAL), _identity(output / "log.jsonl"))
    delay = generator.random() * {
        "any": pace.total,
        "start": pace.start,
        "save": pace.save,
        "rename": pace.save / 10,
        "finish": pace.finish,
    }.get(aim, 0.0)
    begin = time.perf_counter()
    process = start(lambda: train.run(settings), log)
    due = begin + delay if aim in ("any", "start") else None
    stage: Path | None = None
    while (code := ended(process)) is None:
        if due is not None and time.perf_counter() >= due:
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            code = os.waitstatus_to_exitcode(status)
            break
        if due is None:
            staged = _staged(output) if aim in ("save", "rename") else None
            if aim == "finish":
                hit = (output / f"checkpoint-{STEPS}").exists()
            elif staged is None or _identity(output / PARTIAL) == left[0]:
                hit = False
            elif passed_over and step_of(staged) < STEPS:
                passed_over, stage, hit = passed_over - (staged != stage), staged, False
            else:
                hit = staged != stage and (aim == "save" or (staged / MANIFEST).exists())
            if hit:
                due = time.perf_counter() + delay
                continue
        time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - begin
    if code == 0:
        return None
    if code != -signal.SIGKILL:
        raise RuntimeError(f"a run ended with {code}; {log} says why")
    return Kill(0, aim, moment_of(output, resumed_from, left), round(seconds, 4), step_reached(output), resumed_from)


def _staged(output: Path) -> Path | None:
    """The checkpoint that is being written."""
    try:
        return next(path for path in (output / PARTIAL).iterdir() if path.name.startswith(PREFIX))
    except (FileNotFoundError, StopIteration):
        return None


def _identity(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def moment_of(
    output: Path, resumed_from: int, left: tuple[int | None, int | None]
) -> Literal["start", "step", "save", "finish"]:
    """What a kill hit, by what the process left; ``left`` are identities of what the one before it had left."""
    partial, log = output / PARTIAL, output / "log.jsonl"
    if _identity(log) in (None, left[1]):
        return "start"  # before it wrote its log anew
    if _identity(partial) not in (None, left[0]):
        return "save" if any(partial.glob("*checkpoint-*")) else "finish"
    if (output / f"checkpoint-{STEPS}").exists():
        return "finish"
    return "step" if step_reached(output) > resumed_from else "start"


def compare(whole: Path, broken: Path) -> list[str]:
    """The names of the files of two finished runs that are not the same to the bit, times apart."""
    names = [{p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()} for f in (whole, broken)]
    differ = [f"{name} is missing in one" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        if Path(name).name not in ("run.json", MANIFEST) and not _same_file(whole / name, broken / name):
            differ.append(name)
    return differ


def _same_file(one: Path, other: Path) -> bool:
    if one.read_bytes() == other.read_bytes():
        return True
    if one.suffix in (".pt", ".pth"):  # how a value is pickled depends on which objects are shared
        with safe_globals():
            return same_values(*(load(path, weights_only=True) for path in (one, other)))
    if one.suffix == ".jsonl":
        return same_values(*([timeless(json.loads(line)) for line in p.open()] for p in (one, other)))
    if one.name in ("training.json", "trainer_state.json"):
        return same_values(*(timeless(json.loads(path.read_text())) for path in (one, other)))
    return False


def timeless(value: Any) -> Any:
    """A value from JSON without the entries that tell of time."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in UNCOMPARED and not k.endswith(UNCOMPARED_ENDINGS)}
        return {key: timeless(entry) for key, entry in kept.items()}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def same_values(one: Any, other: Any) -> bool:
    """Whether two values, nested dicts and sequences of numbers, strings and arrays, are the same to the bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_values(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_values, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and same_values(one.numpy(), other.numpy())
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return repr(one) == repr(other)  # of numbers, the shortest text that tells them apart


def study(out: Path, num_kills: int, kind: Literal["text", "fields"], seed: int) -> dict[str, Any]:
    """Kills runs until ``num_kills`` have happened, and compares each that got done; writes `interruptions.json`.

    Its `resumed_from` are the steps from which the last process of each run went on: between the first and the last it
    is then seen whether all that a checkpoint has to hold is restored.

    Raises:
        RuntimeError: If a process fails by itself.
    """
    shutil.rmtree(out / "data", ignore_errors=True)
    whole, broken, log = out / "unbroken", out / "broken", out / "output.txt"
    for path in (whole, broken):
        shutil.rmtree(path, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    wait(start(functools.partial(write_data, out / "data", kind), log), log)
    settings = functools.partial(tiny_settings, out / "data", kind, seed=seed)
    first = settings(output=whole)
    first["training"] |= {"max_steps": 1, "save_steps": 1, "eval_steps": 1}
    train_unbroken(first, log)
    shutil.rmtree(whole)
    pace = train_unbroken(settings(output=whole), log)  # as fast as those that follow, now that all is imported
    generator = random.Random(seed)
    kills: list[Kill] = []
    resumed_from, found = [], []
    while len(kills) < num_kills:
        done = False
        while not done:
            if len(kills) < num_kills:
                # The first lets a checkpoint be, so that there is a run that goes on from the midst of it.
                (aim,) = generator.choices(list(AIMS), AIMS.values()) if kills else ("save",)
                passed_over = generator.randrange(2) if kills else 1
                kill = run_and_kill(settings(output=broken), aim, passed_over, pace, generator, log)
                done = kill is None
                if kill is not None:
                    kills.append(dataclasses.replace(kill, run=len(resumed_from)))
                    print(f"\r{len(kills)} of {num_kills} kills, {len(resumed_from)} runs done", end="", flush=True)
            else:
                wait(start(lambda: train.run(settings(output=broken)), log), log)
                done = True
        if differ := compare(whole, broken):
            found.append({"run": len(resumed_from), "files": differ})
            shutil.copytree(broken, out / f"differs-{len(resumed_from)}", dirs_exist_ok=True)
        resumed_from.append(json.loads((broken / "training.json").read_text())["resumed_from_step"])
        shutil.rmtree(broken)
    print()
    report = {
        "settings": settings(output=Path("OUTPUT")) | {"kind": kind, "pace": dataclasses.asdict(pace)},
        "kills": [dataclasses.asdict(kill) for kill in kills],
        "runs": len(resumed_from),
        "resumed_from": resumed_from,
        "identical": len(resumed_from) - len(found),
        "differences": found,
        "provenance": provenance(seed),
    }
    report["settings"] = json.loads(json.dumps(report["settings"]).replace(str(out), out.name))
    write_json(out / "interruptions.json", report)
    return report


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of interruptions.json")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--data", choices=("text", "fields"), default="text", help="what the runs learn")
    parser.add_argument("--seed", type=int, default=0)
    known = parser.parse_args()
    if known.kills < 1:
        parser.error(f"--kills {known.kills}; expected 1 or more.")
    torch.set_num_threads(1)  # a pool of threads would not outlive a fork
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    report = study(known.out, known.kills, known.data, known.seed)
    moments = [kill["moment"] for kill in report["kills"]]
    counted = ", ".join(f"{moments.count(moment)} in {moment}" for moment in sorted(set(moments)))
    print(f"{len(moments)} kills ({counted}): {report['identical']} of {report['runs']} runs as the unbroken one")
    if report["differences"]:
        raise SystemExit(f"error: {json.dumps(report['differences'])}")


if __name__ == "__main__":
    main()
