"""A page to explore the theory by hand: one HTML file with its own script and style, without network access."""

from probattn.teach.explorer.page import explorer_page
from probattn.teach.explorer.serve import serve_page

__all__ = ["explorer_page", "serve_page"]
