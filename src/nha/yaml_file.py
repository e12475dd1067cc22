"""Reading YAML: files of settings and tables. Errors name the file and, where the file can be parsed, the line."""

from __future__ import annotations

from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from nha.errors import line_of, one_line


class _Loader(yaml.SafeLoader):
    """Python's own errors for a value, such as the date 2001-13-45, become errors of YAML with the value's place."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):
            got = str(node.value) if len(str(node.value)) < 80 else f"{str(node.value)[:40]} ..."
            kind = node.tag.rpartition(":")[2]
            place = f"{got} in line {node.start_mark.line + 1}"
            raise yaml.YAMLError(f"expected a value of the kind {kind}, got {place}") from None


def read_yaml(path: Path | Traversable) -> Any:
    """Read a YAML file.

    Raises ValueError, with the file's name, for a file that cannot be read, is no YAML or gives a name twice in one
    mapping, of which YAML would take the last without a word.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        _check_names(root)
        return None if root is None else loader.construct_document(root)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"expected YAML at {path}, got: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """The fault of a file, in one line, with its line number where there is one."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnicodeDecodeError):
        return f"{error.reason} in line {line_of(error)}, which is not UTF-8"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        words = ", ".join(one_line(part) for part in (error.context, error.problem) if part)
        return f"{words} in line {error.problem_mark.line + 1}"
    return one_line(error)


def _check_names(root: yaml.Node | None) -> None:
    """Raise YAMLError for a name that stands twice in a mapping of a document."""
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            names = set()
            for name, value in node.value:
                key = name.tag, str(name.value)
                if key in names:
                    place = f"line {name.start_mark.line + 1}"
                    raise yaml.YAMLError(f"expected each name once in a mapping, got {name.value} again in {place}")
                names.add(key)
                nodes.append(value)
