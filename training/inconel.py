r"""Points of additively manufactured Inconel 718 walls: properties, scalograms, thermal histories and splits.

Public data of Xie et al., "Mechanistic data-driven prediction of as-built mechanical properties in metal additive
manufacturing" (npj Computational Materials 7, 86, 2021), read from a folder of this layout::

    mechanical_property/mechanical_property.csv          a row for each point of each wall
    wavelet_images/<wall>_<point>.jpg                    a scalogram for each point
    thermal_history/discrete_binning_feature.h5          a histogram of temperatures for each point
    thermal_history/thermal_history_<wall>.h5            a raw series for each point of the wall

A point has a name such as ``3_g``: wall 3, point G. A scalogram has time along its columns and frequency, the highest
first, along its rows.
"""

import csv
import dataclasses
import math
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import h5py
import matplotlib
import numpy as np
import pywt
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import KDTree
from sklearn.model_selection import LeaveOneGroupOut, ShuffleSplit
from tqdm.auto import tqdm

from training.hdf5_files import check_stored, numbers, reading

Split = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Row numbers to train on and to test on."""

# The test points of Xie et al., in their order.
# fmt: off
XIE_TEST = (
    "3_d", "3_f", "5_f", "12_d", "15_d", "6_b", "5_h", "6_g", "12_a", "16_j", "16_d", "8_h", "13_c", "13_a", "10_f",
    "11_a", "5_i", "6_h", "8_i", "16_b", "13_l", "5_a", "8_g", "15_j", "16_a", "12_h", "10_e",
)
# fmt: on

# A picture is a plot without labels: a white edge and a black line enclose it.
PICTURE_SIZE = (909, 719)  # width, height
INSIDE = (4, 4, 903, 714)  # left, top, right, bottom
COLOUR_MAP = "jet"
COLOUR_STEP = 4  # colours are told apart to this many of 256 levels in each channel

# Degrees Celsius. Before its layer is deposited, a point's series shows the camera's floor and the layers below.
DEPOSITED = 300.0


@dataclasses.dataclass(frozen=True)
class InconelTable:
    """Measured properties of N points.

    Attributes:
        names: Names of the points, such as ``3_g``.
        wall: Number of each point's wall, (N,).
        yield_stress: In MPa, (N,).
        uts: Ultimate tensile strength in MPa, (N,).
        modulus: Young's modulus of the tensile test in GPa, (N,).
    """

    names: tuple[str, ...]
    wall: NDArray[np.int64]
    yield_stress: NDArray[np.float64]
    uts: NDArray[np.float64]
    modulus: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, names: Iterable[str]) -> NDArray[np.int64]:
        """Row numbers of the points called ``names``; raises ``ValueError`` for one that is not in the table."""
        row = {name: number for number, name in enumerate(self.names)}
        names = list(names)
        if missing := [name for name in names if name not in row]:
            raise ValueError(f"the table has no point {_listed(missing)}; complete the csv file and the pictures.")
        return np.array([row[name] for name in names], dtype=np.int64)


def read_points(folder: str | Path) -> InconelTable:
    """Reads the properties of the points that have a scalogram, in the order of the csv file.

    The file gives stresses and the modulus in Pa and the ultimate tensile strength in MPa.

    Raises:
        ValueError: If a file or column is missing, no point has a scalogram, a point comes twice, or a value is
            missing or not a positive finite number.
    """
    path = _existing(Path(folder) / "mechanical_property" / "mechanical_property.csv")
    columns = {"Yield stress": 1e-6, "UTS": 1.0, "E": 1e-9}  # factors to MPa, MPa, GPa
    points: dict[str, list[float]] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if absent := {"sample", "point_name", *columns} - set(rows.fieldnames or ()):
            raise ValueError(f"{path} has no column {_listed(sorted(absent))}; its columns are {rows.fieldnames}.")
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            name = f"{row['sample']}_{row['point_name'] or ''}".lower()
            if not re.fullmatch(r"\d+_[a-z]", name):
                raise ValueError(f"{where}: wall and point read {name!r}; expected a number and a letter, as in '3_g'.")
            if not _picture(folder, name).is_file():
                continue
            values = [factor * _positive(row[column], f"{where}: {column}") for column, factor in columns.items()]
            if name in points:
                raise ValueError(f"{where}: point {name} comes a second time; keep one row for each point.")
            points[name] = values
    if not points:
        raise ValueError(f"no point of {path} has a scalogram; expected pictures such as {_picture(folder, '3_g')}.")
    yield_stress, uts, modulus = np.array(list(points.values())).T
    wall = np.array([int(name.split("_")[0]) for name in points])
    return InconelTable(tuple(points), wall, yield_stress, uts, modulus)


def read_scalograms(folder: str | Path, table: InconelTable, size: int = 64) -> NDArray[np.float64]:
    """Reads the magnitude that the colours of the table's pictures stand for, on a grid of ``size`` x ``size`` means.

    A picture's colours come from one colour map of one range for all points. They are mapped back at full resolution,
    since the mean of two colours is not the colour of the mean.

    Returns:
        (N, size * size), row after row, in [0, 1]; 1 is the end of the colour map.

    Raises:
        ValueError: If a picture is missing, cannot be read or has another size, or ``size`` is out of range.
    """
    _check_size(size, min(INSIDE[2] - INSIDE[0], INSIDE[3] - INSIDE[1]))
    scalograms = np.empty((len(table), size * size))
    for row, name in enumerate(tqdm(table.names, desc="scalograms", unit=" pictures", disable=None)):
        path = _existing(_picture(folder, name))
        try:
            with Image.open(path) as picture:
                if picture.size != PICTURE_SIZE:
                    raise ValueError(
                        f"{path} has {picture.size[0]} x {picture.size[1]} pixels; expected "
                        f"{PICTURE_SIZE[0]} x {PICTURE_SIZE[1]}, of which a known frame is cut off."
                    )
                colours = np.asarray(picture.convert("RGB").crop(INSIDE)) // COLOUR_STEP
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as a picture: {error}; copy it again.") from error
        red, green, blue = np.moveaxis(colours, -1, 0)
        scalograms[row] = shrink(_values_of_colours()[red, green, blue], size).ravel()
    return scalograms


def read_bins(folder: str | Path, table: InconelTable) -> NDArray[np.float64]:
    """Reads how many samples of each point's history lie in each interval of temperature: (N, number of intervals).

    Raises:
        ValueError: If the file or a point is missing, or the points have different numbers of intervals.
    """
    path = _existing(Path(folder) / "thermal_history" / "discrete_binning_feature.h5")
    with _opened(path) as file:
        if missing := [name for name in table.names if name not in file]:
            raise ValueError(f"{path} has no point {_listed(missing)}; take these out of the table or copy it again.")
        counts = [_values(file, name) for name in table.names]
    if len({of_point.shape for of_point in counts}) != 1:
        raise ValueError(f"the points of {path} have different numbers of intervals; copy it again.")
    return np.stack(counts)


def read_histories(folder: str | Path) -> dict[str, NDArray[np.float64]]:
    """Reads every raw thermal history in the folder: temperature in degrees Celsius, (samples,), for each name.

    The files hold Fahrenheit: the camera's floor of 100 degrees Celsius reads 212 in them.

    Raises:
        ValueError: If there are none, or a series is not a row of finite numbers.
    """
    histories = {}
    for path in sorted((Path(folder) / "thermal_history").glob("thermal_history_*.h5")):
        if not (number := re.fullmatch(r"thermal_history_(\d+)", path.stem)):
            continue
        with _opened(path) as file:
            for point in sorted(file):
                history = _values(file, point)
                if history.ndim != 1 or not np.isfinite(history).all():
                    raise ValueError(f"{path}: the series of point {point!r} is not a row of finite numbers.")
                histories[f"{int(number[1])}_{point}"] = (history - 32) / 1.8
    if not histories:
        raise ValueError(f"{folder} has no thermal_history/thermal_history_<wall>.h5; expected at least one.")
    return histories


def scalogram(
    history: NDArray[np.float64], *, every: int = 5, num_scales: int = 256, wavelet: str = "cgau8"
) -> NDArray[np.float64]:
    r"""The continuous wavelet transform of a thermal history from the deposition of the point's layer on.

    With the wavelet :math:`\psi` of central frequency :math:`f_\psi`,

    .. math::
        W_{kt} = \Big|\frac{1}{\sqrt{s_k}} \sum_\tau (T_\tau - T_\text{last})\,
        \overline{\psi\Big(\frac{\tau - t}{s_k}\Big)}\Big|, \qquad s_k = \frac{f_\psi}{f_k}.

    The frequencies :math:`f_k` fall linearly from half a cycle to half a cycle / ``num_scales`` for each sample kept.
    The last temperature is taken off so that the series does not end in a step down to zero.

    Neither the wavelet nor the sampling of the pictures is in the public data. The defaults are those, of some tried,
    that correlate best with the pictures of the wall whose raw series are public. They give the pictures' layout,
    not their values: a model made for the pictures does not hold for these.

    Args:
        history: Temperature T in degrees Celsius, (samples,). The part before the last sample colder than
            ``DEPOSITED`` that precedes the peak is left out.
        every: Keep one of so many samples.
        num_scales: Number of frequencies.
        wavelet: Name of one of PyWavelets' continuous wavelets.

    Returns:
        (num_scales, samples kept), in degrees Celsius; :func:`shrink` takes it to the grid of the pictures.

    Raises:
        ValueError: If the history is not a row of finite numbers, never reaches ``DEPOSITED``, keeps fewer than two
            samples, or a setting is out of range.
    """
    history = np.asarray(history, dtype=np.float64)
    for name, value in (("every", every), ("num_scales", num_scales)):
        if value < 1:
            raise ValueError(f"{name} = {value}; expected at least 1.")
    known = pywt.wavelist(kind="continuous")
    if wavelet not in known and re.sub(r"[-.\d]*$", "", wavelet) not in known:  # cmor1.5-1.0 is cmor with parameters
        raise ValueError(f"wavelet = {wavelet!r}; expected one of {', '.join(known)}.")
    if history.ndim != 1 or history.size == 0 or not np.isfinite(history).all():
        raise ValueError(f"history has shape {history.shape}; expected a row of finite temperatures.")
    peak = int(history.argmax())
    if history[peak] < DEPOSITED:
        raise ValueError(
            f"the history's peak is {history[peak]:.0f} degrees Celsius; expected a peak above {DEPOSITED:.0f}, the "
            "deposition. Convert other units to degrees Celsius."
        )
    cold = np.flatnonzero(history[:peak] < DEPOSITED)
    kept = history[cold[-1] if cold.size else 0 :: every]
    if kept.size < 2:
        raise ValueError(f"{kept.size} sample is kept from the deposition on; expected at least 2, so lower `every`.")
    frequencies = np.arange(num_scales, 0, -1) / (2 * num_scales)
    coefficients, _ = pywt.cwt(kept - kept[-1], pywt.central_frequency(wavelet) / frequencies, wavelet, method="fft")
    return np.abs(coefficients)


def shrink(values: NDArray[np.floating], size: int) -> NDArray[np.float64]:
    """Means of ``values`` (height, width) over a grid of ``size`` x ``size`` equal rectangles.

    Raises:
        ValueError: If there are not two dimensions, or ``size`` is not between 1 and the shorter side.
    """
    if values.ndim != 2:
        raise ValueError(f"values have shape {values.shape}; expected (height, width).")
    _check_size(size, min(values.shape))
    picture = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX), dtype=np.float64)


def fixed_split(table: InconelTable) -> list[Split]:
    """The one split of Xie et al.: ``XIE_TEST`` against the other points.

    Raises:
        ValueError: If a test point is not in the table.
    """
    test = table.rows(XIE_TEST)
    return [(np.setdiff1d(np.arange(len(table)), test), test)]


def repeated_splits(table: InconelTable, num_repeats: int = 300, num_test: int = 27, seed: int = 0) -> list[Split]:
    """``num_repeats`` random splits that test on ``num_test`` points each.

    Raises:
        ValueError: If ``num_repeats`` is below 1, or ``num_test`` is not between 1 and one less than the points.
    """
    if num_repeats < 1:
        raise ValueError(f"num_repeats = {num_repeats}; expected at least 1.")
    if not 1 <= num_test < len(table):
        raise ValueError(f"num_test = {num_test}; expected 1 to {len(table) - 1}, one less than the points.")
    return list(ShuffleSplit(num_repeats, test_size=num_test, random_state=seed).split(table.wall))


def leave_one_wall_out(table: InconelTable) -> list[Split]:
    """A split for each wall, in the order of their numbers, that tests on this wall's points.

    Raises:
        ValueError: If the points are all of one wall.
    """
    if len(walls := np.unique(table.wall)) < 2:
        raise ValueError(f"the points are all of wall {walls.item()}; expected at least 2 walls.")
    return list(LeaveOneGroupOut().split(table.wall, groups=table.wall))


@cache
def _values_of_colours() -> NDArray[np.float32]:
    """Place along the colour map, in [0, 1], of the colour nearest to each (red, green, blue) step."""
    places = np.linspace(0, 1, 256)
    colours = 255 * matplotlib.colormaps[COLOUR_MAP](places)[:, :3]
    levels = np.arange(COLOUR_STEP / 2, 256, COLOUR_STEP)
    steps = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)
    return places[KDTree(colours).query(steps)[1]].astype(np.float32)


def _picture(folder: str | Path, name: str) -> Path:
    return Path(folder) / "wavelet_images" / f"{name}.jpg"


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the folder that holds the layout of `training.inconel`.")
    return path


def _opened(path: Path) -> h5py.File:
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is not an HDF5 file; copy it again.")
    return h5py.File(path, "r")


def _values(file: h5py.File, name: str) -> NDArray[np.float64]:
    with reading(Path(file.filename), f"point {name!r}"):
        stored = numbers(file, name)
        if stored is None or not stored.shape:
            raise ValueError(f"{file.filename}: point {name!r} is no array; copy it again.")
        check_stored(stored, stored.shape)
        return stored[:].astype(np.float64)


def _positive(text: str | None, where: str) -> float:
    try:
        value = float(text or "nan")
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{where} reads {text!r}; expected a positive number. Fill it in or take the row out.")
    return value


def _check_size(size: int, largest: int) -> None:
    if not 1 <= size <= largest:
        raise ValueError(f"size = {size}; expected 1 to {largest}, the shorter side.")


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
