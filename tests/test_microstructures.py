"""The generators against their invariants and an independent flood fill; sets against interruption and misuse."""

import dataclasses
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import datasets
import numpy as np
import pytest
import torch

from leviathan.janus.cells import bicontinuous, is_connected, percolates, voxel_orbits, whole_cell
from leviathan.janus.physics import Physics, properties
from training import microstructure_data, microstructures
from training.microstructure_data import load_set, read_set_file, split_of, totals, write_set
from training.microstructures import (
    PLANE_FAMILIES,
    SHARED_SOLID,
    SURFACES,
    centres,
    cosine_field,
    defect,
    draw_cells,
    main,
    make_set,
    octant,
    plane_cell,
    shared_boundary,
    volume_fractions,
)

RESOLUTION, SEED, COUNT = 8, 3, 24


@pytest.fixture(scope="module")
def octants():
    return torch.from_numpy(np.stack([octant(SEED, index, RESOLUTION).phase for index in range(COUNT)]))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def small_set(path, **changes):
    options = {"num_cells": 7, "resolution": 6, "seed": 1, "shard_size": 3, "batch_size": 2, "progress": False}
    make_set(path, **{"property_names": (), **options, **changes})
    return load_set(path)


def assert_same(a, b):
    torch.testing.assert_close(a.cells, b.cells, rtol=0, atol=0)
    torch.testing.assert_close(a.labels, b.labels, rtol=0, atol=0)
    assert (a.families, a.indices.tolist(), a.settings) == (b.families, b.indices.tolist(), b.settings)


@pytest.mark.parametrize("name", SURFACES)
def test_surfaces_are_invariant_under_the_symmetries_of_a_cubic_cell(name):
    values = cosine_field(SURFACES[name], 6)
    for order in permutations(range(3)):
        np.testing.assert_allclose(values.transpose(order), values, atol=1e-12)


def test_a_surface_is_its_nodal_formula():
    x, y, z = (np.pi * each for each in np.ix_(*[centres(6)] * 3))
    expected = 2 * (np.cos(x) * np.cos(y) + np.cos(y) * np.cos(z) + np.cos(z) * np.cos(x))
    expected = expected - (np.cos(2 * x) + np.cos(2 * y) + np.cos(2 * z))
    np.testing.assert_allclose(cosine_field(SURFACES["i_wp"], 6), expected, atol=1e-12)


def test_octants_have_cubic_symmetry_and_one_boundary(octants):
    boundary = shared_boundary(RESOLUTION)
    for order in permutations((1, 2, 3)):
        assert torch.equal(octants.permute(0, *order), octants)
    fixed = boundary != 2
    assert fixed.sum() == RESOLUTION**3 - (RESOLUTION - 1) ** 3  # all voxels with an index 0
    assert torch.equal(octants[:, fixed], boundary[fixed].bool().expand(COUNT, -1))


@pytest.mark.parametrize("resolution", [4, 5, 8, 12, 16, 32])
def test_both_phases_cross_each_face_of_the_shared_boundary(resolution):
    face = shared_boundary(resolution)[0]
    assert 0.3 < face.float().mean() < SHARED_SOLID + 0.01
    assert torch.equal(face, face.T)
    assert face[-1, -1] == 1
    assert (face[0] == 0).any()
    assert is_connected(~whole_cell(face[None].bool(), "mirror"))


def test_mirrored_octants_continue_across_the_mid_planes(octants):
    cells = whole_cell(octants, "cubic")
    for axis in (1, 2, 3):
        assert torch.equal(cells, cells.flip(axis))
        assert torch.equal(cells.select(axis, RESOLUTION - 1), cells.select(axis, RESOLUTION))
        assert torch.equal(cells.select(axis, 0), cells.select(axis, -1))  # periodic neighbours


def test_octants_are_bicontinuous_by_an_independent_flood_fill(octants):
    cells = whole_cell(octants, "cubic")
    assert is_connected(cells).all()
    assert percolates(~cells).all()
    assert bicontinuous(octants, "cubic").all()


