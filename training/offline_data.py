"""Data sets of transitions in Minari's format: recorded from trained agents, read from disk, or downloaded."""

import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import minari
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Space
from minari import MinariDataset
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.storage.datasets_root_dir import get_dataset_path
from torch import Tensor

from training.offline import Batch

ROOT_VARIABLE = "MINARI_DATASETS_PATH"  # where Minari looks for data sets
STD_OFFSET = 1e-3  # added to standard deviations of observations, as in TD3+BC


class Agent(Protocol):
    """What chooses actions, such as an algorithm of Stable-Baselines3."""

    def predict(self, observation: np.ndarray, *, deterministic: bool) -> tuple[np.ndarray, Any]:
        """An observation (num_observations,) to an action (num_actions,) and a state, which is not used."""


Agents = Agent | None | Sequence[tuple[Agent | None, float]]
"""An agent, None for actions drawn uniformly from their box, or several with the share of the steps of each."""


@dataclass(frozen=True)
class Transitions:
    """All steps of a data set, episode by episode, as float32.

    Attributes:
        dataset_id: Minari's name of the data set.
        observations: (steps, num_observations).
        actions: (steps, num_actions), in the environment's units.
        rewards: (steps,).
        next_observations: (steps, num_observations); of an episode's last step, the observation it ended with.
        terminated: (steps,), 1 where the episode came to an end, else 0.
        timeouts: (steps,), 1 where it was cut off (truncated), else 0.
        bounds: (episodes + 1,), int64: episode i has the steps from bounds[i] to bounds[i + 1] - 1.
        action_low: Least action, (num_actions,).
        action_high: Greatest action, (num_actions,).
        random_return: Mean return of random actions, if the data set tells.
        expert_return: Mean return of an expert, if the data set tells.
    """

    dataset_id: str
    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminated: Tensor
    timeouts: Tensor
    bounds: Tensor
    action_low: Tensor
    action_high: Tensor
    random_return: float | None
    expert_return: float | None

    def __len__(self) -> int:
        return len(self.rewards)

    def batch(self) -> Batch:
        """All steps as one batch."""
        return Batch(self.observations, self.actions, self.rewards, self.next_observations, self.terminated)


def record(
    model: Agents,
    env_id: str,
    num_steps: int,
    *,
    dataset_id: str,
    seed: int,
    noise: float = 0.0,
    env_kwargs: Mapping[str, Any] | None = None,
    root: str | Path | None = None,
    random_return: float | None = None,
    expert_return: float | None = None,
    description: str | None = None,
) -> MinariDataset:
    """Records whole episodes of agents, until there are enough steps, and stores them on disk.

    Actions are an agent's deterministic ones, plus noise, within their box. An agent of Stable-Baselines3 that was
    trained with VecNormalize sees observations normalised as it has learned them; those in the data set are not.

    Args:
        model: An agent; or pairs of an agent and its share of the steps, for a mixed data set: an expert, one that has
            learned for a short time, None for random actions.
        env_id: Of the environment, as Gymnasium knows it.
        num_steps: At least so many steps.
        dataset_id: Name such as "pendulum/expert-v0".
        seed: Of environments and noise.
        noise: Standard deviation, as a fraction of the range of actions.
        env_kwargs: Options of the environment.
        root: Folder of data sets; as Minari chooses, from MINARI_DATASETS_PATH, if None.
        random_return: Mean return of random actions, to be stored beside an expert's. Where it is None, Minari measures
            it.
        expert_return: Mean return of an expert, to be stored.
        description: Of the data set.

    Raises:
        ValueError: On options out of range, spaces that are no boxes, or a data set that is there already.
    """
    agents = [(model, 1.0)] if model is None or hasattr(model, "predict") else list(model)
    shares = np.array([share for _, share in agents], dtype=float)
    if not len(shares) or not (shares > 0).all() or not np.isclose(shares.sum(), 1):
        raise ValueError(f"the agents' shares are {shares.tolist()}; expected positive numbers that add up to 1.")
    if num_steps < 1 or not 0 <= noise < float("inf"):
        raise ValueError(f"num_steps = {num_steps}, noise = {noise}; expected at least 1, and at least 0.")
    _check_name(dataset_id)
    with datasets_in(root) as folder, gymnasium.make(env_id, **(env_kwargs or {})) as env:
        place = folder / dataset_id
        if place.exists():
            raise ValueError(f"{dataset_id} is there already, in {place}; choose another dataset_id, or delete it.")
        check_spaces(env.observation_space, env.action_space)
        env.action_space.seed(seed)
        rng, buffers = np.random.default_rng(seed), []
        for agent, share in zip([agent for agent, _ in agents], shares, strict=True):
            steps = 0
            while steps < share * num_steps:
                buffers.append(_episode(agent, env, rng, noise, seed + len(buffers)))
                steps += len(buffers[-1])
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial, datasets_in(partial):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".* is set to None")  # an author's address, for instance
                minari.create_dataset_from_buffers(
                    dataset_id,
                    buffers,
                    env=env,
                    ref_min_score=random_return,
                    ref_max_score=expert_return,
                    algorithm_name=", ".join(type(agent).__name__ if agent else "random" for agent, _ in agents),
                    description=description,
                    data_format="hdf5",
                )
            Path(partial, dataset_id).rename(place)
        return minari.load_dataset(dataset_id)


