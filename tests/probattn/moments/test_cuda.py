"""The kernels for CUDA: on a GPU where there is one, and everywhere in Triton's interpreter, in its own process."""

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from probattn.moments.operators import origin_moments

triton = pytest.importorskip("triton", reason="needs Triton, which has no wheels for this system")

from probattn.moments import cuda as kernels  # noqa: E402
from probattn.moments.kernels import triton_kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by Triton when it is imported: hence the process
DEVICE = "cpu" if INTERPRETED else "cuda"
outside = pytest.mark.skipif(INTERPRETED, reason="starts the interpreter or the compiler itself")


def on_device(test):
    return test if INTERPRETED else pytest.mark.cuda(test)


@pytest.mark.slow
@outside
def test_in_the_interpreter():
    """Everything below that is marked `on_device`."""
    names = {"PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    run = subprocess.run(
        command,
        env=environment | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(run.stdout.split(" passed")[0].split()[-1]) > 20, run.stdout


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(batch, heads, positions, group, rank, dim, tokens=None, *, window=None, strict=True, dtype=torch.float32):
    """q, k, v, first, limit, c; the positions are the last ones of the tokens."""
    tokens = tokens or positions
    parts = (
        normal(batch, heads, positions, group, rank, seed=1),
        1.5 * normal(batch, heads, tokens, rank, seed=2),
        normal(batch, heads, tokens, dim, seed=3),
    )
    place = torch.arange(positions) + tokens - positions
    first = torch.zeros_like(place) if window is None else (place - window + 1).clamp(min=0)
    parts = (*(part.to(dtype) for part in parts), first, place + (not strict))
    return *(part.to(DEVICE) for part in parts), rank**-0.5


def reference(ups, *arguments):
    """Moments from the first token and, from gradients of them, the three of the inputs, in float64 on the CPU."""
    query, key, value, first, limit, scale = arguments
    parts = [part.detach().cpu().double().requires_grad_() for part in (query, key, value)]
    moments = origin_moments(*parts, first.cpu(), limit.cpu(), scale=scale)[:3]
    given = [(part, up.cpu().double()) for part, up in zip(moments, ups, strict=True) if up is not None]
    outputs, coming = zip(*given, strict=True)
    return *(part.detach() for part in moments), *torch.autograd.grad(outputs, parts, coming)


def computed(ups, *arguments):
    """The same six of the kernels."""
    moments = kernels.forward(*arguments)
    gradient = torch.zeros_like(moments[0]) if ups[0] is None else ups[0]
    return *moments, *kernels.backward((gradient, *ups[1:]), *arguments)


def upstream(query, value):
    """Gradients of the three outputs."""
    size, rank = value.shape[-1], query.shape[-1]
    shapes = (size, rank), (size + rank,), ()
    parts = (normal(*query.shape[:-1], *last, seed=4 + place) for place, last in enumerate(shapes))
    return tuple(part.to(query.dtype).to(DEVICE) for part in parts)


def apart(found, expected):
    """Differences, none where both are the same infinity."""
    found = found.cpu().double()
    return torch.where(found == expected, 0.0, found - expected).abs()


def error(found, expected):
    """Largest difference over the largest number, or over one."""
    return (apart(found, expected).max() / expected.nan_to_num(neginf=0.0).abs().max().clamp(min=1)).item()


# B, K, P, g, r, dv: several blocks of rows (64) and tokens (64, 32 or 16), tiles of v (8, 4 or 2) and padded sizes.
SHAPES = {
    "one head": ((1, 1, 7, 1, 2, 3), {}),
    "grouped": ((2, 2, 7, 3, 2, 3), {}),
    "inclusive": ((1, 1, 5, 2, 1, 4), {"strict": False}),
    "blocks": ((1, 1, 70, 2, 5, 9), {}),
    "window": ((1, 1, 75, 2, 3, 2), {"window": 9}),
    "window of several blocks": ((1, 1, 150, 1, 4, 4), {"window": 70, "strict": False}),
    "cached keys": ((1, 1, 6, 2, 20, 11), {"tokens": 100}),
    "largest keys": ((1, 1, 9, 1, 64, 5), {"strict": False}),
    "largest values": ((1, 1, 9, 1, 3, 64), {}),
}


@on_device
class TestSinglePrecision:
    @pytest.mark.parametrize("name", SHAPES)
    def test_value_and_gradients_equal_the_reference(self, name):
        sizes, options = SHAPES[name]
        *arguments, scale = problem(*sizes, **options)
        ups = upstream(arguments[0], arguments[2])
        found, expected = computed(ups, *arguments, scale), reference(ups, *arguments, scale)
        for mine, other in zip(found, expected, strict=True):
            assert mine.dtype == torch.float32
            assert mine.shape == other.shape
            assert mine.is_contiguous()
            assert error(mine, other) < 1e-5
        again = computed(ups, *arguments, scale)
        assert all(torch.equal(mine, other) for mine, other in zip(found, again, strict=True))
        # The bound can tell: it notices a scale that is off by one in a thousand.
        changed = reference(ups, *arguments, 1.001 * scale)
        assert all(error(mine, other) > 2e-5 for mine, other in zip(found, changed, strict=True))

    @pytest.mark.parametrize("there", [there for there in itertools.product((False, True), repeat=3) if any(there)])
    def test_gradients_of_some_of_the_three(self, there):
        arguments = problem(1, 2, 9, 2, 3, 4, window=6)
        whole = upstream(arguments[0], arguments[2])
        ups = [up if used else None for up, used in zip(whole, there, strict=True)]
        found, expected = computed(ups, *arguments)[3:], reference(ups, *arguments)[3:]
        assert all(error(mine, other) < 1e-5 for mine, other in zip(found, expected, strict=True))
        # Each of the three counts: the query's and the key's gradients are others without it.
        others = reference(whole, *arguments)[3:5]
        assert all((error(mine, other) > 0.01) == (not all(there)) for mine, other in zip(found, others, strict=False))

    def test_means_and_log_sums_are_those_of_a_softmax(self):
        query, key, value, first, limit, scale = problem(2, 1, 5, 2, 3, 4, strict=False)
        _, mean, log_sum = kernels.forward(query, key, value, first, limit, scale)
        tokens = torch.cat([value, key], -1)
        tokens = tokens - tokens[:, :, :1]
        for position in range(5):
            seen = tokens[:, :, : position + 1]
            logits = scale * query[:, :, position] @ seen[..., 4:].mT
            torch.testing.assert_close(log_sum[:, :, position], logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mean[:, :, position], logits.softmax(-1) @ seen, rtol=1e-5, atol=1e-5)

    def test_rows_that_see_nothing_or_one_token(self):
        query, key, value, _, _, scale = problem(1, 2, 4, 2, 3, 3)
        first, limit = torch.tensor([[0, 2, 3, 0], [0, 2, 4, 4]], dtype=torch.int64, device=DEVICE)
        ups = upstream(query, value)
        arguments = query, key, value, first, limit, scale
        found = computed(ups, *arguments)
        covariance, mean, log_sum, to_query, *_ = found
        assert all((part[:, :, :2] == 0).all() for part in (covariance, mean, to_query))  # see no token
        assert log_sum[:, :, :2].isneginf().all()
        assert covariance[:, :, 2].abs().max() < 1e-6  # sees the last token alone
        tokens = torch.cat([value, key], -1)
        last = tokens[:, :, 3:] - tokens[:, :, :1]
        torch.testing.assert_close(mean[:, :, 2], last.expand(-1, -1, 2, -1))
        torch.testing.assert_close(log_sum[:, :, 2], scale * (query[:, :, 2] * last[..., 3:]).sum(-1))
        assert covariance[:, :, 3].abs().amax((-1, -2)).min() > 1e-3
        for mine, other in zip(found, reference(ups, *arguments), strict=True):
            assert error(mine, other) < 1e-5
        # Where nothing is seen, the gradient of a log-sum of -inf is often NaN, and does not enter.
        ups[2][:, :, :2] = math.nan
        for mine, other in zip(computed(ups, *arguments), found, strict=True):
            assert torch.equal(mine, other)

    @pytest.mark.parametrize("part", [1, 2])
    def test_a_nan_in_the_first_token_does_not_enter_where_nothing_is_seen(self, part):
        arguments = problem(1, 1, 4, 2, 3, 2)
        arguments[part][:, :, 0] = math.nan
        _, mean, log_sum, to_query, *_ = computed(upstream(arguments[0], arguments[2]), *arguments)
        assert (mean[:, :, 0] == 0).all()
        assert log_sum[:, :, 0].isneginf().all()
        assert (to_query[:, :, 0] == 0).all()
        assert mean[:, :, 1:].isnan().any(-1).all()

    def test_any_order_of_first(self):
        query, key, value, _, limit, scale = problem(1, 1, 90, 1, 2, 2, tokens=150, strict=False)
        first = (limit * normal(90, seed=5).sigmoid().to(DEVICE)).long()
        ups = upstream(query, value)
        arguments = (query, key, value, first, limit, scale)
        for mine, other in zip(computed(ups, *arguments), reference(ups, *arguments), strict=True):
            assert error(mine, other) < 1e-5

    def test_inputs_that_are_not_contiguous(self):
        query, key, value, *where = problem(2, 3, 5, 2, 3, 4)
        straight = [(query, key, value), upstream(query, value)]
        turned = [[part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts] for parts in straight]
        turned[1][0] = straight[1][0].transpose(-1, -2).contiguous().transpose(-1, -2)
        assert not any(part.is_contiguous() for part in itertools.chain(*turned))
        found, expected = (computed(ups, *parts, *where) for parts, ups in (turned, straight))
        assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))

    def test_autocast_changes_nothing(self):
        arguments = problem(1, 2, 9, 1, 3, 2)
        ups = upstream(arguments[0], arguments[2])
        expected = computed(ups, *arguments)
        with torch.autocast(DEVICE, torch.bfloat16):
            found = computed(ups, *arguments)
        assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))

    @pytest.mark.parametrize("empty", ["batch", "positions", "tokens"])
    def test_empty_axes(self, empty):
        query, key, value, first, limit, scale = problem(2, 1, 3, 1, 2, 2)
        if empty == "batch":
            query, key, value = query[:0], key[:0], value[:0]
        if empty == "positions":
            query, first, limit = query[:, :, :0], first[:0], limit[:0]
        if empty == "tokens":
            key, value, limit = key[:, :, :0], value[:, :, :0], torch.zeros_like(limit)
        arguments = (query, key, value, first, limit, scale)
        ups = upstream(query, value)
        found = computed(ups, *arguments)
        for mine, part in zip(found, (*ups, *arguments[:3]), strict=True):
            assert mine.shape == part.shape
        assert all((part == 0).all() for part in (*found[:2], *found[3:]))
        assert found[2].isneginf().all()

    @pytest.mark.parametrize("part", [1, 2])
    def test_tokens_that_share_a_large_offset_keep_their_digits(self, part):
        arguments = list(problem(1, 1, 20, 1, 3, 3))
        arguments[part] = arguments[part] + 1000
        ups = upstream(arguments[0], arguments[2])
        found, expected = computed(ups, *arguments), reference(ups, *arguments)
        assert all(error(mine, other) < 1e-5 for mine, other in zip(found, expected, strict=True))
        # To the last digits of a thousand: weights of logits that are off by as much would move means by more.
        assert all(apart(mine, other).max() < 2e-4 for mine, other in zip(found[1:3], expected[1:3], strict=True))

    def test_what_no_row_sees_does_not_enter(self):
        query, key, value, first, limit, scale = problem(1, 1, 6, 1, 2, 2, tokens=40)
        limit = limit - 10
        ups = upstream(query, value)
        expected = reference(ups, query, key, value, first, limit, scale)
        key[:, :, 30:], value[:, :, 30:] = math.nan, math.inf
        found = computed(ups, query, key, value, first, limit, scale)
        for mine, other in zip(found, expected, strict=True):
            assert error(mine, other) < 1e-5
        assert all((part[:, :, 30:] == 0).all() for part in found[4:])

    def test_a_nan_stays_in_its_row(self):
        query, *rest = problem(1, 1, 6, 1, 2, 2)
        expected = kernels.forward(query, *rest)
        query[0, 0, 4] = math.nan
        for mine, other in zip(kernels.forward(query, *rest), expected, strict=True):
            assert mine[0, 0, 4].isnan().all()
            mine[0, 0, 4] = other[0, 0, 4]
            assert torch.equal(mine, other)


