import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from sna_core.inversion import invert, level_set
from sna_core.network import CPNetwork
from sna_core.prior import GaussianPrior

UNIT_SQUARE = ([0.0, 0.0], [1.0, 1.0])


def linear(matrix):
    """f(x) = A x."""
    matrix = torch.tensor(matrix, dtype=torch.float64)
    return lambda x: (x @ matrix.mT, matrix.expand(len(x), *matrix.shape))


def differentiable(f):
    """A function of one point (d,) -> (O,) with its Jacobian by autograd."""
    return lambda x: (torch.vmap(f)(x), torch.vmap(torch.func.jacrev(f))(x))


def random_network(num_inputs, num_outputs, rank, seed, low=0.0, high=1.0):
    torch.manual_seed(seed)
    net = CPNetwork(
        num_inputs,
        num_outputs,
        rank=rank,
        num_cells=5,
        unit_weights=True,
        low=low,
        high=high,
        dtype=torch.float64,
    ).requires_grad_(False)

    return net, net.value_and_gradient  # which raises outside of the box


circle = differentiable(lambda x: x.square().sum(-1, keepdim=True))
parabola = differentiable(lambda x: (x - 0.3).square())


@pytest.mark.parametrize("num_outputs", [1, 2, 3])
def test_linear_equations_take_the_shortest_step_in_box_widths(num_outputs):
    matrix = np.random.default_rng(0).normal(size=(num_outputs, 5))
    low, width = np.array([0.0, -1, 2, 0, 0]), np.array([1.0, 2, 0.5, 10, 1])
    start = low + width * 0.5
    offset = width * (np.linalg.pinv(matrix * width) @ np.full(num_outputs, 0.1))
    assert (np.abs(offset / width) < 0.5).all()  # inside of the box
    found = invert(
        linear(matrix),
        low,
        low + width,
        matrix @ start + 0.1,
        starts=torch.tensor(start)[None],
        scale=1.0,
        tolerance=1e-12,
    )
    assert found.converged.tolist() == [True]
    np.testing.assert_allclose(found.x[0], start + offset, atol=1e-10)
    assert found.num_starts == 1


def test_finds_both_roots_of_a_parabola_once():
    found = invert(parabola, [0.0], [1.0], 0.04)
    assert found.solutions[:, 0].sort().values.tolist() == pytest.approx([0.1, 0.5], abs=1e-7)
    assert found.converged.all()  # the merged starts leave no second copy
    double = invert(parabola, [0.0], [1.0], 0.0)
    assert double.solutions[:, 0].tolist() == pytest.approx([0.3], abs=1e-3)
    assert len(double.solutions) == 1


def test_finds_all_four_intersections_of_two_curves():
    def ellipses(x):
        return torch.stack([x[0] ** 2 / 4 + x[1] ** 2, x[0] ** 2 + x[1] ** 2 / 4])

    found = invert(differentiable(ellipses), [-3.0, -3.0], [3.0, 3.0], [1.0, 1.0])
    root = math.sqrt(0.8)
    expected = [[-root, -root], [-root, root], [root, -root], [root, root]]
    solutions = sorted(found.solutions.tolist())
    np.testing.assert_allclose(solutions, expected, atol=1e-6)


def test_an_overdetermined_system_is_solved_where_it_is_consistent():
    matrix = [[1.0, 2.0], [3.0, -1.0], [1.0, 1.0]]
    consistent = np.array(matrix) @ [0.2, 0.7]
    np.testing.assert_allclose(invert(linear(matrix), *UNIT_SQUARE, consistent).solutions, [[0.2, 0.7]], atol=1e-6)
    inconsistent = invert(linear(matrix), *UNIT_SQUARE, [*consistent[:2], consistent[2] + 0.1])
    assert not inconsistent.converged.any()


def test_equal_equations_do_not_break_the_system():
    found = invert(linear([[1.0, 1.0], [1.0, 1.0]]), *UNIT_SQUARE, [0.8, 0.8])
    assert found.converged.all()
    torch.testing.assert_close(found.solutions.sum(-1), torch.full((len(found.x),), 0.8, dtype=torch.float64))


