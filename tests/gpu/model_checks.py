"""Checks of hybrids on the kernels: `auto`, training, compiled decoding, autocast, distillation in CUDA graphs."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nha import nha_attention
from nha.models.segment import Reading, Segment, attend
from nha.ops import implementations, resolve_impl
from tests.gpu.cases import make, place, rms
from tests.gpu.kernel_checks import small
from tests.gpu.setting import Setting, expect_none

ROOT = Path(__file__).parents[2]


def automatic(setting: Setting) -> None:
    """impl="auto" is triton on CUDA, and `nha doctor` agrees and finds no fault."""
    expected = "triton" if setting.device == "cuda" else "chunked"
    assert resolve_impl("auto", setting.device) == expected
    assert implementations()["triton"] == "available"
    run = subprocess.run([sys.executable, "-m", "nha", "doctor", "--json"], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.startswith("{"), run.stdout + run.stderr
    doctor = json.loads(run.stdout)
    assert (doctor["chosen"], doctor["healthy"]) == (expected, True)


def hybrid(setting: Setting, windows: Sequence[Any] = (8, -1, 0), **changes: Any) -> Any:
    """A hybrid Llama of three layers (slots and window, full attention, slots alone), in float32."""
    from tests.models.families import hybrid as build

    # Weights as large as those of the tiny model would make errors of bfloat16 as large as the gradients.
    sizes = {} if setting.tiny else {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.1}
    model: Any = build("llama", list(windows), **sizes, **changes)
    return model.to(setting.device)


def token_ids(setting: Setting, batch: int, length: int) -> Tensor:
    from tests.models.families import tokens

    return tokens(batch, length, seed=setting.seed).to(setting.device)


def step(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Loss and gradients of a training step; `model` may be compiled."""
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    named = ((n.removeprefix("_orig_mod."), x.grad) for n, x in model.named_parameters())
    return {"loss": loss.detach()} | {n: x.clone() for n, x in named if x is not None}


def no_worse(found: dict[str, Tensor], other: dict[str, Tensor], exact: dict[str, Tensor], eps: float) -> list[str]:
    """Where `found` errs more than twice as much as `other` and its rounding, both measured against `exact`.

    Gradients of all parameters are scaled to one size and judged together: a few numbers of one err by chance.
    """
    wrong = [f"no gradient of {name}" for name in sorted(exact.keys() - found.keys())][:1]
    off, limit = 0.0, 0.0
    for name in exact.keys() & found.keys():
        size = max(rms(exact[name]), 1e-3 * exact["loss"].item())
        off += (rms(found[name].double() - exact[name]) / size) ** 2
        limit += (2 * (rms(other[name].double() - exact[name]) / size + eps)) ** 2
    return wrong if off <= limit else [*wrong, f"rms error of all gradients {off**0.5:.2e} > {limit**0.5:.2e}"]


def compiled(model: Any, setting: Setting, **options: Any) -> Any:
    """The model through torch.compile without a graph break."""
    from torch._inductor import config

    torch._dynamo.reset()
    config.compile_threads = 2  # other processes compile as well
    chosen: dict[str, Any] = {"backend": "aot_eager"} if setting.tiny else options
    return torch.compile(model, fullgraph=True, **chosen)


def training(setting: Setting) -> None:
    """A hybrid's training step compiles without a graph break and errs no more than eager."""
    model, ids = hybrid(setting).train(), token_ids(setting, 2, 40 if setting.tiny else 200)
    exact = step(copy.deepcopy(model).double(), ids)
    dtype = torch.float32 if setting.tiny else torch.bfloat16
    model = model.to(dtype)
    eager = step(model, ids)
    found = step(compiled(model, setting), ids)
    expect_none(no_worse(found, eager, exact, torch.finfo(dtype).eps))


