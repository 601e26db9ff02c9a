"""Heads of a Leviathan: dense, tied to a generated table, or by digits; and its export as a LLaMA."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from leviathan import LeviathanForCausalLM
from tests.test_leviathan import KINDS, PREFIX, VOCAB, kinds, tiny, tiny_config, tokens


@pytest.mark.parametrize("kind", ["separable", "separable-tied", "digits"])
def test_a_hook_on_the_head_is_not_passed_by(kind):
    model, ids = tiny(loss_chunk_size=3, **KINDS[kind]), tokens()
    calls = []
    if model.lm_head is not None:
        model.lm_head.register_forward_hook(lambda module, given, out: calls.append(1))
    rows, embedding = [], model.get_input_embeddings()
    generate = embedding.generate
    embedding.generate = lambda ids: rows.append(len(ids)) or generate(ids)
    model.train()(ids, labels=ids).loss.backward()
    assert bool(calls) == (model.lm_head is not None)
    assert rows.count(VOCAB) == (kind == "separable-tied")  # its table is generated once


@torch.no_grad()
def test_the_digits_head_gives_a_distribution_and_its_loss():
    model, ids = tiny(**KINDS["digits"]), tokens()
    logits = model(ids, prefix_length=PREFIX).logits
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(logits.shape[:2]))
    labels = F.pad(ids[:, PREFIX:], (PREFIX, 0), value=-100)
    for chunk in (None, 3):
        model.config.loss_chunk_size = chunk
        out = model(ids, prefix_length=PREFIX, labels=labels)
        assert out.logits is None
        expected = -logits[:, PREFIX - 1 : -1].gather(-1, ids[:, PREFIX:, None]).mean()
        torch.testing.assert_close(out.loss, expected)


def test_the_digits_head_is_drawn_as_the_config_says_and_not_tied():
    head = LeviathanForCausalLM(tiny_config(vocab_size=40_000, **KINDS["digits"] | {"embedding_base": 200})).lm_head
    assert (head.base, head.num_digits, head.rank) == (200, 2, 8)
    assert head.first_weight.std().item() == pytest.approx(0.2, rel=0.1)
    assert head.digit_factors.mean().item() == pytest.approx(1.0, abs=0.02)
    with pytest.raises(Exception, match="no table to tie"):
        tiny_config(output_head="digits", tie_word_embeddings=True)


@kinds
def test_baking_exports_what_llama_loads(options, tmp_path):
    model, ids = tiny(**options), tokens()
    if options.get("output_head") == "digits":
        with pytest.raises(ValueError, match="'digits' is not LLaMA's"):
            model.save_pretrained(tmp_path, bake=True)
        return
    model.save_pretrained(tmp_path, bake=True)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    llama, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM
    expected = model(ids).logits
    assert (llama(ids).logits - expected).norm() < 1e-5 * expected.norm()
    prompts = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(llama.generate(ids, **prompts), model.generate(ids, **prompts))
