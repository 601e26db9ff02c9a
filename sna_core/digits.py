"""Digits of an id in a base, most significant first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_DEFAULT_BASE = 256
MOST_DIGITS = 63  # of an int64


def digit_layout(num_embeddings: int, base: int | None = None, num_digits: int | None = None) -> tuple[int, int]:
    """Completes ``(base, num_digits)`` so that ``base ** num_digits >= num_embeddings``.

    Given neither, takes the fewest digits whose base is at most 256, which gives the published layouts: base 256 with
    two digits for 65,536 ids and base 59 with three for 200,376.

    Raises:
        ValueError: If the digits asked for cannot tell ``num_embeddings`` ids apart.
    """
    if num_embeddings < 1:
        raise ValueError(f"num_embeddings = {num_embeddings}; expected at least 1.")
    if base is not None and base < 2:
        raise ValueError(f"base = {base}; digits need a base of at least 2.")
    if num_digits is not None and not 1 <= num_digits <= MOST_DIGITS:
        raise ValueError(f"num_digits = {num_digits}; expected at least 1 and at most {MOST_DIGITS}.")
    if base is None:
        if num_digits is None:
            num_digits = 1
            while LARGEST_DEFAULT_BASE**num_digits < num_embeddings:
                num_digits += 1
        base = max(2, round(num_embeddings ** (1 / num_digits)))
        while base**num_digits < num_embeddings:  # the floating-point root may be one off either way
            base += 1
        while base > 2 and (base - 1) ** num_digits >= num_embeddings:
            base -= 1
    elif num_digits is None:
        num_digits = 1
        while base**num_digits < num_embeddings:
            num_digits += 1
    if base**num_digits < num_embeddings:
        raise ValueError(
            f"{num_digits} digits of base {base} number {base**num_digits} ids, fewer than num_embeddings = "
            f"{num_embeddings}; raise base or num_digits, or leave one of them None."
        )
    return base, num_digits


def to_digits(ids: Tensor, base: int, num_digits: int, reflected: bool = False) -> Tensor:
    """Digits of ``ids`` in ``base``, most significant first: (...) -> (..., num_digits).

    With ``reflected``, a digit runs backwards when the number formed by the digits above it is odd (for an even base:
    when the digit above it is odd). Consecutive ids then differ in one digit, and there by one: reflected Gray code.
    """
    powers = base ** torch.arange(num_digits - 1, -1, -1, device=ids.device)
    quotients = ids.unsqueeze(-1) // powers  # the number formed by each digit and those above it
    digits = quotients % base
    if reflected:
        above = F.pad(quotients[..., :-1], (1, 0))
        digits = torch.where(above % 2 == 1, base - 1 - digits, digits)
    return digits


__all__ = ["MOST_DIGITS", "digit_layout", "to_digits"]
