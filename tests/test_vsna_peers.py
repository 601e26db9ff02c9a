"""VSNA's peers: AMEn against a dense solve, and networks that keep their conditions and learn the equation."""

import dataclasses
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eval.vsna_peers import (
    NEAR,
    heat_pinn,
    partials,
    pinn_width,
    plume_pinn,
    solve_amen,
    train_pinn,
    uniform_sampler,
)

SIZES = (6, 5, 4)


def second_difference(size):
    """-u'' on [0, 1], zero at both ends."""
    ones = torch.ones(size - 1, dtype=torch.float64)
    return (size + 1) ** 2 * (2 * torch.eye(size, dtype=torch.float64) - ones.diag(1) - ones.diag(-1))


def laplacian(sizes):
    eyes = [torch.eye(size, dtype=torch.float64) for size in sizes]
    return [[second_difference(n) if i == k else eyes[i] for i, n in enumerate(sizes)] for k in range(len(sizes))]


def random_terms(num_terms, *shapes):
    generator = torch.Generator().manual_seed(3)
    return [
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(num_terms)
    ]


def dense(terms):
    """The sum of Kronecker products, in full."""
    total = 0
    for term in terms:
        product = term[0]
        for factor in term[1:]:
            product = torch.kron(product, factor)
        total = total + product
    return total


def full(cores):
    tensor = cores[0]
    for core in cores[1:]:
        tensor = torch.tensordot(tensor, core, 1)
    return tensor.squeeze((0, -1))


def uniform(problem, count=500, dtype=torch.float64):
    sample = uniform_sampler(problem.low, problem.high)
    return sample(count, torch.Generator().manual_seed(1)).to(dtype)


# ---------------------------------------------------------------------------------------------------------------- AMEn


@pytest.mark.torchtt
@pytest.mark.parametrize("preconditioner", ["none", "central", "right"])
def test_amen_solves_poisson_like_a_dense_solver(preconditioner):
    matrices, right = laplacian(SIZES), random_terms(2, *SIZES)
    result = solve_amen(matrices, right, tolerance=1e-10, preconditioner=preconditioner)
    expected = torch.linalg.solve(dense(matrices), dense(right)).view(SIZES)
    torch.testing.assert_close(full(result.cores), expected, rtol=0, atol=1e-9 * expected.abs().max().item())
    assert result.converged
    assert result.seconds > 0
    assert result.operator_ranks == (2, 2)  # of three terms
    assert result.ranks == tuple(core.shape[-1] for core in result.cores[:-1])
    assert result.num_parameters == sum(core.numel() for core in result.cores)
    residual = dense(matrices) @ full(result.cores).flatten() - dense(right)
    assert result.residual == pytest.approx((residual.norm() / dense(right).norm()).item(), rel=0.1, abs=1e-14)


@pytest.mark.torchtt
def test_amen_solves_a_system_without_symmetry_over_four_axes():
    sizes = (4, 3, 5, 4)
    steep = [[matrix + 0.3 * matrix.triu(1) for matrix in term] for term in laplacian(sizes)]
    right = random_terms(3, *sizes)
    result = solve_amen(steep, right, tolerance=1e-9)
    expected = torch.linalg.solve(dense(steep), dense(right)).view(sizes)
    torch.testing.assert_close(full(result.cores), expected, rtol=0, atol=1e-7 * expected.abs().max().item())


@pytest.mark.torchtt
def test_amen_takes_equal_terms_together():
    matrices, right = laplacian(SIZES), random_terms(1, *SIZES)
    result = solve_amen(matrices * 3, right * 3, tolerance=1e-10)
    once = solve_amen(matrices, right, tolerance=1e-10)
    assert result.operator_ranks == once.operator_ranks
    torch.testing.assert_close(full(result.cores), full(once.cores), rtol=1e-7, atol=1e-10)


@pytest.mark.torchtt
def test_amen_says_where_it_stopped_short():
    sizes = (12, 12, 12)
    result = solve_amen(laplacian(sizes), random_terms(8, *sizes), tolerance=1e-10, max_sweeps=1)
    assert not result.converged
    assert 1e-10 < result.residual < 1


@pytest.mark.torchtt
def test_amen_repeats_itself_and_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (solve_amen(laplacian(SIZES), random_terms(2, *SIZES), tolerance=1e-3, seed=7) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.cores, second.cores, strict=True))


