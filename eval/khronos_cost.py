"""What KHRONOS costs: seconds to predict many points, and memory to predict and to fit them."""

import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from leviathan.khronos import KhronosConfig, KhronosModel
from sna_core.network import CPNetwork, pairwise_product

BOUND = 2**26  # bytes that fit may take beside its table: fewer points than are measured fill them
ROWS_OF_PEERS = 2**14  # that a dense basis or a gather takes at a time, which fit the cache
PRELOADED = [__name__, "eval.tabular"]  # imported once, before what is measured; the latter for `eval.khronos`


@dataclass(frozen=True)
class PredictSpeed:
    """Seconds to predict the same points in float32 by three means.

    Attributes:
        num_points, num_inputs, rank, num_cells, degree: Of the points and the model.
        seconds: Of `KhronosModel.predict`, the median of three.
        gather_seconds: Of a weighted gather of the factors of each input, and their product.
        dense_seconds: Of the whole basis of each input, times its factors.
        largest_difference: Of predictions by these means, over the predictions' standard deviation.
    """

    num_points: int
    num_inputs: int
    rank: int
    num_cells: int
    degree: int
    seconds: float
    gather_seconds: float
    dense_seconds: float
    largest_difference: float


@dataclass(frozen=True)
class MemoryRow:
    """Memory of a task in a process of its own.

    Attributes:
        task: "predict" or "fit".
        num_points: Number of points.
        table_bytes: Of the points and their values, which the caller holds.
        peak_bytes: What the process took at most, beyond what it held before the task.
        bound_bytes: The bound that fit is given, beside the tables; None for predict.
    """

    task: str
    num_points: int
    table_bytes: int
    peak_bytes: int
    bound_bytes: int | None


def predict_speed(num_points: int, *, num_inputs: int = 7, rank: int = 32) -> PredictSpeed:
    """Times `predict` of a model with cubic splines of 32 cells against a gather and a dense basis."""
    torch.manual_seed(0)
    config = KhronosConfig(
        input_low=[0.0] * num_inputs, input_high=[1.0] * num_inputs, rank=rank, num_cells=32, degree=3
    )
    model, x = KhronosModel(config), torch.rand(num_points, num_inputs)

    def seconds(function: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
        function(x[:ROWS_OF_PEERS])
        start = time.perf_counter()
        values = function(x)
        return time.perf_counter() - start, values

    def by_parts(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.no_grad()(lambda x: torch.cat([function(part)[:, 0] for part in x.split(ROWS_OF_PEERS)]))

    ours = [seconds(model.predict) for _ in range(3)]
    predicted = ours[0][1]
    gather_seconds, gathered = seconds(by_parts(partial(gather_forward, model.network)))
    dense_seconds, dense = seconds(by_parts(model.network.reference_forward))
    largest = max((predicted - other).abs().max().item() for other in (gathered, dense))
    return PredictSpeed(
        num_points,
        num_inputs,
        rank,
        config.num_cells,
        config.degree,
        seconds=statistics.median(each for each, _ in ours),
        gather_seconds=gather_seconds,
        dense_seconds=dense_seconds,
        largest_difference=largest / predicted.std().item(),
    )


def gather_forward(network: CPNetwork, x: Tensor) -> Tensor:
    """A CP network of one output at x (points, num_inputs) by a weighted gather for each input: (points, 1)."""
    psi = []
    for spline, factors, column in zip(network.splines, network.factors[:, :, 0], x.mT, strict=True):
        cell, values = spline.local(column)
        rows = cell.unsqueeze(-1) + torch.arange(spline.degree + 1)
        psi.append(F.embedding_bag(rows, factors, per_sample_weights=values, mode="sum"))
    return pairwise_product(torch.stack(psi)).sum(-1, keepdim=True)


def memory_rows(counts: Sequence[int]) -> list[MemoryRow]:
    """Memory of predicting and of fitting as many points, each in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    rows = []
    for task in ("predict", "fit"):
        for num_points in counts:
            with ProcessPoolExecutor(1, mp_context=context) as process:
                rows.append(process.submit(measure_memory, task, num_points).result())
    return rows


def measure_memory(task: str, num_points: int) -> MemoryRow:
    """Memory of a task in this process, which must have done no larger one before.

    Raises:
        ValueError: If the task is none.
    """
    if task not in ("predict", "fit"):
        raise ValueError(f"task = {task!r}; expected predict or fit.")
    torch.manual_seed(0)
    dtype = torch.float32 if task == "predict" else torch.float64  # that they work in
    x = torch.rand(num_points, 7, dtype=dtype)
    # By parts: a copy of the table here would raise the peak that is read at the end.
    y = torch.cat([part.sin().prod(1) for part in x.split(2**12)])
    config = KhronosConfig(input_low=[0.0] * 7, input_high=[1.0] * 7, rank=4, num_cells=4, degree=3)
    model = KhronosModel(config)

    def run(x: Tensor, y: Tensor) -> None:
        if task == "predict":
            model.predict(x)
        else:
            model.fit(x, y, max_sweeps=1, max_memory=BOUND)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a warm-up with few points
        run(x[:500], y[:500])
        before = psutil.Process().memory_info().rss
        run(x, y)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table_bytes = sum(table.numel() * table.element_size() for table in (x, y))
    return MemoryRow(task, num_points, table_bytes, max(0, peak - before), BOUND if task == "fit" else None)
