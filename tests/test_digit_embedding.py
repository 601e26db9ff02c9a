"""The order that gives tokens their digits, codebooks that start from factors, and more ids than before."""

import copy

import pytest
import torch

from sna_core import CodebookEmbedding, SeparableEmbedding
from sna_core.codebooks import fit_codebooks, sum_codebooks
from sna_core.digits import to_digits

SIZES = {"seed_dim": 12, "num_heads": 2, "rank": 5, "num_knots": 6}
KINDS = {
    "separable": lambda n, **options: SeparableEmbedding(n, 10, **SIZES, **options),
    "codebook": lambda n, **options: CodebookEmbedding(n, 10, **options),
}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


def moved(make, order=None, num_embeddings=300, **options):
    """An embedding of base 7, away from its initial values, whose tokens have the positions given."""
    embedding = make(num_embeddings, base=7, ordered=order is not None, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    if order is not None:
        embedding.set_token_order(order)
    return embedding


@kinds
@pytest.mark.parametrize("low_digit", ["plain", "reflected"])
def test_a_token_has_the_embedding_of_its_position(make, low_digit):
    order = torch.randperm(343)[:300]
    ordered = moved(make, order, low_digit=low_digit)
    plain = moved(make, num_embeddings=343, low_digit=low_digit)
    plain.load_state_dict({k: v for k, v in ordered.state_dict().items() if k != "token_order"})
    torch.testing.assert_close(ordered.materialize(), plain.materialize()[order])
    ids = torch.randint(0, 300, (4, 9))
    torch.testing.assert_close(ordered(ids), plain(order[ids]))


@kinds
def test_the_order_starts_as_the_ids_and_draws_no_numbers(make):
    torch.manual_seed(0)
    plain = make(300)
    torch.manual_seed(0)
    ordered = make(300, ordered=True)
    assert torch.equal(ordered.token_order, torch.arange(300))
    assert torch.equal(ordered.weight, plain.weight)
    assert "token_order" not in plain.state_dict()
    assert "token_order" in ordered.state_dict()
    assert [name for name, _ in ordered.named_parameters()] == [name for name, _ in plain.named_parameters()]


@kinds
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts_keep_the_order_whole(make, cast):
    order = torch.randperm(65_536)[:40_000]  # numbers that no half knows
    embedding = make(40_000, base=256, ordered=True)
    embedding.set_token_order(order)
    for moved_to in (getattr(embedding, cast)(), copy.deepcopy(embedding), embedding.to(torch.float16)):
        assert moved_to.token_order.dtype == torch.int64
        assert torch.equal(moved_to.token_order, order)


@kinds
def test_the_state_dict_carries_the_order(make):
    first, second = (moved(make, torch.randperm(343)[:300]) for _ in range(2))
    assert not torch.allclose(first.weight, second.weight)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.weight, second.weight)


@kinds
def test_compiled_equals_eager_for_any_order(make):
    embedding = moved(make, torch.randperm(343)[:300])
    torch._dynamo.reset()
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    for ids in (torch.randint(0, 300, (2, 7)), torch.randint(0, 300, (400,))):
        torch.testing.assert_close(compiled(ids), embedding(ids))
    embedding.set_token_order(torch.randperm(343)[:300])  # no constant of the graph
    torch.testing.assert_close(compiled(ids), embedding(ids))


