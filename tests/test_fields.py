"""Reading flow files: right vorticity, no more read than is asked for, training pairs that are what they say."""

import os
import pickle
import tracemalloc
from collections import Counter
from unittest.mock import Mock

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from leviathan import FieldTokenizer
from training.fields import (
    FieldFile,
    PatchPairs,
    sample_snapshots,
    split_trajectories,
    to_datasets,
    transform_patch,
    vorticity_from_velocity,
)
from training.hdf5_files import attributes, text
from training.turbulence import FlowSettings, initial_vorticity, simulate, write_fields

NUM_TRAJECTORIES, NUM_SNAPSHOTS, GRID = 4, 5, (16, 24)


def write_pdebench(path, *, shape=(NUM_TRAJECTORIES, NUM_SNAPSHOTS, *GRID), num_times=None, spacing=0.125, change=None):
    """A file as PDEBench's own program makes it: nothing of our writer, no attribute of ours."""
    num_times = shape[1] + 1 if num_times is None else num_times
    generator = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for key in ("Vx", "Vy", "density", "pressure"):
            file[key] = generator.standard_normal(shape).astype(np.float32)
        file["t-coordinate"] = (0.05 * np.arange(num_times)).astype(np.float32)
        file["x-coordinate"] = (spacing * (np.arange(shape[2]) + 0.5)).astype(np.float32)
        file["y-coordinate"] = (spacing * (np.arange(shape[3]) + 0.5)).astype(np.float32)
        file.attrs.update(eta=1e-8, zeta=1e-8, M=0.1)
        if change:
            change(file)
    return path


@pytest.fixture
def path(tmp_path):
    return write_pdebench(tmp_path / "pdebench.hdf5")


@pytest.fixture
def fields(path):
    with FieldFile(path) as fields:
        yield fields


@pytest.fixture
def tokenizer(fields):
    return FieldTokenizer(patch_size=8, num_bits=8, base=16).fit(sample_snapshots(fields, range(NUM_TRAJECTORIES), 100))


def waves(num_x, num_y, dx, dy):
    """A velocity field that is not square, has a divergence and a mean, and its vorticity by hand."""
    x, y = np.meshgrid(dx * (np.arange(num_x) + 0.5), dy * (np.arange(num_y) + 0.5), indexing="ij")
    a, b = 2 * np.pi * 3 / (num_x * dx), 2 * np.pi * 2 / (num_y * dy)
    u = 1 + np.sin(b * y) * np.cos(a * x)
    v = 2 + np.sin(a * x + b * y)
    return u, v, a * np.cos(a * x + b * y) - b * np.cos(b * y) * np.cos(a * x)


