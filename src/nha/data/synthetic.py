"""Recall tasks of random tokens, for models trained from scratch: MQAR and two of MAD's, as seeded generators.

MQAR (multi-query associative recall) is that of Zoology (arXiv 2312.04927), selective copying and in-context recall are
those of MAD (arXiv 2403.17844).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # a target that is not measured
FILLERS = ("random", "zero")


class Examples(NamedTuple):
    """Token ids [N, T] and targets [N, T], both int64.

    `targets[n, t]` is the token that a model must name after reading `ids[n, : t + 1]`, or -100 where nothing is asked.
    """

    ids: Tensor
    targets: Tensor


@dataclass(frozen=True)
class TaskSize:
    """A task at one size.

    Attributes:
        task: a name in `TASKS`.
        seq_len: tokens of an example.
        num_items: pairs of key and value (mqar), or tokens to copy (selective_copying); unused by in_context_recall.
        vocab_size: number of tokens.
        power, filler: as `mqar` takes them.
    """

    task: str
    seq_len: int
    num_items: int = 0
    vocab_size: int = 8192
    power: float = 0.01
    filler: str = "random"

    @property
    def label(self) -> str:
        """The size as it stands in results.

        >>> TaskSize("mqar", 256, 64).label
        'mqar 256/64'
        """
        return f"{self.task} {self.seq_len}" + (f"/{self.num_items}" if self.num_items else "")

    @property
    def max_answers(self) -> int:
        """The largest number of targets in an example."""
        return self.num_items or self.seq_len // 2

    def draw(self, count: int, generator: torch.Generator) -> Examples:
        """`count` examples on the generator's device. Raises ValueError for sizes that cannot be."""
        if self.task not in TASKS:
            raise ValueError(f"expected a task out of {', '.join(TASKS)}, got {self.task!r}")
        return TASKS[self.task](self, count, generator)


def draw_without_repeats(count: int, choices: int, size: int, generator: torch.Generator) -> Tensor:
    """`count` rows of `size` different numbers below `choices`, [count, size], in random order."""
    device = generator.device
    return torch.rand(count, choices, generator=generator, device=device).topk(size, dim=1).indices


