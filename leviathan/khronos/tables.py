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
"""Tables that users give, numpy's or torch's, as tensors without what no fit can take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

ROWS_AT_ONCE = 2**16


def as_tensor(name: str, table: ArrayLike | Tensor) -> Tensor:
    """The numbers as a tensor of floating point, without a gradient; float32 and float64 keep their type.

    Raises:
        ValueError: If they are no real numbers.
    """
    if isinstance(table, Tensor):
        tensor = table.detach()
    else:
        array = np.asarray(table)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{name} has the type {array.dtype}; expected real numbers.")
        # A copy: torch shares neither memory that is read-only nor strides that are negative.
        dtype = array.dtype if array.dtype in (np.float32, np.float64) else np.float64
        tensor = torch.from_numpy(np.array(array, order="C", dtype=dtype))
    if tensor.is_complex():
        raise ValueError(f"{name} has the type {tensor.dtype}; expected real numbers.")
    return tensor if tensor.is_floating_point() else tensor.double()


def as_points(name: str, table: ArrayLike | Tensor, num_columns: int | None = None) -> Tensor:
    """Rows of finite numbers (rows, num_columns), at least one.

    Raises:
        ValueError: If there are none, of another number of columns, or not finite.
    """
    table = as_tensor(name, table)
    if table.ndim != 2 or table.shape[1] != (num_columns or table.shape[1]) or not table.numel():
        raise ValueError(
            f"{name} has shape {tuple(table.shape)}; expected (rows, {num_columns or 'columns'}), at least one row"
            f"{'' if num_columns else ' and one column'}."
        )
    check_finite(name, table)
    return table


def check_finite(name: str, table: Tensor) -> None:
    """Raises a ``ValueError`` that names the first element that is NaN or infinite."""
    if (finite := table.isfinite()).all():
        return
    index = (~finite).nonzero()[0].tolist()
    raise ValueError(f"{name}{index} = {table[tuple(index)].item()} is not finite; drop the row or fill in the value.")


def by_rows(
    function: Callable[[Tensor], Tensor], x: ArrayLike | Tensor, dtype: torch.dtype, device: torch.device
) -> np.ndarray | Tensor:
    """A function of rows (rows, columns), a part of x at a time; a tensor for a tensor, else an array."""
    kind = x if isinstance(x, Tensor) else np.asarray(x)
    if kind.ndim != 2:
        raise ValueError(f"x has shape {tuple(kind.shape)}; expected two dimensions, (points, num_inputs).")
    starts = range(0, max(1, len(kind)), ROWS_AT_ONCE)
    with torch.no_grad():
        parts = [function(as_tensor("x", kind[s : s + ROWS_AT_ONCE]).to(device, dtype)) for s in starts]
        values = torch.cat(parts)
    return values.to(x.device) if isinstance(x, Tensor) else values.cpu().numpy()


@dataclass(frozen=True)
class TrainingData:
    """x (points, num_inputs), y (points, num_outputs) and weight (points,) above 0, on a CPU; all but x in float64."""

    x: Tensor
    y: Tensor
    weight: Tensor

    def split(self, fraction: float, seed: int) -> tuple[TrainingData, TrainingData]:
        """A random fraction of the points, and the others.

        Raises:
            ValueError: If one of them would be empty.
        """
        count = round(fraction * len(self.x))
        if not 0 < fraction < 1 or not 0 < count < len(self.x):
            raise ValueError(
                f"validation = {fraction} of {len(self.x)} points; expected a fraction between 0 and 1 that leaves a "
                "point on both sides."
            )
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))
        return self.select(order[:count]), self.select(order[count:])

    def distinct(self) -> TrainingData:
        """Each different point once, with the weights of its duplicates summed, in an order that is always the same.

        Then a weight of two is, to the last digit, the same as the point twice.
        """
        rows, inverse = torch.unique(torch.cat([self.x.double(), self.y], 1), dim=0, return_inverse=True)
        weight = self.weight.new_zeros(len(rows)).index_add_(0, inverse, self.weight)
        x, y = rows.split([self.x.shape[1], self.y.shape[1]], 1)
        return TrainingData(x.to(self.x.dtype), y, weight)

    def counted_once(self) -> TrainingData:
        """:meth:`distinct` points of mean weight one, so that what counts them counts different observations."""
        generator = torch.Generator().manual_seed(0)
        mix = [torch.rand(t.shape[1], generator=generator, dtype=torch.float64) for t in (self.x, self.y)]
        # One number a row tells whether any repeats another, at less cost than all its columns.
        shadow = torch.cat([part.double() @ mix[0] for part in self.x.split(ROWS_AT_ONCE)]) + self.y @ mix[1]
        data = self.distinct() if len(shadow.unique()) < len(shadow) else self
        return replace(data, weight=data.weight * (len(data.weight) / data.weight.sum()))

    def select(self, index: Tensor) -> TrainingData:
        """The points of these indices, or where a mask is true."""
        return TrainingData(self.x[index], self.y[index], self.weight[index])


def training_data(
    x: ArrayLike | Tensor,
    y: ArrayLike | Tensor,
    weight: ArrayLike | Tensor | None = None,
    num_inputs: int | None = None,
    num_outputs: int | None = None,
) -> TrainingData:
    """The points of positive weight of a table that can be fitted. ``y`` (points,) is one output.

    Raises:
        ValueError: If a number is not finite, a shape does not fit, or a weight is negative or all are 0.
    """
    x, y = as_points("x", x, num_inputs).cpu(), as_tensor("y", y).double().cpu()
    y = as_points("y", y.unsqueeze(-1) if y.ndim == 1 else y, num_outputs)
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} rows and y has {len(y)}; expected as many.")
    if weight is None:
        return TrainingData(x, y, y.new_ones(len(y)))
    weight = as_tensor("sample_weight", weight).double().cpu()
    if weight.shape != (len(x),):
        raise ValueError(f"sample_weight has shape {tuple(weight.shape)}; expected ({len(x)},), one for each row of x.")
    check_finite("sample_weight", weight)
    if not ((weight >= 0).all() and weight.any()):
        raise ValueError("sample_weight holds a negative number, or zeros alone; expected numbers of at least 0.")
    return TrainingData(x, y, weight).select(weight > 0)
