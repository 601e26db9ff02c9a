"""KHRONOS: what a fit finds, its derivatives, inverse and uncertainty, and the contract of a transformers model."""

import math
import warnings

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

import leviathan
from leviathan import KhronosConfig, KhronosModel
from leviathan.khronos import KhronosFit, KhronosOutput
from sna_core.network import CPNetwork
from sna_core.prior import GaussianPrior

LOW, HIGH = [0.0, -1.0, 10.0], [1.0, 1.0, 30.0]


def points(num_points, seed=0):
    low, high = np.array(LOW), np.array(HIGH)
    return low + (high - low) * np.random.default_rng(seed).random((num_points, 3))


def smooth(x):
    return 400 + 50 * (np.sin(2 * x[:, 0]) * np.exp(x[:, 1]) + x[:, 1] * np.cos(x[:, 2] / 10))


def build(**options):
    torch.manual_seed(0)
    settings = {"input_low": LOW, "input_high": HIGH, "rank": 2, "num_cells": 4, "degree": 3} | options
    return KhronosModel(KhronosConfig(**settings)).double()


@pytest.fixture(scope="module")
def fitted():
    """A model of two outputs in float64, continued outside, with uncertainty. Not to be changed."""
    x = points(300)
    noise = np.random.default_rng(1).standard_normal((300, 2))
    model = build(num_outputs=2, extrapolate="linear")
    model.fit(x, np.stack([smooth(x), -3 * x[:, 2] * x[:, 0]], 1) + noise, uncertainty=True, num_restarts=4)
    return model


def test_finds_a_spline_of_rank_two():
    axes = [torch.linspace(low, high, 9, dtype=torch.float64) for low, high in zip(LOW, HIGH, strict=True)]
    x = torch.cartesian_prod(*axes)
    torch.manual_seed(0)
    target = CPNetwork(3, rank=2, num_cells=4, degree=3, low=LOW, high=HIGH, unit_weights=True, dtype=torch.float64)
    with (
        torch.no_grad()
    ):  # on the grid of mean zero: a model takes the mean of y out, which would be one more component
        target.factors[0] -= target.subatoms(x)[0].mean(0)
        y = 5 + 100 * target(x)[:, 0]
        new = torch.as_tensor(points(500))
        expected = 5 + 100 * target(new)[:, 0]
    model = build()
    result = model.fit(x, y, ridge=1e-13)
    assert isinstance(result, KhronosFit)
    assert result.converged
    assert result.train_rmse.item() < 2e-6 * y.std()
    assert (model.predict(new) - expected).abs().max() < 1e-5 * y.std()
    assert result.notes == ()


def test_the_example_of_the_design():
    x = points(400)
    y = smooth(x)
    low, high = x.min(0).tolist(), x.max(0).tolist()
    model = KhronosModel(KhronosConfig(input_low=low, input_high=high, rank=4, num_cells=8, degree=3))
    model.fit(x, y)
    found = model.invert(target=399.9, num_starts=64)
    assert found.converged.sum() > 30
    assert found.residual[found.converged].max() <= 1e-6
    tolerance = 1e-5 * np.ptp(y)  # of float32
    np.testing.assert_allclose(model.predict(found.solutions.numpy()), 399.9, atol=tolerance)


def test_fit_result_and_buffers_have_the_units_of_y():
    x = points(200)
    y = smooth(x)
    model = build(rank=3)
    result = model.fit(x, y, validation=0.25, num_restarts=2)
    held_out, data = 50, 150
    assert result.validation_rmse.item() < 0.1 * y.std()
    assert model.output_scale.item() == pytest.approx(y.std(), rel=0.2)
    assert model.num_fitted == 3 * 7 * 3 + 2 == model.num_parameters() + 2
    explicit = model.fit(x[:data], y[:data], validation=(x[-held_out:], y[-held_out:]), num_restarts=2)
    error = model.predict(x[-held_out:]) - y[-held_out:]
    assert explicit.validation_rmse.item() == pytest.approx(math.sqrt((error**2).mean()))
    error = model.predict(x[:data]) - y[:data]
    assert explicit.train_rmse.item() == pytest.approx(math.sqrt((error**2).mean()))
    assert (model.output_low.item(), model.output_high.item()) == (y[:data].min(), y[:data].max())


