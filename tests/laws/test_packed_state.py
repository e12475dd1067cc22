"""States in fewer bytes: errors stay bounded at any length, float32 changes no bit, and files keep the format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from nha import NHAConfig, load_cache, save_cache
from nha.io import read_tensors, write_tensors
from nha.memory import MemoryStore
from nha.models.cache import NHACacheLayer, allow_rollback, cache_nbytes, nha_layers
from nha.ops import NHAState, RingState
from nha.ops.packed_state import MAX_INT8, MAX_INT12, PackedState, check_state_dtype
from nha.tensor_file import DIGEST
from tests.models.families import hybrid, tokens

PACKED = ("bfloat16", "int8")
STEP = {"bfloat16": 2.0**-7, "int8": 1 / (MAX_INT12 / 2)}  # of a slot, relative to the largest number of its row


def random_state(window: int = 8, tokens_read: int = 30, dtype: torch.dtype = torch.float32) -> NHAState:
    torch.manual_seed(0)
    state = NHAState.from_slots(torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8), window, dtype=dtype).padded()
    state.num_tokens += tokens_read
    for name in ("key", "value"):
        getattr(state, name).normal_()
    state.window_log_gate.copy_(F.logsigmoid(torch.randn(state.window_log_gate.shape)) / 8)
    return state


def same(one: Any, other: Any) -> bool:
    left, right = one.tensors(), other.tensors()
    return left.keys() == right.keys() and all(torch.equal(x, right[name]) for name, x in left.items())


@pytest.mark.parametrize("state_dtype", PACKED)
def test_errors_stay_bounded_over_5000_steps(state_dtype):
    """Slots of all speeds, the slowest with a half-life of 5,500 tokens, whose updates are far below one step.

    A step rounds by less than one step of the format and what was rounded decays with the slot. If roundings only
    added up in the wrong direction, a slot with decay alpha would be off by 1 / (1 - alpha) steps; independent ones
    would be off by the root of half of that. The bound is 4 times the latter.
    """
    torch.manual_seed(0)
    slots, dim, steps = 8, 16, 5000
    gate = -torch.logspace(-0.5, -3.9, slots)[None, None, :]
    drift = torch.randn(1, 1, 1, dim)
    state = NHAState.from_slots(torch.zeros(1, 1, slots, dim), torch.zeros(1, 1, slots, dim), 0)
    exact = torch.zeros(1, 1, slots, dim, dtype=torch.float64)
    packed = PackedState.of(state, state_dtype)
    alpha = gate[..., None].double().exp()
    written, largest = torch.randn(steps, dim) + drift[0, 0], torch.zeros(slots)
    worst = torch.zeros(slots)
    for step in range(steps):
        state = packed.unpack()
        state.slot_key = torch.lerp(written[step].expand_as(state.slot_key), state.slot_key, alpha.float())
        state.num_tokens += 1
        packed = PackedState.of(state, state_dtype)
        exact = torch.lerp(written[step].double().expand_as(exact), exact, alpha)
        largest = torch.maximum(largest, exact[0, 0].abs().amax(-1).float())
        error = (packed.unpack().slot_key - exact)[0, 0].abs().amax(-1).float()
        worst = torch.maximum(worst, error / largest)
    half = 1 / (1 - alpha[0, 0, :, 0] ** 2)
    assert (worst <= 4 * STEP[state_dtype] * half.sqrt().float()).all(), worst


@pytest.mark.parametrize("state_dtype", PACKED)
def test_updates_far_below_one_step_are_not_lost(state_dtype):
    """A slot of ones moves towards twos by 2 ** -14 of the way a token, less than a tenth of a step."""
    share, steps = 2.0**-14, 3000
    ones = torch.ones(1, 1, 1, 16)
    packed = PackedState.of(NHAState.from_slots(ones, ones, 0), state_dtype)
    step = packed.slot_key_scale.item() if packed.slot_key_scale is not None else 2.0**-7
    assert share < step / 10
    for _ in range(steps):
        state = packed.unpack()
        state.slot_key.lerp_(2 * ones, share)
        state.num_tokens += 1
        packed = PackedState.of(state, state_dtype)
    exact = 2 - (1 - share) ** steps
    assert exact > 1 + 10 * step
    assert (packed.unpack().slot_key - exact).abs().max() < 4 * step


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("state_dtype", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_packing_again_changes_no_bit(dtype, state_dtype, ring):
    """Also where other tokens were read in between: the window is rounded once, and slots only when written."""
    state = random_state(dtype=dtype)
    packed = PackedState.of(RingState.of(state, 3) if ring else state, state_dtype)
    again = packed.unpack()
    for read in range(3):
        again.num_tokens += 1
        later = PackedState.of(again, state_dtype).map(torch.clone)
        later.num_tokens -= read + 1
        assert same(packed, later)
    packed.check()
    in_order = packed.in_order()
    assert same(in_order, PackedState.of(in_order.unpack(), state_dtype))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_rounding_is_within_one_step(scale):
    state = random_state()
    state = state.map(lambda x: x * scale if x.is_floating_point() and x.shape[-1] == 8 else x)
    for state_dtype, steps in (("bfloat16", 2.0**-7), ("int8", 2 / MAX_INT12)):
        found = PackedState.of(state, state_dtype).unpack()
        for name in ("slot_key", "slot_value", "key", "value"):
            x, y = getattr(state, name), getattr(found, name)
            step = 1 / MAX_INT8 if state_dtype == "int8" and name in ("key", "value") else steps
            assert ((x - y).abs() <= step * x.abs().amax(-1, keepdim=True)).all(), name
        assert all(x.isfinite().all() for x in found.tensors().values())


def decoded(model: Any, ids: Tensor, cache: Any = None, start: int = 40) -> tuple[Tensor, Any]:
    """Logits of the tokens from `start` on, read one at a time, and the cache."""
    outs = []
    with torch.no_grad():
        if cache is None:
            cache = model(ids[:, :start], use_cache=True).past_key_values
        for place in range(start, ids.shape[1]):
            outs.append(model(ids[:, place : place + 1], past_key_values=cache).logits)
    return torch.cat(outs, 1), cache


@pytest.mark.parametrize("state_dtype", PACKED)
def test_a_model_decodes_close_to_its_float32_state_in_fewer_bytes(state_dtype):
    model, ids = hybrid("llama", [8, [3, 8], 0], slots=8), tokens(2, 400)
    wanted, plain = decoded(model, ids)
    model.config.state_dtype = state_dtype
    found, cache = decoded(model, ids)
    assert all(isinstance(layer.state, PackedState) for layer in nha_layers(cache))
    assert cache_nbytes(cache) < cache_nbytes(plain) / 1.9
    apart = (found.log_softmax(-1) - wanted.log_softmax(-1)).abs().mean(-1)
    early, late = apart[:, :120].mean(), apart[:, 240:].mean()
    assert late < 2 * early + 1e-3  # errors do not grow with the text
    model.config.state_dtype = "float32"
    assert torch.equal(decoded(model, ids)[0], wanted)


@pytest.mark.parametrize("state_dtype", PACKED)
def test_files_and_stores_keep_the_format(state_dtype, tmp_path):
    model, ids = hybrid("llama", [8, [3, -1], 0]), tokens(1, 70)
    model.config.state_dtype = state_dtype
    _, cache = decoded(model, ids)
    save_cache(cache, tmp_path / "cache", model)
    model.config.state_dtype = "float32"  # the file counts
    again = load_cache(tmp_path / "cache", model)
    assert {layer.state_dtype for layer in nha_layers(again)} == {state_dtype}
    assert all(same(a.state, b.state) for a, b in zip(nha_layers(again), nha_layers(cache), strict=True))
    more = torch.cat([ids, tokens(1, 9, seed=1)], 1)
    assert torch.equal(decoded(model, more, again, 70)[0], decoded(model, more, cache, 70)[0])

    store = MemoryStore(tmp_path / "store", 1 << 30, 32, 1)
    store.read(model, ids)
    model.config.state_dtype = state_dtype
    cold, hit = store.read(model, ids), store.read(model, ids)
    assert (cold.num_found, hit.num_found) == (0, 64)
    assert torch.equal(decoded(model, ids, cold.cache, 64)[0], decoded(model, ids, hit.cache, 64)[0])


@pytest.mark.parametrize("change", ["slot_key", "slot_key_scale", "key", "key_scale", "slot_value_error"])
def test_a_file_whose_tensors_do_not_fit_is_refused(change, tmp_path):
    model: Any = hybrid("llama", 8)
    model.config.state_dtype = "int8"
    _, cache = decoded(model, tokens(1, 45))
    save_cache(cache, tmp_path / "cache", model)
    found, metadata = read_tensors(tmp_path / "cache", "cpu")
    name = f"1.{change}"
    for damaged in (found[name].float(), found[name][:, :, :1].contiguous(), None):
        parts = found | {name: damaged} if damaged is not None else {k: x for k, x in found.items() if k != name}
        write_tensors(tmp_path / "damaged", parts, {k: x for k, x in metadata.items() if k != DIGEST})
        with pytest.raises(ValueError, match="layer 1 at"):
            load_cache(tmp_path / "damaged", model)


@pytest.mark.parametrize("state_dtype", PACKED)
@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 3}, {"num_beams": 2}, {"cache_implementation": "static"}]
)
def test_every_way_to_decode_works(state_dtype, options):
    model: Any = hybrid("llama", [8, -1, 3])
    model.config.state_dtype = state_dtype
    ids = tokens(2 if "prompt_lookup_num_tokens" not in options else 1, 40)
    mask = torch.ones_like(ids)
    mask[0, : 7 if len(ids) == 2 else 0] = 0
    common: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    found = model.generate(ids, attention_mask=mask, **common, **options, disable_compile=True)
    assert found.shape == (len(ids), 48)


def test_taking_tokens_back_moves_a_cursor_alone():
    model: Any = hybrid("llama", [8, 3, 0])
    model.config.state_dtype = "int8"
    ids, cache = tokens(1, 60), DynamicCache(config=model.config)
    allow_rollback(cache, 6)
    with torch.no_grad():
        model(ids[:, :44], past_key_values=cache)
        for place in range(44, 50):
            model(ids[:, place : place + 1], past_key_values=cache)
    layers: list[Any] = nha_layers(cache)
    before = [layer.state.map(torch.clone) for layer in layers]
    cache.crop(-4)
    assert cache.get_seq_length() == 46
    for state, layer in zip(before, nha_layers(cache), strict=True):
        state.num_tokens -= 4
        assert same(state, layer.state)
    assert decoded(model, ids, cache, 46)[0].isfinite().all()
    assert cache.get_seq_length() == 60


def test_refusals():
    with pytest.raises(ValueError, match="int4"):
        check_state_dtype("int4")
    with pytest.raises(ValueError, match="state_dtype.*'fp8'"):
        NHAConfig(state_dtype="fp8")
    odd = NHAState.from_slots(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3), 4)
    with pytest.raises(ValueError, match="even head dim.*3"):
        PackedState.of(odd, "int8")
    model: Any = hybrid("llama", 8)
    model.config.state_dtype = "int8"
    cache = model(tokens(1, 20), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="gradients.*int8"):
        model(tokens(1, 1), past_key_values=cache)
    assert NHACacheLayer(8).state_dtype == "float32"
