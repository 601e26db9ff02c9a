import json

import pytest
import torch

from eval import khronos
from eval.khronos import PARTS, RECORD, main, run, targets
from eval.khronos_cost import gather_forward, measure_memory
from sna_core.network import CPNetwork


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder of a quick run of all parts, and what it returned."""
    out = tmp_path_factory.mktemp("khronos")
    return out, main(["--out", str(out), "--quick"])


def test_quick_run_writes_every_part_as_json(quick):
    out, record = quick
    assert json.loads((out / RECORD).read_text(encoding="utf-8")) == json.loads(json.dumps(record))
    assert set(record) == {"quick", "targets", *PARTS}
    pictures = {"poisson.png", "tabular.png", "fit.png", "convergence.png"}
    assert {path.name for path in out.iterdir()} == {RECORD, *pictures}
    for name in PARTS:
        assert record[name]["seconds"] > 0
        assert record[name]["provenance"]["versions"]["torch"]


def test_record_has_what_pictures_need(quick):
    _, record = quick
    assert {row["method"] for row in record["poisson"]["rows"]} == {"khronos", "pyinn", "scikit-fem"}
    parities = [row["parity"] for row in record["tabular"]["rows"] if row["method"] == "khronos"]
    assert all(len(parity["true"]) == len(parity["predicted"]) == 40 for parity in parities)
    for row in record["fits"]["slices"]["rows"]:
        assert all(
            low < value < high for low, value, high in zip(row["lower"], row["prediction"], row["upper"], strict=True)
        )
        assert len(row["x"]) == len(row["truth"]) == len(row["prediction"]) == 101
        assert len(row["data_x"]) == len(row["data_y"]) > 0
    first, second = record["fits"]["errors"]["rows"]
    assert first["num_parameters"] < second["num_parameters"]
    assert second["relative_error"] < first["relative_error"] < 1
    assert second["objective"][-1] < second["objective"][0]


def test_inversions_converge_and_intervals_grow_with_their_level(quick):
    _, record = quick
    rows = record["inversion"]["rows"]
    assert [(row["function"], row["num_starts"]) for row in rows] == [
        (name, num_starts) for name in ("friedman1", "borehole") for num_starts in (47, 64)
    ]
    assert [row["num_parameters"] for row in rows] == [212, 212, 98, 98]
    for row in rows:
        assert 0 < row["fewest_solutions"] <= row["num_solutions"] <= row["num_starts"]
        assert row["largest_residual"] <= 1e-6
        assert row["worst_residual"] >= row["largest_residual"]
    means = [row["mean"] for row in record["coverage"]["rows"]]
    assert means == sorted(means)
    assert 0 < means[0] < means[-1] <= 1


def test_all_means_to_predict_agree_and_memory_is_measured(quick):
    _, record = quick
    assert record["speed"]["predict"]["largest_difference"] < 1e-5
    assert [(row["task"], row["num_points"]) for row in record["speed"]["memory"]] == [
        (task, num_points) for task in ("predict", "fit") for num_points in (1000, 2000)
    ]
    assert record["speed"]["als_against_gradient"]["ratio"] > 0


def test_targets_of_other_sizes_stay_open(quick):
    measured = {each["figure"]: each["measured"] for each in quick[1]["targets"]}
    assert [figure for figure in measured if measured[figure] is not None] == [
        "milliseconds of an inversion from 47 starts",
        "milliseconds of an inversion from 64 starts",
        "largest residual of all points that it returns",
    ]


def test_parts_are_kept_unless_they_are_asked_for(quick, monkeypatch):
    out, _ = quick
    before = json.loads((out / RECORD).read_text(encoding="utf-8"))
    monkeypatch.setattr(khronos, "PARTS", dict.fromkeys(PARTS))  # none can be called
    assert run(out, quick=True) == before
    monkeypatch.setattr(khronos, "PARTS", {**dict.fromkeys(PARTS), "coverage": lambda sizes: {"rows": []}})
    after = run(out, ["coverage"], quick=True)
    assert after["coverage"]["rows"] == []
    assert {name: after[name] for name in PARTS if name != "coverage"} == {
        name: before[name] for name in PARTS if name != "coverage"
    }
    assert json.loads((out / RECORD).read_text(encoding="utf-8")) == after


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    calls = []

    def part(name, fails=False):
        def measure(sizes):
            calls.append(name)
            if fails:
                raise KeyboardInterrupt
            return {"rows": []}

        return measure

    monkeypatch.setattr(khronos, "PARTS", {"poisson": part("poisson"), "tabular": part("tabular", fails=True)})
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.setattr(khronos, "PARTS", {"poisson": part("poisson"), "tabular": part("tabular")})
    assert set(run(tmp_path)) == {"quick", "targets", "poisson", "tabular"}
    assert calls == ["poisson", "tabular", "tabular"]


def test_targets_are_held_against_the_record():
    poisson = {"problem": "kan", "method": "khronos", "size": 512}
    inversion = [
        {"num_starts": 47, "milliseconds": 4.0, "worst_residual": 1e-5},
        {"num_starts": 64, "milliseconds": 6.0, "worst_residual": 1e-8},
    ]
    memory = [
        {"task": task, "num_points": num_points, "table_bytes": 32 * num_points, "peak_bytes": peak}
        for task, peaks in (("predict", (10**8, 10**8 + 288 * 10**5)), ("fit", (10**8, 10**8 + 576 * 10**5)))
        for num_points, peak in zip((100_000, 1_000_000), peaks, strict=True)
    ]
    record = {
        "poisson": {
            "rows": [
                {**poisson, "squared_l2_error": 1e-12, "seconds": 0.1},
                {**poisson, "squared_l2_error": 1e-17, "seconds": 2.0},
                {**poisson, "size": 256, "squared_l2_error": 1e-20, "seconds": 0.1},
                {**poisson, "method": "pyinn", "squared_l2_error": 1e-20, "seconds": 0.1},
            ]
        },
        "inversion": {"rows": inversion},
        "speed": {
            "predict": {"num_points": 1_000_000, "rank": 32, "seconds": 0.6},
            "memory": memory,
            "als_against_gradient": {"num_points": 10_000, "ratio": 19.0},
        },
    }
    found = targets(record)
    assert [each.measured for each in found] == [1e-17, 2.0, 4.0, 6.0, 1e-5, 19.0, 0.6, 1.0, 2.0]
    assert [each.reached for each in found] == [True, False, True, False, False, False, True, True, False]
    assert {each.reached for each in targets({})} == {None}


def test_without_an_out_folder_it_writes_to_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(khronos, "PARTS", {"poisson": lambda sizes: {"rows": []}})
    main([])
    assert [path.name for path in (tmp_path / "runs" / "khronos").iterdir()] == [RECORD]  # nothing to draw


def test_gather_is_the_network():
    network = CPNetwork(3, rank=2, num_cells=4, degree=3, unit_weights=True, dtype=torch.float64)
    x = torch.rand(50, 3, dtype=torch.float64)
    torch.testing.assert_close(gather_forward(network, x), network.reference_forward(x))


def test_bad_input_is_refused(quick, tmp_path, capsys):
    out, _ = quick
    with pytest.raises(SystemExit, match=r"khronos\.json was made with --quick; give another --out"):
        main(["--out", str(out), "--only", "coverage"])
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--only", "poison"])
    assert "invalid choice: 'poison'" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"parts: poison unknown; expected some of poisson, tabular"):
        run(tmp_path, ["poison"])
    with pytest.raises(ValueError, match="task = 'sleep'; expected predict or fit"):
        measure_memory("sleep", 10)
    assert not list(tmp_path.iterdir())
