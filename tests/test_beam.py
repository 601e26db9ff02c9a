import json
from dataclasses import dataclass
from types import SimpleNamespace

import meshio
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import training.janus_beam
from leviathan.janus.physics import Physics
from training.beam import BeamErrors, FieldErrors, beam_targets, bend, compare_beams, euler_bernoulli
from training.janus_beam import CONFIG, KEYS, choose, homogenised, main, run, summary
from training.settings import read_settings
from training.voxels import Surface


def isotropic(youngs_modulus, poissons_ratio):
    shear = youngs_modulus / (2 * (1 + poissons_ratio))
    first = youngs_modulus * poissons_ratio / ((1 + poissons_ratio) * (1 - 2 * poissons_ratio))
    matrix = np.diag([2 * shear] * 3 + [shear] * 3)
    matrix[:3, :3] += first
    return matrix


def uniform(matrix, *counts):
    return np.broadcast_to(matrix, (*counts, 6, 6))


# ------------------------------------------------------------------------------------------------------------ targets


def test_targets_have_the_given_ends_and_keep_the_power_law():
    targets = beam_targets(10, (350, 50), (0.65, 0.25))
    assert targets.exponent == pytest.approx(2.0365, abs=1e-4)
    assert targets.solid_stiffness == pytest.approx(841.5, abs=0.1)
    for field, ends in ((targets.stiffness, (350, 50)), (targets.volume_fraction, (0.65, 0.25))):
        assert field.shape == (10,)
        np.testing.assert_allclose(field[[0, -1]], ends, rtol=1e-14)
        assert (np.diff(field) < 0).all()
    np.testing.assert_allclose(np.diff(targets.stiffness), -300 / 9)  # as the moment: linear
    np.testing.assert_allclose(targets.solid_stiffness * targets.volume_fraction**targets.exponent, targets.stiffness)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, (350, 50), (0.65, 0.25)), "1 cells along"),
        ((10.0, (350, 50), (0.65, 0.25)), "10.0 cells along"),
        ((10, (50, 350), (0.65, 0.25)), "stiffness = \\(50, 350\\)"),
        ((10, (350, 0), (0.65, 0.25)), "stiffness"),
        ((10, (350, 50, 20), (0.65, 0.25)), "stiffness"),
        ((10, (350, 50), (1.0, 0.25)), "volume_fraction.* 1 > root"),
        ((10, (350, 50), (0.25, 0.25)), "volume_fraction"),
    ],
)
def test_targets_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        beam_targets(*arguments)


# --------------------------------------------------------------------------------------------------------- macroscale


def test_without_lateral_contraction_the_deflection_is_timoshenkos():
    length, side = 10, 2
    found = bend(uniform(isotropic(1.0, 0.0), length, side, side), elements_per_cell=1)
    second_moment, shear = side**4 / 12, 0.5
    bending = length**3 / (3 * second_moment)
    assert found.deflection == pytest.approx(bending + length / (5 / 6 * shear * side**2), rel=5e-4)
    assert euler_bernoulli(np.ones((length, side, side))) == pytest.approx(bending, rel=1e-12)


def test_with_lateral_contraction_it_is_within_a_few_per_cent():
    ratio = 0.3
    found = bend(uniform(isotropic(1.0, ratio), 10, 2, 2), elements_per_cell=1).deflection
    shear_factor = 10 * (1 + ratio) / (12 + 11 * ratio)  # G. R. Cowper (1966)
    timoshenko = 250 + 10 / (shear_factor / (2 * (1 + ratio)) * 4)
    assert found == pytest.approx(timoshenko, rel=0.03)


def test_deflection_and_energy_scale_with_the_compliance_and_the_work_is_all_stored():
    rng = np.random.default_rng(0)
    stiffness = isotropic(1.0, 0.25) * rng.uniform(0.5, 2, (4, 2, 2, 1, 1))
    one, two = bend(stiffness, 1), bend(3.5 * stiffness, 1)
    assert two.deflection == pytest.approx(one.deflection / 3.5, rel=1e-9)
    np.testing.assert_allclose(two.energy, one.energy / 3.5, rtol=1e-9)
    assert one.energy.sum() == pytest.approx(one.deflection / 2, rel=1e-9)
    assert one.energy.shape == (4, 2, 2)
    assert (one.energy > 0).all()


