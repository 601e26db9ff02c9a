"""Janus: inverse design of microstructures in the latent space of an autoencoder, checked by physics."""

from leviathan.janus.configuration import SnaJanusConfig
from leviathan.janus.inversion import Design, invert
from leviathan.janus.modeling import CycleError, SnaJanusModel, SnaJanusOutput
from leviathan.janus.physics import Checked, Physics, properties

__all__ = [
    "Checked",
    "CycleError",
    "Design",
    "Physics",
    "SnaJanusConfig",
    "SnaJanusModel",
    "SnaJanusOutput",
    "invert",
    "properties",
]
