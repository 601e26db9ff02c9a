"""eval.rollout, scoring, figures and card: with rollouts that are given, and by the command line with a tiny model."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import leviathan
from eval import card, figures, metrics, scoring
from eval import rollout as job
from training import provenance
from training.fields import FieldFile, data_record

SEEDS = [0, 1]
NUM_STEPS = 6
ROWS = ["expectation", "sample", "persistence", "climatology", "quantise_only"]
PICTURES = ["fields", "spectra", "pdf", "metrics", "embeddings", "contact_sheet", "curve"]
TRAINING = {
    "steps": 1234,
    "seconds": 60.0,
    "marginal_entropy": 4.5,
    "persistence_nrmse": 0.4,
    "seed": 7,
    "split": {"fractions": [0.5, 0.25, 0.25], "seed": 3},
    "validation": [{"step": 600, "loss": 3.5, "nrmse": 0.6}, {"step": 1234, "loss": 2.75, "nrmse": 0.3}],
    "provenance": {"command": "accelerate launch -m training.train --config tiny.yaml", "commit": "abc"},
}


def flows(seed, num_flows, num_times, num_grid=16):
    """Waves that move: smooth, different from flow to flow, mean zero."""
    rng = np.random.default_rng(seed)
    x = np.arange(num_grid) / num_grid
    t = 0.02 * np.arange(num_times)[:, None, None]
    result = np.zeros((num_flows, num_times, num_grid, num_grid), np.float32)
    for flow in result:
        for kx, ky in [(1, 0), (0, 1), (1, 2), (2, 1), (3, 2), (4, 3), (5, 4)]:
            phase, speed, size = rng.uniform(0, 2 * np.pi), rng.normal(0, 3), rng.normal() / np.hypot(kx, ky)
            flow += size * np.cos(2 * np.pi * (kx * x[:, None] + ky * x + speed * t) + phase)
    return result


TRUTH, OTHERS = flows(0, 3, NUM_STEPS + 1), flows(1, 3, NUM_STEPS)
TOKENIZER = leviathan.FieldTokenizer(patch_size=4, num_bits=8, base=16, low=-4.0, high=4.0)


def perfect(initial, sampling, seed):
    """Knows the future; the random sampling adds noise of its seed."""
    noise = np.random.default_rng(seed).standard_normal(TRUTH[:, 1:].shape) * (sampling == "sample")
    return torch.as_tensor(TRUTH[:, 1:] + 0.1 * noise)


SETTING = scoring.MetricSettings(TOKENIZER.low, TOKENIZER.high, TOKENIZER.patch_size, length=2.0, band=(2, 6))


def evaluated(predictions, truth=TRUTH, others=OTHERS):
    """Rows of these functions of initial states and a seed, those of `sample` with all seeds, and the references."""
    rows = [scoring.Row(name, each, SEEDS if name == "sample" else [0]) for name, each in predictions.items()]
    references = scoring.reference_rows(truth, others, TOKENIZER)
    return scoring.evaluate(truth, [*rows, *references], SETTING, progress=False)


@pytest.fixture(scope="module")
def evaluation():
    return evaluated(
        {name: lambda initial, seed, name=name: perfect(initial, name, seed) for name in ("expectation", "sample")}
    )


@pytest.fixture(scope="module")
def results(evaluation):
    """What the command adds, so that cards and pictures can be made without a model."""
    return evaluation.results | {
        "config": {"model": "runs/m", "data": "a.hdf5", "split": "test", "num_steps": 6, "trajectories": [0, 1, 2]},
        "data": {"grid": [16, 16], "length": 2.0, "dt": 0.02, "synthetic": True, "num_trajectories": 9},
        "model": {"num_parameters": 4321, "vocab_size": 256, "patch_size": 4, "embedding_type": "separable"},
        "provenance": provenance.provenance(SEEDS),
    }


def mean(results, row, metric):
    return np.array(results["rows"][row]["metrics"][metric]["mean"])


def test_every_row_has_every_metric_at_every_step(results):
    assert list(results["rows"]) == ROWS
    for row in ROWS:
        for metric in scoring.METRICS:
            entry = results["rows"][row]["metrics"][metric]
            assert len(entry["mean"]) == len(entry["low"]) == len(entry["high"]) == NUM_STEPS
            assert (entry["seed_spread"] is not None) == (row == "sample" and metric != "crps")
            assert set(results["summary"][row][metric]) == {"1", "5", "6"}
        assert np.shape(results["spectra"]["rows"][row]) == (3, 8)
        assert np.shape(results["pdf"]["rows"][row]) == (3, min(256, TOKENIZER.vocab_size))
    assert results["clipped"]["count"] == ((TRUTH < -4) | (TRUTH > 4)).sum()
    assert set(results["comparisons"]) == {"expectation", "sample"}
    assert results["rows"]["expectation"]["seeds"] == [0]
    assert results["rows"]["sample"]["seeds"] == SEEDS
    assert results["rows"]["sample"]["tokens_per_second"] > 0
    assert set(results["noise_floor"]) == set(scoring.FLOOR_METRICS)
    json.dumps(results, allow_nan=False)


def test_a_perfect_prediction_has_no_error(results):
    for metric, (_, best) in scoring.METRICS.items():
        if metric != "border_jump":
            np.testing.assert_allclose(mean(results, "expectation", metric), best, atol=1e-6)
    np.testing.assert_allclose(mean(results, "expectation", "border_jump"), results["truth"]["border_jump"], rtol=1e-5)


def test_references_equal_what_is_computed_by_hand(results):
    still = np.repeat(TRUTH[:, :1], NUM_STEPS, axis=1).astype(float)
    true = TRUTH[:, 1:].astype(float)
    error = np.sqrt(((still - true) ** 2).mean((2, 3)) / (true**2).mean((2, 3)))
    np.testing.assert_allclose(mean(results, "persistence", "nrmse"), error.mean(0), rtol=1e-5)
    ratio = np.abs(np.log((still**2).mean((2, 3)) / (true**2).mean((2, 3))))
    np.testing.assert_allclose(mean(results, "persistence", "enstrophy_error"), ratio.mean(0), rtol=1e-4)
    shares = [metrics.histogram(fields, -4, 4) for fields in (OTHERS, true)]
    divergence = metrics.jensen_shannon(*shares).mean(0)
    np.testing.assert_allclose(mean(results, "climatology", "jensen_shannon"), divergence, rtol=1e-5)
    np.testing.assert_allclose(mean(results, "persistence", "crps"), np.abs(still - true).mean((0, 2, 3)), rtol=1e-5)
    quantised = mean(results, "quantise_only", "nrmse") * np.sqrt((true**2).mean((2, 3))).mean(0)
    np.testing.assert_allclose(quantised, TOKENIZER.level / np.sqrt(12), rtol=0.2)  # half a level at most
    pairs = [metrics.enstrophy_error(true[i], true[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(results["noise_floor"]["enstrophy_error"], np.mean(pairs, axis=0), rtol=1e-5)


def test_ensemble_and_seed_spread(results):
    members = np.stack([perfect(None, "sample", seed).numpy() for seed in SEEDS], axis=2)  # (B, T, M, X, Y)
    np.testing.assert_allclose(mean(results, "sample", "crps"), metrics.crps(members, TRUTH[:, 1:]).mean(0), rtol=1e-4)
    runs = [metrics.nrmse(members[:, :, m], TRUTH[:, 1:]).mean(0) for m in range(2)]
    spread = results["rows"]["sample"]["metrics"]["nrmse"]["seed_spread"]
    np.testing.assert_allclose(spread, np.std(runs, axis=0, ddof=1), rtol=1e-4)


def test_verdicts_are_paired_and_honest(results):
    for differences, words in [
        ([-1.0, -1.1, -0.9], "better than persistence"),
        ([1.0, 1.1, 0.9], "worse than persistence"),
        ([-1.0, -9.0, -0.1], "like persistence"),  # one sign, and three flows do not tell
    ]:
        compared = scoring._compared(np.array(differences)[:, None])
        made = {"comparisons": {"row": {"persistence": {"nrmse": compared}}}}
        assert card.verdict(made, "row", "persistence", "nrmse", 1) == words
    errors = [np.abs(mean(results, "expectation", "nrmse")), mean(results, "persistence", "nrmse")]
    difference = results["comparisons"]["expectation"]["persistence"]["nrmse"]["mean"]
    np.testing.assert_allclose(difference, errors[0] - errors[1], rtol=1e-4)
    still = evaluated({"greedy": lambda *_: np.repeat(TRUTH[:, :1], NUM_STEPS, 1)})
    assert card.verdict(still.results, "greedy", "persistence", "nrmse", 3) == "like persistence"


def test_one_flow_has_neither_floor_nor_intervals():
    one = evaluated({"greedy": lambda *_: TRUTH[:1, 1:]}, TRUTH[:1], OTHERS[:1])
    assert one.results["noise_floor"] is None
    assert one.results["rows"]["persistence"]["metrics"]["nrmse"]["low"] is None
    json.dumps(one.results, allow_nan=False)


def test_one_step_into_a_constant_state_can_be_drawn(tmp_path, results):
    flat = evaluated({"greedy": lambda *_: np.zeros_like(OTHERS[:, :1])}, TRUTH[:, :2], OTHERS[:, :1])
    drawn = results | flat.results
    np.testing.assert_allclose(mean(drawn, "greedy", "nrmse"), 1)
    assert mean(drawn, "greedy", "energy_error") == pytest.approx(-np.log(metrics.RELATIVE_FLOOR), rel=1e-5)
    vectors = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    figures.draw_all(tmp_path, drawn, flat.examples, figures.principal_components(vectors), {})
    assert not (tmp_path / "curve.png").exists()
    assert "worse than persistence" in card.summary_text(drawn, None)


def test_states_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"greedy has shape .* expected \(seeds, 3, 6, 16, 16\)"):
        evaluated({"greedy": lambda *_: TRUTH})
    with pytest.raises(ValueError, match="expected finite"):
        evaluated({"greedy": lambda *_: np.full_like(OTHERS, np.nan)})
    with pytest.raises(ValueError, match="climatology"):
        evaluated({}, others=OTHERS[:2])


def test_windowed_spectra_are_those_of_the_patches():
    """Patches that do not fit together: the field's own spectrum sees their borders, that of the patches does not."""
    rng = np.random.default_rng(0)
    apart = np.concatenate(
        [np.roll(TRUTH[0, 1:, i : i + 4], rng.integers(16), axis=-1) for i in range(0, 16, 4)], axis=-2
    )
    windowed = dataclasses.replace(SETTING, windowed=True, band=(1, 2))
    spectra = [metrics.patch_spectrum(field, 4, 2.0) for field in (apart, TRUTH[0, 1:])]
    np.testing.assert_array_equal(windowed.spectrum(apart), spectra[0])
    scores = windowed.score(apart, TRUTH[0, 1:])
    np.testing.assert_allclose(scores["mean_log_ratio"], metrics.mean_log_ratio(*spectra))
    np.testing.assert_allclose(scores["energy_error"], metrics.energy_error(*spectra))
    np.testing.assert_allclose(scores["slope_error"], metrics.slope_error(*spectra, (1, 2)))
    plain = SETTING.score(apart, TRUTH[0, 1:])
    same = [
        name for name in scores if name not in ("energy_error", "slope_error", "mean_log_ratio", "weighted_log_ratio")
    ]
    assert all(np.array_equal(scores[name], plain[name]) for name in same)
    assert (plain["mean_log_ratio"] > scores["mean_log_ratio"]).all()


