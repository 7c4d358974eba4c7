r"""One token: all solutions of u - mu(u) = eps that can be found, and the one that a rule takes.

Under the strict mask u -> u - mu(u) is proper and of degree one, so that a solution always exists, but it need not be
the only one. Where the contraction bound rules out others, Newton's method finds it. On a line the solutions are all
enclosed. In several dimensions Newton's method starts from many places, and a second solution is an event that the
caller hears of.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probattn.errors import InputError, NoSolutionError, SeveralSolutionsError
from probattn.numerics import linalg
from probattn.solve.context import Context
from probattn.solve.line import line_roots
from probattn.solve.newton import Iterate, newton, polish
from probattn.solve.selection import Selection, choose
from probattn.solve.starts import hull_points, vertices

__all__ = ["Token", "find_roots", "find_token", "solve_token", "without_rival"]

_MORE_STARTS = 64


class Token(NamedTuple):
    """The token that a rule takes.

    Attributes:
        u: ``(*sample, *batch, p)``.
        solved: whether it solves its equation, ``(*sample, *batch)``.
        several: whether another solution is known, ``(*sample, *batch)``.
        roots: all solutions that are known, and other ends of the search, ``(K, *sample, *batch, p)``.
        valid: which of them are solutions, each counted once, ``(K, *sample, *batch)``.
        distance: the smallest residual norm that was reached, ``(*sample, *batch)``.
    """

    u: Tensor
    solved: Tensor
    several: Tensor
    roots: Tensor
    valid: Tensor
    distance: Tensor


def solve_token(
    context: Context, noise: Tensor, selection: Selection, position: int, uniform: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Solve for one token; fail where there is no solution, or more than one and no rule.

    Args:
        context: the past, batch axes ``(*batch,)``.
        noise: eps, ``(*sample, *batch, p)``.
        selection: the rule, see :mod:`probattn.solve.selection`.
        position: position of the token, for messages.
        uniform: see :func:`find_token`.

    Returns:
        The token, ``(*sample, *batch, p)``, and where more than one solution is known, ``(*sample, *batch)``.

    Raises:
        NoSolutionError: no solution was found.
        SeveralSolutionsError: more than one, under the rule "unique".
    """
    found = find_token(context, noise, selection, uniform)
    if not bool(found.solved.all()):
        where = _first(~found.solved)
        strict = context.attention.mask == "strict"
        raise NoSolutionError(
            f"position {position}, batch element {where}: no solution of u - mu(u) = eps was found from "
            f"{len(found.roots)} starts; the smallest residual is {float(found.distance[where]):.3g}. "
            + ("One exists" if strict else "Under the inclusive mask a solution need not exist")
            + "; check that the noise is finite, reduce the scale of the attention, or use float64."
        )
    if selection == "unique" and bool(found.several.any()):
        where = _first(found.several)
        ends = found.roots.movedim(0, -2)[where][found.valid.movedim(0, -1)[where]]  # (roots, p)
        roots = sorted({tuple(round(float(x), 6) for x in root) for root in ends})
        raise SeveralSolutionsError(
            f"position {position}, batch element {where}: u - mu(u) = eps has several solutions, among them "
            f"{roots[:4]}. {int(found.several.sum())} of {found.several.numel()} batch elements at this position. "
            "The attention folds here: "
            "shrink it, or name a rule with selection='uniform', 'smallest_step' or 'nearest_mean'."
        )
    return found.u, found.several


