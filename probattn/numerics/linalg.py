r"""Determinants, inverses and linear systems that are right for every size, batch and number of threads.

Batched LU on the CPU (``torch.linalg.slogdet``, ``det``, ``inv``, ``solve``, ``lu_factor``, ``lu_solve``) is silently
wrong in torch 2.5 to 2.13 with more than one thread, for matrices of more than about 150 rows: pivots out of range and
errors of 1e-2 and more (pytorch issues 141358 and 142815). One matrix at a time is right, and as fast. Up to 64 rows,
and on other devices, these functions are torch's own; larger matrices on the CPU are factored one by one. Cholesky, QR,
singular values and eigenvalues are right as they are.

Every function is differentiable any number of times in reverse mode, and once in forward mode on top of that
(``torch.func.hessian``; torch drops the outer tangents where ``jvp`` is nested in itself), also under
``torch.func.vmap``:

.. math::
    d \log|\det A| = \mathrm{tr}(A^{-1} dA), \qquad d A^{-1} = -A^{-1}\, dA\, A^{-1}, \qquad
    d (A^{-1} B) = A^{-1} (dB - dA\, A^{-1} B) .
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["TOGETHER", "det", "inverse", "slogdet", "solve"]

TOGETHER = 64
"""Largest number of rows for which torch's batched calls are used on the CPU."""


