"""The rows of a study of turbulence: arms rolled out over the flows of the test, scored, and kept.

A row is kept beside its arm's model as JSON of scores and safetensors of what pictures need, with what it was made of.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModelForCausalLM

import leviathan
from eval import metrics
from eval.rollout import pixels_per_step, strangers
from eval.scoring import MetricSettings, Row, RowScores, score_row
from eval.turbulence_arms import Arm, EvaluationSettings, sampling_options, trained
from leviathan.decoding_leviathan import RANDOM
from training.fields import FieldFile, data_record, split_trajectories
from training.operators import FieldOperator, rollout_fields
from training.provenance import relative, write_json

BOUND = 100  # times the truth's greatest |ω|: what lies beyond has diverged, and is held there to get a finite score


@dataclass(frozen=True)
class Flows:
    """The flows of a setting's test.

    Attributes:
        truth: (B, T + 1, N, N) in 1 / time, the initial states first.
        climatology: Other flows at the same times, (B, T, N, N).
        about: What they are, for JSON.
        record: What tells their file from another.
    """

    truth: np.ndarray
    climatology: np.ndarray
    about: dict[str, Any]
    record: dict[str, Any]


def read_flows(arm: Arm, chosen: EvaluationSettings, crop: int | None) -> Flows:
    """The flows that an arm's training left for the test, and training flows as climatology.

    Raises:
        ValueError: If the file has not as many flows, states or pixels as are asked for.
    """
    data = {name: value for name, value in arm.data().items() if value is not None}
    stride = data.get("stride", 1)
    with FieldFile(data["path"]) as file:
        options = {"fractions": tuple(data["fractions"])} if "fractions" in data else {}
        split = split_trajectories(file.num_trajectories, **options, seed=data.get("split_seed", 0))
        flows = getattr(split, chosen.split)
        count, available = chosen.num_trajectories or len(flows), (file.num_snapshots - 1) // stride
        side = crop or file.grid[0]
        refused = {
            f"num_trajectories = {count}: the {chosen.split} split has {len(flows)}": not 1 <= count <= len(flows),
            f"num_steps = {chosen.num_steps}: there are {available} states after the first": (
                not 1 <= chosen.num_steps <= available
            ),
            f"grid {file.grid} and crop {crop}: expected a square, and a crop of it that is a multiple of patch_size = "
            f"{chosen.patch_size}": file.grid[0] != file.grid[1]
            or not 0 < side <= file.grid[0]
            or side % chosen.patch_size != 0,
        }
        for reason, applies in refused.items():
            if applies:
                raise ValueError(f"{data['path']}: {reason}.")
        times = range(0, stride * chosen.num_steps + 1, stride)
        truth, others = (
            np.stack([file.vorticity(int(i), times)[:, :side, :side] for i in chosen_flows])
            for chosen_flows in (flows[:count], strangers(split.train, count))
        )
        about = {
            "path": relative(data["path"]),
            "grid": list(file.grid),
            "side": side,
            "length": file.spacing[0] * side,
            "dt": file.dt_save * stride,
            "pixels_per_step": pixels_per_step(file, flows[:count], times),
            "synthetic": file.synthetic,
            "trajectories": flows[:count].tolist(),
            "num_training_flows": len(split.train),
            "attributes": data_record(file)["attributes"],
        }
        return Flows(truth, others[:, 1:], about, data_record(file))


def metric_settings(
    flows: Flows, first: Arm, models: Mapping[str, Path], patch_size: int, windowed: bool
) -> MetricSettings:
    """What the metrics of a setting need.

    The histogram has the range that trainings fitted, one for all arms, and bins no narrower than the levels of the
    first arm's tokens.

    Args:
        flows: Those of the test.
        first: The setting's first arm.
        models: Folders of trained arms by name.
        patch_size: Of borders and windows.
        windowed: Whether patches are isolated.

    Raises:
        ValueError: If the ranges of the models' tokenizers differ.
    """
    tokenizers = {name: AutoFeatureExtractor.from_pretrained(model) for name, model in models.items()}
    ranges = {name: (tokenizer.low, tokenizer.high) for name, tokenizer in tokenizers.items()}
    ends, *others = set(ranges.values())
    if others:
        raise ValueError(f"the arms' tokenizers have the ranges {ranges}; train all of them on the same data.")
    levels = leviathan.FieldTokenizer(**first.tokenizer()).vocab_size
    band = metrics.slope_band(patch_size if windowed else flows.truth.shape[-1])
    return MetricSettings(*ends, patch_size, flows.about["length"], band, min(256, levels), windowed)


def row_samplings(arm: Arm, chosen: EvaluationSettings) -> dict[str, str | None]:
    """The rows of an arm by name, its headline first: one for each sampling, or one for an operator, which has none."""
    if arm.is_operator:
        return {arm.name: None}
    return {f"{arm.name}_{sampling}": sampling for sampling in chosen.samplings.get(arm.name, ["expectation"])}


def score_arm(
    arm: Arm, folder: Path, flows: Flows, setting: MetricSettings, chosen: EvaluationSettings, device: str
) -> None:
    """Rolls out and keeps those rows of a trained arm that are not there yet, or are of another model or other flows.

    Raises:
        ValueError: If model, tokenizer and flows do not fit each other.
    """
    missing = {
        name: sampling
        for name, sampling in row_samplings(arm, chosen).items()
        if find_row(folder, name, flows, setting, chosen) is None
    }
    if not missing:
        return
    kind = FieldOperator if arm.is_operator else AutoModelForCausalLM
    model = kind.from_pretrained(folder / "model").to(device).eval()
    tokenizer = AutoFeatureExtractor.from_pretrained(folder / "model")
    for name, sampling in missing.items():
        options = {} if sampling is None else {**chosen.decoding, **sampling_options(sampling)}
        random = model.config.architecture == "diffusion" if arm.is_operator else options["sampling"] in RANDOM
        diverged = 0

        def predict(initial: np.ndarray, seed: int, options: dict[str, Any] = options) -> np.ndarray:
            nonlocal diverged
            if arm.is_operator:
                states = rollout_fields(model, torch.from_numpy(initial), chosen.num_steps, seed=seed)
            else:
                states = leviathan.rollout(model, tokenizer, initial, chosen.num_steps, seed=seed, **options)
            held = bounded(states, flows.truth)
            diverged += int((held != states.numpy()).any((1, 2, 3)).sum())
            return held

        print(f"{folder.parent.name}: rolling out {name}", flush=True)
        row = score_row(Row(name, predict, chosen.seeds if random else chosen.seeds[:1]), flows.truth, setting)
        about = {"arm": arm.name, "sampling": sampling, "is_operator": arm.is_operator, "num_diverged": diverged}
        keep_row(
            folder, name, dataclasses.replace(row, about=row.about | about), _origin(folder, flows, setting, chosen)
        )


def bounded(states: np.ndarray | torch.Tensor, truth: np.ndarray) -> np.ndarray:
    """States held within `BOUND` times the truth's greatest value; what is not a number is put there too."""
    limit = BOUND * float(np.abs(truth).max())
    return np.nan_to_num(np.asarray(states, np.float32), nan=limit, posinf=limit, neginf=-limit).clip(-limit, limit)


