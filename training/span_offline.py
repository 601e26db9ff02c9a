"""Learns a policy from recorded transitions alone, without acting, and tries it in the data's environment.

    python -m training.span_offline --config training/configs/span_offline.yaml [--out folder] [--section.key value ...]
    accelerate launch -m training.span_offline --config training/configs/span_offline.yaml
    ACCELERATE_USE_CPU=true accelerate launch --config_file training/configs/multi_cpu.yaml -m training.span_offline ...

One algorithm, one kind of network, one data set and one seed. Writes `model.safetensors` and `record.json`: settings,
returns at each evaluation, losses, sizes and times. A record of the same settings that is there already is kept.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from gymnasium.envs.registration import EnvSpec
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from training.launching import check_joined
from training.offline import ALGORITHMS, Batch, OfflineAlgorithm, Policy
from training.offline_data import (
    Transitions,
    check_spaces,
    dataset_returns,
    evaluation_spec,
    observation_statistics,
    open_dataset,
    transitions,
)
from training.provenance import provenance, relative, write_json
from training.settings import Settings, read_settings

RETURN_RANGE = 1000.0  # between the worst and the best episode, once rewards are scaled as in implicit Q-learning
EVALUATION_SEED = 1_000_000  # far from those of training; all runs start from the same states
NETWORK = ("name", "num_parameters", "options")
DEFAULTS: Settings = {
    "data": {
        "dataset_id": None,
        "root": None,
        "env_id": None,
        "download": True,
        "standardise": True,
        "scale_rewards": False,
        "random_return": None,
        "expert_return": None,
    },
    "algorithm": {"name": "td3bc"},
    "network": {"name": "span", "num_parameters": 10_000, "options": {}},
    "critic": {},  # as network, if left out
    "training": {
        "num_steps": 100_000,
        "batch_size": 256,
        "learning_rate": 3e-4,
        "eval_every": 20_000,
        "num_eval_episodes": 10,
        "seed": 0,
    },
}


class MakeNamedNetwork(Protocol):
    """What makes a network of a kind with about so many parameters."""

    def __call__(
        self, name: str, num_inputs: int, num_outputs: int, *, num_parameters: int, **options: Any
    ) -> nn.Module:
        """A network (batch, num_inputs) -> (batch, num_outputs)."""


def make_span_network(
    name: str, num_inputs: int, num_outputs: int, *, num_parameters: int, **options: Any
) -> nn.Module:
    """A network of ``training.span_networks``."""
    from training.span_networks import make_network  # whose libraries a network given to run does without

    return make_network(name, num_inputs, num_outputs, num_parameters=num_parameters, **options)


def algorithm_options(name: str) -> dict[str, Any]:
    """The options of an algorithm that a config may set, with their defaults.

    Raises:
        ValueError: If there is no such algorithm.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm.name = {name!r}; expected one of {', '.join(ALGORITHMS)}.")
    options = signature(ALGORITHMS[name]).parameters.values()
    ours = ("make_critic", "learning_rate")
    return {each.name: each.default for each in options if each.kind == each.KEYWORD_ONLY and each.name not in ours}


def allowed_keys() -> dict[str, Sequence[str]]:
    """The keys of each section of a config."""
    options = sorted({option for name in ALGORITHMS for option in algorithm_options(name)})
    return {
        **{section: tuple(values) for section, values in DEFAULTS.items()},
        "algorithm": ("name", *options),
        "critic": NETWORK,
    }


def complete(settings: Settings) -> Settings:
    """Settings with all defaults written out.

    Raises:
        ValueError: On an option of another algorithm, or a number out of range.
    """
    whole = {section: DEFAULTS[section] | settings.get(section, {}) for section in DEFAULTS}
    name = whole["algorithm"]["name"]
    options = {"name": name} | algorithm_options(name)
    if strange := sorted(whole["algorithm"].keys() - options.keys()):
        raise ValueError(
            f"algorithm.{', '.join(strange)}: no option of {name}; leave out, or choose another algorithm."
        )
    whole["algorithm"] = options | whole["algorithm"]
    inherited = (
        whole["network"] if whole["critic"].get("name", whole["network"]["name"]) == whole["network"]["name"] else {}
    )
    whole["critic"] = DEFAULTS["network"] | inherited | whole["critic"]
    for key in ("num_steps", "batch_size", "eval_every", "num_eval_episodes"):
        value = whole["training"][key]
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"training.{key} = {value!r}; expected a whole number of at least 1.")
    if not whole["data"]["dataset_id"]:
        raise ValueError("data.dataset_id is missing; give a data set, such as mujoco/hopper/expert-v0.")
    return whole


