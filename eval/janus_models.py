"""The models of Janus's study: trained alike but for the head, and measured on the test split.

Both heads share the settings of one config, the seeds, the data and, within MATCHED, their number of parameters;
nothing is tuned for one of them.
"""

import json
import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from leviathan.janus import SnaJanusModel
from leviathan.janus.modeling import CELLS_AT_ONCE
from training.janus import TRAINING, allowed_keys, measure, run
from training.microstructure_data import MicrostructureSet, load_set
from training.provenance import relative
from training.settings import Settings, read_settings

CONFIGS = Path(__file__).parent.parent / "training" / "configs"
CONFIG = "janus_cpu.yaml"
ARRAYS = "arrays.safetensors"  # for pictures, beside the record
RECORD = "record.json"  # beside a model
MATCHED = 0.01  # of the parameters of a head
NUM_DRAWN = 8  # reconstructions for a picture


@dataclass(frozen=True)
class TestErrors:
    """Errors of a model on cells that it was not trained on.

    Attributes:
        bce: Binary cross-entropy of a voxel, in nats.
        voxel_error: Share of voxels that are reconstructed as the wrong phase.
        r2: Coefficient of determination of each property, in physical units; None where it is constant.
        mae_relative: Mean absolute error of each property over its mean absolute value.
        cycle_property: Of each property, as ``SnaJanusModel.cycle_error`` defines it.
        cycle_latent: Of the latents, likewise.
    """

    __test__ = False  # nothing for pytest

    bce: float
    voxel_error: float
    r2: dict[str, float | None]
    mae_relative: dict[str, float | None]
    cycle_property: dict[str, float]
    cycle_latent: float


def models_part(
    out: Path,
    data: Path,
    models: Path,
    *,
    heads: Sequence[str],
    seeds: Sequence[int],
    num_processes: int,
    flags: Sequence[str],
) -> dict[str, Any]:
    """Trains what is missing of all heads and seeds, and measures every model on the test split.

    Args:
        out: Folder of the record: arrays of the first head and seed.
        data: A labelled set.
        models: Folder of a run for each head and seed; those that are there are kept.
        heads: Of the models.
        seeds: Of each head.
        num_processes: Trained at one time, with one thread each if there are several.
        flags: Settings over those of the config, for all.

    Raises:
        ValueError: If a run that is there is one of other settings, or the heads differ in size.
    """
    runs = {folder_of(models, head, seed): settings_of(data, head, seed, flags) for seed in seeds for head in heads}
    train_all(runs, num_processes)
    held_out = load_set(data).split("test")
    rows = []
    for seed, head in product(seeds, heads):
        folder = folder_of(models, head, seed)
        found = test_errors(load_model(folder), held_out)
        rows.append({"head": head, "seed": seed, **about_run(folder), "test": asdict(found)})
    sizes = {row["head"]: row["num_head_parameters"] for row in rows}
    if max(sizes.values()) > (1 + MATCHED) * min(sizes.values()):
        words = ", ".join(f"{head} {size:,}" for head, size in sizes.items())
        raise ValueError(f"the heads have {words} parameters; expected the same within {MATCHED:.0%}.")
    add_arrays(out, model_arrays(load_model(folder_of(models, heads[0], seeds[0])), held_out))
    return {
        "rows": rows,
        "property_names": list(held_out.property_names),
        "shared_settings": _shared(runs.values()),
        "tuned_for_each_head": [],
    }


def _shared(runs: Iterable[Settings]) -> dict[str, dict[str, Any]]:
    """Settings that all runs have in common."""
    first, *others = map(told, runs)
    return {
        section: {key: value for key, value in values.items() if all(each[section][key] == value for each in others)}
        for section, values in first.items()
    }


def folder_of(models: Path, head: str, seed: int) -> Path:
    """Where a run is."""
    return models / f"{head}-{seed}"


def settings_of(data: Path | None, head: str, seed: int, flags: Sequence[str] = (), config: str = CONFIG) -> Settings:
    """Those of the config, and the run's own; its data are the config's where ``data`` is None."""
    settings = read_settings(CONFIGS / config, flags, allowed_keys())
    if data is not None:
        settings["data"]["path"] = str(data)
    settings["model"]["head"] = head
    settings["training"]["seed"] = seed
    return settings


