"""Checks of pages for eyes, keys and screen readers: contrast, names, focus; each check returns what is wrong."""

import json
from pathlib import Path

_SCRIPT = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")


def _asked(page, function, *arguments):
    call = f"{function}({', '.join(map(json.dumps, arguments))})"
    return page.evaluate(f"() => {{ {_SCRIPT}\nreturn {call}; }}")


def contrast_faults(page):
    """Texts whose contrast with what is behind them is below 4.5, or 3 for large print, as WCAG 2 asks."""
    return _asked(page, "contrastFaults")


def structure_faults(page):
    """Controls without a name, ids used twice, skipped headings, a page without language or title."""
    return _asked(page, "structureFaults")


def keyboard_faults(page, most=400):
    """Controls that the Tab key does not reach, and those that do not show that they have the focus."""
    wanted = _asked(page, "watchFocus")
    reached, faults = set(), []
    page.evaluate("() => { getSelection().removeAllRanges(); scrollTo(0, 0); }")
    for _ in range(min(most, wanted + 5)):
        page.keyboard.press("Tab")
        found = _asked(page, "focused")
        if found is None:
            continue
        reached.add(found["key"])
        if not found["seen"]:
            faults.append(f"focus is not seen: {found['name']}")
    missing = _asked(page, "notReached", sorted(reached))
    return sorted(set(faults)) + [f"not reached: {name}" for name in missing]
