"""Native Hybrid Attention: long-term slots and a short sliding window under one softmax (arXiv 2510.07019)."""

from nha.ops import NHAOutput, NHAState, nha_attention

__version__ = "0.1.0"
__all__ = ["NHAOutput", "NHAState", "nha_attention"]
