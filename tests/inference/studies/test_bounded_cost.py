"""The study of what a contraction costs: arms that differ as they say, runs that are kept, paired intervals."""

import json

import pytest

from probattn.errors import InputError
from probattn.inference.studies import bounded_cost
from probattn.inference.studies.bounded_cost import OWN, PRIORS, Sizes, compare, measure_run, run_study, table
from probattn.models.corpus import Corpus, load_corpus

SMALL = Sizes(
    seeds=(0, 1), steps=3, warmup=1, batch=2, context=8, dim=8, heads=2, rank=2, windows=4,
    prior_steps=3, prior_dim=8, prior_context=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus():
    whole = load_corpus("python-docs")
    return Corpus("part", whole.text[:4000], whole.heldout[:600], whole.vocabulary)


@pytest.mark.parametrize("arm", [*OWN, *PRIORS])
def test_every_arm_is_measured_and_a_limit_is_kept(corpus, arm):
    found = measure_run(arm, 0, corpus, SMALL)
    assert 0 < found["bits"] < 12
    assert 0 <= found["accuracy"] <= 1
    limit = OWN.get(arm, {}).get("contraction")
    if limit is not None:
        assert found["contraction"] < limit
    elif "memory_radius" in OWN.get(arm, {}):
        assert found["contraction"] > 1
    if "stage_contraction" in PRIORS.get(arm, {}):
        assert found["sigma_min"] >= 0.1


def test_runs_are_kept_and_not_measured_again(corpus, tmp_path, monkeypatch):
    calls = []

    def quick(arm, seed, corpus, sizes):
        calls.append((arm, seed))
        return {"bits": 2.0 + 0.1 * len(arm) + 0.01 * seed, "accuracy": 0.5}

    monkeypatch.setattr(bounded_cost, "measure_run", quick)
    first = run_study(tmp_path, corpus, SMALL)
    assert len(calls) == len(first) == 2 * len({*OWN, *PRIORS})
    assert run_study(tmp_path, corpus, SMALL) == first
    assert len(calls) == len(first)
    # The steps of one kind say nothing of a run of the other.
    assert "prior_steps" not in first[0]["identity"]
    file = sorted(tmp_path.glob("ordinary*.json"))[0]
    file.write_text(json.dumps({**json.loads(file.read_text()), "identity": {}}))
    with pytest.raises(InputError, match="other sizes"):
        run_study(tmp_path, corpus, SMALL)


def runs(differences, arm="κ < 0.5"):
    found = []
    for seed, difference in enumerate(differences):
        for name, bits in (("ordinary", 2.0 + seed), (arm, 2.0 + seed + difference)):
            found.append({"arm": name, "seed": seed, "measured": {"bits": bits, "accuracy": 0.5}})
    return found


def test_intervals_are_paired():
    # Seeds differ by whole bits; the difference within each is what counts.
    value, low, high = compare(runs([0.1, 0.2, 0.3]), "κ < 0.5", "ordinary", "bits")
    assert value == pytest.approx(0.2)
    assert high - value == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)  # Student's t, two degrees of freedom
    assert low == pytest.approx(2 * value - high)
    with pytest.raises(InputError, match="1 seeds in common"):
        compare(runs([0.1]), "κ < 0.5", "ordinary", "bits")
    lines = table(runs([0.1, 0.2, 0.3])).splitlines()
    assert lines[2].startswith("| ordinary | 3.000 |")
    assert lines[3].startswith("| κ < 0.5 | 3.200 | +0.200 [-0.048, +0.448] |")


def test_an_unknown_arm_is_refused(corpus):
    with pytest.raises(InputError, match="arm is 'none'"):
        measure_run("none", 0, corpus, SMALL)
