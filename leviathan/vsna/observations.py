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
"""Parameters of a solved problem from observed values of its field."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sna_core.axis import Axis
from sna_core.field import SeparableField
from sna_core.inversion import invert
from sna_core.network import products_of_others
from sna_core.newton import Function

from .domain import inside

NUM_SNAPSHOTS = 256  # points of the unknown box whose values tell which combinations of observations vary
NEGLIGIBLE = 1e-12  # what varies by less than this fraction of the values is constant


@dataclass(frozen=True, eq=False)
class ParameterFit:
    """Minima of the misfit that the starts came to, the best first.

    Attributes:
        names: The unknown axes.
        x: Distinct points, (points, unknown axes), in the order of the names.
        misfit: Root mean square of the field less the observed values, (points,), in their units.
        converged: Whether the misfit is stationary there, within the box, and depends on every unknown, (points,). With
            no more observations than unknowns that is where the values are met, or at an end of an interval.
        num_iterations: Evaluations of the batch of starts.
        num_starts: Number of starts.
    """

    names: tuple[str, ...]
    x: Tensor
    misfit: Tensor
    converged: Tensor
    num_iterations: int
    num_starts: int

    @property
    def best(self) -> dict[str, float]:
        """The first point by the names of its axes, as :meth:`VsnaModel.slice` takes it."""
        return dict(zip(self.names, self.x[0].tolist(), strict=True))


@torch.no_grad()
def fit_parameters(
    field: SeparableField,
    axes: Sequence[Axis],
    values: Tensor | Sequence[float] | float,
    at: Mapping[str, Tensor | Sequence[float] | float],
    unknown: Sequence[str],
    *,
    num_starts: int,
    tolerance: float,
    max_iterations: int,
    generator: torch.Generator,
) -> ParameterFit:
    r"""Nonlinear least squares by two searches of [`sna_core.inversion.invert`].

    The first looks for f(p) = u_k, and comes to points where a step lowers the misfit no more. The observations enter
    by those orthonormal combinations that vary in the box, few however many they are, which leaves the misfit as it is
    up to a constant. From there the second solves :math:`Q^T (u_k - f(p)) = 0`, where Q spans the columns of the
    Jacobian J = Q R: its solutions are the misfit's stationary points (J. Nocedal and S. Wright, Numerical
    Optimization, 2nd ed., section 10.3).

    Args:
        field: Of all axes.
        axes: In the field's order.
        values: Observed.
        at: The coordinates of each axis that is known.
        unknown: Names of the others.
        num_starts: Of the first search.
        tolerance: On the projected residual's root mean square, as a fraction of the range of the values.
        max_iterations: Of each search.
        generator: Of the starts.
    """
    values = torch.as_tensor(values, dtype=torch.float64).cpu().reshape(-1)
    if not len(values) or not values.isfinite().all():
        raise ValueError(f"values hold {len(values)} numbers; expected at least one, and all finite.")
    by_name = {axis.name: axis for axis in axes}
    known = {name: _coordinates(by_name[name], at[name], len(values)) for name in at}
    function = _observed(field, axes, known, unknown, len(values))
    low = torch.tensor([by_name[name].low for name in unknown], dtype=torch.float64)
    high = torch.tensor([by_name[name].high for name in unknown], dtype=torch.float64)
    scale = (values.max() - values.min()).item() or values.abs().max().item() or 1.0
    scale *= len(values) ** 0.5  # of a vector of observations
    options = {"tolerance": tolerance, "scale": scale, "max_iterations": max_iterations}

    vary = _varying(function, low, high, len(values))

    def combined(p: Tensor) -> tuple[Tensor, Tensor]:
        found, jacobian = function(p)
        return found @ vary, (jacobian.mT @ vary).mT

    def projected(p: Tensor) -> tuple[Tensor, Tensor]:
        found, jacobian = function(p)
        q, r = torch.linalg.qr(jacobian)
        return (q.mT @ (found - values).unsqueeze(-1)).squeeze(-1), r

    near = invert(combined, low, high, values @ vary, num_starts=num_starts, generator=generator, **options)
    zero = torch.zeros(min(len(values), len(unknown)), dtype=torch.float64)
    last = invert(projected, low, high, zero, starts=near.x, **options)

    found, jacobian = function(last.x)
    residual = found - values
    order = residual.square().mean(-1).argsort(stable=True)
    return ParameterFit(
        names=tuple(unknown),
        x=last.x[order],
        misfit=residual.square().mean(-1).sqrt()[order],
        converged=_is_stationary(last.x, residual, jacobian, low, high, tolerance, scale)[order],
        num_iterations=near.num_iterations + last.num_iterations,
        num_starts=near.num_starts,
    )


def _coordinates(axis: Axis, given: Tensor | Sequence[float] | float, num_values: int) -> Tensor:
    """Of each observation, (observations,)."""
    x = torch.as_tensor(given, dtype=torch.float64).cpu()
    if x.ndim > 1 or len(x.reshape(-1)) not in (1, num_values):
        raise ValueError(
            f"at has {axis.name} of shape {tuple(x.shape)}; expected one number or one for each of {num_values} values."
        )
    inside(x.unsqueeze(-1), [axis], torch.float64)
    return x.reshape(-1).expand(num_values)


def _observed(
    field: SeparableField, axes: Sequence[Axis], known: Mapping[str, Tensor], unknown: Sequence[str], num_values: int
) -> Function:
    """The field at the observations as a function of the unknown axes, with its Jacobian.

    p (points, unknown) -> (points, observations) and (points, observations, unknown).
    """
    coefficients = [c.detach().to("cpu", torch.float64) for c in field.coefficients()]

    def along(i: int, x: Tensor, derivative: int = 0) -> Tensor:
        """(n, rank), of a train (n, r_i, r_{i+1})."""
        coefficient = coefficients[i].transpose(0, 1) if field.is_train else coefficients[i]
        return torch.tensordot(axes[i].basis.dense(x, derivative, check=False), coefficient, 1)

    names = [axis.name for axis in axes]
    at_known = {i: along(i, known[name]) for i, name in enumerate(names) if name in known}
    places = [names.index(name) for name in unknown]
    if not field.is_train:
        weight = coefficients[0].new_ones(num_values, coefficients[0].shape[1])
        for functions in at_known.values():
            weight = weight * functions

        def components(p: Tensor) -> tuple[Tensor, Tensor]:
            psi, slope = (torch.stack([along(i, p[:, k], n) for k, i in enumerate(places)]) for n in (0, 1))
            jacobian = (slope * products_of_others(psi)) @ weight.mT  # (unknown, points, observations)
            return psi.prod(0) @ weight.mT, jacobian.movedim(0, -1)

        return components

    def train(p: Tensor) -> tuple[Tensor, Tensor]:
        psi, slope = ({i: along(i, p[:, k], n) for k, i in enumerate(places)} for n in (0, 1))

        def product(matrices: Mapping[int, Tensor]) -> Tensor:
            row = p.new_ones(len(p), num_values, 1)
            for i in range(len(axes)):
                row = row @ matrices[i] if i in matrices else torch.einsum("pma,mab->pmb", row, at_known[i])
            return row[..., 0]

        return product(psi), torch.stack([product(psi | {i: slope[i]}) for i in places], -1)

    return train


def _varying(function: Function, low: Tensor, high: Tensor, num_values: int) -> Tensor:
    """Orthonormal combinations of the observations that vary in the box, (observations, combinations)."""
    if num_values <= len(low):
        return torch.eye(num_values, dtype=torch.float64)
    share = torch.quasirandom.SobolEngine(len(low), scramble=True, seed=0).draw(NUM_SNAPSHOTS, dtype=torch.float64)
    snapshots, _ = function(low + (high - low) * share)
    _, size, combinations = torch.linalg.svd(snapshots, full_matrices=False)
    return combinations[size >= max(NEGLIGIBLE * size[0].item(), torch.finfo(size.dtype).tiny)].mT


def _is_stationary(
    p: Tensor, residual: Tensor, jacobian: Tensor, low: Tensor, high: Tensor, tolerance: float, scale: float
) -> Tensor:
    """Whether the values depend on each unknown, and no step in it within the box lowers the misfit, (points,)."""
    slope, length = (jacobian.mT @ residual.unsqueeze(-1)).squeeze(-1), jacobian.norm(dim=1)
    blocked = (p <= low) & (slope > 0) | (p >= high) & (slope < 0)
    flat = slope.abs() <= p.shape[1] ** 0.5 * tolerance * scale * length
    return ((flat | blocked) & (length * (high - low) > NEGLIGIBLE * scale)).all(-1)


__all__ = ["ParameterFit"]
