"""Orders of tokens: right counts, right factors, a position for each token, and structure that was put in is found."""

import json
from typing import get_args

import numpy as np
import pytest
import scipy.sparse as sparse
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from sna_core import SeparableEmbedding
from training import assignment, token_order, train
from training.assignment import CONTROLS, Method, assign, order_quality, short_path
from training.settings import read_settings
from training.token_order import OrderSettings, cooccurrence, factors, load_order, ppmi, save_order
from training.tokenizer import train_bpe

METHODS = get_args(Method)
SEEKING = ("kmeans", "transport")
WORDS = {
    "sea": ["ebb", "bay", "cod", "fog", "sail", "tide", "foam", "isle"],
    "law": ["sue", "bar", "act", "oath", "plea", "jury", "fine", "deed"],
}


def naive_counts(sequences, vocab_size, window):
    counts = np.zeros((vocab_size, vocab_size))
    for ids in sequences:
        for i, one in enumerate(ids):
            for j, other in enumerate(ids):
                if 1 <= abs(i - j) <= window:
                    counts[one, other] += 1 / abs(i - j)
    return counts


def planted(base, seed=0, noise=0.02):
    """Tokens in random order with factors A[i] + B[j]: (V, d), and i, j of each."""
    generator = np.random.default_rng(seed)
    one, other = generator.standard_normal((2, base, 12))
    i, j = np.divmod(generator.permutation(base**2), base)
    return 3 * one[i] + other[j] + noise * generator.standard_normal((base**2, 12)), i, j


sequences_of = st.lists(st.lists(st.integers(0, 6), max_size=20), max_size=6)


@given(sequences_of, st.integers(1, 25), st.integers(1, 30))
def test_counts_are_those_of_a_double_loop(sequences, window, chunk_tokens):
    found = cooccurrence([np.array(ids, np.int32) for ids in sequences], 7, window, chunk_tokens=chunk_tokens)
    assert isinstance(found, sparse.csr_array)
    np.testing.assert_allclose(found.toarray(), naive_counts(sequences, 7, window), atol=1e-12)


@given(sequences_of, st.integers(1, 5))
def test_a_separator_is_a_wall(sequences, window):
    joined = np.array([part for ids in sequences for part in [9, *ids]], np.uint16)
    apart = [np.array(ids, np.uint16) for ids in sequences]
    walled = cooccurrence([joined], 10, window, separator=9, chunk_tokens=7)
    np.testing.assert_allclose(walled.toarray(), cooccurrence(apart, 10, window).toarray(), atol=1e-12)
    assert walled[[9]].nnz == 0


def test_sequences_are_read_once_and_in_turn():
    sequences = (np.arange(5) for _ in range(1000))
    found = cooccurrence(sequences, 5, 1, chunk_tokens=64)
    np.testing.assert_array_equal(found.toarray(), 1000 * (np.eye(5, k=1) + np.eye(5, k=-1)))


def test_rare_pairs_are_left_out_beyond_the_limit():
    frequent, rare = np.array([0, 1] * 20), np.arange(2, 30)
    with pytest.warns(UserWarning, match="27 counts of rare pairs were left out, to keep no more than max_pairs = 1"):
        found = cooccurrence([frequent, rare], 30, 1, max_pairs=1)
    assert (found.nnz, found[0, 1], found[1, 0]) == (2, 39, 39)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocab_size": 3}, r"token id 3 lies outside \[0, vocab_size = 3\)"),
        ({"window": 0}, "window = 0"),
        ({"max_pairs": 0}, "max_pairs = 0"),
        ({"sequences": [np.array([1, -2])]}, "token id -2"),
    ],
)
def test_counts_refuse(changed, message):
    with pytest.raises(ValueError, match=message):
        cooccurrence(**{"sequences": [np.array([1, 3, 2])], "vocab_size": 4, "window": 2} | changed)


