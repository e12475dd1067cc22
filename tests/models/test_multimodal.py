"""Text models inside multimodal ones become hybrids in place, and images go on working."""

import copy
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nha import hybridize, set_windows
from nha.models.families import MULTIMODAL
from nha.models.windows import attention_layers
from tests.models.families import COMMON, tokens

WINDOW, IMAGE = 8, 90
TEXT = tokens(4, 64, seed=3).clamp_max(IMAGE - 1)
SIGHT = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
CONFIGS = {
    "gemma3": dict(
        text_config=COMMON | dict(head_dim=8, sliding_window=64, layer_types=["full_attention"] * 3),
        vision_config=SIGHT | dict(model_type="siglip_vision_model"),
        image_token_id=IMAGE,
        boi_token_id=IMAGE + 1,
        eoi_token_id=IMAGE + 2,
        mm_tokens_per_image=4,
    ),
    "mistral3": dict(
        text_config=COMMON | dict(model_type="mistral", head_dim=8, sliding_window=None),
        vision_config=SIGHT | dict(model_type="pixtral", head_dim=16),
        image_token_index=IMAGE,
        spatial_merge_size=1,
        vision_feature_layer=-1,
    ),
    "qwen2_5_vl": dict(
        text_config=COMMON | dict(rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1]}),
        vision_config=dict(
            depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[0]
        ),
        image_token_id=IMAGE,
        vision_start_token_id=IMAGE + 1,
        vision_end_token_id=IMAGE + 2,
        video_token_id=IMAGE + 3,
    ),
}


@cache
def _original(family):
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **CONFIGS[family])).eval()


def original(family):
    return copy.deepcopy(_original(family))


def convert(family, **options):
    return hybridize(original(family), **({"num_slots": 6, "window_size": WINDOW, "calibration": TEXT} | options))


def image_inputs(family, length=20):
    """Tokens of text around those of one image, and its pixels."""
    generator = torch.Generator().manual_seed(1)
    ids = TEXT[:1, :length].clone()
    ids[0, 1:5] = IMAGE
    if family == "qwen2_5_vl":
        ids[0, 0] = IMAGE + 1
        pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=generator)
        kinds = (ids == IMAGE).int()
        return {
            "input_ids": ids,
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": kinds,
        }
    found = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}
    if family == "mistral3":
        found["image_sizes"] = torch.tensor([[28, 28]])
    if family == "gemma3":
        found["token_type_ids"] = (ids == IMAGE).long()
    return found


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


KNOWN = [name for name in MULTIMODAL if name in CONFIG_MAPPING]
families = pytest.mark.parametrize("family", KNOWN)


@families
def test_the_language_model_is_converted_in_place(family):
    model = original(family)
    wanted = logits(model, input_ids=TEXT[:, :WINDOW])
    assert hybridize(model, 6, WINDOW, calibration=TEXT) is model
    assert type(model).__name__.startswith("NHA")
    assert model.config.window_sizes == model.config.text_config.window_sizes == [WINDOW] * 3
    assert model.config.model_type == f"nha-{family}"
    assert torch.equal(logits(model, input_ids=TEXT[:, :WINDOW]), wanted)
    assert len(attention_layers(model)) == 3


@families
def test_images_go_on_working(family):
    inputs = image_inputs(family)
    wanted = logits(original(family), **inputs)
    model = convert(family)
    assert logits(model, **inputs).isfinite().all()
    with torch.no_grad():
        longer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert longer.shape[1] > inputs["input_ids"].shape[1]
    set_windows(model, [-1] * 3)
    assert torch.equal(logits(model, **inputs), wanted)


@pytest.mark.parametrize(
    "family", [name for name in KNOWN if name != "gemma3"]
)  # in Gemma 3 an image's tokens see each other forwards
def test_images_within_the_window_give_the_originals_bits(family):
    inputs = image_inputs(family)
    model = convert(family, window_size=32)
    assert torch.equal(logits(model, **inputs), logits(original(family), **inputs))


@families
def test_a_multimodal_hybrid_survives_saving(family, tmp_path):
    model = convert(family, window_size=[WINDOW, -1, 4])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    for weight in loaded.parameters():  # a product of weights at the odd addresses of a mapped file may round otherwise
        weight.data = weight.data.clone()
    assert type(loaded) is type(model) and loaded.config.window_sizes == [WINDOW, -1, 4]
    inputs = image_inputs(family)
    assert torch.equal(logits(loaded, **inputs), logits(model, **inputs))


@families
def test_a_multimodal_hybrid_is_not_converted_again(family):
    with pytest.raises(ValueError, match="not a hybrid yet"):
        hybridize(convert(family), 6, WINDOW, calibration=TEXT)