def run(settings: Settings, out: str | Path, *, make_network: MakeNamedNetwork = make_span_network) -> dict[str, Any]:
    """Trains, evaluates and saves; returns what `record.json` holds.

    On several processes each takes an equal part of every batch, and only the first evaluates and writes.

    Args:
        settings: Sections as of :func:`allowed_keys`, over ``DEFAULTS``.
        out: Folder for weights and record.
        make_network: Makes the networks that the settings name.

    Raises:
        ValueError: On settings that do not fit each other or the data, or a folder that holds another record.
    """
    out, settings = Path(out), complete(settings)
    if (known := kept_record(out, told(settings))) is not None:
        return known
    accelerator = _accelerator()
    options = settings["training"]
    if options["batch_size"] % accelerator.num_processes:
        raise ValueError(
            f"training.batch_size = {options['batch_size']} cannot be shared out evenly among "
            f"{accelerator.num_processes} processes; give a multiple."
        )
    with accelerator.main_process_first():  # a download is one process's job
        data, spec = read_data(settings)
    set_seed(options["seed"])  # the same networks on every process
    algorithm = build(settings, data, make_network)
    if settings["data"]["standardise"]:
        algorithm.policy.set_statistics(*observation_statistics(data))
    rows = prepare_batch(data, algorithm.policy, reward_scale(data) if settings["data"]["scale_rewards"] else 1.0)
    num_parameters = count_parameters(algorithm)
    set_seed(options["seed"], device_specific=True)  # other noise on every process
    evaluations, seconds = train(accelerator, algorithm, rows, spec, options)
    for each in evaluations:
        each["normalised_return"] = normalised(each["mean_return"], data)
    returns = dataset_returns(data)
    record = {
        "settings": told(settings),
        "environment": spec.id,
        "data": {
            "num_steps": len(data),
            "num_episodes": len(returns),
            "mean_return": returns.mean().item(),
            "best_return": returns.max().item(),
            "random_return": data.random_return,
            "expert_return": data.expert_return,
        },
        "num_parameters": num_parameters,
        "evaluations": evaluations,
        "final": evaluations[-1] if evaluations else None,
        "seconds": seconds,
        "seconds_per_step": seconds / options["num_steps"],
        "provenance": provenance(options["seed"]),
    }
    if accelerator.is_main_process:
        save_weights(algorithm, out / "model.safetensors")
        write_json(out / "record.json", record)  # last: what it speaks of is there
    accelerator.wait_for_everyone()
    return record


def train(
    accelerator: Accelerator, algorithm: OfflineAlgorithm, data: Batch, spec: EnvSpec, options: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], float]:
    """Trains in place, and evaluates on the way and at the end.

    Args:
        accelerator: Of all processes.
        algorithm: The same on each of them.
        data: All steps, as :func:`prepare_batch` gives them.
        spec: The environment of the evaluation.
        options: The settings of the section "training".

    Returns:
        Evaluations, with mean losses since the one before, which only the first process has; and the seconds of
        training alone.

    Raises:
        ValueError: If a loss is no longer finite.
    """
    # Not wrapped for several processes: gradients are averaged in one message, those of each loss by themselves.
    accelerator.prepare_model(algorithm, evaluation_mode=True).train()
    algorithm.optimizers = {
        name: accelerator.prepare_optimizer(optimizer) for name, optimizer in algorithm.optimizers.items()
    }
    algorithm.backward = accelerator.backward
    if accelerator.num_processes > 1:
        algorithm.average = partial(accelerator.reduce, reduction="mean")
    batches = minibatches(data, options["batch_size"], options["seed"], accelerator)
    evaluations, seconds, started = [], 0.0, time.perf_counter()
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    show = None if accelerator.is_main_process else True  # None: only where there is a terminal
    with tqdm(total=options["num_steps"], unit=" steps", disable=show) as bar:
        for step in range(1, options["num_steps"] + 1):
            for name, loss in algorithm.update(next(batches)).items():
                sums[name] = sums[name] + loss if name in sums else loss
                counts[name] += 1
            bar.update()
            if step % options["eval_every"] and step != options["num_steps"]:
                continue
            means = accelerator.reduce(torch.stack([sums[name] / counts[name] for name in sums]), reduction="mean")
            losses = dict(zip(sums, means.tolist(), strict=True))
            sums.clear()
            counts.clear()
            if not np.isfinite(list(losses.values())).all():
                raise ValueError(
                    f"losses are {losses} by step {step}; lower training.learning_rate = {options['learning_rate']}."
                )
            seconds += time.perf_counter() - started
            if accelerator.is_main_process:
                returns = evaluate(algorithm.policy, spec, options["num_eval_episodes"])
                evaluations.append(
                    {
                        "step": step,
                        "mean_return": returns.mean().item(),
                        "std_return": returns.std(correction=0).item(),
                        "returns": returns.tolist(),
                        "losses": losses,
                    }
                )
                bar.set_postfix({"return": f"{evaluations[-1]['mean_return']:.4g}"}, refresh=False)
            accelerator.wait_for_everyone()
            started = time.perf_counter()
    return evaluations, seconds


