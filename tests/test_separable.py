import copy
import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sna_core.bspline import UniformBSpline
from sna_core.interaction import InteractionObject
from sna_core.network import CPNetwork
from sna_core.separable import DECOMPOSITIONS, CPAtoms, SeparableNetwork
from sna_core.spectral import BASES, ChebyshevBasis, LegendreBasis, make_basis
from tests.test_interaction import interactions
from tests.test_network import fit

FAMILIES = {
    "additive": SeparableNetwork.additive,
    "pairwise": lambda *args, **kwargs: SeparableNetwork.pairwise(*args, rank=3, **kwargs),
    "cp": lambda *args, **kwargs: SeparableNetwork.cp(*args, rank=3, **kwargs),
    "tucker": lambda *args, **kwargs: SeparableNetwork.tucker(*args, rank=3, **kwargs),
    "tensor_train": lambda *args, **kwargs: SeparableNetwork.tensor_train(*args, rank=3, **kwargs),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def bases_of(kind, num_inputs):
    """Bases of seven functions on intervals of various widths."""
    sizes = {"num_cells": 4, "degree": 3} if kind == "bspline" else {"num_basis": 7}
    bases = [make_basis(kind, -1.0 - i, 1.0 + i, **sizes) for i in range(num_inputs)]
    return [basis.double() for basis in bases] if kind == "mlp" else bases


def points(network, *shape):
    low, high = (torch.tensor([getattr(b, end) for b in network.bases]).double() for end in ("low", "high"))
    return low + (high - low) * torch.rand(*shape, network.num_inputs, dtype=torch.float64)


def scramble(network):
    """Parameters of every sign, other for each output."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return network


def textbook(network, x):
    """Each family's formula in loops over numbers: points (points, d) -> (points, num_outputs)."""
    values = np.zeros((len(x), network.num_outputs))
    named = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    dense = [basis.dense(x[:, i]).detach().numpy() for i, basis in enumerate(network.bases)]
    r = network.rank
    for z, o in product(range(len(x)), range(network.num_outputs)):
        for s, subset in enumerate(network.interaction.subsets):
            m = len(subset)
            of_size = [other for other in network.interaction.subsets if len(other) == m]
            sizes = sorted({len(other) for other in network.interaction.subsets})
            n, group = of_size.index(subset), f"atoms.{sizes.index(m)}"
            basis = [dense[i][z] for i in subset]
            if m == 1:
                phi = basis[0] @ named[f"{group}.factors"][n, 0, :, o, 0]
            elif network.decomposition == "cp" or (network.decomposition == "tensor_train" and m == 2):
                alpha = named[f"{group}.factors"]
                phi = sum(math.prod(basis[p] @ alpha[n, p, :, o, j] for p in range(m)) for j in range(r))
            elif network.decomposition == "tucker":
                alpha, core = named[f"{group}.factors"], named[f"{group}.core"]
                phi = sum(
                    core[(n, o, *j)] * math.prod(basis[p] @ alpha[n, p, :, o, j[p]] for p in range(m))
                    for j in product(range(r), repeat=m)
                )
            else:
                ends, matrices = named[f"{group}.ends"], named[f"{group}.matrices"]
                row = [basis[0] @ ends[n, 0, :, o, a] for a in range(r)]
                for p in range(m - 2):
                    between = matrices[n, p, :, o]
                    row = [sum(row[a] * (basis[p + 1] @ between[:, a, b]) for a in range(r)) for b in range(r)]
                phi = sum(row[a] * (basis[-1] @ ends[n, 1, :, o, a]) for a in range(r))
            values[z, o] += named["coefficients"][o, s] * phi
    return values


@each_family
@pytest.mark.parametrize("kind", BASES)
def test_each_family_equals_its_textbook_formula(family, kind):
    network = scramble(FAMILIES[family](bases_of(kind, 3), 2, dtype=torch.float64))
    x = points(network, 4)
    expected = textbook(network, x)
    np.testing.assert_allclose(network(x).detach(), expected, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(network.reference_forward(x).detach(), expected, rtol=1e-11, atol=1e-11)


@given(
    interactions(),
    st.sampled_from(sorted(DECOMPOSITIONS)),
    st.sampled_from(sorted(BASES)),
    st.integers(1, 3),
    st.integers(1, 2),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_interaction_object_equals_the_formula(interaction, decomposition, kind, rank, num_outputs, learned):
    network = SeparableNetwork(
        interaction,
        bases_of(kind, interaction.num_inputs),
        num_outputs,
        rank=rank,
        decomposition=decomposition,
        learn_coefficients=learned,
        dtype=torch.float64,
    )
    c = torch.tensor([c for _, c in interaction.coefficients]).double()
    torch.testing.assert_close(network.coefficients.detach(), c.expand(num_outputs, -1))
    scramble(network)
    x = points(network, 2)
    expected = textbook(network, x)
    np.testing.assert_allclose(network(x).detach(), expected, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn(2, num_outputs, dtype=torch.float64)
    gradients = [
        torch.autograd.grad(y, list(network.parameters()), cotangent, allow_unused=True)
        for y in (network(x), network.reference_forward(x))
    ]
    for ours, oracle in zip(*gradients, strict=True):
        if oracle is None:  # a learned basis of an input that is in no subset
            assert ours is None
        else:
            torch.testing.assert_close(ours, oracle, rtol=1e-10, atol=1e-10)


@given(num_inputs=st.integers(1, 5), rank=st.integers(1, 4), num_outputs=st.integers(1, 3), degree=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_cp_with_splines_is_the_cp_network(num_inputs, rank, num_outputs, degree):
    oracle = CPNetwork(num_inputs, num_outputs, rank=rank, num_cells=5, degree=degree, dtype=torch.float64)
    splines = [UniformBSpline(5, degree)] * num_inputs
    if num_inputs == 1:  # a sum of functions of one input is one function
        factors = (oracle.factors * oracle.weights).sum(-1, keepdim=True)
    else:
        factors = oracle.factors.clone()
        factors[0] *= oracle.weights
    network = SeparableNetwork.cp(splines, num_outputs, rank=rank, learn_coefficients=False, dtype=torch.float64)
    network.load_state_dict({"atoms.0.factors": factors[None].detach(), "coefficients": torch.ones(num_outputs, 1)})
    x = torch.rand(6, num_inputs, dtype=torch.float64)
    torch.testing.assert_close(network(x), oracle(x))


@pytest.mark.parametrize("num_inputs", [2, 3, 4])
def test_cp_is_tucker_with_a_diagonal_core_and_a_train_of_diagonal_matrices(num_inputs):
    bases, rank = bases_of("legendre", num_inputs), 3
    cp = scramble(SeparableNetwork.cp(bases, 2, rank=rank, dtype=torch.float64))
    factors = cp.atoms[0].factors.detach()
    x = points(cp, 10)
    tucker = SeparableNetwork.tucker(bases, 2, rank=rank, dtype=torch.float64)
    tucker.load_state_dict(cp.state_dict(), strict=False)
    with torch.no_grad():
        tucker.atoms[0].core.zero_()
        for j in range(rank):
            tucker.atoms[0].core[(0, slice(None), *[j] * num_inputs)] = 1.0
    torch.testing.assert_close(tucker(x), cp(x))
    train = SeparableNetwork.tensor_train(bases, 2, rank=rank, dtype=torch.float64)
    assert isinstance(train.atoms[0], CPAtoms) == (num_inputs == 2)
    if num_inputs > 2:
        state = {"ends": factors[:, [0, -1]], "matrices": torch.diag_embed(factors[:, 1:-1])}
        train.atoms[0].load_state_dict(state)
        train.coefficients.data.copy_(cp.coefficients)
        torch.testing.assert_close(train(x), cp(x))


def test_an_additive_model_has_no_interactions_and_a_pairwise_one_none_of_three():
    additive = scramble(SeparableNetwork.additive(bases_of("chebyshev", 3), dtype=torch.float64))
    pairwise = scramble(SeparableNetwork.pairwise(bases_of("chebyshev", 3), rank=3, dtype=torch.float64))
    x = points(additive, 1)[0]
    hessian = torch.autograd.functional.hessian(lambda x: additive(x).sum(), x)
    torch.testing.assert_close(hessian, hessian.diag().diag())

    def corner(network, x, y):  # the mixed difference over all three inputs
        corners = [torch.where(torch.tensor(bits), x, y) for bits in product([True, False], repeat=3)]
        signs = [(-1) ** sum(bits) for bits in product([1, 0], repeat=3)]
        return (network(torch.stack(corners))[:, 0] * torch.tensor(signs)).sum().item()

    y = points(additive, 1)[0]
    assert abs(corner(pairwise, x, y)) < 1e-11
    assert abs(corner(scramble(SeparableNetwork.cp(bases_of("chebyshev", 3), rank=3).double()), x, y)) > 1e-3


def test_bases_of_several_kinds():
    bases = [UniformBSpline(4, 3), UniformBSpline(5, 2), ChebyshevBasis(7), LegendreBasis(7, -1.0, 3.0)]
    network = scramble(SeparableNetwork(InteractionObject.up_to(4, 3), bases, rank=2, dtype=torch.float64))
    x = points(network, 3)
    np.testing.assert_allclose(network(x).detach(), textbook(network, x), rtol=1e-11, atol=1e-11)


@each_family
@pytest.mark.parametrize("kind", ["bspline", "fourier", "mlp"])
def test_gradcheck(family, kind):
    network = FAMILIES[family](bases_of(kind, 3), 2, activation="tanh", dtype=torch.float64)
    x = points(network, 2).requires_grad_()
    names, parameters = zip(*network.named_parameters(), strict=True)

    def f(x, *parameters):
        return torch.func.functional_call(network, dict(zip(names, parameters, strict=True)), (x,), {"check": False})

    assert torch.autograd.gradcheck(f, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: f(x, *parameters), x, fast_mode=True)


@each_family
def test_shapes_state_and_copies(family):
    network, other = (FAMILIES[family](bases_of("mlp", 3), 2, dtype=torch.float64) for _ in range(2))
    for shape in [(), (5,), (2, 3), (0,)]:
        x = points(network, *shape)
        assert network(x).shape == network.reference_forward(x).shape == (*shape, 2)
    x = points(network, 9)
    before = network(x)
    assert torch.equal(copy.deepcopy(network)(x), before)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x), before)
    network.reset_parameters()
    assert not torch.equal(network(x), before)
    assert "interaction_order=" in repr(network)


@each_family
@pytest.mark.parametrize("kind", ["bspline", "legendre", "mlp"])
def test_outputs_at_the_start_neither_vanish_nor_explode(family, kind):
    for num_inputs in (2, 5):
        network = FAMILIES[family](bases_of(kind, num_inputs), 1024, dtype=torch.float64)
        y = network(points(network, 32))
        assert abs(y.mean().item()) < 0.5
        assert 0.6 < y.var().item() < 1.3 * math.e
        assert y.var(0).mean().item() > 0.05  # over the box, not only between draws


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("additive", 4 * 7 + 4),
        ("pairwise", 4 * 7 + 6 * 2 * 3 * 7 + 10),
        ("cp", 4 * 3 * 7 + 1),
        ("tucker", 4 * 3 * 7 + 3**4 + 1),
        ("tensor_train", 2 * 3 * 7 + 2 * 3**2 * 7 + 1),
    ],
)
def test_parameter_count(family, expected):
    assert sum(p.numel() for p in FAMILIES[family](bases_of("legendre", 4)).parameters()) == expected
    fixed = FAMILIES[family](bases_of("legendre", 4), learn_coefficients=False)
    assert sum(p.numel() for p in fixed.parameters()) == expected - fixed.coefficients.numel()
    assert "coefficients" in fixed.state_dict()


def test_activation_acts_on_the_sum():
    networks = [SeparableNetwork.pairwise(bases_of("fourier", 3), rank=2, activation=a) for a in (None, "exp")]
    networks[1].load_state_dict(networks[0].state_dict())
    x = torch.rand(5, 3)
    torch.testing.assert_close(networks[1](x), networks[0](x).exp())
    torch.testing.assert_close(networks[1].reference_forward(x), networks[0](x).exp())


@each_family
def test_blocks_of_points_change_neither_values_nor_gradients(family, monkeypatch):
    network = FAMILIES[family](bases_of("legendre", 3), 2, dtype=torch.float64)
    x = points(network, 5, 7).requires_grad_()
    results = []
    for block in (2**20, 30):
        monkeypatch.setattr("sna_core.network.BLOCK_NUMEL", block)
        sizes = []
        monkeypatch.setattr(
            network, "_evaluate", lambda p, s=sizes: s.append(len(p)) or type(network)._evaluate(network, p)
        )
        y = network(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *network.parameters()])])
    assert len(sizes) > 1
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_compiles_to_one_graph():
    network = SeparableNetwork(InteractionObject.up_to(3, 3), bases_of("bspline", 3), rank=2, dtype=torch.float64)
    x = points(network, 8)
    compiled = torch.compile(lambda x: network(x, check=False), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), network(x))


