"""The cache of a layer with full attention in 8 bits: half the bytes, so twice the sequences, and half to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from nha.ops.backends import needs_grad
from nha.ops.int8_rows import Int8Rows, write_rows


class Int8CacheLayer(CacheLayerMixin):
    """Keys and values of a layer with full attention, rounded to 8 bits when they come (`Int8Rows`).

    A segment reads the rounded keys and values of its own tokens too: what comes out depends on neither how a text is
    cut into segments nor which kernel reads. One token reads the numbers of 8 bits as they are, a longer segment a copy
    in the model's dtype. With `max_cache_len` tensors keep their addresses, as in transformers' `StaticLayer`.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False
    keys: Any  # Int8Rows, or None before the first token
    values: Any

    def __init__(self, max_cache_len: int | None = None):
        super().__init__()
        self.max_cache_len = max_cache_len
        self.is_compileable = max_cache_len is not None
        self.cumulative_length: int | Tensor = 0

    @classmethod
    def like(cls, layer: CacheLayerMixin) -> Int8CacheLayer | None:
        """An empty layer in the place of one of transformers' with full attention; None for a layer of another kind."""
        if type(layer) is StaticLayer:
            return cls(layer.max_cache_len)
        return cls() if type(layer) is DynamicLayer else None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.keys, self.values = (
            Int8Rows(
                x.new_zeros((*x.shape[:2], self.max_cache_len or 0, x.shape[3]), dtype=torch.int8),
                x.new_ones((*x.shape[:2], self.max_cache_len or 0, 1), dtype=torch.float32),
            )
            for x in (key_states, value_states)
        )
        if self.is_compileable:
            self.cumulative_length = torch.zeros((), dtype=torch.int64, device=self.device)
            if not torch.compiler.is_compiling():
                for x in (*self.keys, *self.values, self.cumulative_length):
                    torch._dynamo.mark_static_address(x)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Keep a segment [B, H, T, D] and return all keys and values: `Int8Rows` for one token, else tensors.

        Raises ValueError where a gradient would have to go through numbers of 8 bits.
        """
        if needs_grad((key_states, value_states)):
            raise ValueError("expected kv_cache_dtype 'auto' where gradients go through a cache, got 'int8'")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = key_states.shape[2]
        if isinstance(self.cumulative_length, Tensor):
            write_rows(key_states, self.keys, self.cumulative_length)
            write_rows(value_states, self.values, self.cumulative_length)
            self.cumulative_length.add_(length)
        else:
            self.keys, self.values = (
                Int8Rows(*(torch.cat(pair, 2) for pair in zip(held, Int8Rows.of(x), strict=True)))
                for held, x in ((self.keys, key_states), (self.values, value_states))
            )
            self.cumulative_length += length
        if length == 1:
            return self.keys, self.values
        return self.keys.dequantize(key_states.dtype), self.values.dequantize(value_states.dtype)

    def copy_from(self, other: Int8CacheLayer, length: int) -> None:
        """Hold the first `length` tokens of another layer, in tensors of this layer's own."""
        self.lazy_initialization(other.keys.numbers, other.values.numbers)
        if isinstance(self.cumulative_length, Tensor):
            for own, held in ((self.keys, other.keys), (self.values, other.values)):
                for x, y in zip(own, held, strict=True):
                    x[:, :, :length] = y[:, :, :length]
            self.cumulative_length.fill_(length)
        else:
            self.keys, self.values = other.keys, other.values
            self.map(lambda x: x[:, :, :length].clone())
            self.cumulative_length = length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.max_cache_len is not None:
            return self.max_cache_len, 0
        return int(self.cumulative_length) + query_length, 0

    def get_seq_length(self) -> int:
        return self.cumulative_length  # type: ignore[return-value]  # a tensor in a static layer, as transformers has it

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"expected a number of tokens to remove, at most 0, got {tokens_to_remove}")
        if not self.is_initialized or not tokens_to_remove:
            return
        if not isinstance(self.cumulative_length, Tensor):
            self.map(lambda x: x[:, :, :tokens_to_remove])
        self.cumulative_length += tokens_to_remove

    def reset(self) -> None:
        if isinstance(self.cumulative_length, Tensor):
            self.cumulative_length.zero_()
        else:
            self.keys = self.values = None
            self.cumulative_length, self.is_initialized = 0, False

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = (Int8Rows(*map(function, rows)) for rows in (self.keys, self.values))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map(lambda x: x[indices])

    def offload(self) -> None:
        self.map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self.map(lambda x: x.to(self.device, non_blocking=True))
