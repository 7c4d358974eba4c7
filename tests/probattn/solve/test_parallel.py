"""Tokens solved for together are those solved for one by one; where that is not known the solver goes one by one."""

from dataclasses import replace

import pytest
import torch

from probattn import CausalAttention, LatentAttention
from probattn.errors import InputError, SeveralSolutionsError, SeveralSolutionsWarning
from probattn.solve import parallel as sweeps
from probattn.solve.bound import contraction_bound
from probattn.solve.context import Context
from probattn.solve.parallel import unique_prefix
from probattn.solve.sequence import find_sequence, solve_sequence
from probattn.solve.starts import hull_points, vertices
from support import attention_like, tokens


def repulsive(seed, heads=1, dim=3, value_dim=None, size=0.05, dtype=torch.float64, batch=()):
    """An attention whose paths stay small, so that long ones do not fold."""
    attention = attention_like(seed, heads, dim, dim, value_dim, size=size, dtype=dtype, batch=batch)
    if value_dim is None and heads > 1:
        share = torch.eye(dim, dtype=dtype).expand(heads, dim, dim)
        return CausalAttention(attention.query, attention.key, share / heads, share, start=attention.start)
    return attention


CASES = {
    "one head": (repulsive(0), (80, 3)),
    "heads": (repulsive(1, heads=3), (80, 3)),
    "value and output": (repulsive(2, heads=2, dim=4, value_dim=2), (2, 90, 4)),
    "one dimension": (repulsive(3, dim=1), (4, 100, 1)),
    "batch of attentions": (repulsive(4, heads=2, dim=2, value_dim=2, batch=(3, 1)), (2, 70, 2)),
    "never certified": (CausalAttention.from_qk_matrix(-2.0 * torch.eye(3, dtype=torch.float64)), (2, 120, 3)),
}


def prefix(attention, e):
    return unique_prefix(Context.of(attention, e[..., :0, :]), e)


def both(attention, e, selection="unique"):
    return [find_sequence(attention, e, selection, method) for method in ("parallel", "sequential")]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_methods_give_the_same_sequence(case, dtype):
    attention, shape = CASES[case]
    attention, e = attention.to(dtype), 0.5 * tokens(7, *shape, dtype=dtype)
    (together, none), (alone, nowhere) = both(attention, e)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)
    assert together.shape == (*torch.broadcast_shapes(attention.batch_shape, e.shape[:-2]), *shape[-2:])
    assert not none.any()
    assert not nowhere.any()
    # The comparison is of two methods: sweeps came all the way.
    batch = torch.broadcast_shapes(attention.batch_shape, e.shape[:-2])
    assert prefix(attention, e.expand(*batch, *shape[-2:]))[0].length == shape[-2]


@pytest.mark.parametrize(("case", "least", "most"), [("one head", 20, 80), ("never certified", 2, 5)])
def test_the_cases_lie_within_the_certificate_and_beyond(case, least, most):
    attention, shape = CASES[case]
    certified = (contraction_bound(attention, solve_sequence(attention, 0.5 * tokens(7, *shape))) < 1).sum(-1)
    assert least <= int(certified.min()) <= int(certified.max()) <= most


@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33])
def test_lengths_about_the_ends_of_a_stretch(length):
    attention, e = repulsive(5), tokens(5, 2, length, 3)
    (together, _), (alone, _) = both(attention, e)
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("batch", [(), (0,), (2, 0)])
def test_batches_of_one_and_of_nothing(batch):
    for method in ("parallel", "sequential"):
        u = solve_sequence(repulsive(5), tokens(5, *batch, 40, 3), method=method)
        assert u.shape == (*batch, 40, 3)


