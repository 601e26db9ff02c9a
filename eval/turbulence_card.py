"""Writes the model card of the study of turbulence from its record.

    python -m eval.turbulence_card --study model_cards/leviathan_turbulence/turbulence.json \
        --out model_cards/leviathan_turbulence.md [--sampling sampling.json] [--embeddings embeddings.json] \
        [--remarks remarks.md]

Every number of the card is read from the records that `python -m eval.turbulence`, `eval.sampling` and
`eval.embeddings` wrote. What no record can know, why something lost and what was tried, is in the file of --remarks.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import embeddings as embeddings_study
from eval import sampling as sampling_study
from eval.card import MISSING, commit, value, verdict
from eval.metrics import PAPER_METRICS
from eval.turbulence_figures import headlines, label
from training.provenance import write_text

Record = Mapping[str, Any]

WHAT = {
    "patches": "Each patch is rolled out in isolation, as in the paper. What flows in from outside cannot be known.",
    "whole": "Whole periodic fields: nothing flows in from outside.",
    "halo": (
        "The prior state covers a margin around the patch, taken from the stitched field. All patches of a field take "
        "a step and are stitched again."
    ),
}
NAMES = {
    "enstrophy_error": "enstrophy",
    "energy_error": "spectral energy",
    "slope_error": "spectral slope",
    "jensen_shannon": "P(ω)",
    "mean_log_ratio": "the scale-resolved spectrum",
    "crps": "CRPS",
}
OPERATORS = ("fno", "unet", "deeponet")  # the paper's
LEVEL = "lookup"  # its dense Transformer
SAME_SIZE = 0.05  # by so much the parameters of arms that targets speak of may differ


def last_step(results: Record) -> int:
    """The number of steps of the rollouts."""
    return len(results["truth"]["enstrophy"])


def scores_table(results: Record, step: int) -> str:
    """All rows at one step, with 95 % bootstrap intervals over flows, and the noise floor."""
    jumps = [] if results["windowed"] else ["border_ratio"]
    columns = [(name, step) for name in (*PAPER_METRICS, "mean_log_ratio")] + [("nrmse", 1)]
    columns += [(name, step) for name in ("crps", *jumps)]
    titles = [results["metrics"][name]["label"].replace("|", "\\|") for name, _ in columns]
    titles = [title + ", step 1" * (name == "nrmse") for title, (name, _) in zip(titles, columns, strict=True)]
    lines = [
        "| | " + " | ".join([*titles, "correlation above 0.8 [steps]"]) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for row, about in results["rows"].items():
        cells = [_cell(about["metrics"][name], at) for name, at in columns]
        lines.append(f"| {label(row, about)} | " + " | ".join([*cells, _lasting(about["decorrelation"])]) + " |")
    if floor := results["noise_floor"]:
        cells = [f"{floor[name][at - 1]:.3g}" if name in floor else "" for name, at in columns]
        lines.append("| noise floor | " + " | ".join([*cells, ""]) + " |")
    return "\n".join(lines)


def _cell(score: Record, step: int) -> str:
    cell = f"{score['mean'][step - 1]:.3g}"
    return f"{cell} ({score['low'][step - 1]:.3g} to {score['high'][step - 1]:.3g})" if score["low"] else cell


def _lasting(found: Record) -> str:
    text = f"{found['steps']:.3g}"
    text += "" if found["low"] is None else f" ({found['low']:.3g} to {found['high']:.3g})"
    text += f", t = {found['time']:.3g}"
    return text if found["share_fallen"] == 1 else f"at least {text}"


def arms_table(results: Record) -> str:
    """Sizes of the arms and what their training cost."""
    lines = [
        "| arm | parameters | tuned | best | validation losses when tuned | pairs | validation loss | seconds |",
        "|---" * 8 + "|",
    ]
    for name, arm in results["arms"].items():
        tuning = ", ".join(f"{key}: {_loss(loss)}" for key, loss in arm["tuning"].items())
        values = sorted(map(float, arm["tuning"]))
        edge = " (edge)" * (len(values) > 2 and float(arm["best"]) in (values[0], values[-1]))
        cells = [
            name.replace("_", " "),
            f"{arm['num_parameters']:,}",
            arm["of"]["tune"].rpartition(".")[2].replace("_", " "),
            arm["best"] + edge,
            tuning,
            f"{arm['pairs']:,}",
            _loss(arm["validation"][-1]["loss"]),
            f"{arm['seconds']:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _loss(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4g}"


def in_words(results: Record) -> str:
    """Where the headline's row won and lost at the last step against every other arm's, flow by flow."""
    headline, step = results["headline"], last_step(results)
    lines = []
    for other in headlines(results["rows"]):
        if other == headline:
            continue
        told: dict[str, list[str]] = {word: [] for word in ("better", "like it", "worse", "one flow, no verdict")}
        for metric, name in NAMES.items():
            said = verdict(results, headline, other, metric, step).partition(" ")[0]
            next(names for word, names in told.items() if word.startswith(said)).append(name)
        compared = results["comparisons"][headline][other]
        outside = [name for metric, name in NAMES.items() if _outside(compared[metric])]
        words = "; ".join(f"{word} on {_listed(names)}" for word, names in told.items() if names)
        theirs = label(other, results["rows"][other])
        lines.append(f"- against {theirs}: {words}. Outside its interval on {_listed(outside) or 'nothing'}.")
    return "\n".join(lines)


def _outside(difference: Record) -> bool:
    return bool(difference["outside"] and difference["outside"][-1])


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def targets(setting: str, results: Record) -> list[tuple[str, bool | None]]:
    """The figures that were to be reached in a setting, and whether they were; None where an arm is missing."""
    headline, rows, step = results["headline"], results["rows"], last_step(results)

    def score(row: str, metric: str) -> float:
        return rows[row]["metrics"][metric]["mean"][-1]

    def stands(other: str, metric: str) -> str:
        return verdict(results, headline, other, metric, step).partition(" ")[0]

    counts = {arm: each["num_parameters"] for arm, each in results["arms"].items()}
    size = counts[rows[headline]["arm"]]
    arms = {rows[row]["arm"]: row for row in headlines(rows)}
    arms = {arm: row for arm, row in arms.items() if abs(counts[arm] - size) <= SAME_SIZE * size}
    compared = results["comparisons"][headline]
    if setting == "patches":
        found = []
        for metric in PAPER_METRICS:
            operators = [arms[arm] for arm in OPERATORS if arm in arms]
            outside = all(_outside(compared[row][metric]) for row in operators)
            if metric == "enstrophy_error":
                reached = all(stands(row, metric) in ("better", "like") for row in arms.values() if row != headline)
                text = "at least level on enstrophy with every other arm of its size"
            else:
                reached = all(score(headline, metric) <= score(row, metric) for row in arms.values())
                text = f"first of all arms of its size on {NAMES[metric]}"
            text += f", outside the intervals of {_listed(OPERATORS)}"
            found.append((text, reached and outside if len(operators) == len(OPERATORS) else None))
        better = [m for m in PAPER_METRICS if LEVEL in arms and stands(arms[LEVEL], m) == "better"]
        text = f"better than the dense Transformer ({LEVEL}) on at least three of the four metrics"
        return [*found, (text, len(better) >= 3 if LEVEL in arms else None)]
    if setting == "halo":
        floor = results["noise_floor"]
        near = floor and all(score(headline, metric) <= 2 * floor[metric][-1] for metric in PAPER_METRICS)
        jump, true = score(headline, "border_jump"), results["truth"]["border_jump"][-1]
        return [
            ("within twice the noise floor on all four metrics", near),
            (
                f"jump across borders within 10 % of that inside (found {jump:.3g} times it, the truth {true:.3g})",
                abs(jump - 1) <= 0.1,
            ),
        ]
    return []


def _targets_list(setting: str, results: Record) -> str:
    told = {True: "reached", False: "not reached", None: "an arm or a flow is missing"}
    lines = [f"- {text}: {told[reached]}" for text, reached in targets(setting, results)]
    return "To be reached at the last step:\n\n" + "\n".join(lines) + "\n" if lines else ""


def _setting(name: str, results: Record, pictures: str) -> str:
    data, step = results["data"], last_step(results)
    size, steps = results["patch_size"], [each for each in (step, 5) if each <= step]
    where = f"patch side of {size}" if results["windowed"] else f"field side of {data['side']}"
    tables = "\n\n".join(
        f"After {each} step{'s' * (each > 1)}:\n\n{scores_table(results, each)}" for each in dict.fromkeys(steps)
    )
    headline = label(results["headline"], results["rows"][results["headline"]])
    diverged = [label(row, about) for row, about in results["rows"].items() if about.get("num_diverged")]
    told = f"Rollouts that diverged, their values held at a bound: {_listed(diverged)}.\n\n" if diverged else ""
    return f"""## {name.capitalize()}

