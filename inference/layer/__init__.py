"""Posteriors of the heads of a language model's layer: streams from a text, fits, findings in words, pictures."""
