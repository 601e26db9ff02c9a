"""The study of SPAN from end to end at sizes too small to say anything, and the plans of its runs."""

import json

import pytest
from safetensors.numpy import load_file

from eval import span as job
from eval.span_agents import drive_frames, pendulum_values
from eval.span_card import main as card
from eval.span_runs import SMALL_FLAGS, Study, Task, records_in, run_all, test_jobs, tuning_jobs
from training.span import RECORD

TASK = Task(networks=["span", "mlp_tanh"], seeds=2, tuning_seeds=1)
STUDY = Study(sizes=["small"], learning_rates=[1e-3, 1e-2], tasks={"pendulum": TASK})


def test_the_committed_plan_is_sound():
    study = Study.read(job.STUDY)
    assert {"cartpole", "hopper", "waypoints"} <= study.tasks.keys()
    assert all(task.seeds >= 5 and "span" in task.networks for task in study.tasks.values())
    jobs = tuning_jobs(study)
    assert (
        len(jobs) == len(set(jobs)) == sum(3 * len(task.networks) * task.tuning_seeds for task in study.tasks.values())
    )
    assert test_jobs(study, []) == []  # before tuning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": ["huge"]}, "sizes: huge unknown"),
        ({"tasks": {"chess": TASK}}, "chess has no"),
        ({"tasks": {"pendulum": Task(networks=["cnn"], seeds=1)}}, "networks: cnn unknown"),
    ],
)
def test_bad_plans_raise(change, message):
    with pytest.raises(ValueError, match=message):
        Study(**{"sizes": ["small"], "learning_rates": [1e-3], "tasks": {"pendulum": TASK}, **change})
    with pytest.raises(ValueError, match="seeds, tuning_seeds = 0, 1"):
        Task(networks=["span"], seeds=0)
    with pytest.raises(ValueError, match="parts: pictures unknown"):
        job.run(STUDY, None, parts=["pictures"])


def test_a_study_from_end_to_end(tmp_path, monkeypatch):
    record = job.run(STUDY, tmp_path, parts=["runs", "cost"], flags=SMALL_FLAGS, small=True)
    paths = sorted(tmp_path.glob(f"*/*/*/*/{RECORD}"))
    assert len(paths) == 2 * 2 + 2 * 2  # rates and tuning seeds, then seeds, of each network
    by = {(row["task"], row["network"]): row for row in record["summary"]["rows"]}
    assert {row["num_seeds"] for row in by.values()} == {2}
    assert set(record["cost"]["ppo_update"]) == {"span", "mlp_tanh", "mlp_relu", "kan"}
    assert len(record["targets"]) >= 5
    folder = tmp_path / "study"
    assert json.loads((folder / job.NAME).read_text()) == json.loads(json.dumps(record))
    assert {"curves_small.png", "aggregates.png", "values.png"} <= {path.name for path in folder.iterdir()}
    assert set(load_file(folder / "values.safetensors")) == {"angle", "velocity", "span", "mlp_tanh"}

    times = {path: path.stat().st_mtime_ns for path in paths}
    monkeypatch.setattr("eval.span.cost_part", None)
    again = job.run(STUDY, tmp_path, parts=["runs"], flags=SMALL_FLAGS, small=True)
    assert {path: path.stat().st_mtime_ns for path in paths} == times
    assert again["summary"] == record["summary"]
    assert again["cost"] == record["cost"]
    with pytest.raises(ValueError, match="holds a record of other settings"):
        run_all(tuning_jobs(STUDY), tmp_path, 1)

    card(["--study", str(folder / job.NAME), "--out", str(tmp_path / "card.md")])
    assert "Pendulum" in (tmp_path / "card.md").read_text()
    assert len(records_in(tmp_path)) == len(paths)


class Still:
    """An agent that does nothing."""

    def predict(self, observation, deterministic):
        return [0.0, 0.0], None


def test_a_drive_is_drawn():
    frames = drive_frames(Still(), every=100)
    assert 1 <= len(frames) <= 4
    assert {frame.shape for frame in frames} == {frames[0].shape}


def test_values_are_on_a_grid_of_states():
    from stable_baselines3 import SAC, TD3

    from leviathan.integrations.sb3 import SpanSACPolicy, SpanTD3Policy

    for algorithm, policy in ((SAC, SpanSACPolicy), (TD3, SpanTD3Policy)):
        grid = pendulum_values(algorithm(policy, "Pendulum-v1", device="cpu", buffer_size=10))
        assert grid["value"].shape == (len(grid["velocity"]), len(grid["angle"]))
