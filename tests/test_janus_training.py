"""The job that trains a Janus: from a labelled set or digits to a model that remembers, also after an interruption."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import training.janus as job
from leviathan.janus.cells import symmetrise
from leviathan.janus.configuration import SnaJanusConfig
from leviathan.janus.modeling import SnaJanusModel
from training.janus import allowed_keys, build_model, main, measure, read_examples, run, summary
from training.microstructure_data import Cells, write_set
from training.settings import read_settings

CONFIGS = Path(job.__file__).parent / "configs"
MODEL = {"channels": [4], "latent_dim": 4, "head_rank": 2, "head_num_cells": 4, "num_codes": 16}
NAMES = ("volume_fraction", "permeability")
PHYSICS = {"youngs_modulus": 200.0, "symmetry": "cubic", "tolerance": 1e-4}


def make(indices):
    """Cells of 4^3, solid where the sum of the indices is small; where it is zero, in all of them."""
    place = torch.arange(4)
    distance = place + place[:, None] + place[:, None, None]
    generator = torch.Generator().manual_seed(indices.start)
    rough = symmetrise(torch.rand(len(indices), 4, 4, 4, generator=generator), "cubic").mul(2).round()
    bound = torch.tensor([2 + index % 6 for index in indices]).view(-1, 1, 1, 1)
    phase = (distance + rough < bound) | (distance == 0)
    volume = phase.flatten(1).float().mean(1)
    labels = torch.stack([volume, (1 - volume) ** 3 + 0.01], 1)
    return Cells(phase.byte().numpy(), ["steps"] * len(indices), list(indices), labels.numpy())


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("janus") / "cells"
    boundary = torch.full((4, 4, 4), 2, dtype=torch.uint8)
    boundary[0, 0, 0] = 1
    write_set(
        folder,
        make,
        80,
        settings={"physics": PHYSICS},
        property_names=NAMES,
        symmetry="cubic",
        boundary=boundary,
        seed=0,
        progress=False,
    )
    return str(folder)


def settings_for(path, data=None, model=None, **training):
    return {
        "data": {"path": path} | (data or {}),
        "model": MODEL | (model or {}),
        "training": {"epochs": 6, "batch_size": 16, "learning_rate": 0.01, "checkpoint_epochs": 2} | training,
    }


@pytest.fixture(scope="module")
def trained(path, tmp_path_factory):
    out = tmp_path_factory.mktemp("janus") / "model"
    return out, run(settings_for(path), out, progress=False)


def test_it_writes_a_model_that_remembers(trained, path):
    out, record = trained
    model = AutoModel.from_pretrained(out).eval()
    assert type(model) is SnaJanusModel
    cells, labels = read_examples({"path": path}).splits["train"]
    with torch.no_grad():
        codes = model.encode(cells)
    torch.testing.assert_close(model.latent_mean, codes.mean(0))
    assert model.code_count == 16
    assert torch.equal(model.codes[0], codes[0])
    assert model.boundary[0, 0, 0] == 1
    assert (model.boundary.flatten()[1:] == 2).all()
    config = model.config
    assert config.property_names == list(NAMES)
    assert config.property_scale == ["linear", "log"]
    scaled = torch.stack([labels[:, 0], labels[:, 1].log()], 1)
    torch.testing.assert_close(torch.tensor(config.property_mean), scaled.mean(0))
    torch.testing.assert_close(torch.tensor(config.property_std), scaled.std(0, correction=0))
    torch.testing.assert_close(torch.tensor(config.property_low), labels.amin(0))
    torch.testing.assert_close(torch.tensor(config.property_high), labels.amax(0))
    assert (config.resolution, config.symmetry, config.youngs_modulus) == (4, "cubic", 200.0)
    assert config.shared_boundary
    assert sorted(each.name for each in out.iterdir()) == ["config.json", "model.safetensors", "record.json"]
    assert json.loads((out / "record.json").read_text()) == json.loads(json.dumps(record))


def test_the_record_says_how_it_went(trained, path):
    out, record = trained
    assert record["num_cells"] == {"train": 64, "validation": 8, "test": 8}
    assert record["settings"]["data"]["path"] == "cells"  # no path of this machine
    assert record["settings"]["training"]["seed"] == 0
    history = record["history"]
    assert len(history) == 6
    assert set(history[0]) == {"loss", "reconstruction_loss", "property_loss", "cycle_loss"}
    assert history[-1]["loss"] < history[0]["loss"]
    assert sum(record["num_parameters"].values()) == AutoModel.from_pretrained(out).num_parameters()
    text = summary(record)
    assert "64 cells, 6 epochs" in text
    assert "R2: volume_fraction" in text
    model = AutoModel.from_pretrained(out).eval()
    assert measure(model, *read_examples({"path": path}).splits["test"]) == record["test"]


def test_errors_are_what_they_are_called(trained, path):
    model = AutoModel.from_pretrained(trained[0]).eval()
    cells, labels = read_examples({"path": path}).splits["train"]
    found = measure(model, cells, labels)
    with torch.no_grad():
        output = model(cells, labels)
        again = model.predict(model.encode(output.logits > 0))
    assert found["reconstruction"]["cross_entropy"] == pytest.approx(output.reconstruction_loss.item(), rel=1e-5)
    assert found["reconstruction"]["voxel_error"] == pytest.approx(((output.logits > 0) != cells).float().mean().item())
    for name, prediction in (("forward", output.prediction), ("decoded", again)):
        r2 = 1 - (prediction - labels).square().mean(0) / labels.var(0, correction=0)
        assert list(found[name]["r2"].values()) == pytest.approx(r2.tolist(), rel=1e-4)
        error = (prediction - labels).abs().mean(0) / (labels.amax(0) - labels.amin(0))
        assert list(found[name]["error"].values()) == pytest.approx(error.tolist(), rel=1e-4)
    cycle = model.cycle_error(cells)
    assert found["cycle"]["properties"] == cycle.properties
    assert found["cycle"]["mean"] == pytest.approx(sum(cycle.properties.values()) / 2)
    assert measure(model, cells[:1].repeat(2, 1, 1, 1), labels[:1].repeat(2, 1))["forward"]["r2"] == {
        "volume_fraction": None,
        "permeability": None,
    }


def test_an_interrupted_run_ends_as_an_unbroken_one(trained, path, tmp_path, monkeypatch):
    whole, _ = trained
    save, calls = job._save, []

    def interrupt(*arguments):
        save(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(job, "_save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(settings_for(path), tmp_path, progress=False)
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    with pytest.raises(ValueError, match=r"another training\.seed; choose another --out"):
        run(settings_for(path, seed=1), tmp_path, progress=False)
    record = run(settings_for(path), tmp_path, progress=False)
    assert len(calls) == 3
    assert len(record["history"]) == 6
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ValueError, match="holds a model already"):
        run(settings_for(path), tmp_path, progress=False)


def test_columns_can_be_chosen(path, tmp_path):
    settings = settings_for(path, {"properties": ["permeability"]}, {"head": "mlp", "jacobian_weight": 0.1}, epochs=1)
    record = run(settings, tmp_path, progress=False)
    assert list(record["test"]["forward"]["r2"]) == ["permeability"]
    assert "jacobian_loss" in record["history"][0]


def test_digits(tmp_path):
    flags = ["--training.epochs", "3", "--training.batch_size=32", "--model.cycle_weight", "0"]
    record = main(["--config", str(CONFIGS / "janus_digits.yaml"), "--out", str(tmp_path), *flags])
    assert record["num_cells"] == {"train": 1440 - 1, "validation": 179, "test": 179}
    assert record["test"]["forward"]["accuracy"] > 0.6
    model = AutoModel.from_pretrained(tmp_path)
    assert model.config.property_kind == "classification"
    assert model.config.property_names == [str(digit) for digit in range(10)]
    assert not model.config.two_phases
    assert "accuracy" in summary(record)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"digits": True}}, "expected the path of a labelled set, or digits: true"),
        ({"data": {"properties": ["K11"]}}, "has no K11"),
        ({"model": {"channels": [4, 4, 4]}}, "multiple of 8"),
        ({"model": {"property_scale": ["linear"]}}, "1 entries for 2"),
        ({"epochs": 0}, r"training\.epochs = 0"),
        ({"learning_rate": 0}, r"training\.learning_rate = 0"),
        ({"weight_decay": -1}, r"training\.weight_decay = -1"),
        ({"warmup_fraction": 2}, r"training\.warmup_fraction = 2"),
        ({"mixed_precision": "fp8"}, "expected 'no' or 'bf16'"),
        ({"seed": 0.5}, r"training\.seed = 0\.5"),
        ({"seed": 2**40}, r"training\.seed = 1099511627776"),
    ],
    ids=str,
)
def test_bad_settings(path, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(settings_for(path, **changes), tmp_path, progress=False)
    assert not any(tmp_path.iterdir())


def test_a_loss_that_is_no_longer_finite(path, tmp_path, monkeypatch):
    forward = SnaJanusModel.forward

    def spoilt(*arguments):
        output = forward(*arguments)
        output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(SnaJanusModel, "forward", spoilt)
    with pytest.raises(ValueError, match=r"no longer finite in epoch 1; lower training\.learning_rate"):
        run(settings_for(path), tmp_path, progress=False)


@pytest.mark.parametrize("names", [NAMES, ()])
def test_sets_whose_labels_were_not_computed(names, tmp_path):
    """As training.lbom writes them without --label: with the release's labels, or with none."""

    def unlabelled(indices):
        cells = make(indices)
        return replace(cells, labels=cells.labels[:, : len(names)])

    free = torch.full((4, 4, 4), 2, dtype=torch.uint8)
    options = {"settings": {"physics": None}, "symmetry": "cubic", "boundary": free, "seed": 0, "progress": False}
    write_set(tmp_path, unlabelled, 20, property_names=names, **options)
    if names:
        config = build_model(MODEL, read_examples({"path": str(tmp_path)})).config
        assert config.youngs_modulus == SnaJanusConfig().youngs_modulus
        return
    with pytest.raises(ValueError, match="has no labels"):
        read_examples({"path": str(tmp_path)})


def test_properties_without_a_logarithm(path):
    examples = read_examples({"path": path})
    examples.splits["train"][1][3, 1] = 0
    with pytest.raises(ValueError, match="permeability is 0 for a cell; a logarithmic scale needs"):
        build_model(MODEL, examples)


@pytest.mark.parametrize("name", ["janus_cpu", "janus_digits", "janus_conductivity", "janus_64"])
def test_configs_are_valid(name):
    settings = read_settings(CONFIGS / f"{name}.yaml", [], allowed_keys())
    resolution = {"janus_digits": 8, "janus_conductivity": 32, "janus_64": 64}.get(name, 16)
    SnaJanusConfig(resolution=resolution, **settings["model"])
    job._check_training(job.TRAINING | settings["training"])
