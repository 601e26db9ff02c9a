"""Writes the model card of Janus, and its pictures, from the record of its study.

    python -m eval.janus_card --study model_cards/janus/janus.json --out model_cards/janus.md [--remarks remarks.md]

Every number is read from what `python -m eval.janus` wrote, and what won and lost is found by comparing its rows. The
pictures, their arrays, and the beam's pictures lie beside --study. What no record can know is in --remarks. A part that
the record lacks is left out of the card, and its figures are open.
"""

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from eval.card import commit, value
from eval.janus_figures import draw_all, head_name, pictures_of, spelled
from eval.janus_targets import CYCLES, PUBLISHED, cycle
from eval.janus_words import (
    ablation_words,
    beam_words,
    by_seed,
    digit_words,
    drift_words,
    forward_words,
    hallucination_words,
    heads_of,
    mean,
    parameter_words,
    percent,
    ratio_words,
    reach_words,
    spread,
    tuning_words,
    written,
)
from eval.markdown import bullets, table, targets_table
from eval.turbulence_targets import listed
from training.provenance import write_text

Record = Mapping[str, Any]

ALTERNATIVES = {
    "parity": "Predicted against homogenised properties",
    "latent": "Principal components of the latents",
    "reconstructions": "Cells and their reconstructions",
    "inversion": "Predicted and checked errors by head",
    "gallery": "Cells found for targets",
    "digits": "Images found for each class",
    "drift": "Effective properties against resolution",
    "beam": "The beam: targets, checked stiffness, errors",
    "profile": "Along the beam: targets and cells",
}
ERRORS = {
    "predicted_error": "predicted error",
    "checked_error": "checked error",
    "mean_checked_error": "mean of candidates",
    "gap": "gap",
    "mean_gap": "mean gap",
    "distance": "distance from the prior",
    "num_rejected": "rejected",
}


def forward_table(rows: Sequence[Record]) -> str:
    """R2 and relative errors on held-out cells, by property and head."""
    heads = heads_of(rows)
    lines = []
    for name in dict.fromkeys(name for row in rows for name in row["test"]["r2"]):
        line = [spelled(name)]
        for key, form in (("r2", lambda score: written(score, "{:.4f}")), ("mae_relative", percent)):
            for head in heads:
                tests = [row["test"][key] for row in rows if row["head"] == head]
                line.append(spread([test.get(name) for test in tests], form))
        lines.append(line)
    names = [head_name(head) for head in heads]
    return table(("property", *(f"R², {name}" for name in names), *(f"MAE, {name}" for name in names)), lines)


def models_table(rows: Sequence[Record]) -> str:
    """Sizes, times, reconstruction and cycle of each head."""
    lines = []
    for head in heads_of(rows):
        found = [row for row in rows if row["head"] == head]
        tests = [row["test"] for row in found]
        counts = (
            listed(sorted({f"{row[key]:,}" for row in found})) for key in ("num_head_parameters", "num_parameters")
        )
        cycles = (spread([cycle(test, key) for test in tests if key in test], percent) for key in CYCLES)
        lines.append(
            (
                head_name(head),
                len(found),
                *counts,
                spread([test["bce"] for test in tests]),
                spread([test["voxel_error"] for test in tests], percent),
                *cycles,
                spread([row["train_seconds"] for row in found], "{:,.0f}".format),
            )
        )
    titles = ("head", "seeds", "its parameters", "all parameters", "cross-entropy of a voxel", "wrong voxels")
    return table((*titles, "cycle, properties", "cycle, latents", "seconds of training"), lines)


def inversion_table(rows: Sequence[Record]) -> str:
    """By head, means over targets: the mean over seeds, and the range of seeds."""
    lines = []
    for head in heads_of(rows):
        found = [row for row in rows if row["head"] == head]
        line = [head_name(head), len({row["seed"] for row in found}), len({row["index"] for row in found})]
        for key in ERRORS:
            form = written if key in ("distance", "num_rejected") else percent
            seeds = by_seed(found, lambda row, key=key: row[key])
            line.append(spread(list(seeds.values()), form))
        lines.append(line)
    return table(("head", "seeds", "targets", *ERRORS.values()), lines)


def ablation_table(rows: Sequence[Record]) -> str:
    """Prior weights and refinement, at one seed."""
    lines = [
        (
            head_name(row["head"]),
            f"{row['prior_weight']:g}",
            row["refine"] or "none",
            percent(row["checked_error"]),
            percent(row["gap"]),
            written(row["rejected"]),
        )
        for row in rows
    ]
    return table(("head", "weight of the prior", "refinement", "checked error", "gap", "rejected"), lines)


