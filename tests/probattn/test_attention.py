import pytest
import torch

from probattn import CausalAttention, regime
from probattn.errors import InputError
from support import attention_like, loop_mean, tokens


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
