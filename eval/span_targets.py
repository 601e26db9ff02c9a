"""The figures that the study of SPAN was to reach, held against its record."""

from collections.abc import Mapping
from typing import Any

from eval.span_study import BEST_MLP, OURS
from eval.vsna_targets import Target

Record = Mapping[str, Any]

TIMES = {  # of an MLP with as many parameters
    "ppo_update": "time of a PPO update over the MLP's",
    "sac_update": "time of a SAC update over the MLP's",
    "act": "time to act on one observation over the MLP's",
}
TIMES_LIMIT = 1.2
GAIN = 0.3  # steps that the MLP needs besides, of those of SPAN
SUCCESS_RATIO = 1.3  # where the MLP fails at times


def targets(record: Record) -> list[Target]:
    """The figures to reach, held against the record; what is missing leaves its targets open.

    A success ratio over an MLP that never succeeds is infinite: reached if SPAN succeeds at all, without a number.
    Tasks in which the MLP always succeeds, or neither ever does, have no such ratio and are left out.
    """
    cost = record.get("cost") or {}
    found = []
    for key, figure in TIMES.items():
        measured = cost.get(key, {}).get(OURS, {}).get("ratio")
        reached = None if measured is None else measured <= TIMES_LIMIT
        found.append(Target(figure, f"<= {TIMES_LIMIT:g}", measured, reached))
    compared = [each for each in (record.get("summary") or {}).get("comparisons", []) if each["against"] == BEST_MLP]
    gain, rate = "sample efficiency over the tuned MLP, gain", "success rate over the tuned MLP's"
    ratios = []
    for each in compared:
        found.append(_gain(f"{gain}, {each['size']}", each))
        ratios += [_success(f"{rate}, {task['task']}, {each['size']}", task) for task in each["tasks"] if _open(task)]
    if not compared:
        found.append(Target(gain, f">= {GAIN:g}", None, None))
    if not ratios:
        why = " (on no task does it fail at times and one of the two succeed)" if compared else ""
        ratios.append(Target(rate + why, f">= {SUCCESS_RATIO:g}", None, None))
    return found + ratios


def _gain(figure: str, comparison: Record) -> Target:
    gain = comparison["efficiency_gain"]
    if None not in (gain["low"], gain["high"]):
        figure += f" (interval {gain['low']:.3g} to {gain['high']:.3g})"
    figure += f", tasks: {len(comparison['tasks'])}"
    value = gain["value"]
    return Target(figure, f">= {GAIN:g}", value, None if value is None else value >= GAIN)


def _open(task: Record) -> bool:
    ours, others = task["success"]
    return others < 1 and max(ours, others) > 0


def _success(figure: str, task: Record) -> Target:
    ours, others = task["success"]
    figure += f" ({ours:.2g} against {others:.2g} of the runs)"
    value = task["success_ratio"]["value"]
    reached = ours > 0 if value is None else value >= SUCCESS_RATIO
    return Target(figure, f">= {SUCCESS_RATIO:g}", value, reached)
