import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoNormal
from pyro.infer.reparam import TransformReparam
from pyro.optim import Adam
from scipy import integrate

from probattn import AttentionTransform, CausalAttention, LatentAttention
from probattn.errors import InputError
from probattn.testing import check_distribution, check_transform
from support import attention_like, dense, tokens

SMALL = attention_like(0, 2, 2, 2, 2, size=0.4)
TRIL = torch.tensor([[0.8, 0.0], [0.3, 0.6]], dtype=torch.float64)


@pytest.mark.parametrize(
    "law",
    [
        LatentAttention(SMALL, 0.7, 4),
        LatentAttention(SMALL, torch.tensor([0.5, 0.9]), 4),
        LatentAttention(SMALL, length=4, scale_tril=TRIL),
        LatentAttention(attention_like(1, 1, 2, 2, size=0.2, batch=(3,)), torch.full((3, 1), 0.7), 3),
        LatentAttention(attention_like(2, 1, 1, 2, 1, "inclusive", size=0.2), 0.7, 3),
    ],
    ids=["scalar", "per coordinate", "scale_tril", "batched", "inclusive"],
)
def test_conforms(law):
    check_distribution(law)


@pytest.mark.parametrize("mask", ["strict", "inclusive"])
@pytest.mark.parametrize(("heads", "dim", "value_dim"), [(1, 1, None), (2, 3, 2)])
def test_transform_conforms(mask, heads, dim, value_dim):
    if mask == "inclusive" and value_dim is None:
        value_dim = 1  # with both maps the identity the first block would be singular
    attention = attention_like(3, heads, 2, dim, value_dim, mask, size=0.3)
    check_transform(AttentionTransform(attention), 0.7 * tokens(3, 3, 4, dim), causal=True)


def test_density_is_the_change_of_variables_through_the_dense_jacobian():
    law = LatentAttention(SMALL, length=4, scale_tril=TRIL)
    u = tokens(4, 4, 2)
    whole = dense(SMALL, u).movedim(2, 1).reshape(8, 8)
    noise = dist.MultivariateNormal(torch.zeros(2).double(), scale_tril=TRIL).log_prob(SMALL.residual(u)).sum()
    torch.testing.assert_close(law.log_prob(u), noise + torch.linalg.slogdet(whole)[1])


@pytest.mark.parametrize(("a", "mass"), [(0.05, 1.0), (-0.5, 1.0), (3.0, None)])
def test_two_tokens_more_integrate_to_one_when_nothing_folds(a, mass):
    """The conditional of the third scalar token, after -1 and 1, integrates to one, or to more."""
    attention = CausalAttention.from_qk_matrix(torch.tensor([[a]], dtype=torch.float64))
    law = LatentAttention(attention, 0.8, 3)
    head = LatentAttention(attention, 0.8, 2)
    past = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)

    def conditional(x):
        u = torch.cat([past, torch.tensor([[x]], dtype=torch.float64)])
        return float((law.log_prob(u) - head.log_prob(past)).exp())

    total = integrate.quad(conditional, -12, 12, points=[-1, 0, 1], limit=400, epsabs=1e-9)[0]
    if mass is None:
        assert total > 1.5  # folded: the mean number of solutions
    else:
        assert total == pytest.approx(mass, abs=1e-7)


def test_a_joint_in_two_dimensions_integrates_to_one():
    attention = CausalAttention.from_qk_matrix(torch.tensor([[0.3]], dtype=torch.float64))
    law = LatentAttention(attention, 0.6, 3)
    grid = torch.linspace(-5, 5, 161, dtype=torch.float64)
    u = (
        torch.stack(torch.meshgrid(grid, grid, grid, indexing="ij"), dim=-1).flatten(0, 2).unsqueeze(-1)
    )  # (161^3, 3, 1)
    step = float(grid[1] - grid[0])
    total = sum(float(law.log_prob(chunk).exp().sum()) for chunk in u.split(200_000)) * step**3
    # The trapezium rule on a smooth function that has vanished at the ends; the fold at |u_1 - u_2| > 3.65 holds the
    # rest.
    assert total == pytest.approx(1.0, abs=1e-4)


