"""The study of turbulence: read from its file, arms tuned alike, rolled out once, summed up from what is there."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoFeatureExtractor, AutoModelForCausalLM

import leviathan
from eval import metrics, scoring, turbulence, turbulence_arms, turbulence_rows
from training.fields import FieldFile, split_trajectories
from training.turbulence import FlowSettings, write_fields

ROOT = Path(__file__).resolve().parent.parent
DRAWN = ("patches", "whole")  # pictures take longer than all else
PICTURES = ("curves", "distributions", "fields", "scores")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six flows, base configs of tokens and of operators, and a study."""
    root = tmp_path_factory.mktemp("study")
    flow = FlowSettings(num_trajectories=6, num_grid=16, viscosity=2e-3, dt_save=0.02, num_snapshots=7)
    write_fields(root / "flow.hdf5", flow, progress=False)
    data = {"path": str(root / "flow.hdf5"), "fractions": [0.34, 0.16, 0.5], "offsets": "random"}
    data |= {"symmetries": True, "num_validation_items": 8}
    training = {"output_dir": str(root / "unused"), "per_device_train_batch_size": 4, "eval_strategy": "steps"}
    training |= {"save_steps": 2, "disable_tqdm": True, "use_cpu": True, "max_steps": 1}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"embedding_seed_dim": 8, "embedding_num_heads": 2, "embedding_rank": 4}
    configs = {
        "tokens": {"data": data, "tokenizer": {"patch_size": 4, "num_bits": 5, "base": 6}, "model": sizes},
        "operators": {
            "data": data | {"kind": "operators"},
            "tokenizer": {"patch_size": 4},
            "model": {"architecture": "deeponet", "num_parameters": 8000},
        },
    }
    for name, config in configs.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(config | {"training": training}))
    (root / "study.yaml").write_text(yaml.safe_dump(study_of(root), sort_keys=False))
    return root


def study_of(root):
    tokens, operators = str(root / "tokens.yaml"), str(root / "operators.yaml")
    same = {"same_parameters_as": "leviathan"}
    return {
        "training_seed": 1,
        "tune_steps": 1,
        "steps": 2,
        "tune": {
            tokens: {"training.embedding_learning_rate": [1e-3, 3e-2]},
            operators: {"training.learning_rate": [1e-3, 3e-2]},
        },
        "evaluation": {
            "num_steps": 5,
            "seeds": [0, 1],
            "patch_size": 4,
            "crop": 8,
            "samplings": {"leviathan": ["expectation", "top_3"]},
        },
        "settings": {
            "patches": {
                "arms": {
                    "leviathan": {"config": tokens},
                    "lookup": {"config": tokens, "model.embedding_type": "lookup", **same},
                    "deeponet": {"config": operators, **same},
                }
            },
            "halo": {"shared": {"tokenizer.margin": 2}, "arms": {"leviathan": {"config": tokens}}},
            "whole": {"shared": {"tokenizer.patch_size": 16}, "arms": {"deeponet": {"config": operators}}},
        },
    }


def command(root, *more, out="out"):
    return ["--study", str(root / "study.yaml"), "--out", str(root / out), "--device", "cpu", *more]


@pytest.fixture(scope="module")
def found(folder):
    """One process does an arm, another trains the rest, a third rolls out and sums up."""
    turbulence.main(command(folder, "--settings", "patches", "--only", "lookup"))
    assert {path.parent.name for path in (folder / "out").rglob("arm.json")} == {"lookup"}
    assert (folder / "out" / "patches" / "lookup" / "lookup_expectation.json").exists()
    turbulence.main(command(folder, "--train-only"))
    assert len(list((folder / "out").rglob("arm.json"))) == 5
    assert len(list((folder / "out").rglob("*_expectation.json"))) == 1
    assert not (folder / "out" / "turbulence.json").exists()
    draw_all = turbulence.turbulence_figures.draw_all
    with pytest.MonkeyPatch.context() as patch:

        def chosen(out, setting, *rest):
            if setting in DRAWN:
                draw_all(out, setting, *rest)

        patch.setattr(turbulence.turbulence_figures, "draw_all", chosen)
        turbulence.main(command(folder))
    return json.loads((folder / "out" / "turbulence.json").read_text())


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(turbulence.turbulence_figures, "draw_all", lambda *_: None)


