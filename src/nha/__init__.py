"""Native Hybrid Attention: long-term slots and a short window, read by one softmax (arXiv 2510.07019).

Importing this package makes transformers' Auto classes know hybrid models (`nha.models.auto`), so that
`AutoModelForCausalLM.from_pretrained` reads a saved hybrid whichever of the two was imported first. It therefore
imports transformers, which takes a second or two: a program that reads a hybrid waits for that anyway, and the
alternatives are an import hook or models that load in one order of imports only.
"""

from __future__ import annotations

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

register()
