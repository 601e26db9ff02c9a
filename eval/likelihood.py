"""Likelihoods of text under a causal model, in nats: of tokens, of continuations, of whole documents.

Texts are cut into tokens, contexts and windows as EleutherAI's lm-evaluation-harness does, so that the numbers are its
numbers; see `eval.lm_harness` for the harness itself.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from leviathan import LeviathanForCausalLM
from training.tokenizer import num_ids

LOGITS_AT_ONCE = 2**24  # logits of a Leviathan that exist at one time
IGNORED = -100  # a target that is padding


def token_losses(
    model: PreTrainedModel, sequences: Tensor, batch_size: int = 8, position_ids: Tensor | None = None
) -> Tensor:
    r"""Cross entropy :math:`-\log p(x_{t+1} | x_1 .. x_t)` in nats of every token but the first, of each sequence.

    Args:
        model: A causal language model; its mode (training or evaluation) is left as it was.
        sequences: Token ids (N, T) without padding.
        batch_size: Sequences in one forward pass.
        position_ids: Positions (N, T). Documents packed into a sequence start again at 0 and do not see one another;
            the first token of one is predicted from the last one of the document before it.

    Returns:
        (N, T - 1) float32 on the CPU.

    Raises:
        ValueError: If the shapes are others, a sequence is longer than the model's positions, an id is none of its or
            `batch_size` is below one.
    """
    if sequences.dim() != 2 or sequences.shape[1] < 2 or sequences.is_floating_point():
        raise ValueError(
            f"sequences has shape {tuple(sequences.shape)} and dtype {sequences.dtype}; expected integer ids of shape "
            "(sequences, tokens) with two tokens or more."
        )
    if position_ids is not None and position_ids.shape != sequences.shape:
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; expected that of sequences, {tuple(sequences.shape)}."
        )
    if sequences.shape[1] - 1 > max_length(model):  # the last token is only predicted
        raise ValueError(
            f"sequences of {sequences.shape[1]} tokens are longer than the {max_length(model)} positions of the model "
            "and the one token behind them; cut them."
        )
    sequences = sequences.long()
    _check_ids(sequences, model)
    losses = torch.empty(len(sequences), sequences.shape[1] - 1)
    with _evaluation(model):
        for rows in _batches(len(sequences), batch_size):
            positions = None if position_ids is None else position_ids[rows, :-1]
            found, _ = _score(model, sequences[rows, :-1], sequences[rows, 1:], positions)
            losses[rows] = found.view_as(losses[rows])
    return losses


def continuation_loglikelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], batch_size: int = 8
) -> list[tuple[float, bool]]:
    r"""Log-likelihood :math:`\log p(\mathrm{continuation} | \mathrm{context})` in nats of each pair of texts.

    The tokens are those of context and continuation written together, without those of the context alone, whose spaces
    at the end count to the continuation. A context too long for the model loses its beginning; an empty one is the
    tokenizer's first token (bos, or else eos).

    Returns:
        For each (context, continuation) its log-likelihood, and whether every token of the continuation is the
        likeliest one.

    Raises:
        ValueError: If a continuation has no token or more than the model has positions, the tokenizer has ids that the
            model does not have, or no first token, or `batch_size` is below one.
    """
    check_vocabulary(tokenizer, model)
    encoded = []
    for i, (context, continuation) in enumerate(pairs):
        given, predicted = _encode_pair(tokenizer, context, continuation)
        if not (continuation and predicted):
            raise ValueError(
                f"pairs[{i}]: the continuation {continuation!r} adds no token to its context; give one that does."
            )
        if len(predicted) > max_length(model):
            raise ValueError(
                f"pairs[{i}]: the continuation has {len(predicted)} tokens and the model {max_length(model)} "
                "positions; only contexts can be cut. Split it, or take `document_loglikelihood`."
            )
        encoded.append((given, predicted))
    return _score_all(model, encoded, batch_size)


def document_loglikelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    context_length: int | None = None,
    batch_size: int = 8,
) -> list[float]:
    r"""Log-likelihood :math:`\sum_t \log p(x_t | x_{s(t)} .. x_{t-1})` in nats of each document, window by window.

    Every token is predicted once. Windows of `context_length` predicted tokens follow each other, each read from the
    last token of the one before it; the first from the tokenizer's first token (bos, or else eos). The last window, if
    it is shorter, reads back as far as `context_length` allows. An empty text has log-likelihood 0.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        texts: Whole documents.
        context_length: Tokens that the model reads at one time; None is all that it has positions for.
        batch_size: Windows in one forward pass.

    Raises:
        ValueError: If the model does not have `context_length` positions, the tokenizer has ids that the model does not
            have, or no first token, or `batch_size` is below one.
    """
    check_vocabulary(tokenizer, model)
    length = max_length(model) if context_length is None else context_length
    if not 1 <= length <= max_length(model):
        raise ValueError(f"context_length = {length}; expected 1 to the model's {max_length(model)} positions.")
    first = first_token(tokenizer)
    windows = [_windows(_encode(tokenizer, text), first, length) for text in texts]
    scores = iter(_score_all(model, [window for document in windows for window in document], batch_size))
    return [sum((next(scores)[0] for _ in document), 0.0) for document in windows]


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuses a tokenizer that has ids which the model does not have; a model may have more.

    Raises:
        ValueError: Naming both sizes.
    """
    size = num_ids(tokenizer)
    if size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {size} ids and the model {model.config.vocab_size} (vocab_size); take both from one "
            "run, or give the model the others with resize_token_embeddings and train it."
        )


