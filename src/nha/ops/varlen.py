"""Sequences of various lengths packed into one row: which sequence a token is in, and one sequence after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nha.ops.state import NHAState, slot_dtype


def sequence_of(cu_seqlens: Tensor, token: Tensor) -> Tensor:
    """The index of the packed sequence that each token [T] is in; N for tokens behind the last of N sequences.

    Searches all of `cu_seqlens`: compiled for a GPU by PyTorch 2.11, a search in a slice begins before the slice.

    >>> sequence_of(torch.tensor([0, 3, 3, 5], dtype=torch.int32), torch.arange(6)).tolist()
    [0, 0, 0, 2, 2, 3]
    """
    return torch.searchsorted(cu_seqlens, token.to(cu_seqlens.dtype), right=True) - 1


def each_sequence(
    function: Callable[..., tuple[Tensor, Tensor, NHAState]],
    inputs: tuple[Tensor, ...],
    scale: float,
    softcap: float | None,
    state: NHAState,
    cu_seqlens: Tensor,
    *extra: Any,
) -> tuple[Tensor, Tensor, NHAState]:
    """Run packed sequences one by one and pack the results; the states become one batch.

    `inputs` are cut by sequence; q comes first and v third. `extra` follows them in the call of `function`.
    """
    results = []
    for row, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        own = state.select(torch.tensor([row], device=state.num_tokens.device))
        if start == stop:
            empty = inputs[2].new_zeros(1, 0, inputs[0].shape[2], inputs[2].shape[3])
            results.append((empty, empty[..., 0].to(slot_dtype(inputs[0].dtype)), own))
            continue
        part = [x[:, start:stop] for x in inputs]
        options = {"scale": scale, "softcap": softcap, "state": own, "attention_mask": None}
        results.append(function(*part, *extra, **options))
    outs, masses, states = zip(*results, strict=True)
    return torch.cat(outs, 1), torch.cat(masses, 1), NHAState.join(list(states))
