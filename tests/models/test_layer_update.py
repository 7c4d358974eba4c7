"""Posteriors with a change of low rank of the queries: priors, densities, recovery."""

import pytest
import torch
from layer_zoo import stream, tiny
from pyro import poutine
from torch.distributions import Normal

from probattn.errors import InputError
from probattn.hf import attention_layer
from probattn.hf.layers.update import logit_change, query_update, updated
from probattn.inference.layer.start import layer_start, leading_update
from probattn.inference.methods.laplace import LaplaceConfig, fit_laplace
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.map import MapConfig, fit_map
from probattn.inference.methods.svi import SviConfig, fit_svi
from probattn.inference.studies.layer.small import random_layer
from probattn.models.layer import LayerModel
from probattn.models.layer_simulate import continue_streams
from probattn.models.layer_update import update_prior

LENGTH = 6
HEADS = [1, 2]


def layer_of(family="llama", dtype=torch.float64):
    return attention_layer(tiny(family, dtype=dtype), 1, check=False)


def posed(family="llama", *, rank=2, sequences=2, dtype=torch.float64, **options):
    layer, u = layer_of(family, dtype), stream(tiny(family, dtype=dtype), LENGTH, batch=(sequences,))
    heads = [head for head in HEADS if head < layer.heads]
    prior = update_prior(layer, u, rank=rank, heads=heads, given=1)
    return LayerModel(layer, LENGTH, given=1, update=prior, **options), u


def drawn(model, seed=0, batch=()):
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: law.event_shape for name, law in model.parameter_priors().items()}
    values = {
        name: torch.randn((*batch, *shape), generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }
    return {name: value if name.startswith("update") else (0.3 * value).exp() for name, value in values.items()}


class TestPrior:
    @pytest.mark.parametrize(
        ("family", "spread"),
        # Normed queries keep their length, so that large changes of their logits are not to be had.
        [("llama", 1.7), ("llama yarn", 1.7), ("mistral", 1.7), ("gpt2", 1.7), ("qwen3", 0.1), ("gemma3", 0.1)],
    )
    @pytest.mark.parametrize("rank", [1, 3])
    def test_logits_change_by_the_spread(self, family, spread, rank):
        layer, u = layer_of(family), stream(tiny(family), 12, batch=(4,))
        torch.manual_seed(0)
        prior = update_prior(layer, u, rank=rank, spread=spread, given=1)
        values = {name: law.sample((300,)) for name, law in prior.priors().items()}
        found = logit_change(layer, prior.update_of(values), u, 1).square().mean(0).sqrt() / spread
        # Below 1, as the first tokens see few others and the mean that is taken off is that of these few.
        assert bool(((found > 0.5) & (found < 1.2)).all())

    def test_units_of_streams_do_not_matter(self):
        layer, u = layer_of(), stream(tiny("llama"), 12, batch=(4,))
        prior = update_prior(layer, u, rank=1)
        other = prior._replace(features=2 * prior.features, keys=prior.keys / 2)
        values = {name: law.sample() for name, law in prior.priors().items()}
        torch.testing.assert_close(prior.update_of(values).product, other.update_of(values).product)

    def test_values_of_a_product(self):
        model, _ = posed(rank=2)
        product = model.update_of(drawn(model)).product
        values = model.update.values_of(product)
        torch.testing.assert_close(model.update.update_of(values).product, product)
        down, up = values["update_in"], values["update_out"]
        torch.testing.assert_close(down @ down.mT, up.mT @ up)  # of one size
        small = model.update._replace(rank=1).values_of(product)
        assert small["update_in"].shape == (2, 1, 16)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"heads": [4]}, "0 to 3"),
            ({"heads": [1, 1]}, "increasing"),
            ({"heads": []}, "increasing"),
            ({"rank": 0}, "update_rank is 0"),
            ({"rank": 5}, "a query has 4 features"),
            ({"spread": 0.0}, "update_spread is 0"),
        ],
    )
    def test_refusals(self, options, words):
        with pytest.raises(InputError, match=words):
            update_prior(layer_of(), stream(tiny("llama"), 6, batch=(2,)), **{"rank": 1, **options})

    def test_keys_that_never_change(self):
        with pytest.raises(InputError, match="never changes"):
            update_prior(layer_of(), torch.ones(2, 5, 16).double().mul_(0.0), rank=1)


