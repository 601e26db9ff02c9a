"""Trains a Janus on labelled microstructures, or on scikit-learn's images of digits, on as many processes as launched.

    python -m training.janus --config training/configs/janus_cpu.yaml --out runs/janus/model [--section.key value ...]
    accelerate launch -m training.janus --config training/configs/janus_64.yaml --out runs/janus/model_64
    ACCELERATE_USE_CPU=true accelerate launch --config_file training/configs/multi_cpu.yaml -m training.janus ...

The autoencoder and the head are trained together by AdamW; the learning rate rises linearly and falls along a cosine.
Then the model is given what the inversion needs to know: the codes of the training cells, and their shared boundary.
Writes the model and `record.json`: how training went, and errors on the validation and test cells. A run that was
interrupted goes on from its last checkpoint, with the same result.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from leviathan.janus.cells import FREE
from leviathan.janus.configuration import PHYSICS, STATISTICS, SnaJanusConfig
from leviathan.janus.modeling import CELLS_AT_ONCE, SnaJanusModel
from sna_core.network import check_counts
from training.launching import check_joined
from training.microstructure_data import SPLITS, load_set, split_of
from training.provenance import provenance, relative, write_json
from training.settings import Settings, read_settings
from training.tables import Rows

DATA = {"path": None, "digits": False, "properties": None}
TRAINING = {
    "epochs": 60,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "weight_decay": 1e-2,
    "warmup_fraction": 0.1,
    "max_grad_norm": 1.0,
    "checkpoint_epochs": 10,
    "seed": 0,
    "mixed_precision": "no",
}
OF_DATA = ("spatial_dims", "resolution", "symmetry", "two_phases", "shared_boundary", "property_names", "property_kind")
CHECKPOINT = "checkpoint.safetensors"
LOSSES = ("loss", "reconstruction_loss", "property_loss", "cycle_loss", "jacobian_loss")


def allowed_keys() -> dict[str, Sequence[str]]:
    """The keys of each section of a config; the data decide some of the model's."""
    options = SnaJanusConfig.__annotations__
    taken = {"model_type", *OF_DATA, *PHYSICS, *STATISTICS}
    return {
        "data": tuple(DATA),
        "model": tuple(name for name in options if name not in taken),
        "training": tuple(TRAINING),
    }


@dataclass(frozen=True, eq=False)
class Examples:
    """Cells and labels for training, and what the model's config takes from them.

    Attributes:
        splits: Of "train", "validation" and "test" the cells (cells, m, ...) from 0 to 1, and the labels.
        boundary: (m, ...), what all cells share.
        options: Arguments of the config.
    """

    splits: dict[str, tuple[Tensor, Tensor]]
    boundary: Tensor
    options: dict[str, Any]


def read_examples(data: Mapping[str, Any]) -> Examples:
    """The data that a config asks for.

    Args:
        data: ``path`` of a labelled set, and ``properties``, those of its columns to predict, all if there are none
            named; or ``digits``, true for scikit-learn's images.

    Raises:
        ValueError: If there is no such set, a split is empty, or a property is missing or constant in training.
    """
    chosen = DATA | data
    if bool(chosen["path"]) == bool(chosen["digits"]) or (chosen["digits"] and chosen["properties"]):
        raise ValueError(f"data = {dict(data)}; expected the path of a labelled set, or digits: true.")
    examples = digits() if chosen["digits"] else labelled_cells(chosen["path"], chosen["properties"])
    for name, (cells, _) in examples.splits.items():
        if not len(cells):
            raise ValueError(f"there are no cells for {name}; make a larger set.")
    return examples


