"""Attention-weighted moments of the past: covariances, means and log-sums, in memory linear in the length."""

from probattn.moments.operators import PastMoments, past_moments

__all__ = ["PastMoments", "past_moments"]
