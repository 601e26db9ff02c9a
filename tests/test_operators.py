"""Operators on fields: what their networks use, what they keep, how they roll out, what they refuse."""

import builtins
import inspect

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from training import operator_networks
from training.operators import (
    FieldOperator,
    OperatorConfig,
    build_network,
    count_parameters,
    fit_width,
    rollout_fields,
)

ARCHITECTURES = ("fno", "unet", "deeponet", "diffusion")
DETERMINISTIC = ARCHITECTURES[:3]


def make(architecture="unet", patch_size=8, width=8, **options):
    options = {"std": 3.0, "mean": 0.5} | options
    return FieldOperator(OperatorConfig(architecture=architecture, patch_size=patch_size, width=width, **options))


def flow(*shape):
    return 0.5 + 3 * torch.randn(*shape)


@pytest.mark.parametrize("periodic", [False, True])
def test_the_fourier_layers_of_an_fno_are_used(periodic):
    """Published baselines ran for a year without theirs."""
    model, fields = make("fno", periodic=periodic), flow(4, 8, 8)
    before = model(fields, flow(4, 8, 8))
    before.loss.backward()
    spectral = {name: p for name, p in model.named_parameters() if p.is_complex()}
    assert len(spectral) == model.config.num_layers == 4
    for name, weight in spectral.items():
        assert (weight.grad != 0).double().mean() > 0.5, name  # of its entries
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
        assert not torch.allclose(model.predict(fields), before.prediction, atol=1e-3), name
        with torch.no_grad():
            weight.copy_(kept)
    assert torch.equal(model.predict(fields), before.prediction)


def test_an_fno_keeps_the_wavenumbers_it_says():
    network = build_network(OperatorConfig(architecture="fno", patch_size=16, width=4, num_modes=3, periodic=True))
    x = torch.arange(16) * 2 * torch.pi / 16
    convolution = network.fno_blocks.convs[0]
    for wavenumber, seen in ((2, True), (3, True), (4, False)):
        wave = torch.cos(wavenumber * x).expand(1, 4, 16, 16)  # along the last axis
        assert bool((convolution(wave) - convolution.bias).abs().max() > 1e-4) == seen


@pytest.mark.parametrize(("architecture", "shift"), [("fno", 3), ("unet", 4)])
def test_operators_of_periodic_fields_know_no_place(architecture, shift):
    """They commute with shifts, of a U-Net by what its lowest resolution halves away; others do not."""
    for periodic in (True, False):
        model, fields = make(architecture, 16, periodic=periodic), flow(2, 16, 16)
        shifted = model.predict(fields.roll((shift, -shift), (1, 2)))
        same = torch.allclose(shifted, model.predict(fields).roll((shift, -shift), (1, 2)), atol=1e-4)
        assert same == periodic


def test_deeponet_is_the_inner_product_of_branch_and_trunk():
    network = make("deeponet").network
    values = torch.randn(3, 1, 8, 8)
    terms, places = network.branch(values), network.places()
    assert len(places.unique(dim=0)) == 64  # every pixel is told from every other
    expected = torch.stack([(terms * network.trunk(place)).sum(-1) for place in places], dim=-1)
    torch.testing.assert_close(network(values).view(3, 64), expected + network.bias)


@pytest.mark.parametrize("architecture", DETERMINISTIC)
def test_the_loss_is_the_error_of_the_prediction_in_normalised_units(architecture):
    for difference in (True, False):
        model, fields, following = (
            make(architecture, margin=4, predict_difference=difference),
            flow(3, 16, 16),
            flow(3, 8, 8),
        )
        output = model(fields, following)
        assert output.prediction.shape == following.shape
        torch.testing.assert_close(output.loss, ((output.prediction - following) / 3.0).square().mean())
        value = model._run((fields[:, None] - 0.5) / 3.0)[:, 0, 4:-4, 4:-4] * 3.0
        torch.testing.assert_close(output.prediction, value + (fields[:, 4:-4, 4:-4] if difference else 0.5))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_lies_around_the_patch_is_read(architecture):
    model, fields = make(architecture, margin=4), flow(2, 16, 16)
    other = fields.clone()
    other[:, 0, 0] += 5
    predicted = [model.predict(each, torch.Generator().manual_seed(0)) for each in (fields, other)]
    assert predicted[0].shape == (2, 8, 8)
    assert not torch.equal(*predicted)


