"""transformers' generate on a Leviathan without a prefix, as a language model uses it, equals loops written by hand."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.test_leviathan import KINDS, VOCAB, tiny, tokens
from tests.test_leviathan_generate import by_hand

PROMPT, NEW = 5, 6
EMBEDDING_TYPES = ("separable", "lookup", "low_rank", "codebook")
# Every embedding, tied and not; grouped queries and the like change nothing here.
EMBEDDINGS = {name: options for name, options in KINDS.items() if name.split("-")[0] in EMBEDDING_TYPES}
kinds = pytest.mark.parametrize("options", EMBEDDINGS.values(), ids=EMBEDDINGS.keys())
CACHES = ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"})


@torch.no_grad()
def lively(**options):
    """A model that goes on to other ids; without this the tied ones repeat their last."""
    model = tiny(**options)
    model.model.norm.weight.normal_(std=0.5)
    return model


def continued(model, ids, mask=None, **options):
    """The new tokens alone."""
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]


def greedy(model, ids):
    return by_hand(model, ids, NEW, lambda scores, _: scores.argmax(-1))[:, ids.shape[1] :]


def left_padded(rows):
    width = max(len(row) for row in rows)
    ids = torch.stack([F.pad(row, (width - len(row), 0), value=3) for row in rows])  # any id will do
    mask = torch.stack([F.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return ids, mask


@kinds
def test_these_models_go_on_to_other_ids(options):
    """Or else the tests below could not fail."""
    assert greedy(lively(**options), tokens(8, PROMPT)).unique().numel() > 3


@kinds
def test_rows_stop_at_the_end_token(options):
    model, ids = lively(**options), tokens(4, PROMPT)
    whole = greedy(model, ids)
    end = int(whole[0, 2])
    ended = (whole == end).cumsum(-1) - (whole == end).long() > 0
    expected = whole.masked_fill(ended, 0)
    expected = expected[:, : int((~ended).sum(-1).max())]
    for cache in CACHES:
        assert torch.equal(continued(model, ids, eos_token_id=end, **cache), expected)


def processed(scores, temperature, top_k, top_p):
    """What is left of a row's logits: the likeliest ids that hold `top_p` of the `top_k` likeliest."""
    scores = scores / temperature
    kept = torch.full_like(scores, -torch.inf)
    for row, logits in enumerate(scores):
        best = logits.argsort(descending=True)[:top_k]
        share = logits[best].softmax(-1)
        before = share.cumsum(-1) - share
        kept[row, best[before < top_p]] = logits[best[before < top_p]]
    return kept


@kinds
def test_sampling_equals_draws_from_the_processed_logits(options):
    model, ids = lively(**options), tokens(3, PROMPT)
    warp = {"temperature": 1.5, "top_k": 12, "top_p": 0.8}

    def draw(scores, _):
        return torch.multinomial(processed(scores, **warp).softmax(-1), 1).squeeze(-1)

    torch.manual_seed(7)
    expected = by_hand(model, ids, NEW, draw)[:, PROMPT:]
    assert not torch.equal(expected, greedy(model, ids))
    for cache in CACHES:
        torch.manual_seed(7)
        assert torch.equal(continued(model, ids, do_sample=True, **warp, **cache), expected)


@torch.no_grad()
def beams_by_hand(model, ids, num_beams, steps):
    """Sequences and their log-probabilities, the likeliest first, of one prompt (tokens,)."""
    beams = [(0.0, ids.tolist())]
    for _ in range(steps):
        longer = []
        for score, sequence in beams:
            log_p = model(torch.tensor([sequence])).logits[0, -1].double().log_softmax(-1)
            longer += [(score + float(p), [*sequence, token]) for token, p in enumerate(log_p)]
        beams = sorted(longer, reverse=True)[:num_beams]
    return beams


@kinds
def test_beam_search_equals_beams_by_hand(options):
    model, ids = lively(**options), tokens(1, PROMPT)
    expected = beams_by_hand(model, ids[0], 3, 4)
    for cache in CACHES:
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4,
            do_sample=False,
            num_beams=3,
            num_return_sequences=3,
            output_scores=True,
            return_dict_in_generate=True,
            **cache,
        )
        assert found.sequences.tolist() == [sequence for _, sequence in expected]
        scores = [score / 4 for score, _ in expected]  # transformers' are means over the new tokens
        torch.testing.assert_close(found.sequences_scores, torch.tensor(scores), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("end", [None, 0, 3])
def test_enough_beams_find_the_best_of_all_continuations(end):
    size, steps = 4, 3
    model, ids = lively(vocab_size=size, embedding_base=2), torch.tensor([[1, 3, 0, 2]])
    every = {}  # log-probabilities of all continuations, until their end
    for choice in itertools.product(range(size), repeat=steps):
        stop = choice.index(end) + 1 if end in choice else steps
        logits = model(torch.tensor([[*ids[0].tolist(), *choice]])).logits[0, 3:-1].detach().log_softmax(-1)
        every[choice[:stop]] = sum(float(logits[t, choice[t]]) for t in range(stop))
    best = max(every, key=every.get)
    found = continued(
        model, ids, num_beams=size**steps, length_penalty=0.0, eos_token_id=end, max_new_tokens=steps, pad_token_id=None
    )
    assert tuple(found[0, : len(best)].tolist()) == best


@kinds
def test_a_left_padded_batch_generates_as_its_rows_alone(options):
    model, rows = lively(**options), [tokens(1, n)[0] for n in (2, 7, 4)]
    expected = torch.cat([greedy(model, row[None]) for row in rows])
    for cache in CACHES:
        assert torch.equal(continued(model, *left_padded(rows), **cache), expected)
    beams = [continued(model, row[None], num_beams=3) for row in rows]
    for cache in CACHES:
        assert torch.equal(continued(model, *left_padded(rows), num_beams=3, **cache), torch.cat(beams))


def test_prompts_of_which_one_ends_early():
    """Rows that have ended are padded, and change nothing in the others."""
    model, rows = lively(), [tokens(1, n)[0] for n in (3, 6)]
    whole = torch.cat([greedy(model, row[None]) for row in rows])
    end = next(int(token) for token in whole[0] if token not in whole[1])
    stop = whole[0].tolist().index(end) + 1
    for cache in CACHES:
        found = continued(model, *left_padded(rows), eos_token_id=end, **cache)
        assert torch.equal(found[1], whole[1])
        assert torch.equal(found[0, :stop], whole[0, :stop])
        assert not found[0, stop:].any()


def test_a_prompt_may_fill_the_positions():
    model, ids = lively(max_position_embeddings=PROMPT + NEW), tokens(2, PROMPT)
    assert torch.equal(continued(model, ids), greedy(model, ids))
    assert continued(model, ids).max() < VOCAB
