"""A layer is what the model's own code computes, for every family that is covered."""

import copy
import io
import pickle

import pytest
import torch
from layer_zoo import FAMILIES, WORDS, Exact, own_blocks, own_mean, own_run, stream, tiny
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from probattn import log_barrier, stability_margin, support_tokens
from probattn.hf.layers import attention_layer
from probattn.hf.layers import layer as layer_module
from probattn.solve.token import find_token


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def dense(layer, u):
    return torch.eye(layer.dim, dtype=u.dtype) - layer.mean_jacobian(u)


@pytest.mark.parametrize("number", [0, 1])
class TestAgainstTheModelsOwnCode:
    def test_the_mean_on_a_random_stream(self, family, number):
        model = tiny(family)
        u = stream(model, 7)
        with Exact(), torch.no_grad():
            layer = attention_layer(model, number)
            error = (layer.mean(u) - own_mean(model, number, u)).abs().max()
        assert error < 1e-10

    def test_the_mean_on_the_models_own_stream(self, family, number):
        model = tiny(family)
        ids = torch.randint(WORDS, (2, 9), generator=torch.Generator().manual_seed(1))
        with Exact(), torch.no_grad():
            u, mean = own_run(model, number, ids)
            error = (attention_layer(model, number).mean(u) - mean).abs().max()
        assert error < 1e-10

    def test_the_blocks(self, family, number):
        model = tiny(family)
        u = stream(model, 7)
        with Exact():
            layer, own = attention_layer(model, number), own_blocks(model, number, u)
            blocks, determinant = layer.mean_jacobian(u), layer.logabsdet(u)
        assert own.abs().max() > 0.1  # there is something to see
        assert (blocks - own).abs().max() < 1e-8
        sign, value = torch.linalg.slogdet(torch.eye(layer.dim, dtype=u.dtype) - own)
        assert torch.equal(determinant[0], sign)
        assert (determinant[1] - value).abs().max() < 1e-8

    def test_in_single_precision(self, family, number):
        model = tiny(family, dtype=torch.float32)
        u = stream(model, 7)
        layer, own = attention_layer(model, number), own_blocks(model, number, u)
        torch.testing.assert_close(layer.mean(u), own_mean(model, number, u), rtol=1e-4, atol=1e-5)
        assert (layer.mean_jacobian(u) - own).abs().max() < 1e-4 * own.abs().max()


