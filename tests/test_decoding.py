"""All ways to decode give the sequence of the plain loop, for every sampling."""

import pytest
import torch

import leviathan
from leviathan.decoding_leviathan import (
    DETERMINISTIC,
    RANDOM,
    Decoder,
    Sampler,
    _Graphs,
    expected_ids,
    inverse_distribution,
)
from sna_core import DigitHead
from tests.test_leviathan import KINDS, VOCAB, tiny, tokens

SAMPLINGS = DETERMINISTIC + RANDOM
ROWS, LENGTH = 5, 16
kinds = pytest.mark.parametrize("kind", ["separable", "grouped-query", "digits", "separable-tied", "lookup"])


def decoder(kind="separable", sampling="greedy", attention=None, **options):
    model = tiny(attention, **KINDS[kind])
    return Decoder(model, Sampler(model.output_head(), VOCAB, sampling, top_k=5, temperature=0.7), LENGTH, **options)


def inputs():
    return tokens(ROWS, LENGTH), torch.rand(ROWS, LENGTH, dtype=torch.float64)


@kinds
@pytest.mark.parametrize("sampling", SAMPLINGS)
@torch.no_grad()
def test_cache_and_blocks_equal_the_plain_loop(kind, sampling):
    prefix, uniform = inputs()
    plain = decoder(kind, sampling)
    expected = plain.without_cache(prefix, uniform)
    assert expected.shape == (ROWS, LENGTH)
    assert torch.equal(plain.one_by_one(prefix, uniform), expected)
    for block in (2, 5, LENGTH, 2 * LENGTH):
        by_blocks = decoder(kind, sampling, block_size=block)
        assert torch.equal(by_blocks(prefix, uniform), expected)
        assert by_blocks.num_passes <= LENGTH - 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_every_attention_decodes_the_same(attention):
    prefix, uniform = inputs()
    expected = decoder().without_cache(prefix, uniform)
    assert torch.equal(decoder(attention=attention)(prefix, uniform), expected)
    assert torch.equal(decoder(attention=attention, block_size=4)(prefix, uniform), expected)


@torch.no_grad()
def test_flex_attention_decodes_token_by_token():
    prefix, _ = inputs()
    assert torch.equal(decoder(attention="flex_attention")(prefix), decoder().without_cache(prefix))
    with pytest.raises(ValueError, match="block_size = 4 needs attention with a dense mask"):
        decoder(attention="flex_attention", block_size=4)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@torch.no_grad()
def test_the_step_of_the_cuda_graphs_equals_the_plain_loop(sampling, monkeypatch):
    """The step as it is captured, replayed by calling it: what a CPU can check."""

    class Replayed:
        def __init__(self, graphs, end):
            self.replay = lambda: graphs.step(end)

    monkeypatch.setattr(_Graphs, "capture", lambda graphs, end: Replayed(graphs, end))
    monkeypatch.setattr("leviathan.decoding_leviathan.GRAPH_TOKENS", 6)
    stepping = decoder("grouped-query", sampling)
    stepping.decoder.embed_tokens.bake()
    for rows in (ROWS, ROWS, ROWS - 2):  # on buffers that hold the one before, the last in fewer rows
        prefix, uniform = (each[:rows] for each in inputs())
        assert torch.equal(stepping.by_graphs(prefix, uniform), stepping.without_cache(prefix, uniform))
        graphs = stepping._graphs
        torch.manual_seed(rows)
    stepping.by_graphs(*inputs())
    assert stepping._graphs is graphs
    stepping.model.lm_head.weight = torch.nn.Parameter(stepping.model.lm_head.weight * 2)
    stepping.by_graphs(*inputs())
    assert stepping._graphs is not graphs  # weights that were not captured


def test_a_good_guess_takes_few_passes_and_a_bad_one_no_more_than_tokens():
    prefix, _ = inputs()

    def given(hidden, uniform):  # a sampler whose next state is given by the uniform numbers, whatever the model says
        return uniform.round().long()

    for target, least, most in ((prefix, 3, 3), ((prefix + 1) % VOCAB, 4, LENGTH - 2)):
        by_blocks = Decoder(tiny(), given, LENGTH, block_size=5)
        assert torch.equal(by_blocks(prefix, target.double()), target)
        assert least <= by_blocks.num_passes <= most


