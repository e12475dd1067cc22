"""`nha chat`: a conversation in the terminal whose memory is kept between turns and on disk."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from nha.cli import common
from nha.cli.common import command, err, error_line, escape, out
from nha.cli.generate import (
    MAX_NEW_TOKENS,
    MODEL,
    RAW,
    SEED,
    TEMPERATURE,
    TOP_P,
    WINDOW,
    load,
    open_memory,
    printer,
    reader,
    sampling,
    summary,
)
from nha.cli.options import with_settings
from nha.serve.settings import CacheSettings

HELP = """/save PATH   write the conversation: its memory to PATH, its text to PATH.json
/load PATH   go on with a saved conversation
/reset       forget everything
/help        show this
Ctrl-C stops an answer, Ctrl-D leaves."""


@dataclass
class Session:
    """A conversation and what it is held with."""

    model: Any
    tokenizer: Any
    conversation: Any
    raw: bool
    options: dict[str, Any]
    recall: Any = None  # reads the first message through a store


@command
@with_settings(CacheSettings)
def chat(
    model: Annotated[str, MODEL],
    settings: CacheSettings,
    resume: Annotated[
        Path | None, typer.Option("--load", help="A conversation saved with /save.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, MAX_NEW_TOKENS] = 400,
    temperature: Annotated[float, TEMPERATURE] = 0.0,
    top_p: Annotated[float, TOP_P] = 1.0,
    window: Annotated[str | None, WINDOW] = None,
    raw: Annotated[bool, RAW] = False,
    seed: Annotated[int, SEED] = 0,
) -> None:
    """Talk to a model; each turn reads only its own tokens. Where stdin is no terminal, every line is a turn."""
    options = sampling(max_new_tokens, temperature, top_p)
    windows = None if window is None else common.parse_windows(window)
    store = open_memory(settings)
    from nha.models.conversation import Conversation, has_template, load_conversation, read_turns

    if resume is not None:  # refused before the model is loaded
        read_turns(resume)
    loaded, tokenizer, source = load(model, windows, seed, settings)
    conversation = Conversation() if resume is None else load_conversation(resume, loaded)
    recall = None if store is None else reader(store, loaded, [])
    session = Session(loaded, tokenizer, conversation, raw, options, recall)
    if not raw and not has_template(tokenizer):
        err.print(f"{escape(source.label)} has no chat template: it continues your text as it is", soft_wrap=True)
    if sys.stdin.isatty():
        err.print("[dim]/help lists the commands, Ctrl-D leaves[/]")
    for line in lines():
        if not line.strip():
            continue
        try:
            answer(session, line)
        except (ValueError, OSError) as error:
            err.print(f"[bold red]error:[/] {escape(error_line(error))}", soft_wrap=True)


def lines() -> Iterator[str]:
    """Lines from the terminal or from stdin, until they end."""
    if not sys.stdin.isatty():
        for line in common.stdin():
            yield line.rstrip("\n")
        return
    with suppress(ImportError):
        import readline  # noqa: F401  line editing and history in input()
    while True:
        try:
            yield input("> ")
        except EOFError:
            out.print()
            return
        except KeyboardInterrupt:
            err.print("\n[dim]Ctrl-D leaves[/]")


def answer(session: Session, line: str) -> None:
    """Do what a line asks for: a command that begins with a slash, or a message to the model.

    Raises ValueError or OSError for a command that cannot be done; the conversation is then as it was.
    """
    from nha.models import conversation as talk

    name, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    if name in ("/save", "/load"):
        if not argument:
            raise ValueError(f"expected {name} PATH, got no path")
        if name == "/save":
            talk.save_conversation(session.conversation, argument, session.model)
            err.print(f"[dim]saved in {escape(argument)} and {escape(argument)}.json[/]", soft_wrap=True)
        else:
            session.conversation = talk.load_conversation(argument, session.model)
            turns = len(session.conversation.turns) // 2
            memory = common.human_bytes(session.conversation.nbytes)
            err.print(f"[dim]{turns} turns from {escape(argument)}; the memory is {memory}[/]", soft_wrap=True)
    elif name == "/reset":
        session.conversation = talk.Conversation()
        err.print("[dim]everything is forgotten[/]")
    elif name == "/help":
        err.print(escape(HELP))
    elif name.startswith("/") and name[1:].isalpha():
        raise ValueError(f"expected /save, /load, /reset or /help, got {name}")
    else:
        speak(session, line)


def speak(session: Session, text: str) -> None:
    """Print the model's answer to a message as it is written; the first Ctrl-C ends the answer."""
    from nha.models.conversation import say

    started = time.perf_counter()
    with interruptible() as interrupted:
        found = say(
            session.model,
            session.tokenizer,
            session.conversation,
            text,
            raw=session.raw,
            streamer=printer(session.tokenizer),
            stop=lambda: bool(interrupted),
            recall=session.recall,
            **session.options,
        )
    stopped = "stopped; " if found.stopped else ""
    told = summary(found, time.perf_counter() - started, session.conversation.nbytes)
    err.print(f"[dim]{stopped}{escape(told)}[/]", soft_wrap=True)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Within the block, the first Ctrl-C adds to the list instead of raising, so that no token is half written."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