def packed(setting: Setting) -> None:
    """Packed sequences give the same compiled and eager: with active slots, and with window and sink alone."""
    lengths, window, dim = ((5, 12, 3), 4, 16) if setting.tiny else ((150, 700, 30, 400), 64, 64)
    total, dtype = sum(lengths), torch.float32 if setting.tiny else torch.bfloat16
    generator = torch.Generator(setting.device).manual_seed(setting.seed)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=setting.device).to(dtype)

    cu = torch.tensor([0, *lengths, 0], dtype=torch.int32, device=setting.device).cumsum(0, dtype=torch.int32)
    given = [drawn(1, total, heads, dim) for heads in (6, 2, 2, 6, 2)]
    sink, start = (drawn(2, 1, dim), drawn(2, 1, dim)), (drawn(2, 16, dim), drawn(2, 16, dim))
    cases = [("no slots", 0, None), ("active slots", 16, start)]
    wrong = []
    for name, slots, initial in cases[:1] if setting.device == "cpu" else cases:  # a CPU runs them one by one
        gate = -drawn(1, total, 2, slots).abs()

        def read(given: list[Tensor], cu: Tensor, gate: Tensor = gate, initial: Any = initial) -> Tensor:
            q, k, v, q_slot, k_slot = given
            segment = Segment(q, k, v, gate, q_slot, k_slot, mask=None, cu_seqlens=cu)
            return attend(segment, Reading(window, sink=sink, initial=initial))[0]

        eager = read(given, cu).double()
        off = rms(compiled(read, setting, dynamic=False)(given, cu).double() - eager)
        if not off <= 2 * torch.finfo(dtype).eps * rms(eager):
            wrong.append(f"{name}: off by {off:.1e} rms")
    expect_none(wrong)


def decoding(setting: Setting) -> None:
    """A hybrid's decoding step compiles once, without a graph break, runs as a CUDA graph and keeps its addresses."""
    from transformers import StaticCache

    from nha.models.cache import nha_layers

    model, ids, start = hybrid(setting), token_ids(setting, 2, 30), 14
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids, use_cache=False).logits
        eager = model(ids, use_cache=False).logits
        one = compiled(model, setting, mode="reduce-overhead")
        cache = StaticCache(config=model.config, max_cache_len=64)
        model(ids[:, :start], past_key_values=cache, use_cache=True)
        held = [x.data_ptr() for layer in nha_layers(cache) for x in layer.state.tensors().values()]  # type: ignore[union-attr]
        found = []
        try:
            for at in range(start, 30):
                if at == start + 2:
                    torch.compiler.set_stance("fail_on_recompile")
                position = torch.full((2, 1), at, device=ids.device)
                options = {"past_key_values": cache, "use_cache": True, "position_ids": position}
                found.append(one(ids[:, at : at + 1], **options).logits.clone())
        finally:
            torch.compiler.set_stance("default")
    now = [x.data_ptr() for layer in nha_layers(cache) for x in layer.state.tensors().values()]  # type: ignore[union-attr]
    wrong = [] if held == now else ["the state moved"]
    logits = torch.cat(found, 1).double() - exact[:, start:]
    limit = 2 * (rms(eager[:, start:].double() - exact[:, start:]) + torch.finfo(torch.float32).eps * rms(exact))
    if not rms(logits) <= limit:
        wrong.append(f"logits rms error {rms(logits):.2e} > {limit:.2e}")
    expect_none(wrong)


def autocast(setting: Setting) -> None:
    """Under autocast a float32 hybrid trains in bfloat16, and the operator takes mixed dtypes, as SDPA does."""
    kind = "cpu" if setting.device == "cpu" else "cuda"
    model, ids = hybrid(setting).train(), token_ids(setting, 2, 40)
    exact = step(copy.deepcopy(model).double(), ids)
    low = step(copy.deepcopy(model).bfloat16(), ids)
    wrong = []
    try:
        with torch.autocast(kind, torch.bfloat16):
            wrong += no_worse(step(model, ids), low, exact, torch.finfo(torch.bfloat16).eps)
    except Exception as failure:
        wrong.append(f"the model raised {type(failure).__name__}: {' '.join(str(failure).split())[:200]}")
    flat = place(make(replace(small(), dtype="fp32", start="fresh"), setting.seed), setting.device)
    q, k, v, gate = (flat[n].detach() for n in ("q", "k", "v", "log_gate"))
    try:
        with torch.autocast(kind, torch.bfloat16):
            mixed = nha_attention(q, k, v.bfloat16(), gate, window_size=8).out
        plain = nha_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), gate, window_size=8).out
        if mixed.dtype != torch.bfloat16 or not torch.equal(mixed, plain):
            wrong.append(f"mixed inputs gave {mixed.dtype} and {rms(mixed.double() - plain.double()):.1e} off")
    except TypeError as failure:
        wrong.append(f"mixed inputs raised {failure}")
    expect_none(wrong)


