"""`nha generate`: text from a hybrid, or from any model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from nha.cli import common
from nha.cli.common import BadInput, command, err, escape, print_json
from nha.cli.options import with_settings
from nha.models import loading
from nha.serve.settings import CacheSettings

MODEL = typer.Argument(
    help="A model directory, a Hub id, or 'smollm2' for the embedded model, 'smollm2-hybrid' for its hybrid."
)
MAX_NEW_TOKENS = typer.Option(help="Stop after so many tokens.")
TEMPERATURE = typer.Option(help="0 takes the likeliest token; higher is more varied.")
TOP_P = typer.Option(help="Sample from the likeliest tokens that add up to this.")
WINDOW = typer.Option(help="Change a hybrid's windows for this run; -1 is full attention.", show_default="as saved")
RAW = typer.Option("--raw", help="Continue the text as it is, without the chat template.")
SEED = typer.Option(help="Seed for sampling.")


@command
@with_settings(CacheSettings)
def generate(
    model: Annotated[str, MODEL],
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from stdin.")],
    settings: CacheSettings,
    max_new_tokens: Annotated[int, MAX_NEW_TOKENS] = 200,
    temperature: Annotated[float, TEMPERATURE] = 0.0,
    top_p: Annotated[float, TOP_P] = 1.0,
    window: Annotated[str | None, WINDOW] = None,
    raw: Annotated[bool, RAW] = False,
    seed: Annotated[int, SEED] = 0,
    document: Annotated[
        Path | None, typer.Option(help="A text file that the prompt asks about; it comes first.", show_default="none")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Write text; the memory that the conversation takes is shown at the end."""
    options = sampling(max_new_tokens, temperature, top_p)
    windows = None if window is None else common.parse_windows(window)
    text = common.stdin().read() if prompt == "-" else prompt
    if not text.strip():
        raise BadInput("expected a prompt, got nothing")
    from nha.memory.document import document_marks, join
    from nha.models.conversation import Conversation, check_text, say

    check_text(text)
    before = "" if document is None else common.read_text(document)
    question, text = text, text if document is None else join(before, text)
    store = open_memory(settings)
    loaded, tokenizer, source = load(model, windows, seed, settings)
    recall = None
    if store is not None:
        marks = [] if document is None else document_marks(tokenizer, before, question, raw=raw)
        recall = reader(store, loaded, marks)
    conversation = Conversation()
    started = time.perf_counter()
    if as_json:
        with common.steps("writing") as advance:
            streamer = Counter(advance, max_new_tokens)
            answer = say(loaded, tokenizer, conversation, text, raw=raw, streamer=streamer, recall=recall, **options)
    else:
        shown = printer(tokenizer)
        answer = say(loaded, tokenizer, conversation, text, raw=raw, streamer=shown, recall=recall, **options)
    seconds = time.perf_counter() - started
    if as_json:
        found = {
            "model": source.name,
            "text": answer.text,
            "prompt_tokens": answer.read + answer.found,
            "prompt_tokens_found": answer.found,
            "new_tokens": answer.written,
            "seconds": round(seconds, 3),
            "cache_bytes": conversation.nbytes,
        }
        print_json(found)
    else:
        err.print(f"[dim]{escape(summary(answer, seconds, conversation.nbytes))}[/]", soft_wrap=True)


def sampling(max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
    """The options of `generate` for these settings. Raises BadInput for settings outside their bounds."""
    common.check_at_least("--max-new-tokens", max_new_tokens, 1)
    common.check_at_least("--temperature", temperature, 0)
    common.check_range("--top-p", top_p, above=0, at_most=1)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    return options | ({"temperature": temperature, "top_p": top_p} if temperature > 0 else {})


def load(
    model: str, windows: int | list[int] | None, seed: int, settings: CacheSettings | None = None
) -> tuple[Any, Any, loading.Source]:
    """A model with these windows and caches (None: its own), its tokenizer and its source; seeds the sampling."""
    common.check_seed(seed)
    source = loading.find(model)
    if windows is not None:
        loading.check_windows_changeable(source, windows)
    settings = settings or CacheSettings()
    for name in ("state_dtype", "kv_cache_dtype"):
        if getattr(settings, name) is not None:
            loading.check_hybrid(source, f"--{name.replace('_', '-')}")
    import torch

    torch.manual_seed(seed)
    with common.status(f"loading {source.label}"):
        loaded, tokenizer = loading.load(source)
    if windows is not None:
        from nha.models.windows import set_windows

        set_windows(loaded, windows)
    if settings.state_dtype is not None:
        from nha.models.windows import set_state_dtype

        set_state_dtype(loaded, settings.state_dtype)
    if settings.kv_cache_dtype is not None:
        from nha.models.windows import set_kv_cache_dtype

        set_kv_cache_dtype(loaded, settings.kv_cache_dtype)
    return loaded, tokenizer, source


def open_memory(settings: CacheSettings) -> Any:
    """The store of these settings, or None."""
    if settings.memory is None:
        return None
    from nha.memory import MemoryStore

    return MemoryStore(settings.memory, settings.max_bytes)


def reader(store: Any, model: Any, marks: list[int]) -> Callable[[Any], Any]:
    """Reads the first tokens of a conversation through a store."""
    return lambda ids: store.read(model, ids, marks)


def summary(answer: Any, seconds: float, nbytes: int) -> str:
    """Tokens, speed and memory after an answer."""
    speed = f", {answer.written / seconds:.1f} tokens/s" if seconds > 0 else ""
    found = f" ({answer.found} found in memory)" if answer.found else ""
    return (
        f"{answer.read} tokens read{found}, {answer.written} written{speed}; "
        f"the conversation's memory is {common.human_bytes(nbytes)}"
    )


def printer(tokenizer: Any) -> Any:
    """A streamer of transformers that writes text to stdout as it comes."""
    from transformers import TextStreamer

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            sys.stdout.write(text + ("\n" if stream_end else ""))
            sys.stdout.flush()

    return Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)


class Counter:
    """A streamer of transformers that moves a progress bar; the first call brings the prompt."""

    def __init__(self, advance: Any, total: int) -> None:
        self.advance, self.total, self.calls = advance, total, -1

    def put(self, value: Any) -> None:
        """One more token."""
        self.calls += 1
        if self.calls:
            self.advance(self.calls, self.total)

    def end(self) -> None:
        """The answer may be shorter than it could be."""
        self.advance(self.total, self.total)
