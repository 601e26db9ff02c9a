"""The figures that the study of turbulence was to reach, held against its records."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.card import verdict
from eval.metrics import PAPER_METRICS
from eval.turbulence_figures import headlines

Record = Mapping[str, Any]
Target = tuple[str, bool | None]  # what was to be reached, and whether it was; None where that cannot be said

NAMES = {
    "enstrophy_error": "enstrophy",
    "energy_error": "spectral energy",
    "slope_error": "spectral slope",
    "jensen_shannon": "P(ω)",
    "mean_log_ratio": "the scale-resolved spectrum",
    "crps": "CRPS",
}
OURS = "leviathan"  # the arm that targets are of
OPERATORS = ("fno", "unet", "deeponet")  # the paper's
LEVEL = "lookup"  # its dense Transformer
SAME_SIZE = 0.05  # by so much the parameters of arms that targets speak of may differ
EXPLAINED = 0.85  # of the variance of embeddings, by three components
FEWER_PASSES = 4


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def last_step(results: Record) -> int:
    """The number of steps of the rollouts."""
    return len(results["truth"]["enstrophy"])


def targets(setting: str, results: Record) -> list[Target]:
    """Those of a setting at the last step: none where the row that is compared is of another arm than `OURS`.

    A target is None where an arm of the same size, or a second flow, which intervals need, is missing.
    """
    if results["rows"][results["headline"]]["arm"] != OURS:
        return []
    return {"patches": _patches, "halo": _halo}.get(setting, lambda _: [])(results)


def _patches(results: Record) -> list[Target]:
    headline, rows, step = results["headline"], results["rows"], last_step(results)
    counts = {arm: each["num_parameters"] for arm, each in results["arms"].items()}
    size = counts[OURS]
    rivals = {rows[row]["arm"]: row for row in headlines(rows) if row != headline}
    rivals = {arm: row for arm, row in rivals.items() if abs(counts[arm] - size) <= SAME_SIZE * size}
    complete = set(OPERATORS) <= rivals.keys() and all(rows[row]["metrics"]["nrmse"]["low"] for row in rivals.values())

    def score(row: str, metric: str, what: str = "mean") -> float:
        return rows[row]["metrics"][metric][what][-1]

    def stands(row: str, metric: str) -> str:
        return verdict(results, headline, row, metric, step).partition(" ")[0]

    def is_below(row: str, metric: str) -> bool:
        return score(headline, metric) < score(row, metric, "low")

    def is_level(row: str, metric: str) -> bool:
        inside = score(headline, metric) <= score(row, metric, "high")
        return is_below(row, metric) or (inside and stands(row, metric) != "worse")

    found = []
    for metric in PAPER_METRICS:
        if metric == "enstrophy_error":
            text = (
                "at least level on enstrophy with every other arm of its size: below its interval, or inside it and "
                "not worse flow by flow"
            )
            reached = complete and all(is_level(row, metric) for row in rivals.values())
        else:
            text = f"first of all arms of its size on {NAMES[metric]}, below the intervals of {listed(OPERATORS)}"
            reached = complete and (
                all(score(headline, metric) < score(row, metric) for row in rivals.values())
                and all(is_below(rivals[arm], metric) for arm in OPERATORS)
            )
        found.append((text, reached if complete else None))
    text = f"better than the dense Transformer ({LEVEL}) on at least three of the four metrics"
    if LEVEL not in rivals or stands(rivals[LEVEL], PAPER_METRICS[0]) == "one":
        return [*found, (text, None)]
    return [*found, (text, sum(stands(rivals[LEVEL], metric) == "better" for metric in PAPER_METRICS) >= 3)]


def _halo(results: Record) -> list[Target]:
    metrics, floor = results["rows"][results["headline"]]["metrics"], results["noise_floor"]
    near = floor and all(metrics[name]["mean"][-1] <= 2 * floor[name][-1] for name in PAPER_METRICS)
    jump, true = metrics["border_jump"]["mean"][-1], results["truth"]["border_jump"][-1]
    text = f"jump across borders within 10 % of that inside (found {jump:.3g} times it, the truth {true:.3g})"
    return [("within twice the noise floor on all four metrics", near), (text, abs(jump - 1) <= 0.1)]


def embedding_target(record: Record) -> Target:
    """That of the embeddings' record: a separable embedding lies near a space of three dimensions, once trained."""
    text = f"three components explain {EXPLAINED:.0%} of the trained separable embedding".replace("%", " %")
    separable = (each for each in record["models"].values() if each["embedding_type"] == "separable")
    if (model := next(separable, None)) is None:
        return text, None
    share = sum(model["trained"]["explained"])
    return f"{text} (found {100 * share:.1f} %)", share >= EXPLAINED


def jacobi_target(record: Record) -> Target:
    """That of the samplings' record: blocks of the expectation, decoded exactly, a patch at a time."""
    text = f"at least {FEWER_PASSES} times fewer passes than token by token at an equal result"
    rows = [row for row in record["jacobi"]["rows"] if (row["sampling"], row["tolerance"]) == ("expectation", 0)]
    if not rows:
        return text, None
    best = max((row["alone"] | {"block": row["block_size"]} for row in rows), key=_equal_then_few)
    found = (
        f"found {best['fewer_passes']:.1f} times with blocks of {best['block']}, {best['equal']:.1%} of tokens equal"
    )
    return f"{text} ({found.replace('%', ' %')})", best["equal"] == 1 and best["fewer_passes"] >= FEWER_PASSES


def _equal_then_few(alone: Record) -> tuple[bool, float]:
    return alone["equal"] == 1, alone["fewer_passes"]


def targets_list(found: Sequence[Target], missing: str) -> str:
    """Targets as lines of Markdown; `missing` is said where one cannot be decided. Empty if there are none."""
    told = {True: "reached", False: "not reached", None: missing}
    return "\n".join(f"- {text}: {told[reached]}" for text, reached in found)
