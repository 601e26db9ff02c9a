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
"""Prefix-LM attention without a mask, where all rows have one prefix.

Flash kernels cannot mask a prefix, and a dense mask of (tokens x tokens) is what makes long states slow. But the
pattern of one prefix is made of blocks that flash kernels do know: the prefix attends to itself without a mask, the
target to the prefix without a mask and to itself causally. transformers knows it as the attention implementation
`"prefix_sdpa"`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import PreTrainedModel

PREFIX_SDPA = "prefix_sdpa"
CAUSAL_FROM_BOTTOM_RIGHT = 2  # of PyTorch's memory-efficient kernel


def prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, prefix_length: int, scale: float | None = None
) -> Tensor:
    r"""Attention of a prefix of P tokens and a causal target behind it, without a mask tensor.

    Row i attends to column j where :math:`j \le i` or :math:`j < P`. Prefix rows are one unmasked call, target rows one
    call with a causal bias aligned at the bottom right (CUDA), or two calls, one of them unmasked, merged by their
    log-sum-exp (CPU, whose kernel knows the square causal bias alone). Memory is linear in the tokens.

    Shapes: query, key, value (batch, heads, tokens, head_dim) -> (batch, heads, tokens, head_dim). Differentiable once.
    ``scale`` None is :math:`1 / \sqrt{head\_dim}`.
    """
    num_tokens, kind = query.shape[2], query.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # which does not know of the kernels below
        query, key, value = (each.to(torch.get_autocast_dtype(kind)) for each in (query, key, value))
    # The kernels walk along heads; what is not contiguous there they misread.
    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    if prefix_length <= 1:  # a prefix of one token is causal already
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    if prefix_length >= num_tokens:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    if kind == "cpu" and not torch.compiler.is_exporting():  # other runtimes have no such kernels
        return _CpuPrefixAttention.apply(query, key, value, prefix_length, scale)[0]
    inside, behind = query.split([prefix_length, num_tokens - prefix_length], dim=2)
    blocks = (
        F.scaled_dot_product_attention(inside, key[:, :, :prefix_length], value[:, :, :prefix_length], scale=scale),
        _lower_right_attention(behind, key, value, scale),
    )
    return torch.cat(blocks, dim=2)


def _lower_right_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention of fewer rows than columns, the last of which are aligned.

    As `torch.nn.attention.bias.causal_lower_right`, whose operations these are: it cannot be compiled.
    """
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    if is_half and head_dim <= 256 and not torch.compiler.is_exporting():
        padded = (F.pad(each, (0, -head_dim % 8)) for each in (query, key, value))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(*padded, 0.0, True, return_debug_mask=False, scale=scale)[0][..., :head_dim]
    if torch.compiler.is_compiling():  # the backward of the kernel below cannot be traced
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - query.shape[2])
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    learns = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    output = torch.ops.aten._efficient_attention_forward(
        *(each.transpose(1, 2) for each in (query, key, value)),
        bias=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        dropout_p=0.0,
        custom_mask_type=CAUSAL_FROM_BOTTOM_RIGHT,
        compute_log_sumexp=learns,
        scale=scale,
        seqlen_k=None,
    )[0]
    return output.transpose(1, 2)


def prefix_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, prefix_length: int, scale: float | None = None
) -> Tensor:
    """The formula as written, with a dense mask: the oracle of :func:`prefix_attention`."""
    place = torch.arange(query.shape[2], device=query.device)
    allowed = (place.unsqueeze(0) <= place.unsqueeze(1)) | (place < prefix_length)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value


class _CpuPrefixAttention(torch.autograd.Function):
    """Blocks of PyTorch's CPU flash kernel.

    A block's gradient needs of the other blocks only the merged output and log-sum-exp, as in ring attention (Liu et
    al., arXiv 2310.01889).
    """

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, prefix_length: int, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        outputs, sums = [], []
        for rows, columns, causal in _blocks(prefix_length):
            output, log_sum = flash(
                query[:, :, rows], key[:, :, columns], value[:, :, columns], 0.0, causal, scale=scale
            )
            outputs.append(output)
            sums.append(log_sum)
        log_sum = torch.logaddexp(sums[1], sums[2])
        shares = [(each - log_sum).exp().unsqueeze(-1) for each in sums[1:]]
        behind = outputs[1] * shares[0] + outputs[2] * shares[1]
        return torch.cat([outputs[0], behind.to(query.dtype)], dim=2), torch.cat([sums[0], log_sum], dim=2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.prefix_length, ctx.scale = inputs
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(*tensors, *outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum = ctx.saved_tensors
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        to_query, to_key, to_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for rows, columns, causal in _blocks(ctx.prefix_length):
            block = backward(
                gradient[:, :, rows],
                query[:, :, rows],
                key[:, :, columns],
                value[:, :, columns],
                output[:, :, rows],
                log_sum[:, :, rows],
                0.0,
                causal,
                scale=ctx.scale,
            )
            to_query[:, :, rows] += block[0]
            to_key[:, :, columns] += block[1]
            to_value[:, :, columns] += block[2]
        return to_query, to_key, to_value, None, None


def _blocks(prefix_length: int) -> tuple[tuple[slice, slice, bool], ...]:
    """Rows, columns and whether causal: the prefix on itself, then the target on the prefix and on itself."""
    inside, behind = slice(prefix_length), slice(prefix_length, None)
    return (inside, inside, False), (behind, inside, False), (behind, behind, True)


def prefix_sdpa_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    prefix_length: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface of transformers: SDPA, or :func:`prefix_attention` where the model gives `prefix_length`.

    Shapes: query (batch, heads, tokens, head_dim), key and value with as many or fewer heads -> (batch, tokens, heads,
    head_dim).
    """
    if prefix_length is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    num_tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (repeat_kv(each[:, :, :num_tokens], groups) for each in (key, value))  # a static cache is longer
    output = prefix_attention(query, key, value, prefix_length, scaling)
    return output.transpose(1, 2).contiguous(), None


def needs_no_mask(
    model: PreTrainedModel,
    prefix_length: int | Tensor | None,
    num_tokens: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> bool:
    """Whether ``model`` can leave the prefix to :func:`prefix_attention`: one for all rows, no padding, no packing."""
    if model.config._attn_implementation != PREFIX_SDPA or not isinstance(prefix_length, int):
        return False
    if not 0 <= prefix_length <= num_tokens or (model.training and model.config.attention_dropout):
        return False
    if attention_mask is None and position_ids is None:
        return True
    if torch.compiler.is_compiling():  # which must not look at values
        return False
    if attention_mask is not None:
        return bool(attention_mask.all())
    return position_ids is None or bool((position_ids.diff() == 1).all())  # where they restart, documents are packed


AttentionInterface.register(PREFIX_SDPA, prefix_sdpa_attention_forward)
AttentionMaskInterface.register(PREFIX_SDPA, sdpa_mask)

__all__ = [
    "PREFIX_SDPA",
    "needs_no_mask",
    "prefix_attention",
    "prefix_attention_reference",
    "prefix_sdpa_attention_forward",
]
