"""Writes the model card of SPAN, and its pictures, from the record of its study.

    python -m eval.span_card --study model_cards/span/span.json --out model_cards/span.md [--remarks remarks.md]

Every number is read from what `python -m eval.span` wrote, and what won and lost is found by comparing its rows. The
pictures, the grid of values and the drive lie beside --study. What no record can know is in --remarks.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from eval.card import commit, value
from eval.markdown import bullets, number, table, targets_table
from eval.span_figures import draw_all, look, pictures_of, titled
from eval.span_statistics import LAST_SHARE, LEAST_LAST
from eval.span_study import BEST_MLP, OURS, summarise_offline
from eval.span_words import (
    COST,
    choice_words,
    comparison_words,
    cost_words,
    interval,
    rival,
    task_words,
    winner_words,
)
from training.provenance import write_text

Record = Mapping[str, Any]

DRIVE = "drive.gif"
PUBLISHED = (
    "Published (arXiv 2601.23225): 30 to 50 % better sample efficiency, 1.3 to 9 times the success rates of MLPs, and "
    "1.2 to 1.8 times their time for a step; other tasks, budgets and seeds than here."
)
COST_NOTE = (
    "Of several tasks that on which SPAN does worst. MLPs and KANs run in SB3's own policies. SPAN's save work that "
    "has nothing to do with splines: they draw actions without SB3's distribution objects, evaluate all critics at "
    "once, and leave out the critics' gradients while the actor learns."
)


def tasks_table(summary: Record) -> str:
    """Environments, budgets, and the returns that scores refer to."""
    rows = []
    for task, about in summary["tasks"].items():
        returns = (f"{about['reference'][name]:g}" for name in ("low", "high", "threshold"))
        rows.append(
            (titled(task), f"`{about['environment']}`", about["algorithm"], f"{about['total_steps']:,}", *returns)
        )
    return table(("task", "environment", "algorithm", "steps", "score 0", "score 1", "threshold"), rows)


def runs_table(summary: Record, size: str) -> str:
    """All networks on all tasks at one size; in bold the best of a task and those whose interval holds it."""
    lines = []
    for task in summary["tasks"]:
        rows = [row for row in summary["rows"] if (row["task"], row["size"]) == (task, size)]
        cells = [
            [titled(task), look(row["network"])[2], row["num_seeds"], f"{row['num_parameters']:,}", _rate(row)]
            for row in rows
        ]
        kinds: tuple[tuple[str, Callable[..., Any], str], ...] = (
            ("final", max, "{:.3f}"),
            ("area", max, "{:.3f}"),
            ("steps_iqm", min, "{:,.0f}"),
            ("success", max, "{:.2f}"),
        )
        for key, best, form in kinds:
            for line, text in zip(cells, bold([row[key] for row in rows], best, form), strict=True):
                line.append(text)
        for key in ("steps_median", "cost_steps", "cost_seconds"):
            least = min((row[key] for row in rows if row[key] is not None), default=None)
            for line, row in zip(cells, rows, strict=True):
                line.append("∞" if row[key] is None else _bold(f"{row[key]:,.0f}", row[key] == least))
        lines += cells
    titles = ("task", "network", "seeds", "parameters", "learning rate", "final score", "area", "steps to threshold")
    return table((*titles, "runs that succeed", "median steps", "steps a success costs", "seconds"), lines)


def aggregates_table(summary: Record) -> str:
    """Over all tasks, by size and network; in bold as in `runs_table`, of the networks that have all tasks."""
    forms = {"final": (max, "{:.3f}"), "area": (max, "{:.3f}"), "share": (min, "{:.3f}"), "success": (max, "{:.2f}")}
    lines = []
    for size in dict.fromkeys(row["size"] for row in summary["aggregates"]):
        rows = [row for row in summary["aggregates"] if row["size"] == size]
        whole = [len(row["tasks"]) == max(len(row["tasks"]) for row in rows) for row in rows]
        cells = [[size, look(row["network"])[2], len(row["tasks"]), row["num_runs"]] for row in rows]
        for key, (best, form) in forms.items():
            marked = iter(bold([row[key] for row, flag in zip(rows, whole, strict=True) if flag], best, form))
            for line, row, flag in zip(cells, rows, whole, strict=True):
                line.append(next(marked) if flag else interval(row[key], form))
        lines += cells
    titles = ("size", "network", "tasks", "runs", "final score", "area", "steps to threshold / budget")
    return table((*titles, "runs that succeed"), lines)


def comparisons_table(summary: Record) -> str:
    """SPAN against each other network, over all tasks."""
    lines = []
    for each in summary["comparisons"]:
        gain = interval(each["efficiency_gain"], "{:.0f}", 100)
        chances = (interval(each[key], "{:.2f}") for key in ("final_improvement", "area_improvement"))
        lines.append((each["size"], rival(each["against"]), len(each["tasks"]), gain, *chances))
    titles = ("size", "SPAN against", "tasks", "gain in sample efficiency [%]", "P(higher end)", "P(larger area)")
    return table(titles, lines)


def tuned_table(summary: Record) -> str:
    """SPAN against the tuned MLP, task by task."""
    lines = []
    for each in summary["comparisons"]:
        for task in each["tasks"] if each["against"] == BEST_MLP else ():
            ours, others = task["success"]
            rate = interval(task["success_ratio"], "{:.2f}") if max(ours, others) > 0 else "none succeed"
            gain = interval(task["efficiency_gain"], "{:.0f}", 100) if any(task["reached"]) else "none get there"
            by = (each["size"], titled(task["task"]), look(task["network"])[2])
            lines.append((*by, gain, f"{ours:.2f}", f"{others:.2f}", rate))
    titles = ("size", "task", "tuned MLP", "gain in sample efficiency [%]", "SPAN's runs that succeed", "the MLP's")
    return table((*titles, "ratio"), lines)


def cost_table(cost: Record) -> str:
    """Seconds of an update and of an action, by network, on the task on which SPAN does worst."""
    lines = [
        (
            told,
            f"{row['algorithm']}, `{row['environment']}`",
            look(network)[2],
            f"{row['num_parameters']:,}",
            f"{row['seconds']:.3g}",
            f"{row['ratio']:.3g}",
        )
        for key, told in COST.items()
        for network, row in cost.get(key, {}).items()
    ]
    return table(("", "task", "network", "parameters", "seconds", "over the MLP's"), lines)


def offline_table(records: Sequence[Record]) -> str:
    """Normalised returns from fixed data sets, mean and standard deviation over seeds; in bold as the card says."""
    rows = summarise_offline(records)
    lines = []
    for row in rows:
        keys = ("dataset", "algorithm", "parameter_factor")
        top = max(other["mean"] for other in rows if all(other[key] == row[key] for key in keys))
        score = f"{row['mean']:.3f}" + ("" if row["spread"] is None else f" ± {row['spread']:.3f}")
        about = (row["dataset"], row["algorithm"], f"{row['parameter_factor']:g}", look(row["network"])[2])
        marked = _bold(score, row["mean"] + (row["spread"] or 0) >= top)
        lines.append((*about, f"{row['num_parameters']:,}", row["num_seeds"], marked, number(row["ratio"])))
    titles = ("data", "algorithm", "factor", "network", "parameters", "seeds", "normalised return")
    return table((*titles, f"{look(OURS)[2]} / best MLP"), lines)


def offline_words(study: Record) -> str:
    """How learning rates of the offline part were chosen, where the record tells."""
    plan = (study.get("study") or {}).get("offline")
    if not plan:
        return ""
    rates = ", ".join(f"{rate:g}" for rate in plan["learning_rates"])
    return (
        f" {plan['num_steps']:,} gradient steps. The learning rate, of {rates}, was chosen for each data set, method "
        "and network by the return of one run of another seed at factor 1, from the initial states that the "
        "table has too, and is that of all factors."
    )


def tuning_words(summary: Record) -> str:
    """How learning rates were chosen, as far as it is so for all networks."""
    loose = [each for each in summary["choices"] if each["by"] != "tune"]
    if loose:
        return f"Of {len(summary['choices'])} learning rates {len(loose)} were not tuned, see Limits."
    return (
        "Learning rates were chosen for each task, size and network by the mean area of tuning runs, from the grids "
        "below. Evaluations start from the same states in all runs."
    )


def made(study: Record) -> list[str]:
    """Command, commits, machine and versions."""
    by = study["provenance"]
    commits = sorted({str(run["commit"]) for run in study["runs"]})
    versions = ", ".join(f"{package} {version}" for package, version in by["versions"].items())
    hours = sum(run["train_seconds"] for run in study["runs"]) / 3600
    return [
        f"`{value(by, 'command')}`, commit {commit(by)}, {value(by, 'date')}",
        f"{len(study['runs']):,} runs of {hours:.3g} hours in all, at {', '.join(commits) or 'no commit'}",
        f"{value(by, 'hardware.processor')}, {value(by, 'hardware.cores')} cores, "
        f"{value(by, 'hardware.threads')} thread(s) of torch; {versions}",
    ]


def span_card(study: Record, folder: str, pictures: Sequence[str] = (), remarks: str = "") -> str:
    """The card as Markdown with Hugging Face's YAML front matter; a function of its arguments alone.

    Args:
        study: The record.
        folder: Of the pictures, as the card links to it.
        pictures: Their file names.
        remarks: Markdown.
    """
    summary = study["summary"]
    sizes = list(dict.fromkeys(row["size"] for row in summary["rows"]))
    shown = {Path(name).stem: f"![{titled(Path(name).stem)}]({folder}/{name})\n\n" for name in pictures}
    by_size = "".join(
        f"Size {size}:\n\n{shown.get(f'curves_{size}', '')}{runs_table(summary, size)}\n\n" for size in sizes
    )
    missing = f"Missing from an even study:\n\n{bullets(summary['missing'])}\n\n" if summary["missing"] else ""
    cost = study.get("cost") or {}
    step = f"## Time\n\n{bullets(cost_words(cost))}\n\n{COST_NOTE}\n\n{cost_table(cost)}\n\n" if cost else ""
    offline = study.get("offline") or []
    fixed = ""
    if offline:
        fixed = (
            "## From fixed data\n\nNo step in the environment but for evaluation; factor: of the parameters. "
            "Score 0 is a random policy's return, 1 the expert's. In bold the highest and all within their own "
            f"standard deviation of it.{offline_words(study)}\n\n{offline_table(offline)}\n\n"
        )
    prose = f"{remarks.strip()}\n\n" if remarks.strip() else ""
    return (
        f"""---
