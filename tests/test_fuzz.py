"""Every loader takes or refuses what it is fed; and the defects that fuzzing found stay mended."""

import gzip
import io
import json
import os
import signal
import subprocess
import zipfile

import h5py
import numpy as np
import pytest
import torch
import zstandard
from huggingface_hub.errors import StrictDataclassError
from safetensors.numpy import save_file

import leviathan
from eval import fuzz
from eval.fuzz_targets import Target, spoilt_bytes, targets
from training import documents, settings
from training.documents import Documents
from training.fields import FieldFile
from training.lbom import inspect
from training.settings import load_yaml, read_settings
from training.tables import read_table
from training.token_order import load_order

INPUTS = {"checkpoint": 20, "config": 100, "lbom": 60}  # those that take long; others 200


@pytest.fixture(autouse=True)
def restored():
    """What a trial changes in its process."""
    before = signal.getsignal(signal.SIGPROF)
    yield
    signal.signal(signal.SIGPROF, before)


@pytest.fixture
def in_limits(monkeypatch):
    """Without the limit of address space, which would fall on the threads of the test's process too."""
    monkeypatch.setattr(fuzz.resource, "setrlimit", lambda *limits: None)


@pytest.mark.parametrize("name", targets())
def test_loaders(name, tmp_path, in_limits):
    target = targets()[name]
    counts = fuzz.Counts(tmp_path / "counts")
    inputs = INPUTS.get(name, 200)
    trial = fuzz.Trial(target, tmp_path, counts)
    for seed, content in fuzz.seeds_of(target).items():
        assert trial(content, seed) == "loaded"
    fuzz.by_hypothesis(trial, target, inputs, seed=0)
    found = counts.read()
    assert found["inputs"] == inputs + len(fuzz.seeds_of(target))
    kept = [path.read_text() for path in (tmp_path / "kept").glob("*.txt") if not path.name.startswith("upstream")]
    assert not kept, kept[0]
    assert found["loaded"] + found["refused"] + found["upstream"] == found["inputs"]


# -- the fuzzer itself ------------------------------------------------------------------------------------------------


def broken(load, **options):
    return Target("broken", "input.bin", lambda folder: [("seed", b"0123456789")], load, spoilt_bytes, **options)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(None, "loaded"), (ValueError, "refused"), (MemoryError, "memory"), (KeyError, "upstream")],
)
def test_outcomes(error, outcome, tmp_path, in_limits):
    def load(path, seed):
        if error is not None:
            raise error("so")

    counts = fuzz.Counts(tmp_path / "counts")
    trial = fuzz.Trial(broken(load), tmp_path, counts)
    assert trial(b"a", "seed") == outcome
    assert {name: number for name, number in counts.read().items() if number} == {"inputs": 1, outcome: 1}
    assert len(list((tmp_path / "kept").glob("*.bin"))) == (outcome in ("memory", "upstream"))


def test_an_error_out_of_our_code_is_a_crash(tmp_path, in_limits):
    trial = fuzz.Trial(broken(lambda path, seed: load_yaml(3)), tmp_path, fuzz.Counts(tmp_path / "counts"))
    assert trial(b"a", "seed") == "crashes"


def test_a_loader_that_does_not_end_is_a_hang(tmp_path, in_limits, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)

    def load(path, seed):
        while True:
            pass

    assert fuzz.Trial(broken(load), tmp_path, fuzz.Counts(tmp_path / "counts"))(b"a", "seed") == "hangs"


def test_counts_outlive_their_process(tmp_path):
    fuzz.Counts(tmp_path / "counts").add("crashes", 3)
    assert fuzz.Counts(tmp_path / "counts").read()["crashes"] == 3


