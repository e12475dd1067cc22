"""Make transformers' Auto classes know hybrid models without importing transformers before anyone asks for it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"


def teach(mapping: Any) -> None:
    """Let a mapping from model types to configurations learn the hybrids when it is first asked for one.

    Not at once: this may run while the families' own configurations are half imported.
    """
    known = type(mapping)

    def learn(key: object) -> None:
        if isinstance(key, str) and key.startswith("nha") and type(mapping) is not known:
            mapping.__class__ = known
            from nha.models.config import register

            register()

    class Learning(known):
        def __contains__(self, key: object) -> bool:
            learn(key)
            return known.__contains__(self, key)

        def __getitem__(self, key: str) -> Any:
            learn(key)
            return known.__getitem__(self, key)

    mapping.__class__ = Learning


class _Loader(importlib.abc.Loader):
    """Loads the Auto classes as ever, then teaches them the hybrids."""

    def __init__(self, inner: importlib.abc.Loader):
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        teach(module.CONFIG_MAPPING)  # type: ignore[attr-defined]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the Auto classes, once."""

    def find_spec(self, fullname, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def watch() -> None:
    """Teach the Auto classes now if they are loaded, else as soon as they are."""
    if AUTO in sys.modules:
        teach(sys.modules[AUTO].CONFIG_MAPPING)  # type: ignore[attr-defined]
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