def slogdet(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Sign and logarithm of the absolute value of the determinant.

    Args:
        matrix: A, real, ``(*batch, m, m)``.

    Returns:
        sign in {-1, 0, 1} and ``log|det A|`` (-inf where A is singular), ``(*batch,)`` each.

    Example:
        >>> sign, logabs = slogdet(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))  # det = -6
        >>> float(sign), round(float(logabs.exp()), 4)
        (-1.0, 6.0)
    """
    if not _one_by_one(matrix):
        sign, logabs = torch.linalg.slogdet(matrix)
        return sign, logabs
    function = _Slogdet if torch.compiler.is_compiling() else _SlogdetForward
    sign, logabs = function.apply(matrix)  # type: ignore[no-untyped-call]
    return sign, logabs


def det(matrix: Tensor) -> Tensor:
    """Determinant.

    Args:
        matrix: A, real, ``(*batch, m, m)``.

    Returns:
        det A, ``(*batch,)``. Beyond 64 rows the gradient at a singular matrix is NaN.

    Example:
        >>> det(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
        tensor(-6.)
    """
    if not _one_by_one(matrix):
        determinant: Tensor = torch.linalg.det(matrix)
        return determinant
    sign, logabs = slogdet(matrix)
    return sign * logabs.exp()


def inverse(matrix: Tensor, *, check: bool = True) -> Tensor:
    """Inverse matrices.

    Args:
        matrix: A, ``(*batch, m, m)``.
        check: raise for a singular matrix; False gives NaN there instead.

    Returns:
        A^{-1}, ``(*batch, m, m)``.

    Raises:
        torch.linalg.LinAlgError: a singular matrix, if ``check``.

    Example:
        >>> inverse(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """
    if not _one_by_one(matrix):
        return _nan_where_singular(*torch.linalg.inv_ex(matrix, check_errors=check))
    function = _Inverse if torch.compiler.is_compiling() else _InverseForward
    inverted: Tensor = function.apply(matrix, check)  # type: ignore[no-untyped-call]
    return inverted


def solve(matrix: Tensor, right: Tensor, *, check: bool = True) -> Tensor:
    """Solutions X of A X = B.

    Args:
        matrix: A, ``(*batch, m, m)``.
        right: B, ``(*batch, m, k)``; its batch axes broadcast with those of A.
        check: raise for a singular matrix; False gives NaN there instead.

    Returns:
        A^{-1} B, ``(*batch, m, k)``.

    Raises:
        torch.linalg.LinAlgError: a singular matrix, if ``check``.

    Example:
        >>> solve(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.ones(2, 1))
        tensor([[0.5000],
                [0.2500]])
    """
    large = _one_by_one(matrix)
    if large and matrix.dim() == 2 and right.dim() > 2:  # one factorisation serves the whole batch
        columns = solve(matrix, right.movedim(-2, 0).flatten(1), check=check)  # (m, batch times k)
        solved: Tensor = columns.unflatten(1, (*right.shape[:-2], right.shape[-1]))
        return solved.movedim(0, -2)
    batch = torch.broadcast_shapes(matrix.shape[:-2], right.shape[:-2])
    matrix, right = (part.expand(*batch, *part.shape[-2:]) for part in (matrix, right))
    if not large:
        return _nan_where_singular(*torch.linalg.solve_ex(matrix, right, check_errors=check))
    function = _Solve if torch.compiler.is_compiling() else _SolveForward
    solved = function.apply(matrix, right, check)  # type: ignore[no-untyped-call]
    return solved


def _nan_where_singular(result: Tensor, info: Tensor) -> Tensor:
    return result.where((info == 0)[..., None, None], torch.nan)


def _one_by_one(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu" and matrix.shape[-1] > TOGETHER


@torch.library.custom_op("probattn::slogdet_one_by_one", mutates_args=())
def _slogdet_one_by_one(matrix: Tensor) -> tuple[Tensor, Tensor]:
    sign, logabs = matrix.new_empty(matrix.shape[:-2].numel()), matrix.new_empty(matrix.shape[:-2].numel())
    for index, one in enumerate(matrix.reshape(-1, *matrix.shape[-2:])):
        sign[index], logabs[index] = torch.linalg.slogdet(one)
    return sign.view(matrix.shape[:-2]), logabs.view(matrix.shape[:-2])


@_slogdet_one_by_one.register_fake
def _(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return matrix.new_empty(matrix.shape[:-2]), matrix.new_empty(matrix.shape[:-2])


@_slogdet_one_by_one.register_vmap
def _(info: Any, axes: tuple[int], matrix: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    return _slogdet_one_by_one(matrix.movedim(axes[0], 0)), (0, 0)


@torch.library.custom_op("probattn::inverse_one_by_one", mutates_args=())
def _inverse_one_by_one(matrix: Tensor, check: bool) -> Tensor:
    inverted = matrix.new_empty(matrix.shape)
    for one, place in zip(matrix.reshape(-1, *matrix.shape[-2:]), inverted.view(-1, *matrix.shape[-2:]), strict=True):
        place.copy_(_nan_where_singular(*torch.linalg.inv_ex(one, check_errors=check)))
    return inverted


@_inverse_one_by_one.register_fake
def _(matrix: Tensor, check: bool) -> Tensor:
    return matrix.new_empty(matrix.shape)


@_inverse_one_by_one.register_vmap
def _(info: Any, axes: tuple[int, None], matrix: Tensor, check: bool) -> tuple[Tensor, int]:
    return _inverse_one_by_one(matrix.movedim(axes[0], 0), check), 0


@torch.library.custom_op("probattn::solve_one_by_one", mutates_args=())
def _solve_one_by_one(matrix: Tensor, right: Tensor, check: bool) -> Tensor:
    solved = right.new_empty(right.shape)
    flat = (part.reshape(-1, *part.shape[-2:]) for part in (matrix, right, solved))
    for one, columns, place in zip(*flat, strict=True):
        place.copy_(_nan_where_singular(*torch.linalg.solve_ex(one, columns, check_errors=check)))
    return solved


@_solve_one_by_one.register_fake
def _(matrix: Tensor, right: Tensor, check: bool) -> Tensor:
    return right.new_empty(right.shape)


@_solve_one_by_one.register_vmap
def _(
    info: Any, axes: tuple[int | None, int | None, None], matrix: Tensor, right: Tensor, check: bool
) -> tuple[Tensor, int]:
    if axes[0] is None and axes[1] is not None:  # more columns for the same matrices
        columns = right.movedim(axes[1], -1)  # (*batch, m, k, B)
        solved = _solve_one_by_one(matrix, columns.flatten(-2), check)
        return solved.unflatten(-1, columns.shape[-2:]), solved.dim()
    matrix = matrix.movedim(axes[0] or 0, 0)
    right = right.expand(len(matrix), *right.shape) if axes[1] is None else right.movedim(axes[1], 0)
    return _solve_one_by_one(matrix, right, check), 0


class _Slogdet(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor]:
        sign, logabs = _slogdet_one_by_one(matrix)
        return sign, logabs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[0])
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, _: Any, gradient: Tensor) -> Tensor:
        (matrix,) = ctx.saved_tensors
        return gradient[..., None, None] * inverse(matrix, check=False).mT


class _SlogdetForward(_Slogdet):
    """The same with derivatives in forward mode, which torch's compiler does not take from a function of one's own."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[None, Tensor]:
        (matrix,) = ctx.saved_tensors
        return None, (inverse(matrix, check=False).mT * tangent).sum((-2, -1))


class _Inverse(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, check: bool) -> Tensor:
        inverted: Tensor = _inverse_one_by_one(matrix, check)
        return inverted

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (inverted,) = ctx.saved_tensors
        return -inverted.mH @ gradient @ inverted.mH, None


class _InverseForward(_Inverse):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (inverted,) = ctx.saved_tensors
        moved: Tensor = -inverted @ tangent @ inverted
        return moved


class _Solve(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, right: Tensor, check: bool) -> Tensor:
        solved: Tensor = _solve_one_by_one(matrix, right, check)
        return solved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        matrix, solved = ctx.saved_tensors
        to_right = solve(matrix.mH, gradient, check=False)
        to_matrix = -to_right @ solved.mH if ctx.needs_input_grad[0] else None
        return to_matrix, to_right, None


class _SolveForward(_Solve):
    @staticmethod
    def jvp(ctx: Any, on_matrix: Tensor | None, on_right: Tensor | None, _: None) -> Tensor:
        matrix, solved = ctx.saved_tensors
        moved = torch.zeros_like(solved) if on_right is None else on_right
        if on_matrix is not None:
            moved = moved - on_matrix @ solved
        return solve(matrix, moved, check=False)
