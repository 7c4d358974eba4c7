"""Log-determinants and their gradients from probes: exact over a complete set of signs, and near a singular block."""

import math

import pytest
import scipy.linalg
import torch
from layer_zoo import FAMILIES, stream, tiny
from torch import nn

import probattn.hf.penalty as penalty_module
from probattn.errors import InputError
from probattn.hf.directional import token_map
from probattn.hf.layers import attention_layer
from probattn.hf.layers.sublayer import project
from probattn.hf.penalty import require_probes, residual_penalty
from probattn.hf.probes import probe_signs, probed_logabsdet
from probattn.hf.stream import Stream

ROWS = torch.tensor([0, 2, 5, 6])


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def visible(length):
    """A mask that hides the first token of the second sequence, and the token before each third one."""
    mask = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    mask[1, :, 1:, 0] = False
    mask[:, :, 3::3, 2] = False
    return mask


@pytest.mark.parametrize("masked", [False, True])
def test_products_with_the_blocks(family, masked):
    model = tiny(family)
    layer, u = attention_layer(model, 1), stream(model, 7, batch=(2,))
    mask = visible(7) if masked else None
    sublayer = layer.sublayer
    block = token_map(sublayer, u, project(sublayer, u, torch.arange(7).unsqueeze(0), ROWS), ROWS, mask)
    dense = (layer if mask is None else layer.seeing(mask.squeeze(1))).mean_jacobian(u, ROWS)
    z = torch.randn(2, 4, 3, 16, dtype=u.dtype, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block.product(z).mT, dense @ z.mT, rtol=0, atol=1e-11)
    torch.testing.assert_close(block.transposed_product(z).mT, dense.mT @ z.mT, rtol=0, atol=1e-11)
    assert dense.abs().max() > 0.1


class Complete:
    """Instead of random signs, a complete set of orthogonal ones: the mean over them is the trace, exactly."""

    def __init__(self, signs):
        self.signs = signs

    def __call__(self, shape, like):
        return self.signs.to(like).expand(*shape[:-2], *self.signs.shape)


HADAMARD = torch.tensor(scipy.linalg.hadamard(16))


def values_and_gradients(model, u, kind="logdet", **options):
    layer = attention_layer(model, 1)
    leaf = u.clone().requires_grad_()
    found = residual_penalty(layer, Stream(leaf, None, None, None), ROWS, kind, **options)
    weights = torch.linspace(0.5, 1.5, found.values.numel()).view(found.values.shape)
    own = dict(attention_layer_parameters(model))
    parts = torch.autograd.grad((found.values * weights).sum(), [leaf, *own.values()], allow_unused=True)
    return found, dict(zip(["stream", *own], parts, strict=True))


def attention_layer_parameters(model):
    body = model.base_model
    block = (body.h if hasattr(body, "h") else body.layers)[1]
    return [(name, part) for name, part in block.named_parameters() if "mlp" not in name and "feedforward" not in name]


def test_value_and_gradient_over_a_complete_set_are_exact(family, monkeypatch):
    model = tiny(family)
    u = stream(model, 7, batch=(2,))
    exact, expected = values_and_gradients(model, u)
    monkeypatch.setattr(penalty_module, "probe_signs", Complete(HADAMARD))
    found, parts = values_and_gradients(model, u, probes=16)
    torch.testing.assert_close(found.values, exact.values, rtol=1e-6, atol=1e-6)
    for name, part in expected.items():
        assert (part is None) == (parts[name] is None), name
        if part is not None:
            torch.testing.assert_close(parts[name], part, rtol=1e-5, atol=1e-9 + 1e-5 * float(part.abs().max()))
    # Control: some of them are not the trace.
    monkeypatch.setattr(penalty_module, "probe_signs", Complete(HADAMARD[:3]))
    some, parts = values_and_gradients(model, u, probes=3)
    assert (some.values - exact.values).abs().max() > 1e-2
    assert (parts["stream"] - expected["stream"]).abs().max() > 1e-2 * expected["stream"].abs().max()


def test_random_signs_are_unbiased():
    model = tiny("llama")
    u = stream(model, 7)
    exact, _ = values_and_gradients(model, u.expand(1, -1, -1))
    torch.manual_seed(0)
    found, _ = values_and_gradients(model, u.expand(400, -1, -1), probes=1)  # 400 draws in one call
    assert_mean(found.values, exact.values[0])
    assert_mean(0.5 * found.values, exact.values[0], agree=False)


def assert_mean(draws, expected, agree=True):
    """Means of draws, (N, ...), within four standard errors of what is expected, or some of them not."""
    error = draws.detach().std(0) / len(draws) ** 0.5
    apart = ((draws.detach().mean(0) - expected.detach()).abs() / error).amax()
    assert (float(apart) < 4) == agree


def test_a_non_linear_kind_of_an_estimate_would_be_biased():
    """The reason for the refusal: the mean of max(0, estimate) lies above max(0, mean)."""
    model = tiny("gpt2")
    u = stream(model, 7)
    exact, _ = values_and_gradients(model, u.expand(1, -1, -1), "one_sided")
    torch.manual_seed(0)
    found, _ = values_and_gradients(model, u.expand(400, -1, -1), probes=1)
    assert_mean(found.values.relu(), exact.values[0], agree=False)
    with pytest.raises(InputError, match=r"'one_sided': probes estimate log.det J. without bias, and a non-linear"):
        require_probes("one_sided", 1)
    with pytest.raises(InputError, match="probes is 0"):
        require_probes("logdet", 0)
    require_probes("one_sided", None)


