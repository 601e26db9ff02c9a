"""Spaces that satisfy their conditions, lifts that take the data, and forms that equal a quadrature over the box."""

from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sna_core import Axis, Problem, Term, derivative, graded_breakpoints, multiply
from sna_core.assembly import Residual, galerkin, least_squares
from sna_core.discretisation import Discretisation, Space
from sna_core.field import gauss
from sna_core.forms import Components
from sna_core.tensor_train import Train

SIN, COS, EXP = multiply(torch.sin), multiply(torch.cos), multiply(torch.exp)
LOW, HIGH = -0.5, 1.5
BASES = [
    {"num_cells": 5, "degree": 2},
    {"num_cells": 6, "degree": 3},
    {"num_cells": 4, "degree": 5},
    {"breakpoints": graded_breakpoints(LOW, HIGH, 6, LOW, 0.05)},
    {"kind": "chebyshev", "num_basis": 9},
    {"kind": "legendre", "num_basis": 9},
]
CONDITIONS = {
    "free": [],
    "dirichlet": [("low", 0), ("high", 0)],
    "neumann": [("low", 1), ("high", 1)],
    ("dirichlet", "neumann"): [("low", 0), ("high", 1)],
    ("free", "dirichlet"): [("high", 0)],
    "value": [("low", 0)],
    "value and velocity": [("low", 0), ("low", 1)],
}


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def whole(factors):
    """A sum of products as an array with an index for each axis."""
    letters = "abcdefgh"[: len(factors)]
    return torch.einsum(",".join(f"{c}r" for c in letters) + f"->{letters}", *factors)


def dense(form):
    """The matrix of a form, and its right-hand side."""
    matrix = 0.0
    for c, index in zip(form.coefficients, form.index, strict=True):
        matrix = matrix + c * reduce(torch.kron, [m[s] for m, s in zip(form.matrices, index, strict=True)])
    return matrix, whole(form.right.factors).flatten()


def along(discretisation, i, operator, coefficients, points):
    """An operator applied to functions of one axis (num_basis, rank) at points, derivative by derivative."""
    basis = discretisation.spaces[i].basis
    orders = enumerate(operator.coefficients(points))
    return sum(c.unsqueeze(-1) * (basis.dense(points, n) @ coefficients) for n, c in orders)


def on_grid(discretisation, terms, components):
    """Terms applied to components, on a grid of quadrature points."""
    total = 0.0
    for term in terms:
        factors = []
        for i, space in enumerate(discretisation.spaces):
            operator = term.operators.get(space.axis.name, multiply(torch.ones_like))
            factors.append(along(discretisation, i, operator, components.factors[i], space.points))
        total = total + term.coefficient * whole(factors)
    return total


def functions_on_grid(discretisation, terms):
    """Terms of functions alone on the grid, by their functions."""
    total = torch.zeros([len(space.points) for space in discretisation.spaces], dtype=torch.float64)
    for term in terms:
        values = [
            term.operators.get(space.axis.name, multiply(torch.ones_like)).values(space.points).unsqueeze(-1)
            for space in discretisation.spaces
        ]
        total = total + term.coefficient * whole(values)
    return total


def weights(discretisation):
    return whole([space.weights.unsqueeze(-1) for space in discretisation.spaces])


def random_factors(discretisation, rank=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s.dimension, rank, generator=generator, dtype=torch.float64) for s in discretisation.spaces]


def poisson(**options):
    axes = [
        Axis("x", 0, 1, num_cells=4, boundary="dirichlet"),
        Axis("y", 0, 2, num_cells=3, boundary=("dirichlet", "neumann")),
    ]
    operator = [
        Term(-1.0, x=derivative(1) * multiply(lambda x: 1 + x) * derivative(1)),
        Term(-2.0, y=derivative(2)),
        Term(0.5, x=EXP),
    ]
    return Problem(**({"axes": axes, "operator": operator, "source": [Term(x=EXP, y=COS), Term(3.0)]} | options))


