"""Real text that ships with Python: the language reference, split into evaluation documents and calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache as memoize
from itertools import zip_longest
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

EVALUATION = ("specialnames", "compound", "types", "formatstrings")


def evaluation_documents() -> list[str]:
    """Long chapters of the Python language reference, 6,000 to 25,000 tokens each, longest first."""
    return sorted((topics[name].strip() for name in EVALUATION), key=len, reverse=True)


@memoize
def calibration_text() -> str:
    """The rest of the reference: all paragraphs that are not in `evaluation_documents`, each once.

    >>> any(part in document for part in calibration_text().split("\\n\\n") for document in evaluation_documents())
    False
    """
    measured = "\n\n".join(evaluation_documents())
    parts = (part for name in sorted(topics) for part in topics[name].strip().split("\n\n"))
    return "\n\n".join(part for part in dict.fromkeys(parts) if part.strip() and part not in measured)


def blocks(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], count: int, length: int) -> Tensor:
    """`count` blocks [count, length] of token ids: the first block of every text, then the second, and so on.

    Each block is within one text. Raises ValueError if the texts are too short.
    """
    by_text: list[list[Tensor]] = []
    for text in texts:
        # A token has fewer than eight characters on average, so the rest of a long text need not be tokenized.
        ids = torch.tensor(tokenizer(text[: 8 * length * count], verbose=False).input_ids, dtype=torch.long)
        by_text.append(list(ids[: len(ids) // length * length].view(-1, length)))
    found = [block for turn in zip_longest(*by_text) for block in turn if block is not None]
    if len(found) < count:
        raise ValueError(f"expected text for {count} blocks of {length} tokens, got enough for {len(found)}")
    return torch.stack(found[:count])
