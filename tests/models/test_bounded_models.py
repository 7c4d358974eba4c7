"""Models of bounded attention: fits never meet a fold, and a contraction can be fixed or inferred."""

import math
from dataclasses import replace

import pyro
import pytest
import torch
from pyro import poutine

from probattn import CausalAttention, LatentAttention, log_barrier
from probattn.errors import InputError
from probattn.inference import problem
from probattn.inference.fit import FitOptions, TextOptions
from probattn.inference.language import LanguageFit, fit_language
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.map import MapConfig, fit_map
from probattn.inference.methods.nuts import NutsConfig, fit_nuts
from probattn.inference.results.posterior import assemble
from probattn.models import EmbeddingModel, LanguageModel
from probattn.models.language import LanguageConfig
from support import tokens

LIMITED = {"memory_radius": 1.5, "contraction": 0.9}
INFERRED = {"memory_radius": 1.5, "contraction_prior": (2.0, 2.0)}


@pytest.mark.parametrize("options", [LIMITED, INFERRED])
@pytest.mark.parametrize("shape", [{"parameters": "qk_matrix"}, {"rank": 1}, {"value_dim": 2, "mask": "inclusive"}])
def test_every_draw_of_the_prior_is_a_contraction_and_is_scored(options, shape):
    model = EmbeddingModel(5, 2, heads=2, prior_scale=30.0, **shape, **options)
    target = LogDensity(model, tokens(0, 3, 5, 2))
    draws = target.prior_draws(50, seed=0)
    kappa = model.attention_of(draws).contraction
    assert kappa.shape == (50,)
    assert (kappa < (0.9 if options is LIMITED else 1.0)).all()
    if options is INFERRED:
        torch.testing.assert_close(kappa, draws["contraction"])
    z = target.unconstrain(draws)
    value, gradient = target.value_and_gradient(z)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    with pyro.plate("draws", 20, dim=-2):  # nothing folds, so the prior can be simulated
        assert model(sequences=3).shape == (20, 3, 5, 2)


def test_a_limit_leaves_weak_attention_as_it_is_and_the_names_of_sites_say_what_they_hold():
    model = EmbeddingModel(5, 2, parameters="qk_matrix", **LIMITED)
    assert set(model.parameter_priors()) == {"free_qk_matrix", "noise_scale"}
    weak = 1e-3 * tokens(1, 1, 2, 2)
    torch.testing.assert_close(model.attention_of({"free_qk_matrix": weak}).qk_matrix, weak, rtol=1e-4, atol=0)
    plain = EmbeddingModel(5, 2, parameters="qk_matrix", memory_radius=1.5)
    assert set(plain.parameter_priors()) == {"qk_matrix", "noise_scale"}
    assert model.altered(heads=2).attention_of({"free_qk_matrix": tokens(2, 2, 2, 2)}).memory_radius == 1.5


def data(length, sequences):
    """A model with a prior on its contraction, and sequences at the value 0.8."""
    truth = EmbeddingModel(length, 2, parameters="qk_matrix", noise_scale=1.0, **INFERRED)
    rotation = torch.tensor([[[1.0, 0.5], [-0.5, 1.0]]]).double()
    pyro.set_rng_seed(0)
    values = {"free_qk_matrix": rotation, "contraction": torch.tensor(0.8).double()}
    return truth, poutine.condition(truth, data=values)(sequences=sequences)


def test_nuts_reports_the_contraction_and_certifies_every_draw():
    model, u = data(length=6, sequences=4)
    target = LogDensity(model, u)
    draws = fit_nuts(target, NutsConfig(chains=1, warmup=30, draws=10))
    groups = assemble(target, draws, predictive=4).groups
    posterior = groups["posterior"]
    assert ((posterior["contraction"] > 0) & (posterior["contraction"] < 1)).all()
    assert (groups["tokens"]["regime"] == 0).all()
    assert {"qk_matrix", "free_qk_matrix"} <= set(posterior)


@pytest.mark.slow
def test_nuts_recovers_a_contraction():
    model, u = data(length=25, sequences=30)
    draws = fit_nuts(LogDensity(model, u), NutsConfig(chains=2, warmup=120, draws=100))
    assert not draws.statistics["diverging"].any()
    kappa = LogDensity(model, u).constrain(draws.z)["contraction"]
    assert abs(kappa.mean() - 0.8) < 3 * kappa.std() + 0.02
    assert kappa.std() < 0.15


