"""Shares of heads and past tokens in a margin: they add up, they are derivatives, and no basis changes them."""

import pytest
import torch
from layer_zoo import FAMILIES, Exact, own_blocks, stream, tiny

from probattn.errors import InputError
from probattn.hf.explain import margin_gradient, past_shares
from probattn.hf.layers import attention_layer
from probattn.hf.layers.past import attend
from probattn.hf.layers.sublayer import project

KINDS = ("logabsdet", "sigma_min", "spectral", "complex")
SOME = [name for name in ("gpt2", "qwen3", "gemma2", "mistral", "phi") if name in FAMILIES]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def margin_of(block, kind, update):
    """The margins by their definitions, differentiable by automatic differentiation."""
    whole = torch.eye(len(block), dtype=block.dtype) - (-block if update else block)
    if kind == "logabsdet":
        return torch.linalg.slogdet(whole).logabsdet
    if kind == "sigma_min":
        return torch.linalg.svdvals(whole)[-1]
    values = torch.linalg.eigvals(whole)
    if kind == "spectral":
        values = values[values.imag.abs() < 1e-9]
    return values.real.min()


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [False, True])
def test_a_gradient_is_that_of_automatic_differentiation(kind, update, known):
    block = (drawn(9, 9) / 3).requires_grad_()
    value = margin_of(block, kind, update)
    (expected,) = torch.autograd.grad(value, block)
    real = kind == "spectral" or (
        kind == "complex" and bool((value - margin_of(block, "spectral", update)).abs() < 1e-9)
    )
    eigenvalue = 1 - float(value.detach()) + 1e-6 if known and real else None  # as from single precision
    found = margin_gradient(block.detach(), kind, update=update, eigenvalue=eigenvalue)
    torch.testing.assert_close(found.margin, value.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.gradient, expected, rtol=1e-7, atol=1e-8)


def test_an_eigenvalue_that_is_none_has_no_derivative():
    """Control: without the check, whatever inverse iteration arrives at would be given out."""
    block = torch.diag(torch.tensor([0.5, 0.25, 0.1])).double()
    assert margin_gradient(block, "spectral", eigenvalue=0.4).gradient.isnan().all()
    assert margin_gradient(block, "spectral", eigenvalue=0.500004).gradient.isfinite().all()
    with pytest.raises(InputError, match="no real eigenvalue"):
        margin_gradient(torch.tensor([[0.0, 2.0], [-2.0, 0.0]]).double(), "spectral")
    with pytest.raises(InputError, match="kind is 'determinant'"):
        margin_gradient(block, "determinant")


