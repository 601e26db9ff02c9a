"""A language-model output head that predicts an id digit by digit, separable in the hidden state and the digits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sna_core.digits import digit_layout, to_digits
from sna_core.generated_embedding import product_dtype, without_autocast


class DigitHead(nn.Module):
    r"""Distribution over ids, factorised over the digits of the id, with a CP form for each later digit.

    An id of digits :math:`d_1 .. d_k` in base b, most significant first, has the probability

    .. math::
        p(id \mid h) = \prod_{q=1}^{k} p(d_q \mid d_1 .. d_{q-1}, h)

    given a hidden state h. Each factor is a softmax over b logits,

    .. math::
        \ell_1 = W_1 h + \beta_1, \qquad
        \ell_q = W_q \Big[ (A_q h + a_q) \odot \prod_{p<q} V_{qp}[d_p] \Big] + \beta_q, \quad q \ge 2,

    so :math:`\ell_q[d_q]` is a canonical polyadic form of rank R in h and the digits up to :math:`d_q`. A digit that no
    id continues has the logit minus infinity: the probabilities of the ids alone sum to one, whether or not
    ``num_embeddings`` is a power of the base.

    A token costs b D + (k - 1) R (D + b) multiplications in training, against V D in a dense head.

    Parameters: b D + b + (k - 1) (R D + R + b R + b) + k (k - 1) / 2 b R, named

    - ``first_weight`` :math:`W_1` (b, D) and ``first_bias`` :math:`\beta_1` (b,);
    - ``hidden_weight`` A (k - 1, R, D) and ``hidden_bias`` a (k - 1, R);
    - ``digit_factors`` V (k (k - 1) / 2, b, R) in the order :math:`V_{21}, V_{31}, V_{32}, V_{41} ..`, near one;
    - ``out_weight`` W (k - 1, b, R) and ``out_bias`` :math:`\beta` (k - 1, b).

    With one digit the head is a dense softmax head, and all but the first two are None.

    Everything is computed in float32, in float64 for float64 parameters, whatever autocast and the dtypes of the
    parameters and the hidden states are.

    Source: a softmax factorised over a code of the word is hierarchical softmax (Morin and Bengio 2005); the CP form
    of the factors is this project's own.

    Args:
        hidden_size: Size of a hidden state, D.
        num_embeddings: Number of ids, V.
        base: Base b of the digits; see :func:`sna_core.digits.digit_layout` for what None means.
        num_digits: Number of digits, k.
        rank: Number of components of each later digit, R.
        device: Of the parameters.
        dtype: Of the parameters.

    Shapes: hidden (..., hidden_size) -> log-probabilities (..., num_embeddings).

    Raises:
        ValueError: If a size is below one or the digits cannot number all ids.
    """

    first_weight: nn.Parameter
    first_bias: nn.Parameter
    hidden_weight: nn.Parameter  # this one and those below: not with one digit
    hidden_bias: nn.Parameter
    digit_factors: nn.Parameter
    out_weight: nn.Parameter
    out_bias: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        num_embeddings: int,
        base: int | None = None,
        num_digits: int | None = None,
        rank: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.hidden_size, self.num_embeddings, self.rank = hidden_size, num_embeddings, rank
        self.base, self.num_digits = digit_layout(num_embeddings, base, num_digits)
        for name in ("hidden_size", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; expected at least 1.")
        base, later = self.base, self.num_digits - 1
        shapes = {
            "first_weight": (base, hidden_size),
            "first_bias": (base,),
            "hidden_weight": (later, rank, hidden_size),
            "hidden_bias": (later, rank),
            "digit_factors": (later * self.num_digits // 2, base, rank),
            "out_weight": (later, base, rank),
            "out_bias": (later, base),
        }
        for name, shape in shapes.items():  # no empty parameters: optimizers and sharding stumble over them
            parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if shape[0] else None
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draws initial values that give every digit the logits of a dense head of standard deviation ``std``.

        The digits' factors start near one, lest a product of many vanish, and the biases at zero.
        """
        nn.init.normal_(self.first_weight, std=std)
        nn.init.zeros_(self.first_bias)
        if self.num_digits > 1:
            nn.init.normal_(self.hidden_weight, std=std)
            nn.init.zeros_(self.hidden_bias)
            nn.init.normal_(self.digit_factors, mean=1.0, std=0.1)
            nn.init.normal_(self.out_weight, std=self.rank**-0.5)  # a sum of rank terms keeps the spread of one
            nn.init.zeros_(self.out_bias)

    def forward(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        """Log-probabilities of all ids, a dense head's ``log_softmax``: (..., D) -> (..., num_embeddings).

        With ``ids`` it is :meth:`log_prob` of them, for wrappers that see to parameters and hooks around ``forward``.

        Raises:
            ValueError: If ``hidden`` has another width than ``hidden_size``.
        """
        if ids is not None:
            return self.log_prob(hidden, ids)
        self._check_hidden(hidden)
        with without_autocast(hidden.device):
            return self._log_prefixes(hidden, self.num_digits)

    def log_prob(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Log-likelihood of ``ids`` in nats: (..., D), (...) -> (...).

        Visits the digits of the one id a token has, so that nothing of size tokens x num_embeddings is made.

        Raises:
            ValueError: If the shapes do not match or ``ids`` are not integers.
            IndexError: If an id lies outside ``[0, num_embeddings)``; not checked in a compiled graph.
        """
        self._check_hidden(hidden)
        self._check_ids(ids, hidden.shape[:-1])
        ids = ids.long()
        total = hidden.new_zeros(ids.shape, dtype=self._dtype)
        with without_autocast(hidden.device):
            for position in range(self.num_digits):
                leading = ids // self.base ** (self.num_digits - 1 - position)
                log_p = self._logits(position, hidden, leading // self.base).log_softmax(-1)
                total = total + log_p.gather(-1, (leading % self.base).unsqueeze(-1)).squeeze(-1)
        return total

    def expectation(self, hidden: Tensor) -> Tensor:
        r"""Expected id :math:`\sum_v p(v \mid h)\, v`: (..., D) -> (...) in float64 (float32 on mps).

        Sums :math:`p(c) (b c + E[d_k \mid c])` over the numbers c that the digits above the last can form.

        Raises:
            ValueError: If ``hidden`` has another width than ``hidden_size``.
        """
        self._check_hidden(hidden)
        wide, last = _widest_dtype(hidden.device), self.num_digits - 1
        with without_autocast(hidden.device):
            p = self._log_prefixes(hidden, last).exp()  # (..., prefixes)
            prefix = torch.arange(p.shape[-1], device=hidden.device)
            digit_p = self._logits(last, hidden.unsqueeze(-2), prefix).softmax(-1)  # (..., prefixes, base)
            digit = torch.arange(self.base, device=hidden.device)
            # The products of float32 are exact enough; it is the sums that lose digits.
            mean = (digit_p * digit).sum(-1, dtype=wide) + prefix * self.base
            return (p * mean).sum(-1)

    @torch.no_grad()
    def quantile(self, hidden: Tensor, probability: Tensor) -> Tensor:
        """The least id whose cumulated probability exceeds ``probability``: (..., D), (...) -> (...) int64.

        Goes digit by digit: takes the digit whose interval of cumulated probability holds ``probability``, then that
        interval for the whole. With uniform random numbers this is exact sampling from one number a token, at the cost
        of ``log_prob``. Draw them in float64: those of float32 are multiples of 2^-24 and miss unlikely ids.

        There is no temperature: one on every digit is not a temperature of the ids. For that, sample from ``forward``
        divided by it.

        Raises:
            ValueError: If the shapes do not match, a probability lies outside [0, 1) or the distribution is NaN; values
                are not checked in a compiled graph.
        """
        self._check_hidden(hidden)
        self._check_probability(probability, hidden.shape[:-1])
        wide = _widest_dtype(hidden.device)
        ids = torch.zeros(probability.shape, dtype=torch.long, device=hidden.device)
        rest = probability.to(wide).unsqueeze(-1)  # (..., 1)
        with without_autocast(hidden.device):
            for position in range(self.num_digits):
                upper = self._logits(position, hidden, ids).to(wide).softmax(-1).cumsum(-1)  # (..., base)
                # Rounding may leave the total below the number sought; the last digit that has any probability is it.
                digit = torch.minimum((upper <= rest).sum(-1), (upper < upper[..., -1:]).sum(-1)).unsqueeze(-1)
                low = F.pad(upper[..., :-1], (1, 0)).gather(-1, digit)
                rest = ((rest - low) / (upper.gather(-1, digit) - low)).clamp(0, 1)
                ids = ids * self.base + digit.squeeze(-1)
        if _can_look_at(rest) and rest.isnan().any():
            raise ValueError("the distribution of an id is NaN; look for NaN or infinity in hidden or the parameters.")
        return ids

    @torch.no_grad()
    def resize(self, num_embeddings: int) -> None:
        """Changes the number of ids in place, as far as the digits reach.

        No parameter changes. Each digit's softmax then runs over the digits that still number an id, so that only the
        probabilities of digits beside those that come or go change.

        Raises:
            ValueError: If ``num_embeddings`` is below one or above ``base ** num_digits``.
        """
        digit_layout(num_embeddings)  # validates
        if num_embeddings > self.base**self.num_digits:
            raise ValueError(
                f"num_embeddings = {num_embeddings}; {self.num_digits} digits of base {self.base} number "
                f"{self.base**self.num_digits} ids at most. Make a new DigitHead with a larger base or num_digits and "
                "train it: more digits give every parameter another meaning."
            )
        self.num_embeddings = num_embeddings

    def extra_repr(self) -> str:
        """Sizes, as ``torch.nn.Module`` prints them."""
        return (
            f"{self.hidden_size}, {self.num_embeddings}, base={self.base}, num_digits={self.num_digits}, "
            f"rank={self.rank}"
        )

    @property
    def _dtype(self) -> torch.dtype:
        return product_dtype(self.first_weight.dtype)

    def _num_prefixes(self, length: int) -> int:
        """How many numbers the first ``length`` digits of an id can form: they are 0, 1, .. without a gap."""
        return -(-self.num_embeddings // self.base ** (self.num_digits - length))

    def _logits(self, position: int, hidden: Tensor, prefix: Tensor) -> Tensor:
        """Logits of one digit given the number ``prefix`` of those above it, -inf where no id goes on.

        hidden (..., D) and prefix (...), which broadcast against each other -> (..., base). ``position`` counts from 0,
        the most significant digit, whose prefix is 0.
        """
        hidden, later = hidden.to(self._dtype), position - 1
        if position == 0:
            logits = _linear(hidden, self.first_weight, self.first_bias)
        else:
            components = _linear(hidden, self.hidden_weight[later], self.hidden_bias[later])  # (..., rank)
            components = components * self._prefix_product(position, prefix)
            logits = _linear(components, self.out_weight[later], self.out_bias[later])
        num_children = self._num_prefixes(position + 1)
        if num_children == self._num_prefixes(position) * self.base:  # every digit goes on
            return logits
        children = prefix.unsqueeze(-1) * self.base + torch.arange(self.base, device=prefix.device)
        return logits.masked_fill(children >= num_children, -torch.inf)

    def _prefix_product(self, position: int, prefix: Tensor) -> Tensor:
        """Product of the factors of the digits above: (...) -> (..., rank)."""
        digits = to_digits(prefix, self.base, position)  # (..., position)
        first = position * (position - 1) // 2
        product = F.embedding(digits[..., 0], self.digit_factors[first]).to(self._dtype)
        for above in range(1, position):
            product = product * F.embedding(digits[..., above], self.digit_factors[first + above])
        return product

    def _log_prefixes(self, hidden: Tensor, length: int) -> Tensor:
        """Log-probabilities of the numbers that ``length`` leading digits form: (..., D) -> (..., prefixes)."""
        log_p = hidden.new_zeros(*hidden.shape[:-1], 1, dtype=self._dtype)
        for position in range(length):
            prefix = torch.arange(log_p.shape[-1], device=hidden.device)
            digit_log_p = self._logits(position, hidden.unsqueeze(-2), prefix).log_softmax(-1)  # (..., prefixes, base)
            log_p = (log_p.unsqueeze(-1) + digit_log_p).flatten(-2)[..., : self._num_prefixes(position + 1)]
        return log_p

    def _check_hidden(self, hidden: Tensor) -> None:
        if not hidden.is_floating_point() or hidden.dim() == 0 or hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden has shape {tuple(hidden.shape)} and dtype {hidden.dtype}; expected floating-point hidden "
                f"states of shape (..., hidden_size = {self.hidden_size})."
            )

    def _check_ids(self, ids: Tensor, shape: torch.Size) -> None:
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"ids have dtype {ids.dtype}; expected integers.")
        if ids.shape != shape:
            raise ValueError(f"ids have shape {tuple(ids.shape)}; expected hidden's without its last, {tuple(shape)}.")
        if _can_look_at(ids) and (outside := (ids < 0) | (ids >= self.num_embeddings)).any():
            raise IndexError(
                f"id {int(ids[outside][0])} lies outside [0, num_embeddings = {self.num_embeddings}); leave out tokens "
                "whose label says to ignore them."
            )

    def _check_probability(self, probability: Tensor, shape: torch.Size) -> None:
        if not probability.is_floating_point() or probability.shape != shape:
            raise ValueError(
                f"probability has shape {tuple(probability.shape)} and dtype {probability.dtype}; expected "
                f"floating-point numbers of hidden's shape without its last, {tuple(shape)}."
            )
        if _can_look_at(probability) and (outside := ~((probability >= 0) & (probability < 1))).any():
            raise ValueError(f"probability {float(probability[outside][0])} lies outside [0, 1).")


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _widest_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _can_look_at(values: Tensor) -> bool:
    capturing = values.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (torch.compiler.is_compiling() or values.is_meta or capturing)


__all__ = ["DigitHead"]
