"""Training on text end to end: it learns, resumes exactly, counts what it read, and refuses what does not fit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from training import train
from training.checkpoints import publish
from training.settings import read_settings
from training.tokenizer import train_bpe

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "training" / "configs"
VOCAB = 300
WORDS = ["the", "flow", "turns", "and", "falls", "apart", "into", "eddies", "of", "every", "size", "while", "energy"]


def documents(seed, count):
    """Texts in which a word tells the next: there is something to learn."""
    generator = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        at = int(generator.integers(len(WORDS)))
        length = int(generator.integers(3, 40))
        texts.append(" ".join(WORDS[(at + step * 5) % len(WORDS)] for step in range(length)))
    return texts


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for seed, (split, count) in enumerate({"train": 300, "validation": 60}.items()):
        lines = [json.dumps({"text": text}) for text in documents(seed, count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    train_bpe(documents(0, 300), VOCAB).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture
def settings(corpus, tmp_path):
    return {
        "data": {
            "kind": "text",
            "train": str(corpus / "train.jsonl"),
            "validation": str(corpus / "validation.jsonl"),
            "context_length": 16,
            "shuffle_buffer": 20,
            "num_validation_sequences": 16,
        },
        "tokenizer": {"path": str(corpus / "tokenizer")},
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
            "gradient_accumulation_steps": 2,
            "learning_rate": 3e-3,
            "warmup_steps": 2,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 6,
            "save_steps": 6,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 1,
        },
    }


def copied(settings, **training):
    copy = json.loads(json.dumps(settings))
    copy["training"] |= training
    return copy


def logged(folder, key):
    rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return {row["step"]: float(row[key]) for row in rows if key in row}


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 8:
            raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("separate", [False, True])
def test_resumed_equals_unbroken_training(settings, tmp_path, monkeypatch, workers, separate):
    settings["training"]["dataloader_num_workers"] = workers
    settings["data"]["separate_documents"] = separate
    train.run(copied(settings, output_dir=str(tmp_path / "whole")))
    broken = copied(settings, output_dir=str(tmp_path / "broken"), resume_from_checkpoint=True)
    with monkeypatch.context() as patch:
        patch.setattr(train.JsonLog, "on_step_end", StopAt().on_step_end, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train.run(copied(broken))
    assert train.run(copied(broken))["resumed_from_step"] == 6
    for key in ("loss", "eval_loss", "grad_norm"):
        assert logged(tmp_path / "broken", key) == logged(tmp_path / "whole", key)
    whole, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "broken"))
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    counts = [load_file(tmp_path / name / "token_counts.safetensors")["counts"] for name in ("whole", "broken")]
    assert torch.equal(*counts)
    assert counts[0].sum() == 12 * 2 * 4 * 15  # steps, accumulated, sequences, targets of a sequence


def test_two_processes_resume_each_in_its_own_place(settings, tmp_path):
    """With gloo: both read on where they stood, and the counts are those of both."""
    del settings["training"]["gradient_accumulation_steps"]
    settings["training"] |= {"sequences_per_step": 8, "ddp_backend": "gloo", "resume_from_checkpoint": True}
    settings["training"]["ddp_find_unused_parameters"] = False  # as in the configs of the Pile
    file, folder = tmp_path / "run.yaml", Path(settings["training"]["output_dir"])
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    def trained():
        words = [*command, "-m", "training.train", "--config", str(file)]
        subprocess.run(words, cwd=ROOT, env=environment, check=True, timeout=240)
        counts = load_file(folder / "token_counts.safetensors")["counts"]
        return logged(folder, "loss"), logged(folder, "eval_loss"), counts

    whole = trained()
    shutil.rmtree(folder / "checkpoint-12")
    (folder / "training.json").unlink()
    assert {path.name for path in folder.glob("checkpoint-6/stream-*")} == {"stream-0.json", "stream-1.json"}
    again = trained()
    assert json.loads((folder / "training.json").read_text())["resumed_from_step"] == 6
    assert again[:2] == whole[:2]
    assert torch.equal(again[2], whole[2])
    assert whole[2].sum() == 12 * 2 * 4 * 15  # steps, processes, sequences, targets of a sequence


def test_a_checkpoint_gets_its_name_when_the_last_process_has_written(settings, monkeypatch):
    """All wait for one another before one gives it its manifest and its name."""
    folder, seen = Path(settings["training"]["output_dir"]), []
    wait = Accelerator.wait_for_everyone

    def waited(self):
        staged = folder / "partial" / "checkpoint-6"
        names = ("stream-0.json", "token_counts-0.safetensors", "manifest.json")
        seen.append([(staged / name).exists() for name in names] + [(folder / "checkpoint-6").exists()])
        wait(self)

    monkeypatch.setattr(Accelerator, "wait_for_everyone", waited)
    train.run(copied(settings, max_steps=6))
    assert [True, True, False, False] in seen
    assert (folder / "checkpoint-6" / "manifest.json").exists()
    assert not list(folder.rglob("*.partial")) + list(folder.rglob("partial"))


@pytest.mark.parametrize("tied", [False, True])
def test_the_row_of_the_separator_is_learned_though_it_is_the_padding(settings, tied):
    settings["model"] |= {"embedding_type": "lookup", "tie_word_embeddings": tied, "pad_token_id": 0}
    parts = train.build(copied(settings))
    assert parts.task.tokenizer.eos_token_id == parts.model.config.pad_token_id
    before = parts.model.get_input_embeddings().weight[0].clone()
    assert before.abs().min() > 0
    train.run(copied(settings, max_steps=2, weight_decay=0.0))
    after = AutoModelForCausalLM.from_pretrained(settings["training"]["output_dir"]).get_input_embeddings().weight[0]
    assert (after - before).abs().min() > 0


def test_it_learns_and_what_it_saves_loads(settings, corpus):
    settings["training"] |= {"learning_rate": 1e-2, "max_steps": 150, "eval_steps": 150, "save_strategy": "no"}
    report = train.run(copied(settings))
    last = report["validation"][-1]
    assert last["loss"] < report["marginal_entropy"] - 1
    assert last["perplexity"] == pytest.approx(np.exp(last["loss"]))
    assert report["seconds_waited_for_data"] > 0
    assert (report["documents_broken"], report["documents_empty"]) == (0, 0)
    folder = settings["training"]["output_dir"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 16
    assert model.config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer(["the energy"], return_tensors="pt")
    written = tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])
    at = [WORDS.index(word) for word in written.split() if word in WORDS]
    assert len(at) > 3
    assert str(corpus) not in json.dumps(report["data"])


def order_file(path, tokens=VOCAB, base=18, **extra):
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(base**2, generator=generator)[:tokens]
    save_file({"order": order, "factors": torch.randn(tokens, 6, generator=generator)} | extra, path)
    return order


@pytest.mark.parametrize("embedding", ["separable", "codebook"])
@pytest.mark.parametrize("started", [False, True])
def test_the_order_of_the_tokens_is_stored_with_the_model(settings, tmp_path, embedding, started):
    order = order_file(tmp_path / "order.safetensors")
    start = "factors" if started else "random"
    settings["tokenizer"] |= {"order": str(tmp_path / "order.safetensors"), "start": start}
    settings["model"]["embedding_type"] = embedding
    plain = train.build(copied(settings) | {"tokenizer": settings["tokenizer"] | {"start": "random"}}).model
    model = train.build(copied(settings)).model
    same = torch.equal(model.model.embed_tokens.codebooks, plain.model.embed_tokens.codebooks)
    assert same != started
    train.run(copied(settings, max_steps=2))
    loaded = AutoModelForCausalLM.from_pretrained(settings["training"]["output_dir"])
    assert torch.equal(loaded.model.embed_tokens.token_order, order)


def test_a_table_starts_from_factors(settings, tmp_path):
    order_file(tmp_path / "order.safetensors")
    settings["tokenizer"] |= {"order": str(tmp_path / "order.safetensors"), "start": "factors"}
    settings["model"]["embedding_type"] = "lookup"
    table = train.build(copied(settings)).model.model.embed_tokens.weight.detach()
    factors = load_file(tmp_path / "order.safetensors")["factors"]
    factors = factors - factors.mean(0)
    scale = table.std() / (factors.std() * (6 / 32) ** 0.5)
    torch.testing.assert_close(table @ table.T, scale**2 * factors @ factors.T, rtol=0.1, atol=1e-5)
    assert table.std().item() == pytest.approx(0.02, rel=0.05)


def test_an_order_needs_digits(settings, tmp_path):
    order_file(tmp_path / "order.safetensors")
    settings["tokenizer"]["order"] = str(tmp_path / "order.safetensors")
    settings["model"]["embedding_type"] = "lookup"
    with pytest.raises(ValueError, match="embedding_type is 'lookup'"):
        train.build(copied(settings))
    settings["model"]["embedding_type"] = "separable"
    order_file(tmp_path / "order.safetensors", tokens=VOCAB - 1)
    with pytest.raises(ValueError, match=f"{VOCAB - 1}"):
        train.build(copied(settings))
    settings["tokenizer"] = {"path": settings["tokenizer"]["path"], "start": "factors"}
    with pytest.raises(ValueError, match=r"needs tokenizer\.order"):
        train.build(copied(settings))


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "vocab_size", VOCAB - 1, f"less than the {VOCAB} tokens"),
        ("model", "max_position_embeddings", 8, "exceeds model.max_position_embeddings = 8"),
        ("model", "embedding_num_digits", 1, None),  # any base will do
        ("data", "kind", "texts", "expected one of fields, text"),
        ("data", "stride", 2, r"data\.stride is no setting of a run on text"),
        ("tokenizer", "patch_size", 4, r"tokenizer\.patch_size is no setting of a run on text"),
        ("data", "train", "nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_what_does_not_fit_is_refused(settings, section, key, value, message):
    settings[section][key] = value
    if message is None:
        assert train.build(copied(settings)).model.config.embedding_base == VOCAB
        return
    with pytest.raises((ValueError, OSError), match=message):
        train.build(copied(settings))


def test_missing_settings_are_said(settings):
    del settings["data"]["validation"]
    with pytest.raises(ValueError, match=r"not complete.*validation"):
        train.build(copied(settings))


def test_a_checkpoint_without_its_place_in_the_text_is_refused(settings, tmp_path):
    train.run(copied(settings, max_steps=7))
    folder = tmp_path / "run"
    (folder / "training.json").unlink()
    (folder / "checkpoint-6" / "stream-0.json").unlink()
    (folder / "checkpoint-7" / "stream-0.json").unlink()
    with pytest.raises(ValueError, match=r"is whole \(checkpoint-7: stream-0.json is missing; checkpoint-6: "):
        train.run(copied(settings, max_steps=7, resume_from_checkpoint=True))
    (folder / "partial").mkdir()
    staged = (folder / "checkpoint-7").rename(folder / "partial" / "checkpoint-7")
    publish(staged, json.loads((folder / "run.json").read_text()))
    with pytest.raises(ValueError, match="does not say where the text stands"):
        train.run(copied(settings, max_steps=7, resume_from_checkpoint=True))


def test_other_text_behind_the_same_path_is_noticed(settings, tmp_path):
    text = tmp_path / "train.jsonl"
    text.write_text("\n".join(json.dumps({"text": text}) for text in documents(3, 50)))
    settings["data"]["train"] = str(text)
    train.run(copied(settings, max_steps=1))
    text.write_text("\n".join(json.dumps({"text": text}) for text in documents(3, 51)))
    with pytest.raises(ValueError, match=r"data\.documents"):
        train.run(copied(settings, max_steps=1, resume_from_checkpoint=True))


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("pile_*.yaml")), ids=lambda p: p.name)
def test_configs_of_the_pile_are_valid(config, tmp_path):
    """Counting needs neither the text nor the tokenizer, nor memory for a billion parameters."""
    flags = ["--training.output_dir", str(tmp_path), "--training.bf16", "false"]
    plan = train.run(read_settings(config, flags, train.allowed_keys()), dry_run=True)
    assert plan["tokens_per_step"] == 512 * 512
    assert 18 < plan["tokens_per_parameter"] < 22
