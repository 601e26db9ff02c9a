"""The card of Janus: its targets, words, pictures and text, from a made-up record."""

import copy
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from eval import janus_card, janus_figures, janus_targets, janus_words
from eval.janus_targets import targets
from training.provenance import provenance, write_json
from training.voxels import View

NAMES = ["C1111", "C1122", "C2323", "volume_fraction", "permeability"]
HEADS = ("separable", "mlp")
PARTS = ("homogenization", "models", "inversion", "digits", "conductivity", "beam")
NUM_TARGETS = 14
FORWARD = ("R² of C1111", "R² of C1122", "R² of C2323", "R² of volume fraction", "R² of permeability")


def errors_of(seed, worse=1.0):
    """Errors of a model on held-out cells."""
    miss = worse * (0.002 + 0.001 * seed)
    return {
        "bce": 0.05 * worse + 0.001 * seed,
        "voxel_error": 0.02,
        "r2": {name: 1 - miss * (20 if name == "permeability" else 1) for name in NAMES},
        "mae_relative": dict.fromkeys(NAMES, 10 * miss),
        "cycle_property": 0.01,
        "cycle_latent": 0.015,
    }


def beam_set(error):
    """One of the beams of a record of training.janus_beam."""
    return {
        "stiffness": {"signed": -0.001, "mae": error, "rmse": 1.3 * error, "largest": 3 * error, "r2": 0.99},
        "volume_fraction": {"signed": 0.0, "mae": 1e-4, "rmse": 1e-4, "largest": 2e-4, "r2": 1.0},
        "beam": {"relative_deflection": -error / 2, "energy_correlation": 0.999, "energy_l1": 0.01},
        "cells": {
            "stiffness": np.full((10, 2, 2), 100.0).tolist(),
            "num_distinct": 38,
            "num_unsound": 0,
            "num_not_converged": 0,
            "mean_gap": 0.03,
        },
        "inversion": {"num_unreachable": 0, "num_rejected": 3, "num_candidates": 640},
        "geometry": {
            "shape": [320, 64, 64],
            "num_voxels": 320 * 64 * 64,
            "num_seams": 76,
            "seam_mismatches": 0,
            "num_components": 1,
            "floating_voxels": 0,
        },
        "seconds": {"inversion": 200.0, "check": 20.0, "assembly": 1.0, "beam": 3.0},
    }


