"""eval.language_study and eval.text_card: on a study of tiny models, and against numbers made by hand."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from eval import language, language_study, study, text_card
from eval.card import MISSING
from tests.test_text_task import corpus, settings  # noqa: F401 -- fixtures
from training.provenance import write_json

ARMS = """
separable:
lookup_tied: {model.embedding_type: lookup, model.tie_word_embeddings: true}
lookup_untied: {model.embedding_type: lookup}
"""
NAMES, PICTURES = ["separable", "lookup_tied", "lookup_untied"], ["bands.png", "curves.png", "spectra.png"]


# ---------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def trained(settings, kept):  # noqa: F811
    """The folder of a study of three arms, trained once for all tests."""
    folder = kept / "study"
    if not folder.exists():
        settings["training"] |= {"max_steps": 3, "eval_steps": 1, "save_strategy": "no"}
        del settings["training"]["output_dir"], settings["training"]["seed"]
        (kept / "run.yaml").write_text(yaml.safe_dump(settings))
        (kept / "arms.yaml").write_text(ARMS)
        command = ["--config", kept / "run.yaml", "--arms", kept / "arms.yaml", "--out", folder]
        command += ["--tune", "training.learning_rate=3e-3", "--seeds", 4, 7]
        study.main([str(each) for each in command])
    return folder


@pytest.fixture
def command(trained, corpus, tmp_path):  # noqa: F811
    """On a copy of the study, with a test text of its own."""
    shutil.copytree(trained, tmp_path / "study")
    lines = (corpus / "validation.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(lines[:30]))
    paths = {"--study": tmp_path / "study", "--data": tmp_path / "test.jsonl", "--out": tmp_path / "cards" / "text"}
    return [str(each) for pair in paths.items() for each in pair]


def rows_of(text):
    """The cells of each table's rows, without its head."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[line.strip("| ").split(" | ") for line in table.splitlines()[2:]] for table in tables]


def measured_files(folder):
    return sorted(path.parent.name for path in folder.glob("study/*/measured.json"))


