"""The penalty from queries, keys and values against autograd, the density's attention and the language model."""

import math
from dataclasses import replace

import pytest
import torch

from probattn import CausalAttention, log_barrier
from probattn.distributions import LatentAttention
from probattn.embedding_prior import AttentionStage
from probattn.errors import InputError
from probattn.inference.claims.objective import log_joint
from probattn.models.language import LanguageConfig, LanguageModel
from probattn.penalty import attention_penalty, choose_positions
from support import attention_like, tokens

KINDS = ["logdet", "one_sided", "smooth", "spectral", "singular_value"]
BATCH, HEADS, LENGTH, RANK, DIM = 2, 4, 6, 3, 5
OUTPUT = 0.2 * tokens(6, DIM, HEADS * RANK)  # W_O
QUERY_MAP = tokens(7, HEADS * RANK, DIM)  # W_Q


def penalty_of(query, key, value, **options):
    maps = (part.to(torch.promote_types(query.dtype, torch.float32)) for part in (OUTPUT, QUERY_MAP))
    return attention_penalty(query, key, value, *maps, **options)


def heads(groups=HEADS, seen=LENGTH, size=0.8, dtype=torch.float64):
    """q, k, v; logits of a few units and blocks on both sides of the identity."""
    return (
        tokens(1, BATCH, HEADS, LENGTH, RANK, dtype=dtype),
        1.5 * tokens(2, BATCH, groups, seen, RANK, dtype=dtype),
        size * tokens(3, BATCH, groups, seen, RANK, dtype=dtype),
    )


def visible(causal="inclusive", window=None, seen=LENGTH):
    place = torch.arange(seen - LENGTH, seen)[:, None]
    token = torch.arange(seen)
    result = token <= place if causal == "inclusive" else token < place
    return result if window is None else result & (token > place - window)


def autograd_blocks(query, key, value, allowed, *, scale, softcap=None, bias=0.0):
    """d(q_i - attention(q_i))/dq_i with k and v fixed, one position and head at a time, (batch, H, T, r, r)."""
    share = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(share, dim=1) for part in (key, value))
    allowed = allowed.expand(*query.shape[:3], key.shape[2])
    bias = torch.as_tensor(bias, dtype=query.dtype).expand(allowed.shape)
    blocks = torch.empty(*query.shape, query.shape[-1], dtype=query.dtype)
    for index in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        row, head, place = index
        seen = allowed[row, head, place]
        k, v, shift = key[row, head, seen], value[row, head, seen], bias[row, head, place, seen]

        def residual(q, k=k, v=v, shift=shift):
            logits = scale * k @ q
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            return q - torch.softmax(logits + shift, 0) @ v

        blocks[row, head, place] = torch.autograd.functional.jacobian(residual, query[row, head, place])
    return blocks


def barrier_of(blocks, kind):
    """Each kind by its definition, from the blocks of the heads, I - dvbar/dq, put together through W_O and W_Q."""
    change = torch.eye(RANK) - blocks  # (batch, H, T, r, r)
    maps = OUTPUT.unflatten(1, (HEADS, RANK)), QUERY_MAP.unflatten(0, (HEADS, RANK))
    blocks = torch.eye(DIM) - torch.einsum("phv,bhtvr,hrq->btpq", maps[0], change, maps[1])
    literal = -torch.linalg.det(blocks).abs().log()
    if kind == "logdet":
        return literal
    if kind == "one_sided":
        return literal.relu()
    if kind == "smooth":
        return torch.nn.functional.softplus(literal, beta=10.0, threshold=1e3)
    if kind == "singular_value":
        return -torch.linalg.svdvals(blocks)[..., -1].clamp(max=1.0).log()
    eigenvalues = torch.linalg.eigvals(torch.eye(blocks.shape[-1]) - blocks)
    largest = torch.where(eigenvalues.imag.abs() < 1e-6, eigenvalues.real, -torch.inf).amax(-1)
    return -(1 - largest).clamp(0.0, 1.0).log()


