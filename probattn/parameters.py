"""Parameters of a causal self-attention as a value: checked once, moved, expanded and compared as one."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import Distribution

from probattn.errors import InputError, require_axes, require_finite, require_positive, require_tensor
from probattn.interface import Mask, require_mask
from probattn.moments.dense import SUPPORTED
from probattn.numerics.ball import onto_ball, onto_ball_jacobian
from probattn.numerics.precision import in_own_precision

__all__ = ["AttentionParameters"]

_OWN = 7 / 6  # bounds the factor of the token's own share, whose supremum is 1.1635


class AttentionParameters:
    """The maps of an attention, its scale, its mask, its memory and the mean of the first token; batch axes broadcast.

    The arguments are those of :class:`~probattn.attention.CausalAttention`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scale: Tensor
    start: Tensor
    mask: Mask
    memory_radius: Tensor | None

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
        memory_radius: float | Tensor | None = None,
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
        if isinstance(memory_radius, (int, float)):
            require_positive("memory_radius", memory_radius)
            memory_radius = torch.as_tensor(memory_radius, dtype=query.dtype, device=query.device)
        if memory_radius is not None:
            require_tensor("memory_radius", memory_radius)
        self.memory_radius = memory_radius
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
                () if memory_radius is None else memory_radius.shape,
            )
        except RuntimeError:
            shapes = {name: tuple(tensor.shape) for name, tensor in self._parameters().items()}
            raise InputError(f"the batch axes of the parameters do not broadcast: {shapes}.") from None
        if Distribution._validate_args if validate_args is None else validate_args:
            for name, tensor in self._parameters().items():
                require_finite(name, tensor)
            if memory_radius is not None and not bool((memory_radius > 0).all()):
                raise InputError(f"memory_radius has an entry of {float(memory_radius.min())}; it must be positive.")

    def _parameters(self) -> dict[str, Tensor]:
        names = ("query", "key", "value", "output", "scale", "start", "memory_radius")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def __repr__(self) -> str:
        sizes = f"heads={self.heads}, rank={self.rank}, value_dim={self.value.shape[-2]}, dim={self.dim}"
        memory = "" if self.memory_radius is None else f", memory_radius={_shown(self.memory_radius)}"
        return f"{type(self).__name__}({sizes}, mask={self.mask!r}{memory}, batch_shape={tuple(self.batch_shape)})"

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

    def remember(self, u: Tensor) -> Tensor:
        r"""Tokens as keys and values see them: :math:`\varphi(u)` on the ball of the memory, u without a radius.

        Args:
            u: tokens, ``(*batch, T, p)``.

        Returns:
            ``(*batch, T, p)``.
        """
        return u if self.memory_radius is None else onto_ball(u, self.memory_radius.unsqueeze(-1))

    def remember_jacobian(self, u: Tensor) -> Tensor | None:
        """Derivative of :meth:`remember` by each token, ``(*batch, T, p, p)``; None where it is the identity."""
        return None if self.memory_radius is None else onto_ball_jacobian(u, self.memory_radius.unsqueeze(-1))

    @property
    @in_own_precision
    def contraction(self) -> Tensor:
        r"""Bound kappa on the norm of M_i that holds for **every** past of every length, from the parameters alone.

        With :math:`a_h = \rho^2 |A_h|` in the spectral norm,

        .. math::
            \text{strict: } \kappa = \sum_h |C_h|\, a_h, \qquad
            \text{inclusive: } \kappa = \sum_h |C_h| \max(1, \min(2 a_h, \tfrac76), \tfrac76 a_h) .

        Below one, u_i -> e_i is a bijection whatever came before. Derived here (theory, section 11).

        Returns:
            kappa, ``(*batch)``; inf without a memory radius. Time O(H p^3).

        Example:
            >>> from probattn import CausalAttention
            >>> CausalAttention.from_qk_matrix(torch.tensor([[0.2]]), memory_radius=2.0).contraction
            tensor(0.8000)
        """
        if self.memory_radius is None:
            return torch.full(self.batch_shape, torch.inf, dtype=self.query.dtype, device=self.query.device)
        pull = self.memory_radius.square().unsqueeze(-1) * _product_norm(self.key.mT, self.scaled_query)  # a_h
        if self.mask == "inclusive":
            pull = torch.maximum((2 * pull).clamp(max=_OWN), _OWN * pull).clamp(min=1.0)
        bound: Tensor = (_product_norm(self.output, self.value) * pull).sum(-1)
        return bound.expand(self.batch_shape)

    def with_memory(self, radius: float | Tensor | None) -> Self:
        """The same maps with another memory radius; None: tokens as they are.

        Example:
            >>> from probattn import CausalAttention
            >>> CausalAttention.from_qk_matrix(torch.eye(2)).with_memory(3.0).contraction
            tensor(9.)
        """
        parts: dict[str, Any] = self._parameters()
        parts.pop("memory_radius", None)
        return type(self)(**parts, memory_radius=radius, mask=self.mask)

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
            memory_radius=None if self.memory_radius is None else self.memory_radius.expand(batch),
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
        same = self.mask == other.mask and mine.keys() == theirs.keys()
        return self is other or (same and all(torch.equal(mine[name], theirs[name]) for name in mine))


def _product_norm(left: Tensor, right: Tensor) -> Tensor:
    """Spectral norm of left @ right, ``(*batch, m, n)`` and ``(*batch, n, k)``: through n x k where n < m."""
    if left.shape[-1] < left.shape[-2]:
        left = torch.linalg.qr(left).R
    norm: Tensor = torch.linalg.matrix_norm(left @ right, 2)
    return norm


def _shown(radius: Tensor) -> str:
    return f"{float(radius):.6g}" if radius.dim() == 0 else f"tensor of shape {tuple(radius.shape)}"
