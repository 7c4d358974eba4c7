"""What is not covered is refused by name, with what is missing."""

import re
from pathlib import Path

import pytest
import torch
from layer_zoo import stream, tiny
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from probattn.errors import InputError
from probattn.hf.layers import attention_layer, covered


def test_a_family_that_is_not_covered():
    sizes = {"hidden_size": 8, "ffn_dim": 8, "word_embed_proj_dim": 8}
    model = OPTForCausalLM(OPTConfig(vocab_size=8, num_hidden_layers=1, num_attention_heads=2, **sizes))
    with pytest.raises(InputError, match=r"'opt' is not covered.*gemma2.*short file"):
        attention_layer(model, 0)
    assert {"gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "phi"} <= {*covered()}


def test_no_model_of_transformers():
    with pytest.raises(InputError, match=r"Linear has no config.model_type"):
        attention_layer(nn.Linear(2, 2), 0)


@pytest.mark.parametrize("number", [2, -3])
def test_a_layer_that_is_not_there(number):
    with pytest.raises(InputError, match=f"layer {number} was asked for; LlamaForCausalLM has 2"):
        attention_layer(tiny("llama"), number)


def test_a_parameter_that_is_not_finite():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    attention_layer(model, 0)
    with pytest.raises(InputError, match="the attention of layer 1 is not finite: nan"):
        attention_layer(model, 1)


def test_a_linear_map_that_is_none():
    class Adapted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    attention.v_proj = Adapted(attention.v_proj)
    with pytest.raises(InputError, match=r"v_proj of LlamaAttention is a Adapted.*merge_and_unload"):
        attention_layer(model, 0)


def test_a_norm_of_another_kind():
    model = tiny("gpt2")
    model.transformer.h[0].ln_1 = nn.RMSNorm(16).double()
    with pytest.raises(InputError, match=r"RMSNorm, where nn.LayerNorm is expected"):
        attention_layer(model, 0)


def test_a_module_that_computes_something_else():
    """The parameters look right and the code is another: the comparison with the model's own code sees it."""
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    attention.register_forward_hook(lambda module, args, output: (1.5 * output[0], *output[1:]))
    attention_layer(model, 0)
    with pytest.raises(InputError, match="layer 1 of LlamaForCausalLM does not compute what its model type 'llama'"):
        attention_layer(model, 1)
    assert attention_layer(model, 1, check=False).number == 1


def test_attention_that_looks_ahead():
    model = tiny("gemma3")
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(InputError, match="Gemma3Attention looks ahead"):
        attention_layer(model, 0)


def test_missing_modules():
    model = tiny("llama")
    del model.model.rotary_emb
    with pytest.raises(InputError, match="no rotary embedding"):
        attention_layer(model, 0, check=False)
    model.config.model_type = "gemma2"
    del model.model.layers[0].post_attention_layernorm
    with pytest.raises(InputError, match="no module 'post_attention_layernorm'"):
        attention_layer(model, 0)
    model.config.model_type = "gpt2"
    with pytest.raises(InputError, match="no list of layers 'h'"):
        attention_layer(model, 0)


def test_precisions():
    model = tiny("llama")
    layer = attention_layer(model, 0)
    with pytest.raises(InputError, match=r"dtype is torch.float16"):
        attention_layer(model, 0, dtype=torch.float16)
    with pytest.raises(InputError, match=r"dtype is torch.bfloat16"):
        layer.to(torch.bfloat16)
    with pytest.raises(InputError, match=r"u is torch.float32.*the layer computes in torch.float64"):
        layer.mean(stream(model, 3).float())


class TestArguments:
    @pytest.fixture
    def layer(self):
        return attention_layer(tiny("llama"), 0)

    @pytest.fixture
    def u(self):
        return stream(tiny("llama"), 4)

    @pytest.mark.parametrize("shape", [(4, 15), (16,), (0, 16)])
    def test_shapes(self, layer, shape):
        with pytest.raises(InputError, match="residual stream in the last axis"):
            layer.mean(torch.zeros(shape, dtype=torch.float64))

    @pytest.mark.parametrize("rows", [[1, 0], [0, 0], [-1], [4], []])
    def test_rows(self, layer, u, rows):
        with pytest.raises(InputError, match="increasing positions between 0 and 3"):
            layer.mean_jacobian(u, torch.tensor(rows, dtype=torch.long))

    def test_positions_of_another_length(self, layer, u):
        with pytest.raises(InputError, match=r"positions has shape \(3,\)"):
            layer.at(torch.arange(3)).mean(u)

    def test_masks(self, layer, u):
        with pytest.raises(InputError, match=r"visible is torch.float32"):
            layer.seeing(torch.ones(4, 4))
        with pytest.raises(InputError, match=r"visible has shape \(3, 4\)"):
            layer.seeing(torch.ones(3, 4, dtype=torch.bool)).mean(u)
        with pytest.raises(InputError, match="a mask"):
            layer.seeing(torch.ones(4, 4, dtype=torch.bool)).context(u)

    def test_contexts(self, layer, u):
        with pytest.raises(InputError, match="the past has shape"):
            layer.context(u[:, :3])
        context = layer.context(u.expand(2, 4, 16))
        with pytest.raises(InputError, match="candidates have shape"):
            context.mean(u[0])


def test_a_layer_as_an_older_transformers_builds_it():
    model = tiny("gpt2")
    del model.transformer.h[0].attn.scaling
    with pytest.raises(InputError, match=r"layer 0 of GPT2LMHeadModel: .*'scaling'; .*transformers 5.24 and newer"):
        attention_layer(model, 0)
    extra = (Path(__file__).parents[4] / "pyproject.toml").read_text(encoding="utf-8")
    assert {*re.findall(r"transformers>=([\d.]+)", extra)} == {"5.24"}  # the message and the package say the same
