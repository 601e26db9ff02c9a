import json
import threading
from dataclasses import replace
from pathlib import Path

import gymnasium
import minari
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from training.offline import ALGORITHMS, IQL, TD3BC, Batch, BehaviourCloning, Policy, expectile_loss, q_values
from training.offline_data import (
    Transitions,
    dataset_returns,
    evaluation_spec,
    load,
    observation_statistics,
    open_dataset,
    record,
)
from training.settings import read_settings
from training.span_offline import (
    EVALUATION_SEED,
    allowed_keys,
    complete,
    evaluate,
    load_algorithm,
    main,
    minibatches,
    prepare_batch,
    reward_scale,
    run,
)

LOW, HIGH = torch.tensor([-2.0]), torch.tensor([2.0])


def perceptron(num_inputs, num_outputs, width=32):
    return nn.Sequential(nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, num_outputs))


def named(name, num_inputs, num_outputs, *, num_parameters, scale=1.0):
    width = max(1, round(num_parameters / (num_inputs + num_outputs + 1)))
    return perceptron(num_inputs, num_outputs, width)


def random_batch(size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states, following = torch.randn(2, size, 3, generator=generator)
    actions, (rewards, chance) = (
        2 * torch.rand(size, 1, generator=generator) - 1,
        torch.rand(2, size, generator=generator),
    )
    return Batch(states, actions, rewards, following, (chance < 0.3).float())


class SteerAgent:
    """Pushes against the pendulum's speed."""

    def predict(self, observation, *, deterministic):
        assert deterministic
        return -observation[2:], None


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    record(
        [(SteerAgent(), 0.6), (None, 0.4)],
        "Pendulum-v1",
        1000,
        dataset_id="pendulum/mixed-v0",
        seed=0,
        env_kwargs={"g": 9.0},
        root=folder,
        random_return=-1200.0,
        expert_return=-200.0,
    )
    return folder


@pytest.fixture(scope="module")
def data(root):
    return load("pendulum/mixed-v0", root=root, download=False)


# Algorithms.


def test_the_policy_is_squashed_onto_its_box_and_standardises():
    policy = Policy(nn.Linear(2, 2), 2, torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 6.0]))
    policy.set_statistics(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))
    seen = torch.tensor([[3.0, 6.0], [1e6, -1e6]])
    actions = policy.act(seen)
    expected = torch.tensor([0.0, 3.0]) + torch.tensor([1.0, 3.0]) * torch.tanh(policy.network(torch.ones(1, 2)))
    torch.testing.assert_close(actions[:1], expected.detach())
    assert ((actions >= policy.action_center - policy.action_half) & (actions <= torch.tensor([1.0, 6.0]))).all()
    torch.testing.assert_close(policy.to_unit(actions[:1]), policy(torch.ones(1, 2)).detach())
    with pytest.raises(ValueError, match="expected finite bounds"):
        Policy(nn.Linear(2, 1), 2, torch.tensor([-1.0]), torch.tensor([float("inf")]))


def test_cloning_finds_a_policy_of_its_own_kind():
    torch.manual_seed(0)
    teacher, batch = Policy(nn.Linear(3, 1), 3, LOW, HIGH), random_batch()
    batch = batch._replace(actions=teacher.act(batch.observations))
    cloning = BehaviourCloning(nn.Linear, 3, LOW, HIGH, learning_rate=0.03)
    before = cloning.losses(batch)["actor"].item()
    for _ in range(800):
        loss = cloning.update(batch)["actor"]
    assert before > 1e-2
    assert loss < 1e-9


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.95])
def test_the_expectile_loss_is_least_at_the_expectile(expectile):
    samples = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = samples.min(), samples.max()
    for _ in range(60):  # halves the interval in which the slope changes its sign
        value = ((low + high) / 2).requires_grad_()
        (slope,) = torch.autograd.grad(expectile_loss(samples - value, expectile), value)
        low, high = (value.detach(), high) if slope < 0 else (low, value.detach())
    # What defines an expectile: the samples above it weigh tau, those below 1 - tau.
    above, below = (samples - value).clamp(min=0).sum(), (value - samples).clamp(min=0).sum()
    torch.testing.assert_close(expectile * above, (1 - expectile) * below, rtol=1e-9, atol=1e-9)
    if expectile == 0.5:
        torch.testing.assert_close(value, samples.mean(), rtol=0, atol=1e-12)


