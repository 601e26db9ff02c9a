"""The CARLA environment over a stub of its client: the same task, and a server left as it was found."""

import copy
import sys
from dataclasses import replace
from math import cos, degrees, pi, radians, sin, tan
from types import ModuleType, SimpleNamespace

import gymnasium
import numpy as np
import pytest

from leviathan.integrations.carla import ENV_ID, CarlaWaypointsEnv
from leviathan.integrations.gymnasium import WaypointsEnv
from leviathan.waypoints import Road, VehicleState, WaypointsOptions, drive
from leviathan.waypoints.road import SAMPLING

OPTIONS = WaypointsOptions(road_length=80.0)
WHEEL_LIMIT = 70.0  # degrees


class Vector(SimpleNamespace):
    def __init__(self, x=0.0, y=0.0, z=0.0):
        super().__init__(x=x, y=y, z=z)


class Rotation(SimpleNamespace):
    def __init__(self, pitch=0.0, yaw=0.0, roll=0.0):
        super().__init__(pitch=pitch, yaw=yaw, roll=roll)


class Transform(SimpleNamespace):
    def __init__(self, location, rotation):
        super().__init__(location=location, rotation=rotation)


class VehicleControl(SimpleNamespace):
    def __init__(self, throttle=0.0, steer=0.0, brake=0.0):
        for value, low in ((throttle, 0), (steer, -1), (brake, 0)):
            assert low <= value <= 1
        super().__init__(throttle=throttle, steer=steer, brake=brake)


class Waypoint:
    """Of the one lane of a map; CARLA's frame, y to the right."""

    def __init__(self, lane, i):
        self._lane, self._i = lane, i
        x, y = lane.points[i].tolist()
        self.transform = Transform(Vector(x, -y, 1.0), Rotation(yaw=-degrees(lane.headings[i].item())))

    def next(self, distance):
        i = self._i + round(distance / self._lane.spacing)
        return [Waypoint(self._lane, i)] if i < len(self._lane.points) else []


class Map:
    name = "Stub01"

    def __init__(self, lane):
        self._lane = lane
        self.spawn_points = [Waypoint(lane, 0).transform]

    def get_spawn_points(self):
        return self.spawn_points

    def get_waypoint(self, location):
        i = np.argmin(np.hypot(*(self._lane.points - (location.x, -location.y)).T))
        return Waypoint(self._lane, int(i))


class Vehicle:
    """Our bicycle, told and read in CARLA's frame at its middle."""

    def __init__(self, world, transform):
        self._world, self._control, self._half = world, VehicleControl(), OPTIONS.wheelbase / 2
        heading, at = -radians(transform.rotation.yaw), transform.location
        assert at.z == pytest.approx(1.3)
        self.state = VehicleState(at.x - self._half * cos(heading), -at.y - self._half * sin(heading), heading)

    def apply_control(self, control):
        self._control = control

    def tick(self):
        control = self._control
        steer = -control.steer * radians(WHEEL_LIMIT) / OPTIONS.max_steer
        self.state = drive(self.state, control.throttle - control.brake, steer, OPTIONS)

    def destroy(self):
        self._world.vehicles.remove(self)

    def get_transform(self):
        s = self.state
        location = Vector(s.x + self._half * cos(s.heading), -s.y - self._half * sin(s.heading), 1.0)
        yaw = (-degrees(s.heading) + 180) % 360 - 180
        return Transform(location, Rotation(yaw=yaw))

    def _in_the_world(self, along, left):
        c, s = cos(self.state.heading), sin(self.state.heading)
        return Vector(c * along - s * left, -(s * along + c * left))

    def get_velocity(self):
        turning = self.state.speed * tan(self.state.steer) / OPTIONS.wheelbase
        return self._in_the_world(self.state.speed, self._half * turning)

    def get_acceleration(self):
        s = self.state
        return self._in_the_world(
            s.acceleration - OPTIONS.drag * s.speed, s.speed**2 * tan(s.steer) / OPTIONS.wheelbase
        )

    def get_wheel_steer_angle(self, wheel):
        assert wheel == "front left"
        return -degrees(self.state.steer)

    def get_physics_control(self):
        return SimpleNamespace(wheels=[SimpleNamespace(max_steer_angle=a) for a in (WHEEL_LIMIT, WHEEL_LIMIT, 0, 0)])


