"""Operators as a task of training: the same pairs of patches that models of tokens learn from, as real numbers."""

import copy
import dataclasses
import inspect
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.training_args import OptimizerNames

from leviathan import FieldTokenizer
from training.field_task import FieldSettings, FieldTask, FieldTrainer
from training.fields import FieldFile, PatchPairs
from training.operators import FieldOperator, OperatorConfig, count_parameters, fit_width
from training.settings import Settings
from training.trainer import TrainingSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperatorSettings(FieldSettings):
    """The `data` section of a run of an operator: that of fields, but noise is added to real numbers.

    Attributes:
        input_noise: Noise on prior states in training, in standard deviations of the data: item i draws a standard
            deviation from 0 to this, and adds such noise to its prior state. A free rollout reads its own errors.
        pushforward: Whether, with probability one half, the prior state in training is the model's own prediction from
            the state before it (Brandstetter et al., 2022, arXiv 2202.03376). No gradient goes through it.
    """

    kind: Literal["operators"] = "operators"
    input_noise: float = 0.0
    pushforward: bool = False


@dataclasses.dataclass(frozen=True)
class EarlierFields:
    """A file in which every snapshot is the one ``delay`` before it, and not a number where there is none."""

    fields: FieldFile
    delay: int

    @property
    def grid(self) -> tuple[int, int]:
        """(X, Y)."""
        return self.fields.grid

    def snapshot(self, trajectory: int, snapshot: int) -> np.ndarray:
        """The vorticity (X, Y) of the earlier snapshot, in 1 / time."""
        if snapshot < self.delay:
            return np.full(self.grid, np.nan, np.float32)
        return self.fields.snapshot(trajectory, snapshot - self.delay)


class OperatorPairs(Dataset):
    """The patches of `PatchPairs` as real numbers, in the field's unit; item i is its item i.

    Item: `fields` (W, W), the prior state with the margin, W = P + 2 margin; `next_fields` (P, P). With ``pushforward``
    also `earlier_fields` (W, W), the state ``stride`` before, and `pushed`, whether it is to be used: never at the
    start of a trajectory, where there is none.

    Args:
        pairs: The pairs.
        noise: Greatest standard deviation of noise on `fields`, in the field's unit. Both it and the choice of
            `pushed` come from a generator seeded by (seed, i) alone.
        pushforward: See above.
    """

    def __init__(self, pairs: PatchPairs, noise: float = 0.0, pushforward: bool = False):
        self.pairs, self.noise, self.offsets = pairs, noise, pairs.offsets
        self.earlier = None
        if pushforward:  # the same items of a file that lags behind
            self.earlier = copy.copy(pairs)
            self.earlier.fields = EarlierFields(pairs.fields, pairs.stride)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index, tokenizer = int(index), self.pairs.tokenizer
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} does not exist; there are {len(self)}")
        prior, following = torch.from_numpy(np.ascontiguousarray(self.pairs.patches(index)))
        inside = slice(tokenizer.margin, tokenizer.margin + tokenizer.patch_size)
        item = {"fields": prior, "next_fields": following[inside, inside]}
        generator = np.random.default_rng((self.pairs.seed, index, 2))  # another stream than those of the pairs
        if self.earlier is not None:
            earlier = torch.from_numpy(np.ascontiguousarray(self.earlier.patches(index)[0]))
            exists = bool(earlier.isfinite().all())
            item["earlier_fields"] = earlier if exists else prior
            item["pushed"] = torch.tensor(exists and generator.random() < 0.5)
        if self.noise:
            values = generator.normal(scale=generator.uniform(0, self.noise), size=prior.shape)
            item["fields"] = prior + torch.from_numpy(values.astype(np.float32))
        return item


class OperatorTrainer(FieldTrainer):
    """The loop with AdamW on all parameters alike, pushforward and, in evaluation, predictions.

    Raises:
        ValueError: If the launcher shards parameters, which are not whole where predictions are made.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "an operator is not trained with sharded parameters; launch it with training/configs/multi_gpu.yaml, "
                "or on CPUs with multi_cpu.yaml."
            )
        set_seed(self.args.seed, device_specific=True)  # or else all processes would diffuse with the same noise

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers: there is no embedding to treat otherwise."""
        return Trainer.create_optimizer(self, model)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers, from the model's own predictions where the items say so."""
        inputs = self._prepare_inputs(inputs)
        if "pushed" in inputs:
            pushed, earlier = inputs.pop("pushed"), inputs.pop("earlier_fields")
            if pushed.any():
                predicted = self.accelerator.unwrap_model(model).predict(earlier[pushed])
                inputs["fields"] = inputs["fields"].index_put((pushed,), predicted)
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with the same noise in every evaluation."""
        self.generator = torch.Generator().manual_seed(0)
        return super().evaluation_loop(*args, **kwargs)

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):  # noqa: ANN001, ANN201
        """Loss, predicted and true next states."""
        inputs = self._prepare_inputs(inputs)
        operator = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():  # the wrapped forward's, which this goes past
            output = operator(**inputs, generator=self.generator)
            prediction = output.prediction
            if prediction is None:
                prediction = operator.predict(inputs["fields"], self.generator)
        return output.loss, prediction, inputs["next_fields"]


def field_nrmse(predicted: np.ndarray, true: np.ndarray) -> float:
    """Root mean square error over the truth's root mean square, of fields of any shape in one unit."""
    return float(np.sqrt(np.mean((predicted - true) ** 2) / np.mean(true**2)))