@given(st.integers(0, 1000), st.floats(0.1, 1), st.floats(0, 2))
def test_ppmi_is_that_of_its_formula(seed, smoothing, shift):
    counts = np.random.default_rng(seed).poisson(1.0, (6, 6)).astype(float)
    counts = counts + counts.T
    counts[0, 1] = counts[1, 0] = 1
    joint = counts / counts.sum()
    smoothed = counts.sum(0) ** smoothing
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.log(joint / np.outer(joint.sum(1), smoothed / smoothed.sum())) - shift
    found = ppmi(sparse.csr_array(counts), smoothing, shift)
    np.testing.assert_allclose(found.toarray(), np.maximum(np.nan_to_num(expected, neginf=0), 0), atol=1e-12)
    assert (found.data > 0).all()


def test_ppmi_needs_counts():
    with pytest.raises(ValueError, match="no two tokens stand near each other"):
        ppmi(sparse.csr_array((3, 3)))


def test_factors_are_the_leading_ones():
    generator = np.random.default_rng(0)
    dense = generator.standard_normal((60, 12)) * 2.0 ** -np.arange(12) @ generator.standard_normal((12, 60))
    dense[[7, 20]] = 0
    found = factors(sparse.csr_array(dense), 5, seed=1)
    left, singular, _ = np.linalg.svd(dense)
    expected = left[:, :5] * np.sqrt(singular[:5])
    np.testing.assert_allclose(found, expected * np.sign((found * expected).sum(0)), atol=1e-6)
    assert (found[np.abs(found).argmax(0), range(5)] > 0).all()
    assert not found[[7, 20]].any()
    np.testing.assert_array_equal(found, factors(sparse.csr_array(dense), 5, seed=1))
    np.testing.assert_allclose(found, factors(sparse.csr_array(dense), 5, seed=2), atol=1e-6)
    whole = factors(sparse.csr_array(dense), 60)
    assert whole.shape == (60, 60)


@pytest.mark.parametrize("dim", [0, 4])
def test_factors_refuse(dim):
    with pytest.raises(ValueError, match=f"dim = {dim}; expected 1 to 3"):
        factors(sparse.eye_array(3, format="csr"), dim)


