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
"""Points of a VSNA: whether they lie in its box, and in which type they are evaluated."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sna_core.axis import Axis


def inside(points: Tensor, axes: Sequence[Axis], dtype: torch.dtype) -> Tensor:
    """The points (..., num_axes) in ``dtype``, once they are known to lie in the box.

    They are looked at in their own type, in which an end of an interval is itself. In another that end, rounded, may
    lie outside by a digit; it is brought back. In an exported graph, which cannot raise, points outside become NaN.

    Raises:
        ValueError: If there is not a column for each axis, the points are no floating-point numbers, or one is NaN or
            outside of its axis's interval.
    """
    names = [axis.name for axis in axes]
    if not isinstance(points, Tensor) or not points.is_floating_point():
        raise ValueError(f"points are {getattr(points, 'dtype', type(points))}; expected a floating-point tensor.")
    if points.shape[-1:] != (len(axes),):
        raise ValueError(
            f"points have shape {tuple(points.shape)}; expected (..., {len(axes)}), a column for each of {names}."
        )
    ends = [[axis.low for axis in axes], [axis.high for axis in axes]]
    low, high = points.new_tensor(ends)
    within = (points >= low) & (points <= high)  # False for NaN
    if torch.compiler.is_exporting():
        points = torch.where(within, points, torch.nan)
    elif not within.all():
        *index, i = (~within).nonzero()[0].tolist()
        value, axis = points[(*index, i)].item(), axes[i]
        raise ValueError(
            f"{axis.name}{index or ''} = {value!r} lies outside axis {axis.name!r}, [{axis.low:g}, {axis.high:g}]; ask "
            "inside of it, or solve the problem on a wider one."
        )
    if points.dtype == dtype:
        return points
    low, high = torch.tensor(ends, dtype=dtype, device=points.device)
    return points.to(dtype).clamp(low, high)