def test_map_starts_at_the_origin_of_a_limited_model():
    u = tokens(3, 6, 8, 2)
    draws = fit_map(LogDensity(EmbeddingModel(8, 2, **LIMITED), u), MapConfig(steps=50))
    assert torch.isfinite(draws.z).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_radius": 0.0}, "memory_radius is 0.0"),
        ({"contraction": 0.5}, "a contraction needs a memory_radius"),
        ({"contraction_prior": (1.0, 1.0)}, "a contraction needs a memory_radius"),
        ({"memory_radius": 1.0, "contraction": 1.0}, "contraction is 1.0; it must lie strictly between 0 and 1"),
        ({"memory_radius": 1.0, "contraction_prior": (1.0, -1.0)}, "contraction_prior b is -1.0"),
        ({"memory_radius": 1.0, "contraction_prior": (1.0,)}, "the two shapes of a Beta distribution"),
        ({**LIMITED, "contraction_prior": (1.0, 1.0)}, "give one of them"),
    ],
)
def test_contractions_that_do_not_exist_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        EmbeddingModel(5, 2, **options)


class TestLanguageModel:
    CONFIG = LanguageConfig(7, context=6, dim=4, layers=1, decoder_heads=2, stage_rank=2, weight=0.5)
    INPUTS = torch.arange(18).view(3, 6) % 7

    def values(self, **options):
        model = LanguageModel(replace(self.CONFIG, **options)).double()
        values = model.initial_values(0)
        values["query"], values["key"] = 5 * values["query"], 5 * values["key"]  # far beyond the limit
        return model, values

    @pytest.mark.parametrize("mask", ["strict", "inclusive"])
    def test_the_stage_is_the_bounded_attention_and_its_density_the_prior(self, mask):
        # Two heads, which share the identity as output, have W_O scaled under the inclusive mask.
        model, values = self.values(stage_radius=1.5, stage_contraction=0.9, mask=mask, stage_heads=2)
        stage = model.stage(values)
        assert float(stage.contraction) < 0.9
        assert float(stage.memory_radius) == 1.5
        free = CausalAttention(values["query"], values["key"], mask=mask, memory_radius=1.5)
        torch.testing.assert_close(stage.query, free.scaled_to(0.9, shrink=True).query)
        trace = poutine.trace(poutine.condition(model, values)).get_trace(self.INPUTS, self.INPUTS)
        trace.compute_log_prob()
        u = model.embed(values, self.INPUTS)
        expected = 0.5 * LatentAttention(stage, 1.0, 6).log_prob(u).sum()
        torch.testing.assert_close(trace.nodes["u"]["log_prob_sum"], expected)
        other, _ = self.values(mask=mask, stage_heads=2)
        assert float((LatentAttention(other.stage(values), 1.0, 6).log_prob(u).sum() * 0.5 - expected).abs()) > 0.1

    def test_the_barrier_keeps_its_floor_in_a_fit_and_loses_it_without_the_radius(self):
        floor = -4 * math.log(1.9)

        def lowest(**options):
            model = LanguageModel(
                replace(self.CONFIG, weight=5.0, prior="margin", prior_scale=100.0, **options)
            ).double()
            fit = LanguageFit(steps=60, batch=0, learning_rate=0.1, patience=0, shards=1)
            values, _ = fit_language(model, (self.INPUTS, self.INPUTS), fit)
            return float(log_barrier(model.stage(values), model.embed(values, self.INPUTS)).min())

        assert lowest(stage_radius=1.5, stage_contraction=0.9) >= floor
        assert lowest() < floor

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"stage_radius": -1.0}, "stage_radius is -1.0"),
            ({"stage_contraction": 0.5}, "which needs stage_radius"),
            ({"stage_radius": 1.0, "stage_contraction": 1.0}, "stage_contraction is 1.0"),
        ],
    )
    def test_stages_that_cannot_be_are_refused(self, options, message):
        with pytest.raises(InputError, match=message):
            replace(self.CONFIG, **options)


def test_a_fit_from_text_takes_the_radius_for_the_language_model_too(tmp_path, monkeypatch):
    text, seen = tmp_path / "text.txt", []
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")

    def watched(model, *args, **kwargs):
        seen.append(model.config)
        return fit_language(model, *args, **kwargs)

    monkeypatch.setattr(problem, "fit_language", watched)
    small = TextOptions(context=8, dim=4, language_steps=3)
    posed = problem.pose(
        FitOptions(corpus=str(text), memory_radius=1.5, contraction=0.9, text=small, out=tmp_path / "out")
    )
    assert (seen[0].stage_radius, seen[0].stage_contraction) == (1.5, 0.9)
    assert (posed.model.memory_radius, posed.model.contraction) == (1.5, 0.9)