def mqar(
    count: int,
    *,
    seq_len: int,
    num_pairs: int,
    generator: torch.Generator,
    vocab_size: int = 8192,
    power: float = 0.01,
    filler: str = "random",
) -> Examples:
    """Multi-query associative recall: pairs of a key and its value, then every key once more, in random places.

    After its second occurrence the model must name the key's value. Keys are tokens of the lower half of the
    vocabulary, values of the upper half; the gap between the pairs and a query follows a power law. Places that hold
    neither pair nor query get random tokens, or token 0.

    Args:
        count: number of examples N.
        seq_len: tokens T of an example, even and at least four times `num_pairs`.
        num_pairs: different pairs in an example.
        generator: draws everything; the examples are on its device.
        vocab_size: number of tokens.
        power: exponent of the law, density x ** (power - 1); 1 is uniform.
        filler: "random" or "zero".

    Raises:
        ValueError: sizes that cannot be.

    >>> generator = torch.Generator().manual_seed(3)
    >>> ids, targets = mqar(1, seq_len=12, num_pairs=2, vocab_size=20, filler="zero", generator=generator)
    >>> ids[0].tolist()  # the key 7 has the value 18, 8 has 10
    [7, 18, 8, 10, 7, 0, 0, 0, 0, 0, 8, 0]
    >>> targets[0].tolist()
    [-100, -100, -100, -100, 18, -100, -100, -100, -100, -100, 10, -100]
    """
    if seq_len % 2 or num_pairs < 1 or 4 * num_pairs > seq_len:
        raise ValueError(f"expected an even seq_len of at least {4 * num_pairs} for {num_pairs} pairs, got {seq_len}")
    half = vocab_size // 2
    if half - 1 < num_pairs:
        raise ValueError(f"expected vocab_size of at least {2 * num_pairs + 2} for {num_pairs} pairs, got {vocab_size}")
    if filler not in FILLERS:
        raise ValueError(f"expected filler to be one of {', '.join(FILLERS)}, got {filler!r}")
    device = generator.device
    keys = draw_without_repeats(count, half - 1, num_pairs, generator) + 1
    values = draw_without_repeats(count, vocab_size - half, num_pairs, generator) + half
    ids = torch.zeros(count, seq_len, dtype=torch.int64, device=device)
    if filler == "random":
        ids = torch.randint(vocab_size, (count, seq_len), generator=generator, device=device)
    context = 2 * num_pairs
    ids[:, 0:context:2], ids[:, 1:context:2] = keys, values
    # The largest of exponential clocks with these rates are drawn as if one by one, without putting back.
    places = torch.arange(1, (seq_len - context) // 2 + 1, device=device, dtype=torch.float32)
    rates = places ** (power - 1)
    noise = torch.rand(count, len(places), generator=generator, device=device).clamp_min(1e-20).log()
    queries = context + 2 * (noise / rates).topk(num_pairs, dim=1).indices
    ids.scatter_(1, queries, keys)
    targets = torch.full_like(ids, IGNORED)
    targets.scatter_(1, queries, values)
    return Examples(ids, targets)


def selective_copying(
    count: int, *, seq_len: int, num_tokens: int, generator: torch.Generator, vocab_size: int = 16
) -> Examples:
    """Copy the tokens that lie scattered among blanks, in their order, after the token that asks for it.

    The last token of the vocabulary asks, the one before is the blank. Raises ValueError for sizes that cannot be.

    >>> generator = torch.Generator().manual_seed(0)
    >>> ids, targets = selective_copying(1, seq_len=9, num_tokens=2, vocab_size=8, generator=generator)
    >>> ids[0].tolist()
    [6, 6, 6, 2, 6, 3, 7, 6, 6]
    >>> targets[0].tolist()
    [-100, -100, -100, -100, -100, -100, -100, 2, 3]
    """
    context = seq_len - num_tokens - 1
    if num_tokens < 1 or context <= num_tokens:
        raise ValueError(f"expected seq_len above {2 * num_tokens + 1} for {num_tokens} tokens, got {seq_len}")
    if vocab_size < 4:
        raise ValueError(f"expected vocab_size of at least 4, got {vocab_size}")
    device = generator.device
    tokens = torch.randint(vocab_size - 2, (count, num_tokens), generator=generator, device=device)
    places = draw_without_repeats(count, context, num_tokens, generator).sort(1).values
    ids = torch.full((count, seq_len), vocab_size - 2, dtype=torch.int64, device=device)
    ids.scatter_(1, places, tokens)
    ids[:, context] = vocab_size - 1
    targets = torch.full_like(ids, IGNORED)
    targets[:, context + 1 :] = tokens
    return Examples(ids, targets)


def in_context_recall(count: int, *, seq_len: int, generator: torch.Generator, vocab_size: int = 16) -> Examples:
    """Pairs of a key and its value; whenever a key occurs again, the model must name the value that it had.

    Keys are tokens of the lower half of the vocabulary, values of the upper half; the last key is always one that has
    occurred. Raises ValueError for sizes that cannot be.

    >>> generator = torch.Generator().manual_seed(3)
    >>> ids, targets = in_context_recall(1, seq_len=10, vocab_size=6, generator=generator)
    >>> ids[0].tolist()
    [1, 5, 2, 4, 1, 5, 0, 3, 1, 5]
    >>> targets[0].tolist()
    [-100, -100, -100, -100, 5, -100, -100, -100, 5, -100]
    """
    if seq_len % 2 or seq_len < 4:
        raise ValueError(f"expected an even seq_len of at least 4, got {seq_len}")
    half = vocab_size // 2
    if half < 1:
        raise ValueError(f"expected vocab_size of at least 2, got {vocab_size}")
    device, pairs = generator.device, seq_len // 2
    keys = torch.randint(half, (count, pairs), generator=generator, device=device)
    earlier = torch.randint(pairs - 1, (count, 1), generator=generator, device=device)
    keys[:, -1:] = keys.gather(1, earlier)
    table = torch.randint(half, vocab_size, (count, half), generator=generator, device=device)
    values = table.gather(1, keys)
    ids = torch.stack([keys, values], 2).flatten(1)
    same = keys[:, :, None] == keys[:, None, :]
    known = same.tril(-1).any(2)
    targets = torch.full_like(ids, IGNORED)
    targets[:, ::2] = torch.where(known, values, IGNORED)
    return Examples(ids, targets)


def _mqar(size: TaskSize, count: int, generator: torch.Generator) -> Examples:
    options = {"vocab_size": size.vocab_size, "power": size.power, "filler": size.filler}
    return mqar(count, seq_len=size.seq_len, num_pairs=size.num_items, generator=generator, **options)


def _selective_copying(size: TaskSize, count: int, generator: torch.Generator) -> Examples:
    tokens, vocab = size.num_items, size.vocab_size
    return selective_copying(count, seq_len=size.seq_len, num_tokens=tokens, vocab_size=vocab, generator=generator)


def _in_context_recall(size: TaskSize, count: int, generator: torch.Generator) -> Examples:
    return in_context_recall(count, seq_len=size.seq_len, vocab_size=size.vocab_size, generator=generator)


TASKS: dict[str, Callable[[TaskSize, int, torch.Generator], Examples]] = {
    "mqar": _mqar,
    "selective_copying": _selective_copying,
    "in_context_recall": _in_context_recall,
}
