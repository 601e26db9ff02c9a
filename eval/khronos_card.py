"""Writes the model card of KHRONOS, and its pictures, from the records of its benchmark and of Inconel 718.

    python -m eval.khronos_card --study model_cards/khronos/khronos.json --inconel model_cards/khronos/inconel.json \
        --inversion model_cards/khronos/inversion.safetensors --out model_cards/khronos.md [--remarks remarks.md]

Every number is read from what `python -m eval.khronos` and `python -m training.khronos_inconel` wrote, and what won and
lost is found by comparing their rows. The pictures lie beside --study. What no record can know is in --remarks.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from eval.card import MISSING, commit, value, with_spread
from eval.khronos import PARTS, targets
from eval.khronos_figures import OURS, PROBLEMS, SEARCHES, by_dataset, draw_all, error, error_name, error_spread, named
from eval.khronos_words import (
    SPLITS,
    capital,
    coverage_words,
    inconel_words,
    inversion_words,
    of_method,
    poisson_words,
    speed_words,
    tabular_words,
)
from eval.tabular import POINTS_TO_TIME
from eval.turbulence_targets import listed
from training.provenance import write_text

Record = Mapping[str, Any]

TOLD = {True: "reached", False: "**not reached**", None: "not measured"}


def targets_table(study: Record, inconel: Record) -> str:
    """The figures asked for beside those measured; those of Inconel 718 follow from its own record."""
    rows = [
        (each["figure"], each["asked"], _number(each["measured"]), TOLD[each["reached"]]) for each in study["targets"]
    ]
    for name, about in inconel["properties"].items():
        count, limit = of_method(about["methods"], OURS)["num_parameters"], about["published_parameters"]
        what = f"Inconel 718, {named(name)}"
        if limit is not None:
            rows.append((f"{what}: parameters", f"<= {limit:,}", f"{count:,}", TOLD[count <= limit]))
        for verdict in about["verdicts"]:
            asked = f"at most a standard error below the best rival ({named(verdict['rival'])})"
            measured = f"{verdict['difference']:+.3f} ± {verdict['standard_error']:.3f}"
            told = TOLD[verdict["within_one_standard_error"]]
            rows.append((f"{what}: R², {SPLITS[verdict['splits']]}", asked, measured, told))
    # Of a search for solutions, not for the best of them.
    inversions = [row for row in inconel["inversions"] if row["search"] != "prior"]
    for each in targets({"inversion": {"rows": inversions}}):
        if each.measured is not None:
            rows.append((f"Inconel 718: {each.figure}", each.asked, _number(each.measured), TOLD[each.reached]))
    return _table(("figure", "asked", "measured", ""), rows)


def poisson_table(rows: Sequence[Record], problem: str) -> str:
    """Squared L2 error of each method and degree at each size, the least in bold, and seconds at the largest."""
    rows = [row for row in rows if row["problem"] == problem and row["degree"] is not None]
    sizes = sorted({row["size"] for row in rows})
    lines: dict[tuple[str, int], dict[int, Record]] = {}
    for row in rows:
        lines.setdefault((row["method"], row["degree"]), {})[row["size"]] = row
    bold = {size: _best(each[size]["squared_l2_error"] for each in lines.values() if size in each) for size in sizes}

    def cell(row: Record | None, size: int) -> str:
        if row is None:
            return ""
        if row["squared_l2_error"] is None:
            return "diverged"
        count = "" if row["num_parameters"] == size else f" ({row['num_parameters']:,})"
        return _bold(f"{row['squared_l2_error']:.1e}", row["squared_l2_error"] == bold[size]) + count

    written = []
    for (method, degree), by_size in lines.items():
        largest = by_size[max(by_size)]
        cells = [cell(by_size.get(size), size) for size in sizes]
        written.append([named(method), degree, *cells, largest["rank"] or "", f"{largest['seconds']:.2g}"])
    titles = ["", "degree", *(f"{size:,}" for size in sizes), "rank", "seconds"]
    return _table(titles, written)


def tabular_table(rows: Sequence[Record]) -> str:
    """Test error, size and times of each method on each set: means and standard deviations over seeds."""
    written = []
    for name, methods in by_dataset(rows).items():
        best = _best(error(row["mean"]) for row in methods)
        for row in methods:
            mean, wrong = row["mean"], error(row["mean"])
            r2 = f"{mean['r2']:.3f}" if "r2" in mean else ""
            written.append(
                [
                    f"{named(name)}, {error_name(row)}" if row is methods[0] else "",
                    named(row["method"]),
                    _bold(f"{wrong:.4g}", wrong == best) + f" ± {error_spread(row):.2g}",
                    r2,
                    f"{mean['num_parameters']:,.0f}",
                    *(f"{mean[f'{task}_seconds']:.2g}" for task in ("tune", "fit", "predict")),
                ]
            )
    predicted = f"predict {POINTS_TO_TIME:,} points [s]"
    return _table(["data set", "", "test error", "R²", "parameters", "tune [s]", "fit [s]", predicted], written)


def inconel_table(about: Record) -> str:
    """Coefficients of determination of all methods for a property, the best of each kind of splits in bold."""
    columns: dict[str, Callable[[Record], float]] = {
        "cross-validation when tuned": lambda row: row["tuning_r2"],
        "fixed split": lambda row: row["fixed_r2"],
        "repeated splits": lambda row: row["repeated"]["mean_r2"],
        "each wall left out": lambda row: row["leave_one_wall_out"]["r2"],
    }
    best = {title: max(map(read, about["methods"])) for title, read in columns.items()}
    written = []
    for row in about["methods"]:
        cells = {title: _bold(f"{read(row):.3f}", read(row) == best[title]) for title, read in columns.items()}
        cells["repeated splits"] += f" ± {row['repeated']['standard_deviation']:.3f}"
        written.append(
            [
                named(row["method"]),
                f"{row['num_parameters']:,}",
                *cells.values(),
                row["repeated"]["num_repeats"],
                f"{row['seconds']:,.0f}",
            ]
        )
    count = "" if about["published_parameters"] is None else f"{about['published_parameters']:,}"
    written.append(["published, one split", count, "", f"{about['published_r2']:.2f}", "", "", "", ""])
    return _table(["", "parameters", *columns, "repeats", "seconds"], written)


def inversion_table(study: Record, inconel: Record) -> str:
    """Solutions and times of all inversions."""
    written = [
        [
            f"{named(row['function'])}, {row['num_inputs']} inputs",
            row["num_starts"],
            f"{row['num_solutions']:g} (at least {row['fewest_solutions']})",
            row["num_failed"],
            f"{row['milliseconds']:.1f}",
            _number(row["largest_residual"]),
            _number(row["worst_residual"]),
        ]
        for row in study["inversion"]["rows"]
    ]
    for row in inconel["inversions"]:
        unit = inconel["properties"][row["property"]]["unit"]
        written.append(
            [
                f"{named(row['property'])} of {row['target']:.1f} {unit}, {SEARCHES[row['search']][1]}",
                row["num_starts"],
                row["num_solutions"],
                row["num_unsolved"],
                f"{row['milliseconds']:.1f}",
                _number(row.get("largest_residual")),
                _number(row["worst_residual"]),
            ]
        )
    titles = ["", "starts", "distinct solutions", "points not converged", "median time [ms]"]
    titles += ["largest residual of solutions", "of all points"]
    return _table(titles, written)


def coverage_table(coverage: Record) -> str:
    """Shares of new observations within their intervals."""
    rows = coverage["rows"]
    shares = [f"{100 * row['mean']:.1f} ± {100 * row['standard_deviation']:.1f} %" for row in rows]
    return _table(["asked", *(f"{100 * row['level']:g} %" for row in rows)], [["within", *shares]])


def made_table(study: Record, inconel: Record) -> str:
    """Command, commit and time of each part, and on what it ran."""
    rows: list[Sequence[str]] = []
    stacks: dict[str, list[str]] = {}
    for name, part in ({name: study[name] for name in PARTS} | {"Inconel 718": inconel}).items():
        by = part["provenance"]
        seconds, seed = value(part, "seconds", "{:,.0f}"), value(by, "seed")
        rows.append((name, f"`{value(by, 'command')}`", commit(by), value(by, "date"), seconds, seed))
        versions = ", ".join(f"{package} {version}" for package, version in by["versions"].items())
        hardware = f"{value(by, 'hardware.processor')}, {value(by, 'hardware.cores')} cores, "
        hardware += f"{value(by, 'hardware.threads')} thread(s) of torch; {versions}"
        stacks.setdefault(hardware, []).append(name)
    table = _table(("part", "command", "commit", "date", "seconds", "seed"), rows)
    return f"{table}\n\n{_listed_lines(f'{listed(names)}: {stack}' for stack, names in stacks.items())}"


def khronos_card(study: Record, inconel: Record, pictures: str, remarks: str = "") -> str:
    """The card as Markdown with Hugging Face's YAML front matter; a function of the records and remarks alone."""
    poisson, tables, coverage = study["poisson"]["rows"], study["tabular"]["rows"], study["coverage"]
    problems = list(dict.fromkeys(row["problem"] for row in poisson))
    stands = [words for problem in problems for words in poisson_words(poisson, problem)]
    stands += [*tabular_words(tables), *inconel_words(inconel), *coverage_words(coverage)]
    counts = {name: of_method(each["methods"], OURS)["num_parameters"] for name, each in inconel["properties"].items()}
    sizes = listed([f"{count:,} ({named(name)})" for name, count in counts.items()])
    runs = next((row["runs"] for row in tables if row["runs"]), ())
    candidates = listed(sorted({f"{row['num_candidates']:,}" for row in tables if row["num_candidates"]}))
    solved = "\n\n".join(
        f"{capital(PROBLEMS.get(problem, problem))}:\n\n{poisson_table(poisson, problem)}" for problem in problems
    )
    properties = "\n\n".join(
        f"{capital(named(name))}; KHRONOS, MLP and KAN have at most {about['num_parameters']:,} parameters:\n\n"
        f"{inconel_table(about)}"
        for name, about in inconel["properties"].items()
    )
    trial = "**A trial at sizes too small to say anything.**\n\n" if study["quick"] else ""
    prose = f"{remarks.strip()}\n\n" if remarks else ""
    return f"""---
library_name: transformers
license: apache-2.0
pipeline_tag: tabular-regression
tags:
  - khronos
  - separable-neural-architecture
  - tabular-regression
  - inverse-problems
---

# KHRONOS

<!-- Written by `python -m eval.khronos_card` from khronos.json and inconel.json. Edit eval/khronos_card.py, not this
file. -->

{trial}A function of many inputs as a sum of products of functions of one input, each of them a spline:

$$f(x) = \\sum_{{j=1}}^{{r}} \\prod_{{i=1}}^{{d}} \\psi_i^{{(j)}}(x_i)$$

Each factor ψ is a combination of B-splines on uniform cells with ghost cells at the ends, so that it has as many
parameters as cells and degree together. Every output has components of its own, and the result is in the units of y.
It is fitted by alternating least squares with exact block solves; gradient and Hessian have closed forms, by which it
is inverted (arXiv 2505.13315; arXiv 2603.12244). Its models of Inconel 718 below have {sizes} parameters.

## Use

```python
from leviathan import KhronosConfig, KhronosModel

model = KhronosModel(KhronosConfig.for_data(x, rank=4))
model.fit(x, y)
model.predict(x)
found = model.invert(target=y.mean())
model.save_pretrained("runs/khronos")
```

`leviathan.integrations.sklearn` has `KhronosRegressor` and `KhronosClassifier`.

## Intended use and limits

- For smooth functions of a few to some dozens of inputs in a box, where a small model, exact derivatives or an inverse
  are wanted. Not for pictures, text, or inputs without an order.
- A point outside the box is an error, or is continued linearly where that is asked for.
- A function that is far from a sum of few products needs a large rank; the turned Poisson problem below is one.
- Intervals assume normal noise of one size, and a posterior that is normal around the fit.
- An inverse is of the model, not of nature: it is as good as the prediction there.

## Figures asked and measured

{targets_table(study, inconel)}

The bound on the time of an inversion is not held against the search for the most probable solution of Inconel 718, \
whose time is under Inversion.

## Poisson problems

Squared L2 error by the number of parameters, their actual number in brackets where it differs, the least in bold; rank
and seconds are those of the largest size.

{solved}

{_notes(poisson, "method")}![Error against parameters]({pictures}/poisson.png)

## Tables

Each method was tuned with {candidates} candidates of its space on the training part alone. Means ± standard \
deviations over {len(runs)} seeds ({listed([str(run["seed"]) for run in runs])}); the best of each set in bold.
Parameters leave out principal components (of digits) and the scales of inputs, for all methods alike.

{tabular_table(tables)}

{_notes(tables, "dataset")}![Error against parameters]({pictures}/tabular.png)

## Inconel 718

{inconel["num_points"]} points of {len(inconel["walls"])} walls; inputs are principal components of the \
{inconel["features"].replace("+", " and ")}, fitted inside each fold. Coefficients of determination, ± standard \
deviations over splits; each method was tuned with {inconel["num_candidates"]} candidates on {inconel["num_folds"]} \
folds of the training points of the fixed split; the best in bold.

{properties}

{_listed_lines(inconel["notes"])}

![Predictions against the truth]({pictures}/parity.png)

## Inversion

{inversion_table(study, inconel)}

{_listed_lines(inversion_words(inconel))}

![Envelopes and scalograms]({pictures}/inversion.png)

## Intervals

{coverage["dataset"].capitalize()}, {coverage["num_train"]:,} training points, {coverage["num_parameters"]:,} \
parameters, test RMSE {with_spread(coverage["rmse"], ".3f")}:

{coverage_table(coverage)}

![Slices of a fit]({pictures}/fit.png)

## Speed

{_listed_lines(speed_words(study["speed"]))}

![Convergence]({pictures}/convergence.png)

## Where it stands

Found by comparing the rows above. On tables a verdict holds on every seed; in brackets is how many times the error of
KHRONOS the other method has.

{_listed_lines(stands)}

{prose}## How it was measured

{made_table(study, inconel)}

Ratios of times are within one run. Tables have the seeds named there.
"""


