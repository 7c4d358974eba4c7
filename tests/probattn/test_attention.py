"""The attention as a value: its mean, blocks and determinants against loops and autograd, in all the corners."""

import inspect
import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probattn import CausalAttention, blocks, regime
from probattn.errors import InputError
from probattn.interface import Attention
from probattn.moments import passes
from support import attention_like, dense_blocks, loop_mean, tokens

MASKS = ["strict", "inclusive"]


@pytest.mark.parametrize("mask", ["strict", "inclusive"])
@pytest.mark.parametrize(
    ("heads", "rank", "dim", "value_dim", "length"), [(1, 1, 1, None, 1), (2, 3, 4, 2, 5), (3, 1, 2, None, 4)]
)
def test_mean_is_the_textbook_loop(mask, heads, rank, dim, value_dim, length):
    attention = attention_like(0, heads, rank, dim, value_dim, mask)
    u = tokens(0, length, dim)
    torch.testing.assert_close(attention.mean(u), loop_mean(attention, u))


@pytest.mark.parametrize("mask", ["strict", "inclusive"])
def test_weights_sum_to_one_over_the_past_and_see_nothing_else(mask):
    weights = attention_like(1, heads=2, mask=mask).weights(tokens(1, 3, 6, 3))
    total = weights.sum(-1)
    assert weights.shape == (3, 2, 6, 6)
    if mask == "strict":
        assert (total[..., 0] == 0).all()
        total = total[..., 1:]
    torch.testing.assert_close(total, torch.ones_like(total))
    above = torch.ones(6, 6).triu(0 if mask == "strict" else 1).bool()
    assert (weights[..., above] == 0).all()


def test_start_is_the_mean_of_the_first_token_under_the_strict_mask_only():
    u = tokens(2, 4, 3)
    strict, inclusive = (attention_like(2, mask=mask) for mask in ("strict", "inclusive"))
    torch.testing.assert_close(strict.mean(u)[0], strict.start)
    torch.testing.assert_close(inclusive.mean(u)[0], u[0])


