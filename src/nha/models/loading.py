"""From a name to a model: the embedded one, a directory, or a Hub id, checked before it is loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from nha.errors import BadInput, one_line, reason
from nha.models.embedded import EMBEDDED, EMBEDDED_HYBRID, EMBEDDED_ID

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from nha.ops.heads import Window

TRAINED_TYPE = "nha"  # the model type of what `nha train` makes
TOKENIZER_FILES = ("*token*", "*vocab*", "*.model")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass
class Source:
    """A model that exists and can be read: its name as typed, its config, and its directory if it has one.

    `config` is None for the embedded model, which is inside another package; its hybrid has one.
    """

    name: str
    config: PretrainedConfig | None
    directory: Path | None

    @property
    def embedded(self) -> bool:
        """Whether it is the embedded model or its distilled hybrid."""
        return self.name in (EMBEDDED, EMBEDDED_HYBRID)

    @property
    def label(self) -> str:
        """A name for tables and titles."""
        if self.embedded:
            return "SmolLM2-135M-Instruct" + (" hybrid" if self.name == EMBEDDED_HYBRID else "")
        return self.directory.resolve().name if self.directory else self.name

    @property
    def base(self) -> str:
        """The model this one came from, for its card: a Hub id, or a directory."""
        if self.embedded:
            return EMBEDDED_ID
        return str(self.directory.resolve()) if self.directory else self.name


def quiet_transformers() -> None:
    """Keep transformers from printing between our own lines; warnings about misuse remain errors."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def find(name: str) -> Source:
    """Read a model's config and check its files without loading its weights.

    Raises BadInput: nothing of this name, no config.json in a directory, a truncated weight file.
    """
    import transformers

    quiet_transformers()
    if name == EMBEDDED:
        from nha.models.smollm2 import gguf_path

        gguf_path()
        return Source(name, None, None)
    if name == EMBEDDED_HYBRID:
        from nha.models.smollm2 import hybrid_configuration

        return Source(name, hybrid_configuration(), None)
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"expected a model directory with a config.json, {path} has none")
        check_files(path)
    elif path.exists():
        raise BadInput(f"expected a model directory, {path} is a file")
    elif not HUB_ID.fullmatch(name):
        raise BadInput(f"expected a model directory or a Hub id, there is nothing at {name}")
    from nha.models.auto import register_names

    register_names()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # whatever a damaged file makes transformers raise, the file is the reason
        if path.is_dir():
            raise BadInput(f"expected a config.json that transformers can read in {path}: {reason(error)}") from None
        first = reason(error).split(". ")[0]
        raise BadInput(f"expected a model directory or a Hub id that can be reached, got {name}: {first}") from None
    return Source(name, config, path if path.is_dir() else None)


def find_to_convert(name: str) -> Source:
    """As `find`; a model that `nha train` made with full attention is read as the Llama or Qwen3 model that it is.

    Raises BadInput as `find` does, and for such a model with parts that neither has.
    """
    source = find(name)
    if getattr(source.config, "model_type", None) != TRAINED_TYPE:
        return source
    from nha.models.plain import is_plain, plain_config

    config: Any = source.config
    if not is_plain(config):
        return source
    try:
        return replace(source, config=plain_config(config))
    except ValueError as error:
        raise BadInput(one_line(error)) from None


def check_files(path: Path) -> None:
    """Raise BadInput unless every safetensors file of the directory is whole and none of its index is absent."""
    files = sorted(path.glob("*.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            missing = sorted(wanted - {file.name for file in files})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"expected an index of weight files, {index} is none: {reason(error)}") from None
        if missing:
            raise BadInput(f"expected {len(wanted)} weight files in {path}, {missing[0]} is missing")
    elif not files and not list(path.glob("pytorch_model*.bin")):
        raise BadInput(f"expected weights (*.safetensors) in {path}, there are none")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise BadInput(f"expected a whole safetensors file, {file} is truncated or foreign: {error}") from None


def load_weights(source: Source, dtype: str) -> PreTrainedModel:
    """The model of a directory or a Hub id. Raises BadInput, naming them, for weights that do not fit its config."""
    import transformers

    from nha.models.checkpoint import check_loaded

    try:
        read: Any = transformers.AutoModelForCausalLM.from_pretrained
        model, info = read(source.name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
        check_loaded(model, info)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise BadInput(f"expected weights of {source.name} that fit its config.json: {reason(error)}") from None
    return model


def load(
    source: Source, *, dtype: str = "auto", tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode on the fastest device, and its tokenizer.

    A `tokenizer` that was read already is not read again. Raises BadInput for weights that are missing, left over or of
    other shapes than the configuration says, and for a tokenizer that cannot be read.
    """
    import torch

    local = os.environ.get("LOCAL_RANK", "0")  # which GPU is this process's, under torchrun
    device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    if source.embedded:
        from nha.models.smollm2 import load_smollm2, load_smollm2_hybrid

        model, tokenizer = (load_smollm2 if source.name == EMBEDDED else load_smollm2_hybrid)(tokenizer)
        if dtype != "auto":
            model = model.to(getattr(torch, dtype))
    else:
        tokenizer = load_tokenizer(source) if tokenizer is None else tokenizer
        model = load_weights(source, dtype)
        if model.config.model_type == TRAINED_TYPE and not is_hybrid(source.config):  # of `find_to_convert`
            from nha.models.plain import to_plain

            model = to_plain(model)
    return model.to(device).eval(), tokenizer  # pyright: ignore[reportArgumentType]


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer alone. Raises BadInput for one that cannot be read."""
    import transformers

    if source.embedded:
        from nha.models.smollm2 import gguf_path

        path = gguf_path()
        return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    try:
        return transformers.AutoTokenizer.from_pretrained(source.name)
    except Exception as error:  # whatever a damaged file makes transformers raise, the file is the reason
        if source.directory is not None and not any(any(source.directory.glob(one)) for one in TOKENIZER_FILES):
            place = f"{source.name}, there is none: tokenizer.save_pretrained writes it there"
            raise BadInput(f"expected a tokenizer in {place}") from None
        raise BadInput(f"expected a tokenizer with {source.name}, got none that can be read: {reason(error)}") from None


def read_config(source: Source) -> PretrainedConfig:
    """The config of a model, also of the embedded one, whose file is read for it."""
    if source.config is not None:
        return source.config
    import transformers

    from nha.models.smollm2 import gguf_path

    path = gguf_path()
    return transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def layers_of(config: Any) -> int:
    """The number of decoder layers of a config."""
    return int(config.get_text_config().num_hidden_layers)


def is_hybrid(config: Any) -> bool:
    """Whether a config is that of a hybrid."""
    return getattr(config, "window_sizes", None) is not None


def check_hybrid(source: Source, option: str) -> None:
    """Raise BadInput, with the name of an option, for a model that is no hybrid."""
    if source.config is None or not is_hybrid(source.config):
        raise BadInput(f"expected a hybrid for {option}, {source.name} is not one: convert it with nha hybridize")


def check_windows_changeable(source: Source, windows: int | Sequence[Window]) -> None:
    """Raise BadInput unless the model is a hybrid whose layers these windows fit."""
    check_hybrid(source, "--window")
    assert source.config is not None
    check_window_count(windows, layers_of(source.config))


def check_window_count(windows: int | Sequence[Window], layers: int) -> None:
    """Raise unless a list of windows has one entry per layer."""
    if not isinstance(windows, int) and len(windows) != layers:
        raise BadInput(f"expected one window per layer, {layers} of them, got {len(windows)}")
