r"""Tensor trains that minimise a quadratic form, by alternation over pairs of neighbouring axes.

.. math::
    w(x_1, \dots, x_d) = \sum_{i_1 \dots i_d} W_1[i_1] W_2[i_2] \cdots W_d[i_d]\; \psi_{i_1}(x_1) \cdots \psi_{i_d}(x_d)

With all cores but two neighbours held, and those before and behind orthonormal, the form is quadratic in the product of
the two. Its minimum is found by conjugate gradients and cut to the rank that a tolerance in L2 asks for (S. R. White,
Phys. Rev. Lett. 69 (1992); S. Holtz, T. Rohwedder and R. Schneider, SIAM J. Sci. Comput. 34 (2012)). Work and memory
are linear in the number of axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sna_core.forms import Components, QuadraticForm, conjugate_gradients

NUM_RANDOM = 2  # functions that a core gets on the way there


@dataclass(frozen=True)
class Train:
    """Cores (rank, dimension, next rank), of ranks 1 at both ends, in orthonormal bases."""

    cores: tuple[Tensor, ...]

    @classmethod
    def of_components(cls, factors: Sequence[Tensor]) -> Train:
        """A sum of products: diagonal cores."""
        cores = [torch.diag_embed(factor) for factor in factors]  # (dimension, rank, rank)
        cores[0], cores[-1] = cores[0].sum(1, keepdim=True), cores[-1].sum(2, keepdim=True)
        if len(cores) == 1:
            cores = [factors[0].sum(1).view(-1, 1, 1)]
        return cls(tuple(core.transpose(0, 1).contiguous() for core in cores))

    @classmethod
    def of_tensor(cls, values: Tensor, tolerance: float) -> Train:
        """A tensor with a dimension for each axis, within the tolerance, a fraction of the norm.

        By one singular value decomposition after another (I. V. Oseledets, SIAM J. Sci. Comput. 33 (2011)).
        """
        cores, rest, rank = [], values, 1
        share = tolerance / max(1, values.ndim - 1) ** 0.5
        for size in values.shape[:-1]:
            u, sizes, v = _cut(rest.reshape(rank * size, -1), share)
            cores.append(u.view(rank, size, -1))
            rest, rank = sizes.unsqueeze(-1) * v, len(sizes)
        return cls((*cores, rest.reshape(rank, -1, 1)))

    def tensor(self) -> Tensor:
        """All values, a dimension for each axis; for small ones."""
        full = self.cores[0]
        for core in self.cores[1:]:
            full = torch.tensordot(full, core, 1)
        return full.reshape(full.shape[1:-1])

    @property
    def ranks(self) -> list[int]:
        """Between neighbours."""
        return [core.shape[2] for core in self.cores[:-1]]

    @property
    def max_rank(self) -> int:
        """The largest of them."""
        return max(self.ranks, default=1)

    def __neg__(self) -> Train:
        return Train((-self.cores[0], *self.cores[1:]))

    def __add__(self, other: Train) -> Train:
        cores = []
        for k, (a, b) in enumerate(zip(self.cores, other.cores, strict=True)):
            core = a.new_zeros(a.shape[0] + b.shape[0], a.shape[1], a.shape[2] + b.shape[2])
            core[: a.shape[0], :, : a.shape[2]], core[a.shape[0] :, :, a.shape[2] :] = a, b
            core = core if k else core.sum(0, keepdim=True)
            cores.append(core if k < len(self.cores) - 1 else core.sum(2, keepdim=True))
        return Train(tuple(cores))

    def mapped(self, matrices: Sequence[Tensor]) -> Train:
        """In other bases: each core times a matrix (new dimension, dimension)."""
        return Train(tuple(torch.einsum("nm,rms->rns", *pair) for pair in zip(matrices, self.cores, strict=True)))

    def orthogonal(self) -> Train:
        """The same function with all cores but the last orthonormal."""
        cores = list(self.cores)
        for k in range(len(cores) - 1):
            rank, size, _ = cores[k].shape
            q, r = torch.linalg.qr(cores[k].flatten(0, 1))
            cores[k], cores[k + 1] = q.view(rank, size, -1), torch.tensordot(r, cores[k + 1], 1)
        return Train(tuple(cores))

    def norm(self) -> float:
        """In orthonormal bases."""
        return self.orthogonal().cores[-1].norm().item()

    def rounded(self, tolerance: float, max_rank: int | None = None) -> Train:
        """The nearest train of smaller ranks, within the tolerance, a fraction of the norm."""
        cores = list(self.orthogonal().cores)
        share = tolerance / max(1, len(cores) - 1) ** 0.5
        for k in range(len(cores) - 1, 0, -1):
            _, size, following = cores[k].shape
            u, s, v = _cut(cores[k].flatten(1), share, max_rank)
            cores[k], cores[k - 1] = v.view(-1, size, following), cores[k - 1] @ (u * s)
        return Train(tuple(cores))

    def frames(self, tolerance: float) -> tuple[list[Tensor], Train]:
        """Orthonormal frames (dimension, size) of each axis, and the train in these.

        What is left out is within the tolerance, a fraction of the norm (the higher-order singular value decomposition:
        L. De Lathauwer, B. De Moor and J. Vandewalle, SIAM J. Matrix Anal. Appl. 21 (2000)).
        """
        cores = list(self.orthogonal().cores)
        frames: list[Tensor] = []
        for k in range(len(cores) - 1, -1, -1):
            following = cores[k].shape[2]
            frame, _, _ = _cut(cores[k].transpose(0, 1).flatten(1), tolerance / len(cores) ** 0.5)
            frames.insert(0, frame)
            cores[k] = torch.einsum("ms,rmt->rst", frame, cores[k])
            if k:
                q, r = torch.linalg.qr(cores[k].flatten(1).mT)
                cores[k], cores[k - 1] = q.mT.reshape(-1, frame.shape[1], following), cores[k - 1] @ r.mT
        return frames, Train(tuple(cores))

    def expanded(self, max_rank: int) -> list[Tensor] | None:
        """The same as a sum of products, a component for each path through the ranks; None if they are too many.

        Where a core's inner index only repeats a neighbour's, as of two axes, this is no longer than need be.
        """
        if math.prod(self.ranks) > max_rank:
            return None
        factors = [self.cores[0][0]]  # (dimension, paths)
        for core in self.cores[1:]:
            following = core.shape[2]
            paths = factors[0].shape[1] // core.shape[0]
            last = core.permute(1, 0, 2).repeat(1, paths, 1).flatten(1)  # (dimension, paths * rank * following)
            factors = [*(factor.repeat_interleave(following, 1) for factor in factors), last]
        return factors

    def contractions(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """As of a :class:`~sna_core.forms.Functional`."""
        before = [factors[0].new_ones(1, factors[0].shape[1])]
        for core, factor in zip(self.cores[:-1], factors[:-1], strict=True):
            before.append(torch.einsum("rq,ras,aq->sq", before[-1], core, factor))
        found, behind = [], factors[0].new_ones(1, factors[0].shape[1])
        for core, factor, left in zip(self.cores[::-1], factors[::-1], before[::-1], strict=True):
            open_core = torch.einsum("ras,sq->raq", core, behind)
            found.append(torch.einsum("raq,rq->aq", open_core, left))
            behind = torch.einsum("raq,aq->rq", open_core, factor)
        return found[::-1]


def _cut(matrix: Tensor, tolerance: float, max_rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition without a tail of at most that fraction of the norm; of rank 1 or more."""
    u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
    tail = sizes.square().flip(0).cumsum(0).flip(0).sqrt()
    rank = max(1, int((tail > tolerance * tail[0]).sum()))
    rank = min(rank, max_rank or rank)
    return u[:, :rank], sizes[:rank], v[:rank]


