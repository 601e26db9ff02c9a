"""Finds the size at which one model has as many parameters as another, so that what is compared costs the same.

    python -m training.sizes --config training/configs/text_tiny_cpu.yaml --vary intermediate_size \
        --model.embedding_type lookup --model.tie_word_embeddings true

The model of the config is the one to match; the flags change it, and one size of the changed model is then chosen.
Several sizes after --vary are tried in turn, until one can be made small enough. Prints both counts.
"""

import argparse
import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from leviathan import LeviathanConfig, LeviathanForCausalLM
from training.settings import read_settings
from training.train import allowed_keys, build_arguments, build_task

MLP_STEP = 8  # a multiple that hardware likes
Size = Literal["num_hidden_layers", "intermediate_size", "hidden_size"]
VARY: tuple[Size, ...] = ("intermediate_size",)  # unless something else is said


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


def resized(options: dict[str, Any], vary: Size, place: int) -> dict[str, Any]:
    """The options with the ``place``-th least value of a size, counted from 1.

    A hidden size gives every head an even number of dimensions, and takes the width of the MLP with it in proportion.

    Raises:
        ValueError: If there is no such size.
    """
    if vary == "num_hidden_layers":
        return options | {vary: place}
    if vary == "intermediate_size":
        return options | {vary: MLP_STEP * place}
    if vary != "hidden_size":
        raise ValueError(f"vary = {vary!r}; expected one of {', '.join(get_args(Size))}.")
    config = LeviathanConfig(**options)
    size = 2 * config.num_attention_heads * place
    steps = round(config.intermediate_size / config.hidden_size * size / MLP_STEP)
    return options | {vary: size, "intermediate_size": MLP_STEP * max(1, steps)}


def match_parameters(target: int, options: dict[str, Any], vary: Sequence[Size] = VARY) -> dict[str, Any]:
    """The options with that size whose number of parameters comes nearest to ``target``.

    The size is the first of ``vary`` that has a value with no more parameters than the target. The count rises with
    each, so that halving intervals finds the value.

    Raises:
        ValueError: If an unknown size is to vary, or the target is below what the model has at the least of all.
    """
    for size in vary:
        if (least := count_parameters(resized(options, size, 1))) <= target:
            break
    else:
        raise ValueError(
            f"with the least {' or '.join(vary)} the model has {least:,} parameters already, more than the {target:,} "
            "to match; make it smaller in another size first."
        )

    def count(place: int) -> int:
        return count_parameters(resized(options, size, place))

    high = 2
    while count(high) < target:
        high *= 2
    above = bisect.bisect_left(range(high), target, lo=high // 2, key=count)
    place = min((max(1, above - 1), above), key=lambda place: abs(count(place) - target))
    return resized(options, size, place)


def flags_of(matched: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """The flags of a training that change its options into those that were found."""
    changed = {name: size for name, size in matched.items() if options.get(name) != size}
    return [word for name, size in changed.items() for word in (f"--model.{name}", str(size))]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="training config of the model to match")
    parser.add_argument("--vary", choices=get_args(Size), nargs="+", default=VARY, help="the size to choose")
    known, flags = parser.parse_known_args(arguments)
    try:
        options = [model_options(known.config, chosen) for chosen in ([], flags)]
        target = count_parameters(options[0])
        matched = match_parameters(target, options[1], known.vary)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    count = count_parameters(matched)
    print(f"to match: {target:,} parameters")
    print(f"matched:  {count:,} parameters ({count / target - 1:+.2%}) {' '.join(flags_of(matched, options[1]))}")
    return matched


if __name__ == "__main__":
    main()
