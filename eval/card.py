"""Words for an evaluation: the summary on the terminal, and the model card.

    python -m eval.card --results RUN/results/results.json --training RUN/model/training.json --out CARD.md

Every number is read from these records, and one that is not there is said to be missing.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.metrics import PAPER_METRICS
from training.provenance import write_text
from training.turbulence import FlowSettings

Record = Mapping[str, Any]

MISSING = "not recorded"
CARD_METRICS = (*PAPER_METRICS, "mean_log_ratio", "nrmse", "correlation", "crps", "border_jump")


def value(record: Record | None, path: str, form: str = "{}") -> str:
    """The entry of nested dicts at a dotted path, formatted; `MISSING` where there is none."""
    entry: Any = record
    for key in path.split("."):
        entry = entry.get(key) if isinstance(entry, Mapping) else None
    return MISSING if entry is None else form.format(entry)


def verdict(results: Record, row: str, reference: str, metric: str, step: int) -> str:
    """Says whether a row scores better or worse than a reference, or like it: flow by flow, the difference may be 0."""
    difference = results["comparisons"][row][reference][metric]
    index = step - 1
    if difference["low"] is None:
        return f"one flow: no verdict on {reference}"
    if difference["low"][index] <= 0 <= difference["high"][index]:
        return f"like {reference}"
    return f"{'better' if difference['mean'][index] < 0 else 'worse'} than {reference}"


def summary_text(results: Record, training: Record | None) -> str:
    """What was trained and how it did, in plain words for the terminal, victories and defeats alike."""
    training, config, rows = training or {}, results["config"], results["rows"]
    final = (training.get("validation") or [{}])[-1]
    minutes = {"minutes": training["seconds"] / 60} if training.get("seconds") is not None else {}
    headline = next(row for row, about in rows.items() if about["kind"] == "model")
    floor, last = results["noise_floor"] or {}, results["spectra"]["steps"][-1]
    columns = [headline, "persistence", "climatology", "quantise_only"]

    def line(metric: str, step: int) -> str:
        cells = [f"{rows[row]['metrics'][metric]['mean'][step - 1]:.3g}" for row in columns]
        cells.append(f"{floor[metric][step - 1]:.3g}" if metric in floor else "-")
        words = ", ".join(verdict(results, headline, row, metric, step) for row in columns[1:3])
        name = f"{metric.replace('_', ' ')}, step {step}"
        return f"  {name:27}" + "".join(f"{cell:>15}" for cell in cells) + f"   {words}"

    header = "".join(f"{name.replace('_', ' '):>15}" for name in [*columns, "noise floor"])
    return "\n".join(
        [
            "",
            f"Trained   Leviathan of {value(results, 'model.num_parameters', '{:,}')} parameters, embedding "
            f"{value(results, 'model.embedding_type')}: steps {value(training, 'steps', '{:,}')}, "
            f"minutes {value(minutes, 'minutes', '{:.1f}')}"
            + f" (those from step {training.get('resumed_from_step')} on)"
            * bool(training.get("resumed_from_step")),
            f"          validation loss {value(final, 'loss', '{:.3f}')} nat/token; a model that looks at nothing has "
            f"{value(training, 'marginal_entropy', '{:.3f}')}",
            f"          one step ahead, earlier tokens given: nRMSE {value(final, 'nrmse', '{:.3f}')}; persistence "
            f"{value(training, 'persistence_nrmse', '{:.3f}')}",
            f"Measured  {len(config['trajectories'])} flows of the {config['split']} split, each rolled out for {last} "
            f"steps from its first state, sampling by {headline}",
            "",
            f"  {'':27}{header}   {headline} is",
            *(line(metric, step) for metric in ("nrmse", "correlation") for step in sorted({1, last})),
            *(line(metric, last) for metric in PAPER_METRICS),
            "",
            "  Best is 0, for correlation 1. The noise floor of a statistic is the score of one true flow against",
            '  another: below it a score proves nothing. "Like": the 95 % interval (Student) of the difference over',
            f"  {len(config['trajectories'])} flows holds 0.",
            f"  Jump across patch borders at step {last}: {rows[headline]['metrics']['border_jump']['mean'][-1]:.3g} "
            f"times that inside; in the truth {results['truth']['border_jump'][-1]:.3g}",
            f"  Speed of the rollout: {value(rows[headline], 'tokens_per_second', '{:,.0f}')} tokens per second",
        ]
    )


def metrics_table(results: Record, step: int) -> str:
    """A Markdown table of all rows at one step: means, and bootstrap intervals where there are any."""
    lines = [
        "| | " + " | ".join(results["metrics"][name]["label"].replace("|", "\\|") for name in CARD_METRICS) + " |",
        "|---" * (len(CARD_METRICS) + 1) + "|",
    ]
    for row, about in results["rows"].items():
        cells = []
        for name in CARD_METRICS:
            score = about["metrics"][name]
            cell = f"{score['mean'][step - 1]:.3g}"
            if score["low"]:
                cell += f" ({score['low'][step - 1]:.3g} to {score['high'][step - 1]:.3g})"
            cells.append(cell)
        lines.append(f"| {row.replace('_', ' ')} | " + " | ".join(cells) + " |")
    if results["noise_floor"]:
        floor = results["noise_floor"]
        cells = [f"{floor[name][step - 1]:.3g}" if name in floor else "" for name in CARD_METRICS]
        lines.append("| noise floor | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def model_card(
    results: Record, training: Record | None, speed: Record | None = None, heads: Record | None = None
) -> str:
    """The model card as Markdown with Hugging Face's YAML front matter; a function of the records alone."""
    config, data, model, made = (results[key] for key in ("config", "data", "model", "provenance"))
    steps = results["spectra"]["steps"]
    tables = "\n\n".join(f"After {step} step{'s' * (step > 1)}:\n\n{metrics_table(results, step)}" for step in steps)
    source = (
        "this project's own solver (`training/turbulence.py`)" if data["synthetic"] else "a file in PDEBench's layout"
    )
    explained = model.get("embedding_explained")
    share = f"{100 * sum(explained):.0f} % of" if explained else f"a share ({MISSING}) of"
    separable = model.get("embedding_type") == "separable"
    generated = " A separable network generates its token embeddings from the digits of the id." * separable
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
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

