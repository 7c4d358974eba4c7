"""What a fit holds, group by group, against direct computation."""

import warnings

import numpy as np
import pytest
import torch
import xarray
from posteriors import bilinear_model, short_sequences

from probattn.barrier import stability_margin
from probattn.inference.methods.draws import Draws
from probattn.inference.methods.laplace import LaplaceConfig, fit_laplace
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.results.fit_file import Fit
from probattn.inference.results.heads import match_heads
from probattn.inference.results.posterior import REGIMES, assemble
from probattn.models import EmbeddingModel, ScalarModel

U = short_sequences()


@pytest.fixture(scope="module")
def target():
    return LogDensity(bilinear_model(U), U)


@pytest.fixture(scope="module")
def fit(target):
    return assemble(
        target, fit_laplace(target, LaplaceConfig(draws=120)), predictive=40, attributes={"seed": 0, "power": 1.0}
    )


def test_groups_and_named_axes(fit):
    tree = fit.to_datatree()
    assert set(tree.children) == {
        "posterior",
        "tokens",
        "sample_stats",
        "log_likelihood",
        "log_prior",
        "prior",
        "prior_predictive",
        "posterior_predictive",
        "observed_data",
        "constant_data",
    }
    posterior = tree["posterior"]
    assert posterior["qk_matrix"].dims == ("chain", "draw", "head", "key_feature", "query_feature")
    assert posterior["noise_scale"].dims == ("chain", "draw", "feature")
    assert tree["tokens"]["margin"].dims == ("chain", "draw", "shown_sequence", "token")
    assert tree["log_likelihood"]["u"].dims == ("chain", "draw", "sequence")
    assert tree["observed_data"]["u"].dims == ("sequence", "token", "feature")
    assert tree["posterior_predictive"]["u"].dims == ("chain", "draw", "sequence", "token", "feature")
    assert tree["tokens"]["token"].values.tolist() == list(range(8))
    assert set(tree["tokens"].data_vars) == {"log_abs_det", "margin", "regime"}


def test_the_numbers_are_those_of_the_draws(fit, target):
    posterior = fit.groups["posterior"]
    attention = target.model.attention_of({"qk_matrix": torch.as_tensor(posterior["qk_matrix"][0]).unsqueeze(1)})
    sign, logabs = attention.logabsdet(U)
    tokens = fit.groups["tokens"]
    np.testing.assert_allclose(tokens["log_abs_det"][0], logabs)
    np.testing.assert_allclose(tokens["margin"][0], stability_margin(attention, U))
    np.testing.assert_allclose(posterior["smallest_margin"][0], tokens["margin"][0].min((-2, -1)))
    assert bool((sign > 0).all())
    values = {name: torch.as_tensor(posterior[name][0]).unsqueeze(1) for name in ("qk_matrix", "noise_scale")}
    np.testing.assert_allclose(fit.groups["log_likelihood"]["u"][0], target.model.likelihood(values).log_prob(U))
    total = fit.groups["log_likelihood"]["u"].sum(-1) + sum(fit.groups["log_prior"].values())
    volume = np.log(posterior["noise_scale"]).sum(-1)
    np.testing.assert_allclose(total + volume, fit.groups["sample_stats"]["lp"])


def test_a_point_has_its_density_too(target):
    """What a method does not record the fit holds all the same."""
    z = torch.zeros(1, 1, 6, dtype=torch.float64)
    fit = assemble(target, Draws("map", z, info={"steps": 3}), predictive=2)
    np.testing.assert_allclose(fit.groups["sample_stats"]["lp"], target.log_density(z[0])[None])
    assert fit.attributes["steps"] == 3
    recorded = assemble(target, Draws("nuts", z, {"lp": torch.full((1, 1), 7.0)}), predictive=2)
    assert recorded.groups["sample_stats"]["lp"].tolist() == [[7.0]]


def test_groups_of_draws_change_nothing(target, fit, monkeypatch):
    monkeypatch.setattr(LogDensity, "group_size", 7)
    again = assemble(target, fit_laplace(target, LaplaceConfig(draws=120)), predictive=40)
    names = {"tokens": ("margin", "log_abs_det", "regime"), "posterior": ("smallest_margin", "smallest_abs_det")}
    for group, kept in names.items():
        for name in kept:
            np.testing.assert_allclose(again.groups[group][name], fit.groups[group][name], rtol=1e-12)


def test_predictive_data_look_like_the_data(fit):
    predicted = fit.groups["posterior_predictive"]["u"]
    assert predicted.shape[2:] == U.shape
    assert 0.3 < predicted.std() / float(U.std()) < 3
    assert fit.attributes["posterior_predictive_unusable"] == 0.0


def test_regimes_are_named_by_what_was_seen():
    """A draw with a negative determinant at the data is folded, a tiny one certified."""
    target = LogDensity(bilinear_model(U), U)
    z = torch.zeros(1, 2, 6, dtype=torch.float64)
    z[0, 1, :4] = 5.0 * torch.eye(2, dtype=torch.float64).flatten()
    fit = assemble(target, Draws("nuts", z, {"lp": torch.zeros(1, 2)}), predictive=2)
    names = [[REGIMES[code] for code in draw] for draw in fit.groups["tokens"]["regime"][0]]
    assert names[0] == ["certified"] * 3
    assert "folded" in names[1]
    assert fit.groups["posterior"]["smallest_abs_det"][0, 0] > 0.99