def test_inputs_on_a_face_are_held_and_the_others_take_over():
    start = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    found = invert(linear([[1.0, 0.5]]), *UNIT_SQUARE, 1.25, starts=start)
    assert found.converged.all()
    torch.testing.assert_close(found.x, torch.tensor([[1.0, 0.5]], dtype=torch.float64), atol=1e-7, rtol=0)
    corner = invert(linear([[1.0, 0.5], [0.0, 1.0]]), *UNIT_SQUARE, [1.5, 1.0], starts=start)
    torch.testing.assert_close(corner.solutions, torch.ones(1, 2, dtype=torch.float64), atol=1e-7, rtol=0)


def test_a_target_out_of_reach_is_told_with_the_nearest_miss():
    found = invert(circle, *UNIT_SQUARE, 3.0, scale=2.0)
    assert not found.converged.any()
    assert found.solutions.shape == (0, 2)
    assert found.residual[0].item() == pytest.approx(0.5)  # in the far corner f = 2
    assert (found.residual.diff() >= 0).all()
    assert not invert(circle, *UNIT_SQUARE, [-0.1]).converged.any()
    assert len(level_set(circle, *UNIT_SQUARE, 3.0, 10).x) == 0


@settings(max_examples=40, deadline=None)
@given(
    num_inputs=st.integers(1, 6),
    num_outputs=st.integers(1, 3),
    rank=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    stretch=st.floats(-0.3, 1.3),
    fixes=st.booleans(),
    with_prior=st.booleans(),
)
def test_what_is_reported_holds_on_random_networks(num_inputs, num_outputs, rank, seed, stretch, fixes, with_prior):
    low = torch.linspace(-2, 1, num_inputs, dtype=torch.float64)
    high = low + torch.logspace(-2, 2, num_inputs, dtype=torch.float64)
    net, function = random_network(num_inputs, num_outputs, rank, seed, low.tolist(), high.tolist())
    y = net((low + (high - low) * torch.rand(200, num_inputs, dtype=torch.float64)).clamp(low, high))
    scale = y.amax(0) - y.amin(0)
    target = y.amin(0) + stretch * scale  # beyond the range of the samples, too
    fixed = {0: 0.7 * low[0].item() + 0.3 * high[0].item()} if fixes else None
    prior = GaussianPrior.independent(low, high - low) if with_prior else None
    found = invert(function, low, high, target, scale=scale, fixed=fixed, prior=prior, num_starts=8, max_iterations=20)
    assert ((found.x >= low) & (found.x <= high)).all()
    torch.testing.assert_close(found.prediction, net(found.x))
    residual = ((net(found.x) - target).abs() / scale).amax(-1)
    torch.testing.assert_close(found.residual, residual, atol=1e-12, rtol=1e-9)
    assert (residual[found.converged] <= 1e-8 + 1e-14).all()
    if prior is None:
        assert (residual[~found.converged] > 1e-8 - 1e-14).all()
    assert (found.converged.int().diff() <= 0).all()  # the converged ones first
    if fixes:
        assert (found.x[:, 0] == fixed[0]).all()
    apart = torch.cdist(found.x / (high - low), found.x / (high - low), p=math.inf)
    assert (apart + torch.eye(len(apart)) >= 1e-3).all()


def test_every_reachable_value_of_a_khronos_is_reached():
    net, function = random_network(8, 1, 4, seed=0)
    y = net(torch.rand(2000, 8, dtype=torch.float64))
    for level in (0.05, 0.5, 0.95):
        found = invert(function, [0.0] * 8, [1.0] * 8, y.quantile(level), scale=y.max() - y.min())
        assert len(found.solutions) >= 40
        assert found.num_iterations <= 25


