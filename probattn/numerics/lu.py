r"""LU factorisations kept for several uses: determinant, solutions with the matrix and with its transpose, inverse.

On the CPU matrices of more than :data:`probattn.numerics.linalg.TOGETHER` rows are factored and solved one at a time,
because torch's batched calls are wrong there (see :mod:`probattn.numerics.linalg`); elsewhere in one batch. Nothing
here has derivatives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probattn.numerics.linalg import TOGETHER

__all__ = ["Factored", "factor"]


class Factored(NamedTuple):
    """Factors of the transposes of N matrices A: rows of A are columns of LAPACK, so that nothing is copied around.

    Attributes:
        lu: L and U of A^T, ``(N, m, m)``.
        pivots: ``(N, m)``.
    """

    lu: Tensor
    pivots: Tensor

    def logabsdet(self) -> tuple[Tensor, Tensor]:
        """Sign (0 where A is singular) and ``log|det A|``, ``(N,)`` each; NaN where A is not finite."""
        diagonal = self.lu.diagonal(dim1=-2, dim2=-1)
        order = torch.arange(1, self.pivots.shape[-1] + 1, device=self.pivots.device)
        swaps = (self.pivots != order).sum(-1)
        sign = diagonal.sign().prod(-1) * (1 - 2 * (swaps % 2))
        return sign, diagonal.abs().log().sum(-1)

    def solve(self, right: Tensor, rows: Tensor | None = None, *, transposed: bool = False) -> Tensor:
        """Solutions of A X = B, or of A^T X = B.

        Args:
            right: B, ``(n, m, k)``.
            rows: numbers of the n matrices among the N, ``(n,)``; None: all.
            transposed: solve with A^T.

        Returns:
            ``(n, m, k)``; not finite where A is singular.
        """
        if self._one_by_one:
            solved = torch.empty_like(right)
            numbers = range(len(self.lu)) if rows is None else rows.tolist()
            for place, number in enumerate(numbers):
                solved[place] = torch.linalg.lu_solve(
                    self.lu[number], self.pivots[number], right[place], adjoint=not transposed
                )
            return solved
        lu, pivots = (self.lu, self.pivots) if rows is None else (self.lu[rows], self.pivots[rows])
        found: Tensor = torch.linalg.lu_solve(lu, pivots, right, adjoint=not transposed)
        return found

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of A^-1, ``(N, m)``. Time O(m^3) per matrix."""
        size = self.lu.shape[-1]
        identity = torch.eye(size, dtype=self.lu.dtype, device=self.lu.device)
        if self._one_by_one:
            index = torch.arange(len(self.lu), device=self.lu.device).split(1)
            parts = [self.solve(identity.unsqueeze(0), one).diagonal(dim1=-2, dim2=-1) for one in index]
            return torch.cat(parts)
        return self.solve(identity.expand(len(self.lu), -1, -1)).diagonal(dim1=-2, dim2=-1)

    @property
    def _one_by_one(self) -> bool:
        return self.lu.device.type == "cpu" and self.lu.shape[-1] > TOGETHER


def factor(matrix: Tensor, *, overwrite: bool = False) -> Factored:
    """Factor matrices.

    Args:
        matrix: A, real, ``(N, m, m)``.
        overwrite: whether the factors may be written in the place of the matrices, which saves memory.

    Returns:
        :class:`Factored`. Time O(m^3) per matrix.

    Example:
        >>> found = factor(torch.tensor([[[0.0, 2.0], [3.0, 0.0]]]))
        >>> found.logabsdet()[0], found.solve(torch.tensor([[[2.0], [3.0]]])).flatten()
        (tensor([-1.]), tensor([1., 1.]))
    """
    if matrix.device.type == "cpu" and matrix.shape[-1] > TOGETHER:
        # Columns of each matrix contiguous, as LAPACK wants them, so that solving makes no copy.
        lu = (matrix if overwrite and matrix.is_contiguous() else matrix.contiguous().clone()).mT
        pivots = torch.empty(matrix.shape[:-1], dtype=torch.int32)
        info = torch.empty((), dtype=torch.int32)
        for one, order in zip(lu, pivots, strict=True):
            torch.linalg.lu_factor_ex(one, out=(one, order, info))
        return Factored(lu, pivots)
    lu, pivots, _ = torch.linalg.lu_factor_ex(matrix.mT)
    return Factored(lu, pivots)
