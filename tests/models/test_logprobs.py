"""Reinforcement learning on a hybrid: log-probabilities of one forward pass are those that tokens were sampled with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

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


def test_continuous_batching_is_refused_by_name():
    model: Any = hybrid("llama", 8)
    with pytest.raises(NotImplementedError, match=r"vLLM with the plugin"):
        model.generate_batch([[3, 4, 5]])