@torch.no_grad()
def test_scores_of_few_tokens_exist_at_one_time(monkeypatch):
    prefix, uniform = inputs()
    expected = decoder(sampling="sample", block_size=4)(prefix, uniform)
    monkeypatch.setattr("leviathan.decoding_leviathan.LARGEST_SCORES", 3 * VOCAB + 1)
    seen = []
    split = decoder(sampling="sample", block_size=4)
    split.sampler.head.register_forward_hook(lambda module, given, scores: seen.append(len(scores)))
    assert torch.equal(split(prefix, uniform), expected)
    assert max(seen) == 3


def test_a_random_sampling_asks_for_its_numbers():
    with pytest.raises(ValueError, match="'sample' needs a uniform number"):
        decoder(sampling="sample")(inputs()[0])


def smooth(sampling):
    """A decoder's parts whose choices move little where the levels read move little, as those of a trained model."""
    model = tiny(embedding_type="lookup")
    ids, directions = torch.arange(VOCAB), torch.randn(2, model.config.hidden_size)
    line = torch.stack([torch.ones(VOCAB), torch.linspace(-1, 1, VOCAB)], -1)  # never 0, where a norm would jump
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(line @ directions)

    def head(hidden):  # a hump over a level that follows the hidden state
        mean = VOCAB / 2 * (1 + torch.tanh(0.5 * hidden[..., :1]))
        return -((ids - mean) ** 2) / 18

    return model, Sampler(head, VOCAB, sampling)


@pytest.mark.parametrize("sampling", ["expectation", "sample"])
@torch.no_grad()
def test_a_tolerance_saves_passes_and_stays_near(sampling):
    model, sampler = smooth(sampling)
    prefix, uniform = tokens(40, LENGTH), torch.rand(40, LENGTH, dtype=torch.float64)
    sequential = Decoder(model, sampler, LENGTH).without_cache(prefix, uniform)
    assert sequential.unique().numel() > 10
    passes = []
    for tolerance in (0, 1, 4):
        by_blocks = Decoder(model, sampler, LENGTH, block_size=LENGTH, tolerance=tolerance)
        difference = (by_blocks(prefix, uniform) - sequential).abs()
        assert difference[:, 0].max() == 0  # nothing is guessed before the first
        assert difference.max() <= 2 * tolerance
        passes.append(by_blocks.num_row_passes)
    assert passes[0] > passes[1] > passes[2]
    everything = Decoder(model, sampler, LENGTH, block_size=LENGTH, tolerance=VOCAB)
    everything(prefix, uniform)
    assert everything.num_passes == 1  # any guess will do


@torch.no_grad()
def test_each_token_is_chosen_behind_predecessors_within_the_tolerance():
    """The sampler sees what was guessed: it must lie within the tolerance of what is kept before each kept token."""
    prefix, _ = inputs()
    seen = {}

    class Watched(Decoder):
        def _forward(self, ids, positions, cache, masked=False):
            if masked:
                for row, (guess, at) in enumerate(zip(ids.tolist(), positions.tolist(), strict=True)):
                    seen[row] = {**seen.get(row, {}), **dict(zip(at, guess, strict=True))}
            return super()._forward(ids, positions, cache, masked)

    model, sampler = smooth("expectation")
    by_blocks = Watched(model, sampler, LENGTH, block_size=5, tolerance=3)
    kept = by_blocks(prefix[:1])[0].tolist()
    read = [seen[0][LENGTH + i] for i in range(LENGTH - 1)]  # as last read, and so in the cache
    assert max(abs(a - b) for a, b in zip(read, kept, strict=False)) <= 3
    assert read != kept[:-1]


@torch.no_grad()
def test_passes_of_a_row_are_counted():
    prefix, uniform = inputs()
    plain = decoder(sampling="sample")
    plain.one_by_one(prefix, uniform)
    assert (plain.num_passes, plain.num_row_passes) == (LENGTH - 1, ROWS * (LENGTH - 1))
    alone = decoder(sampling="sample", block_size=4)
    for row in range(ROWS):
        alone(prefix[row : row + 1], uniform[row : row + 1])
    together = decoder(sampling="sample", block_size=4)
    together(prefix, uniform)
    assert alone.num_passes == alone.num_row_passes  # of one row each
    assert alone.num_row_passes <= together.num_row_passes <= ROWS * together.num_passes


def test_rollout_takes_a_tolerance(monkeypatch):
    tokenizer = leviathan.FieldTokenizer(patch_size=4, num_bits=5, base=7, low=-2.0, high=2.0)
    model, fields = tiny(vocab_size=32), torch.randn(1, 8, 8).clamp(-2, 2)
    given = []
    monkeypatch.setattr(Decoder, "by_blocks", lambda self, prefix, uniform: given.append(self.tolerance) or prefix)
    leviathan.rollout(model, tokenizer, fields, num_steps=1, block_size=4, tolerance=2, progress=False)
    assert given == [2]
    for options in ({"tolerance": -1, "block_size": 4}, {"tolerance": 1}):
        with pytest.raises(ValueError, match=r"tolerance = .* with block_size"):
            leviathan.rollout(model, tokenizer, fields, **options)


