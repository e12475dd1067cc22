"""Settings of `nha serve`."""

from __future__ import annotations

from dataclasses import dataclass

from nha.settings import DTYPES, check_settings, count, setting

BACKENDS = ("auto", "vllm", "transformers")


@dataclass
class ServeSettings:
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

    def __post_init__(self) -> None:
        check_settings(self)
