"""Moments of the past: dense sums and autograd as references; derivatives, blocks, transforms, memory."""

import math

import pytest
import torch
from torch.utils._pytree import tree_leaves

from probattn.attention import CausalAttention
from probattn.errors import InputError
from probattn.moments import blocked as module
from probattn.moments import cpu
from probattn.moments.operators import past_moments

BATCH, GROUPS, LENGTH, SHARED, RANK, DIM = 2, 2, 7, 3, 2, 3  # B, K, P = S, g, r, dv


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def way(request, monkeypatch):
    """Everything holds for the compiled kernel, where it serves, and for torch."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "AVAILABLE", False)
    elif not cpu.AVAILABLE:
        pytest.skip("the kernels were not built: no C compiler")
    return request.param


def past_covariance(*arguments, **options):
    return past_moments(*arguments, **options).covariance


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(batch=BATCH, groups=GROUPS, length=LENGTH, shared=SHARED, rank=RANK, dim=DIM, dtype=torch.float64):
    """q, k, v; logits of a few units, so that the weights are far from uniform."""
    return (
        normal(batch, groups, length, shared, rank, seed=1, dtype=dtype),
        1.5 * normal(batch, groups, length, rank, seed=2, dtype=dtype),
        normal(batch, groups, length, dim, seed=3, dtype=dtype),
    )


def span(length=LENGTH, *, strict=True, window=None):
    """first, limit."""
    place = torch.arange(length)
    return torch.zeros_like(place) if window is None else (place - window + 1).clamp(min=0), place + (not strict)


def mask_like(form, batch=BATCH, heads=GROUPS * SHARED, length=LENGTH):
    """One mask of each form. Some rows are hidden altogether."""
    if form is None:
        return None
    shape = {"boolean": (batch, 1), "additive": (1, 1), "per head": (batch, heads), "additive per head": (1, heads)}
    seen = normal(*shape[form], length, length, seed=4) > -0.4
    seen[..., 3, :] = False
    if not form.startswith("additive"):
        return seen
    return normal(*seen.shape, seed=5).masked_fill(~seen, -torch.inf)


FORMS = [None, "boolean", "additive", "per head", "additive per head"]


def dense(*arguments, **options):
    """The covariance alone of the three."""
    return dense_moments(*arguments, **options)[0]


def dense_moments(query, key, value, first, limit, *, mask=None, scale=1.0, softcap=None):
    r"""(1/c) d/dq_i of sum_s alpha_is v_s by the chain rule through a Jacobian of the softmax; means; log-sums."""
    logits = scale * torch.einsum("bkpgr,bksr->bkpgs", query, key)
    slope = torch.ones_like(logits)
    if softcap:
        slope = 1 - torch.tanh(logits / softcap) ** 2
        logits = softcap * torch.tanh(logits / softcap)
    token = torch.arange(key.shape[2])
    seen = ((token >= first[:, None]) & (token < limit[:, None]))[:, None].expand(logits.shape)
    if mask is not None:
        mask = mask.expand(len(query), query.shape[1] * query.shape[3], *mask.shape[2:])
        mask = mask.unflatten(1, (query.shape[1], query.shape[3])).movedim(2, 3)  # (B, K, P, g, S)
        seen = seen & (mask if mask.dtype == torch.bool else ~mask.isinf())
        logits = logits if mask.dtype == torch.bool else logits + mask
    logits = logits.masked_fill(~seen, -torch.inf)
    weights = logits.softmax(-1).where(seen, 0.0)
    change = torch.diag_embed(weights) - weights.unsqueeze(-1) * weights.unsqueeze(-2)  # d alpha_s / d l_t
    covariance = torch.einsum("bksd,bkpgst,bkpgt,bktr->bkpgdr", value, change, slope, key)
    means = (torch.einsum("bkpgs,bksd->bkpgd", own, part) for own, part in ((weights, value), (weights * slope, key)))
    return covariance, torch.cat([*means], -1), logits.logsumexp(-1)


def with_fixed_means(query, key, value, *where, **options):
    """The covariance, of right value, with a gradient that leaves out that the means move."""
    covariance, means, _ = dense_moments(query, key, value, *where, **options)
    product = means[..., : value.shape[-1], None] * means[..., None, value.shape[-1] :]
    return covariance + product - product.detach()


def finite(parts):
    """Of the moments, what an upstream gradient may multiply: the log-sum of a row that sees nothing is not."""
    return [part.where(part.isfinite(), 0.0) for part in parts]


class TestValues:
    @pytest.mark.parametrize("softcap", [None, 1.5])
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("window", [None, 3])
    def test_equal_the_dense_sum(self, form, window, softcap):
        parts, where, mask = inputs(), span(window=window), mask_like(form)
        moments = past_moments(*parts, *where, mask=mask, scale=0.7, softcap=softcap)
        expected = dense(*parts, *where, mask=mask, scale=0.7, softcap=softcap)
        assert expected.abs().max() > 0.3
        for mine, other in zip(
            moments, dense_moments(*parts, *where, mask=mask, scale=0.7, softcap=softcap), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
        # The reference can tell: another window, mask, scale or cap gives something else.
        for change in ({"scale": 0.71}, {"softcap": 1.6}, {"mask": mask_like("boolean").flip(-1)}):
            other = past_covariance(*parts, *where, **({"mask": mask, "scale": 0.7, "softcap": softcap} | change))
            assert (other - expected).abs().max() > 1e-4

    def test_single_precision(self):
        parts, where = inputs(), span()
        found = past_covariance(*(part.float() for part in parts), *where)
        assert found.dtype == torch.float32
        # Logits of up to ten and sums of products of up to ten, each to seven digits.
        expected = dense(*(part.float().double() for part in parts), *where)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=4e-6)

    def test_is_the_derivative_of_attention_with_respect_to_the_query(self):
        query, key, value = inputs(batch=1, groups=1, shared=1)

        def attention(q):
            return torch.softmax((0.7 * q @ key[0, 0].mT).masked_fill(~future, -torch.inf), -1) @ value[0, 0]

        future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        jacobian = torch.autograd.functional.jacobian(attention, query[0, 0, :, 0])  # (T, dv, T, r)
        found = past_covariance(query, key, value, *span(strict=False), scale=0.7)[0, 0, :, 0]
        torch.testing.assert_close(0.7 * found, jacobian.diagonal(dim1=0, dim2=2).movedim(-1, 0), rtol=0, atol=1e-12)

    def test_rows_that_see_nothing_or_one_token_are_zero(self):
        parts, (first, limit) = inputs(), span()
        moments = past_moments(*parts, first, limit, mask=mask_like("boolean"))
        assert all((part[:, :, [0, 3]] == 0).all() for part in moments[:2])
        assert moments.log_sum[:, :, [0, 3]].isneginf().all()
        assert past_covariance(*parts, first, limit)[:, :, 1].abs().max() < 1e-15
        assert past_covariance(*parts, first, limit)[:, :, 2:].abs().amax((-1, -2)).min() > 1e-4

    def test_heads_that_share_keys_equal_repeated_keys(self):
        (query, key, value), where = inputs(), span()
        apart = query.movedim(3, 2).flatten(1, 2).unsqueeze(3)  # (B, K g, P, 1, r)
        repeated = (part.repeat_interleave(SHARED, dim=1) for part in (key, value))
        found = past_covariance(apart, *repeated, *where, mask=mask_like("per head"))
        together = past_covariance(query, key, value, *where, mask=mask_like("per head"))
        torch.testing.assert_close(found.squeeze(3), together.movedim(3, 2).flatten(1, 2), rtol=0, atol=1e-14)

    def test_cached_keys_and_some_positions(self):
        (query, key, value), (first, limit) = inputs(), span(strict=False)
        everything = past_covariance(query, key, value, first, limit)
        chosen = torch.tensor([2, 5])
        some = past_covariance(query[:, :, chosen], key, value, first[chosen], limit[chosen])
        torch.testing.assert_close(some, everything[:, :, chosen], rtol=0, atol=1e-14)

    @pytest.mark.parametrize("empty", ["batch", "positions", "tokens"])
    def test_empty_axes(self, empty):
        query, key, value = (part.requires_grad_() for part in inputs(batch=0 if empty == "batch" else 2))
        first, limit = span()
        if empty == "positions":
            query, first, limit = query[:, :, :0], first[:0], limit[:0]
        if empty == "tokens":
            key, value, limit = key[:, :, :0], value[:, :, :0], torch.zeros_like(limit)
        found = past_covariance(query, key, value, first, limit)
        assert found.shape == (*query.shape[:4], DIM, RANK)
        assert (found == 0).all()
        found.sum().backward()

    def test_inputs_that_are_not_contiguous(self):
        parts, where = inputs(), span()
        turned = [part.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for part in parts]
        assert not any(part.is_contiguous() for part in turned)
        straight = [part.clone().requires_grad_() for part in parts]
        found, expected = past_covariance(*turned, *where), past_covariance(*straight, *where)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
        up = normal(*found.shape).movedim(-1, -2).contiguous().movedim(-1, -2)
        for mine, other in zip(
            torch.autograd.grad(found, turned, up), torch.autograd.grad(expected, straight, up), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("part", ["key", "value"])
    def test_tokens_that_share_a_large_offset_keep_their_digits(self, part):
        offset, where = 1000.0, span()
        query, key, value = inputs()
        # What float32 can hold of the moved tokens, so that only the computation is at fault.
        moved = {"key": key, "value": value}
        moved[part] = (moved[part] + offset).float().double()
        arguments = (query, moved["key"], moved["value"])
        expected = dense(*arguments, *where)
        found = past_covariance(*(tensor.float() for tensor in arguments), *where).double()
        assert (found - expected).abs().max() < 1e-5
        naive = dense(*(tensor.float() for tensor in arguments), *where).double()
        assert (naive - expected).abs().max() > 1e-4


class TestGradients:
    @pytest.mark.parametrize("softcap", [None, 1.5])
    @pytest.mark.parametrize("window", [None, 3])
    @pytest.mark.parametrize("form", FORMS)
    def test_equal_finite_differences(self, form, window, softcap):
        parts = [part.requires_grad_() for part in inputs(batch=2, groups=1, length=5, shared=2)]
        mask = mask_like(form, heads=2, length=5)

        def function(query, key, value):
            where = span(5, window=window)
            return (*finite(past_moments(query, key, value, *where, mask=mask, scale=0.7, softcap=softcap)),)

        assert torch.autograd.gradcheck(function, parts, fast_mode=True)

    @pytest.mark.parametrize("softcap", [None, 1.5])
    def test_equal_those_of_the_dense_sum(self, softcap):
        parts, where = [part.requires_grad_() for part in inputs()], span()
        up = normal(BATCH, GROUPS, LENGTH, SHARED, DIM, RANK, seed=6)
        options = {"mask": mask_like("additive per head"), "scale": 0.7, "softcap": softcap}
        found = torch.autograd.grad(past_covariance(*parts, *where, **options), parts, up)
        expected = torch.autograd.grad(dense(*parts, *where, **options), parts, up)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
        # Another scale has other gradients, and so has the same covariance with its means held fixed.
        for other in (dense(*parts, *where, **options | {"scale": 0.71}), with_fixed_means(*parts, *where, **options)):
            others = torch.autograd.grad(other, parts, up)
            assert all((mine - wrong).abs().max() > 1e-4 for mine, wrong in zip(found, others, strict=True))

    @pytest.mark.parametrize("wanted", range(3))
    def test_of_some_of_the_inputs(self, wanted):
        parts, where = inputs(), span()
        everything = [part.clone().requires_grad_() for part in parts]
        expected = torch.autograd.grad(past_covariance(*everything, *where).square().sum(), everything)[wanted]
        parts[wanted].requires_grad_()
        past_covariance(*parts, *where).square().sum().backward()
        assert torch.equal(parts[wanted].grad, expected)
        assert all(part.grad is None for place, part in enumerate(parts) if place != wanted)

    @pytest.mark.parametrize("used", [(0, 1, 2), (1,), (2,)])
    def test_of_means_and_log_sums_equal_those_of_the_dense_sums(self, used):
        parts, where = [part.requires_grad_() for part in inputs()], span()

        def gradients(function, scale):
            moments = finite(function(*parts, *where, mask=mask_like("per head"), scale=scale))
            return torch.autograd.grad(
                sum((moments[n] * normal(*moments[n].shape, seed=n)).sum() for n in used), parts, allow_unused=True
            )

        found, expected, other = (
            gradients(*of) for of in ((past_moments, 0.7), (dense_moments, 0.7), (dense_moments, 0.71))
        )
        for mine, right, wrong in zip(found, expected, other, strict=True):
            if right is None:  # log-sums do not depend on the values
                assert (mine == 0).all()
                continue
            torch.testing.assert_close(mine, right, rtol=0, atol=1e-12)
            assert (mine - wrong).abs().max() > 1e-4

    @pytest.mark.parametrize(("form", "softcap"), [(None, None), ("additive per head", 1.5)])
    def test_every_derivative(self, form, softcap):
        parts = [part.requires_grad_() for part in inputs(batch=2, groups=1, length=4, shared=2)]
        options = {"mask": mask_like(form, heads=2, length=4), "scale": 0.7, "softcap": softcap}

        def function(query, key, value):
            return (*finite(past_moments(query, key, value, *span(4), **options)),)

        assert torch.autograd.gradcheck(function, parts, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, parts, check_fwd_over_rev=True, fast_mode=True)

        first = [part.detach()[:1] for part in parts]  # one of the batch: third derivatives are many

        def total(moments, query):
            found = finite(moments(query, *first[1:], *span(4), **options))
            return sum(part.sin().sum() for part in found)

        query = first[0]
        for transform in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.hessian(f))):
            found, expected = (transform(lambda q, m=m: total(m, q))(query) for m in (past_moments, dense_moments))
            assert expected.abs().max() > 0.01
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


class TestBlocks:
    """Of the way by torch; those of the compiled kernel are in test_native.py."""

    @pytest.mark.parametrize("sizes", [(1 << 20, 1 << 20, 128, 32), (40, 12, 3, 1), (1, 1, 1, 1), (200, 1000, 6, 4)])
    def test_of_any_size_give_the_same(self, monkeypatch, sizes):
        for name, size in zip(("_WEIGHTS", "_PRODUCTS", "_ROWS", "_TOKENS"), sizes, strict=True):
            assert hasattr(module, name)
            monkeypatch.setattr(module, name, size)
        parts = [part.requires_grad_() for part in inputs(batch=3)]
        options = {"mask": mask_like("per head", batch=3), "softcap": 2.0}
        found = past_covariance(*parts, *span(window=4), **options)
        expected = dense(*parts, *span(window=4), **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        up = normal(*found.shape, seed=7)
        for mine, other in zip(
            torch.autograd.grad(found, parts, up), torch.autograd.grad(expected, parts, up), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def largest_allocation(function, length, batch=1, rank=4):
    """In numbers, of a forward and a backward pass of a function of q, k, v."""
    parts = [part.requires_grad_() for part in inputs(batch, 1, length, 2, rank, rank, torch.float32)]
    return largest_of(lambda: function(*parts, *span(length)).sum().backward())


def largest_of(call):
    """In numbers of single precision, also inside of operators, where a dispatch mode sees nothing."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return max(event.self_cpu_memory_usage for event in profile.events()) / 4


