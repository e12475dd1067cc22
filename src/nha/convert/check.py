"""Checks of a fresh conversion on a few tokens: they find a family that an adapter written for others gets wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nha.errors import one_line
from nha.models.config import FULL, sliding_layers
from nha.models.families import FAMILIES, KEEP_POSITIONS
from nha.models.observe import Observation, observe
from nha.models.windows import hybrid_layers, temporary_windows
from nha.ops.backends import compile_kernels
from nha.ops.heads import map_window

TOKENS = 6
SHIFT = 97  # tokens by which the same text is moved to see whether slot keys change
REPEATS = 16  # times the spread of two runs of a model that does not repeat its own bits
ROUNDING = 64  # units in the last place, of the largest number, that three kernels may differ by


@dataclass
class Reference:
    """Predictions of the unconverted model for ids [1, T]: logits [1, T, V] of each run that may be equalled."""

    ids: Tensor
    runs: list[Tensor]
    spread: float


@contextmanager
def in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, the model is in evaluation mode; then every module is in its own again."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def check_structure(model: PreTrainedModel) -> None:
    """Raise ValueError, with the reason, for a model not built as the adapter expects, or with weights elsewhere."""
    name = str(model.config.model_type)
    if model.get_output_embeddings() is None:
        raise ValueError(f"expected a causal language model, got {type(model).__name__}")
    stack: Any = model.get_decoder()
    if not isinstance(getattr(stack, "layers", None), torch.nn.ModuleList):
        raise ValueError(f"expected a decoder with a list of layers, got {name}, whose {type(stack).__name__} has none")
    without = [i for i, layer in enumerate(stack.layers) if not hasattr(layer, "self_attn")]
    if without:
        raise ValueError(f"expected softmax attention (self_attn) in every layer, got {name} with none in {without}")
    if not hasattr(stack, "rotary_emb"):
        raise ValueError(f"expected one rotary embedding for all layers, got {name}: its positions are elsewhere")
    away = [name for name, weight in model.named_parameters() if weight.device.type == "meta"]
    if away:
        raise ValueError(
            f"expected all weights in memory, got {len(away)} that are offloaded, such as {away[0]}; hybridize "
            "the model without a device map, save it, and load the hybrid with the device map"
        )


@contextmanager
def reasons(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, an error in a family that is not among the tested ones says that the family is the reason."""
    try:
        yield
    except (torch.OutOfMemoryError, ValueError):
        raise
    except Exception as error:
        name = _family(model)
        if name in FAMILIES:
            raise
        raise ValueError(
            f"expected a family that can be converted; {name} is not among the tested ones, and trying it gave "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error


@torch.no_grad()
def predict(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """Logits [1, T, V] of ids [1, T], without a cache."""
    return model(input_ids=ids.to(model.device), use_cache=False, **options).logits


def reference(model: PreTrainedModel, ids: Tensor) -> Reference:
    """The predictions of a model before its conversion, for the first few tokens of ids [N, T].

    A model whose attention is not PyTorch's is read with that as well, since hybrid layers compute short texts with it.
    """
    config: Any = model.config.get_text_config()
    own = getattr(config, "sliding_window", None) if any(sliding_layers(config)) else None
    ids = ids[:1, : min(TOKENS, own or TOKENS)]
    with in_eval_mode(model):
        runs = [predict(model, ids), predict(model, ids)]
        spread = float((runs[0] - runs[1]).abs().max())
        chosen = config._attn_implementation
        if chosen not in ("sdpa", None) and model._supports_sdpa:
            model.set_attn_implementation("sdpa")
            try:
                runs.append(predict(model, ids))
            finally:
                model.set_attn_implementation(chosen)
    return Reference(ids, runs, spread)


def check_conversion(model: PreTrainedModel, before: Reference) -> None:
    """Raise ValueError unless a fresh hybrid is, within its windows, the model that it was.

    Four checks on a few tokens: predictions are the original's bit for bit; every layer calls its attention once; keys
    for slots are free of positions; reading with a cache gives what reading without one does.
    """
    config: Any = model.config.get_text_config()
    length = before.ids.shape[1]
    windows = [map_window(lambda own: own if own == FULL else max(own, length), each) for each in config.window_sizes]
    if config.slots_from_start:  # then slots change predictions from the first token on
        windows = [FULL] * len(windows)
    with in_eval_mode(model), temporary_windows(model, windows):
        found = predict(model, before.ids)
        _check_predictions(model, found, before)
        _check_slot_keys(model, before.ids)
        _check_cache(model, before.ids, found)


def _family(model: PreTrainedModel) -> str:
    return str(model.config.model_type).removeprefix("nha-")


def _check_predictions(model: PreTrainedModel, found: Tensor, before: Reference) -> None:
    if any(torch.equal(found, run) for run in before.runs):
        return
    error = min(float((found - run).abs().max()) for run in before.runs)
    if not 0 < error <= REPEATS * before.spread:
        raise ValueError(
            f"expected the bits of {_family(model)} within the windows, got logits that differ by {error:.3g}: "
            "its attention does something that a hybrid layer does not know"
        )


def _check_slot_keys(model: PreTrainedModel, ids: Tensor) -> None:
    """Attention sees distances alone, so the same text further on must give the same keys for slots."""
    runs: list[list[tuple[int, Tensor]]] = []
    length = ids.shape[1]

    def see(layer: int, seen: Observation) -> None:
        runs[-1].append((layer, seen.slot_key.float()))

    for start in (0, SHIFT):
        runs.append([])
        position = torch.arange(start, start + length, device=model.device)[None]
        with observe(model, see):
            predict(model, ids, position_ids=position)
    layers = list(range(len(hybrid_layers(model))))
    if [layer for layer, _ in runs[0]] != layers:
        calls = [layer for layer, _ in runs[0]]
        raise ValueError(f"expected one call of attention in each layer {layers} of {_family(model)}, got {calls}")
    if _family(model) in KEEP_POSITIONS:
        return
    for (layer, first), (_, moved) in zip(*runs, strict=True):
        error = float((first - moved).norm() / first.norm().clamp_min(1e-30))
        if error > _tolerance(model, SHIFT):
            raise ValueError(
                f"expected keys for slots without positions in {_family(model)}, got some in layer {layer} that change "
                f"by {error:.1%} when the text is moved by {SHIFT} tokens"
            )


def _check_cache(model: PreTrainedModel, ids: Tensor, whole: Tensor) -> None:
    """Compare the prediction for the last token, read with a cache, with that of one pass without a cache."""
    compile_kernels(lambda: _read_last(model, ids), model.device)
    last = _read_last(model, ids)
    found, wanted = last[:, -1].float(), whole[:, -1].float()
    error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if error > _tolerance(model, 1):
        raise ValueError(
            f"expected {_family(model)} to read with a cache as without one, got logits that differ by {error:.1%}"
        )


@torch.no_grad()
def _read_last(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [1, 1, V] of the last token, after the others were read into a cache."""
    ids = ids.to(model.device)
    first = model(input_ids=ids[:, :-1], use_cache=True)
    name = "cache" if "cache" in first else "past_key_values"  # before transformers 5.24
    return model(input_ids=ids[:, -1:], use_cache=True, **{name: first[name]}).logits


def _tolerance(model: PreTrainedModel, distance: int) -> float:
    """How far rounding may move what a few layers compute, relative, for positions rounded at a distance."""
    dtype = model.dtype if model.dtype.is_floating_point and model.dtype.itemsize > 1 else torch.bfloat16
    return min(0.3, ROUNDING * max(torch.finfo(dtype).eps, distance * torch.finfo(torch.float32).eps))
