"""`python -m nha.cli` is the `nha` command."""

from nha.cli.app import main

main()