def test_stiffness_goes_to_its_own_cell():
    """Mirroring the beam across its width mirrors the energies; a weak root bends more than a weak tip."""
    stiffness = isotropic(1.0, 0.3) * np.random.default_rng(1).uniform(0.5, 2, (3, 2, 2, 1, 1))
    here, there = bend(stiffness, 1), bend(stiffness[:, ::-1], 1)
    np.testing.assert_allclose(there.energy[:, ::-1], here.energy, rtol=1e-9)
    weak = np.ones((4, 1, 1, 1, 1))
    weak[0] = 0.5
    root, tip = (bend(isotropic(1.0, 0.0) * each, 1).deflection for each in (weak, weak[::-1]))
    assert root > 1.3 * tip


def test_shear_and_axial_entries_are_told_apart():
    """A slender beam feels C1111, not the others' normal stiffness; softer shear adds to its deflection."""
    matrix = np.diag([1.0, 1.0, 1.0, 0.4, 0.4, 0.4])
    base = bend(uniform(matrix, 10, 1, 1), 1).deflection
    changed = {entry: matrix.copy() for entry in range(6)}
    for entry, each in changed.items():
        each[entry, entry] /= 2
    ratios = {entry: bend(uniform(each, 10, 1, 1), 1).deflection / base for entry, each in changed.items()}
    assert ratios[0] == pytest.approx(2, abs=0.02)
    assert ratios[4] == pytest.approx(1 + 30 / 4030, abs=2e-3)  # C1313 carries the force
    for entry in (1, 2, 3, 5):
        assert ratios[entry] == pytest.approx(1, abs=2e-3)


def test_bending_by_sections_is_the_integral():
    values = np.array([4.0, 2.0, 1.0])
    field = np.broadcast_to(values[:, None, None], (3, 2, 2))
    x = (np.arange(30000) + 0.5) / 10000
    integral = ((3 - x) ** 2 / (values[x.astype(int)] * 16 / 12)).mean() * 3
    assert euler_bernoulli(field) == pytest.approx(integral, rel=1e-8)
    # Two layers of 3 and 1: the axis is at (3 * 0.5 + 1.5) / 4, and b h^3 / 12 + b h d^2 for each.
    layers = np.broadcast_to([3.0, 1.0], (1, 1, 2))
    assert euler_bernoulli(layers) == pytest.approx((1 / 3) / (3 * (1 / 12 + 1 / 16) + 1 / 12 + 9 / 16), rel=1e-12)


# --------------------------------------------------------------------------------------------------------- comparison


def test_field_errors_are_what_their_names_say():
    errors = FieldErrors.of([1.0, 2.0, 4.0], [1.1, 1.9, 4.0])
    assert errors.signed == pytest.approx((0.1 - 0.05) / 3)
    assert errors.mae == pytest.approx(0.05)
    assert errors.rmse == pytest.approx(np.sqrt((0.01 + 0.0025) / 3))
    assert errors.largest == pytest.approx(0.1)
    assert errors.r2 == pytest.approx(1 - 0.02 / (np.var([1, 2, 4]) * 3))
    perfect = FieldErrors.of([1.0, 2.0], [1.0, 2.0])
    assert perfect == FieldErrors(0.0, 0.0, 0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="one shape"):
        FieldErrors.of([1.0], [1.0, 2.0])


