"""Changes of low rank and comparisons through the call that the command makes."""

import json
import logging

import numpy as np
import pytest
import torch
from small_folder import SMALL, write_small_folder

from probattn.errors import InputError
from probattn.inference.fit import FitOptions, LaplaceConfig, MapConfig, NutsConfig, StreamOptions, SviConfig, fit
from probattn.inference.layer.comparison import compare_layers, layer_variants
from probattn.inference.layer.cost import bytes_of_fit, require_update_memory
from probattn.inference.methods.draws import Draws
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.results.comparison import leave_one_out
from probattn.inference.results.fit_file import Fit
from probattn.inference.studies.layer.small import random_layer
from probattn.models.layer import LayerModel
from probattn.models.layer_update import update_prior


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_folder(tmp_path_factory.mktemp("model"))


def options(folder, out, method=None, compare=(), jacobian=True, **changes):
    stream = StreamOptions(model=str(folder), text=folder / "text.txt", **{**SMALL, **changes})
    method = method or LaplaceConfig(draws=25, correct=False)
    return FitOptions(
        stream=stream, sequences=3, out=out, method=method, device="cpu", compare=compare, jacobian=jacobian
    )


class TestRoute:
    @pytest.mark.parametrize(
        ("rank", "method"),
        [
            pytest.param(1, LaplaceConfig(draws=25, correct=False), marks=pytest.mark.slow),
            # Flat in the turns of its factors.
            pytest.param(2, LaplaceConfig(draws=25, correct=False), marks=pytest.mark.slow),
            (1, SviConfig(guide="low_rank", steps=20, window=10, draws=30, particles=2, shards=1, correct=False)),
            (1, MapConfig(steps=20)),
        ],
    )
    def test_a_fit_with_a_change_of_low_rank(self, folder, tmp_path, caplog, rank, method):
        with caplog.at_level(logging.INFO):
            found, diagnosis = fit(options(folder, tmp_path / "out", method, update_rank=rank, update_heads=(1,)))
        assert f"rank {rank} of the QK product of 1 head: {12 * rank} of {12 * rank + 5} parameters" in caplog.text
        posterior = Fit.load(tmp_path / "out" / "fit.nc").to_datatree()["posterior"]
        assert posterior["update_in"].dims == ("chain", "draw", "updated_head", "rank", "feature")
        assert posterior["update_out"].dims == ("chain", "draw", "updated_head", "query", "rank")
        for name in ("logit_change", "update_norm", "update_spectral_norm"):
            assert posterior[name].dims == ("chain", "draw", "updated_head")
            assert bool((posterior[name] > 0).all())
        assert posterior.coords["updated_head"].values.tolist() == [1]
        if rank == 1:  # one singular value: the ratios differ by what was trained alone
            ratio = posterior["update_norm"].values / posterior["update_spectral_norm"].values
            np.testing.assert_allclose(ratio, ratio.flat[0])
        about = {finding.about for finding in diagnosis.findings}
        assert ("QK product of head 1" in about) == (found.method != "map")
        assert "logit_change" in (tmp_path / "out" / "summary.csv").read_text()
        record = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (record["model"]["update_rank"], record["model"]["update_heads"]) == (rank, "1")

    def test_temperatures_as_trained(self, folder, tmp_path):
        found, diagnosis = fit(options(folder, tmp_path / "out", temperature=False))
        assert "inverse_temperature" not in found.groups["posterior"]
        assert "temperatures" not in {finding.about for finding in diagnosis.findings}

    def test_variants_are_compared(self, folder, tmp_path, caplog):
        asked = options(
            folder, tmp_path / "out", compare=("jacobian", "temperature", "update"), update_rank=1, update_heads=(0,)
        )
        with caplog.at_level(logging.INFO):
            fit(asked)
        written = json.loads((tmp_path / "out" / "comparison.json").read_text())["models"]
        names = {"as asked", "without the Jacobian", "temperatures as trained", "QK products as trained"}
        assert {entry["name"] for entry in written} == names
        assert written[0]["difference"] == 0
        assert all(entry["difference_se"] > 0 for entry in written[1:])
        assert (tmp_path / "out" / "figures" / "comparison.png").stat().st_size > 1000
        assert caplog.text.count("compared  ") == 4

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"update_heads": (0,)}, "give a rank"),
            ({"update_rank": 1, "update_heads": (-1,)}, "from 0, each once"),
            ({"update_rank": 1, "update_heads": (1, 1)}, "each once"),
            ({"update_rank": -1}, "update_rank is -1"),
            ({"update_rank": 1, "update_spread": 0.0}, "update_spread is 0"),
        ],
    )
    def test_options_that_do_not_fit(self, changes, words):
        with pytest.raises(InputError, match=words):
            StreamOptions(layer=0, text="a.txt", **changes)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"update_rank": 1, "update_heads": (5,)}, "0 to 1"),
            ({"update_rank": 9}, "a query has 4 features"),
            ({"compare": ("update",)}, "--update-rank"),
        ],
    )
    def test_inputs_that_cannot_be_used(self, folder, tmp_path, changes, words):
        with pytest.raises(InputError, match=words):
            fit(options(folder, tmp_path / "out", **changes))

    @pytest.mark.parametrize(
        ("input_", "compare", "words"),
        [
            ({"data": "hidden.npz"}, "update", "comparing update goes with layer, and data"),
            ({"stream": StreamOptions(layer=0, text="a.txt")}, "heads", "comparing heads goes with data, and layer"),
            ({"corpus": "python-docs"}, "jacobian", "comparing jacobian goes with data or layer, and corpus"),
        ],
    )
    def test_comparisons_of_another_input(self, input_, compare, words):
        with pytest.raises(InputError, match=words):
            FitOptions(**input_, compare=(compare,))


