"""Which sequences of a batch in vLLM a layer reads at a time, and in which blocks their states are. Imports no vLLM."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Part:
    """Sequences of a batch that are read together.

    Attributes:
        tokens: where their T tokens lie in the batch, a slice or int64 [T].
        cu_seqlens: their boundaries in these tokens, int32 [N + 1]; None if each has one token.
        num_tokens: tokens that each has read before, int64 [N].
        source: the block of each one's state before, int64 [N].
        target: the block of each one's state after, int64 [N].
    """

    tokens: slice | Tensor
    cu_seqlens: Tensor | None
    num_tokens: Tensor
    source: Tensor
    target: Tensor


@dataclass
class NHAMetadata:
    """The parts of a batch, in the order in which they have to be read, and the number of tokens in all of them."""

    num_tokens: int
    parts: list[Part] = field(default_factory=list)


def span(places: list[int], device: torch.device) -> slice | Tensor:
    """Places as a slice where they follow each other, else as a tensor."""
    if places == list(range(places[0], places[0] + len(places))):
        return slice(places[0], places[0] + len(places))
    return torch.tensor(places, device=device)


def plan_parts(
    starts: list[int], drafts: list[int], seen: Tensor, columns: Tensor, accepted: Tensor | None
) -> list[Part]:
    """The parts of a batch.

    A sequence with drafts is read one token at a time, since each of its tokens may be the last that stands: the
    state after token j goes to column j. All others leave one state, in column 0. Where the previous step had drafts
    of which some stood, the state is in the column of the last that did.

    Args:
        starts: the first token of each of N sequences, and the number of all tokens.
        drafts: the number of drafted tokens of each; -1 for a sequence that reads its prompt.
        seen: tokens that each has read before, int64 [N].
        columns: blocks of each, int64 [N, 1 + drafts].
        accepted: how many tokens of the previous step stood, int [N]; None without drafts.

    >>> blocks = torch.tensor([[1, 2], [3, 4], [5, 6]])
    >>> parts = plan_parts([0, 1, 5, 7], [0, -1, 1], torch.tensor([9, 0, 7]), blocks, torch.tensor([2, 1, 1]))
    >>> [(part.tokens, part.source.tolist(), part.target.tolist()) for part in parts]  # doctest: +NORMALIZE_WHITESPACE
    [(slice(0, 1, None), [2], [1]), (slice(1, 5, None), [3], [3]), (slice(5, 6, None), [5], [5]),
     (slice(6, 7, None), [5], [6])]
    """
    device = seen.device
    source = columns[:, 0]
    if accepted is not None:
        source = columns.gather(1, (accepted.long() - 1).clamp_min(0)[:, None])[:, 0]
    lengths = [stop - start for start, stop in itertools.pairwise(starts)]
    single = [row for row, length in enumerate(lengths) if length == 1]
    drafted = [row for row, length in enumerate(lengths) if length > 1 and drafts[row] >= 0]
    longer = [row for row, length in enumerate(lengths) if length > 1 and drafts[row] < 0]
    parts = []
    if single:
        rows = torch.tensor(single, device=device)
        tokens = span([starts[row] for row in single], device)
        parts.append(Part(tokens, None, seen[rows], source[rows], columns[rows, 0]))
    if longer:
        rows = torch.tensor(longer, device=device)
        tokens = span([place for row in longer for place in range(starts[row], starts[row + 1])], device)
        bounds = torch.tensor([0, *(lengths[row] for row in longer)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        parts.append(Part(tokens, bounds.to(device), seen[rows], source[rows], columns[rows, 0]))
    for step in range(max((lengths[row] for row in drafted), default=0)):
        left = [row for row in drafted if lengths[row] > step]
        rows = torch.tensor(left, device=device)
        tokens = span([starts[row] + step for row in left], device)
        before = columns[rows, step - 1] if step else source[rows]
        parts.append(Part(tokens, None, seen[rows] + step, before, columns[rows, step]))
    return parts
