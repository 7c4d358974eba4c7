"""Iterations that go on from where they were stopped, and refuse what is not theirs."""

import io
import os
import signal

import pytest
import torch
from torch import nn

from probattn.errors import InputError
from probattn.inference.runtime import checkpoint as module
from probattn.inference.runtime.checkpoint import (
    identify,
    iterate,
    load_checkpoint,
    previous_checkpoint,
    save_checkpoint,
)
from probattn.inference.runtime.checksum import DamagedFileError, seal


def write_sealed(path, content):
    """A file with a right checksum and any content."""
    written = io.BytesIO()
    torch.save(content, written)
    path.write_bytes(seal(written.getvalue()))


class Sum:
    """A state that adds up the numbers of its steps."""

    def __init__(self):
        self.step, self.total, self.saved = 0, torch.zeros(()), 0

    def state_dict(self):
        self.saved += 1
        return {"step": self.step, "total": self.total}

    def load_state_dict(self, content):
        self.step, self.total = content["step"], content["total"]


def add(state):
    state.step += 1
    state.total = state.total + state.step


def run(path, *, steps=7, update=add, resume=False, save_every=3, identity=None):
    state = Sum()
    iterate(
        state,
        update,
        lambda state: state.step >= steps,
        save_every=save_every,
        checkpoint=path,
        resume=resume,
        identity={"name": "sum"} if identity is None else identity,
    )
    return state


def test_saved_now_and_then_and_at_the_end(tmp_path):
    path = tmp_path / "state.pt"
    seen = []

    def watch(state):
        add(state)
        seen.append(load_checkpoint(path)["state"]["step"] if path.exists() else None)

    state = run(path, update=watch)
    assert seen == [None, None, None, 3, 3, 3, 6]
    assert load_checkpoint(path)["state"] == {"step": 7, "total": 28.0}
    assert (state.step, float(state.total), state.saved) == (7, 28, 3)
    assert run(None).saved == 0  # none is kept where none is asked for


def test_goes_on_only_where_it_is_asked_to(tmp_path):
    path = tmp_path / "state.pt"
    run(path, steps=4)
    taken = []

    def watch(state):
        add(state)
        taken.append(state.step)

    assert float(run(path, update=watch, resume=True).total) == 28
    assert taken == [5, 6, 7]
    taken.clear()
    run(path, update=watch, resume=True)
    assert taken == []  # finished already
    run(path, update=watch)
    assert taken == list(range(1, 8))
    assert float(run(tmp_path / "none.pt", resume=True).total) == 28  # nothing to go on from
    assert float(run(None, resume=True).total) == 28


def test_an_interrupt_waits_for_the_end_of_the_step_and_saves(tmp_path):
    path = tmp_path / "state.pt"
    before = signal.getsignal(signal.SIGINT)

    def press(state):
        if state.step == 4:
            signal.raise_signal(signal.SIGINT)
        add(state)

    with pytest.raises(KeyboardInterrupt):
        run(path, update=press, save_every=100)
    assert load_checkpoint(path)["state"] == {"step": 5, "total": 15.0}
    assert signal.getsignal(signal.SIGINT) is before
    assert float(run(path, resume=True).total) == 28
    with pytest.raises(KeyboardInterrupt):  # also where nothing is kept
        run(None, update=press)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "rank", lambda: 1)
    run(tmp_path / "state.pt")
    assert list(tmp_path.iterdir()) == []


def test_another_run_is_refused_and_the_difference_named(tmp_path):
    path = tmp_path / "state.pt"
    run(path, identity={"seed": 0, "dim": 2, "model": "A"})
    for other, words in (
        ({"seed": 1, "dim": 2, "model": "A"}, "seed is 0 there and 1 here"),
        ({"seed": 0, "model": "A"}, "dim is 2 there and None here"),
        ({"seed": 0, "dim": 2, "model": "A", "wide": True}, "wide is None there and True here"),
        ({"seed": 1, "dim": 3, "model": "B"}, "model is 'A' there and 'B' here"),  # the model before anything else
        ({"seed": 1, "dim": 3, "model": "A"}, "dim is 2 there and 3 here"),  # then by the alphabet
    ):
        with pytest.raises(InputError, match=f"of another fit: {words}; use the same options, another --out, or omit"):
            run(path, resume=True, identity=other)
    assert run(path, resume=True, identity={"model": "A", "dim": 2, "seed": 0}).step == 7


class Wrong(Sum):
    def load_state_dict(self, content):
        raise RuntimeError("Error in loading state_dict\nwith a second line")


def test_a_state_that_does_not_fit_is_an_input_error(tmp_path):
    path = tmp_path / "state.pt"
    run(path)
    with pytest.raises(InputError, match=r"does not fit the model \(Error in loading state_dict\)"):
        iterate(Wrong(), add, bool, save_every=1, checkpoint=path, resume=True, identity={"name": "sum"})
    save_checkpoint(path, {"name": "sum"}, {"state": {"step": 3}})
    with pytest.raises(InputError, match=r"does not fit the model \(state has no total\)"):
        run(path, resume=True)


@pytest.mark.parametrize("content", [{"schema": 1, "identity": {}}, [1, 2], {"state": 3}])
def test_what_is_no_checkpoint_of_this_version(tmp_path, content):
    path = tmp_path / "state.pt"
    write_sealed(path, content)
    with pytest.raises(InputError, match="not a checkpoint of this version; delete it and start anew"):
        load_checkpoint(path)


