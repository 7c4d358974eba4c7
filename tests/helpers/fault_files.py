"""Flipped bits in what runs have written, and malformed files for every reader."""

import io
import time

import numpy as np
import torch
from fault_tally import attempt
from safetensors.numpy import save

from probattn.cli.command import read_settings
from probattn.inference.results.fit_file import Fit
from probattn.inference.runtime.checkpoint import iterate, load_checkpoint, save_checkpoint
from probattn.inference.runtime.checksum import seal
from probattn.models.corpus import load_corpus
from probattn.models.hidden_states import load_hidden_states

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
