"""The contract of a transformers model, and of a Prefix-LM, on tiny random Leviathans."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from leviathan import LeviathanConfig, LeviathanForCausalLM, LeviathanModel
from leviathan.masking_leviathan import prefix_blocks
from sna_core import CodebookEmbedding, SeparableEmbedding

VOCAB, PREFIX, TARGET = 48, 5, 4


def tiny_config(**options) -> LeviathanConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "embedding_base": 7,
        "embedding_seed_dim": 8,
        "embedding_num_heads": 2,
        "embedding_num_knots": 5,
        "embedding_rank": 4,
        "initializer_range": 0.2,  # large enough for attention to matter
    }
    return LeviathanConfig(**(sizes | options))


def tiny(attn_implementation=None, **options) -> LeviathanForCausalLM:
    torch.manual_seed(0)
    config = tiny_config(**options)
    if attn_implementation:
        config._attn_implementation = attn_implementation
    model = LeviathanForCausalLM(config).eval()
    spread_embeddings(model.get_input_embeddings())
    return model


@torch.no_grad()
def spread_embeddings(embedding):
    """Gives every id an embedding of its own; at their initial values generated ones are nearly alike.

    Tokens that have an order get a random one with gaps.
    """
    if getattr(embedding, "token_order", None) is not None:
        embedding.set_token_order(torch.randperm(embedding.base**embedding.num_digits)[: embedding.num_embeddings])
    if isinstance(embedding, SeparableEmbedding):
        embedding.splines.normal_()  # factors of both signs: a product without a mean
        embedding.norm_weight.fill_(3.0)
        if embedding.residual_weight is not None:
            embedding.residual_weight.mul_(0.05)  # linear in positive coordinates: mostly a mean
    scale = 1 / embedding.weight.std(0).mean()
    linear = ("codebooks",) if isinstance(embedding, CodebookEmbedding) else ("out_weight", "residual_weight")
    for name in (*linear, "projection", "weight"):
        if isinstance(parameter := embedding._parameters.get(name), torch.nn.Parameter):
            parameter.mul_(scale)


def tokens(batch=2, length=PREFIX + TARGET):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


KINDS = {
    "separable": {},
    "separable-tied": {"tie_word_embeddings": True},
    "lookup": {"embedding_type": "lookup"},
    "lookup-tied": {"embedding_type": "lookup", "tie_word_embeddings": True},
    "low_rank": {"embedding_type": "low_rank"},
    "low_rank-tied": {"embedding_type": "low_rank", "tie_word_embeddings": True},
    "grouped-query": {"num_key_value_heads": 2},
    "digits": {"output_head": "digits", "output_head_rank": 8, "embedding_base": 7},
    "digits-lookup": {
        "output_head": "digits",
        "output_head_rank": 8,
        "embedding_type": "lookup",
        "embedding_base": 7,
        "embedding_num_digits": 2,
    },
    "codebook": {"embedding_type": "codebook"},
    "codebook-ordered-tied": {"embedding_type": "codebook", "embedding_ordered": True, "tie_word_embeddings": True},
    "ordered": {"embedding_ordered": True},
    "v1-reflected": {"embedding_variant": "v1", "embedding_low_digit": "reflected"},
}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
# Flex attention on a CPU has no backward: what runs it runs without gradients.
attentions = pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])


@kinds
def test_these_models_tell_ids_and_prefixes_apart(options):
    """Or else the tests below could not fail."""
    model, ids = tiny(**options), tokens()
    for length in (None, PREFIX):
        logits = model(ids, prefix_length=length).logits
        assert logits.std(1).mean() > 0.1 * logits.std()
    causal, prefixed = (model(ids, prefix_length=length).logits for length in (None, PREFIX))
    assert (causal - prefixed)[:, PREFIX - 1 :].std() > 0.05 * causal.std()


@attentions
@torch.no_grad()
def test_no_future_token_moves_a_prediction(attention):
    model, ids = tiny(attention), tokens(1)
    base = model(ids, prefix_length=PREFIX).logits
    for i in range(TARGET):
        changed = ids.clone()
        changed[0, PREFIX + i :] = (changed[0, PREFIX + i :] + 1) % VOCAB
        logits = model(changed, prefix_length=PREFIX).logits
        # The prediction of target token i stands at the token before it; the prefix sees no target token at all.
        assert torch.equal(logits[:, : PREFIX + i], base[:, : PREFIX + i])
        assert not torch.allclose(logits[:, PREFIX + i], base[:, PREFIX + i])


@attentions
@torch.no_grad()
def test_the_prefix_attends_in_both_directions(attention):
    model, ids = tiny(attention), tokens(1)
    changed = ids.clone()
    changed[0, PREFIX - 1] = (changed[0, PREFIX - 1] + 1) % VOCAB
    first = [model(x, prefix_length=PREFIX).logits[:, 0] for x in (ids, changed)]
    assert not torch.allclose(*first)
    causal = [model(x).logits[:, 0] for x in (ids, changed)]
    assert torch.equal(*causal)


@torch.no_grad()
def test_attention_implementations_agree():
    ids = tokens()
    reference = tiny("eager")(ids, prefix_length=PREFIX).logits
    for attention in ("sdpa", "flex_attention"):
        torch.testing.assert_close(tiny(attention)(ids, prefix_length=PREFIX).logits, reference, rtol=1e-4, atol=1e-5)


def test_prefix_length_and_token_types_mean_the_same():
    model, ids = tiny(), tokens()
    types = torch.zeros_like(ids)
    types[:, :PREFIX] = 1
    by_length = model(ids, prefix_length=PREFIX).logits
    torch.testing.assert_close(model(ids, token_type_ids=types).logits, by_length)
    torch.testing.assert_close(model(ids, prefix_length=torch.tensor([PREFIX, PREFIX])).logits, by_length)
    mixed = model(ids, prefix_length=torch.tensor([PREFIX, 0])).logits
    torch.testing.assert_close(mixed[0], by_length[0])
    torch.testing.assert_close(mixed[1], model(ids).logits[1])
    assert not torch.allclose(by_length, model(ids).logits)


def test_each_run_of_a_prefix_is_a_block_of_its_own():
    types = torch.tensor([[1, 1, 0, 1, 1, 1]])
    assert prefix_blocks(types).tolist() == [[0, 0, -1, 1, 1, 1]]
    assert prefix_blocks(types, torch.tensor([[0, 1, 2, 3, 0, 1]])).tolist() == [[0, 0, -1, 1, 2, 2]]


@kinds
@pytest.mark.parametrize("prefix", [None, PREFIX])
def test_cached_equals_full_forward(options, prefix):
    model, ids = tiny(**options), tokens()
    full = model(ids, prefix_length=prefix).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        out = model(ids[:, :PREFIX], prefix_length=prefix, past_key_values=cache, use_cache=True)
        logits = [out.logits]
        for i in range(PREFIX, PREFIX + TARGET):
            logits.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(logits, 1), full, rtol=1e-4, atol=1e-5)


@attentions
@pytest.mark.parametrize("prefix", [None, PREFIX])
@torch.no_grad()
def test_left_padding_changes_nothing(attention, prefix):
    model, ids = tiny(attention), tokens()
    padded = F.pad(ids, (3, 0))
    mask = F.pad(torch.ones_like(ids), (3, 0))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(padded, attention_mask=mask, position_ids=positions, prefix_length=prefix).logits[:, 3:]
    torch.testing.assert_close(out, model(ids, prefix_length=prefix).logits, rtol=1e-4, atol=1e-5)


@attentions
@pytest.mark.parametrize("with_prefix", [False, True])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(attention, with_prefix):
    model = tiny(attention)
    documents = [tokens(1, 5), tokens(1, 7), tokens(1, 4)]
    packed = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents]).unsqueeze(0)
    types = torch.cat([(torch.arange(d.shape[1]) < 3).long() for d in documents]).unsqueeze(0)
    out = model(packed, position_ids=positions, token_type_ids=types if with_prefix else None, use_cache=False).logits
    alone = [model(d, prefix_length=3 if with_prefix else None).logits for d in documents]
    torch.testing.assert_close(out, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_packing_holds_for_the_default_call(training):
    model, documents = tiny().train(training), [tokens(1, 5), tokens(1, 7)]
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents]).unsqueeze(0)
    out = model(torch.cat(documents, 1), position_ids=positions).logits
    torch.testing.assert_close(out, torch.cat([model(d).logits for d in documents], 1), rtol=1e-4, atol=1e-5)


def test_documents_that_are_all_prefix_stay_apart():
    model, documents = tiny(), [tokens(1, 4), tokens(1, 6)]
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents]).unsqueeze(0)
    packed = torch.cat(documents, 1)
    out = model(packed, position_ids=positions, token_type_ids=torch.ones_like(packed), use_cache=False).logits
    alone = [model(d, prefix_length=d.shape[1]).logits for d in documents]
    torch.testing.assert_close(out, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)


@kinds
def test_save_and_auto_load_give_the_same_outputs(options, tmp_path):
    model, ids = tiny(**options), tokens()
    model.save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(tmp_path.glob("*.bin"))
    expected = model(ids, prefix_length=PREFIX).logits
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert isinstance(loaded, LeviathanForCausalLM)
    torch.testing.assert_close(loaded(ids, prefix_length=PREFIX).logits, expected, rtol=0, atol=0)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert isinstance(backbone, LeviathanModel)
    torch.testing.assert_close(
        backbone(ids, prefix_length=PREFIX).last_hidden_state, model.model(ids, prefix_length=PREFIX).last_hidden_state
    )
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_diff_dict() == model.config.to_diff_dict()


@kinds
def test_meta_device_loading(options, tmp_path):
    model = tiny(**options)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = LeviathanForCausalLM(copy.deepcopy(model.config))
    assert all(p.is_meta for p in empty.parameters())
    loaded = LeviathanForCausalLM.from_pretrained(tmp_path)  # goes through the meta device
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_order_is_loaded_whole_in_half_precision(dtype, tmp_path):
    model = LeviathanForCausalLM(tiny_config(vocab_size=5000, embedding_base=80, embedding_ordered=True))
    order = torch.randperm(6400)[:5000]  # numbers that no half knows
    model.get_input_embeddings().set_token_order(order)
    model.save_pretrained(tmp_path)
    loaded = LeviathanForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    assert loaded.get_input_embeddings().token_order.dtype == torch.int64
    assert torch.equal(loaded.get_input_embeddings().token_order, order)


@pytest.mark.parametrize("kind", ["ordered", "codebook-ordered-tied"])
def test_an_order_that_a_checkpoint_lacks_is_the_ids(kind, tmp_path):
    plain = tiny(**KINDS[kind] | {"embedding_ordered": False})
    plain.save_pretrained(tmp_path)
    loaded, info = LeviathanForCausalLM.from_pretrained(tmp_path, embedding_ordered=True, output_loading_info=True)
    assert info["missing_keys"] == {"model.embed_tokens.token_order"}
    assert torch.equal(loaded.get_input_embeddings().token_order, torch.arange(VOCAB))
    torch.testing.assert_close(loaded(tokens()).logits, plain(tokens()).logits, rtol=0, atol=0)


def test_initial_values_survive_post_init():
    splines = LeviathanForCausalLM(tiny_config(embedding_seed_dim=32, embedding_rank=16)).model.embed_tokens.splines
    assert splines.mean().item() == pytest.approx(1.0, abs=0.01)
    assert splines.std().item() == pytest.approx(0.1, rel=0.1)


@kinds
def test_bfloat16_is_close(options):
    model, ids = tiny(**options), tokens()
    exact = model(ids, prefix_length=PREFIX).logits
    low = model.to(torch.bfloat16)(ids, prefix_length=PREFIX).logits
    assert low.dtype == (torch.float32 if options.get("output_head") == "digits" else torch.bfloat16)
    # Against what differs between positions: an error of the ids would be as large as that.
    varying = exact - exact.mean((0, 1))
    assert (low.float() - exact).norm() / varying.norm() < 0.15


@kinds
def test_compiled_equals_eager(options):
    model, ids = tiny(**options), tokens()
    torch._dynamo.reset()  # its limit on compilations of one function is for one model, not for all of these
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(ids, prefix_length=PREFIX, use_cache=False).logits
    torch.testing.assert_close(out, model(ids, prefix_length=PREFIX).logits, rtol=1e-4, atol=1e-4)


@kinds
def test_gradient_checkpointing_changes_no_gradient(options):
    model, ids = tiny(**options).train(), tokens()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.zero_grad()
        model(ids, prefix_length=PREFIX, labels=ids).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@kinds
def test_chunked_loss_equals_the_dense_one(options):
    dense, chunked = tiny(**options), tiny(**options, loss_chunk_size=3)
    ids = tokens()
    labels = ids.clone()
    labels[:, :PREFIX] = -100
    out = chunked(ids, prefix_length=PREFIX, labels=labels)
    assert out.logits is None
    assert chunked(ids, prefix_length=PREFIX).logits is not None
    expected = dense(ids, prefix_length=PREFIX, labels=labels).loss
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(
        chunked(ids, prefix_length=PREFIX, labels=labels, num_items_in_batch=torch.tensor(11)).loss,
        dense(ids, prefix_length=PREFIX, labels=labels, num_items_in_batch=torch.tensor(11)).loss,
    )
    out.loss.backward()
    expected.backward()
    for (name, a), b in zip(chunked.named_parameters(), dense.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 1e-4 * b.grad.norm(), name


@kinds
@pytest.mark.parametrize("size", [40, 60, 400])
def test_resize_token_embeddings(options, size, tmp_path):
    model, ids = tiny(**options), tokens() % 40
    before = model(ids, prefix_length=PREFIX).logits
    digits = options.get("output_head") == "digits"
    if digits and size > 49:
        with pytest.raises(ValueError, match="2 digits of base 7 number 49"):
            model.resize_token_embeddings(size)
        torch.testing.assert_close(model(ids, prefix_length=PREFIX).logits, before)
        return
    model.resize_token_embeddings(size)
    after = model(ids, prefix_length=PREFIX).logits
    assert after.shape[-1] == size
    assert model.config.vocab_size == size
    kept = min(size, VOCAB)
    if digits:  # what the lost ids had goes to those beside them
        before, after = (logits[..., :35].log_softmax(-1) for logits in (before, after))
    torch.testing.assert_close(after[..., :kept], before[..., :kept], rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(*(each(ids, prefix_length=PREFIX).logits for each in (loaded, model)))


@kinds
def test_embedding_weight_is_the_table(options):
    model, ids = tiny(**options), tokens()
    embedding = model.get_input_embeddings()
    assert embedding.weight.shape == (VOCAB, 32)
    torch.testing.assert_close(F.embedding(ids, embedding.weight), embedding(ids))


def test_hidden_states_and_attentions_are_recorded():
    model = tiny("eager")
    out = model(tokens(), prefix_length=PREFIX, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3
    assert len(out.attentions) == 2
    attention = out.attentions[0]
    assert (attention[:, :, :PREFIX, PREFIX:] == 0).all()
    assert (attention[:, :, :PREFIX, :PREFIX] > 0).all()


def test_logits_to_keep():
    model, ids = tiny(), tokens()
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 3])).logits, full[:, [1, 3]])


def test_flash_attention_refuses_a_prefix():
    model = tiny()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="cannot mask a prefix"):
        model(tokens(), prefix_length=PREFIX)


def test_a_prefix_is_never_ignored_in_silence():
    model, ids = tiny(), tokens()
    expected = model(ids, prefix_length=PREFIX).logits
    reused = StaticCache(config=model.config, max_cache_len=16)
    model(ids, past_key_values=reused)
    reused.reset()  # initialised, and empty
    torch.testing.assert_close(
        model(ids, prefix_length=PREFIX, past_key_values=reused).logits, expected, rtol=1e-4, atol=1e-5
    )
    cache = DynamicCache(config=model.config)
    model(ids[:, :2], past_key_values=cache)
    with pytest.raises(ValueError, match="holds 2 tokens already"):
        model(ids[:, 2:], prefix_length=3, past_key_values=cache)
    with pytest.raises(ValueError, match="would decide alone"):
        model(ids, prefix_length=PREFIX, attention_mask=torch.zeros(2, 1, 9, 9))
    with pytest.raises(ValueError, match="exceeds the 9 tokens"):
        model(ids, prefix_length=10)
    mask = torch.ones_like(ids)
    for options in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}):
        with pytest.raises(ValueError, match="exceeds the 9 tokens"):
            model.generate(ids, attention_mask=mask, prefix_length=10, max_new_tokens=3, **options)
    with pytest.raises(ValueError, match="exceeds the 4 tokens"):
        model.generate(ids, attention_mask=mask, prefix_length=9, max_new_tokens=3, prefill_chunk_size=4)
    with pytest.raises(ValueError, match="holds 2 tokens already"):
        model.generate(ids, attention_mask=mask, prefix_length=9, max_new_tokens=3, past_key_values=cache)


def test_evaluation_becomes_a_lookup_and_training_does_not():
    model, ids = tiny(), torch.arange(VOCAB).unsqueeze(0)
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        expected = model(ids).logits
        assert embedding.is_baked  # as many rows as the table has
        torch.testing.assert_close(model(ids).logits, expected)
    model.train()(ids, labels=ids).loss.backward()
    assert not embedding.is_baked
    assert embedding.splines.grad is not None


def test_each_embedding_has_its_defaults():
    assert LeviathanConfig(vocab_size=500, embedding_type="low_rank").embedding_rank == 64
    codebook = LeviathanConfig(vocab_size=500, embedding_type="codebook", embedding_low_digit="reflected")
    assert (codebook.embedding_base, codebook.embedding_num_digits, codebook.embedding_ordered) == (23, 2, False)
    assert codebook.embedding_rank is None
    model = tiny(embedding_type="codebook", embedding_low_digit="reflected")
    assert model.get_input_embeddings().low_digit == "reflected"


def test_config_is_typed_and_complete(tmp_path):
    config = LeviathanConfig(vocab_size=65_536)
    assert (config.embedding_base, config.embedding_num_digits) == (256, 2)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "leviathan"
    assert stored["embedding_base"] == 256
    assert stored["embedding_low_digit"] == "plain"
    assert (stored["embedding_num_knots"], stored["embedding_seed_bias"]) == (16, False)
    assert stored["embedding_ordered"] is False
    assert LeviathanConfig(vocab_size=65_536, embedding_variant="v1").embedding_num_knots == 32
    assert LeviathanConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size = 30 is not a multiple"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"embedding_base": 10, "embedding_num_digits": 2}, "number 100 ids"),
        ({"loss_chunk_size": 0}, "loss_chunk_size = 0"),
        ({"embedding_type": "table"}, "embedding_type"),
        ({"hidden_size": "512"}, "hidden_size"),
    ],
)
def test_bad_config(options, message):
    with pytest.raises(Exception, match=message):
        LeviathanConfig(vocab_size=65_536, **options)


def test_bad_input():
    model, ids = tiny(), tokens()
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="one of prefix_length and token_type_ids"):
        model(ids, prefix_length=3, token_type_ids=torch.ones_like(ids))
    with pytest.raises(ValueError, match="prefix_length = -1"):
        model(ids, prefix_length=-1)
    with pytest.raises(ValueError, match="logits_to_keep has shape"):
        model(ids, logits_to_keep=torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"shape \(3,\); expected an integer or one for each of the 2 rows"):
        model(ids, prefix_length=torch.tensor([1, 2, 3]))


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_a_gpu_computes_what_the_cpu_does(attention):
    model, ids = tiny(), tokens()
    expected = model(ids, prefix_length=PREFIX, labels=ids)
    expected.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    other = tiny(attention).cuda()
    out = other(ids.cuda(), prefix_length=PREFIX, labels=ids.cuda())
    out.loss.backward()
    torch.testing.assert_close(out.logits.cpu(), expected.logits, rtol=1e-3, atol=1e-4)
    for a, b in zip(other.parameters(), gradients, strict=True):
        torch.testing.assert_close(a.grad.cpu(), b, rtol=1e-2, atol=1e-4)
