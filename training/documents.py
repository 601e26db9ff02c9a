"""Where text comes from: documents of local files or of the Hub, one at a time, from any position on.

Files are read as far as they are needed and never held whole, but for a `.txt`, which is one document. What cannot be
read is never passed over in silence: it stops the reading, or is counted and warned of.
"""

import gzip
import itertools
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import pyarrow
import pyarrow.parquet
import zstandard

if TYPE_CHECKING:
    import datasets

CHUNK_BYTES = 2**17  # read at a time
PARQUET_ROWS = 256  # decoded at a time
MAX_WINDOW_BYTES = 2**31  # of a zstd frame, the most that the format's own tool writes (--ultra --long=31)
MAX_RECORD_BYTES = 2**26  # of a line; a packed file of a few kilobytes can hold one that fills the memory
# Of a zstd file, unpacked at a time: a block of it, 128 KiB at most, can be as short as 4 bytes.
PACKED_BYTES = 2**10


class _TooLongError(ValueError):
    """A line is longer than `MAX_RECORD_BYTES`."""


# What readers raise on a file that is truncated or of another kind.
_DAMAGE = (_TooLongError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException, OSError)

Position = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Document:
    """A document, and where the next is to be looked for.

    Attributes:
        text: Its text: not empty, and writable as UTF-8.
        following: The position after it, for `Documents.iterate`; small, and fit for JSON.
    """

    text: str
    following: Position