class World:
    def __init__(self, lane):
        self.settings = SimpleNamespace(synchronous_mode=False, fixed_delta_seconds=None, no_rendering_mode=True)
        self.map, self.vehicles, self.ticks, self.fails_at_tick = Map(lane), [], 0, None

    def get_map(self):
        return self.map

    def get_settings(self):
        return copy.copy(self.settings)

    def apply_settings(self, settings):
        self.settings = settings

    def get_blueprint_library(self):
        return SimpleNamespace(filter=lambda name: [name] if name.startswith("vehicle.") else [])

    def spawn_actor(self, blueprint, transform):
        if self.vehicles:
            raise RuntimeError("Spawn failed because of collision at spawn position")
        self.vehicles.append(Vehicle(self, transform))
        return self.vehicles[-1]

    def tick(self):
        assert self.settings.synchronous_mode
        assert self.settings.fixed_delta_seconds == OPTIONS.time_step
        self.ticks += 1
        if self.ticks == self.fails_at_tick:
            raise RuntimeError("time-out of 20000ms while waiting for the simulator")
        for vehicle in self.vehicles:
            vehicle.tick()


@pytest.fixture
def lane():
    road = Road.random(OPTIONS, np.random.default_rng(3))
    c, s = np.cos(2.8), np.sin(2.8)  # turned so far that yaws wrap, and moved
    return replace(road, points=road.points @ [[c, s], [-s, c]] + [40.0, -15.0], headings=road.headings + 2.8)


@pytest.fixture
def world(lane, monkeypatch):
    carla = ModuleType("carla")
    carla.Location, carla.Rotation, carla.Transform, carla.VehicleControl = Vector, Rotation, Transform, VehicleControl
    carla.VehicleWheelLocation = SimpleNamespace(FL_Wheel="front left")
    world = World(lane)
    carla.Client = lambda host, port: client_of(world)
    monkeypatch.setitem(sys.modules, "carla", carla)
    return world


def client_of(world):
    return SimpleNamespace(get_world=lambda: world, load_world=lambda town: world, set_timeout=lambda seconds: None)


def is_as_found(world):
    found = SimpleNamespace(synchronous_mode=False, fixed_delta_seconds=None, no_rendering_mode=True)
    return world.vehicles == [] and world.settings == found


def actions(num_steps):
    t = np.arange(num_steps)
    return np.stack([0.6 - 1.2 * (t % 40 > 30), 0.1 * np.sin(t / 3)], axis=1).astype(np.float32)


def start_of(lane):
    x, y = lane.points[0].tolist()
    heading = lane.headings[0].item() + 0.05
    return VehicleState(x - 0.3 * sin(heading), y + 0.3 * cos(heading), heading)


def test_a_given_road_gives_the_observations_of_the_environment_without_carla(world, lane):
    ours, carlas = WaypointsEnv(road_length=80.0), CarlaWaypointsEnv(client_of(world), road_length=80.0)
    assert carlas.observation_space == ours.observation_space
    assert carlas.action_space == ours.action_space
    given = {"road": lane, "start": start_of(lane)}
    first, other = ours.reset(options=given), carlas.reset(options=given)
    np.testing.assert_allclose(first[0], other[0], atol=1e-6)
    steps = 0
    for action in actions(60):
        expected, got = ours.step(action), carlas.step(action)
        np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
        assert got[1] == pytest.approx(expected[1], abs=1e-6)
        assert got[2:4] == expected[2:4]
        assert got[4] == pytest.approx(expected[4], abs=1e-6)
        steps += 1
        if expected[2]:
            break
    assert steps > 30
    carlas.close()


def test_the_maps_route_is_the_road(world, lane):
    ours, carlas = WaypointsEnv(road_length=80.0), CarlaWaypointsEnv(client_of(world), road_length=80.0)
    start = {"start": start_of(lane)}
    expected, got = ours.reset(options={"road": lane, **start})[0], carlas.reset(options=start)[0]
    np.testing.assert_allclose(got, expected, atol=2e-3)
    for action in actions(30):
        expected, got = ours.step(action), carlas.step(action)
        np.testing.assert_allclose(got[0], expected[0], atol=2e-3)
        assert got[1] == pytest.approx(expected[1], abs=2e-3)
    assert lane.spacing == SAMPLING
    carlas.close()


