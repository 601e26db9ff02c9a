r"""The whole class of separable networks: functions of subsets of the inputs, added up.

The atom of a subset is a sum of products of functions of one input, in one of the decompositions of ``DECOMPOSITIONS``.
The canonical polyadic class alone, with B-splines, has a faster home: :class:`~sna_core.network.CPNetwork`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from sna_core.bspline import UniformBSpline
from sna_core.interaction import InteractionObject, Subset
from sna_core.local_sum import check_points, local_sum
from sna_core.network import activation_function, by_blocks, check_counts, pairwise_product
from sna_core.spectral import Basis, constant_coefficients

MAX_CORE_NUMEL = 2**24  # entries of the Tucker core of one subset and output


class SubsetAtoms(nn.Module):
    r"""Atoms :math:`\phi^{(S)}_o(x_S)` of all subsets S of one size, evaluated together.

    Position p of a subset is that of its p-th input. Parameters have the dimensions n (subsets), p (positions),
    b (``num_basis``), o (``num_outputs``) and r (``rank``).

    Args:
        subsets: Their inputs, all of one size.
        bases: The basis of each input of the network, all of one ``num_basis``.
        num_outputs: Number of functions of each subset.
        rank: r.
        std: Standard deviation of an atom's values at the start, up to a factor between 1 and sqrt(e).
        device: Of the parameters.
        dtype: Of the parameters.
    """

    min_size = 1  # below it the decomposition is no other than CP

    def __init__(
        self,
        subsets: Sequence[Subset],
        bases: Sequence[Basis],
        num_outputs: int,
        rank: int,
        std: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.subsets, self.bases, self.std = tuple(subsets), tuple(bases), std
        self.num_outputs, self.rank, self.size = num_outputs, rank, len(subsets[0])
        for name, shape in self._shapes(len(subsets), bases[0].num_basis).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def _shapes(self, num_subsets: int, num_basis: int) -> dict[str, tuple[int, ...]]:
        return {"factors": (num_subsets, self.size, num_basis, self.num_outputs, self.rank)}

    def reset_parameters(self) -> None:
        """Draws the parameters anew: products of functions near one, with weights of mean zero."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The atoms at points known to lie inside: (points, num_inputs) -> (subsets, points, num_outputs)."""
        raise NotImplementedError

    def reference(self, n: int, bases: Sequence[Tensor]) -> Tensor:
        """The n-th subset's atom as written, from its inputs' bases (points, num_basis): (points, num_outputs)."""
        raise NotImplementedError

    def functions(self, x: Tensor, factors: Tensor, positions: slice = slice(None)) -> Tensor:
        """Functions of the inputs at some positions: x (points, d), factors (n, p, b, ...) -> (p, n, points, ...)."""
        index = [i for subset in self.subsets for i in subset[positions]]
        sums = univariate_sums(x, index, factors.flatten(0, 1), self.bases)
        return sums.unflatten(0, factors.shape[:2]).transpose(0, 1)

    @torch.no_grad()
    def _draw(
        self, factors: Tensor, variance: float, positions: slice = slice(None), mean: Tensor | float = 1.0
    ) -> None:
        """Fills factors (n, p, b, o, ...) with functions whose values have this mean and at most this variance."""
        index = torch.tensor([subset[positions] for subset in self.subsets], device=factors.device)
        one = factors.new_tensor([constant_coefficients(basis) for basis in self.bases])[index]
        one = one.view(*factors.shape[:3], *[1] * (factors.ndim - 3))
        # The squares of B-splines sum to at most 1, those of the other bases to at most num_basis. The coefficients of
        # the function one tell them apart: their mean is 1 or 1 / num_basis.
        spread = (variance * one.mean(2, keepdim=True)).sqrt()
        factors.normal_().mul_(spread).add_(one * mean)

    @torch.no_grad()
    def _weight(self, factors: Tensor) -> None:
        """Multiplies functions (n, b, o, r) by weights of mean zero, one for each output and component."""
        factors.mul_(torch.empty_like(factors[:, :1]).normal_(0.0, self.std * self.rank**-0.5))

    def extra_repr(self) -> str:
        """What the parameters' shapes do not tell."""
        return f"num_subsets={len(self.subsets)}, size={self.size}, num_outputs={self.num_outputs}, rank={self.rank}"


