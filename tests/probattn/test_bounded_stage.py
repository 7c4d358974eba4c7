"""The stage on embeddings with a memory radius: its penalty is that of its attention, and has a floor."""

import math

import pytest
import torch

from probattn.barrier import log_barrier
from probattn.embedding_prior import AttentionStage
from probattn.errors import InputError
from support import tokens

BOUNDED = {"memory_radius": 1.5, "contraction": 0.9}


def stage_like(dim=5, **options):
    torch.manual_seed(3)
    return AttentionStage(dim, heads=2, rank=2, **options).double()


@pytest.mark.parametrize("mask", ["strict", "inclusive"])
@pytest.mark.parametrize("options", [BOUNDED, {"memory_radius": 1.5}])
def test_the_penalty_is_the_barrier_of_the_bounded_attention(mask, options):
    stage, u = stage_like(mask=mask, **options), 3 * tokens(0, 3, 6, 5)
    found = stage.penalty(u, "logdet")
    expected = log_barrier(stage.attention(), u)
    torch.testing.assert_close(found.values.flatten(), expected.flatten(), rtol=1e-9, atol=1e-10)
    assert (expected - log_barrier(stage_like(mask=mask).attention(), u)).abs().max() > 1e-3
    grads = torch.autograd.grad(found.total(), list(stage.parameters()))
    others = torch.autograd.grad(log_barrier(stage.attention(), u).sum(), list(stage.parameters()))
    for mine, other in zip(grads, others, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9)


def train(stage, u, steps=120):
    u = u.clone().requires_grad_()
    optimizer = torch.optim.Adam([u, *stage.parameters()], 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        stage.penalty(u, "logdet").total().backward()
        optimizer.step()
    return stage.penalty(u, "logdet").values.detach()


def test_training_with_the_literal_barrier_stays_above_its_floor_and_runs_away_without_it():
    floor, u = -2 * math.log(1.9), tokens(1, 2, 16, 2)
    assert train(stage_like(2, **BOUNDED), u).min() >= floor
    assert train(stage_like(2), u).mean() < 2 * floor


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_radius": -1.0}, "memory_radius is -1.0"),
        ({"contraction": 0.5}, "without memory_radius"),
        ({"memory_radius": 1.0, "contraction": 2.0}, "contraction is 2.0"),
    ],
)
def test_stages_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        AttentionStage(4, **options)
