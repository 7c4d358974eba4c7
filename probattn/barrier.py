r"""The log-barrier b_i = ``-log|det J_i|`` and its variants, four margins, and support tokens.

The margins answer different questions and none is a synonym of another. With M_i = I - J_i,

- ``determinant``: det J_i with its sign. The scalar margin 1 - a Var_i; zero on the boundary.
- ``spectral``: 1 - the largest real eigenvalue of M_i. The room on the path I - t M_i, and so a matter of existence and
  uniqueness of solutions; negative where J_i has a negative eigenvalue.
- ``complex``: 1 - the largest real part of the eigenvalues of M_i, complex ones included. Positive where the continuous
  relaxation du/dt = mu(u) + e - u is stable at the token; never above ``spectral``. Iterating u <- mu(u) + e asks for
  more: all eigenvalues inside the unit circle.
- ``singular_value``: sigma_min(J_i). The distance to a singular block; its reciprocal is the noise gain.

A large margin is no merit by itself: M_i is small, and all four margins are near 1, also where a head sees one token
only or the same vector everywhere.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from probattn import blocks
from probattn.errors import InputError, require_choice, require_finite, require_positive
from probattn.interface import Attention

__all__ = [
    "BarrierKind",
    "MarginKind",
    "SupportTokens",
    "log_barrier",
    "penalty_and_margin",
    "require_penalty",
    "stability_margin",
    "support_tokens",
]

BarrierKind = Literal["logdet", "one_sided", "smooth", "spectral", "singular_value"]
MarginKind = Literal["determinant", "spectral", "complex", "singular_value"]


def log_barrier(attention: Attention, u: Tensor, kind: BarrierKind = "logdet", *, sharpness: float = 10.0) -> Tensor:
    r"""Penalty per token that grows without bound as J_i becomes singular.

    .. math::
        \mathrm{logdet}:\; & b_i = -\log|\det J_i|, \qquad
        \mathrm{one\_sided}:\; \max(0, b_i), \qquad
        \mathrm{smooth}:\; \tfrac1\beta \log(1 + e^{\beta b_i}), \\
        \mathrm{spectral},\ \mathrm{singular\_value}:\; & -\log \min(1, m_i)

    with m_i the margin of the same name (spectral: +inf where that margin is not positive).

    The limits of each. ``logdet`` is the term of the density itself, but it is not one-sided: where \|det
    J_i\| > 1 it is negative and unbounded below, so minimising it against a free attention runs away, and it repels
    from both sides, so a step that jumps to det J_i < 0 stays there. ``one_sided`` and ``smooth`` do not run away but
    do not see the sign either, nor det = 2 * 1/2. ``spectral`` sees the sign but not the noise gain of a non-normal
    block. ``singular_value`` bounds the gain but not the sign. Only ``logdet`` makes the log-density of section 2 of
    the theory.

    Args:
        attention: the attention, linear maps or a layer of a transformer.
        u: tokens, ``(*batch, T, p)``.
        kind: one of the five names above.
        sharpness: beta of ``smooth``, which exceeds ``one_sided`` by at most log(2) / beta.

    Returns:
        ``(*batch, T)``, in nats. ``logdet``, ``one_sided``, ``smooth`` are twice differentiable where det J_i != 0
        (``one_sided`` away from its kink); ``spectral`` once. Cost per token: a determinant or the eigenvalues of the
        core, or a p x p singular value decomposition.

    Raises:
        InputError: unknown kind, sharpness not positive, or shapes that do not fit.

    Example:
        >>> from probattn import CausalAttention
        >>> attention = CausalAttention.from_qk_matrix(torch.tensor([[0.5]]))
        >>> log_barrier(attention, torch.tensor([[-1.0], [1.0], [0.0]]))[-1]  # -log(1 - 0.5)
        tensor(0.6931)
    """
    require_penalty(kind, sharpness)
    matrix = attention.mean_jacobian(u) if kind == "singular_value" else attention.core(u)
    return penalty_and_margin(matrix, attention.dim, kind, sharpness)[0]


def require_penalty(kind: str, sharpness: float) -> None:
    """Refuse a penalty that does not exist, or a sharpness that is not positive.

    Args:
        kind: name of the penalty.
        sharpness: beta of ``smooth``.

    Raises:
        InputError: naming the penalties that exist, or the value of the sharpness.

    Example:
        >>> require_penalty("smooth", 10.0)
    """
    require_choice("kind", kind, get_args(BarrierKind))
    require_positive("sharpness", sharpness)


def penalty_and_margin(matrix: Tensor, dim: int, kind: BarrierKind, sharpness: float = 10.0) -> tuple[Tensor, Tensor]:
    """The penalty of each block, and the margin that it guards.

    Args:
        matrix: M_i, ``(*batch, p, p)``, for ``singular_value``; for the other kinds any core K_i, ``(*batch, m, m)``,
            with det(I - K_i) = det J_i and the non-zero eigenvalues of M_i.
        dim: p, the size of M_i.
        kind: name of the penalty, see :func:`log_barrier`.
        sharpness: beta of ``smooth``.

    Returns:
        penalty and margin, ``(*batch,)`` each: the margin is the determinant with its sign for the three kinds that are
        made of it.

    Example:
        >>> penalty, margin = penalty_and_margin(torch.tensor([[1.5]]), 1, "one_sided")  # J = -1/2
        >>> round(float(penalty), 4), float(margin)
        (0.6931, -0.5)
    """
    if kind in ("spectral", "singular_value"):
        margin = _margin(matrix, dim, kind)
        return -margin.clamp(0.0, 1.0).log(), margin
    sign, logabs = blocks.logabsdet_one_minus(matrix)
    literal, margin = -logabs, sign * logabs.exp()
    if kind == "logdet":
        return literal, margin
    if kind == "one_sided":
        return literal.clamp(min=0.0), margin
    # Not softplus, which switches to a straight line at 20 and is wrong there by 2e-9.
    return torch.logaddexp(sharpness * literal, torch.zeros_like(literal)) / sharpness, margin


def stability_margin(attention: Attention, u: Tensor, kind: MarginKind = "singular_value") -> Tensor:
    """Distance of each token from the degeneracy boundary, in one of four senses (see the list in this module).

    ``determinant`` keeps its sign but does not notice a product such as 2 * 1/2. ``spectral`` is the room left when the
    attention is turned up along I - t M_i; it is +inf where M_i has no real eigenvalue, and negative where J_i has a
    negative one, even with det J_i > 0. Complex pairs of eigenvalues count for it only where rounding has made them of
    a double real eigenvalue (:mod:`probattn.numerics.eigenvalues`). ``complex`` counts them all. ``singular_value`` is
    never negative: it is the distance to the nearest singular block, not a side.

    Args:
        attention: the attention, linear maps or a layer of a transformer.
        u: tokens, ``(*batch, T, p)``, finite.
        kind: "determinant", "spectral", "complex" or "singular_value".

    Returns:
        ``(*batch, T)``, dimensionless; 1 for a token whose J_i is the identity. ``determinant`` is differentiable any
        number of times, the others once or where they are smooth.

    Raises:
        InputError: unknown kind, shapes that do not fit, or u not finite (with the position).

    Example:
        >>> from probattn import CausalAttention
        >>> attention = CausalAttention.from_qk_matrix(2.0 * torch.eye(2))
        >>> past = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> u = torch.cat([past, torch.zeros(1, 2)])  # det = (1 - 2)^2
        >>> [round(float(stability_margin(attention, u, kind)[-1]), 6) for kind in ("determinant", "spectral")]
        [1.0, -1.0]
        >>> spiral = CausalAttention.from_qk_matrix(torch.tensor([[0.25, 3.0], [-3.0, 0.25]]))  # 0.25 + 3i, 0.25 - 3i
        >>> [round(float(stability_margin(spiral, u, kind)[-1]), 6) for kind in ("spectral", "complex")]
        [inf, 0.75]
    """
    require_choice("kind", kind, get_args(MarginKind))
    require_finite("u", u)
    return _margin(attention.mean_jacobian(u) if kind == "singular_value" else attention.core(u), attention.dim, kind)


class SupportTokens(NamedTuple):
    """The tokens nearest to the boundary.

    Attributes:
        positions: indices into the sequence, ``(*batch, k)``, smallest margin first, the earlier one first among
            equals.
        margins: their margins, ``(*batch, k)``.
    """

    positions: Tensor
    margins: Tensor


def support_tokens(attention: Attention, u: Tensor, k: int = 5, kind: MarginKind = "singular_value") -> SupportTokens:
    """The k positions of smallest margin, as support vectors are the points of smallest margin.

    With ``singular_value`` these are the positions of largest noise gain. This is not the token-selection margin of
    Tarzanagh et al. (2308.16898), which separates the tokens that a softmax picks from those that it does not.

    Args:
        attention: the attention, linear maps or a layer of a transformer.
        u: tokens, ``(*batch, T, p)``, finite.
        k: number of positions, 1 <= k <= T.
        kind: name of the margin, see :func:`stability_margin`.

    Returns:
        :class:`SupportTokens`.

    Raises:
        InputError: k outside 1..T, or for the reasons of :func:`stability_margin`.

    Example:
        >>> from probattn import CausalAttention
        >>> attention = CausalAttention.from_qk_matrix(torch.tensor([[0.5]]))
        >>> support_tokens(attention, torch.tensor([[-1.0], [1.0], [0.0], [5.0]]), k=1).positions
        tensor([2])
    """
    margin = stability_margin(attention, u, kind)
    if not 1 <= k <= margin.shape[-1]:
        raise InputError(f"k is {k}; it must lie between 1 and the {margin.shape[-1]} tokens of the sequence.")
    ordered, positions = margin.sort(dim=-1, stable=True)
    return SupportTokens(positions[..., :k], ordered[..., :k])


def _margin(matrix: Tensor, dim: int, kind: MarginKind) -> Tensor:
    """Margin of each block, ``(*batch,)``, from M_i (``singular_value``) or any core K_i of it (the other kinds)."""
    if kind == "singular_value":
        return blocks.smallest_singular_value_one_minus(matrix)
    if kind == "spectral":
        return 1 - blocks.largest_real_eigenvalue(matrix, dim)
    if kind == "complex":
        return 1 - blocks.spectral_abscissa(matrix, dim)
    sign, logabs = blocks.logabsdet_one_minus(matrix)
    return sign * logabs.exp()