# ----------------------------------------------------------------------------------------------- pictures and words


def is_picture(path):
    data = path.read_bytes()
    width, height = (int.from_bytes(data[i : i + 4]) for i in (16, 20))
    return (
        data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82") and min(width, height) > 300 < len(data) / 30
    )


def test_pictures(tmp_path, results, evaluation):
    vectors = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    figures.draw_all(tmp_path, results, evaluation.examples, figures.principal_components(vectors), TRAINING)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.png" for name in PICTURES)
    assert all(map(is_picture, tmp_path.iterdir()))


def test_principal_components_of_a_plane():
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(300, 2, generator=generator) * torch.tensor([3.0, 1.0])
    found = figures.principal_components(torch.nn.functional.pad(plane, (0, 4)) + 5)
    variance = torch.linalg.eigvalsh(torch.cov(plane.T)).flip(0)
    np.testing.assert_allclose(found.explained, [*(variance / variance.sum()), 0], atol=1e-6)
    np.testing.assert_allclose(found.coordinates.var(0, ddof=1)[:2], variance, rtol=1e-5)
    with pytest.raises(ValueError, match="at least 3"):
        figures.principal_components(torch.ones(5, 2))


def test_the_card_is_a_function_of_the_records(results):
    record = json.loads(json.dumps(results))
    text = card.model_card(record, TRAINING)
    assert text == card.model_card(results, TRAINING)
    assert text.startswith("---\nlibrary_name: transformers\nlicense: apache-2.0\ntags:\n")
    for number in ("4,321", "1,234", "2.750", "4.500", "[0.5, 0.25, 0.25]", TRAINING["provenance"]["command"]):
        assert number in text
    last = [line for line in text.splitlines() if line.startswith("| ")][-len(ROWS) - 1 : -1]
    for row, line in zip(ROWS, last, strict=True):
        name, *cells = re.split(r"(?<!\\) \| ", line.strip("| "))
        assert name == row.replace("_", " ")
        for metric, cell in zip(card.CARD_METRICS, cells, strict=True):
            assert cell.split(" ")[0] == f"{mean(results, row, metric)[-1]:.3g}", (row, metric)
    tables = [line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("| expectation")]
    assert tables == [len(card.CARD_METRICS) + 2] * 3


