"""Streams behind a layer, drawn token by token after given ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from probattn.errors import NoSolutionError
from probattn.models.layer import LayerModel
from probattn.solve.newton import newton, polish

__all__ = ["continue_streams"]


@torch.no_grad()
def continue_streams(model: LayerModel, values: Mapping[str, Tensor], first: Tensor, noise: Tensor) -> Tensor:
    r"""Solve u_i = mu_i(u) + e_i for the tokens behind the given ones, by Newton's method from e_i + mu_i(e_i).

    In hundreds of dimensions other solutions are not looked for; where det J > 0 near the data none is expected.

    Args:
        model: the model; its number of given tokens counts.
        values: values of its sites without batch axes.
        first: sequences whose first tokens are given, ``(N, T, p)``.
        noise: noise e of all tokens, ``(N, T, p)``; that of the given ones is not read.

    Returns:
        ``(N, T, p)``. Time per token a few dense p x p blocks and systems.

    Raises:
        NoSolutionError: Newton's method did not reach its tolerance.
    """
    layer = model.attention_of(values)
    u = first[:, : model.given]
    context = layer.context(u)
    for place in range(model.given, model.length):
        e = noise[:, place]
        ends = newton(context, e, (e + context.mean(e)).unsqueeze(0))  # type: ignore[arg-type]
        if not bool(ends.solved.all()):
            raise NoSolutionError(
                f"position {place}: no solution of u - mu(u) = e was found; the smallest residual is "
                f"{float(ends.distance.max()):.3g}."
            )
        token = polish(context, e, ends.u[0])  # type: ignore[arg-type]
        context = context.extend(token)
        u = torch.cat([u, token.unsqueeze(1)], 1)
    return u
