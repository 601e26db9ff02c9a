"""Counts what models of Leviathan do: parameters, arithmetic, memory traffic and memory, on the models themselves.

Nothing of a published size is computed: parameters are counted on the meta device, operations on fake tensors, which
have shapes alone. Backbone and head are counted as `leviathan` runs them on a CPU; the generator's backward looks at
values, so it is counted on real tensors, a few ids at a time, since its work is proportional to them.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from eval.scaling_model import Batch, Parts, Precision
from leviathan import LeviathanConfig, LeviathanForCausalLM
from leviathan.loss_leviathan import chunked_loss, cross_entropy_of, fused_cross_entropy
from leviathan.modeling_leviathan import build_embedding

aten = torch.ops.aten


def _attention(query: Any, key: Any, *_: Any, **__: Any) -> int:
    rows, heads, tokens, dim = query
    return 4 * rows * heads * tokens * key[2] * dim


def _attention_backward(_: Any, query: Any, key: Any, *__: Any, **___: Any) -> int:
    return 5 * _attention(query, key) // 2


def _batched_product(_: Any, a: Any, b: Any, *__: Any, **___: Any) -> int:
    return 2 * a[0] * a[1] * a[2] * b[-1]


# By shapes, what the counter does not know: attention's kernels of the CPU, as it counts those of GPUs, and the product
# that adds in place.
FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.baddbmm_: _batched_product,
}
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.baddbmm_, *FORMULAS}
MADE = {aten.new_full, aten.new_empty, aten.new_zeros, aten.empty_like, aten.zeros_like, aten.ones_like}
NO_WORK = {"prim", "profiler"}  # namespaces of operations that ask and do nothing


@dataclass(frozen=True)
class Count:
    """Work of operations: FLOPs of products, bytes that all others read and write, and their number."""

    flops: float = 0
    bytes: float = 0
    launches: float = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.flops + other.flops, self.bytes + other.bytes, self.launches + other.launches)

    def __mul__(self, factor: float) -> "Count":
        return Count(self.flops * factor, self.bytes * factor, self.launches * factor)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Pass:
    """Work of a forward pass and of its backward."""

    forward: Count
    backward: Count

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> "Pass":
        return Pass(self.forward * factor, self.backward * factor)

    __rmul__ = __mul__

    @property
    def total(self) -> Count:
        """Of both."""
        return self.forward + self.backward


class Counter(TorchDispatchMode):
    """Counts FLOPs, bytes and operations within it. Views move nothing; a gather moves what it takes, not its table."""

    def __init__(self):
        super().__init__()
        self.bytes = self.launches = 0
        self.products = FlopCounterMode(display=False, custom_mapping=FORMULAS)

    def __enter__(self):
        self.products.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any):
        super().__exit__(*error)
        self.products.__exit__(*error)

    @property
    def count(self) -> Count:
        """What was counted so far."""
        return Count(self.products.get_total_flops(), self.bytes, self.launches)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in ((args, kwargs), result))
        storages = {t.untyped_storage()._cdata for t in given}
        is_view = not function._schema.is_mutable and all(t.untyped_storage()._cdata in storages for t in made)
        packet = function._overloadpacket
        if function.namespace in NO_WORK or is_view:
            return result
        self.launches += 1
        if packet not in PRODUCTS:
            self.bytes += _moved(packet, args, given, made)
        return result


def _moved(packet: Any, args: Any, given: list[Tensor], made: list[Tensor]) -> int:
    written = sum(map(_size, made))
    if packet in MADE:
        return written
    if packet in (aten.gather, aten.index, aten.embedding):
        return 2 * written
    if packet in (aten.scatter_add_, aten.index_put_):
        return 3 * _size(given[-1])
    if packet is aten.embedding_dense_backward:
        return written + 3 * _size(args[0])
    return written + sum(map(_size, given))


def _size(tensor: Tensor) -> int:
    # What is expanded is read once.
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def count_parameters(config: LeviathanConfig) -> Parts:
    """Parameters by part of a model that allocates nothing; ``layers`` holds the last norm too."""
    with torch.device("meta"):
        model = LeviathanForCausalLM(config)
    counts = {"embedding": 0, "layers": 0, "head": 0}
    for name, parameter in model.named_parameters():
        part = "embedding" if "embed_tokens" in name else "head" if "lm_head" in name else "layers"
        counts[part] += parameter.numel()
    return Parts(attention=0, **counts)


def count_backbone(config: LeviathanConfig, batch: Batch, precision: Precision) -> Pass:
    """Work of all layers and the last norm, from given embeddings, on fake tensors."""
    with _fake_model(config, precision) as model:
        shape = (batch.rows, batch.tokens, config.hidden_size)
        embeddings = torch.empty(shape, dtype=model.dtype, requires_grad=True)
        given = {"prefix_length": batch.prefix} if batch.prefix else {}
        with Counter() as counter:
            with _autocast(precision):
                hidden = model.model(inputs_embeds=embeddings, use_cache=False, **given).last_hidden_state
            return _finished(counter, hidden)


def count_head(config: LeviathanConfig, num_labels: int, precision: Precision, *, fused: bool = True) -> Pass:
    """Work of the head and the loss, on fake tensors."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    with FakeTensorMode():
        lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        hidden = torch.empty(num_labels, config.hidden_size, dtype=dtype, requires_grad=True)
        labels = torch.zeros(num_labels, dtype=torch.long)
        with Counter() as counter:
            with _autocast(precision):
                if fused:
                    loss = fused_cross_entropy(hidden, lm_head.weight, labels, config.loss_chunk_size)
                else:
                    loss = chunked_loss(cross_entropy_of(lm_head), hidden, labels, config.loss_chunk_size)
            return _finished(counter, loss)


