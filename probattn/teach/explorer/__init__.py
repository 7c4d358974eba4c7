"""A page to explore the theory by hand: one file of HTML, its own script and style, no network."""

from probattn.teach.explorer.page import explorer_page
from probattn.teach.explorer.serve import serve_page

__all__ = ["explorer_page", "serve_page"]
