"""Offline reinforcement learning with any networks: behaviour cloning, TD3+BC and implicit Q-learning.

Each algorithm is a module of actor and critics made by factories, so that separable networks and perceptrons plug in
alike. It learns from minibatches of recorded transitions; :meth:`OfflineAlgorithm.update` is one gradient step.

Sources:
    Fujimoto, Gu (2021), "A Minimalist Approach to Offline Reinforcement Learning", arXiv 2106.06860.
    Kostrikov, Nair, Levine (2021), "Offline Reinforcement Learning with Implicit Q-Learning", arXiv 2110.06169.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from numbers import Real
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

MakeNetwork = Callable[[int, int], nn.Module]
"""From numbers of inputs and outputs to a network (batch, inputs) -> (batch, outputs)."""

LOG_STD_LIMITS = (-5.0, 2.0)  # of the Gaussian policy, in units of half the action range


class Batch(NamedTuple):
    """Transitions, in rows.

    Attributes:
        observations: (batch, num_observations), standardised if the policy's are.
        actions: (batch, num_actions), in the environment's units.
        rewards: (batch,).
        next_observations: As ``observations``; after a truncation the last one of its episode.
        terminated: (batch,), 1 where the episode ended in a state of no value, else 0. An episode that was merely cut
            off (truncated) goes on as far as values are concerned, and has 0.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminated: Tensor


class Policy(nn.Module):
    """A network whose outputs are squashed by tanh onto a box of actions.

    Args:
        network: (batch, num_observations) -> (batch, num_actions).
        num_observations: Length of an observation.
        action_low: Least action, (num_actions,).
        action_high: Greatest action, (num_actions,).

    Raises:
        ValueError: If the box is empty or unbounded.
    """

    def __init__(self, network: nn.Module, num_observations: int, action_low: Tensor, action_high: Tensor):
        super().__init__()
        low, high = torch.as_tensor(action_low).float(), torch.as_tensor(action_high).float()
        if low.shape != high.shape or low.ndim != 1 or not (low < high).all() or not (high - low).isfinite().all():
            raise ValueError(
                f"the actions' box is from {low.tolist()} to {high.tolist()}; expected finite bounds, the lower ones "
                "first."
            )
        self.network = network
        self.register_buffer("action_center", (low + high) / 2)
        self.register_buffer("action_half", (high - low) / 2)
        self.register_buffer("observation_mean", torch.zeros(num_observations))
        self.register_buffer("observation_std", torch.ones(num_observations))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Sets what :meth:`act` standardises observations by."""
        self.observation_mean.copy_(mean)
        self.observation_std.copy_(std)

    def forward(self, observations: Tensor) -> Tensor:
        """Standardised observations (batch, num_observations) to actions from -1 to 1, (batch, num_actions)."""
        return torch.tanh(self.network(observations))

    def to_unit(self, actions: Tensor) -> Tensor:
        """The environment's actions on the scale from -1 to 1."""
        return (actions - self.action_center) / self.action_half

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        """The environment's observations (batch, num_observations) to its actions (batch, num_actions)."""
        standardised = (observations - self.observation_mean) / self.observation_std
        return self.action_center + self.action_half * self(standardised)


class OfflineAlgorithm(nn.Module, ABC):
    """What the algorithms share: a policy, optimizers by name, and a step of one of them.

    Attributes:
        policy: The actor.
        optimizers: By the name of the loss that each makes less.
        backward: How a loss is differentiated; Accelerate's may be put here.
        average: If not None, gives the mean of a tensor over all processes. The batch is then shared out in equal
            parts, and a step is that of one process with the whole batch.
    """

    def __init__(self, policy: Policy):
        super().__init__()
        self.policy = policy
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.backward: Callable[..., None] = Tensor.backward
        self.average: Callable[[Tensor], Tensor] | None = None

    @abstractmethod
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Each loss by name, a scalar, at the current parameters."""

    @abstractmethod
    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step; returns the losses it was made of, without gradients."""

    def _add_optimizer(self, name: str, parameters: Iterable[nn.Parameter], learning_rate: float) -> None:
        if not isinstance(learning_rate, Real) or not 0 < learning_rate < float("inf"):
            raise ValueError(f"learning_rate = {learning_rate!r}; expected a positive number.")
        self.optimizers[name] = torch.optim.Adam(parameters, lr=learning_rate, fused=True)

    def _step(self, name: str, loss: Tensor) -> None:
        optimizer = self.optimizers[name]
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        optimizer.zero_grad()
        # Only these: a gradient of the actor's loss passes through the critic, which is to keep its own.
        self.backward(loss, inputs=parameters)
        if self.average is not None:
            self._average_gradients([each.grad for each in parameters if each.grad is not None])
        optimizer.step()

    def _average_gradients(self, gradients: list[Tensor]) -> None:
        """In one message, however many parameters there are."""
        flat = self.average(torch.cat([each.flatten() for each in gradients]))
        for gradient, mean in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


