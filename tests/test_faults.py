"""What can go wrong in a run: signals, full disks, losses that are no numbers, files with code in them."""

import json
import os
import re
import resource
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer

from eval.interruptions import compare, tiny_settings, write_data
from training import train, trainer
from training.checkpoints import damage, list_checkpoints, publish
from training.trainer import LeviathanTrainer, build_arguments, ending_on_termination, weights_alone


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, "text")
    return folder


@pytest.fixture
def settings(data, tmp_path):
    """Six steps of two batches each, a checkpoint after every other."""
    settings = tiny_settings(data, "text", tmp_path / "run", seed=0)
    settings["training"] |= {"max_steps": 6, "save_steps": 2, "eval_steps": 6, "logging_steps": 1}
    return settings


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """The folder of the same run, trained without a fault."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    settings = tiny_settings(data, "text", folder, seed=0)
    settings["training"] |= {"max_steps": 6, "save_steps": 2, "eval_steps": 6, "logging_steps": 1}
    train.run(settings)
    return folder


def rows(folder, key):
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in found if key in row}


def at_step(monkeypatch, step, act, event="on_step_end"):
    """Calls act(trainer's model, optimizer) when a step ended or begins; step counts those before."""

    def called(self, args, state, control, **kwargs):
        if state.global_step == step:
            act(SimpleNamespace(**kwargs))

    monkeypatch.setattr(train.JsonLog, event, called, raising=False)


def terminate(_=None):
    os.kill(os.getpid(), signal.SIGTERM)


def train_and_terminate(settings, monkeypatch, step):
    """SIGTERM comes within the step."""
    with monkeypatch.context() as patch:
        at_step(patch, step - 1, terminate, "on_step_begin")
        with pytest.raises(SystemExit) as stopped:
            train.run(settings)
    assert stopped.value.code == 143


def names(folder):
    return [checkpoint.name for checkpoint in list_checkpoints(folder)]


# Signals


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_sigterm_ends_the_run_with_a_checkpoint_and_it_goes_on_as_if_nothing_were(
    settings, tmp_path, monkeypatch, capsys, unbroken, strategy
):
    settings["training"]["save_strategy"] = strategy
    handler = signal.getsignal(signal.SIGTERM)
    train_and_terminate(settings, monkeypatch, 3)
    assert "ended after step 3 of 6, with a checkpoint; go on with" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == handler
    folder = tmp_path / "run"
    assert names(folder) == {"steps": ["checkpoint-3", "checkpoint-2"]}.get(strategy, ["checkpoint-3"])
    assert damage(folder / "checkpoint-3") is None
    assert not (folder / "training.json").exists()
    assert train.run(settings)["resumed_from_step"] == 3
    if strategy == "steps":
        assert compare(unbroken, folder) == []
    else:
        assert (folder / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


def test_sigterm_in_the_last_step_lets_the_run_finish(settings, monkeypatch, tmp_path, unbroken):
    at_step(monkeypatch, 5, terminate, "on_step_begin")
    assert train.run(settings)["steps"] == 6
    assert compare(unbroken, tmp_path / "run") == []


def test_workers_of_the_loaders_survive_a_sigterm_to_all_processes(settings, monkeypatch, tmp_path):
    settings["training"] |= {"dataloader_num_workers": 2, "eval_steps": 2}
    before, found = psutil.Process().children(), []

    def to_all(_):
        workers = [child for child in psutil.Process().children() if child not in before]
        found.append(len(workers))
        for process in workers:
            process.send_signal(signal.SIGTERM)
        terminate()

    at_step(monkeypatch, 2, to_all, "on_prediction_step")
    with pytest.raises(SystemExit):
        train.run(settings)
    assert max(found) == 4  # of training, and of evaluation
    assert names(tmp_path / "run")[0] == "checkpoint-3"
    assert [child for child in psutil.Process().children() if child not in before] == []


def test_outside_of_the_main_thread_signals_are_left_alone():
    def use():
        with ending_on_termination(SimpleNamespace()):
            seen.append(signal.getsignal(signal.SIGTERM))

    seen, handler = [], signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [handler]


# Full disks


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "loop-0.json"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(settings, monkeypatch, tmp_path, unbroken, file):
    """The limit on the size of a file stands for the disk: the system refuses to write more."""
    folder = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (unbroken / "checkpoint-4" / file).stat().st_size - 1 if file != "loop-0.json" else None

    def fill(_):
        if size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        else:
            monkeypatch.setattr("training.trainer.write_text", full)

    def full(path, text):
        Path(path).write_text(text[:3])
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        at_step(patch, 4, fill)
        if size is None:
            monkeypatch = patch
        try:
            with pytest.raises(OSError, match="checkpoint-4 could not be written: ") as error:
                train.run(settings)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the last checkpoint is checkpoint-2, and" in str(error.value)
    assert "MiB are free. Make room, and go on with --training.resume_from_checkpoint true" in str(error.value)
    assert names(folder) == ["checkpoint-2"]
    assert damage(folder / "checkpoint-2") is None
    assert not list(folder.rglob("partial"))
    assert train.run(settings)["resumed_from_step"] == 2
    assert compare(unbroken, folder) == []


def test_a_full_disk_at_the_end_leaves_no_half_of_a_model(settings, monkeypatch, tmp_path, unbroken):
    folder, save = tmp_path / "run", PreTrainedModel.save_pretrained

    def full(self, path, **kwargs):
        save(self, path, **kwargs)
        if "checkpoint" not in str(path):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(
            OSError, match=r"run could not be written: .*No space left.* last checkpoint is checkpoint-6"
        ):
            train.run(settings)
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-4", "checkpoint-6", "log.jsonl", "run.json"]
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-2")  # as if killed before the oldest was removed
    shutil.copytree(folder / "checkpoint-4", folder / "partial" / "checkpoint-8")  # and while writing another
    assert train.run(settings)["resumed_from_step"] == 6
    assert compare(unbroken, folder) == []


def test_a_checkpoint_without_the_state_of_a_process_is_not_published(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(LeviathanTrainer, "_loop_file", lambda self, checkpoint: checkpoint / "elsewhere.json")
    with pytest.raises(OSError, match="it has the state of 0 of 1 processes: all have to see the same folder"):
        train.run(settings)
    assert names(tmp_path / "run") == []


def test_a_full_disk_under_the_counts_is_an_error_of_the_system(settings, monkeypatch, tmp_path):
    def full(tensors, path, *args):
        Path(path).write_bytes(b"x")
        raise SafetensorError("No space left on device")

    at_step(monkeypatch, 6, lambda _: monkeypatch.setattr(trainer, "save_file", full), "on_train_end")
    with pytest.raises(OSError, match=r"token_counts.safetensors could not be written: No space"):
        train.run(settings)
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.parametrize("name", ["partial", "checkpoint-100"])
def test_what_somebody_else_put_into_the_folder_is_left_alone(settings, tmp_path, name):
    path = tmp_path / "run" / name / "thesis.txt"
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=f"{name} is none of ours to overwrite or delete"):
        train.run(settings)
    assert path.read_text() == "mine"


def test_a_damaged_record_of_the_run_is_said(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("")
    with pytest.raises(
        ValueError, match=r"run.json is damaged .*; write it anew from `run` in a checkpoint's manifest"
    ):
        train.run(settings)


# Losses and gradients that are no numbers


def spoil(monkeypatch, steps, value, kind, batch=1):
    """Makes the loss, or the gradient of one weight, of the ``batch``-th of a step's batches this value."""
    seen, compute = {}, LeviathanTrainer.compute_loss

    def computed(self, model, *args, **kwargs):
        loss = compute(self, model, *args, **kwargs)
        if not model.training:
            return loss
        at = (id(self), self.state.global_step)
        seen[at] = seen.get(at, -1) + 1
        if self.state.global_step + 1 in steps and seen[at] == batch:
            if kind == "loss":
                return loss + value
            loss.register_hook(lambda gradient: gradient * value)
        return loss

    monkeypatch.setattr(LeviathanTrainer, "compute_loss", computed)


def states(monkeypatch):
    """Parameters and moments after each step, as the run goes."""
    found = {}

    def called(self, args, state, control, model, optimizer, **kwargs):
        moments = [torch.cat([v.flatten() for v in s.values()]) for s in optimizer.state.values()]
        found[state.global_step] = torch.cat([*(p.detach().flatten() for p in model.parameters()), *moments])

    monkeypatch.setattr(train.JsonLog, "on_step_end", called, raising=False)
    return found


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize(("kind", "value"), [("loss", float("nan")), ("gradient", float("inf"))])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    settings, monkeypatch, tmp_path, unbroken, kind, value, bf16, max_grad_norm
):
    settings["training"] |= {"bf16": bf16, "max_grad_norm": max_grad_norm, "save_strategy": "no"}
    spoil(monkeypatch, {3}, value, kind)
    found = states(monkeypatch)
    report = train.run(settings)
    assert report["steps_skipped"] == 1
    assert json.loads((tmp_path / "run" / "training.json").read_text())["steps_skipped"] == 1
    same = {step: torch.equal(found[step], found[step - 1]) for step in range(2, 7)}
    assert same == {2: False, 3: True, 4: False, 5: False, 6: False}
    assert all(value.isfinite().all() for value in found.values())
    assert rows(tmp_path / "run", "steps_skipped") == {3: 1}
    losses, rates = (rows(tmp_path / "run", key) for key in ("loss", "learning_rate"))
    assert sorted(losses) == [1, 2, 4, 5, 6]
    expected = rows(unbroken, "learning_rate")
    assert all(rate == expected[step] for step, rate in rates.items())  # the schedule is that of the steps
    if not bf16 and max_grad_norm:
        before = rows(unbroken, "loss")
        assert [losses[step] for step in (1, 2)] == [before[step] for step in (1, 2)]
        assert losses[4] != before[4]


def test_the_log_has_the_mean_over_the_steps_that_were_taken(settings, monkeypatch, tmp_path):
    settings["training"] |= {"max_steps": 4, "save_strategy": "no", "eval_strategy": "no"}
    spoil(monkeypatch, {2}, float("nan"), "loss", batch=0)
    train.run(settings)
    each = rows(tmp_path / "run", "loss")
    settings["training"] |= {"logging_steps": 4, "output_dir": str(tmp_path / "other")}
    train.run(settings)
    (mean,) = rows(tmp_path / "other", "loss").values()
    assert mean == pytest.approx(sum(each.values()) / 3, rel=1e-6)


def test_the_run_stops_after_so_many_in_a_row_with_the_batch_saved(settings, monkeypatch, tmp_path):
    settings["training"] |= {"max_nonfinite_steps": 2}
    given, step = [], LeviathanTrainer.training_step
    monkeypatch.setattr(
        LeviathanTrainer,
        "training_step",
        lambda self, model, inputs, *args: (given.append(dict(inputs)), step(self, model, inputs, *args))[1],
    )
    spoil(monkeypatch, {1, 3, 5, 6}, float("nan"), "loss")  # the first two alone do not stop it
    path = tmp_path / "run" / "nonfinite-step-6.safetensors"
    message = (
        "the loss or the gradient of step 6 is not finite, 2 in a row (training.max_nonfinite_steps = 2). Its batch is "
        f"in {path}; the last checkpoint is checkpoint-4"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        train.run(settings)
    saved = load_file(path)
    assert sorted(saved) == ["0.input_ids", "0.labels", "1.input_ids", "1.labels"]
    for name, value in saved.items():
        index, key = name.split(".")
        assert torch.equal(value, given[-2:][int(index)][key])
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"step": "6", "process": "0"}
    assert not list((tmp_path / "run").glob("*.partial"))
    loop = json.loads((tmp_path / "run" / "checkpoint-4" / "loop-0.json").read_text())
    assert (loop["steps_skipped"], loop["nonfinite_in_a_row"]) == (2, 0)
    given.clear()
    with pytest.raises(ValueError, match="of step 6 is not finite, 2 in a row"):  # again, from the checkpoint
        train.run(settings)
    assert len(given) == 4


def test_the_count_goes_on_after_a_resume(settings, monkeypatch, tmp_path):
    spoil(monkeypatch, {2, 3, 5}, float("nan"), "loss")
    train_and_terminate(settings, monkeypatch, 3)
    assert train.run(settings)["steps_skipped"] == 3
    assert rows(tmp_path / "run", "steps_skipped") == {2: 1, 3: 2, 5: 3}


def test_those_in_a_row_are_counted_over_a_resume(settings, monkeypatch):
    settings["training"] |= {"max_nonfinite_steps": 3}
    spoil(monkeypatch, {2, 3, 4}, float("nan"), "loss")
    train_and_terminate(settings, monkeypatch, 3)
    with pytest.raises(ValueError, match="of step 4 is not finite, 3 in a row"):
        train.run(settings)


def test_under_deepspeed_which_steps_in_the_backward_pass_the_run_stops_before_it(settings, monkeypatch, tmp_path):
    compute, found = LeviathanTrainer.compute_loss, []

    def computed(self, model, *args, **kwargs):
        if self.state.global_step == 3:
            self.is_deepspeed_enabled = True
            found.append([p.detach().clone() for p in model.parameters()])
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))
        return compute(self, model, *args, **kwargs)

    monkeypatch.setattr(LeviathanTrainer, "compute_loss", computed)
    with pytest.raises(ValueError, match="of step 4 is not finite, 1 in a row"):
        train.run(settings)
    assert len(found) == 1
    assert sorted(load_file(tmp_path / "run" / "nonfinite-step-4.safetensors")) == ["0.input_ids", "0.labels"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable_jit_checkpoint", True),
        ("save_on_each_node", True),
        ("max_nonfinite_steps", 0),
        ("eval_strategy", "epoch"),
        ("logging_strategy", "epoch"),
        ("save_strategy", "epoch"),
    ],
)
def test_settings_that_would_defeat_this_are_refused(settings, name, value):
    settings["training"] |= {name: value, "resume_from_checkpoint": None}
    with pytest.raises(ValueError, match=f"training.{name}"):
        build_arguments(settings)


