"""The waypoint-driving task as a Gymnasium environment; importing this module registers ``leviathan/Waypoints-v0``."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from numpy.typing import NDArray

from leviathan.waypoints import Road, VehicleState, WaypointsOptions, WaypointsTask, draw
from leviathan.waypoints.task import MAX_EPISODE_STEPS, Outcome, act, commands

ENV_ID = "leviathan/Waypoints-v0"


class WaypointsEnv(gymnasium.Env[NDArray, NDArray]):
    """Drives a kinematic bicycle along a random road; what is seen and paid: [`leviathan.waypoints.task`].

    Actions (2,) in [-1, 1]: throttle (negative brakes) and steer (left positive). An episode terminates at the end of
    the road (``info["is_success"]``), out of the lane, or turned away; ``gymnasium.make`` also truncates it after
    ``MAX_EPISODE_STEPS``. Each ``reset`` makes a road and a start; ``reset(options={"road": Road, "start":
    VehicleState})`` gives either.

    Args:
        render_mode: ``"rgb_array"``, or None to draw nothing.
        **options: Fields of [`~leviathan.waypoints.WaypointsOptions`].

    Raises:
        ValueError: If an option is unknown or out of range.

    Example:
        >>> import gymnasium
        >>> import leviathan.integrations.gymnasium
        >>> env = gymnasium.make("leviathan/Waypoints-v0", road_length=100.0)
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / WaypointsOptions().control_step)}

    def __init__(self, render_mode: str | None = None, **options: Any):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode = {render_mode!r}; expected None or one of {self.metadata['render_modes']}.")
        names = WaypointsOptions.__dataclass_fields__
        unknown = sorted(options.keys() - names)
        if unknown:
            raise ValueError(f"Unknown options {unknown}; expected some of {sorted(names)}.")
        self.options = WaypointsOptions(**options)
        self.render_mode = render_mode
        self.metadata = {**self.metadata, "render_fps": max(1, round(1 / self.options.control_step))}
        low, high = self.options.bounds()
        self.observation_space = spaces.Box(low, high, dtype=np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), dtype=np.float32)
        self._task: WaypointsTask | None = None
        self._state = VehicleState()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray, dict[str, float | bool]]:
        """Starts an episode; returns the observation and ``info``. A seed makes it, and those after it, reproducible.

        Raises:
            ValueError: If an option is neither a ``road`` nor a ``start``, of their types.
        """
        super().reset(seed=seed)
        given = dict(options or {})
        for name, kind in (("road", Road), ("start", VehicleState)):
            value = given.pop(name, None)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"options[{name!r}] is {type(value).__name__}; expected {kind.__name__}.")
        if given:
            raise ValueError(f"Unknown reset options {sorted(given)}; expected 'road' and 'start'.")
        self._task = None  # a reset that fails leaves no episode behind
        road, start = (options or {}).get("road"), (options or {}).get("start")
        task = WaypointsTask(self._road() if road is None else road, self.options)
        self._state = self._place(task.start(self.np_random) if start is None else start)
        outcome = task.judge(self._state)
        self._task = task
        return outcome.observation, outcome.info

    def step(self, action: NDArray) -> tuple[NDArray, float, bool, bool, dict[str, float | bool]]:
        """Holds an action for ``control_step`` seconds.

        Raises:
            ValueError: If the action is not two numbers, or NaN.
            gymnasium.error.ResetNeeded: Before the first ``reset``.
        """
        task = self._started()
        self._state = self._drive(*commands(action))
        outcome: Outcome = task.judge(self._state)
        terminated = outcome.success or outcome.failure
        return outcome.observation, outcome.reward, terminated, False, outcome.info

    def render(self) -> NDArray | None:
        """A frame (height, width, 3) in uint8 of the road around the vehicle, or None without a ``render_mode``."""
        if self.render_mode is None:
            return None
        task = self._started()
        return draw(task.road, self._state, self.options, task.arc_length)

    def _started(self) -> WaypointsTask:
        if self._task is None:
            raise ResetNeeded("There is no episode; call reset() first.")
        return self._task

    # What a simulation elsewhere does in its own way.

    def _road(self) -> Road:
        return Road.random(self.options, self.np_random)

    def _place(self, start: VehicleState) -> VehicleState:
        """Puts the vehicle there; returns where it is."""
        return start

    def _drive(self, throttle: float, steer: float) -> VehicleState:
        return act(self._state, throttle, steer, self.options)


if ENV_ID not in gymnasium.registry:
    gymnasium.register(
        ENV_ID,
        entry_point="leviathan.integrations.gymnasium:WaypointsEnv",
        max_episode_steps=MAX_EPISODE_STEPS,
    )

__all__ = ["ENV_ID", "WaypointsEnv"]
