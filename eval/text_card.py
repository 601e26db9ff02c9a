"""Writes the model card of Leviathan for text from a study's record.

    python -m eval.text_card --study model_cards/leviathan_text/language.json --out model_cards/leviathan_text.md

Every number of the card is read from the record that `python -m eval.language_study` wrote.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.card import MISSING, commit, value, with_spread
from training.provenance import write_text

Record = Mapping[str, Any]


def arms_table(found: Record) -> str:
    """Each arm: its size, the setting that was tuned, and its scores on the test text."""
    lines = [
        f"| arm | parameters | of them in the embedding | tokens read for the order | {tuned(found)} | perplexity "
        "| bits per byte | rare tokens' perplexity | three components |",
        "|---" * 9 + "|",
    ]
    for name, arm in found["arms"].items():
        test, read = arm["test"], arm["order_tokens_read"]
        cells = [
            name.replace("_", " "),
            f"{arm['num_parameters']:,}",
            f"{arm['runs'][0]['embedding_parameters']:,}",
            MISSING if read is None else f"{read:,}" if read else "none",
            f"{arm['best']} (edge)" if at_edge(arm) else arm["best"],
            "diverged" if test["perplexity"] is None else with_spread(test["perplexity"], ".2f"),
            scored(test["bits_per_byte"], ".4f"),
            scored(test["rare_perplexity"], ",.0f"),
            MISSING if test["three_components"] is None else f"{100 * test['three_components']['mean']:.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if any(map(at_edge, found["arms"].values())):
        lines.append(f"\n(edge): the least or greatest {tuned(found)} tried was best; a better one may lie beyond.")
    return "\n".join(lines)


def arms_list(found: Record) -> str:
    """What sets each arm apart: the settings that it lays over the others'."""
    lines = []
    for name, arm in found["arms"].items():
        pairs = zip(arm["settings"][::2], arm["settings"][1::2], strict=True)
        told = ", ".join(f"`{key.removeprefix('--')}: {setting.strip(chr(34))}`" for key, setting in pairs)
        lines.append(f"- {name.replace('_', ' ')}: {told or 'nothing'}")
    return "\n".join(lines)


