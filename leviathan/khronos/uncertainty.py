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
"""How uncertain a fitted KHRONOS is, in its box and, where it is continued, outside of it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sna_core.als import MAX_MEMORY
from sna_core.laplace import relative_std
from sna_core.network import CPNetwork
from sna_core.normal_equations import Chunk, tangent


@dataclass(frozen=True)
class Interval:
    """Predictions and the ends of their intervals, each (points,) for one output, else (points, num_outputs).

    Attributes:
        prediction: The model's.
        lower: Lower ends.
        upper: Upper ends.
    """

    prediction: np.ndarray | Tensor
    lower: np.ndarray | Tensor
    upper: np.ndarray | Tensor


@torch.no_grad()
def continued_std(network: CPNetwork, factor: Tensor, nearest: Tensor, overshoot: Tensor) -> Tensor:
    r"""[`~sna_core.laplace.relative_std`] of f continued to the first order: (points, num_outputs).

    The derivative in the factors is continued as f is, :math:`j(c) + (x - c) \cdot \nabla j(c)`, from the nearest
    points c of the box, (points, num_inputs), by the way from there, x - c: so the uncertainty grows outside.
    """
    if not overshoot.any():
        return relative_std(network, factor, nearest)
    factors, factor = network.factors.detach().double(), factor.double()

    def features(x: Tensor) -> Tensor:
        return tangent(Chunk(network.splines, x, x, x), factors)  # reads neither targets nor weights

    size = max(1, MAX_MEMORY // (8 * 6 * factors.numel()))
    parts = []
    for points in zip(nearest.double().split(size), overshoot.double().split(size), strict=True):
        at_box, change, *_ = torch.func.jvp(features, points[:1], points[1:])
        parts.append(((at_box + change) @ factor).norm(dim=-1).mT)
    return torch.cat(parts)


__all__ = ["Interval", "continued_std"]
