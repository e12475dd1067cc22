"""Native Hybrid Attention: long-term slots and a short window, read by one softmax (arXiv 2510.07019).

Public names load when they are first used, so that `import nha` is quick. `AutoModelForCausalLM` knows hybrid
models as soon as both nha and transformers' Auto classes are imported, in either order.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nha.convert.hybridize import hybridize
    from nha.io import load_state, save_state
    from nha.layer import NativeHybridAttention
    from nha.models.adapter import set_windows
    from nha.models.cache import load_cache, save_cache
    from nha.models.config import NHAConfig
    from nha.models.nha import NHAForCausalLM
    from nha.ops import NHAOutput, NHAState, nha_attention

__version__ = "0.1.0"

_HOMES = {
    "NHAConfig": "nha.models.config",
    "NHAForCausalLM": "nha.models.nha",
    "NHAOutput": "nha.ops",
    "NHAState": "nha.ops",
    "NativeHybridAttention": "nha.layer",
    "hybridize": "nha.convert.hybridize",
    "load_cache": "nha.models.cache",
    "load_state": "nha.io",
    "nha_attention": "nha.ops",
    "save_cache": "nha.models.cache",
    "save_state": "nha.io",
    "set_windows": "nha.models.adapter",
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
    "save_cache",
    "save_state",
    "set_windows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nha' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


from nha import _auto

_auto.watch()
