r"""Effective stiffness and conductivity of periodic cells of voxels.

Under each uniform strain (or gradient) E the fluctuation u minimises the energy,

.. math::
    C_{ij} = \frac{1}{V} \sum_e s_e \, U_{ie}^T K_0 \, U_{je}, \qquad U_{ie} = E_i + (u_i)_e,

over voxels e of scale :math:`s_e`. The equations are solved by conjugate gradients preconditioned with the homogeneous
cell, whose operator is diagonal in Fourier space: in the variables of displacement this is the Galerkin FFT method
(J. Vondrejc et al., Comput. Math. Appl. 68, 2014; M. Ladecky et al., Appl. Math. Comput. 446, 2023). The energy is
stationary in u, so :math:`\partial C_{ij} / \partial s_e = U_{ie}^T K_0 U_{je} / V` needs no further solve, and an
error of the solver enters C squared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leviathan.janus.cells import Symmetry
from leviathan.janus.homogenization.conjugate_gradient import conjugate_gradient
from leviathan.janus.homogenization.elements import (
    SCHEMES,
    Element,
    Scheme,
    elastic_element,
    thermal_element,
    voigt_pairs,
)
from leviathan.janus.homogenization.grids import grid
from leviathan.janus.homogenization.result import Homogenized, check_phase

CPU_NUMEL = 2**19  # corner values of the systems solved at one time, which a cache holds
GPU_NUMEL = 2**28
ROUNDING = 10  # times the precision of the work of uniform strain: forces that are less come from rounding


@dataclass(frozen=True)
class Isotropic:
    """An isotropic elastic solid.

    Attributes:
        youngs_modulus: E, in the unit that the stiffness shall have.
        poissons_ratio: nu, between -1 and 1/2.

    Raises:
        ValueError: If there is no such solid.
    """

    youngs_modulus: float
    poissons_ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.youngs_modulus < float("inf"):
            raise ValueError(f"youngs_modulus = {self.youngs_modulus!r}; expected a number above 0.")
        if not -1 < self.poissons_ratio < 0.5:
            raise ValueError(f"poissons_ratio = {self.poissons_ratio!r}; expected a number between -1 and 1/2.")

    @property
    def lame(self) -> tuple[float, float]:
        """Lame's constants lambda and mu."""
        modulus, ratio = self.youngs_modulus, self.poissons_ratio
        return modulus * ratio / ((1 + ratio) * (1 - 2 * ratio)), modulus / (2 * (1 + ratio))


def elastic_stiffness(
    phase: Tensor,
    *,
    solid: Isotropic = Isotropic(1.0, 0.3),
    contrast: float = 1000.0,
    symmetry: Symmetry = "none",
    scheme: Scheme = "rotated",
    tolerance: float = 1e-4,
    max_iterations: int = 2000,
    loads: Sequence[int] | None = None,
) -> Homogenized:
    r"""Effective stiffness of cells of a solid and a void that is ``contrast`` times softer.

    A voxel that is partly solid has the mean of both stiffnesses, :math:`s = \phi + (1 - \phi) / contrast`.

    Args:
        phase: Share of solid :math:`\phi`, (cells, n, n, n); in 2-D (cells, n, n), under plane strain.
        solid: The solid. The void has its Poisson's ratio.
        contrast: Of the moduli, above 0.
        symmetry: ``"none"``: cells are whole and periodic. ``"mirror"``: they are the first orthants of cells with
            mirror planes, [0, m) of 2 m voxels along each axis, which is an eighth of the work. ``"cubic"``: these are
            the same along all axes too, and one normal and one shear load say all; the gradient is then that of
            changes with the same symmetry.
        scheme: Discretisation, see :mod:`leviathan.janus.homogenization.elements`.
        tolerance: Of the residual of the fluctuation's equations, relative to that of uniform strain, both in the norm
            of the homogeneous cell's compliance.
        max_iterations: Of each load, at most.
        loads: Voigt's components to load, by index; all by default. Other rows and columns are NaN.

    Returns:
        C in Voigt's notation (11, 22, 33, 23, 13, 12; 11, 22, 12 in 2-D) with engineering shear strains: C[3, 3] is
        C2323. In Mandel's (:func:`mandel`) shear rows and columns carry a factor of :math:`\sqrt 2` each.

    Raises:
        ValueError: If phase is no batch of cells, or a number is out of its range.
    """
    phase = check_phase(phase, symmetry)
    if not 0 < contrast < float("inf"):
        raise ValueError(f"contrast = {contrast!r}; expected a number above 0.")
    _check(scheme, tolerance, max_iterations)
    element = elastic_element(phase.ndim - 1, scheme, solid.lame)
    scale = phase + (1 - phase) / contrast
    return _effective(scale, element, symmetry, scheme, tolerance, max_iterations, loads)


