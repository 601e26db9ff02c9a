"""Checkpoints that are whole or not there: written under a temporary name, hashed, renamed, verified before use.

    checkpoint-6/    manifest.json, and the files that it names
    partial/         what is being written or removed; a process that was killed leaves it, and the next one deletes it
    refused-checkpoint-12/   what was found damaged, set aside

A checkpoint becomes visible by one rename, after its files and its manifest lie on the disk, and disappears by another.
So a kill, a full disk or a loss of power leaves the checkpoints that there were, and the one before is never touched
until the next is there. `manifest.json` names the step, the run (settings, number of processes, data) and size and
SHA-256 of every file: it tells damage and mistakes, not a forger, who would rewrite it. What is loaded after it is
loaded without pickle's code (torch.load with weights_only).
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from training.provenance import write_json

MANIFEST = "manifest.json"
PARTIAL = "partial"
PREFIX = "checkpoint-"


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """The dotted names of the entries in which two records, nested dicts, differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [d for key in keys for d in differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))]
    return [] if before == now else [name]


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, the newest first."""
    found = (path for path in output.glob(f"{PREFIX}*") if path.is_dir() and path.name[len(PREFIX) :].isdigit())
    return sorted(found, key=step_of, reverse=True)


def publish(staged: Path, record: dict[str, Any]) -> Path:
    """Gives the checkpoint ``staged``, output/partial/checkpoint-N, its manifest and its place, output/checkpoint-N.

    Args:
        staged: A folder whose files are complete.
        record: What tells the run from others, for JSON.

    Returns:
        The checkpoint.

    Raises:
        OSError: If it cannot be written, or there is one of this step already.
    """
    target = staged.parent.parent / staged.name
    files = sorted(path for path in staged.rglob("*") if path.is_file() and path != staged / MANIFEST)
    content = {"step": step_of(staged), "run": record, "files": dict(_entries(staged, files))}
    write_json(staged / MANIFEST, content)
    for path in [staged / MANIFEST, *files]:
        sync(path)
    for folder in {staged, *(path.parent for path in files)}:
        sync(folder)
    staged.rename(target)
    sync(target.parent)
    clear_partial(target.parent)
    return target


def damage(checkpoint: Path) -> str | None:
    """What a checkpoint is not whole by, or None: its files are those of its manifest, to the bit."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (int(entry["bytes"]), entry["sha256"]) for name, entry in manifest["files"].items()}
        manifest["run"].keys()
        if manifest["step"] != step_of(checkpoint):
            return f"{MANIFEST} is that of step {manifest['step']}"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IsADirectoryError):
        return f"{MANIFEST} cannot be read"
    paths = sorted(path for path in checkpoint.rglob("*") if not path.is_dir() and path != checkpoint / MANIFEST)
    found = {path.relative_to(checkpoint).as_posix(): path for path in paths}
    if missing := sorted(expected.keys() - found.keys()):
        return f"{missing[0]} is missing"
    if strange := sorted(found.keys() - expected.keys()):
        return f"{strange[0]} is none of the files that {MANIFEST} names"
    for name, path in found.items():
        if path.is_symlink():
            return f"{name} is a link"
        if (size := path.stat().st_size) != expected[name][0]:
            return f"{name} has {size:,} of {expected[name][0]:,} bytes"
    for name, entry in _entries(checkpoint, found.values()):
        if entry["sha256"] != expected[name][1]:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def newest_whole(output: Path, record: dict[str, Any]) -> Path | None:
    """The newest checkpoint to go on from, if there is any.

    One that is damaged is set aside as refused-checkpoint-N, with a warning, and the one before is taken: a run that a
    scheduler starts again is to go on, at the price of some steps. One of another run was put there by somebody, who
    has to say what it is for.

    Raises:
        ValueError: If the newest whole one is of another run, or none is whole.
    """
    refused, found = [], None
    for checkpoint in list_checkpoints(output):
        if reason := damage(checkpoint):
            refused.append((checkpoint, reason))
            continue
        found = checkpoint
        break
    if found is None and refused:
        reasons = "; ".join(f"{checkpoint.name}: {reason}" for checkpoint, reason in refused)
        raise ValueError(f"no checkpoint of {output} is whole ({reasons}); delete the folder to train anew.")
    if found is None:
        return None
    of_found = json.loads((found / MANIFEST).read_text(encoding="utf-8"))["run"]
    if differ := differences(of_found, json.loads(json.dumps(record))):
        before = next((c for c in list_checkpoints(output) if step_of(c) < step_of(found) and not damage(c)), None)
        offer = f"go on from {before.name}" if before else "start anew"
        raise ValueError(f"{found} is of another run ({', '.join(differ)} differ); delete it to {offer}.")
    for checkpoint, reason in refused:
        aside = output / f"refused-{checkpoint.name}"
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        print(
            f"warning: {checkpoint} is not whole: {reason}. It is now {aside.name}; going on from {found.name}.",
            file=sys.stderr,
        )
    return found


def rotate(output: Path, limit: int | None, best: Path | None = None) -> None:
    """Deletes the oldest checkpoints beyond ``limit``, if it is above 0; never the newest, or the ``best``."""
    if limit is None or limit < 1 or not (found := list_checkpoints(output)):
        return
    newest, *others = found
    spared = {newest, output / best.name if best else newest}
    room = max(0, limit - len(spared))
    (output / PARTIAL).mkdir(exist_ok=True)
    for checkpoint in [other for other in others if other not in spared][room:]:
        _bury(checkpoint)
    clear_partial(output)


def clear_partial(output: Path) -> None:
    """Deletes what was not completed, of a process that was killed or failed."""
    shutil.rmtree(output / PARTIAL, ignore_errors=True)


def _bury(checkpoint: Path) -> None:
    """Takes a checkpoint away by one rename, so that a kill leaves no half of it."""
    checkpoint.rename(checkpoint.parent / PARTIAL / f"removed-{checkpoint.name}")


def _entries(folder: Path, paths: Iterable[Path]) -> list[tuple[str, dict[str, Any]]]:
    def entry(path: Path) -> tuple[str, dict[str, Any]]:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return path.relative_to(folder).as_posix(), {"bytes": file.tell(), "sha256": digest}

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets go of the interpreter's lock
        return list(pool.map(entry, paths))


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, lie on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
