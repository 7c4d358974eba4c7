r"""The log-barrier in the training of any ``transformers`` model, in one line.

.. math:: \mathrm{CE}(y) + \lambda \frac{1}{N} \sum_i \bar b_i

with :math:`\bar b_i` the barrier of token i, averaged over layers and heads (or that of an attention stage on the input
embeddings), and N the number of predicted tokens, by which the cross-entropy is divided too.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from probattn.barrier import BarrierKind, require_penalty
from probattn.embedding_prior import AttentionStage
from probattn.errors import InputError, NonFinitePenaltyError, require_at_least, require_choice, require_share
from probattn.hf.auxiliary_loss import attach, forget_gain, new_account, record_gain
from probattn.hf.hooks import LayerCall, attention_layers, observe, padding_of
from probattn.penalty import Penalty, attention_penalty, choose_positions

__all__ = ["BarrierHandle", "LayerStatistics", "Placement", "attach_barrier"]

Placement = Literal["heads", "embeddings"]
_STAGE = "attention_stage"


class LayerStatistics(NamedTuple):
    """Statistics of the barrier in one layer, from the last forward pass of training.

    Attributes:
        layer: its number; -1 for the stage on the embeddings.
        penalty: mean over tokens for each head, (H,).
        smallest_margin: over the tokens, for each head, (H,).
        support: where the smallest margins are: (sequence, position) for each head, nearest first, (H, k, 2); fewer
            than asked for where there are fewer tokens.
    """

    layer: int
    penalty: Tensor
    smallest_margin: Tensor
    support: Tensor


class BarrierHandle:
    """An attached barrier: its weight, what it sees, and its end. Made by :func:`attach_barrier`."""

    def __init__(
        self,
        model: Any,
        weight: float,
        kind: BarrierKind,
        positions: float,
        placement: Placement,
        stage: AttentionStage | None,
        site: nn.Module | None,
    ) -> None:
        self.kind, self.positions, self.placement, self.stage = kind, positions, placement, stage
        self.weight = weight
        self._model = model
        self._account = new_account()
        self._seen: dict[int, Penalty] = {}
        self._totals: dict[int, Tensor] = {}
        self._tokens: Tensor | None = None
        self._last: Tensor | None = None
        self._training = False
        self._ends: list[Any] = []
        if placement == "heads":
            self._parts = len(attention_layers(model))
            self._ends.append(observe(model, self._on_layer))
        else:
            self._parts = 1
            assert stage is not None
            entry = _first_layer(model) if site is None else site
            self._arguments = list(inspect.signature(entry.forward).parameters)
            model.add_module(_STAGE, stage)
            self._ends.append(entry.register_forward_pre_hook(self._on_embeddings, with_kwargs=True).remove)
        self._ends.append(model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        self._ends.append(model.register_forward_hook(self._after, with_kwargs=True).remove)

    @property
    def weight(self) -> float:
        """lambda; may be set at any time and counts from the next forward pass."""
        return float(self._weight)

    @weight.setter
    def weight(self, value: float) -> None:
        require_at_least("weight", value, 0)
        # A tensor, a new one each time: a compiled model is not compiled again, and a pass under way keeps its own.
        self._weight = torch.tensor(float(value), dtype=torch.float64)

    @property
    def penalty(self) -> float:
        """Mean penalty per predicted token in the last forward pass of training; NaN before the first."""
        return math.nan if self._last is None else float(self._last)

    def statistics(self, support: int = 1) -> list[LayerStatistics]:
        """Statistics of the last forward pass of training, one entry per layer; empty before the first pass.

        Args:
            support: how many support positions a head.
        """
        found = []
        for layer, seen in sorted(self._seen.items()):
            kept = seen.valid.unsqueeze(1).expand_as(seen.values)  # (batch, H, P)
            values = seen.values.masked_fill(~kept, 0.0).sum((0, 2)) / kept.sum((0, 2)).clamp(min=1)
            margins = seen.margins.masked_fill(~kept, torch.inf).movedim(1, 0).flatten(1)  # (H, batch P)
            margins, index = margins.topk(min(support, int(seen.valid.sum())), largest=False)
            count = len(seen.positions)
            where = torch.stack([index // count, seen.positions[index % count]], dim=-1)
            found.append(LayerStatistics(layer, values, margins[:, 0], where))
        return found

    def couple(self, loss: Tensor) -> Tensor:
        """Tie a loss that the model did not compute itself to the barrier.

        The penalty's sum over tokens is divided by the number of labels that the model was given (or by its
        ``num_items_in_batch``), and without labels by all tokens that are no padding.

        Args:
            loss: the mean cross-entropy per token, before any scaling or division.

        Returns:
            The same number; call ``backward`` on it or on what is made of it.

        Raises:
            NonFinitePenaltyError: the penalty of this pass is infinite or NaN.
            InputError: no attention layer of the model has run since the last time.
        """
        if not self._totals:
            raise InputError("the barrier has seen no forward pass in training mode; call model.train() and the model.")
        total = torch.stack(list(self._totals.values())).sum() / self._parts
        tokens = self._seen_tokens() if self._tokens is None else self._tokens
        self._last = (total / tokens).detach()
        if not torch.compiler.is_compiling():
            self._require_finite()
        return record_gain(loss, torch.as_tensor(tokens, device=loss.device), self._account)

    def detach(self) -> None:
        """Restore the model exactly as it was; a second call does nothing."""
        while self._ends:
            self._ends.pop()()
        if self.stage is not None and getattr(self._model, _STAGE, None) is self.stage:
            delattr(self._model, _STAGE)
        self._model.__dict__.pop("_probattn_handle", None)
        forget_gain(self._account)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._training = model.training and torch.is_grad_enabled()
        self._totals.clear()
        if not torch.compiler.is_compiling():
            forget_gain(self._account)
        items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
        if items is not None:
            self._tokens = torch.as_tensor(items)
        elif isinstance(labels, Tensor):
            self._tokens = (labels[..., 1:] != -100).sum()
        else:
            self._tokens = None
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and not torch.compiler.is_compiling() and not bool(mask.any()):
            raise InputError(f"attention_mask {tuple(mask.shape)} has no token in it; drop batches of padding only.")

    def _after(self, _model: nn.Module, _: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._training:
            return output
        if isinstance(output, tuple):
            if kwargs.get("labels") is None:
                return output
            return (self.couple(output[0]), *output[1:])
        if output.get("loss") is not None:
            output["loss"] = self.couple(output["loss"])
        return output

    def _on_layer(self, call: LayerCall, output: Tensor) -> Tensor:
        if not (call.causal and self._wanted(call.training)):
            return output
        length = call.query.shape[2]
        penalty = attention_penalty(
            call.query,
            call.key,
            call.value,
            kind=self.kind,
            scale=call.scale,
            window=call.window,
            mask=call.mask,
            padding=padding_of(call.mask, length),
            softcap=call.softcap,
            positions=choose_positions(length, self.positions, call.query.device),
        )
        return self._attach(call.layer, penalty, output)

    def _on_embeddings(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._wanted(layer.training):
            return None
        assert self.stage is not None
        # By name or by place: architectures differ.
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        u = args[0] if args else kwargs["hidden_states"]
        padding = padding_of(given.get("attention_mask"), u.shape[-2])
        penalty = self.stage.penalty(u, self.kind, share=self.positions, padding=padding)
        u = self._attach(-1, penalty, u)
        return ((u, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": u})

    def _wanted(self, training: bool) -> bool:
        # Reentrant checkpointing runs the first pass without a graph, and its penalty is the one reported; what it runs
        # again in the backward pass has a graph, whatever other pass has come between.
        return training and (self._training or torch.is_grad_enabled())

    def _attach(self, layer: int, penalty: Penalty, output: Tensor) -> Tensor:
        total = penalty.total()
        # By layer, so that a pass that checkpointing repeats replaces what it repeats.
        self._totals[layer] = total.detach()
        self._seen[layer] = penalty._replace(values=penalty.values.detach())
        return attach(output, total / self._parts, self._weight.to(total), self._account)

    def _seen_tokens(self) -> Tensor:
        return next(iter(self._seen.values())).tokens

    def _require_finite(self) -> None:
        assert self._last is not None
        if bool(torch.isfinite(self._last)):
            return
        for layer, seen in sorted(self._seen.items()):
            bad = (~torch.isfinite(seen.values) & seen.valid.unsqueeze(1)).nonzero()
            if len(bad):
                sequence, head, place = map(int, bad[0])
                position = int(seen.positions[place])
                where = f"layer {layer}, head {head}" if layer >= 0 else "the stage on the embeddings"
                raise NonFinitePenaltyError(
                    f"the {self.kind} penalty is {float(seen.values[sequence, head, place])} at {where}, position "
                    f"{position} of sequence {sequence} (margin {float(seen.margins[sequence, head, place]):.3g}); go "
                    "back to the last checkpoint with a smaller learning rate, or a one-sided kind."
                )


def attach_barrier(
    model: Any,
    weight: float,
    kind: BarrierKind = "one_sided",
    positions: float = 1.0,
    placement: Placement = "heads",
    *,
    stage: AttentionStage | None = None,
    site: nn.Module | None = None,
) -> BarrierHandle:
    r"""Add the log-barrier to the training of a model; evaluation and generation are untouched.

    .. math::
        \text{heads: } b_i = -\log|\det(I - c\,\mathrm{Cov}^h_i(v, k))| \text{ averaged over heads and layers}, \qquad
        \text{embeddings: } b_i \text{ of a stage of its own on } u = E[y] + P .

    The gradient of the penalty follows the scaling of the loss, whatever does the scaling: mixed precision, gradient
    accumulation, averaging over processes.

    Args:
        model: a causal language model of ``transformers``. Attach before ``torch.compile``, before it is wrapped for
            several processes, and (embeddings) before the optimiser is built, as the stage has parameters.
        weight: lambda.
        kind: see :func:`~probattn.barrier.log_barrier`.
        positions: share of the positions that is evaluated, drawn anew in each pass; below 1 an unbiased estimate.
        placement: "heads" or "embeddings".
        stage: the stage on the embeddings; None: :class:`AttentionStage` of the model's width.
        site: the module whose first input is u; None: the first layer of the model.

    Returns:
        A :class:`BarrierHandle`.

    Raises:
        InputError: an option that does not exist; a model without the attention interface; a barrier already attached.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel  # doctest: +SKIP
        >>> model = GPT2LMHeadModel(GPT2Config())  # doctest: +SKIP
        >>> handle = attach_barrier(model, 0.05)  # doctest: +SKIP
        >>> model(input_ids, labels=input_ids).loss.backward()  # doctest: +SKIP
    """
    require_penalty(kind, 1.0)
    require_choice("placement", placement, get_args(Placement))
    require_share("positions", positions)
    if "_probattn_handle" in model.__dict__:
        raise InputError("a barrier is attached to this model already; call its detach() first.")
    if placement == "embeddings" and stage is None:
        table = model.get_input_embeddings().weight
        stage = AttentionStage(table.shape[1]).to(table.device, torch.promote_types(table.dtype, torch.float32))
    elif placement == "heads":
        stage = None
    handle = BarrierHandle(model, weight, kind, positions, placement, stage, site)
    model.__dict__["_probattn_handle"] = handle
    return handle


def _first_layer(model: nn.Module) -> nn.Module:
    """The first element of the list of layers that holds the first attention layer."""
    name, module = next(iter(attention_layers(model).values()))
    while name:
        parent = name.rpartition(".")[0]
        if isinstance(model.get_submodule(parent), nn.ModuleList):
            return model.get_submodule(name)
        name = parent
    return module
