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
"""KHRONOS: regression by a separable network of splines with a few hundred parameters, its derivatives and its inverse.

arXiv 2505.13315; arXiv 2603.12244, "Predictive and generative modelling".
"""

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from sna_core import als
from sna_core.cell_table import CellTable
from sna_core.inversion import InversionResult, LevelSet, invert, level_set
from sna_core.laplace import laplace_factor
from sna_core.newton import Function
from sna_core.prior import GaussianPrior

from .configuration import KhronosConfig
from .pretrained import KhronosPreTrainedModel, build_network
from .tables import TrainingData, training_data
from .uncertainty import Interval, continued_std

FIT_DEFAULTS = {name: option.default for name, option in inspect.signature(als.fit).parameters.items()}
CONSTANT = 1e-14  # a standard deviation below this fraction of the largest value is rounding


@dataclass(frozen=True)
class KhronosFit(als.FitResult):
    """What :meth:`KhronosModel.fit` found: a [`~sna_core.als.FitResult`] with errors and noise in the units of y.

    Attributes:
        notes: What the data lack, in words: constant columns, fewer points than basis functions.
    """

    notes: tuple[str, ...]


@dataclass
class KhronosOutput(ModelOutput):
    """What [`KhronosModel`] returns.

    Args:
        loss: Mean squared error against the labels in the units of y, where labels were given.
        prediction: (..., num_outputs).
        gradient: (..., num_outputs, num_inputs), where asked for.
    """

    loss: torch.Tensor | None = None
    prediction: torch.Tensor | None = None
    gradient: torch.Tensor | None = None


