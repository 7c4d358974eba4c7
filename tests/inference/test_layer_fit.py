import json
import logging

import numpy as np
import pytest
import torch
from small_folder import SMALL, write_small_folder

from probattn.errors import InputError
from probattn.inference.fit import FitOptions, LaplaceConfig, MapConfig, NutsConfig, StreamOptions, TextOptions, fit
from probattn.inference.layer.findings import diagnose_layer, head_intervals
from probattn.inference.layer.start import layer_start
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.results.fit_file import Fit
from probattn.inference.studies.layer.small import random_layer
from probattn.models.causal_lm import build_causal_lm
from probattn.models.layer import LayerModel
from probattn.models.layer_simulate import continue_streams
from probattn.models.layer_streams import layer_streams, outlying_coordinates, stream_scales
from probattn.models.projection import fit_projection

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_folder(tmp_path_factory.mktemp("model"))


def options(folder, out, method=None, **changes):
    stream = StreamOptions(model=str(folder), text=folder / "text.txt", **{**SMALL, **changes})
    method = method or LaplaceConfig(draws=30, correct=False)
    return FitOptions(stream=stream, sequences=3, out=out, method=method, device="cpu")


class TestRoute:
    @pytest.mark.parametrize("changes", [{}, {"signed": True, "positions": 0}, {"noise": "diagonal"}])
    def test_a_fit_leaves_files_with_heads(self, folder, tmp_path, changes):
        found, diagnosis = fit(options(folder, tmp_path / "out", **changes))
        again = Fit.load(tmp_path / "out" / "fit.nc")
        tree = again.to_datatree()
        assert tree["posterior"]["strength"].dims == ("chain", "draw", "head")
        np.testing.assert_array_equal(again.groups["posterior"]["gain"], found.groups["posterior"]["gain"])
        about = {finding.about for finding in diagnosis.findings}
        assert {"heads that do nothing", "heads as trained", "temperatures", "determinants", "predicted norms"} <= about
        written = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
        assert written["verdict"] == diagnosis.verdict
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["data"]["shape"] == [3, 8, 8]
        assert config["model"]["layer_number"] == 0
        assert (tmp_path / "out" / "figures" / "heads.png").stat().st_size > 1000

    def test_a_point(self, folder, tmp_path):
        found, diagnosis = fit(options(folder, tmp_path / "out", MapConfig(steps=20)))
        assert found.method == "map"
        assert "heads that do nothing" not in {finding.about for finding in diagnosis.findings}

    @pytest.mark.slow
    def test_chains(self, folder, tmp_path):
        method = NutsConfig(chains=2, warmup=30, draws=40, max_depth=3)
        found, diagnosis = fit(options(folder, tmp_path / "out", method))
        assert found.groups["posterior"]["gain"].shape == (2, 40, 2)
        assert "R-hat" in {finding.about for finding in diagnosis.findings}

    def test_the_naive_twin_is_named(self, folder, tmp_path):
        asked = options(folder, tmp_path / "out")
        naive = FitOptions(**{**vars(asked), "jacobian": False})
        _, diagnosis = fit(naive)
        assert diagnosis.verdict == "not reliable"

    @pytest.mark.parametrize(
        ("stream", "words"),
        [
            ({"layer": 0}, "layer is given and text is not"),
            ({"layer": 0, "text": "a.txt", "given": 63}, "given is 63"),
            ({"layer": 0, "text": "a.txt", "positions": 64}, "positions is 64"),
            ({"tokens": 2}, "tokens is 2"),
        ],
    )
    def test_options_that_do_not_fit(self, stream, words):
        with pytest.raises(InputError, match=words):
            StreamOptions(**stream)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"rank": 2}, "rank goes with data"),
            ({"heads": 2}, "heads goes with data"),
            ({"project": 2}, "project goes with data"),
            ({"data": "hidden.npz"}, "one only"),
            ({"text": TextOptions(dim=8)}, "dim goes with corpus"),
        ],
    )
    def test_options_of_other_inputs(self, folder, tmp_path, changes, words):
        with pytest.raises(InputError, match=words):
            FitOptions(**{**vars(options(folder, tmp_path)), **changes})

    def test_options_of_a_layer_beside_data(self):
        with pytest.raises(InputError, match="signed goes with layer"):
            FitOptions(data="hidden.npz", stream=StreamOptions(signed=True))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"layer": 7}, "layer 7 was asked for"),
            ({"tokens": 90}, "give a longer text"),
            ({"text": "missing.txt"}, "no such file"),
        ],
    )
    def test_inputs_that_cannot_be_used(self, folder, tmp_path, changes, words):
        stream = {"model": str(folder), "text": folder / "text.txt", **SMALL, **changes}
        asked = FitOptions(stream=StreamOptions(**stream), sequences=3, out=tmp_path / "out", device="cpu")
        with pytest.raises(InputError, match=words):
            fit(asked)

    def test_outlying_coordinates_are_named(self, folder, tmp_path, caplog, monkeypatch):
        found = {5: 80.0}
        monkeypatch.setattr("probattn.inference.layer.problem.outlying_coordinates", lambda u, given: found)
        with caplog.at_level(logging.WARNING):
            fit(options(folder, tmp_path / "out"))
        assert "coordinates 5 (80 times the median)" in caplog.text
        assert "--noise diagonal" in caplog.text


