"""SPAN as policies of stable-baselines3: PPO, A2C, SAC, TD3 and DDPG train it as they train their own networks.

```python
>>> from stable_baselines3 import PPO
>>> from leviathan.integrations.sb3 import SpanActorCriticPolicy

>>> PPO(SpanActorCriticPolicy, "CartPole-v1", policy_kwargs=dict(latent_dim=6, rank=8, num_cells=8)).learn(50_000)
```
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from math import isnan, log, pi
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from huggingface_hub.errors import StrictDataclassError
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel
from stable_baselines3.common.preprocessing import get_action_dim, is_image_space
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN, SACPolicy
from stable_baselines3.sac.policies import Actor as SACActor
from stable_baselines3.td3.policies import Actor as TD3Actor
from stable_baselines3.td3.policies import TD3Policy
from torch import Tensor, nn

from leviathan.acting import act_components
from leviathan.span import SpanConfig, SpanModel
from sna_core.latent import LatentBlock, LatentComponents
from sna_core.squashed_product import is_traced

HALF_LOG_2PI = 0.5 * log(2 * pi)
NET_ARGUMENTS = ("net_arch", "activation_fn")  # of an MLP, which there is none of


@dataclass(frozen=True)
class _Span:
    """The policy's arguments that describe its networks, beside SB3's own.

    An instance makes the networks once their number of inputs is known.
    """

    latent_dim: int = SpanConfig.latent_dim
    rank: int = SpanConfig.rank
    num_cells: int = SpanConfig.num_cells
    degree: int = SpanConfig.degree
    num_blocks: int = SpanConfig.num_blocks
    normalization: Literal["layer"] | None = SpanConfig.normalization
    learn_knot_scale: bool = SpanConfig.learn_knot_scale
    initialization: Literal["smooth", "rough"] = SpanConfig.initialization

    def config(self, num_inputs: int, num_outputs: int = 1) -> SpanConfig:
        """The configuration of a network; raises a ``ValueError`` if a setting is out of range."""
        try:
            return SpanConfig(num_inputs=num_inputs, num_outputs=num_outputs, **asdict(self))
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error

    def components(self, num_inputs: int, num_networks: int = 1) -> LatentComponents:
        return self.config(num_inputs).build_components(num_networks)


if TYPE_CHECKING:
    from stable_baselines3.common.policies import BasePolicy as _MixedWith
else:
    _MixedWith = object


class _SpanPolicy(_MixedWith):
    """What the policies share: their arguments, the choice of SB3's extractor, and a look at observations."""

    def _actor(self) -> tuple[LatentComponents, nn.Linear]:
        """The actor's components and its read-out."""
        raise NotImplementedError

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        *,
        latent_dim: int = _Span.latent_dim,
        rank: int = _Span.rank,
        num_cells: int = _Span.num_cells,
        degree: int = _Span.degree,
        num_blocks: int = _Span.num_blocks,
        normalization: Literal["layer"] | None = _Span.normalization,
        learn_knot_scale: bool = _Span.learn_knot_scale,
        initialization: Literal["smooth", "rough"] = _Span.initialization,
        check_observations: Literal["box", "warn", "finite"] = "warn",
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        **arguments: Any,
    ):
        if given := [name for name in NET_ARGUMENTS if name in arguments]:
            raise ValueError(f"{', '.join(given)}: a SPAN has no hidden layers; give latent_dim, rank and num_cells.")
        if check_observations not in ("box", "warn", "finite"):
            raise ValueError(f"check_observations = {check_observations!r}; expected 'box', 'warn' or 'finite'.")
        self.span = _Span(
            latent_dim, rank, num_cells, degree, num_blocks, normalization, learn_knot_scale, initialization
        )
        self.check_observations = check_observations
        self._warned = False
        self._bounds: dict[str, list[np.ndarray]] = {}  # of the parts of an observation
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            features_extractor_class=features_extractor_class or extractor_for(observation_space),
            **arguments,
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = super()._get_constructor_parameters()
        for name in NET_ARGUMENTS:
            parameters.pop(name)
        return {**parameters, **asdict(self.span), "check_observations": self.check_observations}

    @torch.no_grad()
    def actor_model(self) -> SpanModel:
        """A copy of the actor as a [`~leviathan.SpanModel`], which is saved and shared as transformers' models are.

        It maps what the features' extractor gives, (batch, features), to logits of discrete actions, or to means of
        continuous ones, for SAC, TD3 and DDPG before the hyperbolic tangent.
        """
        components, readout = self._actor()
        first = components.blocks[0]
        assert isinstance(first, LatentBlock)
        num_networks = first.num_networks
        model = SpanModel(self.span.config(first.weight.shape[1], readout.out_features))
        for name, parameter in model.components.named_parameters():
            rows = components.get_parameter(name)
            parameter.copy_(rows[: len(rows) // num_networks])  # the actor is the first
        model.readout.load_state_dict(readout.state_dict())
        return model.eval()

    def obs_to_tensor(self, observation: np.ndarray | dict[str, np.ndarray]) -> tuple[PyTorchObs, bool]:
        """As SB3, after a look for observations that are no numbers or, as asked, outside of their space.

        Raises:
            ValueError: If one is NaN or infinite, or, for ``check_observations="box"``, outside of its box.
        """
        tensor, vectorized = super().obs_to_tensor(observation)
        self._look_at(tensor)
        return tensor, vectorized

    def _look_at(self, observation: PyTorchObs) -> None:
        if is_traced():
            return
        if isinstance(observation, dict):
            assert isinstance(self.observation_space, spaces.Dict)
            for key, values in observation.items():
                self._look_at_part(values, self.observation_space[key], f"observation[{key!r}]")
        else:
            self._look_at_part(observation, self.observation_space, "observation")

    def _look_at_part(self, observation: Tensor, space: spaces.Space, name: str) -> None:
        if not isinstance(space, spaces.Box) or observation.dtype == torch.uint8:
            return
        values = observation.float().cpu().numpy()  # as the networks see them
        if name not in self._bounds:
            largest = np.finfo(np.float32).max  # below infinity
            self._bounds[name] = [bound.clip(-largest, largest).astype(np.float32) for bound in (space.low, space.high)]
        low, high = self._bounds[name]
        if ((values >= low) & (values <= high)).all():
            return
        if not (finite := np.isfinite(values)).all():
            row, *place = np.argwhere(~finite)[0].tolist()
            raise ValueError(
                f"{name} {place} = {values[row, *place]}; expected a finite number. stable_baselines3's VecCheckNan "
                "finds the step that it comes from."
            )
        if self.check_observations == "finite" or self._warned:
            return
        outside = (values < low) | (values > high)
        row, *place = np.argwhere(outside)[0].tolist()
        problem = (
            f"{name} {place} = {values[row, *place]:g} lies outside of its interval [{low[*place]:g}, "
            f"{high[*place]:g}]: rescale it, or widen the observation_space. VecNormalize does not; with it, "
            "give policy_kwargs=dict(check_observations='finite')."
        )
        if self.check_observations == "box":
            raise ValueError(problem)
        warnings.warn(problem, stacklevel=2)
        self._warned = True


def _checked(outputs: Tensor) -> Tensor:
    """What a network has given; raises a ``ValueError`` if it is NaN, as SB3's distributions do."""
    if not torch.compiler.is_exporting() and isnan(outputs.sum().item()):  # a graph cannot raise
        raise ValueError("The policy's output is NaN: its parameters have diverged; lower the learning rate.")
    return outputs


def extractor_for(space: spaces.Space) -> type[BaseFeaturesExtractor]:
    """SB3's extractor of features for a space: of several parts, of an image, or of numbers."""
    if isinstance(space, spaces.Dict):
        return CombinedExtractor
    return NatureCNN if is_image_space(space) else FlattenExtractor


class SpanExtractor(nn.Module):
    """Actor and critic side by side, in the place of SB3's ``MlpExtractor``; SB3's heads are the read-outs."""

    def __init__(self, components: LatentComponents, rank: int):
        super().__init__()
        self.components = components
        self.latent_dim_pi = self.latent_dim_vf = rank

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Components of actor and critic, each (batch, rank), of features (batch, num_inputs)."""
        actor, critic = act_components(self.components, features).unbind()
        return actor, critic

    def forward_actor(self, features: Tensor) -> Tensor:
        """The first of :meth:`forward`."""
        return act_components(self.components, features, network=0).squeeze(0)

    def forward_critic(self, features: Tensor) -> Tensor:
        """The second of :meth:`forward`."""
        return act_components(self.components, features, network=1).squeeze(0)


class SpanActorCriticPolicy(_SpanPolicy, ActorCriticPolicy):
    """A SPAN for the actor and one for the critic of PPO and A2C; discrete and continuous actions.

    Observations of a Dict space or images first pass SB3's extractor for them.

    Args:
        observation_space: Of the environment.
        action_space: Of the environment.
        lr_schedule: Learning rate over the progress that remains.
        latent_dim: As the following seven, an argument of [`~leviathan.SpanConfig`].
        check_observations: What is done where an observation lies outside of the observation space: ``"box"`` raises an
            error, ``"warn"`` warns once, ``"finite"`` does nothing. One that is not finite raises where the policy acts
            on it; an algorithm with a replay buffer may have learned from it by then: ``VecCheckNan`` stops before.
        features_extractor_class: None for SB3's own, by the observation space.
        arguments: Those of SB3's ``ActorCriticPolicy``, without ``net_arch`` and ``activation_fn``.

    Raises:
        ValueError: If a size is below 1, or ``net_arch`` is given.
    """

    mlp_extractor: SpanExtractor  # type: ignore[assignment]  # in the place of SB3's
    action_net: nn.Linear

    def _actor(self) -> tuple[LatentComponents, nn.Linear]:
        return self.mlp_extractor.components, self.action_net

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = SpanExtractor(self.span.components(self.features_dim, 2), self.span.rank).to(self.device)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """As SB3's, after the look at observations that predict takes."""
        self._look_at(obs)
        return super().forward(obs, deterministic)  # type: ignore[arg-type]  # which takes dicts as well

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """As SB3's, after the same look: the last observation of a rollout comes here alone."""
        self._look_at(obs)
        return super().predict_values(obs)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        gaussian = isinstance(self.action_dist, DiagGaussianDistribution)
        if not gaussian and not isinstance(self.action_dist, CategoricalDistribution):
            return super()._predict(observation, deterministic)
        # Draws an action without the distribution's object, which costs more time than the networks.
        features = BaseModel.extract_features(self, observation, self.pi_features_extractor)
        outputs = _checked(self.action_net(self.mlp_extractor.forward_actor(features)))
        if gaussian:
            return outputs if deterministic else outputs + self.log_std.exp() * torch.randn_like(outputs)
        if not deterministic:
            outputs = outputs - torch.empty_like(outputs).exponential_().log_()  # Gumbel's noise: its argmax is a draw
        return outputs.argmax(1)


class SpanContinuousCritic(BaseModel):
    """Critics Q(s, a) side by side: SB3's ``ContinuousCritic`` with all of its networks in one evaluation.

    Actions that require a gradient are an actor's that learns: the critics' parameters then get none. A loss of the
    critics on such actions takes them detached.
    """

    features_extractor: BaseFeaturesExtractor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        span: _Span,
        normalize_images: bool = True,
        n_critics: int = 2,
        share_features_extractor: bool = True,
    ):
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.share_features_extractor, self.n_critics = share_features_extractor, n_critics
        self.components = span.components(features_dim + get_action_dim(action_space), n_critics)
        self.weight = nn.Parameter(torch.randn(n_critics, span.rank, 1) * span.rank**-0.5)
        self.bias = nn.Parameter(torch.zeros(n_critics, 1, 1))

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, ...]:
        """The values of all critics, each (batch, 1)."""
        # As SB3: a shared extractor learns from the actor's loss alone.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.share_features_extractor):
            features = self.extract_features(obs, self.features_extractor)
        return self._values(features, actions).unbind()

    def q1_forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """The value of the first critic, (batch, 1)."""
        with torch.no_grad():
            features = self.extract_features(obs, self.features_extractor)
        return self._values(features, actions, network=0).squeeze(0)

    def _values(self, features: Tensor, actions: Tensor, network: int | None = None) -> Tensor:
        # Where the actor learns, the critics' own gradients would be computed to be thrown away.
        x, frozen = torch.cat([features, actions], dim=1), actions.requires_grad
        weight, bias = (each.detach() if frozen else each for each in (self.weight, self.bias))
        if network is not None:
            weight, bias = weight[network, None], bias[network, None]
        return torch.baddbmm(bias, self.components(x, network, frozen=frozen), weight)


