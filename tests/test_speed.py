import json
import math

import pytest
import torch

from eval.speed import __main__ as speed
from eval.speed.embedding import fast_pass, oracle_pass
from eval.speed.measure import (
    CannotRunError,
    Ceilings,
    Check,
    Figure,
    Section,
    Setup,
    Target,
    Work,
    alternate,
    difference,
    peak_mebibytes,
)
from eval.speed.tokens import field_pairs, frequent_ids, text_batch

CPU = Setup(torch.device("cpu"), repeats=3)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The result of the whole command in its short form, and the file it wrote."""
    out = tmp_path_factory.mktemp("speed") / "speed.json"
    result = speed.main(["--out", str(out), "--short", "--repeats", "2"])
    return result, json.loads(out.read_text())


def test_every_section_reports(short_run):
    result, written = short_run
    assert written == json.loads(json.dumps(result))
    assert written["complete"]
    assert written["provenance"]["versions"]["torch"]
    assert list(written["sections"]) == list(speed.SECTIONS)
    for name, found in written["sections"].items():
        assert "not_run" not in found, (name, found)
        assert found["compared"]
        assert found["figures"] or name == "roofline"
    assert {"bytes_per_second", "flops_per_second"} == written["sections"]["roofline"]["numbers"].keys()


@pytest.mark.parametrize("name", [name for name in speed.SECTIONS if name != "roofline"])
def test_ratios_are_those_of_what_was_measured(short_run, name):
    for figure in short_run[1]["sections"][name]["figures"]:
        values = figure["seconds"] if "seconds" in figure else figure["mebibytes"]
        for each in values.values():
            assert 0 <= each["least"] <= each["median"] <= each["greatest"]
            assert each["spread"] >= 0
        above, below = (values[name]["median"] for name in figure["ratio_of"])
        if below:  # tiny runs may not make the process grow
            assert figure["ratio"] == pytest.approx(figure["factor"] * above / below)
        low, high = figure["ratio_quartiles"]
        assert low <= high
        assert figure["reached"] is None  # tiny sizes tell nothing


def test_what_is_compared_computes_the_same(short_run):
    sections = short_run[1]["sections"]
    for name in ("embedding", "embedding_batch", "lookup", "attention", "loss", "rollout", "splines", "homogenization"):
        assert sections[name]["checks"], name
        for check in sections[name]["checks"]:
            assert check["equal"], (name, check)
    assert sections["rollout"]["numbers"]["equal_tokens"] == 1
    assert sections["rollout"]["numbers"]["distinct_tokens"] > 1


def test_every_figure_of_the_issue_has_its_target(short_run):
    found = [
        (name, figure["target"].get("at_least", figure["target"].get("at_most")))
        for name, section in short_run[1]["sections"].items()
        for figure in section["figures"]
        if figure["target"]
    ]
    assert set(found) == {
        ("embedding", 5),
        ("embedding", 8),
        ("embedding_batch", 10),
        ("lookup", 1.005),
        ("training_step", 1.03),
        ("attention", 0.9),
        ("attention", 2.2),
        ("head", 3),
        ("rollout", 5),
        ("imports", 1.2),
    }


def test_the_table_says_it_all(short_run):
    text = speed.table(short_run[1])
    for name, found in short_run[1]["sections"].items():
        assert f"\n{name}" in text
        for figure in found["figures"]:
            assert figure["what"] in text
    assert ">= 5 at full sizes" in text
    assert "\nroofline " in text
    assert "NOT" not in text


def test_in_bfloat16(tmp_path):
    sections = ["training_step", "attention", "loss", "head", "rollout"]
    out = tmp_path / "speed.json"
    arguments = ["--out", str(out), "--short", "--repeats", "1", "--dtype", "bfloat16"]
    found = speed.main([*arguments, "--sections", *sections])["sections"]
    assert set(found) == set(sections)
    for name, section in found.items():
        assert section["sizes"].get("dtype", "bfloat16") == "bfloat16"
        for check in section["checks"]:
            assert check["equal"] or "tokens that differ" in check["what"], (name, check)


def test_a_section_that_cannot_run_says_why_and_the_others_run(tmp_path, monkeypatch, capsys):
    def refused(setup):
        raise CannotRunError("no such thing here")

    def broken(setup):
        raise RuntimeError("out of something")

    def not_finite(setup):
        return Section("a", {}, numbers={"number": math.nan})

    def sound(setup):
        return Section("a against b", {}, [Figure("work", {"a": [2.0], "b": [1.0]}, ("a", "b"))])

    sections = {each.__name__: each for each in (refused, broken, not_finite, sound)}
    monkeypatch.setattr(speed, "SECTIONS", sections)
    out = tmp_path / "speed.json"
    speed.main(["--out", str(out), "--short"])
    found = json.loads(out.read_text())["sections"]
    assert found["refused"] == {"not_run": "no such thing here"}
    assert found["broken"] == {"not_run": "RuntimeError: out of something"}
    assert "not_run" in found["not_finite"]
    assert found["sound"]["figures"][0]["ratio"] == 2
    assert "broken: NOT RUN: RuntimeError: out of something" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sections", "embeddings"], "unknown section embeddings; expected some of embedding, "),
        (["--repeats", "0"], "expected at least 1"),
        (["--text", "nowhere.txt"], "there is no file nowhere.txt"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, capsys, arguments, said):
    out = tmp_path / "speed.json"
    with pytest.raises(SystemExit):
        speed.main(["--out", str(out), "--short", *arguments])
    assert said in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        speed.main(["--out", str(tmp_path / "speed.json"), "--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_it_runs_on_cuda(tmp_path):
    out = tmp_path / "speed.json"
    found = speed.main(["--out", str(out), "--short", "--repeats", "1", "--device", "cuda"])["sections"]
    assert not [name for name, section in found.items() if "not_run" in section]


def test_a_target_is_told_where_it_holds():
    target = Target("twice as fast", at_least=2, on="cuda")
    assert target.reached(3, CPU) is None
    assert Target("twice as fast", at_least=2).reached(1.9, CPU) is False
    assert Target("twice as fast", at_least=2, on="cpu").reached(2, CPU) is True
    assert Target("no more than", at_most=1).reached(1.1, CPU) is False
    assert Target("no more than", at_most=1).reached(0.9, CPU) is True
    assert Target("no more than", at_most=1).reached(0.9, Setup(CPU.device, short=True)) is None


def test_a_ratio_of_rates_counts_the_work():
    """Twice the work in three times the time is two thirds of the rate."""
    figure = Figure("rate", {"ours": [3.0, 3.0], "theirs": [1.0, 1.0]}, ("theirs", "ours"), factor=2.0)
    assert figure.ratio == pytest.approx(2 / 3)
    assert figure.record(CPU)["ratio_quartiles"] == pytest.approx([2 / 3, 2 / 3])


def test_runs_take_turns():
    order = []
    samples = alternate(CPU, {name: lambda name=name: order.append(name) for name in "ab"}, calls=2)
    assert "".join(order) == "ab" + "aabb" + "bbaa" + "aabb"  # a warm-up, then three repeats
    assert {name: len(each) for name, each in samples.items()} == {"a": 3, "b": 3}


def test_the_floor_is_the_higher_of_arithmetic_and_memory():
    ceilings = Ceilings(bytes_per_second=10.0, flops_per_second={"float32": 100.0})
    line = Work("work", seconds=6.0, flops=200.0, bytes=30.0, precision="float32").against(ceilings)
    assert (line["floor_seconds"], line["limit"], line["times_the_floor"]) == (3.0, "memory", 2.0)


def test_a_difference_is_relative_and_a_nan_never_equal():
    assert difference(torch.tensor([1.0, 11.0]), torch.tensor([1.0, 10.0])) == pytest.approx(0.1)
    pairs = [[torch.ones(2), torch.ones(3)], [torch.ones(2), torch.zeros(3)]]
    assert difference(*pairs) > 1
    assert not Check("", difference(torch.tensor([math.nan, 1.0]), torch.ones(2)), 1.0).equal


def test_tokens_are_those_of_a_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("How now, brown cow? " * 50, encoding="utf-8")
    ids, vocab_size, source = text_batch(file, 300, rows=2, length=8)
    assert ids.shape == (2, 8)
    assert int(ids.max()) < vocab_size <= 300
    assert source == "text.txt"
    with pytest.raises(CannotRunError, match="longer text"):
        text_batch(file, 300, rows=20, length=800)


def test_tokens_of_fields_and_by_frequency():
    pairs = field_pairs(3, patch_size=8, num_grid=16, num_bits=8)
    assert pairs.shape == (3, 128)
    assert 0 <= int(pairs.min()) < int(pairs.max()) < 256
    before, after = pairs.double().split(64, 1)
    assert (before - after).abs().mean() < (before - before.roll(1, 0)).abs().mean()  # a state is like the one before
    ids = frequent_ids(1000, 4, 100)
    assert ids.shape == (4, 100)
    assert ids.unique().numel() < 250  # of 400 uniform ones, 330 would be distinct
    assert int(ids.max()) > 500


def test_memory_is_the_passes_own_whatever_this_process_held():
    sizes = {"num_embeddings": 4096, "embedding_dim": 64, "seed_dim": 64, "num_heads": 2, "rank": 32}
    held = bytearray(400 * 2**20)
    held[::4096] = b"1" * len(held[::4096])
    fast, oracle = (peak_mebibytes(CPU, prepare, (sizes, 2048), (sizes, 8)) for prepare in (fast_pass, oracle_pass))
    assert len(held)
    # phi of the oracle: 2 heads x 2048 tokens x 64 x 32 numbers of 4 bytes, several times
    assert 32 < oracle < 400
    assert fast < oracle / 2
