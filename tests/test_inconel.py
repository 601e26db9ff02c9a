"""Inconel 718 data: reading a folder of the public layout, scalograms of known signals, and honest splits."""

import csv
from pathlib import Path

import h5py
import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training import inconel
from training.inconel import InconelTable

NAMES = ("3_g", "3_h", "10_a")
HEADER = ("sample", "point_name", "width", "E", "Yield stress", "UTS")
ROWS = (
    ("3", "G", "1.2", "12646568506", "399924004.9", "670.4256"),
    ("3", "H", "1.2", "13894902787", "473484848.5", "700.3636"),
    ("10", "A", "1.2", "15000000000", "600000000", "1107.55"),
    ("10", "B", "1.2", "15000000000", "600000000", "975.28"),  # has no scalogram
)


def write_csv(folder: Path, rows, header=HEADER):
    path = folder / "mechanical_property" / "mechanical_property.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([header, *rows])


def save_picture(folder: Path, name: str, values: np.ndarray):
    """A framed picture whose colours stand for the values (rows, columns)."""
    left, top, right, bottom = inconel.INSIDE
    inside = Image.fromarray(matplotlib.colormaps["jet"](values, bytes=True)[..., :3])
    picture = Image.new("RGB", inconel.PICTURE_SIZE, "white")
    picture.paste(inside.resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))
    picture.save(folder / "wavelet_images" / f"{name}.jpg", quality=95, subsampling=0)


@pytest.fixture
def folder(tmp_path):
    for name in ("wavelet_images", "thermal_history"):
        (tmp_path / name).mkdir()
    write_csv(tmp_path, ROWS)
    for level, name in enumerate(NAMES):
        save_picture(tmp_path, name, np.full((4, 4), level / 4))
    with h5py.File(tmp_path / "thermal_history" / "discrete_binning_feature.h5", "w") as file:
        for count, name in enumerate(NAMES):
            file[name] = np.full(36, count)
        file["temp_values"] = np.linspace(300, 2000, 37)
    with h5py.File(tmp_path / "thermal_history" / "thermal_history_003.h5", "w") as file:
        file["g"] = np.array([211.995, 2732.0, 1832.0])
    return tmp_path


def table_of(names) -> InconelTable:
    zeros = np.zeros(len(names))
    return InconelTable(tuple(names), np.array([int(name.split("_")[0]) for name in names]), zeros, zeros, zeros)


@pytest.fixture
def whole_table():
    """The public table's 135 points: 9 for each of walls 3 to 5, else 12."""
    walls = {wall: "abcdefghi" if wall <= 5 else "abcdefghijkl" for wall in (3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16)}
    return table_of([f"{wall}_{point}" for wall, points in walls.items() for point in points])


def test_points_come_in_units_of_the_trade_and_only_with_a_scalogram(folder):
    table = inconel.read_points(folder)
    assert table.names == NAMES
    assert len(table) == 3
    np.testing.assert_array_equal(table.wall, [3, 3, 10])
    np.testing.assert_allclose(table.yield_stress, [399.9240049, 473.4848485, 600])
    np.testing.assert_allclose(table.uts, [670.4256, 700.3636, 1107.55])
    np.testing.assert_allclose(table.modulus, [12.646568506, 13.894902787, 15])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("3", "g", "1.2", "1e10", "4e8", "670"), "line 6: point 3_g comes a second time"),
        (("10", "A", "1.2", "", "4e8", "670"), "line 6: E reads ''"),
        (("10", "A", "1.2", "1e10", "nan", "670"), "Yield stress reads 'nan'"),
        (("10", "A", "1.2", "1e10", "4e8", "-670"), "UTS reads '-670'"),
        (("10", "A", "1.2", "1e10", "4e8", "many"), "UTS reads 'many'"),
        (("10", "A"), "reads None; expected a positive number"),
        (("ten", "A", "1.2", "1e10", "4e8", "670"), "wall and point read 'ten_a'"),
    ],
)
def test_a_bad_row_is_refused_by_its_line(folder, row, message):
    write_csv(folder, [*ROWS, row])
    with pytest.raises(ValueError, match=message):
        inconel.read_points(folder)


def test_missing_files_columns_and_pictures_are_named(folder, tmp_path_factory):
    with pytest.raises(ValueError, match=r"mechanical_property\.csv is not a file"):
        inconel.read_points(tmp_path_factory.mktemp("empty"))
    write_csv(folder, [row[:-1] for row in ROWS], HEADER[:-1])
    with pytest.raises(ValueError, match="no column UTS"):
        inconel.read_points(folder)
    write_csv(folder, ROWS[3:])
    with pytest.raises(ValueError, match=r"no point of .* has a scalogram"):
        inconel.read_points(folder)
    with pytest.raises(ValueError, match=r"10_b\.jpg is not a file"):
        inconel.read_scalograms(folder, table_of(["10_b"]))


