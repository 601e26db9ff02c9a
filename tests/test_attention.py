"""Attention of a prefix without a mask equals the dense formula, and makes no tensor of tokens x tokens."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from leviathan.attention_leviathan import (
    PREFIX_SDPA,
    _lower_right_attention,
    prefix_attention,
    prefix_attention_reference,
)
from leviathan.masking_leviathan import packed_block_mask, visible_intervals
from tests.test_leviathan import PREFIX, TARGET, tiny, tokens

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}  # relative, in norm


class Largest(TorchDispatchMode):
    """The largest number of elements among the tensors that operations return."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return out


class Called(TorchDispatchMode):
    """The names of the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def inputs(num_tokens, dtype, heads=3, head_dim=8):
    shape = (2, num_tokens, heads, head_dim)  # as a projection leaves them
    return [torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def same_values_and_gradients(attention, num_tokens, prefix, dtype):
    given_ones = inputs(num_tokens, dtype)
    exact = [each.detach().double().requires_grad_() for each in given_ones]
    out, expected = attention(*given_ones, prefix, 0.3), prefix_attention_reference(*exact, prefix, 0.3)
    gradient = torch.randn_like(out)
    pairs = zip(
        (out, *torch.autograd.grad(out, given_ones, gradient)),
        (expected, *torch.autograd.grad(expected, exact, gradient.double())),
        strict=True,
    )
    for a, b in pairs:
        assert relative(a, b) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@given(num_tokens=st.integers(2, 70), share=st.floats(0, 1))
def test_equals_the_dense_formula(dtype, num_tokens, share):
    torch.manual_seed(num_tokens)  # an example is the same when it is tried again
    same_values_and_gradients(prefix_attention, num_tokens, round(share * num_tokens), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 20])
def test_the_calls_of_a_gpu_fit_its_kernels(dtype, head_dim):
    """By what PyTorch knows of them without a device: arguments and shapes, one graph when compiled."""
    given_ones = [torch.empty(2, 3, 9, head_dim, dtype=dtype, device="meta", requires_grad=True) for _ in range(3)]
    with Called() as called:
        out = prefix_attention(*given_ones, 5)
    assert (out.shape, out.dtype) == ((2, 3, 9, head_dim), dtype)
    kernel = "_scaled_dot_product_flash_attention" if dtype == torch.bfloat16 else "_efficient_attention_forward"
    assert f"aten.{kernel}.default" in called.names
    assert torch._dynamo.explain(prefix_attention)(*given_ones, 5).graph_break_count == 0
    if dtype == torch.bfloat16:
        out.float().sum().backward()
        assert all(each.grad.shape == each.shape for each in given_ones)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_bias_of_compiled_float32_is_that_of_the_formula(rows, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    query, key, value = inputs(9, torch.float32)
    found = _lower_right_attention(query[:, :, -rows:], key, value, None)
    torch.testing.assert_close(found, prefix_attention_reference(query, key, value, 9 - rows)[:, :, -rows:])


def test_inputs_of_any_layout():
    query, key, value = (torch.randn(2, 3, 8, 20).mT for _ in range(3))  # the last dimension is not contiguous
    expected = prefix_attention_reference(query, key, value, 7)
    torch.testing.assert_close(prefix_attention(query, key, value, 7), expected)


def test_functional_gradients():
    given_ones = [each.detach() for each in inputs(12, torch.float64)]
    gradients = [
        torch.func.grad(lambda q, k, v, attention=attention: attention(q, k, v, 5).square().sum(), argnums=(0, 1, 2))(
            *given_ones
        )
        for attention in (prefix_attention, prefix_attention_reference)
    ]
    for found, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(found, exact)


def test_autocast_takes_its_dtype():
    query, key, value = inputs(20, torch.float32)
    expected = prefix_attention(*(each.bfloat16() for each in (query, key, value)), 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prefix_attention(query, key, value.bfloat16(), 7), expected)  # rotation leaves float32


def test_long_states():
    same_values_and_gradients(prefix_attention, 700, 400, torch.float32)


def test_the_default_model_computes_what_masks_do():
    ids = tokens()
    labels = ids.clone()
    results = []
    for attention in (None, "sdpa", "eager"):
        for options in ({}, {"num_key_value_heads": 2}):
            model = tiny(attention, **options).train()
            assert model.config._attn_implementation == (attention or PREFIX_SDPA)
            out = model(ids, prefix_length=PREFIX, labels=labels)
            out.loss.backward()
            results.append((options, out.logits, {name: p.grad for name, p in model.named_parameters()}))
    for options, logits, gradients in results[2:]:
        _, expected, exact = next(result for result in results[:2] if result[0] == options)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        for name, gradient in gradients.items():
            assert relative(gradient, exact[name]) < 1e-4, name


@pytest.mark.parametrize("mask", [None, "ones"])
def test_no_tensor_of_tokens_by_tokens_is_made(mask):
    ids = tokens(1, 600)
    largest = {}
    for attention in (None, "sdpa"):
        model = tiny(attention, max_position_embeddings=1024, loss_chunk_size=64).train()
        with Largest() as watch:
            given_mask = torch.ones_like(ids) if mask else None
            model(ids, attention_mask=given_mask, prefix_length=300, labels=ids).loss.backward()
        largest[attention] = watch.numel
    assert largest[None] < 600 * 600 / 4
    assert largest["sdpa"] >= 600 * 600  # what a mask costs: the test can fail


def test_generation_reads_its_prefix_without_a_mask():
    model, ids = tiny(max_position_embeddings=1024), tokens(1, 600)
    with Largest() as watch:
        model.generate(ids, attention_mask=torch.ones_like(ids), prefix_length=600, max_new_tokens=2, do_sample=False)
    assert watch.numel < 600 * 600 / 4


def test_padding_and_prefixes_of_different_lengths_are_masked():
    model, ids = tiny(), tokens(2, PREFIX + TARGET)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    reference = tiny("eager")
    for options in (
        {"attention_mask": mask, "prefix_length": 3},
        {"prefix_length": torch.tensor([2, 5])},
        {"prefix_length": 3, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])},
    ):
        kept = options.get("attention_mask", mask.new_ones(mask.shape)).bool()
        out, expected = (each(ids, **options).logits[kept] for each in (model, reference))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_dropout_of_attention_is_not_forgotten():
    model, ids = tiny(attention_dropout=0.5).train(), tokens()
    a, b = (model(ids, prefix_length=PREFIX).logits for _ in range(2))
    assert not torch.allclose(a, b)


@given(st.data())
def test_the_intervals_and_blocks_of_packed_documents_are_those_of_the_dense_pattern(data):
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=6))
    block_size = data.draw(st.integers(1, 9))
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    prefixes = [data.draw(st.integers(0, n)) for n in lengths]
    types = torch.cat([torch.arange(n) < p for n, p in zip(lengths, prefixes, strict=True)]).long().unsqueeze(0)
    row = torch.arange(types.shape[1])
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    both = document.unsqueeze(1) == document
    dense = both & ((row.unsqueeze(1) >= row) | ((types.mT == 1) & (types == 1)))

    start, stop = visible_intervals(types, positions)
    assert torch.equal((row >= start.mT) & (row < stop.mT), dense)
    mask = packed_block_mask(types, positions, block_size)
    blocks, cells = -(-len(row) // block_size), dense.new_ones(dense.shape)
    pad = (0, blocks * block_size - len(row)) * 2
    seen, real = (
        F.pad(each, pad).view(blocks, block_size, blocks, block_size).transpose(1, 2) for each in (dense, cells)
    )
    full = (seen | ~real).all(-1).all(-1)
    for counts, indices, expected in (
        (mask.full_kv_num_blocks, mask.full_kv_indices, full),
        (mask.kv_num_blocks, mask.kv_indices, seen.any(-1).any(-1) & ~full),
    ):
        for i in range(blocks):
            assert indices[0, 0, i, : counts[0, 0, i]].tolist() == expected[i].nonzero().flatten().tolist()


def test_flex_attention_over_packed_documents_makes_no_mask_of_tokens_by_tokens():
    types = (torch.arange(8192) % 2048 < 700).long().unsqueeze(0)
    positions = (torch.arange(8192) % 2048).unsqueeze(0)
    with Largest() as watch:
        mask = packed_block_mask(types, positions)
    assert watch.numel <= 8192
    assert mask.sparsity() > 75


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_computes_what_the_formula_says(dtype):
    given_ones = [each.detach().cuda().requires_grad_() for each in inputs(700, dtype, head_dim=64)]
    exact = [each.detach().double().requires_grad_() for each in given_ones]
    out, expected = prefix_attention(*given_ones, 400), prefix_attention_reference(*exact, 400)
    gradient = torch.randn_like(out)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-3
    for a, b in zip(
        (out, *torch.autograd.grad(out, given_ones, gradient)),
        (expected, *torch.autograd.grad(expected, exact, gradient.double())),
        strict=True,
    ):
        assert relative(a, b) < tolerance
