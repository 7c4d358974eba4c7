"""Texts, noise, heads alone, growth and the run of the study, on small models with random weights."""

import copy
import json

import numpy as np
import pytest
import torch
from xarray import Dataset

from probattn.errors import InputError
from probattn.hf import margins
from probattn.inference.studies.language import run as runs
from probattn.inference.studies.language.__main__ import StudyOptions, study
from probattn.inference.studies.language.growth import grow
from probattn.inference.studies.language.heads import head_alone
from probattn.inference.studies.language.noise import kl_divergence, noise_sensitivity, root_mean_square
from probattn.inference.studies.language.plan import CONTROLS, EIGENVALUES, Growth, Plan
from probattn.inference.studies.language.results import read_results
from probattn.inference.studies.language.run import IncompleteStudyError, measure
from probattn.inference.studies.language.tables import read_tables, write_table
from probattn.inference.studies.language.texts import articles_of, text_windows
from probattn.models.causal_lm import CharacterTokeniser, build_causal_lm
from probattn.models.corpus import UNKNOWN, Corpus

GROWTH = Growth(layers=2, dim=8, heads=2, context=12, training_steps=20, batch=4, looks=3, measured_windows=2, stride=5,
                learning_rate=0.02, runs=1)  # fmt: skip
PLAN = Plan(windows=4, length=20, control_windows=2, control_stride=8, eigenvalue_stride=9, draws=2, chunk=2,
            controls=("random_weights", "turned_output"), growth=GROWTH)  # fmt: skip
TEXT = "one two three four five six seven eight nine ten " * 30


@pytest.fixture(scope="module")
def corpus():
    return Corpus("words", TEXT, TEXT[:200], (*sorted(set(TEXT)), UNKNOWN))


def small(architecture="llama", **more):
    """A model whose weights are large enough for the attention to matter."""
    torch.manual_seed(0)
    model = build_causal_lm(architecture, 16, layers=2, dim=16, heads=2, context=64, **more).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 2:
            parameter.mul_(8)
    return model


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 16, (4, 20), generator=torch.Generator().manual_seed(1))


class TestTexts:
    def test_one_window_per_article(self):
        text = " = First = \n a b c d e f \n = = Section = = \n g \n = Second = \n h \n = Third = \n i j k l m n o \n"
        assert articles_of(text)[1:] == ["h \n", "i j k l m n o \n"]
        windows = text_windows(text, lambda part: [ord(letter) for letter in part if letter.isalpha()], 9, 6)
        assert windows.kind == "article"
        assert ["".join(map(chr, row)) for row in windows.ids.tolist()] == ["abcdef", "ijklmn"]

    def test_stretches_of_a_text_without_articles(self):
        windows = text_windows("".join(map(chr, range(100))), lambda part: [ord(letter) for letter in part], 3, 10)
        assert windows.kind == "stretch"
        assert windows.ids[:, 0].tolist() == [0, 30, 60]
        assert windows.ids.shape == (3, 10)

    def test_too_short(self):
        with pytest.raises(InputError, match="does not fill two windows of 30 tokens"):
            text_windows("abc" * 10, lambda part: list(part.encode()), 4, 30)


class TestNoise:
    def test_divergence_is_torchs(self):
        logits = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0)).double()
        both = [torch.distributions.Categorical(logits=part) for part in logits]
        torch.testing.assert_close(kl_divergence(*logits), torch.distributions.kl_divergence(*both))

    @pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3"])
    def test_copies_at_the_end_are_noise_on_the_last_token(self, architecture, ids):
        model = small(architecture)
        options = {"level": 0.5, "draws": 2, "seed": 3, "scale": 1.5}
        found = noise_sensitivity(model, ids, form="last", **options)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            u = model.get_input_embeddings()(ids)
            expected = torch.zeros(ids.shape, dtype=torch.float64)
            for _ in range(2):
                z = torch.randn(u.shape[1:], generator=generator, dtype=torch.float64).to(u)
                for i in range(ids.shape[1]):
                    noisy = u[:, : i + 1].clone()
                    noisy[:, i] += 0.75 * z[i]
                    logits, others = (model(inputs_embeds=part).logits[:, -1] for part in (u[:, : i + 1], noisy))
                    expected[:, i] += kl_divergence(logits, others) / 2
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
        everywhere = noise_sensitivity(model, ids, form="all", **options)
        torch.testing.assert_close(everywhere[:, 0], found[:, 0], rtol=1e-3, atol=1e-6)
        assert (everywhere[:, 1:] - found[:, 1:]).abs().max() > 1e-4  # noise before the last token matters

    def test_a_model_that_ignores_the_mask_is_refused(self, ids):
        model = small()
        forward = model.forward
        model.forward = lambda attention_mask=None, **more: forward(**more)
        with pytest.raises(InputError, match="does not follow the mask"):
            noise_sensitivity(model, ids, form="last", level=0.1, draws=1, seed=0, scale=1.0)

    def test_small_noise_is_quadratic_and_draws_are_matched(self, model, ids):
        scale = root_mean_square(model, ids)
        assert scale == pytest.approx(float(model.get_input_embeddings().weight[ids].square().mean().sqrt()))
        one, two = (
            noise_sensitivity(model.double(), ids, form="all", level=level, draws=3, seed=0, scale=scale)
            for level in (1e-3, 2e-3)
        )
        model.float()
        torch.testing.assert_close(two / one, torch.full_like(one, 4), rtol=0.05, atol=0)

    @pytest.mark.parametrize("wrong", [{"form": "some"}, {"level": 0.0}, {"draws": 0}])
    def test_bad_input(self, model, ids, wrong):
        options = {"form": "all", "level": 0.1, "draws": 1, "seed": 0, "scale": 1.0, **wrong}
        with pytest.raises(InputError, match=next(iter(wrong))):
            noise_sensitivity(model, ids, **options)


