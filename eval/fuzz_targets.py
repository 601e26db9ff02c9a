"""What `eval.fuzz` feeds: each loader of files with small valid ones, and how these are spoilt."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

REFUSED: tuple[type[Exception], ...] = (ValueError, OSError)  # as the loaders document

NUMBERS = (0, 1, -1, 2, 7, 64, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 10**12, 2**62, 2**63, 2**64, 10**30, 10**400)
WIDTHS = (1, 2, 4, 8)
HOSTILE = (*NUMBERS, *(-n for n in NUMBERS[3:]), 0.5, -0.5, 1e308, float("nan"), float("inf"), None, True, False)
HOSTILE += ("", "a", "1", "cp", "../../etc/passwd", "\ud800", "x" * 5000, [], {}, [[]], [0], [1e400], {"a": 1})


@dataclass(frozen=True)
class Target:
    """A loader under test.

    Attributes:
        name: For `--only`.
        file: The name under which inputs are written, in a folder of their own.
        seeds: Makes the valid files, as (name, content); the name's part before "/" may choose among loaders.
        load: Reads the file; the second argument is the seed's name.
        refused: What it may raise.
        spoilt: From a seed, the strategy of inputs.
        beside: Makes the files that lie in the same folder, unspoilt.
    """

    name: str
    file: str
    seeds: Callable[[Path], Iterable[tuple[str, bytes]]]
    load: Callable[[Path, str], object]
    spoilt: Callable[[bytes], SearchStrategy[bytes]]
    refused: tuple[type[Exception], ...] = REFUSED
    beside: Callable[[], dict[str, bytes]] = dict


def spoilt_bytes(seed: bytes, tokens: tuple[bytes, ...] = ()) -> SearchStrategy[bytes]:
    """Up to eight edits: a byte, a number in place of another, a cut, a piece doubled, a word from the format."""
    place = st.integers(0, max(0, len(seed) - 1))
    edits = [
        st.tuples(place, st.just(1), st.integers(0, 255).map(lambda value: bytes([value]))),
        st.tuples(place, st.integers(0, 64), st.just(b"")),
        st.builds(_number_edit, place, st.sampled_from(NUMBERS), st.sampled_from(WIDTHS), st.booleans()),
        st.builds(lambda start, size: (start, 0, seed[start : start + size]), place, st.integers(1, 64)),
    ]
    if tokens:
        edits.append(st.tuples(place, st.integers(0, 8), st.sampled_from(tokens)))
    whole = st.lists(st.one_of(edits), min_size=1, max_size=8).map(partial(_edited, seed))
    return st.one_of(whole, whole, whole, place.map(lambda end: seed[:end]))


def _number_edit(start: int, value: int, width: int, is_little: bool) -> tuple[int, int, bytes]:
    return start, width, (value % 2 ** (8 * width)).to_bytes(width, "little" if is_little else "big")


def _edited(seed: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    content = bytearray(seed)
    for start, size, new in edits:
        content[start : start + size] = new
    return bytes(content)


def spoilt_json(seed: bytes, tokens: tuple[bytes, ...] = ()) -> SearchStrategy[bytes]:
    """Values of a JSON text replaced, removed or wrapped; one in four by bytes."""
    content = json.loads(seed)
    paths = list(_paths(content))
    value = st.one_of(st.sampled_from(HOSTILE), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8))
    edit = st.tuples(st.sampled_from(paths), st.sampled_from(["set", "set", "set", "drop", "wrap", "repeat"]), value)
    whole = st.lists(edit, min_size=1, max_size=4).map(lambda edits: json.dumps(_changed(content, edits)).encode())
    return st.one_of(whole, whole, whole, spoilt_bytes(seed, (b"1e999", b"-0", b"NaN", b"[" * 2000, *tokens)))


def spoilt_yaml(seed: bytes) -> SearchStrategy[bytes]:
    """As JSON's, written as YAML; and the words that make YAML dangerous."""
    content = yaml.safe_load(seed)
    bomb = b"a: &a [1,1,1,1,1,1,1,1,1]\n" + b"".join(
        f"{name}: &{name} [{','.join(f'*{before}' for _ in range(9))}]\n".encode()
        for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
    )
    words = (bomb, b"!!python/object/apply:os.system [exit]", b"!!python/name:os.system", b"&a", b"*a", b"<<: *a")
    words += (
        b"[" * 3000,
        b"{a: " * 2000,
        b"? ",
        b"!!set",
        b"!!int ",
        b"!!bool ",
        b"!!timestamp ",
        b"!!float ",
        b"!!binary ",
        b"1:" * 500,
        b"0x",
        b"2001-99-99",
        b"\t",
        b"|",
    )
    paths = list(_paths(content))
    edit = st.tuples(st.sampled_from(paths), st.sampled_from(["set", "drop", "wrap"]), st.sampled_from(HOSTILE[:-12]))
    whole = st.lists(edit, min_size=1, max_size=3).map(lambda edits: yaml.dump(_changed(content, edits)).encode())
    return st.one_of(whole, spoilt_bytes(seed, words))