def test_the_units_of_x_and_y_do_not_matter():
    x, new = points(150), points(50, seed=1)
    y = smooth(x)
    model = build()
    model.fit(x, y, num_restarts=2)
    ends = {"input_low": [1e6 * v for v in LOW], "input_high": [1e6 * v for v in HIGH]}
    scaled = KhronosModel(KhronosConfig(**ends, rank=2, num_cells=4)).double()
    scaled.fit(1e6 * x, 1e-9 * y - 7e-6, num_restarts=2)
    expected = 1e-9 * model.predict(new) - 7e-6
    np.testing.assert_allclose(scaled.predict(1e6 * new), expected, rtol=1e-6, atol=1e-6 * 1e-9 * y.std())


def test_a_weight_of_two_is_the_point_twice():
    x = points(80)
    y = smooth(x)
    weight = np.random.default_rng(0).integers(0, 4, len(x))
    weighted, repeated = build(), build()
    weighted.fit(x, y, sample_weight=weight, ridge=1e-6, num_restarts=1)
    repeated.fit(x.repeat(weight, 0), y.repeat(weight), ridge=1e-6, num_restarts=1)
    np.testing.assert_allclose(weighted.predict(x), repeated.predict(x), rtol=1e-6)
    x[weight == 0] = x[weight > 0][0]
    y[weight == 0] = 1e9  # left out
    again = build()
    again.fit(x, y, sample_weight=weight, ridge=1e-6, num_restarts=1)
    np.testing.assert_allclose(again.predict(points(20)), weighted.predict(points(20)), rtol=1e-6)


def test_tables_come_back_as_they_went_in(fitted):
    x = points(7)
    assert isinstance(fitted.predict(x), np.ndarray)
    assert isinstance(fitted.predict(x.tolist()), np.ndarray)
    tensor = fitted.predict(torch.as_tensor(x).requires_grad_())
    assert isinstance(tensor, torch.Tensor)
    assert not tensor.requires_grad
    np.testing.assert_array_equal(fitted.predict(x), tensor.numpy())
    np.testing.assert_array_equal(fitted.predict(x[::-1]), tensor.numpy()[::-1])
    frozen = x.copy()
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(fitted.predict(frozen), tensor.numpy())
    assert fitted.predict(x).shape == (7, 2)
    assert fitted.gradient(x).shape == (7, 2, 3)
    assert fitted.hessian(x).shape == (7, 2, 3, 3)
    assert fitted.predict(x[:0]).shape == (0, 2)
    single = build()
    assert single.predict(x).shape == (7,)
    assert single.gradient(x).shape == (7, 3)
    assert single.hessian(x).shape == (7, 3, 3)


def test_long_tables_are_predicted_in_parts(fitted, monkeypatch):
    x = points(20)
    expected = fitted.predict(x), fitted.gradient(x)
    monkeypatch.setattr("leviathan.khronos.tables.ROWS_AT_ONCE", 7)
    np.testing.assert_array_equal(fitted.predict(x), expected[0])
    np.testing.assert_array_equal(fitted.gradient(x), expected[1])


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_derivatives_are_those_of_autograd(fitted, where):
    x = torch.as_tensor(points(12))
    if where == "outside":
        x = x + 2 * (x - x.mean(0))  # in some inputs, all or none
        assert ((x < x.new_tensor(LOW)) | (x > x.new_tensor(HIGH))).any(1).sum() > 5
    for n, point in enumerate(x):
        for o in range(2):

            def f(p, o=o):
                return fitted(p).prediction[o]

            gradient = torch.autograd.functional.jacobian(f, point)
            torch.testing.assert_close(fitted.gradient(x)[n, o], gradient, rtol=1e-9, atol=1e-9)
            hessian = torch.autograd.functional.hessian(f, point)
            torch.testing.assert_close(fitted.hessian(x)[n, o], hessian, rtol=1e-9, atol=1e-9)


