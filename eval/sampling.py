"""Studies how states should be drawn from one trained Leviathan, and how fast they can be.

    python -m eval.sampling --model runs/demo/model --data runs/demo/data.hdf5 --out runs/demo/sampling --crop 16

Neighbouring ids are neighbouring values, so that the few likeliest levels may span next to no vorticity. Each sampling
is therefore shown with the width, in vorticity, of what it keeps of a distribution. Then an ensemble of samples is held
against the truth (CRPS, spread and skill, ranks), and decoding by blocks against decoding token by token. Writes
sampling.json and pictures; the words for a card are `markdown` of that record.
"""

import argparse
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import leviathan
from eval import metrics, sampling_figures
from eval.rollout import load
from eval.scoring import METRICS, MetricSettings, numbers, shown_steps
from leviathan.decoding_leviathan import DETERMINISTIC, LARGEST_SCORES, Decoder, Sampler
from training.provenance import provenance, relative, write_json

Record = Mapping[str, Any]

SAMPLINGS: dict[str, dict[str, Any]] = {
    "expectation": {"sampling": "expectation"},
    "greedy": {"sampling": "greedy"},
    "top 5": {"sampling": "top_k", "top_k": 5},
    "top 50": {"sampling": "top_k", "top_k": 50},
    "nucleus 0.9": {"sampling": "top_p", "top_p": 0.9},
    "temperature 0.5": {"sampling": "sample", "temperature": 0.5},
    "temperature 0.8": {"sampling": "sample", "temperature": 0.8},
    "whole distribution": {"sampling": "sample"},
    "temperature 1.2": {"sampling": "sample", "temperature": 1.2},
}
SHOWN_METRICS = (*metrics.PAPER_METRICS, "nrmse")
JACOBI_SAMPLINGS = ("expectation", "sample")


# --------------------------------------------------------------------------------------------------- widths and errors


