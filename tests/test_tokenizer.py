"""The byte-level BPE: any text comes back, ids are where they should be, tiktoken's encodings cut as tiktoken does."""

import base64
import hashlib
import json

import datasets
import pytest
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from training import tokenizer
from training.tokenizer import O200K_SHA256, O200K_SPECIAL, load_tokenizer, main, num_ids, train_bpe

TEXTS = [
    "the flow turns and falls apart",
    "into eddies of every size",
    "the flow's energy doesn't end: 1234 x\n\n y",
] * 3
RANKS = {bytes([value]): value for value in range(256)} | {
    merge: 256 + index
    for index, merge in enumerate([b"th", b"the", b" the", b"12", b"\n\n", b"'s", b"\xc3\xa9", b"  "])
}


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def tiktoken_file(tmp_path_factory):
    return write_ranks(tmp_path_factory.mktemp("ranks") / "small.tiktoken", RANKS)


@pytest.fixture
def small_o200k(monkeypatch, tiktoken_file):
    """The encoding with few ranks: what is behind them moves up."""
    offset = len(RANKS) - 199_998
    special = {id_ + offset: token for id_, token in O200K_SPECIAL.items()}
    monkeypatch.setattr(tokenizer, "O200K_SPECIAL", special)
    monkeypatch.setattr(tokenizer, "O200K_SHA256", hashlib.sha256(tiktoken_file.read_bytes()).hexdigest())
    return special


@pytest.fixture(scope="module")
def converted(tiktoken_file):
    return load_tokenizer(tiktoken_file)


def write_ranks(path, ranks):
    path.write_bytes(b"\n".join(base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()))
    return path


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"content": text}) for text in TEXTS))
    return path


def test_special_tokens_and_bytes_come_first(bpe):
    assert isinstance(bpe, PreTrainedTokenizerFast)
    assert (bpe.bos_token_id, bpe.eos_token_id, bpe.pad_token_id) == (0, 0, 1)
    assert (bpe.bos_token, bpe.pad_token, len(bpe)) == ("<|endoftext|>", "<|padding|>", 300)
    assert bpe.all_special_ids == [0, 1]
    assert {len(token) for token in bpe.convert_ids_to_tokens(range(2, 258))} == {1}
    assert len(bpe("the")["input_ids"]) == 1
    assert bpe("the")["input_ids"] != bpe(" the")["input_ids"]  # no space is put before a text


def test_a_text_is_split_as_gpt2_does(bpe):
    tokens = bpe.tokenize("the flow's 12\n\n  end")
    cuts = [len(bpe.tokenize(part)) for part in ("the", " flow", "'s", " 12", "\n\n ", " end")]
    assert sum(cuts) == len(tokens)


@given(st.text())
def test_any_text_comes_back(bpe, converted, text):
    for each in (bpe, converted):
        assert each.decode(each(text)["input_ids"]) == text


@pytest.mark.parametrize("size", [258, 259, 280])
def test_vocabulary_size_is_met(size):
    assert len(train_bpe(TEXTS, size)) == size


def test_too_small_a_vocabulary():
    with pytest.raises(ValueError, match=r"vocab_size = 257; expected at least 258"):
        train_bpe(TEXTS, 257)


def test_too_small_a_corpus():
    with pytest.warns(UserWarning, match=r"pairs for 260 tokens, not for vocab_size = 400"):
        assert len(train_bpe(["ab ab"], 400)) == 260  # ab, and with a space before it


def test_command(corpus, tmp_path):
    out = tmp_path / "made" / "tokenizer"
    flags = ["--train", str(corpus), "--column", "content", "--vocab-size", "270", "--out", str(out)]
    main(flags)
    assert {file.name for file in out.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer_training.json",
    }
    loaded, expected = AutoTokenizer.from_pretrained(out), train_bpe(TEXTS, 270)
    assert loaded.get_vocab() == expected.get_vocab() == load_tokenizer(out).get_vocab()
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 0, 1)
    assert json.loads((out / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    record = json.loads((out / "tokenizer_training.json").read_text())
    assert (record["train"], record["num_documents"]) == ("texts.jsonl", len(TEXTS))
    assert record["num_characters"] == sum(map(len, TEXTS))
    assert (record["num_broken"], record["num_empty"]) == (0, 0)
    main([*flags, "--max-documents", "2"])  # over the one before
    assert AutoTokenizer.from_pretrained(out).get_vocab() == train_bpe(TEXTS[:2], 270).get_vocab()
    assert [path.name for path in out.parent.iterdir()] == ["tokenizer"]


@pytest.mark.filterwarnings("ignore:.* It is left out:UserWarning")
def test_command_skips_broken_records(corpus, tmp_path):
    out = tmp_path / "tokenizer"
    corpus.write_text(corpus.read_text() + '\n{]\n{"content": " "}\n')
    flags = ["--train", str(corpus), "--column", "content", "--vocab-size", "270", "--out", str(out)]
    with pytest.raises(SystemExit, match=r"line 10: it is no JSON"):
        main(flags)
    with pytest.warns(UserWarning, match="1 broken records left out"):
        main([*flags, "--on-broken", "skip"])
    record = json.loads((out / "tokenizer_training.json").read_text())
    assert (record["num_documents"], record["num_broken"], record["num_empty"]) == (len(TEXTS), 1, 1)


def test_command_reads_datasets(corpus, tmp_path, monkeypatch):
    asked = []
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **options: asked.append((a, options)) or load(a[0], **options)
    )
    flags = ["--train", "train", "--dataset", str(tmp_path), "--dataset-config", "one", "--dataset-revision", "v1"]
    main([*flags, "--column", "content", "--vocab-size", "270", "--out", str(tmp_path / "tokenizer")])
    assert asked == [((str(tmp_path), "one"), {"split": "train", "revision": "v1", "streaming": True})]
    record = json.loads((tmp_path / "tokenizer" / "tokenizer_training.json").read_text())
    assert (record["dataset_config"], record["dataset_revision"]) == ("one", "v1")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--train": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"--column": "text"}, "text"),
        ({"--max-documents": "0"}, "holds no text"),
        ({"--dataset-config": "one"}, "dataset_config = 'one'"),
        ({"--vocab-size": "100"}, "vocab_size = 100"),
    ],
)
@pytest.mark.filterwarnings("ignore:the texts have pairs")
def test_command_refuses(corpus, tmp_path, changed, message):
    out = tmp_path / "tokenizer"
    flags = {"--train": str(corpus), "--column": "content", "--vocab-size": "270", "--out": str(out)} | changed
    with pytest.raises(SystemExit, match=message):
        main([part for pair in flags.items() for part in pair])
    assert not out.exists()