# Files with code in them


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_with_code_is_not_run(settings, tmp_path, file, monkeypatch):
    folder, mark = tmp_path / "run", tmp_path / "it ran"
    settings["training"] |= {"max_steps": 3, "eval_strategy": "no"}
    train_and_terminate(settings, monkeypatch, 2)
    assert not list(folder.rglob("training_args.bin"))
    checkpoint = folder / "checkpoint-2"
    torch.save(Evil(mark), checkpoint / file)
    with pytest.raises(ValueError, match=f"is whole .checkpoint-2: {file}"):  # by its hash
        train.run(settings)
    (folder / "partial").mkdir()
    staged = checkpoint.rename(folder / "partial" / "checkpoint-2")
    publish(staged, json.loads((folder / "run.json").read_text()))  # by someone who can make hashes
    with pytest.raises(Exception, match="Weights only load failed"):
        train.run(settings)
    assert not mark.exists()
    torch.load(checkpoint / file, weights_only=False)
    assert mark.exists()  # it would have run


def test_resuming_loads_nothing_but_weights(settings, monkeypatch):
    load, options = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: (options.append(kwargs), load(*args, **kwargs))[1])
    train_and_terminate(settings, monkeypatch, 2)
    assert not options
    train.run(settings)
    assert len(options) >= 3
    assert all(given["weights_only"] is True for given in options)


