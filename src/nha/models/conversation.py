"""A conversation with a model: only new tokens are read, the cache is kept between turns and on disk."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nha.io import write_atomically
from nha.models.cache import cache_nbytes
from nha.models.cache_file import load_cache, save_cache

FORMAT = "nha-conversation-v1"
_QUESTION, _ANSWER = "question", "the answer that this stands for"


@dataclass
class Turn:
    """One side's text: `role` is "user" or "assistant"."""

    role: str
    content: str


@dataclass
class Conversation:
    """Texts so far, all token ids [1, T], and the cache that has read all of them but the last few.

    `closed` says that the last answer ended with the tokenizer's end token; otherwise the next turn has to end it.
    """

    turns: list[Turn] = field(default_factory=list)
    ids: Tensor = field(default_factory=lambda: torch.zeros(1, 0, dtype=torch.long))
    cache: Any = None
    closed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return 0 if self.cache is None else cache_nbytes(self.cache)


@dataclass(frozen=True)
class Answer:
    """An answer's text, how many tokens were read for it and written, and whether it was stopped from outside.

    `found` are tokens that a store had read before.
    """

    text: str
    read: int
    written: int
    stopped: bool
    found: int = 0


def cache_keyword(model: Any) -> str:
    """The name that a model's forward gives its cache: "cache" from transformers 5.24 on, "past_key_values" before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template; without one, text is continued as it is."""
    return bool(getattr(tokenizer, "chat_template", None))


