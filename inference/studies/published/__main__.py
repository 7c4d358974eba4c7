"""``python -m probattn.inference.studies.published FOLDER``: growth of Jacobians with length on SmolLM2-135M."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from probattn.inference.studies.published.results import measure_on_smollm2
from probattn.models.corpus import read_text


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m probattn.inference.studies.published")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", default="python-docs")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    name, text = read_text(given.corpus)
    for growth in measure_on_smollm2(name, text, given.folder).layers:
        found = {name: growth.exponent(name) for name in ("normed", "held", "stream", "blocks")}
        shown = ", ".join(f"{name} {one.value:.2f} [{one.low:.2f}, {one.high:.2f}]" for name, one in found.items())
        print(f"layer {growth.layer}: {shown}")


if __name__ == "__main__":
    _main()
