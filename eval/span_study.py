"""What the runs of the SPAN study say: learning rates that tuning chose, tables, aggregates and comparisons.

A record of a run is a JSON object of `training.span`. Learning rates, and which of the MLPs is the one to beat, are
chosen by runs with the purpose "tune", whose seeds differ from those of the runs with the purpose "test" that are
reported. Studies may be incomplete: what is missing is listed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.span_statistics import (
    CONFIDENCE,
    Estimate,
    bootstrap,
    efficiency_gain,
    expected_cost,
    final_score,
    improvement_probability,
    interquartile_mean,
    learning_area,
    mean_over_tasks,
    normalised,
    ratio,
    restricted,
    steps_to_threshold,
    succeeded,
)

Record = Mapping[str, Any]
Cell = tuple[str, str, str]  # task, size, network

OURS = "span"
MLPS = ("mlp_tanh", "mlp_relu")
BEST_MLP = "best_mlp"
DIGITS = 5
COLUMNS = ("final", "area", "share", "success", "reached")  # of `Measures`, that are resampled together
YES_NO = [COLUMNS.index(name) for name in ("success", "reached")]


@dataclasses.dataclass(frozen=True)
class Measures:
    """What is measured on one run.

    Attributes:
        seed: Of the run.
        num_parameters: Of actor and critics.
        curve: Normalised return at each evaluation (T,).
        area: Its mean.
        final: Normalised return at the end.
        steps: Steps to the threshold; None if it was not reached.
        share: The same over the budget, 1 if it was not reached.
        seconds: Seconds to the threshold, or to the end.
        success: Whether the run ends at or above the threshold.
        episodes: Share of the final evaluation episodes that succeeded; None where the task does not say.
    """

    seed: int
    num_parameters: int
    curve: NDArray[np.float64]
    area: float
    final: float
    steps: float | None
    share: float
    seconds: float
    success: bool
    episodes: float | None

    @property
    def reached(self) -> bool:
        """Whether the threshold was reached at all."""
        return self.steps is not None


def measures(record: Record) -> Measures:
    """Measures a run.

    Raises:
        ValueError: If its curve or its reference is malformed.
    """
    reference, steps, budget = record["reference"], record["steps"], record["total_steps"]
    curve = normalised(record["returns"], reference["low"], reference["high"])
    reached = steps_to_threshold(steps, record["returns"], reference["threshold"])
    share = restricted([reached], budget)[0] / budget
    return Measures(
        seed=record["seed"],
        num_parameters=record["num_parameters"],
        curve=curve,
        area=learning_area(steps, curve),
        final=final_score(curve),
        steps=reached,
        share=share,
        seconds=share * record["train_seconds"],
        success=succeeded(record["returns"], reference["threshold"]),
        episodes=None if record["successes"] is None else final_score(record["successes"]),
    )


def compact(record: Record) -> dict[str, Any]:
    """A run's record as the study keeps it: of its provenance the commit alone, and numbers to five digits."""
    made = record.get("provenance") or {}
    kept = {key: value for key, value in record.items() if key != "provenance"} | {"commit": made.get("commit")}
    for key in ("returns", "successes"):
        if kept.get(key) is not None:
            kept[key] = _rounded(kept[key])
    return kept


