"""The study of VSNA: its parts at small sizes, and the errors and fits that they are made of."""

import dataclasses
import json
import math
import re

import pytest
import torch

from eval import vsna, vsna_card, vsna_comparison, vsna_study
from eval.vsna import PARTS, main, run
from eval.vsna_comparison import PeerRow, galerkin_system, goals
from eval.vsna_fields import PlumeError, SolvedField, TrainFits, on_grid, relative_l2
from eval.vsna_study import ConvergenceRow, FrontierRow, frontier, frontier_slope, rates
from eval.vsna_targets import targets
from leviathan.vsna import VsnaConfig, VsnaModel
from sna_core.discretisation import Discretisation
from training.provenance import write_json
from training.vsna_errors import plume_error
from training.vsna_plume import solve_plume
from training.vsna_problems import build
from training.vsna_references import heat, poisson_sines

PLUME = {**dict.fromkeys("xyz", 5), "t": 2, "omega": 1, "D": 1}


@pytest.fixture(scope="module")
def reference():
    return solve_plume(12, num_angles=4, num_spreads=5, num_steps=80)


@pytest.fixture(scope="module")
def small(tmp_path_factory, reference):
    """The folder of a small run of all parts, and what it returned."""
    out, laser = tmp_path_factory.mktemp("vsna"), tmp_path_factory.mktemp("laser")
    reference.save(out / vsna_study.REFERENCE)
    problem = build("laser", num_cells=dict.fromkeys("xyzt", 4) | {"speed": 1, "shape": 1}).problem
    model = VsnaModel(VsnaConfig.for_problem(problem, rank=2))
    torch.manual_seed(0)
    for factor in model.field.factors:
        factor.data.uniform_(0.5, 3.0)  # warm enough for a pool
    model.save_pretrained(laser)
    write_json(laser / "record.json", {"solve": {"seconds": 3.0, "residual": 0.5, "stopped_by": "rank"}})
    return out, main(["--out", str(out), "--small", "--laser-model", str(laser)])


@pytest.fixture(scope="module")
def plume():
    """The plume on few cells and its train."""
    problem = build("plume", num_cells=PLUME, degree=3).problem
    model = VsnaModel(VsnaConfig.for_problem(problem, rank=20, decomposition="tensor_train"))
    model.solve(problem, max_sweeps=3, progress=False)
    return problem, model


def test_small_run_writes_every_part_as_json(small):
    out, record = small
    assert json.loads((out / vsna.NAME).read_text(encoding="utf-8")) == json.loads(json.dumps(record))
    assert set(record) == {"small", "targets", *PARTS}
    pictures = {f"{name}.png" for name in (*PARTS,)}
    arrays = {"plume.safetensors", "laser.safetensors", vsna_study.REFERENCE}
    assert {path.name for path in out.iterdir() if path.is_file()} == {vsna.NAME, *pictures, *arrays}
    for name in PARTS:
        assert record[name]["part_seconds"] > 0
        made = record[name]["provenance"]
        assert made["versions"]["torch"]
        assert made["hardware"]["threads"] >= 1
        assert made["seed"] is not None


def test_rows_hold_what_was_asked_for(small):
    _, record = small
    forms = [(row["form"], row["num_cells"], row["seed"]) for row in record["frontier"]["rows"]]
    assert forms.count(("cp", 4, 1)) == 1  # of the smallest rank alone
    assert forms.count(("cp", 4, 0)) == 2
    assert forms.count(("tucker", 4, 0)) == 1
    assert forms.count(("tensor_train", 2, None)) == 2
    for row in record["frontier"]["rows"]:
        assert 0 < row["relative_l2"] < 1
        assert row["seconds"] > row["fit_seconds"] >= 0
    methods = {(row["problem"], row["method"]) for row in record["peers"]["rows"]}
    assert methods == {(p, m) for p in ("heat", "plume") for m in ("train", "cp", "amen", "greedy", "pinn")}
    assert {row["method"] for row in record["laser"]["rows"]} == {"P1", "field", "scattered"}
    assert {(row["problem"], row["method"]) for row in record["speed"]["speed_ups"]} == {
        ("heat", "P1"),
        ("heat", "P2"),
        ("plume", "P1"),
    }
    sweep = record["sweep"]
    assert sum(sweep["depth"]["counts"]) == sweep["depth"]["num_samples"] == 4
    assert sweep["depth"]["num_queries"] >= 4 * 1000
    assert sweep["memory"][0]["peak_bytes"] >= sweep["memory"][0]["before_bytes"] > 0


def test_targets_of_small_sizes_are_not_taken_for_those_asked(small):
    measured = {each["figure"]: each["measured"] for each in small[1]["targets"]}
    assert measured["seconds of a million queries in seven inputs"] is None
    assert measured["laser, largest error at 200 random points, of the peak rise"] is None


