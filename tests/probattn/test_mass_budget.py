"""Masses after long pasts: the estimator against its formula, and a budget that is kept."""

import math

import pytest
import torch

from probattn import CausalAttention
from probattn.errors import InputError
from probattn.next_token import NextToken
from probattn.solve.context import Context
from support import tokens

STRONG = CausalAttention.from_qk_matrix(1.5 * tokens(3, 3, 3))
TRIL = torch.tensor([[0.7, 0.0, 0.0], [0.2, 0.6, 0.0], [-0.1, 0.3, 0.8]], dtype=torch.float64)
NOISES = [{"noise_scale": 0.7}, {"noise_scale": torch.tensor([0.5, 0.7, 0.9]).double()}, {"scale_tril": TRIL}]


@pytest.mark.parametrize("noise", NOISES, ids=["number", "coordinates", "cholesky"])
def test_the_weights_are_those_of_the_formula(noise, monkeypatch):
    """Density over mixture, each component evaluated on its own by Pyro's distribution."""
    past = Context.of(STRONG, tokens(0, 5, 3))
    following = NextToken(past, **noise)
    monkeypatch.setattr("probattn.next_token._CHUNK", 60)  # several chunks, of a few proposals each
    seen = []
    own = NextToken._weights

    def listen(self, u, *rest):
        seen.append(u)
        return own(self, u, *rest)

    monkeypatch.setattr(NextToken, "_weights", listen)
    found, signed = following.importance_weights(40, seed=3)
    u = torch.cat(seen)
    assert len(seen) > 5
    values = past.values.sum(-3)
    centre = values.mean(0, keepdim=True)
    anchors = torch.cat([centre, values, (values + centre) / 2])
    components = [following.noise.log_prob(((u - m) / 1.5).unsqueeze(-2)) - 3 * math.log(1.5) for m in anchors]
    mixture = torch.stack(components).logsumexp(0) - math.log(len(anchors))
    mean, jacobian = past.mean_and_jacobian(u)
    determinant = torch.linalg.det(jacobian)
    expected = (following.noise.log_prob((u - mean).unsqueeze(-2)) - mixture).exp()
    torch.testing.assert_close(found, expected * determinant.abs(), rtol=1e-10, atol=0)
    torch.testing.assert_close(signed, expected * determinant, rtol=1e-10, atol=0)


def test_the_budget_is_kept_and_paid_for_by_the_standard_error(caplog):
    caplog.set_level("INFO")
    following = NextToken(Context.of(STRONG, tokens(0, 64, 3)), 0.7)
    whole = following.mass()
    assert not caplog.records
    part = following.mass(budget=64 * 3 * 5 * 1000)
    assert caplog.messages == ["mass after 64 tokens: 1000 proposals within the budget, not 20000"]
    assert part.standard_error > 2 * whole.standard_error
    assert abs(part.value - whole.value) < 4 * math.hypot(part.standard_error, whole.standard_error)
    assert following.mass(budget=1).value > 0  # never fewer than 512 proposals
    with pytest.raises(InputError, match="draws is 1; it must be at least 2"):
        following.mass(draws=1)


def test_two_thousand_tokens_in_eight_dimensions_take_seconds():
    """More than nine minutes once, for a table of all proposals and all past tokens."""
    attention = CausalAttention.from_qk_matrix(1.5 * tokens(1, 8, 8))
    following = NextToken(Context.of(attention, tokens(2, 2000, 8)), 0.7)
    mass = following.mass(budget=200_000_000)
    assert mass.method == "importance sampling"
    assert 0 < mass.standard_error < mass.value