def test_gradients_agree_and_are_those_of_the_solution():
    parts = repulsive(6, heads=2, dim=2, value_dim=2, size=0.02)
    inputs = [
        x.clone().requires_grad_()
        for x in (parts.query, parts.key, parts.value, parts.output, parts.start, 0.5 * tokens(6, 2, 7, 2))
    ]

    def sample(query, key, value, output, start, e, method="parallel"):
        return solve_sequence(CausalAttention(query, key, value, output, start=start), e, method=method)

    assert torch.autograd.gradcheck(sample, inputs)
    weight = tokens(8, 2, 7, 2)
    found = [
        torch.autograd.grad((weight * sample(*inputs, method=method)).sum(), inputs)
        for method in ("parallel", "sequential")
    ]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def folding(a=0.8):
    """A scalar attention whose paths fold on the way, with its noise, (3, 24, 1)."""
    return CausalAttention.from_qk_matrix(torch.tensor([[a]], dtype=torch.float64)), 0.7 * tokens(11, 8, 60, 1)[
        3:6, :24
    ]


@pytest.mark.parametrize("rule", ["smallest_step", "nearest_mean"])
def test_where_the_map_folds_both_warn_of_the_same_and_choose_the_same(rule):
    attention, e = folding()
    heard, found = [], []
    for method in ("parallel", "sequential"):
        with pytest.warns(SeveralSolutionsWarning) as record:
            found.append(solve_sequence(attention, e, selection=rule, method=method))
        heard.append(str(record[0].message))
    assert heard[0] == heard[1]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    (_, several), (_, expected) = both(attention, e, rule)
    assert torch.equal(several, expected)


def test_where_the_map_folds_both_raise_the_same():
    attention, e = folding()
    said = []
    for method in ("parallel", "sequential"):
        with pytest.raises(SeveralSolutionsError) as error:
            solve_sequence(attention, e, method=method)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_folds_in_two_dimensions_are_not_overlooked():
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1], [0, 0]], dtype=torch.float64)
    attention = CausalAttention.from_qk_matrix(2.0 * torch.eye(2, dtype=torch.float64))
    e = torch.cat([attention.residual(corners), tokens(0, 30, 2)])
    said = []
    for method in ("parallel", "sequential"):
        with pytest.raises(SeveralSolutionsError, match="position") as error:
            solve_sequence(attention, e, method=method)
        said.append(str(error.value).split(":")[0])
    assert said[0] == said[1]


def test_without_the_search_for_rivals_a_fold_would_pass_in_silence(monkeypatch):
    attention, e = folding()
    _, several = find_sequence(attention, e, "smallest_step", "sequential")
    fold = int(several.any(0).nonzero()[0])
    assert prefix(attention, e)[0].length <= fold
    monkeypatch.setattr(sweeps, "without_rival", lambda context, noise, u: torch.ones_like(noise[..., 0]).bool())
    assert prefix(attention, e)[0].length > fold


def test_uniform_choices_are_uniform_after_sweeps():
    attention = CausalAttention.from_qk_matrix(torch.tensor([[3.0]], dtype=torch.float64))
    first = torch.tensor([[-1.0], [1.0], [0.0]], dtype=torch.float64)
    noise = (attention.residual(first) + 0.05 * torch.tensor([[0.0], [0.0], [1.0]])).expand(200, 3, 1)
    with pytest.warns(SeveralSolutionsWarning, match="200 of 200 sequences"):
        last = solve_sequence(attention, noise, selection="uniform", method="parallel")[:, -1, 0]
    counts = last.round(decimals=4).unique(return_counts=True)[1]
    assert len(counts) == 3
    assert counts.min() > 35


def test_nothing_is_certified_under_the_inclusive_mask():
    attention, e = attention_like(12, 2, 2, 2, 1, "inclusive", size=0.1), tokens(12, 20, 2)
    assert prefix(attention, e)[0].length == 0
    (together, _), (alone, _) = both(attention, e)
    assert torch.equal(together, alone)


