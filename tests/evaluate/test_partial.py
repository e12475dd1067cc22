"""An interrupted evaluation resumes with the parts that are whole, and never with those of another one."""

from __future__ import annotations

import json

import pytest

from nha.evaluate.partial import open_partial, partial_path

IDENTITY = {"model": ["tiny", None], "seed": 0}


def test_parts_survive_and_no_prefix_of_the_file_gives_a_wrong_one(tmp_path):
    path = tmp_path / "out.partial.jsonl"
    partial, values = open_partial(path, IDENTITY), {}
    for name in ("first", "second", "third"):
        values[name] = {"score": len(name) / 7}
        partial.add(name, values[name])
    data = path.read_bytes()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        found = open_partial(path, IDENTITY).parts
        assert found == dict(list(values.items())[: len(found)])
        assert len(found) == max(0, data[:size].count(b"\n") - 1)
        open_partial(path, IDENTITY).add("later", 1)
        assert open_partial(path, IDENTITY).parts == found | {"later": 1}


def test_parts_of_another_evaluation_are_refused_by_name(tmp_path):
    path = partial_path(tmp_path / "out")
    open_partial(path, IDENTITY).add("first", 1)
    with pytest.raises(ValueError, match=r"out\.partial\.jsonl with seed = 0, got 1"):
        open_partial(path, IDENTITY | {"seed": 1})
    path.write_text(json.dumps({"format": "other"}) + "\n")
    with pytest.raises(ValueError, match="expected partial results of format 'nha-partial-v1'"):
        open_partial(path, IDENTITY)


def test_a_file_of_somebody_else_is_left_alone(tmp_path):
    path = tmp_path / "out.partial.jsonl"
    path.write_text("dear diary\n")
    with pytest.raises(ValueError, match="got another file"):
        open_partial(path, IDENTITY)
    assert path.read_text() == "dear diary\n"


def test_without_a_path_nothing_is_written_and_removal_is_no_error(tmp_path):
    partial = open_partial(None, IDENTITY)
    partial.add("first", 1)
    partial.remove()
    assert partial.parts == {"first": 1}
    kept = open_partial(tmp_path / "x", IDENTITY)
    kept.remove()
    kept.remove()
    assert not list(tmp_path.iterdir())
