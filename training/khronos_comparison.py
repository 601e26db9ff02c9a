"""A method tuned and tested on splits of a table, and KHRONOS against the best of others."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import sem
from sklearn.base import clone
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold
from sklearn.pipeline import Pipeline
from sklearn.utils.parallel import Parallel, delayed
from tqdm.auto import tqdm

from training.inconel import Split
from training.khronos_peers import Distributions, Method, quiet, tune

NUM_FOLDS = 5
RIVALS = ("ridge", "gaussian_process", "xgboost")


@dataclass(frozen=True)
class Splits:
    """The ways to split a table's rows.

    Attributes:
        fixed: Whose training rows methods are tuned on.
        repeated: Random splits, of one size.
        walls: One for each group of rows, tested on all its rows.
    """

    fixed: Split
    repeated: Sequence[Split]
    walls: Sequence[Split]


@dataclass(frozen=True)
class Evaluation:
    """A method that was tuned for a property, tested on all splits.

    Attributes:
        method: Its name.
        estimator: The pipeline, fitted to the training rows of the fixed split.
        num_parameters: Numbers that its last step reads for a prediction.
        selected: The parameters that cross-validation chose.
        tuning_r2: Coefficient of determination in that cross-validation.
        fixed_r2: On the test rows of the fixed split.
        repeated_r2: On each repeated split, (repeats,).
        wall_predictions: Of each row by a fit without its wall, (N,).
        seconds: Time of it all.
    """

    method: str
    estimator: Pipeline
    num_parameters: int
    selected: dict[str, Any]
    tuning_r2: float
    fixed_r2: float
    repeated_r2: NDArray[np.float64]
    wall_predictions: NDArray[np.float64]
    seconds: float

    def row(self, y: NDArray[np.float64], splits: Splits) -> dict[str, Any]:
        """Its numbers for JSON."""
        squares = (self.wall_predictions - y) ** 2
        return {
            "method": self.method,
            "num_parameters": self.num_parameters,
            "selected": self.selected,
            "tuning_r2": self.tuning_r2,
            "fixed_r2": self.fixed_r2,
            "repeated": {
                "num_repeats": len(self.repeated_r2),
                "mean_r2": self.repeated_r2.mean(),
                "standard_deviation": self.repeated_r2.std(ddof=1),
                "standard_error": overlapping_error(self.repeated_r2, splits.repeated[0]),
            },
            "leave_one_wall_out": {
                "r2": r2_score(y, self.wall_predictions),
                "mean_squared_errors": [squares[rows].mean() for _, rows in splits.walls],
            },
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Verdict:
    """KHRONOS against the best of ``RIVALS`` on one kind of splits.

    Attributes:
        splits: Which.
        rival: The best of them there.
        difference: Coefficient of determination of KHRONOS less that of the rival.
        standard_error: Of the difference, paired.
        within_one_standard_error: Whether KHRONOS is above the rival, or below by no more than a standard error.
    """

    splits: str
    rival: str
    difference: float
    standard_error: float
    within_one_standard_error: bool


def evaluate(
    method: Method,
    distributions: Distributions,
    pipeline: Pipeline,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    splits: Splits,
    *,
    num_candidates: int,
    num_jobs: int,
    seed: int,
) -> Evaluation:
    """Tunes a method behind a pipeline on the training rows of the fixed split, and tests it on all splits.

    Args:
        method: The method.
        distributions: What to tune, as in :func:`training.khronos_peers.tune`.
        pipeline: Steps before it.
        x: Inputs (N, inputs).
        y: Values (N,).
        splits: Of the N rows.
        num_candidates: Settings to try.
        num_jobs: Processes.
        seed: Of folds, candidates and the method.

    Raises:
        ValueError: If ``num_candidates`` is below 1, or scikit-learn refuses the data.
    """
    started = time.perf_counter()
    train, test = splits.fixed
    search = tune(
        method,
        x[train],
        y[train],
        num_candidates=num_candidates,
        folds=KFold(NUM_FOLDS, shuffle=True, random_state=seed),
        seed=seed,
        n_jobs=num_jobs,
        pipeline=pipeline,
        distributions=distributions,
    )
    with quiet():
        rows = [*splits.repeated, *splits.walls]
        predict = delayed(_predict)
        work = Parallel(n_jobs=num_jobs, return_as="generator")(
            predict(clone(search.best_estimator_), x, y, *split) for split in rows
        )
        predictions = list(tqdm(work, method.name, len(rows), leave=False, unit=" fits", disable=None))
    wall_predictions = np.empty_like(y)
    for (_, rows), prediction in zip(splits.walls, predictions[len(splits.repeated) :], strict=True):
        wall_predictions[rows] = prediction
    return Evaluation(
        method=method.name,
        estimator=search.best_estimator_,
        num_parameters=method.count(search.best_estimator_[-1]),
        selected={name: _plain(value) for name, value in search.best_params_.items()},
        tuning_r2=search.best_score_,
        fixed_r2=r2_score(y[test], search.best_estimator_.predict(x[test])),
        repeated_r2=np.array(
            [r2_score(y[rows], predictions[repeat]) for repeat, (_, rows) in enumerate(splits.repeated)]
        ),
        wall_predictions=wall_predictions,
        seconds=time.perf_counter() - started,
    )


def _predict(estimator: Pipeline, x: NDArray, y: NDArray, train: NDArray, test: NDArray) -> NDArray[np.float64]:
    return estimator.fit(x[train], y[train]).predict(x[test])


def _plain(value: Any) -> Any:
    """A parameter for JSON: a kernel, for one, in words."""
    return value if isinstance(value, int | float | str | tuple) else str(value)


def overlapping_error(values: NDArray[np.float64], split: Split) -> float:
    r"""Standard error of a mean over J random splits, whose training and test sets overlap.

    :math:`\sqrt{(1/J + n_\text{test} / n_\text{train}) s^2}` with the variance s^2 of the values (C. Nadeau and Y.
    Bengio, Machine Learning 52, 2003).

    Args:
        values: One for each split, (J,), J at least 2.
        split: Any of them.
    """
    train, test = split
    return float(np.sqrt((1 / len(values) + len(test) / len(train)) * values.var(ddof=1)))


def compare_repeated(evaluations: dict[str, Evaluation], splits: Splits) -> Verdict:
    """KHRONOS against the rival of the best mean over the repeated splits."""
    rival = max(RIVALS, key=lambda name: evaluations[name].repeated_r2.mean())
    differences = evaluations["khronos"].repeated_r2 - evaluations[rival].repeated_r2
    return _verdict("repeated", rival, differences.mean(), overlapping_error(differences, splits.repeated[0]))


def compare_walls(evaluations: dict[str, Evaluation], y: NDArray[np.float64], splits: Splits) -> Verdict:
    r"""KHRONOS against the rival of the least squared error over all walls.

    The difference in the coefficient of determination is the mean over the W walls of
    :math:`W (E_w^\text{rival} - E_w^\text{KHRONOS}) / \sum (y - \bar y)^2`, where :math:`E_w` is a wall's sum of
    squared errors. The spread over the walls gives its standard error.
    """
    squares = {name: (evaluations[name].wall_predictions - y) ** 2 for name in ("khronos", *RIVALS)}
    rival = min(RIVALS, key=lambda name: squares[name].sum())
    saved = np.array([(squares[rival] - squares["khronos"])[rows].sum() for _, rows in splits.walls])
    differences = len(saved) * saved / ((y - y.mean()) ** 2).sum()
    return _verdict("leave_one_wall_out", rival, differences.mean(), sem(differences))


def _verdict(splits: str, rival: str, difference: float, standard_error: float) -> Verdict:
    within = bool(difference >= -standard_error)
    return Verdict(splits, rival, float(difference), float(standard_error), within)
