"""What agents of the SPAN study look like: the values that a critic gives the states of a pendulum, and a drive."""

from pathlib import Path

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from stable_baselines3.common.base_class import BaseAlgorithm

from eval.span_figures import value_grid
from training.span import EVALUATION_SEED


def pendulum_values(agent: BaseAlgorithm) -> dict[str, NDArray]:
    """The value of each state under a SAC or TD3 agent: min over critics of Q(s, actor(s))."""

    def value(angle: NDArray, velocity: NDArray) -> NDArray:
        states = np.stack([np.cos(angle), np.sin(angle), velocity], -1).reshape(-1, 3)
        observations = torch.as_tensor(states, dtype=torch.float32)
        with torch.no_grad():
            actions = (
                agent.actor(observations, deterministic=True)
                if hasattr(agent, "ent_coef")
                else agent.actor(observations)
            )
            values = torch.cat(agent.critic(observations, actions), 1).amin(1)
        return values.numpy().reshape(np.shape(angle))

    return value_grid(value)


def save_values(path: Path, agents: dict[str, BaseAlgorithm]) -> None:
    """Writes the grids of several agents in one file."""
    arrays: dict[str, NDArray] = {}
    for name, agent in agents.items():
        grid = pendulum_values(agent)
        arrays |= {"angle": grid["angle"], "velocity": grid["velocity"], name: grid["value"]}
    partial = path.with_name(path.name + ".partial")
    save_file({name: np.ascontiguousarray(each, np.float32) for name, each in arrays.items()}, partial)
    partial.replace(path)


def drive_frames(agent: BaseAlgorithm, *, every: int = 3, seed: int = EVALUATION_SEED) -> list[NDArray]:
    """Pictures of one episode of ``leviathan/Waypoints-v0``, one of ``every`` steps."""
    import leviathan.integrations.gymnasium  # registers it

    env = gymnasium.make(leviathan.integrations.gymnasium.ENV_ID, render_mode="rgb_array")
    observation, _ = env.reset(seed=seed)
    frames, step, over = [], 0, False
    while not over:
        if step % every == 0:
            frames.append(env.render())
        action, _ = agent.predict(observation, deterministic=True)
        observation, _, terminated, truncated, _ = env.step(action)
        over, step = terminated or truncated, step + 1
    env.close()
    return frames
