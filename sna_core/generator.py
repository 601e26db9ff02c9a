r"""The separable product inside :class:`~sna_core.embedding.SeparableEmbedding`, and its plain twin.

For coordinates :math:`\tilde z` (heads, tokens, seed_dim) in [0, 1] and spline coefficients S (heads, seed_dim,
num_knots, rank) it computes

.. math::
    M_{lnr} = \prod_i \phi_{lnir}, \qquad \phi_{lnir} = \sum_j B_j(\tilde z_{lni}) S_{lijr},

with the quadratic B-splines B on num_knots uniform knots (arXiv 2601.22040). Written out, :math:`\phi` takes seed_dim x
rank numbers a token and head, and moving it through memory is what costs. :func:`separable_product` therefore works
through blocks of tokens that stay in cache, keeps none of them, and computes them again in backward; the product is a
tree of pairwise products, whose gradient is exact where factors are zero. On a GPU the kernels of
:mod:`sna_core.generator_triton` do the same in registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sna_core.network import pairwise_product

# Numbers of phi in one block: on a CPU what its cache holds, on a GPU enough to fill it.
BLOCK_NUMEL = {"cpu": 2**20}
LARGE_BLOCK_NUMEL = 2**26
# A learned scale of 3 and more leaves points midway between knots that no basis function reaches.
LEAST_TOTAL = 1e-6
SAFE_PRODUCT = 2.0**100  # between this and its inverse float32 rounds a product of any number of factors well


def uniform_spline_basis(x: Tensor, num_knots: int, scale: Tensor | None = None, normalize: bool = True) -> Tensor:
    r"""Quadratic B-splines on ``num_knots`` uniform knots on [0, 1]: (...) -> (..., num_knots).

    With :math:`t = |x - j / (K-1)| (K-1)`, times ``scale`` where given: :math:`3/4 - t^2` for :math:`t < 1/2`,
    :math:`(3/2 - t)^2 / 2` for :math:`1/2 \le t < 3/2`, 0 beyond; divided by its sum over j with ``normalize``.
    """
    t = (x.unsqueeze(-1) * (num_knots - 1) - torch.arange(num_knots, dtype=x.dtype, device=x.device)).abs()
    if scale is not None:
        t = t * scale.unsqueeze(-1)
    basis = torch.where(t < 0.5, 0.75 - t**2, torch.where(t < 1.5, (1.5 - t) ** 2 / 2, torch.zeros_like(t)))
    return basis / basis.sum(-1, keepdim=True).clamp(min=LEAST_TOTAL) if normalize else basis


def separable_product_reference(
    coordinates: Tensor, splines: Tensor, scale: Tensor | None = None, normalize: bool = True
) -> Tensor:
    """The product as signs and a sum of logarithms, as written in the papers: the oracle of :func:`separable_product`.

    Shapes: coordinates (heads, tokens, seed), splines (heads, seed, knots, rank), scale (heads, seed) -> (heads,
    tokens, rank).
    """
    splines = splines.to(coordinates.dtype)
    products = []
    for head in range(coordinates.shape[0]):
        basis = uniform_spline_basis(
            coordinates[head], splines.shape[2], None if scale is None else scale[head], normalize
        )
        phi = torch.einsum("nij,ijr->nir", basis, splines[head])  # (tokens, seed, rank)
        products.append(phi.sign().prod(1) * (phi.abs() + 1e-9).log().sum(1).exp())
    return torch.stack(products)


def separable_product(
    coordinates: Tensor, splines: Tensor, scale: Tensor | None = None, normalize: bool = True
) -> Tensor:
    """The product by blocks: one batched matrix product over the seed dimensions, then a tree of pairwise products.

    Shapes: coordinates (heads, tokens, seed), splines (heads, seed, knots, rank), scale (heads, seed) -> (heads,
    tokens, rank), in the coordinates' dtype. Differentiable once; under ``torch.compile`` it is one block for the
    compiler to fuse. On a GPU with Triton it is fused kernels, which multiply in the splines' dtype where that is lower
    than the coordinates'; elsewhere such splines are converted.
    """
    is_traced = torch.compiler.is_compiling() or coordinates.is_meta
    if not is_traced and coordinates.is_cuda and coordinates.dtype == torch.float32 and splines.dtype != torch.float64:
        kernels = _kernels()
        if kernels is not None and splines.shape[2] <= kernels.MOST_KNOTS and kernels.is_available(coordinates):
            return kernels.separable_product_triton(coordinates, splines, scale, normalize)
    splines = splines.to(coordinates.dtype)
    if is_traced:
        x = coordinates.transpose(1, 2)  # (heads, seed, tokens)
        basis = uniform_spline_basis(
            x, splines.shape[2], None if scale is None else scale.unsqueeze(-1), normalize
        )  # (heads, seed, tokens, knots)
        return pairwise_product((basis @ splines).movedim(1, 0))
    return _SeparableProduct.apply(coordinates, splines, scale, normalize)


@cache
def _kernels() -> ModuleType | None:
    """The kernels, imported once they are needed; None where there is no Triton."""
    try:
        from sna_core import generator_triton
    except ImportError:
        return None
    return generator_triton


def _product_levels(factors: Tensor) -> list[Tensor]:
    """Levels of the product tree over dimension 0, from the factors to their product (a leading dimension of one)."""
    levels = [factors]
    while (count := levels[-1].shape[0]) > 1:
        last, half = levels[-1], count // 2
        level = last[:half] * last[half : 2 * half]
        levels.append(torch.cat([level, last[2 * half :]]) if count % 2 else level)
    return levels


def _product_gradient(levels: list[Tensor], gradient: Tensor) -> Tensor:
    """Gradient in the factors from the gradient in their product; a factor's is the product of all others."""
    for level in reversed(levels[:-1]):
        half = level.shape[0] // 2
        below = torch.empty_like(level)
        torch.mul(gradient[:half], level[half : 2 * half], out=below[:half])
        torch.mul(gradient[:half], level[:half], out=below[half : 2 * half])
        below[2 * half :] = gradient[half:]
        gradient = below
    return gradient


