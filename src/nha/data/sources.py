"""Documents of real text from files, folders, JSON lines, parquet and `datasets` names, one at a time."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from nha.data.html import plain_text
from nha.data.packages import check_package

TEXT = (".txt", ".text", ".md", ".rst", ".pod")
HTML = (".html", ".htm", ".xhtml")
TABLES = (".jsonl", ".parquet")
COMPRESSED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
DATASETS = "datasets:"


def suffix(path: Path) -> str:
    """A file's suffix in lower case, without that of its compression.

    >>> suffix(Path("a/page.HTML.gz")), suffix(Path("a.jsonl.xz"))
    ('.html', '.jsonl')
    """
    return (Path(path.stem) if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def files_of(source: Path) -> list[Path]:
    """The text files of a folder (or the one file), sorted by path; files of other kinds in a folder are left out."""
    if source.is_file():
        return [source]
    return sorted(p for p in source.rglob("*") if p.is_file() and suffix(p) in (*TEXT, *HTML, *TABLES))


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a UTF-8 file, decompressed as its suffix says.

    Raises ValueError, with file and line, for bytes that are not UTF-8 and for compressed data that is damaged.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text in line {number} of {path}, got {error.reason}") from None
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ValueError(f"expected whole {path.suffix} data after line {number} of {path}, got: {error}") from None
    except OSError as error:
        if error.errno is not None:  # a real one; bz2 raises its own without a number
            raise
        raise ValueError(f"expected whole {path.suffix} data after line {number} of {path}, got: {error}") from None


def _open(path: Path) -> IO[bytes]:
    return COMPRESSED.get(path.suffix.lower(), open)(path, "rb")  # type: ignore[return-value]


def read_whole(path: Path) -> str:
    """A UTF-8 text file, decompressed as its suffix says. Raises ValueError as `lines_of` does."""
    return "".join(line for _, line in lines_of(path))


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of a file of JSON lines, which may be compressed; empty lines are skipped.

    Raises ValueError, with file and line, for a line that is not one JSON object.
    """
    for number, line in lines_of(path):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):  # RecursionError: brackets nested by the thousand
            raise ValueError(f"expected JSON in line {number} of {path}, got {line.strip()[:60]!r}") from None
        if not isinstance(found, dict):
            raise ValueError(f"expected a JSON object in line {number} of {path}, got {type(found).__name__}")
        yield number, found


def text_in(row: dict[str, Any], field: str, place: str) -> str:
    """The text in a field of a row; `place` names the row in errors.

    >>> text_in({"text": "one"}, "text", "line 1 of a.jsonl")
    'one'
    >>> text_in({"body": "one"}, "text", "line 1 of a.jsonl")
    Traceback (most recent call last):
        ...
    ValueError: expected a text in field 'text' in line 1 of a.jsonl, got the fields ['body']
    """
    text = row.get(field)
    if not isinstance(text, str):
        got = f"{type(text).__name__}" if field in row else f"the fields {sorted(map(str, row))}"
        raise ValueError(f"expected a text in field {field!r} in {place}, got {got}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        wrong = f"the lone surrogate {text[error.start]!a} at character {error.start}"
        raise ValueError(f"expected Unicode text in field {field!r} in {place}, got {wrong}") from None
    return text


def parquet_texts(path: Path, field: str) -> Iterator[str]:
    """The texts in column `field` of a parquet file, batch by batch; nulls are skipped. Needs pyarrow."""
    check_package("pyarrow", "data", f"to read {path}")
    import pyarrow
    import pyarrow.parquet as parquet

    row = 0
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if field not in names:
            raise ValueError(f"expected a column {field!r} in {path}, got {names}")
        for batch in file.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                row += 1
                if value is not None:
                    yield text_in({field: value}, field, f"row {row} of {path}")
    except pyarrow.ArrowException as error:
        raise ValueError(f"expected a whole parquet file in {path}, got: {error}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"expected a whole parquet file in {path}, got: {error}") from None


def dataset_texts(name: str, field: str) -> Iterator[str]:
    """The texts in `field` of "datasets:NAME[:CONFIGURATION[:SPLIT]]", streamed. Needs datasets."""
    check_package("datasets", "data", f"to read {name}")
    from datasets import load_dataset  # pyright: ignore[reportMissingImports]

    _, dataset, configuration, split = [*name.split(":"), "", "", ""][:4]
    rows = load_dataset(dataset, configuration or None, split=split or "train", streaming=True)
    for number, row in enumerate(rows, 1):
        yield text_in(row, field, f"row {number} of {name}")


def check_sources(sources: Sequence[str]) -> None:
    """Check that every source exists and that the packages to read it are installed, before anything is read.

    Raises ValueError for a source that does not exist or holds no text files, ImportError for a missing package.
    """
    if not sources:
        raise ValueError("expected at least one source of text, got none")
    for source in sources:
        if source.startswith(DATASETS):
            if not source.split(":")[1]:
                raise ValueError(f"expected datasets:NAME[:CONFIGURATION[:SPLIT]], got {source!r}")
            check_package("datasets", "data", f"to read {source}")
            continue
        path = Path(source)
        if not path.exists():
            raise ValueError(f"expected a file, a folder or datasets:NAME, there is nothing at {source}")
        files = files_of(path)
        if path.is_dir() and not files:
            kinds = " ".join((*TEXT, *HTML, *TABLES))
            raise ValueError(f"expected text files ({kinds}, also as .gz, .xz or .bz2) in {source}, there are none")
        found = {suffix(file): file for file in files}
        if ".parquet" in found:
            check_package("pyarrow", "data", f"to read {found['.parquet']}")
        for kind in found.keys() & set(HTML):
            check_package("selectolax", "data", f"to read {found[kind]}")


def documents(sources: Sequence[str], field: str = "text") -> Iterator[str]:
    """The texts of all sources in order, one document at a time.

    A source is a text file, an HTML page (read as plain text), a .jsonl or .parquet file whose texts are in `field`,
    one of the first three compressed (.gz, .xz, .bz2), a folder of all these, or
    "datasets:NAME[:CONFIGURATION[:SPLIT]]". Raises ValueError, with file and line or row, for content that is not what
    the name says, and as `check_sources` does.
    """
    check_sources(sources)
    for source in sources:
        if source.startswith(DATASETS):
            yield from dataset_texts(source, field)
            continue
        for path in files_of(Path(source)):
            kind = suffix(path)
            if kind == ".jsonl":
                yield from (text_in(row, field, f"line {number} of {path}") for number, row in json_rows(path))
            elif kind == ".parquet":
                yield from parquet_texts(path, field)
            else:
                yield plain_text(read_whole(path)) if kind in HTML else read_whole(path).strip()


def fingerprint(sources: Sequence[str], field: str) -> dict[str, list[int] | str]:
    """Sizes and times of change of all files, by path: equal as long as the sources are."""
    found: dict[str, list[int] | str] = {"field": field}
    for source in sources:
        if source.startswith(DATASETS):
            found[source] = "datasets"
            continue
        for path in files_of(Path(source)):
            status = path.stat()
            found[str(path)] = [status.st_size, status.st_mtime_ns]
    return found
