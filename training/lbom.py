"""Reads the L-BOM release of bicontinuous cells, and converts it to a labelled set.

What is published (doi 10.1038/s41467-025-68089-2; github.com/llwang91/L-BOM) speaks of 10,770 cells of 128³ voxels with
cubic symmetry, of which octants of 64³ are enough; readers of it open `count.json` and `img/<id>voxel`, raw files of
32³ bytes. Both hold if the bytes are 64³ packed bits. Nothing of this is taken for granted here: `inspect` looks at the
files and says what it found, and the conversion checks every one of them.

    python -m training.lbom --root DIR --out runs/janus/lbom --label [--resolution 32]
"""

import argparse
import csv
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leviathan.janus.cells import FREE, boundary_mask
from leviathan.janus.physics import Physics, canonical
from training.microstructure_data import Cells, label, write_set
from training.microstructures import KINDS, add_physics, summary, take_physics

NUM_SAMPLES = 16  # files that are looked into before the others
MAX_CELLS = 1_000_000  # more than that no release has, and all of them are listed
VOXEL_FILE = re.compile(r"(\d+)voxel(\.\w+)?")
SPELLINGS = {"vf": "volume_fraction", "volume fraction": "volume_fraction", "volumefraction": "volume_fraction"}
ID_COLUMNS = ("id", "index", "name", "cell")


@dataclass(frozen=True)
class LbomRelease:
    """What was found in a folder.

    Attributes:
        root: The folder.
        count: Cells that `count.json` speaks of, or the files there are if it is of no help.
        files: Identity of each cell and its file, in ascending order.
        missing: Identities that `count.json` leads to expect and that have no file.
        edge: Voxels along an edge of the octant.
        layout: "bytes", "bits, first is highest" or "bits, first is lowest".
        whole: Whether files hold whole cells of twice that edge.
        flipped: Whether files have the cell's boundary at their last indices rather than at 0.
        symmetry: "cubic", or "mirror" if the cells change under permutations of the axes.
        shared_boundary: Whether the cells looked into agree on their boundary.
        property_names: Of the labels.
        labels: By identity, in the order of the names.
        note: In words, all that a reader should know of this.
    """

    root: Path
    count: int
    files: tuple[tuple[int, Path], ...]
    missing: tuple[int, ...]
    edge: int
    layout: str
    whole: bool
    flipped: bool
    symmetry: str
    shared_boundary: bool
    property_names: tuple[str, ...]
    labels: dict[int, tuple[float, ...]]
    note: str


def inspect(root: str | Path) -> LbomRelease:
    """Looks at a folder: the sizes of all files, the values and symmetries of some.

    Raises:
        ValueError: If there are no cells, or their files have other sizes or values than cells have.
    """
    root = Path(root)
    files = _voxel_files(root)
    edge, notes = _edge_in_bytes(files), []
    samples = [files[i][1] for i in np.linspace(0, len(files) - 1, min(NUM_SAMPLES, len(files))).round().astype(int)]
    raw = np.stack([np.fromfile(path, np.uint8) for path in samples])
    values = np.unique(raw).tolist()
    if values in ([0, 1], [0, 255]):
        layout = "bytes"
    elif len(values) < 2:
        raise ValueError(
            f"{root}: the {len(samples)} files looked into hold nothing but {values}; expected two phases."
        )
    else:
        edge *= 2
        layout = _bit_layout(raw, edge, notes)
    cells = np.stack([_decode(each, edge, layout) for each in raw])
    whole = edge % 2 == 0 and all(map(_is_mirror, cells))
    if whole:
        edge //= 2
        cells = cells[:, :edge, :edge, :edge]
    flipped, shared = _boundary_side(cells, notes)
    symmetry = "cubic" if all(map(_is_cubic, cells)) else "mirror"
    count, missing = _expected(root, [identity for identity, _ in files], notes)
    names, labels = _labels(root, [identity for identity, _ in files], notes)
    found = f"{len(files)} files of {'whole cells' if whole else 'octants'}, {layout}: octants of {edge}^3, {symmetry}"
    return LbomRelease(
        root=root,
        count=count,
        files=tuple(files),
        missing=missing,
        edge=edge,
        layout=layout,
        whole=whole,
        flipped=flipped,
        symmetry=symmetry,
        shared_boundary=shared,
        property_names=names,
        labels=labels,
        note="; ".join([found, *notes]),
    )


