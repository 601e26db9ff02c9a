"""What KHRONOS is measured against, how each method is tuned, and how many numbers its predictions read.

Every method is searched by the same number of candidates on the same folds. Parameters are counted alike: all numbers
that were learned from the data and that a prediction reads, with mean and standard deviation of the outputs where a
method standardises them; numbers that place the inputs (a box, their means and deviations) are counted for none.
"""

import contextlib
import io
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import loguniform
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, Kernel, Matern, WhiteKernel
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import ParameterGrid, RandomizedSearchCV
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from xgboost import XGBClassifier, XGBRegressor

from leviathan.integrations.sklearn import KhronosClassifier, KhronosRegressor

Distributions = dict[str, Any] | list[dict[str, Any]]
"""Lists or scipy distributions of values by the parameters' names, or several such dictionaries to choose from."""

KAN_DEGREE = 3
KAN_PER_EDGE = KAN_DEGREE + 2  # beside the cells: the scales of the spline and of its base function
STANDARDISING = 2  # numbers of an output


@dataclass(frozen=True)
class Method:
    """A method of regression or classification.

    Attributes:
        name: As in ``REGRESSORS`` or ``CLASSIFIERS``.
        make: Gives the unfitted estimator for a seed.
        distributions: What :func:`tune` draws its parameters from.
        count: How many numbers a prediction of the fitted estimator reads.
    """

    name: str
    make: Callable[[int], BaseEstimator]
    distributions: Distributions
    count: Callable[[BaseEstimator], int]


def tune(
    method: Method,
    x: ArrayLike,
    y: ArrayLike,
    *,
    num_candidates: int,
    folds: Any,
    seed: int,
    n_jobs: int = 1,
    pipeline: Pipeline | None = None,
    distributions: Distributions | None = None,
) -> RandomizedSearchCV:
    """Searches a method's parameters at random by cross-validation, and fits the best to all points.

    A space with fewer points than ``num_candidates`` is searched whole. Warnings of searches that end early are left
    out: every method then has what its iterations gave.

    Args:
        method: The method.
        x: Points (points, inputs).
        y: Values or labels.
        num_candidates: Points of the space to try.
        folds: What scikit-learn takes as ``cv``: a number of folds, a splitter, or pairs of row numbers.
        seed: Of the candidates and of the estimator.
        n_jobs: Processes.
        pipeline: Steps before the estimator, fitted inside each fold; the estimator becomes the step ``model``.
        distributions: In place of the method's. With a pipeline, names have its form: ``pca__n_components``,
            ``model__alpha``.

    Returns:
        The fitted search: ``best_estimator_``, ``best_params_``, ``best_score_`` and ``cv_results_``.

    Raises:
        ValueError: If ``num_candidates`` is below 1, or scikit-learn refuses the data or the folds.
    """
    if num_candidates < 1:
        raise ValueError(f"num_candidates = {num_candidates}; expected at least 1.")
    estimator = method.make(seed)
    if pipeline is not None:
        estimator = Pipeline([*pipeline.steps, ("model", estimator)])
    if distributions is None:
        distributions = method.distributions if pipeline is None else in_pipeline(method.distributions)
    spaces = distributions if isinstance(distributions, list) else [distributions]
    if all(isinstance(values, list) for space in spaces for values in space.values()):
        num_candidates = min(num_candidates, len(ParameterGrid(spaces)))
    search = RandomizedSearchCV(
        estimator, spaces, n_iter=num_candidates, cv=folds, random_state=seed, n_jobs=n_jobs, error_score="raise"
    )
    with quiet():
        return search.fit(x, y)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leaves out warnings of iterations that end early or at the bounds of their space."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def in_pipeline(distributions: Distributions, **others: list) -> list[dict[str, Any]]:
    """The distributions of a pipeline's last step ``model``, beside those of ``others``."""
    spaces = distributions if isinstance(distributions, list) else [distributions]
    return [{**others, **{f"model__{name}": values for name, values in space.items()}} for space in spaces]


