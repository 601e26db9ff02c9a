"""Sums of products that lower a form: blocks, Gauss-Newton steps and growth, against dense matrices and autograd."""

from dataclasses import replace
from functools import reduce
from itertools import pairwise

import pytest
import torch

from sna_core import Axis, Problem, Term, components, derivative, multiply
from sna_core.assembly import least_squares
from sna_core.components import ComponentSolver, grow
from sna_core.discretisation import Discretisation
from sna_core.forms import Components, conjugate_gradients, distance_to
from sna_core.tensor_train import Train


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_factors(sizes, rank, seed=0):
    g = generator(seed)
    return [torch.randn(size, rank, generator=g, dtype=torch.float64) for size in sizes]


def product(factors):
    letters = "abcdefgh"[: len(factors)]
    return torch.einsum(",".join(f"{c}r" for c in letters) + f"->{letters}", *factors)


def dense(form):
    matrix = sum(
        c * reduce(torch.kron, [m[s] for m, s in zip(form.matrices, index, strict=True)])
        for c, index in zip(form.coefficients, form.index, strict=True)
    )
    return matrix, product(form.right.factors).flatten()


@pytest.fixture(scope="module")
def form():
    """Of heat with a parameter, whose terms share matrices and are not symmetric one by one."""
    problem = Problem(
        [
            Axis("x", 0, 1, num_cells=3, boundary="dirichlet"),
            Axis("t", 0, 1, num_cells=2, degree=2),
            Axis("nu", 0.1, 1, kind="chebyshev", num_basis=3),
        ],
        [Term(t=derivative(1)), Term(x=derivative(1)), Term(-1.0, nu=multiply(lambda v: v), x=derivative(2))],
        source=[Term(x=multiply(torch.exp), t=multiply(torch.cos)), Term(nu=multiply(torch.exp))],
        initial={"t": [Term(x=multiply(lambda x: (torch.pi * x).sin()))]},
    )
    return least_squares(Discretisation(problem))[0]


def value(form, factors):
    matrix, right = dense(form)
    w = product(factors).flatten()
    return w @ matrix @ w - 2 * right @ w + form.constant


def test_the_form_of_components(form):
    factors = random_factors(form.sizes, 3)
    solver = ComponentSolver(form, factors)
    assert solver.rank == 3
    assert solver.value() == pytest.approx(value(form, factors).item(), rel=1e-12)
    torch.testing.assert_close(product(solver.factors), product(factors))
    norms = torch.stack([factor.norm(dim=0) for factor in solver.factors])
    torch.testing.assert_close(norms, norms[:1].expand(3, -1))  # sizes are shared


@pytest.mark.parametrize("whole_up_to", [400, 0])
def test_sweeps_lower_the_form(form, whole_up_to, monkeypatch):
    """With blocks that are factorised whole, and by conjugate gradients."""
    monkeypatch.setattr(components, "WHOLE_UP_TO", whole_up_to)
    solver = ComponentSolver(form, random_factors(form.sizes, 3))
    before = solver.value()
    for _ in range(10):
        solver.sweep()
        assert solver.value() <= before * (1 + 1e-9)
        before = solver.value()
    assert before < 0.1 * form.constant


def test_a_sweep_of_one_axis_is_its_minimum(form):
    """The last block that a sweep solves has no slope left."""
    solver = ComponentSolver(form, random_factors(form.sizes, 2))
    solver.sweep()
    last = solver.factors[-1].clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(form, [*solver.factors[:-1], last]), last)
    other = solver.factors[0].clone().requires_grad_()
    (others,) = torch.autograd.grad(value(form, [other, *solver.factors[1:]]), other)
    assert slope.norm() <= 1e-6 * others.norm()


