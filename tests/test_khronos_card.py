"""The card and pictures of KHRONOS: every number from its records, what won and lost from comparing their rows."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import save_file

from eval import khronos_card, khronos_figures, khronos_words
from eval.khronos import CoverageRow, InversionRow, targets
from eval.khronos_cost import MemoryRow, PredictSpeed
from eval.khronos_speed import AlsAgainstGradient, GradientTrial
from eval.poisson import PoissonRow
from eval.tabular import Parity, TabularRow, TabularRun
from training import provenance
from training.khronos_comparison import Evaluation, Splits, Verdict
from training.khronos_inconel import Property

POISSON = {  # errors by method and degree at 16 and 32 parameters
    ("khronos", 2): (4e-3, 1e-5),
    ("khronos", 3): (5e-3, 1e-6),
    ("pyinn", 2): (1e-3, 4e-5),
    ("scikit-fem", 1): (0.5, 0.25),
}
TABLES = {  # test errors by set and method for two seeds
    "friedman1": {"khronos": (1.0, 1.2), "gaussian_process": (0.5, 0.6), "mlp": (1.1, 1.1), "ridge": (2.0, 2.4)},
    "digits": {"khronos": (0.125, 0.25), "logistic_regression": (0.25, 0.5)},
}
FIXED_R2 = {"khronos": 0.5, "ridge": 0.4, "gaussian_process": 0.625, "xgboost": 0.3, "mean": -0.1}
NUM_WALLS = 3
NUM_TIMES = 8


def tabular_row(dataset, method, errors):
    kind = "accuracy" if dataset == "digits" else "rmse"
    scores = [{"accuracy": 1 - e} if kind == "accuracy" else {"rmse": e, "r2": 1 - e / 10} for e in errors]
    runs = [TabularRun(seed, 123 + seed, 4.0, 0.5, 0.25, {}, **score) for seed, score in enumerate(scores)]
    names = ["num_parameters", "tune_seconds", "fit_seconds", "predict_seconds", *scores[0]]
    parity = Parity((0.0, 1.0, 2.0), (0.1, 1.1, 1.9)) if method == "khronos" and kind == "rmse" else None
    return TabularRow(
        dataset,
        method,
        30,
        20,
        5,
        noise=0.5 if kind == "rmse" else None,
        num_candidates=7,
        runs=tuple(runs),
        mean={name: float(np.mean([getattr(run, name) for run in runs])) for name in names},
        standard_deviation={name: float(np.std([getattr(run, name) for run in runs], ddof=1)) for name in names},
        parity=parity,
        note="given 30 of 40 points" if method == "gaussian_process" else "",
    )


def plain(rows):
    return [dataclasses.asdict(row) for row in rows]


@pytest.fixture
def study():
    poisson = [
        PoissonRow(problem, method, degree, size, 1, size - (method == "scikit-fem"), error, degree / size)
        for problem in ("kan", "rotated")
        for (method, degree), errors in POISSON.items()
        for size, error in zip((16, 32), errors, strict=True)
    ]
    poisson.append(PoissonRow("kan", "pykan", None, 32, note="not installed: no module kan; pip install pykan"))
    tables = [tabular_row(name, method, errors) for name, by in TABLES.items() for method, errors in by.items()]
    tables.append(TabularRow("california_housing", None, note="cannot be had: no network"))
    inversion = [
        InversionRow("borehole", 8, 4, 1, 2, 98, 0.99, num_starts, 3, 4.5, 46.0, 45, 6, 2e-7, 3e-5)
        for num_starts in (47, 64)
    ]
    trials = (GradientTrial(64, 0.1, 3, 2.0, 0.01, True, 8.0), GradientTrial(64, 1.0, 3, 4.0, 0.3, False, 8.0))
    against = AlsAgainstGradient(10_000, 6, 4, 8, 77, 0.125, 0.01, True, trials, 8.0)
    memory = [MemoryRow(task, n, 32 * n, 2**20 * 5, None) for task in ("predict", "fit") for n in (1000, 2000)]
    line = {name: [0.0, 0.5, 1.0] for name in ("x", "truth", "prediction", "lower", "upper")}
    slices = {"function": "sin(3 pi x_1 x_2)", "noise": 0.1, "level": 0.9, "num_parameters": 90, "num_points": 60}
    slices["rows"] = [{"at": at, **line, "data_x": [0.3], "data_y": [0.2]} for at in (0.25, 0.75)]
    sizes = [(rank, cells) for rank in (1, 2) for cells in (1, 2)]
    errors = [
        {"rank": r, "num_cells": c, "num_parameters": 9 * r * c, "relative_error": 0.1 / r, "objective": [0.5, 0.1 / r]}
        for r, c in sizes
    ]
    parts = {
        "poisson": {"rows": plain(poisson)},
        "tabular": {"rows": plain(tables)},
        "inversion": {"rows": plain(inversion)},
        "speed": {
            "predict": dataclasses.asdict(PredictSpeed(2000, 7, 4, 32, 3, 0.5, 1.5, 6.0, 1e-6)),
            "memory": plain(memory),
            "als_against_gradient": {
                **dataclasses.asdict(against),
                "best": dataclasses.asdict(against.best),
                "ratio": against.ratio,
            },
        },
        "coverage": {
            "dataset": "friedman1",
            "num_train": 150,
            "num_seeds": 4,
            "num_parameters": 242,
            "rmse": {"mean": 1.5, "standard_deviation": 0.25},
            "rows": plain([CoverageRow(0.5, 0.51, 0.03), CoverageRow(0.9, 0.885, 0.02), CoverageRow(0.95, 0.99, 0.01)]),
        },
        "fits": {
            "slices": slices,
            "errors": {"function": "borehole", "num_points": 200, "degree": 3, "rows": errors},
        },
    }
    record = {"quick": False} | {
        name: {**part, "seconds": 12.0, "provenance": provenance.provenance()} for name, part in parts.items()
    }
    return json.loads(json.dumps(record | {"targets": plain(targets(record))}))


def inconel_property(about, y):
    rows = np.arange(len(y))
    walls = [(rows[rows % NUM_WALLS != wall], rows[rows % NUM_WALLS == wall]) for wall in range(NUM_WALLS)]
    splits = Splits(walls[0], walls, walls)
    methods = {
        name: Evaluation(name, None, 50, {}, r2, r2, np.array([r2, r2 + 0.1, r2 + 0.2]), y + 30 * (1 - r2), 3.0)
        for name, r2 in FIXED_R2.items()
    }
    verdicts = [
        Verdict("repeated", "gaussian_process", -0.125, 0.01, False),
        Verdict("leave_one_wall_out", "ridge", 0.02, 0.03, True),
    ]
    found = {"methods": [each.row(y, splits) for each in methods.values()], "verdicts": plain(verdicts)}
    return dataclasses.asdict(about) | found, {name: each.wall_predictions for name, each in methods.items()}


@pytest.fixture
def inconel_and_arrays():
    y = np.linspace(300, 900, 9)
    scalogram = np.linspace(0, 1, NUM_TIMES**2).reshape(NUM_TIMES, NUM_TIMES)
    arrays = {"left_out.scalogram": scalogram, "left_out.curve": scalogram.mean(0)}
    properties, inversions = {}, []
    for about in (
        Property("yield_stress", "MPa", 240, 240, 0.76, 47),
        Property("uts", "MPa", 48, 40, 0.70, 64),
    ):
        properties[about.name], predictions = inconel_property(about, y)
        arrays[f"{about.name}.measured"] = y
        arrays |= {f"{about.name}.predicted.{name}": values for name, values in predictions.items()}
        for search, count in (("box", 5), ("normal", 5), ("prior", 1)):
            solutions = scalogram * np.linspace(0.5, 1.5, count)[:, None, None]
            curves = solutions.mean(-2)
            arrays[f"{about.name}.{search}.scalograms"] = solutions
            arrays[f"{about.name}.{search}.envelope"] = np.stack([curves.mean(0), curves.min(0), curves.max(0)])
            inversions.append(
                {
                    "property": about.name,
                    "target": 444.25,
                    "search": search,
                    "num_starts": about.num_starts,
                    "num_solutions": count,
                    "num_unsolved": 3,
                    "milliseconds": 2.5 if search != "prior" else 99.0,
                    "num_timed": 50,
                    "predicted_for_left_out": 450.5,
                    "distance_of_left_out": 1.75,
                    "largest_residual": 5e-7,
                    "worst_residual": 6e-7,
                    "distances": {"min": 0.5, "median": 1.0, "max": 2.5},
                    "quantiles": [0.05, 0.95],
                    "truth_within_envelope": 0.75,
                    "error_of_mean_curve": 0.25,
                }
            )
    record = {"data": "inconel718", "features": "scalograms+bins", "num_points": 9, "walls": [1, 2, 3]}
    record |= {"num_candidates": 24, "num_folds": 5, "left_out": "3_g", "notes": ["A note."], "properties": properties}
    record |= {"inversions": inversions, "provenance": provenance.provenance(5)}
    return json.loads(json.dumps(record)), {name: values.astype(np.float32) for name, values in arrays.items()}


@pytest.fixture
def inconel(inconel_and_arrays):
    return inconel_and_arrays[0]


@pytest.fixture
def arrays(inconel_and_arrays):
    return inconel_and_arrays[1]


def cells(text, start):
    """The cells of the one row of a table that starts like this."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_card_says_what_the_records_hold(study, inconel):
    text = khronos_card.khronos_card(study, inconel, "pictures", "It rained.\n")
    assert text.startswith("---\nlibrary_name: transformers\nlicense: apache-2.0\n")
    for part in (
        "Its models of Inconel 718 below have 50 (yield stress) and 50 (UTS) parameters.",
        "tuned with 7 candidates",
        "over 2 seeds (0 and 1)",
        "- pykan: not installed: no module kan; pip install pykan\n",
        "- california housing: cannot be had: no network\n",
        "- friedman1: given 30 of 40 points\n",
        "9 points of 3 walls; inputs are principal components of the scalograms and bins",
        "Parameters leave out principal components (of digits) and the scales of inputs, for all methods alike.",
        "not held against the search for the most probable solution",
        "UTS; KHRONOS, MLP and KAN have at most 48 parameters:",
        "- A note.\n",
        "- For 3-G itself the model of UTS predicts 450.5 MPa; measured are 444.2.\n",
        "Friedman1, 150 training points, 242 parameters, test RMSE 1.500 ± 0.250:",
        "\n\nIt rained.\n\n## How it was measured",
        f"| poisson | `{study['poisson']['provenance']['command']}` |",
        "| Inconel 718 | `",
        "torch " + study["poisson"]["provenance"]["versions"]["torch"],
    ):
        assert part in text
    assert "too small" not in text
    assert "too small to say anything" in khronos_card.khronos_card(study | {"quick": True}, inconel, ".")