def test_a_beam_that_is_as_asked_has_no_error_and_an_even_error_is_only_in_the_deflection():
    target = np.broadcast_to(beam_targets(4, (350, 50), (0.65, 0.25)).stiffness[:, None, None], (4, 2, 2))
    stiffness = isotropic(1.0, 0.3) / isotropic(1.0, 0.3)[0, 0] * target[..., None, None]
    errors, asked, found = compare_beams(target, stiffness, 1)
    assert isinstance(errors, BeamErrors)
    assert errors.relative_deflection == pytest.approx(0, abs=1e-12)
    assert errors.energy_correlation == pytest.approx(1)
    assert errors.energy_l1 == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(asked.energy, found.energy)
    errors, _, _ = compare_beams(target, stiffness / 1.1, 1)
    assert errors.relative_deflection == pytest.approx(0.1)
    assert errors.bending_deflection == pytest.approx(0.1)
    assert errors.energy_l1 == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bend(np.ones((2, 2, 2, 6, 5)), 1), "expected \\(X, Y, Z, 6, 6\\)"),
        (lambda: bend(uniform(np.full((6, 6), np.nan), 2, 1, 1), 1), "not finite"),
        (lambda: bend(uniform(np.triu(np.ones((6, 6))), 2, 1, 1), 1), "not symmetric"),
        (lambda: bend(uniform(-np.eye(6), 2, 1, 1), 1), "not positive definite"),
        (lambda: bend(uniform(np.eye(6), 2, 1, 1), 0), "elements_per_cell = 0"),
        (lambda: euler_bernoulli(np.zeros((2, 2, 2))), "values above 0"),
        (lambda: euler_bernoulli(np.ones((2, 2))), "expected \\(X, Y, Z\\)"),
        (lambda: compare_beams(np.ones((3, 1, 1)), uniform(np.eye(6), 2, 1, 1), 1), "targets have shape"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------------------------------- job


@dataclass
class Design:
    cells: torch.Tensor
    error: torch.Tensor
    connected: torch.Tensor
    converged: torch.Tensor
    gap: dict
    num_exchanged: torch.Tensor
    reachable: bool = True
    num_rejected: int = 0


class SchwarzP:
    """Instead of a model: octants of Schwarz's P surface with one boundary; refined ones are nearer to their target."""

    law = beam_targets(10, (350, 50), (0.65, 0.25))
    device = torch.device("cpu")

    def __init__(self, m=8):
        physics = Physics()
        self.config = SimpleNamespace(
            property_names=["C1111", "volume_fraction"], spatial_dims=3, symmetry="cubic", physics=physics
        )
        wave = torch.cos(torch.pi * (torch.arange(m) + 0.5) / m)
        self.field = -sum(torch.meshgrid(wave, wave, wave, indexing="ij"))
        self.faces = torch.zeros(m, m, m, dtype=torch.bool)
        self.faces[0] = self.faces[:, 0] = self.faces[:, :, 0] = True
        self.calls = []

    def invert(self, targets, *, num_candidates, seed, refine=None, **options):
        self.calls.append({"refine": refine, "seed": seed, **options})
        assert set(targets) == {"C1111", "volume_fraction"}
        assert len(targets["C1111"]) == len(targets["volume_fraction"])
        levels = self.field.unique()[:, None, None, None]
        cells = torch.where(self.faces, self.field > 0.6, self.field > levels)
        fractions = cells.float().mean((1, 2, 3))
        sound = torch.ones(num_candidates, dtype=torch.bool)
        designs = []
        for fraction in targets["volume_fraction"]:
            error = (fractions / fraction - 1).abs()
            nearest = error.argsort()[seed + (refine is None) :][:num_candidates]
            gap = {"C1111": error[nearest]}
            designs.append(Design(cells[nearest], error[nearest], sound, sound, gap, torch.zeros_like(nearest)))
        return designs


def by_the_law(orthants, model):
    """A check without homogenisation: C1111 of the power law, at the volume fraction that the cells have."""
    axial = model.law.solid_stiffness * orthants.float().mean((1, 2, 3)) ** model.law.exponent
    matrix = torch.from_numpy(isotropic(1.0, 0.3) / isotropic(1.0, 0.3)[0, 0])
    return axial[:, None, None] * matrix, torch.ones(len(orthants), dtype=torch.bool)


def settings_of(*flags):
    small = ("--beam.elements_per_cell=1", "--picture.width=100", "--picture.samples=1")
    few = ("--target.num_cells=[3, 2, 2]", "--inversion.num_candidates=3")
    return read_settings(CONFIG, [*small, *few, *flags], KEYS)


@pytest.fixture(scope="module")
def beam(tmp_path_factory):
    out = tmp_path_factory.mktemp("beam") / "out"
    model = SchwarzP()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.janus_beam, "homogenised", by_the_law)
        record = run(model, settings_of(), out, "physics", "a stand-in")
    return SimpleNamespace(out=out, record=record, model=model)


