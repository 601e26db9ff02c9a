"""The card of text shows what its record holds, and nothing else."""

import json
import re
from pathlib import Path

import pytest
import yaml

from eval import text_card
from eval.card import MISSING
from tests.test_language_study import NAMES, PICTURES, rows_of
from training.provenance import write_json

CARDS = Path(__file__).resolve().parent.parent / "model_cards"


def scored(mean, spread):
    return {"mean": mean, "standard_deviation": spread}


def record(x=0.0, seeds=(11, 12), rates=("3e-3", "7e-3", "4e-3"), day="2031-04-05T16:17:18+00:00", digit="8"):
    """What language.json holds, as far as the card reads it; every number depends on x, or is given."""
    high, whole = round(100 + 40 * x), round(1000 * x)
    data = {"num_targets": 24_384 + whole, "num_bytes": 86_901 + whole, "context_length": 128 + whole}
    run = {"steps": 1240 + whole, "tokens_per_step": 2048 + whole, "num_parameters": 2_345_678 + whole}
    run |= {"test": {"data": data, "rare": {"low": 0, "high": high}}}
    arms = {}
    for place, name in enumerate(NAMES):
        y = x + 0.17 * place
        against = {
            "perplexity_ratio": scored(0.931 + y, 0.0123 + y),
            "rare_perplexity_ratio": scored(0.642 + y, 0.0345 + y),
            "tokens_ratio": scored(1.273 + y, 0.0678 + y),
            "largest_lag": scored(-0.0547 + y, 0.0219 + y),
        }
        runs = [run | {"seed": seed, "embedding_parameters": 987_654 + whole + 3 * place} for seed in seeds]
        arms[name] = {
            "num_parameters": 2_345_678 + whole + 5 * place,
            "settings": [] if place == 0 else ["--model.embedding_type", '"lookup"', "--model.tie", str(place == 1)],
            "best": rates[place % len(rates)],
            "tuning": dict.fromkeys(rates, 5.0),
            "order_tokens_read": 11_308_689 + whole if place == 0 else 0,
            "runs": runs,
            "test": {
                "perplexity": scored(137.613 + 10 * y, 1.2345 + y),
                "bits_per_byte": scored(1.8642 + y, 0.0151 + y),
                "rare_perplexity": scored(43_211 + 10_000 * y, 913 + 1000 * y),
                "three_components": scored(0.2345 + 0.6 * y, 0.0111),
            },
            "against": {"lookup_tied": against, "separable": {key: scored(2.19 + y, 0.77 + y) for key in against}},
        }
    made = {
        "command": f"python -m eval.study --config c{digit}1.yaml",
        "commit": f"abc{digit}2",
        "versions": {"torch": f"{digit}.91", "python": f"{digit}.92"},
        "hardware": {"processor": f"Chip {digit}93", "cores": 640 + whole, "accelerator": None},
    }
    return {
        "config": f"c{digit}1.yaml",
        "tune": "training.embedding_learning_rate",
        "references": {"marginal_entropy": 6.5432 + x},
        "arms": arms,
        "references_of_arms": ["lookup_tied", "separable"],
        "lags_from": 0.05 + x / 8,
        "provenance": made,
        "measured": {
            "command": f"python -m eval.language_study --study s{digit}4",
            "commit": f"f{digit}5",
            "date": day,
        },
    }


