"""Holds the model of a step against what can be counted and measured on this machine's CPU."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from eval.scaling_cluster import ADAM_TRAFFIC, BEST, WORST, Device, pass_seconds
from eval.scaling_counts import (
    Count,
    count_backbone,
    count_generator,
    count_head,
    measure_peak_bytes,
    measure_saved_bytes,
    small_model,
)
from eval.scaling_model import Batch, Precision, parameters, peak_bytes, saved_bytes
from leviathan import LeviathanConfig

REPEATS = 5
PRODUCT_SIZE, COPY_BYTES = 1024, 2**24


@dataclass(frozen=True)
class MemoryPoint:
    """Bytes counted on this CPU beside those of the formula, and the formula's error."""

    model: str
    precision: str
    checkpointing: bool
    prefix: int
    counted: int
    formula: int
    error: float


@dataclass(frozen=True)
class TimePoint:
    """Seconds of one thread, measured beside those that the model of a step gives.

    Attributes:
        model, what: A whole step, or a part of one, forward and backward.
        tokens: Tokens of the batch.
        num_parameters: Of the whole model.
        measured: The least of several.
        products, traffic, launches: What products take at the measured rate, all else at the measured bandwidth, and
            the operations' own time.
        at_peaks: Their sum.
        best, worst: With the shares of the peaks that are assumed of a GPU.
        is_within: Whether what was measured lies between these.
    """

    model: str
    what: str
    tokens: int
    num_parameters: int
    measured: float
    products: float
    traffic: float
    launches: float
    at_peaks: float
    best: float
    worst: float
    is_within: bool


def small_config(**sizes: Any) -> LeviathanConfig:
    """A model that this CPU trains in a moment; grouped keys, and a generator of odd sizes."""
    given = {
        **{"vocab_size": 2048, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "loss_chunk_size": 64},
        **{"embedding_seed_dim": 12, "embedding_num_heads": 2, "embedding_num_knots": 6, "embedding_rank": 10},
    }
    return LeviathanConfig(**given | sizes)


MODELS: Mapping[str, tuple[LeviathanConfig, Batch]] = {
    "width 96, 3 layers": (small_config(), Batch(2, 96, 150)),
    "width 96, 3 layers, prefix": (small_config(), Batch(2, 96, 150, prefix=48)),
    "width 192, 6 layers": (
        small_config(hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6),
        Batch(2, 128, 200),
    ),
}
TIMED: Mapping[str, tuple[LeviathanConfig, Batch]] = {
    f"width {width}": (
        small_config(
            **{"vocab_size": 8192, "hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": 4},
            **{"loss_chunk_size": 256, "num_attention_heads": heads, "num_key_value_heads": heads},
        ),
        Batch(4, 128, 400),
    )
    for width, heads in ((128, 4), (256, 4), (512, 8))
} | {
    "width 256, published generator": (
        LeviathanConfig(
            **{"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4},
            **{"num_attention_heads": 4, "loss_chunk_size": 256},
        ),
        Batch(4, 128, 400),
    ),
}


def memory_points(
    models: Mapping[str, tuple[LeviathanConfig, Batch]] = MODELS,
) -> tuple[list[MemoryPoint], list[MemoryPoint]]:
    """What forward keeps for backward, and the most that a step takes, for every precision."""
    saved, peaks = [], []
    for name, (config, batch) in models.items():
        precision: Precision
        for precision in get_args(Precision):
            about = (name, precision)
            counted, formula = measure_saved_bytes(config, batch, precision), saved_bytes(config, batch, precision)
            saved.append(_point(MemoryPoint, *about, False, batch.prefix, counted, formula.total))
            for checkpointing in (False, True):
                options = {"checkpointing": checkpointing}
                counted = measure_peak_bytes(config, batch, precision, **options)
                formula = peak_bytes(config, batch, precision, **options)
                peaks.append(_point(MemoryPoint, *about, checkpointing, batch.prefix, counted, formula))
    return saved, peaks


def _point(kind: type, *about: Any) -> Any:
    *_, counted, formula = about
    return kind(*about, formula / counted - 1)


def this_cpu() -> tuple[Device, float]:
    """One thread of this CPU as measured, and the time of an operation that has next to nothing to do.

    Unlike :func:`eval.speed.measure.measured_ceilings` by the thread's own time, as steps here are, and by copies of
    what a step of these models works through, which caches hold in part.
    """
    one, matrix = torch.ones(1), torch.randn(PRODUCT_SIZE, PRODUCT_SIZE)
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    half = matrix.bfloat16()

    def several(run: Callable[[], Any], times: int) -> float:
        return best_seconds(lambda: [run() for _ in range(times)]) / times

    device = Device(
        name="one thread of this CPU",
        source=f"measured: products of {PRODUCT_SIZE} x {PRODUCT_SIZE} matrices, copies of {COPY_BYTES // 2**20} MiB",
        memory_bytes=0,
        bytes_per_second=2 * COPY_BYTES / several(lambda: target.copy_(source), 4),
        half_flops=2 * PRODUCT_SIZE**3 / several(lambda: half @ half, 1),
        float_flops=2 * PRODUCT_SIZE**3 / several(lambda: matrix @ matrix, 1),
        is_asynchronous=False,
    )
    return device, several(lambda: torch.add(one, one), 2000)


def time_points(
    device: Device, launch_seconds: float, models: Mapping[str, tuple[LeviathanConfig, Batch]] = TIMED
) -> list[TimePoint]:
    """Steps in float32, measured and predicted: the generator, all else, and the whole with AdamW."""
    points = []
    for name, (config, batch) in models.items():
        model, inputs = small_model(config, batch, "float32")
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.arange(batch.distinct_ids)
        embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
        given = {name: value for name, value in inputs.items() if name != "input_ids"}

        def whole(model=model, optimizer=optimizer, inputs=inputs) -> None:  # noqa: ANN001
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()

        def rest(model=model, embeddings=embeddings, given=given) -> None:  # noqa: ANN001
            model.zero_grad()
            model(inputs_embeds=embeddings.requires_grad_(), **given).loss.backward()

        def generator(model=model, ids=ids) -> None:  # noqa: ANN001
            model.zero_grad()
            model.get_input_embeddings().generate(ids).sum().backward()

        total = parameters(config).total
        generated = count_generator(config, batch.distinct_ids).total
        head = count_head(config, batch.num_labels, "float32")
        others = (count_backbone(config, batch, "float32") + head).total
        adam = Count(bytes=ADAM_TRAFFIC * total)
        for what, run, count in (
            ("generator", generator, generated),
            ("layers and head", rest, others),
            ("whole step", whole, generated + others + adam),
        ):
            products, traffic = count.flops / device.float_flops, count.bytes / device.bytes_per_second
            launches, measured = count.launches * launch_seconds, best_seconds(run)
            best, worst = (
                pass_seconds(count, 0, device, replace(each, launch_seconds=launch_seconds), "float32")
                for each in (BEST, WORST)
            )
            points.append(
                TimePoint(
                    *(name, what, batch.num_tokens, total, measured, products, traffic, launches),
                    at_peaks=products + traffic + launches,
                    best=best,
                    worst=worst,
                    is_within=best <= measured <= worst,
                )
            )
    return points


def best_seconds(run: Callable[[], None]) -> float:
    """The least CPU time of several runs after one: other processes delay a thread, and do not add to its time."""
    run()
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)
