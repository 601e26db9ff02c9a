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
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin

from sna_core.digits import digit_layout

Fields = np.ndarray | torch.Tensor
SameFields = TypeVar("SameFields", np.ndarray, torch.Tensor)  # what comes in as numpy or torch goes out as that
LARGEST_PATCH = 4096  # side, of which the order of pixels is written out
LARGEST_NUMBER = 1e308  # of an integer that is to become a floating-point number
LARGEST_SCALE = 8  # of fields against a model's data, or the inverse: flows decay, units differ by more


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


def _plain(number: Any) -> Any:
    """Python's number of one of numpy's or torch's, which JSON does not take."""
    is_scalar = isinstance(number, np.generic) or (isinstance(number, torch.Tensor) and number.ndim == 0)
    return number.item() if is_scalar else number


def to_windows(fields: SameFields, patch_size: int, margin: int = 0) -> SameFields:
    """The patches of fields with ``margin`` pixels around each, taken periodically from the field.

    Shapes: (batch, height, width) -> (batch x patches, patch_size + 2 margin, patch_size + 2 margin), numpy or torch;
    fields in turn, their patches row by row.

    Raises:
        ValueError: If patches do not divide a field, or a field has no room for the margin: a patch alone does not
            know what lies around it.
    """
    height, width = fields.shape[-2:]
    size, window = patch_size, patch_size + 2 * margin
    _check_divides((height, width), size)
    if margin and min(height, width) < window:
        raise ValueError(
            f"a margin of {margin} pixels around patches of {size} x {size} needs a periodic field of at least "
            f"{window} x {window}, not {height} x {width}: a patch alone has nothing around it. Give whole fields, or "
            "use a model trained with margin 0."
        )
    inside = np.arange(-margin, size + margin)
    rows, columns = ((np.arange(0, side, size)[:, None] + inside) % side for side in (height, width))
    # (row of patches, 1, window, 1) and (1, column of patches, 1, window)
    windows = fields[:, rows[:, None, :, None], columns[None, :, None, :]]
    return windows.reshape(-1, window, window)


