"""push_to_hub, from_pretrained and eval.publish by huggingface_hub's own client, against a Hub on this machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.hub_server import Hub

ROOT = Path(__file__).parent.parent

CLIENT = """
import json, sys, traceback
from pathlib import Path

sys.modules["triton"] = None  # as where it is not installed
out = Path(sys.argv[1])
import torch, transformers
from huggingface_hub import HfApi, constants
from transformers import AutoFeatureExtractor, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import leviathan
from eval import publish
from tests.test_export import every_model, field_tokenizer, result_of, text_tokenizer

constants.DOWNLOAD_CHUNK_SIZE = 1024  # what has come is kept in pieces of this size: ten megabytes, of its own accord
report, api = {"differ": [], "loaded": []}, HfApi()
models = {}

def same(model, other):
    one, two = model.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)

def refused(what, **given):
    try:
        AutoModelForCausalLM.from_pretrained(what, **given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

# Every model there and back.
for name, model, auto, inputs in every_model():
    models[name] = model
    model.push_to_hub(f"user/{name}")
    load = type(model) if name == "khronos_classes" else auto
    again = load.from_pretrained(f"user/{name}")
    expected, found = result_of(model, inputs), result_of(again, inputs)
    is_same = type(again) is type(model) and all(torch.equal(expected[k], found[k]) for k in expected)
    report["loaded" if is_same and same(model, again) else "differ"].append(name)
field_tokenizer().push_to_hub("user/window")
report["fields"] = AutoFeatureExtractor.from_pretrained("user/window").to_dict() == field_tokenizer().to_dict()
text_tokenizer().push_to_hub("user/separable")
report["text"] = AutoTokenizer.from_pretrained("user/separable")("w3 w5").input_ids

# Shards, settings of generation, revisions.
model = models["separable"]
model.generation_config = GenerationConfig(max_new_tokens=3, top_k=5, do_sample=True)
first = model.push_to_hub("user/shards", max_shard_size="15KB")
weights = {key: value.clone() for key, value in model.state_dict().items()}
again = AutoModelForCausalLM.from_pretrained("user/shards")
report["shards"] = same(again, model)
settings = again.generation_config
report["generation"] = [settings.max_new_tokens, settings.top_k, settings.do_sample]
api.create_tag("user/shards", tag="v1")
api.create_branch("user/shards", branch="next")
with torch.no_grad():
    model.model.norm.weight.add_(1)
model.push_to_hub("user/shards", max_shard_size="15KB", revision="next")
report["revisions"] = {
    revision: "new" if same(AutoModelForCausalLM.from_pretrained("user/shards", revision=revision), model) else "old"
    for revision in (first.oid, "v1", "main", "next")
}
report["no revision"] = refused("user/shards", revision="v2")

# What goes wrong.
model.push_to_hub("user/private", private=True)
report["with token"] = same(AutoModelForCausalLM.from_pretrained("user/private"), model)
for name in ("short", "lost", "spoilt", "cut"):
    model.push_to_hub(f"user/{name}", max_shard_size="15KB")
report["no repository"] = refused("user/nothing")
report["without token"] = refused("user/private", token=False, cache_dir=out / "empty")
report["bad token"] = refused("user/private", token="hf_wrong", cache_dir=out / "empty")
report["short"] = refused("user/short")
report["lost"] = refused("user/lost")
report["cut"] = same(AutoModelForCausalLM.from_pretrained("user/cut"), model)
report["spoilt"] = refused("user/spoilt")
report["verified"] = {
    name: [each["path"] for each in api.verify_repo_checksums(f"user/{name}").mismatches] for name in ("spoilt", "cut")
}
try:
    model.push_to_hub("somebody/else")
except Exception as error:
    report["not mine"] = f"{type(error).__name__}: {error}"

# The command.
runs = out / "runs"
for name in ("window", "khronos", "separable"):
    models[name].save_pretrained(runs / name, max_shard_size="15KB")
    (runs / name / "checkpoint-1").mkdir()
    (runs / name / "checkpoint-1" / "optimizer.pt").write_bytes(b"pickle")
    (runs / name / "training_args.bin").write_bytes(b"pickle")
    (runs / name / "token_counts.safetensors").write_bytes(b"")
made = {"command": "python -m training.train", "commit": "abc", "changed_since_commit": False}
(runs / "window" / "training.json").write_text(json.dumps({"provenance": made}))
field_tokenizer().save_pretrained(runs / "window")
text_tokenizer().save_pretrained(runs / "separable")
CARDS = ["--card", "model_cards/leviathan.md", "--results", "model_cards/leviathan/results.json"]
publish.main(["--model", str(runs / "window"), *CARDS, "--repo", "user/published", "--bundle-code"])
TABLE = ["--model", str(runs / "khronos"), "--card", "model_cards/khronos.md"]
publish.main([*TABLE, "--repo", "user/k", "--private"])
publish.main([*TABLE, "--repo", "user/dry", "--dry-run"])
try:
    publish.main([*TABLE, "--repo", "user/cut", "--private"])
except SystemExit as error:
    report["public"] = str(error)
report["published"] = same(AutoModelForCausalLM.from_pretrained("user/published"), models["window"])

# The code of the repository, from the Hub, as trust_remote_code=True takes it where the package is not installed.
remote = get_class_from_dynamic_module("remote_code.LeviathanForCausalLM", "user/published")
config = get_class_from_dynamic_module("remote_code.LeviathanConfig", "user/published")
loaded = remote.from_pretrained("user/published", config=config.from_pretrained("user/published"))
report["remote"] = type(loaded).__module__.startswith("transformers_modules.user.published.") and same(
    loaded, models["window"]
)
extractor = get_class_from_dynamic_module("tokenization_leviathan.FieldTokenizer", "user/published")
report["remote extractor"] = extractor.from_pretrained("user/published").to_dict()["order"]

# Again, in one shard and without the code: nothing of the first is left.
models["window"].save_pretrained(runs / "window")
publish.main(["--model", str(runs / "window"), *CARDS, "--repo", "user/published"])
report["again"] = same(AutoModelForCausalLM.from_pretrained("user/published"), models["window"])
(out / "report.json").write_text(json.dumps(report))
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("client")


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        hub.cut.add("user/cut")
        hub.short.add("user/short")
        hub.lost.add("user/lost")
        hub.spoilt.add("user/spoilt")
        yield hub


@pytest.fixture(scope="module")
def report(hub, out):
    environment = {k: os.environ[k] for k in ("PATH", "HOME", "LANG") if k in os.environ}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(out / "home"),
        "NO_PROXY": "127.0.0.1,localhost",
    }
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    (out / "client.py").write_text(CLIENT)
    command = [sys.executable, str(out / "client.py"), str(out)]
    run = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-5000:]
    return json.loads((out / "report.json").read_text())