def _paths(content: Any, before: tuple = ()) -> Iterator[tuple]:
    if before:
        yield before
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield from _paths(value, (*before, key))


def _changed(content: Any, edits: list[tuple[tuple, str, Any]]) -> Any:
    content = json.loads(json.dumps(content))
    for path, kind, value in edits:
        inner = content
        try:
            for key in path[:-1]:
                inner = inner[key]
            old = inner[path[-1]]
            if kind == "drop":
                del inner[path[-1]]
            else:
                inner[path[-1]] = value if kind == "set" else [value, old] if kind == "wrap" else [old] * 20
        except (KeyError, IndexError, TypeError):  # an edit before took the place away
            continue
    return content


def _read(path: Path) -> bytes:
    return path.read_bytes()


# -- HDF5 -------------------------------------------------------------------------------------------------------------


def _hdf5_seeds(folder: Path) -> Iterator[tuple[str, bytes]]:
    import h5py

    for name, options in {"contiguous": {}, "chunked": {"chunks": (1, 1, 4, 4), "compression": "gzip"}}.items():
        path = folder / "seed.hdf5"
        with h5py.File(path, "w", libver="latest" if name == "chunked" else "earliest") as file:
            for key in ("Vx", "Vy"):
                file.create_dataset(key, data=np.ones((1, 2, 4, 4), np.float32), **options)
            for key, length in {"t": 3, "x": 4, "y": 4}.items():
                file[f"{key}-coordinate"] = np.arange(length, dtype=np.float32)
            file.attrs.update(synthetic=True, dt_save=0.5, settings="{}")
        yield name, path.read_bytes()


def _spoilt_hdf5(seed: bytes) -> SearchStrategy[bytes]:
    return st.one_of(spoilt_bytes(seed), spoilt_bytes(seed), spoilt_bytes(seed), _hostile_hdf5())


def _hostile_hdf5() -> SearchStrategy[bytes]:
    """Whole files, of sizes, types and references that are allowed in HDF5 and none that a field has."""
    size = st.sampled_from([0, 1, 2, 4, 4, 5, 10**5, 10**9, 10**12])
    kind = st.sampled_from(["f4", "f4", "f8", "i1", "u8", "S4", "c8", "bool", [("a", "f4")], "f2"])
    dataset = st.tuples(st.lists(size, min_size=0, max_size=5), kind, st.sampled_from(["lazy", "link", "virtual"]))
    names = st.sampled_from(["Vx", "Vy", "t-coordinate", "x-coordinate", "y-coordinate"])
    return st.dictionaries(names, dataset, min_size=1, max_size=3).map(_write_hdf5)


