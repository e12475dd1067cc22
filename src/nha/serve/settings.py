"""Settings of `nha serve`."""

from __future__ import annotations

from dataclasses import dataclass

from nha.settings import DTYPES, KV_CACHE_DTYPES, STATE_DTYPES, check_settings, count, setting

BACKENDS = ("auto", "vllm", "transformers")


@dataclass
class CacheSettings:
    """How caches are kept, in memory and on disk.

    >>> CacheSettings(state_dtype="int4")
    Traceback (most recent call last):
    ValueError: expected state_dtype to be one of float32, bfloat16, int8, got 'int4'
    """

    state_dtype: str | None = setting(
        None,
        "Number format of a hybrid's slots and windows between two tokens.",
        choices=STATE_DTYPES,
        shown="as saved",
    )
    kv_cache_dtype: str | None = setting(
        None,
        "Number format of keys and values of a hybrid's full attention.",
        choices=KV_CACHE_DTYPES,
        shown="as saved",
    )
    memory: str | None = setting(
        None, "Keep what was read in this directory, and read nothing in it again.", shown="none"
    )
    memory_gib: float = setting(
        10.0, "Size of that directory; texts used least recently are removed.", above=0, at_most=2**20
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def max_bytes(self) -> int:
        """Bytes of that directory."""
        return max(int(self.memory_gib * 2**30), 1)


@dataclass
class ServeSettings(CacheSettings):
    """Server of a model, and how much clients may ask for.

    >>> ServeSettings(port=0)
    Traceback (most recent call last):
    ValueError: expected port of at least 1 and at most 65535, got 0
    """

    backend: str = setting("auto", "What runs the model; auto takes vLLM where it can.", choices=BACKENDS)
    port: int = count(8000, "Port to listen at.", at_most=65535)
    max_length: int | None = setting(
        None, "Tokens of a prompt and its answer together.", at_least=2, shown="as the model's config says"
    )
    max_requests: int = count(256, "Requests at a time; more are told to come back (HTTP 429).")
    drain_s: int = setting(60, "Seconds that running requests get after SIGTERM.", at_least=1)
    dtype: str = setting("auto", "Number format of the model.", choices=DTYPES)
    memory_block: int = count(1024, "Tokens of a block in that directory: prompts share whole blocks.")
