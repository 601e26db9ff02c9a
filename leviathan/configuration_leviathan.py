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
"""Configuration of Leviathan."""

import inspect
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sna_core.digits import digit_layout
from sna_core.embedding import VARIANTS, CodebookEmbedding, LowRankEmbedding, SeparableEmbedding

from .completed import Completed
from .sizes import MOST_MODULES, check_extra, check_sizes, check_weights

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "embedding_base",
    "embedding_seed_dim",
    "embedding_num_knots",
    "embedding_rank",
    "embedding_token_rank",
    "output_head_rank",
    "patch_size",
    "patch_margin",
)

EMBEDDINGS = {"separable": SeparableEmbedding, "codebook": CodebookEmbedding, "low_rank": LowRankEmbedding}


# trf-ignore: TRF057 -- the generated text names a released checkpoint, and there is none; the docstring is our own.
@strict
class LeviathanConfig(PreTrainedConfig):
    r"""Sizes of a Leviathan: a LLaMA-style decoder over generated token embeddings.

    Backbone fields carry transformers' names and meanings. The rest:

    Args:
        embedding_type: ``"separable"`` (generated from the digits of the id), ``"codebook"`` (a sum of rows that the
            digits choose), ``"low_rank"`` (a factorised lookup) or ``"lookup"`` (a table).
        embedding_base, embedding_num_digits: Digits of an id; what is left None is completed so that the digits number
            the vocabulary.
        embedding_seed_dim, embedding_num_heads, embedding_num_knots, embedding_rank, embedding_variant,
        embedding_low_digit, embedding_normalize_basis, embedding_trainable_knot_scale, embedding_sigmoid_divisor,
        embedding_seed_bias, embedding_residual, embedding_normalize_output, embedding_token_rank: Arguments of
            [`sna_core.SeparableEmbedding`] (`embedding_low_digit` also of [`sna_core.CodebookEmbedding`],
            `embedding_rank` of [`sna_core.LowRankEmbedding`]); None takes its default. What is left None is stored
            completed, so that a checkpoint means the same when a default changes.
        embedding_ordered: Whether digits are those of a position that each token has, not of its id: the embedding then
            has [`~sna_core.digit_embedding.DigitEmbedding.set_token_order`], and the order is saved with the weights.
            Lookups, factorised or not, have no digits to order.
        embedding_max_chunk_tokens: Argument of [`sna_core.SeparableEmbedding`] that bounds its memory.
        position_layout: ``"sequence"`` (rotary positions count tokens) or ``"window"`` (they are a pixel's place in the
            window that the prefix shows, see [`~leviathan.positions_leviathan.WindowRotaryEmbedding`]).
        patch_size, patch_margin: Side of a patch and the margin that a prefix holds around it, for ``"window"`` alone.
        output_head: ``"dense"`` (a logit for each id) or ``"digits"`` ([`sna_core.DigitHead`]: the digits of the id one
            after the other, which costs no product of tokens with the vocabulary in training).
        output_head_rank: Rank of the digits' head.
        loss_chunk_size: Tokens for which logits exist at one time while the loss is computed. The output then carries
            no logits beside a loss. None computes all logits and returns them. A digits' head never needs them for a
            loss.

    Raises:
        ValueError: If sizes do not divide each other or the digits cannot number the vocabulary.

    ```python
    >>> from leviathan import LeviathanConfig, LeviathanForCausalLM

    >>> model = LeviathanForCausalLM(LeviathanConfig(vocab_size=65536, embedding_base=256))
    ```
    """

    model_type = "leviathan"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 65536
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: Completed[int] = None
    head_dim: Completed[int] = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: int | float | None = 0.0
    mlp_bias: bool = False

    embedding_type: Literal["separable", "codebook", "low_rank", "lookup"] = "separable"
    embedding_base: int | None = None
    embedding_num_digits: int | None = None
    embedding_seed_dim: int | None = None
    embedding_num_heads: int | None = None
    embedding_num_knots: int | None = None
    embedding_rank: int | None = None
    embedding_variant: Literal["lev", "v1"] | None = None
    embedding_low_digit: Literal["plain", "reflected"] | None = None
    embedding_ordered: bool | None = None
    embedding_normalize_basis: bool | None = None
    embedding_trainable_knot_scale: bool | None = None
    embedding_sigmoid_divisor: float | None = None
    embedding_seed_bias: bool | None = None
    embedding_residual: bool | None = None
    embedding_normalize_output: bool | None = None
    embedding_token_rank: int | None = None
    embedding_max_chunk_tokens: int | None = None
    position_layout: Literal["sequence", "window"] = "sequence"
    patch_size: int | None = None
    patch_margin: int = 0
    output_head: Literal["dense", "digits"] = "dense"
    output_head_rank: int = 64
    loss_chunk_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_extra(self, kwargs)
        check_sizes(self, *SIZES)
        check_sizes(self, "num_hidden_layers", "embedding_num_heads", "embedding_num_digits", most=MOST_MODULES)
        if self.num_attention_heads < 1:
            raise ValueError(f"num_attention_heads = {self.num_attention_heads}; expected at least 1.")
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name, default in self._embedding_defaults().items():
            if getattr(self, f"embedding_{name}") is None:
                setattr(self, f"embedding_{name}", default)
        if self.embedding_type in ("separable", "codebook"):
            self.embedding_base, self.embedding_num_digits = digit_layout(
                self.vocab_size, self.embedding_base, self.embedding_num_digits
            )
        super().__post_init__(**kwargs)

    def _embedding_defaults(self) -> dict[str, Any]:
        embedding = EMBEDDINGS.get(self.embedding_type)
        if embedding is None:
            return {}
        defaults = {name: parameter.default for name, parameter in inspect.signature(embedding).parameters.items()}
        if embedding is SeparableEmbedding:
            defaults |= VARIANTS.get(self.embedding_variant or defaults["variant"], {})
        return {name: default for name, default in defaults.items() if hasattr(self, f"embedding_{name}")}

    def validate_rope(self) -> None:
        """Part of `@strict`-powered validation. As in transformers, which only warns of much that cannot be built."""
        given: Any = self.rope_parameters or {}
        kind, theta = given.get("rope_type", "default"), given.get("rope_theta", 1.0)
        if not isinstance(kind, str) or kind not in {"default", *ROPE_INIT_FUNCTIONS}:
            expected = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
            raise ValueError(f"rope_parameters has rope_type = {kind!r:.80}; expected one of {expected}.")
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < float("inf"):
            raise ValueError(f"rope_parameters has rope_theta = {theta!r:.80}; expected a number above 0.")
        try:
            super().validate_rope()
        except (KeyError, TypeError) as error:
            raise ValueError(f"rope_parameters = {given!r:.200} cannot be used: {error}") from error

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation. Validates the architecture of the config."""
        for name in ("hidden_size", "intermediate_size", "num_key_value_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; expected at least 1.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act = {self.hidden_act!r:.80}; expected one of {', '.join(sorted(ACT2FN))}.")
        hidden = {"hidden_size": self.hidden_size}
        check_weights(**hidden, vocab_size=self.vocab_size)
        check_weights(**hidden, intermediate_size=self.intermediate_size)
        check_weights(**hidden, num_attention_heads=self.num_attention_heads, head_dim=self.head_dim)
        check_weights(**hidden, output_head_rank=self.output_head_rank, embedding_base=self.embedding_base or 1)
        generator = ("num_heads", "seed_dim", "num_knots", "rank")
        check_weights(**{f"embedding_{name}": getattr(self, f"embedding_{name}") or 1 for name in generator})
        check_weights(vocab_size=self.vocab_size, embedding_token_rank=self.embedding_token_rank or 1)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} is not a multiple of num_attention_heads = "
                f"{self.num_attention_heads}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of num_key_value_heads = "
                f"{self.num_key_value_heads}."
            )
        if self.position_layout == "window" and ((self.patch_size or 0) < 1 or self.patch_margin < 0):
            raise ValueError(
                f"position_layout = 'window' with patch_size = {self.patch_size} and patch_margin = "
                f"{self.patch_margin}; expected at least 1 and 0. Only fields have patches."
            )
        if self.output_head == "digits" and self.tie_word_embeddings:
            raise ValueError("output_head = 'digits' has no table to tie; set tie_word_embeddings=False.")
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise ValueError(f"loss_chunk_size = {self.loss_chunk_size}; expected at least 1, or None for no chunks.")


__all__ = ["LeviathanConfig"]
