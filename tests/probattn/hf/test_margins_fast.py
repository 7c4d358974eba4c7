"""Accelerated margins against dense linear algebra: all families, both maps, near singular blocks, complex pairs."""

import numpy as np
import pytest
import torch
from layer_zoo import FAMILIES, Exact, own_blocks, own_run, tiny

from probattn.hf import measure, spectra
from probattn.hf.layers import attention_layer
from probattn.hf.margins import margins

IDS = torch.randint(16, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fast(monkeypatch):
    """Small models go the way of large ones."""
    monkeypatch.setattr(spectra, "DENSE", 0)


def dense(blocks, sign):
    """The margins of I - s M by definition, from blocks M, (..., p, p)."""
    whole = torch.eye(blocks.shape[-1], dtype=blocks.dtype) - sign * blocks
    values = torch.linalg.eigvals(whole)
    lone = values.imag.abs() < 1e-9
    signs, logabs = torch.linalg.slogdet(whole)
    return {
        "sign": signs,
        "logabsdet": logabs,
        "sigma_min": torch.linalg.svdvals(whole)[..., -1],
        "spectral": values.real.where(lone, torch.inf).amin(-1),
        "complex": values.real.amin(-1),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_automatic_differentiation_of_its_own_code(family, fast):
    model = tiny(family)
    with Exact():
        found = margins(model, IDS[:1], attribution=True, layers=[1])
        stream = own_run(model, 1, IDS[:1])[0].detach()[0]
        blocks = own_blocks(model, 1, stream).detach()
    for sign, prefix in ((1, ""), (-1, "update_")):
        for name, expected in dense(blocks, sign).items():
            at = found[prefix + name].sel(layer=1).isel(sequence=0)
            np.testing.assert_allclose(at, expected, atol=2e-8, rtol=1e-7, err_msg=prefix + name)
    inverse = torch.linalg.inv(torch.eye(blocks.shape[-1], dtype=blocks.dtype) - blocks)
    trace = -(inverse @ blocks).diagonal(dim1=-2, dim2=-1).sum(-1)
    np.testing.assert_allclose(found.attribution.isel(sequence=0, layer=0).sum("head"), trace, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_single_precision_stays_near_double(family, fast):
    double = margins(tiny(family), IDS)
    single = margins(tiny(family, torch.float32), IDS)
    assert single.attrs["dtype"] == "float32"
    for name in ("logabsdet", "sigma_min", "complex", "update_logabsdet", "update_sigma_min"):
        np.testing.assert_allclose(single[name], double[name], atol=5e-3, rtol=2e-3, err_msg=name)
    counted = np.isclose(single.spectral, double.spectral, atol=1e-2)
    assert counted.mean() > 0.9  # a pair of close real eigenvalues may be a complex one after rounding


class Blocks:
    """Factors of given blocks: one head as wide as the stream, its covariance the block."""

    def __new__(cls, blocks, narrow=False):
        layer = attention_layer(tiny("llama"), 0, check=False).detach()
        stream = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        factors = layer.mean_and_factors(stream).factors
        count, size = blocks.shape[:2]
        eye = torch.eye(size, dtype=torch.float64)
        zeros = torch.zeros(count, 1, size, dtype=torch.float64)
        return factors._replace(
            covariance=blocks.unsqueeze(1),
            own_weight=torch.zeros(count, 1, dtype=torch.float64),
            own_value=zeros,
            own_key=zeros,
            query=eye.unsqueeze(0),
            key=eye.unsqueeze(0),
            value=eye.unsqueeze(0),
            output=eye.unsqueeze(1),
            norm=None,
            output_norm=None,
            tokens=torch.Size([count]),
        )


def blocks_with(values, size=24, seed=0):
    """A block, not normal, with some eigenvalues, and others in a small disc."""
    generator = torch.Generator().manual_seed(seed)
    core = 0.05 * torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    place = 0
    for value in values:
        width = 2 if isinstance(value, complex) else 1
        core[place : place + width] = 0.0
        core[:, place : place + width] = 0.0
        core[place, place] = complex(value).real
        if width == 2:
            core[place + 1, place + 1] = value.real
            core[place, place + 1], core[place + 1, place] = value.imag, -value.imag
        place += width
    basis = torch.eye(size, dtype=torch.float64)
    basis = basis + 0.3 * torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    return (basis @ core @ torch.linalg.inv(basis)).unsqueeze(0)


KINDS = ("logabsdet", "sigma_min", "spectral", "complex")


@pytest.mark.parametrize("distance", [1e-2, 1e-6, 1e-10])
def test_near_singular_blocks(distance, fast):
    block = blocks_with([1.0 - distance, -1.0 + distance])
    found = spectra.block_margins(Blocks(block), KINDS).values
    for sign, prefix in ((1, ""), (-1, "update_")):
        expected = dense(block, sign)
        assert float(found[f"{prefix}logabsdet"]) == pytest.approx(float(expected["logabsdet"]), abs=1e-5)
        assert float(found[f"{prefix}sigma_min"]) == pytest.approx(float(expected["sigma_min"]), abs=1e-13, rel=1e-4)
        assert float(found[f"{prefix}spectral"]) == pytest.approx(distance, abs=1e-12, rel=1e-3)
    assert found["sign"] == 1
    beyond = spectra.block_margins(Blocks(blocks_with([1.0 + distance])), KINDS).values
    assert beyond["sign"] == -1
    assert beyond["spectral"] < 0


def test_an_exactly_singular_block_has_no_margin_and_no_sign(fast):
    block = torch.diag(torch.tensor([1.0] + [0.2] * 23, dtype=torch.float64)).unsqueeze(0)
    seen = spectra.block_margins(Blocks(block), KINDS)
    assert float(seen.values["sign"]) == 0
    assert float(seen.values["logabsdet"]) == -torch.inf
    assert float(seen.values["sigma_min"]) == pytest.approx(0.0, abs=1e-12)  # by dense singular values
    assert seen.dense["sigma_min"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("height", [1e-2, 0.3])
def test_complex_pairs_are_no_real_eigenvalues(dtype, height, fast):
    block = blocks_with([0.95 + 1j * height, 0.5, -0.9 + 1j * height, -0.4])
    factors = Blocks(block)
    factors = factors._replace(**{name: getattr(factors, name).to(dtype) for name in factors._fields[:8]})
    found = spectra.block_margins(factors, KINDS).values
    assert float(found["spectral"]) == pytest.approx(0.5, abs=1e-3)
    assert float(found["update_spectral"]) == pytest.approx(0.6, abs=1e-3)
    assert float(found["complex"]) == pytest.approx(0.05, abs=1e-3)
    counted_as_real = float(dense(block, 1)["complex"])
    assert abs(counted_as_real - float(found["spectral"])) > 0.4  # the control: counting the pair gives another number


def test_what_krylov_methods_leave_open_is_computed_densely(fast, monkeypatch):
    block = blocks_with([0.9, 0.8 + 0.1j])
    expected = spectra.block_margins(Blocks(block), KINDS)
    assert not any(expected.dense.values())
    monkeypatch.setattr(spectra, "SINGULAR_TOLERANCE", {torch.float64: -1.0})
    monkeypatch.setattr(spectra, "EIGENVALUE_TOLERANCE", {torch.float64: -1.0})
    found = spectra.block_margins(Blocks(block), KINDS)
    assert set(found.dense.values()) == {1}
    for name, value in found.values.items():
        torch.testing.assert_close(value, expected.values[name], rtol=0, atol=1e-9)


def turned_bases(model, number):
    """Another basis of the values of each key head, and the same function."""
    attention = model.model.layers[number].self_attn
    groups = model.config.num_key_value_heads
    heads = model.config.num_attention_heads
    size = attention.v_proj.weight.shape[0] // groups
    generator = torch.Generator().manual_seed(1)
    turns = torch.eye(size, dtype=torch.float64) + 0.5 * torch.randn(
        groups, size, size, generator=generator, dtype=torch.float64
    )
    value = attention.v_proj.weight.data.view(groups, size, -1)
    attention.v_proj.weight.data = (turns @ value).flatten(0, 1)
    output = attention.o_proj.weight.data.view(-1, heads, size)
    back = torch.linalg.inv(turns).repeat_interleave(heads // groups, 0)
    attention.o_proj.weight.data = torch.einsum("phd,hde->phe", output, back).flatten(1)


def test_no_number_depends_on_the_basis_of_a_head(fast):
    model = tiny("llama")
    with Exact():
        before = margins(model, IDS, attribution=True)
        logits = model(IDS).logits
        turned_bases(model, 0)
        turned_bases(model, 1)
        torch.testing.assert_close(model(IDS).logits, logits, rtol=0, atol=1e-9)
        after = margins(model, IDS, attribution=True)
    for name in before.data_vars:
        np.testing.assert_allclose(after[name], before[name], atol=1e-8, rtol=1e-8, err_msg=name)
    assert before.attrs["weights_sha256"] != after.attrs["weights_sha256"]
    model.model.layers[0].self_attn.o_proj.weight.data *= 1.1  # the control: this is another function
    assert not np.allclose(margins(model, IDS).logabsdet, before.logabsdet, atol=1e-3)


def test_the_size_of_a_chunk_does_not_matter(fast):
    model = tiny("qwen3")
    whole = margins(model, IDS)
    pieces = margins(model, IDS, memory=1)
    for name in whole.data_vars:
        np.testing.assert_allclose(pieces[name], whole[name], atol=1e-8, err_msg=name)


def test_a_device_out_of_memory_is_asked_for_less(fast, monkeypatch):
    model = tiny("llama")
    whole = margins(model, IDS)
    asked = []

    def scarce(factors, *arguments, **options):
        asked.append(len(factors.own_weight))
        if len(factors.own_weight) > 2:
            raise torch.OutOfMemoryError("none left")
        return spectra.block_margins(factors, *arguments, **options)

    monkeypatch.setattr(measure, "block_margins", scarce)
    found = margins(model, IDS)
    assert max(asked) > 2
    for name in whole.data_vars:
        np.testing.assert_allclose(found[name], whole[name], atol=1e-8, err_msg=name)

    def broken(*arguments, **options):
        raise RuntimeError("something else")

    monkeypatch.setattr(measure, "block_margins", broken)
    with pytest.raises(RuntimeError, match="something else"):
        margins(model, IDS)
