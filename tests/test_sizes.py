"""Models of equal cost: the size that is chosen is the one whose count comes nearest."""

from pathlib import Path

import pytest

from leviathan import LeviathanConfig, LeviathanForCausalLM
from training import sizes

CONFIGS = Path(__file__).resolve().parent.parent / "training" / "configs"
OPTIONS = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "embedding_seed_dim": 8,
    "embedding_num_heads": 2,
    "embedding_rank": 4,
}


@pytest.mark.parametrize("embedding", ["separable", "lookup", "low_rank"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_count_is_that_of_the_model(embedding, tied):
    options = OPTIONS | {"embedding_type": embedding, "tie_word_embeddings": tied}
    model = LeviathanForCausalLM(LeviathanConfig(**options))
    assert sizes.count_parameters(options) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("vary", "step"), [("num_hidden_layers", 1), ("intermediate_size", 8)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", [150_000, 35_000, None])
def test_no_other_size_comes_nearer(vary, step, tied, target):
    """None is the count at the least size, of which there is none below."""
    options = OPTIONS | {"embedding_type": "lookup", "tie_word_embeddings": tied}
    target = target or sizes.count_parameters(options | {vary: step})
    found = sizes.match_parameters(target, options, [vary])
    gap = abs(sizes.count_parameters(found) - target)
    for other in {max(step, found[vary] - step), found[vary] + step}:
        assert gap <= abs(sizes.count_parameters(found | {vary: other}) - target)
    assert found | {vary: OPTIONS[vary]} == options


def test_no_other_width_comes_nearer():
    """A body is narrower in all, its heads have dimensions in pairs and its MLP the proportion that it had."""
    options = OPTIONS | {"embedding_type": "lookup", "vocab_size": 2_000}
    counts = {}
    for width in range(8, 129, 8):
        counts[width] = sizes.count_parameters(
            options | {"hidden_size": width, "intermediate_size": 8 * round(1.5 * width / 8)}
        )
    for target in (40_000, 100_000, 300_000, counts[8], counts[64]):
        found = sizes.match_parameters(target, options, ["hidden_size"])
        nearest = min(counts, key=lambda width: abs(counts[width] - target))
        assert found["hidden_size"] == nearest
        assert sizes.count_parameters(found) == counts[nearest]
        assert sizes.flags_of(found, options)[::2] == ["--model.hidden_size", "--model.intermediate_size"]


def test_sizes_are_tried_in_turn():
    """Two large tables leave no room for a body: it has to be narrower."""
    options = OPTIONS | {"embedding_type": "lookup", "vocab_size": 2_000}
    target = sizes.count_parameters(OPTIONS | {"vocab_size": 2_000})
    with pytest.raises(ValueError, match="least intermediate_size the model has"):
        sizes.match_parameters(target, options)
    both = sizes.match_parameters(target, options, ["intermediate_size", "hidden_size"])
    assert both == sizes.match_parameters(target, options, ["hidden_size"])
    assert both["hidden_size"] < options["hidden_size"]
    larger = sizes.match_parameters(300_000, options, ["intermediate_size", "hidden_size"])
    assert sizes.flags_of(larger, options)[::2] == ["--model.intermediate_size"]


def test_what_cannot_be_matched_is_refused():
    with pytest.raises(ValueError, match="more than the 1,000 to match"):
        sizes.match_parameters(1_000, OPTIONS, ["intermediate_size", "hidden_size"])
    with pytest.raises(ValueError, match="expected one of num_hidden_layers"):
        sizes.match_parameters(1_000_000, OPTIONS, ["vocab_size"])


@pytest.mark.parametrize(("name", "millions"), [("60m", 60.7), ("109m", 108.4), ("420m", 421.1), ("1b", 1016.9)])
def test_the_command_and_the_sizes_of_the_configs(name, millions, capsys, tmp_path):
    flags = ["--training.bf16", "false", "--training.output_dir", str(tmp_path)]
    flags += ["--model.embedding_type", "lookup", "--model.tie_word_embeddings", "true"]
    found = sizes.main(["--config", str(CONFIGS / f"pile_{name}.yaml"), "--vary", "num_hidden_layers", *flags])
    out = capsys.readouterr().out
    assert f"to match: {millions:,.1f}"[:11] in out
    target = sizes.count_parameters(sizes.model_options(CONFIGS / f"pile_{name}.yaml", flags[:4]))
    assert round(target / 1e6, 1) == millions
    assert f"{sizes.count_parameters(found):,} parameters" in out
