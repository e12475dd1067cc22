"""Prompts whose beginning a server has read before: `generate` gets them from a store on disk."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from nha.memory import MemoryStore
from nha.models.conversation import cache_keyword
from nha.models.masks import cache_argument


def generate_through(model: Any, store: MemoryStore) -> None:
    """Let `model.generate` read every prompt of one row through a store, and say on stderr what was found.

    A batch, a padded prompt and one that comes with a cache are read as ever.

    >>> import tempfile
    >>> from nha import NHAConfig, NHAForCausalLM
    >>> model, ids = NHAForCausalLM(NHAConfig.tiny()).eval(), torch.arange(100)[None]
    >>> wanted = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = MemoryStore(folder, block_size=32)
    ...     generate_through(model, store)
    ...     found = [model.generate(input_ids=ids, max_new_tokens=3, do_sample=False) for _ in range(2)]
    >>> torch.equal(found[0], wanted) and torch.equal(found[1], wanted)
    True
    """
    generate, keyword = model.generate, cache_keyword(model)

    @functools.wraps(generate)
    def read_first(*args: Any, **options: Any) -> Any:
        ids, mask = options.get("input_ids"), options.get("attention_mask")
        alone = isinstance(ids, torch.Tensor) and ids.dim() == 2 and ids.shape[0] == 1 and ids.shape[1] > 1
        if args or not alone or cache_argument(options) is not None or not (mask is None or bool(mask.all())):
            return generate(*args, **options)
        assert isinstance(ids, torch.Tensor)
        memory = store.read(model, ids)
        if memory.num_tokens:
            options[keyword] = memory.cache
        print(f"{memory.num_found} of {ids.shape[1]} tokens found in {store.path}", file=sys.stderr, flush=True)
        return generate(**options)

    model.generate = read_first


__all__ = ["generate_through"]
