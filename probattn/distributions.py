"""The attention density as a native Pyro distribution over sequences."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from probattn.errors import InputError
from probattn.interface import Attention
from probattn.solve.selection import Selection
from probattn.transforms import AttentionTransform

__all__ = ["LatentAttention", "ResidualNoise", "expanded_shape", "noise_distribution", "unwatched_folds"]


def noise_distribution(
    noise_scale: float | Tensor | None,
    length: int,
    dim: int,
    *,
    like: Tensor,
    scale_tril: Tensor | None = None,
    validate_args: bool | None = None,
) -> dist.TorchDistribution:
    """The law N(0, S) of the noise of T tokens, an event of shape (T, p).

    Args:
        noise_scale: standard deviation: a number, a 0-d tensor, or ``(*batch, 1)`` or ``(*batch, p)`` per coordinate.
        length: T.
        dim: p.
        like: a tensor with the dtype and device to use.
        scale_tril: instead of noise_scale, the Cholesky factor of S, ``(*batch, p, p)``.
        validate_args: as in torch.

    Raises:
        InputError: neither or both scales, a scale that is not positive or of a wrong shape, or a length below 1.
    """
    if length < 1:
        raise InputError(f"length is {length}; it must be at least 1.")
    if (noise_scale is None) == (scale_tril is None):
        raise InputError("give exactly one of noise_scale and scale_tril.")
    validate = Distribution._validate_args if validate_args is None else validate_args
    if scale_tril is not None:
        if scale_tril.shape[-2:] != (dim, dim):
            raise InputError(f"scale_tril has shape {tuple(scale_tril.shape)}; its last axes must be ({dim}, {dim}).")
        if validate and not bool(constraints.lower_cholesky.check(scale_tril).all()):
            raise InputError(
                "scale_tril is not lower triangular with a positive diagonal; pass torch.linalg.cholesky(S)."
            )
        tril = scale_tril.to(like).unsqueeze(-3)  # (*batch, 1, p, p)
        rows = dist.MultivariateNormal(like.new_zeros(dim), scale_tril=tril, validate_args=validate_args)
        return rows.expand((*tril.shape[:-3], length)).to_event(1)  # type: ignore[no-any-return]
    scale = torch.as_tensor(noise_scale, dtype=like.dtype, device=like.device)
    if scale.dim() == 0:
        scale = scale.unsqueeze(-1)
    if scale.shape[-1] not in (1, dim):
        raise InputError(
            f"noise_scale has {scale.shape[-1]} in its last axis, the coordinates, where 1 or {dim} is expected; "
            "for a batch of scalars append an axis of size 1."
        )
    if validate and not bool(((scale > 0) & torch.isfinite(scale)).all()):
        ends = f"{float(scale.min())} to {float(scale.max())}"
        raise InputError(f"noise_scale must be positive and finite; its entries go from {ends}.")
    scale = scale.unsqueeze(-2)  # (*batch, 1, 1 or p)
    normal = dist.Normal(torch.zeros_like(scale), scale, validate_args=validate_args)
    return normal.expand((*scale.shape[:-2], length, dim)).to_event(2)  # type: ignore[no-any-return]


def expanded_shape(batch_shape: torch.Size, asked: Any) -> torch.Size:
    """The batch shape that is asked for, where the present one expands to it.

    Args:
        batch_shape: the present one.
        asked: a size, tuple or list.

    Raises:
        InputError: an axis would shrink or be dropped.
    """
    shape = torch.Size(asked)
    try:
        possible = torch.broadcast_shapes(shape, batch_shape) == shape
    except RuntimeError:
        possible = False
    if not possible:
        raise InputError(f"batch shape {tuple(batch_shape)} does not expand to {tuple(shape)}.")
    return shape


class LatentAttention(dist.TransformedDistribution):  # type: ignore[misc]  # Pyro's classes are not typed
    r"""Sequences u with u_i = mu_i(u_<i, u_i) + eps_i, eps_i ~ N(0, S).

    .. math:: \log p(u) = \sum_i \log N(u_i - \mu_i; 0, S) + \sum_i \log|\det J_i|

    A Pyro ``TransformedDistribution`` with event shape (T, p). In the certified regime this is a normalised density;
    where the residual map folds it integrates to the mean number of solutions instead, so see :func:`probattn.regime`
    before reading it as a probability.

    Args:
        attention: the attention; its batch shape broadcasts with that of the noise.
        noise_scale: standard deviation: a number, a 0-d tensor, ``(*batch, 1)``, or ``(*batch, p)`` per coordinate;
            None with scale_tril.
        length: T.
        scale_tril: the Cholesky factor of S, ``(*batch, p, p)``, instead of noise_scale.
        selection: what sampling does with several solutions: "unique" raises; "uniform", "smallest_step" and
            "nearest_mean" choose one and warn.
        validate_args: as in torch.

    Raises:
        InputError: a noise scale that is not positive or of a wrong shape, a length below 1.
        SeveralSolutionsError, NoSolutionError: while sampling, see :func:`probattn.solve.sequence.solve_sequence`.

    Cost: ``log_prob`` one evaluation of the attention, O(H T^2 r dv), and T reduced determinants, in memory linear in T
    with its gradient too; ``rsample`` solves for
    many tokens at once where each has one solution, else for one after the other, with exact pathwise gradients by the
    implicit-function theorem, sequential in T. Source: derived here (theory, section 2).

    Example:
        >>> from probattn import CausalAttention
        >>> attention = CausalAttention.from_qk_matrix(torch.tensor([[0.5]]))
        >>> process = LatentAttention(attention, noise_scale=1.0, length=3)
        >>> process.event_shape, process.log_prob(torch.tensor([[-1.0], [1.0], [0.0]]))
        (torch.Size([3, 1]), tensor(-5.9500))
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  # torch's own convention
    support = constraints.independent(constraints.real, 2)

    def __init__(
        self,
        attention: Attention,
        noise_scale: float | Tensor | None = None,
        length: int | None = None,
        *,
        scale_tril: Tensor | None = None,
        selection: Selection = "unique",
        validate_args: bool | None = None,
    ) -> None:
        if length is None:
            raise InputError("length is missing; pass the number of tokens T.")
        base = noise_distribution(
            noise_scale,
            length,
            attention.dim,
            like=attention.like,
            scale_tril=scale_tril,
            validate_args=validate_args,
        )
        batch_shape = torch.broadcast_shapes(attention.batch_shape, base.batch_shape)
        transform = AttentionTransform(attention, selection=selection)
        super().__init__(base.expand(batch_shape), [transform], validate_args=validate_args)

    @property
    def transform(self) -> AttentionTransform:
        """The map from noise to tokens."""
        (transform,) = self.transforms
        return transform  # type: ignore[no-any-return]

    @property
    def attention(self) -> Attention:
        """The attention."""
        return self.transform.attention

    @property
    def length(self) -> int:
        """T."""
        return int(self.event_shape[0])

    def __repr__(self) -> str:
        return f"LatentAttention({self.attention!r}, length={self.length}, batch_shape={tuple(self.batch_shape)})"

    def expand(self, batch_shape: Any, _instance: Any = None) -> LatentAttention:
        """The same law with its batch axes expanded; the parameters stay as they are and broadcast."""
        shape = expanded_shape(self.batch_shape, batch_shape)
        new = self._get_checked_instance(LatentAttention, _instance)
        return super().expand(shape, _instance=new)  # type: ignore[no-any-return]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p(u), ``(*batch,)``; with noise and log-determinant from one pass."""
        if self._validate_args:
            self._validate_sample(value)
        _watch(self.attention, value)
        noise, ladj = self.transform.inverse_and_ladj(value)
        log_noise: Tensor = self.base_dist.log_prob(noise)
        return log_noise - ladj

    def entropy(self) -> Tensor:
        r"""Not offered: it is that of the noise plus :math:`E[\sum_i b_i]`, which has no closed form.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("no closed form: estimate it as minus the mean of log_prob over draws.")


class ResidualNoise(LatentAttention):
    """The likelihood of somebody who fits the residuals and forgets the change of variables.

    Draws are those of :class:`LatentAttention`; ``log_prob`` is sum_i log N(e_i; 0, S) alone, which is not a density of
    u. It is here as the negative control of everything that is said about the Jacobian.
    """

    def expand(self, batch_shape: Any, _instance: Any = None) -> ResidualNoise:
        """As :meth:`LatentAttention.expand`."""
        new = self._get_checked_instance(ResidualNoise, _instance)
        return super().expand(batch_shape, _instance=new)

    def log_prob(self, value: Tensor) -> Tensor:
        """The Gaussian terms, ``(*batch,)``."""
        if self._validate_args:
            self._validate_sample(value)
        log_noise: Tensor = self.base_dist.log_prob(self.transform.inv(value))
        return log_noise


_LOG = logging.getLogger(__name__)
_WATCHED: ContextVar[bool] = ContextVar("watched", default=True)
_FOLDS = {"evaluations": 0, "warned": 0}


@contextmanager
def unwatched_folds() -> Iterator[None]:
    """Evaluate densities without the warning of folds: for who looks for them, or reports them by other means."""
    token = _WATCHED.set(False)
    try:
        yield
    finally:
        _WATCHED.reset(token)


def _watch(attention: Attention, u: Tensor) -> None:
    """Warn once where a density is evaluated beyond a fold.

    Looks at the 1st, 2nd, 4th, 8th, ... evaluation and at every 256th, which costs less than a hundredth and finds a
    trace of chains that lives there, also late in a long session.
    """
    if _FOLDS["warned"] or not _WATCHED.get() or torch._C._get_tracing_state() or torch.compiler.is_compiling():
        return
    _FOLDS["evaluations"] += 1
    if _FOLDS["evaluations"].bit_count() != 1 and _FOLDS["evaluations"] % 256:
        return
    with torch.no_grad(), suppress(RuntimeError):  # inside torch.vmap nothing can be asked
        folded = bool((attention.detach().logabsdet(u.detach())[0] < 0).any())
        if folded:
            _FOLDS["warned"] = 1
            _LOG.warning(
                "a log-density was evaluated where det J < 0: beyond a fold it is no density of the tokens, and a "
                "chain may stay there, in a mode of its own. Start samplers and guides with "
                "probattn.models.init_to_feasible(model, data), and look at folded_share of the draws. (Said once.)"
            )
