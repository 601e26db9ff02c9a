"""SPAN under stable-baselines3: every algorithm trains it, and each shortcut gives what SB3's own way gives."""

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DDPG, PPO, SAC, TD3
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from stable_baselines3.sac.policies import Actor
from torch.distributions import Bernoulli, Categorical, Normal
from transformers import AutoModel

from leviathan import acting
from leviathan.integrations.sb3 import SpanActorCriticPolicy, SpanSACPolicy, SpanTD3Policy

POLICIES = {
    **dict.fromkeys((PPO, A2C), SpanActorCriticPolicy),
    SAC: SpanSACPolicy,
    **dict.fromkeys((TD3, DDPG), SpanTD3Policy),
}
OFF_POLICY = {"learning_starts": 8, "batch_size": 8, "buffer_size": 100}
SETTINGS = {
    PPO: {"n_steps": 16, "batch_size": 8, "n_epochs": 1},
    A2C: {"n_steps": 8},
    **dict.fromkeys((SAC, TD3, DDPG), OFF_POLICY),
}
SIZES = {"latent_dim": 3, "rank": 4, "num_cells": 4}
STEPS = 24
each_algorithm = pytest.mark.parametrize("algorithm", POLICIES, ids=lambda each: each.__name__)
each_off_policy = pytest.mark.parametrize("algorithm", [SAC, TD3, DDPG], ids=lambda each: each.__name__)

OBSERVATIONS = spaces.Box(-1.0, 1.0, (3,), np.float32)
BOX = spaces.Box(-2.0, 2.0, (2,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)
PARTS = spaces.Dict({"image": IMAGE, "state": OBSERVATIONS, "gear": spaces.Discrete(3)})
ACTIONS = {
    "box": BOX,
    "discrete": spaces.Discrete(4),
    "multi-discrete": spaces.MultiDiscrete([2, 3]),
    "multi-binary": spaces.MultiBinary(3),
}


class Draws(gymnasium.Env):
    """Observations and rewards are drawn at random, for any spaces; episodes take ten steps."""

    def __init__(self, action_space=BOX, observation_space=OBSERVATIONS):
        self.action_space, self.observation_space = action_space, observation_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.steps += 1
        return self.observation_space.sample(), self.np_random.normal(), self.steps == 10, False, {}


def build(algorithm, env=None, *, seed=0, policy_kwargs=None, **settings):
    return algorithm(
        POLICIES[algorithm],
        Draws() if env is None else env,
        policy_kwargs=SIZES | (policy_kwargs or {}),
        seed=seed,
        device="cpu",
        **SETTINGS[algorithm] | settings,
    )


def parameters_of(agent):
    return {name: value.detach().clone() for name, value in agent.policy.named_parameters()}


def learn_and_check(agent, steps=STEPS, **keywords):
    """A short training, in which every parameter moves."""
    before = parameters_of(agent)
    agent.learn(steps, **keywords)
    assert agent.num_timesteps >= steps
    for name, value in agent.policy.named_parameters():
        assert value.isfinite().all(), name
        assert not torch.equal(value, before[name]), f"{name} did not learn"
    return agent


def observations(agent, number=5):
    """(number, ...) draws from the observation space."""
    agent.observation_space.seed(7)
    draws = [agent.observation_space.sample() for _ in range(number)]
    if isinstance(agent.observation_space, spaces.Dict):
        return {key: np.stack([draw[key] for draw in draws]) for key in draws[0]}
    return np.stack(draws)


# Training.


@pytest.mark.parametrize("actions", ACTIONS.values(), ids=ACTIONS.keys())
@pytest.mark.parametrize("algorithm", [PPO, A2C], ids=lambda each: each.__name__)
def test_learns_on_policy(algorithm, actions):
    learn_and_check(build(algorithm, Draws(actions)))


@each_off_policy
def test_learns_off_policy(algorithm):
    learn_and_check(build(algorithm))


@pytest.mark.parametrize(("algorithm", "task"), [(PPO, "CartPole-v1"), (A2C, "CartPole-v1"), (SAC, "Pendulum-v1")])
def test_learns_by_the_name_of_a_task(algorithm, task):
    learn_and_check(build(algorithm, task))


@each_algorithm
@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 2},
        {"normalization": "layer", "degree": 1},
        {"learn_knot_scale": True, "degree": 3, "initialization": "rough"},
    ],
    ids=["two blocks", "normalised", "scaled"],
)
def test_learns_with_the_options_of_a_span(algorithm, options):
    agent = learn_and_check(build(algorithm, policy_kwargs=options))
    again = type(agent.policy)(**agent.policy._get_constructor_parameters())
    assert again.span == agent.policy.span
    for name, value in options.items():
        assert getattr(again.span, name) == value


