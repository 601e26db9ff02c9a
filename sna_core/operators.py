r"""Differential equations written as sums of products of operators of one input each.

.. math::
    \sum_k c_k \bigotimes_i A_k^{(i)} u + \sum_m (P_m u)(Q_m u) = f

A :class:`Problem` holds the axes of space, time and parameters, the terms of the operator, and the source, boundary and
initial data, each a sum of separable terms. The heat equation for every diffusivity at once:

```python
>>> import torch
>>> from sna_core import Axis, Problem, Term, derivative, multiply

>>> heat = Problem(
...     axes=[
...         Axis("x", 0, 1, num_cells=32, boundary="dirichlet"),
...         Axis("t", 0, 1, num_cells=32),
...         Axis("nu", 1e-3, 1e-2, num_cells=8),
...     ],
...     operator=[Term(t=derivative(1)), Term(-1.0, nu=multiply(lambda nu: nu), x=derivative(2))],
...     initial={"t": [Term(x=multiply(lambda x: torch.sin(torch.pi * x)))]},
... )
```

Coefficients that are no products of functions of one axis may be given as functions of several; they are compressed by
:func:`sna_core.cross.separate`, to :attr:`Problem.compression` of their largest value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor

from sna_core.axis import Axis
from sna_core.cross import separate

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Operator:
    """A product of derivatives and multiplications along one axis, the outermost first; ``*`` composes two."""

    factors: tuple[int | Function, ...] = ()

    def __mul__(self, inner: Operator) -> Operator:
        if not isinstance(inner, Operator):
            raise ValueError(f"an operator times {inner!r}; write multiply(f) for the multiplication by a function.")
        return Operator(self.factors + inner.factors)

    @property
    def order(self) -> int:
        """Of the highest derivative."""
        return sum(factor for factor in self.factors if isinstance(factor, int))

    @property
    def is_function(self) -> bool:
        """Whether it only multiplies."""
        return self.order == 0

    def coefficients(self, x: Tensor) -> list[Tensor]:
        r"""The :math:`c_n(x)` (points,) of :math:`\sum_n c_n \frac{d^n}{dx^n}`, one for each order up to the highest.

        Products with a derivative to the left of a function follow Leibniz's rule; f' is taken by autograd.

        Raises:
            ValueError: If a function does not give one finite value for each point.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            zero, found = torch.zeros_like(x), [torch.ones_like(x)]
            for n, factor in reversed(list(enumerate(self.factors))):
                if isinstance(factor, int):
                    for _ in range(factor):
                        found = [a + b for a, b in zip([*map(_slope(x), found), zero], [zero, *found], strict=True)]
                else:
                    differentiated = any(isinstance(left, int) for left in self.factors[:n])
                    values = _values_of(factor, x if differentiated else x.detach())
                    found = [values * c for c in found]
        return [c.detach() for c in found]

    def values(self, x: Tensor) -> Tensor:
        """Of an operator that only multiplies: its function at x."""
        return self.coefficients(x)[0]

    def describe(self, name: str) -> str:
        """As text, such as ``f(x) d/dx``."""
        parts = []
        for factor in self.factors:
            if isinstance(factor, int):
                parts.append(f"d/d{name}" if factor == 1 else f"d^{factor}/d{name}^{factor}")
            else:
                parts.append(f"f({name})")
        return " ".join(parts)


def derivative(order: int) -> Operator:
    """The derivative of that order, at least 1, along an axis.

    Raises:
        ValueError: If the order is no integer of at least 1.
    """
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"derivative({order!r}); expected an integer of at least 1.")
    return Operator((order,))


def multiply(function: Function) -> Operator:
    """The multiplication by a function of one axis: tensor (points,) to tensor (points,).

    Raises:
        ValueError: If it is no function.
    """
    if not callable(function):
        raise ValueError(f"multiply({function!r}); expected a function; a number is the coefficient of a Term.")
    return Operator((function,))


class Term:
    """A coefficient times an operator on each axis; on axes that are not named, the identity.

    Args:
        coefficient: A number, or a function whose arguments are named after axes (those with a default are left
            alone). It stands to the left of all derivatives.
        **operators: By the name of the axis.

    Raises:
        ValueError: If the coefficient is neither, or an operator is none.
    """

    def __init__(self, coefficient: float | Function = 1.0, **operators: Operator):
        if not callable(coefficient) and not (isinstance(coefficient, int | float) and isfinite(coefficient)):
            raise ValueError(f"coefficient = {coefficient!r}; expected a finite number, or a function of named axes.")
        for name, operator in operators.items():
            if not isinstance(operator, Operator):
                raise ValueError(f"{name} = {operator!r}; expected derivative(n), multiply(f) or a product of such.")
        self.coefficient, self.operators = coefficient, operators

    def __repr__(self) -> str:
        named = [f"{name}={operator}" for name, operator in self.operators.items()]
        return f"Term({', '.join([repr(self.coefficient), *named])})"

    @property
    def names(self) -> set[str]:
        """Of the axes that it acts on."""
        return set(self.operators) | (set(_argument_names(self.coefficient)) if callable(self.coefficient) else set())

    @property
    def number(self) -> float:
        """The coefficient, where it is no function."""
        assert not callable(self.coefficient), "functions are taken apart first"
        return self.coefficient

    def describe(self, unknown: str = "") -> str:
        """As text."""
        scale = f"c({', '.join(_argument_names(self.coefficient))})" if callable(self.coefficient) else ""
        if not scale and (self.coefficient != 1 or not (self.operators or unknown)):
            scale = f"{self.coefficient:g}"
        parts = [scale, *(operator.describe(name) for name, operator in self.operators.items()), unknown]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Product:
    """The product (P u)(Q u) of two terms in the unknown: ``Product(Term(), Term(x=derivative(1)))`` is u u_x."""

    left: Term
    right: Term


