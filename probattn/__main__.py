"""`python -m probattn`."""

from probattn.cli.app import main

main()
