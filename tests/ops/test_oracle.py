"""Random calls of the operator, with everything that can be combined, against the independent oracle."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from nha import NHAState, nha_attention
from tests.builders import Case, make
from tests.inputs import TOKENWISE, assert_close_to
from tests.ops.oracle import Result, Sequence, oracle

WINDOWS = [-1, 0, 1, 2, 3, 5, 8, 15, 16, 17, 23, 40, 200_000]
BLOCKS, CASES, LONG_CASES = 10, 50, 500  # cases of each of the blocks


@dataclass
class Call:
    """A random call: its inputs, which tokens of them are real sequences, and how they are cut into segments."""

    inputs: dict[str, Tensor]
    options: dict
    spans: list[tuple[int, int, int]]  # batch index, first token, end of every sequence
    cuts: list[int]  # of all rows alike; packed and padded batches have one segment
    initial: tuple[Tensor, Tensor] | None
    masks: dict = field(default_factory=dict)


def gates(chance: random.Random, log_gate: Tensor) -> Tensor:
    kind = chance.choice(["normal", "normal", "paper", "open", "floor", "beyond", "mixed"])
    if kind == "paper":
        return torch.nn.functional.logsigmoid(log_gate + 3) / 8
    if kind == "open":
        return torch.zeros_like(log_gate)
    if kind == "floor":
        return torch.full_like(log_gate, -5.0)
    if kind == "beyond":
        return torch.where(log_gate < -1, -1e4, 1e4).double()
    if kind == "mixed":
        return torch.where(log_gate < -0.5, -5.0, 0.0).double()
    return log_gate


def random_call(seed: int) -> Call:
    chance = random.Random(seed)
    layout = chance.choice(["dense", "dense", "padded", "packed"])
    heads = chance.randint(1, 3)
    case = Case(
        batch=1 if layout == "packed" else chance.randint(1, 3),
        length=chance.choice([1, 2, chance.randint(3, 12), chance.randint(13, 40)]),
        query_heads=heads * chance.randint(1, 3),
        heads=heads,
        dim=chance.choice([1, 3, 8]),
        value_dim=chance.choice([1, 2, 7]),
        slots=chance.randint(1, 6),
        sinks=chance.choice([0, 0, 1, 2]),
        separate=chance.random() < 0.5,
        seed=seed,
    )
    inputs = make(case)
    inputs["log_gate"] = gates(chance, inputs["log_gate"])
    window = chance.choice(WINDOWS)
    options = {
        "window_size": window,
        "scale": chance.choice([None, 0.1, 2.5]),
        "softcap": chance.choice([None, None, 0.7, 30.0]),
        "impl": chance.choice(["auto", "chunked", "reference"]),
        "return_slot_mass": True,
        "return_state": True,
    }
    length, spans, masks, cuts = case.length, [(b, 0, case.length) for b in range(case.batch)], {}, [0, case.length]
    if layout == "padded":
        spans = []
        for b in range(case.batch):
            count = chance.randint(1, length)
            start = chance.choice([0, length - count])
            spans.append((b, start, start + count))
        mask = torch.zeros(case.batch, length, dtype=torch.bool)
        for b, start, stop in spans:
            mask[b, start:stop] = True
        masks = {"attention_mask": mask}
    elif layout == "packed":
        inner = sorted(chance.randint(0, length) for _ in range(chance.randint(0, 3)))
        bounds = [0, *inner, length]
        spans = [(0, start, stop) for start, stop in itertools.pairwise(bounds)]
        masks = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    else:
        inner = {chance.randint(1, length) for _ in range(chance.choice([0, 0, 1, 3, length]))}
        cuts = sorted({0, *inner, length})
    initial = None
    if window >= 0 and chance.random() < 0.3:
        size = (len(spans), heads, case.slots)
        generator = torch.Generator().manual_seed(seed + 1)
        initial = tuple(
            torch.randn(*size, d, generator=generator, dtype=torch.float64) for d in (case.dim, case.value_dim)
        )
    return Call(inputs, options, spans, cuts, initial, masks)  # type: ignore[arg-type]


def by_library(call: Call) -> tuple[Tensor, Tensor, NHAState]:
    state = None
    if call.initial is not None:
        shared = "k_slot" not in call.inputs
        state = NHAState.from_slots(*call.initial, call.options["window_size"], shared_keys=shared)
    outs, masses = [], []
    for start, stop in itertools.pairwise(call.cuts):
        part = {name: x[:, start:stop] if name in TOKENWISE else x for name, x in call.inputs.items()}
        output = nha_attention(**part, **call.options, **call.masks, state=state)
        state = output.state
        outs.append(output.out)
        masses.append(output.slot_mass)
    assert state is not None
    return torch.cat(outs, 1), torch.cat(masses, 1), state


def by_oracle(call: Call, row: int) -> Result:
    b, start, stop = call.spans[row]
    q, k = call.inputs["q"], call.inputs["k"]
    named = {"q_slot": q, "k_slot": k} | call.inputs
    tokens = Sequence(**{name: named[name][b, start:stop].numpy() for name in Sequence.__dataclass_fields__})
    sink = call.inputs.get("sink")
    scale = call.options["scale"]
    return oracle(
        tokens,
        call.options["window_size"],
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        softcap=call.options["softcap"],
        sink=None if sink is None else (sink[0].numpy(), sink[1].numpy()),
        initial=None if call.initial is None else (call.initial[0][row].numpy(), call.initial[1][row].numpy()),
    )


def check(call: Call, where: str) -> None:
    out, mass, state = by_library(call)
    real = torch.zeros(out.shape[:2], dtype=torch.bool)
    window = call.options["window_size"]
    for row, (b, start, stop) in enumerate(call.spans):
        exact = by_oracle(call, row)
        real[b, start:stop] = True
        count = stop - start
        assert_close_to(out[b, start:stop], torch.from_numpy(exact.out), f"out of row {row}, {where}")
        assert_close_to(mass[b, start:stop], torch.from_numpy(exact.mass), f"mass of row {row}, {where}")
        assert_close_to(state.slot_key[row], torch.from_numpy(exact.slot_key), f"slot keys of row {row}, {where}")
        assert_close_to(state.slot_value[row], torch.from_numpy(exact.slot_value), f"slot values of row {row}, {where}")
        assert state.num_tokens[row] == count, where
        cached = count if window < 0 else min(count, window)
        for name, x in (("key", "k"), ("value", "v"), ("window_slot_key", "k_slot"), ("window_log_gate", "log_gate")):
            if getattr(state, name) is not None and cached:
                assert torch.equal(getattr(state, name)[row, -cached:], call.inputs[x][b, stop - cached : stop]), where
    assert not out[~real].any(), where


@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_calls_equal_the_oracle(block, request):
    count = LONG_CASES if request.config.getoption("--long") else CASES
    for seed in range(block * count, (block + 1) * count):
        check(random_call(seed), f"seed {seed}")


@pytest.mark.parametrize("block", range(5))
def test_gradients_equal_differences_of_the_oracle(block, request):
    count = 100 if request.config.getoption("--long") else 10
    for seed in range(block * count, (block + 1) * count):
        call = random_call(seed)
        call.inputs["log_gate"] = call.inputs["log_gate"].clamp(-4.9, -0.1)  # off the clamp's edges
        chance = torch.Generator().manual_seed(seed)

        def normal(x, chance=chance):
            return torch.randn(x.shape, generator=chance, dtype=torch.float64)

        flat = {name: x for name, x in call.inputs.items() if name != "sink"}
        flat |= dict(zip(("sink_key", "sink_value"), call.inputs.get("sink", ()), strict=False))
        direction = {name: normal(x) for name, x in flat.items()}
        weight = normal(by_library(call)[0])

        def call_at(step, flat=flat, direction=direction, call=call):
            moved = {name: x + step * direction[name] for name, x in flat.items()}
            sink = (moved.pop("sink_key"), moved.pop("sink_value")) if "sink_key" in moved else None
            inputs = moved if sink is None else moved | {"sink": sink}
            return Call(inputs, call.options, call.spans, call.cuts, call.initial, call.masks)

        def loss(step, call_at=call_at, weight=weight):
            moved = call_at(step)
            rows = ((row, *span) for row, span in enumerate(moved.spans))
            return sum(float((by_oracle(moved, row).out * weight[b, i:j].numpy()).sum()) for row, b, i, j in rows)

        step = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad((by_library(call_at(step))[0] * weight).sum(), step)
        # Differences at h and h / 2, extrapolated: the error of the rule falls with h ** 4.
        h = 1e-3
        wide, narrow = ((loss(x) - loss(-x)) / (2 * x) for x in (h, h / 2))
        exact = (4 * narrow - wide) / 3
        size = max(1.0, abs(exact), float(np.abs(weight.numpy()).sum()))
        assert abs(float(slope) - exact) <= 1e-7 * size, f"seed {seed}: {float(slope)} instead of {exact}"


def test_many_decoding_steps_stay_as_exact_as_the_first(request):
    """A step at a time in float32 beside float64: the error does not grow, nor does the state."""
    steps, batch = (200_000 if request.config.getoption("--long") else 3000), 64
    case = Case(batch=1, length=batch, query_heads=2, heads=1, dim=4, value_dim=4, slots=4, window=8)
    states: dict = {torch.float32: None, torch.float64: None}
    errors, nbytes = [], set()
    with torch.no_grad():
        for start in range(0, steps, batch):
            inputs = make(Case(**vars(case) | {"seed": start}), torch.float32)
            inputs["log_gate"] = inputs["log_gate"] / 8
            for t in range(batch):
                token = {name: x[:, t : t + 1] for name, x in inputs.items()}
                low = nha_attention(**token, window_size=8, state=states[torch.float32], return_state=True)
                states[torch.float32] = low.state
            # Float64 may read many tokens at a time: the segment law holds there to 1e-13.
            double = {name: x.double() for name, x in inputs.items()}
            high = nha_attention(**double, window_size=8, state=states[torch.float64], return_state=True)
            states[torch.float64] = high.state
            errors.append(float((low.out - high.out[:, -1:]).abs().max()))
            nbytes.add(low.state.nbytes)
    first = max(errors[: len(errors) // 4])
    assert max(errors) <= 4 * first, (max(errors), first)
    assert len(nbytes) == 1
