import pickle
from dataclasses import replace

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value

from probattn import CausalAttention, LatentAttention
from probattn.errors import InputError, SeveralSolutionsError
from probattn.models import EmbeddingModel, LanguageModel, ScalarModel, simulate
from probattn.models.language import LanguageConfig
from probattn.models.scalar import scalar_attention
from support import attention_like, tokens

CONFIG = LanguageConfig(vocabulary=7, context=6, dim=4, layers=1, decoder_heads=2, stage_rank=2)
INPUTS = torch.arange(18).view(3, 6) % 7
TARGETS = (INPUTS + 1) % 7


def score(model, data, *args, **kwargs):
    return poutine.trace(poutine.condition(model, data=data)).get_trace(*args, **kwargs)


class TestScalar:
    def test_log_joint_by_hand(self):
        u = tokens(0, 5, 6, 1)
        a, scale = torch.tensor(0.3).double(), torch.tensor(0.8).double()
        trace = score(ScalarModel(6), {"a": a, "noise_scale": scale}, u)
        variance = torch.stack([(a * u[:, :i, 0] * u[:, i]).softmax(-1) for i in [5]])  # the last token's weights
        mean = (variance[0] * u[:, :5, 0]).sum(-1)
        spread = (variance[0] * u[:, :5, 0] ** 2).sum(-1) - mean**2
        last = LatentAttention(scalar_attention(a), 0.8, 6).log_prob(u) - LatentAttention(
            scalar_attention(a), 0.8, 5
        ).log_prob(u[:, :5])
        by_hand = torch.distributions.Normal(0, 0.8).log_prob(u[:, 5, 0] - mean) + (1 - a * spread).abs().log()
        torch.testing.assert_close(last, by_hand)
        prior = torch.distributions.Normal(0, 1).log_prob(a) + torch.distributions.LogNormal(0, 0.5).log_prob(scale)
        expected = prior + LatentAttention(scalar_attention(a), 0.8, 6).log_prob(u).sum()
        torch.testing.assert_close(trace.log_prob_sum(), expected)

    @pytest.mark.parametrize("mask", ["strict", "inclusive"])
    @pytest.mark.parametrize("jacobian", [True, False])
    def test_options_change_the_density_as_they_say(self, mask, jacobian):
        u = tokens(0, 5, 6, 1)
        a, scale = torch.tensor(0.3).double(), torch.tensor(0.8).double()
        model = ScalarModel(6, prior_scale=2.0, mask=mask, noise_spread=0.1, jacobian=jacobian)
        attention = scalar_attention(a, mask=mask)
        residual = torch.distributions.Normal(0, 0.8).log_prob(u - attention.mean(u)).sum()
        prior = torch.distributions.Normal(0, 2).log_prob(a) + torch.distributions.LogNormal(0, 0.1).log_prob(scale)
        volume = attention.logabsdet(u)[1].sum()
        found = score(model, {"a": a, "noise_scale": scale}, u).log_prob_sum()
        torch.testing.assert_close(found, prior + residual + (volume if jacobian else 0.0))
        assert volume.abs() > 0.1

    def test_bad_sizes(self):
        with pytest.raises(InputError, match="length is 0"):
            ScalarModel(0)
        with pytest.raises(InputError, match="sequences is None"):
            ScalarModel(3)()
        with pytest.raises(InputError, match=r"must be \(N, T, p\)"):
            ScalarModel(3)(torch.zeros(3, 1).double())


@pytest.mark.parametrize("value_dim", [None, 2])
class TestEmbedding:
    def test_minibatch_is_scaled_to_the_whole(self, value_dim):
        model = EmbeddingModel(5, 3, heads=2, rank=2, value_dim=value_dim)
        u = tokens(1, 4, 5, 3)
        values = {
            name: site["value"]
            for name, site in poutine.trace(model).get_trace(u).nodes.items()
            if site["type"] == "sample"
        }
        values = {name: value for name, value in values.items() if name != "u"}
        once, scaled = score(model, values, u).log_prob_sum(), score(model, values, u, total=40).log_prob_sum()
        attention = CausalAttention(values["query"], values["key"], values.get("value"), values.get("output"))
        likelihood = LatentAttention(attention, values["noise_scale"], 5).log_prob(u).sum()
        torch.testing.assert_close(scaled - once, 9 * likelihood)

    def test_particles_and_parallel_prediction(self, value_dim):
        model = EmbeddingModel(5, 2, heads=2, value_dim=value_dim, prior_scale=0.2)
        u = 0.3 * tokens(2, 4, 5, 2)
        guide = AutoNormal(model)
        elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
        assert torch.isfinite(torch.as_tensor(elbo.loss(model, guide, u)))
        drawn = Predictive(model, guide=guide, num_samples=3, parallel=True)(sequences=4)
        assert drawn["u"].shape == (3, 4, 5, 2)
        pyro.clear_param_store()

    def test_moves_between_precisions(self, value_dim):
        model = EmbeddingModel(5, 2, value_dim=value_dim, prior_scale=0.2).to(torch.float32)
        assert model(sequences=2).dtype == torch.float32

    def test_pickles(self, value_dim):
        model = pickle.loads(pickle.dumps(EmbeddingModel(5, 2, value_dim=value_dim, prior_scale=0.2)))
        assert model(sequences=2).shape == (2, 5, 2)


