r"""How many devices train Leviathan: memory of each, bytes between them and seconds of a step, by strategy.

A ring over N devices sends (N - 1) / N of a tensor's bytes from each, once for a gather or a reduction by shards and
twice for a sum that all get (Patarasuk and Yuan 2009). Bytes of P parameters, and those that each device sends in a
step, times (N - 1) / N:

- ``ddp``: weights 4 P, gradients 4 P and as much in buckets, AdamW 8 P; sends 2 (4 P)
- ``zero1``: 2 P, 2 P, 16 P / N (float32 weights, moments and, in the step, gradients); sends 2 P + 2 P
- ``zero2``: 2 P, 2 P / N, 16 P / N; sends 2 P a micro-batch, and 2 P
- ``zero3``: 2 P / N beside what is live, 2 P / N, 16 P / N; sends 3 (2 P) a micro-batch, less what stayed live
- ``zero3_offload``: as ``zero3``, with weights and optimizer in the host's memory, where AdamW runs
- ``fsdp2``: 4 P / N beside gathered layers, 4 P / N, 8 P / N; sends 2 (2 P) a micro-batch, less the head, which stays
  gathered, and 2 P
- ``tp2`` and so on: t devices of a node divide the matrices of layers and the head among them
  (`LeviathanConfig.base_model_tp_plan`), sum D numbers a token four times a layer and gather the logits; DDP over the
  others

Source: Rajbhandari et al., arXiv 1910.02054, for ZeRO; Shoeybi et al., arXiv 1909.08053, for tensor parallelism.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from eval.scaling_counts import Count, Pass
from eval.scaling_model import (
    FLOAT,
    HALF,
    Batch,
    Precision,
    head_working_bytes,
    layer_weights,
    layer_working_bytes,
    parameters,
    saved_bytes,
)
from leviathan import LeviathanConfig

Sharding = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload"]
SHARDINGS: tuple[Sharding, ...] = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
DEEPSPEED_BUCKET = 5e8  # numbers: DeepSpeed's reduce_bucket_size and allgather_bucket_size
# Its stage3_max_reuse_distance: what is used again before so many other numbers stays gathered. From a layer's forward
# to its backward it is twice what lies behind it.
DEEPSPEED_REUSE = 1e9
DDP_BUCKET = 25 * 2**20  # bytes: PyTorch's bucket_cap_mb
ADAM_TRAFFIC = 28  # bytes a parameter: reads four float32 numbers, writes three
CLIP_TRAFFIC = 12  # bytes a parameter: the norm reads a gradient, the scaling reads and writes it


@dataclass(frozen=True)
class Device:
    """A device and what joins it to others, by its makers' data sheets or as measured.

    Attributes:
        name: Its name.
        source: Where the numbers are from.
        memory_bytes: Its memory.
        bytes_per_second: Bandwidth of its memory.
        half_flops, float_flops: FLOPs a second of dense matrix products in bfloat16 and float32.
        is_asynchronous: Whether operations are queued while earlier ones run.
        devices_per_node: Devices joined by the first of the links below.
        link, network, host: Bytes a second, in one direction, to devices of the node, to other nodes (its share of
            the node's) and to the host's memory.
        host_bytes_per_second: Its share of the bandwidth of the host's memory.
    """

    name: str
    source: str
    memory_bytes: float
    bytes_per_second: float
    half_flops: float
    float_flops: float
    is_asynchronous: bool
    devices_per_node: int = 1
    link: float = math.inf
    network: float = math.inf
    host: float = math.inf
    host_bytes_per_second: float = math.inf


H200 = Device(
    name="NVIDIA H200 SXM",
    source=(
        "NVIDIA H200 data sheet: 141 GB of HBM3e at 4.8 TB/s; dense (half of those with sparsity) bfloat16 989 "
        "TFLOP/s, float32 67 TFLOP/s; NVLink 900 GB/s in both directions together; PCIe 5.0 x16, 64 GB/s in each. "
        "NVIDIA DGX H200 data sheet: 8 GPUs, 8 ports of 400 Gb/s InfiniBand; two Xeon 8480C, by Intel's data sheet "
        "with 8 channels of DDR5-4800 each"
    ),
    memory_bytes=141e9,
    bytes_per_second=4.8e12,
    half_flops=989e12,
    float_flops=67e12,
    is_asynchronous=True,
    devices_per_node=8,
    link=450e9,
    network=50e9,
    host=64e9,
    host_bytes_per_second=2 * 8 * 38.4e9 / 8,
)


@dataclass(frozen=True)
class Assumption:
    """What no data sheet says.

    Attributes:
        products: Share of the peak that matrix products reach.
        bandwidth: Share of the memory's bandwidth that other operations reach.
        link: Share of the links' bandwidth that collectives reach.
        launch_seconds: From one operation to the next, where the device waits for the host.
        hop_seconds: Latency of a collective, times the logarithm (base 2) of the number of devices.
        overlaps: Whether communication hides behind what it can hide behind; otherwise it adds to it.
    """

    products: float
    bandwidth: float
    link: float
    launch_seconds: float
    hop_seconds: float
    overlaps: bool


BEST = Assumption(products=0.8, bandwidth=0.9, link=0.9, launch_seconds=4e-6, hop_seconds=5e-6, overlaps=True)
WORST = Assumption(products=0.5, bandwidth=0.7, link=0.5, launch_seconds=10e-6, hop_seconds=15e-6, overlaps=False)
USABLE = 0.9  # of the memory: the rest is for CUDA's and NCCL's own and for fragmentation


@dataclass(frozen=True)
class Strategy:
    """How a model is spread.

    Attributes:
        sharding: Over the copies of the model.
        tensor_parallel: Devices that share one copy.
        checkpointing: Whether layers are computed again in backward.
    """

    sharding: Sharding
    tensor_parallel: int = 1
    checkpointing: bool = False

    @property
    def name(self) -> str:
        """Without checkpointing."""
        return f"tp{self.tensor_parallel}" if self.tensor_parallel > 1 else self.sharding

    @property
    def precision(self) -> Precision:
        """Of weights and activations."""
        return "autocast" if self.sharding == "ddp" else "bfloat16"

    @property
    def is_fused(self) -> bool:
        """Whether the head's weight is whole on each device, as the fused loss needs it."""
        return self.sharding in ("ddp", "zero1", "zero2") and self.tensor_parallel == 1


@dataclass(frozen=True)
class Work:
    """What a micro-batch takes, as counted.

    Attributes:
        layers: Of all layers.
        ends: Of the last norm and the rotary positions.
        head: Of the head and the loss.
        generator: FLOPs of the generator, which are float32's.
    """

    layers: Pass
    ends: Pass
    head: Pass
    generator: Pass


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, and of its share of the host."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    communication: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """On the device."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working + self.communication


def check_split(config: LeviathanConfig, strategy: Strategy, num_devices: int, device: Device) -> str | None:
    """Why a model cannot be spread so; None if it can."""
    parts = strategy.tensor_parallel
    if num_devices % parts or parts > device.devices_per_node:
        return f"{num_devices} devices are no multiple of {parts} within a node"
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % parts:
            return f"{name} = {getattr(config, name)} is no multiple of {parts}"
    return None


def memory(config: LeviathanConfig, batch: Batch, strategy: Strategy, num_devices: int, accumulation: int) -> Memory:
    """Memory of a device while it trains on a micro-batch of its own."""
    split, precision = strategy.tensor_parallel, strategy.precision
    copies, kind = num_devices // split, strategy.sharding
    counts = parameters(config)
    layer, head = layer_weights(config), counts.head
    # Norms and the generator are whole on each.
    whole = counts.total - (1 - 1 / split) * (config.num_hidden_layers * layer + head)
    saved = saved_bytes(config, batch, precision)
    if strategy.checkpointing:
        kept = config.num_hidden_layers * (saved.layer_input + saved.layer_weights / split)
    else:
        kept = config.num_hidden_layers * (saved.layer + (saved.layer_by_heads + saved.layer_weights) / split)
    kept += saved.embedding + saved.ends + (saved.head if strategy.is_fused else 0)
    working = max(
        head_working_bytes(config, batch, precision, fused=strategy.is_fused),
        layer_working_bytes(config, batch, precision, strategy.checkpointing),
    )
    states = {"activations": kept, "working": working}
    if kind == "ddp":
        buckets = FLOAT * whole if copies > 1 else 0
        return Memory(FLOAT * whole, FLOAT * whole, 2 * FLOAT * whole, **states, communication=buckets)
    share = whole / copies
    if kind == "fsdp2":
        # Two layers at a time, the root group with the head, and their gradients before they are reduced. Where
        # micro-batches are summed first, gradients stay whole until the last.
        ends = counts.embedding + head
        gathered = HALF * 2 * (2 * layer + ends) + (HALF * whole if accumulation > 1 else 0)
        return Memory(FLOAT * share, FLOAT * share, 2 * FLOAT * share, **states, communication=gathered)
    bucket = HALF * min(whole, DEEPSPEED_BUCKET)
    master = 3 * FLOAT * share
    if kind in ("zero1", "zero2"):
        gradients = HALF * (whole if kind == "zero1" else share)
        # A step takes its share of the gradients in float32.
        return Memory(HALF * whole, gradients, master + FLOAT * share, **states, communication=2 * bucket)
    live = HALF * live_parameters(whole)
    if kind == "zero3":
        return Memory(HALF * share, HALF * share, master + FLOAT * share, **states, communication=live + 2 * bucket)
    host = master + FLOAT * share + HALF * share
    return Memory(0, HALF * share, 0, **states, communication=live + 2 * bucket, host=host)


def live_parameters(num_parameters: float) -> float:
    """Parameters that ZeRO-3 keeps gathered between forward and backward: the last, which are used again soon."""
    return min(num_parameters, DEEPSPEED_REUSE / 2)


@dataclass(frozen=True)
class Step:
    """Seconds of a step.

    Attributes:
        forward, backward: Of all micro-batches, without communication.
        optimizer: Of clipping and AdamW.
        communication: Of all collectives.
        total: Of the step, with what overlaps.
    """

    forward: float
    backward: float
    optimizer: float
    communication: float
    total: float


def pass_seconds(count: Count, generator: float, device: Device, assumption: Assumption, precision: Precision) -> float:
    """Seconds of operations: products at the device's rate, all others at its bandwidth, and the launches.

    Args:
        count: Of all but the generator.
        generator: FLOPs of the generator.
        device: Where.
        assumption: Shares of its peaks.
        precision: Of the products.
    """
    rate = device.float_flops if precision == "float32" else device.half_flops
    busy = (count.flops / rate + generator / device.float_flops) / assumption.products
    busy += count.bytes / (device.bytes_per_second * assumption.bandwidth)
    launching = count.launches * assumption.launch_seconds
    return max(busy, launching) if device.is_asynchronous else busy + launching


def step_seconds(
    config: LeviathanConfig,
    batch: Batch,
    work: Work,
    strategy: Strategy,
    num_devices: int,
    accumulation: int,
    device: Device,
    assumption: Assumption,
) -> Step:
    """Seconds of a step of ``accumulation`` micro-batches on each device."""
    split = strategy.tensor_parallel
    work = divided(work, config, batch, strategy.precision, split)
    generator = work.generator.forward.flops, work.generator.backward.flops
    extra = Count(launches=work.generator.forward.launches), Count(launches=work.generator.backward.launches)
    first = work.layers.forward + work.ends.forward + work.head.forward + extra[0]
    second = work.layers.backward + work.ends.backward + work.head.backward + extra[1]
    if strategy.checkpointing:
        second = second + work.layers.forward
    forward, backward = (
        accumulation * pass_seconds(count, generated, device, assumption, strategy.precision)
        for count, generated in zip((first, second), generator, strict=True)
    )
    hidden, exposed, window = communication_seconds(
        config, batch, strategy, num_devices, accumulation, device, assumption
    )
    optimizer = optimizer_seconds(config, strategy, num_devices, accumulation, device, assumption)
    within = backward / accumulation if window == "last backward" else forward + backward
    compute = forward + backward
    left = max(0.0, hidden - within) if assumption.overlaps else hidden
    return Step(forward, backward, optimizer, hidden + exposed, compute + left + exposed + optimizer)


def divided(work: Work, config: LeviathanConfig, batch: Batch, precision: Precision, split: int) -> Work:
    """The work of one of ``split`` devices: products and logits divide, other traffic of layers by what is kept."""
    if split == 1:
        return work
    saved = saved_bytes(config, batch, precision)
    wide = (saved.layer_by_heads + saved.layer_weights) / saved.of_layer

    def layers(count: Count) -> Count:
        return replace(count, flops=count.flops / split, bytes=count.bytes * (1 - wide + wide / split))

    def head(count: Count) -> Count:
        # The gathered logits are read whole by each.
        return replace(count, flops=count.flops / split)

    return replace(
        work,
        layers=Pass(layers(work.layers.forward), layers(work.layers.backward)),
        head=Pass(head(work.head.forward), head(work.head.backward)),
    )


def ring_seconds(num_bytes: float, members: int, spans_nodes: bool, device: Device, assumption: Assumption) -> float:
    """Seconds in which each of ``members`` sends its part of a tensor of ``num_bytes`` around the ring once.

    A node's devices send over their links at once, and leave it over all its ports, each ring over one.
    """
    if members < 2:
        return 0.0
    speed = min(device.link, device.devices_per_node * device.network) if spans_nodes else device.link
    return (members - 1) / members * num_bytes / (speed * assumption.link)


def communication_seconds(
    config: LeviathanConfig,
    batch: Batch,
    strategy: Strategy,
    num_devices: int,
    accumulation: int,
    device: Device,
    assumption: Assumption,
) -> tuple[float, float, Literal["last backward", "all"]]:
    """Seconds of collectives that computation can hide and of those that it cannot, and what can hide them."""
    split, kind = strategy.tensor_parallel, strategy.sharding
    copies, layers = num_devices // split, config.num_hidden_layers
    counts = parameters(config)
    whole = counts.total - (1 - 1 / split) * (layers * layer_weights(config) + counts.head)
    spans = num_devices > device.devices_per_node
    # Where the devices of a node share a model, each ring over the copies has as much of the network as one device.
    rings = replace(device, devices_per_node=max(1, device.devices_per_node // split))

    def ring(num_bytes: float, collectives: float) -> float:
        if copies < 2:
            return 0.0
        latency = collectives * assumption.hop_seconds * math.log2(copies)
        return ring_seconds(num_bytes, copies, spans, rings, assumption) + latency

    inside = 0.0
    if split > 1:
        # Sums are two rings each, four in a layer; checkpointing computes the two of forward again.
        sums = layers * 2 * (6 if strategy.checkpointing else 4) * HALF * batch.num_tokens * config.hidden_size
        gathers = 2 if batch.num_labels > config.loss_chunk_size else 1
        logits = HALF * batch.num_labels * (gathers * config.vocab_size + 2 * config.hidden_size)
        moved = sums + logits
        latency = 4 * layers * assumption.hop_seconds * math.log2(split)
        inside = accumulation * (ring_seconds(moved, split, False, device, assumption) + latency)
    if kind == "ddp":
        return ring(2 * FLOAT * whole, math.ceil(FLOAT * whole / DDP_BUCKET)), inside, "last backward"
    units = layers + 1
    if kind == "zero1":
        return ring(HALF * whole, units), inside + ring(HALF * whole, 1), "last backward"
    if kind == "zero2":
        return accumulation * ring(HALF * whole, units), inside + ring(HALF * whole, 1), "all"
    if kind == "fsdp2":
        gathers = accumulation * ring(HALF * (2 * whole - counts.head), 2 * units)
        return gathers + ring(HALF * whole, units), inside, "all"
    rings_each = HALF * (3 * whole - live_parameters(whole))
    if kind == "zero3_offload":  # from the host in both passes, and gradients to it
        moved = accumulation * rings_each / copies / (device.host * assumption.link)
        return accumulation * ring(rings_each, 3 * units) + moved, inside, "all"
    return accumulation * ring(rings_each, 3 * units), inside, "all"


def optimizer_seconds(
    config: LeviathanConfig,
    strategy: Strategy,
    num_devices: int,
    accumulation: int,
    device: Device,
    assumption: Assumption,
) -> float:
    """Seconds of clipping and AdamW, which move numbers and compute next to nothing."""
    counts, split = parameters(config), strategy.tensor_parallel
    whole = counts.total - (1 - 1 / split) * (config.num_hidden_layers * layer_weights(config) + counts.head)
    share = whole if strategy.sharding == "ddp" else whole / num_devices
    speed = device.host_bytes_per_second if strategy.sharding == "zero3_offload" else device.bytes_per_second
    return share * (ADAM_TRAFFIC + CLIP_TRAFFIC) / (speed * assumption.bandwidth)