def find_row(
    folder: Path, name: str, flows: Flows, setting: MetricSettings, chosen: EvaluationSettings
) -> RowScores | None:
    """A row that was kept; None if there is none, or one of another model or other flows."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["of"] != _origin(folder, flows, setting, chosen):
        return None
    scores = {metric: np.array(values) for metric, values in record["scores"].items()}
    return RowScores(record["about"], scores, **load_file(path.with_suffix(".safetensors")))


def keep_row(folder: Path, name: str, row: RowScores, of: Mapping[str, Any]) -> None:
    """Writes a row, whole or not at all: its JSON last."""
    arrays = {key: np.ascontiguousarray(getattr(row, key)) for key in ("spectra", "shares", "example")}
    partial = folder / f"{name}.safetensors.partial"
    save_file(arrays, partial)
    partial.replace(folder / f"{name}.safetensors")
    scores = {metric: values.tolist() for metric, values in row.scores.items()}
    write_json(folder / f"{name}.json", {"of": of, "about": row.about, "scores": scores})


def _origin(folder: Path, flows: Flows, setting: MetricSettings, chosen: EvaluationSettings) -> dict[str, Any]:
    found = {
        "trained": trained(folder)["provenance"]["date"],
        "data": flows.record,
        "trajectories": flows.about["trajectories"],
        "shape": list(flows.truth.shape),
        "metrics": dataclasses.asdict(setting),
        "seeds": list(chosen.seeds),
        "decoding": dict(chosen.decoding),
    }
    return json.loads(json.dumps(found))
