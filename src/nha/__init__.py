"""Native Hybrid Attention: long-term slots and a short window, read by one softmax (arXiv 2510.07019).

Importing this package makes transformers' Auto classes know hybrid models (`nha.models.auto`), so that
`AutoModelForCausalLM.from_pretrained` reads a saved hybrid whichever of the two was imported first. It therefore
imports what Auto classes are made of, and no model: those are imported when one is made or read. The `nha` command
starts without either.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nha.convert.hybridize import hybridize
    from nha.io import load_state, save_state
    from nha.layer import NativeHybridAttention
    from nha.models.auto import register
    from nha.models.cache_file import load_cache, save_cache
    from nha.models.config import NHAConfig
    from nha.models.nha import NHAForCausalLM
    from nha.models.windows import set_windows
    from nha.ops import NHAOutput, NHAState, nha_attention

__version__ = "0.1.0"

_HOMES = {
    "NHAConfig": "nha.models.config",
    "NHAForCausalLM": "nha.models.nha",
    "NHAOutput": "nha.ops",
    "NHAState": "nha.ops",
    "NativeHybridAttention": "nha.layer",
    "hybridize": "nha.convert.hybridize",
    "load_cache": "nha.models.cache_file",
    "load_state": "nha.io",
    "nha_attention": "nha.ops",
    "register": "nha.models.auto",
    "save_cache": "nha.models.cache_file",
    "save_state": "nha.io",
    "set_windows": "nha.models.windows",
}

__all__ = [
    "NHAConfig",
    "NHAForCausalLM",
    "NHAOutput",
    "NHAState",
    "NativeHybridAttention",
    "hybridize",
    "load_cache",
    "load_state",
    "nha_attention",
    "register",
    "save_cache",
    "save_state",
    "set_windows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nha' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    if home.__name__.startswith(("nha.convert", "nha.models")):
        import_module("nha.models.auto").register()  # a configuration made here may be handed to any Auto class
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command() -> bool:
    """Whether this process is the `nha` command, which answers quickly and registers models when it looks one up."""
    if sys.argv[:1] == ["-m"]:  # so it is while `python -m` looks for its module
        return any(part == "nha" or part.startswith("nha.") for part in sys.orig_argv)
    return bool(sys.argv) and Path(sys.argv[0]).stem == "nha"


if not _is_command():
    import_module("nha.models.auto").register_names()
