"""Files beside a saved hybrid's weights, and who can load it."""

import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nha.convert.card import CardFacts, base_license, model_card, save_hybrid
from nha.models.adapter import to_hybrid
from nha.models.delta import save_delta
from tests.convert.test_hybridize import byte_tokenizer
from tests.models.families import hybrid, teacher, tokens

HOSTILE = 'a: b\nlicense: none\n---\n# "title" | <b>'


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model = hybrid("llama", [8, -1, 4], vocab_size=300)
    facts = CardFacts("owner/base", {"original": 2.0, "hybrid": 3.0}, "4 texts of 512 tokens", seed=7)
    save_hybrid(model, tokenizer, folder, facts)
    return folder


def fields(text):
    return ModelCard(text).data.to_dict()


def test_everything_that_a_user_needs_is_saved_with_the_same_rights(saved):
    names = {path.name for path in saved.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "modeling_nha.py"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "README.md"}
    assert len({stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}) == 1
    assert AutoTokenizer.from_pretrained(saved).chat_template


def test_the_card_names_its_base_and_what_was_measured(saved):
    text = (saved / "README.md").read_text()
    data = fields(text)
    assert data["base_model"] == "owner/base"
    assert data["pipeline_tag"] == "text-generation" and data["library_name"] == "transformers"
    assert "| original | 2.00 | 1.00 |\n| hybrid | 3.00 | 1.50 |" in text
    for part in ("pip install nha", "apply_chat_template", "4 texts of 512 tokens", "seed 7", "[8, -1, 4]"):
        assert part in text


def test_the_cards_example_runs_as_it_stands(saved, monkeypatch):
    example = (saved / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(example.replace("path/to/this/folder", str(saved)).replace("max_new_tokens=100", "max_new_tokens=2"), {})


def test_a_hostile_name_injects_nothing():
    facts = CardFacts(HOSTILE, {HOSTILE: 2.0}, HOSTILE, seed=0)
    text = model_card(hybrid().config, facts)
    assert fields(text) == fields(model_card(hybrid().config, CardFacts("/no/hub/id")))
    assert len([line for line in text.splitlines() if line.startswith("# ")]) == 1
    assert "<b>" not in text.replace("\\<b\\>", "")
    assert "\nlicense: none" not in text


def test_a_directory_is_no_base_on_the_hub_but_may_name_its_licence(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Something\n")
    data = fields(model_card(hybrid().config, CardFacts(str(tmp_path))))
    assert "base_model" not in data and data["license"] == "mit"
    assert str(tmp_path) not in model_card(hybrid().config, CardFacts(str(tmp_path)))


def test_no_file_of_a_hybrid_tells_where_the_original_was(tmp_path):
    original, folder = tmp_path / "somewhere" / "original", tmp_path / "hybrid"
    teacher("llama", vocab_size=300).save_pretrained(original)
    byte_tokenizer(original)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(original), AutoTokenizer.from_pretrained(original)
    to_hybrid(model, [8, -1, 4], num_slots=4)
    save_hybrid(model, tokenizer, folder, CardFacts(str(original)))
    save_delta(tmp_path / "delta", model, {}, {})
    files = [*folder.iterdir(), tmp_path / "delta"]
    assert [path.name for path in files if b"somewhere" in path.read_bytes()] == []
    assert json.loads((folder / "config.json").read_text())["converted_from"] == "original"


@pytest.mark.parametrize("text", ["no fields", "---\n: [\n---\n", "---\n- a list\n---\n"])
def test_a_strange_card_of_the_base_gives_no_licence(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert base_license(str(tmp_path)) is None


def test_the_embedded_models_licence_is_known():
    assert base_license("HuggingFaceTB/SmolLM2-135M-Instruct") == "apache-2.0"


# Who can load it


def run(code, folder, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"} | environment,
    )


BLOCKED = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nha":
            raise ModuleNotFoundError("No module named 'nha'", name="nha")
sys.meta_path.insert(0, Finder())
"""
LOAD = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
assert "nha" not in sys.modules
AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, type(model.model.layers[0].self_attn).__name__, model.config.window_sizes)
"""


def test_a_process_that_never_imported_nha_loads_it_with_trust(saved):
    found = run(LOAD, saved)
    assert found.stdout.split("\n")[0] == "NHALlamaForCausalLM NHALlamaAttention [8, -1, 4]", found.stderr


def test_without_nha_the_error_says_what_to_install(saved):
    found = run(BLOCKED + LOAD, saved)
    assert found.returncode
    assert "pip install nha" in found.stderr.strip().splitlines()[-1]


def test_a_model_loaded_with_trust_is_saved_as_before(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True).eval()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {path.name for path in saved.iterdir()}
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (saved, tmp_path))
    assert second["auto_map"] == first["auto_map"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_is_the_bases(dtype, tmp_path):
    hybrid().to(dtype).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).dtype == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype
