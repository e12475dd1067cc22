"""`hybridize` turns a model into a hybrid with nothing trained, or refuses before anything has changed."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nha import hybridize
from nha.convert.calibrate import (
    GATE_DEVIATION,
    SOFT_DEVIATION,
    SOFT_MEAN,
    SPREAD,
    WRITES_PER_TOKEN,
    key_map,
    kmeans,
)
from nha.models.observe import observe
from nha.models.windows import attention_layers
from tests.models.families import FAMILIES, teacher, tokens

WINDOW, SLOTS = 8, 6
TEXT = tokens(4, 64, seed=3)


def convert(family="llama", model=None, **options):
    settings = {"num_slots": SLOTS, "window_size": WINDOW, "calibration": TEXT} | options
    return hybridize(model or teacher(family), **settings)


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_short_inputs_do_not_change_by_one_bit(family):
    before, after = teacher(family), convert(family)
    weights = after.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in before.state_dict().items())
    ids = tokens(2, WINDOW)
    assert torch.equal(logits(after, ids), logits(before, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_planned_share_of_tokens_overwrites_each_slot(family):
    model = convert(family)
    wanted = min(0.5, WRITES_PER_TOKEN / SLOTS)
    seen_layers = []

    def see(layer, seen):
        logit = attention_layers(model)[layer].nha.g_proj(seen.hidden[:, 1:]).flatten(0, 1)
        spread = logit.std(0)
        assert torch.allclose(spread, torch.full_like(spread, GATE_DEVIATION), rtol=1e-2)
        rounding = 1e-5 * logit.abs().max()  # equal tokens have equal logits, and the threshold is one of them
        half = 0.5 / len(logit)
        assert ((logit < -rounding).float().mean(0) <= wanted + half).all()
        assert ((logit <= rounding).float().mean(0) >= wanted - half).all()
        seen_layers.append(layer)

    with observe(model, see), torch.no_grad():
        model(TEXT, use_cache=False)
    assert seen_layers == [0, 1, 2]


@pytest.mark.parametrize(("init", "rise"), [("soft", 0.0), ("spread", SPREAD)])
def test_gates_to_be_trained_have_planned_means(init, rise):
    model = convert("llama", init=init)
    means = SOFT_MEAN + torch.linspace(0, rise, SLOTS)

    def see(layer, seen):
        logit = attention_layers(model)[layer].nha.g_proj(seen.hidden[:, 1:]).flatten(0, 1).unflatten(-1, (-1, SLOTS))
        assert torch.allclose(logit.mean(0), means.expand(logit.shape[1:]), atol=1e-2)
        assert torch.allclose(logit.std(0), torch.full(logit.shape[1:], SOFT_DEVIATION), rtol=1e-2)

    with observe(model, see), torch.no_grad():
        model(TEXT, use_cache=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sink_is_the_mean_first_token(family):
    model, first = convert(family, num_sinks=1), []
    starts = TEXT[:, 1:].reshape(-1, 1)

    def see(layer, seen):
        first.append((seen.slot_key.mean(0).transpose(0, 1), seen.value.mean(0).transpose(0, 1)))

    with observe(model, see), torch.no_grad():
        model(starts, use_cache=False)
    for layer, (key, value) in zip(attention_layers(model), first, strict=True):
        assert torch.allclose(layer.nha.sink_key, key, atol=1e-5)
        assert torch.allclose(layer.nha.sink_value, value, atol=1e-5)


def test_the_key_map_is_the_projection_where_that_makes_the_keys_and_a_fit_elsewhere():
    for family, exact in (("llama", True), ("qwen2", True), ("phi3", False), ("qwen3", False)):
        model = convert(family)
        modules = attention_layers(model)

        def see(layer, seen, modules=modules, exact=exact, family=family):
            if layer:
                return
            hidden, keys = seen.hidden.flatten(0, 1), seen.slot_key.flatten(0, 1).transpose(0, 1)
            found = key_map(modules[0], hidden, keys)
            if exact:
                assert torch.equal(found.flatten(0, 1), modules[0].k_proj.weight)
            offset = keys - torch.einsum("nx,hdx->hnd", hidden, found)
            spread = (keys - keys.mean(1, keepdim=True)).norm()
            # phi3 is linear as well, so the ridge alone is between the fit and the keys
            bound = {"llama": 1e-5, "qwen2": 1e-5, "phi3": 1e-2, "qwen3": 0.9}[family]
            assert (offset - offset.mean(1, keepdim=True)).norm() <= bound * spread

        with observe(model, see), torch.no_grad():
            model(TEXT, use_cache=False)


def test_kmeans_finds_separate_clusters_and_is_seeded():
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([[-10.0, 0], [10, 0], [0, 10]])
    points = (truth.repeat(40, 1) + torch.randn(120, 2, generator=generator))[None]
    # drawn starts may share a cluster; the best of a few seeds finds them all
    runs = [kmeans(points, 3, torch.Generator().manual_seed(seed)) for seed in range(5)]
    assert min(torch.cdist(truth, run[0]).min(1).values.max() for run in runs) < 1
    assert torch.equal(runs[0], kmeans(points, 3, torch.Generator().manual_seed(0)))


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    first, second, other = convert(seed=1), convert(seed=1), convert(seed=2)
    gate = [attention_layers(m)[0].nha.g_proj.weight for m in (first, second, other)]
    assert torch.equal(gate[0], gate[1])
    assert not torch.equal(gate[0], gate[2])


def test_the_papers_form_has_copied_gates_and_no_sink():
    model = convert(init="paper", num_slots=8)
    assert model.config.slots_from_start
    assert (model.config.num_sinks, model.config.slot_distance) == (0, 0)
    for layer in attention_layers(model):
        assert torch.equal(layer.nha.g_proj.weight, layer.k_proj.weight)
        assert not layer.nha.g_proj.bias.any()


@pytest.mark.parametrize("slots", [4, 20])
def test_the_papers_gates_are_cut_or_repeated_to_the_number_of_slots(slots):
    model = convert(init="paper", num_slots=slots)
    layer = attention_layers(model)[0]
    heads = layer.k_proj.weight.unflatten(0, (2, 8))
    assert torch.equal(layer.nha.g_proj.weight.unflatten(0, (2, slots)), heads[:, torch.arange(slots) % 8])


def test_full_layers_stay_and_take_no_slots_into_the_cache():
    model = convert(full_layers=[1])
    assert model.config.window_sizes == [WINDOW, -1, WINDOW]


def test_progress_counts_the_layers_and_training_mode_is_kept():
    seen, model = [], teacher().train()
    hybrid = convert(model=model, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert hybrid is model and hybrid.training


def test_a_hybrid_survives_saving_with_its_gates(tmp_path):
    model = convert()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokens(1, 60)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_are_calibrated_in_float32(dtype):
    model = convert(model=teacher().to(dtype))
    assert attention_layers(model)[0].nha.g_proj.weight.dtype == dtype
    assert logits(model, tokens(1, 60)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "random"}, "expected init to be one of .*, got 'random'"),
        ({"window_size": [8, 8]}, "expected 3 window sizes, one per layer, got 2"),
        ({"window_size": -2}, "expected window sizes to be ints from -1 to 16777216, got -2 for layer 0"),
        ({"window_size": -1}, "expected at least one layer to convert"),
        ({"full_layers": [3]}, "expected full_layers"),
        ({"num_slots": 0}, "expected num_slots to be an int >= 1, got 0"),
        ({"num_slots": 1000}, "expected calibration text of more than 1000 tokens, the number of slots, got 252"),
        ({"calibration": "one text"}, "expected calibration to be a list of texts or ids"),
        ({"calibration": torch.zeros(3)}, r"expected calibration ids \[N, T\] of ints"),
        ({"calibration": torch.full((2, 64), 97)}, "expected calibration ids from 0 to 96, got 97 to 97"),
        ({"calibration": None}, "expected a tokenizer or ids to calibrate with, got none"),
        ({"full_layers": 2}, "expected full_layers to be a list of ints, got 2"),
        ({"full_layers": ["2"]}, "expected full_layers to be below 3, the number of layers, got '2'"),
        ({"window_size": 2**40}, "expected window sizes to be ints from -1 to 16777216, got 1099511627776"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(options, message):
    model = teacher()
    with pytest.raises(ValueError, match=message):
        convert(model=model, **options)
    assert type(model) is type(teacher())
    assert model.config.model_type == "llama" and not hasattr(model.config, "window_sizes")


def test_what_is_no_model_is_named():
    with pytest.raises(TypeError, match="expected a model of transformers, got Linear"):
        hybridize(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_hybrid_is_not_converted_again():
    with pytest.raises(ValueError, match="expected a model that is not a hybrid yet, got nha-llama"):
        convert(model=convert())


def test_texts_are_read_with_the_tokenizer_given(tmp_path):
    tokenizer = byte_tokenizer(tmp_path)
    model = convert(calibration=["some text to look at. " * 30], tokenizer=tokenizer, model=teacher(vocab_size=300))
    assert logits(model, tokens(1, 60)).isfinite().all()


def byte_tokenizer(path):
    """A tokenizer whose tokens are bytes, made here, so that no network is needed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE(vocab={c: i + 3 for i, c in enumerate(alphabet)} | {"<pad>": 0, "<s>": 1, "</s>": 2}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)
