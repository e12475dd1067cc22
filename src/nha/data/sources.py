"""Documents of real text out of files, folders, JSON lines, parquet and `datasets` ids, one at a time."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

TEXT = (".txt", ".text", ".md", ".rst", ".pod")
HTML = (".html", ".htm", ".xhtml")
TABLES = (".jsonl", ".parquet")
BLOCKS = frozenset(
    (
        "address",
        "article",
        "aside",
        "blockquote",
        "br",
        "dd",
        "div",
        "dl",
        "dt",
        "figcaption",
        "figure",
        "footer",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "header",
        "hr",
        "li",
        "main",
        "nav",
        "ol",
        "p",
        "pre",
        "section",
        "table",
        "tr",
        "ul",
    )
)
SKIPPED = frozenset(("script", "style", "nav", "header", "footer", "head", "template", "noscript", "svg", "button"))
VOID = frozenset(("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"))


class _Page(HTMLParser):
    """Collects the text of a page and, apart, that of its main part if it names one."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.all: list[str] = []
        self.main: list[str] = []
        self.open: list[tuple[str, bool, bool, bool]] = []  # tag, whether it is skipped, main, preformatted

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS:
            self._add("\n")
        if tag in VOID:
            return
        given = dict(attrs)
        before = self.open[-1] if self.open else ("", False, False, False)
        main = before[2] or tag == "main" or given.get("role") == "main"
        link = tag == "a" and "headerlink" in (given.get("class") or "")
        self.open.append((tag, before[1] or tag in SKIPPED or link, main, before[3] or tag == "pre"))

    def handle_endtag(self, tag: str) -> None:
        if any(tag == one[0] for one in self.open):
            while self.open.pop()[0] != tag:
                pass
        if tag in BLOCKS:
            self._add("\n\n" if tag in ("p", "pre", "table", "ul", "ol", "dl") or tag[0] == "h" else "\n")

    def handle_data(self, data: str) -> None:
        _, skipped, _, preformatted = self.open[-1] if self.open else ("", False, False, False)
        if not skipped:
            self._add(data if preformatted else re.sub(r"\s+", " ", data))

    def _add(self, text: str) -> None:
        self.all.append(text)
        if self.open and self.open[-1][2]:
            self.main.append(text)


def plain_text(page: str) -> str:
    """The readable text of an HTML page: its main part if it marks one, no scripts, styles or navigation.

    >>> plain_text("<nav>Home</nav><main><h1>Title</h1><p>One &amp; <b>two</b></p><pre>a\\n  b</pre></main>")
    'Title\\n\\nOne & two\\n\\na\\n  b'
    """
    parser = _Page()
    parser.feed(page)
    parser.close()
    text = "".join(parser.main if "".join(parser.main).strip() else parser.all)
    text = re.sub(r"\n (?=\S)", "\n", re.sub(r"[ \t]+\n", "\n", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def suffix(path: Path) -> str:
    """A file's suffix in lower case, that of what it holds where it is compressed.

    >>> suffix(Path("a/page.HTML.gz"))
    '.html'
    """
    return (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower()


def files_of(source: Path) -> list[Path]:
    """The text files of a folder (or the one file), sorted by path; files of other kinds in a folder are left out."""
    if source.is_file():
        return [source]
    return sorted(p for p in source.rglob("*") if p.is_file() and suffix(p) in (*TEXT, *HTML, *TABLES))


def read_whole(path: Path) -> str:
    """A text file, unpacked if it is compressed. Raises ValueError for one that is not UTF-8 text."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
        return data.decode("utf-8")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"expected UTF-8 text in {path}, got: {error}") from None


def json_lines(path: Path, field: str) -> Iterator[str]:
    """The texts in `field` of a file of JSON lines, which may be compressed."""
    with (
        gzip.open(path, "rt", encoding="utf-8") if path.suffix.lower() == ".gz" else path.open(encoding="utf-8") as file
    ):
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except ValueError:
                raise ValueError(f"expected JSON in line {number} of {path}, got {line.strip()[:60]!r}") from None
            if not isinstance(found, dict) or not isinstance(found.get(field), str):
                got = sorted(found) if isinstance(found, dict) else type(found).__name__
                raise ValueError(f"expected a text in field {field!r} in line {number} of {path}, got {got}")
            yield found[field]


def parquet_rows(path: Path, field: str) -> Iterator[str]:
    """The texts in column `field` of a parquet file, batch by batch. Needs pyarrow."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ImportError(f"expected the package pyarrow to read {path}, got none: pip install 'nha[data]'") from None
    file = parquet.ParquetFile(path)
    if field not in file.schema_arrow.names:
        raise ValueError(f"expected a column {field!r} in {path}, got {file.schema_arrow.names}")
    for batch in file.iter_batches(columns=[field]):
        for text in batch.column(0).to_pylist():
            if text is not None:
                yield str(text)


def dataset_rows(name: str, field: str) -> Iterator[str]:
    """The texts in `field` of a `datasets` id "datasets:NAME[:CONFIGURATION[:SPLIT]]", streamed."""
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(f"expected the package datasets to read {name}, got none: pip install 'nha[data]'") from None
    _, dataset, configuration, split = [*name.split(":"), "", "", ""][:4]
    for row in load_dataset(dataset, configuration or None, split=split or "train", streaming=True):
        if not isinstance(row.get(field), str):
            raise ValueError(f"expected a text in field {field!r} of {name}, got {sorted(row)}")
        yield row[field]


def check_sources(sources: Sequence[str]) -> None:
    """Raise ValueError for a source that does not exist, before anything is read."""
    if not sources:
        raise ValueError("expected at least one source of text, got none")
    for source in sources:
        if source.startswith("datasets:"):
            continue
        path = Path(source)
        if not path.exists():
            raise ValueError(f"expected a file, a folder or datasets:NAME, there is nothing at {source}")
        if path.is_dir() and not files_of(path):
            kinds = " ".join((*TEXT, *HTML, *TABLES))
            raise ValueError(f"expected text files ({kinds}, or these as .gz) in {source}, there are none")


def documents(sources: Sequence[str], field: str = "text") -> Iterator[str]:
    """The texts of all sources in order, one document at a time.

    A source is a text file, an HTML page (read as plain text), a .jsonl or .parquet file whose texts are in `field`,
    one of the first three as .gz, a folder of all these, or "datasets:NAME[:CONFIGURATION[:SPLIT]]". Raises ValueError
    for a file that is not what its name says.
    """
    check_sources(sources)
    for source in sources:
        if source.startswith("datasets:"):
            yield from dataset_rows(source, field)
            continue
        for path in files_of(Path(source)):
            kind = suffix(path)
            if kind == ".jsonl":
                yield from json_lines(path, field)
            elif kind == ".parquet":
                yield from parquet_rows(path, field)
            else:
                yield plain_text(read_whole(path)) if kind in HTML else read_whole(path).strip()


def fingerprint(sources: Sequence[str], field: str) -> dict[str, list[int] | str]:
    """What tells whether sources are still what they were: sizes and times of change of all files, by path."""
    found: dict[str, list[int] | str] = {"field": field}
    for source in sources:
        if source.startswith("datasets:"):
            found[source] = "datasets"
            continue
        for path in files_of(Path(source)):
            status = path.stat()
            found[str(path)] = [status.st_size, status.st_mtime_ns]
    return found
