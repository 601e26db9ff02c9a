r"""Laser powder bed fusion as one problem in seven inputs: heat conduction under a moving beam of variable shape.

In the frame of a beam that moves with speed v towards +x, the temperature rise T above ambient of a slab obeys

.. math::
    \rho c_p (T_t - v T_x) - k \Delta T = \eta P\, S(x, y; s)\, D(z), \qquad T = 0 \text{ at } t = 0.

S carries unit power over the plane and D over the depth. With lengths in beam radii w, time in :math:`w^2 / \alpha`,
the speed as Péclet number :math:`v w / \alpha` and T in kelvin this is

.. math::
    T_t - Pe\, T_x - \Delta T = \frac{\eta P}{k w} S(x, y; s)\, D(z).

Conduction alone, with constant properties: neither latent heat nor flow nor evaporation. Where the rise passes boiling,
in the corner of high power and low speed, it is the linear model's number and not a temperature that steel can have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp, pi
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sna_core.graded import graded_breakpoints

if TYPE_CHECKING:
    from sna_core.operators import Problem

CELLS = {"x": 24, "y": 12, "z": 12, "t": 8, "power": 1, "speed": 4, "shape": 3}
FINEST = 0.5  # width of the narrowest cell, as a fraction of an equal one
COMPRESSION = 1e-5  # of the beam's largest intensity: far below what a solution's cells resolve
POOL = (-2.0, 0.5)  # where along x the melt pool is deepest, with a margin, for any input in the default ranges
CHUNK = 2**20  # points that are evaluated at once


@dataclass(frozen=True)
class Steel:
    """Stainless steel 316L: constants that do not depend on temperature.

    Density, heat capacity and conductivity are those of the solid at 1300 °C, the hottest for which the handbook gives
    them: K. C. Mills, Recommended Values of Thermophysical Properties for Selected Commercial Alloys (Woodhead, 2002),
    316 stainless steel, through the polynomial fits of its table in the documentation of MOOSE
    (``ThermalSS316Properties``). The melting range there is 1385 to 1450 °C.

    Attributes:
        density: In kg / m^3.
        heat_capacity: In J / (kg K).
        conductivity: In W / (m K).
        melting: Liquidus, in K.
        ambient: In K.
        absorptivity: Absorbed part of the beam's power. It was measured by calorimetry by J. Trapp et al., Applied
            Materials Today 9 (2017) 341-349, and varies with power and powder; this is a round value for conduction.
        penetration: Depth in m over which the beam fades to 1/e in the powder; about a layer of powder. A choice of the
            model, not a measurement.
    """

    density: float = 7303.0
    heat_capacity: float = 714.0
    conductivity: float = 31.0
    melting: float = 1723.0
    ambient: float = 298.0
    absorptivity: float = 0.35
    penetration: float = 40e-6

    @property
    def diffusivity(self) -> float:
        """In m^2 / s."""
        return self.conductivity / (self.density * self.heat_capacity)

    @property
    def melting_rise(self) -> float:
        """From ambient to melting, in K."""
        return self.melting - self.ambient


@dataclass(frozen=True)
class PowderBed:
    """The slab, the beam and the ranges of the seven inputs.

    Attributes:
        steel: Its constants.
        beam_radius: w in m, where a Gaussian beam has fallen to 1/e^2.
        duration: Of the track, in s.
        behind: Length of the slab behind the beam, in beam radii; heat flows out there (no flux by conduction).
        ahead: Ahead of the beam, where the rise is zero.
        width: From the middle of the track, where the field is symmetric, to the side, where the rise is zero.
        depth: From the surface, which is insulated, to the bottom, where the rise is zero.
        power: Lowest and highest power of the beam, in W.
        speed: Lowest and highest speed, in m / s.
        shape: Lowest and highest exponent s of the beam.
    """

    steel: Steel = Steel()
    beam_radius: float = 50e-6
    duration: float = 0.5e-3
    behind: float = 6.0
    ahead: float = 4.0
    width: float = 5.0
    depth: float = 5.0
    power: tuple[float, float] = (50.0, 200.0)
    speed: tuple[float, float] = (0.2, 0.8)
    shape: tuple[float, float] = (1.0, 2.0)

    @property
    def time_scale(self) -> float:
        """The unit of time, in s."""
        return self.beam_radius**2 / self.steel.diffusivity

    @property
    def heating(self) -> float:
        """Kelvin for each watt of the beam: absorptivity / (conductivity * beam radius)."""
        return self.steel.absorptivity / (self.steel.conductivity * self.beam_radius)

    def peclet(self, speed: float) -> float:
        """The Péclet number of a speed in m / s (a tensor gives a tensor)."""
        return speed * self.beam_radius / self.steel.diffusivity

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Low and high end of each input, in the units of the problem, in the order of a point's columns."""
        return {
            "x": (-self.behind, self.ahead),
            "y": (0.0, self.width),
            "z": (0.0, self.depth),
            "t": (0.0, self.duration / self.time_scale),
            "power": self.power,
            "speed": (self.peclet(self.speed[0]), self.peclet(self.speed[1])),
            "shape": self.shape,
        }

    def breakpoints(self, name: str, num_cells: int) -> tuple[float, ...]:
        """Edges of cells along x, y, z or t: finest at the beam, the surface and the start."""
        low, high = self.intervals[name]
        return graded_breakpoints(low, high, num_cells, 0.0, FINEST * (high - low) / max(1, num_cells))

    def absorption(self, z: Tensor) -> Tensor:
        """D: :math:`e^{-z / d} / (d (1 - e^{-Z / d}))` for the penetration d, of unit integral over the depth Z."""
        penetration = self.steel.penetration / self.beam_radius
        return torch.exp(-z / penetration) / (penetration * (1 - exp(-self.depth / penetration)))