# Leviathan for two-dimensional turbulence

<!-- Written by `python -m eval.card` from results.json and training.json. Edit eval/card.py, not this file. -->

A Prefix-LM Transformer that reads the vorticity of a patch of a flow as tokens and writes the next state token by token
(arXiv 2603.12244).{generated}

| | |
|---|---|
| parameters | {value(model, "num_parameters", "{:,}")} |
| embedding | {value(model, "embedding_type")} |
| vocabulary | {value(model, "vocab_size", "{:,}")} levels of vorticity |
| patch | {value(model, "patch_size")} x {value(model, "patch_size")} pixels, a token each |

## Use

For research on sequence models of flows: next states, ensembles of them, and their statistics.

```python
import leviathan
from transformers import AutoFeatureExtractor, AutoModelForCausalLM

path = "{config["model"]}"
tokenizer = AutoFeatureExtractor.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
fields = leviathan.rollout(model, tokenizer, vorticity, num_steps=20)  # (B, H, W) -> (B, 20, H, W)
```

## Limits

- It continues flows like those that it was trained on: same equation, grid, unit and time between states. It is no
  solver: nothing conserves mass, energy or enstrophy but what was learned.
- Each patch is a stream of its own that sees nothing of its neighbours. What flows in from outside within a step cannot
  be known, and patches need not fit together; the last column of the tables measures it.
- Values outside the quantiser's range are clipped: here a fraction {value(results, "clipped.fraction", "{:.2g}")} \
of the true ones.
- Intervals in the tables are bootstraps over flows ({len(config["trajectories"])} of them); those from few flows are \
too narrow.

