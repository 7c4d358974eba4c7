"""Runs that are killed, or whose files meet a limit, and the unbroken ones that they must equal.

A run is a child forked from a process that has everything imported, so that a kill costs the work of the run alone. It
is killed at a moment by the clock, or at one of the moments that matter: before a file is opened for writing, renamed,
linked or removed, and when half of its bytes are written. Figures are written as empty canvases: to draw them is half
of the time of such small runs, and no fault falls into it that does not fall elsewhere.
"""

import importlib
import json
import mmap
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fault_tally import attempt
from matplotlib.figure import Figure
from posteriors import sequences
from safetensors.numpy import load_file

from probattn.errors import InputError
from probattn.inference.fit import FitOptions, MapConfig, NutsConfig, SviConfig, fit
from probattn.inference.language import LanguageFit
from probattn.inference.results.fit_file import Fit
from probattn.inference.runtime.checkpoint import load_checkpoint, previous_checkpoint
from probattn.inference.training.options import TrainOptions
from probattn.inference.training.run import train
from probattn.inference.training.trainer import completed_steps, last_whole_checkpoint
from probattn.inference.verify import VerifyOptions, verify
from probattn.models.language import LanguageConfig

TEXT = "the cat sat on the mat. a dog ran to the cat, and the mat sat still.\n" * 12
METHODS = {
    "nuts": NutsConfig(chains=2, warmup=20, draws=4, checkpoint_every=2, max_depth=2),
    "svi": SviConfig(steps=30, window=5, stages=2, draws=8, particles=1),
    "map": MapConfig(steps=32, patience=0, checkpoint_every=2),
}
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime")
TIMES += ("eval_samples_per_second", "eval_steps_per_second")
HANG = 300  # seconds
for _imported_late in ("arviz_base", "arviz_stats", "h5netcdf", "pandas", "xarray"):
    importlib.import_module(_imported_late)  # once here, not in every child
_WRITES = os.O_WRONLY | os.O_RDWR


@dataclass(frozen=True)
class Whole:
    """An unbroken run: its results, how long it took, and how many moments it has to be killed at."""

    results: dict
    seconds: float
    moments: int


class FitRun:
    """``probattn fit`` by one of the methods."""

    def __init__(self, folder, method):
        self.data, self.method = folder / "hidden.npy", METHODS[method]
        np.save(self.data, sequences()[:2, :4].numpy())

    def __call__(self, out, resume):
        fit(FitOptions(data=self.data, method=self.method, out=out, device="cpu", resume=resume))

    def results(self, out):
        """Every array and every word of the results."""
        arrays = arrays_of(out / "fit.nc")
        return arrays | {name: (out / name).read_text(encoding="utf-8") for name in ("summary.csv", "diagnosis.json")}

    progress = staticmethod(lambda out: steps_saved(out))


class VerifyRun:
    """``probattn verify`` of one claim on a small model."""

    def __init__(self, folder):
        self.corpus = folder / "text.txt"
        self.corpus.write_text(TEXT, encoding="utf-8")

    def __call__(self, out, resume):
        verify(
            VerifyOptions(
                corpus=str(self.corpus),
                claims=("barrier",),
                model=LanguageConfig(1, context=6, dim=4, decoder_heads=2, layers=1, stage_rank=2),
                fit=LanguageFit(steps=24, checkpoint_every=2, batch=4, evaluate_every=6, patience=0),
                out=out,
                device="cpu",
                resume=resume,
            )
        )

    def results(self, out):
        """Every array, and the claims without the time that they took; the report is there."""
        claims = json.loads((out / "claims.json").read_text(encoding="utf-8"))["claims"]
        for claim in claims:
            del claim["seconds"]
        report = (out / "report.html").read_text(encoding="utf-8")
        return arrays_of(out / "fit.nc") | {"claims": claims, "report ends": report.rstrip().endswith("</html>")}

    progress = staticmethod(lambda out: steps_saved(out))


