"""Check an installed package, outside of the checkout: kernels that load and agree with torch, commands, files.

Usage: python check_installed.py [--without-kernels]
"""

import os
import subprocess
import sys
from pathlib import Path

NUMBERS = """
import torch
from probattn import CausalAttention, LatentAttention, log_barrier
generator = torch.Generator().manual_seed(0)
query, key = torch.randn(2, 2, 4, 8, generator=generator, dtype=torch.float64)
attention = CausalAttention.contractive(query, key, contraction=0.9, memory_radius=1.0)
u = torch.randn(4, 40, 8, generator=generator, dtype=torch.float64)
print(float(log_barrier(attention, u).sum()), float(LatentAttention(attention, 0.5, 40).log_prob(u).sum()))
"""


def numbers(native: str) -> list[float]:
    """Two sums, computed in a process of its own, with kernels or without."""
    environment = {**os.environ, "PROBATTN_NATIVE": native}
    command = [sys.executable, "-c", NUMBERS]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return [float(word) for word in result.stdout.split()]


def main() -> None:
    """Run all checks; an assertion that fails ends with status 1."""
    import probattn
    from probattn.moments import cpu

    home = Path(probattn.__file__).parent
    assert not (home.parent / "pyproject.toml").exists(), f"{home} is the checkout, not an installation"
    wanted = "--without-kernels" not in sys.argv
    built = sorted(path.name for path in home.glob("moments/kernels/_compiled*"))
    assert wanted == cpu.AVAILABLE, f"kernels loaded: {cpu.AVAILABLE}; built: {built}"
    for first, second in zip(numbers("1"), numbers("0"), strict=True):
        assert abs(first - second) <= 1e-9 * abs(second), (first, second)
    for name in ("py.typed", "teach/explorer/assets/index.html", "inference/studies/results/robustness.json"):
        assert (home / name).is_file(), name
    assert list((home / "inference" / "reports" / "templates").iterdir())
    for arguments in (["--version"], ["verify", "--help"], ["explore", "--save", "explorer.html"]):
        subprocess.run([sys.executable, "-m", "probattn", *arguments], check=True, stdout=subprocess.DEVNULL)
    assert Path("explorer.html").stat().st_size > 50_000
    Path("explorer.html").unlink()
    print(f"probattn {probattn.__version__} in {home}: numbers, files and commands are in order; kernels: {built}")


if __name__ == "__main__":
    main()
