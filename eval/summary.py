"""README's table of results, from the records that lie beside the model cards.

    python -m eval.summary

Writes the part of README.md between its two `results` comments: of each study how many of the figures that it was to
reach were reached, and some of them, worse and better.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.markdown import number, table
from eval.turbulence_targets import targets
from training.provenance import write_text

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "model_cards"
BEGIN, END = "<!-- results: written by `python -m eval.summary` -->", "<!-- end of results -->"
# The figures that are shown of a study, by what their names begin with; how many were reached is told of all.
SHOWN = {
    "khronos": (
        "squared L2 error of the Poisson problem",
        "milliseconds of an inversion from 64 starts",
        "times faster than by gradient",
    ),
    "vsna": ("laser, largest error", "seconds of a million queries", "heat: our time over AMEn's"),
    "span": ("sample efficiency over the tuned MLP", "time of a PPO update"),
    "janus": (
        "forward: R² of C1111",
        "beam: checked C1111",
        "checked error of C1111, MLP head over separable head",
    ),
}
Record = Mapping[str, Any]


def of_targets(name: str) -> tuple[str, str, str, str]:
    """The row of a study whose record lists the figures asked for.

    Raises:
        ValueError: If a figure that is to be shown is not in the record.
    """
    found = _read(name, name)["targets"]
    shown = []
    for prefix in SHOWN[name]:
        matches = [each for each in found if each["figure"].startswith(prefix)]
        if len(matches) != 1:
            raise ValueError(f"{len(matches)} figures of {name} begin with {prefix!r}; expected one.")
        (each,) = matches
        shown.append(f"{each['figure'].partition(' (')[0]}: {number(each['measured'])} (asked {each['asked']})")
    return name, _share([each["reached"] for each in found]), "; ".join(shown), f"model_cards/{name}.md"


def of_turbulence() -> tuple[str, str, str, str]:
    """The row of the study of turbulence, whose figures are comparisons."""
    record = _read("leviathan_turbulence", "turbulence")
    found = [each for setting, results in record["settings"].items() for each in targets(setting, results)]
    words = "; ".join(f"{what.partition(':')[0]}: {'yes' if reached else 'no'}" for what, reached in found[:2])
    return "leviathan, turbulence", _share([each for _, each in found]), words, "model_cards/leviathan_turbulence.md"


def of_text() -> tuple[str, str, str, str]:
    """The row of the study of text: a comparison, of which no figures were asked."""
    arms = _read("leviathan_text", "language")["arms"]
    shown = {"separable_all": "generated", "lookup_untied": "table", "lookup_untied_started": "table started alike"}

    def told(arm: str) -> str:
        score = arms[arm]["test"]["perplexity"]
        return f"{shown[arm]} {score['mean']:.0f} ± {score['standard_deviation']:.0f}"

    words = "test perplexity after some hundred steps: " + ", ".join(map(told, shown))
    return "leviathan, text", "none asked", words, "model_cards/leviathan_text.md"


def results_table() -> str:
    """The table, as Markdown."""
    rows = [of_turbulence(), of_text(), *map(of_targets, SHOWN)]
    shown = [(f"[{name}]({card})", reached, words) for name, reached, words, card in rows]
    return table(("study", "figures reached", "among them"), shown)


def with_results(readme: str) -> str:
    """README with the table as it follows from the records.

    Raises:
        ValueError: If README has no place for it.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md has no {BEGIN} ... {END}.")
    return f"{before}{BEGIN}\n\n{results_table()}\n\n{END}{after}"


def _read(folder: str, name: str) -> Record:
    return json.loads((CARDS / folder / f"{name}.json").read_text(encoding="utf-8"))


def _share(reached: list[bool | None]) -> str:
    return f"{sum(each is True for each in reached)} of {len(reached)}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    write_text(path, with_results(path.read_text(encoding="utf-8")))