@pytest.mark.torchtt
@pytest.mark.parametrize(
    ("matrices", "right", "problem"),
    [
        ([], random_terms(1, *SIZES), "0 terms of the operator"),
        (laplacian(SIZES), [], "and 0 of the right-hand side"),
        (laplacian((3,)), random_terms(1, 3), "at least 2"),
        (laplacian(SIZES), random_terms(1, 6, 5), r"matrices\[0\] has the shapes"),
        (laplacian(SIZES), [*random_terms(1, *SIZES), *random_terms(1, 6, 5, 3)], r"right\[1\] has the shapes"),
        (random_terms(1, (6, 5), (5, 5), (4, 4)), random_terms(1, *SIZES), r"expected \[\(6, 6\)"),
        ([[m / 0 for m in term] for term in laplacian(SIZES)], random_terms(1, *SIZES), "not finite"),
        (laplacian(SIZES), [[torch.zeros(n) for n in SIZES]], "right-hand side is zero"),
        (laplacian(SIZES), [[torch.ones(n) * sign for n in SIZES] for sign in (1, -1)], "right-hand side is zero"),
    ],
)
def test_amen_refuses_what_is_no_system(matrices, right, problem):
    with pytest.raises(ValueError, match=problem):
        solve_amen(matrices, right)


@pytest.mark.torchtt
def test_amen_never_calls_a_singular_system_solved():
    right = [[torch.ones(n) for n in SIZES]]
    with pytest.raises(ValueError, match="singular"):
        solve_amen([[torch.zeros(n, n) for n in SIZES]], right)
    insulated = laplacian(SIZES)  # constants are in its null space, and the right-hand side is one
    for k, term in enumerate(insulated):
        term[k] = term[k] - term[k].sum(0).diag()
    assert not solve_amen(insulated, right).converged


@pytest.mark.torchtt
def test_amen_knows_its_preconditioners():
    with pytest.raises(ValueError, match="none, central, right"):
        solve_amen(laplacian(SIZES), random_terms(1, *SIZES), preconditioner="left")


def test_amen_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtt", None)
    with pytest.raises(ImportError, match="pip install -e"):
        solve_amen(laplacian(SIZES), random_terms(1, *SIZES))


# ------------------------------------------------------------------------------------------------------------ networks


@given(num_inputs=st.integers(1, 8), num_layers=st.integers(1, 5), num_parameters=st.integers(2500, 200_000))
def test_width_comes_within_a_twentieth_of_the_budget(num_inputs, num_layers, num_parameters):
    def count(width):
        layers = [torch.nn.Linear(num_inputs, width, device="meta")]
        layers += [torch.nn.Linear(width, width, device="meta")] * (num_layers - 1)
        layers += [torch.nn.Linear(width, 1, device="meta")]
        return sum(parameter.numel() for layer in layers for parameter in layer.parameters())

    width = pinn_width(num_inputs, num_layers, num_parameters)
    error = abs(count(width) - num_parameters)
    assert error <= 0.05 * num_parameters
    assert error <= min(abs(count(w) - num_parameters) for w in (width - 1, width + 1))


def test_width_refuses_a_budget_below_the_smallest_network():
    assert pinn_width(3, 4, 12) == 1
    with pytest.raises(ValueError, match="the smallest such network has 12"):
        pinn_width(3, 4, 11)
    with pytest.raises(ValueError, match="at least 1 of each"):
        pinn_width(3, 0, 100)


@pytest.fixture(scope="module")
def heat():
    return train_pinn(heat_pinn(), num_parameters=600, num_layers=3, num_steps=300, num_points=256, progress=False)


def heat_exact(points):
    x, t, nu = points.unbind(-1)
    return (math.pi * x).sin() * (-nu * math.pi**2 * t).exp()


def test_a_network_learns_heat(heat):
    points = uniform(heat.problem)
    error = (heat(points) - heat_exact(points)).norm() / heat_exact(points).norm()
    assert error < 5e-3
    assert heat.loss < 1e-3 * heat.start_loss
    assert 300 <= heat.num_steps <= 500
    assert heat.seconds > 0
    assert heat.num_parameters == sum(p.numel() for p in heat.network.parameters())
    assert abs(heat.num_parameters - 600) <= 30


def test_heat_keeps_its_conditions(heat):
    points = uniform(heat.problem, dtype=torch.float32)
    start, low, high = points.clone(), points.clone(), points.clone()
    start[:, 1], low[:, 0], high[:, 0] = 0, 0, 1
    assert torch.equal(heat(start), (math.pi * start[:, 0]).sin())
    assert torch.equal(heat(low), torch.zeros(len(low)))
    torch.testing.assert_close(heat(high), torch.zeros(len(high)), rtol=0, atol=1e-6)  # of sin(pi) in float32


def test_a_network_of_the_plume_keeps_its_conditions():
    problem = plume_pinn()
    result = train_pinn(problem, num_parameters=2000, num_steps=12, num_points=64, dtype=torch.float64, progress=False)
    assert result.loss < result.start_loss
    assert result.network[0].weight.dtype == torch.float64
    assert abs(result.num_parameters - 2000) <= 100
    points = uniform(problem)
    for axis in range(3):
        for end in (0.0, 1.0):
            wall = points.clone()
            wall[:, axis] = end
            assert result(wall).abs().max() < 1e-15
    points[:, 3] = 0
    centre = torch.tensor([0.5, 0.65, 0.5])
    gaussian = torch.exp(-(points[:, :3] - centre).square().sum(-1) / (2 * 0.07**2))
    torch.testing.assert_close(result(points), gaussian, rtol=0, atol=4e-6)
    peak = torch.tensor([[0.5, 0.65, 0.5, 0.0, 1.0, 0.005]], dtype=torch.float64)
    assert result(peak).item() == pytest.approx(1, abs=4e-6)


