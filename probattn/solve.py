r"""Solving u_i = mu_i(u_<i, u_i) + eps_i token by token, and differentiating through the solution.

The map u_i -> e_i is proper and of degree one, so under the strict mask a solution always exists, but it need not be
the only one. Where the contraction bound does not rule out others, the search starts from several places, and a second
solution is an event that the caller hears of.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.conditional import Past
from probattn.errors import InputError, NoSolutionError, SeveralSolutionsError, SeveralSolutionsWarning, require_finite
from probattn.once import first_order_only

__all__ = [
    "Selection",
    "find_roots",
    "find_sequence",
    "hull_points",
    "require_selection",
    "solve_sequence",
    "solve_token",
]

Selection = Literal["unique", "uniform", "smallest_step", "nearest_mean"]

_STARTS = 8
_LINE_STARTS = 17
_MORE_STARTS = 64
_ITERATIONS = 100
_HALVINGS = 30


def solve_sequence(attention: CausalAttention, e: Tensor, *, selection: Selection = "unique") -> Tensor:
    r"""The sequence u with u - mu(u) = e.

    Each token is found by Newton's method with a line search on \|e_i(u) - e_i\|. The gradient is that of the solution,
    by the implicit-function theorem: with w = (de/du)^{-T} g from one back substitution through the block-triangular
    Jacobian, dL/de = w and dL/dtheta = w . dmu/dtheta, so no solver step is kept in the graph.

    Args:
        attention: the attention.
        e: noise, (*batch, T, p).
        selection: "unique" raises where a second solution is found. The search starts from a score of places and can
            miss one; where a contraction certifies there is none, and for one past in one dimension ``NextToken.roots``
            lists them all. The others choose among those found and warn with the number of
            draws and the positions: "uniform" at random, "smallest_step" the one with the smallest \|mu_i\| = \|u_i -
            eps_i\|, "nearest_mean" the one nearest to the plain mean of what the past carries.

    Returns:
        u, the broadcast of the batch axes with (T, p). Differentiable once in e and in every parameter.
        Time O(H T^2 p) and a few p x p solves a token, sequential in T.

    Raises:
        NoSolutionError: Newton's method did not reach tolerance (1000 machine epsilons, relative).
        SeveralSolutionsError: several solutions, under selection "unique".

    Example:
        >>> attention = CausalAttention.from_bilinear(torch.tensor([[0.5]]))
        >>> u = solve_sequence(attention, torch.tensor([[1.0], [-1.0], [0.3]]))
        >>> bool(torch.allclose(attention.residual(u), torch.tensor([[1.0], [-1.0], [0.3]]), atol=1e-5))
        True
    """
    if e.dim() < 2 or e.shape[-1] != attention.dim or e.dtype != attention.query.dtype:
        raise InputError(
            f"the noise has shape {tuple(e.shape)} and is {e.dtype}; it must be (*batch, T, {attention.dim}) and "
            f"{attention.query.dtype}, like the attention."
        )
    require_finite("the noise", e.detach())
    solution = _solve(attention.detach(), e.detach(), selection)
    if not torch.is_grad_enabled():
        return solution
    noise = e + attention.mean(solution)  # carries the graph of e and of the parameters; its value is the solution
    if not noise.requires_grad:
        return solution
    result: Tensor = _ImplicitSolution.apply(noise, solution, attention.detach())  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def find_sequence(attention: CausalAttention, e: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """The sequence and where it was one of several, without a gradient and without a warning.

    Args:
        attention: the attention.
        e: noise, (*batch, T, p).
        selection: see :func:`solve_sequence`.

    Returns:
        u, the broadcast of the batch axes with (T, p), and the positions with more than one solution, (*batch, T).

    Raises:
        NoSolutionError, SeveralSolutionsError: see :func:`solve_sequence`.
    """
    batch = torch.broadcast_shapes(attention.batch_shape, e.shape[:-2])
    e = e.expand(*batch, *e.shape[-2:])
    past = Past.of(attention, e[..., :0, :])
    tokens, folded = [], []
    for i in range(e.shape[-2]):
        token, several = solve_token(past, e[..., i, :], selection, i)
        tokens.append(token)
        folded.append(several)
        past = past.extend(token)
    return torch.stack(tokens, dim=-2), torch.stack(folded, dim=-1)


def _solve(attention: CausalAttention, e: Tensor, selection: Selection) -> Tensor:
    solution, several = find_sequence(attention, e, selection)
    if bool(several.any()):
        positions = sorted({int(i) for i in several.nonzero()[:, -1]})
        draws, total = int(several.any(-1).sum()), math.prod(several.shape[:-1])
        shown = ", ".join(map(str, positions[:8])) + (", ..." if len(positions) > 8 else "")
        warnings.warn(
            f"{draws} of {total} sequences had several solutions, at positions {shown}; one was taken by the rule "
            f"{selection!r}. The law of these draws is not the density that log_prob gives.",
            SeveralSolutionsWarning,
            stacklevel=4,
        )
    return solution


def require_selection(selection: str) -> None:
    """Refuse a rule that does not exist.

    Raises:
        InputError: naming those that do.
    """
    if selection not in get_args(Selection):
        raise InputError(f"selection is {selection!r}; use one of {', '.join(map(repr, get_args(Selection)))}.")


def solve_token(past: Past, noise: Tensor, selection: Selection, position: int) -> tuple[Tensor, Tensor]:
    """One step: the token, (*sample, *batch, p), and where more than one solution was found, (*sample, *batch).

    Args:
        past: what has been seen, batch (*batch,).
        noise: eps, (*sample, *batch, p).
        selection: see :func:`solve_sequence`.
        position: of the token, for messages.

    Raises:
        InputError: an unknown selection.
        NoSolutionError, SeveralSolutionsError: see :func:`solve_sequence`.
    """
    require_selection(selection)
    alone = bool((past.contraction_bound() < 1).all())
    starts = (noise + past.mean(noise)).unsqueeze(0)  # (1, *sample, *batch, p)
    if not alone:
        starts = torch.cat([starts, noise + _spread_out(_vertices(past), noise)])
    u, distance, tolerance, determinant = _newton(past, noise, starts)
    if past.length and not bool((distance <= tolerance).any(0).all()):
        # A solution exists under the strict mask; look for it from anywhere in the hull of what the mean can be.
        again = _newton(past, noise, noise + _spread_out(hull_points(past, _MORE_STARTS), noise))
        both = zip((u, distance, tolerance, determinant), again, strict=True)
        u, distance, tolerance, determinant = (torch.cat(pair) for pair in both)
    solved = distance <= tolerance  # (starts, *sample, *batch)
    if not bool(solved.any(0).all()):
        where = _first(~solved.any(0))
        strict = past.attention.mask == "strict"
        raise NoSolutionError(
            f"position {position}, batch element {where}: no solution of u - mu(u) = eps was found from {len(u)} "
            f"starts of {_ITERATIONS} Newton steps; the smallest residual is {float(distance.amin(0)[where]):.3g}. "
            + ("One exists" if strict else "Under the inclusive mask a solution need not exist")
            + "; check that the noise is finite, reduce the scale of the attention, or use float64."
        )
    best = _choose(past, noise, u, solved, tolerance, selection).unsqueeze(0)  # (1, *sample, *batch)
    chosen = u.gather(0, best.unsqueeze(-1).expand(1, *u.shape[1:])).squeeze(0)
    gap = torch.linalg.vector_norm(u - chosen, dim=-1).masked_fill(~solved, 0.0)
    several = (gap > _same_root(tolerance)).any(0)
    if past.attention.mask == "strict":  # a map of degree one that turns over somewhere has other solutions there
        several = several | (determinant.gather(0, best).squeeze(0) < 0)
    if alone:
        several = torch.zeros_like(several)
    if selection == "unique" and bool(several.any()):
        where = _first(several)
        ends = u.movedim(0, -2)[where][solved.movedim(0, -1)[where]]  # (solved starts, p)
        roots = sorted({tuple(round(float(x), 6) for x in root) for root in ends})
        raise SeveralSolutionsError(
            f"position {position}, batch element {where}: u - mu(u) = eps has several solutions, among them "
            f"{roots[:4]}. "
            f"{int(several.sum())} of {several.numel()} batch elements at this position. The attention is folded here: "
            "shrink it, or name a rule with selection='uniform', 'smallest_step' or 'nearest_mean'."
        )
    return chosen, several


def find_roots(past: Past, noise: Tensor, starts: int = _MORE_STARTS) -> Tensor:
    """The solutions u of u - mu(u) = eps that Newton's method finds from many starts, (K, p), nearest to eps first.

    All of them are distinct solutions; whether they are all solutions is proved in one dimension alone, by
    :class:`probattn.branches.Branches`. Under the strict mask the map has degree one and an even number away from a
    fold means that one was missed.

    Args:
        past: without batch axes.
        noise: eps, (p,).
        starts: random points of the hull of what the mean can be, beside its vertices.

    Raises:
        InputError: batch axes.

    Example:
        >>> from probattn.attention import CausalAttention
        >>> attention = CausalAttention.from_bilinear(torch.tensor([[3.0]]).double())
        >>> past = Past.of(attention, torch.tensor([[-1.0], [1.0]]).double())
        >>> find_roots(past, torch.zeros(1).double()).flatten().abs().round(decimals=4)
        tensor([0.0000, 0.9949, 0.9949], dtype=torch.float64)
    """
    if past.moved.dim() != 3 or noise.shape != past.moved.shape[-1:]:
        raise InputError(
            f"find_roots needs one past and one noise; got batch {tuple(past.moved.shape[:-3])} and noise of shape "
            f"{tuple(noise.shape)}. Call it for each."
        )
    begin = (noise + past.mean(noise)).unsqueeze(0)
    if past.length and not bool(past.contraction_bound() < 1):
        begin = torch.cat([begin, noise + _vertices(past), noise + hull_points(past, starts)])
    found: list[Tensor] = []
    while len(begin):
        u, distance, tolerance, _ = _newton(past, noise, begin)
        solved = distance <= tolerance
        before = len(found)
        for root, close in zip(u[solved], _same_root(tolerance[solved]), strict=True):
            if all(float(torch.linalg.vector_norm(root - other)) > float(close) for other in found):
                found.append(root)
        # Between two solutions there is often a third, of the kind that Newton's method seldom meets by chance.
        begin = torch.stack(
            [(root + other) / 2 for k, root in enumerate(found[before:], before) for other in found[:k]] or [u[0]]
        )[: max(0, 64 * (len(found) - before))]
    roots = torch.stack(found) if found else noise.new_empty(0, *noise.shape)
    return roots[torch.linalg.vector_norm(roots - noise, dim=-1).argsort()]


def _choose(past: Past, noise: Tensor, u: Tensor, solved: Tensor, tolerance: Tensor, selection: Selection) -> Tensor:
    """Index of the start whose root is taken, (*sample, *batch)."""
    if selection == "uniform" and len(u) > 1:
        apart = torch.linalg.vector_norm(u.unsqueeze(1) - u.unsqueeze(0), dim=-1) > _same_root(tolerance)
        earlier = torch.ones(len(u), len(u), dtype=torch.bool, device=u.device).tril(-1)
        earlier = earlier.view(len(u), len(u), *[1] * (u.dim() - 2))
        repeated = (~apart & earlier & solved.unsqueeze(0)).any(1)  # found by a start before it
        return torch.rand_like(tolerance).masked_fill(repeated | ~solved, -1.0).argmax(0)
    aim = past.moved.mean(-2).sum(-2) if selection == "nearest_mean" and past.length else noise
    distance: Tensor = torch.linalg.vector_norm(u - aim, dim=-1)
    return distance.masked_fill(~solved, torch.inf).argmin(0)


def _same_root(tolerance: Tensor) -> Tensor:
    """Two starts that end at one double root stop within about sqrt(tolerance) of each other."""
    return 4 * tolerance.sqrt()


def _first(mask: Tensor) -> tuple[int, ...]:
    """Index of the first true entry."""
    return tuple(int(k) for k in mask.nonzero()[0])


def _spread_out(values: Tensor, noise: Tensor) -> Tensor:
    """Give (starts, *batch, p) an axis of size one for each sample axis of the noise, (*sample, *batch, p)."""
    return values.view(len(values), *[1] * (noise.dim() + 1 - values.dim()), *values.shape[1:])


def _vertices(past: Past) -> Tensor:
    """Values that the mean can come near, far from each other, (starts, *batch, p)."""
    if past.attention.dim == 1 and past.length:
        low, high = (end.sum(-1) for end in (past.moved.amin((-2, -1)), past.moved.amax((-2, -1))))  # (*batch,)
        share = torch.linspace(0, 1, _LINE_STARTS, dtype=low.dtype, device=low.device)
        return (low + (high - low) * share.view(-1, *[1] * low.dim())).unsqueeze(-1)
    values = past.moved.sum(-3)  # all heads on one token, (*batch, n, p)
    distance = torch.linalg.vector_norm(values - values.mean(-2, keepdim=True), dim=-1)  # (*batch, n)
    chosen = []
    for step in range(min(_STARTS, past.length)):
        index = distance.argmax(-1)[..., None, None].expand(*values.shape[:-2], 1, values.shape[-1])
        vertex = values.gather(-2, index)  # (*batch, 1, p)
        chosen.append(vertex.squeeze(-2))
        away = torch.linalg.vector_norm(values - vertex, dim=-1)
        distance = away if step == 0 else torch.minimum(distance, away)
    vertices = torch.stack(chosen) if chosen else values.new_empty(0, *values.shape[:-2], values.shape[-1])
    return torch.cat([vertices, hull_points(past, _STARTS)]) if past.length > 1 else vertices


def hull_points(past: Past, count: int) -> Tensor:
    """Random points of the hull of what the mean can be, half of them corners with each head on a token of its own.

    Args:
        past: with at least one token.
        count: how many.

    Returns:
        (count, *batch, p), the same at every call.
    """
    heads, length = past.moved.shape[-3:-1]
    generator = torch.Generator().manual_seed(length)  # the same search every time
    share = torch.rand(count, heads, length, generator=generator, dtype=torch.float64)
    corners = torch.nn.functional.one_hot(share.argmax(-1), length).double()
    share = -share.log() / -share.log().sum(-1, keepdim=True)
    weights = torch.where(torch.arange(count)[:, None, None] % 2 == 0, corners, share).to(past.moved)
    weights = weights.view(count, *[1] * (past.moved.dim() - 3), heads, 1, length)
    mixed: Tensor = (weights @ past.moved).squeeze(-2).sum(-2)  # (count, *batch, p)
    return mixed


def _newton(past: Past, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Damped Newton from each start: u, (starts, *batch, p), its residual norm, the tolerance there, and det J."""
    u = _iterate(past, noise, u, _ITERATIONS)
    mean, jacobian = past.mean_and_jacobian(u)
    residual = u - mean - noise
    norm = torch.linalg.vector_norm(residual, dim=-1)
    # One more full step costs little and takes the residual from tolerance to rounding; kept only where it helps.
    step, _ = torch.linalg.solve_ex(jacobian, residual.unsqueeze(-1))
    polished = u - step.squeeze(-1)
    after = torch.linalg.vector_norm(polished - past.mean(polished) - noise, dim=-1)
    better = after < norm
    tolerance = _tolerance(u, mean)
    u = torch.where(better.unsqueeze(-1), polished, u)
    return u, torch.where(better, after, norm), tolerance, torch.linalg.det(jacobian)


