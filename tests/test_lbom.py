"""The reader of L-BOM's files against folders of every layout that they may have, and damaged ones."""

import csv
import json

import datasets
import numpy as np
import pytest
import torch

from leviathan.janus.cells import whole_cell
from training.lbom import coarsen, convert, inspect, main, read_octant
from training.microstructure_data import load_set, read_set_file, totals
from training.microstructures import octant, shared_boundary

EDGE = 8
CELLS = [octant(5, index, EDGE).phase.astype(np.uint8) for index in range(6)]
LAYOUTS = ("bytes", "0 or 255", "bits, first is highest", "bits, first is lowest")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def release(root, cells=CELLS, layout="bytes", count=None, start=0):
    (root / "img").mkdir(parents=True)
    for identity, cell in enumerate(cells, start):
        raw = np.ascontiguousarray(cell, np.uint8)
        if layout.startswith("bits"):
            raw = np.packbits(raw, bitorder="big" if "highest" in layout else "little")
        (root / "img" / f"{identity}voxel").write_bytes((raw * 255 if layout == "0 or 255" else raw).tobytes())
    (root / "count.json").write_text(json.dumps(len(cells) if count is None else count))
    return root


def whole(octants):
    return list(whole_cell(torch.from_numpy(np.stack(octants)), "cubic").numpy())


def octants_of(found):
    return np.stack([read_octant(found, path) for _, path in found.files])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_whole", [False, True])
def test_every_layout_gives_the_same_octants(tmp_path, layout, is_whole):
    found = inspect(release(tmp_path / "data", whole(CELLS) if is_whole else CELLS, layout))
    assert found.layout == (layout if layout.startswith("bits") else "bytes")
    assert (found.edge, found.whole, found.flipped, found.symmetry) == (EDGE, is_whole, False, "cubic")
    assert (found.count, found.missing, found.shared_boundary) == (6, (), True)
    np.testing.assert_array_equal(octants_of(found), CELLS)
    assert f"octants of {EDGE}^3, cubic" in found.note


def test_octants_whose_boundary_comes_last_are_flipped(tmp_path):
    found = inspect(release(tmp_path / "data", [np.flip(cell) for cell in CELLS], "bits, first is lowest"))
    assert found.flipped
    assert "flipped" in found.note
    np.testing.assert_array_equal(octants_of(found), CELLS)


def test_cells_without_a_shared_boundary_or_cubic_symmetry(tmp_path):
    rng = np.random.default_rng(0)
    found = inspect(release(tmp_path / "data", list(rng.integers(0, 2, (4, 6, 6, 6)))))
    assert (found.symmetry, found.shared_boundary) == ("mirror", False)
    assert "share no boundary" in found.note
    convert(found, tmp_path / "set", progress=False)
    data = load_set(tmp_path / "set")
    assert data.symmetry == "mirror"
    assert (data.boundary == 2).all()


@pytest.mark.parametrize(
    ("count", "start", "missing"),
    [(8, 0, (6, 7)), ({"count": 7}, 1, (7,)), ([0, 1, 2, 3, 4, 5, 11], 0, (11,)), ("many", 0, ())],
)
def test_missing_files_are_named(tmp_path, count, start, missing):
    found = inspect(release(tmp_path / "data", count=count, start=start))
    assert found.missing == missing
    assert found.count == 6 + len(missing)
    assert ("have no file" in found.note) == bool(missing)


