"""Trains a byte-level BPE on documents, and reads tokenizers of others.

    python -m training.tokenizer --train data/train.jsonl.zst --vocab-size 32768 --out runs/tokenizer

Every byte is a token, so that any text can be written and comes back as it was.
"""

import argparse
import base64
import binascii
import hashlib
import itertools
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tiktoken.load import load_tiktoken_bpe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from training.documents import Documents
from training.provenance import provenance, relative, write_json

SEPARATOR, PADDING = "<|endoftext|>", "<|padding|>"
SMALLEST_VOCABULARY = 2 + 256  # those two and the bytes

O200K_NAME = "o200k_base"
O200K_URL = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
O200K_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
# As in tiktoken, which leaves the ids before them free; padding, which it has not, is ours.
O200K_SPECIAL = {199_999: SEPARATOR, 200_018: "<|endofprompt|>", 200_019: PADDING}
# How the encoding cuts a text before merges; tiktoken gives it only together with the ranks, which it downloads.
O200K_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def train_bpe(texts: Iterable[str], vocab_size: int, *, progress: bool = False) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE that splits text as GPT-2's does, without a space put before it.

    Ids 0 and 1 are `<|endoftext|>` (bos and eos) and `<|padding|>`, the bytes follow, then the merges in the order in
    which they were learned. A corpus with too few different pairs gives fewer tokens, and a warning.

    Raises:
        ValueError: If `vocab_size` leaves no room for the two special tokens and the bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size = {vocab_size}; expected at least {SMALLEST_VOCABULARY}: 2 special tokens and 256 bytes."
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    bpe.train_from_iterator(texts, trainer)
    found = bpe.get_vocab_size()
    if found < vocab_size:
        warnings.warn(
            f"the texts have pairs for {found} tokens, not for vocab_size = {vocab_size}; train on more text, or take "
            "the smaller vocabulary.",
            stacklevel=2,
        )
    return _with_special_tokens(bpe)


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """The greatest id and one more: what a model's `vocab_size` must be at least.

    It is more than the number of tokens, `len(tokenizer)`, where no token has some of the ids between.
    """
    return max(tokenizer.get_vocab().values()) + 1


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer of a folder or of the Hub, or one of tiktoken's.

    `o200k_base` is fetched, or taken from where tiktoken keeps what it fetched, or is a file `*.tiktoken` that holds
    the same. All its ids are those of tiktoken, where the free ones are `<|reserved_...|>`; `<|padding|>` follows them.
    Another file `*.tiktoken` is cut as that encoding is. Its ids are the ranks, followed by `<|endoftext|>` and
    `<|padding|>`. The first is bos and eos.

    Raises:
        ValueError: If such a file is damaged.
        OSError: If there is no such tokenizer, or it cannot be fetched.
    """
    name = str(name_or_path)
    if name == O200K_NAME:
        try:
            return _from_ranks(load_tiktoken_bpe(O200K_URL, O200K_SHA256), is_o200k=True)
        except OSError as error:
            raise OSError(
                f"{O200K_NAME} cannot be fetched ({type(error).__name__}); download {O200K_URL} elsewhere and give the "
                "path of that file instead of the name."
            ) from error
    if name.endswith(".tiktoken"):
        content = Path(name).read_bytes()
        return _from_ranks(_read_ranks(content, name), is_o200k=hashlib.sha256(content).hexdigest() == O200K_SHA256)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{name} is no folder with a tokenizer, and the Hub gave none of that name ({error}); "
            f"`python -m training.tokenizer --out {name}` makes one."
        ) from error


class _FromRanks(TikTokenConverter):
    """transformers' own converter, of ranks that are read already."""

    def __init__(self, ranks: dict[bytes, int], special_tokens: list[str]):
        super().__init__(pattern=O200K_PATTERN, extra_special_tokens=special_tokens)
        self.ranks = ranks

    def load_tiktoken_bpe(self, tiktoken_url: None) -> dict[bytes, int]:
        return self.ranks


def _from_ranks(ranks: dict[bytes, int], is_o200k: bool) -> PreTrainedTokenizerFast:
    special_tokens = [SEPARATOR, PADDING]
    if is_o200k:  # added tokens take the ids after the ranks one by one, so that none may be left out
        ids = range(len(ranks), max(O200K_SPECIAL) + 1)
        special_tokens = [O200K_SPECIAL.get(id_, f"<|reserved_{id_}|>") for id_ in ids]
    return _with_special_tokens(_FromRanks(ranks, special_tokens).converted())


def _read_ranks(content: bytes, path: str) -> dict[bytes, int]:
    # tiktoken's own reader would keep a copy of the file, and give that once the file is another.
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{path}, line {number}: {line[:80]!r}; expected a token in base64 and its rank. Download it again."
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise ValueError(f"{path} holds {len(ranks)} tokens, not ranks from 0 on without a gap; download it again.")
    return ranks


def _with_special_tokens(bpe: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    folder.mkdir(parents=True, exist_ok=True)
    for file in partial.iterdir():
        file.replace(folder / file.name)
    partial.rmdir()


def main(arguments: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="files, folder or glob; with --dataset, one of its splits")
    parser.add_argument("--dataset", help="name on the Hub")
    parser.add_argument("--dataset-config", help="name of one of its configurations")
    parser.add_argument("--dataset-revision", help="branch, tag or commit of it")
    parser.add_argument("--column", default="text", help="name of the text in a record")
    parser.add_argument("--on-broken", choices=["raise", "skip"], default="raise", help="records that cannot be read")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--max-documents", type=int, help="the first ones only")
    known = parser.parse_args(arguments)
    counted = {"num_documents": 0, "num_characters": 0, "num_broken": 0, "num_empty": 0}

    def texts() -> Iterator[str]:
        documents = Documents(
            known.train,
            dataset=known.dataset,
            dataset_config=known.dataset_config,
            dataset_revision=known.dataset_revision,
            column=known.column,
            on_broken=known.on_broken,
        )
        for text in tqdm(itertools.islice(documents, known.max_documents), unit=" documents", disable=None):
            counted["num_documents"] += 1
            counted["num_characters"] += len(text)
            yield text
        counted.update(num_broken=documents.num_broken, num_empty=documents.num_empty)

    try:
        tokenizer = train_bpe(texts(), known.vocab_size, progress=True)
        if not counted["num_documents"]:
            raise ValueError(f"{known.train} holds no text in the column {known.column!r}.")
        _save(tokenizer, known.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    source = known.train if known.dataset else relative(known.train)
    record: dict[str, Any] = {
        "train": source,
        "dataset": known.dataset,
        "dataset_config": known.dataset_config,
        "dataset_revision": known.dataset_revision,
        "vocab_size": len(tokenizer),
        **counted,
    }
    write_json(known.out / "tokenizer_training.json", record | {"provenance": provenance()})
    print(f"{len(tokenizer):,} tokens from {counted['num_documents']:,} documents in {known.out}")
    return tokenizer


if __name__ == "__main__":
    main()
