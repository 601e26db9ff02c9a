"""Feeds spoilt files to every loader, and counts what becomes of them.

    python -m eval.fuzz --out runs/fuzz.json --inputs 100000 [--only hdf5 config ...] [--engines hypothesis atheris]

A loader must load a file or refuse it with the errors that it documents, within `SECONDS` and `HEADROOM` of memory.
Where transformers' own reader raises another ordinary exception before any code of ours runs, it counts as `upstream`.
All else is a crash, a hang or a memory blow-up; the first file of each kind is kept beside the output. Inputs are edits
of small valid files: structured ones by Hypothesis, and bytes led by coverage of our Python code by atheris, where it
is installed (extra `fuzz`). Many inputs share a process. Each is written before it is tried, so that a process that
dies names it, and another goes on.
"""

import argparse
import contextlib
import gc
import importlib.util
import logging
import mmap
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from eval.fuzz_targets import Target, targets
from training.provenance import provenance, write_json

SECONDS = 10.0  # of processor time for one input
PATIENCE = 60.0  # of the clock, after which a process that does not even heed its alarm is ended
HEADROOM = 2**29  # bytes of address space for one input, beyond what the process has
BATCH = 1000  # inputs between two cleanings
OUTCOMES = ("loaded", "refused", "upstream", "crashes", "hangs", "memory")
PACKAGES = ("sna_core", "leviathan", "training")
# By whom inputs are made, and which part of them: Hypothesis takes milliseconds for one, libFuzzer microseconds.
ENGINES = {"hypothesis": 0.05, "atheris": 0.95}
MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108 -- files there need no disk
ROOT = Path(__file__).resolve().parent.parent


class Counts:
    """Numbers that outlive the process that counts: inputs begun, and each of the outcomes.

    Args:
        path: A file, made where there is none.
    """

    def __init__(self, path: Path):
        size = 8 * (1 + len(OUTCOMES))
        if not path.exists():
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), size)

    def add(self, name: str, number: int = 1) -> None:
        """Counts one more of `inputs` or of an outcome."""
        place = 8 * (0 if name == "inputs" else 1 + OUTCOMES.index(name))
        (before,) = struct.unpack_from("q", self._memory, place)
        struct.pack_into("q", self._memory, place, before + number)

    def read(self) -> dict[str, int]:
        """All of them; those that were begun and have no outcome are missing from the sum."""
        return dict(zip(("inputs", *OUTCOMES), struct.unpack_from(f"{1 + len(OUTCOMES)}q", self._memory), strict=True))


class _TooLongError(BaseException):
    """Not an Exception, which a loader might catch."""


class Trial:
    """Tries one input after another on a loader, within limits of time and memory.

    Args:
        target: What is tried.
        folder: Where inputs are written, and `kept/` for those that broke something.
        counts: Where outcomes are counted.
    """

    def __init__(self, target: Target, folder: Path, counts: Counts):
        self.target, self.folder, self.counts = target, folder, counts
        self.input = folder / "input" / target.file
        self.input.parent.mkdir(parents=True, exist_ok=True)
        for name, content in target.beside().items():
            (self.input.parent / name).parent.mkdir(parents=True, exist_ok=True)
            (self.input.parent / name).write_bytes(content)
        signal.signal(signal.SIGPROF, _too_long)

    def __call__(self, content: bytes, seed: str) -> str:
        """Which outcome it was."""
        self.input.write_bytes(content)
        self.counts.add("inputs")
        error = None
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + HEADROOM, hard))
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS, 1.0)  # again, should it be lost in a destructor
            self.target.load(self.input, seed)
            outcome = "loaded"
        except self.target.refused as caught:
            outcome = "refused"
            if "can't allocate memory" in str(caught) or "not enough memory" in str(caught):  # of PyTorch's
                outcome, error = "memory", caught
        except MemoryError as caught:
            outcome, error = "memory", caught
        except _TooLongError as caught:
            outcome, error = "hangs", caught
        except Exception as caught:
            outcome, error = ("crashes" if _is_ours(caught) else "upstream"), caught
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        self.counts.add(outcome)
        if error is not None:
            keep(self.folder, self.target, outcome, error)
        return outcome