def test_targets_are_reached_or_not(study, inconel):
    text = khronos_card.targets_table(study, inconel)
    assert cells(text, "seconds to predict a million points")[2:] == ["not recorded", "not measured"]
    assert cells(text, "milliseconds of an inversion from 47 starts")[1:] == ["<= 5", "4.5", "reached"]
    assert cells(text, "Inconel 718, yield stress: parameters")[1:] == ["<= 240", "50", "reached"]
    assert cells(text, "Inconel 718, UTS: parameters")[1:] == ["<= 40", "50", "**not reached**"]
    repeated = cells(text, "Inconel 718, UTS: R², repeated splits")
    assert repeated[2:] == ["-0.125 ± 0.010", "**not reached**"]
    assert cells(text, "Inconel 718, UTS: R², each wall left out")[-1] == "reached"
    # The same bounds, of what the other record measured; the search for the most probable solution is another task.
    assert cells(text, "Inconel 718: milliseconds of an inversion from 64 starts")[1:] == ["<= 5", "2.5", "reached"]
    assert cells(text, "largest residual of all points that it returns")[1:] == ["<= 1e-06", "3e-05", "**not reached**"]
    assert cells(text, "Inconel 718: largest residual of all points that it returns")[-1] == "reached"
    for row in inconel["inversions"]:
        row |= {"worst_residual": 2e-6, "milliseconds": 6.0}
    inconel["properties"]["uts"]["published_parameters"] = None
    text = khronos_card.targets_table(study, inconel)
    assert cells(text, "Inconel 718: milliseconds of an inversion from 64 starts")[-1] == "**not reached**"
    assert cells(text, "Inconel 718: largest residual of all points that it returns")[-1] == "**not reached**"
    assert "Inconel 718, UTS: parameters" not in text
    row = cells(khronos_card.inconel_table(inconel["properties"]["uts"]), "published, one split")
    assert [row[0], row[1], row[3]] == ["published, one split", "", "0.70"]


