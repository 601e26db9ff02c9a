import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import BSpline

from sna_core.bspline import UniformBSpline
from sna_core.graded import GradedBSpline, graded_breakpoints

degrees = pytest.mark.parametrize("degree", range(6))
widths = st.lists(st.floats(0.05, 5.0), min_size=1, max_size=8)


def spline_of(widths, degree, low=-1.5):
    return GradedBSpline(tuple(np.cumsum([low, *widths]).tolist()), degree)


def inside(spline, num_points=57):
    return torch.linspace(spline.low, spline.high, num_points, dtype=torch.float64).clamp(spline.low, spline.high)


def between_knots(spline, num_points=5):
    return spline.quadrature(num_points)[0]


@degrees
def test_equal_cells_give_the_uniform_basis(degree):
    uniform = UniformBSpline(7, degree, -1.0, 2.0)
    knots = uniform.knots()
    graded = GradedBSpline(tuple(knots[degree : degree + 8].tolist()), degree)
    assert (graded.num_cells, graded.num_basis, graded.low, graded.high) == (7, 7 + degree, -1.0, 2.0)
    torch.testing.assert_close(graded.knots(), knots, rtol=0, atol=1e-14)
    for order in range(degree + 2):
        x = torch.cat([between_knots(uniform), knots[degree : degree + 8]])
        expected = uniform.dense(x, order)
        atol = 1e-13 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(graded.dense(x, order), expected, rtol=0, atol=atol)
    for ours, theirs in zip(graded.quadrature(3), uniform.quadrature(3), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(graded.gram(), uniform.gram(), rtol=1e-12, atol=1e-15)


@given(widths=widths, degree=st.integers(0, 5))
@settings(max_examples=40)
def test_functions_and_derivatives_equal_scipy(widths, degree):
    spline = spline_of(widths, degree)
    x = between_knots(spline)
    knots = spline.knots().numpy()
    for order in range(degree + 2):
        ours = spline.dense(x, order)
        scale = max(1.0, ours.abs().max().item())
        for b in range(spline.num_basis):
            function = BSpline(knots, np.eye(spline.num_basis)[b], degree)
            theirs = function.derivative(order)(x.numpy()) if 0 < order <= degree else function(x) * (order == 0)
            np.testing.assert_allclose(ours[:, b], theirs, rtol=0, atol=1e-10 * scale)


@given(widths=widths, degree=st.integers(0, 5))
def test_partition_of_unity(widths, degree):
    spline = spline_of(widths, degree)
    values = spline.dense(inside(spline))
    assert values.min() >= -1e-13
    torch.testing.assert_close(values.sum(-1), torch.ones(57, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        spline.dense(inside(spline), 1).sum(-1) * min(widths), torch.zeros(57).double(), atol=1e-11, rtol=0
    )


@given(widths=widths, degree=st.integers(0, 5))
def test_polynomials_up_to_the_degree_are_reproduced(widths, degree):
    spline = spline_of(widths, degree)
    x = between_knots(spline, degree + 1)
    t = (x - spline.low) / (spline.high - spline.low)
    dense = spline.dense(x)
    for power in range(degree + 1):
        target = (t**power).unsqueeze(-1)
        residual = dense @ torch.linalg.lstsq(dense, target, driver="gelsd").solution - target
        assert residual.abs().max() < 1e-9


@degrees
def test_quadrature_and_gram_are_exact(degree):
    spline = spline_of([0.3, 1.0, 0.1, 2.0], degree)
    points, weights = spline.quadrature(3)
    for power in range(6):
        exact = (spline.high ** (power + 1) - spline.low ** (power + 1)) / (power + 1)
        assert (weights * points**power).sum().item() == pytest.approx(exact, rel=1e-13)
    torch.testing.assert_close(
        spline.gram(num_points=degree + 1), spline.gram(num_points=degree + 6), rtol=0, atol=1e-13
    )


@degrees
def test_limits_at_knots(degree):
    spline = spline_of([0.3, 1.0, 0.1, 2.0], degree)
    edges = torch.tensor(spline.breakpoints, dtype=torch.float64)
    beside = torch.cat([edges[:-1] + 1e-12, edges[-1:] - 1e-12])
    cell, _ = spline.local(edges)
    assert cell.tolist() == [0, 1, 2, 3, 3]
    slopes = spline.dense(edges, degree)
    torch.testing.assert_close(slopes, spline.dense(beside, degree), rtol=1e-9, atol=1e-9 * slopes.abs().max().item())


@degrees
def test_derivatives_by_autograd(degree):
    spline = spline_of([0.3, 1.0, 0.1, 2.0], degree)
    x = between_knots(spline, 2).requires_grad_()
    for order in range(degree + 1):
        assert torch.autograd.gradcheck(lambda x, n=order: spline.dense(x, n), x, atol=1e-4, rtol=1e-4)
        cotangent = torch.randn(spline.num_basis, dtype=torch.float64)
        (slope,) = torch.autograd.grad((spline.dense(x, order) @ cotangent).sum(), x)
        torch.testing.assert_close(slope, spline.dense(x, order + 1).detach() @ cotangent, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_interpolation_converges_at_the_rate_of_the_degree(degree):
    def error(num_cells):
        spline = GradedBSpline(graded_breakpoints(-1.0, 2.0, num_cells, 0.3, 0.6 / num_cells), degree)
        points, weights = spline.quadrature(degree + 3)
        target = torch.exp(torch.sin(3 * points))
        dense = spline.dense(points)
        solution = torch.linalg.solve(spline.gram(), dense.mT @ (weights * target))
        return (weights * (dense @ solution - target) ** 2).sum().sqrt().item()

    slope = math.log2(error(128) / error(64))
    assert slope == pytest.approx(-(degree + 1), abs=0.2)


def test_grading_resolves_a_layer():
    def error(breakpoints):
        spline = GradedBSpline(breakpoints, 3)
        x = torch.linspace(-1, 1, 4001, dtype=torch.float64)
        target = torch.tanh(x.unsqueeze(-1) / 0.01)
        dense = spline.dense(x)
        return (dense @ torch.linalg.lstsq(dense, target).solution - target).abs().max().item()

    assert error(graded_breakpoints(-1, 1, 32, 0, 0.004)) < 1e-2 * error(graded_breakpoints(-1, 1, 32, 0, 1 / 16))


@given(
    low=st.floats(-10, 10),
    width=st.floats(0.1, 20),
    num_cells=st.integers(1, 60),
    share=st.floats(0, 1),
    refinement=st.floats(1.0, 1e4),
)
def test_graded_breakpoints(low, width, num_cells, share, refinement):
    high = low + width
    center, finest = min(high, low + share * width), (high - low) / num_cells / refinement
    edges = graded_breakpoints(low, high, num_cells, center, finest)
    assert len(edges) == num_cells + 1
    assert (edges[0], edges[-1]) == (low, high)
    sizes = np.diff(edges)
    assert (sizes > 0).all()
    middles = (np.array(edges[1:]) + np.array(edges[:-1])) / 2
    left, right = sizes[middles < center], sizes[middles > center]
    slack = 1e-9 * width
    assert (np.diff(left) <= slack).all()
    assert (np.diff(right) >= -slack).all()
    assert sizes.min() >= finest * (1 - 1e-6) - slack


def test_the_finest_cell_is_as_wide_as_asked():
    for center in (-4.0, 0.0, 1.7, 2.0):
        sizes = np.diff(graded_breakpoints(-4, 2, 40, center, 0.01))
        assert sizes.min() == pytest.approx(0.01, rel=0.03)
        ratios = sizes[1:] / sizes[:-1]
        assert max(ratios.max(), 1 / ratios.min()) < 1.4  # smooth
    assert graded_breakpoints(0, 1, 4, 0.3, 0.25) == (0.0, 0.25, 0.5, 0.75, 1.0)


def test_interface():
    spline = spline_of([1.5, 1.0], 2)
    assert spline == spline_of([1.5, 1.0], 2)
    assert hash(spline) == hash(spline_of([1.5, 1.0], 2))
    assert GradedBSpline([0, 1, 3], 1).breakpoints == (0.0, 1.0, 3.0)
    for shape in [(), (3,), (2, 4), (0,)]:
        cell, values = spline.local(torch.rand(shape))
        assert (cell.shape, values.shape, values.dtype) == (shape, (*shape, 3), torch.float32)
        assert spline.dense(torch.rand(shape)).shape == (*shape, 4)
    single = spline.dense(inside(spline).float().clamp(spline.low, spline.high))
    torch.testing.assert_close(single.double(), spline.dense(inside(spline)), rtol=0, atol=1e-6)
    outside = spline.dense(torch.tensor([9.0]), check=False)
    assert outside.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GradedBSpline((0.0,), 3), "expected at least two"),
        (lambda: GradedBSpline((0.0, 1.0, 1.0), 3), r"breakpoints\[1\] = 1\.0 and breakpoints\[2\] = 1\.0; .* ascend"),
        (lambda: GradedBSpline((0.0, math.inf), 3), "expected finite edges"),
        (lambda: GradedBSpline((0.0, math.nan, 1.0), 3), "expected finite edges"),
        (lambda: GradedBSpline((0.0, 1.0), 6), "degree = 6; expected an integer from 0 to 5"),
        (lambda: spline_of([1.0], 2).quadrature(0), "num_points = 0"),
        (lambda: spline_of([1.0], 2).dense(torch.tensor([-1.0, 7.0])), r"x\[1\] = 7 lies outside the interval"),
        (lambda: spline_of([1.0], 2).dense(torch.tensor([math.nan])), "is not a number"),
        (lambda: spline_of([1.0], 2).dense(torch.zeros(2), -1), "derivative = -1"),
        (lambda: spline_of([1.0], 2).dense(torch.zeros(2, dtype=torch.int64)), r"x\.to\(torch\.float64\)"),
        (lambda: graded_breakpoints(0, 1, 0, 0.5, 0.1), "num_cells = 0"),
        (lambda: graded_breakpoints(1, 0, 3, 0.5, 0.1), "low < high"),
        (lambda: graded_breakpoints(0, 1, 3, 1.5, 0.1), r"center = 1\.5; expected a point of \[0, 1\]"),
        (lambda: graded_breakpoints(0, 1, 3, math.nan, 0.1), "center = nan"),
        (lambda: graded_breakpoints(0, 1, 3, 0.5, 0.5), r"finest = 0\.5; .* 3 equal cells, 0\.333333"),
        (lambda: graded_breakpoints(0, 1, 3, 0.5, 0.0), r"finest = 0\.0"),
        (lambda: graded_breakpoints(0, 1, 3, 0.5, math.nan), "finest = nan"),
    ],
)
def test_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