def transport():
    """Heat with a drift, a parameter, a source, and data at x = 0 and t = 0 that agree."""
    return Problem(
        [
            Axis("x", 0, 1, num_cells=4, boundary=("dirichlet", "neumann")),
            Axis("t", 0, 1, kind="chebyshev", num_basis=5),
            Axis("nu", 0.1, 0.5, num_cells=2, degree=2),
        ],
        [Term(t=derivative(1)), Term(x=SIN * derivative(1)), Term(-1.0, nu=EXP, x=derivative(2)), Term(t=COS)],
        source=[Term(2.0, x=COS, nu=SIN)],
        boundary={"x": ([Term(t=COS)], None)},
        initial={"t": [Term(x=multiply(lambda x: (torch.pi * x).cos()))]},
    )


# Spaces.


@pytest.mark.parametrize("options", BASES, ids=str)
@pytest.mark.parametrize("name", CONDITIONS, ids=str)
def test_trial_functions_are_orthonormal_and_satisfy_their_conditions(options, name):
    axis = Axis("x", LOW, HIGH, **options)
    space = Space(axis, CONDITIONS[name])
    points, weight = axis.basis.quadrature(12) if axis.kind == "bspline" else gauss(axis.basis, 4)
    values = axis.basis.dense(points) @ space.trial
    torch.testing.assert_close(values.mT * weight @ values, torch.eye(space.dimension).double(), atol=1e-10, rtol=0)
    slopes = axis.basis.dense(points, 1) @ space.trial
    energy = slopes.mT * weight @ slopes
    assert (energy - energy.diagonal().diag()).abs().max() <= 1e-9 * energy.abs().max()
    assert (energy.diagonal().diff() >= -1e-9 * energy.abs().max()).all()  # smooth ones first
    for end, order in CONDITIONS[name]:
        assert (axis.basis.dense(tensor([getattr(axis, end)]), order) @ space.trial).abs().max() <= 1e-9
    assert space.dimension == axis.basis.num_basis - len(CONDITIONS[name])


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("graded", [False, True])
def test_periodic_splines_are_as_smooth_as_inside(degree, graded):
    edges = graded_breakpoints(LOW, HIGH, 7, 0.3, 0.1) if graded else None
    axis = Axis("x", LOW, HIGH, num_cells=7, degree=degree, breakpoints=edges, boundary="periodic")
    space = Space(axis, ())
    assert space.dimension == 7  # one function for each cell
    for order in range(degree):
        left, right = (axis.basis.dense(tensor([end]), order) @ space.trial for end in (LOW, HIGH))
        assert (left - right).abs().max() <= 1e-9 * max(1.0, left.abs().max().item())


def test_periodic_polynomials():
    axis = Axis("x", LOW, HIGH, kind="legendre", num_basis=9, boundary="periodic")
    space = Space(axis, ())
    assert space.dimension == 6
    for order in range(3):
        left, right = (axis.basis.dense(tensor([end]), order) @ space.trial for end in (LOW, HIGH))
        torch.testing.assert_close(left, right, atol=1e-8, rtol=1e-8)


def test_too_few_functions_raise():
    with pytest.raises(ValueError, match="axis 'x' has 2 conditions on 2 functions; add cells or functions"):
        Space(Axis("x", 0, 1, num_cells=1, degree=1, boundary="dirichlet"), CONDITIONS["dirichlet"])


@pytest.mark.parametrize("options", BASES[:-1], ids=str)
def test_lifts_are_one_in_their_condition_and_zero_in_the_others(options):
    for name, conditions in CONDITIONS.items():
        if conditions:
            space = Space(Axis("x", LOW, HIGH, **options), conditions)
            found = space.conditions @ space.lifts().mT
            torch.testing.assert_close(found, torch.eye(len(conditions)).double(), atol=1e-9, rtol=0, msg=str(name))


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=4), st.sampled_from(list(CONDITIONS)))
@settings(max_examples=40)
def test_a_function_of_the_space_is_its_own_data(polynomial, name):
    """The nearest function is itself, whatever conditions it has to keep the values of."""
    space = Space(Axis("x", LOW, HIGH, num_cells=4), CONDITIONS[name])
    operator = multiply(lambda x: sum(c * x**k for k, c in enumerate(polynomial)) + 3 * x**3)
    x = torch.linspace(LOW, HIGH, 30, dtype=torch.float64)
    found = space.basis.dense(x) @ space.data(operator)
    size = operator.values(x).abs().max()
    # Values that are small beside the largest count as zero where they are conditions.
    assert (found - operator.values(x)).abs().max() <= 2e-3 * size
    ends = [abs(operator.values(tensor([end])).item()) for end in (LOW, HIGH)]
    slopes = [abs(c.item()) for end in (LOW, HIGH) for c in (derivative(1) * operator).coefficients(tensor([end]))[:1]]
    if min(ends) > 4e-3 * size and min(slopes) > 4e-3 * size:
        assert (found - operator.values(x)).abs().max() <= 1e-9 * size