def test_the_job_reports_both_sets(beam):
    assert json.loads((beam.out / "beam.json").read_text()) == json.loads(json.dumps(beam.record))
    assert [(call["refine"], call["seed"]) for call in beam.model.calls] == [
        (refine, seed) for refine in (None, "physics") for seed in range(4)
    ]
    assert beam.record["device"] == "cpu"
    assert list(beam.record["sets"]) == ["unrefined", "refined"]
    rough, fine = beam.record["sets"].values()
    assert fine["stiffness"]["mae"] < rough["stiffness"]["mae"] < 0.06
    assert abs(fine["beam"]["relative_deflection"]) < 0.01
    assert fine["beam"]["energy_correlation"] > 0.99
    for each in (rough, fine):
        assert each["geometry"] == {
            "shape": [48, 32, 32],
            "num_voxels": 48 * 32 * 32,
            "num_seams": 2 * 4 + 2 * 3 * 2,
            "seam_mismatches": 0,
            "num_components": 1,
            "floating_voxels": 0,
        }
        assert each["inversion"] == {"num_unreachable": 0, "num_rejected": 0, "num_candidates": 36}
        assert each["cells"]["num_unsound"] == 0
        assert 10 <= each["cells"]["num_distinct"] <= 12
        assert each["cells"]["exchanged_voxels"] == [0] * 12
        assert set(each["seconds"]) == {"inversion", "check", "assembly", "beam"}
    text = summary(beam.record)
    assert "841.5 GPa x volume fraction^2.037" in text
    assert "0 differ over 20 seams" in text


def test_the_job_writes_everything_whole(beam):
    names = {"beam.json", "beam.png", "beam.stl", "cells.safetensors", "profile.png"}
    assert {path.name for path in beam.out.iterdir()} == names
    arrays = load_file(beam.out / "cells.safetensors")
    assert arrays["refined.orthants"].shape == (3, 2, 2, 8, 8, 8)
    assert arrays["refined.stiffness"].shape == (3, 2, 2, 6, 6)
    cells = beam.record["sets"]["refined"]["cells"]
    np.testing.assert_allclose(cells["volume_fraction"], arrays["refined.orthants"].mean((3, 4, 5)))
    np.testing.assert_allclose(cells["stiffness"], arrays["refined.stiffness"][..., 0, 0])
    solid = arrays["refined.orthants"].mean() * 12  # in cells
    mesh = meshio.read(beam.out / "beam.stl")
    surface = Surface(mesh.points.astype(np.float64), mesh.get_cells_type("triangle"))
    assert surface.num_open_edges == 0
    assert surface.volume == pytest.approx(solid, rel=0.03)
    np.testing.assert_allclose(mesh.points.max(0), [3, 2, 2], atol=1e-3)
    for name in ("beam.png", "profile.png"):
        assert (beam.out / name).read_bytes()[:4] == b"\x89PNG"


def test_a_planted_seam_is_in_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(training.janus_beam, "homogenised", by_the_law)
    monkeypatch.setattr(training.janus_beam, "_save_figure", lambda *_: None)
    model = SchwarzP()
    model.faces[:] = False  # nothing is shared: cells of other volume fractions have other faces
    record = run(model, settings_of("--surface.write=false", "--target.num_cells=[2, 1, 1]"), tmp_path)
    assert record["sets"]["unrefined"]["geometry"]["seam_mismatches"] > 0
    assert list(record["sets"]) == ["unrefined"]
    assert record["surface"] is None
    assert not (tmp_path / "beam.stl").exists()


