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
"""What KHRONOS's models share: their network, and its values and derivatives in the box and outside of it."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from sna_core.network import CPNetwork

from .configuration import KhronosConfig
from .tables import by_rows


def build_network(config: KhronosConfig, num_outputs: int, *, shared_components: bool = False) -> CPNetwork:
    """The network that ``config`` describes.

    Each output is the sum of components of its own, or a weighted sum of components that all share.
    """
    return CPNetwork(
        config.num_inputs,
        num_outputs,
        rank=config.rank,
        num_cells=config.num_cells,
        degree=config.degree,
        low=config.input_low,
        high=config.input_high,
        shared_components=shared_components,
        unit_weights=not shared_components,
    )


class KhronosPreTrainedModel(PreTrainedModel):
    """What the models share: initial values, and the network's values and derivatives in the box and outside of it."""

    config: KhronosConfig
    network: CPNetwork
    base_model_prefix = "khronos"
    main_input_name = "x"
    _no_split_modules = ["CPNetwork"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CPNetwork):
            module.reset_parameters()

    # In each of these x is (..., num_inputs). Outside of the box the function is f(c) + grad f(c) . (x - c) with the
    # nearest point c of the box, which moves with those inputs that are inside.

    def _values(self, x: Tensor) -> Tensor:
        # CODEPATH: the first order outside of the box, or the network's own error.
        if self.config.extrapolate == "raise":
            return self.network(x)
        nearest, overshoot = self._nearest(x)
        if not torch.compiler.is_exporting() and not overshoot.any():
            return self.network(nearest)
        values, gradient = self.network.value_and_gradient(nearest)
        return values + (gradient @ overshoot.unsqueeze(-1)).squeeze(-1)

    def _gradient(self, x: Tensor) -> Tensor:
        # CODEPATH: as for values.
        if self.config.extrapolate == "raise":
            return self.network.gradient(x)
        nearest, overshoot = self._nearest(x)
        if not torch.compiler.is_exporting() and not overshoot.any():
            return self.network.gradient(nearest)
        # CODEPATH: a graph to be exported takes no forward mode.
        if torch.compiler.is_exporting():
            gradient, hessian = self.network.gradient(nearest), self.network.hessian(nearest)
            change = (hessian @ overshoot[..., None, :, None]).squeeze(-1)
        else:
            gradient, change, *_ = torch.func.jvp(self.network.gradient, (nearest,), (overshoot,))
        return gradient + change * (overshoot == 0).unsqueeze(-2)

    def _hessian(self, x: Tensor) -> Tensor:
        # CODEPATH: as for values.
        if self.config.extrapolate == "raise":
            return self.network.hessian(x)
        nearest, overshoot = self._nearest(x)
        if not overshoot.any():
            return self.network.hessian(nearest)
        hessian, change, *_ = torch.func.jvp(self.network.hessian, (nearest,), (overshoot,))
        inside = (overshoot == 0).unsqueeze(-2)
        return hessian * (inside | inside.mT).unsqueeze(-3) + change * (inside & inside.mT).unsqueeze(-3)

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest points of the box and the way from them."""
        low, high = (x.new_tensor(ends) for ends in (self.config.input_low, self.config.input_high))
        if x.shape[-1:] != low.shape:
            return x, torch.zeros_like(x)  # the network says what is wrong
        if not torch.compiler.is_exporting() and x.isinf().any():
            raise ValueError("x holds an infinite value, to which nothing can be continued; drop the sample.")
        nearest = x.clamp(low, high)
        return nearest, x - nearest

    def _by_rows(self, function: Callable[[Tensor], Tensor], x: ArrayLike | Tensor) -> np.ndarray | Tensor:
        return by_rows(function, x, self.dtype, self.device)


__all__ = ["KhronosPreTrainedModel"]
