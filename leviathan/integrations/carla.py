"""The waypoint-driving task in CARLA: observations and actions of ``leviathan/Waypoints-v0``, driven by a server.

Importing this module registers ``leviathan/CarlaWaypoints-v0``. Tested against a stub of the client's interface, not on
a server: see that the first episodes behave before you trust the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import cos, degrees, radians, sin
from types import ModuleType
from typing import Any

import gymnasium

from leviathan.integrations.gymnasium import WaypointsEnv
from leviathan.waypoints import Road, VehicleState
from leviathan.waypoints.road import SAMPLING
from leviathan.waypoints.task import MAX_EPISODE_STEPS

ENV_ID = "leviathan/CarlaWaypoints-v0"
CLEARANCE = 0.3  # metres above the road at which CARLA puts a vehicle, lest it collides with the ground
SETTLING = 0.5  # seconds without commands in which it falls to the road


class CarlaWaypointsEnv(WaypointsEnv):
    """[`~leviathan.integrations.gymnasium.WaypointsEnv`] on the roads and with the vehicles of a CARLA server.

    ``reset`` draws one of the map's spawn points and, where lanes branch, a branch, and spawns a vehicle there, at
    rest. The world runs in synchronous mode in steps of ``time_step``; ``close``, and any error of the server, destroys
    the vehicle and gives the world its settings back.

    CARLA's frame is left-handed, its y to the right and its yaw clockwise; that ends in this module. A ``road`` and
    ``start`` given to ``reset`` are right-handed, with y = -CARLA's; of the start, position and heading are taken. The
    state's reference point is the rear axle, half a wheelbase behind the actor's own.

    The limits of steering, speed and acceleration in the options scale the observations; give those of the blueprint.
    CARLA lessens the steering at speed by a curve of the vehicle, which is left as it is. Roads are flat, by x and y;
    other traffic is neither seen nor spawned, and what it does to the vehicle shows in its state alone. Options of
    random roads other than ``road_length`` and ``half_width`` do nothing here.

    Args:
        client: A ``carla.Client``, or None to make one from ``host`` and ``port``.
        host: Of the server.
        port: Of the server.
        timeout: Of the client that is made, in s.
        town: Map to load, or None for the one that is loaded.
        blueprint: Of the vehicle, an id or a pattern of which the first is taken.
        render_mode: ``"rgb_array"``, drawn from above as without CARLA, or None.
        **options: Fields of [`~leviathan.waypoints.WaypointsOptions`].

    Raises:
        ImportError: If ``carla`` is not installed.
        ValueError: If an option is unknown or out of range; in ``reset``, if the map has no spawn points or the server
            no such blueprint.
        RuntimeError: From CARLA's client, such as a time-out or, in ``reset``, a spawn point that is taken.

    Example:
        >>> import leviathan.integrations.carla
        >>> env = gymnasium.make("leviathan/CarlaWaypoints-v0", host="localhost", port=2000)  # doctest: +SKIP
    """

    def __init__(
        self,
        client: Any = None,
        *,
        host: str = "localhost",
        port: int = 2000,
        timeout: float = 20.0,
        town: str | None = None,
        blueprint: str = "vehicle.tesla.model3",
        render_mode: str | None = None,
        **options: float,
    ):
        super().__init__(render_mode, **options)
        self._carla = _carla()
        if client is None:
            client = self._carla.Client(host, port)
            client.set_timeout(timeout)
        self._world = client.get_world() if town is None else client.load_world(town)
        self._map = self._world.get_map()
        self._blueprint = blueprint
        self._vehicle: Any = None
        self._settings: Any = None  # the world's own, while ours are in force

    def close(self) -> None:
        """Destroys the vehicle and gives the world its settings back; ``reset`` would take both again."""
        self._task = None
        try:
            self._destroy_vehicle()
        finally:
            settings, self._settings = self._settings, None
            if settings is not None:
                self._world.apply_settings(settings)

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # also an interrupt: a world left in synchronous mode waits for ticks that never come
            self.close()
            raise

    def _destroy_vehicle(self) -> None:
        vehicle, self._vehicle = self._vehicle, None
        if vehicle is not None:
            vehicle.destroy()

    def _road(self) -> Road:
        """A route along the map's lanes, which ends early where they do."""
        with self._closing_on_error():
            return self._route()

    def _place(self, start: VehicleState) -> VehicleState:
        with self._closing_on_error():
            self._spawn(start)
            return self._read()

    def _drive(self, throttle: float, steer: float) -> VehicleState:
        with self._closing_on_error():
            self._control(throttle, steer)
            return self._read()

    def _route(self) -> Road:
        spawn_points = self._map.get_spawn_points()
        if not spawn_points:
            raise ValueError(f"The map {self._map.name!r} has no spawn points; load one that has.")
        waypoint = self._map.get_waypoint(spawn_points[self.np_random.integers(len(spawn_points))].location)
        points = [_point(waypoint.transform.location)]
        for _ in range(max(2, round(self.options.road_length / SAMPLING))):
            branches = waypoint.next(SAMPLING)
            if not branches:
                break
            waypoint = branches[self.np_random.integers(len(branches))]
            point = _point(waypoint.transform.location)
            if point != points[-1]:  # where lanes meet CARLA may give one place twice
                points.append(point)
        return Road.through(points)

    def _spawn(self, start: VehicleState) -> None:
        carla, ahead = self._carla, self.options.wheelbase / 2
        self._destroy_vehicle()
        if self._settings is None:
            own, ours = self._world.get_settings(), self._world.get_settings()
            ours.synchronous_mode, ours.fixed_delta_seconds = True, self.options.time_step
            self._settings = own
            self._world.apply_settings(ours)
        blueprints = self._world.get_blueprint_library().filter(self._blueprint)
        if not len(blueprints):
            raise ValueError(f"blueprint = {self._blueprint!r}; the server has none of that name.")

        location = carla.Location(
            x=start.x + ahead * cos(start.heading), y=-(start.y + ahead * sin(start.heading)), z=0.0
        )
        location.z = self._map.get_waypoint(location).transform.location.z + CLEARANCE
        transform = carla.Transform(location, carla.Rotation(pitch=0.0, yaw=-degrees(start.heading), roll=0.0))
        self._vehicle = self._world.spawn_actor(blueprints[0], transform)
        for _ in range(max(1, round(SETTLING / self.options.time_step))):
            self._world.tick()
        wheels = self._vehicle.get_physics_control().wheels
        self._wheel_limit = radians(max(wheel.max_steer_angle for wheel in wheels))

    def _control(self, throttle: float, steer: float) -> None:
        fraction = -steer * self.options.max_steer / self._wheel_limit  # CARLA steers to the right
        control = self._carla.VehicleControl(
            throttle=max(0.0, throttle), steer=max(-1.0, min(1.0, fraction)), brake=max(0.0, -throttle)
        )
        self._vehicle.apply_control(control)
        for _ in range(self.options.substeps):
            self._world.tick()

    def _read(self) -> VehicleState:
        """The vehicle's state in the right-handed frame."""
        transform, velocity = self._vehicle.get_transform(), self._vehicle.get_velocity()
        x, y = _point(transform.location)
        heading = -radians(transform.rotation.yaw)
        c, s = cos(heading), sin(heading)
        speed = max(0.0, c * velocity.x - s * velocity.y)
        # CARLA's acceleration is the vehicle's; the state's is of throttle and brakes, to which drag is then added.
        acceleration = self._vehicle.get_acceleration()
        along = c * acceleration.x - s * acceleration.y + self.options.drag * speed
        wheel = self._vehicle.get_wheel_steer_angle(self._carla.VehicleWheelLocation.FL_Wheel)
        behind = self.options.wheelbase / 2
        return VehicleState(
            x=x - behind * c, y=y - behind * s, heading=heading, speed=speed, steer=-radians(wheel), acceleration=along
        )


def _point(location: Any) -> tuple[float, float]:
    return location.x, -location.y


def _carla() -> ModuleType:
    try:
        import carla
    except ImportError as error:
        raise ImportError("CARLA's client is not installed; pip install carla, of your server's version.") from error
    return carla


if ENV_ID not in gymnasium.registry:
    gymnasium.register(
        ENV_ID,
        entry_point="leviathan.integrations.carla:CarlaWaypointsEnv",
        max_episode_steps=MAX_EPISODE_STEPS,
    )

__all__ = ["ENV_ID", "CarlaWaypointsEnv"]