def test_a_column_takes_the_best_sound_and_distinct_candidates():
    def design(fills, errors, sound):
        cells = torch.zeros(len(fills), 2, 2, 2, dtype=torch.bool)
        for cell, fill in zip(cells, fills, strict=True):
            cell.view(-1)[:fill] = True
        flags = torch.tensor(sound)
        return Design(cells, torch.tensor(errors), flags, torch.ones_like(flags), {}, flags)

    designs = [
        design([1, 2, 7], [0.02, 0.05, 0.001], [True, True, False]),
        design([1, 3, 4], [0.02, 0.01, 0.3], [True, True, True]),
    ]
    assert choose(designs) == [(1, 1), (0, 0)]  # not the unsound one; the cell that both found counts once
    assert choose([*designs, *designs, designs[0]]) == [(1, 1), (0, 0), (0, 1), (1, 2), (1, 1)]
    unsound = design([5, 6], [0.3, 0.2], [False, False])
    assert choose([unsound, unsound]) == [(0, 1), (0, 1)]


def test_solid_cells_have_the_stiffness_of_the_solid():
    tensor, converged = homogenised(torch.ones(2, 4, 4, 4, dtype=torch.bool), SchwarzP(4))
    np.testing.assert_allclose(tensor.numpy(), uniform(isotropic(625.0, 0.3), 2), rtol=1e-4, atol=0.1)
    assert converged.all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"property_names": ["volume_fraction"]}, "the beam needs C1111"),
        ({"spatial_dims": 2}, "2-D cells"),
        ({"symmetry": "none"}, "needs octants"),
    ],
)
def test_models_of_another_kind_are_refused(tmp_path, change, message):
    model = SchwarzP()
    vars(model.config).update(change)
    with pytest.raises(ValueError, match=message):
        run(model, settings_of(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--target.num_cells=[3, 2]", "three integers"),
        ("--target.num_cells=3", "three integers"),
        ("--target.num_cells=[1, 2, 2]", "1 cells along"),
        ("--target.stiffness=[50, 350]", "root > tip > 0"),
        ("--beam.elements_per_cell=0", r"beam\.elements_per_cell = 0"),
        ("--picture.width=0", "no view"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, flag, message):
    model = SchwarzP()
    with pytest.raises(ValueError, match=message):
        run(model, settings_of(flag), tmp_path)
    assert not model.calls  # before the hours of the inversion


def test_other_bad_input(tmp_path):
    with pytest.raises(ValueError, match="refine = 'magic'"):
        run(SchwarzP(), settings_of(), tmp_path, "magic")
    short = settings_of()
    del short["beam"]["elements_per_cell"]
    with pytest.raises(ValueError, match="settings lack beam\\.elements_per_cell"):
        run(SchwarzP(), short, tmp_path)
    (tmp_path / "beam.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a beam already"):
        run(SchwarzP(), settings_of(), tmp_path)


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="did you mean 'num_candidates'"):
        main(["--model", str(tmp_path), "--out", str(tmp_path / "out"), "--inversion.num_candidate", "3"])
    with pytest.raises(SystemExit, match="error: "):
        main(["--model", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    model = SchwarzP()
    model.to = lambda device: model
    monkeypatch.setattr(training.janus_beam, "homogenised", by_the_law)
    monkeypatch.setattr(training.janus_beam, "_save_figure", lambda *_: None)
    monkeypatch.setattr(training.janus_beam, "SnaJanusModel", SimpleNamespace(from_pretrained=lambda path: model))
    flags = [
        "--target.num_cells=[2, 1, 1]",
        "--beam.elements_per_cell=1",
        "--picture.width=80",
        "--surface.write=false",
    ]
    record = main(["--model", "runs/model", "--out", str(tmp_path / "out"), "--num-candidates", "2", *flags])
    assert record["model"] == "runs/model"
    assert record["settings"]["inversion"]["num_candidates"] == 2
    assert record["sets"]["unrefined"]["inversion"]["num_candidates"] == 4
    assert "unrefined: C1111 signed" in capsys.readouterr().out