def test_td3_targets_are_what_the_hand_computes():
    torch.manual_seed(1)
    learner = TD3BC(perceptron, 3, LOW, HIGH, discount=0.9, target_noise=0.0)
    batch = random_batch(4)._replace(terminated=torch.tensor([0.0, 1.0, 0.0, 1.0]))
    actions = torch.tanh(learner.target_policy.network(batch.next_observations))
    inputs = torch.cat([batch.next_observations, actions], 1)
    one, two = (critic(inputs)[:, 0] for critic in learner.target_critics)
    expected = batch.rewards.clone()
    expected[[0, 2]] += 0.9 * torch.minimum(one, two)[[0, 2]]
    torch.testing.assert_close(learner.targets(batch), expected)
    values = q_values(learner.critics, batch.observations, batch.actions / 2)
    loss = (values[0] - expected).square().mean() + (values[1] - expected).square().mean()
    torch.testing.assert_close(learner.losses(batch)["critic"], loss)


def test_td3_noise_is_clipped_and_actions_stay_in_the_box():
    learner = TD3BC(perceptron, 3, LOW, HIGH, target_noise=1e6, noise_clip=0.25, discount=1.0)
    learner.target_policy.network = nn.Linear(3, 1)
    nn.init.zeros_(learner.target_policy.network.weight)
    nn.init.constant_(learner.target_policy.network.bias, 10.0)  # acts by 1

    class Act(nn.Module):
        def forward(self, inputs):
            return inputs[:, 3:]

    learner.target_critics = nn.ModuleList([Act(), Act()])
    batch = random_batch(256)._replace(rewards=torch.zeros(256), terminated=torch.zeros(256))
    actions = learner.targets(batch)
    assert set(actions.round(decimals=4).tolist()) <= {0.75, 1.0}
    assert 64 < (actions < 0.8).sum() < 192


@pytest.mark.parametrize("kind", [TD3BC, IQL])
def test_an_episode_that_ends_has_no_future_and_one_that_is_cut_off_has(kind):
    torch.manual_seed(0)
    learner, batch = kind(perceptron, 3, LOW, HIGH), random_batch(32)
    if kind is TD3BC:
        learner.target_noise = 0.0
    ended, cut = (batch._replace(terminated=torch.full((32,), value)) for value in (1.0, 0.0))
    elsewhere = torch.randn(32, 3)
    for case, same in ((ended, True), (cut, False)):
        losses = learner.losses(case)["critic"], learner.losses(case._replace(next_observations=elsewhere))["critic"]
        assert torch.equal(*losses) == same
    actions = batch.actions / 2
    error = (q_values(learner.critics, batch.observations, actions) - batch.rewards).square().mean(1).sum()
    torch.testing.assert_close(learner.losses(ended)["critic"], error)


def test_td3_without_a_weight_on_values_clones():
    clones = []
    for kind, options in ((TD3BC, {"alpha": 0.0, "policy_delay": 1}), (BehaviourCloning, {})):
        torch.manual_seed(0)
        learner = kind(perceptron, 3, LOW, HIGH, **options)
        for seed in range(20):
            learner.update(random_batch(seed=seed))
        clones.append(torch.cat([each.flatten() for each in learner.policy.parameters()]))
    torch.testing.assert_close(*clones, rtol=0, atol=1e-7)


