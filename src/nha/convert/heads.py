"""Which KV heads need a wide window: found by one learned number for each, which mixes full and narrow attention.

Few heads copy from distant tokens (arXiv 2404.15574); learned mixing weights find them (arXiv 2410.10819). The model
reads clozes of real text: a passage, and one of its sentences again up to a name or number, which it must copy. Every
head's output is a * full + (1 - a) * window, and the sum of all a is kept small, so that a stays large in those heads
alone whose far tokens lower the loss. No weight of the model changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerBase

from nha.convert.check import in_eval_mode
from nha.convert.head_ranks import HeadRanks
from nha.convert.search import candidate_layers, load_search
from nha.convert.settings import WIDE_FRACTION, HeadSearchSettings, fraction_of
from nha.data.cloze import make_clozes
from nha.data.text import calibration_text
from nha.io import write_atomically
from nha.models.config import FULL, LayerWindow
from nha.models.families import check_family
from nha.models.head import check_head, hidden_states, token_losses
from nha.models.windows import attention_layers
from nha.ops.heads import Window, per_head, window_of
from nha.ops.state import slot_dtype

NAME = "nha_mix"  # of the attention function, in transformers' registry
FORMAT = "nha-heads-v1"
SPARE = 8  # tokens that the source of an answer lies beyond the window, at least
MAX_DOCUMENTS = 400  # more are sampled: cutting sentences takes longer than learning from them
FIRST_WEIGHT = 1.0  # full attention, the model as it is
HEAD = re.compile(r"\s*(\d+)(?:\.(\d+))?\s*=\s*(-?\d+)\s*")

Weights = list[list[float] | None]  # of the KV heads of each layer; None for layers with a window of their own


@dataclass(frozen=True)
class CopyRow:
    """A cloze: ids [T] of prompt and answer, of which the last `answer_tokens` are the answer."""

    ids: Tensor
    answer_tokens: int


@dataclass
class HeadPlan:
    """The result of a search, as plain data.

    Attributes:
        settings: what the weights depend on.
        weights: the mixing weight of every KV head, 0 to 1.
        heads: how many heads have the wide window.
        wide_window: their window.
        windows: of all layers, as `hybridize` and `DistillSettings` take them.
        losses: of the answers, in nats a token, at every step.
        kept: [heads, fraction] of the clozes that the model copies, kept with so many full heads and nothing trained,
            for the numbers of heads that were measured.
    """

    settings: dict[str, Any]
    weights: Weights
    heads: int
    wide_window: int
    windows: list[LayerWindow]
    losses: list[float] = field(default_factory=list)
    kept: list[list[float]] = field(default_factory=list)

    @property
    def chosen(self) -> list[tuple[int, int]]:
        """The heads with the wide window as (layer, head), the largest weight first."""
        return top_heads(self.weights, self.heads)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with `format`."""
        return {"format": FORMAT, **asdict(self)}


def copy_rows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    count: int,
    *,
    min_distance: int,
    max_distance: int,
    seed: int = 0,
    fewer: bool = False,
) -> list[CopyRow]:
    """Clozes whose source lies `min_distance` to `max_distance` tokens before the answer.

    Raises ValueError for documents that give less than `count` of them, or, if `fewer` are enough, that give none.
    """
    found: list[CopyRow] = []
    for cloze in make_clozes(tokenizer, documents, 2 * count, (min_distance, max_distance), seed):
        prompt = tokenizer(cloze.prompt, verbose=False).input_ids
        ids = tokenizer(f"{cloze.prompt} {cloze.answer}", verbose=False).input_ids
        if ids[: len(prompt)] == prompt and len(ids) > len(prompt):
            found.append(CopyRow(torch.tensor(ids), len(ids) - len(prompt)))
    if len(found) < count and not fewer:
        raise ValueError(
            f"expected text for {count} clozes, got enough for {len(found)}: give more or longer documents"
        )
    return found[:count]


def sample(documents: Sequence[str], seed: int) -> list[str]:
    """At most `MAX_DOCUMENTS` of the documents, drawn at random and in their order."""
    count = min(len(documents), MAX_DOCUMENTS)
    drawn = np.random.default_rng(seed).choice(len(documents), count, replace=False)
    return [documents[int(index)] for index in np.sort(drawn)]


