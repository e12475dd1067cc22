"""Files saved beside a hybrid's weights: its tokenizer and a model card with the measured table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from yaml import YAMLError

from nha.errors import one_line
from nha.io import write_atomically
from nha.models.config import FULL
from nha.models.embedded import EMBEDDED_ID, EMBEDDED_LICENSE

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TAGS = ["nha", "native-hybrid-attention", "long-context"]
INSTALL = "pip install nha transformers"


@dataclass
class CardFacts:
    """Facts on a model card beside the configuration.

    Attributes:
        base: the model that the hybrid was made from: a Hub id or a directory.
        perplexity: names of variants and their perplexities; the others are compared to the first.
        text: what they were measured on, such as "4 texts of 512 tokens of the Python language reference".
        seed: of the conversion.
        notes: more paragraphs of Markdown.
    """

    base: str
    perplexity: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    seed: int | None = None
    notes: str = ""


def base_license(base: str) -> str | None:
    """The licence in the model card of a directory, or of a Hub id that is in the local cache; None if unknown."""
    if base == EMBEDDED_ID:
        return EMBEDDED_LICENSE
    path = Path(base) / "README.md" if Path(base).is_dir() else try_to_load_from_cache(base, "README.md")
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return None
    try:
        return ModelCard.load(path).data.to_dict().get("license")
    except (ValueError, OSError, YAMLError):
        return None


def front_matter(base: str) -> ModelCardData:
    """The fields of a model card that the Hub reads; `base_model` only for a base that can be found there."""
    hub = HUB_ID.fullmatch(base) is not None and not Path(base).exists()
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        base_model=base if hub else None,
        license=base_license(base) if hub or Path(base).is_dir() else None,
    )


def plain(name: str) -> str:
    """A name on one line, without characters that Markdown reads as markup.

    >>> plain("a | *b*\\nlicense: none")
    'a \\\\| \\\\*b\\\\* license: none'
    """
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", one_line(name))


def model_card(config: Any, facts: CardFacts, *, chat: bool = False) -> str:
    """Markdown for a hybrid's configuration; `chat` gives an example with the tokenizer's chat template.

    >>> from nha import NHAConfig
    >>> facts = CardFacts("some/model", {"original": 2.0, "hybrid": 3.0}, "a book", seed=0)
    >>> print(model_card(NHAConfig.tiny(), facts).splitlines()[-3])
    | hybrid | 3.00 | 1.50 |
    """
    config = config.get_text_config()
    windows = list(config.window_sizes)
    converted = sum(window != FULL for window in windows)
    each = " A list has one window per key-value head." if any(isinstance(window, list) for window in windows) else ""
    lines = [
        "---",
        front_matter(facts.base).to_yaml().strip(),
        "---",
        "",
        f"# {plain(Path(facts.base).name)} with Native Hybrid Attention",
        "",
        f"{converted} of {len(windows)} layers read {config.num_slots} long-term slots and a short sliding window "
        f"with one softmax ([arXiv 2510.07019](https://arxiv.org/abs/2510.07019)). Windows per layer, in tokens, "
        f"-1 for full attention: {windows}.{each} Sinks: {config.num_sinks}; slot distance: "
        f"{config.slot_distance} tokens.",
        "",
        "```bash",
        INSTALL,
        "```",
        "",
        *(_chat_example() if chat else _text_example()),
        "",
        "Where nha is installed, but not imported, pass `trust_remote_code=True`.",
    ]
    if facts.perplexity:
        first = next(iter(facts.perplexity.values()))
        seed = "" if facts.seed is None else f", seed {facts.seed}"
        lines += [
            "",
            f"Perplexity on {plain(facts.text)}{seed}:",
            "",
            "| variant | perplexity | ratio |",
            "|---|---|---|",
            *(f"| {plain(name)} | {value:.2f} | {value / first:.2f} |" for name, value in facts.perplexity.items()),
            "",
            f"The ratio is to {plain(next(iter(facts.perplexity)))}.",
        ]
    return "\n".join(lines + (["", facts.notes] if facts.notes else [])) + "\n"


def _text_example() -> list[str]:
    return [
        "```python",
        "import nha  # lets the Auto classes know hybrids",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'name = "path/to/this/folder"  # or its id on the Hub',
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)",
        'inputs = tokenizer("The capital of France is", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
        "```",
    ]


def _chat_example() -> list[str]:
    lines = _text_example()
    lines[6:8] = [
        'chat = [{"role": "user", "content": "Why is the sky blue?"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ")",
        "output = model.generate(**inputs, max_new_tokens=100)[0, inputs.input_ids.shape[1] :]",
        "print(tokenizer.decode(output, skip_special_tokens=True))",
    ]
    return lines


def save_hybrid(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, facts: CardFacts
) -> None:
    """Write weights, configuration, generation settings, the file that loads them, tokenizer and model card.

    `folder` may exist; inside `nha.io.atomic_directory` the whole of it appears at once.
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = model_card(model.config, facts, chat=bool(tokenizer.chat_template))
    write_atomically(folder / "README.md", card)
