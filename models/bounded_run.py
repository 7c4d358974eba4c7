r"""Very long paths on the line with a memory radius: the past as two functions of the query, in O(1) per token.

The next token depends on its past through

.. math::
    D_h(u) = \sum_s e^{u g^h_s}, \qquad N_h(u) = \sum_s e^{u g^h_s} o^h_s, \qquad \mu(u) = \sum_h N_h(u) / D_h(u) .

Keys are bounded, :math:`|g^h_s| \le \rho |A_h|`, so both are entire functions of small exponential type, and tokens
stay in an interval that noise and radius determine. Their values at Chebyshev points, to which every token adds its
share, hold them to rounding (Trefethen 2019, doi:10.1137/1.9781611975949). Derived here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.distributions import noise_distribution
from probattn.errors import InputError, require_at_least
from probattn.numerics.random import isolated_seed

__all__ = ["BoundedRun", "bounded_run"]

_BLOCK = 64  # tokens that are solved for together
_RANGE = 12.0  # largest exponent |u g|: the sums then keep eleven digits where they are smallest
_SWEEPS = 2000


class BoundedRun(NamedTuple):
    """Moments of the tokens so far, at chosen lengths.

    Attributes:
        lengths: n, (K,).
        mean: mean of u_1..n, (K, N).
        square: mean square of u_1..n, (K, N).
        largest: largest ``|u_i - eps_i|``, which is the size of the mean, (N,).
        first: first tokens, at most 1,000, (N, n, 1).
        noise: their noise, (N, n, 1).
    """

    lengths: Tensor
    mean: Tensor
    square: Tensor
    largest: Tensor
    first: Tensor
    noise: Tensor


@torch.no_grad()
def bounded_run(
    attention: CausalAttention, noise_scale: float, lengths: list[int], sequences: int, *, seed: int = 0
) -> BoundedRun:
    r"""Run N paths of the process on the line and record the moments of their tokens.

    The tokens are those of :class:`~probattn.process.AttentionProcess` for the same noise, to about 1e-10.

    Args:
        attention: p = 1, strict mask, a memory radius, a contraction below 1, no batch axes, float64.
        noise_scale: sigma.
        lengths: n at which to record, increasing.
        sequences: N.
        seed: random seed of the noise; the global random state is left as it was.

    Returns:
        :class:`BoundedRun`. Time O(H K) per token for some K = 50 points, memory O(N n) for the noise.

    Raises:
        InputError: another attention, lengths that do not increase from at least 1, or noise so large beside the radius
            that the sums lose their digits.

    Example:
        >>> attention = CausalAttention.from_qk_matrix(torch.tensor([[0.2]]).double(), memory_radius=2.0)
        >>> run = bounded_run(attention, 1.0, [100, 1000], sequences=2)
        >>> run.square.shape, bool((run.largest <= 2).all())
        (torch.Size([2, 2]), True)
    """
    _require(attention, lengths)
    require_at_least("sequences", sequences)
    like, last = attention.query, lengths[-1]
    with isolated_seed(seed):
        noise = noise_distribution(noise_scale, last, 1, like=like).sample((sequences,)).squeeze(-1)  # (N, T)
    reach = float(noise.abs().max() + attention.start.abs()) + float(
        attention.ov_matrix.abs().sum() * _radius(attention)
    )
    past = _Past.empty(attention, reach, sequences)
    total, squares = like.new_zeros(sequences), like.new_zeros(sequences)
    largest, first, records = like.new_zeros(sequences), [], []
    begin = 0
    while begin < last:
        end = min([begin + _BLOCK, *(n for n in lengths if n > begin)]) if begin else 1
        eps = noise[:, begin:end]
        u = past.solve(eps) if begin else eps + attention.start
        past.add(u)
        total, squares = total + u.sum(-1), squares + u.square().sum(-1)
        if begin:
            largest = torch.maximum(largest, (u - eps).abs().amax(-1))
        if begin < 1000:
            first.append(u)
        if end in lengths:
            records.append(torch.stack([total, squares]) / end)
        begin = end
    mean, square = torch.stack(records).unbind(1)
    head = torch.cat(first, dim=-1)[:, :1000]
    return BoundedRun(torch.tensor(lengths), mean, square, largest, head.unsqueeze(-1), noise[:, : head.shape[1], None])


def _radius(attention: CausalAttention) -> Tensor:
    radius = attention.memory_radius
    if radius is None:
        raise InputError("a bounded run needs an attention with a memory_radius.")
    return radius


def _require(attention: CausalAttention, lengths: list[int]) -> None:
    _radius(attention)
    if (
        attention.dim != 1
        or attention.mask != "strict"
        or attention.batch_shape
        or not float(attention.contraction) < 1
    ):
        raise InputError(
            f"a bounded run needs tokens on the line, a strict mask, no batch axes and a contraction below 1; got "
            f"{attention!r}. Use probattn.models.long_run for any other."
        )
    if attention.query.dtype != torch.float64:
        raise InputError(f"the attention is {attention.query.dtype}; a long run needs float64, use .to(torch.float64).")
    if not lengths or min(lengths) < 1 or sorted(set(lengths)) != list(lengths):
        raise InputError(f"lengths is {lengths}; it must increase strictly from at least 1.")


class _Past:
    """D_h and N_h of N paths at the Chebyshev points of [-U, U], ``(N, H, K)`` each."""

    def __init__(self, attention: CausalAttention, reach: float, sums: tuple[Tensor, Tensor]) -> None:
        self.attention, self.reach, self.sums = attention, reach, sums
        count = sums[0].shape[-1]
        angle = torch.pi * (torch.arange(count, dtype=torch.float64) + 0.5) / count
        self.points = reach * angle.cos()  # (K,)
        self.orders = torch.arange(count, dtype=torch.float64)
        # Values at the points to coefficients of the polynomials T_k.
        self.transform = (2 / count) * (self.orders.unsqueeze(-1) * angle).cos()  # (K, K)
        self.transform[0] /= 2

    @classmethod
    def empty(cls, attention: CausalAttention, reach: float, sequences: int) -> _Past:
        """The past of no tokens, with as many points as rounding asks for."""
        exponent = reach * float(attention.qk_matrix.abs().amax() * _radius(attention))
        if exponent > _RANGE:
            raise InputError(
                f"noise, radius and strength make exponents of {exponent:.3g}, and beyond {_RANGE:g} the sums over the "
                "past lose their digits; use a smaller noise_scale, or probattn.models.long_run."
            )
        count = 32 + int(2 * exponent)
        zeros = attention.query.new_zeros(sequences, attention.heads, count)
        return cls(attention, reach, (zeros, zeros.clone()))

    def add(self, u: Tensor) -> None:
        """Add the shares of tokens u, ``(N, m)``."""
        values, keys = self._memory(u)
        tilt = (keys.unsqueeze(-1) * self.points).exp()  # (N, H, m, K)
        self.sums = (
            self.sums[0] + tilt.sum(-2),
            self.sums[1] + (values.unsqueeze(-2) @ tilt).squeeze(-2),
        )

    def solve(self, eps: Tensor) -> Tensor:
        """Tokens for their noise, ``(N, m)``, by sweeps over all of them.

        Raises:
            InputError: sweeps that do not converge, which a contraction rules out.
        """
        coefficients = [part @ self.transform.mT for part in self.sums]  # (N, H, K)
        before = torch.ones(eps.shape[-1], eps.shape[-1], dtype=torch.float64).tril(-1)
        kappa = float(self.attention.contraction)
        u, after = eps, self._sweep(eps, eps, coefficients, before)
        last, was = u, after
        for _ in range(_SWEEPS):
            # The secant of each token's own slope, which is at most kappa; what is left travels down the past.
            slope = ((after - was) / (u - last)).nan_to_num(0.0, 0.0, 0.0).clamp(-kappa, kappa)
            last, was, u = u, after, u + (after - u) / (1 - slope)
            after = self._sweep(u, eps, coefficients, before)
            change = float((after - u).abs().max())
            if change <= 1e-13 * self.reach:
                return after
        raise InputError(f"{_SWEEPS} sweeps leave a change of {change:.2g}; the attention is no contraction.")

    def _sweep(self, u: Tensor, eps: Tensor, coefficients: list[Tensor], before: Tensor) -> Tensor:
        """Noise plus the mean at tokens u, each after the past and those before it."""
        values, keys = self._memory(u)
        angle = (u / self.reach).clamp(-1, 1).acos()
        basis = (angle.unsqueeze(-1) * self.orders).cos().mT.unsqueeze(1)  # (N, 1, K, m)
        weight, carried = ((part.unsqueeze(-2) @ basis).squeeze(-2) for part in coefficients)  # (N, H, m)
        tilt = (u[:, None, :, None] * keys.unsqueeze(-2)).exp() * before  # (N, H, m, m)
        weight = weight + tilt.sum(-1)
        carried = carried + (tilt @ values.unsqueeze(-1)).squeeze(-1)
        mean: Tensor = (carried / weight).sum(-2)
        return eps + mean

    def _memory(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Values and keys of tokens, ``(N, H, m)`` each, from ``(N, m)``."""
        seen = self.attention.remember(u.unsqueeze(-1)).squeeze(-1).unsqueeze(-2)  # (N, 1, m)
        return seen * self.attention.ov_matrix[:, 0], seen * self.attention.qk_matrix[:, 0]
