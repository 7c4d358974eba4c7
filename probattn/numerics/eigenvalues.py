r"""Eigenvalues farthest to the right, real ones and all, with derivatives that exist for defective matrices too.

Everything here is computed in double precision whatever the precision of the matrix, since the decision between a pair
of close real eigenvalues and a pair of conjugate ones needs the digits. A pair :math:`a \pm b\,\mathrm{i}` counts as
the double real eigenvalue a in two cases only:

- :math:`b \le 8\,\epsilon\,|K|`, where :math:`\epsilon` is the rounding of K's own precision and \|K\| its Frobenius
  norm. A double eigenvalue with two eigenvectors moves no farther when the entries are rounded.
- :math:`\sigma_{\min}(K - a I) \le 8\,m\,\epsilon_{64}\,|K|`: in double precision K cannot be told from a matrix with
  the real eigenvalue a (Eckart and Young). This is what rounding makes of a defective eigenvalue, which it splits by
  the square root of :math:`\epsilon_{64}`.

Covariances of few tokens have a kernel, and keep it when they change: an eigenvalue that rounding may have moved away
from zero is exactly zero, and so is its derivative. Rounding moves an eigenvalue by up to
:math:`|K| / |y^H x|` times :math:`\epsilon` (of K's entries) or :math:`m\,\epsilon_{64}` (of the computation), with
unit eigenvectors x and y, so the condition is
:math:`|\lambda|\,|y^H x| \le 8 \max(\epsilon, m\,\epsilon_{64})\,|K|`.

The derivative of a simple eigenvalue is :math:`y^H dK\, x / y^H x`, with x and y its right and left eigenvectors
(Magnus, 1985, Econometric Theory 1). For a multiple one it is that of the mean of the cluster,
:math:`\mathrm{tr}((Y^H X)^{-1} Y^H dK\, X) / k`, where X and Y hold the k right and left null vectors of
:math:`K - \lambda I`. They come from a singular value decomposition: autograd through ``torch.linalg.eig`` inverts the
matrix of eigenvectors, which fails on the defective matrices that covariances of few tokens produce.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probattn.numerics import linalg
from probattn.numerics.derivatives import first_order_only

__all__ = ["largest_real_eigenvalue", "spectral_abscissa"]

_ROUNDINGS = 8.0  # backward error of LAPACK's eigenvalues in units of m eps |K|
_LOST = 1e-280  # entries that are smaller, relative to the largest, count as zero
_NEAR = 1e-3  # pairs with a larger imaginary part, relative to |K|, are complex without a closer look


def largest_real_eigenvalue(matrix: Tensor) -> Tensor:
    """Largest of the real eigenvalues.

    Args:
        matrix: K, ``(*batch, m, m)``.

    Returns:
        ``(*batch,)``: -inf where all eigenvalues are complex, NaN where K is not finite. Differentiable once. Cost
        O(m^3) per matrix.

    Example:
        >>> round(float(largest_real_eigenvalue(torch.tensor([[0.0, 2.0], [2.0, 0.0]]))), 6)
        2.0
        >>> float(largest_real_eigenvalue(torch.tensor([[0.0, 2.0], [-2.0, 0.0]])))  # both imaginary
        -inf
    """
    value: Tensor = _Rightmost.apply(matrix, True)[0]  # type: ignore[no-untyped-call]
    return value


def spectral_abscissa(matrix: Tensor) -> Tensor:
    """Largest real part of the eigenvalues, complex ones included.

    Args:
        matrix: K, ``(*batch, m, m)``.

    Returns:
        ``(*batch,)``: NaN where K is not finite. Differentiable once. Cost O(m^3) per matrix.

    Example:
        >>> turn = torch.tensor([[0.5, 2.0, 0.0], [-2.0, 0.5, 0.0], [0.0, 0.0, -1.0]])  # 0.5 + 2i, 0.5 - 2i, -1
        >>> round(float(spectral_abscissa(turn)), 6)
        0.5
    """
    value: Tensor = _Rightmost.apply(matrix, False)[0]  # type: ignore[no-untyped-call]
    return value


@torch.library.custom_op("probattn::rightmost_eigenvalue", mutates_args=())
def _rightmost(matrix: Tensor, real: bool) -> Tensor:
    """The eigenvalue in question, complex128, ``(*batch,)``; -inf where there is none, NaN where K is not finite."""
    whole = matrix.reshape(-1, *matrix.shape[-2:]).double()
    finite = torch.isfinite(whole).all(-1).all(-1)
    whole = whole.where(finite[:, None, None], 0.0)  # on NaN LAPACK returns nonsense, or does not return
    # Of a matrix that is tiny, and of entries that are beside others, LAPACK does not find the eigenvalues.
    scale = torch.ldexp(torch.ones_like(whole[:, 0, 0]), whole.abs().amax((1, 2)).frexp().exponent.clamp(max=1000))
    whole = whole / scale[:, None, None]
    whole = whole.where(whole.abs() > _LOST, 0.0)
    eigenvalues = torch.linalg.eigvals(whole)  # (N, m)
    eligible = eigenvalues.real.masked_fill((eigenvalues.imag != 0) & real, -torch.inf)
    value, index = eligible.max(-1)
    imaginary = eigenvalues.imag.gather(-1, index[:, None]).squeeze(-1)
    if real:
        value, imaginary = _count_near_pairs(whole, eigenvalues, value, torch.finfo(matrix.dtype).eps)
    found = _kernel_to_zero(whole, torch.complex(value, imaginary), torch.finfo(matrix.dtype).eps)
    return (scale * found).where(finite, torch.nan).view(matrix.shape[:-2])


def _count_near_pairs(matrix: Tensor, eigenvalues: Tensor, value: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Largest real eigenvalue, (N,), and its imaginary part, when pairs that rounding has split are real as well."""
    norm = _norm(matrix)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    imaginary = torch.zeros_like(value)
    open_pairs = (eigenvalues.imag > 0) & (eigenvalues.imag <= _NEAR * norm[:, None])
    while True:
        ahead = open_pairs & (eigenvalues.real > value[:, None])
        rows = ahead.any(-1).nonzero().squeeze(-1)
        if not len(rows):
            return value, imaginary
        centre, index = eigenvalues.real[rows].masked_fill(~ahead[rows], -torch.inf).max(-1)
        half = eigenvalues.imag[rows, index]
        distance = torch.linalg.svdvals(matrix[rows] - centre[:, None, None] * identity)[:, -1]
        counts = (half <= _ROUNDINGS * eps * norm[rows]) | (distance <= _rounding(matrix[rows]))
        value[rows] = centre.where(counts, value[rows])
        imaginary[rows] = half.where(counts, imaginary[rows])
        open_pairs[rows, index] = False