def test_the_schedule_of_the_diffusion_is_that_of_its_paper():
    scheduler = make("diffusion").scheduler
    assert scheduler.betas[0] == pytest.approx(1e-4 * 500 / 20)
    assert scheduler.betas[-1] == pytest.approx(2e-2 * 500 / 20)
    assert scheduler.alphas_cumprod[-1] < 0.01  # what sampling starts from is noise
    assert torch.equal(make("diffusion").scheduler.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("margin", [0, 4])
def test_a_diffusion_with_the_true_velocity_samples_the_truth(margin):
    """The sampler against an oracle in place of the network: it denoises to the state that the oracle knows."""
    model, truth = make("diffusion", margin=margin), flow(3, 8, 8)
    target, alphas = model.normalise(truth), model.scheduler.alphas_cumprod

    def velocity(values, time):
        noisy, alpha = model.centre(values[:, 1:]), alphas[time]
        noise = (noisy - alpha.sqrt() * target) / (1 - alpha).sqrt()
        found = alpha.sqrt() * noise - (1 - alpha).sqrt() * target
        return torch.cat([torch.zeros_like(values[:, :1]), model._widen(found)], dim=1)

    model._run = velocity
    torch.testing.assert_close(model.predict(flow(3, 8 + 2 * margin, 8 + 2 * margin)), truth, atol=1e-3, rtol=1e-4)


def test_the_loss_of_a_diffusion_vanishes_for_the_true_velocity():
    model, prior, following = make("diffusion", margin=4), flow(5, 16, 16), flow(5, 8, 8)
    states, alphas = [model.normalise(prior), model.normalise(following)], model.scheduler.alphas_cumprod

    def velocity(values, times):
        alpha = alphas[times].view(-1, 1, 1, 1)
        noisy = [values[:, :1], model.centre(values[:, 1:])]
        noise = [(n - alpha.sqrt() * s) / (1 - alpha).sqrt() for n, s in zip(noisy, states, strict=True)]
        found = [alpha.sqrt() * n - (1 - alpha).sqrt() * s for n, s in zip(noise, states, strict=True)]
        return torch.cat([found[0], model._widen(found[1])], dim=1)

    model._run = velocity
    assert model(prior, following).loss < 1e-6


def test_samples_of_a_diffusion_follow_their_generator_alone():
    model, fields = make("diffusion"), flow(2, 8, 8)
    state = torch.get_rng_state()
    samples = [model.predict(fields, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    losses = [model(fields, fields, torch.Generator().manual_seed(seed)).loss for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(samples[0], samples[1])
    assert not torch.allclose(samples[0], samples[2])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("periodic", [False, True])
def test_what_is_saved_loads_as_it_was(architecture, periodic, tmp_path):
    model, fields = make(architecture, periodic=periodic), flow(2, 8, 8)
    model.save_pretrained(tmp_path)
    again, report = FieldOperator.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    sizes = inspect.get_annotations(OperatorConfig)
    assert all(getattr(again.config, name) == getattr(model.config, name) for name in sizes)
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    predicted = [each.eval().predict(fields, torch.Generator().manual_seed(0)) for each in (model, again)]
    assert torch.equal(*predicted)


def test_half_precision_leaves_fourier_transforms_whole():
    for architecture in DETERMINISTIC:
        model, fields = make(architecture), flow(2, 8, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model.predict(fields), model.predict(fields).float())
            half = model.predict(fields)
        assert half.dtype == torch.float32
        assert torch.equal(half, model.predict(fields)) == (architecture == "fno")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_parameters", [70_000, 433_000, 2_500_000])
def test_a_width_is_found_for_a_number_of_parameters(architecture, num_parameters):
    given = OperatorConfig(architecture=architecture, patch_size=16, std=2.0)
    config = fit_width(given, num_parameters)
    with torch.device("meta"):
        model = FieldOperator(config)
    assert abs(count_parameters(model) / num_parameters - 1) <= 0.05
    kept = ("architecture", "patch_size", "num_layers", "std", "num_diffusion_steps")
    assert all(getattr(config, name) == getattr(given, name) for name in kept)


def test_a_complex_parameter_counts_as_two():
    model = make("fno", patch_size=16, num_modes=3, num_layers=1)
    plain = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == plain + 8 * 8 * 6 * 4  # 6 of one axis, 3 and the mean of the other


def test_a_number_of_parameters_out_of_reach_is_refused():
    with pytest.raises(ValueError, match=r"no unet of 2 layers comes within 5% of num_parameters = 100; the"):
        fit_width(OperatorConfig(architecture="unet", patch_size=16), 100)
    with pytest.raises(ValueError, match=r"within 0% of num_parameters = 500,001"):
        fit_width(OperatorConfig(architecture="fno", patch_size=16), 500_001, tolerance=0.0)


@pytest.mark.parametrize("architecture", DETERMINISTIC)
def test_a_rollout_steps_every_window_and_stitches(architecture):
    """Against loops over fields and patches, with the windows taken pixel by pixel."""
    for margin in (0, 4):
        model, fields = make(architecture, margin=margin), flow(2, 16, 24)
        states = rollout_fields(model, fields.numpy(), 2, batch_size=5, progress=False)
        assert (states.shape, states.dtype) == ((2, 2, 16, 24), torch.float32)
        for field, found in zip(fields, states, strict=True):
            for state in found:
                expected = torch.empty(16, 24)
                for row in range(0, 16, 8):
                    for column in range(0, 24, 8):
                        rows = [(row + i) % 16 for i in range(-margin, 8 + margin)]
                        columns = [(column + i) % 24 for i in range(-margin, 8 + margin)]
                        window = torch.stack([torch.stack([field[i, j] for j in columns]) for i in rows])
                        expected[row : row + 8, column : column + 8] = model.predict(window[None])[0]
                torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)
                field = state


def test_whole_fields_roll_out_as_one_patch_and_modes_are_left_as_they_were():
    model, fields = make("unet", periodic=True), flow(3, 8, 8)
    model.train()
    states = rollout_fields(model, fields, 2, progress=False)
    assert model.training
    torch.testing.assert_close(states[:, 1], model.predict(model.predict(fields)), rtol=1e-4, atol=1e-4)


def test_seeds_of_a_rollout():
    model, fields = make("diffusion"), flow(2, 8, 8)
    states = [rollout_fields(model, fields, 2, seed=seed, progress=False) for seed in (0, 0, 1)]
    assert torch.equal(states[0], states[1])
    assert not torch.allclose(states[0], states[2])
    assert not torch.allclose(states[0][:, 0], states[0][:, 1])  # noise is drawn anew at every step


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ({"periodic": True}, flow(2, 16, 16), r"16 x 16 for a model of whole periodic fields of 8 x 8"),
        ({}, flow(2, 12, 16), r"12 x 16 does not divide into patches of 8 x 8"),
        ({"margin": 4}, flow(2, 8, 8), r"a patch alone has nothing around it"),
        ({"margin": 4}, flow(2, 8, 16), r"needs a periodic field of at least 16 x 16, not 8 x 16"),
        ({}, flow(2, 8, 8) / 50, r"another unit or normalisation"),
        ({}, flow(2, 8, 8) * 50, r"root mean square is"),
        ({}, torch.zeros(2, 8, 8), r"root mean square is 0,"),
        ({}, flow(8, 8), r"\(8, 8\); expected \(batch, height, width\)"),
        ({}, flow(0, 8, 8), r"not empty"),
        ({}, torch.full((1, 8, 8), np.nan), r"not finite"),
    ],
)
def test_fields_that_a_model_cannot_read_are_refused(options, fields, message):
    with pytest.raises(ValueError, match=message):
        rollout_fields(make("unet", **options), fields, 1, progress=False)


@pytest.mark.parametrize("option", ["num_steps", "batch_size"])
def test_counts_of_a_rollout(option):
    with pytest.raises(ValueError, match=f"{option} = 0; expected at least 1"):
        rollout_fields(make("unet"), flow(1, 8, 8), **{"num_steps": 1} | {option: 0}, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "resnet"}, "architecture"),
        ({"width": 0}, "width = 0; expected at least 1"),
        ({"num_layers": 0}, "num_layers = 0"),
        ({"margin": -1}, "margin = -1"),
        ({"margin": 4, "periodic": True}, "margin = 4; expected 0 or more, and 0 where whole fields are periodic"),
        ({"std": 0.0}, "std = 0.0; expected a positive number"),
        ({"architecture": "fno", "patch_size": 7}, "an even number of pixels along an axis, not 7"),
        ({"architecture": "fno", "num_modes": 9, "periodic": True}, "have room for 4"),
        ({"architecture": "unet", "margin": 1}, "a multiple of 4 pixels along an axis, not 10"),
        ({"architecture": "unet", "width": 5}, "expected multiples of 2"),
        ({"architecture": "diffusion", "num_diffusion_steps": 10}, "num_diffusion_steps = 10"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(StrictDataclassError, match=message):
        OperatorConfig(**{"patch_size": 8} | options)


@pytest.mark.parametrize(("architecture", "package"), [("fno", "neuraloperator"), ("unet", "diffusers")])
def test_a_missing_library_is_named_with_its_remedy(architecture, package, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] in ("neuralop", "diffusers"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"needs {package}; pip install 'leviathan-sna\[operators\]'"):
        make(architecture)
    make("deeponet")


def test_convolutions_that_wrap_around_see_the_opposite_edge():
    convolution = torch.nn.Conv2d(1, 1, 3, padding=1)
    operator_networks.wrap_around(convolution)
    impulse = torch.zeros(1, 1, 8, 8)
    impulse[..., 0, 0] = 1
    with torch.no_grad():
        found = convolution(impulse) - convolution.bias.view(1, 1, 1, 1)
    assert found[0, 0, 7, 7] == pytest.approx(convolution.weight[0, 0, 2, 2].item(), abs=1e-6)
