r"""Sensitivity of a language model's next-token distribution to noise on its input embeddings.

.. math::
    s_i = \mathbb{E}_z\, \mathrm{KL}\bigl(p(\cdot \mid u_{\le i}) \,\|\, p(\cdot \mid u_{\le i} + \delta)\bigr),
    \qquad \delta = \text{level} \cdot \mathrm{rms}(u) \cdot z

with z standard normal on all embeddings up to i ("all") or on the last one alone ("last"). The noise is relative, so
larger embeddings have no advantage, and matched: every text takes the same z. As the noise becomes small, s_i becomes
:math:`\tfrac12 \sigma^2\, \mathrm{tr}(J^T F J)`, with J the Jacobian of the logits and F the Fisher information of the
distribution: no predictor can know more than this local sensitivity, the positive control.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from probattn.errors import InputError, require_at_least, require_choice, require_positive

__all__ = ["Form", "kl_divergence", "noise_sensitivity", "root_mean_square"]

Form = Literal["all", "last"]

_AGREEMENT = 1e-3  # largest difference of a copy's logits from the token's own, in units of their spread


def kl_divergence(logits: Tensor, others: Tensor) -> Tensor:
    """Compute KL(p || q) in nats, in double precision.

    Args:
        logits: logits of p, ``(*batch, V)``.
        others: logits of q, ``(*batch, V)``; the two broadcast.

    Returns:
        Divergences, at least zero, ``(*batch,)``.

    Example:
        >>> round(float(kl_divergence(torch.zeros(2), torch.tensor([0.0, 1.0]))), 4)
        0.1201
    """
    mine, theirs = logits.double().log_softmax(-1), others.double().log_softmax(-1)
    return (mine.exp() * (mine - theirs)).sum(-1).clamp(min=0)  # rounding may leave a tiny negative number


@torch.no_grad()
def root_mean_square(model: Any, ids: Tensor) -> float:
    """Root mean square of the input embeddings of some texts.

    Args:
        model: causal model of ``transformers``.
        ids: tokens, ``(N, T)``.
    """
    return float(model.get_input_embeddings()(ids).square().mean().sqrt())


@torch.no_grad()
def noise_sensitivity(
    model: Any, ids: Tensor, *, form: Form, level: float, draws: int, seed: int, scale: float
) -> Tensor:
    """Mean divergence of the next-token distribution under noise, at every token.

    With noise on the last embedding alone, every token has a copy of its own behind the text, which sees the tokens
    before it and itself; so one pass of twice the length serves all tokens.

    Args:
        model: causal model of ``transformers``, in evaluation mode.
        ids: tokens, ``(N, T)``, on the device of the model.
        form: noise on "all" embeddings of the context or on the "last" one.
        level: size of the noise in units of ``scale``.
        draws: number of draws.
        seed: random seed of the draws, which are the same for every text.
        scale: root mean square of the embeddings, the same number for all texts that are compared.

    Returns:
        Sensitivities in nats, ``(N, T)``, in double precision on the CPU.

    Raises:
        InputError: a model in which the copies are not what the tokens are.
    """
    require_choice("form", form, ("all", "last"))
    require_at_least("draws", draws)
    require_positive("level", level)
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device sees the same noise
    u = model.get_input_embeddings()(ids)
    run = _run_copies if form == "last" else _run
    plain = run(model, u, u)
    if form == "last":
        changed = u.clone()
        changed[:, 1::2] += level * scale  # a copy must see its token's past, and no other copy
        _require_copies(run(model, u, changed)[:, ::2], _run(model, u, u)[:, ::2])
    total = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    for _ in range(draws):
        z = torch.randn(u.shape[1:], generator=generator, dtype=torch.float64).to(u)
        noisy = run(model, u, u + level * scale * z)
        for k in range(len(u)):  # one text at a time: the logits of many would not fit twice in double precision
            total[k] += kl_divergence(plain[k], noisy[k])
    return (total / draws).cpu()


def _run(model: Any, _: Tensor, u: Tensor) -> Tensor:
    """Logits, ``(N, T, V)``, from embeddings."""
    logits: Tensor = model(inputs_embeds=u, use_cache=False).logits
    return logits


def _run_copies(model: Any, u: Tensor, copies: Tensor) -> Tensor:
    """Logits of copies that stand in the place of one token each, ``(N, T, V)``."""
    texts, length, _ = u.shape
    earlier = torch.ones(length, length, dtype=torch.bool, device=u.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=u.device)
    seen = torch.cat([torch.cat([earlier, itself & ~itself], 1), torch.cat([earlier & ~itself, itself], 1)])
    mask = torch.zeros(2 * length, 2 * length, dtype=u.dtype, device=u.device)
    mask = mask.masked_fill(~seen, torch.finfo(u.dtype).min).expand(texts, 1, -1, -1)
    positions = torch.arange(length, device=u.device).repeat(2).expand(texts, -1)
    both = torch.cat([u, copies], 1)
    output = model(inputs_embeds=both, attention_mask=mask, position_ids=positions, use_cache=False)
    logits: Tensor = output.logits[:, length:]
    return logits


def _require_copies(copies: Tensor, own: Tensor) -> None:
    gap, spread = float((copies - own).detach().abs().max()), float(own.detach().std())
    if not gap <= _AGREEMENT * spread:
        raise InputError(
            f"the copies of the tokens have logits that differ by {gap:.2g} from the tokens' own: this model does not "
            "follow the mask and the positions that it is given; use the form 'all'."
        )