def test_the_best_is_bold_whoever_it_is(study, inconel):
    solved = khronos_card.poisson_table(study["poisson"]["rows"], "kan")
    assert "pykan" not in solved
    assert cells(solved, "pyinn")[1:] == ["2", "**1.0e-03**", "4.0e-05", "1", "0.062"]
    assert cells(solved, "scikit-fem")[1:4] == ["1", "5.0e-01 (15)", "2.5e-01 (31)"]
    assert re.findall(r"\*\*[^*]+\*\*", solved) == ["**1.0e-06**", "**1.0e-03**"]

    tables = khronos_card.tabular_table(study["tabular"]["rows"])
    assert cells(tables, "friedman1, RMSE")[1:5] == ["KHRONOS", "1.1 ± 0.14", "0.890", "124"]
    assert cells(tables, "digits, share of wrong labels")[1:4] == ["KHRONOS", "**0.1875** ± 0.088", ""]
    assert re.findall(r"\*\*[^*]+\*\*", tables) == ["**0.55**", "**0.1875**"]

    about = inconel["properties"]["uts"]
    for name in ("Gaussian process", "KHRONOS"):
        row = next(row for row in about["methods"] if khronos_figures.named(row["method"]) == name)
        walls = row["leave_one_wall_out"]["r2"]
        found = cells(khronos_card.inconel_table(about), name)
        expected = [f"{each:.3f}" for each in (row["tuning_r2"], row["fixed_r2"], row["repeated"]["mean_r2"], walls)]
        assert [cell.replace("*", "").partition(" ± ")[0] for cell in found[2:6]] == expected
        assert all(cell.startswith("**") == (name == "Gaussian process") for cell in found[2:6])
    assert cells(khronos_card.inconel_table(about), "published, one split")[1:4] == ["40", "", "0.70"]


