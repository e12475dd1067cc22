"""Errors that the caller can put right, and their one-line form."""

from __future__ import annotations

import re


class BadInput(Exception):
    """Input that the caller can correct; the command line prints it as one line with exit code 2."""


def one_line(message: object) -> str:
    """The message with every run of white space as one blank.

    >>> one_line("expected 3\\n  got 4")
    'expected 3 got 4'
    """
    return re.sub(r"\s+", " ", str(message)).strip()


class OutOfTime(Exception):
    """Work that would take longer than there is time for; `needed` is what it would still take, in seconds."""

    def __init__(self, needed: float):
        super().__init__(f"expected work that fits into the time left, it needs {needed:.0f} s more")
        self.needed = needed
