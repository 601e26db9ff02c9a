"""KHRONOS: the models, how they are fitted, chosen and inverted."""

from leviathan.khronos.classification import (
    KhronosClassificationFit,
    KhronosClassifierOutput,
    KhronosForClassification,
)
from leviathan.khronos.configuration import KhronosConfig
from leviathan.khronos.modeling import KhronosFit, KhronosModel, KhronosOutput
from leviathan.khronos.pretrained import KhronosPreTrainedModel
from leviathan.khronos.selection import Selection, SelectionRow, select
from leviathan.khronos.uncertainty import Interval

__all__ = [
    "Interval",
    "KhronosClassificationFit",
    "KhronosClassifierOutput",
    "KhronosConfig",
    "KhronosFit",
    "KhronosForClassification",
    "KhronosModel",
    "KhronosOutput",
    "KhronosPreTrainedModel",
    "Selection",
    "SelectionRow",
    "select",
]
