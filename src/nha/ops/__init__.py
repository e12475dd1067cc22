"""The operator: `nha_attention`, its state, and which implementation runs where."""

from nha.ops.api import NHAOutput, choose, implementations, nha_attention
from nha.ops.state import NHAState

__all__ = ["NHAOutput", "NHAState", "choose", "implementations", "nha_attention"]
