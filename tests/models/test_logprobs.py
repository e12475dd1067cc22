"""Reinforcement learning on a hybrid: log-probabilities of one forward pass are those that tokens were sampled with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

from nha import NHAConfig, NHAForCausalLM
from tests.models.families import hybrid, tokens

PROMPTS = torch.ones(3, 20, dtype=torch.long)
PROMPTS[1, :7] = PROMPTS[2, :15] = 0


def scratch(windows: list[int]) -> Any:
    torch.manual_seed(0)
    return NHAForCausalLM(NHAConfig.tiny(window_sizes=windows, num_hidden_layers=len(windows))).eval()


def sampled(model: Any) -> tuple[Tensor, Tensor]:
    """Sequences [B, 20 + 16] and the log-probabilities [B, 16] of the tokens when they were sampled."""
    torch.manual_seed(3)
    found = model.generate(
        tokens(3, 20) * PROMPTS,
        attention_mask=PROMPTS,
        do_sample=True,
        max_new_tokens=16,
        min_new_tokens=16,
        top_k=0,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(found.logits, 1)
    return found.sequences, of_tokens(logits, found.sequences[:, 20:])


def of_tokens(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]


def recomputed(model: Any, sequences: Tensor) -> Tensor:
    """The log-probabilities [B, 16] of the last 16 tokens from one forward pass, as policies are trained with."""
    mask = torch.cat([PROMPTS, torch.ones(3, 16, dtype=torch.long)], 1)
    position = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(sequences, attention_mask=mask, position_ids=position, use_cache=False).logits
    return of_tokens(logits[:, 19:-1], sequences[:, 20:])


@pytest.mark.parametrize("build", [lambda w: hybrid("llama", w), scratch], ids=["hybrid", "from scratch"])
@pytest.mark.parametrize("windows", [[8, 3, 0], [8, -1, 3], [64, 64, 64]], ids=str)
def test_one_forward_pass_recomputes_what_was_sampled(build, windows):
    model = build(windows)
    sequences, old = sampled(model)
    new = recomputed(model, sequences)
    exact = recomputed(model.double(), sequences)
    bound = 2 * (new - exact).abs().max() + 1e3 * torch.finfo(torch.float32).eps
    assert (old - exact).abs().max() <= bound
    sequences, old = sampled(model)  # in float64, of which `generate` returns logits in float32
    exact = recomputed(model, sequences)
    assert (old - exact).abs().max() <= 8 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_a_manager_of_continuous_batching_is_refused_by_name():
    model: Any = hybrid("llama", 8)
    with pytest.raises(NotImplementedError, match=r"vLLM with the plugin"):
        model.init_continuous_batching()


@pytest.mark.parametrize("max_rows", [1, 2, None])
def test_generate_batch_writes_what_each_prompt_gets_alone(max_rows):
    model: Any = hybrid("llama", [8, -1, 0]).double()
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (30, 3, 17, 9)]
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
    batching = ContinuousBatchingConfig(max_requests_per_batch=max_rows, return_logprobs=True)
    found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
    assert [output.prompt_ids for output in found.values()] == prompts
    for prompt, output in zip(prompts, found.values(), strict=True):
        alone = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
        assert output.generated_tokens == alone
        assert output.is_finished()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + alone])).logits[:, len(prompt) - 1 : -1]
        wanted = of_tokens(logits, torch.tensor([alone]))[0]
        torch.testing.assert_close(torch.tensor(output.logprobs, dtype=torch.float64), wanted, rtol=1e-5, atol=1e-5)


def test_generate_batch_samples_several_answers_and_refuses_what_it_has_not():
    model: Any = hybrid("llama", 8)
    config = GenerationConfig(
        max_new_tokens=6, do_sample=True, num_return_sequences=3, eos_token_id=None, pad_token_id=0
    )
    torch.manual_seed(0)
    found = model.generate_batch([[5, 6], [7]], generation_config=config)
    assert list(found) == [f"req_{i}{child}" for i in (0, 1) for child in ("__child#0", "__child#1", "")]
    assert [output.prompt_ids for output in found.values()] == [[5, 6]] * 3 + [[7]] * 3
    assert len({tuple(output.generated_tokens) for output in found.values()}) > 2
    assert model.generate_batch([]) == {}
    with pytest.raises(ValueError, match="prompt 1"):
        model.generate_batch([[5], []])
    with pytest.raises(ValueError, match="record_timestamps"):
        model.generate_batch([[5]], record_timestamps=True)
    with pytest.raises(ValueError, match="top_k"):
        model.generate_batch([[5]], top_k=3)