def test_the_card_shows_what_was_measured_of_heads_and_speed(results):
    run = {"steps": 400, "seed": 0}
    scored = {"mean": 8.1234, "standard_deviation": 0.0567}
    arm = {"num_parameters": 1234567, "best": "2e-3", "runs": [run] * 3, "loss": scored, "nrmse": scored}
    heads = {
        "arms": {"digits": arm},
        "flags": ["--tokenizer.num_bits", "12", "--tokenizer.base", "64"],
        "references": {"marginal_entropy": 9.25, "persistence_nrmse": 0.33},
        "provenance": {"command": "python -m eval.study --seeds 0", "commit": "abc"},
    }
    figure = {"what": "forward", "seconds": {"slow": {"median": 2.0}, "fast": {"median": 0.5}}, "ratio": 4.0}
    figure |= {"ratio_of": ["slow", "fast"], "ratio_quartiles": [3.5, 4.5], "reached": False}
    figure |= {"target": {"text": "5 times", "at_least": 5}}
    speed = {
        "device": "cpu",
        "dtype": "float32",
        "sections": {"embedding": {"figures": [figure]}, "rollout": {"not_run": "no such device"}},
        "provenance": {"command": "python -m eval.speed", "commit": "abc", "hardware": {"threads": 2}},
    }
    text = card.model_card(results, TRAINING, speed, heads)
    assert "| digits | 1,234,567 | 2e-3 | 8.123 ± 0.057 | 8.123 ± 0.057 |" in text
    assert "4,096 levels" in text
    assert "| embedding: forward | slow 2, fast 0.5 s | 4 (3.5 to 4.5) | at least 5: not reached |" in text
    assert "- rollout: no such device" in text
    assert text.replace("## Heads", "").count("## ") == card.model_card(results, TRAINING, speed).count("## ")


