"""What model cards are written with: tables, lists, and the figures asked for beside those measured."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TOLD = {True: "reached", False: "**not reached**", None: "not measured"}


def table(titles: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table; bars within a cell are kept from ending it."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def bullets(lines: Iterable[str]) -> str:
    """A list."""
    return "\n".join(f"- {line}" for line in lines)


def number(measured: float | None) -> str:
    """Three digits, or nothing."""
    return "" if measured is None else f"{measured:.3g}"


def targets_table(study: Mapping[str, Any]) -> str:
    """The figures asked for beside those measured, of a record's ``targets``."""
    rows = [
        (each["figure"], each["asked"], number(each["measured"]), TOLD[each["reached"]]) for each in study["targets"]
    ]
    return table(("figure", "asked", "measured", ""), rows)