library_name: transformers
license: apache-2.0
tags:
  - span
  - separable-neural-architecture
  - reinforcement-learning
  - stable-baselines3
---

# SPAN

<!-- Written by `python -m eval.span_card` from span.json. Edit eval/span_card.py, not this file. -->

Actors and critics for reinforcement learning: a dense layer finds coordinates in which the function is nearly
separable, and components are products of B-splines of one coordinate each (arXiv 2603.12244, 2601.23225):

$$f(x) = V g(x) + v_0, \\qquad g_j(x) = \\prod_{{i=1}}^{{d}} \\psi_{{ij}}(z_i), \\qquad z = \\sigma(W x + v)$$

{shown.get("drive", "")}## Use

```python
from stable_baselines3 import PPO, SAC
from leviathan.integrations.sb3 import SpanActorCriticPolicy, SpanSACPolicy

PPO(SpanActorCriticPolicy, "CartPole-v1", policy_kwargs=dict(latent_dim=6, rank=8, num_cells=8)).learn(50_000)
SAC(SpanSACPolicy, "Pendulum-v1").learn(10_000)
```

As a network of its own: `leviathan.SpanModel(leviathan.SpanConfig(num_inputs=4, num_outputs=2))`.

## Figures asked and measured

{targets_table(study)}

{PUBLISHED}

