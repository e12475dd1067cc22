"""Refusals in vLLM itself: one line that names the reason, before the model is loaded."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.vllm_plugin.material import engine

pytestmark = pytest.mark.vllm


def test_windows_that_cannot_be_are_named(hybrid, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(hybrid, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"window_sizes": [8, -1, 0, [16, 4, 4], -1]}))
    with pytest.raises(Exception, match="layer 3"), engine(path):
        pass


def test_missing_gates_are_named(hybrid, tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model"
    shutil.copytree(hybrid, path)
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.0.self_attn.nha.g_proj.bias"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"layers\.0\.self_attn\.nha\.bias"), engine(path):
        pass
