import copy
import pickle

import pyro
import pytest
import torch
from layer_zoo import stream, tiny
from pyro import poutine
from torch.distributions import LogNormal, MultivariateNormal, Normal

from probattn.errors import InputError
from probattn.hf import attention_layer
from probattn.inference.layer.start import layer_start
from probattn.inference.methods.laplace import LaplaceConfig, fit_laplace
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.map import MapConfig, fit_map
from probattn.inference.methods.nuts import NutsConfig, fit_nuts
from probattn.inference.methods.svi import SviConfig, fit_svi
from probattn.models.layer import LayerModel
from probattn.models.simulate import draw_data_sets

LENGTH = 6
GAIN = torch.tensor([0.6, 1.4, 0.3, 1.0], dtype=torch.float64)
TEMPERATURE = torch.tensor([1.2, 0.7, 1.0, 0.9], dtype=torch.float64)
VALUES = {
    "gain": GAIN,
    "inverse_temperature": TEMPERATURE,
    "share": torch.tensor(0.8, dtype=torch.float64),
    "noise_scale": torch.tensor([0.7], dtype=torch.float64),
}


def layer_of(family="llama", dtype=torch.float64):
    return attention_layer(tiny(family, dtype=dtype), 1, check=False)


def log_joint(model, values, u):
    return poutine.trace(poutine.condition(model, data=values)).get_trace(u).log_prob_sum()