def keep(
    folder: Path, target: Target, outcome: str, error: BaseException | None, what: str = "", told: str = ""
) -> None:
    """Keeps the input at hand, unless one of its kind is kept; a text beside it says what happened."""
    if error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "site-packages" not in frame.filename and "fuzz" not in frame.filename]
        last = (ours or frames)[-1]
        what = f"{type(error).__name__}-{Path(last.filename).stem}-{last.lineno}"
    kept = folder / "kept" / f"{outcome}-{what}-{target.file}"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "input" / target.file, kept)
        told = "".join(traceback.format_exception(error)) if error is not None else told
        kept.with_name(kept.name + ".txt").write_text(told, encoding="utf-8", errors="replace")


def _is_ours(error: Exception) -> bool:
    folders = tuple(str(ROOT / package) for package in PACKAGES)
    return any(frame.filename.startswith(folders) for frame in traceback.extract_tb(error.__traceback__))


def _too_long(number: int, frame: object) -> None:
    raise _TooLongError


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    return pages * resource.getpagesize()


def seeds_of(target: Target) -> dict[str, bytes]:
    """The target's valid files, by name."""
    with tempfile.TemporaryDirectory() as folder:
        return dict(target.seeds(Path(folder)))


def by_hypothesis(trial: Callable[[bytes, str], object], target: Target, inputs: int, seed: int) -> None:
    """Tries so many inputs of the target's strategies."""
    import hypothesis
    from hypothesis import HealthCheck, strategies

    files = seeds_of(target)
    every = strategies.one_of(
        [target.spoilt(content).map(lambda spoilt, name=name: (name, spoilt)) for name, content in files.items()]
    )
    for batch, start in enumerate(range(0, inputs, BATCH)):
        wanted = min(BATCH, inputs - start)

        # Hypothesis remembers what it has tried: a new test for each batch forgets.
        @hypothesis.seed(seed * 10**6 + batch)
        @hypothesis.settings(
            max_examples=wanted,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(every)
        def attempt(drawn: tuple[str, bytes]) -> None:
            name, content = drawn
            trial(content, name)

        attempt()
        gc.collect()


def by_atheris(trial: Callable[[bytes, str], object], target: Target, inputs: int, seed: int, folder: Path) -> None:
    """Tries so many inputs that libFuzzer makes of the seeds; it ends the process."""
    import atheris

    files = seeds_of(target)
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for name, content in files.items():
        (corpus / name).write_bytes(content)
    names = sorted(files)

    def attempt(content: bytes) -> None:
        trial(content, names[len(content) % len(names)])

    # Its own limits are far away, since a trial has its own; 0 seconds would end the process at the first slow input.
    arguments = [f"-runs={inputs}", f"-seed={seed + 1}", "-timeout=86400", "-rss_limit_mb=0", "-max_len=16384"]
    atheris.Setup(["fuzz", *arguments, "-verbosity=0", str(corpus)], attempt)
    atheris.Fuzz()


def child(target: Target, engine: str, inputs: int, seed: int, folder: Path) -> None:
    """What a process of its own does: up to so many inputs."""
    import torch

    # What the loaders tell the user is of no interest here, and there is much of it.
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    trial = Trial(target, folder, Counts(folder / "counts"))
    with _instrumented(engine):
        for name, content in seeds_of(target).items():
            target.load(_written(trial.input, content), name)  # imports what it needs, and must not fail
    if engine == "hypothesis":
        by_hypothesis(trial, target, inputs, seed)
    else:
        by_atheris(trial, target, inputs, seed, folder)


def _instrumented(engine: str) -> contextlib.AbstractContextManager:
    """Has atheris see which branches of our loaders, and of the readers in Python under them, an input takes."""
    if engine != "atheris":
        return contextlib.nullcontext()
    import atheris

    return atheris.instrument_imports(include=["training", "leviathan", "sna_core", "yaml", "h5py"])


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def fuzz(target: Target, engine: str, inputs: int, keep_in: Path, seed: int = 0) -> dict[str, Any]:
    """Tries so many inputs in as many processes as it takes, one at a time.

    Args:
        target: The loader.
        engine: `"hypothesis"` or `"atheris"`.
        inputs: Number of inputs.
        keep_in: Folder for the inputs that broke something.
        seed: Of what is drawn.

    Returns:
        The row for the record: `target`, `engine`, `inputs`, one number for each of `OUTCOMES`, `seconds`, `kinds` of
        what broke.

    Raises:
        RuntimeError: If a process cannot even load the valid files.
    """
    started = time.monotonic()
    where = MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=where) as name:
        folder = Path(name)
        counts = Counts(folder / "counts")
        with tqdm(total=inputs, desc=f"{target.name}, {engine}", unit=" inputs", disable=None) as bar:
            while (done := counts.read()["inputs"]) < inputs:
                process = _start(target, engine, inputs - done, seed, folder)
                _wait(process, counts, bar)
                seed += 1
                after = counts.read()
                if lost := _unfinished(after):
                    outcome = "hangs" if process.returncode == -signal.SIGKILL else "crashes"
                    counts.add(outcome, lost)
                    keep(folder, target, outcome, None, f"exit{process.returncode}", _log(folder))
                elif after["inputs"] == done:
                    raise RuntimeError(f"{target.name} cannot be tried with {engine}:\n{_log(folder)}")
        kinds = sorted(path.name for path in (folder / "kept").glob("*") if path.suffix != ".txt")
        if kinds:
            keep_in.mkdir(parents=True, exist_ok=True)
            for path in (folder / "kept").iterdir():
                shutil.copyfile(path, keep_in / f"{target.name}-{engine}-{path.name}")
        row = {"target": target.name, "engine": engine, **counts.read()}
    return row | {"seconds": round(time.monotonic() - started, 1), "kinds": kinds}


