"""Hidden states from three kinds of file, and everything that can be wrong with one."""

import os

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from probattn.errors import InputError
from probattn.models.hidden_states import load_hidden_states

STATES = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)


def write(path, arrays=None, **named):
    if path.suffix == ".npy":
        np.save(path, STATES if arrays is None else arrays, allow_pickle=True)
    elif path.suffix == ".npz":
        np.savez(path, **(named or {"u": STATES}))
    else:
        save_file(named or {"u": STATES}, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_the_same_states_from_every_kind_of_file(tmp_path, suffix):
    found = load_hidden_states(write(tmp_path / f"hidden{suffix}"))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.as_tensor(STATES).double())


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_several_arrays_are_asked_about(tmp_path, suffix):
    path = write(tmp_path / f"hidden{suffix}", layer_0=STATES, layer_1=2 * STATES)
    with pytest.raises(InputError, match=r"holds 2 arrays \(layer_0, layer_1\); name one with --array"):
        load_hidden_states(path)
    torch.testing.assert_close(load_hidden_states(path, array="layer_1"), torch.as_tensor(2 * STATES).double())
    with pytest.raises(InputError, match=r"has no array 'layer_2'; it holds layer_0, layer_1"):
        load_hidden_states(path, array="layer_2")


@pytest.mark.parametrize(("value", "name"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_what_is_not_finite_is_located(tmp_path, value, name):
    states = STATES.copy()
    states[1, 3, 0] = value
    with pytest.raises(
        InputError, match=rf"axes \(sequence, token, feature\) is not finite: {name} at index \(1, 3, 0\)"
    ):
        load_hidden_states(write(tmp_path / "hidden.npy", states))


class Hostile:
    """Would create a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_refused_and_not_executed(tmp_path):
    trap = tmp_path / "executed"
    path = write(tmp_path / "hidden.npy", np.array([Hostile(trap)], dtype=object))
    with pytest.raises(InputError, match="holds pickled objects, which could execute anything"):
        load_hidden_states(path)
    np.savez(tmp_path / "hidden.npz", u=np.array([Hostile(trap)], dtype=object))
    with pytest.raises(InputError, match="holds pickled objects"):
        load_hidden_states(tmp_path / "hidden.npz")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (STATES[0], r"has shape \(5, 2\); it must be \(sequences, T, p\)"),
        (STATES[:, :2], "T is 2; give sequences of at least 3 tokens"),
        (STATES[:0], r"has shape \(0, 5, 2\)"),
        (STATES.astype(int), "holds torch.int64; save floating-point numbers"),
    ],
)
def test_shapes_and_types(tmp_path, states, message):
    with pytest.raises(InputError, match=message):
        load_hidden_states(write(tmp_path / "hidden.npy", states))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_files_cut_short_are_named(tmp_path, suffix):
    path = write(tmp_path / f"hidden{suffix}")
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(InputError, match=rf"hidden{suffix}: (cannot be read|not a complete)"):
        load_hidden_states(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_hidden_states(tmp_path / "missing.npy")
    with pytest.raises(InputError, match=r"the suffix is '.csv'; give one of .npy, .npz, .safetensors"):
        load_hidden_states(tmp_path / "hidden.csv")


@pytest.mark.parametrize("dtype", [">f8", ">f4", "<f2", ">f2", "longdouble"])
def test_other_byte_orders_and_precisions_are_converted_and_said(tmp_path, caplog, dtype):
    caplog.set_level("INFO")
    states = STATES.astype(np.float16).astype(dtype)
    found = load_hidden_states(write(tmp_path / "hidden.npy", states))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.as_tensor(STATES.astype(np.float16)).double(), rtol=0, atol=0)
    assert ("converted" in caplog.text) == (dtype != "<f2")


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (STATES.view(np.uint16).view("V2"), "void data of 2 bytes, as which NumPy saves bfloat16; save float32"),
        (STATES.astype(complex), "holds complex128; save floating-point numbers"),
        (STATES > 0, r"holds torch\.bool; save floating-point numbers"),
        (np.zeros((3, 5), dtype=[("a", "f4"), ("b", "f8")]), "holds records"),
    ],
)
def test_what_is_no_number_is_refused_for_what_it_is(tmp_path, states, message):
    with pytest.raises(InputError, match=message):
        load_hidden_states(write(tmp_path / "hidden.npy", states))


def padded():
    states = STATES.copy()
    states[1, 4:] = 0
    return states


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_padded_sequences_are_cut_to_their_lengths(tmp_path, caplog, suffix):
    caplog.set_level("INFO")
    path = write(tmp_path / f"hidden{suffix}", u=padded(), lengths=np.array([5, 4, 5]))
    torch.testing.assert_close(load_hidden_states(path), torch.as_tensor(STATES[:, :4]).double())
    assert "lengths from 4 to 5; all sequences cut to 4 tokens, which keeps 86 % of the data" in caplog.text


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (np.array([5, 4]), "2 lengths for 3 sequences"),
        (np.array([5, 2, 5]), "the length of sequence 1 is 2; lengths must lie between 3 and T = 5"),
        (np.array([5, 4, 6]), "the length of sequence 2 is 6"),
        (np.array([5.0, 4.0, 5.0]), "holds float64 of shape"),
    ],
)
def test_lengths_that_do_not_fit(tmp_path, lengths, message):
    with pytest.raises(InputError, match=message):
        load_hidden_states(write(tmp_path / "hidden.npz", u=padded(), lengths=lengths))


def test_padding_without_lengths_is_noticed(tmp_path):
    with pytest.raises(InputError, match=r"1 of 3 sequences end in zeros \(sequence 1 in 1 tokens\), as padding does"):
        load_hidden_states(write(tmp_path / "hidden.npy", padded()))
    every = write(tmp_path / "hidden.npz", u=padded(), lengths=np.array([5, 5, 5]))
    torch.testing.assert_close(load_hidden_states(every), torch.as_tensor(padded()).double())  # the zeros are data
    line = np.round(STATES[..., :1])
    line[0, -2:] = 0
    assert load_hidden_states(write(tmp_path / "line.npy", line)).shape == (3, 5, 1)  # a zero or two may be
    line[0, -3:] = 0
    with pytest.raises(InputError, match="as padding does"):
        load_hidden_states(write(tmp_path / "line.npy", line))


def test_a_header_that_promises_more_than_there_is(tmp_path):
    path = write(tmp_path / "hidden.npy")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(3, 5, 2)", b"(3000000000, 50000, 2)").ljust(len(content)))
    with pytest.raises(InputError, match=r"hidden\.npy: cannot be read"):
        load_hidden_states(path)


def test_devices_and_pipes_are_refused_unread(tmp_path):
    (tmp_path / "zero.npy").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.npy")
    for name in ("zero.npy", "pipe.npy"):
        with pytest.raises(InputError, match="not a regular file"):
            load_hidden_states(tmp_path / name)