def test_arms_are_tuned_and_trained_alike(found, folder):
    for name, setting in found["settings"].items():
        for arm, record in setting["arms"].items():
            assert list(record["tuning"]) == ["0.001", "0.03"]
            assert record["tuning"][record["best"]] == min(record["tuning"].values())
            assert record["pairs"] == 2 * 4
            assert record["seconds"] > 0
            made = [json.loads(path.read_text()) for path in (folder / "out" / name / arm).glob("*/training.json")]
            assert sorted(each["steps"] for each in made) == [1, 1, 2]
            assert {each["seed"] for each in made} == {1}
    counts = {arm: record["num_parameters"] for arm, record in found["settings"]["patches"]["arms"].items()}
    assert max(counts.values()) <= 1.05 * min(counts.values())


def test_rows_are_those_of_the_study(found):
    patches, halo, whole = (found["settings"][name] for name in ("patches", "halo", "whole"))
    references = ["persistence", "climatology", "quantise_only"]
    arms = ["leviathan_expectation", "leviathan_top_3", "lookup_expectation", "deeponet"]
    assert list(patches["rows"]) == arms + references
    assert list(halo["rows"]) == arms[:2] + references
    assert list(whole["rows"]) == ["deeponet", *references[:2]]  # an operator has no tokens
    assert [patches["rows"][row]["seeds"] for row in arms] == [[0], [0, 1], [0], [0]]
    assert (patches["windowed"], halo["windowed"]) == (True, False)
    assert (patches["data"]["side"], halo["data"]["side"]) == (8, 16)
    assert patches["data"]["length"] == pytest.approx(0.5)
    assert halo["headline"] == "leviathan_expectation"
    assert list(patches["comparisons"]["leviathan_expectation"]) == arms[1:] + references
    for setting in found["settings"].values():
        assert "summary" not in setting
        for about in setting["rows"].values():
            assert set(about["metrics"]) == set(turbulence.STUDY_METRICS)
            assert {len(each["mean"]) for each in about["metrics"].values()} == {5}
            assert 0 < about["decorrelation"]["steps"] <= 5


def test_scores_are_those_of_the_model_on_the_cropped_field(found, folder):
    """Computed here from the file and the model alone."""
    model = folder / "out" / "patches" / "leviathan" / "model"
    with FieldFile(folder / "flow.hdf5") as fields:
        flows = split_trajectories(6, (0.34, 0.16, 0.5), 0).test
        truth = np.stack([fields.vorticity(int(i), range(6)) for i in flows])[..., :8, :8]
    assert found["settings"]["patches"]["data"]["trajectories"] == flows.tolist()
    arguments = [AutoModelForCausalLM.from_pretrained(model), AutoFeatureExtractor.from_pretrained(model), truth[:, 0]]
    states = leviathan.rollout(*arguments, num_steps=5, sampling="expectation", progress=False).numpy()
    rows = found["settings"]["patches"]["rows"]
    score = rows["leviathan_expectation"]["metrics"]
    np.testing.assert_allclose(score["nrmse"]["mean"], metrics.nrmse(states, truth[:, 1:]).mean(0), rtol=1e-5)
    spectra = [metrics.patch_spectrum(each, 4, 0.5) for each in (states, truth[:, 1:])]
    np.testing.assert_allclose(score["mean_log_ratio"]["mean"], metrics.mean_log_ratio(*spectra).mean(0), rtol=1e-4)
    runs = [
        leviathan.rollout(*arguments, num_steps=5, sampling="top_k", top_k=3, seed=seed, progress=False)
        for seed in (0, 1)
    ]
    crps = metrics.crps(torch.stack(runs, dim=2), truth[:, 1:]).mean(0)
    np.testing.assert_allclose(rows["leviathan_top_3"]["metrics"]["crps"]["mean"], crps, rtol=1e-5)