def test_linear_continuation(fitted):
    edge = torch.tensor([[1.0, 0.2, 30.0]], dtype=torch.float64)
    way = torch.tensor([[0.7, 0.0, 5.0]], dtype=torch.float64)
    slope = (fitted.gradient(edge) * way.unsqueeze(1)).sum(-1)
    for t in (0.0, 1e-9, 1.0, 3.0):
        torch.testing.assert_close(fitted.predict(edge + t * way), fitted.predict(edge) + t * slope)
    inside = points(9)
    strict = build(num_outputs=2)
    strict.load_state_dict(fitted.state_dict(), strict=False)
    np.testing.assert_array_equal(fitted.predict(inside), strict.predict(inside))
    with pytest.raises(ValueError, match=r"x\[0, 0\] = 1\.7 lies outside input 0's interval \[0, 1\]"):
        strict.predict(edge + way)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_exact(fitted, dtype, tmp_path):
    model = KhronosModel(fitted.config)
    model.load_state_dict(fitted.state_dict())
    model.to(dtype).save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is KhronosModel
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    assert loaded.dtype == dtype
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    x = points(20)
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))
    np.testing.assert_array_equal(loaded.predict_std(x), model.predict_std(x))
    target = [450.0, None]
    assert torch.equal(loaded.invert(target).x, model.invert(target).x)


def test_what_a_checkpoint_lacks_is_set():
    model = build(num_outputs=2)
    state = {"network.factors": model.network.factors.detach()}
    loaded, info = KhronosModel.from_pretrained(None, config=model.config, state_dict=state, output_loading_info=True)
    assert info["missing_keys"] == {"output_shift", "output_scale", "output_low", "output_high"}
    assert torch.equal(loaded.output_scale, torch.ones_like(loaded.output_scale))
    assert torch.equal(loaded.output_shift, torch.zeros_like(loaded.output_shift))


def test_forward_is_the_network_in_the_units_of_y(fitted):
    x = torch.as_tensor(points(8)).view(2, 4, 3)
    output = fitted(x)
    assert isinstance(output, KhronosOutput)
    assert output.loss is None
    expected = fitted.output_shift + fitted.output_scale * fitted.network.reference_forward(x)
    torch.testing.assert_close(output.prediction, expected)
    labels = torch.randn_like(expected)
    output = fitted(x, labels)
    torch.testing.assert_close(output.loss, (expected - labels).square().mean())
    assert torch.equal(fitted(x, labels, return_dict=False)[0], output.loss)
    single = build()
    assert torch.equal(single(x, labels[..., 0]).loss, single(x, labels[..., :1]).loss)


def test_inversion_of_one_and_of_both_outputs(fitted):
    low, high = torch.tensor(LOW), torch.tensor(HIGH)
    size = fitted.output_high - fitted.output_low
    for target in ([430.0, None], [None, -20.0], [430.0, -20.0]):
        found = fitted.invert(target, tolerance=1e-9)
        assert found.converged.any()
        assert ((found.x >= low) & (found.x <= high)).all()
        error = (fitted.predict(found.x) - torch.tensor([v or math.nan for v in target])).abs() / size
        worst = error.nan_to_num(0.0).amax(-1)
        torch.testing.assert_close(worst, found.residual, rtol=1e-3, atol=1e-12)
        assert (worst[found.converged] <= 1e-9 * (1 + 1e-6) + 1e-12).all()
    assert torch.equal(found.x, fitted.invert(target, tolerance=1e-9).x)


