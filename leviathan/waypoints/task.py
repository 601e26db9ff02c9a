# Copyright 2026 The leviathan-sna authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
r"""The task: follow the waypoints at the target speed, in the middle of the lane.

Observation (2 N + 6,), float32 in [-1, 1], in this order:

- the next N waypoints (x ahead, y to the left), in the vehicle's frame, by their range plus the lane's half-width;
- speed by the vehicle's highest; heading error by a quarter turn; offset by the lane's half-width, left positive;
- steering angle and acceleration as they are, by their largest. Both lag behind the actions, and without them neither
  the next state nor the reward would be functions of observation and action;
- the road that remains, by the waypoints' range, at most 1: nothing else tells that the episode is about to end.

In the lane no entry but the last leaves its bounds; what has left the lane is clipped to them.

Reward of each step, with speed :math:`v` up to its target :math:`v^*`, heading error :math:`e`, offset :math:`d`, and
half-width :math:`w`; in [-2, 1] while in the lane:

.. math:: r = \min(v / v^*, 1) \, (\cos e - |\sin e| - |d| / w) - p \, [\text{failed}]

Faster than the target earns no more and ends sooner. The task, waypoints and form of the reward are those of Perez-Gil
et al., Deep reinforcement learning based control for autonomous vehicles in CARLA, Multimedia Tools and Applications 81
(2022), normalised, with a penalty p of the size of some steps' reward.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import cos, isfinite, pi, sin, tan

import numpy as np
from numpy.typing import ArrayLike, NDArray

from leviathan.waypoints.road import WINDOW, Place, Road, RoadOptions
from leviathan.waypoints.vehicle import VehicleOptions, VehicleState, drive

MAX_EPISODE_STEPS = 400  # 40 s: the default road at more than 5 m/s
START_AT_MOST = 0.5  # bounds what may be asked of the start: radians, and parts of the lane's half-width


@dataclass(frozen=True)
class WaypointsOptions(RoadOptions, VehicleOptions):
    """Every number of the task; those of roads and vehicles are inherited.

    Args:
        num_waypoints: Waypoints that are observed, N.
        waypoint_spacing: Arc length from one to the next in m, and from the vehicle to the first.
        target_speed: Of the reward in m/s.
        failure_penalty: Taken off the reward of a step that leaves the lane or turns away.
        substeps: Time steps of the vehicle for each action.
        start_offset: Largest offset at the start in m; uniform to both sides.
        start_heading: Largest heading error at the start in radians; uniform to both sides. The speed is uniform up to
            ``target_speed``.

    Raises:
        ValueError: If a number is not finite or out of range, or a vehicle could not follow the sharpest bend.
    """

    num_waypoints: int = 10
    waypoint_spacing: float = 2.0
    target_speed: float = 8.0
    failure_penalty: float = 10.0
    substeps: int = 2
    start_offset: float = 0.5
    start_heading: float = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            value, whole = getattr(self, field.name), field.type == "int"
            kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
            if isinstance(value, bool) or not isinstance(value, kinds) or not isfinite(value):
                raise ValueError(f"{field.name} = {value!r}; expected {'an integer' if whole else 'a finite number'}.")
            may_be_zero = field.name in ("failure_penalty", "max_curvature", "start_heading", "start_offset")
            if value < 0 or (value == 0 and not may_be_zero):
                raise ValueError(f"{field.name} = {value!r}; expected {'>= 0' if may_be_zero else '> 0'}.")
        self._at_most("max_steer", 1.4, "a quarter turn would stop the vehicle")
        self._at_most("target_speed", self.max_speed, "max_acceleration / drag; lower it, or the drag")
        self._at_most("start_offset", START_AT_MOST * self.half_width, "the vehicle must start in the lane")
        self._at_most("start_heading", START_AT_MOST, "the vehicle must start along the lane")
        self._at_most("max_curvature", tan(self.max_steer) / self.wheelbase, "what the vehicle can steer")
        self._at_most("max_curvature", 0.5 / self.half_width, "sharper bends fold the lane's border")
        travel = self.max_speed * self.control_step
        if travel > WINDOW / 2:
            raise ValueError(
                f"At its highest speed the vehicle goes {travel:g} m in one step of {self.control_step:g} s; expected "
                f"at most {WINDOW / 2:g} m: lower time_step, substeps or max_acceleration."
            )

    def _at_most(self, name: str, bound: float, why: str) -> None:
        value = getattr(self, name)
        if value > bound:
            raise ValueError(f"{name} = {value:g}; expected at most {bound:g}: {why}.")

    @property
    def control_step(self) -> float:
        """Time between actions in s."""
        return self.time_step * self.substeps

    @property
    def view(self) -> float:
        """Arc length in m to the farthest waypoint."""
        return self.num_waypoints * self.waypoint_spacing

    def bounds(self) -> tuple[NDArray, NDArray]:
        """Lowest and highest observations, float32, each (2 N + 6,)."""
        low = -np.ones(2 * self.num_waypoints + 6, dtype=np.float32)
        low[[-6, -1]] = 0.0  # speed and what remains
        return low, np.ones_like(low)


@dataclass(frozen=True)
class Outcome:
    """What came of a step.

    Args:
        observation: As above, (2 N + 6,) in float32.
        reward: As above.
        success: Whether the vehicle has come to the end of the road, in the lane.
        failure: Whether it has left the lane or turned away by more than a quarter.
        place: Where it is on the road.
        progress: The part of the road behind it, 0 to 1.
    """

    observation: NDArray
    reward: float
    success: bool
    failure: bool
    place: Place
    progress: float

    @property
    def info(self) -> dict[str, float | bool]:
        """``is_success``, ``offset`` in m and ``progress``, by the names that Stable-Baselines3 knows."""
        return {"is_success": self.success, "offset": self.place.offset, "progress": self.progress}


class WaypointsTask:
    """One episode on a road; judges states wherever they come from, a simulation here or CARLA.

    Args:
        road: To be followed.
        options: The task's numbers.

    Attributes:
        arc_length: Of the last place that was judged, in m.
    """

    def __init__(self, road: Road, options: WaypointsOptions):
        self.road, self.options = road, options
        self._ahead = options.waypoint_spacing * np.arange(1, options.num_waypoints + 1)
        self._low, self._high = options.bounds()
        self.arc_length = 0.0

    def start(self, rng: np.random.Generator) -> VehicleState:
        """A random state at the start of the road."""
        options = self.options
        offset, error = (options.start_offset * rng.uniform(-1, 1), options.start_heading * rng.uniform(-1, 1))
        heading = self.road.headings[0].item()
        x, y = self.road.points[0].tolist()
        return VehicleState(
            x=x - offset * sin(heading),
            y=y + offset * cos(heading),
            heading=heading + error,
            speed=options.target_speed * rng.uniform(),
        )

    def judge(self, state: VehicleState) -> Outcome:
        """The outcome of having come to a state, which is sought near the last place, at first the road's start."""
        options = self.options
        place = self.road.locate(state.x, state.y, self.arc_length)
        self.arc_length = place.arc_length
        error = (state.heading - place.heading + pi) % (2 * pi) - pi
        failure = abs(place.offset) > options.half_width or abs(error) > pi / 2
        success = not failure and place.arc_length >= self.road.length
        pace = min(state.speed / options.target_speed, 1.0)
        lost = min(abs(place.offset) / options.half_width, 1.0)  # bounded also where a bad step ends far off
        reward = pace * (cos(error) - abs(sin(error)) - lost) - options.failure_penalty * failure
        observation = self._observe(state, place, error)
        return Outcome(observation, reward, success, failure, place, place.arc_length / self.road.length)

    def _observe(self, state: VehicleState, place: Place, error: float) -> NDArray:
        options = self.options
        waypoints = self.road.at(place.arc_length + self._ahead) - (state.x, state.y)
        c, s = cos(state.heading), sin(state.heading)
        observation = np.empty(len(self._low), dtype=np.float32)
        observation[:-6] = (waypoints @ ((c, -s), (s, c))).ravel() / (options.view + options.half_width)
        strongest = options.max_acceleration if state.acceleration > 0 else options.max_braking
        observation[-6:] = (
            state.speed / options.max_speed,
            error / (pi / 2),
            place.offset / options.half_width,
            state.steer / options.max_steer,
            state.acceleration / strongest,
            (self.road.length - place.arc_length) / options.view,
        )
        return np.clip(observation, self._low, self._high)


def commands(action: ArrayLike) -> tuple[float, float]:
    """Throttle (negative brakes) and steer (left positive) of an action (2,); beyond [-1, 1] they saturate.

    Raises:
        ValueError: If there are not two numbers, or one is NaN.
    """
    values = np.asarray(action, dtype=np.float64)
    if values.shape != (2,):
        raise ValueError(f"The action has shape {values.shape}; expected (2,): throttle and steer, each in [-1, 1].")
    throttle, steer = values.tolist()
    if throttle != throttle or steer != steer:
        raise ValueError(f"The action is ({throttle}, {steer}); NaN drives nowhere: see what the policy was given.")
    return min(1.0, max(-1.0, throttle)), min(1.0, max(-1.0, steer))


def act(state: VehicleState, throttle: float, steer: float, options: WaypointsOptions) -> VehicleState:
    """The state after one action, ``substeps`` time steps later."""
    for _ in range(options.substeps):
        state = drive(state, throttle, steer, options)
    return state


__all__ = ["MAX_EPISODE_STEPS", "Outcome", "WaypointsOptions", "WaypointsTask", "act", "commands"]
