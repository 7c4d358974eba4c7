"""A study of robustness that takes a second: sizes, the two arms that every test compares, and its page."""

from probattn.inference.studies.robustness.arms import Arm, Study
from probattn.inference.studies.robustness.rules import LITERAL
from probattn.inference.studies.robustness.table import render_table
from probattn.inference.studies.robustness.verdict import judge_study

TINY = Study(
    seeds=(0, 1), steps=6, batch=4, warmup=2, context=8, dim=8, layers=1, heads=2, rank=2, windows=6, learning_rate=1e-2
)
PLAIN = Arm("plain")
BARRIER = Arm(LITERAL, "embeddings", "logdet", 0.05)


def render(summary, records, arms, study=TINY):
    """The page of a study."""
    environment = {
        "command": "probattn verify",
        "date": "2000-01-01",
        "processor": "a | b",
        "cores": 2,
        "device": "cpu",
        "python": "3",
        "versions": {"torch": "2"},
    }
    return render_table(summary, judge_study(summary), records, arms, study, "a|<b>.txt", environment, ["figure"])
