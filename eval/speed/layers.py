"""Speed of single functions: Prefix-LM attention, cross entropy over a large vocabulary, local splines."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.speed.measure import (
    Check,
    Figure,
    Section,
    Setup,
    Target,
    Work,
    alternate,
    difference,
    mebibytes_of,
    median_of,
    peak_mebibytes,
    precision_of,
)
from leviathan.attention_leviathan import prefix_attention
from leviathan.loss_leviathan import chunked_loss, cross_entropy_of, fused_cross_entropy
from sna_core import CPNetwork

ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of results, against their largest
FLASH_BACKWARD = 2.5  # FLOPs of a flash kernel's backward over its forward's: it makes the scores again


def attention_inputs(setup: Setup, shape: tuple[int, int, int, int]) -> tuple[Tensor, ...]:
    """Query, key, value with gradients and the gradient of the result: each (batch, heads, tokens, head_dim)."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=setup.device, dtype=setup.dtype) for _ in range(4)]
    return *(each.requires_grad_() for each in tensors[:3]), tensors[3]


def prefix_pass(setup: Setup, shape: tuple[int, int, int, int]) -> Callable[[], Any]:
    """Forward and backward of prefix attention, half of the tokens prefix."""
    *inputs, gradient = attention_inputs(setup, shape)
    return lambda: torch.autograd.grad(prefix_attention(*inputs, shape[2] // 2), inputs, gradient)


def causal_pass(setup: Setup, shape: tuple[int, int, int, int]) -> Callable[[], Any]:
    """Forward and backward of causal attention by PyTorch's own kernel."""
    *inputs, gradient = attention_inputs(setup, shape)
    attend = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    return lambda: torch.autograd.grad(attend(*inputs), inputs, gradient)


def masked_pass(setup: Setup, shape: tuple[int, int, int, int]) -> Callable[[], Any]:
    """The same as :func:`prefix_pass` with a dense boolean mask, made beforehand."""
    *inputs, gradient = attention_inputs(setup, shape)
    place = torch.arange(shape[2], device=setup.device)
    mask = (place <= place.unsqueeze(-1)) | (place < shape[2] // 2)
    attend = functools.partial(F.scaled_dot_product_attention, attn_mask=mask)
    return lambda: torch.autograd.grad(attend(*inputs), inputs, gradient)


def attention(setup: Setup) -> Section:
    """Prefix attention by blocks against the causal kernel at its rate, and against a dense mask."""
    batch, heads, tokens, dim = setup.pick(short=(1, 2, 64, 8), cpu=(1, 4, 8192, 64), cuda=(2, 16, 8192, 64))
    shape = (batch, heads, tokens, dim)
    prefix = target = tokens // 2
    pairs = prefix**2 + target * prefix + target**2 / 2  # of a query and a key; the causal pattern has tokens**2 / 2
    paths = {"prefix": prefix_pass, "causal": causal_pass, "masked": masked_pass}
    runs = {name: prepare(setup, shape) for name, prepare in paths.items()}
    error = difference(runs["prefix"](), runs["masked"]())
    samples = alternate(setup, runs)
    memory = {
        f"{size:,} tokens": [
            peak_mebibytes(setup, prefix_pass, ((batch, heads, size, dim),), ((batch, heads, 32, dim),))
        ]
        for size in (tokens, 2 * tokens)
    }
    flops = 4 * batch * heads * dim * pairs * (1 + FLASH_BACKWARD)
    # Forward reads three tensors and writes one; backward reads these and a gradient and writes three.
    least_bytes = 12 * batch * heads * tokens * dim * setup.dtype.itemsize
    seconds = median_of(samples, "prefix")
    return Section(
        "prefix_attention against scaled_dot_product_attention, causal and with a dense mask, forward + backward",
        {"shape": list(shape), "prefix_length": prefix, "dtype": precision_of(setup.dtype)},
        [
            Figure(
                "rate (pairs a second) over the causal kernel's",
                samples,
                ("causal", "prefix"),
                factor=pairs / (tokens**2 / 2),
                target=Target("forward + backward >= 0.9 of the FLOP-equivalent causal rate", at_least=0.9),
            ),
            Figure("speed-up over a dense mask", samples, ("masked", "prefix")),
            Figure(
                "peak memory of twice the tokens",
                memory,
                tuple(reversed(memory)),
                unit="mebibytes",
                target=Target("memory linear in tokens (twice, and a tenth for chance)", at_most=2.2),
            ),
        ],
        [Check("gradients, against a dense mask", error, ROUNDING[setup.dtype])],
        [Work("prefix attention, forward + backward", seconds, flops, least_bytes, precision_of(setup.dtype))],
        {"flops_per_second": flops / seconds},
    )


def _loss_pass(
    loss_of: Callable[..., Tensor], setup: Setup, tokens: int, hidden_size: int, vocab_size: int, chunk_size: int
) -> Callable[[], Any]:
    """Loss and its gradients in hidden states and weight."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, device=setup.device, requires_grad=True)
    head = nn.Linear(hidden_size, vocab_size, bias=False, device=setup.device)
    labels = torch.randint(vocab_size, (tokens,), device=setup.device)

    def run() -> tuple[Tensor, ...]:
        with setup.autocast():
            loss = loss_of(head, hidden, labels, chunk_size)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, head.weight))

    return run


def _fused(head: nn.Linear, hidden: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    return fused_cross_entropy(hidden, head.weight, labels, chunk_size)


def _chunked(head: nn.Linear, hidden: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    return chunked_loss(cross_entropy_of(head), hidden, labels, chunk_size)


def _dense(head: nn.Linear, hidden: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    return F.cross_entropy(head(hidden).float(), labels, reduction="sum")


def loss(setup: Setup) -> Section:
    """Cross entropy without the logits of all tokens."""
    sizes = setup.pick(short=(64, 16, 512, 16), cpu=(2048, 128, 65_536, 512), cuda=(16_384, 512, 65_536, 4096))
    paths = {name: functools.partial(_loss_pass, each) for name, each in _LOSSES.items()}
    runs = {name: prepare(setup, *sizes) for name, prepare in paths.items()}
    values = {name: run() for name, run in runs.items()}
    checks = [
        Check(f"loss and gradients, {name}", difference(values[name], values["dense"]), ROUNDING[setup.dtype])
        for name in ("fused", "chunked")
    ]
    del values
    samples = alternate(setup, runs)
    memory = mebibytes_of(setup, paths, sizes, (32, 16, 64, 16))
    tokens, hidden_size, vocab_size, chunk_size = sizes
    numbers = 3 * hidden_size * vocab_size + 4 * tokens * hidden_size  # weight twice and its gradient; hidden likewise
    flops = 6 * tokens * hidden_size * vocab_size
    return Section(
        "fused_cross_entropy against chunked_loss and against all logits, forward + backward",
        {"tokens": tokens, "hidden_size": hidden_size, "vocab_size": vocab_size, "chunk_size": chunk_size},
        [
            Figure("against chunked_loss", samples, ("chunked", "fused")),
            Figure("against all logits", samples, ("dense", "fused")),
            Figure("peak memory, chunked_loss", memory, ("chunked", "fused"), unit="mebibytes"),
            Figure("peak memory, all logits", memory, ("dense", "fused"), unit="mebibytes"),
        ],
        checks,
        [Work("fused loss", median_of(samples, "fused"), flops, 4 * numbers, precision_of(setup.dtype))],
    )


_LOSSES = {"fused": _fused, "chunked": _chunked, "dense": _dense}


def splines(setup: Setup) -> Section:
    """The local kernel of a CP network against the dense basis."""
    points = setup.pick(short=256, cpu=250_000, cuda=1_000_000)
    sizes = {"num_inputs": 7, "rank": 32, "degree": 3}
    x = torch.rand(points, sizes["num_inputs"], device=setup.device)
    learned = x.clone().requires_grad_()

    def forward(path: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return torch.no_grad()(functools.partial(path, x))

    def gradient(path: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(path(learned).sum(), learned)

    figures, checks, num_cells = [], [], (8, 32)
    for cells in num_cells:
        torch.manual_seed(0)
        network = CPNetwork(**sizes, num_cells=cells).to(setup.device)
        paths = {"local": network.forward, "dense": network.reference_forward}
        for what, run_of in (("forward", forward), ("forward + gradient in x", gradient)):
            runs = {name: run_of(path) for name, path in paths.items()}
            title = f"{what}, {cells} cells"
            checks.append(Check(title, difference(runs["local"](), runs["dense"]()), 1e-3))
            samples = alternate(setup, runs, repeats=min(setup.repeats, 3))
            figures.append(Figure(title, samples, ("dense", "local")))
    sizes |= {"num_cells": list(num_cells), "points": points}
    return Section("CPNetwork.forward against reference_forward", sizes, figures, checks)
