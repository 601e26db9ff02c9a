# ruff: noqa: ANN001, ANN202, ANN205  (the arguments of kernels are pointers and tiles)
r"""The separable product of :mod:`sna_core.generator` as two Triton kernels, which store neither basis nor factors.

Forward goes through the seed dimensions with the running product in registers. It keeps, of each number of the
result, the product of the factors that are not zero and how many are. Backward computes each factor :math:`\phi_i`
again and has the product of all others from these two: the kept product divided by :math:`\phi_i` where no factor is
zero, the kept product itself for the only zero factor, and zero otherwise.

The division is exact but for rounding as long as the kept product is a normal number. Where it underflows (below
1e-38 in magnitude) or overflows, backward has zero or infinity for a product of others that float32 may still hold:
an error of at most 1e-45 / :math:`|\phi_i|`, or a gradient of a result that is itself infinite. A factor that is so
small that float32 has zero for it counts as zero.

This module needs Triton, for which nothing else asks: importing it raises ``ImportError`` where there is none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sna_core.generator import LEAST_TOTAL

LEAST_BLOCK = 16  # what tl.dot takes
# Tokens and ranks in one tile, for the published numbers of knots. With larger tiles backward spills registers to
# memory, as the compiler tells; float32 without tensor cores takes twice the registers.
LARGEST_BLOCK = {"tf32": 64, "ieee": 32}
PUBLISHED_KNOTS = 32
MOST_KNOTS = 128  # beyond, backward spills with the least tiles too
CHUNK_TOKENS = 2048  # what one backward program sums up before it adds to the gradient of the splines
LEAST_CAPABILITY = (8, 0)  # of tensor cores for bfloat16 and tf32


@triton.jit
def _round(a, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """The nearest numbers that a matrix product of operands of DTYPE takes, as float32."""
    if tl.float32 != DTYPE:
        a = a.to(DTYPE).to(tl.float32)
    elif PRECISION == "tf32":
        # tl.dot would cut the last 13 bits off, and a product of a hundred factors that are all too small is far off.
        bits = a.to(tl.int32, bitcast=True)
        nearest = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).to(tl.float32, bitcast=True)
        a = tl.where(tl.abs(a) < float("inf"), nearest, a)  # bits of a NaN may overflow
    return a


@triton.jit
def _basis(
    z,
    scale,
    knots,
    NUM_KNOTS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    LEAST: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The basis at z (tokens,), the distances to the knots, these scaled, all (tokens, knots), and what normalises.

    ``generator._Block``'s, with columns that pad the knots, where the basis is zero, but not divided by its sum: of
    that there is the inverse (tokens, 1). The sum is that of the rounded basis, so that where the splines are nearly
    constant, as at the start, rounding the basis changes nothing.
    """
    distance = (z * (NUM_KNOTS - 1))[:, None] - knots[None, :].to(tl.float32)
    t = tl.abs(distance) * scale
    # A NaN must come out as one, so that training that diverges shows.
    inner = tl.maximum(0.5 - t, 0.0, propagate_nan=tl.PropagateNan.ALL)
    outer = tl.maximum(1.5 - t, 0.0, propagate_nan=tl.PropagateNan.ALL)
    basis = tl.where(knots[None, :] < NUM_KNOTS, 0.5 * outer * outer - 1.5 * inner * inner, 0.0)
    basis = _round(basis, DTYPE, PRECISION)
    inverse = tl.full(z.shape, 1.0, tl.float32)
    if NORMALIZE:
        inverse = 1.0 / tl.maximum(tl.sum(basis, 1), LEAST)
    return basis, distance, t, inverse[:, None]


