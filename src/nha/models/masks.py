"""Masks: padding for hybrid layers, T x T for layers that read every key, boundaries for packed sequences."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from nha.models.config import FULL
from nha.ops.heads import all_windows
from nha.ops.padding import may_wait

NAME = "nha"  # of the attention and of the mask function, in transformers' registries


class HybridMask(NamedTuple):
    """A mask for a segment of T tokens, as the mask function "nha" makes it and every attention layer gets it.

    A named tuple: `torch.compile`, `torch.export`, accelerate, FSDP and gradient checkpointing take it apart, move its
    tensors and put it together again. A plain object would hide its tensors from them.

    Attributes:
        base: [B, 1, T, Tk] bool, for layers that read every key; None for a causal mask, and where no layer does.
        padding: [B, T] bool, False = padding; None where every token is real.
        appended: the segment goes on in a growing cache without padding: its last query sees the last key.
        num_tokens: [B] int64, the tokens of a prompt that is padded on the right, where no token sees the padding;
            None where nothing is padded so. States end with the last token, and nobody reads outputs of padding.
    """

    base: Tensor | None = None
    padding: Tensor | None = None
    appended: bool = False
    num_tokens: Tensor | None = None

    @property
    def ndim(self) -> int:
        """As many dimensions as a mask has that transformers leaves alone."""
        return 4


def read_mask(module: Any, mask: HybridMask | Tensor | None, length: int, cu_seqlens: Tensor | None) -> HybridMask:
    """The mask of a segment of `length` tokens in an attention module.

    Raises ValueError for a hybrid layer that gets a mask of scores, since padding cannot be told from it, and for
    packed sequences in a family that does not hand their boundaries on to its layers.
    """
    if mask is None or isinstance(mask, HybridMask):
        return HybridMask() if mask is None else mask
    if cu_seqlens is None and length > 1 and mask.shape[2:] == (1, 1):
        name = module.family.__name__
        raise ValueError(f"expected sequences one by one, got packed ones: {name} gets no cu_seq_lens_q")
    if cu_seqlens is None and module.window_size != FULL:
        raise ValueError(
            f"expected a padding mask [B, T], got a prepared mask {list(mask.shape)} of {mask.dtype}; "
            "only padding and packing are meaningful"
        )
    return HybridMask(mask)


def cache_argument(kwargs: dict[str, Any]) -> Any:
    """The cache among a call's arguments: `past_key_values`, which transformers calls `cache` from 5.24 on."""
    given = kwargs.get("cache")
    return kwargs.get("past_key_values") if given is None else given


def packed_boundaries(position_ids: Tensor) -> Tensor | None:
    """Boundaries [N + 1] of sequences packed into one row, from positions [1, T]; None where there is only one.

    A row is packed if its positions step backwards somewhere; there and at every 0 a sequence begins. Gaps and repeats
    are part of a sequence: pruned prompts and positions spread on purpose have them. Raises ValueError for several
    rows of which one is packed.

    >>> packed_boundaries(torch.tensor([[0, 1, 5, 5, 0, 0, 1]])).tolist()
    [0, 4, 5, 7]
    """
    steps_back = position_ids.diff(dim=1) < 0
    if not bool(steps_back.any()):
        return None
    starts = steps_back | (position_ids[:, 1:] == 0)
    if position_ids.shape[0] != 1:
        got = list(position_ids.shape)
        raise ValueError(f"expected packed sequences in one row, got position_ids {got} that restart")
    ends = torch.tensor([0, position_ids.shape[1]], device=position_ids.device)
    return torch.cat([ends[:1], starts[0].nonzero().flatten() + 1, ends[1:]]).to(torch.int32)


