r"""Solving u_i = mu_i(u_<i, u_i) + eps_i for many tokens at once, for as long as each has one solution.

A stretch of tokens after a known past is swept, all of its tokens together,

.. math::
    u \leftarrow \varepsilon + \mu(u), \qquad \text{or} \qquad
    u_i \leftarrow u_i - J_i^{-1} (u_i - \mu_i(u) - \varepsilon_i),

the second (a Newton step with the diagonal blocks) after a sweep that gained little. Solving a causal recursion by
fixed-point sweeps over all positions is known as parallel-in-time iteration or Jacobi decoding (Song et al. 2021,
arXiv:2002.03629; Lim et al. 2024, arXiv:2309.12252).

**Number of sweeps.** Errors travel along chains i > s > r > ..., each token in the past of the one before: k sweeps
leave the errors that have travelled k links within the stretch. The first k tokens are therefore right after k Newton
sweeps, and with weights alike convergence is much faster: a link to a past token chosen uniformly shortens a chain by a
factor uniform in (0, 1), so that k links fit between the first token n of the stretch and its last m with a weight of
the order of

.. math:: \frac{(\log m / n)^k}{k!} ,

faster than geometric. Sweeping all T tokens at once waits some e log T sweeps for that decay; stretches that double,
m = 2 n, need as few sweeps at the end as at the beginning, and do less than half of the work in each. Measured with
T = 512, p = 4 and a weak repulsion: 31 sweeps at once; 21, 14, 15, 15, 15 in stretches that end at 32, 64, ..., 512.

**Agreement with solving token by token.** The contraction bound of position i, and the starts of the search for its
solutions, depend on the tokens before i alone. The first token is eps_1 + mu_1. If the tokens before i are those of the
sequential solution, and u_i solves its equation to the same tolerance, then either

- the bound at i is below one: the equation has one solution, and u_i is it; or
- the search that the sequential solver would make meets no solution but u_i, and det J_i >= 0: the sequential solver
  would have found u_i, and no other to report.

In both cases no rule of selection has anything to choose. By induction the sequences agree up to the first position
where neither holds for some element of the batch. This module stops there, and the sequential solver decides, raises or
warns as it does anywhere. It also stops where sweeps do not converge. Derived here.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from probattn.solve.bound import running_diameters
from probattn.solve.context import Context
from probattn.solve.newton import newton_step, residual_tolerance
from probattn.solve.starts import STARTS
from probattn.solve.token import find_token, without_rival

__all__ = ["extend_unique", "unique_prefix"]

_FIRST = 31  # tokens of the first stretch
_LEAST = 16  # tokens of any other
_NUMBERS = 1 << 21  # that the distances within a stretch, or the weights of a search, may take
_WORTH = 4  # tokens in a stretch for a search of all of them at once to be faster than one after the other
_SWEEPS = 60
_GAIN = 4.0  # a sweep that reduces the residual by less is followed by a Newton sweep


@torch.no_grad()
def unique_prefix(context: Context, e: Tensor) -> tuple[Context, Tensor]:
    """The longest prefix whose solution is known to be unique, in every element of the batch.

    Args:
        context: the empty past, with all batch axes of the attention; under the inclusive mask, where without a memory
            radius no bound exists, nothing is swept unless the bound for every past is below one.
        e: noise, ``(*batch, T, p)``, with all batch axes of the attention.

    Returns:
        The context of u_1..m, and these tokens, ``(*batch, m, p)``, 0 <= m <= T. Shorter than it could be where sweeps
        do not converge, and where the batch is so large that a search token by token fills the processor as well. Some
        ten sweeps of O(H T^2 p); memory linear in T.

    Example:
        >>> from probattn import CausalAttention
        >>> e = torch.tensor([[1.0], [-1.0], [0.3]])
        >>> context, u = unique_prefix(Context.of(CausalAttention.from_qk_matrix(torch.tensor([[0.1]])), e[:0]), e)
        >>> context.length, u.flatten()  # the last is 0.3 + sigmoid(0.1 u)
        (3, tensor([1.0000, 0.0000, 0.8205]))
    """
    inclusive = context.attention.mask == "inclusive"
    if e.shape[-2] == 0 or (inclusive and not bool((context.contraction_bound() < 1).all())):
        return context, e[..., :0, :]
    context, u = extend_unique(context, e.movedim(-2, 0))
    return context, u.movedim(0, -2)


@torch.no_grad()
def extend_unique(context: Context, noise: Tensor) -> tuple[Context, Tensor]:
    """Tokens after a past, for as long as their solutions are known to be unique in every element of the batch.

    Args:
        context: the past, with all batch axes.
        noise: of the tokens after it, ``(m, *batch, p)``, m > 0.

    Returns:
        The context with the tokens that were found behind it, and these tokens, ``(k, *batch, p)``, k <= m.
    """
    done, stretches = -context.length, []
    if context.length == 0:
        known = context.attention.mask == "strict"
        first = noise[0] + context.mean(noise[0]) if known else find_token(context, noise[0], "unique").u
        context, stretches = context.extend(first), [first.unsqueeze(0)]
    always = bool((context.ceiling < 1).all())  # the bound for every past: the sequential solver is never needed
    while done + context.length < len(noise):
        certified = bool((context.contraction_bound() < 1).all())  # once it is not, it stays so
        begin = done + context.length
        part = noise[begin : begin + _stretch(context, certified)]
        u = _sweep(context, part) if len(part) else None
        while u is None and always and len(part) > 1:  # fewer tokens at a time converge in fewer sweeps
            part = part[: len(part) // 2]
            u = _sweep(context, part)
        if u is None:
            break
        context, count = _certified(context, u) if certified else _searched(context, part, u)
        stretches.append(u[:count])
        if count == 0 or (not certified and count < len(u)):
            break
    return context, torch.cat(stretches) if stretches else noise[:0]


def _stretch(context: Context, certified: bool) -> int:
    """Number of tokens to solve for together: as many as there are, while what is held for each of them fits."""
    n = context.length
    held = n * math.prod(context.values.shape[:-2]) * (2 if certified else STARTS)
    fits = _NUMBERS // max(1, held)
    if not certified:
        return min(max(n, _WORTH), fits) if fits >= _WORTH else 0
    return max(_FIRST if n == 1 else _LEAST, min(n, fits))


def _with_stretch(context: Context, u: Tensor) -> Context:
    """The past and a stretch u, ``(m, *batch, p)``, each token of which sees what comes before it."""
    n, m = context.length, len(u)
    visible = torch.ones(m, n + m, dtype=torch.bool, device=u.device).tril(n - 1)
    return replace(context.join(u.movedim(0, -2)), visible=visible)


def _sweep(context: Context, noise: Tensor) -> Tensor | None:
    """The tokens after a past for noise ``(m, *batch, p)``, each to its tolerance; None where sweeps fail."""
    u = noise + context.mean(noise)
    before, slow = math.inf, False
    for _ in range(_SWEEPS):
        joined = _with_stretch(context, u)
        mean, jacobian = joined.mean_and_jacobian(u) if slow else (joined.mean(u), None)
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


def _certified(context: Context, u: Tensor) -> tuple[Context, int]:
    """The context with those of the tokens u, ``(m, *batch, p)``, that are certified, and their number."""
    joined, n = context.join(u.movedim(0, -2)), context.length
    # Before each token of the stretch and after the last, (m + 1, *batch, H) and (m + 1, *batch).
    first = running_diameters(joined.values, context.diameters[0], n)
    second = running_diameters(joined.keys, context.diameters[1], n)
    largest = _running_norms(context, u)
    prefixes = replace(joined, diameters=(first, second), largest=largest)
    certified = _everywhere(prefixes.contraction_bound() < 1)  # (m + 1,)
    count = int(certified[:-1].long().cumprod(0).sum())
    return joined.first(n + count, (first[count], second[count]), largest[count]), count


def _searched(context: Context, noise: Tensor, u: Tensor) -> tuple[Context, int]:
    """The context with the tokens u before the first for which the search finds a rival, and their number."""
    # The bound is past one already and does not decrease: the diameters of the past serve.
    joined = _with_stretch(context, u)
    count = int(_everywhere(without_rival(joined, noise, u)).long().cumprod(0).sum())
    return joined.first(context.length + count, largest=_running_norms(context, u)[count]), count


def _everywhere(holds: Tensor) -> Tensor:
    """True where a condition holds in all of the batch, ``(m,)``, from ``(m, *batch)``."""
    return holds.unsqueeze(-1).flatten(1).all(1)


def _running_norms(context: Context, u: Tensor) -> Tensor:
    """The largest norm before each token of the stretch and after the last, ``(m + 1, *batch)``."""
    norms = torch.linalg.vector_norm(context.attention.remember(u.movedim(0, -2)), dim=-1).movedim(-1, 0)
    return torch.cat([context.largest.expand(norms.shape[1:]).unsqueeze(0), norms]).cummax(0).values
