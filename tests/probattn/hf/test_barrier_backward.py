"""The barrier however the backward pass is run: checkpointed, compiled, in two processes."""

import math
import os
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")

from barrier_models import (
    WEIGHT,
    batch,
    build,
    checkpointing,
    distance,
    gradients,
    predicted,
    step,
    sublayer_modules,
)

from probattn.hf.barrier import attach_barrier
from probattn.hf.layers import attention_layer
from probattn.hf.penalty import residual_penalty
from probattn.hf.stream import Stream


def recompute_calls(model, monkeypatch, reentrant):
    """Recompute whole calls of the layers, hooks included, as transformers did before 5.24."""
    kind = type(sublayer_modules(model, 0)[0])

    def call(self, *args, **kwargs):
        again = partial(nn.Module.__call__, self, **kwargs)
        return checkpoint(again, *args, use_reentrant=reentrant) if torch.is_grad_enabled() else again(*args)

    monkeypatch.setattr(kind, "__call__", call)


class TestCheckpointing:
    @pytest.mark.parametrize("hooks", ["inside", "outside"])
    @pytest.mark.parametrize(
        "options", [{}, {"positions": 0.5}, {"positions": 0.5, "layers": 0.5, "kind": "logdet", "probes": 1}], ids=str
    )
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("name", ["gpt2", "gemma3"])
    def test_changes_nothing(self, name, reentrant, options, hooks, monkeypatch):
        model, data = build(name), batch("right") | {"use_cache": False}
        handle = attach_barrier(model, WEIGHT, **{"positions": 1.0, **options})
        torch.manual_seed(2)
        expected, value, seen = step(model, data), handle.penalty, handle.statistics()
        if hooks == "inside":
            recompute_calls(model, monkeypatch, reentrant)
        else:
            checkpointing(model, reentrant)
        torch.manual_seed(2)
        assert distance(step(model, data), expected) < 1e-12
        assert handle.penalty == pytest.approx(value, rel=1e-12)
        for mine, other in zip(handle.statistics(), seen, strict=True):
            torch.testing.assert_close(mine.smallest_margin, other.smallest_margin)

    @pytest.mark.parametrize("hooks", ["inside", "outside"])
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_a_pass_of_evaluation_before_the_backward_pass_changes_nothing(self, reentrant, hooks, monkeypatch):
        model, data = build(), batch("left") | {"use_cache": False}
        attach_barrier(model, WEIGHT, positions=1.0)
        expected = step(model, data)
        if hooks == "inside":
            recompute_calls(model, monkeypatch, reentrant)
        else:
            checkpointing(model, reentrant)
        model.zero_grad()
        loss = model(**data).loss
        with torch.no_grad():
            model(**data)
        loss.backward()
        assert distance(gradients(model), expected) < 1e-12

    def test_a_penalty_kept_in_a_list_would_lose_its_gradient(self, monkeypatch):
        def kept_aside(reentrant):
            model, data, found = build(), batch() | {"use_cache": False}, []
            for layer in [attention_layer(model, number) for number in range(2)]:

                def collect(module, args, layer=layer):
                    rows = torch.arange(args[0].shape[1])
                    found.append(residual_penalty(layer, Stream(args[0], None, None, None), rows).total())

                sublayer_modules(model, layer.number)[0].register_forward_pre_hook(collect)
            with monkeypatch.context() as patch:
                if reentrant:
                    recompute_calls(model, patch, reentrant)
                loss = model(**data).loss
                (loss + WEIGHT * torch.stack(found).sum() / 2 / predicted(data)).backward()
            return gradients(model)

        model, data = build(), batch()
        plain = step(model, data)
        attach_barrier(model, WEIGHT, positions=1.0)
        expected = step(model, data)
        assert distance(kept_aside(False), expected) < 1e-8
        assert distance(kept_aside(True), plain) < 1e-8
        assert distance(plain, expected) > 1e-3

    def test_the_memory_of_the_penalty_is_given_back(self):
        """Count the numbers that are kept for the backward pass."""

        def kept(recomputed):
            model, data = build(), batch(length=12) | {"use_cache": False}
            attach_barrier(model, WEIGHT, positions=1.0)
            if recomputed:
                checkpointing(model, False)
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
                model(**data)
            return sum(sizes)

        assert kept(True) < 0.2 * kept(False)