def test_td3_delays_its_actor_whose_loss_leaves_critics_alone():
    torch.manual_seed(0)
    learner, batch = TD3BC(perceptron, 3, LOW, HIGH, policy_delay=2, polyak=0.25), random_batch()
    before = {name: each.clone() for name, each in learner.state_dict().items()}
    assert set(learner.update(batch)) == {"critic"}
    for name, each in learner.state_dict().items():
        assert torch.equal(each, before[name]) == (not name.startswith("critics")), name
    assert set(learner.update(batch)) == {"critic", "actor"}
    after = learner.state_dict()
    for name in (name for name in after if name.startswith("target_critics")):
        expected = 0.75 * before[name] + 0.25 * after[name.removeprefix("target_")]
        torch.testing.assert_close(after[name], expected)
    critics = [each.clone() for each in learner.critics.parameters()]
    learner._step("actor", learner.actor_loss(batch))
    assert all(map(torch.equal, critics, learner.critics.parameters()))


def test_iql_losses_are_what_the_hand_computes():
    torch.manual_seed(2)
    learner = IQL(perceptron, 3, LOW, HIGH, discount=0.9, expectile=0.8, temperature=2.0, max_weight=1.5)
    nn.init.constant_(learner.log_std, -0.5)
    batch, unit = random_batch(), random_batch().actions / 2
    advantage = q_values(learner.target_critics, batch.observations, unit).amin(0)
    advantage = advantage - learner.value(batch.observations)[:, 0]
    weights = (2 * advantage).exp().clamp(max=1.5)
    assert 0 < (weights == 1.5).sum() < 64
    density = torch.distributions.Normal(learner.policy(batch.observations), np.exp(-0.5)).log_prob(unit)[:, 0]
    constant = 0.5 * np.log(2 * np.pi)
    losses = learner.losses(batch)
    torch.testing.assert_close(losses["actor"], -(weights * (density + constant)).mean())
    asymmetric = torch.where(advantage < 0, 0.2, 0.8) * advantage.square()
    torch.testing.assert_close(losses["value"], asymmetric.mean())
    expected = batch.rewards + 0.9 * (1 - batch.terminated) * learner.value(batch.next_observations)[:, 0]
    values = q_values(learner.critics, batch.observations, unit)
    torch.testing.assert_close(losses["critic"], (values - expected).square().mean(1).sum())


def test_the_losses_of_iql_meet_in_no_network():
    torch.manual_seed(0)
    learner, batch = IQL(perceptron, 3, LOW, HIGH), random_batch()
    learner.update(batch)
    owners = {"value": "value", "critic": "critics", "actor": "policy|log_std"}
    for loss, owner in owners.items():
        learner.zero_grad()
        learner.losses(batch)[loss].backward()
        touched = {name.partition(".")[0] for name, each in learner.named_parameters() if each.grad is not None}
        assert touched == set(owner.split("|"))


def test_iql_with_temperature_zero_clones():
    torch.manual_seed(0)
    learner, batch = IQL(perceptron, 3, LOW, HIGH, temperature=0.0, policy="deterministic"), random_batch()
    expected = (learner.policy(batch.observations) - batch.actions / 2).square().sum(1).mean()
    torch.testing.assert_close(learner.losses(batch)["actor"], expected)


def walk(position, action):
    """A walk on a line, where the middle is best; how far it goes and what it is paid."""
    following = (position + 0.4 * action).clamp(-1, 1)
    return following, -following.square()


