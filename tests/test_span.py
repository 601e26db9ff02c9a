"""SPAN: the contract of a transformers model, and what it learns."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

import leviathan
from leviathan.span import SpanConfig, SpanModel, SpanOutput

VARIANTS = {
    "default": {},
    "normalised": {"normalization": "layer", "num_outputs": 3},
    "scaled": {"learn_knot_scale": True, "degree": 1},
    "stacked": {"num_blocks": 3, "normalization": "layer", "learn_knot_scale": True, "initialization": "rough"},
    "small": {"latent_dim": 1, "rank": 1, "num_cells": 1, "degree": 0},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def tiny(**options):
    torch.manual_seed(0)
    return SpanModel(SpanConfig(**{"num_inputs": 3, "latent_dim": 4, "rank": 2, "num_cells": 5} | options))


@each_variant
def test_round_trip_is_exact(options, tmp_path):
    model = tiny(**options)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.normal_()
    model.save_pretrained(tmp_path)
    loaded, info = SpanModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    x = torch.randn(7, 3)
    assert torch.equal(loaded(x).prediction, model(x).prediction)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "span"
    assert stored["architectures"] == ["SpanModel"]
    for name in ("num_inputs", "num_outputs", "latent_dim", "rank", "num_cells", "degree", "num_blocks"):
        assert stored[name] == getattr(model.config, name)
    for name, value in options.items():
        assert stored[name] == value


def test_auto_classes_know_it(tmp_path):
    model = tiny(num_outputs=2)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is leviathan.SpanModel is SpanModel
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is leviathan.SpanConfig is SpanConfig
    assert config.to_dict() == loaded.config.to_dict()
    assert type(AutoModel.from_config(config)) is SpanModel
    assert SpanConfig(**config.to_dict()).to_dict() == config.to_dict()


@each_variant
def test_it_is_a_readout_of_the_components(options):
    model = tiny(**options)
    x = torch.randn(4, 5, 3)
    output = model(x)
    assert isinstance(output, SpanOutput)
    assert output.loss is None
    assert output.prediction.shape == (4, 5, model.config.num_outputs)
    torch.testing.assert_close(output.prediction, model.readout(model.components(x, fused=False)[0]))
    assert torch.equal(model(x, return_dict=False)[0], output.prediction)
    labels = torch.randn_like(output.prediction)
    output = model(x, labels)
    torch.testing.assert_close(output.loss, (output.prediction - labels).square().mean())
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3)], ids=str)
def test_any_dimensions_before_the_last(shape):
    assert tiny(num_outputs=2)(torch.randn(*shape, 3)).prediction.shape == (*shape, 2)


def test_second_derivatives_without_fusion():
    model, x = tiny(degree=3).double(), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(model(x, fused=False).prediction.sum(), x, create_graph=True)
    (fused,) = torch.autograd.grad(model(x).prediction.sum(), x)
    torch.testing.assert_close(slope, fused)
    (curvature,) = torch.autograd.grad(slope[:, 0].sum(), x)
    step = torch.tensor([1e-6, 0, 0], dtype=torch.float64)
    slopes = [torch.autograd.grad(model(x + sign * step).prediction.sum(), x)[0][:, 0].detach() for sign in (1, -1)]
    torch.testing.assert_close(curvature[:, 0], (slopes[0] - slopes[1]) / 2e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("initialization", ["smooth", "rough"])
def test_learns_a_product_and_a_sine(initialization):
    x = torch.rand(1024, 3) * 2 - 1

    def f(x):
        return x[:, :1] * x[:, 1:2] + (3 * x[:, 2:]).sin()

    torch.manual_seed(0)
    model = SpanModel(SpanConfig(num_inputs=3, initialization=initialization))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        model(x, f(x)).loss.backward()
        optimizer.step()
    new = torch.rand(500, 3) * 2 - 1
    with torch.no_grad():
        error = (model(new).prediction - f(new)).square().mean()
    assert 1 - error / f(new).var() > 0.98


def test_a_checkpoint_is_loaded_without_drawing(tmp_path):
    model = tiny(**VARIANTS["stacked"])
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    SpanModel.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_config_draws_no_random_numbers():
    before = torch.get_rng_state()
    SpanConfig(num_inputs=3, num_blocks=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("missing", ["components.blocks.0.log_scale", "components.blocks.0.factors", "readout.bias"])
def test_what_a_checkpoint_lacks_is_drawn_and_the_rest_stays(missing):
    model = tiny(learn_knot_scale=True)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.normal_()
    kept = {name: value for name, value in model.state_dict().items() if name != missing}
    loaded, info = SpanModel.from_pretrained(None, config=model.config, state_dict=kept, output_loading_info=True)
    assert info["missing_keys"] == {missing}
    assert loaded.state_dict()[missing].isfinite().all()
    for name, value in kept.items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_new_model_starts_as_its_blocks_do():
    block = tiny().components.blocks[0]
    spline = block.spline.dense(torch.linspace(0, 1, 9)) @ block.factors.detach()
    assert spline.diff(n=2, dim=1).abs().max() < 1e-5
    assert not block.bias.any()


def test_compiles_to_one_graph():
    model, x = tiny(), torch.randn(5, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x).prediction, model(x).prediction)


def test_exports():
    model, x = tiny(num_blocks=2, normalization="layer"), torch.randn(5, 3)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x).prediction, model(x, fused=False).prediction)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inputs": 0}, "num_inputs = 0"),
        ({"num_outputs": 0}, "num_outputs = 0; expected at least 1"),
        ({"latent_dim": 0}, "latent_dim = 0"),
        ({"rank": 0}, "rank = 0"),
        ({"rank": -3}, "rank = -3"),
        ({"num_cells": 0}, "num_cells = 0; expected an integer of at least 1"),
        ({"num_blocks": 0}, "num_blocks = 0"),
        ({"degree": 6}, "degree = 6; expected an integer from 0 to 5"),
        ({"degree": -1}, "degree = -1"),
        ({"rank": 2.5}, "rank"),
        ({"normalization": "batch"}, "normalization"),
        ({"initialization": "zero"}, "initialization"),
    ],
)
def test_bad_settings_raise(options, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        SpanConfig(**options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_points_that_are_not_finite_raise(value):
    x = torch.randn(5, 3)
    x[1, 2] = value
    with pytest.raises(ValueError, match=rf"x\[1, 2\] = {value:g}; expected finite numbers"):
        tiny()(x)


def test_wrong_shapes_raise():
    model, x = tiny(), torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"x has shape \(5, 2\); expected \(\.\.\., 3\)"):
        model(x[:, :2])
    with pytest.raises(ValueError, match=r"x has shape \(\)"):
        model(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"labels have shape \(5,\); expected \(5, 1\)"):
        model(x, torch.rand(5))
