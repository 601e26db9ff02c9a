"""The offline part of the SPAN study: data sets recorded from agents, and networks that learn from them."""

import multiprocessing
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

from training import span_offline
from training.offline_data import open_dataset
from training.offline_data import record as record_dataset
from training.span import algorithm_class
from training.span_networks import make_network

EXPERT_NOISE = 0.05  # of the range of actions
TUNING_SEED = 100
KINDS = ("expert", "mixed")
RANDOM_EPISODES = 20

Job = tuple[Path, dict[str, Any]]  # folder and settings of a run


def load_agent(folder: Path, algorithm: str) -> BaseAlgorithm:
    """The agent of a run."""
    return algorithm_class(algorithm).load(folder / "agent.zip", device="cpu")


def make_datasets(
    root: Path,
    expert: Mapping[str, Any],
    folder: Path,
    *,
    num_steps: int,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
) -> list[str]:
    """Records what an agent does, alone ("expert") and with as many steps of random actions ("mixed").

    What is there is kept.

    Args:
        root: Folder of data sets.
        expert: The record of the agent's run.
        folder: Of that run.
        num_steps: Of each data set, at least.
        kinds: Of ``KINDS``.
        seed: Of environments and noise.

    Returns:
        The names of the data sets.

    Raises:
        ValueError: If the agent sees normalised observations, or a data set that is there has fewer steps.
    """
    task = expert["settings"]["task"]
    if task.get("normalize"):
        raise ValueError(f"{expert['task']}: the agent of a task with normalize cannot be recorded; choose another.")
    names = {kind: f"{expert['task']}/{kind}-v0" for kind in kinds}
    if missing := [kind for kind, name in names.items() if not (root / name).exists()]:
        agent, environment = load_agent(folder, expert["algorithm"]), expert["environment"]
        env = make_vec_env(environment, RANDOM_EPISODES, seed=seed, env_kwargs=dict(task.get("options", {})))
        high, _ = evaluate_policy(agent, env, RANDOM_EPISODES, warn=False)
        low = np.mean(_random_returns(env, seed))
        for kind in missing:
            agents = agent if kind == "expert" else [(agent, 0.5), (None, 0.5)]
            record_dataset(
                agents,
                environment,
                num_steps,
                dataset_id=names[kind],
                seed=seed,
                noise=EXPERT_NOISE,
                env_kwargs=task.get("options"),
                root=root,
                random_return=float(low),
                expert_return=float(high),
            )
        env.close()
    for name in names.values():
        if (found := open_dataset(name, root=root, download=False).total_steps) < num_steps:
            raise ValueError(f"{name} in {root} has {found} steps, fewer than {num_steps}; delete it and its runs.")
    return list(names.values())


def _random_returns(env: VecEnv, seed: int) -> list[float]:
    """Of one episode in each environment: the first to end would be the short ones."""
    env.seed(seed)
    env.action_space.seed(seed)
    env.reset()
    totals, running = np.zeros(env.num_envs), np.ones(env.num_envs, dtype=bool)
    while running.any():
        _, rewards, dones, _ = env.step(np.stack([env.action_space.sample() for _ in range(env.num_envs)]))
        totals += np.where(running, rewards, 0.0)
        running &= ~dones
    return totals.tolist()


def jobs(
    names: Sequence[str],
    plan: Mapping[str, Any],
    root: Path,
    out: Path,
    rates: Mapping[tuple[str, str, str], float] | None = None,
) -> list[Job]:
    """Every run of a plan, a seed of all before the next.

    Args:
        names: Data sets.
        plan: ``algorithms``, ``networks``, ``factors`` of ``num_parameters``, ``seeds``, and ``num_steps``,
            ``batch_size`` and ``learning_rates`` of the training.
        root: Folder of data sets.
        out: Folder of runs.
        rates: Learning rates by data set, algorithm and network. None asks for the runs that choose them, at factor 1.
    """
    found = []
    for seed in [TUNING_SEED] if rates is None else range(plan["seeds"]):
        for name, algorithm, network in product(names, plan["algorithms"], plan["networks"]):
            grid = plan["learning_rates"] if rates is None else [rates[name, algorithm, network]]
            for factor, rate in product([1] if rates is None else plan["factors"], grid):
                folder = out / name / algorithm / f"{network}_{factor:g}_rate{rate:g}" / f"seed{seed}"
                settings = {
                    "data": {
                        "dataset_id": name,
                        "root": str(root),
                        "download": False,
                        "scale_rewards": algorithm == "iql",
                    },
                    "algorithm": {"name": algorithm},
                    "network": {"name": network, "num_parameters": round(factor * plan["num_parameters"])},
                    "training": {
                        "num_steps": plan["num_steps"],
                        "batch_size": plan["batch_size"],
                        "eval_every": plan["num_steps"],
                        "learning_rate": rate,
                        "seed": seed,
                    },
                }
                found.append((folder, settings))
    return found


def do(job: Job) -> dict[str, Any]:
    """The record of a run, which is trained if there is none yet."""
    import torch

    torch.set_num_threads(1)
    folder, settings = job
    return span_offline.run(settings, folder, make_network=make_network)


def run_all(work: Sequence[Job], num_processes: int) -> list[dict[str, Any]]:
    """Records of all runs, several at one time."""
    show = partial(tqdm, total=len(work), unit="run", disable=None)
    if num_processes == 1 or len(work) < 2:
        return [do(each) for each in show(work)]
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        return list(show(pool.imap(do, work)))


def chosen(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], float]:
    """The learning rate of the highest return among tuning runs, by data set, algorithm and network."""
    best: dict[tuple[str, str, str], tuple[float, float]] = {}
    for record in records:
        settings = record["settings"]
        key = (settings["data"]["dataset_id"], settings["algorithm"]["name"], settings["network"]["name"])
        found = (record["final"]["normalised_return"], settings["training"]["learning_rate"])
        best[key] = max(best.get(key, found), found)
    return {key: rate for key, (_, rate) in best.items()}


def told(record: Mapping[str, Any], base: int) -> dict[str, Any]:
    """What the study keeps of an offline run."""
    settings = record["settings"]
    return {
        "dataset": settings["data"]["dataset_id"],
        "algorithm": settings["algorithm"]["name"],
        "network": settings["network"]["name"],
        "parameter_factor": round(settings["network"]["num_parameters"] / base, 4),
        "num_parameters": record["num_parameters"]["policy"],
        "learning_rate": settings["training"]["learning_rate"],
        "seed": settings["training"]["seed"],
        "normalised_return": record["final"]["normalised_return"],
        "seconds": record["seconds"],
        "commit": record["provenance"]["commit"],
    }
