"""The `nha` command. Importing it loads neither torch nor transformers: each command does that itself."""

from nha.cli.app import app, main

__all__ = ["app", "main"]