## Data

| | |
|---|---|
| source | {source} |
| file | `{config["data"]}` |
| flows | {value(data, "num_trajectories")}, on a grid of {data["grid"][0]} x {data["grid"][1]} |
| time from a state to the next | {value(data, "dt", "{:.3g}")}, in which the flow moves by \
{value(data, "pixels_per_step", "{:.2g}")} pixels on average |
| split by flow | fractions {value(training, "split.fractions")}, seed {value(training, "split.seed")} |
| evaluated | {config["split"]} split, {len(config["trajectories"])} flows |

## Training

{_training_section(training)}

## Metrics

Free rollout from one true state; means over flows with 95 % bootstrap intervals. Definitions: `eval/metrics.py`; slopes
are fitted over wavenumbers {results["slope_band"][0]} to {results["slope_band"][1]}.

- persistence: nothing moves
- climatology: a training flow at the same time
- quantise only: the truth through the tokenizer and back
- noise floor, of statistics: one true flow against another; below it a score proves nothing
- CRPS: of the ensemble of {_members(results)}; of one member it is the mean absolute error

{tables}

Rollout: {_speeds(results)}. Three principal components hold {share} the variance of the vocabulary's embeddings.
{_heads_section(heads)}{_speed_section(speed)}
## Reproduce

```bash
{_data_command(config, data)}{value(training, "provenance.command")}
{value(made, "command")}
```

Evaluated on {value(made, "hardware.processor")}, {value(made, "hardware.cores")} cores, accelerator \
{made["hardware"].get("accelerator") or "none"}; {versions}; commit {commit(made)}; {value(made, "date")}.
"""


def _training_section(training: Record | None) -> str:
    validation = ((training or {}).get("validation") or [{}])[-1]
    entries = {
        "steps": value(training, "steps", "{:,}"),
        "tokens per step": value(training, "tokens_per_step", "{:,}"),
        "seconds, without evaluation": value(training, "seconds", "{:,.0f}"),
        "of them from step": value(training, "resumed_from_step", "{:,}"),
        "tokens per second": value(training, "tokens_per_second", "{:,.0f}"),
        "seed": value(training, "seed"),
        "validation loss [nat/token]": value(validation, "loss", "{:.3f}"),
        "marginal entropy [nat/token]": value(training, "marginal_entropy", "{:.3f}"),
        "teacher-forced nRMSE": value(validation, "nrmse", "{:.3f}"),
        "nRMSE of persistence, same pairs": value(training, "persistence_nrmse", "{:.3f}"),
        "hardware": value(training, "provenance.hardware.processor"),
        "commit": commit((training or {}).get("provenance")),
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {entry} |" for name, entry in entries.items())


def _heads_section(heads: Record | None) -> str:
    if heads is None:
        return ""
    rows = [
        f"| {arm} | {each['num_parameters']:,} | {each['best']} | {with_spread(each['loss'], '.3f')} "
        f"| {with_spread(each['nrmse'], '.3f')} |"
        for arm, each in heads["arms"].items()
    ]
    first = next(iter(heads["arms"].values()))["runs"]
    flags = dict(zip(heads["flags"][::2], heads["flags"][1::2], strict=True))
    levels = f"{2 ** int(bits):,}" if (bits := flags.get("--tokenizer.num_bits")) else MISSING
    return f"""
## Heads

Another model than the one above: of the same body, with a vocabulary of {levels} levels, whose head is dense or goes by
digits. {first[0]["steps"]:,} steps each; every head with the same learning rates to choose from, then the same
{len(first)} seeds (mean ± standard deviation). Marginal entropy \
{value(heads, "references.marginal_entropy", "{:.3f}")} nat, persistence nRMSE \
{value(heads, "references.persistence_nrmse", "{:.3f}")}. A head whose loss is above the marginal entropy
has learned nothing from its input yet: this compares how soon heads learn, not how well in the end.

