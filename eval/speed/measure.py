"""What `eval.speed` measures with: alternating timings, peak memory, the ceilings of a device; and what it reports."""

import functools
import multiprocessing
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

Choice = TypeVar("Choice")
Samples = dict[str, list[float]]  # of each compared thing, one number a repeat

PROCESS_STATUS = Path("/proc/self/status")
PRELOADED = ["eval.speed.embedding", "eval.speed.layers"]  # what is measured in processes of their own


@dataclass(frozen=True)
class Setup:
    """Where and how to measure.

    Attributes:
        device: `cpu` or `cuda`.
        dtype: Of what the issue measures in bfloat16: autocast in training, the weights in a rollout.
        repeats: Timings of each thing, at most: slow sections take fewer, and say how many.
        short: Tiny sizes, only to see that everything runs.
        text: A UTF-8 file to take text from; None takes Python's own documentation.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    repeats: int = 5
    short: bool = False
    text: Path | None = None

    def pick(self, *, short: Choice, cpu: Choice, cuda: Choice) -> Choice:
        """The size that fits the device."""
        return short if self.short else cuda if self.device.type == "cuda" else cpu

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def autocast(self) -> torch.autocast:
        """Mixed precision in :attr:`dtype`; none for float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


@dataclass(frozen=True)
class Target:
    """What a ratio is to reach, in the issue's words; `on` the device that the issue names, None for any."""

    text: str
    at_least: float | None = None
    at_most: float | None = None
    on: str | None = None

    def reached(self, ratio: float, setup: Setup) -> bool | None:
        """Whether; None where this run cannot tell: tiny sizes, or another device than the target's."""
        if setup.short or self.on not in (None, setup.device.type):
            return None
        return (self.at_least is None or ratio >= self.at_least) and (self.at_most is None or ratio <= self.at_most)


@dataclass(frozen=True)
class Figure:
    """One comparison: `ratio` = `factor` * median of the first of `ratio_of` / median of the second.

    Attributes:
        what: What was done, or is compared.
        samples: Seconds or MiB of each compared thing.
        ratio_of: The names of the two in the ratio.
        unit: Of the samples.
        factor: For ratios of rates: the work of the second over that of the first.
        target: What the issue asks of the ratio.
        extrapolated: What was measured on a part and scaled, and how; None if nothing was.
    """

    what: str
    samples: Mapping[str, list[float]]
    ratio_of: tuple[str, str]
    unit: Literal["seconds", "mebibytes"] = "seconds"
    factor: float = 1.0
    target: Target | None = None
    extrapolated: str | None = None

    @property
    def ratio(self) -> float:
        """The ratio of the medians."""
        above, below = (float(np.median(self.samples[name])) for name in self.ratio_of)
        return self.factor * above / max(below, 1e-12)

    def record(self, setup: Setup) -> dict[str, Any]:
        """For JSON. `ratio_quartiles` are those of the repeats' own ratios, which say how sure the ratio is."""
        above, below = (np.array(self.samples[name]) for name in self.ratio_of)
        repeats = self.factor * above / np.maximum(below, 1e-12)
        target = self.target
        return {
            "what": self.what,
            self.unit: {name: spread(each) for name, each in self.samples.items()},
            "repeats": len(repeats),
            "ratio_of": list(self.ratio_of),
            "factor": self.factor,
            "ratio": self.ratio,
            "ratio_quartiles": [float(each) for each in np.quantile(repeats, (0.25, 0.75))],
            "target": target and {name: value for name, value in vars(target).items() if value is not None},
            "reached": target and target.reached(self.ratio, setup),
            "extrapolated": self.extrapolated,
        }


