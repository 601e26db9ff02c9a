"""Metrics of two-dimensional vorticity fields: pure functions of numpy or torch arrays, computed in float64.

A field is (..., N, N), indexed [x, y], vorticity ω in 1 / time on a periodic square of side L; leading axes are kept.
The paper (arXiv 2603.12244, figure 5) names its four metrics and defines none; the definitions here are ours. Energies
and ratios are floored at `RELATIVE_FLOOR`: a collapsed field gets a finite, capped score. Every function raises
ValueError on values that are not finite and on shapes that do not fit.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

Array = np.ndarray | torch.Tensor

PAPER_METRICS = ("enstrophy_error", "energy_error", "slope_error", "jensen_shannon")
RELATIVE_FLOOR = 1e-10  # of the greater total: below it an energy is rounding, not physics
_TINY = np.finfo(np.float64).tiny


def _field(values: Array, name: str, square: bool = False) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().to(torch.float64).numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim < 2 or 0 in array.shape or (square and array.shape[-1] != array.shape[-2]):
        expected = "(..., N, N)" if square else "(..., X, Y)"
        raise ValueError(f"{name} has shape {array.shape}; expected {expected}, not empty.")
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{name}{list(where)} = {array[where]}; expected finite values.")
    return array


def _pair(predicted: Array, true: Array) -> tuple[np.ndarray, np.ndarray]:
    predicted, true = _field(predicted, "predicted"), _field(true, "true")
    if predicted.shape != true.shape:
        raise ValueError(f"predicted has shape {predicted.shape} and true {true.shape}; expected one shape.")
    return predicted, true


def _mean(field: np.ndarray) -> np.ndarray:
    return field.mean(axis=(-2, -1))


def log_ratio_error(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """|ln(p / t)| of two non-negative quantities of one shape, both floored at `RELATIVE_FLOOR` times the greater.

    Symmetric, 0 where both vanish, at most −ln(RELATIVE_FLOOR), about 23.
    """
    floor = np.maximum(RELATIVE_FLOOR * np.maximum(predicted, true), _TINY)
    return np.abs(np.log(np.maximum(predicted, floor) / np.maximum(true, floor)))


# ---------------------------------------------------------------------------------------------------- one-point metrics


def enstrophy(vorticity: Array) -> np.ndarray:
    """Z = 1/2 <ω²>, a mean over space, in 1 / time²: (..., X, Y) -> (...)."""
    return 0.5 * _mean(_field(vorticity, "vorticity") ** 2)


def enstrophy_error(predicted: Array, true: Array) -> np.ndarray:
    """|ln(Z_predicted / Z_true)|: two fields (..., X, Y) -> (...)."""
    predicted, true = _pair(predicted, true)
    return log_ratio_error(enstrophy(predicted), enstrophy(true))


def mean_error(predicted: Array, true: Array) -> np.ndarray:
    """|<ω_predicted> − <ω_true>| / rms(ω_true), which no spectrum shows: two fields (..., X, Y) -> (...)."""
    predicted, true = _pair(predicted, true)
    return _relative(np.abs(_mean(predicted - true)), np.sqrt(_mean(true**2)))


def variance_error(predicted: Array, true: Array) -> np.ndarray:
    """|ln(Var ω_predicted / Var ω_true)|, variances over space: two fields (..., X, Y) -> (...)."""
    predicted, true = _pair(predicted, true)
    return log_ratio_error(predicted.var(axis=(-2, -1)), true.var(axis=(-2, -1)))


def nrmse(predicted: Array, true: Array) -> np.ndarray:
    """rms(ω_predicted − ω_true) / rms(ω_true): two fields (..., X, Y) -> (...)."""
    predicted, true = _pair(predicted, true)
    return _relative(np.sqrt(_mean((predicted - true) ** 2)), np.sqrt(_mean(true**2)))


def _relative(error: np.ndarray, scale: np.ndarray) -> np.ndarray:
    floor = np.maximum(RELATIVE_FLOOR * error, _TINY)  # a true field of zeros: capped at 1 / RELATIVE_FLOOR
    return error / np.maximum(scale, floor)


def correlation(predicted: Array, true: Array) -> np.ndarray:
    """Pearson's correlation over space, in [−1, 1], 0 where a field is constant: two fields (..., X, Y) -> (...)."""
    predicted, true = _pair(predicted, true)
    deviations = []
    for field in (predicted, true):
        deviation = field - _mean(field)[..., None, None]
        norm = np.sqrt((deviation**2).sum(axis=(-2, -1)))
        constant = norm <= 1e-12 * np.sqrt((field**2).sum(axis=(-2, -1)))  # the mean of equal values may be an ulp off
        deviations.append(deviation * np.where(constant, 0.0, 1 / np.maximum(norm, _TINY))[..., None, None])
    return np.clip((deviations[0] * deviations[1]).sum(axis=(-2, -1)), -1, 1)


