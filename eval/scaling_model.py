r"""What a step of training Leviathan takes on one device: parameters, arithmetic and memory, as closed formulas.

Of a model with a separable embedding, LLaMA's layers and an untied dense head, whose loss is computed by chunks. With
hidden size D, MLP width F, A heads (G of keys) of d dimensions, L layers and V ids; a generator of k digits in base b,
s coordinates, h heads, K knots and rank R; N tokens, n distinct ids and M labels:

.. math::
    P &= k b s + h s^2 + 2 h s + h s K R + h R D + D + L (2 D A d + 2 D G d + 3 D F + 2 D) + D + V D \\
    C &= 6 N L (2 D A d + 2 D G d + 3 D F) + 14 L A d \, p + 6 M V D + n h (6 s^2 + 8 s K R + 6 R D)

C counts a multiplication and an addition as two, of matrix products alone, as
``torch.utils.flop_counter.FlopCounterMode`` does, with its convention for attention: p pairs of the kernels' whole
rectangles, two products forward and five backward, since flash kernels compute the scores again. The generator's
factors, too, are computed again in backward. :mod:`eval.scaling_counts` counts all of this on the models themselves.

Memory is counted in bytes that PyTorch's operations keep, as they are written in transformers' LLaMA layers and in
`leviathan`; no compiler fuses any.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from leviathan import LeviathanConfig

# Weights and products in float32; float32 weights under autocast, as the Trainer does; all in bfloat16, as sharding
# libraries do, which keep float32 weights in the optimizer alone.
Precision = Literal["float32", "autocast", "bfloat16"]
ADAM_BYTES = 8  # of AdamW's moments in float32
FLOAT, HALF = 4, 2


@dataclass(frozen=True)
class Batch:
    """Sequences of a forward pass.

    Attributes:
        rows: Number of sequences.
        tokens: Tokens of each.
        distinct_ids: Ids that the generator makes embeddings of.
        prefix: Leading tokens of each that see one another and have no labels.
    """

    rows: int
    tokens: int
    distinct_ids: int
    prefix: int = 0

    def __post_init__(self):
        if self.rows < 1 or not 0 <= self.prefix < self.tokens or not 1 <= self.distinct_ids <= self.num_tokens:
            raise ValueError(f"{self}: expected rows of more tokens than their prefix, and 1 to rows x tokens ids.")

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.tokens

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted."""
        return self.rows * (self.tokens - max(self.prefix, 1))

    @property
    def num_pairs(self) -> int:
        """Pairs of tokens in the rectangles that attention's kernels are called on."""
        p, t = self.prefix, self.tokens
        return self.rows * (t * t if p <= 1 else p * p + (t - p) * t)


@dataclass(frozen=True)
class Parts:
    """A quantity by part of the model; ``layers`` is of all of them, without ``attention``'s scores."""

    embedding: float
    layers: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """Of the model."""
        return self.embedding + self.layers + self.attention + self.head


