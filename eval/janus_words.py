"""What Janus's study found, in words that follow from comparing the rows of its record."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from eval.janus_figures import HEADS, head_name, spelled
from eval.janus_targets import OURS, PUBLISHED, RIVAL, edge_of
from eval.span_words import interval
from eval.turbulence_targets import listed

Record = Mapping[str, Any]

ALIKE = 1.05  # errors whose ratio is nearer to 1 than this are not told apart in words without an interval


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are numbers; None where there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def written(value: float | None, form: str = "{:.3g}") -> str:
    """A number, or a dash where there is none; minus signs are typographic."""
    return "–" if value is None else form.format(value).replace("-", "−")


def percent(value: float | None) -> str:
    """A share or a relative error in three digits."""
    return "–" if value is None else f"{100 * value:.3g} %".replace("-", "−")


def heads_of(rows: Sequence[Record]) -> list[str]:
    """The heads of some rows, ours first."""
    found = dict.fromkeys(row["head"] for row in rows)
    return [head for head in HEADS if head in found] + [head for head in found if head not in HEADS]


def by_seed(rows: Sequence[Record], pick: Callable[[Record], float | None]) -> dict[int, float]:
    """Means by seed; a seed without numbers is left out."""
    groups: dict[int, list[float | None]] = {}
    for row in rows:
        groups.setdefault(row["seed"], []).append(pick(row))
    means = {seed: mean(values) for seed, values in groups.items()}
    return {seed: value for seed, value in means.items() if value is not None}


def spread(values: Sequence[float | None], form: Callable[[float], str] = written) -> str:
    """A mean over seeds, and from where to where they are."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    middle = form(sum(known) / len(known))
    low, high = form(min(known)), form(max(known))
    return middle if low == high else f"{middle} ({low} to {high})"


def parameter_words(rows: Sequence[Record]) -> list[str]:
    """What differs between the heads, by the record's own counts."""
    sizes = {
        head: sorted({row["num_head_parameters"] for row in rows if row["head"] == head}) for head in heads_of(rows)
    }
    told = listed([f"the {head_name(head)} has {listed([f'{n:,}' for n in size])}" for head, size in sizes.items()])
    words = [f"Parameters of the heads: {told}."]
    if OURS in sizes and RIVAL in sizes:
        ratio = sizes[OURS][0] / sizes[RIVAL][0]
        if not 0.99 <= ratio <= 1.01:
            words.append(f"The heads are not of equal size: {ratio:.3g} times as many in the {head_name(OURS)}.")
        seeds = [{row["seed"] for row in rows if row["head"] == head} for head in (OURS, RIVAL)]
        if seeds[0] != seeds[1]:
            words.append("The heads were not trained with the same seeds.")
    return words


def tuning_words(part: Record) -> list[str]:
    """Whether heads were treated alike, where the record tells."""
    tuned = part.get("tuned_for_each_head")
    if tuned is None:
        return []
    return [f"Tuned for each head on its own: {listed(tuned)}." if tuned else "No setting is one head's own."]


def forward_words(rows: Sequence[Record]) -> list[str]:
    """For each property, which head predicts held-out cells better, where every seed of one beats all of the other."""
    told: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in rows for name in row["test"]["r2"]):
        values = [[row["test"]["r2"].get(name) for row in rows if row["head"] == head] for head in (OURS, RIVAL)]
        if not all(values) or any(None in each for each in values):
            continue
        ours, others = values
        if min(ours) > max(others):
            told.setdefault(f"the {head_name(OURS)} is ahead in all seeds", []).append(spelled(name))
        elif min(others) > max(ours):
            told.setdefault(f"the {head_name(RIVAL)} is ahead in all seeds", []).append(spelled(name))
        else:
            told.setdefault("seeds of both heads overlap", []).append(spelled(name))
    return [
        "R² on held-out cells: " + "; ".join(f"{words} for {listed(names)}" for words, names in told.items()) + "."
    ] * bool(told)


