r"""Kolmogorov-Arnold networks as a peer of SPAN: layers of learned functions of one input, and policies made of them.

.. math::
    y_o = \sum_i \big( w_{oi}\, \mathrm{silu}(x_i) + \sum_b \alpha_{oib} B_b(\tanh x_i) \big)

(arXiv 2404.19756, with the hyperbolic tangent in place of moving knots, as inputs have no bounds.) The local basis is
summed by one product for all inputs, as SPAN's is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from stable_baselines3.common.policies import ActorCriticPolicy, ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.sac.policies import Actor as SACActor
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import Actor as TD3Actor
from stable_baselines3.td3.policies import TD3Policy
from torch import Tensor, nn

from sna_core.bspline import UniformBSpline

NUM_CELLS, DEGREE = 5, 3  # of pykan's examples


class KANLayer(nn.Module):
    """One layer, (..., num_inputs) -> (..., num_outputs)."""

    def __init__(self, num_inputs: int, num_outputs: int):
        super().__init__()
        self.spline = UniformBSpline(NUM_CELLS, DEGREE, -1.0, 1.0)
        self.weight = nn.Parameter(torch.randn(num_outputs, num_inputs) * num_inputs**-0.5)
        self.coefficients = nn.Parameter(
            0.1 * torch.randn(num_outputs, num_inputs * self.spline.num_basis) * num_inputs**-0.5
        )

    def forward(self, x: Tensor) -> Tensor:
        """Evaluates the layer."""
        basis = self.spline.dense(x.tanh(), check=False).flatten(-2)
        return F.linear(torch.cat([F.silu(x), basis], -1), torch.cat([self.weight, self.coefficients], 1))


def kan(num_inputs: int, width: int, num_outputs: int | None = None) -> nn.Sequential:
    """Two layers of a width, and a linear read-out where outputs are given."""
    layers = [KANLayer(num_inputs, width), KANLayer(width, width)]
    return nn.Sequential(*layers, *([] if num_outputs is None else [nn.Linear(width, num_outputs)]))


class _Bodies(nn.Module):
    """Actor and critic in the place of SB3's ``MlpExtractor``."""

    def __init__(self, num_inputs: int, width: int):
        super().__init__()
        self.actor, self.critic = kan(num_inputs, width), kan(num_inputs, width)
        self.latent_dim_pi = self.latent_dim_vf = width

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(features), self.critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        return self.actor(features)

    def forward_critic(self, features: Tensor) -> Tensor:
        return self.critic(features)


class KANActorCriticPolicy(ActorCriticPolicy):
    """KANs for PPO and A2C; ``net_arch`` is their width, once."""

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = _Bodies(self.features_dim, self.net_arch[0]).to(self.device)


class _KANSACActor(SACActor):
    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.latent_pi = kan(self.features_dim, self.net_arch[0])


class _KANTD3Actor(TD3Actor):
    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        *_, readout, squash = self.mu
        self.mu = nn.Sequential(kan(self.features_dim, self.net_arch[0]), readout, squash)


class _KANCritic(ContinuousCritic):
    def __init__(self, *arguments: Any, net_arch: list[int], **keywords: Any):
        super().__init__(*arguments, net_arch=net_arch, **keywords)
        for i, network in enumerate(self.q_networks):
            self.q_networks[i] = kan(network[0].in_features, net_arch[0], 1)
            setattr(self, f"qf{i}", self.q_networks[i])


class _KANOffPolicy:
    actor_class: type[nn.Module]

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> nn.Module:
        return self.actor_class(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(
            self.device
        )

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ContinuousCritic:
        return _KANCritic(**self._update_features_extractor(self.critic_kwargs, features_extractor)).to(self.device)


class KANSACPolicy(_KANOffPolicy, SACPolicy):
    """KANs for SAC; ``net_arch`` is their width, once."""

    actor_class = _KANSACActor


class KANTD3Policy(_KANOffPolicy, TD3Policy):
    """KANs for TD3 and DDPG; ``net_arch`` is their width, once."""

    actor_class = _KANTD3Actor