@on_device
class TestHalfPrecision:
    @pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 7), (torch.float16, 11)])
    # bfloat16 has eight digits, but the interpreter cuts off what a GPU would round.
    def test_equals_the_reference_of_the_same_inputs_to_the_rounding_of_the_result(self, dtype, digits):
        *arguments, scale = problem(1, 2, 40, 2, 6, 5, dtype=dtype)
        ups = upstream(arguments[0], arguments[2])
        found, expected = computed(ups, *arguments, scale), reference(ups, *arguments, scale)
        # A GPU multiplies in TF32, with eleven digits: of logits up to ten, so the weights have eight, and what they
        # weigh has them relative to the largest numbers. On an H200 5e-3 was the largest difference.
        room = 0.0 if INTERPRETED else 2.0**-7
        for mine, other in zip(found, expected, strict=True):
            assert mine.dtype == dtype
            largest = other[other.isfinite()].abs().max()
            assert (apart(mine, other) <= 2.0**-digits * other.abs() + room * largest + 1e-5).all()

    def test_sums_are_in_single_precision(self):
        """In bfloat16 a sum of 600 shares of 1/600 stops growing at 1/2, where the half of a digit is larger."""
        count = 600
        share, stalled = torch.tensor(1 / count, dtype=torch.bfloat16), torch.zeros((), dtype=torch.bfloat16)
        for _ in range(count):
            stalled = stalled + share
        assert stalled < 0.6
        sign = torch.ones(count, 1, device=DEVICE, dtype=torch.bfloat16)
        sign[::2] = -1
        query = torch.zeros(1, 1, 1, 1, 1, device=DEVICE, dtype=torch.bfloat16)
        first, limit = torch.tensor([[0], [count]], device=DEVICE)
        arguments = query, sign[None, None], sign[None, None], first, limit, 1.0
        covariance, mean, log_sum = kernels.forward(*arguments)
        assert covariance.item() == 1.0
        assert (mean == 1).all()  # from the first token, -1
        assert log_sum.item() == torch.tensor(math.log(count), dtype=torch.bfloat16).item()
        # dC/dv_s = (k_s - kbar) / 600: the same here for every token but for its sign.
        _, _, to_value = kernels.backward((torch.ones_like(covariance), None, None), *arguments)
        torch.testing.assert_close(to_value[0, 0].float(), sign.float() / count, rtol=2**-8, atol=0)