def made_up():
    """A record with all parts, in which all figures are reached but those that are measured on other machines."""
    about = {"provenance": provenance(0), "part_seconds": 12.0}
    draws = np.random.default_rng(0)
    rows = [
        {"head": head, "seed": seed, "num_head_parameters": 20_800 + 100 * (head == "mlp"), "num_parameters": 250_000}
        | {"train_seconds": 250.0, "epochs": 40, "num_train": 2400, "num_test": 300}
        | {"test": errors_of(seed, 1.0 if head == "separable" else 2.5)}
        for seed in range(3)
        for head in HEADS
    ]
    wide = [{"C1111": 60.0 + 50 * i, "volume_fraction": 0.25 + 0.06 * i} for i in range(6)]
    inversions = [
        {"head": head, "seed": seed, "index": i, "num_rejected": 1, "reachable": i < 5, "distance": 7.5}
        | dict(zip(("predicted_error", "checked_error", "mean_checked_error", "gap"), errors, strict=True))
        | {"mean_gap": 2 * errors[-1]}
        for head in HEADS
        for seed in range(3)
        for i in range(6)
        for errors in [(np.array([0.002, 0.01, 0.03, 0.009]) * (1 + 2 * (head == "mlp")) * draws.lognormal()).tolist()]
    ]
    ratio = {
        "value": 2.5,
        "low": 1.6,
        "high": 3.5,
        "level": 0.95,
        "num_resamples": 100,
        "num_wins": 15,
        "num_pairs": 18,
    }
    trials = ((0.0, None, 0.02), (0.01, None, 0.01), (0.1, None, 0.0101), (0.01, "physics", 0.003))
    record = {
        "small": False,
        "homogenization": {
            "seconds": [
                {"cell": "schwarz_p", "what": what, "property": "stiffness", "edge": 32, "contrast": 1000.0}
                | {"num_loads": loads, "num_cells": 1, "tolerance": 1e-4, "threads": 2, "seconds": seconds}
                | {"num_iterations": 40, "residual": 9e-5, "scheme": "rotated"}
                for what, loads, seconds in (("whole", 6, 5.0), ("orthants", 2, 0.3))
            ],
            "drift": [
                {"cell": cell, "volume_fraction": 0.4, "scheme": scheme, "edge": edge}
                | {"C1111": 0.16 + shift / edge, "C2323": 0.05 + shift / edge / 2, "permeability": 1e-3 + 1e-2 / edge}
                for cell, edges in (("schwarz_p", (16, 32, 64)), ("gyroid", (16, 32)))
                for scheme, shift in (("rotated", -0.2), ("hexahedral", 0.3))
                for edge in edges
            ],
        },
        "models": {"rows": rows, "property_names": NAMES},
        "inversion": {
            "num_candidates": 16,
            "targets": wide,
            "rows": inversions,
            "seconds": {"search": 12.0, "check": 40.0, "threads": 2, "num_cells": 96},
            "ablation": [
                {"prior_weight": weight, "refine": refine, "seed": 0, "head": "separable"}
                | {"checked_error": error, "gap": error, "rejected": 1.5}
                for weight, refine, error in trials
            ],
            "uncorrected": {"rows": inversions, "ratio": ratio | {"of": "best"}},
            "ratio": {"statistic": "mlp over separable", "of": "best"} | ratio,
            "ratio_candidates": {"statistic": "mlp over separable", "of": "mean of candidates"} | ratio | {"low": 0.9},
        },
        "digits": {
            "rows": [
                {
                    "seed": 0,
                    "test_accuracy": 0.97,
                    "classes": [{"class": i, "recognised": 1 - i / 20, "best_recognised": i != 8} for i in range(10)],
                }
            ],
            "classifier": "SVC",
            "classifier_accuracy": 0.99,
        },
        "conductivity": {
            "rows": [
                {"seed": 0, "test": errors_of(0) | {"r2": {"K11": 0.99}, "mae_relative": {"K11": 0.02}}}
                | {
                    "inversion": {
                        "num_targets": 9,
                        "predicted_error": 0.004,
                        "checked_error": 0.01,
                        "pixel_error": 0.03,
                    }
                }
            ]
        },
        "beam": {
            "model": "runs/janus/models/separable-0",
            "refine": "physics",
            "settings": {
                "target": {"num_cells": [10, 2, 2], "stiffness": [350.0, 50.0], "volume_fraction": [0.65, 0.25]},
                "inversion": {"num_candidates": 16, "seed": 0},
            },
            "sets": {"unrefined": beam_set(0.03), "refined": beam_set(0.008)},
        },
    }
    return told(record | {name: record[name] | copy.deepcopy(about) for name in PARTS})


def told(record):
    return record | {"targets": [vars(each) for each in targets(record)]}


def arrays(num_cells=60, num_shown=9, m=8):
    """Cells like Schwarz's P, codes on a curve, and predictions near labels."""
    draws = np.random.default_rng(1)
    label = draws.uniform(0.5, 1.0, (num_cells, 5)) * np.array([300, 100, 90, 0.6, 1e-3])
    angle = np.pi * (np.arange(m) + 0.5) / m
    field = sum(np.cos(angle)[tuple(None if axis != i else slice(None) for i in range(3))] for axis in range(3))
    levels = np.linspace(-0.7, 0.7, num_shown)[:, None, None, None]
    targets = np.stack([np.linspace(300, 60, num_shown), np.linspace(0.65, 0.25, num_shown)], axis=1)
    found = {
        "parity.prediction": label * draws.normal(1, 0.02, label.shape),
        "parity.label": label,
        "latent.codes": np.stack(
            [label[:, 0] / 300, (label[:, 0] / 300) ** 2, *draws.normal(0, 0.1, (6, num_cells))], 1
        ),
        "latent.C1111": label[:, 0],
        "reconstruction.cells": np.repeat(field[None] < 0.1, 3, 0),
        "reconstruction.logits": -6 * (field[None] - np.linspace(-0.3, 0.5, 3)[:, None, None, None]),
        "gallery.cells": (field[None] < levels[::-1]).astype(np.uint8),
        "gallery.targets": targets,
        "gallery.checked": targets[:, 0] * draws.normal(1, 0.01, num_shown),
        "digits.images": draws.uniform(0, 1, (10, 2, 8, 8)),
    }
    return {
        name: np.ascontiguousarray(each if each.dtype == np.uint8 else each.astype(np.float32))
        for name, each in found.items()
    }


