"""The fused cross entropy equals the plain ones, and never holds the logits of more than a chunk."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from leviathan.loss_leviathan import TableHead, chunked_loss, cross_entropy_of, fused_cross_entropy, is_plain

TOKENS, HIDDEN, VOCAB = 50, 12, 300


def inputs(dtype=torch.float64):
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, VOCAB, (TOKENS,))


def dense(hidden, weight, labels):
    return F.cross_entropy(hidden @ weight.mT, labels, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_values_and_gradients_equal_the_dense_loss(chunk):
    hidden, weight, labels = inputs()
    expected = dense(hidden, weight, labels)
    exact = torch.autograd.grad(expected * 0.3, (hidden, weight))
    for loss in (
        fused_cross_entropy(hidden, weight, labels, chunk),
        chunked_loss(cross_entropy_of(TableHead(weight)), hidden, labels, chunk),
    ):
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        for a, b in zip(torch.autograd.grad(loss * 0.3, (hidden, weight)), exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences():
    hidden, weight, labels = inputs()
    torch.autograd.gradcheck(lambda h, w: fused_cross_entropy(h, w, labels, 16), (hidden, weight))


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_needs_no_gradient_gets_none(frozen):
    leaves = [*inputs()[:2]]
    labels = torch.randint(0, VOCAB, (TOKENS,))
    leaves[frozen].requires_grad_(False)
    fused_cross_entropy(*leaves, labels, 16).backward()
    assert leaves[frozen].grad is None
    assert leaves[1 - frozen].grad is not None
    with torch.no_grad(), Products() as made:
        torch.testing.assert_close(fused_cross_entropy(*leaves, labels, 50), dense(*leaves, labels))
    assert made.number == 2  # the logits of each, and no gradient


class Products(TorchDispatchMode):
    """Counts matrix products."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += str(function).startswith("aten.mm")
        return function(*args, **(kwargs or {}))


def test_what_is_more_than_its_weight_is_not_taken_for_it():
    device, weight = torch.device("cpu"), torch.randn(VOCAB, HIDDEN)
    assert is_plain(TableHead(weight), device)
    assert is_plain(torch.nn.Linear(HIDDEN, VOCAB, bias=False), device)
    hooked = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    hooked.register_forward_hook(lambda module, given, logits: logits * 2)
    offloaded = torch.nn.Linear(HIDDEN, VOCAB, bias=False, device="meta")
    normed = torch.nn.utils.weight_norm(torch.nn.Linear(HIDDEN, VOCAB, bias=False))
    gathered = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    gathered.weight.data = torch.empty(0)
    for head in (torch.nn.Linear(HIDDEN, VOCAB), hooked, offloaded, normed, gathered, torch.nn.Identity()):
        assert not is_plain(head, device)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_close_and_softmax_is_float32(autocast):
    hidden, weight, labels = inputs(torch.float32)
    exact = dense(hidden, weight, labels)
    gradients = torch.autograd.grad(exact, (hidden, weight))
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            loss = fused_cross_entropy(hidden, weight, labels, 16)
        found = torch.autograd.grad(loss, (hidden, weight))
    else:
        low = [each.detach().bfloat16().requires_grad_() for each in (hidden, weight)]
        loss = fused_cross_entropy(*low, labels, 16)
        found = torch.autograd.grad(loss, low)
    assert loss.dtype == torch.float32
    assert [each.dtype for each in found] == [torch.float32 if autocast else torch.bfloat16] * 2
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
    for a, b in zip(found, gradients, strict=True):
        assert (a.float() - b).norm() < 2e-2 * b.norm()


class Logits(TorchDispatchMode):
    """Shapes of all tensors as wide as the vocabulary."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == VOCAB and out.shape[0] != HIDDEN:
            self.rows.append(out.shape[0])
        return out


@pytest.mark.parametrize("fused", [False, True])
def test_the_logits_of_a_chunk_are_all_that_there_is(fused):
    hidden, weight, labels = inputs()
    with Logits() as seen:
        if fused:
            fused_cross_entropy(hidden, weight, labels, 8).backward()
        else:
            chunked_loss(cross_entropy_of(TableHead(weight)), hidden, labels, 8).backward()
    assert max(seen.rows) == 8


def test_a_chunked_head_sees_every_token_once_forward_and_once_backward():
    seen = []

    def logits_of(hidden):
        seen.append(hidden.shape[0])
        return hidden @ torch.ones(HIDDEN, VOCAB, dtype=hidden.dtype)

    hidden, _, labels = inputs()
    chunked_loss(cross_entropy_of(logits_of), hidden, labels, 8).backward()
    assert max(seen) == 8
    assert sum(seen) == 2 * TOKENS


def test_no_tokens_cost_nothing():
    hidden, weight, labels = inputs()
    loss = fused_cross_entropy(hidden[:0], weight, labels[:0], 8)
    loss.backward()
    assert loss == 0
    assert (weight.grad == 0).all()


@pytest.mark.gpu
def test_a_gpu_computes_what_the_cpu_does():
    hidden, weight, labels = inputs(torch.float32)
    expected = fused_cross_entropy(hidden, weight, labels, 16)
    exact = torch.autograd.grad(expected, (hidden, weight))
    other = [each.detach().cuda().requires_grad_() for each in (hidden, weight)]
    loss = fused_cross_entropy(*other, labels.cuda(), 16)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4, atol=0)
    for a, b in zip(torch.autograd.grad(loss, other), exact, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-4)
