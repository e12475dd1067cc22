"""`generate` reads long prompts in pieces by itself: the same tokens, and the graph of a step begins after them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nha.models import decode_graph, prompt
from nha.models.prompt import piece_length
from tests.models.families import hybrid, tokens

LEFT_PADDED = torch.ones(3, 50, dtype=torch.long)
LEFT_PADDED[0, :41] = 0
LEFT_PADDED[1, :17] = 0
OPTIONS: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def lengths(monkeypatch):
    """Lets pieces be 16 tokens of one sequence; the list gets the length of every forward pass."""
    found: list[int] = []
    monkeypatch.setattr(prompt, "PIECE_BYTES", 16 * 48 * 8)  # the MLP of the models is 48 wide
    return found


def build(lengths, windows: Any = (8, -1, 0), family="llama"):
    model = hybrid(family, list(windows)).double().eval()
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    return model


def generate(model, ids, **options):
    return model.generate(ids, suppress_tokens=[0], **OPTIONS | options)


@pytest.mark.parametrize("windows", [(8, -1, 0), (-1, 8, 8), ([8, 2], [-1, 4], 0)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_same_tokens(family, windows, lengths):
    model, ids = build(lengths, windows, family), tokens(1, 50)
    found = generate(model, ids)
    assert lengths[:5] == [13, 13, 13, 11, 1]
    assert torch.equal(found, generate(model, ids, use_cache=False))


def test_keys_and_values_of_pieces_are_written_into_their_place(lengths, monkeypatch):
    places, update = [], prompt.ReservedLayer.update

    def noted(self, *args, **kwargs):
        found = update(self, *args, **kwargs)
        places.append(found[0].data_ptr())
        return found

    monkeypatch.setattr(prompt.ReservedLayer, "update", noted)
    found = generate(build(lengths), tokens(1, 50), return_dict_in_generate=True)
    assert len(places) == 4 and len(set(places)) == 1
    layer = found["cache" if "cache" in found else "past_key_values"].layers[1]
    assert type(layer) is DynamicLayer and layer.get_seq_length() == 59


def test_a_left_padded_batch(lengths):
    model, ids = build(lengths, (2, -1, 0)), tokens(3, 50) * LEFT_PADDED
    found = generate(model, ids, attention_mask=LEFT_PADDED)
    assert lengths[:14] == [4] * 12 + [2, 1]  # three sequences of 4 tokens are as many as fit
    assert torch.equal(found, generate(model, ids, attention_mask=LEFT_PADDED, use_cache=False))


def test_steps_after_pieces_are_recorded(lengths, monkeypatch):
    recorded = []

    def capture(run, pool=None):
        output = run()  # which computes the first replay

        def replay():
            if recorded:
                output.logits.copy_(run().logits)
            recorded.append(True)

        return output, replay

    model, ids = hybrid("llama", [8, -1, 0]).double().eval(), tokens(1, 50)
    expected = generate(model, ids, disable_compile=True)
    monkeypatch.setattr(decode_graph, "can_capture", lambda device: True)
    monkeypatch.setattr(decode_graph, "capture", capture)
    assert torch.equal(generate(model, ids), expected)
    assert len(recorded) == OPTIONS["max_new_tokens"] - 2  # the prompt gives a token, and the first step is called


@pytest.mark.parametrize("case", ["short", "chosen", "filled", "hidden states"])
def test_other_prompts_are_read_as_asked(case, lengths):
    model, ids = build(lengths), tokens(1, 32 if case == "short" else 50)
    if case == "filled":
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :5], past_key_values=cache)
        generate(model, ids, past_key_values=cache)
        assert lengths[:2] == [5, 45]
    elif case == "chosen":
        generate(model, ids, prefill_chunk_size=40)
        assert lengths[:2] == [40, 10]
    elif case == "hidden states":
        generate(model, ids, output_hidden_states=True, return_dict_in_generate=True)
        assert lengths[0] == 50
    else:
        generate(model, ids)
        assert lengths[0] == 32


def test_lengths_of_pieces():
    model = hybrid("llama", [8, -1, 0])
    elements = prompt.PIECE_BYTES // (48 * 4)
    size = 1 << elements.bit_length() - 1
    assert piece_length(model, 1, 2 * size) is None
    assert piece_length(model, 1, 2 * size + 1) == -(-(2 * size + 1) // 3)
    assert piece_length(hybrid("llama", [-1, -1, -1]), 1, 4 * size) is None
    assert piece_length(hybrid("gemma3n_text", [8, -1, 0]), 1, 4 * size)  # which has one MLP size for each layer