def find_token(context: Context, noise: Tensor, selection: Selection, uniform: Tensor | None = None) -> Token:
    """Find the solutions for one token and take one of them by a rule; failures are reported, not raised.

    Args:
        context: the past, batch axes ``(*batch,)``.
        noise: eps, ``(*sample, *batch, p)``.
        selection: the rule, see :mod:`probattn.solve.selection`.
        uniform: uniform random numbers for the rule "uniform", ``(*sample, *batch)``; None: drawn from torch's global
            generator.
    """
    if bool((context.contraction_bound() < 1).all()):
        ends = newton(context, noise, _usual(context, noise).unsqueeze(0))
        solved, distance = ends.solved.squeeze(0), ends.distance.squeeze(0)
        u = polish(context, noise, ends.u.squeeze(0))
        return Token(u, solved, torch.zeros_like(solved), ends.u, ends.solved, distance)
    if context.on_a_line:
        roots = line_roots(context, noise)
        valid, roots = ~roots.isnan().squeeze(-1), roots.nan_to_num()
        several = valid.sum(0) > 1
    else:
        roots, valid, distance, several = _search(context, noise)
    if not len(roots):
        roots, valid = noise.unsqueeze(0), torch.zeros(1, *noise.shape[:-1], dtype=torch.bool, device=noise.device)
    best = choose(context, noise, roots, valid, selection, uniform).unsqueeze(0)  # (1, *sample, *batch)
    chosen = roots.gather(0, best.unsqueeze(-1).expand(1, *roots.shape[1:])).squeeze(0)
    if context.on_a_line:
        distance = torch.linalg.vector_norm(chosen - context.mean(chosen) - noise, dim=-1)
    elif context.attention.mask == "strict":  # a map of degree one that turns over somewhere has other solutions there
        several = several | (linalg.det(context.mean_and_jacobian(chosen)[1]) < 0)
    return Token(polish(context, noise, chosen), valid.any(0), several, roots, valid, distance)


def without_rival(context: Context, noise: Tensor, u: Tensor) -> Tensor:
    """True where :func:`find_token` would find no solution beside a known one.

    Args:
        context: the past and a stretch of m tokens, each of which sees what comes before it (``visible``).
        noise: of the stretch, ``(m, *batch, p)``.
        u: a solution for each, ``(m, *batch, p)``.

    Returns:
        ``(m, *batch)``.
    """
    if context.on_a_line:
        return (~line_roots(context, noise).isnan()).sum(0).squeeze(-1) == 1
    starts = torch.cat([torch.stack([u, _usual(context, noise)]), noise + vertices(context)])
    ends = newton(context, noise, starts)
    gap = torch.linalg.vector_norm(ends.u - u, dim=-1).masked_fill(~ends.solved, 0.0)
    alone: Tensor = (gap <= _same_root(ends.tolerance)).all(0) & (linalg.det(ends.jacobian[0]) >= 0)
    return alone


def find_roots(context: Context, noise: Tensor) -> Tensor:
    """Solutions of u - mu(u) = eps for one past and noise: all of them on a line, else those found from many starts.

    In several dimensions whether they are all solutions is not proved; under the strict mask the map has degree one,
    and an even number away from a fold means that one was missed.

    Args:
        context: without batch axes.
        noise: eps, (p,).

    Returns:
        (K, p): in increasing order on a line, else nearest to eps first.

    Raises:
        InputError: batch axes.

    Example:
        >>> from probattn import CausalAttention
        >>> attention = CausalAttention.from_qk_matrix(torch.diag(torch.tensor([3.0, 0.0])).double())
        >>> context = Context.of(attention, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).double())
        >>> find_roots(context, torch.zeros(2).double())[:, 0].abs().round(decimals=4)
        tensor([0.0000, 0.9949, 0.9949], dtype=torch.float64)
    """
    if context.batch_shape or noise.shape != context.values.shape[-1:]:
        raise InputError(
            f"find_roots needs one past and one noise; got batch {tuple(context.batch_shape)} and noise of shape "
            f"{tuple(noise.shape)}. Call it for each."
        )
    if context.on_a_line and context.length:
        return line_roots(context, noise)
    begin = _usual(context, noise).unsqueeze(0)
    if context.length and not bool(context.contraction_bound() < 1):
        begin = torch.cat([begin, noise + vertices(context), noise + hull_points(context, _MORE_STARTS)])
    found: list[Tensor] = []
    while len(begin):
        ends = newton(context, noise, begin)
        u = polish(context, noise, ends.u)
        before = len(found)
        for root, close in zip(u[ends.solved], _same_root(ends.tolerance[ends.solved]), strict=True):
            if all(float(torch.linalg.vector_norm(root - other)) > float(close) for other in found):
                found.append(root)
        # Between two solutions there is often a third, of the kind that Newton's method seldom meets by chance.
        begin = torch.stack(
            [(root + other) / 2 for k, root in enumerate(found[before:], before) for other in found[:k]] or [u[0]]
        )[: max(0, 64 * (len(found) - before))]
    roots = torch.stack(found) if found else noise.new_empty(0, *noise.shape)
    return roots[torch.linalg.vector_norm(roots - noise, dim=-1).argsort()]


