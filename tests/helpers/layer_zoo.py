"""Small language models with random weights, one for each kind of attention layer, and what their own code computes."""

import functools

import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WORDS = 17
_COMMON = {"vocab_size": WORDS, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 8}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_LOCAL = {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]}


def _gpt2(**options):
    config = GPT2Config(vocab_size=WORDS, n_positions=32, n_embd=16, n_layer=2, n_head=4, **options)
    return GPT2LMHeadModel(config)


def _gemma3():
    options = {"head_dim": 6, "query_pre_attn_scalar": 5, **_LOCAL}
    return Gemma3ForCausalLM(Gemma3TextConfig(**_COMMON, **_HEADS, **options))


_MAKERS = {
    "gpt2": _gpt2,
    "gpt2 scaled by layer": lambda: _gpt2(scale_attn_by_inverse_layer_idx=True),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON, **_HEADS)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON, **_HEADS, attention_bias=True)),
    "llama yarn": lambda: LlamaForCausalLM(
        LlamaConfig(
            **_COMMON,
            **_HEADS,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8
            },
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_COMMON, **_HEADS, sliding_window=3)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_COMMON, **_HEADS, use_sliding_window=True, **_LOCAL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_COMMON, **_HEADS, head_dim=6)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **_COMMON, **_HEADS, head_dim=4, query_pre_attn_scalar=5, attn_logit_softcapping=1.5,
            attn_implementation="eager", **_LOCAL,
        )
    ),
    "gemma3": _gemma3,
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **_COMMON, num_attention_heads=2, rope_parameters={
                "rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5
            },
        )
    ),
    "phi": lambda: PhiForCausalLM(
        PhiConfig(**_COMMON, **_HEADS, qk_layernorm=True, rope_parameters={
            "rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5
        })
    ),
}  # fmt: skip
FAMILIES = list(_MAKERS)


def tiny(name, dtype=torch.float64, seed=0):
    """A model whose every parameter is random: gains about one, biases that matter, logits of a few units."""
    generator = torch.Generator().manual_seed(seed)
    model = _MAKERS[name]().eval()
    for path, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() == 1:
            centre = 1.0 if "norm" in path.lower() or "ln_" in path else 0.0
            centre = 0.0 if path.endswith("bias") or ("gemma" in name and centre) else centre
            drawn = centre + 0.3 * drawn
        else:
            drawn = 1.5 * drawn / parameter.shape[-1] ** 0.5
        parameter.data = drawn.to(torch.float32)
    return model.to(dtype)


def stream(model, length, seed=0, batch=()):
    """A random residual stream, (*batch, T, p), of the model's precision."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*batch, length, model.config.hidden_size, generator=generator, dtype=torch.float64)
    return (1.5 * drawn + 0.3).to(model.dtype)


class Exact(TorchFunctionMode):
    """Keep float64 where the library's code goes through float32: norms, softmax of eager code, frequencies."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float and not args[0].dtype.is_floating_point:
            return args[0].double()  # positions, before they meet frequencies
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func is torch.Tensor.to:
                args = tuple(torch.float64 if part is torch.float32 else part for part in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def sublayer_modules(model, number):
    """The decoder layer, and the module whose output is added to the stream."""
    body = model.base_model
    block = body.h[number] if hasattr(body, "h") else body.layers[number]
    for name in ("attn", "attention", "self_attn"):
        last = getattr(block, name, None)
        if last is not None:
            break
    return block, block.post_attention_layernorm if model.config.model_type.startswith("gemma") else last


def own_mean(model, number, u, **options):
    """What the model's own code adds to the stream at a layer where the stream is u, (T, p) or (B, T, p).

    The options go to the model: position_ids, attention_mask.
    """
    shown = u if u.dim() == 3 else u.unsqueeze(0)
    ids = torch.zeros(shown.shape[:2], dtype=torch.long)
    _, mean = _watch(model, number, ids, shown, options)
    return mean if u.dim() == 3 else mean.squeeze(0)


def own_run(model, number, ids):
    """The stream in front of a layer and what the layer adds to it, (B, T, p) each, when the model reads ids."""
    return _watch(model, number, ids, None, {})


def _watch(model, number, ids, replaced, options):
    block, last = sublayer_modules(model, number)
    seen = {}

    def enter(module, args, kwargs):
        seen["stream"] = args[0] if args else kwargs["hidden_states"]
        if replaced is None:
            return None
        return ((replaced, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": replaced})

    def leave(module, args, output):
        seen["mean"] = output[0] if isinstance(output, tuple) else output

    hooks = [
        block.register_forward_pre_hook(enter, with_kwargs=True),
        last.register_forward_hook(leave),
    ]
    try:
        model(input_ids=ids, use_cache=False, **options)
    finally:
        for hook in hooks:
            hook.remove()
    return seen["stream"], seen["mean"]


def own_blocks(model, number, u):
    """Diagonal blocks of the Jacobian of :func:`own_mean`, (T, p, p), by automatic differentiation."""
    whole = torch.autograd.functional.jacobian(functools.partial(own_mean, model, number), u)  # (T, p, T, p)
    return torch.stack([whole[i, :, i] for i in range(len(u))])