def test_words_follow_the_rows(study, inconel):
    (words,) = khronos_words.poisson_words(study["poisson"]["rows"], "kan")
    assert words == (
        "Poisson, one product of functions (KAN paper): KHRONOS errs least at 32 parameters; pyinn errs less at 16 "
        "parameters; at 32 the error of pyinn of degree 2 is 40 times that of degree 3 and 4 times that of equal "
        "degree; scikit-fem is the fastest there (0.031 s against 0.094 s)."
    )
    assert khronos_words.tabular_words(study["tabular"]["rows"]) == [
        "Friedman1: KHRONOS is behind Gaussian process (0.5); undecided against MLP (1); ahead of ridge (2).",
        "Digits: KHRONOS is ahead of logistic regression (2).",
    ]
    first, _ = khronos_words.inconel_words(inconel)
    assert first == (
        "Inconel 718, yield stress: KHRONOS is behind Gaussian process on repeated splits (-0.125 ± 0.010), level with "
        "ridge on each wall left out (+0.020 ± 0.030), on the fixed split behind Gaussian process, there below the "
        "published figure."
    )
    for row in inconel["properties"]["uts"]["methods"]:
        row["fixed_r2"] = 0.7 if row["method"] == "khronos" else 0.6
    inconel["properties"]["uts"]["verdicts"][0]["difference"] = 0.125
    second = khronos_words.inconel_words(inconel)[1]
    assert "ahead of Gaussian process on repeated splits" in second
    assert second.endswith("first on the fixed split, there above the published figure.")
    assert khronos_words.coverage_words(study["coverage"]) == [
        "Intervals are too narrow at 90 %; too wide at 95 % on friedman1, by more than the standard error of the "
        "mean over 4 seeds."
    ]
    for row in study["coverage"]["rows"]:
        row["mean"] = row["level"]
    assert khronos_words.coverage_words(study["coverage"])[0].startswith("No interval is off on friedman1")
    predict, fit, *memory = khronos_words.speed_words(study["speed"])
    assert predict.endswith("0.5 s; by a weighted gather 1.5 s, by a dense basis 6 s.")
    assert "0.125 s; the fastest of 2 trainings by gradient took 2 s to the same error (16 times as long)" in fit
    assert "a sum of 4 products without noise, the rank of the model 8, and the error to be reached 0.01 of" in fit
    assert memory[0] == "Memory of predict beyond the caller's table: 5 MiB at 1,000 points and 5 MiB at 2,000 points."


