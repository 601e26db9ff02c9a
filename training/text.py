"""The stream that a language model is trained on: documents, packed into sequences of one length, shuffled by blocks.

A document is a separator followed by its tokens. The documents are laid end to end, and what comes of it is cut every
`context_length` tokens, so that no token is padding and none is lost. The separator begins a document; as a target it
ends the one before.

The stream can be left at any batch and taken up there again. Its state says where the block that is being given out
begins and how much of it was given: the rest follows by reading that block once more.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from training.documents import Documents, Position

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GROUP_CHARACTERS = 2**18  # of documents that are made tokens in one call

Item = dict[str, Any]
Place = dict[str, Any]  # in the laid out documents; small, and fit for JSON


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Where the text is and how it is cut: the `data` section of a run on text.

    Attributes:
        kind: What is trained on.
        dataset: Name of a dataset on the Hub. None reads local files.
        dataset_config: Name of one of its configurations.
        dataset_revision: Branch, tag or commit of it. None is what the Hub has when it is asked.
        train: Files, folder or glob (see `training.documents.Documents`), or the split of `dataset`, for training.
        validation: The same for validation.
        test: The same for test, if there is one.
        column: Name of the text in a record.
        context_length: Tokens of a sequence.
        shuffle_buffer: Sequences of a block that is given out in random order; 1 keeps the order of the source. A text
            that has fewer is shuffled epoch by epoch.
        shuffle_seed: Seed of these orders.
        separate_documents: Whether a token sees its own document alone. If not, it sees the whole sequence up to it.
        on_broken: `"raise"` on records that cannot be read, or `"skip"` them.
        num_validation_sequences: Sequences of validation, the first of its documents.

    Raises:
        ValueError: If a value is out of range.
    """

    kind: Literal["text"] = "text"
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    train: str
    validation: str
    test: str | None = None
    column: str = "text"
    context_length: int = 512
    shuffle_buffer: int = 10_000
    shuffle_seed: int = 0
    separate_documents: bool = False
    on_broken: Literal["raise", "skip"] = "raise"
    num_validation_sequences: int = 512

    def __post_init__(self) -> None:
        if self.kind != "text":
            raise ValueError(f"kind = {self.kind!r}; expected 'text'.")
        least = {"context_length": 2, "shuffle_buffer": 0, "shuffle_seed": 0, "num_validation_sequences": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < bound:
                raise ValueError(f"{name} = {value!r}; expected an integer, {bound} or more.")

    def documents(self, split: str, share: tuple[int, int] = (0, 1)) -> Documents:
        """The documents of `"train"`, `"validation"` or `"test"`, or a share of them.

        Raises:
            ValueError: If the settings have no such split, or as `Documents`.
        """
        source = {"train": self.train, "validation": self.validation, "test": self.test}.get(split)
        if source is None:
            raise ValueError(f"there is no text for {split!r}; give data.{split}.")
        return Documents(
            source,
            dataset=self.dataset,
            dataset_config=self.dataset_config,
            dataset_revision=self.dataset_revision,
            column=self.column,
            on_broken=self.on_broken,
            share=share,
        )


def separator_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id between documents: that of the beginning of a sequence, or else of its end.

    Raises:
        ValueError: If the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError(
        f"the tokenizer {tokenizer.name_or_path!r} has neither a bos nor an eos token to separate documents by; set "
        "tokenizer.eos_token to one of its tokens."
    )


def document_positions(input_ids: np.ndarray, separator: int) -> np.ndarray:
    """The place of each token since the last separator, or since the start of the sequence: `(T,)` -> `(T,)` int64."""
    place = np.arange(len(input_ids))
    return place - np.maximum.accumulate(np.where(input_ids == separator, place, 0))


def _place(documents: Documents, position: Position | None) -> Place:
    return {"documents": position, "num_broken": documents.num_broken, "num_empty": documents.num_empty}


def _groups(documents: Documents, position: Position | None) -> Iterator[tuple[list[str], list[Place]]]:
    texts, places, size = [], [], 0
    before = _place(documents, position)
    for document in documents.iterate(position):
        texts.append(document.text)
        places.append(before)
        before, size = _place(documents, document.following), size + len(document.text)
        if size >= GROUP_CHARACTERS:
            yield texts, places
            texts, places, size = [], [], 0
    if texts:
        yield texts, places


def encoded_documents(
    documents: Documents, tokenizer: "PreTrainedTokenizerBase", position: Position | None = None
) -> Iterator[tuple[np.ndarray, Place]]:
    """Each document from `position` on, as separator and tokens `(n,)` int32, with the place before it.

    A place is that position, and how many broken records and empty documents were met before it. A text that spells a
    special token out does not become one: a separator within a document would be another's begin.
    """
    separator = separator_id(tokenizer)
    for texts, places in _groups(documents, position):  # one call for each text would be slow
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning of documents longer than a context: they are cut
        )
        for ids, before in zip(encoded["input_ids"], places, strict=True):
            yield np.array([separator, *ids], np.int32), before


