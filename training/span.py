"""Trains an agent of stable-baselines3 whose networks are SPANs, or MLPs or KANs of their size, on one task.

    python -m training.span --config training/configs/span_cartpole.yaml [--out runs/span] [--section.key value ...]

Writes `agent.zip` (SB3's own format) and `record.json`, a learning curve, in a folder for each task, size, network,
learning rate and seed. A run whose record is there is not run again; one of other settings there is an error. A config
with a section `data` instead of `task` trains offline, as `training.span_offline` does.
"""

import argparse
import importlib
import inspect
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gymnasium
import numpy as np
import stable_baselines3
from huggingface_hub.errors import StrictDataclassError
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from tqdm import tqdm

from training import span_offline
from training.provenance import provenance, write_json
from training.settings import Settings, load_yaml, read_settings
from training.span_networks import FAMILIES, SPAN_OPTIONS, count_parameters, make_agent

ALGORITHMS = ("PPO", "A2C", "SAC", "TD3", "DDPG")
TASK = {
    "environment": None,  # Gymnasium's id; a module that registers it stands before a colon
    "options": {},  # of the environment
    "algorithm": "PPO",
    "total_steps": 50_000,
    "num_envs": 1,
    "normalize": False,  # observations and rewards, by running means (VecNormalize)
    "action_noise": None,  # normal, or ornstein_uhlenbeck
    "noise_scale": 0.1,
    "num_evaluations": 20,
    "num_episodes": 10,  # of an evaluation
    "low": 0.0,  # return of a random agent
    "high": 1.0,  # of a good one
    "threshold": 1.0,  # of one that solves the task
}
TRAINING = {"network": "span", "size": "small", "learning_rate": 1e-3, "seed": 0, "purpose": "test"}
NOISE = {"normal": NormalActionNoise, "ornstein_uhlenbeck": OrnsteinUhlenbeckActionNoise}
RECORD = "record.json"
EVALUATION_SEED = 10_000  # the same starts for all agents, and none of training


def allowed_keys() -> dict[str, Sequence[str]]:
    """The keys of each section of a config."""
    arguments = {name for each in ALGORITHMS for name in inspect.signature(algorithm_class(each)).parameters}
    return {
        "task": tuple(TASK),
        "algorithm": sorted(arguments - {"policy", "env", "learning_rate", "seed", "device", "verbose"}),
        "sizes": SIZES,
        "span": SPAN_OPTIONS,
        "training": tuple(TRAINING),
    }


SIZES = ("small", "large")