def conductivity(
    phase: Tensor,
    *,
    solid: float = 1.0,
    void: float = 1e-3,
    symmetry: Symmetry = "none",
    scheme: Scheme = "rotated",
    tolerance: float = 1e-4,
    max_iterations: int = 2000,
    loads: Sequence[int] | None = None,
) -> Homogenized:
    r"""Effective conductivity, (cells, d, d): heat or charge, diffusivity, permittivity.

    Args:
        phase: Share of solid :math:`\phi`, (cells, n, n) or (cells, n, n, n); a voxel has
            :math:`\phi k_{solid} + (1 - \phi) k_{void}`.
        solid: Conductivity of the solid, above 0.
        void: Of the void, likewise.
        symmetry: As of :func:`elastic_stiffness`, like the arguments after it.
        scheme: Discretisation.
        tolerance: Of the residual.
        max_iterations: Of each load.
        loads: Axes of the gradients; all by default.

    Raises:
        ValueError: As :func:`elastic_stiffness`.
    """
    phase = check_phase(phase, symmetry)
    for name, value in (("solid", solid), ("void", void)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} = {value!r}; expected a conductivity above 0.")
    _check(scheme, tolerance, max_iterations)
    element = thermal_element(phase.ndim - 1, scheme)
    scale = phase * solid + (1 - phase) * void
    return _effective(scale, element, symmetry, scheme, tolerance, max_iterations, loads)


def mandel(stiffness: Tensor) -> Tensor:
    """Voigt's notation (..., 6, 6) or (..., 3, 3) to Mandel's, whose rotations and norms are those of the tensor."""
    dims = 3 if stiffness.shape[-1] == 6 else 2
    factors = stiffness.new_tensor([1.0 if a == b else 2**0.5 for a, b in voigt_pairs(dims)])
    return stiffness * factors * factors[:, None]


def _check(scheme: str, tolerance: float, max_iterations: int) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"scheme = {scheme!r}; expected one of {', '.join(SCHEMES)}.")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance = {tolerance!r}; expected a number between 0 and 1.")
    if not isinstance(max_iterations, int) or max_iterations < 1:
        raise ValueError(f"max_iterations = {max_iterations!r}; expected an integer of at least 1.")


def _effective(
    scale: Tensor,
    element: Element,
    symmetry: str,
    scheme: str,
    tolerance: float,
    max_iterations: int,
    loads: Sequence[int] | None,
) -> Homogenized:
    num_loads = len(element.loads)
    loads = sorted(set(range(num_loads) if loads is None else loads))
    if not loads or loads[0] < 0 or loads[-1] >= num_loads:
        raise ValueError(f"loads = {loads}; expected some of 0 to {num_loads - 1}.")
    options = (element, symmetry, tolerance, max_iterations, tuple(loads))
    # Displacements grow with the voxels' stiffness: a unit of one keeps single precision's range.
    unit = scale.detach().amax()
    with torch.autocast(scale.device.type, enabled=False):  # half precision would not converge
        tensor, residual, num_iterations, _ = _Effective.apply(scale / unit, *options)
    return Homogenized(tensor * unit, residual <= tolerance, residual, int(num_iterations), scheme)


