"""KHRONOS's peers: honest counts of parameters, equal searches, and a KAN that keeps to itself."""

import random
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold, ParameterGrid
from sklearn.pipeline import Pipeline

from training.khronos_peers import CLASSIFIERS, REGRESSORS, KANRegressor, in_pipeline, quiet, sized, tune

NUM_POINTS, NUM_INPUTS = 60, 3
MLP_WIDTH = "regressor__mlpregressor__hidden_layer_sizes"
KAN_WIDTH = "regressor__kanregressor__width"


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).uniform(-1, 1, (NUM_POINTS, NUM_INPUTS))


@pytest.fixture(scope="module")
def y(x):
    return 500 + 40 * (x[:, 0] + x[:, 1] * x[:, 2])


@pytest.fixture(scope="module")
def labels(x):
    return (x[:, 0] > -0.3).astype(int) + (x[:, 0] > 0.3)


SMALL = {  # quick to fit, and of known size
    "khronos": {"rank": 2, "num_cells": 4, "degree": 2},
    "ridge": {},
    "gaussian_process": {},
    "xgboost": {"n_estimators": 5, "max_depth": 3},
    "hist_gradient_boosting": {"max_iter": 5},
    "mlp": {MLP_WIDTH: (7,)},
    "kan": {KAN_WIDTH: 2, "regressor__kanregressor__num_cells": 4, "regressor__kanregressor__num_steps": 1},
    "logistic_regression": {},
}


def fitted(method, x, y):
    choices = SMALL[method.name]
    if method is CLASSIFIERS.get("mlp"):
        choices = {"mlpclassifier__hidden_layer_sizes": (7,)}
    with quiet():
        return method.make(0).set_params(**choices).fit(x, y)


def test_parameters_of_regressors_are_counted_by_the_textbook(x, y):
    counts = {name: method.count(fitted(method, x, y)) for name, method in REGRESSORS.items() if name in SMALL}
    assert counts.pop("khronos") == NUM_INPUTS * (4 + 2) * 2 + 2
    assert counts.pop("ridge") == NUM_INPUTS + 1
    # Inputs and weights of all points; amplitude, length and noise; mean and deviation of y.
    assert counts.pop("gaussian_process") == NUM_POINTS * (NUM_INPUTS + 1) + 3 + 2
    assert counts.pop("mlp") == (NUM_INPUTS * 7 + 7) + (7 + 1) + 2
    # An edge has a coefficient for each basis function and two scales.
    assert counts.pop("kan") == (NUM_INPUTS * 2 + 2 * 1) * (4 + 3 + 2) + 2
    assert set(counts) == {"xgboost", "hist_gradient_boosting"}


def test_parameters_of_classifiers_are_counted_by_the_textbook(x, labels):
    counts = {name: method.count(fitted(method, x, labels)) for name, method in CLASSIFIERS.items()}
    assert counts.pop("khronos") == NUM_INPUTS * (4 + 2) * 2 + 2 * 3 + 3
    assert counts.pop("logistic_regression") == 3 * (NUM_INPUTS + 1)
    assert counts.pop("mlp") == (NUM_INPUTS * 7 + 7) + (7 * 3 + 3)
    # For each class a residual and a weight of all points; the kernel's amplitude and length.
    assert counts.pop("gaussian_process") == NUM_POINTS * NUM_INPUTS + 3 * (2 * NUM_POINTS + 2)
    assert set(counts) == {"xgboost", "hist_gradient_boosting"}


@pytest.mark.parametrize("methods", [REGRESSORS, CLASSIFIERS], ids=["regressors", "classifiers"])
def test_trees_are_counted_node_by_node(x, y, labels, methods):
    targets, base_scores = (y, 1) if methods is REGRESSORS else (labels, 3)
    model = fitted(methods["xgboost"], x, targets)
    leaves = (model.get_booster().trees_to_dataframe()["Feature"] == "Leaf").to_numpy()
    assert methods["xgboost"].count(model) == base_scores + leaves.sum() + 2 * (~leaves).sum()
    model = fitted(methods["hist_gradient_boosting"], x, targets)
    leaves = np.concatenate([tree.nodes["is_leaf"] for trees in model._predictors for tree in trees]).astype(bool)
    assert methods["hist_gradient_boosting"].count(model) == base_scores + leaves.sum() + 2 * (~leaves).sum()


def test_processes_of_two_outputs_and_of_two_classes_are_counted(x, y, labels):
    method = REGRESSORS["gaussian_process"]
    model = fitted(method, x, np.stack([y, -y], axis=1))
    assert method.count(model) == NUM_POINTS * (NUM_INPUTS + 2) + 3 + 4
    method = CLASSIFIERS["gaussian_process"]
    assert method.count(fitted(method, x, labels == 0)) == NUM_POINTS * NUM_INPUTS + 2 * NUM_POINTS + 2


@pytest.mark.parametrize("name", ["khronos", "ridge", "gaussian_process", "mlp"])
def test_tuned_regressors_learn(x, y, name):
    distributions = {**REGRESSORS[name].distributions}
    if name == "khronos":
        distributions |= {"rank": [2], "num_cells": [1], "degree": [2]}
    search = tune(REGRESSORS[name], x, y, num_candidates=2, folds=2, seed=0, distributions=distributions)
    assert len(search.cv_results_["params"]) == 2
    assert search.best_score_ > (0.5 if name == "ridge" else 0.9)


