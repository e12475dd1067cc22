"""Checkpoints are read whole or refused with a reason: nothing that is missing is made up."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nha.errors import BadInput
from nha.models import loading
from tests.convert.test_hybridize import byte_tokenizer
from tests.models.families import hybrid, teacher


@pytest.fixture(params=["hybrid", "original"])
def saved(request, tmp_path):
    """A hybrid or an ordinary model on disk."""
    byte_tokenizer(tmp_path)
    model = hybrid(vocab_size=300) if request.param == "hybrid" else teacher(vocab_size=300)
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    file = folder / "model.safetensors"
    weights = {name: x.clone() for name, x in load_file(file).items()}
    save_file(change(weights), file, metadata={"format": "pt"})


def refused(folder, *words):
    with pytest.raises(BadInput) as found:
        loading.load(loading.find(str(folder)))
    message = str(found.value)
    assert "\n" not in message
    for word in (str(folder), *words):
        assert word in message, message


def test_a_whole_checkpoint_is_read(saved):
    model, tokenizer = loading.load(loading.find(str(saved)))
    assert not model.training and model.dtype == torch.float32
    assert tokenizer("a").input_ids
    assert loading.load(loading.find(str(saved)), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_missing_weights_are_listed(saved):
    rewrite(saved, lambda weights: {name: x for name, x in weights.items() if "k_proj" not in name})
    names = [f"model.layers.{i}.self_attn.k_proj.weight" for i in range(3)]
    refused(saved, "3 missing", *names)


def test_misshapen_weights_are_refused(saved):
    rewrite(saved, lambda weights: {name: x[:1] if "k_proj" in name else x for name, x in weights.items()})
    refused(saved)


def test_a_hybrids_gates_are_never_made_up(tmp_path):
    hybrid().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: {name: x for name, x in weights.items() if ".nha." not in name})
    listed = r"18 missing \(model\.layers\.0\.self_attn\.nha\.g_proj\.bias, .* and 14 more"
    for load in (AutoModelForCausalLM.from_pretrained, type(hybrid()).from_pretrained):
        with pytest.raises(ValueError, match=listed):
            load(tmp_path)


def test_weights_that_a_hybrid_does_not_know_are_refused(tmp_path):
    hybrid().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights | {"model.layers.9.self_attn.nha.sink_key": torch.ones(2)})
    with pytest.raises(ValueError, match=r"1 unknown \(model\.layers\.9\.self_attn\.nha\.sink_key\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_loading_info_is_still_given(tmp_path):
    hybrid().save_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model).__name__ == "NHALlamaForCausalLM" and not info["missing_keys"]


@pytest.mark.parametrize("cut", [0, 7, 200, -1])
def test_a_truncated_file_is_named(saved, cut):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    refused(saved, "model.safetensors")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"text"', "null", "[" * 20000, '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_is_named(saved, text):
    (saved / "model.safetensors.index.json").write_text(text)
    refused(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 20000, '{"model_type": 3}', '{"model_type": "none"}'])
def test_a_damaged_config_is_named(saved, text):
    (saved / "config.json").write_text(text)
    refused(saved)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": "three"}, {"window_sizes": [8]}, {"num_slots": -1}, {"hidden_size": 0}], ids=str
)
def test_a_config_that_cannot_be_is_refused(tmp_path, change):
    hybrid().save_pretrained(tmp_path)
    byte_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    refused(tmp_path)


def test_a_directory_without_a_tokenizer_is_refused(saved):
    for path in saved.glob("tokenizer*"):
        path.unlink()
    refused(saved, f"expected a tokenizer in {saved}, there is none")


def test_a_damaged_tokenizer_is_refused_with_the_kind_of_the_error(saved):
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="KeyError: 'added_tokens'"):
        loading.load_tokenizer(loading.find(str(saved)))


def test_names_that_are_nothing():
    for name in ("no/such/place/at/all", "owner/model-that-is-nowhere", "[red]text", ""):
        with pytest.raises(BadInput):
            loading.find(name)


def test_looking_a_model_up_needs_no_pytorch_to_be_imported():
    code = "import sys; sys.argv[0] = 'nha'; import nha.models.loading; "
    code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False"]
