"""The site builds with no link that leads nowhere, and docstrings' notation becomes Markdown."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def docstrings():
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    site = tmp_path / "site"
    reference = (site / "reference" / "leviathan" / "khronos" / "modeling" / "index.html").read_text()
    assert "<math" in reference
    assert 'id="leviathan.khronos.modeling.KhronosModel.fit"' in reference
    assert (site / "model_cards" / "janus" / "beam.png").is_file()
    everything = "".join(path.read_text() for path in site.rglob("*.html"))
    for leftover in (":math:", ".. math::", ":class:`", ":meth:`", "[`~"):
        assert leftover not in everything


def test_formulas_and_references(docstrings):
    assert docstrings.to_markdown("Of :math:`x_1`, by :meth:`Model.fit`.") == "Of $x_1$, by `fit`."
    assert docstrings.to_markdown("Is\n\n    .. math::\n\n        f(x) = 1\n        + 2\n\n    with x.\n") == (
        "Is\n\n\n    $$\n    f(x) = 1\n    + 2\n    $$\n\n    with x.\n"
    )
    assert docstrings.to_markdown("    .. math:: r = 1") == "\n    $$\n    r = 1\n    $$\n\n"
    assert (
        docstrings.to_markdown("See [`~a.b.C`].")
        == 'See <autoref identifier="a.b.C" optional><code>C</code></autoref>.'
    )
    assert docstrings.to_markdown("`x[0]` stays") == "`x[0]` stays"