class OperatorTask(FieldTask):
    """What `training.train` trains an operator on: the split, pairs and range of the fields' task.

    The section `model` has the settings of `OperatorConfig` that the data do not decide, and `num_parameters`: a width
    is then sought that gives the model so many.
    """

    trainer_class = OperatorTrainer
    unit = "pairs"

    def __init__(self, settings: Settings, args: TrainingSettings):
        self.data, self.args = OperatorSettings(**settings["data"]), args
        self.tokenizer = FieldTokenizer(**settings["tokenizer"])
        self.periodic = False  # unless the data say so
        if args.optim == OptimizerNames.ADAMW_TORCH_FUSED:  # which has no complex parameters, and an FNO has
            args.optim = OptimizerNames.ADAMW_TORCH
        if args.embedding_learning_rate is not None:
            raise ValueError("training.embedding_learning_rate: an operator has no embedding; give learning_rate.")
        if not 0 <= self.data.input_noise < float("inf"):
            raise ValueError(f"data.input_noise = {self.data.input_noise}; expected standard deviations, 0 or more.")
        if self.data.offsets == "grid" and (self.data.input_noise or self.data.pushforward):
            raise ValueError(
                "data.input_noise and data.pushforward go with data.offsets 'random' only: an item of the grid comes "
                "again in every epoch, and would with the same noise."
            )
        if self.data.pushforward and self.tokenizer.margin:
            raise ValueError(
                f"data.pushforward predicts the patch alone, and a margin of {self.tokenizer.margin} has to be read "
                "with it; use data.input_noise."
            )

    @staticmethod
    def allowed_keys() -> dict[str, list[str]]:
        """The keys of this task's sections."""
        derived = {"patch_size", "margin", "periodic", "mean", "std"}
        sizes = [name for name in inspect.get_annotations(OperatorConfig) if name not in derived]
        return {
            "data": [f.name for f in dataclasses.fields(OperatorSettings) if f.name != "context_noise"],
            "tokenizer": ["patch_size", "margin"],
            "model": [*sizes, "num_parameters"],
        }

    def model_options(self, given: dict[str, Any]) -> dict[str, Any]:
        """The model's settings that were ``given``, and those that the data decide.

        The mean is left at 0: it is that of the vorticity of any periodic field.
        """
        patch = {"patch_size": self.tokenizer.patch_size, "margin": self.tokenizer.margin, "periodic": self.periodic}
        return given | patch | ({} if self.tokenizer.rms is None else {"std": self.tokenizer.rms})

    def build_model(self, given: dict[str, Any]) -> FieldOperator:
        """A new model of the settings that were ``given``.

        Raises:
            ValueError: If they do not fit each other, or no model has the number of parameters that they ask for.
        """
        options = self.model_options(given)
        num_parameters = options.pop("num_parameters", None)
        if decided := [name for name in ("width", "bottom_width") if num_parameters is not None and name in options]:
            raise ValueError(f"model.num_parameters decides model.{decided[0]}; leave one of them out.")
        config = OperatorConfig(**options)
        if self.data.pushforward and config.architecture == "diffusion":
            raise ValueError("data.pushforward is for deterministic operators; leave it out for a diffusion.")
        return FieldOperator(config if num_parameters is None else fit_width(config, num_parameters))

    def describe(self, model: FieldOperator) -> dict[str, Any]:
        """Sizes of the model and of what it learns from."""
        args, config = self.args, model.config
        pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        sizes = {"width": config.width, "bottom_width": config.bottom_width, "num_modes": config.num_modes}
        return {
            "architecture": config.architecture,
            "num_parameters": count_parameters(model),
            "num_layers": config.num_layers,
            **{name: size for name, size in sizes.items() if size is not None},
            "pairs_per_step": pairs,
            "total_pairs": pairs * args.max_steps,
        }

    def open(self) -> None:
        """Reads what the data needs to be read for: normalisation, training and validation pairs."""
        super().open()
        data, pairs = self.data, self.validation.dataset
        self.periodic = self.fields.grid == (self.tokenizer.patch_size,) * 2
        self.train = OperatorPairs(self.train, data.input_noise * self.tokenizer.rms, data.pushforward)
        self.validation = Subset(OperatorPairs(pairs), self.validation.indices)

    def trainer_options(self) -> dict[str, Any]:
        """Arguments of the loop beside model, data and callbacks."""
        return {
            "data_collator": default_collate,
            "compute_metrics": lambda p: {"nrmse": field_nrmse(p.predictions, p.label_ids)},
        }

    def references(self) -> dict[str, float]:
        """What validation is to be held against: the nRMSE of persistence."""
        items = default_collate([self.validation[i] for i in range(len(self.validation))])
        margin, size = self.tokenizer.margin, self.tokenizer.patch_size
        inside = slice(margin, margin + size)
        before = items["fields"][:, inside, inside]
        return {"persistence_nrmse": field_nrmse(before.numpy(), items["next_fields"].numpy())}
