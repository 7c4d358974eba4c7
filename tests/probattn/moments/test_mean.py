"""Attention means against the softmax written out: derivatives, memory, corners, and rows far from zero."""

import itertools

import pytest
import torch

from probattn.moments import mean as module
from probattn.moments.dense import attention_weights
from probattn.moments.mean import causal_mean


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(batch=2, heads=3, length=7, rank=2, dim=3, dtype=torch.float64):
    """q, k, v; logits of a few units."""
    return (
        normal(batch, heads, length, rank, seed=1, dtype=dtype),
        1.5 * normal(batch, heads, length, rank, seed=2, dtype=dtype),
        normal(batch, heads, length, dim, seed=3, dtype=dtype),
    )


def loop(query, key, value):
    """One row at a time, each measured from the key of its largest logit."""
    rows = []
    for i in range(query.shape[2]):
        row, keys = query[:, :, i : i + 1], key[:, :, : i + 1]
        top = (row @ keys.mT).argmax(-1, keepdim=True).expand(-1, -1, -1, keys.shape[-1])
        logits = row @ (keys - keys.gather(2, top)).mT
        rows.append(logits.softmax(-1) @ value[:, :, : i + 1])
    return torch.cat(rows, 2)


@pytest.fixture(params=[(128, 1 << 20), (2, 1), (3, 40)])
def blocks(request, monkeypatch):
    """The backward pass takes rows and batch in parts of any size."""
    for name, size in zip(("_ROWS", "_WEIGHTS"), request.param, strict=True):
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, size)


