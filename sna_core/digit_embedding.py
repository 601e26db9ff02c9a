"""What embeddings generated from digits share: the sum of codebooks, and the order that gives tokens their digits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sna_core.codebooks import check_factors, fit_codebooks, sum_codebooks
from sna_core.digits import digit_layout, to_digits
from sna_core.generated_embedding import MATERIALIZED_AT_ONCE, GeneratedEmbedding, product_dtype


class DigitEmbedding(GeneratedEmbedding):
    r"""A generated embedding that depends on its token through the seed :math:`z = \sum_q C_q[d_q]` alone.

    The digits are those of the id. With ``ordered`` they are those of a position that each token has: the buffer
    ``token_order`` (num_embeddings,) int64, which is part of the state dict and at the start the ids themselves. Tokens
    with a common digit have a row of a codebook in common, so an order that puts related tokens where their digits
    agree lets them learn from one another. Only the digits see it: ids stay what they are for everyone else.

    A subclass makes the parameter ``codebooks`` C (num_digits, base, width), and draws it with ``codebook_std``.

    Raises:
        ValueError: If ``low_digit`` is unknown or the digits cannot number all ids.
    """

    codebooks: nn.Parameter
    codebook_std: float
    token_order: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        base: int | None,
        num_digits: int | None,
        low_digit: Literal["plain", "reflected"],
        ordered: bool,
        device: torch.device | str | None,
    ):
        super().__init__()
        if low_digit not in ("plain", "reflected"):
            raise ValueError(f"low_digit = {low_digit!r}; expected 'plain' or 'reflected'.")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.base, self.num_digits = digit_layout(num_embeddings, base, num_digits)
        self.low_digit = low_digit
        self.register_buffer("token_order", torch.arange(num_embeddings, device=device) if ordered else None)

    def digits(self, ids: Tensor) -> Tensor:
        """Digits of ``ids``, or of their positions in the order: (...) -> (..., num_digits)."""
        positions = ids if self.token_order is None else self.token_order[ids]
        return to_digits(positions, self.base, self.num_digits, reflected=self.low_digit == "reflected")

    def seed(self, ids: Tensor) -> Tensor:
        """The sum of the codebooks' rows: (...) -> (..., width)."""
        return sum_codebooks(self.codebooks, self.digits(ids))

    @torch.no_grad()
    def set_token_order(self, order: Tensor) -> None:
        """Gives every token the position whose digits it is to have: (num_embeddings,) integers.

        Positions may lie anywhere in [0, base ** num_digits); those that no token has stay free.

        Raises:
            ValueError: If the embedding was made without ``ordered``, or ``order`` has another shape, is not of
                integers, leaves that range or gives two tokens one position.
        """
        if self.token_order is None:
            raise ValueError("this embedding takes the digits of the ids themselves; make it with ordered=True.")
        if order.is_floating_point() or order.is_complex() or order.dtype == torch.bool:
            raise ValueError(f"order has dtype {order.dtype}; expected integers.")
        if order.shape != (self.num_embeddings,):
            raise ValueError(
                f"order has shape {tuple(order.shape)}; expected a position for each of num_embeddings = "
                f"{self.num_embeddings} tokens."
            )
        order, size = order.long(), self.base**self.num_digits
        if (outside := (order < 0) | (order >= size)).any():
            token = int(outside.nonzero()[0])
            raise ValueError(
                f"order[{token}] = {int(order[token])} lies outside [0, {size}), which {self.num_digits} digits of "
                f"base {self.base} number; make the order for this base and num_digits."
            )
        positions, tokens = order.sort(stable=True)
        if (same := positions[1:] == positions[:-1]).any():
            first = int(same.nonzero()[0])
            raise ValueError(
                f"order gives the tokens {int(tokens[first])} and {int(tokens[first + 1])} the same position "
                f"{int(positions[first])}; every token needs one of its own."
            )
        self.token_order.copy_(order)

    @torch.no_grad()
    def set_codebooks(self, factors: Tensor, weights: Tensor | None = None, seed: int = 0) -> None:
        r"""Starts the codebooks from what is known of the tokens: factors (num_embeddings, d).

        The seeds become

        .. math::
            z_v = \alpha \sum_q \hat C_q[d_q(v)] \, Q,

        with :math:`\hat C` the least-squares fit of :func:`~sna_core.codebooks.fit_codebooks` to the factors less their
        mean, which tells no tokens apart; Q (d, width) a random map with orthonormal rows (columns where d is larger);
        and :math:`\alpha` such that the seeds' entries keep the standard deviation that they have now. Set the order of
        the tokens first: it decides which digits share a row.

        Args:
            factors: Floating-point factors of the tokens; their scale does not matter.
            weights: How much each token counts in the mean and the fit, (num_embeddings,). None is one for each.
            seed: Of the random map.

        Raises:
            ValueError: If shapes do not match, numbers are not finite, or the fit is the same for all tokens.
        """
        check_factors(factors, self.num_embeddings, weights)
        dtype, ids = product_dtype(self.codebooks.dtype), self._all_ids()
        factors = factors.to(ids.device, dtype)
        weights = factors.new_ones(len(factors)) if weights is None else weights.to(factors)
        fitted = fit_codebooks(self.digits(ids), factors - weights @ factors / weights.sum(), self.base, weights)
        # Drawn on the CPU, where a seed gives the same numbers whatever the device.
        turn = torch.empty(factors.shape[1], self.codebooks.shape[-1], dtype=dtype)
        nn.init.orthogonal_(turn, generator=torch.Generator().manual_seed(seed))
        codebooks = fitted @ turn.to(fitted.device)

        def spread(codebooks: Tensor) -> Tensor:
            chunks = ids.split(MATERIALIZED_AT_ONCE)
            return torch.cat([sum_codebooks(codebooks, self.digits(each)) for each in chunks]).std(correction=0)

        present, found = spread(self.codebooks.to(dtype)), spread(codebooks)
        if found <= 100 * torch.finfo(dtype).eps * factors.abs().max():
            raise ValueError(
                "the digits tell nothing of these factors: their least-squares fit is the same for all tokens. Give "
                "factors that differ between tokens, and an order by which they depend on the digits."
            )
        self.codebooks.copy_(codebooks * (present / found))

    @torch.no_grad()
    def resize(self, num_embeddings: int) -> None:
        """Changes the number of ids in place; the embeddings of the ids that remain do not change.

        Where the digits no longer suffice, a leading digit is added whose zero adds nothing to the seed. In an order
        new ids get the least positions that are free.
        """
        digit_layout(num_embeddings)  # validates
        while self.base**self.num_digits < num_embeddings:
            leading = torch.empty_like(self.codebooks[:1])
            nn.init.normal_(leading, std=self.codebook_std)
            leading[:, 0] = 0
            self.codebooks = nn.Parameter(torch.cat([leading, self.codebooks]), self.codebooks.requires_grad)
            self.num_digits += 1
        if self.token_order is not None:
            kept = self.token_order[:num_embeddings]
            positions = torch.arange(num_embeddings, device=kept.device)  # enough of them are free
            free = positions[~torch.isin(positions, kept)]
            self.token_order = torch.cat([kept, free[: num_embeddings - len(kept)]])
        self.num_embeddings = num_embeddings


__all__ = ["DigitEmbedding"]
