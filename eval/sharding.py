"""Counts what each of several processes reads in an epoch: every sample once, none lost, none twice.

    python -m eval.sharding --out FILE

The processes are played one after the other, each with the loader that it would have: that of the text's stream, and
that which the Trainer makes for fields and accelerate shares out. Half of the runs are left in the middle of the epoch,
by all processes after the same batch, and taken up by new loaders, from what a checkpoint holds.

What holds for fields: a step's samples are the same for any number of processes and workers. For text each process and
worker has documents of its own, in blocks shuffled by themselves: over an epoch the samples are those of any number,
in one step they are not. A block that an epoch does not fill takes its rest from the next, and gives both out in one
order; so it is at the ends of blocks that the count is exact, and here an epoch ends with one.
"""

import argparse
import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from accelerate import skip_first_batches
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from leviathan import FieldTokenizer
from training.field_task import FieldTrainer
from training.fields import FieldFile, PatchPairs
from training.provenance import provenance, write_json
from training.text import TextSettings, TextStream
from training.text_task import stream_loader
from training.trainer import build_arguments
from training.turbulence import FlowSettings, write_fields

RANKS, WORKERS = (1, 2, 3), (0, 1, 2)
SAMPLES = 144  # of an epoch: whole batches for every process and worker
BATCH = 4  # samples of a process
WORDS = 7  # of a document: with its separator a sequence
BLOCK = 12  # samples that are shuffled at a time; of those of a process and worker, whole blocks
END = "<end>"  # of a document
STEPS_BEFORE_BREAK = {1: 10, 2: 7, 3: 5}  # by processes; those of two workers then do not stand at one place

Batches = list[list[int]]


