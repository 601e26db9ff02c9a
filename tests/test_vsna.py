"""VSNA: what is asked of a solved field, by fields known in closed form, and the contract of a transformers model."""

import json
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

import leviathan
from leviathan import VsnaConfig, VsnaModel
from sna_core import Axis, Problem, Term, derivative, graded_breakpoints, multiply
from sna_core.field import gauss

AXES = [
    Axis("x", 0, 1, num_cells=5, boundary=("dirichlet", "neumann")),
    Axis("t", 0, 2, breakpoints=graded_breakpoints(0, 2, 6, 0.0, 0.1)),
    Axis("nu", 0.1, 0.3, kind="chebyshev", num_basis=4),
]
SETTINGS = [
    {"name": "x", "low": 0, "high": 1, "num_cells": 5, "degree": 3, "boundary": ["dirichlet", "neumann"]},
    {"name": "t", "low": 0, "high": 2, "breakpoints": list(AXES[1].breakpoints)},
    {"name": "nu", "low": 0.1, "high": 0.3, "kind": "chebyshev", "num_basis": 4},
]
# u = x^2 (2 + t) nu^3 + 4 x (t^2 - t) nu, which these axes hold exactly
COMPONENTS = [
    [lambda x: x**2, lambda t: 2 + t, lambda nu: nu**3],
    [lambda x: 4 * x, lambda t: t**2 - t, lambda nu: nu],
]
FORMS = ("cp", "tucker", "tensor_train")
each_form = pytest.mark.parametrize("form", FORMS)


def exact(points):
    return sum(math.prod(f(points[..., i]) for i, f in enumerate(row)) for row in COMPONENTS)