def test_plate_mask_and_scale():
    law = LatentAttention(SMALL, 0.7, 4)
    u = tokens(5, 6, 4, 2)

    def model(data):
        with pyro.plate("sequences", 60, subsample_size=6), poutine.mask(mask=torch.arange(6) < 2):
            return pyro.sample("u", law, obs=data)

    trace = poutine.trace(model).get_trace(u)
    assert trace.nodes["u"]["fn"].batch_shape == (6,)
    torch.testing.assert_close(trace.log_prob_sum(), 10 * law.log_prob(u[:2]).sum())
    drawn = poutine.trace(model).get_trace(None).nodes["u"]["value"]
    assert drawn.shape == (6, 4, 2)
    torch.testing.assert_close(law.to_event(0).log_prob(u), law.log_prob(u))
    torch.testing.assert_close(law.expand([3]).to_event(1).log_prob(u[:3]), law.log_prob(u[:3]).sum())


def test_transform_reparam_leaves_the_noise_as_the_latent():
    law = LatentAttention(SMALL, 0.7, 4)

    def model():
        with pyro.plate("sequences", 3):
            return pyro.sample("u", law)

    with poutine.trace() as trace, poutine.reparam(config={"u": TransformReparam()}):
        u = model()
    noise = trace.trace.nodes["u_base"]
    torch.testing.assert_close(SMALL.residual(u), noise["value"])
    torch.testing.assert_close(trace.trace.log_prob_sum(), law.base_dist.log_prob(noise["value"]).sum())


@pytest.mark.parametrize("validate", [True, False])
def test_validation(validate):
    law = LatentAttention(SMALL, 0.7, 4, validate_args=validate)
    bad = torch.full((4, 2), float("nan"), dtype=torch.float64)
    if validate:
        with pytest.raises(ValueError, match="within the support"):
            law.log_prob(bad)
        with pytest.raises(ValueError, match=r"[Tt]he right-most"):
            law.log_prob(tokens(0, 5, 2))
    else:
        assert law.log_prob(bad).isnan()  # passed on as it is, never turned into a number


@pytest.mark.parametrize("law", [LatentAttention(SMALL, 0.7, 4), AttentionTransform(SMALL)], ids=["law", "transform"])
def test_copies(law):
    u = tokens(6, 4, 2)
    score = (lambda x: x.log_prob(u)) if isinstance(law, LatentAttention) else (lambda x: x(u))
    buffer = io.BytesIO()
    pickle.dump(law, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(law), copy.copy(law), pickle.load(buffer)):
        torch.testing.assert_close(score(twin), score(law), rtol=0, atol=0)


def test_caching_does_not_change_density_or_gradient():
    results = []
    for cache in (0, 1):
        query = SMALL.query.clone().requires_grad_()
        attention = CausalAttention(query, SMALL.key, SMALL.value, SMALL.output)
        law = LatentAttention(attention, 0.7, 4)
        law.transforms = [law.transform.with_cache(cache)]
        torch.manual_seed(0)
        density = law.log_prob(law.rsample())
        results.append((density.detach(), torch.autograd.grad(density, query)[0]))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2, 4)])
def test_expand_never_shrinks(shape):
    law = LatentAttention(attention_like(1, batch=(3,)), 0.7, 3)
    with pytest.raises(InputError, match=r"batch shape \(3,\) does not expand to"):
        law.expand(shape)


def test_equality_and_repr():
    assert AttentionTransform(SMALL) == AttentionTransform(SMALL.to(torch.float64))
    assert hash(AttentionTransform(SMALL)) == hash(AttentionTransform(SMALL.detach()))
    assert AttentionTransform(SMALL) != AttentionTransform(attention_like(9, 2, 2, 2, 2))
    text = repr(LatentAttention(SMALL, 0.7, 4).expand([3]))
    assert text.startswith("LatentAttention(CausalAttention(heads=2")
    assert "length=4, batch_shape=(3,)" in text
    with pytest.raises(NotImplementedError, match="minus the mean of log_prob"):
        LatentAttention(SMALL, 0.7, 4).entropy()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_scale": -1.0}, "noise_scale must be positive and finite; its entries go from -1.0"),
        ({"noise_scale": float("nan")}, "noise_scale must be positive"),
        ({"noise_scale": float("inf")}, "noise_scale must be positive and finite"),
        ({"noise_scale": torch.ones(3)}, "noise_scale has 3 in its last axis, the coordinates, where 1 or 2"),
        ({"noise_scale": None}, "exactly one of noise_scale and scale_tril"),
        ({"noise_scale": 1.0, "scale_tril": TRIL}, "exactly one of"),
        ({"noise_scale": None, "scale_tril": torch.eye(3)}, r"its last axes must be \(2, 2\)"),
        ({"noise_scale": None, "scale_tril": -torch.eye(2)}, "positive diagonal"),
        ({"length": 0}, "length is 0"),
    ],
)
def test_bad_noise(arguments, message):
    with pytest.raises(InputError, match=message):
        LatentAttention(SMALL, **{"noise_scale": 1.0, "length": 3, **arguments})