def test_a_process_that_dies_is_counted_and_another_goes_on(tmp_path, monkeypatch):
    """Of six inputs the second kills its process, and the fifth hangs it."""
    code = """
import mmap, os, struct, sys, time
folder, left = sys.argv[1], int(sys.argv[2])
with open(f"{folder}/counts", "r+b") as file:
    counts = mmap.mmap(file.fileno(), 0)
os.makedirs(f"{folder}/input", exist_ok=True)
for _ in range(left):
    number, loaded = struct.unpack_from("qq", counts)
    with open(f"{folder}/input/input.bin", "w") as file:
        file.write(str(number))
    struct.pack_into("q", counts, 0, number + 1)
    if number == 1:
        os.abort()
    if number == 4:
        time.sleep(60)
    struct.pack_into("q", counts, 8, loaded + 1)
"""

    def start(target, engine, inputs, seed, folder):
        return subprocess.Popen([fuzz.sys.executable, "-c", code, str(folder), str(inputs)], cwd=fuzz.ROOT)

    monkeypatch.setattr(fuzz, "_start", start)
    monkeypatch.setattr(fuzz, "PATIENCE", 1.5)
    row = fuzz.fuzz(broken(None), "hypothesis", 6, tmp_path / "kept")
    assert (row["inputs"], row["loaded"], row["crashes"], row["hangs"]) == (6, 4, 1, 1)
    assert row["kinds"] == ["crashes-exit-6-input.bin", "hangs-exit-9-input.bin"]
    assert (tmp_path / "kept" / "broken-hypothesis-crashes-exit-6-input.bin").read_text() == "1"


def test_every_input_has_its_engine():
    assert dict(fuzz.shares(1000, ["hypothesis", "atheris"])) == {"hypothesis": 50, "atheris": 950}
    assert dict(fuzz.shares(1000, ["hypothesis"])) == {"hypothesis": 1000}


def test_wrong_arguments_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        fuzz.main(["--out", str(tmp_path / "a.json"), "--only", "nothing"])
    assert "no target nothing; expected some of hdf5, config" in capsys.readouterr().err


# -- sizes that a file only claims ------------------------------------------------------------------------------------


def write_fields(path, **changed):
    with h5py.File(path, "w") as file:
        shapes = {"Vx": (1, 2, 4, 4), "Vy": (1, 2, 4, 4), "t-coordinate": 2, "x-coordinate": 4, "y-coordinate": 4}
        for name, shape in shapes.items():
            change = changed.get(name.replace("-", "_"))
            if change is None:
                file[name] = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
            else:
                change(file, name)
    return path


def empty(*shape, **options):
    return lambda file, name: file.create_dataset(name, shape, "f4", chunks=(1,) * len(shape), **options)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"Vx": empty(1, 2, 10**6, 10**6), "Vy": empty(1, 2, 10**6, 10**6)}, "more than any compression makes of it"),
        ({"Vx": empty(1, 10**12, 4, 4), "Vy": empty(1, 10**12, 4, 4), "t_coordinate": empty(10**12)}, "claims an arr"),
        ({"x_coordinate": empty(10**12)}, "expected 4 entries"),
        ({"Vx": empty(1, 2, 0, 4, maxshape=(1, 2, 9, 9))}, "expected one shape"),
        ({"Vx": lambda file, name: file.update({name: h5py.ExternalLink("/etc/passwd", "/Vx")})}, "Vx is a link"),
        ({"Vx": lambda file, name: file.update({name: h5py.SoftLink("/Vy")})}, "Vx is a link"),
        (
            {"Vx": lambda f, name: f.create_dataset(name, (1, 2, 4, 4), "f4", external=[("/etc/passwd", 0, 128)])},
            "are in other files",
        ),
        ({"Vx": lambda f, name: f.create_virtual_dataset(name, h5py.VirtualLayout((1, 2, 4, 4), "f4"))}, "other files"),
        ({"Vx": lambda file, name: file.update({name: "text"})}, "expected real numbers"),
        (
            {"Vx": lambda f, name: (f.create_dataset(name, (1, 2, 4, 4), "f4"), f.attrs.update(dt_save=[1, 2]))},
            "dt_save =",
        ),
    ],
)
def test_fields_of_false_sizes_and_links(tmp_path, changed, said):
    with pytest.raises(ValueError, match=said):
        FieldFile(write_fields(tmp_path / "a.hdf5", **changed))


