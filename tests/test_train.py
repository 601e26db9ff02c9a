"""The training job end to end on a tiny flow: it learns, resumes exactly, refuses what it should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoFeatureExtractor, AutoModelForCausalLM, TrainerCallback

from leviathan import FieldTokenizer
from training import train
from training.settings import read_settings
from training.turbulence import FlowSettings, write_fields

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "training" / "configs"


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    path = tmp_path_factory.mktemp("flow") / "flow.hdf5"
    settings = FlowSettings(num_trajectories=4, num_grid=16, viscosity=2e-3, dt_save=0.02, num_snapshots=6)
    return write_fields(path, settings, progress=False)


@pytest.fixture
def settings(flow, tmp_path):
    return {
        "data": {
            "path": str(flow),
            "fractions": [0.5, 0.25, 0.25],
            "offsets": "random",
            "symmetries": True,
            "num_validation_items": 16,
        },
        "tokenizer": {"patch_size": 4, "num_bits": 5, "base": 6},
        "model": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "embedding_seed_dim": 8,
            "embedding_num_heads": 2,
            "embedding_rank": 4,
        },
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 6,
            "save_steps": 6,
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 1,
        },
    }


def losses(run_folder):
    rows = [json.loads(line) for line in (Path(run_folder) / "log.jsonl").read_text().splitlines()]
    return {row["step"]: float(row["loss"]) for row in rows if "loss" in row}


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def copied(settings, **training):
    copy = json.loads(json.dumps(settings))
    copy["training"] |= training
    return copy


@pytest.mark.parametrize("offsets", ["random", "grid"])
def test_resumed_equals_unbroken_training(settings, tmp_path, monkeypatch, offsets):
    if offsets == "grid":
        settings["data"] |= {"offsets": "grid", "symmetries": False}
    report = train.run(copied(settings, output_dir=str(tmp_path / "whole")))
    broken = copied(settings, output_dir=str(tmp_path / "broken"), resume_from_checkpoint=True)
    original = train.JsonLog.on_train_begin

    def interrupt(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        kwargs_callbacks.append(state)

    kwargs_callbacks = []
    monkeypatch.setattr(train.JsonLog, "on_train_begin", interrupt)
    monkeypatch.setattr(train.JsonLog, "on_step_end", StopAt(8).on_step_end, raising=False)
    with pytest.raises(KeyboardInterrupt):
        train.run(copied(broken))
    assert not (tmp_path / "broken" / "training.json").exists()
    monkeypatch.undo()
    again = train.run(copied(broken))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "broken")[name], value), name
    assert again["validation"][-1]["loss"] == report["validation"][-1]["loss"]
    assert train.run(copied(broken)) == json.loads((tmp_path / "broken" / "training.json").read_text())


def test_it_learns_and_what_it_saves_loads(settings):
    settings["training"] |= {
        "learning_rate": 1e-2,
        "max_steps": 400,
        "eval_steps": 400,
        "save_strategy": "no",
        "per_device_train_batch_size": 16,
    }
    report = train.run(copied(settings))
    assert report["validation"][-1]["loss"] < report["marginal_entropy"] - 0.3
    folder = settings["training"]["output_dir"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoFeatureExtractor.from_pretrained(folder)
    assert isinstance(tokenizer, FieldTokenizer)
    assert tokenizer.low < 0 < tokenizer.high
    assert sum(p.numel() for p in model.parameters()) == report["num_parameters"]
    assert report["provenance"]["versions"]["torch"] == torch.__version__
    assert str(Path.home()) not in json.dumps(report["provenance"])


def test_evaluation_by_chunks_is_the_plain_one(settings, monkeypatch):
    parts = train.build(copied(settings))
    trainer = train.FieldTrainer(
        model=parts["model"], args=parts["args"], eval_dataset=parts["validation"], processing_class=parts["tokenizer"]
    )
    batch = {k: torch.stack([parts["validation"][i][k] for i in range(4)]) for k in parts["validation"][0]}
    model = parts["model"].eval()
    monkeypatch.setattr(train, "EVALUATION_CHUNK", 7)
    loss, expected, labels = trainer.prediction_step(model, batch, False)
    with torch.no_grad():
        out = model(**batch)
    torch.testing.assert_close(loss, out.loss)
    half = parts["tokenizer"].tokens_per_patch
    probability = out.logits[:, half - 1 : -1].double().softmax(-1)
    torch.testing.assert_close(expected, probability @ torch.arange(32, dtype=torch.float64))
    assert torch.equal(labels, batch["input_ids"][:, half:])


def test_loss_is_on_the_next_state_alone_and_accumulation_changes_nothing(settings, tmp_path):
    item = train.build(copied(settings))["train"][0]
    assert (item["labels"][:16] == -100).all()
    assert torch.equal(item["labels"][16:], item["input_ids"][16:])
    one = train.run(copied(settings, output_dir=str(tmp_path / "one"), max_steps=3))
    two = copied(settings, output_dir=str(tmp_path / "two"), max_steps=3)
    two["training"] |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    two["model"]["loss_chunk_size"] = 5
    train.run(two)
    assert one["tokens_per_step"] == 4 * 32
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_the_embedding_has_its_own_learning_rate_and_no_decay(settings):
    settings["training"] |= {"embedding_learning_rate": 7e-3, "weight_decay": 0.1}
    parts = train.build(copied(settings))
    trainer = train.FieldTrainer(
        model=parts["model"], args=parts["args"], eval_dataset=parts["validation"], processing_class=parts["tokenizer"]
    )
    groups = trainer.create_optimizer().param_groups
    embedding = {id(p) for p in parts["model"].get_input_embeddings().parameters()}
    (own,) = [g for g in groups if {id(p) for p in g["params"]} == embedding]
    assert (own["lr"], own["weight_decay"]) == (7e-3, 0.0)
    assert {g["lr"] for g in groups if g is not own} == {3e-3}
    assert sum(len(g["params"]) for g in groups) == len(list(parts["model"].parameters()))
    assert any(g["weight_decay"] == 0.1 for g in groups)


def test_reference_scores():
    tokenizer = FieldTokenizer(1, 2, 2, low=-2.0, high=2.0)
    items = [{"input_ids": torch.tensor([a, b])} for a, b in [(0, 0), (1, 1), (2, 3), (3, 3)]]
    scores = train.reference_scores(items, tokenizer)
    assert scores["marginal_entropy"] == pytest.approx(-(0.5 * np.log(0.25) + 0.5 * np.log(0.5)))
    true = np.array([-1.5, -0.5, 1.5, 1.5])
    assert scores["persistence_nrmse"] == pytest.approx(np.sqrt(1 / (true**2).sum()))


def test_dry_run_counts_parameters_and_tokens(settings, capsys):
    plan = train.run(copied(settings), dry_run=True)
    model = train.build(copied(settings))["model"]
    assert plan["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert plan["num_parameters"] == sum(plan[f"{part}_parameters"] for part in ("embedding", "head", "backbone"))
    assert plan["total_tokens"] == 12 * 4 * 32
    assert "num_parameters" in capsys.readouterr().out
    assert not Path(settings["training"]["output_dir"]).exists()


def test_a_run_is_not_overwritten(settings):
    train.run(copied(settings, max_steps=1))
    with pytest.raises(ValueError, match="holds a run already"):
        train.run(copied(settings, max_steps=1))
    with pytest.raises(ValueError, match=r"other settings \(training.max_steps\)"):
        train.run(copied(settings, max_steps=2, resume_from_checkpoint=True))


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("turbulence_*.yaml")), ids=lambda p: p.name)
def test_configs_are_valid(config, flow, tmp_path):
    allowed = train.allowed_keys()
    flags = ["--data.path", str(flow), "--training.output_dir", str(tmp_path), "--data.offsets", "random"]
    settings = read_settings(config, [*flags, "--training.use_cpu", "true", "--training.bf16", "false"], allowed)
    settings["tokenizer"]["patch_size"] = 8  # fits the tiny grid
    settings["data"]["fractions"] = [0.5, 0.25, 0.25]
    plan = train.run(settings, dry_run=True)
    assert plan["num_parameters"] > 0


def test_flags_override_the_file(tmp_path):
    allowed = {"data": ["path"], "training": ["max_steps", "learning_rate", "eval_strategy", "seed"]}
    file = tmp_path / "run.yaml"
    file.write_text("training: {max_steps: 5, learning_rate: 3e-4, eval_strategy: no}\n")
    read = read_settings(file, ["--training.max_steps", "7", "--data.path=x.h5", "--training.seed=-1"], allowed)
    assert read == {
        "data": {"path": "x.h5"},
        "training": {"max_steps": 7, "learning_rate": 3e-4, "eval_strategy": "no", "seed": -1},
    }


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("trainin: {max_steps: 5}", [], "did you mean 'training'"),
        ("training: {max_step: 5}", [], "did you mean 'max_steps'"),
        ("training: 5", [], "expected a section"),
        ("- 5", [], "expected sections"),
        ("training: {max_steps: [", [], "is not YAML"),
        ("training: !!python/object:os.system {}", [], "is not YAML"),
        ("", ["--training.lr", "1"], "unknown key 'lr'"),
        ("", ["--max_steps", "1"], "no setting"),
        ("", ["--training.max_steps"], "has no value"),
    ],
)
def test_bad_settings(tmp_path, text, flags, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(file, flags, {"training": ["max_steps"]})


def test_missing_data_and_config_are_said_plainly(settings, tmp_path):
    file = tmp_path / "run.yaml"
    settings["data"]["path"] = str(tmp_path / "none.hdf5")
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit, match=r"there is no file .*none.hdf5"):
        train.main(["--config", str(file)])
    with pytest.raises(SystemExit):
        train.main(["--config", str(tmp_path / "none.yaml")])


def test_two_processes_train_as_one(settings, tmp_path):
    """The command of the README, with gloo between two processes: each takes half of every batch."""
    one = copied(settings, output_dir=str(tmp_path / "one"), max_steps=2, eval_strategy="no", save_strategy="no")
    train.run(copied(one))
    two = copied(one, output_dir=str(tmp_path / "two"), per_device_train_batch_size=2, ddp_backend="gloo")
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(two))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29577"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [*command, "-m", "training.train", "--config", str(file)], cwd=ROOT, env=environment, check=True, timeout=240
    )
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=1e-3, atol=1e-5, msg=name)