def told(settings: Settings) -> Settings:
    """Settings as a record has them, which does not tell of the machine."""
    root = settings["data"]["root"]
    return settings | {"data": settings["data"] | {"root": None if root is None else relative(root)}}


def kept_record(
    out: Path, settings: Settings, comparable: Callable[[Settings], Settings] = dict
) -> dict[str, Any] | None:
    """The record in a folder, None if there is none.

    Args:
        out: The folder.
        settings: As a record has them.
        comparable: Of settings, what has to be the same.

    Raises:
        ValueError: If it is one of other settings.
    """
    path = out / "record.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if comparable(record["settings"]) != comparable(json.loads(json.dumps(settings))):
        raise ValueError(f"{out} holds a record of other settings; choose another --out, or delete it.")
    return record


def read_data(settings: Settings) -> tuple[Transitions, EnvSpec]:
    """Transitions, with the returns of reference that the settings give, and the environment of the evaluation.

    Raises:
        ValueError: If either is out of reach, or they do not fit each other.
    """
    options = settings["data"]
    dataset = open_dataset(options["dataset_id"], root=options["root"], download=options["download"])
    data = transitions(dataset)
    given = {key: options[key] for key in ("random_return", "expert_return") if options[key] is not None}
    try:
        spec = evaluation_spec(dataset) if options["env_id"] is None else gymnasium.spec(options["env_id"])
    except gymnasium.error.Error as error:
        raise ValueError(f"data.env_id = {options['env_id']!r}: {error}") from error
    with gymnasium.make(spec) as environment:
        check_spaces(environment.observation_space, environment.action_space)
        theirs = environment.observation_space.shape + environment.action_space.shape
    if theirs != (sizes := (data.observations.shape[1], data.actions.shape[1])):
        raise ValueError(f"{spec.id} has {theirs} observations and actions, the data set {sizes}; change data.env_id.")
    return replace(data, **given), spec


def build(
    settings: Settings, data: Transitions, make_network: MakeNamedNetwork = make_span_network
) -> OfflineAlgorithm:
    """The algorithm of some settings, for spaces such as those of the data."""
    actor, critic = (partial(_named, make_network, settings[section]) for section in ("network", "critic"))
    options = dict(settings["algorithm"])
    return ALGORITHMS[options.pop("name")](
        actor,
        data.observations.shape[1],
        data.action_low,
        data.action_high,
        make_critic=critic,
        learning_rate=settings["training"]["learning_rate"],
        **options,
    )


def _named(make_network: MakeNamedNetwork, section: Mapping[str, Any], num_inputs: int, num_outputs: int) -> nn.Module:
    return make_network(
        section["name"], num_inputs, num_outputs, num_parameters=section["num_parameters"], **section["options"]
    )


def count_parameters(algorithm: OfflineAlgorithm) -> dict[str, int]:
    """Of the policy, and of all networks that learn."""
    return {
        "policy": sum(each.numel() for each in algorithm.policy.parameters() if each.requires_grad),
        "all": sum(each.numel() for each in algorithm.parameters() if each.requires_grad),
    }


def reward_scale(data: Transitions) -> float:
    """What rewards are multiplied by, so that the returns of the best and the worst episode are 1000 apart.

    Raises:
        ValueError: If all episodes have the same return.
    """
    returns = dataset_returns(data)
    spread = (returns.max() - returns.min()).item()
    if not spread > 0:
        raise ValueError(f"{data.dataset_id}: all episodes have the same return; set data.scale_rewards to false.")
    return RETURN_RANGE / spread


def prepare_batch(data: Transitions, policy: Policy, scale: float) -> Batch:
    """All steps with standardised observations and scaled rewards."""
    mean, std = policy.observation_mean.cpu(), policy.observation_std.cpu()
    batch = data.batch()
    return batch._replace(
        observations=(batch.observations - mean) / std,
        next_observations=(batch.next_observations - mean) / std,
        rewards=batch.rewards * scale,
    )


def minibatches(data: Batch, batch_size: int, seed: int, accelerator: Accelerator) -> Iterator[Batch]:
    """Rows drawn with replacement, for ever: this process's part of a batch that is the same for any number of them.

    The rows of all fields are stored side by side, on the device, so that a batch is one gather.
    """
    fields = [each.reshape(len(each), -1) for each in data]
    rows = torch.cat(fields, 1).to(accelerator.device)
    widths = [each.shape[1] for each in fields]
    generator, size = torch.Generator().manual_seed(seed), batch_size // accelerator.num_processes
    first = accelerator.process_index * size
    while True:
        numbers = torch.randint(len(rows), (batch_size,), generator=generator)[first : first + size]
        observations, actions, rewards, following, terminated = rows[numbers.to(rows.device)].split(widths, 1)
        yield Batch(observations, actions, rewards.squeeze(1), following, terminated.squeeze(1))