def check_text(text: str) -> None:
    """Raise ValueError for text that is not Unicode, such as bytes of a command line that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text[max(0, error.start - 20) : error.end]
        raise ValueError(f"expected text in UTF-8, got {shown!r} at character {error.start}") from None


def encode(tokenizer: Any, text: str, *, raw: bool) -> Tensor:
    """Token ids [1, T] of a prompt, inside the chat template if the tokenizer has one and `raw` is not set."""
    check_text(text)
    if raw or not has_template(tokenizer):
        return tokenizer(text, return_tensors="pt").input_ids
    messages = [{"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(chat, return_tensors="pt", add_special_tokens=False).input_ids


def later_turn(tokenizer: Any, text: str, *, closed: bool) -> str:
    """Text that the chat template puts between an answer and the next one, for a new message `text`.

    It ends the answer (without the end token if the answer is `closed`), and holds the message. Raises ValueError for
    a template that does not write an answer's text as it is.
    """
    messages = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": text},
    ]
    chat: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    _, found, rest = chat.partition(_ANSWER)
    if not found:
        raise ValueError("expected a chat template that writes an assistant's message as it is, got one that does not")
    return rest.removeprefix(tokenizer.eos_token or "") if closed else rest


def turn_ids(tokenizer: Any, conversation: Conversation, text: str, *, raw: bool = False) -> Tensor:
    """Token ids [1, T] that a new message adds to a conversation."""
    check_text(text)
    if not conversation.ids.shape[1]:
        return encode(tokenizer, text, raw=raw)
    if raw or not has_template(tokenizer):
        added = "\n" + text
    else:
        added = later_turn(tokenizer, text, closed=conversation.closed)
    return tokenizer(added, return_tensors="pt", add_special_tokens=False).input_ids.long()


def say(
    model: Any,
    tokenizer: Any,
    conversation: Conversation,
    text: str,
    *,
    raw: bool = False,
    streamer: Any = None,
    stop: Callable[[], bool] = lambda: False,
    recall: Callable[[Tensor], tuple[Any, int, int]] | None = None,
    **options: Any,
) -> Answer:
    """Add a message and the model's answer to a conversation; `options` are those of `generate`.

    `recall` gets the ids [1, T] of a new conversation and gives a cache that has read the first of them, how many these
    are, and how many of them it found, as `nha.memory.MemoryStore.read` does.

    Only tokens that the cache has not read are read. `stop` is asked after every token and ends the answer; what is
    written until then stays part of the conversation.
    """
    from transformers import DynamicCache, StoppingCriteriaList

    new = turn_ids(tokenizer, conversation, text, raw=raw)
    ids = torch.cat([conversation.ids, new], 1).to(model.device)
    cache, found = conversation.cache, 0
    before = 0 if cache is None else cache.get_seq_length()
    if cache is None and recall is not None:
        cache, _, before = recall(ids)
        found = before
    elif cache is None:
        cache = DynamicCache(config=model.config)
    stopped = False

    def asked(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        nonlocal stopped
        stopped = stopped or stop()
        return torch.full((input_ids.shape[0],), stopped, device=input_ids.device, dtype=torch.bool)

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([asked]),  # pyright: ignore[reportArgumentType]
        pad_token_id=pad,
        return_dict_in_generate=True,
        **{cache_keyword(model): cache},
        **options,
    )
    written = output.sequences[0, ids.shape[1] :]
    answer = tokenizer.decode(written, skip_special_tokens=True)
    conversation.turns += [Turn("user", text), Turn("assistant", answer)]
    conversation.ids = output.sequences.cpu()
    conversation.cache = cache
    conversation.closed = bool(len(written)) and int(written[-1]) == tokenizer.eos_token_id
    return Answer(answer, ids.shape[1] - before, len(written), stopped, found)


def save_conversation(conversation: Conversation, path: str | Path, model: Any) -> None:
    """Write a conversation's cache to `path` (see `save_cache`) and its text to `path` with ".json" added.

    Raises ValueError for a conversation without any turn.
    """
    if conversation.cache is None:
        raise ValueError("expected a conversation with at least one answer to save, got none")
    path = Path(path)
    save_cache(conversation.cache, path, model)
    data = {
        "format": FORMAT,
        "cache": _digest(path),
        "turns": [vars(turn) for turn in conversation.turns],
        "closed": conversation.closed,
        "ids": conversation.ids[0].tolist(),
    }
    write_atomically(_text_path(path), json.dumps(data))


def load_conversation(path: str | Path, model: Any) -> Conversation:
    """Read a conversation written by `save_conversation`; continuing it gives the same bits.

    Raises ValueError for files that are damaged, foreign, of another model, or that do not belong together.
    """
    path = Path(path)
    text = _text_path(path)
    turns, ids, digest, closed = read_turns(path)
    vocabulary = model.get_input_embeddings().num_embeddings
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(f"expected tokens below {vocabulary} at {text}, got {int(ids.min())} to {int(ids.max())}")
    cache = load_cache(path, model)
    if _digest(path) != digest:
        raise ValueError(f"expected the cache that {text} was saved with, {path} is another one")
    read = cache.get_seq_length()
    if not 0 < read <= ids.shape[1]:
        raise ValueError(f"expected a cache of at most {ids.shape[1]} tokens at {path}, got one of {read}")
    return Conversation(turns, ids, cache, closed)


def read_turns(path: Path) -> tuple[list[Turn], Tensor, Any, bool]:
    """The text of a saved conversation: turns, ids [1, T], its cache's digest, and whether the last turn is closed.

    Needs no model. Raises ValueError for a file that is absent, damaged or foreign.
    """
    text = _text_path(path)
    try:
        data = json.loads(text.read_text(encoding="utf-8"))
        turns = [Turn(str(turn["role"]), str(turn["content"])) for turn in data["turns"]]
        ids = torch.tensor([[int(token) for token in data["ids"]]], dtype=torch.long)
        kind, digest, closed = data["format"], data["cache"], bool(data["closed"])
    except FileNotFoundError:
        raise ValueError(f"expected a conversation's text at {text}, there is none") from None
    except (ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"expected a conversation of format {FORMAT!r} at {text}, got: {error!r}") from None
    if kind != FORMAT:
        raise ValueError(f"expected a conversation of format {FORMAT!r} at {text}, got {kind!r}")
    return turns, ids, digest, closed


def _text_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