def word_tokenizer(num_words: int) -> PreTrainedTokenizerFast:
    """Makes the words 0, 1, .. the ids 1, 2, ..; id 0 ends a document."""
    vocabulary = {END: 0} | {str(number): 1 + number for number in range(num_words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def write_documents(folder: Path) -> PreTrainedTokenizerFast:
    """Documents of one sequence each, which say their number; returns the tokenizer."""
    lines = [json.dumps({"text": " ".join([str(number)] * WORDS)}) for number in range(SAMPLES)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return word_tokenizer(SAMPLES)


def read_text(
    folder: Path, tokenizer: PreTrainedTokenizerFast, rank: int, ranks: int, workers: int, broken: bool
) -> Batches:
    """The documents' numbers in each batch that one process reads in an epoch."""
    path = str(folder / "text.jsonl")
    settings = TextSettings(train=path, validation=path, context_length=1 + WORDS, shuffle_buffer=BLOCK)
    loading = {"per_device_train_batch_size": BATCH, "dataloader_num_workers": workers, "dataloader_pin_memory": False}
    arguments = build_arguments({"training": {"output_dir": str(folder), "max_steps": 1, "use_cpu": True} | loading})

    def stream() -> TextStream:
        return TextStream(settings, tokenizer, rank=rank, world_size=ranks)

    def read(source: TextStream, count: int) -> Batches:
        batches = []
        for batch in islice(stream_loader(source, arguments), count):
            source.record(batch["stream"])
            batches.append((batch["input_ids"][:, 1] - 1).tolist())
        return batches

    first, steps = stream(), SAMPLES // (BATCH * ranks)
    if not broken:
        return read(first, steps)
    before = read(first, STEPS_BEFORE_BREAK[ranks])
    second = stream()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    return before + read(second, steps - len(before))


class Numbered(PatchPairs):
    """Pairs of patches with their numbers."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return super().__getitem__(index) | {"number": torch.tensor(int(index))}


def write_flow(folder: Path) -> FieldFile:
    """A flow of which a grid of patches has as many pairs as an epoch has samples."""
    settings = FlowSettings(num_trajectories=3, num_grid=16, viscosity=2e-3, dt_save=0.02, num_snapshots=4)
    return FieldFile(write_fields(folder / "flow.hdf5", settings, progress=False))


@contextlib.contextmanager
def process(trainer: FieldTrainer, rank: int, ranks: int) -> Iterator[None]:
    """Lets the accelerator take itself for one process of several when it makes a loader."""
    state = trainer.accelerator.state
    before = state.process_index, state.num_processes
    state.process_index, state.num_processes = rank, ranks
    try:
        yield
    finally:
        state.process_index, state.num_processes = before


def read_fields(
    fields: FieldFile, folder: Path, offsets: str, rank: int, ranks: int, workers: int, broken: bool
) -> Batches:
    """The numbers of the pairs in each batch that one process reads in an epoch."""
    tokenizer = FieldTokenizer(4, 5, 6, low=-10.0, high=10.0)
    options: dict[str, Any] = {"num_items": SAMPLES} if offsets == "random" else {}
    pairs = Numbered(fields, range(fields.num_trajectories), tokenizer, offsets=offsets, **options)
    steps = SAMPLES // (BATCH * ranks)
    training = {
        "output_dir": str(folder / "run"),
        "max_steps": steps,
        # The process is alone but when it makes loaders: so that all together make the items of an epoch.
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ranks,
        "dataloader_num_workers": workers,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    arguments = build_arguments({"training": training})
    trainer = FieldTrainer(torch.nn.Linear(1, 1), arguments, train_dataset=pairs, data_collator=pairs.collate)

    def loader() -> DataLoader:
        with process(trainer, rank, ranks):
            return trainer.get_train_dataloader()

    def read(source: DataLoader, count: int) -> Batches:
        return [batch["number"].tolist() for batch in islice(source, count)]

    if not broken:
        return read(loader(), steps + 1)  # one more would show
    before = read(loader(), STEPS_BEFORE_BREAK[ranks])
    return before + read(skip_first_batches(loader(), len(before)), steps)


def row(data: str, ranks: int, workers: int, resumed: bool, read: Sequence[Batches]) -> dict[str, Any]:
    """What the record says of one run: of an epoch's samples, those that no process read, and those read again."""
    counts = Counter(number for batches in read for batch in batches for number in batch)
    return {
        "data": data,
        "ranks": ranks,
        "workers": workers,
        "resumed": resumed,
        "samples": sum(counts.values()),
        "lost": len(set(range(SAMPLES)) - counts.keys()),
        "doubled": sum(count - 1 for count in counts.values()),
    }


def steps_of(read: Sequence[Batches]) -> list[set[int]]:
    """The samples of each BATCH x 6 that all processes read together, in the order of training.

    Six: the least that one, two and three processes come to in whole steps.
    """
    order = [number for step in zip(*read, strict=True) for batch in step for number in batch]
    return [set(order[first : first + 6 * BATCH]) for first in range(0, len(order), 6 * BATCH)]


def count(ranks: Sequence[int] = RANKS, workers: Sequence[int] = WORKERS) -> list[dict[str, Any]]:
    """The rows of the record, for each number of processes and workers, run through and resumed.

    Rows of fields also say whether each step's samples are those of one process without workers.
    """
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer, fields = write_documents(folder), write_flow(folder)
        single = {o: steps_of([read_fields(fields, folder, o, 0, 1, 0, False)]) for o in ("grid", "random")}
        for size, number, resumed in product(ranks, workers, (False, True)):
            read = [read_text(folder, tokenizer, rank, size, number, resumed) for rank in range(size)]
            rows.append(row("text", size, number, resumed, read))
            for offsets, alone in single.items():
                read = [read_fields(fields, folder, offsets, rank, size, number, resumed) for rank in range(size)]
                found = row("fields", size, number, resumed, read)
                rows.append(found | {"offsets": offsets, "steps_as_of_one_process": steps_of(read) == alone})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    out = parser.parse_args(arguments).out
    rows = count()
    write_json(out, {"rows": rows, "provenance": provenance(0)})
    lost, doubled = (sum(each[name] for each in rows) for name in ("lost", "doubled"))
    print(f"{len(rows)} runs, {sum(each['samples'] for each in rows)} samples: {lost} lost, {doubled} doubled")


if __name__ == "__main__":
    main()
