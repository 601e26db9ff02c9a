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
"""Configuration of VSNA."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from leviathan.completed import Completed
from leviathan.sizes import MOST_MODULES, check_extra, check_sizes, check_weights
from sna_core.axis import Axis
from sna_core.network import check_counts
from sna_core.operators import Problem

Decomposition = Literal["cp", "tucker", "tensor_train"]


@strict
class VsnaConfig(PreTrainedConfig):
    r"""The axes of a field of space, time and parameters, and the form in which it is kept.

    Args:
        axes: The keyword arguments of an [`~sna_core.axis.Axis`] for each, in the order of a point's columns. None is
            one axis x from 0 to 1.
        decomposition: ``"cp"``, a sum of products; ``"tucker"``, one in reduced bases; or ``"tensor_train"``.
        rank: Number of components, of a train the largest inner rank.
        max_rank: Largest that a solve may use; None for ``rank``, which a solve replaces by what it found.
        train_ranks: The inner ranks of a train, one less than there are axes; None for ``rank``.
        frame_sizes: Size of each axis's reduced basis, for ``"tucker"`` alone; None for at most ``rank``.
        axis_order: The axis of each core of a train; None for the order of the axes.
        equation: What the field solves, as text.

    Raises:
        ValueError: If an axis is none or its name is taken, a size is below 1 or belongs to another decomposition, or
            ``axis_order`` does not have each axis once.

    ```python
    >>> from leviathan import VsnaConfig, VsnaModel

    >>> axes = [{"name": "x", "low": 0, "high": 1, "num_cells": 16}, {"name": "t", "low": 0, "high": 2}]
    >>> model = VsnaModel(VsnaConfig(axes=axes, rank=4))
    ```
    """

    model_type = "vsna"

    axes: Completed[list[dict]] = None
    decomposition: Decomposition = "cp"
    rank: int = 8
    max_rank: Completed[int] = None
    train_ranks: list[int] | None = None
    frame_sizes: list[int] | None = None
    axis_order: list[int] | None = None
    equation: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_extra(self, kwargs)
        check_sizes(self, "rank", "max_rank", "train_ranks", "frame_sizes")
        self.axes = [{"name": "x", "low": 0.0, "high": 1.0}] if self.axes is None else self.axes
        self.dtype = "float64" if self.dtype is None else self.dtype  # what a solve is worth needs more than float32
        self.max_rank = self.rank if self.max_rank is None else self.max_rank
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation. Validates the architecture of the config."""
        if len(self.axes) > MOST_MODULES:
            raise ValueError(f"there are {len(self.axes)} axes; expected at most {MOST_MODULES}.")
        axes = self.problem_axes
        names = [axis.name for axis in axes]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"the axes are named {names}; expected at least one, each with a name of its own.")
        num_axes, is_train = len(axes), self.decomposition == "tensor_train"
        expected = {
            "train_ranks": num_axes - 1 if is_train else None,
            "axis_order": num_axes if is_train else None,
            "frame_sizes": num_axes if self.decomposition == "tucker" else None,
        }
        for name, length in expected.items():
            given = getattr(self, name)
            if given is not None and len(given) != length:
                takes = "none" if length is None else f"{length} numbers"
                raise ValueError(f"{name} = {given}; decomposition = {self.decomposition!r} takes {takes} here.")
        check_counts(rank=self.rank, max_rank=self.max_rank)
        widest = max(axis.basis.num_basis for axis in axes)
        check_weights(num_basis=widest, rank=self.rank, next_rank=self.rank if is_train else 1)
        for name in ("train_ranks", "frame_sizes"):
            check_counts(**{f"{name}[{i}]": size for i, size in enumerate(getattr(self, name) or ())})
        for axis, size in zip(axes, self.frame_sizes or (), strict=False):
            if size > axis.basis.num_basis:
                raise ValueError(
                    f"axis {axis.name!r} has a frame of {size}; expected at most its {axis.basis.num_basis} functions."
                )
        if self.axis_order is not None and sorted(self.axis_order) != list(range(num_axes)):
            raise ValueError(f"axis_order = {self.axis_order}; expected each number from 0 to {num_axes - 1} once.")

    @property
    def problem_axes(self) -> tuple[Axis, ...]:
        """The axes, in the order of a point's columns.

        Raises:
            ValueError: If one is none, or has an argument that an axis does not take.
        """
        return tuple(_axis(i, options) for i, options in enumerate(self.axes))

    @property
    def names(self) -> list[str]:
        """Of the axes."""
        return [options["name"] for options in self.axes]

    @property
    def core_order(self) -> list[int]:
        """The axis of each part of the field."""
        return list(range(len(self.axes))) if self.axis_order is None else self.axis_order

    @property
    def inner_ranks(self) -> list[int]:
        """Of a train: ``train_ranks``, completed."""
        return [self.rank] * (len(self.axes) - 1) if self.train_ranks is None else self.train_ranks

    @property
    def reduced_sizes(self) -> list[int]:
        """Of the reduced bases: ``frame_sizes``, completed."""
        return self.frame_sizes or [min(self.rank, axis.basis.num_basis) for axis in self.problem_axes]

    @classmethod
    def for_problem(
        cls, problem: Problem, rank: int = 8, decomposition: Decomposition = "cp", **options: Any
    ) -> "VsnaConfig":
        """A configuration for the solution of a problem: its axes, and its equation as text.

        Args:
            problem: What :meth:`VsnaModel.solve` will solve.
            rank: Number of components at most, of a train its largest inner rank.
            decomposition: ``"cp"``, ``"tucker"`` or ``"tensor_train"``.
            **options: Other settings.
        """
        axes, equation = axis_settings(problem.axes), problem.describe()
        return cls(axes=axes, equation=equation, rank=rank, decomposition=decomposition, **options)


def axis_settings(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """The keyword arguments that make each axis again, as JSON can hold them."""
    settings = []
    for axis in axes:
        found = {name: value for name, value in asdict(axis).items() if value is not None}
        found = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
        settings.append(found)
    return settings


def _axis(index: int, options: Mapping[str, Any]) -> Axis:
    try:
        return Axis(**options)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"axes[{index}] = {options}: {error}; expected the arguments of Axis.") from error


__all__ = ["VsnaConfig"]
