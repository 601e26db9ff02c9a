"""Real tokens to measure with, and where they come from."""

import functools
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from eval.speed.measure import CannotRunError
from leviathan import FieldTokenizer
from training.turbulence import FlowSettings, initial_vorticity, simulate

PYTHON_DOCUMENTATION = "Python's own documentation (pydoc_data.topics)"


@functools.cache
def field_pairs(num_pairs: int, patch_size: int, num_grid: int, num_bits: int = 16, num_flows: int = 8) -> Tensor:
    """Tokens of one patch at two times, in pairs spread over our solver's flows: (num_pairs, 2 * patch_size ** 2).

    The quantiser's range is that of all the flows' values, as a training run takes it.
    """
    flow = FlowSettings(num_trajectories=num_flows, num_grid=num_grid, num_snapshots=2, warm_up_time=0.1)
    states = []  # of one flow after the other: what a GPU is for is not the solver
    for trajectory in range(num_flows):
        initial = initial_vorticity(num_grid, [trajectory], seed=flow.seed, k_tot=flow.k_tot)
        states.append(torch.cat(list(simulate(flow.solver(), initial, flow.dt_save, 2, flow.warm_up_time))))
    tokenizer = FieldTokenizer(patch_size=patch_size, num_bits=num_bits).fit(states)
    before, after = (tokenizer(torch.stack(each))["input_ids"] for each in zip(*states, strict=True))
    pairs = torch.cat([before, after], 1)
    if len(pairs) < num_pairs:
        raise ValueError(f"{num_flows} flows on a grid of {num_grid} have {len(pairs)} patches, not {num_pairs}.")
    return pairs[torch.linspace(0, len(pairs) - 1, num_pairs).long()]


def text_batch(path: Path | None, vocab_size: int, rows: int, length: int) -> tuple[Tensor, int, str]:
    """Rows of tokens (rows, length) spread over a text, the number of ids, and what the text is.

    A byte-level BPE is trained on the text itself; a short text may give it fewer ids than `vocab_size`.

    Raises:
        CannotRunError: If the text is shorter than the batch.
    """
    if path is None:
        text, source = "\n".join(topics.topics.values()), PYTHON_DOCUMENTATION
    else:
        text, source = path.read_text(encoding="utf-8"), path.name
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    ids = torch.tensor(tokenizer.encode(text).ids)
    if len(ids) < rows * length:
        raise CannotRunError(f"{source} has {len(ids)} tokens; expected {rows * length} or more, give a longer text")
    starts = torch.linspace(0, len(ids) - length, rows).long()
    return ids[starts.unsqueeze(-1) + torch.arange(length)], tokenizer.get_vocab_size(), source


def frequent_ids(vocab_size: int, rows: int, length: int) -> Tensor:
    """Ids (rows, length) drawn as words are, the n-th most frequent with a probability proportional to 1 / n (Zipf).

    Frequent ids lie anywhere in the vocabulary. For vocabularies whose tokeniser and text are not at hand.
    """
    generator = torch.Generator().manual_seed(0)
    shares = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    ranks = torch.multinomial(shares, rows * length, replacement=True, generator=generator)
    return torch.randperm(vocab_size, generator=generator)[ranks].view(rows, length)
