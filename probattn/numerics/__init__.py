"""Numerical tools without attention in them: linear algebra and derivatives that torch does not offer."""
