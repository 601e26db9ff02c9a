"""The job that trains one agent: its record, its cache, its settings and its command."""

import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import stable_baselines3
import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from leviathan.integrations.sb3 import SpanSACPolicy
from training import span as job
from training.settings import load_yaml, read_settings
from training.span_networks import FAMILIES

CONFIGS = sorted(Path(job.__file__).with_name("configs").glob("span_*.yaml"))
ONLINE = [path for path in CONFIGS if "task" in load_yaml(path)]
CARTPOLE = {
    "task": {
        "environment": "CartPole-v1",
        "total_steps": 64,
        "num_evaluations": 2,
        "num_episodes": 3,
        "low": 20,
        "high": 500,
        "threshold": 475,
    },
    "algorithm": {"n_steps": 32, "batch_size": 16, "n_epochs": 1},
    "sizes": {"small": 755, "large": 2000},
    "span": {},
    "training": {"seed": 1},
}
PENDULUM = {
    "task": {
        "environment": "Pendulum-v1",
        "algorithm": "SAC",
        "total_steps": 60,
        "num_evaluations": 1,
        "num_episodes": 1,
        "low": -1250,
        "high": -140,
        "threshold": -200,
    },
    "algorithm": {"learning_starts": 32, "batch_size": 16, "buffer_size": 100},
    "sizes": {"small": 1000},
    "span": {},
    "training": {},
}


def changed(settings, **sections):
    return {name: {**values, **sections.get(name, {})} for name, values in settings.items()}


def run(settings, out, name="task"):
    return job.run(settings, name, out, progress=False)


