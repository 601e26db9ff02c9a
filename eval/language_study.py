"""Sums up a study of language models that `eval.study` trained: held-out text, learning curves, who needs how much.

    python -m eval.language_study --study runs/text_study --data "data/test.jsonl.zst" --out model_cards/leviathan_text

Measures every run that study.json reports on the same text, compares every arm with the reference arms at equal seeds,
and writes language.json and pictures. What was measured of a run is kept beside it. A run that diverged has nothing to
be measured, and its arm no scores and no place in the pictures.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval import language, language_figures
from eval.figures import save
from eval.study import summed_up
from training.documents import Documents
from training.provenance import provenance, relative, write_json

MEASURED = "measured.json"  # beside a run
EARLY = 0.05  # of training; lags are judged from there on
NUM_DRAWN = len(language_figures.ARM_LOOKS)


def measure(folder: Path, data: str | None, split: str, num_sequences: int | None, counts_of: Path) -> dict[str, Any]:
    """What `eval.language` finds of a run on the text, without its tokens; or what it found before.

    Frequencies of tokens are those in the training of `counts_of`: the seeds of a study see other parts of the text,
    and bands are to hold the same targets for all.
    """
    kept = folder / MEASURED
    # Elsewhere a text of the same name may be another.
    text = {"data": relative(data)} | Documents(data).record() if data else {"data": None}
    wanted = text | {"split": split, "num_sequences": num_sequences, "counts_of": counts_of.name}
    if kept.is_file() and (known := json.loads(kept.read_text(encoding="utf-8"))).get("of") == wanted:
        return known
    where = ["--model", str(folder), "--split", split, "--out", str(folder), *(["--data", data] if data else [])]
    where += ["--counts", str(counts_of / "token_counts.safetensors")]
    where += [] if num_sequences is None else ["--num-sequences", str(num_sequences)]
    model, tokenizer, sequences, counts, _ = language.opened(language.parse(where))
    found = language.evaluate(model, tokenizer, sequences, counts, batch_size=32)
    scores = {name: found[name] for name in ("loss", "perplexity", "bits_per_byte", "bands", "rare")}
    kept_of_embedding = {"explained": found["embedding"]["explained"]}
    measured = {"of": wanted, "data": found["data"], **scores, "embedding": kept_of_embedding}
    write_json(kept, measured)
    return measured


def tokens_of_order(folder: Path) -> int | None:
    """Tokens of text that the order of a run's tokens was made from: 0 if from none, None if there is no record of it.

    They are read before training, and by `training.token_order`, whose record lies beside the order.
    """
    order = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]["tokenizer"].get("order")
    if order is None:
        return 0
    record = Path(order).with_suffix(".json")
    if not record.is_file():
        return None
    settings = json.loads(record.read_text(encoding="utf-8"))["settings"]
    return settings["tokens_read"] if settings["method"] not in ("random", "identity") else 0


def compare(arm: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An arm against a reference, seed by seed: means and standard deviations.

    - `perplexity_ratio`, `rare_perplexity_ratio`: of the test's perplexities; below 1 the arm is better,
    - `tokens_ratio`: steps of the reference to its own last validation loss, over those of the arm to that loss (None
      if a seed of the arm never gets there, or was there before training): so many times fewer tokens,
    - `largest_lag`: the greatest difference of the validation losses in nats, arm less reference at equal steps, from
      `EARLY` of training on; below 0 the arm was ahead all along (None if a seed has no step in common).

    All are None if there is no seed in common, or a run diverged.
    """
    pairs = [(one, other) for one in arm for other in reference if one["seed"] == other["seed"]]
    diverged = any(run["test"] is None for pair in pairs for run in pair)
    ratios: dict[str, list[float | None]] = {name: [] for name in ("perplexity", "rare_perplexity", "tokens", "lag")}
    for one, other in pairs if not diverged else []:
        test, against = one["test"], other["test"]
        ratios["perplexity"].append(test["perplexity"]["mean"] / against["perplexity"]["mean"])
        rare = test["rare"]["perplexity"], against["rare"]["perplexity"]
        ratios["rare_perplexity"].append(None if None in rare else rare[0] / rare[1])
        goal = other["validation"][-1]["loss"]
        needed, own = (language.steps_to_reach(finite(each["validation"]), goal) for each in (one, other))
        ratios["tokens"].append(own / needed if needed else None)
        last = other["validation"][-1]["step"]
        # Not step >= EARLY * last, whose product is rounded: 0.05 * 140 > 7.
        losses = {row["step"]: row["loss"] for row in finite(other["validation"]) if row["step"] / last >= EARLY}
        behind = [row["loss"] - losses[row["step"]] for row in finite(one["validation"]) if row["step"] in losses]
        ratios["lag"].append(max(behind, default=None))
    names = {"perplexity": "perplexity_ratio", "rare_perplexity": "rare_perplexity_ratio", "tokens": "tokens_ratio"}
    summed = {names.get(name, "largest_lag"): summed_up(values) for name, values in ratios.items()}
    return summed | {"seeds": [one["seed"] for one, _ in pairs]}


