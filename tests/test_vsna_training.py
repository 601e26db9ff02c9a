import json
from pathlib import Path

import pytest
import torch

import training.vsna_problems
from leviathan import VsnaConfig, VsnaModel
from sna_core.solve import SolveReport
from training.settings import read_settings
from training.vsna import allowed_keys, compared, main, run
from training.vsna_errors import FieldError, laser_error, plume_error, random_error, random_points
from training.vsna_plume import PLUME_BOX, plume_profile, plume_rules, solve_plume
from training.vsna_problems import OPTIONS, PROBLEMS, build, sizes

CONFIGS = sorted(Path(training.vsna_problems.__file__).parent.glob("configs/vsna_*.yaml"))
SMALL = {
    "vsna_poisson_2d": {"num_cells": "6"},
    "vsna_poisson_3d": {"num_cells": "4", "source": "sines"},
    "vsna_heat": {"num_cells": "{x: 8, t: 2, nu: 1}"},
    "vsna_burgers": {"num_cells": "{x: 8, t: 2, nu: 1}", "degree": "3", "nu": "[0.2, 0.3]"},
    "vsna_burgers_inviscid": {"num_cells": "{x: 12, t: 3}", "end_time": "0.1"},
    "vsna_plume_cp": {"num_cells": "{x: 4, y: 4, z: 4, t: 1, omega: 1, D: 1}", "degree": "3"},
    "vsna_plume_tucker": {"num_cells": "{x: 4, y: 4, z: 4, t: 1, omega: 1, D: 1}", "degree": "3"},
    "vsna_plume_train": {"num_cells": "{x: 4, y: 4, z: 4, t: 1, omega: 1, D: 1}", "degree": "3"},
    "vsna_laser": {"num_cells": "{x: 5, y: 3, z: 3, t: 2, speed: 1, shape: 1}", "degree": "2"},
}
ROUGH = {"plume": 1.0, "laser": 1.0}  # relative errors that so few cells allow
RANKS = {
    "vsna_poisson_3d": 6,
    "vsna_burgers": 12,
    "vsna_plume_cp": 6,
    "vsna_plume_tucker": 6,
    "vsna_plume_train": 6,
    "vsna_laser": 6,
}


@pytest.fixture(scope="module")
def plume_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plume") / "plume.safetensors"
    solve_plume(24, num_angles=5, num_spreads=6, num_steps=200).save(path)
    return path


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("training.laser.COMPRESSION", 0.05)
    monkeypatch.setattr("training.vsna.NUM_QUERIES", 100)
    monkeypatch.setattr("training.vsna_errors.NUM_OTHERS", (2, 2, 2))
    elements = training.vsna_errors.LaserElements
    monkeypatch.setattr(
        "training.vsna_errors.LaserElements", lambda *arguments: elements(*arguments, num_cells=(6, 4, 4), num_steps=4)
    )


def flags(config, plume_file):
    found = {f"problem.{key}": value for key, value in SMALL[config.stem].items()}
    if "plume" in config.stem:
        found["problem.reference"] = plume_file
    if config.stem in RANKS:
        found["solver.rank"] = RANKS[config.stem]
    found["error.num_points"] = 20 if config.stem == "vsna_laser" else 500
    return [text for name, value in found.items() for text in (f"--{name}", str(value))]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_every_config_runs_end_to_end(config, plume_file, tmp_path, capsys):
    record = main(["--config", str(config), "--out", str(tmp_path), *flags(config, plume_file)])
    assert record == json.loads((tmp_path / "record.json").read_text())
    assert list(record) == [
        *("problem", "settings", "equation", "axes", "field", "solve", "reference", "error", "query", "targets"),
        "provenance",
    ]
    model = VsnaModel.from_pretrained(tmp_path)
    settings, field, solve = record["settings"], record["field"], record["solve"]
    assert record["equation"] == model.config.equation
    assert [axis["name"] for axis in record["axes"]] == model.config.names
    sizes = [axis.basis.num_basis for axis in model.config.problem_axes]
    assert [axis["num_basis"] for axis in record["axes"]] == sizes
    assert field["decomposition"] == settings["solver"]["decomposition"] == model.config.decomposition
    assert field["num_parameters"] == solve["num_parameters"] == model.num_parameters()
    assert field["rank"] == solve["rank"] <= settings["solver"]["rank"]
    assert len(solve["residual_history"]) == solve["num_sweeps"]
    assert solve["stopped_by"] in ("tolerance", "stagnation", "rank", "max_sweeps")
    assert set(record["provenance"]) >= {"seed", "commit", "versions", "hardware"}
    assert 0 < record["query"]["seconds"] < 1

    # The error is that of the model that was saved, and no more than so few cells allow.
    ready = build(record["problem"], **{k: v for k, v in settings["problem"].items() if k != "name"})
    assert ready.problem.names == model.config.names
    again = ready.measure(model, **settings["error"])
    assert vars(again) == pytest.approx(record["error"])
    assert 0 < again.relative_l2 < ROUGH.get(record["problem"], 0.05)
    assert record["reference"] == ready.origin

    assert list(record["targets"]) == list(settings["target"])
    found = record["error"] | {"num_parameters": field["num_parameters"], "seconds": solve["seconds"]}
    for name, target in record["targets"].items():
        assert target == {"limit": settings["target"][name], "value": found[name], "reached": target["reached"]}
        assert target["reached"] == (target["value"] <= target["limit"])
    printed = capsys.readouterr().out
    assert record["equation"] in printed
    assert printed.count("target ") == len(record["targets"])


