"""Text comes out of files of every kind as it is, and what is not text is refused in one line."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from nha.data.sources import documents, plain_text


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


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"\xff\xfe\x00", "expected UTF-8 text in"),
        ("a.txt.gz", b"not gzip", "expected UTF-8 text in"),
        ("a.jsonl", b"{broken", "expected JSON in line 1 of"),
    ],
)
def test_files_that_are_not_what_they_say_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(documents([str(tmp_path / name)]))


def test_sources_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected at least one source of text"):
        list(documents([]))
    with pytest.raises(ValueError, match="there is nothing at"):
        list(documents([str(tmp_path / "nothing")]))
    with pytest.raises(ValueError, match="expected text files"):
        list(documents([str(tmp_path)]))
