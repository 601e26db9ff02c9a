"""Fields as a task of training: pairs of patches, learned as the next state of a flow."""

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler, SequentialSampler, Subset

from leviathan import FieldTokenizer, LeviathanForCausalLM
from sna_core import DigitHead
from training.fields import FieldFile, PatchPairs, data_record, sample_snapshots, split_trajectories
from training.leviathan_model import MODEL_KEYS, build_leviathan, describe_leviathan
from training.provenance import relative
from training.settings import Settings
from training.trainer import LeviathanTrainer, TrainingSettings, marginal_entropy

EVALUATION_LOGITS = 2**24  # logits that exist at one time during evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class FieldSettings:
    """The `data` section of a run on fields.

    Attributes:
        kind: Of the run.
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

    kind: Literal["fields"] = "fields"
    path: str
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    split_seed: int = 0
    offsets: Literal["grid", "random"] = "grid"
    symmetries: bool = False
    stride: int = 1
    context_noise: float = 0.0
    num_fit_snapshots: int = 1024
    num_validation_items: int = 512


class ShuffledEpochs(Sampler[int]):
    """The first `num_samples` indices of epochs laid end to end, each a permutation of `num_items` by (seed, epoch).

    A step that begins in one epoch ends in the next. So all steps are of one size, and processes that take a part of
    each see together what one process sees; where epochs end with a step, those of several processes would be filled
    up with items that were seen already.
    """

    def __init__(self, num_items: int, num_samples: int, seed: int):
        self.num_items, self.num_samples, self.seed = num_items, num_samples, seed

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        for epoch in range(-(-self.num_samples // self.num_items)):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_items)
            yield from order[: self.num_samples - epoch * self.num_items].tolist()


def num_training_items(args: TrainingSettings) -> int:
    """Items of all steps and processes, as often as they come."""
    return args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size


class FieldTrainer(LeviathanTrainer):
    """The loop with metrics of fields in evaluation."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset.offsets == "random":  # item i is random already
            return SequentialSampler(dataset)
        return ShuffledEpochs(len(dataset), num_training_items(self.args), self.args.seed)

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):  # noqa: ANN001, ANN201
        """Loss, expected ids, labels: by chunks, since all logits of a batch may not fit into memory.

        The head scores them as soon as the backbone has run, within the wrapped model's forward: it is there that the
        parameters of a sharded model are whole.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"][:, 1:]
        wanted = labels != -100
        target = labels[wanted]
        unwrapped, scored = self.accelerator.unwrap_model(model), []

        def score(backbone: torch.nn.Module, args: tuple, output: Any) -> None:
            scored.append(score_ids(unwrapped, output.last_hidden_state[:, :-1][wanted], target))

        handle = unwrapped.model.register_forward_hook(score)
        try:
            # A compiled forward would not see the hook.
            with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                ids, prefix = inputs["input_ids"], inputs["prefix_length"]
                model(input_ids=ids, prefix_length=prefix, use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()
        ((loss, expected),) = scored
        shape = (labels.shape[0], -1)
        return loss, expected.view(shape), target.view(shape)


def score_ids(model: LeviathanForCausalLM, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy (nats) of the ids `target` (n,), and expected ids (n,) float64, of hidden states (n, D).

    At no time do more than `EVALUATION_LOGITS` logits exist.
    """
    head = model.output_head()
    size = max(1, EVALUATION_LOGITS // model.config.vocab_size)
    losses, expected = [], []
    for chunk, truth in zip(hidden.split(size), target.split(size), strict=True):
        if isinstance(head, DigitHead):
            losses.append(-head(chunk, truth).sum())
            expected.append(head.expectation(chunk))
            continue
        logits = head(chunk).float()
        losses.append(F.cross_entropy(logits, truth, reduction="sum"))
        ids = torch.arange(logits.shape[-1], device=logits.device, dtype=torch.float64)
        expected.append(logits.softmax(-1, dtype=torch.float64) @ ids)
    return torch.stack(losses).sum() / target.numel(), torch.cat(expected)


def reference_scores(validation: Dataset, tokenizer: FieldTokenizer) -> dict[str, float]:
    """What the validation loss and nRMSE are to be held against: marginal entropy (nats) and persistence's nRMSE."""
    pairs = torch.stack([validation[i]["input_ids"] for i in range(len(validation))]).numpy()
    before, after = pairs[:, tokenizer.centre()], pairs[:, tokenizer.tokens_per_prefix :]
    return {
        "marginal_entropy": marginal_entropy(after),
        "persistence_nrmse": nrmse(before, after, tokenizer),
    }


def nrmse(predicted: np.ndarray, true: np.ndarray, tokenizer: FieldTokenizer) -> float:
    """Root mean square error of ids (which need not be whole), in physical units over the truth's root mean square."""
    value = tokenizer.low + (true + 0.5) * tokenizer.level
    return float(np.sqrt(np.mean(((predicted - true) * tokenizer.level) ** 2) / np.mean(value**2)))


class FieldTask:
    """What `training.train` trains on, made from the sections `data` and `tokenizer`.

    Attributes:
        tokenizer: The `FieldTokenizer`; its range is fitted by :meth:`open` if the settings leave it open.
        train, validation: The items, once opened.
        tokens_per_item: Tokens of an item.
        trainer_class: The loop.
        unit: What steps are counted in.
    """

    trainer_class = FieldTrainer
    unit = "tokens"

    def __init__(self, settings: Settings, args: TrainingSettings):
        self.data, self.args = FieldSettings(**settings["data"]), args
        self.tokenizer = FieldTokenizer(**settings["tokenizer"])
        self.tokens_per_item = self.tokenizer.tokens_per_prefix + self.tokenizer.tokens_per_patch

    @staticmethod
    def allowed_keys() -> dict[str, list[str]]:
        """The keys of this task's sections; those of the model that the tokenizer decides are not among them."""
        parameters = inspect.signature(FieldTokenizer).parameters
        derived = {"vocab_size", "max_position_embeddings", "embedding_base", "embedding_num_digits"}
        derived |= {"patch_size", "patch_margin"}
        return {
            "data": [f.name for f in dataclasses.fields(FieldSettings)],
            "tokenizer": [name for name, p in parameters.items() if p.kind != p.VAR_KEYWORD],
            "model": [name for name in MODEL_KEYS if name not in derived],
        }

    def model_options(self, given: dict[str, Any]) -> dict[str, Any]:
        """The model's settings that were ``given``, and those that the tokenizer decides."""
        sizes = {"vocab_size": self.tokenizer.vocab_size, "max_position_embeddings": self.tokens_per_item}
        if given.get("embedding_type", "separable") in ("separable", "codebook"):
            sizes["embedding_base"] = self.tokenizer.base
        if given.get("position_layout") == "window":
            if self.tokenizer.order != "raster":
                raise ValueError(f"position_layout = 'window' needs order = 'raster', not {self.tokenizer.order!r}.")
            sizes |= {"patch_size": self.tokenizer.patch_size, "patch_margin": self.tokenizer.margin}
        return given | sizes

    def build_model(self, given: dict[str, Any]) -> LeviathanForCausalLM:
        """A new model of the settings that were ``given``."""
        return build_leviathan(self.model_options(given))

    def describe(self, model: LeviathanForCausalLM) -> dict[str, Any]:
        """Sizes of the model and of what it learns from."""
        return describe_leviathan(model, self.args, self.tokens_per_item)

    def open(self) -> None:
        """Reads what the data needs to be read for: range of the quantiser, training and validation pairs."""
        data, args = self.data, self.args
        self.fields = FieldFile(data.path)
        split = split_trajectories(self.fields.num_trajectories, tuple(data.fractions), data.split_seed)
        if self.tokenizer.low is None:
            chosen = (split.train, data.num_fit_snapshots)
            self.tokenizer.fit(sample_snapshots(self.fields, *chosen, seed=data.split_seed, mirrored=data.symmetries))
        options: dict[str, Any] = {"offsets": data.offsets, "stride": data.stride, "seed": args.seed}
        if data.offsets == "random":
            options["num_items"] = num_training_items(args)
            options |= {"symmetries": data.symmetries, "context_noise": data.context_noise}
        self.train = PatchPairs(self.fields, split.train, self.tokenizer, **options)
        pairs = PatchPairs(self.fields, split.validation, self.tokenizer, stride=data.stride)
        order = np.random.default_rng(data.split_seed).permutation(len(pairs))
        self.validation = Subset(pairs, np.sort(order[: data.num_validation_items]).tolist())

    def prepare(self, model: LeviathanForCausalLM) -> None:
        """Fields need nothing of a new model: their ids are ordered already."""

    def trainer_options(self) -> dict[str, Any]:
        """Arguments of the loop beside model, data and callbacks."""
        tokenizer = self.tokenizer
        return {
            "data_collator": self.train.collate,
            "compute_metrics": lambda p: {"nrmse": nrmse(p.predictions, p.label_ids, tokenizer)},
        }

    def record(self) -> dict[str, Any]:
        """What tells the data behind the path from other data, for JSON."""
        return data_record(self.fields)

    def references(self) -> dict[str, float]:
        """What validation is to be held against."""
        return reference_scores(self.validation, self.tokenizer)

    def report(self) -> dict[str, Any]:
        """What `training.json` says of the data."""
        data = self.data
        return {
            "data": relative(data.path),
            "data_record": self.record(),
            "dt_save": self.fields.dt_save * data.stride,
            "stride": data.stride,
            "split": {"fractions": list(data.fractions), "seed": data.split_seed},
        }
