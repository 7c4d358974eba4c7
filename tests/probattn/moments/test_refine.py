"""Rows that lose digits: sinks, offsets and logits beyond the range against references, with the old way as control."""

import itertools
import math

import mpmath
import pytest
import torch

from probattn.moments import blocked, cpu, passes, refine
from probattn.moments.operators import origin_moments, past_moments
from probattn.moments.problem import CANCELLATION, Problem
from probattn.moments.refine import Rows, norm_bound

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def way(request, monkeypatch):
    """Everything holds for the compiled kernel, where it serves, and for torch."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "AVAILABLE", False)
    elif not cpu.AVAILABLE:
        pytest.skip("the kernels were not built: no C compiler")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_sink(length, sink, dtype, *, offset=0.0, batch=1, heads=2, group=1, rank=3, dim=4, wanted=False):
    """q, k, v, first, limit; the first token is larger than the others and no query wants it, or all do."""
    query = normal(batch, heads, length, group, rank, seed=1)
    key = normal(batch, heads, length, rank, seed=2) + offset
    value = normal(batch, heads, length, dim, seed=3) + offset
    key[:, :, 0], value[:, :, 0] = sink * key[:, :, 0], sink * value[:, :, 0]
    pull = (query * key[:, :, :1, None]).sum(-1, keepdim=True)
    query = torch.where((pull > 0) == wanted, query, -query)
    place = torch.arange(length)
    return *(part.to(dtype) for part in (query, key, value)), torch.zeros_like(place), place + 1


def centred(query, key, value, first, limit, *, mask=None, scale=1.0, softcap=None):
    """The three moments with every row about its own largest logit and its own means."""
    token = torch.arange(key.shape[2])
    rough = scale * torch.einsum("bkpgr,bksr->bkpgs", query, key)
    visible = ((token >= first[:, None]) & (token < limit[:, None]))[:, None].expand(rough.shape)
    if mask is not None:
        own = mask.expand(len(query), query.shape[1] * query.shape[3], *mask.shape[2:])
        own = own.unflatten(1, (query.shape[1], query.shape[3])).movedim(2, 3)
        visible = visible & (own if mask.dtype == torch.bool else ~own.isinf())
    bias = own if mask is not None and mask.dtype != torch.bool else torch.zeros(())
    slope = torch.ones_like(rough)
    if softcap:
        logits, slope = softcap * torch.tanh(rough / softcap), 1 - torch.tanh(rough / softcap) ** 2
        top_key = torch.zeros_like(query)
    else:
        top = (rough + bias).masked_fill(~visible, -torch.inf).argmax(-1)  # (B, K, P, g)
        top_key = key.unsqueeze(2).unsqueeze(2).expand(*rough.shape, -1).gather(
            4, top[..., None, None].expand(*top.shape, 1, key.shape[-1])
        ).squeeze(4)  # fmt: skip
        near = key[:, :, None, None] - top_key.unsqueeze(4)  # (B, K, P, g, S, r)
        logits = scale * (query.unsqueeze(4) * near).sum(-1)
    logits = (logits + bias).masked_fill(~visible, -torch.inf)
    some = visible.any(-1, keepdim=True)
    alpha = logits.masked_fill(~some, 0.0).softmax(-1) * some
    mean_value = torch.einsum("bkpgs,bksd->bkpgd", alpha, value)
    mean_key = torch.einsum("bkpgs,bksr->bkpgr", alpha * slope, key)
    away_value = value[:, :, None, None] - mean_value.unsqueeze(4)
    away_key = key[:, :, None, None] - (0 if softcap else mean_key.unsqueeze(4))
    covariance = torch.einsum(
        "bkpgs,bkpgsd,bkpgsr->bkpgdr", alpha * slope, away_value, away_key.expand(*rough.shape, -1)
    )
    log_sum = logits.logsumexp(-1) + scale * (query * top_key).sum(-1)
    return covariance, torch.cat([mean_value, mean_key], -1), log_sum


def relative(found, expected):
    return float((found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


def errors(parts, where, ups, function=past_moments, **options):
    """Relative errors of the three moments and of the three gradients, each in its largest entry; rows 3, 4, ..."""
    parts = [part.detach().requires_grad_() for part in parts]
    wide = [part.detach().double().requires_grad_() for part in parts]
    results = []
    for own, call in ((parts, function), (wide, centred)):
        moments = call(*own, *where, **options)
        coming = [up.to(part.dtype) for up, part in zip(ups, moments, strict=True)]
        slopes = torch.autograd.grad([*moments], own, coming)
        # That of the sink itself is as large as the sink, and would hide the errors of the others.
        results.append([*(part[:, :, 2:] for part in moments), *(part[:, :, 1:] for part in slopes)])
    return [relative(mine, other) for mine, other in zip(*results, strict=True)]


def upstream(query, value, seed=5):
    """Gradients of the moments: none for the first two rows, which attend to the sink as well."""
    shapes = (value.shape[-1], query.shape[-1]), (value.shape[-1] + query.shape[-1],), ()
    ups = [normal(*query.shape[:-1], *shape, seed=seed + n) for n, shape in enumerate(shapes)]
    for up in ups:
        up[:, :, :2] = 0
    return ups


class TestSinks:
    @pytest.mark.parametrize("length", [40, 512])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("sink", "offset"), [(1e4, 0.0), (1e6, 0.0), (1e6, 100.0)])
    def test_moments_and_gradients_keep_their_digits(self, sink, offset, dtype, length, monkeypatch):
        if length == 512 and sink == 1e4:
            pytest.skip("the loss grows with the sink; one size at this length")
        heads = {"heads": 1, "rank": 2, "dim": 2} if length == 512 else {}
        *parts, first, limit = with_sink(length, sink, dtype, offset=offset, **heads)
        ups = upstream(parts[0], parts[2])
        bound = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]  # sums of up to 512 products
        found = errors(parts, (first, limit), ups)
        assert max(found) < bound, found
        monkeypatch.setattr(passes, "lost_rows", lambda problem, c, o, log_sum, gain: torch.zeros_like(log_sum).bool())
        old = errors(parts, (first, limit), ups)
        assert max(old) > 100 * bound, old
        assert max(old[3:]) > 100 * bound, old

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_where_the_sink_is_wanted_nothing_is_lost_and_nothing_repeated(self, dtype):
        *parts, first, limit = with_sink(40, 1e4, dtype, wanted=True)
        way = torch.ops.probattn.past_moments(*parts, first, limit, None, None, 1.0, 0.0)[4]
        assert (way == 0).all()
        # The covariance is nearly zero here, and so without digits.
        assert max(errors(parts, (first, limit), upstream(parts[0], parts[2]))[1:3]) < 10 * torch.finfo(dtype).eps

    def test_against_forty_digits(self):
        *parts, first, limit = with_sink(9, 1e6, torch.float64, heads=1, rank=2, dim=2)
        found = past_moments(*parts, first, limit)
        plain = blocked.forward(Problem(*parts, first, limit, None, 1.0, 0.0))[0]
        with mpmath.workdps(40):
            query, key, value = (mpmath.matrix(part.squeeze().tolist()) for part in parts)
            for i in range(2, 9):
                logits = [mpmath.fsum(query[i, b] * key[s, b] for b in range(2)) for s in range(i + 1)]
                total = mpmath.fsum(mpmath.exp(x) for x in logits)
                alpha = [mpmath.exp(x) / total for x in logits]
                mean = [
                    [mpmath.fsum(a * part[s, j] for s, a in enumerate(alpha)) for j in range(2)]
                    for part in (value, key)
                ]
                left = mpmath.matrix([[a * (value[s, j] - mean[0][j]) for s, a in enumerate(alpha)] for j in range(2)])
                right = mpmath.matrix([[key[s, j] - mean[1][j] for j in range(2)] for s in range(i + 1)])
                exact = torch.tensor([[float(x) for x in row] for row in (left * right).tolist()], dtype=torch.float64)
                torch.testing.assert_close(found.covariance[0, 0, i, 0], exact, rtol=1e-14, atol=1e-14)
                means = torch.tensor([float(x) for x in (*mean[0], *mean[1])], dtype=torch.float64)
                torch.testing.assert_close(found.mean[0, 0, i, 0], means, rtol=1e-14, atol=1e-14)
                assert float(found.log_sum[0, 0, i, 0]) == pytest.approx(float(mpmath.log(total)), rel=1e-14)
                assert (plain[0, 0, i, 0] - exact).abs().max() > 1e-6

    def test_two_clusters_far_apart(self):
        """The second pass serves the first cluster that is lost; rows of the other one are computed alone."""
        *parts, first, limit = with_sink(60, 1e6, torch.float32, heads=1)
        query, key, value = parts
        query, shift = query.double(), 1e4 * normal(1, 1, 1, 3, seed=8)
        key, value = key.double(), value.double()
        key[:, :, 30:] += shift
        value[:, :, 30:] += 1e4
        towards = (query[:, :, 30:] * shift.unsqueeze(3)).sum(-1, keepdim=True)
        query[:, :, 30:] = torch.where(towards > 0, query[:, :, 30:], -query[:, :, 30:])
        parts = [part.float() for part in (query, key, value)]
        way = torch.ops.probattn.past_moments(*parts, first, limit, None, None, 1.0, 0.0)[4].flatten()
        assert set(way.tolist()) == {0, 1, 2}
        assert max(errors(parts, (first, limit), upstream(parts[0], parts[2]))) < 2e-5

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_under_vmap_too(self, dtype):
        *parts, first, limit = with_sink(20, 1e6, dtype)
        stacked = [torch.stack([part, 2 * part]) for part in parts[1:]]

        def moments(key, value):
            return (*past_moments(parts[0], key, value, first, limit),)

        def loss(key, value):
            return sum((part * up).sum() for part, up in zip(moments(key, value), ups, strict=True))

        ups = [up.to(dtype) for up in upstream(parts[0], parts[2])]
        for call in (moments, torch.func.grad(loss, argnums=(0, 1))):
            found = torch.vmap(call)(*stacked)
            for n, factor in enumerate((1, 2)):
                for mine, other in zip(found, call(factor * parts[1], factor * parts[2]), strict=True):
                    torch.testing.assert_close(mine[n], other, rtol=1e-6, atol=0)

    def test_second_derivatives_and_forward_mode_keep_their_digits(self):
        *parts, first, limit = with_sink(24, 1e6, torch.float32, heads=1, rank=2, dim=2)
        wide = [part.double() for part in parts]
        ups = upstream(parts[0], parts[2])

        def total(call, parts):
            moments = call(parts[0], *parts[1:], first, limit)
            return sum((part * up.to(part.dtype)).sum() for part, up in zip(moments, ups, strict=True))

        def product(call, parts):
            slope = torch.func.grad(lambda query: total(call, [query, *parts[1:]]))
            return torch.func.jvp(slope, (parts[0],), (torch.ones_like(parts[0]),))[1]

        assert relative(product(past_moments, parts), product(centred, wide)) < 1e-4
        direction = [normal(*part.shape, seed=9 + n).float() for n, part in enumerate(parts)]
        direction[1][:, :, 0] = direction[2][:, :, 0] = 0

        def along(call, parts):
            tangents = tuple(part.to(parts[0].dtype) for part in direction)
            return torch.func.jvp(lambda *own: call(*own, first, limit)[0], tuple(parts), tangents)[1][:, :, 2:]

        found, expected = along(past_moments, parts), along(centred, wide)
        assert expected.abs().max() > 0.1
        assert relative(found, expected) < 1e-4

    # 2026-11-25: torch's compiler makes an instance of an autograd.Function and warns of that itself.
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_compiled_it_is_the_same(self):
        *parts, first, limit = with_sink(20, 1e6, torch.float32)
        parts = [part.requires_grad_() for part in parts]

        def loss(*own):
            moments = past_moments(*own, first, limit)
            return moments.covariance[:, :, 2:].square().sum() + moments.mean[:, :, 2:].square().sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for mine, other in zip(
            torch.autograd.grad(compiled(*parts), parts), torch.autograd.grad(loss(*parts), parts), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


class TestCausality:
    @pytest.mark.parametrize("later", [1e6, 1e30, math.nan, math.inf])
    @pytest.mark.parametrize("sink", [1.0, 1e6])
    def test_rows_do_not_see_later_tokens_to_the_bit(self, sink, later):
        *parts, first, limit = with_sink(24, sink, torch.float32)
        expected = origin_moments(*parts, first, limit)
        for place in (1, 2):
            changed = [part.clone() for part in parts]
            changed[place][:, :, 15:] = later
            found = origin_moments(*changed, first, limit)
            for mine, other in zip(found, expected, strict=True):
                assert torch.equal(mine[:, :, :15], other[:, :, :15])
            if not math.isfinite(later):
                assert not found.covariance[:, :, 15:].isfinite().any()

    def test_a_row_that_sees_nothing_of_a_sink_is_computed_once(self):
        *parts, first, _ = with_sink(12, 1e6, torch.float32)
        limit = torch.arange(12)
        moments = origin_moments(*parts, first, limit)
        assert all((part[:, :, 0] == 0).all() for part in (moments.covariance, moments.offset, moments.origin))
        assert moments.log_sum[:, :, 0].isneginf().all()


class TestBeyondTheRange:
    @pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e30), (torch.float64, 1e200)])
    @pytest.mark.parametrize("large_values", [False, True])
    def test_the_attention_is_hard(self, dtype, size, large_values):
        """Logits overflow, and with large values the products of values and keys do, too."""
        *parts, first, limit = with_sink(9, 1.0, dtype)
        query, key, value = parts
        logits = torch.einsum("bkpgr,bksr->bkpgs", query, key)
        best = logits.masked_fill((torch.arange(9) >= limit[:, None])[:, None], -torch.inf).argmax(-1)
        given = [size * query, size * key, size * value if large_values else value]
        given = [part.requires_grad_() for part in given]
        moments = past_moments(*given, first, limit)
        assert (moments.covariance == 0).all()
        for columns, tokens in ((slice(0, 4), given[2]), (slice(4, 7), given[1])):
            chosen = tokens.gather(2, best.flatten(2).unsqueeze(-1).expand(-1, -1, -1, tokens.shape[-1]))
            assert torch.equal(moments.mean[..., columns], chosen.unsqueeze(3))
        slopes = torch.autograd.grad(moments.covariance.sum(), given, retain_graph=True)
        assert all((slope == 0).all() for slope in slopes)
        slopes = torch.autograd.grad(moments.mean[..., :4].sum(), given)
        assert all((slope == 0).all() for slope in slopes[:2])
        count = torch.nn.functional.one_hot(best.flatten(2), 9).sum(2).to(dtype)
        assert torch.equal(slopes[2], count.unsqueeze(-1).expand_as(slopes[2]))

    def test_a_row_whose_logits_are_all_below_the_range(self):
        """Measured from a first token that the row does not see, every logit is -inf."""
        query = torch.full((1, 1, 1, 1, 1), 1e200, dtype=torch.float64)
        key = torch.tensor([1e200, -1e200, -2e200], dtype=torch.float64).view(1, 1, 3, 1)
        value = torch.tensor([5.0, 7.0, 9.0], dtype=torch.float64).view(1, 1, 3, 1)
        for mask in (None, torch.tensor([[False, True, True]])[None, None]):
            first = torch.tensor([0 if mask is not None else 1])
            moments = past_moments(query, key, value, first, torch.tensor([3]), mask=mask)
            assert moments.mean.flatten().tolist() == [7.0, -1e200]
            assert (moments.covariance == 0).all()

    def test_products_that_overflow_hide_no_others(self):
        *parts, first, limit = with_sink(20, 1.0, torch.float32)
        expected = past_moments(*parts, first, limit)
        key, value = parts[1].clone(), parts[2].clone()
        key[:, :, 7], value[:, :, 7] = -1e25 * parts[0][:, :, 9, 0].sign(), 1e25  # the row 9 has no weight on it
        query = parts[0]
        query[:, :, 10:] = query[:, :, 9:10]
        found = past_moments(query, key, value, first, limit)
        assert torch.equal(found.covariance[:, :, :7], expected.covariance[:, :, :7])
        kept = torch.arange(20) != 7
        without = past_moments(query[:, :, 9:], key[:, :, kept], value[:, :, kept], first[9:], limit[9:] - 1)
        torch.testing.assert_close(found.covariance[:, :, 9:], without.covariance, rtol=1e-5, atol=1e-6)


class TestRows:
    """Every row computed alone equals the reference, whatever the mask and the cap."""

    @pytest.mark.parametrize("softcap", [None, 1.5])
    @pytest.mark.parametrize("form", [None, "boolean", "additive"])
    @pytest.mark.parametrize("window", [None, 3])
    def test_all_of_them(self, form, softcap, window, monkeypatch):
        *parts, first, limit = with_sink(9, 1.0, torch.float64, batch=2, group=3)
        if window:
            first = (limit - window).clamp(min=0)
        mask = None
        if form:
            mask = normal(2, 6, 9, 9, seed=4) > -0.4
            mask[:, :, 3] = False
            if form == "additive":
                mask = normal(1, 6, 9, 9, seed=6).masked_fill(~mask[:1], -torch.inf)
        options = {"mask": mask, "scale": 0.7, "softcap": softcap}
        parts = [part.requires_grad_() for part in parts]
        ups = upstream(parts[0], parts[2])
        for up in ups:
            up[:, :, 3] = 0  # the row that a mask hides

        def both(function):
            moments = function(*parts, first, limit, **options)
            kept = [part.where(part.isfinite(), 0.0) for part in moments]
            return *kept, *torch.autograd.grad(kept, parts, ups)

        plain = both(past_moments)
        monkeypatch.setattr(refine, "_NUMBERS", 500)  # several chunks
        monkeypatch.setattr(Problem, "cannot_lose", lambda problem, gain: False)
        monkeypatch.setattr(passes, "lost_rows", lambda problem, c, o, log_sum, gain: ~log_sum.isneginf())
        calls = []
        monkeypatch.setattr(Rows, "covariance", lambda rows, old=Rows.covariance: (calls.append(1), old(rows))[1])
        for mine, other, first_pass in zip(both(past_moments), both(centred), plain, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
            torch.testing.assert_close(first_pass, other, rtol=0, atol=1e-12)
        assert len(calls) > 2

    @pytest.mark.parametrize("softcap", [None, 1.5])
    @pytest.mark.parametrize("form", [None, "boolean", "additive"])
    def test_the_second_pass(self, form, softcap, monkeypatch):
        *parts, first, limit = with_sink(9, 1.0, torch.float64, batch=2, group=3)
        mask = None
        if form:
            mask = normal(2, 1, 9, 9, seed=4) > -0.4
            if form == "additive":
                mask = normal(2, 1, 9, 9, seed=6).masked_fill(~mask, -torch.inf)
        options = {"mask": mask, "scale": 0.7, "softcap": softcap}
        parts = [part.requires_grad_() for part in parts]
        ups = upstream(parts[0], parts[2])

        def both(function):
            moments = function(*parts, first, limit, **options)
            kept = [part.where(part.isfinite(), 0.0) for part in moments]
            return *kept, *torch.autograd.grad(kept, parts, ups)

        answers = iter([True, False])  # everything from row 4 on in half of the heads, and then nothing

        def lost(problem, covariance, offset, log_sum, gain):
            rows = ~log_sum.isneginf()
            if not next(answers):
                return rows & False
            rows[:, 1] = False
            rows[:, :, :4] = False
            return rows

        monkeypatch.setattr(Problem, "cannot_lose", lambda problem, gain: False)
        monkeypatch.setattr(passes, "lost_rows", lost)
        monkeypatch.setattr(Rows, "backward", None)  # no row is computed alone
        found = both(past_moments)
        monkeypatch.setattr(passes, "lost_rows", refine.lost_rows)
        for mine, other in zip(found, both(centred), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)

    def test_origins_are_near_to_what_a_row_attends_to(self):
        *parts, first, limit = with_sink(40, 1e6, torch.float32)
        moments = origin_moments(*parts, first, limit)
        assert (moments.origin[:, :, 2:].abs() < 10).all()
        assert (moments.origin[:, :, 0].abs() > 1e4).any()
        assert not moments.origin.requires_grad

    def test_a_cap_leaves_the_keys_where_they_are(self):
        *parts, first, limit = with_sink(12, 1e6, torch.float32)
        moments = origin_moments(*parts, first, limit, softcap=2.0)
        assert (moments.origin[..., 4:] == 0).all()
        assert (moments.origin[:, :, 2:, :, :4] != 0).any()


class TestChoice:
    """What counts as lost."""

    def problem(self, dtype=torch.float64, softcap=0.0, query=1.0):
        one = torch.ones(1, 1, 1, 1, 1, dtype=dtype)
        tokens = torch.zeros(1, 1, 2, 1, dtype=dtype)
        return Problem(query * one, tokens, tokens, torch.tensor([0]), torch.tensor([2]), None, 1.0, softcap)

    def lost(self, far, pull, covariance, *, dtype=torch.float64, gain=None, start=0.0, log_sum=0.0, **options):
        problem = self.problem(dtype, **options)
        problem = problem._replace(value=problem.value + start)
        offset = torch.tensor([far, pull], dtype=dtype).view(1, 1, 1, 1, 2)
        covariance = torch.full((1, 1, 1, 1, 1, 1), covariance, dtype=dtype)
        gain = None if gain is None else torch.full((1, 1, 1, 1), gain, dtype=dtype)
        found = refine.lost_rows(problem, covariance, offset, torch.full((1, 1, 1, 1), log_sum, dtype=dtype), gain)
        assert found.shape == (1, 1, 1, 1)
        return bool(found)

    def test_products_that_cancel(self):
        for dtype, bound in CANCELLATION.items():
            far, pull = bound / 2, 2.0
            assert not self.lost(far, pull, 1e-3, dtype=dtype)
            assert self.lost(1.01 * far, pull, 1e-3, dtype=dtype)
            assert not self.lost(1.01 * far, pull, bound / 8, dtype=dtype)  # a difference as large as the products
            assert not self.lost(1.01 * far, pull, 1e-3, dtype=dtype, gain=0.5)
            assert self.lost(0.6 * far, pull, 1e-3, dtype=dtype, gain=2.0)

    def test_logits_that_cancel(self):
        bound = CANCELLATION[torch.float64]
        assert not self.lost(0.1, bound, 1e-3)
        assert self.lost(0.1, bound, 1e-3, query=1.1)
        assert self.lost(0.1, bound, 1e-3, query=-1.1)
        assert not self.lost(0.1, bound, 1e-3, query=1.1, softcap=3.0)  # cannot be helped

    def test_means_that_cancel(self):
        bound = CANCELLATION[torch.float64]
        assert not self.lost(-98 * bound, 1e-5, 1e-3, start=100 * bound)
        assert self.lost(200 - 100 * bound, 1e-5, 1e-3, start=100 * bound) is False
        assert self.lost(50 - 100 * bound, 1e-5, 1e-3, start=100 * bound)

    def test_what_is_not_finite_unless_nothing_is_seen(self):
        for far, covariance in ((math.nan, 0.0), (math.inf, 0.0), (1e5, math.nan), (1e5, math.inf)):
            assert self.lost(far, 1.0, covariance)
            assert not self.lost(far, 1.0, covariance, log_sum=-math.inf)
        assert self.lost(math.nan, 1.0, 0.0, log_sum=math.nan)

    def test_means_near_zero_may_lose_what_is_small_beside_one(self):
        bound = CANCELLATION[torch.float64]
        assert not self.lost(-bound, 0.0, 1e-3, start=bound)
        assert self.lost(-1.01 * bound, 0.1, 1e-3, start=1.01 * bound)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("place", range(3))
    def test_what_cannot_lose_does_not(self, dtype, place):
        """The cheap test is no laxer than the thorough one, and not much stricter."""
        parts = list(with_sink(12, 1.0, dtype)[:3])
        first, limit = torch.zeros(12, dtype=torch.long), torch.arange(12) + 1
        gain = torch.full((1, 1, 1, 1), 3.0, dtype=dtype)
        answers = []
        for size in torch.logspace(-2, 8, 60, dtype=torch.float64).tolist():
            sized = [part * size if n == place else part for n, part in enumerate(parts)]
            problem = Problem(*sized, first, limit, None, 0.7, 0.0)
            lost = refine.lost_rows(problem, *passes._pass(problem), gain)
            answers.append((problem.cannot_lose(gain), bool(lost.any())))
            assert not (problem.cannot_lose(gain) and bool(lost.any()))
        cheap, thorough = ([pair[0] for pair in answers], [not pair[1] for pair in answers])
        assert cheap == sorted(cheap, reverse=True)
        assert cheap[0]
        assert not cheap[-1]
        assert sum(thorough) - sum(cheap) < 25  # a factor of about ten thousand, in sizes that vary by ten to the tenth

    @pytest.mark.parametrize("place", range(3))
    def test_nan_and_infinity_may_lose_and_nothing_may_not(self, place):
        for dtype in DTYPES:
            parts = list(with_sink(5, 1.0, dtype)[:3])
            assert Problem(*parts, *torch.arange(10).view(2, 5), None, 1.0, 0.0).cannot_lose(None)
            for filling in (math.nan, math.inf):
                changed = [part.clone() for part in parts]
                changed[place][0, 0, 3] = filling
                assert not Problem(*changed, *torch.arange(10).view(2, 5), None, 1.0, 0.0).cannot_lose(None)
            empty = [part[:, :, :0] if n == place else part for n, part in enumerate(parts)]
            assert Problem(*empty, *torch.arange(10).view(2, 5), None, 1.0, 0.0).cannot_lose(None)
        half = [1e4 * part.bfloat16() for part in parts]  # left as it is
        assert Problem(*half, *torch.arange(10).view(2, 5), None, 1.0, 0.0).cannot_lose(None)

    def test_the_bound_of_the_norm(self):
        matrix = normal(50, 4, 6)
        assert (norm_bound(matrix) >= torch.linalg.matrix_norm(matrix, 2)).all()
        assert norm_bound(torch.eye(5)) == 1
        for left, right in itertools.pairwise((1.0, 2.0, 4.0)):
            assert norm_bound(right * matrix[0]) == pytest.approx(right / left * norm_bound(left * matrix[0]).item())