@pytest.fixture
def record():
    return made_up()


def reached(record, words):
    """Of the one target whose figure has these words."""
    (found,) = [each for each in targets(record) if words in each.figure]
    return found.reached


def test_a_made_up_study_reaches_all_but_what_needs_a_gpu(record):
    found = targets(record)
    assert len(found) == NUM_TARGETS
    assert [each.figure for each in found if not each.reached] == [
        each.figure for each in found if "one GPU" in each.figure
    ]
    assert reached(record, "one GPU") is None
    (gpu,) = [each for each in found if "one GPU" in each.figure]
    assert "here cells of 32³ from 16 candidates on" in gpu.figure
    assert "224 s" in gpu.figure
    mean = next(each for each in found if "R² of C1111" in each.figure)
    assert mean.measured == pytest.approx(1 - 0.003)
    assert "mean of 3 seeds (worst 0.996)" in mean.figure
    error = next(each for each in found if "MAE with refinement" in each.figure)
    assert error.measured == 0.008
    assert "without 0.03, published without 0.0257" in error.figure


def test_targets_of_nothing_are_open(record):
    assert [(each.measured, each.reached) for each in targets({})] == [(None, None)] * NUM_TARGETS
    assert [(each.measured, each.reached) for each in targets(dict.fromkeys(PARTS))] == [(None, None)] * NUM_TARGETS
    for name in PARTS:
        rest = {key: part for key, part in record.items() if key != name}
        opened = sum(a.reached is not b.reached for a, b in zip(targets(record), targets(rest), strict=True))
        assert opened == {"homogenization": 1, "models": 8, "inversion": 1, "beam": 3}.get(name, 0)


@pytest.mark.parametrize("words", FORWARD)
def test_forward_targets_can_fail(record, words):
    name = words.removeprefix("R² of ").replace(" ", "_")
    bound = 0.9 if name == "permeability" else 0.99
    for value, expected in ((bound + 1e-6, True), (bound, name == "permeability"), (bound - 1e-6, False), (None, None)):
        for row in record["models"]["rows"]:
            row["test"]["r2"][name] = value if row["head"] == "separable" else 1.0
        assert reached(record, words) is expected
    record["models"]["rows"][0]["test"]["r2"][name] = 1.0  # the others have no number
    assert reached(record, words) is False
    for row in record["models"]["rows"]:
        del row["test"]["r2"][name]
    assert reached(record, words) is None


@pytest.mark.parametrize(
    ("key", "words", "bound"),
    [("bce", "cross-entropy", 0.08), ("cycle_property", "cycle: prop", 0.02), ("cycle_latent", "cycle: lat", 0.02)],
)
def test_model_targets_can_fail(record, key, words, bound):
    for value, expected in ((bound, True), (bound + 1e-6, False)):
        for row in record["models"]["rows"]:
            row["test"][key] = value if row["head"] == "separable" else 0.0
        assert reached(record, words) is expected


def test_a_cycle_error_by_property_counts_by_its_largest():
    assert janus_targets.cycle({"cycle_property": {"C1111": 0.01, "C1122": 0.03}}, "cycle_property") == 0.03
    assert janus_targets.cycle({"cycle_property": {"C1111": 0.01, "C1122": None}}, "cycle_property") is None


def test_ratio_needs_its_whole_interval(record):
    for ends, expected in (((1.42, 3.0), True), ((1.41, 3.0), False), ((0.5, 3.0), False), ((None, None), None)):
        record["inversion"]["ratio"] |= dict(zip(("low", "high"), ends, strict=True))
        assert reached(record, "MLP head over separable head") is expected
    record["inversion"]["ratio"] = None  # one head alone
    assert reached(record, "MLP head over separable head") is None


