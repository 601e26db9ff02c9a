"""Configuration of Janus."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from leviathan.completed import Completed
from leviathan.janus.cells import Symmetry
from leviathan.janus.homogenization import Isotropic
from leviathan.janus.homogenization.elements import SCHEMES
from leviathan.janus.physics import Physics
from leviathan.sizes import MOST_MODULES, check_extra, check_sizes, check_weights
from sna_core.network import check_counts

PROPERTIES = {  # of cells in two and in three dimensions
    2: ("K11", "K22", "K12", "volume_fraction"),
    3: ("C1111", "C1122", "C2323", "volume_fraction", "permeability"),
}
WEIGHTS = ("reconstruction_weight", "property_weight", "cycle_weight", "jacobian_weight", "latent_weight")
PHYSICS = ("youngs_modulus", "poissons_ratio", "contrast", "solid_conductivity", "void_conductivity", "scheme")
MATERIALS = ("contrast", "solid_conductivity", "void_conductivity")
STATISTICS = {"property_mean": 0.0, "property_std": 1.0, "property_low": 0.0, "property_high": 0.0}


@strict
class SnaJanusConfig(PreTrainedConfig):
    r"""The cells, the autoencoder, the head and the losses of a Janus.

    Args:
        spatial_dims: 2 or 3.
        resolution: Voxels along an edge of the array: of the orthant, or of the whole cell for symmetry ``"none"``.
        symmetry: ``"none"``: arrays are whole cells; ``"mirror"``: orthants of cells that are mirror-symmetric about
            their mid-planes; ``"cubic"``: orthants of cells that permutations of the axes leave alone too.
        two_phases: Whether cells hold zeros and ones alone. Grey ones are never rounded.
        channels: Of the encoder's stages, each of which halves the resolution; the decoder's are the same, reversed.
        latent_dim: Number d of latent coordinates.
        property_names: What the head predicts, or the names of the classes; None for the stiffnesses, volume fraction
            and permeability of cubic cells, in 2-D for the conductivities and volume fraction.
        property_kind: ``"regression"`` of properties, or ``"classification"``.
        property_scale: ``"linear"`` or ``"log"`` for each property: the unit in which it is standardised. None is
            ``"log"`` for the permeability alone.
        property_mean: Of each property in that unit, over the training cells; None for 0.
        property_std: Its standard deviation; None for 1.
        property_low: The least value in training, in physical units; None for 0.
        property_high: The largest.
        head: ``"separable"``, a sum of products of splines of one latent coordinate each; or ``"mlp"``.
        head_rank: Number of products, which all properties share.
        head_num_cells: Cells of the interval (0, 1) of a latent coordinate's logistic function.
        head_degree: Degree of the B-splines, 0 to 5.
        head_hidden: Widths of the MLP's two hidden layers; None finds those that give as many parameters as the
            separable head has.
        reconstruction_weight: Of the binary cross-entropy of a voxel.
        property_weight: Of the squared error of a standardised property, or the cross-entropy of the class.
        cycle_weight: Of the disagreement after decoding and encoding once more.
        jacobian_weight: Of the squared derivatives of the standardised properties in the latent coordinates.
        latent_weight: Of the mean square of the latent coordinates.
        latent_noise: Standard deviation of the noise on the latents in training, as a fraction of their own.
        num_codes: How many latents of training cells the model can remember.
        shared_boundary: Whether all cells are the same where they touch, so that any two fit.
        youngs_modulus: Of the solid, in GPa.
        poissons_ratio: Of the solid.
        contrast: Stiffness of the solid over that of the void.
        solid_conductivity: Thermal.
        void_conductivity: Thermal.
        scheme: Of the homogenisation that checks a design.

    Raises:
        ValueError: If the resolution cannot be halved so often, a count is below 1, a weight is negative, a list does
            not have one entry for each property, or there is no such material or scheme.

    ```python
    >>> from leviathan import SnaJanusConfig, SnaJanusModel

    >>> model = SnaJanusModel(SnaJanusConfig(resolution=8, channels=[8, 16], latent_dim=16))
    ```
    """

    model_type = "sna_janus"

    spatial_dims: Literal[2, 3] = 3
    resolution: int = 16
    symmetry: Symmetry = Physics.symmetry
    two_phases: bool = True
    channels: Completed[list[int]] = None
    latent_dim: int = 64
    property_names: Completed[list[str]] = None
    property_kind: Literal["regression", "classification"] = "regression"
    property_scale: Completed[list[Literal["linear", "log"]]] = None
    property_mean: Completed[list[float]] = None
    property_std: Completed[list[float]] = None
    property_low: Completed[list[float]] = None
    property_high: Completed[list[float]] = None
    head: Literal["separable", "mlp"] = "separable"
    head_rank: int = 32
    head_num_cells: int = 8
    head_degree: int = 2
    head_hidden: Completed[list[int]] = None
    reconstruction_weight: float = 1.0
    property_weight: float = 1.0
    cycle_weight: float = 0.1
    jacobian_weight: float = 0.0
    latent_weight: float = 1e-3
    latent_noise: float = 0.05
    num_codes: int = 1024
    shared_boundary: bool = True
    youngs_modulus: float = Physics.youngs_modulus
    poissons_ratio: float = Physics.poissons_ratio
    contrast: float = Physics.contrast
    solid_conductivity: float = Physics.solid_conductivity
    void_conductivity: float = Physics.void_conductivity
    scheme: str = Physics.scheme

    def __post_init__(self, **kwargs: Any) -> None:
        check_extra(self, kwargs)
        self.channels = [16, 32, 64] if self.channels is None else self.channels
        check_sizes(self, "resolution", "channels", "latent_dim", "head_rank", "head_num_cells", "num_codes")
        check_sizes(self, "head_hidden", "head_degree")
        if len(self.channels) > MOST_MODULES:
            raise ValueError(f"channels has {len(self.channels)} entries; expected at most {MOST_MODULES}.")
        if self.property_names is None:
            self.property_names = list(PROPERTIES.get(self.spatial_dims, ()))
        if self.property_scale is None:
            self.property_scale = ["log" if name == "permeability" else "linear" for name in self.property_names]
        for name, value in STATISTICS.items():
            if getattr(self, name) is None:
                setattr(self, name, [value] * len(self.property_names))
        if self.head_hidden is None:
            self.head_hidden = self._matching_widths()
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation. Validates the architecture of the config."""
        counts = ("resolution", "latent_dim", "head_rank", "head_num_cells", "num_codes")
        check_counts(**{name: getattr(self, name) for name in counts})
        if not 0 <= self.head_degree <= 5:
            raise ValueError(f"head_degree = {self.head_degree}; expected one of 0 to 5.")
        check_counts(**{f"channels[{i}]": width for i, width in enumerate(self.channels)})
        halved = 2 ** len(self.channels)
        if not self.channels or self.resolution % halved:
            raise ValueError(
                f"resolution = {self.resolution} and {len(self.channels)} channels; expected at least one stage, and a "
                f"resolution that can be halved once for each: a multiple of {halved}."
            )
        names = self.property_names
        if not names or len(set(names)) < len(names):
            raise ValueError(f"property_names = {names}; expected at least one, and none of them twice.")
        for name in ("property_scale", *STATISTICS):
            if len(given := getattr(self, name)) != len(names):
                raise ValueError(f"{name} has {len(given)} entries for {len(names)} properties; expected one for each.")
            if name in STATISTICS and not all(map(math.isfinite, given)):
                raise ValueError(f"{name} = {given}; expected finite numbers.")
        if any(std <= 0 for std in self.property_std):
            raise ValueError(
                f"property_std = {self.property_std}; expected numbers above 0: leave out what is constant."
            )
        for name in (*WEIGHTS, "latent_noise"):
            if not 0 <= (weight := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} = {weight}; expected a finite number, zero or more.")
        Isotropic(self.youngs_modulus, self.poissons_ratio)  # says what is wrong with them
        for name in MATERIALS:
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} = {value}; expected a finite number above 0.")
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme = {self.scheme!r}; expected one of {', '.join(SCHEMES)}.")
        if len(self.head_hidden) != 2:
            raise ValueError(f"head_hidden = {self.head_hidden}; expected the widths of two layers.")
        check_counts(**{f"head_hidden[{i}]": width for i, width in enumerate(self.head_hidden)})
        latent = {"latent_dim": self.latent_dim}
        check_weights(**latent, channels=self.channels[-1], voxels=self.coarse_resolution**self.spatial_dims)
        check_weights(**latent, head_rank=self.head_rank, num_basis=self.head_num_cells + self.head_degree)
        check_weights(**latent, num_codes=self.num_codes)
        check_weights(**latent, head_hidden=max(self.head_hidden))
        check_weights(wider=max(self.channels), narrower=max(self.channels), neighbours=6**self.spatial_dims)
        check_weights(voxels=self.resolution**self.spatial_dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a cell's array."""
        return (self.resolution,) * self.spatial_dims

    @property
    def coarse_resolution(self) -> int:
        """Voxels along an edge after all halvings."""
        return self.resolution // 2 ** len(self.channels)

    @property
    def num_properties(self) -> int:
        """Outputs of the head."""
        return len(self.property_names)

    @property
    def physics(self) -> Physics:
        """What the homogenisation needs to know of the materials and the cells."""
        return Physics(**{name: getattr(self, name) for name in PHYSICS}, symmetry=self.symmetry)

    def num_head_parameters(self) -> int:
        """Of the separable head of these sizes: splines, gain and shift of each coordinate, and the read-out."""
        num_basis, outputs = self.head_num_cells + self.head_degree, self.num_properties
        return self.latent_dim * (num_basis * self.head_rank + 2) + outputs * (self.head_rank + 1)

    def _matching_widths(self) -> list[int]:
        """Widths, as equal as can be, of the MLP whose number of parameters comes nearest to the separable head's."""
        target, inputs, outputs = self.num_head_parameters(), self.latent_dim, self.num_properties

        def count(first: int, second: int) -> int:
            return (inputs + 1) * first + (first + 1) * second + (second + 1) * outputs

        half = (inputs + outputs + 2) / 2
        width = max(1, round(math.sqrt(half * half + max(0, target - outputs)) - half))
        nearby = range(max(1, width - 4), width + 5)
        pairs = [(first, second) for first in nearby for second in nearby]
        first, second = min(pairs, key=lambda pair: (abs(count(*pair) - target), abs(pair[0] - pair[1])))
        return [first, second]


__all__ = ["SnaJanusConfig"]
