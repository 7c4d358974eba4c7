"""Causal self-attention as a generative model whose change-of-variables Jacobian is a log-barrier."""

from probattn.attention import CausalAttention
from probattn.barrier import log_barrier, stability_margin, support_tokens
from probattn.distributions import LatentAttention
from probattn.folds.regime import regime
from probattn.process import AttentionProcess
from probattn.transforms import AttentionTransform

__version__ = "0.1.0"

__all__ = [
    "AttentionProcess",
    "AttentionTransform",
    "CausalAttention",
    "LatentAttention",
    "log_barrier",
    "regime",
    "stability_margin",
    "support_tokens",
]
