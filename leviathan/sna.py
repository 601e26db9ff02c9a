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
"""SNA: the whole class of separable networks as a transformers model."""

from dataclasses import dataclass
from math import comb
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from leviathan.completed import Completed
from leviathan.sizes import LARGEST_INTEGER, MOST_MODULES, check_extra, check_sizes, check_weights
from sna_core.interaction import InteractionObject
from sna_core.network import one_each
from sna_core.separable import SeparableNetwork, SubsetAtoms
from sna_core.spectral import MLPAtoms, make_basis

MOST_SUBSETS = 2**16


@strict
class SnaConfig(PreTrainedConfig):
    r"""Which inputs of a separable network act together, and through which functions.

    Args:
        num_inputs: Number d of inputs.
        num_outputs: Number of functions.
        interaction_order: k. All subsets of up to so many inputs: 1 is an additive model, 2 a pairwise one. None, where
            no ``subsets`` are given, is the one subset of all inputs.
        subsets: Instead, the subsets themselves, each a list of inputs.
        coefficients: :math:`c_S` at the start, one for each subset; None for ones.
        learn_coefficients: Whether they are learned.
        rank: Rank r of the atoms of more than one input.
        decomposition: Of those atoms.
        basis: Of each input. ``"bspline"`` takes ``num_cells`` and ``degree``, the others take ``num_basis``; what is
            left None is stored completed.
        num_cells: Number of cells.
        degree: Degree of the B-splines, 0 to 5.
        num_basis: Number of functions.
        input_low: Left end of the inputs' intervals, one for all or one for each.
        input_high: Right end, likewise.
        activation: A name in ``sna_core.network.ACTIVATIONS``, or None.

    Raises:
        ValueError: If the subsets and their coefficients are no interaction object of that order, the bases' sizes or
            intervals do not fit, or the network refuses a count, the activation or the size of a Tucker core.

    ```python
    >>> from leviathan.sna import SnaConfig, SnaModel

    >>> model = SnaModel(SnaConfig(num_inputs=3, interaction_order=2, rank=4))
    ```
    """

    model_type = "sna"

    num_inputs: int = 1
    num_outputs: int = 1
    interaction_order: int | None = None
    subsets: Completed[list[list[int]]] = None
    coefficients: Completed[list[int | float]] = None
    learn_coefficients: bool = True
    rank: int = 4
    decomposition: Literal["cp", "tucker", "tensor_train"] = "cp"
    basis: Literal["bspline", "chebyshev", "legendre", "fourier", "mlp"] = "bspline"
    num_cells: int | None = None
    degree: int | None = None
    num_basis: int | None = None
    input_low: int | float | list[int | float] = 0.0
    input_high: int | float | list[int | float] = 1.0
    activation: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_extra(self, kwargs)
        check_sizes(self, "num_outputs", "rank", "num_cells", "num_basis")
        check_sizes(self, "num_inputs", most=MOST_MODULES)
        check_sizes(self, "input_low", "input_high", "coefficients", most=LARGEST_INTEGER)
        sizes = {"num_cells": 8, "degree": 3} if self.basis == "bspline" else {"num_basis": 9}
        for name, size in sizes.items():
            if getattr(self, name) is None:
                setattr(self, name, size)
        if self.subsets is None:
            order = self.interaction_order
            if order is not None:
                check_subsets(self.num_inputs, order)
            whole = InteractionObject.full(self.num_inputs)
            interaction = whole if order is None else InteractionObject.up_to(self.num_inputs, order)
            self.subsets = [list(subset) for subset in interaction.subsets]
        if self.coefficients is None:
            self.coefficients = [1.0] * len(self.subsets)
        if self.interaction_order is None:
            self.interaction_order = max(map(len, self.subsets), default=0)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation. Validates the architecture of the config."""
        order = self.interaction.interaction_order
        if order != self.interaction_order:
            raise ValueError(
                f"interaction_order = {self.interaction_order}, but the largest subset has {order} inputs; give one of "
                "interaction_order and subsets."
            )
        width = (self.num_cells or 0) + (self.degree or 0) + (self.num_basis or 0)
        check_weights(num_inputs=self.num_inputs, num_outputs=self.num_outputs, rank=self.rank, num_basis=width)
        with torch.device("meta"):  # neither takes memory nor draws numbers
            self.build_network()

    @property
    def interaction(self) -> InteractionObject:
        """The subsets and their coefficients.

        Raises:
            ValueError: If they do not fit one another or the inputs.
        """
        if len(self.subsets) != len(self.coefficients):
            raise ValueError(
                f"{len(self.coefficients)} coefficients for {len(self.subsets)} subsets; give one for each, or None."
            )
        return InteractionObject(self.num_inputs, zip(map(tuple, self.subsets), self.coefficients, strict=True))

    def build_network(self) -> SeparableNetwork:
        """The network that this describes, with parameters drawn anew; a ``ValueError`` where it is none."""
        sizes = {"num_cells": self.num_cells, "degree": self.degree, "num_basis": self.num_basis}
        ends = (one_each(name, getattr(self, name), self.num_inputs) for name in ("input_low", "input_high"))
        return SeparableNetwork(
            self.interaction,
            [make_basis(self.basis, low, high, **sizes) for low, high in zip(*ends, strict=True)],
            self.num_outputs,
            rank=self.rank,
            decomposition=self.decomposition,
            learn_coefficients=self.learn_coefficients,
            activation=self.activation,
        )


def check_subsets(num_inputs: int, order: int) -> None:
    """Raises a ``ValueError`` if there are more than ``MOST_SUBSETS`` subsets of up to ``order`` inputs."""
    count = 0
    for size in range(1, min(order, num_inputs) + 1):
        count += comb(num_inputs, size)
        if count > MOST_SUBSETS:
            raise ValueError(
                f"{num_inputs} inputs have more than {MOST_SUBSETS} subsets of up to interaction_order = {order}; "
                "lower it, or give the subsets themselves."
            )


@dataclass
class SnaOutput(ModelOutput):
    """What [`SnaModel`] returns.

    Args:
        loss: Mean squared error against the labels, where labels were given.
        prediction: (..., num_outputs).
    """

    loss: torch.Tensor | None = None
    prediction: torch.Tensor | None = None


class SnaModel(PreTrainedModel):
    """A [`~sna_core.separable.SeparableNetwork`] that is saved, loaded and trained as transformers' models are."""

    config: SnaConfig
    base_model_prefix = "sna"
    main_input_name = "x"
    _no_split_modules = ["SeparableNetwork"]

    def __init__(self, config: SnaConfig):
        super().__init__(config)
        self.network = config.build_network()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SubsetAtoms | MLPAtoms):
            module.reset_parameters()
        elif isinstance(module, SeparableNetwork):
            module.reset_coefficients()  # alone: atoms that a checkpoint has stay

    @can_return_tuple
    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> SnaOutput:
        """Evaluates the network, and the mean squared error where labels are given.

        Exported (``torch.export``, ONNX), where nothing can raise, it is NaN at points outside their intervals.

        Args:
            x: Points (..., num_inputs) in the inputs' intervals.
            labels: Values to predict, (..., num_outputs).

        Raises:
            ValueError: If a point is NaN or outside its interval, or a shape or dtype does not fit.
        """
        prediction = self.network(x)
        if labels is None:
            return SnaOutput(prediction=prediction)
        if labels.shape != prediction.shape:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; expected {tuple(prediction.shape)}, a column for each "
                "output."
            )
        return SnaOutput(loss=F.mse_loss(prediction, labels), prediction=prediction)


__all__ = ["SnaConfig", "SnaModel", "SnaOutput"]