@pytest.mark.parametrize("name", FAMILIES)
def test_shares_add_up_to_the_models_own_block(name):
    model = tiny(name)
    layer, u = attention_layer(model, 1), stream(model, 7)
    gradient = drawn(layer.dim, layer.dim)
    with Exact(), torch.no_grad():
        blocks = own_blocks(model, 1, u)
        for row in (0, 4, 6):
            shares = past_shares(layer, u, row, gradient)
            assert shares.past.shape == (layer.heads, 7)
            assert (shares.past[:, row + 1 :] == 0).all()
            torch.testing.assert_close(shares.heads().sum(), (gradient * blocks[row]).sum(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", SOME)
def test_heads_of_the_volume_are_the_layers_attribution(name):
    model = tiny(name)
    layer, u = attention_layer(model, 0), stream(model, 6)
    with torch.no_grad():
        expected = layer.head_attribution(u, torch.tensor([5]))[0]
        gradient = margin_gradient(layer.mean_jacobian(u, torch.tensor([5]))[0], "logabsdet").gradient
        torch.testing.assert_close(past_shares(layer, u, 5, gradient).heads(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "mistral"])
def test_the_share_of_a_past_token_is_what_its_weight_does(name):
    """By automatic differentiation of the weights: (v_s - vbar) dalpha_s / du, carried through the output map."""
    model = tiny(name)
    layer, u, row = attention_layer(model, 1), stream(model, 6), 4
    sublayer, positions = layer.sublayer, torch.arange(6).unsqueeze(0)
    group = sublayer.heads // sublayer.groups

    def weights(token):
        moved = torch.cat([u[:row], token[None], u[row + 1 :]])
        query = project(sublayer, moved[None], positions).query[0, :, row].flatten(0, 1)
        key = project(sublayer, u[None], positions).key[0].repeat_interleave(group, 0)
        logits = sublayer.scale * (key @ query.unsqueeze(-1)).squeeze(-1)
        if sublayer.softcap is not None:
            logits = sublayer.softcap * torch.tanh(logits / sublayer.softcap)
        seen = torch.arange(6)
        logits[:, (seen > row) | (seen <= row - (sublayer.window or 6))] = -torch.inf
        return logits.softmax(-1)

    value = project(sublayer, u[None], positions).value[0].repeat_interleave(group, 0)
    alpha = weights(u[row])
    average = (alpha.unsqueeze(1) @ value).squeeze(1)  # (H, dv)
    slope = torch.autograd.functional.jacobian(weights, u[row])  # (H, T, p)

    def output(changed):
        before = sublayer.output.flatten(1) @ changed.flatten()
        before = before if sublayer.output_bias is None else before + sublayer.output_bias
        return before if sublayer.output_norm is None else sublayer.output_norm(before)

    carried = torch.autograd.functional.jacobian(output, average)  # (p, H, dv)
    gradient = drawn(layer.dim, layer.dim)
    expected = torch.einsum("ab,ahe,hse,hsb->hs", gradient, carried, value - average.unsqueeze(1), slope)
    found = past_shares(layer, u, row, gradient).past.detach()
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-10)


@torch.no_grad()
def turn_values(layer):
    """W_V <- R W_V and W_O <- W_O R^-1 in each group of heads: the network stays what it is."""
    sublayer = layer.read()
    group = sublayer.heads // sublayer.groups
    for k in range(sublayer.groups):
        matrix = drawn(sublayer.value.weight.shape[1], sublayer.value.weight.shape[1], seed=k)
        matrix = matrix + 2 * torch.eye(len(matrix), dtype=matrix.dtype)
        sublayer.value.weight[k] = matrix @ sublayer.value.weight[k]
        if sublayer.value.bias is not None:
            sublayer.value.bias[k] = matrix @ sublayer.value.bias[k]
        for h in range(k * group, (k + 1) * group):
            sublayer.output[:, h] = sublayer.output[:, h] @ torch.linalg.inv(matrix)


def shares_of(layer, u, kind):
    block = layer.mean_jacobian(u, torch.tensor([5]))[0]
    found = past_shares(layer, u, 5, margin_gradient(block, kind).gradient)
    return torch.cat([found.past, found.own.unsqueeze(1)], 1)


@pytest.mark.parametrize("kind", ["logabsdet", "sigma_min", "complex"])
@pytest.mark.parametrize("name", SOME)
def test_the_basis_of_a_head_changes_no_share(name, kind):
    model = tiny(name)
    layer, u = attention_layer(model, 1), stream(model, 7)
    with torch.no_grad():
        before = shares_of(layer, u, kind)
        turn_values(layer)
        torch.testing.assert_close(shares_of(layer, u, kind), before, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", SOME)
def test_the_head_alone_share_does_change(name):
    """Control: the same change of basis, and the shares of a head in log|det(I - c Cov(v, k))|."""
    model = tiny(name)
    layer, u = attention_layer(model, 1), stream(model, 7)

    def head_alone():
        sublayer = layer.sublayer
        tokens = project(sublayer, u[None], torch.arange(7).unsqueeze(0))
        covariance = attend(sublayer, tokens, torch.tensor([5])).covariance[0, 0]  # c Cov, (H, dv, r)
        whole = torch.eye(covariance.shape[-1], dtype=u.dtype) - covariance
        return -torch.linalg.solve(whole, covariance).diagonal(dim1=-2, dim2=-1).sum(-1)

    with torch.no_grad():
        before = head_alone()
        turn_values(layer)
        assert (head_alone() - before).abs().max() > 0.1


@torch.no_grad()
def test_a_bias_of_the_keys_changes_no_share():
    """It adds the same number to all logits of a token; without rotation the network does not see it."""
    model = tiny("gpt2")
    layer, u = attention_layer(model, 1), stream(model, 7)
    before = shares_of(layer, u, "sigma_min")
    layer.read().key.bias.add_(3.0)
    after = shares_of(layer, u, "sigma_min")
    # The token's own key depends on the token as before, and the shares of the past are measured from the mean key.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)


def test_what_a_mask_hides_has_no_share():
    model = tiny("llama")
    layer, u = attention_layer(model, 0), stream(model, 6)
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    visible[4, 1] = False
    with torch.no_grad():
        gradient = drawn(layer.dim, layer.dim)
        shares = past_shares(layer.seeing(visible), u, 4, gradient)
        assert (shares.past[:, 1] == 0).all()
        block = layer.seeing(visible).mean_jacobian(u, torch.tensor([4]))[0]
        torch.testing.assert_close(shares.heads().sum(), (gradient * block).sum(), rtol=0, atol=1e-9)
    with pytest.raises(InputError, match="row is 6"):
        past_shares(layer, u, 6, gradient)
