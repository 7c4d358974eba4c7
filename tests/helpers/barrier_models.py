"""Small language models in training, and the gradient of their loss with the penalty added by hand."""

import torch
import transformers
from layer_zoo import WORDS, own_mean, sublayer_modules, tiny
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

BATCH, LENGTH, WEIGHT = 3, 6, 0.3


def build(name="gpt2", dtype=torch.float64):
    """A model in training mode without dropout."""
    model = without_dropout(tiny(name, dtype).train())
    model.loss_type = "ForCausalLM"  # what transformers finds out by a logged warning, which does not compile
    return model


def without_dropout(model):
    """The model with every dropout at zero."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch(side=None, size=BATCH, length=LENGTH):
    """input_ids, labels and, with padding of 0, 1, 2 tokens, attention_mask."""
    ids = torch.randint(WORDS, (size, length), generator=torch.Generator().manual_seed(1))
    if side is None:
        return {"input_ids": ids, "labels": ids}
    cut = torch.arange(size)[:, None]
    place = torch.arange(length)
    mask = place >= cut if side == "left" else place < length - cut
    return {"input_ids": ids, "labels": ids.masked_fill(~mask, -100), "attention_mask": mask.long()}


def predicted(data):
    """Number of labels that the loss is a mean of."""
    return (data["labels"][:, 1:] != -100).sum()


def gradients(model):
    """Gradients by name."""
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


def step(model, data, scale=1.0):
    """Gradients of one pass."""
    model.zero_grad()
    (scale * model(**data).loss).backward()
    return gradients(model)


def distance(found, expected):
    """Relative, of the gradients as one vector."""
    assert found.keys() == expected.keys()
    gap = sum((found[name] - expected[name]).double().square().sum() for name in expected)
    return float((gap / sum(part.double().square().sum() for part in expected.values())).sqrt())


def checkpointing(model, reentrant):
    """Recompute activations; the method has another name from transformers 5.24 on."""
    options = {"use_reentrant": reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def watched(model, data):
    """The output of a pass, and the stream in front of each layer, with its graph."""
    streams = []

    def enter(module, args, kwargs):
        streams.append(args[0] if args else kwargs["hidden_states"])

    blocks = {sublayer_modules(model, number)[0] for number in range(model.config.num_hidden_layers)}
    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    output = model(**data)
    for hook in hooks:
        hook.remove()
    return output, streams


def blocks_by_hand(model, data, streams):
    """J = I - dmu_i/du_i of every layer, (layers, B, T, p, p), by automatic differentiation of the model's own code."""
    found = []
    for number, stream in enumerate(streams):
        rows = []
        for n, u in enumerate(stream):
            options = {}
            if "attention_mask" in data:
                options["attention_mask"] = data["attention_mask"][n : n + 1]
            whole = torch.autograd.functional.jacobian(
                lambda x, number=number, options=options: own_mean(model, number, x, **options), u, create_graph=True
            )  # (T, p, T, p)
            rows.append(torch.eye(u.shape[-1]) - torch.stack([whole[i, :, i] for i in range(len(u))]))
        found.append(torch.stack(rows))
    return torch.stack(found)


def by_hand(model, data, kind="one_sided", weight=WEIGHT):
    """Gradients of CE + lambda penalty by autograd from these blocks, the penalty per label, and the determinants."""
    model.zero_grad()
    with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivative
        output, streams = watched(model, data)
        blocks = blocks_by_hand(model, data, streams)
    literal = -torch.linalg.slogdet(blocks).logabsdet  # (layers, B, T)
    literal = literal.relu() if kind == "one_sided" else literal
    kept = data.get("attention_mask", torch.ones(literal.shape[1:]))
    total = (literal * kept).sum() / len(streams) / predicted(data)
    (output.loss + weight * total).backward()
    return gradients(model), float(total.detach()), torch.linalg.det(blocks.detach())


_SMALL = {
    "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_LINEAR = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4
}  # fmt: skip
_OF_FOUR = {"head_dim": 4}
ARCHITECTURES = {
    "GPT2": {}, "Llama": {}, "Mistral": {}, "Qwen2": {}, "Qwen3": _OF_FOUR, "Gemma2": _OF_FOUR, "Gemma3Text": _OF_FOUR,
    "GPTNeoX": {}, "Phi": {}, "Phi3": {}, "Gemma": _OF_FOUR, "Olmo": {}, "Olmo2": {}, "Cohere": {}, "Cohere2": {},
    "StableLm": {}, "Starcoder2": {}, "Granite": {}, "Glm": _OF_FOUR, "Glm4": _OF_FOUR, "Helium": _OF_FOUR,
    "Falcon": {}, "Bloom": {}, "OPT": {"word_embed_proj_dim": 16, "ffn_dim": 8}, "GPTJ": {"rotary_dim": 2},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]]}, "GPTBigCode": {}, "CodeGen": {"rotary_dim": 2},
    "Mpt": {"d_model": 16, "n_layers": 2, "n_heads": 4}, "Mixtral": {"num_local_experts": 4}, "Qwen2Moe": _EXPERTS,
    "Qwen3Moe": {**_EXPERTS, **_OF_FOUR}, "SmolLM3": {}, "Ernie4_5": _OF_FOUR, "Arcee": {}, "Persimmon": {},
    "Nemotron": {}, "Mamba": {"state_size": 4}, "RecurrentGemma": {}, "Qwen3Next": {**_OF_FOUR, **_EXPERTS, **_LINEAR},
    "GptOss": {**_OF_FOUR, "num_local_experts": 4},
}  # fmt: skip
"""Configurations by name, with what they need beside the sizes that all share; most run on plain attention."""

_SINGLE = {"Mixtral", "Qwen2Moe", "Qwen3Moe", "Qwen3Next", "GptOss"}  # the library has no experts in double precision


def zoo(name):
    """A small causal language model of an architecture, with random weights."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**_SMALL, **ARCHITECTURES[name]})
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = without_dropout(model)
    return model if name in _SINGLE else model.double()
