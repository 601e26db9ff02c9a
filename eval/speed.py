"""Speed and memory of our fast paths against their plain twins, as ratios within one run.

    python -m eval.speed --out runs/speed.json

Times are medians over repeats in which the two alternate, after a warm-up; memory is the growth of the process's peak
resident set in a process of its own for each.
"""

import argparse
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from sna_core import SeparableEmbedding
from training.provenance import provenance, write_json

PATHS = ("generate", "reference_generate")  # the fast path and its oracle
SHORT = {"num_embeddings": 256, "embedding_dim": 16, "seed_dim": 8, "num_heads": 2, "rank": 4}
PUBLISHED = {"num_embeddings": 65_536, "embedding_dim": 512}


def embedding_pass(path: str, sizes: dict[str, int], tokens: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward, and forward with backward, of distinct ids through one path; forward keeps what backward needs."""
    torch.manual_seed(0)
    embedding = SeparableEmbedding(**sizes)
    ids = torch.randperm(sizes["num_embeddings"])[:tokens]
    gradient = torch.randn(tokens, sizes["embedding_dim"])
    parameters = list(embedding.parameters())

    def forward() -> torch.Tensor:
        return getattr(embedding, path)(ids)

    return forward, lambda: torch.autograd.grad(forward(), parameters, gradient)


def _peak_kibibytes() -> int:
    # Not getrusage: a child inherits its parent's peak there.
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def _memory_of(path: str, sizes: dict[str, int], tokens: int) -> float:
    embedding_pass(path, sizes, 8)[1]()  # libraries load their kernels
    before = _peak_kibibytes()
    embedding_pass(path, sizes, tokens)[1]()
    return (_peak_kibibytes() - before) / 1024


def peak_mebibytes(path: str, sizes: dict[str, int], tokens: int) -> float:
    """Growth of the peak resident set by one forward and backward, in MiB, in a process of its own; Linux only."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.submit(_memory_of, path, sizes, tokens).result()


def alternate(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of each run: median, least and greatest of the repeats, in which the runs take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {"median": statistics.median(each), "least": min(each), "greatest": max(each)}
        for name, each in seconds.items()
    }


def measure_embedding(sizes: dict[str, int], tokens: int, repeats: int) -> dict[str, Any]:
    """The fast path of SeparableEmbedding against its oracle: seconds, MiB and the ratios oracle / fast."""
    passes = {path: embedding_pass(path, sizes, tokens) for path in PATHS}
    forward = alternate({path: each[0] for path, each in passes.items()}, repeats)
    both = alternate({path: each[1] for path, each in passes.items()}, repeats)
    memory = {path: peak_mebibytes(path, sizes, tokens) for path in PATHS}
    fast, oracle = PATHS
    return {
        "sizes": sizes,
        "tokens": tokens,
        "forward_seconds": forward,
        "forward_backward_seconds": both,
        "peak_mebibytes": memory,
        "forward_ratio": forward[oracle]["median"] / forward[fast]["median"],
        "forward_backward_ratio": both[oracle]["median"] / both[fast]["median"],
        "memory_ratio": memory[oracle] / max(memory[fast], 1e-3),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command: measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--short", action="store_true", help="tiny sizes, only to see that it runs")
    args = parser.parse_args(arguments)
    sizes = SHORT if args.short else PUBLISHED
    if args.repeats < 1 or not 1 <= args.tokens <= sizes["num_embeddings"]:
        parser.error(f"expected at least one repeat, and from 1 to {sizes['num_embeddings']} tokens")
    result = {"embedding": measure_embedding(sizes, args.tokens, args.repeats), "provenance": provenance()}
    write_json(args.out, result)
    found = result["embedding"]
    print(f"SeparableEmbedding, {args.tokens} distinct tokens, {found['sizes']}")
    print(f"{'':>18}{'oracle':>12}{'fast':>12}{'ratio':>8}")
    for name, unit, ratio in (
        ("forward", "seconds", "forward_ratio"),
        ("forward_backward", "seconds", "forward_backward_ratio"),
        ("peak", "mebibytes", "memory_ratio"),
    ):
        fast, oracle = (found[f"{name}_{unit}"][path] for path in PATHS)
        cells = [each["median"] if isinstance(each, dict) else each for each in (oracle, fast)]
        print(f"{name:>18}" + "".join(f"{cell:>12.3f}" for cell in cells) + f"{found[ratio]:>8.1f}  {unit}")
    return result


if __name__ == "__main__":
    main()
