"""MAP, Laplace, SVI and NUTS on one log density, with one order of arguments and one type of result."""
