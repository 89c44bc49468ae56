"""`python -m hfprune.cli` is the command `hfprune`."""

from hfprune.cli.commands import main

main()
