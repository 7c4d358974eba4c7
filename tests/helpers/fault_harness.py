"""Kills, full disks, flipped bits and malformed inputs by the thousand, from a seed: what is lost, what is accepted.

    python tests/helpers/fault_harness.py --seconds 3600 --seed 0

The faults are drawn from the seed in the order of the rounds; where a kill by the clock falls depends on the machine.
"""

import argparse
import json
import logging
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from fault_files import flip_bits, malform
from fault_kernels import build, check_kernels
from fault_runs import Runs, fill_disk, kill
from fault_tally import Tally

KINDS = ("files", "kernels", "runs")


def run(*, seed, seconds=None, kinds=KINDS, flips=200, malformed=200, problems=500):
    """Make batches of the faults until the time is over; without ``seconds`` a single one."""
    tally, dice, begin, batches = Tally(), random.Random(seed), time.monotonic(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs, kernels = Runs(folder), build(folder) if "kernels" in kinds else None
        while batches == 0 or (seconds is not None and time.monotonic() - begin < seconds):
            if "files" in kinds:
                flip_bits(folder, tally, dice, flips)
                malform(folder, tally, dice, malformed)
            if kernels is not None:
                check_kernels(kernels, tally, dice, problems)
            if "runs" in kinds:
                for command in runs.by_name:
                    kill(runs, command, tally, dice)
                fill_disk(runs, dice.choice(sorted(runs.by_name)), tally, dice)
            batches += 1
            print(f"{time.monotonic() - begin:.0f} s", json.dumps(tally.as_dict()), file=sys.stderr, flush=True)
    return tally


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # and a forked process may compute
    logging.disable(logging.WARNING)  # of damaged checkpoints
    begin = time.monotonic()
    tally = run(seed=options.seed, seconds=options.seconds, kinds=options.kinds)
    record = {
        "command": f"make faults SECONDS={options.seconds:g} SEED={options.seed} KINDS='{' '.join(options.kinds)}'",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": f"{platform.machine()}, one core of {os.cpu_count()}",
        "seconds": round(time.monotonic() - begin),
        **tally.as_dict(),
    }
    print(json.dumps(record, indent=2))
    return int(bool(tally.faults))


if __name__ == "__main__":
    sys.exit(main())