@pytest.mark.parametrize(("rank", "dim", "length"), [(2, 3, 7), (3, 2, 7), (4, 4, 33), (1, 1, 1), (2, 2, 0)])
def test_value_and_gradient_are_those_of_the_loop(rank, dim, length, blocks):
    parts = [part.requires_grad_() for part in inputs(rank=rank, dim=dim, length=length)]
    if not length:
        mean = causal_mean(*parts)
        assert mean.shape == parts[2].shape
        mean.sum().backward()
        return
    up = normal(2, 3, length, dim, seed=4)
    for mine, other in zip(
        (causal_mean(*parts), *torch.autograd.grad(causal_mean(*parts), parts, up)),
        (loop(*parts), *torch.autograd.grad(loop(*parts), parts, up)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-13)


def test_another_scale_of_the_query_is_another_mean():
    query, key, value = inputs()
    assert (causal_mean(1.01 * query, key, value) - loop(query, key, value)).abs().max() > 1e-4


def test_every_derivative():
    parts = [part.requires_grad_() for part in inputs(batch=1, heads=2, length=4)]
    assert torch.autograd.gradcheck(causal_mean, parts, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(causal_mean, parts, fast_mode=True)
    query, key, value = (part.detach() for part in parts)
    for transform in (torch.func.hessian, torch.func.jacrev, torch.func.jacfwd):
        found, expected = (
            transform(lambda q, f=f: f(q, key, value).sin().sum((0, 1, 3)))(query) for f in (causal_mean, loop)
        )
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mapped", [(0, 0, 0), (0, None, None), (None, 1, 2)])
def test_vmap_and_vmap_of_grad(mapped):
    parts = list(inputs())
    for place, axis in enumerate(mapped):
        if axis is not None:
            parts[place] = torch.stack([parts[place] * (1 + 0.1 * n) for n in range(3)], dim=axis)

    def loss(*parts):
        return causal_mean(*parts).square().sum()

    for call in (lambda *p: (causal_mean(*p),), torch.func.grad(loss, argnums=(0, 1, 2))):
        found = torch.vmap(call, in_dims=mapped)(*parts)
        for n in range(3):
            own = [part if axis is None else part.select(axis, n) for axis, part in zip(mapped, parts, strict=True)]
            for mine, other in zip(found, call(*own), strict=True):
                torch.testing.assert_close(mine[n], other, rtol=0, atol=1e-12)


# 2026-11-25: torch's compiler makes an instance of an autograd.Function and warns of that itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_into_one_graph():
    parts = [part.requires_grad_() for part in inputs()]
    compiled = torch.compile(causal_mean, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(causal_mean(*parts).square().sum(), parts)
    for mine, other in zip(torch.autograd.grad(compiled(*parts).square().sum(), parts), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_the_operators_keep_the_rules_of_operators():
    parts = inputs()
    turned = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
    for given in (parts, turned):
        for name, arguments in (("causal_mean", given), ("causal_mean_backward", (normal(2, 3, 7, 3), *given))):
            operator = getattr(torch.ops.probattn, name)
            torch.library.opcheck(operator, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


def largest_of(call):
    """The largest allocation, in numbers of single precision, also inside of operators."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return max(event.self_cpu_memory_usage for event in profile.events()) / 4


@pytest.mark.parametrize("dim", [4, 6])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_memory_is_linear_in_the_length_with_the_gradient(size, dim):
    length = 2048
    query, key, value = (part.requires_grad_() for part in inputs(1, 1, length, 4, dim, torch.float32))

    def both(function):
        function(size * query, key, value).sum().backward()

    # What is kept for all rows at once, the tokens of the rows that are computed together, and what torch's fused
    # kernel takes per thread: 256 rows of 512 weights and a little more.
    bound = max(module._ROWS * length, 2 * 1 << 21 if size > 1 else 0, torch.get_num_threads() * 256 * 544)
    assert largest_of(lambda: both(causal_mean)) <= bound

    def plain(query, key, value):
        return module.attention_weights(query, key, torch.ones(length, length).bool().tril()) @ value

    assert largest_of(lambda: both(plain)) >= length**2


class TestRowsFarFromZero:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("sink", "offset"), [(1e3, 0.0), (1e6, 0.0), (1.0, 1e6), (1e8, 1e4)])
    def test_a_sink_and_a_shared_offset_cost_no_digits(self, sink, offset, dtype, monkeypatch):
        query, key, value = inputs(length=64, dtype=dtype)
        key = key + offset
        key[:, :, 0] *= sink
        query = torch.where((query * key[:, :, :1]).sum(-1, keepdim=True) > 0, -query, query)
        parts = [part.requires_grad_() for part in (query, key, value)]
        wide = [part.detach().double().requires_grad_() for part in parts]
        up = normal(*value.shape, seed=5)
        up[:, :, 0] = 0  # one token: nothing to differentiate

        def error():
            found = [causal_mean(*parts), *torch.autograd.grad(causal_mean(*parts), parts, up.to(dtype))]
            expected = [loop(*wide), *torch.autograd.grad(loop(*wide), wide, up)]
            return [
                float((mine.double() - other).detach().abs().max() / other.detach().abs().max())
                for mine, other in zip(found, expected, strict=True)
            ]

        # Logits are sums of products of a few units about the token attended to.
        assert max(error()) < 100 * torch.finfo(dtype).eps
        if offset:
            monkeypatch.setitem(module.CANCELLATION, dtype, float("inf"))
            assert max(error()) > 100 * torch.finfo(dtype).eps

    @pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e30), (torch.float64, 1e200)])
    def test_logits_beyond_the_range_are_the_hard_attention(self, dtype, size):
        query, key, value = inputs(length=9, dtype=dtype)
        best = (query @ key.mT).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).argmax(-1)  # (B, H, T)
        parts = [(size * query).requires_grad_(), (size * key).requires_grad_(), value.requires_grad_()]
        mean = causal_mean(*parts)
        assert torch.equal(mean, value.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, value.shape[-1])))
        slopes = torch.autograd.grad(mean.sum(), parts)
        assert all((part == 0).all() for part in slopes[:2])
        count = torch.nn.functional.one_hot(best, 9).sum(2).to(dtype)  # (B, H, T)
        assert torch.equal(slopes[2], count.unsqueeze(-1).expand_as(value))
        # Torch alone answers with NaN, or with zeros where all logits of a row are -inf.
        fused = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, scale=1.0)
        assert not torch.equal(fused, mean)

    def test_a_huge_or_missing_later_token_changes_no_earlier_row(self):
        query, key, value = inputs()
        expected = causal_mean(query, key, value)
        for part, filling in itertools.product((1, 2), (1e200, float("nan"), float("inf"))):
            changed = [query, key.clone(), value.clone()]
            changed[part][:, :, 5] = filling
            found = causal_mean(*changed)
            assert torch.equal(found[:, :, :5], expected[:, :, :5])
            if filling != 1e200:
                assert not found[:, :, 5:].isfinite().any()
        query = query.clone()
        query[0, 0, 3] = torch.nan
        found = causal_mean(query, key, value)
        assert found[0, 0, 3].isnan().all()
        found[0, 0, 3] = expected[0, 0, 3]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_a_row_that_sees_nothing_has_no_weight():
    visible = torch.tensor([[False, False, False], [True, False, True]])
    weights = attention_weights(torch.randn(2, 1), torch.zeros(3, 1), visible)
    assert torch.equal(weights, torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.0, 0.5]]))
