"""The robustness study: training arms, corruptions, summaries and tables."""
