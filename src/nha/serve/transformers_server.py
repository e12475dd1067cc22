"""transformers' own server with a hybrid: its models made known, and our limits around its requests."""

# pyright: reportMissingImports=false
from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

from nha.memory import MemoryStore
from nha.models.auto import hybrid_classes, register
from nha.models.loading import Source, is_hybrid
from nha.models.prompt_graph import warm_up
from nha.models.windows import set_kv_cache_dtype, set_state_dtype
from nha.serve.limits import VARIABLE, Limits, Policy
from nha.serve.memory import generate_through
from nha.serve.settings import ServeSettings


def expose(source: Source) -> None:
    """Let transformers' server find a hybrid's class, which it looks up in transformers by name."""
    import transformers

    register()
    config: Any = source.config
    if is_hybrid(config):
        model = hybrid_classes(config.model_type)[1]
        setattr(transformers, model.__name__, model)


def open_store(settings: ServeSettings) -> MemoryStore | None:
    """The store of these settings. Raises OSError for a directory that cannot be made."""
    if settings.memory is None:
        return None
    return MemoryStore(settings.memory, settings.max_bytes, settings.memory_block)


def serve(source: Source, host: str, settings: ServeSettings, policy: Policy) -> None:
    """Run transformers' server in this process; SIGTERM lets running requests end for `drain_s` seconds."""
    import uvicorn
    from transformers.cli import serve as command
    from transformers.cli.serving import server

    expose(source)
    store = open_store(settings)
    os.environ[VARIABLE] = policy.to_json()
    build = server.build_server

    @functools.wraps(build)
    def build_limited(*args: Any, **kwargs: Any) -> Any:
        app = build(*args, **kwargs)
        app.add_middleware(Limits)
        for held in args[0].loaded_models.values():
            held.model.generation_config.do_sample = True  # a temperature of 0 turns it off again
            if settings.state_dtype is not None:
                set_state_dtype(held.model, settings.state_dtype)
            if settings.kv_cache_dtype is not None:
                set_kv_cache_dtype(held.model, settings.kv_cache_dtype)
            warm_up(held.model)
            if store is not None:
                generate_through(held.model, store)
        return app

    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # older versions list its models, and fail without it
    server.build_server = build_limited
    uvicorn.Config = functools.partial(uvicorn.Config, timeout_graceful_shutdown=settings.drain_s)  # type: ignore[misc]
    command.Serve(
        force_model=str(source.directory),
        host=host,
        port=settings.port,
        dtype=settings.dtype,
        device="auto",
    )
