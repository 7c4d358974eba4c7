"""Active search for folds in several dimensions: a token with det J < 0 proves one; finding none proves nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from probattn import blocks
from probattn.errors import InputError, require_finite
from probattn.numerics import linalg
from probattn.solve.context import Context

__all__ = ["find_fold"]


def find_fold(past: Context, *, starts: int = 64, steps: int = 60) -> Tensor | None:
    """Search for a token with det J < 0, which proves that some noise has several solutions.

    Gradient ascent on the largest real eigenvalue of M = I - J, in steps normalised to the spread of the past, from
    random points about it; every point that is visited is tested. In one dimension :func:`largest_sensitivity` decides
    instead.

    Args:
        past: no batch axes, finite.
        starts: number of points to start from.
        steps: number of steps from each.

    Returns:
        A witness u, (p,), or None where none was found, which proves nothing.

    Raises:
        InputError: batch axes, or a past that is not finite.

    Example:
        >>> from probattn.attention import CausalAttention
        >>> corners = torch.tensor([[1.0, 0.2], [-1.0, -0.2], [0.1, 1.0]], dtype=torch.float64)
        >>> folded = Context.of(CausalAttention.from_qk_matrix(3 * torch.eye(2, dtype=torch.float64)), corners)
        >>> witness = find_fold(folded)
        >>> float(torch.linalg.det(folded.mean_and_jacobian(witness)[1])) < 0
        True
    """
    if past.batch_shape:
        raise InputError("find_fold needs one past without batch axes.")
    require_finite("the past", past.values)
    require_finite("the past", past.keys)
    if past.length < 2:
        return None
    dim = past.values.shape[-1]
    values = past.values.detach().sum(0)  # (n, p)
    centre = values.mean(0)
    spread = float(torch.linalg.vector_norm(values - centre, dim=-1).max()) + 1e-12
    # A token far out sees one other; near the past's own values the weights are mixed.
    generator = torch.Generator(device="cpu").manual_seed(0)
    noise = torch.randn(starts, dim, generator=generator, dtype=torch.float64).to(values)
    chosen = torch.randint(len(values), (starts,), generator=generator).to(values.device)
    mixed = torch.rand(starts, 1, generator=generator, dtype=torch.float64).to(values)
    size = torch.rand(starts, 1, generator=generator, dtype=torch.float64).to(values)
    u = centre + mixed * (values[chosen] - centre) + 0.5 * spread * noise * size
    identity = torch.eye(dim, dtype=u.dtype, device=u.device)
    length = spread / 4
    for _ in range(steps):
        u = u.detach().requires_grad_()
        jacobian = past.mean_and_jacobian(u)[1]
        determinant = linalg.det(jacobian.detach())
        if bool((determinant < 0).any()):
            return u.detach()[determinant.argmin()]
        largest = blocks.largest_real_eigenvalue(identity - jacobian, dim)
        # Where no eigenvalue is real, climb the trace.
        trace = dim - jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)
        (slope,) = torch.autograd.grad(torch.where(torch.isneginf(largest), trace, largest).sum(), u)
        norm = torch.linalg.vector_norm(slope, dim=-1, keepdim=True).clamp(min=1e-300)
        u = u + length * slope / norm
        length *= 0.95
    return None