class _Components(nn.Module):
    """One network's components, (batch, num_inputs) -> (batch, rank): the body of an actor."""

    def __init__(self, components: LatentComponents):
        super().__init__()
        self.components = components

    def forward(self, features: Tensor) -> Tensor:
        return act_components(self.components, features).squeeze(0)


class SpanSACActor(SACActor):
    """SB3's actor of SAC with a SPAN for a body; mean and spread weight the same components."""

    latent_pi: _Components  # type: ignore[assignment]  # in the place of SB3's layers
    log_std: nn.Module  # type: ignore[assignment]  # a parameter for gSDE alone

    def __init__(self, *, span: _Span, **keywords: Any):
        super().__init__(net_arch=[span.rank], **keywords)
        self.span = span
        self.latent_pi = _Components(span.components(self.features_dim))

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> Tensor:
        """As SB3's: actions in [-1, 1]; a draw without the distribution's object, where there is no gSDE."""
        if self.use_sde:
            return super().forward(obs, deterministic)
        if deterministic:
            return self.mu(self.latent_pi(self.extract_features(obs, self.features_extractor))).tanh()
        return self._draw(obs)[0]

    def action_log_prob(self, obs: PyTorchObs) -> tuple[Tensor, Tensor]:
        """As SB3's: actions (batch, actions) and the logarithm of their density (batch,).

        The density of what was drawn is that of the noise, over the spread and the slope of the hyperbolic tangent: the
        terms in which SB3's formula differs cancel, in the gradient too.
        """
        if self.use_sde:
            return super().action_log_prob(obs)
        actions, log_std, noise = self._draw(obs)
        slope = 1 - actions.square() + self.action_dist.epsilon
        return actions, -(0.5 * noise.square() + HALF_LOG_2PI + log_std + slope.log()).sum(1)

    def _draw(self, obs: PyTorchObs) -> tuple[Tensor, Tensor, Tensor]:
        latent = self.latent_pi(self.extract_features(obs, self.features_extractor))
        mean, log_std = self.mu(latent), self.log_std(latent).clamp(LOG_STD_MIN, LOG_STD_MAX)
        noise = torch.randn_like(mean)
        return torch.addcmul(mean, log_std.exp(), noise).tanh(), log_std, noise

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return _with_span(super()._get_constructor_parameters(), self.span)


