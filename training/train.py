"""Trains a Leviathan on the next state of flow fields.

    accelerate launch -m training.train --config training/configs/turbulence_tiny_cpu.yaml [--training.max_steps 100]

A config has four sections: `data` (DataSettings below), `tokenizer` (leviathan.FieldTokenizer), `model`
(leviathan.LeviathanConfig, and attn_implementation) and `training` (transformers.TrainingArguments and what
TrainingSettings adds). The loop, mixed precision, accumulation, checkpoints, resume and trackers are transformers'
Trainer's.
"""

import dataclasses
import inspect
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, SequentialSampler, Subset
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from leviathan import FieldTokenizer, LeviathanConfig, LeviathanForCausalLM
from sna_core import DigitHead
from training.fields import FieldFile, PatchPairs, data_record, sample_snapshots, split_trajectories
from training.provenance import provenance, relative, write_json
from training.settings import Settings, parse_arguments

EVALUATION_LOGITS = 2**24  # logits that exist at one time during evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The `data` section.

    Attributes:
        path: HDF5 file of trajectories in PDEBench's layout.
        fractions: Shares of the trajectories for training, validation and test.
        split_seed: Seed of that split.
        offsets: Training patches on a `"grid"` or at `"random"` periodic offsets; see `training.fields.PatchPairs`.
        symmetries: Turn and reflect training patches (random offsets only).
        stride: Snapshots from a state to the next.
        context_noise: Noise on the target's tokens as inputs, in levels (random offsets only).
        num_fit_snapshots: Training snapshots from which the quantiser's range is taken.
        num_validation_items: Validation pairs, drawn once from all of them.
    """

    path: str
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    split_seed: int = 0
    offsets: Literal["grid", "random"] = "grid"
    symmetries: bool = False
    stride: int = 1
    context_noise: float = 0.0
    num_fit_snapshots: int = 1024
    num_validation_items: int = 512


@dataclasses.dataclass
class TrainingSettings(TrainingArguments):
    """The `training` section: transformers' arguments and the following.

    `bf16: auto` is bfloat16 where there is a GPU that has it.

    Attributes:
        embedding_learning_rate: Peak learning rate of the embedding's parameters; None is `learning_rate`. They are
            never decayed: the splines live near one, and pulled to zero their product vanishes.
    """

    embedding_learning_rate: float | None = None


def allowed_keys() -> dict[str, list[str]]:
    """The keys of each section of a config."""
    derived = {"vocab_size", "max_position_embeddings", "embedding_base", "embedding_num_digits"}  # by the tokenizer
    config = [name for name in inspect.get_annotations(LeviathanConfig) if name not in derived]
    tokenizer = [name for name, p in inspect.signature(FieldTokenizer).parameters.items() if p.kind != p.VAR_KEYWORD]
    return {
        "data": [f.name for f in dataclasses.fields(DataSettings)],
        "tokenizer": tokenizer,
        "model": [*config, "attn_implementation"],
        "training": [f.name for f in dataclasses.fields(TrainingSettings) if f.init],
    }


class FieldTrainer(Trainer):
    """transformers' Trainer with a learning rate for the embedding and metrics of fields in evaluation."""

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

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if getattr(dataset, "offsets", None) == "random":  # item i is random already
            return SequentialSampler(dataset)
        return super()._get_train_sampler(train_dataset)

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):  # noqa: ANN001, ANN201
        """Loss, expected ids, labels: by chunks, since all logits of a batch may not fit into memory."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"][:, 1:]
        unwrapped = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():  # the wrapped forward's, which this goes past
            hidden = unwrapped.model(
                input_ids=inputs["input_ids"], prefix_length=inputs["prefix_length"], use_cache=False
            ).last_hidden_state[:, :-1]
            wanted = labels != -100
            target = labels[wanted]
            head = unwrapped.output_head()
            size = max(1, EVALUATION_LOGITS // unwrapped.config.vocab_size)
            losses, expected = [], []
            for chunk, truth in zip(hidden[wanted].split(size), target.split(size), strict=True):
                if isinstance(head, DigitHead):
                    losses.append(-head(chunk, truth).sum())
                    expected.append(head.expectation(chunk))
                    continue
                logits = head(chunk).float()
                losses.append(F.cross_entropy(logits, truth, reduction="sum"))
                ids = torch.arange(logits.shape[-1], device=logits.device, dtype=torch.float64)
                expected.append(logits.softmax(-1, dtype=torch.float64) @ ids)
        loss = torch.stack(losses).sum() / target.numel()
        shape = (labels.shape[0], -1)
        return loss, torch.cat(expected).view(shape), target.view(shape)


class JsonLog(TrainerCallback):
    """Appends every log entry to `log.jsonl`; after a resume, entries beyond the checkpoint are dropped first."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs) -> None:  # noqa: ANN001
        """Keeps the entries up to the step from which training goes on."""
        if state.is_world_process_zero:
            kept = [row for row in self.rows() if row["step"] <= state.global_step] if state.global_step else []
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
            partial.replace(self.path)

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


