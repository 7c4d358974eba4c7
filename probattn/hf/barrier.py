r"""The log-barrier in the training of a causal language model of ``transformers``, in one line.

.. math:: \mathrm{CE}(y) + \lambda \frac{1}{N} \sum_i \bar b_i

with :math:`\bar b_i` the barrier of token i, averaged over layers, on the residual stream in front of each attention
sublayer (or that of an attention stage on the input embeddings), and N the number of predicted tokens, by which the
cross-entropy is divided too. No logit changes: hooks watch the layers, and the penalty joins in the backward pass.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from probattn.barrier import BarrierKind, require_penalty
from probattn.embedding_prior import AttentionStage
from probattn.errors import InputError, NonFinitePenaltyError, require_at_least, require_choice, require_share
from probattn.hf.auxiliary_loss import attach, forget_gain, new_account, record_gain
from probattn.hf.copies import Hook, leave_no_trace
from probattn.hf.discovery import FoundLayer, first_decoder_layer, require_causal_head, residual_layers
from probattn.hf.penalty import require_probes, residual_penalty
from probattn.hf.stream import Arguments, padding_of, read_stream
from probattn.numerics.random import isolated_seed
from probattn.penalty import Penalty, choose_positions

__all__ = ["BarrierHandle", "LayerStatistics", "Placement", "attach_barrier"]

Placement = Literal["residual", "embeddings"]
_STAGE = "attention_stage"
_STAGE_NUMBER = -1
_HANDLE = "_probattn_handle"
_TRIED = (2, 4)  # sequences and tokens of the pass that is tried on attaching


class LayerStatistics(NamedTuple):
    """Statistics of the barrier in one call of a layer, from the last forward pass of training.

    Attributes:
        layer: number of the layer; -1 for the stage on the embeddings.
        penalty: mean over the tokens that were evaluated, 0-dimensional.
        smallest_margin: smallest margin of these tokens, 0-dimensional.
        support: places of the smallest margins, (sequence, position) each, nearest first, (k, 2); fewer than asked for
            where there are fewer tokens.
    """

    layer: int
    penalty: Tensor
    smallest_margin: Tensor
    support: Tensor


class BarrierHandle:
    """An attached barrier: its weight, its statistics, and its removal. Made by :func:`attach_barrier`.

    Attributes:
        kind: kind of the penalty.
        positions: share of the positions that is evaluated; may be set at any time.
        layers: share of the layers that is evaluated; may be set at any time.
        probes: number of random probes per token; None: exact.
        placement: "residual" or "embeddings".
        stage: the attention stage of the placement "embeddings".
    """

    def __init__(
        self,
        model: Any,
        weight: float,
        kind: BarrierKind,
        positions: float,
        placement: Placement,
        layers: float,
        probes: int | None,
        stage: AttentionStage | None,
    ) -> None:
        self.kind, self.positions, self.placement, self.stage = kind, positions, placement, stage
        self.layers, self.probes = layers, probes
        self.weight = weight
        self._model = model
        self._arguments = Arguments(model)
        self._account = new_account()
        self._seen: list[tuple[int, Penalty]] = []
        self._parts = 1
        self._calls = 0
        self._tokens: Tensor | None = None
        self._last: Tensor | None = None
        self._training = self._inside = self._trying = False
        self._ends: list[Any] = []

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
        """Statistics of the last forward pass of training, one entry per call of a layer; empty before the first pass.

        Args:
            support: number of support positions per layer.
        """
        found = []
        for number, seen in sorted(self._seen, key=lambda entry: entry[0]):
            values = seen.values.masked_fill(~seen.valid, 0.0).sum() / seen.valid.sum().clamp(min=1)
            margins = seen.margins.masked_fill(~seen.valid, torch.inf).flatten()
            margins, index = margins.topk(min(support, int(seen.valid.sum())), largest=False)
            count = len(seen.positions)
            where = torch.stack([index // count, seen.positions[index % count]], dim=-1)
            smallest = margins[0] if len(margins) else margins.new_tensor(torch.inf)
            found.append(LayerStatistics(number, values, smallest, where))
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
            InputError: no decoder layer of the model has run since the last time.
        """
        if not self._calls:
            raise InputError("the barrier has seen no forward pass in training mode; call model.train() and the model.")
        totals = [seen.total() for _, seen in self._seen]
        total = torch.stack(totals).sum() / (self._parts * self.layers) if totals else loss.new_zeros(())
        tokens = self._seen_tokens(loss) if self._tokens is None else self._tokens
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
        forget_gain(self._account)

    def _watch(self, module: nn.Module, hook: Hook, *, before: bool) -> None:
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        self._ends.append(register(hook, with_kwargs=True).remove)

    def _attach_to(self, found: list[FoundLayer], entry: nn.Module | None) -> None:
        for one in found:
            on_layer = partial(self._on_layer, one, Arguments(one.site.block))
            self._watch(one.site.block, Hook(on_layer), before=True)
        if entry is not None:
            self._model.add_module(_STAGE, self.stage)
            self._watch(entry, Hook(partial(self._on_embeddings, Arguments(entry))), before=True)
        self._watch(self._model, Hook(self._before), before=True)
        self._watch(self._model, Hook(self._after), before=False)
        self._ends.append(leave_no_trace(self._model, _HANDLE, self, _STAGE))

    def _try(self) -> None:
        """Run the model with and without the barrier on a few tokens: same logits, and as many calls as there are."""
        model = self._model
        words = model.get_input_embeddings().weight
        ids = torch.arange(math.prod(_TRIED), device=words.device).view(_TRIED) % len(words)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, "return_dict": False}
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with isolated_seed(0, words.device), torch.no_grad():
                plain = model(**given)[0]
                self._trying = True
                watched = model(**given)[0]
        finally:
            self._trying = self._inside = False
            for module in training:
                module.training = True
        self._parts = max(1, self._calls)
        if not self._calls:
            raise InputError(f"no decoder layer of {type(model).__name__} ran in a pass over a few tokens.")
        if not torch.equal(plain, watched):
            error = float((plain - watched).abs().max())
            raise InputError(
                f"watching the layers of {type(model).__name__} changed its output by {error:.1e}, which it must not."
            )
        self._seen, self._calls = [], 0

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._training = model.training and torch.is_grad_enabled()
        self._inside = self._training or self._trying
        if self._inside:
            self._calls = 0
            self._seen = []
        if not torch.compiler.is_compiling():
            forget_gain(self._account)
        given = self._arguments.bind(args, kwargs)
        items, labels, shifted = (given.get(name) for name in ("num_items_in_batch", "labels", "shift_labels"))
        if items is not None:
            self._tokens = torch.as_tensor(items)
        elif isinstance(shifted, Tensor):
            self._tokens = (shifted != -100).sum()
        elif isinstance(labels, Tensor):
            self._tokens = (labels[..., 1:] != -100).sum()
        else:
            self._tokens = None
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and not torch.compiler.is_compiling() and not bool((mask != 0).any()):
            raise InputError(f"attention_mask {tuple(mask.shape)} has no token in it; drop batches of padding only.")

    def _after(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self._inside = False
        if not self._training:
            return output
        if isinstance(output, tuple):
            if self._arguments.bind(args, kwargs).get("labels") is None:
                return output
            return (self.couple(output[0]), *output[1:])
        if output.get("loss") is not None:
            output["loss"] = self.couple(output["loss"])
        return output

    def _on_layer(
        self, one: FoundLayer, names: Arguments, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self._wanted(block.training):
            return None
        self._calls += self._inside
        # Drawn from torch's global random state, which checkpointing replays.
        if self.layers < 1 and not self._trying and float(torch.rand(())) >= self.layers:
            return None
        u = names.first(args, kwargs)
        kernel = str(getattr(self._model.config, "_attn_implementation", None) or "eager")
        stream = read_stream(u, names.bind(args, kwargs), one.layer.sublayer, one.site.number, kernel)
        rows = choose_positions(u.shape[1], self.positions, u.device)
        compute = partial(residual_penalty, one.layer, stream, rows, self.kind, self.probes)
        # Hooks of a layer run outside of what the library checkpoints (from transformers 5.24 on).
        repeated = getattr(block, "gradient_checkpointing", False) and torch.is_grad_enabled()
        penalty = checkpoint(compute, use_reentrant=False) if repeated else compute()
        return names.with_first(self._attach(one.site.number, penalty, u), args, kwargs)

    def _on_embeddings(self, names: Arguments, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._wanted(layer.training):
            return None
        assert self.stage is not None
        self._calls += self._inside
        u = names.first(args, kwargs)
        padding = padding_of(names.bind(args, kwargs).get("attention_mask"), u.shape[-2])
        penalty = self.stage.penalty(u, self.kind, share=self.positions, padding=padding)
        return names.with_first(self._attach(_STAGE_NUMBER, penalty, u), args, kwargs)

    def _wanted(self, training: bool) -> bool:
        # Reentrant checkpointing runs the first pass without a graph, and its penalty is the one reported; what it runs
        # again in the backward pass has a graph, whatever other pass has come between.
        return self._trying or (training and (self._training or torch.is_grad_enabled()))

    def _attach(self, number: int, penalty: Penalty, output: Tensor) -> Tensor:
        if self._inside:  # a pass that checkpointing repeats is not reported again
            self._seen.append((number, penalty._replace(values=penalty.values.detach())))
        total = penalty.total() / (self._parts * self.layers)
        return attach(output, total, self._weight.to(total), self._account)

    def _seen_tokens(self, loss: Tensor) -> Tensor:
        return self._seen[0][1].tokens if self._seen else loss.new_ones(())

    def _require_finite(self) -> None:
        assert self._last is not None
        if bool(torch.isfinite(self._last)):
            return
        for number, seen in sorted(self._seen, key=lambda entry: entry[0]):
            bad = (~torch.isfinite(seen.values) & seen.valid).nonzero()
            if len(bad):
                sequence, place = map(int, bad[0])
                position = int(seen.positions[place])
                where = f"layer {number}" if number >= 0 else "the stage on the embeddings"
                raise NonFinitePenaltyError(
                    f"the {self.kind} penalty is {float(seen.values[sequence, place])} at {where}, position "
                    f"{position} of sequence {sequence} (margin {float(seen.margins[sequence, place]):.3g}); go "
                    "back to the last checkpoint with a smaller learning rate, or a one-sided kind."
                )


def attach_barrier(
    model: Any,
    weight: float,
    kind: BarrierKind = "one_sided",
    positions: float = 0.05,
    placement: Placement = "residual",
    *,
    layers: float = 1.0,
    probes: int | None = None,
    stage: AttentionStage | None = None,
    site: nn.Module | None = None,
) -> BarrierHandle:
    r"""Add the log-barrier to the training of a model; its logits, evaluation and generation stay what they are.

    .. math::
        \text{residual: } b_i = -\log|\det(I - \partial \mu^l_i / \partial u^l_i)| \text{ averaged over the layers } l,
        \qquad \text{embeddings: } b_i \text{ of a stage of its own on } u = E[y] + P,

    with :math:`u^l` the residual stream in front of the norm of layer l and :math:`\mu^l` what its attention adds to
    it. Neither depends on the basis in which a head keeps its queries, keys and values. The gradient of the penalty
    follows the scaling of the loss, whatever does the scaling: mixed precision, gradient accumulation, averaging over
    processes.

    Args:
        model: a causal language model of ``transformers``. Attach before ``torch.compile``, before it is wrapped for
            several processes, and (embeddings) before the optimiser is built, as the stage has parameters. Copies of
            the model, by ``copy.deepcopy``, ``pickle`` or ``torch.save``, have no barrier.
        weight: lambda.
        kind: see :func:`~probattn.barrier.log_barrier`.
        positions: share of the positions that is evaluated, drawn anew in each layer and pass.
        placement: "residual" or "embeddings".
        layers: chance of each layer to be evaluated in a pass. Below 1 a model does not compile into one graph.
        probes: number of random probes per token instead of an exact factorisation, for ``kind="logdet"``; None: exact.
            Value and gradient stay unbiased in positions, layers and probes, but for the tolerance of the solver
            (:func:`~probattn.hf.probes.probed_logabsdet`).
        stage: the stage on the embeddings; None: :class:`AttentionStage` of the model's width.
        site: the module whose first input is u = E[y] + P; None: the first decoder layer of the model.

    Returns:
        A :class:`BarrierHandle`. The cost per position and layer is that of
        :func:`~probattn.hf.penalty.residual_penalty`.

    Raises:
        InputError: an option that does not exist; a model that is not covered, named with the reason; a loss that is
            no mean over predicted tokens; a barrier already attached.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config).train()
        >>> handle = attach_barrier(model, weight=0.05, positions=1.0)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> model(ids, labels=ids).loss.backward()  # adds the gradient of the penalty
        >>> [layer.layer for layer in handle.statistics()], handle.penalty >= 0
        ([0, 1], True)
    """
    require_penalty(kind, 1.0)
    require_choice("placement", placement, get_args(Placement))
    require_share("positions", positions)
    require_share("layers", layers)
    require_probes(kind, probes)
    require_causal_head(model)
    if _HANDLE in model.__dict__:
        raise InputError("a barrier is attached to this model already; call its detach() first.")
    found: list[FoundLayer] = []
    entry = None
    if placement == "residual":
        if stage is not None or site is not None:
            raise InputError("stage and site belong to placement='embeddings'; leave them out.")
        found = residual_layers(model)
    else:
        if layers != 1 or probes is not None:
            raise InputError("layers and probes belong to placement='residual'; leave them out.")
        entry = first_decoder_layer(model) if site is None else site
        if stage is None:
            table = model.get_input_embeddings().weight
            stage = AttentionStage(table.shape[1]).to(table.device, torch.promote_types(table.dtype, torch.float32))
    handle = BarrierHandle(model, weight, kind, positions, placement, layers, probes, stage)
    try:
        handle._attach_to(found, entry)
        handle._try()
    except BaseException:
        handle.detach()
        raise
    return handle
