"""Rolls a trained Leviathan out over held-out flows, and measures it beside what costs nothing.

    python -m eval.rollout --model runs/demo/model --data runs/demo/turbulence.hdf5 --out runs/demo/results

Beside the model, by the same metrics: `persistence` (nothing moves), `climatology` (a training flow at the same time),
`quantise_only` (the truth through the tokenizer and back) and the noise floor (one true flow against another). Writes
results.json and pictures.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModelForCausalLM

import leviathan
from eval import figures, metrics
from eval.card import summary_text
from eval.scoring import MetricSettings, Row, evaluate, numbers, reference_rows
from leviathan.decoding_leviathan import DETERMINISTIC, RANDOM
from training.fields import FieldFile, data_record, split_trajectories
from training.provenance import provenance, relative, write_json


def load(args: argparse.Namespace) -> dict[str, Any]:
    """Model, tokenizer, file, training record and trajectories of the command, checked against each other.

    Raises:
        FileNotFoundError: If the model's folder or the data is missing.
        ValueError: If model, tokenizer, data and options do not fit each other.
    """
    if not (args.model / "config.json").is_file():
        raise FileNotFoundError(
            f"{args.model} holds no model (no config.json); train one with `python -m training.train`."
        )
    record = args.model / "training.json"
    training = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    fields = FieldFile(args.data)
    tokenizer = AutoFeatureExtractor.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device).eval()
    _check_data(args, fields, training)
    stride, size = training.get("stride", 1), tokenizer.patch_size
    available = (fields.num_snapshots - 1) // stride
    split = split_trajectories(fields.num_trajectories, **_split_options(training))
    trajectories = getattr(split, args.split)
    grid, ids = fields.grid, (model.config.vocab_size, tokenizer.vocab_size)
    refused = {
        f"the model has {ids[0]} ids and its tokenizer {ids[1]}; take both from one run": ids[0] != ids[1],
        f"{args.data} has fields of {grid[0]} x {grid[1]}; expected a square, a multiple of the patch's {size}": (
            grid[0] != grid[1] or grid[0] % size
        ),
        f"--num-steps {args.num_steps}: {args.data} has {available} states after the first, {stride} snapshots apart": (
            not 1 <= args.num_steps <= available
        ),
        f"--num-trajectories {args.num_trajectories}: the {args.split} split has {len(trajectories)}": (
            args.num_trajectories is not None and not 1 <= args.num_trajectories <= len(trajectories)
        ),
        f"--seeds {args.seeds}: give different ones": len(set(args.seeds)) < len(args.seeds),
    }
    for reason, applies in refused.items():
        if applies:
            raise ValueError(f"{reason}.")
    return {
        "model": model,
        "tokenizer": tokenizer,
        "fields": fields,
        "training": training,
        "snapshots": range(0, stride * args.num_steps + 1, stride),
        "trajectories": trajectories[: args.num_trajectories],
        "strangers": strangers(split.train, len(trajectories[: args.num_trajectories])),
    }


def strangers(train: np.ndarray, count: int) -> np.ndarray:
    """So many of the training's trajectories, drawn at random and the same each time, as climatology.

    They are repeated if there are too few.
    """
    return np.resize(np.random.default_rng(0).permutation(train), count)


def pixels_per_step(fields: FieldFile, trajectories: np.ndarray, snapshots: range) -> float:
    """Mean distance that flows move from a state to the next, in pixels."""
    speeds = [np.hypot(*fields.velocity(int(i), t)).mean() for i in trajectories for t in snapshots]
    return float(np.mean(speeds) * fields.dt_save * snapshots.step / fields.spacing[0])


def _check_data(args: argparse.Namespace, fields: FieldFile, training: dict[str, Any]) -> None:
    """Refuses a file whose split would not be the training's: its test flows may have been trained on."""
    seen = training.get("data_record")
    if args.other_data or seen is None:
        return
    now = data_record(fields)
    if differ := [f"{key} {now[key]}, not {seen.get(key)}" for key in now if now[key] != seen.get(key)]:
        raise ValueError(
            f"{args.data} is not the file of the training ({'; '.join(differ)}), so its {args.split} split may hold "
            "flows that were trained on; give that file, or --other-data if it holds none of them."
        )


