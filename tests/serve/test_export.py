"""The directory for MLX holds all that it needs, and other models are refused. vLLM's tests run it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from nha.cli.app import app
from nha.errors import BadInput
from nha.models.loading import Source
from nha.serve.export import CODE, check_export


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "hybrid"
    folder.mkdir()
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = {
        "model_type": "nha-llama",
        "window_sizes": [[4, -1]],
        "auto_map": {"AutoConfig": "modeling_nha.a"},
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "chat_template.jinja", "modeling_nha.py"):
        (folder / name).write_text("{}")
    from safetensors.torch import save_file

    save_file({}, folder / "model.safetensors")
    return folder


def test_the_directory_holds_weights_tokenizer_and_code(folder, tmp_path):
    result = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "mlx")])
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "mlx").iterdir()}
    assert names == {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors", CODE}
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["model_file"] == CODE
    assert config["window_sizes"] == [[4, -1]]
    assert "auto_map" not in config
    compile((tmp_path / "mlx" / CODE).read_text(), CODE, "exec")


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