class TestDensity:
    @pytest.mark.parametrize("given_tokens", [0, 2])
    @pytest.mark.parametrize("jacobian", [True, False])
    def test_log_joint_by_dense_blocks(self, given_tokens, jacobian):
        layer, u = layer_of(), stream(tiny("llama"), LENGTH, batch=(3,))
        offset = torch.full((16,), 0.5, dtype=torch.float64)
        model = LayerModel(layer, LENGTH, given=given_tokens, offset=offset, jacobian=jacobian)
        scaled = layer.scaled(GAIN, TEMPERATURE, VALUES["share"])
        e = (u - scaled.mean(u))[:, given_tokens:]
        counted = LENGTH - given_tokens
        covariance = 0.49 * torch.eye(counted).double() + 0.25
        expected = sum(
            MultivariateNormal(torch.zeros(counted).double(), covariance).log_prob(e[..., j]).sum() for j in range(16)
        )
        if jacobian:
            dense = torch.stack([torch.linalg.slogdet(block)[1] for block in scaled.jacobian(u).flatten(0, 1)])
            expected = expected + dense.view(3, LENGTH)[:, given_tokens:].sum()
        expected = expected + LogNormal(0, 0.5).log_prob(GAIN).sum() + LogNormal(0, 0.25).log_prob(TEMPERATURE).sum()
        expected = expected + LogNormal(0, 0.25).log_prob(VALUES["share"]) + LogNormal(0, 1).log_prob(torch.tensor(0.7))
        torch.testing.assert_close(log_joint(model, VALUES, u), expected)

    def test_signed_gains_are_normal(self):
        u = stream(tiny("llama"), LENGTH, batch=(1,))
        model = LayerModel(layer_of(), LENGTH, signed=True, gain_spread=0.9, share_spread=None)
        values = {name: value for name, value in VALUES.items() if name != "share"}
        there, turned = (log_joint(model, {**values, "gain": sign * GAIN}, u) for sign in (1, -1))
        scores = [model.likelihood({**values, "gain": sign * GAIN}).log_prob(u).sum() for sign in (1, -1)]
        prior = Normal(1, 0.9).log_prob(GAIN).sum() - Normal(1, 0.9).log_prob(-GAIN).sum()
        torch.testing.assert_close(there - turned, scores[0] - scores[1] + prior)

    def test_reference_scales_are_the_units_of_the_noise(self):
        u = stream(tiny("llama"), LENGTH, batch=(2,))
        reference = torch.linspace(0.5, 2, 16).double()
        factor = 0.3 * torch.ones(16, 2).double()
        model = LayerModel(layer_of(), LENGTH, noise="low_rank", reference=reference)
        scale = torch.full((16,), 0.7).double()
        found = model.likelihood({**VALUES, "noise_scale": scale, "noise_factor": factor}).log_prob(u)
        plain = LayerModel(layer_of(), LENGTH, noise="low_rank")
        by_hand = {**VALUES, "noise_scale": 0.7 * reference, "noise_factor": reference.unsqueeze(-1) * factor}
        torch.testing.assert_close(found, plain.likelihood(by_hand).log_prob(u))

    def test_points_and_data_sets_of_their_own(self):
        u = stream(tiny("llama"), LENGTH, batch=(2, 3))
        target = LogDensity(LayerModel(layer_of(), LENGTH, noise="diagonal"), u)
        z = 0.1 * torch.randn(2, target.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        value, gradient = target.value_and_gradient(z)
        for k in range(2):
            single = LogDensity(LayerModel(layer_of(), LENGTH, noise="diagonal"), u[k])
            one, slope = single.value_and_gradient(z[k : k + 1])
            torch.testing.assert_close((one[0], slope[0]), (value[k], gradient[k]))

    @pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2"])
    def test_gradient_by_differences(self, family):
        model = LayerModel(layer_of(family), LENGTH, noise="low_rank", given=1, positions=3)
        target = LogDensity(model, stream(tiny(family), LENGTH, batch=(2,)))
        z = 0.1 * torch.randn(1, target.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        gradient = target.value_and_gradient(z)[1][0]
        for k in (0, 3, 5, 8, 9, 20, 40):
            step = torch.zeros_like(z)
            step[0, k] = 1e-6
            slope = (target.log_density(z + step) - target.log_density(z - step)).detach() / 2e-6
            torch.testing.assert_close(gradient[k], slope[0], rtol=1e-6, atol=1e-5)

    def test_single_precision(self):
        narrow, wide = layer_of(dtype=torch.float32), layer_of()
        u = stream(tiny("llama"), LENGTH, batch=(2,))
        single = LogDensity(LayerModel(narrow, LENGTH), u.float())
        double = LogDensity(LayerModel(wide, LENGTH), u)
        one, other = single.log_density(single.origin[None]), double.log_density(double.origin[None])
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-3)


class TestPositions:
    def test_the_scaled_sum_is_unbiased(self):
        u = stream(tiny("llama"), 11, batch=(1,))
        model = LayerModel(layer_of(), 11, given=1, positions=3, fresh=True)
        exact = LayerModel(layer_of(), 11, given=1).likelihood(VALUES).log_prob(u)
        torch.manual_seed(0)
        drawn = torch.stack([model.likelihood(VALUES).log_prob(u) for _ in range(200)])
        error = drawn.std() / len(drawn) ** 0.5
        assert abs(float(drawn.mean() - exact)) < 4 * float(error)
        assert float(drawn.std()) > 5 * float(error)  # there is something to average
        first = model.altered(positions=10).likelihood(VALUES).log_prob(u)
        torch.testing.assert_close(first, exact)

    def test_each_position_has_the_same_chance(self):
        model = LayerModel(layer_of(), 11, given=1, positions=4, fresh=True)
        torch.manual_seed(0)
        counts = torch.stack([torch.bincount(model.rows, minlength=11) for _ in range(2000)]).sum(0)
        assert int(counts[0]) == 0
        assert bool(((counts[1:] / 2000 - 0.4).abs() < 0.05).all())

    def test_a_fixed_choice_stays(self):
        model = LayerModel(layer_of(), 11, positions=4, position_seed=3)
        assert torch.equal(model.rows, model.rows)
        chosen = {tuple(model.altered(position_seed=seed).rows.tolist()) for seed in range(10)}
        assert len(chosen) > 1


class TestInference:
    def data(self, sequences=4):
        torch.manual_seed(0)
        model = LayerModel(layer_of(), 8, share_spread=None, gain_spread=0.3)
        values = {name: value.unsqueeze(0) for name, value in VALUES.items() if name != "share"}
        values["gain"] = 0.15 * values["gain"]
        u, usable = draw_data_sets(model, values, sequences)
        assert bool(usable)
        return model, values, u[0]

    def test_draws_have_the_noise_of_the_model(self):
        model, values, u = self.data()
        e = model.attention_of(values).residual(u)
        assert abs(float(e.std()) - 0.7) < 0.03

    @pytest.mark.parametrize("method", ["map", "laplace", "svi", pytest.param("nuts", marks=pytest.mark.slow)])
    def test_every_method_takes_the_model(self, method):
        model, _, u = self.data()
        target = LogDensity(model.altered(gain_spread=1.0), u)
        start = layer_start(target, 2 if method == "nuts" else 1, 0)
        one = start if method == "nuts" else start[0]
        if method == "map":
            draws = fit_map(target, MapConfig(steps=60), start=one)
        elif method == "laplace":
            draws = fit_laplace(target, LaplaceConfig(draws=100, correct=False), start=one)
        elif method == "svi":
            config = SviConfig(steps=60, window=20, draws=100, particles=2, shards=1, correct=False)
            draws = fit_svi(target, config, start=one)
        else:
            draws = fit_nuts(target, NutsConfig(chains=2, warmup=40, draws=20, max_depth=4), start=one)
        found = target.constrain(draws.z.reshape(-1, target.dim))
        assert abs(float(found["noise_scale"].mean()) - 0.7) < 0.1
        assert float(found["gain"].mean()) < 0.4  # 0.12 in truth, 1 where it starts from and in the prior

    def test_a_minibatch_is_scaled(self):
        model, _, u = self.data()
        values = {name: value for name, value in VALUES.items() if name != "share"}
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(u[:2], total=6)
        trace.compute_log_prob()
        whole = model.likelihood(values).log_prob(u[:2]).sum()
        torch.testing.assert_close(trace.nodes["u"]["log_prob_sum"], 3 * whole)

    def test_copies_share_nothing(self):
        model, _, u = self.data()
        other = copy.deepcopy(model)
        target, twin = LogDensity(model, u), LogDensity(other, u)
        torch.testing.assert_close(target.log_density(target.origin[None]), twin.log_density(twin.origin[None]))
        with torch.no_grad():
            target.log_density(target.origin[None])
        scaling, rows = model.layer.scaled().scaling, torch.arange(8)
        assert pickle.loads(pickle.dumps(model._memory)).find(u, rows, scaling, True) is None


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"length": 0}, "length is 0"),
            ({"given": 6}, "given is 6"),
            ({"positions": 7}, "positions is 7"),
            ({"positions": 6, "given": 1}, "positions is 6"),
            ({"noise": "pink"}, "noise is 'pink'"),
            ({"noise_rank": 0}, "noise_rank is 0"),
            ({"gain_spread": 0.0}, "gain_spread is 0"),
            ({"reference": torch.ones(3)}, "16 positive numbers"),
            ({"offset": -torch.ones(16)}, "16 positive numbers"),
        ],
    )
    def test_options_that_do_not_fit(self, options, words):
        with pytest.raises(InputError, match=words):
            LayerModel(layer_of(), **{"length": LENGTH, **options})

    def test_given_tokens_cannot_be_drawn(self):
        with pytest.raises(InputError, match="observe u"):
            LayerModel(layer_of(), LENGTH, given=1)(sequences=2)

    def test_streams_of_another_shape(self):
        with pytest.raises(InputError, match=r"\(6, 16\)"):
            LayerModel(layer_of(), LENGTH)(torch.zeros(2, 5, 16).double())

    def test_draws_from_the_prior(self):
        pyro.set_rng_seed(0)
        model = LayerModel(layer_of(), LENGTH, gain_spread=0.1)
        values = {name: prior.sample() for name, prior in model.parameter_priors().items()}
        assert set(values) == {"gain", "inverse_temperature", "share", "noise_scale"}
