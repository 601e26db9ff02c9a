"""eval.metrics on fields whose answers are known in closed form."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from eval import metrics

PAIR_METRICS = {
    "enstrophy_error": metrics.enstrophy_error,
    "mean_error": metrics.mean_error,
    "variance_error": metrics.variance_error,
    "nrmse": metrics.nrmse,
    "correlation": metrics.correlation,
}
SPECTRUM_METRICS = {
    "energy_error": metrics.energy_error,
    "mean_log_ratio": metrics.mean_log_ratio,
    "weighted_log_ratio": metrics.weighted_log_ratio,
    "slope_error": lambda p, t: metrics.slope_error(p, t, (2, 8)),
}


def grid(num_grid, length=1.0):
    return np.meshgrid(*[np.arange(num_grid) * length / num_grid] * 2, indexing="ij")


def noise(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def power_law_field(slope, num_grid, seed=0, cutoff=None):
    """A real field of random phases whose energy spectrum is k^slope in every shell up to `cutoff`."""
    index = np.fft.fftfreq(num_grid, 1 / num_grid)
    k = np.hypot(index[:, None], index)
    spectrum = np.fft.fft2(noise(seed, num_grid, num_grid), norm="forward")
    spectrum[(k == 0) | (k > (cutoff or num_grid))] = 0
    energy = metrics.energy_spectrum(np.fft.ifft2(spectrum, norm="forward").real)
    shells = np.arange(1, len(energy) + 1.0)
    gain = np.ones(num_grid)  # shell 0 and the corners
    gain[1 : len(energy) + 1] = np.sqrt(np.where(energy > 0, shells**slope / np.maximum(energy, 1e-300), 0))
    return np.fft.ifft2(spectrum * gain[np.floor(k + 0.5).astype(int)], norm="forward").real


# --------------------------------------------------------------------------------------------------------- one-point


@pytest.mark.parametrize("as_array", [np.asarray, torch.as_tensor, lambda x: torch.as_tensor(x).float()])
def test_enstrophy_of_a_sine(as_array):
    x, _ = grid(32)
    assert metrics.enstrophy(as_array(3 * np.sin(2 * np.pi * x))) == pytest.approx(0.5 * 9 / 2, rel=1e-6)


def test_enstrophy_error_is_the_log_ratio_and_symmetric():
    field = noise(0, 3, 16, 16)
    np.testing.assert_allclose(metrics.enstrophy_error(2 * field, field), np.log(4))
    np.testing.assert_allclose(metrics.enstrophy_error(field, 2 * field), np.log(4))


def test_mean_and_variance_errors():
    field = noise(0, 64, 64)
    field = (field - field.mean()) / field.std()
    assert metrics.mean_error(field + 0.3, field) == pytest.approx(0.3)
    assert metrics.variance_error(3 * field + 5, field) == pytest.approx(np.log(9))


def test_nrmse_and_correlation():
    x, y = grid(32)
    true, orthogonal = np.sin(2 * np.pi * x), np.sin(2 * np.pi * y)
    assert metrics.nrmse(0 * true, true) == pytest.approx(1)
    assert metrics.nrmse(true + orthogonal, true) == pytest.approx(1)
    assert metrics.correlation(7 * true + 2, true) == pytest.approx(1)
    assert metrics.correlation(-true, true) == pytest.approx(-1)
    assert metrics.correlation(true + orthogonal, true) == pytest.approx(np.sqrt(0.5))


def test_histogram_counts_and_clips_into_the_end_bins():
    field = np.array([[-9.0, 0.1], [0.9, 9.0]])
    np.testing.assert_array_equal(metrics.histogram(field, 0, 1, 4), [0.5, 0, 0, 0.5])
    assert metrics.histogram(noise(0, 5, 2, 8, 8), -1, 1).shape == (5, 2, 256)


def test_jensen_shannon():
    p, q = np.random.default_rng(0).dirichlet(np.ones(64), size=(2, 5))
    assert np.all(metrics.jensen_shannon(p, p) == 0)
    np.testing.assert_allclose(metrics.jensen_shannon([0.5, 0.5, 0, 0], [0, 0, 0.25, 0.75]), 1)
    np.testing.assert_allclose(metrics.jensen_shannon(p, q), metrics.jensen_shannon(q, p), rtol=1e-12)
    np.testing.assert_allclose(metrics.jensen_shannon(p, q), jensenshannon(p, q, base=2, axis=-1) ** 2, rtol=1e-9)


def test_crps_closed_forms():
    true = np.zeros((4, 4))
    assert metrics.crps(np.full((1, 4, 4), 3.0), true) == 3  # one member: absolute error
    assert metrics.crps(np.stack([true - 1, true + 1]), true) == pytest.approx(1 - 1)  # fair: the pair's spread is 2
    ensemble, field = noise(0, 7, 5, 6, 6), noise(1, 7, 6, 6)
    pairs = np.abs(ensemble[:, :, None] - ensemble[:, None]).sum((1, 2)) / (2 * 5 * 4)
    expected = (np.abs(ensemble - field[:, None]).mean(1) - pairs).mean((-2, -1))
    np.testing.assert_allclose(metrics.crps(ensemble, field), expected, rtol=1e-12)


def test_crps_of_a_normal_ensemble_tends_to_the_integral():
    ensemble = noise(0, 8, 400, 400)
    expected = np.sqrt(2 / np.pi) - np.sqrt(1 / np.pi)  # E|X − 0| − E|X − X'| / 2 for X ~ N(0, 1)
    assert metrics.crps(ensemble, np.zeros((400, 400))) == pytest.approx(expected, abs=2e-3)


def test_spread_and_skill_by_hand():
    ensemble = np.stack([np.full((2, 2), value) for value in (1.0, 2.0, 6.0)])
    found = metrics.spread_skill(ensemble, np.full((2, 2), 1.0))
    assert found.spread == pytest.approx(np.sqrt(4 / 3 * 7))  # variance (4 + 1 + 9) / 2
    assert found.skill == pytest.approx(2)  # the mean is 3
    assert found.ratio == pytest.approx(np.sqrt(28 / 3) / 2)
    collapsed = metrics.spread_skill(np.ones((2, 4, 4)), np.ones((4, 4)))
    assert np.isfinite(collapsed.ratio)
    assert metrics.spread_skill(noise(0, 7, 5, 6, 6), noise(1, 7, 6, 6)).ratio.shape == (7,)


def test_ranks_by_hand_and_ties_in_equal_parts():
    members = np.array([1.0, 2.0, 2.0, 3.0])[:, None, None] * np.ones((1, 5))
    true = np.array([[0.5, 1.5, 2.0, 3.0, 9.0]])  # ranks 0, 1, 1 to 3, 3 to 4, 4
    expected = np.array([1, 1 + 1 / 3, 1 / 3, 1 / 3 + 1 / 2, 1 / 2 + 1]) / 5
    np.testing.assert_allclose(metrics.rank_histogram(members, true), expected)
    constant = metrics.rank_histogram(np.ones((7, 3, 4, 4)), np.ones((7, 4, 4)))
    np.testing.assert_allclose(constant, np.full((7, 4), 1 / 4))


def test_ranks_equal_those_with_ties_broken_at_random_on_average():
    rng = np.random.default_rng(0)
    ensemble, true = rng.integers(0, 4, (6, 30, 30)), rng.integers(0, 4, (30, 30))
    jitter = [rng.uniform(0, 1e-3, (7, 30, 30)) for _ in range(300)]
    broken = [metrics.rank_histogram(ensemble + each[1:], true + each[0]) for each in jitter]
    np.testing.assert_allclose(metrics.rank_histogram(ensemble, true), np.mean(broken, axis=0), atol=3e-3)


# ------------------------------------------------------------------------------------------------------------ spectra


@pytest.mark.parametrize(("kx", "ky", "shell"), [(3, 0, 3), (0, 7, 7), (3, 4, 5), (2, 2, 3), (1, 1, 1)])
@pytest.mark.parametrize("length", [1.0, 2 * np.pi])
def test_one_wave_fills_one_shell_with_its_exact_energy(kx, ky, shell, length):
    x, y = grid(32, length)
    amplitude, wave = 2.5, 2 * np.pi / length
    vorticity = amplitude * np.cos(wave * (kx * x + ky * y) + 0.4)
    expected = np.zeros(16)
    expected[shell - 1] = amplitude**2 / 4 / (wave**2 * (kx**2 + ky**2))
    np.testing.assert_allclose(metrics.energy_spectrum(vorticity, length), expected, atol=1e-15)
    np.testing.assert_allclose(metrics.enstrophy_spectrum(vorticity)[shell - 1], amplitude**2 / 4)


@pytest.mark.parametrize("num_grid", [32, 33])
def test_parseval(num_grid):
    vorticity = power_law_field(-3, num_grid, cutoff=12)
    index = 2 * np.pi * np.fft.fftfreq(num_grid, 1 / num_grid)
    kx, ky = index[:, None], index[None]
    square = kx**2 + ky**2
    square[0, 0] = np.inf
    psi = np.fft.fft2(vorticity) / square
    u, v = np.fft.ifft2(1j * ky * psi).real, np.fft.ifft2(-1j * kx * psi).real
    assert metrics.energy_spectrum(vorticity).sum() == pytest.approx(0.5 * (u**2 + v**2).mean(), rel=1e-12)
    assert metrics.enstrophy_spectrum(vorticity).sum() == pytest.approx(metrics.enstrophy(vorticity), rel=1e-12)


def test_white_noise_puts_its_share_into_every_shell():
    spectrum = metrics.enstrophy_spectrum(noise(0, 64, 64, 64)).mean(0)
    waves = [(i, j) for i in range(-32, 32) for j in range(-32, 32)]
    counts = np.array([sum(k - 0.5 <= np.hypot(*wave) < k + 0.5 for wave in waves) for k in range(1, 33)])
    np.testing.assert_allclose(spectrum[4:], 0.5 * counts[4:] / 64**2, rtol=0.15)  # 64 fields leave 1 to 4 % of noise
    assert spectrum.sum() == pytest.approx(0.5 * np.pi / 4, rel=0.04)  # without corners: a disc's share of its square


def test_energy_error_and_log_ratios():
    true = np.arange(16, 0, -1.0) * np.ones((3, 1))
    np.testing.assert_allclose(metrics.energy_error(5 * true, true), np.log(5))
    np.testing.assert_allclose(metrics.mean_log_ratio(10 * true, true), 1)
    np.testing.assert_allclose(metrics.weighted_log_ratio(true / 10, true), 1)
    half = np.where(np.arange(16) < 8, 10 * true, true)
    np.testing.assert_allclose(metrics.mean_log_ratio(half, true), 0.5)
    np.testing.assert_allclose(metrics.weighted_log_ratio(half, true), true[0, :8].sum() / true[0].sum())


@pytest.mark.parametrize("slope", [-3, -5 / 3, -8])
def test_slope_is_recovered_and_comes_with_its_band(slope):
    found = metrics.spectral_slope(metrics.energy_spectrum(power_law_field(slope, 128)), (4, 40))
    assert found.slope == pytest.approx(slope, abs=1e-9)
    assert (found.low, found.high) == (4, 40)
    steep, shallow = (metrics.energy_spectrum(power_law_field(s, 64)) for s in (-4, slope))
    assert metrics.slope_error(steep, shallow, (4, 16)) == pytest.approx(abs(slope + 4), abs=1e-9)


@pytest.mark.parametrize("num_grid", [4, 8, 16, 32, 64, 256, 512])
def test_default_band_fits_every_grid(num_grid):
    low, high = metrics.slope_band(num_grid)
    assert 1 <= low < high <= num_grid // 2


def test_hann_window_recovers_a_steep_slope_that_a_raw_patch_misses():
    field = np.stack([power_law_field(-6, 256, seed) for seed in range(3)])
    band = (10, 20)
    windowed = metrics.patch_spectrum(field, 64).mean(0)
    raw = np.mean([metrics.energy_spectrum(f[i : i + 64, i : i + 64]) for f in field for i in (0, 64, 128)], axis=0)
    assert metrics.spectral_slope(windowed, band).slope == pytest.approx(-6, abs=0.1)
    assert metrics.spectral_slope(raw, band).slope > -4


def test_window_keeps_the_power_and_drops_the_mean():
    field = noise(0, 512, 512)
    scaled = metrics.patch_spectrum(field, 32, length=1.0)[4:14]
    plain = metrics.energy_spectrum(field.reshape(16, 32, 16, 32).swapaxes(1, 2), 1 / 16).mean((0, 1))[4:14]
    np.testing.assert_allclose(scaled, plain, rtol=0.1)
    np.testing.assert_allclose(metrics.patch_spectrum(field + 100, 32), metrics.patch_spectrum(field, 32), rtol=1e-9)


# ------------------------------------------------------------------------------------------- patches, floors, intervals


def test_border_jump():
    x, y = grid(32)
    smooth = np.sin(2 * np.pi * x) * np.cos(2 * np.pi * y)
    assert metrics.border_jump(smooth, 8) == pytest.approx(1, abs=0.05)
    offsets = np.kron(noise(0, 4, 4), np.ones((8, 8)))
    assert metrics.border_jump(smooth + offsets, 8) > 5
    steps = np.kron(np.arange(4) % 2, np.ones(8))[:, None] + 0.5 * (np.arange(32) % 2)[None]
    # borders: 16 jumps of 1 and half of 0.5; inside: none along x, 0.5 along y
    assert metrics.border_jump(steps, 8) == pytest.approx(np.sqrt((1 + 0.25) / 2) / np.sqrt(0.25 / 2))


def test_noise_floor_averages_all_pairs_or_some():
    fields = noise(0, 5, 2, 8, 8)
    floor = metrics.noise_floor(lambda a, b: {"nrmse": metrics.nrmse(a, b)}, fields)
    pairs = [metrics.nrmse(fields[i], fields[j]) for i in range(5) for j in range(i + 1, 5)]
    np.testing.assert_allclose(floor["nrmse"], np.mean(pairs, axis=0))
    calls = []
    metrics.noise_floor(lambda a, b: calls.append(1) or {"x": a.mean((1, 2))}, fields, max_pairs=3)
    assert len(calls) == 3


def test_bootstrap_covers_the_mean_and_is_seeded():
    covered = 0
    for seed in range(100):
        interval = metrics.bootstrap(noise(seed, 30, 2) + 1, num_resamples=400)
        covered += ((interval.low < 1) & (interval.high > 1)).sum()
    assert 0.88 <= covered / 200 <= 0.99
    values = noise(0, 6, 3)
    first, second = metrics.bootstrap(values, seed=1), metrics.bootstrap(values, seed=1)
    np.testing.assert_array_equal(first.low, second.low)
    np.testing.assert_array_equal(first.mean, values.mean(0))
    constant = metrics.bootstrap(np.ones(4))
    assert constant.low == pytest.approx(1)
    assert constant.high == pytest.approx(1)


# --------------------------------------------------------------------------------------------- invariances, edge cases

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(-16, 16), st.integers(-16, 16), st.sampled_from([1, -1]))
def test_translation_and_sign_change_no_score(seed, dx, dy, sign):
    predicted, true = np.random.default_rng(seed).standard_normal((2, 16, 16))
    moved = [sign * np.roll(field, (dx, dy), axis=(0, 1)) for field in (predicted, true)]
    for function in PAIR_METRICS.values():
        np.testing.assert_allclose(function(*moved), function(predicted, true), rtol=1e-9, atol=1e-12)
    before, after = (metrics.energy_spectrum(field) for field in (predicted, moved[0]))
    np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(metrics.energy_spectrum(predicted.T), before, rtol=1e-9, atol=1e-15)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(2, 12), st.floats(0.1, 10), st.sampled_from([0.0, 0.5]))
def test_an_ensemble_that_knows_the_truths_distribution_is_reliable(seed, members, scale, level):
    """Members and truth of one distribution about a mean of each point, quantised (so that there are ties) or not."""
    rng = np.random.default_rng(seed)
    means = scale * rng.standard_normal((128, 128))
    fields = means + scale * rng.standard_gamma(2.0, (members + 1, 128, 128))
    if level:
        fields = np.floor(fields / (level * scale))
    found = metrics.spread_skill(fields[1:], fields[0])
    assert found.ratio == pytest.approx(1, abs=0.06)
    ranks = metrics.rank_histogram(fields[1:], fields[0])
    assert ranks.sum() == pytest.approx(1)
    np.testing.assert_allclose(ranks, 1 / (members + 1), atol=0.02)
    sure = metrics.rank_histogram(means + (fields[1:] - means) / 4, fields[0])
    assert sure[0] + sure[-1] > ranks[0] + ranks[-1] + 0.1 or members == 2


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(1e-3, 1e3))
def test_scores_do_not_depend_on_the_unit(seed, unit):
    predicted, true = np.random.default_rng(seed).standard_normal((2, 16, 16))
    for function in PAIR_METRICS.values():
        np.testing.assert_allclose(function(unit * predicted, unit * true), function(predicted, true), rtol=1e-9)
    spectra = [metrics.energy_spectrum(field) for field in (predicted, true)]
    for function in SPECTRUM_METRICS.values():
        np.testing.assert_allclose(function(*(unit * s for s in spectra)), function(*spectra), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("collapsed", [0.0, 0.1])
@pytest.mark.parametrize("which", [0, 1, (0, 1)])
def test_collapsed_fields_score_finite_and_capped(collapsed, which):
    fields = noise(0, 2, 16, 16)
    fields[np.atleast_1d(which)] = collapsed
    scores = {name: function(*fields) for name, function in PAIR_METRICS.items()}
    spectra = metrics.energy_spectrum(fields)
    scores |= {name: function(*spectra) for name, function in SPECTRUM_METRICS.items()}
    scores["jensen_shannon"] = metrics.jensen_shannon(*metrics.histogram(fields, -4, 4))
    scores["border_jump"] = metrics.border_jump(fields[0], 4)
    assert all(np.isfinite(score) for score in scores.values()), scores
    assert scores["correlation"] == 0
    cap = -np.log(metrics.RELATIVE_FLOOR)
    assert all(scores[name] <= cap + 1e-9 for name in ("enstrophy_error", "variance_error", "energy_error"))
    if which == (0, 1):
        assert all(score == 0 for name, score in scores.items() if name != "border_jump"), scores
        assert scores["border_jump"] == 1


def test_bad_input_is_refused():
    good, spectrum = noise(0, 16, 16), np.ones(8)
    bad = good.copy()
    bad[3, 4] = np.nan
    for function in (metrics.enstrophy, metrics.energy_spectrum, metrics.enstrophy_spectrum):
        with pytest.raises(ValueError, match=r"vorticity\[3, 4\] = nan"):
            function(bad)
        with pytest.raises(ValueError, match="expected"):
            function(np.ones(5))
    for function in PAIR_METRICS.values():
        with pytest.raises(ValueError, match="one shape"):
            function(good, good[:8])
        with pytest.raises(ValueError, match="finite"):
            function(good, bad)
    for function in SPECTRUM_METRICS.values():
        for other in (np.ones(7), np.full(8, np.inf), -spectrum):
            with pytest.raises(ValueError, match="spectrum"):
                function(spectrum, other)
    refused = {
        r"\(\.\.\., N, N\)": lambda: metrics.energy_spectrum(noise(0, 16, 8)),
        "band": lambda: metrics.spectral_slope(spectrum, (4, 9)),
        "bins": lambda: metrics.histogram(good, 1, 1),
        "probabilities": lambda: metrics.jensen_shannon([0.5, 0.4], [0.5, 0.5]),
        "M, X, Y": lambda: metrics.crps(good, good),
        r"expected \(\.\.\., M, X, Y\)": lambda: metrics.rank_histogram(good[None], good[:8]),
        "1 member; a spread needs": lambda: metrics.spread_skill(good[None], good),
        "patch_size": lambda: metrics.patch_spectrum(good, 5),
        "patch_size = 1": lambda: metrics.border_jump(good, 1),
        "at least two": lambda: metrics.bootstrap(np.ones((1, 3))),
        "confidence": lambda: metrics.bootstrap(np.ones((3, 3)), confidence=1),
        "independent": lambda: metrics.noise_floor(lambda a, b: {}, good[None, None]),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
