r"""Log-determinants from random probes, matrix-free and with an unbiased gradient.

For a probe z of random signs, the Lanczos process on :math:`J^T J` gives a small tridiagonal matrix, from which both

.. math::
    \log|\det J| = \tfrac12 \mathrm{tr} \log(J^T J) = \tfrac12 \mathrm E\, z^T \log(J^T J)\, z
    \qquad\text{and}\qquad
    w = J (J^T J)^{-1} z = J^{-T} z, \quad d \log|\det J| = \mathrm{tr}(J^{-1} dJ) = \mathrm E\, w^T dJ\, z

follow: the first by the Gauss quadrature of the tridiagonal matrix (Ubaru, Chen and Saad, 2017, SIAM J. Matrix Anal.
Appl. 38, 1075), the second by its solution, as in the conjugate gradient method. One run serves value and gradient. The
sign of det J is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "Probed", "probe_signs", "probed_logabsdet"]

_Product = Callable[[Tensor], Tensor]

#: Relative residual of the solution at which the process stops, by precision; it is the bias left in the gradient.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}


class Probed(NamedTuple):
    """Estimates from n probes per matrix.

    Attributes:
        logabsdet: ``z^T log(J^T J) z / 2``, ``(*tokens, n)``; its expectation over z is log|det J|.
        solution: w = J^-T z, ``(*tokens, n, p)``.
        smallest: square root of the smallest Ritz value, ``(*tokens,)``: sigma_min(J) from above, and soon exact where
            it stands apart.
        residual: relative residual of the solution, ``(*tokens, n)``.
    """

    logabsdet: Tensor
    solution: Tensor
    smallest: Tensor
    residual: Tensor


def probe_signs(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Random signs of a shape, from torch's global random state.

    Args:
        shape: ``(*tokens, n, p)``.
        like: a tensor, for precision and device.
    """
    return (2 * torch.randint(2, shape, device=like.device) - 1).to(like.dtype)


def probed_logabsdet(
    product: _Product, transposed: _Product, z: Tensor, *, steps: int = 48, tolerance: float | None = None
) -> Probed:
    r"""Run the Lanczos process on J^T J from each probe.

    Args:
        product: J, a map of ``(*tokens, n, p)``.
        transposed: J^T.
        z: probes, ``(*tokens, n, p)``.
        steps: largest number of steps, each with a product and a transposed one; p are enough.
        tolerance: relative residual of the solution at which all have converged; None: 1e-3 in float32, 1e-8 in
            float64. A compiled graph takes all steps.

    Returns:
        :class:`Probed`, without a graph. With condition number kappa of J the error of k steps is of the order
        ((kappa - 1) / (kappa + 1))^k in the solution, and the square of that in the value; eigenvalues in clusters
        take one step a cluster. Vectors are orthogonalised against all before.

    Example:
        >>> J = torch.diag(torch.tensor([0.5, 2.0, 3.0]))
        >>> found = probed_logabsdet(lambda x: x @ J.mT, lambda x: x @ J, torch.tensor([[1.0, -1.0, 1.0]]))
        >>> round(float(found.logabsdet), 4), round(float(found.smallest), 4)  # J is diagonal: no variance
        (1.0986, 0.5)
    """
    tolerance = TOLERANCE.get(z.dtype, 1e-3) if tolerance is None else tolerance
    tiny, small = torch.finfo(z.dtype).tiny, 8 * torch.finfo(z.dtype).eps
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)  # (*tokens, n, 1)
    vector = z / norm
    basis: list[Tensor] = []
    images: list[Tensor] = []
    diagonal: list[Tensor] = []  # of the tridiagonal matrix, and what stands beside it, (*tokens, n) each
    beside: list[Tensor] = []
    residual = torch.ones_like(norm.squeeze(-1))
    pivot = residual
    exhausted = torch.zeros_like(residual, dtype=torch.bool)
    for step in range(min(steps, z.shape[-1])):
        image = product(vector)
        basis.append(vector)
        images.append(image)
        square = image.square().sum(-1)
        diagonal.append(torch.where(exhausted, diagonal[0], square) if step else square)
        pivot = diagonal[-1] - beside[-1].square() / pivot if step else square
        rest = transposed(image)
        known = torch.stack(basis, -2)  # (*tokens, n, k, p)
        for _ in range(2):  # twice is enough (Parlett)
            rest = rest - ((known @ rest.unsqueeze(-1)).mT @ known).squeeze(-2)
        size: Tensor = torch.linalg.vector_norm(rest, dim=-1)
        # Where the space is exhausted the next vector is zero, and decoupled by an entry that disturbs nothing.
        exhausted = exhausted | (size <= small * diagonal[0])
        size = size.masked_fill(exhausted, 0.0)
        # Gaussian elimination in the tridiagonal matrix gives the residual of the solution, as conjugate gradients do.
        residual = residual * (size / pivot).abs()
        last = step + 1 == min(steps, z.shape[-1])
        if last or (not torch.compiler.is_compiling() and bool((residual <= tolerance).all())):
            break
        beside.append(size)
        vector = (rest / size.clamp(min=tiny).unsqueeze(-1)).masked_fill(exhausted.unsqueeze(-1), 0.0)
    values, vectors, coefficients = _small(diagonal, beside)
    logs = (vectors[..., 0, :].square() * values.clamp(min=tiny).log()).sum(-1)  # (*tokens, n)
    solution = norm * torch.einsum("...k,...kp->...p", coefficients, torch.stack(images, -2))
    smallest = values[..., 0].clamp(min=0).sqrt().amin(-1)
    return Probed(norm.squeeze(-1).square() * logs / 2, solution, smallest, residual)


def _small(diagonal: list[Tensor], beside: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and eigenvectors of the tridiagonal matrix, and its inverse times the first unit vector."""
    matrix = torch.diag_embed(torch.stack(diagonal, -1))
    if beside:
        above = torch.diag_embed(torch.stack(beside, -1), offset=1)
        matrix = matrix + above + above.mT
    values, vectors = torch.linalg.eigh(matrix)
    tiny = torch.finfo(matrix.dtype).tiny
    inverse = vectors[..., 0, :] / values.where(values.abs() > tiny, torch.inf)
    return values, vectors, (vectors @ inverse.unsqueeze(-1)).squeeze(-1)
