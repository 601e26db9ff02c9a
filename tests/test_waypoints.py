"""The waypoint-driving task: road, vehicle, observation, reward, drawing, and the Gymnasium environment of it."""

from dataclasses import replace
from math import atan, exp, pi, tan

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common import env_checker

from leviathan.integrations.gymnasium import ENV_ID, WaypointsEnv
from leviathan.waypoints import Road, VehicleOptions, VehicleState, WaypointsOptions, WaypointsTask, draw, drive
from leviathan.waypoints.task import MAX_EPISODE_STEPS, act, commands

OPTIONS = WaypointsOptions()


def arc(radius, angle=1.5, num_points=400):
    """A road that turns left about (0, radius)."""
    t = np.linspace(0, angle, num_points)
    return Road.through(radius * np.stack([np.sin(t), 1 - np.cos(t)], axis=1))


def pursuit(observation, options):
    """Pure pursuit from the observation alone: the circle through the rear axle and the third waypoint."""
    x, y = observation[:-6].reshape(-1, 2)[2] * (options.view + options.half_width)
    steer = atan(options.wheelbase * 2 * y / (x * x + y * y)) / options.max_steer
    speed = observation[-6] * options.max_speed
    throttle = 0.5 * (options.target_speed - speed) + options.target_speed / options.max_speed
    return np.clip(np.array([throttle, steer], dtype=np.float32), -1, 1)


def episode(env, policy, seed):
    observation, info = env.reset(seed=seed)
    rewards, ended = [], False
    while not ended:
        observation, reward, terminated, truncated, info = env.step(policy(observation))
        assert env.observation_space.contains(observation)
        rewards.append(reward)
        ended = terminated or truncated
    return rewards, info


# Road


@pytest.mark.parametrize("seed", range(3))
def test_a_random_road_is_smooth_and_of_the_asked_length(seed):
    road = Road.random(WaypointsOptions(road_length=123.4), np.random.default_rng(seed))
    steps = np.diff(road.points, axis=0)
    assert road.length == pytest.approx(123.4)
    np.testing.assert_allclose(np.hypot(*steps.T), road.spacing, rtol=1e-12)
    assert np.abs(road.curvatures).max() <= OPTIONS.max_curvature
    assert np.abs(np.diff(road.curvatures)).max() <= 2 * OPTIONS.max_curvature * road.spacing / OPTIONS.bend_length
    middles = (road.headings[1:] + road.headings[:-1]) / 2
    np.testing.assert_allclose(np.unwrap(np.arctan2(steps[:, 1], steps[:, 0])), middles, atol=1e-12)
    np.testing.assert_allclose(np.gradient(road.headings, road.spacing)[1:-1], road.curvatures[1:-1], atol=2e-3)
    assert road.points[0].tolist() == [0, 0]
    assert road.headings[0] == road.curvatures[0] == 0


def test_a_road_through_an_arc_has_its_length_heading_and_curvature():
    road = arc(25.0)
    s = road.spacing * np.arange(len(road.points))
    assert road.length == pytest.approx(25 * 1.5, rel=1e-5)
    np.testing.assert_allclose(road.headings, s / 25, atol=1e-3)
    np.testing.assert_allclose(road.curvatures[3:-3], 1 / 25, rtol=2e-2)


@pytest.mark.parametrize(("s", "offset"), [(0.0, 0.5), (7.3, -1.9), (20.0, 0.0), (37.0, 3.0)])
def test_places_on_an_arc_are_found(s, offset):
    road, angle = arc(25.0), s / 25
    x, y = (25 - offset) * np.sin(angle), 25 - (25 - offset) * np.cos(angle)
    place = road.locate(x, y)
    assert (place.arc_length, place.offset, place.heading) == pytest.approx((s, offset, angle), abs=3e-3)
    assert road.locate(x, y, near=s + 3) == place
    np.testing.assert_allclose(road.at(np.array(s)), [25 * np.sin(angle), 25 - 25 * np.cos(angle)], atol=2e-3)


def test_the_windowed_search_stays_on_its_own_stretch_where_a_road_crosses_itself():
    t = np.linspace(0, 2 * pi, 800)
    loop = Road.through(np.stack([20 * np.sin(t), 10 * np.sin(2 * t)], axis=1))  # an eight, through the origin twice
    assert loop.locate(0, 0, near=loop.length / 2).arc_length == pytest.approx(loop.length / 2, abs=0.01)
    assert loop.locate(0, 0, near=0.0).arc_length == pytest.approx(0, abs=0.01)


