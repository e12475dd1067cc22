"""Batches are functions of their number, keep texts apart and say what counts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from nha.data.packing import PackedSequences, pack
from nha.data.prepare import prepare
from nha.data.recall import RecallSettings
from nha.data.stream import RECALL, TEXT, Mixture, ResumeSampler, Stream
from tests.convert.test_hybridize import byte_tokenizer
from tests.data.test_corpus import texts


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream")
    (path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts()))
    tokenizer = byte_tokenizer(path)
    return prepare([str(path / "texts.jsonl")], path / "corpus", tokenizer, min_tokens=8), tokenizer


def same(a, b) -> bool:
    return [name for name, _ in a] == [name for name, _ in b] and all(
        torch.equal(x[key], y[key]) for (_, x), (_, y) in zip(a, b, strict=True) for key in x
    )


def test_packing_names_texts_targets_and_answers():
    first = (np.array([5, 6, 7, 8]), [0, 3], None)
    second = (np.array([9, 10, 11, 12]), [0], np.array([False, False, True, True]))
    batch = pack([first, second])
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, *[8] * 6] and batch["cu_seqlens"].dtype == np.int32
    assert batch["ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert batch["target"].tolist() == [6, 7, 8, 9, 10, 11, 12, 0]
    assert batch["follows"].tolist() == [1, 1, 0, 0, 1, 1, 1, 0]
    assert batch["answers"].tolist() == [0, 0, 0, 0, 0, 1, 1, 0]


def test_packing_cuts_documents_into_pieces_for_a_teacher():
    first = (np.arange(7), [0, 5], None)
    second = (np.arange(3), [0], np.array([False, False, True]))
    batch, whole = pack([first, second], teacher_context=3), pack([first, second])
    assert batch["teacher_position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 0, 1, 2]]
    assert batch["teacher_cu_seqlens"].tolist()[:6] == [0, 3, 5, 7, 10, 10]
    assert batch["teacher_cu_seqlens"].dtype == np.int32
    assert all(np.array_equal(batch[name], value) for name, value in whole.items())


def test_only_sequences_beyond_the_teachers_context_come_with_pieces(material):
    mixture = Mixture(2, batch_size=4, seq_len=256, recall_fraction=0.5, long_steps=1, long_seq_len=512)
    stream, plain = (Stream(*material, mixture, teacher_context=context) for context in (256, None))
    assert same(stream[0], plain[0])
    for name, batch in stream[1]:
        extra = {key: batch.pop(key) for key in ("teacher_position_ids", "teacher_cu_seqlens")}
        assert extra["teacher_position_ids"].max() < 256 and extra["teacher_cu_seqlens"].diff().max() <= 256
        assert same([(name, batch)], [(name, dict(plain[1])[name])])


def test_a_long_step_has_text_beside_recall_text(material):
    mixture = Mixture(4, batch_size=2, seq_len=256, recall_fraction=0.25, long_steps=4, long_seq_len=512)
    assert mixture.shape(0) == (2, 512)
    assert [[name for name, _ in Stream(*material, mixture)[step]] for step in (0, 1)] == [[TEXT], [TEXT, RECALL]]


def test_a_batch_depends_on_its_number_alone(material):
    mixture = Mixture(12, batch_size=4, seq_len=384, recall_fraction=0.25, seed=5)
    stream = Stream(*material, mixture)
    forwards = [stream[i] for i in range(6)]
    again = Stream(*material, mixture)
    for step in (5, 0, 3):
        assert same(again[step], forwards[step])
    assert not same(
        Stream(*material, Mixture(12, batch_size=4, seq_len=384, recall_fraction=0.25, seed=6))[0], forwards[0]
    )


def test_text_rows_are_those_of_the_corpus_in_order_on_every_rank(material):
    corpus, tokenizer = material
    rows = PackedSequences(corpus, 384, 0)
    mixture = Mixture(8, batch_size=4, seq_len=384, recall_fraction=0.375)
    seen = []
    for step in range(4):
        for rank in range(2):
            groups = dict(Stream(corpus, tokenizer, mixture, rank, 2)[step])
            seen.append(groups[TEXT]["ids"].view(-1, 384))
    found = torch.cat(seen).numpy()
    assert len(found) == 2 * (3 + 2 + 3 + 2)
    assert all(np.array_equal(found[i], rows.sequence(i)[0]) for i in range(len(found)))


def test_recall_rows_differ_between_steps_and_ranks_and_have_answers(material):
    mixture = Mixture(8, batch_size=2, seq_len=512, recall_fraction=0.5)
    seen = {}
    for step in range(3):
        for rank in range(2):
            batch = dict(Stream(*material, mixture, rank, 2)[step])[RECALL]
            assert batch["answers"].sum() > 0
            seen[step, rank] = batch["ids"].numpy().tobytes()
    assert len(set(seen.values())) == 6


def test_weights_are_means_over_the_step(material):
    mixture = Mixture(
        2,
        batch_size=4,
        seq_len=384,
        recall_fraction=0.25,
        answer_weight=0.7,
        cross_entropy_weight=0.2,
        micro_batch_size=2,
    )
    batches = Stream(*material, mixture)[0]
    assert [name for name, _ in batches] == [TEXT, TEXT, RECALL]
    total = sum(float(batch["kl_weight"].sum()) for _, batch in batches)
    assert total == pytest.approx(1.0, rel=1e-5)
    assert sum(float(batch["ce_weight"].sum()) for _, batch in batches) == pytest.approx(0.9, rel=1e-5)
    together = Stream(*material, Mixture(2, batch_size=4, seq_len=384, recall_fraction=0.25, separate_recall=False))[0]
    assert len(together) == 1 and together[0][1]["ids"].shape == (1, 4 * 384)


def test_later_steps_may_have_longer_rows_and_more_facts(material):
    recall = RecallSettings(facts=(1, 16))
    mixture = Mixture(
        10,
        batch_size=4,
        seq_len=256,
        recall_fraction=0.0,
        long_steps=2,
        long_seq_len=512,
        recall=recall,
        fact_warmup=0.5,
    )
    stream = Stream(*material, mixture)
    assert stream[7][0][1]["ids"].shape == (1, 1024) and mixture.shape(7) == (4, 256)
    assert stream[8][0][1]["ids"].shape == (1, 1024) and mixture.shape(8) == (2, 512)
    assert [mixture.recall_settings(step).facts for step in (0, 2, 5, 9)] == [(1, 1), (1, 3), (1, 16), (1, 32)]


def test_a_sampler_goes_on_where_it_is_told():
    assert list(ResumeSampler(5, 3)) == [3, 4] and len(ResumeSampler(5, 3)) == 5