def test_fixed_inputs_and_a_prior(fitted):
    found = fitted.invert([430.0, None], fixed={0: 0.5})
    assert found.converged.any()
    assert (found.x[:, 0] == 0.5).all()
    prior = GaussianPrior.independent([0.5, 0.0, 20.0], [0.1, 0.2, 2.0])
    nearest = fitted.invert([430.0, None], prior=prior)
    assert nearest.converged[0]
    others = fitted.invert([430.0, None], num_starts=500).solutions
    assert nearest.distance[0] <= prior.distance(others).min() + 1e-6


def test_a_target_out_of_reach_has_no_solution(fitted):
    found = fitted.invert([1e5, None])
    assert len(found.solutions) == 0
    assert found.residual.min() > 1


def test_level_set(fitted):
    found = fitted.level_set([430.0, None], 40)
    assert found.x.shape == (40, 3)
    size = (fitted.output_high - fitted.output_low)[0].item()
    assert ((fitted.predict(found.x)[:, 0] - 430).abs() <= 2e-6 * size).all()


def test_intervals_hold_what_they_say():
    rng = np.random.default_rng(0)
    rates = []
    for seed in range(3):
        x, new = points(200, seed=2 * seed), points(2000, seed=2 * seed + 1)
        y, truth = (smooth(t) + 10 * rng.standard_normal(len(t)) for t in (x, new))
        model = build()
        result = model.fit(x, y, uncertainty=True, num_restarts=4, seed=seed)
        assert result.noise.item() == pytest.approx(10, rel=0.2)
        interval = model.interval(new, level=0.9)
        np.testing.assert_array_equal(interval.prediction, model.predict(new))
        rates.append(((interval.lower <= truth) & (truth <= interval.upper)).mean())
    assert 0.85 < np.mean(rates) < 0.95
    wide = model.interval(new, level=0.99)
    assert (wide.lower < interval.lower).all()
    assert (wide.upper > interval.upper).all()


def test_uncertainty_grows_outside_and_without_a_step(fitted):
    edge, way = np.array([[1.0, 0.2, 30.0]]), np.array([[0.7, 0.0, 5.0]])
    stds = np.stack([fitted.predict_std(edge + t * way) for t in (0.0, 1e-9, 1.0, 3.0)])
    np.testing.assert_allclose(stds[0], stds[1], rtol=1e-6)
    assert (np.diff(stds[1:], axis=0) > 0).all()


def test_continued_uncertainty_is_that_of_the_continued_function(fitted):
    """Against the derivative of f in the factors by autograd."""
    x = torch.tensor([[1.3, 0.2, 40.0], [0.5, 0.1, 20.0]], dtype=torch.float64)
    factors = fitted.network.factors.detach()

    def f(factors):
        state = {"network.factors": factors}
        return torch.func.functional_call(fitted, state, (x,)).prediction

    jacobian = torch.autograd.functional.jacobian(f, factors)  # (points, outputs, inputs, basis, outputs, rank)
    for o in range(2):
        rows = jacobian[:, o, :, :, o].flatten(1) / fitted.output_scale[o]
        relative = (rows @ fitted.posterior[o]).norm(dim=-1)
        expected = fitted.noise[o] * (1 + relative.square()).sqrt()
        torch.testing.assert_close(fitted.predict_std(x)[:, o], expected)


def test_a_fit_without_uncertainty_forgets_the_old_one():
    x = points(60)
    model = build()
    model.fit(x, smooth(x), uncertainty=True, num_restarts=1)
    model.fit(x, smooth(x), num_restarts=1)
    assert model.config.uncertainty
    model.fit(x, smooth(x), uncertainty=False, num_restarts=1)
    assert "posterior" not in model.state_dict()
    with pytest.raises(ValueError, match="fit it with uncertainty=True"):
        model.interval(x)


def test_data_that_leave_something_open_are_fitted_and_named():
    x = points(10)
    with pytest.warns(UserWarning, match="10 points for 21 basis functions"):
        result = build().fit(x, smooth(x), num_restarts=1)
    assert np.isfinite(result.train_rmse.item())
    x = points(60)
    x[:, 1] = 0.25
    model = build()
    with pytest.warns(UserWarning, match="x is constant in column 1"):
        result = model.fit(x, smooth(x), num_restarts=1)
    assert len(result.notes) == 1
    x[:, 1] = -1.0
    assert np.isfinite(model.predict(x)).all()