class TestFindings:
    def made(self, strength, *, positive=20, signed=1, drawn=None):
        generator = np.random.default_rng(0)
        heads = np.array(strength) + 0.01 * generator.standard_normal((1, 200, len(strength)))
        posterior = {"strength": heads, "gain": heads, "inverse_temperature": np.ones_like(heads) + 0.1 * (heads - 1)}
        posterior["noise_scale"] = 1 + 0.01 * generator.standard_normal((1, 200, 1))
        groups = {
            "posterior": posterior,
            "prior": {name: generator.standard_normal((1, 500, *value.shape[2:])) for name, value in posterior.items()},
            "log_likelihood": {"u": generator.standard_normal((1, 50, 3))},
            "observed_data": {"norm": np.full(3, 2.0), "difference": np.full(3, 1.0)},
        }
        if drawn is not None:
            groups["posterior_predictive"] = {
                name: drawn + 0.1 * generator.standard_normal((1, 40, 3)) for name in ("norm", "difference")
            }
        attributes = {"draws_looked_at": 20, "positive_draws": positive, "signed": signed, "khat_guide": 0.1}
        return Fit("laplace", groups, {}, {}, attributes)

    def words(self, fit_):
        return {finding.about: finding for finding in diagnose_layer(fit_).findings}

    def test_heads_are_sorted(self):
        found = self.words(self.made([0.0, 1.0, 0.5, 2.0, -1.0]))
        nothing, trained = found["heads that do nothing"].words, found["heads as trained"].words
        assert "holds 0 for head 0;" in nothing
        assert "below 0 for head 4" in nothing
        assert "as trained, for head 1;" in trained
        assert "below 1 for heads 0, 2, 4 and above 1 for head 3" in trained

    def test_positive_gains_are_said_to_be_so(self):
        assert "--signed" in self.words(self.made([0.05, 1.0], signed=0))["heads that do nothing"].words

    @pytest.mark.parametrize(("positive", "level"), [(20, "good"), (19, "warning"), (3, "problem")])
    def test_determinants(self, positive, level):
        assert self.words(self.made([1.0], positive=positive))["determinants"].level == level

    @pytest.mark.parametrize(("drawn", "level"), [(2.0, "good"), (9.0, "warning")])
    def test_predictions_beyond_the_data(self, drawn, level):
        assert self.words(self.made([1.0], drawn=drawn))["predicted norms"].level == level

    def test_intervals(self):
        low, middle, high = head_intervals(self.made([0.3, 1.0]))
        assert bool((low < middle).all() and (middle < high).all())
        np.testing.assert_allclose(middle, [0.3, 1.0], atol=0.01)


