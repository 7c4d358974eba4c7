"""A layer's model beside variants of it, by the log-density of a sequence that was left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.hf.layers.volume import log_volume
from probattn.inference.methods.draws import Draws
from probattn.inference.methods.importance import RELIABLE
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.results.comparison import AS_ASKED, Compared, leave_one_out, ranked
from probattn.models.layer import LayerModel

__all__ = ["compare_layers", "layer_variants"]

_SCORED = 200  # draws that are scored: each costs a pass over all blocks that are looked at
_LOOKED_AT = 20  # draws at which the signs of the determinants are looked at


def layer_variants(model: LayerModel, what: Sequence[str]) -> dict[str, LayerModel]:
    """A model of a layer beside those that differ from it in one respect, by name.

    Args:
        model: model to vary.
        what: respects: "jacobian" (without the log-determinants), "temperature" (inverse temperatures fixed at 1),
            "update" (queries as trained) and "noise" (the other kinds among one scale, and one for each coordinate).

    Raises:
        InputError: an unknown respect, or one in which the model has nothing to vary.
    """
    found = {AS_ASKED: model}
    for name in what:
        if name == "jacobian":
            words = "without the Jacobian" if model.jacobian else "with the Jacobian"
            found[words] = model.altered(jacobian=not model.jacobian)
        elif name == "temperature":
            words = "temperatures as trained" if model.temperature_spread is not None else "with temperatures"
            found[words] = model.altered(temperature_spread=None if model.temperature_spread is not None else 0.25)
        elif name == "update":
            if model.update is None:
                raise InputError("comparing update needs a change of the QK products; give --update-rank.")
            found["QK products as trained"] = model.altered(update=None)
        elif name == "noise":
            for kind, words in (("scalar", "one noise scale"), ("diagonal", "a noise scale for each coordinate")):
                if kind != model.noise:
                    found[words] = model.altered(noise=kind)
        else:
            raise InputError(f"a layer has no {name} to compare; choose among jacobian, temperature, update, noise.")
    return found


def compare_layers(
    models: Mapping[str, LayerModel], u: Tensor, infer: Callable[[str, LogDensity], Draws]
) -> list[Compared]:
    """Fit each model to the same sequences and compare them, best first.

    All are judged by the density with its Jacobian, at the same positions. The likelihood of a model without it is no
    density, and its value is not compared with any: judged is what the naive fit says of a sequence to come.

    Args:
        models: models by name, with one choice of positions.
        u: streams, ``(N, T, p)``.
        infer: function from the name of a model and its log-density to draws of its posterior.

    Raises:
        InputError: fewer than two sequences, or models that look at different positions.
    """
    if len(u) < 2:
        raise InputError("one sequence only: leaving it out leaves nothing to predict it from; give at least two.")
    chosen = {None if model.rows is None else tuple(model.rows.tolist()) for model in models.values()}
    if len(chosen) > 1:
        raise InputError("the models look at different positions, and their densities differ for that alone.")
    pointwise, unreliable, folded = {}, {}, {}
    for name, model in models.items():
        target = LogDensity(model, u)
        z = infer(name, target).z
        kept = torch.linspace(0, z.shape[1] - 1, min(z.shape[1], max(1, _SCORED // len(z)))).round().long().unique()
        flat = z[:, kept].reshape(-1, target.dim)
        shape = (len(z), len(kept), len(u))
        own = target.evaluate(flat)["u"].reshape(shape).double().cpu().numpy()
        proper = None
        if not model.jacobian:
            judge = LogDensity(model.altered(jacobian=True), u)
            proper = judge.evaluate(flat)["u"].reshape(shape).double().cpu().numpy()
        pointwise[name], khat = leave_one_out(own, proper)
        unreliable[name] = int((khat > RELIABLE).sum())
        folded[name] = _folded(model, target, flat, u)
    return ranked(pointwise, unreliable, folded)


@torch.no_grad()
def _folded(model: LayerModel, target: LogDensity, z: Tensor, u: Tensor) -> float:
    """Share of the draws looked at with det J < 0 at one of the positions."""
    chosen = torch.linspace(0, len(z) - 1, min(len(z), _LOOKED_AT)).round().long().unique()
    values = {name: value.unsqueeze(1) for name, value in target.constrain(z[chosen]).items()}
    rows = torch.arange(model.given, model.length, device=u.device) if model.rows is None else model.rows
    sign = log_volume(model.scaled_layer(values), u, rows, update=model.update_of(values)).smallest_sign
    return float((sign < 0).any(-1).double().mean())
