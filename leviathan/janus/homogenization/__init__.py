"""Effective properties of periodic voxel cells: stiffness, conductivity, permeability; batched and differentiable."""

from leviathan.janus.homogenization.effective import Isotropic, conductivity, elastic_stiffness, mandel
from leviathan.janus.homogenization.permeability import permeability
from leviathan.janus.homogenization.result import Homogenized

__all__ = ["Homogenized", "Isotropic", "conductivity", "elastic_stiffness", "mandel", "permeability"]
