"""Kills, full disks, flipped bits and malformed inputs by the thousand, from a seed: what is lost, what is accepted.

    python tests/helpers/fault_harness.py --seconds 3600 --seed 0

Every round has a number of its own, from which seed and round make it again.
"""

import argparse
import io
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from posteriors import sequences

from probattn.cli.command import read_settings
from probattn.errors import InputError
from probattn.inference.fit import FitOptions, MapConfig, NutsConfig, SviConfig, fit
from probattn.inference.results.fit_file import Fit
from probattn.inference.runtime.checkpoint import iterate, load_checkpoint, save_checkpoint
from probattn.inference.runtime.checksum import seal
from probattn.models.corpus import load_corpus
from probattn.models.hidden_states import load_hidden_states

METHODS = {
    "nuts": NutsConfig(chains=2, warmup=20, draws=25, checkpoint_every=5),
    "svi": SviConfig(steps=150, window=25, stages=2, draws=40, particles=2),
    "map": MapConfig(steps=300, patience=0, checkpoint_every=10),
}
SETTINGS = "method: nuts\nwarmup: 20\ndraws: 100\ncompare: [jacobian]\nprior-scale: 0.5\nout: runs/fit\n"
NASTY = (
    b"\0",
    b"\xff\xfe",
    b"[" * 3000,
    b"{a: " * 3000,
    b"9" * 5000,
    b"1e999",
    b"&a [*a]",
    b"!!python/object:os.system x",
)


class Tally:
    """Rounds by kind, and what went wrong in them."""

    def __init__(self):
        self.rounds, self.outcomes, self.faults = Counter(), Counter(), []

    def note(self, kind, outcome, words=""):
        self.rounds[kind] += 1
        self.outcomes[f"{kind}: {outcome}"] += 1
        if outcome in ("lost", "accepted", "traceback", "hang"):
            self.faults.append(f"{kind} {self.rounds[kind]}: {outcome}: {words}"[:400])

    def as_dict(self):
        return {"rounds": dict(self.rounds), "outcomes": dict(sorted(self.outcomes.items())), "faults": self.faults}


def attempt(read):
    """Outcome of a reader: "refused" in one line, "read", or "traceback"."""
    try:
        read()
    except InputError as error:
        return ("refused", "") if "\n" not in str(error) else ("traceback", f"several lines: {error}")
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    return "read", ""


def flipped(content, dice):
    """The same bytes with one to three bits flipped."""
    changed = bytearray(content)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def flip_bits(folder, tally, dice, rounds):
    """Flipped bits of a checkpoint and of the file of a fit; two flips may cancel, and then nothing is wrong."""
    generator = np.random.default_rng(0)
    save_checkpoint(folder / "flip.pt", {"a": 1}, {"state": {"x": torch.arange(50.0), "step": 3}})
    Fit("map", {"posterior": {"x": generator.normal(size=(1, 1, 9))}}, {}, {}, {"seed": 0}).save(folder / "flip.nc")
    whole = {suffix: (folder / f"flip{suffix}").read_bytes() for suffix in (".pt", ".nc")}
    readers = {".pt": load_checkpoint, ".nc": Fit.load}
    for _ in range(rounds):
        suffix = dice.choice((".pt", ".nc"))
        content = flipped(whole[suffix], dice)
        path = folder / f"flipped{suffix}"
        path.write_bytes(content)
        outcome, words = attempt(lambda path=path, suffix=suffix: readers[suffix](path))
        same = content == whole[suffix]
        tally.note("flipped bits", "accepted" if outcome == "read" and not same else outcome, words)


def mangled(content, dice):
    """Bytes cut, overwritten, doubled, with something nasty in them."""
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(len(content) + 1)
        until = min(len(content), at + dice.randrange(1, 40))
        piece = dice.choice((b"", dice.randbytes(dice.randrange(1, 20)), dice.choice(NASTY), content[at:until] * 3))
        content = dice.choice(
            (content[:at], content[:at] + piece + content[until:], content[:at] + piece + content[at:])
        )
    return content


def malform(folder, tally, dice, rounds):
    """Malformed files for every reader; some are by chance still what the reader wants."""
    states = np.random.default_rng(0).normal(size=(2, 4, 2)).astype(np.float32)
    written = {suffix: io.BytesIO() for suffix in (".npy", ".npz", ".pt")}
    np.save(written[".npy"], states)
    np.savez(written[".npz"], u=states, lengths=np.array([4, 3]))
    torch.save({"schema": 3, "identity": {"a": 1}, "state": {"step": 3, "x": torch.zeros(3)}}, written[".pt"])
    from safetensors.numpy import save

    whole = {suffix: file.getvalue() for suffix, file in written.items()}
    whole |= {".yaml": SETTINGS.encode(), ".txt": ("the cat sat on the mat. " * 9).encode()}
    whole[".safetensors"] = save({"u": states})
    readers = {
        ".npy": load_hidden_states,
        ".npz": load_hidden_states,
        ".safetensors": load_hidden_states,
        ".txt": lambda path: load_corpus(str(path)),
        ".yaml": read_settings,
        ".pt": resume,
    }
    for _ in range(rounds):
        suffix = dice.choice(sorted(whole))
        content = mangled(whole[suffix], dice)
        path = folder / f"malformed{suffix}"
        path.write_bytes(seal(content) if suffix == ".pt" else content)  # the checksum of what is wrong is right
        for again in (False, True):  # once more before it counts: a busy machine may have stood still
            begin = time.monotonic()
            outcome, words = attempt(lambda path=path, suffix=suffix: readers[suffix](path))
            if time.monotonic() - begin < 30:
                break
            outcome = "hang" if again else outcome
        tally.note("malformed inputs", outcome, f"{suffix} {words}")


