"""Written answers: greedy decoding in batches, and whether an answer is in the first line."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from nha.evaluate.perplexity import batch_tokens

MAX_BATCH = 128


class FirstLine(StoppingCriteria):
    """Stops a sequence at the first token with a newline after some text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_len: int):
        self.tokenizer, self.prompt_len = tokenizer, prompt_len

    @cached_property
    def newlines(self) -> Tensor:
        """Which tokens hold a newline, bool [V]."""
        known: Tensor | None = self.tokenizer.__dict__.get("_newline_tokens")
        if known is None:
            texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
            known = torch.tensor(["\n" in text for text in texts])
            self.tokenizer.__dict__["_newline_tokens"] = known
        return known

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        last = input_ids[:, -1]
        newlines = self.newlines.to(last.device)
        inside = last < len(newlines)
        ended = newlines[last.clamp(max=len(newlines) - 1)] & inside
        # A newline before any text is skipped: the answer may be on the next line.
        begun = ~newlines[input_ids[:, self.prompt_len : -1].clamp(max=len(newlines) - 1)]
        return ended & begun.any(1)


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    first_line: bool = True,
    max_batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Greedy continuations of every prompt of token ids, up to `max_new_tokens` tokens.

    Prompts are sorted by length and padded on the left. With `first_line` a text ends at its first newline.
    `progress` is called with (prompts done, prompts in all).
    """
    limit = batch_tokens(model) if max_batch_tokens is None else max_batch_tokens
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts = [""] * len(prompts)
    start = 0
    while start < len(order):
        longest = len(prompts[order[start]]) + max_new_tokens
        some = order[start : start + max(1, min(MAX_BATCH, limit // longest))]
        written = _generate(model, tokenizer, [prompts[i] for i in some], max_new_tokens, first_line)
        for index, ids in zip(some, written, strict=True):
            texts[index] = str(tokenizer.decode(ids, skip_special_tokens=True))
        start += len(some)
        if progress is not None:
            progress(start, len(order))
    return texts


@torch.no_grad()
def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    first_line: bool,
) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    stop = StoppingCriteriaList([FirstLine(tokenizer, longest)] if first_line else [])
    written = model.generate(  # type: ignore[operator]
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=_pad(tokenizer),
        stopping_criteria=stop,
    )
    return written[:, longest:].tolist()


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in known if isinstance(token, int)), 0)


def first_line(text: str) -> str:
    """The first line with text in it.

    >>> first_line("\\n the Normans\\nQuestion:")
    'the Normans'
    """
    return text.strip().split("\n", 1)[0].strip()


def has_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers is in the first line of a text, in any case.

    >>> has_answer(" It was William the Conqueror.\\n1066", ["William"]), has_answer("No.\\nWilliam", ["William"])
    (True, False)
    """
    line = " ".join(first_line(text).casefold().split())
    return any(" ".join(answer.casefold().split()) in line for answer in answers)


def begins_with(text: str, answer: str) -> bool:
    """Whether a text begins with an answer, as whole words.

    >>> begins_with(" William I of", "William I"), begins_with(" William III", "William I")
    (True, False)
    """
    return re.match(re.escape(answer) + r"(?!\w)", text.lstrip()) is not None