def test_what_failed_is_said(study, inconel, arrays, tmp_path):
    against = study["speed"]["als_against_gradient"]
    against |= {"best": None, "ratio": 64.0}
    for trial in against["trials"]:
        trial["reached"] = False
    study["poisson"]["rows"][0]["squared_l2_error"] = None
    study["inversion"]["rows"][0]["largest_residual"] = None
    for row in inconel["inversions"]:
        row["num_solutions"] = 0
        for name in ("largest_residual", "distances", "quantiles", "truth_within_envelope", "error_of_mean_curve"):
            del row[name]
    text = khronos_card.khronos_card(study, inconel, ".")
    for part in (
        "none of 2 trainings by gradient came down to the same error; the longest were stopped at 64 times that time",
        "| KHRONOS | 2 | diverged | 1.0e-05 |",
        "| borehole, 8 inputs | 47 | 46 (at least 45) | 6 | 4.5 | not recorded | 3e-05 |",
        "- UTS, from all over the box: no solution was found.\n",
        "| UTS of 444.2 MPa, most probable | 64 | 0 | 3 | 99.0 | not recorded | 6e-07 |",
    ):
        assert part in text
    without = {name: each for name, each in arrays.items() if not name.endswith(("scalograms", "envelope"))}
    khronos_figures.save(tmp_path / "x.png", (9, 5), lambda f: khronos_figures.draw_inversion(f, inconel, without))
    khronos_figures.save(
        tmp_path / "x.png", (9, 3), lambda f: khronos_figures.draw_convergence(f, study["fits"]["errors"], against)
    )


