"""Texts of every shape, positions, precisions and controls of margins; padding, packing, windows, prefixes."""

import logging

import numpy as np
import pytest
import torch
from layer_zoo import Exact, own_blocks, own_mean, tiny

from probattn.errors import InputError
from probattn.hf.controls import shuffled
from probattn.hf.layers import attention_layer
from probattn.hf.margins import margins
from probattn.hf.streams import Text, text_streams

IDS = torch.randint(16, (1, 9), generator=torch.Generator().manual_seed(3))
FEW = {"kinds": ("logabsdet", "complex")}


@pytest.fixture(params=["gpt2", "llama", "gemma3"])
def model(request):
    return tiny(request.param)


def same(one, other, names=None, atol=1e-6):
    # The model's own norms and its softmax go through float32 where the length of a row decides about their rounding.
    for name in names or other.data_vars:
        np.testing.assert_allclose(one[name], other[name], atol=atol, rtol=1e-5, err_msg=name)


def test_lists_arrays_and_tensors_are_the_same(model):
    expected = margins(model, IDS, **FEW)
    for given in (IDS.tolist(), IDS.numpy(), IDS[0], IDS.int(), IDS[0].numpy(), tuple(IDS[0].tolist())):
        same(margins(model, given, **FEW), expected)


def test_a_text_of_one_token(model):
    found = margins(model, [[5]], attribution=True)
    assert found.sizes["token"] == 1
    assert found.surprisal.isnull().all()
    for name in ("logabsdet", "sigma_min", "spectral", "complex", "update_complex", "entropy"):
        assert np.isfinite(found[name]).all()
    same(found, margins(model, IDS[:, :1] * 0 + 5, attribution=True))


def test_packed_sequences_are_measured_each_by_itself(model):
    numbers = [[0, 0, 0, 0, 3, 3, 3, -1, 1]]
    found = margins(model, IDS, sequence_ids=numbers, attribution=True)
    for part in (slice(0, 4), slice(4, 7), slice(8, 9)):
        alone = margins(model, IDS[:, part], attribution=True)
        same(found.isel(token=part), alone)
    assert found.logabsdet[..., 7].isnull().all()
    assert found.past[0].values.tolist()[:7] == [0, 1, 2, 3, 0, 1, 2]
    np.testing.assert_array_equal(found.input_ids, IDS)
    some = margins(model, IDS, sequence_ids=numbers, positions=[2, 5, 7], attribution=True)
    same(some, found.sel(token=[2, 5, 7]))
    together = margins(model, IDS)
    assert not np.allclose(together.logabsdet[..., 4:7], found.logabsdet[..., 4:7], atol=1e-3)  # the control


@pytest.mark.parametrize("stride", [None, 2, 5])
def test_windows_measure_each_token_behind_enough_of_its_past(model, stride):
    found = margins(model, IDS, window=5, stride=stride)
    step = stride or 2
    same(found.isel(token=slice(0, 5)), margins(model, IDS[:, :5]))
    last = margins(model, IDS[:, 4:])  # the window of the last token begins 5 before the end
    same(found.isel(token=slice(8, 9)), last.isel(token=slice(4, 5)))
    assert found.past.values[0].tolist()[:5] == [0, 1, 2, 3, 4]
    assert found.past.values[0][5:].min() >= 5 - step
    assert (found.attrs["window"], found.attrs["stride"]) == (5, step)
    np.testing.assert_array_equal(found.token, np.arange(9))
    np.testing.assert_array_equal(found.input_ids, IDS)
    part = margins(model, IDS, window=5, stride=stride, positions=[1, 7])
    same(part, found.sel(token=[1, 7]))
    whole = margins(model, IDS, window=9)
    same(whole, margins(model, IDS))
    assert (
        not np.allclose(whole.logabsdet[..., 5:], found.logabsdet[..., 5:], atol=1e-4)
        or model.config.model_type == "gemma3"
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "mistral"])
def test_a_prefix_that_looks_ahead_is_that_of_the_model(family):
    model = tiny(family)
    with Exact():
        text = Text(IDS, prefix=torch.tensor([4]))
        streams, _ = text_streams(model, text)
        found = margins(model, IDS, prefix_length=4, kinds=("logabsdet",))
        causal = margins(model, IDS, kinds=("logabsdet",))
        hidden = torch.ones(9, 9).tril()
        hidden[:4, :4] = 1
        if family in {"gemma3", "mistral"}:
            width = 3
            kinds = getattr(model.config, "layer_types", None)
            if family == "mistral" or kinds[1] != "full_attention":
                hidden = torch.ones(9, 9).tril().triu(1 - width)
                hidden[:4, :4] = 1
        mask = torch.zeros(1, 1, 9, 9, dtype=torch.float64).masked_fill(hidden[None, None] == 0, -1e300)

        def mean(u):
            return own_mean(model, 1, u.unsqueeze(0), attention_mask=mask).squeeze(0)

        whole = torch.autograd.functional.jacobian(mean, streams[1][0].detach())
    if family == "gemma3":
        return  # takes one mask per kind of layer; the agreement is checked by margins itself
    blocks = torch.eye(16, dtype=torch.float64) - torch.stack([whole[i, :, i] for i in range(9)])
    np.testing.assert_allclose(found.logabsdet[0].sel(layer=1), torch.linalg.slogdet(blocks)[1], atol=1e-7)
    assert not np.allclose(found.logabsdet[0].sel(layer=1)[:3], causal.logabsdet[0].sel(layer=1)[:3], atol=1e-4)


