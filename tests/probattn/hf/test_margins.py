"""Margins of a language model against automatic differentiation of its own code; padding, controls, bad input."""

import numpy as np
import pytest
import torch
from layer_zoo import FAMILIES, Exact, own_blocks, own_run, tiny

from probattn.errors import InputError
from probattn.hf.margins import margins

IDS = torch.randint(16, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[name for name in ("gpt2", "llama", "qwen3", "gemma3") if name in FAMILIES])
def model(request):
    return tiny(request.param)


def test_every_number_is_that_of_the_models_own_code(model):
    with Exact():
        found = margins(model, IDS, attribution=True)
        for number in found.layer.values.tolist():
            stream = own_run(model, number, IDS)[0].detach()
            blocks = torch.stack([own_blocks(model, number, one) for one in stream]).detach()  # (sequences, T, p, p)
            for sign, prefix in ((1, ""), (-1, "update_")):
                whole = torch.eye(blocks.shape[-1]) - sign * blocks
                at = found.sel(layer=number)
                expected_sign, logabs = torch.linalg.slogdet(whole)
                values = torch.linalg.eigvals(whole)
                assert np.array_equal(at[f"{prefix}sign"], expected_sign)
                np.testing.assert_allclose(at[f"{prefix}logabsdet"], logabs, atol=1e-8)
                np.testing.assert_allclose(at[f"{prefix}sigma_min"], torch.linalg.svdvals(whole)[..., -1], atol=1e-8)
                np.testing.assert_allclose(at[f"{prefix}complex"], values.real.amin(-1), atol=1e-7)
            trace = -torch.linalg.solve(torch.eye(blocks.shape[-1]) - blocks, blocks).diagonal(dim1=-2, dim2=-1).sum(-1)
            np.testing.assert_allclose(at.attribution.sum("head"), trace, atol=1e-7)
            np.testing.assert_allclose(at.rms, stream.square().mean(-1).sqrt(), atol=1e-10)


def test_what_the_model_predicts_stands_beside(model):
    found = margins(model, IDS, kinds=("logabsdet",), layers=[1], positions=[0, 3, 6])
    with torch.no_grad():
        log_p = model(IDS).logits.float().log_softmax(-1)
    assert np.isnan(found.surprisal[:, 0]).all()
    expected = -log_p[:, 2].gather(-1, IDS[:, 3:4]).squeeze(-1)
    np.testing.assert_allclose(found.surprisal.sel(token=3), expected, rtol=1e-5)
    np.testing.assert_allclose(found.entropy.sel(token=6), -(log_p[:, 6].exp() * log_p[:, 6]).sum(-1), rtol=1e-5)
    assert found.sizes == {"sequence": 2, "layer": 1, "token": 3}
    np.testing.assert_allclose(found.sink.sel(token=0), 1.0)  # the first token sees itself alone
    assert ((found.sink >= 0) & (found.sink <= 1 + 1e-6)).all()  # zero behind a window


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_has_no_numbers(model, side):
    alone = margins(model, IDS[:1, :5], kinds=("logabsdet", "sigma_min"))
    mask = torch.ones_like(IDS)
    ids = IDS.clone()
    ids[0] = torch.cat([IDS[0, 5:], IDS[0, :5]]) if side == "left" else IDS[0]
    mask[0, :2] = 0 if side == "left" else 1
    mask[0, 5:] = 1 if side == "left" else 0
    found = margins(model, ids, kinds=("logabsdet", "sigma_min"), attention_mask=mask).isel(sequence=0)
    part = slice(2, 7) if side == "left" else slice(0, 5)
    for name in ("logabsdet", "sigma_min", "update_logabsdet"):
        np.testing.assert_allclose(found[name][:, part], alone[name][0], rtol=1e-4, atol=1e-5)
    assert np.isnan(found.logabsdet[:, mask[0] == 0]).all()
    assert np.isfinite(found.logabsdet[:, mask[0] == 1]).all()


def test_controls_are_other_models_on_the_same_text(model):
    own = margins(model, IDS, kinds=("logabsdet",))
    turned = margins(model, IDS, kinds=("logabsdet",), control="turned_output")
    fresh = margins(model, IDS, kinds=("logabsdet",), control="random_weights", seed=1)
    np.testing.assert_allclose(turned.rms, own.rms)  # the stream is that of the model
    assert not np.allclose(turned.logabsdet, own.logabsdet, atol=1e-2)
    assert not np.allclose(fresh.rms, own.rms)
    assert fresh.attrs["weights_sha256"] != own.attrs["weights_sha256"]
    again = margins(model, IDS, kinds=("logabsdet",), control="random_weights", seed=1)
    np.testing.assert_array_equal(fresh.logabsdet, again.logabsdet)


def test_it_goes_to_netcdf_and_to_a_data_frame(model, tmp_path):
    import xarray

    found = margins(model, IDS, kinds=("logabsdet",))
    found.to_netcdf(tmp_path / "margins.nc", engine="h5netcdf")
    with xarray.open_dataset(tmp_path / "margins.nc", engine="h5netcdf") as read:
        xarray.testing.assert_identical(read.load(), found)
    assert len(found.to_dataframe()) == found.logabsdet.size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.rand(1, 3)}, "input_ids is torch.float32; it must hold whole numbers"),
        ({"input_ids": "text"}, "input_ids is str"),
        ({"input_ids": torch.tensor([[1, 99]])}, "input_ids go from 1 to 99; the model has .* its own tokeniser"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
        ({"input_ids": IDS, "kinds": ("size",)}, "'size'"),
        ({"input_ids": IDS, "maps": ("both",)}, "'both'"),
        ({"input_ids": IDS, "control": "shuffled"}, "'shuffled'"),
        ({"input_ids": IDS, "layers": [2]}, r"layers is \[2\]; it must hold increasing whole numbers from 0 to 1"),
        ({"input_ids": IDS, "positions": [3, 1]}, "positions is .* increasing"),
        ({"input_ids": IDS, "attention_mask": torch.zeros(2, 7)}, "leave a token in each sequence"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        margins(tiny("llama"), **arguments)
