import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoFeatureExtractor

from leviathan import FieldTokenizer
from leviathan.tokenization_leviathan import hilbert_order


def fields(batch=3, height=8, width=12, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, height, width)).astype(np.float32)


@given(
    num_bits=st.integers(1, 24),
    base=st.integers(2, 300),
    order=st.sampled_from(["raster", "hilbert"]),
    patch_size=st.sampled_from([1, 2, 4]),
    low=st.floats(-1e3, 1e3),
    width=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
def test_round_trip_error_is_at_most_half_a_level(num_bits, base, order, patch_size, low, width, seed):
    tokenizer = FieldTokenizer(patch_size, num_bits, base, low, low + width, order)
    inside = np.random.default_rng(seed).uniform(low, low + width, (2, 4, 8))
    ids = tokenizer(inside)["input_ids"]
    back = tokenizer.decode(ids, field_shape=(4, 8))
    # float32 of the output carries its own rounding
    slack = np.abs(inside).max() * 2.0**-23 + 1e-9 * tokenizer.level
    assert np.abs(back - inside).max() <= tokenizer.level / 2 + slack
    assert base ** (tokenizer.num_digits - 1) < tokenizer.vocab_size <= base**tokenizer.num_digits


@given(num_bits=st.integers(1, 12), order=st.sampled_from(["raster", "hilbert"]))
def test_ids_survive_decoding_and_encoding(num_bits, order):
    tokenizer = FieldTokenizer(2, num_bits, 16, -3.0, 5.0, order)
    ids = np.arange(4 * tokenizer.vocab_size).reshape(-1, 4) % tokenizer.vocab_size
    again = tokenizer(tokenizer.decode(ids))["input_ids"]
    assert np.array_equal(again, ids)


def test_quantisation_is_uniform_and_clipped():
    tokenizer = FieldTokenizer(1, 2, 2, low=0.0, high=4.0)
    values = np.array([[-1.0, 0.0, 0.99, 1.0, 2.5, 3.99, 4.0, 9.0]])
    out = tokenizer(values, return_num_clipped=True)
    assert out["input_ids"].ravel().tolist() == [0, 0, 0, 1, 2, 3, 3, 3]
    assert out["num_clipped"].tolist() == [2]
    assert tokenizer.decode(np.array([[0], [3]])).ravel().tolist() == [0.5, 3.5]
    assert tokenizer.level == 1.0


def test_patches_come_row_by_row():
    tokenizer = FieldTokenizer(2, 6, 8, low=-0.5, high=63.5)
    field = np.arange(24.0).reshape(4, 6)
    ids = tokenizer(field)["input_ids"]
    assert ids.shape == (6, 4)
    assert ids[0].tolist() == [0, 1, 6, 7]
    assert ids[1].tolist() == [2, 3, 8, 9]
    assert ids[3].tolist() == [12, 13, 18, 19]
    assert np.array_equal(tokenizer.decode(ids, field_shape=(4, 6))[0], field)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 32])
