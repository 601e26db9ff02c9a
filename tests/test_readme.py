"""The snippets of README and of the guides run as written, and what their commands and links name exists."""

import importlib.util
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eval.summary import with_results
from leviathan import FieldTokenizer, LeviathanConfig, LeviathanForCausalLM, SnaJanusConfig, SnaJanusModel
from sna_core import SeparableEmbedding
from training.settings import read_settings
from training.train import allowed_keys
from training.turbulence import FlowSettings, write_fields

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}


def fences(language, *pages):
    return [fence for page in pages for fence in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)]


def tiny(folder, vocab_size, **options):
    config = LeviathanConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        embedding_seed_dim=8,
        embedding_num_heads=2,
        embedding_rank=4,
        **options,
    )
    LeviathanForCausalLM(config).save_pretrained(folder)


def test_snippets_run_as_written(tmp_path, monkeypatch):
    """In a folder that holds what the README says `make demo` and `make janus` leave, and a text model."""
    monkeypatch.chdir(tmp_path)
    flow = FlowSettings(num_trajectories=1, num_grid=16, num_snapshots=2, viscosity=1e-3)
    data = write_fields(tmp_path / "runs/demo/data.hdf5", flow, progress=False)
    assert data.exists()
    FieldTokenizer(patch_size=8, num_bits=4, base=4, low=-90.0, high=90.0).save_pretrained("runs/demo/model")
    tiny("runs/demo/model", 16, embedding_base=4)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "Once": 1, "upon": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    text = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[UNK]", model_input_names=["input_ids"])
    text.save_pretrained("runs/text/model")
    tiny("runs/text/model", 3)
    statistics = {"property_mean": [150.0, 0.45], "property_std": [80.0, 0.1], "property_high": [400.0, 0.8]}
    config = SnaJanusConfig(
        **{"resolution": 4, "channels": [4], "latent_dim": 4, "head_rank": 2},
        **{"property_names": ["C1111", "volume_fraction"], **statistics},
    )
    SnaJanusModel(config).save_pretrained("runs/janus/model")

    snippets = fences("python", README)
    assert len(snippets) == 9
    namespace = {}
    for number, snippet in enumerate(snippets):
        # The README is ours, and running what it says is the point of this test.
        exec(compile(snippet, f"README.md snippet {number}", "exec"), namespace)
    assert namespace["fields"].shape == (1, 20, 16, 16)
    assert namespace["table"].shape == (4096, 64)
    assert isinstance(namespace["embedding"], torch.nn.Module)
    assert namespace["found"].converged.any()
    assert namespace["score"] > 0.9
    assert namespace["design"].cells.shape == (16, 4, 4, 4)
    assert namespace["phase"].grad.isfinite().all()
    assert namespace["flow"].shape == (1, 3, 3)
    mean = 2 / math.pi * math.exp(-0.005 * math.pi**2)  # over x, at t = 1
    assert namespace["cooling"](torch.ones(1, 1)).item() == pytest.approx(mean, abs=1e-6)
    assert type(namespace["llama"]).__name__ == "LlamaForCausalLM"


def commands():
    joined = [fence.replace("\\\n", " ") for fence in fences("bash", README, *GUIDES.values())]
    lines = [line.split("#")[0].strip() for fence in joined for line in fence.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("line", commands())
def test_commands_name_what_exists(line):
    words = shlex.split(line)
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
        return
    module = words[words.index("-m") + 1]
    assert importlib.util.find_spec(module) is not None
    for word in words:
        if word.startswith("training/configs/"):
            assert (ROOT / word).is_file()
    if module == "training.train":
        flags = words[words.index("--config") + 2 :]
        read_settings(ROOT / words[words.index("--config") + 1], [f for f in flags if f != "--dry-run"], allowed_keys())


def test_the_sizes_it_names():
    parameters = sum(p.numel() for p in SeparableEmbedding(65_536, 512, device="meta").parameters())
    assert f"{parameters / 1e6:.1f} million parameters instead of {65_536 * 512 / 1e6:.1f}" in README


def test_the_table_of_results_is_that_of_the_records():
    assert with_results(README) == README


def test_links_and_map_name_files_that_exist():
    for path, page in {ROOT / "README.md": README, **GUIDES}.items():
        for target in re.findall(r"\]\(([^)#]+)\)", page):
            assert target.startswith("https://") or (path.parent / target).exists(), target
    block = README.split("## Where things are")[1].split("## ")[0]
    folder = ROOT
    for line in block.splitlines():
        if match := re.match(r" {4}(\w+)/", line):
            folder = ROOT / match[1]
            assert folder.is_dir()
        for name in re.findall(r"[\w/]+\.py", line):
            assert (folder / name).is_file() or (ROOT / name).is_file(), name


@pytest.mark.clients
def test_snippets_of_sharing_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for number, snippet in enumerate(fences("python", GUIDES[ROOT / "docs" / "sharing.md"])):
        exec(compile(snippet, f"sharing.md snippet {number}", "exec"), namespace)
    assert Path("runs/khronos.onnx").is_file()
    assert Path("runs/exported/remote_code.py").is_file()
