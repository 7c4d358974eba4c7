"""The Trainer of ``transformers`` with the barrier's figures beside the cross-entropy; which checkpoints are whole."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from probattn.errors import InputError
from probattn.hf.barrier import BarrierHandle
from probattn.inference.runtime.files import finite_or_null, named_errors, write_json, write_text

__all__ = ["LogBarrierTrainer", "LogBarrierTrainerMixin", "completed_steps", "last_whole_checkpoint"]

_LOG = logging.getLogger(__name__)
_CHECKSUMS = "checksums.json"
_SUMS = "sums.json"  # of the steps since the last line of the log


class LogBarrierTrainerMixin:
    """For any Trainer: trains on cross-entropy + lambda penalty, logs the two apart, evaluates without the penalty.

    Put it before the Trainer's class: ``class Mine(LogBarrierTrainerMixin, SFTTrainer)``. Where the loss is computed
    outside the model (``compute_loss_func``, label smoothing) it is coupled to the barrier too.

    Args:
        barrier: from :func:`~probattn.hf.barrier.attach_barrier` on the model that is trained; None: no barrier, the
            figures are those of the cross-entropy alone.
        metrics: a JSON Lines file that every logged line is appended to, by the first process; None writes none.

    Logged in training by the first process, as means over the steps since the last line: ``cross_entropy``,
    ``penalty``, ``objective``; and from the last step, over all its parts and processes: ``weight``,
    ``smallest_margin`` and ``support`` (layer, sequence of the part, position of that margin). A checkpoint keeps the
    sums behind the means, so that a run that goes on from it writes the lines of the unbroken one.
    """

    def __init__(
        self,
        *args: Any,
        barrier: BarrierHandle | None = None,
        metrics: Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._barrier, self._metrics = barrier, metrics
        self._loss, self._penalty, self._steps_logged = 0.0, 0.0, 0
        self._nearest: tuple[float, int, int, int] | None = None
        self._step_of_nearest = -1
        if barrier is not None:
            for name in ("compute_loss_func", "label_smoother"):
                outside = getattr(self, name)
                if outside is not None:
                    setattr(self, name, self._coupled(outside))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's, with the penalty noted."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        self._loss += float(loss.detach())
        if self._barrier is not None:
            # As the Trainer scales the loss that it reports.
            if num_items_in_batch is None:
                share = 1 / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
            else:
                share = self.args.world_size if self.args.average_tokens_across_devices else 1  # type: ignore[attr-defined]
            self._penalty += share * self._barrier.penalty
            self._note_nearest()
        return loss

    def _note_nearest(self) -> None:
        """Keep the smallest margin of the parts of a step."""
        assert self._barrier is not None
        if self.state.global_step != self._step_of_nearest:
            self._step_of_nearest, self._nearest = self.state.global_step, None
        for layer in self._barrier.statistics():
            if not len(layer.support):
                continue
            found = (float(layer.smallest_margin), layer.layer, *map(int, layer.support[0]))
            if self._nearest is None or found < self._nearest:
                self._nearest = found  # type: ignore[assignment]

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add the barrier's figures to a line of training, then log as the Trainer does."""
        if "train_loss" in logs and (mean := _mean_loss(self.state.log_history)) is not None:
            logs["train_loss"] = mean
        if "loss" in logs:
            loss, penalty = self._means()
            if math.isfinite(loss):  # otherwise the Trainer's, which may be told to leave such steps out
                logs["loss"] = loss
            logs["cross_entropy"] = logs["loss"]
            if self._barrier is not None:
                logs |= self._figures(logs["loss"], penalty)
        super().log(logs, start_time)  # type: ignore[misc]
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        line = {"step": self.state.global_step, **logs}
        if self._metrics is not None:
            with named_errors(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite_or_null(line)) + "\n")
        _LOG.info(_words(line))

    def _means(self) -> tuple[float, float]:
        """Mean loss and penalty over the steps since the last line, and over the processes; the sums begin anew."""
        steps = max(1, self.state.global_step - self._steps_logged)
        loss, penalty = self._gathered_sums().mean(0).tolist()
        self._loss, self._penalty, self._steps_logged = 0.0, 0.0, self.state.global_step
        return loss / steps, penalty / steps

    def _gathered_sums(self) -> Tensor:
        """Sums of loss and penalty of every process, ``(processes, 2)``."""
        here = torch.tensor([[self._loss, self._penalty]], dtype=torch.float64, device=self.args.device)  # type: ignore[attr-defined]
        return self.accelerator.gather(here)  # type: ignore[attr-defined, no-any-return]

    def _figures(self, loss: float, penalty: float) -> dict[str, Any]:
        assert self._barrier is not None
        figures: dict[str, Any] = {
            "penalty": penalty,
            "weight": self._barrier.weight,
            "objective": loss + self._barrier.weight * penalty,
        }
        nearest = self._nearest or (math.inf, 0, 0, 0)
        gathered = self.accelerator.gather(torch.tensor([nearest], dtype=torch.float64, device=self.args.device))  # type: ignore[attr-defined]
        margin, layer, sequence, position = gathered[gathered[:, 0].argmin()].tolist()
        if math.isfinite(margin):
            figures["smallest_margin"] = margin
            figures["support"] = [int(layer), int(sequence), int(position)]
        return figures

    def _coupled(self, outside: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(*args: Any, **kwargs: Any) -> Tensor:
            computed = outside(*args, **kwargs)
            training = self.model.training and torch.is_grad_enabled()  # type: ignore[attr-defined]
            assert self._barrier is not None
            return self._barrier.couple(computed) if training else computed

        return loss

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As the Trainer's; ``True`` goes on from the last whole checkpoint."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(Path(self.args.output_dir))  # type: ignore[attr-defined]
        if resume_from_checkpoint is not None:
            state = json.loads((Path(resume_from_checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            self._take_sums(Path(resume_from_checkpoint), state["global_step"])
            if self._metrics is not None and self.is_world_process_zero():  # type: ignore[attr-defined]
                _keep_until(self._metrics, state["global_step"])
            resume_from_checkpoint = str(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)  # type: ignore[misc]

    def _take_sums(self, checkpoint: Path, step: int) -> None:
        """Go on with the sums of a checkpoint; with empty ones where it has none, or another number of processes."""
        self._loss, self._penalty, self._steps_logged = 0.0, 0.0, step
        if (checkpoint / _SUMS).is_file():
            kept = json.loads((checkpoint / _SUMS).read_text(encoding="utf-8"))
            if len(kept["sums"]) == self.args.world_size:  # type: ignore[attr-defined]
                self._loss, self._penalty = kept["sums"][self.args.process_index]  # type: ignore[attr-defined]
                self._steps_logged = kept["since"]

    def take_over(self, checkpoint: Path) -> None:
        """Load weights and history of a checkpoint without a step of training.

        The closing line of the metrics is written if a killed run left it out.

        Args:
            checkpoint: folder of a whole checkpoint.
        """
        self._load_from_checkpoint(str(checkpoint))  # type: ignore[attr-defined]
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if self._metrics is None or not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        _keep_until(self._metrics, self.state.global_step)  # without a line that was being written
        # What follows the last step, an evaluation at the end and the mean loss, is in the file of metrics alone.
        lines = self._metrics.read_text(encoding="utf-8").splitlines() if self._metrics.is_file() else []
        for line in map(json.loads, lines):
            if ("eval_loss" in line or "train_loss" in line) and line not in self.state.log_history:
                self.state.log_history.append(line)
        if not any("train_loss" in line for line in self.state.log_history):
            self.log({"total_flos": self.state.total_flos, "train_loss": _mean_loss(self.state.log_history)})

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with the sums since the last line of the log, and with checksums, written last.

        Raises:
            InputError: it cannot be written, as on a full disk; the checkpoints before it are as they were.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
        sums = self._gathered_sums().tolist()
        try:
            with named_errors(folder, SafetensorError, RuntimeError):  # the latter from torch.save
                if self.is_world_process_zero():  # type: ignore[attr-defined]
                    # First, so that a checkpoint that is otherwise whole has them, wherever a kill falls.
                    folder.mkdir(parents=True, exist_ok=True)
                    write_json(folder / _SUMS, {"since": self._steps_logged, "sums": sums})
                super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
            if self.is_world_process_zero() and folder.is_dir():  # type: ignore[attr-defined]
                write_json(folder / _CHECKSUMS, _digests(folder))
        except InputError:
            shutil.rmtree(folder, ignore_errors=True)  # half of a checkpoint, which only takes space
            raise


class LogBarrierTrainer(LogBarrierTrainerMixin, Trainer):  # type: ignore[misc]
    """The Trainer of ``transformers`` with the mixin."""


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint of a Trainer that can be read to its end, or None where there is none.

    Each later checkpoint that is damaged is logged as a warning.

    Args:
        folder: output folder of the Trainer.
    """
    numbered = []
    for path in folder.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            numbered.append((int(match[1]), path))
    for _, path in sorted(numbered, reverse=True):
        fault = _fault(path)
        if fault is None:
            return path
        _LOG.warning("checkpoint %s is not whole (%s); going back to the one before.", path, fault)
    return None


def completed_steps(checkpoint: Path) -> int:
    """Number of steps that were taken before a checkpoint.

    Args:
        checkpoint: folder of a whole checkpoint.
    """
    return int(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"])


def _mean_loss(history: list[dict[str, Any]]) -> float | None:
    """Mean loss over the steps that were logged, those before a resumption included; the Trainer forgets these."""
    total, before = 0.0, 0
    for line in history:
        if "loss" in line and line["step"] > before:
            total, before = total + line["loss"] * (line["step"] - before), line["step"]
    return total / before if before else None


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a checkpoint; other processes write their random states in their own time."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != _CHECKSUMS and not path.name.startswith("rng_state_")
    }


def _fault(path: Path) -> str | None:
    """Name of the part that a checkpoint lacks; None if it is complete."""
    try:
        if (path / _CHECKSUMS).is_file():
            expected = json.loads((path / _CHECKSUMS).read_text(encoding="utf-8"))
            found = _digests(path)
            for name in sorted(expected):
                if found.get(name) != expected[name]:
                    return f"{name} differs from its checksum" if name in found else f"no {name}"
        json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        weights = [path / SAFE_WEIGHTS_NAME]
        if (path / SAFE_WEIGHTS_INDEX_NAME).is_file():
            index = json.loads((path / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
            weights = sorted({path / name for name in index["weight_map"].values()})
        for file in weights:
            with safe_open(file, framework="pt") as archive:  # refuses a file cut short
                list(archive.keys())
        states = [path / OPTIMIZER_NAME, path / SCHEDULER_NAME]
        for file in states:
            torch.load(file, weights_only=True, map_location="meta")
        random = list(path.glob("rng_state*.pth"))
        if not random:
            return "no random state"
        for file in random:
            with file.open("rb") as opened:
                # Holds NumPy's state too, which only the Trainer's own allow-list reads: see that the archive is whole.
                torch._C.PyTorchFileReader(opened)
    except Exception as error:  # the readers have no common class for what a damaged file may cause
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps that are going to be made again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):  # the line that was being written when the process was killed
            continue
    write_text(path, "".join(line + "\n" for line in kept))


def _words(line: Mapping[str, Any]) -> str:
    names = ("loss", "penalty", "objective", "smallest_margin", "eval_loss", "train_runtime")
    shown = [f"{name.replace('_', ' ')} {line[name]:.4f}" for name in names if isinstance(line.get(name), float)]
    return f"step {line['step']}: " + ", ".join(shown)
