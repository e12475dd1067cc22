"""Hybrids of well-known shapes with random weights, for experiments that measure time alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nha.models.adapter import to_hybrid

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    | dict(num_key_value_heads=2),
    "smollm2-135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
    | dict(num_key_value_heads=3, vocab_size=49152),
    "llama-1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
    | dict(num_key_value_heads=8, vocab_size=128256),
    "llama-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
    | dict(num_key_value_heads=8, vocab_size=128256),
}


def build(shape: str, full_layers: int, device: str, window: int = 64, slots: int = 64) -> Any:
    """A hybrid of this shape, of whose layers `full_layers` keep full attention; bfloat16 on a GPU, else float32."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=131072, tie_word_embeddings=True)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    layers = config.num_hidden_layers
    step = max(layers // full_layers, 2) if full_layers else layers + 1
    to_hybrid(model, [-1 if i % step == step - 1 else window for i in range(layers)], num_slots=slots)
    return model.requires_grad_(False)


def model_options(description: str | None) -> tuple[argparse.ArgumentParser, str]:
    """A parser with --output, --shape and --full-layers, for which the device, the second value, has defaults."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shape", default="llama-8b" if device == "cuda" else "smollm2-135m")
    parser.add_argument("--full-layers", type=int, default=4)
    return parser, device


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


__all__ = ["SHAPES", "build", "model_options", "synchronize"]