def histogram(vorticity: Array, low: float, high: float, num_bins: int = 256) -> np.ndarray:
    """Shares of a field's values in `num_bins` equal bins of [low, high]: (..., X, Y) -> (..., num_bins), sum 1.

    Values outside count in the end bins, as the quantiser has it. Compare only histograms of one range.

    Raises:
        ValueError: If the range is empty or there is no bin.
    """
    field = _field(vorticity, "vorticity")
    if not (np.isfinite([low, high]).all() and low < high and num_bins >= 1):
        raise ValueError(f"{num_bins} bins of [{low}, {high}]; expected at least one bin of a range that is not empty.")
    bins = np.clip((field - low) * (num_bins / (high - low)), 0, num_bins - 1).astype(np.int64)
    flat = bins.reshape(-1, bins.shape[-2] * bins.shape[-1])
    counts = np.stack([np.bincount(row, minlength=num_bins) for row in flat]) / flat.shape[-1]
    return counts.reshape(*bins.shape[:-2], num_bins)


def jensen_shannon(p: Array, q: Array) -> np.ndarray:
    """Jensen-Shannon divergence in bits, in [0, 1]: probabilities (..., bins) -> (...).

    H((p + q) / 2) − (H(p) + H(q)) / 2 with H the entropy to base 2, written as two relative entropies to the mixture,
    which need no floor. scipy's `jensenshannon` is its square root.

    Source: Lin, IEEE Trans. Inf. Theory 37 (1991).
    """
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    for name, values in (("p", p), ("q", q)):
        if values.shape != p.shape or values.min() < 0 or not np.allclose(values.sum(-1), 1):
            raise ValueError(f"{name} has shape {values.shape}; expected probabilities (..., bins) with sum 1, as p.")
    mixture = (p + q) / 2
    terms = [x * np.log2(np.divide(x, mixture, out=np.ones_like(x), where=x > 0)) for x in (p, q)]
    return np.clip(0.5 * (terms[0] + terms[1]).sum(-1), 0, 1)


def crps(ensemble: Array, true: Array) -> np.ndarray:
    """Continuous ranked probability score, a mean over space, in the field's unit: lower is better.

    mean_i |x_i − y| − sum_ij |x_i − x_j| / (2 M (M − 1)): the fair form, whose expectation does not depend on the
    number M of members. One member has no spread, and its score is the mean absolute error.

    Shapes: ensemble (..., M, X, Y) and true (..., X, Y) -> (...).

    Source: Ferro, Q. J. R. Meteorol. Soc. 140 (2014).
    """
    ensemble, true = _ensemble(ensemble, true)
    members = ensemble.shape[-3]
    score = _mean(np.abs(ensemble - true[..., None, :, :])).mean(-1)
    if members == 1:
        return score
    # sum_ij |x_i − x_j| = 2 sum_i (2 i − M − 1) x_(i) over the sorted members: no pairs are formed.
    weights = (2 * np.arange(1, members + 1) - members - 1) / (members * (members - 1))
    return score - (_mean(np.sort(ensemble, axis=-3)) * weights).sum(-1)


def _ensemble(ensemble: Array, true: Array) -> tuple[np.ndarray, np.ndarray]:
    ensemble, true = _field(ensemble, "ensemble"), _field(true, "true")
    if ensemble.ndim < 3 or ensemble.shape[:-3] + ensemble.shape[-2:] != true.shape:
        raise ValueError(
            f"ensemble has shape {ensemble.shape} and true {true.shape}; expected (..., M, X, Y), (..., X, Y)."
        )
    return ensemble, true


@dataclass(frozen=True)
class SpreadSkill:
    """Spread and skill of ensembles, (...) each, in the field's unit."""

    spread: np.ndarray
    skill: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """1 for a reliable ensemble, below for one that is too sure of itself."""
        return _relative(self.spread, self.skill)


