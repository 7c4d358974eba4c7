"""Solving u - mu(u) = e: the next-token map, Newton's method, the choice among several roots, whole sequences."""
