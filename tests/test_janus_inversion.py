"""Inverse design with a small Janus, whose physics is a formula."""

import pytest
import torch

from leviathan.janus import candidates, inversion, refinement
from leviathan.janus.cells import FREE, bicontinuous, boundary_mask, symmetrise, threshold
from leviathan.janus.configuration import SnaJanusConfig
from leviathan.janus.inversion import invert
from leviathan.janus.latent_search import residuals, search, starts
from leviathan.janus.modeling import SnaJanusModel
from leviathan.janus.physics import NAMES, Checked, Physics, canonical, properties

M = 8
NAMES_HERE = ["C1111", "volume_fraction"]


def stiffness(phase):
    """More for solid that is near the middle of the cell's faces and for much of it: a formula, not physics."""
    x = (torch.arange(M).to(phase) + 0.5) / M
    weight = 1 + 0.8 * torch.cos(torch.pi * x)
    weight = (weight[:, None, None] * weight[:, None] * weight).expand_as(phase)
    return 100 * (weight * phase).flatten(1).mean(-1) ** 2


def formula(phase, names, physics, differentiable=False):
    phase = phase if phase.is_floating_point() else phase.float()
    values = {"C1111": stiffness(phase), "volume_fraction": phase.flatten(1).mean(-1)}
    return Checked(
        {name: values[name] for name in names}, torch.ones(len(phase), dtype=torch.bool), torch.zeros(len(phase))
    )


@pytest.fixture(autouse=True)
def _physics_is_a_formula(monkeypatch):
    monkeypatch.setattr(candidates, "properties", formula)
    monkeypatch.setattr(refinement, "properties", formula)


def training_cells(count):
    """Cubic-symmetric octants between a Schwarz P surface and random fields, with one boundary."""
    x = torch.cos(torch.pi * (torch.arange(M) + 0.5) / M)
    basis = torch.stack([x**k for k in range(4)])
    shared = -(x[:, None, None] + x[:, None] + x)
    weights = torch.randn(count, 4, 4, 4)
    fields = symmetrise(torch.einsum("nabc,ax,by,cz->nxyz", weights, basis, basis, basis), "cubic")
    fields = shared + 0.35 * fields
    on_boundary = boundary_mask(M, 3, "cubic")
    boundary = torch.where(on_boundary, (shared > 0.1).byte(), torch.tensor(FREE, dtype=torch.uint8))
    boundary[0, 0, :] = boundary[0, :, 0] = boundary[:, 0, 0] = FREE
    return threshold(fields, 0.3 + 0.3 * torch.rand(count), "cubic", boundary), boundary


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    cells, boundary = training_cells(300)
    labels = torch.stack(list(formula(cells, NAMES_HERE, None).values.values()), -1)
    config = SnaJanusConfig(
        resolution=M,
        channels=[8, 16],
        latent_dim=8,
        property_names=NAMES_HERE,
        property_mean=labels.mean(0).tolist(),
        property_std=labels.std(0).tolist(),
        property_low=labels.amin(0).tolist(),
        property_high=labels.amax(0).tolist(),
        head_rank=8,
        head_num_cells=4,
    )
    model = SnaJanusModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(25):
        for rows in torch.randperm(len(cells)).split(50):
            optimizer.zero_grad()
            model(cells[rows].float(), labels[rows]).loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        model.remember(model.encode(cells.float()))
    model.set_boundary(boundary)
    model.labels = labels
    return model


def targets_of(model, *rows):
    """Properties of training cells, which can be had."""
    return dict(zip(NAMES_HERE, model.labels[list(rows)].mT.tolist(), strict=True))


def test_cells_have_the_targets_volume_boundary_and_symmetry(model):
    designs = invert(model, targets_of(model, 1, 2, 3), num_candidates=6)
    fixed = model.boundary != FREE
    for design, fraction in zip(designs, model.labels[[1, 2, 3], 1].double().tolist(), strict=True):
        assert design.cells.shape == (6, M, M, M)
        assert design.cells.dtype == torch.bool
        assert design.cells.flatten(1).sum(1).tolist() == [round(fraction * M**3)] * 6
        assert torch.equal(design.cells[:, fixed], (model.boundary[fixed] == 1).expand(6, -1))
        assert torch.equal(design.cells.transpose(1, 3), design.cells)
        assert torch.equal(design.best, design.cells[0])
        assert design.whole().shape == (6, 2 * M, 2 * M, 2 * M)