def summarise(records: Sequence[Record], *, num_resamples: int, seed: int) -> dict[str, Any]:
    """Tables, aggregates and comparisons of all runs, ready for JSON.

    Args:
        records: Of the runs, for tuning and for testing.
        num_resamples: Draws of each bootstrap.
        seed: Of the draws.

    Returns:
        `choices` of learning rates, `best_mlp` by task and size, `rows` (a task, size and network each, with curves),
        `aggregates` over tasks by size and network, `comparisons` of SPAN by size with each other network and with the
        best MLP, and `missing`, in words.

    Raises:
        ValueError: If runs of a task differ in steps or references, or one run is there twice.
    """
    _check(records)
    draws = {"num_resamples": num_resamples, "seed": seed}
    groups: dict[Cell, list[Record]] = {}
    for record in records:
        groups.setdefault((record["task"], record["size"], record["network"]), []).append(record)
    choices = {cell: choose(runs) for cell, runs in groups.items()}
    tested = {
        cell: [
            measures(run) for run in runs if _is_test(run) and run["learning_rate"] == choices[cell]["learning_rate"]
        ]
        for cell, runs in groups.items()
    }
    tested = {cell: runs for cell, runs in tested.items() if runs}
    best = _best_mlps(choices, tested)
    sizes = list(dict.fromkeys(size for _, size, _ in groups))
    first = {task: next(record for record in records if record["task"] == task) for task, _, _ in groups}
    keys = ("environment", "algorithm", "total_steps", "reference", "steps")
    return {
        **draws,
        "confidence": CONFIDENCE,
        "tasks": {task: {key: record[key] for key in keys} for task, record in first.items()},
        "choices": [{**_named(cell), **choice} for cell, choice in choices.items()],
        "best_mlp": [{"task": task, "size": size, **found} for (task, size), found in best.items()],
        "rows": [
            _row(cell, runs, choices[cell]["learning_rate"], first[cell[0]], draws) for cell, runs in tested.items()
        ],
        "aggregates": [
            _aggregate(size, network, tested, draws)
            for size in sizes
            for network in dict.fromkeys(network for _, of, network in tested if of == size)
        ],
        "comparisons": [found for size in sizes for found in _comparisons(size, tested, best, draws)],
        "missing": _missing(groups, tested, choices),
    }


def choose(runs: Sequence[Record]) -> dict[str, Any]:
    """The learning rate of one network on one task: that with the largest mean area of its tuning runs.

    Without tuning runs it is the rate of most test runs, the least of several.
    """
    tune = [run for run in runs if not _is_test(run)]
    areas: dict[float, list[float]] = {}
    for run in tune or runs:
        areas.setdefault(run["learning_rate"], []).append(measures(run).area)
    grid = sorted(areas)
    means = {rate: float(np.mean(areas[rate])) for rate in grid}
    chosen = max(grid, key=means.get) if tune else max(grid, key=lambda rate: len(areas[rate]))
    return {
        "learning_rate": chosen,
        "by": "tune" if tune else "none",
        "grid": [
            {"learning_rate": rate, "area": _rounded(means[rate]), "num_seeds": len(areas[rate])} for rate in grid
        ],
        "area": _rounded(means[chosen]),
        "at_edge": bool(tune) and len(grid) > 1 and chosen in (grid[0], grid[-1]),
    }


