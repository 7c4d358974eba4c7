"""No number of a layer depends on the basis in which a head keeps queries, keys and values, or on the heads' order."""

import pytest
import torch
from layer_zoo import FAMILIES, WORDS, Exact, stream, tiny

from probattn.hf.layers import attention_layer
from probattn.hf.layers.past import attend
from probattn.hf.layers.sublayer import project


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def invertible(size, seed):
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn + 2 * torch.eye(size, dtype=torch.float64)


def assign(projection, head, matrix):
    """W <- R W and b <- R b for one head, in the model's own parameters, of which these are views."""
    projection.weight[head] = matrix @ projection.weight[head]
    if projection.bias is not None:
        projection.bias[head] = matrix @ projection.bias[head]


@torch.no_grad()
def turn_values(layer):
    sublayer = layer.read()
    group = sublayer.heads // sublayer.groups
    for k in range(sublayer.groups):
        matrix = invertible(sublayer.output.shape[2], k)
        assign(sublayer.value, k, matrix)
        for h in range(k * group, (k + 1) * group):
            sublayer.output[:, h] = sublayer.output[:, h] @ torch.linalg.inv(matrix)


def commuting(rank, turned, seed):
    """An invertible S that commutes with the rotation: a scaled rotation in each of its planes."""
    matrix, half = invertible(rank, seed), turned // 2
    matrix[:turned], matrix[:, :turned] = 0, 0
    draws = torch.rand(half, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for j, (real, imaginary) in enumerate(draws + 0.5):
        matrix[j, j] = matrix[j + half, j + half] = real
        matrix[j, j + half], matrix[j + half, j] = -imaginary, imaginary
    return matrix


@torch.no_grad()
def turn_queries_and_keys(layer, model):
    sublayer = layer.read()
    group, rank = sublayer.heads // sublayer.groups, sublayer.query.weight.shape[1]
    position = torch.zeros(1, 1, dtype=torch.long)
    turned = 0 if sublayer.rotary is None else sublayer.rotary(position, sublayer.output)[0].shape[-1]
    if sublayer.query_norm is not None:  # only the gains of the norms are free, the same in each plane of the rotation
        factor = torch.rand(rank, dtype=torch.float64) + 0.5
        factor[: turned // 2] = factor[turned // 2 : turned]
        attention = model.base_model.layers[layer.number].self_attn
        norms = [getattr(attention, n, None) for n in ("q_norm", "k_norm", "q_layernorm", "k_layernorm")]
        for norm, scale in zip([norm for norm in norms if norm is not None], (factor, 1 / factor), strict=True):
            plus = 1.0 if "gemma" in model.config.model_type else 0.0
            norm.weight.copy_((norm.weight + plus) * scale - plus)
            if getattr(norm, "bias", None) is not None:
                norm.bias.mul_(scale)
        return
    for k in range(sublayer.groups):
        matrix = commuting(rank, turned, k)
        assign(sublayer.key, k, torch.linalg.inv(matrix).mT)
        for h in range(k * group, (k + 1) * group):
            assign(sublayer.query, h, matrix)


@torch.no_grad()
def exchange_heads(layer):
    sublayer = layer.read()
    group = sublayer.heads // sublayer.groups
    keys = torch.arange(sublayer.groups).flip(0)
    heads = (keys[:, None] * group + torch.arange(group).flip(0)).flatten()
    for projection, order in ((sublayer.query, heads), (sublayer.key, keys), (sublayer.value, keys)):
        projection.weight.copy_(projection.weight[order].clone())
        if projection.bias is not None:
            projection.bias.copy_(projection.bias[order].clone())
    sublayer.output.copy_(sublayer.output[:, heads].clone())


def head_alone(layer, u):
    """The formula that was removed: log|det(I - c Cov_i(v, k))| of each head, values subtracted from queries."""
    sublayer = layer.sublayer
    positions = torch.arange(len(u)).unsqueeze(0)
    found = attend(sublayer, project(sublayer, u.unsqueeze(0), positions), positions[0])
    identity = torch.eye(found.covariance.shape[-1], dtype=u.dtype)
    return torch.linalg.slogdet(identity - found.covariance.squeeze(0)).logabsdet


def change(name, model, layer):
    if name == "values":
        turn_values(layer)
    elif name == "queries and keys":
        turn_queries_and_keys(layer, model)
    else:
        exchange_heads(layer)


@pytest.mark.parametrize("name", ["values", "queries and keys", "order of heads"])
def test_a_change_of_basis_changes_nothing(family, name):
    model = tiny(family)
    layer, u = attention_layer(model, 1), stream(model, 7)
    ids = torch.randint(WORDS, (1, 7), generator=torch.Generator().manual_seed(0))
    with Exact(), torch.no_grad():
        before = model(ids).logits, layer.mean_jacobian(u), *layer.logabsdet(u)
        parameters = [parameter.clone() for parameter in model.parameters()]
        change(name, model, layer)
        moved = zip(parameters, model.parameters(), strict=True)
        assert max(float((old - new).abs().max()) for old, new in moved) > 0.1
        after = model(ids).logits, layer.mean_jacobian(u), *layer.logabsdet(u)
    for one, other in zip(before, after, strict=True):
        assert (one - other).abs().max() < 1e-8


def test_the_head_alone_formula_does_change(family):
    """Control: the same change of basis, and the number that the package used to give."""
    model = tiny(family)
    layer, u = attention_layer(model, 1), stream(model, 7)
    with torch.no_grad():
        before = head_alone(layer, u)
        turn_values(layer)
        after = head_alone(layer, u)
    assert (after - before).abs().max() > 0.1
