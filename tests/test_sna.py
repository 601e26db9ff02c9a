"""The contract of a transformers model on small random SNAs of every kind."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file

from leviathan.sna import SnaConfig, SnaModel, SnaOutput
from sna_core.interaction import InteractionObject
from sna_core.network import CPNetwork
from sna_core.spectral import BASES

VARIANTS = {
    "cp": {},
    "additive": {"interaction_order": 1},
    "pairwise": {"interaction_order": 2, "num_outputs": 2, "input_low": [0, -1, 0.5], "activation": "tanh"},
    "tucker": {"decomposition": "tucker"},
    "tensor train": {"decomposition": "tensor_train", "degree": 1, "num_cells": 4},
    "subsets": {"subsets": [[0, 2], [1]], "coefficients": [2, -1.5], "learn_coefficients": False},
    **{kind: {"basis": kind} for kind in BASES},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def tiny(**options):
    torch.manual_seed(0)
    return SnaModel(SnaConfig(num_inputs=3, rank=2, **options))


def points(*shape):
    return 0.5 + 0.5 * torch.rand(*shape, 3)


@each_variant
def test_round_trip_is_exact(options, tmp_path):
    model = tiny(**options)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.normal_()
    model.save_pretrained(tmp_path)
    loaded, info = SnaModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    x = points(7)
    assert torch.equal(loaded(x).prediction, model(x).prediction)
    assert loaded.config.interaction == model.config.interaction
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "sna"
    assert stored["subsets"] == [list(subset) for subset in model.network.interaction.subsets] or "subsets" in options


@each_variant
def test_it_is_the_separable_network(options):
    model = tiny(**options)
    x = points(4, 5)
    output = model(x)
    assert isinstance(output, SnaOutput)
    assert output.loss is None
    torch.testing.assert_close(output.prediction, model.network.reference_forward(x))
    assert torch.equal(model(x, return_dict=False)[0], output.prediction)
    labels = torch.randn_like(output.prediction)
    output = model(x, labels)
    torch.testing.assert_close(output.loss, (output.prediction - labels).square().mean())
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_khronos_is_a_special_case():
    model = tiny(learn_coefficients=False, num_cells=5, degree=2)
    network = CPNetwork(3, rank=2, num_cells=5, degree=2, unit_weights=True)
    model.network.atoms[0].factors.data.copy_(network.factors)
    x = points(6)
    torch.testing.assert_close(model(x).prediction, network(x))


def test_what_is_left_out_is_completed():
    config = SnaConfig(num_inputs=3)
    assert (config.subsets, config.coefficients, config.interaction_order) == ([[0, 1, 2]], [1.0], 3)
    assert config.num_cells
    assert config.degree
    assert config.num_basis is None
    config = SnaConfig(num_inputs=3, interaction_order=2, basis="legendre")
    assert config.interaction == InteractionObject.pairwise(3)
    assert config.num_basis
    assert config.num_cells is None
    assert SnaConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_a_missing_atom_is_drawn_and_the_others_stay():
    model = tiny(interaction_order=2)
    kept = {name: value for name, value in model.state_dict().items() if name != "network.atoms.1.factors"}
    loaded, info = SnaModel.from_pretrained(None, config=model.config, state_dict=kept, output_loading_info=True)
    assert info["missing_keys"] == {"network.atoms.1.factors"}
    for name, value in kept.items():
        assert torch.equal(loaded.state_dict()[name], value)
    fresh = loaded.network.atoms[1].factors
    assert 0.01 < fresh.std() < 3


def test_a_config_draws_no_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    SnaConfig(num_inputs=3, basis="mlp")
    assert torch.equal(torch.rand(3), expected)


def test_it_learns():
    model = tiny(interaction_order=2)
    x = torch.rand(200, 3)
    y = (x[:, :1] * x[:, 1:2]).sin() + x[:, 2:]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append(model(x, y).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 100


def test_predictions_at_the_start_neither_vanish_nor_explode():
    model = tiny(basis="mlp", interaction_order=2, num_outputs=200)
    assert 0.5 < model(points(30)).prediction.var() < 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interaction_order": 4}, "interaction_order = 4; expected an integer from 1 to num_inputs = 3"),
        ({"interaction_order": 1, "subsets": [[0, 1]]}, "interaction_order = 1, but the largest subset has 2 inputs"),
        ({"subsets": []}, "no subset"),
        ({"subsets": [[0, 3]]}, r"\(0, 3\) names input 3"),
        ({"subsets": [[0], [1]], "coefficients": [1.0]}, "1 coefficients for 2 subsets; give one for each"),
        ({"input_low": [0.0, 0.0]}, "input_low has 2 values for 3 inputs; give one number or one for each"),
        ({"input_high": 0.0}, "low < high"),
        ({"num_basis": 5}, "num_basis = 5, but basis = 'bspline' takes degree and num_cells"),
        ({"basis": "fourier", "num_basis": 4}, "expected an odd number"),
        ({"basis": "wavelet"}, "basis"),
        ({"decomposition": "parafac"}, "decomposition"),
        ({"rank": 0}, "rank = 0"),
        ({"num_outputs": 0}, "num_outputs = 0"),
        ({"activation": "swish"}, "activation = 'swish'; expected None"),
        ({"decomposition": "tucker", "rank": 300}, "Tucker core of rank 300 over 3 inputs has 27000000 entries"),
    ],
)
def test_bad_settings_raise(options, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        SnaConfig(num_inputs=3, **options)


def test_bad_input_raises():
    model = tiny()
    x = points(5)
    with pytest.raises(ValueError, match=r"labels have shape \(5,\); expected \(5, 1\)"):
        model(x, torch.rand(5))
    with pytest.raises(ValueError, match=r"x\[1, 2\] = 1\.5 lies outside input 2's interval"):
        model(x.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1.5)))
