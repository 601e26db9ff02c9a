"""Cross approximation: known ranks come back, errors are those that are stated, and what does not compress says so."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sna_core.cross import chebyshev_coefficients, chebyshev_nodes, separate
from sna_core.spectral import ChebyshevBasis

CENTER = (0.3, -0.2, 0.1, 0.4)


def error_at_random_points(separable, function, num_points=5000):
    """Relative to the largest value: at points of its own."""
    d = len(separable.low)
    generator = torch.Generator().manual_seed(7)
    unit = torch.rand(num_points, d, dtype=torch.float64, generator=generator)
    low, high = torch.tensor(separable.low).double(), torch.tensor(separable.high).double()
    points = low + (high - low) * unit
    values = function(*points.unbind(-1))
    return ((separable(points) - values).abs().max() / values.abs().max()).item()


def inverse(*x):
    return 1 / (1 + sum(x))


def ellipse(x, y):
    u, v = 0.8 * x + 0.6 * y, 0.8 * y - 0.6 * x
    return torch.exp(-4 * u**2 - 40 * v**2)


def laser(x, y, s):
    return torch.exp(-2 * (x**2 + y**2) ** s)


def rank_one(*x):
    return torch.stack([torch.exp(c * x_i) * torch.cos(x_i + c) for c, x_i in zip(CENTER, x, strict=False)]).prod(0)


@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_a_product_is_one_term(d):
    separable = separate(rank_one, [-1.0] * d, [2.0] * d, tolerance=1e-12)
    assert separable.rank == 1
    assert separable.error <= 1e-12
    assert error_at_random_points(separable, rank_one) <= 1e-12


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_size_of_the_values_does_not_matter(d):
    for size in (1e-30, 1e30):
        separable = separate(lambda *x, size=size: size * (2 + sum(x)).sin(), [0.0] * d, [1.0] * d)
        assert separable.rank <= d
        assert error_at_random_points(separable, lambda *x, size=size: size * (2 + sum(x)).sin()) <= 1e-8


def test_a_function_that_is_zero():
    separable = separate(lambda x, y: 0 * x * y, [0.0, 0.0], [1.0, 1.0])
    assert (separable.rank, separable.error) == (1, 0.0)
    assert not separable(torch.rand(5, 2)).any()


def test_a_function_of_one_variable_is_interpolated():
    separable = separate(lambda x: torch.sin(30 * x), [-1.0], [2.0], tolerance=1e-11)
    assert separable.rank == 1
    x = torch.linspace(-1, 2, 500, dtype=torch.float64, requires_grad=True)
    values = separable.component(0, 0)(x)
    torch.testing.assert_close(values, torch.sin(30 * x), rtol=0, atol=1e-11)
    (slope,) = torch.autograd.grad(values.sum(), x, create_graph=True)
    torch.testing.assert_close(slope, 30 * torch.cos(30 * x), rtol=0, atol=1e-8)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(curvature, -900 * torch.sin(30 * x), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("function", "low", "high", "tolerance", "most_terms"),
    [
        (inverse, [0.0] * 2, [1.0] * 2, 1e-8, 7),
        (inverse, [0.0] * 3, [1.0] * 3, 1e-4, 8),
        (inverse, [0.0] * 4, [1.0] * 4, 1e-3, 6),
        (ellipse, [-1.0, -1.0], [1.0, 1.0], 1e-8, 25),
        (lambda *x: torch.exp(-sum(x)), [0.0] * 6, [1.0] * 6, 1e-10, 1),
        (laser, [-4.0, 0.0, 1.0], [2.0, 3.0, 2.0], 1e-3, 12),
    ],
    ids=["inverse-2", "inverse-3", "inverse-4", "ellipse", "exponential-6", "laser"],
)
def test_smooth_functions(function, low, high, tolerance, most_terms):
    separable = separate(function, low, high, tolerance=tolerance)
    assert separable.rank <= most_terms
    assert separable.error <= separable.tolerance == tolerance
    assert error_at_random_points(separable, function) <= tolerance
    assert separable.num_evaluations < 500_000


def test_two_variables_take_no_more_terms_than_the_singular_values_ask_for():
    separable = separate(ellipse, [-1.0, -1.0], [1.0, 1.0], tolerance=1e-6)
    x = chebyshev_nodes(129, -1.0, 1.0)
    sizes = torch.linalg.svdvals(ellipse(x[:, None], x[None]))
    norms = sizes.square().flip(0).cumsum(0).sqrt().flip(0) / 129  # root mean squares of what k terms leave
    assert norms[separable.rank - 3] > 1e-8  # far fewer could not do
    assert separable.rank <= (norms > 1e-9).sum()


@st.composite
def low_rank_sums(draw):
    d, rank = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return torch.randn(d, 6, rank, dtype=torch.float64, generator=generator)


def sum_of(coefficients):
    def function(*x):
        basis = ChebyshevBasis(coefficients.shape[1])
        return torch.stack([basis.dense(x_i) @ c for x_i, c in zip(x, coefficients, strict=True)]).prod(0).sum(-1)

    return function


@given(low_rank_sums())
@settings(max_examples=8, deadline=None)
def test_sums_of_few_terms_are_found(coefficients):
    d, _, rank = coefficients.shape
    function = sum_of(coefficients)
    separable = separate(function, [0.0] * d, [1.0] * d, tolerance=1e-9)
    if d == 2:
        assert separable.rank <= rank
    assert separable.error <= 1e-9
    assert error_at_random_points(separable, function, 1000) <= 1e-9


@pytest.mark.parametrize("d", [2, 3, 4])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_the_rank_of_a_sum_is_found(d, rank):
    coefficients = torch.randn(d, 6, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    separable = separate(sum_of(coefficients), [0.0] * d, [1.0] * d, tolerance=1e-9)
    assert separable.rank == rank


def test_what_a_sum_is():
    separable = separate(inverse, [0.0, 1.0, 0.0], [1.0, 3.0, 2.0], tolerance=1e-3)
    points = torch.rand(7, 3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 2.0]) + torch.tensor([0.0, 1.0, 0.0])
    functions = [separable.functions(i, points[:, i]) for i in range(3)]
    assert all(values.shape == (7, separable.rank) for values in functions)
    torch.testing.assert_close(torch.stack(functions).prod(0).sum(-1), separable(points))
    for r in range(separable.rank):
        torch.testing.assert_close(separable.component(r, 1)(points[:, 1]), functions[1][:, r])
    for i, factor in enumerate(separable.factors):
        assert factor.dtype == torch.float64
        nodes = chebyshev_nodes(len(factor), separable.low[i], separable.high[i])
        torch.testing.assert_close(separable.functions(i, nodes), factor, rtol=0, atol=1e-12)
    points.requires_grad_()
    (gradient,) = torch.autograd.grad(separable(points).sum(), points)
    exact = -(inverse(*points.detach().unbind(-1)) ** 2)
    torch.testing.assert_close(gradient, exact.unsqueeze(-1).expand(7, 3), rtol=0, atol=1e-2)
    assert separable(points.detach().view(7, 1, 3)).shape == (7, 1)
    assert separable(torch.empty(0, 3)).shape == (0,)


def test_the_same_points_are_drawn_each_time():
    first, second = (separate(inverse, [0.0] * 3, [1.0] * 3, tolerance=1e-3) for _ in range(2))
    other = separate(inverse, [0.0] * 3, [1.0] * 3, tolerance=1e-3, generator=torch.Generator().manual_seed(3))
    assert all(map(torch.equal, first.factors, second.factors))
    assert first.error == second.error != other.error


def test_chebyshev_coefficients_are_those_of_polynomials():
    for n in (2, 3, 8, 33):
        nodes = chebyshev_nodes(n, -0.5, 2.0)
        assert (nodes[0], nodes[-1]) == (-0.5, 2.0)
        values = ChebyshevBasis(n, -0.5, 2.0).dense(nodes)
        torch.testing.assert_close(chebyshev_coefficients(values), torch.eye(n).double(), rtol=0, atol=1e-13)


def test_no_full_tensor_is_needed():
    separable = separate(lambda *x: torch.cos(8 * sum(x)), [0.0] * 4, [1.0] * 4, tolerance=1e-6)
    assert separable.num_evaluations < 100_000 < math.prod(len(factor) for factor in separable.factors)


@pytest.mark.parametrize(
    ("function", "d", "options", "message"),
    [
        (lambda x, y: (x - y).abs(), 2, {}, r"axis 0 the function is off by .* 1025 nodes.*split the box at a kink"),
        (lambda x, y: (x > y).double(), 2, {"tolerance": 1e-2}, "split the box at a kink or a jump"),
        (lambda x, y: (40 * x * y).sin(), 2, {"max_nodes": 9}, r"on 9 nodes, beyond the tolerance 1e-08"),
        (lambda x, y: (40 * x * y).sin(), 2, {"max_rank": 5}, r"rank 5 is off by .*raise max_rank"),
        (inverse, 3, {"max_rank": 5}, r"rank 5 is off by .*raise max_rank"),
        (
            lambda x, y, z: 1 + x * y + z * y**2 + x * z * y**3,  # four independent functions of y
            3,
            {"max_rank": 3},
            r"max_rank = 3 terms are too few.* ranks \[2, 2\] has 4, and 3 fitted ones are off by .*raise max_rank",
        ),
        (lambda x, y: 1 / x + y, 2, {}, r"the function is inf at \(0, .*singularity"),
        (lambda x, y: (x - 0.5).sqrt() * y, 2, {}, r"the function is nan at \(0\.\d+, 0\.\d+\)"),
        (lambda x, y: x[:, None] * y, 2, {}, r"returned torch\.float64 \(\d+, \d+\) for 2 tensors of shape"),
        (lambda x, y: torch.ones(()), 2, {}, r"returned torch\.float32 \(\) for 2 tensors"),
        (lambda x, y: 3.0, 2, {}, "returned float for 2 tensors"),
        (lambda x, y: x + 1j * y, 2, {}, r"returned torch\.complex128"),
        (inverse, 2, {"tolerance": 0.0}, r"tolerance = 0\.0; expected a number from 1e-12 to 1"),
        (inverse, 2, {"tolerance": math.nan}, "tolerance = nan"),
        (inverse, 2, {"max_rank": 0}, "max_rank = 0; expected an integer of at least 1"),
        (inverse, 2, {"max_nodes": 1}, "max_nodes = 1; expected at least 2"),
        (inverse, 2, {"low": [0.0]}, "low has 1 values and high 2"),
        (inverse, 0, {}, "low has 0 values"),
        (inverse, 2, {"low": [0.0, 1.0]}, r"axis 1: \[low, high\] = \[1\.0, 1\.0\]"),
        (inverse, 2, {"high": [1.0, math.inf]}, "expected finite ends"),
    ],
)
def test_what_cannot_be_compressed_says_so(function, d, options, message):
    options = {"low": [0.0] * d, "high": [1.0] * d} | options
    with pytest.raises(ValueError, match=message):
        separate(function, options.pop("low"), options.pop("high"), **options)


def test_bad_points():
    separable = separate(inverse, [0.0, 0.0], [1.0, 1.0], tolerance=1e-3)
    with pytest.raises(ValueError, match=r"x\[1, 0\] = 1\.5 lies outside input 0's interval \[0, 1\]"):
        separable(torch.tensor([[0.0, 0.0], [1.5, 0.0]]))
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 2\), a column for each axis"):
        separable(torch.rand(3, 3))
    with pytest.raises(ValueError, match="lies outside the interval"):
        separable.component(0, 1)(torch.tensor([-0.1]))
    with pytest.raises(ValueError, match="is not a number"):
        separable.functions(0, torch.tensor([math.nan]))
    with pytest.raises(ValueError, match=r"axis 2 does not exist; expected an integer from 0 to 1"):
        separable.functions(2, torch.rand(3))
    with pytest.raises(ValueError, match="term 99 does not exist"):
        separable.component(99, 0)
