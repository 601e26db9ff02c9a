import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import skfem
import torch
from scipy.linalg import expm
from scipy.special import erfc
from skfem.helpers import dot, grad

from training.elements import LaserElements, heat, plume, poisson
from training.laser import PowderBed, beam_intensity

BED = PowderBed()


def random_points(num_points, *ends, seed=0):
    low, high = np.array(ends).T
    return low + (high - low) * np.random.default_rng(seed).random((num_points, len(ends)))


def l2(values):
    return math.sqrt(np.mean(values**2))


def sines(*x):
    return torch.stack([torch.sin(math.pi * c) for c in x]).prod(0)


# ------------------------------------------------------------------------------------------------------------ Poisson


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("degree", [1, 2])
def test_poisson_converges_at_the_rate_of_its_degree(dimension, degree):
    points = random_points(400, *[(0, 1)] * dimension)
    exact = sines(*torch.from_numpy(points.T)).numpy() + 1 + points[:, 0]
    errors, cells = [], {2: (8, 16), 3: (5, 10)}[dimension]
    for num_cells in cells:
        found = poisson(
            dimension,
            num_cells,
            degree,
            source=lambda *x: dimension * math.pi**2 * sines(*x),
            boundary=lambda *x: 1 + x[0],
        )
        errors.append(l2(found(points) - exact))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(degree + 1, abs=0.2)
    assert found.num_unknowns == (degree * cells[1] - 1) ** dimension
    assert found.seconds > 0


def test_quadratic_elements_hold_quadratic_solutions():
    found = poisson(2, 3, 2, source=lambda x, y: -4.0, boundary=lambda x, y: x.square() + y.square())
    points = np.concatenate([random_points(300, (0, 1), (0, 1)), [[0, 0], [1, 1], [0, 1], [1, 0.5]]])
    np.testing.assert_allclose(found(points), (points**2).sum(1), atol=1e-12)
    assert found(np.zeros((0, 2))).shape == (0,)


# ------------------------------------------------------------------------------------------------------ heat and plume


