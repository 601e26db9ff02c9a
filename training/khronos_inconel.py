"""Mechanical properties of Inconel 718 from scalograms by KHRONOS and its peers, and scalograms from a property.

    python -m training.khronos_inconel --data FOLDER --out runs/inconel

``FOLDER`` has the layout of :mod:`training.inconel`. Logarithms of the scalograms -> principal components, fitted
inside each fold -> standardised scores -> model. Every method is tuned by the same number of candidates on the
training points of Xie et al., then tested on their split, on repeated random splits, and on each wall in turn.

Then yield stress and ultimate tensile strength of one point, left out of the fit, are inverted to scalograms.

    OUT/inconel.json             every number
    OUT/inversion.safetensors    predictions of each wall, scalograms of the inversions, for pictures
    OUT/<property>/              the inverted model, with the map from scalograms to its inputs and back
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from scipy.stats import truncnorm
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.dummy import DummyRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from leviathan.khronos import KhronosModel
from sna_core.inversion import InversionResult
from sna_core.prior import GaussianPrior
from training import inconel
from training.khronos_comparison import NUM_FOLDS, RIVALS, Splits, compare_repeated, compare_walls, evaluate
from training.khronos_peers import REGRESSORS, Distributions, Method, in_pipeline, sized
from training.provenance import provenance, relative, write_json

FeatureKind = Literal["scalograms", "scalograms+bins", "histories"]

SIZE = 64  # of a scalogram
GAIN = 100.0  # features are log(1 + GAIN * scalogram)
COMPONENTS = [4, 6, 8, 12]
KAN_STEPS = {"regressor__kanregressor__num_steps": [1, 2, 5]}  # more fit the noise
KAN_REPEATS = 50  # at most: it takes as long as all others together
LEFT_OUT = "3_g"
NUM_TIMED = 50
QUANTILES = (0.05, 0.95)

NOTES = (
    "The points that a method was tuned on are also test points of repeated and leave-one-wall-out splits, alike for "
    "all methods.",
    "num_parameters leaves out the principal components and the scales of their scores, which all methods read.",
    "Test sets of repeated splits overlap: their standard errors are Nadeau's and Bengio's.",
    f"The raw history of {LEFT_OUT} is not public: inversions lead to its scalogram. The curve over time is the mean "
    "over the frequencies.",
    f"{LEFT_OUT} is left out of the inverted models; it was among the points that their sizes were tuned on.",
    "Inversions start all over the box of the scores (box), or at draws from the scores' normal distribution in it "
    "(normal), or go on to the most probable solution (prior). Distances are Mahalanobis' from the scores' mean.",
)


@dataclass(frozen=True)
class Property:
    """What is predicted.

    Attributes:
        name: Column of :class:`training.inconel.InconelTable`.
        unit: Of it.
        num_parameters: Most parameters that KHRONOS, MLP and KAN may have.
        published_parameters: Of KHRONOS in arXiv 2603.12244; None where it is not said.
        published_r2: Its test score there, of one split.
        num_starts: Of the inversion; None where it is not inverted.
    """

    name: str
    unit: str
    num_parameters: int
    published_parameters: int | None
    published_r2: float
    num_starts: int | None = None


PROPERTIES = (
    Property("yield_stress", "MPa", 240, 240, 0.76, 47),
    Property("uts", "MPa", 108, 108, 0.70, 64),
    Property("modulus", "GPa", 108, None, 0.14),
)


@dataclass(frozen=True)
class Features:
    """Logarithms of scalograms, and of counts of temperatures behind them, as N coordinates in their own span.

    Principal components and distances are the same as of the features themselves.

    Attributes:
        coordinates: (N, directions).
        mean: Of the features, (features,).
        directions: Orthonormal rows (directions, features).
    """

    coordinates: NDArray[np.float64]
    mean: NDArray[np.float64]
    directions: NDArray[np.float64]

    def scalograms(self, coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
        """The scalograms (points, SIZE, SIZE) of coordinates (points, directions)."""
        values = self.mean + coordinates @ self.directions
        return np.expm1(values[:, : SIZE * SIZE]).reshape(-1, SIZE, SIZE) / GAIN


@dataclass(frozen=True)
class Inversion:
    """Scalograms with a given property.

    Attributes:
        found: The inversion's result; its x are standardised scores.
        scalograms: Of the solutions, (solutions, SIZE, SIZE).
        milliseconds: Of each timed run of all starts together.
    """

    found: InversionResult
    scalograms: NDArray[np.float64]
    milliseconds: NDArray[np.float64]


def read_features(folder: Path, table: inconel.InconelTable, kind: FeatureKind) -> Features:
    """Reads the features of the table's points: log(1 + 100 X) of scalograms X and, where asked for, log(1 + n) of the
    counts n of temperatures, weighted so that both blocks would count alike at equal variance.

    With ``"histories"`` the scalograms are wavelet transforms of the raw series, over the largest of their values. The
    public copy has the series of one wall alone.

    Raises:
        ValueError: If a file is missing or not as expected.
    """
    if kind == "histories":
        histories = inconel.read_histories(folder)
        if missing := [name for name in table.names if name not in histories]:
            raise ValueError(
                f"{len(missing)} of {len(table)} points have no raw series, {missing[0]} among them; complete "
                "thermal_history, or take --features scalograms."
            )
        transforms = [inconel.shrink(inconel.scalogram(histories[name]), SIZE) for name in tqdm(table.names)]
        scalograms = np.stack(transforms).reshape(len(table), -1)
        scalograms /= scalograms.max()
    else:
        scalograms = inconel.read_scalograms(folder, table, SIZE)
    values = np.log1p(GAIN * scalograms)
    if kind == "scalograms+bins":
        counts = np.log1p(inconel.read_bins(folder, table))
        values = np.hstack([values, counts * np.sqrt(values.shape[1] / counts.shape[1])])
    mean = values.mean(0)
    left, sizes, directions = np.linalg.svd(values - mean, full_matrices=False)
    return Features(left * sizes, mean, directions)


def candidates(limit: int) -> Iterator[tuple[Method, Distributions]]:
    """Each method with what it is tuned over; those with a size to set have at most ``limit`` parameters."""
    shapes = [{"num_cells": [cells], "degree": [degree]} for cells, degree in ((1, 2), (1, 3), (2, 2))]
    choices = {"khronos": [{"rank": [2, 3, 4], **shape} for shape in shapes], "mlp": [{}], "kan": [KAN_STEPS]}
    for name in ("khronos", *RIVALS, "mlp", "kan"):
        if name not in choices:
            yield REGRESSORS[name], in_pipeline(REGRESSORS[name].distributions, pca__n_components=COMPONENTS)
            continue
        spaces = []
        for components in COMPONENTS:
            for values in choices[name]:
                small = sized(name, components, limit, **values).distributions
                spaces += in_pipeline(small, pca__n_components=[components])
        yield REGRESSORS[name], spaces
    mean = Method("mean", lambda seed: DummyRegressor(), {}, lambda model: 1)
    yield mean, [{"pca__n_components": COMPONENTS[:1]}]


def invert(
    estimator: Pipeline, features: Features, target: float, num_starts: int, seed: int = 0
) -> dict[str, Inversion]:
    """Finds scalograms of which the fitted pipeline predicts ``target``, in the box of its training scores.

    From ``box``, starts all over the box, solutions may be far from every point. Starts of ``normal`` are drawn from
    the normal distribution of the scores in the box, and those of ``prior`` go on to the most probable solution.
    The time is that of a run after another to warm up.
    """
    model: KhronosModel = estimator["model"].model_
    low, high = model.config.input_low, model.config.input_high
    draws = truncnorm.rvs(low, high, size=(num_starts, len(low)), random_state=seed)
    # Standardised scores of principal components have means of 0 and a unit covariance.
    prior = GaussianPrior.independent(np.zeros(len(low)), np.ones(len(low)))
    searches = {
        "box": {"num_starts": num_starts},
        "normal": {"starts": torch.from_numpy(draws)},
        "prior": {"num_starts": num_starts, "prior": prior},
    }
    inversions = {}
    for search, options in searches.items():
        found = model.invert(target, seed=seed, **options)
        milliseconds = []
        for repeat in range(NUM_TIMED):
            started = time.perf_counter()
            model.invert(target, seed=seed + repeat, **options)
            milliseconds.append(1000 * (time.perf_counter() - started))
        scalograms = np.empty((0, SIZE, SIZE))
        if len(found.solutions):
            scalograms = features.scalograms(estimator[:-1].inverse_transform(found.solutions.numpy()))
        inversions[search] = Inversion(found, scalograms, np.array(milliseconds))
    return inversions


def curve(scalograms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the frequencies: (..., SIZE, SIZE) -> (..., SIZE), over time."""
    return scalograms.mean(-2)