@given(st.sampled_from(METHODS), st.integers(1, 80), st.integers(2, 12), st.integers(0, 2), st.integers(0, 99))
def test_every_token_has_a_position_of_its_own(method, num_tokens, base, more_digits, seed):
    generator = np.random.default_rng(seed)
    num_digits = more_digits + next(k for k in range(1, 9) if base**k >= num_tokens)
    rows, counts = generator.standard_normal((num_tokens, 3)), generator.integers(0, 5, num_tokens)
    counts[0], rows[counts == 0] = 1, 0
    with pytest.MonkeyPatch.context() as patch:  # quicker, and still with several blocks
        patch.setattr(assignment, "NUM_SWEEPS", 2)
        patch.setattr(assignment, "BLOCK", 16)
        order = assign(rows, counts, base, num_digits, method, seed)
        np.testing.assert_array_equal(order, assign(rows, counts, base, num_digits, method, seed))
    assert (order.dtype, order.shape) == (np.int64, (num_tokens,))
    assert len(set(order.tolist())) == num_tokens
    assert 0 <= order.min() <= order.max() < base**num_digits
    if method == "kmeans":  # and first digits are evenly used
        assert np.bincount(order // base ** (num_digits - 1)).max() <= -(-num_tokens // base)
    quality = order_quality(rows, counts, order, base, num_digits)
    assert all(-1 - 1e-9 <= value <= 1 + 1e-9 for value in (*quality.cosine_same, *quality.cosine_next))
    assert max(quality.explained_by_digit) - 1e-6 <= quality.explained_variance <= 1


@pytest.mark.parametrize("method", SEEKING)
def test_planted_structure_is_found(method):
    rows, _, _ = planted(12)
    counts = np.ones(144)
    quality = order_quality(rows, counts, assign(rows, counts, 12, 2, method), 12, 2)
    assert quality.explained_variance > 0.97
    assert order_quality(rows, counts, assign(rows, counts, 12, 2, "random"), 12, 2).explained_variance < 0.3


def test_first_digits_are_the_clusters():
    rows, i, j = planted(8)
    digits = np.divmod(assign(rows, np.ones(64), 8, 2), 8)
    assert len({*zip(i, digits[0], strict=True)}) == len({*zip(j, digits[1], strict=True)}) == 8


def test_three_digits_are_found():
    generator = np.random.default_rng(0)
    i, j, k = np.unravel_index(generator.permutation(125), (5, 5, 5))
    one, other, third = generator.standard_normal((3, 5, 10))
    rows = 4 * one[i] + 2 * other[j] + third[k]
    quality = order_quality(rows, np.ones(125), assign(rows, np.ones(125), 5, 3), 5, 3)
    assert quality.explained_variance > 0.97


@pytest.mark.parametrize("method", SEEKING)
def test_sweeps_never_make_it_worse(monkeypatch, method):
    generator = np.random.default_rng(0)
    rows, counts = generator.standard_normal((300, 8)), generator.integers(1, 1000, 300)
    monkeypatch.setattr(assignment, "BLOCK", 50)
    explained = []
    for num_sweeps in (1, 2, 4, 8, 16):
        monkeypatch.setattr(assignment, "NUM_SWEEPS", num_sweeps)
        order = assign(rows, counts, 18, 2, method)
        quality = order_quality(rows, counts, order, 18, 2)
        explained.append(quality.explained_by_digit[0] if method == "kmeans" else quality.explained_variance)
    assert explained == sorted(explained)
    assert explained[-1] > explained[0] + 0.05


def test_the_path_leads_from_end_to_end_of_a_curve():
    generator = np.random.default_rng(0)
    shuffled = generator.permutation(40)
    angle = shuffled / 40 * np.pi
    path = short_path(np.stack([np.cos(angle), np.sin(angle)], 1))
    steps = np.diff(shuffled[path])
    assert set(steps.tolist()) in ({1}, {-1})


@given(st.integers(1, 30), st.integers(0, 99))
def test_no_reversal_makes_the_path_shorter(num_points, seed):
    points = np.random.default_rng(seed).standard_normal((num_points, 3))
    path = short_path(points)
    assert sorted(path) == list(range(num_points))

    def length(path):
        return np.linalg.norm(np.diff(points[path], axis=0), axis=1).sum()

    for first in range(num_points):
        for last in range(first, num_points):
            other = np.concatenate([path[:first], path[first : last + 1][::-1], path[last + 1 :]])
            assert length(other) >= length(path) - 1e-6


def test_neighbouring_values_of_a_digit_are_alike():
    angle = np.linspace(0, np.pi, 30)
    curve = np.stack([np.cos(angle), np.sin(angle)], 1)
    rows = np.random.default_rng(0).permutation(np.repeat(curve, 30, 0))
    quality = order_quality(rows, np.ones(900), assign(rows, np.ones(900), 30, 2), 30, 2)
    assert quality.cosine_next[0] > 0.9 * quality.cosine_same[0] > 0.8


def test_quality_against_loops():
    generator = np.random.default_rng(0)
    rows, counts, order = (
        generator.standard_normal((20, 4)),
        generator.integers(0, 9, 20),
        generator.permutation(25)[:20],
    )
    quality = order_quality(rows, counts, order, 5, 2)
    weights = np.log1p(counts)
    vectors = rows - np.average(rows, axis=0, weights=weights)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for q, digit in enumerate(np.divmod(order, 5)):
        for step, found in ((0, quality.cosine_same[q]), (1, quality.cosine_next[q])):
            pairs = [(v, w) for v in range(20) for w in range(20) if v != w and digit[w] - digit[v] == step]
            cosines = [units[v] @ units[w] for v, w in pairs]
            assert found == pytest.approx(np.average(cosines, weights=[weights[v] * weights[w] for v, w in pairs]))
    design = np.concatenate([np.eye(5)[digit] for digit in np.divmod(order, 5)], 1)
    root = np.sqrt(weights)[:, None]
    left = root * (vectors - design @ np.linalg.lstsq(root * design, root * vectors, rcond=None)[0])
    assert quality.explained_variance == pytest.approx(1 - (left**2).sum() / ((root * vectors) ** 2).sum())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "magic"}, "method = 'magic'; expected one of kmeans, transport"),
        ({"base": 3}, "2 digits of base 3 number 9 ids, fewer than"),
        ({"base": 256, "num_digits": 9}, "more positions than int64 holds"),
        ({"counts": np.ones(9)}, r"counts \(9,\)"),
        ({"counts": np.zeros(10)}, "not zero for all"),
        ({"counts": np.arange(-1, 9)}, "at least zero"),
        ({"factors": np.ones(10)}, r"factors have shape \(10,\)"),
        ({"factors": np.diag(np.where(np.arange(10) == 3, np.nan, 1.0))}, "factors of token 3 are not finite"),
    ],
)
def test_assignment_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        assign(**{"factors": np.eye(10), "counts": np.ones(10), "base": 4, "num_digits": 2} | changed)