def mark_packing(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a decoder's forward pass with the boundaries of packed sequences among them.

    They come as `cu_seq_lens_q` (`DataCollatorWithFlattening(return_flash_attn_kwargs=True)` makes it) or are read off
    `position_ids` that step backwards. Without boundaries slots would leak from one sequence into the next.

    Raises ValueError for packed sequences with a cache, or with padding before their tokens.
    """
    cache, cu = cache_argument(kwargs), kwargs.get("cu_seq_lens_q")
    if cu is None and cache is None and kwargs.get("attention_mask") is None:
        cu, kwargs = find_boundaries(kwargs)
    if cu is None:
        return kwargs
    if cache is not None:
        raise ValueError("expected packed sequences without a cache, got cu_seq_lens_q and past_key_values")
    check_packed_padding(kwargs.get("attention_mask"), cu)
    # Boundaries say it all. A mask of four dimensions keeps transformers from making one of T x T.
    visible = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=cu.device)
    return kwargs | {"use_cache": False, "attention_mask": visible}


def check_packed_padding(mask: Any, cu_seqlens: Tensor) -> None:
    """Raise ValueError for a mask [1, T] with padding that later tokens of a packed sequence would read.

    Padding at the end of a sequence is read by nobody.

    >>> check_packed_padding(torch.tensor([[1, 0, 1, 1, 0]]), torch.tensor([0, 2, 5]))
    >>> check_packed_padding(torch.tensor([[1, 0, 1, 1, 0]]), torch.tensor([0, 5]))
    Traceback (most recent call last):
    ValueError: expected padding at the end of packed sequences only, got an attention_mask with some before token 2
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not may_wait(mask) or bool(mask.all()):
        return
    read = mask[0, 1:].bool() & ~mask[0, :-1].bool()
    starts = cu_seqlens[(cu_seqlens > 0) & (cu_seqlens < mask.shape[1])].long()
    place = read.index_fill(0, starts - 1, False).nonzero()
    if len(place):
        got = f"an attention_mask with some before token {int(place[0]) + 1}"
        raise ValueError(f"expected padding at the end of packed sequences only, got {got}")


def find_boundaries(kwargs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
    """Boundaries that `position_ids` tell, and the arguments with them.

    Raises ValueError in a compiled forward pass, which cannot look at positions.
    """
    position = kwargs.get("position_ids")
    if position is None or position.dim() != 2:
        return None, kwargs
    if torch.compiler.is_compiling():
        raise ValueError(
            "expected cu_seq_lens_q beside position_ids in a compiled forward pass without a cache, got none; use "
            "DataCollatorWithFlattening(return_flash_attn_kwargs=True), or leave position_ids out"
        )
    cu = packed_boundaries(position)
    if cu is not None:
        return cu, kwargs | {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    if kwargs.get("use_cache") is False and bool((position.diff(dim=1) != 1).any()):
        # Without a cache transformers takes every step other than 1 for a new sequence, unless there is a mask.
        kwargs = kwargs | {"attention_mask": torch.ones_like(position)}
    return None, kwargs


def hybrid_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    *,
    config: Any,
    attention_mask: HybridMask | Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> HybridMask:
    """The mask function "nha" of transformers, with the arguments of its own mask functions.

    Only layers with full attention and hybrid layers whose window holds the whole sequence need scores masked. Raises
    ValueError for an `attention_mask` that does not cover cached and new tokens.
    """
    num_tokens = None
    if isinstance(attention_mask, HybridMask):
        num_tokens = attention_mask.num_tokens
        if num_tokens is None:  # `generate` had it made for a compiled forward pass
            return attention_mask
        attention_mask = None
    padding, padded = segment_padding(attention_mask, q_length, q_offset)
    plain = kwargs.get("mask_function") in (None, causal_mask_function) and kwargs.get("local_size") is None
    static = not isinstance(q_offset, int)
    appended = not static and not padded and plain and allow_is_causal_skip and 1 < q_length < kv_length
    appended = appended and kv_length == q_offset + q_length  # type: ignore[operator]
    windows = all_windows(config.window_sizes)
    first = static or q_offset == 0
    if appended or not (FULL in windows or (first and q_length <= max(windows))):
        return HybridMask(None, padding, appended, num_tokens)
    base = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,  # pyright: ignore[reportArgumentType]
        kv_offset,
        attention_mask=attention_mask if padded else None,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )
    if base is not None and static:
        base = base.contiguous()  # one layout for every step of a compiled forward pass
    return HybridMask(base, padding, num_tokens=num_tokens)


def segment_padding(attention_mask: Tensor | None, length: int, offset: int | Tensor) -> tuple[Tensor | None, bool]:
    """The padding [B, T] of the `length` tokens after `offset` others, and whether any token so far may be padding.

    None stands for no padding. A compiled forward pass does not look at the mask and takes it as it is.

    >>> segment_padding(torch.tensor([[False, True, True]]), 2, 1)
    (None, True)
    """
    if attention_mask is None:
        return None, False
    if isinstance(offset, int):
        got, wanted = list(attention_mask.shape), [attention_mask.shape[0], offset + length]
        if got[1] < wanted[1]:
            raise ValueError(f"expected an attention_mask {wanted}, of cached and new tokens, got {got}")
        padding = attention_mask[:, offset : offset + length]
    else:
        place = torch.arange(length, device=attention_mask.device) + offset
        padding = torch.nn.functional.pad(attention_mask, (0, length)).index_select(1, place)
    if torch.compiler.is_compiling():
        return padding, True
    if bool(attention_mask.all()):
        return None, False
    return (None if bool(padding.all()) else padding), True


def causal_mask(padding: Tensor | None) -> Tensor | None:
    """The mask [B, 1, T, T] of a segment that starts its rows, from its padding [B, T]; None without any."""
    if padding is None:
        return None
    length = padding.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=padding.device).tril()
    return causal & padding[:, None, None, :]


AttentionMaskInterface.register(NAME, hybrid_mask)