# Lifts.


CUBIC = [
    (lambda x: 1 + x + x**3, lambda y: 2 - y**2, lambda t: 1 + t),
    (lambda x: x**2 - 0.3, lambda y: y**3 + y, lambda t: t**3 - 2 * t**2 + 0.5),
]
SLOPES = [
    (lambda x: 1 + 3 * x**2, lambda y: -2 * y, lambda t: 1 + 0 * t),
    (lambda x: 2 * x, lambda y: 3 * y**2 + 1, lambda t: 3 * t**2 - 4 * t),
]
NAMES = ["x", "y", "t"]


def terms_at(axis, point, order):
    """The terms of CUBIC or its slope along an axis, where that axis has a value."""
    i, found = NAMES.index(axis), []
    for k, functions in enumerate(CUBIC):
        at = float((SLOPES if order else CUBIC)[k][i](tensor(point)))
        found.append(Term(at, **{NAMES[j]: multiply(f) for j, f in enumerate(functions) if j != i}))
    return found


def cubic_problem(x="dirichlet", y="dirichlet", initial="value"):
    axes = [Axis("x", 0, 1, num_cells=3, boundary=x), Axis("y", 0, 2, num_cells=2, boundary=y), Axis("t", 0, 1)]
    boundary = {}
    for axis in axes[:2]:
        data = []
        for end, kind in zip((axis.low, axis.high), axis.ends, strict=True):
            data.append(None if kind == "free" else terms_at(axis.name, end, int(kind == "neumann")))
        if axis.boundary != "periodic":
            boundary[axis.name] = tuple(data)
    value, velocity = (terms_at("t", 0.0, order) for order in (0, 1))
    given = {"t": value} if initial == "value" else {"t": (value, velocity)}
    return Problem(axes, [Term()], boundary=boundary, initial=given if initial else {})


def check_lift(problem):
    """All data at the ends, on a grid of the other axes."""
    discretisation = Discretisation(problem)
    grids = [torch.linspace(a.low, a.high, 6, dtype=torch.float64) for a in problem.axes]
    for i, axis in enumerate(problem.axes):
        for end, order in problem.conditions(axis):
            points = [*grids]
            points[i] = tensor([getattr(axis, end)])
            factors = [
                space.basis.dense(x, order if j == i else 0) @ discretisation.lift.factors[j]
                for j, (space, x) in enumerate(zip(discretisation.spaces, points, strict=True))
            ]
            expected = 0.0
            for k, functions in enumerate(CUBIC):
                row = [(SLOPES[k] if j == i and order else functions)[j](x) for j, x in enumerate(points)]
                expected = expected + whole([values.unsqueeze(-1) for values in row])
            torch.testing.assert_close(whole(factors), expected, atol=1e-8, rtol=1e-8)
    return discretisation


@pytest.mark.parametrize("x", ["dirichlet", "neumann", ("dirichlet", "neumann"), ("free", "dirichlet")])
@pytest.mark.parametrize("y", ["dirichlet", ("neumann", "dirichlet"), "free"])
@pytest.mark.parametrize("initial", ["value", "velocity", None])
def test_the_lift_takes_the_data_of_all_axes(x, y, initial):
    discretisation = check_lift(cubic_problem(x, y, initial))
    assert discretisation.incompatibility <= 1e-7