def test_the_card_shows_the_record():
    found = record()
    text = text_card.text_card(found, "pictures")
    assert text == text_card.text_card(json.loads(json.dumps(found)), "pictures")
    arms, tied, separable = rows_of(text)
    assert arms[0] == [
        *("separable", "2,345,678", "987,654", "11,308,689", "3e-3 (edge)"),
        *("137.61 ± 1.23", "1.8642 ± 0.0151", "43,211 ± 913", "23 %"),
    ]
    assert [row[0] for row in arms] == ["separable", "lookup tied", "lookup untied"]
    assert [row[3] for row in arms] == ["11,308,689", "none", "none"]
    assert [row[4] for row in arms] == ["3e-3 (edge)", "7e-3 (edge)", "4e-3"]
    # A reference is not compared with itself.
    assert [row[0] for row in tied] == ["separable", "lookup untied"]
    assert tied[0] == ["separable", "-6.9 ± 1.2 %", "-35.8 ± 3.5 %", "1.27 ± 0.07", "-0.055 ± 0.022"]
    assert tied[1] == ["lookup untied", "+27.1 ± 35.2 %", "-1.8 ± 37.5 %", "1.61 ± 0.41", "+0.285 ± 0.362"]
    assert [row[0] for row in separable] == ["lookup tied", "lookup untied"]
    heads = re.findall(r"^\| arm .*", text, re.MULTILINE)
    assert [len(head.strip("| ").split(" | ")) for head in heads] == [9, 5, 5]
    assert "| embedding learning rate |" in heads[0]
    for words in (
        "its best embedding learning rate of the same 3; all else that is set for training, the body's learning rate "
        "too, is the same for all.",
        "(edge): the least or greatest embedding learning rate tried was best;",
        f"  up to {11_308_689 / (1240 * 2048):.1f} times the tokens",
        f"{1240 * 2048:,} tokens of training a run",
        "over 2 seeds",
        "1,240 steps of 2,048 tokens; test text of 24,384 tokens (86,901 bytes) in sequences of 128; seeds 11, 12.",
        "seen at most 100 times",
        "6.543 nat",
        "The arms lay these settings over those of `c81.yaml`:",
        "- separable: nothing\n- lookup tied: `model.embedding_type: lookup`, `model.tie: True`\n",
        "Against lookup tied:",
        "Against separable:",
        "from 5 % of training on",
        "```bash\npython -m eval.study --config c81.yaml\npython -m eval.language_study --study s84\n```",
        "Chip 893, 640 cores, accelerator none; torch 8.91, python 8.92; commit abc82, measured at f85;\n2031-04-05",
    ):
        assert words in text


def test_every_number_of_the_card_is_the_records():
    """Of a record without a number in common, the card has none in common but those of names."""
    other = record(0.413, (21, 26, 28, 36, 37, 39), ("5e-4", "2e-4", "1e-4", "9e-4"), "2046-09-27T20:51:53+01:39", "7")
    texts = [text_card.text_card(each, "pictures") for each in (record(), other)]
    numbers = [set(re.findall(r"\d[\d,.]*(?<![.,])(?:e-?\d+)?", text)) for text in texts]
    assert numbers[0] & numbers[1] == {"2.0", "2601.22040", "50"}  # licence, arXiv, the example's new tokens
    assert min(map(len, numbers)) > 60


def test_what_is_missing_is_said():
    found = record()
    separable = found["arms"]["separable"]
    separable["test"]["rare_perplexity"] = None
    against = separable["against"]["lookup_tied"]
    against |= {"rare_perplexity_ratio": None, "tokens_ratio": None}
    text = text_card.text_card(found, "pictures")
    arms, tied, _ = rows_of(text)
    assert [row[7] == MISSING for row in arms] == [True, False, False]
    assert tied[0] == ["separable", "-6.9 ± 1.2 %", MISSING, "never", "-0.055 ± 0.022"]
    assert text.count(MISSING) == 2
    against |= {"perplexity_ratio": None, "largest_lag": None}
    assert rows_of(text_card.text_card(found, "pictures"))[1][0] == ["separable", MISSING, MISSING, "never", MISSING]
    found["references"], found["provenance"]["commit"] = {}, None
    found["measured"] = {"commit": "f85", "changed_since_commit": True}
    text = text_card.text_card(found, "pictures")
    for words in (
        f"{MISSING} nat",
        f"commit {MISSING}, measured at f85 with uncommitted changes;",
        f"\n{MISSING}\n```",
    ):
        assert words in text
    assert "None" not in text