def _episode(
    agent: Agent | None, env: gymnasium.Env, rng: np.random.Generator, noise: float, seed: int
) -> EpisodeBuffer:
    space, normaliser = env.action_space, getattr(agent, "get_vec_normalize_env", lambda: None)()
    observation, _ = env.reset(seed=seed)
    observations, actions, rewards, terminations, truncations = [observation], [], [], [], []
    while not (terminations and (terminations[-1] or truncations[-1])):
        if agent is None:
            action = space.sample()
        else:
            seen = observation if normaliser is None else normaliser.normalize_obs(observation)
            action, _ = agent.predict(seen, deterministic=True)
        if noise:
            action = action + noise * (space.high - space.low) * rng.standard_normal(space.shape)
        action = np.clip(action, space.low, space.high).astype(space.dtype)
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(float(reward))
        terminations.append(bool(terminated))
        truncations.append(bool(truncated))
    return EpisodeBuffer(
        seed=seed,
        observations=np.stack(observations),
        actions=np.stack(actions),
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
        infos={},
    )


def open_dataset(dataset_id: str, *, root: str | Path | None = None, download: bool = True) -> MinariDataset:
    """A data set from disk, or from Minari's servers if it is not there.

    Args:
        dataset_id: Name such as "pendulum/expert-v0", or of a hosted one "mujoco/hopper/expert-v0".
        root: Folder of data sets; as Minari chooses, from MINARI_DATASETS_PATH, if None.
        download: Whether the servers may be asked.

    Raises:
        ValueError: If there is no such data set, or it cannot be read or downloaded.
    """
    _check_name(dataset_id)
    with datasets_in(root) as folder:
        if not (folder / dataset_id / "data").exists():
            if not download:
                raise ValueError(f"{dataset_id} is not in {folder}; record it, or allow the download.")
            try:
                minari.download_dataset(dataset_id)
            except Exception as error:  # of whichever client of the network Minari uses
                raise ValueError(
                    f"{dataset_id} is not in {folder}, and Minari's servers do not give it ({error}). Is the name "
                    "right and the network there? Otherwise put the data set into this folder, or record one."
                ) from error
        return minari.load_dataset(dataset_id)


def load(dataset_id: str, *, root: str | Path | None = None, download: bool = True) -> Transitions:
    """The transitions of a data set, as :func:`open_dataset` finds it.

    Raises:
        ValueError: If there is no such data set, or it does not hold what it should.
    """
    return transitions(open_dataset(dataset_id, root=root, download=download))


