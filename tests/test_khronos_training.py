"""KHRONOS by gradient: it comes to where least squares are, takes any loss, any data and any number of processes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from transformers import AutoModel

from eval.khronos_speed import GradientTrial, als_against_gradient, separable_waves
from leviathan.khronos import KhronosConfig, KhronosForClassification, KhronosModel, select
from training import khronos
from training.khronos import main, train

ROOT = Path(__file__).resolve().parent.parent


def make(num_outputs=1, kind=KhronosModel, **options):
    torch.manual_seed(0)
    options = {"input_low": [0, 0], "input_high": [1, 1], "rank": 3, "num_cells": 4} | options
    return kind(KhronosConfig(num_outputs=num_outputs, **options))


def surface(rows=400, noise=0.0):
    """Two outputs in different units."""
    x = torch.rand(rows, 2)
    y = torch.stack([(3 * x[:, 0]).sin() * x[:, 1], 1e4 + 500 * x.prod(1) + 100 * x[:, 1]], 1)
    return x, y + noise * y.std(0) * torch.randn(rows, 2)


def standardised_error(model, x, y):
    return ((model.predict(x).view_as(y) - y).square().mean(0) / y.var(0, correction=0)).mean().item()


def test_it_comes_to_the_error_of_least_squares():
    x, y = surface(noise=0.05)
    by_squares, by_gradient = make(2), make(2)
    by_squares.fit(x, y, ridge=1e-12)
    result = train(by_gradient, x, y, num_epochs=120, batch_size=64)
    least, found = (standardised_error(model, x, y) for model in (by_squares, by_gradient))
    assert 0.9 * least < found < 1.2 * least
    assert least < 0.05**2
    assert result.num_steps == 120 * (400 // 64)
    assert len(result.training_loss) == result.num_epochs == result.best_epoch == 120
    assert result.validation_loss is None
    assert not result.converged


def test_scales_and_ranges_come_from_the_training_targets():
    x, y = surface()
    model = make(2)
    train(model, x[:300], y[:300], validation=(x[300:], y[300:] + 1e5), num_epochs=1)
    for buffer, expected in (
        (model.output_shift, y[:300].double().mean(0)),
        (model.output_scale, y[:300].double().std(0, correction=0)),
        (model.output_low, y[:300].amin(0)),
        (model.output_high, y[:300].amax(0)),
    ):
        torch.testing.assert_close(buffer, expected.float(), rtol=1e-6, atol=0)


def test_uncertainty_of_an_earlier_fit_is_forgotten(tmp_path):
    x, y = surface(100)
    model = make(2)
    model.fit(x, y, uncertainty=True, max_sweeps=2)
    train(model, x, y, num_epochs=1)
    assert not model.config.uncertainty
    assert model.posterior is None
    with pytest.raises(ValueError, match="uncertainty=True"):
        model.predict_std(x)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(KhronosModel.from_pretrained(tmp_path).predict(x), model.predict(x))


def test_arrays_and_integers_of_numpy_do():
    x, y = surface(100)
    counts = {"num_epochs": np.int64(2), "batch_size": np.int64(20)}
    by_tensors, by_arrays = make(2), make(2)
    train(by_tensors, x, y, validation=(x, y), num_epochs=2, batch_size=20)
    result = train(by_arrays, x.numpy(), y.numpy(), validation=(x.numpy(), y.numpy()), **counts)
    assert json.loads(json.dumps(vars(result)))["num_steps"] == 10
    assert torch.equal(by_tensors.network.factors, by_arrays.network.factors)
    labels = (x[:, 0] > 0.5).long().numpy()
    classifier = make(kind=KhronosForClassification, num_labels=2)
    train(classifier, x.numpy(), labels, **counts)
    classifier.fit(x, labels, num_restarts=np.int64(1), max_iterations=np.int64(3))


def test_targets_are_given_once():
    x, y = surface(20)
    for points in (x, x.numpy()):
        with pytest.raises(ValueError, match="y is missing"):
            train(make(2), points)
    with pytest.raises(ValueError, match="leave out y"):
        train(make(2), TensorDataset(x, y), y)


def test_booleans_are_no_counts():
    x, y = surface(20)
    with pytest.raises(ValueError, match="num_epochs = True; expected an integer"):
        train(make(2), x, y, num_epochs=True)
    with pytest.raises(ValueError, match="num_repeats = True; expected an integer"):
        select(x, y, num_repeats=True)


def test_a_classifier_is_not_loaded_as_a_regression(tmp_path):
    make(kind=KhronosForClassification, num_labels=3).save_pretrained(tmp_path)
    for kind in (AutoModel, KhronosModel):
        with pytest.raises(ValueError, match="that of a KhronosForClassification"):
            kind.from_pretrained(tmp_path)
    assert KhronosForClassification.from_pretrained(tmp_path).config.num_labels == 3


def test_selection_weighs_the_variance_as_the_error():
    """Points of large weight spread little, the others much: unweighted, the error would seem far too small."""
    x = torch.rand(200, 2)
    y = torch.where(torch.arange(200) < 100, 1.0, 100.0) * torch.randn(200)
    weight = torch.where(torch.arange(200) < 100, 1.0, 1e-6)
    sizes = {"ranks": np.array([1]), "num_cells": np.array([1]), "degrees": np.array([0])}
    found = select(x, y, sample_weight=weight, num_folds=np.int64(4), num_repeats=1, progress=False, **sizes)
    assert found.chosen.error == pytest.approx(1, abs=0.1)


def test_a_constant_target_is_learned():
    x, _ = surface()
    model = make()
    train(model, x, torch.full((400,), 7.0), num_epochs=30, batch_size=20)
    assert model.output_scale == 1
    assert (model.predict(x) - 7).square().mean() < 0.1**2


def test_the_best_epoch_by_validation_is_kept():
    x, y = surface(40, noise=0.3)
    model, held_out = make(2, num_cells=16), surface(100)
    result = train(model, x, y, validation=held_out, num_epochs=60, batch_size=10)
    least = min(result.validation_loss)
    assert result.validation_loss[result.best_epoch - 1] == least < result.validation_loss[-1]
    errors = (model.predict(held_out[0]) - held_out[1]) / model.output_scale
    assert errors.square().mean().item() == pytest.approx(least, rel=1e-4)


def test_it_stops_at_the_target():
    x, y = surface()
    model = make(2)
    result = train(model, x, y, num_epochs=500, batch_size=64, target_loss=0.05)
    assert result.converged
    assert result.num_epochs < 500
    assert standardised_error(model, x, y) <= 0.05 * (1 + 1e-4)


def test_the_seed_alone_decides():
    x, y = surface()
    losses = [train(make(2), x, y, num_epochs=2, seed=seed).training_loss for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_units_of_the_targets_do_not_matter():
    x, y = surface()
    plain, scaled = make(2), make(2)
    losses = [train(m, x, each, num_epochs=3).training_loss for m, each in ((plain, y), (scaled, 1e-3 * y - 5))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_any_loss():
    """The minimum of a pinball loss is a quantile."""

    def pinball(prediction, y):
        assert prediction.shape == y.shape == (len(y), 1)
        return torch.maximum(0.9 * (y - prediction), 0.1 * (prediction - y)).mean()

    x = torch.rand(1000, 2)
    y = 100 + 20 * x[:, 0] + torch.randn(1000)
    model = make(rank=1, num_cells=1, degree=1)
    train(model, x, y, loss=pinball, num_epochs=40, batch_size=100)
    assert (y < model.predict(x)).double().mean().item() == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("loss", ["l1", "huber"])
def test_outliers_count_less_in_robust_losses(loss):
    x, y = surface()
    dirty = y.clone()
    dirty[::20] += 20 * y.std(0)
    errors = []
    for each in (loss, "mse"):
        model = make(2)
        train(model, x, dirty, loss=each, num_epochs=25, batch_size=50)
        errors.append(standardised_error(model, x, y))
    assert errors[0] < 0.2 * errors[1]


def test_classes_are_told_apart():
    x = torch.rand(500, 2)
    labels = (x - 0.5).norm(dim=1).gt(0.3).long() + x[:, 0].gt(0.8).long()
    model = make(kind=KhronosForClassification, num_labels=3)
    result = train(model, x, labels, num_epochs=60, batch_size=50)
    assert (model.predict(x) == labels).double().mean() > 0.97
    assert result.training_loss[-1] < 0.1


class Items(Dataset):
    """One item at a time, as users write them; remembers what was asked for."""

    def __init__(self, x, y):
        self.x, self.y, self.asked = x, y, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.x[index], self.y[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def test_a_dataset_is_read_as_tensors_are():
    x, y = surface(100)
    by_tensors, by_items, items = make(2), make(2), Items(x, y)
    results = [
        train(by_tensors, x, y, num_epochs=3, batch_size=30),
        train(by_items, items, num_epochs=3, batch_size=30, validation=Items(x, y)),
    ]
    assert results[0].training_loss == results[1].training_loss
    # The first row's target, one look at all of them, and what fills the batches of each epoch.
    assert items.asked[:101] == [0, *range(100)]
    assert len(items.asked) == 101 + 3 * 90
    assert len(set(items.asked[101:191])) == 90


def test_blocks_add_up(monkeypatch):
    """Losses and scales are those of all rows, however many blocks they come in; an error names the row."""
    x, y = surface(100)
    whole, parts = make(2), make(2)
    results = [train(whole, x, y, num_epochs=2, validation=(x, y))]
    monkeypatch.setattr(khronos, "ROWS_AT_ONCE", 7)
    results.append(train(parts, x, y, num_epochs=2, validation=(x, y)))
    assert results[0].validation_loss == pytest.approx(results[1].validation_loss)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(buffer, parts.get_buffer(name))
    outside = x.clone()
    outside[52, 1] = 1.5
    with pytest.raises(ValueError, match=r"of the rows from number 49 on, x\[3, 1\] = 1.5 lies outside input 1's"):
        train(parts, outside, y)
    y[52, 1] = torch.nan
    with pytest.raises(ValueError, match=r"y\[52, 1\] = nan is not finite"):
        train(parts, x, y)


def test_points_outside_are_taken_where_the_model_takes_them():
    x, y = surface()
    x[0, 0] = 1.5
    with pytest.raises(ValueError, match=r"x\[0, 0\] = 1.5 lies outside"):
        train(make(2), x, y)
    train(make(2, extrapolate="linear"), x, y, num_epochs=1)
    x[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"x\[0, 0\] = nan is not finite"):
        train(make(2, extrapolate="linear"), x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_epochs": 0}, r"num_epochs = 0; expected an integer of at least 1"),
        ({"batch_size": 2.5}, r"batch_size = 2.5; expected an integer"),
        ({"learning_rate": 0.0}, r"learning_rate = 0.0; expected a positive number"),
        ({"weight_decay": -1.0}, r"weight_decay = -1.0; expected zero or more"),
        ({"warmup_fraction": 2.0}, r"warmup_fraction = 2.0; expected a number from 0 to 1"),
        ({"loss": "rmse"}, r"loss = 'rmse'; expected 'mse' or 'l1' or 'huber' for a KhronosModel, or a function"),
        ({"loss": "cross_entropy"}, r"loss = 'cross_entropy'; expected 'mse'"),
        ({"x": torch.rand(5, 3)}, r"x has shape \(5, 3\); expected \(\.\.\., 2\)"),
        ({"x": torch.rand(4, 2)}, r"x has 4 rows and y has 5"),
        ({"y": torch.rand(5, 3)}, r"targets have shape \(5, 3\) for 5 rows; expected 2 a row"),
        ({"x": torch.rand(0, 2), "y": torch.rand(0, 2)}, r"no rows to train on, or to validate on"),
        ({"validation": (torch.rand(5, 2) + 1, torch.rand(5, 2))}, r"lies outside input"),
        ({"validation": (torch.rand(0, 2), torch.rand(0, 2))}, r"no rows to train on, or to validate on"),
        ({"loss": lambda prediction, y: prediction.mean() * torch.nan}, r"the loss is nan in epoch 1; lower"),
    ],
)
def test_bad_input(options, message):
    arguments = {"x": torch.rand(5, 2), "y": torch.rand(5, 2)} | options
    with pytest.raises(ValueError, match=message):
        train(make(2), **arguments)


def test_bad_labels_and_datasets():
    model, x = make(kind=KhronosForClassification, num_labels=3), torch.rand(5, 2)
    for labels in (torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0, -1, 2, 1, 0]), torch.rand(5)):
        with pytest.raises(ValueError, match=r"no label; expected integers from 0 to 2"):
            train(model, x, labels)
    with pytest.raises(ValueError, match=r"expected 'cross_entropy' for a KhronosForClassification"):
        train(model, x, torch.zeros(5, dtype=torch.long), loss="mse")
    with pytest.raises(ValueError, match="IterableDataset cannot be shuffled"):
        train(model, Stream())


def test_processes_that_do_not_know_of_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were launched and 1 joined"):
        train(make(2), *surface())


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    torch.manual_seed(0)
    x, y = surface(200)
    path = tmp_path_factory.mktemp("table") / "table.csv"
    rows = [["height", "width", "y", "z"], *torch.cat([x, y], 1).tolist()]
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def flags(table, out, *more):
    return ["--data", str(table), "--target", "y", "z", "--out", str(out), "--num-cells", "4", *more]


GRADIENT = ("--method", "gradient", "--num-epochs", "4", "--batch-size", "20")


@pytest.mark.parametrize("method", [("--max-sweeps", "30"), GRADIENT])
def test_the_command(table, tmp_path, method, capsys):
    out = tmp_path / "run"
    main(flags(table, out, *method))
    report = json.loads((out / "training.json").read_text())
    assert (report["inputs"], report["targets"]) == (["height", "width"], ["y", "z"])
    assert (report["training"]["num_rows"], report["validation"]["num_rows"]) == (180, 20)
    assert report["settings"]["num_cells"] == 4
    given, default = {"als": (("max_sweeps", 30), ("ridge", None)), "gradient": (("batch_size", 20), ("loss", None))}[
        report["method"]
    ]
    assert {given, default} <= report["settings"].items()
    assert report["provenance"]["seed"] == 0
    assert "validation: num_rows 20" in capsys.readouterr().out
    # The errors told are those of the model that lies there.
    model = KhronosModel.from_pretrained(out)
    read = khronos.read_table(table, ["y", "z"])
    rows, held_out = khronos.split(read, 0.1, 0)
    for part, told in ((rows, report["training"]), (held_out, report["validation"])):
        x, y = part[:]
        squares = (model.predict(x) - y).square().mean(0)
        assert list(told["rmse"].values()) == pytest.approx(squares.sqrt().tolist(), rel=1e-4)
        assert list(told["r2"].values()) == pytest.approx((1 - squares / y.var(0, correction=0)).tolist(), rel=1e-4)
    assert sorted({*rows.numbers.tolist(), *held_out.numbers.tolist()}) == list(range(200))
    with pytest.raises(SystemExit, match="holds a model already"):
        main(flags(table, out, *method))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "als", "--num-epochs", "3"], "num_epochs: for --method gradient, not als"),
        (["--method", "gradient", "--ridge", "1"], "ridge: for --method als, not gradient"),
        (["--validation-fraction", "1"], "validation_fraction = 1.0; expected at least 0 and less than 1"),
        (["--validation-fraction", "0.001"], "of 200 rows leaves none for a side"),
        (["--inputs", "depth"], "no column 'depth'; its columns are height, width, y, z"),
        (["--degree", "9"], "degree = 9; expected an integer from 0 to 5"),
    ],
)
def test_what_the_command_refuses(table, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        main(flags(table, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_two_processes_do_what_one_does(table, tmp_path):
    main(flags(table, tmp_path / "one", *GRADIENT))
    launcher = ROOT / "training" / "configs" / "multi_cpu.yaml"
    launch = ["accelerate.commands.launch", "--config_file", str(launcher), "--main_process_port", "0"]
    run = subprocess.run(
        [sys.executable, "-m", *launch, "-m", "training.khronos", *flags(table, tmp_path / "two", *GRADIENT)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    one, two = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("one", "two"))
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    for name in ("training_loss", "validation_loss"):
        assert one["result"][name] == pytest.approx(two["result"][name], rel=1e-4)
    for part in ("training", "validation"):
        assert one[part]["rmse"] == pytest.approx(two[part]["rmse"], rel=1e-4)
    assert one["result"]["num_steps"] == two["result"]["num_steps"] == 4 * 9
    models = [KhronosModel.from_pretrained(tmp_path / name) for name in ("one", "two")]
    for parameter, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-4)


def test_batches_are_shared_out_evenly():
    assert khronos._fitting(12, 100, 4) == 12
    assert khronos._fitting(12, 10, 4) == 8
    with pytest.raises(ValueError, match="12 cannot be shared out evenly among 5 processes"):
        khronos._fitting(12, 100, 5)
    with pytest.raises(ValueError, match="3 rows cannot be shared out among 4"):
        khronos._fitting(12, 3, 4)


def test_the_waves_are_separable():
    x, y = separable_waves(50, 1, 2, torch.Generator().manual_seed(0))
    again, same = separable_waves(50, 1, 2, torch.Generator().manual_seed(0))
    assert x.shape == (50, 1)
    assert y.shape == (50,)
    assert torch.equal(x, again)
    assert torch.equal(y, same)
    assert y.abs().max() <= 2


def test_least_squares_are_timed_against_gradients():
    found = als_against_gradient(
        num_points=200,
        num_inputs=2,
        target_rank=1,
        rank=2,
        num_cells=2,
        batch_sizes=[50],
        learning_rates=[0.1],
        time_limit=0.5,
    )
    assert found.num_parameters == 2 * 5 * 2 + 2
    assert 0 < found.als_error < 0.1
    assert found.als_seconds > 0
    for trial in found.trials:
        assert trial.seconds > 0
        assert trial.reached == (trial.error <= found.als_error * (1 + 1e-4))
    slow, fast = (GradientTrial(50, 0.1, 9, seconds, 0.01, reached=True, time_limit=5.0) for seconds in (3.0, 2.0))
    missed = replace(fast, seconds=1.0, reached=False)
    found = replace(found, als_seconds=0.5, trials=(slow, missed, fast))
    assert found.best == fast
    assert found.ratio == 4
    # None reached it: the longest count, by the time that they ran.
    shorter = replace(missed, seconds=0.25, time_limit=1.25)
    found = replace(found, trials=(shorter, missed, replace(missed, seconds=1.5)), time_limit=5.0)
    assert found.best is None
    assert found.ratio == 2