def beam_table(beam: Record) -> str:
    """Errors of the cells and of the beam, beside the published ones."""
    lines = []
    for name, one in beam["sets"].items():
        whole, gap = one["beam"], one["cells"]["mean_gap"]
        cells = [percent(one["stiffness"][key]) for key in ("signed", "mae", "rmse", "largest")]
        lines.append(
            (
                name,
                *cells,
                f"{one['stiffness']['r2']:.4f}",
                percent(one["volume_fraction"]["largest"]),
                percent(gap),
                percent(whole["relative_deflection"]),
                f"{whole['energy_correlation']:.4f}",
                percent(whole["energy_l1"]),
            )
        )
    published = PUBLISHED["beam"]
    lines.append(
        (
            "published",
            *(percent(published[key]) for key in ("signed", "mae", "rmse")),
            "",
            f"{published['r2']:g}",
            "",
            "",
            f"within {percent(PUBLISHED['relative_deflection'])}",
            f"{PUBLISHED['energy_correlation']:g}",
            percent(PUBLISHED["energy_l1"]),
        )
    )
    titles = ("", "C1111, signed", "MAE", "RMSE", "largest", "R²", "volume fraction, largest", "gap", "deflection")
    return table((*titles, "energy, correlation", "energy, L1"), lines)


def seconds_table(rows: Sequence[Record]) -> str:
    """What homogenisations take."""
    lines = [
        (
            row["property"],
            spelled(row["cell"]),
            row["what"],
            f"{row['edge']}³",
            "–" if row["contrast"] is None else f"{row['contrast']:g}",
            row["num_loads"],
            row["num_cells"],
            f"{row['tolerance']:g}",
            row["threads"],
            f"{row['seconds']:.3g}",
            row["num_iterations"],
            written(row["residual"], "{:.1e}"),
            spelled(row["scheme"]),
        )
        for row in rows
    ]
    titles = ("property", "cell", "array", "voxels", "contrast", "loads", "cells", "tolerance", "threads", "seconds")
    return table((*titles, "iterations", "residual", "scheme"), lines)


def drift_table(rows: Sequence[Record]) -> str:
    """Effective properties by resolution and scheme."""
    lines = [
        (
            spelled(row["cell"]),
            f"{row['volume_fraction']:g}",
            spelled(row["scheme"]),
            f"{row['edge']}³",
            *(written(row[key], "{:.4f}") for key in ("C1111", "C2323")),
            written(row["permeability"], "{:.3e}"),
        )
        for row in rows
    ]
    titles = ("cell", "solid", "scheme", "voxels", "C1111 / the solid's", "C2323 / the solid's", "permeability [edge²]")
    return table(titles, lines)


def digits_table(part: Record) -> str:
    """Share of the candidates of each class that the classifier recognises, a row a seed."""
    classes = sorted({each["class"] for row in part["rows"] for each in row["classes"]})
    lines = []
    for row in part["rows"]:
        found = {each["class"]: each for each in row["classes"]}
        cells = [percent(found[i]["recognised"]) if i in found else "–" for i in classes]
        lines.append((row["seed"], percent(row["test_accuracy"]), *cells))
    return table(("seed", "test accuracy", *classes), lines)


def conductivity_table(part: Record) -> str:
    """Two-dimensional cells: forward and inverse, a row a seed."""
    lines = []
    for row in part["rows"]:
        test, found = row["test"], row["inversion"]
        r2 = ", ".join(f"{spelled(name)} {written(score, '{:.4f}')}" for name, score in test["r2"].items())
        error = ", ".join(f"{spelled(name)} {percent(each)}" for name, each in test["mae_relative"].items())
        errors = (percent(found.get(key)) for key in ("predicted_error", "checked_error", "pixel_error"))
        lines.append((row["seed"], r2, error, percent(test["voxel_error"]), found["num_targets"], *errors))
    titles = ("seed", "R²", "MAE", "wrong pixels of a reconstruction", "targets", "inversion: predicted error")
    return table((*titles, "checked error", "pixel error"), lines)


