"""Claim: the Pyro model's log-joint is minus cross-entropy plus lambda times the penalty, value and gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import get_args

import pyro
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor

from probattn.barrier import BarrierKind
from probattn.embedding_prior import Prior
from probattn.inference.claims.claim import Claim, Subject, judge, worst
from probattn.inference.claims.realness import may_be_real
from probattn.models.language import LanguageConfig, LanguageModel
from probattn.numerics import linalg

__all__ = ["log_joint", "objective_claim", "penalised_cross_entropy"]

BOUND = {"value_error": 1e-10, "gradient_error": 1e-10}
_WINDOWS, _CONTEXT = 3, 24

Values = Mapping[str, Tensor]
Objective = Callable[[LanguageConfig, Values, Tensor, Tensor, int], Tensor]


def log_joint(model: LanguageModel, values: Values, inputs: Tensor, targets: Tensor, total: int) -> Tensor:
    """Let Pyro compute the log-joint at given values of the sites, with the plate scaled to ``total`` windows."""
    conditioned = poutine.condition(model, data=dict(values))
    with pyro.settings.context(module_local_params=True):
        trace = poutine.trace(conditioned).get_trace(inputs, targets, total=total)
    return torch.as_tensor(trace.log_prob_sum())


def penalised_cross_entropy(
    config: LanguageConfig, values: Values, inputs: Tensor, targets: Tensor, total: int
) -> Tensor:
    r"""Compute the objective in plain torch, which shares nothing with the package but the names of the sites.

    .. math::
        \frac{N_{total}}{N} \sum \{ CE + \lambda\, [\tfrac12 |e|_S^2 + \tfrac p2 \log 2\pi\sigma^2] + \lambda\,
        \mathrm{penalty} \} - \log p(\theta)
    """
    length = inputs.shape[1]
    u = F.embedding(inputs, values["embedding"]) + values["position"][:length]
    loss = F.cross_entropy(_decoder_logits(config, values, u).flatten(0, 1), targets.flatten(), reduction="sum")

    scores = torch.einsum("hrp,nip,hrq,nsq->nhis", values["query"], u, values["key"], u) / config.stage_rank**0.5
    past = torch.ones(length, length, dtype=torch.bool).tril(-1)
    alpha = torch.where(past, scores, -torch.inf)[:, :, 1:].softmax(-1)  # (N, H, T - 1, T): the first token has no past
    average = torch.einsum("nhis,nsp->nhip", alpha, u)
    mean = torch.cat([torch.zeros_like(u[:, :1]), average.sum(1)], dim=1)
    # Two-pass covariance of the raw tokens, then J = I - sum_h Sigma_i A_h.
    centred = u[:, None, None] - average[..., None, :]  # (N, H, T - 1, T, p)
    covariance = torch.einsum("nhis,nhisp,nhisq->nhipq", alpha, centred, centred)
    # M_i = left_i @ right with the heads side by side, (N, T, p, H r) and (H r, p).
    left = torch.einsum("nhipq,hrq->niphr", covariance, values["key"]).flatten(-2)
    left = torch.cat([left.new_zeros(len(u), 1, *left.shape[2:]), left], dim=1)
    right = values["query"].flatten(0, 1) / config.stage_rank**0.5
    penalty = _penalty(config.kind, left, right).sum()

    if config.prior == "full":
        squares = (u - mean).square().sum() / config.noise_scale**2
        constant = u.numel() * math.log(2 * math.pi * config.noise_scale**2)
        penalty = penalty + 0.5 * (squares + constant)
    loss = (loss + config.weight * penalty) * total / len(inputs)
    return loss + sum(_minus_log_normal(name, value, config.prior_scale) for name, value in values.items())


def objective_claim(subject: Subject, *, objective: Objective = penalised_cross_entropy) -> Claim:
    """Compare value and gradient for every penalty, full prior and margin only, at random and at fitted parameters.

    The bound is on the gradient as one vector. The largest error of a single site is reported beside it without a
    bound: the spectral penalty needs the derivative of a tiny eigenvalue of a large matrix where the literal barrier
    has grown without limit, and any implementation loses digits there in proportion to that ratio.

    Args:
        subject: the fitted model, with its text and its fitted values.
        objective: the objective under test, (configuration, values, inputs, targets, total) -> scalar.
    """
    inputs, targets = subject.inputs[:_WINDOWS, :_CONTEXT], subject.targets[:_WINDOWS, :_CONTEXT]
    base = subject.model.config
    base = replace(base, weight=base.weight or 0.05, mask="strict")
    starts = LanguageModel(base).initial_values(subject.seed)
    fitted = {**starts, **subject.values}
    measured = dict.fromkeys(
        ("value_error", "gradient_error", "gradient_error_worst_site", "comparisons", "infinite_on_both_sides"), 0.0
    )
    for kind, prior, values in itertools.product(get_args(BarrierKind), get_args(Prior), (starts, fitted)):
        config = replace(base, kind=kind, prior=prior)
        leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
        own = -log_joint(LanguageModel(config), leaves, inputs, targets, subject.total)
        other = objective(config, leaves, inputs, targets, subject.total)
        measured["comparisons"] += 1
        mine, theirs = own.item(), other.item()
        if math.isinf(mine) and mine == theirs:
            measured["infinite_on_both_sides"] += 1  # a fold under the spectral penalty: no gradient to compare
            continue
        measured["value_error"] = worst(measured["value_error"], abs(mine - theirs) / abs(theirs))
        slopes, expected = _gradient(own, leaves), _gradient(other, leaves)
        gaps = [slope - reference for slope, reference in zip(slopes, expected, strict=True)]
        sites = [_relative(gap, reference) for gap, reference in zip(gaps, expected, strict=True)]
        whole = _relative(*(torch.cat([part.flatten() for part in parts]) for parts in (gaps, expected)))
        measured["gradient_error"] = worst(measured["gradient_error"], whole)
        measured["gradient_error_worst_site"] = worst(measured["gradient_error_worst_site"], *sites)
    # The control: a penalty that is one percent too heavy on one side of the last comparison.
    heavier = objective(replace(config, weight=1.01 * config.weight), leaves, inputs, targets, subject.total).item()
    measured["control_value_error"] = control = abs(mine - heavier) / abs(heavier)
    holds = judge(measured, BOUND) and control > BOUND["value_error"]
    return Claim(
        "objective",
        "Minus the log-joint of the Pyro model is cross-entropy + λ (Gaussian term + penalty) − log prior, in value "
        "and gradient, for every penalty, with the full prior and with the margin alone, at random and at fitted "
        "parameters.",
        "identity",
        "supported" if holds else "not_supported",
        measured,
        BOUND,
        formula="−log joint = CE(y) + λ Σ_i [ ½ |e_i|²_S + ½ log det 2πS + b_i ] − log p(θ)   (full prior),   "
        "CE(y) + λ Σ_i b_i − log p(θ)   (margin only)",
        control=f"With λ one percent too large the two objectives differ by {control:.2g} of their size.",
    )


def _relative(gap: Tensor, reference: Tensor) -> float:
    return float(gap.norm() / reference.norm().clamp(min=1e-300))


def _gradient(objective: Tensor, leaves: Values) -> tuple[Tensor, ...]:
    return torch.autograd.grad(objective, list(leaves.values()), allow_unused=False)


def _penalty(kind: BarrierKind, left: Tensor, right: Tensor) -> Tensor:
    """Compute a penalty from M = I - J = left @ right by its definition."""
    change = left @ right
    identity = torch.eye(change.shape[-1], dtype=change.dtype)
    if kind == "singular_value":
        singular: Tensor = torch.linalg.svd(identity - change)[1]
        return -singular[..., -1].clamp(max=1.0).log()
    if kind == "spectral":
        core = right @ left
        eigenvalues: Tensor = torch.linalg.eigvals(core)  # M's own, but for zeros
        size = eigenvalues.abs().amax(-1, keepdim=True)
        largest = torch.where(may_be_real(core.detach()), eigenvalues.real, -torch.inf).amax(-1)
        # M has rank r at most: where no eigenvalue is positive, the largest is the zero of its kernel, up to rounding.
        room = 1 - torch.where(largest > 1e-13 * size.squeeze(-1), largest, 0.0)
        return -room.clamp(0.0, 1.0).log()
    literal: Tensor = -linalg.det(identity - change).abs().log()
    if kind == "logdet":
        return literal
    if kind == "one_sided":
        return literal.relu()
    return torch.logaddexp(10.0 * literal, torch.zeros_like(literal)) / 10.0


def _minus_log_normal(name: str, value: Tensor, scale: float) -> Tensor:
    centre = 1.0 if ".norm" in name and name.endswith("weight") else 0.0
    return (0.5 * ((value - centre) / scale).square() + math.log(scale) + 0.5 * math.log(2 * math.pi)).sum()


def _decoder_logits(config: LanguageConfig, values: Values, u: Tensor) -> Tensor:
    """Compute logits with the pre-norm transformer layers written out."""
    prefix = "decoder.layers.layers"
    x = u
    future = torch.ones(u.shape[1], u.shape[1], dtype=torch.bool).triu(1)
    for layer in range(config.layers):
        own = {
            name.removeprefix(f"{prefix}.{layer}."): value
            for name, value in values.items()
            if name.startswith(f"{prefix}.{layer}.")
        }
        y = F.layer_norm(x, (config.dim,), own["norm1.weight"], own["norm1.bias"])
        q, k, v = F.linear(y, own["self_attn.in_proj_weight"], own["self_attn.in_proj_bias"]).chunk(3, dim=-1)
        heads = [
            part.unflatten(-1, (config.decoder_heads, -1)).transpose(1, 2) for part in (q, k, v)
        ]  # (N, heads, T, d)
        scores = heads[0] @ heads[1].mT / heads[0].shape[-1] ** 0.5
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ heads[2]
        x = x + F.linear(
            mixed.transpose(1, 2).flatten(-2), own["self_attn.out_proj.weight"], own["self_attn.out_proj.bias"]
        )
        y = F.layer_norm(x, (config.dim,), own["norm2.weight"], own["norm2.bias"])
        hidden = F.relu(F.linear(y, own["linear1.weight"], own["linear1.bias"]))
        x = x + F.linear(hidden, own["linear2.weight"], own["linear2.bias"])
    x = F.layer_norm(x, (config.dim,), values["decoder.layers.norm.weight"], values["decoder.layers.norm.bias"])
    return F.linear(x, values["decoder.readout.weight"], values["decoder.readout.bias"])
