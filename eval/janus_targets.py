"""The figures that the study of Janus was to reach, held against its record."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eval.vsna_targets import Target

Record = Mapping[str, Any]

OURS, RIVAL = "separable", "mlp"  # heads
FORWARD = ("C1111", "C1122", "C2323", "volume_fraction")
FORWARD_R2 = 0.99
PERMEABILITY_R2 = 0.9
CROSS_ENTROPY = 0.08  # of a voxel, in nats
CYCLE = 0.02
CYCLES = {
    "cycle_property": "cycle: properties after decoding and encoding, of their range",
    "cycle_latent": "cycle: latents after decoding and encoding, of their spread",
}
RATIO = 1.42
BEAM_SHAPE, NUM_CANDIDATES, BEAM_EDGE = (10, 2, 2), 16, 64
BEAM_ERROR, DEFLECTION, BEAM_SECONDS = 0.01, 0.007, 150.0
SOLVE = {"what": "whole", "property": "stiffness", "edge": 32, "contrast": 1000.0, "num_loads": 6, "num_cells": 1}
SOLVE_RESIDUAL, SOLVE_CORES, SOLVE_SECONDS = 1e-4, 2, 6.0
# arXiv 2603.12244: on L-BOM, whose cells have edges of 128 voxels; errors relative to the target.
PUBLISHED = {
    "r2": 0.99,  # more than that, of normal stiffnesses and coupling terms
    "permeability_r2": 0.82,
    "cross_entropy": 0.08,
    "cycle": 0.02,
    "ratio": (RATIO, 5.41),  # over design points: better by 42 to 441 %
    "beam": {"signed": 0.001, "mae": 0.0257, "rmse": 0.0349, "r2": 0.994},
    "relative_deflection": 0.007,
    "energy_correlation": 0.999,
    "energy_l1": 0.0177,
    "seconds": 150.0,
}


def targets(record: Record) -> list[Target]:
    """The figures to reach, held against the record; a part that is missing leaves its targets open.

    Forward figures are means over the seeds of the separable head on held-out cells. A seed without a number beside
    others that have one keeps a figure from being reached.

    The published advantage of the separable head, 42 to 441 % over design points, is read as a claim about the mean:
    it is reached where the whole interval of the ratio of mean checked errors, over seeds and targets, lies at or above
    the least published ratio. A ratio above it with an interval that reaches below does not show it.
    """
    rows = [row["test"] for row in (record.get("models") or {}).get("rows", []) if row["head"] == OURS]
    found = [_forward(rows, name, FORWARD_R2, "> {:g}") for name in FORWARD]
    found.append(_forward(rows, "permeability", PERMEABILITY_R2, ">= {:g}"))
    found += [
        _over_seeds(figure, [cycle(row, key) for row in rows if key in row], CYCLE) for key, figure in CYCLES.items()
    ]
    entropies = [row["bce"] for row in rows if "bce" in row]
    found.append(_over_seeds("reconstruction: cross-entropy of a voxel", entropies, CROSS_ENTROPY))
    found.append(_ratio((record.get("inversion") or {}).get("ratio") or {}))
    return [*found, *_of_beam(record.get("beam") or {}), _of_solve(record.get("homogenization") or {})]


def cycle(test: Record, key: str) -> float | None:
    """A cycle error of a model's test; the largest, where the record has one for each property."""
    value = test[key]
    if not isinstance(value, Mapping):
        return value
    return None if None in value.values() else max(value.values(), default=None)


def beam_sets(beam: Record) -> Iterator[tuple[str, Record]]:
    """The beams of a record whose number of cells is the published one: without refinement, and with it."""
    if tuple(beam.get("settings", {}).get("target", {}).get("num_cells", ())) == BEAM_SHAPE:
        yield from beam["sets"].items()


def edge_of(beam: Record, one: Record) -> int:
    """Voxels along an edge of a cell of one of a record's beams."""
    return one["geometry"]["shape"][0] // beam["settings"]["target"]["num_cells"][0]


def _forward(rows: Sequence[Record], name: str, bound: float, asked: str) -> Target:
    values = [row["r2"][name] for row in rows if name in row["r2"]]
    strict = asked.startswith("> ")
    return _over_seeds(f"forward: R² of {name.replace('_', ' ')}", values, bound, asked=asked, strict=strict)