def sized(name: str, num_inputs: int, num_parameters: int, **values: list) -> Method:
    """A regressor of one output with at most ``num_parameters`` parameters, for as many inputs.

    KHRONOS chooses from the ranks, cells and degrees of its distributions that are small enough; the MLP has the
    widest hidden layer that is, and the KAN for each number of cells.

    Args:
        name: ``khronos``, ``mlp`` or ``kan``.
        num_inputs: Of its data.
        num_parameters: As ``Method.count`` counts them.
        **values: Lists in place of those of the method's distributions.

    Raises:
        ValueError: If the method has no size to set, or none is small enough.
    """
    if name not in ("khronos", "mlp", "kan"):
        raise ValueError(f"method {name!r} has no number of parameters to set; expected khronos, mlp or kan.")
    method, room = REGRESSORS[name], num_parameters - STANDARDISING
    space = {**method.distributions, **values}
    if name == "khronos":
        sizes = list(ParameterGrid({size: space[size] for size in ("rank", "num_cells", "degree")}))
        sizes = [size for size in sizes if num_inputs * (size["num_cells"] + size["degree"]) * size["rank"] <= room]
    elif name == "mlp":
        width = (room - 1) // (num_inputs + 2)  # a node has its weights and a bias, the output one more bias
        sizes = [{"regressor__mlpregressor__hidden_layer_sizes": (width,)}] if width >= 1 else []
    else:
        sizes = []
        for num_cells in space["regressor__kanregressor__num_cells"]:
            width = room // ((num_inputs + 1) * (num_cells + KAN_PER_EDGE))
            if width >= 1:
                size = {"regressor__kanregressor__width": width, "regressor__kanregressor__num_cells": num_cells}
                sizes.append(size)
    if not sizes:
        raise ValueError(
            f"no {name} of {num_inputs} inputs has at most {num_parameters} parameters; allow more, or give fewer "
            "inputs."
        )
    spaces = [{**space, **{key: [value] for key, value in size.items()}} for size in sizes]
    return replace(method, distributions=spaces)


