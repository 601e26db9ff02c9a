import json
import math
from dataclasses import asdict, replace
from urllib.error import URLError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import root_mean_squared_error

from eval import tabular
from eval.tabular import BOREHOLE, METHODS, Dataset, borehole, borehole_points, datasets, tabular_study
from training.khronos_peers import CLASSIFIERS, REGRESSORS, tune

SMALL = {data.name: data for data in datasets(60, 40)}


@pytest.fixture
def all_are_ridges(monkeypatch):
    """Every method is a ridge of its name, and the calls of `tune` are listed."""
    calls = []

    def spy(method, x, y, *, folds, **options):
        rows = [test.tolist() for _, test in folds.split(x, y)]
        calls.append((method.name, {"rows": rows, "points": len(x), **options}))
        return tune(method, x, y, folds=folds, **options)

    monkeypatch.setattr(tabular, "tune", spy)
    monkeypatch.setattr(tabular, "REGRESSORS", {name: replace(REGRESSORS["ridge"], name=name) for name in METHODS})
    return calls


# ------------------------------------------------------------------------------------------------------------ borehole


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_borehole_is_the_flow_through_two_aquifers_and_the_hole_in_series(where):
    x = np.array([low + (high - low) * t for (low, high), t in zip(BOREHOLE.values(), where, strict=True)])
    inner, outer, upper, upper_head, lower, lower_head, length, conductivity = x
    in_upper, in_lower = (math.log(outer / inner) / (2 * math.pi * t) for t in (upper, lower))
    in_hole = length / (math.pi * inner**2 * conductivity)
    flow = (upper_head - lower_head) / (in_upper + in_hole + in_lower)
    np.testing.assert_allclose(borehole(x[None]), flow, rtol=1e-12)


def test_borehole_of_ten_inputs_has_two_that_play_no_part():
    x = borehole_points(100, seed=0)
    assert x.shape == (100, 10)
    for column, (low, high) in zip(x.T, BOREHOLE.values(), strict=False):
        assert low <= column.min() < column.max() <= high
    other = x.copy()
    other[:, 8:] = 0.5
    np.testing.assert_array_equal(borehole(x), borehole(other))
    with pytest.raises(ValueError, match=r"shape \(100, 7\).*\(points, 8 or more\)"):
        borehole(x[:, :7])


# ---------------------------------------------------------------------------------------------------------------- sets


def test_synthetic_sets_have_the_sizes_asked_for_and_differ_by_seed():
    for name in ("friedman1", "friedman2", "friedman3", "borehole"):
        split, other = SMALL[name].split(0), SMALL[name].split(1)
        assert (len(split.x_train), len(split.y_train), len(split.x_test), len(split.y_test)) == (60, 60, 40, 40)
        assert not np.isin(split.x_train[:, 0], other.x_train[:, 0]).any()
        np.testing.assert_array_equal(split.y_test, SMALL[name].split(0).y_test)


@pytest.mark.parametrize("name", ["friedman1", "friedman2", "friedman3"])
def test_noise_of_a_set_is_that_of_its_values(name):
    data = next(data for data in datasets(4000, 1) if data.name == name)
    make = getattr(tabular, f"make_{name}")
    noisy = data.split(0)
    x, truth = make(4001, noise=0.0, random_state=0)
    np.testing.assert_array_equal(x[:4000], noisy.x_train)
    assert root_mean_squared_error(truth[:4000], noisy.y_train) == pytest.approx(data.noise, rel=0.05)


def test_real_sets_are_split_without_overlap_and_labels_by_their_shares():
    diabetes, digits = SMALL["diabetes"].split(0), SMALL["digits"].split(0)
    assert len(diabetes.x_train) + len(diabetes.x_test) == 442
    together = np.concatenate([diabetes.x_train, diabetes.x_test])
    assert len(np.unique(together, axis=0)) == 442
    for labels in (digits.y_train, digits.y_test):
        np.testing.assert_allclose(np.bincount(labels) / len(labels), 0.1, atol=0.01)


# --------------------------------------------------------------------------------------------------------------- study


