"""The training job end to end on a tiny flow: it learns, resumes exactly, refuses what it should."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoFeatureExtractor, AutoModelForCausalLM, TrainerCallback

from leviathan import FieldTokenizer
from training import field_task, train
from training.field_task import FieldTrainer
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


def same_training(folder, other):
    """Losses and gradient norms too: a loss that is wrong by a factor moves no weight that AdamW updates."""
    for name, value in weights(other).items():
        torch.testing.assert_close(weights(folder)[name], value, rtol=1e-3, atol=1e-5, msg=name)
    rows = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (folder, other)]
    for key in ("loss", "grad_norm", "eval_loss"):
        values = [[float(row[key]) for row in each if key in row] for each in rows]
        assert values[0] == pytest.approx(values[1], rel=2e-3), key


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
    """Broken off in the middle, with a half-written checkpoint left behind; on the grid it crosses an epoch."""
    if offsets == "grid":
        settings["data"] |= {"offsets": "grid", "symmetries": False}
        settings["training"] |= {"per_device_train_batch_size": 20}  # 160 pairs: the 9th step starts the next epoch
    report = train.run(copied(settings, output_dir=str(tmp_path / "whole")))
    broken = copied(settings, output_dir=str(tmp_path / "broken"), resume_from_checkpoint=True)
    with monkeypatch.context() as patch:
        patch.setattr(train.JsonLog, "on_step_end", StopAt(8).on_step_end, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train.run(copied(broken))
    assert not (tmp_path / "broken" / "training.json").exists()
    (tmp_path / "broken" / "checkpoint-12").mkdir()
    again = train.run(copied(broken))
    assert again["resumed_from_step"] == 6
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 12
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "broken")[name], value), name
    assert again["validation"][-1]["loss"] == report["validation"][-1]["loss"]
    seconds = [run["tokens_per_second"] for run in (again, report)]
    assert max(seconds) < 20 * min(seconds)  # of the steps that this part took, not of all
    assert train.run(copied(broken)) == json.loads((tmp_path / "broken" / "training.json").read_text())
    assert not list(tmp_path.glob("*/training_args.bin"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "broken").config.use_cache


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


@pytest.mark.parametrize("head", ["dense", "digits"])
def test_evaluation_by_chunks_is_the_plain_one(settings, monkeypatch, head):
    settings["model"]["output_head"] = head
    parts = train.build(copied(settings))
    trainer = FieldTrainer(
        model=parts.model, args=parts.args, eval_dataset=parts.task.validation, processing_class=parts.task.tokenizer
    )
    batch = parts.task.train.collate([parts.task.validation[i] for i in range(4)])
    half = parts.task.tokenizer.tokens_per_patch
    assert batch["prefix_length"] == half
    model = parts.model.eval()
    monkeypatch.setattr(field_task, "EVALUATION_LOGITS", 7 * 32)
    loss, expected, labels = trainer.prediction_step(model, batch, False)
    with torch.no_grad():
        torch.testing.assert_close(loss, model(**batch).loss)
        out = model(batch["input_ids"], prefix_length=half)
    probability = out.logits[:, half - 1 : -1].double().softmax(-1)
    mean = probability @ torch.arange(32, dtype=torch.float64)
    torch.testing.assert_close(expected, mean, rtol=1e-6, atol=1e-5)
    assert torch.equal(labels, batch["input_ids"][:, half:])


def test_loss_is_on_the_next_state_alone_and_accumulation_changes_nothing(settings, tmp_path):
    item = train.build(copied(settings)).task.train[0]
    assert (item["labels"][:16] == -100).all()
    assert torch.equal(item["labels"][16:], item["input_ids"][16:])
    one = train.run(copied(settings, output_dir=str(tmp_path / "one"), max_steps=3))
    two = copied(settings, output_dir=str(tmp_path / "two"), max_steps=3)
    two["training"] |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    two["model"]["loss_chunk_size"] = 5
    train.run(two)
    assert one["tokens_per_step"] == 4 * 32
    same_training(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("head", ["dense", "digits"])
def test_the_embedding_has_its_own_learning_rate_and_what_lives_near_one_no_decay(settings, head):
    settings["model"]["output_head"] = head
    settings["training"] |= {"embedding_learning_rate": 7e-3, "weight_decay": 0.1}
    parts = train.build(copied(settings))
    trainer = FieldTrainer(
        model=parts.model, args=parts.args, eval_dataset=parts.task.validation, processing_class=parts.task.tokenizer
    )
    groups = trainer.create_optimizer().param_groups
    embedding = {id(p) for p in parts.model.get_input_embeddings().parameters()}
    (own,) = [g for g in groups if {id(p) for p in g["params"]} == embedding]
    assert (own["lr"], own["weight_decay"]) == (7e-3, 0.0)
    assert {g["lr"] for g in groups if g is not own} == {3e-3}
    assert sum(len(g["params"]) for g in groups) == len(list(parts.model.parameters()))
    decayed = {id(p) for g in groups if g["weight_decay"] == 0.1 for p in g["params"]}
    for name, parameter in parts.model.lm_head.named_parameters():
        assert (id(parameter) in decayed) == (name.endswith("weight")), name


def test_training_reads_the_prior_state_in_both_directions(settings, monkeypatch):
    parts, seen = train.build(copied(settings)), []
    forward = type(parts.model).forward
    monkeypatch.setattr(
        type(parts.model),
        "forward",
        lambda self, **inputs: seen.append((self.training, inputs["prefix_length"])) or forward(self, **inputs),
    )
    train.run(copied(settings, max_steps=2))
    assert seen == [(True, 16)] * 2 + [(False, 16)] * 2  # two steps, two batches of validation


def test_reference_scores():
    tokenizer = FieldTokenizer(1, 2, 2, low=-2.0, high=2.0)
    items = [{"input_ids": torch.tensor([a, b])} for a, b in [(0, 0), (1, 1), (2, 3), (3, 3)]]
    scores = field_task.reference_scores(items, tokenizer)
    assert scores["marginal_entropy"] == pytest.approx(-(0.5 * np.log(0.25) + 0.5 * np.log(0.5)))
    true = np.array([-1.5, -0.5, 1.5, 1.5])
    assert scores["persistence_nrmse"] == pytest.approx(np.sqrt(1 / (true**2).sum()))


def test_dry_run_counts_parameters_and_tokens(settings, capsys):
    plan = train.run(copied(settings), dry_run=True)
    model = train.build(copied(settings)).model
    assert plan["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert plan["num_parameters"] == sum(plan[f"{part}_parameters"] for part in ("embedding", "head", "backbone"))
    assert plan["total_tokens"] == 12 * 4 * 32
    assert "num_parameters" in capsys.readouterr().out
    assert not Path(settings["training"]["output_dir"]).exists()
    settings["data"]["path"] = "nowhere.hdf5"  # counting needs no data
    assert train.run(copied(settings), dry_run=True) == plan


def test_a_run_is_not_overwritten(settings, flow, tmp_path):
    train.run(copied(settings, max_steps=1))
    with pytest.raises(ValueError, match="holds a run already"):
        train.run(copied(settings, max_steps=1))
    with pytest.raises(ValueError, match=r"\(settings.training.max_steps\)"):
        train.run(copied(settings, max_steps=2, resume_from_checkpoint=True))
    with pytest.raises(ValueError, match="expected true"):
        train.run(copied(settings, max_steps=1, resume_from_checkpoint="checkpoint-1"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="none of ours"):
        train.run(copied(settings, output_dir=str(tmp_path / "model")))


def test_other_data_behind_the_same_path_is_noticed(settings, tmp_path):
    settings["data"]["path"] = str(tmp_path / "flow.hdf5")
    flow = {"num_trajectories": 4, "num_grid": 16, "viscosity": 2e-3, "num_snapshots": 3}
    write_fields(tmp_path / "flow.hdf5", FlowSettings(**flow, dt_save=0.02), progress=False)
    train.run(copied(settings, max_steps=1))
    (tmp_path / "flow.hdf5").unlink()
    write_fields(tmp_path / "flow.hdf5", FlowSettings(**flow, dt_save=0.03), progress=False)
    with pytest.raises(ValueError, match=r"data.dt_save"):
        train.run(copied(settings, max_steps=1, resume_from_checkpoint=True))


def test_processes_that_do_not_know_of_each_other_are_refused(settings, monkeypatch):
    settings["training"]["use_cpu"] = False
    train.build(copied(settings))
    monkeypatch.setenv("WORLD_SIZE", "2")  # as launchers set it
    with pytest.raises(ValueError, match="2 processes were launched and 1 joined"):
        train.build(copied(settings))


def test_several_gpus_of_one_process_are_refused(settings, monkeypatch):
    monkeypatch.setattr(train.TrainingSettings, "n_gpu", property(lambda args: 2))
    with pytest.raises(ValueError, match=r"sees 2 GPUs; launch one process a GPU: accelerate launch --multi_gpu"):
        train.run(copied(settings))
    assert not Path(settings["training"]["output_dir"]).exists()
    assert train.run(copied(settings), dry_run=True)["tokens_per_step"] == 4 * 32  # of a process


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_items_of_a_step_are_those_of_all_processes(settings, monkeypatch, processes):
    monkeypatch.setattr(train.TrainingSettings, "world_size", property(lambda args: processes))
    monkeypatch.setattr("training.launching.os", SimpleNamespace(environ={"WORLD_SIZE": str(processes)}))
    args = train.build_arguments(copied(settings, sequences_per_step=24))
    assert args.gradient_accumulation_steps == 6 // processes
    plan = train.run(copied(settings, sequences_per_step=24), dry_run=True)
    assert plan["tokens_per_step"] == 24 * 32
    for number in (0, 2, 24 + 4 * processes - 1):
        with pytest.raises(ValueError, match=f"= {number} is no multiple of the {4 * processes} that {processes} proc"):
            train.build_arguments(copied(settings, sequences_per_step=number))
    with pytest.raises(ValueError, match="leave one of them out"):
        train.build_arguments(copied(settings, sequences_per_step=24, gradient_accumulation_steps=6))


def test_items_of_a_step_are_accumulated(settings, tmp_path):
    train.run(copied(settings, output_dir=str(tmp_path / "one"), max_steps=2, eval_steps=2))
    two = copied(settings, output_dir=str(tmp_path / "two"), max_steps=2, eval_steps=2, sequences_per_step=4)
    two["training"]["per_device_train_batch_size"] = 1
    train.run(two)
    same_training(tmp_path / "two", tmp_path / "one")


def test_bfloat16_that_is_emulated_is_not_taken(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert train.build_arguments(copied(settings, bf16="auto")).bf16 is has


def test_a_run_that_diverged_has_a_record(settings, monkeypatch):
    """Losses that are no numbers are null; the rest of the evaluation stands."""
    settings["training"] |= {"max_steps": 2, "eval_steps": 1, "save_strategy": "no"}
    loop = FieldTrainer.evaluation_loop

    def evaluated(self, *args, **options):
        output = loop(self, *args, **options)
        output.metrics["eval_loss"] = [1.5, float("nan")][self.state.global_step - 1]
        output.metrics["eval_nrmse"] = float("inf")
        return output

    monkeypatch.setattr(FieldTrainer, "evaluation_loop", evaluated)
    report = train.run(copied(settings))
    written = json.loads((Path(settings["training"]["output_dir"]) / "training.json").read_text())
    assert written == json.loads(json.dumps(report, allow_nan=False))
    assert [row["loss"] for row in written["validation"]] == [1.5, None]
    assert [row["nrmse"] for row in written["validation"]] == [None, None]
    assert all(row["runtime"] > 0 for row in written["validation"])


def test_evaluation_has_the_precision_of_training(settings, monkeypatch):
    settings["training"]["bf16"] = True
    parts = train.build(copied(settings))
    trainer = FieldTrainer(
        model=parts.model,
        args=parts.args,
        eval_dataset=parts.task.validation,
        processing_class=parts.task.tokenizer,
        data_collator=parts.task.train.collate,
    )
    seen = []
    parts.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    trainer.evaluate()
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    "config",
    [path for path in sorted(CONFIGS.glob("*.yaml")) if re.match(r"(turbulence|operators)_(?!arms)", path.name)],
    ids=lambda p: p.name,
)
def test_configs_are_valid(config, tmp_path):
    allowed = train.allowed_keys()
    plan = train.run(read_settings(config, ["--training.output_dir", str(tmp_path)], allowed), dry_run=True)
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
    """With gloo between two processes, each of which takes half of every batch."""
    one = copied(settings, output_dir=str(tmp_path / "one"), max_steps=2, eval_steps=2, save_strategy="no")
    one["data"]["num_validation_items"] = 15  # which two processes cannot share evenly
    train.run(copied(one))
    two = copied(one, output_dir=str(tmp_path / "two"), per_device_train_batch_size=2, ddp_backend="gloo")
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(two))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [*command, "-m", "training.train", "--config", str(file)], cwd=ROOT, env=environment, check=True, timeout=240
    )
    same_training(tmp_path / "two", tmp_path / "one")
