"""The operator: `nha_attention`, its state, and which implementation runs where."""

from nha.ops.api import NHAOutput, choose, decodes, implementations, nha_attention, nha_decode
from nha.ops.full import segment_attention, token_attention
from nha.ops.ring import RingState
from nha.ops.state import NHAState

__all__ = [
    "NHAOutput",
    "NHAState",
    "RingState",
    "choose",
    "decodes",
    "implementations",
    "nha_attention",
    "nha_decode",
    "segment_attention",
    "token_attention",
]