@pytest.mark.parametrize(("num_x", "num_y"), [(16, 24), (15, 9)])
def test_vorticity_of_a_known_flow(num_x, num_y):
    u, v, expected = waves(num_x, num_y, 0.1, 0.3)
    vorticity = vorticity_from_velocity(u, v, (0.1, 0.3))
    assert vorticity.dtype == np.float32
    np.testing.assert_allclose(vorticity, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_vorticity_ignores_the_nyquist_wave():
    checkers = np.broadcast_to((-1.0) ** np.arange(16), (16, 16))
    assert np.abs(vorticity_from_velocity(checkers, checkers.T, (1, 1))).max() < 1e-12


def test_file_of_our_solver_comes_back(tmp_path):
    settings = FlowSettings(num_trajectories=3, num_grid=32, num_snapshots=4, dt_save=0.02, viscosity=1e-3)
    path = write_fields(tmp_path / "flow.hdf5", settings, progress=False)
    flow = torch.stack(list(simulate(settings.solver(), initial_vorticity(32, range(3)), 0.02, 4)), 1).numpy()
    with FieldFile(path) as fields:
        assert (fields.num_trajectories, fields.num_snapshots, fields.grid) == (3, 4, (32, 32))
        assert (fields.synthetic, fields.dt_save, fields.attributes["viscosity"]) == (True, 0.02, 1e-3)
        assert fields.spacing == pytest.approx((1 / 32, 1 / 32))
        read = np.stack([fields.vorticity(trajectory) for trajectory in range(3)])
    np.testing.assert_allclose(read, flow, rtol=0, atol=2e-6 * np.abs(flow).max())


def test_pdebench_file(fields):
    assert (fields.num_trajectories, fields.num_snapshots, fields.grid) == (NUM_TRAJECTORIES, NUM_SNAPSHOTS, GRID)
    assert (fields.dt_save, *fields.spacing) == pytest.approx((0.05, 0.125, 0.125))
    assert not fields.synthetic
    assert fields.attributes == {"eta": 1e-8, "zeta": 1e-8, "M": 0.1}
    with h5py.File(fields.path) as file:
        u, v = file["Vx"][2], file["Vy"][2]
    np.testing.assert_array_equal(fields.vorticity(2), vorticity_from_velocity(u, v, fields.spacing))


@pytest.mark.parametrize("num_times", [21, 22])
def test_both_counts_of_times(tmp_path, num_times):
    fields = FieldFile(write_pdebench(tmp_path / "file.hdf5", shape=(1, 21, 8, 8), num_times=num_times))
    assert (fields.num_snapshots, fields.dt_save) == (21, pytest.approx(0.05))


def test_snapshots_are_selected(fields):
    whole = fields.vorticity(1)
    assert (whole.shape, whole.dtype) == ((NUM_SNAPSHOTS, *GRID), np.float32)
    np.testing.assert_array_equal(fields.vorticity(1, slice(1, None, 2)), whole[1::2])
    np.testing.assert_array_equal(fields.vorticity(1, [3, 0]), whole[[3, 0]])
    np.testing.assert_array_equal(fields.snapshot(1, 4), whole[4])
    assert fields.vorticity(1, []).shape == (0, *GRID)


def test_reads_only_what_is_asked_for(path, monkeypatch):
    reads, read = [], h5py.Dataset.__getitem__
    spy = lambda dataset, key: reads.append((dataset.name, key)) or read(dataset, key)  # noqa: E731
    monkeypatch.setattr(h5py.Dataset, "__getitem__", spy)
    with FieldFile(path) as fields:
        assert {name for name, _ in reads} == {"/t-coordinate", "/x-coordinate", "/y-coordinate"}
        reads.clear()
        fields.vorticity(2, [1, 3])
        assert reads == [("/Vx", (2, 1)), ("/Vy", (2, 1)), ("/Vx", (2, 3)), ("/Vy", (2, 3))]


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = write_pdebench(tmp_path / "file.hdf5", shape=(40, 4, 64, 64))  # 2.6 MB for each of Vx and Vy
    tracemalloc.start()
    with FieldFile(path, cache_bytes=100_000) as fields:
        for vorticity in sample_snapshots(fields, range(40), 160):
            assert vorticity.shape == (64, 64)
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_cache_keeps_the_latest_within_its_bytes(path, monkeypatch):
    one = GRID[0] * GRID[1] * 4
    fields = FieldFile(path, cache_bytes=2 * one)
    made = []
    original = fields.velocity
    monkeypatch.setattr(fields, "velocity", lambda *key: made.append(key) or original(*key))
    for snapshot in (0, 1, 0, 2, 0, 1):  # 2 drives out 1, which was used least lately
        fields.snapshot(0, snapshot)
    assert made == [(0, 0), (0, 1), (0, 2), (0, 1)]
    assert [fields.snapshot(0, 1).flags.writeable, fields.vorticity(0, [1]).flags.writeable] == [False, True]
    small = FieldFile(path, cache_bytes=one - 1)
    assert small.snapshot(0, 0) is not small.snapshot(0, 0)


def test_each_process_opens_the_file_for_itself(fields, monkeypatch):
    expected = fields.vorticity(0)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fields)).vorticity(0), expected)
    fields.close()
    np.testing.assert_array_equal(fields.vorticity(0), expected)
    mine = fields._opened()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert fields._opened() is not mine
    assert mine  # a forked child must not close its parent's


@pytest.mark.parametrize("count", [3, 7, 48, 1000])
def test_split(count):
    split = split_trajectories(count, seed=5)
    parts = [split.train, split.validation, split.test]
    assert sorted(np.concatenate(parts)) == list(range(count))
    assert min(map(len, parts)) >= 1
    assert len(split.validation) == len(split.test) == max(1, round(count / 10))
    again = split_trajectories(count, seed=5)
    assert all(np.array_equal(a, b) for a, b in zip(parts, (again.train, again.validation, again.test), strict=True))


def test_samples_are_distinct_snapshots_of_the_given_trajectories(fields):
    allowed = {fields.snapshot(i, t).tobytes() for i in (1, 3) for t in range(NUM_SNAPSHOTS)}
    sampled = [vorticity.tobytes() for vorticity in sample_snapshots(fields, [1, 3], 6)]
    assert len(set(sampled)) == len(sampled) == 6
    assert set(sampled) <= allowed
    assert {vorticity.tobytes() for vorticity in sample_snapshots(fields, [1, 3], 1000)} == allowed
    tokenizer = FieldTokenizer(patch_size=8).fit(sample_snapshots(fields, [1], 2, mirrored=True))
    assert tokenizer.low == -tokenizer.high


