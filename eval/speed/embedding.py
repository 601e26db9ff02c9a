"""Speed of the generated embedding: distinct ids, whole batches, and the baked table."""

from collections.abc import Callable
from typing import Any

import torch
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
)
from sna_core import SeparableEmbedding

PATHS = ("generate", "reference_generate")  # the fast path and its oracle
TINY = {"seed_dim": 8, "num_heads": 2, "rank": 4}
CHUNK_TOKENS = {"cpu": 2048, "cuda": 8192}  # of the oracle, whose intermediate numbers fill the memory


def embedding_sizes(setup: Setup, num_embeddings: int, embedding_dim: int) -> dict[str, int]:
    """The published sizes, or tiny ones."""
    sizes = {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim}
    return sizes | TINY if setup.short else sizes


def distinct_pass(setup: Setup, path: str, sizes: dict[str, int], tokens: int) -> tuple[Callable[[], Any], ...]:
    """Forward, and forward with backward, of distinct ids through one path; forward keeps what backward needs."""
    torch.manual_seed(0)
    embedding = SeparableEmbedding(**sizes).to(setup.device)
    ids = torch.randperm(sizes["num_embeddings"])[:tokens].to(setup.device)
    gradient = torch.randn(tokens, sizes["embedding_dim"], device=setup.device)
    parameters = list(embedding.parameters())

    def forward() -> Tensor:
        return getattr(embedding, path)(ids)

    return forward, lambda: torch.autograd.grad(forward(), parameters, gradient)


def fast_pass(setup: Setup, sizes: dict[str, int], tokens: int) -> Callable[[], Any]:
    """Forward and backward of the fast path, for a process of its own."""
    return distinct_pass(setup, "generate", sizes, tokens)[1]


def oracle_pass(setup: Setup, sizes: dict[str, int], tokens: int) -> Callable[[], Any]:
    """Forward and backward of the oracle, for a process of its own."""
    return distinct_pass(setup, "reference_generate", sizes, tokens)[1]


def least_work(embedding: SeparableEmbedding, distinct: int, tokens: int) -> tuple[float, float]:
    """FLOPs and bytes that forward and backward need: three splines of a basis are not zero; backward is two forwards.

    Bytes: parameters read and their gradients written; embeddings written and their gradients read.
    """
    heads, seed, rank, dim = embedding.num_heads, embedding.seed_dim, embedding.rank, embedding.embedding_dim
    forward = heads * (2 * seed**2 + seed * rank * (2 * 3 + 1) + 2 * rank * dim)
    numbers = 2 * sum(p.numel() for p in embedding.parameters()) + 2 * tokens * dim
    return 3 * distinct * forward, 4 * numbers


def embedding(setup: Setup) -> Section:
    """Distinct ids, which no gathering makes fewer."""
    sizes = embedding_sizes(setup, *setup.pick(short=(256, 16), cpu=(65_536, 512), cuda=(65_536, 512)))
    tokens = setup.pick(short=64, cpu=2048, cuda=2048)
    passes = {path: distinct_pass(setup, path, sizes, tokens) for path in PATHS}
    values, gradients = ({path: each[i]() for path, each in passes.items()} for i in (0, 1))
    checks = [
        Check("values", difference(*(values[path] for path in PATHS)), 1e-4),
        Check("gradients", difference(*(gradients[path] for path in PATHS)), 1e-3),
    ]
    del values, gradients
    forward, both = (alternate(setup, {path: each[i] for path, each in passes.items()}) for i in (0, 1))
    memory = mebibytes_of(
        setup, {"generate": fast_pass, "reference_generate": oracle_pass}, (sizes, tokens), (sizes, 8)
    )
    ratio_of = ("reference_generate", "generate")
    flops, least_bytes = least_work(SeparableEmbedding(**sizes, device="meta"), tokens, tokens)
    return Section(
        "SeparableEmbedding.generate against reference_generate, distinct ids",
        sizes | {"tokens": tokens},
        [
            Figure("forward", forward, ratio_of),
            Figure(
                "forward + backward",
                both,
                ratio_of,
                target=Target("forward + backward of 2,048 distinct tokens >= 5 times faster", at_least=5, on="cpu"),
            ),
            Figure(
                "peak memory",
                memory,
                ratio_of,
                unit="mebibytes",
                target=Target("at <= 1/8 of the reference's memory", at_least=8, on="cpu"),
            ),
        ],
        checks,
        [Work("embedding, forward + backward", median_of(both, "generate"), flops, least_bytes, "float32")],
    )


def embedding_batch(setup: Setup) -> Section:
    """Whole batches of real tokens, in which ids repeat: of fields and of text."""
    # Here, since a process that measures the memory of an embedding needs none of it.
    from eval.speed.tokens import field_pairs, text_batch

    figures, checks, numbers, work = [], [], {}, []
    dim = setup.pick(short=16, cpu=512, cuda=512)
    patch, grid = setup.pick(short=(8, 16), cpu=(64, 256), cuda=(64, 256))
    num_bits = setup.pick(short=8, cpu=16, cuda=16)
    rows, length = setup.pick(short=(2, 32), cpu=(8, 512), cuda=(16, 2048))
    text, vocab_size, source = text_batch(setup.text, setup.pick(short=300, cpu=8192, cuda=16_384), rows, length)
    batches = {
        f"fields, {pairs} pair{'s' * (pairs > 1)}": (field_pairs(pairs, patch, grid, num_bits), 2**num_bits)
        for pairs in setup.pick(short=(1,), cpu=(4, 16), cuda=(4, 16))
    }
    batches["text"] = text, vocab_size
    for name, (ids, num_embeddings) in batches.items():
        found = _measure_batch(setup, name, ids.to(setup.device), embedding_sizes(setup, num_embeddings, dim))
        figures.append(found[0])
        checks.append(found[1])
        numbers[name] = found[2]
        work += found[3]
    return Section(
        "SeparableEmbedding of a batch against reference_generate of its every token, forward + backward",
        {"embedding_dim": dim, "patch_size": patch, "grid": grid, "text": [rows, length], "text_ids": vocab_size},
        figures,
        checks,
        work,
        numbers,
        [
            f"fields: flows of training.turbulence, quantised to {num_bits} bits; text: {source}, byte-level BPE "
            "trained on it",
            "the reference runs by chunks, forward and backward, which memory forces on it",
        ],
    )


