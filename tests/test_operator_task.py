"""Operators trained by the training job: on the tokens' items, exactly resumed, with noise and pushforward as said."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, TrainerCallback

from leviathan import FieldTokenizer
from training import train
from training.fields import FieldFile, PatchPairs, sample_snapshots, split_trajectories
from training.operator_task import OperatorPairs
from training.operators import FieldOperator, count_parameters, rollout_fields
from training.settings import read_settings
from training.turbulence import FlowSettings, write_fields

CONFIG = Path(__file__).resolve().parent.parent / "training" / "configs" / "operators_cpu.yaml"
ARCHITECTURES = ("fno", "unet", "deeponet", "diffusion")


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    path = tmp_path_factory.mktemp("flow") / "flow.hdf5"
    settings = FlowSettings(num_trajectories=4, num_grid=16, viscosity=2e-3, dt_save=0.02, num_snapshots=6)
    return write_fields(path, settings, progress=False)


@pytest.fixture
def settings(flow, tmp_path):
    return {
        "data": {
            "kind": "operators",
            "path": str(flow),
            "fractions": [0.5, 0.25, 0.25],
            "offsets": "random",
            "symmetries": True,
            "num_validation_items": 16,
        },
        "tokenizer": {"patch_size": 8},
        "model": {"architecture": "deeponet", "width": 16},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 2,
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 1,
        },
    }


def changed(settings, **sections):
    copy = json.loads(json.dumps(settings))
    for section, values in sections.items():
        copy[section] |= values
    return copy


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("setting", [(8, 4), (16, 0)], ids=["halo", "whole"])
def test_a_whole_run(settings, flow, architecture, setting):
    size, margin = setting
    settings["tokenizer"] = {"patch_size": size, "margin": margin}
    settings["model"] = {"architecture": architecture, "width": 4, "num_layers": 1, "num_diffusion_steps": 11}
    report = train.run(settings)
    folder = Path(settings["training"]["output_dir"])
    assert report == json.loads((folder / "training.json").read_text())
    assert (folder / "run.json").exists()
    model, tokenizer = FieldOperator.from_pretrained(folder), AutoFeatureExtractor.from_pretrained(folder)
    config = model.config
    assert (config.patch_size, config.margin, config.periodic) == (size, margin, size == 16)
    assert (tokenizer.patch_size, tokenizer.margin) == (size, margin)
    assert report["num_parameters"] == count_parameters(model)
    assert (report["architecture"], report["total_pairs"], report["steps"]) == (architecture, 12, 3)
    assert report["pairs_per_second"] > 0
    (row,) = [row for row in report["validation"] if row["step"] == 2]
    assert row["loss"] > 0
    assert row["nrmse"] > 0
    with FieldFile(flow) as fields:
        train_set = split_trajectories(4, (0.5, 0.25, 0.25)).train
        snapshots = np.stack(list(sample_snapshots(fields, train_set, 1024, mirrored=True)))
        assert config.std == pytest.approx(snapshots.std(), rel=1e-5)
        assert config.mean == pytest.approx(snapshots.mean(), abs=1e-4)
        assert tokenizer.low == snapshots.min()
        states = rollout_fields(model, fields.vorticity(3)[:2], 2, seed=0, progress=False)
    assert states.shape == (2, 2, 16, 16)
    assert states.isfinite().all()


@pytest.mark.parametrize("margin", [0, 4])
@pytest.mark.parametrize("offsets", ["grid", "random"])
def test_items_are_those_of_the_tokens(flow, margin, offsets):
    with FieldFile(flow) as fields:
        tokenizer = FieldTokenizer(8, 12, 64, margin=margin).fit(fields.vorticity(0))
        options = {"num_items": 12, "symmetries": True} if offsets == "random" else {}
        pairs = PatchPairs(fields, [0, 1], tokenizer, offsets=offsets, seed=3, **options)
        found = OperatorPairs(pairs)
        assert len(found) == len(pairs)
        for index in range(0, len(pairs), 5):
            item, tokens = found[index], pairs[index]
            before, after = tokens["input_ids"].split([tokenizer.tokens_per_prefix, tokenizer.tokens_per_patch])
            assert item["fields"].dtype == item["next_fields"].dtype == torch.float32
            assert np.array_equal(tokenizer.window(item["fields"][None].numpy())[0], before)
            assert np.array_equal(tokenizer(item["next_fields"].numpy())["input_ids"][0], after)
        with pytest.raises(IndexError, match=f"item {len(pairs)} does not exist"):
            found[len(pairs)]


def test_the_task_and_that_of_the_tokens_see_the_same_windows(settings):
    tokens = changed(settings, data={"kind": "fields"}, tokenizer={"num_bits": 12, "base": 64})
    tokens["model"] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = [train.build(each) for each in (settings, tokens)]
    for name in ("train", "validation"):
        found, expected = (getattr(part.task, name) for part in parts)
        assert len(found) == len(expected)
        if name == "validation":
            assert found.indices == expected.indices
            found, expected = found.dataset, expected.dataset
        for index in (0, 5, 11):
            item, (prior, following) = found[index], expected.patches(index)
            assert np.array_equal(item["fields"], prior)
            assert np.array_equal(item["next_fields"], following)
    ranges = [(part.task.tokenizer.low, part.task.tokenizer.high) for part in parts]
    assert ranges[0] == ranges[1]


def test_noise_is_on_the_prior_state_of_training_alone_and_the_items_own(settings):
    task = train.build(changed(settings, data={"input_noise": 0.2})).task
    plain = train.build(settings).task
    std, strengths = task.tokenizer.rms, []
    for index in range(12):
        noisy, item = task.train[index], plain.train[index]
        assert torch.equal(noisy["next_fields"], item["next_fields"])
        assert torch.equal(noisy["fields"], task.train[index]["fields"])
        strengths.append(float((noisy["fields"] - item["fields"]).std() / std))
    assert 0 < min(strengths) < 0.05 < 0.15 < max(strengths) < 0.25  # from 0 to 0.2
    assert torch.equal(task.validation[3]["fields"], plain.validation[3]["fields"])


@pytest.mark.parametrize("stride", [1, 2])
def test_the_earlier_state_is_that_of_the_same_window(flow, stride):
    with FieldFile(flow) as fields:
        tokenizer = FieldTokenizer(8).fit(fields.vorticity(0))
        pairs = PatchPairs(fields, [0, 1], tokenizer, stride=stride, seed=3)
        found = OperatorPairs(pairs, pushforward=True)
        items = [found[index] for index in range(len(pairs))]
        per_time = pairs.patches_per_field
        for index, item in enumerate(items):
            first = index // per_time % pairs.num_times < stride
            assert not (first and item["pushed"])
            if not first:
                assert torch.equal(item["earlier_fields"], items[index - stride * per_time]["fields"])
        share = np.mean([item["pushed"] for item in items if not torch.equal(item["earlier_fields"], item["fields"])])
        assert 0.25 < share < 0.75


def test_pushforward_trains_on_predictions_without_their_gradient(settings, monkeypatch):
    settings["data"]["pushforward"] = True
    settings["training"] |= {"eval_strategy": "no", "save_strategy": "no"}
    task, predictions, batches = train.build(settings).task, [], []
    predict, forward = FieldOperator.predict, FieldOperator.forward

    def predicted(self, fields, generator=None):
        predictions.append((fields, predict(self, fields, generator)))
        return predictions[-1][1]

    def trained(self, fields, next_fields=None, generator=None):
        if next_fields is not None:
            batches.append((fields, next_fields))
        return forward(self, fields, next_fields, generator)

    monkeypatch.setattr(FieldOperator, "predict", predicted)
    monkeypatch.setattr(FieldOperator, "forward", trained)
    train.run(settings)
    assert len(batches) == 3
    items = [task.train[i] for i in range(12)]
    assert 0 < sum(item["pushed"] for item in items) < 12
    fields, next_fields = (torch.cat(values) for values in zip(*batches, strict=True))
    earlier, pushed = (torch.cat(values) for values in zip(*predictions, strict=True))
    assert torch.equal(next_fields, torch.stack([item["next_fields"] for item in items]))
    assert torch.equal(earlier, torch.stack([item["earlier_fields"] for item in items if item["pushed"]]))
    own = iter(pushed)
    assert torch.equal(fields, torch.stack([next(own) if item["pushed"] else item["fields"] for item in items]))
    assert not fields.requires_grad


@pytest.mark.parametrize("architecture", ["fno", "diffusion"])
def test_resumed_equals_unbroken_training(settings, tmp_path, monkeypatch, architecture):
    settings["model"] = {"architecture": architecture, "width": 4, "num_layers": 1, "num_diffusion_steps": 11}
    settings["data"] |= {"input_noise": 0.1, "pushforward": architecture == "fno"}
    settings["training"] |= {"max_steps": 6, "lr_scheduler_type": "cosine"}
    whole = train.run(changed(settings, training={"output_dir": str(tmp_path / "whole")}))
    broken = changed(settings, training={"output_dir": str(tmp_path / "broken"), "resume_from_checkpoint": True})
    with monkeypatch.context() as patch:
        patch.setattr(train.JsonLog, "on_step_end", StopAt(3).on_step_end, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train.run(changed(broken))
    again = train.run(changed(broken))
    assert again["resumed_from_step"] == 2
    states = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken")]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    scores = [[(row["step"], row["loss"], row["nrmse"]) for row in run["validation"]] for run in (whole, again)]
    assert scores[0] == scores[1]
    assert len(scores[0]) == 3


def test_validation_is_the_error_of_one_step(settings):
    task, report = train.build(settings).task, train.run(settings)
    items = [task.validation[i] for i in range(len(task.validation))]
    prior, following = (torch.stack([item[name] for item in items]) for name in ("fields", "next_fields"))
    model = FieldOperator.from_pretrained(Path(settings["training"]["output_dir"]) / "checkpoint-2")
    error, size = model.predict(prior) - following, following.square().mean()
    (row,) = [row for row in report["validation"] if row["step"] == 2]
    assert row["loss"] == pytest.approx(float((error / model.config.std).square().mean()), rel=1e-4)
    assert row["nrmse"] == pytest.approx(float((error.square().mean() / size).sqrt()), rel=1e-4)
    assert report["persistence_nrmse"] == pytest.approx(float(((prior - following).square().mean() / size).sqrt()))


def test_it_learns(settings):
    settings["tokenizer"] = {"patch_size": 16}  # a closed problem
    settings["model"] = {"architecture": "fno", "width": 8, "num_modes": 5}
    settings["training"] |= {"max_steps": 150, "eval_steps": 150, "logging_steps": 50, "save_strategy": "no"}
    report = train.run(changed(settings, training={"learning_rate": 1e-2, "per_device_train_batch_size": 8}))
    assert report["validation"][-1]["nrmse"] < 0.7 * report["persistence_nrmse"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_config_is_valid_and_its_parameters_are_matched(architecture, capsys):
    flags = ["--model.architecture", architecture, "--data.path", "nowhere.hdf5"]  # counting needs no data
    settings = read_settings(CONFIG, flags, train.allowed_keys())
    plan = train.run(settings, dry_run=True)
    assert plan["num_parameters"] == pytest.approx(settings["model"]["num_parameters"], rel=0.05)
    assert f"architecture {architecture}" in capsys.readouterr().out


def test_all_parameters_share_one_learning_rate(settings):
    parts = train.build(settings)
    trainer = parts.task.trainer_class(model=parts.model, args=parts.args, eval_dataset=parts.task.validation)
    groups = trainer.create_optimizer().param_groups
    assert {group["lr"] for group in groups} == {3e-3}
    assert sum(len(group["params"]) for group in groups) == len(list(parts.model.parameters()))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"input_noise": -0.1}}, "input_noise = -0.1"),
        ({"data": {"input_noise": 0.1, "offsets": "grid", "symmetries": False}}, "go with data.offsets 'random' only"),
        ({"data": {"pushforward": True}, "tokenizer": {"margin": 4}}, "a margin of 4 has to be read with it"),
        ({"data": {"pushforward": True}, "model": {"architecture": "diffusion"}}, "leave it out for a diffusion"),
        ({"training": {"embedding_learning_rate": 1e-3}}, "has no embedding"),
        ({"data": {"context_noise": 4}}, "data.context_noise is no setting of a run on operators"),
        ({"tokenizer": {"num_bits": 8}}, "tokenizer.num_bits is no setting"),
        ({"model": {"hidden_size": 8}}, "model.hidden_size is no setting"),
        ({"model": {"std": 1.0}}, "model.std is no setting"),
        ({"model": {"num_parameters": 10_000}}, "num_parameters decides model.width"),
        ({"model": {"architecture": "resnet"}}, "architecture"),
        ({"model": {"architecture": "unet"}, "tokenizer": {"margin": 3}}, "a multiple of 4 pixels"),
        ({"tokenizer": {"margin": 8}}, "exceed the grid"),
    ],
)
def test_settings_that_make_no_run_are_refused(settings, sections, message):
    with pytest.raises(ValueError, match=message):
        train.run(changed(settings, **sections))
    assert not Path(settings["training"]["output_dir"]).exists()