def test_sweeps_that_do_not_converge_leave_the_work_to_the_sequential_solver(monkeypatch):
    attention, e = repulsive(13), tokens(13, 60, 3)
    monkeypatch.setattr(sweeps, "_SWEEPS", 2)
    assert prefix(attention, e)[0].length == 1
    (together, _), (alone, _) = both(attention, e)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_newton_takes_over_where_plain_sweeps_are_slow(monkeypatch):
    # J - I is near -0.9 for an alternating past: the error of a plain sweep falls by a tenth only.
    attention = CausalAttention.from_qk_matrix(torch.tensor([[-0.9]], dtype=torch.float64))
    u = torch.tensor([[-1.0], [1.0]] * 30, dtype=torch.float64) + 0.05 * tokens(14, 60, 1)
    e = attention.residual(u)
    torch.testing.assert_close(prefix(attention, e)[1], u, rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(sweeps, "_GAIN", 1e-9)
    assert prefix(attention, e)[0].length < 60


def test_tokens_so_large_that_rounding_forbids_a_certificate_end_the_sweeps():
    attention, e = repulsive(22, dtype=torch.float32), 1e12 * tokens(22, 40, 3, dtype=torch.float32)
    assert prefix(attention, e)[0].length == 1


def test_a_large_batch_is_searched_token_by_token():
    attention, e = (
        CausalAttention.from_qk_matrix(-2.0 * torch.eye(2, dtype=torch.float64)),
        0.5 * tokens(15, 900, 40, 2),
    )
    stop = prefix(attention, e)[0].length
    assert 31 < stop < 40
    (together, _), (alone, _) = both(attention, e[:3])
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)


def test_the_past_that_is_handed_on_is_the_past():
    attention, e = repulsive(16, heads=2), tokens(16, 2, 50, 3)
    past, u = prefix(attention, e)
    exact = Context.of(attention, u)
    for name in ("values", "keys", "largest"):
        torch.testing.assert_close(getattr(past, name), getattr(exact, name), rtol=1e-12, atol=1e-12)
    assert bool(((past.contraction_bound() < 1) == (exact.contraction_bound() < 1)).all())


def test_prefixes_are_searched_from_the_places_of_a_token_by_token_search():
    for dim in (1, 3):
        attention, u = attention_like(19, 2, 2, dim, dim, size=0.3), tokens(19, 2, 12, dim)
        visible = torch.ones(4, 12, dtype=torch.bool).tril(7)  # rows with pasts of 8, 9, 10, 11
        together = vertices(replace(Context.of(attention, u), visible=visible))
        for row, length in enumerate(range(8, 12)):
            alone = vertices(Context.of(attention, u[:, :length]))
            torch.testing.assert_close(together[:, row], alone, rtol=1e-12, atol=1e-12)
    assert hull_points(Context.of(attention, u), 5).shape == (5, 2, 3)


def test_the_methods_are_named():
    with pytest.raises(InputError, match="method is 'fast'; use one of 'parallel', 'sequential'"):
        solve_sequence(repulsive(0), tokens(0, 4, 3), method="fast")


def test_draws_of_the_distribution_are_the_same_by_either_method():
    law = LatentAttention(repulsive(20), 0.5, 64)
    e = law.base_dist.sample((3,))
    sequential = solve_sequence(law.attention, e, method="sequential")
    torch.testing.assert_close(law.transform(e), sequential, rtol=1e-11, atol=1e-11)


def test_stretches_that_double_need_few_sweeps(monkeypatch):
    """Swept all at once, 512 tokens take longer than any stretch of a sequence that doubles."""
    counts = []

    def counted(past, noise, swept=sweeps._sweep):
        before = len(calls)
        u = swept(past, noise)
        counts.append(len(calls) - before)
        return u

    calls = []

    for name in ("mean", "mean_and_jacobian"):
        evaluate = getattr(Context, name)

        def counting(self, u, evaluate=evaluate):
            calls.append(1)
            return evaluate(self, u)

        monkeypatch.setattr(Context, name, counting)
    monkeypatch.setattr(sweeps, "_sweep", counted)
    attention, e = CausalAttention.from_qk_matrix(-0.02 * torch.eye(4, dtype=torch.float64)), 0.5 * tokens(21, 512, 4)
    prefix(attention, e)
    doubling, counts[:] = list(counts), []
    monkeypatch.setattr(sweeps, "_FIRST", 511)
    prefix(attention, e)
    assert len(counts) == 1
    assert max(doubling[1:]) <= 17 < 25 < counts[0], (doubling, counts)