@pytest.mark.parametrize("resolution", [EDGE, EDGE // 2])
def test_converted_cells_are_majorities_with_one_boundary(tmp_path, resolution):
    found = inspect(release(tmp_path / "data", layout="bits, first is highest", start=10))
    convert(found, tmp_path / "set", resolution=resolution, shard_size=4, batch_size=3, progress=False)
    data = load_set(tmp_path / "set")
    assert data.indices.tolist() == list(range(10, 16))
    assert data.property_names == ()
    assert data.labels.shape == (6, 0)
    np.testing.assert_array_equal(data.cells, [coarsen(cell, resolution) for cell in CELLS])
    fixed = data.boundary != 2
    assert fixed.sum() == resolution**3 - (resolution - 1) ** 3
    assert (data.cells[:, fixed] == data.boundary[fixed]).all()
    if resolution == EDGE:
        assert torch.equal(data.boundary, shared_boundary(EDGE))
        np.testing.assert_array_equal(data.cells, CELLS)


def test_blocks_count_all_voxels_inside_and_those_of_the_boundary_on_it():
    fine = np.zeros((4, 4, 4), np.uint8)
    fine[0] = 1  # only half of the voxels of its blocks, but all that are on this face
    fine[2:, 2:, 2:] = np.array([1, 1, 1, 1, 0, 0, 0, 0]).reshape(2, 2, 2)  # a tie
    coarse = coarsen(fine, 2)
    assert coarse[0, 1, 1] == 1
    assert coarse[1, 1, 1] == 1
    assert coarse[1, 0, 1] == 0
    fine[2, 2, 2] = 0
    assert coarsen(fine, 2)[1, 1, 1] == 0
    with pytest.raises(ValueError, match="expected a divisor of the octant's 4 voxels"):
        coarsen(fine, 3)


def test_labels_are_taken_from_a_table(tmp_path):
    root = release(tmp_path / "data")
    with (root / "properties.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "C11", "VF", "colour", "C44"])
        rows.writerows([f"{i}voxel", 10.0 + i, 0.1 * i, "red", "" if i == 3 else 1.0] for i in range(6))
    found = inspect(root)
    assert found.property_names == ("C1111", "volume_fraction")  # C44 has a gap
    assert "labels C1111, volume_fraction of properties.csv" in found.note
    convert(found, tmp_path / "set", progress=False)
    np.testing.assert_allclose(load_set(tmp_path / "set").labels[:, 0], [10.0 + i for i in range(6)])


def test_labels_are_taken_from_json(tmp_path):
    root = release(tmp_path / "data")
    (root / "labels.json").write_text(json.dumps({str(i): {"C1122": i, "permeability": 2 * i} for i in range(6)}))
    found = inspect(root)
    assert found.property_names == ("C1122", "permeability")
    assert found.labels[3] == (3.0, 6.0)
    (root / "labels.json").write_text(json.dumps([{"id": i, "taste": 1} for i in range(6)]))
    assert inspect(root).property_names == ()


def test_labels_are_computed(tmp_path):
    found = inspect(release(tmp_path / "data", CELLS[:3]))
    convert(found, tmp_path / "set", property_names=("volume_fraction",), resolution=4, progress=False)
    data = load_set(tmp_path / "set")
    torch.testing.assert_close(data.labels[:, 0], data.cells.float().mean((1, 2, 3)))


def test_cells_that_differ_from_the_others_are_left_out_and_counted(tmp_path):
    other, crooked = 1 - CELLS[0], CELLS[0].copy()
    crooked[1, 2, 3] ^= 1
    root = release(tmp_path / "data", CELLS * 6)
    for identity, cell in ((1, other), (3, crooked)):  # files that are not looked into first
        (root / "img" / f"{identity}voxel").write_bytes(cell.tobytes())
    found = inspect(root)
    assert (found.symmetry, found.shared_boundary) == ("cubic", True)
    convert(found, tmp_path / "set", progress=False)
    assert totals(read_set_file(tmp_path / "set")) == {"cells": 34, "another boundary": 1, "not symmetric": 1}
    assert not {1, 3} & set(load_set(tmp_path / "set").indices.tolist())


def test_whole_cells_that_are_not_mirror_symmetric_are_left_out(tmp_path):
    root = release(tmp_path / "data", whole(CELLS * 6))
    crooked = whole(CELLS)[1].copy()
    crooked[EDGE + 2, EDGE + 2, EDGE + 2] ^= 1  # not in the octant that is kept
    (root / "img" / "1voxel").write_bytes(np.ascontiguousarray(crooked).tobytes())
    found = inspect(root)
    assert found.whole
    convert(found, tmp_path / "set", progress=False)
    assert totals(read_set_file(tmp_path / "set")) == {"cells": 35, "not symmetric": 1}


@pytest.mark.parametrize(
    "values", [lambda cell: cell + 1, lambda cell: 2 * cell, lambda cell: 200 * cell + np.arange(EDGE)]
)
def test_bytes_of_other_values_are_not_taken_for_bits(tmp_path, values):
    root = release(tmp_path / "data")
    for identity, cell in enumerate(CELLS):
        (root / "img" / f"{identity}voxel").write_bytes(values(cell).astype(np.uint8).tobytes())
    with pytest.raises(ValueError, match=r"expected 0 and 1, 0 and 255, or packed bits"):
        inspect(root)


def test_damaged_releases_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no folder img"):
        inspect(tmp_path)
    (tmp_path / "img").mkdir()
    with pytest.raises(ValueError, match="no files named <id>voxel"):
        inspect(tmp_path)
    root = release(tmp_path / "data")
    file = root / "img" / "3voxel"
    whole_file = file.read_bytes()
    file.write_bytes(whole_file[:-1])
    with pytest.raises(ValueError, match=r"5 of 512 bytes, 1 of 511 bytes.*8\^3 = 512"):
        inspect(root)
    file.write_bytes(whole_file)
    found = inspect(root)
    file.write_bytes(whole_file[:-1] + b"\x07")
    with pytest.raises(ValueError, match=r"3voxel has 512 bytes, of values up to 7"):
        convert(found, tmp_path / "set", progress=False)
    (root / "count.json").write_text("{")
    file.write_bytes(whole_file)
    with pytest.raises(ValueError, match=r"count\.json is not JSON"):
        inspect(root)
    with pytest.raises(ValueError, match="nothing but"):
        inspect(release(tmp_path / "empty", [np.zeros((4, 4, 4))] * 2))
    (root / "img" / "03voxel").write_bytes(whole_file)
    with pytest.raises(ValueError, match="several files of cell 3"):
        inspect(root)


def test_the_command_says_what_it_found(tmp_path, capsys):
    root = release(tmp_path / "data", CELLS[:3], "bits, first is lowest")
    flags = ["--root", str(root), "--out", str(tmp_path / "set"), "--resolution", "4"]
    main([*flags, "--label", "--property-names", "C1111"])
    printed = capsys.readouterr().out
    assert "3 files of octants, bits, first is lowest: octants of 8^3, cubic" in printed
    assert "3 cells of (4, 4, 4) voxels" in printed
    assert "C1111: " in printed
    with pytest.raises(SystemExit):
        main(flags)  # without labels, into the same folder
    assert "error: " in capsys.readouterr().err
