"""The ordinary transformer: what it may see, its heads against a loop, and where its randomness comes from."""

import math
from dataclasses import replace

import pytest
import torch

from probattn.errors import InputError
from probattn.models.gpt import CharacterGPT, GPTConfig

CONFIG = GPTConfig(11, context=9, dim=8, layers=2, heads=2)


@pytest.fixture(scope="module")
def model():
    return CharacterGPT(CONFIG, 3)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0))


def test_no_position_sees_the_future(model, tokens):
    logits = model(tokens)
    for i in range(8):
        changed = tokens.clone()
        changed[:, i + 1 :] = (changed[:, i + 1 :] + 1) % 11
        torch.testing.assert_close(model(changed)[:, : i + 1], logits[:, : i + 1])
    assert not torch.allclose(model((tokens + 1) % 11)[:, -1], logits[:, -1])


def test_a_shorter_window_gives_the_beginning(model, tokens):
    torch.testing.assert_close(model(tokens[:, :5]), model(tokens)[:, :5])


def test_tokens_embeddings_and_heads_give_the_same_logits(model, tokens):
    u = model.embed(tokens)
    torch.testing.assert_close(u, model.table[tokens] + model.positions)
    logits, heads = model.forward_with_heads(u)
    assert model(u=u).equal(logits)
    assert model(tokens).equal(logits)
    assert [[tuple(part.shape) for part in layer] for layer in heads] == [[(4, 2, 9, 4)] * 3] * 2


def test_the_first_layer_against_a_loop(model, tokens):
    """Its attention from the returned heads, one position and head at a time, and the rest of the layer by hand."""
    block, x = model.blocks[0], model.embed(tokens)
    after, heads = block(x)
    mean = torch.zeros(4, 9, 8)
    for n in range(4):
        for h in range(2):
            for i in range(9):
                past = heads.key[n, h, : i + 1] @ heads.query[n, h, i] / math.sqrt(4)
                mean[n, i, 4 * h : 4 * h + 4] = past.softmax(0) @ heads.value[n, h, : i + 1]
    middle = x + block.output(mean)
    first, _, second = block.perceptron
    hidden = first(block.perceptron_norm(middle))
    gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    torch.testing.assert_close(after, middle + second(gelu), atol=1e-5, rtol=1e-5)


def test_a_gradient_on_its_heads_reaches_every_parameter_below(model, tokens):
    _, heads = model.forward_with_heads(model.embed(tokens))
    sum(part.square().mean() for layer in heads for part in layer).backward()
    assert float(model.table.grad.abs().max()) > 0
    assert float(model.blocks[1].projections.weight.grad.abs().max()) > 0
    assert model.readout.weight.grad is None
    model.zero_grad()


def test_the_seed_alone_decides(tokens):
    before = torch.random.get_rng_state()
    first, second, other = CharacterGPT(CONFIG, 1), CharacterGPT(CONFIG, 1), CharacterGPT(CONFIG, 2)
    assert torch.random.get_rng_state().equal(before)
    assert first(tokens).equal(second(tokens))
    assert not torch.allclose(first(tokens), other(tokens))


def test_learning_a_text_by_heart():
    model, tokens = CharacterGPT(CONFIG), torch.arange(10).view(1, 10)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.1


class TestBounded:
    """A model whose own attention has a memory radius, and a contraction below one."""

    LIMITED = replace(CONFIG, memory_radius=3.0, contraction=0.9)

    @torch.no_grad()
    def test_a_layer_adds_the_mean_of_its_attention(self):
        model = CharacterGPT(self.LIMITED, 3).double()
        x = 2 * torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        block, attention = model.blocks[0], model.attentions()[0]
        middle = x + attention.mean(x) + block.output.bias
        torch.testing.assert_close(block(x)[0], middle + block.perceptron(block.perceptron_norm(middle)))
        free = CharacterGPT(replace(CONFIG, memory_radius=3.0), 3).double()
        assert float((free.blocks[0](x)[0] - block(x)[0]).abs().max()) > 0.01  # the limit is felt
        middle = x + free.attentions()[0].mean(x) + free.blocks[0].output.bias
        torch.testing.assert_close(free.blocks[0](x)[0], middle + block.perceptron(block.perceptron_norm(middle)))

    def test_every_layer_is_a_contraction_also_after_training_and_on_huge_streams(self, tokens):
        model = CharacterGPT(self.LIMITED)
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(10):
            loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        for attention in model.double().attentions():
            assert float(attention.contraction.detach()) < 0.9
            x = 1e4 * torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            assert float(torch.linalg.matrix_norm(attention.detach().mean_jacobian(x), 2).max()) < 0.9

    def test_without_the_limit_the_same_weights_are_none(self):
        model = CharacterGPT(replace(CONFIG, memory_radius=3.0))
        assert all(float(attention.contraction.detach()) > 1 for attention in model.attentions())

    def test_no_position_sees_the_future(self, tokens):
        model = CharacterGPT(self.LIMITED)
        changed = tokens.clone()
        changed[:, 5:] = (changed[:, 5:] + 1) % 11
        torch.testing.assert_close(model(changed)[:, :5], model(tokens)[:, :5])

    def test_a_model_without_a_radius_has_no_such_attention(self, model):
        with pytest.raises(InputError, match="memory_radius"):
            model.attentions()


class TestErrors:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"memory_radius": 0.0}, "memory_radius"),
            ({"contraction": 0.5}, "needs memory_radius"),
            ({"memory_radius": 1.0, "contraction": 1.5}, "contraction is 1.5"),
        ],
    )
    def test_bounds_that_do_not_exist(self, fields, message):
        with pytest.raises(InputError, match=message):
            replace(CONFIG, **fields)

    @pytest.mark.parametrize("fields", [{"dim": 0}, {"dim": 6, "heads": 4}, {"vocabulary": 0}])
    def test_sizes(self, fields):
        with pytest.raises(InputError, match=next(iter(fields))):
            GPTConfig(**{"vocabulary": 5, **fields})

    def test_windows_that_do_not_fit(self, model):
        with pytest.raises(InputError, match=r"\(2, 10\)"):
            model(torch.zeros(2, 10, dtype=torch.long))
        with pytest.raises(InputError, match=r"\(3,\)"):
            model(torch.zeros(3, dtype=torch.long))

    def test_both_or_neither(self, model, tokens):
        with pytest.raises(InputError, match="either"):
            model()
        with pytest.raises(InputError, match="either"):
            model(tokens, u=model.embed(tokens))