def _factor_gradient(factors: Tensor, product: Tensor, gradient: Tensor) -> Tensor:
    """Gradient in the factors (seed, tokens, rank) from the one in their product (tokens, rank), in place of them.

    Where the product is a normal number no factor is zero, and dividing gives the product of all others in one pass.
    """
    magnitude = product.abs()
    if ((magnitude > 1 / SAFE_PRODUCT) & (magnitude < SAFE_PRODUCT)).all():
        return torch.div((gradient * product).unsqueeze(0), factors, out=factors)
    return _product_gradient(_product_levels(factors), gradient.unsqueeze(0))


def _blocks(coordinates: Tensor, splines: Tensor) -> Iterator[tuple[int, slice, _Block]]:
    """Heads and slices of tokens that together fill a cache, with memory for them."""
    heads, tokens, seed = coordinates.shape
    num_knots, rank = splines.shape[2:]
    size = max(1, BLOCK_NUMEL.get(coordinates.device.type, LARGE_BLOCK_NUMEL) // (seed * rank))
    blocks: dict[int, _Block] = {}
    for start in range(0, tokens, size):
        number = min(size, tokens - start)
        if number not in blocks:
            blocks = {number: _Block(coordinates, number, num_knots, rank)}
        for head in range(heads):
            yield head, slice(start, start + number), blocks[number]


class _Block:
    """The basis of one block of tokens, and memory for its factors, used again by every block of the same size.

    Fresh memory of this size comes from the system page by page, which takes as long as computing what goes into it.

    Attributes:
        distance: Signed distance to the knots, (seed, tokens, knots) as the next three.
        inner, outer: relu(1/2 - t) and relu(3/2 - t) at the distance t, in units of a knot's scale.
        basis: :math:`B(t) = outer^2 / 2 - 3 inner^2 / 2`, without branches; divided by its sum where it is normalised.
        total: That sum (seed, tokens, 1).
        factors: (seed, tokens, rank).
    """

    def __init__(self, like: Tensor, num_tokens: int, num_knots: int, rank: int):
        seed = like.shape[-1]
        self.knots = torch.arange(num_knots, dtype=like.dtype, device=like.device)
        self.distance, self.inner, self.outer, self.basis = like.new_empty(4, seed, num_tokens, num_knots)
        self.total = like.new_empty(seed, num_tokens, 1)
        self.factors = like.new_empty(seed, num_tokens, rank)

    def fill(self, coordinates: Tensor, splines: Tensor, scale: Tensor | None, normalize: bool) -> Tensor:
        """Basis and factors of coordinates (tokens, seed) with splines (seed, knots, rank); returns the factors."""
        position = coordinates.t().mul(len(self.knots) - 1).unsqueeze(-1)
        torch.sub(position, self.knots, out=self.distance)
        t = torch.abs(self.distance, out=self.outer)
        if scale is not None:
            t.mul_(scale.view(-1, 1, 1))
        torch.neg(t, out=self.inner).add_(0.5).relu_()
        self.outer.neg_().add_(1.5).relu_()
        torch.mul(self.outer, self.outer, out=self.basis).mul_(0.5).addcmul_(self.inner, self.inner, value=-1.5)
        if normalize:
            torch.sum(self.basis, -1, keepdim=True, out=self.total).clamp_(min=LEAST_TOTAL)
            self.basis.div_(self.total)
        return torch.bmm(self.basis, splines, out=self.factors)

    def gradient(
        self, to_factors: Tensor, splines: Tensor, scale: Tensor | None, normalize: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients in the coordinates (tokens, seed) and the scale (seed,); takes the block's own memory."""
        slope = self.inner.mul_(3.0).sub_(self.outer)  # of the basis in t
        to_basis = torch.bmm(to_factors, splines.transpose(1, 2), out=self.outer)
        if normalize:  # through the division by the sum
            to_basis.sub_(torch.mul(to_basis, self.basis, out=self.basis).sum(-1, keepdim=True)).div_(self.total)
        to_t = to_basis.mul_(slope)
        sign = torch.sign(self.distance, out=self.inner)
        to_distance = to_t.mul_(sign)
        to_scale = None if scale is None else (to_distance * self.distance).sum((-1, -2))
        to_position = to_distance.sum(-1)  # (seed, tokens)
        if scale is not None:
            to_position = to_position * scale.unsqueeze(-1)
        return to_position.t() * (len(self.knots) - 1), to_scale


class _SeparableProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coordinates: Tensor, splines: Tensor, scale: Tensor | None, normalize: bool) -> Tensor:
        product = coordinates.new_empty(*coordinates.shape[:2], splines.shape[3])
        for head, rows, block in _blocks(coordinates, splines):
            factors = block.fill(coordinates[head, rows], splines[head], _of_head(scale, head), normalize)
            while (count := factors.shape[0]) > 1:  # as _product_levels, keeping no level
                half = count // 2
                pairs = factors[:half].mul_(factors[half : 2 * half])
                factors = torch.cat([pairs, factors[2 * half :]]) if count % 2 else pairs
            product[head, rows] = factors[0]
        ctx.save_for_backward(coordinates, splines, scale, product)
        ctx.normalize = normalize
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        coordinates, splines, scale, product = ctx.saved_tensors
        to_coordinates = torch.empty_like(coordinates)
        to_splines = torch.zeros_like(splines)
        to_scale = None if scale is None else torch.zeros_like(scale)
        for head, rows, block in _blocks(coordinates, splines):
            head_scale = _of_head(scale, head)
            factors = block.fill(coordinates[head, rows], splines[head], head_scale, ctx.normalize)
            to_factors = _factor_gradient(factors, product[head, rows], gradient[head, rows])  # (seed, tokens, rank)
            to_splines[head].baddbmm_(block.basis.transpose(1, 2), to_factors)
            to_coordinates[head, rows], of_scale = block.gradient(to_factors, splines[head], head_scale, ctx.normalize)
            if to_scale is not None and of_scale is not None:
                to_scale[head] += of_scale
        return to_coordinates, to_splines, to_scale, None


def _of_head(scale: Tensor | None, head: int) -> Tensor | None:
    return None if scale is None else scale[head]
