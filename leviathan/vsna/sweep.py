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
"""Sweeps: the distribution of a quantity over millions of random points, in memory that does not grow."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite, sqrt

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sna_core.axis import Axis

Range = tuple[float, float]
Sampler = Callable[[int, torch.Generator], Tensor]
Statistic = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]

BLOCK = 2**16  # samples that are drawn, and summed up, at one time
NUM_BINS = 2**14  # of which at least a quarter lie between the least and the largest value


@dataclass(frozen=True, eq=False)
class SweepResult:
    """What a sweep found.

    Attributes:
        num_samples: How many.
        mean: Of the quantity.
        standard_deviation: Of the samples, with num_samples - 1 in the denominator.
        minimum: Least value.
        maximum: Largest.
        levels: Of the quantiles.
        quantiles: The values below which these fractions of the samples lie, each to ``resolution``.
        counts: Of the samples in each bin of a histogram, (bins,).
        edges: Of its bins, ascending and equally far apart, (bins + 1,).
        resolution: Width of a bin.
        seconds: For all of it.
    """

    num_samples: int
    mean: float
    standard_deviation: float
    minimum: float
    maximum: float
    levels: tuple[float, ...]
    quantiles: tuple[float, ...]
    counts: Tensor
    edges: Tensor
    resolution: float
    seconds: float


def box_sampler(axes: Sequence[Axis], settings: Mapping[str, float | Range | Sampler]) -> Sampler:
    """A function of a count and a generator that draws points, each axis by itself.

    Args:
        axes: In the order of the columns.
        settings: By axis, a number, an interval or a function of a count and a generator that draws (count,). Axes not
            named are uniform over their interval.

    Raises:
        ValueError: If an axis is unknown, or its setting is none of these.
    """
    names = [axis.name for axis in axes]
    if unknown := [name for name in settings if name not in names]:
        raise ValueError(f"the sampler names {unknown}, which are no axes; the axes are {names}.")
    columns = [_column(axis.name, settings.get(axis.name, (axis.low, axis.high))) for axis in axes]
    return lambda count, generator: torch.stack([column(count, generator) for column in columns], -1)


def _column(name: str, setting: float | Range | Sampler) -> Sampler:
    if callable(setting):

        def drawn(count: int, generator: torch.Generator) -> Tensor:
            values = torch.as_tensor(setting(count, generator), dtype=torch.float64)
            if values.shape != (count,):
                raise ValueError(f"the sampler of axis {name!r} drew {tuple(values.shape)}; expected ({count},).")
            return values

        return drawn
    try:
        low, high = map(float, (setting, setting) if isinstance(setting, int | float) else setting)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the sampler has {name} = {setting!r}; expected a number, an interval (low, high) or a function."
        ) from error
    if not (isfinite(low) and isfinite(high) and low <= high):
        raise ValueError(f"the sampler has {name} = {setting!r}; expected finite numbers, the lower one first.")
    return partial(_uniform, low, high)


def _uniform(low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
    if low == high:
        return torch.full((count,), low, dtype=torch.float64)
    share = torch.rand(count, generator=generator, dtype=torch.float64)
    return share.mul_(high - low).add_(low).clamp_(low, high)  # rounding may lead past an end


def run_sweep(
    sampler: Sampler,
    quantity: Callable[[Tensor], Tensor],
    num_samples: int,
    *,
    quantiles: Sequence[float],
    batch_size: int,
    generator: torch.Generator,
    progress: bool,
) -> SweepResult:
    """Draws the samples and sums up their quantity; arguments and errors as of :meth:`VsnaModel.sweep`."""
    start_time = time.perf_counter()
    for name, value, limit in (("num_samples", num_samples, None), ("batch_size", batch_size, BLOCK)):
        if not isinstance(value, int) or not 1 <= value <= (limit or value):
            raise ValueError(f"{name} = {value!r}; expected an integer from 1{f' to {limit}' if limit else ''}.")
    levels = tuple(float(level) for level in quantiles)
    if not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"quantiles = {quantiles}; expected levels from 0 to 1.")
    sums = StreamingSums()
    with torch.no_grad(), tqdm(total=num_samples, unit=" samples", unit_scale=True, disable=not progress) as bar:
        for start in range(0, num_samples, BLOCK):
            count = min(BLOCK, num_samples - start)
            points = sampler(count, generator)
            if points.ndim != 2 or len(points) != count:
                raise ValueError(f"the sampler drew {tuple(points.shape)}; expected ({count}, num_axes).")
            values = []
            for part in points.split(batch_size):
                values.append(quantity(part))
                if values[-1].shape != (len(part),):
                    raise ValueError(
                        f"the statistic of {len(part)} points has shape {tuple(values[-1].shape)}; expected "
                        f"({len(part)},)."
                    )
            values = torch.cat(values).double()
            if not (finite := values.isfinite()).all():
                point = points[~finite][0].tolist()
                raise ValueError(f"the quantity is not finite at {point}; leave the point out or mend the statistic.")
            sums.add(values)
            bar.update(count)
    return sums.result(levels, time.perf_counter() - start_time)


class StreamingSums:
    """Mean, variance, range and a histogram of values that come in parts."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        self.counts = torch.zeros(NUM_BINS, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Takes values (n,) in, in float64 and finite.

        The sums are merged as by Chan, Golub and LeVeque, The American Statistician 37 (1983), eq. 2.1.
        """
        least, largest = values.min().item(), values.max().item()
        if not self.count:
            self.minimum, self.maximum = least, largest
            # A range of nothing gets one that a double can hold beside the value.
            span = max(largest - least, 2**-40 * max(abs(least), abs(largest)), 1e-300)
            self.low, self.width = least, span / NUM_BINS
        count, mean = len(values), values.mean().item()
        total, shift = self.count + count, mean - self.mean
        self.squares += (values - mean).square().sum().item() + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total
        self.minimum, self.maximum = min(self.minimum, least), max(self.maximum, largest)
        while self.minimum < self.low:
            self._double(downwards=True)
        while self.maximum > self.low + NUM_BINS * self.width:
            self._double(downwards=False)
        index = ((values - self.low) / self.width).long().clamp_(0, NUM_BINS - 1)
        self.counts += torch.bincount(index, minlength=NUM_BINS)

    def _double(self, *, downwards: bool) -> None:
        """Twice the range by twice the width of the bins: pairs of bins become one, and none is divided."""
        pairs = self.counts.view(-1, 2).sum(1)
        none = torch.zeros_like(pairs)
        self.counts = torch.cat([none, pairs] if downwards else [pairs, none])
        self.low -= NUM_BINS * self.width if downwards else 0.0
        self.width *= 2

    def result(self, levels: tuple[float, ...], seconds: float) -> SweepResult:
        """The sums as they are."""
        edges = self.low + self.width * torch.arange(NUM_BINS + 1, dtype=torch.float64)
        return SweepResult(
            num_samples=self.count,
            mean=self.mean,
            standard_deviation=sqrt(self.squares / max(1, self.count - 1)),
            minimum=self.minimum,
            maximum=self.maximum,
            levels=levels,
            quantiles=tuple(map(self._quantile, levels)),
            counts=self.counts,
            edges=edges,
            resolution=self.width,
            seconds=seconds,
        )

    def _quantile(self, level: float) -> float:
        """As if the samples of a bin were equally far apart in it."""
        below = self.counts.cumsum(0)
        wanted = level * self.count
        i = min(int(torch.searchsorted(below, wanted)), NUM_BINS - 1)
        here = self.counts[i].item()
        share = (wanted - (below[i].item() - here)) / here if here else 0.0
        return min(max(self.low + self.width * (i + share), self.minimum), self.maximum)


__all__ = ["SweepResult"]