class Mixer:
    """The attention of all layers while weights are learned.

    Args:
        weights: [layers, KV heads], of full attention; the rest is the window's.
        window_size: tokens in the window; the first token of a text is always visible.
        layers: those that mix; others keep their attention.
    """

    def __init__(self, weights: Tensor, window_size: int, layers: Sequence[int]):
        self.weights, self.window_size, self.layers = weights, window_size, frozenset(layers)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
        own: int | None,
    ) -> Tensor:
        """Output [B, T, HQ, Dv] of query [B, HQ, T, D], key and value [B, H, T, D]; `own` is a layer's own window."""
        heads, length = key.shape[1], key.shape[2]
        scores = query.unflatten(1, (heads, -1)).flatten(2, 3) @ key.mT * scale
        scores = scores.unflatten(2, (-1, length)).to(slot_dtype(key.dtype))  # [B, H, G, T, T]
        scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
        place = torch.arange(length, device=key.device)
        distance = place[:, None] - place
        visible = (distance >= 0) & (distance < (own or length))
        attention = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        if layer in self.layers:
            near = visible & ((distance < self.window_size) | (place == 0))
            windowed = scores.masked_fill(~near, float("-inf")).softmax(-1)
            weight = self.weights[layer].to(scores)[:, None, None, None]
            attention = weight * attention + (1 - weight) * windowed
        out = attention.to(value.dtype).flatten(2, 3) @ value
        return out.unflatten(2, (-1, length)).flatten(1, 2).transpose(1, 2)


def mixed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function "nha_mix" of transformers: rows without padding, each from its first token on."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mixer: Mixer = module.mixer
    return mixer.attend(module.layer_idx, query, key, value, scale, softcap, sliding_window), None


