"""Importing nha loads no model: Auto classes get stand-ins, and the classes themselves when one is asked for."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

from nha import NHAConfig, register
from nha.models.adapter import hybrid_model_class
from nha.models.auto import AUTO, DeferredModel, config_class, model_class, model_types
from nha.models.families import MODEL_NAMES
from tests.models.families import hybrid, tokens

HEAVY = (
    "accelerate",
    "nha.layer",
    "nha.models.adapter",
    "nha.models.config",
    "nha.ops",
    "peft",
    "scipy",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "transformers.core_model_loading",
    "transformers.modeling_utils",
    "transformers.models.llama",
    "triton",
)


def run(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after(code, names):
    return json.loads(run(f"{code}\nimport json, sys\nprint(json.dumps([n for n in {names!r} if n in sys.modules]))"))


def test_the_package_loads_no_more_than_the_auto_classes():
    auto = loaded_after("from transformers import AutoConfig, AutoModelForCausalLM", HEAVY)
    assert loaded_after("import nha", HEAVY) == auto


def test_the_operator_loads_no_transformers_model():
    assert loaded_after("from nha import nha_attention", ("nha.models.adapter", "transformers.modeling_utils")) == []


def test_the_help_loads_neither_torch_nor_transformers():
    code = "import sys; sys.argv = ['nha']\nfrom nha.cli import app\nfrom typer.testing import CliRunner\n"
    code += "assert CliRunner().invoke(app, ['--help']).exit_code == 0"
    assert loaded_after(code, ("torch", "transformers", "numpy", "matplotlib")) == []


@pytest.mark.parametrize("first", ["nha", "transformers"])
def test_auto_classes_read_a_hybrid_whichever_was_imported_first(first, tmp_path):
    hybrid("qwen2", [8, -1, 4]).save_pretrained(tmp_path)
    both = "import nha, transformers" if first == "nha" else "import transformers, nha"
    code = f"{both}, sys\nprint(type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    code += "\nprint(type(transformers.AutoConfig.from_pretrained(sys.argv[1])).__name__)"
    assert run(code, tmp_path).split() == ["NHAQwen2ForCausalLM", "NHAQwen2Config"]


def test_one_hybrid_loads_the_models_of_its_family_alone(tmp_path):
    hybrid("llama", [8, -1, 4]).save_pretrained(tmp_path)
    code = f"import nha, transformers\ntransformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    names = [f"transformers.models.{family}.modeling_{family}" for family in ("llama", "qwen3", "gemma2", "olmoe")]
    assert loaded_after(code, names) == names[:1]


def test_a_model_pickled_elsewhere_is_read_by_a_new_process(tmp_path):
    model, ids = hybrid("llama", [8, -1, 4]), tokens(1, 30)
    torch.save(model, tmp_path / "model.pt")
    (tmp_path / "class").write_bytes(pickle.dumps(type(model)))
    code = "import pickle, sys, torch\nmodel = torch.load(sys.argv[1] + '/model.pt', weights_only=False)\n"
    code += "assert pickle.load(open(sys.argv[1] + '/class', 'rb')) is type(model)\n"
    code += f"print(model(torch.tensor({ids.tolist()})).logits.double().sum().item())"
    with torch.no_grad():
        assert float(run(code, tmp_path)) == pytest.approx(model(ids).logits.double().sum().item(), rel=1e-6)


def test_families_with_the_model_class_of_another_are_pickled_as_themselves():
    causal = MODEL_NAMES["causal-lm"]
    shared = [name for name in model_types() if causal.get(name.removeprefix("nha-")) == "LlamaForCausalLM"]
    assert "nha-llama" in shared
    for name in shared:
        kind = model_class(config_class(name), "causal-lm")
        assert kind.__name__ == "NHALlamaForCausalLM"
        assert pickle.loads(pickle.dumps(kind)) is kind and kind.config_class.model_type == name


def test_configurations_without_the_auto_class_give_models():
    model = AutoModelForCausalLM.from_config(NHAConfig.tiny())
    assert type(model).__name__ == "NHAForCausalLM"
    kind = type(AutoConfig.for_model("nha-llama", num_hidden_layers=1))
    assert kind is config_class("nha-llama")


def test_stand_ins_have_the_names_of_the_classes_they_stand_for():
    register()
    found = {}
    for model_type in model_types()[1:]:
        kind = config_class(model_type)
        for task, auto in AUTO.items():
            if kind in auto._model_mapping:
                found[model_type, task] = auto._model_mapping[kind].__name__
                assert found[model_type, task] == hybrid_model_class(kind, task).__name__
    assert {("nha-llama", "sequence-classification"), ("nha-gemma3", "image-text-to-text")} <= set(found)
    assert len(found) == sum(t.removeprefix("nha-") in MODEL_NAMES[task] for t in model_types()[1:] for task in AUTO)


def test_the_configuration_of_an_embedded_hybrid_is_known_to_auto_classes_in_a_new_process():
    code = "import torch\nfrom transformers import AutoModelForCausalLM\nfrom nha.models import loading\n"
    code += "config = loading.find('smollm2-hybrid').config\n"
    code += "with torch.device('meta'):\n    found = AutoModelForCausalLM.from_config(config)"
    assert run(f"{code}\nprint(type(found).__name__)").strip() == "NHALlamaForCausalLM"


def test_the_model_class_takes_the_place_of_its_stand_in(tmp_path):
    kind = config_class("nha-olmo2")
    hybrid("olmo2", [8, -1, 4]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert AutoModelForCausalLM._model_mapping[kind] is type(model)
    assert not issubclass(type(model), DeferredModel)


def test_pipelines_are_made_of_stand_ins_without_a_complaint(tmp_path, caplog):
    from tests.models.test_loading import byte_tokenizer

    hybrid("llama", [8, -1, 4]).save_pretrained(tmp_path)
    byte_tokenizer(tmp_path)
    pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert "not supported" not in caplog.text