def model(data):
    a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))
    with pyro.plate("sequences", len(data)):
        attention = CausalAttention.from_qk_matrix(a[..., None, None, None], heads=1)
        pyro.sample("u", LatentAttention(attention, scale.unsqueeze(-1), data.shape[-2]), obs=data)


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(1)
    return LatentAttention(CausalAttention.from_qk_matrix(torch.tensor([[-0.4]]).double()), 0.5, 12).sample((24,))


@pytest.fixture(scope="module")
def exact(data):
    a = torch.linspace(-3, 1.2, 169, dtype=torch.float64)
    scale = torch.linspace(0.35, 0.75, 161, dtype=torch.float64)
    residual, logabs = CausalAttention.from_qk_matrix(a[:, None, None, None, None], heads=1).residual_and_logabsdet(
        data
    )
    joint = logabs.sum((-1, -2))[:, None] - 0.5 * residual.square().sum((-1, -2, -3))[:, None] / scale**2
    joint = joint - data.numel() * scale.log() - 0.5 * a[:, None] ** 2 - 0.5 * scale.log() ** 2 - scale.log()
    weight = joint.flatten().softmax(0).view_as(joint)
    mean, square = (weight.sum(1) * a).sum(), (weight.sum(1) * a**2).sum()
    mode = divmod(int(joint.argmax()), len(scale))
    return {
        "mean": float(mean),
        "sd": float((square - mean**2).sqrt()),
        "scale": float((weight.sum(0) * scale).sum()),
        "mode": (float(a[mode[0]]), float(scale[mode[1]])),
    }


class TestInferenceOverItsParameters:
    """Pyro's own inference against the exact posterior on a grid of the two parameters."""

    def fitted(self, guide, data):
        svi = SVI(model, guide, Adam({"lr": 0.03}), Trace_ELBO())
        for _ in range(300):
            svi.step(data)
        return guide

    def test_auto_delta_is_the_mode(self, data, exact):
        median = self.fitted(AutoDelta(model), data).median(data)
        pyro.clear_param_store()
        # Half a cell of the grid, and what 300 steps of Adam leave.
        assert float(median["a"]) == pytest.approx(exact["mode"][0], abs=0.03)
        assert float(median["scale"]) == pytest.approx(exact["mode"][1], abs=0.004)

    @pytest.mark.parametrize("guide_class", [AutoNormal, AutoLaplaceApproximation])
    def test_normal_guides_are_near_the_mean(self, guide_class, data, exact):
        guide = self.fitted(guide_class(model), data)
        if guide_class is AutoLaplaceApproximation:
            guide = guide.laplace_approximation(data)
        median = guide.median(data)
        pyro.clear_param_store()
        # A normal approximation of a skewed posterior: within one posterior standard deviation.
        assert abs(float(median["a"]) - exact["mean"]) < exact["sd"]
        assert float(median["scale"]) == pytest.approx(exact["scale"], abs=0.03)

    @pytest.mark.slow
    def test_nuts(self, data, exact):
        mcmc = MCMC(NUTS(model), num_samples=100, warmup_steps=60, disable_progbar=True)
        mcmc.run(data)
        draws = mcmc.get_samples()["a"]
        error = exact["sd"] / float(mcmc.diagnostics()["a"]["n_eff"]) ** 0.5
        assert abs(float(draws.mean()) - exact["mean"]) < 4 * error  # four Monte Carlo standard errors
        assert abs(float(draws.mean())) > 4 * error  # which is enough to tell it from the prior's mean
        assert mcmc.diagnostics()["divergences"]["chain 0"] == []