@torch.no_grad()
def widths(
    model: PreTrainedModel, tokenizer: "leviathan.FieldTokenizer", prefix: Tensor, target: Tensor
) -> dict[str, dict[str, float]]:
    """How wide each sampling's distributions of one token are, the tokens before it being the true ones.

    Args:
        model: A [`LeviathanForCausalLM`] in evaluation mode.
        tokenizer: Its tokenizer.
        prefix: Prior states (rows, tokens), int64.
        target: Their next states (rows, tokens).

    Returns:
        For each of `SAMPLINGS` means over all tokens: `entropy` in bits, `kept_levels` (ids of positive probability),
        `deviation_levels` and `deviation` (standard deviation in levels, and in the field's unit).
    """
    length = prefix.shape[1]
    sequence = torch.cat([prefix, target], -1).to(model.device)
    decoder, head = model.get_decoder(), model.output_head()
    hidden = torch.cat(
        [decoder(row, prefix_length=length, use_cache=False).last_hidden_state for row in sequence.split(1)]
    )[:, length - 1 : -1].flatten(0, 1)
    samplers = {name: Sampler(head, tokenizer.vocab_size, **options) for name, options in SAMPLINGS.items()}
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in SAMPLINGS}
    for some in hidden.split(max(1, LARGEST_SCORES // tokenizer.vocab_size)):
        scores = head(some).float()
        for name, sampler in samplers.items():
            if sampler.sampling in DETERMINISTIC:
                sums[name][1] += len(some)  # one level, for sure
            else:
                sums[name] += _width(sampler.warpers(None, scores)).cpu()
    names = ("entropy", "kept_levels", "deviation_levels")
    means = {name: dict(zip(names, (each / len(hidden)).tolist(), strict=True)) for name, each in sums.items()}
    return {name: each | {"deviation": each["deviation_levels"] * tokenizer.level} for name, each in means.items()}


def _width(scores: Tensor) -> Tensor:
    """Sums over (rows, V) of entropy [bit], ids of positive probability and standard deviation [levels]: (3,)."""
    shares = scores.double().softmax(-1)
    levels = torch.arange(scores.shape[-1], dtype=torch.float64, device=scores.device)
    mean = shares @ levels
    variance = (shares * (levels - mean.unsqueeze(-1)).square()).sum(-1)
    entropy = torch.special.entr(shares).sum(-1) / np.log(2)
    return torch.stack([entropy.sum(), scores.isfinite().sum().double(), variance.sqrt().sum()])


def errors(states: np.ndarray, future: np.ndarray, setting: MetricSettings) -> dict[str, dict[str, float]]:
    """Means over trajectories of `SHOWN_METRICS` of states (B, T, N, N) at the shown steps: metric -> step -> score."""
    scores = [setting.score(predicted, true) for predicted, true in zip(states, future, strict=True)]
    means = {name: np.mean([each[name] for each in scores], axis=0) for name in SHOWN_METRICS}
    return {name: {str(t): float(mean[t - 1]) for t in shown_steps(len(mean))} for name, mean in means.items()}


# ----------------------------------------------------------------------------------------------------------- ensembles


def ensemble_record(ensemble: np.ndarray, expected: np.ndarray, future: np.ndarray) -> dict[str, Any]:
    """An ensemble against the truth, at every step.

    Args:
        ensemble: (B, M, T, N, N) samples.
        expected: (B, T, N, N) of a deterministic sampling, whose CRPS is its mean absolute error.
        future: (B, T, N, N) true states.

    Returns:
        Lists over T, means over trajectories (of squares for spread and skill): `crps` and `expectation_crps`,
        `spread`, `skill`, their `ratio`, and `rank_histogram` of M + 1 shares.
    """
    ensemble = ensemble.swapaxes(1, 2)  # (B, T, M, N, N)
    each = metrics.spread_skill(ensemble, future)
    pooled = metrics.SpreadSkill(*(np.sqrt((values**2).mean(0)) for values in (each.spread, each.skill)))
    return {
        "num_members": ensemble.shape[2],
        "crps": numbers(metrics.crps(ensemble, future).mean(0)),
        "expectation_crps": numbers(metrics.crps(expected[:, :, None], future).mean(0)),
        "spread": numbers(pooled.spread),
        "skill": numbers(pooled.skill),
        "ratio": numbers(pooled.ratio),
        "rank_histogram": [numbers(shares) for shares in metrics.rank_histogram(ensemble, future).mean(0)],
    }


# --------------------------------------------------------------------------------------------------- decoding by blocks


@dataclass(frozen=True)
class Decoded:
    """What decoding gave, and cost: one entry of each list for each batch.

    Attributes:
        target: (rows, tokens).
        passes: Forward passes over the batch.
        row_passes: Of these, how many a row took part in, on average: finished rows are dropped.
        seconds: Wall time.
    """

    target: Tensor
    passes: list[int]
    row_passes: list[float]
    seconds: list[float]


def timed(decoder: Decoder, prefix: Tensor, uniform: Tensor | None, batch_size: int) -> Decoded:
    """Decodes targets behind prefixes (rows, tokens), `batch_size` rows at one time."""
    device = decoder.model.device
    found = Decoded(torch.empty(0, decoder.num_tokens, dtype=torch.long), [], [], [])
    targets = []
    for i in range(0, len(prefix), batch_size):
        rows = prefix[i : i + batch_size].to(device)
        numbers = None if uniform is None else uniform[i : i + batch_size].to(device)
        if device.type == "cuda" and i == 0:
            decoder(rows, numbers)  # captures graphs, chooses kernels
        before = decoder.num_passes, decoder.num_row_passes
        start = time.perf_counter()
        targets.append(decoder(rows, numbers).cpu())  # waits for the device
        found.seconds.append(time.perf_counter() - start)
        found.passes.append(decoder.num_passes - before[0])
        found.row_passes.append((decoder.num_row_passes - before[1]) / len(rows))
    return Decoded(torch.cat(targets), found.passes, found.row_passes, found.seconds)


def jacobi(
    model: PreTrainedModel, tokenizer: "leviathan.FieldTokenizer", prefix: Tensor, seed: int = 0, progress: bool = True
) -> dict[str, Any]:
    """Decoding by blocks of a row, of four rows and of a state, against token by token.

    The expectation, and samples of fixed uniform numbers, are decoded exactly (tolerance 0) and with tolerances of
    levels; each patch alone, and all as one batch.

    Args:
        model: A [`LeviathanForCausalLM`] in evaluation mode.
        tokenizer: Its tokenizer; the finer its levels, the more tolerances are tried.
        prefix: Prior states (patches, tokens), int64.
        seed: Of the uniform numbers.
        progress: Show a progress bar.

    Returns:
        `num_patches`, `sequential_passes` and `rows`: for each sampling, block size and tolerance, `alone` and `batch`
        with passes, seconds, what token by token takes of both over that, the share of equal tokens and the rms and
        largest difference in levels.
    """
    size, num_tokens = tokenizer.patch_size, tokenizer.tokens_per_patch
    blocks = sorted({min(block, num_tokens) for block in (size, 4 * size, num_tokens)} - {1})
    tolerances = (0, 1, 4) if tokenizer.num_bits >= 12 else (0, 1)
    centre, head = torch.from_numpy(tokenizer.centre()), model.output_head()
    numbers = torch.rand(len(prefix), num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = []
    with tqdm(total=2 * (1 + len(blocks) * len(tolerances)), desc="jacobi", disable=not progress) as bar:
        for sampling in JACOBI_SAMPLINGS:
            uniform = None if sampling in DETERMINISTIC else numbers
            sampler = Sampler(head, tokenizer.vocab_size, sampling)

            for block, tolerance in [(1, 0), *itertools.product(blocks, tolerances)]:
                decoder = Decoder(model, sampler, num_tokens, block, centre, tolerance)
                found = [timed(decoder, prefix, uniform, rows_at_a_time) for rows_at_a_time in (1, len(prefix))]
                bar.update()
                if block == 1:
                    sequential = found
                    continue
                kinds = zip(("alone", "batch"), found, sequential, strict=True)
                about = {"sampling": sampling, "block_size": block, "tolerance": tolerance}
                rows.append(about | {kind: _compared(each, plain) for kind, each, plain in kinds})
    return {"num_patches": len(prefix), "sequential_passes": num_tokens - 1, "rows": rows}


def _compared(found: Decoded, plain: Decoded) -> dict[str, Any]:
    passes, seconds = np.median(found.passes), np.median(found.seconds)
    difference = (found.target - plain.target).abs()
    return {
        "passes": {"median": float(passes), "worst": int(max(found.passes))},
        "row_passes": float(np.mean(found.row_passes)),
        "seconds": {"median": float(seconds), "worst": float(max(found.seconds))},
        "fewer_passes": float(np.median(plain.passes) / passes),
        "speed_up": float(np.median(plain.seconds) / seconds),
        "equal": float((difference == 0).double().mean()),
        "rms_difference": float(difference.double().square().mean().sqrt()),
        "largest_difference": int(difference.max()),
    }


# ------------------------------------------------------------------------------------------------------------- command


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Does what the command says; returns what sampling.json holds."""
    parts = load(args)
    model, tokenizer, fields = (parts[key] for key in ("model", "tokenizer", "fields"))
    crop, patch = args.crop, tokenizer.patch_size
    _check_crop(crop, tokenizer, fields.grid[0])
    with fields:
        truth = np.stack([fields.vorticity(int(i), parts["snapshots"]) for i in parts["trajectories"]])
    truth = np.ascontiguousarray(truth[..., :crop, :crop])
    initial, future = truth[:, 0], truth[:, 1:]
    isolated = not tokenizer.margin and patch < fields.grid[0]
    setting = MetricSettings(
        tokenizer.low,
        tokenizer.high,
        patch,
        length=fields.spacing[0] * crop,
        band=metrics.slope_band(patch if isolated else crop),
        num_bins=min(256, tokenizer.vocab_size),
        windowed=isolated,
    )
    embedding = model.get_input_embeddings()
    if hasattr(embedding, "bake"):
        embedding.bake()  # as in a rollout, so that speeds are those of one

    def rollout(**options: Any) -> np.ndarray:
        return leviathan.rollout(
            model,
            tokenizer,
            initial,
            num_steps=args.num_steps,
            seed=args.seed,
            batch_size=args.batch_size,
            progress=False,
            **options,
        ).numpy()

    shape = (crop, crop)
    ids, following = (
        tokenizer(states.reshape(-1, *shape), return_tensors="pt")["input_ids"] for states in (truth[:, :-1], future)
    )
    chosen = np.random.default_rng(args.seed).permutation(len(ids))[: args.num_patches]
    prefix, target = tokenizer.prefix(ids, shape)[chosen], following[chosen]
    width, samplings = widths(model, tokenizer, prefix, target), {}
    with tqdm(total=len(SAMPLINGS) + 1, desc="samplings", unit="row") as bar:
        for name, options in SAMPLINGS.items():
            states = rollout(**options)
            samplings[name] = {**options, "width": width[name], "metrics": errors(states, future, setting)}
            if name == "expectation":
                expected = states
            bar.update()
        ensemble = rollout(sampling="sample", num_samples=args.num_members)
        bar.update()
    record = {
        "config": {key: getattr(args, key) for key in ("split", "num_steps", "crop", "seed", "device", "dtype")}
        | {"model": relative(args.model), "data": relative(args.data), "trajectories": parts["trajectories"].tolist()},
        "model": {
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "patch_size": patch,
            "margin": tokenizer.margin,
            "num_bits": tokenizer.num_bits,
            "level": tokenizer.level,
        },
        "steps": shown_steps(args.num_steps),
        "slope_band": list(setting.band),
        "windowed": isolated,
        "true_rms": float(np.sqrt((future.astype(np.float64) ** 2).mean())),
        "num_patches": len(prefix),
        "samplings": samplings,
        "ensemble": ensemble_record(ensemble, expected, future),
        "jacobi": jacobi(model, tokenizer, prefix, args.seed),
        "provenance": provenance(args.seed),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    sampling_figures.draw_all(args.out, record)
    write_json(args.out / "sampling.json", record)
    print(markdown(record))
    return record


def _check_crop(crop: int, tokenizer: "leviathan.FieldTokenizer", grid: int) -> None:
    size, margin = tokenizer.patch_size, tokenizer.margin
    if not 1 <= crop <= grid or crop % size:
        raise ValueError(f"--crop {crop}: expected a multiple of the patch's {size}, up to the grid's {grid}.")
    if margin and crop != grid:
        raise ValueError(
            f"--crop {crop}: the model reads {margin} pixels around a patch, from a periodic field; a crop is not "
            f"periodic. Give --crop {grid}, the whole field."
        )


def markdown(record: Record) -> str:
    """The record in words and tables for a card; a function of the record alone."""
    return "\n\n".join([_samplings_text(record), _ensemble_text(record["ensemble"]), _jacobi_text(record["jacobi"])])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _samplings_text(record: Record) -> str:
    last = str(record["steps"][-1])
    head = ["sampling", "kept levels", "entropy [bit]", "deviation [levels]", "deviation [1/time]"]
    head += [METRICS[name][0] for name in SHOWN_METRICS]
    rows = []
    for name, about in record["samplings"].items():
        width, scores = about["width"], about["metrics"]
        rows.append(
            [name, f"{width['kept_levels']:.0f}", f"{width['entropy']:.2f}", f"{width['deviation_levels']:.3g}"]
            + [f"{width['deviation']:.3g}"]
            + [", ".join(f"{scores[metric][str(t)]:.3g}" for t in record["steps"]) for metric in SHOWN_METRICS]
        )
    best = {
        metric: min(record["samplings"], key=lambda name: record["samplings"][name]["metrics"][metric][last])
        for metric in SHOWN_METRICS
    }
    words = "; ".join(f"{metric.replace('_', ' ')}: {name}" for metric, name in best.items())
    steps = ", ".join(map(str, record["steps"]))
    return (
        f"Widths are means over {record['num_patches']} patches, one step ahead with the true tokens before; one level "
        f"is {record['model']['level']:.3g}, the truth's rms {record['true_rms']:.3g} [1/time]. Errors are those at "
        f"steps {steps} of free rollouts over {len(record['config']['trajectories'])} flows, random ones with one "
        f"seed.\n\n{_table(head, rows)}\n\nLeast at step {last}: {words}."
    )


def _ensemble_text(ensemble: Record) -> str:
    ranks = np.array(ensemble["rank_histogram"])
    head = ["step", "CRPS of the ensemble", "CRPS of the expectation", "spread", "skill", "spread / skill", "end ranks"]
    names = ("crps", "expectation_crps", "spread", "skill", "ratio")
    rows = [
        [str(t), *(f"{ensemble[name][t - 1]:.3g}" for name in names), f"{ranks[t - 1, [0, -1]].sum():.3f}"]
        for t in shown_steps(len(ranks))
    ]
    members = ensemble["num_members"]
    return (
        f"An ensemble of {members} samples of the whole distribution. In a reliable one spread and skill are equal, "
        f"and the truth is outside of it at a share of {2 / (members + 1):.3f} of the points (its two end ranks)."
        f"\n\n{_table(head, rows)}"
    )


def _jacobi_text(found: Record) -> str:
    head = ["sampling", "block", "tolerance [levels]", "passes: median (worst)", "fewer passes", "speed-up"]
    head += ["batch: passes of a row", "batch: speed-up", "equal tokens", "difference [levels]: rms (largest)"]
    rows = []
    for row in found["rows"]:
        alone, batch = row["alone"], row["batch"]
        rows.append(
            [
                *(str(row[key]) for key in ("sampling", "block_size", "tolerance")),
                f"{alone['passes']['median']:.0f} ({alone['passes']['worst']})",
                f"{alone['fewer_passes']:.1f}",
                f"{alone['speed_up']:.2f}",
                f"{batch['row_passes']:.1f}",
                f"{batch['speed_up']:.2f}",
                f"{alone['equal']:.3f}",
                f"{alone['rms_difference']:.3g} ({alone['largest_difference']})",
            ]
        )
    return (
        f"Decoding by blocks (Jacobi iteration from the prior state) of {found['num_patches']} patches, against "
        f"{found['sequential_passes']} passes token by token: each patch alone, then all as one batch.\n\n"
        f"{_table(head, rows)}"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a trained model with its tokenizer")
    add("--data", type=Path, required=True, help="HDF5 file of trajectories in PDEBench's layout")
    add("--out", type=Path, required=True, help="folder for sampling.json and pictures")
    add("--split", choices=("train", "validation", "test"), default="test", help="which trajectories; default: test")
    add("--other-data", action="store_true", help="the data is another file than the training's, with other flows")
    add("--num-trajectories", type=int, default=2, help="the first so many of the split; default: %(default)s")
    add("--crop", type=int, default=32, help="side of the corner of each field that is used; default: %(default)s")
    add("--num-steps", type=int, default=10, help="states to generate; default: %(default)s")
    add("--num-members", type=int, default=8, help="samples of an ensemble; default: %(default)s")
    add("--num-patches", type=int, default=16, help="patches for widths and decoding by blocks; default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--batch-size", type=int, default=256, help="patches in one forward pass of a rollout")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the weights; default: as saved")
    args = parser.parse_args(arguments)
    for name, least in {"num_members": 2, "num_patches": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {least}")
    args.seeds = [args.seed]  # as eval.rollout.load has it
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    try:
        run(parse(arguments))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
