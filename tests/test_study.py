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

    monkeypatch.setattr("training.field_task.FieldTrainer.train", None)  # nothing is trained a second time
    again = study.main([*command, "--model.loss_chunk_size", "7"])
    assert again["arms"] == found["arms"]


def test_a_training_that_diverged_is_the_worst(command, tmp_path, capsys, monkeypatch):
    """Its loss is no number in JSON; the other trainings are summed up all the same."""
    losses = {("dense", "1e-3", 0): None, ("dense", "3e-3", 0): 9.0, ("dense", "3e-3", 1): 8.0}
    losses |= {("digits", "1e-3", 0): 4.0, ("digits", "3e-3", 0): None, ("digits", "1e-3", 1): None}

    def train_one(config, flags, folder, seed):
        arm, _, rest = folder.name.partition("-")
        loss = losses[arm, rest.rpartition("-")[0], seed]
        sizes = {"steps": 2, "tokens_per_step": 8, "num_parameters": 100, "embedding_parameters": 10}
        return {"seed": seed, "loss": loss, "seconds": 2.0, "validation": [], "references": {}} | sizes

    monkeypatch.setattr(study, "train_one", train_one)
    arms = study.main(command)["arms"]
    assert arms["dense"]["best"] == "3e-3"
    assert arms["dense"]["tuning"] == {"1e-3": None, "3e-3": 9.0}
    assert arms["dense"]["loss"]["mean"] == 8.5
    assert arms["digits"]["best"] == "1e-3"
    assert arms["digits"]["loss"] is arms["digits"]["loss_ratio"] is None
    assert json.loads((tmp_path / "study" / "study.json").read_text())["arms"]["digits"]["loss"] is None
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("digits")]
    assert line == ["digits", "1e-3", "100", "-", "2", "-"]


def test_seconds_are_those_of_the_whole_training_or_none():
    report = {"steps": 90, "resumed_from_step": 60, "seconds": 5.0}
    assert study.seconds_of(report) == 15
    assert study.seconds_of(report | {"resumed_from_step": 0}) == 5
    assert study.seconds_of(report | {"resumed_from_step": 90}) is None


def test_a_training_without_a_time_is_summed_up(command, capsys, monkeypatch):
    def train_one(config, flags, folder, seed):
        sizes = {"steps": 2, "tokens_per_step": 8, "num_parameters": 100, "embedding_parameters": 10}
        return {"seed": seed, "loss": 2.0, "seconds": None, "validation": [], "references": {}} | sizes

    monkeypatch.setattr(study, "train_one", train_one)
    assert study.main(command)["arms"]["dense"]["seconds"] is None
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("dense")]
    assert line[-2:] == ["-", "1.0000"]


def test_the_best_of_a_tuning_is_never_one_that_diverged():
    assert study.best_of({"a": None, "b": 3.0, "c": 2.0}) == "c"
    assert study.best_of({"a": None, "b": None}) == "a"


def test_flags_of_settings():
    found = study.settings_flags({"model.output_head": "dense", "data.offsets": [1, 2], "training.bf16": True})
    assert found == ["--model.output_head", '"dense"', "--data.offsets", "[1, 2]", "--training.bf16", "true"]


@pytest.mark.parametrize("bad", ["model.output_head", "output_head=dense", "model.output_head="])
def test_bad_values_are_refused(command, bad, capsys):
    with pytest.raises(SystemExit):
        study.main([*command, "--compare", bad])
    assert "expected section.key=value,value" in capsys.readouterr().err


def test_an_unknown_setting_is_said(command):
    with pytest.raises(SystemExit, match="did you mean 'output_head'"):
        study.main([*command, "--compare", "model.output_hed=dense"])


ARMS = """
table: {model.embedding_type: lookup, model.tie_word_embeddings: true}
table_larger: {model.embedding_type: lookup, model.tie_word_embeddings: true, same_parameters_as: generated}
generated:
"""


def test_arms_of_a_file_and_a_part_of_them(command, tmp_path):
    file = tmp_path / "arms.yaml"
    file.write_text(ARMS)
    at = command.index("--compare")
    arguments = [*command[:at], "--arms", str(file), *command[at + 2 :]]
    assert study.main([*arguments, "--only", "table"]) is None
    assert not (tmp_path / "study" / "study.json").exists()
    assert len(list((tmp_path / "study").glob("table-*/training.json"))) == 3
    (tmp_path / "study" / "generated-1e-3-0").mkdir()  # begun, not finished
    assert list(study.main([*arguments, "--finished"])["arms"]) == ["table"]
    found = study.main(arguments)
    assert list(found["arms"]) == ["table", "table_larger", "generated"]
    counts = {name: arm["num_parameters"] for name, arm in found["arms"].items()}
    assert counts["table"] < counts["generated"]
    layers = 2 * 3 * 32 * 8  # eight more neurons in each layer's MLP
    assert abs(counts["table_larger"] - counts["generated"]) <= layers / 2
    curve = found["arms"]["table"]["runs"][0]["validation"]
    assert [sorted(row) for row in curve] == [["loss", "nrmse", "step"]]


def test_sizes_of_an_arm_are_tried_in_turn(command, tmp_path):
    """One layer of that width is too large already."""
    file = tmp_path / "arms.yaml"
    file.write_text(
        "small: {model.num_hidden_layers: 1}\n"
        "narrow: {model.hidden_size: 128, same_parameters_as: small, vary: [num_hidden_layers, hidden_size]}\n"
    )
    found = study.read_arms(file, tmp_path / "run.yaml", ["--training.output_dir", str(tmp_path)])["narrow"]
    assert found[::2] == ["--model.hidden_size", "--model.hidden_size", "--model.intermediate_size"]
    assert int(found[3]) < 128


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- table", "expected a name for each arm"),
        ("table: lookup", "expected a name for each arm"),
        ("table: {same_parameters_as: chair}", "which is none of table"),
        ("table: {model.embedding_tpe: lookup}", "did you mean 'embedding_type'"),
    ],
)
def test_bad_arms_are_refused(command, tmp_path, text, message):
    file = tmp_path / "arms.yaml"
    file.write_text(text)
    at = command.index("--compare")
    with pytest.raises(SystemExit, match=message):
        study.main([*command[:at], "--arms", str(file), *command[at + 2 :]])
    with pytest.raises(SystemExit, match="the arms are dense, digits"):
        study.main([*command, "--only", "dance"])
    with pytest.raises(SystemExit, match="no arm in"):
        study.main([*command, "--finished"])
