"""Tensor trains against dense arrays, their alternation against the dense solution, and the order of axes."""

from functools import reduce
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sna_core import Axis, Problem, Term, derivative, multiply
from sna_core.assembly import least_squares
from sna_core.discretisation import Discretisation
from sna_core.ordering import best_order
from sna_core.tensor_train import Train, TrainSolver


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_train(sizes=(4, 5, 3, 6), ranks=(3, 7, 2), seed=0):
    bonds = [1, *ranks, 1]
    shapes = zip(bonds, sizes, bonds[1:], strict=False)
    return Train(tuple(random(*shape, seed=seed + k) for k, shape in enumerate(shapes)))


def random_factors(sizes, rank, seed=0):
    return [random(size, rank, seed=seed + k) for k, size in enumerate(sizes)]


def whole(train):
    """The array of a train."""
    return reduce(lambda a, b: torch.tensordot(a, b, 1), train.cores)[0, ..., 0]


def product(factors):
    letters = "abcdefgh"[: len(factors)]
    return torch.einsum(",".join(f"{c}r" for c in letters) + f"->{letters}", *factors)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# Trains.


@pytest.mark.parametrize("sizes", [(5,), (4, 3), (4, 5, 3), (3, 2, 4, 2)])
def test_a_sum_of_products_is_a_train(sizes):
    factors = random_factors(sizes, 3)
    train = Train.of_components(factors)
    torch.testing.assert_close(whole(train), product(factors))
    assert train.ranks == [3] * (len(sizes) - 1)
    assert [core.shape[1] for core in train.cores] == list(sizes)
    assert train.max_rank == (3 if len(sizes) > 1 else 1)


def test_sums_images_and_norms():
    one, other = random_train(), random_train(ranks=(2, 3, 4), seed=9)
    torch.testing.assert_close(whole(one + other), whole(one) + whole(other))
    torch.testing.assert_close(whole(one + -one), torch.zeros(4, 5, 3, 6).double(), atol=1e-12, rtol=0)
    assert (one + other).ranks == [5, 10, 6]
    assert one.norm() == pytest.approx(whole(one).norm().item(), rel=1e-12)
    assert (one + -one).norm() <= 1e-12 * one.norm()
    matrices = [random(n + 1, n) for n in (4, 5, 3, 6)]
    expected = torch.einsum("ea,fb,gc,hd,abcd->efgh", *matrices, whole(one))
    torch.testing.assert_close(whole(one.mapped(matrices)), expected)
    single = Train.of_components([random(5, 2)])
    torch.testing.assert_close(whole(single + single), 2 * whole(single))


def test_orthogonal_cores():
    train = random_train()
    found = train.orthogonal()
    torch.testing.assert_close(whole(found), whole(train))
    for core in found.cores[:-1]:
        torch.testing.assert_close(core.flatten(0, 1).mT @ core.flatten(0, 1), torch.eye(core.shape[2]).double())
    assert found.cores[-1].norm().item() == pytest.approx(train.norm())


@given(st.floats(-8, -0.5), st.integers(0, 5))
@settings(max_examples=25)
def test_rounding_keeps_within_its_tolerance(exponent, seed):
    tolerance = 10**exponent
    small, large = random_train(seed=seed), random_train(seed=seed + 50)
    train = large + Train((1e-3 * small.cores[0], *small.cores[1:]))
    found = train.rounded(tolerance)
    assert relative(whole(found), whole(train)) <= tolerance * (1 + 1e-6)
    assert all(a <= b for a, b in zip(found.ranks, train.ranks, strict=True))
    frames, inner = train.frames(tolerance)
    assert relative(whole(inner.mapped(frames)), whole(train)) <= tolerance * (1 + 1e-6)
    for frame in frames:
        torch.testing.assert_close(frame.mT @ frame, torch.eye(frame.shape[1]).double())


