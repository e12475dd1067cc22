"""Hybrids on disk: weights are checked as they are loaded, and saved with a file that loads them anywhere.

The file is a few lines that import nha, for `trust_remote_code=True` in a process that did not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from nha.io import write_atomically
from nha.models.windows import freeze_unused

FILE = "modeling_nha.py"
IN_MEMORY = "<hybrid of"
HUB_CACHE = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]")  # of a snapshot in the cache of the Hub
TEXT = '''"""Lets transformers load this Native Hybrid Attention model with trust_remote_code=True."""

try:
    import nha.models.auto
except ModuleNotFoundError as error:
    if error.name != "nha":
        raise
    raise ImportError("this model needs the package nha: pip install nha") from None

{config}, {model} = nha.models.auto.hybrid_classes("{model_type}")
'''


def check_loaded(model: PreTrainedModel, info: Mapping[str, Any], new_head: bool = False) -> None:
    """Raise ValueError, listing them, where a checkpoint's weights are not those of the model it was loaded into.

    `info` is what `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)` gives: without the
    last, transformers refuses tensors of other shapes itself and names none. Weights that the model has no place for
    are wrong in a hybrid; other families leave some out on purpose. With `new_head` the caller has asked for a head of
    another shape than the checkpoint's.
    """
    hybrid = isinstance(model, CheckpointMixin)
    headless = hybrid and not model.can_generate()  # a decoder alone has no head, and a classifier gets a new one
    found = {
        "missing": sorted(info["missing_keys"]),
        "of another shape": sorted(
            f"{name}: {list(got)} for {list(wanted)}" for name, got, wanted in info["mismatched_keys"]
        ),
        "unknown": sorted(info["unexpected_keys"]) if hybrid else [],
    }
    for kind, names in found.items():
        if headless and (new_head or kind != "of another shape"):
            found[kind] = [name for name in names if "layers." in name]
    wrong = [f"{len(names)} {kind} ({_some(names)})" for kind, names in found.items() if names]
    if wrong:
        raise ValueError(f"expected the weights of {type(model).__name__}, got {', '.join(wrong)}")


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def in_memory_name(config: PreTrainedConfig) -> str:
    """The name of a hybrid that is nowhere on disk, for libraries that load a model again by its name.

    Neither a directory nor a Hub id: they fail and show it, instead of loading the model before its conversion.
    """
    return f"{IN_MEMORY} {config.name_or_path or config.model_type}, not saved yet: call save_pretrained>"


def public_name(name: str | None) -> str | None:
    """The name of a model as other machines know it: its Hub id, or the last folder of a path; None for no name.

    Saved configurations hold it: a path would tell about this machine, and mean nothing on another one.

    >>> public_name("owner/model"), public_name("/home/me/model"), public_name("")
    ('owner/model', 'model', None)
    >>> public_name("/home/me/.cache/huggingface/hub/models--owner--model/snapshots/1a2b")
    'owner/model'
    """
    if not name:
        return None
    cached = HUB_CACHE.search(name)
    if cached:
        return cached[1].replace("--", "/", 1)
    path = Path(name)
    is_path = path.is_absolute() or path.exists() or len(path.parts) > 2 or name.startswith((".", "~"))
    return path.resolve().name if is_path else name


class CheckpointMixin:
    """Hybrids save a file that loads them anywhere, and load nothing but all of their weights."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as transformers does. Raises ValueError for missing, unknown or misshapen weights, which it lists."""
        options = {"ignore_mismatched_sizes": True} | kwargs  # they are listed below instead
        model, info = super().from_pretrained(*args, output_loading_info=True, **options)  # type: ignore[misc]
        check_loaded(model, info, new_head=kwargs.get("ignore_mismatched_sizes", False))
        freeze_unused(model)
        return (model, info) if output_loading_info else model

    def save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with a modelling file that imports nha and an entry of it in `auto_map`."""
        config, model = type(self.config).__name__, type(self).__name__
        write_code = self.can_generate() and kwargs.get("is_main_process", True)
        if self.can_generate():
            stem = FILE.removesuffix(".py")
            auto = "AutoModelForImageTextToText" if hasattr(self.config, "text_config") else "AutoModelForCausalLM"
            self.config.auto_map = {"AutoConfig": f"{stem}.{config}", auto: f"{stem}.{model}"}
        if write_code:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            text = TEXT.format(config=config, model=model, model_type=self.config.model_type)
            write_atomically(Path(save_directory) / FILE, text)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if write_code:
            mode = (Path(save_directory) / FILE).stat().st_mode  # safetensors makes its files private
            for path in Path(save_directory).glob("*.safetensors"):
                path.chmod(mode)
        if not self.config.name_or_path or self.config.name_or_path.startswith(IN_MEMORY):
            self.config.name_or_path = self.name_or_path = str(save_directory)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: transformers would copy a file of this package beside the weights and point `auto_map` to it."""