def test_what_a_design_says_is_so(model):
    (design,) = invert(model, targets_of(model, 2), num_candidates=8)
    torch.testing.assert_close(design.checked["C1111"], stiffness(design.cells.float()).double())
    assert torch.equal(design.connected, bicontinuous(design.cells, "cubic"))
    wanted = torch.tensor([design.target[name] for name in NAMES_HERE])
    checked = torch.stack([design.checked[name] for name in NAMES_HERE], -1)
    torch.testing.assert_close(design.error, ((checked - wanted).abs() / wanted).amax(-1), atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        prediction = model.predict(design.latents)[:, 0]
    torch.testing.assert_close(design.predicted["C1111"], prediction)
    torch.testing.assert_close(design.gap["C1111"], (prediction - checked[:, 0]).abs() / checked[:, 0])
    assert design.nearest["C1111"] == design.checked["C1111"][0].item()
    offset = design.latents - model.latent_mean
    squares = torch.einsum("ni,ij,nj->n", offset, model.latent_precision, offset)
    torch.testing.assert_close(design.distance, squares.sqrt().double(), rtol=1e-4, atol=1e-4)


def test_candidates_come_in_the_order_of_their_errors_and_rejected_ones_last(model):
    for design in invert(model, targets_of(model, 1, 2, 3, 5, 8), num_candidates=12):
        accepted = design.connected & design.converged
        assert design.num_rejected == int((~accepted).sum())
        count = int(accepted.sum())
        assert accepted[:count].all()
        exact = design.cells.flatten(1).sum(1) == round(design.target["volume_fraction"] * M**3)
        for group in (accepted & exact, accepted & ~exact, ~accepted & exact, ~accepted & ~exact):
            assert (design.error[group].diff() >= 0).all()
        assert (exact[:count].int().diff() <= 0).all() if count else True


def test_what_has_not_converged_is_rejected(model, monkeypatch):
    def stuck(*arguments, **options):
        result = formula(*arguments, **options)
        return Checked(result.values, torch.zeros_like(result.converged), result.residual + 1)

    monkeypatch.setattr(candidates, "properties", stuck)
    (design,) = invert(model, targets_of(model, 2), num_candidates=4)
    assert design.num_rejected == 4
    assert not design.converged.any()
    assert not design.reachable
    assert "4 were rejected" in design.message
    assert "no candidate is sound" in design.message


def test_targets_of_training_cells_are_reached(model):
    designs = invert(model, targets_of(model, 2, 3), refine="physics", tolerance=0.08)
    assert all(design.reachable for design in designs)
    assert all("may be out of reach" not in design.message for design in designs)


def test_a_target_out_of_reach_is_answered_by_the_nearest(model):
    design = invert(model, {"C1111": 90.0, "volume_fraction": 0.4}, num_candidates=4)
    assert not design.reachable
    assert "may be out of reach" in design.message
    assert 0 < design.nearest["C1111"] < 90
    assert design.nearest["volume_fraction"] == pytest.approx(0.4, abs=1e-3)
    assert design.error[0] > 0.05


def test_a_sequence_is_the_same_as_its_targets_one_by_one(model):
    together = invert(model, targets_of(model, 1, 2, 3), num_candidates=5)
    for row, design in zip((1, 2, 3), together, strict=True):
        alone = invert(model, {k: v[0] for k, v in targets_of(model, row).items()}, num_candidates=5)
        assert alone.target == design.target
        assert torch.equal(alone.cells, design.cells)
        torch.testing.assert_close(alone.latents, design.latents, rtol=1e-3, atol=1e-3)


def test_parts_of_a_batch_are_the_same_as_the_whole(model, monkeypatch):
    whole = invert(model, targets_of(model, 1, 2, 3), num_candidates=4)
    monkeypatch.setattr(inversion, "ROWS_AT_ONCE", 4)
    for design, other in zip(invert(model, targets_of(model, 1, 2, 3), num_candidates=4), whole, strict=True):
        assert torch.equal(design.cells, other.cells)


def test_the_seed_decides(model):
    first, again, other = (invert(model, targets_of(model, 2), seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.cells, again.cells)
    assert not torch.equal(first.latents, other.latents)


def test_the_model_is_left_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    invert(model, targets_of(model, 2), num_candidates=2, refine="physics")
    assert model.training
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None or not parameter.grad.isnan().any() for parameter in model.parameters())


@pytest.mark.parametrize("seed", [0, 1])
def test_refinement_never_makes_it_worse(model, seed):
    targets = {"C1111": [1.0, 2.0, 4.0, 7.0], "volume_fraction": [0.42, 0.5, 0.56, 0.58]}
    plain = invert(model, targets, num_candidates=8, seed=seed)
    refined = invert(model, targets, num_candidates=8, seed=seed, refine="physics")
    errors = torch.tensor([[float(design.error[0]) for design in designs] for designs in (plain, refined)])
    rejected = [[design.num_rejected for design in designs] for designs in (plain, refined)]
    assert all(after <= before for before, after in zip(*rejected, strict=True))
    usable = torch.tensor([count < 8 for count in rejected[0]])
    assert (errors[1] <= errors[0])[usable].all()
    assert (errors[1] < 0.7 * errors[0]).any()
    for design, fraction in zip(refined, targets["volume_fraction"], strict=True):
        assert design.cells.flatten(1).sum(1).tolist() == [round(fraction * M**3)] * 8
        torch.testing.assert_close(design.checked["C1111"], stiffness(design.cells.float()).double())
        assert torch.equal(design.connected, bicontinuous(design.cells, "cubic"))


def test_both_stages_of_refinement_help_by_themselves_and_keep_the_volume(model):
    goal, _ = inversion._goal(model, {"C1111": [2.2, 5.0], "volume_fraction": [0.5, 0.56]}, {}, True)
    z = starts(model, goal, 8, torch.Generator().manual_seed(0)).flatten(0, 1)
    goal = goal.rows(torch.arange(2).repeat_interleave(8))
    found = candidates.realise(model, goal, z, check=True)
    steered = refinement.steer(model, goal, found, 1e-2, 10, 4)
    exchanged, count = refinement.exchange(model, goal, found, 8)
    for after in (steered, exchanged):
        assert (after.error <= found.error).all()
        assert (after.error < found.error)[found.valid].any()
        assert torch.equal(after.cells.flatten(1).sum(1), found.cells.flatten(1).sum(1))
        assert (after.valid | ~found.valid).all()
    assert torch.equal(count, (exchanged.cells & ~found.cells).flatten(1).sum(1))
    assert torch.equal(exchanged.latents, found.latents)
    torch.testing.assert_close(exchanged.values[:, 0], stiffness(exchanged.cells.float()).double())


def test_the_message_says_how_many_voxels_were_exchanged(model):
    targets = {"C1111": [1.0, 2.0, 4.0, 7.0], "volume_fraction": [0.42, 0.5, 0.56, 0.58]}
    for design in invert(model, targets, refine="physics", num_candidates=4):
        exchanged = int(design.num_exchanged[0])
        assert (f"{exchanged} of the {M**3} voxels" in design.message) == (exchanged > 0)


def test_a_volume_fraction_that_is_not_asked_for_is_the_predicted_one(model):
    design = invert(model, {"C1111": 2.0}, num_candidates=4)
    found = design.cells.flatten(1).double().mean(1)
    torch.testing.assert_close(found, design.predicted["volume_fraction"].double(), atol=1 / M**3, rtol=0)
    assert set(design.checked) == {"C1111"}


def test_without_a_check_errors_are_the_predictors(model):
    (design,) = invert(model, targets_of(model, 2), num_candidates=3, check=False)
    assert design.checked == {}
    assert design.gap == {}
    wanted = torch.tensor(list(design.target.values())).double()
    found = torch.stack([design.predicted[name] for name in NAMES_HERE], -1).double()
    torch.testing.assert_close(design.error, ((found - wanted).abs() / wanted).amax(-1))


def test_steps_of_the_search_go_to_the_nearest_solution_of_a_linear_function(model):
    d = 8
    z = torch.randn(5, d)
    row = torch.randn(1, d)
    found = search(model, lambda x: x @ row.mT - 3.0, z, 1e-6, 30)
    covariance = torch.linalg.inv(model.latent_precision)
    expected = z - (z @ row.mT - 3.0) / (row @ covariance @ row.mT) * (row @ covariance)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_a_strong_prior_holds_the_start(model):
    goal, _ = inversion._goal(model, targets_of(model, 2, 3), {}, True)
    z = starts(model, goal, 1, torch.Generator().manual_seed(0)).flatten(0, 1)
    near, far = (search(model, residuals(model, goal), z, weight, 20) for weight in (1e6, 1e-6))
    torch.testing.assert_close(near, z, atol=1e-3, rtol=1e-3)
    assert residuals(model, goal)(far).abs().max() < 1e-2


def test_starts_are_near_the_targets_and_apart(model):
    goal, _ = inversion._goal(model, targets_of(model, 2, 3), {}, True)
    z = starts(model, goal, 6, torch.Generator().manual_seed(0))
    assert z.shape == (2, 6, 8)
    assert torch.cdist(z, z).add(torch.eye(6)).min() > 0.05
    with torch.no_grad():
        every = residuals(model, goal.rows([0] * 300))(model.codes[:300]).square().sum(-1)
        here = residuals(model, goal.rows([0] * 6))(z[0]).square().sum(-1)
    assert here.max() < every.median()


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ({"C11111": 3.0}, {}, "did you mean 'C1111'"),
        ({"permeability": 3.0}, {}, "expected one of C1111, volume_fraction"),
        ({}, {}, "no property is targeted"),
        ({"C1111": 3.0, "C11": 3.0}, {}, "twice"),
        ({"C1111": -3.0}, {}, "expected a number above 0"),
        ({"C1111": float("nan")}, {}, "expected finite numbers"),
        ({"C1111": [2.0, float("inf")]}, {}, "expected finite numbers"),
        ({"C1111": "stiff"}, {}, "expected a number or a sequence"),
        ({"C1111": [[3.0]]}, {}, "expected a number or a sequence"),
        ({"C1111": []}, {}, "expected a number or a sequence"),
        ({"volume_fraction": 1.2}, {}, "expected numbers between 0 and 1"),
        ({"volume_fraction": 0.01}, {}, "ask for a fraction from"),
        ({"C1111": [1.0, 2.0], "volume_fraction": [0.3]}, {}, "expected the same for all"),
        ({"C1111": 3.0}, {"num_candidates": 0}, "num_candidates = 0"),
        ({"C1111": 3.0}, {"num_candidates": 2.5}, "num_candidates = 2.5"),
        ({"C1111": 3.0}, {"num_steps": -1}, "num_steps = -1"),
        ({"C1111": 3.0}, {"prior_weight": -1.0}, "prior_weight = -1.0"),
        ({"C1111": 3.0}, {"tolerance": 0.0}, "tolerance = 0.0"),
        ({"C1111": 3.0}, {"refine": "luck"}, "refine = 'luck'"),
        ({"C1111": 3.0}, {"refine": "physics", "check": False}, "needs check = True"),
        ({"C1111": 3.0}, {"weights": {"volume_fraction": 2.0}}, "expected positive numbers for some of the targets"),
        ({"C1111": 3.0}, {"weights": {"C1111": 0.0}}, "expected positive numbers for some of the targets"),
    ],
)
def test_bad_input_is_refused(model, targets, options, message):
    with pytest.raises(ValueError, match=message):
        invert(model, targets, **options)