def test_rounding_finds_the_ranks():
    train = random_train(sizes=(6, 6, 6), ranks=(2, 3))
    assert (train + train).rounded(1e-12).ranks == [2, 3]
    torch.testing.assert_close(whole((train + train).rounded(1e-12)), 2 * whole(train))
    assert train.rounded(0.9).ranks == [1, 1]
    assert train.rounded(1e-12, max_rank=2).ranks == [2, 2]
    zero = Train(tuple(torch.zeros_like(core) for core in train.cores)).rounded(1e-3)
    assert zero.ranks == [1, 1]
    assert zero.norm() == 0
    frames, inner = Train.of_components(random_factors((9, 8, 7), 2)).frames(1e-12)
    assert [frame.shape for frame in frames] == [(9, 2), (8, 2), (7, 2)]
    assert [core.shape[1] for core in inner.cores] == [2, 2, 2]


def test_expansion_to_a_sum_of_products():
    train = random_train(sizes=(4, 5, 3), ranks=(2, 3))
    factors = train.expanded(6)
    assert [tuple(factor.shape) for factor in factors] == [(4, 6), (5, 6), (3, 6)]
    torch.testing.assert_close(product(factors), whole(train))
    assert train.expanded(5) is None
    torch.testing.assert_close(product(random_train().expanded(42)), whole(random_train()))
    (single,) = Train.of_components([random(5, 2)]).expanded(1)
    torch.testing.assert_close(single, random(5, 2).sum(1, keepdim=True))


def test_contractions():
    train, factors = random_train(), random_factors((4, 5, 3, 6), 2, seed=20)
    found, letters = train.contractions(factors), "abcd"
    for i in range(4):
        others = [f"{letters[j]}r" for j in range(4) if j != i]
        rest = [f for j, f in enumerate(factors) if j != i]
        expected = torch.einsum(f"abcd,{','.join(others)}->{letters[i]}r", whole(train), *rest)
        torch.testing.assert_close(found[i], expected)
    components = Train.of_components(random_factors((4, 5), 3))
    (first, _) = components.contractions(random_factors((4, 5), 2, seed=5))
    torch.testing.assert_close(first, whole(components) @ random_factors((4, 5), 2, seed=5)[1])


# The alternation.


def problem():
    """Heat with a drift and a parameter: not symmetric, with terms that share matrices."""
    return Problem(
        [
            Axis("x", 0, 1, num_cells=4, boundary="dirichlet"),
            Axis("t", 0, 1, num_cells=3),
            Axis("nu", 0.1, 1, kind="chebyshev", num_basis=4),
        ],
        [Term(t=derivative(1)), Term(x=derivative(1)), Term(-1.0, nu=multiply(lambda v: v), x=derivative(2))],
        source=[Term(x=multiply(torch.exp), t=multiply(torch.cos)), Term(nu=multiply(torch.exp))],
        initial={"t": [Term(x=multiply(lambda x: (torch.pi * x).sin()))]},
    )


@pytest.fixture(scope="module")
def equations():
    """A form, its residual and the dense solution of the normal equations."""
    form, residual = least_squares(Discretisation(problem()))
    matrix = 0.0
    for c, index in zip(form.coefficients, form.index, strict=True):
        matrix = matrix + c * reduce(torch.kron, [m[s] for m, s in zip(form.matrices, index, strict=True)])
    solution = torch.linalg.solve(matrix, product(form.right.factors).flatten()).view(form.sizes)
    return form, residual, solution


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_alternation_finds_the_dense_solution(equations, order):
    form, residual, solution = equations
    permuted = form.permuted(order)
    assert permuted.sizes == [form.sizes[i] for i in order]
    solver = TrainSolver(permuted, Train.of_components(random_factors(permuted.sizes, 2)))
    for _ in range(8):
        change = solver.sweep(1e-12)
    found = whole(solver.train).permute([order.index(i) for i in range(3)])
    assert relative(found, solution) <= 1e-9
    assert change <= 1e-8
    value = (form.constant - (solution * product(form.right.factors)).sum()).item()
    expected = value**0.5 / residual.scale
    assert residual.of_train(solver.cores, order) == pytest.approx(expected, rel=1e-6)