Source = Sequence[Term] | Function
Ends = tuple[Sequence[Term] | None, Sequence[Term] | None]


@dataclass(frozen=True, eq=False)
class Problem:
    """An equation on a box, and the data that make its solution unique.

    Args:
        axes: Space, time and parameters, in the order of a point's columns.
        operator: Its terms.
        source: The right-hand side: terms of functions alone, or a function whose arguments are named after axes.
        boundary: By axis, the data at its low and high end, of the kind that the axis's ``boundary`` says; None, and an
            axis not named, stand for zero.
        initial: By axis, the value at its low end as terms of functions of the others; or a pair, value and derivative.
        nonlinear: Products of two terms in the unknown, which the left side has beside the operator.
        compression: Largest error of functions of several axes that are taken apart, as a fraction of their largest
            value.

    Raises:
        ValueError: If an axis is unknown or there twice, an axis has fewer conditions than the order of its
            derivatives, its degree cannot carry these, or data are not sums of functions.
    """

    axes: Sequence[Axis]
    operator: Sequence[Term]
    source: Source = ()
    boundary: Mapping[str, Ends] = field(default_factory=dict)
    initial: Mapping[str, Sequence[Term] | tuple[Sequence[Term], Sequence[Term]]] = field(default_factory=dict)
    nonlinear: Sequence[Product] = ()
    compression: float = 1e-8

    def __post_init__(self) -> None:
        if not all(isinstance(axis, Axis) for axis in self.axes):
            raise ValueError(f"axes = {self.axes!r}; expected a list of Axis.")
        names = self.names
        if not names or len(set(names)) < len(names):
            raise ValueError(f"the axes are named {names}; expected at least one, each with a name of its own.")
        for what, terms in (
            ("the operator", self.operator),
            ("the nonlinear part", [t for product in self.nonlinear for t in (product.left, product.right)]),
        ):
            _check_terms(what, terms)
            self._check_names(what, set().union(*(term.names for term in terms)))
        if not self.operator:
            raise ValueError("the operator has no terms; give at least one Term.")
        self._check_data("the source", self.source, set(names))
        for name, ends in self.boundary.items():
            self._check_names("boundary", {name})
            kinds = self.axis(name).ends
            if not isinstance(ends, tuple) or len(ends) != 2:
                raise ValueError(f"boundary[{name!r}] = {ends!r}; expected a pair of lists of terms, or None for zero.")
            for end, kind in zip(ends, kinds, strict=True):
                if end is not None and kind not in ("dirichlet", "neumann"):
                    raise ValueError(
                        f"boundary[{name!r}] has data for an end that is {kind!r}; set the axis's boundary to "
                        "'dirichlet' or 'neumann' there."
                    )
                self._check_data(f"boundary[{name!r}]", end or (), set(names) - {name})
        for name, data in self.initial.items():
            self._check_names("initial", {name})
            if self.axis(name).ends != ("free", "free"):
                raise ValueError(
                    f"initial[{name!r}] is given and axis {name!r} has boundary {self.axis(name).boundary!r}; an axis "
                    "with initial data is 'free'."
                )
            if isinstance(data, tuple) and len(data) != 2:
                raise ValueError(
                    f"initial[{name!r}] has {len(data)} parts; expected a list of Terms, or a pair of such: the value "
                    "and its derivative."
                )
            for terms in data if isinstance(data, tuple) else (data,):
                self._check_data(f"initial[{name!r}]", terms, set(names) - {name})
        for axis in self.axes:
            self._check_order(axis)

    @property
    def names(self) -> list[str]:
        """Of the axes."""
        return [axis.name for axis in self.axes]

    def axis(self, name: str) -> Axis:
        """The axis of that name; a ``ValueError`` if there is none."""
        self._check_names("the problem", {name})
        return self.axes[self.names.index(name)]

    def order(self, axis: Axis) -> int:
        """Of the highest derivative along an axis."""
        terms = [*self.operator, *(t for product in self.nonlinear for t in (product.left, product.right))]
        return max(term.operators.get(axis.name, Operator()).order for term in terms)

    def conditions(self, axis: Axis) -> list[tuple[str, int]]:
        """The end and the order of derivative of each linear condition on an axis, those of initial data included."""
        found = [
            (end, int(kind == "neumann"))
            for end, kind in zip(("low", "high"), axis.ends, strict=True)
            if kind in ("dirichlet", "neumann")
        ]
        if axis.name in self.initial:
            found += [("low", n) for n in range(2 if isinstance(self.initial[axis.name], tuple) else 1)]
        return found

    def data(self, axis: Axis) -> list[Sequence[Term]]:
        """The terms of each of the :meth:`conditions`."""
        initial = self.initial.get(axis.name)
        if initial is not None:
            return list(initial) if isinstance(initial, tuple) else [initial]
        ends = self.boundary.get(axis.name, (None, None))
        return [end or () for end, kind in zip(ends, axis.ends, strict=True) if kind in ("dirichlet", "neumann")]

    def separated(self, terms: Source) -> list[Term]:
        """The same sum with numbers for coefficients.

        Raises:
            ValueError: If a function of several axes does not compress to the tolerance.
        """
        if callable(terms):
            terms = [Term(terms)]
        found = []
        for term in terms:
            if not callable(term.coefficient):
                found.append(term)
                continue
            axes = [self.axis(name) for name in _argument_names(term.coefficient)]
            parts = separate(
                term.coefficient, [a.low for a in axes], [a.high for a in axes], tolerance=self.compression
            )
            for r in range(parts.rank):
                operators = dict(term.operators)
                for i, axis in enumerate(axes):
                    operators[axis.name] = multiply(parts.component(r, i)) * operators.get(axis.name, Operator())
                found.append(Term(1.0, **operators))
        return found

    def describe(self) -> str:
        """The equation as text."""
        left = [term.describe("u") for term in self.operator]
        left += [f"({product.left.describe('u')}) ({product.right.describe('u')})" for product in self.nonlinear]
        source = [Term(self.source)] if callable(self.source) else self.source
        right = [term.describe() for term in source] or ["0"]
        return f"{' + '.join(left)} = {' + '.join(right)}".replace("+ -", "- ")

    def _check_names(self, what: str, given: set[str]) -> None:
        if unknown := given - set(self.names):
            raise ValueError(f"{what} names {sorted(unknown)}, which are no axes; the axes are {self.names}.")

    def _check_data(self, what: str, terms: Source, allowed: set[str]) -> None:
        terms = [Term(terms)] if callable(terms) else terms
        _check_terms(what, terms)
        for term in terms:
            self._check_names(what, term.names)
            if term.names - allowed:
                raise ValueError(f"{what} depends on {sorted(term.names - allowed)}, on which it is given.")
            if not all(operator.is_function for operator in term.operators.values()):
                raise ValueError(f"{what} has a derivative in {term!r}; data are made of multiply(f) alone.")

    def _check_order(self, axis: Axis) -> None:
        order, conditions = self.order(axis), self.conditions(axis)
        if axis.degree is not None and any(n > axis.degree for _, n in conditions):
            raise ValueError(f"axis {axis.name!r} has degree {axis.degree}, too low for a condition on a derivative.")
        if axis.ends == ("periodic", "periodic") or len(conditions) == order:
            return
        if len(conditions) > order:
            if self.nonlinear or not order:  # the solution itself says what flows in; or there is nothing to overrule
                return
            raise ValueError(
                f"axis {axis.name!r} has {len(conditions)} conditions and derivatives of order {order} at most; leave "
                "an end 'free'."
            )
        name = axis.name
        missing = (
            f"initial={{{name!r}: [...]}} or a boundary at one end"
            if order == 1
            else f"a boundary at both ends, or initial={{{name!r}: (value, derivative)}}"
        )
        raise ValueError(
            f"the operator has a derivative of order {order} along axis {axis.name!r}, which has {len(conditions)} "
            f"conditions; give {missing}."
        )