def digits() -> Examples:
    """The 1,797 images of digits, of 8 x 8 grey values, that come with scikit-learn."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(images).float().view(-1, 8, 8) / 16, torch.from_numpy(labels).long()
    splits = [split_of(index) for index in range(len(images))]
    rows = {name: torch.tensor([split == name for split in splits]) for name in SPLITS}
    return Examples(
        {name: (images[chosen], labels[chosen]) for name, chosen in rows.items()},
        torch.full((8, 8), FREE, dtype=torch.uint8),
        {
            **{"spatial_dims": 2, "resolution": 8, "symmetry": "none", "two_phases": False, "shared_boundary": False},
            **{"property_names": [str(digit) for digit in range(10)], "property_kind": "classification"},
        },
    )


def labelled_cells(path: str | Path, properties: Sequence[str] | None = None) -> Examples:
    """A labelled set, with the properties of these names.

    Raises:
        ValueError: As :func:`read_examples`, or if the set has no labels.
    """
    whole = load_set(path)
    if not whole.property_names:
        raise ValueError(f"{path} has no labels; make it with some (training.lbom: --label).")
    names = list(properties or whole.property_names)
    if missing := [name for name in names if name not in whole.property_names]:
        raise ValueError(f"{path} has no {', '.join(missing)}; expected some of {', '.join(whole.property_names)}.")
    columns = [whole.property_names.index(name) for name in names]
    parts = {name: whole.split(name) for name in SPLITS}
    labels = parts["train"].labels[:, columns].double()
    options = {
        "spatial_dims": whole.cells.ndim - 1,
        "resolution": whole.cells.shape[1],
        "symmetry": whole.symmetry,
        "shared_boundary": bool((whole.boundary != FREE).any()),
        "property_names": names,
        # None where labels were not computed but came with the cells.
        **{name: value for name, value in (whole.settings.get("physics") or {}).items() if name in PHYSICS},
    }
    if len(labels):
        low, high = labels.amin(0), labels.amax(0)
        if (low == high).any():
            raise ValueError(f"{names[int((low == high).nonzero()[0])]} is constant in training; leave it out.")
        options |= {"property_low": low.tolist(), "property_high": high.tolist()}
    splits = {name: (part.cells, part.labels[:, columns]) for name, part in parts.items()}
    return Examples(splits, whole.boundary, options)


def build_model(options: Mapping[str, Any], examples: Examples) -> SnaJanusModel:
    """A model for the data, with the statistics of its properties in its config.

    Raises:
        ValueError: On options that do not fit each other or the data.
    """
    floats = {name for name, kind in SnaJanusConfig.__annotations__.items() if kind is float}
    options = {
        name: float(value) if name in floats and type(value) is int else value for name, value in options.items()
    }
    try:
        config = SnaJanusConfig(**examples.options, **options)
        if config.property_kind == "regression":
            labels = examples.splits["train"][1].double()
            for column, scale in enumerate(config.property_scale):
                values = labels[:, column]
                if scale == "log" and not (values > 0).all():
                    raise ValueError(
                        f"{config.property_names[column]} is {values.min():g} for a cell; a logarithmic scale needs "
                        "positive numbers: drop the cell, or give property_scale."
                    )
                values = values.log() if scale == "log" else values
                config.property_mean[column] = values.mean().item()
                config.property_std[column] = values.std(correction=0).item()
        return SnaJanusModel(config)
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error


def epoch_seed(seed: int, epoch: int) -> int:
    """Of all that is random in an epoch, on the first process; the others' are the next numbers."""
    return (seed * 2**16 + epoch) * 2**10


class Shuffle(Sampler):
    """Another order of the rows in each epoch, the same on every process and after an interruption."""

    def __init__(self, num_rows: int, seed: int):
        self.num_rows, self.seed, self.epoch = num_rows, seed, 0

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        yield from torch.randperm(self.num_rows, generator=generator).tolist()