## Over all tasks

{bullets([*comparison_words(summary["comparisons"]), *task_words(summary["comparisons"])])}

{shown.get("aggregates", "")}{aggregates_table(summary)}

{comparisons_table(summary)}

## Task by task

{tasks_table(summary)}

{bullets(winner_words(summary["rows"]))}

In brackets, here and above: {summary["confidence"] * 100:g} % intervals. In bold the best and all whose interval holds
it.

{tuned_table(summary)}

{by_size}{shown.get("values", "")}{step}{fixed}## How it was measured

- Networks of one size have the number of parameters that is nearest to one target; what they have is in the tables.
  {tuning_words(summary)}
- An evaluation is the mean return of the deterministic policy. The final score is the mean of the last
  {LAST_SHARE * 100:g} % of evaluations, and of at least {LEAST_LAST}; a run succeeds if its final return is at or above
  the threshold. Score 0 and 1 are the returns in the table of tasks.
- Scores are interquartile means (IQM): the middle half of all runs of all tasks. Intervals are percentiles of
  {summary["num_resamples"]:,} bootstraps that draw the runs of each task on their own (Agarwal et al. 2021). Few seeds
  make them too narrow.
- Steps to the threshold: the first crossing, linear between evaluations. A run that never crosses counts at its whole
  budget, which is in favour of the network that failed. The gain is the ratio of IQMs of steps over budget, less 1.
