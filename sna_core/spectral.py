r"""Bases of one input without cells, behind the interface of :class:`~sna_core.bspline.UniformBSpline`.

Chebyshev and Legendre polynomials, trigonometric functions and the hidden units of a small network. Each has
``num_basis``, ``low``, ``high`` and ``dense(x, derivative)``, so that a function of one input is
:math:`\psi(x) = \sum_b \alpha_b B_b(x)` whatever the basis. All of them contain the constants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import factorial, isfinite, pi, prod

import torch
from torch import Tensor, nn

from sna_core.bspline import UniformBSpline, check_inside


def _check_basis(num_basis: int, low: float, high: float) -> None:
    if not isinstance(num_basis, int) or num_basis < 1:
        raise ValueError(f"num_basis = {num_basis!r}; expected an integer of at least 1.")
    if not (isfinite(low) and isfinite(high) and low < high):
        raise ValueError(f"[low, high] = [{low}, {high}]; expected finite ends with low < high.")


def _check_call(x: Tensor, low: float, high: float, derivative: int, check: bool) -> Tensor:
    if not isinstance(derivative, int) or derivative < 0:
        raise ValueError(f"derivative = {derivative!r}; expected an integer of at least 0.")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; expected floating-point values, e.g. x.to(torch.float64).")
    return check_inside(x, low, high) if check else x


def _gegenbauer(t: Tensor, order: float, num_functions: int) -> list[Tensor]:
    """Gegenbauer polynomials of one positive order, by their recurrence, which is stable for t in [-1, 1].

    NIST Digital Library of Mathematical Functions, eq. 18.9.1 with table 18.9.1.
    """
    functions = [1 + 0 * t, 2 * order * t]  # the gradient in t is zero, not missing
    for n in range(2, num_functions):
        ahead, behind = 2 * (n + order - 1) / n, (n + 2 * order - 2) / n
        functions.append(ahead * t * functions[-1] - behind * functions[-2])
    return functions[:num_functions]


@dataclass(frozen=True)
class _SpectralBasis:
    num_basis: int
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _check_basis(self.num_basis, self.low, self.high)

    def dense(self, x: Tensor, derivative: int = 0, *, check: bool = True) -> Tensor:
        """All basis functions or their derivatives of one order, exact for any order: (...) -> (..., num_basis).

        Differentiable in x any number of times. ``check=False`` leaves out the look at every value of x.

        Args:
            x: Points (...), floating-point.
            derivative: Order, at least 0; its values have the units of x to the power -derivative.
            check: Whether to look for points outside the interval.

        Raises:
            ValueError: If a point is NaN or outside the interval, x is not floating-point or the order is negative.
        """
        x = _check_call(x, self.low, self.high, derivative, check)
        width = self.high - self.low
        values = self._values((2 * (x - self.low) - width) / width, derivative)
        return torch.stack(values, -1) * (2 / width) ** derivative

    def _values(self, t: Tensor, derivative: int) -> list[Tensor]:
        """The functions' derivatives in t, which is -1 at ``low`` and 1 at ``high``."""
        raise NotImplementedError


class ChebyshevBasis(_SpectralBasis):
    r"""Chebyshev polynomials :math:`T_0, \dots, T_{n-1}` of t, where t = -1 at ``low`` and t = 1 at ``high``.

    :math:`T_b(\cos\theta) = \cos b\theta`. They are orthogonal with the weight :math:`(1 - t^2)^{-1/2}`.

    Args:
        num_basis: Number n of polynomials, of degree 0 to n - 1.
        low: Left end of the interval.
        high: Right end.

    Raises:
        ValueError: If there is no polynomial, or the interval is empty or not finite.
    """

    def _values(self, t: Tensor, derivative: int) -> list[Tensor]:
        if derivative == 0:
            functions = [1 + 0 * t, t]
            for _ in range(2, self.num_basis):
                functions.append(2 * t * functions[-1] - functions[-2])
            return functions[: self.num_basis]
        scale = 2 ** (derivative - 1) * factorial(derivative - 1)
        lowered = _gegenbauer(t, derivative, max(0, self.num_basis - derivative))
        zero = [0 * t] * min(derivative, self.num_basis)
        return zero + [n * scale * function for n, function in enumerate(lowered, derivative)]


class LegendreBasis(_SpectralBasis):
    r"""Legendre polynomials :math:`P_0, \dots, P_{n-1}` of t, where t = -1 at ``low`` and t = 1 at ``high``.

    :math:`P_b(1) = 1`. They are orthogonal with the weight one: :math:`\int P_b^2 dx = (high - low) / (2b + 1)`.
    Arguments and errors as of :class:`ChebyshevBasis`.
    """

    def _values(self, t: Tensor, derivative: int) -> list[Tensor]:
        scale = prod(range(1, 2 * derivative, 2))
        lowered = _gegenbauer(t, derivative + 0.5, max(0, self.num_basis - derivative))
        return [0 * t] * min(derivative, self.num_basis) + [scale * function for function in lowered]