def test_jumps_are_over_the_truths_and_comparisons_know_intervals(found):
    halo = found["settings"]["halo"]
    np.testing.assert_allclose(halo["rows"]["quantise_only"]["metrics"]["border_ratio"]["mean"], 1, rtol=0.2)
    headline = halo["rows"][halo["headline"]]["metrics"]
    for other, compared in halo["comparisons"][halo["headline"]].items():
        for metric, difference in compared.items():
            theirs = halo["rows"][other]["metrics"][metric]
            outside = [
                mean < low or mean > high
                for mean, low, high in zip(headline[metric]["mean"], theirs["low"], theirs["high"], strict=True)
            ]
            assert difference["outside"] == outside
            assert all(low <= high for low, high in zip(difference["low"], difference["high"], strict=True))


def test_pictures(found, folder):
    for setting in DRAWN:
        for name in PICTURES:
            with Image.open(folder / "out" / f"{setting}_{name}.png") as picture:
                assert min(picture.size) > 200
        with Image.open(folder / "out" / f"{setting}.gif") as animation:
            assert animation.n_frames == 5
    assert not list((folder / "out").rglob("*.partial"))


def test_nothing_is_done_twice(found, folder, monkeypatch, undrawn):
    monkeypatch.setattr(turbulence_arms, "run", None)
    monkeypatch.setattr(turbulence_rows, "score_row", None)
    for more in ([], ["--finished"]):
        turbulence.main(command(folder, *more))
        again = json.loads((folder / "out" / "turbulence.json").read_text())
        assert again["settings"] == found["settings"]


def test_an_arm_of_another_study_is_not_summed_up(found, folder, undrawn, tmp_path, monkeypatch):
    """Paths and names are the same; the base config, the study's steps or the data are others."""
    base, study = folder / "operators.yaml", study_of(folder)
    finished = ["--study", str(tmp_path / "now.yaml"), "--out", str(folder / "out"), "--finished"]

    def summed_up(**changes):
        (tmp_path / "now.yaml").write_text(yaml.safe_dump(study | changes, sort_keys=False))
        return turbulence.main([*finished, "--settings", "whole"])

    summed_up()
    before = base.read_text()
    try:
        for old, new, differ in (
            ("max_steps: 1", "max_steps: 1\n  weight_decay: 0.25", "settings.training.weight_decay"),
            ("num_validation_items: 8", "num_validation_items: 4", "settings.data.num_validation_items"),
            ("max_steps: 1", "max_steps: 7", None),  # the study's own is taken
        ):
            base.write_text(before.replace(old, new))
            if differ is None:
                summed_up()
                continue
            with pytest.raises(
                SystemExit, match=rf"deeponet in .* was trained with other .* \({differ}\) than the study"
            ):
                summed_up()
    finally:
        base.write_text(before)
    with pytest.raises(SystemExit, match=r"\(settings.training.max_steps, steps\)"):
        summed_up(steps=3)
    tune = study["tune"] | {str(folder / "operators.yaml"): {"training.learning_rate": [1e-3, 3e-2, 1e-1]}}
    with pytest.raises(SystemExit, match=r"\(values\)"):
        summed_up(tune=tune)
    record = turbulence_arms.data_record
    monkeypatch.setattr(turbulence_arms, "data_record", lambda file: record(file) | {"num_trajectories": 5})
    with pytest.raises(SystemExit, match=r"\(data_record.num_trajectories\)"):
        summed_up()


def test_what_an_arm_follows_from_holds_settings_and_data(found, folder):
    of = found["settings"]["patches"]["arms"]["lookup"]["of"]
    assert set(of["settings"]) == {"data", "tokenizer", "model", "training"}
    assert of["settings"]["data"]["path"] == "flow.hdf5"  # tells nothing of the machine
    assert of["settings"]["model"]["embedding_type"] == "lookup"
    assert (of["settings"]["training"]["max_steps"], of["steps"], of["tune_steps"], of["seed"]) == (2, 2, 1, 1)
    assert not {"output_dir", "resume_from_checkpoint", "embedding_learning_rate"} & of["settings"]["training"].keys()
    assert of["data_record"]["grid"] == [16, 16]
    assert found["settings"]["patches"]["arms"]["lookup"]["provenance"].keys() >= {"commit", "changed_since_commit"}