class TrainRun:
    """``probattn train`` of a model with one layer."""

    def __init__(self, folder):
        self.corpus = folder / "text.txt"
        self.corpus.write_text(TEXT, encoding="utf-8")

    def __call__(self, out, resume):
        small = {"layers": 1, "dim": 8, "heads": 2, "context": 8, "batch": 4, "evaluate_windows": 4, "warmup": 2}
        often = {"steps": 14, "save_every": 2, "evaluate_every": 6, "log_every": 4}
        train(TrainOptions(corpus=str(self.corpus), out=out, device="cpu", resume=resume, **small, **often))

    def results(self, out):
        """The weights, and the lines of metrics without the time that they took."""
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        kept = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
        return load_file(out / "model" / "model.safetensors") | {"metrics": kept}

    @staticmethod
    def progress(out):
        checkpoint = last_whole_checkpoint(out)
        return -1 if checkpoint is None else completed_steps(checkpoint)


class Runs:
    """Runs of the commands by name, and the unbroken ones."""

    def __init__(self, folder):
        self.folder = folder
        self.by_name = {method: FitRun(folder, method) for method in METHODS}
        self.by_name |= {"train": TrainRun(folder), "verify": VerifyRun(folder)}
        self._whole = {}

    def whole(self, name):
        if name not in self._whole:
            out = self.folder / f"whole-{name}"
            begin, counter = time.monotonic(), mmap.mmap(-1, 8)
            status = in_child(lambda: self.by_name[name](out, resume=False), out=out, counter=counter)
            assert status == 0, f"{name}: the unbroken run ended with status {status}"
            seconds = time.monotonic() - begin
            self._whole[name] = Whole(self.by_name[name].results(out), seconds, int.from_bytes(counter[:8], "little"))
        return self._whole[name]

    def difference(self, name, out):
        """Name of the first result that is missing or differs from the unbroken run's; empty if there is none."""
        expected = self.whole(name).results
        try:
            found = self.by_name[name].results(out)
        except (OSError, KeyError, ValueError, InputError) as error:
            return f"{type(error).__name__}: {error}"
        if set(found) != set(expected):
            return str(sorted(set(found) ^ set(expected)))
        return next((key for key in sorted(found) if not same(found[key], expected[key])), "")


def arrays_of(path):
    return {f"{group}.{name}": value for group, part in Fit.load(path).groups.items() for name, value in part.items()}


def same(one, other):
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return one == other


def steps_saved(out):
    """Steps in the last checkpoint that can be read; -1 where there is none."""
    for path in (path for path in sorted(out.glob("*.pt")) if ".previous" not in path.name):
        for candidate in (path, previous_checkpoint(path)):
            try:
                return int(load_checkpoint(candidate)["state"]["step"])
            except InputError:
                continue
    return -1


def unreadable(out):
    """Finished files that cannot be read, in the folder of a killed run."""
    readers = {
        ".nc": Fit.load,
        ".pt": load_checkpoint,
        ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    }
    broken = []
    for path in out.rglob("*"):
        inside = path.relative_to(out).parts
        if any(part.endswith(".partial") or part.startswith("checkpoint-") for part in inside):
            continue
        if path.suffix in readers and attempt(lambda path=path: readers[path.suffix](path))[0] != "read":
            broken.append(str(path.relative_to(out)))
    if (out / "model").exists() and attempt(lambda: load_file(out / "model" / "model.safetensors"))[0] != "read":
        broken.append("model")
    return broken


def in_child(work, *, out, limit=None, kill_after=None, kill_at=None, counter=None):
    """Run in a forked process; returns its status: 0, 2 (an InputError), 3 (a traceback), -9 (killed), None (hung).

    ``kill_after`` is a time in seconds, ``kill_at`` the number of a moment in the writing of files below ``out``, which
    ``counter``, memory that is shared with the child, counts.
    """
    child = os.fork()
    if child == 0:
        status = 3
        try:
            Figure.draw = lambda self, renderer: None
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            if kill_at is not None or counter is not None:
                watch_writing(out, kill_at, counter)
            work()
            status = 0
        except InputError as error:
            status = 2 if "\n" not in str(error) else 3
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            os._exit(status)
    deadline = time.monotonic() + (HANG if kill_after is None else kill_after)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return os.waitstatus_to_exitcode(status) if kill_after is not None else None
        time.sleep(0.002)