def max_length(model: PreTrainedModel) -> int:
    """Tokens that the model can read at one time."""
    return getattr(model.config, "max_position_embeddings", sys.maxsize)  # recurrent models have no bound


def first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id from which the first token of a text is predicted: bos, or else eos.

    Raises:
        ValueError: If the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError("the tokenizer has no bos and no eos token to predict a first token from; set bos_token.")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    begun = text.startswith(tokenizer.decode(first_token(tokenizer)))  # which needs no second one
    return tokenizer.encode(text, add_special_tokens=not begun, verbose=False)


def _encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    first = first_token(tokenizer)
    if context == "":
        predicted = tokenizer.encode(continuation, add_special_tokens=False, verbose=False)
        return (predicted[:1], predicted[1:]) if predicted[:1] == [first] else ([first], predicted)
    stripped = context.rstrip()
    whole, given = _encode(tokenizer, context + continuation), _encode(tokenizer, stripped)
    return given or [first], whole[len(given) :]


def _windows(tokens: list[int], first: int, length: int) -> list[tuple[list[int], list[int]]]:
    """Pairs of tokens given and predicted, `length` + 1 together at most."""
    whole, windows = [first, *tokens], []
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        windows.append((whole[max(0, stop - length) : start + 1], tokens[start:stop]))
    return windows


def _score_all(
    model: PreTrainedModel, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> list[tuple[float, bool]]:
    """Log-likelihood and greediness of the second list of tokens behind the first, of each pair."""
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))  # little padding, and the longest first
    results = [(0.0, True)] * len(pairs)
    with _evaluation(model):
        for batch in _batches(len(order), batch_size):
            rows = order[batch]
            whole = [(pairs[i][0] + pairs[i][1])[-max_length(model) - 1 :] for i in rows]
            counts = [len(pairs[i][1]) for i in rows]
            width = max(map(len, whole)) - 1
            # Padding stands behind all that counts, where causal attention does not look.
            input_ids = torch.tensor([ids[:-1] + [0] * (width + 1 - len(ids)) for ids in whole])
            targets = torch.full_like(input_ids, IGNORED)
            for row, (ids, count) in enumerate(zip(whole, counts, strict=True)):
                targets[row, len(ids) - 1 - count : len(ids) - 1] = torch.tensor(ids[-count:])
            losses, likeliest = (each.split(counts) for each in _score(model, input_ids, targets))
            for i, loss, greedy in zip(rows, losses, likeliest, strict=True):
                results[i] = (-float(loss.double().sum()), bool(greedy.all()))
    return results


def _score(
    model: PreTrainedModel, input_ids: Tensor, targets: Tensor, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Losses in nats, and whether it is the likeliest id, of each target that is not IGNORED, in order, on the CPU.

    Shapes: (batch, tokens) each -> (targets,) twice.
    """
    wanted = targets != IGNORED
    chunks = _logits(model, input_ids.to(model.device), wanted.to(model.device), position_ids)
    losses, likeliest, start, truth = [], [], 0, targets[wanted].to(model.device)
    for logits in chunks:
        target = truth[start : start + len(logits)]
        losses.append(F.cross_entropy(logits.float(), target, reduction="none"))
        likeliest.append(logits.argmax(-1) == target)
        start += len(logits)
    return torch.cat(losses).cpu(), torch.cat(likeliest).cpu()


def _logits(model: PreTrainedModel, input_ids: Tensor, wanted: Tensor, position_ids: Tensor | None) -> Iterator[Tensor]:
    """Logits (some, vocabulary) of the wanted places, in order: those of a batch may not fit into memory together."""
    positions = None if position_ids is None else position_ids.to(input_ids.device)
    if isinstance(model, LeviathanForCausalLM):
        hidden = model.model(input_ids, position_ids=positions, use_cache=False).last_hidden_state[wanted]
        yield from map(model.output_head(), hidden.split(max(1, LOGITS_AT_ONCE // model.config.vocab_size)))
        return
    for row in range(len(input_ids)):
        of_row = None if positions is None else positions[row : row + 1]
        logits = model(input_ids[row : row + 1], position_ids=of_row, use_cache=False).logits
        yield logits[0, wanted[row]]


def _check_ids(ids: Tensor, model: PreTrainedModel) -> None:
    size = model.config.vocab_size
    if len(outside := ids[(ids < 0) | (ids >= size)]):
        raise ValueError(f"sequences hold the id {int(outside[0])}; the model has ids 0 to {size - 1}.")


@contextlib.contextmanager
def _evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout and gradients, and back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _batches(count: int, batch_size: int) -> Iterator[slice]:
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}; expected at least 1.")
    for start in tqdm(range(0, count, batch_size), desc="likelihood", unit="batch", disable=None):  # on a terminal
        yield slice(start, start + batch_size)