def algorithm_class(name: str) -> type[BaseAlgorithm]:
    """SB3's class.

    Raises:
        ValueError: If the study has none of this name.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"task.algorithm = {name!r}; expected one of {', '.join(ALGORITHMS)}.")
    return getattr(stable_baselines3, name)


def run(settings: Settings, task_name: str, out: str | Path, *, progress: bool = True) -> dict[str, Any]:
    """Trains one agent, unless its record is there, and returns the record.

    Args:
        settings: Sections as of :func:`allowed_keys`.
        task_name: What the record and its folder call the task.
        out: Folder of all runs.
        progress: Whether to show a bar.

    Raises:
        ValueError: On settings that do not fit each other, or a folder that holds a run of others.
    """
    task, training = {**TASK, **settings["task"]}, {**TRAINING, **settings["training"]}
    check(task, training, settings["sizes"], settings["algorithm"])
    folder = folder_of(out, task_name, training)
    if (known := span_offline.kept_record(folder, settings, what_counts)) is not None:
        return known
    env, evaluation_env = environments(task, training["seed"])
    agent = make(settings, env)
    curve = Curve(evaluation_env, task, progress)
    start = time.perf_counter()
    try:
        agent.learn(task["total_steps"], callback=curve)
    except (ValueError, RuntimeError):  # what SB3's distributions make of NaN, by their sort and version
        if not (diverged := has_diverged(agent)):
            raise
        curve.fill(task["low"])
    else:
        diverged = False
    seconds = time.perf_counter() - start - curve.seconds
    record = {
        "task": task_name,
        "environment": task["environment"],
        "algorithm": task["algorithm"],
        "network": training["network"],
        "size": training["size"],
        "num_parameters": count_parameters(agent.policy),
        "learning_rate": training["learning_rate"],
        "seed": training["seed"],
        "purpose": training["purpose"],
        "total_steps": task["total_steps"],
        "steps": curve.steps,
        "returns": curve.returns,
        "successes": curve.successes if all(each is not None for each in curve.successes) else None,
        "reference": {name: task[name] for name in ("low", "high", "threshold")},
        "diverged": diverged,
        "train_seconds": seconds,
        "settings": settings,
        "provenance": provenance(training["seed"]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    agent.save(folder / "agent.zip")
    if isinstance(env, VecNormalize):
        np.savez(folder / "normalization.npz", mean=env.obs_rms.mean, variance=env.obs_rms.var)
    write_json(folder / RECORD, record)
    env.close(), evaluation_env.close()
    return record


def check(
    task: Mapping[str, Any],
    training: Mapping[str, Any],
    sizes: Mapping[str, int],
    algorithm: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Raises a ``ValueError`` for the first setting that is none."""
    taken = inspect.signature(algorithm_class(task["algorithm"])).parameters
    if unknown := sorted(set(algorithm) - set(taken)):
        raise ValueError(f"algorithm: {task['algorithm']} takes no {', '.join(unknown)}.")
    if not isinstance(task["environment"], str):
        raise ValueError(f"task.environment = {task['environment']!r}; expected the id of an environment.")
    if training["network"] not in FAMILIES:
        raise ValueError(f"training.network = {training['network']!r}; expected one of {', '.join(FAMILIES)}.")
    if training["size"] not in sizes:
        raise ValueError(f"training.size = {training['size']!r}; the config's sizes are {', '.join(sizes) or 'none'}.")
    if not isinstance(sizes[training["size"]], int) or sizes[training["size"]] < 1:
        raise ValueError(f"sizes.{training['size']} = {sizes[training['size']]!r}; expected an integer of at least 1.")
    if task["action_noise"] not in (None, *NOISE):
        raise ValueError(f"task.action_noise = {task['action_noise']!r}; expected one of {', '.join(NOISE)}, or none.")
    for name in ("total_steps", "num_envs", "num_evaluations", "num_episodes"):
        if not isinstance(task[name], int) or task[name] < 1:
            raise ValueError(f"task.{name} = {task[name]!r}; expected an integer of at least 1.")
    if task["num_evaluations"] * task["num_envs"] > task["total_steps"]:
        raise ValueError(
            f"task.num_evaluations = {task['num_evaluations']} with task.num_envs = {task['num_envs']} in "
            f"task.total_steps = {task['total_steps']}; expected a step of all environments between evaluations."
        )
    if not isinstance(training["learning_rate"], int | float) or not training["learning_rate"] > 0:
        raise ValueError(f"training.learning_rate = {training['learning_rate']!r}; expected a number above 0.")
    if not task["low"] < task["threshold"] <= task["high"]:
        raise ValueError(
            f"task.low, threshold and high = {task['low']}, {task['threshold']}, {task['high']}; expected them to rise."
        )


def has_diverged(agent: BaseAlgorithm) -> bool:
    """Whether a parameter is no number any more."""
    return not all(each.isfinite().all() for each in agent.policy.parameters())


def what_counts(settings: Settings) -> Settings:
    """Of settings, what a run depends on, defaults written out."""
    training = {**TRAINING, **settings["training"]}
    return {
        "task": {**TASK, **settings["task"]},
        "algorithm": settings["algorithm"],
        "size": settings["sizes"][training["size"]],
        "span": settings["span"] if training["network"] == "span" else {},
        "training": training,
    }


def folder_of(out: str | Path, task_name: str, training: Mapping[str, Any]) -> Path:
    """Where a run lies."""
    run_name = f"rate{training['learning_rate']:g}_seed{training['seed']}"
    return Path(out, task_name, training["size"], training["network"], run_name)


def environments(task: Mapping[str, Any], seed: int) -> tuple[VecEnv, VecEnv]:
    """Those to train on and those to evaluate on.

    Raises:
        ValueError: If Gymnasium knows none of this id.
    """
    module, colon, name = task["environment"].rpartition(":")
    if colon:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"task.environment = {task['environment']!r}: {error}") from error
    try:
        env, evaluation_env = (
            make_vec_env(name, number, seed=start, env_kwargs=dict(task["options"]))
            for number, start in ((task["num_envs"], seed), (task["num_episodes"], EVALUATION_SEED))
        )
    except gymnasium.error.Error as error:
        raise ValueError(f"task.environment = {task['environment']!r}: {error}") from error
    if task["normalize"]:
        env = VecNormalize(env)
        evaluation_env = VecNormalize(evaluation_env, training=False, norm_reward=False)
        evaluation_env.obs_rms = env.obs_rms
    return env, evaluation_env


