"""What leviathan.export writes loads, to the bit, where nothing but torch and transformers is installed."""

import ast
import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from leviathan import (
    FieldTokenizer,
    KhronosConfig,
    KhronosForClassification,
    KhronosModel,
    LeviathanConfig,
    LeviathanForCausalLM,
    LeviathanModel,
    SnaConfig,
    SnaJanusConfig,
    SnaJanusModel,
    SnaModel,
    SpanConfig,
    SpanModel,
    VsnaConfig,
    VsnaModel,
    bundling,
)
from leviathan.bundling import PACKAGES, bundle, flat_name, source_path
from leviathan.repository import export

VOCAB = 81
BODY = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
SEPARABLE = {"embedding_base": 9, "embedding_seed_dim": 4, "embedding_num_heads": 2, "embedding_num_knots": 4}
LEVIATHANS = {
    "separable": {**SEPARABLE, "embedding_ordered": True, "embedding_token_rank": 2},
    "tied": {**SEPARABLE, "tie_word_embeddings": True},
    "codebook_digits": {"embedding_type": "codebook", "embedding_base": 9, "output_head": "digits"},
    "low_rank": {"embedding_type": "low_rank", "embedding_rank": 3, "loss_chunk_size": 4},
    "lookup": {"embedding_type": "lookup", "tie_word_embeddings": True},
    "window": {**SEPARABLE, "position_layout": "window", "patch_size": 2, "patch_margin": 1, "output_head": "digits"},
}
TABLES = {
    "sna": lambda: SnaModel(SnaConfig(num_inputs=2, rank=2, num_cells=4)),
    "sna_tucker": lambda: SnaModel(SnaConfig(num_inputs=2, rank=2, basis="fourier", decomposition="tucker")),
    "sna_mlp": lambda: SnaModel(SnaConfig(num_inputs=2, rank=2, basis="mlp", decomposition="tensor_train")),
    "khronos": lambda: KhronosModel(KhronosConfig(input_low=[0, 0], input_high=[1, 1], rank=2, extrapolate="linear")),
    "khronos_classes": lambda: KhronosForClassification(
        KhronosConfig(input_low=[0, 0], input_high=[1, 1], rank=2, num_labels=3)
    ),
    "span": lambda: SpanModel(SpanConfig(num_inputs=2, latent_dim=3, rank=2, num_cells=4, num_blocks=2)),
    **{
        f"vsna_{form}": lambda form=form: filled(
            VsnaModel(
                VsnaConfig(axes=[{"name": name, "low": 0, "high": 1} for name in "xt"], rank=2, decomposition=form)
            )
        )
        for form in ("cp", "tucker", "tensor_train")
    },
}
CELLS = {"resolution": 4, "channels": [4], "latent_dim": 6, "head_rank": 3, "head_num_cells": 4, "num_codes": 8}
PREFIX = 16  # tokens of the window of a patch of 2 x 2 with a margin of 1


