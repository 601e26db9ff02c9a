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


@pytest.mark.parametrize(("vary", "step"), sizes.STEPS.items())
@pytest.mark.parametrize("tied", [True, False])
def test_no_other_size_comes_nearer(vary, step, tied):
    target = 150_000
    found = sizes.match_parameters(target, OPTIONS | {"embedding_type": "lookup", "tie_word_embeddings": tied}, vary)
    gap = abs(sizes.count_parameters(found) - target)
    for other in (found[vary] - step, found[vary] + step):
        assert gap <= abs(sizes.count_parameters(found | {vary: other}) - target)
    assert found | {vary: OPTIONS[vary]} == OPTIONS | {"embedding_type": "lookup", "tie_word_embeddings": tied}


def test_what_cannot_be_matched_is_refused():
    with pytest.raises(ValueError, match="more than the 1,000 to match"):
        sizes.match_parameters(1_000, OPTIONS)
    with pytest.raises(ValueError, match="expected one of num_hidden_layers"):
        sizes.match_parameters(1_000_000, OPTIONS, "vocab_size")


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
