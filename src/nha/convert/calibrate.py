"""Gates and sinks of a hybrid from what its layers see in some text: no gradient, one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nha.models.observe import Observation, observe
from nha.models.windows import attention_layers

ROUNDS = 10
GATE_DEVIATION = 100.0
SOFT_MEAN = SOFT_DEVIATION = 6.0
SPREAD = 12.0  # from the logits' mean of the slot that is written most to that of the slot written least
WRITES_PER_TOKEN = 2.5
SINK_TOKENS = 256


def kmeans(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Centres [H, clusters, D] of points [H, N, D] by Lloyd's algorithm, from points drawn at random.

    A centre that loses all its points stays where it is.

    >>> points = torch.tensor([[[0.0], [0.1], [5.0], [5.1]]])
    >>> kmeans(points, 2, torch.Generator().manual_seed(0)).flatten().sort().values
    tensor([0.0500, 5.0500])
    """
    heads, count, dim = points.shape
    drawn = torch.randperm(count, generator=generator)[:clusters].to(points.device)
    centres = points[:, drawn]
    for _ in range(ROUNDS):
        # argmin |p - c|^2 without the term that is the same for every centre
        distance = centres.square().sum(-1)[:, None] - 2 * points @ centres.mT
        nearest = distance.argmin(-1)
        total = torch.zeros_like(centres).scatter_add_(1, nearest[..., None].expand(-1, -1, dim), points)
        size = points.new_zeros(heads, clusters).scatter_add_(1, nearest, torch.ones_like(nearest, dtype=points.dtype))
        centres = torch.where(size[..., None] > 0, total / size[..., None].clamp_min(1), centres)
    return centres


def key_map(module: Any, hidden: Tensor, keys: Tensor) -> Tensor:
    """The linear map [H, D, hidden] from hidden states [N, hidden] to un-rotated keys [H, N, D].

    The weight of `k_proj` where it alone makes the keys; where a norm or a fused projection does, the least
    squares fit.
    """
    heads, _, dim = keys.shape
    weight = getattr(getattr(module, "k_proj", None), "weight", None)
    if weight is not None and weight.shape == (heads * dim, hidden.shape[1]):
        weight = weight.detach().float().view(heads, dim, -1)
        fitted = torch.einsum("nx,hdx->hnd", hidden, weight)
        offset = (keys - fitted).mean(1, keepdim=True)  # a bias
        if (keys - fitted - offset).norm() <= 1e-2 * keys.norm():
            return weight
    x = hidden - hidden.mean(0)
    y = (keys - keys.mean(1, keepdim=True)).transpose(0, 1).flatten(1)
    gram = (x.T @ x).double()
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solved = torch.linalg.solve(gram + ridge, (x.T @ y).double())
    return solved.T.float().view(heads, dim, -1)


def set_gate(parameters: Any, direction: Tensor, hidden: Tensor, init: str = "kmeans") -> None:
    """Make `g_proj` give -direction [H, M, hidden] . x, so scaled and shifted that few tokens overwrite a slot.

    Over hidden [N, hidden] every logit has deviation `GATE_DEVIATION`, and a share of `WRITES_PER_TOKEN` / M of the
    tokens brings it below 0: those overwrite the slot, nearly all others leave it exactly as it is. "soft" gates
    have mean `SOFT_MEAN` and deviation `SOFT_DEVIATION` instead: worse before any training, but no gate is so far
    from where it changes that it has no gradient. "spread" gates are soft with means that rise by `SPREAD` from a
    head's first slot to its last, so that slots remember for tens to thousands of tokens from the start.
    """
    weight = -direction.flatten(0, 1)
    logits = hidden @ weight.T
    deviation = logits.std(0).clamp_min(1e-6)
    if init in ("soft", "spread"):
        heads, slots = direction.shape[:2]
        rise = torch.linspace(0, SPREAD if init == "spread" else 0, slots, dtype=hidden.dtype, device=hidden.device)
        scale = SOFT_DEVIATION / deviation
        bias = SOFT_MEAN + rise.repeat(heads) - logits.mean(0) * scale
    else:
        scale = GATE_DEVIATION / deviation
        share = min(0.5, WRITES_PER_TOKEN / direction.shape[1])
        place = max(1, round(share * len(logits)))
        bias = -logits.kthvalue(place, dim=0).values * scale
    parameters.set_gates(weight * scale[:, None], bias)


@torch.no_grad()
def calibrate_gates(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    seed: int = 0,
    init: str = "kmeans",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Route every token to the slot whose centre its un-rotated key resembles, in every layer.

    Per KV head: the `num_slots` k-means centres C of the keys of ids [N, T] without their first tokens, and
    `g_proj = -(C - mean(k)) A` with A the map from hidden states to keys. One forward pass of the unconverted
    model; each layer is done as soon as it has been read. `init` is "kmeans", "soft" or "spread" (`set_gate`).
    Raises ValueError for fewer tokens than slots.
    """
    slots: int = model.config.num_slots  # type: ignore[assignment]
    count = ids.shape[0] * (ids.shape[1] - 1)
    if count < slots:
        raise ValueError(f"expected calibration text of at least {slots} tokens, one per slot, got {count}")
    modules = attention_layers(model)

    def calibrate(index: int, seen: Observation) -> None:
        hidden = seen.hidden[:, 1:].flatten(0, 1).float()
        keys = seen.slot_key[:, 1:].flatten(0, 1).transpose(0, 1).float()
        generator = torch.Generator().manual_seed(seed * 1000 + index)
        centres = kmeans(keys, slots, generator) - keys.mean(1, keepdim=True)
        set_gate(modules[index].nha, centres @ key_map(modules[index], hidden, keys), hidden, init)
        if progress is not None:
            progress(index + 1, len(modules))

    with observe(model, calibrate):
        model.get_decoder()(ids.to(model.device), use_cache=False)


@torch.no_grad()
def copy_gates(model: PreTrainedModel, ids: Tensor) -> None:
    """The paper's start: gate logits are the keys' coordinates, repeated or cut to the number of slots, no bias."""
    slots: int = model.config.num_slots  # type: ignore[assignment]
    modules = attention_layers(model)

    def copy(index: int, seen: Observation) -> None:
        hidden = seen.hidden.flatten(0, 1).float()
        weight = key_map(modules[index], hidden, seen.slot_key.flatten(0, 1).transpose(0, 1).float())
        rows = torch.arange(slots, device=weight.device) % weight.shape[1]
        modules[index].nha.set_gates(weight[:, rows].flatten(0, 1))

    with observe(model, copy):
        model.get_decoder()(ids.to(model.device), use_cache=False)


@torch.no_grad()
def calibrate_sinks(model: PreTrainedModel, ids: Tensor) -> None:
    """Set the sinks to the mean keys and values of first tokens, which hardly depend on the token.

    With S sinks, the mean over texts of S tokens from ids, sink s from the token at s: in pretrained models these
    draw attention that has nowhere to go (arXiv 2309.17453).
    """
    sinks: int = model.config.num_sinks  # type: ignore[assignment]
    starts = ids[:, 1 : 1 + ids[:, 1:].shape[1] // sinks * sinks].reshape(-1, sinks)
    step = max(1, len(starts) // SINK_TOKENS)
    modules = attention_layers(model)

    def average(index: int, seen: Observation) -> None:
        key, value = (x.float().mean(0).transpose(0, 1) for x in (seen.slot_key, seen.value))
        modules[index].nha.set_sinks(key, value)

    with observe(model, average):
        model.get_decoder()(starts[::step].to(model.device), use_cache=False)
