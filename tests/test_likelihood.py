"""Likelihoods of text against loops over one sequence at a time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from eval import likelihood
from eval.likelihood import check_vocabulary, continuation_loglikelihood, document_loglikelihood, token_losses
from tests.test_leviathan import VOCAB, kinds, tiny, tokens

TEXT = "The cat sat on the mat. A dog, the cat's friend, sat there too; they sat on the mat together all day long.\n"
END = "<|endoftext|>"


def words_tokenizer(size=VOCAB):
    """Ids are written w0 w1 .. and spaces belong to no token; w0 begins a text."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w0")


def bytes_tokenizer(begins=False):
    """A byte-level BPE as GPT-2's; with `begins` it writes its first token before every text, as LLaMA's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def text(ids):
    return " ".join(f"w{i}" for i in ids)


@torch.no_grad()
def by_hand(model, context, predicted):
    """Sum of log-probabilities in float64, one forward pass for each token."""
    ids, total, greedy = list(context), 0.0, True
    for token in predicted:
        logits = model(torch.tensor([ids[-model.config.max_position_embeddings :]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
        ids.append(token)
    return total, greedy


@kinds
def test_token_losses_are_the_cross_entropy(options, monkeypatch):
    model, ids = tiny(**options), tokens(5, 9)
    logits = model(ids).logits.detach()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(5, 8)
    for size, at_once in ((1, 2**24), (2, 3 * VOCAB), (5, 1)):
        monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", at_once)
        losses = token_losses(model, ids, batch_size=size)
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def test_a_large_vocabulary_has_few_logits_at_one_time(monkeypatch):
    model, ids, seen = tiny(), tokens(4, 9), []
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 3 * VOCAB + 1)
    model.lm_head.register_forward_hook(lambda module, given, logits: seen.append(logits.numel()))
    token_losses(model, ids, batch_size=4)
    assert sum(seen) == 4 * 8 * VOCAB
    assert max(seen) == 3 * VOCAB


def test_other_models_are_read_through_their_logits():
    model, ids = tiny(tie_word_embeddings=True), tokens(3, 9)
    torch.testing.assert_close(token_losses(model.to_llama(), ids), token_losses(model, ids), rtol=1e-4, atol=1e-5)
    pairs = [("w3 w4", " w5"), ("", "w6 w7 w8")]
    for ours, llama in zip(
        *(continuation_loglikelihood(m, words_tokenizer(), pairs) for m in (model, model.to_llama())), strict=True
    ):
        assert ours == pytest.approx(llama, abs=1e-4)


@pytest.mark.parametrize("as_llama", [False, True])
def test_packed_documents_do_not_see_one_another(as_llama):
    model, ids = tiny(), tokens(2, 10)
    model = model.to_llama() if as_llama else model
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]])
    losses = token_losses(model, ids, position_ids=positions)
    for row, cut in enumerate((4, 7)):
        torch.testing.assert_close(losses[row : row + 1, : cut - 1], token_losses(model, ids[row : row + 1, :cut]))
        torch.testing.assert_close(losses[row : row + 1, cut:], token_losses(model, ids[row : row + 1, cut:]))
    assert not torch.allclose(losses, token_losses(model, ids))


def test_the_mode_is_left_and_nothing_is_dropped_or_learned(monkeypatch):
    model, ids = tiny(attention_dropout=0.5), tokens()
    expected = token_losses(model, ids)
    model.train()
    losses = token_losses(model, ids)
    assert model.training
    assert not losses.requires_grad
    torch.testing.assert_close(losses, expected)
    monkeypatch.setattr(model, "output_head", None)
    with pytest.raises(TypeError):
        token_losses(model, ids)
    assert model.training


def test_continuations_equal_one_token_at_a_time():
    model, tokenizer = tiny(), words_tokenizer()
    cases = [([3, 4, 5], [6, 7]), ([8], [9]), ([2, 2, 2, 2, 2, 2], [40, 41, 42]), ([], [5, 6]), ([11], [1, 2, 3, 4, 5])]
    likeliest = int(model(torch.tensor([[3, 4, 5]])).logits[0, -1].argmax())
    cases.append(([3, 4, 5], [likeliest]))
    pairs = [(text(context), " " * bool(context) + text(predicted)) for context, predicted in cases]
    for size in (1, 4, 8):
        found = continuation_loglikelihood(model, tokenizer, pairs, batch_size=size)
        for (context, predicted), (score, greedy) in zip(cases, found, strict=True):
            expected = by_hand(model, context or [0], predicted)
            assert (score, greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1])
    assert found[-1][1]


def test_the_probabilities_of_all_continuations_sum_to_one():
    found = continuation_loglikelihood(tiny(), words_tokenizer(), [("w7 w8", f" w{i}") for i in range(VOCAB)])
    scores, greedy = (torch.tensor(each) for each in zip(*found, strict=True))
    assert scores.exp().sum() == pytest.approx(1.0, abs=1e-4)
    assert greedy.sum() == 1
    assert greedy[scores.argmax()]


@settings(max_examples=20)
@given(st.lists(st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=6), min_size=3, max_size=3))
def test_the_chain_rule(parts):
    model, tokenizer = tiny(), words_tokenizer()
    context, first, second = map(text, parts)
    pairs = [(context, f" {first} {second}"), (context, f" {first}"), (f"{context} {first}", f" {second}")]
    (whole, _), (begun, _), (gone_on, _) = continuation_loglikelihood(model, tokenizer, pairs)
    assert whole == pytest.approx(begun + gone_on, abs=1e-4)
    every = text(i for part in parts for i in part)
    ((alone, _),) = continuation_loglikelihood(model, tokenizer, [("", every)])
    assert document_loglikelihood(model, tokenizer, [every]) == [pytest.approx(alone, abs=1e-4)]


def test_spaces_between_count_to_the_continuation():
    model, tokenizer = tiny(vocab_size=300, embedding_base=18), bytes_tokenizer()
    expected = continuation_loglikelihood(model, tokenizer, [("The cat", " sat"), ("The cat", "  sat")])
    assert continuation_loglikelihood(model, tokenizer, [("The cat ", "sat"), ("The cat  ", "sat")]) == expected
    ids = [tokenizer.encode(each) for each in ("The cat", "The cat sat")]
    score, greedy = by_hand(model, ids[0], ids[1][len(ids[0]) :])
    assert expected[0] == (pytest.approx(score, abs=1e-4), greedy)
    ((blank, _),) = continuation_loglikelihood(model, tokenizer, [(" ", "cat")])  # no context is left
    assert blank == pytest.approx(by_hand(model, [0], tokenizer.encode(" cat"))[0], abs=1e-4)


def test_the_first_token_is_not_written_twice():
    model, tokenizer = tiny(vocab_size=300, embedding_base=18), bytes_tokenizer(begins=True)
    ids = tokenizer.encode("cat", add_special_tokens=False)
    expected = pytest.approx(by_hand(model, [0], ids)[0], abs=1e-4)
    found = continuation_loglikelihood(model, tokenizer, [("", "cat"), (END, "cat"), ("", END + "cat")])
    assert [score for score, _ in found] == [expected] * 3


def test_long_contexts_lose_their_beginning():
    model, tokenizer = tiny(max_position_embeddings=8), words_tokenizer()
    context = tokens(1, 30)[0].tolist()
    found = continuation_loglikelihood(model, tokenizer, [(text(context[-keep:]), " w5 w6") for keep in (30, 7, 6)])
    assert found[0] == pytest.approx(found[1])  # 8 positions read 7 of the context and w5
    assert found[1][0] != pytest.approx(found[2][0])
    assert found[0][0] == pytest.approx(by_hand(model, context[-7:], [5, 6])[0], abs=1e-4)
    full = continuation_loglikelihood(model, tokenizer, [("w9 w9", " w5" * 8)])
    assert full[0][0] == pytest.approx(by_hand(model, [9], [5] * 8)[0], abs=1e-4)


def test_documents_are_read_window_by_window():
    model, tokenizer = tiny(max_position_embeddings=8), words_tokenizer()
    lengths = (1, 7, 8, 9, 16, 21, 0)
    documents = [tokens(1, n)[0].tolist() for n in lengths]
    for context_length in (None, 5, 1):
        size, expected = context_length or 8, []
        for ids in documents:
            total, whole = 0.0, [0, *ids]
            for start in range(0, len(ids), size):
                stop = min(start + size, len(ids))
                total += by_hand(model, whole[max(0, stop - size) : start + 1], ids[start:stop])[0]
            expected.append(pytest.approx(total, abs=1e-3))
        assert document_loglikelihood(model, tokenizer, [*map(text, documents)], context_length, 3) == expected


@given(st.integers(0, 60), st.integers(1, 20))
def test_windows_predict_every_token_once(number, length):
    ids = list(range(1, number + 1))
    windows = likelihood._windows(ids, 0, length)
    assert [token for _, predicted in windows for token in predicted] == ids
    for context, predicted in windows:
        assert list(range(context[0], predicted[-1] + 1)) == context + predicted
        assert len(context + predicted) == min(length, number) + 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: token_losses(m, tokens(1, 5)[0]), r"shape \(5,\)"),
        (lambda m, t: token_losses(m, tokens(2, 1)), "two tokens or more"),
        (lambda m, t: token_losses(m, tokens().float()), "torch.float32"),
        (lambda m, t: token_losses(m, tokens(1, 10)), "10 tokens are longer than the 8 positions"),
        (lambda m, t: token_losses(m, tokens(), batch_size=-1), "batch_size = -1"),
        (lambda m, t: document_loglikelihood(m, t, ["w1"], batch_size=0), "batch_size = 0"),
        (lambda m, t: token_losses(m, tokens() + VOCAB), f"ids 0 to {VOCAB - 1}"),
        (lambda m, t: token_losses(m, tokens() - VOCAB), "hold the id -"),
        (
            lambda m, t: token_losses(m, tokens(2, 5), position_ids=torch.arange(5)),
            r"shape \(5,\); expected .*\(2, 5\)",
        ),
        (lambda m, t: continuation_loglikelihood(m, t, [("w1", " w2"), ("w1", "")]), r"pairs\[1\].*''.*no token"),
        (lambda m, t: continuation_loglikelihood(m, t, [("w1 ", "")]), "no token"),
        (lambda m, t: continuation_loglikelihood(m, t, [("w1", "  ")]), "no token"),
        (lambda m, t: continuation_loglikelihood(m, t, [("", "w0")]), "no token"),
        (lambda m, t: continuation_loglikelihood(m, t, [("w1", " w2" * 9)]), "has 9 tokens and the model 8 positions"),
        (lambda m, t: document_loglikelihood(m, t, ["w1"], context_length=9), "= 9; expected 1 to the model's 8"),
        (lambda m, t: document_loglikelihood(m, t, ["w1"], context_length=0), "= 0; expected"),
        (lambda m, t: document_loglikelihood(m, words_tokenizer(VOCAB + 1), ["w1"]), f"{VOCAB + 1} ids.* {VOCAB} "),
        (lambda m, t: continuation_loglikelihood(m, words_tokenizer(60), []), f"60 ids and the model {VOCAB}"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny(max_position_embeddings=8), words_tokenizer())


def test_vocabularies_are_compared_by_their_largest_id():
    check_vocabulary(words_tokenizer(VOCAB - 5), tiny())
    tokenizer = words_tokenizer(VOCAB - 1)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    check_vocabulary(tokenizer, tiny())
    tokenizer.add_special_tokens({"sep_token": "[SEP]"})
    with pytest.raises(ValueError, match=f"{VOCAB + 1} ids and the model {VOCAB}"):
        check_vocabulary(tokenizer, tiny())


def test_a_tokenizer_without_a_first_token_is_refused():
    tokenizer = words_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="no bos and no eos"):
        document_loglikelihood(tiny(), tokenizer, ["w1"])
