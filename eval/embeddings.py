"""Compares the token embeddings that models have learned for levels of vorticity, and those they started with.

    python -m eval.embeddings --models separable=DIR reflected=DIR lookup=DIR --out DIR

Neighbouring ids are neighbouring values. A digit of the id runs over where the next one carries, and a sum or product
over digits may jump there. So, for each model: the variance that three principal components explain (the paper's
figure 4 has 85 % for the separable embedding and 14 % for the lookup), the step from an id to the next at carries and
elsewhere, and the cosine similarity of ids so many levels apart. Writes embeddings.json and pictures; the words for a
card are `markdown` of that record.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import FigureBase
from torch import Tensor
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForCausalLM

import leviathan  # noqa: F401 -- registers the classes that the Auto classes look up
from eval.figures import LOOKS, PrincipalComponents, draw_embeddings, principal_components, save
from eval.scoring import numbers
from training.provenance import provenance, relative, write_json

Record = Mapping[str, Any]

STATES = ("trained", "untrained")
COLOURS = [LOOKS[row]["color"] for row in ("expectation", "sample", "greedy", "top_k", "top_p", "climatology")]
NUM_DISTANCES = 48


# ---------------------------------------------------------------------------------------------------------- measures


def steps(vectors: Tensor) -> np.ndarray:
    """|e(v + 1) − e(v)| over the rms norm of all e(v): (V, D) -> (V − 1,) float64."""
    vectors = vectors.detach().cpu().double()
    return (vectors.diff(dim=0).norm(dim=-1) / vectors.square().sum(-1).mean().sqrt()).numpy()


def carries(num_ids: int, base: int) -> np.ndarray:
    """Whether the lowest digit runs over from v to v + 1, which is where v + 1 is a multiple of `base`: (V − 1,)."""
    return np.arange(1, num_ids) % base == 0


def similarities(vectors: Tensor, distances: Sequence[int]) -> np.ndarray:
    """Mean over v of the cosine of e(v) and e(v + d), for each distance d in levels: (V, D) -> (distances,)."""
    unit = F.normalize(vectors.detach().cpu().double(), dim=-1)
    return np.array([float((unit[d:] * unit[: len(unit) - d]).sum(-1).mean()) for d in distances])


def distances_of(num_ids: int, base: int) -> list[int]:
    """Distances in levels at which similarities are taken: evenly over their logarithm up to V / 2, and one digit."""
    spaced = np.geomspace(1, max(1, num_ids // 2), NUM_DISTANCES).round().astype(int)
    return sorted({*spaced.tolist(), *([base] if base <= num_ids // 2 else [])})


def embedding_record(vectors: Tensor, base: int) -> dict[str, Any]:
    """What is measured of an embedding.

    Args:
        vectors: (V, D), in the order of ids.
        base: Of the digits of ids.

    Returns:
        `explained` (shares of variance of three components), `steps` with `carry` and `elsewhere`, each `median` and
        `quantile_95`, and the `ratio` of the medians, and `similarity` with `distances` and their mean `cosines`.

    Raises:
        ValueError: If ids have one digit alone, so that nothing carries.
    """
    jumps, at = steps(vectors), carries(len(vectors), base)
    if not at.any() or at.all():
        raise ValueError(f"{len(vectors)} ids in base {base} have no carry, or nothing but carries; take another base.")
    kinds = {
        name: {"median": float(np.median(some)), "quantile_95": float(np.quantile(some, 0.95))}
        for name, some in (("carry", jumps[at]), ("elsewhere", jumps[~at]))
    }
    distances = distances_of(len(vectors), base)
    floor = np.finfo(float).tiny
    return {
        "explained": numbers(principal_components(vectors).explained),
        "steps": kinds | {"ratio": kinds["carry"]["median"] / max(kinds["elsewhere"]["median"], floor)},
        "similarity": {"distances": distances, "cosines": numbers(similarities(vectors, distances))},
    }


# ----------------------------------------------------------------------------------------------------------- pictures


def draw_components(figure: FigureBase, components: Mapping[str, PrincipalComponents]) -> None:
    """The ids of each model in the space of its first three components."""
    parts = np.atleast_1d(figure.subfigures(1, len(components)))
    for part, (name, each) in zip(parts, components.items(), strict=True):
        draw_embeddings(part, each)
        part.axes[0].set_title(f"{name}: {part.axes[0].get_title()}")


def draw_steps(figure: FigureBase, found: Mapping[str, np.ndarray], base: int) -> None:
    """The step from each id to the next, of each model; those at carries are dots."""
    axes = figure.subplots(len(found), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for ax, (name, jumps), colour in zip(axes, found.items(), COLOURS, strict=False):
        ids, at = np.arange(len(jumps)), carries(len(jumps) + 1, base)
        ax.semilogy(ids[~at], jumps[~at], color=colour, linewidth=0.6, label="elsewhere", rasterized=True)
        ax.semilogy(ids[at], jumps[at], ".", color="#000000", markersize=3, label=f"carries of base {base}")
        ax.set_title(name)
        ax.margins(x=0.01)
    axes[-1].set_xlabel("id v (rising with ω)")
    figure.supylabel("|e(v + 1) − e(v)| / rms |e|", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def draw_similarity(figure: FigureBase, record: Record) -> None:
    """Cosine similarity over the distance of ids, trained (lines) and untrained (dotted)."""
    ax = figure.subplots()
    for (name, about), colour in zip(record["models"].items(), COLOURS, strict=False):
        for state, style in zip(STATES, ("-", ":"), strict=True):
            curve = about[state]["similarity"]
            label = name if state == "trained" else f"{name}, untrained"
            ax.plot(curve["distances"], curve["cosines"], color=colour, linestyle=style, label=label)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.axvline(record["base"], color="#555555", linewidth=0.8)
    ax.annotate("base", (record["base"], 1.0), xytext=(4, -3), textcoords="offset points", va="top", fontsize=9)
    ax.set(xlabel="distance |v − w| [levels]", ylabel="cosine similarity", ylim=(None, 1.03))
    figure.legend(loc="outside lower center", ncols=2)


# ------------------------------------------------------------------------------------------------------------ command


def vectors_of(folder: Path, state: str, seed: int = 0) -> Tensor:
    """The embeddings (V, D) of a model's folder, `"trained"` or those of an `"untrained"` model of its config."""
    if state == "trained":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    return model.get_input_embeddings().weight.detach()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Does what the command says; returns what embeddings.json holds."""
    for name, folder in args.models.items():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{name}: {folder} holds no model (no config.json); give a folder of a training.")
    tokenizers = {name: AutoFeatureExtractor.from_pretrained(folder) for name, folder in args.models.items()}
    digits = {name: (tokenizer.vocab_size, tokenizer.base) for name, tokenizer in tokenizers.items()}
    if len(set(digits.values())) > 1:
        raise ValueError(f"ids and bases of the models are {digits}; expected the same for all, to be compared.")
    num_ids, base = next(iter(digits.values()))
    models, components, jumps = {}, {}, {}
    for name, folder in args.models.items():
        vectors = {state: vectors_of(folder, state, args.seed) for state in STATES}
        config = AutoConfig.from_pretrained(folder)
        models[name] = {
            "path": relative(folder),
            "embedding_type": config.embedding_type,
            "low_digit": config.embedding_low_digit,
            **{state: embedding_record(each, base) for state, each in vectors.items()},
        }
        components[name], jumps[name] = principal_components(vectors["trained"]), steps(vectors["trained"])
    record = {"num_ids": num_ids, "base": base, "models": models, "provenance": provenance(args.seed)}
    args.out.mkdir(parents=True, exist_ok=True)
    save(args.out / "components.png", (6 * len(models), 5.6), lambda figure: draw_components(figure, components))
    save(args.out / "steps.png", (9, 2 * len(models) + 1), lambda figure: draw_steps(figure, jumps, base))
    save(args.out / "similarity.png", (7, 5), lambda figure: draw_similarity(figure, record))
    write_json(args.out / "embeddings.json", record)
    print(markdown(record))
    return record


def markdown(record: Record) -> str:
    """The record as a table with its words, for a card; a function of the record alone."""
    lines = [
        "| embedding | three components explain | step at carries: median (95 %) | step elsewhere: median (95 %) "
        "| ratio of medians | cosine one level apart | half the range apart |",
        "|---" * 7 + "|",
    ]
    for name, about in record["models"].items():
        for state in STATES:
            found = about[state]
            at, elsewhere = (found["steps"][kind] for kind in ("carry", "elsewhere"))
            cosines = found["similarity"]["cosines"]
            lines.append(
                f"| {name}{', untrained' * (state == 'untrained')} | {100 * sum(found['explained']):.0f} % "
                f"| {at['median']:.3g} ({at['quantile_95']:.3g}) "
                f"| {elsewhere['median']:.3g} ({elsewhere['quantile_95']:.3g}) | {found['steps']['ratio']:.3g} "
                f"| {cosines[0]:.3f} | {cosines[-1]:.3f} |"
            )
    return (
        f"Embeddings of {record['num_ids']:,} ids, whose digits are of base {record['base']}. A step is "
        "|e(v + 1) − e(v)| over the rms norm; v + 1 is a multiple of the base at carries.\n\n" + "\n".join(lines)
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="NAME=DIR", help="folders of trained models, each with a name")
    add("--out", type=Path, required=True, help="folder for embeddings.json and pictures")
    add("--seed", type=int, default=0, help="of the untrained models; default: %(default)s")
    args = parser.parse_args(arguments)
    pairs = [text.partition("=") for text in args.models]
    if not all(name and folder for name, _, folder in pairs) or len({name for name, *_ in pairs}) < len(pairs):
        parser.error(f"--models {' '.join(args.models)}: expected NAME=DIR, different names")
    if len(pairs) > len(COLOURS):
        parser.error(f"--models: {len(pairs)} are too many to be told apart; give up to {len(COLOURS)}")
    args.models = {name: Path(folder) for name, _, folder in pairs}
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    try:
        run(parse(arguments))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