def beam_intensity(x: Tensor, y: Tensor, shape: Tensor | float) -> Tensor:
    r"""The super-Gaussian :math:`S = c\, e^{-2 (x^2 + y^2)^s}` of unit power over the plane, lengths in beam radii.

    With :math:`u = r^2`, :math:`\pi \int_0^\infty e^{-2 u^s} du = \pi 2^{-1/s} \Gamma(1 + 1/s) = 1 / c`. s = 1 is the
    Gaussian beam of peak 2 / pi; larger s make the top flatter and the rim steeper. The arguments broadcast.
    """
    shape = torch.as_tensor(shape, dtype=x.dtype)
    amplitude = torch.exp2(1 / shape) / (pi * torch.exp(torch.lgamma(1 + 1 / shape)))
    return amplitude * torch.exp(-2 * (x.square() + y.square()) ** shape)


def laser_problem(
    bed: PowderBed | None = None, *, num_cells: Mapping[str, int] | None = None, degree: int = 3
) -> Problem:
    """The equation over x, y, z, t, power (W), speed (Péclet number) and shape; its solution is the rise in K.

    Args:
        bed: The slab and the ranges; the default one if None.
        num_cells: Of some axes, over :data:`CELLS`.
        degree: Of all axes but the power, in which the rise is exactly linear.

    Raises:
        ValueError: If ``num_cells`` names no axis, or an axis refuses its size.
    """
    from sna_core.axis import Axis
    from sna_core.operators import Problem, Term, derivative, multiply

    bed = bed or PowderBed()
    if unknown := set(num_cells or {}) - set(CELLS):
        raise ValueError(f"num_cells names {sorted(unknown)}; expected some of {sorted(CELLS)}.")
    cells = CELLS | dict(num_cells or {})
    boundary = dict.fromkeys("xyz", ("neumann", "dirichlet"))
    axes = []
    for name, (low, high) in bed.intervals.items():
        if name in "xyzt":
            edges = bed.breakpoints(name, cells[name])
            axes.append(Axis(name, low, high, breakpoints=edges, degree=degree, boundary=boundary.get(name, "free")))
        else:
            axes.append(Axis(name, low, high, num_cells=cells[name], degree=1 if name == "power" else degree))

    def heat(x: Tensor, y: Tensor, shape: Tensor) -> Tensor:
        return bed.heating * beam_intensity(x, y, shape)

    return Problem(
        axes=axes,
        operator=[
            Term(t=derivative(1)),
            Term(-1.0, speed=multiply(lambda peclet: peclet), x=derivative(1)),
            *(Term(-1.0, **{name: derivative(2)}) for name in "xyz"),
        ],
        source=[Term(heat, z=multiply(bed.absorption), power=multiply(lambda power: power))],
        initial={"t": []},
        compression=COMPRESSION,
    )


