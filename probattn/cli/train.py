"""``probattn train``: a language model trained with the log-barrier."""

from __future__ import annotations

from probattn.cli.command import command
from probattn.inference.runtime.distributed import launched_rank
from probattn.inference.training.options import TrainOptions
from probattn.inference.training.run import train

__all__ = ["OPTIONS", "app", "run"]


def run(options: TrainOptions) -> None:
    """Train a language model with the log-barrier.

    The barrier acts on the residual stream in front of each layer's attention, or on the embeddings (--placement).
    Under torchrun or accelerate launch the processes share each batch. Exit status: 0 done, 2 bad usage or input, 130
    interrupted (--resume goes on).
    """
    result = train(options)
    if launched_rank() == 0:
        print(", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in result.items()))
        files = (options.out / name for name in ("model", "metrics.jsonl", "config.json"))
        print(f"results: {', '.join(map(str, files))}")


OPTIONS = TrainOptions
app = command("train", OPTIONS, run)