def test_grid_has_each_patch_once_with_its_own_future(fields, tokenizer):
    pairs = PatchPairs(fields, [2, 0], tokenizer, stride=2)
    rows, columns = GRID[0] // 8, GRID[1] // 8
    assert len(pairs) == 2 * (NUM_SNAPSHOTS - 2) * rows * columns
    items = iter(pairs)  # ends at the last item
    for trajectory in (2, 0):
        ids = tokenizer(fields.vorticity(trajectory))["input_ids"].reshape(NUM_SNAPSHOTS, rows * columns, 64)
        for t in range(NUM_SNAPSHOTS - 2):
            for patch in range(rows * columns):
                item = next(items)
                assert all((value.shape, value.dtype) == ((128,), torch.int64) for value in item.values())
                np.testing.assert_array_equal(item["input_ids"][:64], ids[t, patch])
                np.testing.assert_array_equal(item["input_ids"][64:], ids[t + 2, patch])
                np.testing.assert_array_equal(item["labels"], [-100] * 64 + ids[t + 2, patch].tolist())
    with pytest.raises(StopIteration):
        next(items)
    batch = pairs.collate([pairs[0], pairs[1]])
    assert (batch["input_ids"].shape, batch["labels"].shape, batch["prefix_length"]) == ((2, 128), (2, 128), 64)


def test_random_patches_wrap_around(fields, tokenizer):
    pairs = PatchPairs(fields, [0, 3], tokenizer, offsets="random", num_items=60, seed=3)
    windows = {}
    for trajectory in (0, 3):
        whole = fields.vorticity(trajectory)
        for x in range(GRID[0]):
            for y in range(GRID[1]):
                rolled = np.roll(whole, (-x, -y), (1, 2))[:, :8, :8]
                for t in range(NUM_SNAPSHOTS - 1):
                    windows[rolled[t : t + 2].tobytes()] = (trajectory, t, x, y)
    drawn = [windows[pairs.patches(index).tobytes()] for index in range(60)]  # a KeyError is a patch that is not there
    for values, count in zip(zip(*drawn, strict=True), (2, NUM_SNAPSHOTS - 1, *GRID), strict=True):
        assert len(set(values)) > count / 2
    assert any(x > GRID[0] - 8 and y > GRID[1] - 8 for *_, x, y in drawn)


def test_random_items_depend_on_seed_and_index_alone(fields, tokenizer):
    make = {"offsets": "random", "symmetries": True}
    pairs = PatchPairs(fields, range(4), tokenizer, num_items=20, seed=1, **make)
    expected = [pairs[index]["input_ids"] for index in range(20)]
    fresh = PatchPairs(pickle.loads(pickle.dumps(fields)), range(4), tokenizer, num_items=999, seed=1, **make)
    assert all(torch.equal(fresh[index]["input_ids"], expected[index]) for index in reversed(range(20)))
    other = PatchPairs(fields, range(4), tokenizer, num_items=20, seed=2, **make)
    assert not any(torch.equal(other[index]["input_ids"], expected[index]) for index in range(20))