class KANRegressor(RegressorMixin, BaseEstimator):
    """A Kolmogorov-Arnold network of one hidden layer, by pykan and its L-BFGS, for standardised data.

    Grids follow the training data, as in pykan by default. Its optimizer makes so much of rounding that two fits of one
    seed agree to a few digits only.

    Args:
        width: Hidden nodes.
        num_cells: Cells of each spline.
        penalty: Strength of pykan's penalty on sums and entropy of the edges.
        num_steps: Steps of the optimizer, of 20 iterations each.
        random_state: Of the start.

    Attributes:
        model_: The fitted ``kan.KAN``.
        n_features_in_: Number of inputs.
    """

    def __init__(
        self,
        width: int = 3,
        num_cells: int = 3,
        *,
        penalty: float = 0.0,
        num_steps: int = 20,
        random_state: int | np.random.RandomState | None = None,
    ):
        self.width = width
        self.num_cells = num_cells
        self.penalty = penalty
        self.num_steps = num_steps
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> "KANRegressor":
        """Fits to X (samples, features) and y (samples,).

        Raises:
            ValueError: If a value is not finite or a shape does not fit.
            ImportError: If pykan is missing.
        """
        try:
            from kan import KAN
        except ImportError as error:
            raise ImportError("a KAN needs pykan; install this project with its extra `khronos`.") from error
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        points, values = torch.tensor(X), torch.tensor(y).unsqueeze(-1)
        data = {"train_input": points, "train_label": values, "test_input": points, "test_label": values}
        with _own_random_numbers(), contextlib.redirect_stderr(io.StringIO()):  # where its bar goes
            self.model_ = KAN(
                width=[X.shape[1], self.width, 1],
                grid=self.num_cells,
                k=KAN_DEGREE,
                seed=int(check_random_state(self.random_state).randint(2**31 - 1)),
                auto_save=False,
            ).double()
            self.model_.fit(data, steps=self.num_steps, lamb=self.penalty)
        self.model_.save_act = False  # predictions need no statistics of the edges
        return self

    @torch.no_grad()
    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """Predictions (samples,) for X (samples, features)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return self.model_(torch.tensor(X)).squeeze(-1).numpy()


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Keeps pykan's seeding of the process's generators from the rest of it."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002


def _standardised(regressor: BaseEstimator) -> BaseEstimator:
    """A regressor of standardised inputs and outputs."""
    return TransformedTargetRegressor(make_pipeline(StandardScaler(), regressor), transformer=StandardScaler())


def _kernels() -> list[Kernel]:
    """Smoother and rougher functions of one length, alone and around a linear one."""
    shapes = (RBF(3.0, (1e-2, 1e3)), *(Matern(3.0, (1e-2, 1e3), nu=nu) for nu in (0.5, 1.5, 2.5)))
    shapes = (*shapes, *(shape + DotProduct() for shape in shapes))
    return [ConstantKernel(1.0, (1e-3, 1e3)) * shape + WhiteKernel(0.1, (1e-6, 10.0)) for shape in shapes]


def _fixed_kernels() -> list[Kernel]:
    """Of classification, where `tune` chooses the scales, too: to maximise the likelihood takes minutes a class."""
    lengths, amplitudes = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0), (1.0, 10.0, 100.0)
    shapes = [shape for length in lengths for shape in (RBF(length), Matern(length, nu=1.5))]
    return [ConstantKernel(amplitude) * shape for amplitude in amplitudes for shape in shapes]


def _count_khronos(model: KhronosRegressor) -> int:
    return model.model_.num_fitted


def _count_khronos_classes(model: KhronosClassifier) -> int:
    return sum(parameter.numel() for parameter in model.model_.parameters())


def _count_linear(model: Pipeline) -> int:
    return model[-1].coef_.size + np.size(model[-1].intercept_)


def _count_process(model: Pipeline) -> int:
    process = model[-1]
    num_outputs = process.alpha_.size // len(process.alpha_)
    points = process.X_train_.size + process.alpha_.size
    return points + process.kernel_.theta.size + STANDARDISING * num_outputs


def _count_process_classes(model: Pipeline) -> int:
    one_by_one = getattr(model[-1].base_estimator_, "estimators_", [model[-1].base_estimator_])
    # Each class has the residual and the weight of every point, and the kernel's numbers.
    return one_by_one[0].X_train_.size + sum(2 * len(one.X_train_) + one.kernel_.theta.size for one in one_by_one)


def _count_xgboost(model: XGBRegressor | XGBClassifier) -> int:
    trees = model.get_booster().get_dump()
    base_scores = len(np.atleast_1d(model.intercept_))
    return base_scores + sum(_numbers_of_tree(tree.count("leaf=")) for tree in trees)


def _count_hist(model: HistGradientBoostingRegressor | HistGradientBoostingClassifier) -> int:
    trees = [tree for trees in model._predictors for tree in trees]
    base_scores = len(model._predictors[0])
    return base_scores + sum(_numbers_of_tree(tree.get_n_leaf_nodes()) for tree in trees)


def _numbers_of_tree(num_leaves: int) -> int:
    """A split holds an input and a threshold, a leaf a value; where its children are follows from their order."""
    return 2 * (num_leaves - 1) + num_leaves


def _count_network(model: TransformedTargetRegressor) -> int:
    return _count_layers(model.regressor_) + STANDARDISING * model.transformer_.scale_.size


def _count_layers(model: Pipeline) -> int:
    return sum(part.size for part in (*model[-1].coefs_, *model[-1].intercepts_))


def _count_kan(model: TransformedTargetRegressor) -> int:
    layers = model.regressor_[-1].model_.act_fun
    return STANDARDISING + sum(part.numel() for part in layers.parameters() if part.requires_grad)


_KHRONOS_SIZES = {"rank": [1, 2, 3, 4, 6, 8], "num_cells": [1, 2, 4, 8], "degree": [1, 2, 3]}
_XGBOOST = {
    "n_estimators": [50, 100, 200, 400],
    "learning_rate": loguniform(0.02, 0.3),
    "max_depth": [1, 2, 3, 4, 6],
    "min_child_weight": [1, 3, 10],
    "subsample": [0.6, 0.8, 1.0],
    "colsample_bytree": [0.6, 0.8, 1.0],
    "reg_lambda": loguniform(0.1, 10.0),
}
_HIST = {
    "max_iter": [50, 100, 200, 400],
    "learning_rate": loguniform(0.02, 0.3),
    "max_leaf_nodes": [3, 7, 15, 31],
    "min_samples_leaf": [5, 10, 20],
    "l2_regularization": loguniform(1e-3, 10.0),
}
_WIDTHS = [(4,), (8,), (16,), (32,), (64,), (32, 32)]

REGRESSORS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "khronos",
            lambda seed: KhronosRegressor(random_state=seed),
            {**_KHRONOS_SIZES, "smoothness": loguniform(0.1, 10.0)},
            _count_khronos,
        ),
        Method(
            "ridge",
            lambda seed: make_pipeline(StandardScaler(), Ridge()),
            {"ridge__alpha": loguniform(1e-2, 1e3)},
            _count_linear,
        ),
        Method(
            "gaussian_process",
            lambda seed: make_pipeline(
                StandardScaler(),
                GaussianProcessRegressor(_kernels()[0], normalize_y=True, n_restarts_optimizer=1, random_state=seed),
            ),
            {"gaussianprocessregressor__kernel": _kernels()},
            _count_process,
        ),
        Method("xgboost", lambda seed: XGBRegressor(n_jobs=1, random_state=seed), _XGBOOST, _count_xgboost),
        Method(
            "hist_gradient_boosting",
            lambda seed: HistGradientBoostingRegressor(random_state=seed),
            _HIST,
            _count_hist,
        ),
        Method(
            "mlp",
            lambda seed: _standardised(MLPRegressor(solver="lbfgs", max_iter=500, random_state=seed)),
            {
                "regressor__mlpregressor__hidden_layer_sizes": _WIDTHS,
                "regressor__mlpregressor__activation": ["tanh", "relu"],
                "regressor__mlpregressor__alpha": loguniform(1e-3, 100.0),
            },
            _count_network,
        ),
        Method(
            "kan",
            lambda seed: _standardised(KANRegressor(random_state=seed)),
            {
                "regressor__kanregressor__width": [1, 2, 4, 8],
                "regressor__kanregressor__num_cells": [1, 2, 3, 5],
                "regressor__kanregressor__penalty": [0.0, 1e-4, 1e-3, 1e-2],
                "regressor__kanregressor__num_steps": [1, 2, 5, 20],
            },
            _count_kan,
        ),
    )
}
"""Methods of regression, with KHRONOS."""

CLASSIFIERS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "khronos",
            lambda seed: KhronosClassifier(random_state=seed),
            {**_KHRONOS_SIZES, "ridge": loguniform(1e-4, 1e-1), "smoothness": loguniform(0.1, 10.0)},
            _count_khronos_classes,
        ),
        Method(
            "logistic_regression",
            lambda seed: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
            {"logisticregression__C": loguniform(1e-3, 1e2)},
            _count_linear,
        ),
        Method("xgboost", lambda seed: XGBClassifier(n_jobs=1, random_state=seed), _XGBOOST, _count_xgboost),
        Method(
            "hist_gradient_boosting",
            lambda seed: HistGradientBoostingClassifier(random_state=seed),
            _HIST,
            _count_hist,
        ),
        Method(
            "gaussian_process",
            lambda seed: make_pipeline(
                StandardScaler(), GaussianProcessClassifier(_fixed_kernels()[0], optimizer=None, random_state=seed)
            ),
            {"gaussianprocessclassifier__kernel": _fixed_kernels()},
            _count_process_classes,
        ),
        Method(
            "mlp",
            lambda seed: make_pipeline(
                StandardScaler(), MLPClassifier(solver="lbfgs", max_iter=500, random_state=seed)
            ),
            {
                "mlpclassifier__hidden_layer_sizes": _WIDTHS,
                "mlpclassifier__activation": ["tanh", "relu"],
                "mlpclassifier__alpha": loguniform(1e-3, 100.0),
            },
            _count_layers,
        ),
    )
}
"""Methods of classification, with KHRONOS. XGBoost wants labels from 0 on."""