def test_past_its_end_a_road_is_straight_and_places_stay_at_the_end():
    road = Road.through([[0, 0], [5, 0], [10, 0]])
    np.testing.assert_allclose(road.at(np.array([9.0, 14.0])), [[9, 0], [14, 0]], atol=1e-12)
    assert road.locate(11, 1).arc_length == road.length
    assert road.locate(11, 1).offset == pytest.approx(1)


@pytest.mark.parametrize(
    ("points", "problem"),
    [
        ([[0, 0], [1, 0]], r"shape \(2, 2\)"),
        (np.zeros((4, 3)), r"shape \(4, 3\)"),
        ([[0, 0], [1, float("nan")], [2, 0]], "not finite"),
        ([[0, 0], [1, 0], [1, 0]], r"points\[1\] and the next"),
    ],
)
def test_points_that_make_no_road_are_refused(points, problem):
    with pytest.raises(ValueError, match=problem):
        Road.through(points)


# Vehicle


@pytest.mark.parametrize("steer", [0.2, -0.5])
def test_at_constant_steering_the_rear_axle_goes_round_its_circle(steer):
    options = VehicleOptions()
    command, throttle = steer / options.max_steer, 5.0 * options.drag / options.max_acceleration
    state = VehicleState(speed=5.0, steer=steer, acceleration=5.0 * options.drag)
    radius = options.wheelbase / tan(steer)
    for step in range(1, 400):
        state = drive(state, throttle, command, options)
        angle = 5.0 * options.time_step * step / radius
        assert state.heading == pytest.approx(angle, abs=1e-9)
        expected = (radius * np.sin(angle), radius * (1 - np.cos(angle)))
        assert (state.x, state.y) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("throttle", "limit"), [(0.6, 1.8), (-0.5, -3.0)])
def test_actuators_lag_exponentially(throttle, limit):
    options, state = VehicleOptions(), VehicleState(speed=5.0)
    for step in range(1, 60):
        state = drive(state, throttle, 0.4, options)
        t = step * options.time_step
        assert state.steer == pytest.approx(0.4 * options.max_steer * (1 - exp(-t / options.steer_lag)), rel=1e-12)
        assert state.acceleration == pytest.approx(limit * (1 - exp(-t / options.acceleration_lag)), rel=1e-12)


def test_speed_stays_between_rest_and_what_drag_allows():
    options, state = VehicleOptions(), VehicleState(speed=3.0)
    for _ in range(600):
        state = drive(state, 1.0, 0.0, options)
        assert state.speed < options.max_speed
    assert state.speed == pytest.approx(options.max_speed, rel=1e-3)
    for _ in range(100):
        state = drive(state, -1.0, 0.0, options)
    assert state.speed == 0
    assert drive(state, -1.0, 1.0, options).x == state.x


def test_halving_the_step_quarters_the_error():
    def end(time_step):
        options, state = VehicleOptions(time_step=time_step), VehicleState(speed=4.0)
        for i in range(round(2 / time_step)):
            state = drive(state, 0.8, 1.0 if i < round(1 / time_step) else -1.0, options)
        return np.array([state.x, state.y, state.heading, state.speed])

    exact = end(0.05 / 64)
    coarse, fine = (np.abs(end(step) - exact).max() for step in (0.05, 0.025))
    assert coarse < 0.02
    assert 3 < coarse / fine < 5


# Task


def test_the_observation_is_what_its_description_says():
    road = Road.through([[0, 0], [50, 0], [100, 0]])
    task = WaypointsTask(road, OPTIONS)
    state = VehicleState(x=1.0, y=0.5, heading=pi / 6, speed=6.0, steer=-0.1, acceleration=-1.5)
    outcome = task.judge(state)
    waypoints = outcome.observation[:-6].reshape(-1, 2) * (OPTIONS.view + OPTIONS.half_width)
    ahead, down = 2.0 * np.arange(1, 11), -0.5
    expected = np.stack(
        [np.cos(pi / 6) * ahead + np.sin(pi / 6) * down, np.cos(pi / 6) * down - np.sin(pi / 6) * ahead], axis=1
    )
    np.testing.assert_allclose(waypoints, expected, atol=1e-5)
    np.testing.assert_allclose(outcome.observation[-6:], [6 / 12, 1 / 3, 0.25, -0.2, -0.25, 1.0], atol=1e-6)
    assert outcome.reward == pytest.approx(0.75 * (np.cos(pi / 6) - 0.5 - 0.25))
    assert outcome.info == {"is_success": False, "offset": pytest.approx(0.5), "progress": pytest.approx(0.01)}


