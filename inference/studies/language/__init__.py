"""Margins of language models that somebody else trained, on real text: where they lie, and what they predict."""