def packed_sequences(
    documents: Documents,
    tokenizer: "PreTrainedTokenizerBase",
    context_length: int,
    *,
    endless: bool = False,
    start: Place | None = None,
) -> Iterator[tuple[np.ndarray, Place]]:
    """Cuts the documents, laid end to end, into sequences `(context_length,)` int32, each with the place after it.

    `endless` begins again with the first document after the last, and cuts across; otherwise the tokens after the last
    whole sequence are left out. A place, from which a later call can `start`, is the number of the epoch, the position
    of a document, how many of its tokens were used, and what was left out before it, in all epochs.

    Raises:
        ValueError: As `documents`; if `start` is not of them; if they are endless and shorter than one sequence.
    """
    start = {"epoch": 0, "used": 0} | _place(documents, None) | (start or {})
    epoch, position, used = start["epoch"], start["documents"], start["used"]
    documents.num_broken, documents.num_empty = start["num_broken"], start["num_empty"]
    rest = np.empty(0, np.int32)
    while True:
        num_tokens = 0
        for ids, before in encoded_documents(documents, tokenizer, position):
            if used > len(ids):
                break
            num_tokens += len(ids)
            tokens, begin = np.concatenate([rest, ids[used:]]), used - len(rest)
            stop = len(tokens) - len(tokens) % context_length
            for end in range(context_length, stop + 1, context_length):
                place = {"epoch": epoch, "used": begin + end} | before
                yield tokens[end - context_length : end].copy(), place  # a view would keep the whole document
            rest, used = tokens[stop:], 0
        if used:
            raise ValueError(
                f"the text cannot be taken up after {used} tokens of the document at {position or 'the beginning'}, "
                "which has fewer: files or tokenizer are not those of before. Restore them, or start anew."
            )
        if not endless:
            return
        if position is None and num_tokens < context_length:
            index, count = documents.share
            raise ValueError(
                f"the text has {num_tokens} tokens in share {index + 1} of {count}, fewer than the {context_length} of "
                "one sequence; give more text, a shorter context_length, or fewer workers and processes."
            )
        epoch, position = epoch + 1, None


def _with_begins(
    sequences: Iterator[tuple[np.ndarray, Place]], size: int, epoch: int | None
) -> Iterator[tuple[np.ndarray, Place, bool]]:
    """Each sequence with its place, and whether it begins a block; `epoch` is that of the sequence before.

    A block has `size` sequences. One that holds its epoch from the beginning ends with it: filled up from the next it
    would hold some documents twice, and leave others for later.
    """
    count, is_whole = size, False
    for ids, place in sequences:
        is_new = place["epoch"] != epoch
        begins = count == size or (is_whole and is_new)
        if begins:
            count, is_whole = 0, is_new
        count, epoch = count + 1, place["epoch"]
        yield ids, place, begins