@pytest.mark.parametrize("name", ["iql", "td3bc"])
def test_what_values_actions_beats_cloning_on_random_data(name):
    torch.manual_seed(0)
    position, action = 2 * torch.rand(2, 4096, 1) - 1
    following, reward = walk(position, action)
    data = Batch(position, action, reward[:, 0], following, torch.zeros(4096))
    returns = {}
    for kind in ("bc", name):
        learner = ALGORITHMS[kind](
            lambda i, o: perceptron(i, o, 48),
            1,
            torch.tensor([-1.0]),
            torch.tensor([1.0]),
            learning_rate=3e-3,
            **({"discount": 0.9} if kind != "bc" else {}),
            **({"temperature": 10.0, "expectile": 0.9} if kind == "iql" else {}),
        )
        for _ in range(400):
            rows = torch.randint(4096, (256,))
            learner.update(Batch(*(each[rows] for each in data)))
        place, total = torch.linspace(-1, 1, 21).unsqueeze(1), 0.0
        for _ in range(10):
            place, reward = walk(place, learner.policy.act(place))
            total += reward.mean().item()
        returns[kind] = total
    assert returns["bc"] < -2  # stays about where it is
    assert returns[name] > -1


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (TD3BC, {"discount": 1.5}, "discount = 1.5; expected a number from 0 to 1"),
        (IQL, {"temperature": "warm"}, "temperature = 'warm'; expected a number"),
        (TD3BC, {"policy_delay": 0}, "policy_delay = 0"),
        (TD3BC, {"alpha": float("nan")}, "alpha = nan"),
        (IQL, {"expectile": -0.1}, "expectile"),
        (IQL, {"policy": "uniform"}, "'gaussian' or 'deterministic'"),
        (BehaviourCloning, {"learning_rate": 0.0}, "learning_rate = 0.0"),
    ],
)
def test_options_out_of_range_are_told(kind, options, match):
    with pytest.raises(ValueError, match=match):
        kind(perceptron, 3, LOW, HIGH, **options)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_shared_batches_make_the_step_of_the_whole(name):
    """Two processes, played in turns: each averages what it has with what the other had at the same point."""
    options = {"policy_delay": 1, "target_noise": 0.0} if name == "td3bc" else {}
    torch.manual_seed(0)
    learner = ALGORITHMS[name](perceptron, 3, LOW, HIGH, **options)
    state, batch = {k: v.clone() for k, v in learner.state_dict().items()}, random_batch()
    learner.update(batch)
    whole = learner.state_dict()

    barrier, messages, results = threading.Barrier(2), [None, None], [None, None]

    def process(rank):
        def average(tensor):
            messages[rank] = tensor.clone()
            barrier.wait(timeout=10)
            mean = (messages[0] + messages[1]) / 2
            barrier.wait(timeout=10)
            return mean

        mine = ALGORITHMS[name](perceptron, 3, LOW, HIGH, **options)
        mine.load_state_dict(state)
        mine.average = average
        mine.update(Batch(*(each[32 * rank : 32 * rank + 32] for each in batch)))
        results[rank] = mine.state_dict()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key, each in whole.items():
        assert torch.equal(results[0][key], results[1][key])
        torch.testing.assert_close(results[0][key], each, rtol=0, atol=3e-5)


# Data.


def test_what_is_recorded_is_read_back(root, data):
    assert len(data) == 1000
    assert data.bounds.tolist() == [0, 200, 400, 600, 800, 1000]
    assert data.observations.dtype == data.actions.dtype == torch.float32
    assert data.terminated.sum() == 0
    assert data.timeouts.nonzero().flatten().tolist() == [199, 399, 599, 799, 999]
    inside = torch.ones(999, dtype=torch.bool)
    inside[data.bounds[1:-1] - 1] = False
    assert torch.equal(data.next_observations[:-1][inside], data.observations[1:][inside])
    assert not torch.equal(data.next_observations[:-1][~inside], data.observations[1:][~inside])
    torch.testing.assert_close(data.actions[:600], (-data.observations[:600, 2:]).clamp(-2, 2))  # 3 episodes of 5
    assert data.actions[600:].abs().max() <= 2
    assert (data.action_low.item(), data.action_high.item()) == (-2.0, 2.0)
    assert (data.random_return, data.expert_return) == (-1200.0, -200.0)
    torch.testing.assert_close(dataset_returns(data), data.rewards.double().view(5, 200).sum(1))