def _best(values: Iterable[float | None]) -> float | None:
    return min((each for each in values if each is not None), default=None)


def _bold(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def _number(measured: float | None) -> str:
    return MISSING if measured is None else f"{measured:.3g}"


def _notes(rows: Sequence[Record], key: str) -> str:
    """What rows note beside their numbers, each once, with the names that it belongs to; empty if there is nothing."""
    notes: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["note"]:
            notes.setdefault(row["note"], {})[named(row[key])] = None
    lines = _listed_lines(f"{listed([*names])}: {note}" for note, names in notes.items())
    return f"{lines}\n\n" if lines else ""


def _listed_lines(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(titles: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, required=True, help="khronos.json of eval.khronos")
    parser.add_argument("--inconel", type=Path, required=True, help="inconel.json of training.khronos_inconel")
    parser.add_argument("--inversion", type=Path, required=True, help="inversion.safetensors of the same")
    parser.add_argument("--remarks", type=Path, help="Markdown: why it wins or loses, and what was tried")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args(arguments)
    try:
        study, inconel = (json.loads(path.read_text(encoding="utf-8")) for path in (args.study, args.inconel))
        remarks = args.remarks.read_text(encoding="utf-8") if args.remarks else ""
        pictures = Path(os.path.relpath(args.study.parent, args.out.parent))  # links start from the card
        text = khronos_card(study, inconel, pictures.as_posix(), remarks)
        draw_all(args.study.parent, study, inconel, load_file(args.inversion))
        write_text(args.out, text)
    except KeyError as error:
        raise SystemExit(
            f"error: a record lacks {error}; write it whole with eval.khronos or training.khronos_inconel"
        ) from error
    except (ValueError, OSError, SafetensorError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
