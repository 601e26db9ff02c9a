"""Writes the model card of the study of turbulence from its record.

    python -m eval.turbulence_card --study model_cards/leviathan_turbulence/turbulence.json \
        --out model_cards/leviathan_turbulence.md [--sampling sampling.json] [--embeddings embeddings.json] \
        [--remarks remarks.md]

Every number of the card is read from the records that `python -m eval.turbulence`, `eval.sampling` and
`eval.embeddings` wrote; the pictures of all lie beside that of --study. What no record can know, why something lost and
what was tried, is in the file of --remarks.
"""

import argparse
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import embeddings as embeddings_study
from eval import sampling as sampling_study
from eval.card import MISSING, commit, value, verdict
from eval.metrics import PAPER_METRICS
from eval.scoring import shown_steps
from eval.turbulence_figures import headlines, label
from eval.turbulence_targets import (
    NAMES,
    Target,
    embedding_target,
    jacobi_target,
    last_step,
    listed,
    targets,
    targets_list,
)
from training.provenance import write_text

Record = Mapping[str, Any]

WHAT = {
    "patches": "Each patch is rolled out in isolation, as in the paper. What flows in from outside cannot be known.",
    "whole": (
        "Whole periodic fields: nothing flows in from outside. There is no arm of tokens: a whole field is one "
        "sequence of as many tokens as it has pixels."
    ),
    "halo": (
        "The prior state covers a margin around the patch, taken from the stitched field. All patches of a field take "
        "a step and are stitched again."
    ),
}
PICTURES = {"sampling": ("widths", "ensemble", "jacobi"), "embeddings": ("components", "steps", "similarity")}


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
        edge = " (edge)" * (len(values) > 1 and float(arm["best"]) in (values[0], values[-1]))
        cells = [
            name.replace("_", " "),
            f"{arm['num_parameters']:,}",
            arm["of"]["tune"].rpartition(".")[2].replace("_", " "),
            arm["best"] + edge,
            tuning,
            f"{arm['pairs']:,}",
            _loss(arm["validation"][-1]["loss"]),
            MISSING if arm["seconds"] is None else f"{arm['seconds']:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _loss(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4g}"


def commits(results: Record) -> str:
    """At which commits the arms were trained, and whether files differed from them."""
    arms: dict[str, list[str]] = {}
    for name, arm in results["arms"].items():
        changed = ", with changes not yet committed" * bool(arm["provenance"].get("changed_since_commit"))
        arms.setdefault(value(arm, "provenance.commit") + changed, []).append(name.replace("_", " "))
    return "; ".join(f"{listed(names)} at commit {at}" for at, names in arms.items())


def budget(settings: Mapping[str, Record]) -> str:
    """One budget where every arm of a setting has the same, and how much each was given where it has not."""
    pairs = [{arm["pairs"] for arm in each["arms"].values()} for each in settings.values()]
    tries = [{len(arm["tuning"]) for arm in each["arms"].values()} for each in settings.values()]
    if all(len(each) == 1 for each in (*pairs, *tries)):
        return "tuned and trained with one budget in each setting"
    return f"tuned over {_range(set().union(*tries))} values and trained on {_range(set().union(*pairs))} pairs"


def _range(values: Collection[int]) -> str:
    return " to ".join(f"{each:,}" for each in sorted({min(values), max(values)}))


def not_tuned(settings: Mapping[str, Record]) -> str:
    """What arms were given without a choice of values, as lines of Markdown."""
    rates: dict[Any, dict[str, None]] = {}  # names in order, each once
    noise: dict[Any, dict[str, None]] = {}
    pushed = []
    for setting, results in settings.items():
        for name, arm in results["arms"].items():
            of, shown = arm["of"], name.replace("_", " ")
            data, training = of["settings"]["data"], of["settings"]["training"]
            if data.get("kind") == "operators":
                noise.setdefault(data.get("input_noise", 0), {})[shown] = None
            elif of["tune"] != "training.learning_rate":
                rates.setdefault(training.get("learning_rate", MISSING), {})[shown] = None
            if data.get("pushforward"):
                pushed.append(f"{shown} ({setting})")
    what = {"the learning rate of the body of models of tokens": rates}
    what |= {"noise in the prior state of operators, in standard deviations": noise}
    lines = [
        f"- not tuned: {text}: " + "; ".join(f"{size} for {listed([*names])}" for size, names in found.items())
        for text, found in what.items()
        if found
    ]
    return "\n".join([*lines, f"- pushforward: {f'tried with {listed(pushed)} alone' if pushed else 'not tried'}"])


def _missing(found: Record) -> str:
    named = {name: listed([arm.replace("_", " ") for arm in arms]) for name, arms in found["missing"].items() if arms}
    told = "; ".join(f"{name}: {arms}" for name, arms in named.items())
    return f"The study names arms that are missing here, not trained or not rolled out yet. {told}.\n\n" if told else ""


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
        words = "; ".join(f"{word} on {listed(names)}" for word, names in told.items() if names)
        theirs = label(other, results["rows"][other])
        lines.append(f"- against {theirs}: {words}. Outside its interval on {listed(outside) or 'nothing'}.")
    return "\n".join(lines)


def _outside(difference: Record) -> bool:
    return bool(difference["outside"] and difference["outside"][-1])


def _setting(name: str, results: Record, pictures: str) -> str:
    data, step = results["data"], last_step(results)
    where = f"patch side of {results['patch_size']}" if results["windowed"] else f"field side of {data['side']}"
    *earlier, last = (
        f"After {each} step{'s' * (each > 1)}:\n\n{scores_table(results, each)}" for each in shown_steps(step)
    )
    tables = "\n\n".join([last, *(_folded(each) for each in earlier)])
    reached = targets_list(targets(name, results), "an arm or a flow is missing")
    reached = f"To be reached at the last step:\n\n{reached}\n" if reached else ""
    headline = label(results["headline"], results["rows"][results["headline"]])
    diverged = [label(row, about) for row, about in results["rows"].items() if about.get("num_diverged")]
    told = f"Rollouts that diverged, their values held at a bound: {listed(diverged)}.\n\n" if diverged else ""
    return f"""## {name.capitalize()}

{WHAT[name]} {len(data["trajectories"])} flows, {data["side"]} x {data["side"]} pixels of each; slopes are fitted over \
wavenumbers {results["slope_band"][0]} to {results["slope_band"][1]} per {where} pixels; a step is \
{data["dt"]:.3g} of time.

{arms_table(results)}

{tables}

Trained: {commits(results)}.

{told}{headline.capitalize()}, the first row of the first arm here, after {step} step{"s" * (step > 1)}:

{in_words(results)}

{reached}
![Metrics over steps]({pictures}/{name}_curves.png)

![Scores at the last step]({pictures}/{name}_scores.png)

![Spectra and densities]({pictures}/{name}_distributions.png)

![Fields]({pictures}/{name}_fields.png)

![Animation]({pictures}/{name}.gif)
"""


def _folded(table: str) -> str:
    """A table below its first line, which is all that is shown before a click."""
    title, _, rest = table.partition("\n\n")
    return f"<details><summary>{title.removesuffix(':')}</summary>\n\n{rest}\n\n</details>"


def _study(name: str, words: str, target: Target, pictures: str) -> str:
    shown = "\n\n".join(f"![{each.capitalize()}]({pictures}/{each}.png)" for each in PICTURES[name])
    reached = targets_list([target], "no such model, or no such decoding, was measured")
    return f"## {name.capitalize()}\n\n{words}\n\nTo be reached:\n\n{reached}\n\n{shown}\n\n"


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
    data = results["data"]
    counts = [arm["num_parameters"] for each in settings.values() for arm in each["arms"].values()]
    pairs = sorted({arm["pairs"] for each in settings.values() for arm in each["arms"].values()})
    tries = {len(arm["tuning"]) for each in settings.values() for arm in each["arms"].values()}
    source = "this project's own solver (`training/turbulence.py`)" if data["synthetic"] else "PDEBench's layout"
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    hardware = sorted(
        {_hardware(arm["provenance"]["hardware"]) for s in settings.values() for arm in s["arms"].values()}
    )
    studies = ""
    if sampling is not None:
        studies += _study("sampling", sampling_study.markdown(sampling), jacobi_target(sampling), pictures)
    if embeddings is not None:
        words = embeddings_study.markdown(embeddings)
        studies += _study("embeddings", words, embedding_target(embeddings), pictures)
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

Figures 5 and 6 of the paper (arXiv 2603.12244) with baselines that were {budget(settings)}:
models of tokens (`leviathan`: a separable embedding; `lookup`: a dense Transformer) beside operators (FNO, U-Net,
DeepONet, a conditional diffusion).

The tables come from a study of this size, not of the paper's:

| | |
|---|---|
| fields | {data["grid"][0]} x {data["grid"][1]}, from {source} |
| patch | {results["patch_size"]} x {results["patch_size"]} pixels |
| parameters of an arm | {min(counts):,} to {max(counts):,} |
| training pairs of an arm | {listed([f"{each:,}" for each in pairs])}, from {data["num_training_flows"]} flows |
| training steps | {found["steps"]:,}, after {found["tune_steps"]:,} with each of {_range(tries)} values of the tuned \
rate |
| seeds | one of training ({found["training_seed"]}); of rollouts that are random {listed([*map(str, made["seed"])])} |
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
{not_tuned(settings)}

{_missing(found)}{sections}
{studies}## Reproduce

```bash
make turbulence
make turbulence-card
```

Study `{value(found, "study")}`, summed up by `{value(made, "command")}`. Trained on {"; ".join(hardware)}. \
Evaluated on {value(made, "hardware.processor")}, {value(made, "hardware.cores")} cores, accelerator \
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