def watch_writing(out, kill_at, counter):
    """Count the moments in the writing of files below a folder, and die by SIGKILL at one of them."""
    passed = 0
    place = str(out)

    def pass_moment():
        nonlocal passed
        passed += 1
        if counter is not None:
            counter[:8] = passed.to_bytes(8, "little")
        if passed == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hear(event, arguments):
        if event == "open":
            _, mode, flags = arguments
            writes = set(mode) & set("wax+") if isinstance(mode, str) else flags & _WRITES
            if not writes:
                return
        elif event not in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"):
            return
        if isinstance(arguments[0], (str, os.PathLike)) and str(arguments[0]).startswith(place):
            pass_moment()

    def write_bytes_in_halves(self, data):
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            if str(self).startswith(place):
                pass_moment()
            return len(data) // 2 + file.write(data[len(data) // 2 :])

    Path.write_bytes = write_bytes_in_halves
    sys.addaudithook(hear)


def kill(runs, name, tally, dice, *, strikes=8):
    """Kill a run again and again until it ends; then it is the unbroken one, and nothing half written is left.

    After every kill what is there can be read, and no step that was saved is lost.
    """
    run, whole = runs.by_name[name], runs.whole(name)
    out = runs.folder / "killed"
    shutil.rmtree(out, ignore_errors=True)
    status, before = None, -1
    for strike in range(dice.randint((strikes + 1) // 2, strikes)):
        left = 0.85**strike  # of the work, where the strikes before fell early
        moment = {"kill_after": dice.uniform(0, left) * whole.seconds}
        if dice.random() < 0.6:
            moment = {"kill_at": dice.randint(1, max(1, round(left * whole.moments)))}
        status = in_child(lambda: run(out, resume=True), out=out, **moment)
        if status in (2, 3):
            tally.note("kills", "traceback" if status == 3 else "lost", f"{name}: status {status}, {moment}")
            return
        if broken := unreadable(out):
            tally.note("kills", "lost", f"{name}: {broken} cannot be read, {moment}")
            return
        saved = run.progress(out)
        if saved < before:
            tally.note("kills", "lost", f"{name}: {saved} steps saved after {before}, {moment}")
            return
        before = saved
        if status == 0:
            tally.note("runs that ended before their kill", "whole")
            break
        tally.note("kills", f"of {name}")
    if status != 0:
        status = in_child(lambda: run(out, resume=True), out=out)
    partial = [path.name for path in out.rglob("*.partial")]
    different = "" if status else runs.difference(name, out)
    if status is None:
        tally.note("runs resumed to the end", "hang", name)
    elif status or partial or different:
        tally.note("runs resumed to the end", "lost", f"{name}: status {status}, {partial}, {different} differs")
    else:
        tally.note("runs resumed to the end", f"equal to the unbroken {name}")


def fill_disk(runs, name, tally, dice):
    """Limit the size of files under a run; what was there before stays, and without the limit the run ends whole."""
    run = runs.by_name[name]
    runs.whole(name)
    out = runs.folder / "full"
    shutil.rmtree(out, ignore_errors=True)
    again = name != "train"  # which refuses the folder of an earlier training
    if again:
        shutil.copytree(runs.folder / f"whole-{name}", out)
    limit = int(10 ** dice.uniform(2, 5.5))
    status = in_child(lambda: run(out, resume=False), out=out, limit=limit)
    partial = [path.name for path in out.rglob("*.partial")]
    words = f"{name}: limit {limit}, status {status}, {partial}"
    if status not in (0, 2):
        tally.note("full disks", "hang" if status is None else "traceback", words)
        return
    lost = unreadable(out) or partial or (again and runs.difference(name, out))
    if not lost and status == 2:
        status = in_child(lambda: run(out, resume=True), out=out)
        lost = status or runs.difference(name, out)
        tally.note("full disks", "lost" if lost else "refused, and resumed whole", f"{words}, {lost}")
    else:
        tally.note("full disks", "lost" if lost else "written", f"{words}, {lost}")
