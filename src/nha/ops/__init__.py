"""The operator: `nha_attention`, its state, and which implementation runs where."""

from nha.ops.api import NHAOutput, nha_attention, nha_decode, nha_prefill, supports_decode, supports_prefill
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
    "nha_prefill",
    "resolve_impl",
    "supports_decode",
    "supports_prefill",
]