class TestDensity:
    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
    @pytest.mark.parametrize("jacobian", [True, False])
    def test_log_joint_by_dense_change_of_variables(self, family, jacobian):
        model, u = posed(family, jacobian=jacobian)
        values = drawn(model)
        layer, prior = model.layer, model.update
        down = values["update_in"] / prior.features
        up = values["update_out"] / (prior.keys.view(-1, 1, 1) * 2**0.5)
        changed = updated(
            layer.scaled(values["gain"], values["inverse_temperature"], values["share"]),
            query_update(layer, prior.heads, down, up),
        )
        e = (u - changed.mean(u))[:, 1:]
        expected = Normal(0, values["noise_scale"]).log_prob(e).sum()
        if jacobian:
            for sequence in u:
                whole = torch.autograd.functional.jacobian(lambda x: x - changed.mean(x), sequence)
                # Causal: the determinant of the whole beside the given token is that of its blocks.
                expected = expected + torch.linalg.slogdet(whole[1:, :, 1:].reshape(80, 80))[1]
        for name, law in model.parameter_priors().items():
            expected = expected + law.log_prob(values[name])
        found = poutine.trace(poutine.condition(model, data=values)).get_trace(u).log_prob_sum()
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
    def test_gradient_by_differences(self, family):
        model, u = posed(family, positions=3, signed=True)
        target = LogDensity(model, u)
        z = 0.3 * torch.randn(1, target.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        gradient = target.value_and_gradient(z)[1][0]
        sites = [target.sites[name] for name in ("gain", "update_in", "update_out")]
        for k in (sites[0].start, sites[1].start, sites[1].start + 17, sites[1].stop - 1, sites[2].start + 3):
            step = torch.zeros_like(z)
            step[0, k] = 1e-6
            slope = (target.log_density(z + step) - target.log_density(z - step)).detach() / 2e-6
            torch.testing.assert_close(gradient[k], slope[0], rtol=1e-6, atol=1e-5)

    def test_points_together_are_points_alone(self):
        model, u = posed(sequences=3)
        target = LogDensity(model, u)
        z = 0.3 * torch.randn(3, target.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        value, gradient = target.value_and_gradient(z)
        for k in range(3):
            one, slope = target.value_and_gradient(z[k : k + 1])
            torch.testing.assert_close((one[0], slope[0]), (value[k], gradient[k]))

    def test_without_a_change_the_model_is_the_old_one(self):
        model, u = posed()
        values = drawn(model)
        values["update_out"] = torch.zeros_like(values["update_out"])
        plain = model.altered(update=None)
        assert torch.equal(model.likelihood(values).log_prob(u), plain.likelihood(values).log_prob(u))

    def test_a_turn_of_the_factors_changes_nothing(self):
        model, u = posed(rank=2)
        values = drawn(model)
        turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)).double())[0]
        turned = {**values, "update_in": turn @ values["update_in"], "update_out": values["update_out"] @ turn.mT}
        target = LogDensity(model, u)
        one, other = (target.log_density(target.unconstrain(part)[None]) for part in (values, turned))
        torch.testing.assert_close(one, other)

    def test_single_precision(self):
        narrow, u = posed(dtype=torch.float32)
        wide, v = posed()
        values = drawn(wide)
        one = narrow.likelihood({name: value.float() for name, value in values.items()}).log_prob(u)
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), wide.likelihood(values).log_prob(v), rtol=1e-4, atol=1e-2)

    def test_temperatures_as_trained(self):
        model, u = posed(temperature_spread=None)
        values = drawn(model)
        assert "inverse_temperature" not in values
        full = model.altered(temperature_spread=0.3)
        ones = {**values, "inverse_temperature": torch.ones(4).double()}
        torch.testing.assert_close(model.likelihood(values).log_prob(u), full.likelihood(ones).log_prob(u))

    def test_streams_of_several_layers_are_not_drawn_together(self):
        model, _ = posed()
        with pytest.raises(InputError, match="one after the other"):
            model.likelihood(drawn(model, batch=(2, 1))).sample()
        with pytest.raises(InputError, match="one change"):
            model.attention_of(drawn(model, batch=(2, 1)))


