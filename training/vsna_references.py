r"""Solutions that the equations of `training.vsna` are measured against: Poisson, heat and Burgers.

Each is a function of points in float64, exact or computed to rounding. That of the rotating plume, which has none in
closed form, is in `training.vsna_plume`.
"""

import math

import torch
from torch import Tensor

from sna_core.bspline import check_inside

RIDGE = 4.0  # steepness of the Gaussian ridge across the diagonal
HEAT_SINES = {1: 1.0, 2: 0.5, 5: -0.25}  # wavenumber: amplitude of the initial temperature
SHOCK_TIME = 1 / math.pi  # of u_t + u u_x = 0 from -sin(pi x)
MAX_NEWTON_STEPS = 200  # near the shock a step only takes a third of the error away
MAX_BLOCK = 1 << 21  # numbers in an array of all points and nodes


# ------------------------------------------------------------------------------------------------------------- Poisson


def poisson_sines(points: Tensor) -> Tensor:
    r"""The smooth separable field :math:`u = \prod_i \sin \pi x_i`, zero on the faces of the unit box.

    Args:
        points: x (N, d), d of at least 1.

    Returns:
        u (N,).

    Raises:
        ValueError: If the points are not (N, d) or not in the unit box.
    """
    return (math.pi * _unit_box(points)).sin().prod(-1)


def poisson_sines_source(points: Tensor) -> Tensor:
    r"""Source f of :math:`-\Delta u = f` for :func:`poisson_sines`: :math:`f = d \pi^2 u`. (N, d) -> (N,)."""
    return points.shape[-1] * math.pi**2 * poisson_sines(points)


def poisson_ridge(points: Tensor) -> Tensor:
    r"""The field :math:`u = b\, g(s)`, zero on the faces of the unit box, that is no short sum of separable terms.

    :math:`b = \prod_i 4 x_i (1 - x_i)` and :math:`g(s) = \exp(-a s^2)`, a Gaussian ridge of the steepness a = ``RIDGE``
    across the diagonal, where :math:`s = \sum_i (x_i - 1/2)`. Arguments, result and errors as of
    :func:`poisson_sines`.
    """
    x = _unit_box(points)
    return (4 * x * (1 - x)).prod(-1) * (-RIDGE * (x - 0.5).sum(-1) ** 2).exp()


def poisson_ridge_source(points: Tensor) -> Tensor:
    r"""Source f of :math:`-\Delta u = f` for :func:`poisson_ridge`. (N, d) -> (N,), errors as there.

    :math:`f = -(g \Delta b + 2 g' \sum_i \partial_i b + d\, g'' b)`.
    """
    x = _unit_box(points)
    bubbles = 4 * x * (1 - x)
    s = (x - 0.5).sum(-1)
    ridge = (-RIDGE * s**2).exp()
    first, second = -2 * RIDGE * s * ridge, (4 * RIDGE**2 * s**2 - 2 * RIDGE) * ridge
    axes = range(x.shape[-1])
    others = [bubbles[:, [k for k in axes if k != i]].prod(-1) for i in axes]
    slopes = sum(other * 4 * (1 - 2 * x[:, i]) for i, other in enumerate(others))
    laplacian = sum(-8 * other for other in others)
    return -(ridge * laplacian + 2 * first * slopes + len(axes) * second * bubbles.prod(-1))


def _unit_box(points: Tensor) -> Tensor:
    if points.dim() != 2 or points.shape[-1] < 1:
        raise ValueError(f"points have shape {tuple(points.shape)}; expected (N, d), a row of coordinates each.")
    points = points.to(torch.float64)
    low = points.new_zeros(points.shape[-1])
    check_inside(points.detach(), low, low + 1, points.shape[-1])
    return points


# ---------------------------------------------------------------------------------------------------------------- heat


def heat_initial(x: Tensor) -> Tensor:
    r"""The initial temperature :math:`\sum_k a_k \sin k \pi x` with the amplitudes ``HEAT_SINES``: (...) -> (...)."""
    return sum(amplitude * (k * math.pi * x).sin() for k, amplitude in HEAT_SINES.items())


def heat(points: Tensor) -> Tensor:
    r"""The solution of :math:`u_t = \nu u_{xx}` on [0, 1] from :func:`heat_initial`, zero at both ends.

    :math:`u = \sum_k a_k e^{-\nu k^2 \pi^2 t} \sin k \pi x`.

    Args:
        points: x, t and nu (N, 3).

    Returns:
        u (N,).

    Raises:
        ValueError: If the points are not (N, 3), x lies outside [0, 1], or t or nu is negative.
    """
    x, t, nu = _columns(points, {"x": (0.0, 1.0), "t": (0.0, math.inf), "nu": (0.0, math.inf)})
    decays = {k: a * (-nu * (k * math.pi) ** 2 * t).exp() for k, a in HEAT_SINES.items()}
    return sum(decay * (k * math.pi * x).sin() for k, decay in decays.items())