def test_there_is_a_config_for_each_problem():
    assert {config.stem for config in CONFIGS} == set(SMALL)
    named = {read_settings(config, [], allowed_keys())["problem"]["name"] for config in CONFIGS}
    assert named == set(PROBLEMS)


def test_more_cells_lower_the_error():
    errors = []
    for num_cells in (4, 8):
        ready = build("poisson", source="sines", num_cells=num_cells)
        model = VsnaModel(VsnaConfig.for_problem(ready.problem, rank=2))
        model.solve(ready.problem, tolerance=1e-10, progress=False)
        errors.append(ready.measure(model).relative_l2)
    assert errors[1] < errors[0] / 12  # a cubic: 16


def test_targets_can_fail():
    report = dict.fromkeys(SolveReport.__dataclass_fields__, 1) | {"num_parameters": 100, "seconds": 2.0}
    error = FieldError(1e-3, 0.5, 0.25, 10, "")
    found = compared({"relative_l2": 1e-3, "num_parameters": 99, "seconds": 3}, SolveReport(**report), error)
    assert found["relative_l2"] == {"limit": 1e-3, "value": 1e-3, "reached": True}
    assert [each["reached"] for each in found.values()] == [True, False, True]


# What errors are.


def test_the_error_of_a_known_field():
    """u = 0 against 2 x: the root mean square of either is the same, and the largest is at the end."""
    model = VsnaModel(VsnaConfig(axes=[{"name": "x", "low": 0, "high": 3}]))
    error = random_error(model, reference=lambda x: 2 * x[:, 0], num_points=5000)
    assert error.relative_l2 == pytest.approx(1)
    assert error.largest == pytest.approx(6, rel=1e-2)
    assert error.largest_of_peak == pytest.approx(1)
    assert "5000 points" in error.rule
    points = random_points(model, 1000, seed=1)
    assert points.shape == (1000, 1)
    assert points.mean() == pytest.approx(1.5, abs=0.1)
    assert torch.equal(points, random_points(model, 1000, seed=1))


