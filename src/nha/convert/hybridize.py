"""`hybridize`: a pretrained model becomes a Native Hybrid Attention model, with nothing trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nha.convert.calibrate import calibrate_gates, calibrate_sinks, copy_gates
from nha.convert.check import check_conversion, check_structure, in_eval_mode, reasons, reference
from nha.convert.undo import unchanged_on_error
from nha.convert.write_scores import fit_write_scores, set_write_scores
from nha.data.text import blocks, calibration_text
from nha.models.adapter import to_hybrid
from nha.models.config import FULL, plan_windows
from nha.models.families import check_family
from nha.models.quantized import keep_unpacked
from nha.models.smollm2 import forget_gguf
from nha.ops.heads import Window
from nha.settings import SLOT_WRITES, check_choice

Calibration = Sequence[str] | Tensor | None
BLOCKS, BLOCK = 16, 512
Init = Literal["kmeans", "soft", "spread", "keys", "paper"]
INITS: tuple[str, ...] = get_args(Init)


def calibration_ids(model: PreTrainedModel, calibration: Calibration, tokenizer: Any, slots: int) -> Tensor:
    """Token ids [N, T] to calibrate on: those given, or the tokens of the texts given or of the built-in text.

    Raises ValueError for ids of a wrong shape or outside the vocabulary, for less text than there are slots, and
    when a tokenizer is needed and cannot be found.
    """
    if isinstance(calibration, Tensor):
        if calibration.dim() != 2 or calibration.is_floating_point():
            raise ValueError(
                f"expected calibration ids [N, T] of ints, got {list(calibration.shape)} {calibration.dtype}"
            )
        embeddings: Any = model.get_input_embeddings()
        vocabulary = embeddings.num_embeddings
        if calibration.numel() and not 0 <= int(calibration.min()) <= int(calibration.max()) < vocabulary:
            raise ValueError(
                f"expected calibration ids from 0 to {vocabulary - 1}, got {calibration.min()} to {calibration.max()}"
            )
        ids = calibration
    else:
        if isinstance(calibration, str):
            raise ValueError("expected calibration to be a list of texts or ids [N, T], got one str")
        if tokenizer is None:
            name = model.config.name_or_path
            try:
                tokenizer = AutoTokenizer.from_pretrained(name)
            except (OSError, ValueError, KeyError):
                place = f"found none for {name!r}" if name else "the model has no name to find one by"
                raise ValueError(f"expected a tokenizer or ids to calibrate with, got none, and {place}") from None
        texts = [calibration_text()] if calibration is None else list(calibration)
        ids = fill(tokenizer, texts)
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    if tokens < slots:
        raise ValueError(f"expected calibration text of more than {slots} tokens, the number of slots, got {tokens}")
    return ids


def fill(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Up to 16 blocks of 512 tokens; shorter texts give fewer or one short block."""
    joined = "\n\n".join(texts)[: 64 * BLOCKS * BLOCK]
    ids = torch.tensor(tokenizer(joined, verbose=False).input_ids, dtype=torch.long)
    if len(ids) < BLOCK:
        return ids[None]
    return blocks(tokenizer, [joined], min(BLOCKS, len(ids) // BLOCK), BLOCK)


def hybridize(
    model: PreTrainedModel,
    num_slots: int = 64,
    window_size: int | Sequence[Window] = 64,
    full_layers: Sequence[int] = (),
    *,
    init: Init = "kmeans",
    calibration: Calibration = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    slot_distance: int = 128,
    num_sinks: int = 1,
    slot_write: str = "soft",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PreTrainedModel:
    """Turn a pretrained causal language model into a Native Hybrid Attention model, in place.

    The weights stay as they are; every converted layer gains a gate and a sink, calibrated on text without any
    training. Predictions for inputs up to the smallest window do not change by one bit; a few tokens are read before
    and after to check that. A model that cannot be converted is left as it was.

    Args:
        model: a model that `AutoModelForCausalLM` or `AutoModelForImageTextToText` loaded; of a multimodal model, the
            text model inside it is converted. The families of `nha.models.families.FAMILIES` are tested;
            any other family is tried, unless it is known not to work.
        num_slots: slots per KV head.
        window_size: tokens in the window of every layer that has full attention, or a list with one entry per layer
            (-1 leaves a layer as it is): an int, or a list with one int per KV head.
        full_layers: layers that keep full attention.
        init: how gates start. "kmeans" routes tokens to slots by k-means of their keys. "soft" does so with gates
            that have a gradient everywhere, as a start for training; "spread" as well, with slots written ever more
            rarely from a head's first to its last. For comparison, "keys" copies gates from `k_proj`, and "paper" is
            the authors' form: copied gates, zero slots that take part from the first token, no sink, no positions.
        calibration: texts, or token ids [N, T]; default: a part of the Python language reference.
        tokenizer: reads the texts; default: the one saved beside the model.
        slot_distance: how many tokens back a query sees the slots.
        num_sinks: constant keys and values that stand in for the first tokens of a text.
        slot_write: "soft", or "exact": a slot holds one token, kept for its score (`nha.convert.write_scores`), which
            takes the place of the gates that `init` names.
        seed: of the k-means.
        progress: called with (layers done, layers in all).

    Returns:
        The same model, now of a class whose name starts with NHA; `save_pretrained` and `AutoModelForCausalLM` know it.

    Raises:
        ValueError: a family that cannot work (with the reason), windows or layers that do not fit the model, weights
            that are elsewhere than in memory, text that is too short.
        TypeError: no model of transformers.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> _ = torch.manual_seed(0)
    >>> config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...                      num_attention_heads=4, num_key_value_heads=2)
    >>> hybrid = hybridize(LlamaForCausalLM(config), num_slots=8, window_size=16, full_layers=[1],
    ...                    calibration=torch.randint(50, (2, 64)))
    >>> type(hybrid).__name__, hybrid.config.window_sizes
    ('NHALlamaForCausalLM', [16, -1])
    """
    check_choice("init", init, INITS)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a model of transformers, got {type(model).__name__}")
    text: Any = model.config.get_text_config()
    check_family(text)
    check_structure(model)
    with reasons(model):
        windows = plan_windows(text, window_size, full_layers)
    if all(window == FULL for window in windows):
        raise ValueError(f"expected at least one layer to convert, got windows {windows}")
    check_choice("slot_write", slot_write, SLOT_WRITES)
    paper = init == "paper"
    if paper and slot_write == "exact":
        raise ValueError("expected slot_write='soft' with init='paper', got 'exact'")
    keep_unpacked(model)
    ids = calibration_ids(model, calibration, tokenizer, num_slots)
    with reasons(model), unchanged_on_error(model), in_eval_mode(model):
        before = reference(model, ids)
        to_hybrid(
            model,
            windows,
            num_slots=num_slots,
            num_sinks=0 if paper else num_sinks,
            slot_distance=0 if paper else slot_distance,
            slots_from_start=paper,
            slot_write=slot_write,
        )
        renew_hooks(model)
        check_conversion(model, before)
        if num_sinks and not paper:
            calibrate_sinks(model, ids)
        if slot_write == "exact":
            set_write_scores(model, fit_write_scores(model, [ids], progress))
        elif init in ("keys", "paper"):
            copy_gates(model, ids)
        else:
            calibrate_gates(model, ids, seed=seed, init=init, progress=progress)
    forget_gguf(model)
    keep_slots_unquantized(model)
    return model


def renew_hooks(model: PreTrainedModel) -> None:
    """Let the hooks of a device map call the forward of a module's new class: they hold that of the old one."""
    for module in model.modules():
        held = getattr(vars(module).get("_old_forward"), "__func__", None)
        if held in [base.forward for base in type(module).__mro__[1:] if hasattr(base, "forward")]:
            vars(module)["_old_forward"] = MethodType(type(module).forward, module)


def keep_slots_unquantized(model: PreTrainedModel) -> None:
    """Let a quantised model that is saved be loaded again: its gates are plain linear layers."""
    quantization: Any = getattr(model.config, "quantization_config", None)
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(quantization, name):
            from transformers.quantizers.base import get_keys_to_not_convert

            skipped = getattr(quantization, name)
            setattr(quantization, name, [*(get_keys_to_not_convert(model) if skipped is None else skipped), "g_proj"])
