r"""Train a causal language model with the log-barrier, from scratch or from a local checkpoint, in one process or many.

.. math:: \mathrm{CE}(y) + \lambda\, \bar b, \qquad \text{see } \texttt{probattn.hf.barrier}
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from probattn.errors import InputError
from probattn.hf.barrier import attach_barrier
from probattn.inference.runtime.distributed import launched_rank
from probattn.inference.runtime.environment import describe, select_device
from probattn.inference.runtime.files import prepare_folder, replace_folder, write_json
from probattn.inference.runtime.interrupt import deferred_interrupt
from probattn.inference.runtime.lock import sole_run
from probattn.inference.training.options import TrainOptions
from probattn.models.causal_lm import CharacterTokeniser, Tokeniser, build_causal_lm, load_causal_lm
from probattn.models.corpus import load_corpus
from probattn.models.options import as_plain

__all__ = ["Interrupted", "train"]

_LOG = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Training was interrupted and left a checkpoint."""


class _Windows(Dataset[dict[str, Tensor]]):
    """Windows of tokens, each its own label (the model shifts them)."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


@sole_run
def train(options: TrainOptions) -> dict[str, float]:
    """Train and write ``model/``, ``metrics.jsonl``, ``config.json`` and ``checkpoint-*/``.

    Args:
        options: see :class:`TrainOptions`.

    Returns:
        ``cross_entropy`` on the held-out text (nats a token), ``bits`` (a token), and ``train_cross_entropy``,
        ``penalty`` of the last logged step.

    Raises:
        InputError: input that cannot be used, or a disk that is full.
        NonFinitePenaltyError: the penalty became infinite or NaN; the last checkpoint is kept.
        Interrupted: Ctrl-C; a checkpoint was left.
    """
    try:
        import transformers
        from accelerate.utils import DistributedType  # noqa: F401  (a Trainer does nothing without it)
        from safetensors import SafetensorError
    except ImportError:
        raise InputError("training needs transformers and accelerate; install probattn[lm].") from None
    chatter: Any = transformers.utils.logging
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    from probattn.inference.training.trainer import completed_steps

    device = select_device(options.device)
    first = launched_rank() == 0
    model, tokeniser, windows, heldout, facts = _problem(options)
    prepare_folder(options.out)
    resumed = _resume_point(options, {**_identity(options), **facts})
    if first:
        environment = describe(device, torch.float64 if options.precision == "float64" else torch.float32, options.seed)
        write_json(
            options.out / "config.json",
            {"schema": 1, "options": as_plain(options), "identity": {**_identity(options), **facts}, **environment},
        )
    barrier = None
    if options.weight > 0:
        torch.manual_seed(options.seed)
        barrier = attach_barrier(
            model,
            options.weight,
            options.kind,
            options.positions,
            options.placement,
            layers=options.barrier_layers,
            probes=options.probes or None,
        )
    with deferred_interrupt() as interrupted:
        trainer = _trainer(options, model, barrier, windows, heldout, interrupted, device)
        if resumed is not None and completed_steps(resumed) >= options.steps:
            _LOG.info("the run is finished at step %d; nothing is trained", completed_steps(resumed))
            trainer.take_over(resumed)
        else:
            trainer.train(resume_from_checkpoint=resumed)
        if interrupted.is_set():
            raise Interrupted
        if not any("eval_loss" in line and line["step"] == options.steps for line in trainer.state.log_history):
            trainer.evaluate()
    if barrier is not None:
        barrier.detach()
    # Before anything is said about it: a summary that fails must not cost the model.
    if trainer.is_world_process_zero():

        def save(folder: Path) -> None:
            model.save_pretrained(folder)
            tokeniser.save(folder)

        replace_folder(options.out / "model", save, SafetensorError)
    result = _summary(trainer.state.log_history)
    accelerator = trainer.accelerator
    accelerator.wait_for_everyone()
    # What wraps the model for several processes must go before the group of processes. Were it the last to hold the
    # group, the group's threads would be waited for by one that keeps them from ending, and now and then for ever.
    del trainer
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
    return result


def _summary(history: list[dict[str, Any]]) -> dict[str, float]:
    """Figures of the last lines of evaluation and training; NaN where there is none."""

    def last_with(name: str) -> dict[str, Any]:
        return next((line for line in reversed(history) if name in line), {})

    found, last = last_with("eval_loss"), last_with("loss")
    loss = float(found.get("eval_loss", math.nan))
    return {
        "cross_entropy": loss,
        "bits": loss / math.log(2),
        "train_cross_entropy": float(last.get("cross_entropy", math.nan)),
        "penalty": float(last.get("penalty", math.nan)),
    }


def _trainer(
    options: TrainOptions,
    model: Any,
    barrier: Any,
    windows: Tensor,
    heldout: Tensor,
    interrupted: Any,
    device: torch.device,
) -> Any:
    from transformers import TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from probattn.inference.training.trainer import LogBarrierTrainer

    class StopBetweenSteps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if interrupted.is_set():
                control.should_save = control.should_training_stop = True

    share = options.batch // (int(os.environ.get("WORLD_SIZE", "1")) * options.accumulate)
    # The name changed with transformers 5.24.
    renamed = hasattr(TrainingArguments, "activation_checkpointing")
    name = "activation_checkpointing" if renamed else "gradient_checkpointing"
    recompute: dict[str, Any] = {name: options.checkpointing}
    arguments = TrainingArguments(
        output_dir=str(options.out),
        per_device_train_batch_size=share,
        per_device_eval_batch_size=max(share, 32),
        gradient_accumulation_steps=options.accumulate,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup,
        lr_scheduler_type="cosine",
        logging_steps=min(options.log_every, options.steps),  # one line at least
        logging_nan_inf_filter=False,
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or 500,
        save_total_limit=options.keep,
        eval_strategy="steps" if options.evaluate_every else "no",
        eval_steps=options.evaluate_every or None,
        report_to=list(options.report_to) or "none",
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=device.type == "cpu",
        bf16=options.precision == "bf16",
        fp16=options.precision == "fp16",
        **recompute,
        torch_compile=options.compile,
        remove_unused_columns=False,
        disable_tqdm=True,
        prediction_loss_only=True,
    )
    trainer = LogBarrierTrainer(
        model,
        arguments,
        train_dataset=_Windows(windows),
        eval_dataset=_Windows(heldout),
        callbacks=[StopBetweenSteps()],
        barrier=barrier,
        metrics=options.out / "metrics.jsonl",
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _problem(options: TrainOptions) -> tuple[Any, Tokeniser, Tensor, Tensor, dict[str, Any]]:
    """The model, its tokeniser, windows of tokens for training and evaluation, and what they are."""
    dtype = torch.float64 if options.precision == "float64" else torch.float32
    corpus = load_corpus(options.corpus, heldout=options.heldout)
    facts = {"corpus": corpus.name, "sha256": corpus.digest}
    if options.model is None:
        torch.manual_seed(options.seed)
        sizes = (options.layers, options.dim, options.heads, options.context)
        tokeniser: Tokeniser = CharacterTokeniser(corpus.vocabulary)
        model = build_causal_lm(options.architecture, len(corpus.vocabulary), *sizes, dropout=options.dropout)
    else:
        model, tokeniser = load_causal_lm(options.model)
        facts["from"] = str(options.model)
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit and options.context > limit:
            raise InputError(f"--context is {options.context}; the model of {options.model} has {limit} positions.")
    windows, heldout = (
        _cut(tokeniser.encode(text), options.context, corpus.name, part)
        for text, part in ((corpus.text, "training"), (corpus.heldout, "held-out"))
    )
    if len(windows) < options.batch:
        raise InputError(
            f"corpus {corpus.name}: {len(windows)} windows of {options.context} tokens do not fill one --batch of "
            f"{options.batch}; give a longer text, or a smaller --batch or --context."
        )
    windows = windows[: len(windows) // options.batch * options.batch]  # so that no batch of a pass is a smaller one
    return model.to(dtype), tokeniser, windows, heldout[: options.evaluate_windows or None], facts


def _cut(tokens: Tensor, context: int, name: str, part: str) -> Tensor:
    """Windows without overlap, (N, context); what is left over is dropped."""
    count = len(tokens) // context
    if count < 1:
        raise InputError(f"corpus {name}: its {part} part has {len(tokens)} tokens, too short for --context {context}.")
    return tokens[: count * context].view(count, context)


_FREE = {"out", "steps", "save_every", "evaluate_every", "log_every", "keep", "report_to", "device", "resume"}


def _identity(options: TrainOptions) -> dict[str, Any]:
    """Options that must agree with a checkpoint to resume from it, the length of the run included, for the cosine."""
    given = as_plain(options)
    return {field.name: given[field.name] for field in fields(options) if field.name not in _FREE - {"steps"}}


def _resume_point(options: TrainOptions, identity: dict[str, Any]) -> Path | None:
    from probattn.inference.training.trainer import last_whole_checkpoint

    existing = sorted(options.out.glob("checkpoint-*"))
    if not options.resume:
        if existing:
            raise InputError(
                f"--out {options.out}: holds checkpoints of an earlier run; add --resume to go on, name another "
                "folder, or delete them."
            )
        (options.out / "metrics.jsonl").unlink(missing_ok=True)
        return None
    record = options.out / "config.json"
    if record.is_file():
        before = json.loads(record.read_text(encoding="utf-8")).get("identity", {})
        for name in sorted(set(before) | set(identity)):
            if before.get(name) != identity.get(name):
                raise InputError(
                    f"--resume: the run in {options.out} has {name} {before.get(name)!r}, this one "
                    f"{identity.get(name)!r}; use the same options or another --out."
                )
    found = last_whole_checkpoint(options.out)
    _LOG.info(f"going on from {found}" if found else "no whole checkpoint; starting from the beginning")
    return found