def test_several_outputs_and_free_ones():
    _, function = random_network(6, 3, 4, seed=1)
    x = torch.full((1, 6), 0.4, dtype=torch.float64)
    target = function(x)[0][0]
    both = invert(function, [0.0] * 6, [1.0] * 6, target)
    assert both.converged.any()
    torch.testing.assert_close(
        both.prediction[both.converged], target.expand(len(both.solutions), 3), atol=1e-6, rtol=0
    )

    target[1] = math.nan
    free = invert(function, [0.0] * 6, [1.0] * 6, target)
    reached = free.prediction[free.converged]
    torch.testing.assert_close(reached[:, [0, 2]], target[[0, 2]].expand(len(reached), 2), atol=1e-6, rtol=0)
    assert reached[:, 1].std() > 1e-3


def test_fixed_inputs_stay_and_starts_take_them_over():
    found = invert(circle, *UNIT_SQUARE, 1.0, fixed={1: 0.6})
    np.testing.assert_allclose(found.solutions, [[0.8, 0.6]], atol=1e-7)
    start = torch.tensor([[0.5, 0.1]], dtype=torch.float64)
    found = invert(circle, *UNIT_SQUARE, 1.0, fixed={1: 0.6}, starts=start)
    np.testing.assert_allclose(found.solutions, [[0.8, 0.6]], atol=1e-7)
    everything = {0: 0.8, 1: 0.6}
    assert invert(circle, *UNIT_SQUARE, 1.0, fixed=everything).converged.tolist() == [True]
    assert invert(circle, *UNIT_SQUARE, 1.1, fixed=everything).converged.tolist() == [False]


def test_the_map_of_linear_equations_has_a_closed_form():
    rng = np.random.default_rng(1)
    matrix, factor, mean = rng.normal(size=(2, 5)), rng.normal(size=(5, 5)), rng.normal(size=5) * 0.1
    covariance = factor @ factor.T + 0.1 * np.eye(5)
    target = np.array([0.3, -0.2])
    gain = covariance @ matrix.T @ np.linalg.inv(matrix @ covariance @ matrix.T)
    expected = mean + gain @ (target - matrix @ mean)
    prior = GaussianPrior(torch.tensor(mean), torch.tensor(np.linalg.inv(covariance)))
    found = invert(linear(matrix), [-9.0] * 5, [9.0] * 5, target, prior=prior, num_starts=8, scale=1.0)
    assert len(found.solutions) == 1  # every start goes there
    np.testing.assert_allclose(found.solutions[0], expected, atol=1e-5)
    offset = expected - mean
    distance = math.sqrt(offset @ np.linalg.inv(covariance) @ offset)
    assert found.distance[0].item() == pytest.approx(distance, rel=1e-6)


def test_the_map_at_a_face_equals_a_constrained_minimisation():
    _, function = random_network(4, 1, 3, seed=0)
    mean, std = np.array([1.2, -0.1, 0.5, 0.4]), np.array([0.15, 0.3, 0.2, 1.0])
    target = function(torch.full((1, 4), 0.6, dtype=torch.float64))[0][0]
    prior = GaussianPrior.independent(mean, std)
    found = invert(function, [0.0] * 4, [1.0] * 4, target, prior=prior, scale=1.0)

    assert found.converged[0]
    x = found.x[0].numpy()
    assert x[:2].tolist() == [1.0, 0.0]
    assert (found.distance[found.converged].diff() >= 0).all()

    def call(x):
        return [t[0, 0].numpy() for t in function(torch.tensor(x).clamp(0, 1)[None])]

    best = minimize(
        lambda x: (((x - mean) / std) ** 2).sum(),
        (x + np.array([-0.03, 0.03, 0.02, -0.02])).clip(0, 1),
        jac=lambda x: 2 * (x - mean) / std**2,
        method="SLSQP",
        bounds=[(0, 1)] * 4,
        constraints={"type": "eq", "fun": lambda x: call(x)[0] - target.item(), "jac": lambda x: call(x)[1]},
        options={"ftol": 1e-12},
    )
    assert best.success
    assert found.distance[0].item() == pytest.approx(math.sqrt(best.fun), rel=1e-6)
    np.testing.assert_allclose(x, best.x, atol=1e-5)
    others = invert(function, [0.0] * 4, [1.0] * 4, target, scale=1.0, num_starts=1000).solutions
    assert (prior.distance(others) >= found.distance[0] - 1e-6).all()