def test_a_model_that_does_not_look_ahead_is_refused(monkeypatch):
    from probattn.hf import streams

    monkeypatch.setattr(streams, "_four_axes", lambda model, text: None)
    with pytest.raises(InputError, match="does not take a mask that looks ahead"):
        margins(tiny("llama"), IDS, prefix_length=4)


def test_positions_by_a_share_are_drawn_by_seed(model):
    some = margins(model, IDS, positions=0.34, seed=1, **FEW)
    assert some.sizes["token"] == 3
    same(some, margins(model, IDS, positions=0.34, seed=1, **FEW))
    assert any(
        margins(model, IDS, positions=0.34, seed=s, **FEW).token.values.tolist() != some.token.values.tolist()
        for s in (2, 3)
    )
    same(some, margins(model, IDS, **FEW).sel(token=some.token))
    assert margins(model, IDS, positions=1e-9, **FEW).sizes["token"] == 1
    later = margins(model, IDS, **FEW).sel(token=slice(4, None))
    assert later.token.values.tolist() == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single_and_said(half, caplog):
    model = tiny("llama", half)
    with caplog.at_level(logging.INFO, logger="probattn.hf.margins"):
        found = margins(model, IDS)
    assert "margins are computed in float32" in caplog.text
    assert (found.attrs["dtype"], found.attrs["model_dtype"]) == ("float32", str(half).removeprefix("torch."))
    assert found.logabsdet.dtype == np.float32
    full = margins(model.to(torch.float64), IDS)
    assert np.median(np.abs(found.logabsdet - full.logabsdet)) < 0.1  # the streams are those of the half precision
    double = margins(tiny("llama", half), IDS, dtype=torch.float64)
    assert double.logabsdet.dtype == np.float64
    np.testing.assert_allclose(double.logabsdet, found.logabsdet, atol=1e-3)


def test_controls_do_what_they_say(model):
    own = margins(model, IDS, attribution=True)
    shuffle = margins(model, IDS, control="shuffled_text", seed=2)
    order = shuffle.input_ids.values[0]
    assert sorted(order) == sorted(IDS[0].tolist())
    assert order.tolist() != IDS[0].tolist()
    same(shuffle, margins(model, order[None]))

    exchanged = margins(model, IDS, control="exchanged_output")
    np.testing.assert_allclose(exchanged.rms, own.rms)
    layers = [attention_layer(model, number, check=False).detach() for number in (0, 1)]
    mixed = layers[0].sublayer._replace(output=layers[1].sublayer.output, output_bias=layers[1].sublayer.output_bias)
    streams, _ = text_streams(model, Text(IDS))
    import dataclasses

    expected = dataclasses.replace(layers[0], read=lambda: mixed).logabsdet(streams[0])[1]
    np.testing.assert_allclose(exchanged.logabsdet.sel(layer=0), expected, atol=1e-8)

    all_turned = margins(model, IDS, control="turned_outputs", seed=4)
    one_turned = margins(model, IDS, control="turned_output", seed=4)
    same(all_turned.isel(layer=[0]), one_turned.isel(layer=[0]), names=["logabsdet", "sigma_min", "rms"])  # same stream
    assert not np.allclose(all_turned.rms.sel(layer=1), own.rms.sel(layer=1))
    assert not np.allclose(all_turned.surprisal[:, 1:], own.surprisal[:, 1:])
    np.testing.assert_allclose(one_turned.rms, own.rms)
    same(margins(model, IDS, attribution=True), own)  # the model is what it was
    for found, name in ((shuffle, "shuffled_text"), (all_turned, "turned_outputs"), (exchanged, "exchanged_output")):
        assert found.attrs["control"] == name


def test_turned_outputs_are_a_model_that_agrees_with_its_own_code():
    model = tiny("llama")
    from probattn.hf.controls import controlled_layer, turned_model

    layer = controlled_layer(model, 1, 2, "turned_outputs", 3)
    with Exact(), turned_model(model, 2, 3):
        u = text_streams(model, Text(IDS))[0][1][0]
        blocks = own_blocks(model, 1, u).detach()
        torch.testing.assert_close(layer.mean_jacobian(u.unsqueeze(0))[0], blocks, rtol=0, atol=1e-9)


