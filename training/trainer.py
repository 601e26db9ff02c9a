"""The loop: transformers' Trainer, with what fields and text share, and what it takes to survive."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from training.checkpoints import PARTIAL, PREFIX, clear_partial, list_checkpoints, publish, rotate, sync
from training.launching import check_joined, keep_loss_exact, prepare_backend, prepare_sharding
from training.provenance import write_text
from training.settings import Settings

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # what a full disk makes of Python, torch and safetensors


@dataclasses.dataclass
class TrainingSettings(TrainingArguments):
    """The `training` section: transformers' arguments and the following.

    `bf16: auto` is bfloat16 where there is a GPU that has it.

    Attributes:
        embedding_learning_rate: Peak learning rate of the embedding's parameters; None is `learning_rate`. They are
            never decayed: the splines live near one, and pulled to zero their product vanishes.
        sequences_per_step: Items of a step, of all processes together; `gradient_accumulation_steps` is then what makes
            up for their number. None leaves that to be given.
        max_nonfinite_steps: Steps in a row whose loss or gradient is not finite after which the run stops. Each is
            skipped: parameters and optimizer stay as they are, and the schedule of the learning rate goes on. Now and
            then a step may be skipped (they are counted); in a row, the model is where no batch has a finite loss.
    """

    embedding_learning_rate: float | None = None
    sequences_per_step: int | None = None
    max_nonfinite_steps: int = 10


def build_arguments(settings: Settings) -> TrainingSettings:
    """The arguments of transformers' Trainer, checked for what would train something else than asked for.

    Raises:
        ValueError: Without a number of steps, if processes were launched that do not know of each other, or if items of
            a step cannot be shared out evenly.
    """
    options = {"remove_unused_columns": False, "report_to": "none"} | settings["training"]
    if options.get("bf16") == "auto":
        options["bf16"] = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if options.get("deepspeed"):
        raise ValueError(
            "training.deepspeed: sharding is the launcher's; leave it out, and launch with accelerate launch "
            "--config_file training/configs/deepspeed_zero2.yaml."
        )
    prepare_backend()
    args = TrainingSettings(**options)
    if args.max_steps < 1:
        raise ValueError(f"training.max_steps = {args.max_steps}; give the number of optimizer steps.")
    if args.save_only_model:
        raise ValueError("training.save_only_model leaves checkpoints from which training cannot go on; leave it out.")
    if args.save_on_each_node:
        raise ValueError("training.save_on_each_node: a checkpoint is one folder that all processes see; leave it out.")
    if args.enable_jit_checkpoint:
        raise ValueError("training.enable_jit_checkpoint: SIGTERM ends a run with a checkpoint anyway; leave it out.")
    for name in ("eval_strategy", "logging_strategy", "save_strategy"):
        if getattr(args, name) == "epoch":
            raise ValueError(f"training.{name} = 'epoch': a run is one epoch, of max_steps steps; give steps or no.")
    if args.max_nonfinite_steps < 1:
        raise ValueError(f"training.max_nonfinite_steps = {args.max_nonfinite_steps}; expected 1 step or more.")
    check_joined(args.world_size, "pass --training.use_cpu true")
    prepare_sharding(args.distributed_state)
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
    """transformers' Trainer with a learning rate for the embedding, whole checkpoints and steps that may be skipped.

    A checkpoint is written as `training.checkpoints` says, and holds `loop-R.json` for each process R beside what
    transformers writes: what the log has not told yet of the loss, and the steps skipped.

    A step whose loss (of any process and accumulated batch) or gradient norm is not finite is skipped by dropping its
    gradients. DeepSpeed takes its step within the backward pass, before anything can be seen: there such a loss stops
    the run at once. Under fp16 a gradient that overflows is left to the scaler, which looks for its factor that way.

    transformers' enable_jit_checkpoint is not used: it saves, after seconds of waiting in a thread, between the reading
    of a batch and its step, in each process on its own, and ends as if the run were done.

    Attributes:
        record: What tells this run from others, for the manifests of its checkpoints.
        asked_to_end: Whether this process was told to end; all do after the step, with a checkpoint.
        ended: Whether the run ended for that.
        steps_skipped: Since the run began.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # It imports DeepSpeed where that is installed, which draws random numbers: in the middle of a run otherwise.
        self.accelerator.unwrap_model(self.model)
        set_seed(self.args.seed)
        if self.is_fsdp_enabled:
            keep_loss_exact(self.accelerator.state.fsdp_plugin)
        self.record: dict[str, Any] = {}
        self.asked_to_end = self.ended = False
        self.steps_skipped = 0
        self._nonfinite_in_a_row = 0
        self._batches: list[dict[str, Any]] = []  # of the step at hand
        self._step_was_skipped = self._ends_after_step = self._is_staging = False
        self._step_of_checkpoint: int | None = None  # the last that this process wrote
        self._loop_state: dict[str, Any] | None = None

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

    def get_train_dataloader(self) -> DataLoader:
        """As in transformers; its workers outlive a SIGTERM to all processes of the run."""
        return heedless_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """As in transformers; its workers outlive a SIGTERM to all processes of the run."""
        return heedless_workers(super().get_eval_dataloader(*args, **kwargs))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers; leaves the random numbers of training as they are.

        A loader draws one when its workers start: at each evaluation, or at the first alone if they persist, and after
        a resume that is another.
        """
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers; looks whether the loss is finite."""
        if not self._batches:
            self._loss_before, self._is_finite = self._tr_loss.clone(), torch.tensor(True, device=self.args.device)
        self._batches.append(dict(inputs))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._is_finite &= loss.isfinite()
        return loss

    def compute_loss(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; under DeepSpeed, which steps in the backward pass, it has to be finite."""
        output = super().compute_loss(model, *args, **kwargs)
        if self.is_deepspeed_enabled and model.training:
            (nonfinite,) = self._agreed(not bool(output.isfinite()))
            if nonfinite:
                self._stop_nonfinite()
        return output

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """As in transformers, once a step and before the optimizer's; skips the step if it must be."""
        norm = super()._get_grad_norm(model, grad_norm)
        if hasattr(norm, "full_tensor"):  # of shards
            norm = norm.full_tensor()
        norm_counts = norm is not None and self.accelerator.scaler is None
        nonfinite = not bool(self._is_finite) or (norm_counts and not math.isfinite(norm))
        nonfinite, self._ends_after_step = self._agreed(nonfinite, self.asked_to_end)
        if nonfinite:
            norm = None
            self._skip_step(model)
        else:
            self._nonfinite_in_a_row = 0
        self._batches.clear()
        return norm

    def _skip_step(self, model: torch.nn.Module) -> None:
        self.steps_skipped += 1
        self._nonfinite_in_a_row += 1
        if self._nonfinite_in_a_row >= self.args.max_nonfinite_steps or self.is_deepspeed_enabled:
            self._stop_nonfinite()
        model.zero_grad(set_to_none=True)  # the optimizer passes over a parameter without a gradient
        self._step_was_skipped = True
        self._tr_loss.copy_(self._loss_before)
        self._globalstep_last_logged += 1  # the log has the mean over the steps that were taken

    def _stop_nonfinite(self) -> None:
        step, output = self.state.global_step + 1, Path(self.args.output_dir)
        several = self.args.world_size > 1
        path = output / f"nonfinite-step-{step}{f'-{self.args.process_index}' if several else ''}.safetensors"
        save_batches(path, self._batches, {"step": str(step), "process": str(self.args.process_index)})
        last = next((f"; the last checkpoint is {c.name}" for c in list_checkpoints(output)), "")
        raise ValueError(
            f"the loss or the gradient of step {step} is not finite, {max(1, self._nonfinite_in_a_row)} in a row "
            f"(training.max_nonfinite_steps = {self.args.max_nonfinite_steps}). Its batch is in {path}{last}. Look at "
            "the data, lower training.learning_rate or training.max_grad_norm, and train into another folder."
        )

    def _agreed(self, *flags: bool) -> list[bool]:
        """Each flag, set if any process has set it."""
        if self.args.world_size == 1:
            return list(flags)
        total = self.accelerator.reduce(torch.tensor(flags, dtype=torch.float32, device=self.args.device))
        return (total > 0).tolist()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; what it loads is loaded without pickle's code, under DeepSpeed too."""
        with weights_alone() if self.is_deepspeed_enabled else contextlib.nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, which would take a step more where the last checkpoint is that of the last step."""
        if self._loop_state is not None:
            self._tr_loss.fill_(self._loop_state["loss"])
            self._globalstep_last_logged = self._loop_state["last_logged"]
            self._loop_state = None
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: torch.nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers; logs a step that was skipped, and ends if it is to."""
        if self._step_was_skipped:
            self._step_was_skipped = False
            self.log({"steps_skipped": self.steps_skipped})
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if self._ends_after_step and not self.ended and self.state.global_step < self.state.max_steps:
            if self._step_of_checkpoint != self.state.global_step:
                self._save_checkpoint(model, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self.ended = self.control.should_training_stop = True

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / PARTIAL) if self._is_staging else folder

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As in transformers, whole or not at all.

        Raises:
            OSError: If it cannot be written, as on a full disk; the checkpoints before it stay.
        """
        output = Path(self.args.output_dir)
        staged = output / PARTIAL / f"{PREFIX}{self.state.global_step}"
        self._is_staging = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(output / staged.name)  # on all processes
            if self.args.should_save:
                self._complete(staged)
                publish(staged, self.record)
        except WRITE_ERRORS as error:
            raise self._not_written(output / staged.name, error) from error
        finally:
            self._is_staging = False
        self._step_of_checkpoint = self.state.global_step
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(output / staged.name))
        self.rotate_checkpoints()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which at a limit of one would delete the newest checkpoint if another is the best."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def rotate_checkpoints(self) -> None:
        """Deletes the oldest checkpoints beyond save_total_limit."""
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(Path(self.args.output_dir), self.args.save_total_limit, Path(best) if best else None)

    def _not_written(self, path: Path, error: Exception) -> OSError:
        """Deletes what was half-written of a checkpoint or a model, and says so."""
        output = Path(self.args.output_dir)
        clear_partial(output)
        last = next((f"the last checkpoint is {c.name}" for c in list_checkpoints(output)), "there is no checkpoint")
        free = shutil.disk_usage(output).free / 2**20
        return OSError(
            f"{path} could not be written: {error}. What there was of it is deleted, {last}, and {free:,.0f} MiB are "
            "free. Make room, and go on with --training.resume_from_checkpoint true."
        )

    def _complete(self, staged: Path) -> None:
        """Sees that the files of all processes are there, and writes the name that the best checkpoint will have."""
        written, expected = len(list(staged.glob("loop-*.json"))), self.args.world_size
        if written != expected:
            raise OSError(f"it has the state of {written} of {expected} processes: all have to see the same folder")
        self.state.save_to_json(str(staged / "trainer_state.json"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Later, when the folder has its name."""

    def _save_rng_state(self, output_dir: str) -> None:  # of each process
        super()._save_rng_state(output_dir)
        state = {"loss": self._tr_loss.item(), "last_logged": self._globalstep_last_logged}
        state |= {"steps_skipped": self.steps_skipped, "nonfinite_in_a_row": self._nonfinite_in_a_row}
        write_text(self._loop_file(Path(output_dir)), json.dumps(state))

    def _loop_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"loop-{self.args.process_index}.json"

    def resume_data(self, checkpoint: Path) -> None:
        """What must be told to the loop and its data before training goes on from a checkpoint."""
        self._loop_state = json.loads(self._loop_file(checkpoint).read_text(encoding="utf-8"))
        self.steps_skipped = self._loop_state["steps_skipped"]
        self._nonfinite_in_a_row = self._loop_state["nonfinite_in_a_row"]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in transformers, each file whole or not at all, and without the pickle of the arguments."""
        output = Path(output_dir or self.args.output_dir)
        staged = output / PARTIAL
        try:
            super()._save(str(staged), state_dict)
        except WRITE_ERRORS as error:
            if self._is_staging:
                raise
            raise self._not_written(output, error) from error
        if self.args.should_save:
            (staged / "training_args.bin").unlink(missing_ok=True)
            for path in sorted(path for path in staged.rglob("*") if path.is_file()):
                sync(path)
                target = output / path.relative_to(staged)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
            shutil.rmtree(staged)

    def report(self) -> dict[str, Any]:
        """What the loop adds to `training.json`."""
        return {"steps_skipped": self.steps_skipped}


@contextlib.contextmanager
def ending_on_termination(trainer: LeviathanTrainer) -> Iterator[None]:
    """Within, SIGTERM lets the trainer finish its step, write a checkpoint and end; schedulers send it before SIGKILL.

    Without effect outside of the main thread, where Python handles no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(*_: Any) -> None:
        trainer.asked_to_end = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def weights_alone() -> Iterator[None]:
    """Within, torch.load runs no code of a pickle, though DeepSpeed asks it to; plain classes of its own pass."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def heedless_workers(loader: DataLoader) -> DataLoader:
    """The loader, whose workers do not end on SIGTERM: a scheduler sends it to all processes at once, and the step at
    hand still needs them. They end with the process that started them.
    """
    loader.worker_init_fn = functools.partial(_start_heedless, loader.worker_init_fn)
    return loader


def _start_heedless(start: Callable[[int], None] | None, worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if start is not None:
        start(worker)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes safetensors whole or not at all.

    Raises:
        OSError: If they cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata)
        partial.replace(path)
    except WRITE_ERRORS as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from error


def save_batches(path: Path, batches: list[dict[str, Any]], metadata: dict[str, str]) -> None:
    """Writes the inputs of a step as `I.NAME`, I the place in the accumulation."""
    tensors = {
        f"{index}.{name}": torch.as_tensor(value).detach().cpu().clone().contiguous()
        for index, batch in enumerate(batches)
        for name, value in batch.items()
        if isinstance(value, Tensor | int | float)
    }
    write_tensors(path, tensors, metadata)


class JsonLog(TrainerCallback):
    """Appends every log entry to `log.jsonl`; after a resume, begins with those that the checkpoint knows of."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs) -> None:  # noqa: ANN001
        """Writes the entries up to the step from which training goes on."""
        if state.is_world_process_zero:
            write_text(self.path, "".join(self.line(row["step"], row) for row in state.log_history))

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # noqa: ANN001
        """Writes one entry."""
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self.line(state.global_step, logs))

    @staticmethod
    def line(step: int, logs: dict[str, Any]) -> str:
        """An entry; its keys are sorted, as those of a checkpoint's are."""
        return json.dumps({"step": step} | {name: logs[name] for name in sorted(logs) if name != "step"}) + "\n"


def marginal_entropy(ids: np.ndarray) -> float:
    """Entropy in nats of the distribution of ``ids``: the least loss of a model that looks at nothing."""
    counts = np.unique(ids, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())
