"""Words of verdicts and numbers of claims, on every page: they are those of the committed ledger.

The pages of the site read their numbers from it by roles when the site is built. This looks at what is typed by hand: a
table row that begins with a claim, a sentence that links to one, and everything on the page of a claim, its tables
included. A number there is a definition or belongs to a study outside the ledger, listed below with its page; or, in
the README, which has no roles, it quotes an entry of the ledger that is named below, and is that entry as rounded to
the digits shown.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LEDGER = {
    claim["id"]: claim
    for claim in json.loads((DOCS / "results" / "ledger" / "claims.json").read_text(encoding="utf-8"))["claims"]
}
STUDY = {"robustness"}  # its page quotes the study that its own tests read
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
PAGES = [page for page in PAGES if not {"_build", "notebooks", "api"} & set(page.relative_to(ROOT).parts)]
LEDGER = {name: claim for name, claim in LEDGER.items() if claim["verdict"] != "not_run"}
VERDICTS = {name: claim["verdict"] for name, claim in LEDGER.items()}
WORDS = {"supported": "holds", "supported_within": "holds if ", "not_supported": "does not hold"}
# How something was measured, a formula, a year: set by hand in the code of a claim, and not found by measuring.
DEFINITIONS = {
    ("README.md", "barrier-training"): {"0"},
    ("README.md", "normalisation"): {"1", "2", "4", "8"},  # dimensions
    ("README.md", "consistency"): {"0.05", "1"},  # values of a σ²
    ("README.md", "recovery"): {"90 %"},
    ("README.md", "barrier"): {"0", "1"},
    ("README.md", "stationarity"): {"1", "2", "120"},
    ("README.md", "bounded"): {"1"},
    ("faq.md", "recovery"): {"90 %"},
    # Sizes, radii and powers; the steepest slope of the broken state, by the command on the page.
    ("claims/bounded.md", "bounded"): {"2", "4", "8", "1,000", "250", "95 %", "0.33"},
    ("claims/calibration.md", "calibration"): {"2018", "1 %"},
    # Tokens left out, draws, the least that counts; and what is left of a correlation, by the study's own record.
    ("claims/decoding.md", "decoding"): {"16", "0.1", "0.49"},
    ("claims/jacobian.md", "jacobian"): {"1"},
    ("claims/normalisation.md", "normalisation"): {"2", "4", "8"},
    # Numbers of others, lengths, settings and layers; orders that are derived on the page.
    ("claims/published.md", "published"): {"0", "1", "2", "4", "10", "16", "20", "29", "64", "100", "200", "256", "400"}
    | {"512", "4,096", "0.03", "0.1481", "0.3", "0.41", "0.5", "95 %"},
    ("claims/recovery.md", "recovery"): {"8", "32", "90 %"},
    ("claims/stationarity.md", "stationarity"): {"1.5", "0.5", "120", "95 %"},
    # Tokens of a text, the first of them, what counts as a difference, the steps of the small model.
    ("claims/trained.md", "trained"): {"256", "16", "1 %", "0.05", "0", "2", "15", "64", "1500"},
}
_BEST = "partial_rho_generator_logabsdet_middle_kl_all_0.1"
QUOTED = {
    "consistency": {
        "3e-23": "three_token_excess_mass_0.05",
        "1e-9": "three_token_excess_mass_0.148",
        "0.005": "three_token_excess_mass_1",
    },
    "recovery": {"0 %": "naive_coverage_90_N32_lowest", "56 %": "naive_coverage_90_N32_highest"},
    "trained": {"25": "layers_volume_apart", "30": "layers"},
    "decoding": {
        "5": "predictors_that_count",
        "20": "predictors",
        "0.28": _BEST,
        "0.22": f"{_BEST}_low",
        "0.33": f"{_BEST}_high",
        "0.56": "rho_given_position_entropy_kl_all_0.1",
    },
    "published": {"0.31": "growth_normed"},
    "jacobian": {"1e-13": "at most max_abs_error, max_logdet_error"},
}
NUMBER = re.compile(r"(?<![\w.^/–-])(?:[−+-])?\d+(?:,\d{3})*(?:\.\d+)?(?:e[−-]?\d+)?(?:\s?%)?(?!\w|\.\d|/\d|³)")


def page_name(page):
    return page.relative_to(DOCS).as_posix() if page.is_relative_to(DOCS) else page.name


def typed(text):
    """The text without code, formulas, roles, targets of links, and dates."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\{[\w:~]+\}`[^`]*`", "", text)
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]*\$|`[^`]*`", "", text, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)|https?://\S+|\d{4}-\d\d-\d\d|\b\d{4}\.\d{5}\b", "]", text)


def tied(text, name):
    """Pieces of a page that speak of one claim: pairs of a claim and the text, with its code and links."""
    pieces = [(row[1], row[0]) for row in re.finditer(r"^\| `([\w-]+)` \|.*$", text, re.MULTILINE) if row[1] in LEDGER]
    if name.startswith("results/"):  # whose tables have many numbers that are definitions
        return []
    own = name.removeprefix("claims/").removesuffix(".md")
    if name.startswith("claims/") and own in LEDGER and own not in STUDY:
        return [*pieces, (own, text)]
    prose = re.sub(r"^```.*?^```|^\|.*$", "", text, flags=re.DOTALL | re.MULTILINE)
    for sentence in re.split(r"(?<=[.:!?])\s+(?=[A-Z*\[-])|\n\s*\n", prose):
        linked = set(re.findall(r"\]\((?:\.\./)?(?:docs/)?claims/([\w-]+)\.md", sentence)) & set(LEDGER)
        if len(linked) == 1:
            pieces.append((linked.pop(), sentence))
    return pieces


def agrees(printed, value):
    """True if a printed number is the value rounded to the digits shown; a half may go either way."""
    words = printed.replace("−", "-").replace(",", "")
    digits, _, exponent = words.rstrip("% ").partition("e")
    scale = 10.0 ** int(exponent or 0)
    if words.endswith("%"):
        value *= 100
    return abs(value - float(digits) * scale) <= 0.5 * scale * 10.0 ** -len(digits.partition(".")[2]) * (1 + 1e-9)


def quotes(printed, claim, quoted):
    """True if a printed number quotes the ledger rightly, or bounds what it names from above within a decade or two."""
    measured = LEDGER[claim]["measured"]
    key = quoted.get(printed)
    if key is None:
        return False
    if key.startswith("at most "):
        worst = max(measured[name] for name in key.removeprefix("at most ").split(", "))
        return float(printed) / 100 < worst <= float(printed)
    return agrees(printed, measured[key])


def numbers(text, name):
    """Typed numbers that are tied to a claim, each with it."""
    return [(claim, printed) for claim, piece in tied(text, name) for printed in NUMBER.findall(typed(piece))]


def wrong_numbers(text, name):
    """Typed numbers that are neither a definition nor a right quotation of the ledger, each with its claim."""
    return [
        (claim, printed)
        for claim, printed in numbers(text, name)
        if printed not in DEFINITIONS.get((name, claim), ())
        and not (name == "README.md" and quotes(printed, claim, QUOTED.get(claim, {})))
    ]


ROW = re.compile(
    r"^\| `([\w-]+)` \|(?:.*\|)?\s*\**(holds|does not hold|supported|not supported)\b([^|*\n]*)\**\s*\|", re.MULTILINE
)
LINK = re.compile(r"\[(holds|does not hold)([^\]]*)\]\((?:\.\./)?(?:docs/)?claims/([\w-]+)\.md")


def verdicts_in_words(text):
    """Verdicts that are typed, each with its claim: in a row that begins with the claim, or as a link to it."""
    found = [(claim, (words + rest).strip()) for claim, words, rest in ROW.findall(text)]
    found += [(claim, words + rest) for words, rest, claim in LINK.findall(text)]
    return [(claim, words) for claim, words in found if claim in VERDICTS]


def wrong_words(text):
    """Words of verdicts that are not those of the ledger, each with its claim."""
    wrong = []
    for claim, words in verdicts_in_words(text):
        expected = WORDS[VERDICTS[claim]]
        if not (words.startswith(expected) if expected.endswith(" ") else words.strip() == expected):
            wrong.append((claim, words))
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_words_and_numbers_of_a_page_are_those_of_the_ledger(page):
    name, text = page_name(page), page.read_text(encoding="utf-8")
    assert wrong_words(text) == []
    assert wrong_numbers(text, name) == []


def test_every_definition_and_every_quotation_stands_on_its_page():
    for (name, claim), expected in DEFINITIONS.items():
        text = (ROOT / name if name == "README.md" else DOCS / name).read_text(encoding="utf-8")
        assert expected <= {printed for found, printed in numbers(text, name) if found == claim}, (name, claim)
    readme = numbers((ROOT / "README.md").read_text(encoding="utf-8"), "README.md")
    for claim, expected in QUOTED.items():
        assert expected.keys() <= {printed for found, printed in readme if found == claim}, claim


def test_every_claim_has_its_words_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {claim for claim, _ in verdicts_in_words(text)} == LEDGER.keys()


def test_the_control_another_word():
    row = "| `barrier-training` | **does not hold** | Training with it does not keep away. |"
    assert wrong_words(row) == []
    assert wrong_words(row.replace("**does not hold**", "holds")) == [("barrier-training", "holds")]
    assert wrong_words(row.replace("does not hold", "not supported"))
    conditional = "| `recovery` | holds if the regime is certified | Words. |"
    assert wrong_words(conditional) == []
    assert wrong_words(conditional.replace(" if the regime is certified", "")) == [("recovery", "holds")]
    assert wrong_words("It [does not hold](claims/barrier-training.md).") == []
    assert wrong_words("It [holds](../claims/barrier-training.md).") == [("barrier-training", "holds")]


@pytest.mark.parametrize("claim", sorted(QUOTED))
def test_the_control_another_number(claim):
    """The last digit of each quotation, up or down by two."""
    for printed in QUOTED[claim]:
        row = f"| `{claim}` | holds | A number: {printed} of them. |"
        assert wrong_numbers(row, "README.md") == []
        position = max(k for k, sign in enumerate(printed) if sign.isdigit())
        other = (int(printed[position]) + 2) % 10
        changed = f"{printed[:position]}{other}{printed[position + 1 :]}"
        assert wrong_numbers(row.replace(printed, changed), "README.md") == [(claim, changed)]


def test_the_control_a_ledger_that_changed(monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    monkeypatch.setitem(LEDGER["decoding"]["measured"], "predictors_that_count", 6.0)
    monkeypatch.setitem(LEDGER["jacobian"]["measured"], "max_abs_error", 2e-13)
    assert wrong_numbers(text, "README.md") == [("decoding", "5"), ("jacobian", "1e-13")]


def test_the_control_a_number_in_a_table_of_a_claims_page_and_a_word_of_earlier_runs():
    page = (DOCS / "claims" / "recovery.md").read_text(encoding="utf-8")
    assert wrong_numbers(page, "claims/recovery.md") == []
    row = "| coverage | 93.1 % | 55 % |\n"
    assert wrong_numbers(f"{page}\n{row}", "claims/recovery.md") == [("recovery", "93.1 %"), ("recovery", "55 %")]
    results = (DOCS / "results" / "verify.md").read_text(encoding="utf-8")
    assert {claim for claim, _ in verdicts_in_words(results)} >= {"jacobian", "barrier", "margin", "objective"}
    assert wrong_words(results.replace("1.3e-14 | holds |", "1.3e-14 | supported |"))


def test_a_number_beside_a_link_to_a_claim_is_a_role_or_a_definition():
    sentence = "Intervals hold it in {} of the cases ([claim `recovery`](claims/recovery.md))."
    assert wrong_numbers(sentence.format("{measured}`recovery:naive_coverage_90_N32_highest:.0%`"), "faq.md") == []
    assert wrong_numbers(sentence.format("56 %"), "faq.md") == [("recovery", "56 %")]