@each_off_policy
@pytest.mark.parametrize("n_critics", [1, 3])
def test_any_number_of_critics(algorithm, n_critics):
    agent = learn_and_check(build(algorithm, policy_kwargs={"n_critics": n_critics}))
    values = agent.critic(*critic_inputs(agent))
    assert [tuple(value.shape) for value in values] == n_critics * [(5, 1)]


@pytest.mark.parametrize("algorithm", [PPO, A2C, SAC], ids=lambda each: each.__name__)
def test_state_dependent_exploration(algorithm):
    agent = learn_and_check(build(algorithm, use_sde=True, sde_sample_freq=4))
    repeated, _ = agent.predict(observations(agent), deterministic=True)
    np.testing.assert_array_equal(repeated, agent.predict(observations(agent), deterministic=True)[0])


@pytest.mark.parametrize("algorithm", [PPO, SAC, TD3], ids=lambda each: each.__name__)
@pytest.mark.parametrize("share", [True, False], ids=["shared", "each its own"])
def test_images(algorithm, share):
    agent = build(
        algorithm,
        Draws(BOX, IMAGE),
        policy_kwargs={"features_extractor_kwargs": {"features_dim": 8}, "share_features_extractor": share},
    )
    actor = agent.policy if algorithm in (PPO, A2C) else agent.actor
    assert type(actor.features_extractor) is NatureCNN
    learn_and_check(agent)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "each its own"])
@pytest.mark.parametrize("algorithm", [PPO, SAC], ids=lambda each: each.__name__)
def test_observations_of_several_parts(algorithm, share):
    settings = {"features_extractor_kwargs": {"cnn_output_dim": 8}, "share_features_extractor": share}
    learn_and_check(build(algorithm, Draws(BOX, PARTS), policy_kwargs=settings))


def test_observations_that_are_names():
    agent = learn_and_check(build(PPO, Draws(BOX, spaces.Discrete(5))))
    assert agent.policy.features_dim == 5


@pytest.mark.parametrize("algorithm", [PPO, SAC], ids=lambda each: each.__name__)
def test_several_environments_normalised(algorithm):
    env = VecNormalize(DummyVecEnv([Draws] * 2))
    agent = build(algorithm, env, policy_kwargs={"check_observations": "finite"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn_and_check(agent, 2 * STEPS)


def test_environments_in_processes_of_their_own():
    env = SubprocVecEnv([Draws, Draws], start_method="fork")
    try:
        learn_and_check(build(PPO, env))
    finally:
        env.close()


def test_the_same_seed_gives_the_same_agent():
    first, second, third = (build(PPO, seed=seed).learn(STEPS) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.policy.parameters(), second.policy.parameters(), strict=True))
    assert not torch.equal(first.policy.action_net.weight, third.policy.action_net.weight)


# Storage.


@each_algorithm
def test_an_agent_is_saved_and_learns_on(algorithm, tmp_path):
    options = {"num_blocks": 2, "normalization": "layer", "learn_knot_scale": True}
    agent = build(algorithm, policy_kwargs=options).learn(STEPS)
    agent.save(tmp_path / "agent.zip")
    loaded = algorithm.load(tmp_path / "agent.zip", env=Draws(), device="cpu")
    assert type(loaded.policy) is POLICIES[algorithm]
    check_same(agent, loaded)
    learn_and_check(loaded, reset_num_timesteps=False)


@each_algorithm
@pytest.mark.parametrize("use_sde", [False, True])
def test_an_actor_is_a_model_of_transformers(algorithm, use_sde, tmp_path):
    settings = {} if algorithm in (TD3, DDPG) else {"use_sde": use_sde}
    policy = build(algorithm, policy_kwargs={"num_blocks": 2, "learn_knot_scale": True}, **settings).policy
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    policy.actor_model().save_pretrained(tmp_path)
    observations = OBSERVATIONS.sample()[None]
    with torch.no_grad():
        means = AutoModel.from_pretrained(tmp_path)(torch.as_tensor(observations)).prediction.numpy()
    if algorithm in (PPO, A2C):
        expected = np.clip(means, BOX.low, BOX.high)
    else:
        expected = policy.unscale_action(np.tanh(np.clip(means, -2, 2) if use_sde and algorithm is SAC else means))
    actions, _ = policy.predict(observations, deterministic=True)
    np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-5)