def points(num_points, axes=AXES, seed=0):
    share = torch.rand(num_points, len(axes), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    low, high = torch.tensor([[axis.low for axis in axes], [axis.high for axis in axes]], dtype=torch.float64)
    return low + (high - low) * share


def coefficients(axis, functions):
    x, _ = gauss(axis.basis)
    return torch.linalg.lstsq(axis.basis.dense(x), torch.stack([f(x) for f in functions], -1)).solution


@torch.no_grad()
def build(form="cp", axes=AXES, components=COMPONENTS):
    """A model of a sum of products; the axes of a train are in another order."""
    factors = [coefficients(axis, [row[i] for row in components]) for i, axis in enumerate(axes)]
    rank, options = len(components), {}
    if form == "tensor_train":
        options = {"axis_order": [*range(1, len(axes)), 0]}
    elif form == "tucker":
        options = {"frame_sizes": [rank] * len(axes)}
    problem = Problem(axes, [Term()])
    model = VsnaModel(VsnaConfig.for_problem(problem, rank=rank, decomposition=form, **options))
    if form == "cp":
        for parameter, factor in zip(model.field.factors, factors, strict=True):
            parameter.copy_(factor)
    elif form == "tucker":
        for i, factor in enumerate(factors):
            frame, small = torch.linalg.qr(factor)
            model.field.frames[i].copy_(frame)
            model.field.factors[i].copy_(small)
    else:
        cores = [torch.diag_embed(factors[i]).movedim(0, 1) for i in model.config.axis_order]
        cores[0], cores[-1] = cores[0].sum(0, keepdim=True), cores[-1].sum(2, keepdim=True)
        for parameter, core in zip(model.field.cores, cores, strict=True):
            parameter.copy_(core)
    return model


def heat(num_cells=32):
    return Problem(
        axes=[
            Axis("x", 0, 1, num_cells=num_cells, boundary="dirichlet"),
            Axis("t", 0, 1, num_cells=num_cells),
            Axis("nu", 1e-3, 1e-2, num_cells=8),
        ],
        operator=[Term(t=derivative(1)), Term(-1.0, nu=multiply(lambda nu: nu), x=derivative(2))],
        initial={"t": [Term(x=multiply(lambda x: torch.sin(torch.pi * x)))]},
    )


def exact_heat(points):
    x, t, nu = points.unbind(-1)
    return (math.pi * x).sin() * (-(math.pi**2) * nu * t).exp()


# Values, and what becomes of them on a disk.


@each_form
def test_values_and_gradients(form):
    model = build(form)
    x = points(60).view(3, 20, 3).requires_grad_()
    values, gradient = model.value_and_gradient(x)
    torch.testing.assert_close(values, exact(x))
    (expected,) = torch.autograd.grad(exact(x).sum(), x)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(torch.autograd.grad(model(x).sum(), x)[0], expected)
    assert torch.equal(model.gradient(x), gradient)
    torch.testing.assert_close(model.table(torch.float64)(x.flatten(0, 1)), exact(x).flatten())
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@each_form
def test_round_trip_is_exact_and_in_float64(form, tmp_path):
    model = build(form)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is VsnaModel
    assert loaded.dtype == loaded.config.dtype == torch.float64
    assert torch.equal(loaded(points(50)), model(points(50)))
    assert loaded.config.problem_axes == tuple(AXES)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float64"
    single = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert single(points(50)).dtype == torch.float32
    torch.testing.assert_close(single(points(50)), model(points(50)).float(), rtol=1e-4, atol=1e-5)


def test_public_names():
    assert {"VsnaConfig", "VsnaModel"} <= set(leviathan.__all__)
    assert type(AutoModel.from_config(VsnaConfig())) is VsnaModel
    assert AutoConfig.for_model("vsna").problem_axes == (Axis("x", 0.0, 1.0),)
    assert (VsnaModel(VsnaConfig())(torch.rand(3, 1)) == 0).all()


def test_points_of_another_type_are_converted():
    model = build()
    x = points(30)
    x[0] = torch.tensor([axis.low for axis in AXES], dtype=torch.float64)
    x[1] = torch.tensor([axis.high for axis in AXES], dtype=torch.float64)
    assert (x[1].float().double() > x[1]).any()  # an end that rounding leads out of the box
    values = model(x.float())
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, exact(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.gradient(x.float()), model.gradient(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ask", ["__call__", "gradient", "table"])
@pytest.mark.parametrize("form", ["cp", "tensor_train"])
def test_points_outside_raise(form, ask):
    model = build(form)
    ask = model.table() if ask == "table" else getattr(model, ask)
    x = points(5)
    x[3, 1] = 2.5
    with pytest.raises(ValueError, match=r"t\[3\] = 2\.5 lies outside axis 't', \[0, 2\]; ask inside of it"):
        ask(x)
    x[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"t\[3\] = nan lies outside"):
        ask(x)
    with pytest.raises(
        ValueError, match=r"shape \(5, 2\); expected \(\.\.\., 3\), a column for each of \['x', 't', 'nu'"
    ):
        ask(x[:, :2])
    with pytest.raises(ValueError, match="int64; expected a floating-point tensor"):
        ask(x.nan_to_num().long())


# A checkpoint and its config.


def test_a_checkpoint_of_another_size_raises(tmp_path):
    build().save_pretrained(tmp_path)
    for change in ({"degree": 2}, {"num_cells": 7}):
        config = VsnaConfig.from_pretrained(tmp_path)
        config.axes[0] = config.axes[0] | change
        with pytest.raises(ValueError, match=r"axis 'x' has coefficients of shape \(8, 2\) in the checkpoint and \(\d"):
            AutoModel.from_pretrained(tmp_path, config=config)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["rank"] = 3
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="ranks have to be those that the field was solved with"):
        AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_a_checkpoint_of_another_form_raises(tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="for which the config has no axis"):
        VsnaModel.from_pretrained(
            tmp_path, config=VsnaConfig(axes=SETTINGS, rank=2, decomposition="tensor_train", axis_order=[1, 0, 2])
        )
    more = [SETTINGS[0], SETTINGS[2], {"name": "t", "low": 0, "high": 1}, {"name": "y", "low": 0, "high": 1}]
    with pytest.raises(ValueError, match="axis 'y' has no coefficients in the checkpoint"):
        VsnaModel.from_pretrained(tmp_path, config=VsnaConfig(axes=more, rank=2))
    with pytest.raises(ValueError, match="for which the config has no axis"):
        VsnaModel.from_pretrained(tmp_path, config=VsnaConfig(axes=SETTINGS[:2], rank=2))


def test_a_dtype_set_by_name_on_the_config_is_refused():
    config = VsnaConfig()
    config.dtype = "float32"
    with pytest.raises(ValueError, match=r"dtype = 'float32'; expected a torch\.dtype"):
        VsnaModel(config)


def test_a_model_that_was_built_without_values_gets_them():
    model = VsnaModel(VsnaConfig())
    expected = model.signatures.clone()
    model.signatures.zero_()
    model._init_weights(model)
    assert torch.equal(model.signatures, expected)
    assert expected.any()


def test_config_of_a_problem():
    config = VsnaConfig.for_problem(heat(), rank=3, decomposition="tucker", frame_sizes=[2, 3, 3])
    assert config.problem_axes == tuple(heat().axes)
    assert config.equation == heat().describe()
    assert (config.rank, config.decomposition, config.frame_sizes) == (3, "tucker", [2, 3, 3])
    assert VsnaConfig(**json.loads(json.dumps(config.to_dict()))).problem_axes == config.problem_axes
    assert VsnaConfig(axes=SETTINGS).problem_axes == tuple(AXES)
    assert VsnaConfig.for_problem(Problem(AXES, [Term()])).problem_axes == tuple(AXES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": []}, "at least one"),
        ({"axes": [SETTINGS[0], SETTINGS[0]]}, r"the axes are named \['x', 'x'\]"),
        ({"axes": [{"name": "x", "low": 0}]}, r"axes\[0\] .* 'high'; expected the arguments of Axis"),
        ({"axes": [SETTINGS[0] | {"cells": 3}]}, r"axes\[0\] .*'cells'; expected the arguments of Axis"),
        ({"axes": [SETTINGS[0] | {"degree": 9}]}, "degree = 9"),
        ({"axes": [SETTINGS[0] | {"boundary": "wall"}]}, "axis 'x' has boundary = 'wall'"),
        ({"axes": [{"name": "x", "low": 1, "high": 1}]}, "low < high"),
        ({"rank": 0}, "rank = 0; expected an integer of at least 1"),
        ({"decomposition": "parafac"}, "decomposition"),
        ({"train_ranks": [2, 2]}, r"train_ranks = \[2, 2\]; decomposition = 'cp' takes none"),
        ({"axis_order": [0, 1, 2]}, "decomposition = 'cp' takes none"),
        ({"decomposition": "tensor_train", "train_ranks": [2]}, "takes 2 numbers"),
        ({"decomposition": "tensor_train", "train_ranks": [2, 0]}, r"train_ranks\[1\] = 0"),
        ({"decomposition": "tensor_train", "axis_order": [0, 1, 1]}, "expected each number from 0 to 2 once"),
        ({"decomposition": "tucker", "frame_sizes": [2, 2]}, "takes 3 numbers"),
        ({"decomposition": "tucker", "frame_sizes": [2, 2, 5]}, "axis 'nu' has a frame of 5; expected at most its 4"),
    ],
)
def test_bad_settings_raise(options, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        VsnaConfig(**({"axes": SETTINGS} | options))


# Fewer axes.


@each_form
@pytest.mark.parametrize("held", [{"t": 0.7}, {"x": 1, "nu": 0.1}, {"nu": 0.2}])
def test_slices(form, held, tmp_path):
    model = build(form)
    smaller = model.slice(**held)
    x = points(20)
    for name, value in held.items():
        x[:, model.config.names.index(name)] = value
    kept = [i for i, name in enumerate(model.config.names) if name not in held]
    assert smaller.config.names == [AXES[i].name for i in kept]
    torch.testing.assert_close(smaller(x[:, kept]), exact(x))
    torch.testing.assert_close(smaller.gradient(x[:, kept]), model.gradient(x)[:, kept])
    assert all(f"{name} = {value:g}" in smaller.config.equation for name, value in held.items())
    smaller.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(x[:, kept]), smaller(x[:, kept]))
    torch.testing.assert_close(model(x), exact(x))  # is as it was


@each_form
def test_integrals(form):
    model = build(form)
    nu = torch.linspace(0.1, 0.3, 7, dtype=torch.float64).unsqueeze(-1)
    by_nu = model.integrate("x", "t")
    torch.testing.assert_close(by_nu(nu), (6 / 3 * nu**3 + 2 * (8 / 3 - 2) * nu)[:, 0])
    assert by_nu.config.names == ["nu"]
    assert by_nu.config.equation.endswith("integrated over x, t")
    total = 2 * (0.3**4 - 0.1**4) / 4 + 4 / 3 * (0.3**2 - 0.1**2) / 2
    assert model.integral() == pytest.approx(total, rel=1e-12)
    assert by_nu.integral() == pytest.approx(total, rel=1e-12)
    assert model.slice(t=1.0).integrate("x").config.equation.endswith("at t = 1; integrated over x")


def test_bad_slices_and_integrals_raise():
    model = build("tensor_train")
    with pytest.raises(ValueError, match=r"slice names \['y'\], which are no axes; the axes are \['x', 't', 'nu'\]"):
        model.slice(y=1.0)
    with pytest.raises(ValueError, match=r"t = 2\.5 lies outside axis 't', \[0, 2\]"):
        model.slice(t=2.5)
    with pytest.raises(ValueError, match="t = nan lies outside"):
        model.slice(t=math.nan)
    with pytest.raises(ValueError, match="slice was given all axes; leave one, or call the model at the point"):
        model.slice(x=0.0, t=0.0, nu=0.1)
    with pytest.raises(ValueError, match="at least one"):
        model.slice()
    with pytest.raises(ValueError, match=r"integrate was given all axes; leave one, or call `integral\(\)`"):
        model.integrate("x", "t", "nu")
    with pytest.raises(ValueError, match="each once"):
        model.integrate("x", "x")
    with pytest.raises(ValueError, match="integrate names"):
        model.integrate("y")


# Solving.


@each_form
def test_the_example_of_the_design(form, tmp_path):
    problem = heat()
    model = VsnaModel(VsnaConfig.for_problem(problem, rank=8, decomposition=form))
    report = model.solve(problem, tolerance=1e-8, progress=False)
    x = points(1000, problem.axes)
    assert (model(x) - exact_heat(x)).abs().max() <= 1e-6
    assert model.gradient(x).shape == (1000, 3)
    assert report.converged
    assert report.num_parameters == model.num_parameters()
    assert model.config.rank == report.rank
    assert model.config.equation == problem.describe()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(x), model(x))
    at = {"x": torch.tensor([0.3, 0.5, 0.9]), "t": torch.tensor([0.2, 1.0, 0.6])}
    seen = exact_heat(torch.tensor([[0.3, 0.2, 4e-3], [0.5, 1.0, 4e-3], [0.9, 0.6, 4e-3]], dtype=torch.float64))
    assert loaded.invert(seen, at).best["nu"] == pytest.approx(4e-3, abs=1e-6)


