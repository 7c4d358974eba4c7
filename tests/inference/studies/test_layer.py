import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from probattn.errors import InputError
from probattn.inference.studies.layer.__main__ import LayerStudyOptions, draw_trained
from probattn.inference.studies.layer.calibration import LayerStudy, calibrate_layer, simulate_layer
from probattn.inference.studies.layer.recovery import Recovery, recover
from probattn.inference.studies.layer.small import random_layer
from probattn.inference.studies.layer.trained import TrainedStudy, fit_layers
from probattn.models.causal_lm import build_causal_lm

TINY = LayerStudy(replicates=3, sequences=2, length=4, dim=4, heads=2, ranked=9)


def test_data_sets_come_from_the_model():
    values, u, left_out = simulate_layer(replace(TINY, replicates=6))
    model = TINY.model()
    assert u.shape == (6, 2, 4, 4)
    assert left_out >= 0
    lifted = {name: value.unsqueeze(1) for name, value in values.items()}
    attention = model.attention_of(lifted)
    standard = attention.residual(u) / values["noise_scale"][:, :, None, None]
    assert abs(float(standard.std()) - 1) < 0.2
    assert bool((attention.logabsdet(u)[0] > 0).all())


@pytest.mark.slow
def test_a_study_goes_on_where_it_ended(tmp_path):
    store = tmp_path / "ranks.json"
    whole = calibrate_layer(TINY, jacobian=True, store=store, chunk=1)
    content = json.loads(store.read_text())
    content["rows"] = content["rows"][:1]
    store.write_text(json.dumps(content))
    again = calibrate_layer(TINY, jacobian=True, store=store)
    for name, ranks in whole.ranks.items():
        np.testing.assert_array_equal(ranks, again.ranks[name])
        assert ranks.min() >= 0
        assert ranks.max() <= 9
    assert set(whole.ranks) == {
        *("gain[0]", "gain[1]", "inverse_temperature[0]", "inverse_temperature[1]", "noise_scale", "log_likelihood"),
    }
    with pytest.raises(InputError, match="another study"):
        calibrate_layer(TINY, jacobian=False, store=store)


def test_random_layers_depend_on_their_seed_alone():
    one, same, other = (random_layer(8, 2, 5, strength=0.3, seed=seed) for seed in (1, 1, 2))
    u = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(one.mean(u), same.mean(u))
    assert float((one.mean(u) - other.mean(u)).abs().max()) > 0.01
    torch.testing.assert_close(random_layer(8, 2, 5, strength=0.6, seed=1).mean(u), 2 * one.mean(u))


@pytest.mark.slow
def test_known_gains_are_recovered():
    found = recover(
        Recovery(sequences=4, length=12, dim=8, strength=0.2, gain=(0.0, 1.5), inverse_temperature=(1.0, 0.8))
    )
    assert max(map(abs, found["with"]["gain"]["error_in_sd"])) < 3.5
    assert found["with"]["gain"]["mean"][1] - found["with"]["gain"]["mean"][0] > 0.5
    assert found["with"]["gain"]["mean"] != found["without"]["gain"]["mean"]


@pytest.mark.slow
def test_layers_are_fitted_twice_and_kept(tmp_path):
    torch.manual_seed(0)
    model = build_causal_lm("llama", 11, 2, 8, 2, 16).eval()
    ids = torch.randint(11, (60,), generator=torch.Generator().manual_seed(0))
    study = TrainedStudy(layers=(1,), sequences=3, tokens=8, positions=3, draws=20)
    records = fit_layers(study, model, ids, tmp_path)
    assert [record["jacobian"] for record in records] == [False, True]
    assert all(len(record["gain"]["mean"]) == 2 for record in records)
    assert fit_layers(study, model, ids, tmp_path) == json.loads(json.dumps(records))
    with pytest.raises(InputError, match="another study"):
        fit_layers(replace(study, seed=1), model, ids, tmp_path)
    draw_trained(records, tmp_path)
    assert (tmp_path / "figures" / "gain.png").stat().st_size > 1000


def test_the_trained_layers_need_a_text():
    with pytest.raises(InputError, match="text is missing"):
        LayerStudyOptions()