def test_what_is_missing_is_said_to_be_missing(results):
    text = card.model_card(results, None)
    assert f"| steps | {card.MISSING} |" in text
    assert "1,234" not in text
    assert card.summary_text(results, None).count(card.MISSING) == 6


def test_card_command(tmp_path, results):
    provenance.write_json(tmp_path / "results.json", results)
    out = tmp_path / "cards" / "card.md"
    card.main(["--results", str(tmp_path / "results.json"), "--out", str(out)])
    assert out.read_text() == card.model_card(json.loads((tmp_path / "results.json").read_text()), None)
    with pytest.raises(SystemExit, match=r"absent\.json"):
        card.main(["--results", str(tmp_path / "absent.json"), "--out", str(out)])
    provenance.write_json(tmp_path / "empty.json", {})
    with pytest.raises(SystemExit, match="no entry 'config'"):
        card.main(["--results", str(tmp_path / "empty.json"), "--out", str(out)])


def test_summary_in_words(results):
    text = card.summary_text(results, TRAINING)
    assert "Leviathan of 4,321 parameters" in text
    assert "minutes 1.0" in text
    assert re.search(r"nrmse, step 1 .* (better than|like) persistence", text)
    assert re.search(r"jensen shannon, step 6 ", text)


def test_provenance_tells_no_path_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = ["/opt/x.py", "--out", str(tmp_path / "a b"), f"--data={tmp_path}/d.hdf5", "--top-k", "5"]
    monkeypatch.setattr("sys.argv", arguments)
    record = provenance.provenance(seed=3)
    assert "--out 'a b' --data=d.hdf5 --top-k 5" in record["command"]
    assert str(tmp_path) not in json.dumps(record)
    assert record["seed"] == 3
    assert {"python", "torch", "numpy"} <= set(record["versions"])
    with pytest.raises(ValueError, match="JSON"):
        provenance.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.glob("x.json*"))


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A tiny random model with its tokenizer, and a file of eight flows in PDEBench's layout."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    config = leviathan.LeviathanConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        embedding_base=4,
        embedding_seed_dim=4,
        embedding_num_heads=1,
        embedding_num_knots=4,
        embedding_rank=2,
    )
    tokenizer = leviathan.FieldTokenizer(patch_size=4, num_bits=4, base=4, low=-20.0, high=20.0)
    leviathan.LeviathanForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    provenance.write_json(folder / "model" / "training.json", TRAINING)
    num_flows, num_times, num_grid = 8, 5, 16
    with h5py.File(folder / "flows.hdf5", "w") as file:
        for seed, key in enumerate(("Vx", "Vy", "density", "pressure")):
            file[key] = flows(seed, num_flows, num_times, num_grid)
        file["t-coordinate"] = np.arange(num_times + 1, dtype=np.float32) * 0.02
        for key in ("x-coordinate", "y-coordinate"):
            file[key] = ((np.arange(num_grid) + 0.5) / num_grid).astype(np.float32)
        file.attrs.update(eta=1e-8, zeta=1e-8, M=0.1, dt_save=0.02, synthetic=True)
    return folder


