"""The operator: `nha_attention`, its state, and which implementation runs where."""

from nha.ops.api import NHAOutput, implementations, nha_attention, nha_decode, resolve_impl, supports_decode
from nha.ops.full_attention import full_decode, full_prefill
from nha.ops.ring import RingState
from nha.ops.state import NHAState

__all__ = [
    "NHAOutput",
    "NHAState",
    "RingState",
    "resolve_impl",
    "supports_decode",
    "implementations",
    "nha_attention",
    "nha_decode",
    "full_prefill",
    "full_decode",
]
