"""The stream of text: every token once an epoch, shuffled by blocks, taken up again at any batch as if never left."""

import itertools
import json
import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from training import text
from training.documents import Documents
from training.text import TextSettings, TextStream, document_positions, separator_id, validation_sequences

# Workers are many here to share, not to be fast.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:UserWarning")
    for message in ("This DataLoader will create", ".*broken records left out", ".*It is left out")
]
SEPARATOR = 0
WORDS = ["the", "flow", "of", "a", "river", "bends", "and", "over", "rocks", "in", "its", "bed"]


def byte_tokenizer(**special):
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 2)}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("o", "w")]
    vocabulary |= {a + b: len(vocabulary) + 2 + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE({"<|end|>": 0, "<|pad|>": 1} | vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")


def make_texts(count, seed=0, most=40):
    """Texts of very different lengths, each with a mark of its own."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, most, count)
    return [f"<{i}> " + " ".join(generator.choice(WORDS, size)) for i, size in enumerate(sizes)]


def write(folder, texts, num_files=1):
    folder.mkdir(exist_ok=True)
    for number in range(num_files):
        lines = [json.dumps({"text": each}) + "\n" for each in texts[number::num_files]]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return str(folder)


def settings_of(path, **options):
    return TextSettings(**{"train": path, "validation": path, "context_length": 16, "shuffle_buffer": 6} | options)


def plain(texts, tokenizer, context_length):
    """The packing in one line of thought: all tokens, cut. The rest is returned as well."""
    tokens = [token for each in texts for token in [SEPARATOR, *tokenizer.encode(each, add_special_tokens=False)]]
    whole = len(tokens) // context_length * context_length
    return torch.tensor(tokens[:whole]).view(-1, context_length), tokens[whole:]


def take(stream, num_batches, batch_size=2, num_workers=0):
    loader = DataLoader(stream, batch_size=batch_size, num_workers=num_workers, collate_fn=stream.collate)
    return list(itertools.islice(loader, num_batches))


def error_of(stream, num_workers):
    """What `take` fails with. The traceback holds the loader, and collected late its workers are slow to end."""
    try:
        take(stream, 40, num_workers=num_workers)
    except ValueError as error:
        error.__traceback__ = None
        return str(error)


def same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch.keys() - {"stream"}:
            assert torch.equal(batch[name], other[name])
        assert batch["stream"] == other["stream"]


def test_items_are_as_described(tmp_path, tokenizer):
    stream = TextStream(settings_of(write(tmp_path / "a", make_texts(30))), tokenizer)
    item = next(iter(stream))
    assert item.keys() == {"input_ids", "labels", "stream"}
    assert item["input_ids"].shape == item["labels"].shape == (16,)
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    batch = take(stream, 1, batch_size=3)[0]
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 16)
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert batch["stream"] == list(itertools.islice(stream, 3))[-1]["stream"]
    assert len(json.dumps(batch["stream"])) < 400


def test_packing_is_the_documents_laid_end_to_end(tmp_path, tokenizer):
    texts = make_texts(25)
    stream = TextStream(settings_of(write(tmp_path / "a", texts), shuffle_buffer=1), tokenizer)
    expected, rest = plain(3 * texts, tokenizer, 16)  # epochs run into one another
    assert rest
    items = torch.stack([item["input_ids"] for item in itertools.islice(stream, len(expected))])
    assert torch.equal(items, expected)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("num_files", [1, 7])
def test_every_document_once_an_epoch(tmp_path, tokenizer, num_workers, world_size, num_files):
    """Each worker of each process gives all tokens of its documents in turn; together they have every document once."""
    texts = make_texts(30, most=5)
    settings = settings_of(write(tmp_path / "a", texts, num_files), shuffle_buffer=1)
    once = Counter()
    for rank in range(world_size):
        stream = TextStream(settings, tokenizer, rank=rank, world_size=world_size)
        tokens = {worker: [] for worker in range(num_workers)}
        for batch in take(stream, 120 // world_size, num_workers=num_workers):
            tokens[batch["stream"]["worker"]] += batch["input_ids"].flatten().tolist()
        for own in tokens.values():
            assert own[0] == SEPARATOR
            split = tokenizer.decode(own).split("<|end|>")[1:-1]  # the last was cut
            num_documents = split.index(split[0], 1)  # where they come again
            assert len(split) > 2 * num_documents
            assert split == [split[i % num_documents] for i in range(len(split))]
            expected = plain(split, tokenizer, 1)[0].flatten().tolist()
            assert own[: len(expected)] == expected
            once.update(split[:num_documents])
    assert once == Counter(texts)


def ids_of(stream, count):
    return [item["input_ids"].tolist() for item in itertools.islice(stream, count)]


@pytest.mark.parametrize("size", [2, 5, 20])
def test_blocks_are_permuted(tmp_path, tokenizer, size):
    """Blocks of a text that has more run across documents and epochs."""
    texts = make_texts(10)
    settings = settings_of(write(tmp_path / "a", texts), shuffle_buffer=size, shuffle_seed=3)
    assert size < len(plain(texts, tokenizer, 16)[0]) < 3 * 20
    in_order = ids_of(TextStream(replace(settings, shuffle_buffer=0), tokenizer), 6 * size)
    expected = []
    for block in range(6):
        order = np.random.default_rng((3, 4, 0, 0, block)).permutation(size)
        expected += [in_order[block * size + index] for index in order]
    assert ids_of(TextStream(settings, tokenizer, seed=4), 6 * size) == expected


@pytest.mark.parametrize("size", [20, 23, 1000])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_text_smaller_than_a_block_is_shuffled_by_epochs(tmp_path, tokenizer, size, num_workers):
    """Seen on sequences that are each a document: every one exactly once an epoch, in another order."""
    texts = [f"{i:05d}" for i in range(20)]
    settings = settings_of(write(tmp_path / "a", texts), context_length=6, shuffle_buffer=size)
    batches = take(TextStream(settings, tokenizer), 100, batch_size=1, num_workers=num_workers)
    given_out = [tokenizer.decode(batch["input_ids"][0][1:]) for batch in batches]
    epochs = [given_out[start : start + 20] for start in range(0, 100, 20)]
    assert all(sorted(epoch) == texts for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5


def test_epochs_of_a_small_text_end_within_sequences(tmp_path, tokenizer):
    """Blocks are then of the sequences that end in an epoch."""
    texts = make_texts(7)
    settings = settings_of(write(tmp_path / "a", texts), shuffle_buffer=1000)
    num_tokens = len(plain(texts, tokenizer, 1)[0])
    assert num_tokens % 16
    ends = [epoch * num_tokens // 16 for epoch in range(6)]
    in_order = ids_of(TextStream(replace(settings, shuffle_buffer=0), tokenizer), ends[-1])
    shuffled = ids_of(TextStream(settings, tokenizer), ends[-1])
    assert len({end - start for start, end in itertools.pairwise(ends)}) == 2  # they differ in length
    for start, end in itertools.pairwise(ends):
        assert sorted(shuffled[start:end]) == sorted(in_order[start:end])
        assert shuffled[start:end] != in_order[start:end]


def test_orders_depend_on_seeds_rank_worker_and_block(tmp_path, tokenizer):
    """Seen on sequences that are each a document, so that the place in the block can be told."""
    texts = [f"{i:05d}" for i in range(1000)]
    settings = settings_of(write(tmp_path / "a", texts), context_length=6, shuffle_buffer=20)

    def orders(settings, num_workers=0, **options):
        batches = take(TextStream(settings, tokenizer, **options), 80, batch_size=1, num_workers=num_workers)
        found = {}
        for batch in batches:
            number = int(tokenizer.decode(batch["input_ids"][0][1:]))
            key = batch["stream"]["worker"], batch["stream"]["state"]["block"]
            found.setdefault(key, []).append(number)
        return [[sorted(block).index(i) for i in block] for block in found.values()]

    every = orders(settings)
    assert every == orders(settings)  # deterministic
    assert every == orders(settings, num_workers=1)  # no worker is worker 0
    every += orders(replace(settings, shuffle_seed=1)) + orders(settings, seed=1)
    every += orders(settings, rank=1, world_size=2) + orders(settings, num_workers=2)[1::2]
    assert len(every) == 18
    assert all(sorted(order) == list(range(20)) for order in every)
    assert len({tuple(order) for order in every}) == 18


def test_one_sequence_is_read_for_one_given(tmp_path, tokenizer, monkeypatch):
    read = []
    packed = text.packed_sequences
    monkeypatch.setattr(
        text, "packed_sequences", lambda *a, **k: (read.append(None) or each for each in packed(*a, **k))
    )
    stream = iter(TextStream(settings_of(write(tmp_path / "a", make_texts(10))), tokenizer))
    for given_out in range(1, 20):
        next(stream)
        assert len(read) == 6 + given_out + 1  # by which it is known where a block ends


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=9),
    context_length=st.integers(2, 20),
    shuffle_buffer=st.integers(0, 9),
    batch_size=st.integers(1, 3),
    stops=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    group=st.sampled_from([1, 40, 10_000]),
)
def test_resumed_stream_equals_the_unbroken(
    tmp_path_factory, tokenizer, sizes, context_length, shuffle_buffer, batch_size, stops, group
):
    """Left and taken up again several times, within blocks, documents and epochs, however documents are grouped."""
    texts = [f"{i}" * size + " the" for i, size in enumerate(sizes)]
    path = write(tmp_path_factory.mktemp("a"), texts, num_files=min(2, len(texts)))
    options = {"context_length": context_length, "shuffle_buffer": shuffle_buffer, "separate_documents": True}
    settings = settings_of(path, **options)
    assume(len(plain(texts, tokenizer, context_length)[0]))
    expected = take(TextStream(settings, tokenizer), sum(stops) + 6, batch_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "GROUP_CHARACTERS", group)
        batches, state = [], None
        for stop in [*stops, 6]:
            stream = TextStream(settings, tokenizer)
            if state is not None:
                stream.load_state_dict(json.loads(state))
            for batch in take(stream, stop, batch_size):
                batches.append(batch)
                stream.record(batch["stream"])
            state = json.dumps(stream.state_dict())
    same(batches, expected)


@pytest.mark.parametrize("source", ["one file", "five files", "hub"])
@pytest.mark.parametrize(("num_workers", "stops"), [(1, [5]), (2, [1, 6]), (3, [2, 5])])
def test_resumed_workers(tmp_path, tokenizer, num_workers, stops, source):
    """Workers have read ahead when the stream is left, and it is another worker's turn when it is taken up."""
    path = write(tmp_path / "a", make_texts(60, most=8), num_files=1 if source == "one file" else 5)
    options = {"dataset": path, "train": "train"} if source == "hub" else {}
    settings = settings_of(f"{path}/0.jsonl" if source == "one file" else path, **options)
    expected = take(TextStream(settings, tokenizer, world_size=2, rank=1), sum(stops) + 30, num_workers=num_workers)
    batches, state = [], None
    for stop in [*stops, 30]:
        stream = TextStream(settings, tokenizer, world_size=2, rank=1)
        if state is not None:
            stream.load_state_dict(json.loads(state))
        for batch in take(stream, stop, num_workers=num_workers):
            stream.record(batch["stream"])
            batches.append(batch)
        state = json.dumps(stream.state_dict())
    assert len({batch["stream"]["worker"] for batch in batches}) == num_workers
    if source == "hub":  # the state of `datasets` tells one place in several ways
        batches, expected = (
            [each | {"stream": each["stream"]["worker"]} for each in all_] for all_ in (batches, expected)
        )
    same(batches, expected)


def test_a_stream_goes_on_after_what_was_recorded(tmp_path, tokenizer):
    stream = TextStream(settings_of(write(tmp_path / "a", make_texts(20))), tokenizer)
    expected = take(stream, 10)
    same(take(stream, 10), expected)
    for batch in expected[:4]:
        stream.record(batch["stream"])
    same(take(stream, 6), expected[4:])


def test_state_is_that_of_the_batches_used(tmp_path, tokenizer):
    stream = TextStream(settings_of(write(tmp_path / "a", make_texts(20))), tokenizer)
    fresh = stream.state_dict()
    assert (fresh["num_batches"], fresh["workers"]) == (0, {})
    expected = take(stream, 5)
    stream.load_state_dict(fresh)
    same(take(stream, 5), expected)
    for batch in expected:
        stream.record(batch["stream"])
    assert stream.state_dict()["num_batches"] == 5
    assert stream.state_dict()["workers"] == {"0": expected[-1]["stream"]["state"]}


def test_state_is_small_after_long_documents(tmp_path, tokenizer):
    stream = TextStream(settings_of(write(tmp_path / "a", ["the river " * 5000]), shuffle_buffer=100), tokenizer)
    for batch in take(stream, 200):
        stream.record(batch["stream"])
    assert len(json.dumps(stream.state_dict())) < 600


def test_position_ids_restart_at_separators(tmp_path, tokenizer):
    settings = settings_of(write(tmp_path / "a", make_texts(40, most=6)), separate_documents=True)
    batch = take(TextStream(settings, tokenizer), 1, batch_size=30)[0]
    expected = torch.zeros_like(batch["input_ids"])
    for row, ids in enumerate(batch["input_ids"].tolist()):
        for i in range(1, 16):
            expected[row, i] = 0 if ids[i] == SEPARATOR else expected[row, i - 1] + 1
    assert torch.equal(batch["position_ids"], expected)
    assert (expected[:, 0] == 0).all()
    assert ((expected == 0).sum(1) > 1).any()
    assert document_positions(np.array([5, 5, 0, 0, 5]), 0).tolist() == [0, 1, 0, 0, 1]
    assert validation_sequences(settings, tokenizer)[0]["position_ids"].dtype == torch.int64


def test_text_cannot_write_a_separator(tmp_path, tokenizer):
    texts = ["a<|end|>b", "c<|pad|>"]
    settings = settings_of(write(tmp_path / "a", texts), context_length=4, shuffle_buffer=1)
    tokens = torch.cat([item["input_ids"] for item in itertools.islice(TextStream(settings, tokenizer), 5)])
    length = 2 + sum(map(len, texts))
    assert (tokens[:length] == SEPARATOR).sum() == 2
    assert tokenizer.decode(tokens[:length]) == "<|end|>a<|end|>b<|end|>c<|pad|>"
    assert 1 not in tokens


def test_long_documents_give_no_warning(tmp_path, caplog):
    tokenizer = byte_tokenizer(eos_token="<|end|>", model_max_length=8)
    with caplog.at_level(logging.WARNING):
        next(iter(TextStream(settings_of(write(tmp_path / "a", ["the river " * 100])), tokenizer)))
    assert not caplog.records


@pytest.mark.parametrize("special", [{"bos_token": "<|end|>", "eos_token": "<|pad|>"}, {"eos_token": "<|end|>"}])
def test_separator(special):
    assert separator_id(byte_tokenizer(**special)) == SEPARATOR


def test_no_separator(tmp_path):
    settings = settings_of(write(tmp_path / "a", make_texts(10)))
    for build in (
        lambda: TextStream(settings, byte_tokenizer()),
        lambda: validation_sequences(settings, byte_tokenizer()),
    ):
        with pytest.raises(ValueError, match="neither a bos nor an eos token"):
            build()


def test_validation_is_the_begin_of_its_documents(tmp_path, tokenizer):
    texts = make_texts(30)
    settings = settings_of(
        write(tmp_path / "a", make_texts(5, seed=1)),
        validation=write(tmp_path / "b", texts),
        num_validation_sequences=9,
    )
    expected = plain(texts, tokenizer, 16)[0]
    found = validation_sequences(settings, tokenizer)
    assert len(found) == 9
    assert torch.equal(torch.stack([item["input_ids"] for item in found]), expected[:9])
    assert torch.equal(torch.stack([item["labels"] for item in found]), expected[:9])
    every = validation_sequences(replace(settings, num_validation_sequences=10_000), tokenizer)
    assert torch.equal(torch.stack([every[i]["input_ids"] for i in range(len(every))]), expected)
    other = validation_sequences(replace(settings, test=settings.train), tokenizer, "test")
    assert torch.equal(other[0]["input_ids"], plain(make_texts(5, seed=1), tokenizer, 16)[0][0])
    batch = TextStream.collate([found[0], found[1]])
    assert torch.equal(batch["input_ids"], expected[:2])
    assert batch.keys() == {"input_ids", "labels"}


def test_broken_records(tmp_path, tokenizer):
    path = write(tmp_path / "a", make_texts(10))
    with (tmp_path / "a" / "0.jsonl").open("a") as file:
        file.write("{]\n" + json.dumps({"text": "the last"}) + "\n")
    for num_workers in (0, 1):
        assert "0.jsonl, line 11: it is no JSON" in error_of(TextStream(settings_of(path), tokenizer), num_workers)
    settings = settings_of(path, on_broken="skip", shuffle_buffer=1)
    expected = plain([*make_texts(10), "the last"], tokenizer, 16)[0]
    with pytest.warns(UserWarning, match="line 11: it is no JSON .* It is left out, as more of that file will be"):
        items = list(itertools.islice(TextStream(settings, tokenizer), len(expected)))
    assert torch.equal(torch.stack([item["input_ids"] for item in items]), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("group", [1, 50, 10_000])
def test_what_is_left_out_is_counted(tmp_path, tokenizer, monkeypatch, num_workers, group):
    """As often as it is met, however documents are grouped, and the same if the stream was left and taken up again."""
    monkeypatch.setattr(text, "GROUP_CHARACTERS", group)
    lines = [part for i in range(20) for part in (json.dumps({"text": f"{i:05d}"}), "{]", '{"text": " "}')]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    settings = settings_of(str(tmp_path / "a.jsonl"), context_length=6, shuffle_buffer=1, on_broken="skip")
    stream, counted = TextStream(settings, tokenizer), []
    assert stream.left_out() == {"num_broken": 0, "num_empty": 0}
    for batch in take(stream, 50, batch_size=1, num_workers=num_workers):
        stream.record(batch["stream"])
        counted.append(stream.left_out())
    if not num_workers:  # two documents are read ahead; what is between them is met with the second
        met = [given + 1 - ((given + 1) % 20 > 0) for given in range(1, 51)]
        assert counted == [{"num_broken": number, "num_empty": number} for number in met]
    assert min(counted[-1].values()) > 40  # in the third epoch
    other = TextStream(settings, tokenizer)
    for batch in take(other, 21, batch_size=1, num_workers=num_workers):
        other.record(batch["stream"])
    again = TextStream(settings, tokenizer)
    again.load_state_dict(json.loads(json.dumps(other.state_dict())))
    assert again.left_out() == counted[20]
    for batch, expected in zip(take(again, 29, batch_size=1, num_workers=num_workers), counted[21:], strict=True):
        again.record(batch["stream"])
        assert again.left_out() == expected


def test_too_little_text(tmp_path, tokenizer):
    path = write(tmp_path / "a", ["the river", "its bed"])
    tokens = len(plain(["the river", "its bed"], tokenizer, 1)[0])
    assert next(iter(TextStream(settings_of(path, context_length=tokens), tokenizer)))["input_ids"].shape == (tokens,)
    settings = settings_of(path, context_length=tokens + 1)
    with pytest.raises(ValueError, match=rf"{tokens} tokens in share 1 of 1, fewer than the {tokens + 1} of one"):
        next(iter(TextStream(settings, tokenizer)))
    with pytest.raises(
        ValueError, match=rf"'validation' is shorter than one sequence of context_length = {tokens + 1}"
    ):
        validation_sequences(settings, tokenizer)
    settings = settings_of(path, context_length=4)
    with pytest.raises(ValueError, match=r"0 tokens in share 3 of 3, fewer than the 4 .*fewer workers and processes"):
        next(iter(TextStream(settings, tokenizer, rank=2, world_size=3)))
    (tmp_path / "b.jsonl").write_text('\n{"text": " "}\n')
    with pytest.raises(ValueError, match="0 tokens"):
        next(iter(TextStream(settings_of(str(tmp_path / "b.jsonl")), tokenizer)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "field"}, "kind = 'field'; expected 'text'"),
        ({"context_length": 1}, "context_length = 1; expected an integer, 2 or more"),
        ({"context_length": "512"}, "context_length = '512'; expected an integer"),
        ({"shuffle_buffer": 1e4}, "shuffle_buffer = 10000.0; expected an integer"),
        ({"shuffle_seed": -1}, "shuffle_seed = -1; expected an integer, 0 or more"),
        ({"num_validation_sequences": 0}, "num_validation_sequences = 0; expected an integer, 1 or more"),
        ({"on_broken": "ignore"}, "on_broken = 'ignore'"),
        ({"train": "none.jsonl"}, "there are no files none.jsonl"),
        ({"dataset_config": "en"}, "dataset_config = 'en'"),
        ({"dataset_revision": "v1"}, "dataset_revision = 'v1'"),
    ],
)
def test_bad_settings(tmp_path, tokenizer, options, message):
    path = write(tmp_path / "a", make_texts(10))
    with pytest.raises(ValueError, match=message):
        TextStream(settings_of(path, **options), tokenizer)


def test_bad_split_and_rank(tmp_path, tokenizer):
    settings = settings_of(write(tmp_path / "a", make_texts(10)))
    for split in ("test", "tests"):
        with pytest.raises(ValueError, match=f"there is no text for '{split}'; give data.{split}"):
            validation_sequences(settings, tokenizer, split)
    with pytest.raises(ValueError, match="rank = 2 of world_size = 2"):
        TextStream(settings, tokenizer, rank=2, world_size=2)


def test_stream_of_others_is_refused(tmp_path, tokenizer):
    settings = settings_of(write(tmp_path / "a", make_texts(20)))
    stream = TextStream(settings, tokenizer)
    for batch in take(stream, 3, num_workers=2):
        stream.record(batch["stream"])
    state = stream.state_dict()
    others = {
        "shuffle_buffer = 6, now 7": TextStream(replace(settings, shuffle_buffer=7), tokenizer),
        "context_length = 16, now 8": TextStream(replace(settings, context_length=8), tokenizer),
        "shuffle_seed = 0, now 1; seed = 0, now 2": TextStream(replace(settings, shuffle_seed=1), tokenizer, seed=2),
        "rank = 0, now 1; world_size = 1, now 2": TextStream(settings, tokenizer, rank=1, world_size=2),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    other = TextStream(settings, tokenizer)
    other.load_state_dict(state)
    for num_workers in (0, 3):
        expected = f"left with 2 workers and cannot go on with {max(1, num_workers)}"
        assert expected in error_of(other, num_workers)


def test_batches_are_recorded_in_order(tmp_path, tokenizer):
    stream = TextStream(settings_of(write(tmp_path / "a", make_texts(20))), tokenizer)
    first, second, _ = take(stream, 3, num_workers=2)
    with pytest.raises(ValueError, match="batch 0 should come from worker 0, not 1"):
        stream.record(second["stream"])
    stream.record(first["stream"])
    with pytest.raises(ValueError, match="batch 1 should come from worker 1, not 0"):
        stream.record(first["stream"])


def test_text_that_changed_is_noticed(tmp_path, tokenizer):
    path = write(tmp_path / "a", ["the river " * 50])
    stream = TextStream(settings_of(path), tokenizer)
    for batch in take(stream, 8):
        stream.record(batch["stream"])
    write(tmp_path / "a", ["the river " * 5])
    with pytest.raises(ValueError, match="cannot be taken up after 192 tokens of the document at the beginning"):
        take(stream, 1)
    (tmp_path / "a" / "0.jsonl").write_text("")
    with pytest.raises(ValueError, match="cannot be taken up"):
        take(stream, 1)


def test_record_of_documents(tmp_path, tokenizer):
    settings = settings_of(write(tmp_path / "a", make_texts(20), num_files=3))
    records = [TextStream(settings, tokenizer, rank=rank, world_size=2).record_of_documents() for rank in range(2)]
    assert records[0] == records[1] == Documents(settings.train).record()
    assert json.loads(json.dumps(records[0])) == records[0]
