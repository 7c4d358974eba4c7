"""Numbers that others published on attention, measured again with the functions of this package."""
