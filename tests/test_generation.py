import numpy as np
import pytest
import torch

import leviathan
from leviathan import ExpectationLogitsProcessor, FieldTokenizer, LeviathanConfig, LeviathanForCausalLM
from tests.test_leviathan import spread_embeddings

SAMPLINGS = ["expectation", "greedy", "top_k", "top_p", "sample"]
RANDOM = SAMPLINGS[2:]


@pytest.fixture(scope="module")
def setup():
    torch.manual_seed(0)
    tokenizer = FieldTokenizer(patch_size=2, num_bits=5, base=6, low=-2.0, high=2.0)
    config = LeviathanConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=8,
        embedding_base=6,
        embedding_seed_dim=8,
        embedding_num_heads=2,
        embedding_rank=4,
        initializer_range=0.5,
    )
    model = LeviathanForCausalLM(config)
    spread_embeddings(model.get_input_embeddings())
    fields = np.random.default_rng(0).normal(size=(2, 4, 6)).clip(-2, 2).astype(np.float32)
    return model, tokenizer, fields


def test_this_model_looks_at_its_input(setup):
    """Or else the tests below could not fail."""
    model, tokenizer, fields = setup
    for sampling in ("expectation", "greedy"):
        out = run(setup, sampling=sampling)
        assert out.unique().numel() > 5
        assert not torch.equal(leviathan.rollout(model, tokenizer, -fields, num_steps=3, progress=False), out)


def run(setup, **options):
    model, tokenizer, fields = setup
    return leviathan.rollout(model, tokenizer, fields, **({"num_steps": 3, "progress": False} | options))


@pytest.mark.parametrize("sampling", ["expectation", "greedy"])
def test_equals_the_plain_loop(setup, sampling):
    """Patch by patch, token by token, without cache or generate."""
    model, tokenizer, fields = setup
    ids = tokenizer(fields, return_tensors="pt")["input_ids"]
    expected = []
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            sequence = ids
            for _ in range(4):
                logits = model(sequence, prefix_length=4, use_cache=False).logits[:, -1].double()
                mean = logits.softmax(-1) @ torch.arange(32, dtype=torch.float64)
                chosen = mean.round().long() if sampling == "expectation" else logits.argmax(-1)
                sequence = torch.cat([sequence, chosen.unsqueeze(-1)], -1)
            ids = sequence[:, 4:]
            expected.append(tokenizer.decode(ids, field_shape=(4, 6)))
    assert torch.equal(run(setup, sampling=sampling), torch.stack(expected, 1))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_cached_equals_uncached_and_is_deterministic_under_a_seed(setup, sampling):
    first = run(setup, sampling=sampling, seed=3)
    assert first.shape == (2, 3, 4, 6)
    assert first.dtype == torch.float32
    assert torch.equal(run(setup, sampling=sampling, seed=3), first)
    assert torch.equal(run(setup, sampling=sampling, seed=3, use_cache=False), first)
    assert torch.equal(run(setup, sampling=sampling, seed=4), first) == (sampling not in RANDOM)


def test_physical_units_of_level_centres(setup):
    _, tokenizer, _ = setup
    out = run(setup)
    levels = (out - tokenizer.low) / tokenizer.level - 0.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert out.min() >= tokenizer.low
    assert out.max() <= tokenizer.high


def test_batches_do_not_change_a_deterministic_rollout(setup):
    assert torch.equal(run(setup, batch_size=5), run(setup))


def test_patches_and_fields_are_independent_streams(setup):
    model, tokenizer, fields = setup
    changed = fields.copy()
    changed[0, :2, :2] = -changed[0, :2, :2]
    a, b = (leviathan.rollout(model, tokenizer, f, num_steps=2, progress=False) for f in (fields, changed))
    same = a == b
    same[0, :, :2, :2] = True
    assert same.all()
    alone = leviathan.rollout(model, tokenizer, torch.from_numpy(fields[1]), num_steps=2, progress=False)
    assert torch.equal(alone[0], a[1])


def test_several_samples(setup):
    out = run(setup, sampling="sample", num_samples=3, seed=0)
    assert out.shape == (2, 3, 3, 4, 6)
    assert not torch.equal(out[:, 0], out[:, 1])


def test_top_k_of_one_is_greedy_and_cold_sampling_too(setup):
    greedy = run(setup, sampling="greedy")
    assert torch.equal(run(setup, sampling="top_k", top_k=1, seed=0), greedy)
    assert torch.equal(run(setup, sampling="sample", temperature=1e-4, seed=0), greedy)


def test_global_state_is_left_as_it_was(setup):
    model = setup[0]
    model.train()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run(setup, sampling="sample", seed=0)
    run(setup, sampling="expectation")
    assert model.training
    assert torch.equal(torch.rand(3), expected)


def test_without_a_seed_every_rollout_is_another(setup):
    assert not torch.equal(run(setup, sampling="sample"), run(setup, sampling="sample"))


def test_what_is_stored_with_the_model_does_not_bend_the_distribution(setup):
    model = setup[0]
    expected = run(setup)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.num_beams = 3
    assert torch.equal(run(setup), expected)
    assert model.generation_config.num_beams == 3
    model.generation_config.repetition_penalty = model.generation_config.num_beams = None


def test_broken_scores_are_said(setup):
    with pytest.raises(ValueError, match="not finite"):
        ExpectationLogitsProcessor()(torch.zeros(1, 1), torch.full((1, 4), torch.nan))


def test_expectation_processor_keeps_the_rounded_mean():
    scores = torch.log(torch.tensor([[0.5, 0.0, 0.0, 0.5], [0.1, 0.9, 0.0, 0.0]]))
    out = ExpectationLogitsProcessor()(torch.zeros(2, 1, dtype=torch.long), scores)
    assert out.argmax(-1).tolist() == [2, 1]  # means 1.5 and 0.9
    assert (out == 0).sum(-1).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "beam"}, "sampling = 'beam'; expected one of"),
        ({"num_steps": 0}, "num_steps = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"num_samples": 2}, "deterministic"),
        ({"sampling": "top_k", "top_k": 0}, "top_k = 0"),
        ({"sampling": "top_p", "top_p": 1.5}, "top_p = 1.5"),
        ({"sampling": "sample", "temperature": 0.0}, "temperature = 0"),
    ],
)
def test_bad_options(setup, options, message):
    with pytest.raises(ValueError, match=message):
        run(setup, **options)


def test_model_and_tokenizer_must_fit(setup):
    model, tokenizer, fields = setup
    with pytest.raises(ValueError, match="32 ids and the tokenizer 256"):
        leviathan.rollout(model, FieldTokenizer(2, 8, 16, low=-2.0, high=2.0), fields)
    with pytest.raises(ValueError, match="need 32 positions"):
        leviathan.rollout(model, FieldTokenizer(4, 5, 6, low=-2.0, high=2.0), fields[:, :, :4])
    with pytest.raises(ValueError, match="does not divide"):
        leviathan.rollout(model, tokenizer, fields[:, :3])
    for bad, message in [
        (np.full((4, 4), np.nan), "finite"),
        (np.zeros((0, 4, 4)), "not empty"),
        (np.zeros(4), "expected .batch"),
        ([[0.0, 1.0, 2.0]], "does not divide"),
    ]:
        with pytest.raises(ValueError, match=message):
            leviathan.rollout(model, tokenizer, bad)
    half = torch.from_numpy(fields).to(torch.bfloat16)
    assert leviathan.rollout(model, tokenizer, half, num_steps=1, progress=False).dtype == torch.float32
