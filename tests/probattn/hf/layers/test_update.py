import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_zoo import FAMILIES, Exact, own_blocks, own_mean, stream, sublayer_modules, tiny

from probattn.errors import InputError
from probattn.hf import attention_layer
from probattn.hf.layers.update import (
    QueryUpdate,
    logit_change,
    query_update,
    relative_size,
    updated,
    updated_residual,
)
from probattn.hf.layers.volume import VolumeMemory, log_volume

LENGTH = 6


def layer_of(family="llama", dtype=torch.float64):
    model = tiny(family, dtype=dtype)
    return model, attention_layer(model, 1, check=False).detach()


def drawn(layer, heads=(1,), rank=1, batch=(), seed=0, size=0.5):
    generator = torch.Generator().manual_seed(seed)
    rows, dim = layer.sublayer.query.weight.shape[1:]
    down = torch.randn(*batch, len(heads), rank, dim, generator=generator, dtype=torch.float64)
    up = torch.randn(*batch, len(heads), rows, rank, generator=generator, dtype=torch.float64)
    return query_update(layer, heads, (size * down).to(layer.dtype), (size * up).to(layer.dtype))


def blocks_of_mean(layer, u):
    whole = torch.autograd.functional.jacobian(layer.mean, u)
    return torch.stack([whole[i, :, i] for i in range(len(u))])


