r"""The diagonal blocks J_i = I - M_i of the residual map's Jacobian, and what is computed from them.

Causality makes de/du block lower triangular, so these T blocks hold the whole determinant. Each M_i is a sum over heads
of low-rank terms and is kept in factors until somebody asks for a number: by Sylvester's identity
:math:`\det(I_p - U V) = \det(I_m - V U)`, the smallest of the two sides is used. Pure functions of tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from probattn.moments import cpu
from probattn.numerics import eigenvalues, linalg

__all__ = [
    "JacobianFactors",
    "largest_real_eigenvalue",
    "logabsdet_one_minus",
    "mean_jacobian",
    "smallest_singular_value_one_minus",
    "spectral_abscissa",
    "sylvester_core",
]


class JacobianFactors(NamedTuple):
    r"""M_i = dmu_i/du_i in factors.

    .. math:: M_i = \sum_h W_O^h (\mathrm{Cov}_i^h(v, k)\, c W_Q^h + \mathrm{own}_i^h)\, \varphi'(u_i)

    Attributes:
        cov: covariance of values and keys under the attention weights, ``(*batch, H, T, dv, r)``.
        query: c W_Q, ``(*batch, H, r, p)``.
        output: W_O, ``(*batch, H, p, dv)``.
        own: the inclusive mask's extra term alpha_ii (W_V + (v_i - vbar_i) (c W_K^T q_i)^T), ``(*batch, H, T, dv, p)``;
            None under the strict mask, where a token is not in its own past.
        entry: derivative phi' of what the attention sees of the token itself, ``(*batch, T, p, p)``; None where that is
            the token.
    """

    cov: Tensor
    query: Tensor
    output: Tensor
    own: Tensor | None
    entry: Tensor | None = None


def _stacked_output(factors: JacobianFactors) -> Tensor:
    return factors.output.movedim(-3, -2).flatten(-2)  # (*batch, p, H dv)


def mean_jacobian(factors: JacobianFactors) -> Tensor:
    """Multiply the factors out: M_i = I - J_i as dense blocks.

    Args:
        factors: see :class:`JacobianFactors`.

    Returns:
        M, ``(*batch, T, p, p)``. Time and memory O(T p^2 H dv) and O(T p^2).
    """
    change: Tensor = _stacked_output(factors).unsqueeze(-3) @ _inner(factors)
    return change


def _inner(factors: JacobianFactors) -> Tensor:
    """Right factor of W_O in M, the heads below each other, ``(*batch, T, H dv, p)``."""
    inner = factors.cov @ factors.query.unsqueeze(-3)  # (*batch, H, T, dv, p)
    if factors.own is not None:
        inner = inner + factors.own
    inner = inner.movedim(-4, -3).flatten(-3, -2)  # (*batch, T, H dv, p)
    return inner if factors.entry is None else inner @ factors.entry


def sylvester_core(factors: JacobianFactors) -> Tensor:
    r"""The smallest matrix K_i with :math:`\det(I - K_i) = \det J_i` and the non-zero eigenvalues of M_i.

    Of size m = min(p, H r, H dv) under the strict mask and min(p, H dv) under the inclusive one: the heads' keys, the
    heads' values, or the features, whichever are fewest. With one head and dv = p this is the r x r route.

    Args:
        factors: see :class:`JacobianFactors`.

    Returns:
        K, ``(*batch, T, m, m)``. Derived here.
    """
    heads, value_dim, rank = factors.cov.shape[-4], factors.cov.shape[-2], factors.cov.shape[-1]
    dim = factors.output.shape[-2]
    # Neither the own term nor what stands between query and token has a factor of rank r.
    keys = heads * rank if factors.own is None and factors.entry is None else dim
    values = heads * value_dim
    if dim <= min(keys, values):
        return mean_jacobian(factors)

    output = _stacked_output(factors)  # (*batch, p, H dv)
    if keys <= values:
        query = factors.query.flatten(-3, -2)  # (*batch, H r, p)
        mixing = (query @ output).unflatten(-1, (heads, value_dim)).movedim(-2, -3)  # (*batch, H, H r, dv)
        core: Tensor = mixing.unsqueeze(-3) @ factors.cov  # (*batch, H, T, H r, r)
        return core.movedim(-4, -2).flatten(-2)  # (*batch, T, H r, H r)

    if factors.entry is not None:
        return _inner(factors) @ output.unsqueeze(-3)  # (*batch, T, H dv, H dv)
    mixing = factors.query @ output.unsqueeze(-3)  # (*batch, H, r, H dv)
    core = factors.cov @ mixing.unsqueeze(-3)  # (*batch, H, T, dv, H dv)
    if factors.own is not None:
        core = core + factors.own @ output.unsqueeze(-3).unsqueeze(-3)
    return core.movedim(-4, -3).flatten(-3, -2)  # (*batch, T, H dv, H dv)


def logabsdet_one_minus(matrix: Tensor) -> tuple[Tensor, Tensor]:
    r"""Sign and log of the absolute value of det(I - K), exactly; no power series.

    .. math:: d \log|\det(I - K)| = -\mathrm{tr}((I - K)^{-1} dK)

    Args:
        matrix: K, ``(*batch, m, m)``.

    Returns:
        sign in {-1, 0, 1} and ``log|det(I - K)|`` (-inf where singular), ``(*batch,)`` each, differentiable any number
        of times. Cost O(m^3) a matrix; on a processor up to m = 64 the matrices go through its vector units together.

    Example:
        >>> sign, value = logabsdet_one_minus(torch.tensor([[3.0]]))  # det = 1 - 3
        >>> float(sign), round(float(value.exp()), 6)
        (-1.0, 2.0)
    """
    if cpu.takes_matrices(matrix):
        function = _LogAbsDet if torch.compiler.is_compiling() else _LogAbsDetForward
        sign, value, _ = function.apply(matrix)  # type: ignore[no-untyped-call]
        return sign, value
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return linalg.slogdet(identity - matrix)


@torch.library.custom_op("probattn::determinants", mutates_args=())
def _determinants(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sign, value, inverse = cpu.determinants(matrix.reshape(-1, *matrix.shape[-2:]))
    batch = matrix.shape[:-2]
    return sign.view(batch), value.view(batch), inverse.view(matrix.shape)


@_determinants.register_fake
def _(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch = matrix.shape[:-2]
    return matrix.new_empty(batch), matrix.new_empty(batch), matrix.new_empty(matrix.shape)


@_determinants.register_vmap
def _(info: Any, axes: tuple[int], matrix: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    results = _determinants(matrix.movedim(axes[0], 0))
    return results, (0, 0, 0)


class _LogAbsDet(torch.autograd.Function):
    """Sign, ``log|det J|`` and J^-T of J = I - K; the last is an output so that derivatives can be taken again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        results: tuple[Tensor, Tensor, Tensor] = _determinants(matrix)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[0])
        ctx.save_for_backward(output[2])
        ctx.save_for_forward(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, _: Any, on_value: Tensor | None, on_inverse: Tensor | None) -> Tensor | None:
        (inverse,) = ctx.saved_tensors  # J^-T
        result = None if on_value is None else -on_value[..., None, None] * inverse
        if on_inverse is None:
            return result
        through: Tensor = inverse @ on_inverse.mT @ inverse  # d J^-T = J^-T dK^T J^-T
        return through if result is None else result + through