def test_command(command, tmp_path, capsys):
    # What the first run read is what all are counted by: other counts would give other bands.
    first, *others = (tmp_path / "study" / f"{name}-3e-3-{seed}" for name in NAMES for seed in (4, 7))
    counts = load_file(first / "token_counts.safetensors")["counts"]
    assert counts.sum() == 3 * 2 * 4 * 15  # steps, accumulated, sequences, targets of a sequence
    for folder in others:
        save_file({"counts": torch.full_like(counts, 5000)}, folder / "token_counts.safetensors")
    found = language_study.main(command)
    out = tmp_path / "cards" / "text"
    assert json.loads((out / "language.json").read_text()) == json.loads(json.dumps(found))
    assert sorted(path.name for path in out.iterdir()) == sorted(["language.json", *PICTURES])
    for picture in PICTURES:
        data = (out / picture).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert data.endswith(b"IEND\xaeB`\x82")
    before = json.loads((tmp_path / "study" / "study.json").read_text())
    assert {key: found[key] for key in before.keys() - {"arms"}} == {
        key: before[key] for key in before if key != "arms"
    }
    assert list(found["arms"]) == NAMES
    assert found["references_of_arms"] == ["lookup_tied", "lookup_untied"]
    assert measured_files(tmp_path) == sorted(f"{name}-3e-3-{seed}" for name in NAMES for seed in (4, 7))

    # By the command for a single model.
    one = ["--model", tmp_path / "study" / "lookup_tied-3e-3-7", "--counts", first / "token_counts.safetensors"]
    alone = language.run(language.parse([*map(str, [*one, "--out", tmp_path / "one"]), *command[2:4]]))
    test = found["arms"]["lookup_tied"]["runs"][1]["test"]
    assert test["data"] == alone["data"]
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert test[name]["mean"] == pytest.approx(alone[name]["mean"])
    for name in ("bands", "rare"):
        (ours, theirs) = ([each[name]] if name == "rare" else each[name] for each in (test, alone))
        for band, same in zip(ours, theirs, strict=True):
            assert band == pytest.approx(same)
    assert test["embedding"]["explained"] == alone["embedding"]["explained"]

    tests = [run["test"] for arm in found["arms"].values() for run in arm["runs"]]
    assert len({json.dumps([band["num_targets"] for band in test["bands"]]) for test in tests}) == 1
    assert len({test["loss"]["mean"] for test in tests}) == 6
    for arm in found["arms"].values():
        for name in ("loss", "perplexity", "bits_per_byte"):
            assert arm["test"][name] == study.summed_up([run["test"][name]["mean"] for run in arm["runs"]])
        rare = [run["test"]["rare"]["perplexity"] for run in arm["runs"]]
        assert arm["test"]["rare_perplexity"] == study.summed_up(rare)
        shares = [run["test"]["embedding"]["explained"] for run in arm["runs"]]
        assert arm["test"]["three_components"]["mean"] == pytest.approx(sum(sum(each[:3]) for each in shares) / 2)
        assert list(arm["against"]) == found["references_of_arms"]
    itself = found["arms"]["lookup_tied"]["against"]["lookup_tied"]
    for name in ("perplexity_ratio", "rare_perplexity_ratio", "tokens_ratio"):
        assert itself[name] == {"mean": 1.0, "standard_deviation": 0.0}
    assert itself["largest_lag"]["mean"] == 0
    assert itself["seeds"] == [4, 7]
    curve = [row["step"] for row in found["arms"]["separable"]["runs"][0]["validation"]]
    assert curve == [1, 2, 3]
    assert {arm["order_tokens_read"] for arm in found["arms"].values()} == {0}

    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith(tuple(NAMES))]
    for line, (name, arm) in zip(lines[-3:], found["arms"].items(), strict=True):
        perplexity, ratio = arm["test"]["perplexity"], arm["against"]["lookup_untied"]["perplexity_ratio"]
        assert line[0] == name
        assert line[1] == f"{arm['num_parameters']:,}"
        assert line[2:5] == [f"{perplexity['mean']:.2f}", "±", f"{perplexity['standard_deviation']:.2f}"]
        assert line[5] == f"{arm['test']['rare_perplexity']['mean']:,.0f}"
        assert line[-2:] == ["lookup_untied", f"{ratio['mean']:.3f}"]

    text_card.main(["--study", str(out / "language.json"), "--out", str(tmp_path / "cards" / "text.md")])
    written = (tmp_path / "cards" / "text.md").read_text()
    assert written == text_card.text_card(json.loads(json.dumps(found)), "text")
    assert str(tmp_path) not in written + json.dumps(found)


def test_what_was_measured_is_kept(command, tmp_path, monkeypatch, corpus):  # noqa: F811
    before = language_study.main(command)
    monkeypatch.setattr(language, "evaluate", None)  # nothing is measured a second time
    again = language_study.main([*command, "--references", "separable", "--draw", "lookup_untied"])
    assert again["references_of_arms"] == ["separable"]
    for name in NAMES:
        assert again["arms"][name]["runs"] == before["arms"][name]["runs"]

    tests, test = [], before["arms"]["separable"]["runs"][0]["test"]
    content = json.loads((tmp_path / "study" / "study.json").read_text())
    content["arms"] = {"separable": content["arms"]["separable"]}
    write_json(tmp_path / "study" / "study.json", content)

    def evaluate(*args, **options):
        tests.append(test | {"bits_per_byte": {"mean": float(len(tests))}})
        return tests[-1]

    def measured(data=tmp_path / "test.jsonl", split="test", num=None):
        """Marks of what was measured, and whether that is what was found."""
        start, study = len(tests), tmp_path / "study"
        found = language_study.sum_up(study, str(data), split, ["separable"], (), num)["arms"]["separable"]
        marks = [run["test"]["bits_per_byte"]["mean"] for run in found["runs"]]
        return marks == [each["bits_per_byte"]["mean"] for each in tests[start:]]

    monkeypatch.setattr(language, "evaluate", evaluate)
    assert not measured()
    assert measured(corpus / "train.jsonl")
    # Another text of the same name elsewhere, or behind the same path.
    lines = (corpus / "validation.jsonl").read_text().splitlines()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "test.jsonl").write_text("\n".join(lines[30:]))
    assert measured()
    assert measured(tmp_path / "elsewhere" / "test.jsonl")
    assert measured()
    (tmp_path / "test.jsonl").write_text("\n".join(lines[20:]))
    assert measured()
    assert not measured()
    assert measured(num=3)
    assert not measured(num=3)
    assert measured(split="validation")
    # One run alone.
    (tmp_path / "study" / "separable-3e-3-7" / "measured.json").unlink()
    count = len(tests)
    measured(split="validation")
    assert len(tests) == count + 1