def test_an_order_without_a_record_and_arms_without_an_order():
    found = record()
    found["arms"]["separable"]["order_tokens_read"] = None
    text = text_card.text_card(found, "pictures")
    assert rows_of(text)[0][0][3] == MISSING
    assert f"up to {MISSING} times" in text
    found["arms"]["separable"]["order_tokens_read"] = 0
    assert "had more text" not in text_card.text_card(found, "pictures")


def test_a_best_value_within_what_was_tried_is_no_edge():
    arm = {"best": "1e-2", "tuning": {"3e-2": 5.0, "1e-2": 5.0, "3e-3": 5.0}}
    assert not text_card.at_edge(arm)
    assert text_card.at_edge(arm | {"best": "3e-2"})
    assert not text_card.at_edge({"best": "1e-2", "tuning": {"1e-2": 5.0}})
    assert not text_card.at_edge({"best": "dense", "tuning": {"dense": 5.0, "digits": 5.0}})
    found = record()
    for arm in found["arms"].values():
        arm["best"] = "4e-3"
    assert "edge" not in text_card.text_card(found, "pictures")
    found["tune"] = "training.learning_rate"
    assert "of the same 3; all else that is set for training is the same" in text_card.text_card(found, "pictures")


def test_front_matter_is_yaml():
    front = text_card.text_card(record(), "pictures").split("---\n")[1]
    parsed = yaml.safe_load(front)
    assert parsed["library_name"] == "transformers"
    assert parsed["license"] == "apache-2.0"
    assert parsed["tags"] == ["leviathan", "separable-neural-architecture", "text-generation"]


def links(text):
    return re.findall(r"^!\[[^\]]+\]\((.*)\)$", text, re.MULTILINE)


@pytest.mark.parametrize("out", ["cards/text.md", "cards/text/card.md", "card.md", "elsewhere/deep/card.md"])
def test_pictures_are_linked_from_where_the_card_is(tmp_path, monkeypatch, out):
    write_json(tmp_path / "cards" / "text" / "language.json", record())
    for picture in PICTURES:
        (tmp_path / "cards" / "text" / picture).touch()
    text_card.main(["--study", str(tmp_path / "cards/text/language.json"), "--out", str(tmp_path / out)])
    found = links((tmp_path / out).read_text())
    assert sorted(Path(link).name for link in found) == PICTURES
    assert not any(Path(link).is_absolute() for link in found)
    assert all(((tmp_path / out).parent / link).is_file() for link in found)
    monkeypatch.chdir(tmp_path / "cards" / "text")
    text_card.main(["--study", "language.json", "--out", "../text.md"])
    assert links(Path("../text.md").read_text()) == [
        f"text/{name}" for name in ("curves.png", "bands.png", "spectra.png")
    ]


def test_records_that_are_none_are_refused(tmp_path):
    out = ["--out", str(tmp_path / "card.md")]
    write_json(tmp_path / "empty.json", {})
    for name, message in {"absent": r"absent\.json", "empty": "no entry 'arms'"}.items():
        with pytest.raises(SystemExit, match=message):
            text_card.main(["--study", str(tmp_path / f"{name}.json"), *out])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(SystemExit, match="error"):
        text_card.main(["--study", str(tmp_path / "broken.json"), *out])
    content = record()
    del content["lags_from"]
    write_json(tmp_path / "old.json", content)
    with pytest.raises(SystemExit, match="no entry 'lags_from'; write it with"):
        text_card.main(["--study", str(tmp_path / "old.json"), *out])
    assert not (tmp_path / "card.md").exists()


def test_the_committed_card_is_what_its_record_generates():
    """And neither is there without the other."""
    written, made = CARDS / "leviathan_text.md", CARDS / "leviathan_text" / "language.json"
    assert written.is_file() == made.is_file()
    if made.is_file():
        text = written.read_text(encoding="utf-8")
        assert text == text_card.text_card(json.loads(made.read_text(encoding="utf-8")), "leviathan_text")
        assert all((CARDS / link).is_file() for link in links(text))