def ratio_words(part: Record) -> list[str]:
    """The advantage of the separable head or the lack of it, by intervals."""
    words = []
    for key, what in (("ratio", "the best candidate"), ("ratio_candidates", "the mean of the candidates")):
        ratio = part.get(key) or {}
        if ratio.get("value") is None:
            continue
        text = f"Checked error of {what}, MLP head over separable head: {interval(ratio)}"
        text += f", {_verdict(ratio)}"
        if ratio.get("num_pairs"):
            text += f"; with the separable head it is smaller in {ratio['num_wins']} of {ratio['num_pairs']} pairs"
        words.append(text + ".")
    if words:
        least, most = PUBLISHED["ratio"]
        words.append(
            f"Published: {least:g} to {most:g} over design points (better by {100 * (least - 1):.0f} to "
            f"{100 * (most - 1):.0f} %), on other cells."
        )
    return words


def hallucination_words(rows: Sequence[Record]) -> list[str]:
    """By head, how much larger the error is that physics finds than the one that the predictor believes in."""
    words = []
    for head in heads_of(rows):
        found = [row for row in rows if row["head"] == head]
        predicted, checked, gap = (
            mean(row[key] for row in found) for key in ("predicted_error", "checked_error", "gap")
        )
        if None in (predicted, checked):
            continue
        text = f"{head_name(head).capitalize().replace('Mlp', 'MLP')}: the best candidate is predicted to be off by "
        text += f"{percent(predicted)} and is off by {percent(checked)}"
        if predicted > 0 and checked > ALIKE * predicted:
            text += f", {checked / predicted:.3g} times as much"
        text += "" if gap is None else f"; predicted and checked C1111 differ by {percent(gap)} on average"
        lost = sum(row["mean_checked_error"] is None for row in found)
        text += f"; {lost} of {len(found)} inversions have no sound candidate" * bool(lost)
        words.append(text + ".")
    return words


def reach_words(rows: Sequence[Record]) -> list[str]:
    """Inversions without a candidate within the tolerance, and candidates that were rejected."""
    missed = sum(not row["reachable"] for row in rows)
    rejected = mean(row["num_rejected"] for row in rows)
    words = ["In all inversions a candidate is near enough to its targets"]
    if missed:
        words = [f"In {missed} of {len(rows)} inversions no candidate is near enough to its targets"]
    if rejected is not None:
        words.append(f"rejected candidates of an inversion: {rejected:.3g} on average")
    return ["; ".join(words) + "."]


def ablation_words(rows: Sequence[Record]) -> list[str]:
    """What the prior and the refinement change, at one seed: no interval, so small differences are not told apart."""
    words = []
    plain = [row for row in rows if row["refine"] is None and row["checked_error"] is not None]
    free = next((row for row in plain if row["prior_weight"] == 0), None)
    for row in plain:
        if free is not None and row is not free:
            text = f"A prior of weight {row['prior_weight']:g} against none: "
            text += f"checked error {_changed(free['checked_error'], row['checked_error'])}"
            if None not in (free["gap"], row["gap"]):
                text += f", gap {_changed(free['gap'], row['gap'])}"
            words.append(text + ".")
    for row in rows:
        before = [each for each in plain if each["prior_weight"] == row["prior_weight"]]
        if row["refine"] is not None and before and row["checked_error"] is not None:
            words.append(
                f"Refinement by {row['refine']} (prior {row['prior_weight']:g}): checked error "
                f"{_changed(before[0]['checked_error'], row['checked_error'])}."
            )
    return words


def beam_words(beam: Record) -> list[str]:
    """The beam that was asked for, what it is made of, and what it took."""
    target, sets = beam["settings"]["target"], beam["sets"]
    shape = " x ".join(map(str, target["num_cells"]))
    (root, tip), (full, thin) = target["stiffness"], target["volume_fraction"]
    words = [
        f"{shape} cells, C1111 from {root:g} GPa at the root to {tip:g} at the tip, solid volume fraction from "
        f"{full:g} to {thin:g}; {beam['settings']['inversion']['num_candidates']} candidates a cell, and a column "
        "takes the best distinct ones of all of its cells.",
        "The deflection that is asked for is that of the checked stiffnesses scaled to the target C1111, so that "
        "errors of C1111 alone show in it.",
    ]
    for name, one in sets.items():
        geometry, cells, seconds = one["geometry"], one["cells"], one["seconds"]
        count = sum(1 for _ in _flat(cells["stiffness"]))
        seams = geometry["seam_mismatches"]
        text = f"{name.capitalize()}: {geometry['num_voxels']:,} voxels (cells of {edge_of(beam, one)}³), "
        text += (
            f"{'no' if seams == 0 else f'**{seams:,}**'} voxel{'s' * (seams > 1)} differ{'s' * (seams <= 1)} across "
        )
        text += f"{geometry['num_seams']} seams; {_pieces(geometry)}; {cells['num_distinct']} of {count} "
        text += f"cells are distinct; {sum(seconds.values()):.0f} s"
        if cells["num_unsound"]:
            text += f"; **{cells['num_unsound']} cells are not sound** (in pieces, or their check did not converge)"
        if one["inversion"]["num_unreachable"]:
            text += f"; {one['inversion']['num_unreachable']} cells have no candidate near enough to their targets"
        words.append(text + ".")
    if {"unrefined", "refined"} <= sets.keys():
        before, after = (sets[name]["stiffness"]["mae"] for name in ("unrefined", "refined"))
        words.append(f"Refinement by physics: mean absolute error of C1111 {_changed(before, after)}.")
    return words