def spread_skill(ensemble: Array, true: Array) -> SpreadSkill:
    """Spread sqrt((M + 1) / M <s²>) and skill sqrt(<(mean_i x_i − y)²>), means over space.

    s² is the members' unbiased variance at a point. The factor belongs to a mean of M members alone: if truth and
    members are drawn from one distribution, both have one expected square, whatever M.

    Shapes: ensemble (..., M, X, Y) and true (..., X, Y) -> (...).

    Raises:
        ValueError: If there are fewer than two members, or as for all.

    Source: Fortin et al., J. Hydrometeorol. 15 (2014).
    """
    ensemble, true = _ensemble(ensemble, true)
    if (members := ensemble.shape[-3]) < 2:
        raise ValueError(f"ensemble has shape {ensemble.shape}: {members} member; a spread needs at least two.")
    variance = _mean(ensemble.var(axis=-3, ddof=1))
    return SpreadSkill(
        np.sqrt((members + 1) / members * variance), np.sqrt(_mean((ensemble.mean(axis=-3) - true) ** 2))
    )


def rank_histogram(ensemble: Array, true: Array) -> np.ndarray:
    """Shares of points at which the truth lies above 0, 1, .. M of the members: flat for a reliable ensemble.

    A truth that equals some members counts in equal parts for all ranks that it spans, which is what breaking ties at
    random gives on average. A hump says too wide, a valley too narrow, a slope biased.

    Shapes: ensemble (..., M, X, Y) and true (..., X, Y) -> (..., M + 1), sum 1.

    Source: Hamill, Mon. Weather Rev. 129 (2001).
    """
    ensemble, true = _ensemble(ensemble, true)
    below = (ensemble < true[..., None, :, :]).sum(-3)[..., None, :, :]
    tied = (ensemble == true[..., None, :, :]).sum(-3)[..., None, :, :]
    ranks = np.arange(ensemble.shape[-3] + 1)[:, None, None]
    return _mean(((below <= ranks) & (ranks <= below + tied)) / (tied + 1))


# ------------------------------------------------------------------------------------------------------------- spectra


def enstrophy_spectrum(vorticity: Array) -> np.ndarray:
    """Z(k): as `energy_spectrum` with 1/2 |ω^|² for energy, in 1 / time²: (..., N, N) -> (..., N // 2)."""
    return _shell_sums(_power(vorticity))


def energy_spectrum(vorticity: Array, length: float = 1.0) -> np.ndarray:
    """Radial spectrum of the kinetic energy, from vorticity, in length² / time².

    E(k) = sum of 1/2 |ω^|² / κ² over k − 1/2 <= |k| < k + 1/2, with k = 1 .. N // 2 in waves per side, κ = 2π|k| / L
    and ω^ = FFT(ω) / N². Bins are sums, not means, so that sum_k E(k) = 1/2 <|u|²> (Parseval) for a flow without waves
    beyond the Nyquist disc. The corners of the spectral square, |k| >= N // 2 + 1/2, are in no bin.

    Args:
        vorticity: (..., N, N) on a periodic square.
        length: L.

    Returns:
        (..., N // 2).
    """
    power = _power(vorticity)
    wavenumber = 2 * np.pi / length * _wavenumbers(power.shape[-1])
    wavenumber[0, 0] = np.inf  # the mean has no velocity on a periodic domain
    return _shell_sums(power / wavenumber**2)


def patch_spectrum(vorticity: Array, patch_size: int, length: float = 1.0) -> np.ndarray:
    """Mean energy spectrum of the patches of a field, each made periodic by a Hann window.

    From each patch its mean is taken, it is multiplied by W = sin²(π(i + 1/2)/P) sin²(π(j + 1/2)/P), and divided by
    sqrt(<W²>) to keep its power. Without a window the jump between opposite edges puts a false tail on the spectrum,
    which hides an over-smooth prediction. k counts waves per patch side.

    Shapes: (..., N, N), N a multiple of P = `patch_size` -> (..., P // 2). `length` is the side of the whole field.
    """
    field = _field(vorticity, "vorticity", square=True)
    size, count = patch_size, field.shape[-1] // max(patch_size, 1)
    _check_patch(field, size)
    patches = field.reshape(*field.shape[:-2], count, size, count, size).swapaxes(-3, -2)  # (..., rows, columns, P, P)
    patches = patches - _mean(patches)[..., None, None]
    hann = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    window = np.outer(hann, hann)
    window /= np.sqrt((window**2).mean())
    return energy_spectrum(patches * window, length / count).mean(axis=(-3, -2))


