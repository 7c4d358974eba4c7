r"""Causal self-attention as a value: its parameters, weights, mean, residual map and the covariances of the past.

The notation is that of the whole project: a sequence :math:`u = (u_1, \dots, u_T)`, :math:`u_i \in R^p`, heads h =
1..H,

.. math::
    q_i = W_Q u_i, \quad k_s = W_K u_s, \quad v_s = W_V u_s, \quad l_{is} = c\, q_i \cdot k_s, \quad
    \alpha_{i\cdot} = \mathrm{softmax}(l_{i\cdot}), \quad
    \mu_i = \sum_h W_O^h \sum_s \alpha^h_{is} v^h_s, \quad e_i = u_i - \mu_i .

Under the *strict* mask the past of i is s < i; under the *inclusive* mask it is s <= i.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from probattn import blocks
from probattn.errors import InputError, require_finite
from probattn.interface import Mask, require_mask
from probattn.moments.dense import SUPPORTED, attention_weights, scaled_dot, scaled_product
from probattn.moments.mean import causal_mean
from probattn.moments.operators import origin_moments
from probattn.moments.refine import norm_bound

__all__ = ["CausalAttention", "Mask", "MeanAndFactors", "require_mask"]


class MeanAndFactors(NamedTuple):
    """What one pass over a sequence yields.

    Attributes:
        mean: mu, (*batch, T, p).
        factors: M_i = I - J_i in factors.
    """

    mean: Tensor
    factors: blocks.JacobianFactors


class CausalAttention:
    r"""Parameters of a causal self-attention, with its mean, its Jacobian blocks and their log-determinants.

    .. math::
        \mu_i = \sum_h W_O^h \sum_s \alpha^h_{is} W_V^h u_s, \qquad
        \alpha^h_{is} \propto \exp(c\,(W_Q^h u_i) \cdot (W_K^h u_s)), \qquad J_i = \partial (u_i - \mu_i) / \partial u_i
        .

    A value, not a module: build it inside a model from sampled tensors, as often as needed. Every method is written for
    arbitrary leading batch dimensions of the parameters, of u, or of both, which broadcast.

    Args:
        query: W_Q, (*batch, H, r, p).
        key: W_K, (*batch, H, r, p).
        value: W_V, (*batch, H, dv, p); None: the identity, dv = p.
        output: W_O, (*batch, H, p, dv); None: the identity, which needs dv = p.
        scale: c, a number or a tensor that broadcasts to (*batch, H); None: 1 / sqrt(r).
        mask: "strict" (the past of i is s < i) or "inclusive" (s <= i).
        start: mu_1 under the strict mask, where nothing has been seen yet, (*batch, p); None: zero.
        validate_args: check that the parameters are finite; None: as torch.distributions validates at the moment.

    Raises:
        InputError: an axis whose size disagrees (named, with both sizes), an unknown mask, parameters that are not
            finite.

    Note:
        Under the inclusive mask the first token attends to itself alone, so J_1 = I - sum_h W_O W_V: with value and
        output both the identity and one head, J_1 = 0 and there is no density at all.

    Example:
        >>> A = torch.tensor([[0.5]], dtype=torch.float64)
        >>> attention = CausalAttention.from_qk_matrix(A)
        >>> u = torch.tensor([[-1.0], [1.0], [0.0]], dtype=torch.float64)
        >>> attention.jacobian(u).flatten()  # 1 - a Var: nothing seen, one token seen, variance 1
        tensor([1.0000, 1.0000, 0.5000], dtype=torch.float64)
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
        for name, tensor in (("query", query), ("key", key), ("value", value), ("output", output)):
            if tensor is not None and tensor.dim() < 3:
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
        _require_axes("key", key, {"heads": heads, "rank": rank, "features": dim})
        identity = torch.eye(dim, dtype=query.dtype, device=query.device).expand(heads, dim, dim)
        value = identity if value is None else value
        _require_axes("value", value, {"heads": heads, "value": value.shape[-2], "features": dim})
        if output is None and value.shape[-2] != dim:
            raise InputError(
                f"value has {value.shape[-2]} rows but output is the identity, which needs {dim}; pass output, "
                f"(*batch, H, {dim}, {value.shape[-2]})."
            )
        output = identity if output is None else output
        _require_axes("output", output, {"heads": heads, "features": dim, "value": value.shape[-2]})
        start = torch.zeros(dim, dtype=query.dtype, device=query.device) if start is None else start
        _require_axes("start", start, {"features": dim})
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

    @classmethod
    def from_qk_matrix(cls, matrix: Tensor, *, mask: Mask = "strict", start: Tensor | None = None) -> CausalAttention:
        """The simplest instance, l_is = u_s^T A u_i with W_V = W_O = I.

        Args:
            matrix: A, (p, p) for one head or (*batch, H, p, p).
            mask: as in the class.
            start: as in the class.

        Returns:
            The attention with W_Q = A, W_K = I and c = 1.

        Raises:
            InputError: if the matrix is not square.
        """
        if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
            raise InputError(f"the QK matrix has shape {tuple(matrix.shape)}; it must be square, (*batch, H, p, p).")
        matrix = matrix.unsqueeze(0) if matrix.dim() == 2 else matrix
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand(matrix.shape)
        return cls(matrix, identity, scale=1.0, mask=mask, start=start)

    def _parameters(self) -> dict[str, Tensor]:
        names = ("query", "key", "value", "output", "scale", "start")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        sizes = f"heads={self.heads}, rank={self.rank}, value_dim={self.value.shape[-2]}, dim={self.dim}"
        return f"CausalAttention({sizes}, mask={self.mask!r}, batch_shape={tuple(self.batch_shape)})"

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
    def qk_matrix(self) -> Tensor:
        """A_h = c W_K^T W_Q, (*batch, H, p, p): identified by the logits, as the factors are not."""
        return self.key.mT @ self.scaled_query

    @property
    def ov_matrix(self) -> Tensor:
        """C_h = W_O W_V, (*batch, H, p, p): identified by the mean, as the factors are not."""
        return self.output @ self.value

    @property
    def scaled_query(self) -> Tensor:
        """The query map times the logit scale, c W_Q, (*batch, H, r, p)."""
        return self.scale[..., None, None] * self.query

    def expand(self, batch_shape: torch.Size | tuple[int, ...] | list[int]) -> CausalAttention:
        """The same attention with its batch axes expanded to ``batch_shape``, as views."""
        batch = tuple(batch_shape)
        return CausalAttention(
            self.query.expand(*batch, *self.query.shape[-3:]),
            self.key.expand(*batch, *self.key.shape[-3:]),
            self.value.expand(*batch, *self.value.shape[-3:]),
            self.output.expand(*batch, *self.output.shape[-3:]),
            scale=self.scale.expand(*batch, self.heads),
            mask=self.mask,
            start=self.start.expand(*batch, self.dim),
            validate_args=False,
        )

    def select(self, index: int | tuple[Tensor, ...]) -> CausalAttention:
        """One element of the first batch axis, or (K,) elements by their indices along all of the batch axes."""
        whole = self.expand(self.batch_shape)
        chosen = {name: tensor[index] for name, tensor in whole._parameters().items()}
        return CausalAttention(**chosen, mask=self.mask, validate_args=False)

    def to(self, *args: Any, **kwargs: Any) -> CausalAttention:
        """The same attention with every parameter moved or converted as by ``Tensor.to``, same arguments."""
        moved = {name: tensor.to(*args, **kwargs) for name, tensor in self._parameters().items()}
        return CausalAttention(**moved, mask=self.mask, validate_args=False)

    def detach(self) -> CausalAttention:
        """The same attention cut off from the graph of its parameters."""
        cut = {name: tensor.detach() for name, tensor in self._parameters().items()}
        return CausalAttention(**cut, mask=self.mask, validate_args=False)

    def equals(self, other: CausalAttention) -> bool:
        """Whether mask and every parameter agree exactly."""
        mine, theirs = self._parameters(), other._parameters()
        return self is other or (
            self.mask == other.mask and all(torch.equal(mine[name], theirs[name]) for name in mine)
        )

    def mean_and_factors(self, u: Tensor) -> MeanAndFactors:
        """Mean and the factored blocks in one pass over the sequence.

        Args:
            u: tokens, (*batch, T, p).

        Returns:
            An :class:`MeanAndFactors`. Time O(H T^2 r dv), memory O(H T r dv) forward and backward: weights exist for a
            block of rows at a time, but in derivatives beyond the first.

        Raises:
            InputError: if the axes, the dtype or the device of u do not fit.
        """
        self._require_tokens(u)
        query, key, value = self._project(u)
        batch = torch.broadcast_shapes(*(part.shape[:-2] for part in (query, key, value, self.output)))
        query, key, value = (part.expand(*batch, *part.shape[-2:]) for part in (query, key, value))
        q, k, v = (part.reshape(-1, *part.shape[-3:]) for part in (query, key, value))  # (B, H, T, r or dv)
        rows = q.unsqueeze(-2)  # (B, H, T, 1, r): no head shares its keys
        # What is before a token, under both masks: its own share is added in closed form, which loses no digits.
        limit = torch.arange(u.shape[-2], device=u.device)
        first = torch.zeros_like(limit)
        gain = norm_bound(self.output.detach()) * norm_bound(self.scaled_query.detach())
        gain = gain.expand(batch).reshape(-1, self.heads)
        moments = [part.view(*batch, *part.shape[2:]) for part in origin_moments(rows, k, v, first, limit, gain=gain)]
        cov, log_sum = moments[0].squeeze(-3), moments[2]  # (*batch, H, T, dv, r) and (*batch, H, T, 1)
        offset, origin = (part.squeeze(-2).split([v.shape[-1], k.shape[-1]], -1) for part in moments[1::2])
        average = origin[0] + offset[0]
        own = None
        if self.mask == "inclusive":
            # The token itself beside the mean of the others, both measured from the row's origin to keep their digits.
            far, near = value - origin[0], key - origin[1]
            odds = scaled_dot(query, near) - log_sum
            weight, rest = odds.sigmoid(), (-odds).sigmoid()  # alpha_ii and the others', (*batch, H, T, 1)
            average = weight * value + rest * average
            away = weight * rest * (far - offset[0])
            cov = rest.unsqueeze(-1) * cov + away.unsqueeze(-1) * (near - offset[1]).unsqueeze(-2)
            pull = scaled_product(query, self.key)  # c W_K^T q_i, (*batch, H, T, p)
            own = weight.unsqueeze(-1) * self.value.unsqueeze(-3) + away.unsqueeze(-1) * pull.unsqueeze(-2)
        factors = blocks.JacobianFactors(cov, self.scaled_query, self.output, own)
        return MeanAndFactors(self._assemble_mean(average), factors)

    def weights(self, u: Tensor) -> Tensor:
        """Attention weights alpha, (*batch, H, T, T); a row sums to one, but for row 1 of a strict mask."""
        self._require_tokens(u)
        query, key, _ = self._project(u)
        return attention_weights(query, key, self._visible(u))

    def mean(self, u: Tensor) -> Tensor:
        """Attention mean mu, (*batch, T, p); u_i enters mu_i through its own query."""
        self._require_tokens(u)
        query, key, value = self._project(u)
        batch = torch.broadcast_shapes(*(part.shape[:-2] for part in (query, key, value)))  # (*batch, H)
        q, k, v = (part.expand(*batch, *part.shape[-2:]).reshape(-1, *part.shape[-3:]) for part in (query, key, value))
        if self.mask == "inclusive":
            average = causal_mean(q, k, v)
        else:  # a token sees what the one before it sees under the inclusive mask; the first sees nothing
            average = torch.nn.functional.pad(causal_mean(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1]), (0, 0, 1, 0))
        return self._assemble_mean(average.view(*batch, *average.shape[-2:]))

    def residual(self, u: Tensor) -> Tensor:
        """The residual map e = u - mu(u), (*batch, T, p)."""
        return u - self.mean(u)

    def jacobian(self, u: Tensor) -> Tensor:
        r"""Diagonal blocks J_i = de_i/du_i.

        .. math::
            \text{strict: } J_i = I - \sum_h W_O \mathrm{Cov}_i(v, k)\, c W_Q, \qquad
            \text{inclusive: } J_i = I - \sum_h W_O [\mathrm{Cov}_i(v, k)\, c W_Q
            + \alpha_{ii} (W_V + (v_i - \bar v_i)(c W_K^T q_i)^T)] .

        Args:
            u: tokens, (*batch, T, p).

        Returns:
            (*batch, T, p, p). The blocks above the diagonal of de/du are zero, those below do not enter the
            determinant.
        """
        return torch.eye(self.dim, dtype=u.dtype, device=u.device) - self.mean_jacobian(u)

    def mean_jacobian(self, u: Tensor) -> Tensor:
        """Diagonal blocks M_i = dmu_i/du_i = I - J_i.

        Args:
            u: tokens, (*batch, T, p).

        Returns:
            (*batch, T, p, p).
        """
        return blocks.mean_jacobian(self.mean_and_factors(u).factors)

    def core(self, u: Tensor) -> Tensor:
        """The smallest matrix K_i with det(I - K_i) = det J_i and the non-zero eigenvalues of M_i.

        Args:
            u: tokens, (*batch, T, p).

        Returns:
            (*batch, T, m, m); see :func:`probattn.blocks.sylvester_core` for m.
        """
        return blocks.sylvester_core(self.mean_and_factors(u).factors)

    def logabsdet(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Sign and log|det J_i| by the cheapest exact route.

        Square matrices of size min(p, H r, H dv), or min(p, H dv) under the inclusive mask; see ``blocks.sylvester_core``.

        Args:
            u: tokens, (*batch, T, p).

        Returns:
            sign and log|det J_i|, (*batch, T) each.
        """
        return blocks.logabsdet_one_minus(self.core(u))

    def residual_and_logabsdet(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The residual e, (*batch, T, p), and log|det J_i|, (*batch, T): all that the density needs, in one pass."""
        evaluation = self.mean_and_factors(u)
        return u - evaluation.mean, blocks.logabsdet_one_minus(blocks.sylvester_core(evaluation.factors))[1]

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = u.unsqueeze(-3)  # (*batch, 1, T, p)
        query = tokens @ self.scaled_query.mT  # (*batch, H, T, r)
        key = tokens @ self.key.mT  # (*batch, H, T, r)
        value = tokens @ self.value.mT  # (*batch, H, T, dv)
        return query, key, value

    def _visible(self, u: Tensor) -> Tensor:
        length = u.shape[-2]
        diagonal = -1 if self.mask == "strict" else 0
        return torch.ones(length, length, dtype=torch.bool, device=u.device).tril(diagonal)

    def _assemble_mean(self, average: Tensor) -> Tensor:
        mean = (average @ self.output.mT).sum(-3)  # (*batch, T, p)
        if self.mask == "inclusive":
            return mean
        first = torch.arange(average.shape[-2], device=average.device) == 0
        return torch.where(first.unsqueeze(-1), self.start.unsqueeze(-2), mean)

    def _require_tokens(self, u: Tensor) -> None:
        if u.dim() < 2 or u.shape[-1] != self.dim or u.shape[-2] < 1:
            raise InputError(
                f"u has shape {tuple(u.shape)}; it must be (*batch, T, p) with p = {self.dim} features in the last "
                "axis "
                "and at least one token in the one before."
            )
        if (u.dtype, u.device) != (self.query.dtype, self.query.device):
            raise InputError(
                f"u is {u.dtype} on {u.device} but the attention is {self.query.dtype} on {self.query.device}; "
                "convert one of them with .to(...)."
            )


def _require_axes(name: str, tensor: Tensor, axes: dict[str, int]) -> None:
    """Check the last axes of a parameter against sizes known from the others."""
    if tensor.dim() < len(axes):
        raise InputError(f"{name} has shape {tuple(tensor.shape)}; its last axes must be {axes}.")
    for position, (axis, size) in enumerate(axes.items(), start=-len(axes)):
        if tensor.shape[position] != size:
            raise InputError(
                f"{name} has {tensor.shape[position]} in its {axis} axis ({position}) where {size} is expected; "
                f"its shape is {tuple(tensor.shape)}, its last axes must be {axes}."
            )
