"""Measures a language model on held-out text: in all, by how often a token was seen in training, and its embeddings.

    python -m eval.language --model runs/text/model --data "data/test.jsonl.zst" --out runs/text/results

Writes language.json and pictures. The text is cut as in training: every document begins with a separator, documents are
laid end to end, and every sequence predicts all of its tokens but the first. A separator is a target like others, which
has its cost in nats and stands for no byte.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import decoders
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval import language_figures, metrics
from eval.generate import load
from eval.likelihood import check_vocabulary, max_length, token_losses
from training.provenance import provenance, relative, write_json
from training.text import TextSettings, validation_sequences

EDGES = (0, 1, 10, 100, 1_000, 10_000)  # least counts of the bands
RARE = 100  # a token seen less often is rare
NUM_WORDS, NUM_NEIGHBOURS = 20, 8
ROWS_AT_ONCE = 8192  # of a table, in float64


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % bootstrap interval over sequences, whose ends are None for a single sequence."""

    mean: float
    low: float | None
    high: float | None

    def mapped(self, function: Callable[[float], float]) -> "Estimate":
        """A rising function of the number and of both ends."""
        return Estimate(*(None if value is None else function(value) for value in (self.mean, self.low, self.high)))


@dataclass(frozen=True)
class Band:
    """Targets whose id was seen `low` to `high` times in training, both included; `high` None is without an end.

    `loss` is their mean in nats, with the interval over sequences [`loss_low`, `loss_high`], `perplexity` is exp(loss);
    all None where there are no targets.
    """

    low: int
    high: int | None
    num_targets: int
    loss: float | None
    loss_low: float | None
    loss_high: float | None
    perplexity: float | None


@dataclass(frozen=True)
class Neighbours:
    """Rows nearest to K rows of a table, the nearest first, and the cosines of the angles to them: (K, count) each."""

    ids: np.ndarray
    cosines: np.ndarray


def perplexity(loss: float) -> float:
    """exp(loss) of a mean loss in nats per token: so many equally likely tokens would cost as much."""
    return math.exp(loss)


