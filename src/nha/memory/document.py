"""A document before a question: where it ends among the tokens of a prompt."""

from __future__ import annotations

from typing import Any

from nha.models.conversation import has_template

SEPARATOR = "\n\n"
MARGIN = 32  # characters before a document's end whose tokens may depend on what follows


def join(document: str, question: str) -> str:
    """The prompt that asks a question about a document."""
    return document + SEPARATOR + question


def document_marks(tokenizer: Any, document: str, question: str, *, raw: bool = False) -> list[int]:
    """The number of tokens of a prompt (see `join`) that any question about this document shares, as marks.

    The prompt is tokenized as `nha.models.conversation.encode` does. Empty for a short document and for a tokenizer
    that does not tell where its tokens lie in the text: only block boundaries are shared then.
    """
    end = len(document) - MARGIN
    if end <= 0 or not getattr(tokenizer, "is_fast", False):
        return []
    text, special = join(document, question), True
    if not raw and has_template(tokenizer):
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        special = False
        end += max(text.find(document), 0)
    spans = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True).offset_mapping
    return [sum(1 for _, stop in spans if stop <= end)]