class TestMapOfTheQuery:
    @pytest.mark.parametrize("kind", KINDS)
    def test_equals_the_jacobian_of_the_query(self, kind):
        parts = heads()
        blocks = autograd_blocks(*parts, visible(), scale=0.5)
        found = penalty_of(*parts, kind=kind, scale=0.5)
        expected = barrier_of(blocks, kind)
        assert found.values.shape == (BATCH, LENGTH)
        assert expected[expected.isfinite()].std() > 0.02
        torch.testing.assert_close(found.values, expected, rtol=1e-9, atol=1e-9)
        # A penalty of the strict mask, or of another scale, is another.
        for change in ({"causal": "strict"}, {"scale": 0.51}):
            other = penalty_of(*parts, kind=kind, **({"scale": 0.5} | change)).values
            assert ((other - expected).abs() > 1e-4).any()

    def test_margins_are_those_that_the_kind_guards(self):
        parts = heads()
        blocks = autograd_blocks(*parts, visible(), scale=RANK**-0.5)
        literal = barrier_of(blocks, "logdet")
        for kind in ("logdet", "one_sided", "smooth"):
            margins = penalty_of(*parts, kind=kind).margins
            torch.testing.assert_close(margins.abs(), (-literal).exp(), rtol=1e-9, atol=1e-9)
            assert not margins.requires_grad
        margins = penalty_of(*parts, kind="singular_value").margins
        smallest = barrier_of(blocks, "singular_value")
        torch.testing.assert_close(-margins.clamp(max=1).log(), smallest, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("kind", KINDS)
    def test_gradient(self, kind):
        parts = [part.requires_grad_() for part in heads(size=0.1)]

        def total(query, key, value):
            return penalty_of(query, key, value, kind=kind).total()

        assert torch.autograd.gradcheck(total, parts, fast_mode=True)

    def test_softcap(self):
        parts = heads()
        blocks = autograd_blocks(*parts, visible(), scale=1.0, softcap=1.5)
        found = penalty_of(*parts, kind="logdet", scale=1.0, softcap=1.5).values
        torch.testing.assert_close(found, barrier_of(blocks, "logdet"), rtol=1e-9, atol=1e-9)
        assert (penalty_of(*parts, kind="logdet", scale=1.0).values - found).abs().max() > 0.1

    def test_added_biases(self):
        parts = heads()
        bias = tokens(4, 1, HEADS, LENGTH, LENGTH)
        blocks = autograd_blocks(*parts, visible(), scale=0.5, bias=bias)
        found = penalty_of(*parts, kind="logdet", scale=0.5, mask=bias).values
        torch.testing.assert_close(found, barrier_of(blocks, "logdet"), rtol=1e-9, atol=1e-9)
        assert (penalty_of(*parts, kind="logdet", scale=0.5).values - found).abs().max() > 0.1

    def test_heads_that_share_keys_equal_repeated_keys(self):
        query, key, value = heads(groups=2)
        shared = penalty_of(query, key, value, kind="logdet")
        repeated = (part.repeat_interleave(2, dim=1) for part in (key, value))
        torch.testing.assert_close(shared.values, penalty_of(query, *repeated, kind="logdet").values)
        wrong = (part.repeat(1, 2, 1, 1) for part in (key, value))
        assert (shared.values - penalty_of(query, *wrong, kind="logdet").values).abs().max() > 0.1

    @pytest.mark.parametrize("causal", ["strict", "inclusive"])
    def test_a_window_equals_the_mask_of_it(self, causal):
        parts = heads()
        windowed = penalty_of(*parts, kind="logdet", causal=causal, window=3).values
        allowed = visible(causal, window=3)[None, None]
        masked = penalty_of(*parts, kind="logdet", causal=None, mask=allowed).values
        torch.testing.assert_close(windowed, masked, rtol=0, atol=1e-13)
        off_by_one = penalty_of(*parts, kind="logdet", causal=causal, window=4).values
        assert (windowed - off_by_one).abs().max() > 0.1

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_an_additive_mask_equals_the_boolean_one_whatever_its_lowest_number(self, dtype):
        parts = heads()
        allowed = tokens(5, BATCH, 1, LENGTH, LENGTH) > -0.3
        allowed[0, 0, 4] = False  # a row that sees nothing: equal numbers, however low, would be equal weights
        additive = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
        expected = penalty_of(*parts, kind="logdet", mask=allowed).values
        torch.testing.assert_close(penalty_of(*parts, kind="logdet", mask=additive).values, expected)
        assert float(expected[0, 4]) == 0
        infinite = additive.masked_fill(~allowed, -torch.inf)
        torch.testing.assert_close(penalty_of(*parts, kind="logdet", mask=infinite).values, expected)

    def test_cached_keys(self):
        query, key, value = heads(seen=LENGTH + 3)
        blocks = autograd_blocks(query, key, value, visible(seen=LENGTH + 3), scale=0.5)
        found = penalty_of(query, key, value, kind="logdet", scale=0.5).values
        torch.testing.assert_close(found, barrier_of(blocks, "logdet"), rtol=1e-9, atol=1e-9)

    def test_one_token_has_no_penalty_under_a_strict_mask(self):
        parts = [part[:, :, :1] for part in heads()]
        for causal in ("strict", "inclusive"):  # nothing seen, or one token: no variance
            found = penalty_of(*parts, kind="logdet", causal=causal)
            assert (found.values == 0).all()
            assert float(found.mean()) == 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_single(self, dtype):
        parts = heads(dtype=dtype)
        found = penalty_of(*parts, kind="logdet")
        wide = penalty_of(*(part.float() for part in parts), kind="logdet")
        assert found.values.dtype == torch.float32
        assert torch.equal(found.values, wide.values)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(penalty_of(*(part.float() for part in parts), kind="logdet").values, wide.values)
        leaf = parts[0].clone().requires_grad_()
        penalty_of(leaf, *parts[1:]).total().backward()
        assert leaf.grad.dtype == dtype


class TestTheDensity:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("heads", "rank", "dim", "value_dim"), [(1, 2, 5, 5), (2, 2, 5, 3), (3, 2, 4, 3)])
    def test_equals_the_barrier_of_the_density(self, kind, heads, rank, dim, value_dim):
        attention, u = attention_like(0, heads, rank, dim, value_dim, size=0.25), tokens(0, 3, 7, dim)

        def through(part):
            return u.unsqueeze(1) @ part.mT

        found = attention_penalty(
            through(attention.query), through(attention.key), through(attention.value),
            attention.output.movedim(0, 1).flatten(1), attention.query.flatten(0, 1), kind=kind, causal="strict",
        )  # fmt: skip
        expected = log_barrier(attention, u, kind)
        assert found.values.shape == (3, 7)
        assert expected[expected.isfinite()].std() > 0.05
        torch.testing.assert_close(found.values, expected, rtol=1e-10, atol=1e-10)
        # With the heads in another order in W_O alone, it would not.
        if heads > 1:
            turned = attention_penalty(
                through(attention.query), through(attention.key), through(attention.value),
                attention.output.flip(0).movedim(0, 1).flatten(1), attention.query.flatten(0, 1), kind=kind,
                causal="strict",
            )  # fmt: skip
            assert (turned.values - expected).abs().max() > 1e-3