class TestComparison:
    def posed(self, **changes):
        layer = random_layer(8, 2, 6, strength=0.2, seed=0)
        u = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0)).double()
        prior = update_prior(layer, u, rank=1, heads=[0], given=1)
        model = LayerModel(layer, 6, given=1, share_spread=None, update=prior, positions=3)
        return model.altered(**changes), u

    @staticmethod
    def drawing(name, target):
        generator = torch.Generator().manual_seed(0)
        z = 0.1 * torch.randn(1, 60, target.dim, generator=generator, dtype=torch.float64)
        return Draws("laplace", z, {}, {})

    def test_names_of_variants(self):
        model, _ = self.posed()
        found = layer_variants(model, ("jacobian", "temperature", "update", "noise"))
        assert list(found) == [
            "as asked",
            "without the Jacobian",
            "temperatures as trained",
            "QK products as trained",
            "a noise scale for each coordinate",
        ]
        assert [variant.jacobian for variant in found.values()] == [True, False, True, True, True]
        assert len(layer_variants(model.altered(noise="low_rank"), ("noise",))) == 3
        with pytest.raises(InputError, match="no mask to compare"):
            layer_variants(model, ("mask",))

    def test_all_are_judged_by_the_density(self):
        model, u = self.posed()
        found = {entry.name: entry for entry in compare_layers(layer_variants(model, ("jacobian",)), u, self.drawing)}
        for name, jacobian in (("as asked", True), ("without the Jacobian", False)):
            z = self.drawing("", LogDensity(model, u)).z[0]
            own = LogDensity(model.altered(jacobian=jacobian), u).evaluate(z)["u"].numpy()[None]
            proper = LogDensity(model, u).evaluate(z)["u"].numpy()[None]
            assert found[name].elpd == pytest.approx(float(leave_one_out(own, proper)[0].sum()))
        naive = LogDensity(model.altered(jacobian=False), u).evaluate(z)["u"].numpy()[None]
        assert found["without the Jacobian"].elpd != pytest.approx(float(leave_one_out(naive)[0].sum()))

    def test_refusals(self):
        model, u = self.posed()
        with pytest.raises(InputError, match="one sequence only"):
            compare_layers({"as asked": model}, u[:1], self.drawing)
        with pytest.raises(InputError, match="different positions"):
            compare_layers({"one": model, "other": model.altered(positions=2)}, u, self.drawing)


class TestCost:
    def test_too_much_memory_is_refused_with_a_smaller_choice(self, monkeypatch):
        model, u = TestComparison().posed()
        target = LogDensity(model, u)
        method = LaplaceConfig(draws=1000)
        assert require_update_memory(target, method) == bytes_of_fit(method, target.dim)
        monkeypatch.setattr("probattn.inference.layer.cost.free_bytes", lambda device: 1000)
        with pytest.raises(InputError, match=r"update_rank is 1 for 1 head: .*--guide low_rank .*--update-heads"):
            require_update_memory(target, method)
        with pytest.raises(InputError, match="are free; use fewer heads"):
            require_update_memory(target, SviConfig(guide="mean_field"))

    def test_numbers_that_grow(self):
        sizes = [bytes_of_fit(SviConfig(guide=guide), 4000) for guide in ("mean_field", "low_rank", "full_rank")]
        assert sizes == sorted(sizes)
        assert bytes_of_fit(MapConfig(), 100) < bytes_of_fit(NutsConfig(), 100) < bytes_of_fit(LaplaceConfig(), 20_000)
