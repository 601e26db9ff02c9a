r"""Newton's linearisation of products of terms in the unknown, with a rough derivative.

.. math::
    (P u)(Q u) \approx (P c)(Q u) + (P u)(Q c) - (P c)(Q \tilde u) - (P \tilde u)(Q c) + (P \tilde u)(Q \tilde u)

about a sum of products :math:`\tilde u` near the last iterate. In the derivative, whose cost grows with the square of
its components, stands one of few, c. The error that is left is about the product of :math:`u - \tilde u` and
:math:`\tilde u - c`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from sna_core.discretisation import Space
from sna_core.forms import Components
from sna_core.operators import Operator, Problem, Term, multiply


@dataclass(frozen=True, eq=False)
class _Along:
    """An operator applied to one component's function of an axis."""

    space: Space
    operator: Operator
    coefficients: Tensor  # (num_basis,)

    def __call__(self, x: Tensor) -> Tensor:
        orders = enumerate(self.operator.coefficients(x))
        return reduce(torch.add, [c * (self.space.basis.dense(x, n) @ self.coefficients) for n, c in orders])


def linearised(
    problem: Problem, spaces: Sequence[Space], rough: Components, about: Components
) -> tuple[list[Term], list[Term]]:
    """Terms of the operator and of the source that take the place of the nonlinear part.

    Args:
        problem: Its products are linearised.
        spaces: Of its axes.
        rough: c, in the axes' own bases.
        about: What the products are linearised about, likewise.
    """
    operator, source = [], []
    for product in problem.nonlinear:
        for p in problem.separated([product.left]):
            for q in problem.separated([product.right]):
                scale = p.number * q.number
                rough_p, rough_q, about_p, about_q = (
                    _applied(term, spaces, at) for at in (rough, about) for term in (p, q)
                )
                operator += [_term(scale, spaces, functions, _operators(q, spaces)) for functions in rough_p]
                operator += [_term(scale, spaces, functions, _operators(p, spaces)) for functions in rough_q]
                for sign, left, right in ((1, rough_p, about_q), (1, about_p, rough_q), (-1, about_p, about_q)):
                    source += [_term(sign * scale, spaces, a, b) for a in left for b in right]
    return operator, source


def _operators(term: Term, spaces: Sequence[Space]) -> list[Operator]:
    return [term.operators.get(space.axis.name, Operator()) for space in spaces]


def _applied(term: Term, spaces: Sequence[Space], about: Components) -> list[list[Operator]]:
    """For each component and axis the multiplication by what the term makes of it."""
    by_axis = [
        [multiply(_Along(space, operator, column)) for column in factor.mT]
        for space, operator, factor in zip(spaces, _operators(term, spaces), about.factors, strict=True)
    ]
    return [list(functions) for functions in zip(*by_axis, strict=True)]


def _term(scale: float, spaces: Sequence[Space], outer: Sequence[Operator], inner: Sequence[Operator]) -> Term:
    return Term(scale, **{s.axis.name: a * b for s, a, b in zip(spaces, outer, inner, strict=True)})
