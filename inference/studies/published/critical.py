r"""Critical attention scaling (Chen, Lin, Polyanskiy and Rigollet 2025, arXiv:2510.05554).

Of n unit tokens every two have the cosine rho; W = I, inclusive mask, logits :math:`\gamma \log n` times the cosine.
Their transition lies at :math:`\gamma_c = 1/(1 - \rho)`: below it all outputs point one way, beyond it each token sees
itself alone. With :math:`g = \gamma/\gamma_c` all at the last token depends on g and n alone. Derived here:

.. math::
    \alpha = \frac{n^g}{n^g + n - 1}, \qquad
    |c\,\mathrm{Cov}| = g \log n\; \alpha (1 - \alpha) \frac{n}{n - 1}, \qquad
    \det J = (1 - \alpha)^n \Bigl[1 - \frac{g \log n}{n - 1}\Bigr]^{n - 2}
    \Bigl[1 - \alpha\, g \log n\, \frac{2 n - 1}{n - 1}\Bigr] .

So det J changes sign where :math:`\alpha = (n - 1) / ((2 n - 1)\, g \log n)`, that is
:math:`g = 1 - \log(2 g \log n)/\log n` up to terms that vanish faster: the known :math:`1 - \log\log n/\log n` with a
constant that only falls off as :math:`1/\log n`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from probattn.attention import CausalAttention, Mask
from probattn.errors import InputError, require_at_least
from probattn.numerics import linalg
from probattn.solve.context import Context

__all__ = ["Transition", "leading_sign_change", "measure_transition", "sign_change", "tokens_of_cosine"]


class Transition(NamedTuple):
    """The transition at one number of tokens, every place in units of gamma_c.

    Attributes:
        length: n.
        own_weight: weight of the last token on itself at gamma_c.
        halfway: place at which that weight is a half.
        covariance: ``c |Cov|`` of the last token at gamma_c.
        peak: largest ``c |Cov|`` of the last token.
        peak_at: its place.
        sign_at: place at which det J of the last token changes sign.
    """

    length: int
    own_weight: float
    halfway: float
    covariance: float
    peak: float
    peak_at: float
    sign_at: float


def tokens_of_cosine(length: int, cosine: float) -> Tensor:
    """Unit tokens, every two of which have the same cosine, ``(n, n)``.

    Args:
        length: n, at least 2.
        cosine: rho, at least 0 and below 1.

    Raises:
        InputError: another cosine.

    Example:
        >>> u = tokens_of_cosine(3, 0.5)
        >>> (u @ u.T).round(decimals=6)[0].tolist()
        [1.0, 0.5, 0.5]
    """
    require_at_least("length", length, 2)
    if not 0 <= cosine < 1:
        raise InputError(f"cosine is {cosine}; it must be at least 0 and below 1.")
    gram = torch.full((length, length), cosine, dtype=torch.float64)
    gram.fill_diagonal_(1.0)
    factor: Tensor = torch.linalg.cholesky(gram)
    return factor


def measure_transition(length: int, cosine: float = 0.0) -> Transition:
    """Locate the transition with the package's own attention: weights, covariances and determinants.

    Args:
        length: n, at least 8.
        cosine: rho.

    Returns:
        :class:`Transition`. Some 40 blocks of size n: 30 s at n = 512.

    Example:
        >>> found = measure_transition(16)
        >>> round(found.halfway, 3), round(found.sign_at, 3)
        (0.977, 0.63)
    """
    require_at_least("length", length, 8)
    u = tokens_of_cosine(length, cosine)

    def own_weight(g: float) -> float:
        return float(_attention(length, cosine, g, "inclusive").weights(u)[0, -1, -1])

    def covariance(g: float) -> float:
        # Under the strict mask with all n tokens as the past, M is c Cov over all of them.
        _, block = Context.of(_attention(length, cosine, g, "strict"), u).mean_and_jacobian(u[-1])
        return float(torch.linalg.matrix_norm(torch.eye(length, dtype=u.dtype) - block, 2))

    def determinant(g: float) -> float:
        _, block = Context.of(_attention(length, cosine, g, "inclusive"), u[:-1]).mean_and_jacobian(u[-1])
        sign, logabs = linalg.slogdet(block)
        return float(sign) * math.exp(float(logabs) / length)  # the root keeps sign and zero

    peak = minimize_scalar(lambda g: -covariance(g), bounds=(0.7, 1.6), method="bounded", options={"xatol": 5e-3})
    return Transition(
        length,
        own_weight(1.0),
        float(brentq(lambda g: own_weight(g) - 0.5, 0.5, 1.5, xtol=1e-10)),
        covariance(1.0),
        -float(peak.fun),
        float(peak.x),
        float(brentq(determinant, 0.3, 1.0, xtol=1e-8)),
    )


def sign_change(length: int) -> float:
    """Place of the sign change in units of gamma_c, by the closed form of the module.

    Args:
        length: n, at least 8.

    Example:
        >>> [round(sign_change(n), 3) for n in (16, 64, 256, 512)]
        [0.63, 0.641, 0.665, 0.678]
    """
    n = length

    def gap(g: float) -> float:
        return g * math.log(n) * (2 * n - 1) / (n - 1) / (1 + (n - 1) * math.pow(n, -g)) - 1

    return float(brentq(gap, 0.0, 1.0, xtol=1e-14))


def leading_sign_change(length: int) -> float:
    """Place of the sign change in units of gamma_c to leading order, 1 - log log n / log n."""
    return 1 - math.log(math.log(length)) / math.log(length)


def _attention(length: int, cosine: float, g: float, mask: Mask) -> CausalAttention:
    identity = torch.eye(length, dtype=torch.float64).unsqueeze(0)
    scale = g / (1 - cosine) * math.log(length)
    return CausalAttention(identity, identity, scale=scale, mask=mask, validate_args=False)
