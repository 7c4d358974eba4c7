"""Real eigenvalues by their conditions, for references beside the rule of :mod:`probattn.numerics.eigenvalues`."""

from __future__ import annotations

import torch
from torch import Tensor

from probattn.numerics import linalg

__all__ = ["may_be_real"]

_ROUNDINGS = 8.0  # backward error of LAPACK's eigenvalues in units of m eps |K|


@torch.no_grad()
def may_be_real(matrix: Tensor) -> Tensor:
    r"""Tell the eigenvalues that rounding may have moved away from the real line.

    .. math:: |\mathrm{Im}\,\lambda| \le 8\, m\, \epsilon\, |K| / |y^H x|

    to first order, with x and y the right and left eigenvectors of length one (Wilkinson 1965, The Algebraic Eigenvalue
    Problem, chapter 2).

    Args:
        matrix: K, ``(*batch, m, m)``, finite.

    Returns:
        ``(*batch, m)`` boolean, in the order of ``torch.linalg.eigvals``.

    Example:
        >>> near, double = torch.tensor([[1.0, 1e-6], [-1e-6, 1.0]]), torch.tensor([[1.0, 1.0], [-1e-16, 1.0]])
        >>> may_be_real(torch.stack([near, double]).double())
        tensor([[False, False],
                [ True,  True]])
    """
    eigenvalues, right = torch.linalg.eig(matrix)
    condition = linalg.inverse(right, check=False).norm(dim=-1)  # 1 / |y^H x|, as columns have length one
    unit = _ROUNDINGS * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    error = unit * torch.linalg.matrix_norm(matrix)[..., None] * condition.nan_to_num(nan=torch.inf)  # defective
    real: Tensor = eigenvalues.imag.abs() <= error.nan_to_num(nan=0.0)  # of a matrix of zeros
    return real