def made_table(study: Record) -> str:
    """Command, commit and time of each part, and on what it ran."""
    rows: list[Sequence[str]] = []
    stacks: dict[str, list[str]] = {}
    for name, part in study.items():
        if not isinstance(part, Mapping) or "provenance" not in part:
            continue
        by = part["provenance"]
        seconds = value(part, "part_seconds", "{:,.0f}")
        rows.append((name, f"`{value(by, 'command')}`", commit(by), value(by, "date"), seconds, value(by, "seed")))
        versions = ", ".join(f"{package} {version}" for package, version in by["versions"].items())
        hardware = f"{value(by, 'hardware.processor')}, {value(by, 'hardware.cores')} cores, "
        hardware += f"{value(by, 'hardware.threads')} thread(s) of torch"
        if accelerator := by["hardware"].get("accelerator"):
            hardware += f", {accelerator}"
        stacks.setdefault(f"{hardware}; {versions}", []).append(name)
    parts = table(("part", "command", "commit", "date", "seconds", "seed"), rows)
    return f"{parts}\n\n{bullets(f'{listed(names)}: {stack}' for stack, names in stacks.items())}"


def janus_card(study: Record, folder: str, pictures: Sequence[str] = (), remarks: str = "") -> str:
    """The card as Markdown with Hugging Face's YAML front matter; a function of its arguments alone.

    Args:
        study: The record, any part of which may be missing.
        folder: Of the pictures, as the card links to it.
        pictures: Names of those that there are, without an ending.
        remarks: Markdown.
    """
    shown = {name: f"![{ALTERNATIVES[name]}]({folder}/{name}.png)\n\n" for name in pictures}
    trial = "**A trial at sizes too small to say anything.**\n\n" if study.get("small") else ""
    prose = f"{remarks.strip()}\n\n" if remarks.strip() else ""
    return (
        f"""---
library_name: transformers
license: apache-2.0
tags:
  - janus
  - separable-neural-architecture
  - inverse-design
  - metamaterials
  - homogenization
---

# Janus

<!-- Written by `python -m eval.janus_card` from janus.json. Edit eval/janus_card.py, not this file. -->

{trial}\
Inverse design of microstructures, checked by physics: properties in, voxel cells out. An autoencoder of cells and a
head on its latent z are trained together, so that properties become separable in the latent coordinates (arXiv
2603.12244, 2512.15746):

$$y(z) = V g(z) + v_0, \\qquad g_j(z) = \\prod_{{i=1}}^{{d}} \\psi_{{ij}}(\\sigma(a_i z_i + b_i))$$

A design is found from the codes of known cells by steps to a near latent that is predicted to have the properties,
decoded, cut to the volume fraction, and homogenised: the error that is told is that of physics, not that of the head.

{shown.get("gallery", "")}## Use

```python
import leviathan  # registers every Auto class
from transformers import AutoModel

model = AutoModel.from_pretrained("runs/janus/model")
design = model.invert({{"C1111": 120.0, "volume_fraction": 0.4}}, num_candidates=16)  # GPa, share of solid
print(design.message)
print(design.predicted["C1111"][0], design.checked["C1111"][0])  # what the head says, and what physics says
cells = design.whole()  # (candidates, n, n, n) of voxels, the best first
```

## Figures asked and measured

{targets_table(study)}

Published (arXiv 2603.12244) are results on other cells, of 128³ voxels: R² > {PUBLISHED["r2"]:g} of normal stiffnesses
and coupling terms, {PUBLISHED["permeability_r2"]:g} of the permeability, a cross-entropy of \
{PUBLISHED["cross_entropy"]:g} and a cycle consistency of {percent(PUBLISHED["cycle"])}.

{"".join(_sections(study, shown))}## How it was made

{made_table(study)}

## Limits

- A checked error holds at one scheme and resolution: how far others are from it is a matter of the drift, which is
  no part of the errors.
- The predictor can be tricked: where predicted and checked values differ, believe the checked one. The best of many
  candidates is chosen by the check; a candidate that was not checked is as wrong as the means over candidates tell.
- Cells are of the kind that the model was trained on. Where no candidate comes near enough to its targets, a design
  says so, and which one comes nearest.
- Stiffnesses are in proportion to the solid's, whose value is a nominal setting.
- Intervals draw few seeds and targets, and are narrow for that.

{prose}""".rstrip()
        + "\n"
    )


