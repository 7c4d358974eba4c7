"""Robustness study: arms, training, corruptions, runs, their summary and its table."""