class BehaviourCloning(OfflineAlgorithm):
    r"""Imitates: minimises the mean of :math:`(\pi(s) - a)^2` over the data, actions from -1 to 1.

    Args:
        make_network: Makes the actor's network.
        num_observations: Length of an observation.
        action_low: Least action, (num_actions,).
        action_high: Greatest action, (num_actions,).
        make_critic: Not used; the algorithms take the same arguments.
        learning_rate: Of Adam.
    """

    def __init__(
        self,
        make_network: MakeNetwork,
        num_observations: int,
        action_low: Tensor,
        action_high: Tensor,
        *,
        make_critic: MakeNetwork | None = None,
        learning_rate: float = 3e-4,
    ):
        network = make_network(num_observations, len(action_low))
        super().__init__(Policy(network, num_observations, action_low, action_high))
        self._add_optimizer("actor", self.policy.parameters(), learning_rate)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The mean squared error of actions, "actor"."""
        return {"actor": F.mse_loss(self.policy(batch.observations), self.policy.to_unit(batch.actions))}

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the actor."""
        losses = self.losses(batch)
        self._step("actor", losses["actor"])
        return detached(losses)


class TD3BC(OfflineAlgorithm):
    r"""TD3 whose actor also imitates (Fujimoto and Gu 2021).

    Two critics regress on :math:`r + \gamma (1 - d) \min_i Q'_i(s', \pi'(s') + \epsilon)` with clipped noise
    :math:`\epsilon`. At every ``policy_delay``-th step the actor minimises

    .. math:: -\lambda \, \overline{Q_1(s, \pi(s))} + \overline{(\pi(s) - a)^2}, \quad
        \lambda = \alpha / \overline{|Q_1(s, \pi(s))|}

    and target networks follow. Actions, and their noise, are on the scale from -1 to 1.

    Args:
        make_network: Makes the actor's network.
        num_observations: Length of an observation.
        action_low: Least action, (num_actions,).
        action_high: Greatest action, (num_actions,).
        make_critic: Makes the critics' networks; as the actor's if None.
        learning_rate: Of Adam.
        discount: Gamma.
        polyak: Part of the way that target networks go at each update of theirs.
        alpha: Weight of the value against imitation.
        policy_delay: Steps of the critics for one of the actor.
        target_noise: Standard deviation of the noise.
        noise_clip: Its greatest size.
    """

    def __init__(
        self,
        make_network: MakeNetwork,
        num_observations: int,
        action_low: Tensor,
        action_high: Tensor,
        *,
        make_critic: MakeNetwork | None = None,
        learning_rate: float = 3e-4,
        discount: float = 0.99,
        polyak: float = 0.005,
        alpha: float = 2.5,
        policy_delay: int = 2,
        target_noise: float = 0.2,
        noise_clip: float = 0.5,
    ):
        check_fractions(discount=discount, polyak=polyak)
        check_least(0, alpha=alpha, target_noise=target_noise, noise_clip=noise_clip)
        check_least(1, policy_delay=policy_delay)
        num_actions = len(action_low)
        network = make_network(num_observations, num_actions)
        super().__init__(Policy(network, num_observations, action_low, action_high))
        make_critic = make_critic or make_network
        self.critics = nn.ModuleList(make_critic(num_observations + num_actions, 1) for _ in range(2))
        self.target_policy, self.target_critics = target(self.policy), target(self.critics)
        self._add_optimizer("actor", self.policy.parameters(), learning_rate)
        self._add_optimizer("critic", self.critics.parameters(), learning_rate)
        self._follow = Follower({self.target_policy: self.policy, self.target_critics: self.critics}, polyak)
        self.discount, self.alpha, self.policy_delay = discount, alpha, policy_delay
        self.target_noise, self.noise_clip = target_noise, noise_clip
        self.num_updates = 0

    @torch.no_grad()
    def targets(self, batch: Batch) -> Tensor:
        """What the critics regress on, (batch,)."""
        actions = self.target_policy(batch.next_observations)
        noise = (self.target_noise * torch.randn_like(actions)).clamp_(-self.noise_clip, self.noise_clip)
        values = q_values(self.target_critics, batch.next_observations, (actions + noise).clamp_(-1, 1)).amin(0)
        return batch.rewards + self.discount * (1 - batch.terminated) * values

    def critic_loss(self, batch: Batch) -> Tensor:
        """Mean squared error of both critics, added up."""
        values = q_values(self.critics, batch.observations, self.policy.to_unit(batch.actions))
        return 2 * F.mse_loss(values, self.targets(batch).expand_as(values))

    def actor_loss(self, batch: Batch) -> Tensor:
        """The value of the actor's actions, negative and scaled, and their distance from those of the data."""
        actions = self.policy(batch.observations)
        values = self.critics[0](torch.cat([batch.observations, actions], -1))
        size = values.detach().abs().mean()
        if self.average is not None:
            size = self.average(size)
        size = size.clamp(min=torch.finfo(size.dtype).eps)  # critics may start at zero
        return -self.alpha / size * values.mean() + F.mse_loss(actions, self.policy.to_unit(batch.actions))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Those of "critic" and "actor"."""
        return {"critic": self.critic_loss(batch), "actor": self.actor_loss(batch)}

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the critics, and, when it is due, of the actor and the target networks."""
        self.num_updates += 1
        losses = {"critic": self.critic_loss(batch)}
        self._step("critic", losses["critic"])
        if self.num_updates % self.policy_delay == 0:
            losses["actor"] = self.actor_loss(batch)
            self._step("actor", losses["actor"])
            self._follow()
        return detached(losses)


