import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sna_core.digits import digit_layout, to_digits


@given(st.integers(1, 300_000), st.integers(1, 4))
def test_digit_layout_is_the_least_base_that_suffices(num_embeddings, num_digits):
    base, digits = digit_layout(num_embeddings, num_digits=num_digits)
    assert digits == num_digits
    assert base**digits >= num_embeddings
    assert base == 2 or (base - 1) ** digits < num_embeddings


def test_default_layouts_are_the_published_ones():
    assert digit_layout(65_536) == (256, 2)
    assert digit_layout(200_376) == (59, 3)
    assert digit_layout(200, base=10) == (10, 3)


@given(st.integers(2, 20), st.integers(1, 4), st.booleans())
def test_digits_number_the_ids(base, num_digits, reflected):
    ids = torch.arange(min(base**num_digits, 5000))
    digits = to_digits(ids, base, num_digits, reflected)
    assert digits.min() >= 0
    assert digits.max() < base
    assert len({tuple(row) for row in digits.tolist()}) == len(ids)
    if reflected:
        assert ((digits[1:] - digits[:-1]).abs().sum(-1) == 1).all()  # neighbours stay neighbours at carries
    else:
        powers = base ** torch.arange(num_digits - 1, -1, -1)
        assert ((digits * powers).sum(-1) == ids).all()


def test_reflected_low_digit_runs_backwards_under_an_odd_high_digit():
    plain, reflected = (to_digits(torch.tensor([0x00FF, 0x0100]), 256, 2, r).tolist() for r in (False, True))
    assert plain == [[0, 255], [1, 0]]
    assert reflected == [[0, 255], [1, 255]]


@pytest.mark.parametrize("num_digits", [0, 64])
def test_as_many_digits_as_an_int64_has_and_no_more(num_digits):
    with pytest.raises(ValueError, match=f"num_digits = {num_digits}; expected at least 1 and at most 63"):
        digit_layout(10, 2, num_digits)
