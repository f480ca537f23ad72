"""`python -m bifocal` is the `bifocal` command."""

from bifocal.cli import main

main()
