"""The study of Janus: its parts at small sizes, and the errors and statistics that they are made of."""

import inspect
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eval import janus, janus_demonstrations, janus_homogenization, janus_inversion, janus_models
from eval.janus import PARTS, SMALL, STUDY, Places, main, run
from eval.janus_homogenization import CONTRAST, SOLID, VOLUME_FRACTION, drift_rows, gyroid, schwarz_p, timing
from eval.janus_inversion import InversionRow, compared, error_grids, head_ratio, held_out_targets, kept, rows_of
from eval.janus_models import add_arrays, load_model, test_errors
from leviathan.janus.cells import bicontinuous, whole_cell
from leviathan.janus.homogenization import elastic_stiffness
from leviathan.janus.physics import Physics, properties
from training.microstructure_data import MicrostructureSet, load_set
from training.provenance import write_json

PART_FUNCTIONS = {
    "homogenization": janus_homogenization.homogenization_part,
    "models": janus_models.models_part,
    "inversion": janus_inversion.inversion_part,
    "digits": janus_demonstrations.digits_part,
    "conductivity": janus_demonstrations.conductivity_part,
}
OPTIONS = {"num_processes"}  # of the command


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a small run of all parts, and what it returned."""
    out, beam = tmp_path_factory.mktemp("janus"), tmp_path_factory.mktemp("beam")
    made = {"settings": {"target": {"num_cells": [1, 1, 1]}}, "sets": {}, "provenance": {"seed": 7}}
    write_json(beam / "beam.json", made)
    (beam / "beam.png").write_bytes(b"a picture")
    torch.set_num_threads(1)
    return out, main(["--out", str(out), "--small", "--beam", str(beam)])


def test_small_run_writes_every_part_as_json(small):
    out, record = small
    assert json.loads((out / janus.NAME).read_text(encoding="utf-8")) == json.loads(json.dumps(record))
    assert set(record) == {"small", "targets", *PARTS}
    for name in PARTS:
        assert record[name]["part_seconds"] > 0
    assert record["models"]["provenance"]["seed"] == list(SMALL["models"]["seeds"])
    assert record["beam"]["provenance"] == {"seed": 7}  # of those who made it
    assert (out / "beam.png").read_bytes() == b"a picture"
    assert {"parity.png", "inversion.png", "drift.png", "digits.png"} <= {path.name for path in out.iterdir()}


def test_models_differ_in_nothing_but_the_head(small):
    out, record = small
    rows = record["models"]["rows"]
    assert {(row["head"], row["seed"]) for row in rows} == {(h, s) for h in ("separable", "mlp") for s in (0, 1)}
    sizes = {row["head"]: row["num_head_parameters"] for row in rows}
    assert max(sizes.values()) <= 1.01 * min(sizes.values())
    configs = [json.loads((out / "models" / f"{head}-0" / "config.json").read_text()) for head in sizes]
    assert {key for key in configs[0] if configs[0][key] != configs[1][key]} <= {"head", "head_hidden"}
    for row in rows:
        assert row["test"]["bce"] > 0
        assert 0 <= row["test"]["voxel_error"] <= 1
        assert set(row["test"]["r2"]) == set(record["models"]["property_names"])


def test_inversions_are_those_of_the_cells_that_are_kept(small):
    out, record = small
    part, arrays = record["inversion"], load_file(out / janus_models.ARRAYS)
    assert len(part["rows"]) == 4 * len(part["targets"])
    cells = arrays["gallery.cells"]
    checked = properties(cells, ["C1111", "volume_fraction"], Physics(symmetry="cubic")).values
    torch.testing.assert_close(checked["C1111"].float(), arrays["gallery.checked"].float(), rtol=1e-3, atol=0)
    asked = torch.tensor([[target["C1111"], target["volume_fraction"]] for target in part["targets"]])
    torch.testing.assert_close(arrays["gallery.targets"], asked)
    first = [row for row in part["rows"] if (row["head"], row["seed"]) == ("separable", 0)]
    for row, value in zip(first, checked["C1111"].tolist(), strict=True):
        error = abs(value / part["targets"][row["index"]]["C1111"] - 1)
        assert row["checked_error"] in (None, pytest.approx(error, abs=2e-3))  # None: no candidate is connected
    assert sum(part["num_failed"].values()) == sum(row["checked_error"] is None for row in part["rows"])
    half_orbit = 3.5 / cells[0].numel()
    torch.testing.assert_close(checked["volume_fraction"], arrays["gallery.targets"][:, 1], rtol=0, atol=half_orbit)
    refined = [row["refine"] for row in part["ablation"]]
    assert refined == [None] * len(SMALL["inversion"]["prior_factors"]) + ["physics"]


def test_what_is_reported_is_of_held_out_cells(small):
    out, record = small
    held_out, arrays = load_set(out / "cells").split("test"), load_file(out / janus_models.ARRAYS)
    torch.testing.assert_close(arrays["parity.label"], held_out.labels, rtol=0, atol=0)
    stiffness = set(held_out.labels[:, held_out.property_names.index("C1111")].tolist())
    assert {target["C1111"] for target in record["inversion"]["targets"]} <= stiffness
    assert len(record["inversion"]["targets"]) == len(held_out) == record["models"]["rows"][0]["num_test"]
    (digits,) = record["digits"]["rows"]
    count = len(janus_demonstrations.digits().splits["test"][0])
    for share in (digits["test_accuracy"], record["digits"]["classifier_accuracy"]):
        assert share * count == pytest.approx(round(share * count))


def test_demonstrations_have_a_row_for_each_seed(small):
    out, record = small
    (digits,), (plane,) = record["digits"]["rows"], record["conductivity"]["rows"]
    assert [each["class"] for each in digits["classes"]] == list(range(10))
    assert record["digits"]["classifier_accuracy"] > 0.9
    assert load_file(out / janus_models.ARRAYS)["digits.images"].shape == (10, 2, 8, 8)
    assert plane["inversion"]["num_targets"] == 2
    assert plane["inversion"]["checked_error"] >= 0


def test_a_run_goes_on_where_it_stopped(small, monkeypatch, tmp_path):
    out, record = small
    monkeypatch.setattr(janus, "PARTS", dict.fromkeys(PARTS))  # none can be called
    again = run(out, small=True)
    assert again == json.loads(json.dumps(record))
    stopped = tmp_path / "study"
    monkeypatch.setattr(janus, "PARTS", {"homogenization": lambda at, sizes: {"rows": []}, "models": _stop})
    with pytest.raises(KeyboardInterrupt):
        run(stopped, data=tmp_path, small=True)
    assert "homogenization" in json.loads((stopped / janus.NAME).read_text(encoding="utf-8"))


def _stop(at, sizes):
    raise KeyboardInterrupt


def test_models_that_are_there_are_kept(small):
    out, record = small
    weights = out / "models" / "mlp-1" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    at = Places(out, out / "cells", out / "models", None, 1)
    part = PARTS["models"](at, SMALL["models"])
    assert weights.stat().st_mtime_ns == before
    assert part["rows"] == json.loads(json.dumps(record["models"]["rows"]))


def test_sizes_are_what_the_parts_take():
    assert set(STUDY) == set(SMALL) == set(PARTS)
    for name, function in PART_FUNCTIONS.items():
        wanted = {
            each.name for each in inspect.signature(function).parameters.values() if each.kind == each.KEYWORD_ONLY
        }
        assert set(STUDY[name]) == set(SMALL[name]) == wanted - OPTIONS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ["modles"]}, "modles unknown"),
        ({"num_processes": 0}, "expected at least 1"),
        ({"parts": ["beam"], "small": True}, "no --beam was given"),
        ({"parts": ["models"]}, "made with --small"),
    ],
)
def test_what_a_user_gets_wrong(options, message, tmp_path):
    if message.startswith("made"):
        write_json(tmp_path / janus.NAME, {"small": True})
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **{"data": tmp_path, **options})


def test_a_folder_without_a_model_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="measure the part models first"):
        load_model(tmp_path)


# ------------------------------------------------------------------------------------------------------ homogenisation


def test_drift_by_an_orthant_is_that_of_the_whole_cell():
    rotated, hexahedral = drift_rows("schwarz_p", 8)
    assert (rotated.scheme, hexahedral.scheme) == ("rotated", "hexahedral")
    whole = whole_cell(schwarz_p(8), "cubic").double()
    tensor = elastic_stiffness(whole, solid=SOLID, contrast=CONTRAST, tolerance=1e-6).tensor[0]
    solid = elastic_stiffness(torch.ones(1, 2, 2, 2), solid=SOLID).tensor[0]
    assert pytest.approx((tensor[0, 0] / solid[0, 0]).item(), rel=1e-3) == rotated.C1111
    assert pytest.approx((tensor[3, 3] / solid[3, 3]).item(), rel=1e-3) == rotated.C2323
    assert rotated.C1111 < hexahedral.C1111 < VOLUME_FRACTION  # Voigt's bound, but for the void


def test_gyroid_is_cut_at_its_volume_fraction():
    cell = gyroid(10)
    assert cell.sum() == round(VOLUME_FRACTION * 1000)
    assert bicontinuous(cell, "none").all()


def test_times_name_what_was_solved():
    row = timing("schwarz_p", "orthants", 8, 3, "stiffness", num_repeats=3)
    assert (row.num_loads, row.num_cells, row.edge, row.threads) == (2, 3, 8, torch.get_num_threads())
    assert row.residual <= row.tolerance
    assert timing("gyroid", "whole", 6, 1, "permeability", num_repeats=1).contrast is None


# -------------------------------------------------------------------------------------------------------------- models


def _set(labels, names=("C1111", "volume_fraction"), cells=None):
    labels = torch.as_tensor(labels, dtype=torch.float32)
    cells = torch.zeros(len(labels), 2, 2, 2, dtype=torch.uint8) if cells is None else cells
    free = torch.full(cells.shape[1:], 2, dtype=torch.uint8)
    indices = torch.arange(len(labels))
    return MicrostructureSet(cells, labels, tuple(names), "cubic", free, {}, ("f",) * len(labels), indices)


def _oracle(held_out, sharpness=50.0, offset=0.0):
    """A model that knows every cell, but for an offset of the properties."""
    names, count = list(held_out.property_names), len(held_out.property_names)
    config = SimpleNamespace(two_phases=True, property_kind="regression", property_names=names)
    config.property_low, config.property_high = [0.0] * count, [1.0] * count
    return SimpleNamespace(
        **{"config": config, "device": torch.device("cpu"), "dtype": torch.float32},
        encode=lambda cells: cells.float().flatten(1),
        decode=lambda z: sharpness * (2 * z.view(-1, 2, 2, 2) - 1),
        predict=lambda z: held_out.labels + offset,
        cycle_error=lambda cells: SimpleNamespace(latents=0.25, properties={"C1111": 0.5, "volume_fraction": 0.0}),
    )


def test_errors_of_a_model_that_knows_all_cells_are_zero():
    held_out = _set([[1.0, 0.5], [3.0, 0.5]], cells=torch.randint(2, (2, 2, 2, 2), dtype=torch.uint8))
    found = test_errors(_oracle(held_out), held_out)
    assert found.bce < 1e-9
    assert found.voxel_error == 0
    assert found.r2 == {"C1111": 1.0, "volume_fraction": None}  # constant
    assert found.mae_relative == {"C1111": 0.0, "volume_fraction": 0.0}
    assert (found.cycle_latent, found.cycle_property["C1111"]) == (0.25, 0.5)


def test_errors_are_those_of_the_definition():
    held_out = _set([[1.0, 0.25], [3.0, 0.5]], cells=torch.randint(2, (2, 2, 2, 2), dtype=torch.uint8))
    found = test_errors(_oracle(held_out, sharpness=-1.0, offset=0.5), held_out)
    assert found.voxel_error == 1
    assert found.bce == pytest.approx(math.log1p(math.e))
    assert found.r2["C1111"] == pytest.approx(1 - 2 * 0.25 / 2)
    assert found.mae_relative["C1111"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="no test cells"):
        test_errors(None, _set(torch.zeros(0, 2)))


def test_arrays_of_other_parts_stay(tmp_path):
    add_arrays(tmp_path, {"a": torch.ones(2), "b": torch.zeros(1)})
    add_arrays(tmp_path, {"b": torch.ones(3).flip(0)})
    arrays = load_file(tmp_path / janus_models.ARRAYS)
    assert {name: each.tolist() for name, each in arrays.items()} == {"a": [1.0, 1.0], "b": [1.0, 1.0, 1.0]}


# ----------------------------------------------------------------------------------------------------------- inversion


def test_targets_are_cells_of_every_part_of_the_range():
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).float()
    held_out = _set(torch.stack([order + 1, order / 100], 1))
    targets = held_out_targets(held_out, 10)
    assert targets["C1111"] == [3.0 + 4 * i for i in range(10)]  # the third of each four
    assert targets["volume_fraction"] == pytest.approx([(2 + 4 * i) / 100 for i in range(10)])
    assert len(held_out_targets(held_out, 100)["C1111"]) == 40
    with pytest.raises(ValueError, match="need C1111"):
        held_out_targets(replace(held_out, property_names=("C2323", "volume_fraction")), 3)


def test_rows_take_the_best_candidate_and_the_mean_of_the_sound_ones():
    design = SimpleNamespace(
        target={"C1111": 100.0},
        predicted={"C1111": torch.tensor([101.0, 100.0, 100.0])},
        checked={"C1111": torch.tensor([104.0, 90.0, 50.0])},
        gap={"C1111": torch.tensor([0.03, 0.1, 1.0])},
        connected=torch.tensor([True, True, False]),
        converged=torch.tensor([True, True, True]),
        distance=torch.tensor([2.0, 3.0, 4.0]),
        num_rejected=1,
        reachable=True,
    )
    (row,) = rows_of([design], "mlp", 3)
    expected = InversionRow("mlp", 3, 0, 0.01, 0.04, 0.07, 0.03, 0.065, 1, True, 2.0)
    assert vars(row) == {key: pytest.approx(value) for key, value in vars(expected).items()}
    design.connected[:2] = False
    (row,) = rows_of([design], "mlp", 3)
    assert (row.checked_error, row.mean_checked_error, row.gap, row.mean_gap) == (None,) * 4


def _rows(errors, head):
    return [
        {"head": head, "seed": seed, "index": index, "checked_error": value, "mean_checked_error": value}
        for (seed, index), value in np.ndenumerate(errors)
    ]


def test_ratio_of_proportional_errors_has_no_width():
    ours = np.array([[0.1, 0.4, 0.2]] * 4)  # seeds alike, so that only the targets vary, in common
    found = head_ratio(ours, 3 * ours, 200, "best")
    assert [found.value, found.low, found.high] == pytest.approx([3.0] * 3)
    assert (found.num_wins, found.num_pairs, found.num_resamples) == (12, 12, 200)


def test_ratio_widens_with_the_spread_of_seeds_and_of_targets():
    rng = np.random.default_rng(0)
    steady, targets, seeds = np.ones((6, 20)), rng.uniform(0.2, 2, (6, 20)), rng.uniform(0.5, 2, (6, 1))
    widths = []
    for others in (steady, targets, targets * seeds):
        found = head_ratio(steady, others, 500, "best")
        assert found.low <= found.value <= found.high
        widths.append(found.high - found.low)
    assert widths[0] == 0 < widths[1] < widths[2]


def test_ratio_leaves_out_what_has_no_error():
    ours, others = np.array([[0.1, np.nan], [0.1, 0.1]]), np.array([[0.2, 0.2], [0.2, np.nan]])
    found = head_ratio(ours, others, 50, "best")
    assert found.value == pytest.approx(2.0)
    assert (found.num_wins, found.num_pairs) == (2, 2)
    assert head_ratio(ours[:1], others[:1], 50, "best").low is None  # one seed tells nothing of seeds


def test_a_head_that_fails_on_hard_targets_gains_nothing():
    ours = np.array([[0.01, 0.01, 0.3]] * 2)
    found = head_ratio(ours, np.where(ours > 0.1, np.nan, ours), 50, "best")
    assert (found.value, found.num_pairs) == (1.0, 4)


def test_heads_are_compared_on_the_same_targets():
    ours, others = np.array([[0.1, 0.2], [0.3, 0.4]]), np.array([[0.2, 0.2], [0.2, 0.2]])
    rows = _rows(ours, "separable") + _rows(others, "mlp")
    grids = error_grids(rows[::-1], "checked_error")
    np.testing.assert_array_equal(np.sort(grids[0], 0), np.sort(ours, 0))
    assert set(compared(rows, 20)) == {"ratio", "ratio_candidates"}
    assert compared(rows[:4], 20) == {"ratio": None, "ratio_candidates": None}
    with pytest.raises(ValueError, match="other seeds or targets"):
        error_grids(rows[:-1], "checked_error")


def test_rows_are_kept_for_the_same_key_alone(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return [{"index": len(calls)}]

    path = tmp_path / "inversions" / "rows.json"
    key = {"targets": {"C1111": [0.1, 1 / 3]}, "options": {"refine": None}}
    assert kept(path, key, make) == kept(path, key, make) == [{"index": 1}]
    assert kept(path, {**key, "options": {"refine": "physics"}}, make) == [{"index": 2}]


# ------------------------------------------------------------------------------------------------------ demonstrations


def test_share_of_candidates_that_a_classifier_takes_for_the_class():
    classifier = SimpleNamespace(predict=lambda x: x.sum(1).astype(int))
    cells = torch.zeros(4, 2, 2)
    cells[0, 0, 0] = cells[2, 0, 1] = cells[2, 1, 1] = 1
    design = SimpleNamespace(cells=cells)
    found = janus_demonstrations.recognised(classifier, design, 1)
    assert found == {"class": 1, "recognised": 0.25, "best_recognised": True}
    assert janus_demonstrations.recognised(classifier, design, 0)["best_recognised"] is False
