"""Where an integration check runs, and how it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.utils.deterministic


@dataclass(frozen=True)
class Setting:
    """A device and the seed of random inputs; `tiny` asks for sizes that Triton's interpreter can bear."""

    device: str
    seed: int
    tiny: bool = False


def expect_none(wrong: list[str]) -> None:
    assert not wrong, "; ".join(wrong)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that no kernel wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
