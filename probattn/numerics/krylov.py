r"""Extreme singular values and eigenvalues of many matrices at once, from products with vectors, with their certainty.

**Smallest singular value** of J, from solutions with J and its transpose: block Lanczos with full orthogonalisation on
:math:`B = J^{-1} J^{-T}` (Golub, Luk and Overton, 1981, ACM TOMS 7). For a Ritz pair :math:`(\theta, x)` with residual
r and the next Ritz value :math:`\theta_2`, the error of :math:`\sigma = \theta^{-1/2}` is

.. math:: |\delta\sigma| / \sigma \le \frac{1}{2\theta} \min\Bigl(|r|,\ \frac{|r|^2}{\theta - \theta_2}\Bigr)

in the second form with the Ritz value in place of the second eigenvalue (Parlett, 1998, The Symmetric Eigenvalue
Problem, section 11.7).

**Rightmost eigenvalues** of M, from products with M: Arnoldi's method. A Ritz value :math:`\theta_j` of the Hessenberg
matrix H of k steps, with unit vectors x and y on its right and left, has the residual
:math:`\rho_j = h_{k+1,k} |x_k|` and to first order the error

.. math:: \delta_j = (\rho_j + \epsilon |H|) / |y^H x| .

It is accepted as the rightmost one if :math:`\delta_j` is below the tolerance and no other Ritz value with a residual
reaches farther right; as the rightmost *real* one if, further, no other Ritz value lies within the errors of both, so
that it cannot be one of a pair (a lone eigenvalue of a real matrix is real), and if those ahead of it are farther from
the real line than their errors. A complex pair is never counted as real; what is not certain is left to the caller,
who has dense matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from probattn.numerics import linalg

__all__ = ["Rightmost", "SmallestSingular", "rightmost_eigenvalues", "smallest_singular_values"]

_STEPS = (32, 48, 64, 96, 128, 192)  # sizes of the Krylov spaces at which eigenvalues are looked at
_BLOCKS = 16  # steps of block Lanczos
_CAUTION = 2.0  # how many residuals away an eigenvalue may be of a Ritz value that has not converged
_ROUNDINGS = 1.0  # of a product with M, in units of the precision times the Frobenius norm of H


class SmallestSingular(NamedTuple):
    """Smallest singular values.

    Attributes:
        value: sigma_min, ``(N,)``; NaN where a solution was not finite.
        converged: whether the error is below the tolerance, ``(N,)``.
        vector: left singular vectors of J, ``(N, p)``, good starts for similar matrices.
    """

    value: Tensor
    converged: Tensor
    vector: Tensor


class Rightmost(NamedTuple):
    """Rightmost eigenvalues of s M for one sign s.

    Attributes:
        real: the largest real eigenvalue, ``(N,)``.
        real_certain: whether it is accepted, ``(N,)``.
        abscissa: the largest real part of all eigenvalues, ``(N,)``.
        abscissa_certain: whether it is accepted, ``(N,)``.
    """

    real: Tensor
    real_certain: Tensor
    abscissa: Tensor
    abscissa_certain: Tensor


def smallest_singular_values(
    solve: Callable[[Tensor, Tensor], Tensor],
    solve_transposed: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    tolerance: float,
) -> SmallestSingular:
    """Smallest singular values of N matrices J, by block Lanczos on J^-1 J^-T.

    Args:
        solve: J^-1 X for columns X ``(n, p, b)`` of the matrices with the numbers ``(n,)``.
        solve_transposed: J^-T X, likewise.
        start: columns to begin with, ``(N, p, b)``.
        tolerance: largest relative error that counts as converged.

    Returns:
        :class:`SmallestSingular`. Each step takes one call of both functions.
    """
    count, size, width = start.shape
    value, converged = start.new_full((count,), torch.nan), torch.zeros(count, dtype=torch.bool, device=start.device)
    vector = start[..., 0].clone()
    rows = torch.arange(count, device=start.device)
    newest = torch.linalg.qr(start)[0]
    basis = images = start.new_empty(count, size, 0)
    for _ in range(max(1, min(_BLOCKS, size // width))):
        image = solve(solve_transposed(newest, rows), rows)  # B X
        basis, images = torch.cat([basis, newest], -1), torch.cat([images, image], -1)
        finite = torch.isfinite(image).all(-1).all(-1)
        if not bool(finite.all()):
            rows, basis, images = rows[finite], basis[finite], images[finite]
            if not len(rows):
                break
        theta, weights = torch.linalg.eigh(basis.mT @ images)  # (n, k), (n, k, k)
        top = weights[..., -1:]
        ritz = (basis @ top).squeeze(-1)
        residual = ((images @ top).squeeze(-1) - theta[:, -1:] * ritz).norm(dim=-1)
        gap = theta[:, -1] - theta[:, -2] if theta.shape[-1] > 1 else theta[:, -1]
        error = torch.minimum(residual, residual.square() / gap.clamp(min=torch.finfo(gap.dtype).tiny))
        done = error <= 2 * tolerance * theta[:, -1]
        value[rows], vector[rows], converged[rows] = theta[:, -1].clamp(min=0).rsqrt(), ritz, done
        if bool(done.all()):
            break
        rows, basis, images = rows[~done], basis[~done], images[~done]
        newest = images[..., -width:]
        for _ in range(2):  # what is orthogonal once in rounded numbers is not; twice is enough (Kahan)
            newest = newest - basis @ (basis.mT @ newest)
            newest = torch.linalg.qr(newest)[0]
    return SmallestSingular(value, converged, vector)


def rightmost_eigenvalues(
    product: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    tolerance: float,
    signs: Sequence[int] = (1,),
    *,
    need_real: bool = True,
    need_abscissa: bool = True,
    steps: Sequence[int] = _STEPS,
) -> dict[int, Rightmost]:
    """Rightmost eigenvalues of s M for N matrices M and signs s, by Arnoldi's method.

    Args:
        product: M X for vectors X ``(n, p)`` of the matrices with the numbers ``(n,)``; it may be called with a vector
            for some of the matrices only.
        start: vectors to begin with, ``(N, p)``, without zeros among them.
        tolerance: largest error of an accepted eigenvalue.
        signs: the signs s.
        need_real: whether to go on until the largest real eigenvalues are certain.
        need_abscissa: whether to go on until the largest real parts are certain.
        steps: sizes of the Krylov space at which to look.

    Returns:
        :class:`Rightmost` by sign. Time O(k) products and O(k^2 p + k^3) per matrix.
    """
    count, size = start.shape
    device = start.device
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(count, device=device)
    largest = max(1, min(max(steps), size))
    basis = start.new_zeros(count, largest + 1, size)
    basis[:, 0] = start / start.norm(dim=-1, keepdim=True)
    hessenberg = torch.zeros(count, largest + 1, largest, dtype=torch.float64, device=device)
    found = {sign: _empty(count, start) for sign in signs}
    begin = 0
    for end in sorted({min(step, size) for step in steps}):
        _extend(product, basis, hessenberg, rows, begin, end, generator)
        begin = end
        ritz = _ritz(hessenberg[:, : end + 1, :end], torch.finfo(start.dtype).eps, exact=end == size)
        open_rows = torch.zeros(len(rows), dtype=torch.bool, device=device)
        for sign, kept in found.items():
            seen = _rightmost(ritz, sign, tolerance)
            for whole, part in zip(kept, seen, strict=True):
                whole[rows] = part.to(whole.dtype)
            open_rows |= (~seen.real_certain & need_real) | (~seen.abscissa_certain & need_abscissa)
        if not bool(open_rows.any()):
            break
        if not bool(open_rows.all()):
            rows, basis, hessenberg = rows[open_rows], basis[open_rows], hessenberg[open_rows]
    return found


class _Ritz(NamedTuple):
    """Ritz values ``(n, k)``, complex, their residuals, and their errors."""

    value: Tensor
    residual: Tensor
    error: Tensor


def _empty(count: int, like: Tensor) -> Rightmost:
    nothing = torch.full((count,), torch.nan, dtype=torch.float64, device=like.device)
    no = torch.zeros(count, dtype=torch.bool, device=like.device)
    return Rightmost(nothing, no, nothing.clone(), no.clone())


def _extend(
    product: Callable[[Tensor, Tensor], Tensor],
    basis: Tensor,
    hessenberg: Tensor,
    rows: Tensor,
    begin: int,
    end: int,
    generator: torch.Generator,
) -> None:
    """Arnoldi steps begin to end, in place, with orthogonalisation done twice."""
    eps = torch.finfo(basis.dtype).eps
    for step in range(begin, end):
        w = product(basis[:, step], rows)  # (n, p)
        before = w.norm(dim=-1)
        known = basis[:, : step + 1]
        for _ in range(2):
            share = (known @ w.unsqueeze(-1)).squeeze(-1)  # (n, step + 1)
            w = w - (share.unsqueeze(1) @ known).squeeze(1)
            hessenberg[:, : step + 1, step] += share
        length = w.norm(dim=-1)
        over = length <= 8 * eps * before  # the space is invariant: another one begins, orthogonal to it
        if bool(over.any()) and step + 1 < basis.shape[2]:
            fresh = torch.randn(basis.shape[2], generator=generator, dtype=torch.float64).to(basis)
            fresh = fresh.expand(int(over.sum()), -1)
            for _ in range(2):
                fresh = fresh - ((known[over] @ fresh.unsqueeze(-1)).mT @ known[over]).squeeze(1)
                fresh = fresh / fresh.norm(dim=-1, keepdim=True)
            w[over] = fresh
            length = length.masked_fill(over, 1.0)
        hessenberg[:, step + 1, step] = length.masked_fill(over, 0.0)
        basis[:, step + 1] = w / length.clamp(min=torch.finfo(basis.dtype).tiny).unsqueeze(-1)


def _ritz(hessenberg: Tensor, eps: float, *, exact: bool) -> _Ritz:
    """Ritz values with residuals and errors from Hessenberg matrices, ``(n, k + 1, k)``."""
    square = hessenberg[:, :-1]
    finite = torch.isfinite(hessenberg).all(-1).all(-1)
    value, right = _eigenvectors(square.where(finite[:, None, None], 0.0))
    left = linalg.inverse(right, check=False)  # rows y^H / (y^H x)
    condition = torch.nan_to_num(left.norm(dim=-1), nan=torch.inf)
    last = torch.zeros_like(hessenberg[:, -1, -1]) if exact else hessenberg[:, -1, -1].abs()
    rounding = _ROUNDINGS * eps * torch.linalg.matrix_norm(square)
    residual = last.unsqueeze(-1) * right[:, -1].abs() + rounding.unsqueeze(-1)
    residual = residual.masked_fill(~finite.unsqueeze(-1), torch.nan)
    return _Ritz(value, residual, residual * condition)


def _eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(n, k)`` and right eigenvectors of length one ``(n, k, k)`` of matrices ``(n, k, k)``.

    On the CPU, also for a GPU, which has no batched routine for them and takes longer for one matrix; each thread that
    torch may use takes a part of the matrices.
    """
    parts = matrix.cpu().chunk(torch.get_num_threads())
    with ThreadPoolExecutor(len(parts)) as pool:
        values, rights = zip(*pool.map(torch.linalg.eig, parts), strict=True)
    return torch.cat(values).to(matrix.device), torch.cat(rights).to(matrix.device)