def stitch(patches: SameFields, field_shape: tuple[int, int]) -> SameFields:
    """Fields of their patches, the inverse of :func:`to_windows` without a margin.

    Shapes: (batch x patches, P, P) -> (batch, height, width), numpy or torch, with ``field_shape`` (height, width).
    """
    (height, width), size = field_shape, patches.shape[-1]
    fields = patches.reshape(-1, height // size, width // size, size, size).swapaxes(2, 3)
    return fields.reshape(-1, height, width)


def _check_divides(field_shape: tuple[int, ...], size: int) -> None:
    if any(side < 1 or side % size for side in field_shape):
        raise ValueError(
            f"a field of {' x '.join(map(str, field_shape))} does not divide into patches of {size} x {size}; crop it, "
            "or choose another patch_size."
        )


def check_scale(fields: Fields, rms: float) -> None:
    """Refuses fields (of any shape) whose size says that they are in another unit than a model's data.

    Args:
        fields: In any unit.
        rms: Root mean square of the data.

    Raises:
        ValueError: If the fields' own differs from it by a factor of `LARGEST_SCALE` or more.
    """
    found = float(torch.as_tensor(fields, dtype=torch.float64).square().mean().sqrt())
    if not rms / LARGEST_SCALE < found < rms * LARGEST_SCALE:
        raise ValueError(
            f"the fields' root mean square is {found:.4g}, that of the model's training data {rms:.4g}: they seem to "
            "be in another unit or normalisation. Give them as the training data was, without normalising."
        )


def _positions(size: int, order: str) -> np.ndarray:
    return hilbert_order(size) if order == "hilbert" else np.arange(size * size)


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
        margin: Pixels around a patch that a prefix holds beside the patch: the prior state is then that of a window of
            side patch_size + 2 margin of a periodic field, and what flows in is known. 0 is an isolated patch.
        rms: Root mean square of the data that the range was fitted to, in the field's unit; what is given to a model
            is held against it. None until :meth:`fit`.

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
        margin: int = 0,
        rms: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        patch_size, num_bits, base, margin, low, high, rms = map(
            _plain, (patch_size, num_bits, base, margin, low, high, rms)
        )
        for name, count in {"patch_size": patch_size, "num_bits": num_bits, "base": base, "margin": margin}.items():
            if not isinstance(count, int) or isinstance(count, bool):
                raise ValueError(f"{name} = {count!r:.80}; expected an integer.")
        for name, value in {"low": low, "high": high, "rms": rms}.items():
            is_number = isinstance(value, float) or (isinstance(value, int) and abs(value) < LARGEST_NUMBER)
            if value is not None and not is_number:
                raise ValueError(f"{name} = {value!r:.80}; expected a number or None.")
        if not 1 <= patch_size <= LARGEST_PATCH:
            raise ValueError(f"patch_size = {patch_size}; expected at least 1, and at most {LARGEST_PATCH}.")
        if not 1 <= num_bits <= 24:
            raise ValueError(f"num_bits = {num_bits}; expected 1 to 24.")
        if order not in ("raster", "hilbert"):
            raise ValueError(f"order = {order!r}; expected 'raster' or 'hilbert'.")
        digit_layout(2**num_bits, base)  # validates the base
        self.patch_size, self.num_bits, self.base, self.order = patch_size, num_bits, base, order
        if not 0 <= margin <= patch_size:
            raise ValueError(f"margin = {margin}; expected 0 to patch_size = {patch_size}.")
        self.margin, self.rms = margin, rms
        if order == "hilbert":
            hilbert_order(patch_size), hilbert_order(self.window_size)  # validates the sizes
        self.low: float | None = None
        self.high: float | None = None
        if (low is None) != (high is None):
            raise ValueError(f"low = {low} and high = {high}; give both, or neither and call fit.")
        if low is not None and high is not None:
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
    def window_size(self) -> int:
        """Side of what a prefix holds: the patch and its margin."""
        return self.patch_size + 2 * self.margin

    @property
    def tokens_per_prefix(self) -> int:
        """Tokens of a prior state."""
        return self.window_size**2

    @property
    def num_digits(self) -> int:
        """Digits of an id in ``base``."""
        return digit_layout(self.vocab_size, self.base)[1]

    @property
    def level(self) -> float:
        """Width of one quantisation level, in the field's unit."""
        low, high = self._range()
        return (high - low) / self.vocab_size

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, whose saver notes a pair of references for whatever is called a tokenizer."""
        settings = super().to_dict()
        for auto, reference in settings.get("auto_map", {}).items():
            if isinstance(reference, tuple | list):
                settings["auto_map"] = settings["auto_map"] | {auto: reference[0]}
        return settings

    def fit(self, fields: Fields | Iterable[Fields]) -> FieldTokenizer:
        """Sets the range to the least and greatest value of ``fields``, and their root mean square.

        ``fields`` is one array of any shape, or several in turn.

        Fit on training data alone.

        Raises:
            ValueError: If there are no values, some are not finite, or all are equal.
        """
        low, high, count, squares = np.inf, -np.inf, 0, 0.0
        for array in [fields] if isinstance(fields, (np.ndarray, torch.Tensor)) else fields:
            array = self._finite(array)
            if array.size:
                low, high = min(low, float(array.min())), max(high, float(array.max()))
                count, squares = count + array.size, squares + float(np.square(array, dtype=np.float64).sum())
        if low > high:
            raise ValueError("fit got no values; give it at least one field.")
        self._set_range(low, high)
        self.rms = float(np.sqrt(squares / count))
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
        low, high = self._range()
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
        _check_divides(array.shape[1:], self.patch_size)
        data = {"input_ids": self._flat(to_windows(self._quantise(array), self.patch_size))}
        if return_num_clipped:
            data["num_clipped"] = ((array < low) | (array > high)).sum((1, 2))
        return BatchFeature({k: torch.from_numpy(v) for k, v in data.items()} if as_torch else data)

    def decode(self, input_ids: SameFields, field_shape: tuple[int, int] | None = None) -> SameFields:
        """Level centres of ids, patches put back into fields.

        Args:
            input_ids: (batch x patches, patch_size**2) integers, as :meth:`__call__` returns them.
            field_shape: (height, width) of a field; None is a single patch.

        Returns:
            (batch, height, width) float32 of the kind that came in (numpy or torch), in the field's unit.

        Raises:
            ValueError: On ids outside the vocabulary or shapes that do not make whole fields.
        """
        low, _ = self._range()
        ids = input_ids.cpu().numpy() if isinstance(input_ids, torch.Tensor) else np.asarray(input_ids)
        height, width = field_shape or (self.patch_size, self.patch_size)
        self._check_ids(ids, (height, width))
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"input_ids have dtype {ids.dtype}; expected integers.")
        if ids.size and not (ids.min() >= 0 and ids.max() < self.vocab_size):
            raise ValueError(f"input_ids span [{ids.min()}, {ids.max()}]; expected [0, {self.vocab_size - 1}].")
        fields = self._to_fields(low + (ids + 0.5) * self.level, height, width).astype(np.float32)
        return torch.from_numpy(fields).to(input_ids.device) if isinstance(input_ids, torch.Tensor) else fields

    def prefix(self, input_ids: SameFields, field_shape: tuple[int, int]) -> SameFields:
        """Prior states as a model reads them: the ids of each patch with its margin.

        Shapes: (batch x patches, patch_size**2), as :meth:`__call__` returns them, -> (batch x patches,
        tokens_per_prefix), of the kind that came in (numpy or torch). ``field_shape`` is (height, width) of a field.

        Raises:
            ValueError: If shapes do not make whole fields, or a field has no room for the margin.
        """
        if not self.margin:
            return input_ids
        self._check_ids(input_ids, field_shape)
        fields = self._to_fields(input_ids, *field_shape)
        return self._flat(to_windows(fields, self.patch_size, self.margin))

    def window(self, fields: np.ndarray) -> np.ndarray:
        """Ids of windows, the prior states of patches cut elsewhere: (batch, W, W) real -> (batch, tokens_per_prefix).

        Raises:
            ValueError: On windows of another size than W = patch_size + 2 margin, or values that are not finite.
        """
        self._range()
        if fields.shape[1:] != (self.window_size, self.window_size):
            raise ValueError(
                f"windows have shape {fields.shape}; expected (batch, {self.window_size}, {self.window_size}): patches "
                f"of {self.patch_size} with a margin of {self.margin}."
            )
        return self._flat(self._quantise(self._finite(fields)))

    def centre(self) -> np.ndarray:
        """Where in a prefix each token of the patch lies: (patch_size**2,)."""
        places = np.empty(self.tokens_per_prefix, dtype=np.int64)
        places[_positions(self.window_size, self.order)] = np.arange(self.tokens_per_prefix)
        inside = slice(self.margin, self.margin + self.patch_size)
        patch = places.reshape(self.window_size, self.window_size)[inside, inside]
        return patch.reshape(-1)[_positions(self.patch_size, self.order)]

    def _quantise(self, array: np.ndarray) -> np.ndarray:
        ids = np.floor((array.astype(np.float64) - self._range()[0]) / self.level)
        return np.clip(ids, 0, self.vocab_size - 1).astype(np.int64)

    def _flat(self, windows: SameFields) -> SameFields:
        size = windows.shape[-1]
        return windows.reshape(-1, size * size)[:, _positions(size, self.order)]

    def _to_fields(self, patches: SameFields, height: int, width: int) -> SameFields:
        size = self.patch_size
        raster = np.empty_like(patches) if isinstance(patches, np.ndarray) else torch.empty_like(patches)
        raster[:, _positions(size, self.order)] = patches
        return stitch(raster.reshape(-1, size, size), (height, width))

    def _check_ids(self, input_ids: Fields, field_shape: tuple[int, int]) -> None:
        height, width = field_shape
        _check_divides((height, width), self.patch_size)
        patches = (height // self.patch_size) * (width // self.patch_size)
        if input_ids.ndim != 2 or input_ids.shape[1] != self.tokens_per_patch or input_ids.shape[0] % patches:
            raise ValueError(
                f"input_ids have shape {tuple(input_ids.shape)}; expected (batch x {patches}, {self.tokens_per_patch}) "
                f"for fields of {height} x {width}."
            )

    def _set_range(self, low: float, high: float) -> None:
        if not (low < high and np.isfinite(high - low)):
            raise ValueError(f"the range [{low}, {high}] is empty or not finite; a field needs two different values.")
        self.low, self.high = low, high

    def _range(self) -> tuple[float, float]:
        """``low`` and ``high``; a ``ValueError`` where there are none."""
        if self.low is None or self.high is None:
            raise ValueError(
                "this FieldTokenizer has no range yet; call fit(fields) on training data, or give low and high."
            )
        return self.low, self.high

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


__all__ = ["FieldTokenizer", "check_scale", "stitch", "to_windows"]
