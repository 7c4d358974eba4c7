"""Provenance of a result: command, versions, hardware, date; and the choice of the device."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from probattn.errors import InputError, require_choice
from probattn.moments import cpu

__all__ = ["describe", "select_device"]

_PACKAGES = ("probattn", "torch", "pyro-ppl", "arviz-base", "numpy", "scipy", "matplotlib")
_OPTIONAL = ("transformers", "accelerate", "numpyro")


def select_device(name: str) -> torch.device:
    """The device of a name.

    Args:
        name: "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises:
        InputError: another name, or "cuda" without a CUDA device.
    """
    require_choice("--device", name, ("auto", "cpu", "cuda"))
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device cuda: torch finds no CUDA device; use --device cpu or auto.")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def describe(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, object]:
    """Versions, hardware, command and date, as plain JSON values by name.

    Args:
        device: device of the run.
        dtype: precision of the run.
        seed: random seed of the run.
    """
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": "compiled" if cpu.AVAILABLE else "torch",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: metadata.version(name) for name in (*_PACKAGES, *filter(_installed, _OPTIONAL))},
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