@pytest.fixture
def no_training(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("trained again")

    for name in job.ALGORITHMS:
        monkeypatch.setattr(getattr(stable_baselines3, name), "learn", fail)


def test_a_record_says_what_was_done(tmp_path):
    record = run(CARTPOLE, tmp_path)
    expected = {
        "task": "task",
        "environment": "CartPole-v1",
        "algorithm": "PPO",
        "network": "span",
        "size": "small",
        "learning_rate": 1e-3,
        "seed": 1,
        "purpose": "test",
        "total_steps": 64,
        "steps": [32, 64],
        "successes": None,
        "reference": {"low": 20, "high": 500, "threshold": 475},
        "settings": CARTPOLE,
    }
    assert {name: record[name] for name in expected} == expected
    assert record["num_parameters"] == pytest.approx(755, rel=0.2)
    assert all(8 <= each <= 500 for each in record["returns"])
    assert len(record["returns"]) == 2
    assert record["train_seconds"] > 0
    assert "provenance" in record
    folder = tmp_path / "task" / "small" / "span" / "rate0.001_seed1"
    assert json.loads((folder / "record.json").read_text()) == record
    assert {path.name for path in folder.iterdir()} == {"record.json", "agent.zip"}


def test_an_agent_comes_back_as_it_was_evaluated(tmp_path):
    # SB3 learns once more after the last step's evaluation; here it never does.
    record = run(changed(PENDULUM, algorithm={"learning_starts": 1000}), tmp_path)
    assert record["steps"] == [60]
    assert -2000 < record["returns"][0] < 0
    agent = stable_baselines3.SAC.load(tmp_path / "task/small/span/rate0.001_seed0/agent.zip", device="cpu")
    assert type(agent.policy) is SpanSACPolicy
    _, env = job.environments({**job.TASK, **PENDULUM["task"]}, 0)
    env.seed(job.EVALUATION_SEED)
    observation, total, done = env.reset(), 0.0, False
    while not done:
        observation, (reward,), (done,), _ = env.step(agent.predict(observation, deterministic=True)[0])
        total += float(reward)
    assert total == pytest.approx(record["returns"][0], rel=1e-4)


def test_a_run_is_not_run_again(tmp_path, monkeypatch):
    first = run(CARTPOLE, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(BaseAlgorithm, "__init__", None)
        assert run(CARTPOLE, tmp_path) == first
        for other in ({"seed": 2}, {"learning_rate": 0.01}, {"network": "kan"}, {"size": "large"}):
            with pytest.raises(TypeError):  # would train
                run(changed(CARTPOLE, training=other), tmp_path)
    assert run(changed(CARTPOLE, training={"seed": 2}), tmp_path)["seed"] == 2


@pytest.mark.parametrize(
    "other",
    [
        {"span": {"num_cells": 3}},
        {"task": {"total_steps": 128}},
        {"sizes": {"small": 900}},
        {"algorithm": {"gamma": 0.9}},
    ],
    ids=str,
)
def test_a_run_of_other_settings_is_not_taken_for_this_one(other, tmp_path):
    first = run(CARTPOLE, tmp_path)
    with pytest.raises(ValueError, match="holds a record of other settings; choose another --out"):
        run(changed(CARTPOLE, **other), tmp_path)
    # Neither a default that is written out, nor what this run has no use of.
    assert run(changed(CARTPOLE, training={"purpose": "test"}, sizes={"large": 9}), tmp_path) == first


def test_the_last_evaluation_is_at_the_last_step(tmp_path):
    assert 21 / 19 * 19 > 21
    task = {"total_steps": 21, "num_evaluations": 19}
    record = run(changed(PENDULUM, task=task, algorithm={"learning_starts": 100}), tmp_path)
    assert len(record["steps"]) == 19
    assert record["steps"][-1] == 21


@pytest.mark.parametrize("settings", [CARTPOLE, PENDULUM], ids=["CartPole", "Pendulum"])
def test_a_seed_gives_the_returns(settings, tmp_path):
    first, second = (run(settings, tmp_path / folder) for folder in "ab")
    for name in ("returns", "steps", "num_parameters"):
        assert first[name] == second[name]


@pytest.mark.parametrize("network", FAMILIES)
def test_every_family(network, tmp_path):
    record = run(changed(CARTPOLE, training={"network": network}), tmp_path)
    assert record["network"] == network
    assert record["num_parameters"] == pytest.approx(755, rel=0.2)


def test_settings_reach_the_agent():
    options = {"num_cells": 3, "degree": 1, "num_blocks": 2, "normalization": "layer", "learn_knot_scale": True}
    kept = {"optimizer_kwargs": {"weight_decay": 0.1}}
    settings = changed(PENDULUM, span=options, algorithm={"policy_kwargs": {"n_critics": 1, **kept}})
    env, _ = job.environments({**job.TASK, **settings["task"]}, 0)
    agent = job.make(settings, env)
    assert {name: getattr(agent.policy.span, name) for name in options} == options
    assert agent.critic.n_critics == 1
    assert agent.buffer_size == 100
    assert agent.learning_rate == job.TRAINING["learning_rate"]
    assert agent.actor.optimizer.defaults["weight_decay"] == 0.1
    assert settings["algorithm"]["policy_kwargs"] == {"n_critics": 1, **kept}  # not changed


def test_normalised_observations(tmp_path):
    record = run(changed(CARTPOLE, task={"normalize": True, "num_envs": 2}), tmp_path)
    folder = tmp_path / "task/small/span/rate0.001_seed1"
    with np.load(folder / "normalization.npz") as stored:
        assert stored["mean"].shape == stored["variance"].shape == (4,)
        assert (stored["variance"] > 0).all()
    assert all(each >= 8 for each in record["returns"])  # of the task, not scaled


@pytest.mark.parametrize("noise", job.NOISE)
def test_noise_of_the_actions(noise):
    settings = changed(PENDULUM, task={"algorithm": "DDPG", "action_noise": noise, "noise_scale": 0.3})
    env, _ = job.environments({**job.TASK, **settings["task"]}, 0)
    agent = job.make(settings, env)
    assert isinstance(agent.action_noise, job.NOISE[noise])
    assert agent.action_noise().shape == (1,)


@pytest.mark.parametrize("path", ONLINE, ids=lambda path: path.stem)
def test_configs_are_sound(path):
    settings = read_settings(path, [], job.allowed_keys())
    task = {**job.TASK, **settings["task"]}
    assert {"small"} <= set(settings["sizes"]) <= set(job.SIZES)
    for size in settings["sizes"]:
        job.check(task, {**job.TRAINING, **settings["training"], "size": size}, settings["sizes"])
    module, _, name = task["environment"].rpartition(":")
    if module:
        __import__(module)
    assert gymnasium.spec(name).id == name
    taken = job.inspect.signature(job.algorithm_class(task["algorithm"])).parameters
    assert set(settings["algorithm"]) <= set(taken)


def test_there_is_a_config_of_each_kind():
    assert len(ONLINE) >= 9
    assert len(CONFIGS) > len(ONLINE)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"task": {"environment": None}}, "task.environment = None; expected the id of an environment"),
        ({"task": {"environment": "CartPoles-v7"}}, "task.environment = 'CartPoles-v7': "),
        ({"task": {"environment": "no.such.module:CartPole-v1"}}, "no.such.module"),
        ({"task": {"algorithm": "DQN"}}, "task.algorithm = 'DQN'; expected one of PPO, A2C"),
        ({"task": {"algorithm": "SAC"}}, "n_epochs|n_steps"),
        ({"task": {"total_steps": 0}}, "task.total_steps = 0; expected an integer of at least 1"),
        ({"task": {"num_evaluations": 65}}, "task.num_evaluations = 65 with task.num_envs = 1"),
        ({"task": {"num_episodes": 1.5}}, "task.num_episodes = 1.5"),
        ({"task": {"action_noise": "pink"}}, "task.action_noise = 'pink'; expected one of normal"),
        ({"task": {"threshold": 501}}, "expected them to rise"),
        ({"training": {"network": "mlp"}}, "training.network = 'mlp'; expected one of span"),
        ({"training": {"size": "huge"}}, "training.size = 'huge'; the config's sizes are small, large"),
        ({"training": {"learning_rate": 0}}, "training.learning_rate = 0; expected a number above 0"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate = 'fast'; expected a number above 0"),
        ({"sizes": {"small": 0}}, "small = 0"),
    ],
    ids=str,
)
def test_bad_settings_raise(section, message, tmp_path, no_training):
    with pytest.raises(ValueError, match=message):
        run(changed(CARTPOLE, **section), tmp_path)
    assert not list(tmp_path.iterdir())


