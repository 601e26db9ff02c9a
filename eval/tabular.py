r"""Tables: the test errors, sizes and times of KHRONOS and its peers, all tuned with the same budget.

Real sets come with scikit-learn; of the synthetic ones the truth is known (J. H. Friedman, Annals of Statistics 19
(1991), for friedman1 to 3, with the noise of L. Breiman, Machine Learning 24 (1996); :func:`borehole`). Every method is
tuned for each split by `training.khronos_peers.tune` on the training part alone, which alone it is refitted on, too.
`tabular_study` gives a row for each data set and method; `eval.khronos` writes them.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.datasets import (
    fetch_california_housing,
    load_diabetes,
    load_digits,
    make_friedman1,
    make_friedman2,
    make_friedman3,
)
from sklearn.decomposition import PCA
from sklearn.metrics import accuracy_score, r2_score, root_mean_squared_error
from sklearn.model_selection import KFold, StratifiedKFold, train_test_split
from sklearn.pipeline import Pipeline
from tqdm import tqdm

from eval.study import summed_up
from training.khronos_peers import CLASSIFIERS, REGRESSORS, Method, in_pipeline, tune

METHODS = ("khronos", "xgboost", "hist_gradient_boosting", "gaussian_process", "mlp", "ridge")
LINEAR = {"ridge": "logistic_regression"}  # what a method is called where labels are to be predicted
NUM_CANDIDATES = 8
NUM_FOLDS = 3
SEEDS = (0, 1, 2)
NUM_TRAIN, NUM_TEST = 500, 5000  # of synthetic sets
TEST_SHARE = 0.25  # of real ones
MOST_POINTS = {"gaussian_process": 1000}  # its work grows with the cube of their number
POINTS_TO_TIME = 10_000
MOST_PARITY = 300
NUM_INERT = 2  # inputs beside the borehole's
BOREHOLE = {
    "radius of borehole (m)": (0.05, 0.15),
    "radius of influence (m)": (100.0, 50_000.0),
    "transmissivity of upper aquifer (m^2/yr)": (63_070.0, 115_600.0),
    "head of upper aquifer (m)": (990.0, 1110.0),
    "transmissivity of lower aquifer (m^2/yr)": (63.1, 116.0),
    "head of lower aquifer (m)": (700.0, 820.0),
    "length of borehole (m)": (1120.0, 1680.0),
    "hydraulic conductivity of borehole (m/yr)": (9855.0, 12_045.0),
}
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Split:
    """Points (points, inputs) and values or labels (points,) to train on and to test on."""

    x_train: Array
    y_train: NDArray
    x_test: Array
    y_test: NDArray


@dataclass(frozen=True)
class Dataset:
    """A table to predict from.

    Attributes:
        name: As it stands in a row.
        split: Draws or splits it for a seed.
        classification: Whether labels are to be predicted.
        noise: Standard deviation of the noise in the values, below which no root mean squared error comes; None where
            it is not known.
        num_components: Numbers of principal components to choose from in tuning; empty takes the inputs as they are.
    """

    name: str
    split: Callable[[int], Split]
    classification: bool = False
    noise: float | None = None
    num_components: tuple[int, ...] = ()


@dataclass(frozen=True)
class TabularRun:
    """A method on a data set with one seed.

    Attributes:
        seed: Of the split, the candidates and the estimator.
        num_parameters: As `training.khronos_peers` counts them.
        tune_seconds: Of the whole search.
        fit_seconds: Of the last fit, to all of the training part.
        predict_seconds: Of ``POINTS_TO_TIME`` points.
        chosen: The parameters that the search chose.
        rmse, r2: On the test part; None in classification.
        accuracy: Likewise; None in regression.
    """

    seed: int
    num_parameters: int
    tune_seconds: float
    fit_seconds: float
    predict_seconds: float
    chosen: Mapping[str, str]
    rmse: float | None = None
    r2: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Parity:
    """Values of some test points, and what was predicted: (points,) each."""

    true: tuple[float, ...]
    predicted: tuple[float, ...]


@dataclass(frozen=True)
class TabularRow:
    """A method on a data set.

    Attributes:
        dataset, method: Names.
        num_train, num_test: Points; ``num_train`` are those that the method was given.
        num_inputs: Columns of the table.
        noise: That of the data set.
        num_candidates: That tuning could try; a smaller space was tried whole.
        runs: One for each seed.
        mean, standard_deviation: Over the runs, of each of their numbers by its name.
        parity: Of KHRONOS in regression and the first seed, else None.
        note: What a reader must know beside; where a data set cannot be had, there is nothing else.
    """

    dataset: str
    method: str | None
    num_train: int | None = None
    num_test: int | None = None
    num_inputs: int | None = None
    noise: float | None = None
    num_candidates: int | None = None
    runs: tuple[TabularRun, ...] = ()
    mean: Mapping[str, float] | None = None
    standard_deviation: Mapping[str, float] | None = None
    parity: Parity | None = None
    note: str = ""


def borehole(x: Array) -> Array:
    r"""Flow of water through a borehole in cubic metres a year: (points, inputs) -> (points,).

    .. math::
        \frac{2 \pi T_u (H_u - H_l)}
            {\ln(r / r_w) \big(1 + \frac{2 L T_u}{\ln(r / r_w)\, r_w^2 K_w} + T_u / T_l\big)}

    The inputs :math:`r_w, r, T_u, H_u, T_l, H_l, L, K_w` are in the order and units of ``BOREHOLE``, which holds their
    usual intervals (W. V. Harper and S. K. Gupta, BMI/ONWI-516, 1983; M. D. Morris et al., Technometrics 35 (1993)).
    Columns after these eight play no part; `datasets` has ``NUM_INERT`` of them, for a borehole of ten inputs.

    Raises:
        ValueError: If there are fewer than eight columns.
    """
    if x.ndim != 2 or x.shape[1] < len(BOREHOLE):
        raise ValueError(f"x has shape {x.shape}; expected (points, {len(BOREHOLE)} or more).")
    inner, outer, upper, upper_head, lower, lower_head, length, conductivity = x.T[: len(BOREHOLE)]
    logarithm = np.log(outer / inner)
    along = 2 * length * upper / (logarithm * inner**2 * conductivity)
    return 2 * math.pi * upper * (upper_head - lower_head) / (logarithm * (1 + along + upper / lower))


def borehole_points(num_points: int, seed: int) -> Array:
    """Uniform points (num_points, 10) in the intervals of ``BOREHOLE``, and in [0, 1] of the inert inputs."""
    low, high = np.array([*BOREHOLE.values(), *[(0.0, 1.0)] * NUM_INERT]).T
    return low + (high - low) * np.random.default_rng(seed).random((num_points, len(low)))


def datasets(num_train: int = NUM_TRAIN, num_test: int = NUM_TEST) -> tuple[Dataset, ...]:
    """All sets; ``num_train`` and ``num_test`` count the points of synthetic ones.

    California housing is not shipped with scikit-learn but downloaded by it, where it can be.
    """

    def drawn(make: Callable[..., tuple[Array, Array]], **options: float) -> Callable[[int], Split]:
        def split(seed: int) -> Split:
            x, y = make(n_samples=num_train + num_test, random_state=seed, **options)
            return Split(x[:num_train], y[:num_train], x[num_train:], y[num_train:])

        return split

    def flow(n_samples: int, random_state: int) -> tuple[Array, Array]:
        x = borehole_points(n_samples, random_state)
        return x, borehole(x)

    return (
        Dataset("diabetes", partial(_split_real, load_diabetes)),
        Dataset("friedman1", drawn(make_friedman1, noise=1.0), noise=1.0),
        Dataset("friedman2", drawn(make_friedman2, noise=125.0), noise=125.0),
        Dataset("friedman3", drawn(make_friedman3, noise=0.1), noise=0.1),
        Dataset("borehole", drawn(flow), noise=0.0),
        Dataset("california_housing", partial(_split_real, fetch_california_housing)),
        Dataset("digits", partial(_split_real, load_digits), classification=True, num_components=(8, 16, 32)),
    )


def _split_real(load: Callable[..., tuple[Array, NDArray]], seed: int) -> Split:
    x, y = load(return_X_y=True)
    labels = y if y.dtype.kind == "i" else None
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=TEST_SHARE, random_state=seed, stratify=labels)
    return Split(x_train, y_train, x_test, y_test)


def tabular_study(
    sets: Sequence[Dataset] | None = None,
    *,
    methods: Sequence[str] = METHODS,
    num_candidates: int = NUM_CANDIDATES,
    seeds: Sequence[int] = SEEDS,
    n_jobs: int = 1,
    progress: bool = True,
) -> list[TabularRow]:
    """Tunes and tests every method on every set with every seed.

    Args:
        sets: Of :func:`datasets`, all by default.
        methods: Names in `training.khronos_peers`; "ridge" is logistic regression where labels are to be predicted.
        num_candidates: Points of each method's space that its search tries, the same for all.
        seeds: Of splits, candidates and estimators.
        n_jobs: Processes of a search.
        progress: Show a progress bar.

    Returns:
        Rows in the order of sets and methods. A set that cannot be had has one row that says so.

    Raises:
        ValueError: If a method is unknown, or there are no seeds.
    """
    if unknown := [name for name in methods if name not in REGRESSORS]:
        raise ValueError(f"methods: {', '.join(unknown)} unknown; expected some of {', '.join(METHODS)}.")
    if not seeds:
        raise ValueError("seeds is empty; expected at least one.")
    sets = datasets() if sets is None else sets
    rows = []
    with tqdm(total=len(sets) * len(methods), desc="tabular", unit="row", disable=not progress) as bar:
        for data in sets:
            try:
                splits = [data.split(seed) for seed in seeds]
            except OSError as error:
                bar.update(len(methods))
                rows.append(TabularRow(data.name, None, note=f"cannot be had: {error}"))
                continue
            for name in methods:
                bar.set_postfix_str(f"{data.name}, {name}")
                rows.append(_row(data, name, splits, seeds, num_candidates, n_jobs))
                bar.update()
    return rows


def _row(
    data: Dataset, name: str, splits: Sequence[Split], seeds: Sequence[int], num_candidates: int, n_jobs: int
) -> TabularRow:
    method = CLASSIFIERS[LINEAR.get(name, name)] if data.classification else REGRESSORS[name]
    num_given = min(len(splits[0].x_train), MOST_POINTS.get(name, len(splits[0].x_train)))
    runs, parity = [], None
    for seed, split in zip(seeds, splits, strict=True):
        given = np.random.default_rng(seed).permutation(len(split.x_train))[:num_given]
        run, predicted = _run(data, method, split, given, seed, num_candidates, n_jobs)
        runs.append(run)
        if parity is None and name == "khronos" and not data.classification:
            parity = Parity(*(tuple(values[:MOST_PARITY].tolist()) for values in (split.y_test, predicted)))
    summaries = {
        field: summed_up([getattr(run, field) for run in runs])
        for field, value in vars(runs[0]).items()
        if isinstance(value, int | float) and field != "seed"
    }
    return TabularRow(
        data.name,
        method.name,
        num_train=num_given,
        num_test=len(splits[0].x_test),
        num_inputs=splits[0].x_train.shape[1],
        noise=data.noise,
        num_candidates=num_candidates,
        runs=tuple(runs),
        mean={field: each["mean"] for field, each in summaries.items()},
        standard_deviation={field: each["standard_deviation"] for field, each in summaries.items()},
        parity=parity,
        note=f"given {num_given} of {len(splits[0].x_train)} points" if num_given < len(splits[0].x_train) else "",
    )


def _run(
    data: Dataset, method: Method, split: Split, given: NDArray, seed: int, num_candidates: int, n_jobs: int
) -> tuple[TabularRun, NDArray]:
    """The run, and predictions for the test part."""
    pipeline = distributions = None
    if data.num_components:
        pipeline = Pipeline([("pca", PCA(random_state=seed))])
        distributions = in_pipeline(method.distributions, pca__n_components=list(data.num_components))
    folds = (StratifiedKFold if data.classification else KFold)(NUM_FOLDS, shuffle=True, random_state=seed)
    start = time.perf_counter()
    search = tune(
        method,
        split.x_train[given],
        split.y_train[given],
        num_candidates=num_candidates,
        folds=folds,
        seed=seed,
        n_jobs=n_jobs,
        pipeline=pipeline,
        distributions=distributions,
    )
    tune_seconds = time.perf_counter() - start
    best = search.best_estimator_
    predicted = best.predict(split.x_test)
    if data.classification:
        scores = {"accuracy": float(accuracy_score(split.y_test, predicted))}
    else:
        rmse, r2 = (float(score(split.y_test, predicted)) for score in (root_mean_squared_error, r2_score))
        scores = {"rmse": rmse, "r2": r2}
    run = TabularRun(
        seed,
        num_parameters=method.count(best if pipeline is None else best[-1]),
        tune_seconds=tune_seconds,
        fit_seconds=float(search.refit_time_),
        predict_seconds=seconds_to_predict(best, split.x_test),
        chosen={name: str(value) for name, value in search.best_params_.items()},
        **scores,
    )
    return run, predicted


def seconds_to_predict(model: BaseEstimator, x: Array) -> float:
    """Median of three predictions of ``POINTS_TO_TIME`` points, x (points, inputs) over and over, after one."""
    points = np.resize(x, (POINTS_TO_TIME, x.shape[1]))
    times = []
    for _ in range(4):
        start = time.perf_counter()
        model.predict(points)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