{WHAT[name]} {len(data["trajectories"])} flows, {data["side"]} x {data["side"]} pixels of each; slopes are fitted over \
wavenumbers {results["slope_band"][0]} to {results["slope_band"][1]} per {where} pixels; a step is \
{data["dt"]:.3g} of time.

{arms_table(results)}

{tables}

{told}{headline.capitalize()}, after {step} step{"s" * (step > 1)}:

{in_words(results)}

{_targets_list(name, results)}
![Metrics over steps]({pictures}/{name}_curves.png)

![Scores at the last step]({pictures}/{name}_scores.png)

![Spectra and densities]({pictures}/{name}_distributions.png)

![Fields]({pictures}/{name}_fields.png)

![Animation]({pictures}/{name}.gif)
"""


def turbulence_card(
    found: Record,
    pictures: str,
    sampling: Record | None = None,
    embeddings: Record | None = None,
    remarks: str = "",
) -> str:
    """The card as Markdown with Hugging Face's YAML front matter; a function of the records and remarks alone."""
    settings, made = found["settings"], found["provenance"]
    results = next(iter(settings.values()))
    data, arms = results["data"], results["arms"]
    counts = [arm["num_parameters"] for each in settings.values() for arm in each["arms"].values()]
    pairs = sorted({arm["pairs"] for each in settings.values() for arm in each["arms"].values()})
    budgets = len(next(iter(arms.values()))["tuning"])
    source = "this project's own solver (`training/turbulence.py`)" if data["synthetic"] else "PDEBench's layout"
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    hardware = sorted(
        {_hardware(arm["provenance"]["hardware"]) for s in settings.values() for arm in s["arms"].values()}
    )
    studies = ""
    if sampling is not None:
        studies += f"## Sampling\n\n{sampling_study.markdown(sampling)}\n\n"
    if embeddings is not None:
        studies += f"## Embeddings\n\n{embeddings_study.markdown(embeddings)}\n\n"
    if remarks:
        studies += f"## Where it loses, and what was tried\n\n{remarks.strip()}\n\n"
    sections = "\n".join(_setting(name, each, pictures) for name, each in settings.items())
    return f"""---
library_name: transformers
license: apache-2.0
tags:
  - leviathan
  - separable-neural-architecture
  - turbulence
  - fluid-dynamics
  - prefix-lm
---

# Leviathan and operators on two-dimensional turbulence

<!-- Written by `python -m eval.turbulence_card` from turbulence.json. Edit eval/turbulence_card.py, not this file. -->

Figures 5 and 6 of the paper (arXiv 2603.12244) with baselines of one size that were tuned and trained with one budget:
models of tokens (`leviathan`: a separable embedding; `lookup`: a dense Transformer) beside operators (FNO, U-Net,
DeepONet, a conditional diffusion).

The tables come from a study of this size, not of the paper's:

| | |
|---|---|
| fields | {data["grid"][0]} x {data["grid"][1]}, from {source} |
| patch | {results["patch_size"]} x {results["patch_size"]} pixels |
| parameters of an arm | {min(counts):,} to {max(counts):,} |
| training pairs of an arm | {_listed([f"{each:,}" for each in pairs])}, from {data["num_training_flows"]} flows |
| training steps | {found["steps"]:,}, after {found["tune_steps"]:,} with each of {budgets} values of the tuned rate |
| seeds | one of training ({found["training_seed"]}); of rollouts that are random {_listed([*map(str, made["seed"])])} |
| time from a state to the next | {data["dt"]:.3g}, in which the flow moves by {data["pixels_per_step"]:.2g} pixels on \
average |

One seed of training: differences between arms hold the luck of their initial values. Intervals are over flows.

- scores: free rollout from one true state, means over flows and seeds with 95 % bootstrap intervals; definitions in
  `eval/metrics.py`
- persistence: nothing moves; climatology: a training flow at the same time; quantise only: the truth through the
  tokenizer and back
- noise floor, of statistics: one true flow against another; below it a score proves nothing
- CRPS: the fair form over the ensemble of seeds; of one member it is the mean absolute error
- "better", "worse": flow by flow, the 95 % interval (Student) of the difference holds no 0, else "like"; "outside its
  interval": the mean lies outside the other's bootstrap interval
- pairs: with repetition, as items were drawn at random; (edge): the least or greatest rate tried was best

{sections}
{studies}## Reproduce

```bash
{value(made, "command")}
```

Study `{value(found, "study")}`. Trained on {"; ".join(hardware)}. Evaluated on \
{value(made, "hardware.processor")}, {value(made, "hardware.cores")} cores, accelerator \
{made["hardware"].get("accelerator") or "none"}; {versions}; commit {commit(made)}; {value(made, "date")}.
"""


def _hardware(hardware: Record) -> str:
    return hardware.get("accelerator") or f"{hardware.get('processor') or MISSING}, {hardware.get('cores')} cores"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, required=True, help="turbulence.json of eval.turbulence")
    parser.add_argument("--sampling", type=Path, help="JSON of eval.sampling")
    parser.add_argument("--embeddings", type=Path, help="JSON of eval.embeddings")
    parser.add_argument("--remarks", type=Path, help="Markdown: where it loses, why, and what was tried")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args(arguments)
    try:
        found, sampling, embeddings = (
            json.loads(path.read_text(encoding="utf-8")) if path else None
            for path in (args.study, args.sampling, args.embeddings)
        )
        remarks = args.remarks.read_text(encoding="utf-8") if args.remarks else ""
        pictures = Path(os.path.relpath(args.study.parent, args.out.parent))  # links start from the card
        write_text(args.out, turbulence_card(found, pictures.as_posix(), sampling, embeddings, remarks))
    except KeyError as error:
        raise SystemExit(
            f"error: a record lacks {error}; write it with eval.turbulence, sampling or embeddings"
        ) from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