def check_covered(config: LeviathanConfig) -> None:
    """Raises a ValueError where the formulas do not describe the model of a config."""
    wrong = [
        f"{name} = {getattr(config, name)!r}"
        for name, expected in {
            **{"embedding_type": "separable", "output_head": "dense", "tie_word_embeddings": False},
            **{"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "embedding_seed_bias": False},
            **{"embedding_residual": False, "embedding_trainable_knot_scale": False, "embedding_token_rank": 0},
            **{"embedding_normalize_output": True, "embedding_max_chunk_tokens": None},
            "embedding_ordered": False,
        }.items()
        if getattr(config, name) != expected
    ]
    if config.loss_chunk_size is None:
        wrong.append("loss_chunk_size = None")
    if wrong:
        raise ValueError(
            f"the formulas do not cover {', '.join(wrong)}; give a separable embedding with its defaults, no biases, "
            "an untied dense head and a loss_chunk_size."
        )


def layer_weights(config: LeviathanConfig) -> int:
    """Numbers in the matrices of a layer: 2 D A d + 2 D G d + 3 D F."""
    heads = config.num_attention_heads + config.num_key_value_heads
    return config.hidden_size * (2 * heads * config.head_dim + 3 * config.intermediate_size)


def parameters(config: LeviathanConfig) -> Parts:
    """Number of parameters; ``layers`` holds the last norm too."""
    seed, heads, dim = config.embedding_seed_dim, config.embedding_num_heads, config.hidden_size
    knots, rank = config.embedding_num_knots, config.embedding_rank
    return Parts(
        embedding=config.embedding_num_digits * config.embedding_base * seed
        + heads * (seed**2 + 2 * seed + seed * knots * rank + rank * dim)
        + dim,
        layers=config.num_hidden_layers * (layer_weights(config) + 2 * dim) + dim,
        attention=0,
        head=config.vocab_size * dim,
    )


def flops(
    config: LeviathanConfig, batch: Batch, direction: Literal["forward", "backward", "both"] = "both", *, fused: bool
) -> Parts:
    """Floating-point operations of matrix products.

    Args:
        config: The model's sizes.
        batch: What it reads.
        direction: The loss takes its gradients where it is computed: they count as forward where it is fused.
        fused: Whether the head's gradients are taken while its logits are there; otherwise the logits of more than one
            chunk are computed twice. That is so where the head's weight is sharded.
    """
    seed, heads, rank = config.embedding_seed_dim, config.embedding_num_heads, config.embedding_rank
    product = 2 * heads * seed * config.embedding_num_knots * rank
    maps = 2 * heads * (seed**2 + rank * config.hidden_size)
    scores = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * batch.num_pairs
    layers = 2 * batch.num_tokens * config.num_hidden_layers * layer_weights(config)
    logits = 2 * batch.num_labels * config.vocab_size * config.hidden_size
    again = 0 if fused or batch.num_labels <= config.loss_chunk_size else logits
    forward = Parts(batch.distinct_ids * (maps + product), layers, scores, 3 * logits if fused else logits)
    backward = Parts(
        batch.distinct_ids * (2 * maps + 3 * product), 2 * layers, 5 * scores // 2, 0 if fused else 2 * logits + again
    )
    if direction == "both":
        return add(forward, backward)
    return forward if direction == "forward" else backward


def add(*parts: Parts) -> Parts:
    """The sum, part by part."""
    return Parts(*(sum(each) for each in zip(*(vars(part).values() for part in parts), strict=True)))


@dataclass(frozen=True)
class Saved:
    """Bytes that the forward pass keeps for backward, beside the parameters.

    Attributes:
        layer: Of one layer, without the two below.
        layer_by_heads: Of one layer, as wide as its heads or its MLP: what tensor parallelism divides.
        layer_weights: Copies of one layer's matrices in bfloat16, which autocast makes.
        layer_input: What checkpointing keeps of a layer.
        embedding: Of the generator and the lookup.
        ends: Of the rotary positions and the last norm.
        head: Gradients that the fused loss keeps.
        num_layers: Number of layers.
    """

    layer: int
    layer_by_heads: int
    layer_weights: int
    layer_input: int
    embedding: int
    ends: int
    head: int
    num_layers: int

    @property
    def of_layer(self) -> int:
        """One whole layer."""
        return self.layer + self.layer_by_heads + self.layer_weights

    @property
    def total(self) -> int:
        """Without checkpointing."""
        return self.num_layers * self.of_layer + self.embedding + self.ends + self.head

    @property
    def checkpointed(self) -> int:
        """With every layer checkpointed; autocast's copies stay until the forward pass ends."""
        return self.num_layers * (self.layer_input + self.layer_weights) + self.embedding + self.ends + self.head


def saved_bytes(config: LeviathanConfig, batch: Batch, precision: Precision) -> Saved:
    """Bytes kept for backward.

    Raises:
        ValueError: If the precision is unknown.
    """
    _check_precision(precision)
    dim, wide = config.hidden_size, config.num_attention_heads * config.head_dim
    # Of the stream between layers and of what enters matrix products.
    stream, product = _stream(precision), FLOAT if precision == "float32" else HALF
    has_prefix = batch.prefix > 1
    keys = wide if has_prefix else config.num_key_value_heads * config.head_dim  # which a prefix repeats for all heads
    outputs = 2 if has_prefix else 1  # the blocks' and what they are joined to
    inputs = 5 if precision == "autocast" else 2  # autocast converts for each matrix, others share
    norm = dim * (FLOAT + stream) + FLOAT
    by_heads = product * ((1 + outputs) * wide + 2 * keys + 4 * config.intermediate_size)
    by_heads += FLOAT * config.num_attention_heads
    tokens, ids = batch.num_tokens, batch.distinct_ids
    seed, heads, rank = config.embedding_seed_dim, config.embedding_num_heads, config.embedding_rank
    generated = 8 * config.embedding_num_digits + seed * stream + FLOAT * heads * (3 * seed + 2 + rank)
    generated += heads * rank * stream + dim * (FLOAT + stream) + FLOAT
    splines = FLOAT * heads * seed * config.embedding_num_knots * rank if precision == "bfloat16" else 0
    return Saved(
        layer=tokens * (2 * norm + inputs * dim * product),
        layer_by_heads=tokens * by_heads,
        layer_weights=HALF * layer_weights(config) if precision == "autocast" else 0,
        layer_input=tokens * dim * stream,
        embedding=ids * generated + splines + 8 * tokens,
        ends=tokens * (norm + 1) + 2 * batch.tokens * config.head_dim * stream,
        head=(batch.num_labels + config.vocab_size) * dim * stream,
        num_layers=config.num_hidden_layers,
    )


def state_bytes(num_parameters: float, precision: Precision) -> int:
    """Weights, gradients and AdamW's moments, unsharded; with bfloat16 weights, float32 ones in the optimizer too."""
    _check_precision(precision)
    master = FLOAT if precision == "bfloat16" else 0
    return int(num_parameters * (2 * _stream(precision) + master + ADAM_BYTES))


def head_working_bytes(config: LeviathanConfig, batch: Batch, precision: Precision, *, fused: bool) -> int:
    """Bytes that come and go in the head, beyond what it keeps: the loss forward, or the scaling of its gradients.

    A chunk's logits are there once as products and once as logarithms of shares in float32, while those of the chunk
    before have not gone yet.
    """
    _check_precision(precision)
    product = FLOAT if precision == "float32" else HALF
    chunk = min(config.loss_chunk_size, batch.num_labels) * config.vocab_size
    weight, hidden = config.vocab_size * config.hidden_size, batch.num_labels * config.hidden_size
    several = batch.num_labels > config.loss_chunk_size
    converted = HALF if product == HALF else 0  # a chunk's gradients beside the float32 ones they come from
    first = product + FLOAT if product == FLOAT else max(product + FLOAT, FLOAT + converted)
    logits = chunk * (FLOAT + converted + product + FLOAT if several else first)
    gradients = chunk * (FLOAT + converted) + weight * product
    copied = weight * HALF if precision == "autocast" else 0
    exact = weight * (FLOAT - _stream(precision))  # the gradient is summed in float32 and kept as the weight is
    if not fused:  # logits, in float32, logarithms of shares; backward two of them and a gradient
        return hidden * _stream(precision) + copied + max(chunk * (product + 2 * FLOAT), gradients)
    forward = hidden * _stream(precision) + copied + exact + max(logits, gradients)
    backward = (weight + hidden) * _stream(precision)
    return max(forward, backward)


def peak_bytes(config: LeviathanConfig, batch: Batch, precision: Precision, *, checkpointing: bool) -> int:
    """The most that a step takes on one device, gradients of an earlier micro-batch included.

    The most is either in the head, with all that layers keep, or in a layer's backward, when what the head kept has
    gone: there, the gradients of what the layer is as wide as, and with checkpointing what it keeps.
    """
    saved, states = saved_bytes(config, batch, precision), state_bytes(parameters(config).total, precision)
    kept = saved.checkpointed if checkpointing else saved.total
    in_head = kept + head_working_bytes(config, batch, precision, fused=True)
    return states + max(in_head, kept - saved.head + layer_working_bytes(config, batch, precision, checkpointing))


def layer_working_bytes(config: LeviathanConfig, batch: Batch, precision: Precision, checkpointing: bool) -> int:
    """Bytes that come and go in the backward pass of a layer: its widest gradients, and what it computes again."""
    saved = saved_bytes(config, batch, precision)
    product = FLOAT if precision == "float32" else HALF
    widest = batch.num_tokens * (3 * config.intermediate_size * product + config.hidden_size * FLOAT)
    again = saved.layer + saved.layer_by_heads if checkpointing else 0
    return widest + again + FLOAT * config.hidden_size * config.intermediate_size


def _stream(precision: Precision) -> int:
    return HALF if precision == "bfloat16" else FLOAT


def _check_precision(precision: str) -> None:
    if precision not in get_args(Precision):
        raise ValueError(f"precision = {precision!r}; expected one of {', '.join(get_args(Precision))}.")
