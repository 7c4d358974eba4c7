r"""Causal self-attention as a value: weights, mean, residual map, and the blocks of its Jacobian.

The notation is that of the whole project: a sequence :math:`u = (u_1, \dots, u_T)`, :math:`u_i \in R^p`, heads h =
1..H,

.. math::
    q_i = W_Q u_i, \quad k_s = W_K u_s, \quad v_s = W_V u_s, \quad l_{is} = c\, q_i \cdot k_s, \quad
    \alpha_{i\cdot} = \mathrm{softmax}(l_{i\cdot}), \quad
    \mu_i = \sum_h W_O^h \sum_s \alpha^h_{is} v^h_s, \quad e_i = u_i - \mu_i .

Under the *strict* mask the past of i is s < i; under the *inclusive* mask it is s <= i. With a *memory radius* rho,
keys and values (under the inclusive mask queries too) are those of phi(u), a smooth map onto the ball of that radius.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from probattn import blocks
from probattn.errors import InputError, require_tensor
from probattn.interface import Mask, require_mask
from probattn.moments.dense import scaled_product
from probattn.moments.mean import causal_mean, causal_weights
from probattn.moments.operators import OriginMoments, origin_moments
from probattn.moments.own import add_own_token
from probattn.moments.refine import norm_bound
from probattn.numerics.precision import in_own_precision
from probattn.parameters import AttentionParameters

__all__ = ["CausalAttention", "Mask", "MeanAndFactors", "require_mask"]


class MeanAndFactors(NamedTuple):
    """Results of one pass over a sequence.

    Attributes:
        mean: mu, ``(*batch, T, p)``.
        factors: M_i = I - J_i in factors.
    """

    mean: Tensor
    factors: blocks.JacobianFactors


class CausalAttention(AttentionParameters):
    r"""Parameters of a causal self-attention, with its mean, its Jacobian blocks and their log-determinants.

    .. math::
        \mu_i = \sum_h W_O^h \sum_s \alpha^h_{is} W_V^h u_s, \qquad
        \alpha^h_{is} \propto \exp(c\,(W_Q^h u_i) \cdot (W_K^h u_s)), \qquad J_i = \partial (u_i - \mu_i) / \partial u_i
        .

    A value, not a module: build it inside a model from sampled tensors, as often as needed. Every method is written for
    arbitrary leading batch dimensions of the parameters, of u, or of both, which broadcast.

    Args:
        query: W_Q, ``(*batch, H, r, p)``.
        key: W_K, ``(*batch, H, r, p)``.
        value: W_V, ``(*batch, H, dv, p)``; None: the identity, dv = p.
        output: W_O, ``(*batch, H, p, dv)``; None: the identity, which needs dv = p.
        scale: c, a number or a tensor that broadcasts to ``(*batch, H)``; None: 1 / sqrt(r).
        mask: "strict" (the past of i is s < i) or "inclusive" (s <= i).
        start: mu_1 under the strict mask, where nothing has been seen yet, ``(*batch, p)``; None: zero.
        memory_radius: rho > 0, a number or ``(*batch)``: keys and values see tokens through
            :func:`~probattn.numerics.ball.onto_ball`, and under the inclusive mask queries do too. The mean is then
            bounded, and ``contraction`` bounds M_i for every past. None: tokens as they are.
        validate_args: check that the parameters are finite; None: as torch.distributions validates at the moment.

    Raises:
        InputError: an axis whose size disagrees (named, with both sizes), an unknown mask, a radius that is not
            positive, parameters that are not finite.

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

    @classmethod
    def from_qk_matrix(
        cls,
        matrix: Tensor,
        *,
        heads: int | None = None,
        mask: Mask = "strict",
        start: Tensor | None = None,
        memory_radius: float | Tensor | None = None,
    ) -> CausalAttention:
        """Build the simplest instance, l_is = u_s^T A u_i with W_V = W_O = I.

        Args:
            matrix: A, (p, p) for one head or ``(*batch, H, p, p)``.
            heads: H, needed where the matrix has three axes or more: a site in a Pyro plate has its batch axes where
                the heads axis would be.
            mask: as in the class.
            start: as in the class.
            memory_radius: as in the class.

        Returns:
            The attention with W_Q = A, W_K = I and c = 1.

        Raises:
            InputError: a matrix that is not square, or a number of heads that is missing or not that of the matrix.

        Example:
            >>> plate = torch.zeros(4, 2, 2)  # a (2, 2) site in a plate of four
            >>> CausalAttention.from_qk_matrix(plate.unsqueeze(-3), heads=1).batch_shape
            torch.Size([4])
            >>> CausalAttention.from_qk_matrix(plate, heads=4).batch_shape
            torch.Size([])
        """
        require_tensor("matrix", matrix)
        shape = tuple(matrix.shape)
        if len(shape) < 2 or shape[-1] != shape[-2]:
            raise InputError(f"the QK matrix has shape {shape}; it must be square, (p, p) or (*batch, H, p, p).")
        if len(shape) == 2:
            matrix = matrix.unsqueeze(0)
            heads = 1 if heads is None else heads
        if heads != matrix.shape[-3]:
            raise InputError(
                f"the QK matrix has shape {shape} and heads is {heads}: with heads={matrix.shape[-3]} it is one "
                f"attention of {matrix.shape[-3]} heads; a batch of attentions with one head each, as in a Pyro plate, "
                "is passed as matrix.unsqueeze(-3) with heads=1."
            )
        identity = torch.eye(shape[-1], dtype=matrix.dtype, device=matrix.device).expand(matrix.shape)
        return cls(matrix, identity, scale=1.0, mask=mask, start=start, memory_radius=memory_radius)

    @classmethod
    def contractive(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        output: Tensor | None = None,
        *,
        contraction: float | Tensor,
        memory_radius: float | Tensor,
        scale: float | Tensor | None = None,
        mask: Mask = "strict",
        start: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> CausalAttention:
        r"""Build an attention whose Jacobian blocks have norms of at most kappa < 1 for every past, by construction.

        .. math:: |M_i| \le \kappa, \qquad \sigma_{\min}(J_i) \ge 1 - \kappa, \qquad
            (1 - \kappa)^p \le \det J_i \le (1 + \kappa)^p .

        The factors give the direction alone: :meth:`scaled_to` scales them to the contraction.

        Args:
            query: as in the class.
            key: as in the class.
            value: as in the class.
            output: as in the class.
            contraction: kappa in (0, 1), a number or ``(*batch)``; differentiable, so that it can have a prior.
            memory_radius: rho > 0, a number or ``(*batch)``.
            scale: as in the class.
            mask: as in the class.
            start: as in the class.
            validate_args: as in the class.

        Returns:
            The attention, with ``contraction`` equal to kappa.

        Raises:
            InputError: as the class, a kappa outside (0, 1), or factors that are zero.

        Example:
            >>> query, key = torch.randn(2, 4, 3).double(), torch.randn(2, 4, 3).double()
            >>> attention = CausalAttention.contractive(query, key, contraction=0.9, memory_radius=1.0)
            >>> u = 1e3 * torch.randn(50, 3).double()
            >>> bool(torch.linalg.matrix_norm(attention.mean_jacobian(u), 2).max() <= 0.9)
            True
        """
        free = cls(
            query,
            key,
            value,
            output,
            scale=scale,
            mask=mask,
            start=start,
            memory_radius=memory_radius,
            validate_args=validate_args,
        )
        return free.scaled_to(contraction)

    def scaled_to(self, contraction: float | Tensor, *, shrink: bool = False) -> CausalAttention:
        r"""Scale the factors to a given contraction, differentiably.

        The strict mask scales W_Q, the inclusive one W_O: kappa is proportional to them. With ``shrink`` the factor is

        .. math:: \frac{\kappa}{\sqrt{\kappa^2 + b^2}}, \qquad b \text{ the contraction of the factors given},

        which leaves weak attentions as they are and maps all factors one-to-one onto those with a contraction below
        kappa: smooth also at zero, where the direction of the factors is undefined.

        Args:
            contraction: kappa in (0, 1), a number or a tensor that broadcasts to ``(*batch)``.
            shrink: whether kappa is a limit instead of the value.

        Returns:
            The attention with these factors.

        Raises:
            InputError: no memory radius, a kappa outside (0, 1), or, without ``shrink``, factors that are zero.

        Example:
            >>> attention = CausalAttention.from_qk_matrix(torch.tensor([[3.0]]), memory_radius=1.0)
            >>> attention.scaled_to(0.5).contraction, attention.scaled_to(0.5, shrink=True).contraction
            (tensor(0.5000), tensor(0.4932))
        """
        if self.memory_radius is None:
            raise InputError("an attention without memory_radius has no contraction for every past; give it a radius.")
        kappa = torch.as_tensor(contraction, dtype=self.query.dtype, device=self.query.device)
        checked = not isinstance(contraction, Tensor) or Distribution._validate_args
        if checked and not bool(((kappa > 0) & (kappa < 1)).all()):
            shown = float(kappa) if kappa.dim() == 0 else f"from {float(kappa.min())} to {float(kappa.max())}"
            raise InputError(f"contraction is {shown}; it must lie strictly between 0 and 1.")
        found = self.contraction
        if not shrink and Distribution._validate_args and bool((found == 0).any()):  # else NaN, as 0 / 0 is
            raise InputError("the factors are zero, and no multiple of them has the contraction asked for.")
        factor = kappa * (kappa.square() + found.square()).rsqrt() if shrink else kappa / found
        name = "query" if self.mask == "strict" else "output"
        parts = self._parameters()
        parts[name] = factor[..., None, None, None] * parts[name]
        return CausalAttention(**parts, mask=self.mask, validate_args=False)

    @in_own_precision
    def mean_and_factors(self, u: Tensor) -> MeanAndFactors:
        """Mean and the factored blocks in one pass over the sequence.

        Args:
            u: tokens, ``(*batch, T, p)``.

        Returns:
            :class:`MeanAndFactors`. Time O(H T^2 r dv), memory O(H T r dv) forward and backward: weights exist for one
            block of rows at a time, except in derivatives beyond the first.

        Raises:
            InputError: if the axes, the dtype or the device of u do not fit.
        """
        query, key, value = self._project(u)
        batch = query.shape[:-2]
        q, k, v = (part.reshape(-1, *part.shape[-3:]) for part in (query, key, value))  # (B, H, T, r or dv)
        # The past of a token is what is before it, under both masks: its own share is added in closed form.
        limit = torch.arange(u.shape[-2], device=u.device)
        first = torch.zeros_like(limit)
        sizes = norm_bound(self.output.detach()) * norm_bound(self.scaled_query.detach())
        gain = sizes.reshape(-1, self.heads).amax(0, keepdim=True) if sizes.numel() else None  # (1, H)
        found = origin_moments(q.unsqueeze(-2), k, v, first, limit, gain=gain)
        past = OriginMoments(*(part.squeeze(3).view(*batch, *part.shape[2:3], *part.shape[4:]) for part in found))
        average, cov, own = (past.origin + past.offset)[..., : v.shape[-1]], past.covariance, None
        if self.mask == "inclusive":
            average, cov, weight, away = add_own_token(past, query, key, value)
            pull = scaled_product(query, self.key)  # c W_K^T q_i, (*batch, H, T, p)
            own = weight.unsqueeze(-1) * self.value.unsqueeze(-3) + away.unsqueeze(-1) * pull.unsqueeze(-2)
        entry = self.remember_jacobian(u) if self.mask == "inclusive" else None
        factors = blocks.JacobianFactors(cov, self.scaled_query, self.output, own, entry)
        return MeanAndFactors(self._assemble_mean(average), factors)

    @in_own_precision
    def weights(self, u: Tensor) -> Tensor:
        """Dense attention weights alpha, ``(*batch, H, T, T)``; rows sum to one, except row 1 of a strict mask."""
        query, key, _ = self._project(u)
        if self.mask == "inclusive":
            return causal_weights(query, key)
        # A token sees what the token before it sees under the inclusive mask; the first sees nothing.
        return torch.nn.functional.pad(causal_weights(query[..., 1:, :], key[..., :-1, :]), (0, 1, 1, 0))

    @in_own_precision
    def mean(self, u: Tensor) -> Tensor:
        """Attention mean mu, ``(*batch, T, p)``; u_i enters mu_i through its own query.

        Args:
            u: tokens, ``(*batch, T, p)``.

        Returns:
            ``(*batch, T, p)``, differentiable any number of times. Time O(H T^2 (r + dv)), memory linear in T, with the
            first derivative too.
        """
        parts = self._project(u)
        q, k, v = (part.reshape(-1, *part.shape[-3:]) for part in parts)  # (B, H, T, r or dv)
        if self.mask == "inclusive":
            average = causal_mean(q, k, v)
        else:  # as in weights()
            average = torch.nn.functional.pad(causal_mean(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1]), (0, 0, 1, 0))
        return self._assemble_mean(average.view(parts[2].shape))

    def residual(self, u: Tensor) -> Tensor:
        """The residual map e = u - mu(u), ``(*batch, T, p)``."""
        return u - self.mean(u)

    @in_own_precision
    def jacobian(self, u: Tensor) -> Tensor:
        r"""Diagonal blocks J_i = de_i/du_i.

        .. math::
            \text{strict: } J_i = I - \sum_h W_O \mathrm{Cov}_i(v, k)\, c W_Q, \qquad
            \text{inclusive: } J_i = I - \sum_h W_O [\mathrm{Cov}_i(v, k)\, c W_Q
            + \alpha_{ii} (W_V + (v_i - \bar v_i)(c W_K^T q_i)^T)]\, \varphi'(u_i) ,

        with phi' the identity where there is no memory radius.

        Args:
            u: tokens, ``(*batch, T, p)``.

        Returns:
            ``(*batch, T, p, p)``. The blocks above the diagonal of de/du are zero, those below do not enter the
            determinant.
        """
        return torch.eye(self.dim, dtype=self.query.dtype, device=self.query.device) - self.mean_jacobian(u)

    @in_own_precision
    def mean_jacobian(self, u: Tensor) -> Tensor:
        """Diagonal blocks M_i = dmu_i/du_i = I - J_i.

        Args:
            u: tokens, ``(*batch, T, p)``.

        Returns:
            ``(*batch, T, p, p)``.
        """
        return blocks.mean_jacobian(self.mean_and_factors(u).factors)

    @in_own_precision
    def core(self, u: Tensor) -> Tensor:
        """The smallest matrix K_i with det(I - K_i) = det J_i and the non-zero eigenvalues of M_i.

        Args:
            u: tokens, ``(*batch, T, p)``.

        Returns:
            ``(*batch, T, m, m)``; see :func:`probattn.blocks.sylvester_core` for m.
        """
        return blocks.sylvester_core(self.mean_and_factors(u).factors)

    @in_own_precision
    def logabsdet(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Sign and ``log|det J_i|`` by the cheapest exact route.

        Square matrices of size min(p, H r, H dv), or min(p, H dv) under the inclusive mask; see
        :func:`probattn.blocks.sylvester_core`.

        Args:
            u: tokens, ``(*batch, T, p)``.

        Returns:
            sign and ``log|det J_i|``, ``(*batch, T)`` each.
        """
        return blocks.logabsdet_one_minus(self.core(u))

    @in_own_precision
    def residual_and_logabsdet(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Residual e, ``(*batch, T, p)``, and ``log|det J_i|``, ``(*batch, T)``, in one pass, for the density."""
        evaluation = self.mean_and_factors(u)
        return u - evaluation.mean, blocks.logabsdet_one_minus(blocks.sylvester_core(evaluation.factors))[1]

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries times c and keys, ``(*batch, H, T, r)``, and values, ``(*batch, H, T, dv)``, of one batch shape."""
        self._require_tokens(u)
        tokens = self.remember(u).unsqueeze(-3)  # (*batch, 1, T, p)
        asking = tokens if self.mask == "inclusive" else u.unsqueeze(-3)
        parts = asking @ self.scaled_query.mT, tokens @ self.key.mT, tokens @ self.value.mT
        batch = torch.broadcast_shapes(*(part.shape[:-2] for part in parts))  # (*batch, H)
        query, key, value = (part.expand(*batch, *part.shape[-2:]) for part in parts)
        return query, key, value

    def _assemble_mean(self, average: Tensor) -> Tensor:
        mean = (average @ self.output.mT).sum(-3)  # (*batch, T, p)
        if self.mask == "inclusive":
            return mean
        first = torch.arange(average.shape[-2], device=average.device) == 0
        return torch.where(first.unsqueeze(-1), self.start.unsqueeze(-2), mean)

    def _require_tokens(self, u: Tensor) -> None:
        require_tensor("u", u)
        if u.dim() < 2 or u.shape[-1] != self.dim or u.shape[-2] < 1:
            raise InputError(
                f"u has shape {tuple(u.shape)}; it must be (*batch, T, p) with p = {self.dim} features in the last "
                "axis and at least one token in the one before."
            )
        if (u.dtype, u.device) != (self.query.dtype, self.query.device):
            raise InputError(
                f"u is {u.dtype} on {u.device} but the attention is {self.query.dtype} on {self.query.device}; "
                "convert one of them with .to(...)."
            )
