"""Writes the model card of VSNA, and its pictures, from the record of its study.

    python -m eval.vsna_card --study model_cards/vsna/vsna.json --out model_cards/vsna.md [--remarks remarks.md]

Every number is read from what `python -m eval.vsna` wrote, and what won and lost is found by comparing its rows. The
slices that pictures show, and the pictures, lie beside --study. What no record can know is in --remarks.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from eval.card import commit, value
from eval.markdown import bullets, table, targets_table
from eval.turbulence_targets import listed
from eval.vsna import PARTS
from eval.vsna_figures import draw_all, named
from eval.vsna_words import (
    METHODS,
    capital,
    frontier_words,
    goal_words,
    laser_words,
    rank_words,
    speed_up_words,
    sweep_words,
)
from training.provenance import write_text

Record = Mapping[str, Any]


def rates_table(part: Record) -> str:
    """Fitted slopes in cells, and decades for each function of spectral axes."""
    rows = []
    for rate in part["rates"]:
        spectral = rate["degree"] is None
        kind = rate["kind"].capitalize() if spectral else f"splines of degree {rate['degree']}"
        slope = f"{rate['slope']:.2f}" + " decades a function" * spectral
        theory = "" if spectral else rate["theory"]
        sizes = listed([str(size) for size in rate["sizes"]])
        rows.append((named(rate["problem"]), kind, sizes, slope, theory, f"{rate['least_error']:.1e}"))
    return table(("problem", "axes", "cells or functions", "slope", "theory", "least error"), rows)


def frontier_table(part: Record) -> str:
    """All fields of the plume; of those that differ in their seed alone the mean error and the largest."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for row in part["rows"]:
        key = (row["form"], row["num_cells"], row["rank"], row["num_parameters"])
        groups.setdefault(key, []).append(row)
    rows = []
    for (form, num_cells, rank, size), fits in groups.items():
        errors = [fit["relative_l2"] for fit in fits]
        shown = f"{sum(errors) / len(errors):.2e}" + (f" (at most {max(errors):.2e})" if len(errors) > 1 else "")
        seconds = sum(fit["seconds"] for fit in fits) / len(fits)
        rows.append((form.replace("_", " "), num_cells, rank, f"{size:,}", shown, len(fits), f"{seconds:.0f}"))
    return table(("form", "cells", "rank", "parameters", "relative L2 error", "seeds", "seconds"), rows)


def peers_table(part: Record, problem: str) -> str:
    """All fields of all methods for a problem."""
    rows = []
    for row in part["rows"]:
        if row["problem"] == problem:
            size, rank = ("" if row[key] is None else f"{row[key]:,}" for key in ("num_parameters", "rank"))
            error = "" if row["relative_l2"] is None else f"{row['relative_l2']:.2e}"
            seconds = "" if row["seconds"] is None else f"{row['seconds']:.3g}"
            rows.append((METHODS[row["method"]], row["setting"], size, rank, error, seconds, row["note"]))
    return table(("", "asked", "parameters", "rank", "relative L2 error", "seconds", ""), rows)


def goals_table(part: Record) -> str:
    """Seconds of each method to each error, the fewest in bold."""
    rows = []
    for row in part["goals"]:
        best = min(row["seconds"].values())
        cells = []
        for method in METHODS:
            seconds = row["seconds"].get(method)
            text = "" if seconds is None else f"{seconds:.3g}"
            cells.append(f"**{text}**" if seconds == best else text)
        rows.append((named(row["problem"]), f"{row['goal']:g}", *cells))
    return table(("problem", "error", *METHODS.values()), rows)


def made_table(study: Record) -> str:
    """Command, commit and time of each part, and on what it ran."""
    rows: list[Sequence[str]] = []
    stacks: dict[str, list[str]] = {}
    for name in PARTS:
        by = study[name]["provenance"]
        seconds = value(study[name], "part_seconds", "{:,.0f}")
        rows.append((name, f"`{value(by, 'command')}`", commit(by), value(by, "date"), seconds, value(by, "seed")))
        versions = ", ".join(f"{package} {version}" for package, version in by["versions"].items())
        hardware = f"{value(by, 'hardware.processor')}, {value(by, 'hardware.cores')} cores, "
        hardware += f"{value(by, 'hardware.threads')} thread(s) of torch; {versions}"
        stacks.setdefault(hardware, []).append(name)
    parts = table(("part", "command", "commit", "date", "seconds", "seed"), rows)
    return f"{parts}\n\n{bullets(f'{listed(names)}: {stack}' for stack, names in stacks.items())}"