class TestStart:
    def test_the_start_is_where_the_likelihood_rises(self):
        model, u = posed(rank=1)
        target = LogDensity(model, u)
        values = target.constrain(target.origin)
        first = leading_update(model, values, u)
        zero = {name: torch.zeros_like(value) for name, value in first.items()}
        generator = torch.Generator().manual_seed(0)

        def rise(change):
            scaled = {name: 0.01 * value for name, value in change.items()}
            scores = [model.likelihood({**values, **part}).log_prob(u).sum() for part in (scaled, zero)]
            return float(scores[0] - scores[1])

        others = []
        for _ in range(20):
            random = {name: torch.randn(value.shape, generator=generator).double() for name, value in first.items()}
            others.append(
                rise({name: value / value.flatten(1).norm(dim=1)[:, None, None] for name, value in random.items()})
            )
        assert rise(first) > 3 * max(map(abs, others))

    def test_no_change_is_stationary(self):
        model, u = posed()
        target = LogDensity(model, u)
        gradient = target.value_and_gradient(target.origin[None])[1][0]
        sites = [target.sites[name] for name in ("update_in", "update_out")]
        assert all(bool((gradient[site.start : site.stop] == 0).all()) for site in sites)
        start = layer_start(target, 2, 0)
        gradient = target.value_and_gradient(start)[1]
        assert all(bool((gradient[:, site.start : site.stop] != 0).any()) for site in sites)


class TestRecovery:
    def data(self, sequences=6):
        """Streams behind a layer whose second head has a changed query map, and the truth."""
        layer, length = random_layer(12, 2, 12, strength=0.25, seed=0), 12
        generator = torch.Generator().manual_seed(1)
        e = torch.randn(sequences, length, 12, generator=generator, dtype=torch.float64)
        prior = update_prior(layer, e, rank=1, heads=[1], spread=2.0)
        model = LayerModel(layer, length, given=1, share_spread=None, update=prior, gain_spread=0.2)
        truth = {
            "gain": torch.ones(2).double(),
            "inverse_temperature": torch.ones(2).double(),
            "noise_scale": torch.ones(1).double(),
            **{
                name: torch.randn(law.event_shape, generator=generator).double() for name, law in prior.priors().items()
            },
        }
        size = float(logit_change(layer, prior.update_of(truth), e, 1))
        truth["update_out"] = 2.0 / size * truth["update_out"]  # a change that can be found in so few sequences
        u = continue_streams(model, truth, e, e)
        assert bool((model.attention_of(truth).logabsdet(u)[0] > 0).all())
        return model, truth, u

    @pytest.mark.slow
    def test_a_known_change_is_found_and_missed_without_the_jacobian(self):
        model, truth, u = self.data(80)
        true = model.update_of(truth).product
        cosine, error = {}, {}
        for jacobian in (True, False):
            target = LogDensity(model.altered(jacobian=jacobian), u)
            start = layer_start(target, 1, 0)[0]
            draws = fit_laplace(target, LaplaceConfig(draws=100, correct=False), start=start)
            products = model.update_of(target.constrain(draws.z[0])).product
            mean, sd = products.mean(0), products.std(0)
            cosine[jacobian] = float((mean * true).sum() / mean.norm() / true.norm())
            error[jacobian] = float(((mean - true) / sd).square().mean().sqrt())
        assert cosine[True] > 0.9
        assert error[True] < 1.6
        assert cosine[False] < 0.5
        assert error[False] > 3

    @pytest.mark.parametrize("guide", ["low_rank", "mean_field"])
    def test_guides_take_the_model(self, guide):
        model, _, u = self.data()
        target = LogDensity(model, u)
        config = SviConfig(guide=guide, steps=20, window=10, draws=40, particles=2, shards=1, correct=False)
        draws = fit_svi(target, config, start=layer_start(target, 1, 0)[0])
        assert bool(torch.isfinite(draws.z).all())
        assert model.update_of(target.constrain(draws.z[0])).product.shape == (40, 1, 6, 12)

    def test_a_point(self):
        model, _, u = self.data()
        target = LogDensity(model, u)
        start = layer_start(target, 1, 0)[0]
        draws = fit_map(target, MapConfig(steps=30), start=start)
        before, after = (float(target.log_density(z[None]).detach()) for z in (start, draws.z[0, 0]))
        assert after > before
