"""Positions for tokens on a grid of digits: tokens that share a digit are alike, as are those of neighbouring digits.

A model that is given the digits of a position adds up a row of a codebook for each. What such a sum can tell of the
tokens' factors is therefore the measure: an order is good if Σ_q C_q[d_q(v)] comes near F_v for the best codebooks.
Every position holds one token at most, so the digits are as evenly used as can be.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from sna_core.codebooks import fit_codebooks, sum_codebooks
from sna_core.digits import digit_layout, to_digits

Method = Literal["kmeans", "transport", "spectral", "random", "identity"]
CONTROLS = ("random", "identity")  # the methods that look at no factors

NUM_SWEEPS = 25  # ten more would explain about 0.1 % of the variance more
BLOCK = 1024  # positions that tokens exchange at one time; the time grows with its square, the gain hardly


@dataclass(frozen=True)
class OrderQuality:
    """How well digits tell tokens apart, all weighted by :func:`token_weights`.

    Attributes:
        explained_variance: 1 − Σ_v w_v ‖F_v − Σ_q C_q[d_q(v)]‖² / Σ_v w_v ‖F_v − mean‖² for the best codebooks C.
        explained_by_digit: The same for each digit on its own, most significant first.
        cosine_same: Mean cosine of the centred factors of two tokens that share a digit, for each digit.
        cosine_next: The same of two tokens whose digits there differ by one. Zero where there are no two such tokens.
    """

    explained_variance: float
    explained_by_digit: tuple[float, ...]
    cosine_same: tuple[float, ...]
    cosine_next: tuple[float, ...]


def token_weights(counts: np.ndarray) -> np.ndarray:
    """log(1 + count): frequent tokens weigh more, but not by the orders of magnitude that they are more frequent by."""
    return np.log1p(counts)


def assign(
    factors: np.ndarray, counts: np.ndarray, base: int, num_digits: int, method: Method = "kmeans", seed: int = 0
) -> np.ndarray:
    """A position of its own in [0, base ** num_digits) for every token: `(V, d)`, `(V,)` -> `(V,)` int64.

    `kmeans` goes digit by digit, the most significant first. Tokens that agree in all digits so far are dealt out
    evenly over the values of the next, each token to where what is not yet explained of its factors is nearest to the
    mean of all tokens with that value. The first digit so makes balanced clusters; a later one means the same thing in
    every cluster. `transport` goes on from there with all digits together: in turn the best codebooks, and an
    assignment of tokens to positions at less weighted distance. Both end with a renumbering of each digit's values
    along a short path, so that neighbouring ones are alike. `spectral` sorts the tokens along the direction of largest
    variance alone. `random` and `identity` are controls: they look at neither counts nor factors, and these may be
    `(V, 0)`.

    Where there are more positions than tokens, the free ones are spread over the grid; `identity` leaves them at the
    end. The time grows a little faster than the number of tokens, the memory as that of the factors.

    Args:
        factors: What is known of each token; zeros for tokens that nothing is known of.
        counts: How often each token was seen.
        base: Base of the digits.
        num_digits: Number of digits.
        method: See above.
        seed: Of all that is drawn.

    Raises:
        ValueError: If shapes do not match, numbers are not finite, no token was seen, the digits cannot number the
            tokens or the method is unknown.
    """
    if method not in get_args(Method):
        raise ValueError(f"method = {method!r}; expected one of {', '.join(get_args(Method))}.")
    num_tokens, num_positions = len(factors), _num_positions(len(factors), base, num_digits)
    generator = np.random.default_rng(seed)
    if method == "identity":
        return np.arange(num_tokens)
    if method == "random":
        positions = np.sort(generator.choice(num_positions, num_tokens, replace=False))
        return positions[np.argsort(generator.permutation(num_tokens))]
    vectors, weights = _centred(factors, counts)
    if method in ("kmeans", "transport"):
        digits = _digit_by_digit(vectors, weights, base, num_digits, generator)
        if method == "transport":
            digits = _all_digits(vectors, weights, digits, base, generator)
        return _along_paths(vectors, weights, digits, base)
    positions = np.sort(generator.choice(num_positions, num_tokens, replace=False))
    variance = (vectors * weights[:, None]).T @ vectors
    tokens = np.argsort(vectors @ np.linalg.eigh(variance)[1][:, -1], kind="stable")
    order = np.empty(num_tokens, np.int64)
    order[tokens] = positions
    return order


def order_quality(
    factors: np.ndarray, counts: np.ndarray, order: np.ndarray, base: int, num_digits: int
) -> OrderQuality:
    """Measures an order: `(V, d)`, `(V,)`, `(V,)`; see :class:`OrderQuality`.

    Raises:
        ValueError: As :func:`assign`.
    """
    vectors, weights = _centred(factors, counts)
    _num_positions(len(vectors), base, num_digits)
    digits = _digits(order, base, num_digits)
    length = np.linalg.norm(vectors, axis=1)
    units = vectors / np.where(length > 0, length, 1)[:, None]
    cosines = [_cosines(units, weights, column, base) for column in digits.T]
    return OrderQuality(
        explained_variance=_explained(vectors, weights, digits, base),
        explained_by_digit=tuple(_explained(vectors, weights, digits[:, [q]], base) for q in range(num_digits)),
        cosine_same=tuple(same for same, _ in cosines),
        cosine_next=tuple(following for _, following in cosines),
    )


def _centred(factors: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if factors.ndim != 2 or factors.size == 0 or counts.shape != factors.shape[:1]:
        raise ValueError(
            f"factors have shape {factors.shape} and counts {counts.shape}; expected (V, d) and (V,), with no zero."
        )
    if not np.isfinite(factors).all():
        token = int(np.argmin(np.isfinite(factors).all(1)))
        raise ValueError(f"the factors of token {token} are not finite; give it zeros.")
    if not (np.isfinite(counts).all() and counts.min() >= 0 and counts.any()):
        raise ValueError("counts must be finite, at least zero, and not zero for all tokens.")
    vectors, weights = factors.astype(np.float64), token_weights(counts)
    return vectors - weights @ vectors / weights.sum(), weights


def _num_positions(num_tokens: int, base: int, num_digits: int) -> int:
    digit_layout(num_tokens, base, num_digits)  # validates
    if base**num_digits > np.iinfo(np.int64).max:
        raise ValueError(
            f"{num_digits} digits of base {base} number more positions than int64 holds; take fewer digits."
        )
    return base**num_digits


def _digits(positions: np.ndarray, base: int, num_digits: int) -> np.ndarray:
    return to_digits(torch.from_numpy(positions), base, num_digits).numpy()


def _summed(vectors: np.ndarray, weights: np.ndarray, digits: np.ndarray, base: int, at: np.ndarray) -> np.ndarray:
    """The codebooks fitted to tokens that have `digits`, summed up for the digits `at`: (V, k), (n, k) -> (n, d)."""
    codebooks = fit_codebooks(torch.from_numpy(digits), torch.from_numpy(vectors), base, torch.from_numpy(weights))
    return sum_codebooks(codebooks, torch.from_numpy(at)).numpy()


def _explained(vectors: np.ndarray, weights: np.ndarray, digits: np.ndarray, base: int) -> float:
    left = weights @ ((vectors - _summed(vectors, weights, digits, base, digits)) ** 2).sum(1)
    total = weights @ (vectors**2).sum(1)
    return float(1 - left / total) if total else 1.0


def _cosines(units: np.ndarray, weights: np.ndarray, digit: np.ndarray, base: int) -> tuple[float, float]:
    """Mean cosines of two tokens with the same digit, and with digits that differ by one."""
    totals, squares = (np.bincount(digit, each, base) for each in (weights, weights**2))
    sums = np.zeros((base, units.shape[1]))
    np.add.at(sums, digit, weights[:, None] * units)
    own = weights**2 @ (units**2).sum(1)  # a token is no pair with itself
    pairs = (
        ((sums**2).sum() - own, (totals**2 - squares).sum()),
        ((sums[1:] * sums[:-1]).sum(), totals[1:] @ totals[:-1]),
    )
    # A digit with a single token leaves a rounding error where there is no pair.
    same, following = (float(cosines / count) if count > 1e-9 * totals.sum() ** 2 else 0.0 for cosines, count in pairs)
    return same, following


def _digit_by_digit(
    vectors: np.ndarray, weights: np.ndarray, base: int, num_digits: int, generator: np.random.Generator
) -> np.ndarray:
    """The digits `(V, k)` of the method `kmeans`."""
    num_tokens = len(vectors)
    number, residual, digits = np.zeros(num_tokens, np.int64), vectors, np.empty((num_tokens, num_digits), np.int64)
    for q in range(num_digits):
        # Tokens of one number, that of the digits so far, hold places of their own: as many for each value of the next
        # digit, and fewer than `base` more than there are tokens.
        together = np.argsort(number, kind="stable")
        clusters = np.split(together, np.flatnonzero(np.diff(number[together])) + 1)
        sizes = [-(-len(tokens) // base) * base for tokens in clusters]
        holders = np.full(sum(sizes), -1)
        groups = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
        for tokens, places in zip(clusters, groups, strict=True):
            holders[generator.choice(places, len(tokens), replace=False)] = tokens
        values = np.concatenate([places - places[0] for places in groups])[:, None] % base
        _exchange(residual, weights, values, holders, groups, base, generator)
        held = holders >= 0
        digits[:, q] = values[held, 0][np.argsort(holders[held])]
        column = digits[:, q : q + 1]
        residual = residual - _summed(residual, weights, column, base, column)
        number = number * base + column[:, 0]
    return digits


def _all_digits(
    vectors: np.ndarray, weights: np.ndarray, digits: np.ndarray, base: int, generator: np.random.Generator
) -> np.ndarray:
    """The digits `(V, k)` of the method `transport`, from those of `kmeans`."""
    num_tokens, num_digits = digits.shape
    taken = digits @ base ** np.arange(num_digits - 1, -1, -1)
    # Tokens may also go to positions that are free; but of these there may be far more than can be looked at.
    num_positions = base**num_digits
    free = generator.choice(num_positions, min(num_positions, 2 * num_tokens), replace=False)
    positions = np.union1d(taken, free)
    places, holders = _digits(positions, base, num_digits), np.full(len(positions), -1)
    holders[np.searchsorted(positions, taken)] = np.arange(num_tokens)
    _exchange(vectors, weights, places, holders, [np.arange(len(positions))], base, generator)
    held = holders >= 0
    return places[held][np.argsort(holders[held])]


def _exchange(
    vectors: np.ndarray,
    weights: np.ndarray,
    digits: np.ndarray,
    holders: np.ndarray,
    groups: list[np.ndarray],
    base: int,
    generator: np.random.Generator,
) -> None:
    """Lets tokens exchange places, for a lesser distance to what the digits of their place tell of them; in place.

    In turn, the best codebooks for the tokens where they are, and the best assignment (a linear sum assignment problem)
    of tokens to places, by blocks of places. A block is of one group, and of tokens that come one after another along a
    random direction: they are those that may well exchange. Both steps never raise the weighted distance.

    Args:
        vectors: `(V, d)`.
        weights: `(V,)`.
        digits: Of every place, `(places, k)`.
        holders: The token of every place, or −1, `(places,)`. Changed in place.
        groups: Indices of places among which tokens are exchanged.
        base: Base of the digits.
        generator: Of the directions.
    """
    for _ in range(NUM_SWEEPS):
        held = holders >= 0
        tokens = holders[held]
        targets = _summed(vectors[tokens], weights[tokens], digits[held], base, digits)
        direction = generator.standard_normal(vectors.shape[1])
        along = np.where(held, (vectors @ direction)[holders], targets @ direction)
        for group in groups:
            for block in np.array_split(group[np.argsort(along[group])], -(-len(group) // BLOCK)):
                tokens = holders[block][holders[block] >= 0]
                target = targets[block]
                distance = (target**2).sum(1) - 2 * vectors[tokens] @ target.T  # less the token's own square
                chosen, places = linear_sum_assignment(weights[tokens, None] * distance)
                holders[block] = -1
                holders[block[places]] = tokens[chosen]


def _along_paths(vectors: np.ndarray, weights: np.ndarray, digits: np.ndarray, base: int) -> np.ndarray:
    """Positions `(V,)` of tokens with digits `(V, k)`, the values of each digit renumbered along a path."""
    every = torch.from_numpy(vectors), base, torch.from_numpy(weights)
    order = np.zeros(len(vectors), np.int64)
    for codebook, column in zip(fit_codebooks(torch.from_numpy(digits), *every).numpy(), digits.T, strict=True):
        order = order * base + np.argsort(short_path(codebook))[column]
    return order


def short_path(points: np.ndarray) -> np.ndarray:
    """Indices of points along a short open path through all: `(n, d)` -> `(n,)`.

    Goes to the nearest point that is left, from one at the rim on; then reverses stretches for as long as the path
    becomes shorter by it (2-opt).
    """
    num_points = len(points)
    # One more point, at distance zero from all, makes the path a tour: its ends are then as free as the rest.
    distance = np.zeros((num_points + 1, num_points + 1))
    distance[:-1, :-1] = cdist(points, points)
    left = np.ones(num_points, bool)
    path = [int(((points - points.mean(0)) ** 2).sum(1).argmax())]
    while len(path) < num_points:
        left[path[-1]] = False
        path.append(int(np.where(left, distance[path[-1], :-1], np.inf).argmin()))
    tour = np.array([num_points, *path, num_points])
    while True:
        along = distance[np.ix_(tour, tour)]
        step = np.diagonal(along, 1)
        # [i, j]: what is gained if tour[i + 1] to tour[j + 1] are passed in reverse.
        gain = np.triu(step[:-1, None] + step[1:] - along[:-2, 1:-1] - along[1:-1, 2:])
        first, last = np.unravel_index(gain.argmax(), gain.shape)
        if gain[first, last] <= 1e-9 * step.sum():
            return tour[1:-1]
        tour[first + 1 : last + 2] = tour[first + 1 : last + 2][::-1]
