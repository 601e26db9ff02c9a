"""Solutions of whole problems: convergence rates, exact and independent references, and what a report says."""

import math
from functools import reduce
from itertools import pairwise

import pytest
import torch

from sna_core import Axis, Problem, Term, derivative, graded_breakpoints, multiply
from sna_core.assembly import least_squares
from sna_core.discretisation import Discretisation
from sna_core.field import DECOMPOSITIONS, SeparableField, gauss
from sna_core.linear import check_determined
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


# Forms and methods.


def values(problem, solution, num_points=300):
    points = torch.rand(num_points, len(problem.axes), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    low, high = torch.tensor([[a.low for a in problem.axes], [a.high for a in problem.axes]], dtype=torch.float64)
    return field(problem, solution)(low + (high - low) * points).detach()


def close(found, expected, tolerance):
    return ((found - expected).norm() / expected.norm()).item() <= tolerance


@pytest.mark.parametrize("num_basis", [3, 7])
def test_all_forms_hold_the_same_field(num_basis):
    """A frame of data and solution may fill an axis of few functions."""
    problem = heat(num_basis=num_basis)
    solutions = [solve(problem, decomposition=form, rank=14, tolerance=1e-8) for form in DECOMPOSITIONS]
    expected = values(problem, solutions[0])
    for form, solution in zip(DECOMPOSITIONS, solutions, strict=True):
        assert solution.decomposition == form
        assert close(values(problem, solution), expected, 1e-6)
        assert solution.report.residual == pytest.approx(solutions[0].report.residual, rel=1e-3)
        tensors = [*solution.factors, *solution.frames, *solution.cores]
        assert solution.report.num_parameters == sum(tensor.numel() for tensor in tensors)
        assert all(tensor.dtype == torch.float64 and tensor.isfinite().all() for tensor in tensors)


def test_components_agree_with_the_train():
    problem = heat(num_cells=5, num_basis=4)
    train = solve(problem, decomposition="tensor_train", tolerance=1e-9)
    grown = solve(problem, method="components", rank=10, tolerance=1e-9)
    assert grown.report.residual == pytest.approx(train.report.residual, rel=0.05)
    assert close(values(problem, grown), values(problem, train), 2e-3)
    with pytest.raises(ValueError, match="makes no tensor train"):
        solve(problem, method="components", decomposition="tensor_train")


def test_galerkin_and_least_squares_agree():
    problem = poisson("xyz", lambda x, y, z: (x + 2 * y * z).exp(), num_cells=4)
    options = {"decomposition": "tensor_train", "tolerance": 1e-5}
    one, other = (solve(problem, method=method, **options) for method in ("galerkin", "least_squares"))
    assert close(values(problem, one), values(problem, other), 1e-2)


@pytest.mark.parametrize("form", DECOMPOSITIONS)
def test_seeds_reproduce(form):
    problem = heat(num_cells=4, num_basis=4)

    def run(seed):
        return solve(problem, decomposition=form, rank=4, generator=torch.Generator().manual_seed(seed))

    first, second, other = run(3), run(3), run(4)
    for name in ("factors", "frames", "cores"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(first, name), getattr(second, name), strict=True))
    assert torch.equal(first.report.residual_history, second.report.residual_history)
    assert torch.equal(solve(problem, rank=4).factors[0], solve(problem, rank=4).factors[0])
    assert close(values(problem, other), values(problem, first), 1e-2)


# Reports.


def test_why_a_solve_stops():
    problem = heat()
    met = solve(problem, rank=12, tolerance=0.05).report
    assert (met.stopped_by, met.converged) == ("tolerance", True)
    assert met.residual <= 0.05
    limit = solve(problem, rank=12, tolerance=1e-9).report
    assert (limit.stopped_by, limit.converged) == ("stagnation", True)
    assert 1e-9 < limit.residual < met.residual
    assert "limit of these axes" in limit.message
    short = solve(problem, rank=2, tolerance=1e-9).report
    assert (short.stopped_by, short.converged) == ("rank", False)
    assert "raise the rank" in short.message
    ended = solve(problem, rank=12, tolerance=1e-9, max_sweeps=1).report
    assert (ended.stopped_by, ended.converged) == ("max_sweeps", False)
    for report in (met, limit, short, ended):
        assert len(report.residual_history) == report.num_sweeps
        assert math.isfinite(report.residual)
        assert report.rank <= 12
        assert report.num_newton_steps == 1
        assert report.seconds > 0
    assert met.num_sweeps < limit.num_sweeps


def test_ranks_that_skip_a_cut_are_not_the_limit():
    """Two cuts that leave the ranks as they are say nothing of the next, at which the residual falls tenfold."""
    problem = heat(num_cells=16, degree=4)
    solution = solve(problem, rank=14, tolerance=1e-9)
    assert solution.report.residual <= 3e-5
    assert error(problem, solution, exact_heat) <= 1e-6


@pytest.mark.parametrize("form", DECOMPOSITIONS)
@pytest.mark.parametrize("rank", [2, 3])
def test_too_small_a_rank_says_so(form, rank):
    problem = heat()
    solution = solve(problem, decomposition=form, rank=rank, tolerance=1e-9)
    report = solution.report
    assert (report.stopped_by, report.converged, report.rank) == ("rank", False, rank)
    tensors = [*solution.factors, *solution.frames, *solution.cores]
    assert all(tensor.isfinite().all() for tensor in tensors)
    assert error(problem, solution, exact_heat) < {2: 0.1, 3: 5e-3}[rank]