@pytest.mark.parametrize("degree", [1, 2])
def test_heat_converges_at_the_rate_of_its_degree(degree):
    points = random_points(400, (0, 1), (0, 1))
    exact = np.exp(-0.1 * math.pi**2 * points[:, 1]) * np.sin(math.pi * points[:, 0])
    errors = [l2(heat(0.1, initial=sines, num_cells=n, degree=degree, num_steps=20)(points) - exact) for n in (8, 16)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(degree + 1, abs=0.2)


def test_time_steps_are_of_fourth_order():
    points = np.array([[0.5, 1.0]])
    values = [heat(1.0, initial=sines, num_cells=8, degree=2, num_steps=n)(points)[0] for n in (8, 16, 256)]
    coarse, fine = (abs(value - values[-1]) for value in values[:2])
    assert math.log2(coarse / fine) == pytest.approx(4, abs=0.3)


def test_a_plume_without_rotation_decays_like_heat():
    found = plume(0.0, 0.05, initial=sines, num_cells=6, degree=2, num_steps=6)
    points = random_points(300, *[(0, 1)] * 4)
    exact = np.exp(-0.15 * math.pi**2 * points[:, 3]) * np.sin(math.pi * points[:, :3]).prod(1)
    assert l2(found(points) - exact) < 1e-3
    assert found.num_unknowns == 11**3


def test_a_plume_turns_about_the_axis_of_the_cube():
    centre, width, omega, diffusivity = (0.5, 0.65, 0.5), 0.1, math.pi / 3, 1e-3

    def initial(x, y, z):
        return torch.exp(-sum((c - a) ** 2 for c, a in zip((x, y, z), centre, strict=True)) / (2 * width**2))

    found = plume(omega, diffusivity, initial=initial, num_cells=12, degree=2, num_steps=10)
    middle = np.array([[0.5 - 0.15 * math.sin(omega), 0.5 + 0.15 * math.cos(omega), 0.5, 1.0]])
    expected = (1 + 2 * diffusivity / width**2) ** -1.5  # of a free Gaussian, whose walls are far
    assert found(middle)[0] == pytest.approx(expected, rel=0.01)
    mirrored = middle * [-1, 1, 1, 1] + [1, 0, 0, 0]
    assert found(mirrored)[0] < 0.5


# -------------------------------------------------------------------------------------------------------------- laser


@cache
def laser_elements(peclet):
    return LaserElements(peclet, num_cells=(32, 12, 12), num_steps=16)


def free_rise(points, power, peclet):
    """The rise under a Gaussian beam on a half space: Green's function in x and y, images in z, quadrature in time."""
    x, y, z, t = points.T
    nodes, weights = np.polynomial.legendre.leggauss(60)
    age = t[:, None] * ((nodes + 1) / 2) ** 2  # finer at the latest heat
    weights = t[:, None] * weights * (nodes + 1) / 2
    variance = 1 / 4 + 2 * age
    across = np.exp(-((x[:, None] + peclet * age) ** 2 + y[:, None] ** 2) / (2 * variance)) / (2 * math.pi * variance)
    rate, spread = BED.beam_radius / BED.steel.penetration, np.sqrt(4 * age)
    down = sum(
        rate / 2 * np.exp(age * rate**2 - s * rate * z[:, None]) * erfc((2 * rate * age - s * z[:, None]) / spread)
        for s in (1, -1)
    )
    return power * BED.heating * (weights * across * down).sum(1)


@pytest.mark.parametrize("speed", [0.2, 0.8])
def test_the_rise_equals_that_of_a_half_space(speed):
    peclet = BED.peclet(speed)
    ends = BED.intervals
    points = random_points(500, (-4, 2), (0, 2.5), (0, 2.5), (0.01, ends["t"][1]))
    expected = free_rise(points, 100.0, peclet)
    # The slab takes in all of the beam, the part too that would pass below it.
    expected /= 1 - math.exp(-BED.depth * BED.beam_radius / BED.steel.penetration)
    found = laser_elements(peclet).solve(100.0, 1.0)
    peak = found.coefficients.max()
    assert abs(found(points) - expected).max() < 3e-3 * peak
    assert l2(found(points) - expected) < 5e-4 * peak


def test_the_rise_is_that_of_three_dimensional_elements_and_the_exponential():
    # The plain twin: scikit-fem's hexahedra, their matrices as they come, and no steps in time.
    cells, peclet, shape, power = (3, 2, 2), BED.peclet(0.4), 1.5, 80.0
    mesh = skfem.MeshHex.init_tensor(*(np.array(BED.breakpoints(*pair)) for pair in zip("xyz", cells, strict=True)))
    basis = skfem.Basis(mesh, skfem.ElementHex2(), intorder=8)

    @skfem.BilinearForm
    def mass(u, v, _):
        return u * v

    @skfem.BilinearForm
    def operator(u, v, _):
        return dot(grad(u), grad(v)) - peclet * grad(u)[0] * v

    @skfem.LinearForm
    def load(v, where):
        x, y, z = map(torch.from_numpy, where.x)
        return power * BED.heating * (beam_intensity(x, y, shape) * BED.absorption(z)).numpy() * v

    free = np.flatnonzero((basis.doflocs < np.array([[BED.ahead], [BED.width], [BED.depth]]) - 1e-9).all(0))
    left, right = (form.assemble(basis)[free][:, free].toarray() for form in (mass, operator))
    steady = np.linalg.solve(right, load.assemble(basis)[free])
    end = BED.intervals["t"][1]
    coefficients = np.zeros(basis.N)
    coefficients[free] = steady - expm(-end * np.linalg.solve(left, right)) @ steady

    found = LaserElements(peclet, num_cells=cells, num_steps=40).solve(power, shape)
    assert found.num_unknowns == len(free)
    points = random_points(200, *(BED.intervals[name] for name in "xyz"))
    values = found(np.column_stack([points, np.full(200, end)]))
    expected = np.concatenate([basis.interpolator(coefficients)(chunk.T) for chunk in np.array_split(points, 4)])
    np.testing.assert_allclose(values, expected, atol=1e-4 * abs(expected).max())


def test_energy_is_what_the_beam_brought():
    bed = replace(BED, behind=5.0, ahead=5.0, width=5.0, depth=6.0, duration=0.1e-3)  # no heat reaches the sides
    found = LaserElements(0.0, bed, num_cells=(12, 6, 10), num_steps=4).solve(100.0, 2.0)

    @skfem.LinearForm
    def integral(v, _):
        return v

    x, y, z = (integral.assemble(basis) for basis in found.bases)
    energy = np.einsum("txyz,x,y,z->t", found.coefficients, x, y, z)
    brought = 100.0 * bed.heating * found.times / 2  # the half with y > 0
    np.testing.assert_allclose(energy, brought, rtol=5e-3)


def test_the_rise_is_linear_in_the_power_and_steady_in_the_end():
    elements = laser_elements(BED.peclet(0.8))
    points = random_points(200, *(BED.intervals[name] for name in "xyzt"))
    one, three = (elements.solve(power, 1.3)(points) for power in (50.0, 150.0))
    np.testing.assert_allclose(three, 3 * one, rtol=1e-9, atol=1e-9)
    end = BED.intervals["t"][1]
    below = np.array([[-0.3, 0.0, 0.0, t] for t in (0.0, 0.8 * end, end)])
    rises = elements.solve(100.0, 1.0)(below)
    assert rises[0] == 0
    assert rises[1] == pytest.approx(rises[2], rel=2e-3)


def test_a_flatter_beam_and_a_faster_one():
    end = BED.intervals["t"][1]
    wake = np.array([[-3.0, 0.0, 0.0, end], [3.0, 0.0, 0.0, end]])
    for speed in (0.2, 0.8):
        behind, ahead = laser_elements(BED.peclet(speed)).solve(100.0, 1.0)(wake)
        assert behind > 10 * abs(ahead)
    rim = np.array([[0.0, 0.7, 0.0, 0.02]])  # early, before heat spreads
    gaussian, flat = (laser_elements(BED.peclet(0.2)).solve(100.0, shape)(rim)[0] for shape in (1.0, 2.0))
    assert flat > gaussian


# ---------------------------------------------------------------------------------------------------------- bad input


def heat_with(**changes):
    return heat(**{"nu": 0.1, "initial": sines, "num_cells": 4, "degree": 2, "num_steps": 2} | changes)


def plume_with(**changes):
    given = {"omega": 1.0, "diffusivity": 0.1, "initial": sines, "num_cells": 2, "degree": 2, "num_steps": 2}
    return plume(**given | changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: poisson(4, 3, 1, source=sines), "dimension = 4; expected 2 or 3"),
        (lambda: poisson(2, 0, 1, source=sines), "num_cells = 0; expected an integer of at least 1"),
        (lambda: poisson(2, 3, 3, source=sines), "degree = 3; expected 1 or 2"),
        (lambda: poisson(2, 3, 1, source=lambda x, y: x[:1]), "one for each point"),
        (lambda: poisson(2, 3, 1, source=sines, boundary=lambda x, y: x / 0), "not finite"),
        (lambda: poisson(2, 3, 1, source=sines)([[0.5, 1.5]]), r"points\[0, 1\] = 1\.5 lies outside \[0\.0, 1\.0\]"),
        (lambda: poisson(2, 3, 1, source=sines)([[0.5, math.nan]]), "= nan lies outside"),
        (lambda: poisson(2, 3, 1, source=sines)([0.5, 0.5]), r"shape \(2,\); expected \(N, 2\)"),
        (lambda: heat_with(nu=0.0), r"nu = 0\.0; expected a finite number above 0"),
        (lambda: heat_with(num_steps=0), "num_steps = 0"),
        (lambda: heat_with()([[0.5, 2.0]]), r"points\[0, 1\] = 2\.0 lies outside"),
        (lambda: plume_with(omega=math.inf), "omega = inf"),
        (lambda: plume_with(diffusivity=-1.0), "diffusivity"),
        (lambda: LaserElements(-1.0), r"peclet = -1\.0"),
        (lambda: LaserElements(1.0, num_cells=(3, 0, 3)), "y = 0; expected an integer"),
        (lambda: LaserElements(1.0, degree=3), "degree = 3"),
        (lambda: laser_elements(BED.peclet(0.8)).solve(math.nan, 1.0), "power = nan"),
        (lambda: laser_elements(BED.peclet(0.8)).solve(1.0, 0.0), r"shape = 0\.0"),
    ],
)
def test_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
