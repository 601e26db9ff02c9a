import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sna_core.codebooks import fit_codebooks, sum_codebooks
from sna_core.digits import to_digits


def drawn(num_tokens, base, num_digits, dim=5):
    """Digits of distinct random positions, and factors that are additive in them."""
    order = torch.randperm(base**num_digits)[:num_tokens]
    digits = to_digits(order, base, num_digits)
    codebooks = torch.randn(num_digits, base, dim, dtype=torch.float64)
    return digits, sum_codebooks(codebooks, digits)


def residual_means(digits, factors, codebooks, weights):
    """Weighted mean of what the sum leaves over, for the tokens with each digit: (k, base, d)."""
    residual = (factors - sum_codebooks(codebooks, digits)) * weights.unsqueeze(-1)
    base = codebooks.shape[1]
    chosen = torch.nn.functional.one_hot(digits, base).to(factors)  # (V, k, base)
    total = torch.einsum("vqb,v->qb", chosen, weights).clamp(min=1e-300)
    return torch.einsum("vqb,vd->qbd", chosen, residual) / total.unsqueeze(-1)


def test_the_sum_of_codebooks_is_the_sum_of_rows():
    codebooks, digits = torch.randn(3, 7, 4), torch.randint(0, 7, (2, 9, 3))
    expected = sum(codebooks[q, digits[..., q]] for q in range(3))
    torch.testing.assert_close(sum_codebooks(codebooks, digits), expected)


@pytest.mark.parametrize(("num_tokens", "base", "num_digits"), [(50, 50, 1), (100, 10, 2), (90, 10, 2), (300, 7, 3)])
def test_additive_factors_are_recovered(num_tokens, base, num_digits):
    digits, factors = drawn(num_tokens, base, num_digits)
    codebooks = fit_codebooks(digits, factors, base)
    assert codebooks.shape == (num_digits, base, 5)
    torch.testing.assert_close(sum_codebooks(codebooks, digits), factors, rtol=1e-9, atol=1e-9)


def test_a_full_grid_is_fitted_in_one_round():
    digits, factors = drawn(343, 7, 3)
    factors = factors + torch.randn_like(factors)
    once, often = (fit_codebooks(digits, factors, 7, num_iterations=n) for n in (1, 50))
    torch.testing.assert_close(once, often, rtol=1e-10, atol=1e-10)


@settings(max_examples=25)
@given(st.integers(2, 8), st.integers(1, 3), st.integers(0, 1000), st.booleans())
def test_residual_means_vanish_at_the_best_fit(base, num_digits, seed, weighted):
    torch.manual_seed(seed)
    num_tokens = max(1, (base**num_digits * 3) // 4)
    digits, factors = drawn(num_tokens, base, num_digits)
    factors = factors + torch.randn_like(factors)
    weights = torch.rand(num_tokens, dtype=torch.float64) if weighted else torch.ones(num_tokens, dtype=torch.float64)
    codebooks = fit_codebooks(digits, factors, base, weights if weighted else None, num_iterations=5000)
    assert residual_means(digits, factors, codebooks, weights).abs().max() < 1e-9


@pytest.mark.parametrize("weighted", [False, True])
def test_no_other_codebooks_fit_better(weighted):
    """Against a solver of least squares on the matrix that says which digits a token has."""
    digits, _ = drawn(80, 6, 3)
    factors = torch.randn(80, 5, dtype=torch.float64)
    weights = 0.1 + torch.rand(80, dtype=torch.float64) if weighted else torch.ones(80, dtype=torch.float64)
    design = torch.nn.functional.one_hot(digits, 6).flatten(1).to(factors)  # (V, k base)
    root = weights.sqrt().unsqueeze(-1)
    best = torch.linalg.lstsq(root * design, root * factors, driver="gelsd").solution
    codebooks = fit_codebooks(digits, factors, 6, weights, num_iterations=5000)
    torch.testing.assert_close(sum_codebooks(codebooks, digits), design @ best, rtol=1e-8, atol=1e-8)


def test_what_no_token_tells_of_is_zero():
    digits = torch.tensor([[0, 1], [2, 1], [2, 3], [4, 4]])
    factors = 1 + torch.rand(4, 3, dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 1.0, 0.0])
    codebooks = fit_codebooks(digits, factors, 5, weights)
    assert (codebooks[0, [1, 3, 4]] == 0).all()
    assert (codebooks[1, [0, 2, 4]] == 0).all()
    assert (codebooks[0, [0, 2]] != 0).all()
    torch.testing.assert_close(fit_codebooks(digits[:3], factors[:3], 5, 3 * weights[:3]), codebooks)


def test_counts_are_weights_and_weights_are_counts():
    digits, _ = drawn(60, 9, 2)
    factors, counts = torch.randn(60, 4, dtype=torch.float64), torch.randint(0, 4, (60,))
    repeated = fit_codebooks(digits.repeat_interleave(counts, 0), factors.repeat_interleave(counts, 0), 9)
    torch.testing.assert_close(fit_codebooks(digits, factors, 9, counts), repeated, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digits": torch.zeros(4, dtype=torch.long)}, r"digits have shape \(4,\)"),
        ({"digits": torch.zeros(4, 2)}, "dtype torch.float32; expected integers"),
        ({"digits": torch.zeros(0, 2, dtype=torch.long)}, "at least one token"),
        ({"digits": torch.tensor([[0, 1], [1, 5], [0, 0], [1, 1]])}, r"digit 5 lies outside \[0, base = 5\)"),
        ({"digits": torch.tensor([[0, 1], [1, -1], [0, 0], [1, 1]])}, "digit -1"),
        ({"factors": torch.zeros(3, 2)}, r"shape \(3, 2\) .*tokens = 4"),
        ({"factors": torch.zeros(4, 0)}, "at least 1"),
        ({"factors": torch.zeros(4, 2, dtype=torch.long)}, "floating-point"),
        ({"factors": torch.tensor([[0.0], [1.0], [torch.nan], [1.0]])}, "factors of token 2 are not finite"),
        ({"weights": torch.ones(3)}, r"weights have shape \(3,\)"),
        ({"weights": torch.tensor([1.0, -2.0, 1.0, 1.0])}, "weight of token 1 is -2.0"),
        ({"weights": torch.tensor([1.0, 1.0, torch.inf, 1.0])}, "weight of token 2 is inf"),
        ({"weights": torch.zeros(4)}, "all weights are zero"),
    ],
)
def test_bad_input(change, message):
    given = {"digits": torch.tensor([[0, 1], [1, 0], [0, 0], [1, 1]]), "factors": torch.rand(4, 2), "base": 5}
    with pytest.raises(ValueError, match=message):
        fit_codebooks(**(given | change))