def _power(vorticity: Array) -> np.ndarray:
    field = _field(vorticity, "vorticity", square=True)
    if field.shape[-1] < 2:
        raise ValueError(f"vorticity has shape {field.shape}; a spectrum needs N >= 2.")
    return 0.5 * np.abs(np.fft.fft2(field, norm="forward")) ** 2


def _wavenumbers(num_grid: int) -> np.ndarray:
    index = np.fft.fftfreq(num_grid, 1 / num_grid)
    return np.hypot(index[:, None], index)


def _shell_sums(power: np.ndarray) -> np.ndarray:
    num_grid = power.shape[-1]
    shell = np.floor(_wavenumbers(num_grid) + 0.5).astype(np.int64).ravel()
    sums = [np.bincount(shell, weights=row)[1 : num_grid // 2 + 1] for row in power.reshape(-1, num_grid**2)]
    return np.stack(sums).reshape(*power.shape[:-2], num_grid // 2)


def _spectra(*spectra: Array) -> list[np.ndarray]:
    arrays = [np.asarray(spectrum, dtype=np.float64) for spectrum in spectra]
    for array in arrays:
        if array.ndim < 1 or array.shape != arrays[0].shape or not (np.isfinite(array) & (array >= 0)).all():
            raise ValueError(
                f"a spectrum has shape {array.shape}; expected {arrays[0].shape}, finite and not negative."
            )
    return arrays


def energy_error(predicted: Array, true: Array) -> np.ndarray:
    """|ln(sum_k E_predicted / sum_k E_true)| of two spectra: (..., K) -> (...)."""
    predicted, true = _spectra(predicted, true)
    return log_ratio_error(predicted.sum(-1), true.sum(-1))


def mean_log_ratio(predicted: Array, true: Array) -> np.ndarray:
    """mean_k |log10(E_predicted / E_true)|, in decades: (..., K) -> (...). Every scale weighs the same.

    Source: mean energy log ratio, google-research/swirl-dynamics; the floor is ours.
    """
    return _shell_log_ratio(predicted, true)[0].mean(-1)


def weighted_log_ratio(predicted: Array, true: Array) -> np.ndarray:
    """sum_k E_true |log10(E_predicted / E_true)| / sum_k E_true, in decades: (..., K) -> (...). Source: as above."""
    ratio, weights = _shell_log_ratio(predicted, true)
    return (ratio * weights).sum(-1) / weights.sum(-1)


def _shell_log_ratio(predicted: Array, true: Array) -> tuple[np.ndarray, np.ndarray]:
    predicted, true = _spectra(predicted, true)
    total = np.maximum(predicted.sum(-1, keepdims=True), true.sum(-1, keepdims=True))
    floor = np.maximum(RELATIVE_FLOOR * total, _TINY)
    floored = np.maximum(true, floor)
    return np.abs(np.log10(np.maximum(predicted, floor) / floored)), floored


@dataclass(frozen=True)
class SpectralSlope:
    """A slope and the band in which it was fitted: the band decides the number.

    Attributes:
        slope: s of E ~ k^s, (...).
        low: First wavenumber of the band, in waves per side.
        high: Last wavenumber of the band, included.
    """

    slope: np.ndarray
    low: int
    high: int


def slope_band(num_grid: int) -> tuple[int, int]:
    """The band in which slopes are fitted unless another is given: a quarter of its upper end to 16 waves or N / 8.

    The band decides the number: it should lie behind the scales that were forced or started, and before dissipation.
    """
    high = min(max(16, num_grid // 8), num_grid // 2)
    return max(1, high // 4), high


def spectral_slope(spectrum: Array, band: tuple[int, int]) -> SpectralSlope:
    """Least-squares slope of ln E on ln k over low <= k <= high; that of a spectrum of zeros is 0.

    Theory has −3 for the direct enstrophy cascade and −5/3 for the inverse energy cascade of two-dimensional flow.

    Args:
        spectrum: E(k) for k = 1 .. K, (..., K).
        band: (low, high) in waves per side, both included.

    Raises:
        ValueError: If the band does not hold at least two of the spectrum's wavenumbers.
    """
    (spectrum,), (low, high) = _spectra(spectrum), band
    if not 1 <= low < high <= spectrum.shape[-1]:
        raise ValueError(f"band = {band}; expected 1 <= low < high <= {spectrum.shape[-1]}, the spectrum's last k.")
    rounding = np.finfo(np.float64).eps ** 2  # a floor that leaves steep spectra alone
    floor = np.maximum(rounding * spectrum.sum(-1, keepdims=True), _TINY)
    log_k = np.log(np.arange(low, high + 1))
    log_k -= log_k.mean()
    log_e = np.log(np.maximum(spectrum, floor))[..., low - 1 : high]
    return SpectralSlope((log_e * log_k).sum(-1) / (log_k**2).sum(), low, high)


def slope_error(predicted: Array, true: Array, band: tuple[int, int]) -> np.ndarray:
    """|s_predicted − s_true| of two spectra in one band: (..., K) -> (...)."""
    return np.abs(spectral_slope(predicted, band).slope - spectral_slope(true, band).slope)


# ------------------------------------------------------------------------------------------ patches, floors, intervals


def border_jump(vorticity: Array, patch_size: int) -> np.ndarray:
    """Rms difference of neighbours across patch borders, over that inside patches: (..., X, Y) -> (...).

    About 1 for a field that does not know of patches, more where they do not fit together; 1 for a constant field. The
    field is periodic, so its own edge is a border.

    Raises:
        ValueError: If the patches do not fit.
    """
    field = _field(vorticity, "vorticity")
    _check_patch(field, patch_size)
    across, inside = [], []
    for axis in (-2, -1):
        steps = np.moveaxis(np.roll(field, -1, axis) - field, axis, -1) ** 2
        border = np.arange(1, steps.shape[-1] + 1) % patch_size == 0
        across.append(_mean(steps[..., border]))
        inside.append(_mean(steps[..., ~border]))
    across, inside = (np.sqrt(np.mean(squares, axis=0)) for squares in (across, inside))
    return np.where((across == 0) & (inside == 0), 1.0, _relative(across, inside))


def _check_patch(field: np.ndarray, patch_size: int) -> None:
    if patch_size < 2 or any(side % patch_size for side in field.shape[-2:]):
        raise ValueError(f"patch_size = {patch_size}; expected at least 2 and a divisor of {field.shape[-2:]}.")


def noise_floor(
    score: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]],
    fields: np.ndarray,
    max_pairs: int = 100,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """What `score` gives to the truth itself: its mean over pairs of independent trajectories.

    By a statistic, a prediction below this cannot be told from another true flow; nor does such a score prove more. For
    errors point by point it is the score of an unrelated flow instead, and no floor.

    `score` takes two fields (T, X, Y) and returns a dict of scores (T,); `fields` are independent, (B, T, X, Y); all
    pairs are taken, or `max_pairs` of them at random if there are more. Returns a dict of means (T,).

    Raises:
        ValueError: If there are fewer than two trajectories.
    """
    if len(fields) < 2:
        raise ValueError(f"{len(fields)} trajectory; a noise floor needs at least two independent ones.")
    pairs = list(itertools.combinations(range(len(fields)), 2))
    if len(pairs) > max_pairs:
        pairs = [pairs[i] for i in np.random.default_rng(seed).choice(len(pairs), max_pairs, replace=False)]
    scores = [score(fields[i], fields[j]) for i, j in pairs]
    return {name: np.mean([each[name] for each in scores], axis=0) for name in scores[0]}


@dataclass(frozen=True)
class Interval:
    """A mean and its interval, arrays of one shape."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def bootstrap(values: Array, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean over trajectories and its percentile bootstrap interval: (B, ...) -> three arrays (...).

    Whole trajectories are drawn, since times and pixels of one are not independent. With few trajectories the interval
    is too narrow.

    Raises:
        ValueError: If there are fewer than two trajectories, the values are not finite, or confidence is not in (0, 1).
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim < 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"values have shape {values.shape}; expected finite values of at least two trajectories.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence}; expected a number between 0 and 1.")
    count = len(values)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=num_resamples) / count
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.tensordot(draws, values, axes=1), [tail, 1 - tail], axis=0)
    return Interval(values.mean(0), low, high)


def student_interval(values: Array, confidence: float = 0.95) -> Interval:
    """Mean over trajectories and its interval by Student's t, mean ± t s / √B: (B, ...) -> three arrays (...).

    For few trajectories, where a bootstrap calls every common sign significant.

    Raises:
        ValueError: If there are fewer than two trajectories or the values are not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim < 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"values have shape {values.shape}; expected finite values of at least two trajectories.")
    mean = values.mean(0)
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(0, ddof=1) / np.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)
