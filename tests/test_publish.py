"""What eval.publish puts together, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from eval.publish import STALE, assemble, eval_results, main

ROOT = Path(__file__).parent.parent
CARDS = ROOT / "model_cards"
OF_MODELS = [path for path in sorted(CARDS.glob("*.md")) if path.read_text(encoding="utf-8").startswith("---\n")]
CONFIG = {"model_type": "khronos", "architectures": ["KhronosModel"]}
CARD = """---
license: apache-2.0
---

# Card

![A picture](card/picture.png) and [a page](https://example.org) and [a place](#here)

```python
model = AutoModel.from_pretrained("runs/x")
model.save_pretrained("runs/y")
```
"""


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"w": torch.ones(4)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def card(tmp_path):
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "picture.png").write_bytes(b"png")
    (tmp_path / "card" / "unused.png").write_bytes(b"png")
    path = tmp_path / "card.md"
    path.write_text(CARD)
    return path


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_what_goes_along(model, card, out):
    for name in (
        "optimizer.pt",
        "training_args.bin",
        "log.txt",
        "other.safetensors",
        "model-00001-of-00002.safetensors",
    ):
        (model / name).write_bytes(b"x")
    (model / "checkpoint-3").mkdir()
    found = assemble(model, card, "user/name", out)
    assert found.files == ("README.md", "card/picture.png", "config.json", "model.safetensors")
    assert set(found.left_out) == {
        *("optimizer.pt", "training_args.bin", "log.txt", "other.safetensors", "model-00001-of-00002.safetensors"),
        "checkpoint-3",
    }
    readme = ModelCard((out / "README.md").read_text())
    assert readme.data.to_dict() == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "tabular-regression",
    }
    assert 'AutoModel.from_pretrained("user/name")' in readme.text
    assert 'save_pretrained("runs/y")' in readme.text
    assert 'from leviathan import KhronosModel\n\nmodel = KhronosModel.from_pretrained("user/name")' in readme.text
    assert "The weights are those" not in readme.text


@pytest.mark.parametrize(
    ("config", "files", "tag", "code"),
    [
        ({"architectures": ["KhronosForClassification"]}, [], "tabular-classification", "KhronosForClassification"),
        ({"architectures": ["LeviathanForCausalLM"]}, ["tokenizer.json"], "text-generation", "LeviathanForCausalLM"),
        ({"architectures": ["LeviathanForCausalLM"]}, ["preprocessor_config.json"], None, "FieldTokenizer, Leviathan"),
        (
            {"architectures": ["LlamaForCausalLM"]},
            ["tokenizer.json"],
            "text-generation",
            "from transformers import Llama",
        ),
        ({"model_type": "span"}, [], "reinforcement-learning", "AutoModel"),
    ],
)
def test_tasks_and_how_to_load(model, card, out, config, files, tag, code):
    (model / "config.json").write_text(json.dumps(config))
    for name in files:
        (model / name).write_text("{}")
    assemble(model, card, "user/name", out)
    readme = ModelCard((out / "README.md").read_text())
    assert readme.data.pipeline_tag == tag
    assert code in readme.text


@pytest.mark.parametrize("card", OF_MODELS, ids=lambda path: path.stem)
def test_every_card_of_ours_makes_a_readme_whose_links_are_there(model, card, out):
    assert len(OF_MODELS) >= 7
    found = assemble(model, card, "user/name", out)
    readme = ModelCard((out / "README.md").read_text())
    assert readme.data.library_name == "transformers"
    assert readme.data.license == "apache-2.0"
    assert "separable-neural-architecture" in readme.data.tags
    pictures = {
        path.relative_to(CARDS).as_posix() for path in (CARDS / card.stem).iterdir() if path.suffix in (".png", ".gif")
    }
    assert {name for name in found.files if "/" in name} <= pictures
    assert "runs/" not in "".join(
        line for line in readme.text.splitlines() if "from_pretrained(" in line or "path = " in line
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CARD.replace("picture.png", "none.png"), r"links to card/none\.png, which is no file beside it"),
        (CARD.replace("card/picture.png", "../outside.png"), r"links to \.\./outside\.png, which is no file beside it"),
        (CARD.replace("card/pic", "card/../card/pic"), r"links to card/\.\./card/picture\.png, which is no file"),
        (CARD.replace("card/picture.png", "./config.json"), r"config\.json, which would take the place of the model's"),
        ("---\nlicense: [a\n---\n# Broken", "the metadata of .* are no YAML"),
        ("# No metadata", "has no metadata with a license"),
        ("---\ntags: []\n---\n# No licence", "has no metadata with a license"),
    ],
)
def test_cards_that_cannot_go_along(model, card, out, text, message):
    (card.parent.parent / "outside.png").write_bytes(b"png")
    (card.parent / "config.json").write_text("{}")
    card.write_text(text)
    with pytest.raises(ValueError, match=message):
        assemble(model, card, "user/name", out)
    (card.parent.parent / "outside.png").unlink()


def test_models_that_are_not_whole(model, card, out):
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or not whole"):
        assemble(model, card, "user/name", out)
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="only weights in safetensors are published"):
        assemble(model, card, "user/name", out)
    index = model / "model.safetensors.index.json"
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index.write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
    save_file({"a": torch.ones(4)}, model / shards[0])
    with pytest.raises(ValueError, match=rf"{shards[1]} is missing or not whole"):
        assemble(model, card, "user/name", out)
    (model / shards[1]).write_bytes(whole)
    with pytest.raises(ValueError, match=rf"{shards[1]} lacks b, which model\.safetensors\.index\.json says it has"):
        assemble(model, card, "user/name", out)
    save_file({"b": torch.ones(4)}, model / shards[1])
    assert {index.name, *shards} <= set(assemble(model, card, "user/name", out).files)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match=r"names '\.\./secret\.safetensors'; expected shards beside it"):
        assemble(model, card, "user/name", out)
    for found in ({}, {"weight_map": {}}, {"weight_map": ["a"]}):
        index.write_text(json.dumps(found))
        with pytest.raises(ValueError, match="has no weight_map of tensors and shards"):
            assemble(model, card, "user/name", out)
    index.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        assemble(model, card, "user/name", out)
    (model / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        assemble(model, card, "user/name", out)


@pytest.mark.parametrize("repo", ["name", "user/name/more", "user/-name", "../x", "user/name.git"])
def test_ids_that_are_none(model, card, out, repo):
    with pytest.raises(ValueError, match=r"expected user/name|[Rr]epo.id"):
        assemble(model, card, repo, out)


def test_figures_of_a_record(model, card, out):
    record = json.loads((CARDS / "leviathan" / "results.json").read_text())
    found = {(each.metric_type, each.metric_name): each.metric_value for each in eval_results(record)}
    last = record["spectra"]["steps"][-1]
    for row in ("expectation", "sample"):
        score = record["rows"][row]["metrics"]["correlation"]["mean"][last - 1]
        assert found["correlation", f"correlation, step {last}, {row}"] == score
    assert not any("persistence" in name for _, name in found)
    text = {"perplexity": {"mean": 7.5}, "bits_per_byte": {"mean": 1.25}, "loss": {"mean": 2.0}}
    text["config"] = {"data": "data/test.jsonl", "split": "test"}
    assert [each.metric_value for each in eval_results(text)] == [2.0, 7.5, 1.25]
    (out.parent / "language.json").write_text(json.dumps(text))
    assemble(model, card, "user/name", out, results=out.parent / "language.json")
    readme = ModelCard((out / "README.md").read_text())
    assert readme.data.model_name == "name"
    assert [each.metric_value for each in readme.data.eval_results] == [2.0, 7.5, 1.25]
    with pytest.raises(ValueError, match="has no figures of one model"):
        eval_results(json.loads((CARDS / "khronos" / "khronos.json").read_text()))


def test_the_code_comes_along_with_its_licence(model, card, out):
    found = assemble(model, card, "user/name", out, bundle_code=True)
    assert {"remote_code.py", "khronos_modeling.py", "LICENSE"} <= set(found.files)
    text = (out / "README.md").read_text()
    assert 'AutoModel.from_pretrained("user/name", trust_remote_code=True)' in text
    assert ModelCard(text).data.license == "apache-2.0"
    assert "auto_map" in json.loads((out / "config.json").read_text())
    assert "auto_map" not in json.loads((model / "config.json").read_text())  # which is left as it was


def test_what_is_taken_away_is_all_that_we_write_and_nothing_else(model, card, out):
    found = assemble(model, card, "user/name", out, bundle_code=True)
    assert {name for name in found.files if name.endswith(".py")} <= set(STALE)
    assert not {"handler.py", "app.py", ".py", "*.py"} & set(STALE)


def test_the_command_says_what_would_go_and_what_is_wrong(model, card, capsys):
    command = ["--model", str(model), "--card", str(card), "--repo", "user/name", "--dry-run"]
    main(command)
    said = capsys.readouterr().out
    assert "model.safetensors" in said
    assert "nothing was uploaded to user/name" in said
    shutil.rmtree(model)
    with pytest.raises(SystemExit, match=r"^error: .* has no config\.json"):
        main(command)
