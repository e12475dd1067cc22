"""YAML is parsed once, and what it cannot hold is named with its file and line."""

import pytest
import yaml

from nha.yaml_file import read_yaml


@pytest.fixture
def path(tmp_path):
    return tmp_path / "given.yaml"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: 1\nb: [x, 2.5, null, yes]\n",
        "a: &both {b: 1, c: [2]}\nd: *both\ne: {<<: *both, b: 3}\n",
        "1: a\n'1': b\n",
        "- 2001-12-14\n- !!set {x, y}\n",
    ],
)
def test_a_file_reads_as_yaml_gives_it(path, text):
    path.write_text(text)
    assert read_yaml(path) == yaml.safe_load(text)


def test_a_file_is_parsed_once(path, monkeypatch):
    path.write_text("a: {b: [1, 2]}\n")
    parsed, parse = [], yaml.SafeLoader.get_single_node
    monkeypatch.setattr(yaml.SafeLoader, "get_single_node", lambda self: parsed.append(1) or parse(self))
    assert read_yaml(path) == {"a": {"b": [1, 2]}} and parsed == [1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2\n", "expected each name once in a mapping, got a again in line 2"),
        ("x:\n  - {b: 1, c: 2, b: 1}\n", "got b again in line 2"),
        ("a: 1\nb: 2001-13-45\n", "expected a value of the kind timestamp, got 2001-13-45 in line 2"),
        ("a: !!int ''\n", "kind int"),
        ("a: !!float x\n", "expected a value of the kind float, got x in line 1"),
        ("a: !!bool maybe\n", "expected a value of the kind bool, got maybe in line 1"),
        ("a: !!timestamp x\n", "expected a value of the kind timestamp, got x in line 1"),
        ("a: " + "9" * 5000, "kind int, got " + "9" * 40 + " ..."),
        ("{[a]: 1}\n", "unhashable"),
        ("a: 1\n---\nb: 1\n", "single document"),
        ("a: !!python/object:x {}\n", "python/object"),
        ("[" * 100_000, "recursion"),
        ("a: 1\n{bad\n", "in line 3"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_what_is_wrong(path, text, words):
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_yaml(path)
    assert str(path) in str(error.value) and words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_absent_a_directory_or_in_another_encoding_is_named_in_words(path):
    with pytest.raises(ValueError, match=r"given.yaml, got: No such file or directory$"):
        read_yaml(path)
    with pytest.raises(ValueError, match="got: Is a directory$"):
        read_yaml(path.parent)
    path.write_bytes(b"a: 1\nb: caf\xe9\n")
    with pytest.raises(ValueError, match="got: invalid continuation byte in line 2, which is not UTF-8$"):
        read_yaml(path)
