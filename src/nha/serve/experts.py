"""Weights of experts: transformers has all of a layer in one tensor, vLLM reads them one by one. Imports no vLLM."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

STACKED = re.compile(r"(.+\.layers\.\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
BLOCK = re.compile(r"(.+\.layers\.\d+)\.mlp\.(.+)")


class ExpertNames(NamedTuple):
    """vLLM's names for a layer's block of experts and for the three projections of an expert."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


EXPERT_NAMES = {
    "mixtral": ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": ExpertNames(),
    "qwen3_moe": ExpertNames(),
}
"""Families with experts that were tested in vLLM."""


def split_experts(weights: Iterable[tuple[str, Tensor]], names: ExpertNames) -> Iterator[tuple[str, Tensor]]:
    """Named weights, with those of experts one by one.

    Of a layer with E experts of width I, `gate_up_proj` [E, 2 * I, hidden] holds gates and then ups, and `down_proj`
    is [E, hidden, I].

    >>> import torch
    >>> weights = [("model.layers.0.mlp.experts.gate_up_proj", torch.ones(2, 6, 4))]
    >>> [(name, tuple(x.shape)) for name, x in split_experts(weights, ExpertNames())][:2]
    [('model.layers.0.mlp.experts.0.gate_proj.weight', (3, 4)), ('model.layers.0.mlp.experts.0.up_proj.weight', (3, 4))]
    """
    for name, tensor in weights:
        stacked, block = STACKED.fullmatch(name), BLOCK.fullmatch(name)
        if stacked is None:
            yield (name if block is None else f"{block[1]}.{names.block}.{block[2]}"), tensor
            continue
        kinds = (names.gate, names.up) if stacked[2] == "gate_up_proj" else (names.down,)
        for index, expert in enumerate(tensor):
            for kind, part in zip(kinds, expert.chunk(len(kinds)), strict=True):
                yield f"{stacked[1]}.{names.block}.experts.{index}.{kind}.weight", part
