"""transformers' generate on a Leviathan equals loops written by hand, in every mode."""

import pytest
import torch
import torch.nn.functional as F

from tests.test_leviathan import KINDS, PREFIX, TARGET, VOCAB, kinds, tiny, tokens


def test_an_untied_model_generates_otherwise_behind_a_prefix():
    """Which a generated token that joined the prefix would change; a tied one mostly repeats itself."""
    for options in (KINDS["separable"], KINDS["lookup"], KINDS["low_rank"]):
        model, prompts = tiny(**options), tokens(8, PREFIX)
        mask = torch.ones_like(prompts)
        runs = [
            model.generate(prompts, attention_mask=mask, max_new_tokens=6, do_sample=False, **prefix)[:, PREFIX:]
            for prefix in ({}, {"prefix_length": PREFIX})
        ]
        assert not torch.equal(*runs)
        assert runs[1].unique().numel() > 5


def by_hand(model, ids, steps, choose, prefix=None):
    """The plain loop: the whole sequence again for every token."""
    for step in range(steps):
        scores = model(ids, prefix_length=prefix, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, choose(scores, step).unsqueeze(-1)], -1)
    return ids


@kinds
@pytest.mark.parametrize("prefix", [None, PREFIX])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_greedy_generation_equals_the_hand_loop(options, prefix, cache):
    model, ids = tiny(**options), tokens(2, PREFIX)
    expected = by_hand(model, ids, TARGET, lambda s, _: s.argmax(-1), prefix)
    modes = (
        {"use_cache": True, "cache_implementation": cache} if cache == "static" else {"use_cache": cache is not None}
    )
    arguments = {"max_new_tokens": TARGET, "do_sample": False, "attention_mask": torch.ones_like(ids), **modes}
    if prefix is not None:
        arguments["prefix_length"] = prefix
    assert torch.equal(model.generate(ids, **arguments), expected)
    if prefix is not None:
        del arguments["prefix_length"]
        arguments["token_type_ids"] = torch.ones_like(ids)
        assert torch.equal(model.generate(ids, **arguments), expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_sampled_generation_equals_the_hand_loop(use_cache):
    model, ids = tiny(), tokens(2, PREFIX)
    options = {"max_new_tokens": TARGET, "do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 0.7}
    torch.manual_seed(5)
    sampled = model.generate(
        ids, attention_mask=torch.ones_like(ids), prefix_length=PREFIX, use_cache=use_cache, **options
    )
    torch.manual_seed(5)
    expected = by_hand(model, ids, TARGET, lambda s, _: torch.multinomial((s / 0.7).softmax(-1), 1).squeeze(-1), PREFIX)
    assert torch.equal(sampled, expected)


def test_left_padded_batch_generates_as_its_rows_alone():
    model, short, long = tiny(), tokens(1, 3), tokens(1, 6)
    batch = torch.cat([F.pad(short, (3, 0)), long])
    mask = torch.cat([F.pad(torch.ones_like(short), (3, 0)), torch.ones_like(long)])
    lengths = torch.tensor([3, 6])
    for cache in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}):
        out = model.generate(
            batch,
            attention_mask=mask,
            prefix_length=lengths,
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            **cache,
        )
        for row, alone in enumerate((short, long)):
            expected = by_hand(model, alone, 4, lambda s, _: s.argmax(-1), alone.shape[1])
            assert torch.equal(out[row, -4:], expected[0, -4:])


def test_beam_search_equals_its_best_of_all_continuations():
    model, ids = tiny(), tokens(1, PREFIX)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        prefix_length=PREFIX,
        num_beams=VOCAB,
        max_new_tokens=2,
        do_sample=False,
    )
    first = model(ids, prefix_length=PREFIX).logits[:, -1].log_softmax(-1)
    every = torch.cat([ids.expand(VOCAB, -1), torch.arange(VOCAB).unsqueeze(-1)], -1)
    second = model(every, prefix_length=PREFIX).logits[:, -1].log_softmax(-1)
    best = (first.T + second).flatten().argmax()
    assert out[0, -2:].tolist() == [int(best) // VOCAB, int(best) % VOCAB]


def test_generation_from_embeddings():
    model, ids = tiny(), tokens(2, PREFIX)
    options = {"attention_mask": torch.ones_like(ids), "prefix_length": PREFIX, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **options)[:, PREFIX:]
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embedded, **options), expected)
