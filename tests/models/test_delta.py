"""A small file of gates, sinks and low-rank changes turns a base model into the hybrid that it was made of."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest
import torch

from experiments import ship
from nha.distill.run import distill
from nha.io import read_tensors, write_tensors
from nha.models import loading, smollm2
from nha.models.adapter import to_hybrid
from nha.models.delta import (
    apply_delta,
    delta_config,
    delta_quality,
    local_path_in,
    low_rank_changes,
    packed_changes,
    read_delta,
    save_delta,
)
from nha.models.embedded import EMBEDDED_ID
from tests.distill.material import material, settings, tiny
from tests.models.families import teacher


def changed(base, windows, rank=2, num_slots=5):
    """A hybrid of a base model with other gates and sinks, and low-rank changes of two layers."""
    model = copy.deepcopy(base)
    to_hybrid(model, windows, num_slots=num_slots)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".nha." in name:
                p.normal_()
            elif "0.self_attn.q_proj" in name or "2.self_attn.o_proj" in name:
                p += torch.randn(p.shape[0], rank) @ torch.randn(rank, p.shape[1]) / 10
    return model.eval()


@pytest.mark.parametrize("windows", [[8, 8, 8], [8, -1, 4], [8, [4, -1], 8]])
def test_a_base_model_with_the_file_is_the_hybrid(windows, tmp_path):
    base = teacher().eval()
    model = changed(base, windows)
    save_delta(tmp_path / "d.safetensors", model, low_rank_changes(base, model, 2), {"base": "tiny"}, torch.float32)
    again = copy.deepcopy(base)
    apply_delta(again, tmp_path / "d.safetensors")
    ids = torch.randint(97, (2, 40))
    assert (again(ids).logits - model(ids).logits).abs().max() < 1e-4
    assert (
        again.config.window_sizes == model.config.window_sizes == delta_config(tmp_path / "d.safetensors").window_sizes
    )


def test_a_file_names_its_base_and_not_the_path_that_it_was_read_from(tmp_path):
    base = teacher().eval()
    base.config.name_or_path = "/some/directory"
    model = changed(base, [8, 8, 8])
    save_delta(tmp_path / "d.safetensors", model, low_rank_changes(base, model, 2), {"base": "some/model"})
    assert delta_config(tmp_path / "d.safetensors").converted_from == "some/model"
    save_delta(tmp_path / "e.safetensors", model, low_rank_changes(base, model, 2), {})
    assert all(local_path_in(value) is None for value in read_delta(tmp_path / "e.safetensors")[1].values())


def test_metadata_with_a_path_of_this_machine_is_refused_before_anything_is_written(tmp_path):
    base = teacher().eval()
    model = changed(base, [8, 8, 8])
    with pytest.raises(ValueError, match="'/data/text' in 'command'"):
        save_delta(tmp_path / "d.safetensors", model, {}, {"command": "nha distill x y --text /data/text"})
    assert not list(tmp_path.iterdir())


def test_a_hybrid_of_the_base_takes_the_file_as_well(tmp_path):
    base = teacher().eval()
    model = changed(base, [8, 8, 8])
    save_delta(tmp_path / "d.safetensors", model, low_rank_changes(base, model, 2), {}, torch.float32)
    other = copy.deepcopy(base)
    to_hybrid(other, [4, -1, 4], num_slots=5)
    apply_delta(other, tmp_path / "d.safetensors")
    ids = torch.randint(97, (1, 30))
    assert (other(ids).logits - model(ids).logits).abs().max() < 1e-4
    wrong = copy.deepcopy(base)
    to_hybrid(wrong, [8, 8, 8], num_slots=6)
    with pytest.raises(ValueError, match="'num_slots': 5"):
        apply_delta(wrong, tmp_path / "d.safetensors")


def test_caches_keep_numbers_as_the_file_says_and_as_computed_once_it_is_installed(tmp_path):
    base = teacher().eval()
    model = changed(base, [8, [4, 16], 8])
    model.config.state_dtype = "int8"
    path = tmp_path / "d.safetensors"
    save_delta(path, model, {}, {**ship.FACTS, "command": "nha distill"})
    again = copy.deepcopy(base)
    apply_delta(again, path)
    assert again.config.state_dtype == delta_config(path).state_dtype == "int8"
    ship.install(path, tmp_path / "shipped" / "d.safetensors")
    assert delta_config(tmp_path / "shipped" / "d.safetensors").state_dtype == "float32"


def test_packed_changes_keep_most_of_what_training_changed_and_their_file_is_small(tmp_path):
    base = teacher().eval()
    model = changed(base, [8, [4, -1], 8])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "self_attn" in name and "proj" in name and ".nha." not in name:
                p += torch.randn_like(p) / 50
    path = tmp_path / "d.safetensors"
    save_delta(path, model, packed_changes(base, model), {"base": "tiny"})
    tensors, metadata = read_delta(path)
    assert metadata["format"] == "nha-delta-v2"
    codes = {name: x for name, x in tensors.items() if ".packed" in name}
    assert len(codes) == 3 * 4 + 3 and all(x.dtype == torch.uint8 for x in codes.values())
    again = copy.deepcopy(base)
    apply_delta(again, path)
    old, new, wanted = (dict(one.named_parameters()) for one in (base, again, model))
    for name, weight in wanted.items():
        if name.endswith("g_proj.weight"):
            assert (new[name] - weight).abs().max() <= weight.abs().max() / 127
        elif ".nha." not in name and name in old and not torch.equal(weight, old[name]):
            left, change = new[name] - weight, weight - old[name]
            assert left.square().sum() < 0.2 * change.square().sum(), name
    assert again.config.window_sizes == model.config.window_sizes == delta_config(path).window_sizes


def test_what_lora_trained_is_kept_exactly(tmp_path):
    corpus, tokenizer = material(tmp_path)
    chosen = settings(tokens=2 * 640, trainable="lora", lora_rank=2)
    found = distill(tiny(), tokenizer, corpus, tmp_path / "run", chosen)
    ship.make_delta(tmp_path / "d.safetensors", tiny(), found.model, {"command": "x"}, tmp_path / "run", 2)
    tensors, metadata = read_delta(tmp_path / "d.safetensors")
    assert metadata["license"] == "apache-2.0" and metadata["command"] == "x"
    assert all(x.dtype == torch.bfloat16 for x in tensors.values())
    again = tiny()
    apply_delta(again, tmp_path / "d.safetensors")
    for name, weight in found.model.state_dict().items():
        assert torch.allclose(again.state_dict()[name], weight, atol=2e-2, rtol=2e-2), name


def test_foreign_files_and_other_shapes_are_refused(tmp_path):
    base = teacher()
    model = changed(base, [8, 8, 8])
    path = tmp_path / "d.safetensors"
    save_delta(path, model, low_rank_changes(base, model, 2), {})
    wide = teacher(hidden_size=48)
    before = {name: x.clone() for name, x in wide.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj of shape \[32, 32\]"):
        apply_delta(wide, path)
    assert not hasattr(wide.config, "window_sizes")
    assert all(torch.equal(x, before[name]) for name, x in wide.state_dict().items())
    tensors, metadata = read_tensors(path)
    write_tensors(
        path.with_name("other"), tensors, {n: x for n, x in metadata.items() if n not in ("windows", "sha256")}
    )
    with pytest.raises(ValueError, match="windows in the metadata"):
        apply_delta(base, path.with_name("other"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="d.safetensors"):
        read_delta(path)
    base.get_input_embeddings().weight.data += 1
    with pytest.raises(ValueError, match="embed_tokens"):
        low_rank_changes(base, model, 2)


def test_the_embedded_models_hybrid_is_found_by_name_where_it_is_installed(tmp_path, monkeypatch, capsys):
    base = teacher()
    model = changed(base, [8, -1, 8])
    made = tmp_path / "made.safetensors"
    save_delta(made, model, low_rank_changes(base, model, 2), {**ship.FACTS, "command": "nha distill"})
    monkeypatch.setattr(smollm2, "DELTA", tmp_path / "shipped" / "smollm2-hybrid.safetensors")
    monkeypatch.setattr(smollm2, "gguf_path", lambda: tmp_path)
    monkeypatch.setattr(smollm2, "load_smollm2", lambda *_: (copy.deepcopy(base), None))
    with pytest.raises(ImportError, match="smollm2-hybrid.safetensors"):
        loading.find(loading.EMBEDDED_HYBRID)
    ship.install(made, smollm2.DELTA, {"ppl_2k": 1.08})
    assert delta_quality(smollm2.DELTA) == {"ppl_2k": 1.08}
    assert smollm2.has_hybrid()
    source = loading.find(loading.EMBEDDED_HYBRID)
    assert loading.is_hybrid(source.config) and source.base == EMBEDDED_ID
    assert "hybrid" in source.label and loading.layers_of(source.config) == 3
    loaded, _ = loading.load(source)
    ids = torch.randint(97, (1, 20))
    assert (loaded(ids.to(loaded.device)).logits.cpu() - model.eval()(ids).logits).abs().max() < 0.2
    readme = (smollm2.DELTA.parent / "README.md").read_text()
    assert "nha distill" in readme and "apache-2.0" in readme
    assert json.dumps([8, -1, 8]) in readme and "| ppl_2k | 1.080 |" in readme


def test_the_file_in_the_package_is_small_and_is_what_its_readme_says():
    if not smollm2.has_hybrid():
        pytest.skip("this revision ships no distilled hybrid")
    data = smollm2.DELTA.read_bytes()
    assert len(data) <= ship.LIMIT
    assert hashlib.sha256(data).hexdigest() in (smollm2.DELTA.parent / "README.md").read_text()
    assert len(delta_config(smollm2.DELTA).window_sizes) == smollm2.LAYERS
    assert all(local_path_in(value) is None for value in read_delta(smollm2.DELTA)[1].values())
