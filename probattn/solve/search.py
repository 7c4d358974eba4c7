r"""The search for the solutions u of u - mu(past, u) = eps: Newton's method from several starts, and a rule to choose.

The map u_i -> e_i is proper and of degree one, so under the strict mask a solution always exists, but it need not be
the only one. Where the contraction bound does not rule out others, the search starts from several places, and a second
solution is an event that the caller hears of. The search for one token and for all tokens of a stretch, each with the
past that is its own, is the same computation.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from probattn.errors import InputError, NoSolutionError, SeveralSolutionsError
from probattn.solve.context import Context
from probattn.solve.rows import Tokens

__all__ = [
    "STARTS",
    "Selection",
    "find_roots",
    "hull_points",
    "newton_step",
    "require_selection",
    "residual_tolerance",
    "solve_token",
    "without_rival",
]

Selection = Literal["unique", "uniform", "smallest_step", "nearest_mean"]

_STARTS = 8
_LINE_STARTS = 17
STARTS = 1 + max(_LINE_STARTS, 2 * _STARTS)  # how many candidates a search holds for one token, at most
_MORE_STARTS = 64
_ITERATIONS = 100
_HALVINGS = 30
_FEW = 8  # one in so many starts still at work: Newton goes on with these alone


def require_selection(selection: str) -> None:
    """Refuse a rule that does not exist.

    Raises:
        InputError: naming those that do.
    """
    if selection not in get_args(Selection):
        raise InputError(f"selection is {selection!r}; use one of {', '.join(map(repr, get_args(Selection)))}.")


def solve_token(past: Context, noise: Tensor, selection: Selection, position: int) -> tuple[Tensor, Tensor]:
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
        starts = torch.cat([starts, noise + _spread_out(_vertices(past).squeeze(1), noise)])
    u, distance, tolerance, jacobian = _newton(_Map(past), noise, starts)
    if past.length and not bool((distance <= tolerance).any(0).all()):
        # A solution exists under the strict mask; look for it from anywhere in the hull of what the mean can be.
        again = _newton(_Map(past), noise, noise + _spread_out(hull_points(past, _MORE_STARTS), noise))
        both = zip((u, distance, tolerance, jacobian), again, strict=True)
        u, distance, tolerance, jacobian = (torch.cat(pair) for pair in both)
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
    slope = jacobian.gather(0, best[..., None, None].expand(1, *jacobian.shape[1:])).squeeze(0)
    several = torch.zeros(chosen.shape[:-1], dtype=torch.bool, device=u.device)
    if not alone:
        gap = torch.linalg.vector_norm(u - chosen, dim=-1).masked_fill(~solved, 0.0)
        several = (gap > _same_root(tolerance)).any(0)
        if past.attention.mask == "strict":  # a map of degree one that turns over somewhere has other solutions there
            several = several | (torch.linalg.det(slope) < 0)
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
    return _polish(past, noise, chosen, slope), several


def without_rival(past: Context, visible: Tensor, noise: Tensor, u: Tensor) -> Tensor:
    """Where the search of :func:`solve_token`, from the same starts, finds no solution beside a known one, (m, *batch).

    Args:
        past: the tokens of the past and of a stretch, batch (*batch,).
        visible: which of them come before each token of the stretch, (m, n).
        noise: of the stretch, (m, *batch, p).
        u: a solution for each, (m, *batch, p).
    """
    tokens = Tokens(past.moved, past.pulled)
    usual = noise + tokens.mean(noise.movedim(0, -2), visible).movedim(-2, 0)
    starts = torch.cat([torch.stack([u, usual]), noise + _vertices(past, visible)])
    found, distance, tolerance, jacobian = _newton(_Map(past, visible), noise, starts)
    gap = torch.linalg.vector_norm(found - u, dim=-1).masked_fill(distance > tolerance, 0.0)
    alone: Tensor = (gap <= _same_root(tolerance)).all(0) & (torch.linalg.det(jacobian[0]) >= 0)
    return alone


def find_roots(past: Context, noise: Tensor, starts: int = _MORE_STARTS) -> Tensor:
    """The solutions u of u - mu(u) = eps that Newton's method finds from many starts, (K, p), nearest to eps first.

    All of them are distinct solutions; whether they are all solutions is proved in one dimension alone, by
    :class:`probattn.folds.branches.Branches`. Under the strict mask the map has degree one and an even number away from a
    fold means that one was missed.

    Args:
        past: without batch axes.
        noise: eps, (p,).
        starts: random points of the hull of what the mean can be, beside its vertices.

    Raises:
        InputError: batch axes.

    Example:
        >>> from probattn.attention import CausalAttention
        >>> attention = CausalAttention.from_qk_matrix(torch.tensor([[3.0]]).double())
        >>> past = Context.of(attention, torch.tensor([[-1.0], [1.0]]).double())
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
        begin = torch.cat([begin, noise + _vertices(past).squeeze(1), noise + hull_points(past, starts)])
    found: list[Tensor] = []
    while len(begin):
        u, distance, tolerance, jacobian = _newton(_Map(past), noise, begin)
        u, solved = _polish(past, noise, u, jacobian), distance <= tolerance
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


