"""The directory for MLX holds all that it needs, and other models are refused. vLLM's tests run it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nha.cli.app import app
from nha.errors import BadInput
from nha.models.loading import Source
from nha.serve.export import CODE, check_export
from tests.convert.test_hybridize import byte_tokenizer
from tests.models.families import hybrid


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "hybrid"
    hybrid("llama", [(4, -1), 8, 8]).save_pretrained(folder)
    byte_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{}")
    return folder


def test_the_directory_holds_weights_tokenizer_and_code(folder, tmp_path):
    result = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "mlx")])
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "mlx").iterdir()}
    copied = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == {*copied, "model.safetensors", CODE}
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["model_file"] == CODE
    assert config["window_sizes"] == [[4, -1], 8, 8]
    assert "auto_map" not in config
    compile((tmp_path / "mlx" / CODE).read_text(), CODE, "exec")


def without_gates(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({name: x for name, x in weights.items() if "g_proj" not in name}, folder / "model.safetensors")


def with_more_slots(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_slots": 9}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (without_gates, "6 missing (model.layers.0.self_attn.nha.g_proj.bias"),
        (with_more_slots, "model.layers.0.self_attn.nha.g_proj.bias: [12] for [18]"),
    ],
)
def test_what_mlx_could_not_run_rightly_is_not_written(damage, named, folder, tmp_path):
    damage(folder)
    result = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "mlx")])
    assert result.exit_code == 2 and named in result.stderr
    assert not (tmp_path / "mlx").exists()


def test_a_directory_with_files_is_kept(folder):
    result = CliRunner().invoke(app, ["export", str(folder), str(folder)])
    assert result.exit_code == 2
    assert (folder / "modeling_nha.py").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "nha-gemma2"}, "nha-gemma2"),
        ({"window_sizes": None}, "nha hybridize"),
        ({"slot_write": "exact"}, "exact"),
        ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
    ],
)
def test_what_the_code_cannot_run_is_refused(changes, named, tmp_path):
    config = SimpleNamespace(**({"model_type": "nha-llama", "window_sizes": [8], "slot_write": "soft"} | changes))
    with pytest.raises(BadInput, match=named):
        check_export(Source("m", config, tmp_path))