def test_a_scalar_model_and_a_model_with_values(tmp_path):
    for model, u in ((ScalarModel(8), U[..., :1]), (EmbeddingModel(8, 2, heads=2, value_dim=1, prior_scale=0.3), U)):
        target = LogDensity(model, u)
        z = 0.1 * torch.randn(2, 3, target.dim, dtype=torch.float64)
        fit = assemble(target, Draws("nuts", z, {"lp": torch.zeros(2, 3)}), predictive=4)
        fit.save(tmp_path / "fit.nc")
        tree = Fit.load(tmp_path / "fit.nc").to_datatree()
        assert tree["posterior"]["qk_matrix"].shape[:2] == (2, 3)
        if isinstance(model, EmbeddingModel):
            assert tree["posterior"]["ov_matrix"].dims[2:] == ("head", "feature", "source_feature")


def test_saved_and_loaded_is_the_same_fit(fit, tmp_path):
    fit.save(tmp_path / "fit.nc")
    again = Fit.load(tmp_path / "fit.nc")
    assert again.method == "laplace"
    assert set(again.groups) == set(fit.groups)
    for group, variables in fit.groups.items():
        for name, values in variables.items():
            np.testing.assert_array_equal(again.groups[group][name], values)
    xarray.testing.assert_equal(again.to_datatree(), fit.to_datatree())
    assert again.variable_attributes["regime"]["flag_meanings"] == "certified regular folded"
    assert again.attributes["heads_reordered"] == 0.0


def test_arviz_reads_every_group_it_needs(fit):
    import arviz_stats

    tree = fit.to_datatree()
    summary = arviz_stats.summary(tree, var_names=["qk_matrix"])
    assert len(summary) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # three sequences decide much: k-hat says so
        assert np.isfinite(arviz_stats.loo(tree).elpd)
    assert len(arviz_stats.psense(tree, var_names=["qk_matrix"])["qk_matrix"].values.ravel()) == 4


def test_codes_carry_their_meanings_into_the_file(fit, tmp_path):
    """By the CF conventions, which other programs read: values and meanings in one order."""
    fit.save(tmp_path / "fit.nc")
    with xarray.open_datatree(tmp_path / "fit.nc", engine="h5netcdf") as tree:
        regime = tree["tokens"]["regime"]
        assert regime.attrs["flag_values"].tolist() == [0, 1, 2]
        assert tuple(regime.attrs["flag_meanings"].split()) == REGIMES
        assert tree["tokens"]["margin"].attrs["long_name"] == "smallest singular value of J"


def test_a_summary_shows_parameters_and_nothing_per_token(fit):
    import arviz_stats

    table = arviz_stats.summary(fit.to_datatree())
    names = {name.partition("[")[0] for name in table.index}
    assert names == {"qk_matrix", "noise_scale", "smallest_margin", "smallest_abs_det"}
    assert {"eti89_lb", "eti89_ub"} <= set(table.columns)  # the kind and the probability of the interval
    margins = arviz_stats.summary(fit.to_datatree(), group="tokens", var_names=["margin"], kind="stats")
    assert len(margins) == 3 * 8


def test_the_arviz_of_users_opens_the_file(fit, tmp_path):
    """ArviZ 0.23 (its own InferenceData) or 1.x (xarray's DataTree), whichever is installed."""
    arviz = pytest.importorskip("arviz", reason="arviz itself is not a dependency; its parts are")
    fit.save(tmp_path / "fit.nc")
    opened = arviz.from_netcdf(tmp_path / "fit.nc")
    assert float(opened["posterior"]["qk_matrix"].mean()) == pytest.approx(fit.groups["posterior"]["qk_matrix"].mean())


class TestHeads:
    def test_shuffled_heads_are_brought_back(self):
        generator = np.random.default_rng(0)
        centres = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
        true = centres + 0.2 * generator.normal(size=(2, 40, 3, 2))
        order = np.array([[generator.permutation(3) for _ in range(40)] for _ in range(2)])
        shuffled = np.take_along_axis(true, order[..., None], axis=2)
        found = np.take_along_axis(shuffled, match_heads(shuffled)[..., None], axis=2)
        assert found.std((0, 1)).max() < 0.3
        assert shuffled.std((0, 1)).min() > 1.0  # unmatched, every head is a mixture of all

    def test_a_fit_says_how_many_draws_were_reordered(self):
        model = EmbeddingModel(8, 2, heads=2, parameters="qk_matrix", prior_scale=0.3)
        target = LogDensity(model, U)
        one, two = 0.1 * torch.eye(2).double(), -0.1 * torch.ones(2, 2).double()
        draws = [torch.stack(pair) for pair in ((one, two), (two, one), (one, two), (one, two))]
        values = {"qk_matrix": torch.stack(draws), "noise_scale": torch.ones(4, 2).double()}
        z = target.unconstrain(values).unsqueeze(0)
        fit = assemble(target, Draws("nuts", z, {"lp": torch.zeros(1, 4)}), predictive=2)
        assert fit.attributes["heads_reordered"] == 0.25
        assert fit.groups["posterior"]["qk_matrix"].std((0, 1)).max() < 1e-12