@torch.no_grad()
def test_finished_rows_are_dropped(monkeypatch):
    prefix, uniform = inputs()
    by_blocks, seen = decoder(sampling="sample", block_size=8), []
    forward = by_blocks._forward

    def watched(ids, *rest, **options):
        seen.append(len(ids))
        return forward(ids, *rest, **options)

    monkeypatch.setattr(by_blocks, "_forward", watched)
    expected = decoder(sampling="sample").without_cache(prefix, uniform)
    assert torch.equal(by_blocks(prefix, uniform), expected)
    assert seen == sorted(seen, reverse=True)


def test_samplings_have_the_distributions_they_name():
    scores = torch.randn(6).log_softmax(-1)
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    many = scores.expand(len(uniform), -1)

    def frequencies(sampler):
        return torch.bincount(sampler(many, uniform), minlength=6) / len(uniform)

    identity = torch.nn.Identity()
    torch.testing.assert_close(frequencies(Sampler(identity, 6, "sample")), scores.exp(), rtol=0, atol=1e-4)
    tempered = (scores / 0.5).softmax(-1)
    torch.testing.assert_close(
        frequencies(Sampler(identity, 6, "sample", temperature=0.5)), tempered, rtol=0, atol=1e-4
    )
    best = scores.topk(2)
    kept = torch.zeros(6).scatter_(-1, best.indices, best.values.softmax(-1))
    torch.testing.assert_close(frequencies(Sampler(identity, 6, "top_k", top_k=2)), kept, rtol=0, atol=1e-4)
    top_p = frequencies(Sampler(identity, 6, "top_p", top_p=float(best.values.exp().sum()) - 1e-4))
    torch.testing.assert_close(top_p, kept, rtol=0, atol=1e-4)
    assert frequencies(Sampler(identity, 6, "greedy"))[scores.argmax()] == 1


def test_neighbouring_levels_move_together():
    """A small change of the distribution moves an inverse-distribution sample by little."""
    levels = torch.arange(200.0)
    scores = [-((levels - mean) ** 2) / 200 for mean in (80.0, 81.0)]
    uniform = torch.rand(1000, dtype=torch.float64)
    a, b = (inverse_distribution(each.expand(1000, -1), uniform) for each in scores)
    assert ((b - a) >= 0).all()
    assert (b - a).max() <= 2


def test_an_id_without_probability_is_never_drawn():
    scores = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    uniform = torch.tensor([0.0, 0.4999999, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert inverse_distribution(scores.expand(4, -1), uniform).tolist() == [1, 1, 3, 3]


def test_the_digits_shortcuts_equal_the_full_distribution():
    head = DigitHead(8, 45, base=7, rank=4).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter))
    hidden, uniform = torch.randn(200, 8, dtype=torch.float64), torch.rand(200, dtype=torch.float64)
    table = torch.nn.Module()
    table.forward = head.forward
    for sampling in ("expectation", "sample"):
        fast, full = (Sampler(each, 45, sampling)(hidden, uniform) for each in (head, table.forward))
        assert torch.equal(fast, full)
    assert torch.equal(expected_ids(head(hidden)), Sampler(head, 45, "expectation")(hidden, None))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_broken_scores_are_said(sampling):
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
        with pytest.raises(ValueError, match="not finite"):
            Decoder(model, Sampler(model.output_head(), VOCAB, sampling), LENGTH)(*inputs())


@torch.no_grad()
def test_bfloat16_decodes():
    model = tiny().to(torch.bfloat16)
    out = Decoder(model, Sampler(model.output_head(), VOCAB, "expectation"), LENGTH, block_size=4)(*inputs())
    assert out.shape == (ROWS, LENGTH)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["separable", "digits"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@torch.no_grad()
def test_cuda_graphs_equal_the_plain_loop(kind, sampling):
    prefix, uniform = inputs()
    model = tiny(**KINDS[kind]).cuda()
    model.get_input_embeddings().bake()
    on_gpu = Decoder(model, Sampler(model.output_head(), VOCAB, sampling, top_k=5, temperature=0.7), LENGTH)
    assert torch.equal(
        on_gpu.by_graphs(prefix.cuda(), uniform.cuda()), on_gpu.without_cache(prefix.cuda(), uniform.cuda())
    )
