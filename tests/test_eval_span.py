"""The study of SPAN: its statistics, summary, targets, pictures and card, on records that are made up."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from scipy import stats
from stable_baselines3.common.env_util import make_vec_env

from eval import span_card, span_cost, span_figures, span_offline, span_runs, span_targets
from eval.span_statistics import (
    bootstrap,
    efficiency_gain,
    expected_cost,
    final_score,
    improvement_probability,
    interquartile_mean,
    learning_area,
    mean_over_tasks,
    normalised,
    ratio,
    restricted,
    steps_to_threshold,
    succeeded,
)
from eval.span_study import BEST_MLP, choose, compact, measures, summarise, summarise_offline
from eval.span_words import choice_words, comparison_words, interval, task_words, verdict, winner_words
from training.provenance import provenance, write_json

DRAWS = {"num_resamples": 60, "seed": 0}
STEPS = [100, 200, 300, 400]
RISES = {"span": 100, "mlp_tanh": 200, "mlp_relu": 250, "kan": 600}  # steps until the return is 1


def made_up(task="cartpole", network="span", *, seed=0, purpose="test", learning_rate=1e-3, size="small", rise=None):
    """A run whose return rises on a line to 1, and stays there."""
    rise = RISES[network] if rise is None else rise
    returns = [min(step / (rise + 10 * seed), 1.0) for step in STEPS]
    return {
        "task": task,
        "environment": "CartPole-v1",
        "algorithm": "PPO",
        "network": network,
        "num_parameters": 855,
        "learning_rate": learning_rate,
        "seed": seed,
        "purpose": purpose,
        "total_steps": 400,
        "steps": STEPS,
        "returns": returns,
        "successes": None,
        "reference": {"low": 0.0, "high": 1.0, "threshold": 0.9},
        "size": size,
        "train_seconds": 8.0,
        "provenance": {"commit": "abc", "seed": seed},
    }


def study(tasks=("cartpole", "pole"), networks=tuple(RISES)):
    test = [made_up(task, network, seed=seed) for task in tasks for network in networks for seed in range(4)]
    tune = [
        made_up(task, network, seed=9, purpose="tune", learning_rate=rate, rise=RISES[network] * (1 + (rate != 1e-3)))
        for task in tasks
        for network in networks
        for rate in (3e-4, 1e-3, 3e-3)
    ]
    return test + tune


@pytest.fixture(scope="module")
def record():
    runs = study()
    where = {"algorithm": "PPO", "environment": "CartPole-v1"}
    cost = {  # as eval.span writes it
        "rows": [{"what": "update", "network": "span", **where}],
        "ppo_update": {
            "span": {"seconds": 1.1e-3, "ratio": 1.1, "num_parameters": 860, **where},
            "mlp_tanh": {"seconds": 1e-3, "ratio": 1.0, "num_parameters": 855, **where},
        },
        "act": {"span": {"seconds": 1.3e-4, "ratio": 1.3, "num_parameters": 860, **where}},
        "provenance": provenance(0),
    }
    offline = [
        {"dataset": "hopper-expert", "algorithm": "td3bc", "network": network, "parameter_factor": 1, "seed": seed}
        | {"num_parameters": 900, "normalised_return": score + 0.1 * seed, "purpose": "test"}
        for network, score in (("span", 0.6), ("mlp_relu", 0.4), ("mlp_tanh", 0.3))
        for seed in range(2)
    ]
    found = {"runs": [compact(run) for run in runs], "summary": summarise(runs, **DRAWS)}
    found |= {"cost": cost, "offline": offline, "provenance": provenance(0)}
    return found | {"targets": [vars(each) for each in span_targets.targets(found)]}


def test_scores_of_a_run():
    assert normalised([20, 260, 500, 740], 20, 500).tolist() == [0, 0.5, 1, 1.5]
    assert learning_area([0, 1, 3], [0, 1, 1]) == pytest.approx((0.5 + 2) / 3)
    assert learning_area([7], [0.4]) == 0.4
    assert final_score([0, 0, 1, 3]) == 2  # at least two
    assert final_score(range(30)) == 28  # the last tenth
    assert final_score([5]) == 5
    assert succeeded([0, 0, 2, 4], 3)
    assert not succeeded([9, 9, 2, 3.9], 3)


def test_steps_to_threshold_are_those_of_the_first_crossing():
    assert steps_to_threshold([10, 20, 30], [0, 1, 3], 2) == 25
    assert steps_to_threshold([10, 20, 30], [0, 2, 0], 2) == 20  # it falls back; `succeeded` tells
    assert steps_to_threshold([10, 20, 30], [5, 0, 0], 2) == 10
    assert steps_to_threshold([10, 20, 30], [0, 1, 1.9], 2) is None
    steps, returns = np.array([10.0, 20, 30]), np.array([0.0, 1, 3])
    assert steps_to_threshold(7 * steps, 5 + 2 * returns, 5 + 2 * 2) == pytest.approx(7 * 25)
    assert restricted([25, None, 50], 40).tolist() == [25, 40, 40]


def test_cost_of_a_success_counts_what_failed():
    assert expected_cost([10, 40, 40], [True, False, False]) == 90
    assert expected_cost([10, 20, 30], [True, True, True]) == 20
    assert expected_cost([40, 40], [False, False]) is None
    # Restarting until a success, p = 1/4, costs 3 failures and a success on average.
    rng = np.random.default_rng(0)
    restarts = [40.0 * (rng.geometric(0.25) - 1) + 10.0 for _ in range(20_000)]
    assert expected_cost([10, 40, 40, 40], [True, False, False, False]) == pytest.approx(np.mean(restarts), rel=0.03)


def test_interquartile_mean_is_scipys_over_all_runs():
    rng = np.random.default_rng(0)
    runs = [rng.normal(size=(n, 3)) for n in (5, 9, 3)]
    np.testing.assert_allclose(interquartile_mean(runs), stats.trim_mean(np.concatenate(runs), 0.25))
    assert interquartile_mean([[1, 2, 3], [4, 5, 6, 7, 100]]) == 4.5
    assert interquartile_mean([[0, 3], [9]]) == 4
    mixed = [rng.permutation(task) for task in runs[::-1]]
    np.testing.assert_allclose(interquartile_mean(mixed), interquartile_mean(runs))
    np.testing.assert_allclose(interquartile_mean([3 * task + 1 for task in runs]), 3 * interquartile_mean(runs) + 1)
    assert mean_over_tasks([[0, 1], [1, 1, 1, 1]]) == 0.75


def test_probability_of_improvement_is_mann_whitneys():
    rng = np.random.default_rng(0)
    x, y = ([rng.integers(0, 4, size=n) for n in sizes] for sizes in ((5, 7), (6, 4)))
    expected = [stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)) for a, b in zip(x, y, strict=True)]
    assert improvement_probability(x, y) == pytest.approx(np.mean(expected))
    assert improvement_probability([[1, 2]], [[1, 0]]) == pytest.approx((0.5 + 1 + 1 + 1) / 4)
    assert improvement_probability(x, y) + improvement_probability(y, x) == pytest.approx(1)
    assert improvement_probability([np.exp(a) for a in x], [np.exp(b) for b in y]) == improvement_probability(x, y)


def test_efficiency_gain_is_how_much_more_the_others_need():
    assert efficiency_gain([[0.2, 0.4]], [[0.6, 0.6]]) == pytest.approx(1)
    assert efficiency_gain([[1, 1]], [[1, 1]]) == 0
    assert ratio(1, 0) == np.inf
    assert np.isnan(ratio(0, 0))


def test_bootstrap_of_a_mean_has_its_standard_error_and_covers_it():
    rng = np.random.default_rng(1)
    one = [rng.normal(size=20), 5 + rng.normal(size=30)]
    found = bootstrap(mean_over_tasks, one, num_resamples=1000, seed=0)
    error = 0.5 * np.sqrt(
        one[0].var() / 20 + one[1].var() / 30
    )  # of tasks drawn on their own: their levels do not count
    assert found.value == pytest.approx(np.mean([task.mean() for task in one]))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    covered = 0
    for seed in range(100):
        ours, others = rng.normal(2, 1, size=15), rng.normal(1, 0.5, size=15)
        difference = bootstrap(lambda a, b: a[0].mean() - b[0].mean(), [ours], [others], num_resamples=100, seed=seed)
        covered += difference.low <= 1 <= difference.high
    assert 82 <= covered <= 99


def test_bootstrap_is_seeded_and_takes_columns_single_runs_and_infinite_ratios():
    runs = [np.random.default_rng(0).normal(size=(6, 2))]
    first, again = (bootstrap(interquartile_mean, runs, num_resamples=50, seed=3) for _ in range(2))
    assert first.low.shape == (2,)
    assert first.low.tolist() == again.low.tolist()
    assert first.low.tolist() != bootstrap(interquartile_mean, runs, num_resamples=50, seed=4).low.tolist()
    assert bootstrap(interquartile_mean, [[1.0], [2.0, 3.0]], num_resamples=50, seed=0).low is None
    rates = bootstrap(lambda a, b: ratio(a[0].mean(), b[0].mean()), [[1, 1, 0]], [[1, 0, 0]], num_resamples=99, seed=0)
    assert rates.value == 2
    assert rates.high == np.inf
    none = bootstrap(lambda a, b: ratio(a[0].mean(), b[0].mean()), [[0, 0]], [[0, 0]], num_resamples=9, seed=0)
    assert np.isnan([none.value, none.low, none.high]).all()


def test_statistics_refuse_bad_input():
    with pytest.raises(ValueError, match="expected high above low"):
        normalised([1], 5, 5)
    with pytest.raises(ValueError, match=r"shape \(2,\) and values of shape \(1,\); expected as many"):
        learning_area([1, 2], [1])
    with pytest.raises(ValueError, match="as many finite values"):
        learning_area([1, 2], [1, np.nan])
    with pytest.raises(ValueError, match="rising steps"):
        steps_to_threshold([2, 1], [0, 0], 1)
    with pytest.raises(ValueError, match=r"shape \(0,\); expected one return"):
        final_score([])
    with pytest.raises(ValueError, match="expected one of each a run"):
        expected_cost([1, 2], [True])
    with pytest.raises(ValueError, match="1 and 2 tasks; expected the same tasks"):
        improvement_probability([[1]], [[1], [2]])
    with pytest.raises(ValueError, match=r"shapes \[\(0,\)\] in \[1\] tasks; expected at least one run"):
        bootstrap(interquartile_mean, [[]], num_resamples=9, seed=0)
    with pytest.raises(ValueError, match="num_resamples = 0"):
        bootstrap(interquartile_mean, [[1, 2]], num_resamples=0, seed=0)


def test_measures_of_a_run():
    found = measures(made_up(network="mlp_tanh") | {"successes": [0.0, 0.5, 0.5, 1.0]})
    assert found.curve.tolist() == [0.5, 1, 1, 1]
    assert found.area == pytest.approx(2.75 / 3)
    assert found.steps == pytest.approx(180)
    assert found.share == pytest.approx(0.45)
    assert found.seconds == pytest.approx(3.6)
    assert (found.final, found.success, found.reached, found.episodes) == (1, True, True, 0.75)
    failed = measures(made_up(network="kan"))
    assert (failed.steps, failed.share, failed.seconds, failed.success, failed.reached) == (None, 1, 8, False, False)


def test_learning_rates_are_chosen_by_tuning_runs_alone(record):
    summary = record["summary"]
    assert {choice["learning_rate"] for choice in summary["choices"]} == {1e-3}
    assert not any(choice["at_edge"] for choice in summary["choices"])
    assert {each["network"] for each in summary["best_mlp"]} == {"mlp_tanh"}
    tune = [made_up(seed=9, purpose="tune", learning_rate=rate, rise=400 * rate) for rate in (1, 2, 3)]
    found = choose([*tune, made_up(learning_rate=2)])
    assert (found["learning_rate"], found["by"], found["at_edge"]) == (1, "tune", True)
    assert [point["learning_rate"] for point in found["grid"]] == [1, 2, 3]
    found = choose([made_up(learning_rate=2), made_up(learning_rate=3, rise=1)])
    assert (found["learning_rate"], found["by"], found["at_edge"]) == (2, "none", False)


def test_summary_holds_what_the_runs_say(record):
    summary = record["summary"]
    assert summary["missing"] == []
    json.dumps(summary, allow_nan=False)
    rows = {(row["task"], row["network"]): row for row in summary["rows"]}
    assert len(rows) == 8
    row = rows["cartpole", "mlp_tanh"]  # rises to 0.9 in 180, 189, 198, 207 steps, linear from 100 to 200
    steps = [measures(made_up(network="mlp_tanh", seed=seed)).steps for seed in range(4)]
    assert row["steps_median"] == pytest.approx(np.median(steps), rel=1e-4)
    assert row["steps_iqm"]["value"] == pytest.approx(np.mean(sorted(steps)[1:3]), rel=1e-4)
    assert row["steps_iqm"]["low"] < row["steps_iqm"]["value"] < row["steps_iqm"]["high"]
    assert row["cost_steps"] == pytest.approx(np.mean(steps), rel=1e-4)
    assert row["cost_seconds"] == pytest.approx(8 * np.mean(steps) / 400, rel=1e-4)
    assert row["success"] == {"value": 1, "low": 1, "high": 1}
    assert len(row["curve"]["value"]) == len(row["curve"]["low"]) == len(STEPS)
    kan = rows["pole", "kan"]
    assert (kan["steps_median"], kan["cost_steps"], kan["success"]["value"], kan["reached"]["value"]) == (
        None,
        None,
        0,
        0,
    )
    (best,) = (each for each in summary["comparisons"] if each["against"] == BEST_MLP)
    (tanh,) = (each for each in summary["comparisons"] if each["against"] == "mlp_tanh")
    assert best["efficiency_gain"] == tanh["efficiency_gain"]
    ours = [measures(made_up(seed=seed)).share for seed in range(4)]
    theirs = [step / 400 for step in steps]
    expected = stats.trim_mean(theirs, 0.25) / stats.trim_mean(ours, 0.25) - 1
    assert best["efficiency_gain"]["value"] == pytest.approx(expected, rel=1e-3)
    assert best["area_improvement"]["value"] == 1
    (against_kan,) = (each for each in summary["comparisons"] if each["against"] == "kan")
    assert against_kan["tasks"][0]["success"] == [1, 0]
    assert against_kan["tasks"][0]["success_ratio"]["value"] is None


def test_summary_does_not_depend_on_the_order_of_seeds_or_the_unit_of_returns(record):
    runs = study()
    kept = [run for run in runs if run["purpose"] == "test"]
    scaled = [
        run
        | {"returns": [100 * x - 7 for x in run["returns"]], "reference": {"low": -7, "high": 93, "threshold": 83.0}}
        for run in runs
    ]
    first = record["summary"]
    values = [row["area"]["value"] for row in first["rows"]]
    assert [row["area"]["value"] for row in summarise(scaled, **DRAWS)["rows"]] == pytest.approx(values)
    turned = summarise(kept[::-1] + [run for run in runs if run["purpose"] == "tune"], **DRAWS)
    by = {(row["task"], row["network"]): row["area"]["value"] for row in turned["rows"]}
    assert [by[row["task"], row["network"]] for row in first["rows"]] == pytest.approx(values)


def test_incomplete_studies_say_what_they_lack():
    assert summarise([], **DRAWS)["missing"] == ["there are no runs"]
    runs = [made_up(seed=seed) for seed in range(3)] + [made_up("pole", "mlp_relu")]
    runs.append(made_up("pole", "kan", purpose="tune"))
    summary = summarise(runs, **DRAWS)
    assert summary["comparisons"] == []
    assert set(summary["missing"]) == {
        "cartpole, small, mlp_relu: no runs",
        "cartpole, small, kan: no runs",
        "pole, small, span: no runs",
        "pole, small, mlp_relu: 1 seeds, others have 3",
        "pole, small, kan: no test runs at the learning rate 0.001",
        "cartpole, small, span: learning rate not tuned",
        "pole, small, mlp_relu: learning rate not tuned",
    }
    (relu,) = (row for row in summary["rows"] if row["network"] == "mlp_relu")
    assert relu["area"]["low"] is None
    assert summary["best_mlp"][0]["by"] == "test"
    both = [made_up(seed=0), made_up(seed=0, purpose="tune")]
    assert summarise(both, **DRAWS)["missing"] == ["cartpole, small, span: seeds 0 both tuned and tested"]


def test_summary_refuses_runs_that_do_not_fit():
    with pytest.raises(ValueError, match=r"there are two runs with .*'seed': 0"):
        summarise([made_up(), made_up()], **DRAWS)
    with pytest.raises(ValueError, match="runs of cartpole differ in steps or references"):
        summarise([made_up(), made_up(seed=1) | {"total_steps": 500}], **DRAWS)
    with pytest.raises(ValueError, match="purpose 'fun'; expected tune or test"):
        summarise([made_up(purpose="fun")], **DRAWS)


def test_offline_ratio_is_to_the_better_mlp(record):
    rows = {row["network"]: row for row in summarise_offline(record["offline"])}
    assert rows["span"]["mean"] == pytest.approx(0.65)
    assert rows["span"]["spread"] == pytest.approx(0.070711)
    assert rows["span"]["ratio"] == pytest.approx(0.65 / 0.45, rel=1e-4)
    assert rows["mlp_relu"]["ratio"] is None
    assert summarise_offline([]) == []


def test_compact_runs_keep_the_commit_alone():
    kept = compact(made_up() | {"returns": [1 / 3] * 4})
    assert kept["commit"] == "abc"
    assert "provenance" not in kept
    assert kept["returns"] == [0.33333] * 4
    assert compact(made_up())["successes"] is None


def test_targets_can_fail_and_be_open(record):
    def told(given):
        return [(each.measured, each.reached) for each in span_targets.targets(given)]

    assert told({}) == [(None, None)] * 5
    ppo, sac, act, gain, success = told(record)
    assert ppo == (1.1, True)
    assert sac == (None, None)
    assert act == (1.3, False)
    assert gain[1] == (gain[0] >= 0.3)
    assert success == (None, None)  # the tuned MLP always succeeds

    def compared(successes, ratio, gain):
        task = {"task": "pole", "success": successes, "success_ratio": {"value": ratio, "low": None, "high": None}}
        found = {"size": "small", "against": BEST_MLP, "tasks": [task]}
        return {"summary": {"comparisons": [found | {"efficiency_gain": {"value": gain, "low": 0.1, "high": 0.9}}]}}

    assert told(compared([1.0, 0.8], 1.25, 0.29))[3:] == [(0.29, False), (1.25, False)]
    assert told(compared([0.9, 0.6], 1.5, 0.3))[3:] == [(0.3, True), (1.5, True)]
    assert told(compared([0.2, 0.0], None, 0.3))[4] == (None, True)
    assert told(compared([0.0, 0.6], 0.0, 0.3))[4] == (0.0, False)
    assert told(compared([0.0, 0.0], None, 0.3))[4] == (None, None)
    figure = span_targets.targets(compared([0.9, 0.6], 1.5, 0.3))[3].figure
    assert "(interval 0.1 to 0.9), tasks: 1" in figure


def test_words_say_who_won(record):
    assert verdict({"value": 1, "low": 0.1, "high": 2}, 0) == "better"
    assert verdict({"value": -1, "low": -2, "high": -0.1}, 0) == "worse"
    assert verdict({"value": 1, "low": -0.1, "high": 2}, 0) == "alike within the interval"
    assert verdict({"value": 1, "low": None, "high": None}, 0) == "too few seeds for a verdict"
    assert interval({"value": 2.0, "low": 1.0, "high": None}) == "2 (1 to ∞)"
    assert interval({"value": 0.5, "low": None, "high": None}, "{:.0f}", 100) == "50"
    summary = record["summary"]
    assert any("against KAN: gain" in line and "(better)" in line for line in comparison_words(summary["comparisons"]))
    assert "better on cartpole and pole" in task_words(summary["comparisons"])[0]
    assert "SPAN on cartpole and pole" in winner_words(summary["rows"])[0]
    assert choice_words(summary)[0] == "Learning rates tried: 0.0003, 0.001 and 0.003, 1 seeds each."


def test_bold_marks_the_best_and_its_ties():
    def estimates(*numbers):
        return [dict(zip(("value", "low", "high"), each, strict=True)) for each in numbers]

    found = span_card.bold(estimates((3, 2, 4), (2, 1, 3.5), (1, 0, 2)), max, "{:g}")
    assert found == ["**3 (2 to 4)**", "**2 (1 to 3.5)**", "1 (0 to 2)"]
    assert span_card.bold(estimates((3, None, None), (2, None, None)), min, "{:g}") == ["3", "**2**"]
    assert span_card.bold(estimates((1, 1, 1), (1, 1, 1)), max, "{:g}") == ["1 (1 to 1)"] * 2


def test_card_and_pictures_of_a_record(record, tmp_path):
    folder, out = tmp_path / "span", tmp_path / "span.md"
    write_json(folder / "span.json", record)
    grid = span_figures.value_grid(lambda angle, velocity: -(angle**2) - 0.1 * velocity**2, num_points=11)
    arrays = {
        "angle": grid["angle"],
        "velocity": grid["velocity"],
        "span": grid["value"],
        "mlp_relu": 2 * grid["value"],
    }
    save_file(arrays, folder / span_figures.VALUES)
    (tmp_path / "remarks.md").write_text("- A remark.\n", encoding="utf-8")
    arguments = ["--study", str(folder / "span.json"), "--out", str(out), "--remarks", str(tmp_path / "remarks.md")]
    span_card.main(arguments)
    text = out.read_text(encoding="utf-8")
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert links == ["span/aggregates.png", "span/curves_small.png", "span/values.png"]
    assert all((tmp_path / link).is_file() for link in links)
    for each in record["targets"]:
        assert each["figure"] in text
    assert "**not reached**" in text
    assert "not measured" in text
    assert text.endswith("- A remark.\n")
    assert "KAN | 4 | 855 | 0.001" in text
    assert "| update of PPO | PPO, `CartPole-v1` | SPAN | 860 | 0.0011 | 1.1 |" in text
    assert "None" not in text
    assert "nan" not in text
    write_json(folder / "span.json", {"summary": record["summary"]})
    with pytest.raises(SystemExit, match=r"lacks 'targets'; write it whole with eval\.span"):
        span_card.main(arguments)


@pytest.mark.parametrize("runs", [[], [made_up(network="kan")]])
def test_card_of_hardly_a_study(runs, tmp_path):
    study = {"runs": [compact(run) for run in runs], "summary": summarise(runs, **DRAWS), "provenance": provenance(0)}
    study["targets"] = [vars(each) for each in span_targets.targets(study)]
    write_json(tmp_path / "span.json", study)
    span_card.main(["--study", str(tmp_path / "span.json"), "--out", str(tmp_path / "card.md")])
    text = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert all(f"- {line}" in text for line in study["summary"]["missing"])
    assert (tmp_path / "aggregates.png").is_file() == bool(runs)


def test_a_card_does_not_claim_what_was_not_done(record):
    whole = span_card.span_card(record, "span")
    assert "chosen for each task" in whole
    assert "of one run of another seed" not in whole
    untuned = [compact(made_up(network=network, seed=seed)) for network in RISES for seed in range(2)]
    text = span_card.span_card(record | {"runs": untuned, "summary": summarise(untuned, **DRAWS)}, "span")
    assert "chosen for each task" not in text
    assert "Of 4 learning rates 4 were not tuned" in text
    plan = {"num_steps": 3000, "learning_rates": [1e-3, 3e-3]}
    assert "3,000 gradient steps" in span_card.span_card(record | {"study": {"offline": plan}}, "span")


def test_cost_is_of_the_task_on_which_span_does_worst():
    def row(environment, network, seconds, ratio, fused=False):
        sizes = {"num_parameters": 100, "algorithm": "PPO", "environment": environment}
        return {"what": "update", "fused_adam": fused, "network": network, "seconds": seconds, "ratio": ratio} | sizes

    rows = [row("a", "span", 2.2, 1.1), row("a", "mlp_tanh", 2.0, 1.0), row("b", "span", 7.5, 1.5)]
    rows += [row("b", "mlp_tanh", 5.0, 1.0), row("a", "span", 9.0, 3.0, fused=True)]
    found = span_cost._worst(rows, what="update", algorithm="PPO")
    assert {name: each["seconds"] for name, each in found.items()} == {"span": 7.5, "mlp_tanh": 5.0}
    assert span_cost._worst(rows, what="act") == {}


def test_random_returns_do_not_favour_short_episodes():
    env = make_vec_env("CartPole-v1", 200)
    returns = span_offline._random_returns(env, 0)
    assert len(returns) == 200
    assert np.mean(returns) == pytest.approx(22.2, abs=2.5)  # the first 200 to end would have about 17


def test_a_study_does_not_take_runs_of_other_settings(tmp_path):
    job = span_runs.Job("cartpole", "mlp_tanh", "small", 1e-3, seed=0, purpose="test")
    span_runs.run_all([job], tmp_path, 1, span_runs.SMALL_FLAGS)
    (record,) = span_runs.records_of([job], tmp_path)
    assert record["total_steps"] == 64
    span_runs.run_all([job], tmp_path, 1, span_runs.SMALL_FLAGS)
    with pytest.raises(ValueError, match="holds a record of other settings"):
        span_runs.run_all([job], tmp_path, 1)
    with pytest.raises(ValueError, match="holds a record of other settings"):
        span_runs.run_all([dataclasses.replace(job, purpose="tune")], tmp_path, 1, span_runs.SMALL_FLAGS)


def test_value_grid_has_velocities_for_rows():
    grid = span_figures.value_grid(lambda angle, velocity: 100 * velocity + angle, num_points=5)
    assert grid["value"].shape == (5, 5)
    np.testing.assert_allclose(grid["value"], 100 * grid["velocity"][:, None] + grid["angle"], rtol=1e-5)
    assert grid["velocity"][-1] == span_figures.MAX_SPEED


def test_gif_holds_the_frames(tmp_path):
    frames = [np.full((8, 12, 3), (40 * i, 0, 255 - 40 * i), np.uint8) for i in range(5)]
    span_figures.write_gif(tmp_path / "drive.gif", frames, frames_per_second=20)
    with Image.open(tmp_path / "drive.gif") as image:
        assert image.n_frames == 5
        assert image.size == (12, 8)
        assert image.info["duration"] == 50
        image.seek(3)
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - frames[3]).max() <= 8
    with pytest.raises(ValueError, match=r"frames are of \[\]; expected at least one"):
        span_figures.write_gif(tmp_path / "none.gif", [], frames_per_second=20)
    with pytest.raises(ValueError, match=r"expected at least one, all \(H, W, 3\) of uint8"):
        span_figures.write_gif(tmp_path / "none.gif", [np.zeros((4, 4, 3))], frames_per_second=20)
    with pytest.raises(ValueError, match="frames_per_second = 0"):
        span_figures.write_gif(tmp_path / "none.gif", frames, frames_per_second=0)
    assert [path.name for path in tmp_path.iterdir()] == ["drive.gif"]