def drift_words(rows: Sequence[Record]) -> list[str]:
    """By cell, how far schemes are apart on the finest common grid, and how far each moved in its last refinement."""
    words = []
    for cell in dict.fromkeys(row["cell"] for row in rows):
        curves: dict[str, dict[int, float]] = {}
        for row in rows:
            if row["cell"] == cell and row["C1111"] is not None:
                curves.setdefault(row["scheme"], {})[row["edge"]] = row["C1111"]
        parts = []
        common = sorted(set.intersection(*map(set, curves.values()))) if len(curves) > 1 else []
        if common:
            values = [curve[common[-1]] for curve in curves.values()]
            parts.append(f"at {common[-1]}³ the schemes differ by {percent(max(values) / min(values) - 1)}")
        for scheme, curve in curves.items():
            if len(curve) > 1:
                coarse, fine = sorted(curve)[-2:]
                moved = curve[fine] / curve[coarse] - 1
                parts.append(f"from {coarse}³ to {fine}³ {spelled(scheme)} moves by {percent(moved)}")
        if parts:
            words.append(f"C1111 of {spelled(cell)}: {', '.join(parts)}.")
    return words


def digit_words(part: Record) -> list[str]:
    """How many classes were inverted, by a classifier that knows nothing of the model."""
    words = []
    for row in part["rows"]:
        missed = [str(each["class"]) for each in row["classes"] if not each["best_recognised"]]
        count = len(row["classes"])
        best = f"all {count} classes"
        if missed:
            best = f"{count - len(missed)} of {count} classes (not for {listed(missed)})"
        shares = [each["recognised"] for each in row["classes"]]
        text = f"Seed {row['seed']}: the best candidate is recognised for {best}"
        if shares:
            text += f"; of all candidates {percent(mean(shares))}, least for a class {percent(min(shares))}"
        words.append(f"{text}; the model classifies {percent(row['test_accuracy'])} of held-out images.")
    accuracy = part.get("classifier_accuracy")
    if part.get("classifier"):
        known = "" if accuracy is None else f", right on {percent(accuracy)} of held-out images"
        words.append(
            f"The classifier is {_article(part['classifier'])} {part['classifier']} trained on real images{known}."
        )
    return words


def _article(name: str) -> str:
    return "an" if name[:1] in "AEFHILMNORSXaeiou" else "a"


def _verdict(ratio: Record) -> str:
    low, high = ratio["low"], ratio["high"]
    if low is None:
        return "no interval, so that nothing is shown"
    level = "" if ratio.get("level") is None else f" ({100 * ratio['level']:g} % interval)"
    if low > 1:
        return f"the separable head is better{level}"
    if high is not None and high < 1:
        return f"the separable head is **worse**{level}"
    return f"no difference is shown{level}"


def _changed(before: float, after: float) -> str:
    """From where to where an error went, and whether that says anything."""
    ends = f"from {percent(before)} to {percent(after)}"
    if before <= 0 or after <= 0:
        return ends
    factor = before / after
    if 1 / ALIKE < factor < ALIKE:
        return f"{ends}, about the same"
    return f"{ends}, {factor:.3g} times smaller" if factor > 1 else f"{ends}, {1 / factor:.3g} times **larger**"


def _pieces(geometry: Record) -> str:
    if geometry["num_components"] == 1:
        return "one piece"
    return f"**{geometry['num_components']} pieces**, {geometry['floating_voxels']:,} voxels outside of the largest"


def _flat(nested: Any) -> Iterable[float]:
    if isinstance(nested, Sequence):
        for each in nested:
            yield from _flat(each)
    else:
        yield nested