def _rightmost(ritz: _Ritz, sign: int, tolerance: float) -> Rightmost:
    """The rightmost Ritz values of s M, and whether they are those of the matrix."""
    part = sign * ritz.value.real
    abscissa, top = part.max(-1)
    error = ritz.error.gather(-1, top[:, None]).squeeze(-1)
    reaches = (part + ritz.residual > (abscissa + tolerance)[:, None]) & (part < (abscissa - tolerance)[:, None])
    abscissa_certain = (error <= tolerance) & ~reaches.any(-1)

    lone = ritz.value.imag == 0
    real, index = part.masked_fill(~lone, -torch.inf).max(-1)
    error = ritz.error.gather(-1, index[:, None]).squeeze(-1)
    itself = torch.zeros_like(lone).scatter_(-1, index[:, None], True)
    height = ritz.value.imag.abs()
    reach = torch.minimum(ritz.error, _CAUTION * ritz.residual)
    distance = torch.hypot(part - real[:, None], height)
    meets = (distance <= error[:, None] + reach) & ~itself
    ahead = (part + reach > (real + tolerance)[:, None]) & (height <= reach) & ~itself
    # Another real one within the tolerance gives the same answer; two that may be a pair do not.
    real_certain = torch.isfinite(real) & (error <= tolerance) & ~meets.any(-1) & ~ahead.any(-1)
    return Rightmost(real, real_certain, abscissa, abscissa_certain)
