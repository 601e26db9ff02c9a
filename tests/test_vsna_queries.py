"""What is asked of a solved field at scale: distributions over random points, and parameters from observed values."""

import math

import pytest
import torch

from leviathan.vsna import ParameterFit, SweepResult
from leviathan.vsna.sweep import BLOCK, NUM_BINS, StreamingSums
from sna_core import Axis
from tests.test_vsna import AXES, build, each_form, exact, points

# Sweeps.


def test_statistics_of_a_closed_form():
    """u = 3 x + 1 for x uniform in [0, 1], with a and b held or drawn to no effect."""
    axes = [Axis("x", 0, 1, num_cells=2, degree=1), Axis("a", -1, 1, num_cells=1, degree=0)]
    model = build(axes=axes, components=[[lambda x: 3 * x + 1, torch.ones_like]])
    num_samples = 200_000
    result = model.sweep(None, num_samples, quantiles=(0.0, 0.1, 0.5, 0.9, 1.0))
    assert isinstance(result, SweepResult)
    error = 5 / math.sqrt(num_samples)
    assert result.mean == pytest.approx(2.5, abs=error)
    assert result.standard_deviation == pytest.approx(3 / math.sqrt(12), abs=error)
    assert (result.minimum, result.maximum) == (pytest.approx(1, abs=1e-4), pytest.approx(4, abs=1e-4))
    assert result.quantiles[0] == pytest.approx(result.minimum, abs=result.resolution)
    assert result.quantiles[4] == pytest.approx(result.maximum, abs=result.resolution)
    assert result.quantiles[1:4] == pytest.approx((1.3, 2.5, 3.7), abs=2 * error)
    assert result.levels == (0.0, 0.1, 0.5, 0.9, 1.0)
    assert result.counts.sum() == result.num_samples == num_samples
    assert len(result.edges) == len(result.counts) + 1
    assert result.resolution <= 4 * (result.maximum - result.minimum) / NUM_BINS
    assert result.seconds > 0


@each_form
def test_sums_do_not_depend_on_the_batch(form):
    model = build(form)
    num_samples = BLOCK + 5000
    whole = model.sweep(None, num_samples, seed=3)
    parts = model.sweep(None, num_samples, seed=3, batch_size=9999)
    for name in ("mean", "standard_deviation", "minimum", "maximum", "quantiles"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-6)
    assert model.sweep(None, num_samples, seed=4).mean != whole.mean
    assert model.sweep(None, num_samples, seed=3).mean == whole.mean


def test_sweep_is_that_of_all_values():
    model = build()
    drawn = []

    def sampler(count, generator):
        drawn.append(points(count, seed=len(drawn)))
        return drawn[-1]

    result = model.sweep(sampler, 2 * BLOCK + 77, quantiles=(0.05, 0.3, 0.95), dtype=torch.float64)
    values = exact(torch.cat(drawn))
    assert [len(block) for block in drawn] == [BLOCK, BLOCK, 77]
    assert result.mean == pytest.approx(values.mean().item(), rel=1e-12)
    assert result.standard_deviation == pytest.approx(values.std().item(), rel=1e-12)
    assert (result.minimum, result.maximum) == pytest.approx((values.min().item(), values.max().item()))
    ranked = values.sort().values
    for level, quantile in zip(result.levels, result.quantiles, strict=True):
        assert quantile == pytest.approx(ranked[int(level * len(values))].item(), abs=result.resolution)
    above = torch.searchsorted(ranked, result.edges[1:], right=True)
    assert (result.counts.cumsum(0) - above).abs().max() <= 2  # a value on an edge may fall on either side


def test_axes_held_and_drawn_by_themselves():
    model = build()
    seen = []

    def record(table, x):
        seen.append(x)
        return table(x)

    settings = {"x": 0.25, "t": (0.5, 1.0), "nu": lambda count, generator: torch.full((count,), 0.2)}
    result = model.sweep(settings, 1000, statistic=record, batch_size=400)
    (x, t, nu) = torch.cat(seen).unbind(-1)
    assert [len(part) for part in seen] == [400, 400, 200]
    assert (x == 0.25).all()
    assert (nu == torch.tensor(0.2).double()).all()
    assert 0.5 <= t.min() < 0.51
    assert 0.99 < t.max() <= 1.0
    assert result.mean == pytest.approx(exact(torch.cat(seen)).mean().item(), rel=1e-5)


