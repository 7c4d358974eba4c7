r"""Prior of a change of low rank in the queries of some heads, in units of the logits that it changes.

.. math::
    A_{\rho j} = \frac{\tilde A_{\rho j}}{\sqrt p\, \xi_j}, \qquad
    B_{m \rho} = \frac{s}{\sqrt R}\, \frac{\tilde B_{m \rho}}{c\, \kappa_h}, \qquad
    \tilde A_{\rho j}, \tilde B_{m \rho} \sim N(0, 1)

with the root mean square :math:`\xi_j` of each feature of the normalised tokens, and that of the keys' distance from
the mean key of their sequence, :math:`\kappa_h^2 = \operatorname{mean}_t \lVert k_t - \bar k \rVert^2`. Then
:math:`(A x_i)_\rho` has variance 1 over prior and tokens, and so has :math:`c\, \tilde B_\rho^\top R_i^\top R_t
(k_t - \bar k) / (c\, \kappa_h)`. The change of a logit, less what changes alike for all tokens seen, is the sum of R
products of the two, times s over the root of R: its standard deviation is s, whatever the layer, the rank and the
number of features. A norm of the queries is followed to first order; as it keeps their length, a large s is not
reached there. Derived here.

The density of the product BA alone under this prior falls with its singular values: the least of
:math:`\tfrac12 (\lVert \tilde A \rVert^2 + \lVert \tilde B \rVert^2)` over all ways to write it is its nuclear norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from probattn.errors import InputError, require_at_least, require_positive
from probattn.hf.layers import AttentionLayer
from probattn.hf.layers.sublayer import project
from probattn.hf.layers.update import QueryUpdate, require_heads

__all__ = ["UpdatePrior", "update_prior"]


class UpdatePrior(NamedTuple):
    """Heads, rank and units of a change of low rank; made by :func:`update_prior`.

    Attributes:
        heads: numbers of n heads, increasing.
        rank: R.
        spread: s, standard deviation of the change of a logit.
        size: r, number of features of a query.
        features: xi times the root of p, ``(p,)``.
        keys: c kappa of each of the heads, ``(n,)``.
    """

    heads: tuple[int, ...]
    rank: int
    spread: float
    size: int
    features: Tensor
    keys: Tensor

    @property
    def parameters(self) -> int:
        """Number of parameters, n R (p + r)."""
        return len(self.heads) * self.rank * (len(self.features) + self.size)

    def priors(self) -> dict[str, dist.TorchDistribution]:
        """Prior of the sites ``update_in``, ``(n, R, p)``, and ``update_out``, ``(n, r, R)``."""
        heads, one = len(self.heads), self.features.new_ones(())
        shapes = {
            "update_in": (heads, self.rank, len(self.features)),
            "update_out": (heads, self.size, self.rank),
        }
        normal: Any = dist.Normal(0 * one, one)
        return {name: normal.expand(shape).to_event(3) for name, shape in shapes.items()}

    def update_of(self, values: Mapping[str, Tensor]) -> QueryUpdate:
        """The change in the units of the layer, from values of the sites, ``(*batch, *event)`` each."""
        down, up = values["update_in"] / self.features, values["update_out"]
        up = up * (self.spread / math.sqrt(self.rank) / self.keys)[:, None, None]
        batch = torch.broadcast_shapes(down.shape[:-3], up.shape[:-3])
        return QueryUpdate(self.heads, down.expand(*batch, *down.shape[-3:]), up.expand(*batch, *up.shape[-3:]))

    def values_of(self, product: Tensor) -> dict[str, Tensor]:
        """Values of the sites for a change of the query maps, cut to the rank, with both factors of one size.

        Args:
            product: B A, ``(n, r, p)``.
        """
        scale = math.sqrt(self.rank) * self.keys / self.spread
        left, values, right = torch.linalg.svd(scale[:, None, None] * product * self.features, full_matrices=False)
        root = values[:, : self.rank].sqrt()
        found = (root.unsqueeze(-1) * right[:, : self.rank], left[:, :, : self.rank] * root.unsqueeze(-2))
        missing = self.rank - root.shape[-1]
        down = torch.nn.functional.pad(found[0], (0, 0, 0, missing))
        return {"update_in": down, "update_out": torch.nn.functional.pad(found[1], (0, missing))}


@torch.no_grad()
def update_prior(
    layer: AttentionLayer,
    u: Tensor,
    *,
    rank: int,
    heads: Sequence[int] | None = None,
    spread: float = 1.0,
    given: int = 0,
) -> UpdatePrior:
    """Measure the units on streams.

    Args:
        layer: layer whose queries change.
        u: residual streams in front of it, ``(N, T, p)``.
        rank: R, at most the number of features of a query.
        heads: numbers of the heads, increasing; None: all.
        spread: standard deviation a priori of the change of a logit, less what all tokens seen have in common.
        given: number of first tokens to leave out, whose keys are far from all others.

    Raises:
        InputError: heads that the layer has not, a rank that it cannot have, a spread that is not positive, tokens or
            keys that never change.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from probattn.hf import attention_layer
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> layer = attention_layer(LlamaForCausalLM(config), 0)
        >>> prior = update_prior(layer, torch.randn(3, 6, 8), rank=1, heads=[1])
        >>> prior.parameters, {name: tuple(value.event_shape) for name, value in prior.priors().items()}
        (12, {'update_in': (1, 1, 8), 'update_out': (1, 4, 1)})
    """
    sublayer = layer.sublayer._replace(scaling=None)
    size = sublayer.query.weight.shape[1]
    chosen = require_heads("update_heads", range(sublayer.heads) if heads is None else heads, sublayer.heads)
    require_at_least("update_rank", rank)
    if rank > size:
        raise InputError(f"update_rank is {rank}; a query has {size} features, and its change no higher rank.")
    require_positive("update_spread", spread)
    places = torch.arange(u.shape[1], device=u.device)
    tokens = project(sublayer, u, places.unsqueeze(0))
    x = (u if sublayer.norm is None else sublayer.norm(u))[:, given:]
    features = x.square().mean((0, 1)).sqrt()
    key = tokens.key[:, :, given:]  # (N, K, T - given, r)
    distance = (key - key.mean(2, keepdim=True)).square().sum(-1).mean((0, 2)).sqrt()  # (K,)
    group = sublayer.heads // sublayer.groups
    keys = sublayer.scale * distance[[head // group for head in chosen]]
    if sublayer.query_norm is not None:  # to first order the norm multiplies a change by its gain over the length
        raw = tokens.raw_query.transpose(2, 3).flatten(1, 2)[:, chosen, given:]  # (N, n, T - given, r)
        jacobian = sublayer.query_norm.jacobian(raw)
        keys = keys * jacobian.scale.square().mean((0, 2)).sqrt()
        keys = keys if jacobian.gain is None else keys * jacobian.gain.square().mean().sqrt()
    if not bool((features > 0).all()) or not bool((keys > 0).all()):
        raise InputError("a feature of the normalised tokens, or a key, never changes; give longer or more sequences.")
    return UpdatePrior(chosen, rank, spread, size, math.sqrt(u.shape[-1]) * features, keys)