def test_defects_are_those_of_the_flood_fill():
    rng = np.random.default_rng(0)
    reasons = set()
    for index in range(60):
        values = rng.random((6, 6, 6))
        values = sum(values.transpose(order) for order in permutations(range(3)))
        phase = values > np.quantile(values, rng.uniform(0.2, 0.8))
        if index % 3:
            phase[0] = phase[:, 0] = phase[:, :, 0] = False
        reason, cells = defect(phase), whole_cell(torch.from_numpy(phase)[None], "cubic")
        reasons.add(reason)
        if reason is None:
            assert is_connected(cells).all()
            assert percolates(~cells).all()
        elif reason == "the solid does not percolate":
            assert not percolates(cells)
        elif reason == "solid floats":
            assert percolates(cells).all()
            assert not is_connected(cells)
    assert {"the solid does not percolate", "solid floats"} <= reasons


def test_void_that_only_follows_the_edges_of_the_cell_does_not_count():
    phase = np.ones((6, 6, 6), bool)
    phase[0, 0], phase[0, :, 0], phase[:, 0, 0] = False, False, False
    assert bicontinuous(torch.from_numpy(phase)[None], "cubic").all()
    assert "edges" in defect(phase)
    phase[2, 2], phase[2, :, 2], phase[:, 2, 2] = False, False, False
    assert defect(phase) is None


def test_volume_fractions_are_as_drawn_within_an_orbit(octants):
    half = voxel_orbits(RESOLUTION, 3, "cubic")[1].max() / 2
    for index, phase in enumerate(octants):
        wanted = np.random.default_rng([SEED, index]).uniform(*volume_fractions(shared_boundary(RESOLUTION)))
        assert abs(phase.sum() - wanted * phase.numel()) <= half + 0.5


def test_a_cell_depends_on_seed_and_index_alone(octants):
    for index in (17, 2):
        again = octant(SEED, index, RESOLUTION)
        assert np.array_equal(again.phase, octants[index])
    assert not np.array_equal(octant(SEED + 1, 2, RESOLUTION).phase, octants[2])
    assert len(octants.flatten(1).unique(dim=0)) > COUNT - 3  # hardly any twice


def test_hopeless_settings_are_refused(monkeypatch):
    monkeypatch.setattr(microstructures, "defect", lambda phase: "solid floats")
    with pytest.raises(ValueError, match=r"200 fields of 4 voxels.*'solid floats': 200.*higher resolution"):
        octant(0, 0, 4)
    assert volume_fractions(shared_boundary(16)) == microstructures.VOLUME_FRACTIONS
    with pytest.raises(ValueError, match="at least 4 voxels"):
        shared_boundary(3)


def test_plane_cells_hold_all_families_and_the_volume_fraction():
    cells = [plane_cell(0, index, 16) for index in range(30)]
    assert {cell.family for cell in cells} == set(PLANE_FAMILIES)
    for index, cell in enumerate(cells):
        wanted = np.random.default_rng([0, index]).uniform(*microstructures.PLANE_VOLUME_FRACTIONS)
        assert cell.phase.sum() == round(wanted * 256)


def test_plane_inclusions_are_periodic():
    # Shifted by half a cell, what was the seam is inside: no more changes of phase across it than elsewhere.
    changes = np.zeros(16)
    for index in range(60):
        phase = plane_cell(0, index, 16).phase
        changes += (phase != np.roll(phase, 1, axis=0)).sum(1)
    assert changes[0] < 1.5 * changes[1:].mean()


