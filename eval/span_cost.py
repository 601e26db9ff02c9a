"""What SPAN costs beside networks of its size: one update of PPO and of SAC, and acting on one observation.

All networks take turns within one run, so that a machine that is busy for a while is busy for all of them.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger

from eval.span_study import OURS
from training.span_networks import FAMILIES, count_parameters, make_agent

REFERENCE = {"PPO": "mlp_tanh", "SAC": "mlp_relu"}  # what SB3 takes by itself
UPDATES, ACTIONS = 16, 100  # of one timing
Timed = Callable[[], Any]


def cost_part(
    tasks: Sequence[tuple[str, str, int]] = (
        ("PPO", "CartPole-v1", 755),
        ("PPO", "LunarLander-v3", 9800),
        ("SAC", "Pendulum-v1", 3748),
        ("SAC", "Hopper-v5", 15_000),
    ),
    *,
    networks: Sequence[str] = tuple(FAMILIES),
    batch_size: int = 256,
    repeats: int = 20,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Medians over ``repeats`` turns, and ratios to the MLP that SB3 takes by itself, with as many parameters.

    Args:
        tasks: Algorithm, environment and number of parameters of actor and critics.
        networks: Keys of ``training.span_networks.FAMILIES``; among them those of ``REFERENCE``.
        batch_size: Of an update.
        repeats: Turns.
        options: Of SPAN.

    Returns:
        ``rows``, and for the updates and for acting what targets are held against, on the task on which SPAN does
        worst: by network the seconds, the ratio and the number of parameters.
    """
    rows = []
    for algorithm, environment, num_parameters in tasks:
        for fused in (False, True):
            agents = {
                name: _agent(algorithm, environment, name, num_parameters, batch_size, fused, options)
                for name in networks
            }
            timed = {"update": {name: _updates(agent, batch_size) for name, agent in agents.items()}}
            if not fused:
                timed["act"] = {name: _acts(agent, deterministic=False) for name, agent in agents.items()}
                timed["act_deterministic"] = {name: _acts(agent, deterministic=True) for name, agent in agents.items()}
            for what, each in timed.items():
                seconds = turns(each, repeats)
                for name in networks:
                    rows.append(
                        {
                            "what": what,
                            "algorithm": algorithm,
                            "environment": environment,
                            "batch_size": batch_size if what == "update" else 1,
                            "fused_adam": fused,
                            "network": name,
                            "num_parameters": count_parameters(agents[name].policy),
                            "seconds": seconds[name],
                            "ratio": seconds[name] / seconds[REFERENCE[algorithm]],
                        }
                    )
    return {"rows": rows, **{key: _worst(rows, **of) for key, of in FIGURES.items()}}


FIGURES = {
    "ppo_update": {"what": "update", "algorithm": "PPO"},
    "sac_update": {"what": "update", "algorithm": "SAC"},
    "act": {"what": "act"},
}


def _worst(rows: Sequence[Mapping[str, Any]], **of: str) -> dict[str, Any]:
    """By network the rows of the task of SPAN's largest ratio, with the optimiser that SB3 takes by itself."""
    rows = [row for row in rows if not row["fused_adam"] and of.items() <= row.items()]
    ours = [row for row in rows if row["network"] == OURS]
    if not ours:
        return {}
    where = ("algorithm", "environment")
    worst = [max(ours, key=lambda row: row["ratio"])[key] for key in where]
    return {
        row["network"]: {key: row[key] for key in ("seconds", "ratio", "num_parameters", *where)}
        for row in rows
        if [row[key] for key in where] == worst
    }


def turns(timed: Mapping[str, Timed], repeats: int) -> dict[str, float]:
    """The median time of each, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for function in timed.values():
        function()
    for _ in range(repeats):
        for name, function in timed.items():
            start = time.perf_counter()
            count = function()
            times[name].append((time.perf_counter() - start) / count)
    return {name: statistics.median(each) for name, each in times.items()}


def _agent(
    algorithm: str,
    environment: str,
    name: str,
    num_parameters: int,
    batch_size: int,
    fused: bool,
    options: Mapping[str, Any] | None,
) -> BaseAlgorithm:
    kind, keywords = {
        "PPO": (PPO, {"n_steps": UPDATES * batch_size, "batch_size": batch_size, "n_epochs": 1}),
        "SAC": (SAC, {"learning_starts": batch_size, "batch_size": batch_size, "buffer_size": 4 * batch_size}),
    }[algorithm]
    if fused:
        keywords["policy_kwargs"] = {"optimizer_kwargs": {"fused": True}}
    agent = make_agent(
        kind,
        name,
        num_parameters,
        gymnasium.make(environment),
        options=dict(options or {}) if name == "span" else None,
        seed=0,
        device="cpu",
        **keywords,
    )
    agent.learn(UPDATES * batch_size if algorithm == "PPO" else 2 * batch_size)
    agent.set_logger(Logger(None, []))
    return agent


def _updates(agent: BaseAlgorithm, batch_size: int) -> Timed:
    def update() -> int:
        if isinstance(agent, PPO):
            agent.train()
        else:
            agent.train(UPDATES, batch_size)
        return UPDATES

    return update


def _acts(agent: BaseAlgorithm, *, deterministic: bool) -> Timed:
    observation = np.zeros(agent.observation_space.shape, np.float32)

    def act() -> int:
        for _ in range(ACTIONS):
            agent.predict(observation, deterministic=deterministic)
        return ACTIONS

    return act


def one_thread() -> None:
    """Small networks are slower on several threads than on one."""
    torch.set_num_threads(1)
