"""The rules of the house that can be read off the source: who imports whom, and what nobody calls."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["sna_core", "leviathan", "training", "eval", "tests"]  # each may import those before it
LIBRARIES = {
    "sna_core": {"torch"},
    "leviathan": {"huggingface_hub", "numpy", "safetensors", "torch", "tqdm", "transformers"},
}
INTEGRATIONS = {"carla": {"carla", "gymnasium"}, "sb3": {"gymnasium", "stable_baselines3"}}  # others: their name
MODELS = {"janus", "khronos", "leviathan", "sna", "span", "vsna"}  # do not import one another
UNWANTED_NAMES = {"base", "common", "helpers", "utils"}
UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "yaml.full_load", "yaml.unsafe_load"}
SAFE_LOADERS = {"yaml.CSafeLoader", "yaml.SafeLoader"}


def violations(root):
    """One line for each broken rule in the packages under ``root``: "file:line: what"."""
    found = []
    for package in ORDER:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            tree = ast.parse(path.read_text(encoding="utf-8"))
            imports = list(imported_names(tree, parts))
            broken = [(1, f"is named {name}") for name in parts if name in UNWANTED_NAMES]
            broken += [(node.lineno, problem) for node, _, name in imports for problem in import_problems(parts, name)]
            if package != "tests":
                broken += [(node.lineno, f"calls {call}") for node, call in unsafe_calls(tree, imports)]
            found += [f"{'/'.join(parts)}.py:{line}: {problem}" for line, problem in broken]
    return found


def imported_names(tree, parts):
    """(node, name bound in the file, dotted name) of every import anywhere in a file, relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                yield node, bound, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = ".".join([*(parts[: -node.level] if node.level else ()), *filter(None, [node.module])])
            for alias in node.names:
                yield node, alias.asname or alias.name, f"{module}.{alias.name}"


def import_problems(parts, name):
    package, top = parts[0], name.partition(".")[0]
    if top in UNSAFE_MODULES and package != "tests":
        yield f"imports {top}"
    if top in ORDER:
        if ORDER.index(top) > ORDER.index(package):
            yield f"imports {name}: {package} comes before {top}"
        if top == package == "leviathan":
            others = models_in(name.partition(".")[2].partition(".")[0]) - models_in(parts[1])
            if models_in(parts[1]) and others:
                yield f"imports {name}: models do not import one another"
    elif package in LIBRARIES and top not in sys.stdlib_module_names | LIBRARIES[package] | own_libraries(parts):
        yield f"imports {top}"