def test_every_space_has_names_that_the_estimator_knows():
    for methods in (REGRESSORS, CLASSIFIERS):
        for name, method in methods.items():
            assert method.name == name
            assert set(method.distributions) <= set(method.make(0).get_params())


def test_a_small_space_is_searched_whole_and_quietly(x, y):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search = tune(
            REGRESSORS["ridge"], x, y, num_candidates=9, folds=3, seed=0, distributions={"ridge__alpha": [0.1, 1.0]}
        )
    assert [params["ridge__alpha"] for params in search.cv_results_["params"]] == [0.1, 1.0]


def test_a_search_follows_its_seed(x, y):
    first, again, other = (
        tune(REGRESSORS["ridge"], x, y, num_candidates=4, folds=3, seed=seed).cv_results_["params"]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


class Recorder(TransformerMixin, BaseEstimator):
    """Keeps the numbers of points that it was fitted to."""

    sizes = []

    def fit(self, X, y=None):
        self.sizes.append(len(X))
        return self

    def transform(self, X):
        return X


def test_steps_before_the_model_are_fitted_inside_each_fold(x, y):
    Recorder.sizes.clear()
    pipeline = Pipeline([("record", Recorder()), ("pca", PCA())])
    distributions = in_pipeline({"ridge__alpha": [1.0]}, pca__n_components=[1, 2])
    assert distributions == [{"pca__n_components": [1, 2], "model__ridge__alpha": [1.0]}]
    search = tune(
        REGRESSORS["ridge"],
        x,
        y,
        num_candidates=2,
        folds=KFold(4),
        seed=0,
        pipeline=pipeline,
        distributions=distributions,
    )
    assert Recorder.sizes == [45] * 8 + [60]
    assert search.best_estimator_["model"].named_steps["ridge"].coef_.shape == (
        search.best_params_["pca__n_components"],
    )
    assert set(tune(REGRESSORS["ridge"], x, y, num_candidates=1, folds=2, seed=0, pipeline=pipeline).best_params_) == {
        "model__ridge__alpha"
    }


def test_searches_refuse_what_they_cannot_use(x, y):
    with pytest.raises(ValueError, match="num_candidates = 0; expected at least 1"):
        tune(REGRESSORS["ridge"], x, y, num_candidates=0, folds=3, seed=0)
    y = np.where(y == y[0], np.nan, y)
    with pytest.raises(ValueError, match="NaN"):
        tune(REGRESSORS["ridge"], x, y, num_candidates=1, folds=3, seed=0)


def test_only_early_ends_are_quiet():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("early", ConvergenceWarning, stacklevel=1)
            warnings.warn("else", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["else"]


@given(num_inputs=st.integers(1, 20), num_parameters=st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_sizes_use_the_room_and_no_more(num_inputs, num_parameters):
    def sizes(name, **values):
        try:
            return list(ParameterGrid(sized(name, num_inputs, num_parameters, **values).distributions))
        except ValueError as error:
            assert f"no {name} of {num_inputs} inputs has at most {num_parameters}" in str(error)  # noqa: PT017
            return []

    def of_mlp(width):
        return (num_inputs + 1) * width + width + 1 + 2

    def of_kan(width, num_cells):
        return (num_inputs + 1) * width * (num_cells + 5) + 2

    widths = {size[MLP_WIDTH] for size in sizes("mlp", regressor__mlpregressor__alpha=[1.0])}
    assert len(widths) == (of_mlp(1) <= num_parameters)
    for (width,) in widths:
        assert of_mlp(width) <= num_parameters < of_mlp(width + 1)
    for size in sizes("kan"):
        width, num_cells = size[KAN_WIDTH], size["regressor__kanregressor__num_cells"]
        assert of_kan(width, num_cells) <= num_parameters < of_kan(width + 1, num_cells)
    ranks, cells = [1, 2, 3], [1, 2, 4]
    found = sizes("khronos", rank=ranks, num_cells=cells, degree=[2], smoothness=[1.0])
    assert {(size["rank"], size["num_cells"]) for size in found} == {
        (r, c) for r in ranks for c in cells if num_inputs * (c + 2) * r + 2 <= num_parameters
    }


@pytest.mark.parametrize("name", ["khronos", "mlp", "kan"])
def test_a_sized_model_counts_no_more_than_asked_for(x, y, name):
    method = sized(name, NUM_INPUTS, 90)
    space = method.distributions[-1]
    choice = {key: values[0] for key, values in space.items() if isinstance(values, list)}
    with quiet():
        model = method.make(0).set_params(**choice).fit(x, y)
    assert 60 <= method.count(model) <= 90


def test_only_some_methods_have_a_size():
    with pytest.raises(ValueError, match="method 'ridge' has no number of parameters to set"):
        sized("ridge", 3, 100)


def test_a_kan_learns_and_keeps_to_itself(x, y, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    np.random.seed(3)  # noqa: NPY002
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    unit = (y - y.mean()) / y.std()
    model = KANRegressor(2, 1, num_steps=2, random_state=0).fit(x, unit)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    assert model.score(x, unit) > 0.95
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
    again = clone(model).fit(x, unit)
    np.testing.assert_allclose(again.predict(x), model.predict(x), atol=0.02)


def test_a_kan_refuses_what_it_cannot_use(x, y, monkeypatch):
    with pytest.raises(ValueError, match="NaN"):
        KANRegressor().fit(np.full_like(x, np.nan), y)
    monkeypatch.setitem(sys.modules, "kan", None)
    with pytest.raises(ImportError, match="needs pykan; install this project with its extra `khronos`"):
        KANRegressor().fit(x, y)
