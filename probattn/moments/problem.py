"""Rows and the tokens that they attend to: one argument for all the ways to compute their moments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CANCELLATION", "Problem"]

# How large a quantity that cancels may be before a row is computed again: with epsilons of 1e-7 and 2e-16, errors stay
# near 1e-4 and 2e-12. Other dtypes are left as they are.
CANCELLATION = {torch.float32: 1e3, torch.float64: 1e4}


class Problem(NamedTuple):
    """Rows and what they attend to: the arguments of :func:`probattn.moments.operators.past_moments`, same shapes."""

    query: Tensor
    key: Tensor
    value: Tensor
    first: Tensor
    limit: Tensor
    mask: Tensor | None
    scale: float
    softcap: float

    def cannot_lose(self, gain: Tensor | None) -> bool:
        """True if query, key and value are so small that no difference of theirs cancels noticeably; a cheap test.

        Args:
            gain: as in :func:`lost_rows`.
        """
        tensors = self.query, self.key, self.value
        if self.key.dtype not in CANCELLATION or not all(part.numel() for part in tensors):
            return True
        ask, pull, carry = (float(torch.linalg.vector_norm(part, torch.inf)) for part in tensors)
        rank, size = self.key.shape[-1], self.value.shape[-1]
        times = 1.0 if gain is None else max(1.0, float(gain.max()))
        bound = CANCELLATION[self.key.dtype]
        # Written so that NaN is not small.
        products = 4 * (rank * size) ** 0.5 * pull * carry * times <= bound
        return products and 2 * abs(self.scale) * rank * ask * pull <= bound and size**0.5 * carry <= bound

    def until_overflow(self) -> tuple[Problem, Tensor]:
        """The problem with zeros from the first token on whose products with others may overflow.

        Sizes decide, not infinities in the results: a fused multiply-add of numbers that overflow has any sign.

        Returns:
            The problem, and the rows that see such a token or whose logits may overflow, (B, K, P, g).
        """
        query, key, value = self.query, self.key, self.value
        largest = torch.finfo(key.dtype).max / 16  # a product of two differences, and the sum of two such
        step = 2 * abs(self.scale) * query.shape[-1]  # from the size of query and key to that of a logit
        widest, heaviest = (part.abs().amax(-1).cummax(-1).values for part in (key, value))  # (B, K, S)
        count = (widest * heaviest < largest).long().cumprod(-1).sum(-1, keepdim=True)  # (B, K, 1)
        hidden = (torch.arange(key.shape[2], device=key.device) >= count).unsqueeze(-1)
        last = (self.limit - 1).clamp(min=0).expand(*key.shape[:2], -1)
        logits = step * query.abs().amax(-1) * widest.gather(-1, last).unsqueeze(-1)  # bounds, (B, K, P, g)
        reached = (self.limit > count).unsqueeze(-1) | ~(logits < largest)
        shown = self._replace(key=key.masked_fill(hidden, 0.0), value=value.masked_fill(hidden, 0.0))
        return shown, reached & (self.limit > self.first)[:, None]

    def since(self, begin: int) -> Problem:
        """The problem of the positions from an index on."""
        mask = None if self.mask is None else self.mask[:, :, begin:]
        query, first, limit = self.query[:, :, begin:], self.first[begin:], self.limit[begin:]
        return self._replace(query=query, first=first, limit=limit, mask=mask)

    def measured_from(self, point: Tensor) -> Problem:
        """The problem with a token in front that no row sees, from which the first pass then measures.

        Args:
            point: its value and key, (B, K, dv + r).
        """
        value, key = point.unsqueeze(2).split([self.value.shape[-1], self.key.shape[-1]], -1)
        mask = self.mask
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (1, 0))
        return self._replace(
            key=torch.cat([key, self.key], 2), value=torch.cat([value, self.value], 2),
            first=self.first + 1, limit=self.limit + 1, mask=mask,
        )  # fmt: skip