@pytest.mark.filterwarnings("ignore:x is constant:UserWarning", "ignore:y is constant:UserWarning")
def test_one_point():
    model = build()
    with pytest.warns(UserWarning, match="1 points for 21 basis functions"):
        model.fit(points(1), [5.0], num_restarts=1)
    np.testing.assert_allclose(model.predict(points(3, seed=1)), 5.0)


@pytest.mark.parametrize("value", [0.0, 3.7, -1e12])
def test_constant_y_and_duplicate_rows(value):
    x = points(30).repeat(2, 0)
    model = build()
    with pytest.warns(UserWarning, match="y is constant in column 0"):
        model.fit(x, np.full(60, value), num_restarts=1)
    np.testing.assert_allclose(model.predict(points(20, seed=1)), value, rtol=1e-12, atol=1e-12)
    assert model.invert(value).converged.all()


def test_the_box_of_data():
    x = points(50)
    config = KhronosConfig.for_data(x, rank=3)
    assert config.input_low == x.min(0).tolist()
    assert config.input_high == x.max(0).tolist()
    assert config.rank == 3
    wide = KhronosConfig.for_data(torch.as_tensor(x), margin=0.1)
    np.testing.assert_allclose(wide.input_high, x.max(0) + 0.1 * np.ptp(x, 0))
    x[:, 1], x[:, 2] = 0.0, 1e20
    config = KhronosConfig.for_data(x)
    assert (config.input_low[1], config.input_high[1]) == (-0.5, 0.5)
    assert config.input_low[2] < 1e20 < config.input_high[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_low": [0.0]}, "input_low has 1 values and input_high 3"),
        ({"input_low": [], "input_high": []}, "at least|one of each"),
        ({"input_low": [0.0, 1.0, 10.0]}, r"input 1 has the interval \[1\.0, 1\.0\]; expected finite ends"),
        ({"input_high": [1.0, math.inf, 30.0]}, "expected finite ends"),
        ({"rank": 0}, "rank = 0; expected at least 1"),
        ({"num_outputs": 0}, "num_outputs = 0; expected at least 1"),
        ({"num_cells": 0}, "num_cells = 0"),
        ({"degree": 6}, "degree = 6"),
        ({"extrapolate": "clamp"}, "extrapolate"),
        ({"input_low": [0, "a", 1]}, "input_low"),
    ],
)
def test_bad_settings_raise(options, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        build(**options)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (points(9)[:, :2], np.ones(9), {}, r"x has shape \(9, 2\); expected \(rows, 3\)"),
        (points(9)[0], np.ones(1), {}, r"x has shape \(3,\)"),
        (points(9)[:0], np.ones(0), {}, "at least one row"),
        (points(9), np.ones(8), {}, "x has 9 rows and y has 8"),
        (points(9), np.ones((9, 2)), {}, r"y has shape \(9, 2\); expected \(rows, 1\)"),
        (np.where(np.eye(9, 3, k=-2), np.nan, points(9)), np.ones(9), {}, r"x\[2, 0\] = nan is not finite; drop"),
        (points(9), np.where(np.arange(9) == 4, -np.inf, 1.0), {}, r"y\[4, 0\] = -inf is not finite"),
        (points(9) + np.eye(9, 3), np.ones(9), {}, r"x\[\d, \d\] = .* lies outside input \d's interval"),
        (points(9), ["a"] * 9, {}, "y has the type .*; expected real numbers"),
        (points(9), np.ones(9) * 1j, {}, "expected real numbers"),
        (points(9), np.ones(9), {"sample_weight": np.ones(8)}, r"sample_weight has shape \(8,\); expected \(9,\)"),
        (points(9), np.ones(9), {"sample_weight": -np.ones(9)}, "sample_weight holds a negative number"),
        (points(9), np.ones(9), {"sample_weight": np.zeros(9)}, "zeros alone"),
        (points(9), np.ones(9), {"sample_weight": np.full(9, np.nan)}, r"sample_weight\[0\] = nan"),
        (points(9), np.ones(9), {"validation": 1.0}, "validation = 1.0 of 9 points; expected a fraction"),
        (points(9), np.ones(9), {"validation": 0.01}, "leaves a point on both sides"),
        (points(9), np.ones(9), {"validation": (points(4), np.ones(3))}, "x has 4 rows and y has 3"),
        (points(9), 1e300 * np.arange(9.0), {}, "y reaches 8e.300, too large"),
    ],
)
def test_bad_data_raise(x, y, options, message):
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.fit(x, y, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_points_raise(fitted):
    x = points(4)
    with pytest.raises(ValueError, match=r"x has shape \(3,\); expected two dimensions"):
        fitted.predict(x[0])
    with pytest.raises(ValueError, match=r"x has shape \(4, 2\)"):
        fitted.predict(x[:, :2])
    with pytest.raises(ValueError, match=r"nan is not a number"):
        fitted.predict(np.where(np.eye(4, 3), np.nan, x))
    with pytest.raises(ValueError, match="infinite"):
        fitted.predict(np.where(np.eye(4, 3), np.inf, x))
    with pytest.raises(ValueError, match=r"labels have shape \(4,\); expected \(4, 2\)"):
        fitted(torch.as_tensor(x), torch.ones(4))
    with pytest.raises(ValueError, match=r"level = 1\.0"):
        fitted.interval(x, level=1.0)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (430.0, {}, "target has 1 numbers for 2 outputs; give one for each, None"),
        ([None, None], {}, "expected numbers, at least one"),
        ([430.0, math.inf], {}, "expected numbers"),
        ([430.0, None], {"num_starts": 0}, "num_starts = 0"),
        ([430.0, None], {"tolerance": 0.0}, "tolerance = 0"),
        ([430.0, None], {"fixed": {0: 2.0}}, "fixed input 0 = 2.0 lies outside"),
        ([430.0, None], {"fixed": {3: 2.0}}, "fixed names input 3"),
    ],
)
def test_bad_targets_raise(fitted, target, options, message):
    with pytest.raises(ValueError, match=message):
        fitted.invert(target, **options)


