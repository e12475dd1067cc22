"""A conversation reads only new tokens, keeps its memory, and goes on from disk with the same bits."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from nha import hybridize
from nha.models import decode_graph
from nha.models.conversation import (
    Conversation,
    encode,
    later_turn,
    load_conversation,
    save_conversation,
    say,
    turn_ids,
)
from tests.convert.test_hybridize import byte_tokenizer
from tests.models.families import teacher

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny hybrid and a tokenizer with a chat template."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = teacher(vocab_size=300)
    tokenizer = byte_tokenizer(path)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.chat_template = TEMPLATE
    hybridize(model, num_slots=8, window_size=16, full_layers=[1], calibration=torch.randint(256, (2, 64)))
    return model.eval(), tokenizer


@pytest.fixture
def fed(pair, monkeypatch):
    """How many tokens every forward pass of the model gets."""
    model, _ = pair
    lengths: list[int] = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    yield lengths
    handle.remove()


def test_every_token_is_read_once(pair, fed):
    model, tokenizer = pair
    conversation, turns = Conversation(), ("Hello, who are you?", "And why?", "I see")
    read = sum(say(model, tokenizer, conversation, text, **OPTIONS).read for text in turns)
    # the last token written is read with the next turn
    assert sum(fed) == conversation.ids.shape[1] - 1 == conversation.cache.get_seq_length()
    assert read + 3 * 6 - 2 == conversation.ids.shape[1]


def test_answers_equal_those_without_a_cache(pair):
    model, tokenizer = pair
    conversation = Conversation()
    for text in ("Hello, who are you?", "And why?"):
        before = torch.cat([conversation.ids, turn_ids(tokenizer, conversation, text)], 1)
        say(model, tokenizer, conversation, text, **OPTIONS)
        alone = model.generate(before, attention_mask=torch.ones_like(before), use_cache=False, **OPTIONS)
        assert torch.equal(conversation.ids, alone)


def test_turns_decode_with_a_graph_and_branch_and_save_as_without(pair, tmp_path, monkeypatch):
    """A CPU has no graphs: here a replay makes the recorded call again."""
    model, tokenizer = pair
    recorded = []

    def capture(run):
        steps = [run()]  # which, unlike a recording, computes the first replay
        recorded.append(steps)

        def replay():
            if len(steps) > 1:
                steps[0].logits.copy_(run().logits)
            steps.append(steps[0])

        return steps[0], replay

    options: dict[str, Any] = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    found = []
    for graphs in (False, True):
        with monkeypatch.context() as patched:
            patched.setattr(decode_graph, "can_capture", lambda device, graphs=graphs: graphs)
            patched.setattr(decode_graph, "capture", capture)
            conversation = Conversation()
            say(model, tokenizer, conversation, "Hello, who are you?", **options)
            branch = copy.deepcopy(conversation)
            save_conversation(conversation, tmp_path / "kept", model)
            texts = ("And why?", "Or how?", "And why?")
            conversations = (conversation, branch, load_conversation(tmp_path / "kept", model))
            for each, text in zip(conversations, texts, strict=True):
                say(model, tokenizer, each, text, **options)
        found.append([each.ids for each in conversations])
    assert [len(steps) for steps in recorded] == 4 * [9]  # of 10 tokens the prompt gives one; one step is called first
    assert all(map(torch.equal, *found)) and torch.equal(found[0][0], found[0][2])


def test_memory_of_hybrid_layers_does_not_grow(pair):
    model, tokenizer = pair
    conversation, sizes = Conversation(), []
    for text in ("a long enough first message", "more", "still more"):
        say(model, tokenizer, conversation, text, **OPTIONS)
        sizes.append(conversation.cache.layers[0].nbytes)
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("closed", [True, False])
def test_a_later_turn_ends_the_answer_before_it(pair, closed):
    _, tokenizer = pair
    ended = "" if closed else "</s>"
    assert later_turn(tokenizer, "next", closed=closed) == f"{ended}\n<user>next</s>\n<assistant>"


def test_turns_make_the_text_of_the_template(pair):
    model, tokenizer = pair
    conversation = Conversation()
    say(model, tokenizer, conversation, "one", **OPTIONS)
    conversation.ids = conversation.ids[:, :-6]  # as if the answer were what follows
    answer = tokenizer("two", add_special_tokens=False, return_tensors="pt").input_ids
    conversation.ids = torch.cat([conversation.ids, answer], 1)
    ids = torch.cat([conversation.ids, turn_ids(tokenizer, conversation, "three")], 1)
    messages = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant", "user"), ("one", "two", "three"), strict=True)
    ]
    assert tokenizer.decode(ids[0]) == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )


def test_a_template_that_changes_answers_is_refused(pair, monkeypatch):
    _, tokenizer = pair
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(ValueError, match="chat template"):
        later_turn(tokenizer, "next", closed=True)


def test_without_a_template_text_is_continued(pair, monkeypatch):
    model, tokenizer = pair
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert tokenizer.decode(encode(tokenizer, "abc", raw=False)[0]) == "abc"
    conversation = Conversation()
    say(model, tokenizer, conversation, "abc", **OPTIONS)
    assert tokenizer.decode(turn_ids(tokenizer, conversation, "def")[0]) == "\ndef"


def test_an_answer_can_be_stopped_and_the_conversation_goes_on(pair):
    model, tokenizer = pair
    conversation, asked = Conversation(), []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 3

    answer = say(model, tokenizer, conversation, "Hello", stop=stop, **OPTIONS)
    assert answer.stopped and answer.written == 3
    again = say(model, tokenizer, conversation, "And?", **OPTIONS)
    assert not again.stopped and again.written == 6


def test_a_saved_conversation_goes_on_with_the_same_bits(pair, tmp_path):
    model, tokenizer = pair
    conversation = Conversation()
    say(model, tokenizer, conversation, "Hello, who are you?", **OPTIONS)
    save_conversation(conversation, tmp_path / "talk [1]", model)
    loaded = load_conversation(tmp_path / "talk [1]", model)
    assert loaded.turns == conversation.turns
    say(model, tokenizer, conversation, "And why?", **OPTIONS)
    say(model, tokenizer, loaded, "And why?", **OPTIONS)
    assert torch.equal(loaded.ids, conversation.ids)


def test_an_empty_conversation_cannot_be_saved(pair, tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        save_conversation(Conversation(), tmp_path / "talk", pair[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda data: None, "there is none"),
        (lambda data: "[" * 100_000, "nha-conversation-v1"),
        (lambda data: json.dumps(data)[:-5], "nha-conversation-v1"),
        (lambda data: json.dumps(data | {"format": "other"}), "other"),
        (lambda data: json.dumps(data | {"ids": ["x"]}), "nha-conversation-v1"),
        (lambda data: json.dumps(data | {"ids": [10**30]}), "nha-conversation-v1"),
        (lambda data: json.dumps(data | {"ids": [-1, *data["ids"]]}), "got -1"),
        (lambda data: json.dumps(data | {"ids": data["ids"][:3]}), "at most 3"),
        (lambda data: json.dumps(data | {"cache": "00"}), "another one"),
        (lambda data: json.dumps({"format": data["format"]}), "turns"),
    ],
)
def test_damaged_conversations_are_refused(pair, tmp_path, damage, named):
    model, tokenizer = pair
    conversation = Conversation()
    say(model, tokenizer, conversation, "Hello", **OPTIONS)
    save_conversation(conversation, tmp_path / "talk", model)
    text = tmp_path / "talk.json"
    damaged = damage(json.loads(text.read_text()))
    text.unlink() if damaged is None else text.write_text(damaged)
    with pytest.raises(ValueError, match=named):
        load_conversation(tmp_path / "talk", model)