def vsna_card(study: Record, pictures: str, remarks: str = "") -> str:
    """The card as Markdown with Hugging Face's YAML front matter; a function of the record and remarks alone."""
    peers = study["peers"]
    compared = "\n\n".join(
        f"{capital(named(problem))}:\n\n{peers_table(peers, problem)}"
        for problem in dict.fromkeys(row["problem"] for row in peers["rows"])
    )
    speed_ups = [*study["speed"]["speed_ups"], *study["laser"]["speed_ups"]]
    slices = study["plume"]
    form = slices["decomposition"].replace("_", " ")
    trial = "**A trial at sizes too small to say anything.**\n\n" if study["small"] else ""
    prose = f"## Remarks\n\n{remarks.strip()}\n\n" if remarks else ""
    return f"""---
library_name: transformers
license: apache-2.0
tags:
  - vsna
  - separable-neural-architecture
  - partial-differential-equations
  - surrogate-model
---

# VSNA

<!-- Written by `python -m eval.vsna_card` from vsna.json. Edit eval/vsna_card.py, not this file. -->

{trial}A differential equation solved once over space, time and parameters, as a field that is asked anywhere:

$$u(x_1, \\dots, x_d) = \\sum_{{j=1}}^{{r}} \\prod_{{i=1}}^{{d}} \\psi_i^{{(j)}}(x_i)$$

Each factor ψ is a combination of B-splines or of spectral functions of one input. The field is such a sum of products,
one in reduced bases, or a tensor train. It minimises the squared residual of the equation over the whole box, or the
energy where the equation has one; boundary and initial data are exact up to the splines (arXiv 2603.12244).

## Use

```python
import torch
from leviathan import VsnaConfig, VsnaModel
from sna_core import Axis, Problem, Term, derivative, multiply

problem = Problem(
    axes=[Axis("x", 0, 1, num_cells=32, boundary="dirichlet"), Axis("t", 0, 1, num_cells=32), Axis("nu", 1e-3, 1e-2)],
    operator=[Term(t=derivative(1)), Term(-1.0, nu=multiply(lambda nu: nu), x=derivative(2))],
    initial={{"t": [Term(x=multiply(lambda x: torch.sin(torch.pi * x)))]}},
)
model = VsnaModel(VsnaConfig.for_problem(problem, rank=8))
report = model.solve(problem, tolerance=1e-8)
u = model(torch.tensor([[0.5, 1.0, 5e-3]]))  # x, t and nu, as many points as there are
model.save_pretrained("runs/heat")
```

## Intended use and limits

- For equations on boxes whose coefficients, sources and data are short sums of products, where the solution is wanted
  at many points or for many parameters. The solution for one set of parameters is a classical solver's work.
- A moving front raises the rank. A solve says whether the rank or the cells limit it.
- The residual is not the error. Two solves with different cells tell of that.
- A point outside the box is an error.

## Figures asked and measured

{targets_table(study)}

## Convergence

Relative L2 errors by Gauss quadrature in every cell; slopes are fitted to the sizes that are named. In
theory the slope of Galerkin's method is -(p + 1) for splines of degree p, and that of least squares of the residual, by
which the heat equation is solved, the lesser fall of that and -2 (p - 1).

{rates_table(study["convergence"])}

![Convergence]({pictures}/convergence.png)

## The plume in six inputs

Advection by a rotation of any rate and diffusion of any diffusivity, in a cube with cold walls; the exact plume is that
of `training/vsna_plume.py`. One train is solved for each number of cells. All else is fitted to it, and seconds are \
those of the solve and the fit.

{bullets(frontier_words(study["frontier"]))}

![Error against parameters]({pictures}/frontier.png)

{frontier_table(study["frontier"])}

Below, the {form} of rank {slices["rank"]}; over the parameters that are shown its largest difference from the exact \
plume is {slices["largest_error_over_parameters"]:.2g}, where the initial peak is 1.

![Slices of the plume]({pictures}/plume.png)

## Peers

Same equations, same box, one run. AMEn gets Galerkin's equations in space, time and parameters in our trial functions,
and the order of axes that ours chose. The greedy sum of products is ours, on the squared residual. Networks are trained
on the residual, with exact initial and boundary values and about as many parameters as our largest sum of products;
their error is measured at {peers["num_samples"]:,} random points.

{goals_table(peers)}

{bullets([*goal_words(peers["goals"]), *rank_words(peers["rows"])])}

![Error against time and rank]({pictures}/peers.png)

{compared}

## Speed of a query

A query is the whole field of space and time for one set of parameters. To finite elements it is a solve, which gives
values at all nodes at all steps; of the field it is its values there, in double precision, by products of matrices.
The elements' solvers are made for these boxes (`training/elements.py`).

{bullets(speed_up_words(speed_ups))}

![Error against the time of a query]({pictures}/speed.png)

## The laser in seven inputs

Heat conduction under a moving beam of variable shape (`training/laser.py`), against finite elements.

{bullets([*laser_words(study["laser"]), *sweep_words(study["sweep"])])}

![Slices of the rise]({pictures}/laser.png)

![Depth of the melt pool]({pictures}/sweep.png)

{prose}## How it was measured

{made_table(study)}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, required=True, help="vsna.json of eval.vsna")
    parser.add_argument("--remarks", type=Path, help="Markdown: what no record can know")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args(arguments)
    try:
        study = json.loads(args.study.read_text(encoding="utf-8"))
        remarks = args.remarks.read_text(encoding="utf-8") if args.remarks else ""
        pictures = Path(os.path.relpath(args.study.parent, args.out.parent))  # links start from the card
        text = vsna_card(study, pictures.as_posix(), remarks)
        draw_all(args.study.parent, study)
        write_text(args.out, text)
    except KeyError as error:
        raise SystemExit(f"error: {args.study} lacks {error}; write it whole with eval.vsna") from error
    except (ValueError, OSError, SafetensorError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