class FourierBasis(_SpectralBasis):
    r"""The constant and pairs :math:`\cos k\omega s, \sin k\omega s` for k = 1, 2, ..., with s = x - low.

    :math:`\omega = 2\pi / (high - low)`: the interval is one period. Functions that take other values at ``high`` than
    at ``low`` converge slowly; let the interval reach beyond the data, or choose another basis.

    Args:
        num_basis: Odd: one, and two for each pair.
        low: Left end of the interval.
        high: Right end.

    Raises:
        ValueError: If ``num_basis`` is not a positive odd number, or the interval is empty or not finite.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_basis % 2 == 0:
            raise ValueError(f"num_basis = {self.num_basis}; expected an odd number, a constant and pairs.")

    def _values(self, t: Tensor, derivative: int) -> list[Tensor]:
        functions = [0 * t + (derivative == 0)]
        for k in range(1, (self.num_basis + 1) // 2):
            phase = pi * k * (t + 1)
            cosine, sine = phase.cos(), phase.sin()
            for _ in range(derivative % 4):
                cosine, sine = -sine, cosine
            functions += [(pi * k) ** derivative * cosine, (pi * k) ** derivative * sine]
        return functions


class MLPAtoms(nn.Module):
    r"""One and the hidden units :math:`\tanh(w_b t + v_b)` of a small network: a basis that is learned.

    A function of one input is then a perceptron with one hidden layer, whose read-out are the coefficients and whose
    hidden layer all functions of that input share; t = -1 at ``low`` and t = 1 at ``high``.

    Parameters:
        ``weight`` w and ``bias`` v, (num_basis - 1,) each. At the start the units' steps lie anywhere on the interval.

    Args:
        num_basis: One, and the number of hidden units.
        low: Left end of the interval.
        high: Right end.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: If ``num_basis`` is below 1, or the interval is empty or not finite.
    """

    def __init__(
        self,
        num_basis: int,
        low: float = 0.0,
        high: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_basis(num_basis, low, high)
        self.num_basis, self.low, self.high = num_basis, low, high
        self.weight = nn.Parameter(torch.empty(num_basis - 1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_basis - 1, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws slopes of a few steps over the interval, and where the steps lie."""
        self.weight.normal_(0.0, max(1.0, (self.num_basis - 1) / 2))
        self.bias.uniform_(-1.0, 1.0).mul_(self.weight)

    def dense(self, x: Tensor, derivative: int = 0, *, check: bool = True) -> Tensor:
        """All functions or their derivatives of one order: (...) -> (..., num_basis). Errors as of the other bases."""
        x = _check_call(x, self.low, self.high, derivative, check)
        width = self.high - self.low
        t = ((2 * (x - self.low) - width) / width).unsqueeze(-1)  # (..., 1)
        y = (t * self.weight + self.bias).tanh()
        units = 0.0
        for coefficient in reversed(_tanh_derivative(derivative)):
            units = units * y + coefficient
        one = 0 * t + (derivative == 0)
        return torch.cat([one, units * (2 * self.weight / width) ** derivative], -1)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.num_basis}, low={self.low}, high={self.high}"


def _tanh_derivative(order: int) -> list[int]:
    """Coefficients of y^0, y^1, ... in the derivative of y = tanh, since y' = 1 - y^2."""
    polynomial = [0, 1]
    for _ in range(order):
        slope = [n * c for n, c in enumerate(polynomial)][1:]
        polynomial = [a - b for a, b in zip([*slope, 0, 0], [0, 0, *slope], strict=True)]
    return polynomial


Basis = UniformBSpline | ChebyshevBasis | LegendreBasis | FourierBasis | MLPAtoms
BASES: dict[str, Callable[..., Basis]] = {
    "bspline": UniformBSpline,
    "chebyshev": ChebyshevBasis,
    "legendre": LegendreBasis,
    "fourier": FourierBasis,
    "mlp": MLPAtoms,
}


def make_basis(
    kind: str,
    low: float = 0.0,
    high: float = 1.0,
    *,
    num_cells: int | None = None,
    degree: int | None = None,
    num_basis: int | None = None,
) -> Basis:
    """The basis of one input named ``kind``: a key of ``BASES``.

    Args:
        kind: ``"bspline"``, which takes ``num_cells`` and ``degree``; the others take ``num_basis``.
        low: Left end of the interval.
        high: Right end.
        num_cells: Number of cells.
        degree: Degree of the B-splines.
        num_basis: Number of functions.

    Raises:
        ValueError: If the kind is unknown, a size is missing or belongs to another kind, or the basis refuses it.
    """
    if kind not in BASES:
        raise ValueError(f"basis = {kind!r}; expected one of {sorted(BASES)}.")
    sizes = {"num_cells": num_cells, "degree": degree, "num_basis": num_basis}
    wanted = {"num_cells", "degree"} if kind == "bspline" else {"num_basis"}
    for name, size in sizes.items():
        if (size is not None) != (name in wanted):
            raise ValueError(f"{name} = {size}, but basis = {kind!r} takes {' and '.join(sorted(wanted))}.")
    return BASES[kind](**{name: sizes[name] for name in wanted}, low=low, high=high)


def constant_coefficients(basis: Basis) -> list[float]:
    """The coefficients (num_basis,) of the function one."""
    if isinstance(basis, UniformBSpline):
        return [1.0] * basis.num_basis
    return [1.0] + [0.0] * (basis.num_basis - 1)