def _over_seeds(
    figure: str, values: Sequence[float | None], bound: float, asked: str = "<= {:g}", strict: bool = False
) -> Target:
    """The mean over seeds against a bound, which is the largest value allowed, or the least if `asked` says so."""
    asked_for = asked.format(bound)
    known = [value for value in values if value is not None]
    if not known:
        return Target(figure, asked_for, None, None)
    upper = asked.startswith("<")
    worst = max(known) if upper else min(known)
    figure += f", mean of {len(values)} seed{'s' * (len(values) > 1)} (worst {worst:.3g})"
    if len(known) < len(values):
        figure += f", {len(values) - len(known)} of them without a number"
    mean = sum(known) / len(known)
    holds = mean <= bound if upper else mean > bound if strict else mean >= bound
    return Target(figure, asked_for, mean, holds and len(known) == len(values))


def _ratio(ratio: Record) -> Target:
    figure = "checked error of C1111, MLP head over separable head"
    asked = f"whole interval >= {RATIO:g}"
    value, low, high = (ratio.get(key) for key in ("value", "low", "high"))
    if value is None:
        return Target(figure, asked, None, None)
    least, most = PUBLISHED["ratio"]
    ends = "no interval" if low is None else f"interval {low:.3g} to {'∞' if high is None else f'{high:.3g}'}"
    figure += f" ({ends}; published {least:g} to {most:g})"
    return Target(figure, asked, value, None if low is None else low >= RATIO)


def _of_beam(beam: Record) -> list[Target]:
    sets = dict(beam_sets(beam))
    refined, plain = sets.get("refined"), sets.get("unrefined")
    error, deflection = "beam: checked C1111, MAE with refinement", "beam: deflection of the tip, with refinement"
    if plain:
        error += f" (without {plain['stiffness']['mae']:.2g}, published without {PUBLISHED['beam']['mae']:g})"
        deflection += f" (without {abs(plain['beam']['relative_deflection']):.2g})"
    measured = (
        (error, BEAM_ERROR, refined and refined["stiffness"]["mae"]),
        (deflection, DEFLECTION, refined and abs(refined["beam"]["relative_deflection"])),
    )
    found = [_at_most(*each) for each in measured]
    seams = [one["geometry"]["seam_mismatches"] for one in sets.values() if one["geometry"]["num_seams"]]
    found.append(_at_most("beam: voxels that differ across seams", 0, max(seams, default=None)))
    figure = (
        f"beam: seconds on one GPU, {BEAM_SHAPE[0] * BEAM_SHAPE[1] * BEAM_SHAPE[2]} cells of {BEAM_EDGE}³ from "
        f"{NUM_CANDIDATES} candidates each"
    )
    seconds = None
    if sets:
        last = list(sets.values())[-1]  # with refinement, if there is any: what accuracy is asked of
        took, edge = sum(last["seconds"].values()), edge_of(beam, last)
        candidates = beam["settings"]["inversion"]["num_candidates"]
        # A processor does the work where a record does not say, whatever else its machine has.
        device = str(beam.get("device", "cpu"))
        if device.startswith("cuda") and edge >= BEAM_EDGE and candidates >= NUM_CANDIDATES:
            seconds = took
        else:
            hardware = beam["provenance"]["hardware"]
            where = f"{hardware['threads']} thread(s) of the processor"
            where = hardware["accelerator"] if device.startswith("cuda") else where
            figure += f" (here cells of {edge}³ from {candidates} candidates on {where}: {took:.0f} s)"
    return [*found, _at_most(figure, BEAM_SECONDS, seconds)]


def _of_solve(part: Record) -> Target:
    """The slowest of the solves that are as asked; one that has not come down to the residual does not count as any."""
    rows = [
        row
        for row in part.get("seconds", [])
        if all(row[key] == value for key, value in SOLVE.items())
        and row["tolerance"] <= SOLVE_RESIDUAL
        and row["threads"] <= SOLVE_CORES
    ]
    figure = (
        f"homogenisation: seconds of {SOLVE['num_loads']} loads of a {SOLVE['edge']}³ cell to a residual of "
        f"{SOLVE_RESIDUAL:g}, contrast {SOLVE['contrast']:g}, on {SOLVE_CORES} cores"
    )
    found = _at_most(figure, SOLVE_SECONDS, max((row["seconds"] for row in rows), default=None))
    short = [row["residual"] for row in rows if row["residual"] is None or row["residual"] > SOLVE_RESIDUAL]
    return Target(f"{figure} (residual not reached)", found.asked, found.measured, False) if short else found


def _at_most(figure: str, bound: float, measured: float | None) -> Target:
    return Target(figure, f"<= {bound:g}", measured, None if measured is None else measured <= bound)
