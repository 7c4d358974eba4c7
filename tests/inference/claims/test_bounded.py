"""The claim on bounded attention, and how its parts turn where the radius is left out."""

import math
from dataclasses import replace

import pytest
import torch

from probattn.errors import InputError
from probattn.inference.claims import bounded
from probattn.inference.claims.bounded import bounded_claim, with_radius, without_radius
from probattn.models.bounded_run import bounded_run
from probattn.models.long_run import long_run
from probattn.models.scalar import scalar_attention
from probattn.process import AttentionProcess
from probattn.solve.sequence import solve_sequence


def weak_line():
    """a sigma^2 = 0.1: an attraction that a radius of 2 makes a contraction."""
    return bounded.CausalAttention.from_qk_matrix(torch.tensor([[0.1]]).double(), memory_radius=2.0)


class TestParts:
    """Each part is fulfilled with the radius, and fails without it at the same parameters."""

    def test_masses(self):
        error, scores, count = bounded._masses(with_radius)
        assert error < 1e-6
        assert max(scores) < 4.5
        assert count == 32
        assert bounded._control_mass() > 1.1

    def test_prefixes(self):
        assert bounded._prefixes(with_radius) < 1e-6
        assert bounded._prefixes(without_radius) > 1e-3

    def test_sampling(self):
        rate, left = bounded._sampling(with_radius)
        assert rate <= 1 + 1e-9
        assert left == 0
        assert bounded._sampling(without_radius)[1] > 0

    def test_margins(self):
        text = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert bounded._margin_gap(text, with_radius) == 0
        assert bounded._margin_gap(text, without_radius) > 0.1

    def test_barrier(self):
        assert bounded._barrier_gap(with_radius) == 0
        assert bounded._barrier_gap(without_radius) > 0.1

    @pytest.mark.slow
    def test_posterior(self):
        divergences, distance = bounded._posterior(bounded=True, full=False)
        assert divergences == 0
        assert distance < bounded.BOUND["nuts_distance"] < bounded._posterior(bounded=False, full=False)[1]


@pytest.mark.slow
def test_the_claim_holds_and_turns_without_the_radius(subject):
    claim = bounded_claim(subject)
    assert claim.verdict == "supported", claim.measured
    broken = bounded_claim(subject, build=without_radius)
    assert broken.broken
    for name in ("prefix_mass_error", "tokens_solved_one_by_one", "margin_below_floor", "barrier_below_floor"):
        assert broken.measured[name] > broken.bound[name]


class TestBoundedRun:
    def test_tokens_are_those_of_the_solver_across_its_blocks(self):
        run = bounded_run(weak_line(), 1.0, [1, 3, 130, 300], sequences=3, seed=4)
        u = solve_sequence(weak_line(), run.noise)
        torch.testing.assert_close(run.first, u, rtol=0, atol=1e-11)
        for k, n in enumerate(run.lengths.tolist()):
            torch.testing.assert_close(run.mean[k], u[:, :n, 0].mean(-1), rtol=0, atol=1e-11)
            torch.testing.assert_close(run.square[k], u[:, :n, 0].square().mean(-1), rtol=0, atol=1e-10)
        torch.testing.assert_close(run.largest, (u - run.noise)[:, 1:, 0].abs().amax(-1), rtol=0, atol=1e-11)

    def test_several_heads_and_a_start(self):
        maps = [torch.tensor([[[x]], [[y]]]).double() for x, y in ((0.3, -0.2), (0.5, 1.0), (1.0, -0.5), (1.0, 0.4))]
        attention = bounded.CausalAttention(*maps, memory_radius=1.5, start=torch.tensor([0.7]).double())
        run = bounded_run(attention, 0.8, [200], sequences=2)
        torch.testing.assert_close(run.first, solve_sequence(attention, run.noise), rtol=0, atol=1e-11)

    def test_an_attractive_process_stays_bounded_where_it_escapes_without_the_radius(self):
        run = bounded_run(with_radius(scalar_attention(1.0)), 1.0, [100, 2000], sequences=2)
        assert run.square.max() < 3
        assert (run.largest <= bounded.RADIUS).all()
        free = long_run(without_radius(scalar_attention(1.0)), 1.0, [50], sequences=2)
        assert free.covariance.max() > 10

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"attention": scalar_attention(0.1)}, "needs an attention with a memory_radius"),
            ({"attention": with_radius(scalar_attention(1.0, mask="inclusive"))}, "needs tokens on the line, a strict"),
            ({"attention": with_radius(scalar_attention(1.0)).to(torch.float32)}, "needs float64"),
            ({"noise_scale": 100.0}, "make exponents of"),
            ({"lengths": [5, 5]}, "must increase strictly"),
            ({"lengths": []}, "must increase strictly"),
            ({"sequences": 0}, "sequences is 0"),
        ],
    )
    def test_what_it_cannot_run_is_refused(self, change, message):
        options = {"attention": with_radius(scalar_attention(1.0)), "noise_scale": 1.0, "lengths": [5], "sequences": 1}
        with pytest.raises(InputError, match=message):
            bounded_run(**{**options, **change})


def test_a_path_in_blocks_is_a_path_token_by_token():
    attention = with_radius(scalar_attention(1.0))
    process = AttentionProcess(attention, 1.0)
    path = process.path(0)
    u = path[0:300]
    assert path.computed == 512
    noise = torch.cat([process.noise(0, 0), process.noise(0, 1)])[:300]
    torch.testing.assert_close(u, solve_sequence(attention, noise, method="sequential"), rtol=0, atol=1e-10)
    assert math.isfinite(float(u.abs().max()))


def test_the_claim_judges_its_parts_and_its_controls(subject, monkeypatch):
    """A claim whose slow parts are replaced by what they give."""
    run = bounded_run(with_radius(scalar_attention(1.0)), 1.0, [1000, 2000], sequences=2)

    def given(good, bad):
        return lambda build: good if build is with_radius else bad

    parts = {
        "_masses": lambda build: (0.0, [1.0], 32),
        "_prefixes": given(0.0, 1.0),
        "_sampling": given((0.9, 0.0), (3.0, 60.0)),
        "_barrier_gap": given(0.0, 4.0),
        "_margin_gap": lambda text, build: 0.0 if build is with_radius else 9.0,
        "_posterior": lambda *, bounded, full: (0.0, 0.05 if bounded else 0.3),
        "_long_path": lambda full: (run, 0.0),
        "_unbounded_path": lambda: 300.0,
    }
    for name, part in parts.items():
        monkeypatch.setattr(bounded, name, part)
    small = replace(subject, inputs=subject.inputs[:2])
    assert bounded_claim(small).verdict == "supported"
    for name, part in {
        "_prefixes": given(1e-3, 1.0),
        "_sampling": given((1.1, 0.0), (3.0, 60.0)),
        "_posterior": lambda *, bounded, full: (0.0, 0.05),  # the control is not noticed
        "_control_mass": lambda: 1.0,
        "_unbounded_path": lambda: 2.0,
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(bounded, name, part)
            claim = bounded_claim(small)
        assert claim.broken, name
