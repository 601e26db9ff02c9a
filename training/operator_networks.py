"""The networks of operators on square fields: FNO, U-Net and DeepONet, from libraries where these are well kept.

All map (batch, channels, side, side) to the same side. The libraries are imported when a network is built.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

NUM_RESOLUTIONS = 3  # of a U-Net
NUM_GROUPS = 2  # of its normalisation: channels come in multiples of it
DOMAIN_PADDING = 0.25  # of the side, at either end, where a field is not periodic
MISSING = "{name} needs {package}; pip install 'leviathan-sna[operators]'"


def build_fno(side: int, width: int, num_layers: int, num_modes: int, periodic: bool) -> nn.Module:
    """The Fourier neural operator of neuraloperator, one channel to one (Li et al., 2021, arXiv 2010.08895).

    A periodic field has no place that differs from others, so it gets no coordinates, and the operator commutes with
    shifts. Any other gets coordinates and, before its Fourier layers, a rim of zeros.

    Args:
        side: Pixels along an axis.
        width: Channels.
        num_layers: Fourier layers.
        num_modes: Positive wavenumbers that they keep along an axis, of the padded field.
        periodic: Whether the field is periodic.

    Raises:
        ImportError: Without neuraloperator.
    """
    try:
        from neuralop.models import FNO
    except ImportError as error:
        raise ImportError(MISSING.format(name="an FNO", package="neuraloperator")) from error

    class PlainFNO(FNO):
        # Theirs adds an entry to the state that is no tensor, which no safe format can hold.
        state_dict = nn.Module.state_dict

    return PlainFNO(
        n_modes=(2 * num_modes, 2 * num_modes),  # theirs counts negative wavenumbers too
        in_channels=1,
        out_channels=1,
        hidden_channels=width,
        n_layers=num_layers,
        positional_embedding=None if periodic else "grid",
        domain_padding=None if periodic else DOMAIN_PADDING,
    )


def build_unet(
    channels: int, width: int, bottom_width: int, num_layers: int, periodic: bool, time_width: int
) -> nn.Module:
    """The U-Net of diffusers: residual blocks, group normalisation, no attention (Ronneberger et al., 2015).

    Its resolutions have ``width``, 2 ``width`` and ``bottom_width`` channels.

    Args:
        channels: Of input and output.
        width: Channels at full resolution.
        bottom_width: Channels at the lowest resolution.
        num_layers: Residual blocks a resolution.
        periodic: Whether convolutions wrap around.
        time_width: Units in which the time of a diffusion is embedded.

    Raises:
        ImportError: Without diffusers.
    """
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError(MISSING.format(name="a U-Net", package="diffusers")) from error
    network = UNet2DModel(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownBlock2D",) * NUM_RESOLUTIONS,
        up_block_types=("UpBlock2D",) * NUM_RESOLUTIONS,
        block_out_channels=(width, 2 * width, bottom_width),
        layers_per_block=num_layers,
        norm_num_groups=NUM_GROUPS,
        add_attention=False,
        time_embedding_dim=time_width,
    )
    if periodic:
        wrap_around(network)
    return network


def wrap_around(network: nn.Module) -> None:
    """Lets the convolutions of a network take what lies beyond an edge from the opposite one."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


class DeepONet(nn.Module):
    r"""A deep operator network: :math:`v(x) = \sum_k b_k(u)\, t_k(x) + c`, ``width`` terms.

    The branch b reads the field u by strided convolutions and a perceptron, the trunk t the place x by a perceptron on
    Fourier features. Lu et al., Nature Machine Intelligence 3, 2021.

    Shapes: (batch, 1, side, side) -> (batch, 1, side, side).

    Args:
        side: Pixels along an axis.
        width: Units of the perceptrons, and terms of the sum.
        num_layers: Hidden layers of each.
        periodic: Whether the field is periodic; features of one that is not have twice its length.
    """

    def __init__(self, side: int, width: int, num_layers: int, periodic: bool):
        super().__init__()
        self.side, self.length = side, 1.0 if periodic else 2.0
        self.num_wavenumbers = max(1, side // 2)
        channels, rest, layers = 1, side, []
        while rest > 4:
            wider = max(4, width // 8) if channels == 1 else 2 * channels
            layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1), nn.GELU()]
            channels, rest = wider, math.ceil(rest / 2)
        hidden = [width] * num_layers
        self.branch = nn.Sequential(*layers, nn.Flatten(), *_perceptron([channels * rest**2, *hidden], width))
        self.trunk = nn.Sequential(*_perceptron([4 * self.num_wavenumbers, *hidden], width))
        self.bias = nn.Parameter(torch.zeros(()))
        if periodic:
            wrap_around(self.branch)

    def places(self) -> Tensor:
        """Fourier features of the pixels: (side^2, features)."""
        device = self.bias.device
        place = torch.arange(self.side, device=device) / self.side
        wavenumber = torch.arange(1, self.num_wavenumbers + 1, device=device)
        phase = 2 * torch.pi / self.length * wavenumber * place[:, None]
        axis = torch.cat([phase.sin(), phase.cos()], dim=-1)  # (side, 2 wavenumbers)
        shape = (self.side, self.side, -1)
        return torch.cat([axis[:, None].expand(shape), axis[None].expand(shape)], dim=-1).flatten(0, 1)

    def forward(self, fields: Tensor) -> Tensor:
        """The sum over the terms, at every pixel."""
        terms = self.branch(fields)  # (batch, width)
        basis = self.trunk(self.places())  # (side^2, width)
        values = terms @ basis.T + self.bias
        return values.view(-1, 1, self.side, self.side)


def _perceptron(sizes: Sequence[int], num_outputs: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.GELU()]
    return [*layers, nn.Linear(sizes[-1], num_outputs)]
