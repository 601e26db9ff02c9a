"""The study tunes every arm alike, trains the same seeds, goes on where it stopped and reports what it ran."""

import json

import pytest
import yaml

from eval import study
from tests.test_train import flow, settings  # noqa: F401 -- fixtures


@pytest.fixture
def command(settings, tmp_path):  # noqa: F811
    settings["training"] |= {"max_steps": 2, "eval_steps": 2, "save_steps": 2}
    del settings["training"]["output_dir"], settings["training"]["seed"]
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    arguments = ["--config", config, "--compare", "model.output_head=dense,digits"]
    arguments += ["--tune", "training.learning_rate=1e-3,3e-3", "--seeds", "0", "1", "--out", tmp_path / "study"]
    return [str(each) for each in arguments]


def test_arms_are_tuned_and_seeded_alike(command, tmp_path, capsys, monkeypatch):
    found = study.main([*command, "--model.loss_chunk_size", "7"])
    assert json.loads((tmp_path / "study" / "study.json").read_text()) == json.loads(json.dumps(found))
    assert list(found["arms"]) == ["dense", "digits"]
    for arm in found["arms"].values():
        assert list(arm["tuning"]) == ["1e-3", "3e-3"]
        assert arm["tuning"][arm["best"]] == min(arm["tuning"].values())
        assert [run["seed"] for run in arm["runs"]] == [0, 1]
        losses = [run["loss"] for run in arm["runs"]]
        assert losses[0] == arm["tuning"][arm["best"]]
        assert losses[0] != losses[1]
        assert arm["loss"]["mean"] == pytest.approx(sum(losses) / 2)
        assert arm["loss"]["standard_deviation"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert found["arms"]["dense"]["loss_ratio"] == 1
    assert len(list((tmp_path / "study").glob("*/training.json"))) == 6
    out = capsys.readouterr().out
    assert "loss ratio" in out
    assert "marginal_entropy" in out

    monkeypatch.setattr("training.train.FieldTrainer.train", None)  # nothing is trained a second time
    again = study.main([*command, "--model.loss_chunk_size", "7"])
    assert again["arms"] == found["arms"]


@pytest.mark.parametrize("bad", ["model.output_head", "output_head=dense", "model.output_head="])
def test_bad_values_are_refused(command, bad, capsys):
    with pytest.raises(SystemExit):
        study.main([*command, "--compare", bad])
    assert "expected section.key=value,value" in capsys.readouterr().err


def test_an_unknown_setting_is_said(command):
    with pytest.raises(SystemExit, match="did you mean 'output_head'"):
        study.main([*command, "--compare", "model.output_hed=dense"])
