"""A run that is killed and goes on equals one that was not: a small study, and that its comparison sees differences."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.interruptions import compare, moment_of, same_values, timeless
from training.checkpoints import MANIFEST

ROOT = Path(__file__).resolve().parent.parent
KILLS = 3


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    command = [sys.executable, "-m", "eval.interruptions", "--out", str(out), "--kills", str(KILLS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    return out


def test_killed_runs_equal_the_unbroken_one(study):
    text = (study / "interruptions.json").read_text()
    report = json.loads(text)
    assert len(report["kills"]) == KILLS
    assert report["runs"] == report["identical"] > max(kill["run"] for kill in report["kills"])
    assert report["differences"] == []
    for kill in report["kills"]:
        assert kill["moment"] in ("start", "step", "save", "finish")
        assert 0 <= kill["resumed_from"] <= kill["step_reached"] <= report["settings"]["training"]["max_steps"]
    assert str(study) not in text
    assert report["provenance"]["seed"] == 0


def test_the_comparison_sees_what_differs(study, tmp_path):
    whole, broken = study / "unbroken", tmp_path / "broken"
    shutil.copytree(whole, broken)
    assert compare(whole, broken) == []
    checkpoint = broken / "checkpoint-12"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    torch.save(dict(reversed(state.items())), checkpoint / "optimizer.pt")  # other bytes, the same values
    log = [json.loads(line) for line in (broken / "log.jsonl").read_text().splitlines()]
    log[-1]["train_runtime"] += 1  # a time
    (broken / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (checkpoint / MANIFEST).write_text("{}")  # names the folder
    assert compare(whole, broken) == []
    state["state"][0]["exp_avg"].view(-1)[0] += 2.0**-40
    torch.save(state, checkpoint / "optimizer.pt")
    next(row for row in log if "loss" in row)["loss"] += 2.0**-40
    (broken / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    content = bytearray((broken / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (broken / "model.safetensors").write_bytes(content)
    (checkpoint / "stream-0.json").unlink()
    expected = ["checkpoint-12/stream-0.json is missing in one", "checkpoint-12/optimizer.pt", "log.jsonl"]
    assert compare(whole, broken) == [*expected, "model.safetensors"]


def test_values_are_the_same_to_the_bit():
    one = {"a": [1, 0.1, "x", None], "b": torch.tensor([1.0, float("nan")]), "c": (np.arange(3), True)}
    other = {"a": [1, 0.1, "x", None], "b": torch.tensor([1.0, float("nan")]), "c": (np.arange(3), True)}
    assert same_values(one, other)
    for changed in (
        {"a": [1.0, 0.1, "x", None]},
        {"a": [1, 0.1 + 2**-56, "x", None]},
        {"b": torch.tensor([1.0, 0.0])},
        {"b": torch.tensor([1.0, float("nan")], dtype=torch.float64)},
        {"c": (np.arange(4), True)},
        {"d": 0},
    ):
        assert not same_values(one, other | changed)
    assert not same_values(torch.tensor([0.0]), torch.tensor([-0.0]))
    rows = [{"step": 1, "loss": 2.0, "eval_runtime": 3.0, "eval_samples_per_second": 4.0}]
    assert timeless({"validation": rows, "seconds": 5.0}) == {"validation": [{"step": 1, "loss": 2.0}]}


def test_moments_are_told_apart(tmp_path):
    log, partial = tmp_path / "log.jsonl", tmp_path / "partial"
    assert moment_of(tmp_path, 0, (None, None)) == "start"
    log.write_text('{"step": 4}\n{"step"')
    assert moment_of(tmp_path, 0, (None, log.stat().st_ino)) == "start"
    assert moment_of(tmp_path, 4, (None, None)) == "start"
    assert moment_of(tmp_path, 0, (None, None)) == "step"
    (partial / "checkpoint-4").mkdir(parents=True)
    assert moment_of(tmp_path, 0, (None, None)) == "save"
    assert moment_of(tmp_path, 0, (partial.stat().st_ino, None)) == "step"
    (partial / "checkpoint-4").rmdir()
    assert moment_of(tmp_path, 0, (None, None)) == "finish"
    partial.rmdir()
    (tmp_path / "checkpoint-12").mkdir()
    assert moment_of(tmp_path, 0, (None, None)) == "finish"