def test_a_rank_that_the_data_use_up_raises():
    for form in DECOMPOSITIONS:
        with pytest.raises(ValueError, match="rank = 1, of which boundary and initial data take 1; give at least 2"):
            solve(heat(), decomposition=form, rank=1)


@torch.no_grad()
def residual_norm(problem, solution, operator, source):
    points, weights = box(problem)
    with torch.enable_grad():
        points = points.requires_grad_()
        left = operator(field(problem, solution)(points), points) - source(*points.unbind(1))
    return (weights * left.square()).sum().sqrt().item()


def gradient(values, points):
    return torch.autograd.grad(values.sum(), points, create_graph=True)[0].unbind(1)


@pytest.mark.parametrize("form", DECOMPOSITIONS)
@pytest.mark.parametrize("rank", [2, 12])
def test_the_reported_residual_is_that_of_the_field(form, rank):
    """By autograd through the field that is returned, data included, however much its rank cuts off."""
    problem = heat(num_cells=4, num_basis=4)
    solution = solve(problem, decomposition=form, rank=rank, tolerance=1e-9)

    def operator(u, points):
        u_x, u_t, _ = gradient(u, points)
        return u_t - points[:, 2] * gradient(u_x, points)[0]

    norm = residual_norm(problem, solution, operator, lambda x, t, nu: 0 * x)
    # Relative to what the initial data leave of the equation: nu pi^2 sin(pi x), constant in time.
    scale = PI**2 * math.sqrt(0.5 * (0.3**3 - 0.1**3) / 3)
    assert solution.report.residual * scale == pytest.approx(norm, rel=0.03)
    assert solution.report.equation_residual == solution.report.residual


@pytest.mark.parametrize("form", DECOMPOSITIONS)
def test_the_equation_residual_of_galerkins_solution(form):
    problem = poisson(source=lambda x, y: (x * y).exp())
    solution = solve(problem, decomposition=form, rank=10, tolerance=1e-7)

    def operator(u, points):
        u_x, u_y = gradient(u, points)
        return -gradient(u_x, points)[0] - gradient(u_y, points)[1]

    norm = residual_norm(problem, solution, operator, lambda x, y: (x * y).exp())
    points, weights = box(problem)
    scale = (weights * (2 * points.prod(1)).exp()).sum().sqrt().item()
    assert solution.report.equation_residual * scale == pytest.approx(norm, rel=1e-4)
    assert solution.report.residual < 1e-3 * solution.report.equation_residual


def test_steps_are_told():
    seen = []
    solution = solve(heat(num_cells=4), rank=3, on_step=lambda stage, value: seen.append((stage, value)))
    stages = [stage for stage, _ in seen]
    assert "order of axes" in stages
    told = [value for stage, value in seen if stage.startswith("train")]
    assert told == solution.report.residual_history.tolist()
    assert all(math.isfinite(value) for _, value in seen)


# What cannot be solved.


@pytest.mark.parametrize("boundary", ["neumann", "periodic"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_axes", [2, 5])
def test_a_singular_operator_raises(boundary, method, num_axes):
    names = "xyzab"[:num_axes]
    problem = poisson(names, source=[Term(x=multiply(lambda x: (2 * PI * x).cos()))], boundary=boundary, num_cells=6)
    with pytest.raises(
        ValueError, match=r"(the equations are singular|the form is not positive).* an axis a 'dirichlet'"
    ):
        solve(problem, method=method)


def test_resonance_raises():
    """-lap u - 5 pi^2 u has the eigenfunctions sin(pi x) sin(2 pi y) and the other way round."""
    options = {"kind": "chebyshev", "num_basis": 20, "boundary": "dirichlet"}
    problem = Problem([Axis(n, 0, 1, **options) for n in "xy"], [*laplacian("xy"), Term(-5 * PI**2)], source=[Term()])
    with pytest.raises(ValueError, match="singular"):
        solve(problem)


def test_many_axes_of_fine_cells_are_not_singular():
    """Their largest eigenvalues are far from the smallest, which is as it should be."""
    names = [f"x{i}" for i in range(10)]
    problem = poisson(names, [], num_cells=40)
    form, _ = least_squares(Discretisation(problem))
    check_determined(form, names)
    free = poisson(names, [], num_cells=40, boundary="neumann")
    with pytest.raises(ValueError, match="singular"):
        check_determined(least_squares(Discretisation(free))[0], names)


def test_incompatible_data_raise():
    axes = [Axis("x", 0, 1, boundary="dirichlet"), Axis("t", 0, 1)]
    problem = Problem(axes, [Term(t=derivative(1)), *laplacian("x")], initial={"t": [Term(x=COS)]})
    with pytest.raises(ValueError, match="incompatible data"):
        solve(problem)


def test_nothing_to_solve():
    """No source and no data."""
    for method in METHODS:
        solution = solve(poisson(source=[]), rank=2, method=method)
        assert solution.report.converged
        assert all(factor.isfinite().all() for factor in solution.factors)
        assert values(poisson(), solution).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decomposition": "parafac"}, "decomposition = 'parafac'; expected one of"),
        ({"method": "collocation"}, "method = 'collocation'; expected one of"),
        ({"tolerance": -1}, "tolerance = -1; expected a number of at least 0"),
        ({"tolerance": math.nan}, "tolerance = nan"),
        ({"max_sweeps": 0}, "max_sweeps = 0"),
        ({"rank": -2}, "rank = -2"),
        ({"rank": 0}, "rank = 0, of which .* take 1; give at least 2"),
        ({"method": "galerkin"}, "Galerkin's form takes second derivatives"),
    ],
)
def test_bad_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        solve(heat(), **options)
