"""The conformance kit rejects broken transforms and distributions; test_distributions has those that it accepts."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints, transforms

from probattn import AttentionTransform, CausalAttention, LatentAttention, blocks
from probattn.testing import ConformanceError, check_distribution, check_transform
from support import attention_like, tokens

ATTENTION = attention_like(0, 2, 2, 2, 1, "inclusive", size=0.3)
# Repulsion: one solution everywhere, and a Jacobian that matters.
REPULSION = CausalAttention.from_qk_matrix(-torch.eye(2, dtype=torch.float64))
X = 0.5 * tokens(0, 3, 4, 2)


class Renewed(AttentionTransform):
    """Subclasses keep their class when the cache is switched on."""

    def with_cache(self, cache_size=1):
        return self if cache_size == self._cache_size else type(self)(self.attention, cache_size=cache_size)


class WrongSign(Renewed):
    def log_abs_det_jacobian(self, x, y):
        return -super().log_abs_det_jacobian(x, y)


class StrictFormulaUnderInclusiveMask(Renewed):
    def log_abs_det_jacobian(self, x, y):
        factors = self.attention.mean_and_factors(y).factors._replace(own=None)
        return -blocks.logabsdet_one_minus(blocks.sylvester_core(factors))[1].sum(-1)


class NotCausal(Renewed):
    def _inverse(self, y):
        return super()._inverse(y.flip(-2)).flip(-2)

    def _call(self, x):
        return super()._call(x.flip(-2)).flip(-2)

    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x.flip(-2), y.flip(-2))


class KeepsBatchDimension(Renewed):
    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x, y).unsqueeze(-1)


class ApproximateInverse(Renewed):
    def _inverse(self, y):
        return super()._inverse(y) + 1e-4 * y


class DropsItsGradient(Renewed):
    def _call(self, x):
        with torch.no_grad():
            return super()._call(x) + 0 * x


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (WrongSign, "dense log|det|"),
        (StrictFormulaUnderInclusiveMask, "dense log|det|"),
        (NotCausal, "a token depends on a later one"),
        (KeepsBatchDimension, "log_abs_det_jacobian has shape"),
        (ApproximateInverse, "inv"),
        (DropsItsGradient, "gradient of forward"),
    ],
)
def test_broken_transforms_are_rejected(broken, rule):
    check_transform(Renewed(ATTENTION), X, causal=True)
    with pytest.raises(ConformanceError) as error:
        check_transform(broken(ATTENTION), X, causal=True)
    assert rule in str(error.value)


def test_a_transform_without_with_cache_is_rejected():
    class Plain(transforms.Transform):
        domain = codomain = constraints.real
        bijective = True

        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def _call(self, x):
            return self.factor * x

        def _inverse(self, y):
            return y / self.factor

        def log_abs_det_jacobian(self, x, y):
            return torch.full_like(x, self.factor).log()

    with pytest.raises((ConformanceError, NotImplementedError)):
        check_transform(Plain(2.0), tokens(0, 3))


class NoExpand(LatentAttention):
    def expand(self, batch_shape, _instance=None):
        raise NotImplementedError


class WrongScale(LatentAttention):
    def log_prob(self, value):
        return super().log_prob(1.1 * value)


class WrongSupport(LatentAttention):
    support = constraints.independent(constraints.real, 1)


class ForgetsValidation(LatentAttention):
    def _validate_sample(self, value):
        pass

    def log_prob(self, value):
        return super().log_prob(value[..., :2])


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (NoExpand, "expand is not implemented"),
        (WrongSupport, "support has another event_dim"),
        (WrongScale, "expand returned|draws disagree"),
        (ForgetsValidation, "scored without complaint"),
    ],
)
def test_broken_distributions_are_rejected(broken, rule):
    with pytest.raises(ConformanceError, match=rule):
        check_distribution(broken(attention_like(0, 1, 2, 2, size=0.2), 0.7, 3))


class Scaled(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(1.1 * value)

    def expand(self, batch_shape, _instance=None):
        return Scaled(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


class Forgetful(LatentAttention):
    """A model that forgets the Jacobian."""

    def log_prob(self, value):
        return self.base_dist.log_prob(self.transform.inv(value))

    def expand(self, batch_shape, _instance=None):
        new = super().expand(batch_shape)
        new.__class__ = Forgetful
        return new


@pytest.mark.parametrize(
    ("broken", "right"),
    [
        (Scaled(torch.zeros(2).double(), 1.0), dist.Normal(torch.zeros(2).double(), 1.0)),
        (Forgetful(REPULSION, 1.0, 6), LatentAttention(REPULSION, 1.0, 6)),
    ],
    ids=["another scale", "without the Jacobian"],
)
def test_draws_that_disagree_with_the_density_are_seen(broken, right):
    check_distribution(right, draws=4000)
    with pytest.raises(ConformanceError, match="draws disagree with log_prob"):
        check_distribution(broken, draws=4000)
