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
"""Leviathan: a Prefix-LM Transformer over generated token embeddings.

The decoder layers are transformers' own LLaMA layers; what is ours is the embedding, the prefix mask and the loss.
"""

import copy
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from sna_core.digit_embedding import DigitEmbedding
from sna_core.digit_head import DigitHead
from sna_core.generated_embedding import GeneratedEmbedding

from .attention_leviathan import PREFIX_SDPA, needs_no_mask
from .configuration_leviathan import EMBEDDINGS, LeviathanConfig
from .loss_leviathan import TableHead, chunked_loss, cross_entropy_of, fused_cross_entropy, is_plain
from .masking_leviathan import create_prefix_mask, prefix_blocks, prefix_token_types
from .positions_leviathan import WindowRotaryEmbedding


def build_embedding(config: LeviathanConfig) -> nn.Module:
    """The token embedding that ``config`` describes."""
    # CODEPATH: "separable" is Leviathan; the others are its controls: a table, factorised, or of digits alone.
    if config.embedding_type == "lookup":
        # Without padding_idx, which would hold a row at zero: it may be that of the token that ends a text.
        return nn.Embedding(config.vocab_size, config.hidden_size)
    embedding = EMBEDDINGS[config.embedding_type]
    given = {name: getattr(config, f"embedding_{name}", None) for name in inspect.signature(embedding).parameters}
    options = {name: value for name, value in given.items() if value is not None}
    return embedding(config.vocab_size, config.hidden_size, **options)