def test_no_such_tokenizer(tmp_path):
    with pytest.raises(OSError, match="no folder with a tokenizer"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "nothing.tiktoken")


@given(st.text(alphabet=st.one_of(st.sampled_from("the 12é's\n\t/.T"), st.characters(exclude_categories=["Cs"]))))
def test_ranks_are_applied_as_tiktoken_does(converted, text):
    encoding = tiktoken.Encoding(
        "small", pat_str=tokenizer.O200K_PATTERN, mergeable_ranks=RANKS, special_tokens={}, explicit_n_vocab=len(RANKS)
    )
    assert converted(text)["input_ids"] == encoding.encode_ordinary(text)


def test_special_tokens_follow_the_ranks(converted, tmp_path):
    assert (converted.bos_token_id, converted.eos_token_id, converted.pad_token_id) == (264, 264, 265)
    assert len(converted) == len(RANKS) + 2
    converted.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == converted.get_vocab()


def test_o200k_is_that_of_tiktoken(monkeypatch, small_o200k, tiktoken_file, tmp_path):
    asked = []
    for module in (tiktoken_ext.openai_public, tokenizer):
        monkeypatch.setattr(
            module, "load_tiktoken_bpe", lambda url, expected_hash: asked.append((url, expected_hash)) or RANKS
        )
    theirs = tiktoken_ext.openai_public.o200k_base()
    assert theirs["pat_str"] == tokenizer.O200K_PATTERN
    ours = {token: id_ for id_, token in O200K_SPECIAL.items()}
    assert ours == theirs["special_tokens"] | {"<|padding|>": max(theirs["special_tokens"].values()) + 1}
    found = load_tokenizer("o200k_base")
    assert asked == [(tokenizer.O200K_URL, O200K_SHA256), (tokenizer.O200K_URL, tokenizer.O200K_SHA256)]
    vocabulary = found.get_vocab()
    assert small_o200k.items() <= {id_: token for token, id_ in vocabulary.items()}.items()
    assert sorted(vocabulary.values()) == list(range(num_ids(found))) == list(range(len(RANKS) + 22))
    assert sum(token.startswith("<|reserved_") for token in vocabulary) == 1 + 18
    assert (found.eos_token, found.eos_token_id) == (found.bos_token, found.bos_token_id)
    assert (found.eos_token_id, found.pad_token_id) == (len(RANKS) + 1, len(RANKS) + 21)
    assert load_tokenizer(tiktoken_file).get_vocab() == vocabulary  # a file that holds the same
    found.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == vocabulary


def test_ids_are_counted_to_the_greatest():
    gaps = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a")))
    assert (len(gaps), num_ids(gaps)) == (2, 8)
    gaps.add_tokens(["c"])
    assert num_ids(gaps) == max(gaps.get_vocab().values()) + 1 >= 8


def test_o200k_out_of_reach(monkeypatch):
    def unreachable(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(tokenizer, "load_tiktoken_bpe", unreachable)
    with pytest.raises(OSError, match=r"download https://\S+o200k_base\.tiktoken elsewhere and give the path"):
        load_tokenizer("o200k_base")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>not found</html>\n", "line 1"),
        (b"dGhl one\n", "line 1"),
        (b"dGhl 0\nd*hl 1", "line 2"),
        (b"dGhl 0\ndGg= 2\n", "without a gap"),
        (b"", "holds 0 tokens"),
    ],
)
def test_damaged_ranks(tmp_path, content, message):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


def test_a_changed_file_is_read_anew(tmp_path):
    path = write_ranks(tmp_path / "ranks.tiktoken", RANKS)
    assert len(load_tokenizer(path)("the")["input_ids"]) == 1
    write_ranks(path, dict(list(RANKS.items())[:257]))
    assert len(load_tokenizer(path)("the")["input_ids"]) == 2
