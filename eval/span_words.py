"""What SPAN won and lost, in words that follow from comparing the rows of its record."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.span_figures import look, titled
from eval.span_study import BEST_MLP, OURS
from eval.turbulence_targets import listed

Record = Mapping[str, Any]

COST = {"ppo_update": "update of PPO", "sac_update": "update of SAC", "act": "action on one observation"}


def rival(name: str) -> str:
    """A network that SPAN is compared with, the tuned MLP included."""
    return "the tuned MLP" if name == BEST_MLP else look(name)[2]


def verdict(estimate: Record, even: float) -> str:
    """Whether SPAN is better or worse by an interval that leaves out `even`, or neither can be said."""
    if estimate["low"] is None:
        return "too few seeds for a verdict"
    if estimate["low"] > even:
        return "better"
    return "worse" if estimate["high"] is not None and estimate["high"] < even else "alike within the interval"


def interval(estimate: Record, form: str = "{:.3g}", scale: float = 1.0) -> str:
    """A value and its interval; an end that is infinite has no number in the record."""
    value = "∞" if estimate["value"] is None else form.format(scale * estimate["value"])
    if estimate["low"] is None:
        return value
    high = "∞" if estimate["high"] is None else form.format(scale * estimate["high"])
    return f"{value} ({form.format(scale * estimate['low'])} to {high})"


def comparison_words(comparisons: Sequence[Record]) -> list[str]:
    """For each size and network, the gain of SPAN in samples and the chances that its runs end higher."""
    words = []
    for each in comparisons:
        gain, chance = each["efficiency_gain"], each["final_improvement"]
        words.append(
            f"Size {each['size']}, {_tasks(each['tasks'])}, against {rival(each['against'])}: gain in sample "
            f"efficiency {interval(gain, '{:.0f}', 100)} % ({verdict(gain, 0)}); a run of SPAN ends higher with "
            f"probability {interval(chance, '{:.2f}')} ({verdict(chance, 0.5)})."
        )
    return words


def task_words(comparisons: Sequence[Record]) -> list[str]:
    """For each size, the tasks on which SPAN needs fewer samples than the tuned MLP, more, or neither."""
    words = []
    for each in comparisons:
        if each["against"] != BEST_MLP:
            continue
        told: dict[str, list[str]] = {}
        for task in each["tasks"]:
            outcome = verdict(task["efficiency_gain"], 0) if any(task["reached"]) else "out of reach of both"
            told.setdefault(outcome, []).append(titled(task["task"]))
        parts = "; ".join(f"{outcome} on {listed(tasks)}" for outcome, tasks in told.items())
        words.append(f"Size {each['size']}, samples to the threshold against the tuned MLP: {parts}.")
    return words


def winner_words(rows: Sequence[Record]) -> list[str]:
    """For each size, the network with the largest area under the curve, by task, and whether another is as good."""
    words = []
    for size in dict.fromkeys(row["size"] for row in rows):
        won: dict[str, list[str]] = {}
        for task in dict.fromkeys(row["task"] for row in rows if row["size"] == size):
            found = [row for row in rows if (row["size"], row["task"]) == (size, task)]
            best = max(found, key=lambda row: row["area"]["value"])
            others = [row["area"] for row in found if row is not best]
            near = any(area["high"] is None or area["high"] >= best["area"]["value"] for area in others)
            name = look(best["network"])[2] + " (within the interval of another)" * near
            won.setdefault(name, []).append(titled(task))
        parts = "; ".join(f"{network} on {listed(tasks)}" for network, tasks in won.items())
        words.append(f"Size {size}, largest area under the learning curve: {parts}.")
    return words


def choice_words(summary: Record) -> list[str]:
    """How learning rates and the MLP to beat were chosen, and where a grid was too narrow."""
    words = []
    grids: dict[str, list[str]] = {}
    for choice in summary["choices"]:
        if choice["by"] == "tune":
            grid = listed([f"{point['learning_rate']:g}" for point in choice["grid"]])
            seeds = sorted({point["num_seeds"] for point in choice["grid"]})
            grids.setdefault(f"{grid}, {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds each", [])
            if choice["at_edge"]:
                where = f"{look(choice['network'])[2]} on {titled(choice['task'])} ({choice['size']})"
                grids.setdefault("edges", []).append(f"{where}: {choice['learning_rate']:g}")
    edges = grids.pop("edges", [])
    words += [f"Learning rates tried: {grid}." for grid in grids]
    if edges:
        words.append(f"Chosen at the edge of its grid, so that another may be better: {listed(edges)}.")
    for by, told in (("tune", "tuning runs"), ("test", "test runs, in its favour")):
        found = [each for each in summary["best_mlp"] if each["by"] == by]
        named = [f"{titled(each['task'])} ({each['size']}) {look(each['network'])[2]}" for each in found]
        if named:
            words.append(f"The tuned MLP, by its area in {told}: {', '.join(named)}.")
    return words


def cost_words(cost: Record) -> list[str]:
    """What SPAN costs beside an MLP."""
    words = []
    for key, told in COST.items():
        if (found := cost.get(key, {}).get(OURS)) is not None:
            words.append(f"An {told} takes {found['ratio']:.3g} times as long as with an MLP.")
    return words


def _tasks(tasks: Sequence[Any]) -> str:
    return f"{len(tasks)} task{'s' * (len(tasks) > 1)}"
