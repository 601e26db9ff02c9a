"""The figures that the study of VSNA was to reach, held against its record."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]

SLOPE_WITHIN = 0.2  # of the expected one
SPECTRAL_ERROR = 1e-9  # that spectral axes are to come down to
FIELDS = {  # of the plume: the error, parameters and seconds that each form is to keep to
    "cp": (3e-4, 30_000, 300.0),
    "tucker": (1e-4, 30_000, 600.0),
    "tensor_train": (1e-5, 100_000, None),
}
PUBLISHED_FRONTIER = (0.24, -0.68)  # factor and slope of the error against parameters, arXiv 2603.12244
PUBLISHED_SWEEP_SECONDS = 102.0  # of a million queries on a laptop, likewise
FRONTIER_SLOPE = -1.5
NUM_QUERIES, SWEEP_SECONDS = 1_000_000, 3.0
FLAT_BYTES = 1.0  # that a sweep may take for each further sample
OURS = ("train", "cp")  # methods of the comparison
LASER_POINTS, LASER_ERROR = 200, 0.01  # of the peak rise


@dataclass(frozen=True)
class Target:
    """A figure to reach.

    Attributes:
        figure: What is measured.
        asked: The bound.
        measured: None where the record does not hold it.
        reached: Likewise.
    """

    figure: str
    asked: str
    measured: float | None
    reached: bool | None


def targets(record: Record) -> list[Target]:
    """The figures to reach, held against the record; a part that is missing leaves its targets open."""
    found = []
    for rate in record.get("convergence", {}).get("rates", []):
        what = f"{rate['problem'].replace('_', ' ')}, "
        if rate["expected"] is None:
            least = rate["least_error"]
            found.append(_at_most(f"{what}{rate['kind']}: least error", SPECTRAL_ERROR, least))
        else:
            asked = f"{rate['expected']} ± {SLOPE_WITHIN:g}"
            reached = abs(rate["slope"] - rate["expected"]) <= SLOPE_WITHIN
            found.append(Target(f"{what}degree {rate['degree']}: slope in cells", asked, rate["slope"], reached))
    found += _of_frontier(record.get("frontier", {}))
    found += [_against_amen(record.get("peers", {}), problem) for problem in ("heat", "plume")]
    sweep, laser = record.get("sweep", {}), record.get("laser", {})
    seconds = sweep["median_seconds"] if sweep.get("num_samples") == NUM_QUERIES else None
    found.append(_at_most("seconds of a million queries in seven inputs", SWEEP_SECONDS, seconds))
    memory, grown = sweep.get("memory", []), None
    if len(memory) > 1:
        first, last = memory[0], memory[-1]
        peaks = [row["peak_bytes"] - row["before_bytes"] for row in (first, last)]
        grown = (peaks[1] - peaks[0]) / (last["num_samples"] - first["num_samples"])
    found.append(_at_most("bytes of memory for each further sample of a sweep", FLAT_BYTES, grown))
    error = laser.get("error", {})
    measured = error["largest_of_peak"] if error.get("num_points") == LASER_POINTS else None
    figure = f"laser, largest error at {LASER_POINTS} random points, of the peak rise"
    found.append(_at_most(figure, LASER_ERROR, measured))
    return found


def _of_frontier(frontier: Record) -> list[Target]:
    """The least error of each form within its limits, the worst of its seeds; and the slope of sums of products."""
    found = []
    for form, (error, most, seconds) in FIELDS.items():
        groups: dict[tuple[int, int], list[Record]] = {}
        for row in frontier.get("rows", []):
            if row["form"] == form:
                groups.setdefault((row["num_cells"], row["num_parameters"]), []).append(row)
        kept = [
            max(row["relative_l2"] for row in rows)
            for (_, size), rows in groups.items()
            if size <= most and (seconds is None or max(row["seconds"] for row in rows) <= seconds)
        ]
        limits = f"at most {most:,} parameters" + ("" if seconds is None else f" and {seconds:g} s")
        figure = f"plume, {form.replace('_', ' ')}: error with {limits}"
        found.append(_at_most(figure, error, min(kept, default=None)))
    slope = frontier.get("slopes", {}).get("cp")
    found.append(_at_most("plume, cp: slope of the frontier", FRONTIER_SLOPE, slope))
    return found


def _against_amen(peers: Record, problem: str) -> Target:
    """The largest ratio of our time to AMEn's, over the errors that AMEn comes down to."""
    ratios = []
    for row in peers.get("goals", []):
        seconds = row["seconds"]
        if row["problem"] == problem and "amen" in seconds:
            ours = [seconds[name] for name in OURS if name in seconds]
            ratios.append(min(ours) / seconds["amen"] if ours else None)
    missed = None in ratios
    largest = None if missed or not ratios else max(ratios)
    reached = None if not ratios else not missed and largest < 1
    return Target(f"{problem}: our time over AMEn's to the same error, at most", "< 1", largest, reached)


def _at_most(figure: str, bound: float, measured: float | None) -> Target:
    return Target(figure, f"<= {bound:g}", measured, None if measured is None else measured <= bound)
