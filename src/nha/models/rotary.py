"""How a family rotates its queries and keys, read off its own code, so that slots can take the rotation back."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from functools import cache as memoize
from itertools import product

import torch
from torch import Tensor, nn

from nha.ops.rotary import Tables, deinterleave, rotate


@dataclass(frozen=True)
class RotaryStyle:
    """The convention of a family's rotary positions.

    Attributes:
        interleaved: dimension 2 i is paired with 2 i + 1, not i with i + R / 2.
        interleaved_tables: the tables hold the angles in that order too.
        sign: -1 where the rotation runs the other way.
    """

    interleaved: bool = False
    interleaved_tables: bool = False
    sign: int = 1

    def standard_tables(self, tables: Tables) -> Tables:
        """The tables [..., R] that `nha.ops.rotary.rotate` takes for the same rotation."""
        cos, sin = tables
        if self.interleaved_tables:
            cos, sin = deinterleave(cos), deinterleave(sin)
        return cos, sin if self.sign == 1 else -sin


@memoize
def rotary_style(attention: type[nn.Module]) -> RotaryStyle:
    """The convention of an attention class: the one that `apply_rotary_pos_emb` beside it agrees with.

    A module without that function is taken to rotate as Llama does. Raises ValueError where no convention agrees.

    >>> from transformers.models.cohere.modeling_cohere import CohereAttention
    >>> rotary_style(CohereAttention)
    RotaryStyle(interleaved=True, interleaved_tables=True, sign=1)
    """
    apply = getattr(sys.modules[attention.__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        return RotaryStyle()
    with torch.device("cpu"):
        angle = torch.linspace(0.3, 1.5, 4, dtype=torch.float64)[None, None]  # [B 1, T 1, R / 2 4]
        x = torch.linspace(-1, 2, 8, dtype=torch.float64)[None, None, None]  # [B 1, T 1, heads 1, D 8]
        for interleaved, interleaved_tables, sign in product((False, True), (False, True), (1, -1)):
            angles = angle.repeat_interleave(2, -1) if interleaved_tables else angle.repeat(1, 1, 2)
            style = RotaryStyle(interleaved, interleaved_tables, sign)
            tables = angles.cos(), angles.sin()
            rotated = rotate(x, *style.standard_tables(tables), interleaved=interleaved)
            if torch.allclose(_apply(apply, x, tables), rotated, atol=1e-5):  # some compute in float32
                return style
    raise ValueError(f"expected rotary positions of a known convention, got those of {attention.__name__}")


def _apply(apply, x: Tensor, tables: Tables) -> Tensor:
    """Call a family's function on x [B, T, heads, D]; it takes queries and keys, or one of them."""
    one = next(iter(inspect.signature(apply).parameters)) == "x"
    found = apply(x.transpose(1, 2), *tables) if one else apply(x.transpose(1, 2), x.transpose(1, 2), *tables)[0]
    return found.transpose(1, 2)
