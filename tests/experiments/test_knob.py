"""One model is measured at every window, and written as a table and a picture."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from experiments import knob
from nha import NHAConfig, NHAForCausalLM
from nha.models.windows import set_windows
from nha.train.knob import repeat_accuracy, turn_knob
from tests.train.material import material


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a corpus and a model with its tokenizer."""
    path = tmp_path_factory.mktemp("knob")
    _, tokenizer = material(path)
    torch.manual_seed(0)
    NHAForCausalLM(NHAConfig.tiny(vocab_size=320, window_sizes=[8, 8])).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    return path


def test_the_knob_measures_what_models_of_these_windows_are():
    torch.manual_seed(0)
    model = NHAForCausalLM(NHAConfig.tiny(window_sizes=8)).eval()
    ids = torch.randint(128, (3, 40))
    rows = turn_knob(model, ids, (0, 16, -1))
    set_windows(model, 16)
    assert turn_knob(model, ids, (16,))[0] == rows[1]
    assert rows[0]["cache_bytes"] < rows[1]["cache_bytes"] and {0 <= row["recall"] <= 1 for row in rows} == {True}


def test_a_model_that_repeats_is_right_everywhere():
    class Next(NHAForCausalLM):
        """Predicts the token after the one it reads, counting up."""

    model = Next(NHAConfig.tiny(window_sizes=-1, num_hidden_layers=1, hidden_size=128, head_dim=16)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        model.get_input_embeddings().weight.copy_(torch.eye(128))
        model.get_output_embeddings().weight.copy_(torch.eye(128).roll(1, 0))
    ids = torch.arange(3, 43)[None]
    assert repeat_accuracy(model, ids) == 1.0


def test_the_script_writes_a_table_and_a_picture(place, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, out = place / "model", tmp_path / "out"
    options = ["--windows", "0,8,-1", "--seq-len", "64", "--texts", "2", "--dtype", "float32"]
    assert knob.main([f"a={path}", f"b={path}", "--corpus", str(place / "corpus"), "--output", str(out), *options]) == 0
    with (out / "knob.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["window"]) for row in rows] == [(m, w) for m in "ab" for w in ("0", "8", "-1")]
    found = json.loads((out / "knob.json").read_text())
    assert set(found["perplexity of a relative to"]["b"].values()) == {1.0}
    assert (out / "knob.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        knob.main(["no-name", "--corpus", str(place / "corpus")])
