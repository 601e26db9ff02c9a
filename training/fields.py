"""Reading files of flow fields in PDEBench's layout, and cutting them into pairs of token patches for training.

The files are PDEBench's two-dimensional Navier-Stokes sets (Takamoto et al., 2022) or those of `training.turbulence`:
velocities `Vx`, `Vy` of shape (N, T, X, Y) on a periodic grid, indexed [x, y]. There is no vorticity in them. It is
computed here, on the whole periodic field, before any patch is cut: a patch is not periodic, and differences on it
would be wrong along its edge.
"""

import itertools
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from training.hdf5_files import attributes, check_stored, numbers, reading

if TYPE_CHECKING:
    import datasets

    from leviathan import FieldTokenizer

IGNORED_LABEL = -100  # transformers' loss functions leave out positions with this label
REQUIRED_KEYS = ("Vx", "Vy", "t-coordinate", "x-coordinate", "y-coordinate")


def vorticity_from_velocity(u: np.ndarray, v: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """ω = ∂v/∂x − ∂u/∂y by Fourier differentiation of a periodic velocity field, in 1 / time.

    Args:
        u: x component `(..., X, Y)`, indexed [x, y].
        v: y component, of the same shape.
        spacing: (dx, dy).

    Returns:
        `(..., X, Y)` float32, computed in float64: a derivative multiplies rounding errors by the wavenumber.
    """
    (num_x, num_y), (dx, dy) = u.shape[-2:], spacing
    kx, ky = 2 * np.pi * np.fft.fftfreq(num_x, dx)[:, None], 2 * np.pi * np.fft.rfftfreq(num_y, dy)
    # A real derivative has no component at the Nyquist wavenumber: the phase of that wave is not on the grid.
    if num_x % 2 == 0:
        kx[num_x // 2] = 0
    if num_y % 2 == 0:
        ky[-1] = 0
    spectrum = 1j * kx * np.fft.rfft2(v.astype(np.float64)) - 1j * ky * np.fft.rfft2(u.astype(np.float64))
    return np.fft.irfft2(spectrum, s=(num_x, num_y)).astype(np.float32)


class FieldFile:
    """A file of trajectories, read one snapshot at a time: PDEBench's turbulence file has 88 GB.

    A context manager. It can be pickled, and used after a fork: each process opens the file for itself.

    Attributes:
        path: The file.
        num_trajectories: N.
        num_snapshots: T. PDEBench writes T + 1 times for T snapshots; both counts are accepted.
        grid: (X, Y).
        spacing: (dx, dy), from the coordinates.
        dt_save: Time between two snapshots.
        synthetic: Whether the file was made by `training.turbulence`.
        attributes: The file's own attributes.

    Args:
        path: An HDF5 file.
        cache_bytes: Room for vorticity snapshots that are kept, the latest used ones.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it is not HDF5, is truncated, or cannot be opened.
        ValueError: if it is not laid out as PDEBench's.
    """

    def __init__(self, path: str | Path, cache_bytes: int = 256 * 2**20):
        self.path, self.cache_bytes = Path(path), cache_bytes
        self._file: h5py.File | None = None
        self._owner: int | None = None
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        try:
            file = self._opened()
            with reading(self.path):
                self._read_header(file)
        except BaseException:
            self.close()
            raise

    def _opened(self) -> h5py.File:
        # An HDF5 handle must not be shared by a forked child: both would move the same file position.
        if self._file is None or self._owner != os.getpid():
            self._file, self._owner = _open(self.path), os.getpid()
        return self._file

    def _read_header(self, file: h5py.File) -> None:
        found = {key: numbers(file, key) for key in REQUIRED_KEYS}
        missing = [key for key, dataset in found.items() if dataset is None]
        if missing:
            raise ValueError(
                f"{self.path} lacks {', '.join(missing)} (it has {', '.join(map(str, file)) or 'nothing'}); expected "
                "PDEBench's layout, as `python -m training.turbulence` writes it"
            )
        shape, other = found["Vx"].shape, found["Vy"].shape
        if len(shape) != 4 or other != shape or 0 in shape[2:]:
            raise ValueError(f"{self.path}: Vx is {shape} and Vy {other}; expected one shape (N, T, X, Y)")
        for key in ("Vx", "Vy"):
            check_stored(found[key], shape[2:])  # a snapshot, which is what is read at a time
        self.num_trajectories, self.num_snapshots, *grid = shape
        self.grid = tuple(grid)
        self.attributes = attributes(file)
        self.synthetic = bool(self.attributes.get("synthetic", False))
        dx, dy = (_spacing(self.path, file, f"{axis}-coordinate", {n}) for axis, n in zip("xy", grid, strict=True))
        self.spacing = (dx, dy)
        times = {self.num_snapshots, self.num_snapshots + 1}
        from_times = _spacing(self.path, file, "t-coordinate", times)
        dt_save = self.attributes.get("dt_save", from_times)
        if not isinstance(dt_save, int | float):
            raise ValueError(f"{self.path}: dt_save = {dt_save!r}; expected the time between two snapshots")
        self.dt_save = float(dt_save)

    def velocity(self, trajectory: int, snapshot: int) -> tuple[np.ndarray, np.ndarray]:
        """(u, v) of one snapshot, each `(X, Y)` float32, in length / time.

        Raises:
            ValueError: if there is no such snapshot, or it holds a value that is not finite.
            OSError: if it cannot be read.
        """
        counts = {"trajectory": (trajectory, self.num_trajectories), "snapshot": (snapshot, self.num_snapshots)}
        for name, (value, count) in counts.items():
            if not 0 <= value < count:
                raise ValueError(f"{self.path}: {name} {value} does not exist; it has {count}, from 0 on")
        file = self._opened()
        with reading(self.path, f"trajectory {trajectory}, snapshot {snapshot}"):
            u, v = (file[key][trajectory, snapshot].astype(np.float32, copy=False) for key in ("Vx", "Vy"))
        if not (np.isfinite(u).all() and np.isfinite(v).all()):
            raise ValueError(
                f"{self.path}: trajectory {trajectory}, snapshot {snapshot} is not finite everywhere; leave the "
                "trajectory out, or fetch or generate the file again"
            )
        return u, v

    def snapshot(self, trajectory: int, snapshot: int) -> np.ndarray:
        """The vorticity of one snapshot, `(X, Y)` float32 in 1 / time: a read-only array, shared with the cache."""
        key = (int(trajectory), int(snapshot))
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        vorticity = vorticity_from_velocity(*self.velocity(*key), self.spacing)
        vorticity.flags.writeable = False
        if vorticity.nbytes <= self.cache_bytes:
            self._cache[key] = vorticity
        while len(self._cache) * vorticity.nbytes > self.cache_bytes:  # snapshots are all of one size
            self._cache.popitem(last=False)
        return vorticity

    def vorticity(self, trajectory: int, snapshots: Iterable[int] | slice | None = None) -> np.ndarray:
        """The vorticity of a trajectory, `(T, X, Y)` float32 in 1 / time; `snapshots` selects some of it, in order."""
        if snapshots is None or isinstance(snapshots, slice):
            snapshots = range(self.num_snapshots)[snapshots or slice(None)]
        chosen = [self.snapshot(trajectory, snapshot) for snapshot in snapshots]
        return np.stack(chosen) if chosen else np.empty((0, *self.grid), np.float32)

    def close(self) -> None:
        """Closes the file and empties the cache; the next read opens it again."""
        if self._file is not None and self._owner == os.getpid():
            self._file.close()
        self._file = None
        self._cache.clear()

    def __enter__(self) -> "FieldFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_owner": None, "_cache": OrderedDict()}


def data_record(fields: FieldFile) -> dict[str, Any]:
    """What tells a file of trajectories from another, for JSON."""
    return {
        "num_trajectories": fields.num_trajectories,
        "num_snapshots": fields.num_snapshots,
        "grid": list(fields.grid),
        "dt_save": fields.dt_save,
        "attributes": json.loads(json.dumps(fields.attributes, default=str)),
    }


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; `python -m training.turbulence --out {path}` makes one")
    remedy = "fetch it again and compare its checksum, or make it again with `python -m training.turbulence`"
    if not h5py.is_hdf5(path):
        raise OSError(f"{path} is not an HDF5 file ({path.stat().st_size} bytes); {remedy}")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise OSError(f"{path} ({path.stat().st_size} bytes) cannot be opened: {error}; {remedy}") from error


def _spacing(path: Path, file: h5py.File, key: str, counts: set[int]) -> float:
    shape = file[key].shape
    if len(shape) != 1 or shape[0] not in counts:
        expected = " or ".join(map(str, sorted(counts)))
        raise ValueError(
            f"{path}: {key} has shape {shape}, but Vx has shape {file['Vx'].shape}; expected {expected} entries"
        )
    check_stored(file[key], shape)
    values = file[key][()].astype(np.float64)
    steps = np.diff(values)
    step = steps.mean() if len(steps) else 1.0
    if not (step > 0 and np.allclose(steps, step, rtol=1e-2)):
        raise ValueError(
            f"{path}: {key} is not evenly spaced and increasing: its steps lie in [{steps.min():g}, {steps.max():g}]"
        )
    return float(step)


@dataclass(frozen=True, eq=False)
class TrajectorySplit:
    """Indices of the trajectories for training, validation and test: sorted int64 arrays with nothing in common."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_trajectories(
    num_trajectories: int, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1), seed: int = 0
) -> TrajectorySplit:
    """Shuffles the trajectories and deals them out: whole trajectories, since snapshots of one resemble each other.

    Raises:
        ValueError: if there are fewer than three, or the fractions are not positive with sum 1.
    """
    if num_trajectories < 3:
        raise ValueError(f"{num_trajectories} trajectories cannot be split in three; at least 3 are needed")
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions = {fractions} must be three positive numbers with sum 1")
    num_validation, num_test = (max(1, round(num_trajectories * fraction)) for fraction in fractions[1:])
    if num_validation + num_test >= num_trajectories:
        raise ValueError(
            f"fractions = {fractions} of {num_trajectories} trajectories leave none to train on; lower the last two"
        )
    order = np.random.default_rng(seed).permutation(num_trajectories)
    validation, test, train = np.split(order, [num_validation, num_validation + num_test])
    return TrajectorySplit(np.sort(train), np.sort(validation), np.sort(test))


def sample_snapshots(
    fields: FieldFile, trajectories: Sequence[int], num_snapshots: int, *, seed: int = 0, mirrored: bool = False
) -> Iterator[np.ndarray]:
    """Yields the vorticity `(X, Y)` of up to `num_snapshots` distinct random snapshots, one at a time.

    Made for `tokenizer.fit(sample_snapshots(fields, split.train, 256))`. `mirrored` yields −ω beside every ω: the range
    that a training set with `symmetries=True` needs.
    """
    trajectories = _checked(fields, trajectories)
    total = len(trajectories) * fields.num_snapshots
    chosen = np.random.default_rng(seed).choice(total, size=min(num_snapshots, total), replace=False)
    for index in np.sort(chosen):  # in the order of the file
        vorticity = fields.snapshot(trajectories[index // fields.num_snapshots], index % fields.num_snapshots)
        yield vorticity
        if mirrored:
            yield -vorticity


class PatchPairs(Dataset):
    """Pairs of one patch at two times, as token sequences for a Prefix-LM: p(t) is read, p(t + stride) is learned.

    Item: `input_ids` `(m + n,)`, the m tokens of p(t), then the n = patch_size² tokens of p(t + stride); `labels`, as
    many, −100 on the first m and the ids on the rest. Both int64. m = `prefix_length` = n, or that of the window if the
    tokenizer has a margin: p(t) is then the patch and what lies around it on the periodic field.

    `offsets="grid"` (the paper's): the non-overlapping patches of the grid, each (trajectory, t, patch) once, patches
    in row-major order fastest. `offsets="random"`: `num_items` items; item i draws a trajectory, a t, a patch anywhere
    on the periodic field and, with `symmetries`, one of the square's eight symmetries, from a generator seeded by
    (seed, i) alone. So the items are the same in any order, from any number of workers, and after a resume.

    Args:
        fields: The file.
        trajectories: Indices of the trajectories to use.
        tokenizer: A fitted `FieldTokenizer`; its `patch_size` is the patch's side.
        offsets: See above.
        num_items: Number of items; for random offsets only.
        symmetries: Whether to rotate and reflect; for random offsets only. A reflection turns the sense of rotation,
            so ω changes sign. Right for isotropic flow: a forced flow has no more symmetries than its forcing.
        stride: Snapshots from the first state to the second.
        context_noise: Noise on the target's tokens as inputs, for random offsets only: item i draws a standard
            deviation from 0 to this many levels, and adds such noise to the second half of `input_ids`; `labels` stay
            true. A free rollout reads its own errors where training reads the truth; a model that has seen noise there
            leans on the prior state instead.
        seed: Seed of random offsets and noise.

    Raises:
        ValueError: if a trajectory does not exist, the patch does not fit the grid, there are no two snapshots `stride`
            apart, or the options do not go together.
    """

    def __init__(
        self,
        fields: FieldFile,
        trajectories: Sequence[int],
        tokenizer: "FieldTokenizer",
        *,
        offsets: Literal["grid", "random"] = "grid",
        num_items: int | None = None,
        symmetries: bool = False,
        stride: int = 1,
        context_noise: float = 0.0,
        seed: int = 0,
    ):
        self.fields, self.trajectories, self.tokenizer = fields, _checked(fields, trajectories), tokenizer
        self.offsets, self.symmetries, self.stride, self.seed = offsets, symmetries, stride, seed
        self.context_noise = context_noise
        self.num_times = fields.num_snapshots - stride
        size, (num_x, num_y) = tokenizer.patch_size, fields.grid
        grid, random = offsets == "grid", offsets == "random"
        cut = f"the grid {num_x} x {num_y} is not a multiple of patch_size = {size}; use a divisor, or random offsets"
        refused = {
            f"stride = {stride} must be from 1 to {fields.num_snapshots - 1}": stride < 1 or self.num_times < 1,
            f"offsets = {offsets!r} must be 'grid' or 'random'": not (grid or random),
            f"patch_size = {size} exceeds the grid {num_x} x {num_y}; use a smaller patch": size > min(num_x, num_y),
            f"patches of {size} with a margin of {tokenizer.margin} exceed the grid {num_x} x {num_y}": (
                tokenizer.window_size > min(num_x, num_y)
            ),
            cut: grid and (num_x % size or num_y % size),
            "num_items, symmetries and context_noise go with offsets='random' only": (
                grid and (num_items is not None or symmetries or context_noise)
            ),
            f"context_noise = {context_noise} must be a number of levels, 0 or more": not 0 <= context_noise < np.inf,
            f"offsets='random' needs num_items > 0, not {num_items}": random and (num_items is None or num_items < 1),
            f"spacing {fields.spacing} is not square, so a quarter turn is no symmetry": (
                symmetries and not np.isclose(*fields.spacing, rtol=1e-4)
            ),
        }
        for reason, applies in refused.items():
            if applies:
                raise ValueError(f"{fields.path}: {reason}")
        self.patches_per_field = (num_x // size) * (num_y // size)
        self._centre = torch.from_numpy(tokenizer.centre())
        self.num_items = num_items or len(self.trajectories) * self.num_times * self.patches_per_field

    def __len__(self) -> int:
        return self.num_items

    @property
    def prefix_length(self) -> int:
        """Tokens of the first state, which every position sees."""
        return self.tokenizer.tokens_per_prefix

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """A batch as the model takes it: tensors (batch, tokens), and one `prefix_length` for all rows."""
        return default_collate(items) | {"prefix_length": self.prefix_length}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.num_items:
            raise IndexError(f"item {index} does not exist; there are {self.num_items}")
        prefix, target = torch.from_numpy(self.tokenizer.window(self.patches(int(index))))
        target = target[self._centre]
        return {
            "input_ids": torch.cat([prefix, self._noisy(target, int(index))]),
            "labels": torch.cat([torch.full_like(prefix, IGNORED_LABEL), target]),
        }

    def _noisy(self, target: Tensor, index: int) -> Tensor:
        if not self.context_noise:
            return target
        generator = np.random.default_rng((self.seed, index, 1))  # another stream than the patch's
        noise = generator.normal(scale=generator.uniform(0, self.context_noise), size=len(target))
        return (target + torch.from_numpy(np.rint(noise).astype(np.int64))).clamp(0, self.tokenizer.vocab_size - 1)

    def patches(self, index: int) -> np.ndarray:
        """The vorticity of item `index` before it is made tokens, both states with the margin: `(2, W, W)` float32.

        W = patch_size + 2 margin, with the tokenizer's margin.
        """
        size, margin, symmetry = self.tokenizer.patch_size, self.tokenizer.margin, 0
        if self.offsets == "grid":
            index, patch = divmod(index, self.patches_per_field)
            row, column = divmod(patch, self.fields.grid[1] // size)
            x, y = row * size, column * size
            position, t = divmod(index, self.num_times)
        else:
            generator = np.random.default_rng((self.seed, index))
            limits = (len(self.trajectories), self.num_times, *self.fields.grid, 8)
            position, t, x, y, symmetry = generator.integers(limits)
        trajectory = self.trajectories[position]
        pair = np.stack(
            [
                self.fields.snapshot(trajectory, time)
                .take(range(x - margin, x + size + margin), axis=0, mode="wrap")
                .take(range(y - margin, y + size + margin), axis=1, mode="wrap")
                for time in (t, t + self.stride)
            ]
        )
        return transform_patch(pair, symmetry) if self.symmetries else pair


def transform_patch(vorticity: np.ndarray, symmetry: int) -> np.ndarray:
    """Applies one of the square's eight symmetries to vorticity `(..., P, P)`.

    `symmetry % 4` counts quarter turns, from the x axis to the y axis; 4 and above reflect x first. Vorticity is a
    pseudo-scalar: turned, it moves with the flow; reflected, it also changes sign.
    """
    if symmetry >= 4:
        vorticity = -np.flip(vorticity, axis=-2)
    return np.rot90(vorticity, symmetry % 4, axes=(-2, -1))


def to_datasets(pairs: PatchPairs, num_shards: int = 64) -> "datasets.IterableDataset":
    """The same items as a Hugging Face `datasets.IterableDataset`, in order, in shards that workers share out.

    With several workers or processes every item comes exactly once. Columns are those of `PatchPairs`, as tensors.
    """
    import datasets  # only those who ask for it should wait for it

    bounds = np.linspace(0, len(pairs), min(num_shards, len(pairs)) + 1).astype(int).tolist()
    shards = [range(start, stop) for start, stop in itertools.pairwise(bounds)]
    # `datasets` splits the arguments that are lists, and only those, between the workers.
    stream = datasets.IterableDataset.from_generator(_items, gen_kwargs={"pairs": pairs, "shards": shards})
    return stream.with_format("torch")


def _items(pairs: PatchPairs, shards: list[range]) -> Iterator[dict[str, np.ndarray]]:
    for shard in shards:
        for index in shard:
            yield {key: value.numpy() for key, value in pairs[index].items()}


def _checked(fields: FieldFile, trajectories: Sequence[int]) -> np.ndarray:
    chosen = np.asarray(trajectories, dtype=np.int64).reshape(-1)
    if not len(chosen):
        raise ValueError("no trajectories were given; give the indices of at least one")
    outside = chosen[(chosen < 0) | (chosen >= fields.num_trajectories)]
    if len(outside):
        raise ValueError(
            f"{fields.path}: trajectory {outside[0]} does not exist; it has {fields.num_trajectories}, from 0 on"
        )
    return chosen
