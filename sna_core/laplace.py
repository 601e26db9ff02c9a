r"""Uncertainty of a CP network that was fitted by least squares: Laplace's approximation, linear in all factors.

With J the derivative of f in the factors at the data, H that of the norm of :mod:`sna_core.als` and :math:`\sigma` the
noise, the factors have the covariance :math:`\sigma^2 (J^T W J + W \lambda H)^{-1}`, up to the sizes that a component's
factors pass on to each other, on which f does not depend. So f(x) has the standard deviation
:math:`\sigma |j(x) F|` with F F^T that inverse, and a new observation :math:`\sigma \sqrt{1 + |j(x) F|^2}`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sna_core.als import MAX_MEMORY
from sna_core.banded import factorise
from sna_core.network import CPNetwork
from sna_core.normal_equations import (
    Points,
    size_directions,
    smoothness_matrix,
    tangent,
    tangent_equations,
    tangent_penalty,
)


@torch.no_grad()
def laplace_factor(
    network: CPNetwork,
    x: Tensor,
    ridge: Tensor,
    smoothness: float,
    *,
    sample_weight: Tensor | None = None,
    max_memory: int = MAX_MEMORY,
) -> Tensor:
    """The factor F of the covariance of each output's factors: (num_outputs, size, size), size = inputs * basis * rank.

    Args:
        network: As :func:`sna_core.als.fit` left it.
        x: The points (points, num_inputs) it was fitted to.
        ridge: The ridge of each output (num_outputs,).
        smoothness: That of the fit.
        sample_weight: Those of the fit.
        max_memory: Bytes to work in, beside the result.
    """
    factors = network.factors.detach().double().cpu()
    points = Points(network.splines, x, x.new_zeros(len(x), network.num_outputs), sample_weight, max_memory)
    gram, _ = tangent_equations(points, factors)
    penalty = tangent_penalty(factors, smoothness_matrix(network.splines[0], smoothness))
    precision = gram + points.weight_sum * ridge.double().cpu()[:, None, None] * penalty
    # Along the sizes the precision is zero: filled in to invert it, and taken out of the result.
    sizes = size_directions(factors)
    mean = precision.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)  # of a function that is zero
    precision = precision + mean.unsqueeze(-1) * (sizes @ sizes.mT)
    diagonal = precision.diagonal(dim1=1, dim2=2)
    diagonal += 1e-13 * mean
    lower = factorise(precision)
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype).expand_as(lower)
    factor = torch.linalg.solve_triangular(lower.mT, identity, upper=True)
    return factor - sizes @ (sizes.mT @ factor)


@torch.no_grad()
def relative_std(network: CPNetwork, factor: Tensor, x: Tensor, max_memory: int = MAX_MEMORY) -> Tensor:
    """The standard deviation of f over that of the noise, |j(x) F|: (points, num_outputs)."""
    factors, factor = network.factors.detach().double().cpu(), factor.double().cpu()
    points = Points(network.splines, x, x.new_zeros(len(x), network.num_outputs), None, max_memory)
    chunks = points.chunks(4 * factors.numel())
    return torch.cat([(tangent(chunk, factors) @ factor).norm(dim=-1).mT for chunk in chunks])
