"""Runs in processes of their own: those that are killed equal one that was not, and two agree on what befalls one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from eval.interruptions import STEPS, compare, moment_of, same_values, timeless, tiny_settings, write_data
from training.checkpoints import MANIFEST, damage

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
    started = [*report["resumed_from"], *(kill["resumed_from"] for kill in report["kills"])]
    assert any(0 < step < STEPS for step in started)  # so that the optimizer's state is not only written
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


TWO = """
import json, os, signal, socket, sys, yaml
sys.modules["deepspeed"] = None  # as if it were not installed: each process would import it
import torch
from training import train
from training.trainer import LeviathanTrainer

settings = yaml.safe_load(open(sys.argv[1]))
torch.set_num_threads(1)

def ranks(part):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [os.fork() or rank(number, part, port) for number in range(2)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

def rank(number, part, port):
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    compute, code = LeviathanTrainer.compute_loss, 1
    def computed(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        if number == 1 and self.state.global_step == 1:
            loss = loss * float("nan")
        if number == 1 and self.state.global_step == 2 and part == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss
    LeviathanTrainer.compute_loss = computed
    save = LeviathanTrainer._save_checkpoint
    def saved(self, *args, **kwargs):
        save(self, *args, **kwargs)
        assert os.path.isdir(self.state.best_model_checkpoint)
    LeviathanTrainer._save_checkpoint = saved
    try:
        train.run(settings)
        code = 0
    except SystemExit as error:
        code = error.code
    finally:
        sys.stderr.flush()
        os._exit(code)

codes = [ranks(0)]
os.remove(settings["training"]["output_dir"] + "/checkpoint-3/loop-1.json")
json.dump([*codes, ranks(1)], open(sys.argv[2], "w"))
"""


def test_two_processes_agree(tmp_path):
    """One of two has the bad loss, and one gets the signal: both skip, both end after the same step, both go on."""
    write_data(tmp_path / "data", "text")
    settings = tiny_settings(tmp_path / "data", "text", tmp_path / "run", seed=0)
    settings["training"] |= {
        "max_steps": 4,
        "save_steps": 2,
        "eval_steps": 2,
        "metric_for_best_model": "loss",
        "ddp_backend": "gloo",
        "ddp_find_unused_parameters": False,
        "gradient_accumulation_steps": 1,
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "two.py").write_text(TWO)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *(str(tmp_path / name) for name in ("two.py", "two.yaml", "codes.json"))]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    folder = tmp_path / "run"
    assert json.loads((tmp_path / "codes.json").read_text()) == [[143, 143], [0, 0]], run.stderr
    assert run.stderr.count("checkpoint-3 is not whole: loop-1.json is missing") == 1  # one looks, and tells
    report = json.loads((folder / "training.json").read_text())
    assert (report["steps_skipped"], report["resumed_from_step"]) == (1, 2)
    loops = [json.loads((folder / "checkpoint-4" / f"loop-{rank}.json").read_text()) for rank in range(2)]
    assert [loop["steps_skipped"] for loop in loops] == [1, 1]
    assert {path.name for path in folder.glob("checkpoint-4/rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert damage(folder / "checkpoint-4") is None
