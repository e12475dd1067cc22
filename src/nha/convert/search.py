"""Which layers should keep full attention: found without training, since windows are a run-time setting.

Greedy first: layers are widened one by one, always the one that lowers the loss most. Then exchange: a wide layer is
swapped for another as long as that lowers the loss. Every set of layers that was measured is saved, so a search that
was stopped can be resumed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nha.data.recall import RecallSettings, training_sequence
from nha.data.text import blocks, calibration_text
from nha.io import write_atomically
from nha.models.config import FULL, LayerWindow, check_windows, sliding_layers
from nha.models.head import batch_tokens, check_head, hidden_states, token_losses
from nha.models.windows import attention_layers, decoder, hybrid_layers, temporary_windows
from nha.ops import NHAState
from nha.ops.heads import HeadGroup, Window, head_groups, per_head

FORMAT, OLD_FORMAT = "nha-search-v2", "nha-search-v1"
OLD_SETTINGS = {"window": "window_size", "wide": "wide_window", "weight": "recall_weight", "slots": "num_slots"}
Layers = tuple[int, ...]


@dataclass(frozen=True)
class Losses:
    """Mean losses in nats: of the answers in recall sequences, of all tokens of text sequences, and both weighted."""

    loss: float
    recall: float
    text: float


@dataclass(frozen=True)
class SearchData:
    """Token ids to search with: text [N, T], recall sequences [R, T] and answers [R, T] bool, True at their tokens."""

    text: Tensor
    recall: Tensor
    answers: Tensor

    @property
    def fingerprint(self) -> str:
        """A digest of all ids."""
        digest = hashlib.sha256()
        for tensor in (self.text, self.recall, self.answers):
            digest.update(str(list(tensor.shape)).encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def search_data(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | None = None,
    *,
    text_sequences: int = 8,
    recall_sequences: int = 16,
    seq_len: int = 2048,
    seed: int = 0,
) -> SearchData:
    """Sequences to search with, from texts (default: the built-in calibration text), which no evaluation reads.

    Recall sequences are those of training (`nha.data.recall.training_sequence`), facts at least 128 tokens back. Raises
    ValueError for too little text.
    """
    if min(text_sequences, recall_sequences) < 1:
        raise ValueError(
            f"expected at least one sequence of text and of recall, got {text_sequences} and {recall_sequences}"
        )
    given = [calibration_text()] if texts is None else list(texts)
    text = blocks(tokenizer, given, text_sequences, seq_len)
    plain = (tokenizer(each, add_special_tokens=False, verbose=False).input_ids for each in given)
    filler = np.concatenate([np.asarray(ids) for ids in plain])
    generator = np.random.default_rng(seed)
    settings = RecallSettings(distances=(min(128, seq_len // 4), 1 << 20))
    rows = [training_sequence(generator, tokenizer, filler, seq_len, settings) for _ in range(recall_sequences)]
    ids, answers = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    return SearchData(text, ids, answers)


def candidate_layers(config: Any) -> list[int]:
    """The layers that a search may choose: all but those that slide over a window of their own, unless all do."""
    sliding = sliding_layers(config)
    return [i for i, slides in enumerate(sliding) if not slides or all(sliding)]


def layer_bytes(model: PreTrainedModel, window: Window, context: int) -> int:
    """Bytes that a layer with this window, or these windows of its heads, keeps of `context` tokens, exactly."""
    groups = head_groups(per_head(window, model.config.num_key_value_heads))  # type: ignore[arg-type]
    return sum(group_bytes(model, group, context) for group in groups)


def group_bytes(model: PreTrainedModel, group: HeadGroup, context: int) -> int:
    """Bytes that some heads of a layer with one window keep of a text of `context` tokens."""
    config: Any = model.config
    heads, window = len(group.heads), group.window_size
    dim, kind = attention_layers(model)[0].head_dim, model.dtype
    if window == FULL:
        return 2 * heads * dim * context * kind.itemsize
    like = torch.empty(1, 1, heads, dim, dtype=kind, device="meta")
    gate = torch.empty(1, 1, heads, config.num_slots, dtype=kind, device="meta")
    rotates = getattr(config, "rope_parameters", None) is not None
    return NHAState.empty(window, key=like, value=like, log_gate=gate, shared=not rotates).padded().nbytes


def cache_bytes(model: PreTrainedModel, windows: Sequence[Window], context: int) -> int:
    """Bytes that the cache of a hybrid with these windows takes after `context` tokens of one text."""
    own = getattr(model.config, "sliding_window", None)
    total = 0
    for window, slides in zip(windows, sliding_layers(model.config), strict=True):
        tokens = min(context, own) if slides and own is not None else context  # windows are no longer than that
        total += layer_bytes(model, window, tokens)
    return total


class Evaluator:
    """Losses of a hybrid with any set of wide layers.

    A forward pass starts at the first layer that differs from the base set: the inputs of all layers with that set are
    stored, on the model's device if they take at most half of the free memory there.

    Args:
        model: a hybrid in evaluation mode.
        data: what to read.
        windows: the windows of all layers while none is wide.
        wide_window: the window of a wide layer, -1 for full attention.
        recall_weight: weight of the recall loss, from 0 to 1; the text loss has the rest.
        max_batch_tokens: tokens in one forward pass; default: what fits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        data: SearchData,
        windows: Sequence[int],
        *,
        wide_window: int = FULL,
        recall_weight: float = 0.5,
        max_batch_tokens: int | None = None,
    ):
        hybrid_layers(model)
        if not 0 <= recall_weight <= 1:
            raise ValueError(f"expected recall_weight from 0 to 1, got {recall_weight}")
        self.model, self.recall_weight, self.wide_window = model, recall_weight, wide_window
        self.windows = check_windows(model.config, list(windows))
        check_head(model, data.text)
        limit = batch_tokens(model) if max_batch_tokens is None else max_batch_tokens
        self.batches: list[tuple[Tensor, Tensor | None]] = []
        for ids, answers in ((data.text, None), (data.recall, data.answers)):
            size = max(1, limit // ids.shape[1])
            for at in range(0, len(ids), size):
                self.batches.append((ids[at : at + size], None if answers is None else answers[at : at + size]))
        config: Any = model.config
        tokens = data.text.numel() + data.recall.numel()
        nbytes = tokens * config.hidden_size * config.num_hidden_layers * model.dtype.itemsize
        on_gpu = model.device.type == "cuda" and nbytes < torch.cuda.mem_get_info(model.device)[0] // 2
        self.storage = model.device if on_gpu else torch.device("cpu")
        self.layer_inputs: list[dict[int, Tensor]] = [{} for _ in self.batches]
        self.base: Layers | None = None

    def windows_of(self, chosen: Layers) -> list[LayerWindow]:
        """The windows of all layers when these are wide."""
        return [self.wide_window if i in chosen else window for i, window in enumerate(self.windows)]

    def _first_change(self, chosen: Layers) -> int:
        """The first layer whose window differs from that in the base set."""
        if self.base is None:
            return 0
        differ = set(self.base) ^ set(chosen)
        return min(differ, default=len(self.windows) - 1)

    def set_base(self, chosen: Layers) -> None:
        """Read the data with these wide layers and store the inputs of all layers."""
        if self.base != chosen:
            self._read(chosen, self._first_change(chosen), store=True)
            self.base = chosen

    def __call__(self, chosen: Layers) -> Losses:
        """The losses with these wide layers."""
        return self._read(chosen, self._first_change(chosen), store=False)

    @torch.no_grad()
    def _read(self, chosen: Layers, start: int, *, store: bool) -> Losses:
        sums = {True: [0.0, 0], False: [0.0, 0]}  # loss and tokens of recall and text
        device = self.model.device
        with temporary_windows(self.model, self.windows_of(chosen)):
            for (ids, answers), stored in zip(self.batches, self.layer_inputs, strict=True):
                ids = ids.to(device)
                first = stored[start].to(device) if start else None
                storing = _store_inputs(self.model, stored, start, self.storage) if store else nullcontext()
                with _start_at(self.model, start, first), storing:
                    hidden = hidden_states(self.model, ids)[:, :-1]
                targets = ids[:, 1:]
                if answers is not None:
                    mask = answers[:, 1:].to(device)
                    hidden, targets = hidden[mask], targets[mask]
                losses = token_losses(self.model, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
                sums[answers is not None][0] += losses.double().sum().item()
                sums[answers is not None][1] += losses.numel()
        recall, text = (sums[which][0] / max(1, sums[which][1]) for which in (True, False))
        return Losses(self.recall_weight * recall + (1 - self.recall_weight) * text, recall, text)


@contextmanager
def _start_at(model: PreTrainedModel, start: int, hidden: Tensor | None) -> Iterator[None]:
    """Within the context, a forward pass skips the layers before `start`, whose input is `hidden` if that is given."""
    layers = decoder(model).layers
    if hidden is None:
        yield
        return

    def replace(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden}

    handle = layers[start].register_forward_pre_hook(replace, with_kwargs=True)
    try:
        for layer in layers[:start]:
            layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
        yield
    finally:
        handle.remove()
        for layer in layers[:start]:
            del layer.forward


@contextmanager
def _store_inputs(
    model: PreTrainedModel, stored: dict[int, Tensor], start: int, device: torch.device
) -> Iterator[None]:
    """Within the context, the input of every layer after `start` is put into `stored`, on a device."""

    def hook(index: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        stored[index] = (args[0] if args else kwargs["hidden_states"]).to(device)

    layers = list(enumerate(decoder(model).layers))[start + 1 :]
    handles = [layer.register_forward_pre_hook(partial(hook, i), with_kwargs=True) for i, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def greedy_and_exchange(
    candidates: Sequence[int],
    count: int,
    loss: Callable[[Layers], float],
    *,
    exchange: bool = True,
    set_base: Callable[[Layers], None] = lambda chosen: None,
) -> Layers:
    """`count` of the candidates that make `loss` small: added greedily, then exchanged one by one until nothing helps.

    `loss` is called with sorted tuples; `set_base` is called with each set that the next ones add one layer to.

    >>> value = {0: 1.0, 1: 3.0, 2: 2.0}
    >>> greedy_and_exchange([0, 1, 2], 2, lambda chosen: -sum(value[i] for i in chosen))
    (1, 2)
    """
    chosen: Layers = ()
    for _ in range(count):
        set_base(chosen)
        chosen = min((_with(chosen, i) for i in candidates if i not in chosen), key=loss)
    improved = exchange
    while improved:
        improved = False
        for leaving in chosen:
            rest = tuple(i for i in chosen if i != leaving)
            set_base(rest)
            best = min((_with(rest, i) for i in candidates if i not in rest), key=loss)
            if loss(best) < loss(chosen):
                chosen, improved = best, True
                break
    return chosen


def _with(chosen: Layers, layer: int) -> Layers:
    return tuple(sorted((*chosen, layer)))


def heuristics(candidates: Sequence[int], count: int) -> dict[str, Layers]:
    """Placements to compare with: spread evenly, the first and the last layers.

    >>> heuristics(range(30), 4)["uniform"]
    (3, 11, 18, 26)
    """
    step = len(candidates) / max(1, count)
    return {
        "uniform": tuple(candidates[int(step * (i + 0.5))] for i in range(count)),
        "first": tuple(candidates[:count]),
        "last": tuple(candidates[len(candidates) - count :]),
    }


@dataclass
class SearchResult:
    """A search, as plain data.

    Attributes:
        settings: what the losses depend on; only a search with the same is resumed.
        windows: of all layers, with the best wide layers.
        full_layers: the best wide layers.
        evaluated: losses of every set that was measured, by layers separated by commas.
        placements: named sets to compare with.
        front: for every number of wide layers measured, the best set: `full_layers`, `bytes`, and its losses.
        context: tokens for which `bytes` counts the cache.
        seconds: spent measuring, over all runs.
    """

    settings: dict[str, Any]
    windows: list[LayerWindow] = field(default_factory=list)
    full_layers: list[int] = field(default_factory=list)
    evaluated: dict[str, dict[str, float]] = field(default_factory=dict)
    placements: dict[str, list[int]] = field(default_factory=dict)
    front: list[dict[str, Any]] = field(default_factory=list)
    context: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with `format`."""
        return {"format": FORMAT, **asdict(self)}

    def losses(self, layers: Sequence[int]) -> dict[str, float]:
        """Losses of a set that was measured; KeyError for another."""
        return self.evaluated[name_of(tuple(sorted(layers)))]


def name_of(layers: Layers) -> str:
    """How a set of layers is written: `3,11`."""
    return ",".join(map(str, layers))


def search(
    evaluate: Evaluator,
    count: int,
    *,
    context: int,
    settings: dict[str, Any],
    known: SearchResult | None = None,
    exchange: bool = True,
    save: Callable[[SearchResult], None] = lambda result: None,
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """The best `count` wide layers, compared with placements by rule and with none and all layers wide.

    Args:
        evaluate: measures a set of wide layers.
        count: wide layers.
        context: tokens for which the cache's bytes are counted.
        settings: of this search; kept in the result.
        known: a result to go on from; what it has measured is not measured again.
        exchange: exchange layers after the greedy search.
        save: called with the result so far after every measurement, and with the final one.
        progress: called with (sets looked at, sets expected in all).

    Raises ValueError for a count that the model has no layers for.
    """
    candidates = candidate_layers(evaluate.model.config)
    if not 0 <= count <= len(candidates):
        raise ValueError(f"expected from 0 to {len(candidates)} layers with full attention, got {count}")
    result = known or SearchResult(settings)
    looked = 0
    base: list[Layers] = [()]
    expected = sum(len(candidates) - i for i in range(count)) + 3 + exchange * count * (len(candidates) - count)

    def losses(chosen: Layers) -> float:
        nonlocal looked
        name = name_of(chosen)
        if name not in result.evaluated:
            started = time.perf_counter()
            evaluate.set_base(base[0])
            result.evaluated[name] = asdict(evaluate(chosen))
            result.seconds += time.perf_counter() - started
            save(result)
        looked += 1
        if progress is not None:
            progress(min(looked, expected), expected)
        return result.evaluated[name]["loss"]

    def set_base(chosen: Layers) -> None:
        base[0] = chosen

    losses(())
    best = greedy_and_exchange(candidates, count, losses, exchange=exchange, set_base=set_base)
    set_base(())
    placements = heuristics(candidates, count) | {"none": (), "all": tuple(candidates)}
    for chosen in placements.values():
        losses(chosen)
    result.placements = {name: list(chosen) for name, chosen in placements.items()}
    result.full_layers, result.windows = list(best), evaluate.windows_of(best)
    result.context = context
    result.front = front(evaluate, result.evaluated, context)
    if progress is not None:
        progress(expected, expected)
    save(result)
    return result


def front(evaluate: Evaluator, evaluated: dict[str, dict[str, float]], context: int) -> list[dict[str, Any]]:
    """For every number of wide layers the best set that was measured, as far as no smaller cache has a lower loss."""
    best: dict[int, tuple[float, Layers]] = {}
    for name, losses in evaluated.items():
        layers = tuple(int(i) for i in name.split(",") if i)
        best[len(layers)] = min(best.get(len(layers), (float("inf"), ())), (losses["loss"], layers))
    rows: list[dict[str, Any]] = []
    for _, (loss, layers) in sorted(best.items()):
        if not rows or loss < rows[-1]["loss"]:
            size = cache_bytes(evaluate.model, evaluate.windows_of(layers), context)
            rows.append({"full_layers": list(layers), "bytes": size, **evaluated[name_of(layers)]})
    return rows


def count_for_bytes(
    model: PreTrainedModel, windows: Sequence[Window], wide_window: int, max_bytes: int, context: int
) -> int:
    """The number of layers that may be wide if the cache takes at most `max_bytes` bytes after `context` tokens.

    Raises ValueError if not even none may.
    """
    candidates = candidate_layers(model.config)
    sizes = []
    for count in range(len(candidates) + 1):
        some = [wide_window if i in candidates[:count] else window for i, window in enumerate(windows)]
        sizes.append(cache_bytes(model, some, context))
    if max_bytes < sizes[0]:
        raise ValueError(f"expected at least {sizes[0]:,} bytes for a cache of {context:,} tokens, got {max_bytes:,}")
    return max(count for count, size in enumerate(sizes) if size <= max_bytes)


def save_search(result: SearchResult, path: Path) -> None:
    """Write a result as JSON; an existing file is replaced only by a whole new one."""
    write_atomically(path, json.dumps(result.to_dict(), indent=1) + "\n")


def load_search(path: str | Path, settings: dict[str, Any] | None = None) -> SearchResult:
    """Read what `save_search` wrote.

    Raises ValueError for a file that is something else, and, if `settings` are given, for a search with others.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a result of nha search, there is no file at {path}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"expected a result of nha search at {path}, got no JSON: {error}") from None
    if isinstance(data, dict) and data.get("format") == OLD_FORMAT and isinstance(data.get("settings"), dict):
        named = {OLD_SETTINGS.get(name, name): value for name, value in data["settings"].items()}
        data |= {"format": FORMAT, "settings": named}
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        got = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"expected a file of format {FORMAT!r} at {path}, got {got!r}")
    try:
        result = SearchResult(**{k: v for k, v in data.items() if k != "format"})
    except TypeError as error:
        raise ValueError(f"expected a whole result of nha search at {path}: {error}") from None
    if settings is not None and result.settings != settings:
        other = next(k for k in {**settings, **result.settings} if settings.get(k) != result.settings.get(k))
        raise ValueError(
            f"expected a search with {other} {settings.get(other)!r} at {path}, got {result.settings.get(other)!r}"
        )
    return result


def windows_from_search(path: str | Path) -> list[LayerWindow]:
    """The windows of all layers that a search found best. Raises ValueError for a search that has not ended."""
    result = load_search(path)
    if not result.windows:
        raise ValueError(f"expected a search that has ended at {path}, got one of {len(result.evaluated)} sets")
    return list(result.windows)