# ------------------------------------------------------------------------------------------------------------- Burgers


def burgers_initial(x: Tensor) -> Tensor:
    r"""The initial velocity :math:`-\sin \pi x` of both Burgers equations: (...) -> (...)."""
    return -(math.pi * x).sin()


def viscous_burgers(points: Tensor) -> Tensor:
    r"""The solution of :math:`u_t + u u_x = \nu u_{xx}` on [-1, 1], u = -sin(pi x) at t = 0, zero at both ends.

    By the transform of Cole and Hopf (C. Basdevant et al., Computers and Fluids 14 (1986)),

    .. math:: u(x, t) = \frac{\int u_0(y)\, w\, dz}{\int w\, dz}, \quad
              \log w = -\frac{\cos \pi y}{2 \pi \nu} - z^2, \quad y = x - \sqrt{4 \nu t}\, z.

    By the trapezoidal rule, which converges faster than any power for such integrands, with weights divided by their
    largest. The maximum of w lies at :math:`|z| \le \sqrt{t / 4 \nu}`, and 7 beyond it w has fallen by
    :math:`e^{-49}`. Close to rounding from nu = 1e-4 on. Differentiable in x, t and nu where t > 0.

    Args:
        points: x, t and nu (N, 3).

    Returns:
        u (N,).

    Raises:
        ValueError: If the points are not (N, 3), x lies outside [-1, 1], t is negative or nu is below 1e-4, where the
            rule takes too many points.
    """
    x, t, nu = _columns(points, {"x": (-1.0, 1.0), "t": (0.0, math.inf), "nu": (1e-4, math.inf)})
    reach = (t / (4 * nu)).sqrt() + 7
    # w is no narrower than exp(-(1 + pi t) z^2), and its waves along z are no shorter than sqrt(4 nu t) allows.
    spacing = 0.3 / (1 + math.pi * t + 4 * nu * t).sqrt()
    num_nodes = int((2 * reach / spacing).max().ceil()) + 1 if len(x) else 1
    ramp = torch.linspace(-1, 1, num_nodes, dtype=x.dtype)

    def block(x: Tensor, t: Tensor, nu: Tensor, reach: Tensor) -> Tensor:
        z = reach[:, None] * ramp  # (block, nodes)
        width = torch.where(t > 0, 4 * nu * t, 1.0).sqrt() * (t > 0)  # the root has no slope at zero
        y = math.pi * (x[:, None] - width[:, None] * z)
        weights = (-y.cos() / (2 * math.pi * nu[:, None]) - z**2).softmax(-1)
        return -(weights * y.sin()).sum(-1)

    size = max(1, MAX_BLOCK // num_nodes)
    return torch.cat([block(*columns) for columns in zip(*(c.split(size) for c in (x, t, nu, reach)), strict=True)])


@torch.no_grad()
def inviscid_burgers(points: Tensor) -> Tensor:
    r"""The solution of :math:`u_t + u u_x = 0` on [-1, 1] from -sin(pi x), before the shock at t = 1 / pi.

    Constant along characteristics: :math:`u = -\sin \pi \xi` with :math:`\xi - t \sin \pi \xi = x`, by Newton's method.
    On [0, 1] the left side is convex in xi, so that from a start above the root every step stays above it.

    Args:
        points: x and t (N, 2).

    Returns:
        u (N,).

    Raises:
        ValueError: If the points are not (N, 2), x lies outside [-1, 1] or t outside [0, 1 / pi).
    """
    x, t = _columns(points, {"x": (-1.0, 1.0), "t": (0.0, math.nextafter(SHOCK_TIME, 0))})
    sign, x = x.sign(), x.abs()  # u is odd
    foot = (x + t).clamp(max=1.0)
    for _ in range(MAX_NEWTON_STEPS):
        angle = math.pi * foot
        step = (foot - t * angle.sin() - x) / (1 - math.pi * t * angle.cos())
        after = torch.maximum(foot - step, x)
        if bool((after >= foot).all()):  # rounding has taken over everywhere
            break
        foot = torch.minimum(after, foot)
    return -sign * (math.pi * foot).sin()


def _columns(points: Tensor, ranges: dict[str, tuple[float, float]]) -> list[Tensor]:
    """The columns (N,) in float64, each inside its range."""
    if points.dim() != 2 or points.shape[-1] != len(ranges):
        raise ValueError(
            f"points have shape {tuple(points.shape)}; expected (N, {len(ranges)}), columns {', '.join(ranges)}."
        )
    columns = list(points.to(torch.float64).unbind(-1))
    for (name, (low, high)), column in zip(ranges.items(), columns, strict=True):
        outside = ~((column >= low) & (column <= high) & column.isfinite())
        if outside.any():
            value = column[outside][0].item()
            raise ValueError(f"{name} = {value:g} lies outside [{low:.6g}, {high:.6g}], where the solution is known.")
    return columns