def arguments(folder, *more):
    paths = ["--model", folder / "model", "--data", folder / "flows.hdf5", "--out", folder / "out"]
    return [*map(str, paths), "--num-steps", "3", "--seeds", "0", "1", "--device", "cpu", *more]


def test_command(run_folder, capsys):
    job.main(arguments(run_folder, "--samplings", "expectation,greedy", "top_k", "--top-k", "3"))
    out = run_folder / "out"
    results = json.loads((out / "results.json").read_text())
    assert list(results["rows"]) == ["expectation", "greedy", "top_k", "persistence", "climatology", "quantise_only"]
    assert results["config"]["trajectories"] == job.split_trajectories(8, (0.5, 0.25, 0.25), 3).test.tolist()
    assert results["config"]["top_k"] == 3
    expected = {"grid": [16, 16], "length": 1, "dt": 0.02, "synthetic": True, "num_trajectories": 8}
    assert results["data"] == results["data"] | expected
    assert results["data"]["attributes"]["dt_save"] == 0.02
    assert results["data"]["pixels_per_step"] > 0
    assert results["model"]["vocab_size"] == 16
    assert len(results["model"]["embedding_explained"]) == 3
    assert all(is_picture(out / f"{name}.png") for name in PICTURES)
    assert not list(out.glob("*.partial"))
    printed = capsys.readouterr().out
    assert "contact_sheet.png" in printed
    assert "expectation is" in printed
    assert "4.500" in card.model_card(results, TRAINING)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-steps", "5"], "has 4 states after the first"),
        (["--num-trajectories", "3"], "the test split has 2"),
        (["--seeds", "1", "1"], "different"),
        (["--model", "nowhere"], "nowhere holds no model"),
        (["--data", "nowhere.hdf5"], "nowhere.hdf5"),
        (["--band", "5", "99"], "band"),
    ],
)
def test_command_refuses(run_folder, more, message):
    with pytest.raises(SystemExit, match=message):
        job.main(arguments(run_folder, *more))