def make(settings: Settings, env: VecEnv) -> BaseAlgorithm:
    """The agent of a config."""
    task, training = {**TASK, **settings["task"]}, {**TRAINING, **settings["training"]}
    algorithm = algorithm_class(task["algorithm"])
    arguments = dict(settings["algorithm"])
    policy = {**arguments.pop("policy_kwargs", {})}
    # One operation for all parameters instead of ten for each, which is much of a small network's update.
    faster = {"fused": True, **({"eps": 1e-5} if task["algorithm"] == "PPO" else {})}
    if "optimizer_class" not in policy:
        policy["optimizer_kwargs"] = {**faster, **policy.get("optimizer_kwargs", {})}
    options = {}
    if training["network"] == "span":
        options = {**settings["span"], **({"check_observations": "finite"} if task["normalize"] else {})}
    if task["action_noise"] is not None:
        shape = env.action_space.shape
        arguments["action_noise"] = NOISE[task["action_noise"]](np.zeros(shape), np.full(shape, task["noise_scale"]))
    return make_agent(
        algorithm,
        training["network"],
        settings["sizes"][training["size"]],
        env,
        options=options,
        policy_kwargs=policy,
        learning_rate=training["learning_rate"],
        seed=training["seed"],
        device="cpu",
        **arguments,
    )


class Curve(BaseCallback):
    """Evaluates the deterministic policy at even intervals."""

    def __init__(self, env: VecEnv, task: Mapping[str, Any], progress: bool):
        super().__init__()
        self.env, self.num_episodes = env, task["num_episodes"]
        self.num_evaluations, self.total = task["num_evaluations"], task["total_steps"]
        self.steps: list[int] = []
        self.returns: list[float] = []
        self.successes: list[float | None] = []
        self.seconds = 0.0
        self.bar = tqdm(total=self.total, unit="step", disable=None if progress else True)

    def _on_step(self) -> bool:
        self.bar.update(min(self.num_timesteps, self.total) - self.bar.n)
        if len(self.steps) < self.num_evaluations and self.num_timesteps >= self._due():
            self._evaluate()
        return True

    def _due(self) -> float:
        # Multiplied first: the last one is due at the last step, and not a rounding error after it.
        return self.total * (len(self.steps) + 1) / self.num_evaluations

    def _evaluate(self) -> None:
        start, successes = time.perf_counter(), []

        def note(local: dict[str, Any], _: dict[str, Any]) -> None:
            if local["done"] and "is_success" in local["info"]:
                successes.append(local["info"]["is_success"])

        self.env.seed(EVALUATION_SEED)
        returns, _ = evaluate_policy(
            self.model, self.env, self.num_episodes, return_episode_rewards=True, callback=note, warn=False
        )
        self.steps.append(round(self._due()))
        self.returns.append(float(np.mean(returns)))
        self.successes.append(float(np.mean(successes)) if successes else None)
        self.bar.set_postfix({"return": f"{self.returns[-1]:.1f}"})
        self.seconds += time.perf_counter() - start

    def fill(self, value: float) -> None:
        """Takes evaluations that a run did not live to see for this return, and for failures."""
        while len(self.steps) < self.num_evaluations:
            self.steps.append(round(self._due()))
            self.returns.append(float(value))
            self.successes.append(0.0 if None not in self.successes else None)
        self.bar.close()

    def _on_training_end(self) -> None:
        self.bar.close()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, type=Path, help="YAML file of settings")
    parser.add_argument("--out", type=Path, help="folder of all runs; runs/span if left out")
    known, flags = parser.parse_known_args(arguments)
    try:
        if "data" in (load_yaml(known.config) or {}):
            out = [] if known.out is None else ["--out", str(known.out)]
            return span_offline.main(["--config", str(known.config), *out, *flags])
        settings = read_settings(known.config, flags, allowed_keys())
        record = run(settings, known.config.stem.removeprefix("span_"), known.out or Path("runs/span"))
    except (ValueError, OSError, StrictDataclassError) as error:
        raise SystemExit(f"error: {error}") from error
    print(
        f"{record['task']}: {record['network']} with {record['num_parameters']:,} parameters by {record['algorithm']}, "
        f"return {record['returns'][-1]:.1f} after {record['total_steps']:,} steps, {record['train_seconds']:.1f} s"
    )
    return record


if __name__ == "__main__":
    main()