def test_an_old_record_is_made_again_without_a_training(found, folder, monkeypatch):
    where = folder / "out" / "halo" / "leviathan"
    before = (where / "arm.json").read_text()
    record = json.loads(before)
    (where / "arm.json").write_text(json.dumps(record | {"of": {"config": "tokens.yaml"}}))
    study = turbulence.read_study(folder / "study.yaml")
    with pytest.raises(ValueError, match=r"leviathan in .* \(config, data_record, seed, settings, "):
        turbulence_arms.check_trained(study, study.settings["halo"]["leviathan"], where)
    monkeypatch.setattr("training.field_task.FieldTrainer.train", None)
    assert turbulence_arms.train_arm(study, study.settings["halo"]["leviathan"], where) == record
    assert json.loads((where / "arm.json").read_text()) == record
    other = dataclasses.replace(study, steps=3)
    with pytest.raises(ValueError, match=r"trained with other settings or data \(settings.training.max_steps"):
        turbulence_arms.train_arm(other, other.settings["halo"]["leviathan"], where)


def test_what_is_finished_is_summed_up(found, folder, undrawn):
    gone = folder / "out" / "patches" / "lookup" / "lookup_expectation.json"
    content = gone.read_text()
    gone.unlink()
    turbulence.main(command(folder, "--finished", "--settings", "patches"))
    again = json.loads((folder / "out" / "turbulence.json").read_text())["settings"]
    gone.write_text(content)
    missing = json.loads((folder / "out" / "turbulence.json").read_text())["missing"]
    assert missing == {"patches": ["lookup"], "halo": ["leviathan"], "whole": ["deeponet"]}
    assert set(found["missing"]) == {"patches", "halo", "whole"}
    assert not any(found["missing"].values())
    assert list(again) == ["patches"]
    assert "lookup_expectation" not in again["patches"]["rows"]
    known = found["settings"]["patches"]["rows"]["deeponet"]["metrics"]
    assert again["patches"]["rows"]["deeponet"]["metrics"] == known
    with pytest.raises(SystemExit, match=r"no arm in .* is trained and rolled out yet"):
        turbulence.main(command(folder, "--finished", out="empty"))


def test_a_row_of_other_flows_or_another_model_is_not_taken(found, folder):
    study = turbulence.read_study(folder / "study.yaml")
    arm, chosen = study.settings["halo"]["leviathan"], study.evaluation
    where = folder / "out" / "halo" / "leviathan"
    flows = turbulence.read_flows(arm, chosen, None)
    setting = turbulence.metric_settings(flows, arm, {"x": where / "model"}, 4, windowed=False)
    row = "leviathan_expectation"
    assert turbulence.find_row(where, row, flows, setting, chosen) is not None
    others = turbulence.read_flows(arm, turbulence_arms.EvaluationSettings(patch_size=4, num_steps=4), None)
    assert turbulence.find_row(where, row, others, setting, chosen) is None
    record = (where / "arm.json").read_text()
    (where / "arm.json").write_text(record.replace("T", "t"))  # trained at another time
    assert turbulence.find_row(where, row, flows, setting, chosen) is None
    (where / "arm.json").write_text(record)


def test_an_operator_that_diverges_gets_a_finite_score(found, folder, monkeypatch, tmp_path):
    study = turbulence.read_study(folder / "study.yaml")
    arm, chosen = study.settings["whole"]["deeponet"], study.evaluation
    flows = turbulence.read_flows(arm, chosen, None)
    where = tmp_path / "deeponet"
    where.mkdir()
    for name in ("arm.json", "model"):
        (where / name).symlink_to(folder / "out" / "whole" / "deeponet" / name)

    def explodes(model, fields, num_steps, seed):
        states = fields[:, None].repeat(1, num_steps, 1, 1)
        states[0, 2:], states[1, 3:] = torch.nan, -torch.inf
        return states

    monkeypatch.setattr(turbulence_rows, "rollout_fields", explodes)
    setting = turbulence.metric_settings(flows, arm, {"x": where / "model"}, 4, windowed=False)
    turbulence.score_arm(arm, where, flows, setting, chosen, "cpu")
    row = turbulence.find_row(where, "deeponet", flows, setting, chosen)
    assert row.about["num_diverged"] == 2
    assert all(np.isfinite(each).all() for each in row.scores.values())
    limit = turbulence_rows.BOUND * np.abs(flows.truth).max()
    np.testing.assert_allclose(row.example[2:], limit, rtol=1e-6)
    assert row.scores["nrmse"][0, :2, -1].min() > 10


