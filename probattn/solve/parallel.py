r"""Solving u_i = mu_i(u_<i, u_i) + eps_i for many tokens at once, as far as each has one solution.

A stretch of tokens after a known past is swept, all of its tokens together,

.. math::
    u \leftarrow \varepsilon + \mu(u), \qquad \text{or} \qquad
    u_i \leftarrow u_i - J_i^{-1} (u_i - \mu_i(u) - \varepsilon_i),

the second (Newton's method with the diagonal blocks) after a sweep that gained little.

**How many sweeps.** Errors travel along chains i > s > r > ..., each token in the past of the one before: k sweeps
leave what has travelled k links within the stretch. So the first k tokens are right after k sweeps of Newton's, and
with weights alike it goes much faster: a link to a past token chosen uniformly shortens a chain by a factor uniform in
(0, 1), so that k links fit between the first token n of the stretch and its last m with a weight of the order of

.. math:: \frac{(\log m / n)^k}{k!} ,

faster than geometric. Sweeping all T tokens at once waits some e log T sweeps for that decay; stretches that double,
m = 2 n, need as few sweeps at the end as at the beginning, and do less than half of the work in each. Measured with
T = 512, p = 4 and a weak repulsion: 31 sweeps at once; 21, 14, 15, 15, 15 in stretches that end at 32, 64, ..., 512.

**Why the sequence is the one that solving token by token gives.** The contraction bound of position i, and the starts
of the search for its solutions, depend on the tokens before i alone. The first token is eps_1 + mu_1. If the tokens
before i are those of the sequential solution, and u_i solves its equation to the same tolerance, then either

- the bound at i is below one: the equation has one solution, and u_i is it; or
- the search from every start that the sequential solver would use meets no solution but u_i, and det J_i >= 0: the
  sequential solver would have found u_i, and no other to report.

In both cases no rule of selection has anything to choose. By induction the sequences agree up to the first position
where neither holds for some element of the batch. There this module stops, and the sequential solver decides, raises or
warns as it does anywhere. The same happens where sweeps do not converge. Derived here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.solve.context import Context
from probattn.solve.rows import Tokens
from probattn.solve.search import STARTS, newton_step, residual_tolerance, without_rival

__all__ = ["unique_prefix"]

_FIRST = 31  # tokens of the first stretch
_LEAST = 16  # tokens of any other
_NUMBERS = 1 << 21  # that the distances within a stretch, or the weights of a search, may take
_WORTH = 4  # tokens in a stretch for a search of all of them at once to be faster than one after the other
_SWEEPS = 60
_GAIN = 4.0  # a sweep that reduces the residual by less is followed by one of Newton's


@torch.no_grad()
def unique_prefix(attention: CausalAttention, e: Tensor) -> tuple[Context, Tensor]:
    """The solution up to the first position where it is not known to be one of its kind, in any element of the batch.

    Args:
        attention: the attention; under the inclusive mask, where no bound exists, nothing is swept.
        e: noise, (*batch, T, p), with all batch axes of the attention.

    Returns:
        The past u_1..m, and these tokens, (*batch, m, p), 0 <= m <= T. Shorter than it could be where sweeps do not
        converge, and where the batch is so large that a search token by token fills the processor as well. Some ten
        sweeps of O(H T^2 p); memory linear in T.

    Example:
        >>> attention = CausalAttention.from_qk_matrix(torch.tensor([[0.1]]))
        >>> past, u = unique_prefix(attention, torch.tensor([[1.0], [-1.0], [0.3]]))
        >>> past.length, u.flatten()  # the last is 0.3 + sigmoid(0.1 u)
        (3, tensor([1.0000, 0.0000, 0.8205]))
    """
    past = Context.of(attention, e[..., :0, :])
    if attention.mask == "inclusive" or e.shape[-2] == 0:
        return past, e[..., :0, :]
    first = e[..., 0, :] + attention.start
    past, stretches = past.extend(first), [first.unsqueeze(-2)]
    while past.length < e.shape[-2]:
        certified = bool((past.contraction_bound() < 1).all())  # once it is not, it stays so
        noise = e[..., past.length : past.length + _stretch(past, certified), :]
        u = _sweep(past, noise) if noise.shape[-2] else None
        if u is None:
            break
        past, count = _certified(past, u) if certified else _searched(past, noise, u)
        stretches.append(u[..., :count, :])
        if count == 0 or (not certified and count < u.shape[-2]):
            break
    return past, torch.cat(stretches, dim=-2)


def _stretch(past: Context, certified: bool) -> int:
    """How many tokens to solve for together: as many as there are, while what is held for each of them fits."""
    n = past.length
    held = n * math.prod(past.moved.shape[:-2]) * (2 if certified else STARTS)
    fits = _NUMBERS // max(1, held)
    if not certified:
        return min(max(n, _WORTH), fits) if fits >= _WORTH else 0
    return max(_FIRST if n == 1 else _LEAST, min(n, fits))


def _joined(past: Context, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """o_s and g_s of the past and of the stretch u, (*batch, H, n + m, p), and who sees whom, (m, n + m)."""
    tokens = u.unsqueeze(-3)
    moved = torch.cat([past.moved, tokens @ past.attention.ov_matrix.mT], dim=-2)
    pulled = torch.cat([past.pulled, tokens @ past.attention.qk_matrix], dim=-2)
    n, m = past.length, u.shape[-2]
    return moved, pulled, torch.ones(m, n + m, dtype=torch.bool, device=u.device).tril(n - 1)


def _sweep(past: Context, noise: Tensor) -> Tensor | None:
    """The tokens after ``past`` for noise (*batch, m, p), each to its tolerance; None where sweeps do not get there."""
    u = noise + Tokens(past.moved, past.pulled).mean(noise)
    before, slow = math.inf, False
    for _ in range(_SWEEPS):
        moved, pulled, visible = _joined(past, u)
        tokens = Tokens(moved, pulled)
        mean, jacobian = tokens.mean_and_jacobian(u, visible) if slow else (tokens.mean(u, visible), None)
        residual = u - mean - noise
        error = torch.linalg.vector_norm(residual, dim=-1) / residual_tolerance(u, mean)
        worst = float(error.max()) if error.numel() else 0.0
        slow = worst > before / _GAIN
        if worst <= 1 and (slow or worst <= 1 / 100):  # from tolerance on to rounding, while that is quick
            return u
        if not math.isfinite(worst):
            return None
        u = u - (residual if jacobian is None else newton_step(jacobian, residual))
        before = worst
    return None


def _certified(past: Context, u: Tensor) -> tuple[Context, int]:
    """The past with those of the tokens u, (*batch, m, p), that are certified, and how many they are."""
    moved, pulled, visible = _joined(past, u)
    n = past.length
    first, second = (
        _running(spread, torch.cdist(points[..., n:, :], points, compute_mode="donot_use_mm_for_euclid_dist"), visible)
        for spread, points in zip(past.spread, (moved, pulled), strict=True)
    )
    sizes = _sizes(past, u)
    # The pasts of each token of the stretch and of the one after it, along a first axis of the diameters.
    prefixes = Context(past.attention, moved, pulled, (first, second), sizes)
    certified = _everywhere(prefixes.contraction_bound() < 1)  # (m + 1,)
    count = int(certified[:-1].long().cumprod(0).sum())
    end = n + count
    spread = (first[count], second[count])
    return Context(past.attention, moved[..., :end, :], pulled[..., :end, :], spread, sizes[count]), count


def _searched(past: Context, noise: Tensor, u: Tensor) -> tuple[Context, int]:
    """The past with the tokens u before the first for which the search finds a rival, and how many they are."""
    moved, pulled, visible = _joined(past, u)
    sizes = _sizes(past, u)
    # The bound is past one already and does not decrease: these diameters need no care.
    joined = Context(past.attention, moved, pulled, past.spread, sizes[-1])
    alone = without_rival(joined, visible, noise.movedim(-2, 0), u.movedim(-2, 0))  # (m, *batch)
    count = int(_everywhere(alone).long().cumprod(0).sum())
    end = past.length + count
    return Context(past.attention, moved[..., :end, :], pulled[..., :end, :], past.spread, sizes[count]), count


def _everywhere(holds: Tensor) -> Tensor:
    """Whether it holds in all of the batch, (m,), from (m, *batch)."""
    return holds.unsqueeze(-1).flatten(1).all(1)


def _sizes(past: Context, u: Tensor) -> Tensor:
    """The largest norm before each token of the stretch and after the last, (m + 1, *batch)."""
    norms = torch.linalg.vector_norm(u, dim=-1).movedim(-1, 0)
    return torch.cat([past.size.expand(norms.shape[1:]).unsqueeze(0), norms]).cummax(0).values


def _running(spread: Tensor, distance: Tensor, visible: Tensor) -> Tensor:
    """Diameters before each token of the stretch and after the last, (m + 1, *batch, H)."""
    reach = distance.mul_(visible).amax(-1).movedim(-1, 0)  # to what each sees, (m, *batch, H)
    return torch.cat([spread.expand(reach.shape[1:]).unsqueeze(0), reach]).cummax(0).values
