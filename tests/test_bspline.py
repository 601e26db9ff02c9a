import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.interpolate import BSpline

from sna_core.bspline import MAX_DEGREE, UniformBSpline, gauss_legendre

DEGREES = range(MAX_DEGREE + 1)
TIGHT = 1e-12


def grid(spline, num_points=97):
    """Both ends, all knots inside and points between, float64."""
    inside = spline.knots()
    inside = inside[(inside >= spline.low) & (inside <= spline.high)]
    return torch.cat([torch.linspace(spline.low, spline.high, num_points, dtype=torch.float64), inside])


def scipy_dense(spline, x, derivative=0):
    basis = BSpline(spline.knots().numpy(), np.eye(spline.num_basis), spline.degree)
    if derivative > spline.degree:
        return np.zeros((len(x), spline.num_basis))
    return (basis.derivative(derivative) if derivative else basis)(x.numpy())


@st.composite
def splines_and_points(draw):
    low = draw(st.floats(-10, 10))
    width = draw(st.floats(0.1, 20))
    spline = UniformBSpline(draw(st.integers(1, 20)), draw(st.integers(0, MAX_DEGREE)), low, low + width)
    fractions = draw(st.lists(st.floats(0, 1), min_size=1, max_size=8))
    between = spline.low + (spline.high - spline.low) * torch.tensor(fractions, dtype=torch.float64)
    return spline, torch.cat([between.clamp(spline.low, spline.high), grid(spline, 2)])


@given(splines_and_points())
@settings(max_examples=150, deadline=None)
def test_values_and_derivatives_equal_scipy(case):
    spline, x = case
    for derivative in range(spline.degree + 2):
        ours = spline.dense(x, derivative).numpy() * spline.spacing**derivative  # in units of a cell
        theirs = scipy_dense(spline, x, derivative) * spline.spacing**derivative
        if 0 < derivative == spline.degree or spline.degree == 0:  # a jump: points within rounding of a knot may differ
            distance = (x[:, None] - spline.knots()).abs().min(1).values.numpy()
            sure = (distance == 0) | (distance > TIGHT)
            ours, theirs = ours[sure], theirs[sure]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=10 * TIGHT if derivative else TIGHT)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_partition_of_unity_on_the_closed_interval(degree, dtype):
    spline = UniformBSpline(7, degree, -0.3, 1.9)
    x = torch.cat([torch.rand(1000, dtype=dtype) * 2.2 - 0.3, torch.tensor([-0.3, 1.9], dtype=dtype)])
    x = x[(x >= spline.low) & (x <= spline.high)]
    tolerance = 20 * torch.finfo(dtype).eps
    assert x.numel() > 990
    values = spline.dense(x)
    assert values.dtype == dtype
    assert values.min() > -tolerance
    torch.testing.assert_close(values.sum(-1), torch.ones_like(x), rtol=0, atol=tolerance)
    for derivative in range(1, degree + 1):
        slopes = spline.dense(x, derivative).sum(-1) * spline.spacing**derivative
        torch.testing.assert_close(slopes, torch.zeros_like(x), rtol=0, atol=4 * tolerance)


@pytest.mark.parametrize("degree", DEGREES)
def test_local_is_the_part_of_dense_that_is_not_zero(degree):
    spline = UniformBSpline(5, degree, 2.0, 3.0)
    x = grid(spline).reshape(-1, 1).expand(-1, 2)  # any leading shape
    cell, values = spline.local(x, 1)
    dense = spline.dense(x, 1)
    assert cell.dtype == torch.int64
    assert cell.min() == 0
    assert cell.max() == spline.num_cells - 1
    assert values.shape == (*x.shape, degree + 1)
    index = cell.unsqueeze(-1) + torch.arange(degree + 1)
    assert torch.equal(dense.gather(-1, index), values)
    assert dense.scatter(-1, index, 0.0).count_nonzero() == 0
    assert spline.dense(x[0, 0]).shape == (spline.num_basis,)
    assert spline.dense(x[:0]).shape == (0, 2, spline.num_basis)