def test_a_damaged_tree_of_names_is_an_os_error(tmp_path):
    path = write_fields(tmp_path / "a.hdf5")
    content = bytearray(path.read_bytes())
    content[content.index(b"TREE") : content.index(b"TREE") + 4] = b"FREE"
    path.write_bytes(content)
    with pytest.raises(OSError, match="the file is damaged"):
        FieldFile(path)


def test_arrays_of_false_sizes(tmp_path):
    path, header = tmp_path / "a.npz", io.BytesIO()
    claimed = {"descr": "<f8", "fortran_order": False, "shape": (9 * 10**12,)}
    np.lib.format.write_array_header_1_0(header, claimed)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("y.npy", header.getvalue() + bytes(24))
    with pytest.raises(ValueError, match=r"claims 72000000000000 in its array y\.npy"):
        read_table(path, ["y"])


def test_damaged_arrays_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.ones((3, 2)), y=np.arange(3.0))
    content = path.read_bytes()
    place = content.index(b"PK\x01\x02") + 10  # the kind of compression, in the directory
    path.write_bytes(content[:place] + b"\x63" + content[place + 1 :])
    with pytest.raises(ValueError, match="cannot be read as a table"):
        read_table(path, ["y"])


@pytest.mark.parametrize("ending", [".jsonl.zst", ".jsonl.gz", ".jsonl"])
def test_a_line_that_never_ends(tmp_path, monkeypatch, ending):
    """64 MiB of zeros are 2 kB of zstd. Only a part of them is ever unpacked."""
    monkeypatch.setattr(documents, "MAX_RECORD_BYTES", 2**18)
    packed = {".jsonl.zst": zstandard.compress, ".jsonl.gz": gzip.compress, ".jsonl": bytes}[ending]
    path = tmp_path / f"a{ending}"
    path.write_bytes(packed(b'{"text": "one"}\n' + bytes(2**22)))
    found = Documents(path)
    texts = iter(found)
    assert next(texts) == "one"
    with pytest.raises(ValueError, match="a line is longer than 262144 bytes"):
        next(texts)


def test_little_is_unpacked_at_a_time(tmp_path):
    """A block of 4 bytes can stand for 128 KiB: what is fed at a time bounds what comes out."""
    packed = zstandard.compress(bytes(2**28))
    assert len(packed) < 2**14
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packed)
    with path.open("rb") as file:
        assert max(map(len, documents._unpacked(file))) <= documents.PACKED_BYTES // 4 * 2**17


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "once its references are written out"),
        (
            BOMB.replace("[", "{<<: [").replace("]", "]}").replace("{<<: [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]}", "{x: 1}"),
            "written",
        ),
        ("[" * 5000, "nested too deeply"),
        ("&a [*a]", "nested too deeply, or in itself"),
        ("!!int ''", "none of its !!type"),
        ("!!bool maybe", "none of its !!type"),
        ("!!timestamp x", "none of its !!type"),
        ("!!python/object/apply:os.system [exit]", "is not YAML"),
        ("training: !!python/name:os.system x", "is not YAML"),
    ],
)
def test_hostile_yaml(tmp_path, text, said):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        load_yaml(path)


