"""Documents of files and datasets: each exactly once, from any position on, nothing broken passed over in silence."""

import gzip
import itertools
import json
import random
import tracemalloc
import warnings
from collections import Counter
from unittest.mock import Mock

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from training import documents as module
from training.documents import Documents

# Each of a file's broken records is one of those that a second warning counts.
pytestmark = pytest.mark.filterwarnings("ignore:.* It is left out:UserWarning")


def jsonl(texts):
    return "".join(json.dumps({"meta": {"n": i}, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def write_jsonl(path, texts):
    path.write_bytes(jsonl(texts))


def write_zst(path, texts):
    """As two frames, as parallel compressors write them."""
    lines = jsonl(texts).splitlines(keepends=True)
    halves = b"".join(lines[:2]), b"".join(lines[2:])
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(half) for half in halves))


def write_gz(path, texts):
    path.write_bytes(gzip.compress(jsonl(texts)))


def write_parquet(path, texts):
    table = pa.table({"n": range(len(texts)), "text": pa.array(texts, pa.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=3)


WRITERS = {".jsonl": write_jsonl, ".jsonl.zst": write_zst, ".jsonl.gz": write_gz, ".parquet": write_parquet}
TEXTS = ["one", "zwei\nlines\u2028é", "", "三 🦔", " \n\t", "six\x00", "seven", "eight " * 99]
FULL = [text for text in TEXTS if text.strip()]


def corpus(folder, num_files, num_texts):
    """Files of all kinds with distinct texts; returns these."""
    folder.mkdir(exist_ok=True)
    texts = []
    for number, write in zip(range(num_files), itertools.cycle(WRITERS.items()), strict=False):
        own = [f"file {number} text {i}" for i in range(num_texts)]
        write[1](folder / f"{number}{write[0]}", own)
        texts += own
    return texts


@pytest.fixture(params=["files", "few files", "hub", "one shard"])
def opened(request, tmp_path):
    """(open, texts): opens a share of a corpus, with more or fewer parts than shares."""
    if "files" in request.param:
        texts = corpus(tmp_path / "corpus", 9 if request.param == "files" else 2, 4)
        return lambda **options: Documents(tmp_path / "corpus", **options), texts
    folder, texts = tmp_path / "set", []
    folder.mkdir()
    for number in range(5 if request.param == "hub" else 1):
        own = [f"shard {number} text {i}" for i in range(3)]
        write_jsonl(folder / f"train-{number}.jsonl", own)
        texts += own
    return lambda **options: Documents("train", dataset=str(folder), **options), texts


@pytest.mark.parametrize("ending", WRITERS)
def test_each_format(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    WRITERS[ending](path, TEXTS)
    documents = Documents(path)
    assert (list(documents), documents.num_empty, documents.num_broken) == (FULL, 2, 0)
    assert list(documents) == FULL  # and again


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "b.txt").write_text("two\nlines\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("ä", encoding="utf-8")
    (tmp_path / "c.txt").write_text("\n")
    documents = Documents(tmp_path)
    assert (list(documents), documents.num_empty) == (["ä", "two\nlines\n"], 1)


def test_lines_as_editors_leave_them(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\n\n{"text": "c"}')
    documents = Documents(tmp_path / "a.jsonl")
    assert (list(documents), documents.num_empty) == (["a", "b", "c"], 2)


@given(st.lists(st.integers(1, 300_000), min_size=1, max_size=8), st.sampled_from(sorted(WRITERS)[:3]))
def test_lines_across_chunks(tmp_path_factory, sizes, ending):
    path = tmp_path_factory.mktemp("lines") / f"a{ending}"
    texts = [str(i) * size for i, size in enumerate(sizes)]
    WRITERS[ending](path, texts)
    assert list(Documents(path)) == texts


@given(st.lists(st.text(max_size=9).filter(lambda text: text.strip()), max_size=5), st.integers(1, 40), st.booleans())
def test_lines_across_many_chunks(tmp_path_factory, texts, chunk_bytes, is_ended):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(jsonl(texts) if is_ended else jsonl(texts).removesuffix(b"\n"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", chunk_bytes)
        assert list(Documents(path)) == texts


def test_frames_with_long_windows(tmp_path):
    """What `zstd --long=28` declares in a frame's header, with one block that is not compressed."""
    line = jsonl(["far back"])
    frame = b"\x28\xb5\x2f\xfd" + bytes([0, (28 - 10) << 3]) + (len(line) << 3 | 1).to_bytes(3, "little") + line
    with pytest.raises(zstandard.ZstdError, match="too much memory"):
        zstandard.ZstdDecompressor().decompressobj().decompress(frame)
    (tmp_path / "a.jsonl.zst").write_bytes(frame)
    assert list(Documents(tmp_path)) == ["far back"]


def test_a_window_that_memory_does_not_hold_is_damage(tmp_path, monkeypatch):
    """A few bytes can ask for 2 GiB; what else is there is read all the same."""
    write_jsonl(tmp_path / "b.jsonl", ["whole"])
    (tmp_path / "a.jsonl.zst").write_bytes(b"ever so large")
    frame = Mock()
    frame.return_value.decompressobj.return_value.decompress.side_effect = MemoryError
    monkeypatch.setattr(module.zstandard, "ZstdDecompressor", frame)
    with pytest.raises(ValueError, match="larger window than memory holds"):
        list(Documents(tmp_path))
    with pytest.warns(UserWarning, match="larger window than memory holds"):
        assert list(Documents(tmp_path, on_broken="skip")) == ["whole"]


def test_another_column(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "a"}')
    assert list(Documents(tmp_path / "a.jsonl", column="content")) == ["a"]


def test_file_folder_and_glob(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        write_jsonl(tmp_path / name, [name])
    (tmp_path / "README.md").write_text("no text for training")
    monkeypatch.chdir(tmp_path)
    everything = ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert list(Documents(tmp_path)) == list(Documents(".")) == list(Documents("**/*.jsonl")) == everything
    assert list(Documents(str(tmp_path / "*.jsonl"))) == list(Documents("*.jsonl")) == everything[:2]
    assert list(Documents("deep/c.jsonl")) == everything[2:]


def test_a_name_with_the_signs_of_a_glob(tmp_path):
    write_jsonl(tmp_path / "part[1].jsonl", ["a"])
    assert list(Documents(tmp_path / "part[1].jsonl")) == ["a"]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_hold_every_document_once(opened, count):
    open_documents, texts = opened
    shares = [list(open_documents(share=(i, count))) for i in range(count)]
    assert Counter(itertools.chain(*shares)) == Counter(texts)
    assert all(share == [text for text in texts if text in share] for share in shares)  # in order
    assert sum(map(bool, shares)) == min(count, len(texts))


def test_files_of_one_record_are_shared_out(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    assert [list(Documents(tmp_path, share=(i, 4))) for i in range(4)] == [["a"], ["b"], ["c"], []]


@pytest.mark.parametrize("share", [(0, 1), (1, 2), (2, 3)])
def test_goes_on_from_every_position(opened, share):
    documents = opened[0](share=share)
    texts, positions = zip(*((document.text, document.following) for document in documents.iterate()), strict=True)
    assert list(documents) == list(texts)
    for number, position in enumerate(positions, 1):
        documents = opened[0](share=share)
        rest = list(documents.iterate(json.loads(json.dumps(position))))
        assert [document.text for document in rest] == list(texts[number:])
        for later, document in enumerate(rest, number + 1):  # and from where that iteration stood
            assert [each.text for each in documents.iterate(document.following)] == list(texts[later:])
    assert list(documents) == list(texts)


@pytest.mark.parametrize("ending", WRITERS)
def test_goes_on_past_empty_documents(tmp_path, ending):
    WRITERS[ending](tmp_path / f"a{ending}", TEXTS)
    whole = list(Documents(tmp_path).iterate())
    for number, document in enumerate(whole, 1):
        assert list(Documents(tmp_path).iterate(document.following)) == whole[number:]


def test_two_iterations_do_not_disturb_each_other(opened):
    documents = opened[0]()
    whole = list(documents.iterate())
    first = documents.iterate()
    begin = [next(first), next(first)]
    assert list(documents.iterate()) == whole
    assert begin + list(first) == whole  # positions too


def test_position_of_other_files(tmp_path):
    texts = corpus(tmp_path / "here", 2, 3)
    position = list(Documents(tmp_path / "here").iterate())[-1].following
    (tmp_path / "here" / "1.jsonl.zst").rename(tmp_path / "here" / "2.jsonl.zst")
    documents = Documents(tmp_path / "here")
    assert list(documents) == texts
    with pytest.raises(ValueError, match=r"'1.jsonl.zst'.*in none of the 2 files"):
        list(documents.iterate(position))
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", ["a"])
    with pytest.raises(ValueError, match="start from the beginning"):
        list(Documents("train", dataset=str(tmp_path / "set")).iterate(position))


class Worker(torch.utils.data.IterableDataset):
    def __init__(self, documents):
        self.documents = documents

    def __iter__(self):
        return iter(self.documents)


def test_a_worker_reads_what_the_process_does(opened):
    """`datasets` deals its records out among workers, which shares have done already."""
    documents = opened[0](share=(1, 3))
    loader = torch.utils.data.DataLoader(Worker(documents), batch_size=None, num_workers=2)
    assert Counter(loader) == Counter(2 * list(documents))


def test_a_large_file_is_not_held_in_memory(tmp_path):
    noise = random.Random(0)
    texts = [noise.randbytes(5000).hex() for _ in range(800)]  # 8 MB
    for ending, write in WRITERS.items():
        write(tmp_path / f"a{ending}", texts)
    for ending in WRITERS:
        tracemalloc.start()
        assert sum(1 for _ in Documents(tmp_path / f"a{ending}")) == 800
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3e6


def test_positions_are_reached_without_parsing(tmp_path, monkeypatch):
    write_zst(tmp_path / "a.jsonl.zst", [f"text {i}" for i in range(50)])
    position = list(Documents(tmp_path).iterate())[39].following
    calls = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda line: calls.append(line) or loads(line))
    assert [document.text for document in Documents(tmp_path).iterate(position)] == [f"text {i}" for i in range(40, 50)]
    assert len(calls) == 10
    assert len(list(Documents(tmp_path, share=(1, 5)))) == 10
    assert len(calls) == 20


BROKEN_LINES = {
    b"{'text': 'a'}": "it is no JSON",
    b'{"text": "a"': "it is no JSON",
    b"[" * 100_000: "nested too deeply",
    b'{"txt": "a", "id": 3}': "it has no 'text', only txt, id",
    b"{}": "it has no 'text', only nothing",
    b'["text"]': "it is no object with the key 'text', but list",
    b'{"text": null}': "the text is no string, but NoneType",
    b'{"text": 5}': "the text is no string, but int",
    b'{"text": "\xff"}': "can't decode byte 0xff",
    b'{"text": "\\ud800"}': "surrogates not allowed",
}


@pytest.mark.parametrize("line", BROKEN_LINES, ids=BROKEN_LINES.values())
def test_broken_lines(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["one", "two"]) + line + b"\n" + jsonl(["four"]) + line + b"\n" + jsonl(["six"]))
    write_jsonl(tmp_path / "b.jsonl", ["b"])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: .*on_broken='skip'") as raised:
        list(Documents(path))
    assert BROKEN_LINES[line] in str(raised.value)
    documents = Documents(tmp_path, on_broken="skip")
    with pytest.warns(UserWarning, match=r"2 broken records left out; the first is .*a\.jsonl, line 3") as caught:
        assert list(documents) == ["one", "two", "four", "six", "b"]
    assert (len(caught), documents.num_broken) == (2, 2)
    texts = iter(documents)
    with pytest.warns(UserWarning, match=r"a\.jsonl, line 3: .* It is left out, as more of that file") as caught:
        assert list(itertools.islice(texts, 3)) == ["one", "two", "four"]
    assert len(caught) == 1  # at once, and not for each
    assert BROKEN_LINES[line] in str(caught[0].message)
    with pytest.warns(UserWarning, match="2 broken records"):
        assert list(texts) == ["six", "b"]
    with pytest.warns(UserWarning, match="1 broken records"):  # of those read so far
        assert list(itertools.islice(Documents(tmp_path, on_broken="skip"), 3)) == ["one", "two", "four"]


def damaged(folder, ending):
    """A file that cannot be read to its end, and a good one; returns the texts and the damaged file."""
    texts = [f"{i} {i**9} {i**7}" for i in range(20_000)]
    path = folder / f"a{ending}"
    WRITERS[ending](path, texts)
    write_jsonl(folder / "b.jsonl", ["b"])
    return texts, path


@pytest.mark.parametrize("ending", [".jsonl.zst", ".jsonl.gz"])
@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_truncated_files(tmp_path, ending, kept):
    texts, path = damaged(tmp_path, ending)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"a\.jsonl\.\w+, line \d+: the file cannot be read from here on .*end"):
        list(Documents(path))
    documents = Documents(tmp_path, on_broken="skip")
    with pytest.warns(UserWarning, match="1 broken records left out"):
        *read, last = documents
    assert (last, documents.num_broken) == ("b", 1)
    assert read == texts[: len(read)]
    assert len(jsonl(read)) > kept * len(jsonl(texts)) - 1.5 * 2**17  # no more is lost than a compressed block
    # One of three shares meets the damage.
    shares = [Documents(tmp_path, on_broken="skip", share=(i, 3)) for i in range(3)]
    with pytest.warns(UserWarning, match="1 broken records left out"):
        assert Counter(itertools.chain(*shares)) == Counter([*read, "b"])
    assert sum(share.num_broken for share in shares) == 1


def test_a_truncated_file_of_several_frames(tmp_path):
    write_zst(tmp_path / "a.jsonl.zst", ["one", "two", "three"])
    content = (tmp_path / "a.jsonl.zst").read_bytes()
    (tmp_path / "a.jsonl.zst").write_bytes(content[:-3])
    with pytest.raises(ValueError, match=r"line 3: .*inside of a compressed frame"):
        list(Documents(tmp_path))


@pytest.mark.parametrize("ending", [".jsonl.zst", ".jsonl.gz", ".parquet"])
def test_files_of_another_kind(tmp_path, ending):
    (tmp_path / f"a{ending}").write_bytes(b"This is no such file. " * 20)
    write_jsonl(tmp_path / "b.jsonl", ["b"])
    with pytest.raises(ValueError, match=rf"a{ending}, \w+ 1: the file cannot be read"):
        list(Documents(tmp_path))
    with pytest.warns(UserWarning, match="1 broken"):
        assert list(Documents(tmp_path, on_broken="skip")) == ["b"]


def test_corrupt_parquet(tmp_path):
    texts, path = damaged(tmp_path, ".parquet")
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half : half + 2000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet, row \d+: the file cannot be read from here on"):
        list(Documents(path))
    with pytest.warns(UserWarning, match="1 broken records left out"):
        *read, last = Documents(tmp_path, on_broken="skip")
    assert (read, last) == (texts[: len(read)], "b")
    assert len(read) > 0.4 * len(texts)


@pytest.mark.parametrize(
    ("table", "message", "rest"),
    [
        ({"txt": ["a", "b"]}, "row 1: .*it has no 'text', only txt", []),
        ({"text": [1, 2]}, "row 1: the text is no string, but int", []),
        ({"text": ["a", None, "c"]}, "row 2: the text is no string, but NoneType", ["a", "c"]),
    ],
)
def test_broken_rows(tmp_path, table, message, rest):
    pyarrow.parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        list(Documents(tmp_path))
    with pytest.warns(UserWarning, match="broken records left out"):
        assert list(Documents(tmp_path, on_broken="skip")) == rest


def test_rows_that_are_no_utf8(tmp_path):
    column = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xfe"], pa.binary()).buffers())
    pyarrow.parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"row 2: .*can't decode byte 0xff"):
        list(Documents(tmp_path))


def test_text_file_that_is_no_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes("ä".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt, document 1: .*can't decode"):
        list(Documents(tmp_path))


def test_broken_records_of_the_hub(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(jsonl(["one"]) + b'{"text": null}\n' + jsonl(["three", " "]))
    with pytest.raises(ValueError, match=r"\(train\), record 2: the text is no string, but NoneType.*on_broken='skip'"):
        list(Documents("train", dataset=str(tmp_path)))
    documents = Documents("train", dataset=str(tmp_path), on_broken="skip")
    with pytest.warns(UserWarning, match="1 broken records left out"):
        assert list(documents) == ["one", "three"]
    assert (documents.num_broken, documents.num_empty) == (1, 1)
    with pytest.raises(ValueError, match="record 1: it has no 'body', only "):
        list(Documents("train", dataset=str(tmp_path), column="body"))


def test_a_failing_disk_is_no_broken_record(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    documents = Documents(tmp_path, on_broken="skip")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(FileNotFoundError):
        list(documents)


def test_no_files_and_wrong_arguments(tmp_path):
    for source in (tmp_path, tmp_path / "none.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(ValueError, match=r"there are no files .*expected a file, a folder or a glob of \.jsonl, "):
            Documents(source)
    (tmp_path / "a.csv").write_text("text\na\n")
    for source in (tmp_path / "a.csv", tmp_path / "*"):
        with pytest.raises(ValueError, match=r"a\.csv is none of the files that are read; expected \.jsonl"):
            Documents(source)
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(ValueError, match="on_broken = 'ignore'; expected 'raise' or 'skip'"):
        Documents(tmp_path, on_broken="ignore")
    for share in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="expected \\(i, n\\)"):
            Documents(tmp_path, share=share)
    with pytest.raises(ValueError, match="split"):
        Documents("no split", dataset=str(tmp_path))


def test_record(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("12345")
    record = Documents(tmp_path).record()
    assert record == {"files": {"a.jsonl": len(jsonl(["a"])), "deep/b.txt": 5}}
    hub = Documents("train", dataset=str(tmp_path / "deep")).record()
    origin = {"dataset": str(tmp_path / "deep"), "config": None, "revision": None, "split": "train"}
    assert hub == origin | {"num_shards": 1}


def test_configurations_of_the_hub(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", [name])
    entries = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    documents = Documents("train", dataset=str(tmp_path), dataset_config="two")
    assert list(documents) == ["two"]
    assert documents.record()["config"] == "two"
    with pytest.raises(ValueError, match="one"):  # there is no default
        Documents("train", dataset=str(tmp_path))
    with pytest.raises(ValueError, match="three"):
        Documents("train", dataset=str(tmp_path), dataset_config="three")


def test_revisions_of_the_hub(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "train.jsonl", ["a"])
    load, asked = datasets.load_dataset, []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **options: asked.append(options) or load(*a, **options))
    documents = Documents("train", dataset=str(tmp_path), dataset_revision="v1")
    assert (documents.record()["revision"], asked[0]["revision"]) == ("v1", "v1")
    for options in ({"dataset_revision": "v1"}, {"dataset_config": "one"}):
        with pytest.raises(ValueError, match="are of a dataset of the Hub; give its name, or leave them out"):
            Documents(tmp_path, **options)


def test_nothing_is_warned_of_without_cause(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(Documents(tmp_path, on_broken="skip")) == FULL
