"""A corpus gives back what was read, always the same rows, and notices when it is not what it should be."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from nha.data.corpus import Rows, open_corpus, prepare, tokenizer_fingerprint
from tests.convert.test_hybridize import byte_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "box"]


def texts(count: int = 40) -> list[str]:
    """Texts of 40 to 400 bytes, all different."""
    generator = np.random.default_rng(0)
    return [f"{i}: " + " ".join(generator.choice(WORDS, 8 + 2 * i)) for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in [*texts(), *texts(3)]))
    return str(path)


@pytest.fixture
def corpus(source, tokenizer, tmp_path):
    return prepare([source], tmp_path / "corpus", tokenizer, held_out=0.2, least=8)


def test_every_document_is_there_once_as_the_tokenizer_reads_it(corpus, tokenizer):
    found = [tokenizer.decode(corpus.document(i)) for i in range(len(corpus.held))]
    assert found == texts()
    assert 0 < corpus.held.sum() < len(corpus.held)
    assert corpus.meta["held_out"]["documents"] == corpus.held.sum()


def test_rows_are_a_function_of_seed_and_index_and_hold_every_training_token_once_an_epoch(corpus):
    rows = Rows(corpus, 64, seed=3)
    first = [rows.row(i) for i in range(rows.per_epoch)]
    again = Rows(open_corpus(corpus.path), 64, seed=3)
    for index in (rows.per_epoch - 1, 0, 5):
        assert np.array_equal(again.row(index)[0], first[index][0]) and again.row(index)[1] == first[index][1]
    assert not np.array_equal(Rows(corpus, 64, seed=4).row(0)[0], first[0][0])
    assert not np.array_equal(rows.row(rows.per_epoch)[0], first[0][0])
    joined = np.concatenate([ids for ids, _ in first])
    training = np.concatenate([corpus.document(i) for i in corpus.training])
    missing = len(training) - len(joined)
    assert 0 <= missing < 64
    counts = np.bincount(training, minlength=300) - np.bincount(joined, minlength=300)
    assert counts.min() >= 0 and counts.sum() == missing


def test_held_out_documents_are_never_trained_on(corpus, tokenizer):
    rows, generator = Rows(corpus, 64), np.random.default_rng(0)
    filler = corpus.filler(generator)
    seen = [rows.row(i)[0] for i in range(2 * rows.per_epoch)] + [filler(64) for _ in range(200)]
    seen.append(corpus.texts(64, 32).ravel())
    text = "|".join(tokenizer.decode(ids) for ids in seen)
    for index in corpus.measuring:
        assert tokenizer.decode(corpus.document(index))[:12] not in text
    assert len(corpus.held_out(2, 32)) == 2


def test_texts_of_a_row_start_where_documents_start(corpus):
    starts_of = {tuple(corpus.document(i)[:8]) for i in corpus.training}
    rows = Rows(corpus, 128)
    for index in range(rows.per_epoch):
        ids, starts = rows.row(index)
        assert starts[0] == 0 and sorted(set(starts)) == starts
        for start in starts[1:]:
            if start <= 120:
                assert tuple(ids[start : start + 8]) in starts_of


def test_a_corpus_is_read_once_and_then_found(source, tokenizer, tmp_path, corpus):
    assert prepare([source], corpus.path, tokenizer, held_out=0.2, least=8).identity == corpus.identity
    assert pickle.loads(pickle.dumps(corpus)).identity == corpus.identity
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_texts_are_single_documents_of_one_length(corpus):
    found = corpus.texts(50, 64, seed=1)
    assert found.shape == (50, 64) and found.dtype == np.int64
    assert np.array_equal(found, corpus.texts(50, 64, seed=1))
    assert corpus.texts(4, 4096).shape[1] < 4096
    with pytest.raises(ValueError, match="expected documents of at least 4096 tokens, the longest of"):
        corpus.texts(4, 4096, least=4096)


def test_another_tokenizer_is_refused(corpus, tokenizer, tmp_path):
    other = byte_tokenizer(tmp_path)
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)
    other.add_tokens(["quick brown"])
    with pytest.raises(ValueError, match=r"expected the corpus in .* to have been read by the model's tokenizer"):
        open_corpus(corpus.path, other)


@pytest.mark.parametrize("damage", ["cut", "bit", "held", "offsets", "meta", "format"])
def test_damage_is_noticed_and_the_sources_are_read_again(damage, corpus, source, tokenizer):
    path = corpus.path
    file = path / {"cut": "tokens.bin", "bit": "tokens.bin", "held": "held.npy", "offsets": "offsets.npy"}.get(
        damage, "meta.json"
    )
    data = bytearray(file.read_bytes())
    if damage == "format":
        file.write_text(json.dumps({"format": "other"}))
    elif damage == "bit":
        data[500] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(data[:-20])
    with pytest.raises(ValueError, match="expected"):
        open_corpus(path, tokenizer)
    if damage in ("meta", "format"):
        with pytest.raises(ValueError, match="expected a corpus"):
            prepare([source], path, tokenizer, held_out=0.2, least=8)
    else:
        assert prepare([source], path, tokenizer, held_out=0.2, least=8).identity == corpus.identity


def test_nothing_to_read_is_refused_and_leaves_nothing(tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"expected text in .*, got no text of 32 tokens or more"):
        prepare([str(tmp_path)], tmp_path / "corpus", tokenizer)
    assert not (tmp_path / "corpus").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"empty.txt", "short.txt"}


def test_a_directory_with_something_else_is_left_alone(source, tokenizer, tmp_path, corpus):
    with pytest.raises(ValueError, match="expected a corpus of these sources, settings and tokenizer"):
        prepare([source], corpus.path, tokenizer, held_out=0.5, least=8)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="it holds something else"):
        prepare([source], other, tokenizer)
    assert (other / "thesis.txt").read_text() == "precious"


def test_a_full_disk_leaves_no_half_corpus(source, tokenizer, tmp_path, monkeypatch):
    import nha.data.corpus as module

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        prepare([source], tmp_path / "corpus", tokenizer)
    assert not [p for p in tmp_path.iterdir() if "corpus" in p.name]
