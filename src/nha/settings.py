"""Settings in dataclasses: the command line, the docs' tables and the checks come from the fields.

Imports no PyTorch: the command line needs this file to print its help.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

INITS = ("kmeans", "soft", "spread", "keys", "paper")
DTYPES = ("auto", "float32", "bfloat16", "float16")
STATE_DTYPES = ("float32", "bfloat16", "int8")
KV_CACHE_DTYPES = ("auto", "int8")
SLOT_FEATURES = ("none", "silu", "relu")
SLOT_WRITES = ("soft", "exact")
VALUE_ACTIVATIONS = ("none", "silu")
OUTPUT_NORMS = ("none", "rms", "silu_rms")
MAX_LENGTH = MAX_WINDOW = 1 << 24  # tokens; positions in kernels are 32-bit numbers
LISTS = {  # the kind of an entry, and entries in words
    "tuple[int, ...]": ("int", "ints"),
    "tuple[float, ...]": ("float", "numbers"),
    "tuple[str, ...]": ("str", "texts"),
}
WINDOWS = "int | tuple[int | tuple[int, ...], ...]"  # one for all, one per layer, or in a layer one per KV head


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A field with its help text and its bounds.

    Args:
        default: its value where none is given.
        help: one sentence for the command line and the docs.
        **metadata: `at_least`, `at_most`, `above`: bounds, which may be equal except for `above`. `choices`: the
            strings it can be. `option`: its name on the command line, if not that of the field. `parse`: str to value
            on the command line. `shown`: the default in words. `resumable`: whether a resumed run may change it.
    """
    return field(default=default, metadata={"help": help, **metadata})


def fraction(default: float, help: str, **metadata: Any) -> Any:
    return setting(default, help, at_least=0, at_most=1, **metadata)


def weight(default: float, help: str, **metadata: Any) -> Any:
    return setting(default, help, at_least=0, at_most=1e6, **metadata)


def count(default: int, help: str, at_least: int = 1, at_most: int = MAX_LENGTH, **metadata: Any) -> Any:
    return setting(default, help, at_least=at_least, at_most=at_most, **metadata)


def parse_ints(text: str) -> tuple[int, ...]:
    """Integers separated by commas.

    >>> parse_ints("3, 11,18"), parse_ints("")
    ((3, 11, 18), ())
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"expected integers separated by commas, got {text!r}") from None


def parse_window(text: str) -> int | tuple[int, ...]:
    """One window for all layers, or one for each.

    >>> parse_window("64"), parse_window("64,-1")
    (64, (64, -1))
    """
    windows = parse_ints(text)
    if not windows:
        raise ValueError(f"expected an integer or a list of them, got {text!r}")
    return windows if "," in text else windows[0]


def read_settings(kind: type, path: Path | str) -> dict[str, Any]:
    """The settings of a dataclass that a YAML file holds, by name; fields that it leaves out are not in the result.

    Raises ValueError, with the file's name, for a file that cannot be read, is no mapping, names other settings or
    holds a value that a setting cannot have.
    """
    from nha.yaml_file import read_yaml

    found = read_yaml(Path(path))
    if not isinstance(found, dict):
        raise ValueError(f"expected a mapping of settings in {path}, got {type(found).__name__}")
    entries = {entry.name: entry for entry in dataclasses.fields(kind)}
    unknown = sorted(str(name) for name in found if name not in entries)
    if unknown:
        raise ValueError(f"expected settings out of {', '.join(entries)} in {path}, got {unknown[0]}")
    values = {name: _from_yaml(value, str(entries[name].type)) for name, value in found.items()}
    for name, value in values.items():
        try:
            check_value(name, value, str(entries[name].type), entries[name].metadata)
        except ValueError as error:
            raise ValueError(f"{error} in {path}") from None
    return values


def _from_yaml(value: Any, kind: str) -> Any:
    """A value as the dataclass has it: YAML knows no tuples, and reads 15e9 as text."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and "float" in kind:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def identity_of(settings: Any) -> dict[str, Any]:
    """The settings that a resumed run must share, by name: all but those marked `resumable`."""
    kept = [entry.name for entry in dataclasses.fields(settings) if not entry.metadata.get("resumable")]
    return {name: getattr(settings, name) for name in kept}


