"""Driving along the waypoints of a road: a small task for reinforcement learning, in numpy alone."""

from leviathan.waypoints.drawing import draw
from leviathan.waypoints.road import Road, RoadOptions
from leviathan.waypoints.task import WaypointsOptions, WaypointsTask
from leviathan.waypoints.vehicle import VehicleOptions, VehicleState, drive

__all__ = [
    "Road",
    "RoadOptions",
    "VehicleOptions",
    "VehicleState",
    "WaypointsOptions",
    "WaypointsTask",
    "draw",
    "drive",
]
