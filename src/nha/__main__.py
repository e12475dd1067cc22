"""`python -m nha` is the `nha` command."""

from nha.cli import main

main()