def test_newton_step_has_the_matrix_of_gauss_and_newton(form, monkeypatch):
    seen = {}

    def watch(apply, precondition, right, start=None, **options):
        seen.setdefault("system", (apply, precondition, right))
        return conjugate_gradients(apply, precondition, right, start, **options)

    monkeypatch.setattr(components, "conjugate_gradients", watch)
    solver = ComponentSolver(form, random_factors(form.sizes, 2))
    factors, before, damping = [f.clone() for f in solver.factors], solver.value(), solver.damping
    solver.newton_step()
    apply, precondition, right = seen["system"]

    shapes = [f.shape for f in factors]
    flat = torch.cat([f.flatten() for f in factors])

    def array(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        return product([part.view(shape) for part, shape in zip(parts, shapes, strict=True)]).flatten()

    jacobian = torch.func.jacfwd(array)(flat)
    matrix, load = dense(form)
    expected = jacobian.mT @ matrix @ jacobian
    eye = torch.eye(len(flat), dtype=torch.float64)
    found = torch.stack([apply(row) for row in eye], 1)
    scale = expected.diagonal().mean()
    torch.testing.assert_close(found - expected, damping * scale * eye, rtol=1e-8, atol=1e-9 * scale.item())
    slope = -torch.func.grad(lambda flat: value(form, array_factors(flat, shapes)))(flat) / 2
    torch.testing.assert_close(right, slope, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(right, jacobian.mT @ (load - matrix @ array(flat)), rtol=1e-8, atol=1e-8)
    # The preconditioner is symmetric and positive.
    inverse = torch.stack([precondition(row) for row in eye], 1)
    torch.testing.assert_close(inverse, inverse.mT, rtol=1e-8, atol=1e-12)
    assert torch.linalg.eigvalsh(inverse)[0] > 0
    assert solver.value() < before


def array_factors(flat, shapes):
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def test_newton_steps_reach_a_minimum(form):
    solver = ComponentSolver(form, random_factors(form.sizes, 2, seed=3))
    values = [solver.value()]
    for _ in range(40):
        solver.newton_step(reduction=1e-3)
        values.append(solver.value())
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(values))
    factors = [f.clone().requires_grad_() for f in solver.factors]
    slopes = torch.autograd.grad(value(form, factors), factors)
    start = [f.clone().requires_grad_() for f in random_factors(form.sizes, 2, seed=3)]
    first = torch.autograd.grad(value(form, start), start)
    assert torch.stack([s.norm() for s in slopes]).max() <= 1e-4 * torch.stack([s.norm() for s in first]).max()


def test_alike_components_do_not_break_a_step(form):
    """Equal and zero components make every block singular."""
    factors = [torch.cat([f, f, 0 * f], 1) for f in random_factors(form.sizes, 1)]
    for step in (ComponentSolver.sweep, ComponentSolver.newton_step):
        solver = ComponentSolver(form, factors)
        before = solver.value()
        step(solver)
        assert solver.value() < before
        assert all(factor.isfinite().all() for factor in solver.factors)


@pytest.mark.parametrize("as_train", [False, True])
def test_growth_recovers_a_sum_of_known_rank(as_train):
    sizes, rank = (7, 6, 8), 4
    target = random_factors(sizes, rank, seed=5)
    right = Train.of_components(target) if as_train else Components(tuple(target))
    squared = product(target).square().sum().item()
    assert right.norm() == pytest.approx(squared**0.5, rel=1e-10)
    history = []
    found = grow(
        distance_to(right, sizes, squared),
        rank,
        tolerance=1e-7,
        num_newton_steps=100,
        generator=generator(1),
        on_step=lambda rank, value: history.append((rank, value)),
    )
    assert [tuple(f.shape) for f in found] == [(size, rank) for size in sizes]
    assert ((product(found) - product(target)).norm() / squared**0.5).item() <= 1e-6
    assert history[-1][0] == rank
    assert history[-1][1] <= 1e-6


def test_growth_in_the_norm_of_an_equation(form):
    """Rank by rank nearer to the dense least value."""
    matrix, right = dense(form)
    least = (form.constant - right @ torch.linalg.solve(matrix, right)).item()
    values = [value(form, grow(form, rank, generator=generator())).item() - least for rank in (1, 3, 9)]
    assert values[0] > 2 * values[1] > 4 * values[2]
    assert values[2] <= 1e-4 * form.constant
    assert values[2] >= -1e-10 * form.constant


def test_greedy_growth_leaves_what_it_has(form):
    """The proper generalised decomposition: nested, and no better than all components together."""
    one = grow(form, 1, greedy=True, generator=generator())
    four = grow(form, 4, greedy=True, generator=generator())
    torch.testing.assert_close(product([f[:, :1] for f in four]), product(one))
    values = [value(form, [f[:, :rank] for f in four]).item() for rank in range(5)]
    assert all(b < a for a, b in pairwise(values))
    assert value(form, grow(form, 4, generator=generator())).item() <= values[-1] * (1 + 1e-6)


def test_growth_ends_at_its_tolerance_and_with_nothing_to_fit():
    sizes = (5, 4, 6)
    target = random_factors(sizes, 2, seed=2)
    form = distance_to(Components(tuple(target)), sizes, product(target).square().sum().item())
    assert grow(form, 40, tolerance=1e-5, generator=generator())[0].shape[1] < 40
    nothing = replace(form, right=Components(tuple(torch.zeros(size, 1).double() for size in sizes)), constant=0.0)
    found = grow(nothing, 3, generator=generator())
    assert all(factor.isfinite().all() for factor in found)
    assert product(found).norm() <= 1e-10


def test_growth_is_reproducible(form):
    first, second = (grow(form, 3, generator=generator(4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
