"""Minibatches and their gradients are functions of seed and step, whatever the cut into shards."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probattn.inference.methods import minibatch as module
from probattn.inference.methods.minibatch import minibatch, sharded_gradient

DATA = (torch.arange(11), torch.arange(22).view(11, 2))


@given(size=st.integers(1, 11), seed=st.integers(0, 2**31))
def test_an_epoch_repeats_nothing_and_epochs_differ(size, seed):
    steps = 11 // size
    first, second = (
        torch.cat([minibatch(DATA, size, epoch * steps + k, seed)[0] for k in range(steps)]) for epoch in (0, 1)
    )
    assert len(first) == steps * size
    assert len(set(first.tolist())) == len(first)
    assert len(set(second.tolist())) == len(second)
    if seed == 0:
        assert not torch.equal(first, second)


def test_minibatches_keep_what_belongs_together():
    one, other = minibatch(DATA, 4, 5, seed=3)
    assert torch.equal(DATA[1][one], other)
    assert torch.equal(minibatch(DATA, 4, 5, seed=3)[0], one)
    assert torch.equal(minibatch(DATA[:1], 4, 5, seed=3)[0], one)
    orders = {tuple(minibatch(DATA, 11, step, seed)[0].tolist()) for step in range(3) for seed in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_the_gradient_does_not_depend_on_the_shards(shards):
    """Mean of (w . x - 1)^2 over 5 sequences, where the loss of a part is that of the whole by the part's mean."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
    w.grad = torch.full_like(w, 7.0)  # left from before
    unused.grad = torch.full_like(unused, 7.0)

    def backward(part):
        loss = (part[0] @ w - 1).square().mean()
        loss.backward()
        return loss.detach()

    value = sharded_gradient(backward, [w, unused], (x,), shards, seed=0)
    residual = (x @ w - 1).detach()
    assert value == pytest.approx(float(residual.square().mean()), rel=1e-12)
    torch.testing.assert_close(w.grad, 2 * (residual[:, None] * x).mean(0))
    assert torch.equal(unused.grad, torch.zeros(2, dtype=torch.float64))


def test_each_shard_has_random_numbers_of_its_own():
    def numbers(seed, shards=2):
        seen = []

        def backward(part):
            seen.append(float(torch.rand(())))
            return 0.0

        sharded_gradient(backward, [], (torch.zeros(4, 1),), shards, seed)
        return seen

    before = torch.get_rng_state()
    assert numbers(1) == numbers(1)
    assert len({*numbers(1), *numbers(2)}) == 4
    assert numbers(1, shards=4)[:2] == numbers(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_processes_share_the_shards(monkeypatch):
    """What each of two processes computes, summed, is what one computes alone."""
    x = torch.arange(8, dtype=torch.float64)
    w = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def backward(part):
        loss = (w + part[0]).mean() * torch.rand(())
        loss.backward()
        return loss.detach()

    alone = sharded_gradient(backward, [w], (x,), 4, seed=5), float(w.grad)
    sums = []
    for rank in (0, 1):
        monkeypatch.setattr(module, "my_shards", lambda shards, rank=rank: range(rank, shards, 2))
        monkeypatch.setattr(module, "sum_over_processes", lambda tensors: sums.append([t.clone() for t in tensors]))
        sharded_gradient(backward, [w], (x,), 4, seed=5)
    assert [float(a + b) for a, b in zip(*sums, strict=True)] == pytest.approx(list(alone))