class KhronosModel(KhronosPreTrainedModel):
    r"""KHRONOS: a CP network of splines with unit weights, in the units of y.

    .. math::
        f_o(x) = m_o + s_o \sum_{j=1}^{r} \prod_{i=1}^{d} \psi_i^{(oj)}(x_i)

    ``network`` is the [`~sna_core.network.CPNetwork`]; the buffers ``output_shift`` m and ``output_scale`` s,
    (num_outputs,), are 0 and 1 at the start and the mean and standard deviation of y after :meth:`fit`.
    ``output_low`` and ``output_high`` are the range of y then.

    Tables go in as tensors or as what numpy takes for an array, and come back as tensors or arrays.
    """

    posterior: Tensor | None
    noise: Tensor | None

    def __init__(self, config: KhronosConfig):
        if config.architectures == ["KhronosForClassification"]:
            raise ValueError("the config is that of a KhronosForClassification; make or load it as that class.")
        super().__init__(config)
        self.network = build_network(config, config.num_outputs)
        self.output_shift = nn.Buffer(torch.zeros(config.num_outputs))
        self.output_scale = nn.Buffer(torch.ones(config.num_outputs))
        self.output_low = nn.Buffer(torch.zeros(config.num_outputs))
        self.output_high = nn.Buffer(torch.zeros(config.num_outputs))
        self._set_uncertainty(config.uncertainty)
        self.post_init()

    def _set_uncertainty(self, uncertainty: bool) -> None:
        self.config.uncertainty = uncertainty
        size = self.network.factors[:, :, 0].numel()
        num_outputs, like = self.config.num_outputs, self.output_scale
        self.register_buffer("posterior", like.new_zeros(num_outputs, size, size) if uncertainty else None)
        self.register_buffer("noise", like.new_zeros(num_outputs) if uncertainty else None)

    def forget_uncertainty(self) -> None:
        """Drops the covariance of the parameters, which holds no longer once they change other than by :meth:`fit`."""
        self._set_uncertainty(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            for name, buffer in self.named_buffers(recurse=False):
                init.constant_(buffer, float(name == "output_scale"))

    @property
    def num_fitted(self) -> int:
        """How many numbers :meth:`fit` takes from the data: the factors, and each output's shift and scale."""
        return self.network.factors.numel() + 2 * self.config.num_outputs

    @can_return_tuple
    def forward(
        self, x: torch.Tensor, labels: torch.Tensor | None = None, output_gradient: bool = False
    ) -> KhronosOutput:
        """Evaluates f, and the mean squared error where labels are given. Differentiable in x and the factors.

        Exported (``torch.export``, ONNX), where nothing can raise, it is NaN at points outside the box while
        ``extrapolate="raise"``.

        Args:
            x: Points (..., num_inputs).
            labels: Values to predict, (..., num_outputs), for one output also (...).
            output_gradient: Whether to return the gradient too, of :meth:`gradient`'s units but with all dimensions.

        Raises:
            ValueError: If a point is not finite, or outside the box while ``extrapolate="raise"``, or a shape or dtype
                does not fit.
        """
        prediction = self.output_shift + self.output_scale * self._values(x)
        gradient = self.output_scale[:, None] * self._gradient(x) if output_gradient else None
        if labels is None:
            return KhronosOutput(prediction=prediction, gradient=gradient)
        # CODEPATH: labels of one output need no dimension of outputs.
        if self.config.num_outputs == 1 and labels.shape == prediction.shape[:-1]:
            labels = labels.unsqueeze(-1)
        if labels.shape != prediction.shape:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; expected {tuple(prediction.shape)}, a column for each "
                "output."
            )
        return KhronosOutput(loss=F.mse_loss(prediction, labels), prediction=prediction, gradient=gradient)

    def predict(self, x: ArrayLike | Tensor) -> np.ndarray | Tensor:
        """Evaluates f at the points x (points, num_inputs), without a graph and in bounded memory beside the result.

        Returns (points,) for one output, else (points, num_outputs). Raises as :meth:`forward`.
        """
        return self._by_rows(lambda part: self._without_output(self(part).prediction), x)

    def gradient(self, x: ArrayLike | Tensor) -> np.ndarray | Tensor:
        r"""The gradient :math:`\partial f_o / \partial x_i` in closed form, in units of y over those of x.

        (points, num_inputs) -> (points, num_inputs) for one output, else (points, num_outputs, num_inputs). Raises as
        :meth:`forward`.
        """
        scale = self.output_scale[:, None]
        return self._by_rows(lambda part: self._without_output(scale * self._gradient(part)), x)

    def hessian(self, x: ArrayLike | Tensor) -> np.ndarray | Tensor:
        r"""The Hessian :math:`\partial^2 f_o / \partial x_i \partial x_k` in closed form.

        (points, num_inputs) -> (points, num_inputs, num_inputs) for one output, else (points, num_outputs, num_inputs,
        num_inputs). Raises as :meth:`forward`.
        """
        scale = self.output_scale[:, None, None]
        return self._by_rows(lambda part: self._without_output(scale * self._hessian(part)), x)

    def predict_std(self, x: ArrayLike | Tensor) -> np.ndarray | Tensor:
        """Standard deviation of a new observation at x, noise included, by Laplace's approximation.

        Returns (points,) for one output, else (points, num_outputs).

        Raises:
            ValueError: As :meth:`forward`, and if the model was not fitted with ``uncertainty=True``.
        """
        # CODEPATH: without a posterior there is no standard deviation.
        posterior, noise = self.posterior, self.noise
        if not self.config.uncertainty or posterior is None or noise is None:
            raise ValueError("this model knows no uncertainty; fit it with uncertainty=True.")

        def std(part: Tensor) -> Tensor:
            nearest, overshoot = self._nearest(part)
            # CODEPATH: as for values.
            if self.config.extrapolate == "raise":
                nearest, overshoot = part, torch.zeros_like(part)
            relative = continued_std(self.network, posterior, nearest, overshoot)
            return self._without_output(noise * (1 + relative.to(part.dtype).square()).sqrt())

        return self._by_rows(std, x)

    def interval(self, x: ArrayLike | Tensor, level: float = 0.95) -> Interval:
        """Intervals that hold a new observation at x with the probability ``level``, if noise and posterior are normal.

        Raises:
            ValueError: As :meth:`predict_std`, and if the level is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"level = {level}; expected a number between 0 and 1.")
        prediction = self.predict(x)
        half = math.sqrt(2) * torch.erfinv(torch.tensor(level, dtype=torch.float64)).item() * self.predict_std(x)
        return Interval(prediction, prediction - half, prediction + half)

    def _without_output(self, values: Tensor) -> Tensor:
        # CODEPATH: one output needs no dimension of outputs.
        return values.squeeze(1) if self.config.num_outputs == 1 else values

    def fit(
        self,
        x: ArrayLike | Tensor,
        y: ArrayLike | Tensor,
        validation: float | tuple[ArrayLike | Tensor, ArrayLike | Tensor] | None = None,
        *,
        sample_weight: ArrayLike | Tensor | None = None,
        uncertainty: bool | None = None,
        progress: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> KhronosFit:
        """Fits the factors by alternating least squares in float64, of y less its mean over its standard deviation.

        A column of x or y without variation, duplicate rows and fewer points than basis functions are no errors: the
        penalty decides what the data leave open, and the result's ``notes``, which are warned about too, name them.

        Args:
            x: Points (points, num_inputs) in the box.
            y: Values (points, num_outputs), for one output also (points,).
            validation: x and y of points whose error chooses the factors to keep, or the fraction of the points to hold
                out for that.
            sample_weight: (points,), not negative, of any scale; a point of weight 0 is left out, and one of twice the
                weight is the same as the row twice. Rows that repeat others are no new observations: they weigh.
            uncertainty: Whether to compute, and to save with the model, what :meth:`predict_std` and :meth:`interval`
                need: a matrix for each output, with as many rows and columns as it has factors. None is the config's.
            progress: Whether to show a bar.
            seed: Of the random starts and of the points held out.
            **options: ``ridge``, ``smoothness``, ``num_restarts``, ``max_sweeps``, ``tolerance``, ``patience`` and
                ``max_memory`` of [`sna_core.als.fit`].

        Raises:
            ValueError: If a value is not finite, a point lies outside the box, shapes do not fit, or nothing is left to
                fit or to validate on.
        """
        data = training_data(x, y, sample_weight, self.config.num_inputs, self.config.num_outputs)
        if isinstance(validation, int | float):
            held_out, data = data.split(validation, seed)
        elif validation is not None:
            held_out = training_data(*validation, None, self.config.num_inputs, self.config.num_outputs)
        else:
            held_out = None
        result = self.fit_checked(data, held_out, uncertainty=uncertainty, progress=progress, seed=seed, **options)
        for note in result.notes:
            warnings.warn(note, stacklevel=2)
        return result

    def fit_checked(
        self,
        data: TrainingData,
        held_out: TrainingData | None = None,
        *,
        uncertainty: bool | None = None,
        progress: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> KhronosFit:
        """:meth:`fit` without its warnings, of data that were looked through."""
        num_rows, data = len(data.x), data.counted_once()
        shift, scale = self._standard_units(data)
        with tqdm(unit=" sweeps", disable=not progress) as bar:

            def on_sweep(sweep: int, objective: float) -> None:
                bar.set_postfix(objective=f"{objective:.3g}", refresh=False)
                bar.update()

            result = als.fit(
                self.network,
                data.x,
                (data.y - shift) / scale,
                validation=None if held_out is None else (held_out.x, (held_out.y - shift) / scale),
                sample_weight=data.weight,
                generator=torch.Generator().manual_seed(seed),
                on_sweep=on_sweep,
                **options,
            )
        found = {"shift": shift, "scale": scale, "low": data.y.amin(0), "high": data.y.amax(0)}
        for name, value in found.items():
            self.get_buffer(f"output_{name}").copy_(value)
        # CODEPATH: the posterior is as large as the factors are many, squared, and computed on request.
        uncertainty = self.config.uncertainty if uncertainty is None else uncertainty
        self._set_uncertainty(uncertainty)
        if self.posterior is not None and self.noise is not None:
            given = {name: (FIT_DEFAULTS | options)[name] for name in ("smoothness", "max_memory")}
            factor = laplace_factor(self.network, data.x, result.ridge, sample_weight=data.weight, **given)
            self.posterior.copy_(factor)
            self.noise.copy_(result.noise * scale)
        in_units = {"train_rmse": result.train_rmse * scale, "noise": result.noise * scale}
        if result.validation_rmse is not None:
            in_units["validation_rmse"] = result.validation_rmse * scale
        return KhronosFit(**(vars(result) | in_units), notes=self._notes(data, num_rows))

    def _standard_units(self, data: TrainingData) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of y in float64, (num_outputs,); 1 where y does not vary."""
        weight = data.weight / data.weight.sum()
        shift = weight @ data.y
        scale = (weight @ (data.y - shift).square()).sqrt()
        scale = torch.where(scale > CONSTANT * data.y.abs().amax(0), scale, 1.0)
        if not (data.y.abs().max() + scale.max()).to(self.dtype).isfinite():
            raise ValueError(f"y reaches {data.y.abs().max():g}, too large for {self.dtype}; change its unit.")
        return shift, scale

    def _notes(self, data: TrainingData, num_rows: int) -> tuple[str, ...]:
        notes = []
        if len(data.x) < num_rows:
            notes.append(f"{num_rows - len(data.x)} of {num_rows} rows repeat others, and count as weights of these.")
        for name, table in (("x", data.x), ("y", data.y)):
            if constant := (table == table[0]).all(0).nonzero()[:, 0].tolist():
                notes.append(
                    f"{name} is constant in column {', '.join(map(str, constant))}, from which nothing is learned."
                )
        num_basis = self.config.num_inputs * (self.config.num_cells + self.config.degree)
        if len(data.x) < num_basis:
            notes.append(
                f"there are {len(data.x)} points for {num_basis} basis functions, and the penalty decides the rest; "
                "lower num_cells, or look at degrees_of_freedom."
            )
        return tuple(notes)

    def invert(
        self,
        target: float | Sequence[float | None] | Tensor,
        num_starts: int = 64,
        tolerance: float = 1e-6,
        *,
        fixed: Mapping[int, float] | None = None,
        prior: GaussianPrior | None = None,
        seed: int = 0,
        **options: Any,
    ) -> InversionResult:
        """Finds points x of the box with f(x) = target, by Newton's method in float64 from many starts at once.

        With more inputs than targets the solutions are a continuum; each start goes to one near it.

        Args:
            target: A number for each output, in the units of y; None or NaN leaves the output free.
            num_starts: Number of starts.
            tolerance: Largest deviation of a solution, as a fraction of the range of y in :meth:`fit`, or of the range
                of f in the box where the model was not fitted.
            fixed: Inputs to hold, as {index: value}.
            prior: Of the inputs, to pick the most probable solutions.
            seed: Of the starts.
            **options: ``max_iterations`` and ``starts`` of [`sna_core.inversion.invert`].

        Returns:
            ``x``, ``prediction``, ``residual`` and ``converged`` of all distinct points, in float64; ``solutions`` are
            the converged ones. A target out of reach has none.

        Raises:
            ValueError: If there is not one target for each output, or a number is out of its range.
        """
        return invert(
            *self._inverse_problem(target),
            num_starts=num_starts,
            tolerance=tolerance,
            scale=self._output_range(),
            fixed=fixed,
            prior=prior,
            generator=torch.Generator().manual_seed(seed),
            **options,
        )

    def level_set(
        self,
        target: float | Sequence[float | None] | Tensor,
        num_points: int,
        tolerance: float = 1e-6,
        *,
        fixed: Mapping[int, float] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> LevelSet:
        """Well-spread points of the set of all x in the box with f(x) = target.

        Args and raises as :meth:`invert`; ``num_points`` are returned at most. ``options`` are those of
        [`sna_core.inversion.level_set`].
        """
        return level_set(
            *self._inverse_problem(target),
            num_points,
            tolerance=tolerance,
            scale=self._output_range(),
            fixed=fixed,
            generator=torch.Generator().manual_seed(seed),
            **options,
        )

    def _inverse_problem(
        self, target: float | Sequence[float | None] | Tensor
    ) -> tuple[Function, Sequence[float], Sequence[float], Tensor]:
        """The function with its Jacobian in float64 on a CPU, the box, and the target with NaN for None."""
        config = self.config
        if not isinstance(target, Tensor | np.ndarray):
            given: Any = target  # of whatever kind numpy takes
            numbers = [given] if np.ndim(given) == 0 else given
            target = np.array([float("nan") if value is None else float(value) for value in numbers])
        target = torch.as_tensor(target, dtype=torch.float64).reshape(-1)
        if len(target) != config.num_outputs:
            raise ValueError(
                f"target has {len(target)} numbers for {config.num_outputs} outputs; give one for each, None for those "
                "left free."
            )
        table = CellTable(self.network)
        shift, scale = (buffer.double().cpu() for buffer in (self.output_shift, self.output_scale))

        def function(x: Tensor) -> tuple[Tensor, Tensor]:
            values, gradient = table(x)  # the search stays in the box
            return torch.addcmul(shift, scale, values), scale.unsqueeze(-1) * gradient

        return function, config.input_low, config.input_high, target

    def _output_range(self) -> Tensor | None:
        size = (self.output_high - self.output_low).double().cpu()
        return torch.where(size > 0, size, 1.0) if size.any() else None


__all__ = ["KhronosFit", "KhronosModel", "KhronosOutput"]
