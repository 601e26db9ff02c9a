"""What the tasks of tokens share: how their settings make a Leviathan, and what is said of it."""

import inspect
from typing import Any

from transformers import AutoModelForCausalLM, TrainingArguments

from leviathan import LeviathanConfig, LeviathanForCausalLM

MODEL_KEYS = [*inspect.get_annotations(LeviathanConfig), "attn_implementation"]


def build_leviathan(options: dict[str, Any]) -> LeviathanForCausalLM:
    """A new model of LeviathanConfig's options and `attn_implementation`."""
    options = dict(options)
    attention = options.pop("attn_implementation", None)
    return AutoModelForCausalLM.from_config(LeviathanConfig(**options), attn_implementation=attention)


def describe_leviathan(model: LeviathanForCausalLM, args: TrainingArguments, tokens_per_item: int) -> dict[str, Any]:
    """Kind of the embedding, parameter counts, tokens and an estimate of the memory of training."""
    embedding = sum(p.numel() for p in model.get_input_embeddings().parameters())
    total = sum(p.numel() for p in model.parameters())  # shared tensors count once
    head = 0 if model.config.tie_word_embeddings else sum(p.numel() for p in model.lm_head.parameters())
    items = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    config = model.config
    # Kept for backward a token and layer: about 8 vectors of the hidden size, 3 of the MLP's, and the attention's
    # inputs; the logits of a chunk, their gradient and their float32 copy.
    token = config.num_hidden_layers * (10 * config.hidden_size + 3 * config.intermediate_size) * 4
    batch_tokens = args.per_device_train_batch_size * tokens_per_item
    # Those of a head of digits are as few as the base.
    width = config.vocab_size if config.output_head == "dense" else model.lm_head.base * model.lm_head.num_digits
    logits = min(batch_tokens, config.loss_chunk_size or batch_tokens) * width * 4 * 3
    return {
        "embedding_type": config.embedding_type,
        "num_parameters": total,
        "embedding_parameters": embedding,
        "head_parameters": head,
        "backbone_parameters": total - embedding - head,
        "tokens_per_step": items * tokens_per_item,
        "total_tokens": items * tokens_per_item * args.max_steps,
        "tokens_per_parameter": items * tokens_per_item * args.max_steps / total,
        "estimated_gib": (16 * total + batch_tokens * token + logits) / 2**30,
    }