AttentionInterface.register(NAME, mixed_attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


@contextmanager
def mixing(model: PreTrainedModel, mixer: Mixer) -> Iterator[None]:
    """Within the context, a model that is no hybrid attends as a mixer does."""
    modules = attention_layers(model)
    configs = {id(module.config): module.config for module in modules} | {
        id(c): c for c in [model.get_decoder().config]
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        for module in modules:
            module.mixer = mixer
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        for module in modules:
            del module.mixer


def fit_weights(
    model: PreTrainedModel,
    rows: Sequence[CopyRow],
    settings: HeadSearchSettings,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Weights, list[float]]:
    """Mixing weights of every KV head, learned by Adam, and the loss of the answers at every step.

    A step reads `settings.batch_size` rows one by one. Layers with a sliding window of their own get None. Raises
    ValueError for a hybrid, and for a family whose logits `check_head` does not know.
    """
    config: Any = model.config.get_text_config()
    if hasattr(config, "window_sizes"):
        raise ValueError(f"expected a model that is not converted yet, got {type(model).__name__}")
    check_family(config)
    check_head(model, rows[0].ids[None])
    layers, heads = candidate_layers(config), config.num_key_value_heads
    weights = torch.full((config.num_hidden_layers, heads), FIRST_WEIGHT, device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=settings.lr)
    mixed = torch.zeros(config.num_hidden_layers, 1, device=model.device)
    mixed[list(layers)] = 1.0
    mixer, losses = Mixer(weights, settings.train_window, layers), []
    with in_eval_mode(model), frozen(model), mixing(model, mixer), torch.enable_grad():
        for step in range(settings.steps):
            optimizer.zero_grad()
            batch = [rows[(step * settings.batch_size + i) % len(rows)] for i in range(settings.batch_size)]
            losses.append(sum(backward(model, row, len(batch)) for row in batch))
            (settings.penalty * (weights * mixed).sum()).backward()
            optimizer.step()
            with torch.no_grad():
                weights.clamp_(0, 1)
            if progress is not None:
                progress(step + 1, settings.steps)
    found = weights.detach().cpu().tolist()
    return [[round(w, 4) for w in row] if i in layers else None for i, row in enumerate(found)], losses


def backward(model: PreTrainedModel, row: CopyRow, parts: int) -> float:
    """Add the gradient of a row's mean loss over its answer, divided by `parts`; that loss."""
    ids = row.ids.to(model.device)
    hidden = hidden_states(model, ids[None, :-1])[0, -row.answer_tokens :]
    loss = token_losses(model, hidden, ids[-row.answer_tokens :]).mean() / parts
    loss.backward()
    return loss.item()


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, no parameter asks for a gradient."""
    asked = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in asked:
            p.requires_grad_(False)
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)


def count_weights(weights: Sequence[Sequence[float] | None]) -> int:
    """The number of KV heads that have a weight."""
    return sum(len(row) for row in weights if row is not None)


def wide_heads(weights: Sequence[Sequence[float] | None], heads: int | None) -> int:
    """The number of KV heads that get the wide window: `heads`, or a sixth of all for None."""
    return fraction_of(count_weights(weights), WIDE_FRACTION) if heads is None else heads


def top_heads(weights: Sequence[Sequence[float] | None], count: int) -> list[tuple[int, int]]:
    """The `count` KV heads of the largest weights as (layer, head). Raises ValueError if there are fewer.

    >>> top_heads([[0.1, 0.9], None, [0.5, 0.2]], 2)
    [(0, 1), (2, 0)]
    """
    found = [(w, layer, head) for layer, row in enumerate(weights) for head, w in enumerate(row or ())]
    if not 0 <= count <= len(found):
        raise ValueError(f"expected from 0 to {len(found)} heads with a wide window, got {count}")
    return [(layer, head) for _, layer, head in sorted(found, key=lambda one: (-one[0], *one[1:]))[:count]]


def plan_heads(
    weights: Sequence[Sequence[float] | None],
    *,
    heads: int | None = None,
    wide_window: int = 256,
    window_size: int = 64,
) -> list[LayerWindow]:
    """Windows per KV head: `wide_window` for the `heads` of the largest weights (None: a sixth), less for all others.

    A wide window of -1 keeps full attention in these heads, and the others have `window_size`. Otherwise all windows
    together hold at most as many tokens as `window_size` in every head: the cache takes no more bytes.

    Raises ValueError for more heads than there are, and where nothing would be left for the others.

    >>> plan_heads([[0.1, 0.9], [0.5, 0.2]], heads=1, wide_window=160, window_size=64)
    [[32, 160], 32]
    >>> plan_heads([[0.1, 0.9], [0.5, 0.2]], heads=1, wide_window=-1, window_size=64)
    [[64, -1], 64]
    """
    total, heads = count_weights(weights), wide_heads(weights, heads)
    chosen = set(top_heads(weights, heads))
    narrow = window_size
    if wide_window != FULL and heads:
        left = window_size * total - wide_window * heads
        narrow = left // (total - heads) if heads < total else wide_window
        if left < 0 or (narrow < 1 and heads < total):
            raise ValueError(
                f"expected {heads} windows of {wide_window} to leave room for {total - heads} others in the bytes of "
                f"{window_size} tokens a head, got {left} tokens left"
            )
    plan: list[LayerWindow] = []
    for layer, row in enumerate(weights):
        if row is None:
            plan.append(FULL)
            continue
        window = window_of([wide_window if (layer, head) in chosen else narrow for head in range(len(row))])
        plan.append(window if isinstance(window, int) else list(window))
    return plan


def tiered_windows(
    weights: Sequence[Sequence[float] | None], tiers: Sequence[tuple[int, int]], window_size: int = 64
) -> list[LayerWindow]:
    """Windows per KV head by rank: each (heads, window) for the next heads by weight, `window_size` for all others.

    Copying near text takes more heads than copying far text, so long windows, or -1 for full attention, come first.
    Raises ValueError for more heads than there are.

    >>> tiered_windows([[0.1, 0.9], [0.5, 0.2], None], [(1, -1), (1, 256)])
    [[64, -1], [256, 64], -1]
    """
    ranks = HeadRanks(tuple(len(row or ()) for row in weights), tuple(top_heads(weights, count_weights(weights))))
    return [window if isinstance(window, int) else list(window) for window in ranks.windows(tiers, window_size)]


def search_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str] | None = None,
    settings: HeadSearchSettings | None = None,
    *,
    about: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HeadPlan:
    """The KV heads that copy from beyond a window, and windows for all heads.

    Args:
        model: not converted yet; nothing of it changes.
        tokenizer: the model's.
        documents: texts to make clozes of; default: the built-in calibration text.
        settings: default `HeadSearchSettings()`.
        about: more settings to keep in the plan, such as the model's name.
        progress: called with (steps done, steps in all).

    Raises ValueError for a hybrid, too little text, and sizes that do not fit the model.
    """
    settings = settings or HeadSearchSettings()
    rows = copy_rows(
        tokenizer,
        sample([calibration_text()] if documents is None else documents, settings.seed),
        settings.steps * settings.batch_size,
        min_distance=settings.train_window + SPARE,
        max_distance=settings.max_distance,
        seed=settings.seed,
    )
    weights, losses = fit_weights(model, rows, settings, progress=progress)
    return make_plan((about or {}) | settings.identity(), weights, losses, settings)


def make_plan(about: dict[str, Any], weights: Weights, losses: list[float], settings: HeadSearchSettings) -> HeadPlan:
    """The plan of `settings` for weights that were learned."""
    heads = wide_heads(weights, settings.heads)
    windows = plan_heads(weights, heads=heads, wide_window=settings.wide_window, window_size=settings.window_size)
    return HeadPlan(about, weights, heads, settings.wide_window, windows, [round(x, 4) for x in losses])


def save_plan(plan: HeadPlan, path: str | Path) -> None:
    """Write a plan as JSON, one layer a line; an existing file is replaced only by a whole new one."""
    text = json.dumps(plan.to_dict(), indent=1)
    text = re.sub(
        r"\[[^\[\]]*\]", lambda found: re.sub(r"\s+", " ", found.group()).replace("[ ", "[").replace(" ]", "]"), text
    )
    write_atomically(Path(path), text + "\n")


def load_plan(path: str | Path, about: dict[str, Any] | None = None) -> HeadPlan:
    """Read what `save_plan` wrote.

    Raises ValueError for a file that is something else, and, if `about` is given, for a plan with other settings.
    """
    data = _read(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        got = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"expected a file of format {FORMAT!r} at {path}, got {got!r}")
    try:
        plan = HeadPlan(**{k: v for k, v in data.items() if k != "format"})
    except TypeError as error:
        raise ValueError(f"expected a whole plan at {path}: {error}") from None
    if about is not None and plan.settings != about:
        other = next(k for k in {**about, **plan.settings} if about.get(k) != plan.settings.get(k))
        raise ValueError(
            f"expected a plan with {other} {about.get(other)!r} at {path}, got {plan.settings.get(other)!r}"
        )
    return plan


def windows_from_plan(path: str | Path) -> list[LayerWindow]:
    """The windows in a JSON file: a plan of heads, a search for layers, or a list with one entry per layer.

    Raises ValueError for any other file, and for a search that has not ended.
    """
    data = _read(path)
    if isinstance(data, list):
        return data
    if isinstance(data, dict) and data.get("format") == FORMAT:
        return load_plan(path).windows
    result = load_search(path)
    if not result.windows:
        raise ValueError(f"expected a search that has ended at {path}, got one of {len(result.evaluated)} sets")
    return list(result.windows)


def is_head_text(text: str) -> bool:
    """Whether a text names windows of layers and heads, as `windows_from_text` takes them, rather than a file.

    >>> is_head_text("15.2=256, 8=-1"), is_head_text("plans/heads=15.json")
    (True, False)
    """
    return all(HEAD.fullmatch(part) for part in text.split(","))


def windows_from_text(text: str, windows: Sequence[Window], heads: int) -> list[LayerWindow]:
    """Windows of all layers with changes such as `15.2=256, 8=-1`: of head 2 in layer 15 and of all heads in layer 8.

    A head's own change counts beside that of its layer, in whatever order they stand. Raises ValueError for what is no
    such text, for a layer or head that does not exist, and for one that is named twice.

    >>> windows_from_text("1.0=256, 0=-1", [64, 64], heads=2)
    [-1, [256, 64]]
    """
    changes: dict[tuple[int, int | None], int] = {}
    for part in text.split(","):
        found = HEAD.fullmatch(part)
        if found is None:
            raise ValueError(f"expected layer.head=window or layer=window, got {part.strip()!r}")
        layer, head = int(found[1]), None if found[2] is None else int(found[2])
        if layer >= len(windows):
            raise ValueError(f"expected layers below {len(windows)}, got {layer} in {part.strip()!r}")
        if head is not None and head >= heads:
            raise ValueError(f"expected heads below {heads} in layer {layer}, got {head} in {part.strip()!r}")
        if (layer, head) in changes:
            raise ValueError(f"expected each layer and head once, got {part.strip()!r} after another window for it")
        changes[layer, head] = int(found[3])
    plan = [
        [
            changes.get((layer, head), changes.get((layer, None), old))
            for head, old in enumerate(per_head(window, heads))
        ]
        for layer, window in enumerate(windows)
    ]
    short = [window_of(row) for row in plan]
    return [window if isinstance(window, int) else list(window) for window in short]


def _read(path: str | Path) -> Any:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a JSON file of windows, there is no file at {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"expected a JSON file of windows at {path}, got no JSON: {error}") from None