class _State:
    """A state for checkpoints that are not its own."""

    def __init__(self):
        self.step, self.x = 0, torch.zeros(3)

    def state_dict(self):
        return {"step": self.step, "x": self.x}

    def load_state_dict(self, content):
        self.step, self.x = content["step"], content["x"]


def resume(path):
    """Go on from a checkpoint that may hold anything."""
    iterate(
        _State(), lambda state: None, lambda state: True, save_every=1, checkpoint=path, resume=True, identity={"a": 1}
    )


def in_child(work, *, limit=None, kill_after=None, seconds=120):
    """Run in a forked process; returns its status: 0, 2 (an InputError), 3 (a traceback), -9 (killed), None (hung)."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            work()
            status = 0
        except InputError:
            status = 2
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            os._exit(status)
    deadline = time.monotonic() + (seconds if kill_after is None else kill_after)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return os.waitstatus_to_exitcode(status) if kill_after is not None else None
        time.sleep(0.002)


class Fits:
    """Fits that are killed, and the unbroken ones that they must equal."""

    def __init__(self, folder):
        self.folder, self.whole, self.seconds = folder, {}, {}
        np.save(folder / "hidden.npy", sequences()[:3, :6].numpy())

    def options(self, method, out, **changes):
        return FitOptions(data=self.folder / "hidden.npy", method=METHODS[method], out=out, device="cpu", **changes)

    def expected(self, method):
        if method not in self.whole:
            out = self.folder / f"whole-{method}"
            begin = time.monotonic()
            assert in_child(lambda: fit(self.options(method, out))) == 0
            self.seconds[method] = time.monotonic() - begin
            self.whole[method] = Fit.load(out / "fit.nc")
        return self.whole[method]

    def same(self, method, out):
        found, expected = Fit.load(out / "fit.nc").groups["posterior"], self.expected(method).groups["posterior"]
        return set(found) == set(expected) and all(np.array_equal(found[k], expected[k]) for k in found)


def kill(fits, tally, dice):
    """Kill a fit now and then until it ends; in the end it is the unbroken one, and nothing half written is left."""
    method = dice.choice(sorted(METHODS))
    fits.expected(method)
    out = fits.folder / "killed"
    shutil.rmtree(out, ignore_errors=True)
    for _ in range(dice.randint(1, 4)):
        after = dice.uniform(0, 1.1) * fits.seconds[method]
        status = in_child(lambda: fit(fits.options(method, out, resume=True)), kill_after=after)
        if status in (2, 3):
            tally.note("kills", "traceback" if status == 3 else "lost", f"{method}: status {status}")
            return
        broken = [path.name for path in out.rglob("fit.nc") if attempt(lambda path=path: Fit.load(path))[0] != "read"]
        if broken:
            tally.note("kills", "lost", f"{method}: {broken} cannot be read")
            return
        tally.note("kills", "ended before" if status == 0 else "killed")
    status = in_child(lambda: fit(fits.options(method, out, resume=True)))
    partial = [path.name for path in out.rglob("*.partial")]
    if status is None:
        tally.note("fits resumed to the end", "hang", method)
    elif status or partial or not fits.same(method, out):
        tally.note("fits resumed to the end", "lost", f"{method}: status {status}, {partial}")
    else:
        tally.note("fits resumed to the end", "equal to the unbroken one")


def fill_disk(fits, tally, dice):
    """Limit the size of files under a fit that has results already: they stay, or are replaced whole."""
    method = dice.choice(sorted(METHODS))
    fits.expected(method)
    out = fits.folder / "full"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(fits.folder / f"whole-{method}", out)
    limit = int(10 ** dice.uniform(2, 5.5))
    status = in_child(lambda: fit(fits.options(method, out)), limit=limit)
    partial = [path.name for path in out.rglob("*.partial")]
    if status not in (0, 2):
        outcome = "hang" if status is None else "traceback"
    else:
        outcome = "lost" if partial or not fits.same(method, out) else ("written", "refused")[status == 2]
    tally.note("full disks", outcome, f"{method}: limit {limit}, status {status}, {partial}")


def run(*, seed, flips, malformed, kills, disks, seconds=None):
    """Make the rounds; with ``seconds``, batches of them until the time is over."""
    tally, dice = Tally(), random.Random(seed)
    deadline = None if seconds is None else time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fits = Fits(folder)
        while True:
            flip_bits(folder, tally, dice, flips)
            malform(folder, tally, dice, malformed)
            for _ in range(kills):
                kill(fits, tally, dice)
            for _ in range(disks):
                fill_disk(fits, tally, dice)
            if deadline is None or time.monotonic() > deadline:
                return tally


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # and a forked process may compute
    begin = time.monotonic()
    tally = run(seed=options.seed, flips=1000, malformed=1000, kills=5, disks=2, seconds=options.seconds)
    record = {
        "command": f"make faults SECONDS={options.seconds:g} SEED={options.seed}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": f"{platform.machine()}, one core of {os.cpu_count()}",
        "seconds": round(time.monotonic() - begin),
        **tally.as_dict(),
    }
    print(json.dumps(record, indent=2))
    return int(bool(tally.faults))


if __name__ == "__main__":
    sys.exit(main())