def test_can_be_built_without_memory_and_filled_later():
    for decomposition in DECOMPOSITIONS:
        options = {"rank": 2, "decomposition": decomposition, "dtype": torch.float64}
        filled = SeparableNetwork.cp(bases_of("mlp", 3), **options)
        with torch.device("meta"):
            network = SeparableNetwork.cp(bases_of("mlp", 3), **options)
        network = network.to_empty(device="cpu")
        network.load_state_dict(filled.state_dict())
        x = points(filled, 5)
        assert torch.equal(network(x), filled(x))


def oblique(x):
    """A ridge across the diagonal of the unit square: of no finite rank."""
    return 1 / (1 + 10 * (x[:, :1] - x[:, 1:2]) ** 2)


@pytest.mark.parametrize("kind", ["bspline", "chebyshev"])
@pytest.mark.parametrize("decomposition", ["cp", "tucker"])
def test_error_falls_with_rank_where_the_target_is_not_separable(kind, decomposition):
    x = torch.rand(400, 2, dtype=torch.float64)
    sizes = {"num_cells": 8, "degree": 3} if kind == "bspline" else {"num_basis": 11}
    errors = []
    for rank in (1, 2, 4):
        torch.manual_seed(0)
        options = {"rank": rank, "decomposition": decomposition, "dtype": torch.float64}
        network = SeparableNetwork.cp([make_basis(kind, **sizes)] * 2, **options)
        errors.append(fit(network, x, oblique(x), num_steps=120))
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2


