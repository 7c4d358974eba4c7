"""`python -m probattn`."""

from probattn.cli import main

main()
