"""Text as a task of training: a stream of packed sequences, learned token by token."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from leviathan import LeviathanForCausalLM
from sna_core.digit_embedding import DigitEmbedding
from training.leviathan_model import MODEL_KEYS, build_leviathan, describe_leviathan
from training.provenance import relative, write_text
from training.settings import Settings
from training.text import TextSettings, TextStream, validation_sequences
from training.token_order import load_order
from training.tokenizer import load_tokenizer, num_ids
from training.trainer import LeviathanTrainer, TrainingSettings, heedless_workers, marginal_entropy, write_tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """The `tokenizer` section of a run on text.

    Attributes:
        path: A tokenizer: a folder, a name on the Hub, or `o200k_base`; see `training.tokenizer.load_tokenizer`.
        order: File of `training.token_order`: which digits stand for which token. None takes the ids as they are.
        start: What the embedding starts from: `"random"` numbers, or the `"factors"` of that file, to which codebooks
            come near and which tables are.
    """

    path: str
    order: str | None = None
    start: Literal["random", "factors"] = "random"


def stream_loader(stream: TextStream, args: TrainingSettings) -> DataLoader:
    """The batches that a process takes from its share of the text."""
    return DataLoader(
        stream,
        batch_size=args.per_device_train_batch_size,
        collate_fn=stream.collate,
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        pin_memory=args.dataloader_pin_memory,
    )


class TextTrainer(LeviathanTrainer):
    """The loop on a stream that is shared out among processes and workers by itself.

    A checkpoint holds, for each process, where its stream stands and how often each id was a target.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.counts = torch.zeros(self.model.config.vocab_size, dtype=torch.int64)
        self.seconds_waited = 0.0
        self._random_state_of: Path | None = None  # a checkpoint

    def get_train_dataloader(self) -> DataLoader:
        """A plain loader: one prepared by accelerate would thin out a share once more."""
        return heedless_workers(stream_loader(self.train_dataset, self.args))

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As in transformers; measures the wait."""
        begin = time.perf_counter()
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.seconds_waited += time.perf_counter() - begin
        if self._random_state_of is not None:  # restored before, but a loader that starts draws a number
            self._load_rng_state(str(self._random_state_of))
            self._random_state_of = None
        return batches

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers; keeps account of what was read."""
        self.train_dataset.record(inputs.pop("stream"))
        targets = inputs["labels"][:, 1:]
        self.counts += targets[targets != -100].bincount(minlength=len(self.counts)).cpu()
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with the perplexity exp(loss)."""
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_perplexity"] = float(torch.tensor(output.metrics[f"{prefix}_loss"]).exp())
        return output

    def _save_rng_state(self, output_dir: str) -> None:  # of each process
        super()._save_rng_state(output_dir)
        stream, counts = _state_files(Path(output_dir), self.args.process_index)
        write_text(stream, json.dumps(self.train_dataset.state_dict()))
        write_tensors(counts, {"counts": self.counts})

    def resume_data(self, checkpoint: Path) -> None:
        """Goes on where this process stood.

        Raises:
            ValueError: If the checkpoint has no such place.
        """
        super().resume_data(checkpoint)
        stream, counts = _state_files(checkpoint, self.args.process_index)
        if not stream.exists():
            raise ValueError(f"{checkpoint} does not say where the text stands ({stream.name}); start anew.")
        self.train_dataset.load_state_dict(json.loads(stream.read_text(encoding="utf-8")))
        self.counts = load_file(counts)["counts"]
        self.args.ignore_data_skip = True  # the stream itself goes on, without reading what was read
        self._random_state_of = checkpoint

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.state.epoch = self.state.global_step / self.state.max_steps  # the loop's is that since the last start
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, with `token_counts.safetensors` beside a finished model."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            counts = self.accelerator.reduce(self.counts.to(self.args.device)).cpu()
            if self.is_world_process_zero():
                path = Path(output_dir or self.args.output_dir) / "token_counts.safetensors"
                write_tensors(path, {"counts": counts})

    def report(self) -> dict[str, Any]:
        """Seconds that the model waited for text, since the last start; documents left out, of those read so far.

        The latter are of all processes and epochs, read ahead for the next blocks among them.
        """
        found = self.train_dataset.left_out()
        counts = torch.tensor([found["num_broken"], found["num_empty"]], device=self.args.device)
        broken, empty = self.accelerator.reduce(counts).tolist()
        own = {"seconds_waited_for_data": self.seconds_waited, "documents_broken": broken, "documents_empty": empty}
        return super().report() | own


def _state_files(checkpoint: Path, process: int) -> tuple[Path, Path]:
    return checkpoint / f"stream-{process}.json", checkpoint / f"token_counts-{process}.safetensors"


@torch.no_grad()
def start_table(table: Tensor, factors: Tensor, seed: int = 0) -> None:
    """Sets a table (V, D) to the factors (V, d) less their mean, turned at random, with the spread that it has now."""
    turn = torch.empty(factors.shape[1], table.shape[1])
    torch.nn.init.orthogonal_(turn, generator=torch.Generator().manual_seed(seed))
    rows = (factors - factors.mean(0)) @ turn
    table.copy_(rows * (table.std().cpu() / rows.std()))


class TextTask:
    """What `training.train` trains on, made from the sections `data` and `tokenizer`.

    Attributes:
        train, validation: The stream and the fixed sequences, once opened.
        tokens_per_item: Tokens of a sequence.
        trainer_class: The loop.
        unit: What steps are counted in.
    """

    trainer_class = TextTrainer
    unit = "tokens"

    def __init__(self, settings: Settings, args: TrainingSettings):
        try:
            self.data, self.given = TextSettings(**settings["data"]), TokenizerSettings(**settings["tokenizer"])
        except TypeError as error:  # a missing key
            raise ValueError(f"the settings of a run on text are not complete: {error}") from error
        if self.given.start not in ("random", "factors"):
            raise ValueError(f"tokenizer.start = {self.given.start!r}; expected 'random' or 'factors'.")
        if self.given.start != "random" and self.given.order is None:
            raise ValueError(f"tokenizer.start = {self.given.start!r} needs tokenizer.order, the file that holds them.")
        self.args, self.tokens_per_item, self._tokenizer = args, self.data.context_length, None

    @staticmethod
    def allowed_keys() -> dict[str, list[str]]:
        """The keys of this task's sections."""
        return {
            "data": [f.name for f in dataclasses.fields(TextSettings)],
            "tokenizer": [f.name for f in dataclasses.fields(TokenizerSettings)],
            "model": MODEL_KEYS,
        }

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, read when it is first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.given.path)
            self._tokenizer.model_max_length = self.data.context_length
        return self._tokenizer

    def model_options(self, given: dict[str, Any]) -> dict[str, Any]:
        """The model's settings that were ``given``, completed by what tokenizer and context decide.

        Without a vocabulary size the tokenizer has to be read; with one, that is left to :meth:`open`.
        """
        sizes = {"max_position_embeddings": self.data.context_length} | given
        if "vocab_size" not in given:
            sizes["vocab_size"] = num_ids(self.tokenizer)
        if self._tokenizer is not None:
            sizes = {
                name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
            } | sizes
            if sizes["vocab_size"] < num_ids(self.tokenizer):
                raise ValueError(
                    f"model.vocab_size = {sizes['vocab_size']} is less than the {num_ids(self.tokenizer)} tokens of "
                    f"{self.given.path}; leave it out, or make it at least as large."
                )
        if sizes["max_position_embeddings"] < self.data.context_length:
            raise ValueError(
                f"data.context_length = {self.data.context_length} exceeds model.max_position_embeddings = "
                f"{sizes['max_position_embeddings']}; shorten the one or raise the other."
            )
        if self.given.order is not None:
            sizes["embedding_ordered"] = True  # means nothing to embeddings without digits
        return sizes

    def build_model(self, given: dict[str, Any]) -> LeviathanForCausalLM:
        """A new model of the settings that were ``given``."""
        return build_leviathan(self.model_options(given))

    def describe(self, model: LeviathanForCausalLM) -> dict[str, Any]:
        """Sizes of the model and of what it learns from."""
        return describe_leviathan(model, self.args, self.tokens_per_item)

    def open(self) -> None:
        """Opens the stream of training, and reads the sequences of validation."""
        self.train = TextStream(
            self.data,
            self.tokenizer,
            seed=self.args.seed,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        self.validation = validation_sequences(self.data, self.tokenizer, "validation")

    def prepare(self, model: LeviathanForCausalLM) -> None:
        """Gives a new model's embedding the order of the tokens, and what it is to start from.

        Raises:
            ValueError: If the embedding can use neither, or the file is of other tokens.
        """
        if self.given.order is None:
            return
        embedding, kind = model.get_input_embeddings(), model.config.embedding_type
        found = load_order(self.given.order, model.config.vocab_size)
        started = self.given.start != "random"
        if started and not found.factors.numel():
            raise ValueError(
                f"tokenizer.start = {self.given.start!r}, and {self.given.order} holds no factors: its order is made "
                "without a look at text. Leave start out, or take an order of another --method."
            )
        if isinstance(embedding, DigitEmbedding):
            embedding.set_token_order(found.order)
            if started:
                embedding.set_codebooks(found.factors)
        elif isinstance(embedding, torch.nn.Embedding) and started:
            start_table(embedding.weight, found.factors)
        else:
            raise ValueError(f"tokenizer.order is for embeddings of digits; embedding_type is {kind!r}. Leave it out.")

    def trainer_options(self) -> dict[str, Any]:
        """Arguments of the loop beside model, data and callbacks."""
        return {"data_collator": self.train.collate}

    def record(self) -> dict[str, Any]:
        """What tells the text and the tokenizer behind the settings from others, for JSON."""
        written = json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode()
        return {"documents": self.train.record_of_documents(), "vocabulary": hashlib.sha256(written).hexdigest()}

    def references(self) -> dict[str, float]:
        """What validation is to be held against: the entropy of its tokens."""
        targets = torch.stack([item["labels"][1:] for item in self.validation])
        return {"marginal_entropy": marginal_entropy(targets[targets != -100].numpy())}

    def report(self) -> dict[str, Any]:
        """What `training.json` says of the data."""
        data = dataclasses.asdict(self.data)
        for split in ("train", "validation", "test"):
            if data["dataset"] is None and data[split]:
                data[split] = relative(data[split])
        return {"data": data, "tokenizer": relative(self.given.path), "vocab_size": num_ids(self.tokenizer)}
