"""Writes a folder that is a Hugging Face Space of the app: the code, what it requires, and the models that there are.

    python -m eval.app_space --models runs --out space
    hf upload USER/NAME space . --repo-type space

Of the models only what the app reads is taken: no checkpoints on the way, no data.
"""

import argparse
import importlib.metadata
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from eval.app import MODELS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("eval", "leviathan", "sna_core", "training")
CODE = ("*.py", "*.yaml")
FOLDERS = ("demo/model", "text/model", "janus/model", "vsna/heat", "vsna/burgers")
READ = ("*.json", "*.safetensors")  # by the app, of a model's folder
EXTRA = "app"
MAX_BYTES = 2**30  # of a file: more asks for another kind of machine
ENTRY = """from eval.app import main

main([])
"""
ABOUT = """---
title: Separable neural architectures
sdk: gradio
sdk_version: {gradio}
python_version: "3.12"
app_file: app.py
license: apache-2.0
---

Roll out turbulence, write text, invert KHRONOS, query VSNA and design a Janus cell with leviathan-sna.
"""


def requirements(extra: str = EXTRA) -> list[str]:
    """What an extra of the package requires, other extras that it names included, each once, without gradio.

    A Space installs gradio by itself, in the version of its README.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def of(extra: str) -> Iterator[str]:
        for line in project["optional-dependencies"][extra]:
            if line.startswith(f"{project['name']}["):
                for name in line[len(project["name"]) :].strip("[]").split(","):
                    yield from of(name.strip())
            else:
                yield line

    found = dict.fromkeys([*project["dependencies"], *of(extra)])
    return sorted(line for line in found if not line.startswith("gradio"))


def write_space(models: Path, out: Path) -> list[str]:
    """Writes the folder, whole or not at all; returns which of ``FOLDERS`` it holds.

    Raises:
        ValueError: If ``out`` is there already, or a file of a model is too large.
    """
    if out.exists():
        raise ValueError(f"{out} is there already; delete it or choose another folder.")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for package in PACKAGES:
        for pattern in CODE:
            for path in sorted((ROOT / package).rglob(pattern)):
                _copy(path, partial / path.relative_to(ROOT))
    taken = [folder for folder in FOLDERS if (models / folder / "config.json").is_file()]
    for folder in taken:
        for path in sorted(each for pattern in READ for each in (models / folder).glob(pattern)):
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"{path} has {path.stat().st_size:,} bytes; expected at most {MAX_BYTES:,}.")
            _copy(path, partial / MODELS / folder / path.name)
    _copy(ROOT / "LICENSE", partial / "LICENSE")
    (partial / "app.py").write_text(ENTRY, encoding="utf-8")
    # Processors are what a Space has for nothing: without this line pip takes a torch with CUDA's libraries.
    lines = ["--extra-index-url https://download.pytorch.org/whl/cpu", *requirements()]
    (partial / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    about = ABOUT.format(gradio=importlib.metadata.version("gradio"))
    (partial / "README.md").write_text(about, encoding="utf-8")
    partial.replace(out)
    return taken


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of trained models; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(arguments)
    try:
        taken = write_space(args.models, args.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{args.out} holds the app and {', '.join(taken) or 'no trained model'}.")


if __name__ == "__main__":
    main()
