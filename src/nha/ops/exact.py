"""Exact slots: a score says which tokens are kept, each in a slot of its own, and the oldest of them gives way.

Slots are written through log-gates, so exact slots are gates of two values: 0 leaves a slot alone, and the floor of
-5 overwrites all but 0.7 % of it. No kernel knows of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WRITE = -5.0  # log-gate of a token that is kept, at its slot
FILL = -6.0  # of a token that takes a free slot: clamped to the same write, and it gets no gradient


class WriteOrder(NamedTuple):
    """Where the tokens of a segment stand in their sequences.

    Attributes:
        token: [B, T] int64, a token's number among those of its sequence that may be written; below 0: never written.
        kept: [sequences, H] int64, tokens that each head kept before the segment; None for none.
        cu_seqlens: [N + 1] int32 where the row holds N packed sequences, else None.
    """

    token: Tensor
    kept: Tensor | None = None
    cu_seqlens: Tensor | None = None


def exact_log_gate(score: Tensor, num_slots: int, order: WriteOrder, *, fill: bool = True) -> tuple[Tensor, Tensor]:
    """Log-gates [B, T, H, M] that write tokens of scores [B, T, H] above 0 to slots, and the number kept after them.

    The token that is kept after c others of its sequence and head overwrites slot c mod M: the oldest. With `fill`, of
    the first M tokens those that are not kept take the slots that are still free, from the last slot down, until kept
    ones need them: no slot stays empty in a sequence of M tokens. The number kept, [sequences, H] int64, continues in
    `order` of the next segment.

    Straight through (arXiv 1308.3432): the gradient of a score is that of log-gate -5 sigmoid(score) at the slot that
    the token has or would have overwritten.

    >>> order = WriteOrder(torch.arange(4)[None])
    >>> gate, kept = exact_log_gate(torch.tensor([[[2.0], [-1.0], [3.0], [4.0]]]), 2, order, fill=False)
    >>> gate[0, :, 0].int().tolist(), kept.tolist()
    ([[-5, 0], [0, 0], [0, -5], [-5, 0]], [[3]])
    >>> gate, kept = exact_log_gate(torch.tensor([[[-1.0], [2.0]]]), 2, WriteOrder(torch.arange(2)[None]))
    >>> gate[0, :, 0].int().tolist(), kept.tolist()
    ([[0, -6], [-5, 0]], [[1]])
    """
    index, cu = order.token[..., None], order.cu_seqlens
    allowed = index >= 0
    chosen = (score > 0) & allowed
    count = chosen.cumsum(1)
    before = count - chosen.long()
    if cu is None:
        after = chosen.sum(1)
        if order.kept is not None:
            before, after = before + order.kept[:, None], after + order.kept
    else:
        total = F.pad(count[0], (0, 0, 1, 0))
        start = total[cu.long()]
        after = start[1:] - start[:-1]
        offset = -start[:-1] if order.kept is None else order.kept - start[:-1]
        after = after if order.kept is None else after + order.kept
        place = torch.arange(index.shape[1], device=index.device)
        row = torch.searchsorted(cu, place.to(cu.dtype), right=True) - 1  # tokens behind the last sequence are not read
        before = before + offset[row.clamp_max(len(offset) - 1)]
    slot = torch.arange(num_slots, device=score.device)
    write = chosen.to(score.dtype)
    if torch.is_grad_enabled() and score.requires_grad:
        soft = score.sigmoid()
        write = write + torch.where(allowed, soft - soft.detach(), 0)
    gate = torch.where(slot == before.remainder(num_slots)[..., None], WRITE * write[..., None], 0)
    if fill:
        free = allowed & ~chosen & (index < num_slots)
        place = num_slots - 1 - (index - before)
        gate = torch.where(free[..., None] & (slot == place[..., None]), FILL, gate)
    return gate, after


def kept_tokens(log_gate: Tensor) -> Tensor:
    """Whether each token was kept, bool [...], by the log-gates [..., M] that `exact_log_gate` made.

    >>> kept_tokens(torch.tensor([[0.0, -5.0], [0.0, 0.0], [-6.0, 0.0]])).tolist()
    [True, False, False]
    """
    return log_gate.detach().amin(-1) == WRITE
