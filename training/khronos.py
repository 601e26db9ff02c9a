"""Trains KHRONOS on a table: by alternating least squares, or by gradient on minibatches through Accelerate.

    python -m training.khronos --data table.csv --target y --out runs/khronos [--rank 8 --num-cells 16]
    accelerate launch -m training.khronos --data table.parquet --target y z --out runs/khronos --method gradient
    ACCELERATE_USE_CPU=true accelerate launch --config_file training/configs/multi_cpu.yaml -m training.khronos ...

Alternating least squares minimise squares, in one process that holds x and y in memory. Gradients take any loss, and
any number of rows and processes: minibatches are read from a file.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from math import isfinite
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, set_seed
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from leviathan.khronos import KhronosConfig, KhronosForClassification, KhronosModel
from leviathan.khronos.tables import ROWS_AT_ONCE
from sna_core import als
from sna_core.local_sum import check_points
from training.launching import check_joined
from training.provenance import provenance, relative, write_json
from training.tables import READERS, Rows, Table, read_table

Criterion = Callable[[Tensor, Tensor], Tensor]
RegressionLoss = Literal["mse", "l1", "huber"]
Loss = RegressionLoss | Literal["cross_entropy"]
LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss, "cross_entropy": F.cross_entropy}
SIZES = ("rank", "num_cells", "degree")


@dataclass(frozen=True)
class TrainingResult:
    """What :func:`train` did.

    Attributes:
        converged: Whether the loss on all training data came down to ``target_loss``; False where there was none.
        num_epochs: Passes over the training data.
        num_steps: Steps of the optimizer.
        training_loss: Of each epoch, the mean over its minibatches, each before its step.
        validation_loss: After each epoch, on all validation data; None without such data.
        best_epoch: The one, counted from 1, whose parameters the model has: that of the least validation loss, or the
            last.
        seconds: Time of the epochs, without the look at training and validation data after each.
    """

    converged: bool
    num_epochs: int
    num_steps: int
    training_loss: tuple[float, ...]
    validation_loss: tuple[float, ...] | None
    best_epoch: int
    seconds: float


def train(
    model: KhronosModel | KhronosForClassification,
    x: ArrayLike | Tensor | Dataset,
    y: ArrayLike | Tensor | None = None,
    *,
    loss: Loss | Criterion | None = None,
    num_epochs: int = 200,
    batch_size: int = 128,
    learning_rate: float = 0.05,
    weight_decay: float = 0.0,
    warmup_fraction: float = 0.05,
    validation: tuple[ArrayLike | Tensor, ArrayLike | Tensor] | Dataset | None = None,
    target_loss: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TrainingResult:
    r"""Trains a model in place by AdamW on minibatches, on one process or on all that Accelerate launched.

    Before the first step, a ``KhronosModel`` takes mean :math:`\mu_o` and standard deviation :math:`\sigma_o` of the
    training targets for its ``output_shift`` and ``output_scale``, so that its network learns
    :math:`(y_o - \mu_o) / \sigma_o`. The losses that have a name are those of such standardised values: "mse" is the
    fraction of variance that is left, on average over the outputs. The uncertainty of an earlier fit is forgotten.

    The learning rate rises linearly, then falls to zero along a cosine. Rows are shuffled; those that do not fill the
    last minibatch of an epoch are left out of it. A seed gives the same minibatches on any number of processes.

    Args:
        model: A ``KhronosModel``, or a ``KhronosForClassification``.
        x: Points (rows, num_inputs). Or a dataset of pairs of a point and a target, with a length, of which no more
            than a block is in memory, beside the order of its rows; then y is None.
        y: Targets (rows, num_outputs), for one output also (rows,); for a classification, labels (rows,).
        loss: A name; or a function of predictions (batch, num_outputs) and targets of the same shape, in the targets'
            units (of logits and labels), to the mean over the batch. None is "mse", for a classification
            "cross_entropy".
        num_epochs: Passes over the training data, at most.
        batch_size: Rows of a step, of all processes together; a smaller table is one batch.
        learning_rate: Its peak.
        weight_decay: As in AdamW, decoupled from the loss: all parameters shrink towards zero by this times the
            learning rate in each step.
        warmup_fraction: Part of all steps in which the learning rate rises.
        validation: x and y, or a dataset, of rows on which to choose the epoch whose parameters are kept.
        target_loss: Stops after the epoch that brings the loss on all training data down to this.
        seed: Of the order of the rows.
        progress: Whether to show a bar.

    Raises:
        ValueError: If an option is out of range or does not fit the model or the processes, a row is not finite or
            outside the model's box, or the loss is no longer finite.
    """
    _check_options(num_epochs, batch_size, learning_rate, weight_decay, warmup_fraction)
    if y is None and not isinstance(x, Dataset):
        raise ValueError("y is missing; give the targets of x, or a dataset of pairs of a point and a target.")
    if y is not None and isinstance(x, Dataset):
        raise ValueError("x is a dataset, which holds the targets, and y is given too; leave out y.")
    accelerator = _accelerator()
    data = _dataset(x if y is None else (x, y))
    batch_size = _fitting(int(batch_size), len(data), accelerator.num_processes)
    criterion, device = _criterion(model, loss), model.device

    blocks = _blocks(accelerator, model, data)
    survey = _survey(accelerator, model, blocks)
    held_out = None
    if validation is not None:
        held_out = _blocks(accelerator, model, _dataset(validation))
        _survey(accelerator, model, held_out)
    if isinstance(model, KhronosModel):
        model.forget_uncertainty()
        constant = survey.low == survey.high
        model.output_shift.copy_(survey.mean)
        model.output_scale.copy_(torch.where(constant, 1.0, survey.std))
        model.output_low.copy_(survey.low)
        model.output_high.copy_(survey.high)

    order, collate = _Shuffle(len(data), seed), partial(_collate, dtype=model.dtype)
    loader = DataLoader(data, batch_size, sampler=order, drop_last=True, collate_fn=collate)
    num_steps = num_epochs * len(loader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(warmup_fraction * num_steps), num_steps)
    wrapped, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    training_loss, validation_loss, seconds, converged = [], [], 0.0, False
    best_epoch, best_state = 0, None
    show = progress and accelerator.is_main_process
    for epoch in (bar := tqdm(range(1, num_epochs + 1), unit=" epochs", disable=None if show else True)):
        started = time.perf_counter()
        total = torch.zeros((), device=accelerator.device)
        for points, targets in loader:
            value = criterion(*_compare(wrapped, points, targets))
            accelerator.backward(value)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += value.detach()
        training_loss.append(accelerator.reduce(total / len(loader), "mean").item())
        seconds += time.perf_counter() - started
        if not isfinite(training_loss[-1]):
            raise ValueError(
                f"the loss is {training_loss[-1]} in epoch {epoch}; lower learning_rate = {learning_rate}."
            )
        bar.set_postfix(loss=f"{training_loss[-1]:.3g}", refresh=False)
        if held_out is not None:
            validation_loss.append(_mean(accelerator, model, held_out, criterion).item())
            if validation_loss[-1] <= min(validation_loss):
                best_epoch, best_state = epoch, {k: v.clone() for k, v in model.state_dict().items()}
        if target_loss is not None and _mean(accelerator, model, blocks, criterion) <= target_loss:
            converged = True
            break
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    if best_state is not None:
        model.load_state_dict(best_state)
    model.to(device)
    return TrainingResult(
        converged=converged,
        num_epochs=epoch,
        num_steps=epoch * len(loader),
        training_loss=tuple(training_loss),
        validation_loss=None if held_out is None else tuple(validation_loss),
        best_epoch=best_epoch or epoch,
        seconds=seconds,
    )


def _check_options(
    num_epochs: int, batch_size: int, learning_rate: float, weight_decay: float, warmup_fraction: float
) -> None:
    for name, count in (("num_epochs", num_epochs), ("batch_size", batch_size)):
        if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} = {count!r}; expected an integer of at least 1.")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate = {learning_rate}; expected a positive number.")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay = {weight_decay}; expected zero or more.")
    if not 0 <= warmup_fraction <= 1:
        raise ValueError(f"warmup_fraction = {warmup_fraction}; expected a number from 0 to 1.")


class _Shuffle(Sampler):
    """All numbers below ``num_rows`` in another order each time, which is the same on every process.

    torch's RandomSampler holds a Python integer for each, of more bytes than many a row has.
    """

    def __init__(self, num_rows: int, seed: int):
        self.num_rows, self.generator = num_rows, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        for part in torch.randperm(self.num_rows, generator=self.generator).split(ROWS_AT_ONCE):
            yield from part.tolist()


def _accelerator() -> Accelerator:
    """Shares each batch out among the processes, and leaves none of a loader's rows to come twice."""
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True, even_batches=False))
    check_joined(accelerator.num_processes)
    return accelerator


