"""Components of a few samples in numpy: on a CPU a PyTorch operation on a handful of numbers costs more than its work.

An agent acts on one observation at a time, so the time of its step is the number of operations, each of which numpy
starts several times faster.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from sna_core.bspline import CELL_POLYNOMIALS
from sna_core.latent import EPSILON, LatentBlock, LatentComponents
from sna_core.squashed_product import is_traced

FEW = 8
"""Samples up to which numpy is ahead."""


def act_components(components: LatentComponents, x: Tensor, network: int | None = None) -> Tensor:
    """Evaluates ``components(x, network)``, without a gradient where there are few samples on a CPU.

    Args:
        components: Of actors and critics.
        x: (samples, inputs).
        network: One of them, or None for all.

    Returns:
        (networks, samples, rank).
    """
    if is_traced():  # numpy's results would be constants of the graph
        return components(x, network)
    if len(x) > FEW or torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
        return components(x, network)
    g = x.detach().numpy().T
    for block in components.blocks:
        assert isinstance(block, LatentBlock)
        g = _block(block, g, network)
    return torch.from_numpy(g).mT


def _block(block: LatentBlock, x: np.ndarray, network: int | None) -> np.ndarray:
    """(inputs, samples) or (networks, inputs, samples) -> (networks, rank, samples)."""
    num_networks, rows = block.num_networks, slice(None)
    if network is not None:
        latent_dim, num_networks = len(block.factors) // num_networks, 1
        rows = slice(network * latent_dim, (network + 1) * latent_dim)

    def chosen(parameter: torch.Tensor) -> np.ndarray:
        return parameter.detach().numpy()[rows]

    weight, bias, factors = chosen(block.weight), chosen(block.bias), chosen(block.factors)
    if x.ndim == 3:  # the components of the block before
        weight = weight.reshape(num_networks, -1, weight.shape[1])
    h = (weight @ x).reshape(len(factors), -1)
    if block.gain is not None:
        h = h.reshape(num_networks, -1, h.shape[1])
        h = h - h.mean(1, keepdims=True)
        h = (h / np.sqrt((h * h).mean(1, keepdims=True) + EPSILON)).reshape(len(factors), -1) * chosen(block.gain)
    with np.errstate(over="ignore"):  # exp(-h) = inf is the right limit
        position = block.spline.num_cells / (1 + np.exp(-(h + bias)))
    if block.log_scale is not None:
        middle = 0.5 * block.spline.num_cells
        position = (position - middle) * np.exp(chosen(block.log_scale)) + middle
    with np.errstate(invalid="ignore"):  # NaN falls in any cell
        cell = position.astype(np.int64).clip(0, block.spline.num_cells - 1)
    u = (position - cell)[..., None].astype(np.float32)
    polynomials, steps = _cell(block.spline.degree)
    values = polynomials[-1] + 0 * u  # (rows, samples, degree + 1)
    for row in polynomials[-2::-1]:
        values = values * u + row
    near = factors[np.arange(len(factors))[:, None, None], cell[..., None] + steps]  # (..., degree + 1, rank)
    psi = values[..., None, :] @ near
    return psi.reshape(num_networks, -1, *psi.shape[1::2]).prod(1).swapaxes(1, 2)


@cache
def _cell(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of 1, u, u^2 ... of a cell's functions, and the steps to their indices."""
    return np.array(CELL_POLYNOMIALS[degree, 0], np.float32), np.arange(degree + 1)