def distilling_in_cuda_graphs(setting: Setting) -> None:
    """Passes of distillation in CUDA graphs give the losses and gradients of eager passes."""
    from nha.data.packing import pack
    from nha.distill.cuda_graphs import WARMUP_PASSES, CUDAGraphRunner, forward_backward
    from nha.distill.student import Distillation

    student = Distillation(hybrid(setting).bfloat16()).train()
    parameters = [p for p in student.parameters() if p.requires_grad]
    runner, wrong = CUDAGraphRunner(student, parameters), []
    for turn in range(WARMUP_PASSES + 3):
        rights, batches = [], []
        for name, lengths in (("text", (130, 9, 61)), ("recall", (70, 130))):
            ids = token_ids(replace(setting, seed=setting.seed + turn), 1, sum(lengths))[0].cpu().numpy()
            starts = [sum(lengths[:i]) for i in range(len(lengths))]
            batch = {n: torch.from_numpy(x) for n, x in pack([(ids, starts, ids % 5 == 0)]).items()}
            batch |= {"kl_weight": batch["follows"] / 200, "ce_weight": batch["answers"] / 40}
            on_gpu = {n: x.to(setting.device) for n, x in batch.items()}
            rights.append(forward_backward(student, parameters, on_gpu, 130))
            batches.append((name, batch))
        passes = runner(batches, 130)
        for (name, _), right, found in zip(batches, rights, passes, strict=True):
            pairs = zip((right[0], right[1], *right[2]), (found[0], found[1], *found[2]), strict=True)
            off = max(rms((x - y).double()) / max(rms(x.double()), 1e-12) for x, y in pairs if x is not None)
            if not off <= torch.finfo(torch.bfloat16).eps:
                wrong.append(f"{name} of turn {turn} is off by {off:.1e}")
    assert runner.captured
    expect_none(wrong)


@contextmanager
def recording() -> Iterator[list[Any]]:
    """Within the block, the memory pools of the CUDA graphs that are recorded; None for a graph with one of its own."""
    from nha.models import decode_graph

    pools, wrapped = [], decode_graph.capture

    def spy(run: Callable[[], Any], pool: Any = None) -> Any:
        pools.append(pool)
        return wrapped(run, pool)

    decode_graph.capture = spy
    try:
        yield pools
    finally:
        decode_graph.capture = wrapped


def difference(model: Any, ids: Tensor, new: int, **options: Any) -> list[str]:
    """Where the tokens that `generate` writes with CUDA graphs differ from those without; empty if they do not."""
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    found = model.generate(ids, **settings)
    eager = model.generate(ids, disable_compile=True, **settings)
    if torch.equal(found, eager):
        return []
    first = (found != eager).any(0).nonzero()[0].item()
    return [f"{list(ids.shape)} tokens, {list(options)}: they differ from place {first} of {found.shape[1]} on"]


def generating(setting: Setting) -> None:
    """`generate` writes the same tokens with a CUDA graph of its step as without."""
    model, ids = hybrid(setting).eval(), token_ids(setting, 2, 150)
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    with recording() as pools:
        wrong = difference(model, ids, 40) + difference(model, ids, 40, attention_mask=mask)
    if len(pools) != 2:
        wrong.append(f"{len(pools)} of 2 steps were recorded")
    expect_none(wrong)


def turns_of(model: Any, setting: Setting, lengths: tuple[int, ...], new: int, **options: Any) -> tuple[Tensor, Any]:
    """The token ids of a conversation, and its cache: `new` tokens after a text of each length."""
    from transformers import DynamicCache

    cache, ids = DynamicCache(config=model.config), token_ids(setting, 1, 0)
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    for turn, length in enumerate(lengths):
        ids = torch.cat([ids, token_ids(replace(setting, seed=setting.seed + turn), 1, length)], 1)
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings)
    return ids, cache


