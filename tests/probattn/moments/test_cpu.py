"""The compiled kernels against torch: sizes around those of vectors, blocks and tiles; threads; what is left over."""

import math
import os
import signal
import types
import warnings
from pathlib import Path

import pytest
import torch

from probattn.barrier import penalty_and_margin
from probattn.blocks import logabsdet_one_minus as logabsdet
from probattn.moments import cpu
from probattn.moments.operators import past_moments

pytestmark = pytest.mark.skipif(not cpu.AVAILABLE, reason="the kernels were not built: no C compiler")
DTYPES = [torch.float32, torch.float64]


def past_covariance(*arguments, **options):
    return past_moments(*arguments, **options).covariance


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def by_torch(monkeypatch, function):
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "AVAILABLE", False)
        return function()


class TestDeterminants:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", [2, 3, 8, 16, 31, 64])
    def test_equal_those_of_torch(self, size, dtype):
        for count in (1, 7, 16, 17, 100):
            matrix = normal(count, size, size, seed=count, dtype=dtype)
            sign, value, inverse = cpu.determinants(matrix)
            block = torch.eye(size, dtype=torch.float64) - matrix.double()
            expected = torch.linalg.slogdet(block)
            # What rounding does to a determinant and to an inverse grows with the condition of the matrix.
            unit = 4 * size * torch.finfo(dtype).eps * torch.linalg.cond(block)
            assert torch.equal(sign.double(), expected[0])
            assert ((value.double() - expected[1]).abs() <= unit).all()
            left = inverse.double().mT @ block - torch.eye(size, dtype=torch.float64)
            assert (left.abs().amax((-1, -2)) <= unit).all()

    def test_pivots_are_needed_and_used(self):
        block = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1e-300, 1.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
        sign, value, inverse = cpu.determinants((torch.eye(3).double() - block)[None])
        assert sign.item() == 1
        assert value.item() == pytest.approx(math.log(2), abs=1e-15)
        torch.testing.assert_close(inverse[0].T @ block, torch.eye(3).double(), rtol=0, atol=1e-15)

    def test_singular_and_nan(self):
        matrix = torch.stack([torch.eye(4), torch.full((4, 4), torch.nan), torch.zeros(4, 4)]).double()
        matrix[0, 0, 0] = 0.5
        sign, value, inverse = cpu.determinants(matrix)
        assert sign[0] == 0
        assert value[0] == -torch.inf
        assert sign[1:].isnan().tolist() == value[1:].isnan().tolist() == [True, False]
        assert inverse[:2].isnan().all()
        assert torch.equal(inverse[2], torch.eye(4).double())

    def test_every_derivative(self, monkeypatch):
        assert logabsdet(torch.zeros(2, 2))[1].shape == ()
        assert logabsdet(torch.zeros(0, 5, 2, 2))[1].shape == (0, 5)
        matrix = (0.4 * normal(2, 3, 4, 4)).requires_grad_()
        assert torch.autograd.gradcheck(lambda k: logabsdet(k)[1], matrix, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda k: logabsdet(k)[1], matrix)

        def all_of_them():
            total = lambda k: logabsdet(k)[1].sum()  # noqa: E731
            plain = matrix.detach()
            return (
                torch.func.hessian(total)(plain),
                torch.func.vmap(torch.func.grad(total))(plain),
                torch.func.vmap(lambda k: logabsdet(k)[1], in_dims=1, out_dims=1)(plain),
                torch.func.jvp(torch.func.grad(total), (plain,), (torch.ones_like(plain),))[1],
            )

        for mine, other in zip(all_of_them(), by_torch(monkeypatch, all_of_them), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)

    # 2026-11-24: torch's compiler makes an instance of an autograd.Function and warns of that itself.
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_compiles_into_one_graph(self):
        matrix = (0.4 * normal(6, 5, 5)).requires_grad_()
        compiled = torch.compile(lambda k: logabsdet(k)[1].square().sum(), fullgraph=True, backend="aot_eager")
        compiled(matrix).backward()
        torch.testing.assert_close(matrix.grad, torch.func.grad(lambda k: logabsdet(k)[1].square().sum())(matrix))

    def test_near_the_boundary_the_gradient_is_finite_and_points_away(self):
        for distance in (1e-3, 1e-6, 1e-12):
            a = torch.tensor(1 - distance, dtype=torch.float64, requires_grad=True)
            matrix = torch.diag_embed(torch.stack([a, 0.5 * a, 0 * a]))[None]
            penalty_and_margin(matrix, 3, "logdet")[0].sum().backward()
            assert a.grad == pytest.approx(
                1 / distance, rel=1e-3
            )  # the penalty falls as a moves off the boundary at one

    @pytest.mark.parametrize("matrix", [torch.zeros(3, 65, 65), torch.zeros(3, 1, 1), torch.zeros(2, 3, 3).bfloat16()])
    def test_the_rest_is_left_to_torch(self, matrix):
        assert not cpu.takes_matrices(matrix)


