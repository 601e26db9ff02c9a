"""Hooks of mkdocs: pages that are written elsewhere, the reference of every module, formulas as MathML."""

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("leviathan", "sna_core")
GUIDES = {"Training": "training.md", "Sharing": "sharing.md", "Jobs": "jobs.md"}
ELSEWHERE = {"Changes": "CHANGELOG.md", "Contributing": "CONTRIBUTING.md", "Security": "SECURITY.md"}
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def modules() -> Iterator[tuple[str, ...]]:
    """The parts of the names of all modules that a user may import."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).with_suffix("").parts
            yield name[:-1] if name[-1] == "__init__" else name


def page_of(module: tuple[str, ...]) -> str:
    """The page of a module; a package's is its folder's index."""
    folder = ROOT.joinpath(*module).is_dir()
    return "/".join(("reference", *module, "index.md") if folder else ("reference", *module)) + (
        "" if folder else ".md"
    )


def on_config(config: Any) -> Any:
    """The order of the pages."""
    cards = [f"model_cards/{path.name}" for path in sorted((ROOT / "model_cards").glob("*.md"))]
    pages = [(module, {".".join(module[1:]) or module[0]: page_of(module)}) for module in modules()]
    reference = [{package: [page for module, page in pages if module[0] == package]} for package in PACKAGES]
    config.nav = [
        {"Start": "index.md"},
        *({title: page} for title, page in GUIDES.items()),
        {"Models": cards},
        {"Reference": reference},
        *({title: page} for title, page in ELSEWHERE.items()),
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds README as the first page, the cards with their pictures, and a page for every module."""
    generated = {name: (ROOT / name).read_text(encoding="utf-8") for name in ELSEWHERE.values()}
    generated["index.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "model_cards").glob("*.md"):
        generated[f"model_cards/{path.name}"] = path.read_text(encoding="utf-8")
    for module in modules():
        generated[page_of(module)] = f"::: {'.'.join(module)}\n"
    for name, content in generated.items():
        files.append(File.generated(config, name, content=content))
    for path in sorted((ROOT / "model_cards").rglob("*")):
        if path.suffix in (".png", ".gif"):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for name in ("LICENSE", "Makefile"):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are on the site, where the guides lie beside README."""
    if page.file.src_uri == "index.md":
        return markdown.replace("](docs/", "](")
    return markdown.replace("](../", "](") if page.file.src_uri in GUIDES.values() else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw by themselves."""
    return FORMULA.sub(_mathml, html)


def _mathml(found: re.Match[str]) -> str:
    try:
        return convert(unescape(found[2]), display="block" if found[1] == "div" else "inline")
    except Exception as error:  # the converter's own, of many kinds: say which formula it is
        raise ValueError(f"{found[2]!r} is no formula: {error!r}") from error
