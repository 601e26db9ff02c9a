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
"""VSNA: a differential equation solved once over space, time and parameters, and asked anywhere.

arXiv 2603.12244, "Variational learning".
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from sna_core.field import SeparableField
from sna_core.field_table import FieldTable
from sna_core.operators import Problem
from sna_core.solve import Solution, SolveReport, solve

from .configuration import VsnaConfig, axis_settings
from .domain import inside
from .estimate import ErrorEstimate, compare
from .observations import ParameterFit, fit_parameters
from .sweep import BLOCK, Range, Sampler, Statistic, SweepResult, box_sampler, run_sweep


class VsnaModel(PreTrainedModel):
    r"""A field :math:`u(x_1, \dots, x_d)` of all of a problem's axes, zero until it is solved or loaded.

    ``field`` is the [`~sna_core.field.SeparableField`], whose parameters are all that is saved beside the config: a
    saved model needs none of the problem's functions. Points have the axes' units and a column for each, in the order
    of ``config.names``; those of another floating type are converted to the field's, which is float64.
    """

    config: VsnaConfig
    signatures: Tensor
    base_model_prefix = "vsna"
    main_input_name = "points"
    _no_split_modules = ["SeparableField"]

    def __init__(self, config: VsnaConfig):
        super().__init__(config)
        self.field = _empty_field(config)
        self.register_buffer("signatures", torch.tensor(_signatures(config)))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SeparableField):
            for parameter in module.parameters():
                init.zeros_(parameter)
        elif module is self:
            init.copy_(self.signatures, torch.tensor(_signatures(self.config)))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As transformers', but a field that is not wholly the checkpoint's is an error, whatever is asked for.

        Raises:
            ValueError: If the checkpoint's coefficients are of another size than the config's axes and ranks say, or
                there are none for an axis.
        """
        kwargs["ignore_mismatched_sizes"] = True  # so that the error can say which axis it is
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if unexpected := sorted(info["unexpected_keys"]):
            raise ValueError(
                f"the checkpoint has coefficients for which the config has no axis: {unexpected}; its axes and "
                "decomposition have to be those that the field was solved with."
            )
        for key in sorted(info["missing_keys"]):
            raise ValueError(
                f"{model._axis_of(key)} has no coefficients in the checkpoint ({key}); its axes and decomposition have "
                "to be those that the field was solved with."
            )
        for key, found, expected in sorted(info["mismatched_keys"]):
            raise ValueError(
                f"{model._axis_of(key)} has coefficients of shape {tuple(found)} in the checkpoint and "
                f"{tuple(expected)} by its config ({key}); its num_cells, degree, num_basis and ranks have to be those "
                "that the field was solved with. Solve the problem again for others."
            )
        for axis, found, expected in zip(
            model.config.problem_axes, model.signatures.tolist(), _signatures(model.config), strict=True
        ):
            if found != expected:
                raise ValueError(
                    f"axis {axis.name!r} is not the one that the field was solved on; its interval, cells, degree, "
                    "kind and boundary have to be the same. Solve the problem again for others."
                )
        return (model, info) if output_loading_info else model

    def _axis_of(self, key: str) -> str:
        """In words, the axis whose coefficients a parameter of this name holds."""
        if key == "signatures":
            return "the box"
        return f"axis {self.config.names[self.config.core_order[int(key.rpartition('.')[2])]]!r}"

    def solve(
        self,
        problem: Problem,
        *,
        tolerance: float = 1e-6,
        rank: int | None = None,
        seed: int = 0,
        progress: bool = True,
        **options: Any,
    ) -> SolveReport:
        """Solves the problem on the config's axes. The solution replaces the field, and its sizes those of the config.

        Args:
            problem: With the axes of the config.
            tolerance: Relative residual at which to stop.
            rank: Largest number of components, or inner rank of a train; None is the config's ``max_rank``.
            seed: Of random starts.
            progress: Whether to show a bar.
            **options: ``method`` and ``max_sweeps`` of [`sna_core.solve.solve`].

        Raises:
            ValueError: If the problem has other axes, or it cannot be solved as asked for.
        """
        self._check_axes(problem)
        if self.dtype != torch.float64:
            raise ValueError(f"the model is {self.dtype}; a solve needs float64: convert by model.double() first.")
        with tqdm(unit=" steps", disable=not progress) as bar:

            def on_step(stage: str, residual: float) -> None:
                bar.set_description_str(stage, refresh=False)
                bar.set_postfix(residual=f"{residual:.3g}", refresh=False)
                bar.update()

            solution = solve(
                problem,
                decomposition=self.config.decomposition,
                rank=self.config.max_rank if rank is None else rank,
                tolerance=tolerance,
                generator=torch.Generator().manual_seed(seed),
                on_step=on_step,
                **options,
            )
        self._take(solution)
        self.config.equation = problem.describe()
        return solution.report

    def _check_axes(self, problem: Problem) -> None:
        if list(problem.names) != self.config.names:
            raise ValueError(
                f"the problem has the axes {problem.names} and the config {self.config.names}; make the config by "
                "VsnaConfig.for_problem(problem)."
            )
        for given, own in zip(problem.axes, self.config.problem_axes, strict=True):
            for name in (field.name for field in fields(own)):
                if getattr(given, name) != getattr(own, name):
                    raise ValueError(
                        f"axis {own.name!r} has {name} = {getattr(given, name)!r} in the problem and "
                        f"{getattr(own, name)!r} in the config; make the config by VsnaConfig.for_problem(problem)."
                    )

    @torch.no_grad()
    def _take(self, solution: Solution) -> None:
        """Makes a solution the field, and its sizes the config's."""
        config = self.config
        tensors = solution.factors or solution.cores
        # CODEPATH: what sizes there are follows from the decomposition.
        if config.decomposition == "tensor_train":
            config.axis_order = list(solution.axis_order)
            config.train_ranks = [core.shape[2] for core in tensors[:-1]]
            config.rank = max(config.train_ranks, default=1)
        else:
            config.rank = tensors[0].shape[1]
            if config.decomposition == "tucker":
                config.frame_sizes = [frame.shape[1] for frame in solution.frames]
        field = _empty_field(config).to(self.device, self.dtype)
        lists = {"factors": solution.factors, "frames": solution.frames, "cores": solution.cores}
        for name, values in lists.items():
            for parameter, value in zip(getattr(field, name, ()), values, strict=True):
                parameter.copy_(value)
        self.field = field

    def estimate_error(
        self, problem: Problem, *, seed: int = 0, progress: bool = True, **options: Any
    ) -> ErrorEstimate:
        """Solves the problem again on half the cells, and compares.

        Args:
            problem: What the field solves.
            seed: Of random starts and of the points of comparison.
            progress: Whether to show a bar.
            **options: As those of :meth:`solve`.

        Raises:
            ValueError: As :meth:`solve`.
        """
        coarse = replace(problem, axes=[axis.coarsened() for axis in problem.axes])
        model = VsnaModel(VsnaConfig.for_problem(coarse, self.config.max_rank, self.config.decomposition))
        model.solve(coarse, seed=seed, progress=progress, **options)
        with torch.no_grad():
            return compare(self, model, self.config.problem_axes, seed)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        """Evaluates u: points (..., num_axes) -> (...). Differentiable in the points and the parameters.

        Raises:
            ValueError: If a point is NaN or outside the box, or the points have another width or no floating type.
        """
        return self.field(self._columns(points))

    def value_and_gradient(self, points: Tensor) -> tuple[Tensor, Tensor]:
        r"""Evaluates u (...) and :math:`\partial u / \partial x_i` (..., num_axes), in closed form.

        The gradient is in units of u over those of the axis. Raises as :meth:`forward`.
        """
        values, gradient = self.field.value_and_gradient(self._columns(points))
        # CODEPATH: a train has an order of axes of its own.
        if self.config.axis_order is not None:
            gradient = gradient[..., torch.tensor(self.config.axis_order).argsort().to(gradient.device)]
        return values, gradient

    def gradient(self, points: Tensor) -> Tensor:
        """The second of :meth:`value_and_gradient`: (..., num_axes) -> (..., num_axes)."""
        return self.value_and_gradient(points)[1]

    def _columns(self, points: Tensor) -> Tensor:
        """The points in the field's type, with its order of columns."""
        points = inside(points, self.config.problem_axes, self.dtype)
        # CODEPATH: a train has an order of axes of its own.
        return points if self.config.axis_order is None else points[..., self.config.axis_order]

    def slice(self, **values: float) -> "VsnaModel":
        """The field of the other axes, with each of these held at its value, as a new model.

        Raises:
            ValueError: If an axis is unknown, a value lies outside of its interval, or no axis is left.
        """
        self._check_names("slice", values, "call the model at the point")
        axes = {axis.name: axis for axis in self.config.problem_axes}
        for name, value in values.items():
            inside(torch.tensor([float(value)], dtype=torch.float64), [axes[name]], torch.float64)
        held = {self._part(name): float(value) for name, value in values.items()}
        note = ", ".join(f"{name} = {float(value):g}" for name, value in values.items())
        return self._smaller(self.field.restrict(held), values, f"at {note}")

    def integrate(self, *names: str) -> "VsnaModel":
        """The field of the other axes, integrated over the intervals of these, as a new model.

        Raises:
            ValueError: If an axis is unknown or there twice, or no axis is left: :meth:`integral` takes all.
        """
        self._check_names("integrate", names, "call `integral()`")
        return self._smaller(self.field.integrate(map(self._part, names)), names, f"integrated over {', '.join(names)}")

    def integral(self) -> float:
        """The integral of u over the whole box, in units of u times those of all axes."""
        return self.field.integral().item()

    def _check_names(self, verb: str, names: Sequence[str] | Mapping[str, float], remedy: str) -> None:
        known = self.config.names
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{verb} names {unknown}, which are no axes; the axes are {known}.")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{verb} was given the axes {list(names)}; expected at least one, and each once.")
        if len(names) == len(known):
            raise ValueError(f"{verb} was given all axes; leave one, or {remedy} for a number.")

    def _part(self, name: str) -> int:
        """The place of an axis in the field."""
        return self.config.core_order.index(self.config.names.index(name))

    @torch.no_grad()
    def _smaller(self, field: SeparableField, dropped: Sequence[str] | Mapping[str, float], note: str) -> "VsnaModel":
        """A model of a field on the other axes."""
        kept = [i for i, name in enumerate(self.config.names) if name not in dropped]
        settings: dict[str, Any] = {"decomposition": self.config.decomposition, "rank": self.config.rank}
        # CODEPATH: what sizes there are follows from the decomposition.
        if self.config.decomposition == "tensor_train":
            settings["train_ranks"] = [core.shape[2] for core in field.cores[:-1]]
            settings["rank"] = max(settings["train_ranks"], default=1)
            settings["axis_order"] = [kept.index(i) for i in self.config.core_order if i in kept]
        elif self.config.decomposition == "tucker":
            settings["frame_sizes"] = [frame.shape[1] for frame in field.frames]
        settings["equation"] = "; ".join(filter(None, [self.config.equation, note]))
        axes = [copy.deepcopy(self.config.axes[i]) for i in kept]
        model = VsnaModel(VsnaConfig(axes=axes, dtype=self.dtype, **settings))
        model.field = field
        return model

    def table(self, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
        """A function of points (N, num_axes) -> (N,) for millions of them: on the CPU, without a graph, in flat memory.

        It is that of the field as it is now, to the rounding of ``dtype`` of the largest component. Raises as
        :meth:`forward`.
        """
        table = FieldTable(self.field, dtype)
        return lambda points: table(self._columns(points))

    def sweep(
        self,
        sampler: Sampler | Mapping[str, float | Range | Sampler] | None,
        num_samples: int,
        *,
        statistic: Statistic | None = None,
        quantiles: Sequence[float] = (0.05, 0.5, 0.95),
        batch_size: int = BLOCK,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        progress: bool = False,
    ) -> SweepResult:
        """The distribution of u, or of a quantity made of it, over random points; in memory that does not grow.

        Samples are drawn in blocks of a fixed size, so that neither they nor their sums depend on ``batch_size``.

        Args:
            sampler: A function of a count and a generator that draws points (count, num_axes) in the box; or, by axis,
                a number to hold it at, an interval (low, high) to draw from, or a function of a count and a generator
                that draws (count,). Axes not named, and with None all of them, are uniform over their interval.
            num_samples: How many.
            statistic: A function of :meth:`table` and points (N, num_axes) that gives the quantity (N,); None is u.
            quantiles: Their levels, from 0 to 1.
            batch_size: Points that are evaluated at one time.
            dtype: In which u is computed. Sums are in float64.
            seed: Of the samples.
            progress: Whether to show a bar.

        Raises:
            ValueError: If a sampler names an unknown axis, a point lies outside the box, a shape does not fit, or a
                quantity is not finite.
        """
        if not callable(sampler):
            sampler = box_sampler(self.config.problem_axes, sampler or {})
        table = self.table(dtype)
        return run_sweep(
            sampler,
            table if statistic is None else lambda points: statistic(table, points),
            num_samples,
            quantiles=quantiles,
            batch_size=batch_size,
            generator=torch.Generator().manual_seed(seed),
            progress=progress,
        )

    def invert(
        self,
        values: Tensor | Sequence[float] | float,
        at: Mapping[str, Tensor | Sequence[float] | float],
        unknown: Sequence[str] | None = None,
        *,
        num_starts: int = 64,
        tolerance: float = 1e-8,
        max_iterations: int = 50,
        seed: int = 0,
    ) -> ParameterFit:
        r"""Finds the parameters that explain observed values best, from many starts at once in float64.

        .. math::
            \min_p \sum_k (u(a_k, p) - u_k)^2

        With fewer observations than unknown axes the minima are a continuum; each start goes to one near it.

        Args:
            values: Observed u_k (observations,), or one number.
            at: Where, by axis: a coordinate for each observation, or one for all.
            unknown: Axes whose coordinates p are asked for, which all observations share; None is every axis that
                ``at`` does not name.
            num_starts: Starts, from a scrambled Sobol sequence in the box of the unknown axes.
            tolerance: Largest slope of the misfit at a minimum: of the residuals the part, root mean square, that a
                step to first order could take away, as a fraction of the range of the values.
            max_iterations: Newton steps at most, in each of two stages.
            seed: Of the starts.

        Raises:
            ValueError: If an axis is in both or in neither of ``at`` and ``unknown``, a coordinate lies outside its
                interval, a value is not finite, or shapes do not fit.
        """
        known = self.config.names
        unknown = [name for name in known if name not in at] if unknown is None else list(unknown)
        if sorted([*at, *unknown]) != sorted(known) or not unknown:
            raise ValueError(
                f"at names the axes {list(at)} and unknown {unknown}; expected each of {known} in one of them, and at "
                "least one unknown."
            )
        return fit_parameters(
            self.field,
            [self.config.problem_axes[i] for i in self.config.core_order],
            values,
            at,
            unknown,
            num_starts=num_starts,
            tolerance=tolerance,
            max_iterations=max_iterations,
            generator=torch.Generator().manual_seed(seed),
        )


def _signatures(config: VsnaConfig) -> list[int]:
    """A number for each axis that tells it from others."""
    texts = (json.dumps(settings, sort_keys=True) for settings in axis_settings(config.problem_axes))
    return [int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") for text in texts]


def _empty_field(config: VsnaConfig) -> SeparableField:
    axes, dtype = config.problem_axes, config.dtype
    if not isinstance(dtype, torch.dtype):  # set by hand later on: transformers makes one of a name that is given
        raise ValueError(f"dtype = {dtype!r}; expected a torch.dtype, e.g. torch.float64.")
    sizes: dict[str, dict[str, Any]] = {
        "cp": {"rank": config.rank},
        "tucker": {"rank": config.rank, "frame_sizes": config.reduced_sizes},
        "tensor_train": {"rank": config.inner_ranks},
    }
    bases, form = [axes[i].basis for i in config.core_order], config.decomposition
    return SeparableField(bases, decomposition=form, dtype=dtype, **sizes[form])


__all__ = ["VsnaModel"]
