r"""The long run of the process in mean field: how the spread of the tokens settles, drifts, or has nowhere to settle.

After many tokens take the past as Gaussian, N(m, V). Tilting a Gaussian by :math:`e^{x \cdot u_s}` moves its mean by
V x and leaves V, so that :math:`\mu(u) = \sum_h C_h (m + V A_h u)` with the identified products A_h, C_h: linear in u.
With :math:`M(V) = \sum_h C_h V A_h` and :math:`C = \sum_h C_h` the next token is :math:`(I - M)^{-1}(C m + \epsilon)`,
and as each token changes the past by one part in n, in the time :math:`\tau = \log n`

.. math::
    dm/d\tau = (I - M)^{-1} C m - m, \qquad
    dV/d\tau = (I - M)^{-1} S (I - M)^{-T} - V + \dot m \dot m^T .

A stationary covariance solves :math:`V = (I - M)^{-1} S (I - M)^{-T}`. For p = 1, C = 1 this is
:math:`V (1 - a V)^2 = \sigma^2`, solvable only for :math:`a \sigma^2 \le 4/27`. There m = 0 is a fixed point too, but
for a > 0 not a stable one: :math:`\dot m = \frac{aV}{1 - aV} m`, so the mean drifts away as a power of n. Derived here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from scipy.optimize import root
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.errors import InputError, require_finite
from probattn.numerics import eigenvalues, linalg

__all__ = [
    "CRITICAL",
    "Stationary",
    "critical_noise",
    "mean_field_flow",
    "planar_critical",
    "response",
    "stationary_covariance",
]

CRITICAL = 4 / 27
_TOLERANCE = 1e-14  # relative step of the solver
_GAP = 1e-12  # largest |R(V) - V| / |V| of a fixed point


class Stationary(NamedTuple):
    """A fixed point of the covariance on the branch that begins at V = S for weak noise.

    Attributes:
        covariance: V, (p, p).
        slope: largest real part of the eigenvalues of dF/dV, F the response. The branch ends where it reaches 1: by
            a fold if the eigenvalue is real, by a shape of V that turns and grows if it is not.
        drift: largest real part of the eigenvalues of (I - M)^{-1} C - I: positive where the mean drifts away, as
            n to this power.
        margin: smallest singular value of I - M(V), the margin of a typical token.
    """

    covariance: Tensor
    slope: float
    drift: float
    margin: float


def response(attention: CausalAttention, covariance: Tensor, noise_covariance: Tensor) -> Tensor:
    r"""Covariance of the next token about its mean, :math:`(I - M)^{-1} S (I - M)^{-T}`, (p, p).

    Args:
        attention: without batch axes; the mask does not matter after many tokens.
        covariance: V of the past, (p, p).
        noise_covariance: S, (p, p).

    Raises:
        torch.linalg.LinAlgError: I - M(V) is singular.

    Example:
        >>> from probattn.models.scalar import scalar_attention
        >>> one = torch.ones(1, 1).double()
        >>> response(scalar_attention(0.5), one, one)  # 1 / (1 - 0.5)^2
        tensor([[4.]], dtype=torch.float64)
    """
    inverse = linalg.inverse(_block(attention, covariance))
    spread: Tensor = inverse @ noise_covariance @ inverse.mT
    return spread


def stationary_covariance(attention: CausalAttention, noise_covariance: Tensor) -> Stationary | None:
    """The stationary covariance, followed by continuation from weak noise; None beyond the end of its stable branch.

    Args:
        attention: without batch axes, float64.
        noise_covariance: S, (p, p), positive definite.

    Returns:
        The fixed point, or None.

    Raises:
        InputError: an attention with batch axes, or an S of another shape or not positive definite.

    Example:
        >>> from probattn.models.scalar import scalar_attention
        >>> found = stationary_covariance(scalar_attention(4 / 27 - 1e-6), torch.ones(1, 1).double())
        >>> round(found.margin, 2), stationary_covariance(scalar_attention(4 / 27 + 1e-6), torch.ones(1, 1).double())
        (0.67, None)
    """
    reached, found = _follow_branch(attention, noise_covariance, 1.0)
    return found if reached == 1.0 else None


def critical_noise(attention: CausalAttention, noise_covariance: Tensor, *, largest: float = 1e3) -> float:
    """The largest factor s for which s S has a stable stationary covariance; inf where the branch reaches ``largest``.

    Args:
        attention: without batch axes, float64.
        noise_covariance: S, (p, p), positive definite.
        largest: factor at which the search stops.

    Returns:
        The factor, at most a relative 2e-10 below the exact one.

    Raises:
        InputError: an attention with batch axes, or an S of another shape or not positive definite.

    Example:
        >>> from probattn.models.scalar import scalar_attention
        >>> round(critical_noise(scalar_attention(1.0), torch.ones(1, 1).double()), 6)  # 4 / 27
        0.148148
    """
    reached, _ = _follow_branch(attention, noise_covariance, largest)
    return math.inf if reached == largest else reached


def planar_critical(angle: float) -> float:
    r"""Critical :math:`|\lambda| \sigma^2` of A = \|lambda\| times a rotation of the plane, in closed form.

    .. math:: |\lambda| \sigma^2_c = \frac{2 (1 + \cos\theta)}{(1 + 2 \cos\theta)^3}, \qquad |\theta| < 120^\circ

    With V = v I the equation is :math:`v\,|1 - \lambda v|^2 = \sigma^2`. A change of V without trace, which makes the
    circle an ellipse, grows at the rate :math:`\mathrm{Re}\, 2 v \bar\lambda / (1 - \lambda v) - 1`, that of v itself
    at :math:`\mathrm{Re}\, 2 v \lambda / (1 - \lambda v) - 1`, which is never larger; the first is zero at
    :math:`v = 1 / (|\lambda| (1 + 2 \cos\theta))`. So for 0 < theta < 120 degrees the circle gives way to an ellipse
    that turns, and beyond 120 degrees every noise has a stable stationary covariance. Derived here.

    Args:
        angle: theta in radians.

    Returns:
        The critical value, 4/27 at angle 0; inf from 120 degrees on.

    Example:
        >>> round(planar_critical(0.0) * 27, 6), round(planar_critical(math.pi / 2), 6), planar_critical(2.2)
        (4.0, 2.0, inf)
    """
    cosine = math.cos(angle)
    return 2 * (1 + cosine) / (1 + 2 * cosine) ** 3 if cosine > -0.5 else math.inf


def mean_field_flow(
    attention: CausalAttention,
    noise_covariance: Tensor,
    lengths: Tensor,
    covariance: Tensor,
    mean: Tensor,
    *,
    cap: float = 1e6,
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the tokens so far as functions of their number, from those of a given past.

    Args:
        attention: without batch axes.
        noise_covariance: S, (p, p), positive definite.
        lengths: numbers of tokens n, increasing, (K,), beginning with the length of the given past.
        covariance: covariance V of the given past, (p, p).
        mean: mean m of the given past, (p,).
        cap: trace of V at which the flow ends.

    Returns:
        m, (K, p), and V, (K, p, p); inf from where the trace exceeds the cap or I - M becomes singular.

    Raises:
        InputError: an attention with batch axes, or an S of another shape or not positive definite.

    Example:
        >>> from probattn.models.scalar import scalar_attention
        >>> one, lengths = torch.ones(1, 1).double(), torch.tensor([1.0, 1e3, 1e9])
        >>> mean, covariance = mean_field_flow(scalar_attention(0.1), one, lengths, one, torch.zeros(1).double())
        >>> fixed = stationary_covariance(scalar_attention(0.1), one).covariance
        >>> bool(torch.isclose(covariance[-1], fixed))
        True
    """
    _require(attention, noise_covariance)
    dim = attention.dim
    carried = attention.ov_matrix.sum(-3)

    def unpack(state: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        whole = torch.as_tensor(state, dtype=torch.float64)
        return whole[:dim], whole[dim:].view(dim, dim)

    def slope(_: float, state: NDArray[np.float64]) -> NDArray[np.float64]:
        m, v = unpack(state)
        block = _block(attention, v)
        drift = linalg.solve(block, (carried @ m).unsqueeze(-1)).squeeze(-1) - m
        change = response(attention, v, noise_covariance) - v + torch.outer(drift, drift)
        return torch.cat([drift, change.flatten()]).numpy()

    def room(_: float, state: NDArray[np.float64]) -> float:
        v = unpack(state)[1]
        smallest = float(torch.linalg.svdvals(_block(attention, v))[-1])
        return min(smallest - 1e-3, cap - float(v.trace()))

    room.terminal = True  # type: ignore[attr-defined]  # as solve_ivp asks
    times = np.log(lengths.double().numpy())
    begin = torch.cat([mean.double(), covariance.double().flatten()]).numpy()
    found = solve_ivp(
        slope, (times[0], times[-1]), begin, t_eval=times, events=room, rtol=1e-8, atol=1e-10, method="LSODA"
    )
    states = np.full((len(times), len(begin)), np.inf)
    states[: found.y.shape[1]] = found.y.T
    whole = torch.as_tensor(states)
    return whole[:, :dim], whole[:, dim:].view(-1, dim, dim)


def _block(attention: CausalAttention, covariance: Tensor) -> Tensor:
    """I - M(V), (p, p)."""
    change = (attention.ov_matrix @ covariance @ attention.qk_matrix).sum(-3)
    return torch.eye(attention.dim, dtype=change.dtype) - change


def _require(attention: CausalAttention, noise_covariance: Tensor) -> None:
    if attention.batch_shape or noise_covariance.shape != (attention.dim, attention.dim):
        raise InputError(
            f"mean field needs one attention and S of shape ({attention.dim}, {attention.dim}); got batch shape "
            f"{tuple(attention.batch_shape)} and S of shape {tuple(noise_covariance.shape)}."
        )
    if attention.memory_radius is not None:
        raise InputError("mean field is for a Gaussian past; a memory radius makes another of it: simulate instead.")
    require_finite("noise_covariance", noise_covariance)
    if float(torch.linalg.eigvalsh(noise_covariance)[0]) <= 0:
        raise InputError("noise_covariance is not positive definite; give a covariance of full rank.")


def _follow_branch(
    attention: CausalAttention, noise_covariance: Tensor, target: float
) -> tuple[float, Stationary | None]:
    """Continue the branch in the factor s of S from 0 towards ``target``; the factor reached and the fixed point there.

    The step halves where the solver finds no fixed point or the branch has ended, down to a relative 1e-10.
    """
    _require(attention, noise_covariance)
    attention, noise_covariance = attention.detach().to(torch.float64), noise_covariance.double()
    # Weak noise first: small enough that M is far from the identity.
    size = float(torch.linalg.matrix_norm(_block(attention, noise_covariance) - torch.eye(attention.dim), 2))
    reached = min(target, 0.01 / max(size, 1e-300))
    found = _fixed_point(attention, reached * noise_covariance, reached * noise_covariance)
    if found is None:
        return 0.0, None
    step = reached
    while reached < target and step > 1e-10 * reached:
        trial = min(target, reached + step)
        guess = found.covariance * (trial / reached)
        ahead = _fixed_point(attention, trial * noise_covariance, guess)
        # Far from the guess there may lie another branch, with nothing stable in between.
        if ahead is None or float((ahead.covariance - guess).norm()) > 0.1 * float(guess.norm()):
            step /= 2
            continue
        reached, found, step = trial, ahead, 2 * step
    return reached, found


def _fixed_point(attention: CausalAttention, noise_covariance: Tensor, start: Tensor) -> Stationary | None:
    """The fixed point next to a start, None where there is none or where it is no longer on the stable branch."""
    dim = attention.dim

    def gap(flat: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        v = torch.as_tensor(flat, dtype=torch.float64).view(dim, dim)
        found, slopes = _response_and_slopes(attention, v, noise_covariance)
        return (found - v).flatten().numpy(), (slopes - torch.eye(dim * dim)).numpy()

    solved = root(gap, start.flatten().numpy(), jac=True, method="hybr", tol=_TOLERANCE)
    v = torch.as_tensor(solved.x, dtype=torch.float64).view(dim, dim)
    found, slopes = _response_and_slopes(attention, v, noise_covariance)
    # MINPACK gives up where the digits end before the tolerance is met: the gap decides.
    if not float((found - v).norm()) <= _GAP * float(v.norm()):
        return None
    block = _block(attention, v)
    slope = float(torch.linalg.eigvals(slopes).real.max())
    # On the branch that begins at M = 0 no real eigenvalue of M has passed 1, where the response is infinite.
    passed = float(eigenvalues.largest_real_eigenvalue(torch.eye(dim) - block)) >= 1
    if slope >= 1 or passed or float(torch.linalg.eigvalsh((v + v.mT) / 2)[0]) <= 0:
        return None
    motion = linalg.solve(block, attention.ov_matrix.sum(-3)) - torch.eye(dim, dtype=torch.float64)
    drift = float(torch.linalg.eigvals(motion).real.max())
    return Stationary(v, slope, drift, float(torch.linalg.svdvals(block)[-1]))


def _response_and_slopes(
    attention: CausalAttention, covariance: Tensor, noise_covariance: Tensor
) -> tuple[Tensor, Tensor]:
    r"""The response R and its derivative by V, (p, p) and (p^2, p^2); NaN where I - M is singular.

    .. math:: dR = X\, dM\, R + (X\, dM\, R)^T, \qquad X = (I - M)^{-1}, \quad dM = \sum_h C_h\, dV A_h
    """
    inverse = linalg.inverse(_block(attention, covariance), check=False)
    found = inverse @ noise_covariance @ inverse.mT
    half = torch.einsum("hia,hbj->ijab", inverse @ attention.ov_matrix, attention.qk_matrix @ found)
    return found, (half + half.movedim(0, 1)).flatten(2).flatten(0, 1)