def test_colours_are_mapped_back_to_values(folder):
    scalograms = inconel.read_scalograms(folder, inconel.read_points(folder), size=8)
    assert scalograms.shape == (3, 64)
    np.testing.assert_allclose(scalograms, np.repeat([[0.0], [0.25], [0.5]], 64, axis=1), atol=0.01)


def test_a_scalogram_keeps_its_place_and_averages_values_not_colours(folder):
    values = np.random.default_rng(0).uniform(0, 1, (4, 4))
    save_picture(folder, "3_g", values)
    table = table_of(["3_g"])
    np.testing.assert_allclose(inconel.read_scalograms(folder, table, 4).reshape(4, 4), values, atol=0.02)
    np.testing.assert_allclose(inconel.read_scalograms(folder, table, 1), values.mean(), atol=0.01)


def test_pictures_of_another_kind_are_refused(folder):
    table = inconel.read_points(folder)
    with pytest.raises(ValueError, match="size = 0; expected 1 to"):
        inconel.read_scalograms(folder, table, size=0)
    path = folder / "wavelet_images" / "3_h.jpg"
    Image.new("RGB", (64, 32)).save(path)
    with pytest.raises(ValueError, match=r"3_h\.jpg has 64 x 32 pixels; expected 909 x 719"):
        inconel.read_scalograms(folder, table)
    path.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"3_h\.jpg cannot be read as a picture"):
        inconel.read_scalograms(folder, table)
    save_picture(folder, "3_h", np.zeros((4, 4)))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"3_h\.jpg cannot be read as a picture"):
        inconel.read_scalograms(folder, table)


def test_bins_come_in_the_order_of_the_table(folder):
    bins = inconel.read_bins(folder, table_of(["10_a", "3_g"]))
    np.testing.assert_array_equal(bins, np.repeat([[2.0], [0.0]], 36, axis=1))
    with pytest.raises(ValueError, match="no point 10_b"):
        inconel.read_bins(folder, table_of(["10_b"]))
    path = folder / "thermal_history" / "discrete_binning_feature.h5"
    with h5py.File(path, "a") as file:
        file["3_i"] = np.zeros(35)
    with pytest.raises(ValueError, match="different numbers of intervals"):
        inconel.read_bins(folder, table_of(["3_g", "3_i"]))
    path.write_text("text")
    with pytest.raises(ValueError, match="not an HDF5 file"):
        inconel.read_bins(folder, table_of(["3_g"]))


def test_histories_are_in_celsius(folder):
    histories = inconel.read_histories(folder)
    assert list(histories) == ["3_g"]
    np.testing.assert_allclose(histories["3_g"], [100, 1500, 1000], atol=0.01)
    path = folder / "thermal_history" / "thermal_history_003.h5"
    with h5py.File(path, "a") as file:
        file["h"] = np.array([212.0, np.nan])
    with pytest.raises(ValueError, match="point 'h' is not a row of finite numbers"):
        inconel.read_histories(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"no thermal_history/thermal_history_<wall>\.h5"):
        inconel.read_histories(folder)


@pytest.mark.parametrize("wavelet", ["cgau8", "morl", "cmor1.5-1.0"])
@pytest.mark.parametrize("cycles", [0.1, 0.25])
def test_a_sine_shows_at_its_own_frequency(wavelet, cycles):
    every, num_scales, kept = 3, 64, 800
    history = 1000 + 100 * np.sin(2 * np.pi * cycles / every * np.arange(every * kept))
    transform = inconel.scalogram(history, every=every, num_scales=num_scales, wavelet=wavelet)
    assert transform.shape == (num_scales, kept)
    frequencies = np.arange(num_scales, 0, -1) / (2 * num_scales)
    # Away from the ends; the constant part shows at the lowest frequencies only. The scale weighs the magnitude by its
    # square root, and so pulls the ridge a little to lower frequencies.
    spectrum = transform[:, 200:600].mean(1) * np.sqrt(frequencies)
    spectrum[frequencies < 0.05] = 0
    assert frequencies[spectrum.argmax()] == pytest.approx(cycles, abs=2 / (2 * num_scales))