def test_file_comes_back_and_fits_an_embedding(tmp_path):
    order, rows = np.random.default_rng(0).permutation(49)[:40], np.random.default_rng(0).standard_normal((40, 3))
    save_order(tmp_path / "made" / "order.safetensors", order, rows, {"base": 7, "num_digits": 2, "method": "random"})
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["order.safetensors"]
    loaded = load_order(tmp_path / "made" / "order.safetensors", 40)
    assert (loaded.order.dtype, loaded.factors.dtype) == (torch.int64, torch.float32)
    np.testing.assert_array_equal(loaded.order, order)
    np.testing.assert_allclose(loaded.factors, rows, rtol=1e-6)
    embedding = SeparableEmbedding(40, 8, base=7, num_digits=2, seed_dim=4, ordered=True)
    embedding.set_token_order(loaded.order)
    embedding.set_codebooks(loaded.factors)


ROWS = np.zeros((4, 2), np.float32)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"order": np.arange(5), "factors": ROWS}, {}, r"shape \(5,\).*model's 4 tokens"),
        ({"order": np.arange(4, dtype=np.int32), "factors": ROWS}, {}, "int32"),
        ({"order": np.array([0, 1, 2, 1]), "factors": ROWS}, {}, "the same position"),
        ({"order": np.array([0, 1, 2, -1]), "factors": ROWS}, {}, "position -1 lies outside"),
        (
            {"order": np.array([0, 1, 2, 4]), "factors": ROWS},
            {"settings": '{"base": 2, "num_digits": 2}'},
            r"outside \[0, 4\)",
        ),
        ({"order": np.arange(4), "factors": ROWS[:3]}, {}, r"factors have shape \(3, 2\)"),
        ({"order": np.arange(4)}, {}, "is no order"),
        ({"factors": ROWS}, {}, "is no order"),
    ],
)
def test_file_is_checked(tmp_path, tensors, metadata, message):
    save_file(tensors, tmp_path / "order.safetensors", metadata)
    with pytest.raises(ValueError, match=message):
        load_order(tmp_path / "order.safetensors", 4)