def test_incompatible_data_raise():
    axes = [Axis("x", 0, 1, boundary="dirichlet"), Axis("t", 0, 1)]
    for initial, boundary in (
        ([Term(x=COS)], {}),  # cos(0) where the wall is at zero
        ([Term(x=SIN)], {}),  # sin(1) at the other
        ([], {"x": (None, [Term()])}),
        ([Term()], {"x": ([Term()], [Term(1.01)])}),
    ):
        problem = Problem(axes, [Term(t=derivative(1))], boundary=boundary, initial={"t": initial})
        with pytest.raises(ValueError, match=r"incompatible data: .* axis '[xt]' differ .* expected at most 0\.001"):
            Discretisation(problem)
    corner = [Axis("x", 0, 1, boundary="dirichlet"), Axis("y", 0, 1, boundary="dirichlet")]
    with pytest.raises(ValueError, match="incompatible data"):
        Discretisation(Problem(corner, [Term()], boundary={"x": ([Term()], [Term()]), "y": ([Term()], [Term(2.0)])}))
    assert (
        Discretisation(
            Problem(corner, [Term()], boundary={"x": ([Term()], [Term()]), "y": ([Term()], [Term()])})
        ).incompatibility
        <= 1e-7
    )
    # What is wrong by less is reported.
    problem = Problem(
        axes, [Term(t=derivative(1))], boundary={"x": ([Term()], [Term(1.0004)])}, initial={"t": [Term()]}
    )
    assert 1e-5 < Discretisation(problem).incompatibility < 1e-3


# Least squares.


@pytest.mark.parametrize(
    "problem", [poisson(boundary={"x": (None, [Term(y=multiply(lambda y: y * (4 - y)))])}), transport()]
)
def test_least_squares_is_the_squared_residual(problem):
    discretisation = Discretisation(problem)
    assert discretisation.lift.rank
    form, residual = least_squares(discretisation)
    factors = random_factors(discretisation)
    own = Components(tuple(s.trial @ f for s, f in zip(discretisation.spaces, factors, strict=True)))
    full = own + discretisation.lift
    left = on_grid(discretisation, discretisation.terms, full) - functions_on_grid(
        discretisation, discretisation.source
    )
    expected = (weights(discretisation) * left.square()).sum()

    w = whole(factors).flatten()
    matrix, right = dense(form)
    torch.testing.assert_close(w @ matrix @ w - 2 * right @ w + form.constant, expected, rtol=1e-10, atol=0)
    assert (matrix - matrix.mT).abs().max() <= 1e-10 * matrix.abs().max()
    assert torch.linalg.eigvalsh(matrix)[0] > 0
    for order in ([0, 1, 2], [2, 0, 1]):
        order = [axis for axis in order if axis < len(factors)]
        train = Train.of_components([factors[i] for i in order])
        found = residual.of_train(train.cores, order) * residual.scale
        assert found == pytest.approx(expected.sqrt().item(), rel=1e-10)
    nothing = Train.of_components([torch.zeros_like(f) for f in factors])
    assert residual.of_train(nothing.cores, range(len(factors))) * residual.scale == pytest.approx(
        form.constant**0.5, rel=1e-10
    )


def test_terms_that_share_matrices_are_joined():
    """The square of d terms has d^2 products, of which those that are alike are one."""
    axes = [Axis(name, 0, 1, num_cells=3, boundary="dirichlet") for name in "xyz"]
    form, _ = least_squares(Discretisation(Problem(axes, [Term(-1.0, **{n: derivative(2)}) for n in "xyz"])))
    assert len(form.coefficients) <= 9
    assert all(len(matrices) <= 4 for matrices in form.matrices)


def test_rough_splines_raise():
    axes = [Axis(name, 0, 1, degree=1, boundary="dirichlet") for name in "xy"]
    discretisation = Discretisation(Problem(axes, [Term(-1.0, x=derivative(2)), Term(-1.0, y=derivative(2))]))
    with pytest.raises(ValueError, match="order 2 along axis 'x', which splines of degree 1 do not carry; raise the"):
        least_squares(discretisation)
    galerkin(discretisation)


# Galerkin.