def test_the_environment_is_recovered_with_its_options(root, data):
    spec = evaluation_spec(open_dataset("pendulum/mixed-v0", root=root))
    assert (spec.id, spec.kwargs, spec.max_episode_steps) == ("Pendulum-v1", {"g": 9.0}, 200)
    assert "g" not in gymnasium.spec("Pendulum-v1").kwargs
    with gymnasium.make(spec) as env:
        observation, _ = env.reset(seed=0)
        np.testing.assert_array_equal(observation, data.observations[0].numpy())
        _, reward, *_ = env.step(data.actions[0].numpy())
        assert reward == pytest.approx(data.rewards[0].item())


def test_a_data_set_cannot_choose_what_is_called(tmp_path):
    record(None, "Pendulum-v1", 1, dataset_id="a-v0", seed=0, root=tmp_path)
    path = tmp_path / "a-v0" / "data" / "metadata.json"
    content = json.loads(path.read_text())
    spec = json.loads(content["env_spec"]) | {"entry_point": "os:getcwd"}
    path.write_text(json.dumps(content | {"env_spec": json.dumps(spec)}))
    assert evaluation_spec(open_dataset("a-v0", root=tmp_path)).entry_point != "os:getcwd"
    path.write_text(json.dumps(content | {"env_spec": json.dumps(spec | {"id": "Unheard-v0"})}))
    with pytest.raises(ValueError, match="Unheard-v0, which is not registered"):
        evaluation_spec(open_dataset("a-v0", root=tmp_path))


def test_recording_repeats_and_noise_stays_in_the_box(tmp_path):
    for name in ("a-v0", "b-v0"):
        record(SteerAgent(), "Pendulum-v1", 1, dataset_id=name, seed=3, noise=0.3, root=tmp_path)
    one, two = (load(name, root=tmp_path) for name in ("a-v0", "b-v0"))
    assert torch.equal(one.actions, two.actions)
    assert torch.equal(one.observations, two.observations)
    exact = (-one.observations[:, 2:]).clamp(-2, 2)
    assert not torch.allclose(one.actions, exact)
    assert one.actions.abs().max() <= 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a-v0", "b-v0"]  # nothing half-written


def test_an_agent_sees_observations_normalised_as_it_learned_them(tmp_path):
    places = VecNormalize(DummyVecEnv([lambda: gymnasium.make("Pendulum-v1")]))
    agent = PPO("MlpPolicy", places, n_steps=64, batch_size=64, n_epochs=1, device="cpu", seed=0).learn(64)
    places.training = False
    record(agent, "Pendulum-v1", 1, dataset_id="a-v0", seed=0, root=tmp_path)
    read = load("a-v0", root=tmp_path)
    seen = places.normalize_obs(read.observations.numpy())
    assert abs(seen - read.observations.numpy()).max() > 0.1
    expected, _ = agent.predict(seen, deterministic=True)
    np.testing.assert_allclose(read.actions.numpy(), expected, rtol=0, atol=1e-5)


