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
"""Frames of the task: the road as the vehicle sees it, from above, in numpy alone.

Every shape is a field of signed distances in metres, negative inside; its edge is blended over one pixel.
"""

from __future__ import annotations

from math import cos, sin

import numpy as np
from numpy.typing import NDArray

from leviathan.waypoints.road import Road
from leviathan.waypoints.task import WaypointsOptions
from leviathan.waypoints.vehicle import VehicleState

SIZE = 400  # pixels of a side
EXTENT = 32.0  # metres of a side
BEHIND = 0.25  # of the frame lies behind the vehicle
TRACK = 1.65  # metres between left and right wheels
OVERHANG = 0.85  # metres of body before the front axle and behind the rear axle

GRASS, MOWN = (112, 148, 96), (118, 155, 101)
ASPHALT, KERB, PAINT = (72, 76, 84), (58, 61, 68), (232, 232, 226)
WAYPOINT, BODY, GLASS, TYRE = (255, 193, 64), (214, 69, 58), (38, 50, 66), (28, 28, 30)


def draw(road: Road, state: VehicleState, options: WaypointsOptions, arc_length: float) -> NDArray:
    """An RGB frame (SIZE, SIZE, 3) in uint8, EXTENT wide: the vehicle stands still, facing up, and the road turns.

    Yellow points are the waypoints that the observation holds, from the vehicle's ``arc_length`` on.
    """
    pixel = EXTENT / SIZE
    across = (np.arange(SIZE) + 0.5) * pixel
    # x ahead and y to the left of the vehicle, of each pixel's middle.
    x, y = ((1 - BEHIND) * EXTENT - across)[:, None], (EXTENT / 2 - across)[None, :]
    c, s = cos(state.heading), sin(state.heading)

    frame = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    field = np.floor((state.x + c * x - s * y) / 5) + np.floor((state.y + s * x + c * y) / 5)
    frame[:] = np.where((field % 2 == 1)[..., None], MOWN, GRASS)

    to_vehicle = np.array([[c, -s], [s, c]])
    path = (road.points - (state.x, state.y)) @ to_vehicle
    distance = _distance_to_path(path, x, y, pixel, reach=options.half_width + 1.0)
    _paint(frame, distance - options.half_width - 0.4, KERB, pixel)
    _paint(frame, distance - options.half_width, ASPHALT, pixel)
    _paint(frame, np.abs(distance - options.half_width + 0.2) - 0.08, PAINT, pixel)
    end = path[-1]
    ahead = end - path[-2]
    ahead = ahead / np.hypot(*ahead)
    along, beside = (x - end[0]) * ahead[0] + (y - end[1]) * ahead[1], (y - end[1]) * ahead[0] - (x - end[0]) * ahead[1]
    _paint(frame, _box(along, beside, 0.3, options.half_width), PAINT, pixel)

    waypoints = arc_length + options.waypoint_spacing * np.arange(1, options.num_waypoints + 1)
    for px, py in (road.at(waypoints) - (state.x, state.y)) @ to_vehicle:
        _paint(frame, np.hypot(x - px, y - py) - 0.28, WAYPOINT, pixel)

    _draw_vehicle(frame, x, y, state.steer, options.wheelbase, pixel)
    return np.rint(frame).astype(np.uint8)


def _draw_vehicle(frame: NDArray, x: NDArray, y: NDArray, steer: float, wheelbase: float, pixel: float) -> None:
    """The origin is the middle of the rear axle."""
    for axle, angle in ((0.0, 0.0), (wheelbase, steer)):
        for side in (-TRACK / 2, TRACK / 2):
            c, s = cos(angle), sin(angle)
            dx, dy = x - axle, y - side
            _paint(frame, _box(c * dx + s * dy, c * dy - s * dx, 0.36, 0.15, 0.08), TYRE, pixel)
    middle, half_length, half_width = wheelbase / 2, wheelbase / 2 + OVERHANG, TRACK / 2 + 0.02
    _paint(frame, _box(x - middle, y, half_length, half_width, 0.5), BODY, pixel)
    _paint(frame, _box(x - 0.62 * wheelbase, y, 0.4, half_width - 0.16, 0.2), GLASS, pixel)
    _paint(frame, _box(x - 0.02 * wheelbase, y, 0.24, half_width - 0.2, 0.15), GLASS, pixel)


def _paint(frame: NDArray, distance: NDArray, colour: tuple[int, int, int], pixel: float) -> None:
    """Blends a colour over where the distance is negative, in place."""
    cover = 0.5 - distance / pixel
    rows, columns = np.nonzero(cover > 0)
    share = np.minimum(cover[rows, columns], 1.0)[:, None]
    frame[rows, columns] += share * (np.asarray(colour) - frame[rows, columns])


def _box(x: NDArray, y: NDArray, half_length: float, half_width: float, corner: float = 0.0) -> NDArray:
    """Signed distance to a rectangle about the origin with rounded corners."""
    dx, dy = np.abs(x) - half_length + corner, np.abs(y) - half_width + corner
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - corner


def _distance_to_path(path: NDArray, x: NDArray, y: NDArray, pixel: float, reach: float) -> NDArray:
    """Distance (rows, columns) of each pixel to a polyline (n, 2), right up to ``reach`` and infinite beyond.

    Each segment looks only at the pixels around it.
    """
    distance = np.full((x.size, y.size), np.inf)
    lengths = np.hypot(*np.diff(path, axis=0).T)
    for (ax, ay), (bx, by), length in zip(path[:-1].tolist(), path[1:].tolist(), lengths.tolist(), strict=True):
        # Rows go down as x ahead falls, columns right as y to the left falls.
        top, bottom = _span(x[0, 0] - max(ax, bx) - reach, x[0, 0] - min(ax, bx) + reach, pixel, x.size)
        left, right = _span(y[0, 0] - max(ay, by) - reach, y[0, 0] - min(ay, by) + reach, pixel, y.size)
        if top >= bottom or left >= right:
            continue
        px, py = x[top:bottom] - ax, y[:, left:right] - ay
        dx, dy = (bx - ax) / length, (by - ay) / length
        along = np.clip(px * dx + py * dy, 0, length)
        there = distance[top:bottom, left:right]
        np.minimum(there, np.hypot(px - along * dx, py - along * dy), out=there)
    return distance


def _span(low: float, high: float, pixel: float, size: int) -> tuple[int, int]:
    return max(0, int(low / pixel)), min(size, max(0, int(high / pixel) + 2))


__all__ = ["draw"]
