import copy

import pytest
import torch
import torch.nn.functional as F

from sna_core import CodebookEmbedding, LowRankEmbedding, SeparableEmbedding
from sna_core.embedding import TOKEN_SCALE
from sna_core.generator import separable_product, separable_product_reference, uniform_spline_basis

OPTIONS = [
    {},
    {"variant": "v1"},
    {"trainable_knot_scale": True},
    {"normalize_basis": False, "sigmoid_divisor": 1.0},
    {"normalize_output": False},
    {"token_rank": 3},
    {"low_digit": "reflected", "base": 7, "seed_dim": 13, "num_heads": 3},
    {"num_knots": 2, "rank": 1, "seed_bias": True, "residual": True},
]


def small(dtype=torch.float64, num_embeddings=300, **options):
    """A small embedding away from its initial values, with negative factors among the splines."""
    defaults = {"seed_dim": 12, "num_heads": 2, "rank": 5, "num_knots": 6}
    embedding = SeparableEmbedding(num_embeddings, 10, dtype=dtype, **(defaults | options))
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return embedding


def test_parameter_count_is_the_published_one():
    embedding = SeparableEmbedding(200_376, 2048, normalize_output=False)
    assert (embedding.base, embedding.num_digits) == (59, 3)
    assert sum(p.numel() for p in embedding.parameters()) == 2_252_928


def test_tokens_own_factors():
    options = {"seed_dim": 12, "num_heads": 2, "rank": 5}
    embedding = SeparableEmbedding(300, 10, token_rank=4, **options)
    plain = SeparableEmbedding(300, 10, **options)
    own = embedding.token_factors, embedding.token_weight
    assert sum(p.numel() for p in embedding.parameters()) - sum(p.numel() for p in plain.parameters()) == 4 * (300 + 10)
    plain.load_state_dict({k: v for k, v in embedding.state_dict().items() if not k.startswith("token_")})
    before = embedding.materialize()
    torch.testing.assert_close(before, plain.materialize() + TOKEN_SCALE * own[0] @ own[1])
    assert (TOKEN_SCALE * own[0] @ own[1]).std().item() == pytest.approx(0.02, rel=0.2)
    for size in (350, 280):
        embedding.resize(size)
        assert embedding.token_factors.shape == (size, 4)
        torch.testing.assert_close(embedding.materialize()[:280], before[:280])


def test_v1_is_one_biased_seed_map_with_rank_one_components_and_a_residual():
    embedding = SeparableEmbedding(65_536, 512, variant="v1")
    shapes = {name: tuple(p.shape) for name, p in embedding.named_parameters()}
    assert shapes["seed_bias"] == (1, 128)
    assert shapes["splines"] == (1, 128, 32, 8)
    assert shapes["residual_weight"] == (1, 128, 512)


def test_initial_values_are_the_published_ones():
    embedding = SeparableEmbedding(65_536, 512)
    for parameter, mean, std in [
        (embedding.codebooks, 0, 0.02),
        (embedding.seed_weight, 0, 0.02),
        (embedding.splines, 1, 0.1),
        (embedding.out_weight, 0, 0.02 / 8**0.5),
    ]:
        assert parameter.mean().item() == pytest.approx(mean, abs=1e-3)
        assert parameter.std().item() == pytest.approx(std, rel=0.02)
    assert (embedding.norm_weight == 1).all()
    assert (embedding.norm_bias == 0).all()


