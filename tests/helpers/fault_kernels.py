"""The compiled kernels under the address and undefined-behaviour sanitizers, on random problems."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "tests" / "faults" / "kernels_driver.c"
FLAGS = ["-O1", "-g", "-std=gnu11", "-fno-math-errno", "-fopenmp-simd", "-Wno-psabi", "-pthread"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SECONDS = 600


def build(folder):
    """Compile driver and kernels into a folder; returns the program, None where there is no GCC with sanitizers."""
    compiler = shutil.which("gcc")
    program = folder / "kernels"
    if compiler is None:
        return None
    included = ["-I", str(ROOT / "probattn" / "moments" / "kernels")]
    command = [compiler, *FLAGS, *SANITIZERS, *included, str(DRIVER), "-o", str(program), "-lm"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if made.returncode and ("libasan" in made.stderr or "libubsan" in made.stderr):
        return None
    assert made.returncode == 0, made.stderr
    return program


def report_of(program, seed, problems, control=""):
    """First line of a report of the sanitizers over some problems; empty where there is none."""
    # Where processes may not trace each other, as in most containers, leaks cannot be looked for.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=0"}
    command = [str(program), str(seed), str(problems), *filter(None, [control])]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    if ended.returncode == 0 and ended.stdout.strip() == str(problems):
        return ""
    lines = [line for line in ended.stderr.splitlines() if "runtime error" in line or "AddressSanitizer" in line]
    return lines[0] if lines else f"status {ended.returncode}: {ended.stderr[:200]}"


def check_kernels(program, tally, dice, problems):
    """Problems for the kernels, in one process per call."""
    seed = dice.randrange(2**63)
    report = report_of(program, seed, problems)
    if report:
        tally.note("kernels under sanitizers", "reported", f"driver {seed} {problems}: {report}")
    else:
        tally.rounds["kernels under sanitizers"] += problems
        tally.outcomes["kernels under sanitizers: nothing reported"] += problems
