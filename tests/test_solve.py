"""Solutions of whole problems against exact ones: convergence rates, and one problem of each kind."""

import math
from functools import reduce
from itertools import pairwise

import pytest
import torch

from sna_core import Axis, Problem, Term, derivative, graded_breakpoints, multiply
from sna_core.field import DECOMPOSITIONS, SeparableField, gauss
from sna_core.solve import METHODS, solve

PI = math.pi
SINE = multiply(lambda x: (PI * x).sin())
IDENTITY = multiply(lambda x: x)
SIN, COS, EXP = multiply(torch.sin), multiply(torch.cos), multiply(torch.exp)
DECAY = multiply(lambda t: (-t).exp())


@torch.no_grad()
def field(problem, solution):
    """The solution as a function of points (points, num_axes), differentiable in them."""
    order = list(solution.axis_order)
    bases = [problem.axes[i].basis for i in order]
    if solution.decomposition == "tensor_train":
        rank = [core.shape[2] for core in solution.cores[:-1]]
        found = SeparableField(bases, decomposition="tensor_train", rank=rank)
    else:
        sizes = [frame.shape[1] for frame in solution.frames] or None
        rank = solution.factors[0].shape[1]
        found = SeparableField(bases, decomposition=solution.decomposition, rank=rank, frame_sizes=sizes)
    for name in ("cores", "factors", "frames"):
        for parameter, value in zip(getattr(found, name, ()), getattr(solution, name), strict=True):
            parameter.copy_(value)
    return lambda points: found(points[:, order])


def box(problem):
    """Quadrature points (points, num_axes) and weights over the box."""
    axes = [gauss(axis.basis, 5) for axis in problem.axes]
    points = torch.cartesian_prod(*[x for x, _ in axes]).view(-1, len(axes))
    return points, torch.cartesian_prod(*[w for _, w in axes]).view(-1, len(axes)).prod(1)


@torch.no_grad()
def error(problem, solution, exact):
    """Relative, in L2."""
    points, weights = box(problem)
    expected = exact(*points.unbind(1))
    left = field(problem, solution)(points) - expected
    return ((weights * left.square()).sum() / (weights * expected.square()).sum()).sqrt().item()


def close(found, expected, tolerance):
    return ((found - expected).norm() / expected.norm()).item() <= tolerance


def slopes(errors):
    """Of cells that are doubled."""
    return [math.log2(a / b) for a, b in pairwise(errors)]


def laplacian(names):
    return [Term(-1.0, **{name: derivative(2)}) for name in names]


def sines(*points):
    return reduce(torch.mul, ((PI * x).sin() for x in points))


def poisson(names="xy", source=None, **options):
    options = {"num_cells": 8, "boundary": "dirichlet"} | options
    source = [Term(len(names) * PI**2, **dict.fromkeys(names, SINE))] if source is None else source
    return Problem([Axis(name, 0, 1, **options) for name in names], laplacian(names), source=source)


def heat(num_cells=8, degree=3, num_basis=7):
    return Problem(
        [
            Axis("x", 0, 1, num_cells=num_cells, degree=degree, boundary="dirichlet"),
            Axis("t", 0, 1, num_cells=num_cells, degree=degree),
            Axis("nu", 0.1, 0.3, kind="chebyshev", num_basis=num_basis),
        ],
        [Term(t=derivative(1)), Term(-1.0, nu=IDENTITY, x=derivative(2))],
        initial={"t": [Term(x=SINE)]},
    )


def exact_heat(x, t, nu):
    return (PI * x).sin() * (-(PI**2) * nu * t).exp()


# Rates.


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("method", ["galerkin", "auto"])
def test_poisson_converges_at_the_best_rate(degree, method):
    errors = []
    for num_cells in (8, 16, 32):
        problem = poisson(num_cells=num_cells, degree=degree)
        solution = solve(problem, rank=3, tolerance=1e-10, method=method)
        assert solution.report.converged
        assert (solution.report.equation_residual is None) == (degree == 1)
        errors.append(error(problem, solution, sines))
    assert slopes(errors)[-1] == pytest.approx(degree + 1, abs=0.2)