class TestPadding:
    def test_is_left_out_of_sum_and_count(self):
        parts = heads()
        padding = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        padding[0, 4:] = False
        found = penalty_of(*parts, kind="logdet", padding=padding)
        whole = penalty_of(*parts, kind="logdet")
        assert int(found.tokens) == BATCH * LENGTH - 2
        expected = (whole.values * padding).sum()
        torch.testing.assert_close(found.total(), expected)
        torch.testing.assert_close(found.mean(), expected / (BATCH * LENGTH - 2))
        assert (whole.total() - expected).abs() > 0.1

    def test_what_stands_there_does_not_matter(self):
        query, key, value = heads()
        padding = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        padding[1, :2] = False
        allowed = visible() & padding[:, None, None]
        results = []
        for filling in (0.0, 10.0):
            parts = [
                part.masked_fill(~padding[:, None, :, None], filling).requires_grad_() for part in (query, key, value)
            ]
            total = penalty_of(*parts, kind="logdet", causal=None, mask=allowed, padding=padding).total()
            results.append((total, *torch.autograd.grad(total, parts)))
        for first, second in zip(*results, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)

    def test_a_batch_of_nothing_else_is_refused(self):
        with pytest.raises(InputError, match=r"padding of shape \(2, 6\) has no token in it; drop batches"):
            penalty_of(*heads(), padding=torch.zeros(BATCH, LENGTH, dtype=torch.bool))


