import copy
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sna_core.interaction import InteractionObject


@st.composite
def interactions(draw, max_inputs=4, max_order=4):
    num_inputs = draw(st.integers(1, max_inputs))
    sizes = range(1, min(num_inputs, max_order) + 1)
    subsets = [subset for m in sizes for subset in combinations(range(num_inputs), m)]
    chosen = draw(st.lists(st.sampled_from(subsets), min_size=1, unique=True))
    numbers = st.floats(-5, 5).filter(lambda c: abs(c) > 1e-3)
    return InteractionObject(num_inputs, {subset: draw(numbers) for subset in chosen})


@given(interactions(), st.data())
@settings(max_examples=80, deadline=None)
def test_embedding_is_one_to_one_and_sparse(interaction, data):
    k, d = interaction.interaction_order, interaction.num_inputs
    order = data.draw(st.one_of(st.none(), st.integers(k, 5)))
    tensor = interaction.tensor(order)
    assert tensor.shape == (d,) * (order or d)
    assert InteractionObject.from_tensor(tensor) == interaction
    for index in product(range(d), repeat=tensor.ndim):
        subset = tuple(sorted(set(index)))
        value = tensor[index].item()
        assert value in (0.0, dict(interaction.coefficients).get(subset, 0.0))
        if len(subset) > k:  # k-sparse
            assert value == 0
    assert tensor.count_nonzero() == len(interaction.subsets)


@given(interactions(max_inputs=7, max_order=2))
@settings(max_examples=80, deadline=None)
def test_rank_bound_is_no_less_than_the_rank_of_the_matrix_of_pairs(interaction):
    if interaction.num_inputs > 1:
        rank = torch.linalg.matrix_rank(interaction.tensor(2)).item()
        assert rank <= interaction.rank_bound(2) <= len(interaction.subsets)


@given(interactions())
@settings(max_examples=60, deadline=None)
def test_rank_bound_is_no_less_than_the_rank_of_any_unfolding(interaction):
    tensor, bound = interaction.tensor(), interaction.rank_bound()
    for axis in range(tensor.ndim):
        unfolding = tensor.movedim(axis, 0).flatten(1) if tensor.ndim > 1 else tensor[:, None]
        assert torch.linalg.matrix_rank(unfolding).item() <= bound
    interaction.check_rank(bound)
    with pytest.raises(ValueError, match=f"is bounded by {bound}, above rank = {bound - 1}"):
        interaction.check_rank(bound - 1)


def test_rank_bounds_of_the_families():
    assert InteractionObject.full(20).rank_bound() == 1
    assert InteractionObject.additive(20).rank_bound() == 20  # the diagonal
    assert InteractionObject.additive(20).rank_bound(1) == 1  # a vector
    assert InteractionObject.pairwise(20).rank_bound() == 20  # of 210 subsets
    star = InteractionObject(20, {(0, i): 1.0 for i in range(1, 20)})
    assert star.rank_bound(2) == 1


def test_families():
    assert InteractionObject.additive(3).subsets == ((0,), (1,), (2,))
    assert InteractionObject.pairwise(3).subsets == ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2))
    assert InteractionObject.full(3).subsets == ((0, 1, 2),)
    assert InteractionObject.up_to(3, 3).subsets[-1] == (0, 1, 2)
    assert InteractionObject.pairwise(1) == InteractionObject.additive(1) == InteractionObject.full(1)
    for k in range(1, 5):
        interaction = InteractionObject.up_to(4, k)
        assert interaction.interaction_order == k
        assert {c for _, c in interaction.coefficients} == {1.0}


def test_it_is_a_value():
    one = InteractionObject(3, {(1, 2): 2, (0,): -1.0})
    other = InteractionObject(3, [((0,), -1.0), ([1, 2], 2.0)])
    assert one == other == copy.deepcopy(one)
    assert len({one, other}) == 1
    assert one != InteractionObject(4, {(1, 2): 2, (0,): -1.0})
    assert one.coefficients == (((0,), -1.0), ((1, 2), 2.0))
    assert one.tensor(2, dtype=torch.float32).tolist() == [[-1, 0, 0], [0, 0, 2], [0, 0, 0]]
    with pytest.raises(AttributeError):
        one.num_inputs = 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: InteractionObject(0, {(0,): 1.0}), "num_inputs = 0"),
        (lambda: InteractionObject(2, {}), "no subset"),
        (lambda: InteractionObject(2, {(): 1.0}), "a subset is empty"),
        (lambda: InteractionObject(2, {(0, 2): 1.0}), r"subset \(0, 2\) names input 2; expected integers from 0 to 1"),
        (lambda: InteractionObject(2, {(-1,): 1.0}), "names input -1"),
        (lambda: InteractionObject(2, {(0.5,): 1.0}), r"names input 0\.5"),
        (lambda: InteractionObject(2, {(1, 0): 1.0}), r"\(1, 0\) is not sorted or repeats an input; expected \(0, 1\)"),
        (lambda: InteractionObject(2, {(1, 1): 1.0}), r"expected \(1,\)"),
        (lambda: InteractionObject(2, [((0,), 1.0), ((0,), 2.0)]), r"subset \(0,\) is given twice"),
        (lambda: InteractionObject(2, {(0,): 0.0}), "not zero"),
        (lambda: InteractionObject(2, {(0,): float("nan")}), "coefficient nan"),
        (lambda: InteractionObject.up_to(2, 3), "interaction_order = 3; expected an integer from 1 to num_inputs = 2"),
        (lambda: InteractionObject.up_to(2, 0), "interaction_order = 0"),
        (lambda: InteractionObject.full(3).tensor(2), "order = 2; expected at least 3"),
        (lambda: InteractionObject.full(3).rank_bound(1), "order = 1; expected at least 3"),
        (lambda: InteractionObject.additive(30).tensor(), r"30\^30 entries; ask for a lower order, down to order = 1"),
        (lambda: InteractionObject.from_tensor(torch.ones(2, 3)), r"shape \(2, 3\); expected equal sides"),
        (lambda: InteractionObject.from_tensor(torch.tensor(1.0)), r"shape \(\)"),
        (lambda: InteractionObject.from_tensor(torch.ones(2, 2)), r"entry \(1, 0\) is not zero.* at \(0, 1\)"),
        (lambda: InteractionObject.from_tensor(torch.zeros(2, 2)), "no subset"),
    ],
)
def test_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
