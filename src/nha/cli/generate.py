"""`nha generate`: text from a hybrid, or from any model."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nha.cli import common
from nha.cli.common import BadInput, command, err, print_json
from nha.models import loading

if TYPE_CHECKING:
    import torch


class Printer:
    """A transformers streamer that prints text as it comes, or moves a progress bar when the text is for a program."""

    def __init__(self, tokenizer: Any, bar: Any, total: int) -> None:
        self.tokenizer = tokenizer
        self.bar = bar
        self.task = bar.add_task("writing", total=total) if bar else None
        self.ids: list[int] = []
        self.printed = 0
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (the first call) or one new token."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += value.reshape(-1).tolist()
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=len(self.ids))
            return
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # the middle of a character of several tokens
            sys.stdout.write(text[self.printed :])
            sys.stdout.flush()
            self.printed = len(text)

    def end(self) -> None:
        """Print what is left."""
        if self.bar is None:
            text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
            sys.stdout.write(text[self.printed :] + "\n")
            sys.stdout.flush()


@command
def generate(
    model: Annotated[str, typer.Argument(help="A model directory, a Hub id, or 'smollm2' for the embedded model.")],
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from stdin.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that add up to this.")] = 1.0,
    window: Annotated[
        str | None,
        typer.Option(help="Change a hybrid's windows for this run; -1 is the original.", show_default="as saved"),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Write text; the memory a conversation takes is shown at the end."""
    common.check_at_least("--max-new-tokens", max_new_tokens, 1)
    common.check_at_least("--temperature", temperature, 0)
    if not 0 < top_p <= 1:
        raise BadInput(f"expected --top-p above 0 and at most 1, got {top_p}")
    windows = None if window is None else common.parse_windows(window)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise BadInput("expected a prompt, got nothing")
    source = loading.find(model)
    if windows is not None:
        loading.check_windows_changeable(source, windows)
    import torch

    with err.status(f"loading {source.label}"):
        loaded, tokenizer = loading.load(source)
    if windows is not None:
        from nha.models.adapter import set_windows

        set_windows(loaded, windows)
    ids = encode(tokenizer, text, raw=raw).to(loaded.device)
    torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options.update(temperature=temperature, top_p=top_p)
    from nha.models.cache import cache_nbytes

    started = time.perf_counter()
    if as_json:
        with common.progress_bar() as bar:
            result = _generate(loaded, tokenizer, ids, bar, max_new_tokens, options)
    else:
        result = _generate(loaded, tokenizer, ids, None, max_new_tokens, options)
    seconds = time.perf_counter() - started
    new = result.sequences[0, ids.shape[1] :]
    found = {
        "model": source.name,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "seconds": round(seconds, 3),
        "cache_bytes": cache_nbytes(result.past_key_values),
    }
    if as_json:
        print_json(found)
        return
    err.print(
        f"[dim]{found['prompt_tokens']} tokens read, {found['new_tokens']} written in {seconds:.1f} s; "
        f"the conversation's memory is {common.human_bytes(found['cache_bytes'])}[/]"
    )


def encode(tokenizer: Any, text: str, *, raw: bool) -> torch.Tensor:
    """Token ids [1, T] of a prompt, inside the chat template if the tokenizer has one and `raw` is not set."""
    if raw or not getattr(tokenizer, "chat_template", None):
        return tokenizer(text, return_tensors="pt").input_ids
    messages = [{"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(chat, return_tensors="pt", add_special_tokens=False).input_ids


def _generate(model: Any, tokenizer: Any, ids: Any, bar: Any, limit: int, options: dict[str, Any]) -> Any:
    import torch

    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        streamer=Printer(tokenizer, bar, limit),
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **options,
    )