def test_command(study, inconel, arrays, tmp_path):
    folder, out = tmp_path / "cards" / "khronos", tmp_path / "cards" / "khronos.md"
    for name, record in (("khronos", study), ("inconel", inconel)):
        provenance.write_json(folder / f"{name}.json", record)
    save_file({name: np.ascontiguousarray(each) for name, each in arrays.items()}, folder / "inversion.safetensors")
    (tmp_path / "remarks.md").write_text("It lost since.\n")

    def run(**other):
        files = {"study": folder / "khronos.json", "inconel": folder / "inconel.json"}
        files |= {"inversion": folder / "inversion.safetensors", "out": out, **other}
        khronos_card.main([word for flag, file in files.items() for word in (f"--{flag}", str(file))])

    run(remarks=tmp_path / "remarks.md")
    text = out.read_text()
    assert text == khronos_card.khronos_card(study, inconel, "khronos", "It lost since.")
    links = re.findall(r"\]\((khronos/[^)]+)\)", text)
    names = {"poisson", "tabular", "fit", "convergence", "parity", "inversion"}
    assert {Path(link).stem for link in links} == names
    assert {path.stem for path in folder.glob("*.png")} == names
    assert all((out.parent / link).read_bytes().startswith(b"\x89PNG") for link in links)
    with pytest.raises(SystemExit, match=r"absent\.json"):
        run(study=tmp_path / "absent.json")
    with pytest.raises(SystemExit, match="a record lacks 'poisson'"):
        run(study=folder / "inconel.json")
    with pytest.raises(SystemExit, match="error: "):
        run(inversion=folder / "khronos.json")
    assert out.read_text() == text


def test_curves_of_the_poisson_problems(study):
    curves = khronos_figures.poisson_curves(study["poisson"]["rows"], "kan")
    assert [*curves] == [*POISSON]  # ours first
    for key, curve in curves.items():
        assert tuple(row["squared_l2_error"] for row in curve) == POISSON[key]
    figure = Figure()
    khronos_figures.draw_poisson(figure, study["poisson"]["rows"])
    assert [len(ax.lines) for ax in figure.axes] == [len(POISSON)] * 2
    looks = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines]
    assert len(set(looks)) == len(POISSON)
    assert looks[0][0] == looks[1][0] == khronos_figures.OURS_COLOUR


def test_marks_lie_where_the_rows_say(study, inconel, arrays):
    figure = Figure()
    khronos_figures.draw_tabular(figure, study["tabular"]["rows"])
    assert [ax.get_title() for ax in figure.axes] == ["friedman1", "digits"]
    for ax, (name, methods) in zip(figure.axes, TABLES.items(), strict=True):
        marks = [line.get_ydata()[0] for line in ax.lines if line.get_marker() != "None"]
        assert marks == pytest.approx([np.mean(errors) for errors in methods.values()]), name
    figure = Figure()
    khronos_figures.draw_parity(figure, study["tabular"]["rows"], inconel, arrays)
    assert [ax.get_title() for ax in figure.axes] == [
        "yield stress [MPa], walls left out",
        "UTS [MPa], walls left out",
        "friedman1, test points",
    ]
    rival, ours = (np.asarray(points.get_offsets()) for points in figure.axes[1].collections)
    np.testing.assert_array_equal(ours[:, 1], arrays["uts.predicted.khronos"])
    np.testing.assert_array_equal(rival[:, 1], arrays["uts.predicted.ridge"])  # the best where walls are left out
    figure = Figure()
    khronos_figures.draw_inversion(figure, inconel, arrays)
    titles = [ax.get_title() for ax in figure.axes]
    shown = ["3-G", "nearest", "median", "farthest", "most probable"]
    assert titles[:-1] == ["yield stress = 444.2 MPa", *shown, "UTS = 444.2 MPa", *shown]  # the last is the colour bar
    pictures = [ax.images[0].get_array() for ax in figure.axes[1:6]]
    distances = [float(np.square(each - pictures[0]).sum()) for each in pictures]
    assert distances[1] <= distances[2] <= distances[3]


def test_the_committed_card_is_what_its_records_generate():
    cards = Path(__file__).resolve().parent.parent / "model_cards"
    records = [json.loads((cards / "khronos" / f"{name}.json").read_text("utf-8")) for name in ("khronos", "inconel")]
    remarks = cards / "khronos" / "remarks.md"
    text = (cards / "khronos.md").read_text("utf-8")
    prose = remarks.read_text("utf-8") if remarks.is_file() else ""
    assert text == khronos_card.khronos_card(*records, "khronos", prose)
    assert all((cards / link).is_file() for link in re.findall(r"\]\((khronos/[^)]+)\)", text))