def moved(u, v, matrix):
    """The flow carried along by an orthogonal matrix of the square: u'(Mx) = M u(x), on cell-centred points."""
    size = len(u)
    points = np.stack(np.meshgrid(*[np.arange(size) * 2 - (size - 1)] * 2, indexing="ij"), -1)
    i, j = np.moveaxis((points @ matrix.T + size - 1) // 2, -1, 0)
    result = np.empty((2, size, size))
    result[:, i, j] = np.einsum("ab,bxy->axy", matrix, [u, v])
    return result


@pytest.mark.parametrize("symmetry", range(8))
def test_symmetries_move_the_flow(symmetry):
    u, v = np.random.default_rng(0).standard_normal((2, 9, 9))
    turn, reflection = np.array([[0, -1], [1, 0]]), np.array([[-1, 0], [0, 1]])
    matrix = np.linalg.matrix_power(turn, symmetry % 4) @ (reflection if symmetry >= 4 else np.eye(2, dtype=int))
    expected = vorticity_from_velocity(*moved(u, v, matrix), (1.0, 1.0))
    vorticity = vorticity_from_velocity(u, v, (1.0, 1.0))
    np.testing.assert_allclose(transform_patch(vorticity[None], symmetry)[0], expected, rtol=0, atol=1e-5)


def test_all_symmetries_are_drawn(fields, tokenizer):
    options = {"offsets": "random", "num_items": 100, "seed": 4}
    plain = PatchPairs(fields, [0], tokenizer, **options)
    turned = PatchPairs(fields, [0], tokenizer, symmetries=True, **options)
    drawn = Counter()
    for index in range(100):
        images = [transform_patch(plain.patches(index), symmetry).tobytes() for symmetry in range(8)]
        drawn[images.index(turned.patches(index).tobytes())] += 1
    assert sorted(drawn) == list(range(8))


@pytest.mark.parametrize("offsets", ["grid", "random"])
def test_workers_give_the_same_items(fields, tokenizer, offsets):
    options = {} if offsets == "grid" else {"num_items": 30, "symmetries": True}
    pairs = PatchPairs(fields, [0, 1], tokenizer, offsets=offsets, **options)
    alone = list(DataLoader(pairs, batch_size=7))
    shared = list(DataLoader(pairs, batch_size=7, num_workers=2))
    for first, second in zip(alone, shared, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_datasets_view_has_every_item_once(fields, tokenizer, num_workers):
    pytest.importorskip("datasets")
    pairs = PatchPairs(fields, [0, 2], tokenizer)
    stream = to_datasets(pairs, num_shards=7)
    expected = Counter(tuple(item["input_ids"].tolist()) for item in pairs)
    seen = Counter()
    for batch in DataLoader(stream, batch_size=5, num_workers=num_workers):
        assert batch["labels"].dtype == torch.int64
        assert (batch["labels"][:, :64] == -100).all()
        seen.update(map(tuple, batch["input_ids"].tolist()))
    assert seen == expected


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda path: path.unlink(), FileNotFoundError, r"there is no file .*; `python -m training.turbulence --out"),
        (lambda path: path.write_text("<html>"), OSError, r"is not an HDF5 file \(6 bytes\); fetch it again"),
        (lambda path: os.truncate(path, 9000), OSError, r"\(9000 bytes\) cannot be opened: .*truncated.*; fetch it"),
    ],
)
def test_files_that_cannot_be_opened(path, spoil, error, message):
    fields = FieldFile(path)
    fields.close()
    spoil(path)
    for use in (lambda: FieldFile(path), lambda: fields.snapshot(0, 0)):
        with pytest.raises(error, match=message):
            use()


def test_unreadable_snapshot(fields, monkeypatch):
    monkeypatch.setattr(h5py.Dataset, "__getitem__", Mock(side_effect=OSError("bad block")))
    with pytest.raises(OSError, match=r"trajectory 1, snapshot 2 cannot be read \(bad block\); the file is damaged"):
        fields.snapshot(1, 2)


def replace(key, value):
    def change(file):
        del file[key]
        file[key] = value

    return change


def forget(*keys):
    return lambda file: [file.__delitem__(key) for key in keys]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (forget("Vx", "x-coordinate"), r"lacks Vx, x-coordinate \(it has Vy, density, .*\); expected PDEBench's"),
        (lambda file: [file.__delitem__("Vx"), file.create_group("Vx")], "lacks Vx"),
        (replace("Vy", np.zeros((4, 5, 16, 16))), r"Vx is \(4, 5, 16, 24\) and Vy \(4, 5, 16, 16\)"),
        (replace("t-coordinate", np.arange(3.0)), r"t-coordinate has shape \(3,\).*expected 5 or 6 entries"),
        (replace("t-coordinate", np.array([0.0, 1, 2, 4, 8])), "t-coordinate is not evenly spaced"),
        (replace("x-coordinate", np.arange(15.0)), r"x-coordinate has shape \(15,\).*expected 16 entries"),
        (replace("y-coordinate", -np.arange(24.0)), r"y-coordinate is not evenly spaced and increasing"),
        (replace("y-coordinate", np.zeros((24, 1))), r"y-coordinate has shape \(24, 1\)"),
    ],
)
def test_foreign_files(tmp_path, change, message):
    path = write_pdebench(tmp_path / "foreign.hdf5", change=change)
    with pytest.raises(ValueError, match=f"foreign.hdf5.*{message}"):
        FieldFile(path)