def test_a_statistic_takes_the_place_of_the_field():
    model = build("tensor_train")
    result = model.sweep(None, 5000, statistic=lambda table, x: (table(x) > 1).float())
    assert result.mean == pytest.approx((exact(points(5000)) > 1).double().mean().item(), abs=0.05)
    assert (result.minimum, result.maximum) == (0.0, 1.0)


@pytest.mark.parametrize(
    "values", [[0.0], [-7.0, -7.0], [0.0, 1e-9, 1.0, -1e6, 1e3], [1e150, 2e150], [5.0, 5.0 + 1e-15]]
)
def test_a_histogram_grows_with_its_values(values):
    sums = StreamingSums()
    for value in values:
        sums.add(torch.tensor([value], dtype=torch.float64))
    result = sums.result((0.0, 1.0), 0.0)
    assert result.counts.sum() == len(values)
    assert result.mean == pytest.approx(sum(values) / len(values))
    assert result.quantiles[0] == pytest.approx(min(values), abs=result.resolution)
    assert result.quantiles[1] == pytest.approx(max(values), abs=result.resolution)
    assert result.edges[0] <= min(values)
    assert result.edges[-1] >= max(values) - abs(max(values)) * 1e-15
    if len(set(values)) > 2:
        assert result.resolution <= 4 * (max(values) - min(values)) / NUM_BINS


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ({"y": 1.0}, {}, r"the sampler names \['y'\], which are no axes"),
        ({"t": 2.5}, {}, r"t\[0\] = 2\.5 lies outside axis 't'"),
        ({"t": (1.0, 2.5)}, {}, "lies outside axis 't'"),
        ({"t": (1.0, 0.5)}, {}, "expected finite numbers, the lower one first"),
        ({"t": "all"}, {}, "expected a number, an interval"),
        ({"t": lambda count, generator: torch.zeros(3)}, {}, r"axis 't' drew \(3,\); expected \(10,\)"),
        (lambda count, generator: points(3), {}, r"the sampler drew \(3, 3\); expected \(10, num_axes\)"),
        (lambda count, generator: points(count)[:, :2], {}, "a column for each"),
        (None, {"num_samples": 0}, "num_samples = 0"),
        (None, {"batch_size": 0}, "batch_size = 0"),
        (None, {"batch_size": BLOCK + 1}, f"expected an integer from 1 to {BLOCK}"),
        (None, {"quantiles": (0.5, 1.5)}, "expected levels from 0 to 1"),
        (None, {"statistic": lambda table, x: table(x).sum()}, r"has shape \(\); expected \(10,\)"),
        (None, {"statistic": lambda table, x: table(x) / 0}, "the quantity is not finite at"),
    ],
)
def test_bad_sweeps_raise(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        build().sweep(sampler, **({"num_samples": 10} | options))


# Parameters from observations.


def observations(num, unknown, truth, seed=0):
    x = points(num, seed=seed)
    for name, value in zip(unknown, truth, strict=True):
        x[:, [axis.name for axis in AXES].index(name)] = value
    at = {axis.name: x[:, i] for i, axis in enumerate(AXES) if axis.name not in unknown}
    return exact(x), at


@each_form
@pytest.mark.parametrize(
    ("num", "unknown", "truth"),
    [(1, ["nu"], [0.23]), (300, ["nu"], [0.15]), (2, ["nu", "x"], [0.2, 0.4]), (50, ["t", "nu"], [1.3, 0.27])],
)
def test_parameters_are_recovered(form, num, unknown, truth):
    values, at = observations(num, unknown, truth)
    found = build(form).invert(values, at, unknown)
    assert isinstance(found, ParameterFit)
    assert found.names == tuple(unknown)
    assert found.converged[0]
    assert found.misfit[0] < 1e-8
    same = found.x[found.misfit < 1e-8]
    torch.testing.assert_close(
        same[(same - torch.tensor(truth)).norm(dim=1).argmin()], torch.tensor(truth).double(), rtol=0, atol=1e-6
    )
    if num > len(unknown):
        assert list(found.best.values()) == pytest.approx(truth, abs=1e-6)


@each_form
def test_noise_gives_the_least_squares(form):
    values, at = observations(400, ["t", "nu"], [1.2, 0.2])
    model = build(form)
    noisy = values + 1e-3 * torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = model.invert(noisy, at)
    assert found.names == ("t", "nu")
    assert found.converged[0]
    assert found.misfit[0] == pytest.approx(1e-3, rel=0.1)
    assert list(found.best.values()) == pytest.approx([1.2, 0.2], abs=3e-3)
    best = found.x[0].clone().requires_grad_()

    def misfit(p):
        x = torch.stack([at["x"], p[0].expand(400), p[1].expand(400)], -1)
        return (exact(x) - noisy).square().mean().sqrt()

    assert misfit(best).item() == pytest.approx(found.misfit[0].item(), rel=1e-9)
    (slope,) = torch.autograd.grad(misfit(best), best)
    assert slope.abs().max() < 1e-6
    nearby = best.detach() + 1e-2 * torch.randn(200, 2, dtype=torch.float64)
    assert min(misfit(p) for p in nearby if 0.1 <= p[1] <= 0.3) > found.misfit[0]


def test_a_minimum_at_the_end_of_an_interval():
    values, at = observations(60, ["nu"], [0.3])
    found = build().invert(1.5 * values, at)
    assert found.best["nu"] == 0.3
    assert found.converged[0]
    assert found.misfit[0] > 0.1


def test_an_unknown_that_the_values_do_not_show():
    """At x = 0 the field is zero, whatever nu is."""
    found = build().invert([0.5, 0.6, 0.7], {"x": 0.0, "t": [0.5, 1.0, 1.5]})
    assert not found.converged.any()
    assert found.misfit.isfinite().all()


def test_a_fit_is_the_same_again_and_feeds_a_slice():
    model = build()
    values, at = observations(20, ["nu"], [0.25])
    found, again = model.invert(values, at), model.invert(values, at)
    assert torch.equal(found.x, again.x)
    smaller = model.slice(**found.best)
    torch.testing.assert_close(smaller(torch.stack([at["x"], at["t"]], -1)), values, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("values", "at", "options", "message"),
    [
        ([1.0], {"x": 0.5}, {"unknown": ["nu"]}, r"at names the axes \['x'\] and unknown \['nu'\]; expected each of"),
        ([1.0], {"x": 0.5, "t": 1.0, "nu": 0.2}, {}, "at least one unknown"),
        ([1.0], {"x": 0.5, "t": 1.0}, {"unknown": ["nu", "t"]}, "expected each of"),
        ([1.0], {"x": 0.5, "y": 1.0}, {}, "expected each of"),
        ([1.0, 2.0], {"x": [0.1, 0.2, 0.3], "t": 1.0}, {}, r"at has x of shape \(3,\); expected one number or one for"),
        ([1.0, 2.0], {"x": [0.1, 1.2], "t": 1.0}, {}, r"x\[1\] = 1\.2 lies outside axis 'x', \[0, 1\]"),
        ([1.0], {"x": 0.1, "t": 2.2}, {}, r"t = 2\.2 lies outside axis 't'"),
        ([1.0, math.nan], {"x": 0.1, "t": 1.0}, {}, "all finite"),
        ([], {"x": 0.1, "t": 1.0}, {}, "at least one"),
        ([1.0], {"x": 0.1, "t": 1.0}, {"num_starts": 0}, "num_starts = 0"),
        ([1.0], {"x": 0.1, "t": 1.0}, {"tolerance": 0.0}, "tolerance = 0"),
    ],
)
def test_bad_observations_raise(values, at, options, message):
    with pytest.raises(ValueError, match=message):
        build().invert(values, at, **options)
