"""What processes and workers read: every sample once, the same in all, as one process would."""

import json
from collections import Counter, defaultdict
from itertools import cycle, islice

import numpy as np
import pytest
from torch.utils.data import DataLoader

from eval import sharding
from training.field_task import ShuffledEpochs
from training.text import TextSettings, TextStream


@pytest.fixture(scope="module")
def rows():
    return sharding.count()


def test_nothing_is_lost_and_nothing_comes_twice(rows):
    """Of 1, 2 and 3 processes with 0, 1 and 2 workers, in one go and resumed."""
    grid = {(row["data"], row["ranks"], row["workers"], row["resumed"], row.get("offsets")) for row in rows}
    assert len(rows) == len(grid) == 3 * 3 * 2 * 3
    for row in rows:
        assert (row["samples"], row["lost"], row["doubled"]) == (sharding.SAMPLES, 0, 0), row


def test_steps_on_fields_are_those_of_one_process(rows):
    assert all(row["steps_as_of_one_process"] for row in rows if row["data"] == "fields")


def test_a_grid_is_read_in_the_order_of_an_epoch_and_random_patches_as_they_come(tmp_path):
    fields = sharding.write_flow(tmp_path)
    grid, random = (
        [number for batch in sharding.read_fields(fields, tmp_path, offsets, 0, 1, 0, False) for number in batch]
        for offsets in ("grid", "random")
    )
    assert grid == list(ShuffledEpochs(sharding.SAMPLES, sharding.SAMPLES, seed=42))  # transformers' default
    assert random == list(range(sharding.SAMPLES))


def test_the_count_sees_what_is_lost_and_what_comes_twice():
    read = [[[0, 1], [2, 2]], [list(range(4, sharding.SAMPLES))]]
    found = sharding.row("text", 2, 0, False, read)
    assert (found["samples"], found["lost"], found["doubled"]) == (sharding.SAMPLES, 1, 1)
    assert sharding.steps_of([[[1, 2], [5, 6]], [[3, 4], [7, 8]]]) == [set(range(1, 9))]


def test_the_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sharding, "count", lambda: [sharding.row("text", 1, 0, False, [[[0, 1]]])])
    sharding.main(["--out", str(tmp_path / "sharding.json")])
    record = json.loads((tmp_path / "sharding.json").read_text())
    names = {"data": "text", "ranks": 1, "workers": 0, "samples": 2, "lost": sharding.SAMPLES - 2, "doubled": 0}
    assert names.items() <= record["rows"][0].items()
    assert record["provenance"]["versions"]
    assert "1 runs, 2 samples: 142 lost, 0 doubled" in capsys.readouterr().out


@pytest.mark.parametrize("num_samples", [7, 10, 25])
def test_epochs_laid_end_to_end(num_samples):
    """Every epoch holds every item once, in an order of its own, and is cut where the samples end."""
    order = list(ShuffledEpochs(10, num_samples, seed=3))
    assert len(order) == len(ShuffledEpochs(10, num_samples, seed=3)) == num_samples
    for first in range(0, num_samples - 9, 10):
        assert sorted(order[first : first + 10]) == list(range(10))
    assert len(set(order[num_samples // 10 * 10 :])) == num_samples % 10
    assert order == list(ShuffledEpochs(10, 25, seed=3))[:num_samples]  # a longer run begins in the same way
    assert order != list(ShuffledEpochs(10, num_samples, seed=4))
    longer = list(ShuffledEpochs(10, 20, seed=3))
    assert longer[:10] != longer[10:]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_documents_of_any_length_are_read_token_by_token(tmp_path, ranks, workers):
    """At the end of every block, what was read are the share's documents laid end to end, epoch on epoch."""
    shares = ranks * max(1, workers)
    words = iter(range(1000))  # none comes twice
    documents = [[next(words) for _ in range(length)] for length in np.random.default_rng(0).integers(1, 12, size=40)]
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(map(str, document))}) + "\n" for document in documents)
    )
    path = str(tmp_path / "text.jsonl")
    settings = TextSettings(train=path, validation=path, context_length=5, shuffle_buffer=4)
    all_read = set()
    for rank in range(ranks):
        stream = TextStream(settings, sharding.word_tokenizer(1000), rank=rank, world_size=ranks)
        loader = DataLoader(stream, 1, collate_fn=stream.collate, num_workers=workers)
        read = defaultdict(lambda: defaultdict(list))  # by worker and block
        for batch in islice(loader, 150 // ranks):  # an epoch has about 55
            worker, block = batch["stream"]["worker"], batch["stream"]["state"]["block"]
            read[worker][block] += batch["input_ids"][0].tolist()
        assert len(read) == max(1, workers)
        for worker, blocks in read.items():
            share = documents[rank * max(1, workers) + worker :: shares]
            epoch = [token for document in share for token in (0, *(1 + word for word in document))]
            found = []
            for block in range(len(blocks) - 1):  # of the last not all was read
                found += blocks[block]
                assert Counter(found) == Counter(islice(cycle(epoch), len(found)))
            assert len(found) > len(epoch)
            all_read.update(found)
    assert all_read == set(range(1 + next(words)))
