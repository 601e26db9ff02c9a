"""Alternating least squares: exact blocks, the penalty of the docstring, and fits of what can be known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sna_core.als import _Alternation, fit
from sna_core.banded import factorise, solve_banded
from sna_core.laplace import laplace_factor, relative_std
from sna_core.network import CPNetwork
from sna_core.normal_equations import (
    DAMPING,
    Points,
    block_equations,
    block_penalty,
    flat,
    smoothness_matrix,
    tangent_equations,
    tangent_penalty,
    unflat,
)


def network(num_inputs=3, num_outputs=1, **options):
    options = {"rank": 2, "num_cells": 5, "degree": 2, "unit_weights": True, "dtype": torch.float64, **options}
    return CPNetwork(num_inputs, num_outputs, **options)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def data(net, num_points=60):
    low, high = torch.tensor(net.low, dtype=torch.float64), torch.tensor(net.high, dtype=torch.float64)
    x = low + (high - low) * torch.rand(num_points, net.num_inputs, dtype=torch.float64)
    return x, torch.randn(num_points, net.num_outputs, dtype=torch.float64)


def standardised(y):
    return (y - y.mean(0)) / y.std(0)


def design(net, x):
    """d f_o / d factors as a matrix of points and flat factors, by autograd: (outputs, points, size)."""
    jacobian = torch.autograd.functional.jacobian(
        lambda factors: torch.func.functional_call(net, {"factors": factors}, (x,)), net.factors.detach()
    )
    rows = [jacobian[:, o, :, :, o].flatten(1) for o in range(net.num_outputs)]
    return torch.stack(rows)


def tensor_norm_matrix(net, norm):
    """The penalty over the full tensor of coefficients: T^T (M x M x M) T, with T the tangent of the tensor."""

    def full(factors):
        components = factors[0]
        for factor in factors[1:]:
            components = torch.einsum("...or,bor->...bor", components, factor)
        return components.sum(-1)  # (basis, ..., basis, outputs)

    jacobian = torch.autograd.functional.jacobian(full, net.factors.detach())
    kron = norm
    for _ in range(net.num_inputs - 1):
        kron = torch.kron(kron, norm)
    result = []
    for o in range(net.num_outputs):
        tangent = jacobian.select(net.num_inputs, o)[..., o, :].reshape(len(kron), -1)
        result.append(tangent.mT @ kron @ tangent)
    return torch.stack(result)


@pytest.mark.parametrize("degree", [0, 1, 3])
@pytest.mark.parametrize("memory", [2**28, 3000])
def test_normal_equations_equal_those_of_the_design_matrix(degree, memory):
    net = network(num_outputs=2, degree=degree, low=[-1, 0, 2], high=[1, 3, 2.5])
    x, y = data(net)
    weight = torch.rand(len(x), dtype=torch.float64)
    points, factors = Points(net.splines, x, y, weight, memory), net.factors.detach()
    chunks, full = points.chunks(100), design(net, x)
    assert (len(chunks) > 1) == (memory == 3000)
    gram, right = tangent_equations(points, factors)
    torch.testing.assert_close(gram, full.mT @ (weight[:, None] * full))
    torch.testing.assert_close(right, full.mT @ (weight[:, None] * y.mT.unsqueeze(-1)))
    torch.testing.assert_close(full @ flat(factors) / 3, net(x).detach().mT.unsqueeze(-1))  # homogeneous in the factors
    size = factors.shape[1] * net.rank
    for i in range(3):
        block = slice(i * size, (i + 1) * size)
        ours = block_equations(chunks, factors, i)
        torch.testing.assert_close(ours[0], gram[:, block, block])
        torch.testing.assert_close(ours[1], right[:, block])
    torch.testing.assert_close(unflat(flat(factors), factors), factors)
    squares = (weight[:, None] * (net(x).detach() - y).square()).sum(0)
    torch.testing.assert_close(points.squares(factors), squares)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_the_penalty_is_the_norm_of_f(degree):
    net = network(num_outputs=2, num_cells=3, degree=degree)
    norm, factors = smoothness_matrix(net.splines[0], 0.3), net.factors.detach()
    expected = tensor_norm_matrix(net, norm)
    ours = tangent_penalty(factors, norm)
    torch.testing.assert_close(ours, expected, rtol=2 * DAMPING, atol=2 * DAMPING * expected.abs().max().item())
    size = factors.shape[1] * net.rank
    for i in range(3):
        block = slice(i * size, (i + 1) * size)
        torch.testing.assert_close(block_penalty(factors, norm, i), ours[:, block, block])


def test_the_smoothness_matrix_is_the_integral():
    spline = network(degree=3).splines[0]
    nodes, weights = spline.quadrature(6)
    coefficients = torch.randn(spline.num_basis, dtype=torch.float64)
    psi = [spline.dense(nodes, order) @ coefficients for order in range(3)]
    expected = weights @ (psi[0] ** 2 + 0.7 * (psi[1] ** 2 + psi[2] ** 2))
    torch.testing.assert_close(coefficients @ smoothness_matrix(spline, 0.7) @ coefficients, expected)
    wide = network(degree=3, low=-3.0, high=5.0).splines[0]  # of the scaled input: the unit of x does not matter
    torch.testing.assert_close(smoothness_matrix(wide, 0.7), smoothness_matrix(spline, 0.7))


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 2**31))
def test_banded_solve_equals_the_dense_one(size, block_size, seed):
    lower = torch.randn(2, size, size, dtype=torch.float64, generator=generator(seed)).tril()
    row_block = torch.arange(size) // block_size
    lower = torch.where(row_block[:, None] - row_block <= 1, lower, 0.0) + 3 * torch.eye(size)
    lower = torch.where(row_block[:, None] == row_block, lower, lower * (row_block[:, None] - row_block == 1))
    matrix = lower @ lower.mT
    right = torch.randn(2, size, 3, dtype=torch.float64, generator=generator(seed))
    torch.testing.assert_close(solve_banded(matrix, right, block_size), torch.linalg.solve(matrix, right))


def test_matrices_that_rounding_left_indefinite_are_factorised():
    vectors = torch.linalg.qr(torch.randn(2, 8, 8, dtype=torch.float64))[0]
    values = torch.logspace(-20, 0, 8, dtype=torch.float64)
    matrices = vectors @ (values.unsqueeze(-1) * vectors.mT)
    lower = factorise(matrices)
    torch.testing.assert_close(lower @ lower.mT, matrices, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="ill-conditioned"):
        factorise(-matrices)


@pytest.mark.parametrize(("degree", "num_cells", "smoothness"), [(3, 100, 0.1), (2, 64, 10.0), (5, 64, 1.0)])
def test_many_cells_and_a_strong_penalty_are_solved(degree, num_cells, smoothness):
    net = network(degree=degree, num_cells=num_cells)
    x, y = data(net, 80)
    fit(net, x, y, smoothness=smoothness, generator=generator(), num_restarts=2, max_sweeps=18)
    assert net(x).isfinite().all()


def test_the_fit_is_at_its_minimum():
    """More steps at the ridge that is reported change little, and so the ridge is that of the factors."""
    for seed in range(5):
        net = network(4, rank=2, num_cells=3)
        x, _ = data(net, 60)
        y = standardised((3 * x[:, :1]).sin() + torch.randn(60, 1, dtype=torch.float64))
        result = fit(net, x, y, generator=generator(seed))
        assert result.converged
        again = _Alternation(Points(net.splines, x, y, None, 2**28), 0.1, net.factors.detach(), result.ridge)
        before = again._objective_of(again.factors)
        for _ in range(20):
            again.sweep()
        assert again.objective > 0.98 * before


def test_restarts_are_compared_at_a_given_ridge():
    net = network(rank=2)
    x, _ = data(net, 200)
    y = standardised((5 * x[:, :1] * x[:, 1:2]).sin() + x[:, 2:] ** 2)
    errors = [
        fit(network(rank=2), x, y, ridge=1e-6, num_restarts=n, generator=generator(3), max_sweeps=15).objective[-1]
        for n in (1, 16)
    ]
    assert errors[1] < errors[0]


def test_degrees_of_freedom_are_at_most_those_of_the_class():
    net = network(rank=2, num_cells=2)
    x, y = data(net, 300)
    result = fit(net, x, y, ridge=1e-13, generator=generator())
    parameters = net.factors.numel() - (net.num_inputs - 1) * net.rank  # the sizes are shared
    assert parameters - 1e-2 < result.degrees_of_freedom.item() < parameters + 1e-2


@pytest.mark.parametrize("num_cells", [2, 30])  # solved whole, and by the band
def test_the_objective_never_rises_at_a_given_ridge(num_cells, monkeypatch):
    monkeypatch.setattr("sna_core.als.NEWTON_UP_TO", 0)
    net = network(num_cells=num_cells)
    x, _ = data(net, 400)
    y = standardised((5 * x[:, :1] * x[:, 1:2]).sin() + x[:, 2:] ** 2)
    result = fit(net, x, y, ridge=1e-4, num_restarts=1, generator=generator(), max_sweeps=40, tolerance=0)
    assert len(result.objective) == result.num_sweeps == 40
    assert (result.objective.diff() <= 1e-9 * result.objective[:-1]).all()


@pytest.mark.parametrize(("newton_up_to", "tolerance"), [(0, 1e-2), (1200, 1e-4)])
def test_a_function_of_the_class_is_recovered(newton_up_to, tolerance, monkeypatch):
    monkeypatch.setattr("sna_core.als.NEWTON_UP_TO", newton_up_to)
    torch.manual_seed(1)
    truth = network(num_outputs=2, rank=2)
    net = network(num_outputs=2, rank=2)
    x, _ = data(truth, 2000)
    y = truth(x).detach()
    fit(net, x, y, ridge=1e-13, generator=generator(), max_sweeps=300, num_restarts=12, tolerance=1e-8)
    fresh, _ = data(truth, 500)
    error = (net(fresh) - truth(fresh)).square().mean(0).sqrt()
    assert (error < tolerance * y.std(0)).all()


def test_linear_regression_with_one_input_is_ridge_regression():
    net = CPNetwork(1, rank=1, num_cells=6, degree=3, unit_weights=True, dtype=torch.float64)
    x, y = data(net, 50)
    fit(net, x, y, ridge=1e-2, smoothness=0.2, generator=generator())
    basis = net.splines[0].dense(x[:, 0])
    penalty = smoothness_matrix(net.splines[0], 0.2)
    exact = torch.linalg.solve(basis.mT @ basis + 50 * 1e-2 * (1 + DAMPING) * penalty, basis.mT @ y)
    torch.testing.assert_close(net.factors.detach()[0, :, 0], exact, rtol=1e-6, atol=1e-7)


def test_cross_validation_finds_the_noise():
    net = network(rank=3, num_cells=6, degree=3)
    x, _ = data(net, 600)
    clean = standardised((3 * x[:, :1]).sin() * (1 + x[:, 1:2]) + x[:, 2:])
    y = clean + 0.3 * torch.randn_like(clean)
    result = fit(net, x, y, generator=generator())
    assert result.converged
    assert 0.25 < result.noise.item() < 0.35
    assert (net(x) - clean).square().mean().sqrt() < 0.12  # of the points' own noise of 0.3
    assert 5 < result.degrees_of_freedom.item() < 60


def test_weights_are_repetitions_and_zero_leaves_out():
    x, y = data(network(), 40)
    weight = torch.randint(0, 3, (40,)).double()
    factors = []
    for inputs in (
        (x, y, weight),
        (x.repeat_interleave(weight.long(), 0), y.repeat_interleave(weight.long(), 0), None),
    ):
        net = network()
        fit(net, *inputs[:2], sample_weight=inputs[2], generator=generator(), ridge=1e-2)
        factors.append(net.factors.detach())
    torch.testing.assert_close(*factors, rtol=1e-6, atol=1e-8)


def test_little_memory_gives_the_same_fit():
    x, y = data(network(), 300)
    results = []
    for memory in (2**28, 30_000):
        net = network()
        fit(net, x, y, generator=generator(), max_memory=memory, max_sweeps=30)
        results.append(net(x))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_validation_keeps_the_best_sweep():
    net = network(rank=4, num_cells=10)
    x, y = data(net, 300)
    clean = standardised(x[:, :1] + x[:, 1:2])
    noisy = clean + y
    training, held_out = (x[:150], noisy[:150]), (x[150:], noisy[150:])
    result = fit(net, *training, ridge=1e-9, validation=held_out, patience=3, generator=generator())
    measured = (net(x[150:]) - noisy[150:]).square().mean(0).sqrt()
    torch.testing.assert_close(result.validation_rmse, measured.detach())
    patient = network(rank=4, num_cells=10)
    later = fit(patient, *training, ridge=1e-9, validation=held_out, patience=40, generator=generator())
    assert later.num_sweeps > result.num_sweeps
    assert later.validation_rmse <= result.validation_rmse


def test_float32_factors_are_fitted_in_float64():
    x, _ = data(network(), 200)
    y = standardised(x[:, :1] * x[:, 1:2])
    single, double = network(dtype=torch.float32), network()
    for net, inputs in ((single, (x.float(), y.float())), (double, (x, y))):
        fit(net, *inputs, ridge=1e-4, generator=generator())
    torch.testing.assert_close(single(x.float()), double(x).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(9, 1)}, "expected \\(points, 3\\)"),
        ({"y": torch.zeros(10, 2)}, "expected \\(points, 1\\)"),
        ({"y": torch.full((10, 1), torch.nan)}, r"y\[0, 0\] = nan is not finite"),
        ({"x": torch.full((10, 3), 2.0, dtype=torch.float64)}, "outside input 0's interval"),
        ({"x": torch.full((10, 3), torch.nan, dtype=torch.float64)}, "not a number"),
        ({"sample_weight": -torch.ones(10)}, "at least 0"),
        ({"sample_weight": torch.zeros(10)}, "not all of them 0"),
        ({"x": torch.zeros(10, 3, dtype=torch.long)}, "floating-point"),
        ({"validation": (torch.rand(4, 3, dtype=torch.float64), torch.zeros(4, 2))}, "validation data has shape"),
        ({"ridge": 0.0}, "expected a positive number"),
        ({"max_sweeps": 0}, "max_sweeps = 0; expected a number of at least 1"),
        ({"smoothness": -1.0}, "smoothness = -1.0"),
        ({"x": torch.rand(0, 3, dtype=torch.float64), "y": torch.zeros(0, 1)}, "at least one point"),
    ],
)
def test_bad_input_is_refused(change, message):
    inputs = {"x": torch.rand(10, 3, dtype=torch.float64), "y": torch.zeros(10, 1), **change}
    with pytest.raises(ValueError, match=message):
        fit(network(), **inputs)


def test_a_network_with_weights_is_refused():
    with pytest.raises(ValueError, match="unit weights"):
        fit(CPNetwork(2, rank=2, num_cells=2), torch.rand(5, 2), torch.rand(5, 1))


def test_a_constant_target_is_that_constant():
    net = network()
    x, _ = data(net)
    fit(net, x, torch.zeros(len(x), 1), generator=generator())
    assert net(x).abs().max() < 1e-6


def test_the_covariance_is_that_of_linear_regression():
    """With one input f is linear in its factors, and the posterior is exact."""
    net = CPNetwork(1, rank=1, num_cells=6, degree=3, unit_weights=True, dtype=torch.float64)
    x, _ = data(net, 50)
    factor = laplace_factor(net, x, torch.tensor([1e-3]), 0.2)
    basis, penalty = net.splines[0].dense(x[:, 0]), smoothness_matrix(net.splines[0], 0.2)
    covariance = torch.linalg.inv(basis.mT @ basis + 50 * 1e-3 * (1 + DAMPING) * penalty)
    fresh, _ = data(net, 20)
    rows = net.splines[0].dense(fresh[:, 0])
    expected = ((rows @ covariance) * rows).sum(-1, keepdim=True).sqrt()
    torch.testing.assert_close(relative_std(net, factor, fresh), expected, rtol=1e-6, atol=0)


def test_a_function_that_is_zero_has_no_uncertainty():
    net = network(num_outputs=2)
    x, y = data(net)
    y[:, 0] = 0
    result = fit(net, x, y, generator=generator())
    std = relative_std(net, laplace_factor(net, x, result.ridge, 0.1), x)
    assert (std[:, 0] == 0).all()
    assert (std[:, 1] > 0).all()


def test_sizes_passed_on_between_factors_do_not_count_as_uncertain():
    net = network(num_outputs=2)
    x, _ = data(net, 200)
    factor = laplace_factor(net, x, torch.tensor([1e-4, 1e-4]), 0.1)
    before = relative_std(net, factor, x)
    with torch.no_grad():
        net.factors[0, ..., 0] *= 10
        net.factors[1, ..., 0] /= 10
    after = relative_std(net, laplace_factor(net, x, torch.tensor([1e-4, 1e-4]), 0.1), x)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-6)
    assert before.min() > 0
    assert before.max() < 2
