"""Counts of what became of faults: rounds, outcomes, and what must not happen."""

from collections import Counter

from probattn.errors import InputError

WRONG = ("lost", "accepted", "traceback", "hang", "reported")


class Tally:
    """Rounds by kind, and what went wrong in them."""

    def __init__(self):
        self.rounds, self.outcomes, self.faults = Counter(), Counter(), []

    def note(self, kind, outcome, words=""):
        self.rounds[kind] += 1
        self.outcomes[f"{kind}: {outcome}"] += 1
        if outcome in WRONG:
            self.faults.append(f"{kind} {self.rounds[kind]}: {outcome}: {words}"[:400])

    def as_dict(self):
        return {"rounds": dict(self.rounds), "outcomes": dict(sorted(self.outcomes.items())), "faults": self.faults}


def attempt(read):
    """Outcome of a reader: "refused" in one line, "read", or "traceback"."""
    try:
        read()
    except InputError as error:
        return ("refused", "") if "\n" not in str(error) else ("traceback", f"several lines: {error}")
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    return "read", ""
