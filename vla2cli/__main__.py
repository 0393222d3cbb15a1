"""`python -m vla2cli` is `vla2`."""

from vla2cli.cli import main

main()