class IQL(OfflineAlgorithm):
    r"""Implicit Q-learning (Kostrikov and others 2021), which asks no critic about an action that is not in the data.

    With :math:`A = \min_i Q'_i(s, a) - V(s)`, the value :math:`V` is an expectile of what the data's actions bring,
    critics regress on :math:`r + \gamma (1 - d) V(s')`, and the actor imitates with weight :math:`\exp(\beta A)`:

    .. math:: \overline{|\tau - 1_{A < 0}| A^2}, \quad \overline{(Q_i - r - \gamma (1 - d) V')^2}, \quad
        -\overline{\min(\exp(\beta A), w) \log \pi(a | s)}

    All are minimised in the same step, which is one of a single optimizer: none has a gradient for another's network.
    Actions are on the scale from -1 to 1.

    Args:
        make_network: Makes the actor's network.
        num_observations: Length of an observation.
        action_low: Least action, (num_actions,).
        action_high: Greatest action, (num_actions,).
        make_critic: Makes the networks of critics and value; as the actor's if None.
        learning_rate: Of Adam.
        discount: Gamma.
        polyak: Part of the way that target critics go at each step.
        expectile: Tau, from 0.5, the mean, to 1, the maximum.
        temperature: Beta, an inverse temperature: 0 is behaviour cloning.
        max_weight: Greatest weight w of a transition.
        policy: "gaussian", with a standard deviation for each action which is learned and the same in all states; or
            "deterministic", for which the negative logarithm is the squared distance.
    """

    def __init__(
        self,
        make_network: MakeNetwork,
        num_observations: int,
        action_low: Tensor,
        action_high: Tensor,
        *,
        make_critic: MakeNetwork | None = None,
        learning_rate: float = 3e-4,
        discount: float = 0.99,
        polyak: float = 0.005,
        expectile: float = 0.7,
        temperature: float = 3.0,
        max_weight: float = 100.0,
        policy: Literal["gaussian", "deterministic"] = "gaussian",
    ):
        check_fractions(discount=discount, polyak=polyak, expectile=expectile)
        check_least(0, temperature=temperature, max_weight=max_weight)
        if policy not in ("gaussian", "deterministic"):
            raise ValueError(f"policy = {policy!r}; expected 'gaussian' or 'deterministic'.")
        num_actions = len(action_low)
        network = make_network(num_observations, num_actions)
        super().__init__(Policy(network, num_observations, action_low, action_high))
        make_critic = make_critic or make_network
        self.critics = nn.ModuleList(make_critic(num_observations + num_actions, 1) for _ in range(2))
        self.value = make_critic(num_observations, 1)
        self.log_std = nn.Parameter(torch.zeros(num_actions)) if policy == "gaussian" else None
        learned = list(self.parameters())
        self.target_critics = target(self.critics)
        self._add_optimizer("all", learned, learning_rate)
        self._follow = Follower({self.target_critics: self.critics}, polyak)
        self.discount, self.expectile = discount, expectile
        self.temperature, self.max_weight = temperature, max_weight

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Those of "value", "critic" and "actor"."""
        actions = self.policy.to_unit(batch.actions)
        with torch.no_grad():
            reached = q_values(self.target_critics, batch.observations, actions).amin(0)
            following = self.value(batch.next_observations).squeeze(-1)
            targets = batch.rewards + self.discount * (1 - batch.terminated) * following
        advantage = reached - self.value(batch.observations).squeeze(-1)
        values = q_values(self.critics, batch.observations, actions)
        weight = (self.temperature * advantage.detach()).exp().clamp(max=self.max_weight)
        return {
            "value": expectile_loss(advantage, self.expectile),
            "critic": 2 * F.mse_loss(values, targets.expand_as(values)),
            "actor": (weight * self._surprise(batch.observations, actions)).mean(),
        }

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of all networks; then the target critics follow."""
        losses = self.losses(batch)
        self._step("all", sum(losses.values()))
        self._follow()
        return detached(losses)

    def _surprise(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Minus the logarithm of the density of actions, but for a constant, (batch,)."""
        distance = actions - self.policy(observations)
        if self.log_std is None:
            return distance.square().sum(-1)
        log_std = self.log_std.clamp(*LOG_STD_LIMITS)
        return (0.5 * (distance * (-log_std).exp()).square() + log_std).sum(-1)


ALGORITHMS: dict[str, type[OfflineAlgorithm]] = {"bc": BehaviourCloning, "td3bc": TD3BC, "iql": IQL}


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    r"""The mean of :math:`|\tau - 1_{u < 0}| u^2`, least where the subtracted value is the expectile."""
    weight = (expectile - (difference < 0).to(difference.dtype)).abs()
    return (weight * difference.square()).mean()


def q_values(critics: nn.ModuleList, observations: Tensor, actions: Tensor) -> Tensor:
    """What each critic expects of actions on the scale from -1 to 1, (critics, batch)."""
    inputs = torch.cat([observations, actions], -1)
    return torch.stack([critic(inputs).squeeze(-1) for critic in critics])


def target(module: nn.Module) -> nn.Module:
    """A copy that takes no gradients."""
    return deepcopy(module).requires_grad_(False)


class Follower:
    """Moves target networks a part of the way towards those that learn, all parameters in one call.

    Args:
        pairs: From each target network to what it follows.
        polyak: Part of the way.
    """

    def __init__(self, pairs: Mapping[nn.Module, nn.Module], polyak: float):
        self.pairs, self._move = pairs, get_ema_multi_avg_fn(1 - polyak)

    @torch.no_grad()
    def __call__(self) -> None:
        """One move."""
        followers = [each for follower in self.pairs for each in follower.parameters()]
        leaders = [each for leader in self.pairs.values() for each in leader.parameters()]
        self._move(followers, leaders, None)


def detached(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Losses without what made them."""
    return {name: loss.detach() for name, loss in losses.items()}


def check_fractions(**values: float) -> None:
    """Raises unless all lie from 0 to 1."""
    for name, value in values.items():
        if not isinstance(value, Real) or not 0 <= value <= 1:
            raise ValueError(f"{name} = {value!r}; expected a number from 0 to 1.")


def check_least(least: float, **values: float) -> None:
    """Raises unless all are at least so large."""
    for name, value in values.items():
        if not isinstance(value, Real) or not least <= value < float("inf"):
            raise ValueError(f"{name} = {value!r}; expected a number of at least {least}.")
