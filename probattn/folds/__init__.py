"""Does the residual map fold? Bounds, exact answers on the line, searches in several dimensions, masses, regimes."""