def _tolerance(u: Tensor, mean: Tensor) -> Tensor:
    """Residual norm at which a solution counts as found, (*batch,)."""
    size: Tensor = 1 + torch.linalg.vector_norm(u, dim=-1) + torch.linalg.vector_norm(mean, dim=-1)
    return 1e3 * torch.finfo(u.dtype).eps * size


def _iterate(past: Past, noise: Tensor, u: Tensor, iterations: int) -> Tensor:
    """Newton's steps with a line search, until each start is within tolerance or no step helps it."""
    mean, jacobian = past.mean_and_jacobian(u)
    residual = u - mean - noise
    stuck = torch.zeros(u.shape[:-1], dtype=torch.bool, device=u.device)  # at a fold, where no step helps
    for done in range(iterations):
        norm = torch.linalg.vector_norm(residual, dim=-1)
        active = (norm > _tolerance(u, mean)) & ~stuck
        count = int(active.sum())
        if count == 0:
            break
        if 2 * count <= active.numel() > 1:  # few are left: go on with these alone
            index = active.nonzero(as_tuple=True)  # starts, then batch axes
            batch = torch.broadcast_shapes(noise.shape[:-1], u.shape[1:-1])
            rest = past.select(index[1:], batch)
            found = _iterate(rest, noise.expand(*batch, -1)[index[1:]], u[index].unsqueeze(0), iterations - done)
            return u.index_put(index, found.squeeze(0))
        step, _ = torch.linalg.solve_ex(jacobian, residual.unsqueeze(-1))
        step = step.squeeze(-1)
        # On a fold the block is singular: fall back to the plain fixed-point step, whose direction is the residual.
        usable = torch.isfinite(step).all(-1, keepdim=True)
        step = torch.where(usable, step, residual)
        size = torch.ones_like(norm)
        for _ in range(_HALVINGS):
            trial = u - size.unsqueeze(-1) * step
            worse = active & ~(
                torch.linalg.vector_norm(trial - past.mean(trial) - noise, dim=-1) <= (1 - 1e-4 * size) * norm
            )
            if not bool(worse.any()):
                break
            size = torch.where(worse, size / 2, size)
        else:
            stuck = stuck | worse
        u = torch.where(active.unsqueeze(-1), u - size.unsqueeze(-1) * step, u)
        mean, jacobian = past.mean_and_jacobian(u)
        residual = u - mean - noise
    return u