def test_every_method_has_the_same_points_folds_and_candidates(all_are_ridges):
    rows = tabular_study([SMALL["friedman1"]], num_candidates=3, seeds=(0, 1), progress=False)
    assert [row.method for row in rows] == list(METHODS)
    assert [name for name, _ in all_are_ridges] == [name for name in METHODS for _ in (0, 1)]
    for seed in (0, 1):
        budgets = [budget for _, budget in all_are_ridges[seed::2]]
        assert all(budget == budgets[0] for budget in budgets)
        assert (budgets[0]["num_candidates"], budgets[0]["seed"], budgets[0]["points"]) == (3, seed, 60)
    assert all_are_ridges[0][1]["rows"] != all_are_ridges[1][1]["rows"]


def test_rows_hold_scores_of_the_test_part_and_their_spread():
    (row,) = tabular_study([SMALL["friedman2"]], methods=["ridge"], num_candidates=2, seeds=(0, 1), progress=False)
    split = SMALL["friedman2"].split(1)
    alpha = float(row.runs[1].chosen["ridge__alpha"])
    model = REGRESSORS["ridge"].make(1).set_params(ridge__alpha=alpha).fit(split.x_train, split.y_train)
    assert row.runs[1].rmse == pytest.approx(root_mean_squared_error(split.y_test, model.predict(split.x_test)))
    assert row.runs[1].r2 == pytest.approx(model.score(split.x_test, split.y_test))
    assert row.mean["r2"] == pytest.approx((row.runs[0].r2 + row.runs[1].r2) / 2)
    assert row.standard_deviation["r2"] == pytest.approx(abs(row.runs[0].r2 - row.runs[1].r2) / math.sqrt(2))
    assert row.mean["num_parameters"] == 5
    assert (row.num_train, row.num_test, row.num_inputs, row.noise, row.parity) == (60, 40, 4, 125.0, None)
    assert json.loads(json.dumps(asdict(row), allow_nan=False))["mean"] == row.mean


def test_khronos_comes_with_points_of_the_test_part():
    (row,) = tabular_study([SMALL["borehole"]], methods=["khronos"], num_candidates=1, seeds=(3,), progress=False)
    split = SMALL["borehole"].split(3)
    np.testing.assert_array_equal(row.parity.true, split.y_test)
    assert root_mean_squared_error(row.parity.true, row.parity.predicted) == pytest.approx(row.mean["rmse"])
    assert row.mean["r2"] > 0.9


def test_labels_are_predicted_behind_principal_components_that_tuning_chooses():
    data = SMALL["digits"]
    (row,) = tabular_study([data], methods=["ridge"], num_candidates=3, seeds=(0,), progress=False)
    assert row.method == "logistic_regression"
    assert row.mean["accuracy"] > 0.8
    assert row.runs[0].rmse is None
    components = int(row.runs[0].chosen["pca__n_components"])
    assert components in data.num_components
    assert row.mean["num_parameters"] == 10 * (components + 1)
    assert {tabular.LINEAR.get(name, name) for name in METHODS} == set(CLASSIFIERS)


def test_a_method_may_be_given_fewer_points_and_says_so(all_are_ridges, monkeypatch):
    monkeypatch.setattr(tabular, "MOST_POINTS", {"gaussian_process": 30})
    methods = ["ridge", "gaussian_process"]
    rows = tabular_study([SMALL["friedman1"]], methods=methods, num_candidates=1, seeds=(0,), progress=False)
    assert [row.num_train for row in rows] == [60, 30]
    assert [row.note for row in rows] == ["", "given 30 of 60 points"]
    assert [budget["points"] for _, budget in all_are_ridges] == [60, 30]


def test_a_set_that_cannot_be_had_has_a_row_that_says_so():
    def missing(seed):
        raise URLError("no network")

    sets = [Dataset("far_away", missing), SMALL["friedman3"]]
    first, second = tabular_study(sets, methods=["ridge"], num_candidates=1, seeds=(0,), progress=False)
    assert (first.dataset, first.method, first.runs) == ("far_away", None, ())
    assert "cannot be had" in first.note
    assert "no network" in first.note
    assert second.dataset == "friedman3"


def test_unknown_methods_and_no_seeds_are_refused():
    with pytest.raises(ValueError, match=r"methods: forest unknown; expected some of khronos"):
        tabular_study([], methods=["ridge", "forest"])
    with pytest.raises(ValueError, match="seeds is empty"):
        tabular_study([], seeds=())
