"""Training of language models with the log-barrier."""
