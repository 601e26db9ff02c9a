"""Blocks of latent coordinates and splines, against a plain formula."""

import pytest
import torch
import torch.nn.functional as F

from sna_core.latent import EPSILON, LatentBlock, LatentComponents

OPTIONS = {
    "plain": {},
    "normalised": {"normalization": "layer"},
    "scaled": {"learn_knot_scale": True},
    "both": {"normalization": "layer", "learn_knot_scale": True, "degree": 3},
    "two blocks": {"num_blocks": 2},
    "three blocks of all": {"num_blocks": 3, "normalization": "layer", "learn_knot_scale": True, "degree": 1},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def build(num_networks=2, num_inputs=3, **options):
    """Components in float64, all of whose parameters are random."""
    settings = {"latent_dim": 4, "rank": 2, "num_cells": 5} | options
    components = LatentComponents(num_inputs, num_networks=num_networks, **settings).double()
    with torch.no_grad():
        for parameter in components.parameters():
            parameter.normal_()
    return components


def points(*shape, num_inputs=3):
    return torch.randn(*shape, num_inputs, dtype=torch.float64)


def formula(components, x):
    """x (samples, inputs) -> (networks, samples, rank)."""
    g = x.expand(components.blocks[0].num_networks, *x.shape)
    for block in components.blocks:
        n = block.num_networks

        def of_each(parameter, n=n):
            return parameter.unflatten(0, (n, -1))

        h = torch.einsum("nsi,nli->nsl", g, of_each(block.weight))
        if block.gain is not None:
            h = F.layer_norm(h, h.shape[-1:], eps=EPSILON) * of_each(block.gain).mT
        z = torch.sigmoid(h + of_each(block.bias).mT)
        if block.log_scale is not None:
            z = 0.5 + of_each(block.log_scale).exp().mT * (z - 0.5)
        psi = torch.einsum("nslb,nlbr->nslr", block.spline.dense(z, check=False), of_each(block.factors))
        g = psi.prod(2)
    return g


@each_option
@pytest.mark.parametrize("num_networks", [1, 3])
@pytest.mark.parametrize("fused", [True, False])
def test_equals_the_formula(options, num_networks, fused):
    components, x = build(num_networks, **options), points(6)
    inputs = [x.requires_grad_(), *components.parameters()]
    found, expected = components(x, fused=fused), formula(components, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert found.shape == (num_networks, 6, 2)
    cotangent = torch.randn_like(expected)
    for ours, oracle in zip(
        torch.autograd.grad(found, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, oracle, rtol=1e-8, atol=1e-8 * max(1.0, oracle.abs().max().item()))


@each_option
def test_one_network_is_a_row_of_all(options):
    components, x = build(3, **options), points(6)
    everyone = components(x)
    for network in range(3):
        alone = components(x, network)
        assert alone.shape == (1, 6, 2)
        torch.testing.assert_close(alone[0], everyone[network])
    components.zero_grad()
    components(x, 1).sum().backward()
    for parameter in components.parameters():  # the others learn nothing
        gradient = parameter.grad.unflatten(0, (3, -1))
        assert gradient[1].any()
        assert not gradient[[0, 2]].any()


@each_option
def test_frozen_parameters_pass_the_gradient_on(options):
    components, x = build(**options), points(6).requires_grad_()
    (expected,) = torch.autograd.grad(components(x).square().sum(), x)
    components(x, frozen=True).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert all(parameter.grad is None for parameter in components.parameters())
    assert not components(x.detach(), frozen=True).requires_grad


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("options", [{}, OPTIONS["both"], OPTIONS["two blocks"]], ids=["plain", "both", "two blocks"])
def test_any_dimensions_before_the_last(shape, options):
    components, x = build(**options), points(*shape)
    found = components(x)
    assert found.shape == (2, *shape, 2)
    torch.testing.assert_close(found.reshape(2, -1, 2), formula(components, x.reshape(-1, 3)))


@pytest.mark.parametrize("degree", range(1, 6))
def test_a_smooth_start_is_straight_lines(degree):
    block = LatentBlock(3, 4, 5, 6, degree).double()
    z = torch.linspace(0, 1, 21, dtype=torch.float64)
    psi = block.spline.dense(z) @ block.factors.detach()
    assert psi.diff(n=2, dim=1).abs().max() < 1e-6  # drawn in float32
    assert psi.diff(dim=1).abs().max() > 0.01
    torch.testing.assert_close(psi[:, 10], torch.ones_like(psi[:, 10]), atol=1e-6, rtol=0)  # one in the middle


def test_the_slope_has_the_variance_of_the_docstring():
    block = LatentBlock(2, 6, 4000, 6)
    psi = block.spline.dense(torch.rand(200)) @ block.factors.detach()[0]  # over a uniform z
    assert psi.var().item() == pytest.approx(1 / 6, rel=0.15)
    rough = LatentBlock(2, 6, 4000, 6, initialization="rough").factors.detach()
    assert rough.mean().item() == pytest.approx(1, abs=0.01)
    assert rough.var().item() == pytest.approx(1 / 6, rel=0.02)


def test_a_rough_start_is_not():
    block = LatentBlock(3, 4, 5, 6, initialization="rough")
    psi = block.spline.dense(torch.linspace(0, 1, 21)) @ block.factors.detach()
    assert psi.diff(n=2, dim=1).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("initialization", ["smooth", "rough"])
def test_reset_draws_anew_what_is_random(initialization):
    options = {"normalization": "layer", "learn_knot_scale": True, "initialization": initialization}
    block = LatentBlock(3, 4, 5, 6, num_networks=2, **options)
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    assert not before["bias"].any()
    assert not before["log_scale"].any()
    assert (before["gain"] == 1).all()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(1.0)
    block.reset_parameters()
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in ("bias", "gain", "log_scale"))


def test_normalisation_ignores_the_scale_of_the_coordinates():
    components, x = build(normalization="layer"), points(6)
    before = components(x)
    with torch.no_grad():
        components.blocks[0].weight.mul_(1e3)
    torch.testing.assert_close(components(x), before, rtol=1e-3, atol=1e-3)


def test_parameters_of_a_block():
    block = LatentBlock(3, 4, 5, 6, 2, num_networks=2, normalization="layer", learn_knot_scale=True)
    assert {name: tuple(parameter.shape) for name, parameter in block.named_parameters()} == {
        "weight": (8, 3),
        "bias": (8, 1),
        "factors": (8, 8, 5),
        "gain": (8, 1),
        "log_scale": (8, 1),
    }
    assert set(dict(LatentBlock(3, 4, 5, 6).named_parameters())) == {"weight", "bias", "factors"}
    text = repr(block)
    for part in ("latent_dim=4", "rank=5", "num_cells=6", "degree=2", "num_networks=2", "normalization=True"):
        assert part in text


@pytest.mark.parametrize("name", ["num_inputs", "latent_dim", "rank", "num_networks", "num_cells", "num_blocks"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_below_one_raise(name, value):
    settings = {"num_inputs": 3, "latent_dim": 2, "rank": 2, "num_cells": 4, name: value}
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        LatentComponents(**settings)


@pytest.mark.parametrize("degree", [-1, 6])
def test_degrees_beyond_the_table_raise(degree):
    with pytest.raises(ValueError, match=f"degree = {degree}; expected an integer from 0 to 5"):
        LatentBlock(3, 2, 2, 4, degree)


@pytest.mark.parametrize(("name", "value"), [("normalization", "batch"), ("initialization", "zero")])
def test_unknown_names_raise(name, value):
    with pytest.raises(ValueError, match=f"{name} = '{value}'; expected one of"):
        LatentComponents(3, latent_dim=2, rank=2, num_cells=4, **{name: value})
