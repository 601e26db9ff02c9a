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
"""Next-token cross entropy over large vocabularies, without the logits of all tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class TableHead:
    """A dense head whose `weight` (vocabulary, hidden) is no parameter of its own: a tied generated table."""

    weight: Tensor

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Logits (..., vocabulary) of hidden states (..., hidden)."""
        return F.linear(hidden_states, self.weight)


def is_plain(head: Callable[[Tensor], Tensor], device: torch.device) -> TypeGuard[nn.Linear | TableHead]:
    """Whether a head is its `weight` and nothing else: neither biased, hooked, offloaded, sharded nor quantised."""
    if isinstance(head, TableHead):
        return True
    if type(head) is not nn.Linear or head.bias is not None or type(head.weight) is not nn.Parameter:
        return False
    hooked = head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook")
    return not hooked and head.weight.device == device and len(head.weight) == head.out_features


def fused_cross_entropy(hidden_states: Tensor, weight: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    r"""Summed cross entropy :math:`-\sum_n \log \mathrm{softmax}(W h_n)_{y_n}` in nats, of a linear head.

    Holds the logits of `chunk_size` tokens at one time and makes them once: a chunk's gradients are taken while its
    logits are there, so that backward only scales them. That saves a fourth of the arithmetic of
    its plain twin :func:`chunked_loss`, for a buffer of the weight's size. The idea is Liger-Kernel's
    (arXiv 2410.10989), in operations that every device has.

    Under autocast the products take its dtype; softmax, sums and the weight's gradient are float32 (float64 for
    float64 weights).

    Shapes: hidden_states (tokens, hidden), weight (vocabulary, hidden), labels (tokens,) -> scalar. Differentiable
    once.
    """
    kind, dtype = hidden_states.device.type, weight.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    # Inside the function gradients always seem wanted of what requires them.
    learned = [torch.is_grad_enabled() and each.requires_grad for each in (hidden_states, weight)]
    return _FusedCrossEntropy.apply(hidden_states, weight, labels, chunk_size, dtype, *learned)


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_size: int,
        dtype: torch.dtype,
        learns_hidden: bool,
        learns_weight: bool,
    ) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        matrix = weight.to(dtype)
        to_hidden = torch.empty_like(hidden_states) if learns_hidden else None
        to_weight = torch.zeros_like(weight, dtype=exact) if learns_weight else None
        loss = hidden_states.new_zeros((), dtype=exact)
        for start in range(0, len(labels), chunk_size):
            rows = slice(start, start + chunk_size)
            hidden, target = hidden_states[rows].to(dtype), labels[rows].unsqueeze(-1)
            log_share = F.log_softmax(hidden @ matrix.mT, -1, dtype=exact)
            loss -= log_share.gather(-1, target).sum()
            if to_hidden is None and to_weight is None:
                continue
            to_logits = log_share.exp_()
            to_logits.scatter_add_(-1, target, to_logits.new_full(target.shape, -1.0))
            to_logits = to_logits.to(dtype)
            if to_hidden is not None:
                to_hidden[rows] = (to_logits @ matrix).to(hidden_states.dtype)
            if to_weight is not None:
                to_weight += to_logits.mT @ hidden
        ctx.save_for_backward(to_hidden, None if to_weight is None else to_weight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # In the gradient's precision: rounding it first would bend all gradients alike.
        scaled = (None if each is None else (each * gradient).to(each.dtype) for each in ctx.saved_tensors)
        return *scaled, None, None, None, None, None


def chunked_loss(
    loss_of: Callable[[Tensor, Tensor], Tensor], hidden_states: Tensor, labels: Tensor, chunk_size: int | None
) -> Tensor:
    """Sum of `loss_of` over chunks of `chunk_size` tokens, each computed again in backward: for heads that are no plain
    matrix, and with :func:`cross_entropy_of` the oracle of :func:`fused_cross_entropy`. No chunks with None.

    Shapes: `loss_of` maps (tokens, hidden) and (tokens,) to a scalar; hidden_states (tokens, hidden), labels (tokens,)
    -> scalar.
    """
    if chunk_size is None or len(labels) <= chunk_size:
        return loss_of(hidden_states, labels)
    chunks = zip(hidden_states.split(chunk_size), labels.split(chunk_size), strict=True)
    losses = [checkpoint(loss_of, hidden, target, use_reentrant=False) for hidden, target in chunks]
    return torch.stack(losses).sum()


def cross_entropy_of(logits_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The summed cross entropy in nats of a head: hidden states (tokens, hidden), labels (tokens,) -> scalar."""
    return lambda hidden, target: F.cross_entropy(logits_of(hidden).float(), target, reduction="sum")


__all__ = ["TableHead", "chunked_loss", "cross_entropy_of", "fused_cross_entropy", "is_plain"]
