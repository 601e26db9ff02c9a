"""Reading HDF5 files that anyone may have written: nothing outside of them is opened, no size in them is trusted."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

LARGEST_RATIO = 1032  # of deflate, HDF5's own compression: no filter of it makes more bytes out of one
DAMAGE = (KeyError, RuntimeError, TypeError, AttributeError, IndexError, OverflowError, NotImplementedError)


@contextmanager
def reading(path: Path, what: str = "its header") -> Iterator[None]:
    """Turns what h5py raises on a damaged file, which is almost anything, into an OSError that says so."""
    try:
        yield
    except (*DAMAGE, OSError) as error:
        raise OSError(
            f"{path}: {what} cannot be read ({error}); the file is damaged, fetch or generate it again"
        ) from error


def numbers(file: h5py.File, name: str) -> h5py.Dataset | None:
    """The data set of that name in the file itself, or None where there is none.

    Raises:
        ValueError: If it is a link to another place, keeps its values in other files, or holds no real numbers.
    """
    link = file.get(name, getlink=True)
    if link is None:
        return None
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{file.filename}: {name} is a link; expected the values themselves. Copy them into the file.")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        return None
    if dataset.is_virtual or dataset.external:
        raise ValueError(f"{file.filename}: the values of {name} are in other files; copy them into this one.")
    if dataset.dtype.kind not in "fiu":
        raise ValueError(f"{file.filename}: {name} holds {dataset.dtype}; expected real numbers.")
    return dataset


def check_stored(dataset: h5py.Dataset, shape: tuple[int, ...]) -> None:
    """Refuses to read an array of that shape out of a file that is too small to hold it.

    Raises:
        ValueError: If so, even were it compressed as far as HDF5 can; or if a chunk of the data set is such an array.
    """
    path = Path(dataset.file.filename)
    room = path.stat().st_size * LARGEST_RATIO
    for what, each in (("an array", shape), ("chunks", dataset.chunks or ())):
        size = dataset.dtype.itemsize * int(np.prod([int(n) for n in each], dtype=object))
        if size > room:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes and claims {what} of shape {tuple(each)} in {dataset.name}, "
                f"{size} bytes: more than any compression makes of it. Fetch or generate it again."
            )


def attributes(file: h5py.File) -> dict[str, Any]:
    """The file's attributes, as Python's numbers, strings and lists.

    What has no length of its own, such as text of variable length, is left out: it lies in a heap, in which HDF5's
    library can run in circles for ever if the file is damaged. Write text as :func:`text` makes it.

    Raises:
        ValueError: If one is larger than the file.
    """
    found, room = {}, Path(file.filename).stat().st_size
    for name in file.attrs:
        stored = file.attrs.get_id(name)
        kind = stored.get_type()
        if kind.detect_class(h5py.h5t.VLEN) or (kind.detect_class(h5py.h5t.STRING) and kind.is_variable_str()):
            continue
        size = int(np.prod(stored.shape or (), dtype=object)) * kind.get_size()
        if size > room:
            raise ValueError(f"{file.filename} has {room} bytes and claims {size} in its attribute {name!r}.")
        value = file.attrs[name]
        key = name if isinstance(name, str) else name.decode(errors="replace")  # bytes where it is no UTF-8
        value = value.tolist() if hasattr(value, "tolist") else value
        found[key] = value.decode(errors="replace") if isinstance(value, bytes) else value
    return found


def text(value: Any) -> Any:
    """A string as an attribute of fixed length, which :func:`attributes` reads; anything else as it is."""
    return np.bytes_(value.encode()) if isinstance(value, str) else value