class TestLayer:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_blocks_are_derivatives_of_the_changed_mean(self, family):
        model, layer = layer_of(family)
        u = stream(model, LENGTH)
        changed = updated(layer.scaled(0.8), drawn(layer, rank=2))
        expected = blocks_of_mean(changed, u)
        torch.testing.assert_close(changed.mean_jacobian(u), expected, rtol=1e-9, atol=1e-10)
        sign, value = torch.linalg.slogdet(torch.eye(16).double() - expected)
        torch.testing.assert_close(changed.logabsdet(u), (sign, value), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(changed.context(u[:-1]).mean(u[-1]), changed.mean(u)[-1])
        assert (expected - layer.scaled(0.8).mean_jacobian(u)).abs().max() > 0.01

    @pytest.mark.parametrize("family", ["llama", "llama yarn", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
    def test_a_model_with_really_changed_weights_computes_the_same(self, family):
        model, layer = layer_of(family)
        u, update = stream(model, LENGTH), drawn(layer, heads=(0, 3), rank=2)
        twin = copy.deepcopy(model)
        _, attention = sublayer_modules(twin, 1)
        attention = getattr(twin.base_model.layers[1], "self_attn", attention)
        size = update.up.shape[-2]
        for head, product in zip(update.heads, update.product, strict=True):
            attention.q_proj.weight.data[head * size : (head + 1) * size] += product
        changed = updated(layer, update)
        with Exact():
            torch.testing.assert_close(changed.mean(u), own_mean(twin, 1, u), rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(changed.mean_jacobian(u), own_blocks(twin, 1, u), rtol=1e-8, atol=1e-8)
            assert (changed.mean(u) - own_mean(model, 1, u)).abs().max() > 0.01

    def test_no_change_is_the_layer_to_the_bit(self):
        model, layer = layer_of()
        u, update = stream(model, LENGTH), drawn(layer)
        for zero in (update._replace(up=torch.zeros_like(update.up)), update._replace(down=0 * update.down)):
            assert torch.equal(updated(layer, zero).mean(u), layer.mean(u))
            assert torch.equal(updated(layer, zero).mean_jacobian(u), layer.mean_jacobian(u))

    def test_a_shared_key_changes_one_head_only(self):
        model, layer = layer_of()  # heads 0 and 1 share a key
        u = stream(model, LENGTH)
        changed = updated(layer, drawn(layer, heads=(1,)))
        others = torch.tensor([1.0, 0.0, 1.0, 1.0]).double()
        assert torch.equal(changed.scaled(others).mean(u), layer.scaled(others).mean(u))
        assert (changed.scaled(1 - others).mean(u) - layer.scaled(1 - others).mean(u)).abs().max() > 0.01

    def test_the_product_changes_by_the_rank_at_every_relative_position(self):
        _, layer = layer_of()
        update, sublayer = drawn(layer, heads=(2,), rank=2), layer.sublayer
        places = torch.arange(5).unsqueeze(0)
        cos, sin = sublayer.rotary(places, torch.zeros(1, 5, 16).double())
        changed = updated(layer, update).sublayer.query.weight[2]
        for other in range(5):
            turn = rotation_matrix(cos[0, 0], sin[0, 0]).mT @ rotation_matrix(cos[0, other], sin[0, other])
            key = turn @ sublayer.key.weight[1]
            change = changed.mT @ key - sublayer.query.weight[2].mT @ key
            values = torch.linalg.svdvals(change)
            assert bool((values[:2] > 1e-3).all())
            assert bool((values[2:] < 1e-12).all())

    @settings(max_examples=10, deadline=None)
    @given(st.integers(0, 1000), st.integers(1, 3))
    def test_the_product_alone_counts(self, seed, rank):
        model, layer = layer_of()
        u, update = stream(model, LENGTH), drawn(layer, rank=rank, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        turn = torch.eye(rank).double() + 0.3 * torch.randn(rank, rank, generator=generator, dtype=torch.float64)
        turn = turn @ turn.mT + torch.eye(rank).double()
        same = update._replace(down=turn @ update.down, up=update.up @ torch.linalg.inv(turn))
        torch.testing.assert_close(updated(layer, same).mean(u), updated(layer, update).mean(u))
        torch.testing.assert_close(relative_size(layer, same), relative_size(layer, update))
        one, other = (logit_change(layer, part, u.unsqueeze(0)) for part in (same, update))
        torch.testing.assert_close(one, other)

    def test_half_precision_parameters_are_changed_in_the_precision_of_the_layer(self):
        model = tiny("llama", dtype=torch.bfloat16)
        layer = attention_layer(model, 1, dtype=torch.float64, check=False)
        update = drawn(layer, size=1e-3)  # lost in bfloat16
        weight = updated(layer, update).sublayer.query.weight
        torch.testing.assert_close(weight[1] - layer.sublayer.query.weight[1], update.product[0])

    def test_gradients_reach_parameters_that_are_attached(self):
        model = tiny("llama")
        layer, u = attention_layer(model, 1, check=False), stream(model, LENGTH)
        updated(layer, drawn(layer)).mean(u).sum().backward()
        assert sublayer_modules(model, 1)[1].q_proj.weight.grad is not None


class TestBatches:
    def test_residuals_are_those_of_single_updates(self):
        model, layer = layer_of("qwen3")
        u = stream(model, LENGTH, batch=(3,))
        update = drawn(layer, batch=(2, 1))
        factors = 1 + 0.1 * torch.arange(8).double().view(2, 1, 4)
        found = updated_residual(layer.scaled(factors), update, u)
        value = log_volume(layer.scaled(factors), u, update=update).value
        assert found.shape == (2, 3, LENGTH, 16)
        for k in range(2):
            one = updated(layer.scaled(factors[k, 0]), update.at(k))
            torch.testing.assert_close(found[k], one.residual(u))
            torch.testing.assert_close(value[k], one.logabsdet(u)[1].sum(-1))

    def test_each_sequence_may_have_its_own(self):
        model, layer = layer_of()
        u, update = stream(model, LENGTH, batch=(3, 2)), drawn(layer, batch=(2,))
        positions = torch.arange(LENGTH) + torch.tensor([[0], [2], [5]])
        shifted = layer.at(positions.unsqueeze(1))
        found = updated_residual(shifted, update, u)
        value = log_volume(shifted, u, update=update).value
        for row in range(3):
            for k in range(2):
                one = updated(layer.at(positions[row]), update.at(k))
                torch.testing.assert_close(found[row, k], one.residual(u[row, k]))
                torch.testing.assert_close(value[row, k], one.logabsdet(u[row, k])[1].sum(-1))

    def test_one_layer_takes_one_update(self):
        _, layer = layer_of()
        with pytest.raises(InputError, match="one change"):
            updated(layer, drawn(layer, batch=(2,)))


class TestVolume:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_value_and_gradient_agree_with_automatic_differentiation(self, family):
        model, layer = layer_of(family)
        u, rows, update = stream(model, LENGTH, batch=(2,)), torch.tensor([1, 4]), drawn(layer, heads=(0, 1), rank=2)
        gain = torch.linspace(0.5, 1.5, layer.heads).double()
        found, expected = [], []
        for way in (found, expected):
            leaves = [part.clone().requires_grad_() for part in (update.down, update.up, gain)]
            change, scaled = QueryUpdate((0, 1), *leaves[:2]), layer.scaled(leaves[2], 0.9)
            if way is found:
                value = log_volume(scaled, u, rows, update=change).value
            else:
                value = updated(scaled, change).logabsdet(u, rows)[1].sum(-1)
            weighted = (value * torch.tensor([1.0, 2.0]).double()).sum()
            way.extend([value.detach(), *torch.autograd.grad(weighted, leaves)])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
        assert float(found[1].abs().max()) > 1e-3

    def test_gradient_by_differences(self):
        model, layer = layer_of()
        u, update = stream(model, 4, batch=(2,)), drawn(layer)
        scaled, rows = layer.scaled(0.5), torch.tensor([1, 3])

        def volume(down, up):
            change = QueryUpdate((1,), down, up)
            return log_volume(scaled, u, rows, update=change).value, updated_residual(scaled, change, u)[0, 2, :3]

        parts = (update.down.clone().requires_grad_(), update.up.clone().requires_grad_())
        assert torch.autograd.gradcheck(volume, parts, eps=1e-6, atol=1e-6)

    def test_a_memory_answers_only_for_the_same_update(self):
        model, layer = layer_of()
        u, update, memory = stream(model, LENGTH), drawn(layer), VolumeMemory()
        scaled = layer.scaled(0.7)
        plain = log_volume(scaled, u, memory=memory).value
        first = log_volume(scaled, u, update=update, memory=memory).value
        other = log_volume(scaled, u, update=update._replace(heads=(2,)), memory=memory).value
        again = log_volume(scaled, u, update=update, memory=memory).value
        assert torch.equal(first, again)
        assert torch.equal(plain, log_volume(scaled, u, memory=memory).value)
        assert len({float(plain), float(first), float(other)}) == 3

    def test_single_precision(self):
        model, layer = layer_of(dtype=torch.float32)
        u, update = stream(model, LENGTH), drawn(layer)
        found = log_volume(layer.scaled(0.8), u, update=update).value
        wide = QueryUpdate(update.heads, update.down.double(), update.up.double())
        expected = log_volume(layer.to(torch.float64).scaled(0.8), u.double(), update=wide).value
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


class TestSizes:
    @pytest.mark.parametrize("rank", [1, 3])
    def test_norms_are_those_of_dense_products(self, rank):
        _, layer = layer_of()
        update, sublayer = drawn(layer, heads=(0, 3), rank=rank), layer.sublayer
        found = relative_size(layer, update)
        for place, head in enumerate(update.heads):
            key = sublayer.key.weight[head // 2]
            change, trained = update.product[place].mT @ key, sublayer.query.weight[head].mT @ key
            torch.testing.assert_close(found.frobenius[place], change.norm() / trained.norm())
            one, other = (torch.linalg.matrix_norm(part, 2) for part in (change, trained))
            torch.testing.assert_close(found.spectral[place], one / other)

    @pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2"])
    def test_change_of_logits_by_hand(self, family):
        model, layer = layer_of(family)
        u, update = stream(model, LENGTH, batch=(2,)), drawn(layer, heads=(1, 3), batch=(2,))
        found = logit_change(layer, update, u, given=1)
        window = layer.sublayer.window or LENGTH
        for k in range(2):
            before, after = logits(layer, u), logits(updated(layer, update.at(k)), u)
            for place, head in enumerate(update.heads):
                change, squares = (after - before)[:, head], []
                for i in range(1, LENGTH):
                    part = change[:, i, max(0, i + 1 - window) : i + 1]
                    squares.append((part - part.mean(-1, keepdim=True)).square().flatten())
                torch.testing.assert_close(found[k, place], torch.cat(squares).mean().sqrt())


class TestRefusals:
    @pytest.mark.parametrize(
        ("heads", "down", "up", "words"),
        [
            ((), (1, 1, 16), (1, 4, 1), "at least one"),
            ((4,), (1, 1, 16), (1, 4, 1), "from 0 to 3"),
            ((1, 0), (2, 1, 16), (2, 4, 1), "increasing"),
            ((1,), (1, 2, 16), (1, 4, 1), "with R at least 1"),
            ((1,), (1, 16), (1, 4, 1), "with R at least 1"),
            ((1,), (1, 1, 15), (1, 4, 1), "n, r, p are 1, 4, 16"),
            ((1,), (1, 1, 16), (1, 5, 1), "n, r, p are 1, 4, 16"),
            ((1,), (2, 1, 1, 16), (3, 1, 4, 1), "must broadcast"),
        ],
    )
    def test_shapes_that_do_not_fit(self, heads, down, up, words):
        _, layer = layer_of()
        with pytest.raises(InputError, match=words):
            query_update(layer, heads, torch.zeros(down).double(), torch.zeros(up).double())

    def test_another_precision(self):
        _, layer = layer_of()
        with pytest.raises(InputError, match="float32"):
            query_update(layer, [0], torch.zeros(1, 1, 16), torch.zeros(1, 4, 1).double())


def rotation_matrix(cos, sin):
    """R as a matrix, by what it does to the axes."""
    half = len(cos) // 2
    eye = torch.eye(len(cos)).double()
    turned = torch.cat([-eye[:, half:], eye[:, :half]], -1)
    return (eye * cos + turned * sin).mT


def logits(layer, u):
    """Logits before a cap, (N, H, T, T)."""
    from probattn.hf.layers.sublayer import project

    tokens = project(layer.sublayer, u, torch.arange(u.shape[1]).unsqueeze(0))
    scores = tokens.query.transpose(2, 3) @ tokens.key.unsqueeze(2).mT  # (N, K, g, T, T)
    return layer.sublayer.scale * scores.flatten(1, 2)
