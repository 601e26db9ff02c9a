"""Fields as a task of training: pairs of patches, learned as the next state of a flow."""

import dataclasses
import inspect
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, SequentialSampler, Subset

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


class FieldTrainer(LeviathanTrainer):
    """The loop with metrics of fields in evaluation."""

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
            items = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
            options |= {"num_items": items, "symmetries": data.symmetries, "context_noise": data.context_noise}
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