def test_the_map_is_no_saddle_and_no_farthest_point():
    def ellipse(x):
        return (x[0] ** 2 / 4 + x[1] ** 2).unsqueeze(0)

    prior = GaussianPrior.independent([0.3, 0.0], [1.0, 1.0])
    found = invert(differentiable(ellipse), [-3.0, -3.0], [3.0, 3.0], 1.0, prior=prior)
    expected = [[0.4, -math.sqrt(0.96)], [0.4, math.sqrt(0.96)]]  # (-2, 0) and (2, 0) are stationary, too
    np.testing.assert_allclose(sorted(found.solutions.tolist(), key=lambda x: x[1]), expected, atol=1e-6)


@pytest.mark.parametrize("std", [1e4, 1.0, 1e-3, 1e-5, 1e-8])
def test_a_narrow_prior_finds_the_same_point(std):
    prior = GaussianPrior.independent([0.2, 0.9, 0.5], [std] * 3)
    found = invert(linear([[1.0, 1.0, 1.0]]), [0.0] * 3, [1.0] * 3, 1.0, prior=prior, scale=1.0)
    assert found.converged.all()
    np.testing.assert_allclose(found.x, [[0.0, 0.7, 0.3]], atol=1e-6)


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_the_map_does_not_depend_on_the_units(size):
    """A box and a prior of any size, the prior a thousand times as wide in one input as in the other."""
    std = np.array([1.0, 1e-3]) * size
    prior = GaussianPrior.independent(np.array([0.6, 0.2]) * size, std)
    found = invert(linear([[1.0, 1.0]]), [0.0, 0.0], [size, size], size, prior=prior)
    gain = std**2 / (std**2).sum()
    assert found.converged.all()
    np.testing.assert_allclose(found.x / size, [np.array([0.6, 0.2]) + gain * 0.2], atol=1e-6)


def test_every_point_is_the_map_where_all_are_as_near():
    prior = GaussianPrior.independent([0.0, 0.0], [1.0, 1.0])
    found = invert(circle, [-1.0, -1.0], [1.0, 1.0], 0.25, prior=prior)
    assert len(found.x) > 50
    assert found.converged.all()


def test_a_circle_is_covered_evenly():
    found = level_set(circle, [-1.0, -1.0], [1.0, 1.0], 0.49, 40)
    assert found.x.shape == (40, 2)
    torch.testing.assert_close(found.x.norm(dim=-1), torch.full((40,), 0.7, dtype=torch.float64), atol=1e-7, rtol=0)
    assert (found.residual <= 1e-8).all()
    angles = torch.atan2(found.x[:, 1], found.x[:, 0]).sort().values
    gaps = torch.cat([angles.diff(), angles[:1] + 2 * math.pi - angles[-1:]])
    assert gaps.max() < 2.5 * (2 * math.pi / 40)
    assert gaps.min() > 0.3 * (2 * math.pi / 40)


def test_a_level_set_of_single_points_has_no_more():
    for num_points in (2, 20):
        found = level_set(parabola, [0.0], [1.0], 0.04, num_points)
        assert found.x[:, 0].sort().values.tolist() == pytest.approx([0.1, 0.5], abs=1e-7)
        assert len(found.residual) == 2


def test_same_starts_every_time_and_others_by_a_generator():
    first, second = (invert(circle, *UNIT_SQUARE, 0.5) for _ in range(2))
    assert torch.equal(first.x, second.x)
    seeded = [invert(circle, *UNIT_SQUARE, 0.5, generator=torch.Generator().manual_seed(s)).x for s in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])
    assert not torch.equal(seeded[0], first.x)


def test_residuals_do_not_depend_on_the_unit_of_the_output():
    scaled = [invert(linear([[factor, factor]]), *UNIT_SQUARE, 0.7 * factor) for factor in (1e-6, 1.0, 1e6)]
    for found in scaled:
        assert found.converged.all()
        torch.testing.assert_close(found.x, scaled[1].x, atol=1e-7, rtol=0)