def test_settings_are_no_mountains(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("# " + "x" * settings.MAX_BYTES)
    with pytest.raises(ValueError, match="expected settings, of 1048576 at most"):
        load_yaml(path)
    path.write_text("3: {a: 1}")
    with pytest.raises(ValueError, match="unknown key 3"):
        read_settings(path, [], {"model": ["a"]})


def test_references_are_read_all_the_same(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert load_yaml(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


def test_a_count_of_cells_that_is_none(tmp_path):
    (tmp_path / "img").mkdir()
    for identity in (1, 2):
        (tmp_path / "img" / f"{identity}voxel").write_bytes(bytes([1] + 7 * [0]))
    (tmp_path / "count.json").write_text("1000000000000")
    with pytest.raises(ValueError, match="speaks of 1000000000000 cells"):
        inspect(tmp_path)
    (tmp_path / "count.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not JSON"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    "told", [{"base": 4}, {"base": "4", "num_digits": 2}, {"base": 4, "num_digits": 10**12}, [4, 2], {"base": 0}]
)
def test_an_order_of_digits_that_are_none(tmp_path, told):
    tensors = {"order": np.arange(16), "factors": np.ones((16, 2), np.float32)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"settings": json.dumps(told)})
    with pytest.raises(ValueError, match="base, num_digits"):
        load_order(tmp_path / "a.safetensors", 16)


@pytest.mark.parametrize(
    ("config", "given", "said"),
    [
        ("LeviathanConfig", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000; expected 1024 at most"),
        ("LeviathanConfig", {"embedding_num_digits": 10**12}, "embedding_num_digits"),
        ("LeviathanConfig", {"hidden_act": "none"}, "hidden_act"),
        ("LeviathanConfig", {"num_attention_heads": 0}, "num_attention_heads = 0"),
        ("LeviathanConfig", {"hidden_size": 2**30, "vocab_size": 2**30}, "fits no machine"),
        ("KhronosConfig", {"num_cells": 10**12}, "num_cells = 1000000000000"),
        ("KhronosConfig", {"input_high": [10**400]}, "input_high"),
        ("KhronosConfig", {"num_inputs": 3}, "num_inputs is computed"),
        ("VsnaConfig", {"axes": [{"name": "x", "low": 0, "high": 10**400}]}, "axes"),
        ("VsnaConfig", {"rank": 10**12}, "rank = 1000000000000"),
        ("SpanConfig", {"num_blocks": 10**6}, "num_blocks = 1000000"),
        ("SpanConfig", {"latent_dim": 2**31 - 1, "rank": 2**31 - 1}, "fits no machine"),
        ("SnaConfig", {"num_inputs": 1000, "interaction_order": 5}, "more than 65536 subsets"),
        ("SnaConfig", {"num_inputs": 10**12}, "num_inputs = 1000000000000"),
        ("SnaJanusConfig", {"latent_dim": 10**12}, "latent_dim = 1000000000000"),
        ("SnaJanusConfig", {"resolution": 2**30}, "fits no machine"),
    ],
)
def test_configurations_of_hostile_sizes(tmp_path, config, given, said):
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises((ValueError, StrictDataclassError), match=said):
        getattr(leviathan, config).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        {"patch_size": "4"},
        {"patch_size": 10**9},
        {"margin": None},
        {"low": "a", "high": 1},
        {"low": 0, "high": 10**400},
    ],
)
def test_tokenizers_of_hostile_sizes(given):
    with pytest.raises(ValueError, match=r"expected|range"):
        leviathan.FieldTokenizer(**given)


def test_a_checkpoint_that_claims_more_than_it_has(tmp_path):
    """The lengths in a header are held against the file; nothing is made room for."""
    model = leviathan.KhronosModel(leviathan.KhronosConfig(rank=2, num_cells=2))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes((2**60).to_bytes(8, "little") + content[8:])
    with pytest.raises(Exception, match=r"(?i)header"):
        leviathan.KhronosModel.from_pretrained(tmp_path)


class MakesFolder:
    """What a pickle of it would do once it is read by a reader that calls what it is told to."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_weights_that_an_index_names_run_no_code(tmp_path):
    """transformers confines an index neither to its folder nor to safetensors; other files it reads weights-only."""
    folder = tmp_path / "model"
    leviathan.KhronosModel(leviathan.KhronosConfig(rank=2, num_cells=2)).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"network.weights": MakesFolder(tmp_path / "made")}, tmp_path / "outside.bin")
    index = {"metadata": {}, "weight_map": {"network.weights": "../outside.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Exception, match=r"(?i)weights|unpickling"):
        leviathan.KhronosModel.from_pretrained(folder)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "spiral"}, "expected one of default, linear"),
        ({"rope_type": ["linear"]}, "expected one of default, linear"),
        ({"rope_theta": "a lot"}, "expected a number above 0"),
        ({"rope_theta": 0}, "expected a number above 0"),
    ],
)
def test_positions_that_cannot_be_built_are_refused(rope, message):
    with pytest.raises(StrictDataclassError, match=message):
        leviathan.LeviathanConfig(rope_parameters={"rope_theta": 1e4, "rope_type": "default"} | rope)
