"""What KHRONOS won and lost, in words that follow from comparing the rows of its records."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval.khronos_figures import OURS, PROBLEMS, SEARCHES, by_dataset, error, named
from eval.turbulence_targets import listed

Record = Mapping[str, Any]

SPLITS = {"repeated": "repeated splits", "leave_one_wall_out": "each wall left out"}


def poisson_words(rows: Sequence[Record], problem: str) -> list[str]:
    """At which sizes KHRONOS errs less than every other method, each at its best degree; more of the largest."""
    found: dict[int, list[Record]] = {}
    for row in rows:
        if row["problem"] == problem and row["squared_l2_error"] is not None:
            found.setdefault(row["size"], []).append(row)
    ahead, behind, last = [], {}, None
    for size, at in sorted(found.items()):
        ours = [row for row in at if row["method"] == OURS]
        others = [row for row in at if row["method"] != OURS]
        if not ours or not others:
            continue
        best, rival = (min(each, key=lambda row: row["squared_l2_error"]) for each in (ours, others))
        if best["squared_l2_error"] < rival["squared_l2_error"]:
            ahead.append(f"{size:,}")
        else:
            behind.setdefault(named(rival["method"]), []).append(f"{size:,}")
        last = size, ours, best, rival, min(at, key=lambda row: row["seconds"])
    if last is None:
        return []
    words = [f"KHRONOS errs least at {listed(ahead)} parameters"] if ahead else []
    words += [f"{name} errs less at {listed(sizes)} parameters" for name, sizes in behind.items()]
    size, ours, best, rival, fastest = last
    what = f"at {size:,} the error of {named(rival['method'])} of degree {rival['degree']} is "
    factors = [f"{rival['squared_l2_error'] / best['squared_l2_error']:.2g} times that of degree {best['degree']}"]
    equal = next((row for row in ours if row["degree"] == rival["degree"] != best["degree"]), None)
    if equal:
        factors.append(f"{rival['squared_l2_error'] / equal['squared_l2_error']:.2g} times that of equal degree")
    words.append(what + listed(factors))
    if fastest["method"] != OURS:
        seconds = f"{fastest['seconds']:.2g} s against {best['seconds']:.2g} s"
        words.append(f"{named(fastest['method'])} is the fastest there ({seconds})")
    return [f"Poisson, {PROBLEMS.get(problem, problem)}: {'; '.join(words)}."]


def tabular_words(rows: Sequence[Record]) -> list[str]:
    """Seed by seed, whom KHRONOS is ahead of and behind on each set: on all seeds, else it is undecided."""
    words = []
    for name, methods in by_dataset(rows).items():
        ours = next((row for row in methods if row["method"] == OURS), None)
        if ours is None:
            continue
        told: dict[str, list[str]] = {"behind": [], "undecided against": [], "ahead of": []}
        for row in methods:
            if row is ours:
                continue
            pairs = [(error(a), error(b)) for a, b in zip(ours["runs"], row["runs"], strict=True)]
            if all(mine < theirs for mine, theirs in pairs):
                kind = "ahead of"
            else:
                kind = "behind" if all(mine > theirs for mine, theirs in pairs) else "undecided against"
            times = f" ({error(row['mean']) / error(ours['mean']):.3g})" if error(ours["mean"]) > 0 else ""
            told[kind].append(named(row["method"]) + times)
        parts = "; ".join(f"{kind} {listed(others)}" for kind, others in told.items() if others)
        words.append(f"{capital(named(name))}: KHRONOS is {parts or 'alone'}.")
    return words


def inconel_words(inconel: Record) -> list[str]:
    """How KHRONOS stands to the best of its rivals on each property, and to all methods."""
    words = []
    for name, about in inconel["properties"].items():
        ours = of_method(about["methods"], OURS)
        parts = []
        for verdict in about["verdicts"]:
            difference, spread, rival = verdict["difference"], verdict["standard_error"], named(verdict["rival"])
            level = "level with" if abs(difference) <= spread else "ahead of" if difference > 0 else "behind"
            parts.append(f"{level} {rival} on {SPLITS[verdict['splits']]} ({difference:+.3f} ± {spread:.3f})")
        before = [named(row["method"]) for row in about["methods"] if row["fixed_r2"] > ours["fixed_r2"]]
        parts.append(f"on the fixed split behind {listed(before)}" if before else "first on the fixed split")
        word = "above" if ours["fixed_r2"] >= about["published_r2"] else "below"
        parts.append(f"there {word} the published figure")
        words.append(f"Inconel 718, {named(name)}: KHRONOS is {', '.join(parts)}.")
    return words


def inversion_words(inconel: Record) -> list[str]:
    """What the models predict for the point left out, and how its curve lies to those of the solutions."""
    point, words = inconel["left_out"].replace("_", "-").upper(), []
    for row in inconel["inversions"]:
        what = f"{capital(named(row['property']))}, {SEARCHES[row['search']][1]}"
        if not row["num_solutions"]:
            words.append(f"{what}: no solution was found.")
            continue
        near, far = (f"{row['distances'][end]:.2g}" for end in ("min", "max"))
        off = f"{100 * row['error_of_mean_curve']:.0f} % of the norm of {point}'s curve"
        if row["num_solutions"] == 1:
            parts = [f"the curve is off by {off}", f"the solution lies at a distance of {near}"]
        else:
            within = f"{100 * row['truth_within_envelope']:.0f} % of {point}'s curve is within the envelope"
            parts = [within, f"the mean curve is off by {off}", f"the solutions lie at distances of {near} to {far}"]
        words.append(f"{what}: {', '.join(parts)}, {point} at {row['distance_of_left_out']:.2g}.")
    of_point = {
        row["property"]: (
            f"For {point} itself the model of {named(row['property'])} predicts {row['predicted_for_left_out']:.1f} "
            f"{inconel['properties'][row['property']]['unit']}; measured are {row['target']:.1f}."
        )
        for row in inconel["inversions"]
    }
    return [*of_point.values(), *words]


def coverage_words(coverage: Record) -> list[str]:
    """Which intervals are too narrow or too wide by more than the standard error of the mean over seeds."""
    told: dict[str, list[str]] = {"too narrow": [], "too wide": []}
    num_seeds = coverage["num_seeds"]
    for row in coverage["rows"]:
        if abs(row["mean"] - row["level"]) > row["standard_deviation"] / math.sqrt(num_seeds):
            told["too narrow" if row["mean"] < row["level"] else "too wide"].append(f"{100 * row['level']:g} %")
    words = "; ".join(f"{kind} at {listed(levels)}" for kind, levels in told.items() if levels)
    verdict = f"Intervals are {words}" if words else "No interval is off"
    return [f"{verdict} on {coverage['dataset']}, by more than the standard error of the mean over {num_seeds} seeds."]


def speed_words(speed: Record) -> list[str]:
    """Times of prediction and of the fit, and the memory of both."""
    predict, against, best = speed["predict"], speed["als_against_gradient"], speed["als_against_gradient"]["best"]
    size = (
        f"{predict['num_points']:,} points of {predict['num_inputs']} inputs, rank {predict['rank']}, degree "
        f"{predict['degree']}, {predict['num_cells']} cells, float32"
    )
    words = [
        f"Prediction of {size}: {predict['seconds']:.3g} s; by a weighted gather {predict['gather_seconds']:.3g} s, by "
        f"a dense basis {predict['dense_seconds']:.3g} s."
    ]
    gradient = (
        f"the fastest of {len(against['trials'])} trainings by gradient took {best['seconds']:.3g} s to the same error "
        f"({against['ratio']:.3g} times as long)"
        if best
        else f"none of {len(against['trials'])} trainings by gradient came down to the same error; the longest were "
        f"stopped at {against['ratio']:.3g} times that time or more"
    )
    words.append(
        f"Fit of {against['num_parameters']:,} parameters to {against['num_points']:,} points of "
        f"{against['num_inputs']} inputs by alternating least squares: {against['als_seconds']:.3g} s; {gradient}. The "
        f"target is a sum of {against['target_rank']} products without noise, the rank of the model "
        f"{against['rank']}, and the error to be reached {against['als_error']:.2g} of the standard deviation."
    )
    for task in dict.fromkeys(row["task"] for row in speed["memory"]):
        rows = [row for row in speed["memory"] if row["task"] == task]
        peaks = listed([f"{row['peak_bytes'] / 2**20:,.0f} MiB at {row['num_points']:,} points" for row in rows])
        bound = rows[0]["bound_bytes"]
        bounded = "" if bound is None else f"; it was given {bound / 2**20:,.0f} MiB beside tables of its own precision"
        words.append(f"Memory of {task} beyond the caller's table: {peaks}{bounded}.")
    return words


def of_method(rows: Sequence[Record], name: str) -> Record:
    """The row of a method."""
    return next(row for row in rows if row["method"] == name)


def capital(text: str) -> str:
    """The text with a capital letter at its start."""
    return text[:1].upper() + text[1:]
