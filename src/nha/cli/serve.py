"""`nha serve`: an OpenAI-compatible server for a model."""

from __future__ import annotations

import ipaddress
from typing import Annotated

import typer

from nha.cli.common import command, err, escape, status
from nha.cli.options import with_settings
from nha.errors import BadInput
from nha.models import loading
from nha.serve.settings import ServeSettings


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    >>> is_loopback("localhost"), is_loopback("127.0.0.1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@command
@with_settings(ServeSettings)
def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="A model directory, a Hub id, or 'smollm2' for the embedded model, 'smollm2-hybrid' for its hybrid."
        ),
    ],
    settings: ServeSettings,
    options: Annotated[
        list[str] | None, typer.Argument(help="Options of vLLM, after '--'.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    api_key: Annotated[
        str | None,
        typer.Option(help="A key that clients must name.", envvar="NHA_API_KEY", show_default="none is asked for"),
    ] = None,
) -> None:
    """Serve a model behind OpenAI's API: with vLLM where it is installed and can, else with transformers' server."""
    from nha.serve.embedded import is_saved, save_embedded, with_directory
    from nha.serve.launch import choose, start

    if api_key is not None and not api_key.strip():
        raise BadInput(f"expected --api-key to be a key, got {api_key!r}")  # vLLM would let everybody in
    source = with_directory(loading.find(model))
    choice = choose(settings.backend, source, settings)
    err.print(f"serving {escape(source.label)} at http://{host}:{settings.port}/v1", soft_wrap=True)
    err.print(f"with {escape(choice.why)}", soft_wrap=True)
    if api_key is None and not is_loopback(host):
        err.print("[yellow]warning:[/] anybody who reaches this address can use it; --api-key asks for a key")
    if not is_saved(source):
        with status(f"saving it in {source.directory}, once"):
            save_embedded(source)
    start(source, choice, host, api_key, settings, options or [])