@pytest.mark.parametrize(("degree", "rate"), [(2, 2), (3, 4), (4, 5)])
def test_least_squares_converges_at_its_rate(degree, rate):
    """Of degree + 1 or 2 (degree - 1), whichever is less: the residual has two derivatives and is squared."""
    errors = []
    for num_cells in (6, 12):
        problem = heat(num_cells, degree)
        solution = solve(problem, rank=14, tolerance=1e-9)
        assert solution.report.stopped_by == "stagnation"
        errors.append(error(problem, solution, exact_heat))
    assert slopes(errors)[-1] == pytest.approx(rate, abs=0.25)


@pytest.mark.parametrize("kind", ["chebyshev", "legendre"])
def test_polynomials_converge_exponentially(kind):
    errors = []
    for num_basis in (6, 10, 14):
        problem = poisson(num_cells=None, kind=kind, num_basis=num_basis)
        errors.append(error(problem, solve(problem, rank=3, tolerance=1e-12), sines))
    assert errors[1] < 1e-3 * errors[0]
    assert errors[2] < 1e-3 * errors[1]
    assert errors[2] < 1e-10


def test_a_fourier_axis_converges_exponentially():
    """u_t + u_x = nu u_xx from exp(sin x), whose waves each drift and decay."""
    drift, nu = 0.7, 0.05
    grid = 2 * PI * torch.arange(64, dtype=torch.float64) / 64
    waves = torch.fft.fft(grid.sin().exp()) / 64

    def exact(x, t):
        number = torch.arange(-20, 21, dtype=torch.float64)
        phase = 1j * number * (x - drift * t).unsqueeze(-1) - nu * number**2 * t.unsqueeze(-1)
        return (phase.exp() @ waves[number.long()]).real

    errors = []
    for num_basis in (9, 15, 21):
        problem = Problem(
            [
                Axis("x", 0, 2 * PI, kind="fourier", num_basis=num_basis, boundary="periodic"),
                Axis("t", 0, 1, kind="chebyshev", num_basis=20),
            ],
            [Term(t=derivative(1)), Term(drift, x=derivative(1)), Term(-nu, x=derivative(2))],
            initial={"t": [Term(x=multiply(lambda x: x.sin().exp()))]},
        )
        errors.append(error(problem, solve(problem, rank=16, tolerance=1e-12), exact))
    assert errors[1] < 1e-3 * errors[0]
    assert errors[2] < 1e-10


# Kinds of problems.


def test_a_wave_from_rest_and_in_motion():
    """u_tt = u_xx with value and velocity."""
    problem = Problem(
        [
            Axis("x", 0, 1, kind="legendre", num_basis=18, boundary="dirichlet"),
            Axis("t", 0, 1, kind="chebyshev", num_basis=18),
        ],
        [Term(t=derivative(2)), *laplacian("x")],
        initial={"t": ([Term(x=SINE)], [Term(PI, x=multiply(lambda x: (2 * PI * x).sin()))])},
    )

    def exact(x, t):
        return (PI * x).sin() * (PI * t).cos() + (2 * PI * x).sin() * (2 * PI * t).sin() / 2

    assert error(problem, solve(problem, rank=8, tolerance=1e-12), exact) <= 1e-10


SIDES = {"dirichlet": lambda f, slope: f, "neumann": lambda f, slope: slope}