def _write_hdf5(changed: dict[str, tuple[list[int], Any, str]]) -> bytes:
    import io

    import h5py

    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        shapes = {"Vx": (1, 2, 4, 4), "Vy": (1, 2, 4, 4), "t-coordinate": (2,), "x-coordinate": (4,)}
        shapes["y-coordinate"] = (4,)
        for name, shape in shapes.items():
            if name not in changed:
                file[name] = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
                continue
            sizes, kind, how = changed[name]
            if how == "link":
                file[name] = h5py.ExternalLink("/etc/passwd", "/" + name)
                continue
            try:
                if how == "virtual":
                    layout = h5py.VirtualLayout(tuple(sizes), np.dtype(kind))
                    file.create_virtual_dataset(name, layout)
                else:
                    chunks = tuple(max(1, min(n, 4)) for n in sizes) or None
                    file.create_dataset(name, tuple(sizes), np.dtype(kind), chunks=chunks)
            except (ValueError, TypeError, OSError):  # not even HDF5 allows that
                file[name] = 0.0
    return content.getvalue()


def _load_hdf5(path: Path, seed: str) -> None:
    from training.fields import FieldFile, data_record

    with FieldFile(path) as fields:
        data_record(fields)
        fields.snapshot(0, 0)


# -- models' configurations, checkpoints and tokenizers ---------------------------------------------------------------


def _classes() -> dict[str, tuple[type, type, dict[str, Any]]]:
    import leviathan

    small = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "embedding_base": 8, "embedding_seed_dim": 4, "embedding_rank": 2}
    axes = [{"name": "x", "low": 0.0, "high": 1.0, "num_cells": 4}, {"name": "t", "low": 0.0, "high": 1.0}]
    janus = {"resolution": 4, "channels": [2], "latent_dim": 2, "head_rank": 2, "num_codes": 2}
    return {
        "leviathan": (leviathan.LeviathanConfig, leviathan.LeviathanForCausalLM, small),
        "khronos": (leviathan.KhronosConfig, leviathan.KhronosModel, {"rank": 2, "num_cells": 2}),
        "vsna": (leviathan.VsnaConfig, leviathan.VsnaModel, {"axes": axes, "rank": 2}),
        "span": (leviathan.SpanConfig, leviathan.SpanModel, {"latent_dim": 2, "rank": 2, "num_cells": 2}),
        "sna": (leviathan.SnaConfig, leviathan.SnaModel, {"num_inputs": 2, "num_cells": 2, "rank": 2}),
        "janus": (leviathan.SnaJanusConfig, leviathan.SnaJanusModel, janus),
    }


def _config_seeds(folder: Path) -> Iterator[tuple[str, bytes]]:
    for name, (config, _, options) in _classes().items():
        found = json.loads(config(**options).to_json_string(use_diff=False))
        own = {*config.__annotations__, "model_type"}  # transformers' own fields are not ours to check
        yield name, json.dumps({key: value for key, value in found.items() if key in own}).encode()


def _load_config(path: Path, seed: str) -> None:
    config, model, _ = _classes()[seed]
    given = config.from_json_file(path)
    with torch.device("meta"):  # as from_pretrained builds it, before it looks at the weights
        model(given)


def _checkpoint_seeds(folder: Path) -> Iterator[tuple[str, bytes]]:
    config, model, options = _classes()["khronos"]
    model(config(**options)).save_pretrained(folder / "khronos")
    yield "khronos", (folder / "khronos" / "model.safetensors").read_bytes()


def _load_checkpoint(path: Path, seed: str) -> None:
    _, model, _ = _classes()[seed]
    model.from_pretrained(path.parent)


def _checkpoint_files() -> dict[str, bytes]:
    config, _, options = _classes()["khronos"]
    return {"config.json": config(**options).to_json_string().encode()}


def _order_seeds(folder: Path) -> Iterator[tuple[str, bytes]]:
    from training.token_order import save_order

    settings = {"base": 4, "num_digits": 2}
    save_order(folder / "order.safetensors", np.arange(16), np.ones((16, 2)), settings)
    yield "order", _read(folder / "order.safetensors")


def _load_order(path: Path, seed: str) -> None:
    from training.token_order import load_order

    load_order(path, 16)