class TestCovariance:
    """Sizes around those of a vector (8 or 16), a tile (4), a block of rows (64) and what is held of products."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("heads", "positions", "group", "tokens", "rank", "dim"),
        [
            (1, 63, 1, 63, 5, 7),
            (2, 65, 1, 65, 8, 8),
            (1, 70, 3, 200, 16, 16),
            (1, 130, 1, 131, 32, 32),
            (1, 20, 1, 40, 64, 64),
            (3, 5, 2, 5, 1, 1),
        ],
    )
    @pytest.mark.parametrize("window", [None, 20])
    def test_equals_torch(self, monkeypatch, heads, positions, group, tokens, rank, dim, window, dtype):
        parts = [
            normal(2, heads, positions, group, rank, seed=1, dtype=dtype).requires_grad_(),
            normal(2, heads, tokens, rank, seed=2, dtype=dtype).requires_grad_(),
            normal(2, heads, tokens, dim, seed=3, dtype=dtype).requires_grad_(),
        ]
        limit = torch.arange(positions) + tokens - positions
        first = torch.zeros_like(limit) if window is None else (limit - window).clamp(min=0)
        assert cpu.takes_moments(parts[0], parts[2], None, 0.0)

        def both():
            found = past_moments(*parts, first, limit, scale=0.5)
            ups = [normal(*part.shape, seed=4, dtype=dtype).where(part.isfinite(), 0.0) for part in found]
            return *found, *torch.autograd.grad(found, parts, ups)

        # Sums over up to 200 tokens of products of a few units, each to sixteen or seven digits.
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-4}[dtype]
        for mine, other in zip(both(), by_torch(monkeypatch, both), strict=True):
            assert other.abs().max() > 0.1
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)

    def test_rows_that_are_shared_among_threads_give_the_same(self, threads):
        query, key, value = (normal(1, 1, 900, 1, 4, seed=n).requires_grad_() for n in range(3))
        parts = (query, key[:, :, :, 0], value[:, :, :, 0])
        where = (torch.zeros(900, dtype=torch.long), torch.arange(900))

        def both():
            found = past_covariance(*parts, *where)
            return found, *torch.autograd.grad(found.square().sum(), (query, key, value))

        threads(1)
        alone = both()
        threads(5)
        for mine, other in zip(both(), alone, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)

    def test_a_nan_stays_where_it_is_seen(self):
        query, key, value = (normal(1, 1, 40, 8, seed=n) for n in range(3))
        query[0, 0, 30] = torch.nan
        found = past_covariance(query.unsqueeze(3), key, value, torch.zeros(40, dtype=torch.long), torch.arange(40))
        assert found[0, 0, 30].isnan().all()
        assert found[0, 0, torch.arange(40) != 30].isfinite().all()

    def test_what_it_leaves_to_torch(self):
        query, value = normal(1, 1, 4, 1, 8), normal(1, 1, 4, 8)
        assert cpu.takes_moments(query, value, None, 0.0)
        assert not cpu.takes_moments(query, value, torch.ones(1, 1, 4, 4).bool(), 0.0)
        assert not cpu.takes_moments(query, value, None, 30.0)
        assert not cpu.takes_moments(normal(1, 1, 4, 1, 65), value, None, 0.0)
        assert not cpu.takes_moments(query.bfloat16(), value, None, 0.0)


def test_a_forked_process_has_threads_of_its_own(threads):
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    threads(2)
    matrix = torch.zeros(4096, 8, 8)
    cpu.determinants(matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of the threads
        child = os.fork()
    if child == 0:
        signal.alarm(60)  # it would wait for ever for threads that it does not have
        cpu.determinants(matrix)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def copy_of_the_module(change=None):
    """The module executed anew, from its source with one piece replaced."""
    source = Path(cpu.__file__).read_text()
    if change is not None:
        assert source.count(change[0]) == 1
        source = source.replace(*change)
    copy = types.ModuleType("copy_of_cpu")
    copy.__file__ = cpu.__file__
    exec(compile(source, cpu.__file__, "exec"), copy.__dict__)
    return copy


def test_a_library_of_another_version_or_with_other_structures_is_refused():
    assert copy_of_the_module().AVAILABLE
    assert not copy_of_the_module(("_VERSION = 2", "_VERSION = 1")).AVAILABLE
    more = '(("next", ctypes.c_long), ("failed", ctypes.c_long), ("more", ctypes.c_long))'
    assert not copy_of_the_module(('(("next", ctypes.c_long), ("failed", ctypes.c_long))', more)).AVAILABLE


def test_they_can_be_left_out(monkeypatch):
    for value, expected in (("0", False), ("1", True)):
        monkeypatch.setenv("PROBATTN_NATIVE", value)
        assert copy_of_the_module().AVAILABLE is expected
