"""Networks of equal numbers of parameters: SPANs, MLPs and KANs, alone or as policies of stable-baselines3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor, nn

from leviathan.integrations.sb3 import SpanActorCriticPolicy, SpanSACPolicy, SpanTD3Policy
from leviathan.span import SpanConfig, SpanModel
from training.kan import KANActorCriticPolicy, KANSACPolicy, KANTD3Policy, kan

MAX_WIDTH = 2048
LAYERS = 2  # hidden ones of an MLP
SPAN_OPTIONS = ("num_cells", "degree", "num_blocks", "normalization", "learn_knot_scale", "initialization")


@dataclass(frozen=True)
class Family:
    """Networks of one kind that differ in width.

    Args:
        network: Makes one for numbers of inputs, of outputs and a width; further options go to it by name.
        policies: SB3's policies by the name of an algorithm.
        policy_arguments: Of these, for a width.
        options: That the networks take besides.
    """

    network: Callable[..., nn.Module]
    policies: dict[str, str | type]
    policy_arguments: Callable[..., dict[str, Any]]
    options: tuple[str, ...] = ()


def span_sizes(width: int, **options: Any) -> dict[str, Any]:
    """A SPAN's arguments for a width, which is its rank: two components for each coordinate."""
    return {"latent_dim": max(2, width // 2), "rank": width, **options}


class _Prediction(nn.Module):
    """A SPAN that returns a tensor."""

    def __init__(self, config: SpanConfig):
        super().__init__()
        model = SpanModel(config)
        self.components, self.readout = model.components, model.readout

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.components(x)[0])


def _span(num_inputs: int, num_outputs: int, width: int, **options: Any) -> nn.Module:
    return _Prediction(SpanConfig(num_inputs=num_inputs, num_outputs=num_outputs, **span_sizes(width, **options)))


def _mlp(activation: type[nn.Module]) -> Family:
    def network(num_inputs: int, num_outputs: int, width: int) -> nn.Module:
        sizes = [num_inputs, *[width] * LAYERS]
        hidden = [part for i in range(LAYERS) for part in (nn.Linear(sizes[i], sizes[i + 1]), activation())]
        return nn.Sequential(*hidden, nn.Linear(width, num_outputs))

    return Family(
        network,
        dict.fromkeys(("PPO", "A2C", "SAC", "TD3", "DDPG"), "MlpPolicy"),
        lambda width: {"net_arch": [width] * LAYERS, "activation_fn": activation},
    )


FAMILIES = {
    "span": Family(
        _span,
        {
            **dict.fromkeys(("PPO", "A2C"), SpanActorCriticPolicy),
            "SAC": SpanSACPolicy,
            **dict.fromkeys(("TD3", "DDPG"), SpanTD3Policy),
        },
        span_sizes,
        SPAN_OPTIONS,
    ),
    "mlp_tanh": _mlp(nn.Tanh),
    "mlp_relu": _mlp(nn.ReLU),
    "kan": Family(
        lambda num_inputs, num_outputs, width: kan(num_inputs, width, num_outputs),
        {
            **dict.fromkeys(("PPO", "A2C"), KANActorCriticPolicy),
            "SAC": KANSACPolicy,
            **dict.fromkeys(("TD3", "DDPG"), KANTD3Policy),
        },
        lambda width: {"net_arch": [width]},
    ),
}


def family(name: str) -> Family:
    """The family of this name.

    Raises:
        ValueError: If there is none.
    """
    if name not in FAMILIES:
        raise ValueError(f"network {name!r} is unknown; expected one of {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def make_network(name: str, num_inputs: int, num_outputs: int, *, num_parameters: int, **options: Any) -> nn.Module:
    """A network whose number of parameters is as near to a given one as its family has any.

    Args:
        name: A key of ``FAMILIES``.
        num_inputs: Width of x, (batch, num_inputs).
        num_outputs: Width of the result, (batch, num_outputs).
        num_parameters: At least 1.
        options: For SPAN, ``SPAN_OPTIONS`` of [`~leviathan.SpanConfig`].

    Raises:
        ValueError: If the family is unknown, it has no such option, or a number is below 1 or out of reach.
    """
    kind = family(name)
    network = kind.network
    if strange := sorted(set(options) - set(kind.options)):
        known = ", ".join(kind.options) or "none"
        raise ValueError(f"options of {name}: {', '.join(strange)} unknown; expected some of: {known}.")
    if num_parameters < 1:
        raise ValueError(f"num_parameters = {num_parameters}; expected at least 1.")

    def count(width: int) -> int:
        with torch.device("meta"):
            return count_parameters(network(num_inputs, num_outputs, width, **options))

    return network(num_inputs, num_outputs, nearest_width(count, num_parameters), **options)


def make_agent(
    algorithm: type[BaseAlgorithm],
    name: str,
    num_parameters: int,
    *arguments: Any,
    options: dict | None = None,
    **keywords: Any,
) -> BaseAlgorithm:
    """An agent of SB3 whose networks, without targets, have as many parameters as is near to a given number.

    Args:
        algorithm: PPO, A2C, SAC, TD3 or DDPG.
        name: A key of ``FAMILIES``.
        num_parameters: Of actor and critics together.
        arguments: The algorithm's own after the policy, such as the environment.
        options: Further arguments of the policy.
        keywords: The algorithm's own.

    Raises:
        ValueError: If the family is unknown.
    """
    kind = family(name)
    if num_parameters < 1:
        raise ValueError(f"num_parameters = {num_parameters}; expected at least 1.")
    shared = keywords.pop("policy_kwargs", {})

    def make(width: int) -> BaseAlgorithm:
        sizes = kind.policy_arguments(width, **(options or {}))
        return algorithm(kind.policies[algorithm.__name__], *arguments, policy_kwargs={**shared, **sizes}, **keywords)

    def count(width: int) -> int:
        policy = make(width).policy
        return count_parameters(policy)

    return make(nearest_width(count, num_parameters))


def count_parameters(module: nn.Module) -> int:
    """Parameters that learn: a policy's targets, which follow, are left out."""
    return sum(p.numel() for name, p in module.named_parameters() if "_target." not in name)


def nearest_width(count: Callable[[int], int], num_parameters: int) -> int:
    """The width whose count is nearest, by bisection, as counts grow with the width.

    Raises:
        ValueError: If not even ``MAX_WIDTH`` has as many.
    """
    low, high = 1, 2
    while count(high) < num_parameters and high < MAX_WIDTH:
        low, high = high, 2 * high
    if count(high) < num_parameters:
        raise ValueError(f"num_parameters = {num_parameters}; a width of {high} has {count(high)}: ask for fewer.")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < num_parameters else (low, middle)
    return min((low, high), key=lambda width: abs(count(width) - num_parameters))
