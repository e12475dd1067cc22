"""Padded batches: the check of a mask, real tokens moved to the start of their rows, outputs moved back."""

from __future__ import annotations

import torch
from torch import Tensor


def readable(x: Tensor) -> bool:
    """Whether the numbers of a tensor can be read at no cost: on the CPU, and not while they are traced or mapped.

    >>> readable(torch.ones(2)), readable(torch.ones(2, device="meta"))
    (True, False)
    """
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != "cpu":
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore[reportAttributeAccessIssue]


def may_wait(x: Tensor) -> bool:
    """Whether the numbers of a tensor can be read, though that waits for a GPU: not while they are traced or recorded.

    >>> may_wait(torch.ones(2)), may_wait(torch.ones(2, device="meta"))
    (True, False)
    """
    if not x.is_cuda:
        return readable(x)
    return not (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())


def check_padding_mask(attention_mask: Tensor) -> None:
    """Raise ValueError for a mask [B, T] with holes; on a device other than the CPU reading it would stall.

    >>> check_padding_mask(torch.tensor([[True, True], [True, False], [False, True]]))
    >>> check_padding_mask(torch.tensor([[True, False, True]]))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: expected padding on the left or right of a row only, got a mask with holes in row 0; ...
    """
    if not readable(attention_mask):
        return
    starts = attention_mask[:, 1:] & ~attention_mask[:, :-1]
    runs = starts.sum(1) + attention_mask[:, 0]
    if bool((runs > 1).any()):
        raise ValueError(
            "expected padding on the left or right of a row only, "
            f"got a mask with holes in row {int(runs.argmax())}; use cu_seqlens for packed sequences"
        )


def align_left(attention_mask: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Move the real tokens of every row [B, T, ...] to its start; what follows them is arbitrary but finite.

    Raises ValueError for a mask with holes.

    >>> mask, x = torch.tensor([[False, True, True]]), torch.tensor([5.0, 6.0, 7.0]).view(1, 3, 1, 1)
    >>> align_left(mask, x)[0].flatten().tolist()
    [6.0, 7.0, 7.0]
    """
    check_padding_mask(attention_mask)
    length = attention_mask.shape[1]
    first = attention_mask.int().argmax(1, keepdim=True)
    index = (torch.arange(length, device=attention_mask.device) + first).clamp_max(length - 1)
    return [x.gather(1, index[..., None, None].expand(-1, -1, *x.shape[2:])) for x in inputs]


def restore(attention_mask: Tensor, x: Tensor) -> Tensor:
    """Undo `align_left` for an output [B, T, ...]; padding gets zeros."""
    first = attention_mask.int().argmax(1, keepdim=True)
    index = (torch.arange(x.shape[1], device=x.device) - first).clamp_min(0)
    shape = [*attention_mask.shape] + [1] * (x.dim() - 2)
    moved = x.gather(1, index.view(shape).expand_as(x))
    return torch.where(attention_mask.view(shape), moved, 0)
