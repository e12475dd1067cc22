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


def reason(error: BaseException) -> str:
    """The message of another library's error in one line, after its type where that alone is no sentence.

    >>> reason(KeyError("added_tokens")), reason(OSError("no such\\nfile")), reason(AssertionError())
    ("KeyError: 'added_tokens'", 'no such file', 'AssertionError')
    """
    text = one_line(error)
    if text and not isinstance(error, KeyError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def line_of(error: UnicodeDecodeError) -> int:
    """The line, from 1, of the byte that could not be decoded.

    >>> try:
    ...     b"one\\ntwo\\xff".decode()
    ... except UnicodeDecodeError as error:
    ...     line_of(error)
    2
    """
    return 1 + error.object.count(b"\n", 0, error.start)


class OutOfTime(Exception):
    """Work that would take longer than there is time for; `needed` is what it would still take, in seconds."""

    def __init__(self, needed: float):
        super().__init__(f"expected work that fits into the time left, it needs {needed:.0f} s more")
        self.needed = needed
