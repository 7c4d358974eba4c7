"""Claim: training with the barrier keeps the attention away from the boundary. It was not found to.

The barrier measures volume: it is low where ``|det J|`` is large, and a large determinant can hide a small singular
value. The distance to the boundary is that singular value, so the two can move in opposite directions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.barrier import log_barrier, stability_margin
from probattn.inference.claims.claim import Claim, Subject, Verdict
from probattn.plotting.style import COLOURS, finish, panel

__all__ = ["barrier_training_claim"]

_WINDOWS = 64
_TURNS = {"down": 0.01, "up": 100.0}  # factors on the scores, for the controls


def barrier_training_claim(
    subject: Subject, *, margin: Callable[[CausalAttention, Tensor], Tensor] = stability_margin
) -> Claim:
    r"""Compare the smallest distance to the boundary on held-out text before and after the fit.

    .. math::
        \min_i \sigma_{min}(J_i), \qquad \sigma_{min}(J) = \min \{ \|E\| : J + E \text{ singular} \}

    The claim holds if that distance is no smaller after the fit than at its start. Two controls decide whether the
    measurement can tell: with the scores of the fitted attention turned down to a hundredth the distance must be at
    least that of the start, and with the scores a hundred times larger it must be smaller.

    Args:
        subject: the fitted model; the start of its fit are the model's initial values for its seed.
        margin: the distance under test, (attention, u) -> ``(*batch, T)``.
    """
    values = subject.model.initial_values(subject.seed)
    start = {name: value.to(torch.float64) for name, value in values.items()}
    attention, u = subject.attention, subject.tokens(_WINDOWS)
    with torch.no_grad():
        before = margin(subject.model.stage(start), subject.model.embed(start, subject.inputs[:_WINDOWS]))
        after, penalty = margin(attention, u), log_barrier(attention, u)
        turned = {name: float(margin(_scaled(attention, factor), u).min()) for name, factor in _TURNS.items()}
        spectral = stability_margin(attention, u, "spectral")
    measured = {
        "margin_lost": float(before.min() - after.min()),
        "smallest_margin_at_start": float(before.min()),
        "smallest_margin_after": float(after.min()),
        "median_margin_at_start": float(before.median()),
        "median_margin_after": float(after.median()),
        "share_across_the_boundary": float((spectral < 0).double().mean()),
        "mean_on_text": float(penalty.mean()),
        "smallest_on_text": float(penalty.min()),
        "largest_on_text": float(penalty.max()),
        "share_below_zero_on_text": float((penalty < -1e-12).double().mean()),
        "control_margin_scores_turned_down": turned["down"],
        "control_margin_scores_turned_up": turned["up"],
    }
    bound = {"margin_lost": 0.0}
    controlled = turned["up"] < measured["smallest_margin_at_start"] <= turned["down"]
    verdict: Verdict = "supported" if measured["margin_lost"] <= 0 else "not_supported"
    kind = subject.model.config.kind
    term = "b_i" if kind == "logdet" else f"the {kind.replace('_', '-')} penalty"
    return Claim(
        "barrier-training",
        f"Training with {term} in the objective keeps the attention away from the boundary: on held-out text the "
        "smallest distance to a singular block is no smaller after the fit than at its start.",
        "empirical",
        verdict if controlled else "not_run",
        measured,
        bound,
        None if controlled else "a control failed: the distance does not follow the strength of the attention",
        formula="min_i σ_min(J_i) after the fit  ≥  min_i σ_min(J_i) at its start,   "
        "σ_min(J) = min { ‖E‖ : J + E singular }",
        control="The scores of the fitted attention turned down to a hundredth, and up a hundredfold: the smallest "
        f"distance is {turned['down']:.3g} and {turned['up']:.2g}.",
        finding=f"The smallest distance goes from {measured['smallest_margin_at_start']:.2f} to "
        f"{measured['smallest_margin_after']:.2f}, the median from {measured['median_margin_at_start']:.2f} to "
        f"{measured['median_margin_after']:.2f}. After the fit b_i is negative at "
        f"{measured['share_below_zero_on_text']:.0%} of the held-out positions, {measured['mean_on_text']:.2f} on "
        "average: there it rewards expansion instead of holding the attention back. "
        f"{measured['share_across_the_boundary']:.1%} of the positions have a negative spectral margin.",
        figures={"distances": _figure(before, after)},
    )


def _scaled(attention: CausalAttention, factor: float) -> CausalAttention:
    """Return the attention with its scores multiplied by a factor."""
    return CausalAttention(
        factor * attention.query,
        attention.key,
        attention.value,
        attention.output,
        scale=attention.scale,
        mask=attention.mask,
        start=attention.start,
    )


def _figure(before: Tensor, after: Tensor) -> Figure:
    figure, axis = panel(None, (6.4, 4.0))
    for label, distances, colour in (("at the start", before, COLOURS[0]), ("after the fit", after, COLOURS[1])):
        axis.ecdf(distances.flatten().numpy(), label=label, color=colour)
    finish(axis, "distance to the boundary, σ_min(J_i)", "share of held-out positions", legend=True)
    return figure