class SpanTD3Actor(TD3Actor):
    """SB3's deterministic actor of TD3 and DDPG as a SPAN."""

    def __init__(self, *, span: _Span, **keywords: Any):
        super().__init__(net_arch=[span.rank], **keywords)
        self.span = span
        *_, readout, squash = self.mu
        self.mu = nn.Sequential(_Components(span.components(self.features_dim)), readout, squash)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return _with_span(super()._get_constructor_parameters(), self.span)


def _with_span(parameters: dict[str, Any], span: _Span) -> dict[str, Any]:
    return {**{name: value for name, value in parameters.items() if name not in NET_ARGUMENTS}, "span": span}


class _SpanOffPolicy(_SpanPolicy):
    """Actors and critics of policies that learn from a replay buffer."""

    actor_class: type[nn.Module]
    actor_kwargs: dict[str, Any]
    critic_kwargs: dict[str, Any]

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return _checked(super()._predict(observation, deterministic))  # type: ignore[safe-super]  # of what it mixes with

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        """An actor, on the policy's device."""
        return self._make(self.actor_class, self.actor_kwargs, features_extractor)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        """All critics, on the policy's device."""
        return self._make(SpanContinuousCritic, self.critic_kwargs, features_extractor)

    def _make(
        self, kind: type[nn.Module], keywords: dict[str, Any], features_extractor: BaseFeaturesExtractor | None
    ) -> Any:
        keywords = self._update_features_extractor(keywords, features_extractor)
        for name in NET_ARGUMENTS:
            keywords.pop(name)
        return kind(**keywords, span=self.span).to(self.device)


class SpanSACPolicy(_SpanOffPolicy, SACPolicy):
    """A SPAN for the actor and for each critic of SAC.

    Arguments as of [`SpanActorCriticPolicy`], and those of SB3's ``SACPolicy``.
    """

    actor_class = SpanSACActor
    actor: SpanSACActor

    def _actor(self) -> tuple[LatentComponents, nn.Linear]:
        mean = self.actor.mu
        readout = mean[0] if isinstance(mean, nn.Sequential) else mean  # gSDE clips it
        assert isinstance(readout, nn.Linear)
        return self.actor.latent_pi.components, readout


class SpanTD3Policy(_SpanOffPolicy, TD3Policy):
    """A SPAN for the actor and for each critic of TD3 and DDPG.

    Arguments as of [`SpanActorCriticPolicy`], and those of SB3's ``TD3Policy``.
    """

    actor_class = SpanTD3Actor

    def _actor(self) -> tuple[LatentComponents, nn.Linear]:
        body, readout, _ = self.actor.mu
        assert isinstance(body, _Components)
        assert isinstance(readout, nn.Linear)
        return body.components, readout


__all__ = ["SpanActorCriticPolicy", "SpanSACPolicy", "SpanTD3Policy"]