class Documents:
    """The documents of a corpus: an iterable of texts in a fixed order, which can go on from any of them.

    Local files are `.jsonl`, `.jsonl.zst`, `.jsonl.gz` (a JSON object a line), `.parquet` (a document a row) and `.txt`
    (one document), in the order of their names. A dataset of the Hub is streamed in the order of its shards.

    Broken is a line that is no JSON, a record without the column, a text that is no string or cannot be written as
    UTF-8. What is left of a file from where it is truncated or cannot be decoded counts as one broken record. A shard
    of the Hub that `datasets` cannot read always raises. Texts of nothing but white space are left out and counted.

    Attributes:
        num_empty: Empty documents met so far, by all iterations; to be set by who goes on from where another was left.
        num_broken: Broken records, likewise.

    Args:
        source: A file, a folder (with those inside it) or a glob; with `dataset`, one of its splits.
        dataset: Name on the Hub, or what else `datasets.load_dataset` reads.
        dataset_config: Name of one of its configurations.
        dataset_revision: Branch, tag or commit of it.
        column: Name of the text in a record.
        on_broken: `"raise"`, or `"skip"` with a warning at the first of a file, and their number at its end.
        share: (i, n), the i-th of n disjoint shares, which hold every document once: every n-th file or shard of the
            Hub, or every n-th record if there are fewer than n of them.

    Raises:
        ValueError: If there are no files, one is of another kind, or an argument is none of those above; in iteration,
            on broken records.
        OSError: If a file cannot be opened, or `datasets` does not find its.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        dataset: str | None = None,
        dataset_config: str | None = None,
        dataset_revision: str | None = None,
        column: str = "text",
        on_broken: Literal["raise", "skip"] = "raise",
        share: tuple[int, int] = (0, 1),
    ):
        if on_broken not in ("raise", "skip"):
            raise ValueError(f"on_broken = {on_broken!r}; expected 'raise' or 'skip'.")
        index, count = share
        if not 0 <= index < count:
            raise ValueError(f"share = {share}; expected (i, n) with 0 <= i < n.")
        self.on_broken, self.share = on_broken, share
        self.num_empty = self.num_broken = 0
        if dataset is not None:
            self._source = _Hub.of(dataset, dataset_config, str(source), dataset_revision, column)
        elif dataset_config is not None or dataset_revision is not None:
            raise ValueError(
                f"dataset_config = {dataset_config!r} and dataset_revision = {dataset_revision!r} are of a dataset of "
                "the Hub; give its name, or leave them out for local files."
            )
        else:
            self._source = _Files.of(source, column)
        self._every = (0, 1)  # (i, n): every n-th record from the i-th on
        if len(self._source) >= count:
            self._source = self._source.shard(index, count)
        else:
            self._every = (index, count)

    def record(self) -> dict[str, Any]:
        """What tells this corpus from another, for JSON."""
        return self._source.record()

    def __iter__(self) -> Iterator[str]:
        return (document.text for document in self.iterate())

    def iterate(self, position: Position | None = None) -> Iterator[Document]:
        """The documents from `position` on: those, and only those, that would have come after it.

        What lies before is passed over without being parsed. None is the beginning.

        Raises:
            ValueError: On a broken record, if `on_broken="raise"`; or if the position is not of this corpus.
        """
        index, count = self._every
        for name, rows in self._source.open(position):
            num_broken, first = 0, ""
            try:
                for row in rows:
                    if row.number % count != index:
                        continue
                    try:
                        text = _checked(row.read())
                    except ValueError as error:
                        reason = f"{name}, {row.place}: {error}"
                        if self.on_broken == "raise":
                            raise ValueError(f"{reason}. Mend the file, or go on with on_broken='skip'.") from error
                        if not num_broken:  # the end of a large file may be days away
                            first = reason
                            warnings.warn(f"{first}. It is left out, as more of that file will be.", stacklevel=2)
                        num_broken += 1
                        self.num_broken += 1
                        continue
                    if not text or text.isspace():
                        self.num_empty += 1
                    else:
                        yield Document(text, row.following)
            finally:  # also if no more is asked for
                if num_broken:
                    warnings.warn(f"{num_broken} broken records left out; the first is {first}.", stacklevel=2)


@dataclass(frozen=True, slots=True)
class _Row:
    """A record that is not parsed yet: `read` does that, and raises ValueError if it is broken."""

    number: int  # by which the shares are dealt out
    place: str
    read: Callable[[], Any]
    following: Position


def _checked(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"the text is no string, but {type(text).__name__}")
    text.encode()  # raises on half a surrogate pair, which JSON can hold and no tokenizer takes
    return text


def _of_column(record: Any, column: str) -> Any:
    if not isinstance(record, dict):
        raise ValueError(f"it is no object with the key {column!r}, but {type(record).__name__}")
    if column not in record:
        raise ValueError(f"it has no {column!r}, only {', '.join(record) or 'nothing'}")
    return record[column]


class _Hub:
    """The records of a streamed dataset."""

    def __init__(self, origin: dict[str, Any], column: str, stream: "datasets.IterableDataset"):
        self.origin, self.column, self.stream = origin, column, stream

    @classmethod
    def of(cls, name: str, config: str | None, split: str, revision: str | None, column: str) -> "_Hub":
        import datasets  # only those who ask for it should wait for it

        origin = {"dataset": name, "config": config, "revision": revision, "split": split}
        return cls(origin, column, datasets.load_dataset(name, config, split=split, revision=revision, streaming=True))

    def __len__(self) -> int:
        return self.stream.num_shards

    def shard(self, index: int, count: int) -> "_Hub":
        return _Hub(self.origin, self.column, self.stream.shard(count, index, contiguous=False))

    def record(self) -> dict[str, Any]:
        return self.origin | {"num_shards": len(self)}

    def open(self, position: Position | None) -> Iterator[tuple[str, Iterator[_Row]]]:
        position = position or {"row": 0, "stream": None}
        if position.keys() != {"row", "stream"}:
            raise ValueError(f"position = {position} is none in a dataset of the Hub; start from the beginning.")
        yield f"{self.origin['dataset']} ({self.origin['split']})", self._rows(**position)

    def _rows(self, row: int, stream: dict[str, Any] | None) -> Iterator[_Row]:
        own = self.stream.shard(1, 0)  # all of it, with a state that no other iteration moves
        own.load_state_dict(stream)
        # By batches of one: in a worker of a DataLoader the plain iterator would deal the records out once more.
        for number, batch in enumerate(own.iter(batch_size=1), row):
            record = {column: values[0] for column, values in batch.items()}
            following = {"row": number + 1, "stream": own.state_dict()}
            yield _Row(number, f"record {number + 1}", partial(_of_column, record, self.column), following)


class _Files:
    """The records of local files, under the names that positions know them by."""

    def __init__(self, files: dict[str, Path], column: str):
        self.files, self.column = files, column

    @classmethod
    def of(cls, source: str | Path, column: str) -> "_Files":
        path = Path(source).expanduser()
        if path.is_dir():
            found = [file for file in path.rglob("*") if file.is_file() and _ending(file)]
        elif path.exists():
            found = [path]
        else:
            found = [file for file in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if file.is_file()]
        if not found:
            raise ValueError(f"there are no files {source}; expected a file, a folder or a glob of {_KINDS}.")
        if unknown := [file for file in found if not _ending(file)]:
            raise ValueError(f"{unknown[0]} is none of the files that are read; expected {_KINDS}.")
        root = os.path.commonpath([file.parent for file in found])
        return cls({file.relative_to(root).as_posix(): file for file in sorted(found)}, column)

    def __len__(self) -> int:
        return len(self.files)

    def shard(self, index: int, count: int) -> "_Files":
        return _Files(dict(itertools.islice(self.files.items(), index, None, count)), self.column)

    def record(self) -> dict[str, Any]:
        return {"files": {name: path.stat().st_size for name, path in self.files.items()}}

    def open(self, position: Position | None) -> Iterator[tuple[str, Iterator[_Row]]]:
        names = list(self.files)
        position = position or {"file": names[0], "row": 0}
        if position.get("file") not in names:
            raise ValueError(
                f"position = {position} is in none of the {len(names)} files from {names[0]} to {names[-1]}; put that "
                "file back, or start from the beginning."
            )
        start = names.index(position["file"])
        for index, name in itertools.islice(enumerate(names), start, None):
            yield str(self.files[name]), self._rows(index, name, position["row"] if index == start else 0)

    def _rows(self, index: int, name: str, row: int) -> Iterator[_Row]:
        unit, read, parse = _FORMATS[_ending(name)]

        def made(parsed: Callable[[], Any]) -> _Row:
            # Each file begins its count at another number, or files of one record would all go to one share.
            return _Row(index + row, f"{unit} {row + 1}", parsed, {"file": name, "row": row + 1})

        try:
            for raw in read(self.files[name], row, self.column):
                yield made(partial(parse, raw, self.column))
                row += 1
        except Exception as error:
            of_system = isinstance(error, OSError) and error.errno is not None  # not of what the file holds
            if of_system or not isinstance(error, _DAMAGE):
                raise
            yield made(partial(_unreadable, error))


def _unreadable(error: Exception) -> None:
    raise ValueError(f"the file cannot be read from here on ({error})")


def _lines(chunks: Callable[[IO[bytes]], Iterable[bytes]], path: Path, first: int, column: str) -> Iterator[bytes]:
    def lines() -> Iterator[bytes]:
        begun: list[bytes] = []  # joined once, however many chunks a line is long
        length = 0
        with path.open("rb") as file:
            for chunk in chunks(file):
                end, *more = chunk.split(b"\n")
                begun.append(end)
                length += len(end)
                if more:
                    yield b"".join(begun)
                    yield from more[:-1]
                    begun, length = more[-1:], len(more[-1])
                if length > MAX_RECORD_BYTES:
                    raise _TooLongError(f"a line is longer than {MAX_RECORD_BYTES} bytes")
        if rest := b"".join(begun):
            yield rest

    return itertools.islice(lines(), first, None)


def _plain(file: IO[bytes]) -> Iterator[bytes]:
    return iter(partial(file.read, CHUNK_BYTES), b"")


def _unzipped(file: IO[bytes]) -> Iterator[bytes]:
    return iter(partial(gzip.GzipFile(fileobj=file).read1, CHUNK_BYTES), b"")


def _unpacked(file: IO[bytes]) -> Iterator[bytes]:
    # Not zstandard's stream_reader, to which a truncated file looks like one that has come to its end.
    decompressor, frame, rest = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES), None, b""
    while chunk := rest or file.read(PACKED_BYTES):
        frame = frame or decompressor.decompressobj()
        try:
            unpacked = frame.decompress(chunk)
        except MemoryError as error:  # a few bytes can ask for a window of MAX_WINDOW_BYTES
            raise zstandard.ZstdError("a frame asks for a larger window than memory holds") from error
        yield unpacked
        rest = b""
        if frame.eof:  # another may follow
            frame, rest = None, frame.unused_data
    if frame is not None:
        raise EOFError("it ends inside of a compressed frame")


def _parquet_rows(path: Path, first: int, column: str) -> Iterator[pyarrow.Scalar]:
    with pyarrow.parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise pyarrow.ArrowInvalid(f"it has no {column!r}, only {', '.join(file.schema_arrow.names)}")
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if first >= num_rows:
                first -= num_rows
                continue
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[column]):
                yield from batch.column(0)[first:]
                first = max(0, first - len(batch))


def _whole_file(path: Path, first: int, column: str) -> Iterator[bytes]:
    return itertools.islice((path.read_bytes() for _ in range(1)), first, None)


def _from_json(line: bytes, column: str) -> Any:
    if not line or line.isspace():
        return ""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error.msg} at character {error.pos + 1})") from error
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    return _of_column(record, column)


# What a record is called, how those from a number on are read, and how one is parsed.
_FORMATS: dict[str, tuple[str, Callable[[Path, int, str], Iterator[Any]], Callable[[Any, str], Any]]] = {
    ".jsonl": ("line", partial(_lines, _plain), _from_json),
    ".jsonl.zst": ("line", partial(_lines, _unpacked), _from_json),
    ".jsonl.gz": ("line", partial(_lines, _unzipped), _from_json),
    ".parquet": ("row", _parquet_rows, lambda scalar, column: scalar.as_py()),
    ".txt": ("document", _whole_file, lambda content, column: content.decode()),
}
_KINDS = ", ".join(_FORMATS)


def _ending(path: str | Path) -> str | None:
    return next((ending for ending in _FORMATS if str(path).endswith(ending)), None)
