"""Parameters of a causal self-attention as a value: checked once, moved, expanded and compared as one."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import Distribution

from probattn.errors import InputError, require_axes, require_finite, require_tensor
from probattn.interface import Mask, require_mask
from probattn.moments.dense import SUPPORTED
from probattn.numerics.precision import in_own_precision

__all__ = ["AttentionParameters"]


class AttentionParameters:
    """The maps of an attention, its scale, its mask and the mean of the first token; broadcasting batch axes.

    The arguments are those of :class:`~probattn.attention.CausalAttention`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scale: Tensor
    start: Tensor
    mask: Mask

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        output: Tensor | None = None,
        *,
        scale: float | Tensor | None = None,
        mask: Mask = "strict",
        start: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        require_mask(mask)
        given = {"query": query, "key": key, "value": value, "output": output}
        for name, tensor in given.items():
            if tensor is None and name in ("value", "output"):
                continue
            require_tensor(name, tensor)
            assert tensor is not None
            if tensor.dim() < 3:
                raise InputError(
                    f"{name} has shape {tuple(tensor.shape)}; it needs a heads axis: (*batch, H, rows, columns). "
                    "Add it with .unsqueeze(-3) for one head."
                )
        if query.dtype not in SUPPORTED:
            raise InputError(
                f"query is {query.dtype}; log-determinants need float32 or float64, convert with .to(...)."
            )
        heads, rank, dim = query.shape[-3:]
        if min(heads, rank, dim) < 1:
            raise InputError(f"query has shape {tuple(query.shape)}; heads, rank and features must be at least 1.")
        require_axes("key", key, {"heads": heads, "rank": rank, "features": dim})
        identity = torch.eye(dim, dtype=query.dtype, device=query.device).expand(heads, dim, dim)
        value = identity if value is None else value
        require_axes("value", value, {"heads": heads, "value": value.shape[-2], "features": dim})
        if output is None and value.shape[-2] != dim:
            raise InputError(
                f"value has {value.shape[-2]} rows but output is the identity, which needs {dim}; pass output, "
                f"(*batch, H, {dim}, {value.shape[-2]})."
            )
        output = identity if output is None else output
        require_axes("output", output, {"heads": heads, "features": dim, "value": value.shape[-2]})
        start = torch.zeros(dim, dtype=query.dtype, device=query.device) if start is None else start
        require_tensor("start", start)
        require_axes("start", start, {"features": dim})
        self.query, self.key, self.value, self.output, self.start, self.mask = query, key, value, output, start, mask
        self.scale = torch.as_tensor(rank**-0.5 if scale is None else scale, dtype=query.dtype, device=query.device)
        for name, tensor in self._parameters().items():
            if (tensor.dtype, tensor.device) != (query.dtype, query.device):
                raise InputError(
                    f"{name} is {tensor.dtype} on {tensor.device} but query is {query.dtype} on {query.device}; "
                    "bring them together with .to(query)."
                )
        if self.scale.dim() and self.scale.shape[-1] not in (1, heads):
            raise InputError(
                f"scale has {self.scale.shape[-1]} in its heads axis (-1) where 1 or {heads} is expected; "
                "for a batch of numbers append an axis of size 1."
            )
        try:
            self.batch_shape = torch.broadcast_shapes(
                query.shape[:-3],
                key.shape[:-3],
                value.shape[:-3],
                output.shape[:-3],
                start.shape[:-1],
                self.scale.shape[:-1],
            )
        except RuntimeError:
            shapes = {name: tuple(tensor.shape) for name, tensor in self._parameters().items()}
            raise InputError(f"the batch axes of the parameters do not broadcast: {shapes}.") from None
        if Distribution._validate_args if validate_args is None else validate_args:
            for name, tensor in self._parameters().items():
                require_finite(name, tensor)

    def _parameters(self) -> dict[str, Tensor]:
        names = ("query", "key", "value", "output", "scale", "start")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        sizes = f"heads={self.heads}, rank={self.rank}, value_dim={self.value.shape[-2]}, dim={self.dim}"
        return f"{type(self).__name__}({sizes}, mask={self.mask!r}, batch_shape={tuple(self.batch_shape)})"

    @property
    def heads(self) -> int:
        """H."""
        return self.query.shape[-3]

    @property
    def rank(self) -> int:
        """r, the dimension of queries and keys."""
        return self.query.shape[-2]

    @property
    def dim(self) -> int:
        """p, the dimension of a token."""
        return self.query.shape[-1]

    @property
    def like(self) -> Tensor:
        """A parameter, for its dtype and device."""
        return self.query

    @property
    @in_own_precision
    def qk_matrix(self) -> Tensor:
        """A_h = c W_K^T W_Q, ``(*batch, H, p, p)``, identified by the logits, as the factors are not."""
        return self.key.mT @ self.scaled_query

    @property
    @in_own_precision
    def ov_matrix(self) -> Tensor:
        """C_h = W_O W_V, ``(*batch, H, p, p)``, identified by the mean, as the factors are not."""
        return self.output @ self.value

    @property
    @in_own_precision
    def scaled_query(self) -> Tensor:
        """The query map times the logit scale, c W_Q, ``(*batch, H, r, p)``."""
        return self.scale[..., None, None] * self.query

    def expand(self, batch_shape: torch.Size | tuple[int, ...] | list[int]) -> Self:
        """The same attention with its batch axes expanded to ``batch_shape``, as views."""
        batch = tuple(batch_shape)
        return type(self)(
            self.query.expand(*batch, *self.query.shape[-3:]),
            self.key.expand(*batch, *self.key.shape[-3:]),
            self.value.expand(*batch, *self.value.shape[-3:]),
            self.output.expand(*batch, *self.output.shape[-3:]),
            scale=self.scale.expand(*batch, self.heads),
            mask=self.mask,
            start=self.start.expand(*batch, self.dim),
            validate_args=False,
        )

    def select(self, index: int | tuple[Tensor, ...]) -> Self:
        """One element of the first batch axis, or (K,) elements by their indices along all of the batch axes."""
        whole = self.expand(self.batch_shape)
        chosen = {name: tensor[index] for name, tensor in whole._parameters().items()}
        return type(self)(**chosen, mask=self.mask, validate_args=False)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The same attention with every parameter moved or converted as by ``Tensor.to``, same arguments."""
        moved = {name: tensor.to(*args, **kwargs) for name, tensor in self._parameters().items()}
        return type(self)(**moved, mask=self.mask, validate_args=False)

    def detach(self) -> Self:
        """The same attention cut off from the graph of its parameters."""
        cut = {name: tensor.detach() for name, tensor in self._parameters().items()}
        return type(self)(**cut, mask=self.mask, validate_args=False)

    def equals(self, other: AttentionParameters) -> bool:
        """True if mask and every parameter agree exactly."""
        mine, theirs = self._parameters(), other._parameters()
        return self is other or (
            self.mask == other.mask and all(torch.equal(mine[name], theirs[name]) for name in mine)
        )
