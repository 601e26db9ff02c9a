"""eval.sampling: its measures against plain ones, and by the command line with tiny models."""

import json

import h5py
import numpy as np
import pytest
import torch

import leviathan
from eval import sampling as job
from leviathan.decoding_leviathan import Decoder, Sampler
from tests.test_eval_rollout import flows
from training.provenance import write_json

PATCH, GRID, STEPS = 4, 16, 4
LOW, HIGH = -20.0, 20.0


def tiny(num_bits=4, margin=0):
    torch.manual_seed(0)
    tokenizer = leviathan.FieldTokenizer(PATCH, num_bits, base=4, low=LOW, high=HIGH, margin=margin)
    config = leviathan.LeviathanConfig(
        vocab_size=2**num_bits,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.tokens_per_prefix + tokenizer.tokens_per_patch,
        embedding_type="lookup",
        initializer_range=1.0,
    )
    return leviathan.LeviathanForCausalLM(config).eval(), tokenizer


def states(num_rows, tokenizer, seed=0):
    shape = (num_rows, tokenizer.tokens_per_patch)
    return torch.randint(tokenizer.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def kept(logits, options):
    """Shares of one token by the definitions of the samplings, in numpy."""
    shares = np.exp((logits - logits.max()) / options.get("temperature", 1.0))
    shares /= shares.sum()
    order = np.argsort(-shares)
    if options["sampling"] == "top_k":
        shares[order[options["top_k"] :]] = 0
    if options["sampling"] == "top_p":
        before = np.cumsum(shares[order]) - shares[order]
        shares[order[before >= options["top_p"]]] = 0
    return shares / shares.sum()


def test_widths_equal_those_of_the_distributions_by_hand(monkeypatch):
    model, tokenizer = tiny()
    prefix, target = states(3, tokenizer), states(3, tokenizer, seed=1)
    monkeypatch.setattr(job, "LARGEST_SCORES", 7 * tokenizer.vocab_size)  # several parts, the last one smaller
    found = job.widths(model, tokenizer, prefix, target)
    assert list(found) == list(job.SAMPLINGS)
    length = tokenizer.tokens_per_patch
    with torch.no_grad():
        logits = model(torch.cat([prefix, target], -1), prefix_length=length).logits[:, length - 1 : -1]
    logits, levels = logits.flatten(0, 1).double().numpy(), np.arange(tokenizer.vocab_size)
    for name, options in job.SAMPLINGS.items():
        if options["sampling"] in ("expectation", "greedy"):
            assert found[name] == {"entropy": 0, "kept_levels": 1, "deviation_levels": 0, "deviation": 0}
            continue
        shares = np.stack([kept(each, options) for each in logits])
        deviation = np.sqrt((shares * levels**2).sum(-1) - (shares @ levels) ** 2).mean()
        entropy = -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(-1).mean()
        expected = {
            "entropy": entropy,
            "kept_levels": (shares > 0).sum(-1).mean(),
            "deviation_levels": deviation,
            "deviation": deviation * (HIGH - LOW) / tokenizer.vocab_size,
        }
        assert found[name] == pytest.approx(expected, rel=1e-4)


def test_shown_steps():
    assert job.shown_steps(10) == [1, 5, 10]
    assert job.shown_steps(12) == [1, 5, 10, 12]
    assert job.shown_steps(1) == [1]


def test_an_ensemble_is_measured_at_every_step():
    rng = np.random.default_rng(0)
    future, ensemble = rng.standard_normal((2, 3, 8, 8)), rng.standard_normal((2, 4, 3, 8, 8))
    future[:, 2], ensemble[:, :, 2] = 0, 0
    found = job.ensemble_record(ensemble, np.zeros_like(future), future)
    np.testing.assert_allclose(found["expectation_crps"], np.abs(future).mean((0, 2, 3)), rtol=1e-5)
    variance = ensemble.var(axis=1, ddof=1).mean((0, 2, 3))  # over flows and space at once
    np.testing.assert_allclose(found["spread"], np.sqrt(5 / 4 * variance), rtol=1e-5)
    np.testing.assert_allclose(found["skill"], np.sqrt(((ensemble.mean(1) - future) ** 2).mean((0, 2, 3))), rtol=1e-5)
    below = (ensemble < future[:, None]).sum(1)
    ranks = [[(below[:, t] == rank).mean() for rank in range(5)] for t in range(2)]
    np.testing.assert_allclose(found["rank_histogram"][:2], ranks, rtol=1e-5)
    np.testing.assert_allclose(found["rank_histogram"][2], 0.2)
    assert found["num_members"] == 4
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_timed_decoding_is_decoding(batch_size):
    model, tokenizer = tiny()
    prefix = states(5, tokenizer)
    uniform = torch.rand(prefix.shape, dtype=torch.float64)
    sampler = Sampler(model.output_head(), tokenizer.vocab_size, "sample")
    expected = Decoder(model, sampler, PATCH**2).without_cache(prefix, uniform)
    for block in (1, 4):
        found = job.timed(Decoder(model, sampler, PATCH**2, block), prefix, uniform, batch_size)
        assert torch.equal(found.target, expected)
        assert len(found.passes) == len(found.row_passes) == len(found.seconds) == -(-5 // batch_size)
        for passes, of_a_row in zip(found.passes, found.row_passes, strict=True):
            assert 1 <= of_a_row <= passes <= PATCH**2 - 1
            assert batch_size > 1 or of_a_row == passes


@pytest.mark.parametrize(("num_bits", "margin", "tolerances"), [(4, 0, [0, 1]), (4, 2, [0, 1]), (12, 0, [0, 1, 4])])
def test_decoding_by_blocks_against_token_by_token(num_bits, margin, tolerances):
    model, tokenizer = tiny(num_bits, margin)
    field = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) * (HIGH - LOW) + LOW
    prefix = tokenizer.prefix(tokenizer(field)["input_ids"], (8, 8))
    found = job.jacobi(model, tokenizer, prefix, progress=False)
    assert found["num_patches"] == 4
    assert found["sequential_passes"] == PATCH**2 - 1
    settings = [(row["sampling"], row["block_size"], row["tolerance"]) for row in found["rows"]]
    assert settings == [(s, b, t) for s in ("expectation", "sample") for b in (4, 16) for t in tolerances]
    for row in found["rows"]:
        for kind in ("alone", "batch"):
            about = row[kind]
            assert 1 <= about["passes"]["median"] <= about["passes"]["worst"] <= PATCH**2 - 1
            assert about["fewer_passes"] == pytest.approx((PATCH**2 - 1) / about["passes"]["median"])
            assert about["speed_up"] > 0
            if row["tolerance"] == 0:
                assert (about["equal"], about["rms_difference"], about["largest_difference"]) == (1, 0, 0)
    json.dumps(found, allow_nan=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of eight flows in PDEBench's layout."""
    path = tmp_path_factory.mktemp("data") / "flows.hdf5"
    with h5py.File(path, "w") as file:
        for seed, key in enumerate(("Vx", "Vy", "density", "pressure")):
            file[key] = flows(seed, 8, STEPS + 1, GRID)
        file["t-coordinate"] = np.arange(STEPS + 2, dtype=np.float32) * 0.02
        for key in ("x-coordinate", "y-coordinate"):
            file[key] = ((np.arange(GRID) + 0.5) / GRID).astype(np.float32)
        file.attrs.update(M=0.1, dt_save=0.02, synthetic=True)
    return path


def arguments(folder, data, margin=0, **options):
    for part in tiny(margin=margin):
        part.save_pretrained(folder / "model")
    write_json(folder / "model" / "training.json", {"split": {"fractions": [0.5, 0.25, 0.25], "seed": 0}})
    given = {"crop": 8, "num-steps": 3, "num-members": 3, "num-patches": 3, "device": "cpu"} | options
    paths = {"model": folder / "model", "data": data, "out": folder / "out"}
    return [str(word) for key, value in (paths | given).items() for word in (f"--{key}", value)]


@pytest.mark.parametrize(("margin", "crop"), [(0, 8), (2, GRID)])
def test_command(tmp_path, data, capsys, margin, crop):
    job.main(arguments(tmp_path, data, margin, crop=crop))
    out = tmp_path / "out"
    record = json.loads((out / "sampling.json").read_text())
    assert {path.name for path in out.iterdir()} == {"sampling.json", "widths.png", "ensemble.png", "jacobi.png"}
    assert record["windowed"] == (margin == 0)  # isolated patches are not periodic
    assert record["config"]["trajectories"] == job.load(job.parse(arguments(tmp_path, data)))["trajectories"].tolist()
    assert list(record["samplings"]) == list(job.SAMPLINGS)
    for about in record["samplings"].values():
        assert set(about["metrics"]) == set(job.SHOWN_METRICS)
        assert all(set(scores) == {"1", "3"} for scores in about["metrics"].values())
    assert np.shape(record["ensemble"]["rank_histogram"]) == (3, 4)
    text = job.markdown(record)
    assert text in capsys.readouterr().out
    assert all(f"| {name} |" in text for name in job.SAMPLINGS)
    lines = [line.replace(r"\|", "") for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines[:11]}) == 1  # cells fit the head


@pytest.mark.parametrize(
    ("margin", "options", "message"),
    [
        (0, {"crop": 6}, "--crop 6: expected a multiple of the patch's 4, up to the grid's 16"),
        (0, {"crop": 20}, "--crop 20: expected"),
        (2, {"crop": 8}, r"reads 2 pixels around a patch.*--crop 16"),
        (0, {"num-steps": 9}, "--num-steps 9"),
        (0, {"num-trajectories": 3}, "--num-trajectories 3"),
    ],
)
def test_bad_input_is_refused(tmp_path, data, margin, options, message):
    with pytest.raises(SystemExit, match=message):
        job.main(arguments(tmp_path, data, margin, **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["num-members", "num-patches"])
def test_too_few(tmp_path, data, capsys, option):
    with pytest.raises(SystemExit):
        job.parse(arguments(tmp_path, data, **{option: 0}))
    assert f"--{option} 0: expected at least" in capsys.readouterr().err