@each_algorithm
def test_a_policy_is_saved_alone(algorithm, tmp_path):
    options = {"degree": 3, "learn_knot_scale": True, "check_observations": "box"}
    agent = build(algorithm, policy_kwargs=options).learn(STEPS)
    agent.policy.save(tmp_path / "policy.pth")
    loaded = POLICIES[algorithm].load(tmp_path / "policy.pth", device="cpu")
    assert loaded.check_observations == "box"
    check_same(agent, loaded)


@pytest.mark.parametrize("algorithm", [PPO, SAC], ids=lambda each: each.__name__)
def test_a_policy_of_images_is_saved(algorithm, tmp_path):
    settings = {"features_extractor_kwargs": {"features_dim": 8}}
    agent = build(algorithm, Draws(BOX, IMAGE), policy_kwargs=settings)
    agent.save(tmp_path / "agent.zip")
    check_same(agent, algorithm.load(tmp_path / "agent.zip", device="cpu"))


def check_same(agent, loaded):
    policy = getattr(loaded, "policy", loaded)
    stored = policy.state_dict()
    assert stored.keys() == agent.policy.state_dict().keys()
    for name, value in agent.policy.state_dict().items():
        assert torch.equal(value, stored[name]), name
    x = observations(agent)
    np.testing.assert_array_equal(agent.predict(x, deterministic=True)[0], policy.predict(x, deterministic=True)[0])


# Acting.


def as_tensor(agent, x):
    return agent.policy.obs_to_tensor(x)[0]


def outspoken(agent):
    """Moves the read-outs, whose small start makes all actions alike."""
    with torch.no_grad():
        for name, parameter in agent.policy.named_parameters():
            if name.startswith(("action_net", "actor.mu")):
                parameter.add_(0.5 * torch.randn_like(parameter))
    return agent