def test_beam_targets_can_fail(record):
    sets = record["beam"]["sets"]
    sets["refined"]["stiffness"]["mae"] = 0.0101
    sets["refined"]["beam"]["relative_deflection"] = -0.0071
    sets["unrefined"]["geometry"]["seam_mismatches"] = 1
    assert [reached(record, f"beam: {what}") for what in ("checked", "deflection", "voxels")] == [False] * 3
    del sets["refined"]
    assert [reached(record, f"beam: {what}") for what in ("checked", "deflection", "voxels")] == [None, None, False]
    record["beam"]["settings"]["target"]["num_cells"] = [4, 2, 2]  # another beam is no measure
    assert all(each.reached is None for each in targets(record) if "beam" in each.figure)


def test_beam_time_counts_on_a_gpu_at_full_size_alone(record):
    beam = record["beam"]
    beam["provenance"]["hardware"]["accelerator"] = "some GPU"
    assert "of the processor" in targets(record)[12].figure  # which it need not have used
    beam["device"] = "cuda:0"
    assert "on some GPU" in targets(record)[12].figure
    assert reached(record, "one GPU") is None  # cells of 32 voxels
    for one in beam["sets"].values():
        one["geometry"]["shape"] = [640, 128, 128]
    assert reached(record, "one GPU") is False
    beam["sets"]["refined"]["seconds"]["inversion"] = 100.0
    assert reached(record, "one GPU") is True
    beam["settings"]["inversion"]["num_candidates"] = 8
    assert reached(record, "one GPU") is None


def test_time_of_a_solve_can_fail(record):
    row = record["homogenization"]["seconds"][0]
    for change, expected in (
        ({"seconds": 6.1}, False),
        ({"residual": 2e-4}, False),
        ({"threads": 4}, None),
        ({"tolerance": 1e-3}, None),
        ({"contrast": 100.0}, None),
        ({"num_loads": 2}, None),
    ):
        changed = record | {"homogenization": {"seconds": [row | change]}}
        assert reached(changed, "homogenisation: seconds") is expected


def test_words_turn_with_the_numbers(record):
    part = record["inversion"]
    assert (
        "the separable head is better (95 % interval); with the separable head it is smaller in 15 of 18"
        in janus_words.ratio_words(part)[0]
    )
    assert "no difference is shown" in janus_words.ratio_words(part)[1]
    part["ratio"] |= {"value": 0.5, "low": 0.3, "high": 0.8}
    assert "the separable head is **worse**" in janus_words.ratio_words(part)[0]
    part["ratio"] |= {"low": None, "high": None}
    assert "nothing is shown" in janus_words.ratio_words(part)[0]
    part["ratio"] = part["ratio_candidates"] = None
    assert janus_words.ratio_words(part) == []

    rows = record["models"]["rows"]
    assert janus_words.forward_words(rows) == [
        "R² on held-out cells: the separable head is ahead in all seeds for C1111, C1122, C2323, volume fraction and "
        "permeability."
    ]
    rows[0]["test"]["r2"]["C1111"] = 0.5
    assert "seeds of both heads overlap for C1111" in janus_words.forward_words(rows)[0]
    swapped = [row | {"head": HEADS[1 - HEADS.index(row["head"])]} for row in made_up()["models"]["rows"]]
    assert "the MLP head is ahead" in janus_words.forward_words(swapped)[0]
    assert len(janus_words.parameter_words(rows)) == 1
    rows[1]["num_head_parameters"] = 10_000
    assert "not of equal size" in janus_words.parameter_words([rows[0], rows[1]])[1]
    assert janus_words.tuning_words({}) == []
    assert janus_words.tuning_words({"tuned_for_each_head": []}) == ["No setting is one head's own."]
    assert janus_words.tuning_words({"tuned_for_each_head": ["rank"]}) == ["Tuned for each head on its own: rank."]
    assert "same seeds" in janus_words.parameter_words(rows[:3])[-1]