def stub(rank=8, dtype=torch.float32, device="cuda"):
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 1, 1, rank))


@outside
class TestWhatTheKernelsCover:
    @pytest.fixture(autouse=True)
    def _new_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        monkeypatch.setattr(kernels, "ENABLED", True)

    def test_nothing_unless_they_are_enabled(self, monkeypatch):
        part = stub()
        monkeypatch.setattr(kernels, "ENABLED", False)
        assert not kernels.supports(part, part, part, None, None)
        for value, expected in (("1", True), ("0", False), (None, True)):
            if value is None:
                monkeypatch.delenv("PROBATTN_TRITON")
            else:
                monkeypatch.setenv("PROBATTN_TRITON", value)
            specification = importlib.util.spec_from_file_location("copy_of_cuda", kernels.__file__)
            copy = importlib.util.module_from_spec(specification)
            specification.loader.exec_module(copy)
            assert copy.ENABLED is expected

    def test_the_usual(self):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            part = stub(dtype=dtype)
            assert kernels.supports(part, part, part, None, None)
            assert kernels.supports(part, part, part, None, 0.0)

    @pytest.mark.parametrize("part", [stub(rank=65), stub(dtype=torch.float64), stub(device="cpu"), stub(device="mps")])
    def test_not_what_is_too_large_too_fine_or_elsewhere(self, part):
        assert not kernels.supports(part, part, part, None, None)

    def test_not_masks_caps_mixed_dtypes_or_large_values(self):
        part = stub()
        assert not kernels.supports(part, part, part, torch.ones(1), None)
        assert not kernels.supports(part, part, part, None, 30.0)
        assert not kernels.supports(part, part, stub(dtype=torch.float16), None, None)
        assert not kernels.supports(part, part, stub(rank=65), None, None)

    def test_nothing_without_triton_or_on_an_old_gpu(self, monkeypatch):
        part = stub()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not kernels.supports(part, part, part, None, None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        monkeypatch.setattr(triton_kernels, "AVAILABLE", False)
        assert not kernels.supports(part, part, part, None, None)


@outside
class TestCompiled:
    """By the compiler that Triton brings, without a GPU."""

    @staticmethod
    def compiled(kernel, size, precision, plain, capability=90):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        numbers = dict.fromkeys(("rows", "seen", "group", "blocks"), "i32") | {"scale": "fp32"}
        numbers |= dict.fromkeys(("first", "limit", "spans"), "*i32")
        other, warps = kernels._SHAPE[precision]
        rank = max(16, size)
        width = max(16, 2 * size) if plain else min(kernels._COLUMNS, size * rank)
        constants = {"DV": size, "R": size, "RANK": rank, "WIDTH": width, "PLAIN": plain}
        constants |= {"OWN": kernels._OWN, "OTHER": other, "PRECISION": precision}
        signature = {
            name: "constexpr" if name in constants else numbers.get(name, "*fp32") for name in kernel.arg_names
        }
        return triton.compile(
            ASTSource(kernel, signature, constants),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True},
        )

    @pytest.fixture(autouse=True)
    def _own_cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    @pytest.mark.parametrize("precision", ["ieee", "tf32"])
    def test_the_forward_pass(self, precision):
        result = self.compiled(triton_kernels.covariance, 16, precision, plain=False)
        assert "cubin" in result.asm
        assert ("wgmma" in result.asm["ptx"]) == (precision == "tf32")

    @pytest.mark.slow
    @pytest.mark.parametrize("precision", ["ieee", "tf32"])
    @pytest.mark.parametrize("capability", [89, 90])
    def test_all_fit_into_the_shared_memory_at_the_largest_size(self, capability, precision):
        sizes = [
            self.compiled(kernel, kernels.LARGEST, precision, plain, capability).metadata.shared
            for kernel, shapes in (
                (triton_kernels.summary, [True]),
                (triton_kernels.covariance, [False]),
                (triton_kernels.to_rows, [False, True]),
                (triton_kernels.to_tokens, [False, True]),
            )
            for plain in shapes
        ]
        assert 0 < max(sizes) <= (99 if capability == 89 else 227) << 10
