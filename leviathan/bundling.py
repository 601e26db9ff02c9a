"""The source of a class and of all that it needs from this package, as flat modules that import one another by a dot.

transformers loads the code of a repository from single files in one folder, and finds those that belong together by
lines of the form ``from .module import name``.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("leviathan", "sna_core")
# What whoever has torch and transformers has too; the rest is optional, and its absence an ImportError.
INSTALLED = {"huggingface_hub", "numpy", "safetensors", "torch", "tqdm", "transformers"} | set(sys.stdlib_module_names)


def flat_name(module: str) -> str:
    """The name of a module in a folder: ``sna_core.digits`` is sna_digits, ``leviathan.vsna.domain`` vsna_domain."""
    package, *rest = module.split(".")
    return "_".join((["sna"] if package == "sna_core" else []) + rest)


def bundle(modules: Iterable[str]) -> dict[str, str]:
    """The flat sources of modules and of all that they import from this package, anywhere in their code.

    Args:
        modules: Dotted names, such as ``leviathan.modeling_leviathan``.

    Returns:
        Source by dotted name, in alphabetical order; :func:`flat_name` names the files.

    Raises:
        ValueError: If a module is not one of the package's, an import has a form that cannot be flattened, or two
            modules would have one name.
    """
    sources: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in sources:
            sources[module], needed = _flatten(module)
            waiting += needed
    for name, count in Counter(map(flat_name, sources)).items():
        if count > 1:
            same = sorted(module for module in sources if flat_name(module) == name)
            raise ValueError(f"{' and '.join(same)} would both be {name}.py; rename one.")
    return dict(sorted(sources.items()))


def source_path(module: str) -> Path:
    """The file of a module or package.

    Raises:
        ValueError: If there is none in the package.
    """
    path = ROOT.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if module.partition(".")[0] in PACKAGES and candidate.is_file():
            return candidate
    raise ValueError(f"{module} is no module of {' or '.join(PACKAGES)}; only their code can be bundled.")


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@cache
def _flatten(module: str) -> tuple[str, frozenset[str]]:
    """The rewritten source of a module, and the modules that it imports."""
    path = source_path(module)
    # Offsets of ast count bytes.
    lines = path.read_bytes().replace(b"\r\n", b"\n").splitlines(keepends=True)
    tree = ast.parse(b"".join(lines))
    needed: set[str] = set()
    for node, is_guarded in reversed(list(_imports(tree))):  # from the end: what lies before keeps its place
        indent = " " * node.col_offset
        if not _is_own(node):
            if is_guarded or _is_installed(node):
                continue
            # transformers refuses a file whose imports are not all installed, but for those in a try.
            text = f"try:\n{indent}    {ast.unparse(node)}\n{indent}except ImportError:\n{indent}    raise"
        elif isinstance(node, ast.Import):
            raise ValueError(f"{path.name}:{node.lineno}: {ast.unparse(node)} has no flat form; write it with from.")
        else:
            text = f"\n{indent}".join(_relative(node, module, path, needed))
        assert node.end_lineno is not None, "ast.parse sets it"
        first, last = node.lineno - 1, node.end_lineno - 1
        before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
        lines[first : last + 1] = [before + text.encode() + after]
    return b"".join(lines).decode(), frozenset(needed)


def _imports(tree: ast.AST, is_guarded: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Imports in the order of their lines, and whether each lies in a try."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, is_guarded
        else:
            yield from _imports(node, is_guarded or isinstance(node, ast.Try))


def _is_own(node: ast.Import | ast.ImportFrom) -> bool:
    is_relative = isinstance(node, ast.ImportFrom) and node.level > 0
    return is_relative or not _top_names(node).isdisjoint(PACKAGES)


def _is_installed(node: ast.Import | ast.ImportFrom) -> bool:
    return _top_names(node) <= INSTALLED


def _top_names(node: ast.Import | ast.ImportFrom) -> set[str]:
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return {name.partition(".")[0] for name in names}


def _relative(node: ast.ImportFrom, module: str, path: Path, needed: set[str]) -> Iterator[str]:
    """The lines that stand for an import from the package; what they name is added to ``needed``."""
    parts = module.split(".") + ["__init__"] * (path.name == "__init__.py")
    source = ".".join([*(parts[: -node.level] if node.level else ()), *filter(None, [node.module])])
    names = []
    for alias in node.names:
        target = f"{source}.{alias.name}"
        if _is_module(target):
            needed.add(target)
            flat = flat_name(target)
            # transformers fetches what the first line names; it does not see the second.
            yield f"from .{flat} import __name__ as _{flat}"
            yield f"from . import {flat} as {alias.asname or alias.name}"
        elif source in PACKAGES:
            raise ValueError(
                f"{path.name}:{node.lineno}: import {alias.name} from the module that defines it, not from {source}, "
                "which would bring all of it along."
            )
        else:
            names.append(alias)
    if names:
        needed.add(source)
        yield ast.unparse(ast.ImportFrom(flat_name(source), names, level=1))


__all__ = ["bundle", "flat_name", "source_path"]
