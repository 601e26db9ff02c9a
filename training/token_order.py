"""Finds digits that mean something: an order of the tokens in which those that are used alike share digits.

    python -m training.token_order --config training/configs/text_tiny_cpu.yaml --out runs/text/order.safetensors

Tokens are described by the company they keep: counts of which stand near which in the training text, their positive
pointwise mutual information, and its leading factors (Levy, Goldberg and Dagan 2015). `training.assignment` lays the
factors out on the grid of digits. The file holds order and factors; a JSON file beside it says how good they are, and
shows some tokens of some digits. Base and number of digits are those of the model that the config describes. The
methods `random` and `identity`, which are controls, read no text: their file holds no factors, and nothing is measured.
"""

import argparse
import dataclasses
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import scipy.sparse as sparse
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sna_core.digits import MOST_DIGITS, digit_layout, to_digits
from training.assignment import CONTROLS, Method, assign, order_quality
from training.provenance import provenance, relative, write_json
from training.settings import read_settings
from training.text import encoded_documents, separator_id
from training.trainer import TrainingSettings

if TYPE_CHECKING:
    from training.text_task import TextTask  # which itself reads orders

CHUNK_TOKENS = 2**20
MAX_PAIRS = 2**26  # 9 GiB at the peak, which is in `ppmi`: some 150 bytes a pair
OVERSAMPLING, NUM_POWER_ITERATIONS = 16, 6
EXAMPLE_VALUES, EXAMPLE_TOKENS = 12, 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderSettings:
    """How an order is made.

    Attributes:
        method: See `training.assignment.assign`.
        num_tokens: Tokens of training text that are read, at most.
        window: Greatest distance at which two tokens count as near.
        dim: Number of factors.
        base: Base of the digits. None is the model's.
        num_digits: Number of digits. None is the model's.
        seed: Of all that is drawn.

    Raises:
        ValueError: If a number is less than 1.
    """

    method: Method = "kmeans"
    num_tokens: int = 50_000_000
    window: int = 5
    dim: int = 64
    base: int | None = None
    num_digits: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_tokens", "window", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; expected at least 1.")


@dataclasses.dataclass(frozen=True, eq=False)
class TokenOrder:
    """What a file of an order holds.

    Attributes:
        order: The position of each token, whose digits stand for it: (V,) int64, all distinct.
        factors: What the order was made from: (V, d) float32, with d = 0 if from nothing.
    """

    order: Tensor
    factors: Tensor


def cooccurrence(
    sequences: Iterable[np.ndarray],
    vocab_size: int,
    window: int,
    separator: int | None = None,
    *,
    max_pairs: int = MAX_PAIRS,
    chunk_tokens: int = CHUNK_TOKENS,
) -> sparse.csr_array:
    """Counts n(a, b) = Σ 1 / |i − j| over places i ≠ j of a document with tokens a, b at most `window` apart.

    The matrix is symmetric: each pair of places counts once in n(a, b) and once in n(b, a).

    Args:
        sequences: Ids `(n,)` of tokens; no pair reaches from one sequence to another.
        vocab_size: V.
        window: Greatest distance.
        separator: An id between documents, which stands near nothing and lets nothing through.
        max_pairs: Different pairs of tokens that are kept at one time; beyond it those with the least counts are left
            out, and a warning says so.
        chunk_tokens: Tokens whose pairs are held before they are summed up; does not change the result.

    Returns:
        `(V, V)` float64.

    Raises:
        ValueError: If an id lies outside of the vocabulary, or a number is not positive.
    """
    if window < 1 or vocab_size < 1 or max_pairs < 1:
        raise ValueError(f"window = {window}, vocab_size = {vocab_size}, max_pairs = {max_pairs}; expected at least 1.")
    total, num_dropped = sparse.csr_array((vocab_size, vocab_size)), 0
    for ids, documents, fresh in _chunks(sequences, window, separator, max(window, chunk_tokens)):
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
            wrong = int(ids.min() if ids.min() < 0 else ids.max())
            raise ValueError(
                f"token id {wrong} lies outside [0, vocab_size = {vocab_size}); is it another tokenizer's?"
            )
        pairs = []
        for distance in range(1, min(window, len(ids) - 1) + 1):
            near = (documents[:-distance] == documents[distance:]) & (documents[distance:] >= 0) & fresh[distance:]
            one, other = ids[:-distance][near], ids[distance:][near]
            pairs.append((np.full(len(one), 1 / distance), np.minimum(one, other), np.maximum(one, other)))
        if not pairs:
            continue
        counts, low, high = map(np.concatenate, zip(*pairs, strict=True))
        total = total + sparse.csr_array((counts, (low, high)), shape=total.shape)  # sums up equal pairs
        if total.nnz > max_pairs:
            num_dropped += total.nnz - max_pairs
            total = _largest(total, max_pairs)
    if num_dropped:
        warnings.warn(
            f"{num_dropped} counts of rare pairs were left out, to keep no more than max_pairs = {max_pairs} of them.",
            stacklevel=2,
        )
    return sparse.csr_array(total + total.T)