def check_settings(settings: Any) -> None:
    """Raise ValueError for a field of a settings dataclass that is of another type or outside its bounds."""
    for entry in dataclasses.fields(settings):
        check_value(entry.name, getattr(settings, entry.name), str(entry.type), entry.metadata)


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError for a value that is none of its choices.

    >>> check_choice("slot_write", "hard", SLOT_WRITES)
    Traceback (most recent call last):
    ValueError: expected slot_write to be one of soft, exact, got 'hard'
    """
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {', '.join(choices)}, got {value!r}")


def check_value(name: str, value: Any, kind: str, metadata: Mapping[str, Any]) -> None:
    """Raise ValueError unless a value is of its field's type, finite and within its bounds.

    `kind` is the field's annotation, such as "int", "float | None", "tuple[str, ...]" or "dict[str, Any]"; a tuple's
    bounds are those of its entries.
    """
    kinds = kind.split(" | ")
    if value is None and "None" in kinds:
        return
    kind = kind.removesuffix(" | None")
    choices = metadata.get("choices")
    if choices is not None:
        check_choice(name, value, choices)
        return
    if kind.startswith("dict"):
        if not isinstance(value, Mapping):
            raise ValueError(f"expected {name} to be a mapping, got {value!r}")
        return
    if kind in LISTS:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"expected {name} to be a list of {LISTS[kind][1]}, got {value!r}")
        for entry in value:
            check_value(name, entry, LISTS[kind][0], metadata)
        return
    if "str" in kinds:
        if not isinstance(value, str) or not value:
            raise ValueError(f"expected {name} to be a text, got {value!r}")
        return
    if kind == "bool":
        if not isinstance(value, bool):
            raise ValueError(f"expected {name} to be True or False, got {value!r}")
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if "tuple" in kind and not (isinstance(value, (tuple, list)) or whole):
        raise ValueError(f"expected {name} to be an int or a list of them, got {value!r}")
    if isinstance(value, (tuple, list)) and kind == WINDOWS:
        value = [own for entry in value for own in (entry if isinstance(entry, (tuple, list)) and entry else [entry])]
        kinds = ["int", "tuple[int, ...]"]
    if isinstance(value, (tuple, list)) and "tuple[int, ...]" in kinds:
        if not value and "int" in kinds:
            raise ValueError(f"expected {name} to be an int or a list of them, got an empty list")
        for entry in value:
            _check_number(name, entry, "int", metadata)
        return
    _check_number(name, value, "float" if "float" in kinds else "int", metadata)


def _check_number(name: str, value: Any, kind: str, metadata: Mapping[str, Any]) -> None:
    known: tuple[type, ...] = (int,) if kind == "int" else (int, float)
    if isinstance(value, bool) or not isinstance(value, known):
        raise ValueError(f"expected {name} to be {'an int' if kind == 'int' else 'a number'}, got {value!r}")
    low, above, high = (metadata.get(bound) for bound in ("at_least", "above", "at_most"))
    inside = (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)
    if not (inside and (isinstance(value, int) or math.isfinite(value))):  # an int may be too large for a float
        raise ValueError(f"expected {name} {bounds(metadata)}, got {value}")


def bounds(metadata: Mapping[str, Any]) -> str:
    """The bounds of a setting in words.

    >>> bounds({"at_least": 0, "at_most": 1})
    'of at least 0 and at most 1'
    >>> bounds({"at_most": 2**31 - 1})
    'at most 2147483647'
    """
    words = {"at_least": "of at least", "above": "above", "at_most": "at most"}
    return " and ".join(
        f"{text} {metadata[name]:.10g}" for name, text in words.items() if metadata.get(name) is not None
    )


def option_name(entry: dataclasses.Field) -> str:
    """The name of a setting on the command line.

    >>> @dataclasses.dataclass
    ... class Example:
    ...     num_slots: int = count(64, "Slots per KV head.", option="slots")
    ...     batch_size: int = count(16, "Sequences of a step.")
    >>> [option_name(entry) for entry in dataclasses.fields(Example)]
    ['--slots', '--batch-size']
    """
    return "--" + entry.metadata.get("option", entry.name).replace("_", "-")


def default_text(entry: dataclasses.Field) -> str:
    """The default of a setting in words."""
    shown = entry.metadata.get("shown")
    if shown is not None:
        return shown
    value = entry.default
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_table(settings: type) -> str:
    """A Markdown table of all settings of a dataclass: option, default and meaning."""
    lines = ["| option | default | |", "|---|---|---|"]
    for entry in dataclasses.fields(settings):
        choices = entry.metadata.get("choices")
        meaning = entry.metadata["help"] + (f" One of {', '.join(choices)}." if choices else "")
        lines.append(f"| `{option_name(entry)}` | {default_text(entry)} | {meaning} |")
    return "\n".join(lines) + "\n"