def test_models_of_other_ranges_are_not_compared(found, folder, tmp_path):
    arm = turbulence.read_study(folder / "study.yaml").settings["whole"]["deeponet"]
    flows = turbulence_rows.Flows(np.zeros((1, 2, 16, 16)), np.zeros((1, 1, 16, 16)), {"length": 1.0}, {})
    leviathan.FieldTokenizer(patch_size=4, low=-1.0, high=1.0).save_pretrained(tmp_path)
    models = {"deeponet": folder / "out" / "whole" / "deeponet" / "model", "other": tmp_path}
    with pytest.raises(ValueError, match=r"have the ranges .* train all of them on the same data"):
        turbulence.metric_settings(flows, arm, models, 4, windowed=False)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12))
def test_time_to_decorrelation_is_the_first_crossing(values):
    time, fell = turbulence.decorrelation(np.array(values))
    line = np.array([1.0, *values])
    fine = np.linspace(0, len(values), 1 + 1000 * len(values))
    below = fine[np.interp(fine, np.arange(len(line)), line) < 0.8]
    assert fell == bool((line < 0.8).any())
    if fell and len(below):
        assert time == pytest.approx(below[0], abs=2e-3)
    elif not fell:
        assert time == len(values)


def test_times_of_known_correlations():
    times, fell = turbulence.decorrelation(np.array([[0.9, 0.7, 0.95], [0.6, 0.5, 0.4], [0.9, 0.85, 0.8]]))
    np.testing.assert_allclose(times, [1.5, 0.5, 3])
    assert fell.tolist() == [True, True, False]


def test_samplings_by_name():
    assert turbulence_arms.sampling_options("top_50") == {"sampling": "top_k", "top_k": 50}
    assert turbulence_arms.sampling_options("top_p") == {"sampling": "top_p"}
    assert turbulence_arms.sampling_options("expectation") == {"sampling": "expectation"}


def test_references_need_no_tokens():
    truth = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    names = [row.name for row in scoring.reference_rows(truth, truth[:, 1:], None)]
    assert names == ["persistence", "climatology"]


def test_the_study_for_two_cores_can_be_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = turbulence.read_study(Path("training/configs/turbulence_arms_cpu.yaml"))
    assert tuple(study.settings) == turbulence.SETTINGS
    assert next(iter(study.settings["patches"])) == "leviathan"
    assert {arm.is_operator for arm in study.settings["whole"].values()} == {True}