class _Effective(torch.autograd.Function):
    @staticmethod
    def forward(
        scale: Tensor, element: Element, symmetry: str, tolerance: float, max_iterations: int, loads: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        parts = [
            _solve(part, element, symmetry, tolerance, max_iterations, loads)
            for part in scale.split(_cells_at_once(scale, element))
        ]
        fields = torch.cat([part[0] for part in parts])
        residual = torch.cat([part[1] for part in parts])
        num_iterations = torch.tensor(max(part[2] for part in parts))
        return _energies(scale, fields, element, symmetry, loads), residual, num_iterations, fields

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        scale, ctx.element, ctx.symmetry, _, _, ctx.loads = inputs
        *_, fields = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(scale, fields)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scale, fields = ctx.saved_tensors
        return _sensitivity(grad, scale, fields, ctx.element, ctx.symmetry, ctx.loads), *(None,) * 5


def _cells_at_once(scale: Tensor, element: Element) -> int:
    limit = CPU_NUMEL if scale.device.type == "cpu" else GPU_NUMEL
    return max(1, limit // (scale[0].numel() * element.matrix.shape[0]))


def _solve(
    scale: Tensor, element: Element, symmetry: str, tolerance: float, max_iterations: int, loads: Sequence[int]
) -> tuple[Tensor, Tensor, int]:
    """Fluctuations (cells, loads, components, nodes), the largest residual (cells,), and the iterations."""
    points = grid(element, scale.shape[-1], symmetry != "none", scale.dtype, scale.device)
    matrix, strains = (each.to(scale) for each in (element.matrix, element.loads))
    sources = {load: _source(element, symmetry, load) for load in loads}
    fields: dict[int, Tensor] = {}
    residuals, most = [], 0
    for group in points.groups(sorted({source for source, _ in sources.values()})):
        drive = (strains[group] @ matrix)[(None, ..., *(None,) * element.dims)] * scale[:, None, None]
        b = -points.scatter(_split(drive.flatten(0, 1), element))

        def apply(nodes: Tensor, systems: Tensor, group: list[int] = group) -> Tensor:
            corners = points.gather(nodes).flatten(1, 2)
            forces = torch.einsum("ij,sj...->si...", matrix, corners) * scale[systems // len(group), None]
            return points.scatter(_split(forces, element))

        def precondition(forces: Tensor, systems: Tensor, group: list[int] = group) -> Tensor:
            return points.precondition(forces, group[0])

        work = (strains[group] @ matrix * strains[group]).sum(-1).max() * scale[0].numel()
        floor = ROUNDING * torch.finfo(scale.dtype).eps * float(work) ** 0.5
        found = conjugate_gradient(apply, precondition, b, tolerance, max_iterations, floor=floor)
        nodes = found.x.unflatten(0, (len(scale), len(group)))
        fields.update(zip(group, nodes.unbind(1), strict=True))
        residuals.append(found.residual.view(len(scale), -1).amax(1))
        most = max(most, found.num_iterations)
    turned = [_turn(fields[source], element, turn) for source, turn in sources.values()]
    return torch.stack(turned, dim=1), torch.stack(residuals).amax(0), most


def _source(element: Element, symmetry: str, load: int) -> tuple[int, tuple[int, int] | None]:
    """The load to solve for, and the axes to exchange for ``load``: those of the other axes follow in a cubic cell."""
    if symmetry != "cubic":
        return load, None
    first = load - load % element.dims if element.vector and load >= element.dims else 0
    return first, None if load == first else (0, load - first)


def _turn(nodes: Tensor, element: Element, axes: tuple[int, int] | None) -> Tensor:
    """The field with two axes of space exchanged: (cells, components, nodes)."""
    if axes is None:
        return nodes
    first, second = axes
    nodes = nodes.transpose(first - element.dims, second - element.dims)
    if element.vector:
        order = list(range(element.dims))
        order[first], order[second] = second, first
        nodes = nodes[:, order]
    return nodes


def _split(corners: Tensor, element: Element) -> Tensor:
    return corners.unflatten(1, (element.num_components, -1))


def _total(fields: Tensor, scale: Tensor, element: Element, symmetry: str, loads: Sequence[int]) -> Tensor:
    """Strain and fluctuation at the corners: (cells, loads, components * 2^d, voxels)."""
    points = grid(element, scale.shape[-1], symmetry != "none", scale.dtype, scale.device)
    strains = element.loads[list(loads)].to(scale)
    corners = points.gather(fields.flatten(0, 1)).flatten(1, 2).unflatten(0, fields.shape[:2])
    return corners.flatten(3) + strains[..., None]


def _energies(scale: Tensor, fields: Tensor, element: Element, symmetry: str, loads: Sequence[int]) -> Tensor:
    num_loads, matrix = len(element.loads), element.matrix.to(scale)
    tensor = scale.new_zeros(len(scale), num_loads, num_loads)
    for cell, each in enumerate(scale):  # one at a time: this holds all corner values of all loads
        total = _total(fields[cell : cell + 1], scale[cell : cell + 1], element, symmetry, loads)[0]
        force = torch.einsum("ij,ljv->liv", matrix, total) * each.flatten()
        energy = force.flatten(1) @ total.flatten(1).mT / each.numel()
        tensor[cell][torch.meshgrid(*[torch.tensor(loads)] * 2, indexing="ij")] = (energy + energy.mT) / 2
    tensor *= _coupled(element, symmetry).to(scale)
    missing = [load for load in range(num_loads) if load not in loads]
    tensor[:, missing] = tensor[:, :, missing] = float("nan")
    return tensor


def _sensitivity(
    grad: Tensor, scale: Tensor, fields: Tensor, element: Element, symmetry: str, loads: Sequence[int]
) -> Tensor:
    matrix = element.matrix.to(scale)
    grad = (grad * _coupled(element, symmetry).to(scale))[:, list(loads)][:, :, list(loads)]
    result = torch.empty_like(scale)
    for cell, each in enumerate(scale):
        total = _total(fields[cell : cell + 1], scale[cell : cell + 1], element, symmetry, loads)[0]
        weighted = torch.einsum("lk,kjv->ljv", (grad[cell] + grad[cell].mT) / 2, total)
        force = torch.einsum("ij,ljv->liv", matrix, total)
        result[cell] = (force * weighted).sum((0, 1)).view_as(each) / each.numel()
    return result


def _coupled(element: Element, symmetry: str) -> Tensor:
    """Whether two loads can have a common energy: with mirror planes, if every reflection turns both or none."""
    if symmetry == "none":
        return torch.ones(len(element.loads), len(element.loads), dtype=torch.bool)
    return (element.flips[:, None] == element.flips).all(-1)