def _measure_batch(
    setup: Setup, name: str, ids: Tensor, sizes: dict[str, int]
) -> tuple[Figure, Check, dict[str, int], list[Work]]:
    torch.manual_seed(0)
    module = SeparableEmbedding(**sizes).to(setup.device)
    parameters = list(module.parameters())
    gradient = torch.randn(*ids.shape, sizes["embedding_dim"], device=setup.device)
    chunk = CHUNK_TOKENS[setup.device.type]
    # The reference's time is that of its chunks, all alike: measured on some, it is known for all.
    measured = min(ids.numel(), setup.pick(short=32, cpu=chunk, cuda=4 * chunk))
    scale = ids.numel() / measured

    def oracle() -> None:
        pieces = zip(ids.view(-1)[:measured].split(chunk), gradient.flatten(0, -2)[:measured].split(chunk), strict=True)
        for some, its_gradient in pieces:
            torch.autograd.grad(module.reference_generate(some), parameters, its_gradient)

    part = ids.view(-1)[: min(measured, 1024)]
    with torch.no_grad():
        error = difference(module(part), module.reference_generate(part))
    samples = alternate(
        setup,
        {"embedding": lambda: torch.autograd.grad(module(ids), parameters, gradient), "reference": oracle},
        repeats=min(setup.repeats, 3),
    )
    samples["reference"] = [scale * each for each in samples["reference"]]
    distinct = ids.unique().numel()
    figure = Figure(
        f"{name}, {ids.numel():,} tokens, {distinct:,} ids",
        samples,
        ("reference", "embedding"),
        target=Target(">= 10 times on a batch of real text or field tokens, where ids repeat", at_least=10, on="cpu"),
        extrapolated=f"reference: time of {measured} tokens, times {scale:g}" if scale > 1 else None,
    )
    flops, least_bytes = least_work(module, distinct, ids.numel())
    work = Work(f"embedding of {name}", median_of(samples, "embedding"), flops, least_bytes, "float32")
    counts = {"tokens": ids.numel(), "distinct_ids": distinct, "num_embeddings": sizes["num_embeddings"]}
    return figure, Check(f"values, {name}", error, 1e-4), counts, [work]


def lookup(setup: Setup) -> Section:
    """The baked table of a generated embedding in inference, alone and in a model."""
    from eval.speed.models import inference_models  # as in embedding_batch

    sizes = embedding_sizes(setup, *setup.pick(short=(256, 16), cpu=(65_536, 512), cuda=(65_536, 512)))
    tokens = setup.pick(short=64, cpu=8192, cuda=8192)
    torch.manual_seed(0)
    baked = SeparableEmbedding(**sizes).to(setup.device).eval().bake()
    # Of the same memory: where a table lies would make more of a difference than what is compared.
    plain = nn.Embedding.from_pretrained(baked.weight).eval()
    ids = torch.randint(sizes["num_embeddings"], (tokens,), device=setup.device)
    models, batch, step = inference_models(setup)
    target = Target("inference with a baked table: <= 1.005 times nn.Embedding", at_most=1.005)
    # The difference sought is far below the noise of one timing: many short ones, (repeats, calls timed together).
    plans = {"table": (40, 4), "model": (15, 1), "token": (40, 4)}
    runs = {
        "table": {name: _call(each, ids) for name, each in (("baked", baked), ("nn.Embedding", plain))},
        "model": {name: _call(each, batch, logits_to_keep=1, use_cache=False) for name, each in models.items()},
        "token": {name: _call(each, step, use_cache=False) for name, each in models.items()},
    }
    titles = {
        "table": f"{tokens:,} tokens, the table alone",
        "model": f"forward of a model, {tuple(batch.shape)} tokens",
        "token": f"forward of a model, {tuple(step.shape)} tokens",
    }
    figures, checks = [], []
    with torch.no_grad():
        for key, pair in runs.items():
            values = [run() for run in pair.values()]
            values = [getattr(each, "logits", each) for each in values]
            checks.append(Check(titles[key], difference(*values), 0.0))
            repeats, calls = plans[key]
            samples = alternate(setup, pair, repeats=setup.repeats * (1 if setup.short else repeats), calls=calls)
            figures.append(Figure(titles[key], samples, ("baked", "nn.Embedding"), target=target))
    config = models["baked"].config
    return Section(
        "a baked SeparableEmbedding against torch.nn.Embedding of the same table, in eval() without gradients",
        sizes | {"tokens": tokens, "model": [config.vocab_size, config.hidden_size, config.num_hidden_layers]},
        figures,
        checks,
        notes=["both read the same memory; what is left is the check that no parameter has changed since baking"],
    )


def _call(module: nn.Module, *inputs: Tensor, **options: Any) -> Callable[[], Any]:
    return lambda: module(*inputs, **options)