def test_hilbert_order_visits_every_pixel_by_steps_of_one(size):
    order = hilbert_order(size)
    assert sorted(order) == list(range(size * size))
    steps = np.abs(np.diff(order // size)) + np.abs(np.diff(order % size))
    assert (steps == 1).all()


def test_numpy_and_torch_one_field_and_many():
    tokenizer = FieldTokenizer(4).fit(fields())
    as_numpy, as_torch = tokenizer(fields()), tokenizer(torch.from_numpy(fields()))
    assert isinstance(as_numpy["input_ids"], np.ndarray)
    assert isinstance(as_torch["input_ids"], torch.Tensor)
    assert as_torch["input_ids"].dtype == torch.int64
    assert np.array_equal(as_numpy["input_ids"], as_torch["input_ids"].numpy())
    assert as_numpy["input_ids"].shape == (3 * 6, 16)
    assert np.array_equal(tokenizer(fields()[1])["input_ids"], as_numpy["input_ids"][6:12])
    assert isinstance(tokenizer(fields(), return_tensors="pt")["input_ids"], torch.Tensor)
    assert isinstance(tokenizer.decode(as_torch["input_ids"], (8, 12)), torch.Tensor)


def test_fit_takes_the_extremes_of_one_array_or_several():
    whole = FieldTokenizer(4).fit(fields())
    in_turn = FieldTokenizer(4).fit(iter(torch.from_numpy(fields())))
    assert (whole.low, whole.high) == (float(fields().min()), float(fields().max()))
    assert (in_turn.low, in_turn.high) == (whole.low, whole.high)
    assert whole(fields(), return_num_clipped=True)["num_clipped"].sum() == 0


def test_saved_and_auto_loaded(tmp_path):
    tokenizer = FieldTokenizer(4, 12, 64, order="hilbert").fit(fields())
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert isinstance(loaded, FieldTokenizer)
    assert loaded.to_dict() == tokenizer.to_dict()
    assert np.array_equal(loaded(fields())["input_ids"], tokenizer(fields())["input_ids"])


def test_numbers_of_numpy_and_torch_are_taken_and_saved(tmp_path):
    bits, base = np.int32(6), torch.tensor(8)
    low, high, rms = np.float32(-1), torch.tensor(1.0), np.float64(0.5)
    FieldTokenizer(np.int64(2), bits, base, low, high, margin=np.int8(1), rms=rms).save_pretrained(tmp_path)
    plain = FieldTokenizer(2, 6, 8, -1, 1, margin=1, rms=0.5)
    assert FieldTokenizer.from_pretrained(tmp_path).to_dict() == plain.to_dict()


def test_vocabulary():
    tokenizer = FieldTokenizer(num_bits=16, base=256)
    assert (tokenizer.vocab_size, tokenizer.num_digits, tokenizer.tokens_per_patch) == (65_536, 2, 4096)
    assert FieldTokenizer(num_bits=12, base=10).num_digits == 4


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.full((4, 4), np.nan), r"fields\[0, 0\] = nan; expected finite"),
        (np.where(np.eye(4) > 0, np.inf, 0.0), "= inf; expected finite"),
        (np.zeros(16), "expected .batch, height, width. or .height, width."),
        (np.zeros((1, 1, 4, 4)), "expected .batch"),
        (np.zeros((4, 6)), "6 does not divide into patches of 4 x 4"),
        (np.zeros((0, 0)), "does not divide"),
        (np.zeros((4, 4), complex), "expected real numbers"),
        (np.array([["a"]]), "expected real numbers"),
    ],
)
def test_bad_fields(bad, message):
    with pytest.raises(ValueError, match=message):
        FieldTokenizer(4, low=0.0, high=1.0)(bad)


def test_unfitted_says_what_to_do():
    for use in (lambda t: t(fields()), lambda t: t.decode(np.zeros((1, 16), int)), lambda t: t.level):
        with pytest.raises(ValueError, match="call fit"):
            use(FieldTokenizer(4))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((3, 16), int), r"expected \(batch x 2, 16\)"),
        (np.zeros((2, 15), int), "have shape"),
        (np.full((2, 16), 65_536), r"expected \[0, 65535\]"),
        (np.full((2, 16), -1), "span"),
        (np.zeros((2, 16)), "expected integers"),
    ],
)
def test_bad_ids(bad, message):
    with pytest.raises(ValueError, match=message):
        FieldTokenizer(4, low=0.0, high=1.0).decode(bad, field_shape=(4, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 0}, "patch_size = 0"),
        ({"num_bits": 0}, "num_bits = 0"),
        ({"num_bits": 25}, "expected 1 to 24"),
        ({"base": 1}, "base = 1"),
        ({"order": "snake"}, "'raster' or 'hilbert'"),
        ({"order": "hilbert", "patch_size": 6}, "power of two"),
        ({"low": 0.0}, "give both"),
        ({"low": 1.0, "high": 1.0}, "empty or not finite"),
        ({"low": 0.0, "high": float("inf")}, "empty or not finite"),
        ({"low": -1e308, "high": 1e308}, "empty or not finite"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        FieldTokenizer(**options)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((3, 4)), "empty"),
        (np.zeros((0, 4)), "no values"),
        ([], "no values"),
        (np.array([1.0, np.nan]), "finite"),
    ],
)
def test_bad_fit(data, message):
    with pytest.raises(ValueError, match=message):
        FieldTokenizer(4).fit(data)
    with pytest.raises(ValueError, match="return_tensors = 'tf'"):
        FieldTokenizer(4, low=0.0, high=1.0)(np.zeros((4, 4)), return_tensors="tf")
