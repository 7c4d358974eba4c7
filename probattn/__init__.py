"""Causal self-attention as a generative model whose change-of-variables Jacobian is a log-barrier."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "AttentionProcess": "process",
    "AttentionTransform": "transforms",
    "CausalAttention": "attention",
    "LatentAttention": "distributions",
    "log_barrier": "barrier",
    "regime": "folds.regime",
    "stability_margin": "barrier",
    "support_tokens": "barrier",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: `probattn --help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