def test_what_physics_does_not_know_has_to_go_unchecked():
    config = SnaJanusConfig(resolution=4, channels=[4], latent_dim=4, property_names=["toughness", "volume_fraction"])
    model = SnaJanusModel(config)
    with pytest.raises(ValueError, match=r"toughness cannot be checked.*check = False"):
        invert(model, {"toughness": 3.0})
    assert invert(model, {"toughness": 3.0}, num_candidates=1, check=False).target == {"toughness": 3.0}


def test_the_precision_around_the_call_does_not_matter(model):
    targets = targets_of(model, 1)
    (expected,) = invert(model, targets, num_candidates=2, refine="physics")
    with torch.inference_mode():
        (design,) = invert(model, targets, num_candidates=2, refine="physics")
    assert torch.equal(design.latents, expected.latents)
    with torch.autocast("cpu", torch.bfloat16):
        (design,) = invert(model, targets, num_candidates=2, refine="physics")
    assert torch.equal(design.latents, expected.latents)
    with pytest.raises(ValueError, match=r"model\.float"):
        invert(SnaJanusModel(SnaJanusConfig(resolution=8)).bfloat16(), targets)


def test_voigts_spelling_of_a_target_is_understood(model):
    design = invert(model, {"C11": 2.0}, num_candidates=1)
    assert design.target == {"C1111": 2.0}