def reference_scores(validation: Dataset, tokenizer: FieldTokenizer) -> dict[str, float]:
    """What the validation loss and nRMSE are to be held against: marginal entropy (nats) and persistence's nRMSE."""
    half = tokenizer.tokens_per_patch
    pairs = torch.stack([validation[i]["input_ids"] for i in range(len(validation))])
    before, after = pairs[:, :half].numpy(), pairs[:, half:].numpy()
    return {
        "marginal_entropy": marginal_entropy(after),
        "persistence_nrmse": nrmse(before, after, tokenizer),
    }


def nrmse(predicted: np.ndarray, true: np.ndarray, tokenizer: FieldTokenizer) -> float:
    """Root mean square error of ids (which need not be whole), in physical units over the truth's root mean square."""
    value = tokenizer.low + (true + 0.5) * tokenizer.level
    return float(np.sqrt(np.mean(((predicted - true) * tokenizer.level) ** 2) / np.mean(value**2)))


def describe(model: LeviathanForCausalLM, args: TrainingArguments, tokens_per_item: int) -> dict[str, Any]:
    """Parameter counts, tokens and an estimate of the memory of training."""
    embedding = sum(p.numel() for p in model.get_input_embeddings().parameters())
    total = sum(p.numel() for p in model.parameters())  # shared tensors count once
    head = 0 if model.config.tie_word_embeddings else sum(p.numel() for p in model.lm_head.parameters())
    items = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    config = model.config
    # Kept for backward a token and layer: about 8 vectors of the hidden size, 3 of the MLP's, and the attention's
    # inputs; the logits of a chunk, their gradient and their float32 copy.
    token = config.num_hidden_layers * (10 * config.hidden_size + 3 * config.intermediate_size) * 4
    batch_tokens = args.train_batch_size * tokens_per_item
    # Those of a head of digits are as few as the base.
    width = config.vocab_size if config.output_head == "dense" else model.lm_head.base * model.lm_head.num_digits
    logits = min(batch_tokens, config.loss_chunk_size or batch_tokens) * width * 4 * 3
    return {
        "num_parameters": total,
        "embedding_parameters": embedding,
        "head_parameters": head,
        "backbone_parameters": total - embedding - head,
        "tokens_per_step": items * tokens_per_item,
        "total_tokens": items * tokens_per_item * args.max_steps,
        "tokens_per_parameter": items * tokens_per_item * args.max_steps / total,
        "estimated_gib": (16 * total + batch_tokens * token + logits) / 2**30,
    }


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of. Attributes as in transformers.Trainer, `data` the settings of that name."""

    args: TrainingSettings
    data: DataSettings
    fields: FieldFile
    tokenizer: FieldTokenizer
    train: PatchPairs
    validation: Subset
    model: LeviathanForCausalLM


def build_arguments(settings: Settings) -> TrainingSettings:
    """The arguments of transformers' Trainer, checked for what would train something else than asked for.

    Raises:
        ValueError: Without a number of steps, or if processes were launched that do not know of each other.
    """
    options = {"remove_unused_columns": False, "report_to": "none"} | settings["training"]
    if options.get("bf16") == "auto":
        options["bf16"] = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
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
    return args


def build_model(settings: Settings, tokenizer: FieldTokenizer, seed: int) -> LeviathanForCausalLM:
    """The model of the settings for the tokenizer's vocabulary and patch, with initial values from the seed."""
    options = dict(settings["model"])
    attention = options.pop("attn_implementation", None)
    if options.get("embedding_type", "separable") == "separable":
        options["embedding_base"] = tokenizer.base
    config = LeviathanConfig(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=2 * tokenizer.tokens_per_patch, **options
    )
    set_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def build(settings: Settings) -> Parts:
    """Everything that the settings describe."""
    args, data = build_arguments(settings), DataSettings(**settings["data"])
    fields = FieldFile(data.path)
    split = split_trajectories(fields.num_trajectories, tuple(data.fractions), data.split_seed)
    tokenizer = FieldTokenizer(**settings["tokenizer"])
    if tokenizer.low is None:
        tokenizer.fit(
            sample_snapshots(
                fields, split.train, data.num_fit_snapshots, seed=data.split_seed, mirrored=data.symmetries
            )
        )
    options: dict[str, Any] = {"offsets": data.offsets, "stride": data.stride, "seed": args.seed}
    if data.offsets == "random":
        items = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
        options |= {"num_items": items, "symmetries": data.symmetries, "context_noise": data.context_noise}
    train = PatchPairs(fields, split.train, tokenizer, **options)
    pairs = PatchPairs(fields, split.validation, tokenizer, stride=data.stride)
    chosen = np.random.default_rng(data.split_seed).permutation(len(pairs))[: data.num_validation_items]
    model = build_model(settings, tokenizer, args.seed)
    return Parts(args, data, fields, tokenizer, train, Subset(pairs, np.sort(chosen).tolist()), model)