def evaluate(policy: Policy, environment: str | EnvSpec, num_episodes: int, seed: int = EVALUATION_SEED) -> Tensor:
    """Returns of whole episodes, (num_episodes,), float64, all run side by side.

    Args:
        policy: Acts by its mean, without noise.
        environment: With the policy's spaces.
        num_episodes: How many.
        seed: Of the first episode; each has the next one.
    """
    spec = gymnasium.spec(environment) if isinstance(environment, str) else environment
    environments = gymnasium.make_vec(spec, num_envs=num_episodes, vectorization_mode="sync")
    try:
        dtype = environments.single_action_space.dtype
        device, was_training = policy.action_center.device, policy.training
        policy.eval()
        observations, _ = environments.reset(seed=seed)
        running, returns = np.ones(num_episodes, dtype=bool), np.zeros(num_episodes)
        while running.any():
            actions = policy.act(torch.as_tensor(observations, dtype=torch.float32, device=device)).cpu().numpy()
            observations, rewards, terminated, truncated, _ = environments.step(actions.astype(dtype))
            returns += np.where(running, rewards, 0.0)  # the episodes that follow in the same place do not count
            running &= ~(terminated | truncated)
        policy.train(was_training)
    finally:
        environments.close()
    return torch.from_numpy(returns)


def normalised(mean_return: float, data: Transitions) -> float | None:
    """A return on the scale from random actions, 0, to an expert, 1; None where the data set does not know these."""
    low, high = data.random_return, data.expert_return
    return None if low is None or high is None or high == low else (mean_return - low) / (high - low)


def save_weights(algorithm: OfflineAlgorithm, path: Path) -> None:
    """All networks, with what the policy standardises by; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(path.name + ".partial")
    save_file({name: each.detach().cpu().clone() for name, each in algorithm.state_dict().items()}, partial_path)
    partial_path.replace(path)


def load_algorithm(
    out: str | Path, data: Transitions, *, make_network: MakeNamedNetwork = make_span_network
) -> OfflineAlgorithm:
    """What :func:`run` has trained; its ``policy.act`` takes the environment's observations.

    Args:
        out: The folder.
        data: For the sizes of observations and actions.
        make_network: As it was for the run.
    """
    settings = json.loads(Path(out, "record.json").read_text(encoding="utf-8"))["settings"]
    algorithm = build(settings, data, make_network)
    algorithm.load_state_dict(load_file(Path(out, "model.safetensors")))
    return algorithm.eval()


def _accelerator() -> Accelerator:
    accelerator = Accelerator(mixed_precision="no")
    check_joined(accelerator.num_processes)
    return accelerator


def summary(record: Mapping[str, Any]) -> str:
    """A record as lines of text."""
    settings, data = record["settings"], record["data"]
    lines = [
        f"{settings['algorithm']['name']} on {settings['data']['dataset_id']}: {data['num_steps']:,} steps in "
        f"{data['num_episodes']:,} episodes, mean return {data['mean_return']:.1f}",
        f"{settings['network']['name']}, {record['num_parameters']['policy']:,} parameters in the policy and "
        f"{record['num_parameters']['all']:,} in all; {record['seconds']:.1f} s, "
        f"{record['seconds_per_step'] * 1e3:.2f} ms for each step",
    ]
    for each in record["evaluations"]:
        normalised = each["normalised_return"]
        told = "" if normalised is None else f", normalised {normalised:.3f}"
        lines.append(f"step {each['step']:,}: return {each['mean_return']:.1f} +- {each['std_return']:.1f}{told}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    allowed = allowed_keys()
    keys = "\n".join(f"  --{section}.{{{','.join(sorted(names))}}}" for section, names in allowed.items())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="settings, over those of the file:\n" + keys,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, type=Path, help="YAML file of settings")
    parser.add_argument("--out", type=Path, help="folder of weights and record; runs and the config's name if left out")
    known, flags = parser.parse_known_args(arguments)
    out = known.out or Path("runs", known.config.stem)
    try:
        record = run(read_settings(known.config, flags, allowed), out)
    except (ValueError, OSError, StrictDataclassError) as error:
        raise SystemExit(f"error: {error}") from error
    if record["evaluations"]:  # of the first process alone
        print(summary(record))
    return record


if __name__ == "__main__":
    main()
