"""Which classes of a family compute what is known of Llama's: families copy each other's code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache as memoize

from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

ATTENTIONS = (LlamaAttention, Qwen2Attention, MistralAttention)  # they project and rotate alike


def code_of(function: Callable) -> tuple:
    """The instructions of a function and the names that they use."""
    code = inspect.unwrap(function).__code__
    return code.co_code, code.co_names, code.co_varnames


@memoize
def computes_as(kind: type, *known: type) -> bool:
    """Whether a class has the forward pass of one that is known.

    >>> from transformers.models.llama.modeling_llama import LlamaMLP
    >>> computes_as(Qwen2Attention, *ATTENTIONS), computes_as(LlamaMLP, *ATTENTIONS)
    (True, False)
    """
    return any(code_of(kind.forward) == code_of(one.forward) for one in known)  # pyright: ignore
