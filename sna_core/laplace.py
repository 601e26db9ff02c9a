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
from sna_core.network import CPNetwork
from sna_core.normal_equations import (
    Points,
    flat,
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
    factors = network.factors.detach().double()
    points = Points(network.splines, x, x.new_zeros(len(x), network.num_outputs), sample_weight, max_memory)
    gram, _ = tangent_equations(points, factors)
    penalty = tangent_penalty(factors, smoothness_matrix(network.splines[0], smoothness))
    precision = gram + points.weight_sum * ridge.double()[:, None, None] * penalty
    # Along the sizes the precision is zero: filled in to invert it, and taken out of the result.
    sizes = _size_directions(factors)
    mean = precision.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    precision = precision + mean * (sizes @ sizes.mT)
    diagonal = precision.diagonal(dim1=1, dim2=2)
    diagonal += 1e-13 * mean.squeeze(-1)
    lower = torch.linalg.cholesky(precision)
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype).expand_as(lower)
    factor = torch.linalg.solve_triangular(lower.mT, identity, upper=True)
    return factor - sizes @ (sizes.mT @ factor)


@torch.no_grad()
def relative_std(network: CPNetwork, factor: Tensor, x: Tensor, max_memory: int = MAX_MEMORY) -> Tensor:
    """The standard deviation of f over that of the noise, |j(x) F|: (points, num_outputs)."""
    factors, factor = network.factors.detach().double(), factor.double()
    points = Points(network.splines, x, x.new_zeros(len(x), network.num_outputs), None, max_memory)
    chunks = points.chunks(3 * factors.numel())
    return torch.cat([(tangent(chunk, factors) @ factor).norm(dim=-1).mT for chunk in chunks])


def _size_directions(factors: Tensor) -> Tensor:
    """Orthonormal directions in which one factor of a component grows and another shrinks: (problems, size, count)."""
    num_inputs, _, problems, rank = factors.shape
    columns = factors.new_zeros(problems, flat(factors).shape[1], num_inputs * rank)
    by_input = factors.permute(2, 0, 1, 3)  # (problems, num_inputs, num_basis, rank)
    for r in range(rank):
        for i in range(num_inputs):
            one = torch.zeros_like(by_input)
            one[:, i, :, r] = by_input[:, i, :, r]
            columns[:, :, r * num_inputs + i] = one.flatten(1)
    # What grows all factors of a component changes f: only differences from the last input do not.
    per_component = columns.unflatten(-1, (rank, num_inputs))
    differences = (per_component[..., :-1] - per_component[..., -1:]).flatten(2)
    return torch.linalg.qr(differences)[0]