def test_error_falls_with_cells():
    x = torch.rand(600, 2, dtype=torch.float64)
    errors = []
    for num_cells in (1, 3, 9):
        torch.manual_seed(0)
        network = SeparableNetwork.cp([UniformBSpline(num_cells, 3)] * 2, rank=6, dtype=torch.float64)
        errors.append(fit(network, x, oblique(x), num_steps=200))
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3


def test_error_falls_with_the_interaction_order():
    x = torch.rand(500, 3, dtype=torch.float64)
    y = (x.prod(-1, keepdim=True) * 3).sin() + x[:, :1] * x[:, 1:2] + x[:, 2:].exp()
    errors = []
    for order in (1, 2, 3):
        torch.manual_seed(0)
        interaction = InteractionObject.up_to(3, order)
        network = SeparableNetwork(
            interaction, [LegendreBasis(5)] * 3, rank=3, decomposition="tensor_train", dtype=torch.float64
        )
        errors.append(fit(network, x, y, num_steps=120))
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n, x: n(x[:, :2]), r"x has shape \(5, 2\); expected \(\.\.\., 3\)"),
        (lambda n, x: n(x.float()), r"x\.to\(torch\.float64\)"),
        (
            lambda n, x: n(x.index_fill(0, torch.tensor(2), 9.0)),
            r"x\[2, 0\] = 9 lies outside input 0's interval \[-1, 1",
        ),
        (lambda n, x: n(x * math.nan), "is not a number"),
        (lambda n, x: SeparableNetwork(n.interaction, n.bases[:2], rank=1), "2 bases for 3 inputs; give one for each"),
        (
            lambda n, x: SeparableNetwork.cp([UniformBSpline(4, 3), LegendreBasis(6)], rank=1),
            r"num_basis \[6, 7\]; expected one number",
        ),
        (
            lambda n, x: SeparableNetwork.cp(bases_of("mlp", 2), rank=1),
            r"is torch\.float64 and the network torch\.float32",
        ),
        (lambda n, x: SeparableNetwork.cp(n.bases, rank=0), "rank = 0; expected an integer of at least 1"),
        (lambda n, x: SeparableNetwork.cp(n.bases, 0, rank=1), "num_outputs = 0"),
        (lambda n, x: SeparableNetwork.cp(n.bases, rank=1, decomposition="parafac"), "decomposition = 'parafac'"),
        (lambda n, x: SeparableNetwork.cp(n.bases, rank=1, activation="swish"), "activation = 'swish'; expected None"),
        (
            lambda n, x: SeparableNetwork.tucker([LegendreBasis(3)] * 20, rank=8),
            r"Tucker core of rank 8 over 20 inputs has \d+ entries; .* 'tensor_train'",
        ),
    ],
)
def test_bad_input_raises(call, message):
    network = SeparableNetwork.pairwise(bases_of("bspline", 3), rank=2, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        call(network, points(network, 5))
