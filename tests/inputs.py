"""Strategies of property-based tests, and the equality they ask for; inputs come from `tests.builders`."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from tests.builders import (
    TOKENWISE,
    Case,
    call,
    error,
    gradients,
    leaves,
    make,
    random_loss,
    rounding,
    slice_tokens,
)

settings.register_profile("laws", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("laws")

WINDOWS = st.sampled_from([0, 1, 2, 5, 15, 16, 17, 33, 64, 100])


@st.composite
def cases(draw, max_length: int = 70, windows: st.SearchStrategy[int] = WINDOWS, batch: int = 3) -> Case:
    heads = draw(st.integers(1, 3))
    return Case(
        batch=draw(st.integers(1, batch)),
        length=draw(st.integers(1, max_length)),
        query_heads=heads * draw(st.integers(1, 3)),
        heads=heads,
        dim=draw(st.sampled_from([1, 4, 7])),
        value_dim=draw(st.sampled_from([1, 3, 8])),
        slots=draw(st.integers(1, 6)),
        window=draw(windows),
        sinks=draw(st.integers(0, 2)),
        separate=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def assert_close_to(actual: Tensor, exact: Tensor, what: str = "", ulps: float = 1e5) -> None:
    """Float64 equality up to accumulated rounding (1e5 units: 2e-11 of the largest entry)."""
    bound = ulps * torch.finfo(torch.float64).eps * max(1.0, exact.abs().max().item() if exact.numel() else 0)
    assert error(actual, exact) <= bound, f"{what}: error {error(actual, exact):.3e} > {bound:.3e}"


__all__ = [
    "TOKENWISE",
    "Case",
    "assert_close_to",
    "call",
    "cases",
    "error",
    "gradients",
    "leaves",
    "make",
    "random_loss",
    "rounding",
    "slice_tokens",
]