class _ImplicitSolution(torch.autograd.Function):
    """The solution as a function of z = e + mu(u*): the identity forward, (de/du)^{-T} backward."""

    @staticmethod
    def forward(ctx: Any, noise: Tensor, solution: Tensor, attention: CausalAttention) -> Tensor:
        ctx.save_for_backward(noise, solution)
        ctx.attention = attention
        return solution.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        noise, u = ctx.saved_tensors
        with torch.no_grad():
            result = _back_substitute(ctx.attention, u, gradient)
        return first_order_only(result, noise, "the solution of u - mu(u) = e"), None, None


def _back_substitute(attention: CausalAttention, u: Tensor, gradient: Tensor) -> Tensor:
    r"""W with (de/du)^T w = g, last token first.

    The block (i, s), s < i, of de/du is :math:`-\sum_h \alpha_{is} [C + (o_s - \bar o_i)(A u_i)^T]`.
    Time O(H T^2 p), memory O(H T p)
    besides the weights. Derived here.
    """
    weights = attention.weights(u)  # (*batch, H, T, T)
    diagonal = attention.jacobian(u)  # (*batch, T, p, p)
    tokens = u.unsqueeze(-3)  # (*batch, 1, T, p)
    moved = tokens @ attention.transport.mT  # o, (*batch, H, T, p)
    average = weights @ moved
    attraction = tokens @ attention.bilinear.mT  # A u_i, (*batch, H, T, p)
    remaining = gradient.clone()
    result = torch.empty_like(remaining)
    for i in reversed(range(u.shape[-2])):
        w = torch.linalg.solve(diagonal[..., i, :, :].mT, remaining[..., i, :])  # (*batch, p)
        result[..., i, :] = w
        if i == 0:
            break
        column = w[..., None, :, None]  # (*batch, 1, p, 1)
        carried = (attention.transport.mT @ column).mT  # C^T w, (*batch, H, 1, p)
        reach = (moved[..., :i, :] - average[..., i : i + 1, :]) @ column  # (o_s - obar_i) . w, (*batch, H, i, 1)
        pull = carried + reach * attraction[..., i : i + 1, :]  # (*batch, H, i, p)
        remaining[..., :i, :] += (weights[..., i, :i].unsqueeze(-1) * pull).sum(-3)
    return result