def test_observation_and_reward_do_not_depend_on_where_the_road_lies():
    rng, turn, shift = np.random.default_rng(0), 2.5, np.array([30.0, -70.0])
    road = Road.random(OPTIONS, rng)
    c, s = np.cos(turn), np.sin(turn)
    moved = replace(road, points=road.points @ [[c, s], [-s, c]] + shift, headings=road.headings + turn)
    state = WaypointsTask(road, OPTIONS).start(rng)
    there = replace(
        state, x=c * state.x - s * state.y + 30, y=s * state.x + c * state.y - 70, heading=state.heading + turn
    )
    tasks = WaypointsTask(road, OPTIONS), WaypointsTask(moved, OPTIONS)
    for _ in range(50):
        here, other = tasks[0].judge(state), tasks[1].judge(there)
        np.testing.assert_allclose(here.observation, other.observation, atol=1e-6)
        assert here.reward == pytest.approx(other.reward, abs=1e-9)
        action = rng.uniform(-0.2, 1, 2)
        state, there = act(state, *action, OPTIONS), act(there, *action, OPTIONS)


def test_mirrored_road_and_state_mirror_the_observation():
    options = replace(OPTIONS, road_length=60.0)
    road = Road.random(options, np.random.default_rng(1))
    mirrored = Road(road.points * [1, -1], -road.headings, -road.curvatures, road.spacing)
    here = WaypointsTask(road, options).judge(VehicleState(2.0, 0.4, 0.2, 5.0, 0.1, 1.0))
    there = WaypointsTask(mirrored, options).judge(VehicleState(2.0, -0.4, -0.2, 5.0, -0.1, 1.0))
    flip = [*[1, -1] * 10, 1, -1, -1, -1, 1, 1]
    np.testing.assert_allclose(there.observation, here.observation * flip, atol=1e-7)
    assert there.reward == pytest.approx(here.reward)


@pytest.mark.parametrize(
    ("state", "success", "failure"),
    [
        (VehicleState(x=2.0, y=1.99, speed=8.0), False, False),
        (VehicleState(x=2.0, y=2.01, speed=8.0), False, True),
        (VehicleState(x=2.0, heading=1.56, speed=8.0), False, False),
        (VehicleState(x=2.0, heading=-1.58, speed=8.0), False, True),
        (VehicleState(x=2.0, heading=2 * pi, speed=8.0), False, False),
        (VehicleState(x=4.0, speed=8.0), True, False),
        (VehicleState(x=4.5, y=-2.5, speed=8.0), False, True),  # out of the lane at the end is no success
    ],
)
def test_when_an_episode_ends(state, success, failure):
    outcome = WaypointsTask(Road.through([[0, 0], [2, 0], [4, 0]]), OPTIONS).judge(state)
    assert (outcome.success, outcome.failure) == (success, failure)
    assert (outcome.reward < -9) == failure
    low, high = OPTIONS.bounds()
    assert (low <= outcome.observation).all()
    assert (outcome.observation <= high).all()


def test_driving_well_is_worth_one_a_step_and_speeding_no_more():
    def reward(speed):
        return WaypointsTask(Road.through([[0, 0], [25, 0], [50, 0]]), OPTIONS).judge(VehicleState(speed=speed)).reward

    assert reward(OPTIONS.target_speed) == reward(OPTIONS.max_speed) == 1
    assert reward(OPTIONS.target_speed / 2) == 0.5
    assert reward(0.0) == 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"half_width": 0.0}, "half_width = 0.0; expected > 0"),
        ({"start_offset": -1.0}, "start_offset = -1.0; expected >= 0"),
        ({"drag": float("nan")}, "drag = nan; expected a finite number"),
        ({"wheelbase": "long"}, "wheelbase = 'long'; expected a finite number"),
        ({"num_waypoints": 2.5}, "num_waypoints = 2.5; expected an integer"),
        ({"substeps": True}, "substeps = True; expected an integer"),
        ({"target_speed": 13.0}, "target_speed = 13; expected at most 12"),
        ({"max_curvature": 0.24}, "max_curvature = 0.24; expected at most 0.195.*can steer"),
        ({"half_width": 12.0}, "max_curvature = 0.05; expected at most 0.041.*fold"),
        ({"start_offset": 1.5}, "start_offset = 1.5; expected at most 1"),
        ({"max_steer": 1.6}, "max_steer = 1.6; expected at most 1.4"),
        ({"substeps": 10}, "6 m in one step"),
    ],
)
def test_options_out_of_range_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        WaypointsOptions(**options)


@pytest.mark.parametrize(
    ("action", "problem"),
    [
        ([0.0], r"shape \(1,\); expected \(2,\)"),
        (np.zeros((1, 2)), r"shape \(1, 2\)"),
        ([float("nan"), 0], "NaN"),
        ([0, float("nan")], "NaN"),
    ],
)
def test_actions_that_are_none_are_refused(action, problem):
    with pytest.raises(ValueError, match=problem):
        commands(action)
    env = WaypointsEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=problem):
        env.step(action)