class TestHeadsAlone:
    def test_is_the_mean_over_heads_and_layers_of_dense_blocks(self, model, ids):
        found = head_alone(model, ids[:1])
        streams = model(ids[:1], output_hidden_states=True).hidden_states
        total = torch.zeros(20)
        for number, layer in enumerate(model.model.layers):
            x = layer.input_layernorm(streams[number])[0]
            attention = layer.self_attn
            q, k, v = ((p(x)).view(20, 2, 8) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            cos, sin = model.model.rotary_emb(x, torch.arange(20)[None])
            q, k = (
                part * cos[0][:, None] + torch.cat([-part[..., 4:], part[..., :4]], -1) * sin[0][:, None]
                for part in (q, k)
            )
            for head in range(2):
                for i in range(20):
                    weight = (q[i, head] @ k[: i + 1, head].T / 8**0.5).softmax(-1)
                    centred = v[: i + 1, head] - weight @ v[: i + 1, head]
                    block = torch.eye(8) - (centred.T * weight) @ k[: i + 1, head] / 8**0.5
                    total[i] += torch.linalg.svdvals(block)[-1].log() / 4
        torch.testing.assert_close(found["sigma_min"][0], total, rtol=2e-3, atol=2e-3)

    def test_depends_on_the_basis_where_the_model_and_its_blocks_do_not(self, model, ids):
        turned = copy.deepcopy(model)
        rotation = torch.linalg.qr(torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(2)))[0]
        for layer in turned.model.layers:
            value, output = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
            value.data = (rotation @ value.data.view(2, 8, -1)).flatten(0, 1)
            output.data = torch.einsum("phd,hed->phe", output.data.view(-1, 2, 8), rotation).flatten(1)
        torch.testing.assert_close(turned(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
        blocks = [margins(part, ids[:1], ("sigma_min",)).sigma_min.values for part in (model, turned)]
        np.testing.assert_allclose(*blocks, atol=1e-4)
        alone = [head_alone(part, ids[:1])["sigma_min"] for part in (model, turned)]
        assert (alone[0] - alone[1]).abs().max() > 1e-3
        again = head_alone(model, ids[:1], seed=4)["sigma_min"]
        assert (alone[0] - again).abs().max() > 1e-3


class TestGrowth:
    def test_a_model_learns_and_is_looked_at_on_the_way(self, corpus):
        model, table = grow(GROWTH, corpus, seed=0)
        assert table.step.values.tolist() == [0, 1, 4, 20]
        assert dict(table.sizes) == {"step": 4, "sequence": 2, "layer": 2, "token": 3}
        assert float(table.loss[0]) == pytest.approx(np.log(len(corpus.vocabulary)), abs=0.3)
        assert float(table.loss[-1]) < float(table.loss[0]) - 0.3
        last = margins(model, corpus.windows(12, heldout=True).inputs[::8][:2], ("logabsdet",), positions=[0, 5, 10])
        np.testing.assert_allclose(table.logabsdet[-1], last.logabsdet, atol=1e-5)
        _, again = grow(GROWTH, corpus, seed=0)
        assert table.equals(again)
        assert not table.equals(grow(GROWTH, corpus, seed=1)[1])

    def test_a_short_text(self, corpus):
        with pytest.raises(InputError, match="does not fill 2 held-out windows of 12"):
            grow(GROWTH, Corpus("short", TEXT, "abc " * 4, corpus.vocabulary), seed=0)


class TestPlan:
    def test_the_most_important_first(self):
        jobs = PLAN.jobs()
        names = list(dict.fromkeys(job.table for job in jobs))
        assert names[:2] == ["text", "noise"]
        assert names.index("growth") < names.index("text-eigenvalues")
        assert [job.first for job in jobs if job.table == "text"] == [0, 2]
        controls = [job for job in jobs if job.control != "none"]
        assert {job.control for job in controls} == {"random_weights", "turned_output"}
        assert all(job.first + job.count <= PLAN.control_windows for job in controls)
        assert all(job.kinds == EIGENVALUES for job in jobs if "eigenvalues" in job.table)
        # Eigenvalues of a chunk of texts are done for all groups before the next chunk.
        first = [job.table for job in jobs if "eigenvalues" in job.table and job.first == 0]
        assert len(first) == 3

    def test_controls_are_those_of_the_margins(self):
        assert {"random_weights", "turned_output"} <= set(CONTROLS)
        assert "none" not in CONTROLS


@pytest.fixture(scope="module")
def tables(model, ids, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return measure(model, ids, PLAN, corpus=corpus, folder=folder), folder


class TestMeasure:
    def test_all_tables_are_measured_and_saved(self, tables, model, ids):
        found, folder = tables
        saved = read_tables(folder)
        assert set(saved) == set(found) == {job.table for job in PLAN.jobs()}
        for name, part in saved.items():
            assert part.identical(found[name]) or part.equals(found[name])
            assert all(values.dtype.itemsize <= 8 for values in part.data_vars.values())
        exact = margins(model, ids, ("logabsdet",)).logabsdet
        np.testing.assert_allclose(saved["text"].logabsdet, exact, atol=1e-5)
        assert saved["text"].sizes["sequence"] == 4
        assert saved["turned_output"].token.values.tolist() == [0, 8, 16]
        assert saved["turned_output"].sequence.values.tolist() == [0, 1]
        assert saved["growth"].sizes["run"] == 1
        assert saved["text"].logabsdet.dtype == np.float32
        with pytest.raises(AssertionError):  # the control is another thing
            np.testing.assert_allclose(saved["turned_output"].logabsdet, saved["text"].logabsdet[:2, :, ::8], atol=1e-3)

    def test_goes_on_where_it_stopped(self, tables, model, ids, corpus, tmp_path, monkeypatch):
        calls = []
        run = runs._run

        def counted(job, *arguments):
            calls.append(job.table)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return run(job, *arguments)

        monkeypatch.setattr(runs, "_run", counted)
        with pytest.raises(KeyboardInterrupt):
            measure(model, ids, PLAN, corpus=corpus, folder=tmp_path)
        assert set(read_tables(tmp_path)) == {"text", "noise"}
        found = measure(model, ids, PLAN, corpus=corpus, folder=tmp_path)
        assert len(calls) == len(PLAN.jobs()) + 1
        for name, part in tables[0].items():
            assert part.equals(found[name])

    def test_a_job_that_fails_does_not_cost_the_others(self, model, ids, tmp_path, monkeypatch):
        run = runs._run

        def failing(job, *arguments):
            if job.table == "noise":
                raise RuntimeError("no memory")
            return run(job, *arguments)

        monkeypatch.setattr(runs, "_run", failing)
        with pytest.raises(IncompleteStudyError, match="noise: no memory"):
            measure(model, ids, PLAN, folder=tmp_path, only=("noise", "text"))
        assert read_tables(tmp_path)["text"].sizes["sequence"] == 4

    def test_stops_when_time_is_over(self, model, ids, caplog, monkeypatch):
        clock = iter(range(0, 10_000, 40))
        monkeypatch.setattr(runs.time, "monotonic", lambda: next(clock))
        found = measure(model, ids, PLAN, minutes=2)
        assert set(found) == {"text"}
        assert "2 minutes are over" in caplog.text

    def test_a_damaged_table_is_named(self, tmp_path):
        (tmp_path / "text.nc").write_bytes(b"nothing")
        with pytest.raises(InputError, match=r"text\.nc cannot be read"):
            read_tables(tmp_path)
        write_table(tmp_path, "text", Dataset({"a": ("sequence", np.ones(2))}))
        assert read_tables(tmp_path)["text"].a.sum() == 2


def test_from_the_command_line_to_the_summary(corpus, tmp_path):
    """A model in a folder and a text in a file: tables, provenance, summary."""
    folder = tmp_path / "model"
    torch.manual_seed(0)
    build_causal_lm("llama", len(corpus.vocabulary), layers=3, dim=8, heads=2, context=64).save_pretrained(folder)
    CharacterTokeniser(corpus.vocabulary).save(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    options = StudyOptions(
        corpus=str(tmp_path / "text.txt"), model=folder, out=tmp_path / "out", device="cpu", plan=PLAN,
        tables=("text", "noise", "turned_output", "text-eigenvalues", "turned_output-eigenvalues"),
    )  # fmt: skip
    assert study(options) == 0
    results = read_results(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    assert record["corpus"]["name"] == "text.txt"
    assert record["environment"]["command"].startswith("python -m probattn.inference.studies.language")
    assert "model on text.txt" in results.origin
    assert results.location.facts["texts"] == 4
    assert (tmp_path / "out" / "language.json").is_file()
    with pytest.raises(InputError, match=r"holds no study\.json"):
        read_results(tmp_path)
    with pytest.raises(InputError, match="fills 4 windows of 300 tokens, not 9"):
        study(StudyOptions(corpus=options.corpus, model=folder, out=tmp_path / "b", device="cpu",
                           plan=Plan(windows=9, length=300)))  # fmt: skip
