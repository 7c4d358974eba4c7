r"""The margin of a head alone, as a negative control: **it is not a property of the model**.

.. math:: J^h_i = I - c\,\mathrm{Cov}^h_i(v, k)

subtracts values from queries, two spaces that have nothing to do with each other. With W_V replaced by R W_V and W_O by
W_O R^{-1}, for any invertible R, the network is the same function, and this matrix another. It is computed here to show
what comes of it, and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probattn.blocks import logabsdet_one_minus
from probattn.errors import InputError
from probattn.hf.layers import attention_layer
from probattn.hf.layers.past import attend
from probattn.hf.layers.sublayer import project
from probattn.hf.margins import residual_streams
from probattn.numerics import linalg

__all__ = ["head_alone"]

_SQUARINGS = 8


@torch.no_grad()
def head_alone(model: Any, ids: Tensor, *, seed: int | None = None) -> dict[str, Tensor]:
    """Margins of heads alone, mean over heads and layers, in the basis of the weights or in a turned one.

    Args:
        model: causal model of ``transformers``.
        ids: tokens, ``(N, T)``, on the device of the model.
        seed: seed of the random rotations, one for the values of each head; None keeps the basis as it is.

    Returns:
        ``sigma_min``, the mean of log sigma_min, and ``logabsdet``, the mean of log|det|, ``(N, T)`` each, on the CPU.

    Raises:
        InputError: heads whose values and keys differ in size, for which the matrix is not even square.
    """
    streams, _ = residual_streams(model, ids)
    generator = torch.Generator().manual_seed(seed or 0)
    sums: dict[str, Tensor] = {}
    for number, stream in enumerate(streams):
        layer = attention_layer(model, number, check=False).detach()
        sublayer = layer.sublayer
        size, rank = sublayer.output.shape[2], sublayer.key.weight.shape[1]
        if size != rank:
            raise InputError(f"layer {number} has values of size {size} and keys of size {rank}; they must be equal.")
        positions = torch.arange(ids.shape[1], device=ids.device)
        turn = _rotations(sublayer.heads, size, generator).to(stream) if seed is not None else None
        for k, text in enumerate(stream.to(layer.dtype).split(1)):
            covariance = attend(sublayer, project(sublayer, text, positions.unsqueeze(0)), positions).covariance[0]
            covariance = covariance if turn is None else turn @ covariance  # (T, H, dv, r)
            found = {
                "sigma_min": _smallest_singular_value(covariance).log(),
                "logabsdet": logabsdet_one_minus(covariance)[1],
            }
            for name, values in found.items():
                sums.setdefault(name, torch.zeros(ids.shape))[k] += values.mean(-1).cpu() / len(streams)
    return sums


def _rotations(heads: int, size: int, generator: torch.Generator) -> Tensor:
    """One random orthogonal matrix per head, ``(H, size, size)``."""
    square = torch.randn(heads, size, size, generator=generator, dtype=torch.float64)
    orthogonal, upper = torch.linalg.qr(square)
    turns: Tensor = orthogonal * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return turns


def _smallest_singular_value(covariance: Tensor) -> Tensor:
    """sigma_min(I - C), ``(*batch,)``, by squaring the inverse, whose batches are fast on every device.

    The power 2^8 of (J J^T)^-1 leaves of the other singular values what differs from sigma_min by less than a percent.
    """
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    block = identity - covariance
    inverse = linalg.inverse(block, check=False)
    power = inverse.mT @ inverse
    for _ in range(_SQUARINGS):
        power = power / torch.linalg.matrix_norm(power)[..., None, None]
        power = power @ power
    vector = power.sum(-1, keepdim=True)
    vector = vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
    smallest: Tensor = torch.linalg.vector_norm(block.mT @ vector, dim=(-2, -1))
    return smallest