| head | parameters | learning rate | validation loss [nat/token] | teacher-forced nRMSE |
|---|---|---|---|---|
{chr(10).join(rows)}

`{value(heads, "provenance.command")}`, commit {commit(heads["provenance"])}.
"""


def with_spread(score: Record, form: str) -> str:
    """Mean ± standard deviation."""
    return f"{score['mean']:{form}} ± {score['standard_deviation']:{form}}"


def _speed_section(speed: Record | None) -> str:
    if speed is None:
        return ""
    rows = []
    for name, found in speed["sections"].items():
        for figure in found.get("figures", []):
            unit = "seconds" if "seconds" in figure else "mebibytes"
            first, second = (f"{each} {figure[unit][each]['median']:.3g}" for each in figure["ratio_of"])
            low, high = figure["ratio_quartiles"]
            rows.append(
                f"| {name}: {figure['what']} | {first}, {second} {'s' if unit == 'seconds' else 'MiB'} "
                f"| {figure['ratio']:.4g} ({low:.4g} to {high:.4g}) | {_target(figure)} |"
            )
    missing = [f"- {name}: {found['not_run']}" for name, found in speed["sections"].items() if "not_run" in found]
    where = f"{speed['device']}, {speed['dtype']}, {value(speed, 'provenance.hardware.threads')} threads"
    return f"""
## Speed

Of the code, not of this model: each fast path beside its plain twin, medians in one run ({where}); the quartiles are
those of the ratio over repeats. Targets that name another device say nothing here.

| what | compared | ratio (quartiles) | target |
|---|---|---|---|
{chr(10).join(rows)}
{chr(10).join(["", *missing, ""]) if missing else ""}
`{value(speed, "provenance.command")}`, commit {commit(speed["provenance"])}.
"""


def _target(figure: Record) -> str:
    target = figure["target"]
    if target is None:
        return ""
    limit = f"at least {target['at_least']:g}" if "at_least" in target else f"at most {target['at_most']:g}"
    told = {True: "reached", False: "not reached", None: f"on {target.get('on', 'full sizes')}"}
    return f"{limit}: {told[figure['reached']]}"


def commit(made: Record | None) -> str:
    """The commit of a record's provenance, and whether files differed from it."""
    return value(made, "commit") + " with uncommitted changes" * bool(made and made.get("changed_since_commit"))


def _members(results: Record) -> str:
    rows = {row: about for row, about in results["rows"].items() if about["kind"] == "model"}
    return ", ".join(f"{len(about['seeds'])} ({row})" for row, about in rows.items())


def _data_command(config: Record, data: Record) -> str:
    """The command that makes the data, if this project's solver made it: its settings are the file's attributes."""
    if not data["synthetic"]:
        return ""
    attributes = data.get("attributes", {})
    flags = [
        f" --{field.name.replace('_', '-')} {attributes[field.name]}"
        for field in dataclasses.fields(FlowSettings)
        if field.name in attributes and attributes[field.name] != field.default
    ]
    return f"python -m training.turbulence --out {config['data']}{''.join(flags)}\n"


def _speeds(results: Record) -> str:
    rows = {row: about for row, about in results["rows"].items() if about["kind"] == "model"}
    return ", ".join(f"{row} {value(about, 'tokens_per_second', '{:,.0f}')} tokens/s" for row, about in rows.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="results.json of eval.rollout")
    parser.add_argument("--training", type=Path, help="training.json of training.train")
    parser.add_argument("--speed", type=Path, help="JSON of eval.speed")
    parser.add_argument("--heads", type=Path, help="study.json of eval.study on model.output_head")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args(arguments)
    try:
        records = [
            json.loads(path.read_text(encoding="utf-8")) if path else None
            for path in (args.results, args.training, args.speed, args.heads)
        ]
        card = model_card(*records)
        write_text(args.out, card)
    except KeyError as error:
        raise SystemExit(
            f"error: {args.results} has no entry {error}; write it with `python -m eval.rollout`"
        ) from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