class TestMemory:
    def test_no_tensor_of_the_size_of_all_pairs(self):
        length = 2048
        size = largest_allocation(past_covariance, length)
        assert size < length**2 / 4

    @pytest.mark.parametrize("mask", ["strict", "inclusive"])
    def test_nor_in_the_log_density_and_its_gradient(self, mask):
        length = 2048
        parameters = [(0.3 * normal(2, 3, 3, seed=n, dtype=torch.float32)).requires_grad_() for n in range(2)]
        attention = CausalAttention(*parameters, mask=mask)
        u = normal(length, 3, dtype=torch.float32)

        def density():
            residual, logabsdet = attention.residual_and_logabsdet(u)
            (logabsdet.sum() - residual.square().sum()).backward()

        assert largest_of(density) < length**2 / 4
        assert largest_of(lambda: attention.weights(u)) >= length**2

    def test_the_weights_of_one_block_of_rows_are_seen(self, monkeypatch):
        monkeypatch.setattr(cpu, "AVAILABLE", False)
        assert largest_allocation(past_covariance, 2048) >= module._ROWS * 2047

    def test_a_large_batch_is_taken_in_parts(self, monkeypatch):
        monkeypatch.setattr(cpu, "AVAILABLE", False)
        size = largest_allocation(past_covariance, 256, batch=128, rank=2)
        assert module._WEIGHTS / 2 < size <= module._WEIGHTS

    def test_the_same_watch_catches_the_weights_of_a_plain_attention(self):
        def plain(query, key, value, first, limit):
            return torch.softmax(query[:, :, :, 0] @ key.mT, -1) @ value

        assert largest_allocation(plain, 512) >= 512**2
        assert largest_allocation(dense, 64) >= 64**3


