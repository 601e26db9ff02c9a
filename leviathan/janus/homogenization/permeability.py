r"""Darcy permeability of periodic cells of voxels, by Stokes flow on a staggered grid.

The mean velocity V is given, and forces in the solid hold the fluid still. Solid and fluid are one medium of viscosity
1 with a resistance :math:`\alpha` at each face,

.. math::
    -\Delta v + \nabla p + \alpha v = f, \qquad \nabla \cdot v = 0, \qquad \langle v \rangle = V,
    \qquad f = \langle \alpha v \rangle = R V,

and the permeability is :math:`K = R^{-1}`. Velocities live on the voxels' faces, each on those across it, pressures at
centres (F. H. Harlow & J. E. Welch, Phys. Fluids 8, 1965): mass is conserved in every voxel. With the Green operator G,
which gives the velocity of mean zero from forces and is diagonal in Fourier space, :math:`w = \sqrt\alpha v` solves

.. math::
    (1 + \sqrt\alpha G \sqrt\alpha) w = \sqrt\alpha V,

a relative, with a solid that yields a little, of the method of F. Bignonnet (Comput. Methods Appl. Mech. Eng. 369,
2020). The dissipation :math:`V_i R_{ij} V_j` is stationary in v, so that :math:`\partial R_{ij} / \partial \alpha`,
:math:`v_i v_j` over the number of voxels, needs no further solve, and an error of the solver enters R squared.
"""

from __future__ import annotations

from functools import lru_cache
from math import pi
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from leviathan.janus.cells import Symmetry, symmetrise
from leviathan.janus.homogenization.conjugate_gradient import conjugate_gradient
from leviathan.janus.homogenization.mirror import Kind, along_axes, modes, transform
from leviathan.janus.homogenization.result import Homogenized, check_phase

CPU_NUMEL = 2**18  # velocities of the systems solved at one time, which a cache holds
GPU_NUMEL = 2**27