def comparison_table(found: Record, reference: str) -> str:
    """Each arm against the reference, seed by seed."""
    lines = ["| arm | perplexity | rare tokens' perplexity | tokens | largest lag [nat] |", "|---" * 5 + "|"]
    for name, arm in found["arms"].items():
        if name == reference:
            continue
        against = arm["against"][reference]
        tokens, lag = against["tokens_ratio"], against["largest_lag"]
        cells = [
            name.replace("_", " "),
            change(against["perplexity_ratio"]),
            change(against["rare_perplexity_ratio"]),
            "never" if tokens is None else with_spread(tokens, ".2f"),
            MISSING if lag is None else f"{lag['mean']:+.3f} ± {lag['standard_deviation']:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tuned(found: Record) -> str:
    """The setting whose best value each arm has, in words."""
    return found["tune"].rpartition(".")[2].replace("_", " ")


def at_edge(arm: Record) -> bool:
    """Whether the best value is the least or greatest of several numbers that were tried."""
    try:
        values = sorted(map(float, arm["tuning"]))
    except ValueError:
        return False  # no numbers
    return len(values) > 1 and float(arm["best"]) in (values[0], values[-1])


def order_limit(found: Record) -> str:
    """What the arms with an order of the tokens have had that the others have not; empty if no arm has one."""
    reads = [arm["order_tokens_read"] for arm in found["arms"].values()]
    if not any(read is None or read for read in reads):
        return ""
    run, most = next(iter(found["arms"].values()))["runs"][0], max((read for read in reads if read), default=None)
    times = MISSING if most is None else f"{most / (run['steps'] * run['tokens_per_step']):.1f}"
    return (
        "- Arms with an order of the tokens by co-occurrence had more text than others: it was made beforehand, from\n"
        f"  up to {times} times the tokens that a run trains on (see *tokens read for the order*).\n"
    )


def scored(score: Record | None, form: str) -> str:
    """A score and its spread, or that there is none."""
    return MISSING if score is None else with_spread(score, form)


def change(ratio: Record | None) -> str:
    """A ratio and its spread as a change in per cent, or that there is none."""
    if ratio is None:
        return MISSING
    return f"{100 * (ratio['mean'] - 1):+.1f} ± {100 * ratio['standard_deviation']:.1f} %"


def text_card(found: Record, picture_folder: str) -> str:
    """The card as Markdown with Hugging Face's YAML front matter; a function of the record alone."""
    first = next(iter(found["arms"].values()))["runs"]
    run, seeds = first[0], [each["seed"] for each in first]
    test = next(each["test"] for arm in found["arms"].values() for each in arm["runs"] if each["test"] is not None)
    data = test["data"]
    made, measured = found["provenance"], found["measured"]
    comparisons = "\n\n".join(
        f"Against {name.replace('_', ' ')}:\n\n{comparison_table(found, name)}" for name in found["references_of_arms"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    tokens = run["steps"] * run["tokens_per_step"]
    body = "" if found["tune"] == "training.learning_rate" else ", the body's learning rate too,"
    return f"""---
library_name: transformers
license: apache-2.0
tags:
  - leviathan
  - separable-neural-architecture
  - text-generation
---

# Leviathan for text

<!-- Written by `python -m eval.text_card` from language.json. Edit eval/text_card.py, not this file. -->

A causal Transformer whose token embeddings are generated by a separable network from the digits of the id
(arXiv 2601.22040), or from the digits of a place that tokens are given by the company they keep
(`python -m training.token_order`). The arms below have the same stream of tokens, the same steps and the same body, but
for those called *same total*: their body is as large as makes their parameters as many as another arm's. Tied arms
share the head with the table. Each arm has its best {tuned(found)} of the same \
{len(next(iter(found["arms"].values()))["tuning"])}; all else that is set for training{body} is the same for all.

## Use

```python
import leviathan
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "runs/text/model"
tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
model.generate(**tokenizer(["Once"], return_tensors="pt"), max_new_tokens=50)
```

## Limits

- {tokens:,} tokens of training a run: far fewer than {run["num_parameters"]:,} parameters ask for. This compares how
  soon arms learn. What is best after twenty tokens a parameter, only a longer run can say.
{order_limit(found)}- The text is small and mixed; nothing here is a model to write with.
- Intervals are standard deviations over {len(seeds)} seeds (initial values and order of the text).

## Results

{run["steps"]:,} steps of {run["tokens_per_step"]:,} tokens; test text of {data["num_targets"]:,} tokens \
({data["num_bytes"]:,} bytes) in sequences of {data["context_length"]}; \
seeds {", ".join(map(str, seeds))}. Rare tokens were seen at most {test["rare"]["high"]} times in training. \
Entropy of the validation tokens: {value(found, "references.marginal_entropy", "{:.3f}")} nat.

{arms_table(found)}

The arms lay these settings over those of `{value(found, "config")}`:

{arms_list(found)}

{comparisons}

Perplexities: by how much they differ from the reference's; *tokens*: so many times fewer until the reference's last
validation loss; *largest lag*: the most by which the validation loss was behind at equal steps, from \
{100 * found["lags_from"]:g} % of training on (below zero: ahead all along).

![Learning curves]({picture_folder}/curves.png)

![Perplexity by frequency of the token]({picture_folder}/bands.png)

![Variance of the embeddings]({picture_folder}/spectra.png)

Seconds are those of runs that shared the machine with others: what an arm costs, `python -m eval.speed` can say.

## Reproduce

```bash
{value(found, "provenance.command")}
{value(found, "measured.command")}
```

Trained on {value(made, "hardware.processor")}, {value(made, "hardware.cores")} cores, accelerator \
{made["hardware"].get("accelerator") or "none"}; {versions}; commit {commit(made)}, measured at {commit(measured)};
{value(measured, "date")}.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, required=True, help="language.json of eval.language_study")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args(arguments)
    try:
        found = json.loads(args.study.read_text(encoding="utf-8"))
        pictures = Path(os.path.relpath(args.study.parent, args.out.parent))  # links start from the card
        write_text(args.out, text_card(found, pictures.as_posix()))
    except KeyError as error:
        raise SystemExit(f"error: {args.study} has no entry {error}; write it with eval.language_study") from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
