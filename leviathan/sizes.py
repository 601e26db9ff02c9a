"""How large what a configuration asks for may be: a file of a few bytes must not fill the memory, nor take for ever."""

import math
from collections.abc import Iterable

from transformers.configuration_utils import PreTrainedConfig

LARGEST = 2**31 - 1  # size along one axis
LARGEST_INTEGER = 2**63  # beyond which it may be no floating-point number
MOST_MODULES = 1024  # that are made one after another, such as layers
MOST_WEIGHTS = 2**48  # in one tensor, of which no machine holds a hundredth


def check_sizes(config: PreTrainedConfig, *names: str, most: int = LARGEST) -> None:
    """Raises a ``ValueError`` for the first of the named settings that is, or has, an integer beyond ±``most``.

    What is no integer is left to the type check of the configuration.
    """
    for name in names:
        value = getattr(config, name)
        for size in value if isinstance(value, list) else [value]:
            if isinstance(size, int) and abs(size) > most:
                raise ValueError(f"{name} = {value!s:.80}; expected {most} at most.")


def check_extra(config: PreTrainedConfig, given: Iterable[str]) -> None:
    """Raises a ``ValueError`` for a setting that a configuration does not take but computes from others."""
    for name in given:
        computed = getattr(type(config), name, None)
        if isinstance(computed, property) and computed.fset is None:
            raise ValueError(f"{name} is computed from other settings of {type(config).__name__}; leave it out.")


def check_weights(**sizes: int) -> None:
    """Raises a ``ValueError`` if a tensor of these sizes has more than ``MOST_WEIGHTS`` entries."""
    if math.prod(sizes.values()) > MOST_WEIGHTS:
        asked = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        raise ValueError(f"{asked}: a tensor of so many weights fits no machine; lower one.")


__all__ = ["LARGEST", "LARGEST_INTEGER", "MOST_MODULES", "check_extra", "check_sizes", "check_weights"]
