"""The Inconel 718 job: its features, its verdicts, and all of it on made-up points in the public layout."""

import csv
import json
from dataclasses import replace

import h5py
import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.dummy import DummyRegressor
from sklearn.model_selection import ParameterGrid
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from leviathan import KhronosModel
from training import inconel, khronos_inconel
from training.khronos_comparison import (
    RIVALS,
    Evaluation,
    Splits,
    compare_repeated,
    compare_walls,
    evaluate,
    overlapping_error,
)
from training.khronos_inconel import PROPERTIES, SIZE, Features, candidates, invert, main, read_features, run
from training.khronos_peers import REGRESSORS, in_pipeline

NAMES = sorted({*inconel.XIE_TEST, "3_g", *(f"{wall}_{point}" for wall in (3, 6, 8, 16) for point in "aceik")})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Points whose properties follow from the place, the width and the height of a blob in their scalogram."""
    folder, rng = tmp_path_factory.mktemp("inconel"), np.random.default_rng(0)
    for name in ("wavelet_images", "thermal_history", "mechanical_property"):
        (folder / name).mkdir()
    time, frequency = np.meshgrid(np.linspace(0, 1, 24), np.linspace(1, 0, 24))
    left, top, right, bottom = inconel.INSIDE
    rows = []
    with h5py.File(folder / "thermal_history" / "discrete_binning_feature.h5", "w") as file:
        for name in NAMES:
            place, width, height = rng.uniform(-1, 1, 3)
            blob = (0.5 + 0.3 * height) * np.exp(
                -(((time - 0.4 - 0.1 * place) / (0.3 + 0.1 * width)) ** 2) - 2 * frequency
            )
            picture = Image.new("RGB", inconel.PICTURE_SIZE, "white")
            inside = Image.fromarray(matplotlib.colormaps["jet"](blob, bytes=True)[..., :3])
            picture.paste(inside.resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))
            picture.save(folder / "wavelet_images" / f"{name}.jpg", quality=85)
            file[name] = rng.integers(0, 50, 36)
            stress, strength = 500 + 60 * height + 30 * place * width, 900 + 90 * height
            wall, point = name.split("_")
            rows.append((wall, point.upper(), 1e9 * (13 + place), 1e6 * stress, strength))
    path = folder / "mechanical_property" / "mechanical_property.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("sample", "point_name", "E", "Yield stress", "UTS"), *rows])
    return folder


def test_coordinates_stand_for_the_features(folder):
    table = inconel.read_points(folder)
    scalograms = inconel.read_scalograms(folder, table, SIZE)
    logarithms = np.log1p(100 * scalograms)
    features = read_features(folder, table, "scalograms")
    np.testing.assert_allclose(
        features.scalograms(features.coordinates).reshape(scalograms.shape), scalograms, atol=1e-9
    )
    rows = np.arange(30)  # what a fold sees: principal components of the rows are the same in both
    plain, short = (PCA(4, svd_solver="full").fit(values[rows]) for values in (logarithms, features.coordinates))
    np.testing.assert_allclose(short.explained_variance_, plain.explained_variance_)
    expected, scores = plain.transform(logarithms), short.transform(features.coordinates)
    np.testing.assert_allclose(scores * np.sign(scores[0] * expected[0]), expected, atol=1e-8)


def test_counts_of_temperatures_weigh_as_much_as_the_scalogram(folder):
    table = inconel.read_points(folder)
    features = read_features(folder, table, "scalograms+bins")
    assert features.directions.shape[1] == SIZE**2 + 36
    values = features.mean + features.coordinates @ features.directions
    counts = inconel.read_bins(folder, table)
    np.testing.assert_allclose(np.expm1(values[:, SIZE**2 :] * np.sqrt(36) / SIZE), counts, atol=1e-8)
    assert features.scalograms(features.coordinates).shape == (len(table), SIZE, SIZE)


@pytest.mark.parametrize("limit", [108, 240])
def test_no_candidate_is_over_the_limit(limit):
    methods = {method.name: spaces for method, spaces in candidates(limit)}
    assert set(methods) == {"khronos", *RIVALS, "mlp", "kan", "mean"}
    sizes = set()
    for space in methods["khronos"]:
        choices = ParameterGrid({name: values for name, values in space.items() if isinstance(values, list)})
        for size in choices:
            num_basis = size["model__num_cells"] + size["model__degree"]
            assert size["pca__n_components"] * num_basis * size["model__rank"] + 2 <= limit
            sizes.add((size["pca__n_components"], size["model__rank"]))
    assert {components for components, _ in sizes} == {4, 6, 8, 12}
    assert (4, 4) in sizes


def evaluation(name, repeated_r2, wall_predictions):
    return Evaluation(
        name, Pipeline([("model", DummyRegressor())]), 1, {}, 0.0, 0.0, repeated_r2, wall_predictions, 0.0
    )


def test_verdicts_are_paired():
    rng = np.random.default_rng(0)
    y, num_walls = rng.normal(size=12), 4
    walls = [(np.setdiff1d(np.arange(12), rows), rows) for rows in np.arange(12).reshape(num_walls, 3)]
    repeated = [(np.arange(9), np.arange(9, 12))] * 5
    common, noise = rng.normal(size=5), 0.01 * rng.normal(size=5)
    repeats = {
        "khronos": common,
        "ridge": common + 0.1 + noise,
        "gaussian_process": common - 1,
        "xgboost": common + 0.05,
    }
    offsets = {"khronos": 0.5, "ridge": 0.6, "gaussian_process": 0.4, "xgboost": 2.0}
    evaluations = {name: evaluation(name, repeats[name], y + offsets[name]) for name in repeats}
    splits = Splits(repeated[0], repeated, walls)

    verdict = compare_repeated(evaluations, splits)
    assert (verdict.rival, verdict.within_one_standard_error) == ("ridge", False)
    assert verdict.difference == pytest.approx(-(0.1 + noise).mean())
    assert verdict.standard_error == pytest.approx(np.sqrt((1 / 5 + 3 / 9) * noise.var(ddof=1)))
    assert overlapping_error(noise, repeated[0]) == pytest.approx(verdict.standard_error)

    verdict = compare_walls(evaluations, y, splits)
    assert (verdict.rival, verdict.within_one_standard_error) == ("gaussian_process", False)
    # It is the difference of the coefficients of determination, and the same on every wall.
    assert verdict.difference == pytest.approx(12 * (0.4**2 - 0.5**2) / ((y - y.mean()) ** 2).sum())
    assert verdict.standard_error == pytest.approx(0, abs=1e-12)
    worse_on_one = {**evaluations, "khronos": evaluation("khronos", common, y + 0.9 * (np.arange(12) < 3))}
    assert compare_walls(worse_on_one, y, splits).within_one_standard_error


def test_a_wall_is_predicted_without_it():
    rng = np.random.default_rng(0)
    x, wall = rng.normal(size=(40, 6)), np.repeat(np.arange(4), 10)
    y = x[:, 0] + 0.1 * rng.normal(size=40)
    walls = [(np.flatnonzero(wall != number), np.flatnonzero(wall == number)) for number in range(4)]
    splits = Splits(walls[0], walls[1:], walls)
    pipeline = Pipeline([("pca", PCA(6)), ("scores", StandardScaler())])
    method = REGRESSORS["ridge"]
    space = in_pipeline(method.distributions, pca__n_components=[3, 6])
    result = evaluate(method, space, pipeline, x, y, splits, num_candidates=3, num_jobs=1, seed=0)
    for train, test in walls:
        fit = clone(result.estimator).fit(x[train], y[train])
        np.testing.assert_allclose(result.wall_predictions[test], fit.predict(x[test]))
    assert len(result.repeated_r2) == 3
    assert result.num_parameters == result.selected["pca__n_components"] + 1
    row = result.row(y, splits)
    assert row["fixed_r2"] == pytest.approx(result.estimator.score(x[walls[0][1]], y[walls[0][1]]))
    np.testing.assert_allclose(row["repeated"]["mean_r2"], result.repeated_r2.mean())
    errors = [((result.wall_predictions - y)[wall == number] ** 2).mean() for number in range(4)]
    np.testing.assert_allclose(row["leave_one_wall_out"]["mean_squared_errors"], errors)


def test_inversions_give_scalograms_with_the_property(monkeypatch):
    monkeypatch.setattr(khronos_inconel, "NUM_TIMED", 2)
    rng = np.random.default_rng(0)
    coordinates = rng.normal(size=(80, 4)) * [4, 3, 2, 1]
    directions = np.linalg.qr(rng.normal(size=(SIZE**2, 4)))[0].T
    features = Features(coordinates, np.full(SIZE**2, 3.0), directions)
    y = 500 + 10 * coordinates[:, 0] + 3 * coordinates[:, 1] * coordinates[:, 2]
    model = REGRESSORS["khronos"].make(0).set_params(rank=2, num_cells=1, degree=2)
    steps = [("pca", PCA(4)), ("scores", StandardScaler()), ("model", model)]
    estimator = Pipeline(steps).fit(coordinates, y)
    inversions = invert(estimator, features, 510.0, num_starts=16)
    assert set(inversions) == {"box", "normal", "prior"}
    distances = {}
    for search, inversion in inversions.items():
        assert inversion.found.converged.any()
        assert inversion.scalograms.shape == (len(inversion.found.solutions), SIZE, SIZE)
        assert len(inversion.milliseconds) == 2
        logarithms = np.log1p(100 * inversion.scalograms.reshape(-1, SIZE**2))
        again = estimator.predict((logarithms - features.mean) @ directions.T)
        np.testing.assert_allclose(again, 510, atol=1e-5 * np.ptp(y))
        distances[search] = inversion.found.solutions.norm(dim=-1)
    assert distances["prior"].min() <= min(distances["box"].min(), distances["normal"].min()) + 1e-6
    assert distances["normal"].mean() < distances["box"].mean()
    nowhere = invert(estimator, features, 1e6, num_starts=4)["box"]
    assert nowhere.scalograms.shape == (0, SIZE, SIZE)


def test_the_job_from_pictures_to_pictures(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(khronos_inconel, "NUM_TIMED", 2)
    monkeypatch.setattr(khronos_inconel, "KAN_REPEATS", 2)
    monkeypatch.setitem(khronos_inconel.KAN_STEPS, "regressor__kanregressor__num_steps", [1])
    monkeypatch.setattr(khronos_inconel, "PROPERTIES", [replace(PROPERTIES[1], num_starts=8)])
    monkeypatch.setattr(khronos_inconel, "COMPONENTS", [4])
    monkeypatch.setattr("training.khronos_comparison.NUM_FOLDS", 2)
    out = tmp_path / "out"
    main(f"--data {folder} --out {out} --num-repeats 3 --num-candidates 1 --num-jobs 1".split())
    report = json.loads((out / "inconel.json").read_text())
    assert report["num_points"] == len(NAMES)
    assert report["provenance"]["seed"] == 0
    part = report["properties"]["uts"]
    rows = {row["method"]: row for row in part["methods"]}
    assert list(rows) == ["khronos", *RIVALS, "mlp", "kan", "mean"]
    assert {name: row["repeated"]["num_repeats"] for name, row in rows.items()} == dict.fromkeys(rows, 3) | {"kan": 2}
    assert all(rows[name]["num_parameters"] <= 108 for name in ("khronos", "mlp", "kan"))
    assert rows["khronos"]["fixed_r2"] > 0.8 > 0.2 > rows["mean"]["fixed_r2"]
    assert [verdict["splits"] for verdict in part["verdicts"]] == ["repeated", "leave_one_wall_out"]
    assert [row["search"] for row in report["inversions"]] == ["box", "normal", "prior"]

    arrays = load_file(out / "inversion.safetensors")
    table = inconel.read_points(folder)
    np.testing.assert_allclose(arrays["uts.measured"], table.uts, rtol=1e-6)
    np.testing.assert_array_equal(arrays["wall"], table.wall)
    assert arrays["uts.predicted.khronos"].shape == (len(NAMES),)
    assert arrays["left_out.scalogram"].shape == (SIZE, SIZE)
    np.testing.assert_allclose(arrays["left_out.curve"], arrays["left_out.scalogram"].mean(0), rtol=1e-5)
    mean, low, high = arrays["uts.normal.envelope"]
    np.testing.assert_allclose(mean, arrays["uts.normal.scalograms"].mean((0, 1)), rtol=1e-4, atol=1e-6)
    assert (low <= high).all()

    # The model that was saved, on the scalograms found for it.
    model, maps = KhronosModel.from_pretrained(out / "uts"), load_file(out / "uts" / "features.safetensors")
    logarithms = np.log1p(100 * arrays["uts.box.scalograms"].reshape(-1, SIZE**2))
    scores = (logarithms - maps["mean"]) @ maps["projection"]
    np.testing.assert_allclose(scores, arrays["uts.box.scores"], atol=1e-3)
    np.testing.assert_allclose(maps["mean"] + scores @ maps["reconstruction"], logarithms, atol=1e-3)
    scores = (
        torch.from_numpy(scores)
        .to(model.dtype)
        .clamp(torch.tensor(model.config.input_low), torch.tensor(model.config.input_high))
    )
    strength = table.uts[table.rows(["3_g"])].item()
    np.testing.assert_allclose(model.predict(scores).numpy(), strength, rtol=1e-3)
    assert not list(out.rglob("*.partial"))
    assert "uts = " in capsys.readouterr().out


def test_bad_requests_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="num_repeats = 1; expected at least 2"):
        run(folder, tmp_path / "out", num_repeats=1)
    with pytest.raises(SystemExit, match=r"error: .*mechanical_property\.csv is not a file"):
        main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
