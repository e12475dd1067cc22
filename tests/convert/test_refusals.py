"""A model that cannot be converted is refused with the reason and left as it was; one that can be is checked."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nha import hybridize
from nha.convert import hybridize as module
from nha.models import families
from nha.models.windows import attention_layers
from tests.models.families import COMMON, EXPERTS, MIXED, teacher, tokens

TEXT = tokens(4, 64, seed=3)
WINDOW = 8
OTHERS = {
    "deepseek_v3": dict(n_routed_experts=8, moe_intermediate_size=8, q_lora_rank=8, kv_lora_rank=8),
    "mamba2": dict(num_heads=4, head_dim=16, n_groups=1),
    "gpt2": dict(n_head=2),
    "bloom": dict(n_head=2),
    "gptj": dict(n_head=2, n_embd=128),
    "gpt_neox": {},
    "opt": dict(ffn_dim=32),
    "jetmoe": {},
    "jamba": dict(mamba_d_state=4, mamba_dt_rank=4),
    "llama4_text": dict(num_local_experts=2),
}
WRONG = {
    "diffllama": {},
    "dory": {},
    "flint": MIXED | EXPERTS,
    "gpt_oss": dict(head_dim=8, num_local_experts=4),
    "granite_swa": {},
    "granitemoe_swa": dict(num_local_experts=4),
    "mimo_v2_flash": EXPERTS | dict(head_dim=8),
}


def made(family, sizes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(COMMON | sizes))).eval()


def known(table):
    return [family for family in table if family in CONFIG_MAPPING]


def convert(model, **options):
    return hybridize(model, **({"num_slots": 6, "window_size": WINDOW, "calibration": TEXT} | options))


class Snapshot:
    """Everything of a model that a conversion touches."""

    def __init__(self, model, reads=True):
        self.model, self.reads = model, reads
        self.kinds = [(type(m), vars(m).keys(), m.training, len(m._forward_pre_hooks)) for m in model.modules()]
        self.config = type(model.config), copy.deepcopy(model.config.to_dict()), model.config._attn_implementation
        self.weights = {name: x.clone() for name, x in model.state_dict().items()}
        self.logits = self.predict() if reads else torch.empty(0)

    def predict(self):
        with torch.no_grad():
            return copy.deepcopy(self.model).eval()(tokens(1, 20)).logits

    def check(self):
        now = Snapshot(self.model, self.reads)
        assert now.kinds == self.kinds
        assert now.config == self.config
        assert now.weights.keys() == self.weights.keys()
        assert all(torch.equal(x, self.weights[name]) for name, x in now.weights.items())
        assert torch.equal(now.logits, self.logits)


@pytest.mark.parametrize("family", known(OTHERS))
def test_attention_of_another_kind_is_refused_before_anything_changes(family):
    model = made(family, OTHERS[family])
    before = Snapshot(model, reads=False)
    with pytest.raises(ValueError, match=family):
        convert(model)
    before.check()


@pytest.mark.parametrize("family", known(WRONG))
def test_a_family_that_would_be_silently_wrong_is_refused_by_name(family):
    with pytest.raises(ValueError, match=f"{family}: {families.REFUSED[family]}"):
        families.check_family(CONFIG_MAPPING[family]())


@pytest.mark.parametrize("family", known(WRONG))
def test_such_a_family_is_found_without_its_name(family, monkeypatch):
    """The next family of this kind is not in any table: a few tokens read before and after tell."""
    monkeypatch.delitem(families.REFUSED, family)
    model = made(family, WRONG[family])
    before = Snapshot(model)
    with pytest.raises(ValueError, match=family):
        convert(model)
    before.check()


def test_a_family_outside_the_table_is_tried(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", ())
    assert type(convert(teacher())).__name__ == "NHALlamaForCausalLM"


def test_keys_that_keep_positions_are_found(monkeypatch):
    """A family that rotates some of its layers, and is not known for that."""
    monkeypatch.setitem(families.ROTATES, "smollm3", lambda module: True)
    model = teacher("smollm3")
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"keys for slots without positions in smollm3, got some in layer 1 "):
        convert(model)
    before.check()


@pytest.mark.parametrize("family", known(families.KEEP_POSITIONS))
def test_keys_that_are_known_to_keep_a_trace_of_positions_are_no_reason_to_refuse(family):
    model = teacher(family)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layernorm" in name:
                weight.copy_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) + 0.5)
    assert type(convert(model)).__name__.startswith("NHA")


@pytest.mark.parametrize("step", ["reference", "to_hybrid", "renew_hooks", "check_conversion", "calibrate_sinks"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_any_error_leaves_the_model_as_it_was(step, error, monkeypatch):
    model = teacher("gemma2").train()
    model.model.layers[1].mlp.eval()  # a mode of its own
    before = Snapshot(model)
    original = getattr(module, step)

    def fail(*args, **options):
        original(*args, **options)
        raise error("in the middle")

    monkeypatch.setattr(module, step, fail)
    with pytest.raises(error, match="in the middle"):
        convert(model)
    before.check()


def test_an_interrupted_calibration_leaves_the_model_as_it_was():
    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    model = teacher()
    before = Snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        convert(model, progress=stop)
    before.check()


def test_a_decoder_without_a_head_is_refused():
    with pytest.raises(ValueError, match="expected a causal language model, got LlamaModel"):
        convert(teacher().model)


# Weights in few bits


class PackedLinear(nn.Module):
    """A linear layer whose weight is stored as bytes of two numbers each, as bitsandbytes does."""

    def __init__(self, linear):
        super().__init__()
        self.shape, self.scale = linear.weight.shape, float(linear.weight.detach().abs().max()) / 7
        low = (linear.weight.detach() / self.scale).round().to(torch.int16).flatten().add(8).to(torch.uint8)
        self.weight = nn.Parameter((low[::2] | low[1::2] << 4)[:, None], requires_grad=False)

    def forward(self, x):
        both = torch.cat([self.weight & 15, self.weight >> 4], 1).flatten()
        return x @ ((both.to(x.dtype) - 8) * self.scale).view(self.shape).T


class ByteLinear(nn.Module):
    """A linear layer whose weight has the usual shape in 8 bits, beside a scale."""

    def __init__(self, linear, dtype):
        super().__init__()
        weight = linear.weight.detach()
        self.scale = float(weight.abs().max()) / 100
        self.weight = nn.Parameter((weight / self.scale).to(dtype), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["4 bit", torch.int8, torch.float8_e4m3fn], ids=str)
def test_weights_in_few_bits_give_gates_of_the_models_dtype(kind, dtype):
    model = teacher().to(dtype)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, PackedLinear(linear) if kind == "4 bit" else ByteLinear(linear, kind))
    with torch.no_grad():
        wanted = model(tokens(2, WINDOW)).logits
        convert(model)
        assert torch.equal(model(tokens(2, WINDOW)).logits, wanted)
        assert model(tokens(1, 40)).logits.isfinite().all()
    for layer in attention_layers(model):
        added = [*layer.nha.parameters(), *layer.nha.buffers()]
        assert {x.dtype for x in added} == {dtype}
        assert all(x.isfinite().all() for x in added)


def test_a_default_dtype_does_not_matter():
    plain = convert(teacher())
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = convert(teacher())
    finally:
        torch.set_default_dtype(torch.float32)
    for name, x in plain.state_dict().items():
        assert torch.equal(x, other.state_dict()[name]), name


# Device maps


def dispatched():
    from accelerate import dispatch_model

    main: Any = "cpu"  # a torch.device would be taken for another device than the map's "cpu"
    layers = [f"model.layers.{i}" for i in range(3)]
    names = ["model.embed_tokens", *layers, "model.norm", "model.rotary_emb", "lm_head"]
    return dispatch_model(teacher(), dict.fromkeys(names, "cpu"), main_device=main, force_hooks=True)


def test_a_model_dispatched_over_devices_is_converted():
    ids = tokens(1, 40)
    with torch.no_grad():
        assert torch.equal(convert(dispatched())(ids).logits, convert(teacher())(ids).logits)


def test_an_offloaded_model_is_refused_before_anything_changes():
    from accelerate import cpu_offload

    model = teacher()
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"weights in memory, got \d+ that are offloaded, such as model\.embed_tokens"):
        convert(model)
    assert type(model) is type(teacher()) and model.config.model_type == "llama"
