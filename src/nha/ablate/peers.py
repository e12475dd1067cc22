"""Models of flash-linear-attention (the package `fla`), for the tables of those who have it installed."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nha.models.config import NHAConfig

PEERS = {"gsa": "GSAConfig", "gla": "GLAConfig", "gated_deltanet": "GatedDeltaNetConfig"}
OWN_SETTINGS = {  # where a model has no setting for what the others have, or another name for it
    "gsa": ("num_heads", "num_slots"),
    "gla": ("num_heads",),
    "gated_deltanet": ("num_heads", "head_dim"),
}


def peer_model(name: str, shape: NHAConfig, settings: dict[str, Any]) -> PreTrainedModel:
    """A model of the library with the sizes of `shape`, everything else as it comes there or as `settings` say.

    Raises ImportError, with the line that installs it, if the library is absent.
    """
    if find_spec("fla") is None:
        raise ImportError(f"expected the package fla for the model {name}, got none: pip install 'nha[peers]'")
    models: Any = import_module("fla.models")

    sizes: dict[str, Any] = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "fuse_cross_entropy": False,
    }
    values = {"num_heads": shape.num_attention_heads, "num_slots": shape.num_slots, "head_dim": shape.head_dim}
    sizes |= {key: values[key] for key in OWN_SETTINGS[name]}
    config = getattr(models, PEERS[name])(**(sizes | settings))
    return AutoModelForCausalLM.from_config(config)


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterable[Tensor]:
    """All tensors in nested dictionaries, lists and objects, each once.

    >>> x = torch.zeros(2)
    >>> [tuple(y.shape) for y in tensors_in({"a": [x, {"b": torch.zeros(3)}], "c": x})]
    [(2,), (3,)]
    """
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    parts = value if isinstance(value, (list, tuple)) else ()
    if isinstance(value, dict) or hasattr(value, "__dict__"):
        parts = (value if isinstance(value, dict) else vars(value)).values()
    for part in parts:
        yield from tensors_in(part, seen)


@torch.no_grad()
def peer_state_bytes(model: PreTrainedModel, context: int) -> int:
    """Bytes of the cache of a model of another library after `context` tokens, on the model's device."""
    ids = torch.zeros(1, context, dtype=torch.int64, device=model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        cache = model(ids, use_cache=True).past_key_values
    return sum(x.numel() * x.element_size() for x in tensors_in(cache))