class TextStream(IterableDataset):
    """The endless stream of training sequences of one process, shared out among the workers of its DataLoader.

    Item: `input_ids` and `labels`, the same `(context_length,)` int64; with `separate_documents` also `position_ids`,
    which restart at every separator; and `stream`, the state after it, which `collate` keeps of a batch's last item.

    Worker w of W of process r of R reads share (r W + w, R W) of the documents, over and over. Its sequences are taken
    in blocks of `shuffle_buffer`, or of an epoch if that has fewer; block n is given out in the order of a permutation
    seeded by (shuffle_seed, seed, r, w, n), and read while the block before is given out.

    To go on where a run was left, `record(batch.pop("stream"))` every batch that was used, keep `state_dict()`, and
    give it to the `load_state_dict` of a new stream. A new DataLoader then yields the batches that would have come.

    Args:
        settings: Text and cut.
        tokenizer: Its bos or eos token separates documents.
        seed: Seed of the run, beside the settings' own.
        rank: r, this process.
        world_size: R, the number of processes.

    Raises:
        ValueError: As `Documents` and `separator_id`, or if the rank is out of range; in iteration, on broken records,
            and if a share is shorter than one sequence.
    """

    def __init__(
        self,
        settings: TextSettings,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank = {rank} of world_size = {world_size}; expected 0 <= rank < world_size.")
        self.settings, self.tokenizer = settings, tokenizer
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.separator = separator_id(tokenizer)
        self._record = settings.documents("train").record()  # wrong settings should raise here, not in a worker
        self._num_batches, self._num_workers = 0, None
        self._states: dict[str, Any] = {}  # of workers; JSON has no keys but strings

    def record_of_documents(self) -> dict[str, Any]:
        """What tells the text of training from another, for JSON."""
        return self._record

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        num_workers, index = (info.num_workers, info.id) if info else (1, 0)
        if self._num_workers not in (None, num_workers):
            raise ValueError(
                f"the stream was left with {self._num_workers} workers and cannot go on with {num_workers}; restore "
                "dataloader_num_workers (0 counts as 1)."
            )
        # A DataLoader asks worker 0 first, whoever's turn it was.
        worker = (index + self._num_batches) % num_workers
        share = (self.rank * num_workers + worker, self.world_size * num_workers)
        documents = self.settings.documents("train", share)
        for ids, state in self._shuffled(documents, worker, self._states.get(str(worker))):
            place = {"worker": worker, "num_workers": num_workers, "state": state}
            yield make_item(ids, self.separator, self.settings.separate_documents) | {"stream": place}

    def _shuffled(
        self, documents: Documents, worker: int, state: dict[str, Any] | None
    ) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        state = state or {"block": 0, "given": 0, "start": None}
        block, done, start = state["block"], state["given"], state["start"]
        packed = packed_sequences(documents, self.tokenizer, self.settings.context_length, endless=True, start=start)
        source = _with_begins(packed, max(1, self.settings.shuffle_buffer), start and start["epoch"])
        following, ahead = [], next(source)
        while True:
            while not (following and ahead[2]):  # what is left to be read of the block
                following.append(ahead)
                ahead = next(source)
            current, following = following, []
            seeds = (self.settings.shuffle_seed, self.seed, self.rank, worker, block)
            order, end = np.random.default_rng(seeds).permutation(len(current)), current[-1][1]
            for given, index in enumerate(order, 1):
                if not (following and ahead[2]):
                    following.append(ahead)
                    ahead = next(source)
                (ids, _, _), current[index] = current[index], None  # one in for one out
                if given > done:
                    left_out = {name: ahead[1][name] for name in ("num_broken", "num_empty")}
                    yield ids, {"block": block, "given": given, "start": start} | left_out
            block, done, start = block + 1, 0, end

    @staticmethod
    def collate(items: list[Item]) -> dict[str, Any]:
        """A batch: tensors `(B, context_length)`, and `stream` as its last item has it, where items have it."""
        tensors = [{name: value for name, value in item.items() if name != "stream"} for item in items]
        last = {name: value for name, value in items[-1].items() if name == "stream"}
        return default_collate(tensors) | last

    def record(self, place: dict[str, Any]) -> None:
        """Notes that a batch was used; `place` is what it has under `stream`.

        Raises:
            ValueError: If it is not the next batch.
        """
        expected = self._num_batches % place["num_workers"]
        if place["worker"] != expected or self._num_workers not in (None, place["num_workers"]):
            raise ValueError(
                f"batch {self._num_batches} should come from worker {expected}, not {place['worker']}; record every "
                "batch once, in the order in which the DataLoader gives them."
            )
        self._num_workers = place["num_workers"]
        self._states[str(place["worker"])] = place["state"]
        self._num_batches += 1

    def left_out(self) -> dict[str, int]:
        """`num_broken` and `num_empty` documents that were met up to the batches recorded so far, by this process.

        That is in all epochs, and counts what was read ahead into the next blocks.
        """
        return {name: sum(state[name] for state in self._states.values()) for name in ("num_broken", "num_empty")}

    def _fixed(self) -> dict[str, int]:
        names = ("context_length", "shuffle_buffer", "shuffle_seed")
        own = {"seed": self.seed, "rank": self.rank, "world_size": self.world_size}
        return {name: getattr(self.settings, name) for name in names} | own

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the batches recorded so far; small, and fit for JSON."""
        own = {"num_batches": self._num_batches, "num_workers": self._num_workers, "workers": dict(self._states)}
        return self._fixed() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Lets the next iteration go on where `state` was taken. Each process needs its own.

        Raises:
            ValueError: If the state is of a stream with other settings. That the number of workers is the same is
                checked in iteration.
        """
        if differ := [
            f"{name} = {value}, now {now}" for name, now in self._fixed().items() if (value := state.get(name)) != now
        ]:
            raise ValueError(f"the stream was left with {'; '.join(differ)}; restore that, or start anew.")
        self._num_batches, self._num_workers = state["num_batches"], state["num_workers"]
        self._states = dict(state["workers"])


def make_item(input_ids: np.ndarray, separator: int, separate_documents: bool) -> dict[str, Tensor]:
    """`input_ids` and `labels`, the same `(T,)` int64, and with `separate_documents` the `position_ids`."""
    ids = torch.from_numpy(input_ids.astype(np.int64))
    item = {"input_ids": ids, "labels": ids}
    if separate_documents:
        item["position_ids"] = torch.from_numpy(document_positions(input_ids, separator))
    return item


class PackedSequences(Dataset):
    """A fixed number of sequences, as items of a `TextStream` without its state.

    Args:
        sequences: `(N, T)` integers.
        separator: The id that begins a document.
        separate_documents: Whether items have `position_ids`.
    """

    def __init__(self, sequences: np.ndarray, separator: int, separate_documents: bool):
        self.sequences, self.separator, self.separate_documents = sequences, separator, separate_documents

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return make_item(self.sequences[index], self.separator, self.separate_documents)


def validation_sequences(
    settings: TextSettings, tokenizer: "PreTrainedTokenizerBase", split: str = "validation"
) -> PackedSequences:
    """The first `num_validation_sequences` sequences of a split, or as many as it has: the same for every process.

    Raises:
        ValueError: If there is not one, or as `Documents`.
    """
    source = packed_sequences(settings.documents(split), tokenizer, settings.context_length)
    sequences = [ids for ids, _ in itertools.islice(source, settings.num_validation_sequences)]
    if not sequences:
        raise ValueError(
            f"the text for {split!r} is shorter than one sequence of context_length = {settings.context_length}; give "
            "more text or a shorter context."
        )
    return PackedSequences(np.stack(sequences), separator_id(tokenizer), settings.separate_documents)