def _fitting(batch_size: int, num_rows: int, num_processes: int) -> int:
    """The batch size, or that of the whole table where it is smaller, to be shared out evenly."""
    if num_rows < num_processes:
        raise ValueError(f"{num_rows} rows cannot be shared out among {num_processes} processes; launch fewer.")
    if batch_size % num_processes:
        raise ValueError(
            f"batch_size = {batch_size} cannot be shared out evenly among {num_processes} processes; give a multiple."
        )
    return min(batch_size, num_rows - num_rows % num_processes)


def _dataset(data: tuple[ArrayLike | Tensor, ArrayLike | Tensor] | Dataset) -> Dataset:
    if isinstance(data, IterableDataset):
        raise ValueError("an IterableDataset cannot be shuffled; give a dataset with a length and items by number.")
    data = data if isinstance(data, Dataset) else Rows(*map(torch.as_tensor, data))
    if not len(data):
        raise ValueError("there are no rows to train on, or to validate on.")
    return data


def _collate(items: tuple[Tensor, Tensor] | list[Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A batch (x, y), of a dataset that reads many rows at a time or of single items."""
    x, y = items if isinstance(items, tuple) else default_collate(items)
    return x.to(dtype), y


def _criterion(model: KhronosModel | KhronosForClassification, loss: Loss | Criterion | None) -> Criterion:
    classifies = isinstance(model, KhronosForClassification)
    if loss is None:
        loss = "cross_entropy" if classifies else "mse"
    if callable(loss):
        return loss
    names = [name for name in LOSSES if (name == "cross_entropy") == classifies]
    if loss not in names:
        raise ValueError(
            f"loss = {loss!r}; expected {' or '.join(map(repr, names))} for a {type(model).__name__}, or a function of "
            "predictions and targets."
        )
    if classifies:
        return LOSSES[loss]
    # The buffers are read in each call: they are not set yet, and may change their device.
    return lambda prediction, y: LOSSES[loss](
        *((each - model.output_shift) / model.output_scale for each in (prediction, y))
    )


def _compare(model: torch.nn.Module, points: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and targets of one shape; or logits and labels."""
    output = model(points)
    if "logits" in output:
        return output.logits, targets
    return output.prediction, targets.to(output.prediction.dtype).reshape(output.prediction.shape)


def _blocks(accelerator: Accelerator, model: torch.nn.Module, data: Dataset) -> DataLoader:
    """All rows in order, each on one of the processes."""
    size = ROWS_AT_ONCE * accelerator.num_processes
    return accelerator.prepare(DataLoader(data, size, collate_fn=partial(_collate, dtype=model.dtype)))


@torch.no_grad()
def _mean(
    accelerator: Accelerator,
    model: torch.nn.Module,
    blocks: DataLoader,
    function: Criterion,
    shape: tuple[int, ...] = (),
) -> Tensor:
    """The mean over all rows of a function that gives the mean over a batch, (*shape), in float64."""
    total = torch.zeros(shape, dtype=torch.float64, device=accelerator.device)
    for points, targets in blocks:
        total += len(points) * function(*_compare(model, points, targets))
    return accelerator.reduce(total) / len(blocks.dataset)


@dataclass(frozen=True)
class _Survey:
    """How the targets are spread: mean, standard deviation, least and greatest value, each (num_outputs,), float64."""

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor


def _survey(accelerator: Accelerator, model: KhronosModel | KhronosForClassification, blocks: DataLoader) -> _Survey:
    """Looks at every row once: whether the model can take it, and how the targets are spread.

    Raises:
        ValueError: If a row is not finite or outside the model's box, or a label is none.
    """
    num_outputs = model.network.num_outputs
    classifies = isinstance(model, KhronosForClassification)
    width = 1 if classifies else num_outputs
    sums = torch.zeros(2, width, dtype=torch.float64, device=accelerator.device)
    low, high = torch.full_like(sums[0], torch.inf), torch.full_like(sums[0], -torch.inf)
    # Squares of what is left of a value near the mean do not cancel.
    origin = torch.as_tensor(blocks.dataset[0][1]).to(sums).reshape(-1)
    first = ROWS_AT_ONCE * accelerator.process_index
    for x, y in blocks:
        _check_points(model, x, first)
        if y.numel() != width * len(x):
            raise ValueError(f"targets have shape {tuple(y.shape)} for {len(x)} rows; expected {width} a row.")
        targets = y.to(sums).reshape(len(x), width)
        if not (finite := targets.isfinite()).all():
            row, column = (~finite).nonzero()[0].tolist()
            raise ValueError(f"y[{first + row}, {column}] = {targets[row, column]} is not finite; drop the row.")
        if classifies and (y.is_floating_point() or not ((y >= 0) & (y < num_outputs)).all()):
            raise ValueError(f"y holds what is no label; expected integers from 0 to {num_outputs - 1}.")
        sums += torch.stack([targets - origin, (targets - origin).square()]).sum(1)
        low, high = torch.minimum(low, targets.amin(0)), torch.maximum(high, targets.amax(0))
        first += ROWS_AT_ONCE * accelerator.num_processes
    mean, square = accelerator.reduce(sums) / len(blocks.dataset)
    low, high = accelerator.gather(low.unsqueeze(0)).amin(0), accelerator.gather(high.unsqueeze(0)).amax(0)
    return _Survey(origin + mean, (square - mean.square()).clamp(min=0).sqrt(), low, high)


def _check_points(model: KhronosModel | KhronosForClassification, x: Tensor, first: int) -> None:
    """Raises for points that the model cannot take; the number of the first row is told where it is not 0."""
    try:
        if not (finite := x.isfinite()).all():
            index = (~finite).nonzero()[0].tolist()
            raise ValueError(f"x{index} = {x[tuple(index)].item()} is not finite; drop the row or fill in the value.")
        check_points(x, model.network.splines, x.dtype, inside=model.config.extrapolate == "raise")
    except ValueError as error:
        raise ValueError(f"of the rows from number {first} on, {error}" if first else str(error)) from error


METHODS = {
    "als": (als.fit, ("ridge", "smoothness", "num_restarts", "max_sweeps")),
    "gradient": (
        train,
        ("loss", "num_epochs", "batch_size", "learning_rate", "weight_decay", "warmup_fraction", "target_loss"),
    ),
}
"""What fits a model, with the names of the options that the command passes on."""


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Fits a model to a table, saves it and `training.json`, and returns what the latter holds.

    Args:
        options: The command's, by name; those of ``METHODS`` that are None are left to the method.

    Raises:
        ValueError: On options that do not fit each other or the table, or a folder that must not be overwritten.
        OSError: If the table cannot be read.
    """
    out, method, seed = Path(options["out"]), options["method"], options["seed"]
    function, names = METHODS[method]
    for other, (_, theirs) in METHODS.items():
        if other != method and (strange := [name for name in theirs if options[name] is not None]):
            raise ValueError(f"{', '.join(strange)}: for --method {other}, not {method}; leave out or change it.")
    defaults = {name: signature(function).parameters[name].default for name in names}
    chosen = defaults | {name: options[name] for name in names if options[name] is not None}
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a model already; choose another --out.")
    accelerator = _accelerator()
    if method == "als" and accelerator.num_processes > 1:
        raise ValueError(f"alternating least squares run in one process; {accelerator.num_processes} were launched.")
    table = read_table(options["data"], options["target"], options["inputs"])
    rows, held_out = split(table, options["validation_fraction"], seed)
    set_seed(seed)
    sizes = {name: options[name] for name in SIZES if options[name] is not None}
    try:
        corners = torch.stack([table.x.amin(0), table.x.amax(0)])  # all that the box depends on, in little memory
        model = KhronosModel(KhronosConfig.for_data(corners, num_outputs=len(table.targets), **sizes))
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error
    if method == "als":
        validation = held_out and held_out[:]
        result = model.fit(*rows[:], validation=validation, seed=seed, **chosen)
    else:
        result = train(model, rows, validation=held_out, seed=seed, **chosen)
    model.to(accelerator.device)
    report = {
        "data": relative(options["data"]),
        "method": method,
        "settings": {name: getattr(model.config, name) for name in SIZES} | chosen,
        "inputs": table.inputs,
        "targets": table.targets,
        "num_parameters": model.num_fitted,
        "num_processes": accelerator.num_processes,
        "result": {name: each.tolist() if isinstance(each, Tensor) else each for name, each in vars(result).items()},
        "training": errors(accelerator, model, rows, table.targets),
        "validation": held_out and errors(accelerator, model, held_out, table.targets),
        "provenance": provenance(seed),
    }
    if accelerator.is_main_process:
        model.save_pretrained(out)
        write_json(out / "training.json", report)
    return report


def split(table: Table, validation_fraction: float, seed: int) -> tuple[Rows, Rows | None]:
    """The rows to train on and, with a fraction above zero, those to validate on: chosen by chance, in their order.

    Raises:
        ValueError: If the fraction leaves no rows for one of them.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction = {validation_fraction}; expected at least 0 and less than 1.")
    num_rows = len(table.x)
    num_held_out = round(validation_fraction * num_rows)
    if validation_fraction and not 0 < num_held_out < num_rows:
        raise ValueError(f"validation_fraction = {validation_fraction} of {num_rows} rows leaves none for a side.")
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    chosen = [part.sort().values for part in order.split([num_rows - num_held_out, num_held_out])]
    rows, held_out = (Rows(table.x, table.y, numbers) for numbers in chosen)
    return rows, held_out if num_held_out else None


def _mean_squares(prediction: Tensor, y: Tensor) -> Tensor:
    return (prediction - y).square().mean(0)


def errors(
    accelerator: Accelerator, model: KhronosModel, rows: Rows, targets: Sequence[str]
) -> dict[str, int | dict[str, float | None]]:
    """Number of rows and, for each target, root mean squared error in its units and coefficient of determination.

    The latter is None where the target is constant.
    """
    blocks = _blocks(accelerator, model, rows)
    std = _survey(accelerator, model, blocks).std
    rmse = _mean(accelerator, model, blocks, _mean_squares, std.shape).sqrt()
    return {
        "num_rows": len(rows),
        "rmse": dict(zip(targets, rmse.tolist(), strict=True)),
        "r2": {
            name: 1 - (error / spread) ** 2 if spread else None
            for name, error, spread in zip(targets, rmse.tolist(), std.tolist(), strict=True)
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help=f"a table: {', '.join(READERS)}")
    parser.add_argument("--target", nargs="+", required=True, help="columns to predict")
    parser.add_argument("--inputs", nargs="+", help="columns to predict from; all others, if left out")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--method", choices=METHODS, default="als", help="how to fit")
    parser.add_argument("--validation-fraction", type=float, default=0.1, help="of the rows, to choose what is kept")
    parser.add_argument("--seed", type=int, default=0)
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="as KhronosConfig says")
    whole = ("num_restarts", "max_sweeps", "num_epochs", "batch_size")
    for method, (_, names) in METHODS.items():
        for name in names:
            kind = (
                {"type": int if name in whole else float} if name != "loss" else {"choices": get_args(RegressionLoss)}
            )
            parser.add_argument(f"--{name.replace('_', '-')}", help=f"of --method {method}", **kind)
    try:
        report = run(vars(parser.parse_args(arguments)))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    for part in ("training", "validation"):
        if report[part] and PartialState().is_main_process:
            print(f"{part}: " + ", ".join(f"{k} {v}" for k, v in report[part].items()))


if __name__ == "__main__":
    main()