class CPAtoms(SubsetAtoms):
    r"""Canonical polyadic atoms: :math:`\phi(x_S) = \sum_{j=1}^r \prod_p \psi_p^{(j)}(x_{s_p})`.

    Parameter: ``factors`` (n, p, b, o, r). For a single input and rank 1 this is any function of it.
    """

    factors: nn.Parameter

    def reset_parameters(self) -> None:
        """Draws the factors as :class:`~sna_core.network.CPNetwork` does with unit weights."""
        self._draw(self.factors, 1 / self.size)
        self._weight(self.factors[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """The atoms: (points, num_inputs) -> (subsets, points, num_outputs)."""
        return pairwise_product(self.functions(x, self.factors)).sum(-1)

    def reference(self, n: int, bases: Sequence[Tensor]) -> Tensor:
        """The formula as written."""
        psi = [torch.einsum("zb,bor->zor", *pair) for pair in zip(bases, self.factors[n], strict=True)]
        return reduce(torch.mul, psi).sum(-1)


class TuckerAtoms(SubsetAtoms):
    r"""Tucker's atoms: :math:`\phi(x_S) = \sum_{j_1 \dots j_m} G_{j_1 \dots j_m} \prod_p \psi_p^{(j_p)}(x_{s_p})`.

    Parameters: ``factors`` (n, p, b, o, r) and ``core`` G, (n, o, r, ..., r) with an r for each input.

    Raises:
        ValueError: If the core is too large.
    """

    min_size = 2
    factors: nn.Parameter
    core: nn.Parameter

    def _shapes(self, num_subsets: int, num_basis: int) -> dict[str, tuple[int, ...]]:
        if self.rank**self.size > MAX_CORE_NUMEL:
            raise ValueError(
                f"a Tucker core of rank {self.rank} over {self.size} inputs has {self.rank**self.size} entries; lower "
                "the rank or the interaction order, or choose decomposition = 'tensor_train'."
            )
        core = (num_subsets, self.num_outputs, *[self.rank] * self.size)
        return super()._shapes(num_subsets, num_basis) | {"core": core}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws functions about one and a core of mean zero."""
        self._draw(self.factors, 1 / self.size)
        self.core.normal_(0.0, self.std * self.rank ** (-self.size / 2))

    def forward(self, x: Tensor) -> Tensor:
        """The atoms: (points, num_inputs) -> (subsets, points, num_outputs)."""
        *others, last = self.functions(x, self.factors)  # of each position (n, points, o, r)
        total = torch.einsum("noar,nzor->nzoa", self.core.flatten(2, -2), last)
        for psi in reversed(others):
            total = torch.einsum("nzoar,nzor->nzoa", total.unflatten(-1, (-1, self.rank)), psi)
        return total.squeeze(-1)

    def reference(self, n: int, bases: Sequence[Tensor]) -> Tensor:
        """The formula as written."""
        total = self.core[n].expand(len(bases[0]), *self.core.shape[1:])  # (points, o, r, ..., r)
        for basis, factors in zip(bases, self.factors[n], strict=True):
            total = torch.einsum("zor...,zb,bor->zo...", total, basis, factors)
        return total


class TensorTrainAtoms(SubsetAtoms):
    r"""Trains of matrices of functions: :math:`\phi(x_S) = G_1(x_{s_1}) G_2(x_{s_2}) \cdots G_m(x_{s_m})`.

    :math:`G_1` is a row, :math:`G_m` a column, those between are r times r. Of two inputs this is CP.

    Parameters: ``ends`` (n, 2, b, o, r), the row's and the column's, and ``matrices`` (n, p - 2, b, o, r, r).
    """

    min_size = 3
    ends: nn.Parameter
    matrices: nn.Parameter

    def _shapes(self, num_subsets: int, num_basis: int) -> dict[str, tuple[int, ...]]:
        outer, inner = (num_basis, self.num_outputs, self.rank), (num_basis, self.num_outputs, self.rank, self.rank)
        return {"ends": (num_subsets, 2, *outer), "matrices": (num_subsets, self.size - 2, *inner)}

    def reset_parameters(self) -> None:
        """Draws matrices about the identity, whose row and column are CP's."""
        self._draw(self.ends, 1 / self.size, slice(None, None, self.size - 1))
        self._weight(self.ends[:, 0])
        identity = torch.eye(self.rank, device=self.matrices.device, dtype=self.matrices.dtype)
        self._draw(self.matrices, 1 / (self.size * self.rank), slice(1, -1), identity)

    def forward(self, x: Tensor) -> Tensor:
        """The atoms: (points, num_inputs) -> (subsets, points, num_outputs)."""
        row, column = self.functions(x, self.ends, slice(None, None, self.size - 1))
        for matrix in self.functions(x, self.matrices, slice(1, -1)):
            row = torch.einsum("nzoa,nzoab->nzob", row, matrix)
        return (row * column).sum(-1)

    def reference(self, n: int, bases: Sequence[Tensor]) -> Tensor:
        """The formula as written."""
        row, column = (torch.einsum("zb,bor->zor", bases[p], self.ends[n, p]) for p in (0, -1))
        train = [torch.einsum("zb,bors->zors", *pair) for pair in zip(bases[1:-1], self.matrices[n], strict=True)]
        return reduce(torch.matmul, [row.unsqueeze(-2), *train, column.unsqueeze(-1)]).flatten(1)


DECOMPOSITIONS = {"cp": CPAtoms, "tucker": TuckerAtoms, "tensor_train": TensorTrainAtoms}


def univariate_sums(x: Tensor, index: Sequence[int], factors: Tensor, bases: Sequence[Basis]) -> Tensor:
    r"""Evaluates :math:`\sum_b \alpha_{qb} B_b(x_{i_q})` for every entry q of an index of inputs.

    Args:
        x: Points (points, num_inputs), known to lie in their intervals.
        index: An input for each q.
        factors: :math:`\alpha`, (q, num_basis, ...).
        bases: The basis of each input.

    Returns:
        (q, points, ...).
    """
    splines = [basis for basis in (bases[i] for i in index) if isinstance(basis, UniformBSpline)]
    if len(splines) == len(index) and len({spline.degree for spline in splines}) == 1:
        return local_sum(x[:, index], factors, splines, check=False)
    dense = {i: bases[i].dense(x[:, i], check=False) for i in set(index)}
    sums = torch.bmm(torch.stack([dense[i] for i in index]), factors.flatten(2))
    return sums.unflatten(-1, factors.shape[2:])


class SeparableNetwork(nn.Module):
    r"""A separable network: a sum of atoms of the subsets that an interaction object names.

    .. math::
        f_o(x) = \rho\Big(\sum_{S \in \operatorname{Supp}(C)} c_{oS}\, \phi^{(S)}_o(x_S)\Big)

    (arXiv 2603.12244, eq. 4). The families of the paper are :meth:`additive` (k = 1), :meth:`pairwise` (k = 2) and,
    with the single subset of all inputs (k = d), :meth:`cp`, :meth:`tucker` and :meth:`tensor_train`. Constants need no
    subset of their own: every basis contains them.

    Parameters:
        ``atoms``, one :class:`SubsetAtoms` for each size of subset, and ``coefficients`` c, (num_outputs, num_subsets),
        in the order of ``interaction.subsets``; a buffer where they are fixed. Bases may have parameters too.

    At the start the coefficients are those of the interaction object, the same for every output, and f before the
    activation has mean 0 and a variance of about 1 to e.

    Args:
        interaction: The subsets and their first coefficients.
        bases: A basis for each input, all of one ``num_basis``. Atoms share their input's basis.
        num_outputs: Number of functions f_o.
        rank: Rank r of the atoms of more than one input.
        decomposition: Of those atoms: ``"cp"``, ``"tucker"`` or ``"tensor_train"``.
        learn_coefficients: Whether c is a parameter.
        activation: :math:`\rho`: None for the identity, a name in ``ACTIVATIONS``, or a callable.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: If the bases do not fit the interaction object, one another or the dtype, a count is below 1, the
            decomposition or the activation is unknown, or a Tucker core would be too large.

    ```python
    >>> from sna_core.separable import SeparableNetwork
    >>> from sna_core.spectral import make_basis

    >>> network = SeparableNetwork.pairwise([make_basis("legendre", num_basis=6)] * 4, rank=3)
    ```
    """

    coefficients: Tensor

    def __init__(
        self,
        interaction: InteractionObject,
        bases: Sequence[Basis],
        num_outputs: int = 1,
        *,
        rank: int,
        decomposition: str = "cp",
        learn_coefficients: bool = True,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if len(bases) != interaction.num_inputs:
            raise ValueError(f"{len(bases)} bases for {interaction.num_inputs} inputs; give one for each.")
        if len(counts := {basis.num_basis for basis in bases}) > 1:
            raise ValueError(f"the bases have num_basis {sorted(counts)}; expected one number for all inputs.")
        check_counts(num_outputs=num_outputs, rank=rank)
        if decomposition not in DECOMPOSITIONS:
            raise ValueError(f"decomposition = {decomposition!r}; expected one of {sorted(DECOMPOSITIONS)}.")
        self.interaction, self.bases = interaction, tuple(bases)
        self.num_inputs, self.num_outputs, self.rank = interaction.num_inputs, num_outputs, rank
        self.decomposition = decomposition
        self.activation = activation_function(activation)
        self.learned_bases = nn.ModuleList(basis for basis in self.bases if isinstance(basis, nn.Module))

        std = sum(c**2 for _, c in interaction.coefficients) ** -0.5
        self.atoms = nn.ModuleList()
        for size, subsets in groupby(interaction.subsets, len):
            wanted = DECOMPOSITIONS[decomposition]
            kind = wanted if size >= wanted.min_size else CPAtoms
            # A sum of functions of one input is one.
            own_rank = rank if size > 1 else 1
            self.atoms.append(kind(list(subsets), bases, num_outputs, own_rank, std, device=device, dtype=dtype))
        coefficients = torch.empty(num_outputs, len(interaction.subsets), device=device, dtype=dtype)
        if learn_coefficients:
            self.coefficients = nn.Parameter(coefficients)
        else:
            self.register_buffer("coefficients", coefficients)
        for basis in self.learned_bases:
            if (given := next(basis.parameters()).dtype) != coefficients.dtype:
                raise ValueError(
                    f"a learned basis is {given} and the network {coefficients.dtype}; convert the basis with "
                    f".to({coefficients.dtype})."
                )
        self.reset_coefficients()

    @torch.no_grad()
    def reset_coefficients(self) -> None:
        """Sets c to the interaction object's coefficients."""
        self.coefficients.copy_(self.coefficients.new_tensor([c for _, c in self.interaction.coefficients]))

    def reset_parameters(self) -> None:
        """Draws the parameters anew, as the class says, those of the bases included."""
        for module in [*self.atoms, *self.learned_bases]:
            module.reset_parameters()
        self.reset_coefficients()

    def forward(self, x: Tensor, *, check: bool = True) -> Tensor:
        """Evaluates f at the points x: (..., num_inputs) -> (..., num_outputs), for a single output (..., 1).

        Differentiable any number of times, in x and in the parameters. ``check=False`` leaves out the look at every
        value of x; the caller then vouches that x lies in the intervals.

        Raises:
            ValueError: If a point is NaN or outside its interval, or x has another width or dtype than the network.
        """
        x = check_points(x, self.bases, self.coefficients.dtype, inside=check)
        # About the values that a point needs at one time: a function of one input has num_basis coefficients.
        numel = sum(p.numel() for p in self.atoms.parameters()) // self.bases[0].num_basis
        return by_blocks(self._evaluate, x, numel)

    def _evaluate(self, x: Tensor) -> Tensor:
        """Values at points (points, num_inputs) that are known to lie inside: (points, num_outputs)."""
        atoms = torch.cat([atoms(x) for atoms in self.atoms])  # (subsets, points, num_outputs)
        total = torch.einsum("os,szo->zo", self.coefficients, atoms)
        return total if self.activation is None else self.activation(total)

    def reference_forward(self, x: Tensor) -> Tensor:
        """The formula as written, subset by subset: the oracle of :meth:`forward`."""
        points = x.reshape(-1, self.num_inputs)
        phi = []
        for atoms in self.atoms:
            assert isinstance(atoms, SubsetAtoms)
            for n, subset in enumerate(atoms.subsets):
                phi.append(atoms.reference(n, [self.bases[i].dense(points[:, i]) for i in subset]))
        terms = [c * values for c, values in zip(self.coefficients.unbind(1), phi, strict=True)]
        total = reduce(torch.add, terms).view(*x.shape[:-1], self.num_outputs)
        return total if self.activation is None else self.activation(total)

    @classmethod
    def additive(cls, bases: Sequence[Basis], num_outputs: int = 1, **options: Any) -> SeparableNetwork:
        r"""A generalised additive model, :math:`\rho(\sum_i c_i \psi_i(x_i))`; options as of the class, less rank."""
        return cls(InteractionObject.additive(len(bases)), bases, num_outputs, rank=1, **options)

    @classmethod
    def pairwise(cls, bases: Sequence[Basis], num_outputs: int = 1, *, rank: int, **options: Any) -> SeparableNetwork:
        r"""A generalised quadratic model: all single inputs and all pairs."""
        return cls(InteractionObject.pairwise(len(bases)), bases, num_outputs, rank=rank, **options)

    @classmethod
    def cp(cls, bases: Sequence[Basis], num_outputs: int = 1, *, rank: int, **options: Any) -> SeparableNetwork:
        """A canonical polyadic network (eq. 7): one atom of all inputs."""
        return cls(InteractionObject.full(len(bases)), bases, num_outputs, rank=rank, **options)

    @classmethod
    def tucker(cls, bases: Sequence[Basis], num_outputs: int = 1, *, rank: int, **options: Any) -> SeparableNetwork:
        """A Tucker network: one atom of all inputs with a full core."""
        return cls.cp(bases, num_outputs, rank=rank, decomposition="tucker", **options)

    @classmethod
    def tensor_train(
        cls, bases: Sequence[Basis], num_outputs: int = 1, *, rank: int, **options: Any
    ) -> SeparableNetwork:
        """A tensor train of functions: one atom of all inputs."""
        return cls.cp(bases, num_outputs, rank=rank, decomposition="tensor_train", **options)

    def extra_repr(self) -> str:
        """The settings that the parameters' shapes do not tell."""
        activation = getattr(self.activation, "__name__", self.activation)
        return (
            f"num_inputs={self.num_inputs}, num_outputs={self.num_outputs}, rank={self.rank}, "
            f"interaction_order={self.interaction.interaction_order}, decomposition={self.decomposition}, "
            f"activation={activation}"
        )