@dataclass(frozen=True)
class Check:
    """Whether the compared things computed the same: a difference, and what of it is rounding."""

    what: str
    difference: float
    tolerance: float

    @property
    def equal(self) -> bool:
        """Whether the difference is rounding; never if it is NaN."""
        return self.difference <= self.tolerance

    def record(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        finite = np.isfinite(self.difference)
        return vars(self) | {"difference": float(self.difference) if finite else None, "equal": self.equal}


@dataclass(frozen=True)
class Work:
    """The least that something timed must do: floating-point operations in a precision, bytes read and written."""

    what: str
    seconds: float
    flops: float
    bytes: float
    precision: str

    def against(self, ceilings: "Ceilings") -> dict[str, Any]:
        """The roofline line, for JSON: `floor_seconds` is the least by the measured ceilings."""
        floors = {
            "arithmetic": self.flops / ceilings.flops_per_second[self.precision],
            "memory": self.bytes / ceilings.bytes_per_second,
        }
        limit = max(floors, key=floors.get)
        return vars(self) | {
            "floor_seconds": floors[limit],
            "limit": limit,
            "times_the_floor": self.seconds / floors[limit],
        }


@dataclass(frozen=True)
class Section:
    """What a section found.

    Attributes:
        compared: What against what.
        sizes: Sizes of it.
        figures: The comparisons.
        checks: Whether outputs are the same.
        work: For the roofline.
        numbers: Further numbers, for JSON and the table.
        notes: What a reader must know beside them.
    """

    compared: str
    sizes: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def record(self, setup: Setup) -> dict[str, Any]:
        """For JSON."""
        return {
            "compared": self.compared,
            "sizes": self.sizes,
            "figures": [each.record(setup) for each in self.figures],
            "checks": [each.record() for each in self.checks],
            "roofline": [each.against(measured_ceilings(setup)) for each in self.work],
            "numbers": self.numbers,
            "notes": self.notes,
        }


class CannotRunError(Exception):
    """Says why a section cannot run here."""


def spread(samples: list[float]) -> dict[str, float]:
    """Median, least, greatest, and the interquartile range over the median."""
    low, median, high = (float(each) for each in np.quantile(samples, (0.25, 0.5, 0.75)))
    return {
        "median": median,
        "least": min(samples),
        "greatest": max(samples),
        "spread": (high - low) / max(abs(median), 1e-12),
    }


def alternate(
    setup: Setup,
    runs: Mapping[str, Callable[[], Any]],
    *,
    repeats: int | None = None,
    calls: int = 1,
    warm_up: Mapping[str, Callable[[], Any]] | None = None,
) -> Samples:
    """Seconds a call of each run, once a repeat.

    The runs take turns, in reverse in every second repeat, so that what slows the machine down for a while slows all.
    One call of each, or of `warm_up`, goes before. `calls` of them are timed together, for what is too short to time.
    """
    for run in (runs if warm_up is None else warm_up).values():
        run()
    seconds: Samples = {name: [] for name in runs}
    for repeat in range(repeats or setup.repeats):
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            run = runs[name]
            setup.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            setup.synchronize()
            seconds[name].append((time.perf_counter() - start) / calls)
    return seconds


def median_of(samples: Mapping[str, list[float]], name: str) -> float:
    """The median of one of them."""
    return float(np.median(samples[name]))


def difference(found: Tensor | Iterable[Tensor], expected: Tensor | Iterable[Tensor]) -> float:
    """The largest difference over the largest magnitude expected, for several tensors the greatest of these."""
    pairs = [(found, expected)] if isinstance(found, Tensor) else list(zip(found, expected, strict=True))
    pairs = [(a.detach().double(), b.detach().double()) for a, b in pairs]
    shares = [(a - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in pairs]
    return float(torch.stack(shares).max())  # NaN if one is


def mebibytes_of(
    setup: Setup, preparations: Mapping[str, Callable[..., Callable[[], Any]]], arguments: tuple, warm_up: tuple
) -> Samples:
    """Peak memory of each; `preparations` maps a name to what makes the run. See :func:`peak_mebibytes`."""
    return {name: [peak_mebibytes(setup, prepare, arguments, warm_up)] for name, prepare in preparations.items()}


def peak_mebibytes(setup: Setup, prepare: Callable[..., Callable[[], Any]], arguments: tuple, warm_up: tuple) -> float:
    """Growth of the peak memory in MiB by the run that `prepare(setup, *arguments)` returns.

    On CUDA of what PyTorch allocates, in this process; on a CPU of the resident set, in a process of its own, the run's
    inputs included. There `prepare(setup, *warm_up)` runs first, for libraries to load their kernels.

    Raises:
        CannotRunError: On a CPU without Linux's /proc.
    """
    if setup.device.type == "cuda":
        return _cuda_growth(setup, prepare(setup, *arguments))
    if not PROCESS_STATUS.exists():
        raise CannotRunError("peak memory is read from Linux's /proc, which is not here")
    # A server that has the imports done forks the processes, each as fresh as a new one; a child of this process would
    # have what was measured before.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.submit(_resident_growth, setup, prepare, arguments, warm_up).result()


def _cuda_growth(setup: Setup, run: Callable[[], Any]) -> float:
    run()  # libraries allocate their workspaces
    setup.synchronize()
    before = torch.cuda.memory_allocated(setup.device)
    torch.cuda.reset_peak_memory_stats(setup.device)
    run()
    setup.synchronize()
    return (torch.cuda.max_memory_allocated(setup.device) - before) / 2**20


def _resident_growth(
    setup: Setup, prepare: Callable[..., Callable[[], Any]], arguments: tuple, warm_up: tuple
) -> float:
    prepare(setup, *warm_up)()
    before = _kibibytes("VmRSS")
    prepare(setup, *arguments)()
    return (_kibibytes("VmHWM") - before) / 1024


def _kibibytes(entry: str) -> int:
    # Not getrusage: a child inherits its parent's peak there.
    return int(re.search(rf"{entry}:\s*(\d+) kB", PROCESS_STATUS.read_text())[1])


@dataclass(frozen=True)
class Ceilings:
    """What the device can do at best: bytes read plus written a second, floating-point operations a second."""

    bytes_per_second: float
    flops_per_second: dict[str, float]


@functools.cache
def measured_ceilings(setup: Setup) -> Ceilings:
    """The best of several large copies and of several large matrix products in float32 and bfloat16."""
    count = setup.pick(short=2**16, cpu=2**26, cuda=2**29)
    source = torch.ones(count, device=setup.device)
    target = torch.empty_like(source)
    repeats = max(5, setup.repeats)
    copy = alternate(setup, {"copy": lambda: target.copy_(source)}, repeats=repeats)["copy"]
    size = setup.pick(short=64, cpu=2048, cuda=8192)
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(size, size, device=setup.device).to(dtype)
        seconds = alternate(setup, {"product": functools.partial(torch.mm, matrix, matrix)}, repeats=repeats)["product"]
        flops[precision_of(dtype)] = 2 * size**3 / min(seconds)
    return Ceilings(2 * count * source.element_size() / min(copy), flops)


def precision_of(dtype: torch.dtype) -> str:
    """The name of a dtype: float32, bfloat16."""
    return str(dtype).removeprefix("torch.")
