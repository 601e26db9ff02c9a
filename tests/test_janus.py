"""Janus: the contract of a transformers model, its symmetry, its head, its losses and what it remembers."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from sklearn.covariance import OAS
from torch import nn
from transformers import AutoConfig, AutoModel

import leviathan
from leviathan.janus.configuration import SnaJanusConfig
from leviathan.janus.modeling import SnaJanusModel, SnaJanusOutput
from leviathan.janus.networks import ChannelsToVoxels
from leviathan.janus.physics import Physics
from sna_core.squashed_product import squashed_product_reference

VARIANTS = {
    "cubic": {},
    "mirror": {"symmetry": "mirror", "jacobian_weight": 0.1},
    "plane": {"spatial_dims": 2, "symmetry": "cubic", "resolution": 8, "channels": [8, 12]},
    "whole": {"spatial_dims": 2, "symmetry": "none", "head": "mlp"},
    "deep": {"resolution": 8, "channels": [2, 3, 4], "latent_noise": 0.0, "cycle_weight": 0.0},
    "grey": {"two_phases": False, "property_scale": ["log", "log"]},
    "classes": {"property_kind": "classification", "property_names": ["a", "b", "c"], "two_phases": False},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
small = {"resolution": 4, "channels": [4], "latent_dim": 6, "head_rank": 3, "head_num_cells": 4, "num_codes": 8}


def tiny(**options):
    torch.manual_seed(0)
    names = {"property_names": ["C1111", "permeability"]}
    return SnaJanusModel(SnaJanusConfig(**small | names | options))


def cells_of(model, count=5):
    phase = torch.rand(count, *model.config.shape)
    return (phase > 0.5).float() if model.config.two_phases else phase


def labels_of(model, count=5):
    if model.config.property_kind == "classification":
        return torch.arange(count) % model.config.num_properties
    return torch.rand(count, model.config.num_properties) + 0.1


# ---------------------------------------------------------------------------------------------- as a transformers model


@each_variant
def test_round_trip_is_exact(options, tmp_path):
    model = tiny(**options).eval()
    model.remember(torch.randn(12, 6))
    boundary = torch.full(model.config.shape, 2, dtype=torch.uint8)
    boundary.flatten()[0] = 1
    model.set_boundary(boundary)
    model.save_pretrained(tmp_path)
    loaded, info = SnaJanusModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(model.state_dict()) == set(loaded.state_dict())
    assert {"latent_mean", "latent_precision", "codes", "code_count", "boundary"} < set(stored)
    assert "first_of_orbit" not in stored  # which follows from the config
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    cells = cells_of(model)
    for ours, theirs in zip(model(cells).to_tuple(), loaded(cells).to_tuple(), strict=True):
        assert torch.equal(ours, theirs)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sna_janus"
    for name, value in options.items():
        assert getattr(loaded.config, name) == value


def test_auto_classes_know_it(tmp_path):
    tiny().save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is leviathan.SnaJanusModel is SnaJanusModel
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is leviathan.SnaJanusConfig is SnaJanusConfig
    assert SnaJanusConfig(**config.to_dict()).to_dict() == config.to_dict()
    fresh = AutoModel.from_config(config)
    assert torch.equal(fresh.latent_precision, torch.eye(6))
    assert fresh.code_count == 0
    assert (fresh.boundary == 2).all()


def test_a_checkpoint_without_what_it_remembers_is_completed(tmp_path):
    model = tiny()
    kept = {name: value for name, value in model.state_dict().items() if name not in ("codes", "boundary")}
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded = SnaJanusModel.from_pretrained(tmp_path)
    assert not loaded.codes.any()
    assert (loaded.boundary == 2).all()
    assert torch.equal(loaded.head.factors, model.head.factors)


def test_cells_of_a_plane_have_conductivities_unless_told_otherwise():
    config = SnaJanusConfig(spatial_dims=2)
    assert config.property_names == ["K11", "K22", "K12", "volume_fraction"]
    assert config.property_scale == ["linear"] * 4


def test_config_knows_its_physics():
    config = SnaJanusConfig(youngs_modulus=2.0, contrast=10.0, symmetry="mirror")
    assert config.physics == Physics(youngs_modulus=2.0, contrast=10.0, symmetry="mirror")
    assert SnaJanusConfig().physics == Physics()
    assert SnaJanusConfig().property_scale == ["linear"] * 4 + ["log"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 12, "channels": [4, 4, 4]}, "multiple of 8"),
        ({"channels": []}, "at least one stage"),
        ({"channels": [4, 0]}, r"channels\[1\] = 0"),
        ({"latent_dim": 0}, "latent_dim = 0"),
        ({"head_degree": 6}, "head_degree = 6"),
        ({"head_hidden": [3]}, "widths of two layers"),
        ({"poissons_ratio": 0.5}, "poissons_ratio = 0.5"),
        ({"contrast": 0.0}, "contrast = 0.0"),
        ({"scheme": "spectral"}, "scheme = 'spectral'"),
        ({"cycle_weight": -1.0}, "cycle_weight = -1.0"),
        ({"latent_noise": float("nan")}, "latent_noise = nan"),
        ({"property_names": ["C1111", "C1111"]}, "none of them twice"),
        ({"property_names": []}, "at least one"),
        ({"property_mean": [0.0]}, "1 entries for 5 properties"),
        ({"property_std": [1.0, 1.0, 0.0, 1.0, 1.0]}, "above 0"),
        ({"property_low": [float("inf")] * 5}, "finite"),
        ({"spatial_dims": 4}, "spatial_dims"),
        ({"symmetry": "round"}, "symmetry"),
        ({"head": "kan"}, "head"),
    ],
    ids=str,
)
def test_bad_configs(options, message):
    with pytest.raises(StrictDataclassError, match=message):
        SnaJanusConfig(**options)


# ---------------------------------------------------------------------------------------------------------- autoencoder


@pytest.mark.parametrize("dims", [2, 3])
def test_decoded_cells_have_cubic_symmetry_bit_for_bit(dims):
    logits = tiny(spatial_dims=dims, resolution=8).decode(torch.randn(3, 6))
    for order in itertools.permutations(range(1, dims + 1)):
        assert torch.equal(logits, logits.permute(0, *order))
    assert logits.unique().numel() > 10
    free = tiny(spatial_dims=dims, resolution=8, symmetry="mirror").decode(torch.randn(3, 6))
    assert not torch.equal(free, free.transpose(1, 2))


def test_channels_become_voxels():
    x = torch.randn(2, 12, 3, 5)
    assert torch.equal(ChannelsToVoxels()(x), nn.PixelShuffle(2)(x))
    x = torch.randn(2, 8, 2, 3, 4)
    voxels = ChannelsToVoxels()(x)
    assert voxels.shape == (2, 1, 4, 6, 8)
    for i, j, k in itertools.product(range(2), repeat=3):
        assert torch.equal(voxels[:, 0, i::2, j::2, k::2], x[:, 4 * i + 2 * j + k])


def test_no_checkerboard_at_the_start():
    logits = tiny(symmetry="mirror", resolution=8, channels=[4, 4]).decode(torch.randn(2, 6))
    blocks = [logits[:, i::2, j::2, k::2] for i, j, k in itertools.product(range(2), repeat=3)]
    assert all(torch.allclose(block, blocks[0]) for block in blocks)
    assert logits.std() > 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float64])
def test_cells_of_any_type(dtype):
    model = tiny().eval()
    cells = cells_of(model)
    assert torch.equal(model(cells.to(dtype)).latents, model(cells).latents)


# ----------------------------------------------------------------------------------------------------------------- head


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"latent_dim": 12, "head_rank": 16, "property_names": list("abcdefghij")},
        {"head_rank": 64, "head_num_cells": 16, "head_degree": 3},
    ],
    ids=["default", "digits", "large"],
)
def test_heads_have_as_many_parameters(options):
    config = SnaJanusConfig(**options)
    with torch.device("meta"):
        separable, dense = (SnaJanusModel(SnaJanusConfig(**options, head=head)) for head in ("separable", "mlp"))
    assert separable.num_head_parameters() == config.num_head_parameters()
    assert dense.num_head_parameters() == pytest.approx(separable.num_head_parameters(), rel=0.01)
    assert abs(config.head_hidden[0] - config.head_hidden[1]) <= 8
    assert separable.num_parameters() - separable.num_head_parameters() == (
        dense.num_parameters() - dense.num_head_parameters()
    )


def test_the_head_is_a_sum_of_products_of_splines():
    model = tiny().double()
    head, z = model.head, torch.randn(7, 6, dtype=torch.float64)
    with torch.no_grad():
        head.gain.normal_()
        head.shift.normal_()
    h = (head.gain * z.mT) + head.shift
    components = squashed_product_reference(h, None, None, head.factors, 1, 4)[0]
    torch.testing.assert_close(model.predict(z, scaled=True), head.readout(components.mT))


def test_a_head_of_many_coordinates_starts_with_order_one():
    model = SnaJanusModel(SnaJanusConfig(channels=[4, 4]))
    z = torch.randn(200, 64)
    h = model.head.gain * z.mT + model.head.shift
    components = squashed_product_reference(h, None, None, model.head.factors, 1, 8)
    assert 0.1 < components.std() < 3
    assert model.predict(z, scaled=True).std(0).min() > 0.05


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of batches of scatter
@pytest.mark.parametrize("head", ["separable", "mlp"])
def test_derivatives_of_predictions(head):
    model = tiny(head=head, head_degree=3, property_mean=[2.0, -1.0], property_std=[0.5, 0.3]).double()
    z = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model.predict, (z,))
    assert torch.autograd.gradcheck(lambda z: model.predict(z, fused=False), (z,))
    assert torch.autograd.gradgradcheck(lambda z: model.predict(z, fused=False), (z,))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: model.predict(z[None], fused=False)[0]))(z)
    for column in range(2):
        (row,) = torch.autograd.grad(model.predict(z)[:, column].sum(), z)
        torch.testing.assert_close(row, jacobian[:, column])


def test_predictions_are_in_physical_units():
    model = tiny(property_mean=[5.0, -3.0], property_std=[2.0, 0.5])
    z = torch.randn(4, 6)
    scaled, physical = model.predict(z, scaled=True), model.predict(z)
    torch.testing.assert_close(physical[:, 0], 5 + 2 * scaled[:, 0])
    torch.testing.assert_close(physical[:, 1], (-3 + 0.5 * scaled[:, 1]).exp())
    torch.testing.assert_close(model.standardise(physical), scaled)
    with pytest.raises(ValueError, match=r"permeability is -1 in row \[1\]; expected a finite number, above 0"):
        model.standardise(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 2\)"):
        model.standardise(torch.ones(3))


def test_classes_have_probabilities():
    model = tiny(**VARIANTS["classes"]).eval()
    z = torch.randn(4, 6)
    torch.testing.assert_close(model.predict(z), model.predict(z, scaled=True).softmax(-1))


# --------------------------------------------------------------------------------------------------------------- losses


@each_variant
def test_losses_are_what_they_are_called(options):
    model = tiny(**options).eval()
    config, cells, labels = model.config, cells_of(model), labels_of(model)
    output = model(cells, labels)
    assert isinstance(output, SnaJanusOutput)
    z = model.encode(cells)
    torch.testing.assert_close(output.latents, z)
    torch.testing.assert_close(output.prediction, model.predict(z))
    probability = model.decode(z).sigmoid()
    entropy = -(cells * probability.log() + (1 - cells) * (1 - probability).log()).mean()
    torch.testing.assert_close(output.reconstruction_loss, entropy)
    scaled = model.predict(z, scaled=True)
    if config.property_kind == "classification":
        expected = -scaled.log_softmax(-1).gather(1, labels[:, None]).mean()
    else:
        expected = (scaled - model.standardise(labels)).square().mean()
    torch.testing.assert_close(output.property_loss, expected)
    total = entropy + expected + config.latent_weight * z.square().mean()
    if config.cycle_weight:
        again = model.encode((probability > 0.5) if config.two_phases else probability)
        cycle = (again - z).norm() ** 2 / z.norm() ** 2 + F.mse_loss(model.predict(again, scaled=True), scaled)
        torch.testing.assert_close(output.cycle_loss, cycle)
        total = total + config.cycle_weight * cycle
    else:
        assert output.cycle_loss is None
    if config.jacobian_weight:
        jacobian = [
            torch.autograd.functional.jacobian(lambda z: model.predict(z[None], scaled=True)[0], each) for each in z
        ]
        square = torch.stack(jacobian).square().sum(-1).mean()
        torch.testing.assert_close(output.jacobian_loss, square)
        total = total + config.jacobian_weight * square
    else:
        assert output.jacobian_loss is None
    torch.testing.assert_close(output.loss, total)
    assert model(cells).loss is None


@each_variant
def test_every_parameter_gets_a_gradient(options):
    model = tiny(**options).train()
    model(cells_of(model), labels_of(model)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_rounding_in_the_cycle_passes_the_gradient_on():
    model = tiny().eval()
    z = torch.randn(3, 6)
    model.cycle_loss(z, model.decode(z)).backward()
    assert model.decoder.start.weight.grad.abs().sum() > 0


def test_noise_is_for_training_alone():
    model = tiny(latent_noise=0.5)
    cells = cells_of(model)
    assert torch.equal(model.eval()(cells).logits, model.decode(model.encode(cells)))
    output = model.train()(cells)
    assert not torch.equal(output.logits, model.decode(output.latents))
    torch.testing.assert_close(output.latents, model.encode(cells))
    assert model(cells[:1]).logits.isfinite().all()  # one cell has no spread to take the noise from


@pytest.mark.parametrize("head", ["separable", "mlp"])
def test_losses_fall(head):
    model = tiny(head=head, property_names=["volume_fraction"], property_mean=[0.5], property_std=[0.15])
    position = torch.arange(4) + torch.arange(4)[:, None] + torch.arange(4)[:, None, None]
    cells = (position < torch.randint(2, 8, (32, 1, 1, 1))).float()
    labels = cells.flatten(1).mean(1, keepdim=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    first = model.eval()(cells, labels)
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        model(cells, labels).loss.backward()
        optimizer.step()
    last = model.eval()(cells, labels)
    assert last.reconstruction_loss < 0.3 * first.reconstruction_loss
    assert last.property_loss < 0.2 * first.property_loss
    assert last.cycle_loss < 0.5 * first.cycle_loss


def test_half_precision_under_autocast():
    model = tiny(jacobian_weight=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(cells_of(model), labels_of(model))
    output.loss.backward()
    assert output.loss.isfinite()
    assert model.head.factors.grad.isfinite().all()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda cells, labels: (cells[:, :2], labels), r"expected \(cells, 4, 4, 4\)"),
        (lambda cells, labels: (cells[0], labels), r"expected \(cells, 4, 4, 4\)"),
        (lambda cells, labels: (cells * float("nan"), labels), "NaN"),
        (lambda cells, labels: (2 * cells, labels), "above 1"),
        (lambda cells, labels: (cells, labels[:, 0]), r"labels have shape \(5,\); expected \(5, 2\)"),
        (lambda cells, labels: (cells, labels[:2]), r"labels have shape \(2, 2\)"),
        (lambda cells, labels: (cells, labels * float("inf")), "C1111 is inf"),
        (lambda cells, labels: (cells, -labels), "permeability is -"),
    ],
)
def test_bad_input(spoil, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        model(*spoil(cells_of(model).fill_(1), labels_of(model)))


@pytest.mark.parametrize(
    "labels", [torch.zeros(5), torch.zeros(5, 3).long(), torch.full((5,), 3), torch.full((5,), -1)]
)
def test_labels_that_are_no_classes(labels):
    model = tiny(**VARIANTS["classes"])
    with pytest.raises(ValueError, match="label"):
        model(cells_of(model), labels)


# ---------------------------------------------------------------------------------------------------- what it remembers


def test_cycle_error():
    model = tiny(property_low=[0.0, 1.0], property_high=[2.0, 5.0]).eval()
    cells = cells_of(model, 300)  # more than are encoded at one time
    error = model.cycle_error(cells)
    with torch.no_grad():
        z = model.encode(cells)
        again = model.encode(model.decode(z) > 0)
        change = (model.predict(again) - model.predict(z)).abs().mean(0) / torch.tensor([2.0, 4.0])
    assert error.latents == pytest.approx(((again - z).norm() / (z - z.mean(0)).norm()).item(), rel=1e-5)
    assert list(error.properties) == ["C1111", "permeability"]
    assert list(error.properties.values()) == pytest.approx(change.tolist(), rel=1e-4)
    with pytest.raises(ValueError, match="set the ranges"):
        tiny().cycle_error(cells)
    assert set(tiny(**VARIANTS["classes"]).cycle_error(cells).properties) == {"a", "b", "c"}


@pytest.mark.parametrize("count", [4, 8, 50])
def test_codes_are_remembered(count):
    model = tiny().double()
    codes = torch.randn(count, 6, dtype=torch.float64) @ torch.diag(torch.arange(1.0, 7.0)).double() + 3
    model.remember(codes)
    estimate = OAS().fit(codes.numpy())
    torch.testing.assert_close(model.latent_mean, codes.mean(0))
    torch.testing.assert_close(model.latent_precision, torch.from_numpy(estimate.precision_))
    assert model.code_count == min(count, 8)
    kept = model.codes[: model.code_count]
    assert torch.equal(kept[0], codes[0])
    assert torch.equal(kept[-1], codes[-1])
    assert len(kept.unique(dim=0)) == len(kept)
    assert not model.codes[model.code_count :].any()
    if count <= 8:
        assert torch.equal(kept, codes)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(5, 6), "all codes are equal"),
        (torch.zeros(1, 6), "two cells at least"),
        (torch.zeros(5, 7), r"expected \(cells, 6\)"),
        (torch.full((5, 6), float("nan")), "not finite"),
    ],
)
def test_bad_codes(codes, message):
    with pytest.raises(ValueError, match=message):
        tiny().remember(codes)


def test_bad_boundaries():
    model = tiny()
    for boundary in (torch.zeros(4, 4), torch.full((4, 4, 4), 3)):
        with pytest.raises(ValueError, match="of 0, 1 and 2"):
            model.set_boundary(boundary)
    boundary = torch.full((4, 4, 4), 2)
    boundary[0, 1, 2] = 1
    with pytest.raises(ValueError, match="cubic symmetry"):
        model.set_boundary(boundary)
    model = tiny(symmetry="mirror")
    model.set_boundary(boundary)
    assert torch.equal(model.boundary, boundary.byte())