def test_in_single_precision():
    u = stream(tiny("llama"), 7, batch=(2,))
    exact, expected = values_and_gradients(tiny("llama"), u)
    double = penalty_module.probe_signs
    try:
        penalty_module.probe_signs = Complete(HADAMARD)
        found, parts = values_and_gradients(tiny("llama", torch.float32), u.float(), probes=16)
    finally:
        penalty_module.probe_signs = double
    torch.testing.assert_close(found.values.double(), exact.values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        parts["stream"].double(), expected["stream"], rtol=1e-2, atol=2e-3 * float(expected["stream"].abs().max())
    )


class TestLanczos:
    def matrices(self, smallest=0.3):
        generator = torch.Generator().manual_seed(1)
        left, right = (torch.linalg.qr(torch.randn(5, 12, 12, generator=generator).double())[0] for _ in range(2))
        singular = torch.linspace(smallest, 3.0, 12, dtype=torch.float64)
        return left * singular @ right

    def run(self, matrix, z, **options):
        return probed_logabsdet(lambda x: x @ matrix.mT, lambda x: x @ matrix, z, **options)

    def test_solution_and_quadrature(self):
        matrix = self.matrices()
        z = probe_signs((5, 2, 12), matrix)
        found = self.run(matrix, z)
        torch.testing.assert_close(found.solution, torch.linalg.solve(matrix.mT, z.mT).mT, rtol=1e-6, atol=1e-6)
        values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
        expected = ((z @ vectors).square() * values.log().unsqueeze(-2)).sum(-1) / 2
        torch.testing.assert_close(found.logabsdet, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found.smallest, torch.full((5,), 0.3).double(), rtol=1e-6, atol=0)

    def test_fewer_steps_are_less_exact(self):
        matrix = self.matrices()
        z = probe_signs((5, 1, 12), matrix)
        exact = torch.linalg.solve(matrix.mT, z.mT).mT
        errors = [float((self.run(matrix, z, steps=k).solution - exact).abs().max()) for k in (2, 6, 12)]
        assert errors[0] > 1.5 * errors[1] > 1000 * errors[2]

    def test_an_exhausted_space(self):
        """Identity and multiples of it: one step is all, and what follows must not disturb it."""
        matrix = torch.stack([torch.eye(12), 0.5 * torch.eye(12), *self.matrices().float()[:1]]).double()
        z = probe_signs((3, 1, 12), matrix)
        found = self.run(matrix, z)
        assert torch.isfinite(found.solution).all()
        torch.testing.assert_close(found.logabsdet[:2, 0], 12 * torch.tensor([1.0, 0.5]).double().log())
        torch.testing.assert_close(found.solution[1], 2 * z[1])
        torch.testing.assert_close(found.smallest[:2], torch.tensor([1.0, 0.5]).double())

    def test_near_a_singular_block(self):
        matrix = self.matrices(smallest=1e-3)
        z = probe_signs((5, 1, 12), matrix)
        found = self.run(matrix, z)
        torch.testing.assert_close(found.smallest, torch.full((5,), 1e-3).double(), rtol=1e-3, atol=0)
        assert float(found.solution.norm(dim=-1).amax()) > 10

    def test_signs_are_signs(self):
        torch.manual_seed(0)
        signs = probe_signs((1000, 2, 3), torch.ones(1, dtype=torch.float64))
        assert signs.dtype == torch.float64
        assert set(signs.unique().tolist()) == {-1.0, 1.0}
        assert float(signs.mean().abs()) < 4 / math.sqrt(signs.numel())


def test_chunks_of_the_exact_penalty_change_nothing(monkeypatch):
    model = tiny("gemma2")
    u = stream(model, 7, batch=(2,))
    for kind in ("one_sided", "singular_value"):
        whole, expected = values_and_gradients(model, u, kind)
        with monkeypatch.context() as patch:
            patch.setattr(penalty_module, "_NUMBERS", 3 * 16 * 16)
            found, parts = values_and_gradients(model, u, kind)
        torch.testing.assert_close(found.values, whole.values, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.margins, whole.margins, rtol=0, atol=1e-12)
        torch.testing.assert_close(parts["stream"], expected["stream"], rtol=1e-9, atol=1e-12)


def test_half_precision_is_computed_in_single():
    model = tiny("llama", torch.bfloat16)
    assert all(isinstance(part, nn.Parameter) and part.dtype == torch.bfloat16 for part in model.parameters())
    u = stream(model, 7, batch=(2,))
    found, parts = values_and_gradients(model, u)
    assert found.values.dtype == torch.float32
    assert parts["stream"].dtype == torch.bfloat16


def test_where_the_process_is_slow_a_factorisation_takes_over(monkeypatch):
    """One step is too few for all of them: values are exact, and gradients those of the solution."""
    model = tiny("llama")
    u = stream(model, 7, batch=(2,))
    exact, _ = values_and_gradients(model, u)
    monkeypatch.setattr(penalty_module, "probe_signs", Complete(HADAMARD[:3]))
    _, expected = values_and_gradients(model, u, probes=3)
    monkeypatch.setattr(penalty_module, "_STEPS", (1, 2))
    found, parts = values_and_gradients(model, u, probes=3)
    torch.testing.assert_close(found.values, exact.values, rtol=0, atol=1e-10)
    torch.testing.assert_close(parts["stream"], expected["stream"], rtol=1e-5, atol=1e-7)
