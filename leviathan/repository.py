"""Repositories that load with `trust_remote_code=True` where this package is not installed."""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.feature_extraction_auto import feature_extractor_class_from_name

import leviathan
from leviathan.bundling import PACKAGES, ROOT, bundle, flat_name, source_path

DISTRIBUTION = "leviathan-sna"
REQUIREMENTS = ("torch", "transformers")
CONFIG, FEATURE_EXTRACTOR, README = "config.json", "preprocessor_config.json", "README.md"
HEADER = "# Written by leviathan.export: "  # a module without it is not ours to remove
ENTRY = "remote_code"
ENTRY_DOCSTRING = (
    "Config and model from one module: transformers copies what each module needs, and two copies would differ."
)
SECTION = "<!-- leviathan.export -->\n", "<!-- /leviathan.export -->\n"


def export(path: str | os.PathLike, *objects: Any, bundle_code: bool = False) -> list[Path]:
    """Makes a folder a repository for whoever has this package, and with ``bundle_code`` for whoever has not.

    With the code, ``AutoModel``, ``AutoModelForCausalLM`` and ``AutoFeatureExtractor`` load the folder by
    ``trust_remote_code=True`` and nothing but torch and transformers. Where this package is imported, its classes are
    used instead. Modules, ``auto_map`` and the section of the README that an earlier export wrote are replaced, or
    removed without ``bundle_code``. The same package writes the same bytes.

    Args:
        path: A folder that `save_pretrained` has filled, or will: a model, a `FieldTokenizer`, or both.
        *objects: Models, tokenizers and feature extractors to save there first.
        bundle_code: Whether the code comes along, as flat modules.

    Returns:
        The modules written.

    Raises:
        ValueError: If there is nothing saved, an object cannot be saved, or what is saved needs no code of ours.

    ```python
    >>> import leviathan

    >>> leviathan.export("runs/demo/model", bundle_code=True)
    ```
    """
    folder = Path(path)
    for each in objects:
        if not hasattr(each, "save_pretrained"):
            raise ValueError(f"a {type(each).__name__} has no save_pretrained; give models, tokenizers, or extractors.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder.")
    for each in objects:
        each.save_pretrained(folder)
    if (bundle_code or not objects) and not any((folder / name).is_file() for name in (CONFIG, FEATURE_EXTRACTOR)):
        raise ValueError(
            f"{folder} has neither {CONFIG} nor {FEATURE_EXTRACTOR}: save a model there, or give one to export; one "
            "with an adapter is merged first (merge_and_unload)."
        )
    classes = {CONFIG: _model_classes(folder), FEATURE_EXTRACTOR: _feature_extractor_classes(folder)}
    if bundle_code and not any(classes.values()):
        raise ValueError(f"{folder} holds classes of transformers alone, which load without code of ours.")
    written = _code(folder, classes) if bundle_code else {}
    for module in written:
        if module.exists() and not _is_ours(module):
            raise ValueError(f"{module} was not written by export and would be overwritten; move it away.")
    for module, source in written.items():
        _write(module, source)
    for name, group in classes.items():
        if group:  # what is not ours keeps the code that it came with
            auto_map = {auto: f"{_entry(name, each)}.{each.__name__}" for auto, each in group.items()}
            _set_auto_map(folder / name, auto_map if bundle_code else {})
    _write_readme(folder, classes[CONFIG], section=bundle_code)
    for module in folder.glob("*.py"):
        if module not in written and _is_ours(module):
            module.unlink()
    return sorted(written)


def _model_classes(folder: Path) -> dict[str, type]:
    """Of the model in a folder, the class for each Auto class, by its name; none where they are transformers'."""
    settings = _read(folder / CONFIG)
    model_type = settings.get("model_type", "")
    if model_type not in CONFIG_MAPPING or not _is_own(CONFIG_MAPPING[model_type]):
        return {}
    config_class = CONFIG_MAPPING[model_type]
    classes: dict[str, type] = {AutoConfig.__name__: config_class}
    for auto in (AutoModel, AutoModelForCausalLM):
        found = auto._model_mapping.get(config_class, None)
        if isinstance(found, type):
            classes[auto.__name__] = found
    # No Auto class of transformers' is meant for tables: a classifier is AutoModel's, in a repository of its own.
    for name in settings.get("architectures") or ():
        architecture: Any = getattr(leviathan, name) if name in leviathan.__all__ else None
        if getattr(architecture, "config_class", None) is config_class and architecture not in classes.values():
            classes[AutoModel.__name__] = architecture
    return classes


