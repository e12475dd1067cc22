"""Which server runs a model, why, and with which command."""

from __future__ import annotations

import itertools

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from nha import NHAConfig
from nha.cli import app
from nha.errors import BadInput
from nha.models.loading import Source
from nha.serve import launch
from nha.serve.launch import Choice, choose, start, text_length, vllm_command
from nha.serve.settings import ServeSettings


@pytest.fixture
def source(tmp_path):
    return Source("my-hybrid", NHAConfig.tiny(), tmp_path)


def test_vllm_runs_what_it_can(source, monkeypatch):
    monkeypatch.setattr(launch, "vllm_refusal", lambda source: None)
    monkeypatch.setattr(launch, "vllm_version", lambda: "0.32.0")
    choice = choose("auto", source, ServeSettings())
    assert choice.backend == "vllm"
    assert "0.32.0" in choice.why


def test_transformers_runs_the_rest_and_the_reason_is_said(source, monkeypatch):
    monkeypatch.setattr(launch, "vllm_refusal", lambda source: "vLLM is not installed")
    monkeypatch.setattr(launch, "find_spec", lambda name: object())
    choice = choose("auto", source, ServeSettings())
    assert choice.backend == "transformers"
    assert "vLLM is not installed" in choice.why
    with pytest.raises(BadInput, match="vLLM is not installed"):
        choose("vllm", source, ServeSettings())


def test_where_there_is_no_server_the_command_that_installs_one_is_named(source, monkeypatch):
    monkeypatch.setattr(launch, "vllm_refusal", lambda source: "vLLM is not installed")
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"nha\[serve\]"):
        choose("auto", source, ServeSettings())


def test_a_missing_vllm_is_no_reason_to_import_it(source, monkeypatch):
    monkeypatch.setattr(launch, "vllm_version", lambda: None)
    assert launch.vllm_refusal(source) == "vLLM is not installed"


def test_the_command_holds_the_limits_and_no_key(source):
    settings = ServeSettings(port=9000, max_length=512, max_requests=7, drain_s=5)
    command = vllm_command(source, "127.0.0.1", settings, ["--enforce-eager"])
    pairs = dict(itertools.pairwise(command))
    assert pairs["--max-model-len"] == "512"
    assert pairs["--max-num-seqs"] == "7"
    assert pairs["--shutdown-timeout"] == "5"
    assert pairs["--host"] == "127.0.0.1"
    assert command[-1] == "--enforce-eager"
    assert "--api-key" not in command


@pytest.mark.parametrize("key", ["", " "])
def test_an_empty_key_is_refused_since_it_would_let_everybody_in(key, tmp_path):
    result = CliRunner().invoke(app, ["serve", "smollm2", "--api-key", key])
    assert result.exit_code == 2 and f"--api-key to be a key, got {key!r}" in result.stderr


def test_an_embedded_model_is_served_under_its_name(tmp_path):
    source = Source("smollm2-hybrid", NHAConfig.tiny(), tmp_path)
    pairs = dict(itertools.pairwise(vllm_command(source, "127.0.0.1", ServeSettings(), [])))
    assert pairs["--served-model-name"] == "smollm2-hybrid"
    assert pairs["--model"] == str(tmp_path)


def test_options_of_vllm_are_refused_beside_transformers(source):
    with pytest.raises(BadInput, match="--enforce-eager"):
        start(source, Choice("transformers", ""), "127.0.0.1", None, ServeSettings(), ["--enforce-eager"])


def test_a_text_is_as_long_as_the_config_says(source):
    assert text_length(source) == 1 << 16


def test_a_memory_on_disk_is_for_transformers(source, monkeypatch):
    monkeypatch.setattr(launch, "vllm_refusal", lambda source: None)
    monkeypatch.setattr(launch, "find_spec", lambda name: object())
    choice = choose("auto", source, ServeSettings(memory="m"))
    assert choice.backend == "transformers"
    assert "--enable-prefix-caching" in choice.why
    with pytest.raises(BadInput, match="--enable-prefix-caching"):
        choose("vllm", source, ServeSettings(memory="m"))


def test_packed_states_are_for_hybrids_and_vllm_learns_of_them(source):
    pairs = dict(itertools.pairwise(vllm_command(source, "127.0.0.1", ServeSettings(state_dtype="int8"), [])))
    assert pairs["--hf-overrides"] == '{"state_dtype": "int8"}'
    with pytest.raises(BadInput, match="hybrid for --state-dtype"):
        choose("auto", Source("plain", LlamaConfig(), source.directory), ServeSettings(state_dtype="int8"))


def test_keys_and_values_in_8_bits_are_for_hybrids_and_transformers(source, monkeypatch):
    monkeypatch.setattr(launch, "find_spec", lambda name: object())
    assert choose("auto", source, ServeSettings(kv_cache_dtype="int8")).backend == "transformers"
    with pytest.raises(BadInput, match="its own --kv-cache-dtype"):
        choose("vllm", source, ServeSettings(kv_cache_dtype="int8"))
    with pytest.raises(BadInput, match="hybrid for --kv-cache-dtype"):
        choose("auto", Source("plain", LlamaConfig(), source.directory), ServeSettings(kv_cache_dtype="int8"))