def _spoilt_safetensors(seed: bytes) -> SearchStrategy[bytes]:
    """Its JSON header, with a length that is right or is not; and bytes."""
    length = int.from_bytes(seed[:8], "little")
    header, body = seed[8 : 8 + length], seed[8 + length :]
    sizes = st.one_of(st.none(), st.none(), st.none(), st.sampled_from(NUMBERS))

    def join(new: bytes, size: int | None) -> bytes:
        return ((len(new) if size is None else size) % 2**64).to_bytes(8, "little") + new + body

    words = (b"F64", b"BF16", b"I64", b"BOOL", b"[1000000000000]", b"data_offsets", b"__metadata__")
    return st.one_of(st.builds(join, spoilt_json(header), sizes), spoilt_bytes(seed, words))


def _tokenizer_seeds(folder: Path) -> Iterator[tuple[str, bytes]]:
    from leviathan import FieldTokenizer

    for name, order in {"raster": "raster", "hilbert": "hilbert"}.items():
        FieldTokenizer(patch_size=4, num_bits=4, base=4, low=0.0, high=1.0, order=order).save_pretrained(folder / name)
        yield name, _read(folder / name / "preprocessor_config.json")


def _load_tokenizer(path: Path, seed: str) -> None:
    from leviathan import FieldTokenizer

    tokenizer = FieldTokenizer.from_json_file(path)
    tokenizer(np.zeros((tokenizer.patch_size,) * 2)) if tokenizer.patch_size <= 8 else None


# -- settings, tables, documents, measurements ------------------------------------------------------------------------


def _yaml_seeds(folder: Path) -> Iterator[tuple[str, bytes]]:
    yield "run", b"training:\n  max_steps: 10\n  learning_rate: 3e-4\nmodel:\n  arms: [{a: 1}, b]\n  hidden_size: 64\n"
    yield "merged", b"model: &m {hidden_size: 8, arms: [1, 2]}\ntraining: {max_steps: 1, <<: {learning_rate: 1e-3}}\n"


def _load_yaml(path: Path, seed: str) -> None:
    from training.settings import read_settings

    allowed = {"training": ["max_steps", "learning_rate"], "model": ["arms", "hidden_size"]}
    read_settings(path, [], allowed)


def _csv_seeds(folder: Path) -> Iterator[tuple[str, bytes]]:
    yield "plain", b"a,b,y\n1,2,3\n4.5,-6e3,7\n0,0,1\n"
    yield "quoted", b'"a","b, c",y\r\n1,2,"3"\r\n0,5,6\r\n'


CSV_WORDS = (b",", b'"', b"\n", b"\r", b"1e999", b"nan", b"inf", b"-", b"\xef\xbb\xbf", b"\x00", b"," * 3000, b'"' * 99)
CSV_WORDS += (b"9" * 5000, b"2020-01-01", b"true", b"y", b"a,a", b"\xff\xfe")


def _table_seeds(folder: Path) -> Iterator[tuple[str, bytes]]:
    import pyarrow
    from pyarrow import parquet

    columns = {"a": [1.0, 2.0, 3.0], "b": [1, 2, 3], "y": [0.5, 1.5, 2.5]}
    for name, options in {"plain": {"compression": "none"}, "packed": {"compression": "zstd"}}.items():
        parquet.write_table(pyarrow.table(columns), folder / "table.parquet", **options)
        yield name, _read(folder / "table.parquet")


def _npz_seeds(folder: Path) -> Iterator[tuple[str, bytes]]:
    for name, write in {"plain": np.savez, "packed": np.savez_compressed}.items():
        write(folder / "table.npz", x=np.ones((3, 2)), y=np.arange(3.0))
        yield name, _read(folder / "table.npz")


def _load_table(path: Path, seed: str) -> None:
    from training.tables import read_table

    read_table(path, ["y"])


LINES = b'{"text": "one"}\n{"text": "two \\u00e9"}\n\n{"text": "three", "meta": {"a": [1, 2]}}\n'
LINE_WORDS = (
    b"[" * 5000,
    b'{"text":' * 3000,
    b'"\\ud800"',
    b"\n",
    b"NaN",
    b"9" * 5000,
    b"\xff",
    b'{"text": 1}',
    b"null",
)