def _split_options(training: dict[str, Any]) -> dict[str, Any]:
    split = training.get("split", {})
    return {key: tuple(value) if key == "fractions" else value for key, value in split.items()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Does what the command says; returns what results.json holds."""
    parts = load(args)
    model, tokenizer, fields, training = (parts[key] for key in ("model", "tokenizer", "fields", "training"))
    with fields:
        truth = np.stack([fields.vorticity(int(i), parts["snapshots"]) for i in parts["trajectories"]])
        climatology = np.stack([fields.vorticity(int(i), parts["snapshots"][1:]) for i in parts["strangers"]])
    options = {key: getattr(args, key) for key in ("temperature", "top_k", "top_p", "batch_size", "block_size")}

    def rolled_out(sampling: str) -> Row:
        def predict(initial: np.ndarray, seed: int) -> torch.Tensor:
            return leviathan.rollout(
                model, tokenizer, initial, num_steps=args.num_steps, sampling=sampling, seed=seed, **options
            )

        return Row(sampling, predict, args.seeds if sampling in RANDOM else args.seeds[:1])

    length = fields.spacing[0] * fields.grid[0]
    band = args.band or metrics.slope_band(fields.grid[0])
    bins = min(256, tokenizer.vocab_size)
    setting = MetricSettings(tokenizer.low, tokenizer.high, tokenizer.patch_size, length, band, bins)
    rows = [*map(rolled_out, args.samplings), *reference_rows(truth, climatology, tokenizer)]
    evaluation = evaluate(truth, rows, setting)
    components = figures.principal_components(model.get_input_embeddings().weight)
    results = {
        "config": options
        | {key: getattr(args, key) for key in ("split", "num_steps", "samplings", "seeds", "device", "dtype")}
        | {"model": relative(args.model), "data": relative(args.data), "trajectories": parts["trajectories"].tolist()},
        "data": {
            "grid": list(fields.grid),
            "length": length,
            "dt": fields.dt_save * parts["snapshots"].step,
            "synthetic": fields.synthetic,
            "num_trajectories": fields.num_trajectories,
            "attributes": data_record(fields)["attributes"],
            "pixels_per_step": pixels_per_step(fields, parts["trajectories"], parts["snapshots"]),
        },
        "model": {
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "vocab_size": tokenizer.vocab_size,
            "patch_size": tokenizer.patch_size,
            "embedding_type": getattr(model.config, "embedding_type", None),
            "embedding_explained": numbers(components.explained),
        },
    }
    results |= evaluation.results | {"provenance": provenance(args.seeds)}
    args.out.mkdir(parents=True, exist_ok=True)
    figures.draw_all(args.out, results, evaluation.examples, components, training)
    write_json(args.out / "results.json", results)
    print(summary_text(results, training))
    print(f"Numbers are in {args.out / 'results.json'}, pictures beside it; the overview is contact_sheet.png.")
    return results


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a trained model with its tokenizer")
    add("--data", type=Path, required=True, help="HDF5 file of trajectories in PDEBench's layout")
    add("--out", type=Path, required=True, help="folder for results.json and pictures")
    add("--split", choices=("train", "validation", "test"), default="test", help="which trajectories; default: test")
    add("--other-data", action="store_true", help="the data is another file than the training's, with other flows")
    add("--num-steps", type=int, default=20, help="states to generate; default: %(default)s")
    add("--num-trajectories", type=int, help="only the first so many of the split")
    add("--samplings", nargs="+", default=["expectation", "greedy", "sample"], help="the first is the headline")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the random samplings; default: 0 1 2")
    add("--temperature", type=float, default=1.0)
    add("--top-k", type=int, default=50)
    add("--top-p", type=float, default=0.9)
    add("--band", nargs=2, type=int, metavar=("LOW", "HIGH"), help="wavenumbers of the spectral slope")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the weights; default: as saved")
    add("--batch-size", type=int, default=256, help="patches in one forward pass")
    add("--block-size", type=int, default=1, help="tokens decoded at one time; see leviathan.rollout")
    args = parser.parse_args(arguments)
    args.samplings = [name for group in args.samplings for name in group.split(",")]
    unknown = [name for name in args.samplings if name not in DETERMINISTIC + RANDOM]
    if unknown or len(set(args.samplings)) < len(args.samplings):
        parser.error(f"--samplings {args.samplings}: expected different ones of {', '.join(DETERMINISTIC + RANDOM)}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    try:
        run(parse(arguments))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
