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
"""The error of a solution from a second one on half the cells."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sna_core.axis import Axis

NUM_POINTS = 20_000


@dataclass(frozen=True)
class ErrorEstimate:
    """What two resolutions say of each other.

    Attributes:
        difference: Root mean square of their difference over random points of the box, as a fraction of that of the
            solution. It estimates the error of the coarse one.
        error: That of the fine one, by Richardson's extrapolation: the difference over 2^(degree + 1) - 1, with the
            lowest degree of all axes that were coarsened. Too low where cells are too few for that rate, or where the
            rank is what limits.
    """

    difference: float
    error: float


def compare(
    fine: Callable[[Tensor], Tensor], coarse: Callable[[Tensor], Tensor], axes: tuple[Axis, ...], seed: int
) -> ErrorEstimate:
    """The estimate from two functions of points (N, d) on the same box."""
    low, high = (torch.tensor([getattr(axis, end) for axis in axes], dtype=torch.float64) for end in ("low", "high"))
    generator = torch.Generator().manual_seed(seed)
    points = low + (high - low) * torch.rand(NUM_POINTS, len(axes), generator=generator, dtype=torch.float64)
    values = fine(points)
    difference = ((values - coarse(points)).norm() / values.norm().clamp(min=1e-300)).item()
    rates = [axis.degree + 1 for axis in axes if axis.coarsened() != axis and axis.degree is not None]
    return ErrorEstimate(difference, difference / (2 ** min(rates, default=1) - 1))
