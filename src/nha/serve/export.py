"""A hybrid as a directory that MLX loads, with a file of model code beside the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from nha.errors import BadInput, one_line
from nha.io import atomic_directory, write_atomically
from nha.models.loading import Source, is_hybrid, load_tokenizer
from nha.serve.embedded import save_embedded

CODE = "mlx_nha.py"  # as config.json names it; a template that is imported in MLX alone
MLX_FAMILIES = ("nha-llama", "nha-qwen2", "nha-qwen3")


def check_export(source: Source) -> None:
    """Raise BadInput for a model that the code for MLX cannot run."""
    config: Any = source.config
    if config is None or not is_hybrid(config):
        raise BadInput(f"expected a hybrid, {source.name} is not one: convert it with nha hybridize")
    if config.model_type not in MLX_FAMILIES:
        raise BadInput(f"expected a hybrid of {', '.join(MLX_FAMILIES)} for MLX, got {config.model_type}")
    if getattr(config, "slot_write", "soft") != "soft":
        raise BadInput(f"expected slot_write='soft' for MLX, got {config.slot_write!r}")
    sliding = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if sliding:
        raise BadInput(f"expected layers of full attention before the conversion for MLX, got {', '.join(sliding)}")
    if source.directory is None:
        raise BadInput(f"expected a model directory for MLX, got {source.name}")


def check_weights(config: Any, files: Sequence[Path]) -> None:
    """Raise BadInput unless these safetensors hold the weights of a hybrid with this configuration."""
    import torch
    from transformers import AutoModelForCausalLM

    from nha.models.checkpoint import check_loaded

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    info = {
        "missing_keys": wanted.keys() - found.keys() - model.all_tied_weights_keys.keys(),
        "unexpected_keys": found.keys() - wanted.keys(),
        "mismatched_keys": [
            (name, found[name], shape) for name, shape in wanted.items() if found.get(name, shape) != shape
        ],
    }
    try:
        check_loaded(model, info)
    except ValueError as error:
        raise BadInput(one_line(error)) from None


def export_mlx(source: Source, output: Path) -> None:
    """Write a hybrid's weights, tokenizer and configuration to a new directory, and the code that runs it in MLX.

    Raises BadInput, and writes nothing, for a model that this code cannot run, whose weights are not safetensors or do
    not fit its configuration, or whose tokenizer cannot be read.
    """
    check_export(source)
    save_embedded(source)
    folder = source.directory
    assert folder is not None
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise BadInput(f"expected weights as model*.safetensors in {folder}, got none")
    check_weights(source.config, weights)
    load_tokenizer(source)
    others = [path for path in folder.iterdir() if path.suffix in (".json", ".txt", ".jinja", ".model")]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)  # no code for transformers is copied
    config["model_file"] = CODE
    with atomic_directory(output) as work:
        for path in (*weights, *others):
            shutil.copyfile(path, work / path.name)
        shutil.copyfile(Path(__file__).parent / "exported" / CODE, work / CODE)
        write_atomically(work / "config.json", json.dumps(config, indent=2) + "\n")
