"""A hybrid as a small file beside its base model: gates, sinks and changes of weights, of low rank or in 2 bits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nha.io import read_tensors, write_tensors
from nha.models.adapter import to_hybrid
from nha.models.auto import register_family
from nha.models.config import FULL
from nha.models.packed import pack_rows, unpack_rows
from nha.models.windows import attention_layers, decoder, set_windows

FORMAT, PACKED_FORMAT = "nha-delta-v1", "nha-delta-v2"  # the second may hold packed matrices
PACKED, SCALE = re.compile(r"(.+)\.packed(2|8)"), ".scale"
SIZES = ("num_slots", "num_sinks", "slot_distance")
ADDED = {"slot_write": "soft"}  # settings that older files do not name, as they have them
CACHE_FORMATS = ("state_dtype", "kv_cache_dtype")
VOLATILE = ("transformers_version", "quantization_config", "auto_map", "dtype", "_name_or_path", "name_or_path")
NAMED = ("converted_from", "_name_or_path", "name_or_path")  # where a configuration may name a directory
LOCAL_PATH = re.compile(r"(?:^|[\s=:'\"])(?:/|~/|file://|[A-Za-z]:\\)[^\s'\"]*")
SLOTS = ("g_proj.weight", "g_proj.bias", "sink_key", "sink_value")
TRAINED = re.compile(r".*?(layers\.\d+\..+?)\.lora_(A|B)\.default\.weight")


def slots_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gates and sinks of the layers of a hybrid that are not full, by their names in the decoder."""
    found = {}
    for index, (module, window) in enumerate(zip(attention_layers(model), windows_of(model), strict=True)):
        if window != FULL:
            own = module.nha.state_dict()
            found |= {f"layers.{index}.self_attn.nha.{name}": own[name] for name in SLOTS}
    return found


def windows_of(model: PreTrainedModel) -> list[Any]:
    """The windows of a hybrid's layers."""
    return list(decoder(model).config.window_sizes)


def low_rank_changes(base: PreTrainedModel, model: PreTrainedModel, rank: int) -> dict[str, Tensor]:
    """The best changes of rank `rank` from a base model's linear layers to a hybrid's, by singular values.

    Two tensors for each layer that differs, `<name>.down` [rank, in] and `<name>.up` [out, rank] in float32; biases
    are not covered. Raises ValueError for weights that differ outside linear layers.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> one = LlamaForCausalLM(LlamaConfig(**small))
    >>> low_rank_changes(one, one, 2)
    {}
    """
    found = {}
    for stem, change in weight_changes(base, model):
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        root = s[:rank].sqrt()
        found[f"{stem}.down"] = root[:, None] * v[:rank]
        found[f"{stem}.up"] = u[:, :rank] * root
    return found


def weight_changes(base: PreTrainedModel, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, change [out, in] float32) of each linear layer in which a hybrid differs from its base model."""
    old = dict(decoder(base).named_parameters())
    for name, weight in decoder(model).named_parameters():
        if ".nha." in name or torch.equal(weight, old[name]):
            continue
        if weight.dim() != 2 or "embed" in name:
            raise ValueError(f"expected changes of linear layers alone, {name} differs")
        yield name.removesuffix(".weight"), (weight.double() - old[name].double()).float()


def packed_changes(base: PreTrainedModel, model: PreTrainedModel) -> dict[str, Tensor]:
    """The changes of all linear layers in 2 bits a weight, with one scale per row.

    Of changes that are spread evenly over a matrix, as training leaves them, 88 % of the squared sum is kept. Two
    tensors for each layer that differs: `<name>.packed2` [out, in / 4] uint8 and `<name>.scale` [out] float32. Raises
    ValueError as `low_rank_changes` does.
    """
    found: dict[str, Tensor] = {}
    for stem, change in weight_changes(base, model):
        found[f"{stem}.packed2"], found[f"{stem}{SCALE}"] = pack_rows(change, 2)
    return found


def pack_gates(slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gates and sinks with the gates' matrices in 8 bits."""
    found: dict[str, Tensor] = {}
    for name, x in slots.items():
        if name.endswith("g_proj.weight"):
            found[f"{name}.packed8"], found[f"{name}{SCALE}"] = pack_rows(x, 8)
        else:
            found[name] = x
    return found