def _start(target: Target, engine: str, inputs: int, seed: int, folder: Path) -> subprocess.Popen:
    options = {"--only": target.name, "--engines": engine, "--inputs": inputs, "--seed": seed, "--child": folder}
    command = [sys.executable, "-m", "eval.fuzz", *(str(each) for pair in options.items() for each in pair)]
    # Allocators that reserve much at once would meet the limit with no need.
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(  # noqa: S603 -- of our own making
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def _wait(process: subprocess.Popen, counts: Counts, bar: tqdm) -> None:
    seen, since = counts.read(), time.monotonic()
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        now = counts.read()
        bar.update(now["inputs"] - bar.n)
        if now != seen or not _unfinished(now):
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            process.kill()
            process.wait()
    bar.update(counts.read()["inputs"] - bar.n)


def _log(folder: Path) -> str:
    """The end of what the last process printed."""
    path = folder / "log"
    return path.read_text(encoding="utf-8", errors="replace")[-3000:] if path.exists() else ""


def _unfinished(counted: dict[str, int]) -> int:
    """Inputs that were begun and have no outcome."""
    return counted["inputs"] - sum(counted[outcome] for outcome in OUTCOMES)


def installed_engines() -> tuple[str, ...]:
    """Those of `ENGINES` that can be imported."""
    return tuple(engine for engine in ENGINES if importlib.util.find_spec(engine) is not None)


def shares(inputs: int, engines: Sequence[str]) -> Iterator[tuple[str, int]]:
    """How many of the inputs each engine makes; the last makes what is left."""
    left, whole = inputs, sum(ENGINES[engine] for engine in engines)
    for engine in engines:
        number = left if engine == engines[-1] else round(inputs * ENGINES[engine] / whole)
        left -= number
        yield engine, number


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write; what broke is kept in a folder beside it")
    parser.add_argument("--inputs", type=int, default=100_000, help="for each target, dealt out to the engines")
    parser.add_argument("--only", nargs="+", metavar="TARGET", help="some targets")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), help="by default those that are installed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    known = parser.parse_args(arguments)
    every = targets()
    if unknown := set(known.only or ()) - set(every):
        parser.error(f"no target {', '.join(sorted(unknown))}; expected some of {', '.join(every)}")
    chosen = [every[name] for name in known.only or every]
    if known.child is not None:
        child(chosen[0], known.engines[0], known.inputs, known.seed, known.child)
        return {}
    if known.out is None or known.inputs < 1:
        parser.error("give --out FILE, and --inputs of at least 1")
    engines = known.engines or installed_engines()
    rows = []
    for target in chosen:
        for engine, inputs in shares(known.inputs, engines):
            if inputs:
                rows.append(fuzz(target, engine, inputs, known.out.with_suffix(".kept"), known.seed))
                write_json(known.out, {"rows": rows, "provenance": provenance(known.seed)})
                print(summary(rows[-1]), flush=True)
    return {"rows": rows}


def summary(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    counted = ", ".join(f"{row[outcome]:,} {outcome}" for outcome in OUTCOMES)
    return f"{row['target']} ({row['engine']}): {row['inputs']:,} inputs, {counted}; {row['seconds']} s"


if __name__ == "__main__":
    main()