def _check_terms(what: str, terms: Sequence[Term]) -> None:
    if not isinstance(terms, Sequence) or not all(isinstance(term, Term) for term in terms):
        raise ValueError(f"{what} = {terms!r}; expected a list of Terms.")


def _argument_names(function: Function) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise ValueError(f"{function!r} does not name its arguments; wrap it in a lambda that names axes.") from error
    return [p.name for p in parameters if p.default is inspect.Parameter.empty]


def _values_of(function: Function, x: Tensor) -> Tensor:
    values = torch.as_tensor(function(x), dtype=x.dtype)
    if values.ndim == 0:
        values = values.expand(x.shape)
    if values.shape != x.shape:
        raise ValueError(f"f(x) has shape {tuple(values.shape)}; expected that of x, {tuple(x.shape)}.")
    if not (finite := values.isfinite()).all():
        raise ValueError(f"f({x[~finite][0].item():g}) is not finite; expected finite values on the interval.")
    return values


def _slope(x: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that differentiates values of functions at x."""

    def slope(values: Tensor) -> Tensor:
        if not values.requires_grad:
            if (values != values[:1]).any():
                raise ValueError(
                    "the derivative of a coefficient is needed, which autograd does not see; write f(x) in torch."
                )
            return torch.zeros_like(x)
        (found,) = torch.autograd.grad(values.sum(), x, create_graph=True, allow_unused=True)
        return torch.zeros_like(x) if found is None else found

    return slope
