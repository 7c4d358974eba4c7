"""Learning and checking: MAP fits, results, claims, reports."""
