"""Sets of labelled microstructures on disk: written in whole shards, labelled by homogenisation, read by `datasets`.

A set is a folder of `cells-00000.parquet`, ... with the columns `cell` (voxels, 1 = solid), one for each property,
`family`, `seed`, `index` and `split`, and of `set.json`: settings, symmetry, boundary, what was counted for each shard,
and where it comes from. A shard counts once `set.json` lists it, so that an interrupted run goes on after the last one.
"""

import itertools
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from datasets import Array2D, Array3D, Dataset, Features, IterableDataset, Value, load_dataset
from torch import Tensor
from tqdm.auto import tqdm

from leviathan.janus.physics import Physics, properties
from training.provenance import provenance, write_json

SET_FILE = "set.json"
SPLITS = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}
"""Last digits of the indices of each split: a cell's split depends on its index alone."""


@dataclass(frozen=True)
class Cells:
    """Some cells on their way to a set.

    Attributes:
        phase: uint8 (cells, m, ...), 1 = solid.
        families: What each was made from.
        indices: Number of each in its set, which need not be complete.
        labels: float32 (cells, properties).
        counts: Of what was rejected or dropped on the way.
    """

    phase: np.ndarray
    families: list[str]
    indices: list[int]
    labels: np.ndarray
    counts: Counter = field(default_factory=Counter)


@dataclass(frozen=True, eq=False)
class MicrostructureSet:
    """A set in memory.

    Attributes:
        cells: uint8 (cells, m, ...), 1 = solid.
        labels: float32 (cells, properties).
        property_names: Of the columns of the labels.
        symmetry: Of the cells: "none", "mirror", "cubic".
        boundary: uint8 (m, ...): 0 void and 1 solid in all cells, 2 free.
        settings: What it was made with.
        families: What each cell was made from.
        indices: int64 (cells,), number of each cell.
    """

    cells: Tensor
    labels: Tensor
    property_names: tuple[str, ...]
    symmetry: str
    boundary: Tensor
    settings: dict[str, Any]
    families: tuple[str, ...]
    indices: Tensor

    def __len__(self) -> int:
        return len(self.cells)

    def split(self, name: str) -> "MicrostructureSet":
        """The cells of "train", "validation" or "test".

        Raises:
            ValueError: If there is no such split.
        """
        if name not in SPLITS:
            raise ValueError(f"split {name!r}; expected one of {', '.join(SPLITS)}.")
        chosen = torch.tensor([split_of(index) == name for index in self.indices.tolist()], dtype=torch.bool)
        families = tuple(itertools.compress(self.families, chosen.tolist()))
        parts = {key: getattr(self, key)[chosen] for key in ("cells", "labels", "indices")}
        return replace(self, families=families, **parts)


def split_of(index: int) -> str:
    """The split of a cell's index: a tenth each is for validation and test."""
    return next(name for name, digits in SPLITS.items() if index % 10 in digits)


def label(cells: Cells, names: Sequence[str], physics: Physics, device: str = "cpu") -> Cells:
    """The cells with these properties by homogenisation; those that a solver did not converge for are counted out.

    Flow through the narrowest channels is beyond single precision: what does not converge in it is solved in double.
    """
    if not names or not len(cells.phase):
        return replace(cells, labels=np.zeros((len(cells.phase), len(names)), np.float32))
    phase = torch.from_numpy(cells.phase).to(device)
    labels, keep = _properties(phase.float(), names, physics)
    if not keep.all():
        labels[~keep], keep[~keep] = _properties(phase[~keep].double(), names, physics)
    labels, keep = labels.cpu().numpy(), keep.cpu().numpy()
    dropped = Counter({"not converged": int((~keep).sum())} if not keep.all() else {})
    return Cells(
        cells.phase[keep],
        list(itertools.compress(cells.families, keep)),
        list(itertools.compress(cells.indices, keep)),
        labels[keep],
        cells.counts + dropped,
    )


def _properties(phase: Tensor, names: Sequence[str], physics: Physics) -> tuple[Tensor, Tensor]:
    """Labels (cells, properties), float32, and whether they can be trusted (cells,)."""
    checked = properties(phase, list(names), physics)
    labels = torch.stack([checked.values[name].float() for name in names], -1)
    return labels, checked.converged & labels.isfinite().all(-1)