def test_what_cannot_be_read(tmp_path):
    path = tmp_path / "state.pt"
    save_checkpoint(path, {}, {"x": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"cannot be read \(.+\); delete it and start anew"):
        load_checkpoint(path)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("executed",))

    path = tmp_path / "state.pt"
    write_sealed(path, {"schema": 3, "identity": {}, "state": Bomb()})
    with pytest.raises(InputError, match="cannot be read"):
        load_checkpoint(path)


def test_what_tells_models_and_data_apart():
    class Model(nn.Module):
        def __init__(self, **attributes):
            super().__init__()
            for name, value in attributes.items():
                setattr(self, name, value)

    data = (torch.zeros(3, 2), torch.arange(3))
    same = identify(Model(width=2, name="a", _private=1, tensor=torch.ones(1)), data)
    assert same == identify(Model(width=2, name="a", _private=2, tensor=torch.zeros(1)).eval(), data)
    assert same["model"] == "Model [('name', 'a'), ('width', 2)]"
    assert identify(Model(width=3, name="a"), data)["model"] != same["model"]
    for other in (
        (torch.zeros(3, 2), torch.arange(1, 4)),
        (torch.zeros(2, 3), torch.arange(3)),
        (torch.zeros(3, 2), torch.arange(3, dtype=torch.int32)),
        (torch.zeros(3, 2),),
        (torch.zeros(3, 2).mT, torch.arange(3)),
    ):
        assert identify(Model(), other)["data"] != same["data"]
    assert identify(Model(), (torch.zeros(2, 3).mT, torch.arange(3)))["data"] == same["data"]  # laid out otherwise


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(tmp_path, caplog, damage):
    path = tmp_path / "state.pt"
    run(path)  # checkpoints at 3, 6 and 7
    whole = path.read_bytes()
    flipped = bytes([whole[len(whole) // 2] ^ 1])
    path.write_bytes(
        {"flip": whole[: len(whole) // 2] + flipped + whole[len(whole) // 2 + 1 :], "cut": whole[:-9]}.get(damage, b"")
    )
    with pytest.raises(DamagedFileError, match=r"state\.pt: cannot be read \(.+\); delete it and start anew"):
        load_checkpoint(path)
    assert load_checkpoint(previous_checkpoint(path))["state"]["step"] == 6
    steps = []
    state = run(path, resume=True, update=lambda state: (steps.append(state.step), add(state)))
    assert steps == [6]  # the one step after the checkpoint before the last
    assert float(state.total) == 28
    assert [record.getMessage() for record in caplog.records] == [
        f"checkpoint {path} is damaged; going on from the one before, state.previous.pt"
    ]


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "state.pt"
    save_checkpoint(path, {"a": 1}, {"x": torch.zeros(3)})
    whole = path.read_bytes()
    for k in range(0, len(whole), 7):
        path.write_bytes(whole[:k] + bytes([whole[k] ^ (1 << k % 8)]) + whole[k + 1 :])
        with pytest.raises(DamagedFileError):
            load_checkpoint(path)


def test_both_checkpoints_damaged_is_one_line(tmp_path):
    path = tmp_path / "state.pt"
    run(path)
    for file in (path, previous_checkpoint(path)):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"state\.previous\.pt: cannot be read"):
        run(path, resume=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"schema": 3, "state": {}}, "does not say of which run"),
        ({"schema": 3, "identity": [], "state": {}}, "does not say of which run"),
        ({"schema": 3, "identity": {"name": "sum"}}, "state is NoneType, not a mapping"),
        ({"schema": 3, "identity": {"name": "sum"}, "state": {"step": 3}}, "state has no total"),
        (
            {"schema": 3, "identity": {"name": "sum"}, "state": {"step": "3", "total": torch.zeros(())}},
            "state.step is str",
        ),
        (
            {"schema": 3, "identity": {"name": "sum"}, "state": {"step": 2.5, "total": torch.zeros(())}},
            "not an integer",
        ),
        (
            {"schema": 3, "identity": {"name": "sum"}, "state": {"step": 3, "total": 6}},
            "state.total is int, not a tensor",
        ),
        ({"schema": 3, "identity": {"name": "sum"}, "state": {"step": 3, "total": torch.zeros(2)}}, "here"),
    ],
)
def test_missing_and_mistyped_fields_are_one_line(tmp_path, content, words):
    path = tmp_path / "state.pt"
    write_sealed(path, content)
    with pytest.raises(InputError, match=words) as caught:
        run(path, resume=True)
    assert "\n" not in str(caught.value)


def test_a_pipe_for_a_checkpoint_is_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "state.pt")
    with pytest.raises(InputError, match="a pipe, not a regular file"):
        load_checkpoint(tmp_path / "state.pt")


def test_sigterm_and_sighup_are_as_ctrl_c(tmp_path):
    for number in (signal.SIGTERM, signal.SIGHUP):
        path = tmp_path / f"{number}.pt"

        def press(state, number=number):
            add(state)
            if state.step == 2:
                os.kill(os.getpid(), number)

        before = signal.signal(number, lambda *_: pytest.fail("not deferred"))
        try:
            with pytest.raises(KeyboardInterrupt):
                run(path, update=press)
        finally:
            signal.signal(number, before)
        assert load_checkpoint(path)["state"]["step"] == 2