def _choose(past: Context, noise: Tensor, u: Tensor, solved: Tensor, tolerance: Tensor, selection: Selection) -> Tensor:
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


def _vertices(past: Context, visible: Tensor | None = None) -> Tensor:
    """Values that the mean can come near, far from each other, (starts, m, *batch, p), for m rows of ``visible``."""
    if past.length == 0:
        return past.moved.new_empty(0, 1, *past.moved.shape[:-3], past.attention.dim)
    if visible is None:
        visible = torch.ones(1, past.length, dtype=torch.bool, device=past.moved.device)
    if past.attention.dim == 1:
        line = past.moved.mT  # (*batch, H, 1, n)
        low = line.masked_fill(~visible, torch.inf).amin(-1).sum(-2)  # (*batch, m)
        high = line.masked_fill(~visible, -torch.inf).amax(-1).sum(-2)
        share = torch.linspace(0, 1, _LINE_STARTS, dtype=low.dtype, device=low.device)
        return (low + (high - low) * share.view(-1, *[1] * low.dim())).movedim(-1, 1).unsqueeze(-1)
    values = past.moved.sum(-3)  # all heads on one token, (*batch, n, p)
    vertex = (visible / visible.sum(-1, keepdim=True)).to(values) @ values  # first the centre, (*batch, m, p)
    chosen, distance = [], values.new_empty(0)
    for step in range(min(_STARTS, past.length)):
        away = torch.cdist(vertex, values, compute_mode="donot_use_mm_for_euclid_dist").masked_fill(~visible, -1.0)
        distance = away if step < 2 else torch.minimum(distance, away)  # (*batch, m, n)
        index = distance.argmax(-1, keepdim=True)
        vertex = values.gather(-2, index.expand(*index.shape[:-1], values.shape[-1]))
        chosen.append(vertex)
    corners = torch.stack(chosen)  # (starts, *batch, m, p)
    if past.length == 1:
        return corners.movedim(-2, 1)
    shares = [_hull_shares(_STARTS, past.moved.shape[-3], int(n)) for n in visible.sum(-1)]
    shares = [torch.nn.functional.pad(share, (0, past.length - share.shape[-1])) for share in shares]
    weights = torch.stack(shares, dim=2).flatten(1, 2).to(values)  # (H, starts m, n)
    inside = (weights @ past.moved).sum(-3).unflatten(-2, (_STARTS, len(shares))).movedim(-3, 0)
    return torch.cat([corners, inside]).movedim(-2, 1)


def hull_points(past: Context, count: int) -> Tensor:
    """Random points of the hull of what the mean can be, half of them corners with each head on a token of its own.

    Args:
        past: with at least one token.
        count: how many.

    Returns:
        (count, *batch, p), the same at every call.
    """
    weights = _hull_shares(count, *past.moved.shape[-3:-1]).to(past.moved)
    return (weights @ past.moved).sum(-3).movedim(-2, 0)


def _hull_shares(count: int, heads: int, length: int) -> Tensor:
    """Convex combinations of the tokens, (H, count, n)."""
    generator = torch.Generator().manual_seed(length)  # the same search every time
    share = torch.rand(count, heads, length, generator=generator, dtype=torch.float64)
    corners = torch.nn.functional.one_hot(share.argmax(-1), length).double()
    share = -share.log() / -share.log().sum(-1, keepdim=True)
    return torch.where(torch.arange(count)[:, None, None] % 2 == 0, corners, share).movedim(0, 1)


