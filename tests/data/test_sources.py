"""Text comes out of files of every kind as it is, and what is not text is refused in one line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nha.data.html import plain_text
from nha.data.sources import check_sources, documents


def test_a_folder_is_read_in_order_whatever_its_files_are(tmp_path):
    (tmp_path / "a.txt").write_text("first text")
    (tmp_path / "b.html").write_text("<html><head><title>no</title></head><body><p>second</p></body></html>")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "third"}\n\n{"text": "fourth"}\n'))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "e.rst.gz").write_bytes(gzip.compress(b"fifth"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert list(documents([str(tmp_path)])) == ["first text", "second", "third", "fourth", "fifth"]


def test_parquet_and_other_fields(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"body": ["one", None, "two"], "other": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": "three"}))
    sources = [str(tmp_path / "rows.parquet"), str(tmp_path / "rows.jsonl")]
    assert list(documents(sources, "body")) == ["one", "two", "three"]
    with pytest.raises(ValueError, match=r"expected a column 'text' in .*, got \['body', 'other'\]"):
        list(documents(sources[:1]))
    with pytest.raises(ValueError, match="expected a text in field 'text' in line 1 of"):
        list(documents(sources[1:]))


def test_datasets_are_streamed_and_asked_for_by_name(monkeypatch):
    class Fake:
        @staticmethod
        def load_dataset(name, configuration, split, streaming):
            assert streaming
            return iter([{"text": f"{name} {configuration} {split}"}])

    monkeypatch.setitem(sys.modules, "datasets", Fake)
    assert list(documents(["datasets:some/set:en"])) == ["some/set en train"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="expected the package datasets to read datasets:some/set"):
        list(documents(["datasets:some/set"]))


def test_pages_lose_what_is_not_text():
    page = """<body><header>menu</header><div role="main"><h1>Name<a class="headerlink" href="#">¶</a></h1>
    <p>Some   <em>plain</em>
    text.<br>And more.</p><script>no()</script><pre>x = 1
    y = 2</pre><ul><li>one</li><li>two</li></ul></div><div>sidebar</div></body>"""
    assert plain_text(page) == "Name\n\nSome plain text.\nAnd more.\n\nx = 1\n    y = 2\n\none\n\ntwo"


NESTED = b"[" * 200_000
WHOLE = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"good\n\xff\xfe\x00", "expected UTF-8 text in line 2 of {path}"),
        ("a.txt.gz", b"not gzip", "expected whole .gz data after line 0 of {path}"),
        ("a.txt.xz", b"not xz", "expected whole .xz data after line 0 of {path}"),
        ("a.txt.bz2", b"not bzip2", "expected whole .bz2 data after line 0 of {path}"),
        ("a.jsonl", b"{broken", "expected JSON in line 1 of {path}"),
        ("a.jsonl", b'{"text": "one"}\n' + NESTED, "expected JSON in line 2 of {path}"),
        ("a.jsonl", b"[1, 2]", "expected a JSON object in line 1 of {path}, got list"),
        ("a.jsonl", b'\n{"body": "x"}', "field 'text' in line 2 of {path}, got the fields ['body']"),
        ("a.jsonl", b'{"text": 7}', "field 'text' in line 1 of {path}, got int"),
        ("a.jsonl", rb'{"text": "ab\ud800"}', "field 'text' in line 1 of {path}, got the lone surrogate '\\ud800'"),
        ("a.parquet", b"", "expected a whole parquet file in {path}"),
        ("a.parquet", b"PAR1 broken PAR1", "expected a whole parquet file in {path}"),
    ],
)
def test_files_that_are_not_what_they_say_are_refused_by_file_and_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        list(documents([str(path)]))
    assert message.format(path=path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", WHOLE)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_damaged_archives_are_refused_by_name_and_never_read_as_something_else(kind, data, tmp_path_factory):
    lines = [json.dumps({"text": f"document {i} " + "word " * 20}).encode() for i in range(40)]
    packed = WHOLE[kind](b"\n".join(lines))
    path = tmp_path_factory.mktemp("archive") / f"a.jsonl{kind}"
    path.write_bytes(packed[: data.draw(st.integers(1, len(packed) - 1))])
    with pytest.raises(ValueError) as caught:
        list(documents([str(path)]))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", WHOLE)
def test_compressed_files_read_as_plain_ones(kind, tmp_path):
    (tmp_path / f"a.jsonl{kind}").write_bytes(WHOLE[kind](b'{"text": "one"}\n{"text": "two"}'))
    (tmp_path / f"b.html{kind}").write_bytes(WHOLE[kind]("\ufeff<p>three é</p>".encode()))
    assert list(documents([str(tmp_path)])) == ["one", "two", "three é"]


@pytest.mark.parametrize("page", ["<b>" * 20_000, "<div>" * 20_000, "<p>" * 20_000, "<table><tr><td>" * 5_000])
def test_pages_with_thousands_of_open_tags_are_read_whole_and_at_once(page):
    started = time.perf_counter()
    assert plain_text(f"<p>first</p>{page}last") == "first\n\nlast"
    assert time.perf_counter() - started < 10  # html.parser took more than a minute


def test_missing_packages_are_named_before_anything_is_read(tmp_path, monkeypatch):
    for name, package in (("a.parquet", "pyarrow"), ("a.html", "selectolax"), ("datasets:some/set", "datasets")):
        source = name if ":" in name else str(tmp_path / name)
        if ":" not in name:
            (tmp_path / name).write_text("")
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ImportError) as caught:
                check_sources([source])
        assert (
            package in str(caught.value)
            and source in str(caught.value)
            and "pip install 'nha[data]'" in str(caught.value)
        )


def test_sources_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected at least one source of text"):
        list(documents([]))
    with pytest.raises(ValueError, match="there is nothing at"):
        list(documents([str(tmp_path / "nothing")]))
    with pytest.raises(ValueError, match="expected text files"):
        list(documents([str(tmp_path)]))
