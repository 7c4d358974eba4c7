"""One pass and step by step are the same law, for this package's model and for models of the transformers library."""

import pytest
import torch

from probattn.errors import InputError
from probattn.models.discrete import HuggingFaceModel, OwnModel
from probattn.models.language import LanguageConfig, LanguageModel

VOCABULARY, LENGTH = 11, 7


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def own():
    model = LanguageModel(LanguageConfig(VOCABULARY, context=8, dim=8, layers=2, decoder_heads=2, stage_rank=3))
    return OwnModel(model, model.initial_values(0))


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=8, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(params=["own", "gpt2", "llama"])
def model(request, own):
    if request.param == "own":
        return own
    torch.manual_seed(0)
    return HuggingFaceModel({"gpt2": gpt2, "llama": llama}[request.param]().eval(), dtype=torch.float64)


def masks(side):
    cut = torch.tensor([0, 1, 3, 5])[:, None]
    places = torch.arange(LENGTH)
    return places >= cut if side == "left" else places < LENGTH - cut


def test_steps_equal_one_pass(model, tokens):
    logits = model.logits(tokens)
    assert logits.shape == (4, LENGTH, VOCABULARY)
    assert logits.dtype == model.dtype == torch.float64
    assert not logits.requires_grad
    assert logits.std() > 0.1  # a law that is not uniform, or nothing would be compared
    torch.testing.assert_close(model.steps(tokens), logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", ["logits", "steps"])
def test_padding_leaves_a_row_as_it_is(model, tokens, side, way):
    if side not in model.padding:
        pytest.skip("this model cannot be padded there")
    mask = masks(side)
    found = getattr(model, way)(tokens, mask)
    for row, shown, padded in zip(tokens, mask, found, strict=True):
        torch.testing.assert_close(padded[shown], model.logits(row[shown][None])[0], rtol=0, atol=1e-12)


def test_what_is_padding_does_not_matter(model, tokens):
    mask = masks("right")
    other = torch.where(mask, tokens, (tokens + 1) % VOCABULARY)
    torch.testing.assert_close(model.logits(other, mask)[mask], model.logits(tokens, mask)[mask], rtol=0, atol=1e-12)


def test_the_converted_copy_leaves_the_model_as_it_is():
    source = gpt2().eval()
    assert HuggingFaceModel(source, dtype=torch.float64).dtype == torch.float64
    assert source.dtype == torch.float32
    assert HuggingFaceModel(source).context == 8


def test_own_dtype(own, tokens):
    single = OwnModel(own._model, own._values, dtype=torch.float32)
    assert single.logits(tokens).dtype == torch.float32
    torch.testing.assert_close(single.logits(tokens).double(), own.logits(tokens), rtol=0, atol=1e-5)


class TestBadInput:
    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (torch.zeros(3, dtype=torch.long), r"tokens have shape \(3,\); they must be \(N, T\)"),
            (torch.zeros(0, 3, dtype=torch.long), r"shape \(0, 3\).*not empty"),
            (torch.zeros(1, 9, dtype=torch.long), r"shape \(1, 9\).*T <= 8, the model's context: cut them"),
            (torch.zeros(1, 3), r"tokens are torch.float32.*\.long\(\)"),
            (torch.tensor([[0, 1], [11, 0]]), r"tokens\[1, 0\] is 11; the vocabulary is 0\.\.10"),
            (torch.tensor([[0, -1]]), r"tokens\[0, 1\] is -1"),
        ],
    )
    @pytest.mark.parametrize("way", ["logits", "steps"])
    def test_tokens(self, model, tokens, message, way):
        with pytest.raises(InputError, match=message):
            getattr(model, way)(tokens)

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (torch.ones(1, 3), r"mask is torch.float32"),
            (torch.ones(1, 2, dtype=torch.bool), r"shape \(1, 2\); it must be boolean with the shape of tokens"),
            (torch.tensor([[True, False, True]]), r"mask\[0\] keeps 2 of 3 tokens, with padding in the middle"),
            (torch.tensor([[False, True, False]]), r"mask\[0\] keeps 1 of 3 tokens.*one side"),
            (torch.tensor([[False, False, False]]), r"mask\[0\] keeps 0 of 3"),
        ],
    )
    def test_mask(self, model, mask, message):
        with pytest.raises(InputError, match=message):
            model.logits(torch.zeros(1, 3, dtype=torch.long), mask)

    def test_left_padding_of_learnt_positions(self, own):
        with pytest.raises(InputError, match=r"mask\[0\] pads on the left; this model can be padded on the right only"):
            own.logits(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[False, True, True]]))

    def test_missing_sites(self, own):
        values = {name: value for name, value in own._values.items() if name != "position"}
        with pytest.raises(InputError, match="values lack the sites position"):
            OwnModel(own._model, values)

    def test_a_model_in_training(self):
        with pytest.raises(InputError, match=r"training mode.*call model\.eval\(\)"):
            HuggingFaceModel(gpt2().train())

    def test_another_kind_of_model(self):
        with pytest.raises(InputError, match=r"model is a Linear without config\.vocab_size"):
            HuggingFaceModel(torch.nn.Linear(2, 2).eval())