def conversing(setting: Setting) -> None:
    """Turns of a conversation record their steps: the tokens are those without graphs, and its cache grows again."""
    from nha.models.cache import cache_parts

    wrong = []
    for name, model in (("layers", hybrid(setting)), ("heads", hybrid(setting, windows=([8, -1], [-1, 0], 8)))):
        model, lengths, new = model.eval().requires_grad_(False), (150, 9, 40), 30
        with recording() as pools:
            ids, cache = turns_of(model, setting, lengths, new)
        eager, other = turns_of(model, setting, lengths, new, disable_compile=True)
        recorded = sum(pool is None for pool in pools)
        if not torch.equal(ids, eager):
            wrong.append(f"windows of {name}: tokens differ from place {(ids != eager)[0].nonzero()[0].item()} on")
        if recorded != len(lengths):
            wrong.append(f"windows of {name}: {recorded} of {len(lengths)} steps were recorded")
        lengths_of = [[part.get_seq_length() for part in cache_parts(each)] for each in (cache, other)]
        if any(part.is_compileable for part in cache_parts(cache)) or lengths_of[0] != lengths_of[1]:
            wrong.append(
                f"windows of {name}: layers {cache.layers} of {lengths_of[0]} tokens, expected {lengths_of[1]}"
            )
    expect_none(wrong)


def outputs(model: Any, ids: Tensor) -> list[Tensor]:
    """Logits of a prompt, a token and a segment that follow in a cache, and of a left-padded batch."""
    from transformers import DynamicCache

    cache, mask = DynamicCache(config=model.config), torch.ones_like(ids)
    mask[0, :40] = 0
    found = [
        model(ids[:, start:stop], past_key_values=cache, use_cache=True).logits
        for start, stop in ((0, 100), (100, 101), (101, 150))
    ]
    return [*found, model(ids, attention_mask=mask).logits * mask[..., None]]


def fused_prompts(setting: Setting) -> None:
    """Layers of prompts in few launches err no more than the family's code, and write the same tokens in float32."""
    from nha.models.fused_step import fusing, is_fused

    model, ids = hybrid(setting, slots=16).eval().requires_grad_(False), token_ids(setting, 2, 150)
    assert all(is_fused(layer) for layer in model.model.layers)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wrong = []
    with torch.no_grad(), fusing(False):
        exact = outputs(copy.deepcopy(model).double(), ids)
        plain_tokens = model.generate(ids, **options)
    with fusing(True):
        if not torch.equal(model.generate(ids, **options), plain_tokens):
            wrong.append("tokens differ")
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        with torch.no_grad():
            with fusing(False):
                plain = outputs(model, ids)
            with fusing(True):
                found = outputs(model, ids)
        for name, fast, slow, right in zip(("prompt", "token", "segment", "padded"), found, plain, exact, strict=True):
            limit = 2 * (rms(slow.double() - right) + torch.finfo(dtype).eps * rms(right))
            if not rms(fast.double() - right) <= limit:
                wrong.append(f"{name} in {dtype}: rms error {rms(fast.double() - right):.2e} > {limit:.2e}")
    expect_none(wrong)


def recorded_prompts(setting: Setting) -> None:
    """`generate` writes the same tokens after prompts that it pads and replays as after prompts that it calls."""
    from nha.models.prompt_graph import PREPARED, padded_length, padded_lengths

    model, wrong = hybrid(setting, slots=16).eval().requires_grad_(False), []
    longer = () if setting.tiny else (PREPARED + 1, padded_length(PREPARED + 1))
    with recording() as pools:
        for seed, length in enumerate((150, 200, 9, 256, 300, 257, *longer)):
            wrong += difference(model, token_ids(replace(setting, seed=setting.seed + seed), 1, length), 20)
    prompts, expected = sum(pool is not None for pool in pools), len(padded_lengths(PREPARED)) + bool(longer)
    if prompts != expected:
        wrong.append(f"{prompts} of {expected} prompts were recorded")
    expect_none(wrong)


CHECKS: tuple[Callable[[Setting], None], ...] = (automatic, training, packed, decoding, autocast)
OF_GRAPHS = (generating, conversing, fused_prompts, recorded_prompts, distilling_in_cuda_graphs)
GPU_CHECKS: tuple[Callable[[Setting], None], ...] = (*CHECKS, *OF_GRAPHS)
