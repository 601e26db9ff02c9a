"""Where a result comes from: command, commit, versions, hardware."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = (
    *("leviathan-sna", "torch", "transformers", "accelerate", "datasets", "numpy"),
    *("scikit-learn", "xgboost-cpu", "pykan", "pyinn", "scikit-fem", "torchTT", "PyWavelets"),
    *("gymnasium", "stable-baselines3", "mujoco", "minari", "arch"),
    *("scipy", "scikit-image", "meshio"),
    *("deepspeed", "hypothesis", "atheris"),
)


def provenance(seed: int | list[int] | None = None) -> dict[str, Any]:
    """Command, git commit (and whether files differ from it), versions, hardware, date (UTC) and seed, for JSON.

    Paths are relative to the working directory, so that a result does not tell of the machine it was made on.
    """
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(root), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        return result.stdout.strip() if result.returncode == 0 else None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except FileNotFoundError:  # no git on this machine
        commit = changes = None
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": command(),
        "commit": commit,
        "changed_since_commit": bool(changes) if commit else None,
        "versions": versions,
        "hardware": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": seed,
    }


def command() -> str:
    """The command of this process as it can be typed again in the same working directory."""
    spec = sys.modules["__main__"].__spec__  # set for `python -m package.module`
    program = ["-m", spec.name.removesuffix(".__main__")] if spec is not None else [relative(sys.argv[0])]
    return shlex.join(["python", *program, *map(relative, sys.argv[1:])])


def relative(argument: str | Path) -> str:
    """A path relative to the working directory, or its name alone outside of it, also behind `--flag=`."""
    flag, equals, value = str(argument).rpartition("=")
    path = Path(value)
    if path.is_absolute():
        value = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
    return flag + equals + value


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON whole or not at all; NaN and infinity, which JSON does not know, are refused.

    Raises:
        ValueError: If a number is not finite.
    """
    text = json.dumps(content, indent=2, allow_nan=False)
    # A list of numbers is read along a line.
    text = re.sub(r"\[[^\[\]{}\"]*\]", lambda numbers: "[" + " ".join(numbers[0][1:-1].split()) + "]", text)
    write_text(path, text + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