def write(path, settings):
    """JSON is YAML."""
    path.write_text(json.dumps({name: values for name, values in settings.items() if values}))
    return str(path)


def test_the_command_prints_a_line(tmp_path, capsys):
    config = write(tmp_path / "span_pole.yaml", CARTPOLE)
    out = tmp_path / "runs"
    record = job.main(["--config", config, "--out", str(out), "--training.seed", "3", "--span.degree=1"])
    assert record["seed"] == 3
    assert record["settings"]["span"] == {"degree": 1}
    assert (out / "pole/small/span/rate0.001_seed3/record.json").is_file()
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"pole: span with {record['num_parameters']:,} parameters by PPO, return ")
    assert "after 64 steps" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--training.sed", "3"], "error: --training.sed: unknown key 'sed'; did you mean 'seed'"),
        (["--training.network", "mlp"], "error: training.network = 'mlp'"),
        (["--span.degree", "9"], "degree = 9"),
        (["seed=3"], "error: 'seed=3' is no setting"),
    ],
    ids=str,
)
def test_the_command_says_what_is_wrong(flags, message, tmp_path, no_training):
    config = write(tmp_path / "span_pole.yaml", CARTPOLE)
    with pytest.raises(SystemExit, match=message):
        job.main(["--config", config, "--out", str(tmp_path / "runs"), *flags])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"absent\.yaml"):
        job.main(["--config", str(tmp_path / "absent.yaml")])


@pytest.mark.parametrize("out", [[], ["--out", "elsewhere"]], ids=["no folder", "a folder"])
def test_recorded_data_go_to_the_offline_job(tmp_path, monkeypatch, no_training, out):
    calls = []
    monkeypatch.setattr(job.span_offline, "main", lambda arguments: calls.append(arguments) or {"answer": 42})
    config = write(tmp_path / "span_recorded.yaml", {"data": {"dataset_id": "a/b-v0"}})
    assert job.main(["--config", config, *out, "--training.seed", "1"]) == {"answer": 42}
    ((*arguments,),) = calls
    assert arguments[:2] == ["--config", config]
    assert arguments[-2:] == ["--training.seed", "1"]
    if out:
        assert arguments[2:-2] == out


def test_a_run_that_diverges_has_a_record(tmp_path, monkeypatch):
    learn = stable_baselines3.PPO.learn

    def diverge(agent, *arguments, **keywords):
        with torch.no_grad():
            next(agent.policy.parameters()).fill_(torch.nan)
        return learn(agent, *arguments, **keywords)

    monkeypatch.setattr(stable_baselines3.PPO, "learn", diverge)
    for network in ("span", "mlp_tanh"):
        record = run(changed(CARTPOLE, training={"network": network}), tmp_path)
        assert record["diverged"]
        assert (record["steps"], record["returns"]) == ([32, 64], [20.0, 20.0])