def _search(context: Context, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ends of Newton's method from many starts, the first of each solution among them, the least residual, several."""
    starts = torch.cat([_usual(context, noise).unsqueeze(0), noise + _spread_out(vertices(context), noise)])
    ends = newton(context, noise, starts)
    missing = ~ends.solved.any(0)
    if bool(missing.any()):
        ends = _look_further(context, noise, ends, missing.nonzero(as_tuple=True) if missing.dim() else ())
    apart = torch.linalg.vector_norm(ends.u.unsqueeze(1) - ends.u.unsqueeze(0), dim=-1) > _same_root(ends.tolerance)
    earlier = torch.ones(len(ends.u), len(ends.u), dtype=torch.bool, device=noise.device).tril(-1)
    earlier = earlier.view(*earlier.shape, *[1] * (ends.u.dim() - 2))
    repeated = (~apart & earlier & ends.solved.unsqueeze(0)).any(1)  # found from a start before it
    valid = ends.solved & ~repeated
    return ends.u, valid, ends.distance.amin(0), valid.sum(0) > 1


def _look_further(context: Context, noise: Tensor, ends: Iterate, index: tuple[Tensor, ...]) -> Iterate:
    """Add more starts for the elements without a solution; the others repeat their first end."""
    # Where the mean is bounded a solution exists: look for it as far from eps as the mean is long, and from anywhere
    # in the hull of what the mean can be.
    rest = context.select(index, noise.shape[:-1]) if index else context
    noise = noise[index]  # (K, p)
    more = _around(rest, noise)
    if rest.length:
        more = torch.cat([more, noise + hull_points(rest, _MORE_STARTS)])
    again = newton(rest, noise, more)  # (more, K)
    found = []
    for whole, part in zip(ends, again, strict=True):
        longer = whole[:1].repeat(len(part), *[1] * (whole.dim() - 1))
        longer.movedim(0, len(index))[index] = part.movedim(0, 1) if index else part
        found.append(torch.cat([whole, longer]))
    return Iterate(*found)


def _usual(context: Context, noise: Tensor) -> Tensor:
    """The first place to start from, eps + mu(eps), shaped as the token."""
    return noise + context.mean(noise)


def _around(context: Context, noise: Tensor) -> Tensor:
    """Points on a sphere about eps with the length of mu(eps) as its radius, ``(starts, *sample, *batch, p)``."""
    generator = torch.Generator().manual_seed(0)  # the same search every time
    direction = torch.randn(_MORE_STARTS, noise.shape[-1], generator=generator, dtype=torch.float64).to(noise)
    direction = torch.nn.functional.normalize(direction, dim=-1)
    radius = torch.linalg.vector_norm(context.mean(noise), dim=-1, keepdim=True)  # (*sample, *batch, 1)
    points: Tensor = noise + radius * direction.view(_MORE_STARTS, *[1] * (noise.dim() - 1), -1)
    return points


def _same_root(tolerance: Tensor) -> Tensor:
    """Distance within which two ends are one solution: at a double root Newton stops within about sqrt(tolerance)."""
    return 4 * tolerance.sqrt()


def _first(mask: Tensor) -> tuple[int, ...]:
    """Index of the first true entry."""
    return tuple(int(k) for k in mask.nonzero()[0])


def _spread_out(values: Tensor, noise: Tensor) -> Tensor:
    """Give ``(starts, *batch, p)`` an axis of size one for each sample axis of the noise, ``(*sample, *batch, p)``."""
    return values.view(len(values), *[1] * (noise.dim() + 1 - values.dim()), *values.shape[1:])