def test_public_names():
    for name in ("KhronosConfig", "KhronosModel", "KhronosForClassification", "SnaConfig", "SnaModel"):
        assert name in leviathan.__all__
    assert type(AutoModel.from_config(KhronosConfig())) is KhronosModel
    assert type(AutoModel.from_config(leviathan.SnaConfig())) is leviathan.SnaModel


def test_repeated_rows_weigh_and_are_no_new_observations():
    random = np.random.default_rng(0)
    x = random.random((60, 2))
    y = np.sin(5 * x[:, 0]) + x[:, 1] + 0.3 * random.standard_normal(60)
    results = []
    for rows, weight in ((x, None), (np.tile(x, (5, 1)), None), (x, np.full(60, 20.0)), (x, np.full(60, 0.05))):
        model = KhronosModel(KhronosConfig(input_low=[0.0] * 2, input_high=[1.0] * 2, rank=2, num_cells=3)).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit = model.fit(rows, np.tile(y, len(rows) // 60), sample_weight=weight)
        assert any("repeat" in note for note in fit.notes) == (len(rows) > 60)
        results.append(model.predict(x))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("number", [np.float32(0.5), np.int64(1), torch.tensor(0.5)])
def test_targets_of_any_numeric_type(number):
    model = KhronosModel(KhronosConfig(input_low=[0.0] * 2, input_high=[1.0] * 2)).double()
    x = np.random.default_rng(0).random((100, 2))
    model.fit(x, 2 * x.sum(1))
    assert model.invert(number).converged.all()
