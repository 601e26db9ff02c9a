"""Finds the size at which one model has as many parameters as another, so that what is compared costs the same.

    python -m training.sizes --config training/configs/text_tiny_cpu.yaml --vary intermediate_size \
        --model.embedding_type lookup --model.tie_word_embeddings true

The model of the config is the one to match; the flags change it, and one size of the changed model is then chosen.
Prints both counts.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from leviathan import LeviathanConfig, LeviathanForCausalLM
from training.settings import read_settings
from training.train import allowed_keys, build_arguments, build_task

STEPS = {"num_hidden_layers": 1, "intermediate_size": 8}  # multiples that hardware likes
Size = Literal["num_hidden_layers", "intermediate_size"]


def model_options(config: Path, flags: Sequence[str]) -> dict[str, Any]:
    """The LeviathanConfig options that a training config and flags over it give."""
    settings = read_settings(config, flags, allowed_keys())
    settings["training"].pop("resume_from_checkpoint", None)
    given = {name: value for name, value in settings["model"].items() if name != "attn_implementation"}
    return build_task(settings, build_arguments(settings)).model_options(given)


def count_parameters(options: dict[str, Any]) -> int:
    """Parameters of the model of these LeviathanConfig options; shared ones count once. Allocates nothing."""
    with torch.device("meta"):
        model = LeviathanForCausalLM(LeviathanConfig(**options))
    return sum(p.numel() for p in model.parameters())


def match_parameters(target: int, options: dict[str, Any], vary: Size = "intermediate_size") -> dict[str, Any]:
    """The options with that ``vary`` whose number of parameters comes nearest to ``target``.

    The count is linear in either size, so that two counts decide.

    Raises:
        ValueError: If an unknown size is to vary, or the target is below what the model has at its least size.
    """
    if vary not in STEPS:
        raise ValueError(f"vary = {vary!r}; expected one of {', '.join(STEPS)}.")
    step = STEPS[vary]
    least, next_ = (count_parameters(options | {vary: size}) for size in (step, 2 * step))
    size = round((target - least) / (next_ - least)) + 1
    if size < 1:
        raise ValueError(
            f"with {vary} = {step} the model has {least:,} parameters already, more than the {target:,} to match; "
            "make it smaller in another size first."
        )
    return options | {vary: size * step}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="training config of the model to match")
    parser.add_argument("--vary", choices=tuple(STEPS), default="intermediate_size", help="the size to choose")
    known, flags = parser.parse_known_args(arguments)
    try:
        options = [model_options(known.config, chosen) for chosen in ([], flags)]
        target = count_parameters(options[0])
        matched = match_parameters(target, options[1], known.vary)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    count = count_parameters(matched)
    print(f"to match: {target:,} parameters")
    print(f"matched:  {count:,} parameters ({count / target - 1:+.2%}) with --model.{known.vary} {matched[known.vary]}")
    return matched


if __name__ == "__main__":
    main()
