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
"""Fields as tokens: clipped uniform quantisation of patches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin

from sna_core.digits import digit_layout

Fields = np.ndarray | torch.Tensor


def hilbert_order(size: int) -> np.ndarray:
    """Raster positions of a size x size square in the order in which the Hilbert curve visits them: (size**2,).

    Raises:
        ValueError: If ``size`` is not a power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"patch_size = {size}; the Hilbert order needs a power of two.")
    rest = np.arange(size * size)
    row, column = np.zeros_like(rest), np.zeros_like(rest)
    side = 1
    while side < size:  # from the finest quadrants up: turn the square so far, then put it in its quadrant
        down = (rest // 2) % 2
        right = (rest ^ down) % 2
        flip = (right == 0) & (down == 1)
        row[flip], column[flip] = side - 1 - row[flip], side - 1 - column[flip]
        swap = right == 0
        row[swap], column[swap] = column[swap], row[swap]
        row, column = row + side * down, column + side * right
        rest, side = rest // 4, side * 2
    return row * size + column


class FieldTokenizer(FeatureExtractionMixin):
    r"""Turns scalar fields into token ids and back: one token a pixel, one sequence a square patch.

    A value x becomes the id :math:`\lfloor (x - low) / \Delta \rfloor`, clipped to [0, 2^num_bits), with
    :math:`\Delta = (high - low) / 2^{num\_bits}`; an id becomes the centre of its level. A value in [low, high] returns
    within half a level. Values outside are clipped; ``return_num_clipped=True`` counts them.

    Saved and loaded as every feature extractor of transformers (``AutoFeatureExtractor``), with its range.

    Args:
        patch_size: Side of a patch in pixels; sides of fields are multiples of it.
        num_bits: Bits of an id, 1 to 24; the vocabulary has 2^num_bits ids.
        base: Base of the digits that a separable embedding takes ids apart into.
        low: Lower end of the range, in the field's unit. None until :meth:`fit`.
        high: Upper end of the range.
        order: ``"raster"`` (row by row) or ``"hilbert"`` order of a patch's pixels.

    Source: arXiv 2603.12244, "Distributional sequence modelling of turbulence"; the range and the order are ours.
    """

    model_input_names = ["input_ids"]

    def __init__(
        self,
        patch_size: int = 64,
        num_bits: int = 16,
        base: int = 256,
        low: float | None = None,
        high: float | None = None,
        order: Literal["raster", "hilbert"] = "raster",
        **kwargs,
    ):
        super().__init__(**kwargs)
        if patch_size < 1:
            raise ValueError(f"patch_size = {patch_size}; expected at least 1.")
        if not 1 <= num_bits <= 24:
            raise ValueError(f"num_bits = {num_bits}; expected 1 to 24.")
        if order not in ("raster", "hilbert"):
            raise ValueError(f"order = {order!r}; expected 'raster' or 'hilbert'.")
        digit_layout(2**num_bits, base)  # validates the base
        self.patch_size, self.num_bits, self.base, self.order = patch_size, num_bits, base, order
        if order == "hilbert":
            hilbert_order(patch_size)  # validates the size
        self.low = self.high = None
        if (low is None) != (high is None):
            raise ValueError(f"low = {low} and high = {high}; give both, or neither and call fit.")
        if low is not None:
            self._set_range(float(low), float(high))

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return 2**self.num_bits

    @property
    def tokens_per_patch(self) -> int:
        """Tokens of one patch, which is one state."""
        return self.patch_size**2

    @property
    def num_digits(self) -> int:
        """Digits of an id in ``base``."""
        return digit_layout(self.vocab_size, self.base)[1]

    @property
    def level(self) -> float:
        """Width of one quantisation level, in the field's unit."""
        self._check_fitted()
        return (self.high - self.low) / self.vocab_size

    def fit(self, fields: Fields | Iterable[Fields]) -> FieldTokenizer:
        """Sets the range to the least and greatest value of ``fields``: one array of any shape, or several in turn.

        Fit on training data alone.

        Raises:
            ValueError: If there are no values, some are not finite, or all are equal.
        """
        low, high = np.inf, -np.inf
        for array in [fields] if isinstance(fields, (np.ndarray, torch.Tensor)) else fields:
            array = self._finite(array)
            if array.size:
                low, high = min(low, float(array.min())), max(high, float(array.max()))
        if low > high:
            raise ValueError("fit got no values; give it at least one field.")
        self._set_range(low, high)
        return self

    def __call__(
        self, fields: Fields, return_tensors: Literal["np", "pt"] | None = None, return_num_clipped: bool = False
    ) -> BatchFeature:
        """Quantises fields into patches of ids.

        Args:
            fields: (batch, height, width) or (height, width), real, finite; height and width multiples of the patch.
            return_tensors: ``"np"`` or ``"pt"``; None returns the kind that came in.
            return_num_clipped: Also return ``num_clipped`` (batch,), the values outside [low, high] of each field.

        Returns:
            ``input_ids`` (batch x patches, patch_size**2), int64: fields in turn, their patches row by row.

        Raises:
            ValueError: On values that are not finite, a wrong rank or size, or a tokenizer without a range.
        """
        self._check_fitted()
        if return_tensors not in (None, "np", "pt"):
            raise ValueError(f"return_tensors = {return_tensors!r}; expected 'np', 'pt' or None.")
        as_torch = return_tensors == "pt" or (return_tensors is None and isinstance(fields, torch.Tensor))
        array = self._finite(fields)
        if array.ndim == 2:
            array = array[None]
        if array.ndim != 3 or not len(array):
            raise ValueError(
                f"fields have shape {np.shape(fields)}; expected (batch, height, width) or (height, width), not empty."
            )
        self._check_size(array.shape[1:])
        ids = np.floor((array.astype(np.float64) - self.low) / self.level)
        ids = np.clip(ids, 0, self.vocab_size - 1).astype(np.int64)
        data = {"input_ids": self._to_patches(ids)}
        if return_num_clipped:
            data["num_clipped"] = ((array < self.low) | (array > self.high)).sum((1, 2))
        return BatchFeature({k: torch.from_numpy(v) for k, v in data.items()} if as_torch else data)

    def decode(self, input_ids: Fields, field_shape: tuple[int, int] | None = None) -> Fields:
        """Level centres of ids, patches put back into fields.

        Args:
            input_ids: (batch x patches, patch_size**2) integers, as :meth:`__call__` returns them.
            field_shape: (height, width) of a field; None is a single patch.

        Returns:
            (batch, height, width) float32 of the kind that came in (numpy or torch), in the field's unit.

        Raises:
            ValueError: On ids outside the vocabulary or shapes that do not make whole fields.
        """
        self._check_fitted()
        ids = input_ids.cpu().numpy() if isinstance(input_ids, torch.Tensor) else np.asarray(input_ids)
        height, width = field_shape or (self.patch_size, self.patch_size)
        self._check_size((height, width))
        patches = (height // self.patch_size) * (width // self.patch_size)
        if ids.ndim != 2 or ids.shape[1] != self.tokens_per_patch or ids.shape[0] % patches:
            raise ValueError(
                f"input_ids have shape {ids.shape}; expected (batch x {patches}, {self.tokens_per_patch}) for "
                f"fields of {height} x {width}."
            )
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"input_ids have dtype {ids.dtype}; expected integers.")
        if ids.size and not (ids.min() >= 0 and ids.max() < self.vocab_size):
            raise ValueError(f"input_ids span [{ids.min()}, {ids.max()}]; expected [0, {self.vocab_size - 1}].")
        fields = self._to_fields(self.low + (ids + 0.5) * self.level, height, width).astype(np.float32)
        return torch.from_numpy(fields).to(input_ids.device) if isinstance(input_ids, torch.Tensor) else fields

    def _positions(self) -> np.ndarray:
        return hilbert_order(self.patch_size) if self.order == "hilbert" else np.arange(self.tokens_per_patch)

    def _to_patches(self, fields: np.ndarray) -> np.ndarray:
        batch, height, width = fields.shape
        size = self.patch_size
        patches = fields.reshape(batch, height // size, size, width // size, size).swapaxes(2, 3)
        return patches.reshape(-1, size * size)[:, self._positions()]

    def _to_fields(self, patches: np.ndarray, height: int, width: int) -> np.ndarray:
        size = self.patch_size
        raster = np.empty_like(patches)
        raster[:, self._positions()] = patches
        fields = raster.reshape(-1, height // size, width // size, size, size).swapaxes(2, 3)
        return fields.reshape(-1, height, width)

    def _set_range(self, low: float, high: float) -> None:
        if not (np.isfinite(low) and np.isfinite(high) and low < high):
            raise ValueError(f"the range [{low}, {high}] is empty or not finite; a field needs two different values.")
        self.low, self.high = low, high

    def _check_fitted(self) -> None:
        if self.low is None:
            raise ValueError(
                "this FieldTokenizer has no range yet; call fit(fields) on training data, or give low and high."
            )

    def _check_size(self, shape: tuple[int, ...]) -> None:
        if any(side < 1 or side % self.patch_size for side in shape):
            raise ValueError(
                f"a field of {' x '.join(map(str, shape))} does not divide into patches of {self.patch_size} x "
                f"{self.patch_size}; crop it, or choose another patch_size."
            )

    def _finite(self, fields: Fields) -> np.ndarray:
        if isinstance(fields, torch.Tensor):
            fields = fields.detach().cpu()
            array = (fields.float() if fields.dtype == torch.bfloat16 else fields).numpy()
        else:
            array = np.asarray(fields)
        if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
            raise ValueError(f"fields have dtype {array.dtype}; expected real numbers.")
        if not np.isfinite(array).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise ValueError(f"fields{list(where)} = {array[where]}; expected finite values.")
        return array


__all__ = ["FieldTokenizer"]
