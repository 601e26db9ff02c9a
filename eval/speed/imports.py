"""Time of `import leviathan`, each in a process of its own, beside that of what it builds on."""

import subprocess
import sys
from pathlib import Path

from eval.speed.measure import CannotRunError, Figure, Section, Setup, Target

ROOT = Path(__file__).resolve().parent.parent.parent
TIMED = "import time; started = time.perf_counter(); {}; print(time.perf_counter() - started)"


def imports(setup: Setup) -> Section:
    """The package beside PyTorch and transformers' own lazy top level; and the first use of an Auto class."""
    below = setup.pick(short="import numpy", cpu="import torch, transformers", cuda="import torch, transformers")
    classes = "from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForCausalLM, PreTrainedModel"
    first = setup.pick(short="import json", cpu=classes, cuda=classes)
    runs = {"below": below, "with leviathan": f"{below}, leviathan"}
    used = {"transformers' own": first, "with leviathan": f"import leviathan; {first}"}
    target = Target("of PyTorch and transformers", at_most=1.2)
    return Section(
        "import of leviathan on top of PyTorch and transformers, against these alone",
        {"leviathan": "import leviathan", "below": below, "first use": first},
        [
            Figure("import", _alternating(runs, setup.repeats), ("with leviathan", "below"), target=target),
            # What `import leviathan` puts off: all models, once an Auto class is asked for.
            Figure("first use", _alternating(used, setup.repeats), ("with leviathan", "transformers' own")),
            Figure(
                "import alone",
                _alternating({"leviathan": "import leviathan", "below": below}, 1),
                ("leviathan", "below"),
            ),
        ],
    )


def _alternating(runs: dict[str, str], repeats: int) -> dict[str, list[float]]:
    """Seconds of each statement, after one of each that fills the disk's cache."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, statement in runs.items():
            seconds = _seconds(statement)
            if repeat:
                samples[name].append(seconds)
    return samples


def _seconds(statement: str) -> float:
    command = [sys.executable, "-c", TIMED.format(statement)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 -- of our making
    if done.returncode:
        raise CannotRunError(f"{statement} fails: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split()[-1])
