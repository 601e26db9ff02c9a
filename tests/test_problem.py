"""Problems as a user writes them: axes, operators of one axis, terms, and the error of every mistake."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sna_core import Axis, Problem, Product, Term, derivative, graded_breakpoints, multiply
from sna_core.bspline import UniformBSpline
from sna_core.graded import GradedBSpline
from sna_core.operators import Operator
from sna_core.spectral import ChebyshevBasis, FourierBasis, LegendreBasis

X = Axis("x", 0, 1, num_cells=4, boundary="dirichlet")
Y = Axis("y", 0, 2, num_cells=3, boundary=("neumann", "dirichlet"))
T = Axis("t", 0, 1, num_cells=4)
LAPLACE = [Term(-1.0, x=derivative(2)), Term(-1.0, y=derivative(2))]
HEAT = [Term(t=derivative(1)), Term(-1.0, x=derivative(2))]
ONE = [Term(x=multiply(torch.cos))]


def poisson(**options):
    return Problem(**({"axes": [X, Y], "operator": LAPLACE} | options))


def heat(**options):
    return Problem(**({"axes": [X, T], "operator": HEAT, "initial": {"t": ONE}} | options))


# Axes.


def test_an_axis_has_the_basis_that_it_names():
    assert Axis("x", 0, 1).basis == UniformBSpline(8, 3, 0.0, 1.0)
    assert Axis("x", -1, 1, num_cells=5, degree=2).basis == UniformBSpline(5, 2, -1.0, 1.0)
    edges = graded_breakpoints(0, 1, 6, 0.0, 0.01)
    graded = Axis("x", 0, 1, breakpoints=list(edges))
    assert graded.basis == GradedBSpline(edges, 3)
    assert (graded.num_cells, graded.basis.num_basis) == (6, 9)
    assert Axis("x", 0, 1, breakpoints=edges, num_cells=6) == graded
    for kind, basis in (("chebyshev", ChebyshevBasis), ("legendre", LegendreBasis), ("fourier", FourierBasis)):
        axis = Axis("x", 0, 2, kind=kind, num_basis=7)
        assert axis.basis == basis(7, 0.0, 2.0)
        assert (axis.num_cells, axis.degree, axis.num_basis) == (None, None, 7)


def test_ends_of_an_axis():
    assert Axis("x", 0, 1).ends == ("free", "free")
    assert Axis("x", 0, 1, boundary="periodic").ends == ("periodic", "periodic")
    assert Axis("x", 0, 1, boundary=["dirichlet", "free"]).ends == ("dirichlet", "free")
    assert Axis("x", 0, 1, kind="fourier", num_basis=5).ends == ("periodic", "periodic")


def test_coarser_axes():
    """Half the cells, on the same interval with the same ends."""
    assert Axis("x", 0, 1, num_cells=7, boundary="neumann").coarsened() == Axis(
        "x", 0, 1, num_cells=4, boundary="neumann"
    )
    edges = graded_breakpoints(0, 1, 7, 0.0, 0.01)
    for n in (1, 2, 6, 7):
        coarse = Axis("x", 0, edges[n], breakpoints=edges[: n + 1]).coarsened()
        assert coarse.num_cells == (n + 1) // 2
        assert (coarse.breakpoints[0], coarse.breakpoints[-1]) == (0, edges[n])
        assert set(coarse.breakpoints) <= set(edges)
    assert Axis("x", 0, 1, kind="legendre", num_basis=10).coarsened().num_basis == 8
    assert Axis("x", 0, 1, kind="fourier", num_basis=5).coarsened().num_basis in (3, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "my axis"}, "name = 'my axis'; expected a word"),
        ({"name": 3}, "name = 3; expected a word"),
        ({"kind": "wavelet"}, "kind = 'wavelet'; expected one of"),
        ({"low": 1}, "low < high"),
        ({"high": math.inf}, "finite"),
        ({"degree": 6}, "degree = 6"),
        ({"num_cells": 0}, "num_cells = 0"),
        ({"boundary": "robin"}, "boundary = 'robin'; expected one of"),
        ({"boundary": ("dirichlet", "robin")}, "expected one of"),
        ({"boundary": ("dirichlet",)}, "or a pair of the first three"),
        ({"boundary": ("periodic", "periodic")}, "or a pair of the first three"),
        ({"breakpoints": (0, 0.5)}, "go from 0.0 to 0.5; expected 0 to 1"),
        ({"breakpoints": (0,)}, "the breakpoints of axis 'x'"),
        ({"breakpoints": (0, 0.6, 0.4, 1)}, "expected finite edges that ascend"),
        ({"breakpoints": (0, 0.5, 1), "num_cells": 3}, "has 2 cells and num_cells = 3"),
        ({"kind": "chebyshev", "num_basis": 4, "breakpoints": (0, 1)}, "takes no breakpoints"),
        ({"kind": "chebyshev"}, "takes num_basis"),
        ({"kind": "legendre", "num_basis": 4, "num_cells": 3}, "num_cells = 3, but"),
        ({"kind": "legendre", "num_basis": 4, "degree": 3}, "degree = 3, but"),
        ({"kind": "fourier", "num_basis": 4}, "num_basis"),
        ({"kind": "fourier", "num_basis": 5, "boundary": "dirichlet"}, "is periodic, and has no ends for 'dirichlet'"),
        ({"num_basis": 5}, "leave num_basis out"),
        ({"name": "coefficient"}, "name = 'coefficient'; expected a word"),
        ({"boundary": None}, "boundary = None; expected one of"),
    ],
)
def test_bad_axes_raise(options, message):
    with pytest.raises(ValueError, match=message):
        Axis(**({"name": "x", "low": 0, "high": 1} | options))


# Operators of one axis.


def applied(operator, u, x):
    """By one autograd call for each factor."""
    x = x.clone().requires_grad_()
    values = u(x)
    for factor in reversed(operator.factors):
        if isinstance(factor, int):
            for _ in range(factor):
                (values,) = torch.autograd.grad(values.sum(), x, create_graph=True)
        else:
            values = factor(x) * values
    return values.detach()


FACTORS = [
    derivative(1),
    derivative(2),
    multiply(torch.exp),
    multiply(lambda x: 1 + x**2),
    multiply(torch.ones_like),
    multiply(lambda x: 3.0),
]


@given(st.lists(st.sampled_from(FACTORS), max_size=5))
def test_compositions_follow_leibniz(factors):
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    operator = Operator()
    for factor in factors:
        operator = operator * factor
    coefficients = operator.coefficients(x)
    assert len(coefficients) == operator.order + 1
    total, slopes = 0.0, x.clone().requires_grad_()
    values = (1.3 * slopes).sin()
    for c in coefficients:
        total = total + c * values.detach()
        (values,) = torch.autograd.grad(values.sum(), slopes, create_graph=True)
    torch.testing.assert_close(total, applied(operator, lambda x: (1.3 * x).sin(), x), rtol=1e-10, atol=1e-10)


def test_orders_of_a_product():
    x = torch.linspace(0, 1, 5, dtype=torch.float64)
    flux = derivative(1) * multiply(torch.exp)  # (f u)' = f' u + f u'
    assert [c.tolist() for c in flux.coefficients(x)] == [x.exp().tolist()] * 2
    assert [c.tolist() for c in (multiply(torch.exp) * derivative(1)).coefficients(x)] == [[0.0] * 5, x.exp().tolist()]
    assert flux.order == 1
    assert not flux.is_function
    assert (derivative(1) * derivative(1)).order == 2
    assert multiply(torch.exp).is_function
    assert torch.equal((multiply(torch.exp) * multiply(torch.sin)).values(x), x.exp() * x.sin())


def test_bad_operators_raise():
    for order in (0, -1, 1.0, "x"):
        with pytest.raises(ValueError, match=r"derivative\(.*expected an integer of at least 1"):
            derivative(order)
    with pytest.raises(ValueError, match="a number is the coefficient of a Term"):
        multiply(2.0)
    with pytest.raises(ValueError, match="write multiply"):
        derivative(1) * torch.exp
    x = torch.linspace(0, 1, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"f\(x\) has shape \(2,\); expected that of x, \(5,\)"):
        multiply(lambda x: x[:2]).values(x)
    with pytest.raises(ValueError, match=r"f\(0\) is not finite"):
        multiply(lambda x: 1 / x).values(x)


# Terms and the equation as text.


def test_bad_terms_raise():
    for coefficient in (math.nan, math.inf, "2", None, torch.ones(())):
        with pytest.raises(ValueError, match="expected a finite number, or a function of named axes"):
            Term(coefficient)
    for operator in (torch.exp, 2.0, 1):
        with pytest.raises(ValueError, match=r"expected derivative\(n\), multiply\(f\) or a product"):
            Term(x=operator)


def test_a_problem_reads_like_its_equation():
    problem = Problem(
        [X, T, Axis("nu", 0, 1)],
        operator=[
            Term(t=derivative(1)),
            Term(-2.0, nu=multiply(torch.exp), x=derivative(1) * multiply(torch.exp) * derivative(1)),
            Term(lambda x, t: x * t),
        ],
        source=lambda x, nu: x * nu,
        nonlinear=[Product(Term(), Term(x=derivative(1)))],
        initial={"t": []},
    )
    assert problem.describe() == "d/dt u - 2 f(nu) d/dx f(x) d/dx u + c(x, t) u + (u) (d/dx u) = c(x, nu)"
    assert poisson(source=[Term(3.0)]).describe() == "-1 d^2/dx^2 u - 1 d^2/dy^2 u = 3"
    assert Problem([T], [Term()]).describe() == "u = 0"
    assert Term(lambda x, t: x, y=derivative(1)).names == {"x", "t", "y"}
    assert repr(Term(2.0)) == "Term(2.0)"


# Problems.


def test_conditions_and_their_data():
    problem = poisson(boundary={"y": ([Term()], [Term(2.0)])})
    assert problem.conditions(X) == [("low", 0), ("high", 0)]
    assert problem.conditions(Y) == [("low", 1), ("high", 0)]
    assert problem.data(X) == [(), ()]
    assert [[term.coefficient for term in terms] for terms in problem.data(Y)] == [[1.0], [2.0]]
    wave = Problem([X, T], [Term(t=derivative(2)), *HEAT[1:]], initial={"t": (ONE, [])})
    assert wave.conditions(T) == [("low", 0), ("low", 1)]
    assert wave.data(T) == [ONE, []]
    assert wave.order(T) == wave.order(X) == 2
    assert wave.axis("t") is T


def test_a_function_of_several_axes_is_taken_apart():
    problem = poisson(source=lambda x, y: 1 / (1 + x + y), compression=1e-7)
    parts = problem.separated(problem.source)
    x, y = torch.rand(2, 200, dtype=torch.float64)
    found = sum(p.coefficient * p.operators["x"].values(x) * p.operators["y"].values(2 * y) for p in parts)
    assert (found - 1 / (1 + x + 2 * y)).abs().max() <= 1e-7
    # A term's own operators are kept, to the right of the function.
    (term, *others) = problem.separated([Term(lambda x: torch.exp(x), x=derivative(2), y=multiply(torch.sin))])
    assert not others
    c = term.operators["x"].coefficients(x)
    torch.testing.assert_close(c[2], x.exp(), rtol=1e-6, atol=1e-6)
    assert not c[0].any()
    assert not c[1].any()
    assert torch.equal(term.operators["y"].values(y), y.sin())
    plain = [Term(2.0), Term(x=multiply(torch.sin))]
    assert problem.separated(plain) == plain
    with pytest.raises(ValueError, match="split the box at a kink or a jump"):
        problem.separated(lambda x, y: (x > y).double())


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (poisson, {"axes": [X, X]}, r"the axes are named \['x', 'x'\]"),
        (poisson, {"axes": []}, "expected at least one"),
        (poisson, {"operator": []}, "the operator has no terms"),
        (poisson, {"operator": LAPLACE[0]}, "the operator = Term.*expected a list of Terms"),
        (poisson, {"operator": [derivative(2)]}, "the operator = .*expected a list of Terms"),
        (poisson, {"operator": [*LAPLACE, Term(z=derivative(1))]}, r"the operator names \['z'\], which are no axes"),
        (poisson, {"operator": [*LAPLACE, Term(lambda x, z: x)]}, r"the operator names \['z'\]"),
        (poisson, {"nonlinear": [Product(Term(), Term(z=derivative(1)))]}, r"the nonlinear part names \['z'\]"),
        (poisson, {"source": [Term(z=multiply(torch.sin))]}, r"the source names \['z'\]"),
        (poisson, {"source": lambda x, z: x * z}, r"the source names \['z'\]"),
        (poisson, {"source": [Term(x=derivative(1))]}, "the source has a derivative"),
        (poisson, {"source": Term()}, "the source = Term.*expected a list of Terms"),
        (poisson, {"source": [multiply(torch.sin)]}, "the source = .*expected a list of Terms"),
        (poisson, {"boundary": {"z": (None, None)}}, r"boundary names \['z'\]"),
        (poisson, {"boundary": {"x": [Term()]}}, "expected a pair of lists of terms, or None"),
        (poisson, {"boundary": {"x": ([Term()],)}}, "expected a pair of lists of terms, or None"),
        (poisson, {"boundary": {"x": (Term(), None)}}, "expected a list of Terms"),
        (poisson, {"boundary": {"x": (ONE, None)}}, r"boundary\['x'\] depends on \['x'\], on which it is given"),
        (poisson, {"boundary": {"x": ([Term(y=derivative(1))], None)}}, r"boundary\['x'\] has a derivative"),
        (poisson, {"initial": {"x": [Term()]}}, "an axis with initial data is 'free'"),
        (poisson, {"initial": {"z": [Term()]}}, r"initial names \['z'\]"),
        (heat, {"initial": {}}, r"order 1 along axis 't', which has 0 conditions; give initial=\{'t'"),
        (heat, {"initial": {"t": Term()}}, "expected a list of Terms"),
        (heat, {"initial": {"t": (ONE, ONE, ONE)}}, r"initial\['t'\] has 3 parts; expected .* a pair"),
        (heat, {"initial": {"t": (Term(), Term())}}, "expected a list of Terms"),
        (heat, {"initial": {"t": [Term(t=multiply(torch.sin))]}}, r"depends on \['t'\], on which it is given"),
        (heat, {"initial": {"t": [Term(x=derivative(1))]}}, "has a derivative"),
        (heat, {"boundary": {"t": ([Term()], None)}}, r"boundary\['t'\] has data for an end that is 'free'"),
        (heat, {"operator": [Term(t=derivative(2)), *HEAT[1:]]}, "order 2 along axis 't', which has 1 conditions"),
        (heat, {"axes": [Axis("x", 0, 1, boundary=("dirichlet", "free")), T]}, "give a boundary at both ends"),
        (heat, {"axes": [Axis("x", 0, 1), T]}, "order 2 along axis 'x', which has 0 conditions"),
        (
            heat,
            {"axes": [X, Axis("t", 0, 1, degree=0)], "initial": {"t": (ONE, ONE)}},
            "degree 0, too low for a condition on a derivative",
        ),
        (
            poisson,
            {"axes": [Axis("x", 0, 1, degree=0, boundary="neumann"), Y]},
            "axis 'x' has degree 0, too low",
        ),
    ],
)
def test_bad_problems_raise(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_an_unknown_axis_raises():
    with pytest.raises(ValueError, match=r"names \['z'\], which are no axes; the axes are \['x', 'y'\]"):
        poisson().axis("z")


def test_a_periodic_axis_needs_no_data():
    around = Axis("x", 0, 1, boundary="periodic")
    assert Problem([around, T], HEAT, initial={"t": []}).conditions(around) == []