def count_generator(config: LeviathanConfig, num_ids: int) -> Pass:
    """Work of the generator for distinct ids, in float32 on this machine's CPU."""
    embedding = build_embedding(config)
    with Counter() as counter:
        return _finished(counter, embedding.generate(torch.arange(num_ids)))


def _finished(counter: Counter, result: Tensor) -> Pass:
    forward = counter.count
    result.backward(torch.ones_like(result))
    both = counter.count
    return Pass(forward, both + -1 * forward)


@contextlib.contextmanager
def _fake_model(config: LeviathanConfig, precision: Precision) -> Iterator[LeviathanForCausalLM]:
    with FakeTensorMode():
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        yield LeviathanForCausalLM._from_config(config, dtype=dtype).train()


def _autocast(precision: Precision) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast")


@dataclass(frozen=True)
class Backbone:
    """Work of the backbone, which is a sum of terms constant or linear in layers and in rows.

    Attributes:
        fixed, row, layer, layer_row: Work once, a row, a layer, and a row of a layer.
    """

    fixed: Pass
    row: Pass
    layer: Pass
    layer_row: Pass

    def layers(self, num_layers: int, rows: int) -> Pass:
        """Of all layers alone."""
        return num_layers * (self.layer + rows * self.layer_row)

    def total(self, num_layers: int, rows: int) -> Pass:
        """Of the backbone."""
        return self.fixed + rows * self.row + self.layers(num_layers, rows)


def fit_backbone(config: LeviathanConfig, tokens: int, precision: Precision, prefix: int = 0) -> Backbone:
    """Those terms from four counts, of one and two layers and of one and two rows."""
    counts = {}
    for layers in (1, 2):
        shallow = copy.deepcopy(config)
        shallow.num_hidden_layers = layers
        for rows in (1, 2):
            counts[layers, rows] = count_backbone(shallow, Batch(rows, tokens, 1, prefix), precision)
    layer_row = counts[2, 2] + -1 * counts[2, 1] + -1 * counts[1, 2] + counts[1, 1]
    layer = counts[2, 1] + -1 * counts[1, 1] + -1 * layer_row
    row = counts[1, 2] + -1 * counts[1, 1] + -1 * layer_row
    return Backbone(counts[1, 1] + -1 * layer + -1 * row + -1 * layer_row, row, layer, layer_row)


def small_model(config: LeviathanConfig, batch: Batch, precision: Precision) -> tuple[LeviathanForCausalLM, dict]:
    """A model with random weights, and a batch of random ids: as many distinct ones as it says."""
    if batch.distinct_ids > config.vocab_size:
        raise ValueError(f"{batch.distinct_ids} distinct ids of {config.vocab_size}; expected no more than there are.")
    torch.manual_seed(0)
    model = LeviathanForCausalLM(config).train()
    chosen = torch.randperm(config.vocab_size)[: batch.distinct_ids]
    ids = chosen[torch.arange(batch.num_tokens) % batch.distinct_ids].view(batch.rows, batch.tokens)
    labels = ids.clone()
    labels[:, : batch.prefix] = -100
    given = {"prefix_length": batch.prefix} if batch.prefix else {}
    model = model.bfloat16() if precision == "bfloat16" else model
    return model, {"input_ids": ids, "labels": labels, "use_cache": False} | given


def measure_saved_bytes(config: LeviathanConfig, batch: Batch, precision: Precision) -> int:
    """Bytes of the memory that a forward pass keeps for backward on this CPU, parameters apart."""
    model, inputs = small_model(config, batch, precision)
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held.add(inputs["input_ids"].untyped_storage().data_ptr())
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in held:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), _autocast(precision):
        loss = model(**inputs).loss
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def measure_peak_bytes(config: LeviathanConfig, batch: Batch, precision: Precision, *, checkpointing: bool) -> int:
    """The most bytes that a step takes on this CPU, its gradients beside those of the micro-batch before."""
    model, inputs = small_model(config, batch, precision)
    if checkpointing:
        _enable_checkpointing(model)
    # As its sharding libraries do: with bfloat16 weights, the float32 ones are in the optimizer.
    master = [p.detach().float().requires_grad_() for p in model.parameters()] if precision == "bfloat16" else None
    optimizer = torch.optim.AdamW(master or model.parameters(), fused=True)

    def step() -> None:
        with _autocast(precision):
            loss = model(**inputs).loss
        loss.backward()

    step()
    if master:
        for held, parameter in zip(master, model.parameters(), strict=True):
            held.grad = parameter.grad.float()
    optimizer.step()
    if master:
        optimizer.zero_grad()
    tracker = MemTracker()
    tracker.track_external(model, optimizer, *(master or []), inputs["input_ids"], inputs["labels"])
    with tracker:
        step()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def _enable_checkpointing(model: LeviathanForCausalLM) -> None:
    # transformers deprecates the older name, and its oldest version that we take does not know the newer.
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