def test_parts_are_kept_unless_they_are_asked_for(small, monkeypatch):
    out, _ = small
    before = json.loads((out / vsna.NAME).read_text(encoding="utf-8"))
    monkeypatch.setattr(vsna, "PARTS", dict.fromkeys(PARTS))  # none can be called
    assert run(out, small=True) == before
    monkeypatch.setattr(vsna, "PARTS", {**PARTS, "plume": lambda out, laser, sizes: {"seed": 7}})
    after = run(out, ["plume"], small=True)
    assert after["plume"]["provenance"]["seed"] == 7
    assert {name: after[name] for name in PARTS if name != "plume"} == {
        name: before[name] for name in PARTS if name != "plume"
    }
    write_json(out / vsna.NAME, before)


def test_bad_input_is_refused(small, tmp_path):
    out, _ = small
    with pytest.raises(SystemExit, match=r"vsna\.json was made with --small; give another --out"):
        main(["--out", str(out), "--parts", "plume"])
    with pytest.raises(SystemExit, match="parts: poison unknown; expected some of convergence, frontier"):
        main(["--out", str(tmp_path), "--parts", "plume,poison"])
    with pytest.raises(SystemExit, match=r"holds no record\.json; make it by"):
        main(["--out", str(tmp_path), "--parts", "sweep", "--small", "--laser-model", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_model_of_another_problem_is_no_laser(plume, tmp_path):
    plume[1].save_pretrained(tmp_path)
    write_json(tmp_path / "record.json", {"solve": {"seconds": 1.0}})
    with pytest.raises(SystemExit, match=r"has the axes \['x', 'y', 'z', 't', 'omega', 'D'\]; expected \['x'"):
        main(["--out", str(tmp_path / "out"), "--parts", "laser", "--small", "--laser-model", str(tmp_path)])


@pytest.mark.parametrize("decomposition", ["cp", "tucker", "tensor_train"])
def test_values_on_a_grid_are_those_at_its_points(decomposition):
    problem = build("heat", num_cells=4, degree=3).problem
    model = VsnaModel(VsnaConfig.for_problem(problem, rank=6, decomposition=decomposition))
    model.solve(problem, max_sweeps=4, progress=False)
    solved = SolvedField.of_model(model)
    shape = zip(problem.axes, (3, 4, 5), strict=True)
    points = [torch.linspace(axis.low, axis.high, n, dtype=torch.float64) for axis, n in shape]
    at = torch.cartesian_prod(*points)
    values = on_grid(solved.functions(points), solved.order)
    assert values.shape == (3, 4, 5)
    torch.testing.assert_close(values.flatten(), model(at).detach())
    torch.testing.assert_close(solved(at), model(at).detach())
    error = relative_l2(solved, heat)
    random = build("heat").measure(model, num_points=50_000).relative_l2
    assert error == pytest.approx(random, rel=0.05)


def test_relative_error_of_the_solution_is_that_of_interpolation():
    errors = []
    for n in (4, 8):
        problem = build("poisson", source="sines", num_cells=n, degree=2).problem
        model = VsnaModel(VsnaConfig.for_problem(problem, rank=8, decomposition="tensor_train"))
        model.solve(problem, tolerance=1e-12, progress=False)
        errors.append(relative_l2(SolvedField.of_model(model), poisson_sines))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(3, abs=0.3)


def test_error_of_the_plume_is_the_same_in_every_form(plume, reference):
    problem, model = plume
    error = PlumeError(problem, reference, num_nodes=(12, 6, 8))
    assert error(SolvedField.of_model(model)) == pytest.approx(plume_error(model, reference).relative_l2, rel=1e-9)
    fits = TrainFits(problem, model)
    fit = fits.components(4, 0)
    field = fits.field(fit)
    functions = field.functions([points for points, _ in error.grid.rules])

    def values(*node):
        parts = [f if axis < 3 else f[[node[axis - 3]]] for axis, f in enumerate(functions)]
        return on_grid(parts, field.order)[..., 0, 0, 0]

    assert error(field) == pytest.approx(error.grid.relative_l2(values), rel=1e-9)


def test_fits_are_as_far_from_the_train_as_they_say(plume):
    problem, model = plume
    fits = TrainFits(problem, model)
    discretisation = Discretisation(problem)
    zero = SolvedField.of_components(
        discretisation, [torch.zeros(space.dimension, 0, dtype=torch.float64) for space in discretisation.spaces]
    )
    whole = fits.rounded(1e-14)
    points = torch.rand(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points[:, 5] = 0.001 + 0.009 * points[:, 5]
    torch.testing.assert_close(whole(points), model(points).detach())  # the lift was taken off and added again

    def distance(solved):
        permuted = _in_order(solved, whole.order)
        squares = permuted.inner(permuted) - 2 * permuted.inner(whole.field) + whole.field.inner(whole.field)
        return squares.clamp(min=0).sqrt().item()

    norm = distance(zero)
    fit = fits.components(5, 0)
    assert distance(fits.field(fit)) / norm == pytest.approx(fit.distance, rel=1e-3)
    reduced = fits.reduced(fit)
    assert distance(fits.field(reduced)) / norm == pytest.approx(reduced.distance, rel=1e-3)
    assert reduced.distance <= 1.1 * fit.distance
    assert distance(fits.rounded(0.1)) / norm <= 0.1
    sizes = [reduced.frames[fits.order.index(i)].shape[1] + 1 for i in range(6)]
    num_basis = [problem.axes[i].basis.num_basis for i in fits.order]
    assert fits.reduced_size(reduced) == sum(m * (n + 6) for m, n in zip(sizes, num_basis, strict=True))


def _in_order(solved, order):
    """The field with its axes as a train has them."""
    if solved.order == order:
        return solved.field
    field = type(solved.field)([solved.field.bases[i] for i in order], rank=solved.field.factors[0].shape[1])
    for parameter, i in zip(field.factors, order, strict=True):
        parameter.data.copy_(solved.field.factors[i])
    return field


def test_galerkin_system_has_the_equation_of_dense_quadrature():
    problem = build("heat", num_cells={"x": 3, "t": 2, "nu": 1}, degree=3).problem
    discretisation = Discretisation(problem)
    order = (2, 0, 1)
    matrices, right = galerkin_system(discretisation, order)
    spaces = [discretisation.spaces[i] for i in order]
    system, data = (
        sum(_kronecker(term) for term in terms)
        for terms in (matrices, [[column.unsqueeze(1) for column in term] for term in right])
    )
    # The equation in the solution's own terms: L (w + g) is orthogonal to all trial functions.
    found = torch.linalg.solve(system, data.squeeze(1)).view([space.dimension for space in spaces])
    own = torch.einsum("abc,na,xb,tc->xtn", found, *(space.trial for space in spaces))
    for lifted in zip(*(factor.mT for factor in discretisation.lift.factors), strict=True):
        own = own + torch.einsum("x,t,n->xtn", *lifted)
    x, t, nu = discretisation.spaces
    basis = [[space.basis.dense(space.points, k) for k in range(3)] for space in (x, t, nu)]
    slope = torch.einsum("xtn,ax,bt,cn->abc", own, basis[0][0], basis[1][1], basis[2][0])
    curvature = torch.einsum("xtn,ax,bt,cn->abc", own, basis[0][2], basis[1][0], basis[2][0])
    residual = slope - nu.points * curvature
    for axis, space in enumerate((x, t, nu)):
        tests = (space.basis.dense(space.points) @ space.trial).mT * space.weights
        residual = torch.tensordot(tests, residual.movedim(axis, 0), 1).movedim(0, axis)
    assert residual.abs().max() < 1e-10


def _kronecker(term):
    product = term[0]
    for factor in term[1:]:
        product = torch.kron(product, factor)
    return product


def test_without_torchtt_the_row_says_so(monkeypatch):
    def absent(*arguments, **options):
        raise ImportError("no torchTT")

    monkeypatch.setattr(vsna_comparison, "solve_amen", absent)
    problem = build("heat", num_cells=2, degree=3).problem
    size = vsna.SMALL["peers"]["sizes"]["heat"]
    rows = vsna_comparison._amen("heat", problem, size, lambda solved: 0.0, [0, 1, 2], 0)
    assert rows == [PeerRow("heat", "amen", "", note="torchTT is not installed")]

    def broken(*arguments, **options):
        raise ValueError("AMEn broke down")

    monkeypatch.setattr(vsna_comparison, "solve_amen", broken)
    (row,) = vsna_comparison._amen("heat", problem, size, lambda solved: 0.0, [0, 1, 2], 0)
    assert (row.setting, row.relative_l2, row.note) == ("tolerance 0.1", None, "AMEn broke down")


def test_rates_are_slopes():
    cells = [ConvergenceRow("p", "bspline", 2, n, 1, 1, 5.0 * n**-3.0, 0.0, "", 0.0) for n in (2, 8, 16, 32)]
    cells[0] = dataclasses.replace(cells[0], relative_l2=1.0)  # too coarse to be fitted
    warm = [dataclasses.replace(row, problem="heat") for row in cells]
    functions = [ConvergenceRow("p", "legendre", None, n, 1, 1, 10.0**-n, 0.0, "", 0.0) for n in (4, 8, 12, 16)]
    splines, heated, spectral = rates([*cells, *warm, *functions])
    assert splines.slope == pytest.approx(-3)
    assert (splines.expected, splines.theory, splines.sizes) == (-3, -3, (8, 16, 32))
    assert (heated.expected, heated.theory) == (-3, -2)
    assert spectral.slope == pytest.approx(-1)
    assert spectral.sizes == (4, 8)  # the others are rounding
    assert spectral.least_error == pytest.approx(1e-16)


def test_frontier_leaves_out_what_is_worse_and_larger():
    rows = [FrontierRow("cp", 8, 1, n, error, 0.0, 1.0, 0.0) for n, error in ((10, 1e-1), (20, 2e-1), (1000, 1e-4))]
    assert [row.num_parameters for row in frontier(rows)] == [10, 1000]
    assert frontier_slope(rows) == pytest.approx(-1.5)
    assert frontier_slope(rows[:1]) is None


def test_goals_are_the_fastest_fields():
    rows = [
        PeerRow("heat", "train", "", relative_l2=1e-2, seconds=2.0),
        PeerRow("heat", "train", "", relative_l2=1e-4, seconds=4.0),
        PeerRow("heat", "amen", "", relative_l2=1e-3, seconds=1.0),
        PeerRow("heat", "amen", "", note="broke down"),
    ]
    found = {row.goal: row.seconds for row in goals(rows)}
    assert found[1e-2] == {"train": 2.0, "amen": 1.0}
    assert found[1e-3] == {"train": 4.0, "amen": 1.0}
    assert found[1e-4] == {"train": 4.0}
    assert 1e-5 not in found


def test_targets_are_held_against_the_record():
    def row(form, size, error, seconds, seed=0):
        return {"form": form, "num_cells": 32, "num_parameters": size} | {
            "relative_l2": error,
            "seconds": seconds,
            "seed": seed,
        }

    rate = {"problem": "heat", "kind": "bspline", "degree": 2, "slope": -2.1, "expected": -3, "least_error": 1e-3}
    record = {
        "convergence": {"rates": [rate, rate | {"kind": "legendre", "degree": None, "expected": None}]},
        "frontier": {
            "rows": [
                row("cp", 29_000, 2e-4, 200.0),
                row("cp", 29_000, 4e-4, 200.0, 1),  # the worst of the seeds counts
                row("cp", 28_000, 5e-4, 200.0),
                row("cp", 31_000, 1e-5, 200.0),  # too large
                row("cp", 29_500, 1e-5, 400.0),  # too slow
                row("tucker", 29_000, 9e-5, 500.0),
            ],
            "slopes": {"cp": -1.6},
        },
        "peers": {
            "goals": [
                {"problem": "heat", "goal": 0.1, "seconds": {"cp": 1.0, "train": 0.5, "amen": 2.0}},
                {"problem": "heat", "goal": 0.01, "seconds": {"train": 6.0, "amen": 3.0}},
                {"problem": "plume", "goal": 0.1, "seconds": {"train": 1.0, "amen": 2.0}},
                {"problem": "plume", "goal": 0.01, "seconds": {"amen": 3.0}},
            ]
        },
        "sweep": {
            "num_samples": 1_000_000,
            "median_seconds": 2.5,
            "memory": [
                {"num_samples": 1000, "before_bytes": 10, "peak_bytes": 20},
                {"num_samples": 2000, "before_bytes": 10, "peak_bytes": 4020},
            ],
        },
        "laser": {"error": {"num_points": 200, "largest_of_peak": 0.009}},
    }
    found = targets(record)
    assert [each.measured for each in found] == [-2.1, 1e-3, 4e-4, 9e-5, None, -1.6, 2.0, None, 2.5, 4.0, 0.009]
    reached = [False, False, False, True, None, True, False, False, True, False, True]
    assert [each.reached for each in found] == reached
    assert {each.reached for each in targets({})} == {None}


def test_card_of_a_small_run(small, tmp_path, monkeypatch):
    out, record = small
    monkeypatch.setattr(vsna_card, "draw_all", lambda folder, study: None)  # the run has drawn them
    vsna_card.main(["--study", str(out / vsna.NAME), "--out", str(tmp_path / "card.md")])
    text = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "A trial at sizes too small to say anything" in text
    assert all((tmp_path / link).is_file() for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text))
    for each in record["targets"]:
        assert each["figure"] in text
    write_json(tmp_path / vsna.NAME, {"small": True, "targets": []})
    with pytest.raises(SystemExit, match=r"lacks 'peers'; write it whole with eval\.vsna"):
        vsna_card.main(["--study", str(tmp_path / vsna.NAME), "--out", str(tmp_path / "card.md")])