def _kernel_to_zero(matrix: Tensor, eigenvalue: Tensor, eps: float) -> Tensor:
    """Eigenvalues, (N,), that are exactly zero where rounding may have moved them away from it."""
    size, norm = matrix.shape[-1], _norm(matrix)
    moved = _ROUNDINGS * max(eps, size * torch.finfo(torch.float64).eps) * norm
    # The overlap of a defective zero is of the size of the eigenvalue itself: beyond the square root there is none.
    rows = (eigenvalue.abs().square() <= moved * norm).nonzero().squeeze(-1)
    identity = torch.eye(size, dtype=eigenvalue.dtype, device=matrix.device)
    left, _, right = torch.linalg.svd(matrix[rows] - eigenvalue[rows, None, None] * identity)
    overlap = torch.linalg.vecdot(left[..., -1], right[..., -1, :].conj()).abs()  # |y^H x|
    kernel = eigenvalue[rows].abs() * overlap <= moved[rows]
    return eigenvalue.index_put((rows,), eigenvalue[rows].where(~kernel, 0.0))


@_rightmost.register_fake
def _(matrix: Tensor, real: bool) -> Tensor:
    return matrix.new_empty(matrix.shape[:-2], dtype=torch.complex128)


@_rightmost.register_vmap
def _(info: Any, axes: tuple[int, None], matrix: Tensor, real: bool) -> tuple[Tensor, int]:
    return _rightmost(matrix.movedim(axes[0], 0), real), 0


class _Rightmost(torch.autograd.Function):
    """The eigenvalue's real part, and the eigenvalue itself for the derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, real: bool) -> tuple[Tensor, Tensor]:
        eigenvalue: Tensor = _rightmost(matrix, real)
        return eigenvalue.real.to(matrix.dtype), eigenvalue

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
        ctx.real = inputs[1]
        ctx.save_for_backward(inputs[0], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        matrix, eigenvalue = ctx.saved_tensors
        with torch.no_grad():
            slope = _slope(matrix.double(), eigenvalue).to(matrix.dtype)
            # No gradient came in where another branch was chosen: NaN or infinite slopes do not matter there.
            result = torch.where(gradient[..., None, None] == 0, 0.0, gradient[..., None, None] * slope)
        name = "the largest real eigenvalue" if ctx.real else "the spectral abscissa"
        return first_order_only(result, matrix, name), None


def _slope(matrix: Tensor, eigenvalue: Tensor) -> Tensor:
    """Derivative of the real part by the entries of K, ``(*batch, m, m)``."""
    finite = torch.isfinite(eigenvalue.real)
    # The kernel stays, and an eigenvalue that is not there has no derivative.
    still = (eigenvalue == 0) | torch.isneginf(eigenvalue.real)
    shift = eigenvalue.where(finite & ~still, 0.0)[..., None, None]
    identity = torch.eye(matrix.shape[-1], dtype=shift.dtype, device=matrix.device)
    safe = matrix.where(torch.isfinite(matrix).all(-1).all(-1)[..., None, None], 0.0)
    left, singular, right = torch.linalg.svd(safe - shift * identity)  # = left diag(singular) right
    null = singular <= _rounding(safe).unsqueeze(-1)
    null[..., -1] = True
    chosen = torch.diag_embed(null.to(shift.dtype))
    overlap = chosen @ left.mH @ right.mH @ chosen + identity - chosen  # Y^H X on the null vectors, I elsewhere
    projector = right.mH @ chosen @ linalg.inverse(overlap, check=False) @ chosen @ left.mH  # X (Y^H X)^-1 Y^H
    slope: Tensor = projector.mT.real / null.sum(-1)[..., None, None]
    slope = slope.where(~still[..., None, None], 0.0)
    return slope.where((finite | still)[..., None, None], torch.nan)


def _norm(matrix: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(matrix)
    return norm


def _rounding(matrix: Tensor) -> Tensor:
    """Distance from K, in double precision, within which its computed eigenvalues are those of some matrix."""
    return _ROUNDINGS * matrix.shape[-1] * torch.finfo(torch.float64).eps * _norm(matrix)
