import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import probattn
from probattn import CausalAttention, LatentAttention
from probattn.blocks import largest_real_eigenvalue, logabsdet_one_minus
from probattn.numerics import linalg

mpmath = pytest.importorskip("mpmath")  # comes with torch, by way of sympy
ROWS = [100, 192, 400, 600]


@pytest.fixture(params=[1, 2, 4])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def matrices(*shape, seed=0, dtype=torch.float64):
    """Well-conditioned matrices with determinants of moderate size."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (torch.eye(shape[-1]) - 0.6 * noise / shape[-1] ** 0.5).to(dtype)


@pytest.fixture(scope="module")
def forty_digits():
    """Two matrices, and log|det| of the second by elimination with forty digits; rows are in a stable order already."""
    a = matrices(2, 80, 80, seed=5)
    with mpmath.workdps(40):
        rows, logabs = [[mpmath.mpf(x) for x in row] for row in a[1].tolist()], mpmath.mpf(0)
        while rows:
            head, *rows = rows
            logabs += mpmath.log(abs(head[0]))
            rows = [[x - row[0] / head[0] * y for x, y in zip(row[1:], head[1:], strict=True)] for row in rows]
        return a, float(logabs)


@pytest.fixture
def small_is_large(monkeypatch):
    """Every matrix of more than two rows takes the route of the large ones, so that derivatives can be checked."""
    monkeypatch.setattr(linalg, "TOGETHER", 2)


class TestThreads:
    """References from NumPy, which has a LAPACK of its own and factors one matrix at a time."""

    @pytest.mark.parametrize("rows", ROWS)
    def test_values(self, threads, rows):
        a = matrices(3, 1, rows, rows)
        b = torch.randn(3, 1, rows, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        sign, logabs = linalg.slogdet(a)
        expected = np.linalg.slogdet(a.numpy())
        assert sign.numpy().tolist() == expected.sign.tolist()
        np.testing.assert_allclose(logabs, expected.logabsdet, rtol=0, atol=1e-11)
        np.testing.assert_allclose(linalg.det(a), np.linalg.det(a.numpy()), rtol=1e-11)
        np.testing.assert_allclose(linalg.inverse(a), np.linalg.inv(a.numpy()), rtol=0, atol=1e-11)
        np.testing.assert_allclose(linalg.solve(a, b), np.linalg.solve(a.numpy(), b.numpy()), rtol=0, atol=1e-11)

    @pytest.mark.parametrize("rows", [192, 400])
    def test_gradients(self, threads, rows):
        a = matrices(3, rows, rows, seed=2).requires_grad_()
        b = torch.randn(3, rows, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
        g = torch.randn(3, rows, rows, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        inverse = np.linalg.inv(a.detach().numpy())
        transposed = inverse.swapaxes(-1, -2)
        (slope,) = torch.autograd.grad(linalg.slogdet(a)[1].sum(), a)
        np.testing.assert_allclose(slope, transposed, rtol=0, atol=1e-11)
        (slope,) = torch.autograd.grad((linalg.inverse(a) * g).sum(), a)
        np.testing.assert_allclose(slope, -transposed @ g.numpy() @ transposed, rtol=0, atol=1e-9)
        to_a, to_b = torch.autograd.grad((linalg.solve(a, b) * g[..., :2]).sum(), (a, b))
        expected = transposed @ g[..., :2].numpy()
        np.testing.assert_allclose(to_b, expected, rtol=0, atol=1e-10)
        solved = inverse @ b.detach().numpy()
        np.testing.assert_allclose(to_a, -expected @ solved.swapaxes(-1, -2), rtol=0, atol=1e-9)

    def test_single_precision(self, threads):
        a = matrices(3, 256, 256)
        single = linalg.slogdet(a.float())[1]
        assert single.dtype == torch.float32
        np.testing.assert_allclose(single, np.linalg.slogdet(a.numpy()).logabsdet, rtol=0, atol=2e-4)

    def test_complex(self, threads):
        a = torch.complex(matrices(3, 192, 192), 0.3 * matrices(3, 192, 192, seed=1))
        np.testing.assert_allclose(linalg.inverse(a), np.linalg.inv(a.numpy()), rtol=0, atol=1e-11)

    def test_against_forty_digits(self, threads, forty_digits):
        a, exact = forty_digits
        assert float(linalg.slogdet(a)[1][1]) == pytest.approx(exact, abs=1e-13)

    def test_four_heads_of_48_in_192_dimensions(self, threads):
        generator = torch.Generator().manual_seed(6)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        query, key, value = (normal(4, 48, 192) / 192**0.5 for _ in range(3))
        attention = CausalAttention(query, key, value, normal(4, 192, 48) / 14)
        u = normal(6, 192)
        block = attention.jacobian(u).numpy()
        sign, logabs = attention.logabsdet(u)
        expected = np.linalg.slogdet(block)
        assert sign.tolist() == expected.sign.tolist()
        np.testing.assert_allclose(logabs, expected.logabsdet, rtol=0, atol=1e-10)
        assert float(logabs.abs().max()) > 0.1

        process = LatentAttention(attention, 1.0, 6)
        gaussian = -0.5 * (attention.residual(u).square().sum() + u.numel() * np.log(2 * np.pi))
        expected_density = float(gaussian) + float(expected.logabsdet.sum())
        assert float(process.log_prob(u)) == pytest.approx(expected_density, rel=1e-12)

    def test_gradient_of_the_log_determinant_through_a_large_core(self, threads):
        k = (0.5 * torch.eye(192) - 0.5 * matrices(3, 192, 192, seed=7)).requires_grad_()
        logabsdet_one_minus(k)[1].sum().backward()
        expected = -np.linalg.inv(np.eye(192) - k.detach().numpy()).swapaxes(-1, -2)
        np.testing.assert_allclose(k.grad, expected, rtol=0, atol=1e-11)

    def test_gradient_of_the_largest_real_eigenvalue_of_large_matrices(self, threads):
        # An eigenvalue far from the others, so that there is one pair of null vectors to compare with.
        k = matrices(2, 100, 100, seed=8)
        k[:, 0, 0] += 9
        k = k.requires_grad_()
        largest_real_eigenvalue(k, 100).sum().backward()
        for one, slope in zip(k.detach().numpy(), k.grad.numpy(), strict=True):
            values, right = np.linalg.eig(one)
            index = values.real.argmax()
            left = np.linalg.inv(right)[index]
            np.testing.assert_allclose(slope, np.outer(left, right[:, index]).real, rtol=0, atol=1e-10)


PLAIN = """
    import torch
    torch.set_num_threads(1)
    noise = torch.randn(4, 192, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = torch.eye(192) - 0.6 * noise / 192**0.5
    reference = {function}(a)
    torch.set_num_threads(4)
    gap = ({function}(a) - reference).abs().max()
    print("same" if gap < 1e-8 else "differs")
"""


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the fault is one of torch with Intel's MKL")
@pytest.mark.parametrize("function", ["(lambda a: torch.linalg.slogdet(a)[1])", "torch.linalg.inv"])
def test_a_plain_batched_call_fails_these_tests(function):
    # In a process of its own: the plain call permutes rows out of range, and hangs or raises on some machines.
    code = textwrap.dedent(PLAIN.format(function=function))
    try:
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout
    except subprocess.TimeoutExpired:
        found = "hangs"
    assert not found.endswith("same\n")


FUNCTIONS = {
    "slogdet": lambda a, b: linalg.slogdet(a)[1],
    "det": lambda a, b: linalg.det(a),
    "inverse": lambda a, b: linalg.inverse(a),
    "unchecked inverse": lambda a, b: linalg.inverse(a, check=False),
    "solve": linalg.solve,
    "unchecked solve": lambda a, b: linalg.solve(a, b, check=False),
}
PLAIN_FUNCTIONS = {
    "slogdet": lambda a, b: torch.linalg.slogdet(a)[1],
    "det": lambda a, b: torch.linalg.det(a),
    "inverse": lambda a, b: torch.linalg.inv(a),
    "unchecked inverse": lambda a, b: torch.linalg.inv(a),
    "solve": torch.linalg.solve,
    "unchecked solve": torch.linalg.solve,
}


@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("name", FUNCTIONS)
class TestDerivatives:
    a = matrices(2, 4, 4, seed=9)
    b = matrices(2, 4, 4, seed=10)[..., :3]

    def inputs(self, name):
        return [x.clone().requires_grad_() for x in ((self.a, self.b) if "solve" in name else (self.a,))]

    def call(self, name):
        return FUNCTIONS[name] if "solve" in name else lambda a: FUNCTIONS[name](a, None)

    def test_first_in_both_modes_also_batched(self, name):
        assert torch.autograd.gradcheck(
            self.call(name), self.inputs(name), check_forward_ad=True, check_batched_grad=True
        )

    def test_second_in_reverse_and_forward_over_reverse(self, name):
        assert torch.autograd.gradgradcheck(self.call(name), self.inputs(name), check_fwd_over_rev=True)

    def test_third(self, name):
        def slope(*inputs):
            return torch.autograd.grad(self.call(name)(*inputs).square().sum(), inputs[0], create_graph=True)[0]

        inputs = [x[:1, :3, :3].detach().requires_grad_() for x in self.inputs(name)]
        assert torch.autograd.gradgradcheck(slope, inputs)

    @pytest.mark.parametrize("axes", [(0, 0), (1, 1), (2, 1), (0, None), (None, 0), (None, -1)])
    def test_vmap_along_any_axis(self, name, axes):
        a = self.a[0] if axes[0] is None else self.a.movedim(0, axes[0])
        b = self.b[0] if axes[1] is None else self.b.movedim(0, axes[1])
        if axes[0] is None and "solve" not in name:
            pytest.skip("no axis to map over")
        found = torch.func.vmap(FUNCTIONS[name], axes)(a, b)
        expected = torch.func.vmap(PLAIN_FUNCTIONS[name], axes)(a, b)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("axes", [(0, 0), (1, 1), (1, None), (None, 1)])
    def test_vmap_of_batches(self, name, axes):
        if axes[0] is None and "solve" not in name:
            pytest.skip("no axis to map over")
        a, b = matrices(2, 2, 4, 4), matrices(2, 2, 4, 4, seed=3)[..., :3]
        a, b = (x[0] if axis is None else x for x, axis in zip((a, b), axes, strict=True))
        found = torch.func.vmap(FUNCTIONS[name], axes)(a, b)
        expected = torch.func.vmap(PLAIN_FUNCTIONS[name], axes)(a, b)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    def test_torch_func(self, name):
        for transform in (
            torch.func.jacrev,
            torch.func.jacfwd,
            torch.func.hessian,
            lambda f: torch.func.jacrev(torch.func.jacrev(f)),
            lambda f: torch.func.vmap(torch.func.jacrev(f)),
        ):
            found = transform(lambda a: FUNCTIONS[name](a, self.b[0]))(self.a)
            expected = transform(lambda a: PLAIN_FUNCTIONS[name](a, self.b[0].expand(*a.shape[:-2], 4, 3)))(self.a)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    # 2026-11-24: torch's compiler makes an instance of an autograd.Function and warns of that itself.
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_compiled(self, name):
        call = torch.compile(FUNCTIONS[name], backend="aot_eager", fullgraph=True)
        a, b = (x.clone().requires_grad_() for x in (self.a, self.b))
        found, expected = call(a, b), PLAIN_FUNCTIONS[name](a, b)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found.square().sum(), a), torch.autograd.grad(expected.square().sum(), a)
        )


@pytest.mark.parametrize("rows", [4, 70])
class TestBothRoutes:
    def test_batches_broadcast(self, rows):
        a, b = matrices(5, 1, rows, rows), matrices(2, rows, rows)[..., :3]
        torch.testing.assert_close(linalg.solve(a, b), torch.linalg.inv(a) @ b)
        torch.testing.assert_close(linalg.solve(a[0, 0], b), torch.linalg.inv(a[0, 0]) @ b)
        torch.testing.assert_close(linalg.solve(a, b[0]), torch.linalg.inv(a) @ b[0])
        torch.testing.assert_close(linalg.solve(a[0, 0], b[0]), torch.linalg.inv(a[0, 0]) @ b[0])
        # Torch takes this right side for a batch of vectors.
        square = matrices(rows, rows, rows, seed=3)
        torch.testing.assert_close(linalg.solve(square, square[0]), torch.linalg.inv(square) @ square[0])

    def test_an_empty_batch(self, rows):
        nothing = torch.zeros(0, rows, rows)
        assert linalg.slogdet(nothing)[1].shape == linalg.det(nothing).shape == (0,)
        assert linalg.inverse(nothing).shape == (0, rows, rows)
        assert linalg.solve(nothing, torch.zeros(0, rows, 2)).shape == (0, rows, 2)

    def test_singular_matrices(self, rows):
        a = matrices(3, rows, rows)
        a[1, :, 2] = 0
        sign, logabs = linalg.slogdet(a)
        assert sign[1] == 0
        assert torch.isneginf(logabs[1])
        assert linalg.det(a)[1] == 0
        for found in (linalg.inverse(a, check=False), linalg.solve(a, a[0], check=False)):
            assert found[1].isnan().all()
            assert torch.isfinite(found[::2]).all()
        for call in (linalg.inverse, lambda a: linalg.solve(a, a)):
            with pytest.raises(torch.linalg.LinAlgError, match="singular"):
                call(a)

    def test_nan_stays_in_its_matrix(self, rows):
        a = matrices(3, rows, rows)
        a[1, 0, 0] = torch.nan
        for found in (linalg.slogdet(a)[1], linalg.det(a), linalg.inverse(a, check=False)):
            assert found[1].isnan().any()
            assert torch.isfinite(found[::2]).all()

    def test_the_gradient_is_cut_where_none_is_asked_for(self, rows):
        a, b = matrices(rows, rows), matrices(rows, rows)[..., :1].requires_grad_()
        linalg.solve(a, b).sum().backward()
        torch.testing.assert_close(b.grad[:, 0], torch.linalg.inv(a).sum(0))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_up_to_64_rows_torch_itself_is_called_and_beyond_one_matrix_at_a_time(name, monkeypatch):
    shapes = []
    for call in ("slogdet", "det", "inv_ex", "solve_ex"):
        plain = getattr(torch.linalg, call)

        def watched(matrix, *args, plain=plain, **options):
            shapes.append(tuple(matrix.shape))
            return plain(matrix, *args, **options)

        monkeypatch.setattr(torch.linalg, call, watched)
    for rows, expected in ((64, [(3, 64, 64)]), (65, 3 * [(65, 65)])):
        shapes.clear()
        FUNCTIONS[name](matrices(3, rows, rows), torch.ones(3, rows, 1, dtype=torch.float64))
        assert shapes == expected


BATCHED_LU = {
    *("slogdet", "det", "logdet", "inv", "inv_ex", "inverse", "solve", "solve_ex", "lu", "lu_factor", "lu_factor_ex"),
    *("lu_solve", "tensorinv", "tensorsolve"),
    "eig",  # its derivative solves with the matrix of eigenvectors
}


def direct_calls(source):
    """Names of functions of torch that factor batches by LU, as used in a source text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in BATCHED_LU:
            owner = ast.unparse(node.value)
            if owner in ("torch", "torch.linalg"):
                found.append(f"{owner}.{node.attr}")
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.linalg"):
            found += [f"{node.module}.{name.name}" for name in node.names if name.name in BATCHED_LU | {"linalg"}]
        # Methods of tensors; a transform's .inv and a list's .index are none.
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            method = node.func.attr in {"slogdet", "det", "logdet", "inverse", "lu_solve"}
            if method and not node.args and ast.unparse(node.func.value) not in ("linalg", "np.linalg", "jnp.linalg"):
                found.append(f".{node.func.attr}()")
    return found


def test_no_other_module_factors_batches():
    package = Path(probattn.__file__).parent
    root = package.parent
    found = {}
    for folder in (package, root / "models", root / "inference"):
        for path in folder.rglob("*.py"):
            # The benchmark races against the plain calls, on matrices of at most 64 rows.
            if path == package / "numerics" / "linalg.py" or path.parent.name == "bench":
                continue
            if calls := direct_calls(path.read_text()):
                found[str(path.relative_to(root))] = set(calls)
    # One matrix at a time beyond 64 rows, see test_krylov.py; eigenvectors without derivatives, which alone need LU.
    assert found.pop("probattn/numerics/lu.py") == {"torch.linalg.lu_factor_ex", "torch.linalg.lu_solve"}
    for module in ("probattn/numerics/krylov.py", "inference/claims/realness.py"):
        assert found.pop(module) == {"torch.linalg.eig"}
    assert found == {}


def test_the_rule_for_other_modules_sees_every_spelling():
    source = """
        import torch
        from torch.linalg import inv
        from torch import linalg
        torch.linalg.solve(a, b); torch.inverse(a); a.det(); a.logdet(); (a @ b).inverse(); torch.lu_solve(b, lu, p)
    """
    assert len(direct_calls(textwrap.dedent(source))) == 8
    assert direct_calls("linalg.det(a); np.linalg.inv(a); torch.linalg.cholesky(a); transform.inv(x)") == []