def test_a_function_that_is_not_finite_somewhere_loses_those_starts_only():
    root = differentiable(lambda x: (x - 0.5).sqrt())
    found = invert(root, [0.0], [1.0], 0.5, num_starts=16, scale=1.0)
    assert found.solutions[:, 0].tolist() == pytest.approx([0.75])
    assert (found.residual[~found.converged] == math.inf).all()


def test_points_without_a_value_do_not_count_for_the_scale():
    root = differentiable(lambda x: 1e-9 * (x - 0.5).sqrt())
    found = invert(root, [0.0], [1.0], 0.5e-9, num_starts=16)
    assert found.solutions[:, 0].tolist() == pytest.approx([0.75])
    nowhere = differentiable(lambda x: (x - 2).sqrt())
    assert not invert(nowhere, [0.0], [1.0], 0.5).converged.any()


def test_a_constant_has_no_scale_but_its_unit():
    net, function = random_network(3, 1, 4, seed=0)
    net.factors.fill_(0.7)
    value = 4 * 0.7**3
    samples = function(torch.rand(64, 3, dtype=torch.float64))[0]
    assert 0 < samples.max() - samples.min() < 1e-14  # rounding
    assert invert(function, [0.0] * 3, [1.0] * 3, value).converged.all()
    assert invert(function, [0.0] * 3, [1.0] * 3, value + 0.5).residual[0].item() == pytest.approx(0.5)


def test_flat_functions_end_at_once():
    constant = linear([[0.0, 0.0]])
    assert not invert(constant, *UNIT_SQUARE, 1.0).converged.any()
    assert invert(constant, *UNIT_SQUARE, 0.0).converged.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": [1.0, 2.0]}, "one target for each output"),
        ({"target": math.inf}, "expected numbers"),
        ({"target": math.nan}, "at least one"),
        ({"fixed": {0: 1.5}}, r"fixed input 0 = 1.5 lies outside its interval \[0, 1\]"),
        ({"fixed": {2: 0.5}}, "expected an integer from 0 to 1"),
        ({"num_starts": 0}, "num_starts = 0"),
        ({"tolerance": 0.0}, "tolerance = 0.0"),
        ({"max_iterations": 0}, "max_iterations = 0"),
        ({"scale": 0.0}, "scale = "),
        ({"scale": [1.0, 1.0]}, "scale = "),
        ({"high": [1.0, 0.0]}, "low < high"),
        ({"high": [1.0]}, "shapes"),
        ({"starts": torch.tensor([[0.5, 0.5], [0.5, 2.0]])}, r"starts\[1, 1\] = 2 lies outside"),
        ({"starts": torch.tensor([[0.5, math.nan]])}, r"starts\[0, 1\] = nan lies outside"),
        ({"starts": torch.rand(3, 3)}, "starts have shape"),
        ({"prior": GaussianPrior.independent([0.0], [1.0])}, "the prior has 1 inputs and the box 2"),
    ],
)
def test_bad_input(options, message):
    options = {"low": [0.0, 0.0], "high": [1.0, 1.0], "target": 0.5, **options}
    with pytest.raises(ValueError, match=message):
        invert(circle, **options)


def test_bad_priors_and_counts():
    for std in ([0.0, 1.0], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="above 0"):
            GaussianPrior.independent([0.0, 0.0], std)
    for mean, precision, message in [
        ([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]], "positive definite"),
        ([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]], "symmetric"),
        ([0.0, math.inf], [[1.0, 0.0], [0.0, 1.0]], "not finite"),
        ([0.0], [[1.0, 0.0], [0.0, 1.0]], r"expected \(d,\) and \(d, d\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            GaussianPrior(torch.tensor(mean), torch.tensor(precision))
    with pytest.raises(ValueError, match="num_points = 0"):
        level_set(circle, *UNIT_SQUARE, 0.5, 0)
