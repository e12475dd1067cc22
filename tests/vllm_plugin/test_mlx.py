"""An exported hybrid in MLX: the logits of transformers and its greedy tokens, in one call and in pieces."""

# pyright: reportMissingImports=false
from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nha.models.loading import find
from nha.serve.export import export_mlx
from tests.vllm_plugin.material import greedy, make_model, make_prompts

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def path(request, hybrid, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlx")
    return hybrid if request.param == "llama" else make_model(folder / "hybrid", request.param, [8, -1, [16, 4]])


@pytest.fixture(scope="module")
def model(path, tmp_path_factory):
    from mlx_lm.utils import load_model

    output = tmp_path_factory.mktemp("mlx") / "exported"
    export_mlx(find(str(path)), output)
    return load_model(output, trust_remote_code=True)[0]


@pytest.mark.parametrize("length", [1, 7, 40, 150])
def test_logits_are_those_of_transformers_at_once_and_in_pieces(length, path, model):
    import mlx.core as mx

    (prompt,) = make_prompts([length])
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(path).eval()(torch.tensor([prompt])).logits[0].numpy()
    bound = 64 * np.finfo(np.float32).eps * np.abs(wanted).max()
    assert np.abs(np.array(model(mx.array([prompt])))[0] - wanted).max() < bound
    cache, found = model.make_cache(), []
    for start, stop in ((0, length // 3), (length // 3, length - 1), (length - 1, length)):
        if stop > start:
            found.append(np.array(model(mx.array([prompt[start:stop]]), cache=cache))[0])
    assert np.abs(np.concatenate(found) - wanted).max() < bound


def test_tokens_are_those_of_transformers(path, model):
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    (prompt,) = make_prompts([60])
    written = [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=24)]
    assert written == greedy(path, [prompt], 24)[0]


def test_a_cache_takes_constant_room(hybrid, tmp_path):
    import mlx.core as mx
    from mlx_lm.utils import load_model

    path = make_model(tmp_path / "hybrid", "llama", [8, [16, 4]])
    export_mlx(find(str(path)), tmp_path / "mlx")
    model = load_model(tmp_path / "mlx", trust_remote_code=True)[0]
    cache, sizes = model.make_cache(), []
    for prompt in make_prompts([40, 100]):
        model(mx.array([prompt]), cache=cache)
        sizes.append(sum(own.nbytes for own in cache))
    assert sizes[0] == sizes[1]
