"""eval.language: against loops and closed forms, and by the command line with a tiny model."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eval import language, metrics
from eval.figures import principal_components
from eval.likelihood import token_losses
from leviathan import LeviathanConfig, LeviathanForCausalLM

VOCAB, CONTEXT = 310, 16
WORDS = ["the", "flow", "turns", "and", "falls", "apart", "into", "eddies", "of", "every", "size", "naïve", "δt"]


def documents(seed, count):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(3, 40))) for _ in range(count)]


def byte_level_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<|end|>"], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(documents(0, 100), trainers.BpeTrainer(vocab_size=VOCAB - 1, **options))
    tokenizer.add_tokens([AddedToken("μμ  ", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


TOKENIZER = byte_level_tokenizer()


def tiny_model(vocab_size=VOCAB, **options):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"embedding_seed_dim": 4, "embedding_num_heads": 2, "embedding_rank": 2}
    sizes["initializer_range"] = 0.3  # attention that counts beside embeddings of size one
    return LeviathanForCausalLM(
        LeviathanConfig(vocab_size=vocab_size, max_position_embeddings=2 * CONTEXT, **sizes | options)
    ).eval()


# -------------------------------------------------------------------------------------------------------------- bytes


@given(st.text())
def test_bytes_of_tokens_are_those_of_the_text(text):
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert language.token_bytes(TOKENIZER)[ids].sum() == len(text.encode())


def test_a_special_token_stands_for_no_bytes_and_an_added_one_for_its_own():
    sizes = language.token_bytes(TOKENIZER)
    assert sizes.shape == (VOCAB,)
    assert sizes.dtype == np.int64
    assert sizes[TOKENIZER.eos_token_id] == 0
    assert sizes[TOKENIZER.convert_tokens_to_ids("μμ  ")] == 6
    assert (sizes == 0).sum() == 1


@pytest.mark.parametrize(("decoder", "expected"), [(None, "the δt of the"), (decoders.Metaspace(), " the δt of the")])
def test_other_tokenizers_are_decoded(decoder, expected):
    """Words joined by spaces, or spaces that belong to the words and that the decoder drops before the first."""
    mark = "" if decoder is None else "▁"
    tokenizer = Tokenizer(models.WordLevel({mark + word: i for i, word in enumerate(["the", "δt", "of", "?"])}, "?"))
    if decoder is not None:
        tokenizer.decoder = decoder
    sizes = language.token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert sizes[[0, 1, 2, 0]].sum() == len(expected.encode()) + (decoder is None)  # a space too many at an end


def test_bits_per_byte_of_a_uniform_model():
    """Over bytes it needs 8 bits for each; over tokens of two bytes half of log2 V."""
    assert language.bits_per_byte(100 * math.log(256), 100) == pytest.approx(8)
    assert language.bits_per_byte(100 * math.log(1024), 200) == pytest.approx(5)
    assert language.perplexity(math.log(256)) == pytest.approx(256)
    with pytest.raises(ValueError, match="num_bytes = 0"):
        language.bits_per_byte(1.0, 0)


# -------------------------------------------------------------------------------------------------------------- bands


def random_losses(seed=0, num_sequences=7, length=40, vocab_size=50):
    generator = np.random.default_rng(seed)
    losses = generator.gamma(2.0, size=(num_sequences, length))
    targets = generator.integers(0, vocab_size, (num_sequences, length))
    counts = np.floor(10 ** generator.uniform(-0.5, 5, vocab_size)).astype(np.int64)
    return losses, targets, counts


def test_bands_equal_a_loop():
    losses, targets, counts = random_losses()
    bands = language.by_frequency(losses, targets, counts)
    limits = [(0, 0), (1, 9), (10, 99), (100, 999), (1000, 9999), (10000, None)]
    assert [(band.low, band.high) for band in bands] == limits
    for band in bands:
        inside = [
            losses[i, j]
            for i in range(len(losses))
            for j in range(losses.shape[1])
            if band.low <= counts[targets[i, j]] <= (band.high if band.high is not None else math.inf)
        ]
        assert band.num_targets == len(inside) > 0
        assert band.loss == pytest.approx(np.mean(inside))
        assert band.perplexity == pytest.approx(np.exp(np.mean(inside)))
        assert band.loss_low < band.loss < band.loss_high
    assert sum(band.num_targets for band in bands) == targets.size


def test_one_band_of_all_is_the_mean_over_sequences():
    losses, targets, counts = random_losses()
    (band,) = language.by_frequency(losses, targets, counts, edges=[0])
    interval = metrics.bootstrap(losses.mean(1))
    assert (band.loss, band.loss_low, band.loss_high) == pytest.approx((interval.mean, interval.low, interval.high))


def test_a_band_without_targets_says_so_and_a_single_sequence_has_no_interval():
    zero, rest = language.by_frequency(np.ones((1, 3)), np.zeros((1, 3), int), np.array([5]), edges=[0, 1])
    assert zero == language.Band(0, 0, 0, None, None, None, None)
    assert rest == language.Band(1, None, 3, 1.0, None, None, pytest.approx(math.e))


def test_the_interval_of_a_ratio_is_that_of_resampled_ratios():
    generator = np.random.default_rng(0)
    b = generator.integers(1, 9, 60).astype(float)
    a = b * generator.normal(3, 0.4, 60)
    found = language.ratio_of_sums(a, b)
    draws = generator.integers(0, 60, (4000, 60))
    low, high = np.quantile(a[draws].sum(1) / b[draws].sum(1), [0.025, 0.975])
    assert found.mean == pytest.approx(a.sum() / b.sum())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03 * (high - low) + 0.005)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": np.ones(10, int)}, "counts are of 10 ids"),
        ({"counts": np.ones((50, 1), int)}, "expected"),
        ({"targets": np.zeros((7, 39), int)}, r"targets \(7, 39\)"),
        ({"targets": np.full((7, 40), -1)}, "hold the id -1"),
        ({"edges": [1, 10]}, "rise from 0"),
        ({"edges": [0, 10, 10]}, "rise from 0"),
        ({"edges": []}, "rise from 0"),
        ({"losses": np.full((7, 40), np.nan)}, "finite"),
    ],
)
def test_bad_bands_are_refused(change, message):
    losses, targets, counts = random_losses()
    with pytest.raises(ValueError, match=message):
        language.by_frequency(**{"losses": losses, "targets": targets, "counts": counts} | change)


# ------------------------------------------------------------------------------------------------------------- curves


def curve(*points):
    return [{"step": step, "loss": loss} for step, loss in points]


def test_steps_to_reach():
    falling = curve((100, 5.0), (200, 4.0), (400, 3.0))
    assert language.steps_to_reach(falling, 6.0) == 100
    assert language.steps_to_reach(falling, 5.0) == 100
    assert language.steps_to_reach(falling, 4.25) == pytest.approx(175)
    assert language.steps_to_reach(falling, 3.25) == pytest.approx(350)
    assert language.steps_to_reach(falling, 3.0) == 400
    assert language.steps_to_reach(falling, 2.9) is None
    assert language.steps_to_reach([], 2.9) is None


def test_the_first_crossing_counts():
    assert language.steps_to_reach(curve((0, 5.0), (10, 3.0), (20, 4.5), (30, 3.0)), 4.0) == 5


@pytest.mark.parametrize("points", [[(2, 1.0), (1, 0.5)], [(1, 1.0), (1, 0.5)], [(1, math.nan)]])
def test_what_is_no_curve_is_refused(points):
    with pytest.raises(ValueError, match="rising steps and finite losses"):
        language.steps_to_reach(curve(*points), 0.7)


# --------------------------------------------------------------------------------------------------------- embeddings


def test_explained_variance_is_that_of_principal_components():
    table = torch.randn(200, 6) @ torch.diag(torch.tensor([5.0, 3, 2, 1, 0.5, 0.1])) + 7
    np.testing.assert_allclose(language.explained_variance(table), principal_components(table).explained, rtol=1e-9)
    whole = language.explained_variance(table, None)
    assert whole.shape == (6,)
    assert whole.sum() == pytest.approx(1)


def test_weights_are_repetitions():
    table, counts = torch.randn(50, 4), np.random.default_rng(0).integers(0, 5, 50)
    repeated = table.repeat_interleave(torch.as_tensor(counts), 0)
    np.testing.assert_allclose(
        language.explained_variance(table, 4, counts), language.explained_variance(repeated, 4), rtol=1e-9
    )


def test_a_table_larger_than_a_chunk(monkeypatch):
    table, weights = torch.randn(50, 4), np.arange(50)
    expected = language.explained_variance(table, 4, weights)
    monkeypatch.setattr(language, "ROWS_AT_ONCE", 7)
    np.testing.assert_allclose(language.explained_variance(table, 4, weights), expected, rtol=1e-12)


def test_equal_rows_explain_nothing():
    assert (language.explained_variance(torch.ones(5, 3)) == 0).all()


@pytest.mark.parametrize("weights", [np.zeros(5), -np.ones(5), np.ones(4), np.full(5, np.nan)])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weights have shape"):
        language.explained_variance(torch.randn(5, 3), 3, weights)


def test_more_components_than_columns_are_refused():
    with pytest.raises(ValueError, match="no 4 components"):
        language.explained_variance(torch.randn(5, 3), 4)


def test_planted_neighbours_are_found():
    """Groups of four rows in a few directions, of any length, all moved by a common part that hides them."""
    directions = torch.linalg.qr(torch.randn(8, 8)).Q
    directions = torch.cat([directions, -directions])  # so that their mean is zero
    table = directions.repeat_interleave(4, 0) * torch.linspace(1, 4, 4).repeat(16)[:, None]
    found = language.nearest_neighbours(table + 100 * torch.randn(8), [0, 5, 63], count=3)
    for i, near, cosines in zip([0, 5, 63], found.ids, found.cosines, strict=True):
        assert set(near) == {4 * (i // 4) + j for j in range(4)} - {i}
        assert cosines == pytest.approx(np.ones(3), abs=1e-3)


def test_neighbours_equal_a_loop():
    table = torch.randn(20, 5)
    rows = (table - table.mean(0)).numpy()
    found = language.nearest_neighbours(table, [3, 3, 7], 19)
    for i, near, cosines in zip([3, 3, 7], found.ids, found.cosines, strict=True):
        expected = {j: rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j]) for j in range(20)}
        assert list(near) == sorted(set(expected) - {i}, key=lambda j: -expected[j])
        assert cosines == pytest.approx([expected[j] for j in near], abs=1e-5)


@pytest.mark.parametrize(("ids", "count"), [([5], 1), ([-1], 1), ([0], 5), ([0], 0)])
def test_rows_that_are_not_there_are_refused(ids, count):
    with pytest.raises(ValueError, match="expected rows of the 5"):
        language.nearest_neighbours(torch.randn(5, 3), ids, count)


def test_words_of_all_frequencies():
    counts = np.array([0, 1000, 10, 100, 0, 1])
    assert language.spread_over_ranks(counts, 20) == [1, 3, 2, 5]
    assert language.spread_over_ranks(counts, 2) == [1, 5]
    assert language.spread_over_ranks(np.zeros(3), 2) == []
    assert len(language.spread_over_ranks(np.arange(1000), 20)) <= 20


# ------------------------------------------------------------------------------------------------------------ command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with the record that training leaves, and text."""
    root = tmp_path_factory.mktemp("language")
    torch.manual_seed(0)
    model = tiny_model(embedding_ordered=True)
    model.get_input_embeddings().set_token_order(torch.randperm(VOCAB))
    model.save_pretrained(root / "model")
    TOKENIZER.save_pretrained(root / "model")
    for seed, split in enumerate(("train", "validation", "test")):
        lines = [json.dumps({"text": text}) for text in documents(seed, 20)]
        (root / f"{split}.jsonl").write_text("\n".join(lines))
    ids = TOKENIZER(documents(0, 20))["input_ids"]
    save_file(
        {"counts": torch.tensor([i for row in ids for i in row]).bincount(minlength=VOCAB)},
        root / "model" / "token_counts.safetensors",
    )
    splits = {split: str(root / f"{split}.jsonl") for split in ("train", "validation", "test")}
    training = {
        "data": {"kind": "text", "context_length": CONTEXT, "num_validation_sequences": 12, **splits},
        "validation": [{"step": 5, "loss": 5.5}, {"step": 10, "loss": 5.0}],
        "marginal_entropy": 4.0,
    }
    (root / "model" / "training.json").write_text(json.dumps(training))
    return root


