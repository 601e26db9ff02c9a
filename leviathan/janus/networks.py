"""The parts of Janus: convolutional encoder and decoder, and the head that reads properties off the latent."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from leviathan.janus.configuration import SnaJanusConfig
from sna_core.bspline import UniformBSpline
from sna_core.squashed_product import squashed_product

CHANNELS_TOGETHER = 8  # in a normalisation


class ConvolutionStage(nn.Sequential):
    """A convolution that halves or doubles the resolution, normalisation and SiLU.

    To double it, the convolution gives the voxels of a coarse one as channels. All see the same neighbourhood, and
    start from the same weights, so that there is nothing to print a checkerboard.
    """

    def __init__(self, inputs: int, outputs: int, dims: int, *, doubles: bool, last: bool = False):
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        copies = 2**dims if doubles else 1
        layers: list[nn.Module] = [convolution(inputs, outputs * copies, 3, stride=1 if doubles else 2, padding=1)]
        # Transformers hands modules with parameters of their own to _init_weights.
        layers[0].num_copies = copies  # type: ignore[assignment]  # torch declares no attributes but its own
        if doubles:
            layers.append(ChannelsToVoxels())
        if not last:
            groups = 1 if outputs % CHANNELS_TOGETHER else outputs // CHANNELS_TOGETHER
            layers += [nn.GroupNorm(groups, outputs), nn.SiLU()]
        super().__init__(*layers)


class ChannelsToVoxels(nn.Module):
    """(cells, 2^dims c, m, ...) -> (cells, c, 2 m, ...), as torch.nn.PixelShuffle in two dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        """Moves them."""
        edges = x.shape[2:]
        dims = len(edges)
        x = x.unflatten(1, (-1, *[2] * dims))
        axes = [axis for i in range(dims) for axis in (2 + dims + i, 2 + i)]
        return x.permute(0, 1, *axes).reshape(len(x), x.shape[1], *[2 * edge for edge in edges])


class Encoder(nn.Module):
    """Stages that halve the resolution, and a dense layer: (cells, m, ...) -> (cells, latent_dim)."""

    def __init__(self, config: SnaJanusConfig):
        super().__init__()
        widths = [1, *config.channels]
        self.stages = nn.Sequential(
            *(ConvolutionStage(*widths, config.spatial_dims, doubles=False) for widths in pairwise(widths))
        )
        self.readout = nn.Linear(config.channels[-1] * config.coarse_resolution**config.spatial_dims, config.latent_dim)

    def forward(self, cells: Tensor) -> Tensor:
        """The codes."""
        return self.readout(self.stages(2 * cells.unsqueeze(1) - 1).flatten(1))


class Decoder(nn.Module):
    """A dense layer, and stages that double the resolution: (cells, latent_dim) -> (cells, m, ...)."""

    def __init__(self, config: SnaJanusConfig):
        super().__init__()
        dims, widths = config.spatial_dims, [*reversed(config.channels), 1]
        self.coarse_shape = (widths[0], *[config.coarse_resolution] * dims)
        self.start = nn.Linear(config.latent_dim, widths[0] * config.coarse_resolution**dims)
        self.stages = nn.Sequential(
            *(ConvolutionStage(a, b, dims, doubles=True) for a, b in pairwise(widths[:-1])),
            ConvolutionStage(widths[-2], widths[-1], dims, doubles=True, last=True),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """The log-odds."""
        return self.stages(F.silu(self.start(latents)).unflatten(1, self.coarse_shape)).squeeze(1)


class SeparableHead(nn.Module):
    r"""A CP network of splines of the squashed latent, whose components all outputs share.

    .. math::
        y_p = v_p + \sum_{j=1}^{r} V_{pj} \prod_{i=1}^{d} \psi_{ij}\big(\sigma(a_i z_i + b_i)\big)

    with the logistic function :math:`\sigma` and B-splines :math:`\psi` on uniform cells of [0, 1]. No dense layer is
    before it: the encoder has to find coordinates in which the properties are separable. Factors start as one
    plus a straight line of random slope and variance 1/d, so that a product of many has a variance of order one.
    """

    def __init__(self, config: SnaJanusConfig):
        super().__init__()
        self.spline = UniformBSpline(config.head_num_cells, config.head_degree)
        d = config.latent_dim
        self.gain = nn.Parameter(torch.empty(d, 1))
        self.shift = nn.Parameter(torch.empty(d, 1))
        self.factors = nn.Parameter(torch.empty(d, self.spline.num_basis, config.head_rank))
        self.readout = nn.Linear(config.head_rank, config.num_properties)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all but the read-out anew."""
        init.ones_(self.gain)
        init.zeros_(self.shift)
        slope = torch.empty_like(self.factors[:, :1]).normal_(0.0, (12 / len(self.factors)) ** 0.5)
        line = self.spline.greville().to(self.factors).unsqueeze(-1) - 0.5  # of variance 1/12 on [0, 1]
        init.copy_(self.factors, 1 + slope * line)

    def forward(self, latents: Tensor, fused: bool = True) -> Tensor:
        """(cells, latent_dim) -> (cells, properties)."""
        h = self.gain * latents.mT + self.shift
        components = squashed_product(h, None, None, self.factors, 1, self.spline.num_cells, fused=fused)
        return self.readout(components[0].mT)


class DenseHead(nn.Sequential):
    """A multilayer perceptron with GELU, to compare with."""

    def __init__(self, config: SnaJanusConfig):
        widths = [config.latent_dim, *config.head_hidden]
        layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.GELU())]
        super().__init__(*layers, nn.Linear(widths[-1], config.num_properties))

    def forward(self, latents: Tensor, fused: bool = True) -> Tensor:
        """(cells, latent_dim) -> (cells, properties); ``fused`` makes no difference."""
        return super().forward(latents)


HEADS = {"separable": SeparableHead, "mlp": DenseHead}