def record_of(settings: Settings, parts: Parts) -> dict[str, Any]:
    """What must not change between the parts of one run: the settings, the processes and the data behind the path."""
    return {"settings": settings, "num_processes": parts.args.world_size, "data": data_record(parts.fields)}


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [d for key in keys for d in _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))]
    return [] if before == now else [name]


def check_resume(output: Path, record: dict[str, Any], resume: bool) -> Path | None:
    """The newest whole checkpoint to go on from, if any; one whose writing was interrupted is deleted.

    Raises:
        ValueError: If the folder holds something that must not be overwritten, or a run with another record.
    """
    written = output / "run.json"
    if not written.exists():
        if (output / "config.json").exists():
            raise ValueError(f"{output} holds a model that is none of ours to overwrite; choose another folder.")
        return None
    if not resume:
        raise ValueError(
            f"{output} holds a run already; go on with --training.resume_from_checkpoint true, or choose another "
            "--training.output_dir."
        )
    if differ := _differences(json.loads(written.read_text()), record):
        raise ValueError(
            f"{output} was trained with other settings or data ({', '.join(differ)}); restore them, delete the "
            "folder or choose another --training.output_dir."
        )
    checkpoints = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]))
    for checkpoint in reversed(checkpoints):
        if (checkpoint / "trainer_state.json").exists():  # the Trainer writes it last
            return checkpoint
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def finish(trainer: FieldTrainer, parts: Parts, report: dict[str, Any], seconds: float, first: int) -> dict[str, Any]:
    """Saves model, tokenizer and `training.json`; returns what the latter holds."""
    args, data, steps = parts.args, parts.data, trainer.state.global_step
    parts.model.config.use_cache = True  # the Trainer turned it off
    trainer.save_model(args.output_dir)
    (Path(args.output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle; training.json says it all
    validation = [
        {"step": row["step"], **{k.removeprefix("eval_"): v for k, v in row.items() if k.startswith("eval_")}}
        for row in trainer.state.log_history
        if "eval_loss" in row
    ]
    # Of this part of the run, if it was resumed; without evaluation.
    seconds -= sum(row["runtime"] for row in validation if row["step"] > first)
    report |= {
        "data": relative(data.path),
        "data_record": data_record(parts.fields),
        "dt_save": parts.fields.dt_save * data.stride,
        "stride": data.stride,
        "split": {"fractions": list(data.fractions), "seed": data.split_seed},
        "steps": steps,
        "resumed_from_step": first,
        "seconds": seconds,
        "tokens_per_second": (steps - first) * report["tokens_per_step"] / seconds if steps > first else None,
        "validation": validation,
        "seed": args.seed,
        "embedding_type": parts.model.config.embedding_type,
        "provenance": provenance(args.seed),
    }
    if trainer.is_world_process_zero():
        write_json(Path(args.output_dir) / "training.json", report)
    return report


def run(settings: Settings, dry_run: bool = False) -> dict[str, Any]:
    """Trains as the settings say, saves model, tokenizer and `training.json`, and returns what the latter holds.

    Raises:
        ValueError: On settings that do not fit each other or the data, or a folder that must not be overwritten.
        OSError: If the data cannot be read.
    """
    if dry_run:
        return plan(settings)
    settings = settings | {"training": dict(settings["training"])}
    # YAML gives a truth value where TrainingArguments expects a path.
    resume = settings["training"].pop("resume_from_checkpoint", False)
    if str(resume).lower() not in ("true", "false"):
        raise ValueError(f"resume_from_checkpoint = {resume!r}; expected true (the newest of output_dir) or false.")
    parts = build(settings)
    args, tokenizer, output = parts.args, parts.tokenizer, Path(parts.args.output_dir)
    record = record_of(settings, parts)
    checkpoint = check_resume(output, record, str(resume).lower() == "true")
    if (output / "training.json").exists():
        print(f"{output}: trained already; delete the folder to train again")
        return json.loads((output / "training.json").read_text())
    trainer = FieldTrainer(
        model=parts.model,
        args=args,
        train_dataset=parts.train,
        eval_dataset=parts.validation,
        data_collator=parts.train.collate,
        processing_class=tokenizer,
        compute_metrics=lambda p: {"nrmse": nrmse(p.predictions, p.label_ids, tokenizer)},
        callbacks=[JsonLog(output / "log.jsonl")],
    )
    if trainer.is_fsdp_enabled:
        raise ValueError("evaluation goes past the sharded root of FSDP; use DDP or DeepSpeed (deepspeed_zero2.yaml).")
    report = describe(parts.model, args, 2 * tokenizer.tokens_per_patch) | reference_scores(parts.validation, tokenizer)
    trainer.accelerator.wait_for_everyone()  # all have looked at the folder before one writes to it
    if trainer.is_world_process_zero():
        write_json(output / "run.json", record)
    first = int(checkpoint.name.split("-")[-1]) if checkpoint else 0
    seconds = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics["train_runtime"]
    return finish(trainer, parts, report, seconds, first)


def plan(settings: Settings) -> dict[str, Any]:
    """Prints what would be trained, without a look at the data, and returns it."""
    settings = settings | {"training": {k: v for k, v in settings["training"].items() if k != "resume_from_checkpoint"}}
    args, tokenizer = build_arguments(settings), FieldTokenizer(**settings["tokenizer"])
    DataSettings(**settings["data"])
    report = describe(build_model(settings, tokenizer, args.seed), args, 2 * tokenizer.tokens_per_patch)
    for name, value in report.items():
        print(f"{name:>24} {value:,.2f}" if isinstance(value, float) else f"{name:>24} {value:,}")
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    known, settings = parse_arguments(__doc__.splitlines()[0], allowed_keys(), arguments)
    try:
        run(settings, dry_run=known.dry_run)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
