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
"""Decoding of one state behind its prefix, for all patches of a batch: token by token, or by blocks of tokens.

All samplings are functions of the logits and one uniform number a token. So the sequence behind a prefix is fixed when
its numbers are drawn, and every way to decode it (with or without cache, by CUDA graphs, by blocks) gives the same one,
up to rounding of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_utils import PreTrainedModel

from sna_core.digit_head import DigitHead

Sampling = Literal["expectation", "greedy", "top_k", "top_p", "sample"]
DETERMINISTIC = ("expectation", "greedy")
RANDOM = ("top_k", "top_p", "sample")
LARGEST_SCORES = 2**26  # that exist at one time, in float64 for expectations
GRAPH_TOKENS = 512  # tokens that share one CUDA graph, whose attention reads the cache up to the last of them


def expected_ids(scores: Tensor) -> Tensor:
    r"""The id whose level holds the expected value, :math:`\mathrm{round}(\sum_v p_v v)`: (..., V) -> (...) int64.

    Level centres are evenly spaced, so the expectation of the centres re-quantised is the expectation of the ids
    rounded: the paper's "expectation" sampling (arXiv 2603.12244, figure 5). Not finite scores give ids below 0.
    """
    dtype = torch.float64 if scores.device.type != "mps" else torch.float32
    ids = torch.arange(scores.shape[-1], device=scores.device, dtype=dtype)
    return _rounded(scores.softmax(-1, dtype=dtype) @ ids)


def inverse_distribution(scores: Tensor, uniform: Tensor) -> Tensor:
    """The least id whose cumulated probability exceeds ``uniform``: (..., V), (...) in [0, 1) -> (...) int64.

    Neighbouring ids are neighbouring levels, so that a small change of the scores changes a sample by little: what
    decoding by blocks lives on.
    """
    dtype = torch.float64 if scores.device.type != "mps" else torch.float32
    cumulated = scores.softmax(-1, dtype=torch.float32).cumsum(-1, dtype=dtype)
    wanted = uniform.to(dtype).unsqueeze(-1) * cumulated[..., -1:]
    ids = torch.searchsorted(cumulated, wanted, right=True).squeeze(-1).clamp(max=scores.shape[-1] - 1)
    return torch.where(cumulated[..., -1].isfinite(), ids, -1)


def _rounded(expected: Tensor) -> Tensor:
    return torch.where(expected.isfinite(), expected, -1.0).round().long()


@dataclass(frozen=True)
class Sampler:
    """Chooses ids (...) int64 for hidden states (..., hidden) and uniform numbers (...); -1 for scores not finite.

    Args:
        head: Maps hidden states to logits.
        num_scores: Number of ids.
        sampling: ``"expectation"``, ``"greedy"``, or the random ``"top_k"``, ``"top_p"`` and ``"sample"``.
        top_k: Ids kept by ``"top_k"``.
        top_p: Probability kept by ``"top_p"``.
        temperature: Divides the logits of the random samplings.
    """

    head: Callable[[Tensor], Tensor]
    num_scores: int
    sampling: Sampling = "expectation"
    top_k: int = 50
    top_p: float = 0.9
    temperature: float = 1.0
    warpers: LogitsProcessorList = field(init=False, repr=False)

    def __post_init__(self) -> None:
        warpers = LogitsProcessorList()
        if self.sampling in RANDOM and self.temperature != 1:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.sampling == "top_k":
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.sampling == "top_p" and self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        object.__setattr__(self, "warpers", warpers)

    def __call__(self, hidden_states: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Ids of the hidden states, of which so many are taken at one time as keep their scores small.

        Raises:
            ValueError: If a random sampling gets no uniform numbers.
        """
        if self.sampling in RANDOM and uniform is None:
            raise ValueError(f"sampling = {self.sampling!r} needs a uniform number in [0, 1) for each token.")
        flat, numbers = hidden_states.flatten(0, -2), None if uniform is None else uniform.flatten()
        size = max(1, LARGEST_SCORES // self.num_scores)
        parts = [
            self._choose(flat[i : i + size], None if numbers is None else numbers[i : i + size])
            for i in range(0, len(flat), size)
        ]
        return torch.cat(parts).view(hidden_states.shape[:-1])

    def _choose(self, hidden_states: Tensor, uniform: Tensor | None) -> Tensor:
        # CODEPATH: a head of digits knows the mean and the inverse distribution without all logits.
        if isinstance(self.head, DigitHead) and self.sampling == "expectation":
            return _rounded(self.head.expectation(hidden_states))
        if isinstance(self.head, DigitHead) and uniform is not None and self.sampling == "sample" and not self.warpers:
            ids = self.head.quantile(hidden_states, uniform)
            return torch.where(hidden_states.isfinite().all(-1), ids, -1)
        scores = self.head(hidden_states).float()
        if self.sampling == "expectation":
            return expected_ids(scores)
        if self.sampling == "greedy":
            return torch.where(scores.isfinite().all(-1), scores.argmax(-1), -1)
        assert uniform is not None, "as the call has checked"
        scores = self.warpers(None, scores)  # type: ignore[arg-type]  # these do not look at the ids so far
        return inverse_distribution(scores, uniform)


class PatchCache:
    """Keys and values of a fixed number of tokens, written in place where :attr:`place` says.

    Attributes:
        place: A slice of positions for all rows, or positions (rows, tokens).
        end: Positions from here on are not read.
    """

    def __init__(self, num_layers: int, num_tokens: int):
        self.states: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self.num_tokens = num_tokens
        self.place: slice | Tensor = slice(0)
        self.end = 0

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Writes (rows, heads, tokens, head_dim) and returns what is there up to :attr:`end`."""
        states = self.states[layer]
        if states is None:
            shape = (*key.shape[:2], self.num_tokens, key.shape[3])
            states = self.states[layer] = key.new_zeros(shape), value.new_zeros(shape)
        for state, new in zip(states, (key, value), strict=True):
            if isinstance(self.place, slice):
                state[:, :, self.place] = new
            else:
                state.scatter_(2, self.place[:, None, :, None].expand_as(new), new)
        keys, values = states
        return keys[:, :, : self.end], values[:, :, : self.end]

    def clear(self) -> None:
        """Forgets all numbers, and keeps the memory."""
        for each in filter(None, self.states):
            for state in each:
                state.zero_()

    def keep(self, rows: Tensor) -> None:
        """Leaves the given rows alone, so that finished ones cost no more."""
        self.states = [None if each is None else (each[0][rows], each[1][rows]) for each in self.states]


@dataclass
class Decoder:
    """Decodes target tokens behind prefixes with a Leviathan.

    Args:
        model: A [`LeviathanForCausalLM`] in evaluation mode.
        sampler: What chooses a token.
        num_tokens: Tokens of a target.
        block_size: Tokens decoded at one time, see :meth:`by_blocks`.
        centre: Where in the prefix the token of the same pixel lies, for each token of a target: the first guesses.
            None is the prefix's own order.
        tolerance: Levels by which a guess of :meth:`by_blocks` may miss and still count as decided. 0 is exact.

    Attributes:
        num_passes: Forward passes since the beginning, without prefixes.
        num_row_passes: The same, a pass over several rows counted once for each: divided by the rows that were
            decoded, the passes of one.
    """

    model: PreTrainedModel
    sampler: Sampler
    num_tokens: int
    block_size: int = 1
    centre: Tensor | None = None
    tolerance: int = 0
    num_passes: int = 0
    num_row_passes: int = 0
    _graphs: _Graphs | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.decoder = self.model.get_decoder()
        attention = self.model.config._attn_implementation
        self.takes_masks = attention == "eager" or attention.endswith("sdpa")
        if self.block_size > 1 and not self.takes_masks:
            raise ValueError(
                f"block_size = {self.block_size} needs attention with a dense mask, and attn_implementation = "
                f"{attention!r} has none; load the model without attn_implementation."
            )

    @torch.no_grad()
    def __call__(self, prefix: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Targets (rows, num_tokens) int64 behind ``prefix`` (rows, tokens), of uniform numbers (rows, num_tokens)."""
        if self.block_size > 1:
            return self.by_blocks(prefix, uniform)
        if prefix.device.type == "cuda" and self._can_be_captured():
            return self.by_graphs(prefix, uniform)
        return self.one_by_one(prefix, uniform)

    def _can_be_captured(self) -> bool:
        """Whether a step asks nothing of the device: masks of our own, a table, fixed rotations, one device."""
        embedding, rotary = self.decoder.embed_tokens, self.decoder.rotary_emb
        is_table = getattr(embedding, "is_baked", True)  # nn.Embedding is one anyway
        is_fixed = getattr(rotary, "rope_type", "default") not in ("dynamic", "longrope")
        spread = len({p.device for p in self.model.parameters()}) > 1
        return self.takes_masks and is_table and is_fixed and not spread

    def without_cache(self, prefix: Tensor, uniform: Tensor | None = None) -> Tensor:
        """The plain loop, which reads everything again for every token: the oracle of the others."""
        sequence = prefix
        for i in range(self.num_tokens):
            hidden = self.decoder(sequence, prefix_length=prefix.shape[1], use_cache=False).last_hidden_state[:, -1]
            sequence = torch.cat([sequence, self._choose(hidden, uniform, i).unsqueeze(-1)], -1)
        return sequence[:, prefix.shape[1] :]

    def one_by_one(self, prefix: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Token by token over the cache of those before."""
        length = prefix.shape[1]
        cache, hidden = self._read(prefix)
        target = prefix.new_empty(prefix.shape[0], self.num_tokens)
        target[:, 0] = self._choose(hidden, uniform, 0)
        for i in range(1, self.num_tokens):
            cache.place, cache.end = slice(length + i - 1, length + i), length + i
            position = prefix.new_full((1, 1), length + i - 1)
            hidden = self._forward(target[:, i - 1 : i], position, cache)[:, -1]
            target[:, i] = self._choose(hidden, uniform, i)
        self._count(self.num_tokens - 1, len(prefix))
        return target

    def by_blocks(self, prefix: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Several tokens a pass, by Jacobi iteration in a window that moves with each row.

        The tokens of the window are guessed (at first from the prior state: same pixel, same level), read in one pass,
        and chosen anew. The first chosen one is right, and so is each whose predecessors were guessed as chosen; there
        the window starts next. The fixed point is unique, since a token depends on those before it alone: the result
        is that of :meth:`one_by_one`, in as many passes at worst (Santilli et al., arXiv 2305.10427).

        With a :attr:`tolerance`, tokens also count as decided behind guesses that missed by so many levels, and the
        chosen ones are kept: each is the model's own choice behind predecessors within the tolerance of those kept, one
        more iteration away from the choice behind those. Such errors may add up along a state. The result is no longer
        the sequential one, and depends on the block's size.
        """
        rows, length = prefix.shape
        cache, hidden = self._read(prefix)
        steps = torch.arange(self.block_size, device=prefix.device)
        if self.centre is None:
            target = F.pad(prefix, (0, max(0, self.num_tokens - length)))[:, : self.num_tokens].clone()
        else:
            target = prefix[:, self.centre.to(prefix.device)]
        target[:, 0] = self._choose(hidden, uniform, 0)
        done = target.clone()
        active = torch.arange(rows, device=prefix.device)
        start = torch.ones_like(active)  # the first token not decided yet, in each row
        while (left := start < self.num_tokens).any():
            if left.sum() <= len(active) // 2:  # rows that are finished cost no more
                done[active] = target
                kept = left.nonzero().squeeze(-1)
                active, target, start = active[kept], target[kept], start[kept]
                uniform = uniform if uniform is None else uniform[kept]
                cache.keep(kept)
            read = (start.unsqueeze(-1) - 1 + steps).clamp(max=self.num_tokens - 1)  # (rows, block)
            chosen_at = (read + 1).clamp(max=self.num_tokens - 1)
            guess = target.gather(1, read)
            cache.place, cache.end = length + read, length + int(read.max()) + 1
            hidden = self._forward(guess, cache.place, cache, masked=True)
            numbers = None if uniform is None else uniform.gather(1, chosen_at)
            chosen = checked(self.sampler(hidden, numbers))  # (rows, block)
            # Decided: the first, and those whose predecessors in the window were guessed as they are chosen.
            close = (guess[:, 1:] - chosen[:, :-1]).abs() <= self.tolerance
            agree = close.long().cumprod(1).sum(1) + 1
            inside = read + 1 < self.num_tokens
            target.scatter_(1, chosen_at.masked_fill(~inside, 0), torch.where(inside, chosen, target[:, :1]))
            start = (start + agree).clamp(max=self.num_tokens)
            self._count(1, len(active))
        done[active] = target
        return done

    def _count(self, passes: int, rows: int) -> None:
        self.num_passes += passes
        self.num_row_passes += passes * rows

    def by_graphs(self, prefix: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Token by token with CUDA graphs: no launch, no choice and no position passes through Python."""
        rows, length = prefix.shape
        graphs = self._graphs
        if graphs is None or not graphs.fit(rows, length):
            self._graphs = None  # frees its memory before more is taken
            graphs = self._graphs = _Graphs(self, rows, length)
        missing = graphs.rows - rows  # a last batch is smaller, and graphs have one size
        if missing:
            prefix = torch.cat([prefix, prefix[:1].expand(missing, -1)])
            uniform = uniform if uniform is None else torch.cat([uniform, uniform[:1].expand(missing, -1)])
        self._count(self.num_tokens - 1, rows)
        return graphs(prefix, uniform)[:rows]

    def _read(self, prefix: Tensor, cache: PatchCache | None = None) -> tuple[PatchCache, Tensor]:
        """Reads the prefix in both directions: its cache, and the hidden state (rows, hidden) behind it."""
        length = prefix.shape[1]
        cache = cache or PatchCache(len(self.decoder.layers), length + self.num_tokens)
        cache.place, cache.end = slice(length), length
        positions = torch.arange(length, device=prefix.device).unsqueeze(0)
        return cache, self._forward(prefix, positions, cache)[:, -1]

    def _forward(self, ids: Tensor, positions: Tensor, cache: PatchCache, masked: bool = False) -> Tensor:
        """Hidden states of ``ids`` (rows, tokens): each sees all of the cache, or with ``masked`` no later position."""
        hidden = self.decoder.embed_tokens(ids)
        mask = None
        if masked:
            seen = torch.arange(cache.end, device=ids.device) <= positions.unsqueeze(-1)  # (rows, tokens, end)
            mask = seen.unsqueeze(1)
            if self.model.config._attn_implementation == "eager":  # adds its mask
                mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill_(~mask, torch.finfo(hidden.dtype).min)
        embeddings = self.decoder.rotary_emb(hidden, position_ids=positions)
        for layer in self.decoder.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=embeddings,
                past_key_values=cache,
                is_causal=False,
            )
        return self.decoder.norm(hidden)

    def _choose(self, hidden: Tensor, uniform: Tensor | None, i: int) -> Tensor:
        return checked(self.sampler(hidden, None if uniform is None else uniform[:, i]))


def checked(ids: Tensor) -> Tensor:
    """The ids, if all scores were finite.

    Raises:
        ValueError: If not.
    """
    if (ids < 0).any():
        raise ValueError("the model's scores are not finite; its weights are broken or its dtype too narrow.")
    return ids


class _Graphs:
    """CUDA graphs of the step from one token to the next, for prefixes of one shape; the same tensors every time."""

    def __init__(self, decoder: Decoder, rows: int, length: int):
        self.decoder, self.rows, self.length, self.device = decoder, rows, length, decoder.model.device
        self.cache = PatchCache(len(decoder.decoder.layers), length + decoder.num_tokens)
        self.target = torch.zeros(rows, decoder.num_tokens, dtype=torch.long, device=self.device)
        self.uniform = torch.zeros(rows, decoder.num_tokens, dtype=torch.float64, device=self.device)
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
        self.place = torch.zeros(1, 1, dtype=torch.long, device=self.device)  # of the token to be chosen
        self.weights = self._pointers()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool: Any = None  # of memory, one for all graphs: they run one after the other

    def _pointers(self) -> list[Tensor]:
        """What graphs hold the addresses of, a baked table included; kept, so that these stay theirs."""
        return [*self.decoder.model.parameters(), self.decoder.decoder.embed_tokens.weight]

    def fit(self, rows: int, length: int) -> bool:
        """Whether prefixes of this shape can be decoded, with the weights that were captured."""
        now = self._pointers()
        same = len(now) == len(self.weights) and all(a is b for a, b in zip(now, self.weights, strict=True))
        return same and rows <= self.rows and length == self.length

    def step(self, end: int) -> None:
        """Chooses one token from the one before; reads and writes tensors alone, so that it can be captured."""
        decoder = self.decoder
        positions = (self.place + (self.length - 1)).expand(self.rows, 1)
        self.cache.place, self.cache.end = positions, end
        hidden = decoder._forward(self.token, positions, self.cache, masked=True)[:, -1]
        place = self.place.expand_as(self.token)
        chosen = decoder.sampler(hidden, self.uniform.gather(1, place).squeeze(-1)).unsqueeze(-1)
        self.target.scatter_(1, place, chosen)
        self.token.copy_(chosen.clamp(min=0))  # one that is not finite is said at the end
        self.place.add_(1)

    def __call__(self, prefix: Tensor, uniform: Tensor | None) -> Tensor:
        """Targets behind the prefixes."""
        decoder = self.decoder
        if uniform is not None:
            self.uniform.copy_(uniform)
        self.cache.clear()  # numbers that are not finite pass through a mask
        _, hidden = decoder._read(prefix, self.cache)
        first = decoder._choose(hidden, uniform, 0)
        self.target[:, 0] = first
        self.token.copy_(first.unsqueeze(-1))
        self.place.fill_(1)
        for begin in range(1, decoder.num_tokens, GRAPH_TOKENS):
            stop = min(begin + GRAPH_TOKENS, decoder.num_tokens)
            end = self.length + stop - 1
            run = self.graphs.get(end) or self.capture(end)
            for _ in range(stop - begin):
                run.replay()
        return checked(self.target.clone())

    def capture(self, end: int) -> torch.cuda.CUDAGraph:
        """The graph of :meth:`step`; what it writes while warming up is written again when it is replayed."""
        kept = [each.clone() for each in (self.token, self.place, self.target)]
        with torch.cuda.device(self.device):  # capture is of the current device's work
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.step(end)
                    self.place.copy_(kept[1])
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self.pool, stream=stream):
                self.step(end)
        for tensor, value in zip((self.token, self.place, self.target), kept, strict=True):
            tensor.copy_(value)
        self.graphs[end] = graph
        return graph


__all__ = ["DETERMINISTIC", "RANDOM", "Decoder", "PatchCache", "Sampler", "Sampling", "checked", "expected_ids"]
