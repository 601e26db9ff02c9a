r"""The benchmark of KHRONOS: Poisson problems, tables, inversion, speed, memory and intervals, in one record.

    python -m eval.khronos [--out runs/khronos] [--only poisson tabular inversion speed coverage fits] [--quick]

Writes khronos.json, a part at a time: parts that are there are kept unless --only names them, so that a run goes on
where it stopped, and pictures of those that the record holds. --quick tries all of it at sizes too small to say
anything.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import make_friedman1
from tqdm import tqdm

from eval.khronos_cost import memory_rows, predict_speed
from eval.khronos_figures import draw_all
from eval.khronos_speed import als_against_gradient
from eval.poisson import poisson_study
from eval.study import summed_up
from eval.tabular import BOREHOLE, NUM_TEST, NUM_TRAIN, borehole, borehole_points, datasets, tabular_study
from leviathan.khronos import KhronosConfig, KhronosFit, KhronosModel
from training.provenance import provenance, write_json

RECORD = "khronos.json"
LEVELS = (0.5, 0.8, 0.9, 0.95)
SLICES = (0.25, 0.5, 0.75)  # of the second input
NEAR = 0.03  # a slice, to be drawn beside it
NOISE = 0.1  # of the fit that is drawn
NUM_WARM_UP = 5
FLAT = 1.0  # memory is so if it grows by less than a copy of the table


@dataclass(frozen=True)
class Sizes:
    """How much of everything is done. The defaults are those of the record."""

    poisson: Mapping[str, Any] = field(default_factory=lambda: {"kan_steps": 20})
    tables: tuple[int, int] = (NUM_TRAIN, NUM_TEST)  # points to train and to test on, of synthetic sets
    sets: tuple[str, ...] = tuple(data.name for data in datasets())
    tabular: Mapping[str, Any] = field(default_factory=lambda: {"n_jobs": 2})
    inversion_points: int = 2000
    inversion_repeats: int = 100
    predict_points: int = 1_000_000
    predict_rank: int = 32
    memory_points: tuple[int, int] = (100_000, 1_000_000)
    gradient: Mapping[str, Any] = field(default_factory=dict)
    coverage_seeds: int = 10
    coverage_points: int = 1000
    fits: tuple[tuple[int, int], ...] = tuple((rank, cells) for rank in (1, 2, 4, 8) for cells in (1, 2, 4))


FULL = Sizes()
QUICK = Sizes(
    poisson={"sizes": (16,), "degrees": (2,), "kan_sizes": ()},
    tables=(60, 40),
    sets=("friedman1",),
    tabular={"methods": ("khronos", "ridge"), "num_candidates": 1, "seeds": (3,)},  # whose one KHRONOS is small
    inversion_points=200,
    inversion_repeats=2,
    predict_points=2000,
    predict_rank=4,
    memory_points=(1000, 2000),
    gradient={
        "num_points": 200,
        "num_inputs": 2,
        "rank": 2,
        "num_cells": 2,
        "batch_sizes": (64,),
        "learning_rates": (0.1,),
        "time_limit": 0.5,
    },
    coverage_seeds=2,
    coverage_points=150,
    fits=((1, 1), (2, 1)),
)


@dataclass(frozen=True)
class InversionRow:
    """Inversions of a fitted model to the median of its data, each with other starts.

    Attributes:
        function: What the model was fitted to.
        num_inputs, rank, num_cells, degree, num_parameters: The model's.
        test_r2: Its coefficient of determination on points without noise.
        num_starts: Of an inversion.
        num_repeats: Inversions.
        milliseconds: Median time of one.
        num_solutions: Median number of distinct converged points.
        fewest_solutions: The least.
        num_failed: Distinct points that did not converge, of all inversions together.
        largest_residual: Of all points that converged, as a fraction of the range of the data.
        worst_residual: Of all points that were returned, converged or not, likewise.
    """

    function: str
    num_inputs: int
    rank: int
    num_cells: int
    degree: int
    num_parameters: int
    test_r2: float
    num_starts: int
    num_repeats: int
    milliseconds: float
    num_solutions: float
    fewest_solutions: int
    num_failed: int
    largest_residual: float | None
    worst_residual: float


@dataclass(frozen=True)
class CoverageRow:
    """How often intervals hold new observations.

    Attributes:
        level: The probability asked for.
        mean, standard_deviation: Of the share of test points inside, over seeds.
    """

    level: float
    mean: float
    standard_deviation: float


@dataclass(frozen=True)
class Target:
    """A figure to reach.

    Attributes:
        figure: What is measured.
        asked: The bound.
        measured: None where the record does not hold it.
        reached: Likewise.
    """

    figure: str
    asked: str
    measured: float | None
    reached: bool | None


def poisson_part(sizes: Sizes) -> dict[str, Any]:
    """Rows of `eval.poisson`."""
    return {"rows": _plain(poisson_study(**sizes.poisson))}


def tabular_part(sizes: Sizes) -> dict[str, Any]:
    """Rows of `eval.tabular`."""
    sets = [data for data in datasets(*sizes.tables) if data.name in sizes.sets]
    return {"rows": _plain(tabular_study(sets, **sizes.tabular))}


def inversion_part(sizes: Sizes) -> dict[str, Any]:
    """Two models of the sizes of those of Inconel 718, inverted from as many starts as these."""

    def friedman(num_points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return make_friedman1(num_points, random_state=seed)

    def flow(num_points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        x = borehole_points(num_points, seed)[:, : len(BOREHOLE)]
        return x, borehole(x)

    rows = []
    for name, draw, rank in (("friedman1", friedman, 7), ("borehole", flow, 4)):
        x, y = draw(sizes.inversion_points, 0)
        model, _ = _fitted(x, y, rank=rank, num_cells=1, degree=2, extrapolate="linear")
        x_test, y_test = draw(sizes.inversion_points, 1)
        test_r2 = 1 - np.mean((model.predict(x_test) - y_test) ** 2) / np.var(y_test)
        rows += [
            _inversions(name, model, float(np.median(y)), float(test_r2), num_starts, sizes.inversion_repeats)
            for num_starts in (47, 64)
        ]
    return {"rows": _plain(rows)}


def _inversions(
    name: str, model: KhronosModel, target: float, test_r2: float, num_starts: int, num_repeats: int
) -> InversionRow:
    times, found = [], []
    for seed in range(NUM_WARM_UP + num_repeats):
        start = time.perf_counter()
        result = model.invert(target, num_starts, seed=seed)
        if seed >= NUM_WARM_UP:
            times.append(time.perf_counter() - start)
            found.append(result)
    counts = [len(result.solutions) for result in found]
    residuals = torch.cat([result.residual[result.converged] for result in found])
    config = model.config
    return InversionRow(
        name,
        config.num_inputs,
        config.rank,
        config.num_cells,
        config.degree,
        model.num_fitted,
        test_r2,
        num_starts,
        num_repeats,
        milliseconds=1000 * statistics.median(times),
        num_solutions=statistics.median(counts),
        fewest_solutions=min(counts),
        num_failed=sum(int((~result.converged).sum()) for result in found),
        largest_residual=residuals.max().item() if len(residuals) else None,
        worst_residual=max(result.residual.max().item() for result in found),
    )


def speed_part(sizes: Sizes) -> dict[str, Any]:
    """Times of prediction, memory, and alternating least squares against training by gradient."""
    against = als_against_gradient(**sizes.gradient)
    return {
        "predict": _plain(predict_speed(sizes.predict_points, rank=sizes.predict_rank)),
        "memory": _plain(memory_rows(sizes.memory_points)),
        "als_against_gradient": {
            **_plain(against),
            "best": _plain(against.best),
            "ratio": against.ratio,
        },
    }


def coverage_part(sizes: Sizes) -> dict[str, Any]:
    """Intervals for noisy observations of friedman1."""
    shares: dict[float, list[float]] = {level: [] for level in LEVELS}
    rmse = []
    for seed in tqdm(range(sizes.coverage_seeds), desc="coverage", unit="seed"):
        x, y = make_friedman1(sizes.coverage_points + sizes.tables[1], noise=1.0, random_state=seed)
        train, test = np.split(np.arange(len(x)), [sizes.coverage_points])
        model, _ = _fitted(x[train], y[train], rank=6, num_cells=2, degree=2, extrapolate="linear", uncertainty=True)
        for level in LEVELS:
            interval = model.interval(x[test], level)
            shares[level].append(float(np.mean((interval.lower <= y[test]) & (y[test] <= interval.upper))))
        rmse.append(float(np.sqrt(np.mean((interval.prediction - y[test]) ** 2))))
    return {
        "dataset": "friedman1",
        "num_train": sizes.coverage_points,
        "num_seeds": sizes.coverage_seeds,
        "num_parameters": model.num_fitted,
        "rmse": summed_up(rmse),
        "rows": _plain([CoverageRow(level, *summed_up(each).values()) for level, each in shares.items()]),
    }


def fits_part(sizes: Sizes) -> dict[str, Any]:
    """What pictures need: slices of a fit with its data, the objective over sweeps, and error against parameters."""
    random = np.random.default_rng(0)
    x = random.random((sizes.coverage_points, 2))
    y = ripples(x) + NOISE * random.standard_normal(len(x))
    model, fit = _fitted(x, y, rank=4, num_cells=8, degree=3, extrapolate="linear", uncertainty=True)
    slices = []
    for at in SLICES:
        line = np.stack([np.linspace(0, 1, 101), np.full(101, at)], axis=1)
        interval, near = model.interval(line), np.abs(x[:, 1] - at) < NEAR
        slices.append(
            {
                "at": at,
                "x": line[:, 0].tolist(),
                "truth": ripples(line).tolist(),
                "prediction": interval.prediction.tolist(),
                "lower": interval.lower.tolist(),
                "upper": interval.upper.tolist(),
                "data_x": x[near, 0].tolist(),
                "data_y": y[near].tolist(),
            }
        )
    x, x_test = (borehole_points(sizes.inversion_points, seed)[:, : len(BOREHOLE)] for seed in (0, 1))
    y, y_test = borehole(x), borehole(x_test)
    errors = []
    for rank, num_cells in tqdm(sizes.fits, desc="fits", unit="fit"):
        smaller, result = _fitted(x, y, rank=rank, num_cells=num_cells, degree=3, extrapolate="linear")
        error = float(np.sqrt(np.mean((smaller.predict(x_test) - y_test) ** 2)) / y_test.std())
        size = {"rank": rank, "num_cells": num_cells, "num_parameters": smaller.num_fitted}
        errors.append({**size, "relative_error": error, "objective": result.objective.tolist()})
    return {
        "slices": {
            "function": "sin(3 pi x_1 x_2) + noise",
            "noise": NOISE,
            "level": 0.95,
            "num_parameters": model.num_fitted,
            "num_points": sizes.coverage_points,
            "num_sweeps": fit.num_sweeps,
            "rows": slices,
        },
        "errors": {"function": "borehole", "num_points": len(x), "degree": 3, "rows": errors},
    }


def ripples(x: np.ndarray) -> np.ndarray:
    r""":math:`\sin(3 \pi x_1 x_2)`, which is no finite sum of products: (points, 2) -> (points,)."""
    return np.sin(3 * math.pi * x[:, 0] * x[:, 1])


PARTS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "poisson": poisson_part,
    "tabular": tabular_part,
    "inversion": inversion_part,
    "speed": speed_part,
    "coverage": coverage_part,
    "fits": fits_part,
}


def _fitted(
    x: np.ndarray, y: np.ndarray, uncertainty: bool = False, **settings: Any
) -> tuple[KhronosModel, KhronosFit]:
    model = KhronosModel(KhronosConfig.for_data(x, **settings)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of few points in a quick trial
        return model, model.fit(x, y, uncertainty=uncertainty)


def _plain(result: Any) -> Any:
    """Dataclasses, also in a list, as JSON has them."""
    if isinstance(result, list):
        return [_plain(each) for each in result]
    return None if result is None else dataclasses.asdict(result)


def targets(record: Mapping[str, Any]) -> list[Target]:
    """The figures to reach, held against the record; those of Inconel 718 are in another.

    A part that is missing, or smaller than what was asked for, leaves its targets open.
    """
    rows = {name: record.get(name, {}).get("rows", []) for name in ("poisson", "inversion")}
    poisson = [
        row for row in rows["poisson"] if (row["problem"], row["method"], row["size"]) == ("kan", "khronos", 512)
    ]
    best = min(poisson, key=lambda row: row["squared_l2_error"], default={})
    found = [
        _at_most("squared L2 error of the Poisson problem with 512 parameters", 1e-13, best.get("squared_l2_error")),
        _at_most("seconds to solve it", 1.0, best.get("seconds")),
    ]
    for num_starts in (47, 64):
        times = [row["milliseconds"] for row in rows["inversion"] if row["num_starts"] == num_starts]
        found.append(_at_most(f"milliseconds of an inversion from {num_starts} starts", 5.0, max(times, default=None)))
    residuals = [row["worst_residual"] for row in rows["inversion"]]
    found.append(_at_most("largest residual of all points that it returns", 1e-6, max(residuals, default=None)))
    speed = record.get("speed", {})
    predict, memory, against = (speed.get(name, {}) for name in ("predict", "memory", "als_against_gradient"))
    whole = predict.get("num_points") == FULL.predict_points and predict.get("rank") == FULL.predict_rank
    ratio = against.get("ratio") if against.get("num_points") == 10_000 else None
    found += [
        Target(
            "times faster than by gradient a fit is to the same error, at least",
            ">= 20",
            ratio,
            None if ratio is None else ratio >= 20,
        ),
        _at_most("seconds to predict a million points", 2.0, predict["seconds"] if whole else None),
    ]
    for task in ("predict", "fit"):
        few, many = (
            [row for row in memory if (row["task"], row["num_points"]) == (task, num_points)]
            for num_points in FULL.memory_points
        )
        grown = None
        if few and many:
            before, after = few[0], many[0]
            grown = (after["peak_bytes"] - before["peak_bytes"]) / (after["table_bytes"] - before["table_bytes"])
        found.append(_at_most(f"bytes that {task} takes for each further byte of its table", FLAT, grown))
    return found


def _at_most(figure: str, bound: float, measured: float | None) -> Target:
    return Target(figure, f"<= {bound:g}", measured, None if measured is None else measured <= bound)


def run(out: Path, only: Sequence[str] | None = None, *, quick: bool = False) -> dict[str, Any]:
    """Measures the parts that ``out`` lacks, or those of ``only``, and writes its record after each.

    Raises:
        ValueError: If a part is unknown, or ``out`` holds a record of the other size.
    """
    if unknown := [name for name in only or () if name not in PARTS]:
        raise ValueError(f"parts: {', '.join(unknown)} unknown; expected some of {', '.join(PARTS)}.")
    path = out / RECORD
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"quick": quick}
    if record["quick"] != quick:
        raise ValueError(f"{path} was made {'with' if record['quick'] else 'without'} --quick; give another --out.")
    for name in only if only is not None else [name for name in PARTS if name not in record]:
        start = time.perf_counter()
        part = PARTS[name](QUICK if quick else FULL)
        record[name] = {**part, "seconds": time.perf_counter() - start, "provenance": provenance()}
        record["targets"] = _plain(targets(record))
        write_json(path, record)
    return record


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/khronos"), help=f"folder of {RECORD} and pictures")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="measure these parts, also if they are there")
    parser.add_argument("--quick", action="store_true", help="a trial at sizes too small to say anything")
    known = parser.parse_args(arguments)
    try:
        record = run(known.out, known.only, quick=known.quick)
        draw_all(known.out, record)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    for each in record["targets"]:
        told = {True: "reached", False: "not reached", None: "not measured"}[each["reached"]]
        measured = "-" if each["measured"] is None else f"{each['measured']:.3g}"
        print(f"{each['figure']}: {measured} ({each['asked']}), {told}")
    return record


if __name__ == "__main__":
    main()