def _chunks(
    sequences: Iterable[np.ndarray], window: int, separator: int | None, chunk_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ids, numbers of their documents (−1 for a separator) and whether they are here for the first time."""
    parts, size = [], 0
    for sequence in sequences:
        for start in range(0, len(sequence), chunk_tokens):
            seen = min(window, start)  # tokens that those of this part still see
            part = np.asarray(sequence[start - seen : start + chunk_tokens], dtype=np.int64)
            parts.append((part, np.arange(len(part)) == 0, np.arange(len(part)) >= seen))
            size += len(part)
            if size >= chunk_tokens:
                yield _numbered(parts, separator)
                parts, size = [], 0
    if parts:
        yield _numbered(parts, separator)


def _numbered(
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], separator: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids, begins, fresh = map(np.concatenate, zip(*parts, strict=True))
    separates = np.zeros(len(ids), bool) if separator is None else ids == separator
    return ids, np.where(separates, -1, np.cumsum(begins | separates)), fresh


def _largest(counts: sparse.csr_array, number: int) -> sparse.csr_array:
    entries = counts.tocoo()
    kept = np.argpartition(entries.data, -number)[-number:]
    return sparse.csr_array((entries.data[kept], (entries.row[kept], entries.col[kept])), shape=counts.shape)


def ppmi(counts: sparse.csr_array, smoothing: float = 0.75, shift: float = 0.0) -> sparse.csr_array:
    """Positive pointwise mutual information max(0, log(p(a, b) / (p(a) p_α(b))) − shift): `(V, V)` -> `(V, V)`.

    p_α(b) ∝ p(b)^α with α = `smoothing` takes away some of the weight that rare contexts otherwise get. Source: Levy,
    Goldberg and Dagan 2015, sections 2 and 3.

    Raises:
        ValueError: If there are no counts.
    """
    if not counts.nnz:
        raise ValueError("no two tokens stand near each other; the text needs documents of two tokens or more.")
    entries = counts.tocoo()
    tokens, contexts = counts.sum(1), counts.sum(0) ** smoothing
    information = np.log(entries.data * contexts.sum() / (tokens[entries.row] * contexts[entries.col])) - shift
    kept = information > 0
    return sparse.csr_array((information[kept], (entries.row[kept], entries.col[kept])), shape=counts.shape)


def factors(matrix: sparse.csr_array, dim: int, seed: int = 0) -> np.ndarray:
    """The rows of U √S of the truncated singular value decomposition M ≈ U S Vᵀ: `(V, n)` -> `(V, dim)` float64.

    By power iteration on a random subspace (Halko, Martinsson and Tropp 2011, algorithm 4.4). Signs are those that make
    the entry of largest magnitude in each column positive. Rows of zeros give rows of zeros.

    Raises:
        ValueError: If the matrix has no `dim` singular values.
    """
    if not 1 <= dim <= min(matrix.shape):
        raise ValueError(f"dim = {dim}; expected 1 to {min(matrix.shape)}, the size of the matrix.")
    width = min(dim + OVERSAMPLING, *matrix.shape)
    subspace = np.linalg.qr(matrix @ np.random.default_rng(seed).standard_normal((matrix.shape[1], width)))[0]
    for _ in range(NUM_POWER_ITERATIONS):
        subspace = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ subspace)[0])[0]
    left, singular, _ = np.linalg.svd((matrix.T @ subspace).T, full_matrices=False)
    rows = (subspace @ left[:, :dim]) * np.sqrt(singular[:dim])
    rows[np.diff(matrix.indptr) == 0] = 0  # but for rounding they are
    return rows * np.where(rows[np.abs(rows).argmax(0), np.arange(dim)] < 0, -1, 1)


def save_order(path: str | Path, order: np.ndarray, rows: np.ndarray, settings: dict[str, Any]) -> None:
    """Writes `order` `(V,)` and `factors` `(V, d)` to a safetensors file, with the settings as its metadata.

    Among the settings are `base` and `num_digits`, by which the positions are checked when they are read.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    tensors = {"order": order.astype(np.int64), "factors": rows.astype(np.float32)}
    save_file(tensors, partial, metadata={"settings": json.dumps(settings)})  # one entry: they have no fixed order
    partial.replace(path)


def load_order(path: str | Path, vocab_size: int) -> TokenOrder:
    """Reads an order of `vocab_size` tokens.

    Raises:
        ValueError: If the file is none of an order, it is of another number of tokens, two tokens have one position, or
            one lies outside of what the digits number that the file speaks of.
        FileNotFoundError: If there is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; `python -m training.token_order --out {path}` makes one.")
    try:
        with safe_open(path, "pt") as file:
            order, rows = file.get_tensor("order"), file.get_tensor("factors")
            settings = json.loads((file.metadata() or {}).get("settings", "{}"))
    except (SafetensorError, RecursionError) as error:
        raise ValueError(f"{path} is no order of `training.token_order` ({error}); make it again.") from error
    if order.dtype != torch.int64 or order.shape != (vocab_size,):
        raise ValueError(
            f"{path}: order has shape {tuple(order.shape)} and dtype {order.dtype}; expected an int64 for each of the "
            f"model's {vocab_size} tokens. Make it with this tokenizer and model."
        )
    if rows.dim() != 2 or len(rows) != vocab_size or not rows.is_floating_point():
        raise ValueError(
            f"{path}: factors have shape {tuple(rows.shape)} and dtype {rows.dtype}; expected ({vocab_size}, d) of "
            "floating-point numbers. Make the file again."
        )
    num_positions = _num_positions(settings, path) if settings else math.inf
    if len(outside := order[(order < 0) | (order >= num_positions)]):
        raise ValueError(f"{path}: position {int(outside[0])} lies outside [0, {num_positions}); make the file again.")
    if len(order.unique()) < vocab_size:
        raise ValueError(f"{path} gives two tokens the same position; make the file again.")
    return TokenOrder(order, rows)


def _num_positions(settings: Any, path: str | Path) -> int:
    told = (settings.get("base"), settings.get("num_digits")) if isinstance(settings, dict) else (None, None)
    if not all(isinstance(number, int) for number in told) or not (
        2 <= told[0] < 2**63 and 1 <= told[1] <= MOST_DIGITS
    ):
        raise ValueError(f"{path} speaks of (base, num_digits) = {told!s:.80}; expected those of ids. Make it again.")
    return told[0] ** told[1]


def examples(
    tokenizer: PreTrainedTokenizerBase, counts: np.ndarray, order: np.ndarray, base: int, num_digits: int
) -> list[dict[str, list[str]]]:
    """For each digit, some of its values with the most frequent tokens that have it, as text."""
    digits = to_digits(torch.from_numpy(order), base, num_digits).numpy()
    by_count = np.argsort(-counts, kind="stable")
    by_count = by_count[counts[by_count] > 0]
    shown = np.unique(np.linspace(0, base - 1, EXAMPLE_VALUES).round().astype(int))
    found = []
    for column in digits[by_count].T:
        tokens = {int(value): by_count[column == value][:EXAMPLE_TOKENS] for value in shown}
        found.append({str(value): [tokenizer.decode([int(id_)]) for id_ in ids] for value, ids in tokens.items()})
    return found


def run(task: "TextTask", model: dict[str, Any], out: str | Path, options: OrderSettings) -> dict[str, Any]:
    """Makes the order for text and tokenizer of a task, and writes it: what the JSON file says of it.

    Args:
        task: A run on text.
        model: The model's settings.
        out: File to write.
        options: How the order is made.

    Raises:
        ValueError: If something in the settings does not fit.
        OSError: If text or tokenizer cannot be read.
    """
    if Path(out).suffix != ".safetensors":
        raise ValueError(f"the order is to be written to {out}; expected a name that ends in .safetensors.")
    tokenizer = task.tokenizer
    vocab_size = task.model_options(model)["vocab_size"]
    base, num_digits = digit_layout(
        vocab_size,
        model.get("embedding_base") if options.base is None else options.base,
        model.get("embedding_num_digits") if options.num_digits is None else options.num_digits,
    )
    chosen = dataclasses.asdict(options) | {
        "base": base,
        "num_digits": num_digits,
        "vocab_size": vocab_size,
        "tokenizer": relative(task.given.path),
    }
    if options.method in CONTROLS:
        rows, measured = np.empty((vocab_size, 0)), {}
        order = assign(rows, np.zeros(vocab_size), base, num_digits, options.method, options.seed)
        chosen |= {"tokens_read": 0, "tokens_seen": 0}
    else:
        rows, counts, num_tokens = describe_tokens(task, vocab_size, options)
        order, shuffled = (
            assign(rows, counts, base, num_digits, method, options.seed) for method in (options.method, "random")
        )
        chosen |= {"tokens_read": num_tokens, "tokens_seen": int((counts > 0).sum())}
        measured = {
            "quality": dataclasses.asdict(order_quality(rows, counts, order, base, num_digits)),
            "quality_of_random_order": dataclasses.asdict(order_quality(rows, counts, shuffled, base, num_digits)),
            "examples": examples(tokenizer, counts, order, base, num_digits),
        }
    found = {"settings": chosen} | measured | {"provenance": provenance(options.seed)}
    save_order(out, order, rows, chosen)
    write_json(Path(out).with_suffix(".json"), found)
    return found


def describe_tokens(task: "TextTask", vocab_size: int, options: OrderSettings) -> tuple[np.ndarray, np.ndarray, int]:
    """Factors `(V, dim)` and counts `(V,)` of the tokens in the text of training, and how many tokens were read."""
    num_tokens = 0

    def sequences() -> Iterator[np.ndarray]:
        nonlocal num_tokens
        with tqdm(total=options.num_tokens, unit=" tokens", unit_scale=True, disable=None) as bar:
            for ids, _ in encoded_documents(task.data.documents("train"), task.tokenizer):
                ids = ids[: options.num_tokens - num_tokens]
                num_tokens += len(ids)
                bar.update(len(ids))
                yield ids
                if num_tokens >= options.num_tokens:
                    return

    near = cooccurrence(sequences(), vocab_size, options.window, separator_id(task.tokenizer))
    # Counts are weighted by distance; a separator has none.
    return factors(ppmi(near), options.dim, options.seed), near.sum(1), num_tokens


def summary(found: dict[str, Any]) -> str:
    """The qualities, where there are some, as lines of text."""
    settings = found["settings"]
    if "quality" not in found:
        return f"{settings['num_digits']} digits of base {settings['base']}, {settings['method']}; no text was read"
    lines = [
        f"{settings['tokens_read']:,} tokens read, {settings['tokens_seen']:,} of {settings['vocab_size']:,} kinds; "
        f"{settings['num_digits']} digits of base {settings['base']}",
        f"{'':>10} {'explained':>10}  by digit, alone     cosine, same digit   cosine, next digit",
    ]
    for name, key in ((settings["method"], "quality"), ("random", "quality_of_random_order")):
        each = found[key]
        columns = (" ".join(f"{value:6.3f}" for value in each[column]) for column in list(each)[1:])
        lines.append(f"{name:>10} {each['explained_variance']:>10.4f}  " + "  ".join(f"{text:<19}" for text in columns))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    from training.train import allowed_keys, build_task  # which itself reads orders

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="a run on text, as for training.train")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    for field in dataclasses.fields(OrderSettings):
        choices = get_args(Method) if field.name == "method" else None
        kind = str if choices else int
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, choices=choices, default=field.default)
    known, flags = parser.parse_known_args(arguments)
    options = {field.name: getattr(known, field.name) for field in dataclasses.fields(OrderSettings)}
    try:
        settings = read_settings(known.config, flags, allowed_keys())
        if (kind := settings["data"].get("kind")) != "text":
            raise ValueError(f"{known.config}: data.kind = {kind!r}; an order is made for a run on text.")
        task = build_task(settings, TrainingSettings(use_cpu=True))  # nothing is trained
        found = run(task, settings["model"], known.out, OrderSettings(**options))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(summary(found))
    return found


if __name__ == "__main__":
    main()
