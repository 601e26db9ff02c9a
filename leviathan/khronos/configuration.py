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
"""Configuration of KHRONOS."""

from math import isfinite
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from numpy.typing import ArrayLike
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from leviathan.completed import Completed
from leviathan.sizes import LARGEST_INTEGER, check_extra, check_sizes, check_weights
from sna_core.bspline import UniformBSpline

from .tables import as_points


@strict
class KhronosConfig(PreTrainedConfig):
    r"""The box of a KHRONOS's inputs, and the size of its splines.

    Args:
        input_low: Left ends of the inputs' intervals, one for each input. None is one input from 0 on.
        input_high: Right ends, likewise; None is one input to 1.
        num_outputs: Number of functions; for classification ``num_labels`` counts them.
        rank: Number of components of each output, or of all logits together.
        num_cells: Cells of each input's interval.
        degree: Degree of the B-splines, 0 to 5.
        extrapolate: What becomes of a point outside the box: ``"raise"`` an error, or ``"linear"``, the value at the
            nearest point of the box plus the gradient there times the way from it.
        uncertainty: Whether there is a covariance of the parameters, for intervals; ``fit(uncertainty=True)`` sets it.

    Raises:
        ValueError: If there is not one interval for each input, one is empty, a count is below 1 or the degree is none.

    ```python
    >>> from leviathan import KhronosConfig, KhronosModel

    >>> model = KhronosModel(KhronosConfig(input_low=[0, 0], input_high=[1, 2], rank=2))
    ```
    """

    model_type = "khronos"

    input_low: Completed[list[int | float]] = None
    input_high: Completed[list[int | float]] = None
    num_outputs: int = 1
    rank: int = 4
    num_cells: int = 8
    degree: int = 3
    extrapolate: Literal["raise", "linear"] = "raise"
    uncertainty: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        check_extra(self, kwargs)
        check_sizes(self, "num_outputs", "rank", "num_cells")
        check_sizes(self, "input_low", "input_high", most=LARGEST_INTEGER)
        self.input_low = [0.0] if self.input_low is None else self.input_low
        self.input_high = [1.0] if self.input_high is None else self.input_high
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation. Validates the architecture of the config."""
        if len(self.input_low) != len(self.input_high) or not self.input_low:
            raise ValueError(
                f"input_low has {len(self.input_low)} values and input_high {len(self.input_high)}; expected one of "
                "each for each input."
            )
        for i, (low, high) in enumerate(zip(self.input_low, self.input_high, strict=True)):
            if not (isfinite(low) and isfinite(high) and low < high):
                raise ValueError(f"input {i} has the interval [{low}, {high}]; expected finite ends with low < high.")
        for name in ("num_outputs", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; expected at least 1.")
        basis = UniformBSpline(self.num_cells, self.degree)
        check_weights(
            num_inputs=self.num_inputs, num_outputs=self.num_outputs, rank=self.rank, num_basis=basis.num_basis
        )

    @property
    def num_inputs(self) -> int:
        """Number of columns of x."""
        return len(self.input_low)

    @classmethod
    def for_data(cls, x: ArrayLike | Tensor, *, margin: float = 0.0, **options: Any) -> "KhronosConfig":
        """A configuration whose box is the range of the data, widened by ``margin`` of its width at both ends.

        A constant column gets an interval as wide as the larger of 1 and its value, with the value in the middle.

        Args:
            x: Points (points, num_inputs), a tensor or what numpy takes for an array.
            margin: Fraction of an interval's width, at least 0.
            **options: The other settings.

        Raises:
            ValueError: If x is empty, not a table or not finite, or the margin is negative.
        """
        if not 0 <= margin < float("inf"):
            raise ValueError(f"margin = {margin}; expected a number of at least 0.")
        x = as_points("x", x).double()
        low, high = x.amin(0), x.amax(0)
        half = high / 2 - low / 2
        extra = torch.where(half > 0, 2 * margin * half, low.abs().clamp(min=1.0) / 2)
        return cls(input_low=(low - extra).tolist(), input_high=(high + extra).tolist(), **options)


__all__ = ["KhronosConfig"]
