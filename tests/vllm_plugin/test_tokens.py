"""vLLM writes the tokens of transformers: alone, side by side, in chunks, compiled, and for every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.vllm_plugin.material import engine, greedy, make_model, make_prompts, tokens, write

pytestmark = pytest.mark.vllm
NEW = 16


def lengths(request) -> list[int]:
    """Prompts of 10 to 700 tokens; with --long 64 of 10 to 3,000."""
    if request.config.getoption("--long"):
        return [10 + 2990 * i // 63 for i in range(64)]
    return [10, 1, 7, 8, 9, 16, 17, 33, 64, 100, 150, 256, 300, 512, 700, 40]


@pytest.mark.parametrize("kind", ["hybrid", "scratch"])
def test_tokens_are_those_of_transformers_alone_and_sixteen_at_once(kind, request):
    path, prompts = request.getfixturevalue(kind), make_prompts(lengths(request))
    expected = greedy(path, prompts, NEW)
    with engine(path, max_num_batched_tokens=512) as llm:
        assert tokens(write(llm, prompts, NEW)) == expected
        alone = [tokens(write(llm, [prompt], NEW))[0] for prompt in prompts]
    assert alone == expected


def test_compiled_code_writes_the_same(tmp_path):
    path = make_model(tmp_path / "model", "llama", [16, [-1, 8]])
    prompts = make_prompts([10, 100, 33])
    with engine(path, enforce_eager=False) as llm:
        assert tokens(write(llm, prompts, NEW)) == greedy(path, prompts, NEW)


FAMILIES = {
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    "cohere": {"tie_word_embeddings": True},
    "phi3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_write_what_they_write_in_transformers(family, tmp_path):
    windows = [-1, 8, -1, 8] if family == "gemma2" else [8, -1, [16, 4]]
    path = make_model(tmp_path / family, family, windows, **FAMILIES[family])
    prompts = make_prompts([10, 1, 40, 150])
    with engine(path) as llm:
        assert tokens(write(llm, prompts, NEW)) == greedy(path, prompts, NEW)


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def test_a_model_of_full_layers_alone(tmp_path):
    path = make_model(tmp_path / "model", "llama", [8, 8])
    edit_config(path, window_sizes=[-1, -1])
    prompts = make_prompts([10, 1, 40])
    with engine(path) as llm:
        assert tokens(write(llm, prompts, NEW)) == greedy(path, prompts, NEW)


LAYER = {"qk_norm": True, "output_gate": True, "slot_features": "silu", "value_activation": "silu"}


def test_options_of_layers_trained_from_scratch(tmp_path):
    path = make_model(tmp_path / "model", "nha", [16, -1, [8, -1]], **LAYER, output_norm="silu_rms")
    prompts = make_prompts([10, 1, 40, 150])
    with engine(path) as llm:
        assert tokens(write(llm, prompts, NEW)) == greedy(path, prompts, NEW)


def test_slots_that_take_part_from_the_start(tmp_path):
    path = make_model(tmp_path / "model", "llama", [8, 8])
    edit_config(path, slots_from_start=True)
    prompts = make_prompts([3, 10, 40])
    with engine(path) as llm:
        assert tokens(write(llm, prompts, NEW)) == greedy(path, prompts, NEW)
