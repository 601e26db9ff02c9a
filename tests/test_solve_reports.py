"""What a solve says of itself: that its forms and methods agree, why it stopped, its residual, and what it refuses."""

import math

import pytest
import torch

from sna_core import Axis, Problem, Term, derivative, multiply
from sna_core.assembly import least_squares
from sna_core.discretisation import Discretisation
from sna_core.field import DECOMPOSITIONS
from sna_core.linear import check_determined
from sna_core.solve import METHODS, solve
from tests.test_solve import COS, PI, box, close, error, exact_heat, field, heat, laplacian, poisson

# Forms and methods.


def values(problem, solution, num_points=300):
    points = torch.rand(num_points, len(problem.axes), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    low, high = torch.tensor([[a.low for a in problem.axes], [a.high for a in problem.axes]], dtype=torch.float64)
    return field(problem, solution)(low + (high - low) * points).detach()


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