def _feature_extractor_classes(folder: Path) -> dict[str, type]:
    name = _read(folder / FEATURE_EXTRACTOR).get("feature_extractor_type")
    found = feature_extractor_class_from_name(name) if name else None
    return {AutoFeatureExtractor.__name__: found} if found is not None and _is_own(found) else {}


def _is_own(each: type) -> bool:
    return each.__module__.partition(".")[0] in PACKAGES


def _entry(name: str, each: type) -> str:
    """The module that an Auto class is told to load: one for all of a model, the extractor's own."""
    return ENTRY if name == CONFIG else flat_name(each.__module__)


def _code(folder: Path, classes: Mapping[str, Mapping[str, type]]) -> dict[Path, str]:
    """The modules to write, and their text."""
    version = f"of {DISTRIBUTION} {leviathan.__version__}\n# SPDX-License-Identifier: Apache-2.0\n"
    sources = bundle({each.__module__ for group in classes.values() for each in group.values()})
    code = {}
    for module, text in sources.items():
        place = source_path(module).relative_to(ROOT).as_posix()
        code[folder / f"{flat_name(module)}.py"] = f"{HEADER}{place} {version}{text}"
    if model := dict(sorted((each.__name__, each) for each in classes[CONFIG].values())):
        imports = "".join(f"from .{flat_name(each.__module__)} import {name}\n" for name, each in model.items())
        code[folder / f"{ENTRY}.py"] = (
            f'{HEADER}the entry {version}"""{ENTRY_DOCSTRING}"""\n\n{imports}\n'
            f"for _each in ({', '.join(model)}):\n"
            "    _each.__module__ = __name__  # so that what is saved again names this module, too\n"
        )
    return code


def _is_ours(module: Path) -> bool:
    with module.open("rb") as file:
        return file.read(len(HEADER)) == HEADER.encode()


def _read(path: Path) -> dict[str, Any]:
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}; expected an object.")
    return settings


def _set_auto_map(path: Path, auto_map: dict[str, str]) -> None:
    settings = {name: value for name, value in _read(path).items() if name != "auto_map"}
    if auto_map:
        settings["auto_map"] = auto_map
    _write(path, json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _write_readme(folder: Path, classes: Mapping[str, type], section: bool) -> None:
    """Puts the section on remote code into the README, in place of the one that was there."""
    path = folder / README
    begin, end = SECTION
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    rest = re.sub(rf"{re.escape(begin)}.*?{re.escape(end)}", "", text, flags=re.DOTALL).rstrip()
    if section:
        title = f"---\nlibrary_name: transformers\n---\n\n# {folder.resolve().name}"
        _write(path, f"{rest or title}\n\n{begin}{_remote_code_section(classes)}{end}")
    elif begin in text:
        _write(path, f"{rest}\n")


def _remote_code_section(classes: Mapping[str, type]) -> str:
    names = (AutoModelForCausalLM.__name__, AutoModel.__name__)
    auto = next((name for name in names if name in classes), AutoFeatureExtractor.__name__)
    return f"""## Without {DISTRIBUTION}

The code of this model is in this repository: {DISTRIBUTION} {leviathan.__version__}{_commit()}, Apache-2.0.
It needs {" and ".join(f"`{requirement}`" for requirement in _requirements())}, and your trust:

```python
from transformers import {auto}

{auto}.from_pretrained(path, trust_remote_code=True)
```

After `import leviathan` the installed package is used instead.
"""


def _requirements() -> list[str]:
    """Of torch and transformers, as this package's metadata has them."""
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        declared = []
    return [
        next((each for each in declared if re.match(rf"{name}[^\w-]", each) and "extra ==" not in each), name)
        for name in REQUIREMENTS
    ]


def _commit() -> str:
    """In words the last commit of the code, where it runs from a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments, "--", *PACKAGES]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603

    try:
        commit = git("log", "-1", "--format=%H")
        changed = bool(commit) and bool(git("status", "--porcelain"))
    except FileNotFoundError:  # no git on this machine
        return ""
    return f", commit {commit}{' with changes' * changed}" if commit else ""


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(path)


__all__ = ["export"]