def read_octant(release: LbomRelease, path: Path) -> np.ndarray:
    """The octant of a file, uint8 (edge, edge, edge), 1 = solid, index 0 on the boundary of the cell.

    Raises:
        ValueError: If the file is not as the others are.
    """
    return _octant(release, _read_cell(release, path))


def _read_cell(release: LbomRelease, path: Path) -> np.ndarray:
    """What a file holds: an octant, or a whole cell."""
    edge = release.edge * (2 if release.whole else 1)
    raw, size = np.fromfile(path, np.uint8), edge**3 // (1 if release.layout == "bytes" else 8)
    if raw.size != size or (release.layout == "bytes" and not np.isin(raw, (0, 1, 255)).all()):
        raise ValueError(f"{path} has {raw.size} bytes, of values up to {raw.max(initial=0)}; expected {release.note}.")
    return _decode(raw, edge, release.layout)


def _octant(release: LbomRelease, cell: np.ndarray) -> np.ndarray:
    if release.whole:
        cell = cell[: release.edge, : release.edge, : release.edge]
    return np.flip(cell) if release.flipped else cell


def coarsen(octant: np.ndarray, resolution: int) -> np.ndarray:
    """Majority of blocks of voxels, uint8 (resolution,) * 3; of a tie, solid.

    Voxels on the boundary of the cell go by the fine voxels on it alone, so that cells which share it still do.

    Raises:
        ValueError: If the edge is no multiple of the resolution.
    """
    edge = len(octant)
    if resolution < 2 or edge % resolution:
        raise ValueError(f"resolution = {resolution}; expected a divisor of the octant's {edge} voxels, 2 or more.")
    fine = boundary_mask(edge, 3, "mirror").numpy()
    share = _block_sums(octant, resolution) / (edge // resolution) ** 3
    # Where there is no voxel of the boundary in a block, the second ratio is not used.
    on_it = _block_sums(octant * fine, resolution) / np.maximum(_block_sums(fine, resolution), 1)
    share = np.where(boundary_mask(resolution, 3, "mirror").numpy(), on_it, share)
    return (share >= 0.5).astype(np.uint8)


def convert(
    release: LbomRelease,
    path: str | Path,
    *,
    resolution: int | None = None,
    property_names: Sequence[str] = (),
    physics: Physics | None = None,
    device: str = "cpu",
    **options: int | bool,
) -> None:
    """Writes the release as a labelled set; cells with another symmetry or boundary than the others are left out.

    Args:
        release: What `inspect` found.
        path: The folder of the set.
        resolution: Voxels along an edge of the octant, a divisor of the release's; that one if None.
        property_names: To be computed; the release's own labels are taken if there are none.
        physics: Materials and method of computed labels; its symmetry is the release's.
        device: Where to compute labels.
        options: Of :func:`training.microstructure_data.write_set`: shard_size, batch_size, processes, progress.

    Raises:
        ValueError: If an option is out of range, a file is not as the others are, or the folder holds another set.
    """
    resolution = release.edge if resolution is None else resolution
    names = tuple(map(canonical, property_names))
    physics = dataclasses.replace(physics or Physics(), symmetry=release.symmetry)
    boundary = coarse = None
    if release.shared_boundary:
        boundary = read_octant(release, release.files[0][1])
        coarse = torch.from_numpy(coarsen(boundary, resolution))
    free = torch.full((resolution,) * 3, FREE, dtype=torch.uint8)
    write_set(
        path,
        partial(
            _convert,
            release=release,
            first=boundary,
            resolution=resolution,
            names=names,
            physics=physics,
            device=device,
        ),
        len(release.files),
        settings={
            "kind": "lbom",
            "resolution": resolution,
            "note": release.note,
            "computed_labels": bool(names),
            "physics": dataclasses.asdict(physics) if names else None,
        },
        property_names=names or release.property_names,
        symmetry=release.symmetry,
        boundary=free if coarse is None else torch.where(boundary_mask(resolution, 3, "mirror"), coarse, free),
        seed=0,
        **options,
    )


def _convert(
    indices: Sequence[int],
    *,
    release: LbomRelease,
    first: np.ndarray | None,
    resolution: int,
    names: Sequence[str],
    physics: Physics,
    device: str,
) -> Cells:
    kept, identities, counts = [], [], Counter()
    edge = boundary_mask(release.edge, 3, "mirror").numpy()
    for index in indices:
        identity, path = release.files[index]
        cell = _read_cell(release, path)
        octant = _octant(release, cell)
        if (release.whole and not _is_mirror(cell)) or (release.symmetry == "cubic" and not _is_cubic(octant)):
            counts["not symmetric"] += 1
        elif first is not None and not np.array_equal(octant[edge], first[edge]):
            counts["another boundary"] += 1
        else:
            kept.append(coarsen(octant, resolution))
            identities.append(identity)
    own = np.array([release.labels[identity] for identity in identities] if release.labels else [], np.float32)
    cells = Cells(
        phase=np.array(kept, np.uint8).reshape(-1, *(resolution,) * 3),
        families=["lbom"] * len(kept),
        indices=identities,
        labels=own.reshape(len(kept), len(release.property_names)),
        counts=counts,
    )
    return label(cells, names, physics, device) if names else cells


def _voxel_files(root: Path) -> list[tuple[int, Path]]:
    folder = root / "img"
    if not folder.is_dir():
        raise ValueError(f"{root} has no folder img; expected count.json and img/<id>voxel, as L-BOM is released.")
    matches = ((VOXEL_FILE.fullmatch(path.name), path) for path in folder.iterdir())
    files = sorted((int(match[1]), path) for match, path in matches if match)
    if not files:
        raise ValueError(f"{folder} has no files named <id>voxel, such as 17voxel.")
    twice = [identity for identity, times in Counter(identity for identity, _ in files).items() if times > 1]
    if twice:
        raise ValueError(f"{folder} has several files of cell {twice[0]}; expected one.")
    return files


def _edge_in_bytes(files: Sequence[tuple[int, Path]]) -> int:
    sizes = Counter(path.stat().st_size for _, path in files)
    (size, _), *others = sizes.most_common()
    edge = round(size ** (1 / 3))
    if edge**3 != size or edge < 2 or others:
        found = ", ".join(f"{count} of {size} bytes" for size, count in sizes.most_common(5))
        raise ValueError(
            f"{files[0][1].parent} has files of other sizes than expected: {found}. Expected one size n^3, a byte or a "
            f"bit for each voxel; the nearest is {edge}^3 = {edge**3}. Are there headers, or broken downloads?"
        )
    return edge


def _bit_layout(raw: np.ndarray, edge: int, notes: list[str]) -> str:
    """The order of bits that makes most cells cubic; of both, the one with fewer changes of phase along the last axis.

    Raises:
        ValueError: If neither does: any bytes can be read as bits, also those of grey values.
    """
    merits = {}
    for layout in ("bits, first is highest", "bits, first is lowest"):
        cells = np.stack([_decode(each, edge, layout) for each in raw])
        merits[layout] = (-sum(map(_is_cubic, cells)), np.count_nonzero(cells[..., 1:] != cells[..., :-1]))
    if -2 * min(merits.values())[0] <= len(raw):
        raise ValueError(
            f"bytes of files hold {len(np.unique(raw))} values, {raw.min()} to {raw.max()}; expected 0 and 1, 0 and "
            "255, or packed bits that make cells of cubic symmetry. Threshold grey values first."
        )
    if len(set(merits.values())) == 1:
        notes.append("the order of bits makes no difference that shows: the highest is taken as first")
    return min(merits, key=merits.__getitem__)


def _decode(raw: np.ndarray, edge: int, layout: str) -> np.ndarray:
    if layout != "bytes":
        raw = np.unpackbits(raw, bitorder="big" if layout == "bits, first is highest" else "little")
    return (raw > 0).astype(np.uint8).reshape((edge,) * 3)


def _boundary_side(cells: np.ndarray, notes: list[str]) -> tuple[bool, bool]:
    """Whether the boundary of the cells (cells, m, m, m) is at the last indices, and whether they share it."""

    def same(index: int) -> bool:
        faces = [cells.take(index, axis) for axis in (1, 2, 3)]
        return all((face == face[:1]).all() for face in faces)

    if len(cells) < 2:
        notes.append("one cell does not tell which side is the boundary: taken to be index 0")
        return False, False
    first, last = same(0), same(-1)
    if first and last:
        notes.append("the cells agree on both sides: the boundary is taken to be index 0")
    elif last:
        notes.append("the boundary is at the last indices, and is flipped to index 0")
    elif not first:
        notes.append("the cells share no boundary")
    return last and not first, first or last


def _is_cubic(octant: np.ndarray) -> bool:
    return all(np.array_equal(octant, octant.transpose(order)) for order in permutations(range(3)))


def _is_mirror(cell: np.ndarray) -> bool:
    return all(np.array_equal(cell, np.flip(cell, axis)) for axis in range(3))


def _block_sums(values: np.ndarray, resolution: int) -> np.ndarray:
    block = len(values) // resolution
    return values.reshape(resolution, block, resolution, block, resolution, block).sum((1, 3, 5), dtype=np.int64)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again.") from error


def _expected(root: Path, identities: Sequence[int], notes: list[str]) -> tuple[int, tuple[int, ...]]:
    """How many cells `count.json` speaks of, and those of them that are missing."""
    path = root / "count.json"
    if not path.exists():
        notes.append("there is no count.json")
        return len(identities), ()
    content = _read_json(path)
    if isinstance(content, dict) and isinstance(content.get("count"), int):
        content = content["count"]
    if isinstance(content, int) and not isinstance(content, bool):
        if not 0 <= content <= MAX_CELLS:
            raise ValueError(f"{path} speaks of {content} cells; expected up to {MAX_CELLS}. Download it again.")
        start = 0 if identities[0] == 0 else 1
        expected = range(start, start + content)
    else:
        listed = [str(each) for each in content] if isinstance(content, list | dict) else []
        if not listed or not all(each.isdecimal() for each in listed):
            notes.append("count.json holds neither a number nor identities")
            return len(identities), ()
        expected = sorted(map(int, listed))
    missing = tuple(sorted(set(expected) - set(identities)))
    if missing:
        notes.append(f"{len(missing)} of {len(expected)} cells in count.json have no file, {missing[0]} for instance")
    return len(expected), missing


def _labels(
    root: Path, identities: Sequence[int], notes: list[str]
) -> tuple[tuple[str, ...], dict[int, tuple[float, ...]]]:
    """Labels of the first file in the folder that has any: (names, by identity); only columns without gaps."""
    paths = sorted(path for path in root.glob("*.*") if path.suffix in (".csv", ".json") and path.name != "count.json")
    for path in paths:
        rows = _rows(path)
        columns = {key: _property(key) for key in {key: None for row in rows.values() for key in row}}
        names = {}
        for key, name in columns.items():
            values = [_number(rows.get(identity, {}).get(key)) for identity in identities]
            if name and name not in names and np.isfinite(values).all():
                names[name] = values
        if names:
            notes.append(f"labels {', '.join(names)} of {path.name}, in its units")
            return tuple(names), dict(zip(identities, zip(*names.values(), strict=True), strict=True))
        notes.append(f"{path.name} has no labels for all cells that were recognised")
    return (), {}


def _rows(path: Path) -> dict[int, dict[str, Any]]:
    """Rows of a table by the identity in them, or, of a JSON mapping, by its keys."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            content = list(csv.DictReader(file))
    else:
        content = _read_json(path)
    if isinstance(content, dict):
        content = [{"id": key, **row} for key, row in content.items() if isinstance(row, dict)]
    rows = {}
    for row in content if isinstance(content, list) else []:
        row = {str(key).strip(): value for key, value in row.items()} if isinstance(row, dict) else {}
        identity = next((str(value) for key, value in row.items() if key.lower() in ID_COLUMNS), "")
        digits = re.match(r"\d+", identity)
        if digits:
            rows[int(digits[0])] = row
    return rows


def _property(column: str) -> str | None:
    try:
        return canonical(SPELLINGS.get(column.lower(), column))
    except ValueError:
        return None


def _number(value: object) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: says what the folder holds, converts it, and prints a summary."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    parser.add_argument("--root", type=Path, required=True, help="folder with count.json and img")
    parser.add_argument("--out", type=Path, required=True, help="folder of the set")
    parser.add_argument("--resolution", type=int, help="voxels along an edge of the octant; the release's if not given")
    parser.add_argument("--label", action="store_true", help="compute labels instead of taking those of the release")
    parser.add_argument("--property-names", nargs="+", default=KINDS["cells"].property_names, help="with --label")
    parser.add_argument("--processes", type=int, default=1, help="processes, with one thread each if several")
    parser.add_argument("--batch-size", type=int, default=32, help="cells labelled at once")
    parser.add_argument("--shard-size", type=int, default=256, help="cells of a file")
    parser.add_argument("--device", default="cpu", help="of the labels: cpu, cuda, cuda:1, ...")
    add_physics(parser)
    given = vars(parser.parse_args(arguments))
    root, out, physics = given.pop("root"), given.pop("out"), take_physics(given, "cubic")
    names = given.pop("property_names") if given.pop("label") else given.pop("property_names")[:0]
    try:
        release = inspect(root)
        print(release.note)
        convert(release, out, property_names=names, physics=physics, **given)
        print(summary(out))
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