def test_every_embedding_has_the_size_of_the_gain():
    embedding = SeparableEmbedding(300, 10, seed_dim=12, num_heads=2, rank=5)
    rows = embedding.materialize()
    torch.testing.assert_close(rows.pow(2).mean(-1), torch.ones(300), rtol=1e-3, atol=0)
    plain = SeparableEmbedding(300, 10, seed_dim=12, num_heads=2, rank=5, normalize_output=False)
    plain.load_state_dict({k: v for k, v in embedding.state_dict().items() if k != "out_gain"})
    published = plain.materialize()
    expected = published / (published.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(rows, expected)
    with torch.no_grad():
        embedding.out_gain.mul_(3)
    torch.testing.assert_close(embedding.materialize(), 3 * expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fast_forward_and_gradients_equal_the_oracle(options):
    embedding = small(**options)
    ids = torch.randint(0, 300, (40,))
    fast, oracle = embedding.generate(ids), embedding.reference_generate(ids)
    # The oracle guards its logarithm with 1e-9, which is what separates them.
    torch.testing.assert_close(fast, oracle, rtol=1e-6, atol=1e-6 * oracle.abs().max().item())
    gradient = torch.randn_like(fast)
    names = [name for name, _ in embedding.named_parameters()]
    for name, g_fast, g_oracle in zip(
        names,
        torch.autograd.grad(fast, list(embedding.parameters()), gradient),
        torch.autograd.grad(oracle, list(embedding.parameters()), gradient),
        strict=True,
    ):
        error = (g_fast - g_oracle).norm() / g_oracle.norm().clamp(min=1e-12)
        assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("seed_dim", [1, 2, 5, 8])
def test_product_gradient_is_that_of_finite_differences(seed_dim, normalize, scaled):
    coordinates = torch.rand(2, 3, seed_dim, dtype=torch.float64, requires_grad=True)
    splines = torch.randn(2, seed_dim, 4, 3, dtype=torch.float64, requires_grad=True)
    scale = (0.8 + 0.3 * torch.rand(2, seed_dim, dtype=torch.float64)).requires_grad_() if scaled else None
    torch.autograd.gradcheck(
        lambda z, s, c: separable_product(z, s, c, normalize), (coordinates, splines, scale), eps=1e-7, atol=1e-5
    )


def test_product_gradient_is_exact_where_factors_are_zero():
    coordinates = torch.rand(1, 4, 5, dtype=torch.float64)
    splines = torch.randn(1, 5, 6, 3, dtype=torch.float64)
    splines[0, 2] = 0  # one factor vanishes: every other gradient does, its own does not
    splines.requires_grad_()
    product = separable_product(coordinates, splines)
    assert (product == 0).all()
    (gradient,) = torch.autograd.grad(product.sum(), splines)
    expected = []
    phi = torch.einsum("nij,ijr->nir", uniform_spline_basis(coordinates[0], 6), splines[0]).detach()
    others = phi[:, [0, 1, 3, 4]].prod(1)
    basis = uniform_spline_basis(coordinates[0], 6)[:, 2]
    expected = torch.einsum("nj,nr->jr", basis, others)
    torch.testing.assert_close(gradient[0, 2], expected)
    assert (gradient[0, [0, 1, 3, 4]] == 0).all()


@pytest.mark.parametrize("sizes", [(1e-25, 1e-20), (1e25, 1e20)], ids=["too small", "too large"])
def test_product_gradient_is_exact_where_the_product_leaves_float32(sizes):
    """There dividing the product by a factor gives nothing; the products of the others are numbers all the same."""
    coordinates, splines = torch.rand(1, 4, 5), 0.5 + torch.rand(1, 5, 6, 3)
    for i, size in enumerate(sizes):
        splines[0, i] *= size
    exact, single = splines.double().requires_grad_(), splines.clone().requires_grad_()
    (found,) = torch.autograd.grad(separable_product(coordinates, single).sum(), single)
    (expected,) = torch.autograd.grad(separable_product(coordinates.double(), exact).sum(), exact)
    torch.testing.assert_close(found[0, :2].double(), expected[0, :2], rtol=1e-5, atol=0)


def test_a_point_that_no_basis_function_reaches_is_no_nan():
    coordinates = torch.full((1, 2, 3), 1.5 / 5, dtype=torch.float64, requires_grad=True)  # midway between knots
    splines = torch.randn(1, 3, 6, 2, dtype=torch.float64, requires_grad=True)
    scale = torch.full((1, 3), 4.0, dtype=torch.float64, requires_grad=True)
    product = separable_product(coordinates, splines, scale)
    assert (product == 0).all()
    torch.testing.assert_close(product, separable_product_reference(coordinates, splines, scale), rtol=0, atol=1e-20)
    assert all(g.isfinite().all() for g in torch.autograd.grad(product.sum(), (coordinates, splines, scale)))


def test_blocks_do_not_change_the_result(monkeypatch):
    coordinates, splines = torch.rand(2, 37, 6), torch.randn(2, 6, 5, 4)
    whole = separable_product(coordinates, splines)
    monkeypatch.setitem(__import__("sna_core.generator").generator.BLOCK_NUMEL, "cpu", 6 * 4 * 5)
    torch.testing.assert_close(separable_product(coordinates, splines), whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(whole, separable_product_reference(coordinates, splines), rtol=1e-4, atol=1e-6)


def test_basis_sums_to_one_and_reaches_three_knots():
    basis = uniform_spline_basis(torch.linspace(0, 1, 101, dtype=torch.float64), 8)
    torch.testing.assert_close(basis.sum(-1), torch.ones(101, dtype=torch.float64))
    assert ((basis > 0).sum(-1) <= 3).all()
    raw = uniform_spline_basis(torch.tensor([0.0, 0.5], dtype=torch.float64), 9, normalize=False).sum(-1)
    torch.testing.assert_close(raw, torch.tensor([0.875, 1.0], dtype=torch.float64))


def test_each_distinct_id_is_generated_once(monkeypatch):
    embedding = small()
    generated = []
    generate = embedding.generate
    monkeypatch.setattr(embedding, "generate", lambda ids: generated.append(ids.numel()) or generate(ids))
    ids = torch.tensor([[5, 5, 7], [7, 5, 299]])
    out = embedding(ids)
    assert generated == [3]
    torch.testing.assert_close(out, F.embedding(ids, embedding.materialize()))
    embedding(torch.zeros(301, dtype=torch.long))  # more tokens than ids, and still one row to generate
    assert generated == [3, 300, 1]  # the second made the table to compare with


def test_gradients_of_repeated_ids_add_up():
    embedding = small()
    ids = torch.tensor([3, 3, 9, 3])
    weight = torch.randn(4, 10, dtype=torch.float64)
    through_forward = torch.autograd.grad((embedding(ids) * weight).sum(), list(embedding.parameters()))
    token_by_token = torch.autograd.grad((embedding.generate(ids) * weight).sum(), list(embedding.parameters()))
    for a, b in zip(through_forward, token_by_token, strict=True):
        torch.testing.assert_close(a, b)


def test_drop_in_shapes_table_and_weight():
    embedding = small(dtype=None)
    assert embedding(torch.zeros(2, 3, 4, dtype=torch.int32)).shape == (2, 3, 4, 10)
    assert embedding(torch.empty(0, dtype=torch.long)).shape == (0, 10)
    assert embedding.weight.shape == (300, 10)
    assert not embedding.weight.requires_grad
    assert embedding.table().requires_grad
    torch.testing.assert_close(embedding.weight[:5], embedding(torch.arange(5)).detach())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_product_in_float32(half):
    embedding = SeparableEmbedding(4096, 32, seed_dim=64, num_heads=2, rank=8, trainable_knot_scale=True)
    low = copy.deepcopy(embedding).to(half)
    ids = torch.randperm(4096)[:200]
    out = low(ids)
    assert out.dtype == half
    exact = embedding(ids)
    tolerance = 0.1 if half == torch.bfloat16 else 0.02
    assert (out - exact).norm() / exact.norm() < tolerance
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(embedding(ids), exact)


def test_compiled_equals_eager():
    embedding = small(dtype=None)
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    for ids in (torch.randint(0, 300, (2, 7)), torch.randint(0, 300, (400,))):
        torch.testing.assert_close(compiled(ids), embedding(ids), rtol=1e-4, atol=1e-5)


def test_meta_device():
    embedding = SeparableEmbedding(65_536, 64, device="meta")
    assert embedding(torch.zeros(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, 64)
    assert embedding.weight.shape == (65_536, 64)


@pytest.mark.parametrize("size", [1, 7, 40, 64])
def test_chunks_change_neither_values_nor_gradients(size, monkeypatch):
    whole = small()
    chunked = copy.deepcopy(whole)
    chunked.max_chunk_tokens = size
    generated, generate = [], chunked._generate
    monkeypatch.setattr(chunked, "_generate", lambda ids, product: generated.append(len(ids)) or generate(ids, product))
    ids = torch.randperm(300)[:40]
    gradient = torch.randn(40, 10, dtype=torch.float64)
    for a, b in zip(
        (whole(ids), *torch.autograd.grad(whole(ids), list(whole.parameters()), gradient)),
        (chunked(ids), *torch.autograd.grad(chunked(ids), list(chunked.parameters()), gradient)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert max(generated) == min(size, 40)
    with pytest.raises(ValueError, match="max_chunk_tokens = 0"):
        small(max_chunk_tokens=0)


def test_low_rank_is_its_product_and_resizes():
    embedding = LowRankEmbedding(300, 20, rank=4)
    torch.testing.assert_close(embedding.weight, (embedding.factor @ embedding.projection).detach())
    ids = torch.randint(0, 300, (3, 5))
    torch.testing.assert_close(embedding(ids), F.embedding(ids, embedding.weight))
    before = embedding.weight
    embedding.resize(310)
    torch.testing.assert_close(embedding.weight[:300], before)
    assert LowRankEmbedding(5000, 64, rank=16).weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(("num_embeddings", "layout"), [(4096, (64, 2)), (27, (3, 3)), (8, (2, 3))])
def test_a_codebook_embedding_is_a_sum_of_rows(num_embeddings, layout):
    base, num_digits = layout
    embedding = CodebookEmbedding(num_embeddings, 6, base, num_digits, dtype=torch.float64)
    assert [tuple(p.shape) for p in embedding.parameters()] == [(num_digits, base, 6)]
    ids = torch.arange(num_embeddings)
    rows = [embedding.codebooks[q, ids // base ** (num_digits - 1 - q) % base] for q in range(num_digits)]
    torch.testing.assert_close(embedding(ids), sum(rows))
    grid = embedding.table().view(*[base] * num_digits, 6)  # additive: mixed differences vanish
    mixed = grid[1:, 1:] - grid[1:, :-1] - grid[:-1, 1:] + grid[:-1, :-1]
    torch.testing.assert_close(mixed, torch.zeros_like(mixed))


@pytest.mark.parametrize("num_digits", [1, 2, 3])
def test_a_codebook_embedding_starts_with_the_spread_of_a_lookup(num_digits):
    embedding = CodebookEmbedding(5000, 512, num_digits=num_digits)
    assert embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_state_dict_round_trip():
    embedding, other = small(variant="v1"), small(variant="v1")
    other.load_state_dict(embedding.state_dict())
    torch.testing.assert_close(other.weight, embedding.weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": 10, "num_digits": 2}, "2 digits of base 10 number 100 ids, fewer than num_embeddings = 300"),
        ({"base": 1}, "base = 1"),
        ({"num_digits": 0}, "num_digits = 0"),
        ({"variant": "v3"}, "expected one of"),
        ({"low_digit": "mirrored"}, "'plain' or 'reflected'"),
        ({"num_knots": 1}, "num_knots = 1; expected at least 2"),
        ({"rank": 0}, "rank = 0"),
        ({"sigmoid_divisor": 0.0}, "positive"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SeparableEmbedding(300, 10, **options)


def test_bad_ids():
    embedding = small()
    with pytest.raises(ValueError, match="float32; expected integers"):
        embedding(torch.zeros(3))
    with pytest.raises(IndexError, match=r"id 300 lies outside \[0, num_embeddings = 300\)"):
        embedding(torch.tensor([1, 300]))
    with pytest.raises(IndexError, match="id -1"):
        embedding(torch.tensor([-1, 3]))
    with pytest.raises(ValueError, match="num_embeddings = 0"):
        SeparableEmbedding(0, 10)
    with pytest.raises(ValueError, match="rank = 0"):
        LowRankEmbedding(10, 10, rank=0)
    with pytest.raises(ValueError, match="embedding_dim = 0"):
        CodebookEmbedding(10, 0)
    with pytest.raises(ValueError, match="2 digits of base 3 number 9 ids"):
        CodebookEmbedding(10, 10, base=3, num_digits=2)


@pytest.mark.gpu
def test_a_gpu_generates_what_the_cpu_does():
    embedding = small(dtype=torch.float32)
    ids = torch.randint(0, 300, (40,))
    torch.testing.assert_close(embedding.cuda()(ids.cuda()).cpu(), embedding.cpu()(ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(IndexError, match="id 300"):
        embedding.cuda()(torch.tensor([300], device="cuda"))
