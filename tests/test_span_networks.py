"""Networks of equal numbers of parameters, and the Kolmogorov-Arnold layer among them."""

import pytest
import torch
from stable_baselines3 import A2C, DDPG, PPO, SAC, TD3

from sna_core.bspline import UniformBSpline
from training.kan import DEGREE, NUM_CELLS, KANLayer, kan
from training.span_networks import FAMILIES, count_parameters, family, make_agent, make_network, nearest_width

each_family = pytest.mark.parametrize("name", FAMILIES)
TASKS = {PPO: "CartPole-v1", A2C: "CartPole-v1", SAC: "Pendulum-v1", TD3: "Pendulum-v1", DDPG: "Pendulum-v1"}


@each_family
@pytest.mark.parametrize("num_parameters", [1, 300, 3000])
@pytest.mark.parametrize("sizes", [(3, 1), (17, 6)])
def test_no_width_comes_nearer(name, num_parameters, sizes):
    network = make_network(name, *sizes, num_parameters=num_parameters)
    with torch.device("meta"):
        counts = [count_parameters(FAMILIES[name].network(*sizes, width)) for width in range(1, 64)]
    assert counts == sorted(counts)
    assert counts[-1] > num_parameters
    assert abs(count_parameters(network) - num_parameters) == min(abs(count - num_parameters) for count in counts)


@each_family
@pytest.mark.parametrize("batch", [(5,), (2, 3)])
def test_shapes_and_gradients(name, batch):
    network = make_network(name, 3, 2, num_parameters=500)
    y = network(torch.randn(*batch, 3))
    assert y.shape == (*batch, 2)
    y.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


def test_options_reach_the_span():
    network = make_network("span", 3, 2, num_parameters=2000, degree=3, num_blocks=2, normalization="layer")
    first, second = network.components.blocks
    assert first.spline.degree == 3
    assert first.gain is not None
    assert second.weight.shape[1] == first.factors.shape[2]


@each_family
@pytest.mark.parametrize("num_parameters", [800, 10_000])
@pytest.mark.parametrize("algorithm", [PPO, SAC], ids=lambda each: each.__name__)
def test_agents_are_of_one_size(name, algorithm, num_parameters):
    agent = make_agent(algorithm, name, num_parameters, TASKS[algorithm], device="cpu", seed=0)
    assert count_parameters(agent.policy) == pytest.approx(num_parameters, rel=0.2)


@each_family
@pytest.mark.parametrize("algorithm", TASKS, ids=lambda each: each.__name__)
def test_every_family_learns_by_every_algorithm(name, algorithm):
    on_policy = algorithm in (PPO, A2C)
    settings = {"n_steps": 8} if on_policy else {"learning_starts": 8, "batch_size": 8, "buffer_size": 100}
    if algorithm is PPO:
        settings["batch_size"] = 8
    agent = make_agent(algorithm, name, 600, TASKS[algorithm], **settings)
    before = [parameter.detach().clone() for parameter in agent.policy.parameters()]
    agent.learn(16)
    assert not all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))
    assert all(parameter.isfinite().all() for parameter in agent.policy.parameters())


def test_targets_are_not_counted():
    policy = make_agent(TD3, "span", 1000, "Pendulum-v1").policy
    assert count_parameters(policy) == count_parameters(policy.actor) + count_parameters(policy.critic)
    assert sum(parameter.numel() for parameter in policy.parameters()) == 2 * count_parameters(policy)


@each_family
def test_arguments_of_the_policy_and_of_the_network_come_together(name):
    shared = {"optimizer_kwargs": {"eps": 1e-4}}
    agent = make_agent(PPO, name, 800, "CartPole-v1", policy_kwargs=shared, learning_rate=0.01)
    assert agent.policy.optimizer.defaults["eps"] == 1e-4
    assert agent.policy.optimizer.defaults["lr"] == 0.01
    assert shared == {"optimizer_kwargs": {"eps": 1e-4}}


def test_the_same_seed_gives_the_same_start():
    first, second = (make_agent(SAC, "span", 1000, "Pendulum-v1", seed=3, buffer_size=10) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.policy.parameters(), second.policy.parameters(), strict=True))


def test_nearest_width_of_a_known_count():
    assert nearest_width(lambda width: width**2, 26) == 5
    assert nearest_width(lambda width: width**2, 31) == 6
    assert nearest_width(lambda width: 10 * width, 1) == 1
    assert nearest_width(lambda width: 10 * width, 10) == 1


def test_the_kan_layer_is_its_formula():
    layer = KANLayer(3, 2).double()
    with torch.no_grad():
        layer.coefficients.normal_()
    x = torch.randn(6, 3, dtype=torch.float64)
    spline = UniformBSpline(NUM_CELLS, DEGREE, -1.0, 1.0)
    alpha = layer.coefficients.view(2, 3, spline.num_basis)
    expected = torch.zeros(6, 2, dtype=torch.float64)
    for n in range(6):
        for o in range(2):
            for i in range(3):
                silu = x[n, i] * torch.sigmoid(x[n, i])
                expected[n, o] += layer.weight[o, i] * silu + alpha[o, i] @ spline.dense(torch.tanh(x[n, i]))
    torch.testing.assert_close(layer(x), expected)


def test_kan_layers():
    layers = kan(3, 5)
    assert [type(layer) for layer in layers] == [KANLayer, KANLayer]
    assert layers(torch.randn(4, 3)).shape == (4, 5)
    basis = NUM_CELLS + DEGREE
    assert count_parameters(kan(3, 5, 2)) == (3 * 5 + 5 * 5) * (1 + basis) + 5 * 2 + 2
    assert layers(torch.full((1, 3), 1e4)).isfinite().all()


def test_what_does_not_exist_raises():
    message = "network 'mlp' is unknown; expected one of span, mlp_tanh, mlp_relu, kan"
    with pytest.raises(ValueError, match=message):
        family("mlp")
    with pytest.raises(ValueError, match=message):
        make_network("mlp", 3, 2, num_parameters=100)
    with pytest.raises(ValueError, match=message):
        make_agent(PPO, "mlp", 100, "CartPole-v1")
    with pytest.raises(ValueError, match="options of span: num_cell unknown; expected some of: num_cells, degree"):
        make_network("span", 3, 2, num_parameters=100, num_cell=4)
    with pytest.raises(ValueError, match="options of mlp_relu: num_cells unknown; expected some of: none"):
        make_network("mlp_relu", 3, 2, num_parameters=100, num_cells=4)
    with pytest.raises(ValueError, match="a width of 2048 has 2048: ask for fewer"):
        nearest_width(lambda width: width, 5000)
    with pytest.raises(ValueError, match="num_parameters = 0; expected at least 1"):
        make_network("span", 3, 2, num_parameters=0)
    with pytest.raises(ValueError, match="num_parameters = 0; expected at least 1"):
        make_agent(PPO, "span", 0, "CartPole-v1")