def changed(path, value):
    def change(study):
        *inside, last = path
        for key in inside:
            study = study[key]
        if value is None:
            del study[last]
        else:
            study[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(["steps"], None), "lacks steps"),
        (changed(["stepz"], 3), "unknown stepz; expected some of settings, steps"),
        (changed(["settings", "tiles"], {}), "unknown tiles; expected some of patches, whole, halo"),
        (changed(["settings", "halo", "arms"], {}), "halo: arms: expected keys and values"),
        (changed(["settings", "halo", "arms", "leviathan"], {"config": "x.yaml"}), "leviathan has config 'x.yaml'"),
        (changed(["settings", "patches", "arms", "lookup", "same_parameters_as"], "chair"), "is to match 'chair'"),
        (changed(["settings", "patches", "arms", "lookup", "same_parameters_as"], "deeponet"), "an arm of tokens"),
        (changed(["settings", "patches", "arms", "lookup", "model.embedding_tpe"], "x"), "did you mean"),
        (changed(["settings", "patches", "arms", "lookup", "data.stride"], 2), "lookup: other data than leviathan has"),
        (changed(["evaluation", "patch_size"], None), "evaluation lacks patch_size"),
        (changed(["evaluation", "patches"], 3), "evaluation: unknown patches"),
        (changed(["evaluation", "crop"], 6), "a crop of it that is a multiple of patch_size = 4"),
        (changed(["evaluation", "split"], "tests"), "split = 'tests'; expected one of train, validation, test"),
        (changed(["evaluation", "seeds"], [0, 0]), r"seeds = \[0, 0\]; expected a list of different whole numbers"),
        (changed(["evaluation", "seeds"], [-1]), r"seeds = \[-1\]"),
        (changed(["evaluation", "seeds"], []), r"seeds = \[\]"),
        (changed(["evaluation", "num_steps"], 0), "num_steps = 0; expected a whole number, 1 or more"),
        (changed(["evaluation", "num_trajectories"], True), "num_trajectories = True; expected a whole number"),
        (changed(["evaluation", "patch_size"], 4.0), "patch_size = 4.0; expected a whole number"),
        (changed(["evaluation", "crop"], "8"), "crop = '8'; expected a whole number"),
        (changed(["steps"], "many"), "steps = 'many'; expected a whole number"),
        (changed(["training_seed"], -1), "training_seed = -1; expected a whole number, 0 or more"),
        (changed(["evaluation", "samplings"], ["greedy"]), "samplings and decoding: expected keys and values"),
        (changed(["evaluation", "samplings", "chair"], ["greedy"]), "samplings of 'chair'; expected an arm of tokens"),
        (changed(["evaluation", "samplings", "deeponet"], ["greedy"]), "an arm of tokens, leviathan, lookup"),
        (changed(["evaluation", "samplings", "leviathan"], []), r"samplings of leviathan are \[\]; expected a list"),
        (changed(["evaluation", "samplings", "leviathan"], ["beam"]), "expected a list of expectation, greedy"),
        (changed(["evaluation", "samplings", "leviathan"], ["top_0"]), "top_5 and the like"),
        (changed(["settings", "halo", "shared"], 4), "halo: shared is 4; expected keys and values, or nothing"),
        (changed(["evaluation", "num_trajectories"], 9), "num_trajectories = 9: the test split has 3"),
        (changed(["evaluation", "num_steps"], 9), "num_steps = 9: there are 6 states after the first"),
    ],
)
def test_what_cannot_be_done_is_said(found, folder, change, message):
    study = study_of(folder)
    change(study)
    (folder / "bad.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    arguments = ["--study", str(folder / "bad.yaml"), "--out", str(folder / "out"), "--finished"]
    with pytest.raises(SystemExit, match=message):
        turbulence.main([*arguments, "--settings", "patches"])


def test_tuning_is_one_key_and_as_many_values_for_all(folder):
    for values, message in (
        ({"training.learning_rate": [1e-3]}, "give no arm less than the first"),
        ({"training.learning_rate": 1e-3}, "expected one key and a list of values"),
        ({"training.learning_rate": [1], "training.weight_decay": [1]}, "expected one key and a list of values"),
    ):
        study = study_of(folder)
        study["tune"][str(folder / "operators.yaml")] = values
        (folder / "bad.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
        with pytest.raises(ValueError, match=message):
            turbulence.read_study(folder / "bad.yaml")


def test_nothing_need_be_shared_and_data_must_be_named(folder):
    study = study_of(folder)
    study["settings"]["patches"]["shared"] = None
    (folder / "empty.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    found, given = (turbulence.read_study(folder / f"{name}.yaml") for name in ("empty", "study"))
    assert found == given
    study["settings"]["patches"]["shared"] = {"data.path": ""}
    (folder / "empty.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    with pytest.raises(ValueError, match=r"leviathan, lookup, deeponet: no data\.path"):
        turbulence.read_study(folder / "empty.yaml")


def test_unknown_names_are_said(folder):
    with pytest.raises(SystemExit, match=r"--only chair: .* has deeponet, leviathan, lookup"):
        turbulence.main(command(folder, "--only", "chair"))


def test_a_training_that_always_diverges_is_refused(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(turbulence_arms, "run", lambda settings: {"validation": [{"step": 1, "loss": None}]})
    study = turbulence.read_study(folder / "study.yaml")
    with pytest.raises(ValueError, match=r"lookup: training diverged with every .* of 0.001, 0.03"):
        turbulence_arms.train_arm(study, study.settings["patches"]["lookup"], tmp_path)