def permeability(
    phase: Tensor,
    *,
    edge: float = 1.0,
    symmetry: Symmetry = "none",
    tolerance: float = 1e-4,
    max_iterations: int = 2000,
    resistance: float = 1e4,
) -> Homogenized:
    r"""Effective permeability K of cells to a slow flow through their void, :math:`U = -(K / \mu) \nabla p`.

    A face has the resistance :math:`\alpha = r (\phi_a + \phi_b) / 2 + \sum \phi_c \phi_d`, in viscosities per squared
    voxel, for a resistance r of the solid and the voxels a, b that the face parts; c, d are those of the next faces in
    the directions along it. The sum puts the wall beside a fluid's face half a voxel away, where the solid begins: a
    channel of g voxels in n has :math:`K = (g^3 + 2 g) / (12 n)` squared voxels for :math:`g^3 / (12 n)`, an error of
    second order; without the sum it is :math:`g (g + 1) (g + 2) / (12 n)`, of first order. Staircases of voxels on
    curved walls are of first order anyway: K of spheres on a cubic lattice is within 4 % of the literature in 32^3
    voxels, within about 1 % in 64^3.

    If the void does not percolate along an axis, fluid seeps through the solid, and K is about 1 / r squared voxels.
    The forces are then so large that rounding in single precision keeps the residual above 1e-4 or so, which is said,
    though K is right. Between 0 and 1 the resistance of a voxel, and with it K, is far from linear, and the solver
    slow: to move in a grey phase by the gradient take an r of about 100. K of a binary cell is then higher by about
    1 % if it is 10 squared voxels, by about 15 % if it is half a squared voxel.

    Args:
        phase: Share of solid :math:`\phi`, (cells, n, n) or (cells, n, n, n).
        edge: Length of the whole cell's edge, also where phase has orthants. K is in its square.
        symmetry: ``"none"``: cells are whole and periodic. ``"mirror"``: they are the first orthants of cells with
            mirror planes, [0, m) of 2 m voxels along each axis. ``"cubic"``: these are the same along all axes too
            (the mean over the axes' permutations is taken), and one load says all.
        tolerance: Of the residual :math:`\lVert P^{1/2} r \rVert / \lVert P^{1/2} b \rVert` of the equation of w above,
            r here what is left of its right-hand side b, and P, diagonal, the preconditioner: 1 over
            :math:`1 + g \min(2 \alpha, r)`, with the solid's r and the mean g of G's diagonal.
        max_iterations: Of each load, at most.
        resistance: r, above 0. The default's K of connected cells is less than 0.2 % above that of a rigid solid, as
            far as K is above a tenth of a squared voxel.

    Returns:
        K, (cells, d, d), symmetric and positive definite; differentiable once in a floating-point phase.

    Raises:
        ValueError: If phase is no batch of cells, a cell has no solid, so that its K is infinite, or a number is out of
            its range.
    """
    phase = check_phase(phase, symmetry)
    for name, value in (("edge", edge), ("resistance", resistance)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} = {value!r}; expected a finite number above 0.")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance = {tolerance!r}; expected a number between 0 and 1.")
    if not isinstance(max_iterations, int) or max_iterations < 1:
        raise ValueError(f"max_iterations = {max_iterations!r}; expected an integer of at least 1.")
    empty = (phase.detach().flatten(1).amax(1) <= 0).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"cells {empty} have no solid and infinite permeability; expected solid in every cell.")

    dims, is_whole = phase.ndim - 1, symmetry == "none"
    cells = len(phase)
    num_axes = dims if symmetry == "mirror" else 1  # a mirror-symmetric cell is solved once with each axis in front
    phase = torch.cat([symmetrise(phase, symmetry).movedim(1 + axis, 1) for axis in range(num_axes)])
    alpha = _resistances(phase, resistance, is_whole)
    differentiable = alpha.requires_grad and torch.is_grad_enabled()
    options = (resistance, is_whole, tolerance, max_iterations, differentiable)
    with torch.autocast(alpha.device.type, enabled=False):  # half precision would not converge
        drag, residual, num_iterations, _ = _Drag.apply(alpha, *options)
    if is_whole:
        mobility = torch.linalg.inv(drag)
    else:
        mobility = (1 / drag).view(num_axes, cells).mT.expand(cells, dims).diag_embed()
        residual = residual.view(num_axes, cells).amax(0)
    voxels = phase.shape[-1] * (1 if is_whole else 2)
    tensor = mobility * (edge / voxels) ** 2
    return Homogenized(tensor, residual <= tolerance, residual, int(num_iterations), "staggered")


def _resistances(phase: Tensor, resistance: float, is_whole: bool) -> Tensor:
    """Alpha at the faces across each axis, (cells, d, faces): n along each axis in a whole cell, m + 1 in an orthant.

    A face has the number of the voxel after it. In an orthant there are m + 1 across an axis and m along it, and alpha
    is zero at the number left over. So it is at mirror planes that no fluid crosses, those of all axes but the first.
    """
    dims = phase.ndim - 1
    around = pad(phase[:, None], (1, 1) * dims, mode="circular" if is_whole else "replicate")[:, 0]
    components = []
    for axis in range(1, dims + 1):
        n = phase.shape[axis]
        before, after = around.narrow(axis, 0, n + 1), around.narrow(axis, 1, n + 1)
        alpha = resistance * _trim((before + after) / 2, axis)
        walls = before * after
        for beside in range(1, dims + 1):
            if beside != axis:
                strip = _trim(walls, axis, beside)
                alpha = alpha + strip.narrow(beside, 0, n) + strip.narrow(beside, 2, n)
        first = 0 if is_whole or axis == 1 else 1
        alpha = alpha.narrow(axis, first, n - first if is_whole or first else n + 1)
        if not is_whole:
            frame = [(first, first) if a == axis else (0, 1) for a in range(1, dims + 1)]
            alpha = pad(alpha, [size for ends in reversed(frame) for size in ends])  # pad() begins with the last axis
        components.append(alpha)
    return torch.stack(components, 1)


def _trim(values: Tensor, *kept: int) -> Tensor:
    """Without the first and the last along every axis of space but ``kept``."""
    for axis in range(1, values.ndim):
        if axis not in kept:
            values = values.narrow(axis, 1, values.shape[axis] - 2)
    return values


