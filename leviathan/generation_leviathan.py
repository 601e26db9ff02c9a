# Copyright 2026 The leviathan-sna authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Rollouts of fields: prior state in, next states out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.generation import LogitsProcessor
from transformers.modeling_utils import PreTrainedModel

from .decoding_leviathan import DETERMINISTIC, RANDOM, Decoder, Sampler, Sampling, checked, expected_ids
from .tokenization_leviathan import FieldTokenizer, check_scale

if TYPE_CHECKING:
    from .modeling_leviathan import LeviathanForCausalLM


class ExpectationLogitsProcessor(LogitsProcessor):
    """Leaves one id, [`expected_ids`]: greedy decoding behind it is the paper's "expectation" sampling, for `generate`.

    Shapes: scores (batch, vocabulary) -> (batch, vocabulary), 0 at the id left and -inf elsewhere.
    """

    supports_continuous_batching = False

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Maps each row's scores to those of its expected id."""
        expected = checked(expected_ids(scores))
        chosen = torch.full_like(scores, -torch.inf).scatter_(-1, expected.unsqueeze(-1), 0.0)
        return chosen  # type: ignore[return-value]  # torch's operations do not tell their result's dtype


@torch.no_grad()
def rollout(
    model: LeviathanForCausalLM,
    tokenizer: FieldTokenizer,
    fields: np.ndarray | torch.Tensor,
    num_steps: int = 20,
    sampling: Sampling = "expectation",
    top_k: int = 50,
    top_p: float = 0.9,
    temperature: float = 1.0,
    seed: int | None = None,
    num_samples: int = 1,
    batch_size: int = 256,
    block_size: int = 1,
    tolerance: int = 0,
    use_cache: bool = True,
    progress: bool = True,
) -> torch.Tensor:
    r"""Free autoregression of fields: each state generated token by token from the one before it.

    Every patch is a stream of its own: :math:`p(t)` is the bidirectional prefix from which the tokens of
    :math:`p(t+1)` are drawn, and then becomes the next prefix (arXiv 2603.12244). With a margin (of the tokenizer), all
    patches of a periodic field take a step, are stitched, and each reads what flows in from its neighbours.

    Args:
        model: A [`LeviathanForCausalLM`].
        tokenizer: The tokenizer that it was trained with.
        fields: Initial states (batch, height, width) or (height, width), in the field's unit; sides multiples of the
            patch.
        num_steps: States to generate.
        sampling: ``"expectation"`` (expected level, re-quantised; deterministic), ``"greedy"`` (most likely level;
            deterministic), ``"top_k"``, ``"top_p"`` or ``"sample"`` (the whole distribution).
        top_k: Levels kept by ``"top_k"``.
        top_p: Probability kept by ``"top_p"``.
        temperature: Divides the logits of the random samplings.
        seed: Seeds the random samplings, whose every token is a function of its logits and one uniform number: same
            seed, same result, and the global generator is left as it was. None draws from the global generator.
        num_samples: Independent rollouts of each field.
        batch_size: Patches in one forward pass.
        block_size: Tokens decoded at one time, by Jacobi iteration from the prior state ([`Decoder.by_blocks`]): the
            same result, up to rounding of the logits, in fewer passes where states change little. Pays where a pass
            over several tokens costs about as much as over one: on a GPU, or with few patches.
        tolerance: Levels by which decoding by blocks may miss its own fixed point and stop: fewer passes, and no longer
            the same result. 0 is exact.
        use_cache: Keep keys and values of earlier tokens. Without, the result is the same and slower.
        progress: Show a progress bar.

    Returns:
        (batch, num_steps, height, width) float32 on the CPU, in the field's unit; with ``num_samples > 1`` (batch,
        num_samples, num_steps, height, width).

    Raises:
        ValueError: If model and tokenizer do not fit each other, on fields that the tokenizer refuses, that have no
            room for its margin or another scale than its data, on unknown or out-of-range options, or on several
            samples of a deterministic sampling.
    """
    _check_fit(model, tokenizer)
    _check_options(num_steps, sampling, top_k, top_p, temperature, num_samples, batch_size, block_size)
    if block_size > 1 and not use_cache:
        raise ValueError(f"block_size = {block_size} needs the cache; leave use_cache=True.")
    if tolerance < 0 or (tolerance and block_size == 1):
        raise ValueError(f"tolerance = {tolerance} with block_size = {block_size}; expected 0, or larger blocks.")
    ids = tokenizer(fields, return_tensors="pt")["input_ids"]
    if tokenizer.rms is not None:
        check_scale(fields, tokenizer.rms)
    height, width = np.shape(fields)[-2:]
    patches = (height // tokenizer.patch_size) * (width // tokenizer.patch_size)
    num_fields = ids.shape[0] // patches
    # (fields, samples, patches, tokens): every sample is a stream of its own
    ids = ids.view(num_fields, 1, patches, -1).repeat(1, num_samples, 1, 1).flatten(0, 2)
    unseeded = seed is None and sampling in RANDOM
    generator = torch.default_generator if unseeded else torch.Generator().manual_seed(seed or 0)

    was_training = model.training
    model.eval()
    states = []
    try:
        _bake(model, num_tokens=num_steps * ids.numel())
        sampler = Sampler(model.output_head(), tokenizer.vocab_size, sampling, top_k, top_p, temperature)
        centre = torch.from_numpy(tokenizer.centre())
        decoder = Decoder(model, sampler, tokenizer.tokens_per_patch, block_size, centre, tolerance)
        decode = decoder if use_cache else decoder.without_cache
        with tqdm(
            total=num_steps * ids.numel(), desc="rollout", unit="tok", unit_scale=True, disable=not progress
        ) as bar:
            for _ in range(num_steps):
                uniform = (
                    torch.rand(ids.shape, generator=generator, dtype=torch.float64) if sampling in RANDOM else None
                )
                batches = []
                prefix = tokenizer.prefix(ids, (height, width))
                for i in range(0, len(ids), batch_size):
                    rows = slice(i, i + batch_size)
                    numbers = None if uniform is None else uniform[rows].to(model.device)
                    batches.append(decode(prefix[rows].to(model.device), numbers).cpu())
                    bar.update(batches[-1].numel())
                ids = torch.cat(batches)
                states.append(tokenizer.decode(ids, field_shape=(height, width)))
    finally:
        model.train(was_training)
    result = torch.stack(states, dim=1).view(num_fields, num_samples, num_steps, height, width)
    return result if num_samples > 1 else result[:, 0]


def _bake(model: PreTrainedModel, num_tokens: int) -> None:
    """Bakes a generated embedding if as many tokens are read as it has, or if CUDA graphs must find it baked."""
    embedding: Any = model.get_input_embeddings()
    if hasattr(embedding, "bake") and (model.device.type == "cuda" or num_tokens >= embedding.num_embeddings):
        embedding.bake()


def _check_options(
    num_steps: int,
    sampling: str,
    top_k: int,
    top_p: float,
    temperature: float,
    num_samples: int,
    batch_size: int,
    block_size: int,
) -> None:
    if sampling not in DETERMINISTIC + RANDOM:
        raise ValueError(f"sampling = {sampling!r}; expected one of {list(DETERMINISTIC + RANDOM)}.")
    counts = {
        "num_steps": num_steps,
        "num_samples": num_samples,
        "batch_size": batch_size,
        "block_size": block_size,
    }
    for name, value in counts.items() | ({("top_k", top_k)} if sampling == "top_k" else set()):
        if value < 1:
            raise ValueError(f"{name} = {value}; expected at least 1.")
    if sampling == "top_p" and not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}; expected a probability above 0.")
    if sampling in RANDOM and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature = {temperature}; expected a positive number.")
    if num_samples > 1 and sampling in DETERMINISTIC:
        raise ValueError(f"sampling = {sampling!r} is deterministic: num_samples = {num_samples} would all be equal.")


def _check_fit(model: PreTrainedModel, tokenizer: FieldTokenizer) -> None:
    if model.config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"the model has {model.config.vocab_size} ids and the tokenizer {tokenizer.vocab_size}; load both from the "
            "same checkpoint."
        )
    needed = tokenizer.tokens_per_prefix + tokenizer.tokens_per_patch
    if model.config.max_position_embeddings < needed:
        raise ValueError(
            f"states of {tokenizer.patch_size} x {tokenizer.patch_size} pixels, with a margin of {tokenizer.margin} in "
            f"the first, need {needed} positions; the model has max_position_embeddings = "
            f"{model.config.max_position_embeddings}."
        )
    patch = (model.config.patch_size, model.config.patch_margin)
    if model.config.position_layout == "window" and patch != (tokenizer.patch_size, tokenizer.margin):
        raise ValueError(
            f"the model's positions are those of patches of {patch[0]} with a margin of {patch[1]}, the tokenizer's "
            f"patches are of {tokenizer.patch_size} with {tokenizer.margin}; load both from the same checkpoint."
        )


__all__ = ["ExpectationLogitsProcessor", "rollout"]