def command(folder, out, *more):
    return ["--model", str(folder / "model"), "--out", str(out), *map(str, more)]


def test_the_command(folder, tmp_path, capsys):
    language.main(command(folder, tmp_path))
    found = json.loads((tmp_path / "language.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {
        "language.json",
        *(f"{name}.png" for name in ("bands", "spectrum", "grid", "curve")),
    }
    text = [[TOKENIZER.eos_token_id, *TOKENIZER(text)["input_ids"]] for text in documents(2, 20)]
    ids = torch.tensor([i for row in text for i in row])
    num = len(ids) // CONTEXT  # all that there is, though training validates on twelve
    assert num > 12
    ids = ids[: num * CONTEXT].view(num, CONTEXT)
    model = LeviathanForCausalLM.from_pretrained(folder / "model").eval()
    losses = token_losses(model, ids).double()
    targets = ids[:, 1:]
    num_bytes = language.token_bytes(TOKENIZER)[targets].sum()
    assert found["data"] == {
        "num_sequences": num,
        "context_length": CONTEXT,
        "num_targets": num * (CONTEXT - 1),
        "num_bytes": num_bytes,
    }
    assert found["loss"]["mean"] == pytest.approx(losses.mean().item())
    assert found["loss"]["low"] < found["loss"]["mean"] < found["loss"]["high"]
    assert found["perplexity"]["mean"] == pytest.approx(losses.mean().exp().item())
    assert found["bits_per_byte"]["mean"] == pytest.approx(losses.sum().item() / math.log(2) / num_bytes)
    separators = targets == TOKENIZER.eos_token_id
    assert found["separators"]["num_targets"] == separators.sum() > 0
    assert found["separators"]["bits_per_byte"] == pytest.approx(
        losses[separators].sum().item() / math.log(2) / num_bytes
    )
    assert sum(band["num_targets"] for band in found["bands"]) == targets.numel()
    assert found["rare"]["num_targets"] == sum(band["num_targets"] for band in found["bands"][:3])
    for shares in (found["embedding"]["explained"], found["embedding"]["explained_by_count"]):
        assert len(shares) == 16
        assert sum(shares) == pytest.approx(1, abs=1e-4)
    neighbours = found["embedding"]["neighbours"]
    assert [word["count"] for word in neighbours] == sorted((word["count"] for word in neighbours), reverse=True)
    assert len(neighbours[0]["neighbours"]) == language.NUM_NEIGHBOURS
    assert found["model"]["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert found["model"]["embedding_type"] == "separable"
    assert found["model"]["embedding_ordered"] is True
    assert found["config"]["data"] == "test.jsonl"
    assert "seen 10–99" in capsys.readouterr().out


def test_options_take_the_place_of_the_record(folder, tmp_path):
    counts = torch.ones(VOCAB, dtype=torch.int64)
    save_file({"counts": counts}, tmp_path / "counts.safetensors")
    more = ["--data", folder / "valid*.jsonl", "--context-length", 2 * CONTEXT, "--num-sequences", 3]
    more += ["--counts", tmp_path / "counts.safetensors", "--words", "the", "flow"]
    found = language.run(language.parse(command(folder, tmp_path / "out", *more)))
    assert (found["data"]["num_sequences"], found["data"]["context_length"]) == (3, 2 * CONTEXT)
    assert [band["num_targets"] for band in found["bands"]] == [0, 3 * (2 * CONTEXT - 1), 0, 0, 0, 0]
    assert [word["token"] for word in found["embedding"]["neighbours"]] == [" the", " flow"]


def test_a_model_that_training_left_no_record_of(folder, tmp_path):
    """Another embedding, tokens with more ids in the model, no counts: nothing by frequency, all positions."""
    model = tiny_model(VOCAB + 20, embedding_type="lookup", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    arguments = command(tmp_path, tmp_path / "out", "--data", folder / "test.jsonl", "--num-sequences", 1)
    found = language.run(language.parse(arguments))
    assert found["data"]["context_length"] == 2 * CONTEXT
    assert found["bands"] is found["rare"] is found["embedding"]["explained_by_count"] is found["loss"]["low"] is None
    assert found["model"]["embedding_parameters"] == (VOCAB + 20) * 16
    assert max(near["id"] for word in found["embedding"]["neighbours"] for near in word["neighbours"]) < VOCAB
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["language.json", "spectrum.png"]


def test_documents_that_do_not_see_one_another(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    record = json.loads((folder / "model" / "training.json").read_text())
    record["data"]["separate_documents"] = True
    (tmp_path / "model" / "training.json").write_text(json.dumps(record))
    model, tokenizer, sequences, counts, training = language.opened(language.parse(command(tmp_path, tmp_path)))
    assert training == record
    ids = torch.stack([item["input_ids"] for item in sequences])
    positions = torch.stack([item["position_ids"] for item in sequences])
    found = language.evaluate(model, tokenizer, sequences, counts)
    separate, together = (token_losses(model, ids, 8, each).double().mean().item() for each in (positions, None))
    assert found["loss"]["mean"] == pytest.approx(separate)
    assert found["loss"]["mean"] != pytest.approx(together, rel=1e-6)


def test_paths_are_those_of_the_run(folder, tmp_path):
    """training.json has names alone of files outside of the folder where it ran; run.json, beside it, the paths."""
    shutil.copytree(folder / "model", tmp_path / "model")
    record = json.loads((folder / "model" / "training.json").read_text())
    given = {split: record["data"][split] for split in ("train", "validation", "test")}
    record["data"] |= {split: f"{split}.jsonl" for split in given}
    (tmp_path / "model" / "training.json").write_text(json.dumps(record))
    arguments = command(tmp_path, tmp_path / "out", "--num-sequences", 2)
    with pytest.raises(SystemExit, match=r"(?s)test\.jsonl.*training.json has but names .* no run.json .* give --data"):
        language.main(arguments)
    (tmp_path / "model" / "run.json").write_text(json.dumps({"settings": {"data": given}}))
    *_, sequences, _, _ = language.opened(language.parse(arguments))
    assert len(sequences) == 2
    assert len(sequences[0]["input_ids"]) == CONTEXT  # which training.json alone says
    (tmp_path / "model" / "run.json").write_text(json.dumps({"settings": {"data": given | {"test": "nowhere.jsonl"}}}))
    with pytest.raises(SystemExit, match=r"nowhere\.jsonl(?!.*has but names)"):
        language.main(arguments)


def file_of(**tensors):
    def write(path):
        save_file(tensors, path)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (file_of(counts=torch.ones(VOCAB - 1, dtype=torch.int64)), r"\(309,\) torch.int64; expected .* 310 ids"),
        (file_of(counts=torch.ones(VOCAB)), "torch.float32; expected an integer"),
        (file_of(other=torch.ones(VOCAB)), "nothing of that name"),
        (lambda path: path.write_text("no"), "no safetensors file"),
        (lambda path: None, "counts.safetensors"),
    ],
)
def test_counts_that_do_not_fit_are_refused(folder, tmp_path, write, message):
    write(tmp_path / "counts.safetensors")
    with pytest.raises(SystemExit, match=message):
        language.main(command(folder, tmp_path / "out", "--counts", tmp_path / "counts.safetensors"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--context-length", 2 * CONTEXT + 1], "33 tokens are longer than the model's 32 positions"),
        (["--context-length", 1], "context_length = 1"),
        (["--num-sequences", 0], "num_validation_sequences = 0"),
        (["--data", "nowhere/*.jsonl"], "no files"),
        (["--words", "the", "turnstile"], "'turnstile' is"),
        (["--batch-size", 0], "batch_size = 0"),
    ],
)
def test_bad_options_are_refused(folder, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        language.main(command(folder, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_text_without_words_is_refused(folder, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": "  "}\n')
    with pytest.raises(SystemExit, match="shorter than one sequence"):
        language.main(command(folder, tmp_path / "out", "--data", tmp_path / "empty.jsonl"))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(folder, tmp_path):
    tiny_model(VOCAB - 10).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="tokenizer has 310 ids and the model 300"):
        language.main(command(tmp_path, tmp_path / "out", "--data", folder / "test.jsonl"))


def test_a_model_without_text_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="give --data"):
        language.main(command(tmp_path, tmp_path / "out"))
    with pytest.raises(SystemExit, match="holds no model"):
        language.main(command(tmp_path / "model", tmp_path / "out"))