class _PeriodicFlow:
    """The Green operator of whole cells of n voxels along each edge, and their loads: V along each axis."""

    def __init__(self, n: int, dims: int, dtype: torch.dtype, device: torch.device):
        self.axes, self.shape = tuple(range(-dims, 0)), (n,) * dims
        angles = [2 * pi * torch.fft.fftfreq(n, dtype=torch.float64)] * (dims - 1)
        angles.append(2 * pi * torch.fft.rfftfreq(n, dtype=torch.float64))
        # From a face to the centre after it and on to the next face: the difference of these two.
        across = torch.stack([torch.exp(1j * angle) - 1 for angle in torch.meshgrid(*angles, indexing="ij")])
        inverse = _pseudo_inverse(across.abs().square().sum(0))
        self.across = across.to(device, torch.complex64 if dtype == torch.float32 else torch.complex128)
        self.inverse = inverse.to(device, dtype)
        self.mean_diagonal = float(inverse.mean()) * (dims - 1) / dims
        loads = torch.eye(dims, dtype=dtype, device=device)
        self.loads = loads[(..., *(None,) * dims)].expand(dims, dims, *self.shape)
        self.num_voxels = n**dims

    def green(self, forces: Tensor) -> Tensor:
        """Velocities of mean zero, (systems, d, faces) like the forces."""
        waves = torch.fft.rfftn(forces, dim=self.axes).mul_(self.inverse)
        pressure = (self.across * waves).sum(1, keepdim=True).mul_(self.inverse)
        return torch.fft.irfftn(waves.addcmul_(self.across.conj(), pressure, value=-1), s=self.shape, dim=self.axes)


class _MirroredFlow:
    r"""As :class:`_PeriodicFlow` for the first orthants, of m voxels along each edge, of cells with mirror planes.

    The load is V along the first axis. The velocity along it is even about all planes; those along other axes are odd
    along the first and along their own axis. Velocities are multiplied by :math:`\sqrt w`, see
    :mod:`leviathan.janus.homogenization.mirror`.
    """

    def __init__(self, m: int, dims: int, dtype: torch.dtype, device: torch.device):
        size = m + 1
        self.transforms, signs = [], torch.tensor([-1.0, *[1.0] * (dims - 1)])  # d/dx cos = -sin, d/dx sin = cos
        for axis in range(dims):
            kinds = [_kind(component, axis) for component in range(dims)]
            self.transforms.append(torch.stack([_framed(kind, m) for kind in kinds]).to(device, dtype))
        half = 2 * torch.sin(pi / (2 * m) * torch.arange(size, dtype=torch.float64))
        across = torch.stack(torch.meshgrid(*[half] * dims, indexing="ij"))
        inverse = _pseudo_inverse(across.square().sum(0))
        self.across = (signs.view(-1, *(1,) * dims) * across).to(device, dtype)
        self.inverse = inverse.to(device, dtype)
        self.mean_diagonal = float(inverse.mean()) * (dims - 1) / dims
        load = torch.zeros(1, dims, *(size,) * dims, dtype=dtype, device=device)
        inside: tuple[Any, ...] = (..., *(slice(m),) * (dims - 1))
        load[:, 0][inside] = 1
        load[:, 0, [0, m]] *= 0.5**0.5
        self.loads = load
        self.num_voxels = m**dims

    def green(self, forces: Tensor) -> Tensor:
        """As :meth:`_PeriodicFlow.green`."""
        waves = along_axes(forces, self.transforms).mul_(self.inverse)
        pressure = (self.across * waves).sum(1, keepdim=True).mul_(self.inverse)
        waves.addcmul_(self.across, pressure, value=-1)
        return along_axes(waves, [matrix.mT for matrix in self.transforms])


@lru_cache(maxsize=8)
def _flow(
    size: int, dims: int, is_whole: bool, dtype: torch.dtype, device: torch.device
) -> _PeriodicFlow | _MirroredFlow:
    return (_PeriodicFlow if is_whole else _MirroredFlow)(size, dims, dtype, device)


def _kind(component: int, axis: int) -> Kind:
    """The modes of a velocity component along an axis, if the flow is along the first."""
    if component == axis:
        return "cos_nodes" if axis == 0 else "sin_nodes"
    return "sin_centres" if axis == 0 else "cos_centres"