@pytest.mark.parametrize("parameters_batch", [(), (4, 1), (4, 5)])
def test_batches_of_parameters_and_of_tokens_broadcast(parameters_batch):
    attention = attention_like(3, heads=2, value_dim=2, batch=parameters_batch, mask="inclusive")
    u = tokens(3, 5, 6, 3)
    whole = attention.jacobian(u)
    batch = torch.broadcast_shapes(parameters_batch, (5,))
    assert whole.shape == (*batch, 6, 3, 3)
    wide = attention.expand(batch)
    index = tuple(size - 1 for size in batch)
    one = CausalAttention(
        wide.query[index],
        wide.key[index],
        wide.value[index],
        wide.output[index],
        mask="inclusive",
        start=wide.start[index],
    )
    torch.testing.assert_close(whole[index], one.jacobian(u[-1]))
    torch.testing.assert_close(attention.mean(u)[index], one.mean(u[-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask", ["strict", "inclusive"])
def test_extreme_logits_stay_finite(mask, dtype):
    attention = attention_like(4, heads=2, value_dim=2, mask=mask, size=1e4, dtype=dtype)
    u = tokens(4, 8, 3, dtype=dtype)
    logits = torch.einsum("hrp,tp,hrq,sq->hts", attention.scaled_query, u, attention.key, u)
    assert 1e4 < logits.abs().max() < 1e6
    for result in (attention.weights(u), attention.mean(u), attention.jacobian(u), *attention.logabsdet(u)):
        assert result.dtype == dtype
        assert torch.isfinite(result).all()


def test_extreme_logits_are_the_hard_attention():
    # Two keys whose logits differ by 2e4: all weight on the first, to the last bit, in either order.
    attention = CausalAttention.from_qk_matrix(torch.tensor([[1e4]], dtype=torch.float64))
    u = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    assert torch.equal(attention.weights(u)[0, 2], torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))
    assert torch.equal(attention.weights(u)[0, 3], torch.tensor([0, 1.0, 0, 0], dtype=torch.float64))
    assert (attention.jacobian(u) == 1).all()


def test_repeated_tokens_have_no_covariance():
    attention = CausalAttention.from_qk_matrix(torch.tensor([[3.0]], dtype=torch.float64))
    u = torch.full((7, 1), 1e6, dtype=torch.float64)
    assert (attention.jacobian(u) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [1e3, 1e6, 1e8])
def test_repeated_tokens_far_from_the_first_one(offset, dtype):
    # All weight lies on the repeated tokens, which do not vary: J = 1 whatever the distance of the first.
    attention = CausalAttention.from_qk_matrix(torch.tensor([[1.0]], dtype=dtype))
    u = torch.tensor([0.0] + [offset + 0.1] * 6, dtype=dtype).unsqueeze(-1)
    assert (attention.jacobian(u) - 1).abs().max() < 1e-5
    # The blocks of the sequence are the identity; the fold that such a past does have lies between its two values.
    found = regime(attention, u)
    assert (str(found), found.position) == ("folded", 2)
    assert str(regime(CausalAttention.from_qk_matrix(-attention.qk_matrix, heads=1), u)) == "certified"


@pytest.mark.parametrize("heads", [1, 3])
def test_recomputed_rows_agree_and_carry_gradients(heads):
    attention = attention_like(11, heads, 2, 3, 2)
    near = tokens(11, 2, 7, 3)
    far = torch.cat([near[:, :1] - 2000.0, near], dim=1)  # the first token keeps no weight; the others are as before
    hard = CausalAttention(attention.query, attention.key, attention.value, attention.output)
    blocks = hard.jacobian(far)
    reference = torch.autograd.functional.jacobian(lambda u: hard.residual(u).sum(0), far).diagonal(dim1=0, dim2=3)
    torch.testing.assert_close(blocks, reference.permute(1, 3, 0, 2), atol=1e-7, rtol=1e-7)
    assert torch.autograd.gradcheck(
        lambda x: hard.jacobian(x), (far[:1, :4].clone().requires_grad_(),), atol=1e-4, rtol=1e-3
    )


def test_covariance_keeps_its_digits_under_a_large_offset():
    points = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=torch.float64) + 1e8
    weights = torch.full((1, 4), 0.25, dtype=torch.float64)
    attention = CausalAttention.from_qk_matrix(torch.ones(1, 1, dtype=torch.float64))
    at_zero = torch.cat([points, torch.zeros(1, 1, dtype=torch.float64)])  # where the weights are uniform
    assert abs(float(attention.jacobian(at_zero)[-1])) < 1e-12  # 1 - Var, the variance of -1 and 1
    plain = (weights @ points**2) - (weights @ points) ** 2  # what the variance would be without the shift
    assert abs(float(plain) - 1) > 1e-3


def test_the_past_does_not_see_the_future_to_the_bit():
    attention = attention_like(5, heads=2, value_dim=2)
    u = tokens(5, 9, 3)
    changed = u.clone()
    changed[6:] += 10.0
    for function in (attention.mean, attention.jacobian):
        assert torch.equal(function(u)[:6], function(changed)[:6])


def test_float32_agrees_with_float64():
    double = attention_like(6, heads=2, value_dim=2)
    u = tokens(6, 8, 3)
    # Blocks are sums of about 8 products of numbers near one: a few float32 epsilons each.
    torch.testing.assert_close(
        double.to(torch.float32).jacobian(u.float()).double(), double.jacobian(u), atol=2e-5, rtol=2e-5
    )


def test_identified_products_do_not_depend_on_the_factors():
    attention = attention_like(7, heads=2, value_dim=2)
    turn = tokens(7, 2, 2) + 2 * torch.eye(2)
    turned = CausalAttention(
        turn @ attention.query,
        torch.linalg.inv(turn).mT @ attention.key,
        attention.value,
        attention.output,
        start=attention.start,
    )
    u = tokens(8, 6, 3)
    torch.testing.assert_close(turned.qk_matrix, attention.qk_matrix)
    torch.testing.assert_close(turned.logabsdet(u)[1], attention.logabsdet(u)[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(1, 2, 4)}, r"key has 4 in its features axis \(-1\) where 3"),
        ({"key": torch.zeros(2, 2, 3)}, r"key has 2 in its heads axis \(-3\) where 1"),
        ({"key": torch.zeros(1, 5, 3)}, r"key has 5 in its rank axis \(-2\) where 2"),
        ({"value": torch.zeros(1, 2, 3)}, "output is the identity, which needs 3"),
        (
            {"value": torch.zeros(1, 2, 3), "output": torch.zeros(1, 3, 1)},
            r"output has 1 in its value axis \(-1\) where 2",
        ),
        ({"query": torch.zeros(2, 3)}, "needs a heads axis"),
        ({"query": torch.full((1, 2, 3), float("nan"))}, r"query is not finite: nan at index \(0, 0, 0\)"),
        ({"key": torch.zeros(1, 2, 3).double()}, "bring them together"),
        ({"query": torch.zeros(1, 2, 3).long()}, "query is torch.int64; log-determinants need float32 or float64"),
        ({"query": torch.zeros(1, 2, 3).half()}, "query is torch.float16"),
        ({"mask": "causal"}, "mask is 'causal'; use one of 'strict', 'inclusive'"),
        ({"start": torch.zeros(2)}, r"start has 2 in its features axis"),
        ({"scale": torch.ones(5)}, r"scale has 5 in its heads axis \(-1\) where 1 or 1"),
        ({"key": torch.zeros(2, 1, 2, 3), "query": torch.zeros(3, 1, 2, 3)}, "do not broadcast"),
    ],
)
def test_bad_parameters_are_named(change, message):
    arguments = {"query": torch.zeros(1, 2, 3), "key": torch.zeros(1, 2, 3), **change}
    with pytest.raises(InputError, match=message):
        CausalAttention(**arguments)


