import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import Chebyshev, Legendre

from sna_core.bspline import UniformBSpline, gauss_legendre
from sna_core.spectral import (
    BASES,
    ChebyshevBasis,
    FourierBasis,
    LegendreBasis,
    MLPAtoms,
    constant_coefficients,
    make_basis,
)

LOW, HIGH = -0.5, 2.0
SIZES = {kind: {"num_cells": 4, "degree": 3} if kind == "bspline" else {"num_basis": 7} for kind in BASES}
each_kind = pytest.mark.parametrize("kind", BASES)


def basis_of(kind):
    torch.manual_seed(0)
    basis = make_basis(kind, LOW, HIGH, **SIZES[kind])
    return basis.double() if kind == "mlp" else basis


def grid(low=LOW, high=HIGH, num_points=41):
    return torch.linspace(low, high, num_points, dtype=torch.float64)


@pytest.mark.parametrize(("basis_class", "oracle"), [(ChebyshevBasis, Chebyshev), (LegendreBasis, Legendre)])
@given(num_basis=st.integers(1, 10), derivative=st.integers(0, 11), low=st.floats(-5, 5), width=st.floats(0.5, 10))
@settings(max_examples=40, deadline=None)
def test_polynomials_and_their_derivatives_equal_numpy(basis_class, oracle, num_basis, derivative, low, width):
    basis = basis_class(num_basis, low, low + width)
    x = grid(basis.low, basis.high, 9)
    ours = basis.dense(x, derivative) * (basis.high - basis.low) ** derivative
    t = 2 * (x.numpy() - basis.low) / (basis.high - basis.low) - 1
    for b in range(num_basis):
        polynomial = oracle.basis(b)
        theirs = (polynomial.deriv(derivative) if derivative else polynomial)(t) * 2.0**derivative
        np.testing.assert_allclose(ours[:, b], theirs, rtol=1e-9, atol=1e-9 * max(1.0, abs(theirs).max()))


def test_chebyshev_recurrence_is_stable():
    angle = torch.linspace(0, math.pi, 301, dtype=torch.float64)
    values = ChebyshevBasis(400, -1.0, 1.0).dense(angle.cos().clamp(-1, 1))
    torch.testing.assert_close(values, (angle[:, None] * torch.arange(400)).cos(), rtol=0, atol=1e-11)


def test_legendre_polynomials_are_orthogonal():
    t, weights = gauss_legendre(40)
    basis = LegendreBasis(40, LOW, HIGH)
    dense = basis.dense((LOW + (HIGH - LOW) * (t + 1) / 2).clamp(LOW, HIGH))
    gram = dense.mT @ (weights[:, None] * dense) * (HIGH - LOW) / 2
    torch.testing.assert_close(gram, ((HIGH - LOW) / (2 * torch.arange(40.0).double() + 1)).diag(), atol=1e-12, rtol=0)


def test_chebyshev_polynomials_are_orthogonal():
    num_points = 40
    t = (math.pi * (torch.arange(num_points).double() + 0.5) / num_points).cos()
    dense = ChebyshevBasis(30, -1.0, 1.0).dense(t)
    gram = dense.mT @ dense / num_points  # Gauss-Chebyshev quadrature
    expected = torch.full((30,), 0.5, dtype=torch.float64)
    expected[0] = 1.0
    torch.testing.assert_close(gram, expected.diag(), atol=1e-12, rtol=0)


@given(num_pairs=st.integers(0, 6), derivative=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_fourier_functions_are_periodic_and_orthogonal(num_pairs, derivative):
    basis = FourierBasis(2 * num_pairs + 1, LOW, HIGH)
    omega = 2 * math.pi / (HIGH - LOW)
    ends = basis.dense(torch.tensor([LOW, HIGH], dtype=torch.float64), derivative)
    scale = max(1, num_pairs * omega) ** derivative
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-13 * scale)
    x = grid(num_points=33)[:-1]
    values = basis.dense(x, derivative)
    gram = values.mT @ values / len(x)
    frequency = torch.tensor([k for k in range(num_pairs + 1) for _ in range(2)][1:], dtype=torch.float64)
    expected = torch.where(frequency == 0, float(derivative == 0), (frequency * omega) ** (2 * derivative) / 2)
    torch.testing.assert_close(gram, expected.diag(), rtol=1e-10, atol=1e-10 * scale**2)
    for k in range(1, num_pairs + 1):
        phase = k * omega * (x - LOW) + derivative * math.pi / 2
        expected = (k * omega) ** derivative * torch.stack([phase.cos(), phase.sin()], -1)
        torch.testing.assert_close(values[:, 2 * k - 1 : 2 * k + 1], expected, rtol=1e-9, atol=1e-10 * scale)


def test_hidden_units_are_those_of_a_perceptron():
    basis = basis_of("mlp")
    x = grid()
    t = 2 * (x - LOW) / (HIGH - LOW) - 1
    hidden = torch.tanh(t[:, None] * basis.weight + basis.bias)
    torch.testing.assert_close(basis.dense(x), torch.cat([torch.ones(len(x), 1), hidden], -1))
    steps = -basis.bias / basis.weight
    assert steps.abs().max() <= 1
    torch.manual_seed(0)
    other = make_basis("mlp", num_basis=7)
    other.reset_parameters()
    assert not torch.equal(other.weight, basis.weight.float())
    assert "num_basis" not in repr(basis)
    assert "7, low=-0.5, high=2.0" in repr(basis)


