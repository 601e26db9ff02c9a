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
r"""A vehicle that rolls without slipping: the kinematic bicycle, with lags of its actuators.

The reference point is the middle of the rear axle, which moves along the heading:

.. math:: \dot x = v \cos\theta, \quad \dot y = v \sin\theta, \quad \dot\theta = v \tan(\delta) / L, \quad
    \dot v = a - c v, \quad \dot\delta = (\delta^* - \delta) / \tau_\delta, \quad \dot a = (a^* - a) / \tau_a

with the steering angle :math:`\delta` and the acceleration :math:`a` following their commands (*). Metres, seconds and
radians; left is positive. R. Rajamani, Vehicle Dynamics and Control (2012), section 2.2, moved to the rear axle.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, exp, sin, tan


@dataclass(frozen=True)
class VehicleOptions:
    """A passenger car's size and actuators, and the time step of its motion.

    Args:
        wheelbase: Between the axles, L, in m.
        max_steer: Largest steering angle of the front wheels in radians.
        steer_lag: Time constant of the steering in s.
        max_acceleration: Of full throttle at rest in m/s^2.
        max_braking: Deceleration of full brakes in m/s^2.
        acceleration_lag: Time constant of throttle and brakes in s.
        drag: Deceleration per speed, c, in 1/s. Full throttle comes to ``max_speed``.
        time_step: Of the integration in s.
    """

    wheelbase: float = 2.8
    max_steer: float = 0.5
    steer_lag: float = 0.15
    max_acceleration: float = 3.0
    max_braking: float = 6.0
    acceleration_lag: float = 0.2
    drag: float = 0.25
    time_step: float = 0.05

    @property
    def max_speed(self) -> float:
        """Speed in m/s at which drag takes all of full throttle; none is higher."""
        return self.max_acceleration / self.drag


@dataclass(frozen=True, slots=True)
class VehicleState:
    """Where a vehicle is and how it moves.

    Args:
        x: Of the middle of the rear axle in m.
        y: Of the middle of the rear axle in m.
        heading: Counterclockwise from x in radians, not wrapped.
        speed: In m/s, never negative.
        steer: Steering angle in radians, left positive.
        acceleration: Of throttle and brakes, without drag, in m/s^2.
    """

    x: float = 0.0
    y: float = 0.0
    heading: float = 0.0
    speed: float = 0.0
    steer: float = 0.0
    acceleration: float = 0.0


def drive(state: VehicleState, throttle: float, steer: float, options: VehicleOptions) -> VehicleState:
    """The state one ``time_step`` later, for commands in [-1, 1]; negative throttle brakes, positive steer is left.

    The lags are integrated exactly. Position and heading go along the arc of the step's mean speed and mean steering
    angle: exact on a circle, of second order in the step otherwise.
    """
    dt = options.time_step
    target = throttle * (options.max_acceleration if throttle > 0 else options.max_braking)
    acceleration = target + (state.acceleration - target) * exp(-dt / options.acceleration_lag)
    target = steer * options.max_steer
    angle = target + (state.steer - target) * exp(-dt / options.steer_lag)

    mean = (state.acceleration + acceleration) / 2
    fade = exp(-dt * options.drag)
    speed = max(0.0, state.speed * fade + mean / options.drag * (1 - fade))
    distance = dt * (state.speed + speed) / 2

    turn = distance * tan((state.steer + angle) / 2) / options.wheelbase
    half = turn / 2
    chord = distance * (sin(half) / half if half else 1.0)
    return VehicleState(
        x=state.x + chord * cos(state.heading + half),
        y=state.y + chord * sin(state.heading + half),
        heading=state.heading + turn,
        speed=speed,
        steer=angle,
        acceleration=acceleration,
    )


__all__ = ["VehicleOptions", "VehicleState", "drive"]