def test_bad_tokens_are_named():
    attention = attention_like(0)
    with pytest.raises(InputError, match="p = 3 features in the last axis"):
        attention.mean(tokens(0, 5, 2))
    with pytest.raises(InputError, match="float32"):
        attention.mean(tokens(0, 5, 3, dtype=torch.float32))
    with pytest.raises(InputError, match="must be square"):
        CausalAttention.from_qk_matrix(torch.zeros(2, 3))


def test_repr_and_conversion():
    attention = attention_like(0, heads=2, value_dim=1)
    assert repr(attention) == "CausalAttention(heads=2, rank=2, value_dim=1, dim=3, mask='strict', batch_shape=())"
    assert attention.equals(attention.to(torch.float64))
    assert not attention.equals(attention_like(1, heads=2, value_dim=1))


@pytest.mark.cuda
def test_cuda_agrees_with_cpu():
    attention = attention_like(9, heads=2, value_dim=2, mask="inclusive")
    u = tokens(9, 2, 8, 3)
    there = attention.to("cuda").jacobian(u.cuda())
    torch.testing.assert_close(there.cpu(), attention.jacobian(u))


@pytest.mark.parametrize("mask", ["strict", "inclusive"])
def test_the_log_density_is_twice_differentiable_and_in_forward_mode(mask):
    attention = attention_like(12, heads=2, rank=2, dim=3, value_dim=2, mask=mask)
    names = ("query", "key", "value", "output")
    parts = [getattr(attention, name).detach().requires_grad_() for name in names]
    u = tokens(12, 2, 4, 3).requires_grad_()

    def terms(u, *parts):
        own = CausalAttention(*parts, mask=mask, start=attention.start)
        residual, logabsdet = own.residual_and_logabsdet(u)
        torch.testing.assert_close(residual, own.residual(u))
        return residual, logabsdet

    assert torch.autograd.gradcheck(terms, (u, *parts), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(terms, (u, *parts), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("mask", ["strict", "inclusive"])
@pytest.mark.parametrize("name", ["query", "key", "value", "output", "scale", "start"])
def test_each_parameter_may_have_a_batch_alone(name, mask):
    single = attention_like(13, heads=2, rank=2, dim=3, value_dim=2, mask=mask)
    factor = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    parameters = single._parameters()
    whole = parameters[name] * factor.view(4, *[1] * (1 if name == "scale" else parameters[name].dim()))
    attention = CausalAttention(**(parameters | {name: whole}), mask=mask)
    u = tokens(13, 5, 3)
    together, apart = (
        attention.mean_and_factors(u).mean,
        [attention.select(n).mean_and_factors(u).mean for n in range(4)],
    )
    torch.testing.assert_close(together.expand(4, 5, 3), torch.stack(apart), rtol=0, atol=1e-14)
    found = attention.jacobian(u).expand(4, 5, 3, 3)
    torch.testing.assert_close(
        found, torch.stack([attention.select(n).jacobian(u) for n in range(4)]), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("mask", ["strict", "inclusive"])
def test_an_empty_batch(mask):
    residual, logabsdet = attention_like(14, heads=2, mask=mask).residual_and_logabsdet(tokens(14, 0, 5, 3))
    assert (residual.shape, logabsdet.shape) == ((0, 5, 3), (0, 5))


@pytest.mark.parametrize("scale", [1.0, 32.0, 1024.0])
@pytest.mark.parametrize("offset", [0.0, 1024.0])
def test_the_own_weight_keeps_its_digits(scale, offset):
    # Eighths and powers of two, so that single precision holds tokens, queries and keys exactly.
    matrix = scale / 1024 * torch.tensor([[1.0, 0.5], [-0.5, 1.0]])
    u = (8 * tokens(15, 20, 2)).round().div(8).float() + offset
    attention = CausalAttention.from_qk_matrix(matrix, mask="inclusive")
    exact = CausalAttention.from_qk_matrix(matrix.double(), mask="inclusive").jacobian(u.double())
    # Logits of a thousand are rounded to 1e-4, and some rows have weights between zero and one. Taken as
    # exp(logit - log-sum), the weights are off by 1e-3 here.
    assert (attention.jacobian(u).double() - exact).abs().max() < 3e-5 * exact.abs().max()


def test_it_implements_the_interface():
    attention: Attention = attention_like(1, heads=2, value_dim=2, batch=(3,))
    members = {name for name in vars(Attention) if not name.startswith("_")} | set(Attention.__annotations__)
    assert {"like", "mean_jacobian", "core", "residual_and_logabsdet", "mask"} <= members
    assert all(hasattr(attention, name) for name in members)
    for name in members:
        wanted = getattr(Attention, name, None)
        if inspect.isfunction(wanted):
            assert list(inspect.signature(getattr(CausalAttention, name)).parameters) == list(
                inspect.signature(wanted).parameters
            )
    assert attention.like is attention.query
    assert (attention.dim, attention.rank, attention.heads, attention.batch_shape) == (3, 2, 2, (3,))


@settings(max_examples=40, deadline=None)
@given(
    mask=st.sampled_from(MASKS),
    heads=st.integers(1, 3),
    rank=st.integers(1, 4),
    dim=st.integers(1, 4),
    value_dim=st.none() | st.integers(1, 4),
    length=st.integers(1, 6),
    seed=st.integers(0, 2**20),
)
def test_blocks_and_determinants_are_those_of_automatic_differentiation(
    mask, heads, rank, dim, value_dim, length, seed
):
    attention = attention_like(seed, heads, rank, dim, value_dim, mask, size=0.5)
    u = tokens(seed, length, dim)
    expected = dense_blocks(attention, u)
    torch.testing.assert_close(attention.mean(u), loop_mean(attention, u), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(attention.residual(u), u - loop_mean(attention, u), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(attention.jacobian(u), expected, rtol=1e-9, atol=1e-10)
    eye = torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(attention.mean_jacobian(u), eye - expected, rtol=1e-9, atol=1e-10)
    core = attention.core(u)
    determinants = torch.linalg.det(torch.eye(core.shape[-1], dtype=torch.float64) - core)
    torch.testing.assert_close(determinants, torch.linalg.det(expected), rtol=1e-7, atol=1e-9)
    sign, logabs = attention.logabsdet(u)
    torch.testing.assert_close(sign * logabs.exp(), torch.linalg.det(expected), rtol=1e-7, atol=1e-9)
    residual, again = attention.residual_and_logabsdet(u)
    torch.testing.assert_close(residual, attention.residual(u), rtol=1e-10, atol=1e-12)
    assert torch.equal(again, logabs)


@pytest.mark.parametrize("mask", MASKS)
def test_the_mean_is_the_weighted_sum_of_the_values(mask):
    attention = attention_like(2, heads=2, value_dim=2, mask=mask)
    u = tokens(2, 4, 7, 3)
    values = u.unsqueeze(1) @ attention.value.mT
    mean = (attention.weights(u) @ values @ attention.output.mT).sum(1)
    first = 1 if mask == "strict" else 0
    torch.testing.assert_close(attention.mean(u)[:, first:], mean[:, first:], rtol=0, atol=1e-13)
    if mask == "strict":
        assert torch.equal(attention.mean(u)[:, 0], attention.start.expand(4, 3))
        assert torch.equal(attention.mean_and_factors(u).mean[:, 0], attention.start.expand(4, 3))
        assert (attention.jacobian(u)[:, 0] == torch.eye(3)).all()


def test_products_that_are_identified():
    attention = attention_like(3, heads=2, value_dim=2)
    u, h = tokens(3, 2, 3), 1
    logits = attention.scale * (attention.query[h] @ u[0]) @ (attention.key[h] @ u[1])
    assert u[1] @ attention.qk_matrix[h] @ u[0] == pytest.approx(logits.item(), rel=1e-12)
    carried = attention.output[h] @ (attention.value[h] @ u[1])
    torch.testing.assert_close(attention.ov_matrix[h] @ u[1], carried, rtol=1e-12, atol=0)
    torch.testing.assert_close(attention.scaled_query, attention.query / 2**0.5, rtol=1e-15, atol=0)
    own = CausalAttention(attention.query, attention.key, scale=torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(own.scaled_query, attention.query * torch.tensor([2.0, 3.0]).view(2, 1, 1))


class TestAsAValue:
    def test_expand_select_detach_and_move(self):
        attention = attention_like(4, heads=2, value_dim=2, batch=(4, 1), mask="inclusive")
        u = tokens(4, 5, 3)
        wide = attention.expand((4, 6))
        assert wide.batch_shape == (4, 6)
        assert wide.mask == "inclusive"
        assert torch.equal(wide.mean(u)[:, 3], attention.mean(u)[:, 0])
        assert torch.equal(attention.select(2).mean(u), attention.mean(u)[2])
        picked = wide.select((torch.tensor([3, 0]), torch.tensor([5, 1])))
        assert picked.batch_shape == (2,)
        assert torch.equal(picked.mean(u), attention.mean(u)[[3, 0], 0])
        moved = attention.to(torch.float32)
        assert {part.dtype for part in moved._parameters().values()} == {torch.float32}
        assert moved.mask == "inclusive"
        leaf = attention.query.clone().requires_grad_()
        cut = CausalAttention(leaf, attention.key, attention.value, attention.output, mask="inclusive").detach()
        assert not cut.mean(u).requires_grad
        assert cut.mask == "inclusive"

    def test_equals_looks_at_every_part(self):
        attention = attention_like(5, heads=2, value_dim=2)
        parts = attention._parameters()
        assert attention.equals(attention)
        assert attention.equals(CausalAttention(**parts))
        assert not attention.equals(CausalAttention(**parts, mask="inclusive"))
        for name, part in parts.items():
            assert not attention.equals(CausalAttention(**(parts | {name: part + 1}))), name

    def test_without_maps_the_values_are_the_tokens(self):
        query = tokens(6, 2, 3, 4)
        attention = CausalAttention(query, query)
        assert torch.equal(attention.ov_matrix, torch.eye(4).double().expand(2, 4, 4))
        assert attention.scale.item() == 3**-0.5
        assert (attention.start == 0).all()
        assert attention.start.shape == (4,)
        assert attention.mask == "strict"

    def test_parameters_are_checked_unless_asked_not_to(self):
        bad = torch.full((1, 2, 3), float("inf"))
        for validate in (True, None):
            with pytest.raises(InputError, match="query is not finite"):
                CausalAttention(bad, bad, validate_args=validate)
        assert CausalAttention(bad, bad, validate_args=False).query is bad
        before = torch.distributions.Distribution._validate_args
        try:
            torch.distributions.Distribution.set_default_validate_args(False)
            assert CausalAttention(bad, bad).query is bad
        finally:
            torch.distributions.Distribution.set_default_validate_args(before)


class TestHeadsOfAQKMatrix:
    def test_two_axes_are_one_head(self):
        matrix = tokens(7, 3, 3)
        for heads in (None, 1):
            attention = CausalAttention.from_qk_matrix(matrix, heads=heads, start=torch.ones(3).double())
            assert (attention.heads, attention.batch_shape) == (1, ())
            assert torch.equal(attention.qk_matrix, matrix[None])
            assert torch.equal(attention.start, torch.ones(3).double())
        assert CausalAttention.from_qk_matrix(matrix, mask="inclusive").mask == "inclusive"

    def test_three_axes_are_heads_or_a_batch_as_told(self):
        matrix = tokens(8, 4, 3, 3)
        together = CausalAttention.from_qk_matrix(matrix, heads=4)
        apart = CausalAttention.from_qk_matrix(matrix.unsqueeze(-3), heads=1)
        assert (together.heads, together.batch_shape) == (4, ())
        assert (apart.heads, apart.batch_shape) == (1, (4,))
        u = tokens(8, 5, 3)
        torch.testing.assert_close(together.mean(u), apart.mean(u).sum(0))

    @pytest.mark.parametrize(
        ("shape", "heads"), [((4, 3, 3), None), ((1, 3, 3), None), ((4, 3, 3), 1), ((4, 3, 3), 2), ((3, 3), 2)]
    )
    def test_ambiguity_is_refused_with_both_readings(self, shape, heads):
        with pytest.raises(InputError) as caught:
            CausalAttention.from_qk_matrix(torch.zeros(shape), heads=heads)
        count = shape[-3] if len(shape) == 3 else 1
        assert f"heads is {heads}: with heads={count} it is one attention" in str(caught.value)
        assert "matrix.unsqueeze(-3) with heads=1" in str(caught.value)

    def test_in_a_plate(self):
        """A (p, p) site in a plate of four is four attentions: the density of each row is that of its own matrix."""
        u = tokens(9, 4, 6, 2)

        def model(read):
            with pyro.plate("rows", 4):
                matrix = pyro.sample("matrix", dist.Normal(torch.zeros(2, 2).double(), 1.0).to_event(2))
                return read(matrix).residual_and_logabsdet(u)[1]

        def readings(read):
            pyro.set_rng_seed(1)
            trace = pyro.poutine.trace(model).get_trace(read)
            return trace.nodes["matrix"]["value"], trace.nodes["_RETURN"]["value"]

        matrix, found = readings(lambda m: CausalAttention.from_qk_matrix(m.unsqueeze(-3), heads=1))
        assert matrix.shape == (4, 2, 2)
        for row in range(4):
            own = CausalAttention.from_qk_matrix(matrix[row]).residual_and_logabsdet(u[row])[1]
            torch.testing.assert_close(found[row], own, rtol=0, atol=1e-13)
        _, wrong = readings(lambda m: CausalAttention.from_qk_matrix(m, heads=4))
        assert (wrong - found).abs().max() > 0.1
        with pytest.raises(InputError, match="as in a Pyro plate"):
            readings(CausalAttention.from_qk_matrix)


class TestOtherThanTensors:
    @pytest.mark.parametrize("name", ["query", "key", "value", "output", "start"])
    @pytest.mark.parametrize("change", [np.asarray, torch.Tensor.tolist])
    def test_parameters(self, name, change):
        parts = attention_like(10, heads=1, value_dim=2)._parameters()
        with pytest.raises(
            InputError, match=rf"{name} is a .*; it must be a tensor, made by torch.as_tensor\({name}\)"
        ):
            CausalAttention(**(parts | {name: change(parts[name])}))

    def test_missing_ones(self):
        with pytest.raises(InputError, match="key is a NoneType"):
            CausalAttention(torch.zeros(1, 1, 1), None)

    @pytest.mark.parametrize("name", ["weights", "mean", "residual", "jacobian", "core", "logabsdet"])
    def test_tokens_and_matrices(self, name):
        attention = attention_like(10)
        for u in (np.zeros((4, 3)), [[0.0, 0.0, 0.0]]):
            with pytest.raises(InputError, match=r"u is a .*torch.as_tensor\(u\)"):
                getattr(attention, name)(u)
        with pytest.raises(InputError, match=r"matrix is a numpy.ndarray of shape \(2, 2\)"):
            CausalAttention.from_qk_matrix(np.zeros((2, 2)))

    def test_tokens_of_other_shapes(self):
        attention = attention_like(10)
        for shape in ((3,), (0, 3), (5, 4), ()):
            with pytest.raises(InputError, match=r"u has shape .*at least one token"):
                attention.mean(torch.zeros(shape).double())


AUTOCAST = [
    "weights", "mean", "residual", "jacobian", "mean_jacobian", "core", "logabsdet", "residual_and_logabsdet",
    "mean_and_factors", "qk_matrix", "ov_matrix", "scaled_query",
]  # fmt: skip


@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("far", [0.0, 1e4])
def test_autocast_changes_nothing(name, mask, far):
    attention = attention_like(11, heads=2, value_dim=2, mask=mask, dtype=torch.float32)
    u = tokens(11, 2, 6, 3, dtype=torch.float32)
    u[:, 0] += far  # rows that are computed again, where there is one
    plain = getattr(attention, name)
    expected = plain(u) if callable(plain) else plain
    with torch.autocast("cpu", torch.bfloat16):
        assert (u @ u.mT).dtype == torch.bfloat16
        found = getattr(attention, name)
        found = found(u) if callable(found) else found
        again = attention.to(torch.float32).mean(u)
    assert again.dtype == torch.float32
    pairs = list(zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True))
    assert pairs
    for mine, other in pairs:
        if mine is not None:
            assert mine.dtype == torch.float32
            assert torch.equal(mine, other)


def test_gradients_under_autocast_are_those_without():
    u = tokens(11, 6, 3, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        parts = [
            part.clone().requires_grad_() for part in attention_like(11, dtype=torch.float32)._parameters().values()
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            attention = CausalAttention(*parts[:4], scale=parts[4], start=parts[5])
            loss = sum(part.sum() for part in attention.residual_and_logabsdet(u)) + attention.mean(u).square().sum()
        results.append(torch.autograd.grad(loss, parts))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


def test_tokens_in_half_precision_are_refused():
    attention = attention_like(11, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match=r"u is torch.bfloat16.*convert"):
        attention.mean(tokens(11, 6, 3, dtype=torch.bfloat16))


class TestCorners:
    """Mean, residual and density agree, and are right, where logits leave the range or a token is far away."""

    @staticmethod
    def agreement(attention, u, tolerance):
        mean, evaluation = attention.mean(u), attention.mean_and_factors(u)
        residual, logabsdet = attention.residual_and_logabsdet(u)
        size = mean.abs().amax()
        for other in (evaluation.mean, u - residual, u - attention.residual(u)):
            assert (other - mean).abs().amax() <= tolerance * (size + u.abs().amax())
        assert torch.equal(attention.logabsdet(u)[1], logabsdet)
        assert torch.isfinite(mean).all()
        return mean, blocks.mean_jacobian(evaluation.factors)

    @pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e30), (torch.float64, 1e200)])
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("seed", range(3))
    def test_logits_beyond_the_range(self, dtype, size, mask, seed):
        small = attention_like(seed, heads=2, value_dim=2, mask=mask, dtype=dtype)
        large = CausalAttention(
            size * small.query, size * small.key, small.value, small.output, mask=mask, start=small.start
        )
        u = tokens(seed, 9, 3, dtype=dtype)
        mean, jacobian = self.agreement(large, u, 1e-5 if dtype == torch.float32 else 1e-12)
        # Hard attention on the token with the largest logit.
        logits = torch.einsum("hrp,tp,hrq,sq->hts", small.scaled_query, u, small.key, u)
        past = torch.ones(9, 9).tril(-1 if mask == "strict" else 0).bool()
        best = logits.masked_fill(~past, -torch.inf).argmax(-1)
        expected = sum(small.ov_matrix[h] @ u[best[h]].mT for h in range(2)).mT
        first = 1 if mask == "strict" else 0
        torch.testing.assert_close(mean[first:], expected[first:], rtol=1e-5, atol=1e-5)
        own = torch.stack([(best[h] == torch.arange(9)).to(dtype) for h in range(2)])
        if mask == "strict":
            assert (jacobian == 0).all()
        else:  # the value of the token itself, where it attends to itself
            direct = torch.einsum("ht,hpq->tpq", own, small.ov_matrix)
            torch.testing.assert_close(jacobian, direct, rtol=1e-5, atol=1e-5)
        weights = large.weights(u)[:, first:]
        assert torch.equal(weights, torch.nn.functional.one_hot(best[:, first:], 9).to(dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("sink", [1e3, 1e4, 1e6])
    def test_a_sink_in_the_first_position(self, dtype, mask, sink, monkeypatch):
        """In single precision against double; in double against the attention without the sink, which has no weight."""
        attention = attention_like(12, heads=1, rank=3, value_dim=3, mask=mask, dtype=torch.float64)
        u = tokens(12, 40, 3)
        u[0] *= sink
        # Turn the tokens so that none attends to the first one: its logits are minus a few times its size.
        pull = u[1:] @ attention.qk_matrix[0].mT @ u[0]
        u[1:] = torch.where((pull > 0).unsqueeze(-1), -u[1:], u[1:])
        kept = (u[1:] @ attention.qk_matrix[0].mT @ u[0]).abs() > 60 + 30 * u.norm(dim=-1)[1:] ** 2
        u = torch.cat([u[:1], u[1:][kept]]).to(dtype)
        assert len(u) > 20
        own = attention.to(dtype)
        reference = own.to(torch.float64)
        without = reference.jacobian(u[1:].double())
        skip = 1 if mask == "strict" else 0  # the row that would see nothing without the sink
        bound = {torch.float32: 1e-4, torch.float64: 1e-11}[dtype]

        def error():
            found = own.jacobian(u)[1 + skip :].double()
            return float((found - without[skip:]).abs().max() / without.abs().max())

        assert error() < bound
        mean, _ = self.agreement(own, u, bound)
        expected = reference.mean(u[1:].double())[skip:]
        assert (mean[1 + skip :].double() - expected).abs().max() < bound * expected.abs().max()
        monkeypatch.setattr(passes, "lost_rows", lambda problem, c, o, log_sum, gain: torch.zeros_like(log_sum).bool())
        if sink == 1e6:
            assert error() > 100 * bound

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("sink", [1.0, 1e5])
    def test_the_past_does_not_see_the_future_to_the_bit(self, mask, sink):
        attention = attention_like(13, heads=2, value_dim=2, mask=mask, dtype=torch.float32)
        u = tokens(13, 12, 3, dtype=torch.float32)
        u[0] *= sink
        for later in (10.0, 1e6, 1e25, float("nan")):
            changed = u.clone()
            changed[6:] += later
            for function in (attention.mean, attention.jacobian, attention.residual):
                assert torch.equal(function(u)[:6], function(changed)[:6])

    def test_vmap_over_parameters_repairs_too(self):
        attention = attention_like(14, heads=2, value_dim=2, dtype=torch.float32)
        u = tokens(14, 20, 3, dtype=torch.float32)
        u[0] *= 1e5
        stacked = torch.stack([attention.query, -attention.query, 0.5 * attention.query])

        def jacobian(query):
            return CausalAttention(query, *list(attention._parameters().values())[1:4], validate_args=False).jacobian(u)

        found = torch.vmap(jacobian)(stacked)
        for mine, query in zip(found, stacked, strict=True):
            torch.testing.assert_close(mine, jacobian(query), rtol=1e-5, atol=1e-5)

    def test_a_batch_of_no_parameters(self):
        attention = attention_like(15, heads=2, mask="inclusive", batch=(0,))
        assert attention.jacobian(tokens(15, 4, 3)).shape == (0, 4, 3, 3)
        assert attention.mean(tokens(15, 4, 3)).shape == (0, 4, 3)

    def test_memory_of_the_mean_is_linear_with_its_gradient(self):
        length = 2048
        u = tokens(16, length, 3, dtype=torch.float32)
        for mask, value_dim in itertools.product(MASKS, (None, 2)):
            parts = attention_like(16, heads=2, value_dim=value_dim, mask=mask, dtype=torch.float32)
            query = parts.query.clone().requires_grad_()
            attention = CausalAttention(query, parts.key, parts.value, parts.output, mask=mask)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
                attention.mean(u.requires_grad_()).square().sum().backward()
            largest = max(event.self_cpu_memory_usage for event in seen.events()) / 4
            assert largest < length**2 / 4