def test_snapshot_that_is_not_finite(tmp_path):
    def spoil(file):
        file["Vy"][2, 3, 0, 0] = np.nan

    fields = FieldFile(write_pdebench(tmp_path / "file.hdf5", change=spoil))
    fields.vorticity(2, range(3))
    with pytest.raises(ValueError, match=r"file.hdf5: trajectory 2, snapshot 3 is not finite everywhere; leave the"):
        fields.vorticity(2)


def test_indices_out_of_range(fields, tokenizer):
    with pytest.raises(ValueError, match=r"pdebench.hdf5: trajectory 4 does not exist; it has 4, from 0 on"):
        fields.vorticity(4)
    with pytest.raises(ValueError, match="snapshot -1 does not exist; it has 5"):
        fields.snapshot(0, -1)
    with pytest.raises(ValueError, match="trajectory 9 does not exist; it has 4"):
        PatchPairs(fields, [0, 9], tokenizer)
    with pytest.raises(ValueError, match="no trajectories were given"):
        PatchPairs(fields, [], tokenizer)
    with pytest.raises(IndexError, match="item -1 does not exist"):
        PatchPairs(fields, [0], tokenizer)[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 10}, r"pdebench.hdf5: the grid 16 x 24 is not a multiple of patch_size = 10"),
        ({"patch_size": 17, "offsets": "random", "num_items": 1}, "patch_size = 17 exceeds the grid 16 x 24"),
        ({"stride": 5}, "stride = 5 must be from 1 to 4"),
        ({"stride": 0}, "stride = 0 must be"),
        ({"offsets": "all"}, "offsets = 'all' must be 'grid' or 'random'"),
        ({"offsets": "random"}, "needs num_items > 0, not None"),
        ({"num_items": 5}, "go with offsets='random' only"),
        ({"symmetries": True}, "go with offsets='random' only"),
    ],
)
def test_bad_pairs(fields, options, message):
    tokenizer = FieldTokenizer(patch_size=options.pop("patch_size", 8), low=-1.0, high=1.0)
    with pytest.raises(ValueError, match=message):
        PatchPairs(fields, [0], tokenizer, **options)


def test_no_quarter_turn_on_oblong_cells(tmp_path, tokenizer):
    path = write_pdebench(tmp_path / "file.hdf5", change=replace("x-coordinate", 0.25 * np.arange(GRID[0])))
    with pytest.raises(ValueError, match="is not square, so a quarter turn is no symmetry"):
        PatchPairs(FieldFile(path), [0], tokenizer, offsets="random", num_items=1, symmetries=True)


def test_bad_split():
    for fractions in ((0.5, 0.5, 0.0), (0.5, 0.2, 0.2)):
        with pytest.raises(ValueError, match="must be three positive numbers with sum 1"):
            split_trajectories(10, fractions)
    with pytest.raises(ValueError, match="2 trajectories cannot be split in three"):
        split_trajectories(2)
    with pytest.raises(ValueError, match="leave none to train on"):
        split_trajectories(4, (0.01, 0.49, 0.5))


def test_context_noise_blurs_the_inputs_of_the_target_alone(fields, tokenizer):
    """Labels and prefix stay true; the noise depends on the item alone and stays in the vocabulary."""
    options = {"offsets": "random", "num_items": 40, "seed": 3}
    clean = PatchPairs(fields, [0], tokenizer, **options)
    noisy = PatchPairs(fields, [0], tokenizer, context_noise=5.0, **options)
    size, changes = tokenizer.tokens_per_patch, []
    for i in reversed(range(40)):
        a, b = clean[i], noisy[i]
        assert torch.equal(a["labels"], b["labels"])
        assert torch.equal(a["input_ids"][:size], b["input_ids"][:size])
        assert torch.equal(noisy[i]["input_ids"], b["input_ids"])
        assert 0 <= b["input_ids"].min() <= b["input_ids"].max() < tokenizer.vocab_size
        changes.append((a["input_ids"] - b["input_ids"])[size:].float().std())
    assert min(changes) < 2
    assert 3 < max(changes) < 8
    for bad in ({"context_noise": 1.0}, options | {"context_noise": -1.0}):
        with pytest.raises(ValueError, match="context_noise"):
            PatchPairs(fields, [0], tokenizer, **bad)


def test_text_of_variable_length_is_left_out(tmp_path):
    """It lies in a heap; HDF5's library can go round in a damaged one for ever."""
    with h5py.File(tmp_path / "attributes.hdf5", "w") as file:
        file.attrs.update(eta=1e-8, note="some text", kind=text("band"), sizes=[1, 2])
        assert attributes(file) == {"eta": 1e-8, "kind": "band", "sizes": [1, 2]}