def test_a_mark_of_the_beginning_and_padding_stay_where_they_are():
    model = tiny("llama")
    model.config.bos_token_id = 1
    ids = torch.tensor([[1, *range(2, 10)], [0, 0, 1, *range(4, 10)]])
    mask = torch.tensor([[1] * 9, [0, 0] + [1] * 7])
    found = shuffled(model, Text(ids, mask), seed=0)
    assert found.ids[:, 0].tolist() == [1, 0]
    assert found.ids[1, :3].tolist() == [0, 0, 1]
    for row, start in zip(found.ids, (1, 3), strict=True):
        assert sorted(row[start:].tolist()) != row[start:].tolist()
    assert sorted(found.ids[1].tolist()) == sorted(ids[1].tolist())


def test_provenance(model):
    found = margins(model, IDS, positions=[0], seed=7, **FEW)
    attributes = found.attrs
    assert attributes["model_type"] == model.config.model_type
    assert attributes["seed"] == 7
    assert attributes["device"] == "cpu"
    assert attributes["tolerance_eigenvalues"] == 1e-9
    assert len(attributes["weights_sha256"]) == 16
    parameter = next(model.parameters())
    with torch.no_grad():
        parameter.add_(0.01)
    assert margins(model, IDS, positions=[0], **FEW).attrs["weights_sha256"] != attributes["weights_sha256"]


def test_a_parameter_that_is_not_finite_is_named(model):
    name, parameter = list(model.named_parameters())[-2]
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nan
    with pytest.raises(InputError, match=f"parameter {name} of the model is not finite"):
        margins(model, IDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[1, 2], [3]]}, "input_ids is a ragged list"),
        ({"input_ids": [[1.5]]}, "input_ids is torch.float64; it must hold whole numbers"),
        ({"input_ids": {"input_ids": [1]}}, "input_ids is dict"),
        ({"past_key_values": ()}, "past_key_values is given; a cache has keys and values but no residual stream"),
        ({"window": 1}, "window"),
        ({"stride": 3}, "stride is given without window"),
        ({"window": 4, "stride": 5}, "stride is 5; it must lie between 1 and window = 4"),
        ({"window": 4, "prefix_length": 2}, "window does not go together"),
        ({"positions": 0.0}, "positions is 0.0; a share"),
        ({"positions": 1.5}, "positions is 1.5; a share"),
        ({"positions": [9]}, r"positions is \[9\]"),
        ({"layers": "all"}, "layers is all"),
        ({"dtype": torch.bfloat16}, "dtype is torch.bfloat16"),
        ({"sequence_ids": [[0, 1, 0, 0, 0, 0, 0, 0, 0]]}, "come back"),
        ({"sequence_ids": [[-1] * 9]}, "there is no token"),
        ({"sequence_ids": [[0, 1]]}, r"sequence_ids has shape \(1, 2\); it must be \(1, 9\)"),
        ({"sequence_ids": [[0] * 8 + [-1]], "positions": [8]}, "padding only"),
        ({"sequence_ids": [[0] * 9], "prefix_length": 2}, "sequence_ids does not go together"),
        ({"position_ids": [[-1] * 9]}, "position_ids go down to -1"),
        ({"prefix_length": 10}, "prefix_length is .* between 0 and T = 9"),
        ({"attention_mask": [[0] + [1] * 8], "prefix_length": 2}, "prefix_length does not go together with padding"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        margins(tiny("llama"), **{"input_ids": IDS, **arguments})


def test_a_text_longer_than_the_model_takes_is_cut_into_windows():
    model = tiny("gpt2")
    ids = torch.randint(16, (1, 40), generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        InputError, match=r"input_ids has 40 tokens; the model takes 32\. Cut the text into windows: window=32"
    ):
        margins(model, ids)
    assert margins(model, ids, window=32, **FEW).sizes["token"] == 40


def test_positions_are_those_of_the_model():
    model = tiny("gpt2")
    moved = margins(model, IDS, position_ids=(torch.arange(9) + 5).unsqueeze(0), **FEW)
    ids = torch.cat([torch.zeros(1, 5, dtype=torch.long), IDS], 1)
    mask = torch.tensor([[0] * 5 + [1] * 9])
    assert not np.allclose(moved.rms, margins(model, IDS, **FEW).rms)
    # positions behind five tokens of padding that count, as position_ids say
    same(
        margins(model, ids, attention_mask=mask, position_ids=torch.arange(14).unsqueeze(0), **FEW).isel(
            token=slice(5, None)
        ),
        moved,
        names=["logabsdet", "complex", "rms"],
    )
