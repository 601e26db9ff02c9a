import math

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from torch import nn

from sna_core.network import ACTIVATIONS, CPNetwork, pairwise_product

VARIANTS = {
    "one output": {},
    "own components": {"num_outputs": 3},
    "shared components": {"num_outputs": 3, "shared_components": True},
    "unit weights": {"num_outputs": 3, "unit_weights": True},
    "activation": {"num_outputs": 2, "activation": "tanh"},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def network(**options):
    torch.manual_seed(0)
    options = {"rank": 4, "num_cells": 6, "low": [0, -1, 2], "high": [1, 3, 2.5], "dtype": torch.float64, **options}
    return CPNetwork(3, **options)


def points(net, *shape):
    """Random points in the box, its two extreme corners among them."""
    low, high = torch.tensor(net.low), torch.tensor(net.high)
    fractions = torch.rand(math.prod(shape), net.num_inputs)
    fractions[0], fractions[-1] = 0.0, 1.0
    x = low + (high - low) * fractions
    return x.clamp(low, high).reshape(*shape, net.num_inputs).to(net.factors.dtype)


def fit(net, x, y, num_steps):
    """L-BFGS on the mean squared error; returns the root mean squared error."""
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=num_steps, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = (net(x) - y).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    return (net(x) - y).square().mean().sqrt().item()


@pytest.mark.parametrize("degree", range(6))
def test_equals_the_formula_of_the_paper(degree):
    net = network(num_outputs=2, degree=degree)
    x = points(net, 20)
    alpha, c = net.factors.detach().numpy(), net.weights.detach().numpy()
    expected = np.zeros((20, 2))
    for n in range(20):
        for o in range(2):
            for j in range(net.rank):
                term = c[o, j]
                for i, spline in enumerate(net.splines):
                    psi = BSpline(spline.knots().numpy(), alpha[i, :, o, j], degree)
                    term *= psi(x[n, i].item())
                expected[n, o] += term
    np.testing.assert_allclose(net(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fast_path_equals_the_oracle(options, dtype):
    net = network(**options, dtype=dtype)
    with torch.no_grad():  # factors of every sign, and sub-atoms that are zero everywhere
        net.factors -= 1.0
        net.factors[0, ..., 0] = 0.0
        net.factors[1:, ..., 1] = 0.0
    x = points(net, 5, 4).requires_grad_()
    cotangent = torch.randn(5, 4, net.num_outputs, dtype=dtype)
    results = []
    for forward in (net, net.reference_forward):
        y = forward(x)
        results.append([y, *torch.autograd.grad(y, [x, *net.parameters()], cotangent)])
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    for ours, oracle in zip(*results, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=tolerance, atol=tolerance)


@each_variant
def test_shapes(options):
    net = network(**options)
    for shape in [(), (1,), (7,), (2, 3)]:
        x = points(net, *shape)
        assert net(x).shape == (*shape, net.num_outputs)
    assert net(points(net, 4)[:0]).shape == (0, net.num_outputs)
    x = points(net, 6)
    torch.testing.assert_close(net(x)[2], net(x[2]))


@each_variant
def test_gradcheck_twice(options):
    net = network(**options, degree=5, num_cells=2)
    x = points(net, 4)[1:3].requires_grad_()

    def f(x, *parameters):
        named = dict(zip(net.state_dict(), parameters, strict=True))
        return torch.func.functional_call(net, named, (x,), {"check": False})

    inputs = (x, *net.parameters())
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_subatoms_give_the_gradient_in_closed_form():
    net = network(num_outputs=2)
    x = points(net, 10).requires_grad_()
    psi, slope = net.subatoms(x), net.subatoms(x, 1)
    assert psi.shape == (3, 10, 2, net.rank)
    for o in range(2):
        (expected,) = torch.autograd.grad(net(x)[:, o].sum(), x)
        for i in range(3):
            others = torch.stack([slope[k] if k == i else psi[k] for k in range(3)]).prod(0)[:, o]
            torch.testing.assert_close(others @ net.weights[o], expected[:, i])


@pytest.mark.parametrize("num_factors", [1, 2, 3, 5, 8, 13])
def test_pairwise_product_and_its_gradient_where_factors_are_zero(num_factors):
    factors = torch.randn(num_factors, 4, dtype=torch.float64)
    factors[0, 1] = 0.0
    factors[[0, -1], 2] = 0.0
    factors.requires_grad_()
    product = pairwise_product(factors)
    (gradient,) = torch.autograd.grad(product.sum(), factors)
    for i in range(num_factors):
        others = torch.cat([factors[:i], factors[i + 1 :]]).prod(0)
        torch.testing.assert_close(gradient[i], others)
    torch.testing.assert_close(product, factors.prod(0))


@pytest.mark.parametrize("num_inputs", [2, 8, 32, 128])
@pytest.mark.parametrize("unit_weights", [False, True])
@pytest.mark.parametrize("rank", [1, 64])
def test_outputs_at_the_start_neither_vanish_nor_explode(num_inputs, unit_weights, rank):
    torch.manual_seed(0)
    options = {"rank": rank, "num_cells": 8, "unit_weights": unit_weights}
    nets = [CPNetwork(num_inputs, 4096 // rank, **options) for _ in range(4)]
    y = torch.cat([net(torch.rand(16, num_inputs)) for net in nets], -1)
    assert y.isfinite().all()
    assert 0.7 < y.var().item() < 1.3 * math.e
    assert abs(y.mean().item()) < 0.5
    across = y.var(0).mean().item()  # over the box, not only between draws
    assert across > 0.1


def test_fits_a_function_of_rank_two_by_gradient():
    net = network(rank=2, num_cells=12, low=0.0, high=1.0)
    x = torch.rand(1500, 3, dtype=torch.float64)
    y = torch.sin(3 * x[:, 0]) * x[:, 1].exp() * (1 + x[:, 2]) + x[:, 0] ** 2 * torch.cos(2 * x[:, 1]) / (1 + x[:, 2])
    assert fit(net, x, y[:, None], num_steps=500) < 2e-3 * y.std().item()


def test_error_falls_with_rank_where_the_target_is_not_separable():
    x = torch.rand(600, 2, dtype=torch.float64)
    y = 1 / (1 + 10 * (x[:, :1] - x[:, 1:]) ** 2)
    errors = []
    for rank in (1, 2, 4):
        torch.manual_seed(0)
        errors.append(fit(CPNetwork(2, rank=rank, num_cells=8, dtype=torch.float64), x, y, num_steps=150))
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"unit_weights": True}, 4 * (3 * 9)),  # KHRONOS: rank * sum of num_cells + degree
        ({}, 4 * (3 * 9) + 4),
        ({"num_outputs": 5}, 5 * (4 * (3 * 9) + 4)),
        ({"num_outputs": 5, "shared_components": True}, 4 * (3 * 9) + 5 * 4),
    ],
)
def test_parameter_count(options, expected):
    assert sum(p.numel() for p in network(**options).parameters()) == expected


@each_variant
def test_state_dict_restores_the_function(options):
    net, other = network(**options), network(**options)
    other.reset_parameters()
    x = points(net, 9)
    assert not torch.equal(net(x), other(x))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x))
    assert set(net.state_dict()) == {"factors"} | ({"weights"} if net.weights is not None else set())