def test_words_of_hallucination_prior_and_refinement(record):
    rows = [
        {"head": "mlp", "predicted_error": 0.01, "checked_error": 0.05, "mean_checked_error": 0.1, "gap": 0.04},
        {"head": "mlp", "predicted_error": 0.03, "checked_error": None, "mean_checked_error": None, "gap": None},
    ]
    assert janus_words.hallucination_words(rows) == [
        "MLP head: the best candidate is predicted to be off by 2 % and is off by 5 %, 2.5 times as much; predicted "
        "and checked C1111 differ by 4 % on average; 1 of 2 inversions have no sound candidate."
    ]
    told = janus_words.ablation_words(record["inversion"]["ablation"])
    assert told == [
        "A prior of weight 0.01 against none: checked error from 2 % to 1 %, 2 times smaller, gap from 2 % to 1 %, 2 "
        "times smaller.",
        "A prior of weight 0.1 against none: checked error from 2 % to 1.01 %, 1.98 times smaller, gap from 2 % to "
        "1.01 %, 1.98 times smaller.",
        "Refinement by physics (prior 0.01): checked error from 1 % to 0.3 %, 3.33 times smaller.",
    ]
    assert "In 6 of 36 inversions no candidate" in janus_words.reach_words(record["inversion"]["rows"])[0]
    assert "In all inversions a candidate" in janus_words.reach_words(record["inversion"]["rows"][:2])[0]
    rows = [
        {"prior_weight": weight, "refine": None, "checked_error": error, "gap": None}
        for weight, error in ((0, 0.1), (1, 0.2))
    ]
    assert janus_words.ablation_words(rows) == [
        "A prior of weight 1 against none: checked error from 10 % to 20 %, 2 times **larger**."
    ]


def test_words_of_beam_drift_and_digits(record):
    beam = record["beam"]
    told = janus_words.beam_words(beam)
    assert "no voxel differs across 76 seams; one piece; 38 of 40 cells are distinct; 224 s." in told[2]
    assert told[-1] == "Refinement by physics: mean absolute error of C1111 from 3 % to 0.8 %, 3.75 times smaller."
    beam["sets"]["unrefined"]["geometry"] |= {"seam_mismatches": 2, "num_components": 3, "floating_voxels": 9}
    beam["sets"]["unrefined"]["cells"]["num_unsound"] = 4
    line = janus_words.beam_words(beam)[2]
    assert "**2** voxels differ across" in line
    assert "**3 pieces**, 9 voxels outside of the largest" in line
    assert "**4 cells are not sound**" in line

    rows = [
        {"cell": "gyroid", "scheme": scheme, "edge": edge, "C1111": value}
        for scheme, values in (("rotated", (0.10, 0.11)), ("hexahedral", (0.20, 0.22)))
        for edge, value in zip((16, 32), values, strict=True)
    ]
    assert janus_words.drift_words(rows) == [
        "C1111 of gyroid: at 32³ the schemes differ by 100 %, from 16³ to 32³ rotated moves by 10 %, from 16³ to 32³ "
        "hexahedral moves by 10 %."
    ]
    assert janus_words.drift_words(rows[:1]) == []

    assert "recognised for 9 of 10 classes (not for 8)" in janus_words.digit_words(record["digits"])[0]
    record["digits"]["rows"][0]["classes"][8]["best_recognised"] = True
    assert "recognised for all 10 classes" in janus_words.digit_words(record["digits"])[0]


@pytest.fixture
def coarse(monkeypatch):
    """Pictures are as coarse as they are quick."""
    monkeypatch.setattr(janus_figures, "LOOK", View(width=24, samples=1))


def write_card(folder, record, given=None, remarks="- A remark.\n"):
    """Runs the command, returns the card."""
    write_json(folder / "janus" / "janus.json", record)
    if given:
        save_file(given, folder / "janus" / janus_figures.ARRAYS)
    (folder / "remarks.md").write_text(remarks, encoding="utf-8")
    arguments = ["--study", "janus/janus.json", "--out", "janus.md", "--remarks", "remarks.md"]
    arguments = [each if each.startswith("--") else str(folder / each) for each in arguments]
    janus_card.main(arguments)
    return (folder / "janus.md").read_text(encoding="utf-8")


def sound(text, folder):
    """No number is missing without being told, all pictures are there, and lists and tables are set off."""
    assert "None" not in text
    assert "nan" not in text
    assert "{" not in re.sub(r"\$\$.*?\$\$|```.*?```", "", text, flags=re.DOTALL)
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert all((folder / link).is_file() for link in links)
    lines = text.splitlines()
    for before, line in pairwise(lines):
        assert not line.startswith(("#", "![")) or not before
        assert not (line.startswith("|") and before and not before.startswith("|"))
    return links


