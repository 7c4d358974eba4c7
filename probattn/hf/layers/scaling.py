r"""A gain and an inverse temperature for each head of a layer, and the share of the whole.

.. math::
    \mu_i = s\, N_o\Bigl(\sum_h g_h W_O^h \sum_t \alpha^h_{it} v^h_t + b_O\Bigr), \qquad
    \alpha^h_{it} \propto \exp(c\, \tau_h\, q^h_i \cdot k^h_t),

which at :math:`g_h = \tau_h = s = 1` is the layer as it was trained; where logits are capped, the cap comes after
:math:`\tau_h`. Without a norm behind the attention and without a bias the share is the common factor of the gains. The
block of a token is then

.. math:: M_i = s \sum_h g_h M_i^h(\tau_h), \qquad
    \frac{\partial \log|\det J_i|}{\partial g_h} = -\mathrm{tr}(J_i^{-1} s M_i^h) .

Derived here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probattn.errors import InputError

__all__ = ["HeadScaling", "head_scaling"]


class HeadScaling(NamedTuple):
    """Factors on the heads of a layer.

    Attributes:
        gain: g, on the output of each head, ``(*batch, H)``.
        inverse_temperature: tau, on the logits of each head, ``(*batch, H)``.
        share: s, on the update of the stream as a whole, ``(*batch,)``.
    """

    gain: Tensor
    inverse_temperature: Tensor
    share: Tensor

    @property
    def batch_shape(self) -> torch.Size:
        """Batch axes of the factors."""
        return self.share.shape

    @property
    def strength(self) -> Tensor:
        """Factor on each head in all, s g, ``(*batch, H)``."""
        return self.share.unsqueeze(-1) * self.gain

    def expand(self, batch: torch.Size) -> HeadScaling:
        """The same factors with their batch axes expanded."""
        return HeadScaling(
            self.gain.expand(*batch, -1), self.inverse_temperature.expand(*batch, -1), self.share.expand(batch)
        )

    def flatten(self) -> HeadScaling:
        """The same factors with one batch axis, of size one where there was none."""
        heads = self.gain.shape[-1]
        parts = (self.gain.reshape(-1, heads), self.inverse_temperature.reshape(-1, heads), self.share.reshape(-1))
        return HeadScaling(*parts)

    def repeat(self, count: int) -> HeadScaling:
        """The factors for ``count`` sequences that run through the batch of these again and again.

        Args:
            count: number of sequences, a multiple of the batch's size, with the batch axes last.
        """
        size = len(self.share)
        if size in (1, count):
            return self
        return HeadScaling(*(part.repeat(count // size, *[1] * (part.dim() - 1)) for part in self))

    def select(self, index: tuple[Tensor, ...]) -> HeadScaling:
        """The factors at some places of the batch."""
        return HeadScaling(*(part[index] for part in self))

    def detach(self) -> HeadScaling:
        """The same factors without their graph."""
        return HeadScaling(*(part.detach() for part in self))


def head_scaling(
    heads: int,
    like: Tensor,
    gain: float | Tensor = 1.0,
    inverse_temperature: float | Tensor = 1.0,
    share: float | Tensor = 1.0,
) -> HeadScaling:
    """Bring factors to one batch shape.

    Args:
        heads: number H of heads.
        like: tensor with the dtype and device of the layer.
        gain: on the output of each head, a number or ``(*batch, H)``.
        inverse_temperature: on the logits of each head, a number or ``(*batch, H)``.
        share: on the update as a whole, a number or ``(*batch,)``.

    Returns:
        :class:`HeadScaling`; gradients flow to what was given.

    Raises:
        InputError: factors for another number of heads, of another precision, or batch axes that do not broadcast.

    Example:
        >>> head_scaling(2, torch.zeros(()), gain=torch.tensor([0.5, 2.0]), share=3.0).strength
        tensor([1.5000, 6.0000])
    """
    parts = {}
    for name, given in (("gain", gain), ("inverse_temperature", inverse_temperature), ("share", share)):
        part = given if isinstance(given, Tensor) else torch.tensor(float(given), dtype=like.dtype, device=like.device)
        if (part.dtype, part.device) != (like.dtype, like.device):
            raise InputError(
                f"{name} is {part.dtype} on {part.device} and the layer computes in {like.dtype} on {like.device}; "
                "convert one of them."
            )
        if name != "share":
            if part.dim() and part.shape[-1] != heads:
                raise InputError(f"{name} has {part.shape[-1]} entries in its last axis; the layer has {heads} heads.")
            part = part.expand(heads) if not part.dim() else part
        parts[name] = part
    shapes = [parts["gain"].shape[:-1], parts["inverse_temperature"].shape[:-1], parts["share"].shape]
    try:
        batch = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise InputError(
            f"gain, inverse_temperature and share have batch axes {', '.join(str(tuple(s)) for s in shapes)}; they "
            "must broadcast."
        ) from None
    return HeadScaling(**parts).expand(batch)
