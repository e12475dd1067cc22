"""A corpus gives back what was read, always the same rows, and notices when it is not what it should be."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from nha.data.corpus import open_corpus, tokenizer_fingerprint
from nha.data.packing import PackedSequences
from nha.data.prepare import prepare
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
    return prepare([source], tmp_path / "corpus", tokenizer, held_out_fraction=0.2, min_tokens=8)


def test_every_document_is_there_once_as_the_tokenizer_reads_it(corpus, tokenizer):
    found = [tokenizer.decode(corpus.document(i)) for i in range(len(corpus.held))]
    assert found == texts()
    assert 0 < corpus.held.sum() < len(corpus.held)
    assert corpus.meta["held_out"]["documents"] == corpus.held.sum()


def test_rows_are_a_function_of_seed_and_index_and_hold_every_training_token_once_an_epoch(corpus):
    rows = PackedSequences(corpus, 64, seed=3)
    first = [rows.sequence(i) for i in range(rows.per_epoch)]
    again = PackedSequences(open_corpus(corpus.path), 64, seed=3)
    for index in (rows.per_epoch - 1, 0, 5):
        assert np.array_equal(again.sequence(index)[0], first[index][0]) and again.sequence(index)[1] == first[index][1]
    assert not np.array_equal(PackedSequences(corpus, 64, seed=4).sequence(0)[0], first[0][0])
    assert not np.array_equal(rows.sequence(rows.per_epoch)[0], first[0][0])
    joined = np.concatenate([ids for ids, _ in first])
    training = np.concatenate([corpus.document(i) for i in corpus.train_indices])
    missing = len(training) - len(joined)
    assert 0 <= missing < 64
    counts = np.bincount(training, minlength=300) - np.bincount(joined, minlength=300)
    assert counts.min() >= 0 and counts.sum() == missing


def test_held_out_documents_are_never_trained_on(corpus, tokenizer):
    rows, generator = PackedSequences(corpus, 64), np.random.default_rng(0)
    filler = corpus.filler(generator)
    seen = [rows.sequence(i)[0] for i in range(2 * rows.per_epoch)] + [filler(64) for _ in range(200)]
    seen.append(corpus.sample(64, 32).ravel())
    text = "|".join(tokenizer.decode(ids) for ids in seen)
    for index in corpus.held_out_indices:
        assert tokenizer.decode(corpus.document(index))[:12] not in text
    assert len(corpus.held_out_sequences(2, 32)) == 2


def test_texts_of_a_row_start_where_documents_start(corpus):
    starts_of = {tuple(corpus.document(i)[:8]) for i in corpus.train_indices}
    rows = PackedSequences(corpus, 128)
    for index in range(rows.per_epoch):
        ids, starts = rows.sequence(index)
        assert starts[0] == 0 and sorted(set(starts)) == starts
        for start in starts[1:]:
            if start <= 120:
                assert tuple(ids[start : start + 8]) in starts_of


def test_a_corpus_is_read_once_and_then_found(source, tokenizer, tmp_path, corpus):
    assert prepare([source], corpus.path, tokenizer, held_out_fraction=0.2, min_tokens=8).identity == corpus.identity
    assert pickle.loads(pickle.dumps(corpus)).identity == corpus.identity
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_texts_are_single_documents_of_one_length(corpus):
    found = corpus.sample(50, 64, seed=1)
    assert found.shape == (50, 64) and found.dtype == np.int64
    assert np.array_equal(found, corpus.sample(50, 64, seed=1))
    assert corpus.sample(4, 4096).shape[1] < 4096
    with pytest.raises(ValueError, match="expected documents of at least 4096 tokens, the longest of"):
        corpus.sample(4, 4096, min_seq_len=4096)


def test_another_tokenizer_is_refused(corpus, tokenizer, tmp_path):
    other = byte_tokenizer(tmp_path)
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)
    other.add_tokens(["quick brown"])
    with pytest.raises(ValueError, match=r"expected the corpus in .* to be of the model's tokenizer"):
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
            prepare([source], path, tokenizer, held_out_fraction=0.2, min_tokens=8)
    else:
        assert prepare([source], path, tokenizer, held_out_fraction=0.2, min_tokens=8).identity == corpus.identity


def test_nothing_to_read_is_refused_and_leaves_nothing(tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"expected text in .*, got no document of 32 tokens or more"):
        prepare([str(tmp_path)], tmp_path / "corpus", tokenizer)
    assert not (tmp_path / "corpus").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"empty.txt", "short.txt"}


def test_a_directory_with_something_else_is_left_alone(source, tokenizer, tmp_path, corpus):
    with pytest.raises(ValueError, match="expected a corpus of these sources, settings and tokenizer"):
        prepare([source], corpus.path, tokenizer, held_out_fraction=0.5, min_tokens=8)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="it holds something else"):
        prepare([source], other, tokenizer)
    assert (other / "thesis.txt").read_text() == "precious"


def test_a_full_disk_leaves_no_half_corpus(source, tokenizer, tmp_path, monkeypatch):
    import nha.data.prepare as module

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        prepare([source], tmp_path / "corpus", tokenizer)
    assert not [p for p in tmp_path.iterdir() if "corpus" in p.name]


def test_the_identity_covers_offsets_held_out_documents_and_tokens(corpus, source, tokenizer, tmp_path):
    def prepared(name, text, **options):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in text))
        options = {"held_out_fraction": 0.2, "min_tokens": 8} | options
        return prepare([str(tmp_path / f"{name}.jsonl")], tmp_path / name, tokenizer, **options)

    same = prepared("same", texts())
    assert same.identity == corpus.identity
    joined = [texts()[0] + texts()[1], *texts()[2:]]  # the same bytes, one document fewer
    others = [
        prepared("split", texts(), held_out_fraction=0.5),
        prepared("joined", joined, held_out_fraction=0.0),
        prepared("apart", texts(), held_out_fraction=0.0),
        prepared("changed", [texts()[0] + "!", *texts()[1:]]),
    ]
    assert np.array_equal(others[1].tokens, others[2].tokens)
    identities = {corpus.identity, *(other.identity for other in others)}
    assert len(identities) == 5


def test_a_corpus_of_the_version_before_is_read_and_found_again(corpus, source, tokenizer):
    file = corpus.path / "meta.json"
    meta = json.loads(file.read_text())
    made = meta["made_from"]
    made["held_out"], made["least"] = made.pop("held_out_fraction"), made.pop("min_tokens")
    file.write_text(json.dumps(meta | {"format": "nha-corpus-v1"}))
    assert open_corpus(corpus.path, tokenizer).identity == corpus.identity
    assert prepare([source], corpus.path, tokenizer, held_out_fraction=0.2, min_tokens=8).identity == corpus.identity
    with pytest.raises(ValueError, match=r"held_out_fraction 0\.2, not 0\.3"):
        prepare([source], corpus.path, tokenizer, held_out_fraction=0.3, min_tokens=8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": "float32"}, "expected a dtype out of"),
        ({"tokens": "many"}, "expected 'tokens' as int"),
        ({"checksums": []}, "expected 1 checksums of"),
        ({"tokenizer": {}}, "expected the tokenizer's 'fingerprint'"),
        ({"format": "nha-corpus-v9"}, "got 'nha-corpus-v9'"),
    ],
)
def test_a_description_that_cannot_be_is_refused_by_name(corpus, change, message):
    file = corpus.path / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        open_corpus(corpus.path)
    assert str(corpus.path) in str(caught.value)


def test_a_nested_description_is_refused(corpus):
    (corpus.path / "meta.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="expected a corpus in"):
        open_corpus(corpus.path)
