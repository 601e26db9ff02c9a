"""VSNA: differential equations solved over space, time and parameters at once, and what is asked of the solutions."""

from leviathan.vsna.configuration import VsnaConfig
from leviathan.vsna.estimate import ErrorEstimate
from leviathan.vsna.modeling import VsnaModel
from leviathan.vsna.observations import ParameterFit
from leviathan.vsna.sweep import SweepResult

__all__ = ["ErrorEstimate", "ParameterFit", "SweepResult", "VsnaConfig", "VsnaModel"]
