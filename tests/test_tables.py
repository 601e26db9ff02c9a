"""Tables: the same numbers from every kind of file, and clear words for what is no table of numbers."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from training import tables
from training.tables import Rows, read_table

COLUMNS = {"a": [1.0, 2.0, 4.5], "b": [0.1, -3.0, 1e300], "y": [7.0, 8.0, 9.0]}


def csv(path, columns=COLUMNS):
    lines = [columns, *zip(*columns.values(), strict=True)]
    path.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    return path


def parquet(path, columns=COLUMNS):
    pa.parquet.write_table(pa.table(columns), path)
    return path


def npz(path, columns=COLUMNS):
    np.savez(path, **columns)
    return path


WRITERS = {"csv": csv, "parquet": parquet, "npz": npz}


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    return lambda columns=COLUMNS: WRITERS[request.param](tmp_path / f"table.{request.param}", columns)


def test_every_kind_of_file_gives_the_same_numbers(write):
    table = read_table(write(), ["y"])
    assert (table.inputs, table.targets) == (("a", "b"), ("y",))
    assert table.x.tolist() == [list(row) for row in zip(COLUMNS["a"], COLUMNS["b"], strict=True)]
    assert table.y.tolist() == [[value] for value in COLUMNS["y"]]


def test_columns_come_in_the_order_asked_for(write):
    table = read_table(write(), ["b", "y"], ["a"])
    assert table.x.tolist() == [[value] for value in COLUMNS["a"]]
    assert table.y[:, 0].tolist() == COLUMNS["b"]


def test_integers_are_numbers_and_truth_values_are_not(write):
    path = write({"a": [1, 2], "b": [True, False], "y": [3, 4]})
    assert read_table(path, ["y"], ["a"]).x.tolist() == [[1], [2]]
    with pytest.raises(ValueError, match=r"column 'b' is not numeric"):
        read_table(path, ["y"])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_of_many_blocks_is_read_whole(tmp_path, kind):
    rows = 150_000  # more than a block of either kind
    whole = {"a": np.arange(rows).tolist(), "y": (np.arange(rows) % 7).tolist()}
    whole["a"][-1] = 0.5  # no integer: no type is settled by the first block
    table = read_table(WRITERS[kind](tmp_path / f"table.{kind}", whole), ["y"])
    assert table.x[:, 0].tolist() == whole["a"]
    assert table.y[:, 0].tolist() == whole["y"]


def test_an_array_of_several_columns(tmp_path):
    x = np.random.default_rng(0).random((5, 3))
    table = read_table(npz(tmp_path / "table.npz", {"x": x, "y": x[:, 0]}), ["y"])
    assert table.inputs == ("x_0", "x_1", "x_2")
    assert np.array_equal(table.x, x)


def test_what_is_missing_is_named(write):
    with pytest.raises(ValueError, match=r"no column 'z'; its columns are a, b, y"):
        read_table(write(), ["z"])
    with pytest.raises(ValueError, match=r"no column 'c'"):
        read_table(write(), ["y"], ["a", "c"])
    with pytest.raises(ValueError, match=r"'y' is asked for 2 times"):
        read_table(write(), ["y"], ["a", "y"])
    with pytest.raises(ValueError, match=r"no columns are left"):
        read_table(write({"y": [1.0]}), ["y"])


def test_words_are_not_numbers(write):
    path = write(COLUMNS | {"b": ["low", "high", "low"]})
    with pytest.raises(ValueError, match=r"column 'b' is not numeric"):
        read_table(path, ["y"])
    assert read_table(path, ["y"], ["a"]).inputs == ("a",)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(write, value):
    with pytest.raises(ValueError, match=r"row 2 of column 'b' is (missing or not a number|inf)"):
        read_table(write(COLUMNS | {"b": [1.0, value, 2.0]}), ["y"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,y\n1,2\n,3\n", "row 2 of column 'a' is missing"),
        ("a,y\n1,2\n3\n", "cannot be read as a table of numbers"),
        ("a,y\n", "has no rows"),
        ("", "cannot be read as a table of numbers"),
        ("a,a,y\n1,2,3\n", "2 columns 'a'"),
    ],
)
def test_a_csv_file_that_is_no_table(tmp_path, text, message):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "table.csv", ["y"])


def test_a_word_late_in_a_csv_file(tmp_path):
    path = csv(tmp_path / "table.csv", {"a": [1.5] * 300_000 + ["word"], "y": [1] * 300_001})
    with pytest.raises(ValueError, match=r"cannot be read as a table of numbers.*'word'"):
        read_table(path, ["y"])


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"is none of \.csv, \.parquet, \.npz"):
        read_table(tmp_path / "table.xlsx", ["y"])
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "table.csv", ["y"])
    for kind in ("parquet", "npz"):
        path = tmp_path / f"broken.{kind}"
        path.write_bytes(b"PK\x03\x04 broken")
        with pytest.raises(ValueError, match="cannot be read as a table of numbers"):
            read_table(path, ["y"])
    with pytest.raises(ValueError, match="different lengths"):
        read_table(npz(tmp_path / "uneven.npz", {"a": np.ones(3), "y": np.ones(4)}), ["y"])
    with pytest.raises(ValueError, match="expected one or two dimensions"):
        read_table(npz(tmp_path / "deep.npz", {"a": np.ones((2, 2, 2)), "y": np.ones(2)}), ["y"])
    with pytest.raises(ValueError, match="allow_pickle"):
        read_table(npz(tmp_path / "objects.npz", {"a": np.array([None, 1]), "y": np.ones(2)}), ["y"])


def test_the_tensors_lie_in_a_file(tmp_path, monkeypatch):
    """So that memory does not grow with the table."""
    made = []
    monkeypatch.setattr(
        tables.np, "memmap", lambda *args, memmap=np.memmap, **kw: made.append(memmap(*args, **kw)) or made[0]
    )
    table = read_table(csv(tmp_path / "table.csv"), ["y"])
    for tensor in (table.x, table.y):
        assert tensor.untyped_storage().data_ptr() == made[0].ctypes.data
    assert list(tmp_path.iterdir()) == [tmp_path / "table.csv"]


def test_rows_read_many_at_a_time():
    x, y = torch.arange(6.0).view(3, 2), torch.arange(3)
    rows = Rows(x, y, torch.tensor([2, 0]))
    assert len(rows) == 2
    assert [item.tolist() for item in rows[1]] == [[0, 1], 0]
    assert [part.tolist() for part in rows.__getitems__([1, 0, 1])] == [[[0, 1], [4, 5], [0, 1]], [0, 2, 0]]
    with pytest.raises(ValueError, match="x has 3 rows and y has 2"):
        Rows(x, y[:2])


def test_every_reader_is_tested():
    assert [f".{kind}" for kind in WRITERS] == list(tables.READERS)
