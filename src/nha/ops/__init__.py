"""The operator: `nha_attention`, its state, and which implementation runs where."""

from nha.ops.api import NHAOutput, nha_attention, nha_decode, supports_decode
from nha.ops.backends import implementations, resolve_impl
from nha.ops.full_attention import full_decode, full_prefill
from nha.ops.state import NHAState, RingState

__all__ = [
    "NHAOutput",
    "NHAState",
    "RingState",
    "full_decode",
    "full_prefill",
    "implementations",
    "nha_attention",
    "nha_decode",
    "resolve_impl",
    "supports_decode",
]
