"""Distilling a hybrid with exact slots: scores come from the teacher's attention, are trained, saved and resumed."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from nha.convert import write_scores
from nha.data.prepare import prepare
from nha.data.stream import Stream
from nha.distill import run as runs
from nha.distill.run import copy_texts, distill, make_mixture
from nha.distill.stopping import Stop
from nha.models.windows import attention_layers
from tests.distill.material import material, settings, tiny

EXACT = {"slot_write": "exact", "write_reach": 48}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return material(tmp_path_factory.mktemp("material"))


def test_a_run_learns_scores_and_its_hybrid_is_loaded(given, tmp_path, monkeypatch):
    corpus, tokenizer = given
    fitted = []

    def fit(model, texts, progress=None):
        fitted.append(write_scores.fit_write_scores(model, texts, progress))
        return fitted[-1]

    monkeypatch.setattr(runs, "fit_write_scores", fit)
    own = settings(**EXACT)
    stopped = Stop()

    def stop(entry):
        if entry["step"] == 2:
            stopped.reason = "test"

    first = distill(tiny(), tokenizer, corpus, tmp_path / "run", own, reports=runs.Reports(log=stop), stop=stopped)
    assert not first.finished
    done = distill(tiny(), tokenizer, corpus, tmp_path / "run", own)
    assert done.finished and len(fitted) == 1  # a run that is resumed has its scores
    whole = distill(tiny(), tokenizer, corpus, tmp_path / "whole", own)
    for name, x in whole.model.state_dict().items():
        assert torch.equal(done.model.state_dict()[name], x), name
    module = attention_layers(done.model)[0]
    assert module.nha.g_proj.weight.shape[0] == 2
    assert not torch.equal(module.nha.g_proj.weight, fitted[0].weights[0])
    done.model.save_pretrained(tmp_path / "hybrid")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
    ids = torch.arange(1, 60)[None]
    assert torch.equal(loaded(ids).logits, done.model(ids).logits)


def test_texts_that_repeat_a_sentence_come_from_training_documents(given, tmp_path):
    _, tokenizer = given
    names = ["Alpha", "Beta", "Gamma", "Delta", "Epsilon", "Zeta", "Eta", "Theta", "Iota", "Kappa"]
    told = [
        f"We met in the spring. The ship that {name.lower()} people took was called {name}. It sank." for name in names
    ]
    lines = [json.dumps({"text": " ".join(told[i:] + told[:i])}) for i in range(10)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    corpus = prepare([str(tmp_path / "texts.jsonl")], tmp_path / "corpus", tokenizer, min_tokens=8)
    own = settings(slot_write="exact", write_reach=400)
    texts = copy_texts(Stream(corpus, tokenizer, make_mixture(own)), own, [16, 16, 16])
    assert len(texts) > 20
    for text in texts:
        written = tokenizer.decode(text[0])
        assert written.rsplit(" ", 1)[1] in names and "\n\nThe ship that" in written


def test_a_corpus_without_such_sentences_gives_no_texts(given):
    corpus, tokenizer = given
    own = settings(**EXACT)
    assert copy_texts(Stream(corpus, tokenizer, make_mixture(own)), own, [16, 16, 16]) == []
