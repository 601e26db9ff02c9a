"""The card of the study of turbulence: every number from the record, what won and lost from its comparisons."""

import dataclasses
import json
import re

import numpy as np
import pytest

import leviathan
from eval import scoring, turbulence, turbulence_card, turbulence_figures, turbulence_rows
from training import provenance

NUM_STEPS = 5
# Noise that a row adds to the truth, in units of its rms; leviathan is to be the best but for diffusion.
NOISE = {"leviathan": 0.2, "lookup": 0.5, "fno": 0.6, "unet": 0.7, "deeponet": 0.8, "diffusion": 0.02}
TOKENS = ("leviathan", "lookup")


def flows(seed, num_times, num_grid=16):
    rng = np.random.default_rng(seed)
    x = np.arange(num_grid) / num_grid
    t = 0.02 * np.arange(num_times)[:, None, None]
    fields = np.zeros((6, num_times, num_grid, num_grid), np.float32)
    for flow in fields:
        for kx, ky in [(1, 0), (0, 1), (1, 2), (2, 1), (3, 2), (4, 3), (5, 4)]:
            phase, speed, size = rng.uniform(0, 2 * np.pi), rng.normal(0, 3), (1 + rng.uniform()) / np.hypot(kx, ky)
            flow += size * np.cos(2 * np.pi * (kx * x[:, None] + ky * x + speed * t) + phase)
    return fields


def setting_record(windowed):
    truth = flows(0, NUM_STEPS + 1)
    tokenizer = leviathan.FieldTokenizer(patch_size=8, num_bits=10, base=32, low=-9.0, high=9.0)
    setting = scoring.MetricSettings(-9.0, 9.0, 8, 1.0, (1, 4) if windowed else (2, 6), 256, windowed)
    about = {"grid": [16, 16], "side": 16, "dt": 0.02, "trajectories": list(range(6)), "synthetic": True}
    about |= {"num_training_flows": 77, "pixels_per_step": 1.25}
    scored = {}
    for arm, size in NOISE.items():
        sampling = "expectation" if arm in TOKENS else None
        row = f"{arm}_{sampling}" if sampling else arm

        def predict(initial, seed, size=size):
            noise = np.random.default_rng(seed).standard_normal(truth[:, 1:].shape)
            return truth[:, 1:] + size * truth.std() * noise

        scores = scoring.score_row(scoring.Row(row, predict, [3, 4] if arm == "diffusion" else [3]), truth, setting)
        more = {"arm": arm, "sampling": sampling, "is_operator": sampling is None, "num_diverged": int(arm == "fno")}
        scored[row] = dataclasses.replace(scores, about=scores.about | more)
    return turbulence.sum_up(turbulence_rows.Flows(truth, flows(1, NUM_STEPS), about, {}), scored, tokenizer, setting)


@pytest.fixture(scope="module")
def found():
    settings = {}
    for name in ("patches", "halo"):
        results, _ = setting_record(windowed=name == "patches")
        results["arms"] = {
            arm: {
                "of": {"tune": "training.learning_rate"},
                "tuning": {"0.001": 5.125, "0.002": 4.5, "0.004": None},
                "best": "0.002",
                "validation": [{"step": 1, "loss": 4.4321, "nrmse": None}],
                "num_parameters": 800_123,
                "seconds": 1234.0,
                "pairs": 16_000,
                "provenance": {"hardware": {"processor": "Processor X", "cores": 3, "accelerator": None}},
            }
            for arm in NOISE
        }
        settings[name] = {key: value for key, value in results.items() if key not in ("spectra", "pdf")}
    record = {"study": "study.yaml", "steps": 1000, "tune_steps": 99, "training_seed": 7, "settings": settings}
    return json.loads(json.dumps(record | {"provenance": provenance.provenance([3, 4])}))