@pytest.mark.parametrize("method", ["galerkin", "least_squares"])
@pytest.mark.parametrize("x", [("dirichlet", "dirichlet"), ("dirichlet", "neumann"), ("neumann", "dirichlet")])
@pytest.mark.parametrize("y", [("dirichlet", "dirichlet"), ("neumann", "dirichlet"), ("neumann", "neumann")])
def test_data_on_all_sides(method, x, y):
    """-lap u = f for a polynomial that the splines hold, from its values and slopes at the walls."""
    # u = (x^3 + x + 1) (y^2 + y + 2)
    f = {0: 1.0, 1: 3.0}, {0: 1.0, 1: 4.0}  # values and slopes of x^3 + x + 1
    g = {0: 2.0, 1: 4.0}, {0: 1.0, 1: 3.0}
    in_x, in_y = multiply(lambda x: x**3 + x + 1), multiply(lambda y: y**2 + y + 2)
    of_x = tuple([Term(f[kind == "neumann"][end], y=in_y)] for end, kind in enumerate(x))
    of_y = tuple([Term(g[kind == "neumann"][end], x=in_x)] for end, kind in enumerate(y))
    problem = Problem(
        [Axis("x", 0, 1, num_cells=3, boundary=x), Axis("y", 0, 1, num_cells=4, boundary=y)],
        laplacian("xy"),
        source=[Term(-6.0, x=IDENTITY, y=in_y), Term(-2.0, x=in_x)],
        boundary={"x": of_x, "y": of_y},
    )
    solution = solve(problem, rank=16, tolerance=1e-9, method=method)
    assert error(problem, solution, lambda x, y: (x**3 + x + 1) * (y**2 + y + 2)) <= 1e-7


def test_moving_boundary_data_with_initial_data():
    """u = exp(x - t) of u_t = u_xx - 2 u."""
    wall = [Term(t=DECAY)], [Term(math.e, t=DECAY)]
    errors = []
    for num_cells in (4, 8):
        problem = Problem(
            [Axis("x", 0, 1, num_cells=num_cells, boundary="dirichlet"), Axis("t", 0, 1, num_cells=num_cells)],
            [Term(t=derivative(1)), *laplacian("x"), Term(2.0)],
            boundary={"x": wall},
            initial={"t": [Term(x=EXP)]},
        )
        solution = solve(problem, rank=14, tolerance=1e-9)
        errors.append(error(problem, solution, lambda x, t: (x - t).exp()))
    assert errors[1] < 1e-6
    assert slopes(errors)[0] > 3.7


@pytest.mark.parametrize("method", METHODS)
def test_a_variable_coefficient_in_divergence_form(method):
    """-((1 + x^2) u_x)_x - u_yy."""
    flux = derivative(1) * multiply(lambda x: 1 + x**2) * derivative(1)
    load = multiply(lambda x: (1 + x**2) * PI**2 * (PI * x).sin() - 2 * x * PI * (PI * x).cos())
    axes = [Axis(name, 0, 1, num_cells=12, boundary="dirichlet") for name in "xy"]
    problem = Problem(
        axes,
        [Term(-1.0, x=flux), *laplacian("y")],
        source=[Term(x=load, y=SINE), Term(PI**2, x=SINE, y=SINE)],
    )
    assert error(problem, solve(problem, rank=4, tolerance=1e-8, method=method), sines) <= 1e-5


def test_functions_of_several_axes():
    """A coefficient 1 / (1 + x + x y) and a source of both axes that fit sin(pi x) sin(pi y)."""

    def coefficient(x, y):
        return 1 / (1 + x + x * y)

    errors = []
    for num_cells in (6, 12):
        problem = Problem(
            [Axis(name, 0, 1, num_cells=num_cells, boundary="dirichlet") for name in "xy"],
            [Term(lambda x, y: -coefficient(x, y), **{name: derivative(2)}) for name in "xy"],
            source=lambda x, y: 2 * PI**2 * sines(x, y) * coefficient(x, y),
        )
        errors.append(error(problem, solve(problem, rank=10, tolerance=1e-8), sines))
    assert slopes(errors)[0] == pytest.approx(4, abs=0.3)


def test_a_quotient_of_functions():
    """Without derivatives the equation is an approximation in L2."""
    axes = [Axis(name, 0, 1, num_cells=6) for name in "xy"]
    problem = Problem(axes, [Term(lambda x, y: 1 + x * y)], source=lambda x, y: (1 + x * y) / (1 + x + y))
    solution = solve(problem, rank=10, tolerance=1e-9)
    assert error(problem, solution, lambda x, y: 1 / (1 + x + y)) <= 1e-5


