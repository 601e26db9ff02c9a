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
"""Masks of a Prefix-LM, for what attention without one does not cover: padding, packed documents, other backends."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask


def prefix_token_types(
    prefix_length: int | Tensor,
    num_tokens: int,
    batch_size: int,
    attention_mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Marks the first ``prefix_length`` tokens of each row that are not padding: (batch, num_tokens) of 1 and 0.

    Raises:
        ValueError: If ``prefix_length`` is neither an integer nor of shape (batch,), negative, or more than a row has.
    """
    if isinstance(prefix_length, int):
        if prefix_length < 0:
            raise ValueError(f"prefix_length = {prefix_length}; expected 0 or more tokens.")
    elif tuple(prefix_length.shape) != (batch_size,):
        raise ValueError(
            f"prefix_length has shape {tuple(prefix_length.shape)}; expected an integer or one for each of the "
            f"{batch_size} rows."
        )
    else:
        prefix_length = prefix_length.to(device).unsqueeze(-1)
    mask = torch.ones(batch_size, num_tokens, dtype=torch.bool, device=device)
    if attention_mask is not None:
        mask = attention_mask[:, :num_tokens].bool()
    place = mask.cumsum(-1)  # padding on the left holds no place
    if not torch.compiler.is_compiling() and (place[:, -1:] < prefix_length).any():
        raise ValueError(
            f"prefix_length exceeds the {int(place[:, -1].min())} tokens of a row; a prefix is part of what is "
            "given, and read in one forward pass (no shorter prefill_chunk_size)."
        )
    return ((place <= prefix_length) & mask).long()


def prefix_blocks(token_type_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Numbers the runs of ``token_type_ids == 1`` in each row, and -1 elsewhere: (batch, tokens) -> (batch, tokens).

    A run ends where ``position_ids`` restart as well, so that the prefixes of packed documents stay apart.
    """
    inside = token_type_ids == 1
    starts = inside & ~F.pad(inside[:, :-1], (1, 0))
    if position_ids is not None:
        restarts = F.pad(position_ids[:, 1:] - position_ids[:, :-1] != 1, (1, 0), value=True)
        starts = starts | (inside & restarts)
    return torch.where(inside, starts.cumsum(-1) - 1, -1)


def visible_intervals(token_type_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The columns [start, stop) that each row sees, packed documents and their prefixes included.

    A document starts where ``position_ids`` restart. Its rows see from there on: a row of a prefix to the prefix's end,
    any other to itself. Both ends never fall from a row to the next.

    Shapes: (batch, tokens) twice -> (batch, tokens) twice.
    """
    place = torch.arange(token_type_ids.shape[1], device=token_type_ids.device).expand_as(token_type_ids)
    restarts = F.pad(position_ids.expand_as(place).diff() != 1, (1, 0), value=True)
    start = (place * restarts).cummax(-1).values
    block = prefix_blocks(token_type_ids, position_ids)
    ends = F.pad(block.diff() != 0, (0, 1), value=True)  # in reverse, the last end seen is the next one
    next_end = (place + 1).masked_fill(~ends, place.shape[1]).flip(-1).cummin(-1).values.flip(-1)
    return start, torch.where(block >= 0, next_end, place + 1)


def packed_block_mask(token_type_ids: Tensor, position_ids: Tensor, block_size: int = 128) -> BlockMask:
    """The mask of packed documents with prefixes for flex attention, made block by block.

    Equal to what transformers makes for flex attention, without looking at (tokens x tokens) pairs or compiling: rows
    see intervals whose ends never fall, so the first and the last rows of a block tell all of it.

    Shapes: token_type_ids, position_ids (batch, tokens).
    """
    num_tokens = token_type_ids.shape[1]
    start, stop = visible_intervals(token_type_ids, position_ids)
    num_blocks = -(-num_tokens // block_size)
    rows = torch.arange(num_blocks, device=start.device) * block_size
    last = (rows + block_size - 1).clamp(max=num_tokens - 1)
    low = rows  # columns of a block: [low, high)
    high = last + 1
    least, most = (each[:, rows, None] for each in (start, stop))  # of the block's first row
    least_of_last, most_of_last = (each[:, last, None] for each in (start, stop))
    any_seen = (high > least) & (low < most_of_last)  # (batch, blocks of rows, blocks of columns)
    all_seen = (low >= least_of_last) & (high <= most)

    def seen(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column >= start[batch, row]) & (column < stop[batch, row])

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        indices = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1).int().unsqueeze(1), indices.int().unsqueeze(1)

    return BlockMask.from_kv_blocks(
        *listed(any_seen & ~all_seen),
        *listed(all_seen),
        BLOCK_SIZE=block_size,
        mask_mod=seen,
        seq_lengths=(num_tokens, num_tokens),
    )


def create_prefix_mask(
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    position_ids: Tensor,
    packing: Tensor | None,
    token_type_ids: Tensor | None,
) -> Tensor | BlockMask | None:
    """The mask that the attention implementation takes: transformers', or for flex attention without padding ours.

    ``packing`` is ``position_ids`` where the caller gave them, and so may have packed documents.
    """
    flex = config._attn_implementation == "flex_attention"
    if flex and attention_mask is None and past_key_values is None and not torch.compiler.is_compiling():
        position_ids = position_ids.expand(inputs_embeds.shape[:2])
        return packed_block_mask(
            torch.zeros_like(position_ids) if token_type_ids is None else token_type_ids, position_ids
        )
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=packing,
        block_sequence_ids=None if token_type_ids is None else prefix_blocks(token_type_ids, position_ids),
    )


__all__ = ["create_prefix_mask", "packed_block_mask", "prefix_blocks", "prefix_token_types", "visible_intervals"]