def plume_model(decomposition):
    """A product that is none of the plume's solutions, in any form."""
    ready = build("plume", num_cells={"x": 3, "y": 4, "z": 5, "t": 1, "omega": 1, "D": 1}, degree=2)
    options = {"axis_order": [2, 3, 0, 4, 1, 5]} if decomposition == "tensor_train" else {}
    model = VsnaModel(VsnaConfig.for_problem(ready.problem, rank=2, decomposition=decomposition, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


@pytest.mark.parametrize("decomposition", ["cp", "tucker", "tensor_train"])
def test_the_plumes_error_is_that_of_all_points(decomposition, plume_file):
    model, reference = plume_model(decomposition), solve_plume(16, num_angles=3, num_spreads=3, num_steps=60)
    found = plume_error(model, reference, num_points=300)
    rules = [axis.basis.quadrature(4) for axis in model.config.problem_axes[:3]] + list(
        plume_rules((1, 1, 1, 2, 2, 2))
    )[3:]
    points = torch.cartesian_prod(*(x for x, _ in rules))
    weights = torch.cartesian_prod(*(w for _, w in rules)).prod(1)
    exact = reference(points)
    with torch.no_grad():
        squares = weights @ (model(points) - exact).square()
    assert found.relative_l2 == pytest.approx((squares / (weights @ exact.square())).sqrt().item(), rel=1e-10)
    assert found.largest == random_error(model, reference=reference, num_points=300).largest


def test_the_lasers_error_is_a_fraction_of_each_draws_peak():
    ready = build("laser", num_cells={"x": 2, "y": 2, "z": 2, "t": 2, "speed": 1, "shape": 1})
    model = VsnaModel(VsnaConfig.for_problem(ready.problem, rank=1))  # zero
    found = laser_error(model, reference=ready.reference, num_points=30, seed=3)
    assert found.relative_l2 == pytest.approx(1)
    assert 0.01 < found.largest_of_peak <= 1
    assert found.largest > 1
    points = random_points(model, 20)
    points[:10, 4:], points[10:, 4:] = points[0, 4:], points[10, 4:]
    solution = ready.reference.solve(*points[10, 4:].tolist())
    torch.testing.assert_close(ready.reference(points)[10:], torch.from_numpy(solution(points[10:, :4].numpy())))


# Problems.


def test_initial_data_and_sizes_of_the_plume():
    ready = build("plume", num_cells={"t": 3}, degree={"x": 4})
    assert ready.problem.names == list(PLUME_BOX)
    assert (ready.problem.axis("t").num_cells, ready.problem.axis("x").num_cells) == (3, 32)
    assert (ready.problem.axis("x").degree, ready.problem.axis("y").degree) == (4, 5)
    (term,) = ready.problem.initial["t"]
    x = torch.linspace(0, 1, 7, dtype=torch.float64)
    for i, name in enumerate("xyz"):
        torch.testing.assert_close(term.operators[name].values(x), plume_profile(x, i))


@pytest.mark.parametrize("name", PROBLEMS)
def test_references_satisfy_the_data(name):
    """Of the problems with a solution at any point: at t = 0, or on the faces."""
    ready = build(name)
    assert ready.origin
    if name in ("plume", "laser"):
        return
    problem = ready.problem
    model = VsnaModel(VsnaConfig.for_problem(problem, rank=1))
    points = random_points(model, 50)
    if problem.initial:
        points[:, problem.names.index("t")] = 0.0
        (term,) = problem.initial["t"]
        expected = term.operators["x"].values(points[:, 0])
    else:
        points[:, 0], expected = 1.0, torch.zeros(50, dtype=torch.float64)
    torch.testing.assert_close(ready.reference(points), expected, rtol=0, atol=1e-9)


def test_sizes_by_axis():
    assert sizes({"x": 3, "t": 2}, None) == {"x": 3, "t": 2}
    assert sizes({"x": 3, "t": 2}, 5) == {"x": 5, "t": 5}
    assert sizes({"x": 3, "t": 2}, {"t": 4}) == {"x": 3, "t": 4}
    assert OPTIONS["poisson"] == ("dimension", "source", "num_cells", "degree")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wave", {}, r"problem.name = 'wave'; expected one of poisson, heat"),
        (None, {}, "problem.name = None"),
        ("heat", {"source": "ridge"}, "'heat' has no option source; expected some of num_cells, degree, nu"),
        ("poisson", {"dimension": 4}, "dimension = 4; expected 2 or 3"),
        ("poisson", {"source": "sine"}, "source = 'sine'; expected one of sines, ridge"),
        ("poisson", {"num_cells": {"z": 3}}, r"given for \['z'\], which are no axes; the axes are \['x', 'y'\]"),
        ("poisson", {"num_cells": 0}, "num_cells = 0"),
        ("heat", {"nu": 0.1}, "nu = 0.1; expected its lowest and highest value"),
        ("heat", {"nu": [0.1, 0.01]}, "expected its lowest and highest value"),
        ("burgers", {"finest": 2.0}, "expected a width above 0"),
        ("burgers_inviscid", {"end_time": 0.4}, "before the shock"),
        ("laser", {"num_cells": {"r": 3}}, "no axes"),
    ],
)
def test_bad_problems_raise(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


# The command.


def config_file(folder, text):
    path = folder / "vsna_small.yaml"
    path.write_text("problem: {name: poisson, num_cells: 3}\nsolver: {rank: 4}\nerror: {num_points: 10}\n" + text)
    return str(path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--problem.name", "wave"], "problem.name = 'wave'"),
        (["--problem.cells", "3"], "unknown key 'cells'"),
        (["--solver.rank", "0"], "rank"),
        (["--solver.decomposition", "svd"], "decomposition"),
        (["--solver.method", "newton"], "method = 'newton'"),
        (["--solver.tolerance", "-1"], "tolerance = -1"),
        (["--target.seconds", "0"], "target.seconds = 0; expected a number above 0"),
        (["--target.relative_l2", "small"], "target.relative_l2 = 'small'"),
        (["--error.num_points", "0"], "num_points = 0"),
        (["--rank", "3"], "'--rank' is no setting"),
    ],
)
def test_bad_commands_leave_nothing_behind(flags, message, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=message):
        main(["--config", config_file(tmp_path, ""), "--out", str(out), *flags])
    assert not out.exists()


def test_a_model_is_not_overwritten_and_the_folder_has_a_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_file(tmp_path, "target: {seconds: 1e-9}\n")
    record = main(["--config", config])
    assert not record["targets"]["seconds"]["reached"]
    assert (tmp_path / "runs/vsna/small/model.safetensors").is_file()
    with pytest.raises(SystemExit, match="holds a model already; choose another --out"):
        main(["--config", config])
    with pytest.raises(SystemExit, match="No such file"):
        main(["--config", str(tmp_path / "none.yaml")])


def test_a_seed_gives_the_same_field_again(tmp_path):
    config = config_file(tmp_path, "")
    settings = read_settings(config, ["--solver.seed", "3"], allowed_keys())
    first, second = run(settings, tmp_path / "a"), run(settings, tmp_path / "b")
    assert first["error"] == second["error"]
    assert first["provenance"]["seed"] == 3
    fields = [VsnaModel.from_pretrained(tmp_path / name) for name in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(*(field.parameters() for field in fields), strict=True))