def test_embedding_model_refuses_bad_sizes():
    for arguments in (
        {"length": 0, "dim": 2},
        {"length": 2, "dim": 2, "heads": 0},
        {"length": 2, "dim": 2, "prior_scale": 0},
    ):
        with pytest.raises(InputError):
            EmbeddingModel(**arguments)


class TestLanguage:
    def test_full_prior_with_the_literal_barrier_is_the_density_to_the_power_lambda(self):
        model = LanguageModel(CONFIG)
        values = model.initial_values(0)
        trace = score(model, values, INPUTS, TARGETS)
        trace.compute_log_prob()
        law = LatentAttention(CausalAttention(values["query"], values["key"]), 1.0, 6)
        torch.testing.assert_close(trace.nodes["u"]["log_prob"], 0.05 * law.log_prob(model.embed(values, INPUTS)))

    def test_the_decoder_is_causal(self):
        model = LanguageModel(CONFIG)
        values = model.initial_values(0)
        u = model.embed(values, INPUTS)
        changed = u.clone()
        changed[:, 4:, 0] += 1  # one feature: the layer norms would not see a shift of all
        torch.testing.assert_close(model.decode(values, u)[:, :4], model.decode(values, changed)[:, :4], rtol=0, atol=0)
        assert not torch.allclose(model.decode(values, u)[:, 4:], model.decode(values, changed)[:, 4:])

    def test_weight_zero_leaves_the_stage_out(self):
        model = LanguageModel(replace(CONFIG, weight=0.0))
        names = poutine.trace(model).get_trace(INPUTS).nodes
        assert "query" not in names
        assert "u" not in names

    @pytest.mark.parametrize("prior", ["full", "margin"])
    @pytest.mark.parametrize("kind", ["logdet", "one_sided", "spectral"])
    def test_particles_agree_with_a_loop(self, kind, prior):
        model = LanguageModel(replace(CONFIG, kind=kind, prior=prior))
        first, second = model.initial_values(0), model.initial_values(1)
        stacked = {name: torch.stack([first[name], second[name]]).unsqueeze(1) for name in first}
        with pyro.plate("particles", 2, dim=-2):
            together = score(model, stacked, INPUTS, TARGETS)
        together.compute_log_prob()
        for site in ("characters", "u" if (prior, kind) == ("full", "logdet") else "attention_prior"):
            for k, values in enumerate((first, second)):
                alone = score(model, values, INPUTS, TARGETS)
                alone.compute_log_prob()
                torch.testing.assert_close(together.nodes[site]["log_prob"][k], alone.nodes[site]["log_prob"])

    def test_parallel_prediction(self):
        model = LanguageModel(CONFIG)
        guide = AutoNormal(model, init_loc_fn=init_to_value(values=model.initial_values(0)), init_scale=0.01)
        guide(INPUTS, TARGETS)
        drawn = Predictive(model, guide=guide, num_samples=3, parallel=True)(INPUTS)
        assert drawn["characters"].shape == (3, 3, 6)
        pyro.clear_param_store()

    def test_initial_values_leave_the_random_state(self):
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        LanguageModel(CONFIG).initial_values(0)
        assert torch.equal(torch.rand(1), expected)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"dim": 5}, "decoder_heads = 2 does not divide"),
            ({"weight": -0.1}, "weight is -0.1"),
            ({"weight": float("nan")}, "weight is nan"),
            ({"kind": "log"}, "kind is 'log'; use one of 'logdet'"),
            ({"prior": "half"}, "prior is 'half'; use one of 'full', 'margin'"),
            ({"noise_scale": 0.0}, "noise_scale is 0.0"),
            ({"layers": 0}, "layers is 0"),
        ],
    )
    def test_bad_configurations(self, change, message):
        with pytest.raises(InputError, match=message):
            replace(CONFIG, **change)

    def test_bad_windows(self):
        with pytest.raises(InputError, match="T <= 6"):
            LanguageModel(CONFIG)(torch.zeros(2, 7, dtype=torch.long))


def test_simulate_reports_the_regime_and_keeps_the_random_state():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    result = simulate(scalar_attention(0.02), 1.0, length=8, sequences=5, seed=3)
    assert torch.equal(torch.rand(1), expected)
    assert [str(found) for found in result.regimes] == ["certified"] * 5
    assert torch.equal(result.u, simulate(scalar_attention(0.02), 1.0, length=8, sequences=5, seed=3).u)
    assert not torch.equal(result.u, simulate(scalar_attention(0.02), 1.0, length=8, sequences=5, seed=4).u)
    with pytest.raises(SeveralSolutionsError):
        simulate(scalar_attention(5.0), 1.0, length=8, sequences=20)
    with pytest.raises(InputError, match="at least one sequence"):
        simulate(attention_like(0), 1.0, length=8, sequences=0)
