import math

import pytest
import torch
from scipy.integrate import dblquad, quad

from training.laser import CELLS, PowderBed, beam_intensity, isotherm_depth, laser_problem, melt_pool_depth

BED = PowderBed()


def line(low, high, num_points=41):
    return torch.linspace(low, high, num_points, dtype=torch.float64)


@pytest.mark.parametrize("shape", [1.0, 1.37, 2.0])
def test_the_beam_carries_unit_power(shape):
    def intensity(y, x):
        return beam_intensity(torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64), shape).item()

    power, _ = dblquad(intensity, 0, 3, 0, 3, epsabs=1e-6)
    assert 4 * power == pytest.approx(1, abs=1e-5)


def test_the_beam_goes_from_gaussian_to_flat_top():
    x = line(0, 2)
    torch.testing.assert_close(beam_intensity(x, 0 * x, 1.0), 2 / math.pi * torch.exp(-2 * x.square()))
    shapes = torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64)
    profiles = beam_intensity(x, x.new_zeros(1), shapes.unsqueeze(1))
    assert profiles.shape == (3, 41)
    assert (profiles[:, 0].diff() < 0).all()  # a lower top
    assert (profiles[:, x == 0.5].diff(dim=0) > 0).all()  # a fuller shoulder
    assert (profiles[:, -1].diff() < 0).all()  # a steeper rim


def test_the_absorption_has_unit_integral_over_the_depth():
    total, _ = quad(lambda z: BED.absorption(torch.tensor(z, dtype=torch.float64)).item(), 0, BED.depth)
    assert total == pytest.approx(1, rel=1e-10)


def test_units():
    steel = BED.steel
    assert steel.diffusivity == pytest.approx(steel.conductivity / steel.density / steel.heat_capacity)
    assert steel.melting_rise == steel.melting - steel.ambient
    # One watt, absorbed whole, heats the volume w^3 for one unit of time by 1 / (k w) kelvin.
    heat = steel.density * steel.heat_capacity * BED.beam_radius**3
    assert BED.heating == pytest.approx(steel.absorptivity * BED.time_scale / heat)
    assert BED.peclet(0.4) == pytest.approx(0.4 * BED.time_scale / BED.beam_radius)
    assert list(BED.intervals) == ["x", "y", "z", "t", "power", "speed", "shape"] == list(CELLS)
    assert BED.intervals["t"][1] * BED.time_scale == pytest.approx(BED.duration)


def test_the_problem_reads_like_the_equation():
    problem = laser_problem(num_cells={"x": 7, "shape": 2}, degree=2)
    assert problem.names == list(CELLS)
    assert problem.describe() == (
        "d/dt u - 1 f(speed) d/dx u - 1 d^2/dx^2 u - 1 d^2/dy^2 u - 1 d^2/dz^2 u = c(x, y, shape) f(z) f(power)"
    )
    x, power, shape = (problem.axis(name) for name in ("x", "power", "shape"))
    assert (x.num_cells, shape.num_cells, power.num_cells) == (7, 2, 1)
    assert (x.degree, shape.degree, power.degree) == (2, 2, 1)
    assert (x.low, x.high) == (-BED.behind, BED.ahead)
    assert x.boundary == ("neumann", "dirichlet")
    assert "t" in problem.initial
    (term,) = problem.source
    where = [torch.tensor([value], dtype=torch.float64) for value in (0.3, 0.2, 1.5)]
    torch.testing.assert_close(term.coefficient(*where), BED.heating * beam_intensity(*where))


@pytest.mark.parametrize("name", ["x", "y", "z", "t"])
def test_cells_are_finest_at_the_beam(name):
    low, high = BED.intervals[name]
    edges = torch.tensor(BED.breakpoints(name, 12))
    assert (edges[0].item(), edges[-1].item()) == pytest.approx((low, high))
    narrowest = edges.diff().argmin()
    assert edges[narrowest] <= 0.2
    assert edges[narrowest + 1] >= -0.2


def test_isotherm_depth_of_known_fields():
    z = line(0, 4, 9)
    slopes = torch.tensor([1.0, 2.0, 0.1, 10.0], dtype=torch.float64)
    hottest = 3 - slopes.unsqueeze(1) * z  # linear in depth: the interpolation is exact
    rise = torch.stack([hottest - 1, hottest, hottest - 2], 1)
    expected = torch.tensor([2.0, 1.0, 4.0, 0.2], dtype=torch.float64)
    torch.testing.assert_close(isotherm_depth(rise, z, 1.0), expected)
    assert isotherm_depth(rise, z, 3.5).tolist() == [0, 0, 0, 0]
    hollow = torch.tensor([[[0.0, 2.0, 0.0]]])  # hotter inside than at the surface
    torch.testing.assert_close(isotherm_depth(hollow, torch.tensor([0.0, 1.0, 2.0]), 1.0), torch.tensor([1.5]))


def test_melt_pool_depth_of_a_known_field(monkeypatch):
    monkeypatch.setattr("training.laser.CHUNK", 3000)  # several chunks
    calls = []

    def rise(points):
        calls.append(len(points))
        x, y, z, _, power, _, shape = points.unbind(1)
        assert (y == 0).all()
        return power * 50 * torch.exp(-(x + 1).square()) - 1000 * shape * z

    parameters = torch.tensor([[1.0, 100.0, 2.0, 1.0], [1.0, 20.0, 2.0, 1.5], [0.5, 60.0, 3.0, 2.0]]).double()
    depth = melt_pool_depth(rise, parameters, num_x=26, num_z=101)  # x = -1 is on the grid
    above = 50 * parameters[:, 1] - BED.steel.melting_rise
    expected = BED.beam_radius * (above / (1000 * parameters[:, 3])).clamp(0, BED.depth)
    torch.testing.assert_close(depth, expected, rtol=1e-6, atol=1e-12)
    assert len(calls) == 3
    assert melt_pool_depth(rise, parameters[:0]).shape == (0,)


def bad_rise(points):
    return points[:, 0] * math.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: laser_problem(num_cells={"r": 3}), r"num_cells names \['r'\]; expected some of"),
        (lambda: laser_problem(num_cells={"x": 0}), "num_cells = 0"),
        (lambda: isotherm_depth(torch.zeros(2, 3), torch.zeros(3), 1.0), r"shape \(2, 3\)"),
        (lambda: isotherm_depth(torch.zeros(2, 3, 4), torch.zeros(3), 1.0), r"z \(3,\)"),
        (lambda: melt_pool_depth(bad_rise, torch.ones(2, 4)), "not finite"),
        (lambda: melt_pool_depth(bad_rise, torch.ones(2, 7)), r"expected \(n, 4\)"),
    ],
)
def test_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
