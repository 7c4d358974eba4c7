r"""Comparison of models by how they predict a sequence they have not seen, with standard errors.

The unit is the sequence. Tokens of one sequence depend on each other through the past, so that leaving out single
tokens would keep most of the information about them. Source: Vehtari, Gelman and Gabry (2017, arXiv 1507.04544).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import Tensor

from probattn.errors import InputError
from probattn.inference.methods.draws import Draws
from probattn.inference.methods.importance import RELIABLE
from probattn.inference.methods.log_density import LogDensity
from probattn.models.embedding import EmbeddingModel

__all__ = ["AS_ASKED", "LEAST_DRAWS", "Compared", "compare", "leave_one_out", "ranked", "standard_error", "variants"]

Array = NDArray[Any]
AS_ASKED = "as asked"
LEAST_DRAWS = 25  # a fifth of the draws is the tail of the weights, and a tail of fewer than five has no shape
_WHAT = ("jacobian", "mask", "heads")


@dataclass(frozen=True)
class Compared:
    """One model among others.

    Attributes:
        name: name of the model.
        elpd: sum over the sequences of log p(u_n | the others), the density with its Jacobian.
        elpd_se: standard error of ``elpd``, over the sequences.
        difference: difference to the best model, at most 0.
        difference_se: standard error of the difference, sequence by sequence.
        unreliable: number of sequences too influential to be left out by weights (k-hat > 0.7).
        folded: share of the draws at which J has a negative determinant somewhere in the data; there is no density
            there, and the comparison says nothing.
    """

    name: str
    elpd: float
    elpd_se: float
    difference: float
    difference_se: float
    unreliable: int
    folded: float

    def __str__(self) -> str:
        words = f"{self.name}: elpd {self.elpd:.1f} +- {self.elpd_se:.1f}"
        if self.difference < 0:
            words += f", {self.difference:.1f} +- {self.difference_se:.1f} behind the best"
        if self.unreliable:
            words += f"; {self.unreliable} sequences with k-hat > {RELIABLE}"
        if self.folded:
            words += f"; {100 * self.folded:.0f} % of the draws fold at the data, where there is no density"
        return words


def leave_one_out(fitted: Array, predictive: Array | None = None) -> tuple[Array, Array]:
    r"""Log-density of each sequence given the others, by Pareto-smoothed importance sampling.

    .. math:: \log \frac{\sum_s w_s\, p(u_n | \theta_s)}{\sum_s w_s}, \qquad w_s \propto 1 / \ell(u_n | \theta_s)

    Args:
        fitted: log l, the likelihood that the posterior was made with, ``(chain, draw, N)``.
        predictive: log p, the density to judge by, ``(chain, draw, N)``; None takes log l.

    Returns:
        Expected log predictive density and k-hat of each sequence, ``(N,)`` each.

    Raises:
        InputError: fewer than two sequences, or fewer than 25 draws.

    Example:
        >>> one = np.random.default_rng(0).normal(size=(1, 100, 3))
        >>> leave_one_out(one)[0].shape
        (3,)
    """
    from arviz_stats.base import array_stats

    if fitted.shape[-1] < 2:
        raise InputError("one sequence only: leaving it out leaves nothing to predict it from; give at least two.")
    if fitted[..., 0].size < LEAST_DRAWS:
        raise InputError(f"{fitted[..., 0].size} draws; at least {LEAST_DRAWS} are needed to leave a sequence out.")
    weights, khat = array_stats.psislw(fitted, axis=[0, 1])  # (N, chain, draw), normalised
    chosen = np.moveaxis(fitted if predictive is None else predictive, -1, 0)
    return logsumexp(weights + chosen, axis=(1, 2)), khat


def compare(
    models: Mapping[str, EmbeddingModel],
    u: Tensor,
    infer: Callable[[str, LogDensity], Draws],
) -> list[Compared]:
    """Fit each model to the same sequences and compare them, best first.

    A model without its Jacobian is judged by the density with it: what a naive fit says of a sequence to come.

    Args:
        models: models by name.
        u: sequences, ``(N, T, p)``.
        infer: function from the name of a model and its log-density to draws of its posterior.

    Raises:
        InputError: fewer than two sequences.
    """
    if len(u) < 2:
        raise InputError("one sequence only: leaving it out leaves nothing to predict it from; give at least two.")
    pointwise, unreliable, folded = {}, {}, {}
    for name, model in models.items():
        target = LogDensity(model, u)
        draws = infer(name, target)
        flat = draws.z.reshape(-1, target.dim)
        shape = (*draws.z.shape[:2], len(u))
        own = target.evaluate(flat)["u"].reshape(shape).double().cpu().numpy()
        proper = LogDensity(model.altered(jacobian=True), u).evaluate(flat)["u"].reshape(shape).double().cpu().numpy()
        pointwise[name], khat = leave_one_out(own, proper)
        unreliable[name] = int((khat > RELIABLE).sum())
        folded[name] = _folded(model, target.constrain(flat), u, target.group_size)
    return ranked(pointwise, unreliable, folded)


def ranked(
    pointwise: Mapping[str, Array], unreliable: Mapping[str, int], folded: Mapping[str, float]
) -> list[Compared]:
    """Sums, differences to the best and standard errors of models whose sequences were left out, best first.

    Args:
        pointwise: log-density of each sequence given the others, ``(N,)``, by name of the model.
        unreliable: number of sequences too influential to be left out by weights.
        folded: share of the draws that fold at the data.
    """
    best = pointwise[max(pointwise, key=lambda name: pointwise[name].sum())]
    entries = [
        Compared(
            name,
            float(elpd.sum()),
            standard_error(elpd),
            float((elpd - best).sum()),
            standard_error(elpd - best),
            unreliable[name],
            folded[name],
        )
        for name, elpd in pointwise.items()
    ]
    return sorted(entries, key=lambda entry: -entry.elpd)


def variants(model: EmbeddingModel, what: tuple[str, ...]) -> dict[str, EmbeddingModel]:
    """A model beside those that differ from it in one respect, by name.

    Args:
        model: model to vary.
        what: respects: "jacobian" (without it), "mask" (the other one) and "heads" (one more, and one less).

    Raises:
        InputError: an unknown respect; the inclusive mask with W_V = W_O = I, where J_1 = 0.
    """
    unknown = [name for name in what if name not in _WHAT]
    if unknown:
        raise InputError(f"cannot compare {unknown[0]!r}; choose among {', '.join(_WHAT)}.")
    found = {AS_ASKED: model}
    if "jacobian" in what:
        found["without the Jacobian"] = model.altered(jacobian=not model.jacobian)
    if "mask" in what:
        if model.value_dim is None:
            raise InputError(
                "comparing masks needs value and output maps (--value-dim): with both the identity a token under the "
                "inclusive mask attends to nothing but itself at first, J_1 = 0, and there is no density."
            )
        other = "inclusive" if model.mask == "strict" else "strict"
        found[f"{other} mask"] = model.altered(mask=other)
    if "heads" in what:
        for heads in (model.heads - 1, model.heads + 1):
            if heads >= 1:
                found[f"{heads} head{'s' * (heads != 1)}"] = model.altered(heads=heads)
    return found


def standard_error(values: Array) -> float:
    r"""Standard error of the sum of independent numbers.

    .. math:: \sqrt{N \, \widehat{\operatorname{Var}}(x)}

    Args:
        values: numbers x, ``(N,)``.

    Example:
        >>> round(standard_error(np.array([1.0, 2.0, 3.0])), 3)
        1.732
    """
    return float(np.sqrt(len(values) * values.var(ddof=1)))


def _folded(model: EmbeddingModel, values: Mapping[str, Tensor], u: Tensor, group: int) -> float:
    """Share of the draws with det J < 0 at a token of the data."""
    seen = []
    for begin in range(0, len(next(iter(values.values()))), group):
        part = {name: value[begin : begin + group].unsqueeze(1) for name, value in values.items()}
        seen.append((model.attention_of(part).logabsdet(u)[0] < 0).flatten(1).any(-1))
    return float(torch.cat(seen).double().mean())
