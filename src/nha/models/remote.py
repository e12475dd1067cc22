"""A file of a few lines beside saved weights lets `trust_remote_code=True` load hybrids where nha was not imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nha.io import write_atomically

FILE = "modeling_nha.py"
TEXT = '''"""Lets transformers load this Native Hybrid Attention model with trust_remote_code=True."""

try:
    import nha.models.auto
except ModuleNotFoundError as error:
    if error.name != "nha":
        raise
    raise ImportError("this model needs the package nha: pip install nha") from None

{config}, {model} = nha.models.auto.hybrid_classes("{model_type}")
'''


class SavedWithCode:
    """What lets a hybrid model be loaded by a process that does not know nha."""

    def save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with a modelling file that imports nha and an entry of it in `auto_map`."""
        config, model = type(self.config).__name__, type(self).__name__
        stem = FILE.removesuffix(".py")
        self.config.auto_map = {"AutoConfig": f"{stem}.{config}", "AutoModelForCausalLM": f"{stem}.{model}"}
        if kwargs.get("is_main_process", True):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            text = TEXT.format(config=config, model=model, model_type=self.config.model_type)
            write_atomically(Path(save_directory) / FILE, text)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            mode = (Path(save_directory) / FILE).stat().st_mode  # safetensors makes its files private
            for path in Path(save_directory).glob("*.safetensors"):
                path.chmod(mode)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: transformers would copy a file of this package beside the weights and point `auto_map` to it."""