def test_the_text_of_the_training(command):
    """Without --data, from another folder; all of it, or as much as training validates on."""
    arguments = [*command[:2], *command[4:]]
    with pytest.raises(SystemExit, match="no text for 'test'"):
        language_study.main(arguments)
    found = language_study.main([*arguments, "--split", "validation", "--num-sequences", "16"])
    for arm in found["arms"].values():
        for run in arm["runs"]:
            assert run["test"]["loss"]["mean"] == pytest.approx(run["validation"][-1]["loss"], rel=1e-5)
            assert run["test"]["data"]["num_sequences"] == 16
    found = language_study.sum_up(Path(arguments[1]), None, "validation", [])
    assert found["arms"]["separable"]["runs"][0]["test"]["data"]["num_sequences"] > 16


def test_a_run_that_diverged(command, tmp_path, capsys):
    """Of its arm there are no scores; the others have theirs, and its counts still say what is rare."""
    path = tmp_path / "study" / "study.json"
    content = json.loads(path.read_text())
    run = content["arms"]["separable"]["runs"][0]
    run["loss"] = run["validation"][-1]["loss"] = None
    write_json(path, content)
    found = language_study.main(command)
    arms = found["arms"]
    assert arms["separable"]["runs"][0]["test"] is None
    assert arms["separable"]["runs"][1]["test"]["loss"]["mean"] > 0
    assert set(arms["separable"]["test"].values()) == {None}
    assert arms["lookup_tied"]["test"]["loss"]["mean"] > 0
    for name in ("perplexity_ratio", "rare_perplexity_ratio", "tokens_ratio", "largest_lag"):
        assert arms["separable"]["against"]["lookup_tied"][name] is None
    assert sorted(each.name for each in (tmp_path / "cards" / "text").glob("*.png")) == PICTURES
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("separable")]
    assert lines[-1][2] == "diverged"
    (row, *_), tied, _ = rows_of(text_card.text_card(found, "text"))
    assert row[5:] == ["diverged", MISSING, MISSING, MISSING]
    assert tied[0] == ["separable", MISSING, MISSING, "never", MISSING]


