"""What `import leviathan` promises: it is quick, quiet, and every Auto class knows the models, whoever comes first."""

import ast
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import leviathan

ROOT = Path(__file__).resolve().parent.parent
AUTO = """
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCausalLM
import leviathan as L
models = {"khronos": "KhronosModel", "leviathan": "LeviathanModel", "sna": "SnaModel", "sna_janus": "SnaJanusModel"}
models |= {"span": "SpanModel", "vsna": "VsnaModel"}
for model_type, name in models.items():
    config = AutoConfig.for_model(model_type)
    assert AutoModel._model_mapping[type(config)] is getattr(L, name)
assert AutoModelForCausalLM._model_mapping[L.LeviathanConfig] is L.LeviathanForCausalLM
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
assert FEATURE_EXTRACTOR_MAPPING[L.LeviathanConfig] is L.FieldTokenizer
import sys
assert not [each for each in sys.meta_path if type(each).__module__ == "leviathan.registration"]
"""


def run(code, *options):
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_imports_nothing_until_asked():
    code = "import sys, leviathan, sna_core.digits; print({'transformers', 'numpy'} & set(sys.modules))"
    assert run(code.replace(", sna_core.digits", "")).strip() == "set()"


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoConfig; import leviathan",
        # modeling_layers imports the Auto classes halfway through itself.
        "import leviathan, transformers.modeling_layers",
        "import leviathan.khronos.modeling",
    ],
)
def test_auto_classes_know_the_models(first):
    run(f"{first}\n{AUTO}")


def test_a_failed_import_does_not_lose_the_registration():
    code = """
    import sys, leviathan
    sys.modules["leviathan.span"] = None
    try:
        from transformers import AutoConfig
    except ImportError:
        pass
    else:
        raise SystemExit("imported")
    del sys.modules["leviathan.span"]
    """
    run("\n".join(line[4:] for line in code.splitlines()) + AUTO)


def test_names():
    tree = ast.parse(Path(leviathan.__file__).read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {alias.name: node.module.partition(".")[2] for node in checked.body for alias in node.names}
    assert typed == leviathan._MODULES
    assert sorted(typed) == sorted(leviathan.__all__)
    assert set(leviathan.__all__) <= set(dir(leviathan))
    for name in leviathan.__all__:
        assert getattr(leviathan, name).__name__ == name
    assert leviathan.khronos.__name__ == "leviathan.khronos"
    for name in ("nothing", "_nothing", "__nothing__", "no.thing"):
        with pytest.raises(AttributeError, match=f"'leviathan' has no attribute '{name}'"):
            getattr(leviathan, name)


def test_import_of_all_names_at_once():
    namespace = {}
    exec("from leviathan import *", namespace)
    assert set(leviathan.__all__) <= set(namespace)


def modules():
    """All of both packages, but for integrations whose library is not installed and Triton's kernels."""
    for package in ("sna_core", "leviathan"):
        for found in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            library = found.name.rpartition(".")[2] if ".integrations." in found.name else "torch"
            library = {"sb3": "stable_baselines3"}.get(library, library)
            if importlib.util.find_spec(library) and not found.name.endswith("_triton"):
                yield found.name


def test_imports_warn_of_nothing():
    """Warnings are errors from the first import on: of our modules in Python, of other packages in theirs too."""
    names = sorted(modules())
    assert "leviathan.khronos.modeling" in names
    theirs = sorted({"gymnasium", "sklearn", "stable_baselines3", "torch", "transformers.modeling_utils"})
    found = [name for name in theirs if importlib.util.find_spec(name.partition(".")[0])]
    code = f"import warnings\nfor each in {found}: __import__(each)\nwarnings.simplefilter('error')\n"
    run(code + f"for each in {names}: __import__(each)")


def test_with_warnings_as_errors():
    run("import leviathan", "-W", "error")


@pytest.mark.parametrize("package", ["sna_core", "leviathan", "training", "eval"])
def test_no_source_writes_or_reads_pickle(package):
    """What test_layering cannot see by imports: methods of others that pickle."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in ("read_pickle", "to_pickle", "load_pickle", "unsafe_load"), path
                for keyword in node.keywords:
                    wanted = getattr(keyword.value, "value", None)
                    assert (keyword.arg, wanted) not in (("allow_pickle", True), ("weights_only", False)), path
                    assert keyword.arg != "trust_remote_code" or wanted is not True, path
                    assert keyword.arg != "shell" or wanted is not True, path
