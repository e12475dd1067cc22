"""The convention by which a family rotates is read off its own code."""

import sys

import pytest
import torch

from nha.models.rotary import RotaryStyle, rotary_style
from nha.models.windows import attention_layers
from nha.ops.rotary import rotate, unrotate
from tests.models.families import ALL_FAMILIES, hybrid, tokens


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_rotates_as_the_family_does(family):
    model = hybrid(family, 8)
    attention, seen = attention_layers(model)[0], {}
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(tables=kwargs["position_embeddings"]), with_kwargs=True
    )
    with torch.no_grad():
        model(tokens(2, 5))
    apply = sys.modules[attention.family.__module__].apply_rotary_pos_emb
    size = seen["tables"][0].shape[-1]  # some families hand over only the part that is rotated
    x = torch.randn(2, 3, 5, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = apply(x, *seen["tables"]) if family == "gemma3n_text" else apply(x, x, *seen["tables"])[0]
    style = rotary_style(attention.family)
    tables = style.standard_tables(seen["tables"])
    rotated = rotate(x.transpose(1, 2), *tables, interleaved=style.interleaved)
    assert torch.allclose(found.transpose(1, 2), rotated, atol=1e-6)
    back = unrotate(rotated, *tables, interleaved=style.interleaved)
    assert torch.allclose(back / back.norm(dim=-1, keepdim=True), (x / x.norm(dim=-1, keepdim=True)).transpose(1, 2))


def test_a_rotation_of_no_known_convention_is_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    class StrangeAttention(modeling_llama.LlamaAttention):
        __module__ = modeling_llama.__name__

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q + cos[:, None], k))
    with pytest.raises(ValueError, match="StrangeAttention"):
        rotary_style(StrangeAttention)


def test_llama_pairs_halves():
    from transformers.models.llama.modeling_llama import LlamaAttention

    assert rotary_style(LlamaAttention) == RotaryStyle()