@pytest.mark.parametrize("degree", DEGREES)
def test_one_sided_limits_at_knots(degree):
    spline = UniformBSpline(49, degree, 0.1, 0.7)  # spacings that rounding would put on the wrong side
    knots = spline.knots()[degree : degree + 50]
    cell, _ = spline.local(knots.clamp(spline.low, spline.high), degree)
    assert cell.tolist() == [*range(49), 48]


@pytest.mark.parametrize("degree", DEGREES)
def test_derivatives_equal_autograd(degree):
    spline = UniformBSpline(6, degree, -1.0, 2.0)
    x = (torch.rand(50, dtype=torch.float64) * 3 - 1).requires_grad_()
    coefficients = torch.randn(spline.num_basis, dtype=torch.float64)
    for derivative in range(degree + 2):
        f = spline.dense(x, derivative) @ coefficients
        (slope,) = torch.autograd.grad(f.sum(), x)
        torch.testing.assert_close(slope, spline.dense(x, derivative + 1) @ coefficients, rtol=TIGHT, atol=1e-10)


@pytest.mark.parametrize("degree", range(1, MAX_DEGREE + 1))
def test_gradcheck_twice(degree):
    spline = UniformBSpline(4, degree)
    x = torch.tensor([0.03, 0.31, 0.62, 0.97], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(spline.dense, x)
    assert torch.autograd.gradgradcheck(spline.dense, x)


@pytest.mark.parametrize("degree", DEGREES)
def test_polynomials_up_to_the_degree_are_reproduced(degree):
    spline = UniformBSpline(5, degree, -2.0, 1.0)
    x = grid(spline)
    basis = spline.dense(x)
    if degree:
        torch.testing.assert_close(basis @ spline.greville(), x, rtol=0, atol=TIGHT)
    for power in range(degree + 1):
        target = x**power
        fit = torch.linalg.lstsq(basis, target[:, None]).solution
        torch.testing.assert_close((basis @ fit)[:, 0], target, rtol=0, atol=1e-11)


@pytest.mark.parametrize("num_points", [1, 2, 5, 12])
def test_gauss_legendre_equals_numpy(num_points):
    for ours, theirs in zip(gauss_legendre(num_points), np.polynomial.legendre.leggauss(num_points), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-14)


def test_quadrature_is_exact_for_piecewise_polynomials():
    points, weights = UniformBSpline(3, 2, 1.0, 4.0).quadrature(4)
    assert points.shape == weights.shape == (12,)
    assert torch.equal(points, points.sort().values)
    for power in range(8):
        exact = (4.0 ** (power + 1) - 1) / (power + 1)
        assert (weights * points**power).sum().item() == pytest.approx(exact, rel=1e-14)
    assert (weights * (points - 2.0).relu() ** 3).sum().item() == pytest.approx(4.0, rel=1e-14)  # its kink is a knot


@pytest.mark.parametrize("degree", DEGREES)
def test_gram_equals_adaptive_quadrature(degree):
    spline = UniformBSpline(3, degree, -0.5, 1.0)
    knots = spline.knots().numpy()
    functions = [BSpline(knots, row, degree) for row in np.eye(spline.num_basis)]
    for left, right, weight in [(0, 0, None), (1, 1, None), (0, 1, lambda x: 1 + x**3)]:
        if max(left, right) > degree:
            continue
        gram = spline.gram(left, right, weight).numpy()
        for a in range(spline.num_basis):
            for b in range(a, min(a + degree + 2, spline.num_basis)):
                f, g = functions[a].derivative(left), functions[b].derivative(right)

                def integrand(x, f=f, g=g, weight=weight):
                    return f(x) * g(x) * (1.0 if weight is None else weight(x))

                cells = [quad(integrand, *knots[degree + i : degree + i + 2])[0] for i in range(spline.num_cells)]
                assert gram[a, b] == pytest.approx(sum(cells), abs=TIGHT)


@pytest.mark.parametrize("degree", range(1, MAX_DEGREE + 1))
def test_gram_identities(degree):
    spline = UniformBSpline(8, degree, 1.0, 3.0)
    mass, stiffness, centres = spline.gram(), spline.gram(1, 1), spline.greville()
    assert mass.sum().item() == pytest.approx(2.0, rel=TIGHT)  # the interval's length
    points, weights = spline.quadrature(degree + 1)
    torch.testing.assert_close(mass.sum(1), weights @ spline.dense(points), rtol=0, atol=TIGHT)
    assert (centres @ mass @ centres).item() == pytest.approx((27 - 1) / 3, rel=TIGHT)  # int x^2
    assert (centres @ stiffness @ centres).item() == pytest.approx(2.0, rel=TIGHT)  # int 1
    torch.testing.assert_close(stiffness.sum(1), torch.zeros(spline.num_basis).double(), rtol=0, atol=1e-11)
    torch.testing.assert_close(spline.gram(0, 1), spline.gram(1, 0).mT, rtol=0, atol=TIGHT)
    a, b = torch.meshgrid(torch.arange(spline.num_basis), torch.arange(spline.num_basis), indexing="ij")
    assert mass[(a - b).abs() > degree].count_nonzero() == 0
    weighted = spline.gram(weight=lambda x: x**9)
    assert weighted.sum().item() == pytest.approx((3.0**10 - 1) / 10, rel=TIGHT)


@pytest.mark.parametrize("degree", DEGREES)
def test_projection_converges_with_order_degree_plus_one(degree):
    errors = []
    for num_cells in (16, 32):
        spline = UniformBSpline(num_cells, degree)
        points, weights = spline.quadrature(degree + 6)
        basis, target = spline.dense(points), torch.sin(5 * points)
        coefficients = torch.linalg.solve(spline.gram(), basis.mT @ (weights * target))
        errors.append((weights @ (basis @ coefficients - target) ** 2).sqrt().item())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(degree + 1, abs=0.2)


def test_compiles_to_one_graph():
    spline = UniformBSpline(8, 3)
    x = torch.rand(64)
    compiled = torch.compile(lambda x: spline.dense(x, check=False), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), spline.dense(x))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([[0.5, 1.7]], r"x\[0, 1\] = 1\.7 lies outside the interval \[0, 1\]; rescale x or widen `high`"),
        ([0.5, -0.25], r"x\[1\] = -0\.25 lies outside the interval \[0, 1\]; rescale x or lower `low`"),
        ([0.5, 1.0000001], r"x\[1\] = 1\.0000001 lies outside"),
        ([float("nan"), 2.0], r"x\[0\] = nan is not a number"),
        ([float("inf")], r"x\[0\] = inf lies outside"),
        (3.0, r"x = 3 lies outside"),
    ],
)
def test_points_outside_raise(x, message):
    for method in (UniformBSpline(4, 3).local, UniformBSpline(4, 3).dense):
        with pytest.raises(ValueError, match=message):
            method(torch.tensor(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: UniformBSpline(0, 3), "num_cells = 0"),
        (lambda: UniformBSpline(4.0, 3), "num_cells = 4.0"),
        (lambda: UniformBSpline(4, 6), "degree = 6; expected an integer from 0 to 5"),
        (lambda: UniformBSpline(4, -1), "degree = -1"),
        (lambda: UniformBSpline(4, 3, 1.0, 1.0), "low < high"),
        (lambda: UniformBSpline(4, 3, float("nan"), 1.0), "finite"),
        (lambda: UniformBSpline(4, 3, 0.0, float("inf")), "finite"),
        (lambda: UniformBSpline(4, 3).local(torch.tensor([0.5]), -1), "derivative = -1"),
        (lambda: UniformBSpline(4, 3).local(torch.tensor([0])), "torch.int64"),
        (lambda: UniformBSpline(4, 3).quadrature(0), "num_points = 0"),
        (lambda: UniformBSpline(4, 3).gram(weight=lambda x: 1 / (x - x)), r"weight\(.*\) is not finite"),
        (lambda: UniformBSpline(4, 3).gram(weight=lambda x: x[:3]), "has shape"),
    ],
)
def test_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