def _sections(study: Record, shown: Mapping[str, str]) -> Iterator[str]:
    """Headings, words, tables and pictures of the parts that there are, each with an empty line behind it."""
    if rows := (study.get("models") or {}).get("rows"):
        sizes = {(row["num_train"], row["num_test"]) for row in rows}
        cells = listed([f"{train:,} cells to train on and {test:,} to test" for train, test in sorted(sizes)])
        words = [*parameter_words(rows), *tuning_words(study["models"]), *forward_words(rows)]
        yield (
            f"## Forward\n\nOn held-out cells; {cells}. Means over seeds, in brackets the range of seeds. MAE: of the "
            "mean value. Cross-entropies are in nats; cycle: after decoding and encoding once more, of the range of a "
            f"property in training, and of the spread of latents.\n\n{forward_table(rows)}\n\n{models_table(rows)}\n\n"
            f"{bullets(words)}\n\n"
        )
        yield from (shown.get(name, "") for name in ("parity", "latent", "reconstructions"))
    if part := study.get("inversion"):
        yield from _of_inversion(part, shown)
    if beam := study.get("beam"):
        yield f"## The beam\n\n{bullets(beam_words(beam))}\n\n{beam_table(beam)}\n\n"
        yield from (shown.get(name, "") for name in ("beam", "profile"))
    if part := study.get("homogenization"):
        yield "## Homogenisation\n\n"
        if rows := part.get("seconds"):
            yield f"Orthants: an eighth of a cell with mirror planes says all of it.\n\n{seconds_table(rows)}\n\n"
        if rows := part.get("drift"):
            words = drift_words(rows)
            yield f"{bullets(words)}\n\n" * bool(words) + f"{drift_table(rows)}\n\n{shown.get('drift', '')}"
    if part := study.get("digits"):
        yield (
            "## Digits\n\nThe same model on images of digits, with classes for properties; a share is of candidates "
            f"that another classifier takes for the class.\n\n{bullets(digit_words(part))}\n\n{digits_table(part)}\n\n"
            f"{shown.get('digits', '')}"
        )
    if part := study.get("conductivity"):
        errors = [
            mean([row["inversion"].get(key) for row in part["rows"]]) for key in ("predicted_error", "checked_error")
        ]
        yield (
            "## Conductivity in two dimensions\n\n"
            f"Inversion: predicted error {percent(errors[0])}, checked error {percent(errors[1])}, means over seeds. "
            f"Published (arXiv 2512.15746, other cells): about 1 %.\n\n{conductivity_table(part)}\n\n"
        )


def _of_inversion(part: Record, shown: Mapping[str, str]) -> Iterator[str]:
    rows = part["rows"]
    seconds = part.get("seconds") or {}
    took = listed([f"{name} {seconds[name]:.3g} s" for name in ("search", "check") if seconds.get(name) is not None])
    words = [*ratio_words(part), *reach_words(rows)]
    words += [f"Time of one model for all targets: {took}."] * bool(took)
    yield (
        f"## Inversion\n\n{len(part['targets'])} targets of C1111 and volume fraction, those of held-out cells, "
        f"{part['num_candidates']} candidates each. Errors are relative, of C1111: of the best candidate as the head "
        "predicts them and as homogenisation checks them, and the checked one over all connected candidates. The gap "
        "is that between prediction and check, of the best candidate, which the check has picked, and over all. The "
        "search shifts targets by what it sees of the head's errors, and moves codes on purpose to where prediction "
        "and target differ, so that the measure of hallucination is the gap without correction, below. In brackets the "
        "range of seeds.\n\n"
        f"{bullets(words)}\n\n{inversion_table(rows)}\n\n{shown.get('inversion', '')}"
    )
    if plain := part.get("uncorrected"):
        told = bullets([*ratio_words(plain)[:-1], *hallucination_words(plain["rows"])])
        yield (
            "### Without correction\n\nThe same targets and models, but the search ends where the head is content with "
            "a code: it does not look once more at the cell that the code is decoded to "
            f"(`num_cycles=0`).\n\n{told}\n\n{inversion_table(plain['rows'])}\n\n"
        )
    if ablation := part.get("ablation"):
        told = bullets(ablation_words(ablation))
        yield (
            "### Prior and refinement\n\nOne seed, without intervals. Behind a refinement the gap is that of a code "
            "whose target was shifted, and of a cell whose voxels may have been exchanged.\n\n"
        )
        yield f"{told}\n\n" * bool(told)
        yield f"{ablation_table(ablation)}\n\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, required=True, help="janus.json of eval.janus")
    parser.add_argument("--remarks", type=Path, help="Markdown: what no record can know")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    known = parser.parse_args(arguments)
    try:
        study = json.loads(known.study.read_text(encoding="utf-8"))
        remarks = known.remarks.read_text(encoding="utf-8") if known.remarks else ""
        folder = known.study.parent
        links = Path(os.path.relpath(folder, known.out.parent))  # they start from the card
        text = janus_card(study, links.as_posix(), pictures_of(folder, study), remarks)
        draw_all(folder, study)
        write_text(known.out, text)
    except KeyError as error:
        raise SystemExit(f"error: {known.study} lacks {error}; write it whole with eval.janus") from error
    except (ValueError, OSError, SafetensorError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {known.out}")


if __name__ == "__main__":
    main()
