"""Does a description of a layer compute what the model's own code computes? Asked once, when a layer is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from probattn.errors import InputError
from probattn.hf.layers.families.registry import Site

__all__ = ["own_mean", "require_agreement"]

_TOKENS = 5
# Relative to the largest entry: kernels of half precision round to three digits, float32 ones to six.
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}


class _StopError(Exception):
    """Ends a forward pass behind the layer that was asked about."""


def own_mean(model: nn.Module, site: Site, u: Tensor) -> Tensor:
    """Update of the stream by the model's own code at one layer, if the stream there is u.

    Args:
        model: the whole model, whose own masks and rotations are used; dropout should be off.
        site: the layer.
        u: the stream, ``(B, T, p)``, in the model's precision.

    Returns:
        ``(B, T, p)``, differentiable in u.
    """
    found: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        if args:
            return (u, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": u}

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _StopError

    hooks: list[Any] = [
        site.block.register_forward_pre_hook(enter, with_kwargs=True),
        site.last.register_forward_hook(leave),
    ]
    body: Callable[..., Any] = getattr(model, "base_model", model)
    try:
        body(inputs_embeds=torch.zeros_like(u.detach()), use_cache=False)
    except _StopError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found[0]


def require_agreement(
    model: nn.Module, site: Site, mean: Callable[[Tensor], Tensor], dim: int, dtype: torch.dtype
) -> None:
    """Refuse a layer whose description does not give what the model's own code gives, on a random stream.

    Args:
        model: the whole model.
        site: the layer.
        mean: mu of the description, at tokens ``(1, T, p)`` in its precision.
        dim: p.
        dtype: that precision.

    Raises:
        InputError: with the size of the difference.
    """
    weight = next(site.attention.parameters())
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1, _TOKENS, dim, generator=generator).to(weight)
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            own, described = own_mean(model, site, u), mean(u.to(dtype))
    finally:
        for module in training:
            module.training = True
    error = float((own.to(dtype) - described).abs().max() / own.abs().max().clamp(min=1e-12))
    tolerance = _TOLERANCE.get(weight.dtype, 1e-3)
    if not error <= tolerance:
        raise InputError(
            f"layer {site.number} of {type(model).__name__} does not compute what its model type "
            f"{model.config.model_type!r} stands for: on a random stream its own code and the description differ by "  # type: ignore[union-attr]
            f"{error:.1e} of the largest entry. The model's code is another version, or a module was replaced."
        )