@dataclass
class _Side:
    """The form on one side of a bond: for the products of matrices that differ, in the cores' functions."""

    blocks: Tensor  # (different, rank, rank)
    number: Tensor  # (terms,)
    data: Tensor  # (rank, parts of the right-hand side)


class TrainSolver:
    """The alternation: all cores but the pair at hand are orthonormal.

    On the way there each core gets a few random functions more, of no weight. Without them axes would stay apart that
    depend on each other across an axis which is a factor of its own; on the way back those of no use are cut off again.

    Args:
        form: What to minimise; its right-hand side is a sum of products.
        start: A train to begin with.
        generator: Of these functions.
    """

    def __init__(self, form: QuadraticForm[Components], start: Train, generator: torch.Generator | None = None):
        self.form, self.generator = form, generator or torch.Generator().manual_seed(0)
        end = _Side(
            torch.ones(1, 1, 1, dtype=torch.float64),
            torch.zeros(len(form.coefficients), dtype=torch.long),
            torch.ones(1, form.right.rank, dtype=torch.float64),
        )
        backwards = Train(tuple(core.transpose(0, 2) for core in start.cores[::-1])).orthogonal()
        self.cores = [core.transpose(0, 2) for core in backwards.cores[::-1]]
        self.left, self.right = [end] * (len(self.cores) + 1), [end] * (len(self.cores) + 1)
        for k in range(len(self.cores) - 1, 0, -1):
            self._pass_backward(k)

    @property
    def train(self) -> Train:
        """The present one."""
        return Train(tuple(self.cores))

    def sweep(
        self, tolerance: float, max_rank: int | None = None, *, reduction: float = 1e-2, max_steps: int = 60
    ) -> float:
        """There and back over all pairs of neighbours.

        Args:
            tolerance: Of the cuts, as a fraction of the norm.
            max_rank: Largest rank between two neighbours.
            reduction: By which conjugate gradients lower a pair's residual.
            max_steps: Of conjugate gradients, at most.

        Returns:
            The largest change of a pair, as a fraction of its norm.
        """
        if len(self.cores) == 1:
            return self._solve_single()
        tolerance = tolerance / (len(self.cores) - 1) ** 0.5
        change = 0.0
        for forward, pairs in ((True, range(len(self.cores) - 1)), (False, range(len(self.cores) - 2, -1, -1))):
            for k in pairs:
                pair = _Pair(self.form, k, self.left[k], self.right[k + 2])
                start = torch.tensordot(self.cores[k], self.cores[k + 1], 1)  # (r, m, n, s)
                found = pair.solve(start, reduction, max_steps)
                change = max(change, ((found - start).norm() / found.norm().clamp(min=1e-300)).item())
                rank, first, second, following = found.shape
                u, sizes, v = _cut(found.flatten(2).flatten(0, 1), tolerance, max_rank)
                u, v = self._widened(u, sizes.unsqueeze(-1) * v) if forward else (u * sizes, v)
                self.cores[k], self.cores[k + 1] = u.view(rank, first, -1), v.view(-1, second, following)
                if forward:
                    self._pass_forward(k)
                else:
                    self._pass_backward(k + 1)
        return change

    def _widened(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """With more orthonormal columns of u, and rows of zeros in v."""
        count = min(NUM_RANDOM, len(u) - u.shape[1])
        random = torch.randn(len(u), count, generator=self.generator, dtype=torch.float64)
        wide = torch.linalg.qr(torch.cat([u, random], 1))[0]
        return torch.cat([u, wide[:, u.shape[1] :]], 1), torch.cat([v, v.new_zeros(count, v.shape[1])])

    def _solve_single(self) -> float:
        matrix = torch.einsum("p,pab->ab", self.form.coefficients, self.form.matrices[0][self.form.index[:, 0]])
        found = torch.linalg.solve(matrix, self.form.right.factors[0].sum(1))
        change = (found - self.cores[0].flatten()).norm() / found.norm().clamp(min=1e-300)
        self.cores[0] = found.view(1, -1, 1)
        return change.item()

    # A side grows by one axis. Terms whose matrices agree on all of its axes share a block.

    def _pass_forward(self, k: int) -> None:
        core, side = self.cores[k], self.left[k]
        pairs, number = torch.stack([side.number, self.form.index[:, k]], 1).unique(dim=0, return_inverse=True)
        image = torch.einsum("uab,rbs->uras", self.form.matrices[k], core)
        blocks = torch.einsum("pqr,pras->pqas", side.blocks[pairs[:, 0]], image[pairs[:, 1]])
        data = torch.einsum("rpt,rp->tp", torch.einsum("rat,ap->rpt", core, self.form.right.factors[k]), side.data)
        self.left[k + 1] = _Side(torch.einsum("qat,pqas->pts", core, blocks), number, data)

    def _pass_backward(self, k: int) -> None:
        core, side = self.cores[k], self.right[k + 1]
        pairs, number = torch.stack([side.number, self.form.index[:, k]], 1).unique(dim=0, return_inverse=True)
        image = torch.einsum("uab,rbs->uras", self.form.matrices[k], core)
        blocks = torch.einsum("pras,pts->prat", image[pairs[:, 1]], side.blocks[pairs[:, 0]])
        data = torch.einsum("rps,sp->rp", torch.einsum("ras,ap->rps", core, self.form.right.factors[k]), side.data)
        self.right[k] = _Side(torch.einsum("qat,prat->pqr", core, blocks), number, data)


class _Pair:
    """The form in the product of two cores (r, m, n, s)."""

    def __init__(self, form: QuadraticForm[Components], k: int, left: _Side, right: _Side):
        self.data = torch.einsum(
            "rq,aq,bq,sq->rabs", left.data, form.right.factors[k], form.right.factors[k + 1], right.data
        )
        first, second = form.index[:, k], form.index[:, k + 1]
        lefts, to_left = torch.stack([left.number, first], 1).unique(dim=0, return_inverse=True)
        rights, to_right = torch.stack([second, right.number], 1).unique(dim=0, return_inverse=True)
        self.coupling = torch.zeros(len(lefts), len(rights), dtype=torch.float64)
        self.coupling.index_put_((to_left, to_right), form.coefficients, accumulate=True)
        # Turned so that the form's average over the other indices is diagonal in r, and in s.
        means = [m.diagonal(dim1=1, dim2=2).mean(1) for m in (form.matrices[k], form.matrices[k + 1])]
        weight = form.coefficients * means[0][first] * means[1][second]
        sizes = [side.blocks.diagonal(dim1=1, dim2=2).mean(1)[side.number] for side in (left, right)]
        self.turn_left = _directions(left, weight * sizes[1])
        self.turn_right = _directions(right, weight * sizes[0])
        self.outer = (self.turn_left.mT @ left.blocks @ self.turn_left)[lefts[:, 0]]
        self.first, self.second = form.matrices[k][lefts[:, 1]], form.matrices[k + 1][rights[:, 0]]
        self.inner = (self.turn_right.mT @ right.blocks @ self.turn_right)[rights[:, 1]]
        diagonals = [t.diagonal(dim1=1, dim2=2) for t in (self.outer, self.first, self.second, self.inner)]
        self.diagonal = torch.einsum("er,ea,ec,cb,cs->rabs", *diagonals[:2], self.coupling, *diagonals[2:])

    def solve(self, start: Tensor, reduction: float, max_steps: int) -> Tensor:
        """The minimum, by conjugate gradients from a start; the diagonal preconditions."""
        scale = self.diagonal.clamp(min=1e-14 * self.diagonal.amax())
        turns = (self.turn_left, self.turn_right)
        found = conjugate_gradients(
            self._apply,
            lambda residual: residual / scale,
            _turned(self.data, *turns),
            _turned(start, *turns),
            reduction=reduction,
            max_steps=max_steps,
        )
        return _turned(found, *(turn.mT for turn in turns))

    def _apply(self, x: Tensor) -> Tensor:
        r, m, n, s = x.shape
        y = x.view(r * m * n, s) @ self.inner.mT  # (rights, r m n, s)
        y = self.second.unsqueeze(1) @ y.view(-1, r * m, n, s)
        y = (self.coupling @ y.flatten(1)).view(-1, r, m, n * s)
        y = self.first.unsqueeze(1) @ y
        return (self.outer @ y.flatten(2)).sum(0).view_as(x)


def _directions(side: _Side, weight: Tensor) -> Tensor:
    """Eigenvectors of the weighted sum of a side's blocks."""
    by_block = weight.new_zeros(len(side.blocks)).index_add_(0, side.number, weight)
    total = torch.einsum("p,prs->rs", by_block, side.blocks)
    return torch.linalg.eigh((total + total.mT) / 2)[1]


def _turned(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.tensordot(torch.tensordot(left.mT, x, 1), right, 1).contiguous()
