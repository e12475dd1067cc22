"""Results of a long evaluation, kept part by part, so that an interrupted one resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nha.io import append_line

FORMAT = "nha-partial-v1"


@dataclass
class PartialResults:
    """Finished parts of an evaluation by name, each appended durably to a file of JSON lines; without a path, to none.

    The file's first line is the evaluation's identity. A last line that is not whole (a power cut) is dropped.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "results.partial.jsonl"
    >>> open_partial(path, {"seed": 0}).add("piqa", [1, 0])
    >>> open_partial(path, {"seed": 0}).parts
    {'piqa': [1, 0]}
    """

    path: Path | None = None
    parts: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: Any) -> None:
        """Keep a part; JSON values come back as they are."""
        self.parts[name] = value
        if self.path is not None:
            append_line(self.path, json.dumps({"part": name, "value": value}))

    def remove(self) -> None:
        """Remove the file: the results are complete and stand elsewhere."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def partial_path(output: Path) -> Path:
    """Where the partial results of an output directory are.

    >>> partial_path(Path("runs/public")).as_posix()
    'runs/public.partial.jsonl'
    """
    return output.with_name(output.name + ".partial.jsonl")


def text_digest(texts: Sequence[str] | None) -> str | None:
    """A digest of texts for an identity, None for the built-in ones."""
    return None if texts is None else hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def open_partial(path: Path | None, identity: dict[str, Any]) -> PartialResults:
    """The parts that an interrupted evaluation of the same identity left at `path`, or none.

    Raises ValueError, with the file's name, if they are of another evaluation.
    """
    if path is None:
        return PartialResults()
    identity = json.loads(json.dumps(identity))
    lines, whole = _read(path) if path.exists() else ([], 0)
    if not lines and path.exists() and b"\n" in path.read_bytes():
        raise ValueError(f"expected partial results of format {FORMAT!r} in {path}, got another file")
    if not lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        append_line(path, json.dumps({"format": FORMAT, "identity": identity}))
        return PartialResults(path)
    head = lines[0]
    if head.get("format") != FORMAT or not isinstance(head.get("identity"), dict):
        raise ValueError(f"expected partial results of format {FORMAT!r} in {path}, got {head.get('format')!r}")
    begun = head["identity"]
    changed = sorted(k for k in begun.keys() | identity.keys() if begun.get(k) != identity.get(k))
    if changed:
        pairs = "; ".join(f"{k} = {begun.get(k)!r}, got {identity.get(k)!r}" for k in changed)
        raise ValueError(f"expected to resume the evaluation in {path} with {pairs}: delete it to begin anew")
    os.truncate(path, whole)
    return PartialResults(path, {line["part"]: line["value"] for line in lines[1:]})


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines at the start of a file, and their bytes."""
    lines: list[dict[str, Any]] = []
    whole = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not line.endswith(b"\n") or not isinstance(found, dict) or (lines and not {"part", "value"} <= found.keys()):
            break
        lines.append(found)
        whole += len(line)
    return lines, whole