def summarise_offline(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Mean and spread of normalised returns by dataset, algorithm, factor of parameters and network.

    A ratio is that of SPAN's mean to the higher of the MLPs' with the same factor; None where that is not positive.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if _is_test(record):
            key = tuple(record[name] for name in ("dataset", "algorithm", "parameter_factor", "network"))
            groups.setdefault(key, []).append(record)
    means = {key: float(np.mean([run["normalised_return"] for run in runs])) for key, runs in groups.items()}
    rows = []
    for key, runs in sorted(groups.items(), key=lambda item: item[0][:3]):
        others = [means[(*key[:3], name)] for name in MLPS if (*key[:3], name) in means]
        found = means[key] / max(others) if key[3] == OURS and others and max(others) > 0 else None
        returns = [run["normalised_return"] for run in runs]
        rows.append(
            dict(zip(("dataset", "algorithm", "parameter_factor", "network"), key, strict=True))
            | {
                "num_seeds": len(runs),
                "num_parameters": runs[0]["num_parameters"],
                "mean": _rounded(means[key]),
                "spread": _rounded(np.std(returns, ddof=1)) if len(returns) > 1 else None,
                "ratio": _rounded(found),
            }
        )
    return rows


def _row(cell: Cell, runs: Sequence[Measures], rate: float, about: Record, draws: Mapping[str, int]) -> dict[str, Any]:
    """The table's row of a network on a task, and its mean curve."""
    budget = about["total_steps"]
    steps = [np.inf if run.steps is None else run.steps for run in runs]
    reached = [run.reached for run in runs]
    episodes = [run.episodes for run in runs if run.episodes is not None]
    columns = np.hstack([_columns(runs), [run.curve for run in runs]])
    numbers = bootstrap(_means, [columns], **draws)
    share = _plain(numbers, COLUMNS.index("share"))
    curve = {name: ends if ends is None else _rounded(ends[len(COLUMNS) :]) for name, ends in vars(numbers).items()}
    return {
        **_named(cell),
        "num_seeds": len(runs),
        "num_parameters": runs[0].num_parameters,
        "learning_rate": rate,
        **{name: _plain(numbers, COLUMNS.index(name)) for name in ("final", "area", "success", "reached")},
        "steps_median": _rounded(np.median(steps)),
        "steps_iqm": {name: end if end is None else _rounded(end * budget) for name, end in share.items()},
        "episode_success": _rounded(np.mean(episodes)) if episodes else None,
        "cost_steps": _rounded(expected_cost([run.share * budget for run in runs], reached)),
        "cost_seconds": _rounded(expected_cost([run.seconds for run in runs], reached)),
        "curve": curve,
    }


def _aggregate(
    size: str, network: str, tested: Mapping[Cell, Sequence[Measures]], draws: Mapping[str, int]
) -> dict[str, Any]:
    """Over the tasks that a network has runs of."""
    found = {task: runs for (task, of, name), runs in tested.items() if (of, name) == (size, network)}
    numbers = bootstrap(_means, [_columns(runs) for runs in found.values()], **draws)
    return {
        "size": size,
        "network": network,
        "tasks": list(found),
        "num_runs": sum(map(len, found.values())),
        **{name: _plain(numbers, column) for column, name in enumerate(COLUMNS)},
    }


def _means(tasks: Sequence[NDArray]) -> NDArray[np.float64]:
    """Interquartile means of all columns but those of yes or no: the mean over tasks of their shares."""
    means = interquartile_mean(tasks)
    means[YES_NO] = mean_over_tasks(tasks)[YES_NO]
    return means


def _comparisons(
    size: str,
    tested: Mapping[Cell, Sequence[Measures]],
    best: Mapping[tuple[str, str], Record],
    draws: Mapping[str, int],
) -> list[dict[str, Any]]:
    """SPAN against each other network and against the best MLP, on the tasks that both have runs of."""
    ours = {task: _columns(runs) for (task, of, name), runs in tested.items() if (of, name) == (size, OURS)}
    names = dict.fromkeys(name for _, of, name in tested if of == size and name != OURS)
    rivals = {name: {task: name for task in ours if (task, size, name) in tested} for name in names}
    rivals[BEST_MLP] = {task: best[task, size]["network"] for task in ours if (task, size) in best}
    found = []
    for rival, by_task in rivals.items():
        if not by_task:
            continue
        mine = [ours[task] for task in by_task]
        theirs = [_columns(tested[task, size, name]) for task, name in by_task.items()]
        numbers = bootstrap(_compared, mine, theirs, **draws)
        gain, final, area, *of_tasks = (_plain(numbers, column) for column in range(3 + 2 * len(mine)))
        found.append(
            {
                "size": size,
                "against": rival,
                "efficiency_gain": gain,
                "final_improvement": final,
                "area_improvement": area,
                "tasks": [
                    {
                        "task": task,
                        "network": name,
                        "efficiency_gain": of_tasks[2 * i],
                        **{
                            COLUMNS[column]: [_rounded(of[i][:, column].mean()) for of in (mine, theirs)]
                            for column in YES_NO
                        },  # ours and theirs
                        "success_ratio": of_tasks[2 * i + 1],
                    }
                    for i, (task, name) in enumerate(by_task.items())
                ],
            }
        )
    return found


def _compared(mine: Sequence[NDArray], theirs: Sequence[NDArray]) -> NDArray[np.float64]:
    """Over all tasks the gain and the probabilities of improvement; then gain and success ratio of each task."""

    def pair(name: str) -> list[list[NDArray]]:
        return [[task[:, COLUMNS.index(name)] for task in of] for of in (mine, theirs)]

    shares, wins = pair("share"), pair("success")
    numbers = [
        efficiency_gain(*shares),
        improvement_probability(*pair("final")),
        improvement_probability(*pair("area")),
    ]
    for i in range(len(mine)):
        numbers += [efficiency_gain(*(of[i : i + 1] for of in shares)), ratio(*(of[i].mean() for of in wins))]
    return np.array(numbers)


def _best_mlps(
    choices: Mapping[Cell, Record], tested: Mapping[Cell, Sequence[Measures]]
) -> dict[tuple[str, str], dict[str, Any]]:
    """By task and size, the MLP of larger area: of tuning runs if all have them, else of test runs, to its favour."""
    found = {}
    for task, size in dict.fromkeys((task, size) for task, size, network in tested if network in MLPS):
        cells = {name: (task, size, name) for name in MLPS if (task, size, name) in tested}
        tuned = all(choices[cell]["by"] == "tune" for cell in cells.values())
        areas = {
            name: choices[cell]["area"] if tuned else _rounded(interquartile_mean([[run.area for run in tested[cell]]]))
            for name, cell in cells.items()
        }
        found[task, size] = {"network": max(areas, key=areas.get), "by": "tune" if tuned else "test", "areas": areas}
    return found


def _missing(
    groups: Mapping[Cell, Sequence[Record]], tested: Mapping[Cell, Sequence[Measures]], choices: Mapping[Cell, Record]
) -> list[str]:
    """What an even study would hold besides, in words."""
    if not groups:
        return ["there are no runs"]
    tasks, sizes, networks = (list(dict.fromkeys(cell[i] for cell in groups)) for i in range(3))
    words = []
    most = max(map(len, tested.values()), default=0)
    for size in sizes:
        for task in tasks:
            for network in networks:
                cell, where = (task, size, network), f"{task}, {size}, {network}"
                if cell not in groups:
                    words.append(f"{where}: no runs")
                elif cell not in tested:
                    words.append(f"{where}: no test runs at the learning rate {choices[cell]['learning_rate']:g}")
                elif len(tested[cell]) < most:
                    words.append(f"{where}: {len(tested[cell])} seeds, others have {most}")
    grids = {cell: tuple(point["learning_rate"] for point in choice["grid"]) for cell, choice in choices.items()}
    for cell, choice in choices.items():
        where = ", ".join(cell)
        rivals = {grids[other] for other in choices if other[:2] == cell[:2] and choices[other]["by"] == "tune"}
        tune, test = ({run["seed"] for run in groups[cell] if _is_test(run) == flag} for flag in (False, True))
        if choice["by"] != "tune":
            words.append(f"{where}: learning rate not tuned")
        elif any(len(grid) > len(grids[cell]) for grid in rivals):
            words.append(f"{where}: tuned over {len(grids[cell])} learning rates, others over more")
        if tune & test:
            words.append(f"{where}: seeds {', '.join(map(str, sorted(tune & test)))} both tuned and tested")
    return words


def _check(records: Sequence[Record]) -> None:
    seen, shapes = set(), {}
    for record in records:
        keys = ("task", "size", "network", "learning_rate", "seed", "purpose")
        key = tuple(record[name] for name in keys)
        if record["purpose"] not in ("tune", "test"):
            raise ValueError(f"a run of {record['task']} has the purpose {record['purpose']!r}; expected tune or test.")
        if key in seen:
            raise ValueError(f"there are two runs with {dict(zip(keys, key, strict=True))}; leave one out.")
        seen.add(key)
        shape = record["steps"], record["total_steps"], record["reference"]
        if shapes.setdefault(record["task"], shape) != shape:
            raise ValueError(f"runs of {record['task']} differ in steps or references; summarise them apart.")


def _is_test(record: Record) -> bool:
    return record.get("purpose", "test") == "test"


def _named(cell: Cell) -> dict[str, str]:
    return dict(zip(("task", "size", "network"), cell, strict=True))


def _columns(runs: Sequence[Measures]) -> NDArray[np.float64]:
    return np.array([[getattr(run, name) for name in COLUMNS] for run in runs], dtype=np.float64)


def _plain(estimate: Estimate, column: int) -> dict[str, float | None]:
    """A column of an estimate, for JSON."""
    return {name: None if ends is None else _rounded(ends[column]) for name, ends in vars(estimate).items()}


def _rounded(number: Any) -> Any:
    """Numbers to `DIGITS` digits; None for what JSON cannot hold."""
    if number is None:
        return None
    if np.ndim(number):
        return [_rounded(each) for each in number]
    return float(f"{number:.{DIGITS}g}") if np.isfinite(number) else None
