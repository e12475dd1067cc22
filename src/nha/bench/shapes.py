"""The models that `nha bench model` times: a named shape with random weights, or any model that can be loaded.

A model stands there in variants: "original" is the model as transformers runs it; "original-kernels" has full attention
in every layer too, on this library's kernels; "hybrid-4" keeps full attention in 4 layers, "hybrid-0" in none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nha.bench.timing import CUDA, DEVICE
from nha.errors import BadInput

WINDOW, SLOTS = 64, 64
CONTEXT = 1 << 20
ORIGINALS = ("original", "original-kernels")
# The family, and sizes of vocabulary, hidden states, MLP, layers, query heads, KV heads and a head.
SHAPES = {
    "llama-3-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, 128),
    "qwen2.5-7b": ("qwen2", 152064, 3584, 18944, 28, 28, 4, 128),
    "qwen3-8b": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128),
    "smollm2-135m": ("llama", 49152, 576, 1536, 30, 9, 3, 64),
}
TINY = ("llama", 97, 32, 48, 4, 4, 2, 8)
NAMES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NAMES += ("num_key_value_heads", "head_dim")
TIED = ("smollm2-135m",)


def full_layers(layers: int, count: int) -> list[int]:
    """`count` of `layers` layers, evenly apart.

    >>> full_layers(32, 4)
    [3, 11, 19, 27]
    """
    return [(2 * i + 1) * layers // (2 * count) - 1 for i in range(count)]


def shape_config(name: str, tiny: bool = False) -> Any:
    """The config of a named shape with a context of a million tokens; a tiny one where `tiny`."""
    from transformers import CONFIG_MAPPING

    family, *sizes = TINY if tiny else SHAPES[name]
    fields = dict(zip(NAMES, sizes, strict=True))
    options: dict[str, Any] = fields | {"max_position_embeddings": CONTEXT, "tie_word_embeddings": name in TIED}
    return CONFIG_MAPPING[family](**options)


def load_original(name: str, tiny: bool = False) -> Any:
    """The original model on the fastest device, in bfloat16 on a GPU and float32 elsewhere.

    Raises BadInput for a name that is no shape and cannot be loaded or is to be tiny, and for a hybrid.
    """
    if tiny and name not in SHAPES:
        raise BadInput(f"expected a tiny shape of {', '.join(SHAPES)}, got {name}")
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if CUDA else torch.float32
    torch.manual_seed(0)
    if tiny or name in SHAPES:
        with torch.device(DEVICE):
            made = AutoModelForCausalLM.from_config(shape_config(name, tiny), dtype=dtype, attn_implementation="sdpa")
        return made.to(DEVICE).eval().requires_grad_(False)
    from nha.models.loading import EMBEDDED, find, is_hybrid, load, load_weights

    source = find(name)
    if is_hybrid(source.config):
        raise BadInput(f"expected a model that is no hybrid, {name} is one: name the model that it came from")
    dtype_name = str(dtype).removeprefix("torch.")
    model: Any = load(source, dtype=dtype_name)[0] if name == EMBEDDED else load_weights(source, dtype_name)
    return model.to(DEVICE).eval().requires_grad_(False)


@dataclass
class Variants:
    """The variants of one model. They share its weights; windows change from one hybrid to the next."""

    original: Any
    window: int = WINDOW
    slots: int = SLOTS
    hybrid: Any = None

    def get(self, name: str) -> Any:
        """The model of a variant; one that was returned before for another hybrid variant is that model from now on."""
        if name == "original":
            return self.original
        from nha import set_windows

        count = self.original.config.get_text_config().num_hidden_layers
        full = range(count) if name == "original-kernels" else full_layers(count, int(name.removeprefix("hybrid-")))
        windows = [-1 if i in full else self.window for i in range(count)]
        if self.hybrid is None:
            self.hybrid = with_shared_weights(self.original)
            from nha.models.adapter import to_hybrid

            to_hybrid(self.hybrid, windows, num_slots=self.slots)
        set_windows(self.hybrid, windows)
        return self.hybrid.requires_grad_(False)


def with_shared_weights(model: Any) -> Any:
    """A copy of a model whose parameters and buffers are those of the model itself."""

    def tensors() -> Iterator[torch.Tensor]:
        yield from model.parameters()
        yield from model.buffers()

    return copy.deepcopy(model, {id(x): x for x in tensors()})