@auto_docstring
class LeviathanPreTrainedModel(PreTrainedModel):
    """What the models share: initial values, resizing, what they support."""

    config: LeviathanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer, "attentions": LlamaAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GeneratedEmbedding):
            module.reset_parameters()
            if isinstance(module, DigitEmbedding) and module.token_order is not None:
                init.copy_(module.token_order, torch.arange(module.num_embeddings))  # where no checkpoint has it
        elif isinstance(module, DigitHead):
            module.reset_parameters(self.config.initializer_range)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """As in transformers; what was not asked for is SDPA that needs no mask for a prefix."""
        return super().get_correct_attn_implementation(requested_attention or PREFIX_SDPA, is_init_check)

    def resize_token_embeddings(  # type: ignore[override]  # generated embeddings are no nn.Embedding
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Resizes the vocabulary, as in transformers; generated embeddings of the ids that remain do not change."""
        embedding: Any = self.get_input_embeddings()
        head = self.get_output_embeddings()
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embedding
        size = embedding.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        # CODEPATH: tables and dense heads, tied or not, are transformers'; digits reach so far and no further.
        if isinstance(head, DigitHead):
            head.resize(size)  # first, since it may refuse
        elif isinstance(embedding, nn.Embedding):
            return super().resize_token_embeddings(size, None, mean_resizing)
        elif head is not None:
            self.set_output_embeddings(self._get_resized_lm_head(head, size, mean_resizing=mean_resizing))
        if isinstance(embedding, nn.Embedding):
            self.set_input_embeddings(self._get_resized_embeddings(embedding, size, mean_resizing=mean_resizing))
        else:
            embedding.resize(size)
        self.config.vocab_size = size
        if isinstance(embedding, DigitEmbedding):
            self.config.embedding_num_digits = embedding.num_digits
        return self.get_input_embeddings()


@auto_docstring
class LeviathanModel(LeviathanPreTrainedModel):
    """The decoder without a head: token ids (batch, tokens) to hidden states (batch, tokens, hidden_size)."""

    def __init__(self, config: LeviathanConfig):
        super().__init__(config)
        self.embed_tokens = build_embedding(config)
        self.layers = nn.ModuleList(
            [
                LlamaDecoderLayer(config, layer_idx)  # type: ignore[arg-type]  # what it reads is there
                for layer_idx in range(config.num_hidden_layers)
            ]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # CODEPATH: behind a margin, pixels are told where they lie. The published Leviathan counts tokens.
        in_window = config.position_layout == "window"
        rotary: Any = WindowRotaryEmbedding if in_window else LlamaRotaryEmbedding
        self.rotary_emb = rotary(config=config)
        self.gradient_checkpointing = False

        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(  # type: ignore[misc]  # as in transformers, kwargs hold position_ids too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        prefix_length: int | torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""prefix_length (`int` or `torch.LongTensor` of shape `(batch,)`, *optional*):
            Number of leading tokens, padding not counted, that attend to one another in both directions. The tokens
            behind them attend to the prefix and causally among themselves; the prefix never attends to them. None, and
            no `token_type_ids`, is causal attention.
        token_type_ids (`torch.LongTensor` of shape `(batch, sequence_length)`, *optional*):
            The same for each token: every run of 1 is a block that attends within itself in both directions, 0 is
            causal. Packed documents (`position_ids` that restart, no `attention_mask`) keep their prefixes apart.

        A prefix is read in one forward pass: with a cache that holds tokens already, both are refused.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if prefix_length is not None and token_type_ids is not None:
            raise ValueError("Give one of prefix_length and token_type_ids, not both.")

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch_size, num_tokens = inputs_embeds.shape[:2]

        # Positions of the caller's may pack documents, which transformers looks for where there is no cache yet.
        packing = position_ids
        if position_ids is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(num_tokens, device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        if prefix_length is not None or token_type_ids is not None:
            self._check_prefix(attention_mask, past_key_values, prefix_length)
        # CODEPATH: one prefix for all rows needs no mask (with the default attention); the rest is masked.
        causal_mask = None
        if needs_no_mask(self, prefix_length, num_tokens, attention_mask, packing):
            kwargs["prefix_length"] = prefix_length
        else:
            if prefix_length is not None:
                token_type_ids = prefix_token_types(
                    prefix_length, num_tokens, batch_size, attention_mask, inputs_embeds.device
                )
            causal_mask = create_prefix_mask(
                self.config, inputs_embeds, attention_mask, past_key_values, position_ids, packing, token_type_ids
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for decoder_layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def _check_prefix(
        self,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        prefix_length: int | torch.Tensor | None,
    ) -> None:
        # CODEPATH: models of patches with a margin read one prior state; others a prefix of any length.
        patch_size = self.config.patch_size if self.config.position_layout == "window" else None
        if patch_size is not None and isinstance(prefix_length, int):
            window = (patch_size + 2 * self.config.patch_margin) ** 2
            if prefix_length != window:
                raise ValueError(
                    f"prefix_length = {prefix_length}; this model's positions are those of a prior state of {window} "
                    "pixels, its patch and margin."
                )
        if is_flash_attention_requested(self.config):
            raise ValueError(
                f"attn_implementation = {self.config._attn_implementation!r} cannot mask a prefix: FlashAttention "
                "would silently attend causally. Load the model without it (the default calls flash kernels block by "
                "block), or leave out prefix_length and token_type_ids."
            )
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)} and would decide alone; put the prefix "
                "into it, or give a mask of shape (batch, tokens) beside prefix_length or token_type_ids."
            )
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise ValueError(
                f"the cache holds {int(past_key_values.get_seq_length())} tokens already, which cannot attend to "
                "a prefix that comes now; read the prefix in one forward pass (no prefill_chunk_size), and leave out "
                "prefix_length and token_type_ids behind it."
            )


@auto_docstring
class LeviathanForCausalLM(LeviathanPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head: causal, or Prefix-LM where a prefix is given."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # as in transformers
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LeviathanConfig):
        super().__init__(config)
        self.model = LeviathanModel(config)
        # CODEPATH: tied baselines and tied generated embeddings; the published Leviathan is untied.
        if config.tie_word_embeddings and config.embedding_type != "lookup":
            # There is no stored table to share: the head is the generated one.
            self.lm_head = None
            self._tied_weights_keys = None  # type: ignore[assignment]  # as transformers writes "none"
        # CODEPATH: vocabularies of numbers (fields) may be learned digit by digit; the published head is dense.
        elif config.output_head == "digits":
            digits = (config.embedding_base, config.embedding_num_digits)
            self.lm_head = DigitHead(config.hidden_size, config.vocab_size, *digits, rank=config.output_head_rank)
            self._tied_weights_keys, self._tp_plan = None, {}  # type: ignore[assignment]  # likewise
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        self.post_init()

    def to_llama(self) -> LlamaForCausalLM:
        """The same causal model as a [`LlamaForCausalLM`] of its own, the embedding baked into a lookup table.

        LLaMA knows no prefix: causal logits are equal, a prefix is lost.

        Raises:
            ValueError: If the head is one of digits, or positions are places in a window: LLaMA has neither.
        """
        if self.config.output_head != "dense":
            raise ValueError(f"output_head = {self.config.output_head!r} is not LLaMA's; only 'dense' heads are.")
        if self.config.position_layout != "sequence":
            raise ValueError(f"position_layout = {self.config.position_layout!r} is not LLaMA's, which counts tokens.")
        embedding = self.model.embed_tokens
        shared = [name for name in inspect.get_annotations(LlamaConfig) if hasattr(self.config, name)]
        config = LlamaConfig(**{name: getattr(self.config, name) for name in shared if name != "model_type"})
        table = embedding.weight.detach()
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("model.embed_tokens.")}
        state["model.embed_tokens.weight"] = table
        state.setdefault("lm_head.weight", table)
        llama = LlamaForCausalLM(config).to(self.device, self.dtype).eval()  # type: ignore[arg-type]  # wrapped there
        llama.load_state_dict(state)
        llama.generation_config = copy.deepcopy(self.generation_config)
        return llama

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, bake: bool = False, **kwargs: Any) -> None:
        """As in transformers; with `bake`, saves [`~LeviathanForCausalLM.to_llama`], for whatever reads LLaMA."""
        save = self.to_llama().save_pretrained if bake else super().save_pretrained
        save(save_directory, *args, **kwargs)

    def output_head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The map from hidden states to logits; a tied generated table is generated once for all its uses."""
        if self.lm_head is not None:
            return self.lm_head
        # Through the module's forward, where sharded parameters are gathered.
        return TableHead(self.model.embed_tokens(torch.arange(self.config.vocab_size, device=self.device)))

    def _loss_without_logits(
        self,
        head: Callable[[torch.Tensor], torch.Tensor],
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Next-token cross entropy in nats a label, or over `num_items_in_batch`."""
        shifted = F.pad(labels, (0, 1), value=-100)[..., 1:] if shift_labels is None else shift_labels
        wanted = shifted != -100
        hidden_states, target, size = hidden_states[wanted], shifted[wanted], self.config.loss_chunk_size
        if isinstance(head, DigitHead):
            loss = chunked_loss(lambda hidden, ids: -head(hidden, ids).sum(), hidden_states, target, size)
        elif size is not None and is_plain(head, hidden_states.device):
            loss = fused_cross_entropy(hidden_states, head.weight, target, size)
        else:
            loss = chunked_loss(cross_entropy_of(head), hidden_states, target, size)
        count = target.numel() if num_items_in_batch is None else num_items_in_batch
        return loss / (count.to(loss.device) if isinstance(count, torch.Tensor) else count)

    @can_return_tuple
    @auto_docstring
    def forward(  # type: ignore[misc]  # as in transformers, kwargs hold position_ids too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        prefix_length: int | torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""prefix_length (`int` or `torch.LongTensor` of shape `(batch,)`, *optional*):
            Number of leading tokens, padding not counted, that attend to one another in both directions; see
            [`LeviathanModel`].
        token_type_ids (`torch.LongTensor` of shape `(batch, sequence_length)`, *optional*):
            The same for each token: 1 in a prefix, 0 elsewhere.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            prefix_length=prefix_length,
            token_type_ids=token_type_ids,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs[0]
        head = self.output_head()

        loss, logits = None, None
        # CODEPATH: runs with large vocabularies train without all logits (turbulence_64.yaml), the others with them.
        if labels is not None and (self.config.loss_chunk_size is not None or self.config.output_head == "digits"):
            loss = self._loss_without_logits(head, hidden_states, labels, **kwargs)
        else:
            if not isinstance(logits_to_keep, int) and logits_to_keep.dim() != 1:
                raise ValueError(
                    f"logits_to_keep has shape {tuple(logits_to_keep.shape)}; expected an integer or positions (kept,)."
                )
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = head(hidden_states[:, keep])
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(  # type: ignore[override]  # args are those of any version
        self,
        input_ids: torch.LongTensor,
        *args: Any,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        prefix_length: int | torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; for a cache of fixed size, masks are made from `token_type_ids`."""
        cache = kwargs.get("past_key_values")
        prefilled = cache is not None and bool(cache.get_seq_length() > 0)
        reads_prefix = prefix_length is not None and (not prefilled or kwargs.get("is_first_iteration"))
        fixed_size = cache is not None and cache.is_compileable
        if prefix_length is not None and reads_prefix and fixed_size:
            given = input_ids if inputs_embeds is None or input_ids.shape[1] > 0 else inputs_embeds
            kwargs["token_type_ids"] = prefix_token_types(
                prefix_length, given.shape[1], given.shape[0], attention_mask, given.device
            )
        kwargs |= {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]  # a mixin's self
        if reads_prefix and not fixed_size:
            inputs["prefix_length"] = prefix_length
        mask, types = inputs.get("attention_mask"), inputs.get("token_type_ids")
        in_mask = isinstance(mask, torch.Tensor) and mask.dim() == 4  # made from the types for a static cache
        # One token at a time is causal; a longer piece behind a filled cache is refused if it has a prefix.
        causal = prefilled and types is not None and (types.shape[-1] == 1 or not (types == 1).any())
        if in_mask or causal:
            inputs.pop("token_type_ids", None)
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, num_new_tokens: int = 1, **kwargs: Any
    ) -> dict[str, Any]:
        # transformers repeats the last token type, which would draw generated tokens into an all-prefix prompt.
        token_type_ids = model_kwargs.pop("token_type_ids", None)
        model_kwargs = super()._update_model_kwargs_for_generation(  # type: ignore[misc]  # likewise
            outputs, model_kwargs, *args, num_new_tokens=num_new_tokens, **kwargs
        )
        if token_type_ids is not None:
            model_kwargs["token_type_ids"] = F.pad(token_type_ids, (0, num_new_tokens))
        return model_kwargs

    @staticmethod
    def create_masks_for_generate(
        config: LeviathanConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.LongTensor | None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Masks for caches of fixed size, prefix included."""
        blocks = None
        if token_type_ids is not None and kwargs.get("is_first_iteration"):
            blocks = prefix_blocks(token_type_ids, position_ids)
        return create_masks_for_generate(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            block_sequence_ids=blocks,
        )


__all__ = ["LeviathanForCausalLM", "LeviathanModel", "LeviathanPreTrainedModel"]