class TestRandomPositions:
    def test_the_sum_is_unbiased(self):
        parts = heads()
        padding = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        padding[0, 4:] = False
        full = float(penalty_of(*parts, kind="logdet", padding=padding).total())
        torch.manual_seed(0)
        draws = []
        for _ in range(1500):
            found = penalty_of(*parts, kind="logdet", padding=padding, share=0.34)
            assert found.values.shape == (BATCH, 2)
            draws.append(found.total())
        draws = torch.stack(draws)

        def errors(sample):
            return abs(float(sample.mean()) - full) / float(sample.std() / len(sample) ** 0.5)

        assert errors(draws) < 4
        assert errors(draws / 3) > 4  # without the scaling by T / P

    def test_they_are_the_same_numbers_at_those_positions(self):
        parts = heads(groups=2)
        allowed = tokens(5, BATCH, HEADS, LENGTH, LENGTH) > -0.3
        options = {"kind": "logdet", "mask": allowed, "window": 4}
        whole = penalty_of(*parts, **options)
        some = penalty_of(*parts, **options, positions=torch.tensor([1, 4]))
        torch.testing.assert_close(some.values, whole.values[:, [1, 4]], rtol=0, atol=1e-13)
        assert some.length == LENGTH

    def test_every_position_has_the_same_chance(self):
        torch.manual_seed(0)
        drawn = torch.stack([choose_positions(10, 0.3) for _ in range(3000)])
        assert drawn.shape == (3000, 3)
        assert (drawn.diff(dim=1) > 0).all()
        expected, deviation = 900, (3000 * 0.3 * 0.7) ** 0.5
        assert (torch.bincount(drawn.flatten(), minlength=10) - expected).abs().max() < 4 * deviation

    def test_all_positions_draw_nothing(self):
        state = torch.get_rng_state()
        assert choose_positions(5, 1.0).tolist() == [0, 1, 2, 3, 4]
        assert torch.equal(torch.get_rng_state(), state)
        assert choose_positions(5, 0.01).shape == (1,)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"kind": "log"}, "kind is 'log'; use one of 'logdet'"),
            ({"kind": "smooth", "sharpness": 0.0}, "sharpness is 0.0; it must be positive"),
            ({"causal": "future"}, "mask is 'future'; use one of 'strict', 'inclusive'"),
            ({"share": 0.0}, r"share is 0.0; a share must lie in \(0, 1\]"),
            ({"share": 1.5}, "share is 1.5"),
            ({"positions": 0.5}, "positions is a float; it must be a tensor"),
            ({"positions": torch.tensor([1]), "share": 0.5}, "positions are given and share is 0.5; pass one"),
            ({"positions": torch.tensor([0.5])}, r"shape \(1,\) and is torch.float32; it must hold indices.*is share"),
            ({"positions": torch.tensor([True])}, "is torch.bool; it must hold indices"),
            ({"positions": torch.tensor(1)}, r"shape \(\) and is torch.int64"),
            ({"positions": torch.tensor([], dtype=torch.long)}, r"shape \(0,\) and is torch.int64"),
            ({"positions": torch.tensor([2, 2])}, "positions are 2, 2; they must rise within 0..5"),
            ({"positions": torch.tensor([-1, 2])}, "must rise within 0..5"),
            ({"positions": torch.tensor([2, 6])}, "must rise within 0..5"),
            ({"mask": [[True]]}, "mask is a list of length 1; it must be a tensor"),
            ({"padding": [True]}, "padding is a list of length 1; it must be a tensor"),
            ({"mask": torch.ones(2, 6, 6, dtype=torch.bool)}, r"mask has shape \(2, 6, 6\).*\(2, 4, 6, 6\)"),
            ({"mask": torch.ones(3, 1, 6, 6, dtype=torch.bool)}, r"mask has shape \(3, 1, 6, 6\)"),
            ({"padding": torch.ones(BATCH, 5)}, r"padding has shape \(2, 5\); it must be \(2, 6\)"),
        ],
    )  # fmt: skip
    def test_options(self, change, message):
        with pytest.raises(InputError, match=message):
            penalty_of(*heads(), **change)

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            (((2, 6, 3), (2, 4, 6, 3), (2, 4, 6, 3)), r"query has shape \(2, 6, 3\); it must have four axes"),
            (((2, 4, 6, 3), (2, 4, 6, 3), (2, 4, 5, 3)), r"value has 5 in its tokens axis \(-2\) where 6"),
            (((2, 4, 6, 3), (2, 4, 6, 3), (2, 2, 6, 3)), r"value has 2 in its heads axis \(-3\) where 4"),
            (((2, 4, 6, 3), (2, 4, 6, 3), (1, 4, 6, 3)), r"value has 1 in its batch axis \(-4\) where 2"),
            (((2, 4, 6, 3), (1, 4, 6, 3), (1, 4, 6, 3)), r"key has 1 in its batch axis \(-4\) where 2"),
            (((2, 4, 6, 3), (2, 4, 6, 2), (2, 4, 6, 2)), r"key has 2 in its rank axis \(-1\) where 3"),
            (((2, 4, 6, 3), (2, 4, 5, 3), (2, 4, 5, 3)), "4 heads of 6 tokens and key 4 of 5; .* without its key"),
            (((2, 4, 6, 3), (2, 3, 6, 3), (2, 3, 6, 3)), "heads of the keys must divide"),
            (((0, 4, 6, 3), (0, 4, 6, 3), (0, 4, 6, 3)), r"query has shape \(0, 4, 6, 3\); .* none of them empty"),
        ],
    )
    def test_shapes(self, shapes, message):
        with pytest.raises(InputError, match=message):
            penalty_of(*(torch.zeros(shape) for shape in shapes))

    @pytest.mark.parametrize(
        ("output", "query_map", "message"),
        [
            (torch.ones(5, 11), torch.ones(12, 5), r"output has shape \(5, 11\).*\(p, 12\)"),
            (torch.ones(5, 12), torch.ones(12, 4), r"query_map \(12, 4\)"),
            (None, torch.ones(12, 5), "output is a NoneType; it must be a tensor"),
        ],
    )
    def test_maps(self, output, query_map, message):
        with pytest.raises(InputError, match=message):
            attention_penalty(*heads(), output, query_map)


