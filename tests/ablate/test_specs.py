"""Models of a table: what each is, its state in bytes, its parameters; and the ablations of the one softmax."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from nha import NHAConfig
from nha.ablate.fusion import delay
from nha.ablate.specs import ModelSpec, state_bytes, used_parameters
from nha.models.cache import cache_nbytes
from nha.models.observe import ablate
from nha.models.windows import attention_layers
from nha.ops import nha_attention

SHAPE = NHAConfig.tiny()
NHA = ModelSpec("nha", windows=8, num_slots=8)
SPECS = [
    NHA,
    ModelSpec("transformer", windows=-1),
    ModelSpec("linear", windows=0, num_slots=8),
    ModelSpec("window", windows=12, slots=False),
    ModelSpec("layers", windows=(0, -1), num_slots=8),
    ModelSpec("and full", windows=(8, -1), num_slots=8),
    ModelSpec("average", windows=8, num_slots=8, fusion="average"),
    ModelSpec("gate", windows=8, num_slots=8, fusion="gate"),
]
CONVOLVED = ModelSpec("convolved", windows=8, num_slots=8, convolution=4)
each_spec = pytest.mark.parametrize("spec", [*SPECS, CONVOLVED], ids=lambda spec: spec.name)


def ids(length: int = 40, rows: int = 2) -> torch.Tensor:
    return torch.randint(SHAPE.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, tokens):
    return model.eval()(tokens, use_cache=False).logits


@each_spec
def test_every_model_trains_and_is_causal(spec):
    model = spec.build(SHAPE)
    model(ids(), labels=ids(), use_cache=False).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    changed = ids()
    changed[:, 30:] = 0
    torch.testing.assert_close(logits(model, ids())[:, :30], logits(model, changed)[:, :30])


@each_spec
def test_models_of_one_seed_start_from_the_same_weights_again(spec):
    first, again, other = (spec.build(SHAPE, seed) for seed in (0, 0, 1))
    assert torch.equal(logits(first, ids()), logits(again, ids()))
    assert not torch.equal(logits(first, ids()), logits(other, ids()))


@each_spec
def test_matched_models_have_as_many_parameters_up_to_one_step_of_width(spec):
    wanted = used_parameters(NHA.build(SHAPE))
    step = 8 * 3 * SHAPE.hidden_size * SHAPE.num_hidden_layers
    assert abs(used_parameters(spec.build(SHAPE, match=NHA)) - wanted) <= step / 2


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.fusion == "softmax"], ids=lambda spec: spec.name)
def test_state_bytes_are_those_of_the_cache_less_what_a_model_without_slots_does_not_need(spec):
    context = 50
    model = spec.build(SHAPE).to(torch.bfloat16)
    cache = model(ids(context, rows=1), use_cache=True).past_key_values
    unneeded = 0
    if not spec.slots:
        states = [layer.state for layer in cache.layers]
        unneeded = sum(state.window_slot_key.nbytes + state.num_tokens.nbytes for state in states)
    assert state_bytes(model, context) == cache_nbytes(cache) - unneeded


@torch.no_grad()
def test_the_window_model_is_the_hybrid_without_its_slots():
    model, hybrid = ModelSpec("window", windows=8, slots=False).build(SHAPE), NHA.build(SHAPE)
    kept = {n: x for n, x in model.state_dict().items() if "g_proj" not in n}
    hybrid.load_state_dict(kept, strict=False)
    with ablate(hybrid, "slots_off"):
        assert torch.equal(logits(model, ids()), logits(hybrid, ids()))


@torch.no_grad()
def test_delayed_slots_hold_what_has_left_the_window():
    """Slots of a delayed linear RNN are those that the one softmax reads beside its window."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 20, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    gate = -torch.rand(2, 20, 2, 4, generator=generator, dtype=torch.float64)
    far = nha_attention(q, delay(k, 5), delay(v, 5), delay(gate, 5), window_size=0).out
    # With window keys of score -inf only the slots are left of the one softmax.
    away = k.new_zeros(k.shape)
    away[..., 0] = -1e9
    strong = q.clone()
    strong[..., 0] = 1.0
    expected = nha_attention(strong, away, v, gate, window_size=5, q_slot=q, k_slot=k).out
    torch.testing.assert_close(far[:, 5:], expected[:, 5:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fusion", ["average", "gate"])
@torch.no_grad()
def test_two_softmaxes_are_full_attention_while_the_window_holds_everything(fusion):
    model = ModelSpec("two", windows=16, num_slots=8, fusion=fusion).build(SHAPE)
    full = ModelSpec("full", windows=-1).build(SHAPE)
    full.load_state_dict(
        {n: x for n, x in model.state_dict().items() if n in full.state_dict() and "g_proj" not in n}, strict=False
    )
    torch.testing.assert_close(logits(model, ids(16)), logits(full, ids(16)))
    assert not torch.allclose(logits(model, ids(40)), logits(full, ids(40)))


@torch.no_grad()
def test_a_gate_of_one_half_is_the_average():
    average, gate = SPECS[-2].build(SHAPE), SPECS[-1].build(SHAPE)
    gate.load_state_dict(average.state_dict(), strict=False)
    torch.testing.assert_close(logits(average, ids()), logits(gate, ids()))
    for module in attention_layers(gate):
        module.mix_proj.bias.fill_(3.0)
    assert not torch.allclose(logits(average, ids()), logits(gate, ids()))


@torch.no_grad()
def test_convolutions_begin_as_the_layer_without_and_then_read_the_tokens_before():
    model, plain = CONVOLVED.build(SHAPE), NHA.build(SHAPE)
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(logits(model, ids()), logits(plain, ids()))
    for module in attention_layers(model):
        module.v_taps[..., 0] = 0.5
    assert not torch.allclose(logits(model, ids()), logits(plain, ids()))


@pytest.mark.parametrize("spec", [SPECS[-1], CONVOLVED], ids=lambda spec: spec.name)
def test_ablations_of_the_layer_refuse_a_cache_and_padding(spec):
    model = spec.build(SHAPE)
    assert not spec.has_cache and NHA.has_cache
    with pytest.raises(ValueError, match="cache"):
        model(ids(), use_cache=True)
    with pytest.raises(ValueError, match="padding"):
        model(ids(), attention_mask=torch.tensor([[0] * 5 + [1] * 35] * 2), use_cache=False)


@pytest.mark.parametrize(
    "settings, names",
    [
        (dict(name="x", fusion="sum"), ("sum", "average", "gate")),
        (dict(name="x", peer="mamba"), ("mamba", "gla")),
        (dict(name="x", windows=0, slots=False), ("x", "0")),
        (dict(name="x", convolution=-1), ("x", "-1")),
        (dict(name="x", convolution=4, fusion="gate"), ("x", "gate")),
        (dict(name="x", windows=(8, -1), fusion="gate"), ("x", "-1")),
        (dict(name="x", slots=False, random_windows=(0, 8)), ("x", "0")),
    ],
)
def test_models_that_cannot_be_are_refused_by_name(settings, names):
    with pytest.raises(ValueError) as error:
        ModelSpec(**settings)
    assert all(name in str(error.value) for name in names)


def test_windows_that_do_not_repeat_over_the_layers_are_refused():
    with pytest.raises(ValueError, match="3"):
        ModelSpec("x", windows=(0, 0, -1)).build(SHAPE)


@pytest.mark.skipif(find_spec("fla") is not None, reason="flash-linear-attention is installed")
def test_a_peer_without_its_library_names_what_to_install():
    with pytest.raises(ImportError, match="peers"):
        ModelSpec("gla", peer="gla").build(SHAPE)