@triton.jit
def _dot(a, b, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """The matrix product in float32 of operands rounded to one dtype."""
    a, b = a.to(DTYPE), b.to(DTYPE)
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _forward_kernel(
    coordinates,  # (heads, seed, tokens)
    splines,  # (heads, seed, knots, rank)
    scale,  # (heads, seed) or None
    product,  # (heads, tokens, rank), as the next two
    nonzero_product,  # or None: without gradient
    num_zeros,  # or None
    num_tokens,
    seed_dim,
    rank,
    NUM_KNOTS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    LEAST: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_KNOTS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """One program for a block of tokens, a block of ranks and a head."""
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    ranks = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    head = tl.program_id(2).to(tl.int64)  # offsets from here on may exceed 2^31
    knots = tl.arange(0, BLOCK_KNOTS)
    dtype: tl.constexpr = splines.dtype.element_ty
    is_coefficient = (knots < NUM_KNOTS)[:, None] & (ranks < rank)[None, :]
    running = tl.full((BLOCK_TOKENS, BLOCK_RANK), 1.0, tl.float32)
    zeros = tl.zeros((BLOCK_TOKENS, BLOCK_RANK), tl.int32)
    for i in range(seed_dim):
        row = head * seed_dim + i
        z = tl.load(coordinates + row * num_tokens + tokens, mask=tokens < num_tokens, other=0.0)
        knot_scale = 1.0 if scale is None else tl.load(scale + row)
        basis, _, _, inverse = _basis(z, knot_scale, knots, NUM_KNOTS, NORMALIZE, LEAST, dtype, PRECISION)
        offsets = (row * NUM_KNOTS + knots)[:, None] * rank + ranks[None, :]
        coefficients = _round(tl.load(splines + offsets, mask=is_coefficient, other=0.0), dtype, PRECISION)
        phi = _dot(basis, coefficients, dtype, PRECISION, INTERPRETED) * inverse
        running = tl.where(phi == 0, running, running * phi)
        zeros += (phi == 0).to(tl.int32)
    offsets = (head * num_tokens + tokens)[:, None] * rank + ranks[None, :]
    is_result = (tokens < num_tokens)[:, None] & (ranks < rank)[None, :]
    tl.store(product + offsets, tl.where(zeros == 0, running, 0.0), mask=is_result)
    if nonzero_product is not None:
        tl.store(nonzero_product + offsets, running, mask=is_result)
        tl.store(num_zeros + offsets, tl.minimum(zeros, 2).to(tl.int8), mask=is_result)


@triton.jit
def _backward_kernel(
    coordinates,  # (heads, seed, tokens)
    splines,  # (heads, seed, knots, rank)
    scale,  # (heads, seed) or None
    weighted,  # (heads, tokens, rank): gradient times kept product; zero where several factors are
    num_zeros,  # (heads, tokens, rank)
    to_coordinates,  # (rank blocks, heads, seed, tokens): one part from each block of ranks
    to_splines,  # (heads, seed, knots, rank); of zeros where several chunks add to it
    to_scale,  # (rank blocks, chunks, heads, seed), or None
    num_tokens,
    chunk_tokens,
    num_heads,
    rank,
    NUM_KNOTS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    LEAST: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_KNOTS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """One program for a seed dimension, a chunk of tokens, and a head and block of ranks.

    Seed dimensions come first in the grid: programs that run side by side then read the same part of ``weighted``.
    """
    seed_dim, chunk = tl.num_programs(0), tl.program_id(1)
    head, block = (tl.program_id(2) % num_heads).to(tl.int64), tl.program_id(2) // num_heads
    dtype: tl.constexpr = splines.dtype.element_ty
    # Gradients may be smaller than float16 holds.
    gradient_dtype: tl.constexpr = tl.float32 if dtype == tl.float16 else dtype
    row = head * seed_dim + tl.program_id(0)
    part = block.to(tl.int64) * num_heads * seed_dim + row
    knots, ranks = tl.arange(0, BLOCK_KNOTS), block * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    is_coefficient = (knots < NUM_KNOTS)[:, None] & (ranks < rank)[None, :]
    coefficient_offsets = (row * NUM_KNOTS + knots)[:, None] * rank + ranks[None, :]
    coefficients = tl.load(splines + coefficient_offsets, mask=is_coefficient, other=0.0)
    coefficients = _round(coefficients, dtype, PRECISION)
    knot_scale = 1.0 if scale is None else tl.load(scale + row)
    sum_splines = tl.zeros((BLOCK_KNOTS, BLOCK_RANK), tl.float32)
    sum_scale = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for start in range(chunk * chunk_tokens, min((chunk + 1) * chunk_tokens, num_tokens), BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS)
        z = tl.load(coordinates + row * num_tokens + tokens, mask=tokens < num_tokens, other=0.0)
        basis, distance, t, inverse = _basis(z, knot_scale, knots, NUM_KNOTS, NORMALIZE, LEAST, dtype, PRECISION)
        phi = _dot(basis, coefficients, dtype, PRECISION, INTERPRETED) * inverse

        offsets = (head * num_tokens + tokens)[:, None] * rank + ranks[None, :]
        is_result = (tokens < num_tokens)[:, None] & (ranks < rank)[None, :]
        weight = tl.load(weighted + offsets, mask=is_result, other=0.0)
        has_zero = tl.load(num_zeros + offsets, mask=is_result, other=0) != 0
        of_nonzero = tl.where(has_zero, 0.0, weight / tl.where(phi == 0, 1.0, phi))
        # Zero wherever padding makes phi zero, as weight is.
        to_sum = tl.where(phi == 0, weight, of_nonzero) * inverse  # in phi before it is normalised

        sum_splines += _dot(tl.trans(basis), to_sum, gradient_dtype, PRECISION, INTERPRETED)
        to_basis = _dot(to_sum, tl.trans(coefficients), gradient_dtype, PRECISION, INTERPRETED)
        if NORMALIZE:  # through the division by the sum
            to_basis -= tl.sum(to_basis * basis, 1)[:, None] * inverse
        slope = 3.0 * tl.maximum(0.5 - t, 0.0) - tl.maximum(1.5 - t, 0.0)
        to_t = tl.where(knots[None, :] < NUM_KNOTS, to_basis * slope, 0.0)
        sign = (distance > 0).to(tl.float32) - (distance < 0).to(tl.float32)
        to_z = tl.sum(to_t * sign, 1) * knot_scale * (NUM_KNOTS - 1)
        tl.store(to_coordinates + part * num_tokens + tokens, to_z, mask=tokens < num_tokens)
        sum_scale += tl.sum(to_t * tl.abs(distance), 1)
    if ADD:
        tl.atomic_add(to_splines + coefficient_offsets, sum_splines, mask=is_coefficient, sem="relaxed")
    else:
        tl.store(to_splines + coefficient_offsets, sum_splines, mask=is_coefficient)
    if to_scale is not None:
        first = (block * tl.num_programs(1) + chunk).to(tl.int64) * num_heads * seed_dim
        # Tokens beyond the last have a gradient of zero, since their weight is.
        tl.store(to_scale + first + row, tl.sum(sum_scale, 0))


INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)  # TRITON_INTERPRET was set: runs on a CPU, slowly


def is_available(tensor: Tensor) -> bool:
    """Whether the kernels run where ``tensor`` is: on a CUDA device of Ampere or later, or anywhere interpreted."""
    if INTERPRETED:
        return True
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= LEAST_CAPABILITY


def separable_product_triton(
    coordinates: Tensor, splines: Tensor, scale: Tensor | None = None, normalize: bool = True
) -> Tensor:
    r"""The product :math:`M_{lnr} = \prod_i \sum_j B_j(\tilde z_{lni}) S_{lijr}` of :mod:`sna_core.generator`.

    Basis, product and result are float32. The sum over j multiplies in the splines' dtype where that is bfloat16
    or float16 and adds in float32; for float32 splines it uses tf32 where PyTorch may for its matrix products. Each
    factor's error then is the rounding of a few coefficients, of which a product of s factors has the root of s times
    as much.
    Gradients have the dtypes of the inputs; that of the splines adds in an order that differs from call to call,
    except under ``torch.use_deterministic_algorithms``.

    Shapes: coordinates (heads, tokens, seed), splines (heads, seed, knots, rank), scale (heads, seed) -> (heads,
    tokens, rank). Differentiable once.

    Raises:
        ValueError: If the shapes or devices do not fit together, a dtype is none of float32, bfloat16 and float16,
            there are more than ``MOST_KNOTS`` knots or the kernels do not run on this device.
    """
    _check(coordinates, splines, scale)
    inputs = [t for t in (coordinates, splines, scale) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _SeparableProduct.apply(coordinates, splines, scale, normalize)
    return _forward(coordinates, splines, scale, normalize, keep=False)[0]


def _check(coordinates: Tensor, splines: Tensor, scale: Tensor | None) -> None:
    named = {"coordinates": coordinates, "splines": splines} | ({} if scale is None else {"scale": scale})
    for name, tensor in named.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name}: {tensor.dtype}; expected float32, bfloat16 or float16, in which the kernels compute. Use "
                "sna_core.generator.separable_product, which takes any."
            )
        if tensor.device != coordinates.device:
            raise ValueError(f"{name}: on {tensor.device}, and the coordinates on {coordinates.device}; move one.")
    heads, _, seed = coordinates.shape
    if splines.dim() != 4 or splines.shape[:2] != (heads, seed) or not 2 <= splines.shape[2] <= MOST_KNOTS:
        raise ValueError(
            f"splines: shape {tuple(splines.shape)}; expected ({heads}, {seed}, 2 to {MOST_KNOTS} knots, rank)."
        )
    if scale is not None and scale.shape != (heads, seed):
        raise ValueError(f"scale: shape {tuple(scale.shape)}; expected ({heads}, {seed}), as the coordinates'.")
    if not is_available(coordinates):
        raise ValueError(
            f"the kernels do not run on {coordinates.device}; they need a CUDA device of capability "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or more. Use sna_core.generator.separable_product."
        )


class _SeparableProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, coordinates, splines, scale, normalize):
        product, nonzero_product, num_zeros = _forward(coordinates, splines, scale, normalize, keep=True)
        ctx.save_for_backward(coordinates, splines, scale, nonzero_product, num_zeros)
        ctx.normalize = normalize
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        coordinates, splines, scale, nonzero_product, num_zeros = ctx.saved_tensors
        return *_backward(coordinates, splines, scale, nonzero_product, num_zeros, gradient, ctx.normalize), None


