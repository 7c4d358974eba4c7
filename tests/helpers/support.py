"""Shared by the tests: random attentions and dense references."""

import torch

from probattn import CausalAttention


def attention_like(
    seed, heads=1, rank=2, dim=3, value_dim=None, mask="strict", size=1.0, dtype=torch.float64, batch=()
):
    """A random attention; ``size`` scales the query, and with it the logits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*batch, *shape, generator=generator, dtype=torch.float64).to(dtype)

    value = output = None
    if value_dim is not None:
        value, output = normal(heads, value_dim, dim), normal(heads, dim, value_dim) / heads
    return CausalAttention(
        size * normal(heads, rank, dim), normal(heads, rank, dim), value, output, mask=mask, start=normal(dim)
    )


def tokens(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1000), dtype=torch.float64).to(dtype)


def dense(attention, u):
    """de/du of one sequence by automatic differentiation, (T, T, p, p)."""
    return torch.autograd.functional.jacobian(attention.residual, u).movedim(2, 1)


def dense_blocks(attention, u):
    return torch.stack([dense(attention, u)[i, i] for i in range(len(u))])


def loop_mean(attention, u):
    """The attention mean written as in a textbook, one token and one head at a time."""
    means = []
    for i in range(len(u)):
        seen = u[: i + 1] if attention.mask == "inclusive" else u[:i]
        if len(seen) == 0:
            means.append(attention.start)
            continue
        mean = torch.zeros_like(u[i])
        for h in range(attention.heads):
            query = attention.query[h] @ u[i]
            logits = torch.stack([attention.scale * (query @ (attention.key[h] @ s)) for s in seen])
            weights = logits.softmax(0)
            mean = mean + attention.output[h] @ sum(
                w * (attention.value[h] @ s) for w, s in zip(weights, seen, strict=True)
            )
        means.append(mean)
    return torch.stack(means)
