"""lm_eval's numbers, from its own command line, are those of eval.likelihood."""

import functools
import importlib.util
import json
import math
import re
import sys

import lm_eval.tasks
import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from eval import likelihood, lm_harness
from eval.likelihood import continuation_loglikelihood, document_loglikelihood
from leviathan import LeviathanForCausalLM
from tests.test_leviathan import KINDS, tiny
from tests.test_likelihood import END, TEXT, bytes_tokenizer

QUESTIONS = [
    {"context": "The cat sat on", "choices": ["the mat", "a dog", "day"], "answer": 0},
    {"context": "A dog, the", "choices": ["cat's friend", "mat", "there too"], "answer": 1},
    {"context": "They sat together " + TEXT, "choices": ["all day", "long."], "answer": 1},  # longer than the model
    {"context": "Ünlike “this”", "choices": ["one", "öne", "日本"], "answer": 2},
    {"context": "", "choices": ["mat", "cat"], "answer": 0},
]
DOCUMENTS = [TEXT, TEXT * 3 + "Another one.", "short", "日本 day\n\n\tlong "]
MODELS = {"separable": {}, "separable-tied": KINDS["separable-tied"], "lookup": KINDS["lookup"]}
TINY_BYTES = {"vocab_size": 300, "embedding_base": 18, "max_position_embeddings": 32}


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder of two tasks; lm_eval does not read its own thousands."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    about = {
        "tiny_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}],
        },
        "tiny_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
    }
    rows = {"tiny_choice": QUESTIONS, "tiny_text": [{"text": document} for document in DOCUMENTS]}
    for name, settings in about.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        files = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
        settings |= {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    alone = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", alone)
    return folder


@pytest.fixture
def evaluated(tasks, tmp_path, monkeypatch):
    """Runs the command on a saved model; its results, and the samples of each task by their number."""

    def run(options, *flags, command=()):
        model, tokenizer = tiny(**TINY_BYTES, **options), bytes_tokenizer()
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        flags = [*command, "--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'}", *flags]
        flags += ["--tasks", "tiny_choice,tiny_text", "--include_path", tasks, "--device", "cpu", "--log_samples"]
        flags += ["--output_path", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["lm_harness", *map(str, flags)])
        lm_harness.main()
        (results,) = (tmp_path / "out").rglob("results_*.json")
        samples = {}
        for task in ("tiny_choice", "tiny_text"):
            (file,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            samples[task] = [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
        return model, tokenizer, json.loads(results.read_text())["results"], samples

    return run


@pytest.mark.parametrize(
    ("kind", "flags", "command"),
    [
        ("separable", ("--batch_size", "3"), ()),
        ("separable-tied", (), ("run",)),
        ("lookup", ("--batch_size", "8"), ()),
    ],
)
def test_the_command_gives_our_numbers(evaluated, kind, flags, command):
    model, tokenizer, results, samples = evaluated(MODELS[kind], *flags, command=command)
    right = 0
    for question, responses in zip(QUESTIONS, samples["tiny_choice"], strict=True):
        pairs = [(question["context"], f" {choice}") for choice in question["choices"]]
        ours = continuation_loglikelihood(model, tokenizer, pairs)
        for (score, greedy), ((theirs, is_greedy),) in zip(ours, responses, strict=True):
            assert float(theirs) == pytest.approx(score, abs=1e-4)
            assert is_greedy == str(greedy)
        right += max(range(len(ours)), key=lambda i: ours[i][0]) == question["answer"]
    assert results["tiny_choice"]["acc,none"] == right / len(QUESTIONS)

    ours = document_loglikelihood(model, tokenizer, DOCUMENTS)
    for score, ((theirs,),) in zip(ours, samples["tiny_text"], strict=True):
        assert float(theirs) == pytest.approx(score, abs=1e-4, rel=1e-6)  # thousands of nats
    sizes = {
        "word_perplexity": sum(len(re.split(r"\s+", document)) for document in DOCUMENTS),
        "byte_perplexity": sum(len(document.encode()) for document in DOCUMENTS),
    }
    for name, size in sizes.items():
        assert results["tiny_text"][f"{name},none"] == pytest.approx(math.exp(-sum(ours) / size), rel=1e-4), name
    bits = -sum(ours) / sizes["byte_perplexity"] / math.log(2)
    assert results["tiny_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)


@pytest.mark.parametrize("begins", [False, True])
def test_texts_are_cut_as_the_harness_cuts_them(begins):
    model, tokenizer = tiny(**TINY_BYTES), bytes_tokenizer(begins)
    pieces = ["", "The cat", "The cat ", "a \n ", f"{END}The", "日本", "sat " * 40]
    pairs = [(context, predicted) for context in pieces for predicted in (" sat", "sat on", "本", f"{END}day", " ")]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    theirs = harness.loglikelihood(requests, disable_tqdm=True)
    assert continuation_loglikelihood(model, tokenizer, pairs) == [
        (pytest.approx(score, abs=1e-4), greedy) for score, greedy in theirs
    ]
    documents = [*pieces, TEXT, TEXT * 2]
    requests = [Instance("loglikelihood_rolling", {}, (document,), i) for i, document in enumerate(documents)]
    theirs = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    assert document_loglikelihood(model, tokenizer, documents) == pytest.approx(theirs, abs=1e-4, rel=1e-6)


def test_windows_are_those_of_the_harness():
    for length in (1, 2, 5, 8):
        for number in range(20):
            ids = list(range(1, number + 1))
            theirs = map(make_disjoint_window, get_rolling_token_windows(ids, 0, length, context_len=1))
            assert likelihood._windows(ids, 0, length) == list(theirs)


def test_the_saved_model_is_ours(evaluated, monkeypatch):
    seen, original = [], HFLM.__init__
    monkeypatch.setattr(HFLM, "__init__", lambda self, **given: (original(self, **given), seen.append(self))[0])
    evaluated({}, "--limit", "1")
    assert isinstance(seen[0].model, LeviathanForCausalLM)
    assert seen[0].max_length == 32


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="the extra lm-eval"):
        lm_harness.main()
