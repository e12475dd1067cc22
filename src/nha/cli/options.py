"""Options of a command from the fields of a settings dataclass."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from nha.cli.common import BadInput
from nha.settings import default_text, option_name, read_settings

TYPES = {"int": int, "float": float, "str": str, "bool": bool}


SETTINGS_FILE = "settings_file"


def with_settings(kind: type, *, file: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each field of a dataclass, in place of its parameter `settings`.

    With `file`, the option --settings reads them from a YAML file, which the other options override.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "settings"]
        fields = {entry.name: entry for entry in dataclasses.fields(kind)}

        @functools.wraps(function)
        def run(**options: Any) -> None:
            values = {name: _read(fields[name], options.pop(name)) for name in fields}
            if file:
                path = options.pop(SETTINGS_FILE)
                given = {name: value for name, value in values.items() if value is not None}
                values = ({} if path is None else read_settings(kind, path)) | given
            function(**options, settings=make_settings(kind, values))

        options = [_option(entry, file) for entry in fields.values()]
        options += [_file_option()] if file else []
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in [*own, *options]]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def given_options(context: typer.Context, kind: type) -> list[str]:
    """The fields of a settings dataclass whose options stand on the command line, also those equal to the default."""
    names = [entry.name for entry in dataclasses.fields(kind)]
    return [name for name in names if getattr(context.get_parameter_source(name), "name", None) == "COMMANDLINE"]


def _file_option() -> inspect.Parameter:
    option = typer.Option("--settings", help="A YAML file with settings by name; options override it.")
    annotation = Annotated[Path | None, option]
    return inspect.Parameter(SETTINGS_FILE, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _option(entry: dataclasses.Field, file: bool = False) -> inspect.Parameter:
    """The command line's option for a setting; with a file of settings, None stands for an option not given."""
    metadata = entry.metadata
    choices = metadata.get("choices")
    text = metadata["help"] + (f" One of {', '.join(choices)}." if choices else "")
    kinds = str(entry.type).split(" | ")
    kind: Any = str if "parse" in metadata else TYPES[kinds[0]]
    default = entry.default
    if "parse" in metadata and default is not None:
        default = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    large = isinstance(default, float) and default >= 1e6  # else shown with all its zeros
    shown = metadata.get("shown", default_text(entry) if file or large else True)
    name = option_name(entry)
    names = f"{name}/--no-{name[2:]}" if kind is bool else name
    option = typer.Option(names, help=text, show_default=shown)
    annotation = Annotated[kind | None if file or "None" in kinds else kind, option]
    default = None if file else default
    return inspect.Parameter(entry.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _read(entry: dataclasses.Field, value: Any) -> Any:
    """A setting's value from what the command line gave. Raises BadInput."""
    parse = entry.metadata.get("parse")
    if parse is None or value is None:
        return value
    try:
        return parse(value)
    except ValueError as error:
        raise BadInput(f"{error} for {option_name(entry)}") from None


def make_settings(kind: type, values: dict[str, Any]) -> Any:
    """The settings, with the options' names in the errors."""
    with option_errors(kind):
        return kind(**values)


@contextmanager
def option_errors(kind: type) -> Iterator[None]:
    """Within the context, a ValueError about a setting becomes a BadInput about its option."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for entry in dataclasses.fields(kind):
            start = r"\b" if "_" in entry.name else r"(?<=^expected )"
            text = re.sub(rf"{start}{entry.name}\b", option_name(entry), text)
        raise BadInput(text) from None