def test_the_magnitude_of_a_sine_is_the_wavelets_spectrum():
    amplitude, cycles, num_scales, bandwidth, centre = 100, 0.1, 64, 1.5, 1.0
    history = 1000 + amplitude * np.sin(2 * np.pi * cycles * np.arange(800))
    transform = inconel.scalogram(history, every=1, num_scales=num_scales, wavelet=f"cmor{bandwidth}-{centre}")
    scales = centre * 2 * num_scales / np.arange(num_scales, 0, -1)
    spectrum = np.exp(-(np.pi**2) * bandwidth * (scales * cycles - centre) ** 2)
    expected = amplitude / 2 * np.sqrt(scales) * spectrum
    # Away from the ends and from the lowest frequencies, whose wavelets are as long as the series. PyWavelets takes the
    # wavelet in steps.
    rows = scales < 40
    middle = transform[rows, 300:500]
    np.testing.assert_allclose(middle, np.tile(expected[rows, None], 200), atol=0.02 * expected.max())
    assert expected[rows].argmax() == expected.argmax()


def test_the_part_before_the_deposition_is_left_out():
    layer = np.concatenate([[200.0], np.linspace(1500, 310, 500), np.full(100, 150.0)])
    before = np.tile([100.0, 800.0, 100.0], 50)  # layers below flash through, and cool to the floor
    expected = inconel.scalogram(layer)
    np.testing.assert_allclose(inconel.scalogram(np.concatenate([before, layer])), expected)
    assert expected.shape == (256, 121)


@pytest.mark.parametrize(
    ("history", "settings", "message"),
    [
        (np.full(50, 100.0), {}, "peak is 100 degrees Celsius"),
        (np.array([400.0, np.nan]), {}, "expected a row of finite temperatures"),
        (np.full((5, 2), 500.0), {}, r"history has shape \(5, 2\)"),
        (np.empty(0), {}, r"history has shape \(0,\)"),
        (np.array([100.0, 900.0]), {"every": 7}, "1 sample is kept"),
        (np.full(50, 900.0), {"every": 0}, "every = 0"),
        (np.full(50, 900.0), {"num_scales": 0}, "num_scales = 0"),
        (np.full(50, 900.0), {"wavelet": "db4"}, "wavelet = 'db4'; expected one of"),
    ],
)
def test_histories_and_settings_out_of_range_are_refused(history, settings, message):
    with pytest.raises(ValueError, match=message):
        inconel.scalogram(history, **settings)


@given(size=st.integers(1, 12), factors=st.tuples(st.integers(1, 5), st.integers(1, 5)), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_shrinking_takes_means_over_rectangles(size, factors, seed):
    height, width = (size * factor for factor in factors)
    values = np.random.default_rng(seed).normal(size=(height, width))
    means = values.reshape(size, factors[0], size, factors[1]).mean((1, 3))
    np.testing.assert_allclose(inconel.shrink(values, size), means, atol=1e-5)


def test_shrinking_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="size = 5; expected 1 to 4"):
        inconel.shrink(np.zeros((4, 9)), 5)
    with pytest.raises(ValueError, match="expected \\(height, width\\)"):
        inconel.shrink(np.zeros(4), 1)


def test_the_published_split_is_the_published_list(whole_table):
    assert len(whole_table) == 135
    assert len(set(inconel.XIE_TEST)) == 27
    ((train, test),) = inconel.fixed_split(whole_table)
    assert tuple(whole_table.names[row] for row in test) == inconel.XIE_TEST
    assert len(train) == 108
    with pytest.raises(ValueError, match="no point 3_d, 3_f, 5_f, 12_d, 15_d and 22 more"):
        inconel.fixed_split(table_of(["3_g"]))


def test_no_split_tests_on_what_it_trains_on(whole_table):
    walls = inconel.leave_one_wall_out(whole_table)
    repeated = inconel.repeated_splits(whole_table, num_repeats=20)
    for train, test in [*inconel.fixed_split(whole_table), *walls, *repeated]:
        np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(135))
    assert {len(test) for _, test in repeated} == {27}
    assert [set(whole_table.wall[test]) for _, test in walls] == [{wall} for wall in np.unique(whole_table.wall)]


def test_repeated_splits_follow_their_seed(whole_table):
    first, again, other = (inconel.repeated_splits(whole_table, 5, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal([test for _, test in first], [test for _, test in again])
    assert any((one[1] != two[1]).any() for one, two in zip(first, other, strict=True))
    assert len(inconel.repeated_splits(whole_table)) == 300


def test_splits_out_of_range_are_refused():
    table = table_of(["3_g", "3_h"])
    with pytest.raises(ValueError, match="num_test = 2; expected 1 to 1"):
        inconel.repeated_splits(table, num_test=2)
    with pytest.raises(ValueError, match="num_repeats = 0"):
        inconel.repeated_splits(table, num_repeats=0, num_test=1)
    with pytest.raises(ValueError, match="all of wall 3; expected at least 2 walls"):
        inconel.leave_one_wall_out(table)