def run(settings: Settings, out: str | Path, progress: bool = True) -> dict[str, Any]:
    """Trains, measures and saves; returns what `record.json` holds.

    Args:
        settings: Sections as of :func:`allowed_keys`.
        out: Folder for the model, the record and, while it is trained, the checkpoint.
        progress: Whether to show a bar.

    Raises:
        ValueError: On settings that do not fit each other or the data, a folder that holds another model, processes
            that do not know of each other, or a loss that is no longer finite.
        OSError: If the data cannot be read.
    """
    out, given = Path(out), TRAINING | settings["training"]
    _check_training(given)
    settings = {"data": settings["data"], "model": settings["model"], "training": given}
    accelerator = Accelerator(
        mixed_precision=given["mixed_precision"],
        dataloader_config=DataLoaderConfiguration(split_batches=True, even_batches=False),
    )
    check_joined(accelerator.num_processes)
    if given["batch_size"] % accelerator.num_processes:
        raise ValueError(
            f"training.batch_size = {given['batch_size']}; expected a multiple of the {accelerator.num_processes} "
            "processes."
        )
    _check_folder(out, settings)
    examples = read_examples(settings["data"])
    torch.manual_seed(given["seed"])
    model = build_model(settings["model"], examples)
    history, seconds = _train(accelerator, model, examples, settings, out, progress)

    model.eval()
    cells = examples.splits["train"][0]
    with torch.no_grad():
        model.remember(torch.cat([model.encode(part.to(model.device)) for part in cells.split(CELLS_AT_ONCE)]))
    model.set_boundary(examples.boundary)
    parts = {"encoder": model.encoder, "decoder": model.decoder, "head": model.head}
    record = {
        "settings": settings | {"data": {k: relative(v) if k == "path" else v for k, v in settings["data"].items()}},
        "num_parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "num_cells": {name: len(cells) for name, (cells, _) in examples.splits.items()},
        "validation": measure(model, *examples.splits["validation"]),
        "test": measure(model, *examples.splits["test"]),
        "seconds": seconds,
        "history": history,
        "provenance": provenance(given["seed"]),
    }
    if accelerator.is_main_process:
        model.save_pretrained(out)
        write_json(out / "record.json", record)
        (out / CHECKPOINT).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return record


def _check_training(given: Mapping[str, Any]) -> None:
    check_counts(**{f"training.{name}": given[name] for name in ("epochs", "batch_size", "checkpoint_epochs")})
    for name, least, most in (
        ("learning_rate", 0, float("inf")),
        ("weight_decay", 0, float("inf")),
        ("warmup_fraction", 0, 1),
        ("max_grad_norm", 0, float("inf")),
    ):
        value = given[name]
        if not isinstance(value, int | float) or not least <= value <= most or (name == "learning_rate" and not value):
            raise ValueError(f"training.{name} = {value!r}; expected a number from {least} to {most}.")
    if type(given["seed"]) is not int or not 0 <= given["seed"] < 2**32:
        raise ValueError(f"training.seed = {given['seed']!r}; expected an integer from 0 to {2**32 - 1}.")
    if given["mixed_precision"] not in ("no", "bf16"):
        raise ValueError(f"training.mixed_precision = {given['mixed_precision']!r}; expected 'no' or 'bf16'.")


def _check_folder(out: Path, settings: Settings) -> None:
    """Raises for a folder that holds a model, or the checkpoint of other settings."""
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a model already; choose another --out.")
    if not (out / CHECKPOINT).exists():
        return
    with safe_open(out / CHECKPOINT, "pt") as file:
        theirs = json.loads(file.metadata()["settings"])
    ours = json.loads(json.dumps(settings))
    if theirs != ours:
        changed = [
            f"{section}.{key}"
            for section in ours
            for key in {**ours[section], **theirs[section]}
            if ours[section].get(key) != theirs[section].get(key)
        ]
        raise ValueError(
            f"{out} holds a run with another {', '.join(changed)}; choose another --out, or delete {CHECKPOINT} in it."
        )