@pytest.fixture(scope="module")
def classifier():
    """Of grey images that are bright at the top or at the bottom."""
    torch.manual_seed(0)
    labels = torch.arange(200) % 2
    images = 0.3 * torch.rand(200, M, M)
    images[labels == 0, : M // 2] += 0.6
    images[labels == 1, M // 2 :] += 0.6
    config = SnaJanusConfig(
        spatial_dims=2,
        resolution=M,
        symmetry="none",
        two_phases=False,
        channels=[8],
        latent_dim=4,
        property_names=["top", "bottom"],
        property_kind="classification",
        head_rank=4,
    )
    model = SnaJanusModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(images, labels).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        model.remember(model.encode(images))
    return model


def test_a_class_is_inverted_to_grey_images_of_it(classifier):
    top, bottom = invert(classifier, {"label": ["top", "bottom"]}, num_candidates=3)
    torch.testing.assert_close(invert(classifier, {"class": 1}, num_candidates=3).cells, bottom.cells)
    assert top.target == {"class": 0}
    assert top.reachable
    assert (top.predicted["top"] > 0.95).all()
    assert top.checked == {}
    assert top.num_rejected == 0
    assert top.cells.is_floating_point()
    assert top.best[: M // 2].mean() > top.best[M // 2 :].mean() + 0.2
    assert bottom.best[: M // 2].mean() < bottom.best[M // 2 :].mean() - 0.2


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"class": 2}, "whole numbers from 0 to 1"),
        ({"class": 0.5}, "whole numbers from 0 to 1"),
        ({"label": "tap"}, "did you mean 'top'"),
        ({"label": 1.0}, "no label 1.0"),
        ({"top": 1.0}, "a class's number or label alone"),
    ],
)
def test_classes_that_are_not_there_are_refused(classifier, targets, message):
    with pytest.raises(ValueError, match=message):
        invert(classifier, targets)