def bits_per_byte(total_nats: float, num_bytes: float) -> float:
    """total_nats / (ln 2 · num_bytes): the cost of a text in bits for a byte of its UTF-8, whatever the tokenizer.

    Raises:
        ValueError: If there are no bytes.
    """
    if num_bytes <= 0:
        raise ValueError(f"num_bytes = {num_bytes}; expected those of a text that is not empty.")
    return total_nats / math.log(2) / num_bytes


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Bytes of UTF-8 text that each id stands for: (V,) int64, V the tokenizer's greatest id + 1.

    Special tokens, and ids without a token, stand for none. Tokens of a byte-level BPE are written with a character for
    each byte. Those of other tokenizers, each of which should stand for whole characters, are decoded twice in a row
    and once: the difference has the space that a decoder drops at the start of a text.
    """
    special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
    backend = getattr(tokenizer, "backend_tokenizer", None)  # of those not written in Python
    byte_level = backend is not None and isinstance(backend.decoder, decoders.ByteLevel)

    def decoded(ids: list[int]) -> int:
        return len(tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode())

    vocabulary = tokenizer.get_vocab()
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, i in vocabulary.items():
        if i in added:  # written as it is
            sizes[i] = 0 if i in special or added[i].special else len(token.encode())
        else:
            sizes[i] = len(token) if byte_level else decoded([i, i]) - decoded([i])
    return sizes


def ratio_of_sums(numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
    """R = Σ a_i / Σ b_i over N sequences, and its bootstrap interval: two arrays (N,).

    The interval is that of the mean of R + N (a_i − R b_i) / Σ b_i, the ratio to first order in the sums: a resample
    may hold no target of a rare band, and then has no ratio.

    Raises:
        ValueError: If shapes differ, a value is not finite or the denominators sum to zero or less.
    """
    a, b = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not np.isfinite([a, b]).all() or b.sum() <= 0:
        raise ValueError(f"{a.shape} values over {b.shape} of sum {b.sum():g}; expected finite ones (N,), sum above 0.")
    ratio = float(a.sum() / b.sum())
    if len(a) == 1:
        return Estimate(ratio, None, None)
    interval = metrics.bootstrap(ratio + (a - ratio * b) * len(a) / b.sum())
    return Estimate(ratio, float(interval.low), float(interval.high))


def by_frequency(
    losses: np.ndarray, targets: np.ndarray, counts: np.ndarray, edges: Sequence[int] = EDGES
) -> list[Band]:
    """Mean loss of the targets whose count in training lies in each band [e_i, e_(i+1) − 1], the last without an end.

    Args:
        losses: Nats (N, T) of N sequences.
        targets: Their ids (N, T).
        counts: Times that training had each id for a target, (V,).
        edges: Least count of each band, rising from 0 on.

    Raises:
        ValueError: If shapes do not fit, a target has no count or the edges do not rise from 0.
    """
    losses, targets, counts = (np.asarray(each) for each in (losses, targets, counts))
    if losses.ndim != 2 or losses.shape != targets.shape or counts.ndim != 1:
        raise ValueError(
            f"losses have shape {losses.shape}, targets {targets.shape} and counts {counts.shape}; expected (N, T) "
            "twice and (V,)."
        )
    if list(edges[:1]) != [0] or list(edges) != sorted(set(edges)):
        raise ValueError(f"edges = {list(edges)}; expected whole numbers that rise from 0 on.")
    if len(outside := targets[(targets < 0) | (targets >= len(counts))]):
        raise ValueError(
            f"targets hold the id {outside[0]}, but counts are of {len(counts)} ids; take those of the same run."
        )
    seen = counts[targets]
    bands = []
    for low, end in zip(edges, [*edges[1:], None], strict=True):
        inside = (seen >= low) & (True if end is None else seen < end)
        found = (None, None, None, None)
        if inside.any():
            loss = ratio_of_sums(np.where(inside, losses, 0.0).sum(1), inside.sum(1))
            found = (loss.mean, loss.low, loss.high, perplexity(loss.mean))
        bands.append(Band(low, None if end is None else end - 1, int(inside.sum()), *found))
    return bands


def steps_to_reach(curve: Sequence[Mapping[str, float]], loss: float) -> float | None:
    """The first step at which a validation curve is at or below `loss`, linear between evaluations; None if never.

    Args:
        curve: Evaluations with "step" and "loss", as `validation` in training.json.
        loss: In nats per token.

    Raises:
        ValueError: If steps do not rise, or a loss is not a finite number.
    """
    points = [(float(row["step"]), float(row["loss"])) for row in curve]
    rising = all(one[0] < other[0] for one, other in itertools.pairwise(points))
    if not (rising and all(math.isfinite(value) for _, value in points)):
        raise ValueError(f"curve has (step, loss) {points}; expected rising steps and finite losses.")
    if points and points[0][1] <= loss:
        return points[0][0]
    for (start, above), (step, value) in itertools.pairwise(points):
        if value <= loss:
            return start + (step - start) * (above - loss) / (above - value)
    return None


def explained_variance(table: Tensor, num_components: int | None = 3, weights: np.ndarray | None = None) -> np.ndarray:
    """Shares λ_i / Σ λ of the variance along the principal components of a table's rows, falling: (V, D) -> (C,).

    λ are the eigenvalues of Σ_v w_v (x_v − m)(x_v − m)ᵀ with m = Σ_v w_v x_v: without weights those of
    `eval.figures.principal_components`, here without the coordinates.

    Args:
        table: A row for each token, (V, D).
        num_components: C; None is D.
        weights: (V,), such as counts of the tokens; they are divided by their sum. None weighs all rows alike.

    Raises:
        ValueError: If shapes do not fit, or weights are negative, not finite or all zero.
    """
    if table.ndim != 2 or (num_components is not None and not 1 <= num_components <= table.shape[1]):
        raise ValueError(f"table has shape {tuple(table.shape)}, which has no {num_components} components; lower them.")
    share = torch.as_tensor(np.ones(len(table)) if weights is None else weights).double()
    if share.shape != table.shape[:1] or not (share.isfinite().all() and share.min() >= 0 and share.sum() > 0):
        raise ValueError(
            f"weights have shape {tuple(share.shape)} and the sum {float(share.sum()):g}; expected ({len(table)},), "
            "finite, none negative, and not all zero."
        )
    share = share / share.sum()
    chunks = list(zip(table.detach().cpu().split(ROWS_AT_ONCE), share.split(ROWS_AT_ONCE), strict=True))
    mean = sum(part @ rows.double() for rows, part in chunks)
    covariance = sum((rows - mean).T @ ((rows - mean) * part[:, None]) for rows, part in chunks)  # (D, D) float64
    variance = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    return (variance / variance.sum().clamp(min=torch.finfo(torch.float64).tiny))[:num_components].numpy()


def nearest_neighbours(table: Tensor, ids: Sequence[int], count: int) -> Neighbours:
    """The rows at the least angle to given ones, seen from the mean of all rows, without themselves.

    cos(u, v) = (x_u − m)·(x_v − m) / |x_u − m| |x_v − m|. The mean is taken off because a common part of all rows would
    make every two of them alike; a row that is the mean has the cosine 0 with all.

    Args:
        table: (V, D).
        ids: K of its rows.
        count: Neighbours of each.

    Raises:
        ValueError: If an id is no row, or there are not so many other rows.
    """
    size = len(table)
    if not 1 <= count < size or not all(0 <= i < size for i in ids):
        raise ValueError(f"ids = {list(ids)}, count = {count}; expected rows of the {size}, and at most {size - 1}.")
    rows = table.detach().float().cpu()
    rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    chosen = torch.as_tensor(ids, dtype=torch.int64)
    cosines = rows[chosen] @ rows.T  # (K, V)
    cosines[torch.arange(len(chosen)), chosen] = -torch.inf
    found = cosines.topk(count)
    return Neighbours(found.indices.numpy(), found.values.numpy())


def spread_over_ranks(counts: np.ndarray, num_ids: int) -> list[int]:
    """Ids from the most to the least frequent, at ranks that are evenly spaced on a logarithmic scale: (V,) -> list.

    Ids that were never seen are not among them; there are fewer than `num_ids` if ranks coincide.
    """
    order = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
    ranks = np.unique(np.geomspace(1, len(order), num_ids).round().astype(int)) if len(order) else []
    return [int(order[rank - 1]) for rank in ranks]


def ids_of_words(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The id of each word, which must be one token: within a text, behind a space, or else alone.

    Raises:
        ValueError: If a word is no single token.
    """
    ids = []
    for word in words:
        written = [tokenizer.encode(text, add_special_tokens=False) for text in (f" {word}", word)]
        single = [tokens[0] for tokens in written if len(tokens) == 1]
        if not single:
            raise ValueError(f"--words {word!r} is {len(written[1])} tokens, not one; give a word that is.")
        ids.append(single[0])
    return ids