def write_set(
    path: str | Path,
    make: Callable[[range], Cells],
    num_cells: int,
    *,
    settings: Mapping[str, Any],
    property_names: Sequence[str],
    symmetry: str,
    boundary: Tensor,
    seed: int,
    shard_size: int = 256,
    batch_size: int = 32,
    processes: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes a set, or goes on with one that was interrupted; the number of processes changes nothing in it.

    Args:
        path: The folder.
        make: Makes and labels the cells of some indices: the same ones for the same indices. With several processes a
            function of a module, or a `functools.partial` of one.
        num_cells: Indices to make.
        settings: All that decides the numbers, for JSON; compared when a set is continued.
        property_names: Of the columns of labels.
        symmetry: Of the cells.
        boundary: uint8 (m, ...): 0 void and 1 solid in all cells, 2 free.
        seed: Of the cells, a column of the set.
        shard_size: Indices of a file.
        batch_size: Indices made at once.
        processes: How many, with one thread each if there are several.
        progress: Whether to show a bar.

    Returns:
        What `set.json` holds.

    Raises:
        ValueError: If a number is out of range, a property is named twice, or the folder holds a set of other settings.
    """
    path = Path(path)
    for name, value in (("num_cells", num_cells), ("shard_size", shard_size), ("processes", processes)):
        if value < 1:
            raise ValueError(f"{name} = {value}; expected at least 1.")
    if not 1 <= batch_size <= shard_size:
        raise ValueError(f"batch_size = {batch_size}; expected between 1 and {shard_size}, the indices of a file.")
    if len(set(property_names)) < len(property_names):
        raise ValueError(f"property_names = {', '.join(property_names)}; expected none of them twice.")
    made_with = {**settings, "property_names": list(property_names), "num_cells": num_cells, "seed": seed}
    made_with |= {"shard_size": shard_size, "batch_size": batch_size}
    content = {
        "settings": json.loads(json.dumps(made_with)),  # tuples as they will be read
        "property_names": list(property_names),
        "symmetry": symmetry,
        "boundary": boundary.tolist(),
        "num_shards": -(-num_cells // shard_size),
        "shards": _finished_shards(path, made_with),
        "provenance": provenance(seed),
    }
    shards = [range(i, min(i + shard_size, num_cells)) for i in range(0, num_cells, shard_size)]
    batches = [
        shard[i : i + batch_size]
        for shard in shards[len(content["shards"]) :]
        for i in range(0, len(shard), batch_size)
    ]
    with tqdm(total=num_cells, initial=num_cells - sum(map(len, batches)), unit="cell", disable=not progress) as bar:
        parts = []
        for batch, cells in zip(batches, _run(make, batches, processes), strict=True):
            bar.update(len(batch))
            parts.append(cells)
            if batch.stop % shard_size and batch.stop != num_cells:
                continue
            number = len(content["shards"])
            content["shards"].append(_write_shard(path / _shard_name(number), parts, content, seed))
            write_json(path / SET_FILE, content)
            parts = []
    return content


def load_set(path: str | Path) -> MicrostructureSet:
    """A whole set, in memory.

    Raises:
        ValueError: If there is none, or only a part of it.
    """
    content = read_set_file(path)
    data = microstructures(path).with_format("numpy")
    boundary = torch.tensor(content["boundary"], dtype=torch.uint8)
    names = content["property_names"]
    labels = [torch.from_numpy(np.asarray(data[name][:], np.float32)) for name in names]
    return MicrostructureSet(
        cells=torch.from_numpy(np.asarray(data["cell"][:], np.uint8)).reshape(-1, *boundary.shape),
        labels=torch.stack(labels, -1) if labels else torch.zeros(len(data), 0),
        property_names=tuple(names),
        symmetry=content["symmetry"],
        boundary=boundary,
        settings=content["settings"],
        families=tuple(map(str, data["family"][:])),
        indices=torch.from_numpy(np.asarray(data["index"][:], np.int64)),
    )


def microstructures(path: str | Path, streaming: bool = False) -> Dataset | IterableDataset:
    """A set as a data set of Hugging Face `datasets`: all its splits, which the column `split` tells apart.

    Raises:
        ValueError: If there is none, or only a part of it, or no cell in it.
    """
    # Those of which no cell was kept have no rows, which `datasets` does not read.
    numbers = [number for number, shard in enumerate(read_set_file(path)["shards"]) if shard["cells"]]
    if not numbers:
        raise ValueError(f"{path} has no cells: all were rejected, for what {SET_FILE} counts.")
    files = [str(Path(path, _shard_name(number)).resolve()) for number in numbers]
    missing = [Path(name).name for name in files if not Path(name).exists()]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; delete the folder and make the set again.")
    return load_dataset("parquet", data_files=files, split="train", streaming=streaming)


def read_set_file(path: str | Path) -> dict[str, Any]:
    """What `set.json` of a whole set holds.

    Raises:
        ValueError: If there is none, or only a part of the set.
    """
    content = _read_content(Path(path))
    if content is None:
        raise ValueError(f"{path} has no {SET_FILE}; make a set there: python -m training.microstructures --out {path}")
    done = len(content["shards"])
    if done < content["num_shards"]:
        raise ValueError(f"{path} has {done} of {content['num_shards']} files; make it whole with the same command.")
    return content


def totals(content: Mapping[str, Any]) -> Counter:
    """Sums of what was counted for the shards: "cells", and what was rejected or dropped by reason."""
    return sum((Counter(shard) for shard in content["shards"]), Counter())


def _read_content(path: Path) -> dict[str, Any] | None:
    if not (path / SET_FILE).exists():
        return None
    try:
        return json.loads((path / SET_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / SET_FILE} is not JSON ({error}); delete the folder, or name another.") from error


def _finished_shards(path: Path, settings: Mapping[str, Any]) -> list[dict[str, int]]:
    content = _read_content(path)
    if content is None:
        return []
    recorded, wanted = content["settings"], json.loads(json.dumps(settings))
    different = [
        f"{key} {recorded.get(key, '(none)')}, not {wanted.get(key, '(none)')}"
        for key in {**recorded, **wanted}
        if recorded.get(key) != wanted.get(key)
    ]
    if different:
        raise ValueError(f"{path} was made with {'; '.join(different)}: delete it or choose another folder.")
    return content["shards"]


def _run(make: Callable[[range], Cells], batches: list[range], processes: int) -> Iterator[Cells]:
    """The batches' cells in order."""
    processes = min(processes, len(batches))
    if processes <= 1:
        yield from map(make, batches)
        return
    # Spawned: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from executor.map(make, batches)
    finally:
        executor.shutdown(cancel_futures=True)


def _shard_name(number: int) -> str:
    return f"cells-{number:05d}.parquet"


def _write_shard(path: Path, parts: Sequence[Cells], content: Mapping[str, Any], seed: int) -> dict[str, int]:
    indices = [index for cells in parts for index in cells.indices]
    labels = np.concatenate([cells.labels for cells in parts])
    edges, names = tuple(parts[0].phase.shape[1:]), content["property_names"]
    columns = {
        "cell": np.concatenate([cells.phase for cells in parts]),
        **{name: labels[:, i] for i, name in enumerate(names)},
        "family": [family for cells in parts for family in cells.families],
        "seed": [seed] * len(indices),
        "index": indices,
        "split": [split_of(index) for index in indices],
    }
    voxels = (Array2D if len(edges) == 2 else Array3D)(edges, "uint8")
    kinds = {"cell": voxels, "family": Value("string"), "split": Value("string")}
    kinds |= {"seed": Value("int64"), "index": Value("int64"), **dict.fromkeys(names, Value("float32"))}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    table = Dataset.from_dict(columns, Features({key: kinds[key] for key in columns})).data.table
    parquet.write_table(table, partial)  # with the features in its metadata, as to_parquet does behind a bar of its own
    partial.replace(path)
    return {"cells": len(indices), **sum((cells.counts for cells in parts), Counter())}