# 2026-11-25: torch's compiler makes an instance of an autograd.Function and looks for the gradient of a tensor that is
# no leaf; it hides these two warnings of its own unless warnings are errors.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
class TestCompile:
    def check(self, model, data, backend, tolerance, **options):
        handle = attach_barrier(model, 0.0, **{"positions": 1.0, **options})
        plain = step(model, data)
        handle.weight = WEIGHT
        torch.manual_seed(3)
        expected, value = step(model, data), handle.penalty
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        graphs = torch._dynamo.utils.counters["stats"]
        model.zero_grad()
        torch.manual_seed(3)
        compiled(**data).loss.backward()
        assert distance(gradients(model), expected) < tolerance
        assert handle.penalty == pytest.approx(value, rel=tolerance)
        before = graphs["unique_graphs"]
        handle.weight = 2 * WEIGHT
        model.zero_grad()
        torch.manual_seed(3)
        compiled(**data).loss.backward()
        assert graphs["unique_graphs"] == before  # the weight is no constant of the graph
        doubled = {name: 2 * part - plain[name] for name, part in expected.items()}
        assert distance(gradients(model), doubled) < tolerance
        assert distance(plain, expected) > 1e-3

    @pytest.mark.slow  # as all of these: the compiler takes ten seconds and more
    @pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
    def test_into_one_graph(self, name):
        self.check(build(name), batch("left"), "aot_eager", 1e-6)

    @pytest.mark.slow
    def test_with_probes(self):
        # All steps of the process: a compiled graph does not ask whether fewer would do.
        self.check(build("llama"), batch("left"), "aot_eager", 1e-6, kind="logdet", probes=1, positions=0.5)

    @pytest.mark.slow
    def test_as_a_part_of_a_larger_graph(self):
        model, data = build(), batch("left")
        attach_barrier(model, WEIGHT, positions=1.0)
        expected = step(model, data)
        torch._dynamo.reset()
        loss = torch.compile(lambda: model(**data).loss, fullgraph=True, backend="aot_eager")
        model.zero_grad()
        loss().backward()
        assert distance(gradients(model), expected) < 1e-6

    # 2026-11-25: inductor imports modules of torch that use what torch has deprecated.
    @pytest.mark.filterwarnings("ignore:.*deprecated")
    @pytest.mark.slow
    def test_with_generated_code(self, tmp_path, monkeypatch):
        # The compiler trusts its cache, also a library that a killed run left unfinished there.
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        self.check(build(dtype=torch.float32), batch("left"), "inductor", 1e-4)

    @pytest.mark.slow
    def test_of_the_stage_on_the_embeddings(self):
        self.check(build(), batch("left"), "aot_eager", 1e-6, placement="embeddings")


TWO_PROCESSES = """
    import gc, sys, torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from transformers import GPT2Config, GPT2LMHeadModel
    from probattn.hf.barrier import attach_barrier

    def build(placement, weight):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=17, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, initializer_range=0.4, bos_token_id=0, eos_token_id=0,
        )).double().train()
        attach_barrier(model, weight, positions=1.0, placement=placement)
        return model

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ids = torch.randint(17, (4, 9), generator=torch.Generator().manual_seed(1))
    for placement in ("residual", "embeddings"):
        wrapped = DistributedDataParallel(build(placement, 0.3))
        own = ids[2 * rank : 2 * rank + 2]
        wrapped(input_ids=own, labels=own).loss.backward()
        found = torch.cat([part.grad.flatten() for part in wrapped.module.parameters()])
        for weight in (0.3, 0.0):  # one process on the joined batch; and the control, without a barrier
            model = build(placement, weight)
            model(input_ids=ids, labels=ids).loss.backward()
            expected = torch.cat([part.grad.flatten() for part in model.parameters()])
            if rank == 0:
                print(placement, weight, float((found - expected).norm() / expected.norm()))
    del wrapped  # the last to hold the group may wait for its threads for ever
    gc.collect()
    dist.destroy_process_group()
"""


@pytest.mark.slow  # the libraries are imported three times
def test_two_processes_average_to_the_gradient_of_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(launcher, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    measured = {(placement, float(weight)): float(gap) for placement, weight, gap in lines}
    assert len(measured) == 4
    for placement in ("residual", "embeddings"):
        assert measured[placement, 0.3] < 1e-6  # means of the loss in single precision, in another order
        assert measured[placement, 0.0] > 1e-3
        assert math.isfinite(measured[placement, 0.3])
