"""Newton's steps for products of the unknown: Burgers' equation against Cole and Hopf, and a reaction."""

import math

import pytest
import torch

from leviathan import VsnaConfig, VsnaModel
from sna_core import Axis, Problem, Product, Term, derivative, multiply
from sna_core.solve import solve
from training.vsna_references import burgers_initial, viscous_burgers

PI = math.pi
CONVECTION = Product(Term(), Term(x=derivative(1)))


def burgers(num_cells, viscosity=(0.2, 0.4)):
    return Problem(
        [
            Axis("x", -1, 1, num_cells=num_cells, boundary="dirichlet"),
            Axis("t", 0, 0.5, num_cells=num_cells // 2),
            Axis("nu", *viscosity, kind="chebyshev", num_basis=3),
        ],
        [Term(t=derivative(1)), Term(-1.0, nu=multiply(lambda nu: nu), x=derivative(2))],
        nonlinear=[CONVECTION],
        initial={"t": [Term(x=multiply(burgers_initial))]},
    )


def points(problem, num_points=400):
    share = torch.rand(num_points, len(problem.axes), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = torch.tensor([[a.low for a in problem.axes], [a.high for a in problem.axes]], dtype=torch.float64)
    return low + (high - low) * share


def solved(problem, rank=16, **options):
    model = VsnaModel(VsnaConfig.for_problem(problem, rank=rank))
    report = model.solve(problem, progress=False, **options)
    return model, report


def test_burgers_against_cole_and_hopf():
    residuals, errors = [], []
    for num_cells in (6, 10):
        problem = burgers(num_cells)
        model, report = solved(problem)
        x = points(problem)
        exact = viscous_burgers(x)
        assert report.converged
        assert 2 <= report.num_newton_steps <= 8
        assert report.num_sweeps == len(report.residual_history)
        residuals.append(report.residual)
        errors.append(((model(x) - exact).norm() / exact.norm()).item())
    assert residuals[1] < residuals[0] / 1.5
    assert errors[1] < errors[0] / 3
    assert errors[1] < 2e-3


def test_the_residual_is_that_of_the_nonlinear_equation():
    """By autograd, in a field of one viscosity."""
    nu = 0.2
    problem = Problem(
        [Axis("x", -1, 1, num_cells=12, boundary="dirichlet"), Axis("t", 0, 0.5, num_cells=6)],
        [Term(t=derivative(1)), Term(-nu, x=derivative(2))],
        nonlinear=[CONVECTION],
        initial={"t": [Term(x=multiply(burgers_initial))]},
    )
    model, report = solved(problem)
    axes = [axis.basis.quadrature(8) for axis in problem.axes]
    grid = torch.cartesian_prod(*[x for x, _ in axes]).requires_grad_()
    weights = torch.cartesian_prod(*[w for _, w in axes]).prod(1)
    u = model(grid)
    u_x, u_t = torch.autograd.grad(u.sum(), grid, create_graph=True)[0].unbind(1)
    u_xx = torch.autograd.grad(u_x.sum(), grid)[0][:, 0]
    norm = (weights * (u_t + u * u_x - nu * u_xx).square()).sum().sqrt().item()
    # Relative to the largest term of the problem's own operator at the initial data, nu pi^2 sin(pi x) for all times.
    scale = nu * PI**2 * math.sqrt(0.5)
    assert report.residual * scale == pytest.approx(norm, rel=0.02)


def reaction(num_cells):
    """-lap u + u^2 = f for u = sin(pi x) sin(pi y)."""

    def source(x, y):
        u = (PI * x).sin() * (PI * y).sin()
        return 2 * PI**2 * u + u**2

    return Problem(
        [Axis(name, 0, 1, num_cells=num_cells, boundary="dirichlet") for name in "xy"],
        [Term(-1.0, **{name: derivative(2)}) for name in "xy"],
        nonlinear=[Product(Term(), Term())],
        source=source,
    )


def test_a_reaction_converges_at_the_rate_of_a_linear_problem():
    errors = []
    for num_cells in (6, 12):
        model, report = solved(reaction(num_cells), tolerance=1e-8)
        assert report.converged
        x = points(reaction(num_cells))
        exact = (PI * x).sin().prod(1)
        errors.append(((model(x) - exact).norm() / exact.norm()).item())
    assert math.log2(errors[0] / errors[1]) > 3.5


def test_forms_agree_and_seeds_reproduce():
    problem = reaction(6)
    x = points(problem)
    found = [solved(problem, seed=seed)[0](x) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)
    train = VsnaModel(VsnaConfig.for_problem(problem, rank=16, decomposition="tensor_train"))
    assert train.solve(problem, progress=False).num_newton_steps > 1
    torch.testing.assert_close(train(x), found[0], rtol=1e-4, atol=1e-4)


def test_an_equation_without_a_solution_does_not_claim_one():
    """-u'' + 50 u^2 = -50 has no real solution."""
    problem = Problem(
        [Axis("x", 0, 1, num_cells=8, boundary="dirichlet"), Axis("y", 0, 1, num_cells=1, degree=0)],
        [Term(-1.0, x=derivative(2))],
        nonlinear=[Product(Term(50.0), Term())],
        source=[Term(-50.0)],
    )
    report = solve(problem).report
    assert not report.converged
    assert report.stopped_by == "newton"
    assert math.isfinite(report.residual)


def test_methods_for_linear_problems_raise():
    for method in ("galerkin", "components"):
        with pytest.raises(ValueError, match=f"method = '{method}' takes linear problems"):
            solve(burgers(8), method=method)