def _train(
    accelerator: Accelerator,
    model: SnaJanusModel,
    examples: Examples,
    settings: Settings,
    out: Path,
    progress: bool,
) -> tuple[list[dict[str, float]], float]:
    """Trains the model, from the checkpoint in ``out`` if there is one: losses of each epoch, and its seconds."""
    given, rows = settings["training"], Rows(*examples.splits["train"])
    order = Shuffle(len(rows), given["seed"])
    batch_size = min(given["batch_size"], len(rows) - len(rows) % accelerator.num_processes)
    loader = DataLoader(rows, batch_size, sampler=order, drop_last=True, collate_fn=lambda batch: batch)
    num_steps = given["epochs"] * len(loader)
    # Factors have values around one, and no reason to shrink; heads are treated alike.
    decays = [p for part in (model.encoder, model.decoder) for p in part.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if all(p is not each for each in decays)]
    groups = [{"params": decays, "weight_decay": given["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=given["learning_rate"])
    schedule = get_cosine_schedule_with_warmup(optimizer, round(given["warmup_fraction"] * num_steps), num_steps)
    model.to(accelerator.device)
    history, seconds = _load(out / CHECKPOINT, model, optimizer)
    schedule.last_epoch = len(history) * len(loader)
    for group, rate, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = rate * factor(schedule.last_epoch)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    show = progress and accelerator.is_main_process
    bar = tqdm(range(given["epochs"]), initial=len(history), unit=" epochs", disable=None if show else True)
    while len(history) < given["epochs"]:
        order.epoch = len(history)
        # The noise of an epoch depends on its number alone, so that an interruption changes nothing.
        torch.manual_seed(epoch_seed(given["seed"], order.epoch) + accelerator.process_index)
        started = time.perf_counter()
        wrapped.train()
        totals = {}
        for cells, labels in loader:
            output = wrapped(cells, labels)
            accelerator.backward(output.loss)
            if given["max_grad_norm"]:
                accelerator.clip_grad_norm_(wrapped.parameters(), given["max_grad_norm"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            for name in LOSSES:
                if (value := output.get(name)) is not None:
                    totals[name] = totals.get(name, 0) + value.detach()
        names = list(totals)
        means = accelerator.reduce(torch.stack([totals[name] for name in names]) / len(loader), "mean").tolist()
        seconds += time.perf_counter() - started
        entry = dict(zip(names, means, strict=True))
        history.append(entry)
        if not all(map(math.isfinite, means)):
            raise ValueError(
                f"a loss is no longer finite in epoch {len(history)}; lower training.learning_rate = "
                f"{given['learning_rate']}."
            )
        bar.update()
        bar.set_postfix({name.removesuffix("_loss"): f"{entry[name]:.3g}" for name in names}, refresh=False)
        if len(history) % given["checkpoint_epochs"] == 0 and accelerator.is_main_process:
            _save(out / CHECKPOINT, model, optimizer.optimizer, settings, history, seconds)
    bar.close()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    return history, seconds


def _save(
    path: Path,
    model: SnaJanusModel,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    history: Sequence[Mapping[str, float]],
    seconds: float,
) -> None:
    """Writes what training needs to go on, whole or not at all."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    about = {"settings": settings, "history": history, "seconds": seconds}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, partial, metadata={name: json.dumps(value) for name, value in about.items()})
    partial.replace(path)


def _load(path: Path, model: SnaJanusModel, optimizer: torch.optim.Optimizer) -> tuple[list[dict[str, float]], float]:
    """Sets the model and the optimizer to a checkpoint, if there is one: losses of its epochs, and their seconds."""
    if not path.exists():
        return [], 0.0
    parameters, moments = {}, {}
    with safe_open(path, "pt") as file:
        about = file.metadata()
        for name in file.keys():  # noqa: SIM118 -- no mapping
            part, _, rest = name.partition(".")
            if part == "model":
                parameters[rest] = file.get_tensor(name)
            else:
                number, _, moment = rest.partition(".")
                moments.setdefault(int(number), {})[moment] = file.get_tensor(name)
    model.load_state_dict(parameters)
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads(about["history"]), json.loads(about["seconds"])


@torch.no_grad()
def measure(model: SnaJanusModel, cells: Tensor, labels: Tensor) -> dict[str, Any]:
    """Errors of a trained model on cells that it may not have seen.

    Returns:
        ``reconstruction``: binary cross-entropy of a voxel; the part of voxels on the wrong side of one half.
        ``forward``: of each property R2 and mean absolute error over its range in training; of classes the accuracy.
        ``decoded``: the same, where predictions are from the decoded and once more encoded cells.
        ``cycle``: of :meth:`SnaJanusModel.cycle_error`, with ``mean`` over the properties.
    """
    codes, again, entropy, wrong = [], [], 0.0, 0.0
    for part in cells.split(CELLS_AT_ONCE):
        phase = part.to(model.device, model.dtype)
        codes.append(model.encode(phase))
        logits = model.decode(codes[-1])
        entropy += F.binary_cross_entropy_with_logits(logits, phase).item() * len(part) / len(cells)
        wrong += ((logits > 0) != (phase > 0.5)).double().mean().item() * len(part) / len(cells)
        again.append(model.encode((logits > 0) if model.config.two_phases else logits.sigmoid()))
    error = model.cycle_error(cells.to(model.device))
    mean = sum(error.properties.values()) / len(error.properties)
    return {
        "reconstruction": {"cross_entropy": entropy, "voxel_error": wrong},
        "forward": _prediction_errors(model, torch.cat(codes), labels),
        "decoded": _prediction_errors(model, torch.cat(again), labels),
        "cycle": {"latents": error.latents, "mean": mean, "properties": error.properties},
    }


def _prediction_errors(model: SnaJanusModel, codes: Tensor, labels: Tensor) -> dict[str, Any]:
    config, prediction, labels = model.config, model.predict(codes).double().cpu(), labels.cpu()
    if config.property_kind == "classification":
        return {"accuracy": (prediction.argmax(-1) == labels).double().mean().item()}
    labels = labels.double()
    extent = torch.tensor(config.property_high, dtype=torch.float64) - torch.tensor(config.property_low)
    spread = (labels - labels.mean(0)).square().sum(0)
    residual = (prediction - labels).square().sum(0)
    return {
        "r2": {
            name: 1 - (left / of).item() if of > 0 else None
            for name, left, of in zip(config.property_names, residual, spread, strict=True)
        },
        "error": dict(zip(config.property_names, ((prediction - labels).abs().mean(0) / extent).tolist(), strict=True)),
    }


def summary(record: Mapping[str, Any]) -> str:
    """A record as lines of text."""
    epochs, sizes = len(record["history"]), record["num_parameters"]
    lines = [
        f"{record['num_cells']['train']:,} cells, {epochs} epochs in {record['seconds']:.0f} s; "
        + ", ".join(f"{name} {count:,}" for name, count in sizes.items())
        + " parameters"
    ]
    for name in ("validation", "test"):
        found = record[name]
        entropy, cycle = found["reconstruction"]["cross_entropy"], found["cycle"]["mean"]
        r2 = found["forward"].get("r2", {})
        quality = "R2: " + ", ".join(f"{key} {value:.4f}" for key, value in r2.items() if value is not None)
        if not r2:
            quality = f"accuracy {found['forward']['accuracy']:.2%}"
        lines.append(f"{name}: cross-entropy {entropy:.4f}, cycle {cycle:.2%}; {quality}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    allowed = allowed_keys()
    keys = "\n".join(f"  --{section}.{{{','.join(sorted(names))}}}" for section, names in allowed.items())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="settings, over those of the file:\n" + keys,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, type=Path, help="YAML file of settings")
    parser.add_argument("--out", required=True, type=Path, help="folder of model and record")
    known, flags = parser.parse_known_args(arguments)
    try:
        record = run(read_settings(known.config, flags, allowed), known.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    if PartialState().is_main_process:
        print(summary(record))
    return record


if __name__ == "__main__":
    main()