def test_the_language_model_inside_a_model_of_pictures():
    text = Gemma3TextConfig(
        vocab_size=WORDS, num_hidden_layers=2, hidden_size=16, intermediate_size=8, num_attention_heads=2,
        num_key_value_heads=1, head_dim=6, layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = Gemma3Config(text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config)
    u = torch.randn(4, 16)
    inner = attention_layer(model.model.language_model, 1)
    torch.testing.assert_close(attention_layer(model, 1).jacobian(u), inner.jacobian(u))


class TestThePlaceOfTheToken:
    def test_the_normalised_input_is_another_token(self, family):
        """Control: without the Jacobian of the norm in front the blocks are others."""
        model = tiny(family)
        u = 4 * stream(model, 7)
        layer = attention_layer(model, 1)
        factors = layer.mean_and_factors(u).factors
        wrong = factors._replace(norm=None).mean_jacobian()
        assert (wrong - factors.mean_jacobian()).abs().max() > 0.1

    @pytest.mark.parametrize("options", [{"scaled": 1}, {"scaled": 3}])
    def test_positions_are_those_of_the_rotation(self, family, options):
        model = tiny(family)
        u = stream(model, 6)
        positions = torch.tensor([0, 1, 2, 3, 4, 5]) * options["scaled"] + 2
        with Exact(), torch.no_grad():
            layer = attention_layer(model, 0).at(positions)
            own = own_mean(model, 0, u, position_ids=positions[None], attention_mask=torch.ones(1, 6))
            assert (layer.mean(u) - own).abs().max() < 1e-10
            plain = attention_layer(model, 0).mean(u)
        moved = (layer.mean(u) - plain).abs().max()
        assert (moved > 1e-3) == (options["scaled"] == 3 and "gpt2" not in family)  # rotations are relative

    def test_padding_in_front(self, family):
        model = tiny(family)
        u = stream(model, 7)
        seen = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
        visible = torch.ones(7, 7, dtype=torch.bool).tril() & seen.bool()
        with Exact(), torch.no_grad():
            layer = attention_layer(model, 0)
            window = layer.sublayer.window
            if window is not None:
                visible = visible.triu(1 - window)
            layer = layer.seeing(visible).at((seen.cumsum(-1) - 1).clamp(min=0)[0])
            own = own_mean(model, 0, u, attention_mask=seen, position_ids=(seen.cumsum(-1) - 1).clamp(min=0))
            assert (layer.mean(u) - own)[2:].abs().max() < 1e-10
            alone = attention_layer(model, 0)
            assert (layer.mean_jacobian(u)[2:] - alone.mean_jacobian(u[2:])).abs().max() < 1e-10
        assert bool((layer.mean_jacobian(u)[:2] == 0).all())  # a token of padding sees nothing


class TestFactors:
    def test_the_core_has_the_determinant_and_the_eigenvalues(self, family):
        model = tiny(family)
        u = stream(model, 5)
        factors = attention_layer(model, 1).mean_and_factors(u).factors
        block, core = factors.mean_jacobian(), factors.head_core()
        identity = torch.eye(core.shape[-1], dtype=u.dtype)
        expected = torch.linalg.slogdet(torch.eye(block.shape[-1], dtype=u.dtype) - block)
        found = torch.linalg.slogdet(identity - core)
        assert torch.equal(found.sign, expected.sign)
        torch.testing.assert_close(found.logabsdet, expected.logabsdet, rtol=0, atol=1e-10)
        for power in (1, 2, 3):
            torch.testing.assert_close(*(trace(torch.linalg.matrix_power(m, power)) for m in (block, core)))

    def test_products_without_the_blocks(self, family):
        model = tiny(family)
        u = stream(model, 5)
        factors = attention_layer(model, 1).mean_and_factors(u).factors
        block, columns = factors.mean_jacobian(), torch.randn(5, 16, 3, dtype=u.dtype)
        torch.testing.assert_close(factors.product(columns), block @ columns)
        torch.testing.assert_close(factors.transposed_product(columns), block.mT @ columns)
        basis = torch.eye(factors.size, dtype=u.dtype).expand(5, -1, -1)
        torch.testing.assert_close(factors.to_heads(factors.to_stream(basis)), factors.head_core())

    def test_in_chunks_and_rows(self, family, monkeypatch):
        model = tiny(family)
        u = stream(model, 9, batch=(2,))
        layer, rows = attention_layer(model, 1), torch.tensor([0, 2, 5, 8])
        whole = layer.mean_jacobian(u), layer.core(u), *layer.logabsdet(u), *layer.residual_and_logabsdet(u)
        some = layer.mean_jacobian(u, rows), layer.core(u, rows), *layer.logabsdet(u, rows)
        monkeypatch.setattr(layer_module, "_NUMBERS", 3 * 2 * 16**2)
        again = layer.mean_jacobian(u), layer.core(u), *layer.logabsdet(u), *layer.residual_and_logabsdet(u)
        for one, other in zip(whole, again, strict=True):
            torch.testing.assert_close(one, other)
        for one, other in zip(whole, some, strict=False):
            torch.testing.assert_close(one[:, rows], other)

    def test_batches(self, family):
        model = tiny(family)
        u = stream(model, 4, batch=(2, 3))
        layer = attention_layer(model, 0)
        for method in (layer.mean, layer.residual, layer.mean_jacobian, layer.jacobian, layer.core):
            torch.testing.assert_close(method(u)[1, 2], method(u[1, 2]))
        torch.testing.assert_close(layer.logabsdet(u)[1][0, 1], layer.logabsdet(u[0, 1])[1])
        wide = layer.expand((3,))
        assert wide.batch_shape == (3,)
        assert wide.mean(u[0, 0]).shape == (3, 4, 16)
        torch.testing.assert_close(wide.logabsdet(u)[1], layer.logabsdet(u)[1])


def trace(matrix):
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


class TestAttribution:
    def test_it_is_the_derivative_by_the_gain_of_a_head(self, family):
        model = tiny(family)
        layer, u = attention_layer(model, 1), stream(model, 5)
        factors = layer.mean_and_factors(u).factors  # the norm behind, where there is one, stays where it is
        gains = torch.ones(factors.output.shape[1], dtype=u.dtype, requires_grad=True)
        weighted = factors._replace(output=factors.output * gains[:, None])
        value = torch.linalg.slogdet(torch.eye(16, dtype=u.dtype) - weighted.mean_jacobian()).logabsdet
        slopes = torch.stack([torch.autograd.grad(one, gains, retain_graph=True)[0] for one in value])
        torch.testing.assert_close(layer.head_attribution(u), slopes)

    def test_the_heads_make_up_the_whole(self, family):
        model = tiny(family)
        layer, u = attention_layer(model, 0), stream(model, 5)
        block = layer.mean_jacobian(u)
        whole = -trace(torch.linalg.solve(torch.eye(16, dtype=u.dtype) - block, block))
        torch.testing.assert_close(layer.head_attribution(u).sum(-1), whole)


class TestContext:
    def test_the_next_token_is_the_last_of_the_sequence(self, family):
        model = tiny(family)
        layer, u = attention_layer(model, 0), stream(model, 8, batch=(2,))
        context = layer.context(u[:, :-1])
        mean, jacobian = layer.next_mean_and_jacobian(context, u[:, -1])
        torch.testing.assert_close(mean, layer.mean(u)[:, -1])
        torch.testing.assert_close(jacobian, layer.jacobian(u)[:, -1])
        torch.testing.assert_close(context.mean(u[:, -1]), mean)

    def test_token_by_token_from_nothing(self, family):
        model = tiny(family)
        layer, u = attention_layer(model, 0), stream(model, 6)
        context, means = layer.context(u[:0]), []
        for token in u:
            means.append(context.mean(token))
            context = context.extend(token)
        assert context.length == 6
        torch.testing.assert_close(torch.stack(means), layer.mean(u))

    def test_many_candidates(self, family):
        model = tiny(family)
        layer, u = attention_layer(model, 1), stream(model, 5, batch=(2,))
        candidates = stream(model, 3, seed=4, batch=(2,)).movedim(1, 0)  # (candidates, batch, p)
        mean, jacobian = layer.context(u).mean_and_jacobian(candidates)
        for i, candidate in enumerate(candidates):
            joined = torch.cat([u, candidate.unsqueeze(1)], 1)
            torch.testing.assert_close(mean[i], layer.mean(joined)[:, -1])
            torch.testing.assert_close(jacobian[i], layer.jacobian(joined)[:, -1])

    @pytest.mark.parametrize("known", [4, 5, 6])
    def test_positions_go_on(self, known):
        model = tiny("llama")
        layer, u = attention_layer(model, 0), stream(model, 6)
        positions = torch.tensor([3, 5, 6, 9, 10, 11])
        expected = layer.at(positions).mean(u)
        context = layer.at(positions[:known]).context(u[:4])
        torch.testing.assert_close(context.mean(u[4]), expected[4])
        torch.testing.assert_close(context.extend(u[4]).mean(u[5]), expected[5])
        batched = layer.at(positions.expand(2, -1)[:, :known]).context(u[:4].expand(2, -1, -1))
        torch.testing.assert_close(batched.mean(u[4].expand(2, -1)), expected[4].expand(2, -1))
        chosen = batched.select((torch.tensor([1, 1, 0]),), torch.Size((2,)))
        torch.testing.assert_close(chosen.mean(u[4].expand(3, -1)), expected[4].expand(3, -1))

    def test_gradients_by_the_past(self, family):
        model = tiny(family)
        layer, u = attention_layer(model, 1), stream(model, 5)
        w = stream(model, 1, seed=3)[0]
        (expected,) = torch.autograd.grad(layer.mean(leaf := u.clone().requires_grad_())[-1], leaf, w)
        torch.testing.assert_close(layer.context(u).first(4).pull_back(u[-1], w), expected[:-1])

    def test_the_solver_takes_it(self, family):
        """u - mu(past, u) = noise, by the package's own solver."""
        model = tiny(family)
        layer, u = attention_layer(model, 1).detach(), stream(model, 4, batch=(2,))
        noise = layer.residual(u)[:, -1]
        with torch.no_grad():
            found = find_token(layer.context(u[:, :-1]), noise, "smallest_step")
            assert bool(found.solved.all())
            joined = torch.cat([u[:, :-1], found.u.unsqueeze(1)], 1)
            torch.testing.assert_close(layer.residual(joined)[:, -1], noise)


class TestGradients:
    def test_they_reach_the_tokens(self, family):
        model = tiny(family)
        layer, u = attention_layer(model, 1), stream(model, 4).requires_grad_()
        assert torch.autograd.gradcheck(lambda u: layer.logabsdet(u)[1], u, atol=1e-6, fast_mode=True)
        assert torch.autograd.gradcheck(layer.mean, u, atol=1e-6, fast_mode=True)

    def test_they_reach_the_parameters(self, family):
        model = tiny(family)
        layer, u = attention_layer(model, 1), stream(model, 5)
        block = layer.read()
        leaves = [p for name, p in model.named_parameters() if "layers.1." in name or "h.1." in name]
        layer.logabsdet(u)[1].sum().backward()
        reached = [leaf for leaf in leaves if leaf.grad is not None and bool(leaf.grad.abs().max() > 0)]
        assert len(reached) >= 3 + (block.query_norm is not None)
        for leaf in reached:
            direction, step = torch.randn_like(leaf), 1e-6
            with torch.no_grad():
                leaf.add_(step * direction)
                above = layer.logabsdet(u)[1].sum()
                leaf.sub_(2 * step * direction)
                below = layer.logabsdet(u)[1].sum()
                leaf.add_(step * direction)
            slope = (above - below) / (2 * step)
            torch.testing.assert_close((leaf.grad * direction).sum(), slope, rtol=1e-5, atol=1e-6)

    def test_a_detached_layer_has_none(self):
        model = tiny("qwen3")
        layer, u = attention_layer(model, 0), stream(model, 4)
        assert layer.logabsdet(u)[1].requires_grad
        assert not layer.detach().logabsdet(u)[1].requires_grad


class TestAsAnAttention:
    def test_barriers_and_margins_take_it(self, family):
        model = tiny(family)
        layer, u = attention_layer(model, 1).detach(), stream(model, 6)
        block = layer.mean_jacobian(u)
        eigenvalues = torch.linalg.eigvals(block)
        torch.testing.assert_close(log_barrier(layer, u), -layer.logabsdet(u)[1])
        torch.testing.assert_close(
            stability_margin(layer, u), torch.linalg.svdvals(layer.jacobian(u))[..., -1], rtol=1e-9, atol=1e-9
        )
        real = eigenvalues.real.where(eigenvalues.imag.abs() < 1e-12, -torch.inf).amax(-1)
        torch.testing.assert_close(stability_margin(layer, u, "spectral"), 1 - real, rtol=1e-6, atol=1e-6)
        found = support_tokens(layer, u, k=2)
        assert torch.equal(found.margins, stability_margin(layer, u).sort().values[:2])

    def test_it_follows_the_parameters(self):
        model = tiny("llama")
        layer, u = attention_layer(model, 0), stream(model, 4)
        before = layer.mean(u)
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.mul_(2)
        torch.testing.assert_close(layer.mean(u), 2 * before)

    def test_copies(self, family):
        layer = attention_layer(tiny(family), 0)
        u = stream(layer_model(layer), 4)
        held = io.BytesIO()
        pickle.dump(layer, held)
        held.seek(0)
        for other in (copy.deepcopy(layer), pickle.load(held)):
            assert torch.equal(other.mean(u), layer.mean(u))

    def test_a_model_in_half_precision_is_computed_in_single(self, family):
        model = tiny(family).to(torch.bfloat16)
        layer = attention_layer(model, 1)
        assert layer.dtype == torch.float32
        u = stream(tiny(family, dtype=torch.float32), 6)
        exact = attention_layer(tiny(family).to(torch.bfloat16).double(), 1)
        torch.testing.assert_close(layer.mean(u), exact.mean(u.double()).float(), rtol=1e-3, atol=1e-3)

    def test_dropout_is_off_and_the_mode_is_left_as_it_was(self):
        model = tiny("gpt2").train()
        assert model.config.attn_pdrop > 0
        layer, u = attention_layer(model, 1), stream(model, 6)
        assert model.training
        assert all(module.training for module in model.modules())
        torch.testing.assert_close(layer.mean(u), own_mean(model.eval(), 1, u))

    def test_it_says_what_it_is(self):
        layer = attention_layer(tiny("llama"), -1)
        assert repr(layer) == "AttentionLayer('llama', layer 1, heads=4, keys=2, dim=16, dtype=torch.float64)"
        assert (layer.mask, layer.dim, layer.heads, layer.batch_shape) == ("inclusive", 16, 4, ())
        assert layer.like.dtype == torch.float64


def layer_model(layer):
    """A stand-in with the two attributes that :func:`layer_zoo.stream` reads."""

    class Stand:
        dtype = layer.dtype

        class config:
            hidden_size = layer.dim

    return Stand