def lines_of(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def test_the_size_is_said_plainly(found):
    text = turbulence_card.turbulence_card(found, "pictures")
    assert text.startswith("---\nlibrary_name: transformers\nlicense: apache-2.0\ntags:\n")
    for part in (
        "| fields | 16 x 16, from this project's own solver",
        "| patch | 8 x 8 pixels |",
        "| parameters of an arm | 800,123 to 800,123 |",
        "| training pairs of an arm | 16,000, from 77 flows |",
        "| training steps | 1,000, after 99 with each of 3 values",
        "| seeds | one of training (7); of rollouts that are random 3 and 4 |",
        "Trained on Processor X, 3 cores",
        "Rollouts that diverged, their values held at a bound: fno.",
        "![Animation](pictures/halo.gif)",
    ):
        assert part in text
    assert (
        "| lookup | 800,123 | learning rate | 0.002 | 0.001: 5.125, 0.002: 4.5, 0.004: diverged | 16,000 | 4.432 |"
        in text
    )


def test_tables_hold_the_records_numbers(found):
    text = turbulence_card.turbulence_card(found, ".")
    for setting, table in zip(found["settings"].values(), text.split("After 5 steps:")[1:], strict=True):
        assert ("jump across" in table.split("\n\n")[1]) != setting["windowed"]
        for row, about in setting["rows"].items():
            (line,) = lines_of(table.split("\n\n")[1], f"| {turbulence_figures.label(row, about)} |")
            cells = line.split(" | ")[1:]
            for cell, metric in zip(cells, turbulence_card.PAPER_METRICS, strict=False):
                score = about["metrics"][metric]
                ends = f"({score['low'][-1]:.3g} to {score['high'][-1]:.3g})"
                assert cell == f"{score['mean'][-1]:.3g} {ends}"
            assert cells[5].startswith(f"{about['metrics']['nrmse']['mean'][0]:.3g} ")
            assert f"{about['decorrelation']['steps']:.3g}" in cells[-1]
        (floor,) = lines_of(table.split("\n\n")[1], "| noise floor |")
        assert f"| {setting['noise_floor']['slope_error'][-1]:.3g} |" in floor


def test_words_follow_the_comparisons(found):
    halo = found["settings"]["halo"]
    words = turbulence_card.in_words(halo)
    assert len(words.splitlines()) == len(NOISE) - 1
    said = set()
    for row, compared in halo["comparisons"]["leviathan_expectation"].items():
        if halo["rows"][row]["kind"] == "reference":
            continue
        (line,) = lines_of(words, f"- against {turbulence_figures.label(row, halo['rows'][row])}: ")
        told, outside = line.partition(": ")[2].removesuffix(".").split(". Outside its interval on ")
        parts = dict(part.split(" on ") for part in told.split("; "))
        for metric, name in turbulence_card.NAMES.items():
            low, high = compared[metric]["low"][-1], compared[metric]["high"][-1]
            word = "better" if high < 0 else "worse" if low > 0 else "like it"
            assert name in re.split(", | and ", parts[word])
            assert (name in re.split(", | and ", outside)) == compared[metric]["outside"][-1]
            said.add(word)
    assert said == {"better", "worse", "like it"}


def test_a_difference_that_may_be_none_is_called_like(found):
    results = json.loads(json.dumps(found["settings"]["halo"]))
    compared = results["comparisons"]["leviathan_expectation"]["fno"]
    for each in compared.values():
        each |= {"low": [-1.0] * NUM_STEPS, "high": [1.0] * NUM_STEPS, "outside": [False] * NUM_STEPS}
    (fno,) = lines_of(turbulence_card.in_words(results), "- against fno:")
    assert fno.startswith("- against fno: like it on enstrophy, spectral energy")
    assert fno.endswith("Outside its interval on nothing.")
    for each in compared.values():
        each |= {"low": None, "high": None, "outside": None}
    (fno,) = lines_of(turbulence_card.in_words(results), "- against fno:")
    assert "one flow, no verdict on enstrophy" in fno


def test_targets_are_told_reached_or_not(found):
    patches = found["settings"]["patches"]
    told = dict(turbulence_card.targets("patches", patches))
    assert len(told) == 5
    assert told["better than the dense Transformer (lookup) on at least three of the four metrics"] is True
    assert not any(reached for text, reached in told.items() if text.startswith("first"))  # diffusion is
    alone = json.loads(json.dumps(patches))
    del alone["rows"]["diffusion"]
    assert sum(bool(reached) for _, reached in turbulence_card.targets("patches", alone)) >= 4
    del alone["rows"]["fno"], alone["rows"]["lookup_expectation"]
    assert {reached for _, reached in turbulence_card.targets("patches", alone)} == {None}
    larger = json.loads(json.dumps(patches))
    larger["arms"]["diffusion"]["num_parameters"] *= 2  # and of no account then
    assert turbulence_card.targets("patches", larger)[1][1] is True
    halo = found["settings"]["halo"]
    (near, jump) = turbulence_card.targets("halo", halo)
    floor, rows = halo["noise_floor"], halo["rows"]["leviathan_expectation"]["metrics"]
    assert near[1] == all(rows[m]["mean"][-1] <= 2 * floor[m][-1] for m in turbulence_card.PAPER_METRICS)
    assert jump[1] == (0.9 <= rows["border_jump"]["mean"][-1] <= 1.1)
    assert f"found {rows['border_jump']['mean'][-1]:.3g} times it" in jump[0]
    assert turbulence_card.targets("whole", halo) == []


def test_command(found, tmp_path, monkeypatch):
    study = tmp_path / "cards" / "turbulence" / "turbulence.json"
    provenance.write_json(study, found)
    provenance.write_json(tmp_path / "other.json", {"x": 1})
    (tmp_path / "remarks.md").write_text("It lost since.\n")
    for module in (turbulence_card.sampling_study, turbulence_card.embeddings_study):
        monkeypatch.setattr(module, "markdown", lambda record, name=module.__name__: f"{name} {record['x']}")
    out = tmp_path / "cards" / "card.md"
    more = [word for flag in ("sampling", "embeddings") for word in (f"--{flag}", str(tmp_path / "other.json"))]
    turbulence_card.main(["--study", str(study), "--out", str(out), *more, "--remarks", str(tmp_path / "remarks.md")])
    text = out.read_text()
    for part in (
        "## Sampling\n\neval.sampling 1\n",
        "## Embeddings\n\neval.embeddings 1\n",
        "tried\n\nIt lost since.\n",
    ):
        assert part in text
    assert "![Fields](turbulence/patches_fields.png)" in text
    turbulence_card.main(["--study", str(study), "--out", str(out)])
    assert out.read_text() == turbulence_card.turbulence_card(found, "turbulence")
    assert "## Sampling" not in out.read_text()
    with pytest.raises(SystemExit, match=r"absent\.json"):
        turbulence_card.main(["--study", str(tmp_path / "absent.json"), "--out", str(out)])
    with pytest.raises(SystemExit, match="a record lacks 'settings'"):
        turbulence_card.main(["--study", str(tmp_path / "other.json"), "--out", str(out)])


def test_looks_tell_rows_apart():
    arms = [("leviathan", "expectation"), ("leviathan", "top_5"), ("lookup", "expectation"), ("fno", None)]
    rows = {f"{arm}_{way}": {"kind": "model", "arm": arm, "sampling": way} for arm, way in arms}
    rows["persistence"] = {"kind": "reference"}
    looks = turbulence_figures.looks(rows)
    colours = [looks[row]["color"] for row in rows]
    assert colours[0] == colours[1]
    assert len({*colours[1:]}) == 4
    assert looks["leviathan_expectation"]["linestyle"] != looks["leviathan_top_5"]["linestyle"]
    assert [looks[row]["label"] for row in rows] == [
        "leviathan, expectation",
        "leviathan, top 5",
        "lookup, expectation",
        "fno",
        "persistence",
    ]
    assert turbulence_figures.headlines(rows) == ["leviathan_expectation", "lookup_expectation", "fno_None"]


def test_the_best_operator_has_the_least_rank(found):
    assert turbulence_figures.best_operator(found["settings"]["halo"]) == "diffusion"
    assert turbulence_figures.best_operator({"rows": {"persistence": {"kind": "reference"}}}) is None