def test_no_order_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"training\.token_order"):
        load_order(tmp_path / "order.safetensors", 4)
    (tmp_path / "order.safetensors").write_text("not a tensor")
    with pytest.raises(ValueError, match="is no order"):
        load_order(tmp_path / "order.safetensors", 4)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config of a corpus on two subjects, each with words of its own."""
    folder, generator = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    texts = [" ".join(["", *generator.choice(words, 30)]) for _ in range(60) for words in WORDS.values()]
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    train_bpe(texts, 307).save_pretrained(folder / "tokenizer")
    content = {
        "data": {"kind": "text", "train": str(folder / "train.jsonl"), "validation": str(folder / "train.jsonl")},
        "tokenizer": {"path": str(folder / "tokenizer")},
        "model": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
        "training": {"max_steps": 1, "use_cpu": True},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


def test_command_groups_words_of_a_subject(config, tmp_path, capsys):
    out = tmp_path / "order.safetensors"
    flags = ["--config", str(config), "--out", str(out), "--dim", "8", "--window", "4"]
    found = token_order.main([*flags, "--base", "8", "--num-digits", "3"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["order.json", "order.safetensors"]
    assert json.loads((tmp_path / "order.json").read_text()) == json.loads(json.dumps(found))
    order = load_order(out, 307)
    assert order.factors.shape == (307, 8)
    assert (found["settings"]["tokens_read"], found["settings"]["tokens_seen"]) == (120 * 31, 16)
    with safe_open(out, "np") as file:
        assert json.loads(file.metadata()["settings"]) == found["settings"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("kmeans", "random", "16 of 307"))
    quality, by_chance = found["quality"], found["quality_of_random_order"]
    assert quality["explained_by_digit"][0] > by_chance["explained_by_digit"][0]
    subjects = {f" {word}": subject for subject, words in WORDS.items() for word in words}
    for tokens in found["examples"][0].values():  # of each first digit
        assert len({subjects[token] for token in tokens}) <= 1
    assert sorted(token for tokens in found["examples"][0].values() for token in tokens) == sorted(subjects)
    again = token_order.main([*flags, "--base", "8", "--num-digits", "3", "--out", str(tmp_path / "again.safetensors")])
    assert again["quality"] == found["quality"]
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()


@pytest.mark.parametrize("method", CONTROLS)
def test_controls_read_no_text(config, tmp_path, capsys, method):
    out = tmp_path / "order.safetensors"
    flags = ["--config", str(config), "--out", str(out), "--method", method, "--seed", "3"]
    found = token_order.main([*flags, "--data.train", "nowhere.jsonl"])
    assert json.loads((tmp_path / "order.json").read_text()) == json.loads(json.dumps(found))
    assert found.keys() == {"settings", "provenance"}
    assert (found["settings"]["tokens_read"], found["settings"]["tokens_seen"]) == (0, 0)
    assert f"2 digits of base 18, {method}; no text was read" in capsys.readouterr().out
    loaded = load_order(out, 307)
    assert loaded.factors.shape == (307, 0)
    rows = np.random.default_rng(0).standard_normal((307, 4))
    np.testing.assert_array_equal(loaded.order, assign(rows, np.ones(307), 18, 2, method, 3))  # as with factors
    settings = read_settings(config, ["--tokenizer.order", str(out)], train.allowed_keys())
    assert torch.equal(train.build(settings).model.model.embed_tokens.token_order, loaded.order)
    settings["tokenizer"]["start"] = "factors"
    with pytest.raises(ValueError, match=r"order\.safetensors holds no factors: .*take an order of another --method"):
        train.build(settings)


def test_digits_are_the_models_unless_given(config, tmp_path):
    out = tmp_path / "order.safetensors"
    flags = ["--config", str(config), "--out", str(out), "--dim", "4", "--method", "spectral"]
    assert token_order.main(flags)["settings"]["base"] == 18
    chosen = token_order.main([*flags, "--model.embedding_base", "7", "--model.vocab_size", "340"])["settings"]
    assert (chosen["base"], chosen["num_digits"], chosen["vocab_size"]) == (7, 3, 340)
    assert len(load_order(out, 340).order) == 340
    assert token_order.main([*flags, "--num-digits", "3", "--num-tokens", "100"])["settings"]["tokens_read"] == 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dim", "308"], "dim = 308; expected 1 to 307"),
        (["--dim", "0"], "dim = 0; expected at least 1"),
        (["--base", "3", "--num-digits", "2"], "2 digits of base 3 number 9 ids"),
        (["--base", "0"], "base = 0"),
        (["--out", "order.json"], r"order\.json; expected a name that ends in \.safetensors"),
        (["--num-tokens", "1"], "no two tokens stand near"),
        (["--data.trian", "x"], "did you mean 'train'"),
        (["--tokenizer.path", "nowhere/at/all"], "no folder with a tokenizer"),
        (["--data.train", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data.kind", "fields"], r"data\.kind = 'fields'; an order is made for a run on text"),
        (["--data.kind", "null"], r"data\.kind = None; an order"),
        (["--data.stride", "2"], r"data\.stride is no setting of a run on text"),
        (["--data.context_length", "1"], "context_length = 1"),
        (["--model.vocab_size", "306"], r"model\.vocab_size = 306 is less than the 307 tokens"),
    ],
)
def test_command_refuses(config, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        token_order.main(["--config", str(config), "--out", str(tmp_path / "order.safetensors"), *flags])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [("data", "train", "not complete: .*'train'"), ("tokenizer", "path", "not complete: .*'path'")],
)
def test_command_needs_whole_settings(config, tmp_path, section, key, message):
    content = yaml.safe_load(config.read_text())
    del content[section][key]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit, match=message):
        token_order.main(["--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "order.safetensors")])


@pytest.mark.parametrize("name", ["num_tokens", "window", "dim"])
def test_settings_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} = 0"):
        OrderSettings(**{name: 0})