def test_command_refuses_unknown_samplings(run_folder, capsys):
    with pytest.raises(SystemExit):
        job.main(arguments(run_folder, "--samplings", "beam"))
    assert "expected different ones of expectation, greedy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_bits": 5}, "the model has 16 ids and its tokenizer 32"), ({"patch_size": 3}, "multiple of the patch's 3")],
)
def test_command_refuses_a_tokenizer_that_does_not_fit(run_folder, tmp_path, change, message):
    from shutil import copytree

    copytree(run_folder / "model", tmp_path / "model")
    options = {"patch_size": 4, "num_bits": 4, "base": 4, "low": -20.0, "high": 20.0}
    leviathan.FieldTokenizer(**options | change).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match=message):
        job.main(arguments(run_folder, "--model", str(tmp_path / "model")))


def test_another_file_than_the_trainings_is_refused(run_folder, tmp_path):
    """Its test flows may be among those that were trained on."""
    with FieldFile(run_folder / "flows.hdf5") as fields:
        record = data_record(fields)
    shutil.copytree(run_folder / "model", tmp_path / "model")
    command = ["--model", str(tmp_path / "model"), "--data", str(run_folder / "flows.hdf5"), "--out", str(tmp_path)]
    provenance.write_json(tmp_path / "model" / "training.json", TRAINING | {"data_record": record})
    job.load(job.parse([*command, "--num-steps", "2"]))
    provenance.write_json(
        tmp_path / "model" / "training.json", TRAINING | {"data_record": record | {"num_trajectories": 99}}
    )
    with pytest.raises(ValueError, match="num_trajectories 8, not 99"):
        job.load(job.parse([*command, "--num-steps", "2"]))
    job.load(job.parse([*command, "--num-steps", "2", "--other-data"]))


def test_strangers_are_training_flows_the_same_each_time():
    train = np.arange(10, 15)
    few, many = job.strangers(train, 3), job.strangers(train, 12)
    assert set(few) < set(train)
    assert len(set(few)) == 3
    assert few.tolist() == many[:3].tolist()
    assert many[5:10].tolist() == many[:5].tolist()  # repeated


def test_a_flow_of_one_speed_moves_by_as_many_pixels(tmp_path):
    with h5py.File(tmp_path / "flow.hdf5", "w") as file:
        for key, speed in (("Vx", 3.0), ("Vy", 4.0)):
            file[key] = np.full((2, 5, 8, 8), speed, np.float32)
        file["t-coordinate"] = np.arange(6) * 0.1
        for key in ("x-coordinate", "y-coordinate"):
            file[key] = (np.arange(8) + 0.5) / 8
    with FieldFile(tmp_path / "flow.hdf5") as fields:
        assert job.pixels_per_step(fields, np.array([0, 1]), range(0, 5, 2)) == pytest.approx(5 * 0.2 * 8)


def test_few_flows_give_no_verdict_by_chance():
    """Three flows without a difference: a bootstrap would call a quarter of them different."""
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(400):
        interval = metrics.student_interval(generator.normal(size=(3, 1)))
        wrong += bool(interval.low > 0 or interval.high < 0)
    assert wrong / 400 < 0.09


def test_the_committed_card_is_what_its_records_generate():
    cards = Path(__file__).resolve().parent.parent / "model_cards"
    names = ("results.json", "training.json", "speed.json", "heads.json")
    records = [json.loads((cards / "leviathan" / name).read_text()) for name in names]
    assert (cards / "leviathan.md").read_text(encoding="utf-8") == card.model_card(*records)
