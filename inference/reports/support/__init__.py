"""Support tokens of a text under a language model: measured, explained, shown on one page."""

from probattn.inference.reports.support.measure import Reading, read_margins
from probattn.inference.reports.support.nearest import Nearest, nearest_tokens
from probattn.inference.reports.support.page import SupportPage, support_page
from probattn.inference.reports.support.pieces import Unit, text_units

__all__ = [
    "Nearest",
    "Reading",
    "SupportPage",
    "Unit",
    "nearest_tokens",
    "read_margins",
    "support_page",
    "text_units",
]