@pytest.mark.usefixtures("coarse")
def test_card_and_pictures_of_a_whole_record(record, tmp_path):
    (tmp_path / "janus").mkdir()
    (tmp_path / "janus" / "beam.png").touch()
    text = write_card(tmp_path, record, arrays())
    links = sound(text, tmp_path)
    names = ["gallery", "parity", "latent", "reconstructions", "inversion", "beam", "drift", "digits"]
    assert links == [f"janus/{name}.png" for name in names]
    assert all(each["figure"] in text for each in record["targets"])
    assert "not measured" in text
    assert "**not reached**" not in text
    assert "trial" not in text
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert text.endswith("- A remark.\n")
    assert "| refined | −0.1 % | 0.8 % |" in text
    assert "| published | 0.1 % | 2.57 % | 3.49 % |" in text
    assert "| C1111 | 0.9970 (0.9960 to 0.9980) | 0.9925 (0.9900 to 0.9950) |" in text
    assert all(f"| {name} | `" in text for name in PARTS)


@pytest.mark.parametrize("missing", PARTS)
def test_card_lives_without_a_part(record, missing, tmp_path):
    rest = told({key: part for key, part in record.items() if key != missing})
    given = {key: each for key, each in arrays().items() if not (missing == "models" and "parity" in key)}
    text = janus_card.janus_card(rest, "janus")
    assert "**not reached**" not in text
    names = [name for name, _ in janus_figures.pictures(rest, given)]
    assert ("inversion" in names) == (missing != "inversion")
    assert ("drift" in names) == (missing != "homogenization")
    assert ("parity" in names) == (missing != "models")


def test_card_of_hardly_a_study(tmp_path):
    text = write_card(tmp_path, told({"small": True}), remarks="")
    assert sound(text, tmp_path) == []
    assert "**A trial at sizes too small" in text
    assert text.count("not measured") == NUM_TARGETS
    assert sorted(path.name for path in (tmp_path / "janus").iterdir()) == ["janus.json"]
    with pytest.raises(SystemExit, match=r"lacks 'targets'; write it whole with eval\.janus"):
        write_card(tmp_path, {"small": True})


@pytest.mark.usefixtures("coarse")
def test_card_of_numbers_that_are_missing(record, tmp_path):
    for row in record["inversion"]["rows"]:
        row |= dict.fromkeys(("predicted_error", "checked_error", "mean_checked_error", "gap", "mean_gap"))
    for key in ("ratio", "ratio_candidates"):
        record["inversion"][key] = None
    for row in record["inversion"]["ablation"]:
        row |= {"checked_error": None, "gap": None}
    for row in record["models"]["rows"]:
        row["test"]["r2"]["C2323"] = row["test"]["mae_relative"]["C2323"] = None
    for row in record["homogenization"]["drift"]:
        row["permeability"] = None
    text = write_card(tmp_path, told(record), {key: each[:3] for key, each in arrays().items() if "gallery" in key})
    assert "inversion" in "".join(sound(text, tmp_path))
    assert "| C2323 | – | – |" in text


def test_pictures_that_do_not_fit_are_left_out(record, tmp_path):
    given = arrays()
    names = [name for name, _ in janus_figures.pictures(record | {"models": {"property_names": NAMES[:2]}}, given)]
    assert "parity" not in names
    del given["latent.codes"]
    assert "latent" not in [name for name, _ in janus_figures.pictures(record, given)]
    assert janus_figures.property_names({"models": {"rows": [{"test": {"r2": {"K11": 1.0}}}]}}) == ["K11"]


def test_mid_planes_are_slices_of_whole_cells():
    octants = np.arange(2 * 27).reshape(2, 3, 3, 3)
    planes = janus_figures.mid_planes(octants)
    assert planes.shape == (2, 6, 6)
    assert np.array_equal(planes[:, :3, :3], octants[..., -1])
    assert np.array_equal(planes, planes[:, ::-1, ::-1])


def test_the_committed_card_is_what_its_record_generates():
    cards = Path(__file__).resolve().parent.parent / "model_cards"
    study = json.loads((cards / "janus" / "janus.json").read_text("utf-8"))
    remarks, text = ((cards / name).read_text("utf-8") for name in ("janus/remarks.md", "janus.md"))
    pictures = janus_figures.pictures_of(cards / "janus", study)
    assert text == janus_card.janus_card(study, "janus", pictures, remarks)
    assert all((cards / link).is_file() for link in re.findall(r"\]\((janus/[^)]+)\)", text))