def residual_of(problem, field, points):
    points = points.requires_grad_()
    return problem.residual(points, field(points)).detach()


def test_residuals_vanish_on_solutions():
    heat = heat_pinn()
    assert residual_of(heat, heat_exact, uniform(heat)).abs().max() < 1e-12

    def free_plume(points):  # without walls the Gaussian turns and spreads
        x, y, z = (points[:, :3] - 0.5).unbind(-1)
        t, omega, diffusivity = points[:, 3:].unbind(-1)
        x, y = x + 0.15 * (omega * t).sin(), y - 0.15 * (omega * t).cos()
        square = 0.07**2 + 2 * diffusivity * t
        return square**-1.5 * torch.exp(-(x**2 + y**2 + z**2) / (2 * square))

    plume = plume_pinn()
    scale = residual_of(plume, lambda points: free_plume(points) * (1 + points[:, 3]), uniform(plume)).abs().max()
    assert residual_of(plume, free_plume, uniform(plume)).abs().max() < 1e-12 * scale


def test_points_of_the_plume_are_inside_and_half_of_them_near():
    problem = plume_pinn()
    points = problem.sample(4000, torch.Generator().manual_seed(0))
    low, high = (torch.tensor(end, dtype=torch.float64) for end in (problem.low, problem.high))
    assert ((points >= low) & (points <= high)).all()
    for axis in (3, 4, 5):  # as even as any
        middle = (low[axis] + high[axis]) / 2
        assert (points[:, axis] < middle).double().mean().item() == pytest.approx(0.5, abs=0.05)

    def near(points):
        angle = points[:, 3] * points[:, 4]
        centre = 0.5 + torch.stack([-0.15 * angle.sin(), 0.15 * angle.cos(), torch.zeros_like(angle)], -1)
        spread = NEAR * (0.07**2 + 2 * points[:, 3] * points[:, 5]).sqrt()
        return ((points[:, :3] - centre).norm(dim=-1) < 2 * spread).double().mean().item()

    of_gaussian = math.erf(2**0.5) - (8 / math.pi) ** 0.5 * math.exp(-2)  # in a ball of two deviations
    expected = (of_gaussian + near(uniform(problem, 4000))) / 2
    assert near(points) == pytest.approx(expected, abs=0.04)


def test_partials_are_derivatives_at_each_point():
    points = uniform(heat_pinn(), 20).requires_grad_()
    found = partials(points[:, 0] ** 2 * points[:, 1], points)
    expected = torch.stack([2 * points[:, 0] * points[:, 1], points[:, 0] ** 2, torch.zeros(20)], -1)
    torch.testing.assert_close(found, expected)


def test_other_initial_heat():
    problem = heat_pinn(lambda x: x * (1 - x), nu=(0.1, 0.2))
    assert (problem.low[2], problem.high[2]) == (0.1, 0.2)
    points = uniform(problem)
    points[:, 1] = 0
    torch.testing.assert_close(problem.lift(points), points[:, 0] * (1 - points[:, 0]))


def test_training_keeps_to_a_time_and_repeats_itself():
    options = {"num_parameters": 200, "num_layers": 2, "num_points": 32, "progress": False}
    assert 0.2 <= train_pinn(heat_pinn(), seconds=0.2, **options).seconds < 2
    before = torch.get_rng_state()
    first, second = (train_pinn(heat_pinn(), num_steps=20, seed=4, **options) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    points = uniform(heat_pinn())
    assert torch.equal(first(points), second(points))
    assert not torch.equal(first(points), train_pinn(heat_pinn(), num_steps=20, seed=5, **options)(points))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "give one of the two"),
        ({"num_steps": 5, "seconds": 1.0}, "give one of the two"),
        ({"num_steps": 0}, "must be positive"),
        ({"num_steps": 5, "num_parameters": 3}, "num_parameters is 3"),
    ],
)
def test_training_refuses_what_it_cannot_do(options, problem):
    with pytest.raises(ValueError, match=problem):
        train_pinn(heat_pinn(), **{"num_parameters": 500, "progress": False} | options)


def test_training_stops_where_the_loss_is_not_finite():
    broken = dataclasses.replace(heat_pinn(), residual=lambda points, u: u / 0)
    with pytest.raises(ValueError, match="learning_rate"):
        train_pinn(broken, num_parameters=500, num_steps=3, num_points=16, progress=False)
