"""The model card that is saved beside a hybrid: what it is, how to load it, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nha.evaluate.perplexity import Perplexity


def model_card(config: Any, base: str, measured: Mapping[str, Perplexity], text: str) -> str:
    """Markdown for a hybrid's configuration, made from the model `base`.

    `measured` maps names of forms to what was measured on `text`; the first one is what the others are compared to.

    >>> import torch
    >>> from nha import NHAConfig
    >>> forms = {"original": Perplexity(torch.full((2, 3), 1.0)), "hybrid": Perplexity(torch.full((2, 3), 1.5))}
    >>> print(model_card(NHAConfig.tiny(), "some/model", forms, "a book").splitlines()[-3])
    | hybrid | 4.48 | 1.65 |
    """
    windows: Sequence[int] = config.window_sizes
    converted = sum(window >= 0 for window in windows)
    lines = [
        "---",
        "library_name: transformers",
        "tags: [nha, native-hybrid-attention]",
        f"base_model: {base}",
        "---",
        "",
        f"# {base} as a Native Hybrid Attention model",
        "",
        f"{converted} of {len(windows)} layers read {config.num_slots} long-term slots and a short sliding window "
        f"with one softmax (arXiv 2510.07019). Windows per layer, -1 for full attention: {list(windows)}. "
        f"Sinks: {config.num_sinks}; slot distance: {config.slot_distance}.",
        "",
        "```python",
        "import nha",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        "```",
        "",
    ]
    if measured:
        first = next(iter(measured.values()))
        count, length = first.losses.shape
        lines += [
            f"Perplexity on {count} stretches of {length + 1} tokens of {text}:",
            "",
            "| form | perplexity | ratio |",
            "|---|---|---|",
            *(f"| {name} | {p.value:.2f} | {p.value / first.value:.2f} |" for name, p in measured.items()),
            "",
            f"Standard error of the mean loss over the texts: {first.error:.3f} nats per token.",
        ]
    return "\n".join(lines) + "\n"


def write_card(folder: Path, card: str) -> None:
    """Write the card as README.md of a saved model."""
    (folder / "README.md").write_text(card, encoding="utf-8")