def test_actions_saturate():
    assert commands([3, -float("inf")]) == (1, -1)


# Environment


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("render_mode", [None, "rgb_array"])
def test_the_checkers_have_nothing_to_say(render_mode):
    env = gymnasium.make(ENV_ID, render_mode=render_mode)
    check_env(env.unwrapped)
    env_checker.check_env(env.unwrapped)


def test_pure_pursuit_drives_to_the_end():
    env = gymnasium.make(ENV_ID)
    episodes = [episode(env, lambda seen: pursuit(seen, OPTIONS), seed) for seed in range(20)]
    assert sum(info["is_success"] for _, info in episodes) >= 19
    assert np.mean([np.mean(rewards) for rewards, _ in episodes]) > 0.9  # near one a step
    assert max(len(rewards) for rewards, _ in episodes) < MAX_EPISODE_STEPS


def test_straight_on_leaves_the_road():
    env = gymnasium.make(ENV_ID)
    episodes = [episode(env, lambda seen: np.array([0.7, 0.0], dtype=np.float32), seed) for seed in range(20)]
    assert sum(info["is_success"] for _, info in episodes) <= 1
    assert all(info["progress"] < 1 for _, info in episodes if not info["is_success"])


def test_standing_still_is_truncated():
    env = gymnasium.make(ENV_ID)
    rewards, info = episode(env, lambda seen: np.array([-1.0, 0.0], dtype=np.float32), seed=0)
    assert len(rewards) == MAX_EPISODE_STEPS
    assert not info["is_success"]


def test_wild_actions_never_leave_the_observations_bounds():
    env = gymnasium.make(ENV_ID)
    env.action_space.seed(0)
    for seed in range(30):
        rewards, _ = episode(env, lambda seen: env.action_space.sample(), seed)
        assert min(rewards) >= -2.5 - OPTIONS.failure_penalty
        assert max(rewards) <= 1


def test_a_seed_makes_an_episode_and_those_after_it():
    def run():
        env = WaypointsEnv()
        first, second = env.reset(seed=7)[0], env.reset()[0]
        return first, second, [env.step([0.5, 0.1])[:2] for _ in range(20)]

    a, b = run(), run()
    np.testing.assert_equal(a, b)
    assert not np.array_equal(a[0], a[1])


def test_a_road_and_a_start_can_be_given():
    env, road = WaypointsEnv(road_length=50.0), arc(40.0)
    observation, info = env.reset(options={"road": road, "start": VehicleState(y=0.3)})
    assert info["offset"] == pytest.approx(0.3, abs=1e-3)
    assert observation[-4] == pytest.approx(0.15, abs=1e-3)
    for options, problem in (({"rode": road}, r"\['rode'\]"), ({"road": 3}, "is int; expected Road")):
        with pytest.raises(ValueError, match=problem):
            env.reset(options=options)


def test_what_the_environment_refuses():
    with pytest.raises(ValueError, match=r"Unknown options \['road_lenght'\]"):
        WaypointsEnv(road_lenght=3)
    with pytest.raises(ValueError, match="render_mode = 'human'"):
        WaypointsEnv(render_mode="human")
    with pytest.raises(ResetNeeded):
        WaypointsEnv().step([0, 0])


# Drawing


def test_frames_show_the_road_turning_about_the_vehicle():
    env = WaypointsEnv(render_mode="rgb_array")
    env.reset(seed=0)
    for _ in range(40):
        env.step([0.5, 0.0])
    frame = env.render()
    assert (frame.shape, frame.dtype) == ((400, 400, 3), np.uint8)
    assert WaypointsEnv().render() is None

    straight = Road.through([[0, 0], [50, 0], [100, 0]])
    at_rest = draw(straight, VehicleState(x=40.0), OPTIONS, 40.0)
    assert (
        np.abs(at_rest[:, :200].astype(int) - at_rest[:, :199:-1]).mean(axis=(1, 2)).max() < 20
    )  # grass alone differs
    red = (at_rest[..., 0] > 180) & (at_rest[..., 1] < 120)
    rows, columns = np.nonzero(red)
    assert columns.mean() == pytest.approx(199.5, abs=0.5)
    assert rows.mean() == pytest.approx(300 - OPTIONS.wheelbase / 2 / 32 * 400, abs=2)
    left = draw(straight, VehicleState(x=40.0, y=1.0), OPTIONS, 40.0)
    asphalt = [np.nonzero((image[200] == (72, 76, 84)).all(axis=-1))[0].mean() for image in (at_rest, left)]
    assert asphalt[1] - asphalt[0] == pytest.approx(400 / 32, abs=1.5)  # the road lies to the right of it