def test_ranks_follow_the_tolerance_and_the_limit(equations):
    form, residual, solution = equations
    before, ranks = 1.0, 0
    for cut in (0.3, 3e-2, 3e-3):
        solver = TrainSolver(form, Train.of_components(random_factors(form.sizes, 2)))
        for _ in range(5):
            solver.sweep(cut)
        error = relative(whole(solver.train), solution)
        assert error <= 20 * cut
        assert error < before
        assert sum(solver.train.ranks) > ranks
        before, ranks = error, sum(solver.train.ranks)
    for _ in range(3):
        solver.sweep(1e-12, max_rank=2)
    assert solver.train.max_rank == 2
    # The best of this rank is no further than the truncated solution, in the norm of the residual.
    limited = residual.of_train(solver.cores, [0, 1, 2])
    cores = TrainSolver(form, Train.of_components(random_factors(form.sizes, 1))).cores
    assert limited < residual.of_train(cores, [0, 1, 2])


def test_one_and_two_axes():
    for names in ("x", "xy"):
        axes = [Axis(name, 0, 1, num_cells=5, boundary="dirichlet") for name in names]
        operator = [Term(-1.0, **{name: derivative(2)}) for name in names]
        form, residual = least_squares(Discretisation(Problem(axes, operator, source=[Term(x=multiply(torch.exp))])))
        solver = TrainSolver(form, Train.of_components(random_factors(form.sizes, 1)))
        for _ in range(8):
            solver.sweep(1e-13)
        matrix = sum(
            c * reduce(torch.kron, [m[s] for m, s in zip(form.matrices, index, strict=True)])
            for c, index in zip(form.coefficients, form.index, strict=True)
        )
        expected = torch.linalg.solve(matrix, product(form.right.factors).flatten()).view(form.sizes)
        assert relative(whole(solver.train), expected) <= 1e-9
        assert residual.of_train(solver.cores, range(len(names))) > 0


# The order of axes.


def pair(size=6, rank=4, seed=0):
    return random_factors((size, size), rank, seed)


def order_of(factors):
    values = Train.of_components(factors).tensor()
    return best_order(values, values.shape, 1e-9)


def test_axes_that_depend_on_each_other_become_neighbours():
    """f(x, z) + g(y, w) as a product: ranks of 4 within a pair and of 1 between pairs."""
    x, z = pair(seed=0)
    y, w = pair(seed=5)
    rank = 4
    # All products of a component of one pair and one of the other.
    factors = [
        x.repeat_interleave(rank, 1),
        y.repeat(1, rank),
        z.repeat_interleave(rank, 1),
        w.repeat(1, rank),
    ]
    order = order_of(factors)
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}
    ranks = Train.of_components([factors[i] for i in order]).rounded(1e-10).ranks
    assert ranks == [4, 1, 4]
    assert Train.of_components(factors).rounded(1e-10).ranks == [4, 16, 4]


@given(st.permutations(range(4)), st.permutations([2, 5, 3, 7]), st.permutations([1, 2, 4]))
@settings(max_examples=30)
def test_the_order_found_is_the_best_of_all(places, sizes, ranks):
    """Trains in a hidden order, against the size of every order's train."""
    hidden = random_train([sizes[i] for i in places], ranks, seed=3).rounded(1e-12)
    factors = [hidden.expanded(8)[places.index(i)] for i in range(4)]

    def size(order):
        bonds = [1, *Train.of_components([factors[i] for i in order]).rounded(1e-9).ranks, 1]
        return sum(a * sizes[i] * b for a, i, b in zip(bonds, order, bonds[1:], strict=False))

    assert size(order_of(factors)) == min(size(order) for order in permutations(range(4)))


def test_a_tensor_becomes_a_train_and_a_train_a_tensor():
    values = Train.of_components(random_factors((4, 3, 5), 2)).tensor()
    train = Train.of_tensor(values, 1e-12)
    assert train.ranks == [2, 2]
    torch.testing.assert_close(train.tensor(), values)


def test_orders_of_few_axes():
    assert order_of([random(5, 2)]) == [0]
    assert sorted(order_of(random_factors((4, 5), 3))) == [0, 1]