def unpack_all(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file with every packed matrix as float32 under its own name."""
    packed = {name: match for name in tensors if (match := PACKED.fullmatch(name)) is not None}
    scales = {f"{match[1]}{SCALE}" for match in packed.values()}
    found = {name: x for name, x in tensors.items() if name not in packed and name not in scales}
    for name, match in packed.items():
        found[match[1]] = unpack_rows(tensors[name], tensors[f"{match[1]}{SCALE}"], int(match[2]))
    return found


def lora_changes(trained: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The changes that LoRA trained, from the tensors of a checkpoint, named as `low_rank_changes` names them.

    >>> stem = "model.base_model.model.model.layers.0.self_attn.q_proj.lora_"
    >>> pair = {f"{stem}A.default.weight": torch.ones(1, 2), f"{stem}B.default.weight": torch.ones(3, 1)}
    >>> {name: x.tolist() for name, x in lora_changes(pair, 2.0).items()}
    {'layers.0.self_attn.q_proj.down': [[1.0, 1.0]], 'layers.0.self_attn.q_proj.up': [[2.0], [2.0], [2.0]]}
    """
    found = {}
    for name, x in trained.items():
        match = TRAINED.fullmatch(name)
        if match is not None:
            found[match[1] + (".down" if match[2] == "A" else ".up")] = x if match[2] == "A" else scale * x
    return found


def converted_from(facts: Mapping[str, str]) -> dict[str, str]:
    """The base by its public name, in place of the path that it was read from.

    >>> converted_from({"base": "some/model"}), converted_from({})
    ({'converted_from': 'some/model'}, {})
    """
    return {"converted_from": facts["base"]} if "base" in facts else {}


def local_path_in(value: str) -> str | None:
    """The first absolute path in a text, which only one machine has, or None.

    >>> local_path_in("nha distill smollm2 run --text /data/books --tokens 2e7")
    '/data/books'
    >>> local_path_in("nha distill some/model run --text books/") is None
    True
    """
    match = LOCAL_PATH.search(value)
    return None if match is None else match[0].lstrip(" =:'\"\t\n")


def portable_config(values: Mapping[str, Any], facts: Mapping[str, str]) -> dict[str, Any]:
    """A configuration that names its base as `facts` do, and no directory that it was read from.

    >>> portable_config({"num_slots": 4, "converted_from": "/data/base"}, {})
    {'num_slots': 4}
    >>> portable_config({"converted_from": "/data/base"}, {"base": "some/model"})
    {'converted_from': 'some/model'}
    """
    kept = {n: x for n, x in values.items() if n not in NAMED or (isinstance(x, str) and not local_path_in(x))}
    return kept | converted_from(facts)


def check_facts(facts: Mapping[str, str]) -> None:
    """Raise ValueError where metadata has a path of this machine.

    >>> check_facts({"command": "nha distill smollm2 run --text ~/books"})
    Traceback (most recent call last):
    ValueError: expected metadata without paths of one machine, got '~/books' in 'command'
    """
    for name, value in facts.items():
        found = local_path_in(value)
        if found is not None:
            raise ValueError(f"expected metadata without paths of one machine, got {found!r} in {name!r}")


def save_delta(
    path: str | Path,
    model: PreTrainedModel,
    changes: Mapping[str, Tensor],
    facts: Mapping[str, str],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a hybrid's gates and sinks and the changes of its base's weights, durably, with a checksum.

    Beside packed changes gates are packed, too. `facts` are more of the file's metadata: base, licence, command.
    Raises ValueError for facts that name a path of this machine.
    """
    check_facts(facts)
    config = decoder(model).config
    sizes = {name: getattr(config, name) for name in (*SIZES, *ADDED)}
    tensors = {**slots_of(model), **changes}
    packs = any(PACKED.fullmatch(name) for name in changes)
    if packs:
        tensors = {**pack_gates(slots_of(model)), **changes}
    kept = {
        "format": PACKED_FORMAT if packs else FORMAT,
        "windows": json.dumps(windows_of(model)),
        "sizes": json.dumps(sizes),
    }
    kept["config"] = json.dumps(portable_config(config.to_diff_dict(), facts), default=str)
    own = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    write_tensors(path, own, {**facts, **kept})


def read_delta(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file that `save_delta` wrote. Raises ValueError for any other file."""
    tensors, metadata = read_tensors(path)
    if metadata.get("format") not in (FORMAT, PACKED_FORMAT):
        got = metadata.get("format")
        raise ValueError(f"expected a delta of format {FORMAT!r} or {PACKED_FORMAT!r} at {path}, got format {got!r}")
    for name, kind in (("windows", list), ("sizes", dict), ("config", dict)):
        text = metadata.get(name, "")
        try:
            whole = isinstance(json.loads(text), kind)
        except (ValueError, RecursionError):
            whole = False
        if not whole:
            raise ValueError(f"expected {name} in the metadata of {path}, got {text[:80]!r}")
    return tensors, metadata


def delta_config(path: str | Path) -> Any:
    """The configuration of the hybrid in a delta, which transformers' Auto classes know from then on."""
    _, metadata = read_delta(path)
    values = json.loads(metadata["config"]) | converted_from(metadata)
    kind = register_family(values.pop("model_type"))
    return kind(**{name: value for name, value in values.items() if name not in VOLATILE})


def delta_quality(path: str | Path) -> dict[str, float]:
    """A delta's numbers relative to those of its fair control, as ratios by name; empty where it has none."""
    return json.loads(read_delta(path)[1].get("quality", "{}"))


@torch.no_grad()
def apply_delta(model: PreTrainedModel, path: str | Path) -> None:
    """Turn a base model into the hybrid of a delta, in place; changes are added in float32.

    Caches keep their numbers as the file's configuration says, if it does. The model may be a hybrid already, if its
    weights are the base's and its slots have the same sizes. Raises ValueError, before a weight changes, for a model
    whose layers or slots have other shapes.
    """
    tensors, metadata = read_delta(path)
    tensors = unpack_all(tensors)
    windows, sizes = json.loads(metadata["windows"]), ADDED | json.loads(metadata["sizes"])
    config = decoder(model).config
    is_hybrid = getattr(config, "window_sizes", None) is not None
    own_sizes = {name: getattr(config, name) for name in sizes} if is_hybrid else sizes
    if own_sizes != sizes:
        raise ValueError(f"expected a model or a hybrid of {sizes} for {path}, got one of {own_sizes}")
    changes = changes_in(tensors)
    stack = decoder(model)
    for name, change in changes.items():
        try:
            layer: Any = stack.get_submodule(name)
        except AttributeError:
            raise ValueError(f"expected a base model with {name} for {path}, got {type(model).__name__}") from None
        if not isinstance(layer, nn.Linear) or layer.weight.shape != change.shape:
            got = list(getattr(layer, "weight", torch.empty(0)).shape)
            raise ValueError(f"expected {name} of shape {list(change.shape)} for {path}, got {got}")
    set_windows(model, windows) if is_hybrid else to_hybrid(model, windows, **sizes)
    stack = decoder(model)
    own = dict(stack.named_parameters())
    slots = {name: x for name, x in tensors.items() if ".nha." in name}
    for name, x in slots.items():
        if name not in own or own[name].shape != x.shape:
            got = list(own[name].shape) if name in own else "none"
            raise ValueError(f"expected {name} of shape {list(x.shape)} for {path}, got {got}")
    for name, change in changes.items():
        weight = stack.get_submodule(name).weight
        weight.copy_(weight.float() + change.to(weight.device))
    for name, x in slots.items():
        own[name].copy_(x)
    given = json.loads(metadata["config"])
    for name in CACHE_FORMATS:
        if name in given:
            setattr(stack.config, name, given[name])


def changes_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The change [out, in] float32 of every linear layer in an unpacked file, by the layer's name."""
    found = {name: x for name, x in tensors.items() if ".nha." not in name and not name.endswith((".down", ".up"))}
    stems = {name.removesuffix(".up") for name in tensors if name.endswith(".up")}
    return found | {stem: tensors[f"{stem}.up"].float() @ tensors[f"{stem}.down"].float() for stem in sorted(stems)}