def test_observations_are_standardised_as_the_batch_is(data):
    mean, std = observation_statistics(data)
    policy = Policy(nn.Linear(3, 1), 3, data.action_low, data.action_high)
    policy.set_statistics(mean, std)
    batch = prepare_batch(data, policy, reward_scale(data))
    torch.testing.assert_close(batch.observations.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(batch.observations.std(0, correction=0), torch.ones(3), rtol=0, atol=5e-3)
    torch.testing.assert_close(policy.to_unit(policy.act(data.observations)), policy(batch.observations).detach())
    returns = batch.rewards.double().view(5, 200).sum(1)
    assert (returns.max() - returns.min()).item() == pytest.approx(1000, rel=1e-4)
    with pytest.raises(ValueError, match="same return"):
        reward_scale(replace(data, rewards=torch.zeros(1000)))


def test_a_hosted_data_set_is_downloaded_once(tmp_path, monkeypatch):
    asked = []

    def download(dataset_id):
        asked.append(dataset_id)
        record(None, "Pendulum-v1", 1, dataset_id=dataset_id, seed=0, root=None)

    monkeypatch.setattr(minari, "download_dataset", download)
    with pytest.raises(ValueError, match="allow the download"):
        load("mujoco/pendulum/expert-v0", root=tmp_path, download=False)
    for _ in range(2):
        assert len(load("mujoco/pendulum/expert-v0", root=tmp_path)) == 200
    assert asked == ["mujoco/pendulum/expert-v0"]


def test_what_is_out_of_reach_is_told(tmp_path, monkeypatch):
    def download(dataset_id):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(minari, "download_dataset", download)
    with pytest.raises(ValueError, match=r"do not give it \(no route to host\)"):
        load("D4RL/door/human-v2", root=tmp_path)


@pytest.mark.parametrize(
    ("env_id", "dataset_id", "options", "match"),
    [
        ("CartPole-v1", "a-v0", {}, "space of actions is Discrete.*; expected a Box"),
        ("Pendulum-v1", "a", {}, "expected a name such as"),
        ("Pendulum-v1", "../a-v0", {}, "expected a name such as"),
        ("Pendulum-v1", "a-v0", {"noise": -1.0}, "noise = -1.0"),
        ("Pendulum-v1", "a-v0", {"model": [(None, 0.4), (None, 0.4)]}, "add up to 1"),
    ],
)
def test_a_wrong_recording_is_told(tmp_path, env_id, dataset_id, options, match):
    arguments = {"model": None, "num_steps": 10, "seed": 0, "root": tmp_path} | options
    with pytest.raises(ValueError, match=match):
        record(env_id=env_id, dataset_id=dataset_id, **arguments)


def test_a_data_set_is_not_overwritten(root):
    with pytest.raises(ValueError, match="is there already"):
        record(None, "Pendulum-v1", 1, dataset_id="pendulum/mixed-v0", seed=0, root=root)


# Training.


def settings(root, **sections):
    base = {
        "data": {"dataset_id": "pendulum/mixed-v0", "root": str(root), "download": False},
        "algorithm": {"name": "bc"},
        "network": {"name": "perceptron", "num_parameters": 200},
        "critic": {},
        "training": {"num_steps": 40, "batch_size": 32, "eval_every": 25, "num_eval_episodes": 2},
    }
    return {section: base[section] | sections.get(section, {}) for section in base}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_is_recorded_repeats_and_is_kept(root, tmp_path, name, monkeypatch):
    given = settings(root, algorithm={"name": name}, data={"scale_rewards": True})
    first = run(given, tmp_path / "a", make_network=named)
    assert [each["step"] for each in first["evaluations"]] == [25, 40]
    assert first["final"]["normalised_return"] == pytest.approx((first["final"]["mean_return"] + 1200) / 1000)
    assert len(first["final"]["returns"]) == 2
    assert first["environment"] == "Pendulum-v1"
    assert str(root.parent) not in (tmp_path / "a" / "record.json").read_text()
    assert json.loads((tmp_path / "a" / "record.json").read_text()) == json.loads(json.dumps(first))
    second = run(given, tmp_path / "b", make_network=named)
    assert second["evaluations"] == first["evaluations"]
    assert run(given, tmp_path / "a", make_network=None) == json.loads(json.dumps(first))  # trains nothing
    with pytest.raises(ValueError, match="record of other settings"):
        run(settings(root, algorithm={"name": name}), tmp_path / "a", make_network=named)
    learner = load_algorithm(tmp_path / "a", load("pendulum/mixed-v0", root=root), make_network=named)
    spec = evaluation_spec(open_dataset("pendulum/mixed-v0", root=root))
    assert evaluate(learner.policy, spec, 2).tolist() == first["final"]["returns"]


def test_an_evaluation_runs_whole_episodes_of_their_own():
    policy = Policy(nn.Linear(4, 1), 4, torch.tensor([-3.0]), torch.tensor([3.0]))
    for each in policy.parameters():
        nn.init.zeros_(each)  # lets the pole fall, which takes as long as the start says
    together = evaluate(policy, "InvertedPendulum-v5", 4)
    alone = [evaluate(policy, "InvertedPendulum-v5", 1, seed=EVALUATION_SEED + i).item() for i in range(4)]
    assert len(set(alone)) > 1  # episodes of different lengths
    assert together.tolist() == alone


def test_minibatches_are_shared_out_among_processes(data):
    class Process:
        device = torch.device("cpu")

        def __init__(self, rank, number):
            self.process_index, self.num_processes = rank, number

    whole = minibatches(data.batch(), 8, 0, Process(0, 1))
    parts = [minibatches(data.batch(), 8, 0, Process(rank, 2)) for rank in (0, 1)]
    for _ in range(3):
        for all_rows, *pieces in zip(next(whole), *map(next, parts), strict=True):
            assert torch.equal(all_rows, torch.cat(pieces))
            assert len(all_rows) == 8


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"algorithm": {"name": "sac"}}, "expected one of bc, td3bc, iql"),
        ({"algorithm": {"name": "bc", "alpha": 1.0}}, "algorithm.alpha: no option of bc"),
        ({"training": {"num_steps": 0}}, "training.num_steps = 0"),
        ({"data": {"dataset_id": None}}, "data.dataset_id is missing"),
        ({"data": {"env_id": "CartPole-v1"}}, "space of actions"),
        ({"data": {"env_id": "InvertedPendulum-v5"}}, r"has \(4, 1\) observations and actions, the data set \(3, 1\)"),
        ({"data": {"env_id": "Unheard-v0"}}, "data.env_id = 'Unheard-v0'"),
        ({"data": {"dataset_id": "pendulum/other-v0"}}, "pendulum/other-v0 is not in"),
    ],
)
def test_wrong_settings_are_told(root, tmp_path, sections, match):
    with pytest.raises(ValueError, match=match):
        run(settings(root, **sections), tmp_path / "a", make_network=named)
    assert not (tmp_path / "a").exists()


