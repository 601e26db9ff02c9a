r"""Separable fields on a box: a basis of its own for each axis, and a CP, a Tucker-compressed CP or a tensor train.

The form in which a solved partial differential equation is kept: it is evaluated and differentiated anywhere,
restricted to fewer axes, integrated and compared with others in closed form, all of it by work on one axis at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor, nn

from sna_core.bspline import UniformBSpline, gauss_legendre
from sna_core.graded import GradedBSpline
from sna_core.local_sum import check_points, local_sum
from sna_core.network import by_blocks, check_counts, pairwise_product, products_of_others
from sna_core.spectral import ChebyshevBasis, FourierBasis, LegendreBasis

FieldBasis = UniformBSpline | GradedBSpline | ChebyshevBasis | LegendreBasis | FourierBasis
DECOMPOSITIONS = ("cp", "tucker", "tensor_train")


def gauss(basis: FieldBasis, num_extra: int = 0) -> tuple[Tensor, Tensor]:
    """Points and weights, each (n,) in float64, whose sum is exact for products of two functions of the basis.

    B-splines: Gauss-Legendre in each cell. Polynomials: one Gauss-Legendre rule. Fourier: the trapezoidal rule of a
    period.

    Args:
        basis: Of one axis.
        num_extra: Points beyond that, for integrands with a further factor; in each cell for B-splines.

    Raises:
        ValueError: If ``num_extra`` is negative.
    """
    if not isinstance(num_extra, int) or num_extra < 0:
        raise ValueError(f"num_extra = {num_extra!r}; expected an integer of at least 0.")
    if isinstance(basis, UniformBSpline | GradedBSpline):
        return basis.quadrature(basis.degree + 1 + num_extra)
    num_points, width = basis.num_basis + num_extra, basis.high - basis.low
    if isinstance(basis, FourierBasis):
        share = torch.arange(num_points, dtype=torch.float64) / num_points
        return basis.low + width * share, torch.full_like(share, width / num_points)
    nodes, weights = gauss_legendre(num_points)
    return basis.low + width * (nodes + 1) / 2, weights * (width / 2)


def gram(basis: FieldBasis) -> Tensor:
    r"""The mass matrix :math:`G_{ab} = \int B_a(x) B_b(x)\, dx` over the interval: (num_basis, num_basis), float64."""
    points, weights = gauss(basis)
    dense = basis.dense(points, check=False)
    return dense.mT @ (weights.unsqueeze(-1) * dense)


class SeparableField(nn.Module):
    r"""A function of d axes on a box, in one of three forms with :math:`\psi_i(x_i) = \sum_b B_b(x_i)\, c_i[b]`.

    - ``"cp"``: :math:`u(x) = \sum_{j=1}^r \prod_i \psi_i^{(j)}(x_i)`; c_i is ``factors[i]``.
    - ``"tucker"``: the same in reduced bases: c_i is ``frames[i] @ factors[i]``.
    - ``"tensor_train"``: :math:`u(x) = \psi_1(x_1) \psi_2(x_2) \cdots \psi_d(x_d)`, where :math:`\psi_i` is a matrix
      :math:`r_i \times r_{i+1}` with :math:`r_1 = r_{d+1} = 1`; c_i is ``cores[i]``.

    Parameters, zero at the start:
        ``factors[i]`` (num_basis_i, rank), for ``"tucker"`` (frame_size_i, rank); ``frames[i]`` (num_basis_i,
        frame_size_i); ``cores[i]`` (r_i, num_basis_i, r_{i+1}).

    Args:
        bases: The basis of each axis; kinds and sizes may differ.
        decomposition: ``"cp"``, ``"tucker"`` or ``"tensor_train"``.
        rank: Number r of components; for a train the d - 1 inner ranks, or one number for all of them.
        frame_sizes: Sizes of the reduced bases, for ``"tucker"`` alone.
        dtype: Of the parameters.

    Raises:
        ValueError: If a basis is of another kind, the decomposition is unknown, or ranks or frame sizes are not its.

    Source: arXiv 2603.12244, eq. 1 and 2; I. Oseledets, SIAM J. Sci. Comput. 33 (2011), for trains.
    """

    def __init__(
        self,
        bases: Sequence[FieldBasis],
        *,
        decomposition: str = "cp",
        rank: int | Sequence[int],
        frame_sizes: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float64,
    ):
        super().__init__()
        self.bases, self.decomposition = tuple(bases), decomposition
        for i, basis in enumerate(self.bases):
            if not isinstance(basis, FieldBasis):
                raise ValueError(f"bases[{i}] is a {type(basis).__name__}; expected one of {FieldBasis}.")
        if not self.bases:
            raise ValueError("bases is empty; give a basis for each axis.")
        if decomposition not in DECOMPOSITIONS:
            raise ValueError(f"decomposition = {decomposition!r}; expected one of {DECOMPOSITIONS}.")
        if (frame_sizes is not None) != (decomposition == "tucker"):
            raise ValueError(
                f"frame_sizes = {frame_sizes} with decomposition = {decomposition!r}; 'tucker' takes one for each "
                "axis, the others none."
            )
        num_basis = [basis.num_basis for basis in self.bases]
        if decomposition == "tensor_train":
            inner = [rank] * (self.num_axes - 1) if isinstance(rank, int) else list(rank)
            if len(inner) != self.num_axes - 1:
                raise ValueError(f"rank = {rank} for {self.num_axes} axes; expected {self.num_axes - 1} inner ranks.")
            check_counts(**{f"rank[{i}]": r for i, r in enumerate(inner)})
            self.cores = _zeros(zip([1, *inner], num_basis, [*inner, 1], strict=True), dtype)
            return
        check_counts(rank=rank)
        assert isinstance(rank, int), "as just checked"
        if frame_sizes is not None:
            if len(frame_sizes) != self.num_axes:
                raise ValueError(f"frame_sizes = {frame_sizes} for {self.num_axes} axes; expected one for each.")
            check_counts(**{f"frame_sizes[{i}]": m for i, m in enumerate(frame_sizes)})
            for i, (m, n) in enumerate(zip(frame_sizes, num_basis, strict=True)):
                if m > n:
                    raise ValueError(f"frame_sizes[{i}] = {m}; expected at most the {n} functions of its axis.")
            self.frames = _zeros(zip(num_basis, frame_sizes, strict=True), dtype)
        rows = frame_sizes or num_basis
        self.factors = _zeros([(n, rank) for n in rows], dtype)

    @property
    def num_axes(self) -> int:
        """Number d of axes."""
        return len(self.bases)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.parameters()).dtype

    @property
    def is_train(self) -> bool:
        """Whether the form is a tensor train."""
        return self.decomposition == "tensor_train"

    def num_parameters(self) -> int:
        """Number of entries of all parameters."""
        return sum(p.numel() for p in self.parameters())

    def coefficients(self) -> list[Tensor]:
        """The c_i of the whole bases: (num_basis_i, rank) each, for a train ``cores`` (r_i, num_basis_i, r_{i+1})."""
        if self.is_train:
            return list(self.cores)
        if self.decomposition == "tucker":
            return [frame @ factor for frame, factor in zip(self.frames, self.factors, strict=True)]
        return list(self.factors)

    def forward(self, points: Tensor) -> Tensor:
        """Evaluates u at the points: (..., d) -> (...). Differentiable in the points and the parameters.

        Raises:
            ValueError: If a point is NaN or outside the box, or the points have another width or dtype than the field.
        """
        points = check_points(points, self.bases, self.dtype)
        coefficients = self.coefficients()
        values = by_blocks(lambda x: self._value(x, coefficients), points, _num_functions(coefficients))
        return values[..., 0]

    def value_and_gradient(self, points: Tensor) -> tuple[Tensor, Tensor]:
        r"""The field (...) and :math:`\partial u / \partial x_i` (..., d), in closed form.

        The gradient has the units of u over those of x. At a knot where a derivative jumps it is the limit from the
        right. Raises as :meth:`forward`.
        """
        points = check_points(points, self.bases, self.dtype)
        coefficients = self.coefficients()
        both = by_blocks(lambda x: self._both(x, coefficients), points, 4 * _num_functions(coefficients))
        return both[..., 0], both[..., 1:]

    def gradient(self, points: Tensor) -> Tensor:
        """The second of :meth:`value_and_gradient`: (..., d) -> (..., d)."""
        return self.value_and_gradient(points)[1]

    def reference_forward(self, points: Tensor) -> Tensor:
        """The formula as written, with the whole basis of each axis: the oracle of :meth:`forward`."""
        dense = [basis.dense(points[..., i]) for i, basis in enumerate(self.bases)]
        pairs = zip(dense, self.coefficients(), strict=True)
        if self.is_train:
            product = reduce(torch.matmul, [torch.einsum("...b,rbs->...rs", *pair) for pair in pairs])
            return product[..., 0, 0]
        return reduce(torch.mul, [values @ coefficient for values, coefficient in pairs]).sum(-1)

    def _functions(self, x: Tensor, coefficients: Sequence[Tensor], derivative: int = 0) -> list[Tensor]:
        """psi_i at points (points, d): (points, rank) each, for a train (points, r_i, r_{i+1})."""
        functions = []
        for i, (basis, coefficient) in enumerate(zip(self.bases, coefficients, strict=True)):
            if self.is_train:
                coefficient = coefficient.transpose(0, 1)
            if isinstance(basis, UniformBSpline):
                values = local_sum(x[:, i : i + 1], coefficient.unsqueeze(0), [basis], derivative, check=False)[0]
            else:
                values = torch.tensordot(basis.dense(x[:, i], derivative, check=False), coefficient, 1)
            functions.append(values)
        return functions

    def _value(self, x: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
        """The value, (points, 1)."""
        psi = self._functions(x, coefficients)
        if self.is_train:
            return reduce(torch.matmul, psi)[:, 0]
        return pairwise_product(torch.stack(psi)).sum(-1, keepdim=True)

    def _both(self, x: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
        """The value and then the gradient, (points, 1 + d)."""
        psi, slope = (self._functions(x, coefficients, order) for order in (0, 1))
        if self.is_train:
            rows = list(accumulate(psi, torch.matmul))  # (points, 1, r_{i+1})
            columns = list(accumulate(reversed(psi), lambda column, matrix: matrix @ column))[::-1]  # (points, r_i, 1)
            terms = [rows[-1]]
            for i, matrix in enumerate(slope):
                matrix = matrix if i == 0 else rows[i - 1] @ matrix
                terms.append(matrix if i == self.num_axes - 1 else matrix @ columns[i + 1])
            return torch.cat(terms, -1)[:, 0]
        psi, slope = torch.stack(psi), torch.stack(slope)
        others = products_of_others(psi)
        return torch.cat([psi[:1] * others[:1], slope * others]).sum(-1).mT

    def restrict(self, values: Mapping[int, float]) -> SeparableField:
        """The field of the remaining axes, with axis i held at ``values[i]``; its parameters are new ones.

        Raises:
            ValueError: If an axis is unknown, a value lies outside its interval, or no axis remains.
        """
        self._check_axes(values, "restrict", "call the field at the point")
        point = [values.get(i, basis.low) for i, basis in enumerate(self.bases)]
        check_points(torch.tensor(point, dtype=torch.float64), self.bases, torch.float64)
        at = {i: torch.tensor(float(value), dtype=torch.float64) for i, value in values.items()}
        return self._contract({i: self.bases[i].dense(x, check=False) for i, x in at.items()})

    def integrate(self, axes: Iterable[int]) -> SeparableField:
        """The field of the remaining axes, integrated over the intervals of ``axes``; its parameters are new ones.

        Raises:
            ValueError: If an axis is unknown or no axis remains.
        """
        axes = set(axes)
        self._check_axes(axes, "integrate", "call `integral()`")
        return self._contract({i: _integrals(self.bases[i]) for i in axes})

    @torch.no_grad()
    def integral(self) -> Tensor:
        """The integral over the whole box, a number ()."""
        last = self if self.num_axes == 1 else self.integrate(range(1, self.num_axes))
        coefficient = last.coefficients()[0]
        return (_integrals(self.bases[0]).to(coefficient) @ coefficient.reshape(self.bases[0].num_basis, -1)).sum()

    @torch.no_grad()
    def inner(self, other: SeparableField) -> Tensor:
        r"""The inner product :math:`\int u(x)\, v(x)\, dx` over the box, a number (), in either field's form.

        From Gram matrices of one axis at a time, in time linear in d.

        Raises:
            ValueError: If the fields have other bases.
        """
        if self.bases != other.bases:
            raise ValueError("the fields have different bases; an inner product needs the same ones on every axis.")
        pairs = list(zip(self.coefficients(), other.coefficients(), strict=True))
        left, right = pairs[0]
        state = left.new_ones(1 if self.is_train else left.shape[-1], 1 if other.is_train else right.shape[-1])
        for basis, (left, right) in zip(self.bases, pairs, strict=True):
            weighted = torch.einsum("nm,...mr->...nr", gram(basis).to(right), right)
            state = _transfer(state, left, weighted)
        return state.sum()

    def norm(self) -> Tensor:
        r"""The L2 norm :math:`(\int u^2 dx)^{1/2}` over the box, a number ().

        Where components cancel, rounding is relative to the largest of them.
        """
        return self.inner(self).clamp_min(0).sqrt()

    def _check_axes(self, axes: Collection[int], verb: str, remedy: str) -> None:
        for axis in axes:
            if not isinstance(axis, int) or not 0 <= axis < self.num_axes:
                raise ValueError(f"axis {axis!r} is unknown; expected an index from 0 to {self.num_axes - 1}.")
        if not axes:
            raise ValueError(f"{verb} was given no axis; expected at least one.")
        if len(axes) == self.num_axes:
            raise ValueError(f"{verb} was given all {self.num_axes} axes; leave one, or {remedy} for a number.")

    @torch.no_grad()
    def _contract(self, vectors: Mapping[int, Tensor]) -> SeparableField:
        """Sums the basis functions of some axes with weights (num_basis_i,)."""
        coefficients = self.coefficients()
        vectors = {i: vector.to(coefficients[i]) for i, vector in vectors.items()}
        kept = [i for i in range(self.num_axes) if i not in vectors]
        bases = [self.bases[i] for i in kept]
        if not self.is_train:
            factors = [self.factors[i] for i in kept]
            factors[0] = factors[0] * reduce(torch.mul, [vector @ coefficients[i] for i, vector in vectors.items()])
            return self._with(
                bases, factors, [self.frames[i] for i in kept] if self.decomposition == "tucker" else None
            )
        cores, carry = [], torch.eye(1).to(coefficients[0])
        for core, vector in zip(coefficients, map(vectors.get, range(self.num_axes)), strict=True):
            core = torch.tensordot(carry, core, 1)
            if vector is None:
                cores.append(core)
                carry = torch.eye(core.shape[2]).to(core)
            else:
                carry = torch.einsum("anb,n->ab", core, vector)
        cores[-1] = cores[-1] @ carry
        return self._with(bases, cores)

    def _with(
        self, bases: Sequence[FieldBasis], tensors: Sequence[Tensor], frames: Sequence[Tensor] | None = None
    ) -> SeparableField:
        """A field of this form with copies of other factors or cores."""
        field = SeparableField(
            bases,
            decomposition=self.decomposition,
            rank=[core.shape[2] for core in tensors[:-1]] if self.is_train else tensors[0].shape[1],
            frame_sizes=None if frames is None else [frame.shape[1] for frame in frames],
            dtype=self.dtype,
        ).to(tensors[0].device)
        parameters = [*(field.cores if self.is_train else field.factors), *(field.frames if frames else ())]
        for parameter, tensor in zip(parameters, [*tensors, *(frames or ())], strict=True):
            parameter.copy_(tensor)
        return field

    def extra_repr(self) -> str:
        """The form and the bases."""
        return f"decomposition={self.decomposition!r}, bases={self.bases}"


def _zeros(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes)


def _num_functions(coefficients: Sequence[Tensor]) -> int:
    """How many functions of one axis a point needs."""
    return sum(coefficient.numel() // coefficient.shape[-2] for coefficient in coefficients)


def _integrals(basis: FieldBasis) -> Tensor:
    """The integrals of the basis functions over the interval, (num_basis,)."""
    points, weights = gauss(basis)
    return weights @ basis.dense(points, check=False)


def _transfer(state: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """One axis of an inner product: ``state`` (r, q) joins the bonds of two fields on this axis's left.

    ``left`` and ``right`` are cores (r_i, num_basis, r_{i+1}) or factors (num_basis, rank): their bond is the
    component.
    """
    if left.ndim == right.ndim == 2:
        return state * (left.mT @ right)
    if left.ndim == 2:
        return _transfer(state.mT, right, left).mT
    partial = torch.tensordot(state, left, ([0], [0]))  # (q, num_basis, r')
    return torch.einsum("cnb,nc->bc" if right.ndim == 2 else "cnb,cnd->bd", partial, right)