def test_a_change_of_basis_inside_a_head_changes_nothing():
    query, key, value = heads()
    found = penalty_of(query, key, value, kind="logdet").values
    turn = torch.linalg.qr(tokens(8, RANK, RANK))[0]
    turned = OUTPUT.unflatten(1, (HEADS, RANK)) @ turn.mT
    values = attention_penalty(query, key, value @ turn.mT, turned.flatten(1), QUERY_MAP, kind="logdet").values
    torch.testing.assert_close(values, found, rtol=1e-10, atol=1e-10)
    # Control: the block of a head alone, I - c Cov, where the values stay in another basis.
    apart = attention_penalty(query, key, value @ turn.mT, OUTPUT, QUERY_MAP, kind="logdet").values
    assert (apart - found).abs().max() > 0.1


def stage_like(dim=5, **options):
    torch.manual_seed(3)
    return AttentionStage(dim, heads=2, rank=2, **options).double()


class TestStage:
    @pytest.mark.parametrize("mask", ["strict", "inclusive"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_margin_prior_is_the_barrier_of_its_attention(self, mask, kind):
        stage, u = stage_like(mask=mask), tokens(0, 3, 6, 5)
        found = stage.penalty(u, kind)
        expected = log_barrier(stage.attention(), u, kind)
        torch.testing.assert_close(found.values, expected, rtol=1e-10, atol=1e-10)
        grads = torch.autograd.grad(found.total(), list(stage.parameters()))
        others = torch.autograd.grad(log_barrier(stage.attention(), u, kind).sum(), list(stage.parameters()))
        for mine, other in zip(grads, others, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("mask", ["strict", "inclusive"])
    def test_the_full_prior_with_the_literal_barrier_is_minus_the_log_density(self, mask):
        stage, u = stage_like(prior="full", noise_scale=0.7, mask=mask), tokens(0, 3, 6, 5)
        attention = CausalAttention(stage.query, stage.key, mask=mask)
        density = LatentAttention(attention, 0.7, 6).log_prob(u)
        torch.testing.assert_close(stage.penalty(u, "logdet").values.sum(1), -density, rtol=1e-10, atol=1e-10)
        assert (stage_like(prior="full", mask=mask).penalty(u, "logdet").values.sum(1) + density).abs().min() > 0.1

    def test_padding_is_not_seen(self):
        stage, u = stage_like(), tokens(0, 2, 6, 5)
        padding = torch.ones(2, 6, dtype=torch.bool)
        padding[0, :2] = padding[1, 4:] = False
        found = stage.penalty(u, "logdet", padding=padding)
        for row, kept in zip(range(2), padding, strict=True):
            alone = stage.penalty(u[row][kept][None], "logdet").values
            torch.testing.assert_close(found.values[row, kept], alone[0], rtol=0, atol=1e-12)
        assert int(found.tokens) == 8

    @pytest.mark.parametrize("padded", [False, True])
    def test_normalised_it_does_not_depend_on_the_size_of_the_embeddings(self, padded):
        u = tokens(0, 2, 6, 5)
        padding = torch.ones(2, 6, dtype=torch.bool)
        padding[0, 4:] = not padded
        options = {"kind": "logdet", "padding": padding if padded else None}
        stage = stage_like(normalise=True)
        found = stage.penalty(u, **options)
        torch.testing.assert_close(stage.penalty(3.7 * u, **options).values, found.values, rtol=1e-10, atol=1e-12)
        plain = stage_like()
        assert (plain.penalty(3.7 * u, **options).values - plain.penalty(u, **options).values).abs().max() > 0.1
        if padded:  # nor on what stands on padding
            other = torch.where(padding.unsqueeze(-1), u, 100.0)
            torch.testing.assert_close(stage.penalty(other, **options).total(), found.total(), rtol=1e-10, atol=1e-12)
            alone = stage.penalty(u[:1, :4], "logdet").values
            torch.testing.assert_close(found.values[:1, :4], alone, rtol=1e-10, atol=1e-12)

    def test_half_precision_embeddings(self):
        torch.manual_seed(3)
        stage, u = AttentionStage(5, rank=2), tokens(0, 2, 6, 5, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            found = stage.penalty(u, "logdet").values
        assert found.dtype == torch.float32
        assert torch.equal(found, stage.penalty(u.float(), "logdet").values)

    def test_bad_input(self):
        for options, message in [
            ({"prior": "half"}, "prior is 'half'; use one of 'full', 'margin'"),
            ({"mask": "none"}, "mask is 'none'"),
            ({"heads": 0}, "heads is 0; it must be at least 1"),
            ({"noise_scale": math.inf}, "noise_scale is inf; it must be positive"),
        ]:
            with pytest.raises(InputError, match=message):
                AttentionStage(4, **options)
        padding = torch.tensor([[True, False]])
        with pytest.raises(InputError, match="without padding; use prior='margin'"):
            AttentionStage(4, prior="full").penalty(torch.ones(1, 2, 4), padding=padding)
        with pytest.raises(InputError, match="without padding; use mask='strict'"):
            AttentionStage(4, mask="inclusive").penalty(torch.ones(1, 2, 4), padding=padding)


class TestTheSameObjective:
    """Minus the log joint of the Pyro language model is CE + lambda penalty, per token, value and gradient."""

    def language(self, **options):
        config = LanguageConfig(11, context=8, dim=6, layers=1, decoder_heads=2, stage_heads=2, stage_rank=2)
        return replace(config, **options)

    def batch(self):
        drawn = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(5))
        return drawn[:, :-1], drawn[:, 1:]

    def of_pyro(self, config):
        """-log joint without the priors of the parameters, per token, and its gradient."""
        model = LanguageModel(config).double()
        values = {name: value.double() for name, value in model.initial_values(1).items()}
        values["query"], values["key"] = 2 * values["query"], 2 * values["key"]  # attention that is not uniform
        values = {name: value.requires_grad_() for name, value in values.items()}
        inputs, targets = self.batch()
        joint = log_joint(model, values, inputs, targets, len(inputs))
        priors = sum(law.log_prob(values[name]) for name, law in model.parameter_priors().items())
        return model, values, (priors - joint) / inputs.numel()

    def of_stage(self, model, values, kind, **options):
        config = model.config
        inputs, targets = self.batch()
        u = model.embed(values, inputs)
        loss = torch.nn.functional.cross_entropy(model.decode(values, u).flatten(0, 1), targets.flatten())
        stage = AttentionStage(config.dim, config.stage_heads, config.stage_rank, prior=config.prior, **options)
        # Through the sites themselves, so that one gradient can be compared with the other.
        del stage.query, stage.key
        stage.query, stage.key = values["query"], values["key"]
        return loss + config.weight * stage.penalty(u, kind).mean()

    @pytest.mark.parametrize("kind", ["logdet", "one_sided"])
    @pytest.mark.parametrize("prior", ["full", "margin"])
    def test_value_and_gradient(self, prior, kind):
        model, values, expected = self.of_pyro(self.language(prior=prior, kind=kind))
        found = self.of_stage(model, values, kind)
        slopes = [torch.autograd.grad(part, list(values.values())) for part in (found, expected)]
        whole = [torch.cat([slope.flatten() for slope in part]) for part in slopes]
        assert abs(found.item() / expected.item() - 1) < 1e-10
        assert float((whole[0] - whole[1]).norm() / whole[1].norm()) < 1e-10

    @pytest.mark.parametrize("prior", ["full", "margin"])
    def test_another_mask_or_kind_is_another_objective(self, prior):
        model, values, expected = self.of_pyro(self.language(prior=prior))
        for kind, mask in (("one_sided", "strict"), ("logdet", "inclusive")):
            assert abs(self.of_stage(model, values, kind, mask=mask).item() / expected.item() - 1) > 1e-6