def train_all(runs: Mapping[Path, Settings], num_processes: int) -> None:
    """Trains those that are not there, several at one time if so asked; one that was finished is kept.

    Raises:
        ValueError: If a run that is there is one of other settings.
    """
    missing = [each for each in runs.items() if not is_trained(*each)]
    if num_processes == 1 or len(missing) < 2:
        for each in tqdm(missing, desc="models", unit="run", disable=None):
            _train(each)
        return
    # Spawned: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(num_processes, context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for _ in tqdm(executor.map(_train, missing), total=len(missing), desc="models", unit="run", disable=None):
            pass
    finally:
        executor.shutdown(cancel_futures=True)


def is_trained(folder: Path, settings: Settings) -> bool:
    """Whether a run was finished in a folder.

    Raises:
        ValueError: If it is one of other settings.
    """
    path = folder / RECORD
    if not path.is_file():
        return False
    if json.loads(path.read_text(encoding="utf-8"))["settings"] != told(settings):
        raise ValueError(f"{folder} holds a run of other settings; name other --models, or delete it.")
    return True


def told(settings: Settings) -> dict[str, Any]:
    """The settings as a run's record has them."""
    data = {key: relative(value) if key == "path" else value for key, value in settings["data"].items()}
    whole = {"data": data, "model": settings["model"], "training": TRAINING | settings["training"]}
    return json.loads(json.dumps(whole))


def _train(job: tuple[Path, Settings]) -> None:
    folder, settings = job
    run(settings, folder, progress=False)


def load_model(folder: Path) -> SnaJanusModel:
    """A trained model.

    Raises:
        ValueError: If there is none.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model; measure the part models first, or name its folder by --models.")
    return SnaJanusModel.from_pretrained(folder).eval()


def about_run(folder: Path) -> dict[str, Any]:
    """Sizes and times of a run, from its record."""
    record, model = json.loads((folder / RECORD).read_text(encoding="utf-8")), load_model(folder)
    return {
        "num_head_parameters": model.num_head_parameters(),
        "num_parameters": sum(each.numel() for each in model.parameters()),
        "train_seconds": record["seconds"],
        "epochs": len(record["history"]),
        "num_train": record["num_cells"]["train"],
        "num_test": record["num_cells"]["test"],
    }


@torch.no_grad()
def test_errors(model: SnaJanusModel, held_out: MicrostructureSet) -> TestErrors:
    """Of a model on cells that it was not trained on, as the set labels them.

    Raises:
        ValueError: If there are none.
    """
    if not len(held_out):
        raise ValueError("the set has no test cells; make a larger one.")
    cells, labels = held_out.cells.float(), held_out.labels.double()
    found = measure(model, cells, labels)
    errors = (responses(model, cells)[2] - labels).abs().mean(0) / labels.abs().mean(0)
    return TestErrors(
        bce=found["reconstruction"]["cross_entropy"],
        voxel_error=found["reconstruction"]["voxel_error"],
        r2=found["forward"]["r2"],
        mae_relative=dict(zip(held_out.property_names, errors.tolist(), strict=True)),
        cycle_property=found["cycle"]["properties"],
        cycle_latent=found["cycle"]["latents"],
    )


test_errors.__test__ = False  # nothing for pytest


@torch.no_grad()
def responses(model: SnaJanusModel, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (N, d), logits (N, m, ...) and predictions (N, properties), the latter in double precision."""
    found = []
    for part in cells.split(CELLS_AT_ONCE):
        latents = model.encode(part)
        found.append((latents, model.decode(latents), model.predict(latents).double()))
    latents, logits, prediction = (torch.cat(each) for each in zip(*found, strict=True))
    return latents, logits, prediction


def model_arrays(model: SnaJanusModel, held_out: MicrostructureSet) -> dict[str, Tensor]:
    """For the pictures of predictions, latents and reconstructions."""
    cells = held_out.cells.float()
    latents, logits, prediction = responses(model, cells)
    arrays = {
        "parity.prediction": prediction.float(),
        "parity.label": held_out.labels,
        "latent.codes": latents,
        "reconstruction.cells": cells[:NUM_DRAWN],
        "reconstruction.logits": logits[:NUM_DRAWN],
    }
    if "C1111" in held_out.property_names:
        arrays["latent.C1111"] = held_out.labels[:, held_out.property_names.index("C1111")]
    return arrays


def add_arrays(out: Path, arrays: Mapping[str, Tensor]) -> None:
    """Writes arrays beside those of other parts, whole or not at all."""
    path = out / ARRAYS
    known = load_file(path) if path.is_file() else {}
    out.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(path.name + ".partial")
    save_file(known | {name: each.detach().contiguous() for name, each in arrays.items()}, partial_path)
    partial_path.replace(path)
