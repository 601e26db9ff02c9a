"""Components of CP networks on learned latent coordinates: the body of SPAN."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sna_core.bspline import UniformBSpline
from sna_core.network import check_counts
from sna_core.squashed_product import squashed_product

Initialization = Literal["smooth", "rough"]
Normalization = Literal["layer"]
EPSILON = 1e-5  # of the variance in the normalisation, as torch.nn.LayerNorm


class LatentBlock(nn.Module):
    r"""A dense layer, the logistic function, and the components of a CP network; several networks side by side.

    .. math::
        g_j(x) = \prod_{i=1}^{d} \psi_{ij}(z_i), \qquad z = \sigma(W x + v)

    With normalisation :math:`z = \sigma(a \odot \mathrm{LN}(W x) + v)`: the latent coordinates of a sample have mean 0
    and variance 1 before the gain a.

    Parameters, whose rows are the coordinates of all networks:
        ``weight`` W (rows, num_inputs), ``bias`` v (rows, 1), ``factors`` (rows, num_basis, rank), ``gain`` a (rows, 1)
        with normalisation, ``log_scale`` (rows, 1) with knot scales, which are its exponentials.

    At the start :math:`W \sim N(0, 1/n)` for n inputs, v = 0, and :math:`\psi` is one plus a straight line of random
    slope (``"smooth"``) or has coefficients :math:`N(1, 1/d)` (``"rough"``, as the authors' code, which takes
    :math:`N(1, 0.01)`).

    Args:
        num_inputs: n.
        latent_dim: d.
        rank: Number of components.
        num_cells: Cells of [0, 1].
        degree: Of the B-splines, 0 to 5.
        num_networks: Networks, which share nothing but x.
        normalization: ``"layer"`` or None.
        learn_knot_scale: Whether the knots of each coordinate move apart and together about the middle.
        initialization: Of the factors.

    Raises:
        ValueError: If a count is below 1, the degree is none of 0 to 5, or a name is unknown.
    """

    gain: nn.Parameter | None
    log_scale: nn.Parameter | None

    def __init__(
        self,
        num_inputs: int,
        latent_dim: int,
        rank: int,
        num_cells: int,
        degree: int = 2,
        *,
        num_networks: int = 1,
        normalization: Normalization | None = None,
        learn_knot_scale: bool = False,
        initialization: Initialization = "smooth",
    ):
        super().__init__()
        check_counts(num_inputs=num_inputs, latent_dim=latent_dim, rank=rank, num_networks=num_networks)
        for name, value, known in (
            ("normalization", normalization, (None, *get_args(Normalization))),
            ("initialization", initialization, get_args(Initialization)),
        ):
            if value not in known:
                raise ValueError(f"{name} = {value!r}; expected one of {', '.join(map(repr, known))}.")
        self.spline = UniformBSpline(num_cells, degree)
        self.initialization = initialization
        self.num_networks, rows = num_networks, num_networks * latent_dim
        self.weight = nn.Parameter(torch.empty(rows, num_inputs))
        self.bias = nn.Parameter(torch.empty(rows, 1))
        self.factors = nn.Parameter(torch.empty(rows, self.spline.num_basis, rank))
        self.register_parameter("gain", nn.Parameter(torch.empty(rows, 1)) if normalization else None)
        self.register_parameter("log_scale", nn.Parameter(torch.empty(rows, 1)) if learn_knot_scale else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the parameters anew, as the class says."""
        self.weight.normal_(0.0, self.weight.shape[-1] ** -0.5)
        self.bias.zero_()
        latent_dim = len(self.factors) // self.num_networks
        if self.initialization == "rough":
            self.factors.normal_(1.0, latent_dim**-0.5)
        else:
            slope = torch.empty_like(self.factors[:, :1]).normal_(0.0, (12 / latent_dim) ** 0.5)
            line = self.spline.greville().to(self.factors).unsqueeze(-1) - 0.5  # of variance 1/12 on [0, 1]
            self.factors.copy_(1 + slope * line)
        if self.gain is not None:
            self.gain.fill_(1.0)
        if self.log_scale is not None:
            self.log_scale.zero_()

    def forward(self, x: Tensor, network: int | None = None, *, fused: bool = True, frozen: bool = False) -> Tensor:
        """Evaluates the components of all networks, or of one.

        Args:
            x: (num_inputs, samples) for all networks, or (networks, num_inputs, samples).
            network: One of them.
            fused: As in :func:`~sna_core.squashed_product.squashed_product`.
            frozen: Leaves the parameters without a gradient.

        Returns:
            (networks, rank, samples).
        """
        num_networks, rows = self.num_networks, slice(None)
        if network is not None:
            latent_dim, num_networks = len(self.factors) // num_networks, 1
            rows = slice(network * latent_dim, (network + 1) * latent_dim)

        def chosen(parameter: Tensor) -> Tensor:
            parameter = parameter.detach() if frozen else parameter
            return parameter if network is None else parameter[rows]

        weight, bias, factors = chosen(self.weight), chosen(self.bias), chosen(self.factors)
        if self.gain is not None:
            x, weight, bias = self._normalized(x, weight, num_networks) * chosen(self.gain) + bias, None, None
        scale = None if self.log_scale is None else chosen(self.log_scale).exp()
        return squashed_product(x, weight, bias, factors, num_networks, self.spline.num_cells, scale, fused=fused)

    def _normalized(self, x: Tensor, weight: Tensor, num_networks: int) -> Tensor:
        """LN(W x), (rows, samples)."""
        h = weight.view(num_networks, -1, weight.shape[1]) @ x
        variance, mean = torch.var_mean(h, 1, correction=0, keepdim=True)
        return ((h - mean) * (variance + EPSILON).rsqrt()).flatten(0, 1)

    def extra_repr(self) -> str:
        """The settings."""
        rows, num_inputs = self.weight.shape
        return (
            f"num_inputs={num_inputs}, latent_dim={rows // self.num_networks}, rank={self.factors.shape[-1]}, "
            f"num_cells={self.spline.num_cells}, degree={self.spline.degree}, num_networks={self.num_networks}, "
            f"normalization={self.gain is not None}, learn_knot_scale={self.log_scale is not None}"
        )


class LatentComponents(nn.Module):
    """Blocks on top of one another: the components of one are the inputs of the next.

    Args:
        num_inputs: Number of inputs.
        num_blocks: Number of blocks.
        options: The other arguments of :class:`LatentBlock`, the same for all.

    Raises:
        ValueError: As :class:`LatentBlock`, or if there is no block.
    """

    def __init__(self, num_inputs: int, *, num_blocks: int = 1, rank: int, **options: Any):
        super().__init__()
        check_counts(num_blocks=num_blocks)
        widths = [num_inputs, *[rank] * (num_blocks - 1)]
        self.blocks = nn.ModuleList(LatentBlock(width, rank=rank, **options) for width in widths)

    def forward(self, x: Tensor, network: int | None = None, *, fused: bool = True, frozen: bool = False) -> Tensor:
        """The components of the last block: x (..., num_inputs) -> (networks, ..., rank).

        ``network`` asks for one network alone, whose dimension stays. ``fused=False`` can be differentiated more than
        once, ``frozen=True`` in x alone.
        """
        g = x.reshape(-1, x.shape[-1]).mT
        for block in self.blocks:
            g = block(g, network, fused=fused, frozen=frozen)
        return g.mT if x.ndim == 2 else g.mT.reshape(len(g), *x.shape[:-1], g.shape[1])