def read_counts(path: Path, vocab_size: int) -> np.ndarray:
    """How often training had each id for a target: the (V,) int64 that training.text_task saves.

    Raises:
        OSError: If there is no such file.
        ValueError: If it holds no counts, or those of another vocabulary.
    """
    try:
        counts = load_file(path).get("counts")
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}); give that of the run.") from error
    if counts is None or counts.shape != (vocab_size,) or counts.is_floating_point():
        found = "nothing of that name" if counts is None else f"{tuple(counts.shape)} {counts.dtype}"
        raise ValueError(f"counts of {path}: {found}; expected an integer for each of the model's {vocab_size} ids.")
    return counts.numpy()


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Dataset,
    counts: np.ndarray | None = None,
    words: Sequence[str] | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Everything that language.json says of a causal language model and a text.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        sequences: Items "input_ids" and, where documents do not see one another, "position_ids", (T,) each.
        counts: Times that training had each id for a target, (V,); without them nothing is said of frequencies there.
        words: Whose neighbours to give; by default tokens of all frequencies (in the text, without counts).
        batch_size: Sequences in one forward pass.

    Raises:
        ValueError: If tokenizer, words, counts or sequences do not fit the model.
    """
    check_vocabulary(tokenizer, model)
    sizes = token_bytes(tokenizer)
    given = None if words is None else ids_of_words(words, tokenizer)
    columns = {key: torch.stack([item[key] for item in sequences]) for key in sequences[0]}
    losses = token_losses(model, columns["input_ids"], batch_size, columns.get("position_ids")).double().numpy()
    targets = columns["input_ids"][:, 1:].numpy()
    num_bytes = sizes[targets]
    separators = num_bytes == 0
    loss = ratio_of_sums(losses.sum(1), np.full(len(losses), losses.shape[1]))
    per_byte = ratio_of_sums(losses.sum(1), num_bytes.sum(1)).mapped(lambda nats: bits_per_byte(nats, 1))
    frequency = np.bincount(targets.ravel(), minlength=len(sizes)) if counts is None else counts
    table = model.get_input_embeddings().weight.detach()[: len(sizes)].float().cpu()
    chosen = spread_over_ranks(frequency, NUM_WORDS) if given is None else given
    found = {
        "data": {
            "num_sequences": len(targets),
            "context_length": columns["input_ids"].shape[1],
            "num_targets": targets.size,
            "num_bytes": int(num_bytes.sum()),
        },
        "model": _described(model),
        "loss": asdict(loss),
        "perplexity": asdict(loss.mapped(perplexity)),
        "bits_per_byte": asdict(per_byte),
        "separators": {
            "num_targets": int(separators.sum()),
            "loss": float(losses[separators].mean()) if separators.any() else None,
            "bits_per_byte": bits_per_byte(losses[separators].sum(), num_bytes.sum()),  # their part of the whole
        },
        "bands": None,
        "rare": None,
        "embedding": {
            "explained": _rounded(explained_variance(table, None)),
            "explained_by_count": None,
            "neighbours": _neighbours(table, chosen, frequency, tokenizer),
        },
    }
    if counts is not None:
        found["bands"] = [asdict(band) for band in by_frequency(losses, targets, counts)]
        found["rare"] = asdict(by_frequency(losses, targets, counts, (0, RARE))[0])
        found["embedding"]["explained_by_count"] = _rounded(explained_variance(table, None, counts[: len(table)]))
    return found


def _described(model: PreTrainedModel) -> dict[str, Any]:
    settings = {key: value for key, value in vars(model.config).items() if key.startswith("embedding_")}
    return {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "embedding_parameters": sum(p.numel() for p in model.get_input_embeddings().parameters()),
        "vocab_size": model.config.vocab_size,
        "tie_word_embeddings": model.config.tie_word_embeddings,
    } | {key: value for key, value in settings.items() if value is not None}


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]


def _neighbours(
    table: Tensor, ids: list[int], frequency: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    def named(i: int) -> dict[str, Any]:
        text = tokenizer.decode([i])
        # A part of a character's bytes is no text.
        return {"token": tokenizer.convert_ids_to_tokens(i) if "\ufffd" in text else text, "id": i}

    found, words = nearest_neighbours(table, ids, min(NUM_NEIGHBOURS, len(table) - 1)), []
    for i, near, cosines in zip(ids, found.ids.tolist(), found.cosines, strict=True):
        others = [named(j) | {"cosine": cosine} for j, cosine in zip(near, _rounded(cosines), strict=True)]
        words.append(named(i) | {"count": int(frequency[i]), "neighbours": others})
    return words


def text_settings(args: argparse.Namespace, trained_on: Mapping[str, Any], num_positions: int) -> TextSettings:
    """What to read and how to cut it: as in training, of whose `data` section this is, unless the command says else.

    Raises:
        ValueError: If neither names a text, or a sequence is longer than the model has positions.
    """
    cut = {} if args.context_length is None else {"context_length": args.context_length}
    cut["num_validation_sequences"] = sys.maxsize if args.num_sequences is None else args.num_sequences
    settings = {"context_length": num_positions} | dict(trained_on) | cut
    if args.data is not None:
        settings = {"train": args.data, "validation": args.data} | settings | {"dataset": None, args.split: args.data}
    elif "train" not in settings:
        raise ValueError(f"{args.model} does not say what it was trained on (no training.json); give --data.")
    if settings["context_length"] > num_positions:
        raise ValueError(
            f"sequences of {settings['context_length']} tokens are longer than the model's {num_positions} positions; "
            f"give --context-length {num_positions} or less."
        )
    return TextSettings(**settings)


def opened(
    args: argparse.Namespace,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Dataset, np.ndarray | None, dict[str, Any]]:
    """Model, tokenizer, sequences, counts of the training and its training.json, the last two None and {} without them.

    Raises:
        ValueError: If model, text, counts and options do not fit each other.
        OSError: If one of them cannot be read.
    """
    model, tokenizer = load(args.model, args.device, args.dtype)
    records = [args.model / name for name in ("training.json", "run.json")]
    training, started = (json.loads(each.read_text(encoding="utf-8")) if each.is_file() else {} for each in records)
    trained_on = training.get("data", {}) | started.get("settings", {}).get("data", {})  # whose paths are whole
    settings = text_settings(args, trained_on, max_length(model))
    beside = args.model / "token_counts.safetensors"
    path = args.counts or (beside if beside.is_file() else None)
    counts = None if path is None else read_counts(path, model.config.vocab_size)
    try:
        sequences = validation_sequences(settings, tokenizer, args.split)
    except (ValueError, OSError) as error:
        if args.data is not None or started:
            raise
        why = f"{args.model}/training.json has but names of files elsewhere, and no run.json beside it; give --data."
        raise ValueError(f"{error} {why}") from error
    return model, tokenizer, sequences, counts, training


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Does what the command says; returns what language.json holds."""
    model, tokenizer, sequences, counts, training = opened(args)
    results = evaluate(model, tokenizer, sequences, counts, args.words, args.batch_size)
    given = {key: relative(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    given["data"] = relative(args.data or training["data"][args.split])
    results |= {"config": given, "provenance": provenance()}
    args.out.mkdir(parents=True, exist_ok=True)
    language_figures.draw_all(args.out, results, model.get_input_embeddings(), counts, training)
    write_json(args.out / "language.json", results)
    print(summary_text(results))
    print(f"Numbers are in {args.out / 'language.json'}, pictures beside it.")
    return results


def summary_text(results: Mapping[str, Any]) -> str:
    """What was found, for the terminal."""
    data, model, shares = results["data"], results["model"], results["embedding"]["explained"]
    lines = [
        f"{data['num_targets']:,} tokens ({data['num_bytes']:,} bytes) in {data['num_sequences']:,} sequences; "
        f"{model['num_parameters']:,} parameters, {model['embedding_parameters']:,} of them in the embedding, "
        f"three principal components of which hold {100 * sum(shares[:3]):.1f} % of its variance"
    ]
    for name in ("loss", "perplexity", "bits_per_byte"):
        mean, low, high = results[name].values()
        between = "" if low is None else f" ({low:,.4g} to {high:,.4g})"
        lines.append(f"{name.replace('_', ' '):>24} {mean:,.4g}{between}")
    for band in results["bands"] or []:
        if band["num_targets"]:
            seen = f"seen {language_figures.span(band['low'], band['high'])}"
            lines.append(f"{seen:>24} {band['perplexity']:,.4g}, {band['num_targets']:,} tokens")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a trained model with its tokenizer")
    add("--data", help="file, folder or glob of documents in place of the split's; default: those of the training")
    add("--split", choices=("validation", "test"), default="test", help="of the training's text; default: test")
    add("--context-length", type=int, help="tokens of a sequence; default: as in training, or all positions")
    add("--num-sequences", type=int, help="only the first so many; default: all of the split")
    add("--counts", type=Path, help="token_counts.safetensors of the training; default: that beside the model")
    add("--words", nargs="+", help="whose nearest neighbours to give; default: tokens of all frequencies")
    add("--batch-size", type=int, default=8, help="sequences in one forward pass; default: %(default)s")
    add("--out", type=Path, required=True, help="folder for language.json and pictures")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the weights; default: as saved")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    try:
        run(parse(arguments))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