def test_critics_are_like_the_actor_unless_told_otherwise(root):
    actor = {"name": "kan", "num_parameters": 500, "options": {"grid": 3}}
    assert complete(settings(root, network=actor))["critic"] == actor
    whole = complete(settings(root, network=actor, critic={"num_parameters": 900}))
    assert whole["critic"] == actor | {"num_parameters": 900}
    assert complete(settings(root, network=actor, critic={"name": "mlp_relu"}))["critic"]["options"] == {}


def test_the_config_of_the_repository_is_complete():
    config = Path(__file__).parent.parent / "training" / "configs" / "span_offline.yaml"
    known = complete(read_settings(config, ["--algorithm.name", "iql", "--algorithm.expectile", "0.9"], allowed_keys()))
    assert known["algorithm"]["expectile"] == 0.9
    assert known["network"]["name"] == "span"


def test_the_command_tells_what_is_wrong(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("data: {dataset_id: pendulum/other-v0, download: false}\n")
    with pytest.raises(SystemExit, match="error: pendulum/other-v0 is not in"):
        main(["--config", str(config), "--out", str(tmp_path / "out"), "--data.root", str(tmp_path)])
    with pytest.raises(SystemExit, match="did you mean 'num_steps'"):
        main(["--config", str(config), "--training.num_step", "3"])


def test_returns_of_episodes_of_unequal_length():
    steps = torch.arange(5.0)
    rows = torch.zeros(5, 1)
    flags = torch.zeros(5)
    data = Transitions("a-v0", rows, rows, steps, rows, flags, flags, torch.tensor([0, 2, 5]), LOW, HIGH, None, None)
    assert dataset_returns(data).tolist() == [1.0, 9.0]
