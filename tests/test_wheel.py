"""The wheel holds the two libraries and nothing else, and works where only its own requirements are installed."""

import ast
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = out.glob("*.whl")
    return path


def test_names(wheel):
    assert wheel.name.startswith("leviathan_sna-")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"leviathan", "sna_core"}
    assert all(name.endswith((".py", "/py.typed")) for name in names if ".dist-info" not in name)
    assert {"leviathan/py.typed", "sna_core/py.typed"} <= set(names)  # annotations are read from both
    assert any(name.endswith("licenses/LICENSE") for name in names)
    here = {str(p.relative_to(ROOT)) for package in ("leviathan", "sna_core") for p in (ROOT / package).rglob("*.py")}
    assert here <= set(names)


def test_size(wheel):
    assert wheel.stat().st_size < 400_000  # sources alone; data or a picture among them would show


def test_every_import_is_a_declared_requirement(wheel):
    metadata = next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA"))
    lines = zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    core = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in required if "extra ==" not in line}
    assert any(line.startswith("scikit-learn") and "extra ==" in line for line in required)
    imported = set()
    # Each in files of its own, see test_layering.
    optional = {"carla", "gymnasium", "sklearn", "stable_baselines3", "triton"}
    for path in [*(ROOT / "leviathan").rglob("*.py"), *(ROOT / "sna_core").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) - {"leviathan", "sna_core"} - optional <= core


def test_installed_into_a_clean_environment_it_imports(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], check=True, capture_output=True, text=True
    ).stdout.strip()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    # Its requirements are read from where these tests run, rather than downloaded again; our sources are not there.
    (Path(site) / "requirements.pth").write_text(
        "\n".join(p for p in sys.path if p.endswith("site-packages") and Path(p).is_dir())
    )
    code = (
        "import sys; sys.modules['triton'] = None;"  # as where it is not installed
        "import leviathan, sna_core, transformers, importlib.metadata as m;"
        f"assert leviathan.__file__.startswith({site!r}), leviathan.__file__;"
        f"assert sna_core.__file__.startswith({site!r}), sna_core.__file__;"
        "assert m.version('leviathan-sna') == leviathan.__version__;"
        "assert 'leviathan' in transformers.AutoConfig.for_model('leviathan').model_type;"
        "import importlib.util as u; assert u.find_spec('training') is None, 'training is installed'"
    )
    result = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