class _LogAbsDetForward(_LogAbsDet):
    """The same with derivatives in forward mode, which torch's compiler does not take from a function of one's own."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[None, Tensor, Tensor]:
        (inverse,) = ctx.saved_tensors
        return None, -(inverse * tangent).sum((-2, -1)), inverse @ tangent.mT @ inverse


def smallest_singular_value_one_minus(matrix: Tensor) -> Tensor:
    """sigma_min(I - M), the distance in spectral norm from J to the nearest singular matrix (Eckart and Young).

    Args:
        matrix: M, ``(*batch, p, p)``; not a reduced matrix, whose singular values are others.

    Returns:
        ``(*batch,)``. Cost O(p^3) a matrix.
    """
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    finite = _finite(matrix)
    block = identity - matrix.where(finite[..., None, None], 0.0)
    try:
        singular: Tensor = torch.linalg.svdvals(block)
    except RuntimeError:  # LAPACK's iteration stalls in single precision; torch's LinAlgError is one
        singular = torch.linalg.svdvals(block.double()).to(block.dtype)
    return singular[..., -1].where(finite, torch.nan)


def _finite(matrix: Tensor) -> Tensor:
    """True for matrices that LAPACK accepts, ``(*batch,)``: on NaN it returns nonsense, or does not return."""
    return torch.isfinite(matrix).all(-1).all(-1)


def largest_real_eigenvalue(matrix: Tensor, dim: int) -> Tensor:
    """Largest eigenvalue of M that is real, from a core K; -inf where all are complex, NaN where K is not finite.

    Complex pairs that rounding has made of a double real eigenvalue count as real, no others do; the rule is that of
    :mod:`probattn.numerics.eigenvalues`.

    Args:
        matrix: K, ``(*batch, m, m)``, m <= dim.
        dim: p, the size of M; where m < p, M has the eigenvalue 0 besides those of K.

    Returns:
        ``(*batch,)``. Differentiable once. Cost O(m^3) per matrix.

    Example:
        >>> turn = torch.tensor([[0.0, 2.0], [-2.0, 0.0]])  # both eigenvalues are imaginary
        >>> float(largest_real_eigenvalue(turn, dim=2)), float(largest_real_eigenvalue(turn, dim=3))
        (-inf, 0.0)
    """
    value = eigenvalues.largest_real_eigenvalue(matrix)
    return value if matrix.shape[-1] == dim else value.clamp(min=0.0)


def spectral_abscissa(matrix: Tensor, dim: int) -> Tensor:
    """Largest real part of the eigenvalues of M, complex ones included, from a core K; NaN where K is not finite.

    Args:
        matrix: K, ``(*batch, m, m)``, m <= dim.
        dim: p, the size of M; where m < p, M has the eigenvalue 0 besides those of K.

    Returns:
        ``(*batch,)``. Differentiable once. Cost O(m^3) per matrix.

    Example:
        >>> spiral = torch.tensor([[-1.0, 2.0], [-2.0, -1.0]])  # -1 + 2i and -1 - 2i
        >>> round(float(spectral_abscissa(spiral, dim=2)), 6), float(spectral_abscissa(spiral, dim=3))
        (-1.0, 0.0)
    """
    value = eigenvalues.spectral_abscissa(matrix)
    return value if matrix.shape[-1] == dim else value.clamp(min=0.0)