def _framed(kind: Kind, m: int) -> Tensor:
    """The transform with rows and columns by the numbers of modes and points from 0 to m; zero where there is none."""
    matrix, first = torch.zeros(m + 1, m + 1, dtype=torch.float64), int(kind == "sin_nodes")
    rows = modes(kind, m)
    values = transform(kind, m)
    matrix[rows.start : rows.stop, first : first + values.shape[1]] = values
    return matrix


def _pseudo_inverse(symbol: Tensor) -> Tensor:
    """1 / symbol of minus the Laplacian, but 0 at the mean, which V prescribes."""
    symbol = symbol.clone()
    symbol[(0,) * symbol.ndim] = float("inf")
    return 1 / symbol


class _Drag(torch.autograd.Function):
    """Alpha (cells, d, faces) to R (cells, loads, loads), residual (cells,), iterations, v (cells, loads, d, faces).

    The velocity is for the gradient, and left out where none is asked for.
    """

    @staticmethod
    def forward(
        alpha: Tensor, resistance: float, is_whole: bool, tolerance: float, max_iterations: int, differentiable: bool
    ) -> tuple[Tensor, ...]:
        flow = _flow(alpha.shape[-1] - (not is_whole), alpha.ndim - 2, is_whole, alpha.dtype, alpha.device)
        limit = CPU_NUMEL if alpha.device.type == "cpu" else GPU_NUMEL
        at_once = max(1, limit // (alpha[0].numel() * len(flow.loads)))
        parts = []
        for part in alpha.split(at_once):
            drag, residual, velocity, num_iterations = _solve(part, flow, resistance, tolerance, max_iterations)
            parts.append((drag, residual, velocity if differentiable else velocity.new_empty(0), num_iterations))
        *fields, counts = zip(*parts, strict=True)
        drag, residual, velocity = map(torch.cat, fields)
        return drag, residual, torch.tensor(max(counts)), velocity

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        alpha, _, is_whole, *_ = inputs
        *_, velocity = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.num_voxels = (alpha.shape[-1] - (not is_whole)) ** (alpha.ndim - 2)
        ctx.save_for_backward(velocity)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (velocity,) = ctx.saved_tensors
        along = torch.einsum("bij,bj...->bi...", (grad + grad.mT) / (2 * ctx.num_voxels), velocity)
        return (along * velocity).sum(1), *(None,) * 5


def _solve(
    alpha: Tensor, flow: _PeriodicFlow | _MirroredFlow, resistance: float, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """R, the largest residual of the loads, v, and the iterations, as of :class:`_Drag`."""
    # Forces that pressures inside the solid balance move nothing. The preconditioner P is the same at all faces of the
    # solid, with one voxel of it or two, so that these never come into play. Solved for u = P^(-1/2) w.
    diagonal = 1 / (1 + flow.mean_diagonal * (2 * alpha).clamp_max(resistance))
    root = (alpha * diagonal).sqrt()
    num_loads = len(flow.loads)
    load = root[:, None] * flow.loads

    def apply(u: Tensor, systems: Tensor) -> Tensor:
        cells = systems // num_loads
        scale = root[cells]
        return flow.green(scale * u).mul_(scale).addcmul_(diagonal[cells], u)

    found = conjugate_gradient(apply, lambda r, _: r, load.flatten(0, 1), tolerance, max_iterations)
    u = found.x.view_as(load)
    moved = flow.green((root[:, None] * u).flatten(0, 1)).view_as(load)
    # x b + b x - x A x, which is stationary in x, unlike x b off the diagonal.
    work = torch.einsum("bi...,bj...->bij", u, 2 * load - diagonal[:, None] * u - root[:, None] * moved)
    drag = (work + work.mT) / (2 * flow.num_voxels)
    # In the solid v is a small difference of V and the rest; there w says it better.
    held = diagonal.sqrt() / alpha.clamp_min(1).sqrt()
    velocity = torch.where(alpha[:, None] > 1, held[:, None] * u, flow.loads - moved)
    return drag, found.residual.view(len(alpha), -1).amax(1), velocity, found.num_iterations
