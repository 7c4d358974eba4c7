r"""A penalty that rides on a tensor: the tensor passes unchanged, the penalty's gradient joins on the way back.

A penalty kept aside in a list would lose its gradient under reentrant checkpointing and count twice under the other
kind. Attached to an output of the layer that computes it, it is there whenever that layer's backward pass is. Its
gradient must then be told by how much the loss is scaled (mixed precision, accumulation, averaging over processes):
the *gain* d(total) / d(loss), which the loss itself records when the backward pass enters it, before any layer. Derived
here; the pass-through itself is the device of mixtures of experts.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

__all__ = ["attach", "forget_gain", "new_account", "record_gain"]

_GAINS: dict[int, tuple[Tensor, Tensor]] = {}  # d(total) / d(loss), and the tokens to divide it by
_accounts = itertools.count()


def new_account() -> int:
    """A number under which one model's gain is kept."""
    return next(_accounts)


def attach(output: Tensor, penalty: Tensor, weight: Tensor, account: int) -> Tensor:
    r"""Return ``output``; backward, the penalty receives the gradient weight times gain.

    Args:
        output: any tensor that the loss depends on.
        penalty: 0-dimensional.
        weight: lambda, 0-dimensional and of the penalty's dtype, as it is when the forward pass runs.
        account: where the gain is read from.

    Raises:
        RuntimeError: in the backward pass, if the loss was not passed through :func:`record_gain`.
    """
    result: Tensor = _Attach.apply(output, penalty, weight, account)  # type: ignore[no-untyped-call]
    return result


def record_gain(loss: Tensor, tokens: Tensor, account: int) -> Tensor:
    """Return ``loss``; backward, note by how much it is scaled, per token.

    Args:
        loss: the mean loss per token, before any scaling.
        tokens: what sums over tokens are to be divided by, 0-dimensional.
        account: where the gain is kept.
    """
    result: Tensor = _RecordGain.apply(loss, tokens, account)  # type: ignore[no-untyped-call]
    return result


def forget_gain(account: int) -> None:
    """Forget the gain of an earlier step, so that it cannot stand in for a missing one."""
    _GAINS.pop(account, None)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, penalty: Tensor, weight: Tensor, account: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.account, ctx.dtype = account, penalty.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient, weight * _read_gain(gradient, ctx.account, ctx.dtype), None, None


class _RecordGain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, tokens: Tensor, account: int) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.account = account
        return loss.clone()  # not a view: trainers scale it in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        return _write_gain(gradient, tokens, ctx.account), None, None


# Operators, not plain functions: a compiler then leaves them where the gradients that pass through them put them, the
# writing one before the reading ones.
@torch.library.custom_op("probattn::write_gain", mutates_args=())
def _write_gain(gradient: Tensor, tokens: Tensor, account: int) -> Tensor:
    _GAINS[account] = gradient.detach().clone(), tokens.clone()
    return gradient.clone()


@torch.library.custom_op("probattn::read_gain", mutates_args=())
def _read_gain(gradient: Tensor, account: int, dtype: torch.dtype) -> Tensor:
    if account not in _GAINS:
        raise RuntimeError(
            "the loss did not pass through the barrier's handle, so that its scale is unknown: let the model compute "
            "the loss (labels=...), or call backward on handle.couple(loss)."
        )
    gain, tokens = _GAINS[account]
    return (gain.to(dtype) / tokens).to(gradient.device)


@_write_gain.register_fake
def _(gradient: Tensor, tokens: Tensor, account: int) -> Tensor:
    return torch.empty_like(gradient)


@_read_gain.register_fake
def _(gradient: Tensor, account: int, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty((), dtype=dtype)
