"""The path of a few samples in numpy against the components in PyTorch."""

import warnings

import pytest
import torch

from leviathan import acting
from leviathan.acting import FEW, act_components
from sna_core.latent import LatentComponents

OPTIONS = {
    "plain": {},
    "normalised": {"normalization": "layer"},
    "scaled": {"learn_knot_scale": True},
    "two blocks of all": {"num_blocks": 2, "normalization": "layer", "learn_knot_scale": True},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def build(num_networks=2, **options):
    settings = {"latent_dim": 4, "rank": 3, "num_cells": 5} | options
    components = LatentComponents(3, num_networks=num_networks, **settings)
    with torch.no_grad():
        for parameter in components.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return components


@pytest.fixture
def no_numpy(monkeypatch):
    def fail(*_):
        raise AssertionError("numpy was asked")

    monkeypatch.setattr(acting, "_block", fail)


@torch.no_grad()
@each_option
@pytest.mark.parametrize("degree", range(6))
@pytest.mark.parametrize("num_networks", [1, 2])
def test_equals_the_components(options, degree, num_networks, monkeypatch):
    components = build(num_networks, degree=degree, **options)
    for samples in range(1, FEW + 1):
        x = torch.randn(samples, 3)
        for network in (None, *range(num_networks)):
            expected = components(x, network)
            with monkeypatch.context() as patch:
                patch.setattr(LatentComponents, "forward", None)  # not by way of PyTorch
                found = act_components(components, x, network)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@each_option
def test_extreme_inputs(options):
    components = build(**options)
    x = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 1e4, 1e4], [-1e4, -1e4, -1e4]])
    found = act_components(components, x)
    assert found.isfinite().all()
    torch.testing.assert_close(found, components(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
@each_option
def test_a_sample_that_is_not_a_number_spoils_itself_alone(options):
    components, x = build(**options), torch.randn(3, 3)
    x[1, 2] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = act_components(components, x)
    assert found[:, 1].isnan().all()
    torch.testing.assert_close(found[:, [0, 2]], components(x[[0, 2]]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_inputs_that_are_not_contiguous():
    components, x = build(), torch.randn(3, 4).mT
    torch.testing.assert_close(act_components(components, x), components(x), rtol=1e-4, atol=1e-5)


def test_gradients_take_the_other_way(no_numpy):
    components, x = build(), torch.randn(2, 3)
    found = act_components(components, x)
    assert torch.equal(found, components(x))
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in components.parameters())


@torch.no_grad()
def test_many_samples_take_the_other_way(no_numpy):
    components, x = build(), torch.randn(FEW + 1, 3)
    assert torch.equal(act_components(components, x, 1), components(x, 1))


@torch.no_grad()
def test_float64_takes_the_other_way(no_numpy):
    components, x = build().double(), torch.randn(2, 3, dtype=torch.float64)
    found = act_components(components, x)
    assert found.dtype == torch.float64
    assert torch.equal(found, components(x))


@torch.no_grad()
def test_parameters_changed_in_place_are_seen():
    components, x = build(**OPTIONS["two blocks of all"]), torch.randn(2, 3)
    for parameter in components.parameters():
        before = act_components(components, x)
        parameter.mul_(1.5).add_(0.1)
        found = act_components(components, x)
        assert not torch.equal(found, before)
        torch.testing.assert_close(found, components(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learns", [True, False])
@each_option
def test_a_traced_graph_holds_the_components_and_not_their_values(options, learns):
    components = build(**options)

    class Actor(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.components = components

        def forward(self, x):
            return act_components(self.components, x)

    x, other = torch.randn(1, 3), torch.randn(5, 3)
    with torch.set_grad_enabled(learns), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, on what is constant
        traced = torch.jit.trace(Actor(), x, check_trace=False)
    torch.testing.assert_close(traced(other), components(other))
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(Actor(), (x,)).module()(other[:1]), components(other[:1]))


def test_an_optimizers_step_is_seen():
    components, x = build(), torch.randn(2, 3)
    optimizer = torch.optim.Adam(components.parameters(), lr=0.1, fused=True)
    components(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(act_components(components, x), components(x), rtol=1e-4, atol=1e-5)
