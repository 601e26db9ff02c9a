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
"""Rotary positions of pixels: where a token lies in its window, not where it stands in the sequence."""

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .configuration_leviathan import LeviathanConfig


class WindowRotaryEmbedding(LlamaRotaryEmbedding):
    r"""LLaMA's rotary embedding of the places that tokens have in a window.

    A sequence is a window of side W = P + 2 m (the prior state: a patch of side P and its margin m), then the patch. A
    pixel (i, j) of the patch turns as place :math:`W^2 + (i + m) W + j + m`, so that it is as far from the same pixel
    of the prior state, :math:`W^2`, and from any neighbour of that pixel, wherever it lies. Without a margin these are
    the positions of the sequence.

    Shapes: position_ids (batch or 1, tokens), places in the sequence, -> cosines and sines (batch or 1, tokens,
    head_dim), in the dtype of the hidden states.
    """

    def __init__(self, config: LeviathanConfig):
        super().__init__(config=config)  # type: ignore[arg-type]  # what it reads is there
        assert config.patch_size is not None, "as the config has checked"
        self.patch_size, self.margin = config.patch_size, config.patch_margin

    def places(self, position_ids: Tensor) -> Tensor:
        """Places in the window, counted on from one state to the next; of the shape that came in."""
        side = self.patch_size + 2 * self.margin
        inside = position_ids - side**2  # of the patch
        row, column = inside // self.patch_size + self.margin, inside % self.patch_size + self.margin
        return torch.where(inside < 0, position_ids, side**2 + row * side + column)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles."""
        return super().forward(x, self.places(position_ids))


__all__ = ["WindowRotaryEmbedding"]