def test_activations():
    x = points(network(), 9)
    plain = network()(x)
    for name, function in ACTIVATIONS.items():
        torch.testing.assert_close(network(activation=name)(x), function(plain))
    torch.testing.assert_close(network(activation=torch.sin)(x), plain.sin())
    assert sum(p.numel() for p in network(activation=nn.PReLU()).parameters()) == 4 * 27 + 4 + 1
    assert "activation=tanh" in repr(network(activation="tanh"))


def test_compiles_to_one_graph():
    net = network(num_outputs=2)
    x = points(net, 16)
    compiled = torch.compile(lambda x: net(x, check=False), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))


def test_can_be_built_without_memory_and_filled_later():
    with torch.device("meta"):
        net = network()
    net = net.to_empty(device="cpu")
    net.load_state_dict(network().state_dict())
    x = points(net, 9)
    assert torch.equal(net(x), network()(x))


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (
            3,
            1,
            3.7,
            r"x\[3, 1\] = 3\.7 lies outside input 1's interval \[-1, 3\]; rescale the column or widen `high`\.",
        ),
        (0, 2, 1.0, r"x\[0, 2\] = 1 lies outside input 2's interval \[2, 2\.5\]; rescale the column or lower `low`\."),
        (2, 0, float("nan"), r"x\[2, 0\] = nan is not a number"),
        (2, 0, float("-inf"), r"x\[2, 0\] = -inf lies outside"),
    ],
)
def test_points_outside_raise(row, column, value, message):
    net = network()
    x = points(net, 5)
    x[row, column] = value
    for forward in (net, net.subatoms):
        with pytest.raises(ValueError, match=message):
            forward(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: network()(torch.rand(5, 2).double()), r"x has shape \(5, 2\); expected \(\.\.\., 3\)"),
        (lambda: network()(torch.tensor(0.5).double()), r"x has shape \(\)"),
        (lambda: network()(torch.rand(5, 3)), r"x\.to\(torch\.float64\)"),
        (lambda: network()(torch.ones(5, 3, dtype=torch.int64)), r"x\.to\(torch\.float64\)"),
        (lambda: network().subatoms(points(network(), 2), -1), "derivative = -1"),
        (lambda: network(rank=0), "rank = 0; expected an integer of at least 1"),
        (lambda: network(num_outputs=0), "num_outputs = 0"),
        (lambda: CPNetwork(0, rank=1, num_cells=1), "num_inputs = 0"),
        (lambda: network(num_cells=0), "num_cells = 0"),
        (lambda: network(degree=6), "degree = 6"),
        (lambda: network(low=[0, 1]), "low has 2 values for 3 inputs"),
        (lambda: network(high=[1, -1, 3]), "low < high"),
        (lambda: network(activation="swish"), "activation = 'swish'; expected None, a callable or one of"),
        (lambda: network(num_outputs=2, shared_components=True, unit_weights=True), "all 2 outputs equal"),
    ],
)
def test_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_blocks_of_points_change_neither_values_nor_gradients_nor_errors(monkeypatch):
    network = CPNetwork(3, 2, rank=4, num_cells=5, dtype=torch.float64)
    x = torch.rand(5, 7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 7, 2, dtype=torch.float64)
    whole = network(x)
    expected = torch.autograd.grad((whole * weight).sum(), [x, *network.parameters()])
    monkeypatch.setattr("sna_core.network.BLOCK_NUMEL", 4 * 3 * 2 * 4)  # four points
    parts, rows = [], network._evaluate
    monkeypatch.setattr(network, "_evaluate", lambda points: parts.append(len(points)) or rows(points))
    blocks = network(x)
    assert parts == [4] * 8 + [3]
    torch.testing.assert_close(blocks, whole)
    found = torch.autograd.grad((blocks * weight).sum(), [x, *network.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    outside = x.detach().clone()
    outside[4, 2, 1] = 1.5
    with pytest.raises(ValueError, match=r"x\[4, 2, 1\] = 1.5 lies outside input 1's interval"):
        network(outside)
    assert network(x[:0]).shape == (0, 7, 2)


@pytest.mark.parametrize("options", [v for k, v in VARIANTS.items() if k != "activation"])
@pytest.mark.parametrize("degree", [1, 3])
def test_derivatives_in_closed_form_equal_autograd(options, degree):
    net = network(**options, degree=degree)
    with torch.no_grad():
        net.factors[1, ..., 0] = 0.0  # a component that is zero everywhere
    x = points(net, 4, 3)
    inside = x[1:3].reshape(-1, 3)
    jacobian = torch.stack([torch.autograd.functional.jacobian(net, point) for point in inside])
    values, gradient = net.value_and_gradient(inside)
    torch.testing.assert_close(values, net(inside))
    torch.testing.assert_close(gradient, jacobian)
    for o in range(net.num_outputs):
        expected = torch.stack([torch.autograd.functional.hessian(lambda p, o=o: net(p)[o], p) for p in inside])
        torch.testing.assert_close(net.hessian(inside)[:, o], expected)
    assert net.gradient(x).shape == (4, 3, net.num_outputs, 3)
    assert net.hessian(x).shape == (4, 3, net.num_outputs, 3, 3)


def test_derivatives_by_blocks_equal_those_at_once(monkeypatch):
    net = network(num_outputs=2)
    x = points(net, 50)
    expected = net.gradient(x), net.hessian(x)
    monkeypatch.setattr("sna_core.network.BLOCK_NUMEL", 300)
    torch.testing.assert_close((net.gradient(x), net.hessian(x)), expected)


def test_derivatives_behind_an_activation_are_refused():
    net = network(activation="tanh")
    with pytest.raises(ValueError, match="activation=None"):
        net.gradient(points(net, 2))