class TestParts:
    def test_starts_are_where_determinants_are_positive(self):
        layer = random_layer(8, 2, 6, strength=3.0, seed=0)
        u = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)).double()
        model = LayerModel(layer, 6, share_spread=None)
        target = LogDensity(model, u)
        assert bool((layer.logabsdet(u)[0] < 0).any())  # as trained it folds
        values = target.constrain(layer_start(target, 3, 0))
        lifted = {name: value.unsqueeze(1) for name, value in values.items()}
        assert bool((model.attention_of(lifted).logabsdet(u)[0] > 0).all())

    def test_streams_go_on_from_given_tokens(self):
        layer = random_layer(8, 2, 6, strength=0.1, seed=0)
        model = LayerModel(layer, 6, given=2)
        generator = torch.Generator().manual_seed(0)
        first, noise = (torch.randn(3, 6, 8, generator=generator).double() for _ in range(2))
        values = {"gain": torch.ones(2).double(), "inverse_temperature": torch.ones(2).double()}
        u = continue_streams(model, values, first, noise)
        torch.testing.assert_close(u[:, :2], first[:, :2])
        torch.testing.assert_close(layer.residual(u)[:, 2:], noise[:, 2:])

    def test_scales_of_coordinates(self):
        generator = torch.Generator().manual_seed(0)
        scale, mean = torch.tensor([1.0, 5.0]), torch.tensor([100.0, 0.0])
        u = mean + scale * torch.randn(50, 60, 2, generator=generator)
        u[:, 0] = 1e6  # given, and left out
        reference, offset = stream_scales(u, 1)
        torch.testing.assert_close(reference, scale, rtol=0.05, atol=0)
        assert 99 < float(offset[0]) < 101
        assert float(offset[1]) < 2
        with pytest.raises(InputError, match="constant"):
            stream_scales(torch.ones(2, 5, 3), 0)

    def test_outlying_coordinates_are_found(self):
        u = torch.ones(2, 5, 7)
        u[..., 3], u[..., 6] = 20.0, 40.0
        assert list(outlying_coordinates(u, 1)) == [6, 3]
        assert outlying_coordinates(torch.ones(2, 5, 7), 1) == {}

    def test_streams_are_those_of_the_model(self):
        torch.manual_seed(0)
        model = build_causal_lm("llama", 11, 2, 8, 2, 16).eval()
        ids = torch.arange(40) % 11
        found = layer_streams(model, ids, 1, sequences=3, length=8, given=1, dtype=torch.float64)
        whole = model(input_ids=ids[32:40].unsqueeze(0), output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(found.u[2], whole[0].double())
        with pytest.raises(InputError, match="longer text"):
            layer_streams(model, ids, 1, sequences=6, length=8, given=1, dtype=torch.float64)

    def test_projection_keeps_the_largest_directions(self):
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(20, 10, 3, generator=generator).double() * torch.tensor([0.1, 5.0, 1.0])
        projection = fit_projection(u, 2)
        projected = projection(u)
        assert abs(float(projected[..., 0].std()) - 1) < 0.01
        assert abs(float(projection.directions[0, 1])) > 0.99
        assert projection.kept > 0.99
        for size in (0, 4):
            with pytest.raises(InputError, match="allow 1 to 3"):
                fit_projection(u, size)
        with pytest.raises(InputError, match="all tokens are equal"):
            fit_projection(torch.ones(2, 4, 3), 1)

    def test_projected_states_are_fitted(self, tmp_path):
        generator = np.random.default_rng(0)
        np.savez(tmp_path / "hidden.npz", u=generator.standard_normal((6, 5, 9)) * np.arange(1, 10))
        asked = FitOptions(
            data=tmp_path / "hidden.npz", project=2, out=tmp_path / "out", method=LaplaceConfig(draws=30), device="cpu"
        )
        found, _ = fit(asked)
        assert found.groups["posterior"]["qk_matrix"].shape[-1] == 2
        with np.load(tmp_path / "out" / "projection.npz") as kept:
            assert kept["directions"].shape == (2, 9)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["data"]["projected_from"] == 9
