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
"""Roads as polylines by arc length, and where a vehicle is on one.

Metres and radians; x, y and headings are right-handed: headings turn counterclockwise from x, left of the road is
positive.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, cos, sin

import numpy as np
from numpy.typing import ArrayLike, NDArray

SAMPLING = 0.5  # metres between points of a road: a chord of the sharpest bend then lies within 2 mm of its arc
WINDOW = 5.0  # metres of road on either side of the last place in which the next is searched


@dataclass(frozen=True)
class RoadOptions:
    """What random roads are like.

    Args:
        road_length: Length of the road in m.
        half_width: From the middle of the lane to its border in m.
        max_curvature: Largest curvature of a road in 1/m.
        bend_length: Arc length in m over which the curvature goes from one random value to the next.
    """

    road_length: float = 200.0
    half_width: float = 2.0
    max_curvature: float = 0.05
    bend_length: float = 20.0


@dataclass(frozen=True)
class Place:
    """The point of a road nearest to a position.

    Args:
        arc_length: From the road's start in m.
        offset: Of the position from the road in m, to the left.
        heading: Of the road in radians, not wrapped.
    """

    arc_length: float
    offset: float
    heading: float


@dataclass(frozen=True, eq=False)
class Road:
    """The middle of a lane, as points at equal distances.

    Args:
        points: Positions (n, 2) in m.
        headings: Directions (n,) of travel in radians, without jumps of a full turn.
        curvatures: Derivatives (n,) of the headings by arc length in 1/m.
        spacing: Arc length between neighbours in m.
    """

    points: NDArray
    headings: NDArray
    curvatures: NDArray
    spacing: float

    @property
    def length(self) -> float:
        """Arc length of the whole road in m."""
        return (len(self.points) - 1) * self.spacing

    @classmethod
    def random(cls, options: RoadOptions, rng: np.random.Generator) -> Road:
        r"""A road of clothoids: its curvature :math:`\kappa(s)` is linear between random values of both signs.

        Starts at the origin along x, straight; :math:`\theta(s) = \int \kappa`, and
        :math:`(x, y)(s) = \int (\cos\theta, \sin\theta)`. It may cross itself, which does not matter to a vehicle that
        follows it.
        """
        num_segments = max(2, ceil(options.road_length / SAMPLING))
        spacing = options.road_length / num_segments
        s = spacing * np.arange(num_segments + 1)
        knots = options.bend_length * np.arange(ceil(options.road_length / options.bend_length) + 1)
        values = options.max_curvature * rng.uniform(-1, 1, len(knots))
        values[0] = 0.0
        curvatures = np.interp(s, knots, values)
        headings = _integral((curvatures[1:] + curvatures[:-1]) / 2, spacing)
        middle = (headings[1:] + headings[:-1]) / 2
        points = np.stack([_integral(np.cos(middle), spacing), _integral(np.sin(middle), spacing)], axis=1)
        return cls(points, headings, curvatures, spacing)

    @classmethod
    def through(cls, points: ArrayLike) -> Road:
        """The road along a polyline (n, 2), n >= 3, resampled to equal distances.

        Raises:
            ValueError: If there are fewer than three points, they are not finite pairs, or one is repeated.
        """
        points = np.asarray(points, dtype=np.float64)
        if points.ndim != 2 or points.shape[1:] != (2,) or len(points) < 3:
            raise ValueError(f"points have shape {points.shape}; expected (n, 2), n >= 3, a row (x, y) for each.")
        if not np.isfinite(points).all():
            raise ValueError("points hold a value that is not finite; drop its row.")
        steps = np.hypot(*np.diff(points, axis=0).T)
        if not steps.all():
            raise ValueError(f"points[{int(np.argmin(steps))}] and the next are the same; drop one of them.")
        s = np.concatenate([[0.0], np.cumsum(steps)])
        num_segments = max(2, round(s[-1] / SAMPLING))
        spacing = float(s[-1]) / num_segments
        at = spacing * np.arange(num_segments + 1)
        x, y = (np.interp(at, s, column) for column in points.T)
        headings = np.unwrap(np.arctan2(np.gradient(y, edge_order=2), np.gradient(x, edge_order=2)))
        return cls(np.stack([x, y], axis=1), headings, np.gradient(headings, spacing), spacing)

    def at(self, arc_length: NDArray) -> NDArray:
        """Positions (..., 2) at arc lengths (...); past the end the road goes on straight."""
        position = arc_length / self.spacing
        i = np.clip(position.astype(np.int64), 0, len(self.points) - 2)
        first = self.points[i]
        return first + (position - i)[..., None] * (self.points[i + 1] - first)

    def locate(self, x: float, y: float, near: float | None = None) -> Place:
        """The place nearest to a position, on the whole road or within ``WINDOW`` of the arc length ``near``."""
        points, low, high = self.points, 0, len(self.points)
        if near is not None:
            low = max(0, min(int((near - WINDOW) / self.spacing), high - 2))
            high = min(high, int((near + WINDOW) / self.spacing) + 2)
        away = points[low:high] - (x, y)
        i = low + int(np.argmin(np.einsum("ij,ij->i", away, away)))

        # The foot of the perpendicular on the circle that touches the road there.
        (px, py), heading, curvature = points[i].tolist(), self.headings[i].item(), self.curvatures[i].item()
        c, s = cos(heading), sin(heading)
        along, offset = c * (x - px) + s * (y - py), c * (y - py) - s * (x - px)
        step = along / max(1 - curvature * offset, 0.5)  # bounded also near the centre of a sharp kink
        arc_length = min(max(i * self.spacing + step, 0.0), self.length)
        return Place(arc_length, offset - curvature * along * step / 2, heading + curvature * step)


def _integral(values: NDArray, spacing: float) -> NDArray:
    """Of values on n segments: (n + 1,), from 0."""
    return np.concatenate([[0.0], np.cumsum(values)]) * spacing


__all__ = ["Place", "Road", "RoadOptions"]