class TestTransforms:
    @pytest.mark.parametrize("form", [None, "boolean", "additive"])
    @pytest.mark.parametrize("mapped", [(0, 0, 0), (0, None, None), (None, 1, 2)])
    def test_vmap_and_vmap_of_grad(self, mapped, form):
        count, where, mask = 3, span(), mask_like(form)
        parts = list(inputs())
        for place, axis in enumerate(mapped):
            if axis is not None:
                parts[place] = torch.stack([parts[place] * (1 + 0.1 * n) for n in range(count)], dim=axis)

        def function(query, key, value):
            return (*finite(past_moments(query, key, value, *where, mask=mask, softcap=3.0)),)

        def loss(query, key, value):
            return sum(part.square().sum() for part in function(query, key, value))

        for call in (function, torch.func.grad(loss, argnums=(0, 1, 2))):
            found = torch.vmap(call, in_dims=mapped)(*parts)
            rows = []
            for n in range(count):
                own = [part if axis is None else part.select(axis, n) for axis, part in zip(mapped, parts, strict=True)]
                rows.append(tree_leaves(call(*own)))
            for mine, others in zip(tree_leaves(found), zip(*rows, strict=True), strict=True):
                torch.testing.assert_close(mine, torch.stack(others), rtol=0, atol=1e-12)

    def test_vmap_over_the_places_is_refused(self):
        parts, (first, limit) = inputs(), span()
        with pytest.raises(NotImplementedError, match="first, limit and the scales"):
            torch.vmap(lambda f: past_covariance(*parts, f, limit))(torch.stack([first, first]))

    # 2026-11-25: torch's compiler makes an instance of an autograd.Function and warns of that itself.
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("form", [None, "per head"])
    def test_compiles_into_one_graph(self, form):
        where, mask = span(), mask_like(form)

        def function(query, key, value):
            return sum(
                part.square().sum() for part in finite(past_moments(query, key, value, *where, mask=mask, softcap=2.0))
            )

        parts = [part.requires_grad_() for part in inputs()]
        expected = torch.autograd.grad(function(*parts), parts)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for mine, other in zip(torch.autograd.grad(compiled(*parts), parts), expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)

    def test_the_operators_keep_the_rules_of_operators(self):
        parts, where = inputs(), span()
        checks = ("test_schema", "test_faketensor")
        up = normal(BATCH, GROUPS, LENGTH, SHARED, DIM, RANK)
        turned = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
        for given in (parts, turned):
            arguments = (*given, *where, mask_like("boolean"), None, 0.7, 2.0)
            torch.library.opcheck(torch.ops.probattn.past_moments, arguments, test_utils=checks)
            constants = torch.ops.probattn.past_moments(*arguments)[3:]
            arguments = (*arguments[:6], *constants, 0.7, 2.0)
            for others in ((None, None), (normal(*up.shape[:4], DIM + RANK), normal(*up.shape[:4]))):
                torch.library.opcheck(
                    torch.ops.probattn.past_moments_backward, (up, *others, *arguments), test_utils=checks
                )

    def test_autocast_leaves_the_precision_as_it_is(self):
        parts, where = inputs(dtype=torch.float32), span()
        expected = past_covariance(*parts, *where)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(past_covariance(*parts, *where), expected)

    # As above.
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_compiles_where_nothing_is_differentiated(self):
        parts, where = inputs(), span()
        compiled = torch.compile(lambda *parts: past_moments(*parts, *where), fullgraph=True, backend="aot_eager")
        for mine, other in zip(compiled(*parts), past_moments(*parts, *where), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", [1, 2])
def test_a_nan_in_the_first_token_does_not_enter_where_nothing_is_seen(part):
    parts, where = inputs(), span()
    parts[part][:, :, 0] = math.nan
    parts = [tensor.requires_grad_() for tensor in parts]
    moments = past_moments(*parts, *where)
    assert all((found[:, :, 0] == 0).all() for found in moments[:2])
    assert moments.log_sum[:, :, 0].isneginf().all()
    assert moments.covariance[:, :, 2].isnan().any()  # not hidden where it is seen
    slope = torch.autograd.grad(sum(found[:, :, 0].nan_to_num().sum() for found in moments), parts[0])[0]
    assert (slope[:, :, 0] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, f, n: (q, k.float(), v, f, n), "float64, torch.float32 and torch.float64"),
        (lambda q, k, v, f, n: (q, k[:, :1], v, f, n), "have shapes"),
        (lambda q, k, v, f, n: (q, k, v[:, :, :-1], f, n), "have shapes"),
        (lambda q, k, v, f, n: (q, k[..., :-1], v, f, n), "have shapes"),
        (lambda q, k, v, f, n: (q.flatten(3), k, v, f, n), "have shapes"),
        (lambda q, k, v, f, n: (q, k, v, f[1:], n), "one for each position"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(InputError, match=message):
        past_moments(*change(*inputs(), *span()))


def test_a_nan_stays_where_it_is_seen():
    (query, key, value), where = inputs(), span()
    query[0, 0, 4] = math.nan
    found = past_covariance(query, key, value, *where)
    assert found[0, 0, 4].isnan().all()
    found[0, 0, 4] = 0
    assert torch.isfinite(found).all()
