"""Run settings: a YAML file of sections, flags over it, unknown keys refused."""

import argparse
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

Settings = dict[str, dict[str, Any]]

MAX_BYTES = 2**20
MAX_NODES = 100_000
# What PyYAML raises where a value does not fit the type that is written before it.
UNREADABLE = (AttributeError, IndexError, KeyError, OverflowError, TypeError)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `no` as a truth value and 3e-4 as a string; here, as in YAML 1.2, they are what they look like."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_yaml(path: str | Path) -> Any:
    """What a YAML file holds: plain values alone.

    Raises:
        ValueError: If it is no YAML, or names Python objects, or is larger than settings are.
        OSError: If it cannot be read.
    """
    path = Path(path)
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes; expected settings, of {MAX_BYTES} at most.")
    return _parsed(path.read_text(encoding="utf-8"), str(path))


def _parsed(text: str, where: str) -> Any:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if (size := _written_out(node, {})) > MAX_NODES:
                raise ValueError(
                    f"{where} holds {size} values once its references are written out; expected at most {MAX_NODES}."
                )
            try:
                return loader.construct_document(node)
            except UNREADABLE as error:
                raise ValueError(f"{where} has a value that is none of its !!type ({error}).") from error
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply, or in itself.") from error


def _written_out(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Values in a node, where each reference to another counts as a copy of it: a few lines can stand for billions."""
    if node not in known:
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        known[node] = 1 + sum(
            _written_out(each, known) for entry in inner for each in (entry if isinstance(entry, tuple) else (entry,))
        )
    return known[node]


def read_settings(path: str | Path, flags: Sequence[str], allowed: Mapping[str, Collection[str]]) -> Settings:
    """Reads ``path`` and lays ``--section.key value`` flags over it; values are YAML.

    Args:
        path: A YAML file: a mapping of sections, each a mapping of keys to values.
        flags: ``["--training.max_steps", "10", "--model.hidden_size=64"]``.
        allowed: The keys of each section.

    Returns:
        A dict for each allowed section, empty where nothing was given.

    Raises:
        ValueError: On an unknown section or key (with the nearest known one), or something that is no such mapping.
        OSError: If the file cannot be read.
    """
    content = load_yaml(path) or {}
    settings: Settings = {section: {} for section in allowed}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}; expected sections {', '.join(allowed)}.")
    for section, values in content.items():
        if not isinstance(values, dict):
            raise ValueError(f"{path}: {section} holds {values!r:.80}; expected a section of keys.")
        for key, value in values.items():
            settings[_known(section, allowed, str(path))][_known(key, allowed[section], f"{path}: {section}")] = value
    for name, text in _pairs(flags):
        section, _, key = name.partition(".")
        place = settings[_known(section, allowed, f"--{name}")]
        place[_known(key, allowed[section], f"--{name}")] = _parsed(text, f"--{name}")
    return settings


def _known(name: str, names: Collection[str], where: str) -> str:
    if name in names:
        return name
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(sorted(names))}."
    raise ValueError(f"{where}: unknown key {name!r}; {hint}")


def _pairs(flags: Sequence[str]) -> list[tuple[str, str]]:
    pairs, rest = [], list(flags)
    while rest:
        flag = rest.pop(0)
        name, equals, text = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or "." not in name:
            raise ValueError(f"{flag!r} is no setting; write --section.key value, such as --training.max_steps 100.")
        if not equals:
            if not rest:
                raise ValueError(f"--{name} has no value.")
            text = rest.pop(0)
        pairs.append((name, text))
    return pairs


def parse_arguments(
    description: str, allowed: Mapping[str, Collection[str]], arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, Settings]:
    """The command line of a job: ``--config FILE [--dry-run] [--section.key value ...]``."""
    keys = "\n".join(f"  --{section}.{{{','.join(sorted(keys))}}}" for section, keys in allowed.items())
    parser = argparse.ArgumentParser(
        description=description,
        epilog="settings, over those of the file:\n" + keys,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, type=Path, help="YAML file of settings")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained, and stop")
    known, flags = parser.parse_known_args(arguments)
    try:
        return known, read_settings(known.config, flags, allowed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
