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

from typing import Literal

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.generation import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.modeling_utils import PreTrainedModel

from .tokenization_leviathan import FieldTokenizer

Sampling = Literal["expectation", "greedy", "top_k", "top_p", "sample"]
DETERMINISTIC = ("expectation", "greedy")
RANDOM = ("top_k", "top_p", "sample")


class ExpectationLogitsProcessor(LogitsProcessor):
    r"""Leaves one id: the one whose level holds the expected value, :math:`\mathrm{round}(\sum_v p_v v)`.

    Level centres are evenly spaced, so the expectation of the centres re-quantised is the expectation of the ids
    rounded. Greedy decoding behind this processor is the paper's "expectation" sampling (arXiv 2603.12244, figure 5).

    Shapes: scores (batch, vocabulary) -> (batch, vocabulary), 0 at the id left and -inf elsewhere.
    """

    supports_continuous_batching = False

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Maps each row's scores to those of its expected id."""
        dtype = torch.float64 if scores.device.type != "mps" else torch.float32
        ids = torch.arange(scores.shape[-1], device=scores.device, dtype=dtype)
        expected = (scores.softmax(-1, dtype=dtype) @ ids).round()
        if not expected.isfinite().all():
            raise ValueError("the model's scores are not finite; its weights are broken or its dtype too narrow.")
        expected = expected.long()
        return torch.full_like(scores, -torch.inf).scatter_(-1, expected.unsqueeze(-1), 0.0)


@torch.no_grad()
def rollout(
    model: PreTrainedModel,
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
    use_cache: bool = True,
    progress: bool = True,
) -> torch.Tensor:
    r"""Free autoregression of fields: each state generated token by token from the one before it.

    Every patch is a stream of its own: :math:`p(t)` is the bidirectional prefix from which the tokens of
    :math:`p(t+1)` are drawn, and then becomes the next prefix (arXiv 2603.12244).

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
        seed: Seeds the random samplings: same seed and batch_size, same result, and the global generator is left as it
            was. None draws from the global generator.
        num_samples: Independent rollouts of each field.
        batch_size: Patches in one forward pass.
        use_cache: Keep keys and values of earlier tokens. Without, the result is the same and slower.
        progress: Show a progress bar.

    Returns:
        (batch, num_steps, height, width) float32 on the CPU, in the field's unit; with ``num_samples > 1`` (batch,
        num_samples, num_steps, height, width).

    Raises:
        ValueError: If model and tokenizer do not fit each other, on fields that the tokenizer refuses, on unknown or
            out-of-range options, or on several samples of a deterministic sampling.
    """
    _check_fit(model, tokenizer)
    _check_options(num_steps, sampling, top_k, top_p, temperature, num_samples, batch_size)
    device = model.device
    ids = tokenizer(fields, return_tensors="pt")["input_ids"]
    height, width = np.shape(fields)[-2:]
    patches = (height // tokenizer.patch_size) * (width // tokenizer.patch_size)
    num_fields = ids.shape[0] // patches
    # (fields, samples, patches, tokens): every sample is a stream of its own
    ids = ids.view(num_fields, 1, patches, -1).repeat(1, num_samples, 1, 1).flatten(0, 2)

    # What is stored with the model (penalties, beams) must not bend the distribution: generate fills gaps from it.
    stored, model.generation_config = model.generation_config, GenerationConfig()
    config = GenerationConfig(
        max_new_tokens=tokenizer.tokens_per_patch,
        use_cache=use_cache,
        do_sample=sampling in RANDOM,
        temperature=float(temperature) if sampling in RANDOM else None,
        top_k=(top_k if sampling == "top_k" else 0) if sampling in RANDOM else None,
        top_p=(top_p if sampling == "top_p" else 1.0) if sampling in RANDOM else None,
        pad_token_id=0,
    )
    processors = LogitsProcessorList([ExpectationLogitsProcessor()] if sampling == "expectation" else [])

    was_training = model.training
    model.eval()
    states = []
    seeded = seed is not None and sampling in RANDOM
    devices = range(torch.cuda.device_count()) if device.type == "cuda" else []  # manual_seed reaches all of them
    try:
        with (
            torch.random.fork_rng(devices, enabled=seeded),
            tqdm(total=num_steps * ids.shape[0], desc="rollout", unit="patch", disable=not progress) as bar,
        ):
            if seeded:
                torch.manual_seed(seed)
            for _ in range(num_steps):
                batches = []
                for prefix in ids.split(batch_size):
                    prefix = prefix.to(device)
                    sequence = model.generate(
                        prefix,
                        attention_mask=torch.ones_like(prefix),
                        prefix_length=tokenizer.tokens_per_patch,
                        generation_config=config,
                        logits_processor=processors,
                    )
                    batches.append(sequence[:, tokenizer.tokens_per_patch :].cpu())
                    bar.update(prefix.shape[0])
                ids = torch.cat(batches)
                states.append(tokenizer.decode(ids, field_shape=(height, width)))
    finally:
        model.train(was_training)
        model.generation_config = stored
    result = torch.stack(states, dim=1).view(num_fields, num_samples, num_steps, height, width)
    return result if num_samples > 1 else result[:, 0]


def _check_options(
    num_steps: int, sampling: str, top_k: int, top_p: float, temperature: float, num_samples: int, batch_size: int
) -> None:
    if sampling not in DETERMINISTIC + RANDOM:
        raise ValueError(f"sampling = {sampling!r}; expected one of {list(DETERMINISTIC + RANDOM)}.")
    counts = {"num_steps": num_steps, "num_samples": num_samples, "batch_size": batch_size}
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
    needed = 2 * tokenizer.tokens_per_patch
    if model.config.max_position_embeddings < needed:
        raise ValueError(
            f"two states of {tokenizer.patch_size} x {tokenizer.patch_size} need {needed} positions; the model has "
            f"max_position_embeddings = {model.config.max_position_embeddings}."
        )


__all__ = ["ExpectationLogitsProcessor", "rollout"]