def models_in(name):
    """Models that a module's or a class's name speaks of: modeling_leviathan, KhronosConfig."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+", name)} & MODELS


def own_libraries(parts):
    """Libraries that only this file may import: those of an integration, and Triton for kernels."""
    if parts[:2] == ("leviathan", "integrations") and len(parts) > 2:
        return INTEGRATIONS.get(parts[2], {parts[2]})
    return {"triton"} if parts[0] == "sna_core" and parts[-1].endswith("_triton") else set()


def unsafe_calls(tree, imports):
    """Calls that run code from a string or a file, through whatever alias."""
    bound = {}
    for node, name, target in imports:
        bound[name] = target if isinstance(node, ast.ImportFrom) or name != target.partition(".")[0] else name

    def dotted(node):
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return bound.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    def is_safe(loader):
        return loader is not None and dotted(loader) in SAFE_LOADERS | safe_subclasses

    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    safe_subclasses = {c.name for c in classes if {dotted(base) for base in c.bases} & SAFE_LOADERS}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func).removeprefix("builtins.")
        given = {k.arg: k.value for k in node.keywords}
        loader = given.get("Loader", node.args[1] if len(node.args) > 1 else None)
        if name in UNSAFE_CALLS:
            yield node, name
        elif name in ("yaml.load", "yaml.load_all") and not is_safe(loader):
            yield node, f"{name} without a safe loader"
        elif name == "numpy.load" and getattr(given.get("allow_pickle", ast.Constant(False)), "value", True):
            yield node, "numpy.load with allow_pickle"


def test_the_packages_keep_the_rules():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("sna_core/a.py", "import numpy", "imports numpy"),
        ("sna_core/a.py", "def f():\n    import triton.language", "imports triton"),
        ("sna_core/a.py", "def f():\n    from leviathan import khronos", "sna_core comes before leviathan"),
        ("leviathan/a.py", "from training.fields import read", "leviathan comes before training"),
        ("leviathan/a.py", "import h5py", "imports h5py"),
        ("leviathan/a.py", "import sklearn.base", "imports sklearn"),
        ("leviathan/integrations/sb3.py", "import sklearn", "imports sklearn"),
        ("leviathan/integrations/__init__.py", "import sklearn", "imports sklearn"),
        ("leviathan/span.py", "from leviathan.khronos import KhronosModel", "models do not import one another"),
        ("leviathan/span.py", "from leviathan import KhronosModel", "models do not import one another"),
        ("leviathan/span.py", "from . import sna", "models do not import one another"),
        (
            "leviathan/vsna/model.py",
            "from ..modeling_leviathan import LeviathanModel",
            "models do not import one another",
        ),
        ("training/a.py", "import torch\nimport eval.metrics", "training comes before eval"),
        ("eval/a.py", "import tests.test_layering", "eval comes before tests"),
        ("eval/a.py", "if True:\n    import pickle", "imports pickle"),
        ("eval/a.py", "eval('1')", "calls eval"),
        ("eval/a.py", "import builtins\nbuiltins.exec('1')", "calls exec"),
        ("training/a.py", "import torch\ntorch.load('x', weights_only=True)", "calls torch.load"),
        ("training/a.py", "import torch as t\nt.load('x')", "calls torch.load"),
        ("training/a.py", "from torch import load as read\nread('x')", "calls torch.load"),
        ("training/a.py", "import yaml\nyaml.load(f)", "calls yaml.load without a safe loader"),
        ("training/a.py", "import yaml\nyaml.load(f, yaml.Loader)", "calls yaml.load without a safe loader"),
        ("training/a.py", "import numpy as np\nnp.load(f, allow_pickle=True)", "calls numpy.load with allow_pickle"),
        ("training/utils/a.py", "", "is named utils"),
        ("tests/helpers.py", "", "is named helpers"),
    ],
)
def test_a_broken_rule_is_found(tmp_path, path, source, problem):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    (found,) = violations(tmp_path)
    assert found.startswith(f"{path}:{max(1, source.count(chr(10)) + 1)}: ")
    assert problem in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("sna_core/a.py", "import math\nimport torch.nn.functional as F\nfrom .bspline import UniformBSpline"),
        ("sna_core/a_triton.py", "import torch\nimport triton.language as tl"),
        (
            "leviathan/modeling_leviathan.py",
            "from .configuration_leviathan import LeviathanConfig\nfrom sna_core import x",
        ),
        ("leviathan/vsna/model.py", "from .configuration import VsnaConfig\nfrom leviathan.vsna.solve import solve"),
        ("leviathan/__init__.py", "from .khronos import KhronosModel\nfrom .span import SpanModel"),
        ("leviathan/integrations/sb3.py", "import gymnasium, stable_baselines3\nfrom leviathan.span import SpanModel"),
        ("leviathan/integrations/sklearn.py", "from sklearn.base import BaseEstimator"),
        ("training/b.py", "import yaml\nclass Loader(yaml.SafeLoader): ...\nyaml.load(f, Loader)"),
        ("training/a.py", "import yaml\nmodel.eval()\nyaml.safe_load(f)\nyaml.load(f, Loader=yaml.SafeLoader)"),
        (
            "eval/a.py",
            "import h5py\nimport numpy as np\nfrom training.fields import read\nnp.load(f, allow_pickle=False)",
        ),
        ("tests/test_a.py", "import pickle\nimport eval.metrics\nimport training.train"),
    ],
)
def test_what_is_allowed_is_not_reported(tmp_path, path, source):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert violations(tmp_path) == []