def isotherm_depth(rise: Tensor, z: Tensor, level: float) -> Tensor:
    """The largest depth at which the rise reaches a level anywhere along x, linear between the depths.

    Args:
        rise: (samples, points along x, depths).
        z: Ascending depths (depths,), the first one the surface.
        level: In the units of the rise.

    Returns:
        (samples,), in the units of z: zero where nothing reaches the level, and the last depth where all of them do.

    Raises:
        ValueError: If the shapes do not fit, or a rise is not finite.
    """
    if rise.ndim != 3 or z.ndim != 1 or rise.shape[-1] != len(z):
        raise ValueError(
            f"rise has shape {tuple(rise.shape)} and z {tuple(z.shape)}; expected (samples, points along x, "
            "depths) and (depths,)."
        )
    hottest = rise.amax(1)  # (samples, depths)
    if not hottest.isfinite().all():
        raise ValueError("a rise is not finite; expected temperatures in kelvin.")
    above = hottest >= level
    last = len(z) - 1 - above.flip(1).int().argmax(1)  # the deepest above the level, where there is one
    below = (last + 1).clamp(max=len(z) - 1)
    here, there = (hottest.gather(1, i.unsqueeze(1)).squeeze(1) for i in (last, below))
    part = torch.where(below > last, (here - level) / (here - there).clamp(min=torch.finfo(rise.dtype).tiny), 0.0)
    return torch.where(above.any(1), z[last] + part * (z[below] - z[last]), 0.0)


def melt_pool_depth(
    rise: Callable[[Tensor], Tensor],
    parameters: Tensor,
    bed: PowderBed | None = None,
    *,
    num_x: int = 26,
    num_z: int = 61,
) -> Tensor:
    """Depth of the melt pool below the middle of the track, in m.

    The rise is evaluated on y = 0 on a grid of points along x and depths; between depths it is taken to be linear.

    Args:
        rise: Points (N, 7), as of :func:`laser_problem`, to rises (N,) in K.
        parameters: Samples (n, 4) of t, power, speed and shape, in the problem's units.
        bed: As of the problem.
        num_x: Points along x, over :data:`POOL`.
        num_z: Depths.

    Returns:
        (n,).

    Raises:
        ValueError: If the samples do not have four columns, or a rise is not finite.
    """
    bed = bed or PowderBed()
    if parameters.ndim != 2 or parameters.shape[1] != 4:
        raise ValueError(f"parameters has shape {tuple(parameters.shape)}; expected (n, 4): t, power, speed, shape.")
    x = torch.linspace(*POOL, num_x).to(parameters)
    z = torch.linspace(0.0, bed.depth, num_z).to(parameters)
    plane = torch.cartesian_prod(x, x.new_zeros(1), z)  # (num_x * num_z, 3)
    found = []
    for chunk in parameters.split(max(1, CHUNK // len(plane))):
        grid = plane.expand(len(chunk), -1, -1)
        points = torch.cat([grid, chunk.unsqueeze(1).expand(-1, len(plane), -1)], -1)
        rises = rise(points.flatten(0, 1)).view(len(chunk), num_x, num_z)
        found.append(isotherm_depth(rises, z, bed.steel.melting_rise))
    return bed.beam_radius * torch.cat(found) if found else parameters.new_zeros(0)