def finite(curve: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The evaluations of a validation curve that have a loss."""
    return [row for row in curve if row["loss"] is not None]


def sum_up(
    study: Path,
    data: str | None,
    split: str,
    references: Sequence[str],
    drawn: Sequence[str] = (),
    num_sequences: int | None = None,
) -> dict[str, Any]:
    """What language.json holds.

    Raises:
        ValueError: If a reference, or an arm that is to be drawn, is none of the study.
    """
    found = json.loads((study / "study.json").read_text(encoding="utf-8"))
    arms = found["arms"]
    for flag, names in {"--references": references, "--draw": drawn}.items():
        if unknown := [name for name in names if name not in arms]:
            raise ValueError(f"{flag} {' '.join(unknown)}: the arms of {study} are {', '.join(arms)}.")
    folders = [
        (run, study / f"{name}-{arm['best']}-{run['seed']}") for name, arm in arms.items() for run in arm["runs"]
    ]
    for run, folder in tqdm(folders, desc="measuring", unit="run"):
        diverged = run["loss"] is None
        run["test"] = None if diverged else measure(folder, data, split, num_sequences, counts_of=folders[0][1])
    for name, arm in arms.items():
        tests = [run["test"] for run in arm["runs"]]
        tests = [] if None in tests else tests
        arm["test"] = {
            name: summed_up([test[name]["mean"] for test in tests]) for name in ("loss", "perplexity", "bits_per_byte")
        }
        arm["test"]["rare_perplexity"] = summed_up([test["rare"]["perplexity"] for test in tests])
        arm["test"]["three_components"] = summed_up([sum(test["embedding"]["explained"][:3]) for test in tests])
        arm["order_tokens_read"] = tokens_of_order(study / f"{name}-{arm['best']}-{arm['runs'][0]['seed']}")
        arm["against"] = {name: compare(arm["runs"], arms[name]["runs"]) for name in references}
    return found | {"references_of_arms": list(references), "lags_from": EARLY, "measured": provenance()}


def draw(found: Mapping[str, Any], out: Path, chosen: Sequence[str], reference: str) -> None:
    """The pictures of the study: learning curves, bands of frequency, spectra of the embeddings.

    Of the chosen arms, those without a run that diverged; if the reference is none of them, the first is.
    """
    arms = {name: found["arms"][name]["runs"] for name in chosen if found["arms"][name]["test"]["loss"] is not None}
    reference = reference if reference in arms else next(iter(arms), None)
    curves = {
        name: [
            {
                "step": [row["step"] for row in run["validation"]],
                "tokens": [row["step"] * run["tokens_per_step"] for row in run["validation"]],
                "seconds": [row["step"] * (run["seconds"] or math.nan) / run["steps"] for row in run["validation"]],
                "loss": [row["loss"] for row in run["validation"]],
            }
            for run in runs
        ]
        for name, runs in arms.items()
    }
    bands = {name: [run["test"]["bands"] for run in runs] for name, runs in arms.items()}
    spectra = {name: [run["test"]["embedding"]["explained"] for run in runs] for name, runs in arms.items()}
    save(out / "curves.png", (11, 6.5), lambda figure: language_figures.draw_curves(figure, curves, reference))
    save(out / "bands.png", (8, 5), lambda figure: language_figures.draw_bands(figure, bands, reference))
    save(out / "spectra.png", (8, 4.5), lambda figure: language_figures.draw_spectrum(figure, spectra))


def table(found: Mapping[str, Any]) -> str:
    """The arms as lines of text."""
    lines = [f"{'arm':>28} {'parameters':>11} {'test perplexity':>19} {'rare':>10}  against each reference"]
    for name, arm in found["arms"].items():
        score, rare = arm["test"]["perplexity"], arm["test"]["rare_perplexity"]
        mean, spread = ("diverged", "") if score is None else (f"{each:.2f}" for each in score.values())
        ratios = {other: each["perplexity_ratio"] for other, each in arm["against"].items()}
        against = ", ".join(
            f"{other} {'-' if each is None else format(each['mean'], '.3f')}" for other, each in ratios.items()
        )
        lines.append(
            f"{name:>28} {arm['num_parameters']:>11,} {mean:>10} ± {spread:<6} "
            f"{'-' if rare is None else format(rare['mean'], ',.0f'):>10}  {against}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, required=True, help="folder of eval.study")
    parser.add_argument("--data", help="text to measure on; default: the split of the training's settings")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--num-sequences", type=int, help="only the first so many; default: all of the split")
    parser.add_argument(
        "--references", nargs="+", default=["lookup_tied", "lookup_untied"], help="arms to compare with"
    )
    parser.add_argument("--draw", nargs="+", help=f"arms in the pictures; default: the first {NUM_DRAWN}")
    parser.add_argument("--out", type=Path, required=True, help="folder for language.json and pictures")
    args = parser.parse_args(arguments)
    try:
        found = sum_up(args.study, args.data, args.split, args.references, args.draw or (), args.num_sequences)
        chosen = args.draw or list(found["arms"])[:NUM_DRAWN]
        args.out.mkdir(parents=True, exist_ok=True)
        draw(found, args.out, chosen, args.references[-1])
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    write_json(args.out / "language.json", found)
    print(table(found))
    return found


if __name__ == "__main__":
    main()