def test_an_order_has_read_text(tmp_path):
    order = tmp_path / "order.safetensors"

    def run_with(order):
        write_json(tmp_path / "run.json", {"settings": {"tokenizer": {"path": "t", "order": order}}})
        return language_study.tokens_of_order(tmp_path)

    assert run_with(None) == 0
    assert run_with(str(order)) is None  # no record beside it
    for method, read in (("factors", 1234), ("random", 0), ("identity", 0)):
        write_json(tmp_path / "order.json", {"settings": {"method": method, "tokens_read": 1234}})
        assert run_with(str(order)) == read
    write_json(tmp_path / "run.json", {"settings": {"tokenizer": {"path": "t"}}})
    assert language_study.tokens_of_order(tmp_path) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--references", "lookup_tied", "chair", "desk"], "--references chair desk: .* separable, lookup_tied"),
        (["--draw", "separable", "chair"], "--draw chair: the arms of .* are separable, lookup_tied, lookup_untied"),
        (["--data", "nowhere*.jsonl"], "no files"),
        (["--study", "nowhere"], r"nowhere.study\.json"),
    ],
)
def test_command_refuses(command, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        language_study.main([*command, *more])
    assert not (tmp_path / "cards").exists()
    assert not measured_files(tmp_path)


def test_a_run_without_counts_is_refused(command, tmp_path):
    (tmp_path / "study" / "separable-3e-3-4" / "token_counts.safetensors").unlink()
    with pytest.raises(SystemExit, match="token_counts"):
        language_study.main(command)
    assert not (tmp_path / "cards").exists()


# ---------------------------------------------------------------------------------------------------------- comparison


def run_of(seed, losses, perplexity=10.0, rare=1000.0, step=10, first=None):
    """A run whose validation loss after every `step` steps is given."""
    curve = [{"step": step * place, "loss": loss} for place, loss in enumerate(losses, 1)]
    curve = ([] if first is None else [{"step": 0, "loss": first}]) + curve
    test = {"perplexity": {"mean": perplexity}, "rare": {"perplexity": rare}}
    return {"seed": seed, "validation": curve, "test": test}


def test_perplexities_are_compared_seed_by_seed():
    arm = [run_of(3, [5.0], 8.0, 600.0), run_of(1, [5.0], 9.0, 500.0), run_of(8, [5.0], 1.0, 1.0)]
    reference = [run_of(1, [5.0], 10.0, 1000.0), run_of(3, [5.0], 16.0, 1000.0), run_of(9, [5.0], 7.0, 7.0)]
    found = language_study.compare(arm, reference)
    assert found["seeds"] == [3, 1]
    half = 0.5**0.5
    assert found["perplexity_ratio"] == pytest.approx({"mean": 0.7, "standard_deviation": 0.4 * half})  # 0.5 and 0.9
    assert found["rare_perplexity_ratio"] == pytest.approx({"mean": 0.55, "standard_deviation": 0.1 * half})
    one = language_study.compare(arm[:1], reference)
    assert one["perplexity_ratio"] == {"mean": 0.5, "standard_deviation": 0.0}
    assert language_study.compare(arm[2:], reference) == {
        "perplexity_ratio": None,
        "rare_perplexity_ratio": None,
        "tokens_ratio": None,
        "largest_lag": None,
        "seeds": [],
    }


@pytest.mark.parametrize("missing", ["arm", "reference"])
def test_without_a_rare_target_there_is_no_ratio_of_them(missing):
    rare = {"arm": 3.0, "reference": 4.0} | {missing: None}
    arm, reference = ([run_of(0, [5.0]), run_of(1, [5.0], rare=rare[name])] for name in ("arm", "reference"))
    found = language_study.compare(arm, reference)
    assert found["rare_perplexity_ratio"] is None
    assert found["perplexity_ratio"]["mean"] == 1


@pytest.mark.parametrize(
    ("arm", "reference", "ratio"),
    [
        ([6.0, 3.0, 2.0, 1.0], [7.0, 6.0, 5.0, 4.0], 40 / (10 + 10 * 2 / 3)),  # linear between two evaluations
        ([6.0, 4.0, 2.0, 1.0], [7.0, 6.0, 5.0, 4.0], 2.0),  # just at one
        ([3.0, 2.0, 2.0, 2.0], [7.0, 6.0, 5.0, 4.0], 4.0),  # the first
        ([7.0, 6.0, 5.0, 4.5], [7.0, 6.0, 5.0, 4.0], None),  # never
        ([6.0, 5.0, 4.0, 4.0], [6.0, 3.0, 5.0, 4.0], (10 + 10 * 2 / 3) / 30),  # the reference was there before
        ([6.0, 2.0, 5.0, 5.0], [7.0, 6.0, 5.0, 4.0], 40 / 15),  # and lost it again
    ],
)
def test_tokens_to_the_last_loss_of_the_reference(arm, reference, ratio):
    found = language_study.compare([run_of(0, arm)], [run_of(0, reference)])["tokens_ratio"]
    assert found == (ratio and pytest.approx({"mean": ratio, "standard_deviation": 0.0}))


def test_tokens_of_several_seeds():
    """Each against the last loss of its own seed; one that never gets there leaves no number."""
    reference = [run_of(0, [6.0, 4.0]), run_of(1, [6.0, 5.0])]
    arm = [run_of(0, [4.0, 3.0]), run_of(1, [6.0, 5.0])]
    found = language_study.compare(arm, reference)["tokens_ratio"]
    assert found == pytest.approx({"mean": 1.5, "standard_deviation": 0.5**0.5})
    arm[1] = run_of(1, [6.0, 5.5])
    assert language_study.compare(arm, reference)["tokens_ratio"] is None


def test_what_got_worse_in_training_was_there_before():
    worse = run_of(0, [6.0, 7.0], first=5.0)
    assert language_study.compare([worse], [worse])["tokens_ratio"] is None


def test_lag_is_the_greatest_at_equal_steps_late_in_training():
    reference = run_of(0, [5.0] * 40, step=1)  # 5 % are two steps
    ahead = [4.9] * 40
    for losses, lag in [
        (ahead, -0.1),
        ([9.0, *ahead[1:]], -0.1),  # before 5 %
        ([4.9, 5.3, *ahead[2:]], 0.3),  # just there
        ([*ahead[:-1], 5.2], 0.2),  # at the end
        ([4.9, 5.1, 4.9, 5.25, *ahead[4:]], 0.25),
    ]:
        found = language_study.compare([run_of(0, losses, step=1)], [reference])["largest_lag"]
        assert found == pytest.approx({"mean": lag, "standard_deviation": 0.0}), losses[:4]


@pytest.mark.parametrize("num", [20, 60, 140, 240, 280, 900])
def test_a_twentieth_of_training_is_late_enough(num):
    """Also where 0.05 times the steps, in floating point, is a little more than a twentieth."""
    reference, arm = (run_of(0, [loss] + [5.0] * 19, step=num // 20) for loss in (5.0, 5.5))
    assert language_study.compare([arm], [reference])["largest_lag"]["mean"] == pytest.approx(0.5)


def test_an_evaluation_without_a_loss_is_left_out():
    reference, arm = run_of(0, [6.0, None, 4.0]), run_of(0, [None, 5.5, 3.0])
    found = language_study.compare([arm], [reference])
    assert found["largest_lag"]["mean"] == pytest.approx(-1.0)
    assert found["tokens_ratio"]["mean"] == pytest.approx(30 / (20 + 10 * 1.5 / 2.5))


def test_lag_at_steps_in_common():
    reference = run_of(0, [6.0, 5.0, 4.0, 3.0], step=10)
    twice = run_of(0, [9.0, 6.2, 9.0, 5.1, 9.0, 4.0, 9.0, 3.0], step=5)
    assert language_study.compare([twice], [reference])["largest_lag"]["mean"] == pytest.approx(0.2)
    longer = run_of(0, [9.0, 3.5, 9.0], step=20)  # beyond 40 there is nothing to be compared with
    assert language_study.compare([longer], [reference])["largest_lag"]["mean"] == pytest.approx(6.0 - 3.0 + 1.0)
    assert language_study.compare([run_of(0, [3.0], step=7)], [reference])["largest_lag"] is None


def test_lags_of_several_seeds():
    reference = [run_of(0, [5.0, 4.0]), run_of(1, [5.0, 4.0])]
    found = language_study.compare([run_of(1, [5.0, 4.3]), run_of(0, [5.1, 4.0])], reference)
    assert found["largest_lag"] == pytest.approx({"mean": 0.2, "standard_deviation": 0.2 * 0.5**0.5})
    assert found["seeds"] == [1, 0]