@pytest.mark.parametrize("number", [1, 5, acting.FEW + 1])
@pytest.mark.parametrize("actions", ACTIONS.values(), ids=ACTIONS.keys())
def test_deterministic_actions_are_the_mode(actions, number):
    agent = outspoken(build(PPO, Draws(actions)))
    x = observations(agent, number)
    found, _ = agent.predict(x, deterministic=True)
    with torch.no_grad():
        mode = agent.policy.get_distribution(as_tensor(agent, x)).mode().numpy()
    if actions is BOX:
        np.testing.assert_allclose(found, mode.clip(BOX.low, BOX.high), rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(found, mode)
    np.testing.assert_array_equal(found, agent.predict(x, deterministic=True)[0])
    for row, action in zip(x, found, strict=True):
        np.testing.assert_allclose(agent.predict(row, deterministic=True)[0], action, rtol=1e-5, atol=1e-5)


@each_off_policy
@pytest.mark.parametrize("number", [1, 5, acting.FEW + 1])
def test_deterministic_actions_are_those_of_the_actor(algorithm, number):
    agent = outspoken(build(algorithm))
    x = observations(agent, number)
    found, _ = agent.predict(x, deterministic=True)
    tensor = as_tensor(agent, x)
    with torch.no_grad():
        if algorithm is SAC:
            mean, spread, extra = agent.actor.get_action_dist_params(tensor)
            expected = agent.actor.action_dist.actions_from_params(mean, spread, deterministic=True, **extra)
        else:
            expected = agent.actor(tensor)
    np.testing.assert_allclose(found, BOX.high * expected.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found, agent.predict(x, deterministic=True)[0])
    for row, action in zip(x, found, strict=True):
        np.testing.assert_allclose(agent.predict(row, deterministic=True)[0], action, rtol=1e-4, atol=1e-5)


DRAWS = 4000


@torch.no_grad()
def many(agent, number=DRAWS):
    """One observation again and again, and as a tensor of one row."""
    x = observations(agent, 1)
    return as_tensor(agent, x.repeat(number, 0)), as_tensor(agent, x)


def check_moments(draws, mean, spread):
    error = spread / len(draws) ** 0.5
    assert ((draws.mean(0) - mean).abs() < 4 * error).all()
    assert ((draws.std(0) - spread).abs() < 4 * error / 2**0.5).all()
    if draws.shape[1] > 1:  # independent
        assert torch.corrcoef(draws.mT)[0, 1].abs() < 4 / len(draws) ** 0.5
    skew = ((draws - mean) / spread).pow(3).mean(0)
    assert (skew.abs() < 4 * (15 / len(draws)) ** 0.5).all()


@torch.no_grad()
def test_discrete_draws_have_the_probabilities():
    agent = outspoken(build(PPO, Draws(spaces.Discrete(4))))
    x, single = many(agent)
    probabilities = agent.policy.get_distribution(single).distribution.probs[0]
    assert probabilities.max() > 1.5 * probabilities.min()
    for draws in (agent.policy._predict(x), torch.cat([agent.policy._predict(x[:4]) for _ in range(DRAWS // 4)])):
        counts = draws.bincount(minlength=4)
        expected = DRAWS * probabilities
        assert ((counts - expected) ** 2 / expected).sum() < 21  # chi-square of three degrees: 1e-4


@torch.no_grad()
def test_gaussian_draws_have_the_moments():
    agent = outspoken(build(PPO, policy_kwargs={"log_std_init": -0.7}))
    agent.policy.log_std[1] = 0.3
    x, single = many(agent)
    distribution = agent.policy.get_distribution(single).distribution
    check_moments(agent.policy._predict(x), distribution.mean[0], distribution.stddev[0])
    draws = agent.policy(x)[0]  # as a rollout takes them
    check_moments(draws, distribution.mean[0], distribution.stddev[0])


@torch.no_grad()
def test_draws_of_sac_have_the_moments():
    agent = outspoken(build(SAC))
    agent.actor.log_std.bias.fill_(-1.0)
    x, single = many(agent)
    mean, log_spread, _ = agent.actor.get_action_dist_params(single)
    check_moments(agent.actor(x).double().atanh(), mean[0].double(), log_spread[0].exp().double())
    agent.actor.log_std.bias.fill_(50.0)  # beyond SB3's bound, exp(2)
    assert agent.actor(x).abs().max() <= 1
    agent.actor.log_std.bias.fill_(-50.0)  # exp(-20)
    torch.testing.assert_close(agent.actor(x), agent.actor(x, deterministic=True))


def test_densities_of_sac_are_those_of_sb3():
    actor = build(SAC).actor
    observations = torch.randn(50, 3)

    def evaluate(function):
        torch.manual_seed(1)  # SB3 draws the same noise
        actions, log_prob = function(observations)
        loss = (log_prob * torch.linspace(-1, 1, 50)).sum() + actions.square().sum()
        return actions, log_prob, *torch.autograd.grad(loss, list(actor.parameters()))

    for ours, expected in zip(
        evaluate(actor.action_log_prob), evaluate(lambda obs: Actor.action_log_prob(actor, obs)), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["box", "discrete", "multi-binary"])
def test_probabilities_of_given_actions(name):
    agent = outspoken(build(PPO, Draws(ACTIONS[name])))
    policy, x = agent.policy, as_tensor(agent, observations(agent, 6))
    ACTIONS[name].seed(0)
    actions = torch.as_tensor(np.stack([ACTIONS[name].sample() for _ in range(6)]))
    actions = actions if name == "discrete" else actions.float()  # as a rollout holds them
    values, log_prob, entropy = policy.evaluate_actions(x, actions)
    actor, critic = policy.mlp_extractor.components(x, fused=False)
    outputs = policy.action_net(actor)
    distribution = {
        "box": lambda: Normal(outputs, policy.log_std.exp()),
        "discrete": lambda: Categorical(logits=outputs),
        "multi-binary": lambda: Bernoulli(logits=outputs),
    }[name]()
    expected, uncertainty = distribution.log_prob(actions), distribution.entropy()
    if name != "discrete":
        expected, uncertainty = expected.sum(1), uncertainty.sum(1)
    torch.testing.assert_close(log_prob, expected)
    torch.testing.assert_close(entropy, uncertainty)
    torch.testing.assert_close(values, policy.value_net(critic))
    torch.testing.assert_close(policy.predict_values(x), values)
    with torch.no_grad():  # and of those that a rollout draws
        actions, values, log_prob = policy(x)
        torch.testing.assert_close(policy.evaluate_actions(x, actions)[1], log_prob, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(policy.predict_values(x), values, rtol=1e-4, atol=1e-4)


# Critics.


def critic_inputs(agent):
    torch.manual_seed(5)
    return as_tensor(agent, observations(agent)), 2 * torch.rand(5, *agent.action_space.shape) - 1


@each_off_policy
@pytest.mark.parametrize("options", [{}, {"num_blocks": 2, "normalization": "layer", "learn_knot_scale": True}])
def test_critics_side_by_side_are_each_its_own(algorithm, options):
    agent = build(algorithm, policy_kwargs={"n_critics": 3, **options})
    critic, (x, actions) = agent.critic, critic_inputs(agent)
    values = critic(x, actions)
    for i, value in enumerate(values):
        components = critic.components(torch.cat([x, actions], 1), i, fused=False)[0]
        torch.testing.assert_close(value, components @ critic.weight[i] + critic.bias[i])
    assert not torch.allclose(values[0], values[1])
    torch.testing.assert_close(critic.q1_forward(x, actions), values[0])


def test_number_of_the_critics_parameters():
    critic = build(SAC).critic
    inputs, basis = 3 + 2, 4 + 2
    each = 3 * (inputs + 1) + 3 * basis * 4 + 4 + 1
    assert sum(parameter.numel() for parameter in critic.parameters()) == 2 * each


@each_off_policy
@pytest.mark.parametrize("first_alone", [True, False])
def test_the_actors_loss_leaves_the_critics_alone(algorithm, first_alone):
    agent = build(algorithm)
    critic, (x, actions) = agent.critic, critic_inputs(agent)
    critic.zero_grad()
    actions.requires_grad_()
    value = critic.q1_forward(x, actions) if first_alone else torch.cat(critic(x, actions), 1).amin(1)
    value.sum().backward()
    assert all(parameter.grad is None for parameter in critic.parameters())
    again = actions.detach().requires_grad_()
    components = critic.components(torch.cat([x, again], 1), fused=False)  # of parameters that learn
    values = torch.baddbmm(critic.bias, components, critic.weight)
    expected = values[0] if first_alone else values.amin(0)
    (gradient,) = torch.autograd.grad(expected.sum(), again)
    torch.testing.assert_close(actions.grad, gradient)


@pytest.mark.parametrize("observation_space", [OBSERVATIONS, IMAGE], ids=["numbers", "image"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "each its own"])
def test_critics_learn_from_their_own_loss(observation_space, share):
    settings = {"features_dim": 8} if observation_space is IMAGE else {}
    options = {"features_extractor_kwargs": settings, "share_features_extractor": share}
    agent = build(SAC, Draws(BOX, observation_space), policy_kwargs=options)
    x, actions = critic_inputs(agent)
    agent.critic.zero_grad()
    sum(value.square().mean() for value in agent.critic(x, actions)).backward()
    for name, parameter in agent.critic.named_parameters():
        if share and name.startswith("features_extractor"):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


@each_off_policy
def test_targets_follow(algorithm):
    agent = build(algorithm, tau=0.3).learn(10)
    critics = [(agent.critic, agent.critic_target)]
    if algorithm is not SAC:
        agent.policy_delay = 1
        critics.append((agent.actor, agent.actor_target))
    before = [[value.detach().clone() for value in target.parameters()] for _, target in critics]
    agent.train(gradient_steps=1, batch_size=8)
    for (network, target), old in zip(critics, before, strict=True):
        for parameter, followed, previous in zip(network.parameters(), target.parameters(), old, strict=True):
            torch.testing.assert_close(followed, 0.7 * previous + 0.3 * parameter)


# What does not fit.


@each_algorithm
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank = 0"),
        ({"num_cells": 0}, "num_cells = 0; expected an integer of at least 1"),
        ({"latent_dim": -1}, "latent_dim = -1"),
        ({"degree": 6}, "degree = 6"),
        ({"net_arch": [64, 64]}, "net_arch: a SPAN has no hidden layers; give latent_dim, rank and num_cells"),
        ({"activation_fn": torch.nn.ReLU}, "activation_fn: a SPAN has no hidden layers"),
        ({"check_observations": "always"}, "check_observations = 'always'; expected 'box', 'warn' or 'finite'"),
    ],
)
def test_bad_settings_raise(algorithm, options, message):
    with pytest.raises(ValueError, match=message):
        build(algorithm, policy_kwargs=options)


@each_algorithm
@pytest.mark.parametrize("check", ["box", "warn", "finite"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_observations_that_are_not_finite_raise(algorithm, check, value):
    agent = build(algorithm, policy_kwargs={"check_observations": check})
    x = np.zeros((2, 3), np.float32)
    x[1, 2] = value
    with pytest.raises(ValueError, match=rf"observation \[2\] = {value}; expected a finite number"):
        agent.predict(x)
    with pytest.raises(ValueError, match=rf"observation \[2\] = {value}"):
        agent.predict(x[1])


def test_a_part_that_is_not_finite_is_named():
    agent = build(PPO, Draws(BOX, spaces.Dict({"state": OBSERVATIONS, "gear": spaces.Discrete(3)})))
    x = {"state": np.array([0, np.nan, 0], np.float32), "gear": 1}
    with pytest.raises(ValueError, match=r"observation\['state'\] \[1\] = nan"):
        agent.predict(x)


class Breaks(Draws):
    """The fifth observation is no number."""

    def step(self, action):
        observation, *rest = super().step(action)
        return (observation * np.nan if self.steps == 5 else observation), *rest


@each_algorithm
def test_training_stops_where_an_observation_is_not_finite(algorithm):
    agent = build(algorithm, Breaks(), **({} if algorithm in (PPO, A2C) else {"learning_starts": 0, "train_freq": 8}))
    with pytest.raises(ValueError, match=r"observation \[0\] = nan; expected a finite number"):
        agent.learn(STEPS)


@pytest.mark.parametrize("algorithm", [PPO, A2C], ids=lambda each: each.__name__)
def test_a_last_observation_that_is_not_finite_spoils_no_parameter(algorithm):
    agent = build(algorithm, Breaks(), n_steps=5, **({"batch_size": 5} if algorithm is PPO else {}))
    with pytest.raises(ValueError, match=r"observation \[0\] = nan"):
        agent.learn(STEPS)
    assert all(parameter.isfinite().all() for parameter in agent.policy.parameters())


@pytest.mark.parametrize("deterministic", [True, False])
@each_algorithm
def test_a_policy_that_has_diverged_gives_no_actions(algorithm, deterministic):
    for env in (Draws(), *([Draws(spaces.Discrete(4))] if algorithm in (PPO, A2C) else [])):
        agent = build(algorithm, env)
        with torch.no_grad():
            for parameter in agent.policy.parameters():
                parameter.fill_(torch.nan)
        with pytest.raises(ValueError, match="diverged"):
            agent.predict(observations(agent, 1), deterministic=deterministic)


@pytest.mark.parametrize("algorithm", [PPO, SAC, TD3], ids=lambda each: each.__name__)
def test_a_traced_policy_is_the_policy(algorithm):
    agent = outspoken(build(algorithm))

    class Deterministic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.policy = agent.policy if algorithm is PPO else agent.actor

        def forward(self, x):
            outputs = self.policy(x, deterministic=True) if algorithm is not TD3 else self.policy(x)
            return outputs[0] if algorithm is PPO else outputs

    policy, x = Deterministic().eval(), torch.as_tensor(observations(agent, 2))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, on what is constant
        traced = torch.jit.trace(policy, x[:1], check_trace=False)
        torch.testing.assert_close(traced(x[1:]), policy(x[1:]), rtol=1e-4, atol=1e-5)


def test_bounds_are_those_of_the_networks_numbers():
    for high in (0.9, 2.1):  # below which float32's lie
        agent = build(PPO, Draws(BOX, spaces.Box(-high, high, (3,))), policy_kwargs={"check_observations": "box"})
        agent.predict(np.array([high, -high, 0.0]))
    agent = build(PPO, Draws(BOX, spaces.Box(-5, 5, (3,), np.int64)), policy_kwargs={"check_observations": "box"})
    agent.predict(np.array([5, -5, 0]))
    with pytest.raises(ValueError, match=r"observation \[1\] = -6 lies outside of its interval \[-5, 5\]"):
        agent.predict(np.array([5, -6, 0]))


@each_algorithm
def test_observations_outside_of_their_box(algorithm):
    x = np.array([0, 0.5, -7.5], np.float32)
    message = r"observation \[2\] = -7\.5 lies outside of its interval \[-1, 1\]"
    agent = build(algorithm, policy_kwargs={"check_observations": "box"})
    agent.predict(x.clip(-1, 1))
    with pytest.raises(ValueError, match=message):
        agent.predict(x)
    agent = build(algorithm, policy_kwargs={"check_observations": "warn"})
    with pytest.warns(UserWarning, match=message):
        agent.predict(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent.predict(x)  # said once
        assert agent.policy._get_constructor_parameters()["check_observations"] == "warn"  # and again once stored
        build(algorithm, policy_kwargs={"check_observations": "finite"}).predict(x)


def test_sb3s_own_errors_stay():
    with pytest.raises(AssertionError, match="Discrete"):
        build(SAC, Draws(spaces.Discrete(3)))
    with pytest.raises(ValueError, match="Unexpected observation shape"):
        build(PPO).predict(np.zeros(5, np.float32))