def transitions(dataset: MinariDataset) -> Transitions:
    """All steps of a data set.

    Raises:
        ValueError: If its spaces are no boxes with one axis, actions are not bounded, or it holds no steps or what is
            not finite.
    """
    check_spaces(dataset.observation_space, dataset.action_space)
    columns: list[list[np.ndarray]] = [[] for _ in range(6)]
    for episode in dataset.iterate_episodes():
        states = np.asarray(episode.observations, dtype=np.float32)
        steps = (states[:-1], episode.actions, episode.rewards, states[1:], episode.terminations, episode.truncations)
        if not len(episode.rewards):
            continue
        for column, values in zip(columns, steps, strict=True):
            if len(values) != len(episode.rewards):
                raise ValueError(
                    f"{dataset.id}, episode {episode.id}: {len(states)} observations, {len(episode.actions)} actions "
                    f"and {len(episode.rewards)} rewards; expected one more observation than rewards."
                )
            column.append(np.asarray(values, dtype=np.float32))
    if not columns[0]:
        raise ValueError(f"{dataset.id} holds no steps.")
    lengths = torch.tensor([0, *map(len, columns[0])])
    fields = [torch.from_numpy(np.concatenate(column)) for column in columns]
    names = ("observations", "actions", "rewards", "next_observations", "terminated", "timeouts")
    for name, values in zip(names, fields, strict=True):
        if not values.isfinite().all():
            raise ValueError(f"{dataset.id}: of the {name} some are not finite; filter out their episodes.")
    metadata = dataset.storage.metadata
    return Transitions(
        dataset.id,
        *fields,
        bounds=lengths.cumsum(0),
        action_low=torch.from_numpy(dataset.action_space.low.astype(np.float32)),
        action_high=torch.from_numpy(dataset.action_space.high.astype(np.float32)),
        random_return=metadata.get("ref_min_score"),
        expert_return=metadata.get("ref_max_score"),
    )


def dataset_returns(data: Transitions) -> Tensor:
    """The sum of rewards of each episode, (episodes,), float64."""
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), data.rewards.double().cumsum(0)])
    return sums[data.bounds].diff()


def observation_statistics(data: Transitions) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of observations, each (num_observations,), by which TD3+BC standardises them."""
    return data.observations.mean(0), data.observations.std(0, correction=0) + STD_OFFSET


def evaluation_spec(dataset: MinariDataset) -> EnvSpec:
    """Of the environment in which a policy that learned from a data set is evaluated.

    A data set's own specification may name any function of any package to be called; here its name, options and
    number of steps are taken, and the rest from what is registered under that name.

    Raises:
        ValueError: If the data set does not tell, or the environment is not registered.
    """
    metadata = dataset.storage.metadata
    told = json.loads(metadata.get("eval_env_spec") or metadata.get("env_spec") or "{}")
    if told.get("id") not in gymnasium.registry:
        raise ValueError(
            f"{dataset.id} is of the environment {told.get('id')}, which is not registered with Gymnasium; give the "
            "env_id of one, as package:name if a package registers it."
        )
    spec = deepcopy(gymnasium.registry[told["id"]])
    spec.kwargs |= told.get("kwargs") or {}
    spec.max_episode_steps = told.get("max_episode_steps", spec.max_episode_steps)
    return spec


def check_spaces(observations: Space, actions: Space) -> None:
    """Raises unless both are boxes of floating point numbers with one axis, that of actions bounded."""
    for name, space in (("observations", observations), ("actions", actions)):
        if not isinstance(space, Box) or len(space.shape) != 1:
            raise ValueError(f"the space of {name} is {space}; expected a Box with one axis.")
    if not np.issubdtype(actions.dtype, np.floating) or not actions.is_bounded():
        raise ValueError(f"the space of actions is {actions}; expected bounded floating point numbers.")


@contextmanager
def datasets_in(root: str | Path | None) -> Iterator[Path]:
    """Has Minari keep its data sets in a folder for a while; gives the folder, of Minari's choice if None."""
    before = os.environ.get(ROOT_VARIABLE)
    if root is not None:
        os.environ[ROOT_VARIABLE] = str(Path(root).resolve())
    try:
        yield get_dataset_path()
    finally:
        os.environ.pop(ROOT_VARIABLE, None)
        if before is not None:
            os.environ[ROOT_VARIABLE] = before


def _check_name(dataset_id: str) -> None:
    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as error:  # the latter where there is no version
        raise ValueError(f"dataset_id = {dataset_id!r}; expected a name such as 'pendulum/expert-v0'.") from error
