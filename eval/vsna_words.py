"""What VSNA won and lost, in words that follow from comparing the rows of its record."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.turbulence_targets import listed
from eval.vsna_figures import named
from eval.vsna_targets import OURS, PUBLISHED_FRONTIER, PUBLISHED_SWEEP_SECONDS

Record = Mapping[str, Any]

METHODS = {
    "train": "VSNA, tensor train",
    "cp": "VSNA, sum of products",
    "amen": "torchTT's AMEn",
    "pinn": "PINN",
    "greedy": "greedy sum of products",
}
MEBIBYTE = 2**20


def capital(text: str) -> str:
    """The text with a capital letter at its start."""
    return text[:1].upper() + text[1:]


def goal_words(goals: Sequence[Record]) -> list[str]:
    """For each problem, to which errors ours are faster or slower than the fastest of the others, and by how much."""
    words = []
    for problem in dict.fromkeys(row["problem"] for row in goals):
        won, lost, alone = {}, {}, []
        for row in goals:
            if row["problem"] != problem:
                continue
            ours = [row["seconds"][name] for name in OURS if name in row["seconds"]]
            others = {name: seconds for name, seconds in row["seconds"].items() if name not in OURS}
            if not others:
                alone.append(f"{row['goal']:g}")
                continue
            best = min(others, key=others.get)
            if not ours:
                lost.setdefault(best, []).append(f"{row['goal']:g} (which VSNA's fields do not reach)")
                continue
            ratio = others[best] / min(ours)
            told, times = (won, ratio) if ratio > 1 else (lost, 1 / ratio)
            told.setdefault(best, []).append(f"{row['goal']:g} ({times:.2g} times)")
        parts = [f"faster than {METHODS[name]} to errors of {listed(errors)}" for name, errors in won.items()]
        parts += [f"slower than {METHODS[name]} to errors of {listed(errors)}" for name, errors in lost.items()]
        parts += [f"alone at {listed(alone)}"] * bool(alone)
        words.append(f"{capital(named(problem))}: VSNA is {'; '.join(parts)}.")
    return words


def rank_words(rows: Sequence[Record]) -> list[str]:
    """For each problem, the greedy sum of products beside ours of the same rank, at the largest that both have."""
    words = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        by_rank = {
            method: {
                row["rank"]: row["relative_l2"] for row in rows if (row["problem"], row["method"]) == (problem, method)
            }
            for method in ("cp", "greedy")
        }
        common = sorted(by_rank["cp"].keys() & by_rank["greedy"].keys())
        if common:
            ratio = by_rank["greedy"][common[-1]] / by_rank["cp"][common[-1]]
            words.append(
                f"{capital(named(problem))}: of {common[-1]} products the greedy sum has {ratio:.2g} times the error "
                "of the one that is fitted together."
            )
    return words


def speed_up_words(speed_ups: Sequence[Record]) -> list[str]:
    """For each problem and degree of elements, what a query costs, and from how many on the field has paid."""
    words = []
    for row in speed_ups:
        degree = row["method"].removeprefix("P")
        better = row["element_error"] <= row["field_error"]
        accuracy = "as accurate as the field" if better else "the most accurate that were tried, and less so"
        even = row["break_even"]
        paid = f"the field has paid after {even:,} queries" if even is not None else "the field never pays"
        words.append(
            f"{capital(named(row['problem']))}, elements of degree {degree} ({row['size']}; error "
            f"{row['element_error']:.1e}, the field's {row['field_error']:.1e}: {accuracy}): a solve takes "
            f"{row['element_seconds']:.3g} s; the field on the same {row['num_points']:,} nodes and times "
            f"{row['field_seconds']:.3g} s, {row['ratio']:.3g} times as fast, and at as many random points "
            f"{row['scattered_seconds']:.3g} s. With its solve of {row['offline_seconds']:.3g} s {paid} on nodes."
        )
    return words


def frontier_words(frontier: Record) -> list[str]:
    """How the plume's error compares with the published line, at each form's most accurate field."""
    factor, slope = PUBLISHED_FRONTIER
    words = []
    for form, found in frontier["slopes"].items():
        rows = [row for row in frontier["rows"] if row["form"] == form]
        if not rows or found is None:
            continue
        best = min(rows, key=lambda row: row["relative_l2"])
        published = factor * best["num_parameters"] ** slope
        words.append(
            f"{capital(form.replace('_', ' '))}: slope {found:.2f} (published {slope:g}); the most accurate field has "
            f"{best['num_parameters']:,} parameters and an error of {best['relative_l2']:.2e}, where the published "
            f"line is at {published:.2e}."
        )
    spread = _seed_spread(frontier["rows"])
    if spread is not None:
        words.append(f"Between fits that differ in their seed alone the error differs by up to {100 * spread:.2g} %.")
    return words


def _seed_spread(rows: Sequence[Record]) -> float | None:
    groups: dict[tuple[str, int, int], list[float]] = {}
    for row in rows:
        if row["form"] == "cp":
            groups.setdefault((row["form"], row["num_cells"], row["rank"]), []).append(row["relative_l2"])
    spreads = [max(errors) / min(errors) - 1 for errors in groups.values() if len(errors) > 1]
    return max(spreads, default=None)


def sweep_words(sweep: Record) -> list[str]:
    """Times, memory, and the melt pool."""
    depth, rise = sweep["depth"], sweep["rise"]
    times = PUBLISHED_SWEEP_SECONDS / sweep["median_seconds"] * sweep["num_samples"] / 1e6
    memory = [
        f"{(row['peak_bytes'] - row['before_bytes']) / MEBIBYTE:.0f} MiB at {row['num_samples']:,} queries"
        for row in sweep["memory"]
    ]
    words = [
        f"{sweep['num_samples']:,} random queries of all inputs in {sweep['dtype']}: {sweep['median_seconds']:.3g} s "
        f"with drawing and summing up (median of {len(sweep['sweep_seconds'])}), "
        f"{sweep['values_alone_seconds']:.3g} s for the values alone; published for a million, on another machine, "
        f"{PUBLISHED_SWEEP_SECONDS:g} s ({times:.3g} times as long).",
        f"Memory beyond the model's: {listed(memory)}.",
        f"Rise over the box: mean {rise['mean']:.1f} {rise['unit']}, from {rise['minimum']:.1f} to "
        f"{rise['maximum']:.1f}.",
    ]
    low, middle, high = (f"{value:.1f}" for value in depth["quantiles"])
    words.append(
        f"Depth of the melt pool over {depth['num_samples']:,} draws: {depth['mean']:.1f} ± "
        f"{depth['standard_deviation']:.1f} {depth['unit']}, median {middle}, 90 % between {low} and {high}, from "
        f"{depth['num_queries']:,} queries in {depth['seconds']:.3g} s."
    )
    return words


def laser_words(laser: Record) -> list[str]:
    """The field and its errors."""
    model, error = laser["model"], laser["error"]
    return [
        f"{capital(model['decomposition'].replace('_', ' '))} of rank {model['rank']}, {model['num_parameters']:,} "
        f"parameters, solved in {model['seconds']:.3g} s (residual {model['residual']:.2g}, stopped by "
        f"{model['stopped_by'].replace('_', ' ')}).",
        f"Largest error {error['largest']:.3g} K, {100 * error['largest_of_peak']:.2g} % of the peak rise for the same "
        f"parameters; relative L2 {error['relative_l2']:.2g} ({error['rule']}).",
    ]
