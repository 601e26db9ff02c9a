"""Janus: an autoencoder of microstructures, and a separable head that predicts their properties from the latent.

arXiv 2603.12244, "Generative inversion of multiscale metamaterials", and 2512.15746.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from leviathan.janus.cells import FREE, symmetrise, voxel_orbits
from leviathan.janus.configuration import SnaJanusConfig
from leviathan.janus.inversion import Design, invert
from leviathan.janus.networks import HEADS, Decoder, Encoder, SeparableHead

CELLS_AT_ONCE = 256  # where there is no graph
CYCLE_FRACTION = 0.25  # of a batch in training: a cell costs as much in a cycle as in all else


@dataclass
class SnaJanusOutput(ModelOutput):
    """What [`SnaJanusModel`] returns; losses where labels were given.

    Args:
        loss: Weighted sum of the others, and of the mean square of the latents.
        reconstruction_loss: Binary cross-entropy of a voxel, in nats.
        property_loss: Mean squared error of standardised properties; of classes the cross-entropy.
        cycle_loss: As [`SnaJanusModel.cycle_loss`] says; None if its weight is zero.
        jacobian_loss: Squared gradient of a standardised property in the latent, on average over cells and properties;
            None if its weight is zero.
        logits: Log-odds of each voxel being solid, (cells, m, ...).
        prediction: Of [`SnaJanusModel.predict`], (cells, properties).
        latents: (cells, latent_dim); in training noise is added for all of the above.
    """

    loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    property_loss: Tensor | None = None
    cycle_loss: Tensor | None = None
    jacobian_loss: Tensor | None = None
    logits: Tensor | None = None
    prediction: Tensor | None = None
    latents: Tensor | None = None


@dataclass(frozen=True)
class CycleError:
    """How far a cell's code and its predictions are from those of the cell that is decoded from the code.

    Attributes:
        latents: Root of the sum of squared differences over that of the codes' squared deviations from their mean.
        properties: Mean absolute difference of each property over its range in training; of each class, of its
            probability.
    """

    latents: float
    properties: dict[str, float]


class SnaJanusModel(PreTrainedModel):
    """Janus: encoder, decoder and head, trained together, and what the inversion needs to know of the training cells.

    Buffers, saved with the model:
        ``latent_mean`` (latent_dim,) and ``latent_precision`` (latent_dim, latent_dim): the normal distribution of the
        training cells' codes, standard until :meth:`remember`.
        ``codes`` (num_codes, latent_dim), of which the first ``code_count`` are codes of training cells.
        ``boundary`` (m, ...): 0 where every cell is void, 1 where every one is solid, 2 where they differ.
    """

    config: SnaJanusConfig
    base_model_prefix = "janus"
    main_input_name = "cells"
    _no_split_modules = ["ConvolutionStage", "SeparableHead"]
    latent_mean: Tensor
    latent_precision: Tensor
    codes: Tensor
    code_count: Tensor
    boundary: Tensor
    first_of_orbit: Tensor

    def __init__(self, config: SnaJanusConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.head = HEADS[config.head](config)
        for name, value in initial_buffers(config).items():
            self.register_buffer(name, value, persistent=name != "first_of_orbit")
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d | SeparableHead):
            module.reset_parameters()
            for parameter in module.parameters() if hasattr(module, "num_copies") else ():
                copies = parameter.unflatten(0, (-1, module.num_copies))
                init.copy_(parameter, copies[:, :1].expand_as(copies).flatten(0, 1))
        elif module is self:
            with torch.device("cpu"):  # a model may be built on another device before it has values
                for name, value in initial_buffers(self.config).items():
                    init.copy_(getattr(self, name), value)
        else:
            super()._init_weights(module)

    def num_head_parameters(self) -> int:
        """Of the head alone."""
        return sum(parameter.numel() for parameter in self.head.parameters())

    def encode(self, cells: Tensor) -> Tensor:
        """Codes of cells, (cells, m, ...) -> (cells, latent_dim). Grey voxels, from 0 to 1, are allowed."""
        return self.encoder(cells.to(self.dtype))

    def decode(self, latents: Tensor) -> Tensor:
        """Log-odds of voxels being solid, (cells, latent_dim) -> (cells, m, ...).

        With "cubic" they are the same, bit for bit, for all voxels that permutations of the axes exchange.
        """
        logits = symmetrise(self.decoder(latents), self.config.symmetry)
        # CODEPATH: means over an orbit differ by rounding, as their terms are added in another order.
        if self.config.symmetry == "cubic":
            logits = logits.flatten(1)[:, self.first_of_orbit].view_as(logits)
        return logits

    def predict(self, latents: Tensor, scaled: bool = False, fused: bool = True) -> Tensor:
        """Predicts properties from codes, (cells, latent_dim) -> (cells, properties).

        Args:
            latents: The codes.
            scaled: Standardised properties, or logits of classes, instead of properties in physical units, or
                probabilities.
            fused: Whether the separable head is one node of the graph, to be differentiated once; set it to False for
                second derivatives and torch.func.
        """
        config, values = self.config, self.head(latents, fused=fused)
        if scaled:
            return values
        # CODEPATH: classes have probabilities.
        if config.property_kind == "classification":
            return values.softmax(-1)
        values = values * values.new_tensor(config.property_std) + values.new_tensor(config.property_mean)
        return torch.where(self._is_log(), values.exp(), values)

    def standardise(self, properties: Tensor) -> Tensor:
        """Properties in physical units (..., properties) in the head's, the inverse of what :meth:`predict` does.

        Raises:
            ValueError: If there is not one for each of the model's, one is not finite, or one with a logarithmic scale
                is not positive.
        """
        names = self.config.property_names
        if properties.shape[-1:] != (len(names),):
            raise ValueError(f"properties have shape {tuple(properties.shape)}; expected (..., {len(names)}): {names}.")
        is_log, values = self._is_log(), properties.to(self.latent_mean)
        bad = ~values.isfinite() | (is_log & (values <= 0))
        if bad.any():
            index = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{names[index[-1]]} is {values[tuple(index)]:g} in row {index[:-1]}; expected a finite number"
                f"{', above 0 for its logarithm' if is_log[index[-1]] else ''}. Drop the cell."
            )
        values = torch.where(is_log, values.where(is_log, 1.0).log(), values)
        mean, std = (values.new_tensor(each) for each in (self.config.property_mean, self.config.property_std))
        return (values - mean) / std

    def _is_log(self) -> Tensor:
        return torch.tensor([scale == "log" for scale in self.config.property_scale], device=self.device)

    @can_return_tuple
    def forward(self, cells: Tensor, labels: Tensor | None = None) -> SnaJanusOutput:
        """Encodes, decodes and predicts, and computes the losses where labels are given.

        Args:
            cells: (cells, m, ...), voxels from 0 (void) to 1 (solid).
            labels: Properties in physical units, (cells, properties); of classes their numbers, (cells,).

        Raises:
            ValueError: If a shape does not fit, a voxel is not from 0 to 1, or a label is none.
        """
        config = self.config
        self._check_cells(cells)
        cells = cells.to(self.dtype)
        latents = self.encode(cells)
        noisy = latents
        if self.training and config.latent_noise and len(cells) > 1:
            noisy = latents + config.latent_noise * latents.detach().std(0) * torch.randn_like(latents)
        logits, prediction = self.decode(noisy), self.predict(noisy)
        if labels is None:
            return SnaJanusOutput(logits=logits, prediction=prediction, latents=latents)
        reconstruction = F.binary_cross_entropy_with_logits(logits, cells)
        error = self._property_loss(noisy, labels)
        loss = config.reconstruction_weight * reconstruction + config.property_weight * error
        loss = loss + config.latent_weight * latents.square().mean()
        cycle = jacobian = None
        if config.cycle_weight:
            cycle = self.cycle_loss(noisy, logits)
            loss = loss + config.cycle_weight * cycle
        if config.jacobian_weight:
            jacobian = self._jacobian_loss(noisy)
            loss = loss + config.jacobian_weight * jacobian
        return SnaJanusOutput(loss, reconstruction, error, cycle, jacobian, logits, prediction, latents)

    def _check_cells(self, cells: Tensor) -> None:
        if cells.shape[1:] != self.config.shape:
            expected = ", ".join(map(str, ("cells", *self.config.shape)))
            raise ValueError(f"cells have shape {tuple(cells.shape)}; expected ({expected}).")
        if not torch.compiler.is_compiling() and not ((cells >= 0) & (cells <= 1)).all():
            raise ValueError("a voxel is NaN, below 0 or above 1; expected 0 for void to 1 for solid.")

    def _property_loss(self, latents: Tensor, labels: Tensor) -> Tensor:
        num_cells, num_properties = len(latents), self.config.num_properties
        scaled = self.predict(latents, scaled=True)
        # CODEPATH: labels of a classification are numbers of classes.
        if self.config.property_kind == "regression":
            if labels.shape != scaled.shape:
                raise ValueError(f"labels have shape {tuple(labels.shape)}; expected {tuple(scaled.shape)}.")
            return F.mse_loss(scaled, self.standardise(labels))
        if labels.shape != (num_cells,) or labels.is_floating_point():
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and are {labels.dtype}; expected the number of each class, "
                f"({num_cells},)."
            )
        if not ((labels >= 0) & (labels < num_properties)).all():
            raise ValueError(f"a label is no class; expected integers from 0 to {num_properties - 1}.")
        return F.cross_entropy(scaled, labels.long())

    def cycle_loss(self, latents: Tensor, logits: Tensor) -> Tensor:
        r"""How far codes are from consistency: after z has been decoded, z' is encoded from the result.

        .. math::
            \frac{\sum \|z' - z\|^2}{\sum \|z\|^2} + \frac{1}{P} \operatorname{mean} \|y(z') - y(z)\|^2

        with standardised properties y (logits of classes) and sums over the cells. The z of the first term is held, so
        that codes do not shrink.

        In evaluation, cells are decoded to two phases, or to the grey of the voxels' probabilities where they have
        more. In training z are points between the codes of two cells, where a search will pass though no cell is there,
        for a part of the batch; and one cell in two stays grey, while rounding passes the gradient on.

        Args:
            latents: z, (cells, latent_dim).
            logits: What they are decoded to.
        """
        if self.training:
            count = max(1, round(CYCLE_FRACTION * len(latents)))
            place = torch.rand(count, 1, dtype=latents.dtype, device=latents.device)
            latents = torch.lerp(latents[:count], latents.roll(1, 0)[:count], place)
            logits = self.decode(latents)
        cells = logits.sigmoid()
        # CODEPATH: grey cells are never rounded.
        if self.config.two_phases:
            rounded = cells + ((logits > 0).to(cells) - cells).detach()
            is_grey = torch.rand(len(cells), device=cells.device) < (0.5 if self.training else 0.0)
            cells = torch.where(is_grey.view(-1, *[1] * self.config.spatial_dims), cells, rounded)
        again, held = self.encode(cells), latents.detach()
        of_latents = (again - held).square().sum() / held.square().sum().clamp_min(torch.finfo(held.dtype).tiny)
        return of_latents + F.mse_loss(self.predict(again, scaled=True), self.predict(latents, scaled=True))

    @torch.enable_grad()
    def _jacobian_loss(self, latents: Tensor) -> Tensor:
        """Holds the codes: the head shall be smooth there, and the encoder not flee to where it is."""
        point = latents.detach().requires_grad_()
        scaled = self.predict(point, scaled=True, fused=False)
        rows = [torch.autograd.grad(column.sum(), point, create_graph=True)[0] for column in scaled.unbind(-1)]
        return torch.stack(rows).square().sum(-1).mean()

    @torch.no_grad()
    def cycle_error(self, cells: Tensor) -> CycleError:
        """Encodes, decodes to two phases, and encodes once more.

        Raises:
            ValueError: As :meth:`forward`, or if the model knows no ranges of its properties yet.
        """
        self._check_cells(cells)
        config = self.config
        extent = torch.ones(config.num_properties, device=self.device)
        # CODEPATH: probabilities need no range.
        if config.property_kind == "regression":
            extent = extent.new_tensor(config.property_high) - extent.new_tensor(config.property_low)
            if not (extent > 0).all():
                raise ValueError("property_low and property_high of the config are equal; set the ranges in training.")
        parts = []
        for part in cells.split(CELLS_AT_ONCE):
            latents = self.encode(part)
            logits = self.decode(latents)
            # CODEPATH: grey cells are never rounded.
            decoded = (logits > 0) if config.two_phases else logits.sigmoid()
            parts.append((latents, self.encode(decoded)))
        first, second = (torch.cat(codes) for codes in zip(*parts, strict=True))
        change = (self.predict(second) - self.predict(first)).abs().mean(0) / extent
        return CycleError(
            latents=((second - first).norm() / (first - first.mean(0)).norm()).item(),
            properties=dict(zip(config.property_names, change.tolist(), strict=True)),
        )

    @torch.no_grad()
    def remember(self, codes: Tensor) -> None:
        r"""Keeps the codes of training cells, and the normal distribution that the inversion takes for its prior.

        The covariance S of n codes is shrunk towards a multiple of the identity, by the part

        .. math::
            \min\Big(1, \frac{a + \mu^2}{(n + 1)(a - \mu^2 / d)}\Big), \qquad
            \mu = \operatorname{tr} S / d, \quad a = \operatorname{mean} S_{ij}^2

        (Chen, Wiesel, Eldar and Hero 2010, "oracle approximating shrinkage"). Of more than ``num_codes`` codes those
        that are kept lie at equal distances in the order given.

        Raises:
            ValueError: If there are fewer than two, they do not differ, one is not finite or a shape does not fit.
        """
        d, kept = self.config.latent_dim, self.config.num_codes
        if codes.ndim != 2 or codes.shape[1] != d or len(codes) < 2:
            raise ValueError(f"codes have shape {tuple(codes.shape)}; expected (cells, {d}), two cells at least.")
        if not codes.isfinite().all():
            raise ValueError("a code is not finite; drop the cell.")
        precise = codes.double()
        deviations = precise - precise.mean(0)
        covariance = deviations.mT @ deviations / len(codes)
        mean_variance, mean_square = covariance.trace() / d, covariance.square().mean()
        if mean_variance == 0:
            raise ValueError("all codes are equal; the model tells no cells apart.")
        spread = (len(codes) + 1) * (mean_square - mean_variance.square() / d)
        part = (mean_square + mean_variance.square()) / spread if spread > 0 else torch.ones_like(spread)
        covariance.mul_(1 - part.clamp(max=1)).diagonal().add_(part.clamp(max=1) * mean_variance)
        self.latent_mean.copy_(precise.mean(0))
        self.latent_precision.copy_(torch.cholesky_inverse(torch.linalg.cholesky(covariance)))
        count = min(len(codes), kept)
        self.codes.zero_()
        self.codes[:count] = codes[torch.linspace(0, len(codes) - 1, count).round().long()].to(self.codes)
        self.code_count.fill_(count)

    @torch.no_grad()
    def set_boundary(self, boundary: Tensor) -> None:
        """Keeps what all cells share: (m, ...), 0 for void, 1 for solid, 2 where they differ.

        Raises:
            ValueError: If the shape or a value is another, or it lacks the symmetry of the cells.
        """
        if boundary.shape != self.config.shape or not torch.isin(boundary, boundary.new_tensor([0, 1, FREE])).all():
            raise ValueError(
                f"boundary has shape {tuple(boundary.shape)}; expected {self.config.shape}, of 0, 1 and 2."
            )
        if not torch.equal(boundary.flatten()[self.first_of_orbit.to(boundary.device)], boundary.flatten()):
            raise ValueError("the boundary changes under permutations of the axes; expected one of cubic symmetry.")
        self.boundary.copy_(boundary)

    def invert(self, targets: Mapping[str, float | Sequence[float]], **options: Any) -> Design | list[Design]:
        """Finds cells with the properties asked for: [`leviathan.janus.inversion.invert`], whose options these are."""
        return invert(self, targets, **options)


def initial_buffers(config: SnaJanusConfig) -> dict[str, Tensor]:
    """The buffers of a model that knows no cells yet."""
    d = config.latent_dim
    return {
        "latent_mean": torch.zeros(d),
        "latent_precision": torch.eye(d),
        "codes": torch.zeros(config.num_codes, d),
        "code_count": torch.zeros((), dtype=torch.long),
        "boundary": torch.full(config.shape, FREE, dtype=torch.uint8),
        "first_of_orbit": first_of_orbit(config),
    }


def first_of_orbit(config: SnaJanusConfig) -> Tensor:
    """For each voxel the first one, in C order, of those that the symmetry exchanges with it: (m^dims,)."""
    with torch.device("cpu"):  # how many orbits there are is not known on the meta device
        orbit, size = voxel_orbits(config.resolution, config.spatial_dims, config.symmetry)
    return orbit.argsort(stable=True)[size.cumsum(0) - size][orbit].to(torch.empty(0).device)


__all__ = ["CycleError", "SnaJanusModel", "SnaJanusOutput"]
