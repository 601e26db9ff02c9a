"""The loop: transformers' Trainer, with what fields and text share."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from training.provenance import write_text
from training.settings import Settings


@dataclasses.dataclass
class TrainingSettings(TrainingArguments):
    """The `training` section: transformers' arguments and the following.

    `bf16: auto` is bfloat16 where there is a GPU that has it.

    Attributes:
        embedding_learning_rate: Peak learning rate of the embedding's parameters; None is `learning_rate`. They are
            never decayed: the splines live near one, and pulled to zero their product vanishes.
        sequences_per_step: Items of a step, of all processes together; `gradient_accumulation_steps` is then what makes
            up for their number. None leaves that to be given.
    """

    embedding_learning_rate: float | None = None
    sequences_per_step: int | None = None


def build_arguments(settings: Settings) -> TrainingSettings:
    """The arguments of transformers' Trainer, checked for what would train something else than asked for.

    Raises:
        ValueError: Without a number of steps, if processes were launched that do not know of each other, or if items of
            a step cannot be shared out evenly.
    """
    options = {"remove_unused_columns": False, "report_to": "none"} | settings["training"]
    if options.get("bf16") == "auto":
        options["bf16"] = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    args = TrainingSettings(**options)
    if args.max_steps < 1:
        raise ValueError(f"training.max_steps = {args.max_steps}; give the number of optimizer steps.")
    if args.save_only_model:
        raise ValueError("training.save_only_model leaves checkpoints from which training cannot go on; leave it out.")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(
            f"{launched} processes were launched and {args.world_size} joined: each would train alone into one folder. "
            "On CPUs pass --training.use_cpu true --training.ddp_backend gloo."
        )
    if args.sequences_per_step is not None:
        if "gradient_accumulation_steps" in settings["training"]:
            raise ValueError("training.sequences_per_step decides gradient_accumulation_steps; leave one of them out.")
        at_once = args.per_device_train_batch_size * args.world_size
        if args.sequences_per_step < at_once or args.sequences_per_step % at_once:
            raise ValueError(
                f"training.sequences_per_step = {args.sequences_per_step} is no multiple of the {at_once} that "
                f"{args.world_size} processes take at once; change it or per_device_train_batch_size = "
                f"{args.per_device_train_batch_size}."
            )
        args.gradient_accumulation_steps = args.sequences_per_step // at_once
    return args


class LeviathanTrainer(Trainer):
    """transformers' Trainer with a learning rate for the embedding."""

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the embedding's parameters in a group of their own."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        embedding = {id(p) for p in model.get_input_embeddings().parameters()}
        # As the embedding's splines, the factors of a head of digits live near one.
        decayed = {name for name in self.get_decay_parameter_names(model) if not name.endswith("digit_factors")}
        own_rate = self.args.embedding_learning_rate
        groups = {
            "decayed": {"weight_decay": self.args.weight_decay},
            "plain": {"weight_decay": 0.0},
            "embedding": {"weight_decay": 0.0, "lr": self.args.learning_rate if own_rate is None else own_rate},
        }
        for group in groups.values():
            group["params"] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                kind = "embedding" if id(parameter) in embedding else "decayed" if name in decayed else "plain"
                groups[kind]["params"].append(parameter)
        optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer([group for group in groups.values() if group["params"]], **options)
        return self.optimizer

    def resume_data(self, checkpoint: Path) -> None:
        """What must be told to the data before training goes on from a checkpoint: of itself, nothing."""

    def report(self) -> dict[str, Any]:
        """What the loop adds to `training.json`."""
        return {}


class JsonLog(TrainerCallback):
    """Appends every log entry to `log.jsonl`; after a resume, entries beyond the checkpoint are dropped first."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs) -> None:  # noqa: ANN001
        """Keeps the entries up to the step from which training goes on."""
        if state.is_world_process_zero:
            kept = [row for row in self.rows() if row["step"] <= state.global_step] if state.global_step else []
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # noqa: ANN001
        """Writes one entry."""
        if state.is_world_process_zero and logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All entries, in order."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be torn


def marginal_entropy(ids: np.ndarray) -> float:
    """Entropy in nats of the distribution of ``ids``: the least loss of a model that looks at nothing."""
    counts = np.unique(ids, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())
