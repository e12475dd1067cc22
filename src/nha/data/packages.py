"""Optional packages, checked before work begins."""

from __future__ import annotations

from importlib.util import find_spec


def check_package(module: str, extra: str, purpose: str) -> None:
    """Raise ImportError with the line that installs it, if a module of the extra `extra` is not installed.

    >>> check_package("json", "data", "to read JSON")
    >>> check_package("no_such_module", "data", "to read text")
    Traceback (most recent call last):
        ...
    ImportError: expected the package no-such-module to read text, got none: pip install 'nha[data]'
    """
    try:
        found = find_spec(module) is not None
    except ValueError:  # a module without a spec, but a module
        found = True
    if not found:
        name = module.replace("_", "-")
        raise ImportError(f"expected the package {name} {purpose}, got none: pip install 'nha[{extra}]'")
