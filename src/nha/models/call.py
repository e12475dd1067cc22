"""Refusals of caches and masks of a forward pass that would silently not count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from nha.models.cache import nha_layers
from nha.models.masks import cache_argument
from nha.ops.padding import may_wait, readable


def check_call(stack: Any, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for arguments of a decoder's forward pass of which a cache or mask would not count."""
    cache = cache_argument(kwargs)
    if isinstance(cache, Cache) and not torch.compiler.is_compiling():
        check_recomputation(stack, cache)
        check_past_padding(cache, kwargs.get("attention_mask"))


def check_recomputation(stack: Any, cache: Cache) -> None:
    """Raise ValueError for a cache in training with gradient checkpointing, whose layers would not get it."""
    if not stack.training or not torch.is_grad_enabled():
        return
    if any(getattr(layer, "gradient_checkpointing", False) for layer in stack.layers):
        got = f"one of {int(cache.get_seq_length())} tokens"
        raise ValueError(f"expected no cache in training with gradient checkpointing, got {got}")


def check_past_padding(cache: Cache, mask: Any) -> None:
    """Raise ValueError for a mask [B, T] that has other padding among the cached tokens than they were read with.

    Slots cannot forget a token that turns out to be padding, and never saw one that was. Single tokens are not checked
    on a GPU, where every step would wait for it, nor is a call that is traced or recorded.
    """
    layer = next(iter(nha_layers(cache)), None)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or layer is None or layer.state is None or not may_wait(mask):
        return
    read, past = layer.state.num_tokens, int(layer.get_seq_length())
    if len(read) != len(mask) or mask.shape[1] < past:
        return  # refused elsewhere
    if mask.shape[1] == past + 1 and not readable(mask):
        return
    got = mask[:, :past].bool().sum(1)
    if not torch.equal(got, read.to(got.device)):
        raise ValueError(
            f"expected an attention_mask of {read.tolist()} tokens among the {past} cached ones, as they were read, "
            f"got {got.tolist()}"
        )