@each_kind
def test_derivatives_equal_autograd(kind):
    basis = basis_of(kind)
    x = grid(LOW + 0.01, HIGH - 0.01).requires_grad_()
    for order in range(3 if kind == "bspline" else 5):
        cotangent = torch.randn(basis.num_basis, dtype=torch.float64)
        total = (basis.dense(x, order) @ cotangent).sum()
        (slope,) = torch.autograd.grad(total, x)
        expected = basis.dense(x, order + 1) @ cotangent
        torch.testing.assert_close(slope, expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())


@each_kind
def test_interface(kind):
    basis = basis_of(kind)
    assert isinstance(basis, BASES[kind])
    assert (basis.num_basis, basis.low, basis.high) == (7, LOW, HIGH)
    for shape in [(), (3,), (2, 4), (0,)]:
        assert basis.dense(torch.rand(shape, dtype=torch.float64)).shape == (*shape, 7)
    one = basis.dense(grid()) @ torch.tensor(constant_coefficients(basis), dtype=torch.float64)
    torch.testing.assert_close(one, torch.ones(41, dtype=torch.float64))
    if kind != "mlp":
        assert basis == make_basis(kind, LOW, HIGH, **SIZES[kind])
        assert hash(basis) == hash(make_basis(kind, LOW, HIGH, **SIZES[kind]))
        single = basis.dense(torch.rand(3))
        assert single.dtype == torch.float32
    with pytest.raises(ValueError, match=r"x\[1\] = 2\.5 lies outside the interval \[-0\.5, 2\]"):
        basis.dense(torch.tensor([0.0, 2.5]))
    with pytest.raises(ValueError, match="is not a number"):
        basis.dense(torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="derivative = -1"):
        basis.dense(grid(), -1)
    with pytest.raises(ValueError, match=r"x\.to\(torch\.float64\)"):
        basis.dense(torch.ones(3, dtype=torch.int64))
    assert basis.dense(torch.tensor([3.0], dtype=torch.float64), check=False).isfinite().all()


@each_kind
@pytest.mark.parametrize("derivative", [0, 1, 2])
def test_gradcheck(kind, derivative):
    basis = basis_of(kind)
    x = torch.tensor([LOW + 0.1, 0.3, HIGH - 0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: basis.dense(x, derivative), x)


@pytest.mark.parametrize("kind", ["chebyshev", "legendre", "mlp"])
def test_a_single_function_is_one_and_has_a_gradient(kind):
    x = grid().requires_grad_()
    values = make_basis(kind, LOW, HIGH, num_basis=1).dense(x)
    assert torch.equal(values, torch.ones(41, 1, dtype=torch.float64))
    assert torch.equal(torch.autograd.grad(values.sum(), x)[0], torch.zeros_like(x))


def test_polynomials_and_trigonometric_functions_converge_faster_than_any_power():
    x = grid(0.0, 1.0, 400)
    targets = {ChebyshevBasis: (2 * x).exp().sin(), LegendreBasis: (2 * x).exp().sin()}
    targets[FourierBasis] = ((2 * math.pi * x).sin()).exp()
    for basis_class, y in targets.items():
        errors = []
        for num_basis in (9, 17, 33):
            dense = basis_class(num_basis).dense(x)
            errors.append((dense @ torch.linalg.lstsq(dense, y[:, None]).solution - y[:, None]).abs().max().item())
        assert errors[1] < errors[0] / 10
        assert errors[2] < max(errors[1] / 100, 1e-11)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ChebyshevBasis(0), "num_basis = 0; expected an integer of at least 1"),
        (lambda: LegendreBasis(3, 1.0, 1.0), "low < high"),
        (lambda: FourierBasis(4), "num_basis = 4; expected an odd number"),
        (lambda: MLPAtoms(2.5), r"num_basis = 2\.5"),
        (lambda: MLPAtoms(2, 0.0, math.inf), "finite ends"),
        (lambda: make_basis("wavelet", num_basis=3), "basis = 'wavelet'; expected one of"),
        (lambda: make_basis("bspline", num_cells=3), "degree = None, but basis = 'bspline' takes degree and num_cells"),
        (lambda: make_basis("legendre"), "num_basis = None, but basis = 'legendre' takes num_basis"),
        (lambda: make_basis("legendre", num_basis=3, degree=3), "degree = 3, but basis = 'legendre' takes num_basis"),
        (lambda: make_basis("bspline", num_cells=3, degree=9), "degree = 9"),
    ],
)
def test_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_factory_takes_the_place_of_the_classes():
    assert make_basis("bspline", 0.0, 2.0, num_cells=3, degree=2) == UniformBSpline(3, 2, 0.0, 2.0)
    assert make_basis("fourier", num_basis=5) == FourierBasis(5)