def _jsonl_seeds(folder: Path) -> Iterator[tuple[str, bytes]]:
    yield "lines", LINES


def _zstd_seeds(folder: Path) -> Iterator[tuple[str, bytes]]:
    import zstandard

    yield "lines", zstandard.compress(LINES) + zstandard.compress(LINES)
    yield "bomb", zstandard.ZstdCompressor(write_checksum=True).compress(bytes(2**20))


def _gzip_seeds(folder: Path) -> Iterator[tuple[str, bytes]]:
    import gzip

    yield "lines", gzip.compress(LINES, mtime=0) + gzip.compress(LINES, mtime=0)
    yield "bomb", gzip.compress(bytes(2**20), mtime=0)


def _rows_seeds(folder: Path) -> Iterator[tuple[str, bytes]]:
    import pyarrow
    from pyarrow import parquet

    for name, options in {"plain": {"compression": "none"}, "packed": {"compression": "zstd"}}.items():
        table = pyarrow.table({"text": ["one", "two", "three"], "n": [1, 2, 3]})
        parquet.write_table(table, folder / "rows.parquet", **options)
        yield name, _read(folder / "rows.parquet")


def _load_documents(path: Path, seed: str) -> None:
    import warnings

    from training.documents import Documents

    with warnings.catch_warnings():  # of what is left out
        warnings.simplefilter("ignore")
        for _ in Documents(path, on_broken="skip"):
            pass


def _lbom_seeds(folder: Path) -> Iterator[tuple[str, bytes]]:
    yield "count", b'{"count": 2}'
    yield "listed", b'["1", "2"]'


def _load_lbom(path: Path, seed: str) -> None:
    from training.lbom import inspect

    inspect(path.parent)


def _lbom_files() -> dict[str, bytes]:
    return {f"img/{identity}voxel": bytes([1] + 7 * [0]) for identity in (1, 2)}


def targets() -> dict[str, Target]:
    """All, by name."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    # transformers' own, of settings that are none, of weights that do not fit a model, of a file that is none.
    of_settings = (*REFUSED, StrictDataclassError)
    of_checkpoints = (*REFUSED, RuntimeError, SafetensorError)
    found = [
        Target("hdf5", "input.hdf5", _hdf5_seeds, _load_hdf5, _spoilt_hdf5),
        Target("config", "config.json", _config_seeds, _load_config, spoilt_json, of_settings),
        Target("safetensors", "order.safetensors", _order_seeds, _load_order, _spoilt_safetensors),
        Target(
            "checkpoint",
            "model.safetensors",
            _checkpoint_seeds,
            _load_checkpoint,
            _spoilt_safetensors,
            of_checkpoints,
            _checkpoint_files,
        ),
        Target("preprocessor", "preprocessor_config.json", _tokenizer_seeds, _load_tokenizer, spoilt_json, of_settings),
        Target("yaml", "input.yaml", _yaml_seeds, _load_yaml, spoilt_yaml),
        Target("csv", "input.csv", _csv_seeds, _load_table, partial(spoilt_bytes, tokens=CSV_WORDS)),
        Target("parquet", "input.parquet", _table_seeds, _load_table, spoilt_bytes),
        Target("npz", "input.npz", _npz_seeds, _load_table, partial(spoilt_bytes, tokens=NPY_WORDS)),
        Target("jsonl", "input.jsonl", _jsonl_seeds, _load_documents, partial(spoilt_bytes, tokens=LINE_WORDS)),
        Target("jsonl.zst", "input.jsonl.zst", _zstd_seeds, _load_documents, spoilt_bytes),
        Target("jsonl.gz", "input.jsonl.gz", _gzip_seeds, _load_documents, spoilt_bytes),
        Target("documents", "input.parquet", _rows_seeds, _load_documents, spoilt_bytes),
        Target("lbom", "count.json", _lbom_seeds, _load_lbom, spoilt_json, beside=_lbom_files),
    ]
    return {target.name: target for target in found}


NPY_WORDS = (b"'|O'", b"(10000000000,)", b"'<f8'", b"True", b"(3, 999999999)", b"'V8'")
