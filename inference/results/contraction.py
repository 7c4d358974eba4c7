r"""Lessons of the data: the posterior beside the prior, parameter by parameter, and the scale on which they speak.

The contraction of a parameter compares the widths of its central 90 % intervals, which heavy tails (products of
factors have them) do not disturb as they do variances,

.. math:: c = 1 - \left(\frac{w_{\text{posterior}}}{w_{\text{prior}}}\right)^2 ,

0 where the data said nothing and 1 where they said everything; the shift is the distance of the medians in units of the
prior's deviation. Source: Betancourt (2018, arXiv 1803.08393) for contraction by variances; by widths, derived here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Contraction", "contraction", "logit_spread", "scale_words"]

Array = NDArray[Any]
_WIDTH = 3.29  # the central 90 % of a normal distribution, in deviations
_CONTRACTED, _SHIFTED = 0.2, 0.3  # about two standard errors of 500 prior and 400 posterior draws
_FLAT, _SATURATED = 0.1, 30.0  # deviations of logits below which weights are uniform, above which one of them is all


class Contraction(NamedTuple):
    """Posterior beside prior for one variable.

    Attributes:
        contraction: c by entry, ``(*event)``.
        shift: distance of the medians by entry, ``(*event)``.
    """

    contraction: Array
    shift: Array

    @property
    def unlearned(self) -> NDArray[np.bool_]:
        """Entries whose posterior is their prior, up to the noise of the draws, ``(*event)``."""
        return np.asarray((self.contraction < _CONTRACTED) & (self.shift < _SHIFTED))

    @property
    def nothing(self) -> bool:
        """True where the entries together say that nothing was learned; the noise of single ones averages out."""
        return bool(self.unlearned.mean() >= 0.9 and self.contraction.mean() < _CONTRACTED / 2)


def contraction(posterior: Array, prior: Array) -> Contraction:
    """Compare draws of the posterior with draws of the prior.

    Args:
        posterior: draws, ``(S, *event)``.
        prior: draws, ``(R, *event)``.

    Example:
        >>> prior = np.random.default_rng(0).normal(size=(2000, 2))
        >>> found = contraction(prior * np.array([1.0, 0.1]), prior)
        >>> found.contraction.round(2).tolist(), found.unlearned.tolist()
        ([0.0, 0.99], [True, False])
    """
    (low, middle, high), (before, centre, after) = (
        np.quantile(draws, (0.05, 0.5, 0.95), axis=0) for draws in (posterior, prior)
    )
    width = np.maximum(after - before, 1e-300)
    return Contraction(1 - ((high - low) / width) ** 2, np.abs(middle - centre) * _WIDTH / width)


def logit_spread(qk_matrix: Array, u: Array) -> float:
    r"""Median deviation of the logits of a token over its past, for QK matrices drawn from the prior.

    .. math:: \operatorname{sd}_{j < i}\, u_j^\top A_h u_i

    Args:
        qk_matrix: draws A, ``(S, H, p, p)``.
        u: sequences, ``(N, T, p)``; the first 8 and 64 draws are used.
    """
    keys = np.einsum("njk,shkq->shnjq", u[:8], qk_matrix[:64], optimize=True)
    logits = np.einsum("shnjq,niq->shnij", keys, u[:8], optimize=True)  # (S, H, N, query, key)
    deviations = [logits[..., i, :i].std(-1) for i in range(2, u.shape[1])]
    return float(np.median(np.stack(deviations, -1)))


def scale_words(spread: float, rms: float, *, standardise: bool) -> str | None:
    """A warning for data on whose scale attention is uniform, or a choice of one token; None where it is neither.

    Args:
        spread: see :func:`logit_spread`.
        rms: root mean square of the data.
        standardise: whether ``--standardise`` is an option that was not taken.

    Example:
        >>> scale_words(0.002, 0.03, standardise=True)
        'root mean square 0.03: under the prior logits deviate by 0.002 and attention is uniform; use --standardise'
    """
    if _FLAT <= spread <= _SATURATED:
        return None
    what = "attention is uniform" if spread < _FLAT else "attention is a choice of one token"
    scale = "raise" if spread < _FLAT else "lower"
    remedy = "use --standardise" if standardise else f"{scale} the scale of the prior (--prior-scale) or of the data"
    return f"root mean square {rms:.3g}: under the prior logits deviate by {spread:.2g} and {what}; {remedy}"
