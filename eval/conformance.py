"""Runs transformers' own tests of models on ours, those that its source distribution ships.

    python -m eval.conformance --out runs/conformance.json [--checkout TRANSFORMERS]

The distribution of the installed version is downloaded and never kept in this project. It lacks the tests of generation
and of exporters; a checkout of transformers at the same version adds them.
"""

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import transformers

from training.provenance import provenance, write_json

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "tests" / "transformers_suite.py"  # what of ours is tested

# What the distribution lacks and its files import. Empty mixins add no tests, which the record says.
STANDINS = {
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/test_configuration_utils.py": (
        "config_common_kwargs = {'output_hidden_states': True, 'return_dict': False, 'dtype': 'float16',\n"
        "    'architectures': ['Model'], 'problem_type': 'regression', 'chunk_size_feed_forward': 5}\n"
    ),
}
# Tests that cannot hold, of which models (all: "*"), and why.
TABLE = "reads and writes the rows of a stored table of embeddings"
REFUSES = "a field that is not wholly the checkpoint's is refused"
EXPECTED = {
    ("test_model_get_set_embeddings", "*"): "expects an instance of nn.Embedding",
    ("test_resize_tokens_embeddings", "Leviathan*"): TABLE,
    ("test_resize_embeddings_untied", "Leviathan*"): TABLE,
    ("test_resize_embeddings_untied_no_reinit_on_post_init", "Leviathan*"): TABLE,
    ("test_sdpa_can_dispatch_non_composite_models", "Leviathan*"): "the default attention is prefix_sdpa, not sdpa",
    ("test_hidden_states_output", "[!L]*"): "a function of numbers has no hidden states",
    ("test_retain_grad_hidden_states_attentions", "[!L]*"): "a function of numbers has no hidden states",
    ("test_model_outputs_equivalence", "[!L]*"): "asks for hidden states",
    ("test_training", "Vsna"): "is solved, not trained, and returns values alone",
    ("test_can_init_all_missing_weights", "Vsna"): REFUSES,
    ("test_model_weights_reload_no_missing_tied_weights", "Vsna"): REFUSES,
    ("test_can_load_ignoring_mismatched_shapes", "SnaJanus"): "zeroes fields named *_std, which here are data",
}


def why_expected(model: str, test: str) -> str | None:
    """Why a test cannot hold for a model; None if it should."""
    return next((why for (name, models), why in EXPECTED.items() if name == test and fnmatchcase(model, models)), None)


def lay_out(folder: Path, version: str, checkout: Path | None) -> None:
    """A tree in which transformers' test files find each other and the installed package.

    Raises:
        ValueError: If the checkout is none.
        subprocess.CalledProcessError: If pip cannot download the distribution.
    """
    if checkout is not None:
        if not (checkout / "tests" / "generation" / "test_utils.py").is_file():
            raise ValueError(f"{checkout} is no checkout of transformers: it has no tests/generation/test_utils.py.")
        for name in ("tests", "utils"):
            shutil.copytree(checkout / name, folder / name)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    options = ["--no-binary", ":all:", "--dest", str(folder), f"transformers=={version}"]
    subprocess.run([*pip, *options], check=True)  # noqa: S603
    (archive,) = folder.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as files:
        for member in files.getmembers():
            name = Path(*Path(member.name).parts[1:])
            if member.isfile() and name.match("tests/*.py"):
                source = files.extractfile(member)
                assert source is not None  # it is a file
                (folder / "tests").mkdir(exist_ok=True)
                (folder / "tests" / name.name).write_bytes(source.read())
    for name, text in STANDINS.items():
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    for package in {folder / "tests", *((folder / name).parent for name in STANDINS)}:
        (package / "__init__.py").touch()
    (folder / "src").mkdir()
    (folder / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
    shutil.copy(SUITE, folder / "tests" / "test_leviathan_sna.py")


def read_report(path: Path) -> list[dict[str, Any]]:
    """Rows of model, test, outcome and message, from a JUnit report that pytest wrote."""
    rows = []
    for case in ElementTree.parse(path).iter("testcase"):  # noqa: S314 -- pytest wrote it just now
        outcome, message = "passed", ""
        for kind, name in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
            if (found := case.find(kind)) is not None:
                lines = (found.get("message") or "").strip().splitlines()
                outcome, message = name, lines[0][:200] if lines else ""
        model, test = case.get("classname", "").split(".")[-1].removesuffix("Test"), case.get("name", "")
        if outcome == "failed" and (why := why_expected(model, test)):
            outcome, message = "expected", why
        rows.append({"model": model, "test": test, "outcome": outcome, "message": message})
    return rows


def conformance(checkout: Path | None, selection: str | None = None) -> dict[str, Any]:
    """Runs the tests, all or those that pytest's ``-k`` selects, and returns the record."""
    version = importlib.metadata.version("transformers")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out(folder, version, checkout)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), "-c"]
        (folder / "pytest.ini").write_text("[pytest]\n")
        options = [str(folder / "pytest.ini"), f"--junitxml={folder / 'report.xml'}", "--tb=short"]
        options += ["-k", selection] if selection else []
        subprocess.run(  # noqa: S603
            [*command, *options, str(folder / "tests" / "test_leviathan_sna.py")],
            cwd=folder,
            env=environment,
            check=False,
        )
        if not (folder / "report.xml").exists():
            raise ValueError("pytest left no report; what it printed says why.")
        rows = read_report(folder / "report.xml")
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        of_model = counts.setdefault(row["model"], {"passed": 0, "failed": 0, "expected": 0, "skipped": 0})
        of_model[row["outcome"]] += 1
    return {
        "transformers": version,
        "generation_and_exporters": checkout is not None,
        "counts": counts,
        "rows": [row for row in rows if row["outcome"] != "passed"],
        "provenance": provenance(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="JSON file for the record")
    parser.add_argument("--checkout", type=Path, help="a checkout of transformers at the installed version")
    parser.add_argument("-k", dest="selection", help="run those tests alone, as pytest selects them")
    known = parser.parse_args(arguments)
    try:
        record = conformance(known.checkout, known.selection)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: {error}") from error
    write_json(known.out, record)
    for model, counts in record["counts"].items():
        print(f"{model:>24} " + ", ".join(f"{number} {outcome}" for outcome, number in counts.items()))
    failed = [f"{row['model']}.{row['test']}: {row['message']}" for row in record["rows"] if row["outcome"] == "failed"]
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main()