@kinds
def test_meta_device(make):
    embedding = make(300, ordered=True, device="meta")
    assert embedding(torch.zeros(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, 10)
    assert embedding.weight.shape == (300, 10)


@kinds
@pytest.mark.parametrize("low_digit", ["plain", "reflected"])
@pytest.mark.parametrize("is_ordered", [False, True])
@pytest.mark.parametrize("size", [1, 100, 300, 343, 344, 3000])
def test_resize_keeps_the_embeddings_that_remain(make, low_digit, is_ordered, size):
    order = torch.randperm(343)[:300] if is_ordered else None
    embedding = moved(make, order, low_digit=low_digit)
    before = embedding.materialize()
    embedding.resize(size)
    after = embedding.materialize()
    assert after.shape == (size, 10)
    kept = min(size, 300)
    torch.testing.assert_close(after[:kept], before[:kept])
    ends = torch.cat([after[:30], after[-30:]]) if size > 60 else after
    assert torch.pdist(ends).min() > 0 if size > 1 else len(ends) == 1
    if is_ordered:
        assert torch.equal(embedding.token_order[:kept], order[:kept])
        positions = embedding.token_order.tolist()
        assert len(set(positions)) == size
        free = sorted(set(range(7**embedding.num_digits)) - set(order[:kept].tolist()))
        assert positions[kept:] == free[: size - kept]
        embedding.set_token_order(embedding.token_order)  # still one


@kinds
def test_a_resized_identity_is_the_identity(make):
    embedding = make(300, base=7, ordered=True)
    for size in (310, 20, 400):
        embedding.resize(size)
        assert torch.equal(embedding.token_order, torch.arange(size))


@kinds
@pytest.mark.parametrize(("base", "num_digits"), [(7, 3), (18, 2)])
def test_codebooks_start_at_the_fit_of_the_factors(make, base, num_digits):
    embedding = make(300, base=base, num_digits=num_digits, ordered=True, dtype=torch.float64)
    order = torch.randperm(base**num_digits)[:300]
    embedding.set_token_order(order)
    ids, spread = torch.arange(300), embedding.seed(torch.arange(300)).std(correction=0)
    factors = 3 + 50 * torch.randn(300, 6, dtype=torch.float64)
    embedding.set_codebooks(factors)
    seeds = embedding.seed(ids)
    torch.testing.assert_close(seeds.std(correction=0), spread)
    torch.testing.assert_close(seeds.mean(0), torch.zeros_like(seeds[0]), rtol=0, atol=1e-9)
    # The map keeps angles: seeds are to each other as the fit less its mean.
    digits = to_digits(order, base, num_digits)
    fit = sum_codebooks(fit_codebooks(digits, factors, base), digits)
    fit = (fit - fit.mean(0)) * seeds.norm() / (fit - fit.mean(0)).norm()
    torch.testing.assert_close(seeds @ seeds.T, fit @ fit.T, rtol=1e-6, atol=1e-9)


@kinds
def test_factors_start_the_codebooks_alike_whatever_their_scale_and_the_global_seed(make):
    results = []
    factors, weights = torch.randn(300, 20), torch.randint(1, 9, (300,))
    initial = make(300, base=7)
    for scale in (1.0, 1e-3, 1e4):  # wider than either codebook
        embedding = copy.deepcopy(initial)
        embedding.set_codebooks(scale * factors, weights, seed=3)
        results.append(embedding.codebooks.detach().clone())
        torch.rand(1)
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(results[0], results[2], rtol=1e-3, atol=1e-5)
    other = copy.deepcopy(initial)
    other.set_codebooks(factors, weights, seed=4)
    assert not torch.allclose(other.codebooks, results[0], atol=1e-3)
    uniform = copy.deepcopy(initial)
    uniform.set_codebooks(factors, seed=3)
    assert not torch.allclose(uniform.codebooks, results[0], atol=1e-3)


@kinds
def test_codebooks_from_factors_can_be_learned_and_leave_a_baked_table_behind(make):
    embedding, ids = make(300, base=7).to(torch.bfloat16).eval(), torch.arange(20)
    with torch.no_grad():
        before = embedding.bake()(ids)
        embedding.set_codebooks(torch.randn(300, 4))
        assert embedding.codebooks.dtype == torch.bfloat16
        torch.testing.assert_close(embedding(ids), embedding.generate(ids))
        assert not torch.equal(embedding(ids), before)
    embedding.train()(ids).float().square().sum().backward()
    assert embedding.codebooks.grad.isfinite().all()


@kinds
@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.arange(299), r"order has shape \(299,\); expected a position for each of num_embeddings = 300"),
        (torch.arange(300).view(1, 300), r"shape \(1, 300\)"),
        (torch.arange(300.0), "float32; expected integers"),
        (torch.ones(300, dtype=torch.bool), "bool; expected integers"),
        (torch.arange(44, 344), r"order\[299\] = 343 lies outside \[0, 343\), which 3 digits of base 7 number"),
        (torch.arange(-1, 299), r"order\[0\] = -1 lies outside"),
        (torch.arange(300).clamp(min=1), r"the tokens 0 and 1 the same position 1"),
    ],
)
def test_a_bad_order(make, order, message):
    embedding = make(300, base=7, ordered=True)
    with pytest.raises(ValueError, match=message):
        embedding.set_token_order(order)
    assert torch.equal(embedding.token_order, torch.arange(300))


@kinds
def test_an_order_for_an_embedding_without_one(make):
    with pytest.raises(ValueError, match="make it with ordered=True"):
        make(300).set_token_order(torch.arange(300))


@kinds
@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (torch.zeros(299, 4), "tokens = 300"),
        (torch.randn(300, 4).index_fill(0, torch.tensor([7]), torch.nan), "factors of token 7 are not finite"),
        (torch.full((300, 4), 0.1), "the digits tell nothing of these factors"),
    ],
)
def test_bad_factors(make, factors, message):
    embedding = make(300)
    before = embedding.codebooks.detach().clone()
    with pytest.raises(ValueError, match=message):
        embedding.set_codebooks(factors)
    assert torch.equal(embedding.codebooks, before)