- What a success costs: all steps of all runs up to their crossing or their end, over the number of crossings. Seconds
  are in proportion to steps, of runs that shared the machine.
- P(X > Y): Mann-Whitney's statistic, a mean over tasks; ties count half.

{bullets(choice_words(summary))}

{bullets(made(study))}

## Limits

- A few seeds on small tasks with small networks. What holds here need not hold for large ones.
- The budgets end the runs: a network that learns late looks as if it never did.

{missing}{prose}""".rstrip()
        + "\n"
    )


def bold(estimates: Sequence[Record], best: Callable[..., Any], form: str) -> list[str]:
    """Estimates as texts, in bold the best and those whose interval holds the best's value."""
    values = [estimate["value"] for estimate in estimates if estimate["value"] is not None]
    top = best(values, default=None)
    if len(set(values)) < 2 <= len(estimates):  # nothing stands out
        top = None
    texts = []
    for estimate in estimates:
        low, high = (estimate["value"] if estimate[end] is None else estimate[end] for end in ("low", "high"))
        marked = None not in (top, low, high) and low <= top <= high
        texts.append(_bold(interval(estimate, form), marked))
    return texts


def _bold(text: str, flag: bool) -> str:
    return f"**{text}**" if flag else text


def _rate(row: Record) -> str:
    return f"{row['learning_rate']:g}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, required=True, help="span.json of eval.span")
    parser.add_argument("--remarks", type=Path, help="Markdown: what no record can know")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    known = parser.parse_args(arguments)
    try:
        study = json.loads(known.study.read_text(encoding="utf-8"))
        remarks = known.remarks.read_text(encoding="utf-8") if known.remarks else ""
        folder = known.study.parent
        pictures = [f"{name}.png" for name in pictures_of(folder, study)] + [DRIVE] * (folder / DRIVE).is_file()
        links = Path(os.path.relpath(folder, known.out.parent))  # they start from the card
        text = span_card(study, links.as_posix(), pictures, remarks)
        draw_all(folder, study)
        write_text(known.out, text)
    except KeyError as error:
        raise SystemExit(f"error: {known.study} lacks {error}; write it whole with eval.span") from error
    except (ValueError, OSError, SafetensorError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {known.out}")


if __name__ == "__main__":
    main()