def _forward(
    coordinates: Tensor, splines: Tensor, scale: Tensor | None, normalize: bool, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The product and, with ``keep``, the product of the factors that are not zero and the number of the others."""
    heads, tokens, seed = coordinates.shape
    rank = splines.shape[3]
    product = coordinates.new_empty(heads, tokens, rank, dtype=torch.float32)
    nonzero_product = torch.empty_like(product) if keep else None
    num_zeros = torch.empty_like(product, dtype=torch.int8) if keep else None
    settings = _settings(splines, normalize)
    grid = (triton.cdiv(tokens, settings["BLOCK_TOKENS"]), triton.cdiv(rank, settings["BLOCK_RANK"]), heads)
    if product.numel():
        with torch.cuda.device_of(coordinates):  # Triton starts kernels on the current device
            _forward_kernel[grid](
                *_operands(coordinates, splines, scale),
                product,
                nonzero_product,
                num_zeros,
                tokens,
                seed,
                rank,
                **settings,
            )
    return product, nonzero_product, num_zeros


def _backward(
    coordinates: Tensor,
    splines: Tensor,
    scale: Tensor | None,
    nonzero_product: Tensor,
    num_zeros: Tensor,
    gradient: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients in the coordinates, the splines and, where there is one, the scale."""
    heads, tokens, seed = coordinates.shape
    if gradient.numel() == 0 or seed == 0:
        return torch.zeros_like(coordinates), torch.zeros_like(splines), None if scale is None else scale * 0
    rank = splines.shape[3]
    settings = _settings(splines, normalize)
    rank_blocks = triton.cdiv(rank, settings["BLOCK_RANK"])
    chunk_tokens = tokens if torch.are_deterministic_algorithms_enabled() else CHUNK_TOKENS
    chunks = triton.cdiv(tokens, chunk_tokens)
    weighted = (gradient * nonzero_product).masked_fill_(num_zeros > 1, 0.0).contiguous()
    to_coordinates = weighted.new_empty(rank_blocks, heads, seed, tokens)
    to_splines = weighted.new_zeros(splines.shape) if chunks > 1 else weighted.new_empty(splines.shape)
    to_scale = None if scale is None else weighted.new_empty(rank_blocks, chunks, heads, seed)
    with torch.cuda.device_of(coordinates):
        _backward_kernel[(seed, chunks, heads * rank_blocks)](
            *_operands(coordinates, splines, scale),
            weighted,
            num_zeros,
            to_coordinates,
            to_splines,
            to_scale,
            tokens,
            chunk_tokens,
            heads,
            rank,
            ADD=chunks > 1,
            **settings,
        )
    return (
        to_coordinates.sum(0).transpose(1, 2).to(coordinates.dtype),
        to_splines.to(splines.dtype),
        None if scale is None or to_scale is None else to_scale.sum((0, 1)).to(scale.dtype),
    )


def _operands(coordinates: Tensor, splines: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs as the kernels read them: coordinates (heads, seed, tokens), all contiguous."""
    return (
        coordinates.transpose(1, 2).contiguous().float(),
        splines.contiguous(),
        None if scale is None else scale.contiguous().float(),
    )


def _settings(splines: Tensor, normalize: bool) -> dict[str, object]:
    """What both kernels are compiled for; tiles have sizes that are powers of two."""
    num_knots, rank = splines.shape[2:]
    # The legacy torch.get_float32_matmul_precision() raises once someone, as transformers' Trainer, used the newer
    # setting; this one tells what was set either way.
    exact = splines.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    precision = "ieee" if exact else "tf32"
    knots = max(LEAST_BLOCK, triton.next_power_of_2(num_knots))
    largest = max(LEAST_BLOCK, LARGEST_BLOCK[precision] * PUBLISHED_KNOTS // max(knots, PUBLISHED_KNOTS))
    return {
        "NUM_KNOTS": num_knots,
        "NORMALIZE": normalize,
        "LEAST": LEAST_TOTAL,
        "PRECISION": precision,
        "INTERPRETED": INTERPRETED,
        "BLOCK_TOKENS": largest,
        "BLOCK_KNOTS": knots,
        "BLOCK_RANK": min(largest, max(LEAST_BLOCK, triton.next_power_of_2(rank))),
    }