def filled(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def every_model():
    """(name, model, the Auto class that loads it, its inputs) of each model and of its kinds."""
    torch.manual_seed(0)
    for name, options in LEVIATHANS.items():
        model = LeviathanForCausalLM(LeviathanConfig(**BODY, **options))
        inputs = {"input_ids": torch.randint(VOCAB, (2, PREFIX + 3)), "prefix_length": PREFIX}
        yield name, model, AutoModelForCausalLM, inputs
    yield "body", LeviathanModel(LeviathanConfig(**BODY, **SEPARABLE)), AutoModel, {"input_ids": torch.tensor([[1, 2]])}
    for name, build in TABLES.items():
        model = build()
        yield name, model, AutoModel, {model.main_input_name: torch.rand(5, 2, dtype=model.dtype)}
    for name, options in {"janus": {}, "janus_plane": {"spatial_dims": 2, "head": "mlp"}}.items():
        model = SnaJanusModel(SnaJanusConfig(**CELLS, **options))
        yield name, model, AutoModel, {"cells": (torch.rand(3, *model.config.shape) > 0.5).float()}


def field_tokenizer():
    return FieldTokenizer(patch_size=2, num_bits=6, base=8, low=-1.0, high=1.0, order="hilbert", margin=1)


def text_tokenizer():
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w0", unk_token="w1")


def result_of(model, inputs):
    """All tensors of a model's output, and what a language model generates."""
    with torch.no_grad():
        outputs = model.eval()(**inputs)
        found = dict(outputs) if not isinstance(outputs, torch.Tensor) else {"values": outputs}
        found = {k: v.contiguous() for k, v in found.items() if isinstance(v, torch.Tensor)}
        if hasattr(model, "lm_head"):
            prompt = {k: v[:, :PREFIX] if k == "input_ids" else v for k, v in inputs.items()}
            found["generated"] = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    return found


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """A bundled repository of each model in a folder, with its inputs and results beside it."""
    root = tmp_path_factory.mktemp("repositories")
    for name, model, auto, inputs in every_model():
        # A text tokenizer goes along with one of the language models, fields with another.
        extra = {"window": field_tokenizer, "separable": text_tokenizer}.get(name)
        export(root / name, model, *([extra()] if extra else []), bundle_code=True)
        given = {k: v if isinstance(v, torch.Tensor) else torch.tensor(v) for k, v in inputs.items()}
        save_file(given, root / f"{name}.inputs", metadata={"auto": auto.__name__})
        save_file(result_of(model, inputs), root / f"{name}.results")
    export(root / "extractor", field_tokenizer(), bundle_code=True)
    fields = torch.rand(1, 4, 4) * 3 - 1.5
    save_file({"fields": fields, "ids": field_tokenizer()(fields).input_ids.contiguous()}, root / "extractor.results")
    return root


# --------------------------------------------------------------------------------------------- without the package


def required_by(*names):
    """Distributions that these need, themselves included, without extras."""
    found, waiting = {}, list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for line in found[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of packages with torch, transformers and what they need, and nothing else: no Triton either."""
    site = tmp_path_factory.mktemp("site")
    for name, distribution in required_by("torch", "transformers").items():
        tops = {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}
        for top in tops if name != "triton" else ():
            target, link = distribution.locate_file(top), site / top
            if not link.exists() and Path(target).exists():
                link.symlink_to(target)
    return site


ELSEWHERE = """
import importlib.util, json, sys
from pathlib import Path
root, site, out = map(Path, sys.argv[1:4])
sys.path.append(str(site))
absent = ["leviathan", "sna_core", "triton", "scipy", "accelerate", "pytest"]
report = {"installed": [name for name in absent if importlib.util.find_spec(name)], "differ": [], "loaded": []}

import torch, transformers
from safetensors import safe_open
from safetensors.torch import load_file
RESULT_OF

transformers.logging.set_verbosity_error()
for inputs in sorted(root.glob("*.inputs")):
    name = inputs.stem
    with safe_open(inputs, "pt") as file:
        auto = getattr(transformers, file.metadata()["auto"])
    try:
        auto.from_pretrained(root / name)
        report.setdefault("untrusted", []).append(name)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    model = auto.from_pretrained(root / name, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    given = {k: v if v.ndim else v.item() for k, v in load_file(inputs).items()}
    found, expected = result_of(model, given), load_file(root / f"{name}.results")
    same = found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    report["loaded" if same else "differ"].append(name)

body = transformers.AutoModel.from_pretrained(root / "separable", trust_remote_code=True)
report["body"] = type(body).__name__
extractor = transformers.AutoFeatureExtractor.from_pretrained(root / "extractor", trust_remote_code=True)
beside = transformers.AutoFeatureExtractor.from_pretrained(root / "window", trust_remote_code=True)
case = load_file(root / "extractor.results")
report["extractor"] = all(torch.equal(each(case["fields"]).input_ids, case["ids"]) for each in (extractor, beside))
text = transformers.AutoTokenizer.from_pretrained(root / "separable", trust_remote_code=True)
report["text"] = text("w3 w5").input_ids
pipe = transformers.pipeline("text-generation", root / "separable", trust_remote_code=True)
report["pipeline"] = pipe("w3 w5", max_new_tokens=2, do_sample=False)[0]["generated_text"]

# Saved again by somebody who has only the repository.
model = transformers.AutoModelForCausalLM.from_pretrained(root / "window", trust_remote_code=True)
model.save_pretrained(root / "again")
again = transformers.AutoModelForCausalLM.from_pretrained(root / "again", trust_remote_code=True)
given = {k: v if v.ndim else v.item() for k, v in load_file(root / "window.inputs").items()}
extractor.save_pretrained(root / "extractor again")
extractor = transformers.AutoFeatureExtractor.from_pretrained(root / "extractor again", trust_remote_code=True)
report["maps again"] = [
    json.loads((root / name / "config.json").read_text())["auto_map"] for name in ("window", "again")
]
report["extractor again"] = torch.equal(extractor(case["fields"]).input_ids, case["ids"])
report["again"] = torch.equal(result_of(again, given)["logits"], load_file(root / "window.results")["logits"])
out.write_text(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(repositories, site):
    script = repositories / "elsewhere.py"
    constants = f"PREFIX = {PREFIX}\n"
    script.write_text(ELSEWHERE.replace("RESULT_OF", constants + inspect.getsource(result_of)))
    environment = {k: os.environ[k] for k in ("PATH", "HOME", "LANG") if k in os.environ}
    environment |= {"HF_HOME": str(repositories / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # Neither site-packages (-S) nor the folder it is run from (-I).
    command = [sys.executable, "-I", "-S", str(script), str(repositories), str(site), str(repositories / "report")]
    run = subprocess.run(command, env=environment, cwd=site, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((repositories / "report").read_text())


def test_every_model_is_the_same_to_the_bit_where_only_torch_and_transformers_are(report):
    assert report["installed"] == []
    assert report["differ"] == []
    assert sorted(report["loaded"]) == sorted(name for name, *_ in every_model())


def test_nothing_of_a_repository_runs_without_trust(report):
    assert "untrusted" not in report


def test_tokenizers_and_pipelines_go_along(report):
    assert report["body"] == "LeviathanModel"
    assert report["extractor"]
    assert report["text"] == [3, 5]
    assert report["pipeline"].startswith("w3 w5")


def test_what_is_saved_again_elsewhere_loads_elsewhere(report):
    assert report["again"]
    assert report["extractor again"]
    expected = {
        "AutoConfig": "remote_code.LeviathanConfig",
        "AutoModel": "remote_code.LeviathanModel",
        "AutoModelForCausalLM": "remote_code.LeviathanForCausalLM",
    }
    assert report["maps again"] == [expected, expected]


# ------------------------------------------------------------------------------------------------ with the package


def test_where_the_package_is_imported_its_classes_win(repositories, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    for name, model, auto, inputs in every_model():
        folder = repositories / name
        load = auto if name != "khronos_classes" else type(model)  # whose Auto class is another model's
        for trust in (None, True) if load is auto else (None,):
            loaded = load.from_pretrained(folder, **({"trust_remote_code": trust} if trust else {}))
            assert type(loaded) is type(model)
        expected = load_file(repositories / f"{name}.results")
        assert all(torch.equal(value, expected[key]) for key, value in result_of(loaded, inputs).items())
    extractor = AutoFeatureExtractor.from_pretrained(repositories / "extractor", trust_remote_code=True)
    assert type(extractor) is FieldTokenizer
    assert not list(tmp_path.iterdir())  # no code was copied to run it


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_bytes_every_time_and_nothing_stale(tmp_path):
    model = SpanModel(SpanConfig(num_inputs=2, latent_dim=2, rank=2))
    modules = export(tmp_path, model, bundle_code=True)
    first = contents(tmp_path)
    assert {module.name for module in modules} == {name for name in first if name.endswith(".py")}
    assert json.loads(first["config.json"])["auto_map"] == {
        "AutoConfig": "remote_code.SpanConfig",
        "AutoModel": "remote_code.SpanModel",
    }
    assert json.loads(first["config.json"])["architectures"] == ["SpanModel"]
    (tmp_path / "old.py").write_text("# Written by leviathan.export: old.py\n")
    (tmp_path / "own.py").write_text("mine = True\n")
    export(tmp_path, bundle_code=True)
    assert contents(tmp_path) == first | {"own.py": b"mine = True\n"}
    (tmp_path / "own.py").unlink()
    export(tmp_path, SnaModel(SnaConfig(num_inputs=1)), bundle_code=True)
    assert not (tmp_path / "span.py").exists()
    assert AutoConfig.from_pretrained(tmp_path).model_type == "sna"


def test_without_the_code_no_trace_of_it_is_left(tmp_path):
    model, tokenizer = LeviathanForCausalLM(LeviathanConfig(**BODY, **SEPARABLE)), field_tokenizer()
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# Mine\n")
    assert export(tmp_path, model, tokenizer) == []
    plain = contents(tmp_path)
    export(tmp_path, bundle_code=True)
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("---\nlicense: apache-2.0\n---\n\n# Mine\n\n<!-- leviathan.export -->")
    assert "AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)" in readme
    assert re.search(r"leviathan-sna \d+\.\d+\.\d+", readme)
    assert "`torch" in readme
    assert "`transformers" in readme
    # Whoever loads it here and saves it elsewhere does not take the reference to the code along.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    export(tmp_path / "plain", loaded, AutoFeatureExtractor.from_pretrained(tmp_path))
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "auto_map" not in json.loads((tmp_path / "plain" / "preprocessor_config.json").read_text())
    (tmp_path / "plain").rename(tmp_path.parent / f"{tmp_path.name}-plain")
    export(tmp_path)
    assert contents(tmp_path).keys() == plain.keys()
    for name in plain.keys() - {"config.json", "preprocessor_config.json"}:
        assert contents(tmp_path)[name] == plain[name]
    for name in ("config.json", "preprocessor_config.json"):
        assert json.loads(contents(tmp_path)[name]) == json.loads(plain[name])


class Adapter:
    """Saved as peft does: the adapter alone, with no config of a model."""

    def save_pretrained(self, folder):
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")


def test_code_that_is_not_ours_stays_with_its_model(tmp_path):
    config = {"model_type": "theirs", "auto_map": {"AutoConfig": "configuration_theirs.TheirConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    export(tmp_path)
    export(tmp_path, field_tokenizer(), bundle_code=True)
    assert json.loads((tmp_path / "config.json").read_text()) == config
    assert "license:" not in (tmp_path / "README.md").read_text()  # of weights, whose owner decides


def test_what_cannot_be_exported_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"neither config\.json nor preprocessor_config\.json"):
        export(tmp_path, bundle_code=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        export(tmp_path / "file", SpanModel(SpanConfig(num_inputs=1)))
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds a list; expected an object"):
        export(tmp_path / "list", bundle_code=True)
    with pytest.raises(ValueError, match=r"an adapter is merged first \(merge_and_unload\)"):
        export(tmp_path / "adapter", Adapter(), bundle_code=True)
    with pytest.raises(ValueError, match="dict has no save_pretrained"):
        export(tmp_path, {}, bundle_code=True)
    llama = LeviathanForCausalLM(LeviathanConfig(**BODY, **SEPARABLE)).to_llama()
    assert isinstance(llama, LlamaForCausalLM)
    with pytest.raises(ValueError, match="load without code of ours"):
        export(tmp_path / "llama", llama, bundle_code=True)
    export(tmp_path / "llama", field_tokenizer(), bundle_code=True)  # a baked model keeps its fields
    assert "auto_map" not in json.loads((tmp_path / "llama" / "config.json").read_text())
    model = SpanModel(SpanConfig(num_inputs=1))
    (tmp_path / "span").mkdir()
    (tmp_path / "span" / "sna_latent.py").write_text("mine = True\n")
    with pytest.raises(ValueError, match="was not written by export and would be overwritten"):
        export(tmp_path / "span", model, bundle_code=True)
    assert (tmp_path / "span" / "sna_latent.py").read_text() == "mine = True\n"


# ----------------------------------------------------------------------------------------------------- the bundle


def test_a_bundle_imports_by_one_dot_what_it_holds_and_no_other_package():
    sources = bundle(["leviathan.janus.modeling", "leviathan.vsna.modeling", "leviathan.khronos.classification"])
    names = {flat_name(module) for module in sources}
    assert len(names) == len(sources)
    for module, source in sources.items():
        original = source_path(module).read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert {node.module} if node.module else {a.name for a in node.names} <= names
            elif isinstance(node, ast.ImportFrom):
                assert node.module.partition(".")[0] not in PACKAGES
            elif isinstance(node, ast.Import):
                assert not {a.name.partition(".")[0] for a in node.names} & set(PACKAGES)
        # Whatever is no import is word for word what it was.
        kept = [
            ast.dump(n) for n in ast.parse(source).body if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Assign)
        ]
        if not module.endswith(("local_sum", "generator")):  # which import inside of a function
            assert kept == [
                ast.dump(n)
                for n in ast.parse(original).body
                if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Assign)
            ]


def test_names_of_modules_that_would_clash_are_refused(tmp_path, monkeypatch):
    for name, text in {
        "leviathan/a_b.py": "from leviathan.a import b\n",
        "leviathan/a/__init__.py": "",
        "leviathan/a/b.py": "x = 1\n",
        "leviathan/whole.py": "from leviathan import x\n",
        "leviathan/dotted.py": "import sna_core.c\n",
        "leviathan/lazy.py": "def f():\n    from .a import b as c, y\n    import other\n    return c\n",
        "leviathan/guarded.py": "try:\n    import other\nexcept ImportError:\n    other = None\n",
        "sna_core/c.py": "import torch; import other.part as é; x = 'é'\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("leviathan.bundling.ROOT", tmp_path)
    monkeypatch.setattr("leviathan.bundling._flatten", bundling._flatten.__wrapped__)
    with pytest.raises(ValueError, match=r"leviathan\.a\.b and leviathan\.a_b would both be a_b\.py"):
        bundle(["leviathan.a_b"])
    with pytest.raises(ValueError, match=r"whole\.py:1: import x from the module that defines it, not from leviathan"):
        bundle(["leviathan.whole"])
    with pytest.raises(ValueError, match=r"dotted\.py:1: import sna_core\.c has no flat form"):
        bundle(["leviathan.dotted"])
    for absent in ("leviathan.absent", "torch", "json"):
        with pytest.raises(ValueError, match="is no module of leviathan or sna_core"):
            bundle([absent])
    assert bundle(["leviathan.lazy"])["leviathan.lazy"] == (
        "def f():\n    from .a_b import __name__ as _a_b\n    from . import a_b as c\n    from .a import y\n"
        "    try:\n        import other\n    except ImportError:\n        raise\n    return c\n"
    )
    assert bundle(["leviathan.guarded"])["leviathan.guarded"] == (tmp_path / "leviathan/guarded.py").read_text()