def test_a_set_holds_what_was_drawn_and_its_labels(tmp_path):
    data = small_set(tmp_path / "set", property_names=("C11", "volume_fraction"))
    assert data.property_names == ("C1111", "volume_fraction")
    assert data.symmetry == "cubic"
    for index in data.indices.tolist():
        assert np.array_equal(data.cells[index].bool(), octant(1, index, 6).phase)
    expected = properties(data.cells.float(), ["C1111"], Physics()).values["C1111"]
    torch.testing.assert_close(data.labels[:, 0], expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(data.labels[:, 1], data.cells.float().mean((1, 2, 3)))
    assert torch.equal(data.boundary, shared_boundary(6))
    assert data.boundary.dtype == torch.uint8
    rejected = sum((octant(1, index, 6).rejected for index in range(7)), totals({"shards": []}))
    assert totals(read_set_file(tmp_path / "set")) == {"cells": 7, **rejected}


def test_an_interrupted_set_becomes_the_unbroken_one(tmp_path, monkeypatch):
    names = ("C1111",)
    whole = small_set(tmp_path / "whole", property_names=names)

    def interrupted(indices, **options):
        if 4 in indices:
            raise KeyboardInterrupt
        return draw_cells(indices, **options)

    with monkeypatch.context() as patch:
        patch.setattr(microstructures, "draw_cells", interrupted)
        with pytest.raises(KeyboardInterrupt):
            small_set(tmp_path / "broken", property_names=names)
    with pytest.raises(ValueError, match="1 of 3 files; make it whole with the same command"):
        load_set(tmp_path / "broken")
    (tmp_path / "broken" / "cells-00001.parquet").write_bytes(b"half written")  # not listed, so that it does not count
    first = (tmp_path / "broken" / "cells-00000.parquet").stat().st_mtime_ns
    assert_same(small_set(tmp_path / "broken", property_names=names), whole)
    assert (tmp_path / "broken" / "cells-00000.parquet").stat().st_mtime_ns == first
    monkeypatch.setattr(microstructures, "draw_cells", interrupted)  # what is whole is not made again
    assert_same(small_set(tmp_path / "broken", property_names=names), whole)


def test_processes_change_nothing(tmp_path, monkeypatch):
    # Threads in place of processes, which take long to start; what processes are given must survive the way there.
    class Pool(ThreadPoolExecutor):
        def __init__(self, processes, context, initializer, initargs):
            assert context.get_start_method() == "spawn"
            assert (initializer, initargs) == (torch.set_num_threads, (1,))
            super().__init__(processes)

        def map(self, function, batches):
            return super().map(pickle.loads(pickle.dumps(function)), pickle.loads(pickle.dumps(batches)))

    whole = small_set(tmp_path / "one")
    monkeypatch.setattr(microstructure_data, "ProcessPoolExecutor", Pool)
    assert_same(small_set(tmp_path / "two", processes=2), whole)


def test_other_settings_are_refused(tmp_path):
    small_set(tmp_path)
    for changes in ({"seed": 2}, {"num_cells": 8}, {"physics": Physics(contrast=10.0)}, {"property_names": ["C11"]}):
        with pytest.raises(ValueError, match=r"was made with .*delete it or choose another folder"):
            small_set(tmp_path, **changes)


def test_what_does_not_converge_is_dropped_and_counted(tmp_path, monkeypatch):
    def some(phase, names, physics):
        found = properties(phase, names, physics)
        return dataclasses.replace(found, converged=phase.flatten(1).mean(-1) < 0.5)

    monkeypatch.setattr(microstructure_data, "properties", some)
    data = small_set(tmp_path, property_names=("volume_fraction",))
    kept = [index for index in range(7) if octant(1, index, 6).phase.mean() < 0.5]
    assert 0 < len(kept) < 7
    assert data.indices.tolist() == kept
    assert totals(read_set_file(tmp_path))["not converged"] == 7 - len(kept)


def test_labels_that_single_precision_misses_are_solved_in_double(tmp_path, monkeypatch):
    def double_only(phase, names, physics):
        found = properties(phase, names, physics)
        return found if phase.dtype == torch.float64 else dataclasses.replace(found, converged=~found.converged)

    monkeypatch.setattr(microstructure_data, "properties", double_only)
    data = small_set(tmp_path, property_names=("volume_fraction",))
    torch.testing.assert_close(data.labels[:, 0], data.cells.float().mean((1, 2, 3)))
    assert len(data) == 7


def test_splits_are_disjoint_and_by_index(tmp_path):
    data = small_set(tmp_path, num_cells=20, shard_size=10)
    parts = {name: data.split(name) for name in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [16, 2, 2]
    assert sorted(index for part in parts.values() for index in part.indices.tolist()) == list(range(20))
    assert parts["test"].indices.tolist() == [9, 19]
    assert len(parts["test"].families) == 2
    assert torch.equal(parts["validation"].cells, data.cells[[8, 18]])
    with pytest.raises(ValueError, match="expected one of train, validation, test"):
        data.split("dev")


def test_a_set_is_read_by_datasets(tmp_path):
    data = small_set(tmp_path, property_names=("volume_fraction",))
    stored = microstructure_data.microstructures(tmp_path)
    assert stored.column_names == ["cell", "volume_fraction", "family", "seed", "index", "split"]
    streamed = list(microstructure_data.microstructures(tmp_path, streaming=True))
    for index, row in enumerate(streamed):
        assert row == stored[index]
        assert (row["seed"], row["index"], row["split"]) == (1, index, split_of(index))
        assert np.array_equal(np.asarray(row["cell"]), data.cells[index])


def test_conductivity_sets_are_whole_cells_in_two_dimensions(tmp_path):
    data = small_set(tmp_path, kind="conductivity", resolution=8, property_names=None)
    assert data.cells.shape == (7, 8, 8)
    assert data.symmetry == "none"
    assert (data.boundary == 2).all()
    assert data.property_names == ("K11", "K22", "K12", "volume_fraction")
    low, high, vf = data.labels[:, 0].min(), data.labels[:, 0].max(), data.labels[:, 3]
    assert low > 1e-3
    assert high < 1
    assert (data.labels[:, 0] <= vf + (1 - vf) * 1e-3 + 1e-4).all()  # Voigt's bound
    np.testing.assert_allclose(vf, data.cells.float().mean((1, 2)), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "foam"}, "expected one of cells, conductivity"),
        ({"seed": -1}, "seed = -1"),
        ({"num_cells": 0}, "num_cells = 0; expected at least 1"),
        ({"processes": 0}, "processes = 0"),
        ({"batch_size": 4}, "batch_size = 4; expected between 1 and 3"),
        ({"resolution": 3}, "at least 4"),
        ({"kind": "conductivity", "resolution": 2}, "at least 4"),
        ({"property_names": ("C7777",)}, "no property 'C7777'"),
        ({"property_names": ("C12x",)}, "no property"),
        ({"property_names": ("C11", "C1111")}, "C1111, C1111; expected none of them twice"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small_set(tmp_path / "set", **changes)
    assert not (tmp_path / "set").exists()


def test_what_is_no_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no set\.json"):
        load_set(tmp_path)
    small_set(tmp_path / "set")
    (tmp_path / "set" / "cells-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"lacks cells-00001\.parquet"):
        load_set(tmp_path / "set")
    (tmp_path / "set" / "set.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_set(tmp_path / "set")


def test_the_command_prints_what_it_made(tmp_path, capsys):
    flags = ["--out", str(tmp_path / "set"), "--num-cells", "4", "--resolution", "6", "--property-names", "C44"]
    main([*flags, "--contrast", "100"])
    printed = capsys.readouterr().out
    assert printed.startswith("4 cells of (6, 6, 6) voxels")
    assert "C2323: " in printed
    assert json.loads((tmp_path / "set" / "set.json").read_text())["settings"]["physics"]["contrast"] == 100.0
    with pytest.raises(SystemExit):
        main([*flags, "--seed", "1"])
    assert "error: " in capsys.readouterr().err


def test_files_without_cells_are_passed_over(tmp_path):
    def make(indices):
        kept = [index for index in indices if index >= first]
        phase, labels = np.zeros((len(kept), 4, 4), np.uint8), np.array(kept, np.float32).reshape(-1, 1)
        return microstructure_data.Cells(phase, ["flat"] * len(kept), kept, labels)

    options = {"settings": {}, "property_names": ["C1111"], "symmetry": "none", "seed": 0, "progress": False}
    options |= {"boundary": torch.full((4, 4), 2), "shard_size": 2, "batch_size": 2}
    first = 3
    write_set(tmp_path / "some", make, 6, **options)
    assert load_set(tmp_path / "some").indices.tolist() == [3, 4, 5]
    first = 6
    write_set(tmp_path / "none", make, 6, **options)
    with pytest.raises(ValueError, match="has no cells: all were rejected"):
        load_set(tmp_path / "none")


def test_a_writer_keeps_the_order_of_its_batches(tmp_path):
    def make(indices):
        phase = np.stack([np.full((4, 4), index % 2, np.uint8) for index in indices])
        labels = np.array([[index] for index in indices], np.float32)
        return microstructure_data.Cells(phase, ["flat"] * len(indices), list(indices), labels)

    options = {"settings": {}, "property_names": ["C1111"], "symmetry": "none", "seed": 0, "progress": False}
    write_set(tmp_path, make, 10, boundary=torch.full((4, 4), 2), shard_size=4, batch_size=3, **options)
    assert load_set(tmp_path).labels[:, 0].tolist() == list(range(10))
