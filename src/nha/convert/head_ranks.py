"""KV heads in the order in which they need wide windows, and the windows that this order gives them.

Imports no PyTorch: the command line needs this file for recipes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

FULL = -1  # as in nha.models.config
# Of `nha search --heads` with two penalties and ranges of distances, the mean: results/plans/smollm2-heads20.json.
SEARCHED_HEADS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        *((18, 2), (23, 0), (23, 2), (20, 2), (19, 1), (14, 1), (15, 2), (20, 1), (21, 2), (8, 0), (29, 2), (7, 2)),
        *((22, 1), (24, 0), (28, 0), (24, 2), (0, 0), (6, 1), (21, 0), (17, 1), (23, 1), (3, 1), (14, 2), (10, 2)),
    )
}
Tiers = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class HeadRanks:
    """The KV heads of a model in the order in which they get wide windows.

    Attributes:
        counts: KV heads of each layer; 0 for a layer that keeps a window of its own.
        ranked: (layer, head), the head that needs it most first; perhaps not all.
    """

    counts: tuple[int, ...]
    ranked: tuple[tuple[int, int], ...]

    @property
    def total(self) -> int:
        """KV heads that may have windows.

        >>> HeadRanks((2, 0, 2), ()).total
        4
        """
        return sum(self.counts)

    def windows(self, tiers: Tiers, window_size: int) -> tuple[int | tuple[int, ...], ...]:
        """The windows of all layers: each (heads, window) for the next heads by rank, `window_size` for all others.

        Layers that keep a window of their own get -1. Raises ValueError for more heads than are ranked.

        >>> HeadRanks((2, 2, 0), ((0, 1), (1, 0))).windows([(1, -1), (1, 256)], 64)
        ((64, -1), (256, 64), -1)
        """
        asked = sum(count for count, _ in tiers)
        if asked > len(self.ranked):
            raise ValueError(f"expected at most {len(self.ranked)} heads with wide windows, the ranked, got {asked}")
        order = iter(self.ranked)
        chosen = {head: window for count, window in tiers for head in islice(order, count)}
        layers = ([chosen.get((layer, head), window_size) for head in range(n)] for layer, n in enumerate(self.counts))
        return tuple((own[0] if len(set(own)) == 1 else tuple(own)) if own else FULL for own in layers)


def searched_heads(base: str, counts: Sequence[int]) -> HeadRanks | None:
    """The ranks that a search found for a model of this name and shape; None for one that was not searched.

    >>> ranks = searched_heads("HuggingFaceTB/SmolLM2-135M-Instruct", [3] * 30)
    >>> ranks.ranked[0], searched_heads("some/other", [3] * 30)
    ((18, 2), None)
    """
    ranked = SEARCHED_HEADS.get(base, ())
    fits = all(layer < len(counts) and head < counts[layer] for layer, head in ranked)
    return HeadRanks(tuple(counts), ranked) if ranked and fits else None


def spread_heads(counts: Sequence[int]) -> HeadRanks:
    """Ranks that take one head of each layer in turn: what a plan costs, where no search has ranked the heads yet.

    >>> spread_heads([2, 0, 2]).ranked
    ((0, 0), (2, 0), (0, 1), (2, 1))
    """
    heads = ((layer, head) for head in range(max(counts, default=0)) for layer, n in enumerate(counts) if head < n)
    return HeadRanks(tuple(counts), tuple(heads))