def test_a_route_ends_where_the_lane_does(world, lane):
    env = CarlaWaypointsEnv(client_of(world), road_length=500.0, render_mode="rgb_array")
    env.reset(seed=0)
    assert env.step([0.5, 0.0])[4]["progress"] < 0.1
    assert env._task.road.length == pytest.approx(80.0, rel=1e-3)
    assert env.render().shape == (400, 400, 3)
    env.close()


def test_full_left_steers_left_as_far_as_the_options_say(world):
    env = CarlaWaypointsEnv(client_of(world))
    env.reset(seed=0)
    heading = world.vehicles[0].state.heading
    for _ in range(15):
        observation = env.step([0.5, 1.0])[0]
    assert observation[-3] == pytest.approx(1, abs=1e-3)
    assert world.vehicles[0]._control.steer == pytest.approx(-OPTIONS.max_steer / radians(WHEEL_LIMIT))
    assert world.vehicles[0].state.heading > heading
    env.close()


def test_close_leaves_the_server_as_it_was_found(world):
    with gymnasium.make(ENV_ID, host="localhost", port=2000, town="Town01", road_length=80.0) as env:
        for seed in range(3):
            env.reset(seed=seed)
            assert len(world.vehicles) == 1
            assert world.settings.synchronous_mode
            assert world.settings.no_rendering_mode  # what is not ours stays
            env.step(env.action_space.sample())
    assert is_as_found(world)
    env.close()
    assert is_as_found(world)


@pytest.mark.parametrize("tick", [4, 16])  # while the vehicle falls to the road, and while it drives
def test_an_error_of_the_server_leaves_it_as_it_was_found_and_reset_starts_anew(world, tick):
    env = CarlaWaypointsEnv(client_of(world))
    world.fails_at_tick = tick

    def run():
        env.reset(seed=0)
        for action in actions(5):
            env.step(action)

    with pytest.raises(RuntimeError, match="time-out"):
        run()
    assert is_as_found(world)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step([0, 0])
    run()
    env.close()
    assert is_as_found(world)


def test_a_spawn_point_that_is_taken_leaves_only_who_took_it(world):
    other = Vehicle(world, Transform(Vector(0, 0, 1.3), Rotation()))
    world.vehicles.append(other)
    with pytest.raises(RuntimeError, match="collision at spawn"):
        CarlaWaypointsEnv(client_of(world)).reset(seed=0)
    assert world.vehicles == [other]
    assert not world.settings.synchronous_mode


def test_what_the_user_can_mend_is_said(world, monkeypatch):
    env = CarlaWaypointsEnv(client_of(world), blueprint="bicycle")
    with pytest.raises(ValueError, match="blueprint = 'bicycle'"):
        env.reset(seed=0)
    assert is_as_found(world)
    world.map.spawn_points = []
    with pytest.raises(ValueError, match="'Stub01' has no spawn points"):
        env.reset(seed=0)
    with pytest.raises(ValueError, match="Unknown options"):
        CarlaWaypointsEnv(client_of(world), lanes=2)
    monkeypatch.setitem(sys.modules, "carla", None)
    with pytest.raises(ImportError, match="pip install carla"):
        CarlaWaypointsEnv(client_of(world))


def test_a_bad_action_does_not_end_the_episode(world):
    env = CarlaWaypointsEnv(client_of(world))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="NaN"):
        env.step([0.0, float("nan")])
    assert len(world.vehicles) == 1
    env.step([0.0, 0.0])
    env.close()


def test_the_reference_point_is_half_a_wheelbase_behind_the_actor(world):
    env = CarlaWaypointsEnv(client_of(world))
    start = VehicleState(x=40.0, y=-15.0, heading=pi / 2)
    env.reset(options={"start": start})
    at = world.vehicles[0].get_transform()
    assert (at.location.x, at.location.y) == pytest.approx((40.0, 15.0 - OPTIONS.wheelbase / 2))
    assert at.rotation.yaw == pytest.approx(-90)
    env.close()