def test_a_second_solve_takes_the_place_of_the_first(capsys):
    problem = heat(8)
    model = VsnaModel(VsnaConfig.for_problem(problem, rank=2))
    rough = model.solve(problem)
    assert "residual=" in capsys.readouterr().err
    better = model.solve(problem, rank=6, progress=False)
    assert capsys.readouterr().err == ""
    assert better.residual <= rough.residual
    assert model.config.rank == better.rank == model.field.factors[0].shape[1]


def test_a_problem_of_other_axes_raises():
    model = VsnaModel(VsnaConfig.for_problem(heat(8)))
    before = model.config.to_dict()
    with pytest.raises(
        ValueError, match="axis 'x' has num_cells = 9 in the problem and 8 in the config; make the conf"
    ):
        model.solve(heat(9), progress=False)
    with pytest.raises(ValueError, match=r"the problem has the axes \['x'\] and the config \['x', 't', 'nu'\]"):
        model.solve(Problem([AXES[0]], [Term()]), progress=False)
    assert model.config.to_dict() == before


def test_changed_degree_of_as_many_functions_is_refused(tmp_path):
    problem = heat()
    model = VsnaModel(VsnaConfig.for_problem(problem, rank=2))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["axes"][0] |= {"degree": config["axes"][0]["degree"] - 1, "num_cells": config["axes"][0]["num_cells"] + 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="axis 'x' is not the one"):
        VsnaModel.from_pretrained(tmp_path)


def test_error_estimate_brackets_the_error():
    problem = heat()
    model = VsnaModel(VsnaConfig.for_problem(problem, rank=6))
    model.solve(problem, progress=False)
    estimate = model.estimate_error(problem, progress=False)
    points = torch.rand(2000, 3, dtype=torch.float64) * torch.tensor([1, 1, 9e-3]) + torch.tensor([0, 0, 1e-3])
    exact = torch.sin(torch.pi * points[:, 0]) * torch.exp(-(torch.pi**2) * points[:, 1] * points[:, 2])
    error = ((model(points) - exact).norm() / exact.norm()).item()
    assert error / 10 < estimate.error < error * 10
    assert estimate.error < estimate.difference
