"""The built-in text: long documents to measure on, and text to calibrate on that they do not hold."""

from __future__ import annotations

import pytest

from nha.data.text import blocks, calibration_text, evaluation_documents
from tests.convert.test_hybridize import byte_tokenizer


def test_documents_are_long_and_the_calibration_text_is_longer_than_needed():
    assert all(len(document) > 20_000 for document in evaluation_documents())
    assert len(calibration_text()) > 150_000


def test_no_paragraph_is_in_both():
    measured = {part for document in evaluation_documents() for part in document.split("\n\n")}
    assert not measured & set(calibration_text().split("\n\n"))


def test_blocks_are_spread_over_the_texts_and_never_run_over_an_end(tmp_path):
    tokenizer = byte_tokenizer(tmp_path)
    found = blocks(tokenizer, ["a" * 25, "b" * 9, "c" * 20], 4, 10)
    assert [tokenizer.decode(row) for row in found] == ["a" * 10, "c" * 10, "a" * 10, "c" * 10]


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected text for 4 blocks of 10 tokens, got enough for 2"):
        blocks(byte_tokenizer(tmp_path), ["a" * 25], 4, 10)