def test_every_model_comes_back_from_the_hub_as_it_went(report):
    assert report["differ"] == []
    assert len(report["loaded"]) > 15
    assert report["fields"]
    assert report["text"] == [3, 5]


def test_the_server_understood_all_that_the_client_asked_for(report, hub):
    assert hub.unknown == []


def test_shards_settings_and_revisions(report, hub):
    assert report["shards"]
    files = hub.repositories["user/shards"].files()
    shards = set(json.loads(files["model.safetensors.index.json"])["weight_map"].values())
    assert len(shards) >= 3
    assert shards <= files.keys()
    assert "model.safetensors" not in files
    assert json.loads(files["generation_config.json"])["top_k"] == 5
    assert report["generation"] == [3, 5, True]
    assert list(report["revisions"].values()) == ["old", "old", "old", "new"]
    assert "v2 is not a valid git identifier" in report["no revision"]


def test_what_is_missing_or_private_is_said(report):
    assert "user/nothing is not a local folder and is not a valid model identifier" in report["no repository"]
    assert report["with token"]
    for case in ("without token", "bad token"):
        assert "user/private" in report[case]
    assert "private" in report["without token"]
    assert "403" in report["not mine"]


def test_a_connection_that_breaks_is_taken_up_again_where_it_broke(report, hub):
    assert report["cut"]
    assert hub.ranges["user/cut"] == len(hub.already_cut) >= 3


def test_shards_that_are_not_whole_are_refused(report):
    assert "Consistency check failed" in report["short"]
    assert "does not appear to have files named ('model-00001-of-" in report["lost"]


def test_a_byte_that_changed_on_the_way_is_found_by_verifying(report):
    assert report["spoilt"] is None  # huggingface_hub compares sizes alone when it downloads
    assert report["verified"]["cut"] == []
    assert len(report["verified"]["spoilt"]) >= 3


def test_the_command_publishes_one_commit_of_what_is_allowed(report, hub):
    assert report["published"]
    repository = hub.repositories["user/published"]
    assert repository.messages[0] == "initial commit"
    assert len(repository.messages) == 3  # and one for each run of the command
    first = list(repository.commits.values())[1]
    assert {"config.json", "README.md", "LICENSE", "preprocessor_config.json", "remote_code.py"} <= first.keys()
    assert not {name for name in first if name.endswith((".bin", ".pt", "training.json")) or "counts" in name}
    assert all(name.endswith((".json", ".safetensors", ".py", ".md", ".png")) or name == "LICENSE" for name in first)
    text = first["README.md"].decode()
    assert 'path = "user/published"' in text
    assert 'LeviathanForCausalLM.from_pretrained("user/published")' in text
    assert 'AutoModelForCausalLM.from_pretrained("user/published", trust_remote_code=True)' in text
    assert "commit abc." in text
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["library_name"] == "transformers"
    assert metadata["license"] == "apache-2.0"
    assert "prefix-lm" in metadata["tags"]
    (index,) = metadata["model-index"]
    record = json.loads((ROOT / "model_cards" / "leviathan" / "results.json").read_text())
    steps, found = record["spectra"]["steps"], {m["name"]: m["value"] for r in index["results"] for m in r["metrics"]}
    assert found[f"nRMSE, step {steps[-1]}, sample"] == record["rows"]["sample"]["metrics"]["nrmse"]["mean"][-1]


def test_publishing_again_leaves_nothing_of_before(report, hub):
    assert report["again"]
    names = hub.repositories["user/published"].files().keys()
    assert {name for name in names if name.endswith((".safetensors", ".py", ".index.json"))} == {"model.safetensors"}


def test_the_repository_of_a_table_is_private_where_asked(report, hub):
    assert hub.repositories["user/k"].private
    files = hub.repositories["user/k"].files()
    text = files["README.md"].decode()
    pictures = {path.relative_to(ROOT / "model_cards").as_posix() for path in ROOT.glob("model_cards/khronos/*.png")}
    assert pictures == {name for name in files if name.endswith(".png")} == set(re.findall(r"\]\(([^)]+\.png)\)", text))
    assert all(files[name] == (ROOT / "model_cards" / name).read_bytes() for name in pictures)
    assert yaml.safe_load(text.split("---\n")[1])["pipeline_tag"] == "tabular-regression"
    assert "user/dry" not in hub.repositories
    assert "there already and public" in report["public"]


def test_the_code_of_a_repository_loads_from_the_hub(report):
    assert report["remote"]
    assert report["remote extractor"] == "hilbert"
