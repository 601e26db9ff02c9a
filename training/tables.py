"""Tables of numbers on disk, of any length: CSV and Parquet, and NPZ that fit the memory, as tensors in a file."""

import csv
import math
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

# What zipfile raises on a file that is damaged, encrypted or packed in ways that it does not know.
DAMAGED_ARRAYS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError)
LARGEST_RATIO = 1032  # of deflate: no zip file unpacks to more bytes for each of its own


@dataclass(frozen=True)
class Table:
    """The columns of a table, checked: all values are finite.

    Attributes:
        inputs: Names of the columns of x.
        targets: Names of the columns of y.
        x: (rows, inputs), float64.
        y: (rows, targets), float64.
    """

    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    x: Tensor
    y: Tensor


class Rows(Dataset):
    """Rows of two tensors, which may lie in a file; many are read at a time.

    Args:
        x: Points (rows, num_inputs).
        y: Targets (rows, ...).
        numbers: Of the rows to use (num_rows,); None is all of them.
    """

    def __init__(self, x: Tensor, y: Tensor, numbers: Tensor | None = None):
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} rows and y has {len(y)}; expected as many.")
        self.x, self.y = x, y
        self.numbers = torch.arange(len(x)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[self.numbers[index]], self.y[self.numbers[index]]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self[indices]


def read_table(path: str | Path, targets: Sequence[str], inputs: Sequence[str] | None = None) -> Table:
    """Reads a table block by block into an unnamed temporary file, which the tensors map: memory does not grow with it.

    Args:
        path: A `.csv` file with a line of names, a `.parquet` file, or an `.npz` file of an array for each column, in
            which an array `x` of several columns stands for `x_0`, `x_1` and so on.
        targets: Names of the columns of y.
        inputs: Names of the columns of x; None takes all that are not targets.

    Raises:
        ValueError: If the kind of file is unknown, it cannot be parsed or has no rows, a column is missing, named twice
            or not numeric, or a value is missing or not finite.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise ValueError(f"{path} is none of {', '.join(READERS)}; convert the table to one of these.")
    try:
        reader = READERS[path.suffix](path)
        names = list(reader.numeric)
        if inputs is None:
            inputs = [name for name in names if name not in targets]
        if not inputs:
            raise ValueError(f"no columns are left as inputs: {path} has {', '.join(names)}.")
        _check_columns(path, reader.numeric, [*inputs, *targets])
        values = _gather(path, reader, [*inputs, *targets])
    except (pa.ArrowException, *DAMAGED_ARRAYS) as error:
        if isinstance(error, MemoryError):  # of Arrow's too
            raise
        raise ValueError(f"{path} cannot be read as a table of numbers: {error}") from error
    return Table(tuple(inputs), tuple(targets), values[:, : len(inputs)], values[:, len(inputs) :])


def _check_columns(path: Path, numeric: dict[str, bool], chosen: list[str]) -> None:
    for name in chosen:
        if name not in numeric:
            raise ValueError(f"{path} has no column {name!r}; its columns are {', '.join(numeric)}.")
        if chosen.count(name) > 1:
            raise ValueError(f"column {name!r} is asked for {chosen.count(name)} times; name each column once.")
        if not numeric[name]:
            raise ValueError(
                f"{path}: column {name!r} is not numeric; encode it as numbers, or name the columns to use as inputs."
            )


def _gather(path: Path, reader: "_CSV | _Parquet | _NPZ", names: list[str]) -> Tensor:
    """The columns (rows, names) in a file that is gone once the tensor is."""
    rows = 0
    with tempfile.TemporaryFile() as file:
        with tqdm(desc=path.name, unit=" rows", unit_scale=True, disable=None) as bar:
            for block in reader.blocks(names):
                for row, column in np.argwhere(~np.isfinite(block))[:1]:
                    value = "missing or not a number" if np.isnan(block[row, column]) else block[row, column]
                    raise ValueError(
                        f"{path}: row {rows + row + 1} of column {names[column]!r} is {value}; drop the row or fill in "
                        "the value."
                    )
                block.tofile(file)
                rows += len(block)
                bar.update(len(block))
        if not rows:
            raise ValueError(f"{path} has no rows.")
        file.flush()
        return torch.from_numpy(np.memmap(file, np.float64, "r+", shape=(rows, len(names))))


def _is_number(kind: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
    return any(test(kind) for test in tests)


def _to_array(batch: pa.RecordBatch, names: list[str]) -> np.ndarray:
    """Columns (rows, names); a missing value is not a number."""
    columns = [batch.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False) for name in names]
    return np.stack(columns, axis=1)


class _CSV:
    def __init__(self, path: Path):
        self.path = path
        with path.open(newline="", encoding="utf-8-sig") as file:
            names = next(csv.reader(file), [])
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{path} has {names.count(repeated[0])} columns {repeated[0]!r}; rename them.")
        # A guess by the first block; the rest is read as numbers or not at all.
        schema = pa.csv.open_csv(path).schema
        self.numeric = {field.name: _is_number(field.type) for field in schema}

    def blocks(self, names: list[str]) -> Iterator[np.ndarray]:
        options = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.float64()), include_columns=names)
        for batch in pa.csv.open_csv(self.path, convert_options=options):
            yield _to_array(batch, names)


class _Parquet:
    def __init__(self, path: Path):
        self.file = pa.parquet.ParquetFile(path)
        self.numeric = {field.name: _is_number(field.type) for field in self.file.schema_arrow}

    def blocks(self, names: list[str]) -> Iterator[np.ndarray]:
        for group in range(self.file.num_row_groups):  # a reader of several fetches them ahead
            for batch in self.file.iter_batches(row_groups=[group], columns=names, use_threads=False):
                yield _to_array(batch, names)


class _NPZ:
    def __init__(self, path: Path):
        self.columns = {}
        _check_arrays(path)
        with np.load(path, allow_pickle=False) as arrays:
            for name, array in arrays.items():
                if array.ndim == 1:
                    self.columns[name] = array
                elif array.ndim == 2:
                    self.columns |= {f"{name}_{j}": column for j, column in enumerate(array.T)}
                else:
                    raise ValueError(f"{path}: array {name!r} has shape {array.shape}; expected one or two dimensions.")
        self.numeric = {name: column.dtype.kind in "iuf" for name, column in self.columns.items()}

    def blocks(self, names: list[str]) -> Iterator[np.ndarray]:
        lengths = {name: len(self.columns[name]) for name in names}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns have different lengths: {lengths}; expected one value for each row.")
        yield np.stack([self.columns[name] for name in names], axis=1).astype(np.float64)


def _check_arrays(path: Path) -> None:
    """Refuses arrays that claim more values than the file can hold, before numpy makes room for them."""
    room = path.stat().st_size * LARGEST_RATIO
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            with file.open(entry) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, kind = read(member)
            if (size := math.prod(shape) * kind.itemsize) > room:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes and claims {size} in its array {entry.filename}: more "
                    "than any compression makes of it. Copy it again."
                )


READERS = {".csv": _CSV, ".parquet": _Parquet, ".npz": _NPZ}