def _newton(function: _Map, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Damped Newton from each start: u, (starts, *batch, p), its residual norm, the tolerance there, and J."""
    u, mean, jacobian = _iterate(function, noise, u, _ITERATIONS)
    return u, torch.linalg.vector_norm(u - mean - noise, dim=-1), residual_tolerance(u, mean), jacobian


def _iterate(function: _Map, noise: Tensor, u: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Newton's steps with a line search, until each start is within tolerance or no step helps it: u, mu and J."""
    mean, jacobian = function(u)
    stuck = torch.zeros(u.shape[:-1], dtype=torch.bool, device=u.device)  # at a fold, where no step helps
    for done in range(iterations):
        residual = u - mean - noise
        norm = torch.linalg.vector_norm(residual, dim=-1)
        active = (norm > residual_tolerance(u, mean)) & ~stuck
        count = int(active.sum())
        if count == 0:
            break
        if _FEW * count <= active.numel() > 1:  # go on with these alone
            index = active.nonzero(as_tuple=True)  # starts, then batch axes
            batch = torch.broadcast_shapes(noise.shape[:-1], u.shape[1:-1])
            rest = function.select(index[1:], batch)
            found = _iterate(rest, noise.expand(*batch, -1)[index[1:]], u[index].unsqueeze(0), iterations - done)
            u, mean, jacobian = (
                whole.index_put(index, part.squeeze(0)) for whole, part in zip((u, mean, jacobian), found, strict=True)
            )
            break
        step = newton_step(jacobian, residual)
        size = torch.ones_like(norm)
        for _ in range(_HALVINGS):
            trial = torch.where(active.unsqueeze(-1), u - size.unsqueeze(-1) * step, u)
            mean, jacobian = function(trial)
            reached = torch.linalg.vector_norm(trial - mean - noise, dim=-1)
            worse = active & ~(reached <= (1 - 1e-4 * size) * norm)
            if not bool(worse.any()):
                break
            size = torch.where(worse, size / 2, size)
        else:
            stuck = stuck | worse
        u = trial
    return u, mean, jacobian


def _polish(past: Context, noise: Tensor, u: Tensor, jacobian: Tensor) -> Tensor:
    """One more full step, which takes the residual from tolerance to rounding; kept only where it helps."""
    residual = u - past.mean(u) - noise
    polished = u - newton_step(jacobian, residual)
    after = torch.linalg.vector_norm(polished - past.mean(polished) - noise, dim=-1, keepdim=True)
    return torch.where(after < torch.linalg.vector_norm(residual, dim=-1, keepdim=True), polished, u)


def newton_step(jacobian: Tensor, residual: Tensor) -> Tensor:
    """J^{-1} r, (*batch, p); on a fold, where the block is singular, the plain fixed-point step r."""
    step: Tensor = torch.linalg.solve_ex(jacobian, residual.unsqueeze(-1))[0].squeeze(-1)
    return torch.where(torch.isfinite(step).all(-1, keepdim=True), step, residual)


def residual_tolerance(u: Tensor, mean: Tensor) -> Tensor:
    """Residual norm at which a token, (*batch, p), counts as found, (*batch,): 1000 machine epsilons, relative."""
    size: Tensor = 1 + torch.linalg.vector_norm(u, dim=-1) + torch.linalg.vector_norm(mean, dim=-1)
    return 1e3 * torch.finfo(u.dtype).eps * size


class _Map:
    """Mean and J of the next token at many candidates, the rows of one matrix product.

    Args:
        past: batch (*batch,).
        visible: where the candidates have a sample axis of m tokens with pasts of their own, which tokens each sees,
            (m, n); None: all of them.
    """

    def __init__(self, past: Context, visible: Tensor | None = None) -> None:
        self.past, self.visible = past, visible
        dense = past.length > 0 and past.attention.mask == "strict"
        self.tokens = Tokens(past.moved, past.pulled) if dense else None

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, (starts, *sample, *batch, p), and J, (starts, *sample, *batch, p, p), at candidates u."""
        if self.tokens is None:
            return self.past.mean_and_jacobian(u)
        axes = u.dim() - 1 - (self.past.moved.dim() - 3)
        candidates, batch = u.shape[:axes], u.shape[axes:-1]
        visible = self.visible
        if visible is not None and visible.dim() == 2:
            visible = visible.repeat(len(u), 1)  # (starts m, n)
        rows = u.reshape(candidates.numel(), *batch, u.shape[-1])
        mean, jacobian = self.tokens.mean_and_jacobian(rows.movedim(0, -2), visible)
        return mean.movedim(-2, 0).unflatten(0, candidates), jacobian.movedim(-3, 0).unflatten(0, candidates)

    def select(self, index: tuple[Tensor, ...], batch: torch.Size) -> _Map:
        """The maps at K places of the sample and batch axes, as one with a batch axis of K."""
        visible = self.visible
        if visible is not None:
            visible = visible.flatten(1)[index[0]][:, None, None, :]  # (K, H, rows, n)
        return _Map(self.past.select(index, batch), visible)