def test_names_of_properties():
    assert len(NAMES) == 21 + 3 + 6
    assert [canonical(name) for name in ("C11", "C44", "C66", "C2211", "C3232", "K21", "permeability")] == [
        "C1111",
        "C2323",
        "C1212",
        "C1122",
        "C2323",
        "K12",
        "permeability",
    ]
    with pytest.raises(ValueError, match="did you mean 'volume_fraction'"):
        canonical("volume")


def test_properties_are_those_of_the_homogenisation():
    solid = torch.ones(1, 4, 4, 4)
    names = ["C1111", "C12", "C44", "volume_fraction", "conductivity", "K12"]
    checked = properties(solid, names, Physics())
    shear = 625 / 2.6
    expected = [2 * shear * 0.7 / 0.4, 2 * shear * 0.3 / 0.4, shear, 1.0, 1.0, 0.0]
    assert list(checked.values) == names
    found = torch.cat(list(checked.values.values()))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert checked.converged.all()
    layers = torch.zeros(1, 4, 4, dtype=torch.bool)
    layers[:, :2] = True
    across, along = properties(layers, ["K11", "K22"], Physics(symmetry="none")).values.values()
    assert across.item() == pytest.approx(2 / 1001, rel=1e-4)
    assert along.item() == pytest.approx(0.5005, rel=1e-4)
    alone = properties(solid, ["volume_fraction"], Physics())
    assert alone.residual.tolist() == [0.0]
    assert alone.converged.all()
    with pytest.raises(ValueError, match="an axis 3"):
        properties(layers, ["C3333"], Physics(symmetry="none"))


def test_solid_that_would_float_goes_elsewhere_at_the_same_volume(model):
    x = torch.arange(M)
    apart = (x[:, None, None] >= 5) & (x[:, None] >= 5) & (x >= 5)
    scores = -(x[:, None, None] + x[:, None] + x).float() + 40.0 * apart
    plain = threshold(scores[None], 0.45, "cubic", model.boundary)
    assert not bicontinuous(plain, "cubic")
    _, cells = candidates.cut(model, scores[None], torch.tensor([0.45]))
    assert cells.sum() == plain.sum()
    assert not (cells & apart).any()
    assert not candidates.islands(cells, "cubic")[:, model.boundary == FREE].any()
