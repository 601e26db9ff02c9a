"""scikit-learn's own checks of an estimator, and what they do not look at."""

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_iris, make_moons
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import estimator_checks_generator

from leviathan.integrations.sklearn import KhronosClassifier, KhronosRegressor

QUICK = {"rank": 2, "num_cells": 3, "num_restarts": 1}


ESTIMATORS = [KhronosRegressor(**QUICK, max_sweeps=4), KhronosClassifier(**QUICK, max_iterations=20)]
CHECKS = [
    pytest.param(estimator, check, id=f"{type(estimator).__name__}-{check.func.__name__}")
    for each in ESTIMATORS
    for estimator, check in estimator_checks_generator(each)
    if check.func.__name__ != "check_array_api_input"  # runs where SCIPY_ARRAY_API is set, before scipy is imported
]


@pytest.mark.parametrize(("estimator", "check"), CHECKS)
def test_passes_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


def table(num_points=150, noise=0.0):
    rng = np.random.default_rng(0)
    x = rng.uniform([-5, 0, 1e4], [5, 1e-3, 3e4], (num_points, 3))
    u = (x - [0, 0, 2e4]) / [5, 1e-3, 1e4]
    y = 1e6 + 1e3 * (np.sin(2 * u[:, 0]) * u[:, 1] + u[:, 2] ** 2)
    return x, y + 1e3 * noise * rng.standard_normal(num_points)


def test_columns_and_targets_of_any_scale():
    x, y = table()
    model = KhronosRegressor(rank=2, num_cells=4, random_state=0).fit(x[:100], y[:100])
    assert model.score(x[100:], y[100:]) > 0.99
    assert model.fit_result_.train_rmse.item() < 0.05 * y.std()


def test_points_outside_the_training_data_are_continued_linearly():
    x, y = table()
    model = KhronosRegressor(rank=2, num_cells=4, random_state=0).fit(x, y)
    low = x.min(0)
    steps = low - np.arange(1, 4)[:, None] * [1.0, 1e-4, 1e3]
    first, second, third = model.predict(steps)
    np.testing.assert_allclose(third - second, second - first, rtol=1e-6)
    strict = clone(model).set_params(extrapolate="raise").fit(x, y)
    with pytest.raises(ValueError, match=r"x\[0, 0\] = .* lies outside input 0's interval"):
        strict.predict(steps)


def test_outputs_keep_the_shape_of_y():
    x, y = table(60)
    both = np.stack([y, -y], 1)
    model = KhronosRegressor(**QUICK, random_state=0)
    for targets in (y, y[:, None], both):
        assert model.fit(x, targets).predict(x).shape == targets.shape
    first, second = model.predict(x).T
    assert np.corrcoef(first, second)[0, 1] < -0.99


def test_standard_deviations_tell_the_noise():
    x, y = table(400, noise=0.1)
    model = KhronosRegressor(rank=2, num_cells=3, uncertainty=True, random_state=0).fit(x[:300], y[:300])
    prediction, std = model.predict(x[300:], return_std=True)
    covered = np.abs(prediction - y[300:]) < 2 * std
    assert 0.88 < covered.mean() <= 1
    with pytest.raises(ValueError, match="fit it with uncertainty=True"):
        model.set_params(uncertainty=False).fit(x, y).predict(x, return_std=True)


def test_a_constant_column_does_no_harm():
    x, y = table(80)
    x = np.insert(x, 1, 7.0, axis=1)
    model = KhronosRegressor(rank=2, num_cells=4, random_state=0).fit(x, y)
    assert model.score(x, y) > 0.99
    assert any("x is constant in column 1" in note for note in model.fit_result_.notes)


def test_works_in_pipelines_and_searches():
    x, y = load_iris(return_X_y=True)
    pipeline = make_pipeline(PCA(3), KhronosClassifier(**QUICK, max_iterations=60, random_state=0))
    search = GridSearchCV(pipeline, {"khronosclassifier__rank": [1, 2]}, cv=3, n_jobs=1).fit(x, y)
    assert search.best_score_ > 0.9
    x, y = table(90)
    search = GridSearchCV(KhronosRegressor(**QUICK, random_state=0), {"rank": [1, 2]}, cv=3).fit(x, y)
    assert search.best_params_ == {"rank": 2}


def test_searches_may_try_the_integers_of_numpy():
    x, y = table(60)
    sizes = {
        "rank": np.arange(1, 3),
        "num_cells": np.array([3]),
        "degree": np.array([2]),
        "num_restarts": np.array([1]),
    }
    search = GridSearchCV(KhronosRegressor(random_state=0), sizes | {"max_sweeps": np.array([4])}, cv=2)
    assert search.fit(x, y).best_estimator_.model_.config.rank in (1, 2)
    search = GridSearchCV(KhronosClassifier(random_state=0), sizes | {"max_iterations": np.array([20])}, cv=2)
    assert search.fit(x, y > y.mean()).best_estimator_.model_.config.num_cells == 3
    for name in ("rank", "max_sweeps"):
        with pytest.raises(ValueError, match=rf"{name} = 2\.5; expected an integer"):
            KhronosRegressor(**{name: 2.5}).fit(x, y)


def test_classes_of_any_type_that_no_line_separates():
    x, y = make_moons(200, noise=0.15, random_state=0)
    names = np.array(["waning", "waxing"])[y]
    model = KhronosClassifier(rank=3, num_cells=4, num_restarts=1, random_state=0)
    assert cross_val_score(model, x, names, cv=3).mean() > 0.95
    model.fit(x, names)
    probabilities = model.predict_proba(x)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert list(model.classes_) == ["waning", "waxing"]
    assert np.array_equal(model.predict(x), model.classes_[probabilities.argmax(1)])


@pytest.mark.parametrize("estimator", [KhronosRegressor(**QUICK), KhronosClassifier(**QUICK, max_iterations=20)])
def test_pickles_predict_the_same(estimator):
    x, y = make_moons(60, random_state=0)
    fitted = clone(estimator).set_params(random_state=3).fit(x, y)
    copy = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(copy.predict(x), fitted.predict(x))
    again = clone(fitted).fit(x, y)
    assert np.array_equal(again.predict(x), fitted.predict(x))


def test_one_class_is_an_error():
    x, _ = table(20)
    with pytest.raises(ValueError, match="one class"):
        KhronosClassifier().fit(x, np.zeros(20))