def test_galerkin_is_the_energy():
    r"""\int (1 + x) w_x^2 + 2 w_y^2 + e^x w^2 / 2 - 2 f w, and twice the lift's share."""
    problem = poisson(
        boundary={"x": ([Term(0.0)], [Term(y=multiply(lambda y: y))]), "y": (None, [Term(x=multiply(lambda x: x))])}
    )
    discretisation = Discretisation(problem)
    form = galerkin(discretisation)
    factors = random_factors(discretisation)
    own = Components(tuple(s.trial @ f for s, f in zip(discretisation.spaces, factors, strict=True)))
    weight, lift = weights(discretisation), discretisation.lift
    x, y = (space.points for space in discretisation.spaces)

    def at(components, **operators):
        return on_grid(discretisation, [Term(**operators)], components)

    def energy(u, v):
        terms = (
            (1 + x).unsqueeze(-1) * at(u, x=derivative(1)) * at(v, x=derivative(1)),
            2 * at(u, y=derivative(1)) * at(v, y=derivative(1)),
            x.exp().unsqueeze(-1) / 2 * at(u) * at(v),
        )
        return (weight * sum(terms)).sum()

    source = x.exp().unsqueeze(-1) * y.cos() + 3
    load = (weight * source * at(own)).sum()
    high = discretisation.spaces[1].basis.dense(tensor([2.0]))
    outflow = discretisation.spaces[0].weights @ (  # 2 u_y = 2 x at y = 2
        2 * x * whole([discretisation.spaces[0].basis.dense(x) @ own.factors[0], high @ own.factors[1]])[:, 0]
    )
    w = whole(factors).flatten()
    matrix, right = dense(form)
    torch.testing.assert_close(w @ matrix @ w, energy(own, own), rtol=1e-10, atol=0)
    torch.testing.assert_close(right @ w, load + outflow - energy(lift, own), rtol=1e-9, atol=1e-9)
    assert torch.linalg.eigvalsh(matrix)[0] > 0
    # What is left of the discrete equations.
    residual = Residual.of_equations(form)
    expected = (right - matrix @ w).norm().item()
    assert residual.of_train(Train.of_components(factors).cores, [0, 1]) * residual.scale == pytest.approx(expected)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        ([Term(x=derivative(1)), Term(x=derivative(2))], r"has d/dx along axis 'x'; Galerkin's form takes second"),
        ([Term(-1.0, x=EXP * derivative(2))], r"has f\(x\) d\^2/dx\^2 along axis 'x'"),
        ([Term(-1.0, x=derivative(2) * EXP)], "not symmetric along axis 'x'"),
        ([Term(x=derivative(2))], r"the form is not positive: .* check the signs"),
        ([Term(-1.0, y=derivative(2))], "axis 'y' has a free end"),
    ],
)
def test_what_galerkin_refuses(operator, message):
    axes = [Axis("x", 0, 1, boundary="dirichlet"), Axis("y", 0, 1, boundary=("dirichlet", "neumann"))]
    if "free" in message:
        axes[1] = Axis("y", 0, 1, boundary=("free", "dirichlet"))
        with pytest.raises(ValueError, match="has a derivative of order 2 along axis 'y'"):
            Problem(axes, operator)
        axes[1] = Axis("y", 0, 1)
        problem = Problem(axes, operator, initial={"y": ([], [])})
    else:
        problem = Problem(axes, operator)
    with pytest.raises(ValueError, match=message):
        galerkin(Discretisation(problem))


def test_a_coefficient_that_jumps_over_a_period_is_not_symmetric():
    """Its flux does not agree at both ends, so that the integral by parts leaves something over."""
    around = Axis("x", 0, 1, boundary="periodic")
    flux = derivative(1) * EXP * derivative(1)
    with pytest.raises(ValueError, match="not symmetric along axis 'x'"):
        galerkin(Discretisation(Problem([around], [Term(-1.0, x=flux), Term()])))
    smooth = derivative(1) * multiply(lambda x: 2 + (2 * torch.pi * x).sin()) * derivative(1)
    galerkin(Discretisation(Problem([around], [Term(-1.0, x=smooth), Term()])))
