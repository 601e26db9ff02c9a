"""eval.embeddings: its measures on vectors whose answers are known, and by the command line with tiny models."""

import json

import numpy as np
import pytest
import torch

import leviathan
from eval import embeddings as job

BASE, IDS = 8, 64
PICTURES = {"components.png", "steps.png", "similarity.png"}


def circle(num_ids, carry_jump=0.0, base=BASE):
    """Ids evenly along an eighth of a circle, further out by `carry_jump` behind each carry."""
    ids = torch.arange(num_ids)
    angle = torch.pi / 4 * ids / num_ids
    out = torch.div(ids, base, rounding_mode="floor") * carry_jump
    return torch.stack([angle.cos(), angle.sin(), out, torch.zeros(num_ids)], -1)


def test_steps_and_cosines_of_a_circle():
    vectors = circle(IDS)
    chord = 2 * np.sin(np.pi / 8 / IDS)
    np.testing.assert_allclose(job.steps(5 * vectors), np.full(IDS - 1, chord), rtol=1e-4)  # whatever its size
    distances = job.distances_of(IDS, BASE)
    assert distances[0] == 1
    assert distances[-1] == IDS // 2
    assert BASE in distances
    expected = np.cos(np.pi / 4 / IDS * np.array(distances))
    np.testing.assert_allclose(job.similarities(vectors, distances), expected, rtol=1e-6)


def test_similarity_is_the_mean_over_pairs_so_far_apart():
    vectors = torch.randn(20, 5)
    unit = (vectors / vectors.norm(dim=-1, keepdim=True)).double().numpy()
    for distance in (1, 7, 10):
        pairs = [unit[v] @ unit[v + distance] for v in range(20 - distance)]
        assert job.similarities(vectors, [distance])[0] == pytest.approx(np.mean(pairs), rel=1e-5)


@pytest.mark.parametrize(("num_ids", "base"), [(64, 8), (60, 8), (16, 2), (5, 4)])
def test_carries_are_where_a_higher_digit_changes(num_ids, base):
    expected = [(v + 1) // base != v // base for v in range(num_ids - 1)]
    assert job.carries(num_ids, base).tolist() == expected


def test_a_jump_at_carries_is_found():
    smooth, jumping = (job.embedding_record(circle(IDS, jump), BASE) for jump in (0.0, 0.5))
    assert smooth["steps"]["ratio"] == pytest.approx(1, rel=1e-4)
    assert sum(smooth["explained"]) == pytest.approx(1)
    chord = 2 * np.sin(np.pi / 8 / IDS)
    assert jumping["steps"]["ratio"] == pytest.approx(np.hypot(chord, 0.5) / chord, rel=1e-4)
    assert jumping["steps"]["carry"]["quantile_95"] == pytest.approx(jumping["steps"]["carry"]["median"], rel=1e-4)
    json.dumps(jumping, allow_nan=False)


def test_equal_embeddings_give_finite_numbers():
    json.dumps(job.embedding_record(torch.ones(IDS, 4), BASE), allow_nan=False)


@pytest.mark.parametrize("base", [IDS, 1])
def test_ids_without_carries_are_refused(base):
    with pytest.raises(ValueError, match=f"64 ids in base {base} have no carry"):
        job.embedding_record(circle(IDS), base)


def save_model(folder, num_bits=6, **options):
    config = leviathan.LeviathanConfig(
        vocab_size=2**num_bits,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        embedding_seed_dim=4,
        embedding_num_heads=1,
        embedding_num_knots=4,
        embedding_rank=2,
        **options,
    )
    model = leviathan.LeviathanForCausalLM(config)
    model.save_pretrained(folder)
    leviathan.FieldTokenizer(patch_size=4, num_bits=num_bits, base=BASE, low=-1.0, high=1.0).save_pretrained(folder)
    return model.get_input_embeddings().weight.detach()


KINDS = {
    "separable": {"embedding_base": BASE},
    "reflected": {"embedding_base": BASE, "embedding_low_digit": "reflected"},
    "lookup": {"embedding_type": "lookup"},
}


@pytest.mark.parametrize("names", [["lookup"], list(KINDS)])
def test_command(tmp_path, capsys, names):
    weights = {name: save_model(tmp_path / name, **KINDS[name]) for name in names}
    given = [f"{name}={tmp_path / name}" for name in names]
    job.main(["--models", *given, "--out", str(tmp_path / "out"), "--seed", "3"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == PICTURES | {"embeddings.json"}
    record = json.loads((tmp_path / "out" / "embeddings.json").read_text())
    assert (record["num_ids"], record["base"]) == (IDS, BASE)
    assert list(record["models"]) == names
    for name, weight in weights.items():
        assert record["models"][name]["trained"] == job.embedding_record(weight, BASE)
        untrained = job.vectors_of(tmp_path / name, "untrained", seed=3)
        assert record["models"][name]["untrained"] == job.embedding_record(untrained, BASE)
        assert not torch.equal(weight, untrained)
    assert torch.equal(untrained, job.vectors_of(tmp_path / name, "untrained", seed=3))
    text = job.markdown(record)
    assert text in capsys.readouterr().out
    assert all(f"| {name}, untrained |" in text for name in names)


def test_models_that_cannot_be_compared(tmp_path):
    save_model(tmp_path / "six", **KINDS["lookup"])
    save_model(tmp_path / "seven", num_bits=7, **KINDS["lookup"])
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="expected the same for all"):
        job.main(["--models", f"a={tmp_path / 'six'}", f"b={tmp_path / 'seven'}", *out])
    with pytest.raises(SystemExit, match=r"b: .* holds no model"):
        job.main(["--models", f"a={tmp_path / 'six'}", f"b={tmp_path / 'none'}", *out])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("models", [["lookup"], ["a=x", "a=y"], ["=x"], ["a="], [f"{i}=x" for i in range(9)]])
def test_bad_names(capsys, models):
    with pytest.raises(SystemExit):
        job.parse(["--models", *models, "--out", "o"])
    assert "--models" in capsys.readouterr().err