def test_what_deepspeed_loads_is_held_to_weights_too(tmp_path):
    pytest.importorskip("deepspeed")
    torch.save(Evil(tmp_path / "it ran"), tmp_path / "evil.pt")
    torch.save({"step": torch.ones(2)}, tmp_path / "good.pt")
    with weights_alone():
        assert torch.load(tmp_path / "good.pt", weights_only=False)["step"].sum() == 2
        with pytest.raises(Exception, match="Weights only load failed"):
            torch.load(tmp_path / "evil.pt", weights_only=False)
    assert not (tmp_path / "it ran").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "it ran").exists()


# Choices of transformers' that touch checkpoints


def test_the_best_checkpoint_is_kept_found_and_loaded_and_the_newest_kept(settings, tmp_path, monkeypatch):
    settings["training"] |= {"eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    loop = LeviathanTrainer.evaluation_loop

    def evaluated(self, *args, **kwargs):
        output = loop(self, *args, **kwargs)
        output.metrics["eval_loss"] = {2: 3.0, 4: 2.0, 6: 2.5}[self.state.global_step]
        return output

    monkeypatch.setattr(LeviathanTrainer, "evaluation_loop", evaluated)
    folder = tmp_path / "run"
    train_and_terminate(settings, monkeypatch, 5)
    assert names(folder) == ["checkpoint-5", "checkpoint-4"]
    assert train.run(settings)["resumed_from_step"] == 5
    assert names(folder) == ["checkpoint-6", "checkpoint-4"]
    best = folder / "checkpoint-4"
    assert damage(best) is None
    state = json.loads((best / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]) == best
    assert (folder / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()


def test_evaluation_leaves_the_random_numbers_of_training(settings, monkeypatch):
    """Its loader draws one when it starts; persistent workers start once, and once more after a resume."""
    evaluate, states = Trainer.evaluate, []

    def evaluated(self, *args, **kwargs):
        states.append(torch.get_rng_state())
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "evaluate", evaluated)
    settings["training"] |= {"max_steps": 1, "eval_steps": 1, "save_strategy": "no"}
    at_step(monkeypatch, 1, lambda _: states.append(torch.get_rng_state()), "on_evaluate")
    at_end = []
    at_step(monkeypatch, 1, lambda _: at_end.append(torch.get_rng_state()), "on_train_end")
    train.run(settings)
    before, within = states
    assert torch.equal(before, at_end[0])
    assert not torch.equal(before, within)  # there is something to be left