def run(
    data: Path,
    out: Path,
    *,
    num_repeats: int = 300,
    num_candidates: int = 24,
    features: FeatureKind = "scalograms",
    num_jobs: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """Does the job and writes what the module says to ``out``.

    Args:
        data: Folder of the data.
        out: Folder of the results.
        num_repeats: Repeated splits, at least 2.
        num_candidates: Settings of each method that are tried.
        features: What the inputs are made of.
        num_jobs: Processes.
        seed: Of splits, folds, candidates and starts.

    Returns:
        What ``inconel.json`` holds.

    Raises:
        ValueError: If a number is out of range, or the data are missing or not as :mod:`training.inconel` expects.
    """
    if num_repeats < 2:
        raise ValueError(f"num_repeats = {num_repeats}; expected at least 2, for a standard error.")
    table = inconel.read_points(data)
    (point,) = table.rows([LEFT_OUT])
    (fixed,) = inconel.fixed_split(table)
    repeated = inconel.repeated_splits(table, num_repeats, len(fixed[1]), seed)
    splits = Splits(fixed, repeated, inconel.leave_one_wall_out(table))
    points = read_features(data, table, features)

    properties, inversions = {}, []
    truth = points.scalograms(points.coordinates[[point]])[0]
    arrays = {"wall": table.wall, "left_out.scalogram": truth, "left_out.curve": curve(truth)}
    methods = {prop: list(candidates(prop.num_parameters)) for prop in PROPERTIES}
    with tqdm(total=sum(map(len, methods.values())), unit=" methods", disable=None) as progress:
        for prop in PROPERTIES:
            y, evaluations = getattr(table, prop.name), {}
            for method, distributions in methods[prop]:
                progress.set_description(f"{prop.name}, {method.name}")
                evaluations[method.name] = evaluate(
                    method,
                    distributions,
                    Pipeline([("pca", PCA(svd_solver="full")), ("scores", StandardScaler())]),
                    points.coordinates,
                    y,
                    replace(splits, repeated=repeated[:KAN_REPEATS]) if method.name == "kan" else splits,
                    num_candidates=num_candidates,
                    num_jobs=num_jobs,
                    seed=seed,
                )
                progress.update()
            verdicts = [compare_repeated(evaluations, splits), compare_walls(evaluations, y, splits)]
            properties[prop.name] = {
                **asdict(prop),
                "methods": [evaluation.row(y, splits) for evaluation in evaluations.values()],
                "verdicts": [asdict(verdict) for verdict in verdicts],
            }
            arrays[f"{prop.name}.measured"] = y
            for name, evaluation in evaluations.items():
                arrays[f"{prop.name}.predicted.{name}"] = evaluation.wall_predictions
            if prop.num_starts is not None:
                estimator = clone(evaluations["khronos"].estimator)
                estimator.fit(np.delete(points.coordinates, point, axis=0), np.delete(y, point))
                _save_model(estimator, points, out / prop.name)
                for search, inversion in invert(estimator, points, y[point], prop.num_starts, seed).items():
                    row, pictures = _describe(inversion, estimator, points.coordinates[[point]], curve(truth))
                    inversions.append({"property": prop.name, "target": y[point], "search": search, **row})
                    arrays |= {f"{prop.name}.{search}.{name}": values for name, values in pictures.items()}
    report = {
        "data": relative(data),
        "features": features,
        "num_points": len(table),
        "walls": np.unique(table.wall).tolist(),
        "num_candidates": num_candidates,
        "num_folds": NUM_FOLDS,
        "left_out": LEFT_OUT,
        "notes": NOTES,
        "properties": properties,
        "inversions": inversions,
        "provenance": provenance(seed),
    }
    _save(out / "inversion.safetensors", arrays)
    write_json(out / "inconel.json", report)
    return report


def _describe(
    inversion: Inversion, estimator: Pipeline, point: NDArray[np.float64], truth: NDArray[np.float64]
) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Numbers and arrays of an inversion; ``point`` (1, directions) and ``truth`` are the left-out point's."""
    found = inversion.found
    row = {
        "num_starts": found.num_starts,
        "num_solutions": len(found.solutions),
        "num_unsolved": int((~found.converged).sum()),
        "worst_residual": float(found.residual.max()),  # of what did not converge too
        "milliseconds": float(np.median(inversion.milliseconds)),
        "num_timed": len(inversion.milliseconds),
        "predicted_for_left_out": float(estimator.predict(point).item()),
        "distance_of_left_out": float(np.linalg.norm(estimator[:-1].transform(point))),
    }
    if not len(found.solutions):
        return row, {}
    distances = found.solutions.norm(dim=-1)
    curves = curve(inversion.scalograms)
    low, high = np.quantile(curves, QUANTILES, axis=0)
    row |= {
        "largest_residual": float(found.residual[found.converged].max()),
        "distances": {name: float(getattr(distances, name)()) for name in ("min", "median", "max")},
        "quantiles": QUANTILES,
        "truth_within_envelope": float(((low <= truth) & (truth <= high)).mean()),
        "error_of_mean_curve": float(np.linalg.norm(curves.mean(0) - truth) / np.linalg.norm(truth)),
    }
    envelope = np.stack([curves.mean(0), low, high])
    return row, {"scores": found.solutions.numpy(), "scalograms": inversion.scalograms, "envelope": envelope}


def _save_model(estimator: Pipeline, features: Features, folder: Path) -> None:
    """The model, and ``features.safetensors``: its inputs are (features - mean) @ projection."""
    estimator["model"].model_.save_pretrained(folder)
    pca, scaler = estimator["pca"], estimator["scores"]
    shift = pca.mean_ + scaler.mean_ @ pca.components_
    arrays = {
        "mean": features.mean + shift @ features.directions,
        "projection": features.directions.T @ pca.components_.T / scaler.scale_,
        "reconstruction": scaler.scale_[:, None] * pca.components_ @ features.directions,
    }
    _save(folder / "features.safetensors", arrays)


def _save(path: Path, arrays: dict[str, NDArray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({name: np.ascontiguousarray(values, dtype=np.float32) for name, values in arrays.items()}, partial)
    partial.replace(path)


def _print(report: dict[str, Any]) -> None:
    for name, prop in report["properties"].items():
        print(f"\n{name:16s} parameters  fixed  repeated        walls   (coefficients of determination)")
        for row in prop["methods"]:
            repeated, walls = row["repeated"], row["leave_one_wall_out"]
            print(
                f"{row['method']:16s} {row['num_parameters']:10d} {row['fixed_r2']:6.3f} {repeated['mean_r2']:6.3f} "
                f"± {repeated['standard_error']:.3f} {walls['r2']:6.3f}"
            )
        for verdict in prop["verdicts"]:
            print(
                f"{verdict['splits']}: KHRONOS less {verdict['rival']} {verdict['difference']:+.3f} "
                f"± {verdict['standard_error']:.3f}"
            )
    print()
    for row in report["inversions"]:
        print(
            f"{row['property']} = {row['target']:.1f} by {row['search']}: {row['num_solutions']} solutions from "
            f"{row['num_starts']} starts in {row['milliseconds']:.1f} ms"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data of Xie et al.")
    parser.add_argument("--out", type=Path, default=Path("runs/khronos/inconel"), help="folder for the results")
    parser.add_argument("--num-repeats", type=int, default=300, help="random splits")
    parser.add_argument("--num-candidates", type=int, default=24, help="settings to try for each method")
    parser.add_argument("--features", choices=get_args(FeatureKind), default="scalograms")
    parser.add_argument("--num-jobs", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    try:
        report = run(options.pop("data"), options.pop("out"), **options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    _print(report)


if __name__ == "__main__":
    main()