def test_one_axis():
    problem = Problem([Axis("t", 0, 1)], [Term(t=derivative(1)), Term()], initial={"t": [Term()]})
    for decomposition in DECOMPOSITIONS:
        solution = solve(problem, decomposition=decomposition)
        assert error(problem, solution, lambda t: (-t).exp()) <= 1e-6


def test_graded_cells_resolve_a_boundary_layer():
    """-eps u'' + u' = 1 + y, whose layer at x = 1 is a tenth as wide as one of the equal cells."""
    eps, num_cells = 2e-3, 40

    def exact(x, y):
        return (1 + y) * (x - (((x - 1) / eps).exp() - math.exp(-1 / eps)) / (1 - math.exp(-1 / eps)))

    errors = []
    for breakpoints in (None, graded_breakpoints(0, 1, num_cells, 1.0, 2e-4)):
        problem = Problem(
            [
                Axis("x", 0, 1, num_cells=num_cells, breakpoints=breakpoints, boundary="dirichlet"),
                Axis("y", 0, 1, num_cells=2, degree=1),
            ],
            [Term(-eps, x=derivative(2)), Term(x=derivative(1))],
            source=[Term(), Term(y=IDENTITY)],
        )
        errors.append(error(problem, solve(problem, rank=3), exact))
    assert errors[1] <= 1e-3
    assert errors[1] < errors[0] / 100


def test_diffusion_that_vanishes_at_one_end_of_its_interval():
    problem = Problem(
        [
            Axis("x", 0, 1, kind="fourier", num_basis=5, boundary="periodic"),
            Axis("t", 0, 1, kind="chebyshev", num_basis=14),
            Axis("nu", 0, 0.05, kind="chebyshev", num_basis=7),
        ],
        [Term(t=derivative(1)), Term(x=derivative(1)), Term(-1.0, nu=IDENTITY, x=derivative(2))],
        initial={"t": [Term(x=multiply(lambda x: (2 * PI * x).sin()))]},
    )
    solution = solve(problem, rank=16, tolerance=1e-8)

    def exact(x, t, nu):
        return (-4 * PI**2 * nu * t).exp() * (2 * PI * (x - t)).sin()

    assert error(problem, solution, exact) <= 1e-4
    points = torch.rand(50, 3, dtype=torch.float64)
    points[:, 2] = 0
    assert (field(problem, solution)(points) - exact(*points.unbind(1))).abs().max() <= 1e-3


def test_pure_transport():
    """u_t + u_x = 0 with an inflow at x = 0."""
    errors = []
    for num_cells in (8, 16):
        problem = Problem(
            [
                Axis("x", 0, 1, num_cells=num_cells, boundary=("dirichlet", "free")),
                Axis("t", 0, 1, num_cells=num_cells),
            ],
            [Term(t=derivative(1)), Term(x=derivative(1))],
            boundary={"x": ([Term(-1.0, t=SINE)], None)},
            initial={"t": [Term(x=SINE)]},
        )
        solution = solve(problem, rank=14, tolerance=1e-8)
        errors.append(error(problem, solution, lambda x, t: (PI * (x - t)).sin()))
    assert slopes(errors)[0] > 3.6
    assert errors[1] < 1e-5


@pytest.mark.parametrize("num_axes", range(3, 9))
def test_many_axes_cost_what_each_one_does(num_axes):
    """A product that the splines hold, of a source of as many terms as axes: N grows by one axis's functions."""
    names = "abcdefgh"[:num_axes]
    bubble = multiply(lambda x: x * (1 - x))
    source = [Term(2.0, **{name: bubble for name in names if name != left}) for left in names]
    problem = poisson(names, source, num_cells=4)
    solution = solve(problem, rank=4, tolerance=1e-8)
    report = solution.report
    assert report.stopped_by == "tolerance"
    assert report.rank <= 2
    assert report.num_sweeps <= 6
    assert report.num_parameters == report.rank * num_axes * problem.axes[0].basis.num_basis
    points = torch.rand(200, num_axes, dtype=torch.float64)
    expected = (points * (1 - points)).prod(1)
    assert close(field(problem, solution)(points), expected, 1e-7)
